"""What comes with a loss, from all microbatches: their mean, sum, last, or all."""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _tree
from .._devices.replicated import Axes
from .._types import ArrayLike, PyTree
from .._xla.varying import sharded
from .split import Part, Parts

AuxReduction: TypeAlias = Literal["mean", "sum", "last", "stack", "concat"]


class Leaf(NamedTuple):
    """A leaf of what comes from a microbatch: how to reduce it, its shape and dtype."""

    how: AuxReduction
    like: jax.ShapeDtypeStruct


class Reducer(NamedTuple):
    """The steps of a reduction over the microbatches of a call.

    Attributes:
      parts: the microbatches.
      structure: of the tree that comes from each.
      leaves: its leaves.
    """

    parts: Parts
    structure: Any
    leaves: list[Leaf]

    def init(self) -> list[Any]:
        return [self._zeros(how, like) for how, like in self.leaves]

    def add(
        self, sums: list[Any], tree: PyTree, part: Part, weight: ArrayLike
    ) -> list[Any]:
        """Takes in what a microbatch gave, which stands for `weight` items."""
        weight = jnp.asarray(weight, float)

        def added(leaf: Leaf, a: Any, x: Any) -> Any:
            match leaf.how:
                case "mean":
                    # A weight of 0 is not multiplied in: a mean over no items is 0/0.
                    product = weight.astype(a.dtype) * jnp.asarray(x, a.dtype)
                    return a + jnp.where(weight != 0, product, 0)
                case "sum":
                    return a + jnp.asarray(x, a.dtype)
                case "last":
                    return _tree.strong(x)
                case "stack":
                    x = _tree.strong(x)
                    return lax.dynamic_update_index_in_dim(a, x, part.index, 0)
            (whole, rest), x = a, _tree.strong(x)
            if part.tail:
                return whole, x
            return lax.dynamic_update_index_in_dim(whole, x, part.index, 1), rest

        each = zip(self.leaves, sums, jax.tree.leaves(tree), strict=True)
        return [added(leaf, a, x) for leaf, a, x in each]

    def over(self, axes: Axes, sums: list[Any]) -> list[Any]:
        """What all devices have together. Rows and microbatches stay where they are."""

        def reduced(leaf: Leaf, a: Any) -> Any:
            match leaf.how:
                case "mean" | "sum":
                    return axes.sum(a)
                case "last":
                    return axes.last(a)
            return a

        pairs = zip(self.leaves, sums, strict=True)
        return [reduced(leaf, a) for leaf, a in pairs]

    def result(self, sums: list[Any], weight: ArrayLike) -> PyTree:
        """The reduced tree; `weight` is that of all microbatches together."""
        weight = jnp.asarray(weight, float)

        def reduced(leaf: Leaf, a: Any) -> jax.Array:
            match leaf.how:
                case "mean":
                    mean = a / jnp.where(weight != 0, weight, 1).astype(a.dtype)
                    return mean.astype(leaf.like.dtype)
                case "sum":
                    return a.astype(_sum_dtype(leaf.like))
                case "last" | "stack":
                    return a
            whole, rest = a
            whole = whole.reshape(-1, *whole.shape[2:])  # in the order of the caller
            return jnp.concatenate([whole, rest]) if self.parts.tail else whole

        each = zip(self.leaves, sums, strict=True)
        return self.structure.unflatten([reduced(leaf, a) for leaf, a in each])

    def _zeros(self, how: AuxReduction, like: jax.ShapeDtypeStruct) -> Any:
        parts, shape = self.parts, like.shape
        match how:
            case "mean":
                return jnp.zeros(shape, _tree.wide(like.dtype))
            case "sum":
                dtype = _sum_dtype(like)
                if jnp.issubdtype(dtype, jnp.inexact):
                    dtype = _tree.wide(dtype)
                return jnp.zeros(shape, dtype)
            case "last":
                return jnp.zeros(shape, like.dtype)
            case "stack":
                count = parts.count + (parts.tail > 0)
                return _zeros(like, 0, (count, *shape))
        whole = _zeros(like, 1, (parts.size, parts.count, *shape[1:]))
        return whole, jnp.zeros((parts.tail, *shape[1:]), like.dtype)


def check_reductions(reductions: PyTree) -> PyTree:
    """`reductions`, a tree of `AuxReduction`.

    Raises:
      ValueError: one is unknown.
    """
    for path, how in jax.tree_util.tree_leaves_with_path(reductions):
        if not isinstance(how, str) or how not in get_args(AuxReduction):
            raise ValueError(
                f"aux{jax.tree_util.keystr(path)}={how!r} must be one of "
                f"{get_args(AuxReduction)}, or a tree of them that is a prefix of what "
                "the function returns."
            )
    return reductions


def check_aux_wanted(reductions: PyTree, has_aux: bool) -> None:
    """Checks that there is an aux to reduce.

    Raises:
      ValueError: there is none, and the reductions are not the default.
    """
    if not has_aux and reductions != "mean":
        raise ValueError(
            f"aux={reductions!r} says how to reduce what comes with the loss, and "
            "without has_aux=True nothing does. Pass has_aux=True, or leave aux away."
        )


def check_aux_leaves(aux: PyTree) -> None:
    """Checks that what came with a loss can be reduced.

    Raises:
      TypeError: a leaf is no array or number.
    """
    for path, x in jax.tree_util.tree_leaves_with_path(aux):
        if _tree.dtype_of(x) is None:
            raise TypeError(
                f"aux{jax.tree_util.keystr(path)} is {x!r}; expected an array or a "
                "number, which microbatches can be reduced to. Return it otherwise."
            )


def check_each_reduction(reductions: PyTree, losses: int | None) -> list[PyTree]:
    """`reductions` for each of several losses: one for all, or a tuple of as many.

    `losses`: how many, None for one that is not in a sequence.
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


def aux_specs(reductions: PyTree, axes: Axes) -> PyTree:
    """How the reduced trees of all devices make one: a prefix of it."""
    every = ("stack", "concat")
    return jax.tree.map(
        lambda how: axes.rows if how in every else PartitionSpec(), reductions
    )


def reducer(
    reductions: PyTree, shapes: PyTree, tail_shapes: PyTree, parts: Parts
) -> Reducer:
    """How to reduce a tree that has `shapes` in a microbatch, and others in the tail.

    Raises:
      ValueError: `reductions` is no prefix of it, or a shape does not fit.
      TypeError: a dtype does not fit.
    """
    try:
        each = jax.tree.broadcast(reductions, shapes)
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
        jax.tree.leaves(each), paths, tails, strict=True
    ):
        where = f"aux{jax.tree_util.keystr(path)}"
        _check(where, how, like, tail, parts)
        dtype, sharding = _tree.dtype_of(like), getattr(like, "sharding", None)
        struct = jax.ShapeDtypeStruct(like.shape, dtype, sharding=sharding)
        leaves.append(Leaf(how, struct))
    return Reducer(parts, structure, leaves)


def _check(
    where: str, how: AuxReduction, like: Any, tail: Any | None, parts: Parts
) -> None:
    got = _tree.describe(like)
    if how == "mean" and not _tree.is_differentiable(like):
        raise TypeError(
            f'{where} is {got}, of which aux="mean" would not be {like.dtype}. Choose '
            '"sum", "last", "stack" or "concat" for it, or return it as a float.'
        )
    if how == "sum" and jnp.issubdtype(like.dtype, jax.dtypes.extended):
        raise TypeError(
            f'{where} is {got}, which cannot be added. Choose "last" or "stack" for it.'
        )
    if how != "concat":
        if tail is not None and tail.shape != like.shape:
            raise ValueError(
                f"{where} is {got} for {parts.size} rows and {_tree.describe(tail)} "
                f'for the last {parts.tail}, which aux="{how}" cannot reduce. Choose '
                '"concat" for one value a row, or a microbatch_size that divides the '
                f"{parts.rows} rows of the batch."
            )
        return
    for rows, x in ((parts.size, like), (parts.tail, tail)):
        if x is not None and x.shape[:1] != (rows,):
            raise ValueError(
                f'{where} is {_tree.describe(x)} for {rows} rows; aux="concat" '
                "needs one value a row, along the first axis. Choose "
                '"stack" for one value a microbatch.'
            )


def _zeros(like: jax.ShapeDtypeStruct, new: int, shape: tuple[int, ...]) -> jax.Array:
    """Zeros of `shape`, which has one axis more than `like`: that at `new`."""
    zeros, sharding = jnp.zeros(shape, like.dtype), like.sharding
    if isinstance(sharding, NamedSharding):
        spec = [*sharding.spec]
        spec.insert(new, None)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return sharded(zeros, sharding)


def _sum_dtype(like: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(jnp.sum, like).dtype  # that of a boolean is an integer
