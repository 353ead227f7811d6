"""The scan over microbatches of `value_and_grad` and `train_step`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _tree
from .._devices.one import ONE, Devices
from .._noise import Share
from .._sums import Sums, accumulator, has_items, is_valid_weight
from .._types import ArrayLike, PyTree
from .._xla.handed_on import restored, unchanged_leaves
from .._xla.jaxprs import pruned
from .._xla.loops import at_most_once
from .._xla.programs import needs_tree
from .._xla.refs import add_backward
from .._xla.varying import match_varying, on_mesh_of, typed_like
from .loss import Call, Loss, StatefulLoss, with_live
from .outputs import check_aux_leaves, reducer
from .small import measured, nothing, share_of
from .split import Part, Parts

_TREES = accumulator()  # only for `add`, which keeps the dtypes of the sums


class Outcome(NamedTuple):
    """The result of a scan over microbatches.

    Attributes:
      losses: each loss over all microbatches: value and aux are reduced, and weight is
        the sum of the accepted weights, or None.
      grads: the accumulator.
      weight: () float, the divisor that makes the gradient a mean.
      accepted: () bool, false if a microbatch's weight was negative or not finite;
        that microbatch was left out.
      state: the state after the last microbatch.
      part: a part of the call, if it was measured.
    """

    losses: list[Loss]
    grads: PyTree
    weight: jax.Array
    accepted: jax.Array
    state: PyTree
    part: Share | None = None


@dataclasses.dataclass(frozen=True)
class Loop:
    """A scan over microbatches whose backward passes add into one accumulator.

    Attributes:
      losses: the losses, all of the same arguments. If several, none has a state.
      weighted: whether the losses return weights.
      mean: whether each loss is divided at the end, by its weights or its rows.
      aux: the reductions of each loss's aux.
      in_place: False carries a gradient tree through the scan instead.
    """

    losses: tuple[StatefulLoss, ...]
    weighted: bool
    mean: bool
    aux: Sequence[PyTree]
    in_place: bool

    def unit(self, parts: Parts) -> int:
        """How many items a weight of 1 is."""
        return 1 if self.weighted else parts.unit

    def run(
        self,
        call: Call,
        parts: Parts,
        devices: Devices,
        grads: tuple[PyTree, ...],
        *,
        seed: Callable[[int], ArrayLike],
        measures: jax.Array | None = None,
    ) -> Outcome:
        """Adds the gradient of every microbatch to `grads`, on a device.

        The other fields of the result are reduced over all devices.

        Args:
          call: the call.
          parts: the microbatches of the call.
          devices: the devices.
          grads: the accumulator, a tree for each of `call.argnums`.
          seed: maps the rows of a microbatch, static, to the factor of its gradient.
          measures: () bool, whether to measure the first microbatch; `grads` is then
            zero. None never does.
        """
        if self.in_place and needs_tree((call.arrays, grads)):
            self = dataclasses.replace(self, in_place=False)
        live = devices.vary(dict(zip(call.argnums, call.live, strict=True)))
        live, frozen = devices.gather_once(live), devices.gather_once(call.frozen)
        sums = typed_like(dict(zip(call.argnums, grads, strict=True)), live)
        first = jax.tree.map(_tree.strong, call.state)
        loss = self.losses[0]
        given, state = loss.begin(devices, call.given, first)
        terms = [
            _Term(self, fun, live, frozen, parts, aux, seed, given, state, devices)
            for fun, aux in zip(self.losses, self.aux, strict=True)
        ]
        total, factors = None, None
        if self.weighted and self.mean and len(terms) > 1:
            total, factors = _one_divisor(terms, parts, devices)

        body, part = _body(terms, factors), None
        carry = sums, [term.begin() for term in terms], state
        if measures is None:
            sums, seen, state = parts.scan(body, carry)
        else:
            body = measured(body, measures)
            (sums, seen, state), small = parts.scan(body, (carry, nothing()))
            part = share_of(small, seen[0].weight, self.unit(parts))

        def together(devices: Devices) -> Any:
            each = [t.combine(devices, s) for t, s in zip(terms, seen, strict=True)]
            return each, loss.end(devices, first, state, terms[0].kept)

        seen, state = devices.reduce((seen, state), together)
        grads = tuple(sums[n] for n in call.argnums)
        accepted = jnp.all(~jnp.stack([s.refused for s in seen]))
        losses = [term.end(s) for term, s in zip(terms, seen, strict=True)]
        total = seen[0].weight if total is None else total
        return Outcome(losses, grads, total, accepted, state, part)


class _Seen(NamedTuple):
    """The running sums of one loss over microbatches.

    Attributes:
      value: () at least float32, the sum of the losses, weighted if `mean`.
      weight: () float, the sum of the accepted weights, or of the rows over
        `Parts.unit` if the loss is not weighted.
      refused: () bool, whether a weight was negative or not finite.
      aux: the sums of the loss's `Reducer`.
    """

    value: jax.Array
    weight: jax.Array
    refused: jax.Array
    aux: list[Any]


class _Term:
    """One of the losses of a call, and how to add each of its microbatches."""

    def __init__(
        self,
        loop: Loop,
        stateful: StatefulLoss,
        live: dict[int, PyTree],
        frozen: dict[int, PyTree],
        parts: Parts,
        aux: PyTree,
        seed: Callable[[int], ArrayLike],
        given: PyTree,
        state: PyTree,
        devices: Devices,
    ):
        self.loop, self.stateful, self.parts = loop, stateful, parts
        self.live, self.frozen = live, frozen
        self.seed, self.given, self.state = seed, given, state
        self.devices = devices
        self.kept = jax.tree.map(lambda _: False, state)
        each = [
            unchanged_leaves(lambda x, part=part: self.read_whole(part, x), state)
            for part in parts.each()
        ]
        shapes = [shape for shape, _ in each]
        always = map(all, zip(*(kept for _, kept in each), strict=True))
        self.kept = jax.tree.unflatten(jax.tree.structure(state), always)
        self.shape = shapes[0]
        devices.check_unreduced("The loss", self.shape.value)
        agree, in_place = ONE.all, True
        if loop.weighted:
            agree, in_place = self._agreement(parts.each())
        self.agree, self.in_place = (
            agree,
            loop.in_place and devices.in_place and in_place,
        )
        self.reducer = reducer(aux, shapes[0].aux, shapes[-1].aux, parts)

    def read(
        self, live: dict[int, PyTree], part: Part, state: PyTree
    ) -> tuple[Loss, PyTree]:
        """The loss of a microbatch, and the state after it."""
        args, kwargs = part.call()
        if self.frozen:
            args = with_live(args, self.devices.gather(self.frozen, part.index))
        args = with_live(args, live)
        loss, new = self.stateful.run(self.given, state, args, kwargs)
        check_aux_leaves(loss.aux)
        return loss, restored(self.kept, state, _tree.cast_like(new, state))

    def _agreement(self, parts: list[Part]) -> tuple[Callable[..., Any], bool]:
        """Calls `Devices.agreement` for the losses of these microbatches.

        It inspects the gradient and not the loss, because a rule of `jax.custom_vjp`
        may communicate in the backward pass only.
        """

        def gradient(live: PyTree, state: PyTree, part: Part) -> PyTree:
            def value(live: PyTree) -> jax.Array:
                return self.read(live, part, state)[0].value

            return jax.value_and_grad(value)(live)

        gradients = [functools.partial(gradient, part=part) for part in parts]
        live = self.whole(parts[0])
        return self.devices.agreement(gradients, live, self.state)

    def read_whole(self, part: Part, state: PyTree) -> tuple[Loss, PyTree]:
        return self.read(self.whole(part), part, state)

    def whole(self, part: Part) -> dict[int, PyTree]:
        """Gathers the whole parameters; a device may have only a part of them."""
        return self.devices.gather(self.live, part.index)

    def begin(self) -> _Seen:
        dtype = _tree.wide(self.shape.value.dtype)
        zero = jnp.zeros((), float)
        return _Seen(jnp.zeros((), dtype), zero, jnp.bool_(False), self.reducer.init())

    def add(
        self,
        grads: PyTree,
        seen: _Seen,
        part: Part,
        state: PyTree,
        factor: jax.Array | None,
    ) -> tuple[PyTree, _Seen, PyTree]:
        """Adds a microbatch; `factor`, () float, multiplies its gradient."""
        dtype = seen.value.dtype

        def fun(live: dict[int, PyTree]) -> tuple[jax.Array, Any]:
            loss, new = self.read(live, part, state)
            value, seed = loss.value, self.seed(part.rows)
            if factor is not None:
                seed = factor * jnp.asarray(seed, factor.dtype)
            if not (isinstance(seed, float) and seed == 1):
                value = value.astype(dtype) * jnp.asarray(seed, dtype)
            return value, ((loss.value, loss.weight), (loss.aux, new))

        def taken(found: jax.Array | None) -> jax.Array | None:
            return None if found is None else self.agree(has_items(found))

        live, found, in_place = self.whole(part), None, self.in_place
        if in_place and self.loop.weighted:
            found = self.weight(live, part, state)
            in_place = found is not None
        if in_place:
            out, grads = add_backward(
                fun, live, grads, taken=taken(found), alone=part.alone
            )
            (value, _), (aux, state) = out
        else:
            out, grads = add_carried(
                fun, live, grads, lambda values: taken(values[1]), self.devices.scatter
            )
            (value, found), (aux, state) = out
        value, (weight, refused) = value.astype(dtype), self.weigh(found, part)
        if found is not None:
            value = jnp.where(weight != 0, value, 0)
        elif self.loop.mean:
            value = value * weight.astype(dtype)
        seen = _Seen(
            seen.value + value,
            seen.weight + weight,
            seen.refused | refused,
            self.reducer.add(seen.aux, aux, part, weight),
        )
        return grads, seen, state

    def weight(
        self, live: dict[int, PyTree], part: Part, state: PyTree
    ) -> jax.Array | None:
        """Returns the weight of a microbatch, () float, before its loss is computed.

        None if the weight has an effect, which must not happen twice.
        """
        return pruned(lambda live: self.read(live, part, state)[0].weight, live)

    def weigh(self, found: jax.Array | None, part: Part) -> tuple[jax.Array, jax.Array]:
        """Returns `(weight, refused)`: () float, which is 0 if refused, and () bool."""
        if found is None:
            share = jnp.asarray(part.rows / self.parts.unit, float)
            return share, jnp.bool_(False)
        return jnp.where(has_items(found), found, 0), ~is_valid_weight(found)

    def combine(self, devices: Devices, seen: _Seen) -> _Seen:
        """Sums over all devices."""
        refused = seen.refused.astype(seen.weight.dtype)  # for one all-reduce
        value, weight, refused = devices.sum((seen.value, seen.weight, refused))
        return _Seen(
            value, weight, refused > 0, self.reducer.combine(devices, seen.aux)
        )

    def end(self, seen: _Seen) -> Loss:
        value = seen.value
        if self.loop.mean:
            value = Loss(value, seen.weight, None).mean()
        return Loss(
            value.astype(self.shape.value.dtype),
            seen.weight if self.loop.weighted else None,
            self.reducer.result(seen.aux, seen.weight),
        )


def _body(terms: list[_Term], factors: jax.Array | None) -> Callable[[Any, Part], Any]:
    """Returns the scan's body: `((grads, seen by term, state), part) -> carry`."""

    def add(carry: Any, part: Part, i: int) -> Any:
        grads, seen, state = carry
        factor = None if factors is None else factors[i]
        grads, new, state = terms[i].add(grads, seen[i], part, state, factor)
        return grads, [*seen[:i], new, *seen[i + 1 :]], state

    def in_turn(carry: Any, part: Part) -> Any:
        # XLA merges the graphs of losses that are computed one after another, so that
        # all are alive at once (three equal losses: 3.0 x the memory of one). It does
        # not merge graphs in different loops.
        def turn(carry: Any, n: ArrayLike) -> tuple[Any, None]:
            for i in range(len(terms)):
                this = functools.partial(add, part=part, i=i)
                carry = at_most_once(jnp.equal(n, i), this, carry)
            return carry, None

        carry = match_varying(lambda carry: turn(carry, 0)[0], carry)
        return lax.scan(turn, carry, jnp.arange(len(terms)))[0]

    return functools.partial(add, i=0) if len(terms) == 1 else in_turn


def _one_divisor(
    terms: list[_Term], parts: Parts, devices: Devices
) -> tuple[jax.Array, jax.Array]:
    """Returns the number that divides all weighted losses, and a factor for each.

    The number, () float, is the least of the losses' sums of weights. The factors,
    (losses,) float, multiply their gradients: the ratios of that number to their own
    sums. 1 / sum would underflow in float16. An extra scan computes the sums, from the
    equations that the weights need: if they depend only on the batch, as the number of
    tokens does, no loss is computed in it.
    """

    def body(sums: list[jax.Array], part: Part) -> list[jax.Array]:
        def added(term: _Term, total: jax.Array) -> jax.Array:
            found = term.weight(term.whole(part), part, term.state)
            if found is None:
                raise NotImplementedError(
                    "The weight of one of several losses needs an effect (io_callback, "
                    "or a jax.Ref from outside of the loss). The weights are computed "
                    "before the losses, so it would happen twice. Compute the weight "
                    "without the effect, or pass the losses one by one."
                )
            return total + term.weigh(found, part)[0]

        return [added(*pair) for pair in zip(terms, sums, strict=True)]

    sums = jnp.stack(parts.scan(body, [jnp.zeros((), float) for _ in terms]))
    sums = devices.sum(sums)
    sums = jnp.where(sums != 0, sums, jnp.inf)  # a loss of weight 0 adds nothing
    least = jnp.min(sums)
    return jnp.where(least != jnp.inf, least, 1), least / sums


def add_carried(
    fun: Callable[[PyTree], Any],
    params: PyTree,
    sums: PyTree,
    taken: Callable[[Any], jax.Array | None] = lambda values: None,
    scatter: Callable[..., tuple[PyTree, jax.Array]] = ONE.scatter,
) -> tuple[Any, PyTree]:
    """`add_backward` that builds a gradient tree and adds it.

    `taken` maps the `values` that `fun` returned to whether the gradient is added, None
    for always. `scatter` is `Devices.scatter`.
    """
    value, vjp, (values, aux) = jax.vjp(fun, params, has_aux=True)
    (grads,) = vjp(jnp.ones_like(value))
    sums = on_mesh_of(jax.typeof(value), sums)
    adds = taken(values)
    # The weight is a mask here, so the gradients are passed as sums.
    weight = jnp.where(True if adds is None else adds, 1.0, 0.0)
    grads, weight = scatter(grads, sums, weight)
    before = Sums(sums, jnp.zeros((), float), {})
    after, _ = _TREES.add(before, grads, weight, {}, first=False, summed=True)
    return (values, aux), after.grads
