"""Mesh axes over which the rows of a batch are divided and gradients are summed."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from .. import _tree
from .._types import PyTree
from .._xla.varying import explicit_axes, is_checked, vary, varying
from .specs import joined, names_in, only, spec_of, without

T = TypeVar("T")

# A mesh axis or several, as users write it.
AxisNames: TypeAlias = str | Sequence[str]
MeshLike: TypeAlias = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclasses.dataclass(frozen=True)
class Axes:
    """The mesh axes of a `reduce_axis`. A *device* is one position along all of them.

    Attributes:
      names: the axes, the major one first.
      mesh: the mesh, None for the ambient one.
    """

    names: tuple[str, ...]
    mesh: MeshLike | None = None

    @property
    def inside(self) -> bool:
        """Whether what is traced runs on one device: in a `jax.shard_map` over them."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        here = [name for name in self.names if name in manual]
        if here and len(here) < len(self.names):
            raise ValueError(
                f"reduce_axis={self.names}, of which this shard_map is over {here} "
                "only. Let it be over all of them, or over none."
            )
        return bool(here)

    @property
    def count(self) -> int:
        """The number of devices.

        Raises:
          ValueError: there is no mesh, or it lacks an axis.
        """
        mesh = self.where()
        return math.prod(mesh.shape[name] for name in self.names)

    @property
    def rows(self) -> PartitionSpec:
        """How an array is sharded that has rows of all devices along its first axis."""
        return PartitionSpec(self.names)

    def index(self) -> jax.Array:
        """() int32: which device this is. Only `inside`."""
        return lax.axis_index(self.names)

    def sum(self, tree: T) -> T:
        """The sum over the devices of what each has, in one reduction. `inside`."""
        with jax.named_scope("accumax.reduce"):
            return lax.psum(self.vary(tree), self.names)

    def last(self, x: jax.Array) -> jax.Array:
        """`x` as the last device has it. `inside`."""
        dtype = x.dtype
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(x)
            data = self.last(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=impl)
        if dtype == jnp.bool_:
            return self.last(x.astype(jnp.int32)) != 0
        own = self.index() == self.count - 1
        return self.sum(jnp.where(own, x, _tree.minus_zero(dtype)))

    def any(self, pred: jax.Array) -> jax.Array:
        """bool, each whether it is true on any device. `inside`."""
        return self.sum(jnp.float32(pred)) > 0

    def all(self, pred: jax.Array) -> jax.Array:
        """bool, each whether it is true on all devices. `inside`."""
        return ~self.any(~pred)

    def vary(self, tree: T) -> T:
        """`tree`, as a value that each device may have another one of. `inside`.

        With respect to such a value, a gradient is the device's own. JAX reduces the
        others', in every backward pass.
        """
        names = frozenset(filter(is_checked, self.names))
        return jax.tree.map(lambda x: vary(x, names), tree)

    def check_own(self, what: str, tree: PyTree) -> None:
        """Checks that `tree` was not reduced before. `inside`.

        Under check_vma=False JAX does not say, and this cannot see it.

        Raises:
          ValueError: it was.
        """
        for name in filter(is_checked, self.names):
            for path, x in jax.tree_util.tree_leaves_with_path(tree):
                if name not in varying(x):
                    raise ValueError(
                        f"{what}{jax.tree_util.keystr(path)} is the same on all "
                        f"devices of {name!r}: it is reduced already, and would be "
                        f"counted {self.count} times. Pass each device's own: "
                        "differentiate with respect to jax.lax.pcast(params, "
                        f'{name!r}, to="varying"), and leave psum and pmean to '
                        "accumax."
                    )

    @property
    def alone(self) -> bool:
        """Whether the mesh has no other axis along which anything could be divided."""
        return math.prod(self.where().shape.values()) == self.count

    def map(self, fun: Callable[..., Any], args: tuple, specs: tuple, out: Any) -> Any:
        """`fun(*args)` on each device, which then is `inside`.

        `specs`, `out`: of the arguments and of the results, prefix trees, with names of
        `self` only: the mesh's other axes stay as they are.

        Leaves that are no arrays reach `fun` as they are.
        """
        mesh, nested = self.where(), jax.sharding.get_abstract_mesh().manual_axes
        specs = jax.tree.broadcast(specs, args, is_leaf=_is_spec)
        leaves, structure = jax.tree.flatten(args)
        each = jax.tree.leaves(specs, is_leaf=_is_spec)
        where = [i for i, x in enumerate(leaves) if is_array(x)]

        def on_device(*arrays: jax.Array) -> Any:
            here = dict(zip(where, arrays, strict=True))
            return fun(
                *structure.unflatten([here.get(i, x) for i, x in enumerate(leaves)])
            )

        # Not checked: a loss is to need no change, and under the check a scan that
        # begins with zeros needs one. But what is around this may be checked, and then
        # what is in it must be.
        mapped = jax.shard_map(
            on_device,
            mesh=None if nested else mesh,
            in_specs=tuple(each[i] for i in where),
            out_specs=out,
            axis_names=set(self.names),
            check_vma=any(map(is_checked, nested)),
        )
        arrays = [self._placed(leaves[i], each[i]) for i in where]
        # Without jit, shard_map takes no mesh of which it leaves an axis as it is.
        return jax.jit(mapped, inline=True)(*arrays)

    def same(self, name: str, x: jax.Array) -> jax.Array:
        """`x`, () float, that is called `name` and is not to differ by device.

        Raises:
          ValueError: it may, within a `shard_map` that checks it.
        """
        if not self.inside:
            return x
        if not varying(x).isdisjoint(self.names):
            raise ValueError(
                f"{name} may differ by device of reduce_axis={self.names}, and stands "
                "for the rows of all. Let the loss return what its own rows weigh "
                "(weighted=True), or reduce it."
            )
        # Unchecked, it may differ still, and then the devices would part company.
        return self.sum(x) / self.count

    def zeros(self, shapes: PyTree, like: PyTree) -> PyTree:
        """Zeros of these shapes for each device, under a new first axis.

        That axis has the devices' number, and each makes its own: none is made on one
        device for all. Over the mesh's other axes they are sharded as `like` is.
        `inside`, its length is 1.

        Raises:
          ValueError: `like` is sharded over `self`.
        """
        explicit = self._explicit
        like = _tree.differentiable(like)
        self.check_whole("params", like)
        specs = jax.tree.map(spec_of, like)

        def own() -> PyTree:
            def zero(s: Any, spec: PartitionSpec) -> jax.Array:
                x = jnp.zeros((1, *s.shape), s.dtype)
                if explicit:
                    spec = PartitionSpec(None, *only(spec, explicit))
                    return jax.sharding.reshard(x, spec)
                if not any(map(names_in, spec)):
                    return x  # nothing to say, or nothing that is known under jit
                return lax.with_sharding_constraint(x, PartitionSpec(None, *spec))

            return jax.tree.map(zero, shapes, specs)

        if self.inside:
            return self.vary(own())
        return self.map(own, (), (), self.rows)

    def check_whole(self, name: str, tree: PyTree) -> None:
        """Checks that every device has all of `tree`, as far as that is known now.

        Raises:
          ValueError: a leaf is sharded over `self`.
        """
        leaves = () if self.inside else jax.tree_util.tree_leaves_with_path(tree)
        for path, x in leaves:
            spec, sizes = spec_of(x), self.where().shape
            names = tuple(name for name in self.names if sizes[name] > 1)
            if any(only(spec, names)):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} is sharded by {spec}, over "
                    f"reduce_axis={self.names}, and a device needs all of it. Pass "
                    "reduce_axis=accumax.FSDP(...) to accumax.train_step or "
                    "value_and_grad, and no reduce_axis to accumax.accumulate."
                )

    def each(self, name: str, tree: PyTree) -> PyTree:
        """The shapes of what a device has of `tree`, that is called `name`.

        Raises:
          ValueError: it is not of as many devices.
        """
        count = 1 if self.inside else self.count

        def own(path: Any, x: Any) -> jax.ShapeDtypeStruct:
            if x.shape[:1] != (count,):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} has shape {x.shape}; expected "
                    f"a first axis of {count}, for the sum of each device along "
                    f"reduce_axis={self.names}. A window begins and ends with one "
                    "number of devices, and with what its accumulate was asked for."
                )
            return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

        return jax.tree_util.tree_map_with_path(own, tree)

    @property
    def _explicit(self) -> tuple[str, ...]:
        return explicit_axes(self.where())

    def where(self) -> MeshLike:
        """The mesh.

        Raises:
          ValueError: there is none, or it lacks an axis.
        """
        ambient = jax.sharding.get_abstract_mesh()
        mesh = ambient if self.mesh is None or ambient.manual_axes else self.mesh
        if mesh.empty:
            raise ValueError(
                f"reduce_axis={self.names}, and there is no mesh. Call this under "
                "jax.set_mesh(mesh), or pass accumax.DataParallel(..., mesh=mesh)."
            )
        for name in self.names:
            if name not in mesh.axis_names:
                raise ValueError(
                    f"reduce_axis={self.names}, but the mesh has no axis {name!r}: its "
                    f"axes are {dict(mesh.shape)}."
                )
        return mesh

    def _placed(self, x: Any, spec: PartitionSpec) -> jax.Array:
        """`x` sharded by `spec`, where JAX demands it because types say it."""
        x = jnp.asarray(x)
        if not self._explicit:
            return x
        old = jax.typeof(x).sharding.spec
        old = (*old, *(None,) * (x.ndim - len(old)))
        new = (*spec, *(None,) * (x.ndim - len(spec)))
        rest = without(PartitionSpec(*old), self.names)
        new = [joined(names, others) for names, others in zip(new, rest, strict=True)]
        if [joined(x, None) for x in old] == new:
            return x
        return jax.sharding.reshard(x, PartitionSpec(*new))


@dataclasses.dataclass(frozen=True)
class DataParallel:
    """Devices along a mesh axis: rows are divided, parameters are whole on each.

    For `reduce_axis=` of `accumax.accumulate`, `train_step`, `value_and_grad` and
    `grad`. Each device adds up the gradient of its own rows, and all are reduced once:
    at the end of a window, or of a call. `reduce_axis="data"` is short for
    `reduce_axis=DataParallel("data")`.

    Args:
      axis: the mesh axis, or a tuple of several. Other axes stay as they are.
      mesh: the mesh; that of `jax.set_mesh` by default.

    Raises:
      TypeError, ValueError: an argument is none of these, or the mesh lacks the axis.

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
    """

    axis: AxisNames
    _: dataclasses.KW_ONLY
    mesh: MeshLike | None = None

    def __post_init__(self):
        axes_of_mesh(self.axis, self.mesh)


def check_axes(reduce_axis: Any) -> Axes | None:
    """The `Axes` of a `reduce_axis` that is none, names, or a `DataParallel`.

    Raises:
      TypeError, ValueError: it is none of these, or the mesh lacks an axis.
    """
    if reduce_axis is None:
        return None
    if isinstance(reduce_axis, DataParallel):
        return axes_of_mesh(reduce_axis.axis, reduce_axis.mesh)
    return axes_of_mesh(reduce_axis, None)


def axes_of_mesh(axis: Any, mesh: Any) -> Axes:
    """The axes of these names.

    Raises:
      TypeError, ValueError: they are none, or the mesh lacks one.
    """
    several = isinstance(axis, (tuple, list))
    names = tuple(axis) if several else (axis,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"reduce_axis={axis!r} must be the name of a mesh axis, a tuple of them, "
            "an accumax.DataParallel or an accumax.FSDP."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"reduce_axis={axis!r} names an axis twice.")
    if mesh is not None and not isinstance(
        mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)
    ):
        raise TypeError(f"{mesh=} must be a jax.sharding.Mesh, or None.")
    axes = Axes(names, mesh)
    if mesh is not None:
        _ = axes.count  # has it these axes?
    return axes


def stacked(tree: PyTree) -> PyTree:
    """What one device has, under the first axis of what all have."""
    return jax.tree.map(lambda x: x[None], tree)


def unstacked(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)


def on_first(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """`x` on the first device along these axes, -0.0 on the others."""
    return jnp.where(lax.axis_index(names) == 0, x, _tree.minus_zero(x.dtype))


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
