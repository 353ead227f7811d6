"""The interface of all kinds of devices, and the kind that is one device."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .. import _tree
from .._types import ArrayLike, PyTree
from .._xla.loops import at_most_once

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Devices:
    """One device, on which each method is the identity or calls what it is passed.

    `Replicated`, `PerDevice` and `Sharded` are the other kinds; each overrides what
    differs. The code outside of this folder calls the methods and never asks for the
    kind. *On a device* is code that `map` runs, or that runs in a `jax.shard_map`.

    Attributes:
      names: the mesh axes; () for one device.
      needs_rows: whether each call must say which arguments hold rows, because devices
        divide them.
      in_place: whether a backward pass may add into the sums of a device in place.
    """

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    needs_rows = False
    in_place = True
    count = 1

    @property
    def divides(self) -> int:
        """By how many devices `map` divides the rows of a call."""
        return 1

    # Before a call.

    def at(self, args: tuple, argnums: tuple[int, ...]) -> "Devices":
        """The same for a call that is differentiated at `argnums`; checks `args`."""
        del args, argnums
        return self

    def map(self, fun: Callable[..., Any], args: tuple, specs: tuple, out: Any) -> Any:
        """`fun(*args)` on each device.

        `specs` and `out` say how arguments and results are divided: pytree prefixes.
        """
        del specs, out
        return fun(*args)

    @property
    def rows(self) -> PartitionSpec:
        """The spec of an array whose first axis is divided over the devices."""
        return PartitionSpec()

    @property
    def sums(self) -> Any:
        """The specs of sums of gradients, a pytree prefix."""
        return PartitionSpec()

    def arg(self, n: int, x: PyTree, spec: PartitionSpec) -> Any:
        """The specs of argument n, where `spec` is that of rows or of shared data."""
        del n, x
        return spec

    # On a device.

    def vary(self, tree: T) -> T:
        """`tree` as a value that differs by device, so that its gradient does too."""
        return tree

    def sum(self, tree: T) -> T:
        """The sum of what the devices hold."""
        return tree

    def last(self, x: jax.Array) -> jax.Array:
        """`x` of the last device."""
        return x

    def any(self, flags: jax.Array) -> jax.Array:
        """bool: whether a flag is true on any device."""
        return flags

    def all(self, flags: jax.Array) -> jax.Array:
        """bool: whether a flag is true on every device."""
        return flags

    def same(self, name: str, x: jax.Array) -> jax.Array:
        """`x`, () float, which must not differ by device; `name` is for the error."""
        del name
        return x

    def own_keys(self, keys: T) -> T:
        """PRNG keys of this device, from keys that all devices hold."""
        return keys

    def reduce(self, own: T, fun: Callable[["Devices"], T]) -> T:
        """What all devices hold together: `fun(self)` computes it from what each has.

        `own` is what this device has, and the result on one device.
        """
        del fun
        return own

    def check_own(self, name: str, tree: PyTree) -> None:
        """Checks that `tree` is what one device computed, and not reduced already."""

    def agreement(
        self, gradients: list[Callable[..., Any]], *args: Any
    ) -> tuple[Callable[[jax.Array], jax.Array], bool]:
        """How devices agree on microbatches that are left out: `(agree, in_place)`.

        A weighted backward pass in place does not run where the weight is 0. That is
        safe on a device if no other one waits for it. `agree` is from the flags of one
        device, true where its microbatch counts, to those by which it may be left out.
        `gradients` compute the gradients of `args` that may exchange something.
        """
        del gradients, args
        return _identity, True

    # The parameters and the sums of their gradients, within a call.

    def zeros(self, init: Callable[[PyTree], PyTree], live: PyTree) -> PyTree:
        """-0.0 to add gradients to, of the shapes that `init(live)` has."""
        return _tree.minus_zeros_like(init(live))

    def begin(self, sums: T, zeros: Callable[[], T]) -> tuple[Any, T]:
        """`(held, sums)`: what this call adds to, where `sums` are to be continued."""
        del zeros
        return (), sums

    def end(self, held: Any, sums: T) -> T:
        """The sums of all devices, from what `begin` gave and the call added to."""
        del held
        return sums

    def gather_once(self, live: T) -> T:
        """The whole parameters, by position, if they are gathered once in a call."""
        return live

    def gather(self, live: T, i: ArrayLike) -> T:
        """The whole parameters, by position, for microbatch i, () integer."""
        del i
        return live

    def scatter(self, grads: T, sums: PyTree, weight: jax.Array) -> tuple[T, jax.Array]:
        """`(grads, weight)` of a microbatch as they are added to `sums`."""
        del sums
        return grads, weight

    def unstack(self, sums: T) -> T:
        """A device's sums, on it, from those in a state."""
        return sums

    def stack(self, sums: T) -> T:
        """The inverse of `unstack`."""
        return sums

    # A window, across calls.

    def join(self, other: "Devices") -> "Devices":
        """The devices of a step, where `self` are those of its window.

        Raises:
          ValueError: they do not go together.
        """
        return other

    def init(self, init: Callable[[PyTree], PyTree], grads: PyTree) -> PyTree:
        """The accumulators of an empty window."""
        return init(grads)

    def check_inside(self) -> None:
        """Checks that a gradient that was passed is that of one device."""

    def on_each(
        self, fun: Callable[..., Any], own: tuple, same: tuple
    ) -> tuple[Any, Any]:
        """`fun(*own, *same)` on each device: `(own, same)` again.

        `own` are trees that each device has for itself, as sums in a state are; `same`
        are equal on all.
        """
        return fun(*own, *same)

    def total(self, sums: T) -> T:
        """The sum over devices of the sums in a state, as a gradient is."""
        return sums

    def boundary(
        self, applies: jax.Array, fun: Callable[[T, Any], T], carry: T, sums: PyTree
    ) -> tuple[T, PyTree]:
        """`(fun(carry, total), sums)` if `applies`, () bool; in place.

        `total` are the sums of all devices. Sums that are only read do not go through
        the loop: on a GPU they would be copied.
        """
        return at_most_once(applies, lambda carry: fun(carry, sums), carry), sums

    def shapes(self, name: str, sums: PyTree) -> PyTree:
        """Sums in a state, or their shapes, as one device has them."""
        del name
        return sums

    def as_replicated(self, grads: PyTree) -> PyTree:
        """A gradient, or its shapes, of the type that it has once it is reduced."""
        return grads


ONE = Devices()


def fold_in(keys: PyTree, i: ArrayLike) -> PyTree:
    """Each of `keys`, typed or raw, folded with i, () integer."""

    def fold(key: Any) -> jax.Array:
        return jax.random.fold_in(jnp.asarray(key), jnp.asarray(i, jnp.uint32))

    return jax.tree.map(fold, keys)


def _identity(x: T) -> T:
    return x
