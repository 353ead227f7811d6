"""Divides a call into microbatches: the rows of each, and their order."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._devices.one import ONE, Devices, fold_in
from .._devices.specs import only
from .._types import ArrayLike, PyTree
from .._xla.loops import after, at_most_once
from .._xla.varying import explicit_axes, match_varying
from .arguments import (
    Place,
    check_keys,
    check_limit,
    check_no_key,
    check_places,
    check_positive,
    check_rows,
    find,
    warn_of_rows,
)
from .rows import rows_of_part

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Part:
    """One microbatch of a call.

    Attributes:
      call: `() -> (args, kwargs)` of this microbatch. It cuts the rows where it is
        called, so a loop body that calls it does not carry them.
      index: () integer, its number.
      rows: the number of its rows.
      tail: whether it is the last, smaller microbatch.
      consecutive: whether its rows are consecutive in the batch.
      alone: whether it is not in a scan over microbatches.
    """

    call: Callable[[], tuple[tuple, dict[str, Any]]]
    index: ArrayLike
    rows: int
    tail: bool
    consecutive: bool
    alone: bool


@dataclasses.dataclass(frozen=True)
class Parts:
    """The microbatches of one call.

    Attributes:
      rows: the rows of the whole batch.
      size: the rows of a microbatch.
      count: the number of microbatches of `size` rows.
      tail: the rows of the last, smaller microbatch; 0 if there is none.
      unit: a microbatch of n rows weighs n / unit in a mean over rows. It is the
        microbatch size or, if the last microbatch is smaller, the next power of two, so
        that all weights are exact and at most 1.
      places: the positions and keywords of the arguments that are divided.
      divide: `(tree) -> ((i, tail) -> tree)`, the rows of microbatch i, for a tree of
        arrays that have the rows of the batch.
      part: `(i, tail=False) -> Part`: microbatch i, () integer below `count`. With
        `tail`, the smaller microbatch; i is then `count`.
      unroll: see `Split`.
      limit: () integer, how many of the microbatches run; None for all.
    """

    rows: int
    size: int
    count: int
    tail: int
    unit: int
    places: frozenset[Place]
    divide: Callable[[PyTree], Callable[[ArrayLike, bool], PyTree]]
    part: Callable[..., Part]
    unroll: int | bool
    limit: jax.Array | None = None

    @property
    def consecutive(self) -> bool:
        """Whether a microbatch has consecutive rows, so that the first ones can run."""
        return self.limit is not None

    @property
    def rows_run(self) -> ArrayLike:
        """The rows of the microbatches that run: `rows`, or () int32."""
        if self.limit is None:
            return self.rows
        last = jnp.where(self.limit > self.count, self.tail, 0)
        return self.size * jnp.minimum(self.limit, self.count) + last

    def scan(self, body: Callable[[T, Part], T], carry: T) -> T:
        """Runs `carry = body(carry, part)` for each microbatch, and returns `carry`.

        With `unroll=True` the program has no loop, and still runs one microbatch at a
        time.
        """

        def turn(carry: T, i: jax.Array) -> tuple[T, None]:
            return body(carry, self.part(i)), None

        for part in self.each():
            carry = match_varying(lambda carry, part=part: body(carry, part), carry)
        with jax.named_scope("accumax.microbatches"):
            if self.limit is not None:
                return self._first(body, carry, self.limit)
            if self.unroll is True:
                for i in range(self.count):
                    # XLA:GPU knows the first numbers of a sum before it adds the rest,
                    # and would keep all gradients (8 microbatches of 16 matrices: temp
                    # of 7.3 for 0.34). XLA:CPU drops a barrier before it schedules.
                    both = carry, after(carry, i)
                    carry, start = lax.optimization_barrier(both)
                    carry = body(carry, self.part(start))
            else:
                indices = jnp.arange(self.count, dtype=jnp.int32)
                carry, _ = lax.scan(turn, carry, indices, unroll=int(self.unroll))
            if self.tail:
                carry = body(carry, self.part(after(carry, self.count), True))
            return carry

    def _first(self, body: Callable[[T, Part], T], carry: T, limit: jax.Array) -> T:
        """Runs the first `limit` microbatches."""
        last = jnp.minimum(limit, self.count)

        def turn(both: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
            i, carry = both
            return i + 1, body(carry, self.part(i))

        def goes_on(both: tuple[jax.Array, T]) -> jax.Array:
            return both[0] < last

        _, carry = lax.while_loop(goes_on, turn, (jnp.int32(0), carry))
        if not self.tail:
            return carry

        def tail(carry: T) -> T:
            return body(carry, self.part(after(carry, self.count), True))

        return at_most_once(limit > self.count, tail, carry)

    def each(self) -> list[Part]:
        """Returns one microbatch of each size, to find the shapes of its outputs."""
        return [self.part(0), *([self.part(self.count, True)] if self.tail else [])]


@dataclasses.dataclass(frozen=True)
class Split:
    """How to divide calls; `split` makes it. All fields are static.

    Attributes:
      microbatch_size: the rows of a microbatch, or None.
      microbatches: the number of microbatches, or None.
      batch_argnums: positions and keywords of the arguments that hold rows.
      rng_argnums: positions and keywords of the arguments that are PRNG keys.
      unroll: how many microbatches the body of the scan has; True for no scan.
    """

    microbatch_size: int | None
    microbatches: int | None
    batch_argnums: tuple[Place, ...]
    rng_argnums: tuple[Place, ...]
    unroll: int | bool

    def rows(
        self,
        fun: Callable[..., Any],
        argnums: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[int, set[Place]]:
        """Returns the rows of a call, and where they are; arguments as for `parts`.

        Warns of rows that `batch_argnums` may have forgotten.

        Raises:
          TypeError, ValueError: the call does not fit.
        """
        call, rows, batches, keys = self._places(fun, argnums, args, kwargs)
        shared = {place: call[place] for place in call.keys() - batches - keys}
        warn_of_rows(shared, rows, argnums, self.batch_argnums)
        return rows, batches

    def per_device(
        self,
        devices: Devices,
        fun: Callable[..., Any],
        argnums: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple["Split", tuple[PartitionSpec, ...], dict[str, PartitionSpec]]:
        """Divides the rows of a call over devices; arguments as for `parts`.

        Returns:
          The `Split` on each device, and the specs of arguments and of keywords.

        Raises:
          TypeError, ValueError: the call does not fit, or the devices do not divide it.
        """
        rows, batches = self.rows(fun, argnums, args, kwargs)
        count, size = devices.divides, self.microbatch_size
        over = f"the {count} devices along reduce_axis={devices.names}"
        if rows % count:
            raise ValueError(
                f"The batch has {rows} rows, which {over} do not divide. Pass a "
                f"multiple of {count} rows; a loss with weighted=True can give padding "
                "no weight."
            )
        if size is None:
            each = count * (self.microbatches or 1)
            if rows % each:
                wanted = f"microbatches={self.microbatches}"
                do = f"{wanted} does"
                if count > 1:
                    do = f"{over} times {wanted}, that is {each}, do"
                raise ValueError(
                    f"The batch has {rows} rows, which {do} not divide. Pass a "
                    f"multiple of {each} rows, or microbatch_size."
                )
        elif size % count:
            raise ValueError(
                f"microbatch_size={size} counts the rows of a microbatch on all "
                f"devices, and {over} do not divide it. Pass a multiple of {count}."
            )
        own = dataclasses.replace(self, microbatch_size=size and size // count)
        call = (*range(len(args)), *kwargs)
        specs = {p: devices.rows if p in batches else PartitionSpec() for p in call}
        return (
            own,
            tuple(specs[n] for n in range(len(args))),
            {name: specs[name] for name in kwargs},
        )

    def parts(
        self,
        fun: Callable[..., Any],
        argnums: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
        devices: Devices = ONE,
        limit: ArrayLike | None = None,
    ) -> Parts:
        """Divides the call `fun(*args, **kwargs)`, differentiated at `argnums`.

        Microbatch i of k has rows i, k + i, 2 k + i, ... The tail has the last rows.
        With a `limit`, only so many microbatches run, each of consecutive rows. If
        the batch is sharded over devices, each microbatch is sharded in the same way
        and no row moves, provided that the number of devices divides `microbatch_size`
        and there is no tail. A microbatch of consecutive rows would be on one device.

        With several devices, the rows are those of one device; keys differ by device.

        Raises:
          TypeError, ValueError: the call does not fit.
        """
        call, rows, batches, keys = self._places(fun, argnums, args, kwargs)
        for place in keys:
            check_keys(place, call[place])
        call |= {place: devices.keys_of_device(call[place]) for place in keys}
        for place in call.keys() - batches - keys:
            check_no_key(place, call[place])
        size, count = self._sizes(rows)
        tail = rows - size * count
        limit = check_limit(limit, count + (tail > 0), self.unroll)
        if tail:
            _check_tail([call[place] for place in batches], rows, size)
        divide = functools.partial(
            rows_of_part,
            size=size,
            count=count,
            tail=tail,
            consecutive=limit is not None,
        )
        # A tuple, because JAX cannot sort a dict of positions and keywords.
        cut = divide(tuple(call[place] for place in batches))

        def part(i: ArrayLike, last: bool = False) -> Part:
            def own() -> tuple[tuple, dict[str, Any]]:
                here = call | dict(zip(batches, cut(i, last), strict=True))
                here |= {place: fold_in(call[place], i) for place in keys}
                by_place = tuple(here[n] for n in range(len(args)))
                return by_place, {name: here[name] for name in kwargs}

            alone = last or self.unroll is True
            return Part(own, i, tail if last else size, last, limit is not None, alone)

        unit = 2 ** (size - 1).bit_length() if tail else size
        places = frozenset(batches)
        return Parts(
            rows, size, count, tail, unit, places, divide, part, self.unroll, limit
        )

    def _places(
        self,
        fun: Callable[..., Any],
        argnums: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> tuple[dict[Place, PyTree], int, set[Place], set[Place]]:
        """Returns the arguments by place, the rows, where they are, where keys are."""
        batches = find("batch_argnums", self.batch_argnums, fun, args, kwargs)
        keys = find("rng_argnums", self.rng_argnums, fun, args, kwargs)
        for name, places in (("batch_argnums", batches), ("rng_argnums", keys)):
            shared = sorted(places & set(argnums), key=str)
            if shared:
                raise ValueError(
                    f"{name}={getattr(self, name)} names argument {shared[0]}, which "
                    "is differentiated: it is the same for all microbatches. Take it "
                    f"out of {name}, or out of argnums."
                )
        if batches & keys:
            raise ValueError(
                f"batch_argnums={self.batch_argnums} and "
                f"rng_argnums={self.rng_argnums} share an argument. "
                "One key for each row belongs in batch_argnums alone."
            )
        call = {**dict(enumerate(args)), **kwargs}
        rows = check_rows({place: call[place] for place in batches})
        return call, rows, batches, keys

    def _sizes(self, rows: int) -> tuple[int, int]:
        if self.microbatch_size is not None:
            # A smaller batch, such as the last of an epoch, is one microbatch.
            size = min(self.microbatch_size, rows)
            return size, rows // size
        count = self.microbatches or 1
        if rows % count:
            raise ValueError(
                f"The batch has {rows} rows, which microbatches={count} does not "
                "divide. Pass microbatch_size: its last microbatch may be smaller."
            )
        return rows // count, count


def split(
    microbatch_size: Any,
    microbatches: Any,
    batch_argnums: Any,
    rng_argnums: Any,
    unroll: Any = 1,
) -> Split:
    """Checks the options and returns their `Split`."""
    if (microbatch_size is None) == (microbatches is None):
        raise ValueError(
            f"Pass exactly one of microbatch_size, the rows of a microbatch, and "
            f"microbatches, their number; got {microbatch_size=} and {microbatches=}."
        )
    if microbatches is None:
        microbatch_size = check_positive("microbatch_size", microbatch_size)
    else:
        microbatches = check_positive("microbatches", microbatches)
    batch = check_places("batch_argnums", batch_argnums)
    if not batch:
        raise ValueError(
            "batch_argnums is empty: name at least one argument whose leaves hold the "
            "rows of the batch along their first axis."
        )
    keys = check_places("rng_argnums", rng_argnums)
    if unroll is not True:  # False is 1, as for `lax.scan`
        unroll = check_positive("unroll", 1 if unroll is False else unroll)
    return Split(microbatch_size, microbatches, batch, keys, unroll)


def _check_tail(batches: PyTree, rows: int, size: int) -> None:
    for x in jax.tree.leaves(batches):
        sharding = jax.typeof(jnp.asarray(x)).sharding
        axes = explicit_axes(sharding.mesh)
        first = only(PartitionSpec(*sharding.spec[:1]), axes)
        if any(first):
            raise ValueError(
                f"The batch has {rows} rows, which microbatch_size={size} does not "
                f"divide, and they are sharded over the explicit axes {first[0]}: "
                "rows would have to leave their devices. Choose a microbatch_size that "
                "divides them, or pass reduce_axis, with which each device divides "
                "its own."
            )
