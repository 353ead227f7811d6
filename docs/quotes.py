"""Fills in the numbers that README and the pages quote from the benchmarks' results.

    python docs/quotes.py            # writes them
    python docs/quotes.py --check    # ends with 1 if a page has another number
    python docs/quotes.py --check --stale    # or if results are older than the code

A page names the number, and how it is written, if not with two decimals:

    takes <!-- n:memory/mlp/adamw/cpu/train_step -->1.02<!-- /n --> times
    sends <!-- n:devices/8/train_step:,.0f -->1,175<!-- /n --> MB

It is not named `numbers`, which is a module of Python's own.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import results  # noqa: E402  # of the benchmarks

QUOTE = re.compile(r"(<!-- n:([^\s:]+)(?::(\S+))? -->)(.*?)(<!-- /n -->)")
MARK = re.compile(r"<!-- /?n\b")


def pages(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """README and all pages."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def written(row: results.Row, form: str | None) -> str:
    """The number as a page has it.

    Raises:
      ValueError: there is no number, or it cannot be written in this form.
    """
    if row.value is None:
        raise ValueError(f"there is no number: {row.note}")
    return format(row.value, form or ".2f")


def filled(text: str, rows: Mapping[str, results.Row]) -> str:
    """`text` with the numbers of the results; those that are unknown stay."""

    def fill(match: re.Match[str]) -> str:
        begin, name, form, old, end = match.groups()
        try:
            return f"{begin}{written(rows[name], form)}{end}"
        except (KeyError, ValueError):
            return f"{begin}{old}{end}"

    return QUOTE.sub(fill, text)


def complaints(
    root: pathlib.Path = ROOT,
    folder: pathlib.Path = results.FOLDER,
    *,
    stale: bool = False,
) -> list[str]:
    """What is wrong with the numbers of the pages.

    Args:
      root: the folder with README.md and docs/.
      folder: the folder of results.
      stale: complain about results that are older than the code, too.
    """
    rows, found = results.load(folder), []
    for path in pages(root):
        text, page = path.read_text(), path.relative_to(root)
        marks = len(MARK.findall(text))
        quotes = list(QUOTE.finditer(text))
        if marks != 2 * len(quotes):
            found.append(f"{page}: a number is not between <!-- n:name --> and its end")
        for _, name, form, old, _ in (quote.groups() for quote in quotes):
            if name not in rows:
                found.append(f"{page}: the results have no {name}")
                continue
            try:
                new = written(rows[name], form)
            except ValueError as error:
                found.append(f"{page}: {name}: {error}")
                continue
            if old != new:
                found.append(f"{page}: {name} is {new}, the page has {old}")
    if stale:
        found += [
            f"benchmarks/results/{name} is older than the code: run benchmarks/run.py"
            for name in results.stale(folder)
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Fills in the pages' numbers.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--stale", action="store_true", help="results must be new")
    flags = parser.parse_args()
    if not flags.check:
        rows = results.load()
        for path in pages():
            text = path.read_text()
            new = filled(text, rows)
            if new != text:
                path.write_text(new)
    found = complaints(stale=flags.stale)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
