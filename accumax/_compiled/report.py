"""The report of `accumax.audit`: values, a page, warnings and a picture."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax

from .findings import Collective, Copy, Discarded
from .limit import readable

SMALL = 0.01  # of the arguments: copies of less are listed, without a warning
Kind: TypeAlias = Literal[
    "parameters",
    "optimizer state",
    "accumulator",
    "inputs",
    "outputs",
    "activations",
    "gradients",
    "other",
]


class Memory(NamedTuple):
    """The memory of one device, in bytes. None is what the backend does not tell.

    Attributes:
      arguments, output, temp: the compiler's figures.
      aliased: the part of `output` that reuses donated arguments.
      host: what the program has in the memory of the host. A CPU has one memory.
      total: what the device needs, arguments + output - aliased + temp.
      peak: the most that is alive at once, by the program's schedule. An estimate: the
        compiler's `total` is what counts. For most programs the two are within 2 % of
        each other (`benchmarks/run.py --only audit`).
    """

    arguments: int | None
    output: int | None
    aliased: int | None
    temp: int | None
    host: int | None
    total: int | None
    peak: int


class Live(NamedTuple):
    """A buffer that is alive at the peak.

    Attributes:
      bytes: on a device.
      kind: what it is for.
      type: as HLO writes it, such as "f32[8,128]".
      path: the argument that it holds; "" for none.
      scope: the named scopes and the primitive that made it.
      source: the line that made it, "file:line"; "" if XLA does not say.
    """

    bytes: int
    kind: Kind
    type: str
    path: str
    scope: str
    source: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the compiler made of a step; see `accumax.audit`.

    Attributes:
      memory: of one device.
      largest: the largest buffers that are alive at the peak of the schedule.
      donated: whether an argument was donated.
      not_reused: the paths of donated arguments whose memory no output reuses; None if
        the program does not tell.
      not_donated: the paths of the optimizer's state that is not donated, although an
        output of its shape is there beside it.
      crossed: pairs of a donated argument and an output that reuses its memory though
        another output is its new value; None if the program does not tell, as where
        several arguments are alike.
      copies: of buffers of a parameter's shape.
      collectives: all of a call.
      discarded: what is computed in every call and kept only if a condition holds.
      conditionals: their number before (None if not known) and after compiling.
      schedule: for each kind the bytes alive at each step of the schedule, in which
        the body of a loop is run once.
      platform: what it was compiled for, such as "gpu".
      warnings: sentences that say what to do.
    """

    memory: Memory
    largest: tuple[Live, ...]
    donated: bool
    not_reused: tuple[str, ...] | None
    not_donated: tuple[str, ...]
    crossed: tuple[tuple[str, str], ...] | None
    copies: tuple[Copy, ...]
    collectives: tuple[Collective, ...]
    discarded: tuple[Discarded, ...]
    conditionals: tuple[int | None, int]
    schedule: dict[Kind, list[int]] = dataclasses.field(repr=False)
    platform: str
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, numbers and strings, for JSON."""

        def plain(x: Any) -> Any:
            if hasattr(x, "_asdict"):
                x = x._asdict()
            if isinstance(x, dict):
                return {key: plain(value) for key, value in x.items()}
            return [plain(y) for y in x] if isinstance(x, (tuple, list)) else x

        names = (field.name for field in dataclasses.fields(self))
        return {name: plain(getattr(self, name)) for name in names}

    def __str__(self) -> str:
        return "\n".join(_page(self))

    def plot(self, path: str | None = None) -> Any:
        """Draws the memory over the schedule, coloured by kind. Needs matplotlib.

        Args:
          path: a file to save the picture to.

        Returns:
          The `matplotlib.figure.Figure`.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Audit.plot needs matplotlib: pip install matplotlib."
            ) from error
        kinds = [k for k in Kind.__args__ if any(self.schedule.get(k, ()))]
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        steps = range(len(next(iter(self.schedule.values()))))
        rows = [[n / 2**20 for n in self.schedule[kind]] for kind in kinds]
        colors = [f"C{Kind.__args__.index(kind)}" for kind in kinds]  # in each picture
        axes.stackplot(
            steps, *rows, labels=kinds, colors=colors, step="mid", linewidth=0
        )
        axes.set(
            xlabel="step of the schedule (each loop's body once)",
            ylabel="MiB on a device",
            title=f"memory of a call on {self.platform}",
            xlim=(0, max(len(steps) - 1, 1)),
            ylim=(0, None),
        )
        if self.memory.total is not None:
            total = self.memory.total / 2**20
            axes.axhline(total, color="black", linestyle=":", label="compiler's total")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def _few(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "")


def _times(n: int | float | None) -> str:
    return "?" if n is None else f"{n:g}"


def _page(report: Audit) -> Iterator[str]:
    memory = report.memory
    yield f"accumax.audit: one call on one device ({report.platform})"
    yield ""
    yield "memory"
    for name in ("arguments", "output", "aliased", "temp", "total"):
        found = getattr(memory, name)
        shown = "unknown" if found is None else readable(found)
        yield f"  {name:12}{shown:>14}"
    if memory.host:
        yield f"  {'host':12}{readable(memory.host):>14}  in the memory of the host"
    yield f"  {'schedule':12}{readable(memory.peak):>14}  alive at once, an estimate"
    yield ""
    yield "largest buffers at the peak"
    for x in report.largest:
        made = x.path or f"{x.scope} {x.source}".strip() or "XLA"
        yield f"  {readable(x.bytes):>12}  {x.kind:16}{x.type:22}{made}"
    yield ""
    yield from _list_donations(report)
    yield from _list_copies(report.copies)
    yield from _list_collectives(report.collectives)
    yield from _list_discarded(report)
    yield ""
    yield "warnings" if report.warnings else "no warnings"
    yield from (f"  - {line}" for line in report.warnings)


def _list_donations(report: Audit) -> Iterator[str]:
    if not report.donated:
        yield "donation: nothing is donated"
    elif report.not_reused is None:
        yield "donation: unknown"
    else:
        count = len(report.not_reused)
        crossed = "unknown" if report.crossed is None else len(report.crossed)
        yield f"donation: {count} donated and not reused, {crossed} crossed"


def _list_copies(found: tuple[Copy, ...]) -> Iterator[str]:
    certain = [x for x in found if x.certain]
    yield f"copies as large as a parameter: {len(certain)}"
    for x in certain[:8]:
        what = x.path or x.scope or "XLA's own"
        yield f"  {_times(x.times):>4} x {readable(x.bytes):>12}  {x.where:8}{what}"
    if len(certain) > 8:
        yield f"  and {len(certain) - 8} more"
    if len(certain) < len(found):
        others = len(found) - len(certain)
        yield f"  {others} more, of activations or gradients of a parameter's shape"


def _list_collectives(found: tuple[Collective, ...]) -> Iterator[str]:
    yield f"collectives: {len(found)}"
    groups: dict[tuple, int] = {}
    for x in found:
        key = x.op, x.bytes, x.times, x.where, x.gradient
        groups[key] = groups.get(key, 0) + 1
    for (op, bytes_, times, where, gradient), n in groups.items():
        what = ", of a gradient's shape" if gradient else ""
        calls = f"{n} x {_times(times)}"
        yield f"  {calls:>8} {op:20}{readable(bytes_):>12}  {where}{what}"


def _list_discarded(report: Audit) -> Iterator[str]:
    before, after = report.conditionals
    was = "unknown" if before is None else before
    yield f"conditionals: {was} written, {after} compiled"
    certain = [x for x in report.discarded if x.certain]
    total = sum(x.bytes for x in certain)
    yield f"an optimizer's work in every call, kept by a condition: {readable(total)}"
    if before is not None and before > after:
        yield (
            f"  conditionals that became selects: {before - after}; what their "
            "branches compute runs in every call, whatever is found here"
        )
    others = len(report.discarded) - len(certain)
    if others:
        yield (
            f"  {others} more choose between sums and products; whose they are cannot "
            "be told"
        )


_DEBUGGED = (
    " Under jax_debug_nans JAX donates nothing in a function that was called: audit it "
    "without that flag, in a new process."
)


def said(report: Audit) -> Iterator[str]:
    """The warnings of a report."""
    memory = report.memory
    debugs = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue]
    if (
        not report.donated
        and memory.output
        and memory.output > 0.3 * (memory.arguments or 0)
    ):
        yield (
            f"Nothing is donated: {readable(memory.output)} of outputs exist beside "
            "the arguments. If they are new parameters and a new optimizer state, pass "
            "donate_argnums for the old ones to jax.jit; a gradient is not."
            f"{_DEBUGGED if debugs else ''}"
        )
    elif report.not_donated:
        yield (
            f"{len(report.not_donated)} arrays of an optimizer's state are not "
            f"donated: {_few(report.not_donated)}. If outputs of their shape are their "
            "new values, pass the position of the state in donate_argnums too."
        )
    if report.not_reused:
        yield (
            f"{len(report.not_reused)} donated arguments are not reused by an output: "
            f"{_few(report.not_reused)}. An output of the same shape and dtype reuses "
            "one; do not donate what has none."
        )
    if report.crossed:
        (one, other), *_ = report.crossed
        yield (
            f"{len(report.crossed)} donated arguments are reused by outputs that are "
            f"not their new values, the first {one} by {other}: each is copied. Return "
            "the outputs in the order of the arguments, (params, opt_state)."
        )
    yield from _of_copies(report)
    yield from _of_collectives(report.collectives)
    certain = [x for x in report.discarded if x.certain]
    if certain:
        total = sum(x.bytes for x in certain)
        yield (
            f"An optimizer's arithmetic on {readable(total)} runs in every call, or "
            "that of an average of parameters, and a condition then keeps its result "
            "or not. accumax.apply_gradients and accumax.train_step run an optimizer "
            "in the call that closes the window alone, accumax.linen.ema and nnx.ema "
            "an average. (Without accumulation, a step that keeps its old parameters "
            "if the gradient is not finite is right.)"
        )


def _of_copies(report: Audit) -> Iterator[str]:
    found = [x for x in report.copies if x.certain and x.where != "branch"]
    total = sum(x.bytes * (x.times or 1) for x in found)
    if total <= SMALL * (report.memory.arguments or 0):
        return
    donated = report.donated and not (report.not_donated or report.not_reused)
    advice = (
        "Donated arguments are reused, in their order. XLA copies a value that is read "
        "after its new one is written, and values that change places; some copies are "
        "its own."
        if donated and report.crossed == ()
        else "Donate the arguments, and keep their order in the result. Others are "
        "XLA's own."
    )
    names = sorted({x.path for x in found if x.path})
    of = f", among them of {', '.join(names[:3])}" if names else ""
    yield (
        f"{len(found)} copies of buffers as large as parameters, {readable(total)} a "
        f"call{of}. {advice}"
    )


def _of_collectives(found: tuple[Collective, ...]) -> Iterator[str]:
    often = [x for x in found if x.gradient and (x.repeats is None or x.repeats > 1.5)]
    if not often:
        return
    unknown = any(x.repeats is None for x in often)
    most = max((x.repeats or 0 for x in often), default=0)
    times = "in each turn of a loop" if unknown else f"up to {most:g} times a call"
    within = " within a loop" if any(x.where == "loop" for x in often) else ""
    total = sum(x.bytes * (x.times or 1) for x in often)
    yield (
        f"Gradients are reduced{within}, {times}, {readable(total)} at least: "
        "once is enough. Add up each device's own gradients and reduce their sum "
        '(reduce_axis="data" in accumax).'
    )
