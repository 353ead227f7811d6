"""The command line of `accumax.audit`."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from .audit import audit


def audit_command(arguments: Sequence[str] | None = None) -> None:
    """Prints the report of a step; `python -m accumax.audit --help` says how."""
    parser = argparse.ArgumentParser(
        prog="python -m accumax.audit",
        description="What the compiler made of a step: memory, copies, collectives.",
    )
    parser.add_argument(
        "step",
        metavar="module:name",
        help="a function without arguments that returns (function, *arguments), or the "
        "lowered or compiled step; or such a value itself",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--plot", metavar="FILE", help="draw the memory to a file")
    flags = parser.parse_args(arguments)
    try:
        made = named(flags.step)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(str(error))
    if callable(made) and not hasattr(made, "as_text"):
        made = made()
    report = audit(*made) if isinstance(made, tuple) else audit(made)
    print(json.dumps(report.to_dict(), indent=1) if flags.json else report)
    if flags.plot:
        report.plot(flags.plot)


def named(name: str) -> Any:
    """What "module:name" names; modules are looked for here first.

    Raises:
      ValueError: it has another form.
      ImportError, AttributeError: there is no such module, or name in it.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{name!r} must be module:name, such as train:make_step.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), attribute)
