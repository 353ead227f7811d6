"""The same update as the big batch, at the memory of one microbatch.

Across calls, `accumulate` with `train_step`, `apply_gradients` or `tx.update`, `flush`
and `has_updated`. Within one call, `value_and_grad`, `grad` and `microbatch`. On many
devices, `DataParallel` and `FSDP`. To see what happens, `audit`, `plan`, `noise_scale`
and the module `accumax.testing`. For Flax, the modules `accumax.linen` and
`accumax.nnx`.
"""

from ._accumulate import accumulate, flush, has_updated
from ._compiled.audit import audit
from ._compiled.plan import plan
from ._devices.reduce_axis import DataParallel
from ._devices.sharded import FSDP
from ._microbatch import microbatch
from ._train_step import apply_gradients, train_step
from ._value_and_grad import grad, value_and_grad
from ._window.measure import noise_scale
from ._window.state import AccumulateState

__all__ = [
    "FSDP",
    "AccumulateState",
    "DataParallel",
    "accumulate",
    "apply_gradients",
    "audit",
    "flush",
    "grad",
    "has_updated",
    "microbatch",
    "noise_scale",
    "plan",
    "train_step",
    "value_and_grad",
]

__version__ = "0.2.0"
