"""Loops that XLA runs in place, without copies.

Measured with jax 0.10.2 for CPU, GPU (H100) and TPU (v5e); `benchmarks/targets.py`
repeats the measurements. Two other tricks against copies, the lazy reset and the
reciprocal, are in `_sums.py`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from .. import _tree
from .._types import ArrayLike, PyTree
from .varying import match_varying, zeros

T = TypeVar("T")

SMALL = 2**16  # elements


def at_most_once(pred: jax.Array, fun: Callable[[T], T], operand: T) -> T:
    """`fun(operand)` if `pred` else `operand`, in place on every backend.

    XLA aliases the carry of a while loop on every backend. Some backends copy the
    operands that a conditional passes through (16 x 1024^2 AdamW on the GPU target: 96
    copies and temp of 3 x the parameters with `lax.cond`, none with the loop).

    `fun` must not close over arrays that are as big as the parameters and change in the
    same step. A loop carries each outer array that its body names, and so keeps a
    second copy alive. Close over shapes instead.
    """

    def body(carry: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        _, value = carry
        return jnp.zeros_like(pred), fun(value)

    carry = pred, match_varying(fun, operand)
    return lax.while_loop(lambda carry: carry[0], body, carry)[1]


def apart(fun: Callable[[], T], seen: jax.Array) -> T:
    """`fun()`, in a loop that runs it once, which XLA does not know.

    XLA:GPU arranges a computation that has collectives so that they take no time,
    whatever memory that takes: it keeps all gradients of a backward pass until its end,
    for the sake of a loss that is summed over devices (16 unrolled layers: temp of 1.03
    for 0.33). One whose collectives are all in loops takes the least memory.

    `seen`, () float, is any value that XLA does not know.
    """
    shapes = jax.eval_shape(fun)
    leaves = jax.tree.leaves(shapes)
    if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in leaves):
        return fun()  # there are no zeros of a PRNG key
    if sum(x.size for x in leaves) > SMALL:
        return fun()  # a loop would have a second copy
    always = (seen == seen) | (seen != seen)
    with jax.named_scope("accumax.once"):
        return at_most_once(always, lambda _: fun(), jax.tree.map(zeros, shapes))


def after(tree: PyTree, i: int) -> jax.Array:
    """Returns `i`, () int32, tied to `tree`: XLA cannot use it before `tree` is done.

    `lax.optimization_barrier` is not enough: XLA:CPU drops it before scheduling.
    """
    leaves = [x for x in jax.tree.leaves(tree) if _tree.is_differentiable(x)]
    seen = sum((_first(x) for x in leaves if x.size), jnp.zeros((), jnp.float32))
    return jnp.where(never(seen), 0, jnp.int32(i))


def _first(x: jax.Array) -> jax.Array:
    """() float32, from the first numbers of `x`; no device gathers `x` for it."""
    # JAX does not slice an explicitly sharded axis to one element.
    spec = jax.typeof(x).sharding.spec
    part = x[tuple(slice(0, 1 if name is None else None) for name in spec)]
    return jnp.max(jnp.real(part)).astype(jnp.float32)


def never(seen: jax.Array) -> jax.Array:
    """() bool: false, of which XLA knows only that it depends on `seen`, () float."""
    return (seen != seen) & (seen == seen)


def reset(sums: PyTree, first: jax.Array, seed: ArrayLike = 1.0) -> Any:
    """Sets `sums` to -0.0 in place if a window opens; returns `(sums, seed)`.

    The window opens if `first`, () bool. A `where` over the whole accumulator, without
    a loop, would read and write it in every call. The seed of the next backward pass
    goes through the loop too. Otherwise XLA:GPU may schedule the loop last, and keep
    all gradients alive until then (16 unrolled layers: 16 in temp, 1.2 with the seed).
    """

    def body(carry: PyTree) -> PyTree:
        # `where`, although `first` is true here: XLA would merge plain zeros of the
        # same shape and then copy them (16 matrices: 15 copies on CPU and GPU).
        sums, seed = carry

        def zero(s: jax.Array) -> jax.Array:
            return jnp.where(first, _tree.minus_zero(s.dtype), s)

        return jax.tree.map(zero, sums), jnp.where(first, seed, 0)

    with jax.named_scope("accumax.reset"):
        # The `where` lets the seed vary over the devices of a `shard_map` as `first`
        # does.
        seed = jnp.where(first, seed, jnp.ones_like(seed))
        return at_most_once(first, body, (sums, seed))
