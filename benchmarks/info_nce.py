"""InfoNCE: the memory of its gradient as the batch grows and the microbatch does not.

Two towers embed texts, each text by itself: an MLP of every token, then their mean. The
loss compares each text of one side with every one of the other. `accumax.microbatch`
holds the embeddings of all texts and their cotangents, and computes one microbatch of
one tower at a time. The similarities and their cotangent grow with the square of the
batch, but are gone before the first tower's backward pass, which uses their memory
again: they show only where they are larger than what one microbatch takes.

The first bar is for what is left beside embeddings and similarities, each with its
cotangent, over the plain gradient of one microbatch. It is lenient, because that
gradient holds both towers, and because of what the similarities leave to use again. So
the second one is for the growth from 2 to 16 microbatches, and subtracts no more than
the embeddings.

The inputs are tokens. Of float32 inputs that go into a matrix product at once, XLA:TPU
keeps a bfloat16 copy of the whole batch, in this loop and in any other.
"""

from collections.abc import Callable
from typing import Any

import forms
import jax
import jax.numpy as jnp
import report
from devices import Device
from programs import compiled

import accumax

LAYERS = 4
BATCHES = (1, 2, 4, 8, 16)  # in microbatches
MB = 1e6


def embed(tower: list[jax.Array], tokens: jax.Array) -> jax.Array:
    """tokens: (rows, length) int32. Gives unit vectors, (rows, features) float32."""
    table, *layers, last = tower
    x = table[tokens]
    for w in layers:
        x = jax.nn.gelu(x @ w)
    x = jnp.mean(x, 1) @ last
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def loss(
    embed: Callable[..., jax.Array], params: Any, batch: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """The symmetric InfoNCE of two sides."""
    sides = zip(params, batch, strict=True)
    a, b = (embed(tower, tokens) for tower, tokens in sides)
    scores = 20 * a @ b.T
    rows, columns = (jax.nn.logsumexp(scores, axis) for axis in (1, 0))
    return jnp.mean((rows + columns) / 2 - jnp.diagonal(scores))


def table(width: int, on: Device) -> list[report.Bar]:
    """Prints a table; gives its bars. `width` is of a layer."""
    features = rows = length = width // 4

    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    tower = [
        shape(2 * width, width),
        *forms.matrices(LAYERS, width),
        shape(width, features),
    ]
    params = tower, tower
    unit = sum(p.size * 4 for p in jax.tree.leaves(params))
    divided = accumax.microbatch(embed, microbatch_size=rows)

    def temp(embed: Callable[..., jax.Array], batch: int) -> float:
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        gradient = jax.value_and_grad(lambda params, x: loss(embed, params, x))
        both = tokens, tokens
        return compiled(forms.kept(gradient), params, both, on).temp * unit / MB

    plain, ours, embeddings, scores = {}, {}, {}, {}
    for n in BATCHES:
        plain[n], ours[n] = temp(embed, n * rows), temp(divided, n * rows)
        # Two of each, and a cotangent for each.
        embeddings[n] = 4 * n * rows * features * 4 / MB
        scores[n] = 2 * (n * rows) ** 2 * 4 / MB
    head = ["batch", "whole", "microbatch", "embeddings", "similarities"]
    columns = plain, ours, embeddings, scores
    report.table(
        f"Temp of the gradient of InfoNCE in MB, microbatches of {rows}, with the "
        "bytes of what it compares",
        head,
        [[f"{n} x", *(f"{column[n]:.1f}" for column in columns)] for n in BATCHES],
    )
    most = max(BATCHES)
    left = ours[most] - embeddings[most]
    return [
        (
            f"temp of InfoNCE at {most} x, less embeddings and similarities, / 1 x",
            (left - scores[most]) / plain[1],
            1.1,
        ),
        (f"temp of InfoNCE at {most} x, less embeddings, / 2 x", left / ours[2], 1.1),
    ]
