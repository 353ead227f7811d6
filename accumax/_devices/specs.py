"""How arrays are sharded over the axes of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


def spec_of(x: Any) -> PartitionSpec:
    """The sharding of `x`; under jit over explicit axes only, as XLA hides the rest."""
    traced = isinstance(x, Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding)
    return sharding.spec if named else PartitionSpec()


def only(spec: PartitionSpec, names: tuple[str, ...]) -> PartitionSpec:
    """Returns `spec` with only the axes in `names`."""
    return _kept(spec, lambda name: name in names)


def without(spec: PartitionSpec, names: tuple[str, ...]) -> PartitionSpec:
    """Returns `spec` without the axes in `names`."""
    return _kept(spec, lambda name: name not in names)


def _kept(spec: PartitionSpec, keep: Callable[[str], bool]) -> PartitionSpec:
    entries = [tuple(filter(keep, names_in(entry))) for entry in spec]
    # A single axis has no tuple, as in the sharding of a JAX array.
    return PartitionSpec(*(x[0] if len(x) == 1 else x or None for x in entries))


def names_in(entry: Any) -> tuple[str, ...]:
    """The axes in an entry of a `PartitionSpec`."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def joined(*entries: Any) -> tuple[str, ...] | None:
    return tuple(name for entry in entries for name in names_in(entry)) or None
