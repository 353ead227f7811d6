"""The backward pass of a call, into an accumulator that is there already or not."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .. import _tree
from .._devices.replicated import Axes, on_first, stacked, unstacked
from .._devices.sharded import Gather, specs_of
from .._sums import Accumulator, counts
from .._types import ArrayLike, PyTree
from .._xla.loops import reset
from .._xla.refs import add_backward
from .loss import Carrying, Loss, read_loss
from .outputs import aux_specs
from .scan import Loop, live_part
from .split import Split


class Backward(NamedTuple):
    """The backward pass of a call. The loss that comes with it is a mean if weighted.

    Attributes:
      gradient: `(model, args) -> (loss, grads, usable)`; usable, () bool: false if a
        microbatch was left out for its weight.
      add: `(model, args, sums, first) -> (loss, sums, usable)`: in place.
    """

    gradient: Callable[[PyTree, tuple], tuple[Loss, PyTree, ArrayLike]]
    add: Callable[..., tuple[Loss, PyTree, ArrayLike]]


def at_once(loss_fn: Callable[..., Any], has_aux: bool, weighted: bool) -> Backward:
    carries = isinstance(loss_fn, Carrying)

    def of(model: PyTree, args: tuple) -> Callable[[PyTree], tuple[jax.Array, Any]]:
        def fun(live: PyTree) -> tuple[jax.Array, Any]:
            here = _tree.restore(live, model)
            # What is carried comes first.
            call = (args[0], here, *args[1:]) if carries else (here, *args)
            out = loss_fn(*call)
            loss = read_loss(out, has_aux=has_aux or carries, weighted=weighted)
            taken = None if loss.weight is None else counts(loss.weight)
            return loss.value, (taken, loss._replace(value=loss.mean()))

        return fun

    def gradient(model: PyTree, args: tuple) -> tuple[Loss, PyTree, ArrayLike]:
        live = live_part(model)
        value, vjp, (_, loss) = jax.vjp(of(model, args), live, has_aux=True)
        return loss, vjp(jnp.ones_like(value))[0], True

    def add(
        model: PyTree, args: tuple, sums: PyTree, first: jax.Array
    ) -> tuple[Loss, PyTree, ArrayLike]:
        loss, sums = add_backward(of(model, args), live_part(model), sums, first)
        return loss, sums, True

    return Backward(gradient, add)


def by_microbatch(
    loop: Loop, divide: Split, accumulator: Accumulator, apart: bool
) -> Backward:
    """`apart`: what devices have is not added up here, but a first axis has it all."""
    if loop.axes is not None:
        over = _OverDevices(loop, loop.axes, loop.gather, divide, accumulator, apart)
        return over.backward()

    def gradient(model: PyTree, args: tuple) -> tuple[Loss, PyTree, ArrayLike]:
        return _run(loop, divide, model, args, loop.zeros(accumulator, model, None))

    def add(
        model: PyTree, args: tuple, sums: PyTree, first: jax.Array
    ) -> tuple[Loss, PyTree, ArrayLike]:
        return _run(loop, divide, model, args, reset(sums, first)[0])

    return Backward(gradient, add)


def _run(
    loop: Loop,
    divide: Split,
    model: PyTree,
    args: tuple,
    grads: PyTree,
    cuts: PyTree = None,
) -> tuple[Loss, PyTree, ArrayLike]:
    carried, args = (args[0], args[1:]) if loop.carries else (None, args)
    call = model, *args
    parts = divide.parts(loop.losses[0], (0,), call, {}, loop.axes)
    rows = parts.rows * (1 if loop.axes is None else loop.axes.count)
    # The call stands for what it would without microbatches: for one mean.
    averaged = loop.mean and not loop.weighted

    def seed(own: int) -> float:
        return own / rows if averaged else 1.0

    out = loop.run(
        call,
        (0,),
        parts,
        (grads,),
        seed=seed,
        counted=lambda weight: jnp.where(counts(weight), weight, 0),
        carried=carried,
        cuts=None if cuts is None else (cuts,),
    )
    (loss,) = out.losses
    if loop.carries:
        loss = loss._replace(aux=(out.carried, loss.aux))
    return loss, out.grads[0], out.accepted


@dataclasses.dataclass(frozen=True)
class _OverDevices:
    """A call whose rows are divided over devices, and then into microbatches."""

    loop: Loop
    axes: Axes
    gather: Gather | None
    divide: Split
    accumulator: Accumulator
    apart: bool

    def backward(self) -> Backward:
        return Backward(
            functools.partial(self._map, self._gradient),
            functools.partial(self._map, self._add),
        )

    def _map(
        self, fun: Callable[..., Any], model: PyTree, args: tuple, *sums: Any
    ) -> tuple[Loss, PyTree, ArrayLike]:
        loop, axes, gather = self.loop, self.axes, self.gather
        same: Any = PartitionSpec()
        cuts, models, grads = None, same, axes.rows if self.apart else same
        if gather is not None:
            cuts = gather.cuts(model, gather.specs)
            models, grads = specs_of(cuts, model), specs_of(cuts)
            if gather.automatic:
                backward = by_microbatch(
                    loop.on_one, self.divide, self.accumulator, False
                )
                run = backward.add if sums else backward.gradient
                loss, new, usable = run(model, args, *sums)
                return loss, gather.placed(new, cuts), usable
        if axes.inside:
            return fun(self.divide, cuts, model, args, *sums)
        if cuts is None:
            axes.check_whole("params", model)
        call = (model, *args[loop.carries :])
        own, (_, *rows), _ = self.divide.over(axes, loop.losses[0], call, {})
        rows = (same,) * loop.carries + tuple(rows)

        def on_device(model: PyTree, args: tuple, *sums: Any) -> Any:
            if self.apart and sums:
                sums = (unstacked(sums[0]), *sums[1:])
            loss, new, usable = fun(own, cuts, model, args, *sums)
            return loss, stacked(new) if self.apart else new, usable

        aux = aux_specs(loop.aux[0], axes)
        losses = Loss(same, same, (same, aux) if loop.carries else aux)
        specs = (models, rows, *(grads, same)[: len(sums)])
        return axes.map(on_device, (model, args, *sums), specs, (losses, grads, same))

    def _gradient(self, divide: Split, cuts: PyTree, model: PyTree, args: tuple) -> Any:
        loss, grads, usable = _run(
            self.loop,
            divide,
            model,
            args,
            self.loop.zeros(self.accumulator, model, cuts),
            cuts,
        )
        return loss, self._total(grads, cuts), usable

    def _add(
        self,
        divide: Split,
        cuts: PyTree,
        model: PyTree,
        args: tuple,
        sums: PyTree,
        first: jax.Array,
    ) -> Any:
        sums, _ = reset(sums, first)
        axes, gather = self.axes, self.gather
        if gather is not None and gather.reduce == "once":
            loss, grads, usable = self._gradient(divide, cuts, model, args)
            return loss, jax.tree.map(jnp.add, sums, grads), usable
        # What is there already is counted on one device: so no second tree is needed.
        if gather is not None:
            sums = gather.begun(sums, cuts)
        elif not self.apart:
            sums = jax.tree.map(lambda s: on_first(s, axes.names), sums)
        loss, sums, usable = _run(self.loop, divide, model, args, sums, cuts)
        return loss, self._total(sums, cuts), usable

    def _total(self, sums: PyTree, cuts: PyTree) -> PyTree:
        return sums if self.apart else self.loop.total(sums, cuts)
