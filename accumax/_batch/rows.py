"""The rows of a microbatch, cut from the batch where they are read."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .._types import ArrayLike, PyTree

LANES = 128  # of a TPU: the last axis of an array is padded to a multiple
MUCH = 2**23  # bytes of a microbatch's padded rows


def rows_of_part(
    tree: PyTree, *, size: int, count: int, tail: int, consecutive: bool
) -> Callable[[ArrayLike, bool], PyTree]:
    """Returns `(i, last) -> rows` of microbatch i, or of the tail if `last`.

    The arrays of `tree` have `size * count + tail` rows.
    """

    def of_leaf(x: jax.Array) -> Callable[[ArrayLike, bool], jax.Array]:
        strided = None
        if not tail and not consecutive:
            strided = _strided(x, size, count)

        # By index: a transposed batch would be a second copy in memory, and so would
        # a batch without its tail.
        def cut(i: ArrayLike, last: bool) -> jax.Array:
            if last:
                # `after` hides the start index, so XLA cannot begin the tail before the
                # scan ends; otherwise both keep activations alive.
                return lax.dynamic_slice_in_dim(x, i * size, tail)
            if strided is not None:
                return strided(i)
            if consecutive:
                return lax.dynamic_slice_in_dim(x, i * size, size)
            each = i + count * jnp.arange(size, dtype=jnp.int32)
            return x.at[each].get(mode="promise_in_bounds")

        return cut

    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    cuts = list(map(of_leaf, leaves))
    return lambda i, last: structure.unflatten([cut(i, last) for cut in cuts])


def _strided(x: jax.Array, size: int, count: int) -> Callable[[ArrayLike], jax.Array]:
    """Returns `i -> rows` i, `count` + i, 2 `count` + i, ... of `x`."""

    def column(i: ArrayLike, x: jax.Array) -> jax.Array:
        # Here and not before the loop, where a TPU would store the new shape.
        columns = x.reshape(size, count, *x.shape[1:])
        return lax.dynamic_index_in_dim(columns, i, axis=1, keepdims=False)

    if not _is_narrow(x, size, count):
        return lambda i: column(i, x)
    # A TPU stores narrow rows with the axis of the rows last. Reshaped, `count` comes
    # last, and is padded, also for a transposed copy: 15 times the batch (2**18 rows of
    # 13 numbers, 8 microbatches). Slices with a stride take at most one copy. Others
    # read from the batch, and drop it.
    ahead = slices(x, count)

    def row(i: ArrayLike, x: jax.Array, ahead: jax.Array) -> jax.Array:
        del x
        return lax.dynamic_index_in_dim(ahead, i, keepdims=False)

    def as_before(i: ArrayLike, x: jax.Array, ahead: jax.Array) -> jax.Array:
        del ahead
        return column(i, x)

    return lambda i: lax.platform_dependent(i, x, ahead, tpu=row, default=as_before)


def slices(x: jax.Array, count: int) -> jax.Array:
    """(count, size, ...): rows i, `count` + i, 2 `count` + i, ... for each i."""
    return jnp.stack([lax.slice_in_dim(x, i, None, count) for i in range(count)])


def _is_narrow(x: jax.Array, size: int, count: int) -> bool:
    """Whether a TPU would pad the rows of `x` to many times their size."""
    numbers = math.prod(x.shape[1:])
    if jnp.issubdtype(x.dtype, jax.dtypes.extended) or count == 1:
        return False
    if not isinstance(size * count * numbers, int):
        return False  # symbolic, of jax.export
    if any(jax.typeof(x).sharding.spec):
        return False  # JAX may refuse to slice an explicitly sharded axis
    padded = size * LANES * numbers * x.dtype.itemsize
    return numbers < LANES and count < LANES and padded > MUCH
