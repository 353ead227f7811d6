"""A window across calls: the steps that `update`, `train_step` and others share."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _tree
from .._devices.one import Devices
from .._sums import Accumulator, Sums, check_weight
from .._types import ArrayLike, PyTree, Schedule
from .._xla.varying import zeros
from .checks import check_averaged, check_length, check_state
from .inner import Inner
from .measure import Measure
from .state import AccumulateState, Progress, gradient_of


@dataclasses.dataclass(frozen=True)
class Window:
    """The options of an `accumulate`, and the steps of a call."""

    inner: Inner
    every: ArrayLike | Schedule
    accumulator: Accumulator
    devices: Devices  # where the sums of an open window are
    measure: Measure

    def init(self, params: PyTree) -> AccumulateState:
        _tree.check_parameters("params", params)
        live = _tree.differentiable(params)
        sums = self.accumulator.init({})
        inner_state = self.devices.init_optimizer(self.inner.init, live)
        grads = self.inner.without_unused(gradient_of(live), inner_state, live)
        return AccumulateState(
            mini_step=jnp.zeros((), jnp.int32),
            gradient_step=jnp.zeros((), jnp.int32),
            inner_opt_state=jax.tree.map(_tree.strong, inner_state),
            acc_grads=self.devices.init(
                lambda grads: self.accumulator.init(grads).grads, grads
            ),
            acc_weight=sums.weight,
            acc_args=sums.args | self.measure.init(),
            emitted=jnp.zeros((), jnp.bool_),
            skipped=jnp.zeros((), jnp.int32),
        )

    def add(
        self,
        state: AccumulateState,
        grads: PyTree,
        weight: ArrayLike | None,
        flush: ArrayLike,
        extra_args: dict[str, Any],
    ) -> tuple[Sums, Progress]:
        """Adds one gradient to the window, and decides whether the window closes."""
        weight = self.weigh(weight)
        before = self.sums(state)
        grads = _tree.trained(grads, before.grads)
        self.devices.check_inside()
        self.devices.check_unreduced("grads", grads)
        sums, accepted = self.add_on_devices(
            before,
            self.devices.stack(grads),
            weight,
            extra_args,
            first=state.mini_step == 0,
            sum_over=self.devices.sum,
        )
        return sums, self.progress(state, accepted, flush)

    def weigh(self, weight: ArrayLike | None) -> jax.Array:
        """Returns the weight of a call, () float; 1 if none was passed."""
        if weight is None and self.accumulator.reduction == "mean_of_sums":
            raise TypeError(
                'reduction="mean_of_sums" divides by the items that were summed, and '
                "this call does not say how many. Pass weight=..., or let the loss "
                "return it: train_step(..., weighted=True)."
            )
        return check_weight(1.0 if weight is None else weight)

    def seen(self, state: AccumulateState, params: PyTree) -> PyTree:
        """The part of `params` that `inner` sees."""
        if params is None or isinstance(params, optax.LookaheadParams):
            return _tree.differentiable(params)
        return _tree.seen(params, state.acc_grads)

    def sums(self, state: AccumulateState) -> Sums:
        """Returns the sums of the open window, in the layout of the state."""
        args = {name: state.acc_args[name] for name in self.accumulator.averaged_args}
        return Sums(state.acc_grads, state.acc_weight, args)

    def add_on_devices(
        self,
        sums: Sums,
        grads: PyTree,
        weight: ArrayLike,
        args: dict[str, Any],
        *,
        first: jax.Array,
        **options: Any,
    ) -> tuple[Sums, jax.Array]:
        """Runs `Accumulator.add` on each device, with the gradients of that device.

        `grads` has the layout of `sums`. `options` are those of `Accumulator.add`.
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
        advances = accepted if self.accumulator.nonfinite == "skip" else True
        increment = optax.safe_increment
        mini_step = jnp.where(advances, increment(state.mini_step), state.mini_step)
        skipped = jnp.where(accepted, state.skipped, increment(state.skipped))
        every = self.every
        if callable(every):
            every = check_length(every(state.gradient_step))
        # "not below" instead of "equal" closes a window that is longer than a new,
        # smaller `every`, and a window whose schedule gave a NaN.
        closes = jnp.logical_or(flush, ~(mini_step < every))
        return Progress(mini_step, skipped, closes)

    def run(
        self,
        grads: PyTree,
        like: PyTree,
        inner_state: Any,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, Any]:
        """Runs `inner` on the reduced gradient. Its state keeps its dtypes.

        `like` has the shapes of all gradients: zeros stand for those without a sum.
        """
        grads = _tree.fill(grads, like, zeros)
        return self.inner.updated(grads, inner_state, params, extra_args)

    def check_names(self, extra_args: dict[str, Any], strict: bool = False) -> None:
        """Runs `Inner.check_names` for a call of this accumulate."""
        self.inner.check_names(extra_args, self.accumulator.averaged_args, strict)

    def next(
        self,
        state: AccumulateState,
        sums: Sums,
        inner_state: Any,
        progress: Progress,
        applies: jax.Array,
        measures: dict[str, Any],
    ) -> AccumulateState:
        step = state.gradient_step
        # A window whose weights are too large to divide by is lost and counted.
        lost = progress.closes & ~applies & (sums.weight > 0)
        skipped = progress.skipped
        means = self.accumulator.means(sums)
        return AccumulateState(
            mini_step=jnp.where(progress.closes, 0, progress.mini_step),
            gradient_step=jnp.where(applies, optax.safe_increment(step), step),
            inner_opt_state=inner_state,
            acc_grads=sums.grads,  # not reset: the next window overwrites it
            acc_weight=jnp.where(progress.closes, 0, sums.weight),
            acc_args={
                name: jnp.where(progress.closes, means[name], value)
                for name, value in sums.args.items()
            }
            | measures,
            emitted=applies,
            skipped=jnp.where(lost, optax.safe_increment(skipped), skipped),
        )

    def check(
        self, state: Any, extra_args: dict[str, Any] | None = None, **trees: PyTree
    ) -> None:
        """Checks the static facts of a call, before anything is computed.

        `trees` are parameters or gradients, by their names for an error message.
        """
        names = self.accumulator.averaged_args
        check_state(state, names, self.measure.names)
        like = self.devices.shapes("state.acc_grads", state.acc_grads) if trees else ()
        for name, tree in trees.items():
            _tree.check_like(name, gradient_of(tree), like, "state.acc_grads")
        if extra_args is not None:
            for name in names:
                check_averaged(name, extra_args)
