"""A window across calls: the steps that the forms of a call share."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from .. import _tree
from .._devices.one import Devices
from .._sums import Accumulator, Sums, check_weight, divides
from .._types import ArrayLike, PyTree, Schedule
from .checks import check_averaged, check_flush, check_length
from .inner import Inner
from .state import AccumulateState, Progress, gradient_of, is_state


@dataclasses.dataclass(frozen=True)
class Window:
    """What `accumulate` was asked for, and the steps that its forms are made of."""

    inner: Inner
    every: ArrayLike | Schedule
    accumulator: Accumulator
    devices: Devices  # which of them have the sums of an open window

    def init(self, params: PyTree) -> AccumulateState:
        _tree.check_parameters("params", params)
        grads = gradient_of(params)
        sums = self.accumulator.init({})
        inner_state = self.inner.init(_tree.differentiable(params))
        return AccumulateState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=jnp.zeros((), jnp.int32),
            inner_opt_state=jax.tree.map(_tree.strong, inner_state),
            acc_grads=self.devices.init(
                lambda grads: self.accumulator.init(grads).grads, grads
            ),
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
        weight: ArrayLike | None = None,
        flush: ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulateState]:
        self.check_names(extra_args)
        self.check(state, extra_args, grads=updates)
        if params is not None:
            self.check(state, params=params)
        flush = check_flush(flush)
        sums, progress = self.add(state, updates, weight, flush, extra_args)
        params = self.trained(state, params)
        grads = _tree.trained(updates, sums.grads)
        like = self.devices.as_replicated(grads)  # as `inner` sees it
        # The dtypes are those of the big batch: what `inner` gives for such gradients.
        like = self.inner.emits(
            like, state.inner_opt_state, params, extra_args | sums.args
        )

        def emit(operand: Any) -> Any:
            sums, inner_state, params = operand
            sums = sums._replace(grads=self.devices.total(sums.grads))
            emitted, inner_state = self.run(sums, inner_state, params, extra_args)
            return _tree.cast_like(emitted, like), inner_state

        def hold(operand: Any) -> Any:
            return _tree.minus_zeros_like(like), operand[1]

        applies = progress.closes & divides(sums.weight)
        operand = (sums, state.inner_opt_state, params)
        with jax.named_scope("accumax.boundary"):
            emitted, inner_state = lax.cond(applies, emit, hold, operand)
        if jax.tree.structure(emitted) == jax.tree.structure(grads):
            emitted = _tree.restore(emitted, updates)
        return emitted, self.next(state, sums, inner_state, progress, applies)

    def add(
        self,
        state: AccumulateState,
        grads: PyTree,
        weight: ArrayLike | None,
        flush: ArrayLike,
        extra_args: dict[str, Any],
    ) -> tuple[Sums, Progress]:
        """One gradient into the window, whether it closes then or not."""
        weight = self.weigh(weight)
        before = self.sums(state)
        grads = _tree.trained(grads, before.grads)
        self.devices.check_inside()
        self.devices.check_own("grads", grads)
        sums, accepted = self.add_own(
            before,
            self.devices.stack(grads),
            weight,
            extra_args,
            first=state.mini_step == 0,
            total=self.devices.sum,
        )
        return sums, self.progress(state, accepted, flush)

    def weigh(self, weight: ArrayLike | None) -> jax.Array:
        """The weight of a call, () float; 1 if none was passed."""
        if weight is None and self.accumulator.reduction == "mean_of_sums":
            raise TypeError(
                'reduction="mean_of_sums" divides by the items that were summed, and '
                "this call does not say how many. Pass weight=..., or let the loss "
                "return it: train_step(..., weighted=True)."
            )
        return check_weight(1.0 if weight is None else weight)

    def trained(self, state: AccumulateState, params: PyTree) -> PyTree:
        """The part of `params` that the window has sums for."""
        if params is None or isinstance(params, optax.LookaheadParams):
            return _tree.differentiable(params)
        return _tree.trained(params, state.acc_grads)

    def sums(self, state: AccumulateState) -> Sums:
        """The open window's, as they are in the state."""
        return Sums(state.acc_grads, state.acc_weight, state.acc_args)

    def add_own(
        self,
        sums: Sums,
        grads: PyTree,
        weight: ArrayLike,
        args: dict[str, Any],
        *,
        first: jax.Array,
        **options: Any,
    ) -> tuple[Sums, jax.Array]:
        """`Accumulator.add` on each device, of its own gradients, as `sums` has them.

        `options`: those of `Accumulator.add`.
        """
        add = functools.partial(self.accumulator.add, agree=self.devices.all, **options)

        def on_device(own: PyTree, grads: PyTree, *same: Any) -> tuple[PyTree, Any]:
            weight, args, first, weights = same
            before = weights._replace(grads=own)
            after, accepted = add(before, grads, weight, args, first=first)
            return after.grads, (after._replace(grads=()), accepted)

        args = {name: args[name] for name in self.accumulator.averaged_args}
        same = jnp.asarray(weight), args, first, sums._replace(grads=())
        own = sums.grads, grads
        new, (weights, accepted) = self.devices.on_each(on_device, own, same)
        return weights._replace(grads=new), accepted

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
        return updates, _tree.cast_like(new_state, inner_state)

    def check_names(self, extra_args: dict[str, Any], strict: bool = False) -> None:
        """`Inner.check_names` for a call of this accumulate."""
        self.inner.check_names(extra_args, self.accumulator.averaged_args, strict)

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
        live = jax.tree.map(_tree.strong, self.trained(state, params))
        grads = jax.tree.map(
            lambda _, p: jax.ShapeDtypeStruct(p.shape, p.dtype),
            sums.grads,
            gradient_of(live),
        )
        averaged = self.accumulator.averaged_args
        self.inner.check_used(grads, state.inner_opt_state, live, extra_args, averaged)
        like = self.inner.emits(
            grads, state.inner_opt_state, live, extra_args | sums.args
        )

        def apply(carry: Any, grads: PyTree) -> Any:
            params, inner_state = carry
            total = sums._replace(grads=grads)
            updates, inner_state = self.run(total, inner_state, params, extra_args)
            updates = _tree.cast_like(updates, like)
            return optax.apply_updates(params, updates), inner_state

        applies = progress.closes & divides(sums.weight)
        carry = live, state.inner_opt_state
        with jax.named_scope("accumax.boundary"):
            (live, inner_state), grads = self.devices.boundary(
                applies, apply, carry, sums.grads
            )
        sums = sums._replace(grads=grads)
        new_state = self.next(state, sums, inner_state, progress, applies)
        return _tree.restore(live, params), new_state

    def next(
        self,
        state: AccumulateState,
        sums: Sums,
        inner_state: Any,
        progress: Progress,
        applies: jax.Array,
    ) -> AccumulateState:
        step = state.gradient_step
        # A window whose weights are too many to divide by is lost, and counted.
        lost = progress.closes & ~applies & (sums.weight > 0)
        skipped = progress.skipped
        return AccumulateState(
            mini_step=jnp.where(progress.closes, 0, progress.mini_step),
            gradient_step=jnp.where(applies, optax.safe_increment(step), step),
            inner_opt_state=inner_state,
            acc_grads=sums.grads,  # not reset: the next window overwrites it
            acc_weight=jnp.where(progress.closes, 0, sums.weight),
            acc_args=sums.args,
            emitted=applies,
            skipped=jnp.where(lost, optax.safe_increment(skipped), skipped),
        )

    def check(
        self, state: Any, extra_args: dict[str, Any] | None = None, **trees: PyTree
    ) -> None:
        """Checks the static facts of a call, before anything is computed.

        `trees` are the parameters or gradients, by the name for an error message.
        """
        if not is_state(state):
            hint = "Pass what init of this accumulate returned, or its last update."
            if isinstance(state, optax.MultiStepsState):
                hint = (
                    "docs/coming_from.md has the lines that turn a MultiStepsState "
                    "into an AccumulateState."
                )
            raise TypeError(
                f"state is a {type(state).__name__}, not an AccumulateState. {hint}"
            )
        like = state.acc_grads
        if trees:
            like = self.devices.shapes("state.acc_grads", like)
        for name, tree in trees.items():
            tree = gradient_of(tree)
            _tree.check_like(name, tree, like, "state.acc_grads")
        names = self.accumulator.averaged_args
        if set(names) != set(state.acc_args):
            raise TypeError(
                f"state.acc_args holds {sorted(state.acc_args)}, but this accumulate "
                f"has averaged_args={names}. Pass a state that its init gave, or the "
                "averaged_args that the state was made with."
            )
        if extra_args is not None:
            for name in names:
                check_averaged(name, extra_args)


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
