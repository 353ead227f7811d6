"""Buffers by number, and which of them are in the same memory."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, TypeAlias

from .hlo import Instruction, Type

# Values as buffers: the number of one, or a tuple for a tuple.
Buffers: TypeAlias = int | tuple[Any, ...]


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


def leaves(buffers: Buffers) -> list[int]:
    if isinstance(buffers, int):
        return [buffers]
    return [leaf for part in buffers for leaf in leaves(part)]


def at(buffers: Buffers, index: Iterable[int]) -> Buffers:
    for i in index:
        buffers = buffers[i] if isinstance(buffers, tuple) else buffers
    return buffers


class Places:
    """Numbers the buffers and unites those that are in the same memory.

    Attributes:
      found: the buffer of each number. A root's stands for all that are united with it.
    """

    def __init__(self) -> None:
        self.found: list[Buffer] = []
        self.parent: list[int] = []

    def new(
        self, instruction: Instruction, now: int, type_: Type | None = None
    ) -> Buffers:
        """New buffers for a value, by default of the instruction's own type."""
        type_ = instruction.type if type_ is None else type_
        if isinstance(type_, tuple):
            return tuple(self.new(instruction, now, part) for part in type_)
        size = 0 if type_.space or instruction.op == "constant" else type_.bytes
        buffer = Buffer(size, instruction, begins=now, ends=now)
        self.found.append(buffer)
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
            first.begins = min(first.begins, second.begins)
            first.ends = max(first.ends, second.ends)

    def use(self, buffers: Buffers, now: int) -> None:
        """They are alive until now at least."""
        for b in leaves(buffers):
            self.of(b).ends = max(self.of(b).ends, now)

    def of(self, number: int) -> Buffer:
        """The buffer of a number, with all that are united with it."""
        return self.found[self.root(number)]

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
            output = self.of(b)
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
        same = self._temporary.get(self.of(number).bytes, [])
        left = []
        for n in same:
            x = self.found[n]
            if begins <= x.begins and x.ends <= ends:
                self.unite(number, n)
                begins = x.ends
            else:
                left.append(n)
        same[:] = left

    def united(self) -> tuple[tuple[Buffer, ...], tuple[int, ...]]:
        """All buffers, each once, and the place of each number's among them."""
        numbers = range(len(self.found))
        places: dict[int, int] = {}
        for number in numbers:
            if self.root(number) == number:
                places[number] = len(places)
        buffers = tuple(self.found[number] for number in places)
        return buffers, tuple(places[self.root(number)] for number in numbers)
