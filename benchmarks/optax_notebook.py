"""Optax's notebook on gradient accumulation and microbatching, with two more columns.

    python benchmarks/optax_notebook.py        # or gpu, tpu: memory alone, compiled

The notebook compares three ways to accumulate over 16 microbatches. Here is the same in
our own words, with a transformer of the notebook's sizes in plain JAX: 12 layers of
width 512, not scanned, 10,000 words, microbatches of 32 sequences of 256.

    manual          a program that adds a gradient, and one that updates
    multisteps      optax.MultiSteps
    microbatching   optax.microbatching
    train_step, value_and_grad: ours

Memory is compiled at these sizes. Time is taken at smaller ones: it is of all 16
microbatches and their update, over that of the manual way.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import devices
import forms
import jax
import jax.numpy as jnp
import optax
import report
import timing
import transformer
import zoo
from devices import CHIPS, Device
from forms import Form
from programs import bytes_of, compiled
from results import Row
from runs import Runner, in_turns

import accumax

STEPS = 16
SIZE = transformer.Size(12, 512, 8, 10_000, 256, 32, scanned=0, tied=0)
SMALL = transformer.Size(2, 128, 4, 1000, 64, 8, scanned=0, tied=0)
ADAMW = optax.adamw(0.01)
MANUAL = "manual"


def across(loss: Callable[..., jax.Array]) -> dict[str, Form]:
    """Steps of which STEPS are a window."""
    multi = optax.MultiSteps(ADAMW, STEPS).gradient_transformation()
    tx = accumax.accumulate(ADAMW, STEPS)
    return {
        "multisteps": forms.whole(forms.applied(multi), jax.value_and_grad(loss)),
        "train_step": Form(accumax.train_step(loss, tx), tx.init),
    }


def within(loss: Callable[..., jax.Array], rows: int) -> dict[str, Form]:
    """Steps whose batch has STEPS microbatches."""
    gradients: dict[str, forms.Gradient] = {
        "value_and_grad": accumax.value_and_grad(loss, microbatch_size=rows)
    }
    if hasattr(optax, "microbatching"):  # Optax 0.2.5 has none
        gradients["microbatching"] = forms.peer(jax.value_and_grad(loss), rows)
    plain = forms.applied(ADAMW)
    return {name: forms.whole(plain, fun) for name, fun in gradients.items()}


def memory(on: Device, target: str, size: transformer.Size = SIZE) -> list[Row]:
    """Gigabytes: `optax_notebook/memory/TARGET/FORM`."""
    loss, params = functools.partial(transformer.loss, size), transformer.shapes(size)
    unit, state = bytes_of(params) / 1e9, jax.eval_shape(ADAMW.init, params)

    def gigabytes(form: Form, rows: int, beside: float = 0) -> float:
        x = zoo.array(rows, size.length + 1, dtype=jnp.int32)
        return compiled(form, params, x, on, haste=True).total * unit + beside

    # While the gradient is added, the optimizer's state lies beside.
    add = forms.added(jax.value_and_grad(loss))
    found = {MANUAL: gigabytes(add, size.rows, bytes_of(state) / 1e9)}
    for name, form in across(loss).items():
        found[name] = gigabytes(form, size.rows)
    for name, form in within(loss, size.rows).items():
        found[name] = gigabytes(form, STEPS * size.rows)
    case = f"optax_notebook/memory/{target}"
    return [Row(f"{case}/{name}", value, "GB") for name, value in found.items()]


def times(target: str, turns: int, size: transformer.Size = SMALL) -> list[Row]:
    """`optax_notebook/time/TARGET/FORM`, over the manual way."""
    loss = functools.partial(transformer.loss, size)
    params = transformer.init(size, jax.random.key(0))
    batch = timing.arrays(zoo.array(size.rows, size.length + 1, dtype=jnp.int32))
    whole = jnp.concatenate([batch] * STEPS)
    gradient = Runner(forms.added(jax.value_and_grad(loss)), params)
    update = Runner(forms.applied(ADAMW), params)

    def manual() -> float:
        return gradient.run(batch, STEPS) + update.run(gradient.state, 1)

    runs: dict[str, Callable[[], float]] = {MANUAL: manual}
    for steps, x, calls in (
        (across(loss), batch, STEPS),
        (within(loss, size.rows), whole, 1),
    ):
        for name, form in steps.items():
            runner: Any = Runner(form, params)
            runs[name] = functools.partial(runner.run, x, calls)
    found = timing.least(in_turns(runs, turns))
    case = f"optax_notebook/time/{target}"
    return [
        Row(f"{case}/{name}", seconds / found[MANUAL], "x manual")
        for name, seconds in found.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    target = parser.parse_args(argv).target
    on = devices.device(target)
    report.header("accumax", CHIPS.get(target, report.host()))
    report.rows("Arguments and temporary memory of a step", memory(on, target))
    if target == "cpu":
        report.rows(f"Time of {STEPS} microbatches", times(target, 5))


if __name__ == "__main__":
    main()
