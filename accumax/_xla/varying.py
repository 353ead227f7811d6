"""The types of arrays on a mesh: the axes they vary over, and their shardings."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding

from .._types import PyTree

T = TypeVar("T")


def fitted(fun: Callable[[T], T], carry: T) -> T:
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


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """The explicit axes of `mesh`: the types of arrays contain their shardings."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Explicit)
