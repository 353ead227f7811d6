"""Loops that XLA runs in place, so that it copies nothing.

Measured with jax 0.10.2 for CPU, GPU (H100) and TPU (v5e); `benchmarks/targets.py`
repeats it. The other two such facts, the lazy reset and the reciprocal, are in
`_sums.py`, where their arithmetic is.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from .. import _tree
from .._types import ArrayLike, PyTree
from .varying import fitted

T = TypeVar("T")


def at_most_once(pred: jax.Array, fun: Callable[[T], T], operand: T) -> T:
    """`fun(operand)` if `pred` else `operand`, in place on every backend.

    XLA aliases the carry of a while loop everywhere; the operands that a conditional
    passes through are copied by some backends (16 x 1024^2 AdamW on the GPU target: 96
    copies and 3 units of temp with `lax.cond`, none with the loop).

    `fun` must not close over arrays that are as big as the parameters and that change
    in the same step: a loop body that names an outer array carries it, and so keeps a
    second copy alive. Close over shapes instead.
    """

    def body(carry: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        _, value = carry
        return jnp.zeros_like(pred), fun(value)

    carry = pred, fitted(fun, operand)
    return lax.while_loop(lambda carry: carry[0], body, carry)[1]


def after(tree: PyTree, i: int) -> jax.Array:
    """`i` as () int32 that depends on `tree`: XLA cannot use it before `tree` is done.

    `lax.optimization_barrier` is not enough: XLA:CPU drops it before scheduling.
    """
    leaves = [x for x in jax.tree.leaves(tree) if _tree.is_differentiable(x)]
    firsts = [jnp.real(x.ravel()[0]).astype(jnp.float32) for x in leaves if x.size]
    seen = sum(firsts, jnp.zeros((), jnp.float32))
    never = (seen != seen) & (seen == seen)
    return jnp.where(never, 0, jnp.int32(i))


def reset(sums: PyTree, first: jax.Array, seed: ArrayLike = 1.0) -> Any:
    """`(sums, seed)`, the sums in place -0.0 if `first`, () bool: a window opens.

    In a loop, because a `where` over the whole accumulator would read and write it in
    every call. Through the loop goes the seed of the backward pass that follows: else
    XLA:GPU may schedule the loop last, when all gradients are alive that were to be
    added after it (16 unrolled layers: 16 gradients in temp, with the seed 1.2).
    """

    def body(carry: PyTree) -> PyTree:
        # `where`, though `first` is true here: XLA would merge plain zeros of the same
        # shape, and then copy them (16 matrices: 15 copies on CPU and GPU).
        sums, seed = carry

        def zero(s: jax.Array) -> jax.Array:
            return jnp.where(first, _tree.minus_zero(s.dtype), s)

        return jax.tree.map(zero, sums), jnp.where(first, seed, 0)

    with jax.named_scope("accumax.reset"):
        # The `where` lets the seed vary over the devices of a `shard_map` as `first`
        # does.
        seed = jnp.where(first, seed, jnp.ones_like(seed))
        return at_most_once(first, body, (sums, seed))
