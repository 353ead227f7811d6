"""An extension of griffe, which reads the docstrings of the API: see `mkdocs.yml`.

`model, grads: the module and its gradient` is an entry for two arguments. griffe knows
one name an entry, so each name gets one, with the same text. It still warns of a name
that the function does not have.
"""

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]  # of the extra `docs`

ENTRY = re.compile(
    r"^(?P<indent> +)(?P<names>(?:\*{0,2}\w+, )+\*{0,2}\w+)"
    r"(?P<text>: .*(?:\n(?P=indent) +\S.*)*)",
    re.MULTILINE,
)


def split(docstring: str) -> str:
    """An entry for each name of an entry with several."""

    def entries(match: re.Match[str]) -> str:
        names = match["names"].split(", ")
        return "\n".join(match["indent"] + name + match["text"] for name in names)

    return ENTRY.sub(entries, docstring)


class JointEntries(griffe.Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = split(obj.docstring.value)
