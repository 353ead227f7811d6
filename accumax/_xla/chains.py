"""Moves casts of stacked parameters into the scans that read them.

A program that casts all layers and then scans over them has the gradient of all layers
in the dtype of the cast, before it is cast back and added. Cast within the scan, only
one layer's gradient exists (whole tree cast to bf16, AdamW: 1.22 to 1.29 times the
memory of the step without accumulation on CPU, GPU and TPU; within the scan 0.91, 1.02
and 1.13, for XLA:TPU casts all layers ahead again).
Slicing commutes with what is done element by element, so no bit of the loss or of its
gradient changes.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from .jaxprs import (
    evaluate_part,
    inner_jaxprs,
    is_plain_jit,
    is_variable,
    known_at_start,
)

# Computed element by element; the second operand of the last two is a number.
_STEPS = "convert_element_type", "neg", "reduce_precision", "copy", "mul", "div"
# What a scan of a jaxpr has that `lax.scan` does not, or under other names.
_OF_SCAN = {"jaxpr", "num_consts", "num_carry", "linear", "ft_in", "ft_out"}


@dataclasses.dataclass(frozen=True)
class Chain:
    """An array that is computed element by element from arrays of its shape.

    Attributes:
      roots: these arrays, such as a parameter.
      steps: from the roots to the array, or from slices of the roots to its slice.
        None if the array is the only root.
    """

    roots: tuple[jax.Array, ...]
    steps: Callable[..., jax.Array] | None = None

    def with_roots(self, *roots: jax.Array) -> "Chain":
        return Chain(roots, self.steps)


def value(x: Any) -> Any:
    """The array of a `Chain`; anything else as it is."""
    if not isinstance(x, Chain):
        return x
    return x.roots[0] if x.steps is None else x.steps(*x.roots)


def moves(program: ClosedJaxpr, args: Sequence[jax.Array | Chain]) -> bool:
    """Whether `run` would move a chain, or only evaluate `program`."""
    return _moves(program.jaxpr, [_kind(x) for x in args])


def may_move(jaxpr: Any, count: int) -> bool:
    """Whether a scan reads a chain that begins at the first `count` inputs.

    `jaxpr` may be of a loss and its backward pass, where others read the chain too.
    """
    kinds = [1] * count + [0] * (len(jaxpr.invars) - count)
    return _moves(jaxpr, kinds, strict=False)


def run(program: ClosedJaxpr, args: Sequence[jax.Array | Chain]) -> list[jax.Array]:
    """Evaluates `program`, with the chains that a scan reads moved into the scan.

    A chain begins at an argument that is a `Chain`. It moves if nothing but the scan
    reads it, through `jax.jit` and `jax.checkpoint` too.
    """
    jaxpr = program.jaxpr
    if not moves(program, args):
        return jaxpr_as_fun(program)(*map(value, args))
    readers = _readers(jaxpr)
    known = known_at_start(program, args)
    waiting: list[Any] = []  # equations as they are, to be evaluated together

    def evaluate() -> None:
        if waiting:
            evaluate_part(jaxpr, waiting, lambda x: bool(readers[x]), known, value)
            waiting.clear()

    def operand(x: Any) -> Any:
        return known[x] if is_variable(x) else x.val

    for eqn in jaxpr.eqns:
        kinds = [_kind(known.get(x)) if is_variable(x) else 0 for x in eqn.invars]
        if _is_step(eqn, kinds, readers):
            (i,) = (i for i, kind in enumerate(kinds) if kind)
            known[eqn.outvars[0]] = _longer(known[eqn.invars[i]], eqn, i)
        elif _moves_into(eqn, kinds):
            evaluate()
            values = _rebuilt(eqn, [operand(x) for x in eqn.invars])
            known.update(zip(eqn.outvars, values, strict=True))
        else:
            waiting.append(eqn)
    evaluate()
    return [value(operand(x)) for x in jaxpr.outvars]


def _moves(jaxpr: Any, kinds: Sequence[int], strict: bool = True) -> bool:
    """Whether a chain moves. `kinds` of the inputs: see `_kind`.

    If not `strict`, others than the scan may read it.
    """
    if not any(kinds):
        return False
    return any(_moves_into(*x, strict) for x in _ends(jaxpr, kinds, strict))


def _ends(
    jaxpr: Any, kinds: Sequence[int], strict: bool = True
) -> Iterator[tuple[Any, list[int]]]:
    """Yields the equations that are no steps, with the kinds of their operands."""
    readers = _readers(jaxpr) if strict else collections.defaultdict(lambda: 1)
    known = dict(zip(jaxpr.invars, kinds, strict=True))
    for eqn in jaxpr.eqns:
        found = [known.get(x, 0) if is_variable(x) else 0 for x in eqn.invars]
        if _is_step(eqn, found, readers):
            known[eqn.outvars[0]] = 2
        else:
            yield eqn, found


def _kind(x: Any) -> int:
    """0 for an array; 1 for a chain without steps, and 2 with steps."""
    return 0 if not isinstance(x, Chain) else 1 if x.steps is None else 2


def _readers(jaxpr: Any) -> collections.Counter[Any]:
    read = [x for eqn in jaxpr.eqns for x in eqn.invars] + list(jaxpr.outvars)
    return collections.Counter(filter(is_variable, read))


def _is_step(eqn: Any, kinds: list[int], readers: dict[Any, int]) -> bool:
    """Whether `eqn` makes a chain longer, which is read once."""
    if eqn.primitive.name not in _STEPS or sum(map(bool, kinds)) != 1:
        return False
    if readers[eqn.outvars[0]] != 1 or eqn.params.get("sharding") is not None:
        return False
    if eqn.primitive.name == "div" and not kinds[0]:
        return False
    numbers = [x for x, kind in zip(eqn.invars, kinds, strict=True) if not kind]
    return all(not is_variable(x) and x.aval.shape == () for x in numbers)


def _longer(chain: Chain, eqn: Any, i: int) -> Chain:
    def steps(*roots: jax.Array) -> jax.Array:
        operands = [getattr(x, "val", None) for x in eqn.invars]
        operands[i] = roots[0] if chain.steps is None else chain.steps(*roots)
        return eqn.primitive.bind(*operands, **eqn.params)

    return Chain(chain.roots, steps)


def _moves_into(eqn: Any, kinds: list[int], strict: bool = True) -> bool:
    if not any(kinds):
        return False
    if eqn.primitive.name == "scan":
        options = eqn.params.keys() - _OF_SCAN
        known = options == {"length", "reverse", "unroll"} and eqn.params["length"]
        return bool(known) and 2 in kinds[-_scanned(eqn) :][: _scanned(eqn)]
    if "prevent_cse" in eqn.params and 2 in kinds:
        return True  # a `jax.checkpoint` would else keep the end of the chain
    inner = _called(eqn)
    return inner is not None and _moves(inner, kinds, strict)


def _scanned(eqn: Any) -> int:
    """The number of operands that a scan is over: they have one more axis outside."""
    inner = eqn.params["jaxpr"].jaxpr.invars
    pairs = zip(eqn.invars, inner, strict=True)
    return sum(x.aval.ndim != y.aval.ndim for x, y in pairs)


def _called(eqn: Any) -> Any:
    """The jaxpr of a `jax.jit` without shardings, or of a `jax.checkpoint`."""
    if "prevent_cse" in eqn.params:
        return eqn.params["jaxpr"]
    return eqn.params["jaxpr"].jaxpr if is_plain_jit(eqn) else None


def _rebuilt(eqn: Any, operands: list[Any]) -> Sequence[jax.Array]:
    """Evaluates `eqn`, with the chains among its operands moved into it."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        return _scan(eqn, operands)
    inner = params["jaxpr"]
    if not isinstance(inner, ClosedJaxpr):
        inner = ClosedJaxpr(inner, ())
    if "prevent_cse" not in params:
        with jax.named_scope(params["name"]):
            return run(inner, operands)

    def fun(slices: list[tuple[jax.Array, ...]]) -> list[jax.Array]:
        return run(inner, _with_roots(operands, slices))

    checkpoint = jax.checkpoint(
        fun, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return checkpoint(_roots(operands))


def _roots(operands: list[Any]) -> list[tuple[jax.Array, ...]]:
    return [x.roots if isinstance(x, Chain) else (x,) for x in operands]


def _with_roots(operands: list[Any], roots: list[tuple[jax.Array, ...]]) -> list[Any]:
    """`operands` with other roots; the inverse of `_roots` for the same ones."""
    pairs = zip(operands, roots, strict=True)
    return [x.with_roots(*y) if isinstance(x, Chain) else y[0] for x, y in pairs]


def _scan(eqn: Any, operands: list[Any]) -> Sequence[jax.Array]:
    inner, count = eqn.params["jaxpr"], _scanned(eqn)
    pairs = zip(eqn.outvars, inner.jaxpr.outvars, strict=True)
    carried = sum(x.aval.ndim == y.aval.ndim for x, y in pairs)
    first, xs = len(operands) - count - carried, operands[-count:]
    consts = [value(x) for x in operands[:first]]
    begin = [value(x) for x in operands[first:-count]]

    def body(carry: list[jax.Array], slices: list[tuple[jax.Array, ...]]) -> Any:
        out = run(inner, [*consts, *carry, *_with_roots(xs, slices)])
        return out[:carried], out[carried:]

    kinds = [0] * (len(operands) - count) + [_kind(x) for x in xs]
    kept = any(2 in x and not _moves_into(e, x) for e, x in _ends(inner.jaxpr, kinds))
    if kept and not inner.jaxpr.effects and not _has_checkpoint(inner.jaxpr):
        # Casts are computed again in the backward pass. They would else be kept for all
        # layers, as the operands of what follows. A `jax.checkpoint` around another one
        # would keep what that one leaves out, and JAX has none around a callback.
        shapes = {x.aval.shape for x in inner.jaxpr.invars[-count:]}
        policy = functools.partial(_keeps, shapes)
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, begin, _roots(xs), **options)
    return [*carry, *ys]


def _has_checkpoint(jaxpr: Any) -> bool:
    return any(
        "prevent_cse" in eqn.params or any(map(_has_checkpoint, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _keeps(shapes: set[Any], primitive: Any, *avals: Any, **_: Any) -> bool:
    """A policy of `jax.checkpoint`: keeps all but steps on arrays of these shapes."""
    return primitive.name not in _STEPS or avals[0].shape not in shapes
