"""The state of a window across calls."""

from typing import Any, NamedTuple

import jax
import optax

from .._types import PyTree

# What a state's `acc_args` may hold beside the averaged arguments.
MEASURES = NORM, NOISE = "grad_norm", "noise"


class AccumulateState(NamedTuple):
    """State of `accumulate`: arrays only, so it can be saved, donated and sharded.

    Attributes:
      mini_step: () int32, the calls that count towards the open window; 0 if no window
        is open.
      gradient_step: () int32, the updates applied so far.
      inner_opt_state: the state of the wrapped transformation.
      acc_grads: the open window's gradient sum, shaped as the parameters, in the
        accumulator dtype. Stale while `mini_step` is 0: the next window overwrites it.
        With a `reduce_axis`, a first axis has the sum of each device.
        An `Unused()` stands for a gradient that the transformation does not use.
      acc_weight: () float, the open window's sum of weights; 0 if no window is open.
      acc_args: the numbers of a window, by name. For each of `averaged_args` the open
        window's weighted sum, () float; while no window is open, the weighted mean of
        the window that closed last. With `track_norm` "grad_norm", () float: the norm
        of the gradient of the last applied window, as the wrapped transformation saw
        it. With `track_noise` "noise", which `accumax.noise_scale` reads.
      emitted: () bool, whether the latest call applied an update; see `has_updated`.
      skipped: () int32, the calls so far whose gradient or weight was refused, and the
        windows that were lost because their weights cannot divide.

    The counts stop at the largest int32 and never overflow.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Any
    acc_grads: PyTree
    acc_weight: jax.Array
    acc_args: dict[str, Any]
    emitted: jax.Array
    skipped: jax.Array


class Progress(NamedTuple):
    """The progress of a window after a call: () int32, () int32 and () bool."""

    mini_step: jax.Array
    skipped: jax.Array
    closes: jax.Array


def is_state(x: Any) -> bool:
    return isinstance(x, AccumulateState)


def accepted(before: AccumulateState, after: AccumulateState) -> jax.Array:
    """() bool: whether the call between the two states was accepted."""
    return before.skipped == after.skipped


def gradient_of(params: PyTree) -> PyTree:
    """Returns the part of `params` whose structure and shapes gradients have."""
    # Only `optax.lookahead` takes gradients of a part, the fast parameters.
    return params.fast if isinstance(params, optax.LookaheadParams) else params
