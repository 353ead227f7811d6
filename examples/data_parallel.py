r"""Several devices: the big batch's update, with one all-reduce of gradients in it.

A small net (Flax Linen) learns scikit-learn's digits five times, from the same seed
and with the same batches: the whole batch on one device, with plain Optax; and over all
devices, in 4 calls of 4 microbatches, by automatic sharding and with

    tx = accumax.accumulate(inner, every=4, reduce_axis="data")
    step = accumax.train_step(loss_fn, tx, microbatch_size=32, weighted=True)

with which each device has a sum of its own, and these are added up when the window
closes. Automatic sharding reduces the gradient of every microbatch. "ZeRO-1" divides
the optimizer's state too, with reduce_axis=DataParallel("data", shard_optimizer=True),
and "bf16 wire" also sends gradients and changes of parameters in half precision. The
loss is a weighted mean: digits that are mixed up easily count three times, and what
fills up the last batch of an epoch counts nothing, so the devices' weights differ, and
some are 0. Run it in the repository with

    pip install -e ".[examples]"
    python examples/data_parallel.py       # 8 virtual devices, or all GPUs or TPUs
    python examples/data_parallel.py --width 512 --batch 1024 --every 8

The first prints this, within half a minute on two CPU cores, and draws the picture:

                              one device   automatic reduce_axis      ZeRO-1   bf16 wire
    test accuracy, %               97.50       97.50       97.50       97.50       97.50
    parameters moved by          1.2e-01     1.2e-01     1.2e-01     1.2e-01     1.2e-01
      off the first way by       0.0e+00     3.6e-07     3.7e-07     3.7e-07     1.6e-03
    memory of a device, MiB         7.56        1.77        1.77        0.76        0.88
    time per update, ms               19         277          71          92         122
    sent per update, MiB            0.00        8.22        0.51        0.51        0.26

    in a call on 8 devices; 4 are an update
      automatic     4 x all-reduce       307,756 bytes in the loop over microbatches
                    4 x all-reduce             4 bytes in the loop over microbatches
      reduce_axis   1 x all-reduce       307,752 bytes at a window's end
                    1 x all-reduce            12 bytes in a call
      ZeRO-1        4 x all-gather        65,536 bytes at a window's end
                    1 x all-gather        32,768 bytes at a window's end
                    4 x reduce-scatter     8,192 bytes at a window's end
                    1 x all-gather         5,120 bytes at a window's end
                    1 x reduce-scatter     4,096 bytes at a window's end
                    1 x all-reduce            12 bytes in a call
      bf16 wire     4 x all-to-all        32,768 bytes at a window's end
                    4 x all-gather        32,768 bytes at a window's end
                    1 x all-to-all        16,384 bytes at a window's end
                    1 x all-gather        16,384 bytes at a window's end
                    1 x all-to-all         2,560 bytes at a window's end
                    1 x all-gather         2,560 bytes at a window's end
                    1 x all-reduce            12 bytes in a call

The time is that of eight devices that share two cores. The same file runs in several
processes, of which each passes rows of its own, and the first one prints and draws. JAX
finds the others by itself under Slurm and Open MPI, on GKE and on Cloud TPU:

    srun -N2 -n16 --gpus-per-node=8 python examples/data_parallel.py --distributed
    gcloud compute tpus tpu-vm ssh NAME --worker=all \
        --command="python examples/data_parallel.py --distributed"

Elsewhere they are told where the first one is, as in two terminals of one machine:

    python examples/data_parallel.py --steps 10 --coordinator localhost:8476 \
        --processes 2 --process 0  # in the other one, --process 1
"""

import argparse
import functools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import accumax

MIB = 2**20
VIRTUAL = 8  # devices that the CPU shows, in all processes together
CONFUSED = (3, 8, 9)  # the digits that count three times
WAYS = {
    "whole": "one device",
    "automatic": "automatic",
    "own": "reduce_axis",
    "divided": "ZeRO-1",
    "half": "bf16 wire",
}
LOOP, CALL, WINDOW = "in the loop over microbatches", "in a call", "at a window's end"


class Net(nn.Module):
    """(rows, 64) images to (rows, 10) logits."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Dense(self.width)(images)
        for _ in range(4):
            x += nn.Dense(self.width)(nn.gelu(nn.LayerNorm()(x)))
        return nn.Dense(10)(nn.LayerNorm()(x))


class Digits(NamedTuple):
    """(n, 64) float32 images in [0, 1], (n,) int32 labels, (n,) float32 weights."""

    images: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class Run(NamedTuple):
    """What one way of training gave."""

    params: Any
    losses: list[float]  # one per update
    figures: dict[str, float]  # what the table shows
    collectives: Counter[tuple[str, int, str]]  # see `exchanges`


def load() -> tuple[Digits, Digits]:
    """The training and the test set, the same in every run."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    weights = np.where(np.isin(labels, CONFUSED), np.float32(3), np.float32(1))
    data = images.astype(np.float32) / 16, labels.astype(np.int32), weights
    sets: Any = train_test_split(*data, test_size=360, random_state=0, stratify=labels)
    return Digits(*sets[::2]), Digits(*sets[1::2])


def epochs(data: Digits, flags: argparse.Namespace) -> list[Digits]:
    """The batch of each update: all images in a new order, filled up, and again."""
    rng, images, batches = np.random.default_rng(flags.seed), len(data.labels), []
    while len(batches) < flags.steps:
        rows = rng.permutation(images)
        real = np.arange(images + -images % flags.batch) < images
        rows = np.resize(rows, len(real))
        epoch = data.images[rows], data.labels[rows], data.weights[rows] * real
        batches += parts(Digits(*epoch), len(rows) // flags.batch)
    return batches[: flags.steps]


def parts(rows: Digits, count: int) -> list[Digits]:
    """The rows in parts of one size."""
    columns = [np.split(column, count) for column in rows]
    return [Digits(*part) for part in zip(*columns, strict=True)]


def train(
    way: str,
    step: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: Any,
    batches: Sequence[Sequence[Digits]],
    place: Callable[[Digits], Any],
) -> Run:
    """Trains on `batches`, a call for each part of one, as `place` puts it there."""
    opt_state, calls = tx.init(params), len(batches[0])
    # Compiled once: for the memory, for the collectives, and for the run.
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower
    compiled = lowered(params, opt_state, place(batches[0][0])).compile()
    losses, seconds = [], []
    quiet = jax.process_index() > 0
    progress = tqdm(batches, f"{WAYS[way]:>11}", unit="update", disable=quiet)
    for batch in progress:
        start = time.perf_counter()
        each = []
        for rows in batch:
            params, opt_state, loss = compiled(params, opt_state, place(rows))
            each.append(loss)
        jax.block_until_ready((params, opt_state))
        seconds.append(time.perf_counter() - start)
        weights = [rows.weights.sum() for rows in batch]  # a call's loss is a mean
        losses.append(float(np.average(jax.device_get(each), weights=weights)))
        progress.set_postfix(loss=f"{losses[-1]:.4f}")

    audit = accumax.audit(compiled)
    memory, found = audit.memory, exchanges(audit.collectives)
    assert memory.arguments is not None
    assert memory.temp is not None
    total = sum(
        times * sent(op, size) * (1 if place == WINDOW else calls)
        for (op, size, place), times in found.items()
    )
    # What comes out lies where the donated arguments were, so it adds nothing.
    figures = {
        "memory": memory.arguments + memory.temp,
        "seconds": statistics.median(seconds[1:] or seconds),  # the first warms up
        "sent": total if way != "whole" else 0,
    }
    return Run(jax.tree.map(np.array, params), losses, figures, found)


def exchanges(collectives: Sequence[Any]) -> Counter[tuple[str, int, str]]:
    """How often a call executes each (operation, bytes of its result, place)."""
    found: Counter[tuple[str, int, str]] = Counter()
    for one in collectives:
        times = one.times or 1
        place = LOOP if times > 1 else CALL
        if "accumax.boundary" in one.scope:  # its loop turns once in a window
            place = WINDOW
        found[one.op, one.bytes, place] += times
    return found


def sent(op: str, size: int) -> float:
    """The bytes that a device sends, in a ring, for a result of this size."""
    devices = jax.device_count()
    share = (devices - 1) / devices
    factors = {"all-reduce": 2 * share, "reduce-scatter": devices - 1}
    return factors.get(op, share) * size


def distance(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees, in float64."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.subtract(*x, dtype=np.float64)).max()) for x in pairs)


def report(runs: dict[str, Run], every: int) -> str:
    """The figures of the runs side by side, and the collectives of a call."""
    lines = [" " * 24 + "".join(f"{WAYS[way]:>12}" for way in runs)]
    for label, key, scale, form in (
        ("test accuracy, %", "accuracy", 100, ".2f"),
        ("parameters moved by", "movement", 1, ".1e"),
        ("  off the first way by", "difference", 1, ".1e"),
        ("memory of a device, MiB", "memory", 1 / MIB, ".2f"),
        ("time per update, ms", "seconds", 1e3, ".0f"),
        ("sent per update, MiB", "sent", 1 / MIB, ".2f"),
    ):
        values = [run.figures[key] * scale for run in runs.values()]
        lines.append(f"{label:24}" + "".join(f"{value:12{form}}" for value in values))
    lines += ["", f"in a call on {jax.device_count()} devices; {every} are an update"]
    for way, run in runs.items():
        name = WAYS[way]
        for (op, size, place), times in sorted(
            run.collectives.items(), key=lambda x: -x[0][1]
        ):
            if place == WINDOW and size < 1000:
                continue
            what = f"{times} x {op}"
            lines.append(f"  {name:14}{what:19}{size:>9,} bytes {place}")
            name = ""
    return "\n".join(lines)


def draw(runs: dict[str, Run], path: Path) -> None:
    """The loss curves, and what each way takes of a device and of the network."""
    figure = Figure(figsize=(12, 4), layout="constrained")  # no pyplot, so no display
    left, *others = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    styles = (
        ("#9ecae1", 8, "-"),
        ("#495057", 5, "-"),
        ("#d9480f", 3, "--"),
        ("#2b8a3e", 1.5, "-"),
        ("#862e9c", 1, ":"),
    )
    for (way, run), (color, width, line) in zip(runs.items(), styles, strict=True):
        name, updates = WAYS[way], range(1, len(run.losses) + 1)
        left.plot(updates, run.losses, line, color=color, linewidth=width, label=name)
        for axes, key in zip(others, ("memory", "sent"), strict=True):
            if way != "whole":
                bar = axes.barh(name, run.figures[key] / MIB, height=0.6, color=color)
                axes.bar_label(bar, fmt="%.2f MiB", padding=3)
    left.set(title="Training loss", xlabel="update", yscale="log")
    left.legend(frameon=False)
    titles = "Memory of a device", "Sent per update"
    for axes, title in zip(others, titles, strict=True):
        axes.set(title=title, xlabel="MiB")
        axes.margins(x=0.3)
        axes.invert_yaxis()
    for axes in (left, *others):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be without knowing the devices."""
    parser = argparse.ArgumentParser(
        description="Digits on several devices, with one all-reduce in an update.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch", type=int, default=512, help="images in an update")
    add("--every", type=int, default=4, help="calls in an update")
    add("--microbatch", type=int, default=32, help="images at a time, on all devices")
    add("--steps", type=int, default=60, help="updates")
    add("--width", type=int, default=128, help="of the net")
    add("--seed", type=int, default=0, help="of the parameters and the batches")
    add("--output", type=Path, default=Path("data_parallel.png"), help="a PNG")
    add("--distributed", action="store_true", help="JAX finds the other processes")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 is, if JAX cannot")
    add("--processes", type=int, default=1, help="their number, with --coordinator")
    add("--process", type=int, help="which one this is, with --coordinator")
    flags = parser.parse_args(argv)
    for name in ("batch", "every", "microbatch", "steps", "width", "processes", "seed"):
        least = int(name != "seed")
        if vars(flags)[name] < least:
            parser.error(f"--{name} {vars(flags)[name]} must be at least {least}.")
    if flags.output.is_dir() or not flags.output.parent.is_dir():
        parser.error(f"--output {flags.output} must be a file in an existing folder.")
    where = flags.coordinator, flags.process, flags.processes
    if where != (None, None, 1) and (
        None in where or flags.distributed or not 0 <= flags.process < flags.processes
    ):
        parser.error(
            "--coordinator goes with --processes and a --process below that, and "
            "without --distributed, with which JAX finds out all three."
        )
    return flags


def connect(flags: argparse.Namespace) -> int:
    """Finds the other processes, if there are any, and counts the devices of all."""
    chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not (chosen or "JAX_NUM_CPU_DEVICES" in os.environ or flags.distributed):
        # Of the CPU only: where JAX finds GPUs or TPUs, it takes these.
        jax.config.update("jax_num_cpu_devices", max(1, VIRTUAL // flags.processes))
    if flags.distributed:
        jax.distributed.initialize()
    elif flags.coordinator is not None:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)
    devices = jax.device_count()
    if flags.microbatch % devices or flags.batch % (flags.every * devices):
        raise SystemExit(
            f"--microbatch {flags.microbatch}, and the images of a call, --batch "
            f"{flags.batch} / --every {flags.every}, must be divisible by {devices=}."
        )
    return devices


def main(argv: Sequence[str] | None = None) -> None:
    """Trains all ways, prints the tables and draws the figure."""
    flags = parse(argv)
    devices = connect(flags)
    training, test = load()
    net = Net(flags.width)
    # In NumPy, from which each run makes its own: the first step donates them.
    params = jax.jit(net.init)(jax.random.key(flags.seed), training.images[:1])
    params = jax.tree.map(np.array, params)
    batches = epochs(training, flags)

    def loss_fn(params: Any, rows: Digits) -> tuple[jax.Array, jax.Array]:
        logits = jax.numpy.asarray(net.apply(params, rows.images))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels)
        return (losses * rows.weights).sum(), rows.weights.sum()

    # eps as in digits.py: with the usual 1e-8 Adam's first update, g / (|g| + eps),
    # blows the rounding error of a tiny gradient up to a visible part of a step.
    schedule = optax.cosine_decay_schedule(5e-3, decay_steps=flags.steps)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, eps=1e-6))

    def whole_step(params: Any, opt_state: Any, rows: Digits) -> Any:
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (total, weight), grads = value_and_grad(params, rows)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = inner.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, total / weight

    # All processes compute it, so that none of them has to wait for another one.
    here = jax.device_put(params, jax.local_devices()[0])
    args = [[batch] for batch in batches], jax.device_put
    runs = {"whole": train("whole", whole_step, inner, here, *args)}

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    by_row, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def place(rows: Digits) -> Any:
        # Each process passes rows of its own, and JAX makes one array of all.
        own = parts(rows, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(by_row, own)

    args = [parts(batch, flags.every) for batch in batches], place
    zero = functools.partial(accumax.DataParallel, "data", shard_optimizer=True)
    half = {"reduce_dtype": jax.numpy.bfloat16, "gather_dtype": jax.numpy.bfloat16}
    for way, reduce_axis in (
        ("automatic", None),
        ("own", "data"),
        ("divided", zero()),
        ("half", zero(**half)),
    ):
        with jax.set_mesh(mesh):
            tx = accumax.accumulate(inner, flags.every, reduce_axis=reduce_axis)
            step = accumax.train_step(
                loss_fn, tx, microbatch_size=flags.microbatch, weighted=True
            )
            everywhere = jax.device_put(params, replicated)
            runs[way] = train(way, step, tx, everywhere, *args)

    for run in runs.values():
        guesses = np.asarray(jax.jit(net.apply)(run.params, test.images)).argmax(-1)
        run.figures["accuracy"] = float(np.mean(guesses == test.labels))
        run.figures["movement"] = distance(run.params, params)
        run.figures["difference"] = distance(run.params, runs["whole"].params)
    if jax.process_index() == 0:
        print(report(runs, flags.every))
        draw(runs, flags.output)


if __name__ == "__main__":
    main()
