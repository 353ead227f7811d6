"""What accumulation costs in time, and how exact it is, on JAX's default device.

    python benchmarks/speed.py               # minutes
    python benchmarks/speed.py --repeats 50  # where other work disturbs the times
    python benchmarks/speed.py --quick       # seconds; its numbers mean nothing

Times are compared within one run: the forms take turns, each turn gives a ratio to that
turn's baseline, and the tables show the median ratio and its range.

    accumax, run, 2026-11-21, jax 0.10.2, optax 0.2.8, accumax 0.1.0
    AMD EPYC x 2, load 3.6

    A call within a window, 16 matrices of 1024 x 1024
                          ms  ratio  least   most
    acc += g            5.02   1.00   1.00   1.00
    optax.MultiSteps  145.63  28.45  24.82  32.90
    accumulate         47.79   9.67   7.64  10.98
    apply_gradients     5.67   1.13   0.56   1.39

    A window of 8 calls; the baseline ends in one plain AdamW step
                           ms  ratio  least   most
    acc += g            52.05   1.00   1.00   1.00
    optax.MultiSteps  1174.13  22.19  19.88  27.16
    accumulate         397.77   7.71   6.40   9.62
    apply_gradients     61.92   1.22   0.56   1.50
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import accuracy
import forms
import jax
import jax.numpy as jnp
import models
import optax
import report
import targets
import transformer
from forms import EVERY
from runs import Runner, in_turns

import accumax

UNROLLED = "value_and_grad(unroll=True)"


class Scale(NamedTuple):
    """How much is measured."""

    repeats: int = 20
    compiles: int = 5
    matrices: int = 16
    width: int = 1024
    compiled: transformer.Size | None = transformer.Size()
    trained: transformer.Size | None = transformer.Size(4, 256, 4, 2048, 128)
    windows: int = 50
    seeds: int = 20


QUICK = Scale(1, 1, 2, 32, None, None, windows=2, seeds=1)


def model(size: transformer.Size | None) -> models.Model:
    """The transformer, or without a size something that compiles in no time."""
    return models.stack(2, 32, 8) if size is None else models.text(size)


class Times(NamedTuple):
    """Seconds of a call within the window, and of the whole window."""

    within: float
    window: float


def window(within: Runner, last: Runner, x: Any) -> Callable[[], Times]:
    def run() -> Times:
        inside = within.run(x, EVERY - 1)
        return Times(inside / (EVERY - 1), inside + last.run(x, 1))

    return run


def print_times(
    title: str, turns: list[dict[str, float]], baseline: str
) -> dict[str, float]:
    """Prints a table; gives each form's median ratio to the baseline."""
    medians, rows = {}, []
    for name in turns[0]:
        ratios = [turn[name] / turn[baseline] for turn in turns]
        medians[name] = statistics.median(ratios)
        milliseconds = 1e3 * statistics.median(turn[name] for turn in turns)
        numbers = [milliseconds, medians[name], min(ratios), max(ratios)]
        rows.append([name, *(f"{x:.2f}" for x in numbers)])
    report.table(title, ["", "ms", "ratio", "least", "most"], rows)
    return medians


def optimizer_times(scale: Scale) -> float:
    """Optimizer steps against the least that they can do. Gives the bar's ratio."""
    key = jax.random.key(0)
    shape = (scale.matrices, scale.width, scale.width)
    params = list(jax.random.normal(key, shape))
    grads = jax.tree.map(jnp.cos, params)

    def add(acc: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return jax.tree.map(jnp.add, acc, grads), state

    steps = {name: Runner(f, params) for name, f in forms.optimizer_steps().items()}
    plain = steps.pop(forms.PLAIN)
    baseline = "acc += g"
    adds = Runner(forms.Form(add, lambda params: ()), params)
    runs = {baseline: window(adds, plain, grads)}
    runs |= {name: window(step, step, grads) for name, step in steps.items()}
    turns = in_turns(runs, scale.repeats)
    what = f"{scale.matrices} matrices of {scale.width} x {scale.width}"
    within = print_times(
        f"A call within a window, {what}",
        [{name: t.within for name, t in turn.items()} for turn in turns],
        baseline,
    )
    print_times(
        f"A window of {EVERY} calls; the baseline ends in one plain AdamW step",
        [{name: t.window for name, t in turn.items()} for turn in turns],
        baseline,
    )
    return within[forms.APPLY_GRADIENTS]


def train_times(scale: Scale) -> None:
    name, loss, init, batch = model(scale.trained)
    params = init()
    steps = {name: Runner(f, params) for name, f in forms.train_steps(loss).items()}
    plain = steps.pop(forms.PLAIN)
    gradients = Runner(forms.kept(jax.value_and_grad(loss)), params)
    baseline = f"{EVERY} gradients, 1 AdamW step"
    runs = {baseline: window(gradients, plain, batch)}
    runs |= {name: window(step, step, batch) for name, step in steps.items()}
    turns = in_turns(runs, scale.repeats)
    print_times(
        f"A window of {EVERY} train steps, {name}",
        [{name: t.window for name, t in turn.items()} for turn in turns],
        baseline,
    )


def gradient_times(
    model: models.Model, repeats: int, ours: str = forms.VALUE_AND_GRAD
) -> list[report.Bar]:
    """A call with eight microbatches against eight calls. Gives the bars of `ours`.

    The eight calls are timed twice: as they are, each of which writes over the gradient
    of the one before, and with `acc += g`.
    """
    name, loss, init, batch = model
    params, rows = init(), len(batch)
    whole = jnp.concatenate([batch] * EVERY)
    plain = jax.value_and_grad(loss)
    calls = f"{EVERY} calls of jax.value_and_grad"
    sums = f"{EVERY} calls, acc += g"
    found = forms.gradients(loss, rows=rows)
    found[UNROLLED] = accumax.value_and_grad(loss, microbatch_size=rows, unroll=True)
    steps = {calls: forms.kept(plain), sums: forms.added(plain)}
    each = {name: Runner(step, params) for name, step in steps.items()}
    once = {name: Runner(forms.kept(f), params) for name, f in found.items()}
    runs = {name: functools.partial(r.run, batch, EVERY) for name, r in each.items()}
    runs |= {name: functools.partial(r.run, whole, 1) for name, r in once.items()}
    turns = in_turns(runs, repeats)
    print_times(f"A gradient of {EVERY} microbatches, {name}", turns, calls)
    short, _, _ = name.partition(",")
    return [
        (
            f"{ours} / {baseline}, {short}",
            statistics.median(turn[ours] / turn[baseline] for turn in turns),
            1.05,
        )
        for baseline in (calls, sums)
    ]


def within_a_call(scale: Scale) -> list[report.Bar]:
    bars = gradient_times(model(scale.trained), scale.repeats)
    if scale.trained is not None:
        for width in (64, 512):
            bars += gradient_times(models.stack(3, width, 32), scale.repeats)
        bars += gradient_times(models.convolutions(32), scale.repeats, UNROLLED)
    return bars


def inner_runs() -> int:
    """How often the inner optimizer runs in a window. Gives accumax's most."""
    calls = []

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        jax.debug.callback(lambda: calls.append(1))
        return forms.ADAMW.update(updates, state, params)

    counted = optax.GradientTransformation(forms.ADAMW.init, update)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(params * x)

    every = optax.chain(counted, optax.apply_every(EVERY))
    steps = forms.train_steps(loss, inner=counted)
    del steps[forms.PLAIN]
    steps = {
        "optax.apply_every": forms.whole(forms.applied(every), jax.value_and_grad(loss))
    } | steps
    runs = {}
    for name, form in steps.items():
        Runner(form, jnp.ones(4)).run(jnp.ones(4), EVERY)
        jax.effects_barrier()
        runs[name] = len(calls)
        calls.clear()
    report.table(
        f"Runs of the inner optimizer in a window of {EVERY}",
        ["", "runs"],
        [[name, f"{n}"] for name, n in runs.items()],
    )
    return max(n for name, n in runs.items() if not name.startswith("optax."))


def compile_times(scale: Scale) -> float:
    what, loss, init, batch = model(scale.compiled)
    every = forms.train_steps(loss)
    steps = {name: every[name] for name in (forms.PLAIN, forms.TRAIN_STEP)}
    shapes, on = jax.eval_shape(init), jax.devices()[0]
    found = targets.compiled_in_turns(steps, shapes, batch, on, scale.compiles)
    title = f"Compilation of a train step, median of {scale.compiles}, {what}"
    return targets.print_compile_times(found, title)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    parser.add_argument("--repeats", type=int, help="windows that are timed")
    args = parser.parse_args(argv)
    scale = QUICK if args.quick else Scale()
    scale = scale._replace(repeats=args.repeats or scale.repeats)

    chip = jax.devices()[0].device_kind
    what = "accumax, run" + (" (quick, not a measurement)" if args.quick else "")
    report.header(what, report.host() if chip == "cpu" else f"{chip}, {report.host()}")
    bars = [
        ("apply_gradients in a window / (acc += g)", optimizer_times(scale), 1.25),
        ("runs of the inner optimizer in a window", inner_runs(), 1),
        ("compile time of train_step / plain", compile_times(scale), 1.3),
    ]
    train_times(scale)
    bars += within_a_call(scale)
    report.bars(bars + accuracy.tables(scale.seeds, scale.windows))


if __name__ == "__main__":
    main()
