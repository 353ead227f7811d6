"""Audit: what three ways to accumulate gradients do with memory, before one runs.

The transformer of language_model.py is to learn Python's standard library, in windows
of eight microbatches: with `optax.MultiSteps`, with a `lax.scan` written by hand around
`jax.value_and_grad`, and with `accumax.train_step`. `accumax.audit` compiles each step
and prints a page about it: memory, the largest buffers, copies, and work that is thrown
away. Then each way makes the update of one window, beside the big batch's. Run it in
the repository with

    pip install -e ".[examples]"
    python examples/audit.py                      # under a minute on two CPU cores
    python examples/audit.py --layers 6 --width 256 --every 16

The first prints three pages and what follows, and draws the memory over the schedule of
each program in audit.png:

                                   MultiSteps     by hand     accumax whole batch
    memory of the step                  19.74       18.73       17.15       59.10 MiB
      temporary part of it               9.40       10.97        6.81       51.34 MiB
    copies of a parameter's size           30           4           0           3
    AdamW's work, kept by a flag         5.13        0.00        0.00        0.00 MiB
    off the big batch's update by     3.2e-06     3.2e-06     3.2e-06     0.0e+00

On a CPU, MultiSteps copies AdamW's moments in each call, and computes AdamW in each to
throw it away in seven of eight.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import language_model
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import accumax

MIB = 2**20
COLORS = {
    "parameters": "#495057",
    "optimizer state": "#868e96",
    "accumulator": "#d9480f",
    "inputs": "#ced4da",
    "outputs": "#fab005",
    "activations": "#9ecae1",
    "gradients": "#1971c2",
    "other": "#e599f7",
}


def ways(
    loss_fn: Callable[..., Any], inner: optax.GradientTransformation, every: int
) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], int]]:
    """For each way its step, the init of its state, and the microbatches of a call."""
    multi = optax.MultiSteps(inner, every)
    tx = accumax.accumulate(inner, every)

    def multi_steps(params: Any, opt_state: Any, text: jax.Array) -> Any:
        grads = jax.grad(loss_fn)(params, text)
        updates, opt_state = multi.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def by_hand(params: Any, opt_state: Any, text: jax.Array) -> Any:
        def add(sums: Any, part: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, jax.grad(loss_fn)(params, part)), None

        parts = text.reshape(every, -1, *text.shape[1:])
        sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        mean = jax.tree.map(lambda s: s / every, sums)
        updates, opt_state = inner.update(mean, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def whole(params: Any, opt_state: Any, text: jax.Array) -> Any:
        grads = jax.grad(loss_fn)(params, text)
        updates, opt_state = inner.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return {
        "MultiSteps": (multi_steps, multi.init, 1),
        "by hand": (by_hand, inner.init, every),
        "accumax": (accumax.train_step(loss_fn, tx), tx.init, 1),
        "whole batch": (whole, inner.init, every),
    }


def window(
    name: str,
    step: Callable[..., Any],
    params: Any,
    opt_state: Any,
    calls: Sequence[np.ndarray],
) -> Any:
    """The parameters after the calls of one window."""
    params = jax.tree.map(jnp.copy, params)  # the first call donates them
    for text in tqdm(calls, desc=f"{name:>13}", unit="call"):
        params, opt_state, *_ = step(params, opt_state, text)
    return jax.block_until_ready(params)


def distance(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    off = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)
    return max(jax.tree.leaves(off))


def draw(reports: dict[str, Any], path: Path) -> None:
    """The memory over the schedule of each program."""
    figure = Figure(figsize=(4 * len(reports), 4), layout="constrained")
    row = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axes, (name, report) in zip(row, reports.items(), strict=True):
        kinds = [kind for kind in COLORS if any(report.schedule.get(kind, ()))]
        heights = [np.array(report.schedule[kind]) / MIB for kind in kinds]
        colors = [COLORS[kind] for kind in kinds]
        steps = np.arange(len(heights[0]))
        axes.stackplot(steps, *heights, labels=kinds, colors=colors, linewidth=0)
        axes.axhline(report.memory.total / MIB, color="black", linestyle=":")
        axes.set(title=name, xlabel="step of the schedule", xlim=(0, steps[-1]))
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_ylabel("MiB on a device; dotted: the compiler's total")
    handles = {
        label: handle
        for axes in row
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[k] for k in COLORS if k in handles],
        [k for k in COLORS if k in handles],
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    figure.savefig(path, format="png", dpi=150)


def summary(figures: dict[str, dict[str, float]]) -> str:
    """The figures of all ways side by side."""
    lines = [f"{'':29}" + "".join(f"{name:>12}" for name in figures)]
    for label, key, scale, form, unit in (
        ("memory of the step", "total", 1 / MIB, ".2f", "MiB"),
        ("  temporary part of it", "temp", 1 / MIB, ".2f", "MiB"),
        ("copies of a parameter's size", "copies", 1, ".0f", ""),
        ("AdamW's work, kept by a flag", "discarded", 1 / MIB, ".2f", "MiB"),
        ("off the big batch's update by", "off", 1, ".1e", ""),
    ):
        cells = "".join(f"{x[key] * scale:12{form}}" for x in figures.values())
        lines.append(f"{label:29}{cells} {unit}".rstrip())
    return "\n".join(lines)


def parse(argv: Sequence[str] | None, available: int) -> argparse.Namespace:
    """The flags, checked before anything is compiled."""
    parser = argparse.ArgumentParser(
        description="What three ways to accumulate gradients do with memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--every", type=int, default=8, help="microbatches in an update")
    add("--microbatch", type=int, default=2, help="paragraphs at a time")
    add("--layers", type=int, default=3, help="of the transformer")
    add("--width", type=int, default=128, help="of its layers")
    add("--length", type=int, default=128, help="bytes where a paragraph is cut")
    add("--output", type=Path, default=Path("audit.png"), help="the figure, a PNG")
    flags = parser.parse_args(argv)
    for name in ("every", "microbatch", "layers", "length"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} {getattr(flags, name)} must be at least 1.")
    if flags.every * flags.microbatch > available:
        parser.error(
            f"--every {flags.every} x --microbatch {flags.microbatch} must be at most "
            f"{available}, the paragraphs."
        )
    if flags.width < 1 or flags.width % language_model.HEADS:
        heads = language_model.HEADS
        parser.error(f"--width {flags.width} must be a multiple of {heads}, the heads.")
    if flags.output.is_dir() or not flags.output.parent.is_dir():
        parser.error(f"--output {flags.output} must be a file in an existing folder.")
    return flags


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Prints a page about each way and a table of all, and draws the figure.

    Returns:
      For each way "total" and "temp", bytes of its step; "copies", their number;
      "discarded", bytes of the optimizer's work that a condition keeps or not; "off",
      the largest absolute difference to the big batch's parameters after one update.
    """
    training, _ = language_model.load()
    flags = parse(argv, len(training))
    net = language_model.Transformer(flags.layers, flags.width)
    rows = training[: flags.every * flags.microbatch]
    text = language_model.pad(rows, flags.length)
    params = jax.jit(net.init)(jax.random.key(0), text[:1])

    def loss_fn(params: Any, text: jax.Array) -> jax.Array:
        """A mean over the microbatch, padding included: all ways agree about it."""
        logits = jnp.asarray(net.apply(params, text))
        return optax.softmax_cross_entropy_with_integer_labels(logits, text).mean()

    reports, ends, figures = {}, {}, {}
    inner = optax.adamw(1e-3, eps=1e-6)
    for name, (fun, init, count) in ways(loss_fn, inner, flags.every).items():
        calls = np.split(text, flags.every // count)
        step = jax.jit(fun, donate_argnums=(0, 1)).lower(params, init(params), calls[0])
        step = step.compile()
        report = accumax.audit(step)
        if name != "whole batch":
            print(f"--- {name}\n{report}\n")
            reports[name] = report
        ends[name] = window(name, step, params, init(params), calls)
        figures[name] = {
            "total": report.memory.total,
            "temp": report.memory.temp,
            "copies": sum(x.certain for x in report.copies),
            "discarded": sum(x.bytes for x in report.discarded if x.certain),
        }
    for name, end in ends.items():
        figures[name]["off"] = distance(end, ends["whole batch"])
    print(summary(figures))
    draw(reports, flags.output)
    return figures


if __name__ == "__main__":
    main()
