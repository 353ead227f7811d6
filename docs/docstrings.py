"""An extension of griffe, which reads the docstrings of the API: see `mkdocs.yml`.

`model, grads: the module and its gradient` is an entry for two arguments. griffe knows
one name an entry, so each name gets one, with the same text or, if that is long, a word
that the first one has it. griffe still warns of a name that the function does not have.
And it takes what stands before a colon for the type of what is returned, so the type is
put there.
"""

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]  # of the extra `docs`

ENTRY = re.compile(
    r"^(?P<indent> +)(?P<names>(?:\*{0,2}\w+,\s+)+\*{0,2}\w+)"
    r"(?P<text>: .*(?:\n(?P=indent) +\S.*)*)",
    re.MULTILINE,
)


def split(docstring: str) -> str:
    """An entry for each name of an entry with several."""

    def entries(match: re.Match[str]) -> str:
        first, *others = re.split(r",\s+", match["names"])
        text = f": see `{first}`." if "\n" in match["text"] else match["text"]
        lines = [first + match["text"], *(name + text for name in others)]
        return "\n".join(match["indent"] + line for line in lines)

    return ENTRY.sub(entries, docstring)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.is_alias or not obj.docstring:
            return
        text = split(obj.docstring.value)
        if obj.is_function and obj.returns:
            text = text.replace("\nReturns:\n  ", f"\nReturns:\n  {obj.returns}: ")
        obj.docstring.value = text
