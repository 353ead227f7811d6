"""Plan: the largest microbatch that fits, before anything runs.

A convolutional net (Flax Linen) is to learn scikit-learn's 8 x 8 digits with batches of
1024 images, in less memory than such a batch takes. `accumax.plan` compiles its step
for a few microbatch sizes and says which is the largest that fits. The net is then
trained with it and, from the same seed and with the same batches, with whole batches.
Run it in the repository with

    pip install -e ".[examples]"
    python examples/plan.py                       # under a minute on two CPU cores
    python examples/plan.py --memory 30MiB --width 64 --steps 100

The first prints what follows, and draws memory by microbatch size in plan.png:

    microbatch_size=256: 4 microbatches of a batch of 1024
    peak of one device: 13.39 MiB, 67.0% of the limit, 20.00 MiB

          size  microbatches        peak
             1          1024    3.24 MiB  predicted
             2           512    3.28 MiB  predicted
             4           256    3.36 MiB  predicted
             8           128    3.52 MiB  predicted
            16            64    3.83 MiB  predicted
            32            32    4.46 MiB  compiled
            64            16    5.72 MiB  predicted
           128             8    8.24 MiB  compiled
           256             4   13.39 MiB  compiled  <-
           512             2   23.71 MiB  predicted, does not fit
          1024             1   44.33 MiB  predicted, does not fit

    Up to about 419 rows fit if the last microbatch may be smaller: pass
    divisors_only=False.

                               whole batch       4 x 256
    loss of the last batch          0.0461        0.0461
    peak memory of the step           43.3          13.4 MiB
    time per update                    231            90 ms

    largest difference between their parameters  2.6e-07
      moved by training                           7.5e-02

On a CPU the loop over microbatches is unrolled, because XLA computes convolutions
slowly within a loop there (JAX issue 12868).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import accumax

MIB = 2**20


class Net(nn.Module):
    """(rows, 8, 8, 1) images to (rows, 10) logits, float32."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Conv(self.width, (3, 3))(images))
        x = nn.gelu(nn.Conv(2 * self.width, (3, 3), strides=(2, 2))(x))
        x = nn.gelu(nn.Dense(128)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Run(NamedTuple):
    """What one way of training gave."""

    params: Any  # after the last update
    losses: list[float]  # one per update
    seconds: float  # per update, the median
    memory: int  # bytes of the compiled step, all that it holds at a time


def load() -> tuple[np.ndarray, np.ndarray]:
    """(n, 8, 8, 1) float32 images in [0, 1], (n,) int32 labels."""
    images, labels = load_digits(return_X_y=True)
    images = np.asarray(images, np.float32).reshape(-1, 8, 8, 1) / 16
    return images, np.asarray(labels, np.int32)


def train(
    name: str,
    step: jax.stages.Compiled,
    params: Any,
    opt_state: Any,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
) -> Run:
    """Trains with an update for each of the batches."""
    # Copies: the first step donates them, and the other run starts from the same.
    params, opt_state = jax.tree.map(jnp.copy, (params, opt_state))
    losses, seconds = [], []
    progress = tqdm(batches, desc=f"{name:>14}", unit="update")
    for images, labels in progress:
        start = time.perf_counter()
        params, opt_state, loss = step(params, opt_state, images, labels)
        jax.block_until_ready((params, opt_state))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        progress.set_postfix(loss=f"{losses[-1]:.4f}")
    median = statistics.median(seconds[1:] or seconds)  # the first one warms up
    memory: Any = step.memory_analysis()
    # What comes out lies where the donated arguments were, so it adds nothing.
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Run(params, losses, median, held)


def distance(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    off = jax.tree.map(lambda x, y: float(np.abs(np.subtract(x, y)).max()), a, b)
    return max(jax.tree.leaves(off))


def report(names: Sequence[str], runs: Sequence[Run], figures: dict[str, float]) -> str:
    """The figures of both runs side by side."""
    lines = [f"{'':24}{names[0]:>14}{names[1]:>14}"]
    for label, values, form, unit in (
        ("loss of the last batch", [r.losses[-1] for r in runs], ".4f", ""),
        ("peak memory of the step", [r.memory / MIB for r in runs], ".1f", "MiB"),
        ("time per update", [r.seconds * 1e3 for r in runs], ".0f", "ms"),
    ):
        cells = "".join(f"{value:14{form}}" for value in values)
        lines.append(f"{label:24}{cells} {unit}".rstrip())
    return "\n".join(lines) + (
        f"\n\nlargest difference between their parameters{figures['difference']:9.1e}"
        f"\n  moved by training{figures['movement']:34.1e}"
    )


def parse(argv: Sequence[str] | None, available: int) -> argparse.Namespace:
    """The flags, checked before anything is compiled."""
    parser = argparse.ArgumentParser(
        description="The largest microbatch that fits, and training with it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch", type=int, default=1024, help="images in an update")
    add("--memory", default="20MiB", help="of the step, with a unit, such as 20MiB")
    add("--width", type=int, default=32, help="channels of the first convolution")
    add("--steps", type=int, default=40, help="updates")
    add("--seed", type=int, default=0, help="of the parameters and the batches")
    add("--output", type=Path, default=Path("plan.png"), help="the figure, a PNG")
    flags = parser.parse_args(argv)
    if not 1 <= flags.batch <= available:
        parser.error(f"--batch {flags.batch} must be from 1 to {available}, the data.")
    for name in ("width", "steps"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} {getattr(flags, name)} must be at least 1.")
    if not 0 <= flags.seed < 2**32:
        parser.error(f"--seed {flags.seed} must be from 0 to 2**32 - 1.")
    if flags.output.is_dir() or not flags.output.parent.is_dir():
        parser.error(f"--output {flags.output} must be a file in an existing folder.")
    return flags


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Plans, trains both ways, prints the tables and draws the figure.

    Returns:
      "microbatch_size", "planned", the bytes of the step according to the plan, and
      "limit", those that it may take. "difference", the largest absolute difference
      between the parameters of the two runs after the last update, and "movement", that
      to those before. Ending in "_whole" and "_planned": "loss" of the last batch,
      "memory" of the step in bytes, "seconds" per update.
    """
    images, labels = load()
    flags = parse(argv, len(labels))
    net = Net(flags.width)
    params = jax.jit(net.init)(jax.random.key(flags.seed), images[:1])
    # eps: with the usual 1e-8, Adam's first update blows rounding errors up.
    tx = optax.adamw(2e-3, eps=1e-6)
    opt_state = tx.init(params)
    rng = np.random.default_rng(flags.seed)
    rows = [rng.permutation(len(labels))[: flags.batch] for _ in range(flags.steps)]
    batches = [(images[r], labels[r]) for r in rows]

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.asarray(net.apply(params, images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def lowered(value_and_grad: Callable[..., Any]) -> jax.stages.Lowered:
        def step(params: Any, opt_state: Any, *batch: jax.Array) -> Any:
            loss, grads = value_and_grad(params, *batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        jitted = jax.jit(step, donate_argnums=(0, 1))
        return jitted.lower(params, opt_state, *batches[0])

    def make_step(size: int) -> jax.stages.Lowered:
        unroll = jax.default_backend() == "cpu"
        return lowered(
            accumax.value_and_grad(
                loss_fn, microbatch_size=size, batch_argnums=(1, 2), unroll=unroll
            )
        )

    plan = accumax.plan(make_step, flags.batch, memory_limit=flags.memory)
    print(plan, end="\n\n")
    plan.plot(flags.output)

    steps = {
        "whole batch": lowered(jax.value_and_grad(loss_fn)).compile(),
        f"{plan.microbatches} x {plan.microbatch_size}": make_step(
            plan.microbatch_size
        ).compile(),
    }
    runs = [train(name, s, params, opt_state, batches) for name, s in steps.items()]
    whole, planned = runs
    figures: dict[str, float] = {
        "microbatch_size": plan.microbatch_size,
        "planned": plan.peak_bytes,
        "limit": plan.memory_limit,
        "difference": distance(whole.params, planned.params),
        "movement": distance(params, whole.params),
    }
    for suffix, run in (("whole", whole), ("planned", planned)):
        figures[f"loss_{suffix}"] = run.losses[-1]
        figures[f"memory_{suffix}"] = run.memory
        figures[f"seconds_{suffix}"] = run.seconds
    print(report([*steps], runs, figures))
    return figures


if __name__ == "__main__":
    main()
