"""Where a peer is ahead, or memory above the floor, and why."""

import dataclasses
import re
from collections.abc import Sequence

import peers
from results import Row

# By how much a peer must be ahead: memory and counts repeat, times do not. Where the
# memory of two programs differs by less than 0.5 %, it is scratch and scalars.
TOLERANCES = {
    "memory": 0.005,
    "scheduled": 0.005,
    "copies": 0.0,
    "inner_runs": 0.0,
    "reductions": 0.01,
    "error": 0.05,
    "hold": 0.1,
    "time": 0.1,
    "host": 0.1,
    "trace": 0.1,
    "compile": 0.1,
}
COMPETES = dict.fromkeys(peers.ACROSS, peers.ACROSS_PEERS) | dict.fromkeys(
    peers.WITHIN, peers.WITHIN_PEERS
)
ABOVE = 1.03  # times the floor: a row says why
_RESNET = (
    "XLA:GPU copies kernels into the layout of its convolutions, and keeps the copies "
    "of all parameters for the backward pass."
)
_NARROW = (
    "All of it fits into vector memory, which is not counted. With nearly none of that "
    "memory, train_step takes 1.02 and MultiSteps 1.03 times the floor, and "
    "value_and_grad 1.90: it copies the batch once, so that its rows are not padded."
)
# A pattern of "row: peer", and the cause. The first that matches counts.
CAUSES = [
    (r"memory/narrow/.*/tpu/", _NARROW),
    (
        r"memory/\w+_bf16/.*: ",
        "The peer sums in bfloat16, with its rounding: see error/bf16. accumax sums in "
        "float32, two of the parameters' sizes. accumulator_dtype=None sums "
        "as the peer does.",
    ),
    (
        r"memory/lora.*/value_and_grad: ",
        "value_and_grad does not know that the optimizer leaves the base as it is, and "
        "has an accumulator for it. Differentiate only what is trained, or use "
        "train_step(microbatch_size=...).",
    ),
    (
        r"(memory|scheduled)/\w+/lion/cpu/",
        "Lion's update and its new moments both read the old moments, and XLA:CPU "
        "copies those before it has an order for the two.",
    ),
    (
        r"copies/\w+_bf16/adamw/cpu/",
        "Moments in bfloat16: the update reads them before they are rounded, and so do "
        "the new moments, so that XLA:CPU copies the old ones. It takes no more memory "
        "than the peer, which rounds the mean gradient and the moments first.",
    ),
    (
        r"memory/(mlp_weighted|narrow)/.*/value_and_grad: ",
        "The rows of one microbatch: accumax takes every k-th row, so that a sharded "
        "batch stays where it is, and copies them; the peer reads a block of rows.",
    ),
    (
        r"memory/head/.*/gpu/(train_step|apply_gradients): ",
        "XLA:GPU adds the gradient of the one large matrix to its sum within the "
        "product only if the sum is an argument of the program or of a loop, and the "
        "reset of a window makes it neither. Microbatches within a call have it in a "
        "loop: see value_and_grad. Good to know in the documentation has two ways.",
    ),
    (
        r"(memory|copies)/resnet/.*/gpu/",
        f"{_RESNET} In the peer's program it copies the moments instead, as "
        "accumax.audit shows.",
    ),
    (
        r"(memory/mlp/muon|copies/transformer/adafactor)/gpu/(train_|apply_)",
        "The optimizer transposes matrices. XLA gives the carry of the loop at the "
        "boundary the transposed layout, and copies before and behind it, in every "
        "call. jax.experimental.layout.with_layout_constraint in the loop avoids it on "
        "one device (a perceptron with Muon on GPU: 5.72 to 5.35 x parameters, a "
        "transformer with Adafactor: 2.50 to 2.33), but XLA gathers sharded arrays "
        "there, and a trace does not always know whether they are.",
    ),
    (
        r"(memory|scheduled)/mlp/muon/tpu/(train_step|apply_gradients): ",
        "The optimizer transposes matrices, so that XLA copies the carry of the loop "
        "at the boundary, as on a GPU. Format(Layout.AUTO) for parameters and state "
        "avoids it: see What it costs in the documentation.",
    ),
    (
        r"memory/transformer\w*/\w+/gpu/apply_gradients: ",
        "XLA:GPU makes the zeros that the gradient of the embedding is scattered into "
        "before the loop over the layers; in the peer's program, behind it.",
    ),
    (
        r"copies/lora/\w+/gpu/",
        "Within the fusion that reads a layer of the accumulator, in the layout of the "
        "product: of one layer, and no pass over memory of its own.",
    ),
    (
        r"(memory|scheduled)/mlp/(sgd|lion)/tpu/",
        "1 to 4 %: where XLA:TPU puts the matrices that it fetches ahead. What is "
        "alive at once is the same to 1 %, by accumax.audit (train_step, Lion: "
        "1,548.5 MiB, the peer 1,549.8; SGD: 1,046 and 1,038).",
    ),
    (
        r"memory/mlp/(adamw|adafactor)/tpu/",
        "1 to 3 %: what XLA:TPU keeps in vector memory, which is not counted. Without "
        "that memory the peer takes as much or more (accumulate: temp 1.00, MultiSteps "
        "1.05; Adafactor within a call 1.55 and 1.55).",
    ),
    (
        r"memory/mlp_weighted/\w+/tpu/train_step: ",
        "Both passes of a weighted loss are in a loop, for which XLA:TPU copies the "
        "rows once: here half the size of the parameters.",
    ),
    (
        r"memory/mlp_weighted/\w+/tpu/apply_gradients: ",
        "What XLA:TPU keeps in vector memory, which is not counted. With nearly none "
        "of that memory it takes 1.001 times the floor, and MultiSteps 1.005.",
    ),
    (
        r"memory/lstm/\w+/tpu/",
        "What XLA:TPU keeps in vector memory, which is not counted. With nearly none "
        "of that memory, train_step takes 1.02 times the floor and MultiSteps 1.07; in "
        "microbatches, 1.10 and microbatching 1.15.",
    ),
    (
        r"memory/(mlp\w*|leaves)/(sgd|adafactor|adamw)/gpu/",
        "Less than 1 %: buffers of the size of one array, which XLA:GPU shares with "
        "others or not.",
    ),
    (
        r"time/leaves/",
        "256 arrays of 1 KB: each passes through the loops that reset, divide and "
        "update in place, which probably costs what is seen. Larger arrays do not "
        "notice it.",
    ),
    (
        r"memory/\w+/(adafactor|muon)/cpu/(train_step|apply_gradients): ",
        "By default XLA:CPU arranges a program so that much of it can run at a time: "
        "the optimizer's update of all parameters, and what that needs. Arranged for "
        "the least memory, accumax takes less: see the rows scheduled/.",
    ),
    (
        r"error/equal/",
        "Rounding: microbatches have other rows (i, k + i, ..., as in microbatching), "
        "so that sums have another order. All are below the big batch's own error.",
    ),
    (
        r"host/.*: (multisteps|aggregating|keras)",
        "accumax's state has more scalars (weights, counts, flags), each of which is "
        "an argument and a result of the call.",
    ),
    (
        r"(trace|compile)/",
        "Once a program: accumax traces the loss to see where its gradients may be "
        "added in place, and compiles both a call that holds and one that updates.",
    ),
    (
        r".*: apply_every",
        "apply_every has no boundary: the optimizer runs in every call, so that its "
        "moments, its count and its decay are not the big batch's.",
    ),
]


# A pattern of a row that is above the floor, and the cause.
CAUSES_ABOVE = [
    (r"memory/narrow/.*/tpu/", _NARROW),
    (
        r"memory/.*/(apply_gradients|accumulate)",
        "It is handed a gradient tree, as large as the parameters. The floor has none.",
    ),
    (r"memory/resnet/", _RESNET),
    (
        r"memory/narrow/.*/value_and_grad",
        "The rows of one microbatch, which are copied out of the batch: the floor has "
        "them as an argument.",
    ),
    (
        r"memory/leaves/",
        "256 arrays of 1 KB: scalars count here, and buffers as large as one array.",
    ),
    (
        r"memory/\w+/muon/.*/(value_and_grad|train_step_divided)",
        "Muon multiplies matrices by matrices: a step without accumulation takes as "
        "much, see the row none.",
    ),
    (
        r"memory/(\w+/muon|transformer/adafactor)/(gpu|tpu)/train_step",
        "The optimizer's own work on whole matrices, and their layout in the loop at "
        "the boundary: XLA copies them before and behind it.",
    ),
    (
        r"memory/.*/tpu/(value_and_grad|train_step_divided)",
        "XLA:TPU computes in bfloat16 and casts weights ahead of the loop over "
        "microbatches, as for a scan by hand: all of layers one by one, and the head. "
        "With unroll=True there is no loop (a perceptron with SGD: 1.26 to 1.07).",
    ),
    (
        r"memory/.*/tpu/",
        "XLA:TPU keeps in vector memory, which is not counted, the logits in the "
        "floor's program and a sum of gradients in this one: see the rows scheduled/.",
    ),
    (
        r"memory/.*/cpu/",
        "By default XLA:CPU arranges a program so that much of it can run at a time. "
        "Arranged for the least memory it takes less: see the rows scheduled/.",
    ),
]


def explained(rows: Sequence[Row]) -> list[Row]:
    """The rows, with a note on each of ours that a peer or the floor is ahead of."""
    by_name = {row.name: row for row in rows}
    found = []
    for row in rows:
        ahead = None if row.note else _ahead(row, by_name)
        if ahead is not None:
            note = f"{_form(ahead)} has {ahead.value:.3g}. {_cause(row, ahead)}"
            row = dataclasses.replace(row, note=note)
        elif _is_above(row):
            row = dataclasses.replace(row, note=_first(CAUSES_ABOVE, row.name))
        found.append(row)
    return found


def _is_above(row: Row) -> bool:
    group, form = row.name.partition("/")[0], _form(row)
    if row.note or row.value is None or group != "memory" or form not in COMPETES:
        return False
    return row.value > ABOVE


def _form(row: Row) -> str:
    return row.name.rpartition("/")[2]


def _ahead(row: Row, by_name: dict[str, Row]) -> Row | None:
    """The best of the peers' rows, if it is better than ours."""
    group = row.name.partition("/")[0]
    case, _, form = row.name.rpartition("/")
    if row.value is None or group not in TOLERANCES or form not in COMPETES:
        return None
    others = [by_name.get(f"{case}/{peer}") for peer in COMPETES[form]]
    known = [(x.value, x) for x in others if x is not None and x.value is not None]
    limit = row.value * (1 - TOLERANCES[group])
    ahead = [(value, x) for value, x in known if value < limit]
    # One that makes the same update, if there is one.
    ahead.sort(key=lambda pair: (_form(pair[1]) == "apply_every", pair[0]))
    return ahead[0][1] if ahead else None


def _cause(row: Row, ahead: Row) -> str:
    return _first(CAUSES, f"{row.name}: {_form(ahead)}")


def _first(causes: Sequence[tuple[str, str]], what: str) -> str:
    for pattern, cause in causes:
        if re.match(pattern, what):
            return cause
    return "Why is not known yet."
