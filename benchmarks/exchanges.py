"""What devices exchange in a compiled program: its collectives, read from its HLO."""

import math
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

# In a loop; in what runs at most once in a window; in another branch; in none of them.
Place: TypeAlias = Literal["loop", "boundary", "branch", "outside"]

REDUCTIONS = "all-reduce", "reduce-scatter"
GATHERS = ("all-gather",)
MOVES = "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast"
BITS = re.compile(r"\b(pred|bf16|[sufc]\d+)\w*\[([\d,]*)\]")


class Collective(NamedTuple):
    """An operation in which devices exchange data.

    Attributes:
      op: its name, without "-start".
      place: where it stands.
      executions: in a run of the program; those in a loop count its iterations, if
        they are known, and those in a branch as if it were taken.
      bytes: of the whole array: what a device gives, or gets from an all-gather.
      dtypes: of what a device gives.
      groups: the devices that exchange with each other, by their position in the mesh.
    """

    op: str
    place: Place
    executions: int
    bytes: int
    dtypes: frozenset[str]
    groups: frozenset[frozenset[int]]

    def wire(self, count: int | None = None) -> float:
        """Bytes that a device sends in one execution, in a ring of `count` of them."""
        n = count or max(map(len, self.groups), default=1)
        if self.op.startswith("collective-"):
            return self.bytes
        return (2 if self.op == "all-reduce" else 1) * (n - 1) / n * self.bytes


class Found(NamedTuple):
    """A step, compiled. Of one device; memory in units of all parameters."""

    arguments: float
    temp: float
    results: float  # those that do not reuse the memory of a donated argument
    unit: int  # bytes of the parameters
    calls: int
    each: list[Collective]

    @property
    def total(self) -> float:
        return self.arguments + self.temp + self.results

    def times(self, x: Collective) -> int:
        """The executions in a window, in which what runs at most once does so."""
        return x.executions * (1 if x.place in ("boundary", "branch") else self.calls)

    def volume(self, ops: Iterable[str], *places: Place) -> float:
        """Bytes in a window, in these places or in all, in units of the parameters."""
        sizes = [
            x.bytes * self.times(x)
            for x in self.each
            if x.op in ops and (not places or x.place in places)
        ]
        return sum(sizes) / self.unit

    def count(self, ops: Iterable[str], least: float = 0) -> int:
        """Executions in a window, of at least `least` bytes."""
        return sum(self.times(x) for x in self.each if x.op in ops and x.bytes >= least)

    def wire(self, count: int | None = None) -> float:
        """Bytes that a device, of `count`, sends in a window."""
        return sum(x.wire(count) * self.times(x) for x in self.each)


class _Instruction(NamedTuple):
    result: str
    op: str
    operands: str
    attributes: str


_Computation: TypeAlias = dict[str, _Instruction]


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, from its HLO as text."""
    entry, program = _parsed(text)
    found: list[Collective] = []

    def walk(name: str, executions: int, place: Place) -> None:
        computation = program.get(name, {})
        for x in computation.values():
            op = x.op.removesuffix("-start")
            if op.endswith(("-done", "-update")):
                continue  # begun, and counted, before
            if op in REDUCTIONS + GATHERS + MOVES:
                if "all-reduce-scatter" in name:  # a fusion of XLA:TPU
                    op = "reduce-scatter"
                found.append(_collective(op, x, computation, executions, place))
                continue
            inner, times = place, executions
            if op in ("while", "conditional"):
                inner, times = _inside(x, place), executions * _trips(x, program)
            for called in _called(x):
                walk(called, times, inner)

    walk(entry, 1, "outside")
    return found


def _parsed(text: str) -> tuple[str, dict[str, _Computation]]:
    entry, program, current = "", {}, None
    for line in text.splitlines():
        if line.endswith("{") and not line[:1].isspace():
            words = line.removeprefix("ENTRY ").split()
            if line.startswith(("ENTRY ", "%")):
                name = words[0].lstrip("%")
                current = program[name] = {}
                entry = name if line.startswith("ENTRY ") else entry
            continue
        found = re.match(r"\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z\d-]*)\((.*)", line)
        if found and current is not None:
            name, result, op, rest = found.groups()
            end = _closing(rest)
            current[name] = _Instruction(result, op, rest[:end], rest[end:])
    return entry, program


def _closing(text: str) -> int:
    """Where the parenthesis is closed that was opened before `text`."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return i
    return len(text)


def _called(x: _Instruction) -> list[str]:
    """The computations that may hold collectives of this instruction."""
    one = r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    several = re.search(r"\b(?:called|branch)_computations=\{([^}]*)\}", x.attributes)
    names = re.findall(one, x.attributes)
    return names + (re.findall(r"[\w.\-]+", several[1]) if several else [])


def _inside(x: _Instruction, place: Place) -> Place:
    if place == "boundary" or re.search(
        r'op_name="[^"]*accumax\.boundary\)*/(while|cond)"', x.attributes
    ):
        return "boundary"
    if re.search(r'op_name="[^"]*accumax\.once\)*/while"', x.attributes):
        return place
    return "branch" if x.op == "conditional" or place == "branch" else "loop"


def _trips(x: _Instruction, program: dict[str, _Computation]) -> int:
    """The iterations of a loop; 1 if that is not known, and for a conditional."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', x.attributes)
    if known:
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", x.attributes)
    if not condition:
        return 1
    # XLA:TPU does not say. Its loops that count compare with one constant.
    body = program.get(condition[1], {}).values()
    bounds = [
        int(c.operands) for c in body if c.op == "constant" if c.operands.isdigit()
    ]
    return max(bounds, default=1)


def _collective(
    op: str, x: _Instruction, computation: _Computation, executions: int, place: Place
) -> Collective:
    given = x.operands
    if not BITS.search(given):  # names alone
        names = re.findall(r"%([\w.\-]+)", given)
        given = " ".join(computation[name].result for name in names)
    arrays = BITS.findall(given)
    groups = _groups(x.attributes)
    size = sum(_bytes(dtype, dims) for dtype, dims in arrays)
    if op == "all-gather":
        size *= max(map(len, groups), default=1)
    dtypes = frozenset(dtype for dtype, _ in arrays)
    return Collective(op, place, executions, size, dtypes, groups)


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(dtype.lstrip("bcsuf") or 8)
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _groups(attributes: str) -> frozenset[frozenset[int]]:
    """The replica groups, in each of the notations that XLA has for them."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if found := pairs or listed:
        each = re.findall(r"\{([\d,]*)\}", found[1])
        return frozenset(frozenset(map(int, g.split(","))) for g in each)
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes
    )
    if iota:
        shape = _ints(iota[1])
        return _rows(_order(iota[2], math.prod(shape)).reshape(shape))
    mesh = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}",
        attributes,
    )
    if mesh:
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _order(mesh[2] or "", math.prod(sizes.values()))
        ids = ids.reshape(tuple(sizes.values()))
        last = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        count = math.prod(ids.shape[i] for i in last)
        ids = np.moveaxis(ids, last, range(-len(last), 0))
        return _rows(ids.reshape(-1, count))
    return frozenset()


def _order(text: str, count: int) -> Any:
    """The devices in the order of "[2,4]T(1,0)": counted, and transposed."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        return np.array(_ints(text)) if text else np.arange(count)
    ids = np.arange(count).reshape(_ints(found[1]))
    return ids.transpose(_ints(found[2])).ravel() if found[2] else ids.ravel()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _rows(ids: Any) -> frozenset[frozenset[int]]:
    return frozenset(frozenset(row) for row in ids.tolist())
