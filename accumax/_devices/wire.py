"""Sums over devices that cross the wire in a lower precision than they are added in."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def all_reduce(x: jax.Array, names: tuple[str, ...], dtype: Any) -> jax.Array:
    """Sums `x` over devices. Both ways it crosses in `dtype`, and is added in its own.

    A `lax.psum` of the rounded values would round in each of its additions.
    """
    if jnp.iscomplexobj(x):
        return lax.psum(x, names)
    count = lax.axis_size(names)
    flat = jnp.pad(x.ravel(), (0, -x.size % count))
    part = reduce_scatter(flat, names, dtype).astype(dtype)
    whole = all_gather(part, names)
    return whole[: x.size].astype(x.dtype).reshape(x.shape)


def all_gather(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The parts of all devices, along the first axis."""
    moved = lax.all_gather(_as_bits(x), names, axis=0, tiled=True)
    return _of_bits(moved, x.dtype)


def reduce_scatter(x: jax.Array, names: tuple[str, ...], dtype: Any) -> jax.Array:
    """Sums `x` over devices, and returns this device's part along the first axis."""
    if dtype is None or jnp.iscomplexobj(x):
        return lax.psum_scatter(x, names, scatter_dimension=0, tiled=True)
    parts = x.astype(dtype).reshape(lax.axis_size(names), -1, *x.shape[1:])
    moved = lax.all_to_all(
        _as_bits(parts), names, split_axis=0, concat_axis=0, tiled=True
    )
    return jnp.sum(_of_bits(moved, parts.dtype).astype(x.dtype), axis=0)


def _as_bits(x: jax.Array) -> jax.Array:
    """`x` as integers of its width: XLA:CPU would send bfloat16 as float32."""
    if x.dtype.itemsize >= 4:
        return x
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _of_bits(x: jax.Array, dtype: Any) -> jax.Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def check_dtype(name: str, dtype: Any) -> Any:
    """Returns `dtype` as a NumPy dtype; None for None.

    Raises:
      TypeError: it is not a real floating-point dtype.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(
            f"{name}={dtype!r} must be a real floating-point dtype, such as "
            "jnp.bfloat16, or None for the one of the sums."
        )
    return found
