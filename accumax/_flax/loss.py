"""Losses with a state: running statistics, and values for the next microbatch."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _tree
from .._batch.arguments import Place, rows_of
from .._batch.loss import Loss, StatefulLoss
from .._devices.mesh import is_array
from .._devices.one import Devices
from .._types import ArrayLike, PyTree
from . import statistics as running


class Given(NamedTuple):
    """The values that all microbatches get besides the arguments of the loss.

    Attributes:
      statistics: the running statistics at the start of the call. The new ones of all
        microbatches are pooled.
      fields: the fields of a state that the loss only reads.
      keys: PRNG keys, the same for all microbatches of a device.
    """

    statistics: PyTree
    fields: PyTree = None
    keys: PyTree = None


@dataclasses.dataclass(frozen=True)
class Handing:
    """A loss whose state goes from microbatch to microbatch.

    Attributes:
      given: the values that all microbatches get.
      rest: the state of the first microbatch, without the running statistics. Each
        device has its own state, in which typed PRNG keys differ.
      run: `(given, rest, args, kwargs) -> (loss, statistics, rest)`.
    """

    given: Given
    rest: PyTree
    run: Callable[[Given, PyTree, tuple, dict[str, Any]], tuple[Loss, PyTree, PyTree]]

    def stateful(
        self, fun: Callable[..., Any], batch_argnums: tuple[Place, ...]
    ) -> tuple[StatefulLoss, PyTree, PyTree]:
        """Returns `(loss, given, state)`: the loss and its values for a call.

        `fun` is the user's function. The number of rows in its arguments
        `batch_argnums` weighs the statistics.
        """
        pools = bool(jax.tree.leaves(self.given.statistics))
        arrays = jax.tree.map(lambda x: x if is_array(x) else None, self.given)

        def run(
            given: PyTree, state: PyTree, args: tuple, kwargs: dict[str, Any]
        ) -> tuple[Loss, PyTree]:
            given, (pool, rest) = _tree.restore(given, self.given), state
            loss, statistics, new = self.run(given, rest, args, kwargs)
            _tree.check_same("running statistics", statistics, given.statistics)
            _tree.check_same("state", new, rest)
            if pools:
                rows = rows_of(batch_argnums, fun, args, kwargs)
                pool = running.add(pool, statistics, rows)
            return loss, (pool, new)

        state = running.begin(self.given.statistics), self.rest
        return StatefulLoss(run, fun, _begin, _end), arrays, state

    def settle(
        self, carried: Any, momenta: tuple[float, ...], accepted: ArrayLike
    ) -> tuple[PyTree, PyTree, jax.Array]:
        """Returns `(statistics, rest, rows)` after a call that ended with `carried`.

        If `accepted`, () bool, is False, `rest` is as before the call. `statistics`
        do not depend on it: the pool of a window itself leaves out refused calls.
        """
        pool, rest = carried
        rest = jax.tree.map(lambda x, y: jnp.where(accepted, x, y), rest, self.rest)
        return (
            running.result(pool, self.given.statistics, momenta),
            rest,
            pool.weight,
        )


def _begin(devices: Devices, given: Given, state: Any) -> tuple[Given, Any]:
    def own(x: Any) -> Any:
        return devices.keys_of_device(x) if _is_typed(x) else x

    pool, rest = state
    given = given._replace(keys=devices.keys_of_device(given.keys))
    return given, (pool, jax.tree.map(own, rest))


def _end(devices: Devices, first: Any, last: Any, kept: Any) -> Any:
    def ended(path: Any, old: jax.Array, new: jax.Array, as_it_was: bool) -> jax.Array:
        if as_it_was:  # a leaf that no microbatch changes needs no communication
            return old
        if old.dtype == jnp.uint32 and old.shape[-1:] in {(2,), (4,)}:
            warnings.warn(
                f"The state of the loss has {_tree.describe(old)} at "
                f"{jax.tree_util.keystr(path)}, as keys of jax.random.PRNGKey are. If "
                "it is one, all devices draw the same random numbers: make it with "
                "jax.random.key.",
                stacklevel=2,
            )
        return devices.last(new)

    rest = jax.tree_util.tree_map_with_path(ended, first[1], last[1], kept[1])
    return running.combine(devices, last[0]), rest


def _is_typed(x: Any) -> bool:
    dtype = _tree.dtype_of(x)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
