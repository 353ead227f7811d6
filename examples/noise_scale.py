"""Noise scale: how noisy is a gradient, and what does a larger batch buy?

A perceptron learns scikit-learn's 8 x 8 digits with windows of eight calls. The state
of `accumax.accumulate(..., track_noise=True, track_norm=True)` tells the gradient noise
scale, the norm of each window's gradient and its mean loss, from sums that exist
anyway. At the end the noise scale is computed once more, from the gradients of all
single images, and the update of one window is compared with the big batch's. Run it in
the repository with

    pip install -e ".[examples]"
    python examples/noise_scale.py                # under a minute on two CPU cores
    python examples/noise_scale.py --updates 2000 --rows 64 --hidden 256

The first prints what follows, and draws the three over the updates in noise_scale.png:

    noise scale, in images; a batch has 128
      after a tenth of the updates          79
      after the last                       128
      there, over 1000 windows             268
      by its definition                    307

    first update off the big batch's by 1.0e-07
      of a movement of                  1.0e-03

The noise scale grows as the gradient shrinks. It is an order of magnitude, not the
batch size to use: see docs/batch_size.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import accumax

EVERY = 8
WINDOWS = 1000  # to measure the last noise scale in


class Digits(NamedTuple):
    """(n, 64) float32 images in [0, 1], (n,) int32 labels."""

    images: np.ndarray
    labels: np.ndarray


def load() -> Digits:
    images, labels = load_digits(return_X_y=True)
    images = np.asarray(images, np.float32) / 16
    return Digits(images, np.asarray(labels, np.int32))


def init(key: jax.Array, hidden: int) -> dict[str, jax.Array]:
    """The weights of a perceptron with one hidden layer."""
    one, two = jax.random.split(key)
    return {
        "in": jax.random.normal(one, (64, hidden)) / 8,
        "out": jax.random.normal(two, (hidden, 10)) / jnp.sqrt(hidden),
    }


def loss_fn(params: dict[str, jax.Array], images: jax.Array, labels: Any) -> jax.Array:
    """The mean over the rows."""
    logits = jax.nn.gelu(images @ params["in"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def exact_noise_scale(params: Any, digits: Digits) -> jax.Array:
    """tr(cov) / |mean|^2 of the gradients of all images, by its definition."""

    def add(sums: Any, row: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        image, label = row
        grad = jax.grad(loss_fn)(params, image[None], label[None])
        total, squares = sums
        squares += sum(jnp.sum(g**2) for g in jax.tree.leaves(grad))
        return (jax.tree.map(jnp.add, total, grad), squares), None

    zeros = jax.tree.map(jnp.zeros_like, params), jnp.float32(0)
    n = len(digits.labels)
    rows: Any = tuple(digits)
    (total, squares), _ = jax.lax.scan(add, zeros, rows)
    mean = sum(jnp.sum((g / n) ** 2) for g in jax.tree.leaves(total))
    return (squares / n - mean) / mean


def draw(log: dict[str, np.ndarray], rows: int, path: Path) -> None:
    """The noise scale, the norm and the loss over the updates."""
    figure = Figure(figsize=(12, 4), layout="constrained")  # no pyplot, so no display
    updates = np.arange(1, len(log["loss"]) + 1)
    titles = {
        "noise_scale": "Gradient noise scale, in images",
        "grad_norm": "Norm of a window's gradient",
        "loss": "Mean loss of a window",
    }
    row = figure.subplots(1, 3)
    for axes, (name, title) in zip(row, titles.items(), strict=True):
        shown = log[name] > 0  # the noise scale is negative where the noise hides it
        axes.plot(updates[shown], log[name][shown], ".", color="#d9480f", markersize=3)
        axes.set(title=title, xlabel="update", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    row[0].axhline(EVERY * rows, color="#495057", linestyle=":", label="batch size")
    row[0].legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def parse(argv: Sequence[str] | None, available: int) -> argparse.Namespace:
    """The flags, checked before anything is trained."""
    parser = argparse.ArgumentParser(
        description="The gradient noise scale over a training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--updates", type=int, default=150, help="windows of eight calls")
    add("--rows", type=int, default=16, help="images in a call")
    add("--hidden", type=int, default=64, help="width of the hidden layer")
    add("--seed", type=int, default=0, help="of the parameters and the batches")
    path = Path("noise_scale.png")
    add("--output", type=Path, default=path, help="the figure, a PNG")
    flags = parser.parse_args(argv)
    if not 1 <= EVERY * flags.rows <= available:
        parser.error(f"--rows {flags.rows} must be from 1 to {available // EVERY}.")
    for name in ("updates", "hidden"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} {getattr(flags, name)} must be at least 1.")
    if not 0 <= flags.seed < 2**32:
        parser.error(f"--seed {flags.seed} must be from 0 to 2**32 - 1.")
    if flags.output.is_dir() or not flags.output.parent.is_dir():
        parser.error(f"--output {flags.output} must be a file in an existing folder.")
    return flags


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, prints the table and draws the figure.

    Returns:
      "first" and "last", the noise scale after the first tenth of the updates and the
      last one, in images; "tracked" and "exact", at the last parameters, averaged over
      windows without training and by the definition; "off", the largest absolute
      difference between the first update and the big batch's; "movement", its size.
    """
    digits = load()
    flags = parse(argv, len(digits.labels))
    inner = optax.adam(1e-3, eps=1e-6)
    options: dict[str, Any] = {"track_norm": True, "averaged_args": ("value",)}
    tx = accumax.accumulate(inner, EVERY, track_noise=0.95, **options)
    step = jax.jit(accumax.train_step(loss_fn, tx), donate_argnums=(0, 1))
    start = params = init(jax.random.key(flags.seed), flags.hidden)
    params = jax.tree.map(jnp.copy, params)  # the first call donates them
    opt_state: Any = tx.init(params)  # an `accumax.AccumulateState`
    rng = np.random.default_rng(flags.seed)
    log: dict[str, list[float]] = {"noise_scale": [], "grad_norm": [], "loss": []}
    figures: dict[str, float] = {}
    for update in (progress := tqdm(range(flags.updates), unit="update")):
        rows = rng.permutation(len(digits.labels))[: EVERY * flags.rows]
        for part in np.split(rows, EVERY):
            batch = digits.images[part], digits.labels[part]
            params, opt_state, _ = step(params, opt_state, *batch)
        assert accumax.has_updated(opt_state)
        log["noise_scale"].append(float(accumax.noise_scale(opt_state)) * flags.rows)
        log["grad_norm"].append(float(opt_state.acc_args["grad_norm"]))
        log["loss"].append(float(opt_state.acc_args["value"]))
        progress.set_postfix(noise_scale=f"{log['noise_scale'][-1]:.0f}")
        if not update:
            whole = digits.images[rows], digits.labels[rows]
            grads = jax.grad(loss_fn)(start, *whole)
            updates, _ = inner.update(grads, inner.init(start), start)
            big = optax.apply_updates(start, updates)
            figures["off"] = _distance(params, big)
            figures["movement"] = _distance(start, big)

    # Once more at the last parameters, which do not move, against the definition. (A
    # frozen parameter, as of `optax.set_to_zero`, has no sum that could be measured.)
    still = accumax.accumulate(optax.sgd(0.0), EVERY, track_noise=0.999)
    measure = jax.jit(accumax.train_step(loss_fn, still), donate_argnums=(1,))
    noise_state = still.init(params)
    for _ in tqdm(range(EVERY * WINDOWS), desc="measuring", unit="call"):
        part = rng.integers(len(digits.labels), size=flags.rows)
        batch = digits.images[part], digits.labels[part]
        _, noise_state, _ = measure(params, noise_state, *batch)
    figures |= {
        "first": log["noise_scale"][flags.updates // 10],
        "last": log["noise_scale"][-1],
        "tracked": float(accumax.noise_scale(noise_state)) * flags.rows,
        "exact": float(exact_noise_scale(params, digits)),
    }
    print(
        f"noise scale, in images; a batch has {EVERY * flags.rows}\n"
        f"  after a tenth of the updates{figures['first']:12.0f}\n"
        f"  after the last              {figures['last']:12.0f}\n"
        f"  there, over {WINDOWS} windows    {figures['tracked']:12.0f}\n"
        f"  by its definition           {figures['exact']:12.0f}\n\n"
        f"first update off the big batch's by {figures['off']:.1e}\n"
        f"  of a movement of                  {figures['movement']:.1e}"
    )
    draw({k: np.array(v) for k, v in log.items()}, flags.rows, flags.output)
    return figures


def _distance(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    off = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)
    return max(jax.tree.leaves(off))


if __name__ == "__main__":
    main()
