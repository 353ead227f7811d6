"""Which buffers of a compiled program are alive when, from its schedule.

XLA's own assignment of buffers is not in the text. This is an estimate with its main
rules: a loop updates its carry in place, an output reuses the memory of the donated
argument it is aliased with, and an element-wise result takes the place of an operand
that dies there. `Timeline.peak` can so be compared with what the compiler says.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from .hlo import Computation, Instruction, Module, Type, arrays

# Values as buffers: the number of one, or a tuple for a tuple.
Buffers: TypeAlias = int | tuple[Any, ...]

# Instructions that give another name to what is there, or run nothing.
_VIEWS = {"bitcast", "optimization-barrier", "domain", "add-dependency", "after-all"}
# Instructions that read and write different places, so that nothing shares memory.
_APART = {
    "copy", "transpose", "dot", "convolution", "reduce", "reduce-window", "gather",
    "sort", "concatenate", "all-gather", "all-to-all", "collective-permute", "reverse",
    "custom-call", "rng-bit-generator", "cholesky", "triangular-solve", "fft",
}  # fmt: skip


class Execution(NamedTuple):
    """One instruction where it runs.

    Attributes:
      time: its place in the schedule, in which each body of a loop is run once.
      where: "loop", "branch" (a conditional, or a loop that runs at most once) or
        "outside".
      times: how often a call runs it; None if a loop does not say.
      operands, result: the buffers.
    """

    instruction: Instruction
    time: int
    where: str
    times: int | None
    operands: tuple[Buffers, ...]
    result: Buffers


@dataclasses.dataclass
class Buffer:
    """A buffer: the memory of one array, or of several that are never alive together.

    Attributes:
      bytes: its size in the main memory of the device, 0 in another memory.
      made_by: the instruction that writes it first.
      parameters: the numbers of the program's parameters that it holds.
      output: whether it holds an output.
      begins, ends: the times of its first write and its last use.
    """

    bytes: int
    made_by: Instruction
    parameters: frozenset[int] = frozenset()
    output: bool = False
    begins: int = 0
    ends: int = 0


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The buffers of a program over its schedule.

    Attributes:
      buffers: each once.
      executions: all instructions that run, in order.
      length: the times are below it.
      arguments: the numbers of the values that are the program's arguments.
      roots: for each number the place of its buffer in `buffers`.
    """

    buffers: tuple[Buffer, ...]
    executions: tuple[Execution, ...]
    length: int
    arguments: frozenset[int]
    roots: tuple[int, ...]

    def buffer(self, number: int) -> Buffer:
        """The buffer of a number in an `Execution`."""
        return self.buffers[self.roots[number]]

    def totals(self, buffers: Iterable[Buffer] | None = None) -> list[int]:
        """The bytes that are alive at each time."""
        change = [0] * (self.length + 1)
        for x in self.buffers if buffers is None else buffers:
            change[x.begins] += x.bytes
            change[x.ends + 1] -= x.bytes
        totals, now = [], 0
        for step in change[:-1]:
            now += step
            totals.append(now)
        return totals

    @property
    def peak(self) -> int:
        """The time at which most bytes are alive."""
        totals = self.totals()
        return totals.index(max(totals))

    def alive(self, time: int) -> list[Buffer]:
        return [x for x in self.buffers if x.begins <= time <= x.ends]


def timeline(module: Module) -> Timeline:
    """Runs through the schedule of a program."""
    walk = _Walk(module)
    entry = module.computations[module.entry]
    parameters = module.parameters
    args = {n: walk.new(parameters[n]) for n in parameters}
    for n, buffers in args.items():
        for b in _leaves(buffers):
            walk.found[b].parameters = frozenset({n})
    result = walk.run(entry, args, "outside", 1)
    for b in _leaves(result):
        walk.found[b].output = True
    pairs = [
        pair
        for index, n in module.aliases.items()
        for pair in zip(_leaves(args[n]), _leaves(_at(result, index)), strict=False)
    ]
    walk.share(pairs)
    walk.reuse(pairs)
    walk.fill(_leaves(result))
    return walk.timeline(frozenset(_leaves(tuple(args.values()))))


def _leaves(buffers: Buffers) -> list[int]:
    if isinstance(buffers, int):
        return [buffers]
    return [leaf for part in buffers for leaf in _leaves(part)]


def _at(buffers: Buffers, index: Iterable[int]) -> Buffers:
    for i in index:
        buffers = buffers[i] if isinstance(buffers, tuple) else buffers
    return buffers


class _Walk:
    """A walk through the schedule, which numbers the buffers and unites them."""

    def __init__(self, module: Module):
        self.module = module
        self.found: list[Buffer] = []
        self.parent: list[int] = []
        self.executions: list[Execution] = []
        self.time = 0

    def new(self, instruction: Instruction, type_: Type | None = None) -> Buffers:
        type_ = instruction.type if type_ is None else type_
        if isinstance(type_, tuple):
            return tuple(self.new(instruction, part) for part in type_)
        size = 0 if type_.space or instruction.op == "constant" else type_.bytes
        buffer = Buffer(size, instruction, begins=self.time, ends=self.time)
        self.found.append(buffer)
        self.parent.append(len(self.parent))
        return len(self.found) - 1

    def root(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def unite(self, one: Buffers, other: Buffers) -> None:
        """The two are in the same memory."""
        for a, b in zip(_leaves(one), _leaves(other), strict=False):
            a, b = sorted((self.root(a), self.root(b)))
            if a == b:
                continue
            first, second = self.found[a], self.found[b]
            self.parent[b] = a
            first.bytes = max(first.bytes, second.bytes)
            first.parameters |= second.parameters
            first.output |= second.output
            first.begins = min(first.begins, second.begins)
            first.ends = max(first.ends, second.ends)

    def use(self, buffers: Buffers) -> None:
        for b in _leaves(buffers):
            buffer = self.found[self.root(b)]
            buffer.ends = max(buffer.ends, self.time)

    def run(
        self,
        computation: Computation,
        args: dict[int, Buffers],
        where: str,
        times: int | None,
    ) -> Buffers:
        values: dict[str, Buffers] = {}
        for x in computation.instructions:
            operands = tuple(values[name] for name in x.operands if name in values)
            values[x.name] = self.step(x, operands, args, where, times)
        result = values[computation.root.name]
        self.use(result)
        return result

    def step(
        self,
        x: Instruction,
        operands: tuple[Buffers, ...],
        args: dict[int, Buffers],
        where: str,
        times: int | None,
    ) -> Buffers:
        if x.op == "parameter":
            return args[int(x.inside)]
        if x.op == "tuple":
            return operands
        if x.op == "get-tuple-element":
            (whole,) = operands
            index = x.number("index") or 0
            return whole[index] if isinstance(whole, tuple) else whole
        if x.op in _VIEWS and operands:
            return operands[0]
        self.time += 1
        self.use(operands)
        if x.op == "while":
            return self.loop(x, operands[0], where, times)
        if x.op == "conditional":
            return self.branches(x, operands, where, times)
        if x.op == "call":
            (name,) = x.called("to_apply")
            return self.run(
                self.module.computations[name], dict(enumerate(operands)), where, times
            )
        if x.op.endswith("-done") and operands:
            result = _done(x, operands[0])
        elif x.op.endswith("-start") and isinstance(x.type, tuple):
            result = self.start(x, operands)
        else:
            result = self.new(x)
            for output, number, index in x.aliases:
                self.unite(_at(result, output), _at(operands[number], index))
        execution = Execution(x, self.time, where, times, operands, result)
        self.executions.append(execution)
        return result

    def start(self, x: Instruction, operands: tuple[Buffers, ...]) -> Buffers:
        """The buffers of an asynchronous instruction, some of which it only reads."""
        assert isinstance(x.type, tuple)
        if x.op == "copy-start":  # (destination, source, context)
            target, _, *context = x.type
            made = [self.new(x, part) for part in (target, *context)]
            return (made[0], operands[0], *made[1:])
        if x.op == "all-reduce-start" or len(x.type) < 2:
            return self.new(x)
        read = operands if isinstance(x.type[0], tuple) else operands[0]
        return (read, *(self.new(x, part) for part in x.type[1:]))

    def loop(
        self, x: Instruction, carry: Buffers, where: str, times: int | None
    ) -> Buffers:
        trips = self.module.trips(x)
        inside = times * trips if times is not None and trips is not None else None
        if self.module.is_at_most_once(x):
            where, inside = "branch", times
        elif where != "branch":
            where = "loop"
        for key in ("condition", "body"):
            (name,) = x.called(key)
            out = self.run(self.module.computations[name], {0: carry}, where, inside)
        self.unite(carry, out)
        self.use(carry)
        return carry

    def branches(
        self,
        x: Instruction,
        operands: tuple[Buffers, ...],
        where: str,
        times: int | None,
    ) -> Buffers:
        names = x.called("branch_computations") or [
            *x.called("true_computation"),
            *x.called("false_computation"),
        ]
        result = self.new(x)
        for name, operand in zip(names, operands[1:], strict=True):
            computation = self.module.computations[name]
            out = self.run(computation, {0: operand}, "branch", times)
            # An operand that a branch passes through is copied into the result.
            passed = set(map(self.root, _leaves(operand)))
            for a, b in zip(_leaves(result), _leaves(out), strict=False):
                if self.root(b) not in passed:
                    self.unite(a, b)
        self.use(result)
        return result

    def share(self, pairs: list[tuple[int, int]]) -> None:
        """Puts a result in the place of an operand that dies where it is made.

        `pairs` are arguments and the outputs that will take their place.
        """
        arguments = {self.root(output): argument for argument, output in pairs}
        for x in self.executions:
            if x.instruction.op in _APART or "kind=kInput" in x.instruction.attributes:
                continue
            dying = {
                self.root(b)
                for operand in x.operands
                for b in _leaves(operand)
                if self.found[self.root(b)].ends == x.time
                and not self.found[self.root(b)].parameters
            }
            for b in _leaves(x.result):
                made = self.found[self.root(b)]
                if made.begins != x.time or made.parameters:
                    continue
                argument = arguments.get(self.root(b))
                free = 0 if argument is None else self.found[self.root(argument)].ends
                for a in sorted(dying - {self.root(b)}):
                    x_ = self.found[a]
                    if x_.bytes == made.bytes and x_.begins >= free:
                        dying.discard(a)
                        self.unite(a, b)
                        break

    def reuse(self, pairs: list[tuple[int, int]]) -> None:
        """Puts outputs, and what fits before them, in place of donated arguments."""
        for argument, output in pairs:
            a, b = self.root(argument), self.root(output)
            free = self.found[a].ends, self.found[b].begins
            self.unite(a, b)
            self._take_in(a, *free)

    def fill(self, outputs: list[int]) -> None:
        """Puts what fits into the place of an output, before that is written."""
        for b in outputs:
            output = self.found[self.root(b)]
            if not output.parameters:
                self._take_in(b, 0, output.begins)

    @functools.cached_property
    def _temporary(self) -> dict[int, list[int]]:
        """The buffers that are neither arguments nor outputs, by their size."""
        sizes: dict[int, list[int]] = {}
        for n, x in enumerate(self.found):
            if self.root(n) == n and x.bytes and not (x.parameters or x.output):
                sizes.setdefault(x.bytes, []).append(n)
        return sizes

    def _take_in(self, number: int, begins: int, ends: int) -> None:
        """Unites a buffer with those of its size that are alive between two times."""
        same = self._temporary.get(self.found[self.root(number)].bytes, [])
        left = []
        for n in same:
            x = self.found[n]
            if begins <= x.begins and x.ends <= ends:
                self.unite(number, n)
                begins = x.ends
            else:
                left.append(n)
        same[:] = left

    def timeline(self, arguments: frozenset[int]) -> Timeline:
        length = self.time + 1
        places: dict[int, int] = {}
        buffers = []
        for number in range(len(self.found)):
            if self.root(number) == number:
                places[number] = len(buffers)
                buffers.append(self.found[number])
        for x in buffers:
            if x.parameters or x.output:  # who calls has these all the time
                x.begins, x.ends = 0, length - 1
        roots = tuple(places[self.root(n)] for n in range(len(self.found)))
        executions = tuple(self.executions)
        return Timeline(tuple(buffers), executions, length, arguments, roots)


def _done(x: Instruction, started: Buffers) -> Buffers:
    """What an asynchronous instruction leaves: part of what its start has made."""
    if isinstance(started, int) or x.op == "all-reduce-done":
        return started
    if x.op == "copy-done":
        return started[0]
    wanted = len(arrays(x.type))
    for part in started[1:]:
        if len(_leaves(part)) == wanted:
            return part
    return started[0]
