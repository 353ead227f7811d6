"""Tree arithmetic that `optax.tree` does not have.

A *differentiable* leaf is an inexact (float or complex) array or Python number. The
library works on the differentiable part of a tree. All other leaves (integers, PRNG
keys, float0 gradients, the functions and strings of an Equinox module) are None in this
part, and are put back at the end. So are the Python numbers of an Equinox module, which
`equinox.filter_grad` does not differentiate either.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._types import ArrayLike, PyTree

OVERWRITTEN = "_overwrite_with_gradient"  # Flax's name for the scales of fp8


class Unused(optax.MaskedNode):
    """Stands in a state for the sum of a gradient that the optimizer does not use.

    It is an `optax.MaskedNode`, for code that looks for one in a state.
    """


def _is_none(x: Any) -> bool:
    return x is None


def is_unused(x: Any) -> bool:
    return isinstance(x, Unused)


def _is_hole(x: Any) -> bool:
    return x is None or is_unused(x)


def dtype_of(x: Any) -> Any:
    """The dtype of an array, a `ShapeDtypeStruct` or a Python number; else None."""
    if isinstance(x, type):  # np.float32 itself has a `dtype`, as its instances have
        return None
    if hasattr(x, "dtype") and hasattr(x, "shape"):  # neither a dtype nor a Flax module
        # The dtype in JAX: without x64, a NumPy float64 becomes a float32.
        extended = jnp.issubdtype(x.dtype, jax.dtypes.extended)  # PRNG keys
        return x.dtype if extended else jax.dtypes.canonicalize_dtype(x.dtype)
    return jnp.result_type(x) if isinstance(x, (bool, int, float, complex)) else None


def dtypes(tree: PyTree) -> set[str]:
    """The names of the dtypes of what is differentiable."""
    return {str(dtype_of(x)) for x in jax.tree.leaves(tree) if is_differentiable(x)}


def is_differentiable(x: Any) -> bool:
    dtype = dtype_of(x)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def differentiable(tree: PyTree) -> PyTree:
    """`tree` with None in place of each leaf that is not differentiable."""

    def live(x: Any) -> Any:
        if _is_module(x):
            return jax.tree.map(in_module, x)
        return x if is_differentiable(x) else None

    def in_module(x: Any) -> Any:
        return x if is_differentiable(x) and hasattr(x, "dtype") else None

    return jax.tree.map(live, tree, is_leaf=_is_module)


def _is_module(x: Any) -> bool:
    """Whether `x` is an Equinox module. False if Equinox was not imported."""
    module = getattr(sys.modules.get("equinox"), "Module", None)
    return module is not None and isinstance(x, module)


def trained(tree: PyTree, like: PyTree) -> PyTree:
    """Returns the differentiable leaves of `tree` that `like`, a state, has."""
    return masked(differentiable(tree), like)


def masked(tree: PyTree, mask: PyTree) -> PyTree:
    """`tree` with the None or `Unused` of `mask`, wherever `mask` has one."""
    return jax.tree.map(
        lambda m, x: m if _is_hole(m) else x, mask, tree, is_leaf=_is_hole
    )


def used(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with the `Unused` of `like`; all of it if they differ in structure."""
    structures = [jax.tree.structure(x, is_leaf=_is_hole) for x in (tree, like)]
    return masked(tree, like) if structures[0] == structures[1] else tree


def seen(tree: PyTree, like: PyTree) -> PyTree:
    """As `trained`, with the leaves of `tree` where `like` has `Unused`."""
    return jax.tree.map(
        lambda m, x: None if m is None else x,
        like,
        differentiable(tree),
        is_leaf=_is_hole,
    )


def restore(part: PyTree, tree: PyTree) -> PyTree:
    """`part`, with the leaves of `tree` wherever `part` has None or `Unused`."""
    return fill(part, tree, lambda x: x)


def fill(part: PyTree, tree: PyTree, fun: Callable[[Any], Any]) -> PyTree:
    """As `restore`, with `fun` of these leaves."""
    return jax.tree.map(
        lambda x, y: jax.tree.map(fun, y) if _is_hole(x) else x,
        part,
        tree,
        is_leaf=_is_hole,
    )


def others(tree: PyTree, part: PyTree) -> PyTree:
    """The leaves of `tree` where `part`, of its structure, has None or `Unused`."""
    return jax.tree.map(
        lambda x, y: y if _is_hole(x) else None, part, tree, is_leaf=_is_hole
    )


def strong(x: ArrayLike, dtype: Any = None) -> jax.Array:
    """`x` as an array of `dtype` (its own by default), never weakly typed.

    A weak type in the state would change at the first update, trace twice under jit,
    and be refused as the carry of a `lax.scan`.
    """
    dtype = dtype_of(x) if dtype is None else dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys: no cast, no weak type
        return jnp.asarray(x)
    return jnp.asarray(x, dtype=dtype)


def unshare(tree: PyTree, *others: PyTree) -> PyTree:
    """Copies each array of `tree` that also occurs in `others`, or earlier in `tree`.

    JAX cannot donate an array twice, and some optimizers begin with the parameters
    themselves, or with one array in two places.
    """
    seen = {id(x): x for x in jax.tree.leaves(others)}  # the values keep the ids alive

    def copy(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        shared = id(x) in seen
        seen[id(x)] = x
        return jnp.copy(x) if shared else x

    return jax.tree.map(copy, tree)


def wide(dtype: Any, least: Any = jnp.float32) -> Any:
    """`dtype`, in at least the precision of `least`."""
    with jax.numpy_dtype_promotion("standard"):  # "strict" would refuse to compare
        return jnp.promote_types(dtype, least)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Returns `tree` in the dtypes of the leaves of `like`, never weakly typed."""
    return jax.tree.map(lambda x, y: strong(x, dtype_of(y)), tree, like)


def minus_zeros_like(tree: PyTree) -> PyTree:
    """Zeros of the shapes and dtypes of `tree`: -0.0 where there is a sign, else 0.

    -0.0 is the identity of IEEE addition. `x + 0.0` turns `x = -0.0` into +0.0, and XLA
    merges a tree of +0.0 with the zero-filled buffers of a backward scan and keeps both
    (GPU target, transformer step: temp 2.04 x the parameters instead of 1.09).
    """

    return jax.tree.map(lambda x: jnp.full_like(x, minus_zero(x.dtype)), tree)


def minus_zero(dtype: Any) -> complex:
    """A Python number: -0.0, in both parts of a complex number; 0 for an integer."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return complex(-0.0, -0.0)
    return -0.0 if jnp.issubdtype(dtype, jnp.inexact) else 0


def concrete(x: Any) -> float | None:
    """Returns the value of a scalar, or None if it is traced."""
    try:
        return float(x)
    except OverflowError:
        return math.inf
    except jax.errors.ConcretizationTypeError:
        return None


def all_finite(tree: PyTree) -> jax.Array:
    """() bool: no NaN and no infinity in any leaf."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)


def check_parameters(name: str, tree: PyTree) -> None:
    """Checks that `tree` is a tree of arrays, known or traced.

    Raises:
      TypeError: `tree` is not a tree of arrays, is a tree of shapes, or has values that
        are no parameters.
    """
    if jax.tree_util.all_leaves([tree]) and tree is not None and dtype_of(tree) is None:
        raise TypeError(
            f"{name} is a {type(tree).__name__}; expected a tree of arrays. Of a Flax "
            'Linen module, pass module.init(key, x)["params"].'
        )
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is a ShapeDtypeStruct, which has "
                "no values. For the shapes of a state: jax.eval_shape(tx.init, params)."
            )
        if any(getattr(key, "key", None) == OVERWRITTEN for key in path):
            raise TypeError(
                f"{name} has {OVERWRITTEN!r}: Flax's fp8 scales, whose gradients are "
                "new values and not to be added up. Pass the other collection, "
                '["params"], or use accumax.linen.TrainState.apply_gradients.'
            )


def check_like(name: str, tree: PyTree, expected: PyTree, expected_name: str) -> None:
    """Checks that `tree` and `expected` have the same differentiable leaves.

    `expected` may lack leaves of an Equinox module, if made from a filtered module.

    Raises:
      ValueError: a leaf is missing, superfluous or of another shape.
      TypeError: a leaf is not floating-point, or is complex where it must be real.
    """
    got = _by_path(tree)
    live = _by_path(differentiable(tree))
    want = _by_path(expected)
    modules = tuple(
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_module)
        if _is_module(x)
    )
    for path, like in want.items():
        if like is None:
            continue
        if got.get(path) is None:
            raise ValueError(
                f"{name} has no leaf at {path or 'its root'}, where {expected_name} "
                f"has {describe(like)}. The leaves of {name} are {_paths(got)}; pass "
                f"one for each of {_paths(want)}."
            )
        x = got[path]
        if live.get(path) is None:
            number = isinstance(x, (int, float, complex))
            got_there = f"the Python number {x}" if number else describe(x)
            hint = (
                " Under jax.jit the Python numbers of an Equinox module are arrays: "
                "use eqx.filter_jit for tx.init, as for the step."
            )
            raise TypeError(
                f"{name}{path} is {got_there}; {expected_name} has {describe(like)} "
                "there. Pass a floating-point array of that shape."
                f"{hint if number and modules else ''}"
            )
        if np.shape(x) != like.shape:
            raise ValueError(
                f"{name}{path} has shape {np.shape(x)}; {expected_name} has "
                f"{like.shape} there. Pass an array of that shape."
            )
        if jnp.iscomplexobj(x) and not jnp.issubdtype(like.dtype, jnp.complexfloating):
            raise TypeError(
                f"{name}{path} is {describe(x)}; {expected_name} has {describe(like)} "
                "there. Take its real part."
            )
    within = tuple(module + sign for module in modules for sign in ".[")
    unused = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(expected, is_leaf=_is_hole)
        if is_unused(x)
    }
    for path, x in live.items():
        if x is None or want.get(path) is not None or path in unused:
            continue
        if not path.startswith(within):
            raise ValueError(
                f"{name}{path} is {describe(x)}; {expected_name} has nothing to "
                f"differentiate there, only at {_paths(want)}. Remove it, or "
                "initialise with the parameters that it belongs to."
            )
    want_tree = jax.tree.structure(differentiable(expected))
    try:
        got_tree = jax.tree.structure(trained(tree, expected))
    except ValueError:
        got_tree = jax.tree.structure(differentiable(tree))
    if got_tree != want_tree:
        raise ValueError(
            f"{name} and {expected_name} have the same leaves in different containers: "
            f"{got_tree} and {want_tree}. Use the same containers for both."
        )


def check_same(name: str, tree: PyTree, expected: PyTree) -> None:
    """Checks that `tree` has the structure and the shapes of `expected`.

    Raises:
      ValueError: `tree` differs.
    """
    got, want = (
        (jax.tree.structure(t), [np.shape(x) for x in jax.tree.leaves(t)])
        for t in (tree, expected)
    )
    if got != want:
        raise ValueError(
            f"The new {name} is {outline(tree)}, where {outline(expected)} was. It "
            "must stay of that structure and of those shapes."
        )


def check_any_float(name: str, tree: PyTree) -> None:
    """Checks that `tree`, which is differentiated, has a floating-point number."""
    leaves = jax.tree.leaves(tree)
    if leaves and not any(map(is_differentiable, leaves)):
        raise TypeError(
            f"{name}, which is differentiated, holds no floating-point number: "
            f"{outline(tree)}."
        )


def check_flags(**flags: Any) -> None:
    """Checks that options are True or False. To Python, "no" is true, too.

    Raises:
      TypeError: one is something else. The message names it.
    """
    for name, flag in flags.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name}={flag!r} must be True or False.")


def describe(x: Any) -> str:
    """`x` for an error message: `float32[3, 4]` for an array, its repr for the rest."""
    dtype = dtype_of(x)
    if dtype is None:
        return repr(x)
    name = "float0" if dtype == jax.dtypes.float0 else str(dtype)
    return f"{name}{list(np.shape(x))}"


def outline(tree: PyTree) -> str:
    """`tree` for an error message: each of its leaves described."""
    try:
        return str(jax.tree.map(describe, tree))
    except Exception:  # a class in it takes no strings
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        each = [f"{jax.tree_util.keystr(path)}: {describe(x)}" for path, x in leaves]
        return f"{type(tree).__name__} of {', '.join(each)}"


def _by_path(tree: PyTree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_none)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _paths(leaves: dict[str, Any], most: int = 8) -> str:
    paths = [
        path or "(root)" for path, leaf in leaves.items() if is_differentiable(leaf)
    ]
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return (", ".join(paths[:most]) or "(none)") + more
