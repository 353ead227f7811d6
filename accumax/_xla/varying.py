"""The types of arrays on a mesh: the axes they vary over, and their shardings."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .._types import PyTree

T = TypeVar("T")


def match_varying(fun: Callable[[T], T], carry: T) -> T:
    """Makes each leaf of `carry` vary over the mesh axes that it has in `fun(carry)`.

    In a `jax.shard_map`, the carry of a loop must have one type from the beginning.
    Leaves that `fun` keeps replicated stay so: the `shard_map` may return them as such.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if not any(map(is_checked, manual)):
        return carry
    while True:
        out = jax.eval_shape(fun, carry)
        new = jax.tree.map(lambda x, y: vary(x, varying(y)), carry, out)
        pairs = zip(jax.tree.leaves(new), jax.tree.leaves(carry), strict=True)
        if all(varying(x) == varying(y) for x, y in pairs):
            return carry
        carry = new


def varying(x: Any) -> frozenset[str]:
    """The manual axes over which `x`, array or shape, varies; none if not checked."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def typed_like(tree: T, like: PyTree) -> T:
    """Adds the varying axes of `like` to `tree`, by leaf, and shards it as `like`."""

    def typed(x: jax.Array, y: Any) -> jax.Array:
        x = vary(x, varying(y))
        return sharded(x, jax.typeof(y).sharding) if x.shape == y.shape else x

    return jax.tree.map(typed, tree, like)


def is_checked(name: str) -> bool:
    """Whether JAX tracks which values vary over this axis (check_vma=True)."""
    return name in varying(lax.axis_index(name))


def vary(x: Any, names: frozenset[str]) -> Any:
    new = tuple(sorted(names - varying(x)))
    return lax.pcast(x, new, to="varying") if new else x


def sharded(x: jax.Array, sharding: Any) -> jax.Array:
    """Reshards `x` to `sharding`, if its mesh has explicit axes."""
    if not isinstance(sharding, NamedSharding) or not explicit_axes(sharding.mesh):
        return x
    same = jax.typeof(x).sharding == sharding
    return x if same else jax.sharding.reshard(x, sharding)


def on_mesh_of(like: Any, tree: T) -> T:
    """`tree`, replicated on the mesh of the type `like` where it is on no mesh.

    The types of cotangents are on a mesh with explicit axes if the loss is; JAX adds
    them to no ref whose type is not.
    """
    mesh = getattr(like.sharding, "mesh", None)
    if mesh is None or mesh.empty or not explicit_axes(mesh):
        return tree

    def placed(x: jax.Array) -> jax.Array:
        if not jax.typeof(x).sharding.mesh.empty:
            return x
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(placed, tree)


def zeros(like: Any, dtype: Any = None) -> jax.Array:
    """Zeros of the shape of `like`, and of its sharding over explicit axes."""
    dtype = like.dtype if dtype is None else dtype
    return sharded(jnp.zeros(like.shape, dtype), getattr(like, "sharding", None))


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """The explicit axes of `mesh`: the types of arrays contain their shardings."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Explicit)
