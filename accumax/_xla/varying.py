"""What the types of JAX say that devices of a mesh may have different values of."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding

from .._types import PyTree

T = TypeVar("T")


def fitted(fun: Callable[[T], T], carry: T) -> T:
    """`carry`, which may vary over the devices as what `fun` makes of it does.

    `jax.shard_map` wants the carry of a loop to have one type from the beginning. It is
    not enough to let all of it vary: what stays the same may leave as it came.
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
    """The manual axes over which `x`, an array or a shape, may vary; if JAX checks."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def typed_like(tree: T, like: PyTree) -> T:
    """`tree`, each leaf varying at least as its twin in `like`, and sharded as it."""

    def typed(x: jax.Array, y: Any) -> jax.Array:
        x = vary(x, varying(y))
        return sharded(x, jax.typeof(y).sharding) if x.shape == y.shape else x

    return jax.tree.map(typed, tree, like)


def is_checked(name: str) -> bool:
    """Whether JAX says what varies over this axis (check_vma=True)."""
    return name in varying(lax.axis_index(name))


def vary(x: Any, names: frozenset[str]) -> Any:
    new = tuple(sorted(names - varying(x)))
    return lax.pcast(x, new, to="varying") if new else x


def sharded(x: jax.Array, sharding: Any) -> jax.Array:
    """`x`, of a type with this sharding if it is one over explicit axes."""
    if not isinstance(sharding, NamedSharding) or not explicit_axes(sharding.mesh):
        return x
    same = jax.typeof(x).sharding == sharding
    return x if same else jax.sharding.reshard(x, sharding)


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """The axes over which an array's type says how it is sharded."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Explicit)
