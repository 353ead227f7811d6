"""A small problem, and what the big batch gives for it, in float64 by default.

The expected values of most tests come from `big_batch`: Optax alone, on all rows at
once.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

PyTree = Any
ROWS = 24


def init(dtype: Any = jnp.float32, seed: int = 0) -> PyTree:
    """Nested, with a matrix, vectors, a scalar and a leaf without parameters."""
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "layer": {"w": leaf(3, 4), "b": leaf(4)},
        "out": [leaf(4, 2), None],
        "scale": leaf(),
    }


# How the parameters may be sharded over a mesh axis "data" of 2 or 4 devices.
SPECS = {
    "layer": {"w": P(None, "data"), "b": P("data")},
    "out": [P("data", None), None],
    "scale": P(),
}


def data(windows: int, dtype: Any = jnp.float32, rows: int = ROWS) -> list[PyTree]:
    """A batch of `rows` rows for each window."""
    rng = np.random.default_rng(1)
    return [
        {
            "x": jnp.asarray(rng.normal(size=(rows, 3)), dtype),
            "y": jnp.asarray(rng.normal(size=(rows, 2)), dtype),
        }
        for _ in range(windows)
    ]


def losses(params: PyTree, batch: PyTree) -> jax.Array:
    """One loss for each row."""
    hidden = batch["x"] @ params["layer"]["w"]
    hidden = jnp.tanh(hidden + jnp.broadcast_to(params["layer"]["b"], hidden.shape))
    predicted = params["scale"] * (hidden @ params["out"][0])
    return jnp.sum((predicted - batch["y"]) ** 2, axis=-1)


def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
    return jnp.mean(losses(params, batch))


def weighted_loss_fn(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
    each = losses(params, batch)
    return jnp.sum(each), jnp.asarray(each.shape[0], each.dtype)


def microbatches(batch: PyTree, sizes: Iterable[int]) -> list[PyTree]:
    """`batch` in consecutive parts of `sizes` rows."""
    ends = np.cumsum(list(sizes))
    starts = [0, *ends[:-1]]
    return [
        jax.tree.map(lambda a, i=int(i), j=int(j): a[i:j], batch)
        for i, j in zip(starts, ends, strict=True)
    ]


def cast(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64), dtype), tree)


def big_batch(
    inner: optax.GradientTransformation,
    params: PyTree,
    batches: Iterable[PyTree],
    dtype: Any = jnp.float64,
    loss: Any = loss_fn,
) -> PyTree:
    """The parameters, as NumPy arrays, after a step of `inner` on each whole batch."""
    with jax.enable_x64(dtype == jnp.float64):
        params = cast(params, dtype)
        tx = optax.with_extra_args_support(inner)
        state = tx.init(params)

        @jax.jit
        def step(params: PyTree, state: Any, batch: PyTree) -> tuple[PyTree, Any]:
            value, grads = jax.value_and_grad(loss)(params, batch)
            extra = {"value": value, "grad": grads}
            extra["value_fn"] = lambda params: loss(params, batch)
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        for batch in batches:
            params, state = step(params, state, cast(batch, dtype))
        return jax.tree.map(np.asarray, params)


def distance(a: PyTree, b: PyTree) -> float:
    """The largest absolute difference, computed in float64."""
    differences = jax.tree.map(
        lambda x, y: np.max(
            np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))
        ),
        a,
        b,
    )
    return float(max(jax.tree.leaves(differences), default=0.0))


def same_bits(a: PyTree, b: PyTree) -> bool:
    """Equal in structure, dtype and every bit: -0.0 is not 0.0."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def slow_but(few: Iterable[str], names: Iterable[str]) -> list[Any]:
    """The names as parameters of a test; those that are not of the few are slow."""
    few = set(few)
    return [x if x in few else pytest.param(x, marks=pytest.mark.slow) for x in names]
