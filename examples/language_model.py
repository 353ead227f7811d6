"""A language model: text of uneven length, and a loss that is a mean over its bytes.

A small causal transformer (Flax Linen, its layers scanned and rematerialised) learns to
write the source of Python's standard library, byte by byte. It does so three times,
from the same seed and with the same batches; what differs is who computes the gradient:

    jax.value_and_grad(mean_loss_fn)                                    # whole batch
    accumax.value_and_grad(loss_fn, microbatch_size=2, weighted=True)   # accumax
    accumax.value_and_grad(mean_loss_fn, microbatch_size=2)             # mean of means

`loss_fn` returns the sum over the bytes and their number, `mean_loss_fn` the one
divided by the other. A sequence is a paragraph of 3 to 256 bytes, so that of eight
microbatches of two the longest has three times the bytes of the shortest. The mean of
their means counts both alike, and is another loss. Run it in the repository with

    pip install -e ".[examples]"
    python examples/language_model.py             # under a minute on two CPU cores
    python examples/language_model.py --batch 64 --microbatch 4 --width 128 --steps 200

The first prints what follows (with Python 3.11; other versions have another library),
and draws the losses and the memory in language_model.png:

                                   whole batch       accumax mean of means
  loss of the first batch              8.71868       8.71868       8.69875 bits per byte
  error of the first gradient                        2.5e-07       9.1e-02 of its norm
  held-out loss                         4.2364        4.2364        4.2202 bits per byte
  peak memory of the step                 91.5          13.2          12.1 MiB
    temporary part of it                  89.2          10.9           9.8 MiB
  time per update                          804           267           220 ms
  parameters moved by training         9.8e-02       9.8e-02       9.7e-02
    off after the first update                       4.8e-06       1.0e-02
    off after the last one                           7.9e-06       8.5e-02

  temporary part, by paragraphs at a time: 2: 10.9, 4: 24.7, 8: 48.3, 16: 89.2 MiB

"Off" is the largest absolute difference to the parameters of the whole batch; gradients
are compared after clipping. Nothing in the third column looks broken, which is why the
mistake lives on; its held-out loss can even be the lower one. But it belongs to another
loss, whose value and gradient change with the microbatch. The temporary part is close
to linear in the microbatch: compile two, and you know the rest.
"""

import argparse
import math
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import accumax

MIB = 2**20
BITS = 1 / math.log(2)  # in a nat
PAD = 256  # not a byte: what fills a paragraph up, and what comes before its first byte
HEADS = 4
HELD_OUT = 256  # paragraphs that the held-out loss is the mean over
# How the figures call each way of training, and how the table does.
WAYS = {"whole": "whole batch", "accumulated": "accumax", "naive": "mean of means"}


class Layer(nn.Module):
    """Causal attention and a perceptron, (rows, length, width) float32 to the same."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        causal = nn.make_causal_mask(x[..., 0])
        x += nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=causal)
        x += nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
        return x, None  # as `nn.scan` wants it: what is carried, what is stacked


class Transformer(nn.Module):
    """(rows, length) text to (rows, length, 257) logits, each from the bytes before."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        length = text.shape[1]
        before = jnp.pad(text[:, :-1], ((0, 0), (1, 0)), constant_values=PAD)
        x = nn.Embed(PAD + 1, self.width)(before)
        x += nn.Embed(length, self.width)(jnp.arange(length)[None])
        # One layer is compiled, and only its input is kept for the backward pass.
        stack = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = stack()(x, None)
        return nn.Dense(PAD + 1)(nn.LayerNorm()(x))


class Run(NamedTuple):
    """What one way of training gave."""

    name: str
    moment: Any  # Adam's first after the first update, as one vector
    first: Any  # the parameters then, as one vector
    params: Any  # and after the last, as a tree
    losses: np.ndarray  # one per update, as the step reports it, in bits per byte
    seconds: float  # per update, the median
    arguments: int  # bytes that go in: parameters, optimizer state, text
    temp: int  # bytes that the step needs on top, mostly activations


def load() -> tuple[list[bytes], list[bytes]]:
    """Paragraphs to train on, and held out; the same in every run of one Python.

    A paragraph ends at an empty line of a module of the standard library. Packages and
    modules whose names begin with "_" are left out; every tenth module is held out.
    """
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    training, held_out = [], []
    for n, module in enumerate(modules):
        text = module.read_bytes().replace(b"\r\n", b"\n")
        part = held_out if n % 10 == 9 else training
        part += [lines for lines in text.split(b"\n\n") if lines]
    return training, held_out


def pad(paragraphs: Sequence[bytes], length: int) -> np.ndarray:
    """(rows, length) int32, each paragraph cut or filled up."""
    text = np.full((len(paragraphs), length), PAD, np.int32)
    for row, paragraph in zip(text, paragraphs, strict=True):
        row[: len(paragraph)] = np.frombuffer(paragraph[:length], np.uint8)
    return text


def compile_step(
    value_and_grad: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: Any,
    text: np.ndarray,
) -> tuple[jax.stages.Compiled, int, int]:
    """A step, and the bytes that go into it and that it needs on top: its peak."""

    def step(params: Any, opt_state: Any, text: jax.Array) -> Any:
        loss, grads = value_and_grad(params, text)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    # Donated, and returned in the same order: what comes out lies where that was.
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, jax.eval_shape(tx.init, params), text).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return compiled, memory.argument_size_in_bytes, memory.temp_size_in_bytes


def train(
    name: str,
    value_and_grad: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: Any,
    batches: Sequence[np.ndarray],
) -> Run:
    """Trains with an update for each of the batches."""
    step, *memory = compile_step(value_and_grad, tx, params, batches[0])
    # A copy: the first step donates it, and the other runs start from the same.
    params = jax.tree.map(jnp.copy, params)
    opt_state = tx.init(params)
    moment, first, losses, seconds = None, None, [], []
    progress = tqdm(batches, desc=f"{name:>13}", unit="update")
    for text in progress:
        start = time.perf_counter()
        params, opt_state, loss = step(params, opt_state, text)
        jax.block_until_ready((params, opt_state))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss) * BITS)
        progress.set_postfix(bits=f"{losses[-1]:.4f}")
        if first is None:
            moment, first = flat(optax.tree.get(opt_state, "mu")), flat(params)
    median = statistics.median(seconds[1:] or seconds)  # the first one warms up
    return Run(name, moment, first, params, np.array(losses), median, *memory)


def flat(tree: Any) -> np.ndarray:
    """All of its numbers as one float64 vector: a copy, on the host."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


def report(figures: dict[str, float], temps: dict[int, int]) -> str:
    """The figures of the three runs side by side, and the memory by microbatch size."""
    lines = [f"{'':30}" + "".join(f"{name:>14}" for name in WAYS.values())]
    for label, key, scale, form, unit in (
        ("loss of the first batch", "loss", 1, ".5f", "bits per byte"),
        ("error of the first gradient", "gradient_error", 1, ".1e", "of its norm"),
        ("held-out loss", "held_out", 1, ".4f", "bits per byte"),
        ("peak memory of the step", "memory", 1 / MIB, ".1f", "MiB"),
        ("  temporary part of it", "temp", 1 / MIB, ".1f", "MiB"),
        ("time per update", "seconds", 1e3, ".0f", "ms"),
        ("parameters moved by training", "movement", 1, ".1e", ""),
        ("  off after the first update", "difference_first", 1, ".1e", ""),
        ("  off after the last one", "difference_final", 1, ".1e", ""),
    ):
        values = [figures.get(f"{key}_{way}") for way in WAYS]
        cells = ["" if v is None else f"{v * scale:{form}}" for v in values]
        row = "".join(f"{cell:>14}" for cell in cells)
        lines.append(f"{label:30}{row} {unit}".rstrip())
    by_size = ", ".join(f"{n}: {temp / MIB:.1f}" for n, temp in temps.items())
    lines += ["", f"temporary part, by paragraphs at a time: {by_size} MiB"]
    return "\n".join(lines)


def draw(runs: Sequence[Run], temps: dict[int, int], path: Path) -> None:
    """The losses, their distance to the whole batch's, and the memory of the step."""
    figure = Figure(figsize=(12, 4), layout="constrained")  # no pyplot, so no display
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    updates = np.arange(1, len(runs[0].losses) + 1)
    styles = (("#9ecae1", 7), ("#d9480f", 1.5), ("#495057", 1.5))
    for run, (color, width) in zip(runs, styles, strict=True):
        left.plot(updates, run.losses, color=color, linewidth=width, label=run.name)
        off = np.abs(run.losses - runs[0].losses)
        middle.plot(updates[off > 0], off[off > 0], ".", color=color)
    left.set(title="Loss as reported", xlabel="update", ylabel="bits per byte")
    left.legend(frameon=False)
    middle.set(
        title="Off the whole batch's by, if at all", xlabel="update", yscale="log"
    )

    sizes, heights = list(temps), [temp / MIB for temp in temps.values()]
    right.plot(sizes, heights, color=styles[1][0], marker="o")
    right.plot(sizes[-1], heights[-1], color=styles[0][0], marker="o", markersize=12)
    right.set(title="Temporary memory", xlabel="paragraphs at a time", ylabel="MiB")
    right.set(xticks=sizes, ylim=(0, None))
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def parse(argv: Sequence[str] | None, available: int) -> argparse.Namespace:
    """The flags, checked before anything is trained."""
    parser = argparse.ArgumentParser(
        description="A byte-level transformer, and three ways to train it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch", type=int, default=16, help="paragraphs in an update")
    add("--microbatch", type=int, default=2, help="paragraphs at a time")
    add("--steps", type=int, default=40, help="updates")
    add("--layers", type=int, default=3, help="of the transformer")
    add("--width", type=int, default=64, help="of its layers")
    add("--length", type=int, default=256, help="bytes where a paragraph is cut")
    add("--seed", type=int, default=0, help="of the parameters and the batches")
    path = Path("language_model.png")
    add("--output", type=Path, default=path, help="the figure, a PNG")
    flags = parser.parse_args(argv)
    batch, microbatch, width = flags.batch, flags.microbatch, flags.width
    if not 1 <= batch <= available:
        parser.error(f"--batch {batch} must be from 1 to {available}, the paragraphs.")
    if not 1 <= microbatch <= batch:
        parser.error(f"--microbatch {microbatch} must be from 1 to {batch}, --batch.")
    for name in ("steps", "layers", "length"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} {getattr(flags, name)} must be at least 1.")
    if width < 1 or width % HEADS:
        parser.error(f"--width {width} must be a multiple of {HEADS}, the heads.")
    if not 0 <= flags.seed < 2**32:
        parser.error(f"--seed {flags.seed} must be from 0 to 2**32 - 1.")
    if flags.output.is_dir() or not flags.output.parent.is_dir():
        parser.error(f"--output {flags.output} must be a file in an existing folder.")
    return flags


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains the three ways, prints the tables and draws the figure.

    Returns:
      Of each run, ending in "_whole", "_accumulated" and "_naive": "loss", as reported
      for the first batch, and "held_out" after training, in bits per byte; "memory" and
      "temp" of the step in bytes; "seconds" per update; "movement", the largest
      absolute difference between its parameters before and after. Of the last two,
      against the first: "gradient_error", the relative one of the first gradient;
      "difference_first" and "difference_final", the largest absolute ones of the
      parameters after the first and the last update. And "temp_2" and so on, "temp" by
      microbatch size.
    """
    training, held_out = load()
    flags = parse(argv, len(training))
    net = Transformer(flags.layers, flags.width)
    rng = random.Random(flags.seed)
    batches = [
        pad(rng.sample(training, flags.batch), flags.length) for _ in range(flags.steps)
    ]
    unseen = pad(rng.sample(held_out, HELD_OUT), flags.length)
    params = jax.jit(net.init)(jax.random.key(flags.seed), batches[0][:1])

    def loss_fn(params: Any, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.asarray(net.apply(params, text))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, text)
        real = text != PAD
        return jnp.where(real, losses, 0.0).sum(), real.sum(dtype=jnp.float32)

    def mean_loss_fn(params: Any, text: jax.Array) -> jax.Array:
        total, count = loss_fn(params, text)
        return total / count

    @jax.jit
    def held_out_loss(params: Any) -> jax.Array:
        totals, counts = jax.lax.map(
            lambda row: loss_fn(params, row[None]), unseen, batch_size=flags.microbatch
        )
        return totals.sum() / counts.sum() * BITS

    def accumulated(size: int) -> Callable[..., Any]:
        return accumax.value_and_grad(loss_fn, microbatch_size=size, weighted=True)

    # eps as in digits.py: with the usual 1e-8 Adam's first update, g / (|g| + eps),
    # blows the rounding error of a tiny gradient up to a visible part of a step.
    schedule = optax.cosine_decay_schedule(5e-3, decay_steps=flags.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, eps=1e-6))
    size = flags.microbatch
    ways = {
        "whole": jax.value_and_grad(mean_loss_fn),
        "accumulated": accumulated(size),
        # A mean over bytes where one over rows is expected: this is the mistake.
        "naive": accumax.value_and_grad(mean_loss_fn, microbatch_size=size),
    }
    runs = {
        way: train(WAYS[way], value_and_grad, tx, params, batches)
        for way, value_and_grad in ways.items()
    }
    whole = runs["whole"]

    temps = {size: runs["accumulated"].temp}
    while 4 * size <= flags.batch:  # only compiled, which says what it would take
        size *= 2
        _, _, temps[size] = compile_step(accumulated(size), tx, params, batches[0])
    temps[flags.batch] = whole.temp

    figures = {f"temp_{size}": float(temp) for size, temp in temps.items()}
    for way, run in runs.items():
        final = flat(run.params)
        figures[f"loss_{way}"] = float(run.losses[0])
        figures[f"held_out_{way}"] = float(held_out_loss(run.params))
        figures[f"memory_{way}"] = run.arguments + run.temp
        figures[f"temp_{way}"] = run.temp
        figures[f"seconds_{way}"] = run.seconds
        figures[f"movement_{way}"] = np.abs(final - flat(params)).max()
        if run is not whole:
            # Adam's first moment is now a tenth of the gradient that it was given.
            error = np.linalg.norm(run.moment - whole.moment)
            error /= np.linalg.norm(whole.moment)
            figures[f"gradient_error_{way}"] = float(error)
            off = np.abs(run.first - whole.first), np.abs(final - flat(whole.params))
            figures[f"difference_first_{way}"] = off[0].max()
            figures[f"difference_final_{way}"] = off[1].max()
    print(report(figures, temps))
    draw(list(runs.values()), temps, flags.output)
    return figures


if __name__ == "__main__":
    main()
