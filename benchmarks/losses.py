"""Three losses of one model: the memory of their gradient, together and in turn.

The losses differ in cost, and each sees a view of the batch of its own, as augmented
and contrastive ones do. (Where all see the same, XLA runs a trunk that they share once
for all; the loop over losses runs it for each.) Nothing is rematerialised.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import forms
import jax
import jax.numpy as jnp
import report
from devices import Device
from programs import Compiled, compiled
from results import Row

import accumax

DEPTHS = (4, 6, 8)  # the layers that a loss goes through
PARTS = 4  # microbatches, where the losses are also divided

ALONE = "the costliest alone"
SUM = "their sum"
ONE_BY_ONE = "grad(l1) + grad(l2) + grad(l3)"
DIVIDED_ALONE = f"the costliest alone, microbatches={PARTS}"
IN_TURN = "value_and_grad of the three, microbatches=1"
DIVIDED = f"value_and_grad of the three, microbatches={PARTS}"
# As rows have them, each relative to the costliest loss alone, in as many microbatches.
NAMES = {
    "sum": (SUM, ALONE),
    "one_by_one": (ONE_BY_ONE, ALONE),
    "in_turn": (IN_TURN, ALONE),
    "divided": (DIVIDED, DIVIDED_ALONE),
}


class Model(NamedTuple):
    """Attributes:
    name: what the losses share.
    params: shapes.
    losses: `(params, batch) -> () float`, the costliest last.
    """

    name: str
    params: Any
    losses: list[Callable[[Any, jax.Array], jax.Array]]


def trunk(width: int) -> Model:
    """One stack of layers, which each loss leaves at a depth of its own."""

    def loss(depth: int) -> Callable[[Any, jax.Array], jax.Array]:
        return lambda params, x: distance(params[:depth], x, depth)

    params = forms.matrices(max(DEPTHS), width)
    return Model("one trunk", params, [loss(depth) for depth in DEPTHS])


def heads(width: int) -> Model:
    """A trunk of two layers, and layers of its own for each loss."""

    def loss(n: int) -> Callable[[Any, jax.Array], jax.Array]:
        def fun(params: Any, x: jax.Array) -> jax.Array:
            return distance(params["trunk"] + params["heads"][n], x, n + 1)

        return fun

    params = {
        "trunk": forms.matrices(2, width),
        "heads": [forms.matrices(depth - 2, width) for depth in DEPTHS],
    }
    return Model("a trunk and three heads", params, [loss(n) for n in range(3)])


def distance(layers: list[jax.Array], x: jax.Array, view: int) -> jax.Array:
    x = x * view
    for w in layers:
        x = jnp.tanh(x @ w)
    return jnp.mean((x - view) ** 2)


def gradients(
    losses: list[Callable[[Any, jax.Array], jax.Array]],
) -> dict[str, forms.Gradient]:
    def joint(params: Any, x: jax.Array) -> jax.Array:
        return sum((loss(params, x) for loss in losses), jnp.zeros(()))

    def sequential(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        value, grads = jax.value_and_grad(losses[0])(params, x)
        for loss in losses[1:]:
            more, others = jax.value_and_grad(loss)(params, x)
            value, grads = value + more, jax.tree.map(jnp.add, grads, others)
        return value, grads

    last = losses[-1]
    return {
        ALONE: jax.value_and_grad(last),
        SUM: jax.value_and_grad(joint),
        ONE_BY_ONE: sequential,
        IN_TURN: accumax.value_and_grad(losses, microbatches=1),
        DIVIDED_ALONE: accumax.value_and_grad(last, microbatches=PARTS),
        DIVIDED: accumax.value_and_grad(losses, microbatches=PARTS),
    }


def shape(width: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((16 * width, width), jnp.float32)


def figures(model: Model, width: int, on: Device) -> dict[str, Compiled]:
    return {
        name: compiled(forms.kept(gradient), model.params, shape(width), on)
        for name, gradient in gradients(model.losses).items()
    }


def rows(on: Device, target: str, width: int = 1024) -> list[Row]:
    """`losses/{trunk, heads}/TARGET/FORM`: temporary memory."""
    found = []
    for make in (trunk, heads):
        each = figures(make(width), width, on)
        for form, (name, alone) in NAMES.items():
            row = f"losses/{make.__name__}/{target}/{form}"
            ratio = each[name].temp / each[alone].temp
            found.append(Row(row, ratio, "x the costliest loss"))
    return found


def table(width: int, on: Device) -> list[report.Bar]:
    """Prints a table for each model; gives their bars."""
    bars = []
    for model in (trunk(width), heads(width)):
        found = figures(model, width, on)
        alone = found[ALONE].temp
        report.table(
            f"Gradient of three losses, {model.name}, "
            f"{shape(width).shape[0]} rows of {width}",
            ["", "temp", "/costliest"],
            [
                [name, f"{c.temp:.3f}", f"{c.temp / alone:.3f}"]
                for name, c in found.items()
            ],
        )
        what = f"temp of three losses / the costliest, {model.name}"
        divided = found[DIVIDED].temp / found[DIVIDED_ALONE].temp
        bars += [
            (what, found[IN_TURN].temp / alone, 1.25),
            (f"{what}, microbatches={PARTS} for both", divided, 1.25),
        ]
    return bars
