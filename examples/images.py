"""What flax_linen.py and flax_nnx.py share: images, flags, table and picture.

Nothing of Flax or accumax is here. `batch` says what a call gets: that depends on
nothing but the seed and the call's number, so that a run can go on where it stopped.
"""

import functools
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

MIB = 2**20
STYLES: dict[str, dict[str, Any]] = {
    "whole": {"label": "whole batch", "color": "#9ecae1", "linewidth": 7},
    "accumax": {"label": "accumax", "color": "#d9480f", "linewidth": 1.5},
    "naive": {"label": "naive", "color": "#495057", "linewidth": 1},
}


class Run(NamedTuple):
    """What one way of training gave."""

    params: Any
    statistics: list[Any]  # the running ones after each update, but for those resumed
    losses: np.ndarray  # (updates,) of the batch
    distances: np.ndarray  # (updates, 2) as `distances` gives them, from the big batch
    figures: dict[str, float]  # what the table shows


@functools.cache
def load(part: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8, 8, 1) float32 images in [0, 1] and (n,) int32 labels, always the same.

    Args:
      part: "train" or "test".
    """
    images, labels = load_digits(return_X_y=True)
    images = np.asarray(images, np.float32).reshape(-1, 8, 8, 1) / 16
    labels = np.asarray(labels, np.int32)
    train, test = train_test_split(
        range(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    some = {"train": train, "test": test}[part]
    return images[some], labels[some]


def batch(flags: Namespace, call: int, every: int) -> tuple[np.ndarray, np.ndarray]:
    """What a call gets, in a run of `every` calls an update: images and labels."""
    images, labels = load("train")
    update, part = divmod(call, every)
    rng = np.random.default_rng((flags.seed, update))
    rows = np.split(rng.permutation(len(labels))[: flags.batch], every)[part]
    return images[rows], labels[rows]


def progress(way: str, start: int, calls: int) -> tqdm:
    """A bar over the numbers of the calls from `start` on."""
    options = {"initial": start, "total": calls, "unit": "call"}
    return tqdm(range(start, calls), f"{STYLES[way]['label']:>11}", **options)


def distance(tree: Any, reference: Any) -> float:
    """|tree - reference| / |reference|, all leaves together, in float64."""

    def vector(tree: Any) -> np.ndarray:
        leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
        return np.concatenate(leaves)

    difference = vector(tree) - vector(reference)
    return float(np.linalg.norm(difference) / np.linalg.norm(vector(reference)))


def distances(statistics: dict[str, Any], reference: dict[str, Any]) -> list[float]:
    """The `distance` of the running statistics of the images, and of all others."""

    def halves(tree: dict[str, Any]) -> list[Any]:
        deeper = {name: tree[name] for name in tree if name != "of_images"}
        return [tree["of_images"], deeper]

    pairs = zip(halves(statistics), halves(reference), strict=True)
    return [distance(*pair) for pair in pairs]


def begin(flags: Namespace) -> dict[str, Any]:
    """What is saved beside the state: the flags, and what the figure shows."""
    saved = {name: vars(flags)[name] for name in ("batch", "every", "steps", "seed")}
    return {"flags": saved, "losses": [], "distances": []}


def check_same(flags: Namespace, saved: dict[str, Any]) -> None:
    """That a run goes on with the flags that it began with."""
    for name, value in saved["flags"].items():
        if vars(flags)[name] != value:
            raise SystemExit(
                f"--{name} {vars(flags)[name]} is not the {value} with which "
                f"--checkpoints {flags.checkpoints} was begun: pass --{name} {value}."
            )


def finish(
    params: Any,
    statistics: list[Any],
    history: dict[str, Any],
    every: int,
    figures: dict[str, float],
) -> Run:
    """The run with this history; `figures` are those that only the caller knows."""
    losses = np.reshape(history["losses"], (-1, every)).mean(axis=1)
    away = np.reshape(history["distances"] or np.zeros((len(losses), 2)), (-1, 2))
    for i, layer in enumerate(("images", "deeper")):
        figures[f"{layer}_first"], figures[f"{layer}_last"] = away[[0, -1], i]
    return Run(params, statistics, losses, away, figures)


def report(runs: dict[str, Run]) -> str:
    """The figures of all ways side by side."""
    lines = [" " * 27 + "".join(f"{STYLES[way]['label']:>13}" for way in runs)]
    for label, key, scale, form, unit in (
        ("test accuracy", "accuracy", 100, ".2f", "%"),
        ("  of averaged parameters", "averaged", 100, ".2f", "%"),
        ("optimizer updates", "updates", 1, ".0f", ""),
        ("`step` of the state", "step", 1, ".0f", ""),
        ("temporary memory, a call", "temp", 1 / MIB, ".1f", "MiB"),
        ("running statistics: distance from the whole batch's", "", 1, "", ""),
        ("  images, first update", "images_first", 1, ".1e", ""),
        ("  images, last update", "images_last", 1, ".1e", ""),
        ("  deeper, first update", "deeper_first", 1, ".1e", ""),
        ("  deeper, last update", "deeper_last", 1, ".1e", ""),
    ):
        values = [run.figures[key] * scale for run in runs.values()] if key else []
        cells = "".join(f"{value:13{form}}" for value in values)
        lines.append(f"{label:27}{cells} {unit}".rstrip())
    return "\n".join(lines)


def draw(runs: dict[str, Run], path: Path) -> None:
    """The losses, how far the running statistics are off, and the memory."""
    figure = Figure(figsize=(12, 4), layout="constrained")  # no pyplot, so no display
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for way, run in runs.items():
        updates = range(1, len(run.losses) + 1)
        left.plot(updates, run.losses, **STYLES[way])
        if way != "whole":
            style = STYLES[way] | {"linewidth": 1.5}
            for i, (layer, line) in enumerate(
                (("images", "-"), ("deeper layers", ":"))
            ):
                style |= {
                    "label": f"{STYLES[way]['label']}, {layer}",
                    "linestyle": line,
                }
                # Equal to the bit has no place on a logarithmic axis.
                middle.plot(updates, np.maximum(run.distances[:, i], 1e-8), **style)
    left.set(title="Training loss", xlabel="update", yscale="log")
    middle.set(title="Running statistics: distance\nfrom the whole batch's")
    middle.set(xlabel="update", yscale="log")
    for axes in (left, middle):
        axes.legend(frameon=False)

    temps = [run.figures["temp"] / MIB for run in runs.values()]
    names, colors = zip(
        *((STYLES[way]["label"], STYLES[way]["color"]) for way in runs), strict=True
    )
    bars = right.bar(names, temps, width=0.6, color=colors)
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.set(title="Temporary memory of a call\n", ylabel="MiB")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def parse(argv: Sequence[str] | None, *, name: str, sizes: bool = False) -> Namespace:
    """The flags, checked before anything is trained.

    Args:
      argv: the command line, None for that of the process.
      name: of the figure, without ".png".
      sizes: whether there is a flag --sizes.
    """
    parser = ArgumentParser(
        description="Images with BatchNorm and dropout: a part of the batch at a time.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch", type=int, default=512, help="images in an update")
    add("--every", type=int, default=8, help="calls in an update")
    add("--steps", type=int, default=60, help="updates")
    add("--seed", type=int, default=0, help="of parameters, dropout and batches")
    add("--checkpoints", type=Path, help="the folder to save accumax's run in")
    add("--resume", action="store_true", help="go on from the newest checkpoint")
    output = Path(f"{name}.png")
    add("--output", type=Path, default=output, help="the figure, a PNG")
    if sizes:
        add("--sizes", action="store_true", help="compare sizes of microbatches")
    flags, available = parser.parse_args(argv), len(load("train")[1])
    batch, every, folder = flags.batch, flags.every, flags.checkpoints
    for option in ("every", "steps"):
        if vars(flags)[option] < 1:
            parser.error(f"--{option} {vars(flags)[option]} must be at least 1.")
    if not 1 <= batch <= available:
        parser.error(f"--batch {batch} must be from 1 to {available} training images.")
    if batch % every:
        parser.error(
            f"--batch {batch} must be divisible by --every {every}: the calls of an "
            "update get the same number of images."
        )
    if not 0 <= flags.seed < 2**32:
        parser.error(f"--seed {flags.seed} must be from 0 to 2**32 - 1.")
    if flags.output.is_dir() or not flags.output.parent.is_dir():
        parser.error(f"--output {flags.output} must be a file in an existing folder.")
    if sizes and flags.sizes and folder is not None:
        parser.error("--sizes makes many runs and saves none: leave --checkpoints out.")
    if flags.resume and folder is None:
        parser.error("--resume needs the --checkpoints to go on from.")
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            parser.error(f"--checkpoints {folder} must be a folder.")
        # A folder with the number of calls as its name is a finished one.
        saved = folder.is_dir() and any(x.name.isdigit() for x in folder.iterdir())
        if saved and not flags.resume:
            parser.error(
                f"--checkpoints {folder} has checkpoints: pass --resume to go on from "
                "the newest, or another folder."
            )
        if flags.resume and not saved:
            parser.error(f"--checkpoints {folder} has no checkpoint to --resume from.")
    return flags
