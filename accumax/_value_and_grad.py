"""Within a call: the big batch's gradient, one microbatch at a time."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from . import _tree
from ._batch.arguments import Places, at, check_argnums
from ._batch.gradient import Gradient
from ._batch.loss import Call, StatefulLoss, stateless
from ._batch.outputs import check_aux_wanted, check_each_reduction
from ._batch.scan import Loop
from ._batch.small import noise_of
from ._batch.split import split
from ._devices.one import ONE
from ._devices.reduce_axis import ReduceAxis, check_reduce_axis
from ._sums import Sums, accumulator
from ._types import ArrayLike, DTypeLike, PyTree

Losses: TypeAlias = Callable[..., Any] | Sequence[Callable[..., Any]]


def value_and_grad(
    fun: Losses,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    microbatch_size: int | None = None,
    microbatches: int | None = None,
    num_microbatches: ArrayLike | None = None,
    batch_argnums: Places = 1,
    rng_argnums: Places = (),
    weighted: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    aux: PyTree = "mean",
    accumulator_dtype: DTypeLike | None = jnp.dtype(jnp.float32),
    unroll: int | bool = 1,
    in_place: bool = True,
    reduce_axis: ReduceAxis | None = None,
    track_noise: bool = False,
) -> Callable[..., tuple[Any, ...]]:
    r"""`jax.value_and_grad` of the whole batch, at the memory of one microbatch.

    The batch is divided into microbatches, and one scan adds up their gradients. A loss
    returns a mean :math:`\ell_i` over :math:`n_i` rows or, if it is weighted, a sum
    :math:`s_i` and a weight :math:`w_i`. Value and gradient are those of

    .. math:: \frac{\sum_i n_i \ell_i}{\sum_i n_i} \qquad\text{and}\qquad
       \frac{\sum_i s_i}{\sum_i w_i},

    which `jax.value_and_grad` gives for the whole batch at once, to rounding. The
    backward passes add into the accumulator in place, so no second gradient exists.

    Microbatch i of k has the rows i, k + i, 2 k + i, ... A batch that is sharded over
    devices then keeps each row on its device, if the number of devices divides
    `microbatch_size`. If `microbatch_size` does not divide the batch, the last rows are
    a smaller microbatch, which is compiled separately.

    Without `reduce_axis`, XLA decides when to reduce the gradients of a sharded batch,
    and may do it in every microbatch. With `reduce_axis`, each device adds up its own
    sums of losses, weights and gradients in a `jax.shard_map`, and one reduction at the
    end adds those of all devices, whose weights may differ. The loss sees the rows that
    one device has of a microbatch, and may name the axis. You can also call this inside
    your own `shard_map` over the same axes; `microbatch_size` then counts the rows of
    one device.

    Call it under `jax.jit`, as every `lax.scan`.

    Args:
      fun: the loss function. It returns a real floating-point scalar, the mean over its
        rows. Or a sequence of loss functions of the same arguments: values and aux are
        then tuples, the gradient is that of the sum of the losses, and only one of them
        is alive in memory at a time.
      argnums: the positions of the arguments to differentiate, as for
        `jax.value_and_grad`. The gradient is None at leaves that are not floating-point
        numbers.
      has_aux: `fun` returns `(loss, aux)`. Static, as are all arguments below but
        `num_microbatches`.
      microbatch_size: the rows of a microbatch. The last microbatch may have fewer.
      microbatches: the number of microbatches instead. It must divide the rows.
      num_microbatches: () integer, which may be traced: only the first so many of the
        microbatches run, without compiling again, and the others cost nothing. Each
        then has consecutive rows. A mean is over the rows of those that ran. For 0,
        loss and gradient are 0. Of the aux, "stack" and "concat" have zeros for the
        others. With `reduce_axis`, each device runs so many of its own.
      batch_argnums: the position of the argument that holds the batch, its name if it
        is passed by keyword, or a tuple of these: (1, 2) for `loss_fn(params, x, y)`.
        The first axis of each leaf has the rows. Every microbatch, and every
        device of a `reduce_axis`, gets the other arguments unchanged. One of as many
        rows as the batch is warned of.
      rng_argnums: the same for arguments that are PRNG keys, typed or raw, or trees of
        keys. Microbatch i gets `jax.random.fold_in(key, i)`, so dropout masks differ.
      weighted: `fun` returns `(loss_sum, weight)`, with aux `((loss_sum, weight),
        aux)`: the sum of the losses of its items, and their number, both () float. The
        weight is not differentiated. A microbatch of weight 0 adds nothing, also if its
        gradient is NaN. If all weights are 0, so are value and gradient. If a weight is
        negative or not finite, both are NaN. Each of several losses is divided by its
        own weight; an extra scan computes the weights first.
      reduction: "mean", or "sum" for a loss that is a sum over its rows; then nothing
        is divided, not by the weights either.
      aux: how to reduce the aux over microbatches: "mean" (weighted as the loss),
        "sum", "last" (the last microbatch's), "stack" (along a new first axis) or
        "concat" (one value for each row, such as logits, in the order of the batch;
        "mean" would average row i of all microbatches). Integers take all but "mean". A
        pytree prefix of the aux gives each leaf its own reduction. On one device, a
        reduction may be an object with `init(like)`, `update(carry, x, i)` and
        `finalize(carry)`, such as an `optax.microbatching.Accumulator`. For several
        losses: one for all, or a tuple with one for each.
      accumulator_dtype: the dtype that gradients are added in; None for their own. With
        float64 parameters pass float64 or None.
      unroll: as for `lax.scan`. True leaves no loop in the program and still keeps one
        microbatch at a time in memory. Choose it for convolutions on a CPU: XLA
        computes their gradient up to a hundred times slower within a loop (JAX issue
        12868). With `weighted`, add `in_place=False`, which has no loop either.
      in_place: False carries a gradient tree through the scan instead. In float32 both
        forms agree to the bit, except for parameters that the loss uses more than once:
        the form in place adds each use by itself.
      reduce_axis: the mesh axis over which rows are divided and gradients are reduced:
        a name, a tuple of names, an `accumax.DataParallel`, or an `accumax.FSDP` for
        parameters that are sharded over it. `microbatch_size` counts the rows of all
        devices. Each device folds its index into its keys. Of the aux, "last" is the
        last device's, and "stack" has the microbatches device after device.
      track_noise: return a third value for `accumax.noise_scale`, whose small batch is
        the first microbatch or, with `reduce_axis`, what each device has (with
        `accumax.FSDP` only if `once`); their weights must then be about equal. With
        `unroll`, up to half a gradient more may be kept.

    Returns:
      A function of the arguments of `fun` that returns `(value, gradient)`, with aux
      `((value, aux), gradient)`, in the dtypes of `jax.value_and_grad`. With
      `track_noise` it is `(value, gradient, noise)`, where `noise` is a pytree of ()
      floats from this call alone, to be averaged over calls: zeros if it had one
      microbatch, or a gradient that is not finite. To differentiate the function again,
      pass `in_place=False`. With several losses it has no derivative in reverse mode,
      because of its loops.

    Raises:
      TypeError, ValueError: an argument is wrong, at once; or a call does not fit it,
        before anything is computed. The message names the argument. Within a
        `shard_map` with check_vma, a loss that is reduced already is an error.

    >>> import accumax, jax
    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean((x @ w - 1) ** 2)
    >>> w, x = jnp.zeros(3), jnp.arange(24.0).reshape(8, 3)
    >>> f = jax.jit(accumax.value_and_grad(loss_fn, microbatch_size=3))  # 3, 3 and 2
    >>> print(*f(w, x))
    1.0 [-21. -23. -25.]
    >>> print(*jax.value_and_grad(loss_fn)(w, x))
    1.0 [-21. -23. -25.]

    References:
      `optax.microbatching` divides a batch as well; `tests/test_peers.py` names the
      differences. Several losses run in a scan over at-most-once loops, because XLA
      merges the graphs of losses that are computed one after another.
    """
    several = isinstance(fun, Sequence)
    funs = tuple(fun) if several else (fun,)
    if not funs or not all(map(callable, funs)):
        raise TypeError(
            f"{fun=} must be a loss function, or a sequence of at least one."
        )
    gradient = gradients(
        argnums,
        has_aux,
        losses=len(funs) if several else None,
        microbatch_size=microbatch_size,
        microbatches=microbatches,
        num_microbatches=num_microbatches,
        batch_argnums=batch_argnums,
        rng_argnums=rng_argnums,
        weighted=weighted,
        reduction=reduction,
        aux=aux,
        accumulator_dtype=accumulator_dtype,
        unroll=unroll,
        in_place=in_place,
        reduce_axis=reduce_axis,
        track_noise=track_noise,
    )
    losses = tuple(stateless(f, has_aux=has_aux, weighted=weighted) for f in funs)

    @functools.wraps(funs[0], updated=())
    def value_and_grad_fun(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return gradient(losses, (), (), args, kwargs)[1]

    return value_and_grad_fun


def gradients(
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    losses: int | None = None,
    microbatch_size: int | None = None,
    microbatches: int | None = None,
    num_microbatches: ArrayLike | None = None,
    batch_argnums: Places = 1,
    rng_argnums: Places = (),
    weighted: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    aux: PyTree = "mean",
    accumulator_dtype: DTypeLike | None = jnp.dtype(jnp.float32),
    unroll: int | bool = 1,
    in_place: bool = True,
    reduce_axis: ReduceAxis | None = None,
    track_noise: bool = False,
) -> Callable[..., tuple[PyTree, tuple[Any, ...]]]:
    """`value_and_grad` of losses that are only known at the call, and have a state.

    Args:
      losses: their number, None for one that is not in a sequence.
      others: as for `value_and_grad`.

    Returns:
      `(losses, given, state, args, kwargs) -> (state, result)`, with a tuple of
      `StatefulLoss`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'{reduction=} must be "mean" or "sum".')
    _tree.check_flags(
        has_aux=has_aux,
        weighted=weighted,
        in_place=in_place,
        track_noise=track_noise,
    )
    if track_noise and weighted and (losses or 1) > 1:
        raise ValueError(
            f"track_noise=True with {losses} weighted losses: each is divided by its "
            "own weight, so no single unit counts their items. Measure one of them."
        )
    divide = split(microbatch_size, microbatches, batch_argnums, rng_argnums, unroll)
    positions = check_argnums(argnums)
    several_args = not hasattr(argnums, "__index__")
    count = len(positions) if several_args else None
    devices = ONE.join(check_reduce_axis(reduce_axis, count))  # there is no window
    accumulated = accumulator(reduction=reduction, dtype=accumulator_dtype)
    loop = Loop(
        losses=(),
        weighted=weighted,
        mean=reduction == "mean",
        aux=check_each_reduction(aux, losses),
        in_place=in_place,
    )
    check_aux_wanted(aux, has_aux)

    def run(
        stateful: tuple[StatefulLoss, ...],
        given: PyTree,
        state: PyTree,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[PyTree, tuple[Any, ...]]:
        differentiated = at(positions, args)
        call = Call(args, kwargs, differentiated, given, state, limit=num_microbatches)
        _check_live(call)
        here = dataclasses.replace(loop, losses=stateful)
        measures = jnp.bool_(True) if track_noise else None
        out = Gradient(here, divide, accumulated, devices, measures=measures)(call)
        grads, _ = accumulated.result(Sums(out.grads, out.weight, {}))
        noises = ()
        if out.part is not None:
            divisor = out.weight if here.mean else None
            noises = (noise_of(out.part, grads, divisor, out.accepted),)

        def seen(x: jax.Array) -> jax.Array:
            # No state could count a weight that cannot be: the result says it.
            return jnp.where(out.accepted, x, jnp.nan) if weighted else x

        grads = _tree.cast_like(jax.tree.map(seen, grads), call.live)
        values = tuple(seen(loss.value) for loss in out.losses)
        auxs = tuple(loss.aux for loss in out.losses)
        value, aux = (values[0], auxs[0]) if losses is None else (values, auxs)
        result = (value, aux) if has_aux else value
        grads = grads if several_args else grads[0]
        return out.state, (result, grads, *noises)

    return run


def _check_live(call: Call) -> None:
    for n in call.argnums:
        _tree.check_parameters(f"Argument {n}", call.args[n])
        _tree.check_any_float(f"Argument {n}", call.args[n])


def grad(
    fun: Losses,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., PyTree]:
    """`jax.grad` of the whole batch, at the memory of one microbatch.

    Args:
      fun, argnums, has_aux, **options: as for `accumax.value_and_grad`.

    Returns:
      A function that returns the gradient; with `has_aux`, `(gradient, aux)`. With
      `track_noise`, the noise comes last.

    >>> import accumax, jax
    >>> import jax.numpy as jnp
    >>> f = accumax.grad(lambda w, x: jnp.mean(w * x), microbatches=2)
    >>> print(jax.jit(f)(1.0, jnp.arange(4.0)))
    1.5
    """
    both = value_and_grad(fun, argnums, has_aux, **options)

    @functools.wraps(both, updated=())
    def grad_fun(*args: Any, **kwargs: Any) -> PyTree:
        value, grads, *noise = both(*args, **kwargs)
        found = (grads, *(value[1:] if has_aux else ()), *noise)
        return found if len(found) > 1 else grads

    return grad_fun
