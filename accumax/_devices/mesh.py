"""The axes of a mesh, and how a function runs on each device along them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._types import PyTree
from .._xla.varying import explicit_axes, is_checked
from .specs import joined, only, spec_of, without

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
    def in_shard_map(self) -> bool:
        """Whether the traced code runs in a `jax.shard_map` over these axes.

        Raises:
          ValueError: the `shard_map` is over some of the axes only.
        """
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
        """The spec of an array whose first axis is divided over the devices."""
        return PartitionSpec(self.names)

    @property
    def explicit(self) -> tuple[str, ...]:
        """All explicit axes of the mesh: the types of arrays contain them."""
        return explicit_axes(self.where())

    @property
    def covers_mesh(self) -> bool:
        """Whether all other axes of the mesh have size 1."""
        return math.prod(self.where().shape.values()) == self.count

    def where(self) -> MeshLike:
        """The mesh.

        Raises:
          ValueError: there is no mesh, it lacks an axis, or has axes of two kinds.
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
        explicit = explicit_axes(mesh)
        typed = {*explicit, *getattr(mesh, "manual_axes", ())}
        if explicit and not typed >= {*self.names}:
            raise ValueError(
                f"reduce_axis={self.names} has an automatic axis, and the mesh has the "
                f"explicit axes {explicit}: JAX does not reshard over both kinds. Make "
                "all axes AxisType.Auto, or those of reduce_axis explicit."
            )
        return mesh

    def map(self, fun: Callable[..., Any], args: tuple, specs: tuple, out: Any) -> Any:
        """Runs `fun(*args)` on each device, in a `jax.shard_map` over only these axes.

        `specs` and `out` are pytree prefixes of the arguments and of the results. They
        name these axes only: the mesh's other axes stay as they are. A leaf that is not
        an array reaches `fun` unchanged.
        """
        mesh, nested = self.where(), jax.sharding.get_abstract_mesh().manual_axes
        specs = jax.tree.broadcast(specs, args, is_leaf=_is_spec)
        on_device, arrays = of_arrays(fun, args)
        each = jax.tree.leaves(specs, is_leaf=_is_spec)
        each = [each[i] for i in arrays]

        # check_vma=False, so that a loss needs no change. Under the check, a scan whose
        # carry begins with zeros does. A nested shard_map must check if the outer does.
        mapped = jax.shard_map(
            on_device,
            mesh=None if nested else mesh,
            in_specs=tuple(each),
            out_specs=out,
            axis_names=set(self.names),
            check_vma=any(map(is_checked, nested)),
        )
        placed = map(self._placed, arrays.values(), each)
        # Without jit, shard_map refuses a mesh with an axis that it is not over.
        return jax.jit(mapped, inline=True)(*placed)

    def check_whole(self, name: str, tree: PyTree) -> None:
        """Checks that no leaf is sharded over these axes, if its sharding is known.

        Raises:
          ValueError: a leaf is sharded over them.
        """
        leaves = () if self.in_shard_map else jax.tree_util.tree_leaves_with_path(tree)
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

    def _placed(self, x: Any, spec: PartitionSpec) -> jax.Array:
        """Reshards `x` to `spec` if the mesh has explicit axes, which require it."""
        x = jnp.asarray(x)
        if not self.explicit:
            return x
        old = jax.typeof(x).sharding.spec
        old = (*old, *(None,) * (x.ndim - len(old)))
        new = (*spec, *(None,) * (x.ndim - len(spec)))
        others = without(PartitionSpec(*old), self.names)
        new = [joined(*entries) for entries in zip(new, others, strict=True)]
        if [joined(x) for x in old] == new:
            return x
        return jax.sharding.reshard(x, NamedSharding(self.where(), PartitionSpec(*new)))


def axes_of_mesh(axis: Any, mesh: Any) -> Axes:
    """Returns the axes that `axis` names.

    Raises:
      TypeError: `axis` is not a name or a sequence of names, or `mesh` is not a mesh.
      ValueError: a name occurs twice, or the mesh lacks it.
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
        axes.where()  # raises if the mesh lacks an axis
    return axes


def of_arrays(
    fun: Callable[..., Any], args: tuple
) -> tuple[Callable[..., Any], dict[int, Any]]:
    """Returns `fun(*args)` as a function of its arrays, and the arrays.

    The keys of the arrays are their indices among the leaves of `args`.
    """
    leaves, structure = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if is_array(x)}

    def fun_of_arrays(*new: jax.Array) -> Any:
        here = dict(enumerate(leaves)) | dict(zip(arrays, new, strict=True))
        return fun(*structure.unflatten(here.values()))

    return fun_of_arrays, arrays


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
