"""Checks of the arguments that a call passes to a window."""

import math
from typing import Any

import jax.numpy as jnp
import optax

from .. import _tree
from .._types import ArrayLike
from .state import MEASURES, is_state


def check_flush(flush: Any) -> ArrayLike:
    if _tree.dtype_of(flush) != jnp.bool_ or jnp.shape(flush) != ():
        raise TypeError(
            f"flush is {_tree.describe(flush)}; expected a scalar bool: whether to "
            "close the window with this call."
        )
    return flush


def check_length(length: Any) -> ArrayLike:
    dtype = _tree.dtype_of(length)
    if (
        dtype is None
        or jnp.shape(length) != ()
        or not (
            jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
        )
    ):
        raise TypeError(
            f"every gives {_tree.describe(length)} for a window's length; expected "
            "a scalar integer of at least 1."
        )
    known = _tree.concrete(length)
    if known is not None and not (known >= 1 and known == math.floor(known)):
        raise ValueError(
            f"every gives {known} for a window's length; expected an integer of at "
            "least 1."
        )
    return length


def is_near(name: str, known: str) -> bool:
    """Whether `name` may be a misspelling of `known`, in case or in two letters."""
    name, known = name.lower(), known.lower()
    if name == known:
        return True
    # The edit distance; swapping two neighbouring letters is one edit.
    before: list[int] = []
    row = list(range(len(known) + 1))
    for i, a in enumerate(name, 1):
        above, row = row, [i]
        for j, b in enumerate(known, 1):
            edits = [above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)]
            if i > 1 and j > 1 and (name[i - 2], a) == (b, known[j - 2]):
                edits.append(before[j - 2] + 1)
            row.append(min(edits))
        before = above
    return row[-1] <= min(2, len(known) // 2)


def check_averaged(name: str, extra_args: dict[str, Any]) -> None:
    if name not in extra_args:
        raise TypeError(
            f'averaged_args has "{name}", which this call does not pass (it passes '
            f"{sorted(extra_args) or 'no extra arguments'}). Pass {name}=... in every "
            "call."
        )
    value = extra_args[name]
    dtype = _tree.dtype_of(value)
    if (
        dtype is None
        or jnp.shape(value) != ()
        or jnp.issubdtype(dtype, jnp.complexfloating)
    ):
        raise TypeError(
            f'averaged_args has "{name}", which is {_tree.describe(value)}; '
            "expected a real scalar."
        )


def check_state(
    state: Any, averaged_args: tuple[str, ...], measures: tuple[str, ...]
) -> None:
    """Checks that `state` is of an `accumulate` with these `averaged_args`.

    `measures` are what it keeps beside them, such as "noise".
    """
    if not is_state(state):
        hint = "Pass what init of this accumulate returned, or its last update."
        if isinstance(state, optax.MultiStepsState):
            hint = (
                "docs/coming_from.md has the lines that turn a MultiStepsState "
                "into an AccumulateState."
            )
        raise TypeError(
            f"state is a {type(state).__name__}, not an AccumulateState. {hint}"
        )
    options = zip(MEASURES, ("track_norm", "track_noise"), strict=True)
    for name, option in options:
        held = name in state.acc_args and name not in averaged_args
        if (name in measures) != held:
            has = "has none" if name in measures else "has one"
            raise TypeError(
                f"This accumulate has {option}={name in measures}, and the state "
                f'{has}: acc_args["{name}"]. Pass a state that its init gave, or '
                "change yours to be as there: state._replace(acc_args=...)."
            )
    if {*averaged_args, *measures} != set(state.acc_args):
        raise TypeError(
            f"state.acc_args holds {sorted(state.acc_args)}, but this accumulate "
            f"has averaged_args={averaged_args}. Pass a state that its init gave, or "
            "the averaged_args that the state was made with."
        )
