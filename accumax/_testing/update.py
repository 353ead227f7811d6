"""One window of a step, beside the big batch's update in two precisions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import differentiable
from .._types import PyTree
from .evidence import by_path, check_trees, numbers
from .precise import in_float64
from .reference import Reference, rate_of

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


def call(
    step: Callable[..., Any], params: PyTree, opt_state: Any, microbatch: PyTree
) -> tuple[PyTree, Any]:
    try:
        out = step(params, opt_state, microbatch)
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        raise TypeError(
            f"step(params, opt_state, microbatch) failed: {error}. For a step of other "
            "arguments pass call=, such as `lambda step, params, state, batch: "
            "step(params, state, *batch)[:2]` for (params, opt_state, x, y)."
        ) from error
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
) -> tuple[tuple[Distance, ...], float]:
    """Returns the distances, and the big batch's own error as a part of its update."""
    got = by_path(after)
    before = check_trees("params", params, {"the parameters after the step": after})
    near = by_path(big.update(params, batch))
    true = _exact(big.update, params, batch)
    missing = [path for path in before if path not in true or path not in near]
    if missing:
        raise ValueError(
            f"reference returned no parameter at {', '.join(missing[:6])}, where "
            "params has one. It must return the new parameters."
        )
    own = {path: _far(near[path], true[path]) for path in before}
    wild = [path for path in before if not np.isfinite(own[path])]
    if wild:
        raise ValueError(
            f"The big batch's own update is not finite at {', '.join(wild[:6])}, in "
            "the precision of the parameters or in float64: no step can be compared "
            "with it. Pass other parameters, data or a smaller learning rate."
        )
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
    return tuple(found), float(part)


def _exact(
    fun: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree
) -> dict[str, np.ndarray]:
    """The numbers of `fun(params, batch)`, by path, as computed in float64."""

    def named(params: PyTree, batch: PyTree) -> dict[str, Any]:
        tree = differentiable(fun(params, batch))
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): x for path, x in leaves}

    found = in_float64(named, params, batch)
    return {path: numbers(x) for path, x in found.items()}


def _far(x: Any, true: np.ndarray) -> float:
    far = np.max(np.abs(numbers(x) - true), initial=0.0)
    return float(far) if np.isfinite(far) else np.inf


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
    grads = big.gradient(params, batch)
    own = _inexact(grads, _exact(big.gradient, params, batch))
    if not np.isfinite(own):
        return "There is no diagnosis: the big batch's gradient is not finite."
    least = max(1e-4, 2 * own)
    if gradient is not None:
        return Gradient(gradient(params, after, opt_state), least)
    rate = rate_of(big.optimizer, params, grads)
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
    tolerance = max([least, *(_lost(x, g, rate) for x, g in _pairs(live, grads))])
    if tolerance > LEAST_PRECISION:
        return (
            f"For a diagnosis, use a larger learning rate: with {rate:.3g} the "
            "gradient is lost in the rounding of the parameters."
        )
    return Gradient(moved, tolerance)


def _inexact(grads: PyTree, exact: dict[str, np.ndarray]) -> float:
    """How inexact a gradient is, relative to it: rounding, also of products in it."""
    pairs = [(numbers(g), exact[path]) for path, g in by_path(grads).items()]
    size = math.hypot(*(np.linalg.norm(true) for _, true in pairs))
    off = math.hypot(*(np.linalg.norm(own - true) for own, true in pairs))
    return off / size if size else 0.0


def _pairs(params: PyTree, grads: PyTree) -> list[tuple[np.ndarray, np.ndarray]]:
    each = by_path(grads)
    return [(x, each[path]) for path, x in by_path(params).items() if x.size]


def _lost(x: np.ndarray, grad: np.ndarray, rate: float) -> float:
    """The part of a gradient that rounding the parameter loses."""
    size = np.sqrt(np.mean(numbers(grad) ** 2)) * abs(rate)
    lost = float(jnp.finfo(x.dtype).eps) * np.max(np.abs(numbers(x)))
    return float(lost / size) if size else 0.0
