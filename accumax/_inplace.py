"""What XLA needs to be told so that it copies nothing.

Measured with jax 0.10.2 for CPU, GPU (H100) and TPU (v5e); `benchmarks/targets.py`
repeats it. The other two such facts, the lazy reset and the reciprocal, live where
their arithmetic does, in `_accumulator.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ._types import PyTree

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

    return lax.while_loop(lambda carry: carry[0], body, (pred, operand))[1]


def add_backward(
    fun: Callable[[PyTree], Any], params: PyTree, sums: PyTree, first: jax.Array
) -> tuple[Any, Callable[[jax.Array], PyTree]]:
    """Runs `fun` forward; the result's second part runs it backward into `sums`.

    With `jax.vjp(...).with_refs` the backward pass adds into the accumulator, so that
    no gradient tree exists. The twin that carries the tree is `jax.vjp` and
    `Accumulator.add`.

    Args:
      fun: `(params) -> (loss, aux)`, loss a real scalar.
      params: the parameters; each leaf a float array or None.
      sums: the accumulator, of the same structure, in any float dtypes.
      first: () bool, the window opens here: what `sums` holds is not to be read.

    Returns:
      `(aux, backward)`, with `backward(seed) -> sums`; `seed` is the loss's cotangent.
    """

    # A leaf that no ref can be bound to is differentiated with respect to a port: zeros
    # that hold no data (XLA drops them) and let the whole cotangent out in the dtype of
    # the accumulator. From 0.12 on, JAX takes only refs of the variable's own dtype.
    sliced = jax.tree.map(lambda _: False, params)
    if not _adds_slices():
        sliced = _sliced(fun, params)
    ported = jax.tree.map(lambda p, s, x: x or p.dtype != s.dtype, params, sums, sliced)

    def variable(p: jax.Array, s: jax.Array, port: bool) -> jax.Array:
        return jnp.zeros(s.shape, s.dtype) if port else p

    def through(variables: PyTree) -> Any:
        def value(p: jax.Array, v: jax.Array, port: bool) -> jax.Array:
            return _port(p, v) if port else v

        return fun(jax.tree.map(value, params, variables, ported))

    def reset(carry: PyTree) -> PyTree:
        # `where`, though `first` is true here: XLA would merge plain zeros of the same
        # shape, and then copy them (16 matrices: 15 copies on CPU and GPU).
        sums, seed = carry
        zeros = jax.tree.map(lambda s: jnp.asarray(-0.0, s.dtype), sums)
        sums = jax.tree.map(lambda z, s: jnp.where(first, z, s), zeros, sums)
        return sums, jnp.where(first, seed, 0)

    variables = jax.tree.map(variable, params, sums, ported)
    vjp: Any  # its with_refs has no type yet
    _, vjp, aux = jax.vjp(through, variables, has_aux=True)

    def backward(seed: jax.Array) -> PyTree:
        # In a loop, because a `where` over the whole accumulator would read and write
        # it in every call. And through the loop goes the seed: else XLA:GPU may
        # schedule the loop last, when all gradients are alive that were to be added
        # after it (16 unrolled layers: 16 gradients in temp, with the seed 1.2).
        opened, seed = at_most_once(first, reset, (sums, seed))
        refs = jax.tree.map(jax.new_ref, opened)
        vjp.with_refs(refs)(seed)
        return jax.tree.map(jax.freeze, refs)

    return aux, backward


@jax.custom_vjp
def _port(p: jax.Array, q: jax.Array) -> jax.Array:
    """`p`, whose cotangent leaves through `q` in the dtype of `q`."""
    del q
    return p


def _port_fwd(p: jax.Array, q: jax.Array) -> tuple[jax.Array, Any]:
    return p, jnp.zeros((0,), q.dtype)


def _port_bwd(like: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(cotangent), cotangent.astype(like.dtype)


_port.defvjp(_port_fwd, _port_bwd)


@functools.cache
def _adds_slices() -> bool:
    """Whether JAX adds the gradient of `x[0]` into a ref: 0.12 does, 0.10 fails."""

    def backward(x: jax.Array) -> None:
        vjp: Any
        _, vjp = jax.vjp(lambda x: x[0], x)
        vjp.with_refs(jax.new_ref(x))(x[0])

    try:
        jax.eval_shape(backward, jax.ShapeDtypeStruct((2,), jnp.float32))
    except Exception:
        return False
    return True


def _sliced(fun: Callable[[PyTree], Any], params: PyTree) -> PyTree:
    """For each leaf of `params`, whether `fun` takes a slice of it at any depth."""

    def walk(jaxpr: Any, names: dict[Any, int]) -> set[int]:
        found = set()
        for eqn in jaxpr.eqns:
            args = [None if hasattr(x, "val") else names.get(x) for x in eqn.invars]
            if eqn.primitive.name in ("slice", "dynamic_slice"):
                found |= {args[0]}
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
                if _is_jaxpr(inner):
                    inner = getattr(inner, "jaxpr", inner)
                    # All operands of a loop or a call; a conditional's come last.
                    passed = args[len(args) - len(inner.invars) :]
                    found |= walk(inner, dict(zip(inner.invars, passed, strict=False)))
        return found

    jaxpr = jax.make_jaxpr(fun)(params).jaxpr
    found = walk(jaxpr, {x: i for i, x in enumerate(jaxpr.invars)})
    leaves = [i in found for i in range(len(jaxpr.invars))]
    return jax.tree.structure(params).unflatten(leaves)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
