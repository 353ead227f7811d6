"""Find and check the arguments of a call: rows, PRNG keys, differentiated ones."""

import inspect
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .. import _tree
from .._types import PyTree

# How users name an argument of a call: by its position or its keyword.
Place: TypeAlias = int | str
Places: TypeAlias = Place | Sequence[Place]


def check_positive(name: str, value: Any) -> int:
    """Returns `value` as an int; it must be static and at least 1."""
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


def check_limit(limit: Any, count: int, unroll: int | bool) -> jax.Array | None:
    """Returns how many of `count` microbatches run, () int32; None for all.

    Raises:
      TypeError: it is not a () integer.
      ValueError: it is known and not from 0 to `count`, or `unroll` is not 1.
    """
    if limit is None:
        return None
    dtype = _tree.dtype_of(limit)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or jnp.shape(limit):
        raise TypeError(
            f"num_microbatches={limit!r} must be an integer, or an array of shape () "
            "of an integer dtype: the number of microbatches that run."
        )
    if unroll is True or unroll != 1:
        raise ValueError(
            f"num_microbatches needs a loop, and {unroll=} leaves none or another one. "
            "Leave unroll away."
        )
    if not isinstance(limit, Tracer) and not 0 <= int(limit) <= count:
        raise ValueError(
            f"num_microbatches={int(limit)} must be from 0 to {count}, the number of "
            "microbatches in this call."
        )
    return jnp.clip(jnp.asarray(limit), 0, count).astype(jnp.int32)


def check_argnums(argnums: Any) -> tuple[int, ...]:
    """`argnums` as a tuple of positions."""
    places = check_places("argnums", argnums)
    positions = tuple(n for n in places if isinstance(n, int))
    if len(positions) < len(places) or not positions:
        raise TypeError(
            f"{argnums=} must be an integer or a tuple of integers: the positions of "
            "what is differentiated."
        )
    return positions


def at(argnums: tuple[int, ...], args: tuple) -> tuple[int, ...]:
    """Returns `argnums` as positions in `args`, without negative numbers."""
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


def check_places(name: str, value: Any) -> tuple[Place, ...]:
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


def check_names(**lists: Any) -> list[tuple[str, ...]]:
    """Returns each list of field names as a tuple; no name may occur twice."""
    checked = []
    for option, names in lists.items():
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"{option}={names} must be names of fields.")
        checked.append(names)
    flat = [name for names in checked for name in names]
    for name in flat:
        if flat.count(name) > 1:
            raise ValueError(f"The field {name!r} is named more than once in {lists}.")
    return checked


def parameters(fun: Callable[..., Any]) -> tuple[list[str], bool]:
    """Returns the argument names of `fun`, in order, and whether it has a `**`."""
    try:
        found = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return [], False
    any_name = inspect.Parameter.VAR_KEYWORD
    variadic = inspect.Parameter.VAR_POSITIONAL, any_name
    names = [p.name for p in found if p.kind not in variadic]
    return names, any(p.kind == any_name for p in found)


def check_rows(batches: dict[Place, PyTree]) -> int:
    """Returns the number of rows, the length of the first axis of all leaves."""
    lengths = {}
    for place, batch in batches.items():
        for path, x in jax.tree_util.tree_leaves_with_path(batch):
            leaf = f"leaf {jax.tree_util.keystr(path)} of " if path else ""
            where = f"{leaf}batch argument {place!r}"
            text = getattr(getattr(x, "dtype", None), "kind", "") in tuple("OSUMm")
            if text or _tree.dtype_of(x) is None:
                raise TypeError(
                    f"{where} is {x!r}; expected an array with the rows of the batch "
                    "along its first axis."
                )
            if not np.shape(x):
                raise ValueError(
                    f"{where} is a scalar, {_tree.describe(x)}; expected an array "
                    "with the rows of the batch along its first axis. Pass what is the "
                    "same for all rows in an argument that batch_argnums does not name."
                )
            lengths[where] = np.shape(x)[0]
    if not lengths:
        raise ValueError(
            f"The batch arguments {list(batches)} hold no arrays; a module is not a "
            "batch. Let batch_argnums name the arguments whose arrays have the rows "
            "along their first axis."
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


def rows_of(
    listed: tuple[Place, ...],
    fun: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> int:
    """Returns the number of rows in a call; `listed` is its batch_argnums.

    Raises:
      TypeError, ValueError: `listed` does not fit the call.
    """
    call = {**dict(enumerate(args)), **kwargs}
    found = find("batch_argnums", listed, fun, args, kwargs)
    return check_rows({place: call[place] for place in found})


def _is_key(x: Any) -> bool:
    dtype = _tree.dtype_of(x)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return typed and np.shape(x) == ()


def check_no_key(place: Place, tree: PyTree) -> None:
    """Checks that `tree`, which all microbatches share, holds no PRNG key.

    Raises:
      ValueError: it holds a typed key. A raw key may be data and gives a warning.
    """
    remedy = (
        "every microbatch would have the same random numbers. Pass the key in an "
        f"argument of its own, and its position: rng_argnums={place!r} if it is this "
        "one. If the same numbers are meant, let the function close over the key."
    )
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        where = f"Argument {place!r}{jax.tree_util.keystr(path)}"
        if _is_key(x):
            raise ValueError(
                f"{where} is a PRNG key that rng_argnums does not name: {remedy}"
            )
        if _tree.dtype_of(x) == jnp.uint32 and np.shape(x) in ((2,), (4,)):
            warnings.warn(
                f"{where} is {_tree.describe(x)}, as keys of jax.random.PRNGKey "
                f"are. If it is one, {remedy}",
                stacklevel=2,
            )


def warn_of_rows(
    shared: dict[Place, PyTree],
    rows: int,
    argnums: tuple[int, ...],
    batch_argnums: tuple[Place, ...],
) -> None:
    """Warns of an argument that is not divided and has as many rows as the batch.

    That is an array, or all arrays of a tree that comes after the batch. One before it
    is rather a model, whose layers may be as wide as the batch is long. `rows` are
    those of the call: in a `jax.shard_map` of the user's, those of one device.
    """
    first = min((p for p in batch_argnums if isinstance(p, int)), default=0)
    for place, tree in shared.items():
        if place in argnums or rows == 1:
            continue
        before = isinstance(place, int) and place < first
        if before and not hasattr(tree, "shape"):
            continue
        leaves = [x for x in jax.tree.leaves(tree) if not isinstance(x, type)]
        shapes = [np.shape(x) for x in leaves if np.shape(x)]
        if shapes and all(shape[0] == rows for shape in shapes):
            warnings.warn(
                f"Argument {place!r} is {_tree.outline(tree)}, with as many rows as "
                "the batch, and goes whole to every microbatch, and to every device of "
                "a reduce_axis. If it holds rows of the batch, let batch_argnums name "
                f"it too: batch_argnums={(*batch_argnums, place)}.",
                stacklevel=2,
            )


def check_keys(place: Place, keys: PyTree) -> None:
    leaves = jax.tree.leaves(keys)
    for key in leaves or [None]:
        raw = _tree.dtype_of(key) == jnp.uint32 and np.ndim(key) == 1
        if not _is_key(key) and not raw:
            raise TypeError(
                f"rng_argnums names argument {place!r}, where {_tree.describe(key)} "
                "came; expected one PRNG key, such as jax.random.key(0), or a tree of "
                "them. An array of keys, one a row, belongs in batch_argnums."
            )


def find(
    name: str,
    listed: tuple[Place, ...],
    fun: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> set[Place]:
    """Returns where `fun(*args, **kwargs)` has the arguments in `listed`.

    Raises:
      ValueError: the call lacks such an argument; the message names the option `name`.
    """
    names, _ = parameters(fun)
    found = set()
    for place in listed:
        at = place
        if isinstance(at, int):
            at = at + len(args) if at < 0 else at
            if at >= len(args) and at < len(names):
                at = names[at]  # it may have been passed by keyword
        elif at not in kwargs and at in names:
            at = names.index(at)  # or by position
        if not (0 <= at < len(args) if isinstance(at, int) else at in kwargs):
            called = getattr(fun, "__name__", "the function")
            raise ValueError(
                f"{name}={listed} names argument {place!r}, but {called} is called "
                f"with {len(args)} positional arguments (0 to {len(args) - 1}) and "
                f"the keywords {sorted(kwargs)}."
            )
        found.add(at)
    return found
