"""The same update as the big batch, at the memory of one microbatch."""

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
