"""The model of the memory tables: a decoder-only transformer, by default scanned and
rematerialised, with one matrix for its embedding and its output.

Plain JAX, so that nothing but accumulation differs between two measurements. At the
default size it has 671 MB of float32 parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Size(NamedTuple):
    layers: int = 12
    width: int = 1024
    heads: int = 16
    vocabulary: int = 16384
    length: int = 512
    rows: int = 1  # of one microbatch
    scanned: int = 1  # 0: layers one by one, their activations kept
    tied: int = 1  # 0: the output has a matrix of its own


def shapes(size: Size) -> dict[str, Any]:
    """The parameters' shapes, all float32."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    d = size.width
    block = {
        "norm1": (d,),
        "qkv": (d, 3 * d),
        "out": (d, d),
        "norm2": (d,),
        "up": (d, 4 * d),
        "down": (4 * d, d),
    }
    if size.scanned:
        blocks = {name: array(size.layers, *shape) for name, shape in block.items()}
    else:
        one = {name: array(*shape) for name, shape in block.items()}
        blocks = [one] * size.layers
    found = {"embedding": array(size.vocabulary, d), "blocks": blocks}
    return found if size.tied else found | {"head": array(size.vocabulary, d)}


def init(size: Size, key: jax.Array) -> dict[str, Any]:
    leaves, structure = jax.tree.flatten(shapes(size))
    keys = jax.random.split(key, len(leaves))
    scale = size.width**-0.5
    pairs = zip(keys, leaves, strict=True)
    return structure.unflatten(
        [scale * jax.random.normal(k, s.shape) for k, s in pairs]
    )


def loss(size: Size, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """The mean next-token cross-entropy of `tokens`, (rows, length + 1) int32."""
    return jnp.mean(token_losses(size, params, tokens))


def weighted_loss(
    size: Size, params: dict[str, Any], tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same as a sum, with the number of tokens in it; 0 is padding."""
    counts = tokens[:, 1:] != 0
    losses = jnp.where(counts, token_losses(size, params, tokens), 0)
    return jnp.sum(losses), jnp.sum(counts)


def token_losses(size: Size, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """(rows, length) float32."""

    def normalised(x: jax.Array, scale: jax.Array) -> jax.Array:
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        return x * (1 + scale)[None, None]

    def block(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        qkv = normalised(x, p["norm1"]) @ p["qkv"]
        heads = qkv.reshape(*x.shape[:2], 3, size.heads, -1)
        q, k, v = (heads[:, :, i] for i in range(3))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ p["out"]
        hidden = jax.nn.gelu(normalised(x, p["norm2"]) @ p["up"])
        return x + hidden @ p["down"], None

    x = params["embedding"][tokens[:, :-1]]
    if size.scanned:
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["blocks"])
    else:
        for p in params["blocks"]:
            x, _ = block(x, p)
    logits = x @ params["embedding" if size.tied else "head"].T
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked
