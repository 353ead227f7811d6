"""The gradient of one call: split, scan over microbatches, sum over devices."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._devices.replicated import Axes, on_first, stacked, unstacked
from .._devices.sharded import Gather, specs_of
from .._sums import Accumulator, counts
from .._types import PyTree
from .._xla.loops import reset
from .._xla.refs import add_backward
from .loss import Call, Loss, StatefulLoss, with_live
from .outputs import aux_specs
from .scan import Loop, Outcome
from .split import Split


class Begun(NamedTuple):
    """Sums to add a gradient to, in place.

    Attributes:
      sums: a tree for each argument that is differentiated.
      first: () bool, a window opens: what they hold is not to be read.
    """

    sums: tuple[PyTree, ...]
    first: jax.Array


def at_once(loss: StatefulLoss, call: Call, begun: Begun | None = None) -> Outcome:
    """The gradient of a call that is not divided, for its one argument.

    Without sums that have begun it is a tree of its own, of the parameters' dtypes.
    """
    (n,), (live,) = call.argnums, call.live

    def fun(live: PyTree) -> tuple[jax.Array, Any]:
        args = with_live(call.args, {n: live})
        out, state = loss.run(call.given, call.state, args, call.kwargs)
        taken = None if out.weight is None else counts(out.weight)
        return out.value, (taken, (out._replace(value=out.mean()), state))

    if begun is None:
        value, vjp, (_, (out, state)) = jax.vjp(fun, live, has_aux=True)
        grads = vjp(jnp.ones_like(value))[0]
    else:
        (out, state), grads = add_backward(fun, live, begun.sums[0], begun.first)
    # Its weight is for the window to refuse.
    return Outcome([out], (grads,), jnp.ones(()), jnp.bool_(True), state)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """How the gradient of a call is computed that is divided into microbatches.

    Attributes:
      loop: the losses and what is done with each microbatch.
      divide: which rows go together.
      accumulated: the accumulator.
      whole: the call stands for one mean, so that the weights of its rows sum to 1.
        Else a microbatch weighs 1, or less, and the caller divides by `Outcome.weight`.
      apart: what devices have is not added up here, but a first axis has it all.
    """

    loop: Loop
    divide: Split
    accumulated: Accumulator
    whole: bool = False
    apart: bool = False

    def __call__(self, call: Call, begun: Begun | None = None) -> Outcome:
        """The gradient of `call`, added to the sums that have begun, if any."""
        loop, axes, gather = self.loop, self.loop.axes, self.loop.gather
        cuts = None
        if gather is not None:
            cuts = gather.cuts_of(call.args, call.argnums)
            if gather.automatic:
                alone = dataclasses.replace(self, loop=loop.on_one)
                return alone._run(call, begun, cuts, gather)
        if axes is None or axes.inside:
            return self._run(call, begun, cuts)
        return self._over(axes, call, begun, cuts)

    def _over(
        self,
        axes: Axes,
        call: Call,
        begun: Begun | None,
        cuts: tuple[PyTree, ...] | None,
    ) -> Outcome:
        """The same on each device, in a `jax.shard_map`."""
        for n in call.argnums if cuts is None else ():
            axes.check_whole(f"Argument {n}", call.args[n])
        # Numbers as arrays, which have a type that says where they are.
        live = dict(zip(call.argnums, call.live, strict=True))
        args = with_live(call.args, live)
        source = self.loop.losses[0].source
        own, by_place, named = self.divide.over(axes, source, args, call.kwargs)
        same: Any = PartitionSpec()
        grads = (axes.rows if self.apart else same,) * len(call.argnums)
        if cuts is not None:
            by_place = list(by_place)
            for n, cut in zip(call.argnums, cuts, strict=True):
                by_place[n] = specs_of(cut, args[n])
            grads = tuple(map(specs_of, cuts))

        def on_device(
            args: tuple, kwargs: Any, given: Any, state: Any, begun: Begun | None
        ) -> Outcome:
            here = dataclasses.replace(
                call, args=args, kwargs=kwargs, given=given, state=state
            )
            if self.apart and begun is not None:
                begun = begun._replace(sums=tuple(map(unstacked, begun.sums)))
            out = dataclasses.replace(self, divide=own)._run(here, begun, cuts)
            if self.apart:
                out = out._replace(grads=tuple(map(stacked, out.grads)))
            return out

        losses = [Loss(same, same, aux_specs(how, axes)) for how in self.loop.aux]
        return axes.map(
            on_device,
            (args, call.kwargs, call.given, call.state, begun),
            (tuple(by_place), named, same, same, begun and Begun(grads, same)),
            Outcome(losses, grads, same, same, same),
        )

    def _run(
        self,
        call: Call,
        begun: Begun | None,
        cuts: tuple[PyTree, ...] | None,
        placing: Gather | None = None,
    ) -> Outcome:
        """On one device or on each; `placing`: XLA divides it as the parameters are."""
        loop, axes, gather = self.loop, self.loop.axes, self.loop.gather
        source = loop.losses[0].source
        parts = self.divide.parts(source, call.argnums, call.args, call.kwargs, axes)
        unweighted = loop.mean and not loop.weighted
        unit = parts.unit
        if self.whole:
            unit = parts.rows * (1 if axes is None else axes.count)
        before = None
        if begun is None:
            grads = loop.zeros(self.accumulated, call.live, cuts)
        else:
            grads = reset(*begun)[0]
            if gather is not None and gather.once:
                # A device has a part of the sums, and the whole of this call's.
                before, grads = grads, loop.zeros(self.accumulated, call.live, cuts)
            elif gather is not None:
                grads = gather.begun(grads, cuts)
            elif axes is not None and not self.apart:
                # Counted on one device, so that no second tree is needed.
                grads = jax.tree.map(lambda s: on_first(s, axes.names), grads)
        place: Callable[[Any], Any] = (
            (lambda x: x) if placing is None else lambda x: placing.placed(x, cuts)
        )
        out = loop.run(
            call,
            parts,
            place(grads),
            seed=lambda rows: rows / unit if unweighted else 1.0,
            cuts=None if placing is not None else cuts,
        )
        grads = place(out.grads if self.apart else loop.total(out.grads, cuts))
        if before is not None:
            grads = jax.tree.map(jnp.add, before, grads)
        return out._replace(grads=grads)
