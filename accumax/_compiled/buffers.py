"""Which buffers of a compiled program are alive when, from its schedule.

XLA's own assignment of buffers is not in the text. This is an estimate with its main
rules: a loop updates its carry in place, an output reuses the memory of the donated
argument it is aliased with, and an element-wise result takes the place of an operand
that dies there. `Timeline.peak` can so be compared with what the compiler says.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from .hlo import Computation, Instruction, Module, arrays
from .places import Buffer, Buffers, Places, Span, at, leaves

# Instructions that give another name to what is there, or run nothing.
_VIEWS = {"bitcast", "optimization-barrier", "domain", "add-dependency", "after-all"}


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


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The buffers of a program over its schedule.

    Attributes:
      buffers: each once.
      executions: all instructions that run, in order.
      length: the times are below it.
      roots: for each number the place of its buffer in `buffers`.
    """

    buffers: tuple[Buffer, ...]
    executions: tuple[Execution, ...]
    length: int
    roots: tuple[int, ...]

    def buffer(self, number: int) -> Buffer:
        """The buffer of a number in an `Execution`."""
        return self.buffers[self.roots[number]]

    def totals(self, buffers: Iterable[Buffer] | None = None) -> list[int]:
        """The bytes that are alive at each time."""
        change = [0] * (self.length + 1)
        for x in self.buffers if buffers is None else buffers:
            for begins, ends in x.alive():
                change[begins] += x.bytes
                change[ends + 1] -= x.bytes
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
        return [x for x in self.buffers if any(b <= time <= e for b, e in x.alive())]


def timeline(module: Module) -> Timeline:
    """Runs through the schedule of a program."""
    places, parameters = Places(), module.parameters
    args = {n: places.new(x, 0) for n, x in parameters.items()}
    for n, buffers in args.items():
        for b in leaves(buffers):
            places.of(b).parameters = frozenset({n})
    walk = _Walk(module, places)
    entry = module.computations[module.entry]
    result = walk.run(entry, args, "outside", 1)
    outputs = leaves(result)
    for b in outputs:
        places.of(b).output = True
    pairs = [
        pair
        for index, n in module.aliases.items()
        for pair in zip(leaves(args[n]), leaves(at(result, index)), strict=False)
    ]
    _share(places, walk.executions, pairs)
    places.reuse(pairs)
    places.fill(outputs)
    buffers, roots = places.united()
    length = walk.time + 1
    for x in buffers:
        if x.parameters or x.output:  # who calls has these all the time
            x.spans = [Span(0, length - 1)]
    return Timeline(buffers, tuple(walk.executions), length, roots)


class _Walk:
    """A walk through the schedule, which finds where each value is."""

    def __init__(self, module: Module, places: Places):
        self.module = module
        self.places = places
        self.executions: list[Execution] = []
        self.time = 0

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
        self.places.use(result, self.time)
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
        self.places.use(operands, self.time)
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
            result = self.places.new(x, self.time)
            for output, number, index in x.aliases:
                self.places.unite(at(result, output), at(operands[number], index))
        execution = Execution(x, self.time, where, times, operands, result)
        self.executions.append(execution)
        return result

    def start(self, x: Instruction, operands: tuple[Buffers, ...]) -> Buffers:
        """The buffers of an asynchronous instruction, some of which it only reads."""
        assert isinstance(x.type, tuple)
        if x.op == "copy-start":  # (destination, source, context)
            target, _, *context = x.type
            made = [self.places.new(x, self.time, part) for part in (target, *context)]
            return (made[0], operands[0], *made[1:])
        if x.op == "all-reduce-start" or len(x.type) < 2:
            return self.places.new(x, self.time)
        read = operands if isinstance(x.type[0], tuple) else operands[0]
        return (read, *(self.places.new(x, self.time, part) for part in x.type[1:]))

    def loop(
        self, x: Instruction, carry: Buffers, where: str, times: int | None
    ) -> Buffers:
        trips = self.module.trips(x)
        inside = times * trips if times is not None and trips is not None else None
        if self.module.is_at_most_once(x):
            where, inside = "branch", times
        elif where != "branch":
            where = "loop"
        turn = self.places.again(carry, self.time)
        for key in ("condition", "body"):
            (name,) = x.called(key)
            out = self.run(self.module.computations[name], {0: turn}, where, inside)
        self.places.unite(carry, out)
        return self.places.again(carry, self.time)

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
        ends: list[tuple[set[int], Buffers]] = []
        for name, operand in zip(names, operands[1:], strict=True):
            computation = self.module.computations[name]
            out = self.run(computation, {0: operand}, "branch", times)
            ends.append((set(map(self.places.root, leaves(operand))), out))
        result = self.places.new(x, self.time)
        for passed, out in ends:
            # An operand that a branch passes through is copied into the result.
            for a, b in zip(leaves(result), leaves(out), strict=False):
                if self.places.root(b) not in passed:
                    self.places.unite(a, b)
        return result


def _share(
    places: Places, executions: list[Execution], pairs: list[tuple[int, int]]
) -> None:
    """Puts a result in the place of an operand that dies where it is made.

    `pairs` are arguments and the outputs that will take their place.
    """
    arguments = {places.root(output): argument for argument, output in pairs}
    for x in executions:
        if x.instruction.is_apart:
            continue
        dying = {
            places.root(b)
            for operand in x.operands
            for b in leaves(operand)
            if places.spans[b].ends == x.time and not places.of(b).parameters
        }
        for b in leaves(x.result):
            made = places.of(b)
            if places.spans[b].begins != x.time or made.parameters:
                continue
            argument = arguments.get(places.root(b))
            for a in sorted(dying - {places.root(b)}):
                old = places.found[a]
                if (
                    old.bytes == made.bytes
                    and old.fits(made)
                    and (argument is None or old.fits(places.of(argument)))
                ):
                    dying.discard(a)
                    places.unite(a, b)
                    break


def _done(x: Instruction, started: Buffers) -> Buffers:
    """What an asynchronous instruction leaves: part of what its start has made."""
    if isinstance(started, int) or x.op == "all-reduce-done":
        return started
    if x.op == "copy-done":
        return started[0]
    wanted = len(arrays(x.type))
    for part in started[1:]:
        if len(leaves(part)) == wanted:
            return part
    return started[0]
