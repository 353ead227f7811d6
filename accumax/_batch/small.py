"""A part of a call, measured: the small batch of a noise scale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._devices.one import Devices
from .._noise import Noise, Share, Small, estimate, square_of
from .._xla.loops import at_most_once, never
from .split import Part


def measured(
    body: Callable[[Any, Part], Any], measures: jax.Array
) -> Callable[[Any, Part], Any]:
    """The body of `Loop` that also measures the first microbatch that has a weight.

    Not the last, smaller one: XLA copies sums that are read after the scan.

    `(((grads, seen, state), small), part) -> carry`. `measures` is () bool, whether
    the sums are zero when the call begins.
    """

    def added(carry: Any, part: Part) -> Any:
        before, small = carry
        if part.tail:  # with a part before it, unless only the tail has a weight
            return body(before, part), small
        grads, seen, state = body(before, part)
        weight = seen[0].weight
        opens = measures & (before[1][0].weight == 0) & (weight > 0)

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
        weight = jnp.where(opens, weight, small.weight)
        return (grads, seen, state), Small(square, weight)

    return added


def nothing() -> Small:
    """What `measured` carries before the first microbatch."""
    return Small(jnp.zeros((), float), jnp.zeros((), float))


def share_of(small: Small, total: jax.Array, unit: int) -> Share:
    """The share of the first microbatch in a call of weight `total`.

    The unit of both weights is so many items.
    """
    share = small.weight / jnp.where(total > 0, total, 1)
    return Share(small.square, share, total * unit)


def noise_of(
    part: Share, grads: Any, weight: jax.Array | None, accepted: jax.Array
) -> Noise:
    """The noise of one call, in items; zeros where it has no smaller part.

    Or if a weight was not `accepted`, () bool. `grads` is the gradient of the call.
    `weight`, () float, divided its sums, which `part` measures; None if nothing did.
    """
    items = part.items
    divisor = items if weight is None else weight
    square = square_of(grads) / (items**2 if weight is None else 1)
    small = Small(part.square / divisor**2, part.share)
    signal, spread, known = estimate(small, square, jnp.ones(()))
    known &= accepted

    def kept(x: jax.Array) -> jax.Array:
        return jnp.where(known, x, 0).astype(x.dtype)

    of_part = kept(small.square), kept(small.weight * items)
    return Noise(*of_part, kept(signal), kept(spread * items))


def share_of_device(
    out: Any, unit: int, devices: Devices, measures: jax.Array
) -> Share:
    """The share of one device, if each has sums of its own: a mean over all.

    `out` is the `Outcome` of a device.
    """

    def read(_: jax.Array) -> jax.Array:
        return devices.sum(square_of(out.grads)) / devices.count

    with jax.named_scope("accumax.measure"):
        square = at_most_once(measures, read, jnp.zeros((), float))
    share = jnp.asarray(1 / devices.count, float)
    return Share(square, share, out.weight * unit)
