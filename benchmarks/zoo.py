"""Unlike models with unlike optimizers: one model proves nothing.

Their shapes are small enough to compile in seconds. Parameters outweigh the
activations, except in the residual net, the LSTM, the token-weighted perceptron and the
narrow rows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import transformer

# Clipping needs all gradients at once, as most large trainings do.
ADAMW = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "adamw": ADAMW,
    "sgd": optax.sgd(0.1),
    "adafactor": optax.adafactor(1e-3),
    "lion": optax.lion(1e-4),
    "muon": optax.contrib.muon(1e-3),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss with the shapes of its parameters and of one microbatch.

    Attributes:
      name: as in the names of rows.
      loss: `(params, x) -> () float`, a mean over the rows of x.
      params: shapes.
      x: the shape of one microbatch, (rows, ...).
      inner: the optimizer, and its name in the names of rows.
      weighted: `(params, x) -> (loss_sum, weight)`, to measure instead of `loss` in the
        forms that can.
      best: `loss` in the form with the least memory, for the floor.
    """

    name: str
    loss: Callable[[Any, jax.Array], jax.Array]
    params: Any
    x: jax.ShapeDtypeStruct
    inner: optax.GradientTransformation = ADAMW
    optimizer: str = "adamw"
    weighted: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    best: Callable[[Any, jax.Array], jax.Array] | None = None

    def batch(self, microbatches: int) -> jax.ShapeDtypeStruct:
        rows, *shape = self.x.shape
        return array(microbatches * rows, *shape, dtype=self.x.dtype)

    def trained_by(self, optimizer: str) -> "Model":
        return dataclasses.replace(
            self, inner=OPTIMIZERS[optimizer], optimizer=optimizer
        )


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


def cast_before(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The whole tree is cast at once, as `jmp` and many training loops do it."""

    def fun(params: Any, x: jax.Array) -> jax.Array:
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return loss(halved(params), x.astype(jnp.bfloat16) if floats else x)

    return fun


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


def residual_net(params: Any, images: jax.Array) -> jax.Array:
    """Four stages of two blocks, with BatchNorm over the microbatch.

    images: (rows, height, width, 3). The running statistics are left out: they are no
    parameters, and take next to no memory.
    """

    def convolved(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
        layout = "NHWC", "HWIO", "NHWC"
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=layout
        )

    def normalised(x: jax.Array, p: jax.Array) -> jax.Array:
        mean, var = (f(x, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        scale, shift = p[:, None, None, None]
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * (1 + scale) + shift

    x = convolved(images, params["first"])
    for p in params["blocks"]:
        stride = 1 if p["one"].shape[2] == p["one"].shape[3] else 2
        y = jax.nn.relu(normalised(convolved(x, p["one"], stride), p["norm1"]))
        y = normalised(convolved(y, p["two"]), p["norm2"])
        x = jax.nn.relu(y + (convolved(x, p["skip"], stride) if stride > 1 else x))
    logits = jnp.mean(x, (1, 2)) @ params["last"]
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])


def residual_shapes(channels: int) -> Any:
    def block(inputs: int, outputs: int) -> dict[str, Any]:
        norm = array(2, outputs)
        found = {
            "one": array(3, 3, inputs, outputs),
            "norm1": norm,
            "two": array(3, 3, outputs, outputs),
            "norm2": norm,
        }
        widens = inputs != outputs
        return found | ({"skip": array(1, 1, inputs, outputs)} if widens else {})

    widths = [channels, channels, channels, *(channels * 2**n for n in (1, 1, 2, 2, 3))]
    widths.append(widths[-1])
    pairs = itertools.pairwise(widths)
    return {
        "first": array(3, 3, 3, channels),
        "blocks": [block(*pair) for pair in pairs],
        "last": array(widths[-1], 10),
    }


def lstm(params: Any, x: jax.Array) -> jax.Array:
    """Layers of LSTM. x: (rows, length, width)."""
    for p in params:

        def step(carry: Any, now: jax.Array, p: Any = p) -> Any:
            h, c = carry
            gates = now @ p["inputs"] + h @ p["state"] + p["bias"][None]
            i, f, g, o = jnp.split(gates, 4, -1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[0], x.shape[2]))
        _, out = jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
        x = jnp.swapaxes(out, 0, 1)
    return jnp.mean(x[:, -1] ** 2)


def leaves(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """Many small parameters of one width, each used once. x: (rows, width).

    They are stacked: XLA makes one fusion of a sum over leaves, and compiles it slowly.
    Not more than 256 of them, because XLA:CPU takes some 70 ms for each, in each form.
    """
    return jnp.mean(jnp.tanh(x @ jnp.stack(params).T) ** 2)


def weighted(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The sum over the rows that are not padding, and their number."""

    def fun(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.sum(jnp.any(x != 0, -1), dtype=jnp.float32)
        return loss(params, x) * rows, rows

    return fun


def perceptrons(width: int, layers: int, rows: int) -> list[Model]:
    d = width
    dense = [{"up": array(d, 2 * d), "down": array(2 * d, d)}] * layers
    small = [{"up": array(d // 4, d // 2), "down": array(d // 2, d // 4)}] * layers
    x, many = array(rows, d), array(128 * rows, d // 4)
    loop = functools.partial(one_by_one, block)
    return [
        Model("mlp", loop, dense, x),
        Model("mlp_bf16", loop, jax.eval_shape(halved, dense), x),
        Model("mlp_bf16_compute", cast_before(loop), dense, x),
        Model("mlp_weighted", loop, small, many, weighted=weighted(loop)),
    ]


def lopsided(width: int, rows: int) -> list[Model]:
    """Nearly all in one place: in the batch, or in one matrix."""
    table = [{"up": array(13, 26), "down": array(26, 13)}]
    sizes = (width, width), (width, 16 * width)
    layers = [array(*size) for size in sizes]
    dense = functools.partial(one_by_one, lambda x, w: jnp.tanh(x @ w))
    loop = functools.partial(one_by_one, block)
    return [
        Model("narrow", loop, table, array(32 * width, 13)),  # rows of 13 numbers
        Model("head", dense, layers, array(rows, width)),
    ]


def stacks(width: int, layers: int, rows: int) -> list[Model]:
    """Layers in a scan that are no transformer's."""
    d = width

    def stacked(shapes: Any) -> Any:
        return jax.tree.map(lambda s: array(layers, *s.shape, dtype=s.dtype), shapes)

    mixture = {
        "router": array(d, 4),
        "up": array(4, d, d // 2),
        "down": array(4, d // 2, d),
    }
    lora = {"base": array(2 * d, 2 * d), "a": array(2 * d, 8), "b": array(8, 2 * d)}
    label = {"base": "frozen", "a": "trained", "b": "trained"}

    def partly(labels: Any) -> optax.GradientTransformation:
        return optax.multi_transform(
            {"trained": ADAMW, "frozen": optax.set_to_zero()}, labels
        )

    mixed = functools.partial(scanned, experts)
    scan = functools.partial(scanned, low_rank)
    loop = functools.partial(one_by_one, low_rank)
    x, labels = array(rows, 2 * d), [label] * layers
    return [
        Model("experts", mixed, stacked(mixture), array(rows, d)),
        Model("lora", scan, stacked(lora), x, partly(label)),
        Model("lora_unscanned", loop, [lora] * layers, x, partly(labels)),
    ]


def transformers(size: transformer.Size) -> list[Model]:
    x = array(size.rows, size.length + 1, dtype=jnp.int32)

    def model(name: str, **changed: int) -> Model:
        other = size._replace(**changed)
        loss = functools.partial(transformer.loss, other)
        return Model(name, loss, transformer.shapes(other), x)

    scanned = model("transformer", tied=0)
    summed = functools.partial(transformer.weighted_loss, size._replace(tied=0))
    half = jax.eval_shape(halved, scanned.params)
    return [
        scanned,  # and rematerialised
        model("transformer_unscanned", scanned=0, tied=0),
        model("transformer_tied"),
        dataclasses.replace(scanned, name="transformer_bf16", params=half),
        dataclasses.replace(
            scanned,
            name="transformer_bf16_compute",
            loss=cast_before(scanned.loss),
        ),
        dataclasses.replace(scanned, name="transformer_weighted", weighted=summed),
    ]


def models(scale: float = 1) -> list[Model]:
    """Each model once, with AdamW; `scale` is of widths.

    The small ones, scale = 1 / 16, are for tests: XLA decides otherwise there.
    """

    def of(width: int) -> int:
        return int(width * scale)

    size = transformer.Size(8, of(1024), 16, of(16384), of(512), 1)
    cell = {
        "inputs": array(of(512), 4 * of(512)),
        "state": array(of(512), 4 * of(512)),
        "bias": array(4 * of(512)),
    }
    found = [
        *perceptrons(of(2048), 8, 64),
        *lopsided(of(1024), 64),
        Model("resnet", residual_net, residual_shapes(of(64)), array(32, 32, 32, 3)),
        *transformers(size),
        *stacks(of(2048), 8, 64),
        Model("lstm", lstm, [cell] * 2, array(16, 64, of(512))),
        Model("leaves", leaves, [array(256)] * of(256), array(8, 256)),
    ]
    return found


def work(scale: float = 1) -> list[Model]:
    """All models with AdamW, and two models with each other optimizer."""
    each = models(scale)
    two = [m for m in each if m.name in ("mlp", "transformer")]
    others = [name for name in OPTIMIZERS if name != "adamw"]
    return each + [m.trained_by(name) for name in others for m in two]
