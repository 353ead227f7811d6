"""Losses with a state: running statistics, and what is handed from each to the next."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import _numerics as numerics
from . import _statistics
from ._arguments import Place, rows_of
from ._loop import Carrying
from ._loss import Loss
from ._types import ArrayLike, PyTree


@dataclasses.dataclass(frozen=True)
class Handing:
    """A loss whose state goes from microbatch to microbatch.

    Attributes:
      statistics: the running statistics, which all microbatches see as they are and
        which are pooled.
      rest: the state that the first microbatch sees, and each other as the one before
        left it.
      run: `(rest, args, kwargs) -> (loss, statistics, rest)`.
    """

    statistics: PyTree
    rest: PyTree
    run: Callable[[PyTree, tuple, dict[str, Any]], tuple[Loss, PyTree, PyTree]]

    @property
    def pools(self) -> bool:
        return bool(jax.tree.leaves(self.statistics))

    def carrying(
        self, fun: Callable[..., Any], batch_argnums: tuple[Place, ...]
    ) -> tuple[Carrying, Any]:
        """The loss for `value_and_grad` and `train_step`, and what it is handed first.

        `fun`: the function that the user wrote. The rows of `batch_argnums`, among its
        arguments, are what statistics are weighed by.
        """

        @functools.wraps(fun)
        def loss_fn(carried: Any, *args: Any, **kwargs: Any) -> Any:
            pool, rest = carried
            loss, statistics, new = self.run(rest, args, kwargs)
            numerics.check_same("running statistics", statistics, self.statistics)
            numerics.check_same("state", new, rest)
            if self.pools:
                rows = rows_of(batch_argnums, fun, args, kwargs)
                pool = _statistics.add(pool, statistics, rows)
            value = loss.value if loss.weight is None else (loss.value, loss.weight)
            return value, ((pool, new), loss.aux)

        return Carrying(loss_fn), (_statistics.begin(self.statistics), self.rest)

    def settle(
        self, carried: Any, momenta: tuple[float, ...], accepted: ArrayLike
    ) -> tuple[PyTree, PyTree, jax.Array]:
        """`(statistics, rest, rows)` after a call that ended with `carried`.

        `accepted`, () bool: if not, the rest is as it was. The statistics are for a
        pool that knows that itself.
        """
        pool, rest = carried
        rest = jax.tree.map(lambda x, y: jnp.where(accepted, x, y), rest, self.rest)
        return (
            _statistics.result(pool, self.statistics, momenta),
            rest,
            pool.weight,
        )
