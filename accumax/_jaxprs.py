"""What a function does, as its jaxpr says."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from ._types import PyTree

# Primitives that name an axis and send nothing.
_SILENT = "axis_index", "pcast", "pvary"


def sliced_leaves(fun: Callable[[PyTree], Any], params: PyTree) -> PyTree:
    """For each leaf of `params`, whether a slice of its tangent is taken, at any depth.

    Of the tangent and not of the parameter: in `(p + 1)[0]` they differ.
    """

    def walk(jaxpr: Any, names: dict[Any, Any]) -> set[Any]:
        found = set()
        for eqn in jaxpr.eqns:
            args = [None if hasattr(x, "val") else names.get(x) for x in eqn.invars]
            if eqn.primitive.name in ("slice", "dynamic_slice"):
                found |= {args[0]}
            for inner in _inner(eqn):
                # All operands of a loop or a call; a conditional's come last.
                passed = args[len(args) - len(inner.invars) :]
                found |= walk(inner, dict(zip(inner.invars, passed, strict=False)))
        return found

    def tangent(tangents: PyTree) -> jax.Array:
        return jax.jvp(lambda p: fun(p)[0], (params,), (tangents,))[1]

    jaxpr = jax.make_jaxpr(tangent)(params).jaxpr
    found = walk(jaxpr, {x: i for i, x in enumerate(jaxpr.invars)})
    leaves = [i in found for i in range(len(jaxpr.invars))]
    return jax.tree.structure(params).unflatten(leaves)


def exchanges(names: tuple[str, ...], fun: Callable[..., Any], *args: Any) -> bool:
    """Whether `fun(*args)` has devices along these mesh axes send each other anything.

    In a `jax.shard_map` over them.
    """

    def walk(jaxpr: Any) -> bool:
        for eqn in jaxpr.eqns:
            leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
            named = any(x in names for x in leaves if isinstance(x, str))
            if named and eqn.primitive.name not in _SILENT:
                return True
            if any(map(walk, _inner(eqn))):
                return True
        return False

    return walk(jax.make_jaxpr(fun)(*args).jaxpr)


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs of a loop, a conditional or a call."""
    for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(x):
            yield getattr(x, "jaxpr", x)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
