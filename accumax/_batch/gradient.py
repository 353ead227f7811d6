"""The gradient of one call: split, scan over microbatches, sum over devices."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._devices.one import Devices
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
      loop: the losses, and how each microbatch is added.
      divide: which rows go together.
      accumulated: the accumulator.
      devices: which of them hold the rows, the parameters and the sums.
      whole: the call stands for one mean, so that the weights of its rows sum to 1.
        Else a microbatch weighs 1, or less, and the caller divides by `Outcome.weight`.
    """

    loop: Loop
    divide: Split
    accumulated: Accumulator
    devices: Devices
    whole: bool = False

    def __call__(self, call: Call, begun: Begun | None = None) -> Outcome:
        """The gradient of `call`, added to the sums that have begun, if any."""
        devices = self.devices.at(call.args, call.argnums)
        # Numbers as arrays, which have a type that says where they are.
        live = dict(zip(call.argnums, call.live, strict=True))
        args = with_live(call.args, live)
        source = self.loop.losses[0].source
        divide, by_place, named = self.divide.over(
            devices, source, call.argnums, args, call.kwargs
        )
        specs = [devices.arg(n, args[n], spec) for n, spec in enumerate(by_place)]
        same: Any = PartitionSpec()

        def on_device(
            args: tuple, kwargs: Any, given: Any, state: Any, begun: Begun | None
        ) -> Outcome:
            here = dataclasses.replace(
                call, args=args, kwargs=kwargs, given=given, state=state
            )
            if begun is not None:
                begun = begun._replace(sums=devices.unstack(begun.sums))
            out = self._run(devices, divide, here, begun)
            return out._replace(grads=devices.stack(out.grads))

        losses = [Loss(same, same, aux_specs(how, devices)) for how in self.loop.aux]
        return devices.map(
            on_device,
            (args, call.kwargs, call.given, call.state, begun),
            (tuple(specs), named, same, same, begun and Begun(devices.sums, same)),
            Outcome(losses, devices.sums, same, same, same),
        )

    def _run(
        self, devices: Devices, divide: Split, call: Call, begun: Begun | None
    ) -> Outcome:
        """On a device."""
        loop, source = self.loop, self.loop.losses[0].source
        parts = divide.parts(source, call.argnums, call.args, call.kwargs, devices)
        unweighted = loop.mean and not loop.weighted
        unit = parts.rows * devices.count if self.whole else parts.unit

        def zeros() -> PyTree:
            return devices.zeros(lambda x: self.accumulated.init(x).grads, call.live)

        if begun is None:
            held, grads = (), zeros()
        else:
            held, grads = devices.begin(reset(*begun)[0], zeros)
        out = loop.run(
            call,
            parts,
            devices,
            grads,
            seed=lambda rows: rows / unit if unweighted else 1.0,
        )
        return out._replace(grads=devices.end(held, out.grads))
