"""The gradient noise scale, from the squared norms of two batches.

McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162,
appendix A.1: a small batch, and a large one that contains it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import _tree
from ._types import PyTree


class Noise(NamedTuple):
    """The sums from which `accumax.noise_scale` is computed, () float each.

    Attributes:
      small_square: the squared norm of the sum of a part of the window: of its first
        call, of a microbatch or a device of this call, or of one device.
      small_weight: the weight of this part.
      signal: the squared norm of the true gradient, an average over windows.
      spread: the trace of the covariance of the gradient of one item, an average.
    """

    small_square: jax.Array
    small_weight: jax.Array
    signal: jax.Array
    spread: jax.Array


class Small(NamedTuple):
    """A part of a window, measured.

    Attributes:
      square: () float, the squared norm of its sum of gradients.
      weight: () float, its weight.
    """

    square: jax.Array
    weight: jax.Array


class Share(NamedTuple):
    """A part of a call, measured: its first microbatch, or what one device has of it.

    Attributes:
      square: () float, the squared norm of its sum of gradients.
      share: () float, its weight, as a part of that of the call.
      items: () float, the weight of the call, or its rows if it has none.
    """

    square: jax.Array
    share: jax.Array
    items: jax.Array


def square_of(tree: PyTree) -> jax.Array:
    """() float: the sum of the squares of all elements, in at least float32."""

    def square(x: jax.Array) -> jax.Array:
        x = jnp.abs(x) if jnp.iscomplexobj(x) else x
        # As in the state, also for sums in float64.
        return jnp.sum(x.astype(_tree.wide(x.dtype)) ** 2).astype(float)

    return sum(map(square, jax.tree.leaves(tree)), jnp.zeros((), float))


def estimate(
    small: Small, large: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `(signal, spread, known)` of a batch, of which `small` is a part.

    Signal and spread, () float, are those of `Noise`, unbiased. `known`, () bool, is
    false if the part is all of the batch, or a number is not finite. `large` is the
    squared norm of the mean gradient of the whole batch, `weight` its weight.
    """
    least = small.weight
    square = small.square / least**2
    signal = (weight * large - least * square) / (weight - least)
    spread = (square - large) / (1 / least - 1 / weight)
    known = (weight > least) & (least > 0)
    return signal, spread, known & jnp.isfinite(signal) & jnp.isfinite(spread)
