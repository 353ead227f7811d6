"""Flax NNX: optimizer, gradient and step for modules. Needs `accumax[flax]`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from . import _tree, _value_and_grad
from ._accumulate import accumulating, flush
from ._batch.arguments import Places, at, check_argnums, check_places
from ._flax import statistics as running
from ._flax.average import ema as ema
from ._flax.modules import Modules, check_function, check_some, momenta_of
from ._step import Step
from ._train_step import apply_gradients
from ._types import ArrayLike, PyTree, Schedule
from ._window.boundary import window_of
from ._window.state import AccumulateState, accepted


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` with windows of several calls.

    The model's `BatchStat` is pooled, wherever the gradients come from. A call within a
    window resets it to its old value. When the window closes, it has one update, with
    the mean and the variance of all rows of the window. (A layer still normalises with
    the rows of its microbatch.) Load a model's weights before you make its optimizer.

    Attributes:
      step, microstep: () uint32, the gradient steps and the calls so far.
      tx, opt_state, wrt: as in `nnx.Optimizer`.
      pool: the open window's running statistics; None if there are none to pool.

    >>> import accumax.nnx, jax, optax
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = accumax.nnx.Optimizer(
    ...     model, optax.adam(1e-3), wrt=nnx.Param, every=2  # the line that changes
    ... )
    >>> grad_fn = nnx.grad(lambda model: jnp.mean(model(jnp.ones((4, 2))) ** 2))
    >>> for _ in range(4):
    ...     optimizer.update(model, grad_fn(model))
    >>> print(optimizer.step[...], optimizer.microstep[...])
    2 4
    """

    def __init__(
        self,
        model: Any,
        tx: optax.GradientTransformation,
        *,
        wrt: Any,
        every: int | Schedule | None = None,
        batch_stats: bool = True,
    ):
        """Makes an optimizer at step 0.

        Args:
          model: the module.
          tx, every: an optimizer, and the calls in a window (or a schedule for it) for
            an `accumax.accumulate`. Or an `accumulate`, outermost, without `every`.
          wrt: the filter of the variables to optimize, such as `nnx.Param`.
          batch_stats: whether to pool the model's `BatchStat`. If a model has several
            optimizers, let only one do it.

        Raises:
          TypeError, ValueError: `tx` and `every` do not fit; the model has no variable
            for `wrt`; or a module with a running mean and variance has no `momentum`.
        """
        tx = accumulating(tx, every, "nnx.Optimizer")
        check_some(nnx.state(model, wrt), model, wrt)
        statistics = nnx.as_pure(nnx.state(model, nnx.BatchStat)) if batch_stats else {}
        momenta_of(model, statistics)
        super().__init__(model, tx, wrt=wrt)
        self.microstep = nnx.OptState(jnp.zeros((), jnp.uint32))
        pool = running.begin(statistics) if jax.tree.leaves(statistics) else None
        self.pool = nnx.data(jax.tree.map(nnx.OptArray, pool))

    def update(
        self,
        model: Any,
        grads: Any,
        /,
        *,
        weight: ArrayLike | None = None,
        flush: ArrayLike = False,
        **kwargs: Any,
    ) -> Any:
        """Adds one gradient, in place; builds no updates, and so returns none.

        It raises the errors of `accumax.apply_gradients`, before anything is changed.

        Args:
          model, grads: the module, and one microbatch's gradient as from `nnx.grad`.
          weight: () float, the items (examples, tokens) that `grads` stands for. It
            weighs the model's `BatchStat` too. 1 by default.
          flush: () bool, close the window with this call.
          **kwargs: the optimizer's extra arguments, such as `value=loss`.
        """
        params, after = apply_gradients(
            self.tx,
            nnx.as_pure(nnx.state(model, self.wrt)),
            nnx.as_pure(self.opt_state),
            nnx.as_pure(nnx.state(grads, self.wrt)),
            weight=weight,
            flush=flush,
            **nnx.as_pure(kwargs),
        )
        self._after(model, params, after, 1.0 if weight is None else weight)

    def flush(self, model: Any, **kwargs: Any) -> None:
        """Closes an open window, as `accumax.flush` does with these `kwargs`."""
        state = nnx.as_pure((nnx.state(model, self.wrt), self.opt_state))
        params, after = flush(self.tx, *state, **nnx.as_pure(kwargs))
        self._after(model, params, after, None)

    def _after(
        self,
        model: Any,
        params: PyTree,
        after: AccumulateState,
        rows: ArrayLike | None,
        base: PyTree = None,
    ) -> None:
        """Writes the result of a call from statistics `base`; a flush has no `rows`."""
        before, count = nnx.as_pure(self.opt_state), optax.safe_increment
        if self.pool is not None:
            new = nnx.as_pure(nnx.state(model, nnx.BatchStat))
            pool, statistics = running.after_call(
                nnx.as_pure(self.pool),
                new if rows is None else base,
                momenta_of(model, new),
                (None, 0) if rows is None else (new, rows),
                before=before,
                after=after,
            )
            _write(self.pool, pool)
            _write(model, statistics)
        _write(model, params)
        _write(self.opt_state, after)
        step = self.step[...]
        self.step[...] = jnp.where(after.emitted, count(step), step)
        if rows is not None:
            self.microstep[...] = count(self.microstep[...])


def train_step(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    weighted: bool = False,
    batch_argnums: Places = 1,
    **options: Any,
) -> Callable[..., Any]:
    """`accumax.train_step` for modules: no gradient tree.

    The model's `BatchStat` is pooled over a window. The `BatchStat` of modules in other
    arguments (a GAN's generator) is pooled over a call. Other variables that the loss
    changes, such as the counts of `Rngs`, go from microbatch to microbatch and from
    call to call, so dropout masks differ. A refused call does not change them.

    Args:
      loss_fn: `(model, *args) -> loss`. Other arguments may be or hold modules too, or
        `nnx.Rngs`. The loss must not change the structure of any module.
      has_aux, weighted, **options: as for `accumax.train_step`, such as
        `microbatch_size` and `reduce_axis`. Static, as is `batch_argnums`.
      batch_argnums: as for `accumax.train_step`. Without microbatches too, the rows of
        these arguments weigh a `BatchStat`.

    Returns:
      `step(model, optimizer, *args, **extra_args) -> loss`, or `(loss, aux)`. It
      changes the modules and the `accumax.nnx.Optimizer` in place. Call it within
      `nnx.jit`, or within `jax.jit` with `nnx.split` and `nnx.merge`. `extra_args` and
      errors are those of `accumax.train_step`.

    >>> import accumax.nnx, optax
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> optimizer = accumax.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param, every=2)
    >>> step = accumax.nnx.train_step(lambda model, x: jnp.mean((model(x) - 1) ** 2))
    >>> step = nnx.jit(step, donate_argnums=(0, 1))
    >>> x = jnp.arange(8.0).reshape(4, 2)
    >>> for i in range(2):
    ...     loss = step(model, optimizer, x[2 * i : 2 * i + 2])
    >>> print(model.mean[...])  # 0.99 * 0 + 0.01 * the mean of all four
    [0.03 0.04]
    """
    check_function("loss_fn", loss_fn)
    places = check_places("batch_argnums", batch_argnums)
    run = Step(
        has_aux=has_aux,
        weighted=weighted,
        batch_argnums=batch_argnums,
        by_rows=True,
        **options,
    )

    def step(model: Any, optimizer: Any, *args: Any, **extra_args: Any) -> Any:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer)=} is not an accumax.nnx.Optimizer.")
        base = nnx.as_pure(nnx.state(model, nnx.BatchStat))
        if (pool := optimizer.pool) is not None:
            _tree.check_same("BatchStat of the model", base, nnx.as_pure(pool).found)
        modules = Modules((model, *args), {}, {0: optimizer.wrt})
        handing = modules.handing(loss_fn, has_aux, weighted)
        before, (params, *others) = nnx.as_pure(optimizer.opt_state), modules.args
        params, after, loss, carried = run(
            window_of(optimizer.tx, "train_step"),
            *handing.stateful(loss_fn, places),
            nnx.as_pure(params),
            before,
            tuple(others),
            **extra_args,
        )
        rows = modules.write(handing, carried, accepted(before, after))
        optimizer._after(model, params, after, rows, base)
        return (loss.value, loss.aux) if has_aux else loss.value

    return step


def value_and_grad(
    f: Callable[..., Any],
    *,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    has_aux: bool = False,
    weighted: bool = False,
    batch_argnums: Places = 1,
    **options: Any,
) -> Callable[..., tuple[Any, PyTree]]:
    """`nnx.value_and_grad` of the whole batch, at the memory of one microbatch.

    `BatchStat` has one update for the batch, with the mean and the variance of all its
    rows. Other variables go from microbatch to microbatch, as in `train_step`.

    Args:
      f: `(model, *args) -> loss`, as for `train_step`.
      argnums: the positions of the arguments to differentiate, as for
        `nnx.value_and_grad`. In a module it differentiates the `nnx.Param`, or the
        variables that the filter of an `nnx.DiffState` selects.
      has_aux, weighted, batch_argnums, **options: as for `accumax.value_and_grad`,
        such as `microbatch_size`.

    Returns:
      A function of the arguments of `f`, with the results and errors of
      `accumax.value_and_grad`. The gradient of a module is an `nnx.State`.

    >>> import accumax.nnx
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> def loss_fn(model, x):
    ...     return jnp.mean((model(x) - 1) ** 2)
    >>> f = nnx.jit(accumax.nnx.value_and_grad(loss_fn, microbatch_size=2))
    >>> loss, grads = f(model, jnp.arange(12.0).reshape(6, 2))
    >>> print(*grads)
    bias kernel
    """
    check_function("f", f)
    places = check_places("batch_argnums", batch_argnums)
    several = isinstance(argnums, Sequence)
    states = [
        x if isinstance(x, nnx.DiffState) else nnx.DiffState(x, nnx.Param)
        for x in (argnums if several else (argnums,))
    ]
    positions = check_argnums([x.argnum for x in states])
    run = _value_and_grad.gradients(
        positions if several else positions[0],
        has_aux,
        weighted=weighted,
        batch_argnums=batch_argnums,
        **options,
    )

    @functools.wraps(f)
    def value_and_grad_fun(*args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        live = at(positions, args)
        wrt = {n: x.filter for n, x in zip(live, states, strict=True)}
        modules = Modules(args, kwargs, wrt)
        handing = modules.handing(f, has_aux, weighted)
        loss, given, state = handing.stateful(f, places)
        carried, result = run((loss,), given, state, modules.args, modules.kwargs)
        modules.write(handing, carried, True)
        return result

    return value_and_grad_fun


def _write(variables: PyTree, values: PyTree) -> None:
    nnx.update(variables, nnx.state(values))
