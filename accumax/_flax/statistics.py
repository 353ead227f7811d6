"""Running statistics: one update per window, with the moments of the whole window.

A batch normalisation moves its running statistics by `s = m s0 + (1 - m) moment`. Let
microbatch i of a window see the `s0` of the window's start and give :math:`s_i`, and
let it have :math:`w_i` rows. The mean of a window is the mean of its microbatches'
means, and its variance is the mean of their variances and the variance of their means
(the law of total variance), so that the update of the whole window is

.. math:: \\bar s^{mean} = \\frac{\\sum_i w_i s_i^{mean}}{\\sum_i w_i}, \\qquad
   \\bar s^{var} = \\frac{\\sum_i w_i s_i^{var}}{\\sum_i w_i} + \\frac{1}{1 - m}
   \\frac{\\sum_i w_i (s_i^{mean} - \\bar s^{mean})^2}{\\sum_i w_i}.

Only the last term needs the momentum m. The sums are Welford's, which do not cancel.
What this gives for a call is again such an :math:`s_i`, with the rows of the call, for
the window that the call is in. A call that did not start from the `s0` of its window,
because something else moved them in between, counts with what it would have given.

Each normalisation is taken to run once in a forward pass. Of one that runs c times,
the mean is right, and the variance between microbatches counts up to c times too much.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _tree
from .._devices.one import Devices
from .._types import ArrayLike, PyTree
from .._window.state import AccumulateState, accepted


class Pool(NamedTuple):
    """What the running statistics of a window's microbatches were.

    Attributes:
      found: the statistics that the window found; while none is open, the latest.
      mean: their weighted mean, shaped as the statistics, at least float32; integers
        and the like are the latest.
      spread: for each running mean, in the order of the leaves, the weighted sum of the
        squared deviations from `mean`, of the same shape and dtype.
      weight: () float, the sum of the weights; while it is 0, both are stale.
    """

    found: PyTree
    mean: PyTree
    spread: list[jax.Array]
    weight: jax.Array


def begin(statistics: PyTree) -> Pool:
    """An empty pool for these statistics."""

    def zeros(x: Any) -> jax.Array:
        return jnp.zeros_like(jnp.asarray(x), dtype=_pool_dtype(x))

    mean = jax.tree.map(zeros, statistics)
    leaves = jax.tree.leaves(mean)
    spread = [jnp.zeros_like(leaves[m]) for m, _ in pairs(statistics).values()]
    # A copy, because a buffer that two fields hold cannot be donated.
    found = jax.tree.map(jnp.array, statistics)
    return Pool(found, mean, spread, jnp.zeros((), float))


def add(pool: Pool, statistics: PyTree, weight: ArrayLike) -> Pool:
    """Takes in the statistics that a microbatch of `weight` rows gave.

    A weight of 0 adds nothing, whatever the statistics are.
    """
    weight = jnp.asarray(weight, float)
    taken, before = weight > 0, pool.weight
    total = before + jnp.where(taken, weight, 0)
    # 1 for the first one, so that a window of one microbatch is that to the bit.
    share = weight / jnp.where(taken, total, 1)
    news = [jnp.asarray(x, _pool_dtype(x)) for x in jax.tree.leaves(statistics)]
    olds = jax.tree.leaves(pool.mean)

    def moved(old: jax.Array, new: jax.Array) -> jax.Array:
        if not _tree.is_differentiable(new):
            return jnp.where(taken, new, old)
        mean = old + share.astype(new.dtype) * (new - old)
        # A stale NaN is not to be read, and of one microbatch the mean is itself.
        mean = jnp.where(before > 0, mean, new)
        return jnp.where(taken, mean, old)

    means = [moved(*pair) for pair in zip(olds, news, strict=True)]

    def spread(spread: jax.Array, m: int) -> jax.Array:
        more = weight.astype(spread.dtype) * (news[m] - olds[m]) * (news[m] - means[m])
        kept = jnp.where(before > 0, spread, 0)
        return kept + jnp.where(taken & (before > 0), more, 0)

    places = [m for m, _ in pairs(statistics).values()]
    spreads = [spread(*pair) for pair in zip(pool.spread, places, strict=True)]
    mean = jax.tree.structure(pool.mean).unflatten(means)
    return Pool(pool.found, mean, spreads, total)


def over(devices: Devices, pool: Pool) -> Pool:
    """The pool of the microbatches of all devices, from those of each."""
    some, weight = pool.weight > 0, pool.weight
    total = devices.sum(weight)
    factor = 1 / jnp.where(total > 0, total, 1)

    def mean(x: jax.Array) -> jax.Array:
        if not _tree.is_differentiable(x):
            return devices.last(x)
        share = jnp.where(some, weight.astype(x.dtype) * x, 0)
        return devices.sum(share) * factor.astype(x.dtype)

    means = jax.tree.map(mean, pool.mean)
    olds, news = jax.tree.leaves(pool.mean), jax.tree.leaves(means)

    def spread(spread: jax.Array, m: int) -> jax.Array:
        more = weight.astype(spread.dtype) * (olds[m] - news[m]) ** 2
        return devices.sum(jnp.where(some, spread + more, 0))

    places = [m for m, _ in pairs(pool.found).values()]
    spreads = [spread(*pair) for pair in zip(pool.spread, places, strict=True)]
    return Pool(pool.found, means, spreads, total)


def result(pool: Pool, statistics: PyTree, momenta: tuple[float, ...]) -> PyTree:
    """The running statistics after one update by the window; `statistics` if empty.

    `momenta`: what `check_momenta` gave.
    """
    leaves = jax.tree.leaves(pool.mean)
    some = pool.weight > 0
    factor = 1 / jnp.where(some, pool.weight, 1)
    each = zip(pairs(statistics).values(), pool.spread, momenta, strict=True)
    for (_, v), spread, momentum in each:
        if momentum < 1:  # else nothing moves
            between = spread * factor.astype(spread.dtype) / (1 - momentum)
            leaves[v] = leaves[v] + between
    pooled = jax.tree.structure(statistics).unflatten(leaves)
    pooled = _tree.cast_like(pooled, statistics)
    return jax.tree.map(lambda x, old: jnp.where(some, x, old), pooled, statistics)


def after_call(
    pool: Pool,
    base: PyTree,
    momenta: tuple[float, ...],
    call: tuple[PyTree, ArrayLike],
    *,
    before: AccumulateState,
    after: AccumulateState,
) -> tuple[Pool, PyTree]:
    """`(pool, statistics)` after a call that took a window from `before` to `after`.

    Args:
      pool: the open window's.
      base: the statistics that the call found; None for those of the pool.
      momenta: what `check_momenta` gave.
      call: what the call gave, None if it gave none, and its rows.
    """
    new, rows = call
    for tree in (new, base):
        if tree is not None:
            _tree.check_same("running statistics", tree, pool.found)
    base = pool.found if base is None else base
    opened = pool.weight > 0
    found = jax.tree.map(lambda x, y: jnp.where(opened, x, y), pool.found, base)
    if new is not None:
        # As the gradient: a call that was refused leaves nothing behind.
        rows = jnp.where(accepted(before, after), jnp.asarray(rows, float), 0)
        pool = add(pool, _moved(new, base, found, momenta), rows)
    moved = _moved(result(pool, found, momenta), found, base, momenta)
    statistics = jax.tree.map(
        lambda x, old: jnp.where(after.emitted, x, old), moved, base
    )
    weight = jnp.where(after.mini_step == 0, 0, pool.weight)
    found = jax.tree.map(lambda x, y: jnp.where(weight > 0, x, y), found, statistics)
    return pool._replace(found=found, weight=weight), statistics


def _moved(
    statistics: PyTree, start: PyTree, other: PyTree, momenta: tuple[float, ...]
) -> PyTree:
    """What an update from `start` gave, as one from `other` would have given it."""
    trees = [jax.tree.leaves(tree) for tree in (statistics, start, other)]
    leaves = list(trees[0])
    for places, momentum in zip(pairs(statistics).values(), momenta, strict=True):
        for i in places:
            # To the bit the same, if both are.
            leaves[i] = leaves[i] + momentum * (trees[2][i] - trees[1][i])
    moved = jax.tree.structure(statistics).unflatten(leaves)
    return _tree.cast_like(moved, statistics)


def pairs(statistics: PyTree) -> dict[tuple[str, ...], tuple[int, int]]:
    """From the path of what holds a running mean and its variance to their places.

    The places are among the leaves. They are known by their names, "mean" and "var",
    within a box such as `flax.linen.Partitioned` too.
    """
    leaves = jax.tree_util.tree_leaves_with_path(statistics)
    names = [_names(path) for path, _ in leaves]
    at = {n[:-1] if n[-1:] == ("value",) else n: i for i, n in enumerate(names)}
    return {
        path[:-1]: (i, at[*path[:-1], "var"])
        for path, i in at.items()
        if path[-1:] == ("mean",) and (*path[:-1], "var") in at
    }


def check_momenta(
    statistics: PyTree,
    momentum: Callable[[tuple[str, ...]], Any],
    where: str,
    remedy: str,
) -> tuple[float, ...]:
    """The momentum of each pair of `pairs`.

    Args:
      statistics: the running statistics.
      momentum: from the path of what holds a pair to its momentum.
      where: what holds the statistics, for the message.
      remedy: what to do about one that is missing.

    Raises:
      ValueError: there is none for a pair, or it is not from 0 to 1.
      TypeError: it is not a number.
    """
    found = []
    for path in pairs(statistics):
        value, layer = momentum(path), ".".join(path) or "its root"
        if value is None or isinstance(value, Mapping):
            raise ValueError(
                f"{where} has a running mean and variance at {layer}, without a "
                "momentum, with which the variance between microbatches enters. "
                f"{remedy}: it is that of its BatchNorm (Flax's default is 0.99)."
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                f"The momentum at {layer} is {value!r}; expected a Python float: it is "
                "static."
            )
        if not 0 <= value <= 1:
            raise ValueError(f"The momentum at {layer} is {value}, not from 0 to 1.")
        found.append(float(value))
    return tuple(found)


def lookup(momentum: Any, path: tuple[str, ...]) -> Any:
    """The momentum at `path`: one for all, or mappings from names to such."""
    for name in path:
        if isinstance(momentum, Mapping):
            momentum = momentum.get(name)
    return momentum


def _pool_dtype(x: Any) -> Any:
    dtype = _tree.dtype_of(x)
    if not _tree.is_differentiable(x):
        return dtype
    return _tree.wide(dtype)


def _names(path: tuple) -> tuple[str, ...]:
    fields = "key", "name", "idx"
    return tuple(
        str(next((getattr(x, f) for f in fields if hasattr(x, f)), x)) for x in path
    )
