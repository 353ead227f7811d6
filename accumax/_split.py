"""A call in parts: which arguments hold rows and keys, and which rows go together."""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _numerics as numerics
from ._types import ArrayLike, PyTree

T = TypeVar("T")
# Where a call has an argument: a position, or a keyword. As users write it.
Place: TypeAlias = int | str
Places: TypeAlias = Place | Sequence[Place]


@dataclasses.dataclass(frozen=True)
class Part:
    """One microbatch of a call.

    Attributes:
      args, kwargs: the call for this microbatch.
      index: () integer, which one it is.
      rows: how many it has.
      tail: whether it is the last, smaller one.
    """

    args: tuple
    kwargs: dict[str, Any]
    index: ArrayLike
    rows: int
    tail: bool


@dataclasses.dataclass(frozen=True)
class Parts:
    """The microbatches of one call.

    Attributes:
      rows: the rows of the whole batch.
      size: the rows of a microbatch.
      count: the microbatches of `size` rows.
      tail: the rows of the one that is smaller, 0 if there is none.
      unit: the rows that have the weight 1 in a mean over rows: a microbatch; if not
        all are equal, a power of two that makes all weights exact and none above 1.
      places: where the call has the arguments that are divided.
      divide: `(tree) -> ((i) -> tree)`, the rows of microbatch i of arrays that have a
        row for each of the batch.
      part: `(i) -> Part`, for i from 0 to `count`, which may be traced below `count`.
    """

    rows: int
    size: int
    count: int
    tail: int
    unit: int
    places: frozenset[Place]
    divide: Callable[[PyTree], Callable[[ArrayLike], PyTree]]
    part: Callable[[ArrayLike], Part]

    def scan(self, body: Callable[[T, Part], T], carry: T, unroll: int | bool = 1) -> T:
        """`carry` after `body(carry, part)` for each microbatch in turn."""

        def turn(carry: T, i: jax.Array) -> tuple[T, None]:
            return body(carry, self.part(i)), None

        with jax.named_scope("accumax.microbatches"):
            indices = jnp.arange(self.count, dtype=jnp.int32)
            carry, _ = lax.scan(turn, carry, indices, unroll=unroll)
            return body(carry, self.part(self.count)) if self.tail else carry


@dataclasses.dataclass(frozen=True)
class Split:
    """How calls are to be divided; `split` makes it. All fields are static.

    Attributes:
      microbatch_size: the rows of a microbatch, or None.
      microbatches: the number of microbatches, or None.
      batch_argnums: positions and keywords of the arguments that hold rows.
      rng_argnums: positions and keywords of the arguments that are PRNG keys.
    """

    microbatch_size: int | None
    microbatches: int | None
    batch_argnums: tuple[Place, ...]
    rng_argnums: tuple[Place, ...]

    def parts(
        self,
        fun: Callable[..., Any],
        argnums: tuple[int, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Parts:
        """Divides the call `fun(*args, **kwargs)`, differentiated at `argnums`.

        Microbatch i of k has rows i, k + i, 2 k + i, ... Of a batch that is sharded
        over devices, each microbatch is then sharded alike and no row moves; that of
        consecutive rows would be on one device. The tail has the last rows.

        Raises:
          TypeError, ValueError: the call does not fit.
        """
        batches = self._find("batch_argnums", fun, args, kwargs)
        keys = self._find("rng_argnums", fun, args, kwargs)
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
                f"{self.batch_argnums=} and {self.rng_argnums=} share an argument. "
                "One key for each row belongs in batch_argnums alone."
            )

        call = {**dict(enumerate(args)), **kwargs}
        rows = _rows({place: call[place] for place in batches})
        for place in keys:
            _check_keys(place, call[place])
        size, count = self._sizes(rows)
        tail = rows - size * count

        def is_tail(i: ArrayLike) -> bool:
            return isinstance(i, int) and i == count

        def divide(tree: PyTree) -> Callable[[ArrayLike], PyTree]:
            tree = jax.tree.map(jnp.asarray, tree)

            def columns(x: jax.Array) -> jax.Array:
                return x[: rows - tail].reshape(size, count, *x.shape[1:])

            divided = jax.tree.map(columns, tree)

            def cut(i: ArrayLike) -> PyTree:
                if is_tail(i):
                    return jax.tree.map(lambda x: x[rows - tail :], tree)
                # By index, because a transposed batch would be a second one in memory.
                return jax.tree.map(
                    lambda x: lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False),
                    divided,
                )

            return cut

        # A tuple, because JAX cannot sort a dict of positions and keywords.
        cut = divide(tuple(call[place] for place in batches))

        def part(i: ArrayLike) -> Part:
            here = call | dict(zip(batches, cut(i), strict=True))
            here |= {place: _fold_in(call[place], i) for place in keys}
            return Part(
                tuple(here[n] for n in range(len(args))),
                {name: here[name] for name in kwargs},
                i,
                tail if is_tail(i) else size,
                is_tail(i),
            )

        unit = 2 ** (size - 1).bit_length() if tail else size
        return Parts(rows, size, count, tail, unit, frozenset(batches), divide, part)

    def _sizes(self, rows: int) -> tuple[int, int]:
        if self.microbatch_size is not None:
            # A batch smaller than a microbatch is one: the last one of an epoch.
            size = min(self.microbatch_size, rows)
            return size, rows // size
        count = self.microbatches or 1
        if rows % count:
            raise ValueError(
                f"The batch has {rows} rows, which microbatches={count} does not "
                "divide. Pass microbatch_size: its last microbatch may be smaller."
            )
        return rows // count, count

    def _find(
        self, name: str, fun: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> set[Place]:
        """Where the call has the arguments that `name` lists."""
        names = _parameters(fun)
        found = set()
        for place in getattr(self, name):
            at = place
            if isinstance(at, int):
                at = at + len(args) if at < 0 else at
                if at >= len(args) and at < len(names):
                    at = names[at]  # it may have been passed by keyword
            elif at not in kwargs and at in names:
                at = names.index(at)  # or by position
            if not (0 <= at < len(args) if isinstance(at, int) else at in kwargs):
                raise ValueError(
                    f"{name}={getattr(self, name)} names argument {place!r}, but the "
                    f"call has {len(args)} positional arguments (0 to {len(args) - 1}) "
                    f"and the keywords {sorted(kwargs)}."
                )
            found.add(at)
        return found


def split(
    microbatch_size: Any, microbatches: Any, batch_argnums: Any, rng_argnums: Any
) -> Split:
    """The `Split` for these options, which are checked."""
    if (microbatch_size is None) == (microbatches is None):
        raise ValueError(
            f"Pass exactly one of microbatch_size, the rows of a microbatch, and "
            f"microbatches, their number; got {microbatch_size=} and {microbatches=}."
        )
    if microbatches is None:
        microbatch_size = check_positive("microbatch_size", microbatch_size)
    else:
        microbatches = check_positive("microbatches", microbatches)
    batch = _check_places("batch_argnums", batch_argnums)
    if not batch:
        raise ValueError(
            "batch_argnums is empty: name at least one argument whose leaves hold the "
            "rows of the batch along their first axis."
        )
    keys = _check_places("rng_argnums", rng_argnums)
    return Split(microbatch_size, microbatches, batch, keys)


def check_positive(name: str, value: Any) -> int:
    """`value`, a static integer of at least 1."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except (TypeError, jax.errors.TracerIntegerConversionError):
        raise TypeError(
            f"{name}={value!r} must be an integer of at least 1, known before tracing."
        ) from None
    if number < 1:
        raise ValueError(f"{name}={value!r} must be at least 1.")
    return number


def check_argnums(argnums: Any) -> tuple[int, ...]:
    """`argnums` as a tuple of positions."""
    places = _check_places("argnums", argnums)
    positions = tuple(n for n in places if isinstance(n, int))
    if len(positions) < len(places) or not positions:
        raise TypeError(
            f"{argnums=} must be an integer or a tuple of integers: the positions of "
            "what is differentiated."
        )
    return positions


def at(argnums: tuple[int, ...], args: tuple) -> tuple[int, ...]:
    """`argnums`, of which some may be negative, as positions in `args`."""
    positions = tuple(n + len(args) if n < 0 else n for n in argnums)
    for n, position in zip(argnums, positions, strict=True):
        if not 0 <= position < len(args):
            raise ValueError(
                f"argnums={argnums} names argument {n}, but the call has {len(args)} "
                "positional arguments. What is differentiated is passed by position."
            )
    if len(set(positions)) < len(positions):
        raise ValueError(f"argnums={argnums} names an argument twice.")
    return positions


def _check_places(name: str, value: Any) -> tuple[Place, ...]:
    def place(x: Any) -> Place:
        if isinstance(x, str):
            return x
        try:
            if isinstance(x, (bool, np.bool_)):
                raise TypeError
            return operator.index(x)
        except TypeError:
            raise TypeError(
                f"{name}={value!r} must be a position (an integer), the name of a "
                "keyword argument, or a tuple of them."
            ) from None

    several = isinstance(value, (tuple, list, set, frozenset))
    return tuple(place(x) for x in (value if several else (value,)))


def _parameters(fun: Callable[..., Any]) -> list[str]:
    """The names of the arguments that `fun` takes by position, in their order."""
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):  # some callables have none
        return []
    keyword = inspect.Parameter.KEYWORD_ONLY
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p.name for p in parameters if p.kind not in (keyword, *variadic)]


def _rows(batches: dict[Place, PyTree]) -> int:
    """The length that the first axis of all leaves has."""
    lengths = {}
    for place, batch in batches.items():
        for path, x in jax.tree_util.tree_leaves_with_path(batch):
            leaf = f"leaf {jax.tree_util.keystr(path)} of " if path else ""
            where = f"{leaf}batch argument {place!r}"
            if numerics.dtype_of(x) is None:
                raise TypeError(
                    f"{where} is {x!r}; expected an array with the rows of the batch "
                    "along its first axis."
                )
            if not np.shape(x):
                raise ValueError(
                    f"{where} is a scalar, {numerics.describe(x)}; expected an array "
                    "with the rows of the batch along its first axis. Pass what is the "
                    "same for all rows in an argument that batch_argnums does not name."
                )
            lengths[where] = np.shape(x)[0]
    if not lengths:
        raise ValueError(
            f"The batch arguments {list(batches)} hold no arrays. Let batch_argnums "
            "name those that do."
        )
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{n} in {where}" for where, n in lengths.items())
        raise ValueError(
            f"All leaves of the batch must have the same number of rows; got {listed}."
        )
    rows = next(iter(lengths.values()))
    if rows == 0:
        raise ValueError("The batch is empty: its leaves have 0 rows. Skip this call.")
    return rows


def _check_keys(place: Place, keys: PyTree) -> None:
    leaves = jax.tree.leaves(keys)
    for key in leaves or [None]:
        dtype = numerics.dtype_of(key)
        typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
        raw = dtype == jnp.uint32 and np.ndim(key) == 1
        if not (typed and np.shape(key) == ()) and not raw:
            raise TypeError(
                f"rng_argnums names argument {place!r}, where {numerics.describe(key)} "
                "came; expected one PRNG key, such as jax.random.key(0), or a tree of "
                "them. An array of keys, one a row, belongs in batch_argnums."
            )


def _fold_in(keys: PyTree, i: ArrayLike) -> PyTree:
    def fold(key: Any) -> jax.Array:
        return jax.random.fold_in(jnp.asarray(key), jnp.asarray(i, jnp.uint32))

    return jax.tree.map(fold, keys)
