"""Gradient accumulation as an Optax transformation."""

import functools
import operator
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._devices.mesh import AxisNames
from ._devices.reduce_axis import DataParallel, check_window_axis
from ._sums import accumulator
from ._tree import check_flags
from ._types import DTypeLike, NonFinite, PyTree, Reduction, Schedule
from ._window import boundary
from ._window.boundary import is_accumulate, window_of
from ._window.checks import check_length
from ._window.inner import inner_of
from ._window.measure import measure
from ._window.state import AccumulateState, is_state
from ._window.window import Window


def accumulate(
    inner: optax.GradientTransformation,
    every: int | Schedule,
    *,
    reduction: Reduction = "mean",
    accumulator_dtype: DTypeLike | None = jnp.dtype(jnp.float32),
    nonfinite: NonFinite = "propagate",
    averaged_args: tuple[str, ...] = (),
    reduce_axis: AxisNames | DataParallel | None = None,
    track_norm: bool = False,
    track_noise: bool | float = False,
    offload_optimizer: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates gradients over `every` calls, then runs `inner` once on their mean.

    Over a window of calls with gradients :math:`g_i` and weights :math:`w_i`, `inner`
    sees

    .. math:: \frac{\sum_i w_i g_i}{\sum_i w_i}, \qquad \sum_i g_i \quad\text{or}\quad
       \frac{\sum_i g_i}{\sum_i w_i}

    for the reductions "mean", "sum" and "mean_of_sums". Every other call emits -0.0,
    which leaves each parameter as it is to the bit, and does not run `inner`. (Under
    vmap, and where XLA:GPU flattens the conditional, the arithmetic of `inner` runs
    without effect; `accumax.apply_gradients` and `accumax.train_step` avoid that.)

    The sum is in `accumulator_dtype`, and `inner` sees the mean in at least float32.
    The updates have the dtypes that `inner` gives for such gradients, and its state
    keeps its dtypes. `inner` does not see leaves without a gradient (None, float0,
    `optax.MaskedNode`, integers, static leaves); they come out as they went in.
    A parameter whose gradient `inner` does not use, such as one frozen by
    `optax.set_to_zero` in an `optax.partition`, has no sum: `init` reads it from the
    program of `inner`. `train_step` then does not differentiate it.

    `update` takes these keyword arguments:

    - `weight=1.0`: the number of items (examples, tokens) that the gradient stands for.
      "mean_of_sums" requires it.
    - `flush=False`: () bool, close the window with this call.
    - those of `inner`, which reach it at the boundary. Other keywords may be for
      another member of a chain, as in Optax, but a near miss of a name is an error.

    Args:
      inner: the transformation to run once per window. Clipping inside, as in
        `accumulate(optax.chain(clip, adam), 8)`, clips the big batch's gradient.
      every: the window's length in calls, static: an integer of at least 1, or a
        schedule from the gradient step, () int32, to the length. If the length shrinks
        within a window, the next call closes it and divides by the weights so far. A
        traced length below 1, or NaN, counts as 1, and 2.5 as 3.
      reduction: "mean" if gradients are means over `weight` items, "mean_of_sums" if
        they are sums over them, "sum" to emit the plain sum. Static.
      accumulator_dtype: the dtype of the sum (for complex gradients, of its parts);
        None for each gradient's own. Static. With float64 gradients pass float64 or
        None.
      nonfinite: what to do with a non-finite gradient. "propagate": no check, no cost;
        the update has the NaN, as without accumulation. "skip": as if the call had not
        happened; the window waits for one more. "drop": the call counts towards the
        window with weight 0. Static.
      averaged_args: names of extra arguments, () float each, that `inner` gets as their
        weighted mean over the window, such as `("value",)`. Every call must pass them.
      reduce_axis: a mesh axis, a tuple of several, or an `accumax.DataParallel`. Each
        device along it adds up its own gradients, and one reduction happens when the
        window closes. `accumax.train_step` does all of this. Call `update` and
        `accumax.apply_gradients` within a `jax.shard_map` over these axes, with the
        gradient, weight and averaged arguments of each device, and replicated
        parameters. Static.
      track_norm: keep the norm of the window's gradient, as `inner` saw it, in the
        state: `opt_state.acc_args["grad_norm"]`. Static.
      track_noise: keep what `accumax.noise_scale` needs in the state: four scalars, and
        two more reads of the sum in a window. A float is the decay of its averages
        over windows, by default 0.99. With `reduce_axis`, the devices must have about
        equal weights. In a step with microbatches and an `unroll` above 1, XLA may keep
        a second sum. Static.
      offload_optimizer: keep the large arrays of the state of `inner` in the memory of
        the host. Only a call that closes a window reads them: it fetches those for one
        parameter after another, and sends them back. For a TPU, and for the fused forms
        (`accumax.train_step`, `accumax.apply_gradients`, `accumax.flush`): `update`
        gives the same, and saves nothing. An optimizer that needs the whole state for
        its first parameter, as one that clips the norm of Adam's updates, fetches all
        of it at once. A CPU has one memory. Static.

    Returns:
      A transformation whose state is an `AccumulateState`. A window whose weights sum
      to 0 applies nothing. A call whose traced weight is negative or not finite counts
      towards the window with weight 0, or not at all under "skip". (If a call
      with weighted=True has microbatches or several devices, by default only the part
      with that weight is left out; `skipped` still counts the call.)

    Raises:
      TypeError, ValueError: an argument is wrong; or gradients, weight or state of a
        call do not fit, before anything is changed. The message names it. With
        `reduce_axis`, a gradient that is reduced already is an error.
      NotImplementedError: `offload_optimizer` on a GPU, for which XLA does not compile
        it, or with a JAX before 0.10.2.

    >>> import accumax, optax
    >>> import jax.numpy as jnp
    >>> tx = accumax.accumulate(optax.sgd(1.0), every=2)
    >>> params = jnp.array([10.0])
    >>> state = tx.init(params)
    >>> for grad in (jnp.array([1.0]), jnp.array([3.0])):
    ...     updates, state = tx.update(grad, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params, accumax.has_updated(state))
    [10.] False
    [8.] True

    References:
      `optax.MultiSteps` does this with a running mean, weights of 1 and the optimizer
      in every call; `tests/test_peers.py` names the other differences.
    """
    if isinstance(inner, optax.MultiSteps) or not isinstance(
        inner, optax.GradientTransformation
    ):
        hint = ""
        if isinstance(inner, optax.MultiSteps):
            hint = " Pass what MultiSteps was made with: accumulate replaces it."
        raise TypeError(
            f"inner={inner!r} must be an optax.GradientTransformation, such as "
            f"optax.adamw(3e-4).{hint}"
        )
    check_flags(offload_optimizer=offload_optimizer)
    arithmetic = accumulator(
        reduction=reduction,
        dtype=accumulator_dtype,
        nonfinite=nonfinite,
        averaged_args=averaged_args,
    )
    found = inner_of(inner)
    window = Window(
        inner=found.offloaded() if offload_optimizer else found,
        every=_check_every(every),
        accumulator=arithmetic,
        devices=check_window_axis(reduce_axis),
        measure=measure(arithmetic, track_norm, track_noise),
    )
    return _Accumulate(window.init, functools.partial(boundary.update, window))


class _Accumulate(optax.GradientTransformationExtraArgs):
    """The transformation of `accumulate`; it knows what `optax.MultiSteps` has."""

    def __getattr__(self, name: str) -> Any:
        hints = {
            "has_updated": "accumax.has_updated(opt_state)",
            "gradient_transformation": "tx itself, which is a transformation",
        }
        hint = f" Use {hints[name]}." if name in hints else ""
        raise AttributeError(f"An accumax.accumulate has no attribute {name!r}.{hint}")


def has_updated(opt_state: optax.OptState) -> jax.Array:
    """Whether the latest call applied an update: () bool, also inside jit.

    False after a call that was skipped or dropped, or that closed a window without
    weight.

    Args:
      opt_state: an `AccumulateState`, or a state that holds one or several (in a chain,
        a `multi_transform`, ...); with several, whether any of them applied one. A
        wrapper that goes back to an old state, as `optax.apply_if_finite` does, takes
        the flag back with it; nonfinite="skip" does not.

    Raises:
      TypeError: there is no `AccumulateState` in `opt_state`.

    >>> import accumax, optax
    >>> import jax.numpy as jnp
    >>> tx = optax.chain(optax.clip(1.0), accumax.accumulate(optax.sgd(0.1), every=1))
    >>> state = tx.init(jnp.ones(3))
    >>> print(accumax.has_updated(state))
    False
    """
    applied = _applied(opt_state)
    if applied is None:
        raise TypeError(
            f"has_updated found no AccumulateState in a {type(opt_state).__name__}. "
            "Pass the state of an accumax.accumulate, or of a transformation around "
            "one."
        )
    return applied


def _applied(opt_state: Any) -> jax.Array | None:
    """Whether any state in `opt_state` applied an update, None if it holds none."""
    found = []
    for state in filter(is_state, jax.tree.leaves(opt_state, is_leaf=is_state)):
        # One within another holds what the other emits.
        within = _applied(state.inner_opt_state)
        found.append(state.emitted if within is None else state.emitted & within)
    return jnp.any(jnp.stack(found), axis=0) if found else None


def flush(
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: Any,
    **extra_args: Any,
) -> tuple[PyTree, AccumulateState]:
    """Closes an open window without a new gradient, for instance after an epoch.

    The mean is over what the window has seen. Without an open window nothing changes,
    but `has_updated` is then false.

    Args:
      tx: an `accumulate`, outermost.
      params: the parameters; donate them and the state under jit.
      opt_state: the state of `tx`.
      **extra_args: what `inner` takes, such as `value`; `averaged_args` come from the
        state and are not passed.

    Returns:
      `(params, opt_state)`, in the order of the arguments.

    Raises:
      TypeError: `tx` is not an `accumulate`, or the state is not its own.

    >>> import accumax, optax
    >>> import jax.numpy as jnp
    >>> tx = accumax.accumulate(optax.sgd(1.0), every=8)
    >>> params = jnp.array([10.0])
    >>> params, state = accumax.apply_gradients(tx, params, tx.init(params), params)
    >>> params, state = accumax.flush(tx, params, state)
    >>> print(params, state.gradient_step)
    [0.] 1
    """
    window = window_of(tx, "flush")
    for name in ("weight", "flush"):
        if name in extra_args:
            raise TypeError(
                f"{name}={extra_args[name]!r} was passed to accumax.flush, which adds "
                "no gradient. Pass it to the call that does."
            )
    window.check_names(extra_args, strict=True)
    return boundary.flush(window, params, opt_state, extra_args)


def accumulating(
    tx: optax.GradientTransformation, every: int | Schedule | None, name: str
) -> optax.GradientTransformationExtraArgs:
    """`tx` if it is an `accumulate`, else one around it, for what calls it `name`.

    Raises:
      TypeError: it is none, and `every` is None.
      ValueError: it is one, and `every` is not None.
    """
    if every is None:
        try:
            window_of(tx, name)
        except TypeError as error:
            raise TypeError(
                f"{error} Or pass every=..., the calls in a window, and tx is wrapped."
            ) from None
        return tx  # type: ignore[return-value]
    if is_accumulate(tx):
        raise ValueError(
            f"{every=} was passed with a tx that is an accumax.accumulate already. "
            "Pass one or the other."
        )
    length = _check_every(every)
    made = accumulate(tx, length)
    try:
        update = _wrapped.setdefault((tx, length), made.update)
    except TypeError:  # it has no hash
        return made
    return _Accumulate(update.args[0].init, update)


# One `update` for the same arguments, so that two train states have one structure. It
# is here as long as a state has it: an optimizer may hold arrays as large as the model.
_wrapped: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


def _check_every(every: Any) -> Any:
    if callable(every):
        return every
    try:
        if isinstance(every, (bool, np.bool_)):
            raise TypeError
        length = operator.index(every)
    except jax.errors.TracerIntegerConversionError:
        return check_length(every)  # `optax.inject_hyperparams` traces its arguments
    except TypeError:
        raise TypeError(
            f"every={every!r} must be an integer of at least 1, the calls in a window, "
            "or a schedule from the gradient step to that."
        ) from None
    if not 1 <= length <= jnp.iinfo(jnp.int32).max:
        raise ValueError(
            f"{every=} must be from 1 to 2**31 - 1: the calls in a window. 1 applies "
            "an update in every call."
        )
    return length
