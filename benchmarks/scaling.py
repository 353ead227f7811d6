"""What more devices would send, on paper: up to 4,096, at other speeds of their links.

It compiles the programs of `collectives.py` for eight devices, and runs nothing.

    python benchmarks/scaling.py        # eight of this machine's CPU, links of H100s
    python benchmarks/scaling.py gpu    # eight H100 that need not be there
    python benchmarks/scaling.py tpu    # eight TPU v5e that need not be there
    python benchmarks/scaling.py cpu --size 4,256,4,1024,64     # a smaller model

A window has eight microbatches, in one call or in eight. What a program for eight
devices executes is taken for what one for more would; the bytes are those of rings, in
the islands that fast links connect and then between them, at what vendors state.
Nothing overlaps.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import report
from collectives import (
    APART,
    AUTO,
    AXIS,
    REDUCED,
    STEP,
    ZERO,
    across_calls,
    every,
    setting,
    sharded,
    within_a_call,
)
from exchanges import Collective, Found
from forms import EVERY
from jax.sharding import Mesh


class Links(NamedTuple):
    """What connects the devices of a cluster; bytes a second that a device can send.

    Attributes:
      what: what they are.
      island: the devices that the fast links connect.
      fast, slow: within an island, and from one to another.
    """

    what: str
    island: int
    fast: float
    slow: float

    def seconds(self, x: Collective, count: int) -> float:
        """For one execution by `count` devices: in the islands, then between them."""
        inner = min(count, self.island)
        outer = count // inner
        return x.wire(inner) / self.fast + x.wire(outer) / inner / self.slow


class Chip(NamedTuple):
    """On paper: what the vendors state, of which real ones reach less.

    Attributes:
      flops: a second, in bfloat16, the peak.
      links: by name.
    """

    flops: float
    links: dict[str, Links]


NVLINK = "NVLink 450 GB/s, between nodes of 8"
PAPER = {
    "gpu": Chip(
        989e12,
        {
            "infiniband": Links(f"{NVLINK} InfiniBand 50 GB/s a GPU", 8, 450e9, 50e9),
            "ethernet": Links(
                f"{NVLINK} Ethernet 12.5 GB/s a node", 8, 450e9, 12.5e9 / 8
            ),
        },
    ),
    "tpu": Chip(
        197e12,
        {
            "ici": Links(
                "ICI 90 GB/s, between pods of 256 a network of 3.1 GB/s a chip",
                256,
                90e9,
                3.1e9,
            )
        },
    ),
}
DEVICES = (8, 64, 512, 4096)
TOKENS = 4096  # of a microbatch, on each device
REACHED = 0.4  # of the peak


def computing(step: Found, target: str) -> float:
    """Milliseconds that a window computes for."""
    chip, parameters = PAPER["gpu" if target == "cpu" else target], step.unit / 4
    # Forward, backward, and forward once more for the rematerialisation.
    return 1e3 * 8 * parameters * TOKENS * EVERY / (chip.flops * REACHED)


def sending(step: Found, count: int, links: Links) -> float:
    """Milliseconds in which one of `count` devices sends what it does in a window."""
    return 1e3 * sum(links.seconds(x, count) * step.times(x) for x in step.each)


def print_scaling(found: dict[str, Found], target: str) -> None:
    """The counts of the programs for eight devices, at other numbers of them."""
    counts = [f"{n:,}" for n in DEVICES]

    def by_count(title: str, of: Callable[[Found, int], float], digits: int) -> None:
        rows = [
            [name, *(f"{of(f, n):,.{digits}f}" for n in DEVICES)]
            for name, f in found.items()
        ]
        report.table(title, ["", *counts], rows)

    by_count("MB sent in a window, by devices", lambda f, n: f.wire(n) / 1e6, 0)
    chip = PAPER["gpu" if target == "cpu" else target]
    computed = computing(next(iter(found.values())), target)
    print(
        f"\nA window computes for {computed:.0f} ms: {TOKENS:,} tokens in a "
        f"microbatch, {REACHED:.0%} of {chip.flops / 1e12:.0f} TFLOP/s."
    )
    for links in chip.links.values():

        def sent(f: Found, n: int, links: Links = links) -> float:
            return sending(f, n, links)

        by_count(f"ms to send it; {links.what}", sent, 1)
        by_count(
            "Tokens in a microbatch below which to send takes longer than to compute",
            lambda f, n, sent=sent: TOKENS * sent(f, n) / computed,
            0,
        )


def memory(f: Found, name: str, here: int, count: int) -> float:
    """Arguments and temp of one of `count` devices, from those of one of `here`.

    Of the arguments, AdamW's two moments are divided in ZeRO-1, and all in FSDP.
    """
    divided = 2 / here if ZERO in name else f.arguments if "sharded" in name else 0.0
    return f.total - divided + divided * here / count


def main(argv: list[str] | None = None) -> None:
    target, model, on = setting(__doc__, argv)
    mesh = Mesh(np.array(on), (AXIS,))
    whole = within_a_call(model, mesh)
    whole = {name: case for name, case in whole.items() if name in (AUTO, REDUCED)}
    parts = {f"sharded: {k}": case for k, case in sharded(model, mesh, 1).items()}
    calls = across_calls(model, mesh)
    calls = {f"8 calls: {k}": calls[k] for k in (STEP, APART, ZERO)}
    found = every(whole | calls | parts, model, mesh)
    print_scaling(found, target)
    report.table(
        "Memory of a device, in parameters, by devices that divide it",
        ["", *(f"{n:,}" for n in DEVICES)],
        [
            [name, *(f"{memory(f, name, mesh.size, n):.2f}" for n in DEVICES)]
            for name, f in found.items()
        ],
    )


if __name__ == "__main__":
    main()
