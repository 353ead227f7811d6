"""A program with all floating-point numbers in float64, and nothing else changed.

A function that is traced again with float64 arrays may be another one: `jax.random`
draws other bits, and a loss that casts to bfloat16 still rounds. So the program is
traced as it is, and each of its operations runs in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .._types import PyTree

# They hand their operands to a program of their own, to be run once.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_LOOPS = "scan", "while", "cond"
# They hold a program of the scalars that they combine, with its types.
_SCATTERS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-sub": lax.scatter_sub,
    "scatter_mul": lax.scatter_mul,
    "scatter-mul": lax.scatter_mul,
    "scatter-min": lax.scatter_min,
    "scatter-max": lax.scatter_max,
}
# The bits or the type of their operands matter.
_AS_THEY_ARE = (
    "bitcast_convert_type",
    "random_gamma",
    "random_gamma_grad",
    "rng_uniform",
    "pure_callback",
    "io_callback",
    "debug_callback",
    "debug_print",
    "ffi_call",
)


def in_float64(fun: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """`fun(*args)`, where each operation is in float64 or complex128.

    The leaves of the result are arrays; those of `args` that are none are static. Where
    the program has what cannot be run in this way, such as a kernel or a jax.Ref, `fun`
    gets float64 arrays instead.
    """
    leaves, structure = jax.tree.flatten(args)
    places = [i for i, x in enumerate(leaves) if hasattr(x, "dtype")]

    def of_arrays(arrays: Sequence[Any]) -> PyTree:
        full = list(leaves)
        for i, x in zip(places, arrays, strict=True):
            full[i] = x
        return fun(*jax.tree.unflatten(structure, full))

    arrays = [jnp.asarray(leaves[i]) for i in places]  # of the types that are traced
    try:
        program, shape = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
    except jax.errors.JAXTypeError:  # it looks at the numbers
        program = shape = None
    with jax.enable_x64(True):
        arrays = list(map(_as_wide, arrays))
        if program is None or not _is_known(program.jaxpr):
            _check_draws_nothing(program)
            return of_arrays(arrays)
        run = jax.jit(lambda x: _run(program.jaxpr, program.consts, x))
        try:
            out = run(arrays)
        except (TypeError, ValueError, NotImplementedError):
            _check_draws_nothing(program)  # an operation that float64 does not have
            return of_arrays(arrays)
        return jax.tree.unflatten(jax.tree.structure(shape), out)


def _check_draws_nothing(program: ClosedJaxpr | None) -> None:
    if program is not None and _draws(program.jaxpr):
        raise ValueError(
            "The reference draws random numbers, and has an operation that cannot run "
            "in float64 as it was traced (a linear solve, a kernel, a jax.Ref): with "
            "float64 arrays it would draw others. Draw before, and pass what is drawn "
            "in the batch."
        )


def _as_wide(x: Any) -> Any:
    is_float = hasattr(x, "dtype") and _is_float(x.dtype)
    return jnp.asarray(x, wide(x.dtype)) if is_float else x


def wide(dtype: Any) -> Any:
    """float64 or complex128 for a floating-point dtype."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return np.dtype(np.complex128 if is_complex else np.float64)


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _is_known(program: Jaxpr) -> bool:
    """Whether `_run` can run it."""
    for eqn in program.eqns:
        name = eqn.primitive.name
        avals = [x.aval for x in (*eqn.invars, *eqn.outvars)]
        if any(hasattr(x, "inner_aval") or not hasattr(x, "dtype") for x in avals):
            return False  # a jax.Ref, a token
        if name == "scatter" and not _replaces(eqn.params["update_jaxpr"]):
            return False  # x.at[i].apply(f)
        inner = [] if name in _SCATTERS else list(_inner(eqn))
        if inner and name not in _CALLS and name not in _LOOPS:
            return False
        if not all(map(_is_known, inner)):
            return False
    return True


def _replaces(update: Any) -> bool:
    return update is None or update.outvars[0] is update.invars[1]


def _draws(program: Jaxpr) -> bool:
    """Whether random numbers are drawn in it."""
    return any(
        "random_bits" in eqn.primitive.name
        or "threefry" in eqn.primitive.name
        or any(map(_draws, _inner(eqn)))
        for eqn in program.eqns
    )


def _inner(eqn: Any) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, (Jaxpr, ClosedJaxpr)):
                yield x.jaxpr if isinstance(x, ClosedJaxpr) else x


def _run(program: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    known: dict[Any, Any] = {}

    def read(x: Any) -> Any:
        if not isinstance(x, Literal):
            return known[x]
        aval: Any = x.aval
        value = np.asarray(x.val, aval.dtype)
        return value.astype(wide(aval.dtype)) if _is_float(aval.dtype) else value

    known.update(zip(program.constvars, map(_as_wide, consts), strict=True))
    known.update(zip(program.invars, args, strict=True))
    for eqn in program.eqns:
        out = _apply(eqn, list(map(read, eqn.invars)))
        known.update(zip(eqn.outvars, out, strict=True))
    return list(map(read, program.outvars))


def _closed(program: Any) -> Callable[..., list[Any]]:
    if isinstance(program, ClosedJaxpr):
        return lambda *args: _run(program.jaxpr, program.consts, args)
    return lambda *args: _run(program, (), args)


def _apply(eqn: Any, args: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        return _closed(params[_CALLS[name]])(*args)
    if name == "cond":
        index, *operands = args
        branches = list(map(_closed, params["branches"]))
        return lax.switch(jnp.int32(index), branches, *operands)
    if name == "while":
        return _while(params, args)
    if name == "scan":
        return _scan(eqn, args)
    if name in _SCATTERS:
        return [_scatter(name, params, args)]
    if name == "reduce_precision":
        return args
    if name in _AS_THEY_ARE:
        args = [
            x.astype(own.aval.dtype) if _is_float(own.aval.dtype) else x
            for x, own in zip(args, eqn.invars, strict=True)
        ]
        return list(map(_as_wide, _bind(eqn.primitive, args, params)))
    changed = {k: wide(v) if _is_dtype(v) else v for k, v in params.items()}
    if "precision" in changed:
        changed["precision"] = None  # an algorithm for float32
    return list(map(_as_wide, _bind(eqn.primitive, args, changed)))


def _bind(primitive: Any, args: list[Any], params: dict[str, Any]) -> list[Any]:
    out = primitive.bind(*args, **params)
    return list(out) if primitive.multiple_results else [out]


def _is_dtype(x: Any) -> bool:
    return isinstance(x, np.dtype) and _is_float(x)


def _scatter(name: str, params: dict[str, Any], args: list[Any]) -> Any:
    options = ("indices_are_sorted", "unique_indices", "mode")
    return _SCATTERS[name](
        *args,
        dimension_numbers=params["dimension_numbers"],
        **{option: params[option] for option in options},
    )


def _while(params: dict[str, Any], args: list[Any]) -> list[Any]:
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    goes_on, body = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
    of_cond, of_body = args[:first], args[first:second]
    return lax.while_loop(
        lambda carry: goes_on(*of_cond, *carry)[0],
        lambda carry: body(*of_body, *carry),
        args[second:],
    )


def _scan(eqn: Any, args: list[Any]) -> list[Any]:
    # The shapes tell what is what; the names of the parameters differ by version.
    body = eqn.params["jaxpr"]
    inside = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    scanned = _with_an_axis_more(eqn.invars, inside.invars)
    count = len(args) - scanned
    carried = len(eqn.outvars) - _with_an_axis_more(eqn.outvars, inside.outvars)
    consts, carry = args[: count - carried], args[count - carried : count]
    run = _closed(body)

    def turn(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        out = run(*consts, *carry, *xs)
        return out[:carried], out[carried:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(turn, carry, args[count:], **options)
    return [*carry, *stacked]


def _with_an_axis_more(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    pairs = zip(outside, inside, strict=True)
    return sum(len(x.aval.shape) == len(y.aval.shape) + 1 for x, y in pairs)
