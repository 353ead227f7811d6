"""Across calls, fused: parameters and state are touched only when a window closes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _tree
from ._batch.arguments import Places, parameters, takes_any_keyword
from ._batch.gradient import Backward, at_once, by_microbatch
from ._batch.loss import Carrying
from ._batch.outputs import check_aux_wanted, check_reductions
from ._batch.scan import Loop
from ._batch.split import split
from ._devices.replicated import Axes, AxisNames, MeshLike, check_axes
from ._devices.sharded import When, check_gather
from ._types import ArrayLike, PyTree
from ._window.checks import check_flush
from ._window.inner import OF_OPTAX
from ._window.state import AccumulateState, gradient_of
from ._window.window import Window, window_of


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
      weight: () float, the items (examples, tokens) that `grads` stands for; 1 by
        default, which "mean_of_sums" has not.
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
    return window.close(params, opt_state, sums, progress, extra_args)


def train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    weighted: bool = False,
    microbatch_size: int | None = None,
    batch_argnums: Places = 1,
    rng_argnums: Places = (),
    aux: PyTree = "mean",
    in_place: bool = True,
    reduce_axis: AxisNames | None = None,
    mesh: MeshLike | None = None,
    gather: When | None = None,
    reduce: When | None = None,
    param_specs: PyTree = None,
) -> Callable[..., tuple[PyTree, AccumulateState, Any]]:
    """A training step whose backward pass adds into the accumulator; no gradient tree.

    The floor is the memory of parameters, optimizer state, accumulator and one
    microbatch. For a scanned, rematerialised transformer with float32 parameters that
    is one to five percent more than the step without accumulation: the accumulator is
    there instead of the gradient. Layers that are not scanned take 1.2 to 1.3 times as
    much with Adam and twice as much with SGD, where XLA keeps no gradient without
    accumulation. Half-precision parameters have a gradient of their dtype first, and a
    float32 accumulator.

    The gradient tree exists after all, and is added as `apply_gradients` does it, where
    something must see it: with nonfinite="skip" or "drop"; in a step that is passed a
    `weight` (let the loss return it instead: `weighted=True`); without jit; with
    `in_place=False`. JAX before 0.11 builds it, with a warning, for parameters that it
    would get wrong in place. In float32 all of these agree to the bit, except for
    parameters that the loss uses more than once, whose contributions are added one by
    one.

    The step cannot be differentiated in reverse mode, because of its loops;
    differentiate through `tx.update`.

    Args:
      loss_fn: `(params, *args) -> loss`, a real floating-point scalar. For
        `optax.LookaheadParams` it is called with the fast parameters.
      tx: an `accumulate`, outermost.
      has_aux: `loss_fn` returns `(loss, aux)`. Static.
      weighted: `loss_fn` returns `(loss_sum, weight)`, with aux
        `((loss_sum, weight), aux)`: the sum of its items' losses and their number, both
        () float; the number is not differentiated. The update is that of the sum of all
        sums over the sum of all weights (the reduction "sum" does not divide). A call
        of weight 0 adds nothing, whatever its gradient is. Static.
      microbatch_size: divides each call further, into microbatches of so many rows, as
        `accumax.value_and_grad` does it: the same update, at the memory of one of them.
        The loss must be a mean over its rows for the reduction "mean", and is taken for
        a sum over them under the others. Static.
      batch_argnums, rng_argnums, aux: with `microbatch_size`, as for
        `accumax.value_and_grad`: positions among `loss_fn`'s arguments, of which
        `params` is number 0. Static.
      in_place: False selects the twin that carries the gradient tree. Static.
      reduce_axis, mesh: as for `accumax.value_and_grad`, with or without
        `microbatch_size`, which counts the rows of all devices; by default those of
        `tx`. If `tx` has them, gradients are reduced once in a window, by the call that
        closes it; if only the step has them, once in every call. Loss and aux come from
        all devices, `weight` is that of all. Static, as are the following.
      gather, reduce, param_specs: as for `accumax.value_and_grad`, where `tx` has no
        `reduce_axis`: sums and optimizer state are then sharded as the parameters are.

    Returns:
      `step(params, opt_state, *args, **extra_args) -> (params, opt_state, loss)`, or
      `(loss, aux)` in the last place. `loss` is this call's, if weighted its mean,
      which is 0 for weight 0. `extra_args` are those of `tx.update`: `weight` (not if
      `weighted`), `flush`, and what the inner transformation takes; `value`, if it
      takes that, defaults to `loss`. Arguments of `loss_fn` are passed by position. Jit
      it with `donate_argnums=(0, 1)`.

    Raises:
      TypeError: `tx` is not an `accumulate`; at the first call, `loss_fn` does not
        return what the options say, or an argument is of a wrong type.
      ValueError: at the first call, the parameters do not fit the state.

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
    axes = _axes(window, reduce_axis, mesh)
    gathered = check_gather(axes, gather, reduce, param_specs)
    if gathered is not None and window.axes is not None:
        raise ValueError(
            f"{gather=} is for parameters that no device has whole, and an accumulate "
            f"with reduce_axis={window.axes.names} keeps a whole sum on each. Leave "
            "reduce_axis to train_step, which then reduces in every call."
        )
    carried = not in_place or window.accumulator.nonfinite != "propagate"
    names, carries = set(parameters(loss_fn)), isinstance(loss_fn, Carrying)
    any_name = not carries and takes_any_keyword(loss_fn)
    if microbatch_size is None and axes is None:
        # A loss that carries a state may weigh it by the rows of the batch.
        places = 1 if carries else batch_argnums
        if (places, rng_argnums, aux) != (1, (), "mean"):
            raise ValueError(
                f"{batch_argnums=}, {rng_argnums=} and {aux=} are for microbatches, "
                "and there are none. Pass microbatch_size."
            )

        def backward_of(fun: Callable[..., Any]) -> Backward:
            return at_once(fun, has_aux, weighted)

    else:
        accumulator = window.accumulator
        loop = Loop(
            losses=(loss_fn,),
            has_aux=has_aux,
            weighted=weighted,
            mean=weighted or accumulator.reduction == "mean",
            aux=[check_reductions(aux)],
            in_place=in_place,
            axes=axes,
            gather=gathered,
        )
        check_aux_wanted(aux, has_aux)
        count = 1 if microbatch_size is None else None
        divide = split(microbatch_size, count, batch_argnums, rng_argnums)

        def backward_of(fun: Callable[..., Any]) -> Backward:
            here = dataclasses.replace(loop, losses=(fun,))
            return by_microbatch(here, divide, accumulator, window.axes is not None)

    def step(
        params: PyTree,
        opt_state: Any,
        *args: Any,
        weight: ArrayLike | None = None,
        flush: ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulateState, Any]:
        window.check(opt_state, params=params)
        flush = check_flush(flush)
        if weighted and weight is not None:
            raise TypeError(
                f"weight={weight!r} was passed to a step made with weighted=True, "
                "whose weight is what loss_fn returns. Pass one or the other."
            )
        if names & extra_args.keys():
            raise TypeError(
                f"The keyword arguments {sorted(names & extra_args.keys())} are named "
                "like arguments of loss_fn, but keywords go to the optimizer. Pass "
                "loss_fn's arguments by position: step(params, opt_state, batch, ...)."
            )
        window.check_names(extra_args, strict=True)
        known = window.inner.names | set(window.accumulator.averaged_args) | OF_OPTAX
        if any_name and extra_args.keys() - known:
            raise TypeError(
                f"The keyword arguments {sorted(extra_args.keys() - known)} go to the "
                "optimizer, and loss_fn with its ** would not see them. Bind them "
                "before, with functools.partial(loss_fn, ...)."
            )
        model, fun = gradient_of(params), loss_fn
        live = _tree.differentiable(model)
        if not carries and _leaves(live) != _leaves(opt_state.acc_grads):
            # The state was made from a part of an Equinox module: the rest is fixed.
            fun = _of_part(loss_fn, model)
            model = _tree.trained(model, opt_state.acc_grads)
        backward = backward_of(fun)
        first, sums = opt_state.mini_step == 0, window.sums(opt_state)
        if carried or weight is not None:
            loss, grads, usable = backward.gradient(model, args)
            add = functools.partial(window.add_own, grads=grads, summed=weighted)
        else:
            loss, grads, usable = backward.add(model, args, sums.grads, first)
            sums, add = sums._replace(grads=grads), window.accumulator.tally
        averaged = window.accumulator.averaged_args
        if "value" in averaged or window.inner.takes("value"):
            extra_args = {"value": loss.value} | extra_args
        window.check(opt_state, extra_args)
        items = loss.weight
        if items is None:
            items = window.weigh(weight)
            if axes is not None and weight is not None:
                items = axes.same("weight", items)
        elif window.accumulator.nonfinite != "propagate":
            items = jnp.where(usable, items, jnp.nan)  # all of the call, or nothing
        sums, accepted = add(sums, weight=items, args=extra_args, first=first)

        progress = window.progress(opt_state, accepted & usable, flush)
        params, new_state = window.close(params, opt_state, sums, progress, extra_args)
        out = (loss.value, loss.aux) if has_aux or carries else loss.value
        return params, new_state, out

    return step


def _of_part(loss_fn: Callable[..., Any], whole: PyTree) -> Callable[..., Any]:
    """`loss_fn` of a part of its parameters; the others are those of `whole`."""

    @functools.wraps(loss_fn)
    def fun(part: PyTree, *args: Any) -> Any:
        return loss_fn(_tree.restore(part, whole), *args)

    return fun


def _leaves(tree: PyTree) -> int:
    return len(jax.tree.leaves(tree))


def _axes(window: Window, reduce_axis: Any, mesh: Any) -> Axes | None:
    axes = check_axes(reduce_axis, mesh)
    if window.axes is None or axes is None:
        return window.axes if axes is None else axes
    if window.axes.names != axes.names:
        raise ValueError(
            f"reduce_axis={axes.names}, where the accumulate has reduce_axis="
            f"{window.axes.names}. Pass the same, or pass it to the accumulate alone."
        )
    return axes if axes.mesh is not None else window.axes
