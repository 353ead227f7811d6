"""The same update as the big batch, at the memory of one microbatch.

- A window of several calls: `accumulate`, with `train_step`, `apply_gradients` or
  `tx.update`; then `flush`, `has_updated`.
- One call, divided: `value_and_grad`, `grad`, `microbatch`.
- Many devices: `DataParallel`, `FSDP`.
- What happens: `audit`, `plan`, `noise_scale`, and the module `accumax.testing`.
- Flax: the modules `accumax.linen` and `accumax.nnx`.
"""

from ._accumulate import accumulate as accumulate
from ._accumulate import flush as flush
from ._accumulate import has_updated as has_updated
from ._compiled.audit import audit as audit
from ._compiled.plan import plan as plan
from ._devices.reduce_axis import DataParallel as DataParallel
from ._devices.sharded import FSDP as FSDP
from ._microbatch import microbatch as microbatch
from ._train_step import apply_gradients as apply_gradients
from ._train_step import train_step as train_step
from ._value_and_grad import grad as grad
from ._value_and_grad import value_and_grad as value_and_grad
from ._window.measure import noise_scale as noise_scale
from ._window.state import AccumulateState as AccumulateState

__version__ = "0.2.0"
