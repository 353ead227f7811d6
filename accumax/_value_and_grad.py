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
from ._batch.split import split
from ._devices.sharded import ReduceAxis, check_reduce_axis
from ._sums import Sums, accumulator
from ._types import DTypeLike, PyTree

Losses: TypeAlias = Callable[..., Any] | Sequence[Callable[..., Any]]


def value_and_grad(
    fun: Losses,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    microbatch_size: int | None = None,
    microbatches: int | None = None,
    batch_argnums: Places = 1,
    rng_argnums: Places = (),
    weighted: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    aux: PyTree = "mean",
    accumulator_dtype: DTypeLike | None = jnp.dtype(jnp.float32),
    unroll: int | bool = 1,
    in_place: bool = True,
    reduce_axis: ReduceAxis | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""`jax.value_and_grad` of the whole batch, at the memory of one microbatch.

    The batch is divided into microbatches, whose gradients one scan adds up. For losses
    :math:`\ell_i` that are means over :math:`n_i` rows, and for weighted ones, which
    return a sum :math:`s_i` and a weight :math:`w_i`, value and gradient are those of

    .. math:: \frac{\sum_i n_i \ell_i}{\sum_i n_i} \qquad\text{and}\qquad
       \frac{\sum_i s_i}{\sum_i w_i},

    which is what `jax.value_and_grad` gives for the whole batch at once, to rounding.
    The backward passes add into the accumulator in place, so that no second gradient
    exists. Microbatch i of k has the rows i, k + i, 2 k + i, ...: so no row leaves its
    device if the batch is sharded over as many as divide `microbatch_size`. If
    `microbatch_size` does not divide the batch, the last rows are a smaller microbatch,
    which is compiled besides.

    With a batch that is sharded over the devices of a mesh, XLA decides when gradients
    are reduced, and that may be in every microbatch. With `reduce_axis` each device
    adds up its own, in a `jax.shard_map`, and they are reduced once at the end: sums of
    losses, weights and gradients, so that weights may differ by device. The loss then
    sees a device's rows of a microbatch, and may name the axis itself. Within a
    `shard_map` of one's own over the same axes it does the same; all rows, and
    `microbatch_size`, are then the device's.

    Jit what calls this, as with every `lax.scan`.

    Args:
      fun: the loss function; a real floating-point scalar, the mean over the rows that
        it is given. Or a sequence of loss functions of the same arguments: the values
        (and aux) come as a tuple, the gradient is that of their sum, and only one of
        them is alive in memory at a time.
      argnums: the positions of the arguments to differentiate, as for
        `jax.value_and_grad`. Leaves that are not floating-point numbers ride along, and
        have None for a gradient.
      has_aux: `fun` returns `(loss, aux)`. Static, as are all that follow.
      microbatch_size: the rows of a microbatch. The last one may have fewer.
      microbatches: the number of microbatches, which divides the rows. Exactly one of
        the two.
      batch_argnums: the position of the argument that holds the batch, or its name if
        it is passed by keyword, or a tuple of those. All leaves of such an argument
        have a row for each of the batch along the first axis. Other arguments go to
        every microbatch as they are: for `loss_fn(params, x, y)` pass (1, 2).
      rng_argnums: the same for PRNG keys, typed or raw, or trees of them. Microbatch i
        gets `jax.random.fold_in(key, i)`, so that no two have the same dropout mask.
      weighted: `fun` returns `(loss_sum, weight)`, with aux `((loss_sum, weight),
        aux)`: the sum of its items' losses and their number, both () float. A
        microbatch of weight 0 adds nothing, whatever its gradient is; if all are of
        weight 0, value and gradient are 0, and with one that is negative or not finite
        they are NaN. The weight is not differentiated. Of several losses each is
        divided by its own weight, for which a scan computes the weights first.
      reduction: "mean"; or "sum" for losses that are sums over their rows: nothing is
        divided, also not by the weights.
      aux: how to reduce the aux: a tree of "mean" (weighted as the loss is), "sum",
        "last" (the last microbatch's), "stack" (along a new first axis) and "concat"
        (one value a row, along the first axis and in the order of the batch) that is a
        prefix of it. Integers take all but "mean". Or an object of your own with
        `init(like)`, `update(carry, x, i)` and `finalize(carry)`, as
        `optax.microbatching.Accumulator` is one, on one device. For several losses one
        for all, or a tuple with one for each.
      accumulator_dtype: the dtype that gradients are added in; None for their own. With
        float64 parameters pass float64 or None.
      unroll: as for `lax.scan`. True leaves no loop in the program, and still one
        microbatch at a time in memory: choose it for convolutions on a CPU, whose
        gradient XLA computes up to a hundred times slower within a loop (JAX issue
        12868). With `weighted`, add `in_place=False`, which has no loop either.
      in_place: False selects the twin that carries a gradient tree through the scan. In
        float32 both agree to the bit, except for parameters that the loss uses more
        than once, whose contributions are added one by one.
      reduce_axis: the mesh axis over which rows are divided and gradients reduced once,
        a tuple of several, an `accumax.DataParallel`, or an `accumax.FSDP` for
        parameters (what is differentiated) that are sharded over it. Its devices divide
        the rows and `microbatch_size`, which counts those of all. Keys are folded with
        the device's index. Of the aux, "last" is the last device's and "stack" has the
        microbatches of one device after those of another.

    Returns:
      A function of the arguments of `fun` that returns `(value, gradient)`, with aux
      `((value, aux), gradient)`, all of the dtypes that `jax.value_and_grad` gives. To
      differentiate it again, pass `in_place=False`; several losses have no derivative
      in reverse mode, because of their loops.

    Raises:
      TypeError, ValueError: for the arguments above at once; at the call, before
        anything is computed, if it does not fit them. The message names the argument.
        Within a `shard_map` that checks types (check_vma), a loss that is reduced
        already is one of these.

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
      `optax.microbatching` divides a batch as well; `tests/test_peers.py` names what
      differs. Several losses: a scan over a switch of them is the only form that XLA
      does not merge; here the branches are loops, which also pass their buffers on in
      place.
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
        batch_argnums=batch_argnums,
        rng_argnums=rng_argnums,
        weighted=weighted,
        reduction=reduction,
        aux=aux,
        accumulator_dtype=accumulator_dtype,
        unroll=unroll,
        in_place=in_place,
        reduce_axis=reduce_axis,
    )
    losses = tuple(stateless(f, has_aux=has_aux, weighted=weighted) for f in funs)

    @functools.wraps(funs[0], updated=())
    def value_and_grad_fun(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        return gradient(losses, (), (), args, kwargs)[1]

    return value_and_grad_fun


def gradients(
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    losses: int | None = None,
    microbatch_size: int | None = None,
    microbatches: int | None = None,
    batch_argnums: Places = 1,
    rng_argnums: Places = (),
    weighted: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    aux: PyTree = "mean",
    accumulator_dtype: DTypeLike | None = jnp.dtype(jnp.float32),
    unroll: int | bool = 1,
    in_place: bool = True,
    reduce_axis: ReduceAxis | None = None,
) -> Callable[..., tuple[PyTree, tuple[Any, PyTree]]]:
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
    divide = split(microbatch_size, microbatches, batch_argnums, rng_argnums, unroll)
    positions = check_argnums(argnums)
    several_args = not hasattr(argnums, "__index__")
    count = len(positions) if several_args else None
    devices = check_reduce_axis(reduce_axis, count)
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
    ) -> tuple[PyTree, tuple[Any, PyTree]]:
        call = Call(args, kwargs, at(positions, args), given, state)
        for n, live in zip(call.argnums, call.live, strict=True):
            _tree.check_parameters(f"Argument {n}", args[n])
            if jax.tree.leaves(args[n]) and not jax.tree.leaves(live):
                raise TypeError(
                    f"Argument {n}, which is differentiated, holds no floating-point "
                    f"number: {_tree.outline(args[n])}."
                )
        here = dataclasses.replace(loop, losses=stateful)
        out = Gradient(here, divide, accumulated, devices)(call)
        grads, _ = accumulated.result(Sums(out.grads, out.weight, {}))

        def seen(x: jax.Array) -> jax.Array:
            # No state could count a weight that cannot be: the result says it.
            return jnp.where(out.accepted, x, jnp.nan) if weighted else x

        grads = _tree.cast_like(jax.tree.map(seen, grads), call.live)
        values = tuple(seen(loss.value) for loss in out.losses)
        auxs = tuple(loss.aux for loss in out.losses)
        value, aux = (values[0], auxs[0]) if losses is None else (values, auxs)
        result = (value, aux) if has_aux else value
        return out.state, (result, grads if several_args else grads[0])

    return run


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
      A function that returns the gradient; with `has_aux`, `(gradient, aux)`.

    >>> import accumax, jax
    >>> import jax.numpy as jnp
    >>> f = accumax.grad(lambda w, x: jnp.mean(w * x), microbatches=2)
    >>> print(jax.jit(f)(1.0, jnp.arange(4.0)))
    1.5
    """
    both = value_and_grad(fun, argnums, has_aux, **options)

    @functools.wraps(both, updated=())
    def grad_fun(*args: Any, **kwargs: Any) -> PyTree:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fun
