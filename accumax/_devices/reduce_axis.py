"""What users write as `reduce_axis=`, and the devices that it means."""

from typing import Any, TypeAlias

from .mesh import AxisNames, axes_of_mesh
from .one import ONE, Devices
from .replicated import DataParallel, PerDevice, Replicated
from .sharded import FSDP, Shards
from .wire import check_dtype
from .zero import Zero1

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
