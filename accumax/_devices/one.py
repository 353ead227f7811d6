"""The interface for devices, and its implementation for one device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .. import _tree
from .._types import ArrayLike, PyTree
from .._xla.loops import at_most_once

T = TypeVar("T")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Devices:
    """One device: each method is the identity, or calls the function it is passed.

    Subclasses for several devices, such as `Replicated`, `PerDevice` and `Sharded`,
    override methods. Code outside this folder calls the methods and never tests the
    class. Code is *on a device* if `map` runs it, or if it is in a `jax.shard_map`.

    Attributes:
      names: the mesh axes; () for one device.
      needs_rows: whether each call must name the arguments that hold rows, because
        devices divide the rows.
      in_place: whether a backward pass may add into the sums of a device in place.
      own_sums: whether each device has a whole sum of its own until `end`.
      sums_are_total: whether `boundary` leaves the sum over devices in the sums.
      count: the number of devices.
      parts: the number of sums that a window has, one for each device or one for all.
    """

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    needs_rows = False
    in_place = True
    own_sums = False
    sums_are_total = True
    count = 1
    parts = 1

    @property
    def divides(self) -> int:
        """The number of devices over which `map` divides the rows of a call."""
        return 1

    # Before a call.

    def at(self, args: tuple, argnums: tuple[int, ...]) -> "Devices":
        """Returns the devices of a call differentiated at `argnums`; checks `args`."""
        del args, argnums
        return self

    def map(self, fun: Callable[..., Any], args: tuple, specs: tuple, out: Any) -> Any:
        """Runs `fun(*args)` on each device.

        `specs` and `out` are the shardings of arguments and results, pytree prefixes.
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
        """Returns the specs of argument n: `spec`, unless parameters are sharded."""
        del n, x
        return spec

    # On a device.

    def vary(self, tree: T) -> T:
        """Makes `tree` device-varying, so that its gradient is per-device."""
        return tree

    def sum(self, tree: T) -> T:
        """Sums `tree` over devices: an all-reduce."""
        return tree

    def last(self, x: jax.Array) -> jax.Array:
        """Returns the `x` of the last device, on every device."""
        return x

    def any(self, flags: jax.Array) -> jax.Array:
        """bool: whether a flag is true on any device."""
        return flags

    def all(self, flags: jax.Array) -> jax.Array:
        """bool: whether a flag is true on every device."""
        return flags

    def same(self, name: str, x: jax.Array) -> jax.Array:
        """Returns `x`, () float, which must be replicated; `name` is for the error."""
        del name
        return x

    def keys_of_device(self, keys: T) -> T:
        """Derives the PRNG keys of this device from replicated `keys`."""
        return keys

    def reduce(self, own: T, fun: Callable[["Devices"], T]) -> T:
        """Returns `fun(self)`: it reduces `own` over devices; `own` for one device."""
        del fun
        return own

    def check_measured(self) -> None:
        """Checks that the norm of sums can be told after a call.

        Raises:
          ValueError: a device sees only a shard of them.
        """

    def check_unreduced(self, name: str, tree: PyTree) -> None:
        """Checks that `tree` is per-device, and not reduced already."""

    def agreement(
        self, gradients: list[Callable[..., Any]], *args: Any
    ) -> tuple[Callable[[jax.Array], jax.Array], bool]:
        """Returns `(agree, in_place)`: how devices leave out microbatches of weight 0.

        A weighted backward pass in place does not run where the weight is 0. A device
        may leave it out by itself only if no other device waits for its data.
        `in_place` is False if a device might wait. `agree` maps a device's flags, true
        where its microbatch has weight, to flags that are true where the pass must run.
        `gradients`, functions of `args`, compute gradients and may communicate.
        """
        del gradients, args
        return self.all, True

    # The parameters and the sums of their gradients, within a call.

    def zeros(self, init: Callable[[PyTree], PyTree], live: PyTree) -> PyTree:
        """Returns -0.0 to add gradients to, in the shapes of `init(live)`."""
        return _tree.minus_zeros_like(init(live))

    def begin(self, sums: T, zeros: Callable[[], T]) -> tuple[Any, T]:
        """Returns `(held, sums)`: a call adds to these sums; `end` adds `held`."""
        del zeros
        return (), sums

    def end(self, held: Any, sums: T) -> T:
        """Reduces `sums` after a call and adds `held`; `PerDevice` reduces later."""
        del held
        return sums

    def gather_once(self, live: T) -> T:
        """All-gathers the parameters, by position, if this happens once in a call."""
        return live

    def gather(self, live: T, i: ArrayLike) -> T:
        """Returns the whole parameters for microbatch i, () integer, by position."""
        del i
        return live

    def scatter(self, grads: T, sums: PyTree, weight: jax.Array) -> tuple[T, jax.Array]:
        """Returns `(grads, weight)` to add to `sums`, reduce-scattered if sharded."""
        del sums
        return grads, weight

    def unstack(self, sums: T) -> T:
        """Returns the sums of this device, without the device axis of a state."""
        return sums

    def stack(self, sums: T) -> T:
        """The inverse of `unstack`."""
        return sums

    # A window, across calls.

    def join(self, other: "Devices") -> "Devices":
        """Combines the devices of a window with `other`, the devices of its step.

        Raises:
          ValueError: the two do not go together.
        """
        other.check_without_window()
        return other

    def check_without_window(self) -> None:
        """Checks that a call may use these devices although no window has them.

        Raises:
          ValueError: it may not.
        """

    def init(self, init: Callable[[PyTree], PyTree], grads: PyTree) -> PyTree:
        """The accumulators of an empty window."""
        return init(grads)

    def init_optimizer(self, init: Callable[[PyTree], T], params: PyTree) -> T:
        """The state of an optimizer: `init(params)`."""
        return init(params)

    def check_inside(self) -> None:
        """Checks that this code is on a device, where gradients are per-device."""

    def on_each(
        self, fun: Callable[..., Any], own: tuple, same: tuple
    ) -> tuple[Any, Any]:
        """Runs `fun(*own, *same)` on each device, which returns a new `(own, same)`.

        `own` are per-device trees, in the layout of sums in a state. `same` are
        replicated.
        """
        return fun(*own, *same)

    def total(self, sums: T) -> T:
        """Sums a state's sums over devices. The result has the layout of a gradient."""
        return sums

    def boundary(
        self,
        applies: jax.Array,
        divide: Callable[[PyTree, jax.Array], PyTree],
        fun: Callable[..., tuple[T, S]],
        carry: tuple[T, S],
        sums: PyTree,
        weight: jax.Array,
        extra: Any,
    ) -> tuple[tuple[T, S], PyTree]:
        """Runs `carry = fun(carry, divide(total, weight), weight, extra)` in place.

        Only if `applies`, () bool. It returns `(carry, sums)`. `carry` are parameters
        and the state of an optimizer, `weight` is () float, `total` the sum over
        devices, and `extra` a replicated tree.

        On one device `fun` only reads the sums, so they do not go through its loop: a
        GPU would copy them. The division has a loop of its own: where the optimizer
        reads the mean twice, for a norm or a matrix product, XLA would materialise it
        (SGD with clipping: 1.0 of temp on CPU; Muon: 0.88 on GPU).
        """
        sums = at_most_once(applies, lambda sums: divide(sums, weight), sums)

        def body(carry: tuple[T, S]) -> tuple[T, S]:
            return fun(carry, sums, weight, extra)

        return at_most_once(applies, body, carry), sums

    def shapes(self, name: str, sums: PyTree) -> PyTree:
        """Returns `sums` of a state, or shapes, with the shapes of one device."""
        del name
        return sums

    def as_replicated(self, grads: PyTree) -> PyTree:
        """Returns `grads`, or shapes, with the types of a reduced gradient."""
        return grads


ONE = Devices()


def fold_in(keys: PyTree, i: ArrayLike) -> PyTree:
    """Folds i, () integer, into each of `keys`, typed or raw, or arrays of these."""

    def fold(key: Any) -> jax.Array:
        key = jnp.asarray(key)
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        own = functools.partial(jax.random.fold_in, data=jnp.asarray(i, jnp.uint32))
        for _ in range(key.ndim if typed else key.ndim - 1):
            own = jax.vmap(own)
        return own(key)

    return jax.tree.map(fold, keys)
