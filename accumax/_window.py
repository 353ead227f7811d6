"""A window across calls: its state, and the steps that the forms of a call share."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from . import _numerics as numerics
from ._accumulator import Accumulator, Sums, check_weight
from ._inplace import at_most_once
from ._types import ArrayLike, PyTree, Schedule


class AccumulateState(NamedTuple):
    """State of `accumulate`: arrays only, so it can be saved, donated and sharded.

    Attributes:
      mini_step: () int32, the calls that the open window has counted; 0 if none is
        open.
      gradient_step: () int32, the updates applied so far.
      inner_opt_state: the state of the wrapped transformation.
      acc_grads: the open window's gradient sum, shaped as the parameters, accumulator
        dtype. Stale while `mini_step` is 0: the next window overwrites it.
      acc_weight: () float, the open window's sum of weights; 0 while none is open.
      acc_args: the open window's weighted sums of `averaged_args`, () float each.
      emitted: () bool, whether the latest call applied an update; see `has_updated`.
      skipped: () int32, the calls whose gradient or weight was refused so far.

    The counts stop at the largest int32 and never overflow.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: Any
    acc_grads: PyTree
    acc_weight: jax.Array
    acc_args: dict[str, jax.Array]
    emitted: jax.Array
    skipped: jax.Array


class Progress(NamedTuple):
    """Where a window stands after a call: () int32, () int32 and () bool."""

    mini_step: jax.Array
    skipped: jax.Array
    closes: jax.Array


@dataclasses.dataclass(frozen=True)
class Window:
    """What `accumulate` was asked for, and the steps that its forms are made of."""

    inner: optax.GradientTransformationExtraArgs
    every: ArrayLike | Schedule
    accumulator: Accumulator

    def init(self, params: PyTree) -> AccumulateState:
        sums = self.accumulator.init(gradient_of(params))
        inner_state = self.inner.init(numerics.differentiable(params))
        return AccumulateState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=jnp.zeros((), jnp.int32),
            inner_opt_state=jax.tree.map(numerics.strong, inner_state),
            acc_grads=sums.grads,
            acc_weight=sums.weight,
            acc_args=sums.args,
            emitted=jnp.zeros((), jnp.bool_),
            skipped=jnp.zeros((), jnp.int32),
        )

    def update(
        self,
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        weight: ArrayLike = 1.0,
        flush: ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulateState]:
        self.check(state, extra_args, grads=updates)
        if params is not None:
            self.check(state, params=params)
        flush = check_flush(flush)
        sums, progress = self.add(state, updates, weight, flush, extra_args)
        params = numerics.differentiable(params)
        grads = numerics.differentiable(updates)
        # The dtypes are those of the big batch: what `inner` gives for such gradients.
        like = self.emits(grads, state.inner_opt_state, params, extra_args | sums.args)

        def emit(operand: Any) -> Any:
            sums, inner_state, params = operand
            emitted, inner_state = self.run(sums, inner_state, params, extra_args)
            return numerics.cast_like(emitted, like), inner_state

        def hold(operand: Any) -> Any:
            return numerics.minus_zeros_like(like), operand[1]

        applies = progress.closes & (sums.weight > 0)
        operand = (sums, state.inner_opt_state, params)
        with jax.named_scope("accumax.boundary"):
            emitted, inner_state = lax.cond(applies, emit, hold, operand)
        if jax.tree.structure(emitted) == jax.tree.structure(grads):
            emitted = numerics.restore(emitted, updates)
        return emitted, self.next(state, sums, inner_state, progress, applies)

    def add(
        self,
        state: AccumulateState,
        grads: PyTree,
        weight: ArrayLike,
        flush: ArrayLike,
        extra_args: dict[str, Any],
    ) -> tuple[Sums, Progress]:
        """One gradient into the window, whether it closes then or not."""
        weight = check_weight(weight)
        sums, accepted = self.accumulator.add(
            self.sums(state),
            numerics.differentiable(grads),
            weight,
            extra_args,
            first=state.mini_step == 0,
        )
        return sums, self.progress(state, accepted, flush)

    def sums(self, state: AccumulateState) -> Sums:
        return Sums(state.acc_grads, state.acc_weight, state.acc_args)

    def progress(
        self, state: AccumulateState, accepted: jax.Array, flush: ArrayLike
    ) -> Progress:
        counts = accepted if self.accumulator.nonfinite == "skip" else True
        increment = optax.safe_increment
        mini_step = jnp.where(counts, increment(state.mini_step), state.mini_step)
        skipped = jnp.where(accepted, state.skipped, increment(state.skipped))
        every = self.every
        if callable(every):
            every = check_length(every(state.gradient_step))
        # "not below" and not "equal": a window longer than a new, smaller `every`
        # closes, and so does one whose schedule gave a NaN.
        closes = jnp.logical_or(flush, ~(mini_step < every))
        return Progress(mini_step, skipped, closes)

    def run(
        self, sums: Sums, inner_state: Any, params: PyTree, extra_args: dict[str, Any]
    ) -> tuple[PyTree, Any]:
        """`inner` on the reduced gradient. Its state keeps its dtypes."""
        mean, means = self.accumulator.result(sums)
        extra_args = extra_args | means
        updates, new_state = self.inner.update(mean, inner_state, params, **extra_args)
        return updates, numerics.cast_like(new_state, inner_state)

    def emits(
        self,
        grads: PyTree,
        inner_state: Any,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> PyTree:
        """Shapes and dtypes of what `inner` gives for gradients like `grads`."""

        def updates(grads: PyTree, inner_state: Any, params: PyTree) -> Any:
            return self.inner.update(grads, inner_state, params, **extra_args)

        got, cause = jax.tree.structure(inner_state), None
        try:
            updates, new_state = jax.eval_shape(updates, grads, inner_state, params)
            gave = jax.tree.structure(new_state)
            if gave == got:
                return updates
        except Exception as error:
            gave, cause = None, error
        like = grads if params is None else params
        want = jax.tree.structure(jax.eval_shape(self.inner.init, like))
        if want != got:
            raise TypeError(
                f"state.inner_opt_state is not a state of the inner transformation: it "
                f"is {got}, where {want} was expected. Pass what init of this "
                "accumulate gave, or its last update."
            ) from cause
        if cause is not None:
            raise cause
        raise TypeError(
            f"The inner transformation changes the structure of its own state, from "
            f"{got} to {gave}, which no branch or loop of JAX can do. Put it around "
            "the accumulate, or give its init what its update needs."
        )

    def takes(self, name: str) -> bool:
        """Whether `inner` can be passed an extra argument of this name."""
        found = inspect.signature(self.inner.update).parameters
        kinds = [p.kind for p in found.values()]
        return name in found or inspect.Parameter.VAR_KEYWORD in kinds

    def flush(
        self, params: PyTree, state: Any, extra_args: dict[str, Any]
    ) -> tuple[PyTree, AccumulateState]:
        self.check(state, params=params)
        # Between windows the sums are stale, so they have no weight.
        opened = state.mini_step > 0
        sums = self.sums(state)
        sums = sums._replace(weight=jnp.where(opened, sums.weight, 0))
        progress = Progress(state.mini_step, state.skipped, jnp.bool_(True))
        return self.close(params, state, sums, progress, extra_args)

    def close(
        self,
        params: PyTree,
        state: AccumulateState,
        sums: Sums,
        progress: Progress,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, AccumulateState]:
        """The boundary in place: touches nothing unless the window closes."""
        live = jax.tree.map(numerics.strong, numerics.differentiable(params))
        grads = jax.tree.map(
            lambda a, p: jax.ShapeDtypeStruct(a.shape, p.dtype),
            sums.grads,
            gradient_of(live),
        )
        like = self.emits(grads, state.inner_opt_state, live, extra_args | sums.args)

        def apply(carry: Any) -> Any:
            params, inner_state = carry
            updates, inner_state = self.run(sums, inner_state, params, extra_args)
            updates = numerics.cast_like(updates, like)
            return optax.apply_updates(params, updates), inner_state

        applies = progress.closes & (sums.weight > 0)
        with jax.named_scope("accumax.boundary"):
            live, inner_state = at_most_once(
                applies, apply, (live, state.inner_opt_state)
            )
        new_state = self.next(state, sums, inner_state, progress, applies)
        return numerics.restore(live, params), new_state

    def next(
        self,
        state: AccumulateState,
        sums: Sums,
        inner_state: Any,
        progress: Progress,
        applies: jax.Array,
    ) -> AccumulateState:
        step = state.gradient_step
        return AccumulateState(
            mini_step=jnp.where(progress.closes, 0, progress.mini_step),
            gradient_step=jnp.where(applies, optax.safe_increment(step), step),
            inner_opt_state=inner_state,
            acc_grads=sums.grads,  # not reset: the next window overwrites it
            acc_weight=jnp.where(progress.closes, 0, sums.weight),
            acc_args=sums.args,
            emitted=applies,
            skipped=progress.skipped,
        )

    def check(
        self, state: Any, extra_args: dict[str, Any] | None = None, **trees: PyTree
    ) -> None:
        """Checks the static facts of a call, before anything is computed.

        `trees` are the parameters or gradients, by the name for an error message.
        """
        if not is_state(state):
            raise TypeError(
                f"state is a {type(state).__name__}, not an AccumulateState. Pass what "
                "init of this accumulate returned, or its last update."
            )
        for name, tree in trees.items():
            tree = gradient_of(tree)
            numerics.check_like(name, tree, state.acc_grads, "state.acc_grads")
        names = self.accumulator.averaged_args
        if set(names) != set(state.acc_args):
            raise TypeError(
                f"state.acc_args holds {sorted(state.acc_args)}, but this accumulate "
                f"has averaged_args={names}. Pass a state that its init gave, or the "
                "averaged_args that the state was made with."
            )
        if extra_args is not None:
            for name in names:
                _check_averaged(name, extra_args)


def window_of(tx: Any, name: str) -> Window:
    """The window behind an `accumulate`, for the forms that fuse it."""
    if not is_accumulate(tx):
        raise TypeError(
            f"accumax.{name} needs a tx made by accumax.accumulate, and it must be "
            f"outermost; got a {type(tx).__name__}. Write accumulate(optax.chain(a, "
            "b), every) for optax.chain(a, accumulate(b, every)), or use tx.update and "
            "optax.apply_updates."
        )
    return tx.update.__self__


def is_accumulate(tx: Any) -> bool:
    window = getattr(getattr(tx, "update", None), "__self__", None)
    return isinstance(window, Window)


def check_flush(flush: Any) -> ArrayLike:
    if numerics.dtype_of(flush) != jnp.bool_ or jnp.shape(flush) != ():
        raise TypeError(
            f"flush is {numerics.describe(flush)}; expected a scalar bool: whether to "
            "close the window with this call."
        )
    return flush


def is_state(x: Any) -> bool:
    return isinstance(x, AccumulateState)


def accepted(before: AccumulateState, after: AccumulateState) -> jax.Array:
    """() bool: whether the call between them was not refused."""
    return before.skipped == after.skipped


def gradient_of(params: PyTree) -> PyTree:
    """The part of `params` that gradients are shaped like."""
    # `optax.lookahead` alone takes gradients of a part, the fast parameters.
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def check_length(length: Any) -> ArrayLike:
    dtype = numerics.dtype_of(length)
    if (
        dtype is None
        or jnp.shape(length) != ()
        or not (
            jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
        )
    ):
        raise TypeError(
            f"every gives {numerics.describe(length)} for a window's length; expected "
            "a scalar integer of at least 1."
        )
    return length


def _check_averaged(name: str, extra_args: dict[str, Any]) -> None:
    if name not in extra_args:
        raise TypeError(
            f'averaged_args has "{name}", which this call does not pass (it passes '
            f"{sorted(extra_args) or 'no extra arguments'}). Pass {name}=... in every "
            "call."
        )
    value = extra_args[name]
    dtype = numerics.dtype_of(value)
    if (
        dtype is None
        or jnp.shape(value) != ()
        or jnp.issubdtype(dtype, jnp.complexfloating)
    ):
        raise TypeError(
            f'averaged_args has "{name}", which is {numerics.describe(value)}; '
            "expected a real scalar."
        )
