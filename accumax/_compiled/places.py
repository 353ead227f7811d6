"""Buffers by number, and which of them are in the same memory."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, TypeAlias

from .hlo import Instruction, Type

# Values as buffers: the number of one, or a tuple for a tuple.
Buffers: TypeAlias = int | tuple[Any, ...]


@dataclasses.dataclass
class Span:
    """The time from the write of a value to its last use.

    `apart`: what writes it reads no operand in the same place.
    """

    begins: int
    ends: int
    apart: bool = False

    def is_before(self, later: "Span") -> bool:
        """Whether both may be in one place, this one first.

        What uses this one last may write the later one over it, unless it is a copy.
        """
        return self.ends < later.begins + (not later.apart)


@dataclasses.dataclass
class Buffer:
    """A buffer: the memory of one array, or of several that are never alive together.

    Attributes:
      bytes: its size in the main memory of the device, 0 in another memory.
      made_by: the instruction that writes it first.
      spans: the times in which it holds something.
      parameters: the numbers of the program's parameters that it holds.
      output: whether it holds an output.
    """

    bytes: int
    made_by: Instruction
    spans: list[Span]
    parameters: frozenset[int] = frozenset()
    output: bool = False

    def fits(self, other: "Buffer") -> bool:
        """Whether the two are never alive together."""
        return all(
            a.is_before(b) or b.is_before(a) for a in self.spans for b in other.spans
        )

    def alive(self) -> list[tuple[int, int]]:
        """The first and last times of `spans`, those that overlap as one, in order."""
        found: list[tuple[int, int]] = []
        for begins, ends in sorted((x.begins, x.ends) for x in self.spans):
            if found and begins <= found[-1][1] + 1:
                begins, last = found.pop()
                ends = max(last, ends)
            found.append((begins, ends))
        return found


def leaves(buffers: Buffers) -> list[int]:
    if isinstance(buffers, int):
        return [buffers]
    return [leaf for part in buffers for leaf in leaves(part)]


def at(buffers: Buffers, index: Iterable[int]) -> Buffers:
    for i in index:
        buffers = buffers[i] if isinstance(buffers, tuple) else buffers
    return buffers


class Places:
    """Numbers the values, and unites those that are in the same memory.

    Attributes:
      found: the buffer of each number. A root's stands for all that are united with it.
      spans: that of each number's own value.
    """

    def __init__(self) -> None:
        self.found: list[Buffer] = []
        self.spans: list[Span] = []
        self.parent: list[int] = []

    def new(
        self, instruction: Instruction, now: int, type_: Type | None = None
    ) -> Buffers:
        """New buffers for a value, by default of the instruction's own type."""
        type_ = instruction.type if type_ is None else type_
        if isinstance(type_, tuple):
            return tuple(self.new(instruction, now, part) for part in type_)
        size = 0 if type_.space or instruction.op == "constant" else type_.bytes
        return self._add(size, instruction, Span(now, now, instruction.is_apart))

    def again(self, old: Buffers, now: int) -> Buffers:
        """New values in the places of `old`."""
        if isinstance(old, tuple):
            return tuple(self.again(part, now) for part in old)
        was = self.of(old)
        number = self._add(was.bytes, was.made_by, Span(now, now))
        self.unite(old, number)
        return number

    def _add(self, size: int, made_by: Instruction, span: Span) -> int:
        self.found.append(Buffer(size, made_by, [span]))
        self.spans.append(span)
        self.parent.append(len(self.parent))
        return len(self.found) - 1

    def root(self, number: int) -> int:
        """The number that stands for all that are united with this one."""
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def unite(self, one: Buffers, other: Buffers) -> None:
        """The two are in the same memory."""
        for a, b in zip(leaves(one), leaves(other), strict=False):
            a, b = sorted((self.root(a), self.root(b)))
            if a == b:
                continue
            first, second = self.found[a], self.found[b]
            self.parent[b] = a
            first.bytes = max(first.bytes, second.bytes)
            first.parameters |= second.parameters
            first.output |= second.output
            first.spans += second.spans

    def use(self, buffers: Buffers, now: int) -> None:
        """They are alive until now at least."""
        for b in leaves(buffers):
            self.spans[b].ends = max(self.spans[b].ends, now)

    def of(self, number: int) -> Buffer:
        """The buffer of a number, with all that are united with it."""
        return self.found[self.root(number)]

    def reuse(self, pairs: list[tuple[int, int]]) -> None:
        """Puts outputs, and what fits before them, in place of donated arguments."""
        for argument, output in pairs:
            self.unite(argument, output)
            self._take_in(argument)

    def fill(self, outputs: list[int]) -> None:
        """Puts what fits into the place of an output, before that is written."""
        for b in outputs:
            if not self.of(b).parameters:
                self._take_in(b)

    @functools.cached_property
    def _temporary(self) -> dict[int, list[tuple[int, int]]]:
        """What is neither argument nor output, by size: first writes and numbers."""
        sizes: dict[int, list[tuple[int, int]]] = {}
        for n, x in enumerate(self.found):
            if self.root(n) == n and x.bytes and not (x.parameters or x.output):
                written = min(span.begins for span in x.spans)
                sizes.setdefault(x.bytes, []).append((written, n))
        return {size: sorted(found) for size, found in sizes.items()}

    def _take_in(self, number: int) -> None:
        """Unites a buffer with those of its size that are alive at other times."""
        same = self._temporary.get(self.of(number).bytes, [])
        free = 0
        for begins, ends in [*self.of(number).alive(), (math.inf, math.inf)]:
            at = bisect.bisect_left(same, (free, 0))
            while at < len(same) and same[at][0] <= begins:
                if self.of(number).fits(self.found[same[at][1]]):
                    self.unite(number, same.pop(at)[1])
                else:
                    at += 1
            free = ends

    def united(self) -> tuple[tuple[Buffer, ...], tuple[int, ...]]:
        """All buffers, each once, and the place of each number's among them."""
        numbers = range(len(self.found))
        places: dict[int, int] = {}
        for number in numbers:
            if self.root(number) == number:
                places[number] = len(places)
        buffers = tuple(self.found[number] for number in places)
        return buffers, tuple(places[self.root(number)] for number in numbers)
