"""Reads the text of a compiled program: its instructions, in the order they run."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # others end with their bits
# Instructions that give the elements of their operand, or some of them again.
VIEWS = {"bitcast", "reshape", "copy", "transpose", "convert", "broadcast"}
# Instructions that read and write different places, so that nothing shares memory.
_APART = {
    "copy", "transpose", "dot", "convolution", "reduce", "reduce-window", "gather",
    "sort", "concatenate", "all-gather", "all-to-all", "collective-permute", "reverse",
    "custom-call", "rng-bit-generator", "cholesky", "triangular-solve", "fft",
}  # fmt: skip

_SKIPPED = re.compile(r"/\*.*?\*/")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)\s*\(.*\)\s*->.*\{\s*$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OP = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ALIAS = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array.

    Attributes:
      dtype, shape: as HLO names them, such as "f32" and (8, 128).
      bytes: what it takes in memory, with the padding of its tiles.
      space: the memory it is in. 0 is the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    space: int

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


# The type of a value: an array, or a tuple of types.
Type: TypeAlias = Array | tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. `attributes` is the text behind its operands."""

    name: str
    type: Type
    op: str
    operands: tuple[str, ...]
    attributes: str
    inside: str  # the text between its parentheses

    def called(self, *keys: str) -> list[str]:
        """The computations that these attributes name."""
        found = []
        for key in keys:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
            found += re.findall(r"[\w.\-]+", match.group(1)) if match else []
        return found

    def number(self, key: str) -> int | None:
        match = re.search(rf"\b{key}=\"?(\d+)", self.attributes)
        return int(match.group(1)) if match else None

    @functools.cached_property
    def scope(self) -> str:
        """The named scopes and the primitive that made it; "" if it is XLA's own."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1).replace("\\'", "'").replace('\\"', '"') if match else ""

    @property
    def is_apart(self) -> bool:
        """Whether its result is never where an operand is.

        Of fusions, those of a reduction, and XLA:CPU's of a product. A product that is
        Triton's may be added where its sum is.
        """
        fused = "kind=kInput", '"__ynn_fusion"'
        return self.op in _APART or any(kind in self.attributes for kind in fused)

    @property
    def aliases(self) -> list[tuple[list[int], int, list[int]]]:
        """What is in one place: an index of the result, an operand, an index in it."""
        _, _, text = self.attributes.partition("output_to_operand_aliasing={")
        return _pairs(text)

    @property
    def trips(self) -> int | None:
        """How often a loop runs, if the program says so."""
        match = re.search(r'known_trip_count"?:\{"n":"(\d+)"', self.attributes)
        return int(match.group(1)) if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order they run. The value of `root` is the result."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {x.name: x for x in self.instructions}

    def source(self, name: str | None) -> Instruction:
        """The instruction whose value has this name, before it was copied or viewed.

        None is the root.
        """
        x = self.root if name is None else self.by_name[name]
        while x.op in VIEWS and len(x.operands) == 1:
            x = self.by_name[x.operands[0]]
        return x


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the one that is run.
      aliases: for the index of an output the number of the parameter whose memory it
        reuses.
      lines: the source line of each stack frame, "file:line".
    """

    computations: dict[str, Computation]
    entry: str
    aliases: dict[tuple[int, ...], int]
    lines: dict[int, str]

    def source(self, instruction: Instruction) -> str:
        """Where the instruction comes from, "file:line"; "" if XLA does not say."""
        file = re.search(r'source_file="([^"]*)"', instruction.attributes)
        if file:
            return f"{file.group(1)}:{instruction.number('source_line')}"
        return self.lines.get(instruction.number("stack_frame_id") or -1, "")

    @property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters of the entry computation, by their number."""
        found = self.computations[self.entry].instructions
        return {int(x.inside): x for x in found if x.op == "parameter"}

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None if it cannot be told."""
        if loop.trips is not None:
            return loop.trips
        (name,) = loop.called("condition")
        # A counter below a constant, as `lax.scan` has it.
        condition = self.computations[name]
        bounds = {
            int(x.inside)
            for x in self._with_fused(condition)
            if x.op == "constant" and re.fullmatch(r"\d+", x.inside)
        }
        compares = [x for x in self._with_fused(condition) if x.op == "compare"]
        return bounds.pop() if len(bounds) == len(compares) == 1 else None

    def is_at_most_once(self, loop: Instruction) -> bool:
        """Whether a `while` runs while a flag is set, and its body clears the flag."""
        ((condition,), (body,)) = (loop.called(key) for key in ("condition", "body"))
        flag = self.computations[condition].source(None)
        if flag.op != "get-tuple-element":
            return False
        root = self.computations[body].root
        if root.op != "tuple":
            return False
        cleared = self.computations[body].source(
            root.operands[flag.number("index") or 0]
        )
        return cleared.op == "constant" and cleared.inside in ("false", "0")

    def _with_fused(self, computation: Computation) -> Iterator[Instruction]:
        for x in computation.instructions:
            yield x
            for name in x.called("calls", "to_apply"):
                yield from self._with_fused(self.computations[name])


def arrays(type_: Type) -> list[Array]:
    """The arrays of a type, in order."""
    if isinstance(type_, Array):
        return [type_]
    return [leaf for part in type_ for leaf in arrays(part)]


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = None
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if name is not None:
            if line.startswith("}"):
                computations[name] = Computation(name, tuple(body), root or body[-1])
                name, root, body = None, None, []
            elif match := _INSTRUCTION.match(line):
                body.append(_instruction(match.group(2), line[match.end() :]))
                root = body[-1] if match.group(1) else root
        elif match := _COMPUTATION.match(line):
            name = match.group(2)
            entry = name if match.group(1) else entry
        elif re.fullmatch(r"[A-Z]\w+", line):  # such as StackFrames
            table = tables.setdefault(line, {})
        elif match := re.match(r"^(\d+) (.*)$", line):
            table[int(match.group(1))] = match.group(2)
    if entry is None:
        raise ValueError("The text has no ENTRY computation, so it is no HLO program.")
    return Module(computations, entry, _aliases(text), _lines(tables))


def _instruction(name: str, line: str) -> Instruction:
    line = _SKIPPED.sub("", line) if "/*" in line else line
    type_, position = _type(line, 0)
    match = _OP.match(line, position)
    if match is None:
        raise ValueError(f"No instruction of HLO: {line[:200]!r}.")
    end = _closing(line, match.end() - 1)
    inside = line[match.end() : end]
    operands = tuple(_NAME.findall(inside))
    if not operands and match.group(1) not in ("parameter", "constant"):
        # Some versions write operands without a %.
        operands = tuple(re.findall(r"(?:^|, )([a-zA-Z_][\w.\-]*)", inside))
    return Instruction(
        name, type_, match.group(1), operands, line[end + 1 :], inside.strip()
    )


def _type(line: str, position: int) -> tuple[Type, int]:
    """The type that begins there, and where it ends."""
    while line[position] in " ,":
        position += 1
    if line[position] != "(":
        match = _ARRAY.match(line, position)
        if match is None:
            raise ValueError(f"No type of HLO: {line[position : position + 80]!r}.")
        return _array(*match.groups()), match.end()
    parts, position = [], position + 1
    while line[position] != ")":
        part, position = _type(line, position)
        parts.append(part)
        while line[position] in " ,":
            position += 1
    return tuple(parts), position + 1


@functools.cache
def _array(dtype: str, dims: str, layout: str | None) -> Array:
    shape = tuple(int(d.strip("<=")) for d in dims.split(",") if d)
    layout = layout or ""
    order, _, rest = layout.partition(":")
    padded = np.array(shape, int)
    if tile := re.match(r"T\(([\d,]+)\)", rest):
        sizes = [int(n) for n in tile.group(1).split(",")]
        minor = [int(d) for d in order.split(",") if d][: len(sizes)]
        for size, axis in zip(reversed(sizes), minor, strict=False):
            padded[axis] = -(-padded[axis] // size) * size
    bits = _BITS.get(dtype)
    if bits is None:
        digits = re.search(r"\d+", dtype)
        bits = int(digits.group()) if digits else 32
    space = re.search(r"S\((\d+)\)", layout)
    size = -(-int(np.prod(padded, dtype=np.int64)) * bits // 8)
    return Array(dtype, shape, size, int(space.group(1)) if space else 0)


def _closing(line: str, position: int) -> int:
    """Where the parenthesis closes that opens there; strings may hold others."""
    depth, quoted = 0, False
    for i in range(position, len(line)):
        c = line[i]
        if c == '"' and line[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and c == "(":
            depth += 1
        elif not quoted and c == ")":
            depth -= 1
            if not depth:
                return i
    raise ValueError(f"A parenthesis does not close: {line[:200]!r}.")


def _aliases(text: str) -> dict[tuple[int, ...], int]:
    header = text.split("\n", 1)[0]
    _, found, rest = header.partition("input_output_alias={")
    if not found:
        return {}
    pairs = _pairs(rest.split("entry_computation_layout")[0])
    return {tuple(output): number for output, number, _ in pairs}


def _pairs(text: str) -> list[tuple[list[int], int, list[int]]]:
    """Pairs of what shares memory, as HLO writes them: {output}: (number, {index}."""

    def index(text: str) -> list[int]:
        return [int(i) for i in text.split(",") if i.strip()]

    return [(index(a), int(n), index(b)) for a, n, b in _ALIAS.findall(text)]


def _lines(tables: dict[str, dict[int, str]]) -> dict[int, str]:
    files = {n: name.strip('"') for n, name in tables.get("FileNames", {}).items()}

    def field(text: str, name: str) -> int:
        match = re.search(rf"{name}=(\d+)", text)
        return int(match.group(1)) if match else 0

    places = {
        n: f"{files.get(field(x, 'file_name_id'), '')}:{field(x, 'line')}"
        for n, x in tables.get("FileLocations", {}).items()
    }
    return {
        n: places.get(field(x, "file_location_id"), "")
        for n, x in tables.get("StackFrames", {}).items()
    }
