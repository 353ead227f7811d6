"""The results that `run.py` saves, and that README and the pages quote by name."""

import ast
import dataclasses
import hashlib
import io
import json
import pathlib
import tokenize
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
# Modules of the package that no row runs.
INSTRUMENTS = "_testing", "plan", "testing"


@dataclasses.dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
      name: what it is, from the general to the particular, with slashes between:
        "memory/transformer/adamw/gpu/train_step".
      value: the number; None where it could not be had, and then `note` says why.
      unit: for instance "x floor", "MB", "us".
      command: the command that prints it; `run.py` fills it in.
      note: for a row in which a peer is ahead, why.
    """

    name: str
    value: float | None
    unit: str
    command: str = ""
    note: str = ""


def save(rows: Iterable[Row], facts: dict[str, Any], path: pathlib.Path) -> None:
    """Writes `path`, a JSON of the rows by name.

    `facts` say what was measured where: "date", "chip", "versions".
    """
    by_name = {}
    for row in rows:
        if row.name in by_name:
            raise ValueError(f"Two rows are named {row.name!r}.")
        by_name[row.name] = {
            key: value
            for key, value in dataclasses.asdict(row).items()
            if key != "name" and value != ""
        }
    found = {**facts, "code": fingerprint(), "rows": by_name}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def load(folder: pathlib.Path = FOLDER) -> dict[str, Row]:
    """Returns the rows of all results by name; where two have a name, the newer one."""
    rows = {}
    for path in sorted(folder.glob("*.json")):  # names begin with the date
        for name, row in json.loads(path.read_text())["rows"].items():
            rows[name] = Row(name, **row)
    return rows


def stale(folder: pathlib.Path = FOLDER) -> list[str]:
    """Returns the newest result of each chip that is of other code than is here."""
    newest = {}
    for path in sorted(folder.glob("*.json")):
        newest[json.loads(path.read_text())["chip"]] = path
    now = fingerprint()
    return [
        path.name
        for path in newest.values()
        if json.loads(path.read_text())["code"] != now
    ]


def fingerprint(package: pathlib.Path = ROOT / "accumax") -> str:
    """Returns a hash of the code that rows measure, without comments and docstrings.

    It is the same for all versions of Python.
    """
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).with_suffix("").parts[0] in INSTRUMENTS:
            continue
        digest.update(path.relative_to(package).as_posix().encode() + b"\n")
        digest.update(_code(path.read_text()).encode())
    return digest.hexdigest()[:16]


def _code(source: str) -> str:
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False):
            text = node.body[0]
            for row in range(text.lineno, (text.end_lineno or text.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip()) + "\n"
