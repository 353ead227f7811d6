"""Flax Linen: a train state that accumulates. Needs the extra `accumax[flax]`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax.numpy as jnp
import optax
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from . import _tree
from ._accumulate import accumulating, flush
from ._batch.arguments import Places, check_names, check_no_key, check_places
from ._flax import statistics as running
from ._flax.average import ema as ema
from ._flax.fields import STATISTICS, Fields, frozen_as
from ._step import Step
from ._train_step import apply_gradients
from ._types import ArrayLike, PyTree, Schedule
from ._window.boundary import window_of
from ._window.state import AccumulateState, accepted


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` with windows of several calls.

    Subclass it to add fields, as with Flax's own. A field `batch_stats` is pooled: it
    stays the same within a window, and has one update when the window closes, with the
    mean and the variance of all rows of the window. (A layer still normalises with the
    rows of its microbatch.) Other leaves of `batch_stats` than running means and
    variances are averaged; integers keep their latest value.

    Attributes:
      step: () int32, the gradient steps so far, as schedules count them. A random key
        that is folded with `step` repeats within a window; use `microstep` for it.
      apply_fn, params, tx, opt_state: as in Flax; `tx` is an `accumulate`.
      microstep: () int32, the calls so far.
      pool: the open window's running statistics, None without `batch_stats`.
      momentum: the momentum of each running mean and variance. Static.

    >>> import accumax.linen, jax, optax
    >>> import flax.linen as nn
    >>> import jax.numpy as jnp
    >>> model, x = nn.Dense(1), jnp.ones((4, 2))
    >>> state = accumax.linen.TrainState.create(
    ...     apply_fn=model.apply,
    ...     params=model.init(jax.random.key(0), x)["params"],
    ...     tx=optax.adam(1e-3),
    ...     every=2,  # the line that changes
    ... )
    >>> def loss_fn(params):
    ...     return jnp.mean(state.apply_fn({"params": params}, x) ** 2)
    >>> for _ in range(4):
    ...     state = state.apply_gradients(grads=jax.grad(loss_fn)(state.params))
    >>> print(state.step, state.microstep)
    2 4
    """

    microstep: Any = struct.field(default=None, kw_only=True)
    pool: Any = struct.field(default=None, kw_only=True)
    momentum: tuple[float, ...] = struct.field(
        default=(), kw_only=True, pytree_node=False
    )

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: PyTree,
        tx: optax.GradientTransformation,
        every: int | Schedule | None = None,
        momentum: float | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes a state at step 0.

        Args:
          apply_fn: usually `model.apply`. Static.
          params: the parameters.
          tx: an optimizer, for an `accumax.accumulate` of `every`. Or an `accumulate`,
            outermost, without `every`.
          every: the calls in a window, or a schedule for it; see `accumax.accumulate`.
          momentum: the momentum of each `BatchNorm` that has a running mean and
            variance in `batch_stats`. One number for all, or a mapping from the names
            in `batch_stats` to momenta or further mappings. Static.
          **kwargs: the fields of a subclass.

        Raises:
          TypeError: `tx` is not an `accumulate`, and `every` is missing.
          ValueError: `tx` is an `accumulate`, and `every` is passed too; or
            `batch_stats` needs a momentum and has none.
        """
        tx = accumulating(tx, every, "linen.TrainState")
        pool, momenta = None, ()
        if STATISTICS in kwargs:
            momenta = running.check_momenta(
                kwargs[STATISTICS],
                functools.partial(running.lookup, momentum),
                f"{STATISTICS}, which came with {momentum=},",
                'Pass momentum=..., for several layers {"name": momentum, ...}',
            )
            pool = running.begin(kwargs[STATISTICS])
        elif momentum is not None:
            raise ValueError(
                f"{momentum=} is for running statistics, and there are none. Pass "
                f"{STATISTICS}=..., with a subclass that has this field."
            )
        return cls(
            step=jnp.zeros((), jnp.int32),
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            opt_state=tx.init(_optimized(params)),
            microstep=jnp.zeros((), jnp.int32),
            pool=pool,
            momentum=momenta,
            **kwargs,
        )

    def apply_gradients(
        self,
        *,
        grads: PyTree,
        weight: ArrayLike | None = None,
        flush: ArrayLike = False,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Adds a gradient in place, by `accumax.apply_gradients`; returns a new state.

        Args:
          grads: the gradient of one microbatch, shaped as `params`.
          weight: () float, the items (examples, tokens) that `grads` stands for. It
            weighs `batch_stats` too. 1 by default.
          flush: () bool, close the window with this call.
          extra_args: the optimizer's extra arguments, such as `{"value": loss}`.
          **kwargs: fields to replace, as in Flax; `batch_stats` is pooled.

        Raises:
          TypeError, ValueError: as `accumax.apply_gradients`; or `batch_stats` does not
            fit.
        """
        overwritten = {}
        if isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads:
            # Flax's fp8: these "gradients" are new values, in each call.
            overwritten[OVERWRITE_WITH_GRADIENT] = grads[OVERWRITE_WITH_GRADIENT]
            grads = grads["params"]
        statistics = _checked(self, kwargs.pop(STATISTICS, None))
        params, opt_state = apply_gradients(
            self.tx,
            _optimized(self.params),
            self.opt_state,
            grads,
            weight=weight,
            flush=flush,
            **(extra_args or {}),
        )
        return _after(
            self,
            params,
            opt_state,
            statistics,
            1.0 if weight is None else weight,
            called=True,
            overwritten=overwritten,
            **kwargs,
        )

    def flush(self, **extra_args: Any) -> Self:
        """Closes an open window, as `accumax.flush` does; returns the new state."""
        _checked(self, None)
        params, opt_state = flush(
            self.tx, _optimized(self.params), self.opt_state, **extra_args
        )
        return _after(self, params, opt_state, None, 0.0, called=False)

    @classmethod
    def train_step(
        cls,
        loss_fn: Callable[..., Any],
        *,
        fields: tuple[str, ...] = (),
        mutable: tuple[str, ...] = (),
        rngs: tuple[str, ...] = (),
        has_aux: bool = False,
        weighted: bool = False,
        batch_argnums: Places = 1,
        **options: Any,
    ) -> Callable[..., tuple[Self, Any]]:
        """`accumax.train_step` for a state: no gradient tree.

        Args:
          loss_fn: `(params, *args, **fields) -> loss`.
          fields: the names of the state's fields that `loss_fn` takes as keyword
            arguments. Static, as are all arguments below.
          mutable: the same for fields that `loss_fn` also changes. It returns `(loss,
            new)`, with aux `(loss, (new, aux))`, where `new` is a mapping with exactly
            these names, as Flax's `apply` returns it. `batch_stats` is pooled, in a
            window and in a call. Other fields go from microbatch to microbatch, and
            from call to call.
          rngs: the same for fields that are PRNG keys, or trees of keys. The fields do
            not change. Each call and microbatch gets different keys, by
            `jax.random.fold_in` with `microstep` and with the microbatch's index.
          has_aux, weighted: as for `accumax.train_step`.
          batch_argnums: as for `accumax.train_step`. Without microbatches too, the rows
            of these arguments weigh a mutable `batch_stats`.
          **options: as for `accumax.train_step`, such as `microbatch_size`. With
            `reduce_axis`, statistics are over all devices' rows, keys differ by
            device, and other mutable fields have the values of the last device.

        Returns:
          `step(state, *args, **extra_args) -> (state, loss)`, or `(state, (loss,
          aux))`. Jit it with `donate_argnums=0`. `extra_args` as for
          `accumax.train_step`: `weight`, `flush`, and those of the optimizer.

        Raises:
          TypeError, ValueError: as `accumax.train_step`; or the state lacks a named
            field, or `loss_fn` does not return the mutable fields.

        >>> import accumax.linen, jax, optax
        >>> import flax.linen as nn
        >>> import jax.numpy as jnp
        >>> class TrainState(accumax.linen.TrainState):
        ...     batch_stats: dict
        >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(False, momentum=0.9)])
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> state = TrainState.create(
        ...     apply_fn=model.apply,
        ...     tx=optax.sgd(0.1),
        ...     every=2,
        ...     momentum=0.9,
        ...     **model.init(jax.random.key(0), x),
        ... )
        >>> def loss_fn(params, x, batch_stats):
        ...     variables = {"params": params, "batch_stats": batch_stats}
        ...     y, new = model.apply(variables, x, mutable=["batch_stats"])
        ...     return jnp.mean((y - 1) ** 2), new
        >>> step = TrainState.train_step(loss_fn, mutable=("batch_stats",))
        >>> step = jax.jit(step, donate_argnums=0)
        >>> for i in range(2):
        ...     state, loss = step(state, x[2 * i : 2 * i + 2])
        >>> print(state.step, state.microstep)
        1 2
        """
        if not callable(loss_fn):
            raise TypeError(f"{loss_fn=} must be a function (params, *args) -> loss.")
        read, kept, keys = check_names(fields=fields, mutable=mutable, rngs=rngs)
        pooled = STATISTICS in kept
        places = check_places("batch_argnums", batch_argnums)
        run_step = Step(
            has_aux=has_aux,
            weighted=weighted,
            batch_argnums=batch_argnums,
            by_rows=True,
            **options,
        )
        handed = Fields(read, kept, keys, has_aux, weighted, run_step.divided)

        def step(state: Any, *args: Any, **extra_args: Any) -> tuple[Self, Any]:
            _check_fields(state, (*read, *kept, *keys))
            for name in read if run_step.divided else ():
                check_no_key(name, getattr(state, name))
            if _has_overwritten(state.params):
                raise TypeError(
                    f"state.params has {OVERWRITE_WITH_GRADIENT!r}, whose gradients "
                    "are new values and not to be added up. Use apply_gradients."
                )
            statistics = _checked(state, getattr(state, STATISTICS) if pooled else None)
            handing = handed.handing(state, statistics, loss_fn)
            params, opt_state, loss, carried = run_step(
                window_of(state.tx, "train_step"),
                *handing.stateful(loss_fn, places),
                state.params,
                state.opt_state,
                args,
                **extra_args,
            )
            momenta = state.momentum if pooled else ()
            statistics, (new, _), rows = handing.settle(
                carried, momenta, accepted(state.opt_state, opt_state)
            )
            state = _after(
                state,
                params,
                opt_state,
                statistics if pooled else None,
                rows,
                called=True,
                **new,
            )
            return state, ((loss.value, loss.aux) if has_aux else loss.value)

        return step


def _checked(state: TrainState, statistics: PyTree) -> PyTree:
    """Checks `statistics`, and returns them frozen or not, as in the state."""
    if state.microstep is None:
        name = type(state).__name__
        raise TypeError(f"This {name} was not made by {name}.create(...): make it.")
    if statistics is None:
        return None
    if state.pool is None:
        raise ValueError(
            f"This state pools no {STATISTICS}. Pass {STATISTICS}=... and "
            "momentum=... to TrainState.create."
        )
    own = getattr(state, STATISTICS)
    statistics = frozen_as(statistics, own)
    _tree.check_same(STATISTICS, statistics, own)
    return statistics


def _after(
    state: Any,
    params: PyTree,
    opt_state: AccumulateState,
    statistics: PyTree,
    rows: ArrayLike,
    *,
    called: bool,
    overwritten: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Returns the state after a call or a flush; `params` is the optimized part."""
    if _has_overwritten(state.params):
        params = {**state.params, "params": params, **(overwritten or {})}
    if state.pool is not None:
        kwargs["pool"], kwargs[STATISTICS] = running.after_call(
            state.pool,
            getattr(state, STATISTICS),
            state.momentum,
            (statistics, rows),
            before=state.opt_state,
            after=opt_state,
        )
    count = optax.safe_increment
    return state.replace(
        step=jnp.where(opt_state.emitted, count(state.step), state.step),
        microstep=count(state.microstep) if called else state.microstep,
        params=params,
        opt_state=opt_state,
        **kwargs,
    )


def _check_fields(state: Any, names: tuple[str, ...]) -> None:
    got = type(state).__name__
    if not isinstance(state, TrainState):
        raise TypeError(f"The step got a {got}; expected an accumax.linen.TrainState")
    for name in names:
        if name in TrainState.__dataclass_fields__ or not hasattr(state, name):
            raise ValueError(
                f"{name!r} is not a field that a subclass added to the state, a {got}. "
                f"Add it: `class State(accumax.linen."
                f"TrainState): {name}: Any`."
            )


def _has_overwritten(params: PyTree) -> bool:
    return isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params


def _optimized(params: PyTree) -> PyTree:
    return params["params"] if _has_overwritten(params) else params
