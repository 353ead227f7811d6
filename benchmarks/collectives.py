"""What several devices cost: memory, reductions and bytes on the wire, on CPU, GPU and
TPU. It compiles for eight devices, and runs nothing.

    python benchmarks/collectives.py            # eight of this machine's CPU
    python benchmarks/collectives.py gpu        # eight H100 that need not be there
    python benchmarks/collectives.py tpu        # eight TPU v5e that need not be there
    python benchmarks/collectives.py cpu --size 4,256,4,1024,64     # a smaller model

Memory is that of one device, in units of the parameters. The rest is for a window, of
one call with eight microbatches or of eight calls. "loop", "boundary" and "outside":
how often the gradient is reduced in a loop (over microbatches, or over the layers), in
what runs at most once in a window, and elsewhere; "reduced": in all. "ops": in how many
reductions; XLA joins and splits them. "MB": what a device sends, in rings. "gathered":
how often the parameters are, or rows instead. "moves": other exchanges. Forms without
reduce_axis are under automatic sharding, which reduces the gradient of a tied embedding
twice. The state of train_step(reduce_axis) is that of a plain accumulate, the same on
all devices, or sharded as the parameters; accumulate(reduce_axis) keeps their sums
apart until the window closes. accumulate(shard_optimizer) divides the optimizer's state
over the devices, too. "no accumulation": each call has one microbatch and an update.

    accumax, compiled, 2026-11-26, jax 0.10.2, optax 0.2.8, accumax 0.1.0
    8 x H100 80GB (compiled on AMD EPYC x 2)

    a transformer of 671 MB, 8 microbatches in one call
                                  args   temp    sum  /one device
    automatic sharding           3.000  2.203  5.203        1.217
    optax.microbatching          3.000  2.209  5.209        1.219
    value_and_grad(reduce_axis)  3.000  1.275  4.275        1.000
    one device                   3.000  1.275  4.275        1.000

    What it sends
                                  loop  boundary  outside  ops     MB  gathered  moves
    automatic sharding           8.800     0.000    0.000   48  10336     0.000      0
    optax.microbatching          8.800     0.000    0.000  208  10336     0.000      0
    value_and_grad(reduce_axis)  0.000     0.000    1.000    5   1175     0.000      0

    The same, a window of 8 calls
                                  args   temp    sum  /one device
    no accumulation              3.000  1.222  4.222        0.997
    optax.MultiSteps             4.000  1.209  5.209        1.230
    train_step                   4.000  1.203  5.203        1.229
    train_step(reduce_axis)      4.000  0.303  4.303        1.016
    accumulate(reduce_axis)      4.000  0.241  4.241        1.001
    accumulate(shard_optimizer)  2.250  0.241  2.491        0.588
    one device                   4.000  0.234  4.234        1.000

    What it sends
                                  loop  boundary  outside  ops     MB  gathered  moves
    no accumulation              7.200     0.000    1.600  208  10336     0.000      0
    optax.MultiSteps             7.200     0.000    1.600  208  10336     0.000      0
    train_step                   0.000     0.000    8.800   48  10336     0.000      0
    train_step(reduce_axis)      0.000     0.000    8.000   40   9397     0.000      0
    accumulate(reduce_axis)      0.000     1.000    0.000    5   1175     0.000      0
    accumulate(shard_optimizer)  0.000     1.000    0.000   46   1175     1.000      0

    Sharded: a transformer of 671 MB, 8 microbatches in one call
    gather, reduce       args   temp    sum  gathered  reduced    loop     MB  moves
    automatic sharding  0.375  0.513  0.888    15.401   10.000  10.000  18265    480
    FSDP                0.375  0.513  0.888    15.401   10.000  10.000  18265    480
    FSDP(once=True)     0.375  2.300  2.675     1.000    1.000   0.000   1175      0

    Sharded: a transformer of 671 MB, a window of 8 calls
    gather, reduce       args   temp    sum  gathered  reduced   loop     MB  moves
    automatic sharding  0.500  0.388  0.888    15.401   10.000  9.600  18265    480
    FSDP                0.500  0.388  0.888    15.401   10.000  9.600  18265    480
    FSDP(once=True)     0.500  2.094  2.594     8.000    8.000  0.000   9397      0

    Sharded: 16 matrices of 1024 x 1024, not scanned, 8 microbatches in one call
    gather, reduce       args   temp    sum  gathered  reduced   loop   MB  moves
    automatic sharding  0.500  1.453  1.953     8.000    8.000  8.000  940      0
    FSDP                0.500  1.453  1.953     8.000    8.000  8.000  940      0
    FSDP(once=True)     0.500  2.547  3.047     1.000    1.000  0.000  117      0

    Sharded: 16 matrices of 1024 x 1024, not scanned, a window of 8 calls
    gather, reduce       args   temp    sum  gathered  reduced   loop   MB  moves
    automatic sharding  0.516  1.313  1.828     8.000    8.000  0.000  940      0
    FSDP                0.516  1.313  1.828     8.000    8.000  0.000  940      0
    FSDP(once=True)     0.516  1.313  1.828     8.000    8.000  0.000  940      0
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import devices
import exchanges
import forms
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
import transformer
from devices import CHIPS
from exchanges import GATHERS, MOVES, REDUCTIONS, Found
from forms import ADAMW, EVERY, Form
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import bytes_of

import accumax
from accumax._devices.reduce_axis import check_window_axis


class Case(NamedTuple):
    """A step to be compiled.

    Attributes:
      form: the step.
      calls: in a window. A call has EVERY microbatches where a window is one call.
      apart: the devices that have a sum each in `acc_grads`, and perhaps a part of the
        optimizer's state each; None if the state is an ordinary one.
      params: how parameters are sharded; the optimizer's moments are sharded alike.
    """

    form: Form
    calls: int = 1
    apart: accumax.DataParallel | None = None
    params: Any = P()


class Model(NamedTuple):
    """What is trained.

    Attributes:
      loss: `(params, batch) -> () float`.
      params: their shapes.
      batch: the shape of one, from its number of rows.
      rows: of a microbatch, on each device.
    """

    loss: Callable[..., Any]
    params: Any
    batch: Callable[[int], jax.ShapeDtypeStruct]
    rows: int = 1

    @property
    def megabytes(self) -> float:
        return sum(p.size for p in jax.tree.leaves(self.params)) * 4e-6


AXIS = "data"
ONE = "one device"
AUTO = "automatic sharding"
REDUCED = "value_and_grad(reduce_axis)"
PLAIN = "train_step(reduce_axis)"
APART = "accumulate(reduce_axis)"
ZERO = "accumulate(shard_optimizer)"
STEP = "no accumulation"
LAYERS, ONCE = "FSDP", "FSDP(once=True)"
BARRED = REDUCED, PLAIN, APART
PLACES: Any = ("loop",), ("boundary", "branch"), ("outside",)
MATRICES = 16, 1024, 256  # and the rows of a microbatch, on each device


def model_of(size: transformer.Size) -> Model:
    """A transformer."""

    def batch(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, size.length + 1), jnp.int32)

    loss = functools.partial(transformer.loss, size)
    return Model(loss, transformer.shapes(size), batch, size.rows)


def one_call(model: Model) -> Case:
    """EVERY microbatches in one call, on one device."""
    gradient = accumax.value_and_grad(model.loss, microbatch_size=model.rows)
    return Case(forms.whole(forms.applied(ADAMW), gradient))


def one_window(model: Model) -> Case:
    """A window of EVERY calls, on one device."""
    tx = accumax.accumulate(ADAMW, EVERY)
    return Case(Form(accumax.train_step(model.loss, tx), tx.init), EVERY)


def within_a_call(model: Model, mesh: Mesh) -> dict[str, Case]:
    """EVERY microbatches in one call, which is the window."""
    loss, whole = model.loss, model.rows * mesh.size

    def applied(gradient: forms.Gradient) -> Case:
        return Case(forms.whole(forms.applied(ADAMW), gradient))

    devices = accumax.DataParallel(AXIS, mesh=mesh)
    found = {AUTO: applied(accumax.value_and_grad(loss, microbatch_size=whole))}
    if hasattr(optax, "microbatching"):  # Optax 0.2.5 has none
        found[forms.MICROBATCHING] = applied(
            forms.peer(jax.value_and_grad(loss), whole)
        )
    found[REDUCED] = applied(
        accumax.value_and_grad(loss, microbatch_size=whole, reduce_axis=devices)
    )
    return found


def across_calls(model: Model, mesh: Mesh) -> dict[str, Case]:
    """A window of EVERY calls."""
    loss, multi = model.loss, optax.MultiSteps(ADAMW, EVERY).gradient_transformation()
    alone = accumax.accumulate(ADAMW, EVERY)
    devices = accumax.DataParallel(AXIS, mesh=mesh)
    zero = accumax.DataParallel(AXIS, shard_optimizer=True, mesh=mesh)

    def across(devices: accumax.DataParallel) -> Case:
        tx = accumax.accumulate(ADAMW, EVERY, reduce_axis=devices)
        return Case(fused(tx), EVERY, apart=devices)

    def fused(tx: optax.GradientTransformation, **options: Any) -> Form:
        return Form(accumax.train_step(loss, tx, **options), tx.init)

    gradient = jax.value_and_grad(loss)
    plain = forms.whole(forms.applied(ADAMW), gradient)
    return {
        # A batch that is one microbatch on each device.
        STEP: Case(plain, EVERY),
        forms.MULTISTEPS: Case(forms.whole(forms.applied(multi), gradient), EVERY),
        forms.TRAIN_STEP: Case(fused(alone), EVERY),
        PLAIN: Case(fused(alone, reduce_axis=devices), EVERY),
        APART: across(devices),
        ZERO: across(zero),
    }


def by_longest(params: Any, mesh: Mesh) -> Any:
    """Divides each parameter along its longest dimension, if the devices divide it."""

    def spec(p: Any) -> P:
        longest = p.shape.index(max(p.shape))
        cut = [AXIS if i == longest else None for i in range(len(p.shape))]
        return P() if p.shape[longest] % mesh.size else P(*cut)

    return jax.tree.map(spec, params)


def sharded(model: Model, mesh: Mesh, calls: int) -> dict[str, Case]:
    """Parameters and optimizer state divided over the devices, in a window of `calls`,
    one or EVERY."""
    specs = by_longest(model.params, mesh)

    def applied(**options: Any) -> Case:
        if calls > 1:
            tx = accumax.accumulate(ADAMW, calls)
            step = accumax.train_step(model.loss, tx, **options)
            return Case(Form(step, tx.init), calls, params=specs)
        gradient = accumax.value_and_grad(
            model.loss, microbatch_size=model.rows * mesh.size, **options
        )
        return Case(forms.whole(forms.applied(ADAMW), gradient), params=specs)

    def fsdp(once: bool) -> Case:
        return applied(reduce_axis=accumax.FSDP(AXIS, specs, once=once, mesh=mesh))

    return {AUTO: applied(), LAYERS: fsdp(False), ONCE: fsdp(True)}


def every(cases: dict[str, Case], model: Model, mesh: Mesh) -> dict[str, Found]:
    return {name: compiled(case, model, mesh) for name, case in cases.items()}


def compiled(case: Case, model: Model, mesh: Mesh) -> Found:
    """With a batch that is sharded over the mesh, which has one axis."""
    params = model.params
    batch = model.batch(model.rows * mesh.size * EVERY // case.calls)

    def place(tree: Any, specs: Any) -> Any:
        specs = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, P))
        return jax.tree.map(
            lambda s, spec: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=NamedSharding(mesh, spec)
            ),
            tree,
            specs,
        )

    placed = place(params, case.params)
    alike = {s.shape: s.sharding.spec for s in jax.tree.leaves(placed)}
    state = jax.eval_shape(case.form.init, params)
    specs = jax.tree.map(lambda s: alike.get(s.shape, P()), state)
    if case.apart is not None:
        specs = specs._replace(acc_grads=P(AXIS))
        if case.apart.shard_optimizer:
            devices: Any = check_window_axis(case.apart)
            parts = jax.tree.map(lambda s: devices.cut(s).spec, state.inner_opt_state)
            specs = specs._replace(inner_opt_state=parts)
    given = placed, place(state, specs)
    kept = jax.tree.map(lambda s: s.sharding, given)
    step = jax.jit(
        case.form.step,
        donate_argnums=(0, 1),
        keep_unused=True,
        out_shardings=(*kept, None),  # else XLA may choose others, and not reuse them
    )
    step = step.lower(*given, place(batch, P(AXIS))).compile()
    memory: Any = step.memory_analysis()
    unit = bytes_of(params)
    return Found(
        memory.argument_size_in_bytes / unit,
        memory.temp_size_in_bytes / unit,
        (memory.output_size_in_bytes - memory.alias_size_in_bytes) / unit,
        unit,
        case.calls,
        exchanges.collectives(step.as_text() or ""),
    )


def print_window(title: str, found: dict[str, Found], baseline: str) -> None:
    base = found[baseline].total
    report.table(
        title,
        ["", "args", "temp", "sum", f"/{baseline}"],
        [
            [name]
            + [f"{x:.3f}" for x in (f.arguments, f.temp, f.total, f.total / base)]
            for name, f in found.items()
        ],
    )
    report.table(
        "What it sends",
        ["", *"loop boundary outside ops MB gathered moves".split()],
        [
            [name]
            + [f"{f.volume(REDUCTIONS, *places):.3f}" for places in PLACES]
            + [f"{f.count(REDUCTIONS, f.unit / 1000)}", f"{f.wire() / 1e6:.0f}"]
            + [f"{f.volume(GATHERS):.3f}", f"{f.count(MOVES)}"]
            for name, f in found.items()
            if name != ONE
        ],
    )


def print_sharded(title: str, found: dict[str, Found]) -> None:
    report.table(
        title,
        ["gather, reduce", *"args temp sum gathered reduced loop MB moves".split()],
        [
            [name]
            + [f"{x:.3f}" for x in (f.arguments, f.temp, f.total)]
            + [f"{f.volume(ops):.3f}" for ops in (GATHERS, REDUCTIONS)]
            + [f"{f.volume(REDUCTIONS, 'loop'):.3f}", f"{f.wire() / 1e6:.0f}"]
            + [f"{f.count(MOVES)}"]
            for name, f in found.items()
        ],
    )


def bars(found: dict[str, Found]) -> list[report.Bar]:
    """Of the forms in `found` that have some."""
    limits, one = [], found[ONE]
    for name in BARRED:
        if name not in found:
            continue
        f = found[name]
        limits += [
            (f"memory of {name} / one device", f.total / one.total, 1.05),
            (f"gradients reduced in a loop, {name}", f.volume(REDUCTIONS, "loop"), 0),
            (f"arrays gathered or moved, {name}", f.count(GATHERS + MOVES), 0),
        ]
        if name != PLAIN:  # which reduces in every call
            what = f"gradients reduced in a window, {name}"
            limits.append((what, f.volume(REDUCTIONS), 1.001))
    if ZERO in found:
        f = found[ZERO]
        limits += [
            (f"memory of {ZERO} / {STEP}", f.total / found[STEP].total, 0.65),
            (f"gradients reduced in a window, {ZERO}", f.volume(REDUCTIONS), 1.002),
            (f"parameters gathered in a window, {ZERO}", f.volume(GATHERS), 1.002),
            (
                f"parameters gathered elsewhere, {ZERO}",
                f.volume(GATHERS, "loop", "outside"),
                0,
            ),
        ]
    return limits


def setting(description: str | None, argv: list[str] | None) -> tuple[str, Model, Any]:
    """What the command line asks for, and the devices; prints the header."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    parser.add_argument(
        "--size",
        default="",
        help=f"the transformer: {','.join(transformer.Size._fields)}",
    )
    args = parser.parse_args(argv)
    size = transformer.Size(*(int(n) for n in args.size.split(",") if n))
    on = devices.devices(args.target)
    chip = CHIPS.get(args.target, "CPU")
    host = report.host()
    report.header("accumax, compiled", f"{len(on)} x {chip} (compiled on {host})")

    return args.target, model_of(size), on


def main(argv: list[str] | None = None) -> None:
    _, model, on = setting(__doc__, argv)
    mesh, alone = (Mesh(np.array(d), (AXIS,)) for d in (on, on[:1]))
    what = f"a transformer of {model.megabytes:.0f} MB"
    calls = f"a window of {EVERY} calls"
    parts = f"{EVERY} microbatches in one call"

    within = every(within_a_call(model, mesh), model, mesh)
    within[ONE] = compiled(one_call(model), model, alone)
    print_window(f"{what}, {parts}", within, ONE)

    across = every(across_calls(model, mesh), model, mesh)
    across[ONE] = compiled(one_window(model), model, alone)
    print_window(f"The same, {calls}", across, ONE)

    limits, (count, width, rows) = bars(within) + bars(across), MATRICES
    matrices = Model(
        forms.matrices_loss,
        forms.matrices(count, width),
        lambda n: jax.ShapeDtypeStruct((n, width), jnp.float32),
        rows,
    )
    unrolled = f"{count} matrices of {width} x {width}, not scanned"
    for name, each in ((what, model), (unrolled, matrices)):
        for title, n in ((parts, 1), (calls, EVERY)):
            found = every(sharded(each, mesh, n), each, mesh)
            print_sharded(f"Sharded: {name}, {title}", found)
            if n == 1:
                f = found[ONCE]
                pair = f.volume(GATHERS), f.volume(REDUCTIONS)
                limits.append((f"gathered or reduced once, {name}", max(pair), 1.002))

    report.bars(limits)


if __name__ == "__main__":
    main()
