"""InfoNCE: the memory of its gradient as the batch grows and the microbatch does not.

`table` prints it as part of `targets.py`. `memory` has it for `run.py`, `time` the time
over that of the whole batch: GradCache (arXiv 2101.06983) claims memory that hardly
grows, for about 20 % more time.

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

import functools
from collections.abc import Callable
from typing import Any

import forms
import jax
import jax.numpy as jnp
import report
import timing
import zoo
from devices import Device
from programs import bytes_of, compiled
from results import Row
from runs import Runner, in_turns

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


def towers(width: int) -> tuple[Any, Any]:
    """The shapes of two towers; `width` is of a layer, four times that of a feature."""
    tower = [
        zoo.array(2 * width, width),
        *forms.matrices(LAYERS, width),
        zoo.array(width, width // 4),
    ]
    return tower, tower


def gradient(embed: Callable[..., jax.Array]) -> forms.Gradient:
    return jax.value_and_grad(lambda params, x: loss(embed, params, x))


def temp(embed: Callable[..., jax.Array], width: int, batch: int, on: Device) -> float:
    """Temporary megabytes of the gradient."""
    params, tokens = towers(width), zoo.array(batch, width // 4, dtype=jnp.int32)
    step, both = forms.kept(gradient(embed)), (tokens, tokens)
    unit = bytes_of(params) / MB
    return compiled(step, params, both, on, haste=True).temp * unit


def ways(rows: int) -> dict[str, Callable[..., jax.Array]]:
    divided = accumax.microbatch(embed, microbatch_size=rows)
    return {"whole": embed, "microbatch": divided}


def memory(width: int, on: Device, target: str) -> list[Row]:
    """`gradcache/memory/TARGET/MICROBATCHES/FORM`, in MB."""
    size = width // 4
    return [
        Row(f"gradcache/memory/{target}/{n}/{name}", temp(f, width, n * size, on), "MB")
        for n in BATCHES
        for name, f in ways(size).items()
    ]


def time(width: int, target: str, turns: int) -> list[Row]:
    """The time of a gradient of the largest batch, over that of the whole batch."""
    size, params = width // 4, timing.arrays(towers(width))
    shape = zoo.array(max(BATCHES) * size, size, dtype=jnp.int32)
    batch = timing.arrays((shape, shape))
    runs = {}
    for name, f in ways(size).items():
        runner = Runner(forms.kept(gradient(f)), params)
        runs[name] = functools.partial(runner.run, batch, 1)
    found = timing.least(in_turns(runs, turns))
    ratio = found["microbatch"] / found["whole"]
    return [Row(f"gradcache/time/{target}/microbatch", ratio, "x whole")]


def table(width: int, on: Device) -> list[report.Bar]:
    """Prints a table; gives its bars. `width` is of a layer."""
    features = rows = width // 4
    divided = accumax.microbatch(embed, microbatch_size=rows)
    plain, ours, embeddings, scores = {}, {}, {}, {}
    for n in BATCHES:
        plain[n], ours[n] = (temp(f, width, n * rows, on) for f in (embed, divided))
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
