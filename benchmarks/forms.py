"""The forms of an optimizer step, of a train step and of a gradient that the benchmarks
compare.

The same optimizer in all of them, in windows of eight, or eight microbatches in a call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

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

ONE = "plain AdamW, one microbatch"
WHOLE = "the whole batch at once"
MICROBATCHING = "optax.microbatching"
SCAN = "lax.scan over a tree"
VALUE_AND_GRAD = "value_and_grad"
WEIGHTED_GRADIENT = "value_and_grad(weighted=True)"
DIVIDED = "train_step(microbatch_size)"

EVERY = 8
ADAMW = optax.adamw(1e-3)


# `(params, batch) -> (value, gradient)`
Gradient: TypeAlias = Callable[[Any, Any], tuple[jax.Array, Any]]


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


def whole(form: Form, gradient: Gradient) -> Form:
    """The train step that gives an optimizer step the gradient."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = gradient(params, batch)
        params, state = form.step(params, state, grads)
        return params, state, value

    return Form(step, form.init)


def jitted(form: Form) -> Any:
    """The step, jitted. What it only writes over is an argument too, and donated."""
    return jax.jit(form.step, donate_argnums=(0, 1), keep_unused=True)


def kept(gradient: Gradient) -> Form:
    """A step that computes a gradient, in the memory of the one before."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        del state
        value, grads = gradient(params, batch)
        return params, grads, value

    return Form(step, lambda params: jax.tree.map(jnp.zeros_like, params))


def added(gradient: Gradient) -> Form:
    """A step that adds a gradient to those before: `acc += g`."""

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = gradient(params, batch)
        return params, jax.tree.map(jnp.add, state, grads), value

    return Form(step, kept(gradient).init)


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

    def fused(loss: Callable[..., Any], **options: Any) -> Form:
        return Form(accumax.train_step(loss, tx, **options), tx.init)

    gradient = jax.value_and_grad(loss)
    optimizers = optimizer_steps(inner)
    steps = {name: whole(form, gradient) for name, form in optimizers.items()}
    steps[TRAIN_STEP] = fused(loss)
    steps["train_step(in_place=False)"] = fused(loss, in_place=False)
    if weighted_loss is not None:
        steps[WEIGHTED] = fused(weighted_loss, weighted=True)
    return steps


def gradients(
    loss: Callable[..., jax.Array],
    weighted_loss: Callable[..., Any] | None = None,
    rows: int = 1,
) -> dict[str, Gradient]:
    """Gradients of a whole batch, in microbatches of `rows`.

    Args:
      loss: `(params, batch) -> () float`, a mean over the rows.
      weighted_loss: `(params, batch) -> (loss_sum, weight)`, for one more form.
      rows: of a microbatch, which divides the batch for the forms that are not ours.
    """

    def ours(loss: Callable[..., Any], **options: Any) -> Gradient:
        return accumax.value_and_grad(loss, microbatch_size=rows, **options)

    plain = jax.value_and_grad(loss)
    found: dict[str, Gradient] = {WHOLE: plain}
    if hasattr(optax, "microbatching"):  # Optax 0.2.5 has none
        found[MICROBATCHING] = peer(plain, rows)
    found[SCAN] = scanned(plain, rows)
    found[VALUE_AND_GRAD] = ours(loss)
    found["value_and_grad(in_place=False)"] = ours(loss, in_place=False)
    if weighted_loss is not None:
        found[WEIGHTED_GRADIENT] = ours(weighted_loss, weighted=True)
    return found


def peer(gradient: Gradient, rows: int) -> Gradient:
    """`optax.microbatching`."""
    mean = optax.microbatching.AccumulationType.MEAN
    return optax.microbatching.microbatch(gradient, 1, rows, mean)


def scanned(
    gradient: Gradient, rows: int, unroll: bool = False, strided: bool = False
) -> Gradient:
    """What one writes by hand: a scan that carries a gradient tree.

    With `strided`, microbatch i of k has every k-th row, from i on: of a batch that is
    sharded along its rows, each device would else compute everything.
    """

    def divide(x: jax.Array) -> jax.Array:
        if strided:
            return x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(-1, rows, *x.shape[1:])

    def fun(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        split = jax.tree.map(divide, batch)

        def body(sums: Any, microbatch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(params, microbatch)), None

        count = len(jax.tree.leaves(split)[0])
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(body, zeros, split, unroll=unroll)
        return jax.tree.map(lambda x: x / count, sums)

    return fun


def divided_steps(
    loss: Callable[..., jax.Array], weighted_loss: Callable[..., Any], rows: int = 1
) -> dict[str, Form]:
    """Train steps that divide each call into microbatches, as `gradients` does."""
    found = gradients(loss, weighted_loss, rows).items()
    steps = {name: whole(applied(ADAMW), gradient) for name, gradient in found}
    tx = accumax.accumulate(ADAMW, 2)  # windows of two such calls
    step = accumax.train_step(loss, tx, microbatch_size=rows)
    return steps | {DIVIDED: Form(step, tx.init)}


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
