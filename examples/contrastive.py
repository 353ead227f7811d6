"""Contrastive: every row of the batch a negative, in the memory of a sixteenth of it.

Two small towers (Flax Linen) learn which image of a digit is the noisy, shifted twin of
which, with InfoNCE: all other images of the batch are negatives. So the loss couples
the batch, and to add up that of each microbatch is to train on another loss, with fewer
negatives. `accumax.microbatch` computes a tower one microbatch at a time, and again in
the backward pass (GradCache, arXiv 2101.06983): all embeddings are compared, and the
activations of one microbatch are alive. Three ways, from the same seed and batches:

    jax.value_and_grad(loss of tower.apply)                              # whole batch
    jax.value_and_grad(loss of accumax.microbatch(tower.apply, ...))     # accumax
    accumax.value_and_grad(loss of tower.apply, microbatch_size=32, ...)  # naive

Run it in the repository with

    pip install -e ".[examples]"
    python examples/contrastive.py                # half a minute on two CPU cores
    python examples/contrastive.py --batch 1024 --microbatch 60 --shared --steps 200

The first prints what follows, and draws losses and memory in contrastive.png:

                                 whole batch      accumax        naive
    loss of the first batch           6.5731       6.5731       3.7801
      error of its gradient          0.0e+00      2.2e-07      9.5e-02
    held-out loss                     1.7805       1.7805       1.9981
    held-out twins found                50.6         50.6         44.2 %
    peak memory of the step             54.9          5.9          4.7 MiB
      temporary part of it              53.8          4.8          3.6 MiB
    time per update                      121           79           59 ms
    movement of parameters           3.8e-01      3.8e-01      3.3e-01
      error, first update            0.0e+00      1.1e-06      2.0e-03
      error, last update             0.0e+00      1.1e-06      9.2e-02

    temporary part, batch           32      64     128     256     512
      whole batch                 2.92    5.84   11.69   26.48   53.48 MiB
      accumax                     2.91    1.60    1.66    1.78    4.52 MiB
      embeddings, scores          0.02    0.05    0.12    0.38    1.25 MiB

Errors are relative to the whole batch's for the gradient, and the largest absolute
difference for parameters. A batch of one microbatch is not divided; from two on, the
memory is flat until the scores of the whole batch are more than a microbatch takes.
"""

import functools
import statistics
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import accumax

MIB = 2**20
FEATURES = 64  # of an embedding
MULTIPLES = (1, 2, 4, 8, 16)  # of the microbatch, where the memory is looked at
STYLES: dict[str, dict[str, Any]] = {
    "whole": {"label": "whole batch", "color": "#9ecae1", "linewidth": 7},
    "accumax": {"label": "accumax", "color": "#d9480f", "linewidth": 1.5},
    "naive": {"label": "naive", "color": "#495057", "linewidth": 1},
    "stored": {"label": "embeddings, scores", "color": "#495057", "linestyle": ":"},
}

Pairs: TypeAlias = tuple[Any, Any]  # images and a twin of each, (n, 8, 8, 1) float32
Curves: TypeAlias = dict[str, dict[int, int]]  # bytes at each batch or microbatch


class Tower(nn.Module):
    """(rows, 8, 8, 1) images to (rows, 64) embeddings of length 1: a small MLP-Mixer.

    Not convolutional, because XLA:CPU has no fast gradient of a convolution inside a
    loop: that of a small net took 390 ms for 27 (jax issue 12868).
    """

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
        x = nn.Dense(self.width)(x)  # of each of 16 patches
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        y = nn.Dense(16)(nn.gelu(nn.Dense(32)(y)))  # mixes the patches
        x = x + y.swapaxes(1, 2)
        y = nn.LayerNorm()(x)
        x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(y)))
        x = nn.Dense(FEATURES)(x.reshape(x.shape[0], -1))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


class Run(NamedTuple):
    """What one way of training gave."""

    moment: Any  # of Adam after the first update: a tenth of the first gradient
    first: Any  # the parameters then
    params: Any  # and after the last update
    held_out: list[float]  # the loss of all held-out pairs after each
    figures: dict[str, float]  # what `main` returns of it


def load() -> tuple[np.ndarray, np.ndarray]:
    """The training and the held-out images, the same in every run."""
    images, labels = load_digits(return_X_y=True)
    images = np.asarray((images - images.mean()) / images.std(), np.float32)
    parts: Any = train_test_split(
        images.reshape(-1, 8, 8, 1), test_size=360, random_state=0, stratify=labels
    )
    return tuple(parts)


def with_twins(images: np.ndarray, rng: np.random.Generator) -> Pairs:
    """A twin is moved by up to a pixel down or up and right or left, and noisy."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
    down, right = rng.integers(3, size=(2, len(images)))
    twins = windows[np.arange(len(images)), down, right].reshape(images.shape)
    noise = rng.normal(scale=0.2, size=images.shape)
    return images, np.asarray(twins + noise, np.float32)


def draw_batches(images: np.ndarray, flags: Namespace) -> Iterator[Pairs]:
    """The batches of a run, the same for all."""
    rng = np.random.default_rng(flags.seed)
    for _ in range(flags.steps):
        yield with_twins(rng.choice(images, flags.batch, replace=False), rng)


def info_nce(embed: Callable[..., Any]) -> Callable[..., jax.Array]:
    """The loss whose negatives are all other rows that it is given, both ways."""

    def loss_fn(params: Any, images: jax.Array, twins: jax.Array) -> jax.Array:
        a = embed(params["towers"][0], images)
        b = embed(params["towers"][-1], twins)  # the same, if there is only one
        scores = jnp.exp(params["log_scale"]) * (a @ b.T)
        which = jnp.arange(len(scores))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        there, back = cross_entropy(scores, which), cross_entropy(scores.T, which)
        return (there.mean() + back.mean()) / 2

    return loss_fn


def make_ways(tower: Tower, microbatch: int) -> dict[str, Callable[..., Any]]:
    """Three functions of parameters, images and twins to a loss and its gradient."""
    loss_fn = info_nce(tower.apply)
    embed = accumax.microbatch(tower.apply, microbatch_size=microbatch)
    return {
        "whole": jax.value_and_grad(loss_fn),
        "accumax": jax.value_and_grad(info_nce(embed)),
        # Another loss: a row's negatives are those of its own microbatch.
        "naive": accumax.value_and_grad(
            loss_fn, microbatch_size=microbatch, batch_argnums=(1, 2)
        ),
    }


def shapes(batch: int) -> Pairs:
    """`batch` pairs to compile with."""
    images = jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.float32)
    return images, images


def train(
    name: str,
    value_and_grad: Callable[..., Any],
    params: Any,
    batches: Iterator[Pairs],
    held_out_loss: Callable[[Any], jax.Array],
    flags: Namespace,
) -> Run:
    """Trains with the gradient of `value_and_grad`."""
    # Adam's first update is g / (|g| + eps): with the usual 1e-8 it blows the rounding
    # error of a tiny gradient up to a visible part of a step.
    steps = flags.steps
    schedule = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, steps // 8, steps)
    tx = optax.adamw(schedule, eps=1e-6)

    def step(params: Any, opt_state: Any, pairs: Pairs) -> Any:
        loss, grads = value_and_grad(params, *pairs)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    # A copy: the first call donates it, and the other runs start from the same.
    params = jax.tree.map(jnp.copy, params)
    opt_state = tx.init(params)
    # Compiled once, for the memory figures and for the run.
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, opt_state, shapes(flags.batch)).compile()
    moment, first, losses, held_out, seconds = None, None, [], [], []
    progress = tqdm(batches, desc=f"{name:>11}", total=steps, unit="update")
    for pairs in progress:
        start = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, pairs)
        jax.block_until_ready((params, opt_state))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        held_out.append(float(held_out_loss(params)))
        progress.set_postfix(held_out=f"{held_out[-1]:.4f}")
        if first is None:
            # Copied, because on CPU a view would keep the next call from donating.
            kept = optax.tree.get(opt_state, "mu"), params
            moment, first = jax.tree.map(np.array, kept)
    memory: Any = compiled.memory_analysis()
    figures = {
        "loss": losses[0],
        "held_out": held_out[-1],
        # What comes out lies where the donated arguments were, so it adds nothing.
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "seconds": statistics.median(seconds[1:] or seconds),  # the first one warms up
    }
    return Run(moment, first, params, held_out, figures)


def measure(tower: Tower, params: Any, flags: Namespace) -> tuple[Curves, Curves]:
    """How temporary memory grows with the batch and the microbatch. Nothing is run."""

    @functools.cache
    def temp(way: str, microbatch: int, batch: int) -> int:
        jitted = jax.jit(make_ways(tower, microbatch)[way])
        # Level 0 compiles in half the time, to a program with the same memory.
        compiled = jitted.lower(params, *shapes(batch)).compile(
            compiler_options={"xla_backend_optimization_level": "0"}
        )
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    by_batch, by_part = {"whole": {}, "accumax": {}, "stored": {}}, {"accumax": {}}
    for n in tqdm(MULTIPLES, desc=f"{'memory':>11}", unit="size"):
        batch, part = flags.microbatch * n, max(1, flags.batch // n)
        for way in ("whole", "accumax"):
            by_batch[way][batch] = temp(way, flags.microbatch, batch)
        by_batch["stored"][batch] = 4 * (2 * batch * FEATURES + batch**2)  # float32
        by_part["accumax"][part] = temp("accumax", part, flags.batch)
    return by_batch, by_part


def report(figures: dict[str, float], by_batch: Curves) -> str:
    """The runs side by side, and how their memory grows."""
    ways = ("whole", "accumax", "naive")
    lines = [" " * 27 + "".join(f"{STYLES[way]['label']:>13}" for way in ways)]
    for label, key, scale, form, unit in (
        ("loss of the first batch", "loss", 1, ".4f", ""),
        ("  error of its gradient", "error", 1, ".1e", ""),
        ("held-out loss", "held_out", 1, ".4f", ""),
        ("held-out twins found", "found", 100, ".1f", "%"),
        ("peak memory of the step", "memory", 1 / MIB, ".1f", "MiB"),
        ("  temporary part of it", "temp", 1 / MIB, ".1f", "MiB"),
        ("time per update", "seconds", 1e3, ".0f", "ms"),
        ("movement of parameters", "movement", 1, ".1e", ""),
        ("  error, first update", "difference_first", 1, ".1e", ""),
        ("  error, last update", "difference_final", 1, ".1e", ""),
    ):
        values = [figures[f"{key}_{way}"] * scale for way in ways]
        cells = "".join(f"{value:13{form}}" for value in values)
        lines.append(f"{label:27}{cells} {unit}".rstrip())
    batches = "".join(f"{batch:8}" for batch in by_batch["whole"])
    lines += ["", f"{'temporary part, batch':26}{batches}"]
    for name, curve in by_batch.items():
        cells = "".join(f"{value / MIB:8.2f}" for value in curve.values())
        lines.append(f"  {STYLES[name]['label']:24}{cells} MiB")
    return "\n".join(lines)


def draw(runs: dict[str, Run], by_batch: Curves, by_part: Curves, path: Path) -> None:
    """The held-out losses, and the memory against batch and microbatch."""
    figure = Figure(figsize=(12, 4), layout="constrained")  # no pyplot, so no display
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    for way, run in runs.items():
        left.plot(range(1, len(run.held_out) + 1), run.held_out, **STYLES[way])
    left.set(title="Loss of all held-out pairs", xlabel="update")
    for axes, curves, fixed, varied in (
        (middle, by_batch, f"microbatch {min(by_batch['whole'])}", "batch"),
        (right, by_part, f"batch {max(by_part['accumax'])}", "microbatch"),
    ):
        for name, curve in curves.items():
            values = [value / MIB for value in curve.values()]
            axes.plot(list(curve), values, marker=".", **STYLES[name])
        axes.set(title=f"Temporary memory, {fixed}", xlabel=varied, ylabel="MiB")
        axes.set(ylim=(0, None), xticks=sorted(curves["accumax"])[2:])
    for axes in (left, middle, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def parse(argv: Sequence[str] | None, available: int) -> Namespace:
    """The flags, checked before anything is trained."""
    parser = ArgumentParser(
        description="InfoNCE of the whole batch, and one microbatch at a time.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch", type=int, default=512, help="pairs in an update")
    add("--microbatch", type=int, default=32, help="pairs in memory at a time")
    add("--steps", type=int, default=80, help="updates")
    add("--width", type=int, default=32, help="of the towers")
    add("--shared", action="store_true", help="one tower for images and twins")
    add("--seed", type=int, default=0, help="of the parameters and the batches")
    add("--output", type=Path, default=Path("contrastive.png"), help="the figure, PNG")
    flags = parser.parse_args(argv)
    batch, microbatch, output = flags.batch, flags.microbatch, flags.output
    if not 2 <= batch <= available:  # one pair has no negatives
        parser.error(f"--batch {batch} must be from 2 to {available} training images.")
    if not 1 <= microbatch <= batch:
        parser.error(f"--microbatch {microbatch} must be from 1 to --batch {batch}.")
    for name in ("steps", "width"):
        if vars(flags)[name] < 1:
            parser.error(f"--{name} {vars(flags)[name]} must be at least 1.")
    if not 0 <= flags.seed < 2**32:
        parser.error(f"--seed {flags.seed} must be from 0 to 2**32 - 1.")
    if output.is_dir() or not output.parent.is_dir():
        parser.error(f"--output {output} must be a file in an existing folder.")
    return flags


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains all three ways, prints the tables and draws the figure.

    Returns:
      What the tables show, of each way, ending in "_whole", "_accumax" and "_naive":
      "loss", relative "error" of its gradient, "held_out" loss, "found" from 0 to 1,
      "memory" and "temp" in bytes, "seconds" per update, "movement" of the parameters,
      "difference_first" and "difference_final" from those of the whole batch. And the
      bytes of loss and gradient of 1, 2, 4, 8 and 16 microbatches, as "temp_1_whole",
      "temp_1_accumax" and "temp_1_stored", those of the embeddings and scores.
    """
    training, held_out = load()
    flags = parse(argv, len(training))
    tower = Tower(flags.width)
    keys = jax.random.split(jax.random.key(flags.seed), 1 if flags.shared else 2)
    init, embed = jax.jit(tower.init), jax.jit(tower.apply)
    params = {
        "towers": [init(key, training[:1]) for key in keys],
        "log_scale": jnp.float32(np.log(10)),  # the temperature is learned, from 0.1 on
    }
    pairs = with_twins(held_out, np.random.default_rng(0))
    held_out_loss = jax.jit(lambda params: info_nce(tower.apply)(params, *pairs))

    def largest(a: Any, b: Any) -> jax.Array:
        return optax.tree.norm(optax.tree.sub(a, b), ord=np.inf)

    runs, figures = {}, {}
    for way, value_and_grad in make_ways(tower, flags.microbatch).items():
        name, batches = STYLES[way]["label"], draw_batches(training, flags)
        run = train(name, value_and_grad, params, batches, held_out_loss, flags)
        runs[way], whole, towers = run, runs.get("whole", run), run.params["towers"]
        a, b = embed(towers[0], pairs[0]), embed(towers[-1], pairs[1])
        error = optax.tree.norm(optax.tree.sub(run.moment, whole.moment))
        of_run = run.figures | {
            "error": error / optax.tree.norm(whole.moment),
            "found": jnp.mean(jnp.argmax(a @ b.T, axis=1) == jnp.arange(len(a))),
            "movement": largest(run.params, params),
            "difference_first": largest(run.first, whole.first),
            "difference_final": largest(run.params, whole.params),
        }
        figures |= {f"{key}_{way}": float(value) for key, value in of_run.items()}
    by_batch, by_part = measure(tower, params, flags)
    for name, curve in by_batch.items():
        for n, temp in zip(MULTIPLES, curve.values(), strict=True):
            figures[f"temp_{n}_{name}"] = temp
    print(report(figures, by_batch))
    draw(runs, by_batch, by_part, flags.output)
    return figures


if __name__ == "__main__":
    main()
