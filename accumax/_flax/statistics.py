"""Running statistics: one update per window, with the moments of the whole window.

A batch normalisation updates its running statistics by `s = m s0 + (1 - m) moment`.
Microbatch i of a window has :math:`w_i` rows. It starts from the `s0` of the window's
start and returns :math:`s_i`. The mean over the window is the mean of the microbatch
means. The variance is the mean of the microbatch variances plus the variance of the
microbatch means (the law of total variance). So the update of the whole window is

.. math:: \\bar s^{mean} = \\frac{\\sum_i w_i s_i^{mean}}{\\sum_i w_i}, \\qquad
   \\bar s^{var} = \\frac{\\sum_i w_i s_i^{var}}{\\sum_i w_i} + \\frac{1}{1 - m}
   \\frac{\\sum_i w_i (s_i^{mean} - \\bar s^{mean})^2}{\\sum_i w_i}.

Only the last term needs the momentum m. The sums are Welford's, which avoid
cancellation. The result for a call is again such an :math:`s_i`, with the rows of the
call, for the window of the call. If something else changed the statistics within the
window, a call did not start from `s0`; its result is corrected to that from `s0`.

Each normalisation should run once in a forward pass. If it runs c times, the mean is
right, but the variance between microbatches counts up to c times too much.
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
    """The running statistics of a window's microbatches, pooled.

    Attributes:
      found: the statistics at the start of the window; the latest if none is open.
      mean: the weighted mean of the microbatches' statistics, of the same shapes, in at
        least float32. Leaves that are not floating-point keep their latest value.
      spread: for each running mean, in the order of the leaves, the weighted sum of the
        squared deviations from `mean`, of the same shape and dtype.
      weight: () float, the sum of the weights; at 0, `mean` and `spread` are stale.
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
    """Adds the statistics of a microbatch of `weight` rows.

    A weight of 0 adds nothing, even if the statistics are not finite.
    """
    weight = jnp.asarray(weight, float)
    taken, before = weight > 0, pool.weight
    total = before + jnp.where(taken, weight, 0)
    # 1 for the first, so that one microbatch gives its own statistics to the bit.
    share = weight / jnp.where(taken, total, 1)
    news = [jnp.asarray(x, _pool_dtype(x)) for x in jax.tree.leaves(statistics)]
    olds = jax.tree.leaves(pool.mean)

    def moved(old: jax.Array, new: jax.Array) -> jax.Array:
        if not _tree.is_differentiable(new):
            return jnp.where(taken, new, old)
        mean = old + share.astype(new.dtype) * (new - old)
        # The first microbatch is its own mean. `old` is stale then, maybe NaN.
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


def combine(devices: Devices, pool: Pool) -> Pool:
    """Combines the pools of all devices."""
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
    """Returns the running statistics after one update; `statistics` if none is pooled.

    `momenta` is the result of `check_momenta`.
    """
    leaves = jax.tree.leaves(pool.mean)
    some = pool.weight > 0
    factor = 1 / jnp.where(some, pool.weight, 1)
    each = zip(pairs(statistics).values(), pool.spread, momenta, strict=True)
    for (_, v), spread, momentum in each:
        if momentum < 1:  # 1 changes nothing
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
    """Returns `(pool, statistics)` after a call.

    Args:
      pool: the pool before the call.
      base: the statistics before the call; None for those of the pool.
      momenta: the result of `check_momenta`.
      call: `(statistics, rows)` of the call; statistics are None if it has none.
      before, after: the states of the window before and after the call.
    """
    new, rows = call
    for tree in (new, base):
        if tree is not None:
            _tree.check_same("running statistics", tree, pool.found)
    base = pool.found if base is None else base
    opened = pool.weight > 0
    found = jax.tree.map(lambda x, y: jnp.where(opened, x, y), pool.found, base)
    if new is not None:
        # A refused call leaves nothing behind, like its gradient.
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
    """Converts the result of an update from `start` to that of one from `other`."""
    trees = [jax.tree.leaves(tree) for tree in (statistics, start, other)]
    leaves = list(trees[0])
    for places, momentum in zip(pairs(statistics).values(), momenta, strict=True):
        for i in places:
            # Unchanged to the bit if `start` equals `other`.
            leaves[i] = leaves[i] + momentum * (trees[2][i] - trees[1][i])
    moved = jax.tree.structure(statistics).unflatten(leaves)
    return _tree.cast_like(moved, statistics)


def pairs(statistics: PyTree) -> dict[tuple[str, ...], tuple[int, int]]:
    """Finds running means and their variances: `{path: (mean, var)}`.

    `path` is the path of the layer; `mean` and `var` are indices of leaves. The leaves
    have the names "mean" and "var", also in a box such as `flax.linen.Partitioned`.
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
    """Returns the momentum of each pair of `pairs`.

    Args:
      statistics: the running statistics.
      momentum: maps the path of a pair to its momentum.
      where: the holder of the statistics, for the error message.
      remedy: the advice if a momentum is missing, for the error message.

    Raises:
      ValueError: a pair has no momentum, or one that is not from 0 to 1.
      TypeError: a momentum is not a Python number.
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
    """Returns the momentum at `path` from one number, or from nested mappings."""
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
