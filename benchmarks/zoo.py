"""Unlike models, for tables of memory: one model proves nothing.

Small enough to compile in seconds, with parameters that outweigh the activations,
except where it is said.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from forms import ADAMW


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss with the shapes of its parameters and of one microbatch.

    Attributes:
      name: what is special about it.
      loss: `(params, x) -> () float`, a mean over the rows of x, (rows, width).
      params: shapes.
      x: the shape of one microbatch.
      inner: the optimizer.
      weighted: `(params, x) -> (loss_sum, weight)`, to measure instead of `loss`.
      best: `loss` in the form with the least memory, for the floor.
    """

    name: str
    loss: Callable[[Any, jax.Array], jax.Array]
    params: Any
    x: jax.ShapeDtypeStruct
    inner: optax.GradientTransformation = ADAMW
    weighted: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    best: Callable[[Any, jax.Array], jax.Array] | None = None


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def block(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """A residual block. up: (d, 2 d), down: (2 d, d)."""
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def experts(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """A mixture of experts, each for its part of the rows. up: (experts, d, 2 d)."""
    scores = jax.nn.softmax(x @ p["router"])
    parts = x.reshape(p["up"].shape[0], -1, x.shape[-1])
    hidden = jax.nn.gelu(jnp.einsum("end,edh->enh", parts, p["up"]))
    out = jnp.einsum("enh,ehd->end", hidden, p["down"]).reshape(x.shape)
    return x + out * jnp.max(scores, -1, keepdims=True)


def low_rank(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    return x + jnp.tanh(x @ p["base"] + (x @ p["a"]) @ p["b"])


def halved(tree: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), tree)


def cast_inside(layer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, p: layer(x.astype(jnp.bfloat16), halved(p)).astype(x.dtype)


def one_by_one(layer: Callable[..., jax.Array], params: Any, x: jax.Array) -> jax.Array:
    for p in params:
        x = layer(x, p)
    return jnp.mean(x.astype(jnp.float32) ** 2)


def scanned(
    layer: Callable[..., jax.Array], params: Any, x: jax.Array, remat: bool = True
) -> jax.Array:
    layer = jax.checkpoint(layer) if remat else layer
    x = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params)[0]
    return jnp.mean(x.astype(jnp.float32) ** 2)


def cast_before(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The whole tree is cast at once, as `jmp` and many training loops do it."""
    return lambda params, x: loss(halved(params), x.astype(jnp.bfloat16))


def weighted(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The sum over the rows that are not padding, and their number."""

    def fun(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.sum(jnp.any(x != 0, -1), dtype=jnp.float32)
        return loss(params, x) * rows, rows

    return fun


def models(layers: int = 8, width: int = 2048, rows: int = 64) -> list[Model]:
    d, n = width, layers
    dense = {"up": array(d, 2 * d), "down": array(2 * d, d)}
    mixture = {
        "router": array(d, 4),
        "up": array(4, d, d // 2),
        "down": array(4, d // 2, d),
    }
    lora = {"base": array(2 * d, 2 * d), "a": array(2 * d, 8), "b": array(8, 2 * d)}
    x, wide, many = array(rows, d), array(rows, 2 * d), array(128 * rows, d // 4)
    small = {"up": array(d // 4, d // 2), "down": array(d // 2, d // 4)}

    def stacked(shapes: Any) -> Any:
        return jax.tree.map(lambda s: array(n, *s.shape, dtype=s.dtype), shapes)

    def separate(shapes: Any) -> Any:
        return [shapes] * n

    def half(shapes: Any) -> Any:
        return jax.tree.map(lambda s: array(*s.shape, dtype=jnp.bfloat16), shapes)

    def partly(labels: Any) -> optax.GradientTransformation:
        return optax.multi_transform(
            {"trained": ADAMW, "frozen": optax.set_to_zero()}, labels
        )

    label = {"base": "frozen", "a": "trained", "b": "trained"}
    loop = functools.partial(one_by_one, block)
    scan = functools.partial(scanned, block)
    mixed = functools.partial(one_by_one, experts)
    mixed_scan = functools.partial(scanned, experts)
    kept = functools.partial(scanned, block, remat=False)
    cast = functools.partial(scanned, cast_inside(block))
    return [
        Model("scanned, remat, cast inside", cast, stacked(dense), x),
        Model("scanned, not remat", kept, stacked(dense), x),
        Model("layers one by one", loop, separate(dense), x),
        Model("the same, SGD", loop, separate(dense), x, optax.sgd(0.1)),
        Model("the same, Lion", loop, separate(dense), x, optax.lion(1e-4)),
        Model("the same, Adafactor", loop, separate(dense), x, optax.adafactor(1e-3)),
        Model("scanned, Adafactor", scan, stacked(dense), x, optax.adafactor(1e-3)),
        Model("tree cast, scanned", cast_before(scan), stacked(dense), x, best=cast),
        Model(
            "tree cast, scanned, not remat",
            cast_before(kept),
            stacked(dense),
            x,
            best=functools.partial(scanned, cast_inside(block), remat=False),
        ),
        Model("tree cast, one by one", cast_before(loop), separate(dense), x),
        Model("bf16 parameters, scanned", scan, half(stacked(dense)), x),
        Model("bf16 parameters, one by one", loop, half(separate(dense)), x),
        Model("experts, one by one", mixed, separate(mixture), x),
        Model("experts, scanned", mixed_scan, stacked(mixture), x),
        Model(
            "LoRA, one by one",
            functools.partial(one_by_one, low_rank),
            separate(lora),
            wide,
            partly([label] * n),
        ),
        Model(
            "LoRA, scanned",
            functools.partial(scanned, low_rank),
            stacked(lora),
            wide,
            partly(label),
        ),
        Model(
            "token-weighted, activations outweigh",
            loop,
            separate(small),
            many,
            weighted=weighted(loop),
        ),
    ]
