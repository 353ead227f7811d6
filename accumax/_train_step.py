"""Across calls, fused: parameters and state are touched only when a window closes."""

from collections.abc import Callable
from typing import Any

import optax

from ._batch.arguments import Places
from ._batch.loss import stateless
from ._devices.reduce_axis import ReduceAxis
from ._step import Step
from ._types import ArrayLike, PyTree
from ._window.boundary import close, window_of
from ._window.checks import check_flush
from ._window.state import AccumulateState


def apply_gradients(
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: Any,
    grads: PyTree,
    *,
    weight: ArrayLike | None = None,
    flush: ArrayLike = False,
    **extra_args: Any,
) -> tuple[PyTree, AccumulateState]:
    """`tx.update` and `optax.apply_updates` in one, without an update tree.

    Inside a window this costs what `acc += grads` costs: parameters and optimizer state
    are not read, copied or zero-filled. Donate both, and keep their order: jit pairs a
    donated input with the first output of the same shape and dtype, and `(opt_state,
    params)` for `(params, opt_state)` would copy every buffer twice.

    Where gradients are of a lower precision than the parameters, `tx.update` rounds the
    update to theirs; this form does not.

    Args:
      tx: an `accumulate`, outermost.
      params: the parameters.
      opt_state: the state of `tx`.
      grads: the gradient of one microbatch, shaped as the parameters.
      weight: () float, the items (examples, tokens) that `grads` stands for. 1 by
        default; the reduction "mean_of_sums" requires it.
      flush: () bool, close the window with this call.
      **extra_args: what the inner transformation takes, and `averaged_args`.

    Returns:
      `(params, opt_state)`.

    Raises:
      TypeError: `tx` is not an `accumulate`, or an argument is of a wrong type.
      ValueError: the gradients or the parameters do not fit the state.

    >>> import accumax, jax, optax
    >>> import jax.numpy as jnp
    >>> tx = accumax.accumulate(optax.sgd(1.0), every=2)
    >>> @jax.jit
    ... def step(params, state, grads):
    ...     return accumax.apply_gradients(tx, params, state, grads)
    >>> params = jnp.array([10.0])
    >>> state = tx.init(params)
    >>> for grad in (1.0, 3.0):
    ...     params, state = step(params, state, jnp.array([grad]))
    >>> print(params)
    [8.]
    """
    window = window_of(tx, "apply_gradients")
    window.check_names(extra_args, strict=True)
    window.check(opt_state, extra_args, params=params, grads=grads)
    flush = check_flush(flush)
    sums, progress = window.add(opt_state, grads, weight, flush, extra_args)
    return close(window, params, opt_state, sums, progress, extra_args)


def train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    weighted: bool = False,
    microbatch_size: int | None = None,
    microbatches: int | None = None,
    num_microbatches: ArrayLike | None = None,
    batch_argnums: Places = 1,
    rng_argnums: Places = (),
    aux: PyTree = "mean",
    unroll: int | bool = 1,
    in_place: bool = True,
    reduce_axis: ReduceAxis | None = None,
) -> Callable[..., tuple[PyTree, AccumulateState, Any]]:
    """A training step whose backward pass adds into the accumulator; no gradient tree.

    The floor is the memory of parameters, optimizer state, accumulator and one
    microbatch. For a scanned, rematerialised transformer with float32 parameters that
    is one to seven percent more than the step without accumulation: the accumulator
    replaces the gradient. Layers that are not scanned take 1.1 to 1.3 times as much
    with Adam and twice as much with SGD, where XLA keeps no gradient without
    accumulation. Half-precision parameters have a float32 accumulator, and besides it
    up to one gradient of their dtype: of one layer, if a scan reads them.

    A gradient tree exists, and is added as in `apply_gradients`, where something must
    see it: with nonfinite="skip" or "drop"; in a step that is passed a `weight` (let
    the loss return it instead: `weighted=True`); without jit; under `jax.vmap` or a
    derivative; with `in_place=False`.
    JAX before 0.11 builds it, with a warning, for parameters whose gradient it would
    get wrong in place. In float32 all of these agree to the bit, except for parameters
    that the loss uses more than once: the form in place adds each use by itself.

    The step has no derivative in reverse mode, because of its loops; differentiate
    through `tx.update`.

    Args:
      loss_fn: `(params, *args) -> loss`, a real floating-point scalar. For
        `optax.LookaheadParams` it is called with the fast parameters.
      tx: an `accumulate`, outermost.
      has_aux: `loss_fn` returns `(loss, aux)`. Static.
      weighted: as for `accumax.value_and_grad`. The update is that of the sum of all
        losses over the sum of all weights; the reduction "sum" does not divide. Static.
      microbatch_size, microbatches, num_microbatches, batch_argnums, rng_argnums, aux,
        unroll: divide each call into microbatches, as for `accumax.value_and_grad`: the
        same update, at the memory of one microbatch. `batch_argnums` also says which
        rows the devices of a `reduce_axis` divide. A call with `num_microbatches=0`
        has no weight. Positions count `params` as number 0. The loss
        must be a mean over its rows for the reduction "mean", and a sum over them for
        the others. Static.
      in_place: False carries a gradient tree instead. Static.
      reduce_axis: as for `accumax.value_and_grad`, with or without microbatches; by
        default that of `tx`. If `tx` has one, gradients are reduced once in a window,
        by the call that closes it. If only the step has one, they are reduced once in
        every call. Loss and aux come from all devices, and `weight` counts the items of
        all. An `accumax.FSDP` is for a `tx` without `reduce_axis`. Static.

    Returns:
      `step(params, opt_state, *args, **extra_args) -> (params, opt_state, loss)`, with
      `(loss, aux)` in the last place if `has_aux`. `loss` is that of this call; if
      weighted, its mean, which is 0 for weight 0. `extra_args` are those of
      `tx.update`: `weight` (not if `weighted`), `flush`, and those of the inner
      transformation, whose `value` defaults to `loss`. Pass the arguments of `loss_fn`
      by position. Jit the step with `donate_argnums=(0, 1)`.

    Raises:
      TypeError: `tx` is not an `accumulate`; at the first call, `loss_fn` does not
        return what the options say, or an argument is of a wrong type.
      ValueError: an option is for microbatches or devices, and there are none; at the
        first call, the parameters do not fit the state.

    >>> import accumax, jax, optax
    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x, y):
    ...     return jnp.mean((x @ w - y) ** 2)
    >>> tx = accumax.accumulate(optax.sgd(0.1), every=2)
    >>> step = jax.jit(accumax.train_step(loss_fn, tx), donate_argnums=(0, 1))
    >>> w, x, y = jnp.zeros(2), jnp.eye(2), jnp.array([1.0, 2.0])
    >>> state = tx.init(w)
    >>> for i in range(2):  # the batch of two, one row at a time
    ...     w, state, loss = step(w, state, x[i : i + 1], y[i : i + 1])
    >>> print(w, jax.grad(loss_fn)(jnp.zeros(2), x, y) * -0.1)
    [0.1 0.2] [0.1 0.2]

    References:
      `jax.vjp(...).with_refs`; JAX issue 32411 reports wrong gradients with refs, which
      is why the twin exists and the tests hold the two together.
    """
    window = window_of(tx, "train_step")
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn={loss_fn!r} must be a function (params, *args) -> loss."
        )
    step_of = Step(
        weighted=weighted,
        has_aux=has_aux,
        microbatch_size=microbatch_size,
        microbatches=microbatches,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        rng_argnums=rng_argnums,
        aux=aux,
        unroll=unroll,
        in_place=in_place,
        reduce_axis=reduce_axis,
    )
    step_of.check(window)
    loss = stateless(loss_fn, has_aux=has_aux, weighted=weighted)

    def step(
        params: PyTree, opt_state: Any, *args: Any, **extra_args: Any
    ) -> tuple[PyTree, AccumulateState, Any]:
        params, opt_state, out, _ = step_of(
            window, loss, (), (), params, opt_state, args, **extra_args
        )
        return params, opt_state, (out.value, out.aux) if has_aux else out.value

    return step
