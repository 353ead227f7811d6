"""A moving average of the parameters, updated once per window."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _tree
from .._accumulate import has_updated
from .._types import ArrayLike, PyTree
from .._xla.loops import at_most_once


def ema(
    average: PyTree, params: PyTree, opt_state: optax.OptState, decay: ArrayLike
) -> PyTree:
    """Updates a moving average of the parameters, once per gradient step.

    After a call that applied an update it returns `decay * average + (1 - decay) *
    params`, else `average`, in place if it is donated.

    Args:
      average: the average, shaped as the parameters; start with a copy of them.
      params: the parameters after the call.
      opt_state: the optimizer's state after the call.
      decay: () float, from 0 to 1.

    Raises:
      TypeError: there is no `AccumulateState` in `opt_state`.
      ValueError: `average` is not shaped as the parameters.

    >>> import accumax, optax
    >>> import jax.numpy as jnp
    >>> from accumax.linen import ema
    >>> tx = accumax.accumulate(optax.sgd(1.0), every=2)
    >>> params = average = jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     params, state = accumax.apply_gradients(tx, params, state, -jnp.ones(1))
    ...     average = ema(average, params, state, decay=0.9)
    ...     print(average)
    [0.]
    [0.1]
    """
    _tree.check_like("average", average, params, "params")

    def moved(old: Any, new: Any) -> Any:
        old, new = jnp.asarray(old), jnp.asarray(new)
        if not _tree.is_differentiable(old):
            return new.astype(old.dtype)
        return jnp.asarray(decay * old + (1 - decay) * new, old.dtype)

    # In a loop, because a `where` would read and write both trees in every call.
    average = jax.tree.map(_tree.strong, average)
    with jax.named_scope("accumax.ema"):
        return at_most_once(
            has_updated(opt_state),
            lambda old: jax.tree.map(moved, old, params),
            average,
        )
