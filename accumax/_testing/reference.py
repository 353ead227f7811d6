"""The big batch's update: what it is, and what it cannot tell."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._tree import differentiable, restore
from .._types import PyTree
from .evidence import by_path, numbers


class Reference(NamedTuple):
    """The big batch's update: from a loss and an optimizer, or a function.

    Attributes:
      update: `(params, batch) -> new params`.
      gradient: `(params, batch) -> gradient`, None if only `update` is known.
      optimizer: the same.
    """

    update: Callable[[PyTree, PyTree], PyTree]
    gradient: Callable[[PyTree, PyTree], PyTree] | None = None
    optimizer: optax.GradientTransformation | None = None


def reference_of(reference: Any) -> Reference:
    if callable(reference):
        return Reference(reference)
    if not isinstance(reference, tuple) or len(reference) != 2:
        raise TypeError(
            f"reference={reference!r} must be (loss_fn, optimizer), or a function "
            "(params, batch) -> new params."
        )
    loss_fn, optimizer = reference
    if not callable(loss_fn) or not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"reference={reference!r} must be (loss_fn, optimizer) in this order, such "
            "as (loss_fn, optax.sgd(1.0)): what the step runs once in a window."
        )
    tx = optax.with_extra_args_support(optimizer)

    def gradient(params: PyTree, batch: PyTree) -> tuple[PyTree, dict[str, Any]]:
        live = differentiable(params)

        def loss(live: PyTree) -> Any:
            # A new tree each time: a loss may change a dict that it is given.
            return loss_fn(restore(live, params), jax.tree.map(lambda x: x, batch))

        value, grads = jax.value_and_grad(loss)(live)
        return grads, {"value": value, "grad": grads, "value_fn": loss}

    def step(params: PyTree, batch: PyTree) -> PyTree:
        @jax.jit
        def of_arrays(live: PyTree, batch: PyTree) -> PyTree:
            grads, extra = gradient(restore(live, params), batch)
            updates, _ = tx.update(grads, tx.init(live), live, **extra)
            return optax.apply_updates(live, updates)

        return restore(of_arrays(differentiable(params), batch), params)

    compiled: list[Callable[..., PyTree]] = []

    def alone(params: PyTree, batch: PyTree) -> PyTree:
        # `params` may have static leaves, as an Equinox module has; those of the first
        # call are those of all.
        if not compiled:
            compiled.append(
                jax.jit(lambda live, x: gradient(restore(live, params), x)[0])
            )
        return compiled[0](differentiable(params), batch)

    return Reference(step, alone, optimizer)


def coupled(
    big: Reference,
    params: PyTree,
    batch: PyTree,
    gradients: Sequence[PyTree],
    weights: Any,
) -> float:
    """How far the mean of the microbatches' gradients is from that of the batch.

    Relative to the latter. It is rounding, if the loss is a mean over the items of
    which `weights` has the numbers.
    """
    assert big.gradient is not None
    whole = _flat(big.gradient(params, batch))
    shares = np.asarray(weights) / np.sum(weights)
    pairs = zip(shares, gradients, strict=True)
    mean = np.sum([share * _flat(grads) for share, grads in pairs], axis=0)
    size = np.linalg.norm(whole)
    return float(np.linalg.norm(mean - whole) / size) if size else 0.0


def moving(
    big: Reference, params: PyTree, microbatches: Sequence[PyTree], weights: Any
) -> dict[str, list[PyTree]]:
    """Gradients of the microbatches, if each of them updated the parameters.

    By name, for `alternatives` of `coefficients`. An update is the optimizer's own, or
    the part of it that the microbatch has of the window.
    """
    if big.gradient is None or big.optimizer is None:
        return {}
    k, shares = len(microbatches), np.asarray(weights) / np.sum(weights)
    found = {}
    for name, parts in (
        ("an update in every microbatch", np.ones(k)),
        ("a part of the update in every microbatch", shares),
    ):
        live, gradients = differentiable(params), []
        for microbatch, part, share in zip(microbatches, parts, shares, strict=True):
            grads = big.gradient(restore(live, params), microbatch)
            # The sum of the updates counts each gradient `part` times, not its share.
            factor = part / share if share else 0.0
            gradients.append(jax.tree.map(lambda g, f=factor: f * g, grads))
            updates = _first_update(big.optimizer, grads, live)
            if updates is None:
                return {}
            live = jax.tree.map(lambda p, u, f=part: p + f * u, live, updates)
        found[name] = gradients
    return found


def hides_scale(big: Reference, params: PyTree, batch: PyTree) -> bool:
    """Whether the first update for a gradient of twice the size is nearly the same.

    So it is for Adam, and for a gradient that is clipped. A sum for a mean would pass,
    and perhaps a mean of means.
    """
    if big.gradient is None or big.optimizer is None:
        return False
    live, grads = differentiable(params), big.gradient(params, batch)
    twice = jax.tree.map(lambda g: 2 * g, grads)
    pair = [_first_update(big.optimizer, g, live) for g in (grads, twice)]
    if any(updates is None for updates in pair):
        return False
    once, again = map(_flat, pair)
    moved = np.linalg.norm(once)
    return bool(moved > 0 and np.linalg.norm(again - once) < 0.1 * moved)


def _first_update(
    optimizer: optax.GradientTransformation, grads: PyTree, params: PyTree
) -> PyTree | None:
    """None for an optimizer with arguments of its own."""
    try:
        return optimizer.update(grads, optimizer.init(params), params)[0]
    except (TypeError, ValueError):
        return None


def _flat(tree: PyTree) -> np.ndarray:
    """All numbers of `tree`, in one axis."""
    return np.concatenate([np.zeros(0), *map(numbers, by_path(tree).values())])


def rate_of(
    optimizer: optax.GradientTransformation, params: PyTree, grads: PyTree
) -> float | None:
    """The learning rate of plain SGD; None for any other optimizer."""
    rates, live = [], differentiable(params)
    # Another direction, and one that is longer than any clipping lets through.
    ones = jax.tree.map(jnp.ones_like, grads)
    longer = jax.tree.map(lambda g: 1000 * g, grads)
    for probe in (grads, ones, longer):
        updates = _first_update(optimizer, probe, live)
        if updates is None:
            return None
        for path, g in by_path(probe).items():
            u, g = numbers(by_path(updates)[path]), numbers(g)
            if not np.any(g):
                continue
            rate = -float(u @ g / (g @ g))
            if not rate or not np.allclose(u, -rate * g, rtol=1e-5, atol=0):
                return None
            rates.append(rate)
    if not rates or np.ptp(rates) > 1e-5 * abs(rates[0]):
        return None
    return rates[0]
