"""The gradient of one call: split, scan over microbatches, sum over devices."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from .._devices.one import Devices
from .._sums import Accumulator, has_items
from .._types import ArrayLike, PyTree
from .._xla.handed_on import restored, unchanged_leaves
from .._xla.jaxprs import pruned
from .._xla.loops import SMALL, reset
from .._xla.programs import needs_tree
from .._xla.refs import add_backward
from .loss import Call, Loss, StatefulLoss, fresh, with_live
from .outputs import aux_specs
from .scan import Loop, Outcome, add_carried
from .small import share_of_device
from .split import Split


class OpenSums(NamedTuple):
    """Gradient sums of a window, to which a call adds in place.

    Attributes:
      sums: a tree for each differentiated argument.
      first: () bool, whether a window opens; `sums` is then stale and not read.
    """

    sums: tuple[PyTree, ...]
    first: jax.Array


def at_once(
    loss: StatefulLoss, weighted: bool, call: Call, begun: OpenSums | None = None
) -> Outcome:
    """Computes the gradient of a call without microbatches, for its one argument.

    Without `begun`, the gradient is a new tree in the dtypes of the parameters.
    """
    (n,), (live,) = call.argnums, call.live

    def run(live: PyTree, state: PyTree) -> tuple[Loss, PyTree]:
        # It is traced more than once, and may change a dict that it is given.
        args, kwargs = fresh((with_live(call.args, {n: live}), call.kwargs))
        return loss.run(call.given, state, args, kwargs)

    kept = [False] * len(jax.tree.leaves(call.state))
    if sum(map(np.size, jax.tree.leaves(call.state))) > SMALL:  # worth another trace
        _, kept = unchanged_leaves(functools.partial(run, live), call.state)
    kept = jax.tree.unflatten(jax.tree.structure(call.state), kept)

    def read(live: PyTree) -> tuple[Loss, PyTree]:
        out, new = run(live, call.state)
        return out, restored(kept, call.state, new)

    def fun(live: PyTree) -> tuple[jax.Array, Any]:
        out, state = read(live)
        return out.value, ((out.value, out.weight), (out.aux, state))

    if begun is None:
        value, vjp, ((_, weight), (aux, state)) = jax.vjp(fun, live, has_aux=True)
        grads = vjp(jnp.ones_like(value))[0]
    else:
        weight, carried = None, needs_tree((call.arrays, begun))
        if weighted and not carried:
            weight = pruned(lambda live: read(live)[0].weight, live)
            carried = weight is None  # it has an effect, which must not happen twice
        if carried:

            def taken(values: Any) -> jax.Array | None:
                return has_items(values[1]) if weighted else None

            sums, _ = reset(begun.sums[0], begun.first)
            out, grads = add_carried(fun, live, sums, taken)
            (value, weight), (aux, state) = out
            if weighted:
                value = jnp.where(has_items(weight), value, 0)
        else:
            items = None if weight is None else has_items(weight)
            out, grads = add_backward(fun, live, begun.sums[0], begun.first, items)
            (value, _), (aux, state) = out
    out = Loss(value, weight, aux)
    out = out._replace(value=out.mean())
    # `accepted` is true: the window checks the weight.
    return Outcome([out], (grads,), jnp.ones(()), jnp.bool_(True), state)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Computes the gradient of a call, one microbatch at a time.

    Attributes:
      loop: the losses, and how to add up their microbatches.
      divide: how to divide the rows into microbatches.
      accumulated: the accumulator.
      devices: where the rows, the parameters and the sums are.
      whole: for a mean over rows. If true, the weights of all microbatches sum to 1.
        If false, each is at most 1, and the caller divides by `Outcome.weight`.
      measures: () bool, whether to measure a part of the call, `Outcome.part`: what one
        device has of it or, where no device has sums of its own, the first microbatch.
        None never does.
    """

    loop: Loop
    divide: Split
    accumulated: Accumulator
    devices: Devices
    whole: bool = False
    measures: jax.Array | None = None

    def __call__(self, call: Call, begun: OpenSums | None = None) -> Outcome:
        """Computes the gradient of `call`, added to the sums in `begun`, if any."""
        devices = self.devices.at(call.args, call.argnums)
        # Python numbers become arrays, whose types say how they are sharded.
        live = dict(zip(call.argnums, call.live, strict=True))
        args = with_live(call.args, live)
        source = self.loop.losses[0].source
        divide, by_place, named = self.divide.per_device(
            devices, source, call.argnums, args, call.kwargs
        )
        if self.measures is not None:
            devices.check_measured()
        specs = [devices.arg(n, args[n], spec) for n, spec in enumerate(by_place)]
        same: Any = PartitionSpec()

        def on_device(
            args: tuple,
            kwargs: Any,
            given: Any,
            state: Any,
            limit: Any,
            begun: OpenSums | None,
            measures: jax.Array | None,
        ) -> Outcome:
            here = dataclasses.replace(
                call, args=args, kwargs=kwargs, given=given, state=state, limit=limit
            )
            if begun is not None:
                begun = begun._replace(sums=devices.unstack(begun.sums))
            own = dataclasses.replace(self, measures=measures)
            out = own._run(devices, divide, here, begun)
            return out._replace(grads=devices.stack(out.grads))

        passed = args, call.kwargs, call.given, call.state, call.limit
        specs_of_call = tuple(specs), named, same, same, same
        losses = [Loss(same, same, aux_specs(how, devices)) for how in self.loop.aux]
        return devices.map(
            on_device,
            (*passed, begun, self.measures),
            (*specs_of_call, begun and OpenSums(devices.sums, same), same),
            Outcome(losses, devices.sums, same, same, same, same),
        )

    def _run(
        self, devices: Devices, divide: Split, call: Call, begun: OpenSums | None
    ) -> Outcome:
        """Runs on a device: scans over its microbatches."""
        loop, source = self.loop, self.loop.losses[0].source
        parts = divide.parts(
            source, call.argnums, call.args, call.kwargs, devices, call.limit
        )
        unweighted = loop.mean and not loop.weighted
        unit = parts.rows_run * devices.count if self.whole else parts.unit

        def zeros() -> PyTree:
            return devices.zeros(lambda x: self.accumulated.init(x).grads, call.live)

        scale: ArrayLike = 1.0
        if begun is None:
            held, grads = (), zeros()
        else:
            sums, scale = reset(*begun)
            held, grads = devices.begin(sums, zeros)

        def seed(rows: int) -> ArrayLike:
            share = rows / unit if unweighted else 1.0
            # The 1 that `reset` returns: else XLA:GPU may run it last.
            return share if begun is None else share * scale

        out = loop.run(
            call,
            parts,
            devices,
            grads,
            seed=seed,
            measures=None if devices.own_sums else self.measures,
        )
        if parts.tail or parts.unroll is True:  # the last sums come from no loop
            # XLA:GPU would add the last gradient anew for each reader of the sums, and
            # so keep both (a norm and Adam: temp of 2.0 x parameters for 1.2).
            out = out._replace(grads=lax.optimization_barrier(out.grads))
        if devices.own_sums and self.measures is not None:
            unit = loop.unit(parts)
            part = share_of_device(out, unit, devices, self.measures)
            out = out._replace(part=part)
        return out._replace(grads=devices.end(held, out.grads))
