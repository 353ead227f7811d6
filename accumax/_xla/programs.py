"""Traced programs, and the transformations that may not take them apart."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from .._types import PyTree
from .jaxprs import hands_on_refs, has_own_refs_alone

_HOLE = object()  # stands for an array

# Before, JAX cannot lower refs that are within one equation.
_HAS_REFS_IN_ONE = jax.__version_info__ >= (0, 11)


def run_isolated(
    fun: Callable[..., Any],
    *args: Any,
    unless: Callable[[Any], bool] | None,
    as_one: bool = False,
) -> Any:
    """Runs `fun(*args)`; a failure leaves nothing behind in the caller's trace.

    Returns None if `unless(jaxpr)` of it is true. With `as_one` it is one equation, if
    JAX can have refs in one and nothing outside sees an effect of it.
    """
    program, join = program_of(fun, *args)
    if unless is not None and unless(program.jaxpr):
        return None
    operands = jax.tree.leaves(args)
    arrays = program.consts, operands
    alone = as_one and _HAS_REFS_IN_ONE and has_own_refs_alone(program)
    if alone and not _is_differentiated(arrays):
        return join(_as_one(program)(*arrays))
    if hands_on_refs(program.jaxpr):
        _forbid_vmap(_tracers((operands, program.consts)))
    return join(jaxpr_as_fun(program)(*operands))


def _as_one(program: ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    """`(consts, operands) -> results` of `program`, as one equation.

    JAX takes a loop apart if something in it is differentiated (see `refs`), and raises
    an error where this leaves a ref in a loop. One equation moves as a whole.
    """

    # Without the constants, some of them tracers, which the rule would keep alive.
    jaxpr = ClosedJaxpr(program.jaxpr, [None] * len(program.consts)).jaxpr
    in_loops = hands_on_refs(jaxpr)

    def run(consts: list[Any], operands: list[Any]) -> list[jax.Array]:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*operands)

    one = jax.custom_batching.custom_vmap(run)

    @one.def_vmap
    def batched(size: int, axes: Any, *args: Any) -> Any:
        del size
        leaves, structure = jax.tree.flatten(args)
        flags = jax.tree.leaves(axes)
        moved = [x for x, flag in zip(leaves, flags, strict=True) if flag]
        if not moved:
            out = run(*args)
            return out, [False] * len(out)

        if in_loops:
            raise NotImplementedError(_CANNOT_BATCH)

        def member(own: list[Any]) -> list[jax.Array]:
            mine = iter(own)
            pairs = zip(leaves, flags, strict=True)
            here = [next(mine) if flag else x for x, flag in pairs]
            return run(*structure.unflatten(here))

        out = jax.vmap(member)(moved)
        return out, [True] * len(out)

    return one


_CANNOT_BATCH = (
    "jax.vmap cannot batch this loop or jitted function, whose loss is differentiated "
    "in place and has a lax.scan or a lax.cond. Pass in_place=False, or put jax.jit "
    "outside of jax.vmap."
)


def _is_differentiated(tree: PyTree) -> bool:
    differentiated = False
    probe = jax.custom_jvp(lambda arrays: ())

    @probe.defjvp
    def note(primals: Any, tangents: Any) -> Any:
        nonlocal differentiated
        del primals, tangents
        differentiated = True
        return (), ()

    probe([x for x in jax.tree.leaves(tree) if isinstance(x, Tracer)])
    return differentiated


def program_of(
    fun: Callable[..., Any], *args: Any
) -> tuple[ClosedJaxpr, Callable[[list[jax.Array]], Any]]:
    """Traces `fun(*args)`: its jaxpr, and from the jaxpr's results to those of `fun`.

    Unlike `jax.make_jaxpr`, it takes a `fun` that returns other leaves than arrays.
    """
    static: list[Any] = []

    def arrays(*args: Any) -> list[jax.Array]:
        found, *static[:] = split_arrays(fun(*args))
        return found

    program = jax.make_jaxpr(arrays)(*args)
    return program, lambda found: join_arrays(found, *static)


def split_arrays(tree: PyTree) -> tuple[list[jax.Array], Any, list[Any]]:
    """The arrays of `tree`, its structure, its leaves with `_HOLE` for each array."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    return arrays, structure, [_HOLE if isinstance(x, jax.Array) else x for x in leaves]


def join_arrays(arrays: list[jax.Array], structure: Any, leaves: list[Any]) -> PyTree:
    # A result that is a constant of a jaxpr comes out of it as a number.
    left = map(jnp.asarray, arrays)
    return structure.unflatten([next(left) if x is _HOLE else x for x in leaves])


def needs_tree(tree: PyTree) -> bool:
    """Whether gradients must be carried as a tree, for JAX takes no refs here.

    So it is if the current trace batches or differentiates an array of `tree`, and with
    `jax.disable_jit`, for a `jax.shard_map`. It does not detect a `jax.vmap` or a
    derivative around a loop or a `jax.jit`.
    """
    no_jit = jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
    return no_jit or _is_batched(tree) or _is_differentiated(tree)


def _is_batched(tree: PyTree) -> bool:
    batched = False
    probe = jax.custom_batching.custom_vmap(lambda arrays: ())

    @probe.def_vmap
    def note(size: int, each: Any, arrays: list[jax.Array]) -> Any:
        nonlocal batched
        del size, each, arrays
        batched = True
        return (), ()

    probe(_tracers(tree))
    return batched


def _tracers(tree: PyTree) -> list[jax.Array]:
    return [
        lax.stop_gradient(x) for x in jax.tree.leaves(tree) if isinstance(x, Tracer)
    ]


@jax.custom_batching.custom_vmap
def _forbid_vmap(arrays: list[jax.Array]) -> tuple[()]:
    """Raises an error if `jax.vmap` batches `arrays`.

    `jax.vmap` cannot batch a scan over a ref, nor, from JAX 0.12 on, a conditional that
    gets a ref. The error of JAX names nothing in the caller's code.
    """
    del arrays
    return ()


@_forbid_vmap.def_vmap
def _refuse(size: int, batched: Any, arrays: list[jax.Array]) -> Any:
    del size, batched, arrays
    raise NotImplementedError(_CANNOT_BATCH)
