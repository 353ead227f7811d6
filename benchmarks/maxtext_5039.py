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
from devices import CHIPS
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import accumax
from accumax._devices.reduce_axis import check_window_axis

AXIS, MIB = "data", 2**20
SIZE = transformer.Size(4, 512, 8, 32768, 512)


def specs_of(params: Any, count: int) -> Any:
    """How FSDP divides parameters: along their longest dimension."""

    def spec(p: Any) -> P:
        longest = p.shape.index(max(p.shape))
        cut = [AXIS if i == longest else None for i in range(len(p.shape))]
        return P() if p.shape[longest] % count else P(*cut)

    return jax.tree.map(spec, params)


def compiled(
    step: Any, mesh: Mesh, state: Any, params: P | Any, state_specs: Any, rows: int
) -> tuple[float, float]:
    """MiB of a device: arguments and temp."""

    def placed(tree: Any, specs: Any) -> Any:
        specs = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, P))
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
            ),
            tree,
            specs,
        )

    batch = jax.ShapeDtypeStruct((rows, SIZE.length + 1), jnp.int32)
    given = placed(transformer.shapes(SIZE), params), placed(state, state_specs)
    kept = jax.tree.map(lambda x: x.sharding, given)
    jitted = jax.jit(
        step, donate_argnums=(0, 1), keep_unused=True, out_shardings=(*kept, None)
    )
    memory: Any = jitted.lower(*given, placed(batch, P(AXIS))).compile()
    memory = memory.memory_analysis()
    return memory.argument_size_in_bytes / MIB, memory.temp_size_in_bytes / MIB


def rows_of(mesh: Mesh, each: int) -> dict[str, tuple[float, float]]:
    """The memory of each form, by its name, for a batch of `each` rows on a device."""
    adamw, count, shapes = forms.ADAMW, mesh.size, transformer.shapes(SIZE)

    def loss(params: Any, batch: Any) -> jax.Array:
        return transformer.loss(SIZE, params, batch)

    fsdp, rows = specs_of(shapes, count), each * count
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(fsdp), strict=True)
    alike = {p.shape: spec for p, spec in pairs}
    ordinary = jax.eval_shape(adamw.init, shapes)
    found = {}
    for name, params, over in (
        ("replicated", P(), accumax.DataParallel(AXIS, mesh=mesh)),
        ("FSDP", fsdp, accumax.FSDP(AXIS, fsdp, mesh=mesh)),
    ):
        state = jax.tree.map(
            lambda x, p=params: P() if p == P() else alike.get(x.shape, P()), ordinary
        )
        for parts in (1, 2):
            gradient = jax.value_and_grad(loss)
            if parts > 1:
                gradient = accumax.value_and_grad(
                    loss, microbatches=parts, reduce_axis=over
                )
            step = forms.whole(forms.applied(adamw), gradient).step
            found[f"{name}, {parts}"] = compiled(
                step, mesh, ordinary, params, state, rows
            )
    over = accumax.DataParallel(AXIS, shard_optimizer=True, mesh=mesh)
    tx = accumax.accumulate(adamw, 2, reduce_axis=over)
    window = jax.eval_shape(tx.init, shapes)
    zero: Any = check_window_axis(over)
    specs = jax.tree.map(lambda _: P(), window)._replace(
        acc_grads=P(AXIS),
        inner_opt_state=jax.tree.map(
            lambda x: zero.cut(x).spec, window.inner_opt_state
        ),
    )
    step = accumax.train_step(loss, tx)
    found["shard_optimizer, 2 calls"] = compiled(
        step, mesh, window, P(), specs, rows // 2
    )
    return found


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
    limits = [
        (f"{name}: both, for that of {name.split(',')[0]}, 1", sum(x) / sum(one), 1.0)
        for name, x in found.items()
        if (one := found.get(f"{name.split(',')[0]}, 1")) and one is not x
    ]
    report.bars(limits)


if __name__ == "__main__":
    main()
