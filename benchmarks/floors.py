"""Memory of unlike models, over their floor.

The floor of a program is its arguments (parameters, optimizer state, accumulator and
batch) and the temporary memory of one microbatch's forward and backward pass in which
each gradient is used up as it comes: the least of three programs without an optimizer
(SGD, `acc += g`, and the in-place recipe of JAX's own documentation).
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import forms
import jax
import jax.numpy as jnp
import optax
import peers
import zoo
from devices import Device
from programs import Compiled, bytes_of, compiled
from results import Row

import accumax


def in_refs(loss: Callable[..., jax.Array]) -> forms.Form:
    """JAX's own recipe: the backward pass adds into refs."""

    def step(params: Any, sums: Any, x: Any) -> Any:
        vjp: Any
        value, vjp = jax.vjp(lambda p: loss(p, x), params)
        refs = jax.tree.map(jax.new_ref, sums)
        vjp.with_refs(refs)(jnp.ones_like(value))
        return params, jax.tree.map(jax.freeze, refs), value

    return forms.Form(step, forms.added(jax.value_and_grad(loss)).init)


def floor_temp(model: zoo.Model, on: Device, least: bool = False) -> float:
    """Temporary memory of the floor, in units of the parameters."""
    programs = []
    for loss in filter(None, (model.loss, model.best)):
        gradient = jax.value_and_grad(loss)
        programs += [
            forms.whole(forms.applied(optax.sgd(0.1)), gradient),
            forms.added(gradient),
            in_refs(loss),
        ]
    if model.name.startswith("lora"):  # its optimizer does not need all gradients
        gradient = jax.value_and_grad(model.loss)
        programs.append(forms.whole(forms.applied(model.inner), gradient))
    temps = []
    for program in programs:
        # JAX cannot add every loss's gradient into refs.
        with contextlib.suppress(ValueError, TypeError, NotImplementedError):
            found = compiled(program, model.params, model.x, on, True, least)
            temps.append(found.temp)
    return min(temps)


class Figures(NamedTuple):
    """Memory of one model, in units of its parameters.

    Attributes:
      found: each form. One that JAX cannot compile for this model is missing.
      failed: why it could not.
      temp: the floor's temporary memory.
      sums: the accumulator, which within a call is no argument.
    """

    found: dict[str, Compiled]
    failed: dict[str, str]
    temp: float
    sums: float

    def floor(self, name: str) -> float:
        if name == "train_step_divided":  # it has an accumulator in both places
            return self.found[name].arguments + self.temp
        if name in (peers.WHOLE, *peers.WITHIN_PEERS, *peers.WITHIN):
            return self.found["value_and_grad"].arguments + self.sums + self.temp
        return self.found["train_step"].arguments + self.temp

    def over_floor(self, name: str) -> float:
        return self.found[name].total / self.floor(name)


def figures(
    model: zoo.Model,
    on: Device,
    only: Iterable[str] | None = None,
    least: bool = False,
) -> Figures:
    """Compiles the forms named in `only`, or all of them; `least` as for `compiled`."""
    steps = peers.steps(model)
    found, failed = {}, {}
    for name in only or steps:
        if name not in steps or name == "keras":
            continue  # this Optax has none, or it would take the memory here
        form, count = steps[name]
        x = model.batch(count)
        try:
            found[name] = compiled(form, model.params, x, on, True, least)
        except (ValueError, TypeError, NotImplementedError) as error:
            if name in peers.OURS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    tx = accumax.accumulate(model.inner, forms.EVERY)
    sums = bytes_of(jax.eval_shape(tx.init, model.params).acc_grads)
    sums /= bytes_of(model.params)
    return Figures(found, failed, floor_temp(model, on, least), sums)


# Models for which all forms are compiled, and the forms for the others.
FULL = "mlp", "transformer", "resnet", "lora", "lstm"
MAIN = (
    peers.NONE,
    "multisteps",
    "scan",
    "array_refs",
    "apply_gradients",
    "train_step",
    "value_and_grad",
)


def rows(model: zoo.Model, on: Device, target: str) -> list[Row]:
    full = model.optimizer == "adamw" and model.name in FULL
    found = figures(model, on, None if full else MAIN)
    case = f"{model.name}/{model.optimizer}/{target}"
    rows = [Row(f"floor/{case}", found.floor("train_step"), "x parameters")]
    for name, step in found.found.items():
        over = found.over_floor(name)
        rows.append(Row(f"memory/{case}/{name}", over, "x floor"))
        rows.append(Row(f"copies/{case}/{name}", step.copies, "copies"))
    for name, why in found.failed.items():
        rows.append(Row(f"memory/{case}/{name}", None, "x floor", note=why))
    return rows


def scheduled(model: zoo.Model, on: Device) -> list[Row]:
    """Memory as `programs.LEAST` has XLA arrange each program, on a CPU or a TPU."""
    # A TPU's programs take minutes to compile.
    few = "multisteps", "train_step", "value_and_grad"
    found = figures(model, on, few if on.platform == "tpu" else MAIN, least=True)
    case = f"scheduled/{model.name}/{model.optimizer}/{on.platform}"
    return [
        Row(f"{case}/{name}", found.over_floor(name), "x floor") for name in found.found
    ]
