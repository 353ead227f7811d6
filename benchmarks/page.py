"""The results as a page."""

from collections.abc import Sequence
from typing import Any

import peers
from results import Row

TITLES = {
    "memory": "Memory: arguments and temporary memory of a train step, over the floor",
    "floor": "The floor itself",
    "copies": "Copies of a parameter's size in the compiled step",
    "time": "Time of a window of eight microbatches, over the floor",
    "scheduled": "Memory as another option of XLA arranges it: `programs.LEAST`",
    "hold": "A call within a window, over `acc += g`",
    "host": "Time of a call on tiny arrays, in microseconds: Python and dispatch",
    "trace": "Time to trace a train step, over the plain step's",
    "compile": "Time to compile it, over the plain step's",
    "error": "Error over the big batch's own in its dtype; both against float64",
    "inner_runs": "Runs of the optimizer in a window of eight",
    "reductions": "Reductions of the gradient in a window, on eight devices",
    "grows/parameters": "Memory, by parameters, in the parameters' size",
    "grows/k": "Memory, by microbatches in a call, in the parameters' size",
    "grows/leaves_trace": "Seconds to trace, by leaves of the tree",
    "grows/leaves_compile": "Seconds to compile, by leaves of the tree",
    "grows/devices_memory": "Memory of a device, by devices, in the parameters' size",
    "grows/devices_sent": "What a device sends in a window, by devices",
}
TITLES |= {
    "devices/over_one": "A transformer of 671 MB on eight devices, over one device",
    "devices/over_none": "The same, over the plain step on eight devices",
    "devices/one": "One device, in the parameters' size",
    "devices/memory": "Memory of a device, in the parameters' size",
    "devices/reduced": "How often its gradients are reduced in a window",
    "devices/gathered": "How often its parameters are gathered in a window",
    "devices/sent": "What each of the eight devices sends in a window",
    "scaling": "More devices, on paper: `benchmarks/scaling.py`",
    "maxtext_5039": "MaxText issue 5039: `benchmarks/maxtext_5039.py`",
    "wire": "Half precision on the wire: `benchmarks/wire.py`",
    "pictures/mib": "The transformer of `docs/memory.md`, in MiB",
    "pictures/parameters": "The same, in the parameters' size",
    "pictures/over_plain": "The same, over the plain step",
    "logits": "A fused linear cross entropy: `benchmarks/logits.py`",
    "half_sums": "Error of a mean of bfloat16 gradients, by microbatches and sum",
    "offload": "The optimizer's state on the host: `benchmarks/offload.py`",
    "adama": "Accumulation without a gradient tree: `benchmarks/adama.py`",
    "gradcache/memory": "InfoNCE, by microbatches: `benchmarks/info_nce.py`",
    "gradcache/time": "InfoNCE, time over the whole batch",
    "optax_notebook/memory": "Optax's notebook: `benchmarks/optax_notebook.py`",
    "optax_notebook/time": "Optax's notebook, time over the manual way",
}
MARK = "¹"
# Their parts have units of their own.
DIVIDED = "grows", "gradcache", "optax_notebook", "devices", "pictures"


def text(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """A table for each group: forms in the columns, and in a line the case."""
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items())
    quick = " A quick run: its times are rough." if facts["quick"] else ""
    lines = [
        f"# Results: {facts['chip']}",
        "",
        f"{facts['date']}, {versions}, Python {facts['python']}; measured or compiled "
        f"on {facts['host']}, in {facts['seconds']} s.{quick}",
        "",
        "Times are the least of several turns, compared within one run. "
        f"{MARK}: a peer takes less, or the floor by more than 3 %; why is said below. "
        "`benchmarks/peers.py` says what each form is.",
    ]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        group, *more = row.name.split("/")
        group = f"{group}/{more[0]}" if group in DIVIDED else group
        groups.setdefault(group, []).append(row)
    for group, members in groups.items():
        lines += ["", f"## {TITLES.get(group, group)}", "", *_table(members, group)]
        notes = [f"- `{row.name}`: {row.note}" for row in members if row.note]
        lines += ["", *notes] if notes else []
        command = members[0].command.partition(" --only")[0]
        lines += ["", f"`{command} --only {group}/`"]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], group: str) -> list[str]:
    cells: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row in rows:
        case, _, form = row.name.removeprefix(f"{group}/").rpartition("/")
        cells.setdefault(case or group, {})[form] = _cell(row, rows[0].unit)
        columns[form] = None
    known = (peers.NONE, peers.WHOLE, *peers.PEERS, *peers.OURS)
    order = sorted(columns, key=lambda c: known.index(c) if c in known else -1)
    lines = [f"| {rows[0].unit} | {' | '.join(order)} |", "|---" * (len(order) + 1)]
    lines[-1] += "|"
    for case, found in cells.items():
        line = " | ".join(found.get(form, "") for form in order)
        lines.append(f"| {case} | {line} |")
    return lines


def _cell(row: Row, unit: str) -> str:
    if row.value is None:
        return "no"
    ours = row.name.rpartition("/")[2] in peers.OURS
    value = f"{row.value:.4g}" if row.value < 1e4 else f"{row.value:.0f}"
    value = value if row.unit == unit else f"{value} {row.unit}"
    value = f"**{value}**" if ours else value
    return value + (MARK if row.note else "")
