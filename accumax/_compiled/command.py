"""The command lines of `accumax.audit` and `accumax.plan`."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .audit import audit
from .plan import plan


def audit_command(argv: Sequence[str] | None = None) -> None:
    """Prints the report of a step; `python -m accumax.audit --help` says how.

    Args:
      argv: the words of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m accumax.audit",
        description="What the compiler made of a step: memory, copies, collectives. "
        "Nothing runs.",
    )
    add = parser.add_argument
    add(
        "step",
        metavar="module:make_step",
        help="a function without arguments that returns (function, args), or a lowered "
        "or compiled step",
    )
    add("--json", action="store_true", help="print JSON instead of a page")
    add("--plot", type=Path, help="draw the memory, such as memory.png")
    flags = parser.parse_args(argv)
    try:
        step = find(flags.step)()
        if isinstance(step, tuple):
            fun, args = step
            report = audit(fun, *args)
        else:
            report = audit(step)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    print(json.dumps(report.to_dict(), indent=1) if flags.json else report)
    if flags.plot:
        report.plot(flags.plot)


def plan_command(argv: Sequence[str] | None = None) -> None:
    """Prints a plan; `python -m accumax.plan --help` says how.

    Args:
      argv: the words of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m accumax.plan",
        description="The largest microbatch whose step fits in the memory, from the "
        "compiler. Nothing runs.",
    )
    add = parser.add_argument
    add(
        "step",
        metavar="module:make_step",
        help="a function from a microbatch size to (function, args), or to a lowered "
        "or compiled step",
    )
    add("--batch-size", type=int, required=True, help="rows of the batch")
    add("--memory", help='of one device: bytes, "16GiB", "80%%"; the device\'s if left')
    add("--any-size", action="store_true", help="microbatches may be unequal")
    add("--plot", type=Path, help="write a figure, such as plan.png")
    flags = parser.parse_args(argv)
    memory = flags.memory
    if memory is not None and memory.strip().isdigit():
        memory = int(memory)
    try:
        make_step = find(flags.step)
        result = plan(
            make_step,
            flags.batch_size,
            memory_limit=memory,
            divisors_only=not flags.any_size,
        )
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    print(result)
    if flags.plot:
        result.plot(flags.plot)


def find(name: str) -> Any:
    """The function that `module:function` names, also in the current directory.

    Raises:
      ValueError: there is none. An error within the module is raised as it is.

    >>> find("math:sqrt")(9.0)
    3.0
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{name!r} must be module:function, such as train:make_step.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current directory; -m adds it by itself
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):
            raise  # the module is there, and one that it imports is not
        raise ValueError(
            f"There is no module {module!r} in {Path.cwd()} or where Python looks. "
            "Name it as in an import: package.module, without .py."
        ) from None
    if not callable(getattr(found, attribute, None)):
        raise ValueError(f"Module {module!r} has no function {attribute!r}.")
    return getattr(found, attribute)
