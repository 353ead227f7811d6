"""What the type of an array says about devices: how it is sharded, and what varies."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._types import PyTree

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


def spec_of(x: Any) -> PartitionSpec:
    """How `x` is sharded; under jit over explicit axes only, for the others are seen
    by the compiler alone.
    """
    traced = isinstance(x, Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    return sharding.spec if named else PartitionSpec()


def only(spec: PartitionSpec, names: tuple[str, ...]) -> PartitionSpec:
    """`spec` as if the mesh had these axes alone."""
    return _kept(spec, lambda name: name in names)


def without(spec: PartitionSpec, names: tuple[str, ...]) -> PartitionSpec:
    """`spec` as if the mesh had not these axes."""
    return _kept(spec, lambda name: name not in names)


def _kept(spec: PartitionSpec, keep: Callable[[str], bool]) -> PartitionSpec:
    entries = [tuple(filter(keep, names_in(entry))) for entry in spec]
    # An axis alone without its tuple, as JAX writes it in an array's sharding.
    return PartitionSpec(*(x[0] if len(x) == 1 else x or None for x in entries))


def names_in(entry: Any) -> tuple[str, ...]:
    """The axes in an entry of a `PartitionSpec`."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def joined(*entries: Any) -> tuple[str, ...] | None:
    return tuple(name for entry in entries for name in names_in(entry)) or None


def is_checked(name: str) -> bool:
    """Whether JAX says what varies over this axis (check_vma=True)."""
    return name in varying(lax.axis_index(name))


def vary(x: Any, names: frozenset[str]) -> Any:
    new = tuple(sorted(names - varying(x)))
    return lax.pcast(x, new, to="varying") if new else x
