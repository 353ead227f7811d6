"""What `mkdocs build` does beside the pages: see `mkdocs.yml`.

The first page is the README. The pages of the API are made of the docstrings, one page
for each public name, and those of the results are what `benchmarks/run.py` wrote. A
number that is not the one in the results, or results that are older than the code, is a
warning, and so ends `mkdocs build --strict`. (Not with `--quiet`, which hides warnings
from `--strict`.) The environment variable `STALE=allow` lets results be older.
"""

import ast
import functools
import html
import importlib
import logging
import os
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs"))

import quotes  # noqa: E402  # beside this file

PACKAGE = ROOT / "accumax"
DOORS = "linen", "nnx", "testing"  # modules of public names
COPIES = {"README.md": "index.md"} | {
    name: name.lower() for name in ("CONTRIBUTING.md", "CHANGELOG.md")
}
COSTS = "What it costs"  # its section has the results of each chip
WARNINGS = logging.getLogger("mkdocs.hooks.accumax")  # --strict counts its warnings


def public(package: pathlib.Path = PACKAGE) -> dict[str, str]:
    """From each public name, such as "linen.ema", to where it is defined."""
    found = _names(package / "__init__.py", "accumax")
    for door in DOORS:
        names = _names(package / f"{door}.py", f"accumax.{door}")
        found |= {f"{door}.{name}": place for name, place in names.items()}
    return found


def _names(path: pathlib.Path, module: str) -> dict[str, str]:
    """Of a module: what it defines, and what it imports as `x as x`."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            source = f"accumax.{node.module}"
            for alias in node.names:
                if alias.name == alias.asname:
                    found[alias.name] = f"{source}.{alias.name}"
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            found[node.name] = f"{module}.{node.name}"
    return found


def first_line(place: str) -> str:
    """The first line of the docstring of what is defined at `place`."""
    *module, name = place.split(".")
    tree = ast.parse((ROOT / pathlib.Path(*module)).with_suffix(".py").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n\n")[0]
    raise ValueError(f"{place} is not defined where it is imported from.")


def api() -> dict[str, str]:
    """The pages of the API, by their place in the site."""
    names, files = public(), paths()
    rows = [
        f"| [`{name}`]({files[name]}) | {' '.join(first_line(place).split())} |"
        for name, place in names.items()
    ]
    head = ["# API", "", "| `accumax.` | |", "|---|---|"]
    pages = {"api/index.md": "\n".join([*head, *rows, ""])}
    for name, place in names.items():
        heading = f"    options: {{heading: accumax.{name}, toc_label: {name}}}"
        pages[f"api/{files[name]}"] = f"::: {place}\n{heading}\n"
    return pages


def paths() -> dict[str, str]:
    """The file of each public name. Some file systems do not know "a" from "A"."""
    found: dict[str, str] = {}
    for name in public():
        taken = f"{name}.md".lower() in map(str.lower, found.values())
        found[name] = f"{name}_.md" if taken else f"{name}.md"
    return found


def measured() -> dict[str, pathlib.Path]:
    """The newest page of results of each chip, by its title."""
    pages = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    # Names begin with the date, 2026-11-26-, and the chip's pictures with its name.
    return {f"Results: {_chip(page.stem[11:])}": page for page in pages}


def _chip(name: str) -> str:
    words = name.split("-")
    return " ".join(x if x.startswith("v") else x.upper() for x in words)  # TPU v5e


def tables(page: pathlib.Path) -> str:
    """A page of results, with the pictures of its chip."""
    pictures = sorted(page.parent.glob(f"{page.stem[11:]}-*.png"))
    shown = [
        f"![{path.stem.replace('-', ' ')}: as in the tables above]({path.name})\n"
        for path in pictures
    ]
    return "\n".join([page.read_text(), *shown])


def relinked(text: str, *, top: bool) -> str:
    """`text` with links as the site has them; `top`: it is of the repository's top."""
    if top:
        text = re.sub(r"\]\((?:docs/)([^)]+)\)", r"](\1)", text)
    above = "" if top else "../"
    for name, uri in COPIES.items():
        text = text.replace(f"]({above}{name}", f"]({uri}")
    return text


# --- what mkdocs calls --------------------------------------------------------------


def on_config(config: Any) -> Any:
    for complaint in quotes.complaints(stale=os.environ.get("STALE") != "allow"):
        WARNINGS.warning(complaint)
    for entry in config["nav"]:
        if "API" in entry:
            pages = [{name: f"api/{path}"} for name, path in paths().items()]
            entry["API"] = [entry["API"], *pages]
        if COSTS in entry:
            pages = [{x: f"results/{y.name}"} for x, y in measured().items()]
            entry[COSTS] = [entry[COSTS], *pages]
    config["markdown_extensions"].append(_doctests())
    return config


def on_files(files: Any, config: Any) -> Any:
    add = importlib.import_module("mkdocs.structure.files").File.generated
    for name, uri in COPIES.items():
        text = relinked((ROOT / name).read_text(), top=True)
        files.append(add(config, uri, content=text))
    for uri, text in api().items():
        files.append(add(config, uri, content=text))
    for page in measured().values():
        files.append(add(config, f"results/{page.name}", content=tables(page)))
        for path in page.parent.glob(f"{page.stem[11:]}-*.png"):
            files.append(add(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    text = relinked(quotes.QUOTE.sub(r"\g<4>", markdown), top=False)
    # A picture of several panels is small on a phone: it leads to itself in full size.
    return re.sub(r"(?m)^(!\[[^]]*\]\(([^)]+)\))$", r"[\1](\2)", text)


def on_page_content(text: str, **_: Any) -> str:
    # Docstrings have mathematics as Sphinx has it; browsers want MathML.
    text = re.sub(r":math:<code>(.*?)</code>", _mathml("inline"), text)
    text = re.sub(r"<p>\.\. math:: (.*?)</p>", _mathml("block"), text, flags=re.DOTALL)
    # A browser breaks "accumulate(optax.adamw(3e-4), k)" nowhere, or within a word.
    cells = r"<t[hd]>.*?</t[hd]>"
    code = functools.partial(re.sub, r"<code>.*?</code>", _breakable)
    text = re.sub(cells, lambda match: code(match[0]), text, flags=re.DOTALL)
    text = re.sub(r"<h[12] .*?</h[12]>", _breakable, text, flags=re.DOTALL)
    return re.sub(
        "(?<=[0-9]) (?=[\N{MULTIPLICATION SIGN}%])", "\N{NO-BREAK SPACE}", text
    )


def _mathml(display: str) -> Any:
    convert = importlib.import_module("latex2mathml.converter").convert
    convert = functools.partial(convert, display=display)
    return lambda match: convert(html.unescape(match[1]))


def _breakable(match: re.Match[str]) -> str:
    """With places in code and names where a line may end."""
    tags = re.split(r"(<[^>]*>)", match[0])
    return "".join(
        part if part.startswith("<") else re.sub(r"(?<=[(._=])(?=\w)", "<wbr>", part)
        for part in tags
    )


def _doctests() -> Any:
    """An extension of Markdown: what begins with >>> is code and not a quotation."""
    base = importlib.import_module("markdown.preprocessors").Preprocessor
    extension = importlib.import_module("markdown.extensions").Extension

    class Fences(base):
        def run(self, lines: list[str]) -> list[str]:
            text = "\n".join(lines)
            begin = r"(?:^|(?<=\n))>>> .*(?:\n.+)*"  # up to a blank line
            return re.sub(begin, r"```pycon\n\g<0>\n```", text).split("\n")

    class Doctests(extension):
        def extendMarkdown(self, md: Any) -> None:  # Markdown's name
            md.preprocessors.register(Fences(md), "doctests", 100)

    return Doctests()
