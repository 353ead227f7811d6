"""The pictures of the results."""

import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure
from results import Row

COLORS = {
    "none": "#868e96",
    "whole": "#adb5bd",
    "multisteps": "#1971c2",
    "microbatching": "#74c0fc",
    "scan": "#2f9e44",
    "train_step": "#d9480f",
    "value_and_grad": "#f08c00",
    "train_step_and_accumulate": "#d9480f",
    "accumulate": "#ffa94d",
    "apply_gradients": "#f08c00",
    "aggregating": "#9c36b5",
    "apply_every": "#63e6be",
}
# By the beginning of the rows' names: the file, the title, the axes.
LINES = {
    "grows/parameters": ("parameters", "parameters", "memory, in parameter sizes"),
    "grows/k": ("k", "microbatches in a call", "memory, in parameter sizes"),
    "grows/leaves_trace": ("leaves_trace", "leaves", "seconds to trace"),
    "grows/leaves_compile": ("leaves_compile", "leaves", "seconds to compile"),
    "grows/devices_sent": ("devices", "devices", "MB that a device sends a window"),
    "grows/devices_memory": ("devices_memory", "devices", "memory, in parameter sizes"),
}
BARS = "none", "multisteps", "scan", "train_step", "value_and_grad"


def draw(rows: Sequence[Row], folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Draws what `rows` have: `STEM-grows-k.png` and so on."""
    paths = []
    for prefix, (name, x, y) in LINES.items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row.name.startswith(prefix + "/") and row.value is not None:
                at, _, form = row.name.removeprefix(prefix + "/").split("/")
                curves.setdefault(form, []).append((float(at), row.value))
        if curves:
            paths.append(folder / f"{stem}-grows-{name}.png")
            _lines(curves, x, y, paths[-1])
    memory = [row for row in rows if row.name.startswith("memory/")]
    if memory:
        paths.append(folder / f"{stem}-memory.png")
        _bars(memory, paths[-1])
    return paths


def _lines(
    curves: dict[str, list[tuple[float, float]]], x: str, y: str, path: pathlib.Path
) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")  # no pyplot, so no display
    axes = figure.subplots()
    for form, points in curves.items():
        at, values = zip(*sorted(points), strict=True)
        color = COLORS.get(form, "#212529")
        axes.plot(at, values, "o-", markersize=4, color=color, label=form)
    most = max(value for points in curves.values() for _, value in points)
    least = min(value for points in curves.values() for _, value in points)
    axes.set(xlabel=x, ylabel=y, xscale="log")
    if least > 0 and most > 20 * least:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=130)


def _bars(rows: Sequence[Row], path: pathlib.Path) -> None:
    cases = list(dict.fromkeys(row.name.rpartition("/")[0] for row in rows))
    values = {row.name: row.value for row in rows}
    height = 1.2 + 0.75 * len(cases)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    for n, case in enumerate(cases):
        for i, form in enumerate(BARS):
            value = values.get(f"{case}/{form}")
            if value is not None:
                label = form if n == 0 else None
                at = n + (i - 2) * 0.16
                axes.barh(at, value, 0.15, color=COLORS[form], label=label)
    names = [" / ".join(case.split("/")[1:3]) for case in cases]
    axes.axvline(1, color="#212529", linewidth=0.8)
    axes.set(yticks=range(len(cases)), xlabel="memory of a train step, x floor")
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(BARS))
    figure.savefig(path, format="png", dpi=130)
