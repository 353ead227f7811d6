"""Shared aliases. They document; no code depends on them at run time."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax

# A tree of arrays, or a tree of the user. JAX has no type for either.
PyTree: TypeAlias = Any
ArrayLike: TypeAlias = jax.typing.ArrayLike
DTypeLike: TypeAlias = jax.typing.DTypeLike

# Gradient step, () int32 -> window length, () integer (or an integral float).
Schedule: TypeAlias = Callable[[jax.Array], ArrayLike]

Reduction: TypeAlias = Literal["mean", "sum", "mean_of_sums"]
NonFinite: TypeAlias = Literal["propagate", "skip", "drop"]
