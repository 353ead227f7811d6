"""One window of a step, and the big batch's update in two precisions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._tree import differentiable, restore
from .._types import PyTree
from .evidence import by_path, check_trees, numbers

ULPS = 4  # what programs that are right may differ by in the parameters
USUAL = 4  # and by what multiple of the big batch's usual error, its median
LEAST_PRECISION = 0.1  # a gradient that is known less well is not diagnosed


class Distance(NamedTuple):
    """Of one parameter, from the update in float64: the largest absolute difference.

    Attributes:
      path: as `jax.tree_util.keystr` prints it.
      step: that of the step.
      big_batch: that of the big batch in the parameters' own precision.
      floor: up to here it is rounding.
    """

    path: str
    step: float
    big_batch: float
    floor: float

    @property
    def ratio(self) -> float:
        """`step` over the larger of `big_batch` and `floor`."""
        if self.step == 0:
            return 0.0
        bound = max(self.big_batch, self.floor)
        return self.step / bound if bound else np.inf


class Gradient(NamedTuple):
    """What a step accumulated, and how exactly it is known."""

    gradient: PyTree
    tolerance: float


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

    def alone(params: PyTree, batch: PyTree) -> PyTree:
        # `params` may have static leaves, as an Equinox module has.
        of_arrays = jax.jit(lambda live: gradient(restore(live, params), batch)[0])
        return of_arrays(differentiable(params))

    return Reference(step, alone, optimizer)


def call(
    step: Callable[..., Any], params: PyTree, opt_state: Any, microbatch: PyTree
) -> tuple[PyTree, Any]:
    out = step(params, opt_state, microbatch)
    if not isinstance(out, tuple) or len(out) < 2:
        raise TypeError(
            f"step returned a {type(out).__name__}; expected (params, opt_state, ...). "
            "Pass call= for a step of another signature."
        )
    return out[0], out[1]


def join(microbatches: Sequence[PyTree]) -> PyTree:
    """The microbatches concatenated along their first axis."""

    def concatenate(path: Any, *parts: Any) -> Any:
        if not all(np.ndim(x) for x in parts):
            raise ValueError(
                f"microbatches have a scalar at {jax.tree_util.keystr(path)}, which "
                "cannot be concatenated. Pass join=, from the microbatches to a batch."
            )
        return jnp.concatenate([jnp.asarray(x) for x in parts])

    first = jax.tree.structure(microbatches[0])
    for i, other in enumerate(microbatches):
        if jax.tree.structure(other) != first:
            raise ValueError(
                f"microbatches[{i}] is {jax.tree.structure(other)}, and "
                f"microbatches[0] is {first}. Pass trees of one structure."
            )
    return jax.tree_util.tree_map_with_path(concatenate, *microbatches)


def rows(microbatches: Sequence[PyTree]) -> list[int]:
    """The length of the first axis that a microbatch has; 1 if it has none."""

    def count(microbatch: PyTree) -> int:
        shapes = map(np.shape, jax.tree.leaves(microbatch))
        return next((shape[0] for shape in shapes if shape), 1)

    return list(map(count, microbatches))


def window(
    step: Callable[..., Any],
    params: PyTree,
    opt_state: Any,
    calls: Sequence[PyTree],
    adapter: Callable[..., tuple[PyTree, Any]],
) -> tuple[PyTree, Any]:
    """Runs `step` on copies, which it may donate."""
    params, opt_state = jax.tree.map(
        lambda x: x.copy() if isinstance(x, jax.Array) else x, (params, opt_state)
    )
    for microbatch in calls:
        out = adapter(step, params, opt_state, microbatch)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"call returned a {type(out).__name__}; expected (params, opt_state)."
            )
        params, opt_state = out
    return params, opt_state


def distances(
    big: Reference, params: PyTree, batch: PyTree, after: PyTree
) -> tuple[Distance, ...]:
    got = by_path(after)
    before = check_trees("params", params, {"the parameters after the step": after})
    near = by_path(big.update(params, batch))
    with jax.enable_x64(True):
        exact = by_path(big.update(_wide(params), _wide(batch)))
    true = {path: numbers(x) for path, x in exact.items()}
    missing = [path for path in before if path not in true or path not in near]
    if missing:
        raise ValueError(
            f"reference returned no parameter at {', '.join(missing[:6])}, where "
            "params has one. It must return the new parameters."
        )
    own = {path: _far(near[path], true[path]) for path in before}
    moved = {path: _far(before[path], true[path]) for path in before}
    most = max(moved.values(), default=0.0)
    epsilons = {path: float(jnp.finfo(got[path].dtype).eps) for path in before}
    # Where the gradient is 0 but for rounding, as that of one bias for all logits, this
    # is rounding over rounding: a large number, and the median of two such parameters.
    parts = [own[p] / moved[p] for p in before if moved[p] > epsilons[p] * most]
    part = np.median(parts or [0.0])
    found = []
    for path, eps in epsilons.items():
        of_parameter = ULPS * eps * np.max(np.abs(true[path]), initial=0.0)
        # A parameter may be near its true value by luck, and one whose gradient is 0
        # but for rounding has rounding of the size of other gradients.
        floor = max(of_parameter, USUAL * part * moved[path], eps * most)
        found.append(Distance(path, _far(got[path], true[path]), own[path], floor))
    return tuple(found)


def _far(x: Any, true: np.ndarray) -> float:
    far = np.max(np.abs(numbers(x) - true), initial=0.0)
    return float(far) if np.isfinite(far) else np.inf


def _wide(tree: PyTree) -> PyTree:
    def cast(x: Any) -> Any:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
        dtype = np.complex128 if is_complex else np.float64
        return jnp.asarray(np.asarray(x).astype(dtype))

    return jax.tree.map(cast, tree)


def read_gradient(
    big: Reference,
    gradient: Callable[[PyTree, PyTree, Any], PyTree] | None,
    params: PyTree,
    after: PyTree,
    opt_state: Any,
    batch: PyTree,
) -> Gradient | str:
    """What the step accumulated, or a sentence that says why it is not known."""
    if big.gradient is None or big.optimizer is None:
        return "For a diagnosis, pass reference=(loss_fn, optimizer)."
    if gradient is not None:
        return Gradient(gradient(params, after, opt_state), 1e-4)
    grads = big.gradient(params, batch)
    if not all(np.all(np.isfinite(numbers(g))) for g in by_path(grads).values()):
        return "There is no diagnosis: the big batch's gradient is not finite."
    rate = _rate(big.optimizer, params, grads)
    if rate is None:
        return "For a diagnosis, pass gradient=: the optimizer is not plain SGD."

    live, new = differentiable(params), by_path(after)
    parts = [
        ((numbers(old) - numbers(new[path])) / rate, np.shape(old))
        for path, old in by_path(live).items()
    ]
    if any(np.iscomplexobj(old) for old in by_path(live).values()):
        return "For a diagnosis, pass gradient=: there are complex parameters."
    moved = jax.tree.unflatten(
        jax.tree.structure(live), [x.reshape(s) for x, s in parts]
    )
    tolerance = max([1e-4, *(_lost(x, g, rate) for x, g in _pairs(live, grads))])
    if tolerance > LEAST_PRECISION:
        return (
            f"For a diagnosis, use a larger learning rate: with {rate:.3g} the "
            "gradient is lost in the rounding of the parameters."
        )
    return Gradient(moved, tolerance)


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


def _flat(tree: PyTree) -> np.ndarray:
    """All numbers of `tree`, in one axis."""
    return np.concatenate([np.zeros(0), *map(numbers, by_path(tree).values())])


def _first_update(
    optimizer: optax.GradientTransformation, grads: PyTree, params: PyTree
) -> PyTree | None:
    """None for an optimizer with arguments of its own."""
    try:
        return optimizer.update(grads, optimizer.init(params), params)[0]
    except (TypeError, ValueError):
        return None


def _pairs(params: PyTree, grads: PyTree) -> list[tuple[np.ndarray, np.ndarray]]:
    each = by_path(grads)
    return [(x, each[path]) for path, x in by_path(params).items() if x.size]


def _lost(x: np.ndarray, grad: np.ndarray, rate: float) -> float:
    """The part of a gradient that rounding the parameter loses."""
    size = np.sqrt(np.mean(numbers(grad) ** 2)) * abs(rate)
    lost = float(jnp.finfo(x.dtype).eps) * np.max(np.abs(numbers(x)))
    return float(lost / size) if size else 0.0


def _rate(
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
