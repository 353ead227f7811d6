"""How near the peak that `accumax.audit` draws is to the compiler's total.

XLA's assignment of buffers is not in the text of a program, so `audit` follows the
schedule and estimates what is alive.
"""

from typing import Any

import jax
import peers
import programs
import zoo
from devices import Device
from results import Row

import accumax

FORMS = peers.NONE, "multisteps", "train_step", "value_and_grad"
NEAR = 0.02


def rows(on: Device, target: str, width: float = 1) -> list[Row]:
    """`audit/TARGET/MODEL/FORM`, how many there are, and how many are near 1."""
    haste: Any = programs.HASTE if on.platform == "cpu" else None
    found = []
    for model in zoo.models(width):
        if model.name == "resnet":
            continue  # minutes a program, on some targets
        steps = peers.steps(model)
        for name in FORMS:
            form, count = steps[name]
            state = jax.eval_shape(form.init, model.params)
            step = programs.lowered(form, model.params, state, model.batch(count), on)
            memory = accumax.audit(step.compile(compiler_options=haste)).memory
            case = f"audit/{target}/{model.name}/{name}"
            ratio = memory.peak / (memory.total or 0)
            found.append(Row(case, ratio, "x the compiler's total"))
    off = [abs((row.value or 0) - 1) for row in found]
    return [
        *found,
        Row(f"audit/{target}/programs", len(off), "programs"),
        Row(f"audit/{target}/near", sum(x <= NEAR for x in off), "within 2 %"),
        Row(f"audit/{target}/furthest", 100 * max(off), "% off"),
    ]
