"""Draws the house from its imports, into `docs/inside.md`.

    python docs/house.py            # writes it
    python docs/house.py --check    # ends with 1 if the page has another one

An arrow goes from a wing to one that it imports. Left out are those to `_tree` and
`_types`, which nearly all import, and those that follow from others.
"""

import argparse
import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "inside.md"
BEGIN, END = "<!-- drawn by docs/house.py -->\n", "<!-- end -->\n"
FOR_ALL = {"_tree", "_types"}


def wings(package: pathlib.Path) -> dict[str, set[str]]:
    """From each folder or file of the package to those that it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        into = found.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                named = node.module.split(".") if node.module else []
                within = [*parts[: len(parts) - node.level], *named]
                into |= {within[0]} if within else {x.name for x in node.names}
    return {name: into - {name} for name, into in found.items()}


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that follow from others."""

    def reached(name: str) -> set[str]:
        return arrows[name].union(*map(reached, arrows[name]))

    return {
        name: into - set().union(*map(reached, into)) for name, into in arrows.items()
    }


def drawing(package: pathlib.Path) -> str:
    arrows = {
        name: into - FOR_ALL
        for name, into in wings(package).items()
        if name not in FOR_ALL
    }
    lines = ["```mermaid", "graph TD"]
    for name, into in reduced(arrows).items():
        lines += [f"  {name} --> {other}" for other in sorted(into)]
    return "\n".join([*lines, "```", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws the house.")
    parser.add_argument("--check", action="store_true")
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    page = before + BEGIN + drawing(ROOT / "accumax") + END + after
    if parser.parse_args().check:
        return int(page != PAGE.read_text())
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
