"""Memory, copies and compile time on CPU, GPU and TPU. It compiles, and runs nothing.

    python benchmarks/targets.py            # this machine's CPU
    python benchmarks/targets.py gpu        # an H100 that need not be there
    python benchmarks/targets.py tpu        # a TPU v5e that need not be there
    python benchmarks/targets.py cpu --size 4,256,4,1024,64     # a smaller model
    python benchmarks/run.py --target gpu --only memory  # unlike models, all forms

Memory is in units of the parameters. "copies" counts the copies and transpositions in
the compiled program, wherever they stand in it (in a loop: once), whose result has the
shape of a parameter matrix or of one layer of it, in any order of the dimensions. The
12 below are slices that the scan over layers takes and puts back, with and without
accumulation. "moves" are between the memories of a TPU: arrays that are read
or written by way of its vector memory. Compile times are for lowering and compilation,
in seconds and in processor seconds, which other work on the machine disturbs less;
ratio and bar are of those.

    accumax, compiled, 2026-11-26, jax 0.10.2, optax 0.2.8, accumax 0.1.0
    H100 80GB (compiled on AMD EPYC x 2, load 1.5)

    Train step of a transformer, 671 MB
                                 args   temp    sum  /plain  /MultiSteps  copies  moves
    plain AdamW                 3.000  1.175  4.175   1.000        0.801      12      0
    optax.MultiSteps            4.000  1.209  5.209   1.248        1.000      12      0
    accumulate                  4.000  1.209  5.209   1.248        1.000      12      0
    apply_gradients             4.000  1.209  5.209   1.248        1.000      12      0
    train_step                  4.000  0.234  4.234   1.014        0.813      12      0
    train_step(in_place=False)  4.000  1.209  5.209   1.248        1.000      12      0
    train_step(weighted=True)   4.000  0.234  4.234   1.014        0.813      12      0
"""

import argparse
import functools

import devices
import forms
import info_nce
import jax
import jax.numpy as jnp
import losses
import report
import transformer
from devices import CHIPS, Device
from forms import EVERY
from programs import Compiled, compiled, compiled_in_turns
from programs import copies as copies


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


def divided_memory(size: transformer.Size, on: Device) -> dict[str, Compiled]:
    """The plain step on one microbatch, and steps that divide a call into eight."""
    loss = functools.partial(transformer.loss, size)
    weighted_loss = functools.partial(transformer.weighted_loss, size)
    plain = forms.train_steps(loss)[forms.PLAIN]
    params = transformer.shapes(size)

    def on_rows(form: forms.Form, microbatches: int) -> Compiled:
        shape = (microbatches * size.rows, size.length + 1)
        return compiled(form, params, jax.ShapeDtypeStruct(shape, jnp.int32), on)

    steps = forms.divided_steps(loss, weighted_loss, size.rows)
    return {forms.ONE: on_rows(plain, 1)} | {
        name: on_rows(form, EVERY) for name, form in steps.items()
    }


def print_memory(
    title: str, found: dict[str, Compiled], baselines: dict[str, str]
) -> None:
    """`baselines`: what the sums are divided by, under the heads of those columns."""
    report.table(
        title,
        ["", "args", "temp", "sum", *baselines, "copies", "moves"],
        [
            [name]
            + [f"{x:.3f}" for x in (c.arguments, c.temp, c.total)]
            + [f"{c.total / found[form].total:.3f}" for form in baselines.values()]
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


def across_calls(
    size: transformer.Size, on: Device, target: str, repeats: int
) -> list[report.Bar]:
    """Prints tables, as the next one does; gives their bars."""
    found = memory(size, on, repeats)
    leaves = jax.tree.leaves(transformer.shapes(size))
    print_memory(
        f"Train step of a transformer, {sum(p.size for p in leaves) * 4e-6:.0f} MB",
        found,
        {"/plain": forms.PLAIN, "/MultiSteps": forms.MULTISTEPS},
    )
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
    weighted = found[forms.WEIGHTED]
    fused = [forms.APPLY_GRADIENTS, forms.TRAIN_STEP, forms.WEIGHTED]
    return [
        ("memory of train_step / plain", ours.total / plain.total, 1.05),
        (
            "memory of train_step(weighted=True) / plain",
            weighted.total / plain.total,
            1.05,
        ),
        (
            "memory of accumulate / MultiSteps",
            found[forms.ACCUMULATE].total / found[forms.MULTISTEPS].total,
            0.87 if target == "cpu" else 1.01,
        ),
        (
            "copies in the fused steps of the matrices",
            optimizer[forms.APPLY_GRADIENTS].copies
            + sum(train[name].copies for name in fused),
            0,
        ),
        (
            "copies in the transformer's train steps, less the plain step's",
            max(ours.copies, weighted.copies) - plain.copies,
            0,
        ),
        ("compile time of train_step / plain", compile_ratio, 1.3),
    ]


def within_a_call(size: transformer.Size, on: Device) -> list[report.Bar]:
    found = divided_memory(size, on)
    print_memory(
        f"Train step on {EVERY} microbatches in one call, the same transformer",
        found,
        {"/plain": forms.ONE},
    )
    bars = [
        (f"memory of {name} / plain", found[name].total / found[forms.ONE].total, 1.08)
        for name in (forms.VALUE_AND_GRAD, forms.WEIGHTED_GRADIENT, forms.DIVIDED)
    ]
    bars += losses.table(size.width, on)
    return bars + info_nce.table(size.width // 2, on)


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

    bars = across_calls(size, on, args.target, args.repeats)
    report.bars(bars + within_a_call(size, on))


if __name__ == "__main__":
    main()
