"""The door of `accumax.audit`: a page about a compiled step."""

import collections
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import keystr

from . import buffers, hlo
from .findings import (
    Shapes,
    collectives,
    copies,
    discarded,
)
from .peak import sizes_of, without_debugging
from .report import Audit, Kind, Live, Memory, said

_LARGEST = 12  # buffers of the peak that are kept


def audit(
    fun: Any,
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    **kwargs: Any,
) -> Audit:
    """What the compiler made of a step: memory, copies, collectives, wasted work.

    For any step, of accumax or not: it is lowered and compiled, and its program read.
    Nothing runs. With `jax.ShapeDtypeStruct` arguments nothing is allocated either, and
    with shardings on the devices of a `jax.experimental.topologies` description it is
    compiled for a device that is not there.

    All figures are those of one device and one call, in bytes.

    Args:
      fun: a function, jitted or not; or what its `lower` or `compile` gave, then
        without arguments.
      *args, **kwargs: its arguments, arrays or shapes.
      donate_argnums, static_argnums: as for `jax.jit`, if `fun` is not jitted.

    Returns:
      A report. `print(report)` is a page, and its attributes are values: `memory`,
      `largest`, `copies`, `collectives`, `discarded`, `not_reused`, `crossed`,
      `warnings`. `report.plot()` draws the memory over the program's schedule, and
      `report.to_dict()` is for JSON. What a backend does not tell is None.

    Raises:
      TypeError: `fun` cannot be lowered, or options are passed with a jitted function.
      ValueError: the backend gives no text of its program.

    >>> import accumax, jax, optax
    >>> import jax.numpy as jnp
    >>> def step(params, x):
    ...     grads = jax.grad(lambda p: jnp.mean((x @ p) ** 2))(params)
    ...     return params - 0.1 * grads
    >>> shapes = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    >>> report = accumax.audit(step, shapes, shapes)
    >>> print(report.memory.arguments, report.collectives)
    524288 ()
    >>> print(report.warnings[0].split(":")[0])
    Nothing is donated
    >>> accumax.audit(step, shapes, shapes, donate_argnums=0).memory.aliased
    262144

    References:
      JAX issue 31292 (memory that nobody could foresee), MaxText issue 5056 (gradients
      that were reduced in every microbatch), XLA issue 6750.
    """
    lowered, compiled = _compile(fun, args, donate_argnums, static_argnums, kwargs)
    text = compiled.as_text()
    if not text:
        raise ValueError(
            "The backend gives no text of its program, so there is nothing to audit. "
            "Compile for another platform, such as the CPU."
        )
    module = hlo.parse(text)
    program = buffers.timeline(module)
    arguments = _arguments(compiled, module)
    kinds: dict[int, Kind] = {n: arguments[n].kind for n in module.parameters}
    names = {n: arguments[n].path for n in module.parameters}
    shapes = Shapes.make(
        [
            array
            for n, x in module.parameters.items()
            for array in hlo.arrays(x.type)
            if kinds[n] == "parameters" and array.dtype[0] in "fb"
        ]
    )
    updated = {n for n, k in kinds.items() if k in ("parameters", "optimizer state")}
    not_reused, crossed = _donations(lowered or compiled, module, arguments)
    kind_of = functools.partial(_kind, kinds, shapes)
    alive = sorted(program.alive(program.peak), key=lambda b: -b.bytes)
    found = Audit(
        memory=_memory(compiled, program),
        largest=tuple(
            _live(module, b, kind_of(b), names) for b in alive[:_LARGEST] if b.bytes
        ),
        donated=any(x.donated for x in arguments.values()),
        not_reused=not_reused,
        not_donated=_not_donated(module, arguments),
        crossed=crossed,
        copies=tuple(copies(module, program, shapes, names)),
        collectives=tuple(collectives(module, program, shapes)),
        discarded=tuple(discarded(module, shapes, updated)),
        conditionals=_conditionals(lowered, module),
        schedule=_schedule(program, kind_of),
        platform=_platform(compiled),
        warnings=(),
    )
    return dataclasses.replace(found, warnings=tuple(said(found)))


def _compile(
    fun: Any, args: tuple, donate: Any, static: Any, kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """The lowered program, None if it is not known, and the compiled one."""
    options = donate != () or static != ()
    fun = _of_jax(fun)
    if isinstance(fun, (jax.stages.Lowered, jax.stages.Compiled)):
        if args or kwargs or options:
            raise TypeError(
                f"fun is a {type(fun).__name__}, whose arguments and options are "
                f"known; got {len(args) + len(kwargs)} more. Call audit(fun) alone."
            )
        if isinstance(fun, jax.stages.Compiled):
            return None, fun
        return fun, fun.compile()
    if not callable(fun):
        raise TypeError(f"{fun=} must be a function, a Lowered or a Compiled.")
    jitted: Any = fun
    if not hasattr(fun, "lower"):
        jitted = jax.jit(fun, donate_argnums=donate, static_argnums=static)
    elif options:
        raise TypeError(
            f"fun is jitted already, and donate_argnums={donate}, "
            f"static_argnums={static} were passed. Pass them to jax.jit."
        )
    # The report says of donation what the warning does, with the paths.
    with warnings.catch_warnings(), without_debugging():
        warnings.filterwarnings("ignore", message="Some donated buffers")
        lowered = _of_jax(jitted.lower(*args, **kwargs))
    return lowered, lowered.compile()


def _of_jax(x: Any) -> Any:
    """The `Lowered` or `Compiled` of JAX in `x`, if `nnx.jit` wraps it; else `x`."""
    for name, kind in (
        ("lowered", jax.stages.Lowered),
        ("compiled", jax.stages.Compiled),
    ):
        inside = getattr(x, name, None)
        if isinstance(inside, kind):
            return inside
    return x


class _Argument(NamedTuple):
    """A leaf of the arguments: its path, its kind, and whether it was donated.

    `leaf` is its number among all leaves, None if that is not known.
    """

    path: str
    kind: Kind
    donated: bool
    leaf: int | None


def _arguments(compiled: Any, module: hlo.Module) -> dict[int, _Argument]:
    """The leaf that each parameter of the program holds, by its number.

    A program has no parameters for leaves that it does not use. Its parameters have the
    paths of their leaves as names, in the order of the leaves.
    """
    (args, kwargs) = compiled.args_info
    leaves = _leaves(args, kwargs)
    parameters = [module.parameters[n] for n in sorted(module.parameters)]
    found: dict[int, _Argument] = {}
    at, exact = 0, len(parameters) == len(leaves)
    for number, x in enumerate(parameters):
        if not exact:
            while at < len(leaves) and not x.scope.endswith(leaves[at].path):
                at += 1
        if at < len(leaves):
            path, kind = x.scope or leaves[at].path, leaves[at].kind
            if re.match(r"opt(imizer|_state)?\b", path) and kind != "accumulator":
                kind = "optimizer state"  # in NNX the name of the argument alone tells
            found[number] = leaves[at]._replace(path=path, kind=kind, leaf=at)
        else:
            found[number] = _Argument(x.scope, "inputs", False, None)
        at += 1
    return found


def _leaves(args: tuple, kwargs: dict[str, Any]) -> list[_Argument]:
    """Each leaf of the arguments with the path behind the name of its argument."""
    states = [
        path
        for path, x in jax.tree.leaves_with_path((args, kwargs), is_leaf=_is_state)
        if _is_state(x)
    ]
    flat = jax.tree.leaves_with_path((args, kwargs))
    donates = any(x.donated for _, x in flat)

    def kind(path: tuple, x: Any) -> Kind:
        names = {getattr(key, "name", getattr(key, "key", None)) for key in path}
        if "acc_grads" in names:
            return "accumulator"
        if "opt_state" in names or any(path[: len(s)] == s for s in states):
            return "optimizer state"
        first = len(path) > 1 and path[:2] == flat[0][0][:2]
        floating = jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
        if "params" in names or (floating and (x.donated if donates else first)):
            return "parameters"
        return "inputs"

    return [
        _Argument(keystr(path[2:]), kind(path, x), x.donated, None) for path, x in flat
    ]


def _is_state(x: Any) -> bool:
    """Whether a node of a tree is the state of an optimizer."""
    return (
        isinstance(x, tuple)
        and hasattr(x, "_fields")
        and type(x).__name__.endswith("State")
    )


def _donations(
    stage: Any, module: hlo.Module, arguments: dict[int, _Argument]
) -> tuple[tuple[str, ...] | None, tuple[tuple[str, str], ...] | None]:
    """Donated arguments that no output reuses, and pairs of unlike paths."""
    if any(x.leaf is None for x in arguments.values()):
        return None, None
    reused = set(module.aliases.values())
    not_reused = tuple(
        x.path for n, x in arguments.items() if x.donated and n not in reused
    )
    return not_reused, _crossed(stage, module, arguments)


def _not_donated(
    module: hlo.Module, arguments: dict[int, _Argument]
) -> tuple[str, ...]:
    """Parts of an optimizer's state beside which an output of their shape exists."""
    root = module.computations[module.entry].root
    reusing = {index[0] if index else 0 for index in module.aliases}
    outputs = collections.Counter(
        (x.dtype, x.shape)
        for i, x in enumerate(hlo.arrays(root.type))
        if i not in reusing and x.shape
    )
    found = []
    for number, x in arguments.items():
        (array, *_) = hlo.arrays(module.parameters[number].type)
        kind = array.dtype, array.shape
        state = x.kind in ("optimizer state", "accumulator")
        if state and not x.donated and outputs[kind] > 0:
            outputs[kind] -= 1
            found.append(x.path)
    return tuple(found)


def _crossed(
    stage: Any, module: hlo.Module, arguments: dict[int, _Argument]
) -> tuple[tuple[str, str], ...] | None:
    out = stage.out_info if hasattr(stage, "out_info") else None
    if out is None:
        return None
    root = module.computations[module.entry].root
    outputs = jax.tree.leaves_with_path(out)
    if len(outputs) != len(hlo.arrays(root.type)):
        return None
    (args, _) = stage.args_info
    wanted = _counterparts(args, out)
    crossed = []
    for index, number in module.aliases.items():
        path, _ = outputs[index[0] if index else 0]
        leaf = arguments[number].leaf
        expected = wanted.get(leaf if leaf is not None else -1, path)
        if expected is None:  # there is another one like it
            return None
        if expected != path:
            crossed.append((arguments[number].path, f"result{keystr(path)}"))
    return tuple(crossed)


def _counterparts(args: tuple, out: Any) -> dict[int, tuple | None]:
    """The path of the output that is the new value of a leaf, by the leaf's number.

    An argument and an output are the old and the new value if their trees are alike and
    no other ones are. If others are, the path is None.
    """

    def like(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure, tuple((x.shape, str(x.dtype)) for x in leaves)

    parts = list(out) if isinstance(out, (tuple, list)) else []
    if hasattr(out, "_fields"):
        parts = []
    found: dict[int, tuple | None] = {}
    number = 0
    paths = [path for path, _ in jax.tree.leaves_with_path(out)]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(jax.tree.leaves(part)))
    for arg in args:
        count = len(jax.tree.leaves(arg))
        same = [i for i, part in enumerate(parts) if like(part) == like(arg)]
        alone = sum(like(other) == like(arg) for other in args) == 1
        for i in range(count if same else 0):
            known = len(same) == 1 and alone
            found[number + i] = paths[starts[same[0]] + i] if known else None
        number += count
    return found


def _kind(of_parameters: dict[int, Kind], shapes: Shapes, x: buffers.Buffer) -> Kind:
    """What a buffer is for."""
    if x.parameters:
        return of_parameters[min(x.parameters)]
    if x.output:
        return "outputs"
    scope = x.made_by.scope
    if "transpose(" in scope and any(map(shapes.has, hlo.arrays(x.made_by.type))):
        return "gradients"
    return "activations" if "jvp(" in scope else "other"


def _live(
    module: hlo.Module, x: buffers.Buffer, kind: Kind, names: dict[int, str]
) -> Live:
    path = names[min(x.parameters)] if x.parameters else ""
    types = hlo.arrays(x.made_by.type)
    type_ = next((str(a) for a in types if a.bytes == x.bytes), str(types[0]))
    scope = "" if x.parameters else x.made_by.scope
    return Live(x.bytes, kind, type_, path, scope, module.source(x.made_by))


def _memory(compiled: Any, program: buffers.Timeline) -> Memory:
    peak = max(program.totals())
    sizes = sizes_of(compiled)
    if sizes is None:
        return Memory(None, None, None, None, None, None, peak)
    return Memory(*sizes, sizes.total, peak)


def _schedule(
    program: buffers.Timeline, kind_of: Callable[[buffers.Buffer], Kind]
) -> dict[Kind, list[int]]:
    groups: dict[Kind, list[buffers.Buffer]] = {}
    for x in program.buffers:
        groups.setdefault(kind_of(x), []).append(x)
    return {kind: program.totals(group) for kind, group in groups.items()}


def _conditionals(lowered: Any, module: hlo.Module) -> tuple[int | None, int]:
    """The conditionals of the program before and after it was compiled."""
    after = sum(
        x.op == "conditional"
        for computation in module.computations.values()
        for x in computation.instructions
    )
    if lowered is None:
        return None, after
    text = lowered.as_text()
    return text.count('"stablehlo.case"(') + text.count('"stablehlo.if"('), after


def _platform(compiled: Any) -> str:
    shardings = jax.tree.leaves(compiled.input_shardings)
    devices = [d for s in shardings for d in s.device_set]
    return devices[0].platform if devices else jax.default_backend()
