"""What many devices cost, as rows, one JSON a line.

    python benchmarks/many_devices.py         # eight of this machine's CPU
    python benchmarks/many_devices.py gpu     # or tpu: eight that need not be there
    python benchmarks/many_devices.py gpu --parts grows maxtext_5039

`run.py` starts it: it needs a process of its own, because with eight CPU devices every
other figure would be another. The programs are those of `collectives.py`, `scaling.py`
and `maxtext_5039.py`, the rounding that of `wire.py`, the times those of `host.py`.
"""

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence

import collectives
import devices
import forms
import host
import jax
import maxtext_5039
import numpy as np
import scaling
import transformer
import wire
from collectives import AUTO, Case, Model, model_of
from devices import CHIPS
from exchanges import GATHERS, REDUCTIONS, Found
from jax.sharding import Mesh
from results import Row

# A row's form, of the name in `collectives.py`.
NAMES = {
    collectives.STEP: "none",
    AUTO: "value_and_grad_without_reduce_axis",
    forms.MICROBATCHING: "microbatching",
    collectives.REDUCED: "value_and_grad",
    forms.MULTISTEPS: "multisteps",
    forms.TRAIN_STEP: "train_step_without_reduce_axis",
    collectives.PLAIN: "train_step",
    collectives.APART: "train_step_and_accumulate",
    collectives.ZERO: "shard_optimizer",
    collectives.LAYERS: "fsdp",
    collectives.ONCE: "fsdp_once",
}
PARAMETERS = "x parameters"
SMALL = transformer.Size(4, 256, 4, 1024, 64)
GROWN = "scan", collectives.REDUCED, forms.MULTISTEPS, collectives.APART


def cases(model: Model, mesh: Mesh) -> dict[str, Case]:
    """With a scan by hand beside those of `collectives.py`."""
    rows = model.rows * mesh.size
    gradient = forms.scanned(jax.value_and_grad(model.loss), rows, strided=True)
    scan = Case(forms.whole(forms.applied(forms.ADAMW), gradient))
    within = collectives.within_a_call(model, mesh)
    return within | {"scan": scan} | collectives.across_calls(model, mesh)


def mesh_of(target: str, count: int) -> Mesh:
    return Mesh(np.array(devices.devices(target)[:count]), (collectives.AXIS,))


def grows(
    target: str, size: transformer.Size = SMALL, counts: Sequence[int] = (1, 2, 4, 8)
) -> list[Row]:
    """By the number of devices; with the last, how often a gradient is reduced."""
    model, found = model_of(size), []
    for count in counts:
        mesh = mesh_of(target, count)
        for name, case in cases(model, mesh).items():
            if count < counts[-1] and name not in GROWN:
                continue
            step = collectives.compiled(case, model, mesh)
            form = NAMES.get(name, name)
            at = f"{count}/{target}/{form}"
            if len(counts) > 1 and name in GROWN:
                found += [
                    Row(f"grows/devices_memory/{at}", step.total, PARAMETERS),
                    Row(f"grows/devices_sent/{at}", step.wire() / 1e6, "MB a window"),
                ]
            if count == counts[-1]:
                volume = step.volume(REDUCTIONS)
                case_name = f"reductions/transformer/{target}/{form}"
                found.append(Row(case_name, volume, "gradients a window"))
    return found


def large(target: str, size: transformer.Size | None = None) -> list[Row]:
    """A transformer of 671 MB, on eight devices."""
    model = model_of(size or transformer.Size())
    mesh, alone = mesh_of(target, 8), mesh_of(target, 1)
    rows = []
    for form, windows, one in (
        ("value_and_grad", collectives.within_a_call, collectives.one_call),
        ("train_step", collectives.across_calls, collectives.one_window),
    ):
        found = collectives.every(windows(model, mesh), model, mesh)
        single = collectives.compiled(one(model), model, alone)
        rows += [Row(f"devices/one/{target}/{form}", single.total, PARAMETERS)]
        for name, f in found.items():
            rows += figures(target, name, f)
            ratio = f.total / single.total
            case = f"devices/over_one/{target}/{NAMES[name]}"
            rows.append(Row(case, ratio, "x one device"))
            if name in (AUTO, collectives.REDUCED):
                rows += on_paper(target, NAMES[name], f)
        if (zero := found.get(collectives.ZERO)) is not None:
            ratio = zero.total / found[collectives.STEP].total
            case = f"devices/over_none/{target}/shard_optimizer"
            rows.append(Row(case, ratio, "x none"))
    divided = collectives.sharded(model, mesh, 1)
    for name in (collectives.LAYERS, collectives.ONCE):
        step = collectives.compiled(divided[name], model, mesh)
        rows += figures(target, name, step)
    return rows


def figures(target: str, name: str, step: Found) -> list[Row]:
    at = f"{target}/{NAMES[name]}"
    return [
        Row(f"devices/memory/{at}", step.total, PARAMETERS),
        Row(f"devices/reduced/{at}", step.volume(REDUCTIONS), "gradients a window"),
        Row(f"devices/gathered/{at}", step.volume(GATHERS), "parameters a window"),
        Row(f"devices/sent/{at}", step.wire() / 1e6, "MB a window"),
    ]


def on_paper(target: str, form: str, step: Found) -> list[Row]:
    """For other numbers of devices, and links as `scaling.py` has them."""
    if target not in scaling.PAPER:
        return []
    computed, rows = scaling.computing(step, target), []
    rows.append(Row(f"scaling/{target}/computing/{form}", computed, "ms a window"))
    for name, links in scaling.PAPER[target].links.items():
        for count in scaling.DEVICES:
            at, sent = f"{target}/{name}/{count}", scaling.sending(step, count, links)
            rows.append(Row(f"scaling/{at}/sending/{form}", sent, "ms a window"))
            tokens = scaling.TOKENS * sent / computed
            rows.append(Row(f"scaling/{at}/tokens/{form}", tokens, "a microbatch"))
    return rows


def maxtext(target: str, each: Sequence[int] = (8, 2)) -> list[Row]:
    """MaxText issue 5039: two microbatches, over the step without accumulation."""
    mesh, rows = mesh_of(target, 8), []
    for count in each:
        found = maxtext_5039.rows_of(mesh, count)
        for name, ratio in maxtext_5039.ratios(found).items():
            case = f"maxtext_5039/{count}_rows/{target}/{slug(name)}"
            rows.append(Row(case, ratio, "x one microbatch"))
    return rows


def rounded(target: str) -> list[Row]:
    """What half precision on the wire loses. It runs, so on a CPU alone."""
    if target != "cpu":
        return []
    return [
        Row(f"wire/noise_{noise:g}/{slug(name)}", error, "relative error")
        for noise in (0.1, 10.0)
        for name, error in wire.errors(noise).items()
    ]


def dispatched(target: str, leaves: int = 300, calls: int = 30) -> list[Row]:
    """The time of a call on the host, over that of a plain step; on a CPU alone."""
    if target != "cpu":
        return []
    return [
        Row(f"dispatch/{slug(title)}/{slug(name)}", over, "x plain")
        for title, found in host.tables(leaves, calls).items()
        for name, (_, over) in found.items()
    ]


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


PARTS: dict[str, Callable[[str], list[Row]]] = {
    "grows": grows,
    "devices": large,
    "maxtext_5039": maxtext,
    "wire": rounded,
    "dispatch": dispatched,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="of the rows")
    add("--counts", default="1,2,4,8", help="of devices, of grows")
    args = parser.parse_args()
    counts = [int(n) for n in args.counts.split(",")]
    parts = PARTS | {"grows": functools.partial(grows, counts=counts)}
    for part in args.parts:
        for row in parts[part](args.target):
            print(json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    main()
