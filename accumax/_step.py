"""One call of a train step: computes a gradient and adds it to the window."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from . import _tree
from ._batch.arguments import Places, parameters
from ._batch.gradient import Gradient, OpenSums, at_once
from ._batch.loss import Call, Loss, StatefulLoss
from ._batch.outputs import check_aux_wanted, check_reductions
from ._batch.scan import Loop, Outcome
from ._batch.split import Split, split
from ._devices.one import Devices
from ._devices.reduce_axis import ReduceAxis, check_reduce_axis
from ._types import ArrayLike, PyTree
from ._window.boundary import close
from ._window.checks import check_flush
from ._window.inner import OF_OPTAX
from ._window.state import AccumulateState, gradient_of
from ._window.window import Window

# Options that mean nothing without microbatches or devices.
OF_MICROBATCHES = {"batch_argnums", "rng_argnums", "aux", "unroll", "num_microbatches"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A `train_step` whose loss and window are passed at each call.

    The options are those of `train_step`. With `by_rows`, the rows of `batch_argnums`
    weigh the state of the loss, so they may be named without microbatches too.
    """

    weighted: bool
    has_aux: bool
    microbatch_size: int | None = None
    microbatches: int | None = None
    num_microbatches: ArrayLike | None = None
    batch_argnums: Places = 1
    rng_argnums: Places = ()
    aux: PyTree = "mean"
    unroll: int | bool = 1
    in_place: bool = True
    reduce_axis: ReduceAxis | None = None
    by_rows: bool = False

    def check(self, window: Window) -> Devices:
        """Checks the options, and returns the devices of a step for `window`.

        Raises:
          TypeError, ValueError: the options do not fit `window`, or each other.
        """
        _tree.check_flags(
            weighted=self.weighted, has_aux=self.has_aux, in_place=self.in_place
        )
        devices = window.devices.join(self._devices)
        check_reductions(self.aux)
        if self.divided or devices.needs_rows:
            check_aux_wanted(self.aux, self.has_aux)
            _ = self._split  # raises if the options do not fit
            return devices
        if unused := self._unused():
            raise ValueError(
                f"{', '.join(unused)}: for microbatches or devices, and there are "
                "none. Pass microbatch_size, microbatches or reduce_axis, or leave it "
                "away."
            )
        return devices

    @property
    def divided(self) -> bool:
        """Whether a call has microbatches."""
        return self.microbatch_size is not None or self.microbatches is not None

    def _unused(self) -> list[str]:
        """The options that were passed, and mean nothing without microbatches."""
        found = []
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), field.default
            # An option whose default is None may be an array.
            passed = value is not default and (default is None or value != default)
            weighs = self.by_rows and field.name == "batch_argnums"
            if field.name in OF_MICROBATCHES and passed and not weighs:
                found.append(f"{field.name}={value!r}")
        return found

    @functools.cached_property
    def _devices(self) -> Devices:
        return check_reduce_axis(self.reduce_axis)

    @functools.cached_property
    def _split(self) -> Split:
        count = self.microbatches if self.divided else 1
        return split(
            self.microbatch_size,
            count,
            self.batch_argnums,
            self.rng_argnums,
            self.unroll,
        )

    def _gradient(
        self, window: Window, devices: Devices, loss: StatefulLoss, opt_state: Any
    ) -> Callable[..., Outcome]:
        if not (self.divided or devices.needs_rows):
            return functools.partial(at_once, loss, self.weighted)
        accumulator = window.accumulator
        loop = Loop(
            losses=(loss,),
            weighted=self.weighted,
            mean=self.weighted or accumulator.reduction == "mean",
            aux=[self.aux],
            in_place=self.in_place,
        )
        measures = window.measure.wants_small(opt_state, devices)
        return Gradient(
            loop, self._split, accumulator, devices, whole=True, measures=measures
        )

    def __call__(
        self,
        window: Window,
        loss: StatefulLoss,
        given: PyTree,
        state: PyTree,
        params: PyTree,
        opt_state: Any,
        args: tuple,
        /,
        weight: ArrayLike | None = None,
        flush: ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[PyTree, AccumulateState, Loss, PyTree]:
        """Returns `(params, opt_state, loss, state)`; a weighted loss is a mean."""
        devices = self.check(window)
        window.check(opt_state, params=params)
        flush = check_flush(flush)
        if self.weighted and weight is not None:
            raise TypeError(
                f"weight={weight!r} was passed to a step made with weighted=True, "
                "whose weight is what loss_fn returns. Pass one or the other."
            )
        _check_keywords(window, loss, extra_args, 1 + len(args), weight is not None)
        gradient = self._gradient(window, devices, loss, opt_state)
        model, like = gradient_of(params), (opt_state.acc_grads,)
        _tree.check_any_float("params", model)
        limit = self.num_microbatches
        call = Call((model, *args), {}, (0,), given, state, like, limit)
        first, sums = opt_state.mini_step == 0, window.sums(opt_state)
        policy = window.accumulator.nonfinite
        if not self.in_place or policy != "propagate" or weight is not None:
            out = gradient(call)
            (grads,) = out.grads
            add = functools.partial(
                window.add_on_devices, grads=grads, summed=self.weighted
            )
        else:
            out = gradient(call, OpenSums((sums.grads,), first))
            (grads,) = out.grads
            sums, add = sums._replace(grads=grads), window.accumulator.tally
        (result,) = out.losses
        averaged = window.accumulator.averaged_args
        if "value" in averaged or window.inner.takes("value"):
            extra_args = {"value": result.value} | extra_args
        window.check(opt_state, extra_args)
        items = result.weight
        if items is None:
            items = window.weigh(weight)
            if weight is not None:
                items = devices.same("weight", items)
            if limit is not None:
                items = jnp.where(jnp.asarray(limit) > 0, items, 0)
        elif policy != "propagate":  # refuse the whole call
            items = jnp.where(out.accepted, items, 0)
        sums, accepted = add(sums, weight=items, args=extra_args, first=first)

        small = window.accumulator.part(out.part, items, self.weighted)
        progress = window.progress(opt_state, accepted & out.accepted, flush)
        params, opt_state = close(
            window, params, opt_state, sums, progress, extra_args, small
        )
        return params, opt_state, result, out.state


def _check_keywords(
    window: Window,
    loss: StatefulLoss,
    extra_args: dict[str, Any],
    count: int,
    weighs: bool,
) -> None:
    """Checks that keywords are meant for the optimizer.

    `count` is the number of arguments by position, `weighs` whether a weight came.
    """
    names, takes_any = parameters(loss.source)
    meant = extra_args.keys() & names
    if weighs and "weight" in names[count:]:  # of the loss, which would miss it
        meant |= {"weight"}
    if meant:
        raise TypeError(
            f"The keyword arguments {sorted(meant)} are named "
            "like arguments of loss_fn, but keywords go to the optimizer. Pass "
            "loss_fn's arguments by position: step(params, opt_state, batch, ...)."
        )
    window.check_names(extra_args, strict=True)
    known = window.inner.names | set(window.accumulator.averaged_args) | OF_OPTAX
    if takes_any and extra_args.keys() - known:
        raise TypeError(
            f"The keyword arguments {sorted(extra_args.keys() - known)} go to the "
            "optimizer, and loss_fn with its ** would not see them. Bind them "
            "before, with functools.partial(loss_fn, ...)."
        )
