"""Draws the pictures of docs/memory.md and docs/silent_failures.md.

    python docs/drawings.py memory            # compiled for this machine's CPU
    python docs/drawings.py memory gpu        # or for an H100 that need not be there
    python docs/drawings.py failures          # half a minute: runs the page

Those of memory are of the program that XLA made of each step: which buffers are alive
at each step of its schedule. Nothing runs. `benchmarks/devices.py` says what to install
for the compiler of a GPU.
"""

import argparse
import pathlib
import re
import sys
from typing import Any

from matplotlib.figure import Figure

import accumax

DOCS = pathlib.Path(__file__).resolve().parent
sys.path.append(str(DOCS.parent / "benchmarks"))

import devices  # noqa: E402  # of the benchmarks
import pictured  # noqa: E402
import programs  # noqa: E402

RED, GRAY = "#c2410c", "#6b7280"
COLORS = {  # of the kinds of memory that are large enough to be seen
    "parameters": "#495057",
    "optimizer state": "#868e96",
    "accumulator": "#d9480f",
    "activations": "#9ecae1",
    "gradients": "#1971c2",
    "other": "#e599f7",
    "compiler's total": "black",
}


def draw_memory(target: str) -> None:
    steps = pictured.lowered(devices.device(target))
    steps = {name: step.compile() for name, step in steps.items()}
    top = 1.05 * max(map(programs.peak, steps.values())) / 2**20
    for name, step in steps.items():
        figure = accumax.audit(step).plot()
        figure.set_size_inches(5.5, 3.8)  # to be read on a phone
        (axes,) = figure.axes
        axes.set(title="", ylim=(0, top))
        for area in axes.collections:
            area.set_facecolor(COLORS.get(area.get_label(), "black"))
        shown = zip(*axes.get_legend_handles_labels(), strict=True)
        handles = [handle for handle, label in shown if label in COLORS]
        axes.get_legend().remove()
        where = {"loc": "outside lower center", "ncols": 3, "frameon": False}
        figure.legend(handles=handles, **where)
        figure.savefig(DOCS / f"memory_{name}.png", dpi=130)


def draw_failures() -> None:
    page = (DOCS / "silent_failures.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(block, names)
    damage = dict(reversed(names["damage"].items()))
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([*damage], [*damage.values()], color=RED)
    axes.bar_label(bars, fmt="%.2g", padding=4)
    axes.axvline(1, color=GRAY, linestyle=":")
    axes.set(xlabel="error over the length of the right update", xlim=(0, 2.3))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "silent_failures.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the pictures of the pages.")
    parser.add_argument("which", choices=["memory", "failures"])
    parser.add_argument("target", nargs="?", default="cpu", choices=["cpu", "gpu"])
    flags = parser.parse_args()
    if flags.which == "memory":
        draw_memory(flags.target)
    else:
        draw_failures()


if __name__ == "__main__":
    main()
