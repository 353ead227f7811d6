"""The models of the timed tables, each with the batch of one microbatch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import forms
import jax
import jax.numpy as jnp
import transformer


class Model(NamedTuple):
    name: str
    loss: Callable[[Any, Any], jax.Array]
    init: Callable[[], Any]
    batch: Any  # one microbatch


def text(size: transformer.Size) -> Model:
    key = jax.random.key(0)
    shape = (size.rows, size.length + 1)
    tokens = jax.random.randint(key, shape, 0, size.vocabulary)
    count = sum(p.size for p in jax.tree.leaves(transformer.shapes(size))) / 1e6
    return Model(
        f"transformer, {count:.0f} M parameters, {size.rows} x {size.length} tokens",
        functools.partial(transformer.loss, size),
        functools.partial(transformer.init, size, key),
        tokens,
    )


def stack(count: int, width: int, rows: int) -> Model:
    def init() -> list[jax.Array]:
        weights = jax.random.normal(jax.random.key(0), (count, width, width))
        return list(weights * width**-0.5)

    name = f"{count} matrices of {width} x {width}, {rows} rows"
    return Model(name, forms.matrices_loss, init, jnp.ones((rows, width)))


def convolutions(rows: int) -> Model:
    """Two convolutions with stride 2 of images of 28 x 28, and a linear layer."""

    def loss(params: list[jax.Array], images: jax.Array) -> jax.Array:
        *kernels, last = params
        x = images
        for kernel in kernels:
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=layout
            )
            x = jax.nn.relu(x)
        x = x.reshape(len(images), -1) @ last
        return jnp.mean(x * x)

    def init() -> list[jax.Array]:
        shapes = (3, 3, 1, 16), (3, 3, 16, 32), (7 * 7 * 32, 10)
        keys = jax.random.split(jax.random.key(0), len(shapes))
        pairs = zip(keys, shapes, strict=True)
        return [0.1 * jax.random.normal(key, shape) for key, shape in pairs]

    name = f"two convolutions, {rows} images"
    return Model(name, loss, init, jnp.ones((rows, 28, 28, 1)))
