"""What users write as `reduce_axis=`, and the devices that it means."""

import dataclasses
from typing import Any, TypeAlias

from .._tree import check_flags
from .._types import DTypeLike
from .mesh import AxisNames, MeshLike, axes_of_mesh
from .one import ONE, Devices
from .replicated import PerDevice, Replicated
from .sharded import FSDP, Shards
from .wire import check_dtype
from .zero import Zero1


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Data parallelism along a mesh axis: rows are divided, parameters are replicated.

    Pass it as `reduce_axis` to `accumax.accumulate`, `train_step`, `value_and_grad` and
    `grad`. Each device adds up the gradients of its own rows. One all-reduce adds the
    sums of all devices, at the end of a window or of a call. `reduce_axis="data"` is
    short for `reduce_axis=DataParallel("data")`.

    Args:
      axis: the mesh axis, or a tuple of axes. Other axes stay as they are.
      shard_optimizer: True divides the optimizer's state over the devices (ZeRO-1). It
        is for `accumulate` and the `train_step` of one. `tx.init` makes each device's
        part there. The call that closes a window reduce-scatters the gradient, runs the
        optimizer on the parts, and all-gathers the parameters; no other call does.
        Any optimizer works: XLA exchanges what a norm or a matrix product needs. An
        array is divided along its first dimension that the devices divide. It stays
        whole if there is none, or if that is not the first and its slices have fewer
        than 16,384 elements. Between windows, a state may move to any number of
        devices. Static.
      reduce_dtype: the dtype in which gradients cross the network, such as
        `jnp.bfloat16`. They are added up in their own, so each is rounded once, and an
        all-reduce rounds the total once more. None for their own dtype. Static.
      gather_dtype: with `shard_optimizer`, the dtype in which the changes of the
        parameters cross the network. All devices add the same rounded change to the
        same parameter. None sends the new parameters themselves. Static.
      mesh: the mesh; by default the mesh of `jax.set_mesh`.

    Raises:
      TypeError, ValueError: an argument is of a wrong type, or the mesh lacks the axis.
        At the call: an optimizer that is to be sharded is run in a `jax.shard_map`.

    >>> import accumax, jax
    >>> import jax.numpy as jnp
    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    >>> grad_fn = accumax.grad(
    ...     lambda w, x: jnp.mean(w * x),
    ...     microbatches=2,
    ...     reduce_axis=accumax.DataParallel("data", mesh=mesh),
    ... )
    >>> print(jax.jit(grad_fn)(1.0, jnp.arange(16.0)))
    7.5

    References:
      Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
      Models", arXiv 1910.02054.
    """

    axis: AxisNames
    _: dataclasses.KW_ONLY
    shard_optimizer: bool = False
    reduce_dtype: DTypeLike | None = None
    gather_dtype: DTypeLike | None = None
    mesh: MeshLike | None = None

    def __post_init__(self):
        axes_of_mesh(self.axis, self.mesh)
        check_flags(shard_optimizer=self.shard_optimizer)
        check_dtype("reduce_dtype", self.reduce_dtype)
        if check_dtype("gather_dtype", self.gather_dtype) and not self.shard_optimizer:
            raise ValueError(
                f"gather_dtype={self.gather_dtype!r} is for shard_optimizer=True: "
                "without it no parameters are gathered."
            )


ReduceAxis: TypeAlias = AxisNames | DataParallel | FSDP


def check_reduce_axis(reduce_axis: Any, count: int | None = None) -> Devices:
    """Returns the devices of `reduce_axis`; one device for None.

    `count` is the number of differentiated arguments, each with its own specs. None
    stands for one argument whose specs are not in a tuple.

    Raises:
      TypeError, ValueError: it is not a `ReduceAxis`, or the mesh lacks an axis.
    """
    if reduce_axis is None:
        return ONE
    if not isinstance(reduce_axis, FSDP):
        return _data_parallel(reduce_axis, Replicated)
    axes, specs = axes_of_mesh(reduce_axis.axis, reduce_axis.mesh), reduce_axis.specs
    each = (specs,) if count is None else (None,) * count if specs is None else specs
    return Shards(axes, reduce_axis.once, each)


def check_window_axis(reduce_axis: Any) -> Devices:
    """Returns the devices of a window with this `reduce_axis`.

    Raises:
      TypeError, ValueError: `reduce_axis` is not None, axis names or a `DataParallel`,
        or the mesh lacks an axis.
    """
    if reduce_axis is None:
        return ONE
    return _data_parallel(reduce_axis, PerDevice)


def _data_parallel(reduce_axis: Any, kind: type[Replicated]) -> Devices:
    """The devices of axis names or a `DataParallel`, of this kind unless ZeRO-1."""
    if not isinstance(reduce_axis, DataParallel):
        return kind(axes_of_mesh(reduce_axis, None))
    axes = axes_of_mesh(reduce_axis.axis, reduce_axis.mesh)
    reduce_dtype = check_dtype("reduce_dtype", reduce_axis.reduce_dtype)
    if not reduce_axis.shard_optimizer:
        return kind(axes, reduce_dtype=reduce_dtype)
    gather_dtype = check_dtype("gather_dtype", reduce_axis.gather_dtype)
    return Zero1(axes, reduce_dtype=reduce_dtype, gather_dtype=gather_dtype)
