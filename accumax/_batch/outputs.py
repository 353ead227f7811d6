"""Reductions of aux over microbatches: mean, sum, last, stack and concat."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _tree
from .._devices.one import Devices
from .._types import ArrayLike, PyTree
from .._xla.varying import zeros
from .split import Part, Parts


class AuxReduction(NamedTuple):
    """How to reduce one leaf of the aux over microbatches.

    `like` is the leaf of one microbatch, a `ShapeDtypeStruct`. `parts` are the
    microbatches of the call. A carry is any tree of arrays.

    Attributes:
      init: `(like, parts) -> carry`.
      add: `(carry, x, part, weight) -> carry` adds the leaf `x` of one microbatch,
        which weighs `weight`, () float.
      combine: `(carry, devices) -> carry` combines the carries of all devices.
      result: `(carry, like, parts, weight) -> array`; `weight` is the sum of all.
      check: `(where, like, tail, parts)` raises if the leaf, or its shape in the tail,
        cannot be reduced in this way.
      by_device: whether the result is sharded over devices along the first axis.
    """

    init: Callable[[jax.ShapeDtypeStruct, Parts], Any]
    add: Callable[[Any, Any, Part, jax.Array], Any]
    combine: Callable[[Any, Devices], Any]
    result: Callable[[Any, jax.ShapeDtypeStruct, Parts, jax.Array], jax.Array]
    check: Callable[[str, Any, Any, Parts], None]
    by_device: bool = False


def _mean() -> AuxReduction:
    def add(carry: Any, x: Any, part: Part, weight: jax.Array) -> Any:
        # Weight 0 adds 0, without a product: the mean over no items is 0/0.
        product = weight.astype(carry.dtype) * jnp.asarray(x, carry.dtype)
        return carry + jnp.where(weight != 0, product, 0)

    def result(carry: Any, like: Any, parts: Parts, weight: jax.Array) -> jax.Array:
        mean = carry / jnp.where(weight != 0, weight, 1).astype(carry.dtype)
        return mean.astype(like.dtype)

    def check(where: str, like: Any, tail: Any, parts: Parts) -> None:
        if not _tree.is_differentiable(like):
            raise TypeError(
                f'{where} is {_tree.describe(like)}, of which aux="mean" would not be '
                f'{like.dtype}. Choose "sum", "last", "stack" or "concat" for it, or '
                "return it as a float."
            )
        _check_alike(where, "mean", like, tail, parts)

    return AuxReduction(
        init=lambda like, parts: zeros(like, _tree.wide(like.dtype)),
        add=add,
        combine=lambda carry, devices: devices.sum(carry),
        result=result,
        check=check,
    )


def _sum() -> AuxReduction:
    def init(like: jax.ShapeDtypeStruct, parts: Parts) -> jax.Array:
        dtype = _sum_dtype(like)
        if jnp.issubdtype(dtype, jnp.inexact):
            dtype = _tree.wide(dtype)
        return zeros(like, dtype)

    def check(where: str, like: Any, tail: Any, parts: Parts) -> None:
        if jnp.issubdtype(like.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{where} is {_tree.describe(like)}, which cannot be added. Choose "
                '"last" or "stack" for it.'
            )
        _check_alike(where, "sum", like, tail, parts)

    return AuxReduction(
        init=init,
        add=lambda carry, x, part, weight: carry + jnp.asarray(x, carry.dtype),
        combine=lambda carry, devices: devices.sum(carry),
        result=lambda carry, like, *_: carry.astype(_sum_dtype(like)),
        check=check,
    )


def _last() -> AuxReduction:
    return AuxReduction(
        init=lambda like, parts: zeros(like),
        add=lambda carry, x, part, weight: _tree.strong(x),
        combine=lambda carry, devices: devices.last(carry),
        result=lambda carry, *_: carry,
        check=lambda where, *what: _check_alike(where, "last", *what),
    )


def _stack() -> AuxReduction:
    def init(like: jax.ShapeDtypeStruct, parts: Parts) -> jax.Array:
        return _zeros(like, 0, (parts.count + (parts.tail > 0), *like.shape))

    def add(carry: Any, x: Any, part: Part, weight: jax.Array) -> Any:
        return lax.dynamic_update_index_in_dim(carry, _tree.strong(x), part.index, 0)

    return AuxReduction(
        init=init,
        add=add,
        combine=lambda carry, devices: carry,
        result=lambda carry, *_: carry,
        check=lambda where, *what: _check_alike(where, "stack", *what),
        by_device=True,
    )


def _concat() -> AuxReduction:
    def init(like: jax.ShapeDtypeStruct, parts: Parts) -> Any:
        axis, shape = 0 if parts.consecutive else 1, list(like.shape)
        shape.insert(axis, parts.count)
        whole = _zeros(like, axis, tuple(shape))
        shape = parts.tail, *like.shape[1:]
        rest = jax.ShapeDtypeStruct(shape, like.dtype, sharding=like.sharding)
        return whole, zeros(rest)

    def add(carry: Any, x: Any, part: Part, weight: jax.Array) -> Any:
        (whole, rest), x = carry, _tree.strong(x)
        if part.tail:
            return whole, x
        axis = 0 if part.consecutive else 1
        return lax.dynamic_update_index_in_dim(whole, x, part.index, axis), rest

    def result(carry: Any, like: Any, parts: Parts, weight: jax.Array) -> jax.Array:
        whole, rest = carry
        whole = whole.reshape(-1, *whole.shape[2:])  # in the order of the batch
        return jnp.concatenate([whole, rest]) if parts.tail else whole

    def check(where: str, like: Any, tail: Any, parts: Parts) -> None:
        for rows, x in ((parts.size, like), (parts.tail, tail)):
            if x is not None and x.shape[:1] != (rows,):
                raise ValueError(
                    f'{where} is {_tree.describe(x)} for {rows} rows; aux="concat" '
                    "needs one value a row, along the first axis. Choose "
                    '"stack" for one value a microbatch.'
                )

    return AuxReduction(
        init=init,
        add=add,
        combine=lambda carry, devices: carry,
        result=result,
        check=check,
        by_device=True,
    )


def _of_user(how: Any) -> AuxReduction:
    """Wraps a user's reduction, such as an `optax.microbatching.Accumulator`."""

    def combine(carry: Any, devices: Devices) -> Any:
        raise ValueError(
            f"aux={how!r} does not say what several devices have together. Choose one "
            f"of {tuple(_NAMED)} with reduce_axis."
        )

    return AuxReduction(
        init=lambda like, parts: how.init(like),
        add=lambda carry, x, part, weight: how.update(carry, x, part.index),
        combine=combine,
        result=lambda carry, *_: how.finalize(carry),
        check=lambda where, *what: _check_alike(where, repr(how), *what),
    )


_NAMED = {
    "mean": _mean(),
    "sum": _sum(),
    "last": _last(),
    "stack": _stack(),
    "concat": _concat(),
}


def _is_own(how: Any) -> bool:
    return all(callable(getattr(how, x, None)) for x in ("init", "update", "finalize"))


def _reduction(how: Any) -> AuxReduction:
    return _NAMED[how] if isinstance(how, str) else _of_user(how)


class Leaf(NamedTuple):
    """A leaf of a microbatch's output: how to reduce it, and its shape and dtype."""

    how: AuxReduction
    like: jax.ShapeDtypeStruct


class Reducer(NamedTuple):
    """Reduces a tree of outputs over the microbatches of a call.

    Attributes:
      parts: the microbatches.
      structure: the structure of the tree.
      leaves: its leaves.
    """

    parts: Parts
    structure: Any
    leaves: list[Leaf]

    def init(self) -> list[Any]:
        return [how.init(like, self.parts) for how, like in self.leaves]

    def add(
        self, sums: list[Any], tree: PyTree, part: Part, weight: ArrayLike
    ) -> list[Any]:
        """Adds `tree`, the output of a microbatch that weighs `weight`."""
        weight = jnp.asarray(weight, float)
        each = zip(self.leaves, sums, jax.tree.leaves(tree), strict=True)
        return [leaf.how.add(a, x, part, weight) for leaf, a, x in each]

    def combine(self, devices: Devices, sums: list[Any]) -> list[Any]:
        """Combines the sums of all devices, except for "stack" and "concat"."""
        pairs = zip(self.leaves, sums, strict=True)
        return [leaf.how.combine(a, devices) for leaf, a in pairs]

    def result(self, sums: list[Any], weight: ArrayLike) -> PyTree:
        """Returns the reduced tree; `weight` is the sum over all microbatches."""
        weight = jnp.asarray(weight, float)
        each = zip(self.leaves, sums, strict=True)
        return self.structure.unflatten(
            [how.result(a, like, self.parts, weight) for (how, like), a in each]
        )


def check_reductions(reductions: PyTree) -> PyTree:
    """Checks and returns `reductions`, a tree of names and of users' reductions.

    Raises:
      ValueError: a reduction is unknown.
    """
    leaves = jax.tree_util.tree_leaves_with_path(reductions, is_leaf=_is_own)
    for path, how in leaves:
        if not _is_own(how) and not (isinstance(how, str) and how in _NAMED):
            raise ValueError(
                f"aux{jax.tree_util.keystr(path)}={how!r} must be one of "
                f"{tuple(_NAMED)}, an object with init, update and finalize, or a tree "
                "of them that is a prefix of what the function returns."
            )
    return reductions


def check_aux_wanted(reductions: PyTree, has_aux: bool) -> None:
    """Checks that there is an aux to reduce.

    Raises:
      ValueError: there is no aux, and the reductions are not the default.
    """
    if not has_aux and reductions != "mean":
        raise ValueError(
            f"aux={reductions!r} says how to reduce what comes with the loss, and "
            "without has_aux=True nothing does. Pass has_aux=True, or leave aux away."
        )


def check_aux_leaves(aux: PyTree) -> None:
    """Checks that all leaves of the aux are arrays or numbers.

    Raises:
      TypeError: a leaf is neither.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(aux):
        if _tree.dtype_of(x) is None:
            raise TypeError(
                f"aux{jax.tree_util.keystr(path)} is {x!r}; expected an array or a "
                "number, which microbatches can be reduced to. Return it otherwise."
            )


def check_each_reduction(reductions: PyTree, losses: int | None) -> list[PyTree]:
    """Returns the reductions of each loss, from one for all or a tuple of them.

    `losses` is the number of losses, or None for a loss that is not in a sequence.
    """
    if losses is None:
        return [check_reductions(reductions)]
    if not isinstance(reductions, (tuple, list)):
        return [check_reductions(reductions)] * losses
    if len(reductions) != losses:
        raise ValueError(
            f"aux={reductions!r} has {len(reductions)} entries for {losses} loss "
            "functions. Pass one for each, or one for all that is not a tuple."
        )
    return [check_reductions(one) for one in reductions]


def aux_specs(reductions: PyTree, devices: Devices) -> PyTree:
    """Returns the specs of the reduced aux over devices, a pytree prefix."""

    def spec(how: Any) -> PartitionSpec:
        return devices.rows if _reduction(how).by_device else PartitionSpec()

    return jax.tree.map(spec, reductions, is_leaf=_is_own)


def reducer(
    reductions: PyTree, shapes: PyTree, tail_shapes: PyTree, parts: Parts
) -> Reducer:
    """Makes the `Reducer` of a tree with `shapes`, and with `tail_shapes` in the tail.

    Raises:
      ValueError: `reductions` is not a prefix of the tree, or a shape does not fit.
      TypeError: a dtype does not fit.
    """
    try:
        each = jax.tree.broadcast(reductions, shapes, is_leaf=_is_own)
    except ValueError:
        raise ValueError(
            f"aux={reductions!r} must be a prefix of the aux that the function "
            f"returned, {_tree.outline(shapes)}. Pass one reduction for all of it, "
            "or a tree with its keys."
        ) from None
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    if parts.tail and jax.tree.structure(tail_shapes) != structure:
        raise ValueError(
            f"The function returned {_tree.outline(shapes)} for {parts.size} rows "
            f"and {_tree.outline(tail_shapes)} for the last {parts.tail}; it must "
            "return one structure, or microbatch_size must divide the batch."
        )
    tails = jax.tree.leaves(tail_shapes) if parts.tail else [None] * len(paths)
    leaves = []
    for how, (path, like), tail in zip(
        jax.tree.leaves(each, is_leaf=_is_own), paths, tails, strict=True
    ):
        where = f"aux{jax.tree_util.keystr(path)}"
        reduction = _reduction(how)
        reduction.check(where, like, tail, parts)
        dtype, sharding = _tree.dtype_of(like), getattr(like, "sharding", None)
        struct = jax.ShapeDtypeStruct(like.shape, dtype, sharding=sharding)
        leaves.append(Leaf(reduction, struct))
    return Reducer(parts, structure, leaves)


def _check_alike(where: str, how: str, like: Any, tail: Any, parts: Parts) -> None:
    if tail is not None and tail.shape != like.shape:
        raise ValueError(
            f"{where} is {_tree.describe(like)} for {parts.size} rows and "
            f'{_tree.describe(tail)} for the last {parts.tail}, which aux="{how}" '
            'cannot reduce. Choose "concat" for one value a row, or a microbatch_size '
            f"that divides the {parts.rows} rows of the batch."
        )


def _zeros(like: jax.ShapeDtypeStruct, new: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns zeros of `shape`, that of `like` with one more axis at `new`."""
    sharding = like.sharding
    if isinstance(sharding, NamedSharding):
        spec = [*sharding.spec]
        spec.insert(new, None)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return zeros(jax.ShapeDtypeStruct(shape, like.dtype, sharding=sharding))


def _sum_dtype(like: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(jnp.sum, like).dtype  # an integer for booleans
