"""The largest microbatch that fits, from the compiler."""

import contextlib
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .limit import Limit, readable, scale_of
from .peak import Peak, measure
from .search import Curve, divisors, search

LINES = 20  # of the table in the page


class Row(NamedTuple):
    """One microbatch size.

    Attributes:
      size: rows of a microbatch.
      microbatches: of the batch; the last one may be smaller.
      bytes: the peak of one device; None if the compiler refused the program because
        it is too large.
      source: "compiled", or "predicted" from the sizes that were.
      sent: bytes that the collective operations of a call give one device; None where
        that is not known, as for a size that was not compiled.
    """

    size: int
    microbatches: int
    bytes: int | None
    source: Literal["compiled", "predicted"]
    sent: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of `accumax.plan`; `print` it for a page.

    Attributes:
      microbatch_size: the largest size that was found to fit. It was compiled.
      batch_size: rows of the batch.
      memory_limit: bytes of one device.
      largest: the largest size that fits if microbatches may be unequal, as the curve
        through the compiled sizes says. At least `microbatch_size`.
      rows: the divisors of the batch size and all compiled sizes, by size.
    """

    microbatch_size: int
    batch_size: int
    memory_limit: int
    largest: int
    rows: tuple[Row, ...]

    @property
    def microbatches(self) -> int:
        """The number of microbatches; the last one may be smaller."""
        return math.ceil(self.batch_size / self.microbatch_size)

    @property
    def peak_bytes(self) -> int:
        """Bytes of one device for the step with `microbatch_size`, as compiled."""
        found = next(r.bytes for r in self.rows if r.size == self.microbatch_size)
        assert found is not None  # a size without a figure does not fit
        return found

    @property
    def compiles(self) -> int:
        """The number of steps that were compiled."""
        return sum(row.source == "compiled" for row in self.rows)

    @property
    def uneven(self) -> tuple[Row, Row] | None:
        """Two compiled sizes, of which the larger one takes less memory, if any.

        A GPU may choose another algorithm for it, and a TPU keep less of it in its
        vector memory. Then larger sizes than `microbatch_size` may fit as well.
        """
        known = [r for r in self.rows if r.source == "compiled" and r.bytes is not None]
        for less, more in itertools.pairwise(known):
            if (less.bytes or 0) > (more.bytes or 0):
                return less, more
        return None

    def __str__(self) -> str:
        share = self.peak_bytes / self.memory_limit
        sends = any(row.sent for row in self.rows)
        lines = [
            f"microbatch_size={self.microbatch_size}: {self.microbatches} "
            f"microbatches of a batch of {self.batch_size}",
            f"peak of one device: {readable(self.peak_bytes)}, {share:.1%} of the "
            f"limit, {readable(self.memory_limit)}",
            "",
            f"{'size':>10}{'microbatches':>14}{'peak':>12}"
            + (f"{'sent':>12}" if sends else ""),
        ]
        # Those next to the answer, if there are more than a page takes.
        at = [row.size for row in self.rows].index(self.microbatch_size)
        first = max(0, min(at - LINES // 2, len(self.rows) - LINES))
        for row in self.rows[first : first + LINES]:
            peak = "unknown" if row.bytes is None else readable(row.bytes)
            fits = row.bytes is not None and row.bytes <= self.memory_limit
            note = row.source if fits else f"{row.source}, does not fit"
            note += "  <-" if row.size == self.microbatch_size else ""
            known = "" if row.sent is None else readable(row.sent)
            sent = f"{known:>12}" if sends else ""
            lines.append(f"{row.size:10}{row.microbatches:14}{peak:>12}{sent}  {note}")
        if self.microbatch_size < self.batch_size and (pair := self.uneven):
            less, more = (f"{r.size} rows {readable(r.bytes or 0)}" for r in pair)
            lines += [
                "",
                f"Memory does not grow with the size everywhere: {less}, {more}.",
                "So a larger size than the answer may fit, too: compile it to see.",
            ]
        if self.largest > 1.5 * self.microbatch_size:
            lines += [
                "",
                f"Up to about {self.largest} rows fit if the last microbatch may be "
                "smaller: pass",
                "divisors_only=False.",
            ]
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws memory by microbatch size, with the limit.

        Args:
          path: where to write the figure; its suffix is the format. None writes none.

        Returns:
          The `matplotlib.figure.Figure`.

        Raises:
          ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                'Plan.plot needs matplotlib: pip install "accumax[examples]".'
            ) from error
        figure = Figure(figsize=(7, 4), layout="constrained")  # needs no display
        axes = figure.subplots()
        unit, scale = scale_of(self.memory_limit)

        def line(sizes: dict[int, int], *marker: str, **style: Any) -> None:
            heights = [bytes_ / scale for bytes_ in sizes.values()]
            axes.plot(list(sizes), heights, *marker, **style)

        # What takes a multiple of the limit would press the rest to the bottom.
        seen = [r for r in self.rows if r.bytes and r.bytes <= 3 * self.memory_limit]
        known = {r.size: r.bytes for r in seen if r.bytes}
        compiled = {r.size: r.bytes for r in seen if r.bytes and r.source == "compiled"}
        answer = {self.microbatch_size: self.peak_bytes}
        name = f"microbatch_size={self.microbatch_size}"
        line(known, color="#9ecae1", label="predicted")
        line(compiled, "o", color="#495057", label="compiled")
        line(answer, "o", color="#d9480f", markersize=10, label=name)
        limit = self.memory_limit / scale
        axes.axhline(limit, color="#d9480f", linestyle="--", label="limit")
        axes.set(
            title="Peak memory of a device",
            xlabel="rows of a microbatch",
            ylabel=unit,
            ylim=(0, None),
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def plan(
    make_step: Callable[[int], Any],
    batch_size: int,
    *,
    memory_limit: int | str | None = None,
    divisors_only: bool = True,
    progress: bool = True,
) -> Plan:
    """The largest microbatch whose step fits in the memory, from the compiler.

    Nothing runs and no array is made: the step is compiled for a few microbatch sizes,
    and the compiler says which memory each takes. That memory is close to linear in the
    size. So two compiles predict the largest size that fits and a third verifies it; a
    prediction that misses is corrected by further ones. The step is any JAX step, ours
    or not, and the device may be absent.

    The peak of a device is the size of the program's arguments and results, less those
    results that reuse a donated argument, plus its temporary memory, as
    `memory_analysis` of the compiled step tells it. Arrays of yours that are no
    argument of the step are not in it, nor is what the allocator loses between
    buffers, so leave some room: "90%". A TPU keeps what fits in its vector memory,
    which is not in it either: memory then bends, and takes more compiles. A TPU
    compiler refuses a program that is larger than the memory; this counts as a size
    that does not fit.

    Args:
      make_step: from a microbatch size, an int, to the step with microbatches of that
        size. One of: `(function, args)`, with the tuple of the function's arguments,
        arrays or `jax.ShapeDtypeStruct`s; a `jax.stages.Lowered`; or a
        `jax.stages.Compiled`. Pass the function as you run it, jitted with its
        `donate_argnums`; one that is not jitted donates nothing. Arguments whose
        sharding divides them over several devices, or is for a device that is not
        there, are welcome.
      batch_size: rows of the batch, and the largest size that is considered.
      memory_limit: bytes of one device, an integer; a string such as "16GiB", "16 GB"
        or "512MiB"; or a share such as "80%" of what JAX may take on the step's device,
        its `memory_stats()["bytes_limit"]`. None is "100%". A CPU does not tell this.
      divisors_only: True finds the largest divisor of `batch_size` that fits, so that
        all microbatches are equal. False takes any size: at most 5 % below the largest
        that fits, or 7 rows where a backend pads rows to 8, if memory grows with the
        size; the page says where it was seen not to. The last microbatch is
        then smaller, and compiled by itself in `accumax.value_and_grad`; in any other
        step see that it is not lost.
      progress: show a progress bar while compiling, on a terminal, if tqdm is
        installed.

    Returns:
      A `Plan`, with `microbatch_size`, `microbatches`, `peak_bytes`, `largest`, `rows`
      and `plot(path)`.

    Raises:
      TypeError, ValueError: an argument is wrong, before anything is compiled; or not
        even microbatches of one row fit. The message says how much is missing.
      RuntimeError: the step fails at some size, which the message names. The step's own
        error is the cause.

    >>> import accumax, jax, optax
    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(jnp.tanh(x @ w) ** 2)
    >>> def make_step(size):
    ...     f = accumax.value_and_grad(loss_fn, microbatch_size=size)
    ...     w = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    ...     x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    ...     return jax.jit(f), (w, x)
    >>> result = accumax.plan(make_step, batch_size=1024, memory_limit="2MiB")
    >>> result.microbatch_size * result.microbatches
    1024
    >>> result.peak_bytes <= 2 * 2**20
    True

    References:
      JAX issue 31292: memory that runs out and could not be foreseen.
    """
    if not callable(make_step):
        raise TypeError(
            f"{make_step=} must be a function from a microbatch size to (function, "
            "args)."
        )
    batch_size = _check_batch_size(batch_size)
    limit = Limit(memory_limit)
    dividing = divisors(batch_size)
    candidates = dividing if divisors_only else range(1, batch_size + 1)
    with _bar(progress) as show:

        def compiled(size: int) -> Peak:
            show(size)
            return measure(make_step, size)

        *_, curve = search(compiled, candidates, lambda peak: limit.of(peak.devices))
    if not curve.fits:
        raise ValueError(_nothing_fits(curve))
    return Plan(
        curve.fits,
        batch_size,
        curve.limit,
        curve.largest(batch_size),
        tuple(_rows(curve, dividing, batch_size)),
    )


def _rows(curve: Curve, sizes: list[int], batch_size: int) -> Iterator[Row]:
    known = {p.size: p.total for p in curve.points} | dict.fromkeys(curve.refused)
    sent = {p.size: p.sent for p in curve.points}
    for size in sorted({*sizes, *known}):
        parts = math.ceil(batch_size / size)
        if size in known:
            yield Row(size, parts, known[size], "compiled", sent.get(size))
        else:
            yield Row(size, parts, max(round(curve.predict(size)), 0), "predicted")


def _nothing_fits(curve: Curve) -> str:
    limit = readable(curve.limit)
    least = next((p for p in curve.points if p.size == 1), None)
    if least is None or least.total is None:
        return (
            "Not even microbatches of one row fit: the compiler refused the step, "
            f"because it is too large for the device. The limit is {limit}."
        )
    fixed = readable(least.fixed)
    which = f"of which {fixed} are arguments and results"
    if least.fixed > curve.limit:
        which = f"and its arguments and results alone take {fixed}"
    return (
        f"Not even microbatches of one row fit: the step takes {readable(least.total)} "
        f"of one device, {which}. The limit is {limit}, so "
        f"{readable(least.total - curve.limit)} are missing. Donate what the step "
        "replaces, divide parameters and optimizer state over more devices, or pass "
        "fewer rows to a call."
    )


def _check_batch_size(batch_size: Any) -> int:
    try:
        if isinstance(batch_size, bool):
            raise TypeError
        number = operator.index(batch_size)
    except TypeError:
        raise TypeError(
            f"{batch_size=} must be an integer of at least 1, the rows of the batch."
        ) from None
    if number < 1:
        raise ValueError(f"{batch_size=} must be at least 1: the rows of the batch.")
    return number


@contextlib.contextmanager
def _bar(progress: bool) -> Iterator[Callable[[int], Any]]:
    """A function that shows which size is compiled next."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if not progress or tqdm is None:
        yield lambda size: None
        return
    # disable=None shows it on a terminal alone; how many compiles come is not known.
    with tqdm(desc="compiling", unit="size", leave=False, disable=None) as bar:

        def show(size: int) -> None:
            bar.set_description(f"compiling microbatch_size={size}")
            bar.update()

        yield show
