"""Does accumulation take less memory than none? MaxText issue 5039, by its method.

    python benchmarks/maxtext_5039.py           # eight of this machine's CPU
    python benchmarks/maxtext_5039.py gpu       # eight H100 that need not be there
    python benchmarks/maxtext_5039.py tpu       # eight TPU v5e that need not be there

The issue reports 113.8 MiB for a step without accumulation and 165.9 MiB for one with
two microbatches, on a v5e-8: 4 layers, embedding 512, vocabulary 32k, sequence 512. It
is the temporary memory of a device for one batch, which the step divides or does not.
Here are a transformer of that size and AdamW, of which each device has whole parameters
("replicated") or a part ("FSDP"); with "shard_optimizer", windows of as many calls.
"""

import argparse
from typing import Any

import devices
import forms
import jax
import jax.numpy as jnp
import numpy as np
import report
import transformer
from collectives import AXIS, Case, Model, by_longest, every
from devices import CHIPS
from forms import Form
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import accumax

MIB = 2**20
SIZE = transformer.Size(4, 512, 8, 32768, 512)


def model_of(rows: int) -> Model:
    """A transformer, and a batch of so many rows on all devices."""
    batch = jax.ShapeDtypeStruct((rows, SIZE.length + 1), jnp.int32)

    def loss(params: Any, batch: Any) -> jax.Array:
        return transformer.loss(SIZE, params, batch)

    return Model(loss, transformer.shapes(SIZE), lambda _: batch)


def cases(model: Model, mesh: Mesh) -> dict[str, Case]:
    """The forms of a step on one batch, by their names."""
    divided, found = by_longest(model.params, mesh), {}
    for name, params, over in (
        ("replicated", P(), accumax.DataParallel(AXIS, mesh=mesh)),
        ("FSDP", divided, accumax.FSDP(AXIS, divided, mesh=mesh)),
    ):
        for parts in (1, 2):
            gradient = jax.value_and_grad(model.loss)
            if parts > 1:
                gradient = accumax.value_and_grad(
                    model.loss, microbatches=parts, reduce_axis=over
                )
            form = forms.whole(forms.applied(forms.ADAMW), gradient)
            found[f"{name}, {parts}"] = Case(form, params=params)
    return found


def window(model: Model, mesh: Mesh) -> dict[str, Case]:
    """Two calls, with one half of the batch each."""
    over = accumax.DataParallel(AXIS, shard_optimizer=True, mesh=mesh)
    tx = accumax.accumulate(forms.ADAMW, 2, reduce_axis=over)
    form = Form(accumax.train_step(model.loss, tx), tx.init)
    return {"shard_optimizer, 2 calls": Case(form, 2, apart=over)}


def rows_of(mesh: Mesh, each: int) -> dict[str, tuple[float, float]]:
    """MiB of a device, arguments and temp, for a batch of `each` rows on each."""
    whole, half = (model_of(n * mesh.size) for n in (each, each // 2))
    found = every(cases(whole, mesh), whole, mesh)
    found |= every(window(half, mesh), half, mesh)
    return {
        name: (f.arguments * f.unit / MIB, f.temp * f.unit / MIB)
        for name, f in found.items()
    }


def ratios(found: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Arguments and temp, over those of one microbatch with the same parameters."""
    return {
        name: sum(x) / sum(one)
        for name, x in found.items()
        if (one := found.get(f"{name.split(',')[0]}, 1")) and one is not x
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    parser.add_argument("--rows", type=int, default=8, help="on each device")
    args = parser.parse_args()
    target = args.target
    mesh = Mesh(np.array(devices.devices(target)), (AXIS,))
    chip = CHIPS.get(target, "CPU")
    report.header("MaxText issue 5039, compiled", f"8 x {chip} (on {report.host()})")
    found = rows_of(mesh, args.rows)
    report.table(
        f"MiB of a device, {args.rows} rows on each",
        ["parameters, microbatches", "arguments", "temp", "both"],
        [
            [name, f"{a:.1f}", f"{t:.1f}", f"{a + t:.1f}"]
            for name, (a, t) in found.items()
        ],
    )
    report.bars(
        [
            (f"{name}: arguments and temp, over one microbatch", x, 1.0)
            for name, x in ratios(found).items()
        ]
    )


if __name__ == "__main__":
    main()
