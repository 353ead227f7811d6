"""Which results of a function are its arguments, unchanged.

A loop, a call or a `jax.checkpoint` returns new values, also of what it hands on as it
was: NNX scans over layers and gets each of their variables back.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax

from .._types import PyTree
from .jaxprs import inner_jaxprs, is_variable

# Not custom_vjp and custom_jvp: their rules may change what the function hands on.
_CALLS = "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"
_SAME = "optimization_barrier", "sharding_constraint", "reshard", "copy", "copy_p"

# A result that is an input, with its axes in this order.
Source: TypeAlias = tuple[int, tuple[int, ...]]


def unchanged_leaves(
    fun: Callable[[PyTree], tuple[Any, PyTree]], tree: PyTree
) -> tuple[Any, list[bool]]:
    """Traces `fun(tree) -> (out, tree)`.

    Returns:
      The shapes of `out`, and for each leaf of `tree` whether it is always unchanged.
    """
    if not jax.tree.leaves(tree):
        return jax.eval_shape(fun, tree)[0], []
    program, (out, after) = jax.make_jaxpr(fun, return_shape=True)(tree)
    found = _unmoved(program.jaxpr)[len(jax.tree.leaves(out)) :]
    assert len(found) == len(jax.tree.leaves(after))
    return out, [x == i for i, x in enumerate(found)]


def restored(kept: PyTree, old: PyTree, new: PyTree) -> PyTree:
    """Returns `new`, with the leaves of `old` where `kept`, a tree of bool, is true.

    XLA keeps both, or carries the new one, of a leaf that a loop hands on.
    """
    return jax.tree.map(lambda k, x, y: x if k else y, kept, old, new)


def _unmoved(jaxpr: Any) -> list[int | None]:
    """For each output the number of the input that it is, or None."""

    def number(source: Source | None) -> int | None:
        if source is None or source[1] != tuple(range(len(source[1]))):
            return None
        return source[0]

    return list(map(number, _sources(jaxpr)))


def _sources(jaxpr: Any) -> list[Source | None]:
    """For each output the input that it is, or None."""
    known: dict[Any, Source] = {
        x: (i, tuple(range(len(x.aval.shape)))) for i, x in enumerate(jaxpr.invars)
    }
    for eqn in jaxpr.eqns:
        for result, operand, axes in _handed_on(eqn):
            if is_variable(operand) and operand in known:
                i, before = known[operand]
                # NNX moves the axis of the layers to the front, and back.
                known[result] = (
                    i,
                    before if axes is None else tuple(before[axis] for axis in axes),
                )
    return [known.get(x) if is_variable(x) else None for x in jaxpr.outvars]


def _handed_on(eqn: Any) -> Iterator[tuple[Any, Any, tuple[int, ...] | None]]:
    """Yields a result of `eqn`, the operand that it is, and its axes if they moved."""
    name, operands, results = eqn.primitive.name, eqn.invars, eqn.outvars
    inner = list(inner_jaxprs(eqn))
    if name == "transpose":
        yield results[0], operands[0], eqn.params["permutation"]
    elif name in _SAME:
        for result, operand in zip(results, operands, strict=True):
            yield result, operand, None
    elif name in _CALLS and len(inner) == 1 and len(inner[0].invars) == len(operands):
        for result, source in zip(results, _sources(inner[0]), strict=True):
            if source is not None:
                yield result, operands[source[0]], source[1]
    elif name == "cond":
        found = zip(results, *map(_unmoved, inner), strict=True)
        for result, first, *others in found:
            if first is not None and others == [first] * len(others):
                yield result, operands[1 + first], None
    elif name == "while":
        body = getattr(eqn.params["body_jaxpr"], "jaxpr", eqn.params["body_jaxpr"])
        consts = eqn.params["body_nconsts"]
        carry = operands[eqn.params["cond_nconsts"] + consts :]
        for j, (result, i) in enumerate(zip(results, _unmoved(body), strict=True)):
            if i == consts + j:
                yield result, carry[j], None
    elif name == "scan":
        for result, operand in _of_scan(inner[0], operands, results):
            yield result, operand, None


def _of_scan(body: Any, operands: Any, results: Any) -> Iterator[tuple[Any, Any]]:
    # The shapes tell what is scanned over; JAX 0.12 has other parameters than before.
    scanned = _with_an_axis_more(operands, body.invars)
    carried = len(results) - _with_an_axis_more(results, body.outvars)
    sliced = len(operands) - scanned
    consts = sliced - carried
    for j, (result, i) in enumerate(zip(results, _unmoved(body), strict=True)):
        same = i == consts + j if j < carried else i is not None and i >= sliced
        if same:
            yield result, operands[i]


def _with_an_axis_more(outside: Any, inside: Any) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(len(x.aval.shape) == len(y.aval.shape) + 1 for x, y in pairs)
