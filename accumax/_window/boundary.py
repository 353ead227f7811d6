"""The boundary of a window, where the inner transformation runs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _tree
from .._noise import Small, square_of
from .._sums import Sums, divides
from .._types import ArrayLike, PyTree
from .checks import check_flush
from .state import AccumulateState, Progress, gradient_of
from .window import Window


def update(
    window: Window,
    updates: PyTree,
    state: Any,
    params: PyTree | None = None,
    *,
    weight: ArrayLike | None = None,
    flush: ArrayLike = False,
    **extra_args: Any,
) -> tuple[PyTree, AccumulateState]:
    window.check_names(extra_args)
    window.check(state, extra_args, grads=updates)
    if params is not None:
        window.check(state, params=params)
    flush = check_flush(flush)
    sums, progress = window.add(state, updates, weight, flush, extra_args)
    measure, devices = window.measure, window.devices
    params = window.seen(state, params)
    grads = _tree.seen(updates, sums.grads)
    seen = window.devices.as_replicated(grads)  # the type that `inner` sees
    # As for the big batch: the dtypes that `inner` returns for such gradients.
    window.inner.check_state(state.inner_opt_state, seen if params is None else params)
    call = seen, state.inner_opt_state, params, extra_args | sums.args
    window.inner.check_unused(sums.grads, *call)
    like = window.inner.emits(*call)

    def emit(operand: Any) -> Any:
        sums, inner_state, params = operand
        sums = sums._replace(grads=window.devices.total(sums.grads))
        mean, means = window.accumulator.result(sums)
        square = square_of(mean) if measure.names else None
        emitted, inner_state = window.run(
            mean, seen, inner_state, params, extra_args | means
        )
        return _tree.cast_like(emitted, like), inner_state, square

    def hold(operand: Any) -> Any:
        square = square_of(()) if measure.names else None
        return _tree.minus_zeros_like(like), operand[1], square

    applies = progress.closes & divides(sums.weight)
    noise = measure.small_batch(state, sums, applies, devices)
    operand = (sums, window.inner.placed(state.inner_opt_state), params)
    with jax.named_scope("accumax.boundary"):
        emitted, inner_state, square = lax.cond(applies, emit, hold, operand)
    if jax.tree.structure(emitted) == jax.tree.structure(grads):
        emitted = _tree.fill(emitted, updates, _not_trained)
    measures = measure.measured(state, sums, noise, applies, devices, square)
    return emitted, window.next(state, sums, inner_state, progress, applies, measures)


def _not_trained(gradient: Any) -> Any:
    """The update where the state has no sum: of an integer, or in an Equinox module."""
    if _tree.is_differentiable(gradient):
        return _tree.minus_zeros_like(jnp.asarray(gradient))
    return gradient


def flush(
    window: Window, params: PyTree, state: Any, extra_args: dict[str, Any]
) -> tuple[PyTree, AccumulateState]:
    window.check(state, params=params)
    # Between windows the sums are stale, so they have no weight.
    opened = state.mini_step > 0
    sums = window.sums(state)
    sums = sums._replace(weight=jnp.where(opened, sums.weight, 0))
    progress = Progress(state.mini_step, state.skipped, jnp.bool_(True))
    return close(window, params, state, sums, progress, extra_args)


def close(
    window: Window,
    params: PyTree,
    state: AccumulateState,
    sums: Sums,
    progress: Progress,
    extra_args: dict[str, Any],
    small: Small | None = None,
) -> tuple[PyTree, AccumulateState]:
    """Runs the boundary in place; touches nothing unless the window closes.

    `small` is a part of the call, if it was measured.
    """
    live = jax.tree.map(_tree.strong, window.seen(state, params))
    seen = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), gradient_of(live)
    )
    averaged = window.accumulator.averaged_args
    window.inner.check_used(seen, state.inner_opt_state, live, extra_args, averaged)
    window.inner.check_state(state.inner_opt_state, live)
    call = seen, state.inner_opt_state, live, extra_args | sums.args
    window.inner.check_unused(sums.grads, *call)
    # As for the big batch: the dtypes that `inner` returns for such gradients. If the
    # mean has their dtypes, so do the updates, and `inner` need not be traced twice.
    pairs = zip(
        jax.tree.leaves(sums.grads),
        jax.tree.leaves(_tree.masked(seen, sums.grads)),
        strict=True,
    )
    like = None
    if any(_tree.wide(total.dtype) != x.dtype for total, x in pairs):
        like = window.inner.emits(*call)

    accumulator = window.accumulator

    def apply(carry: Any, grads: PyTree, weight: jax.Array, extra: Any) -> Any:
        params, (inner_state, square) = carry
        grads = accumulator.divide_half(grads, weight)
        square = None if square is None else square_of(grads)
        updates, inner_state = window.run(grads, seen, inner_state, params, extra)
        updates = updates if like is None else _tree.cast_like(updates, like)
        return optax.apply_updates(params, updates), (inner_state, square)

    applies = progress.closes & divides(sums.weight)
    measure, devices = window.measure, window.devices
    noise = measure.small_batch(state, sums, applies, devices)
    square = None
    if measure.names and not devices.sums_are_total:
        square = jnp.zeros((), float)
    carry = live, (window.inner.placed(state.inner_opt_state), square)
    with jax.named_scope("accumax.boundary"):
        (live, (inner_state, square)), grads = devices.boundary(
            applies,
            accumulator.divide_in_place,
            window.inner.arranged(apply),
            carry,
            sums.grads,
            sums.weight,
            extra_args | accumulator.means(sums),
        )
    sums = sums._replace(grads=grads)
    measures = measure.measured(state, sums, noise, applies, devices, square, small)
    new_state = window.next(state, sums, inner_state, progress, applies, measures)
    return _tree.restore(live, params), new_state


def window_of(tx: Any, name: str) -> Window:
    """Returns the window of `tx`, an `accumulate`, for the function `name`."""
    if not is_accumulate(tx):
        raise TypeError(
            f"accumax.{name} needs a tx made by accumax.accumulate, and it must be "
            f"outermost; got a {type(tx).__name__}. Write accumulate(optax.chain(a, "
            "b), every) for optax.chain(a, accumulate(b, every)), or use tx.update and "
            "optax.apply_updates."
        )
    return tx.update.args[0]


def is_accumulate(tx: Any) -> bool:
    found = getattr(tx, "update", None)
    return isinstance(found, functools.partial) and found.func is update
