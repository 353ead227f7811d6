"""What is found in a compiled program: copies, collectives, wasted work."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from .buffers import Execution, Timeline
from .hlo import Array, Computation, Instruction, Module, arrays

COLLECTIVES = (
    "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Arithmetic on each element.
_ARITHMETIC = {"sqrt", "rsqrt", "cbrt", "divide", "add", "subtract", "multiply"}


class Copy(NamedTuple):
    """A copy of a buffer of a parameter's shape, or of a layer of stacked ones.

    An activation may have the shape of a parameter, too: `certain` tells.

    Attributes:
      path: the argument or output that is copied; "" if it is neither.
      bytes: of one execution, on a device.
      times: its executions in a call; None if a loop does not say how often it runs.
      where: "loop", "branch" or "outside".
      scope: the named scopes it comes from; "" if it is XLA's own.
    """

    path: str
    bytes: int
    times: int | None
    where: str
    scope: str

    @property
    def certain(self) -> bool:
        """Whether it is a parameter's or a state's, and not perhaps an activation's."""
        return bool(self.path) or "jvp(" not in self.scope


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
      op: its name in HLO, such as "all-reduce".
      bytes: of its result in one execution, on a device.
      times: its executions in a call; None if a loop does not say how often it runs.
      where: "loop", "branch" (a conditional, or a loop that runs at most once) or
        "outside".
      gradient: whether it reduces arrays of the shapes of parameters, or of layers of
        stacked ones.
      repeats: how often a call reduces as many bytes as these parameters have; 0 if it
        is no such reduction, None if `times` is.
      scope: the named scopes it comes from.
    """

    op: str
    bytes: int
    times: int | None
    where: str
    gradient: bool
    repeats: float | None
    scope: str


class Discarded(NamedTuple):
    """An array that is computed in every call, and kept only if a condition holds.

    Attributes:
      shape: as HLO writes it.
      bytes: of the array.
      scope: the named scopes it comes from.
      certain: whether it is the work of an optimizer: the other choice is an old moment
        or parameter, from which the new one is computed. Else it may be a sum of
        gradients.
    """

    shape: str
    bytes: int
    scope: str
    certain: bool


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of parameters on a device, and of the layers of stacked ones."""

    of: dict[tuple[int, ...], int]  # to the number of elements of the whole
    counts: dict[tuple[int, ...], int]  # to the number of parameters

    @classmethod
    def make(cls, leaves: list[Array]) -> "Shapes":
        most = max((_size(x) for x in leaves), default=0)
        found: dict[tuple[int, ...], int] = {}
        counts: dict[tuple[int, ...], int] = {}
        for x in leaves:
            if _size(x) * 100 < most:
                continue  # scales and biases
            layer = x.shape[1:] if len(x.shape) > 2 else x.shape
            for dims in {_dims(x.shape), _dims(layer)}:
                found[dims] = max(found.get(dims, 0), _size(x))
                counts[dims] = counts.get(dims, 0) + 1
        return cls(found, counts)

    def has(self, x: Array) -> bool:
        return bool(x.shape) and _dims(x.shape) in self.of

    def whole(self, x: Array) -> int:
        """The elements of the parameter of which `x` has the shape, or a layer's."""
        return self.of[_dims(x.shape)]

    def repeats(self, found: list[Array]) -> float:
        """How often arrays that come together hold as much as their parameters."""
        number = collections.Counter(_dims(x.shape) for x in found)

        def often(x: Array) -> float:
            n = number[_dims(x.shape)]
            once = min(n, self.counts[_dims(x.shape)])
            return n / once * _size(x) / self.whole(x)

        return max(map(often, found))


def _size(x: Array) -> int:
    n = 1
    for d in x.shape:
        n *= d
    return n


def _dims(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(d for d in shape if d > 1))


def copies(
    module: Module, program: Timeline, shapes: Shapes, names: dict[int, str]
) -> list[Copy]:
    """The copies of parameter-sized buffers within the device's main memory.

    `names` are the paths of the program's parameters, by their number.
    """
    found = []
    for x in program.executions:
        array = _copied(module, x.instruction)
        if array is None or not shapes.has(array):
            continue
        source, target = (_first(b) for b in (x.operands[0], x.result))
        buffers = [program.buffer(n) for n in (source, target)]
        if not buffers[1].bytes:
            continue  # into another memory
        if buffers[0].parameters and buffers[0] is buffers[1]:
            continue  # XLA leaves it out: a donated argument, in its own place
        path = next(
            (names.get(n, "") for b in buffers for n in sorted(b.parameters)), ""
        )
        found.append(Copy(path, array.bytes, x.times, x.where, x.instruction.scope))
    return found


def _copied(module: Module, x: Instruction) -> Array | None:
    """The array that the instruction copies; None if it does something else."""
    if x.op in ("copy", "copy-start"):
        source, *rest = arrays(x.type)
        within = not rest or source.space == rest[0].space
        return source if within and not source.space else None
    if x.op == "transpose":
        return arrays(x.type)[0]
    if x.op == "fusion":
        (name,) = x.called("calls")
        inner = module.computations[name]
        if {i.op for i in inner.instructions} <= {
            "parameter", "copy", "transpose", "bitcast", "reshape",
        } and len(inner.instructions) > 1:  # fmt: skip
            moved = any(i.op in ("copy", "transpose") for i in inner.instructions)
            return arrays(x.type)[0] if moved else None
    return None


def _first(buffers: object) -> int:
    while isinstance(buffers, tuple):
        buffers = buffers[0]
    assert isinstance(buffers, int)
    return buffers


def collectives(module: Module, program: Timeline, shapes: Shapes) -> list[Collective]:
    """The collective operations of a call."""
    found = []
    for x in program.executions:
        op, results = _collective(module, x)
        if not op:
            continue
        reduces = op in ("all-reduce", "reduce-scatter")
        of_parameters = [a for a in results if shapes.has(a)]
        gradient = reduces and bool(of_parameters)
        repeats: float | None = 0.0
        if gradient and x.times is not None:
            repeats = x.times * shapes.repeats(of_parameters)
        elif gradient:
            repeats = None
        size = sum(a.bytes for a in results)
        scope = x.instruction.scope
        found.append(Collective(op, size, x.times, x.where, gradient, repeats, scope))
    return found


def _collective(module: Module, x: Execution) -> tuple[str, list[Array]]:
    """The collective that an instruction is, and the arrays that it gives."""
    instruction = x.instruction
    op = instruction.op.removesuffix("-start")
    results = arrays(instruction.type)
    if op in COLLECTIVES:
        if instruction.op != op and op != "all-reduce" and len(results) > 1:
            # (operands, results, contexts), and the contexts are scalars
            read = len(instruction.operands)
            results = [a for a in results[read:] if a.shape] or results[read:]
        return op, results
    called = instruction.called("calls")
    if op in ("async", "fusion") and called:
        name = called[0]
        if name.startswith("all-reduce-scatter"):  # as XLA:TPU writes it
            return "reduce-scatter", results
        if op == "async":
            for inner in module.computations[name].instructions:
                if inner.op in COLLECTIVES:
                    return inner.op, arrays(inner.type)
    return "", []


def discarded(module: Module, shapes: Shapes, kept: set[int]) -> list[Discarded]:
    """Parameter-sized arrays that are computed, and selected by a scalar condition.

    Where XLA flattens a conditional, or a program says `jnp.where`, both choices are
    computed in every call. A choice between an array and the same array times a scalar
    is left out: clipping by the global norm needs it. `kept` are the numbers of what an
    optimizer updates among the program's parameters: its state and those of the model.
    """
    reached = _Reached(module)
    found = []
    for computation in reached.run:
        for x in computation.instructions:
            if x.op != "select":
                continue
            (array,), sides = arrays(x.type), x.operands[1:]
            if not shapes.has(array) or not _is_scalar(computation, x.operands[0]):
                continue
            if _scales(computation, *sides) or _scales(computation, *reversed(sides)):
                continue
            before = [[*reached.before(computation, side)] for side in sides]
            if any(y.op in _ARITHMETIC for side in before for _, y in side):
                # A new moment is computed from the old one, which is the other choice.
                certain = any(
                    (old := reached.origin(computation, side)) in kept
                    and any(reached.origin(c, y.name) == old for c, y in other)
                    for side, other in zip(sides, reversed(before), strict=True)
                )
                found.append(Discarded(str(array), array.bytes, x.scope, certain))
    return found


def _is_scalar(computation: Computation, name: str) -> bool:
    """Whether the condition of a select is one for all elements."""
    return arrays(computation.source(name).type)[0].shape == ()


def _scales(computation: Computation, scaled: str, name: str) -> bool:
    """Whether `scaled` is `name`, times scalars or over scalars."""
    x = computation.source(scaled)
    while x.op in ("multiply", "divide"):
        one, other = x.operands
        if _is_scalar(computation, other):
            x = computation.source(one)
        elif x.op == "multiply" and _is_scalar(computation, one):
            x = computation.source(other)
        else:
            return False
    return x.name == computation.source(name).name


class _Reached:
    """What runs in every call, and the operations from which a value is computed.

    What is in a conditional, or in a loop that runs at most once, is left out.
    """

    def __init__(self, module: Module):
        self.module = module
        self.callers: dict[str, tuple[Computation, Instruction]] = {}
        self.run: list[Computation] = []
        self._collect(module.computations[module.entry])

    def _collect(self, computation: Computation) -> None:
        self.run.append(computation)
        for x in computation.instructions:
            if x.op == "while" and self.module.is_at_most_once(x):
                continue
            names = x.called("calls", "body")
            names += x.called("to_apply") if x.op == "call" else []
            for name in names:
                if name not in self.callers:
                    self.callers[name] = computation, x
                    self._collect(self.module.computations[name])

    def origin(self, computation: Computation, name: str) -> int | None:
        """The number of the program's parameter that a value is; None if computed.

        A value that a loop carries is what the loop begins with.
        """
        x, part = computation.source(name), None
        if x.op == "get-tuple-element":
            x, part = computation.source(x.operands[0]), x.number("index") or 0
        if x.op != "parameter":
            return None
        if computation.name == self.module.entry:
            return int(x.inside)
        caller, call = self.callers[computation.name]
        operand = call.operands[int(x.inside)]
        if part is not None:
            whole = caller.source(operand)
            if whole.op != "tuple":
                return None
            operand = whole.operands[part]
        return self.origin(caller, operand)

    def before(
        self, computation: Computation, name: str, depth: int = 0
    ) -> Iterator[tuple[Computation, Instruction]]:
        """The instructions that a value of the shape of parameters is computed from.

        Up to what a fusion or two before has read: further back is the gradient.
        """
        stack, seen = [name], set()
        while stack:
            x, part = computation.by_name.get(stack.pop()), None
            if x is None or x.name in seen or not any(a.shape for a in arrays(x.type)):
                continue  # nothing for each element
            seen.add(x.name)
            if x.op == "get-tuple-element":  # of a fusion with several results
                x, part = computation.by_name[x.operands[0]], x.number("index") or 0
            caller, call = self.callers.get(computation.name, (computation, x))
            if x.op == "parameter" and depth < 2 and call.op in ("fusion", "call"):
                operand = call.operands[int(x.inside)]
                yield from self.before(caller, operand, depth + 1)
            elif x.op == "fusion" and depth < 2:
                (name,) = x.called("calls")
                inside = self.module.computations[name]
                made = inside.root
                if part is not None and made.op == "tuple":
                    made = inside.by_name[made.operands[part]]
                yield from self.before(inside, made.name, depth + 1)
            else:
                yield computation, x
                if x.op not in ("while", "conditional", "dot", "convolution", "fusion"):
                    stack += x.operands
