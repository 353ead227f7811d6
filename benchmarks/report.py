"""What every benchmark prints: where it was measured, tables, and its bars."""

import datetime
import os
import pathlib
import platform
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import jax
import optax
from results import Row

import accumax

Bar: TypeAlias = tuple[str, float, float]  # what, its value, the most that it may be


def header(title: str, chip: str) -> None:
    versions = {"jax": jax, "optax": optax, "accumax": accumax}
    used = ", ".join(f"{name} {m.__version__}" for name, m in versions.items())
    print(f"{title}, {datetime.date.today()}, {used}\n{chip}")


def host() -> str:
    """This machine's processor, and how busy it is: times depend on both."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if "model name" in line]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model} x {os.cpu_count()}, load {os.getloadavg()[0]:.1f}"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints `rows` under `head`: the first column to the left, others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for first, *rest in lines:
        cells = [x.rjust(width) for x, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def rows(title: str, found: Iterable[Row]) -> None:
    """Prints each row by its name, with its note if there is no number."""

    def value(row: Row) -> str:
        return row.note if row.value is None else f"{row.value:.3f} {row.unit}"

    table(title, ["", ""], [[row.name, value(row)] for row in found])


def bars(limits: Sequence[Bar]) -> None:
    """Prints each of them and whether it is met, one a line."""
    print()
    for what, value, most in limits:
        verdict = "met" if value <= most else "MISSED"
        print(f"{what}: {value:.4g}, bar {most:g}: {verdict}")
