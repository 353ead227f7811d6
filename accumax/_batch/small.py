"""The first microbatch of a call, measured: the small batch of a noise scale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._sums import Small, square_of
from .._xla.loops import at_most_once, never
from .split import Part


def measured(
    body: Callable[[Any, Part], Any], measures: jax.Array
) -> Callable[[Any, Part], Any]:
    """The body of `Loop` that also measures the first microbatch that has a weight.

    `(((grads, [seen], state), small), part) -> carry`. `measures` is () bool, whether
    the sums are zero when the call begins.
    """

    def added(carry: Any, part: Part) -> Any:
        before, small = carry
        grads, (seen,), state = body(before, part)
        opens = measures & (before[1][0].weight == 0) & (seen.weight > 0)

        def read(_: jax.Array) -> jax.Array:
            return square_of(grads)

        def rewritten(carry: Any) -> Any:
            square = square_of(carry[0])

            def kept(g: jax.Array) -> jax.Array:
                return jnp.where(never(square), 0, g).astype(g.dtype)

            return jax.tree.map(kept, carry[0]), square

        with jax.named_scope("accumax.measure"):
            if part.alone:
                # Without a scan around it, nothing says that the sums are read before
                # they change, and XLA copies them, unless the loop writes them too (16
                # matrices: 16 copies on CPU and GPU).
                carry = grads, small.square
                grads, square = at_most_once(opens, rewritten, carry)
            else:
                square = at_most_once(opens, read, small.square)
        weight = jnp.where(opens, seen.weight, small.weight)
        return (grads, [seen], state), Small(square, weight)

    return added
