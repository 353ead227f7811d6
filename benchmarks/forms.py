"""The forms of an optimizer step and of a train step that the benchmarks compare.

The same optimizer in all of them, in windows of eight. Jit each with
`donate_argnums=(0, 1)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import accumax

PLAIN = "plain AdamW"
MULTISTEPS = "optax.MultiSteps"
ACCUMULATE = "accumulate"
APPLY_GRADIENTS = "apply_gradients"
TRAIN_STEP = "train_step"
WEIGHTED = "train_step(weighted=True)"

EVERY = 8
ADAMW = optax.adamw(1e-3)


class Form(NamedTuple):
    """A step and the state it begins with.

    Attributes:
      step: `(params, state, x) -> (params, state, ...)`; x are the gradients for an
        optimizer step, a batch for a train step.
      init: `(params) -> state`.
    """

    step: Callable[..., Any]
    init: Callable[[Any], Any]


def applied(tx: optax.GradientTransformation) -> Form:
    """`tx.update`, then `optax.apply_updates`."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Form(step, tx.init)


def whole(form: Form, loss: Callable[..., jax.Array]) -> Form:
    """The train step that gives an optimizer step the gradient of `loss`."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        params, state = form.step(params, state, grads)
        return params, state, value

    return Form(step, form.init)


def optimizer_steps(inner: optax.GradientTransformation = ADAMW) -> dict[str, Form]:
    """Steps that are given the gradients."""
    tx = accumax.accumulate(inner, EVERY)

    def fused(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return accumax.apply_gradients(tx, params, state, grads)

    return {
        PLAIN: applied(inner),
        MULTISTEPS: applied(optax.MultiSteps(inner, EVERY).gradient_transformation()),
        ACCUMULATE: applied(tx),
        APPLY_GRADIENTS: Form(fused, tx.init),
    }


def train_steps(
    loss: Callable[..., jax.Array],
    weighted_loss: Callable[..., Any] | None = None,
    inner: optax.GradientTransformation = ADAMW,
) -> dict[str, Form]:
    """Steps that are given a batch.

    Args:
      loss: `(params, batch) -> () float`.
      weighted_loss: `(params, batch) -> (loss_sum, weight)`, for one more form.
      inner: the optimizer.
    """
    tx = accumax.accumulate(inner, EVERY)

    def fused(loss: Callable[..., Any], **options: bool) -> Form:
        return Form(accumax.train_step(loss, tx, **options), tx.init)

    steps = {name: whole(form, loss) for name, form in optimizer_steps(inner).items()}
    steps[TRAIN_STEP] = fused(loss)
    steps["train_step(in_place=False)"] = fused(loss, in_place=False)
    if weighted_loss is not None:
        steps[WEIGHTED] = fused(weighted_loss, weighted=True)
    return steps


def matrices(count: int = 16, width: int = 1024) -> list[jax.ShapeDtypeStruct]:
    """Parameters that are all of one shape, so that each copy of one is seen."""
    return [jax.ShapeDtypeStruct((width, width), jnp.float32)] * count


def matrices_loss(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """A loss that uses each matrix once. x: (rows, width) float32."""
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x * x)


def weighted_matrices_loss(
    params: list[jax.Array], x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same as a sum over the rows that are not padding, and their number."""
    rows = jnp.sum(jnp.any(x != 0, -1))
    return matrices_loss(params, x) * rows, rows
