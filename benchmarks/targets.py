"""Memory, copies and compile time on CPU, GPU and TPU. It compiles, and runs nothing.

    python benchmarks/targets.py            # this machine's CPU
    python benchmarks/targets.py gpu        # an H100 that need not be there
    python benchmarks/targets.py tpu        # a TPU v5e that need not be there
    python benchmarks/targets.py cpu --size 4,256,4,1024,64     # a smaller model

Memory is in units of the parameters. "copies" counts the copies and transpositions in
the compiled program, wherever they stand in it (in a loop: once), whose result has the
shape of a parameter matrix or of one layer of it, in any order of the dimensions. The
12 below are slices that the scan over layers takes and puts back, with and without
accumulation; the 13th is the transposed embedding, which the loop around a weighted
backward pass carries. "moves" are between the memories of a TPU: arrays that are read
or written by way of its vector memory. Compile times are for lowering and compilation,
in seconds and in processor seconds, which other work on the machine disturbs less;
ratio and bar are of those.

    accumax, compiled, 2026-11-21, jax 0.10.2, optax 0.2.8, accumax 0.1.0
    H100 80GB (compiled on AMD EPYC x 2, load 3.0)

    Train step of a transformer, 671 MB
                                 args   temp    sum  /plain  /MultiSteps  copies  moves
    plain AdamW                 3.000  1.175  4.175   1.000        0.801      12      0
    optax.MultiSteps            4.000  1.209  5.209   1.248        1.000      12      0
    accumulate                  4.000  1.209  5.209   1.248        1.000      12      0
    apply_gradients             4.000  1.209  5.209   1.248        1.000      12      0
    train_step                  4.000  0.234  4.234   1.014        0.813      12      0
    train_step(in_place=False)  4.000  1.209  5.209   1.248        1.000      12      0
    train_step(weighted=True)   4.000  0.388  4.388   1.051        0.842      13      0
"""

import argparse
import functools
import gc
import re
import statistics
import time
from typing import Any, NamedTuple

import devices
import forms
import jax
import jax.numpy as jnp
import report
import transformer
from devices import CHIPS, Device


class Compiled(NamedTuple):
    """A compiled step; memory in units of the parameters."""

    arguments: float
    temp: float
    results: float  # those that do not reuse the memory of a donated argument
    copies: int
    moves: int
    seconds: float
    processor: float  # seconds of work, in all threads

    @property
    def total(self) -> float:
        return self.arguments + self.temp + self.results


def compiled(form: forms.Form, params: Any, x: Any, on: Device) -> Compiled:
    sharding = jax.sharding.SingleDeviceSharding(on)

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    state = jax.eval_shape(form.init, params)
    jax.clear_caches()  # else a form would profit from what another one has traced
    gc.collect()
    start, work = time.perf_counter(), time.process_time()
    step = jax.jit(form.step, donate_argnums=(0, 1))
    step = step.lower(place(params), place(state), place(x)).compile()
    seconds, work = time.perf_counter() - start, time.process_time() - work
    memory: Any = step.memory_analysis()
    unit = sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params))
    return Compiled(
        memory.argument_size_in_bytes / unit,
        memory.temp_size_in_bytes / unit,
        (memory.output_size_in_bytes - memory.alias_size_in_bytes) / unit,
        *copies(step.as_text() or "", params),
        seconds,
        work,
    )


def compiled_in_turns(
    steps: dict[str, forms.Form], params: Any, x: Any, on: Device, turns: int
) -> dict[str, Compiled]:
    """Each step compiled `turns` times; the times are medians."""
    found = [
        {name: compiled(form, params, x, on) for name, form in steps.items()}
        for _ in range(turns)
    ]

    def median(name: str) -> Compiled:
        return found[0][name]._replace(
            seconds=statistics.median(turn[name].seconds for turn in found),
            processor=statistics.median(turn[name].processor for turn in found),
        )

    return {name: median(name) for name in steps}


def copies(text: str, params: Any) -> tuple[int, int]:
    """Copies of a parameter's size, and moves of one between two memories, in HLO.

    A copy counts wherever it stands: by itself, in a fusion, in a loop. XLA:GPU writes
    some as a transposition. `copy-start` gives (destination, source, context); on the
    TPU target the two are in different memories: S(1) is the vector memory.
    """
    shapes = {_dims(s) for p in jax.tree.leaves(params) for s in _sizes(p, params)}
    copied = moved = 0
    for result, op in re.findall(
        r" = (\(.*?\)|\S+) (copy|copy-start|transpose)\(", text
    ):
        arrays = re.findall(r"\w+\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?", result)
        dims = [int(d) for d in arrays[0][0].split(",") if d]
        if _dims(dims) in shapes:
            within = op != "copy-start" or arrays[0][1] == arrays[1][1]
            copied, moved = copied + within, moved + (not within)
    return copied, moved


def _sizes(p: Any, params: Any) -> list[tuple[int, ...]]:
    most = max(leaf.size for leaf in jax.tree.leaves(params))
    if p.size < most / 1000:
        return []  # scales and biases
    return [p.shape, p.shape[1:]] if len(p.shape) > 2 else [p.shape]


def _dims(shape: Any) -> tuple[int, ...]:
    return tuple(sorted(d for d in shape if d > 1))


def memory(size: transformer.Size, on: Device, repeats: int) -> dict[str, Compiled]:
    steps = forms.train_steps(
        functools.partial(transformer.loss, size),
        functools.partial(transformer.weighted_loss, size),
    )
    params = transformer.shapes(size)
    tokens = jax.ShapeDtypeStruct((size.rows, size.length + 1), jnp.int32)
    small = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    compiled(forms.applied(forms.ADAMW), small, small, on)  # loads the compiler
    timed = {name: steps[name] for name in (forms.PLAIN, forms.TRAIN_STEP)}
    others = {name: form for name, form in steps.items() if name not in timed}
    found = compiled_in_turns(others, params, tokens, on, 1)
    found |= compiled_in_turns(timed, params, tokens, on, repeats)
    return {name: found[name] for name in steps}


def print_memory(found: dict[str, Compiled], size: transformer.Size) -> None:
    plain, multisteps = found[forms.PLAIN], found[forms.MULTISTEPS]
    leaves = jax.tree.leaves(transformer.shapes(size))
    report.table(
        f"Train step of a transformer, {sum(p.size for p in leaves) * 4e-6:.0f} MB",
        ["", "args", "temp", "sum", "/plain", "/MultiSteps", "copies", "moves"],
        [
            [name]
            + [f"{x:.3f}" for x in (c.arguments, c.temp, c.total)]
            + [f"{c.total / plain.total:.3f}", f"{c.total / multisteps.total:.3f}"]
            + [f"{c.copies}", f"{c.moves}"]
            for name, c in found.items()
        ],
    )


def print_compile_times(found: dict[str, Compiled], title: str) -> float:
    """Gives the ratio of the train step's processor seconds to the plain step's."""
    plain = found[forms.PLAIN].processor
    report.table(
        title,
        ["", "seconds", "processor", "/plain"],
        [
            [
                name,
                f"{c.seconds:.1f}",
                f"{c.processor:.1f}",
                f"{c.processor / plain:.2f}",
            ]
            for name, c in found.items()
        ],
    )
    return found[forms.TRAIN_STEP].processor / plain


def print_copies(title: str, found: dict[str, Compiled]) -> None:
    report.table(
        title,
        ["", "temp", "copies", "moves"],
        [
            [name, f"{c.temp:.3f}", f"{c.copies}", f"{c.moves}"]
            for name, c in found.items()
        ],
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    parser.add_argument(
        "--size",
        default="",
        help=f"the transformer: {','.join(transformer.Size._fields)}",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="how often compilation is timed"
    )
    args = parser.parse_args(argv)
    size = transformer.Size(*(int(n) for n in args.size.split(",") if n))

    on = devices.device(args.target)
    chip = CHIPS.get(args.target, "CPU")
    report.header("accumax, compiled", f"{chip} (compiled on {report.host()})")

    found = memory(size, on, args.repeats)
    print_memory(found, size)
    compile_ratio = print_compile_times(found, "Its compilation")

    params = forms.matrices()
    optimizer = {
        name: compiled(form, params, params, on)
        for name, form in forms.optimizer_steps().items()
    }
    width = params[0].shape[0]
    what = f"{len(params)} matrices of {width} x {width}"
    print_copies(f"Optimizer step, {what}", optimizer)
    x = jax.ShapeDtypeStruct((8, width), jnp.float32)
    steps = forms.train_steps(forms.matrices_loss, forms.weighted_matrices_loss)
    train = {name: compiled(form, params, x, on) for name, form in steps.items()}
    print_copies(f"Train step, {what}", train)

    plain, ours = found[forms.PLAIN], found[forms.TRAIN_STEP]
    optax_form = found[forms.ACCUMULATE].total
    multisteps = found[forms.MULTISTEPS].total
    fused = [forms.APPLY_GRADIENTS, forms.TRAIN_STEP, forms.WEIGHTED]
    report.bars(
        [
            ("memory of train_step / plain", ours.total / plain.total, 1.05),
            (
                "memory of train_step(weighted=True) / plain",
                found[forms.WEIGHTED].total / plain.total,
                1.05,
            ),
            (
                "memory of accumulate / MultiSteps",
                optax_form / multisteps,
                0.87 if args.target == "cpu" else 1.01,
            ),
            (
                "copies in the fused steps of the matrices",
                optimizer[forms.APPLY_GRADIENTS].copies
                + sum(train[name].copies for name in fused),
                0,
            ),
            (
                "copies in the transformer's train steps, less the plain step's",
                max(ours.copies, found[forms.WEIGHTED].copies) - plain.copies,
                0,
            ),
            ("compile time of train_step / plain", compile_ratio, 1.3),
        ]
    )


if __name__ == "__main__":
    main()
