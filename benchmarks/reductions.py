"""How often devices reduce a gradient in a window, as rows, one JSON a line.

    python benchmarks/reductions.py            # eight of this machine's CPU
    python benchmarks/reductions.py gpu        # or tpu: eight that need not be there

`run.py` starts it: it needs a process of its own, because with eight CPU devices every
other figure would be another. The programs are those of `collectives.py`.
"""

import argparse
import dataclasses
import functools
import json
from typing import Any

import collectives
import devices
import forms
import jax
import jax.numpy as jnp
import numpy as np
import transformer
from collectives import AUTO, Case, Model
from devices import CHIPS
from exchanges import REDUCTIONS
from jax.sharding import Mesh
from results import Row

NAMES = {
    AUTO: "value_and_grad_without_reduce_axis",
    forms.MICROBATCHING: "microbatching",
    collectives.REDUCED: "value_and_grad",
    forms.MULTISTEPS: "multisteps",
    forms.TRAIN_STEP: "train_step_without_reduce_axis",
    collectives.PLAIN: "train_step",
    collectives.APART: "train_step_and_accumulate",
}
GROWN = "scan", collectives.REDUCED, forms.MULTISTEPS, collectives.APART


def scanned(model: Model, rows: int) -> forms.Gradient:
    """A scan by hand that keeps each row on its device.

    `reshape(count, rows)` of a batch that is sharded along its rows would have every
    device compute everything.
    """
    gradient = jax.value_and_grad(model.loss)

    def fun(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        split = batch.reshape(rows, -1, *batch.shape[1:]).swapaxes(0, 1)

        def body(sums: Any, microbatch: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(params, microbatch)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(body, zeros, split)
        return jax.tree.map(lambda x: x / len(split), sums)

    return fun


def cases(model: Model, mesh: Mesh) -> dict[str, Case]:
    """With a scan by hand beside those of `collectives.py`."""
    gradient = scanned(model, model.rows * mesh.size)
    scan = Case(forms.whole(forms.applied(forms.ADAMW), gradient))
    within = collectives.within_a_call(model, mesh)
    return within | {"scan": scan} | collectives.across_calls(model, mesh)


def rows(target: str, size: transformer.Size, counts: list[int]) -> list[Row]:
    """`counts` of devices, the last for the reductions."""

    def batch(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, size.length + 1), jnp.int32)

    loss = functools.partial(transformer.loss, size)
    model = Model(loss, transformer.shapes(size), batch, size.rows)
    on, found = devices.devices(target), []
    for count in counts:
        mesh = Mesh(np.array(on[:count]), (collectives.AXIS,))
        chosen = cases(model, mesh)
        for name, case in chosen.items():
            if count < counts[-1] and name not in GROWN:
                continue
            step = collectives.compiled(case, model, mesh)
            form = NAMES.get(name, name)
            at = f"{count}/{target}/{form}"
            if len(counts) > 1 and name in GROWN:
                found += [
                    Row(f"grows/devices_memory/{at}", step.total, "x parameters"),
                    Row(f"grows/devices_sent/{at}", step.wire() / 1e6, "MB a window"),
                ]
            if count == counts[-1]:
                volume = step.volume(REDUCTIONS)
                case_name = f"reductions/transformer/{target}/{form}"
                found.append(Row(case_name, volume, "gradients a window"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    parser.add_argument("--size", default="4,256,4,1024,64", help="of the transformer")
    parser.add_argument("--counts", default="1,2,4,8", help="of devices")
    args = parser.parse_args()
    counts = [int(n) for n in args.counts.split(",")]
    size = transformer.Size(*(int(n) for n in args.size.split(",")))
    for row in rows(args.target, size, counts):
        print(json.dumps(dataclasses.asdict(row)), flush=True)


if __name__ == "__main__":
    main()
