"""Memory of unlike models, over their floor.

The floor of a program is its arguments (parameters, optimizer state, accumulator and
batch) and the temporary memory of one microbatch's forward and backward pass in which
each gradient is used up as it comes: the least of three programs without an optimizer
(SGD, `acc += g`, and the in-place recipe of JAX's own documentation).
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import forms
import jax
import jax.numpy as jnp
import optax
import report
import zoo
from devices import Device
from programs import Compiled, bytes_of, compiled

import accumax

K = forms.EVERY
PLAIN, MULTISTEPS, APPLY, TRAIN = "plain", "MultiSteps", "apply_gradients", "train_step"
WITHIN, SCAN = "value_and_grad", "scan by hand"


def in_refs(loss: Callable[..., jax.Array]) -> forms.Form:
    """JAX's own recipe: the backward pass adds into refs."""

    def step(params: Any, sums: Any, x: Any) -> Any:
        vjp: Any
        value, vjp = jax.vjp(lambda p: loss(p, x), params)
        refs = jax.tree.map(jax.new_ref, sums)
        vjp.with_refs(refs)(jnp.ones_like(value))
        return params, jax.tree.map(jax.freeze, refs), value

    return forms.Form(step, forms.added(jax.value_and_grad(loss)).init)


def floor_temp(model: zoo.Model, on: Device) -> float:
    programs = []
    for loss in filter(None, (model.loss, model.best)):
        gradient = jax.value_and_grad(loss)
        programs += [
            forms.whole(forms.applied(optax.sgd(0.1)), gradient),
            forms.added(gradient),
            in_refs(loss),
        ]
    if model.inner is not forms.ADAMW:  # it may not need all gradients
        gradient = jax.value_and_grad(model.loss)
        programs.append(forms.whole(forms.applied(model.inner), gradient))
    temps = []
    for program in programs:
        # JAX cannot add every loss's gradient into refs.
        with contextlib.suppress(ValueError, TypeError, NotImplementedError):
            temps.append(compiled(program, model.params, model.x, on).temp)
    return min(temps)


def steps(model: zoo.Model) -> dict[str, tuple[forms.Form, int]]:
    """The forms, each with the microbatches of a call."""
    loss, inner = model.loss, model.inner
    gradient, plain = jax.value_and_grad(loss), forms.applied(inner)
    tx = accumax.accumulate(inner, K)
    ours = model.weighted or loss
    options: dict[str, Any] = {"weighted": model.weighted is not None}
    rows = model.x.shape[0]
    within = accumax.value_and_grad(ours, microbatch_size=rows, **options)
    across = {
        name: forms.whole(form, gradient)
        for name, form in forms.optimizer_steps(inner).items()
    }
    across[TRAIN] = forms.Form(accumax.train_step(ours, tx, **options), tx.init)
    return {
        PLAIN: (across[forms.PLAIN], 1),
        MULTISTEPS: (across[forms.MULTISTEPS], 1),
        APPLY: (across[forms.APPLY_GRADIENTS], 1),
        TRAIN: (across[TRAIN], 1),
        SCAN: (forms.whole(plain, forms.scanned(gradient, rows)), K),
        WITHIN: (forms.whole(plain, within), K),
    }


class Figures(NamedTuple):
    """Memory of one model, in units of its parameters.

    Attributes:
      found: each form.
      across, within: the floors of a call of a window, and of a call of microbatches.
    """

    found: dict[str, Compiled]
    across: float
    within: float

    def over_floor(self, name: str) -> float:
        floor = self.within if name in (SCAN, WITHIN) else self.across
        return self.found[name].total / floor


def figures(model: zoo.Model, on: Device) -> Figures:
    def of(form: forms.Form, count: int) -> Compiled:
        rows, *rest = model.x.shape
        x = jax.ShapeDtypeStruct((count * rows, *rest), model.x.dtype)
        return compiled(form, model.params, x, on)

    found = {name: of(*step) for name, step in steps(model).items()}
    temp = floor_temp(model, on)
    tx = accumax.accumulate(model.inner, K)
    sums = jax.eval_shape(tx.init, model.params).acc_grads
    # Within a call, the accumulator is not an argument.
    sums = bytes_of(sums) / bytes_of(model.params)
    return Figures(
        found, found[TRAIN].arguments + temp, found[WITHIN].arguments + sums + temp
    )


def table(on: Device, models: list[zoo.Model]) -> list[report.Bar]:
    """Prints memory over the floor, and where a peer takes less; gives its bars."""
    shown = MULTISTEPS, APPLY, TRAIN, SCAN, WITHIN
    all_figures = {model.name: figures(model, on) for model in models}
    report.table(
        "Unlike models: memory of a step, its floor, and forms over their floor",
        ["", PLAIN, "floor", f"{TRAIN} / {PLAIN}", *shown],
        [
            [name, f"{f.found[PLAIN].total:.2f}", f"{f.across:.2f}"]
            + [f"{f.found[TRAIN].total / f.found[PLAIN].total:.2f}"]
            + [f"{f.over_floor(form):.3f}" for form in shown]
            for name, f in all_figures.items()
        ],
    )
    print()
    for name, f in all_figures.items():
        for ours, peer in ((APPLY, MULTISTEPS), (TRAIN, MULTISTEPS), (WITHIN, SCAN)):
            less, more = f.found[peer].total, f.found[ours].total
            if more > 1.001 * less:
                print(f"above a peer: {name}: {ours} {more:.3f}, {peer} {less:.3f}")
    return [
        (f"memory of {form} / floor, {name}", f.over_floor(form), 1.03)
        for name, f in all_figures.items()
        for form in (TRAIN, WITHIN)
    ]
