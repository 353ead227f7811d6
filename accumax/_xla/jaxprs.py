"""Properties of a function, read from its jaxpr, and its evaluation in parts."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.ref
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Sharding

from .._types import PyTree

# Primitives that name an axis and do not communicate.
_SILENT = "axis_index", "pcast", "pvary"

# How a value in a linear program depends on the inputs: None if it does not, the index
# of the input that it is, or this if it is computed from inputs.
_COMPUTED = "computed"


def of_linear_program(
    ask: Callable[[Any], set[int]], fun: Callable[[PyTree], Any], params: PyTree
) -> set[int]:
    """Returns `ask(program)` for the linear program of `fun(params)[0]`.

    JAX transposes this jaxpr into the backward pass. Its inputs are the tangents of the
    leaves of `params`; residuals are constants.
    """
    answer = set()

    def trace(params: PyTree) -> None:
        _, linear = jax.linearize(lambda p: fun(p)[0], params)
        answer.update(ask(jax.make_jaxpr(linear)(params).jaxpr))

    jax.eval_shape(trace, params)  # leaves nothing behind in the caller's trace
    return answer


def sliced(program: Any) -> set[int]:
    """Returns the inputs that a linear program slices, at any depth."""
    equations = _walk(program, range(len(program.invars)))
    return _read_first(equations, "slice", "dynamic_slice")


def sliced_in_place(program: Any) -> set[int]:
    """Returns the inputs into which JAX before 0.11 may fail to add a gradient.

    Those of slices at fixed places, but of none in a `jax.checkpoint`.
    """
    kinds = range(len(program.invars))
    equations = _walk(program, kinds, lambda eqn: "prevent_cse" in eqn.params)
    return _read_first(equations, "slice")


def _read_first(equations: Iterable[tuple[Any, list[Any]]], *names: str) -> set[int]:
    """The inputs that are the first operand of a primitive of these names."""
    found = [x for eqn, x in equations if eqn.primitive.name in names]
    return _inputs([kinds[0] for kinds in found])


def unsafe_refs(program: Any, ported: set[int]) -> set[int]:
    """Returns `ported` and all other inputs of a linear program that need a port.

    JAX before 0.11 silently transposes two things wrongly:

    - A scan with both refs and values among its constants, or among the operands that
      it scans over: each gets the gradient of another (JAX pull request 38929).
    - A call, conditional or loop that gets the same ref twice: one of the two gradients
      is lost.

    So the inputs among such operands must not be refs. All others are safe: a ref is
    then passed on once, to a jaxpr with refs and values in the order that JAX assumes.
    """
    while True:
        kinds = [_COMPUTED if i in ported else i for i in range(len(program.invars))]
        found = set(ported)
        for eqn, operands in _walk(program, kinds):
            if any(True for _ in inner_jaxprs(eqn)):
                inputs = [kind for kind in operands if isinstance(kind, int)]
                found |= {kind for kind in inputs if inputs.count(kind) > 1}
            if eqn.primitive.name == "scan":
                consts, first = eqn.params["num_consts"], eqn.params["num_carry"]
                for group in (operands[:consts], operands[consts + first :]):
                    found |= _inputs(group) if _COMPUTED in group else set()
        if found == ported:
            return found
        ported = found  # a ported input is a value, perhaps beside other refs


def hands_on_refs(jaxpr: Any) -> bool:
    """Whether, at any depth, a scan is over a ref or a conditional gets a ref."""
    for eqn in jaxpr.eqns:
        for inner in inner_jaxprs(eqn):
            if hands_on_refs(inner):
                return True
            if eqn.primitive.name not in ("scan", "cond"):
                continue
            # The body of a scan gets all operands, a branch of a conditional the last
            # ones. An operand that is scanned over has one more axis outside.
            outside = eqn.invars[len(eqn.invars) - len(inner.invars) :]
            for x, y in zip(outside, inner.invars, strict=True):
                over = eqn.primitive.name == "cond" or x.aval.shape != y.aval.shape
                if _is_ref(y) and over:
                    return True
    return False


def has_own_refs_alone(program: ClosedJaxpr) -> bool:
    """Whether no effect of `program` but those on refs of its own is to be seen."""
    if any(map(_is_ref, program.consts)):
        return False
    # Of a `jax.vmap`; a permutation along one has no effect.
    names_an_axis = any("axis_name" in eqn.params for eqn in _eqns(program.jaxpr))
    return not names_an_axis and all(map(_is_on_refs, program.jaxpr.effects))


def unused_leaves(fun: Callable[..., Any], tree: PyTree, *args: Any) -> list[bool]:
    """Whether no result of `fun(tree, *args)` depends on each leaf of `tree`."""
    jaxpr = jax.make_jaxpr(fun)(tree, *args).jaxpr
    used = _used(jaxpr, [True] * len(jaxpr.outvars))
    return [not x for x in used[: len(jax.tree.leaves(tree))]]


def _used(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    """Which inputs of `jaxpr` the `wanted` outputs, or an effect, depend on."""
    pairs = zip(jaxpr.outvars, wanted, strict=True)
    needed = {x for x, w in pairs if w and is_variable(x)}
    for eqn in reversed(jaxpr.eqns):
        of_eqn = [x in needed for x in eqn.outvars]
        if not any(of_eqn) and not eqn.effects:
            continue
        inner = list(inner_jaxprs(eqn))
        # A loop has several jaxprs, or hands its results to itself.
        called = len(inner) == 1 and eqn.primitive.name != "scan"
        if called and len(inner[0].invars) == len(eqn.invars):
            used = _used(inner[0], of_eqn)
        else:
            used = [True] * len(eqn.invars)
        pairs = zip(eqn.invars, used, strict=True)
        needed |= {x for x, u in pairs if u and is_variable(x)}
    return [x in needed for x in jaxpr.invars]


def pruned(fun: Callable[..., Any], *args: Any) -> Any:
    """Runs `fun(*args)`, without the equations that the returned arrays do not need.

    XLA drops them as well. Here they are not lowered, and no effect happens twice.

    Returns:
      The result. None if it needs an effect, or a call or a loop that has one: of a
      callback that has effects, or on a `jax.Ref` that `fun` did not make.
    """
    program, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
    leaves = jax.tree.leaves(args)
    eqns = _needed_without_effects(program.jaxpr)
    if eqns is None and not any(_is_on_refs(x) for x in program.effects):
        # One equation is the whole of a loss under `jax.jit`, which may print.
        program = jax.make_jaxpr(lambda *leaves: inlined(program, leaves))(*leaves)
        eqns = _needed_without_effects(program.jaxpr)
    if eqns is None:
        return None
    jaxpr = program.jaxpr.replace(eqns=eqns)
    out = jaxpr_as_fun(ClosedJaxpr(jaxpr, program.consts))(*leaves)
    return jax.tree.structure(shapes).unflatten(out)


def _needed_without_effects(jaxpr: Any) -> list[Any] | None:
    """The equations that the results need; None if one has an effect outside."""
    needed, kept = set(filter(is_variable, jaxpr.outvars)), []
    given = {*jaxpr.invars, *jaxpr.constvars}
    for eqn in reversed(jaxpr.eqns):
        read = set(filter(is_variable, eqn.invars))
        refs = set(filter(_is_ref, read))
        # An equation that writes to a ref stays if the ref is read later.
        if needed.isdisjoint({*eqn.outvars, *refs}):
            continue
        if refs & given or not all(map(_is_on_refs, eqn.effects)):
            return None
        needed |= read
        kept.append(eqn)
    return kept[::-1]


def _is_on_refs(effect: Any) -> bool:
    return isinstance(effect, _effects_on_refs())


@functools.cache
def _effects_on_refs() -> tuple[type, ...]:
    """The types of effects on refs; JAX exports no name for them."""

    def uses() -> jax.Array:
        ref = jax.new_ref(0.0)
        ref[...] = ref[...] + 1
        jax.ref.addupdate(ref, (), 1.0)
        return jax.freeze(ref)

    eqns = jax.make_jaxpr(uses)().jaxpr.eqns
    return tuple({type(effect) for eqn in eqns for effect in eqn.effects})


def exchanges(names: tuple[str, ...], fun: Callable[..., Any], *args: Any) -> bool:
    """Whether `fun(*args)` communicates between devices along these mesh axes.

    Call it in a `jax.shard_map` over the axes.
    """

    def along(eqn: Any) -> bool:
        leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
        named = any(x in names for x in leaves if isinstance(x, str))
        return named and eqn.primitive.name not in _SILENT

    return any(map(along, _eqns(jax.make_jaxpr(fun)(*args).jaxpr)))


def _eqns(jaxpr: Any) -> Iterator[Any]:
    """The equations of `jaxpr`, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from _eqns(inner)


def _walk(
    jaxpr: Any, kinds: Any, skips: Callable[[Any], bool] = lambda eqn: False
) -> Iterator[tuple[Any, list[Any]]]:
    """Yields each equation, at any depth, with the kinds of its operands.

    `kinds` has the kind of each input; what `skips` is true for is not entered.

    Raises:
      ValueError: an equation passes its operands to an inner jaxpr in an unknown way.
    """
    known = dict(zip(jaxpr.invars, kinds, strict=True))
    for eqn in jaxpr.eqns:
        operands = [None if hasattr(x, "val") else known.get(x) for x in eqn.invars]
        yield eqn, operands
        inside = list(operands)
        if "num_carry" in eqn.params:  # a scan before JAX 0.12
            begin = eqn.params["num_consts"]
            end = begin + eqn.params["num_carry"]
            inside[begin:end] = [_COMPUTED] * (end - begin)
        for inner in () if skips(eqn) else inner_jaxprs(eqn):
            # A loop or a call passes on all operands, a conditional the last ones.
            skipped = len(inside) - len(inner.invars)
            if skipped < 0:
                raise ValueError(f"{eqn.primitive} hands on more than it was given.")
            yield from _walk(inner, inside[skipped:], skips)
        if any(kind is not None for kind in operands):
            known |= dict.fromkeys(eqn.outvars, _COMPUTED)


def known_at_start(program: ClosedJaxpr, args: Iterable[Any]) -> dict[Any, Any]:
    """Returns the values of the constants and arguments, by their variables."""
    jaxpr = program.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    return known | dict(zip(jaxpr.invars, args, strict=True))


def evaluate_part(
    jaxpr: Any,
    eqns: Sequence[Any],
    wanted: Callable[[Any], bool],
    known: dict[Any, Any],
    value: Callable[[Any], Any] = lambda x: x,
) -> None:
    """Evaluates some equations of `jaxpr` together, and adds their results to `known`.

    Args:
      jaxpr, eqns: the equations, in the order of `jaxpr`.
      wanted: whether a variable that they define is read elsewhere.
      known: by variable, what `value` maps to its value.
    """
    inside = dict.fromkeys(x for eqn in eqns for x in eqn.outvars)
    read = dict.fromkeys(x for eqn in eqns for x in eqn.invars if is_variable(x))
    inputs = [x for x in read if x not in inside]
    outputs = [x for x in inside if wanted(x)]
    part = jaxpr.replace(
        constvars=[],
        invars=inputs,
        outvars=outputs,
        eqns=list(eqns),
        effects=frozenset().union(*(eqn.effects for eqn in eqns)),
        debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    values = jaxpr_as_fun(ClosedJaxpr(part, ()))(*[value(known[x]) for x in inputs])
    known.update(zip(outputs, values, strict=True))


def inlined(program: ClosedJaxpr, args: Iterable[Any]) -> list[Any]:
    """Evaluates `program` as if nothing in it were under `jax.jit`."""
    jaxpr, known = program.jaxpr, known_at_start(program, args)
    waiting: list[Any] = []

    def evaluate() -> None:
        if waiting:
            evaluate_part(jaxpr, waiting, lambda x: True, known)
            waiting.clear()

    def values(variables: Iterable[Any]) -> list[Any]:
        return [known[x] if is_variable(x) else x.val for x in variables]

    for eqn in jaxpr.eqns:
        if is_plain_jit(eqn):
            evaluate()
            inner = inlined(eqn.params["jaxpr"], values(eqn.invars))
            known.update(zip(eqn.outvars, inner, strict=True))
        else:
            waiting.append(eqn)
    evaluate()
    return values(jaxpr.outvars)


def is_plain_jit(eqn: Any) -> bool:
    """Whether `eqn` is a `jax.jit` without shardings."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return False
    shardings = *eqn.params["in_shardings"], *eqn.params["out_shardings"]
    return not any(isinstance(x, Sharding) for x in shardings)


def is_variable(x: Any) -> bool:
    return not hasattr(x, "val")


def _is_ref(x: Any) -> bool:
    return hasattr(x.aval, "inner_aval")


def _inputs(kinds: list[Any]) -> set[int]:
    return {kind for kind in kinds if isinstance(kind, int)}


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs of a loop, a conditional or a call."""
    for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(x):
            yield getattr(x, "jaxpr", x)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
