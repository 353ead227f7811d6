"""Every form of a train step that is compared: today's peers, and ours.

The same optimizer and the same eight microbatches in all of them, each peer as its own
documentation has it. Names are those of rows.

    none             the plain step on one microbatch: no accumulation
    whole            the plain step on all eight at once
    multisteps       optax.MultiSteps
    apply_every      optax.apply_every after the optimizer, which runs in every call
    aggregating      optax.experimental.aggregating: accumulate, then the optimizer
    keras            keras.optimizers.AdamW(gradient_accumulation_steps=8) on JAX, where
                     Keras is installed; only in what runs, because it holds its state
    microbatching    optax.microbatching
    scan             a scan that carries a gradient tree, as large trainings write it
    array_refs       the recipe of JAX's documentation: refs, carried by a scan
    accumulate, apply_gradients, train_step, value_and_grad, train_step_divided: ours;
                     the last divides each call into microbatches
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import forms
import jax
import jax.numpy as jnp
import optax
import zoo
from forms import EVERY, Form

import accumax

try:
    from optax.experimental import aggregating
except ImportError:  # Optax 0.2.5
    aggregating: Any = None

# The AdamW of Keras, in place of these.
KERAS = {id(forms.ADAMW): None, id(zoo.ADAMW): 1.0}  # the norm to clip to

NONE, WHOLE = "none", "whole"
ACROSS = "accumulate", "apply_gradients", "train_step"
WITHIN = "value_and_grad", "train_step_divided"
OURS = ACROSS + WITHIN
ACROSS_PEERS = "multisteps", "apply_every", "aggregating", "keras"
WITHIN_PEERS = "microbatching", "scan", "array_refs"
PEERS = ACROSS_PEERS + WITHIN_PEERS


class Step(NamedTuple):
    """A train step and the microbatches of one call."""

    form: Form
    microbatches: int


def optimizers(inner: optax.GradientTransformation) -> dict[str, Form]:
    """Steps that are given a gradient; eight calls are a window."""
    tx = accumax.accumulate(inner, EVERY)
    multi = optax.MultiSteps(inner, EVERY).gradient_transformation()

    def fused(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return accumax.apply_gradients(tx, params, state, grads)

    found = {
        "multisteps": forms.applied(multi),
        "apply_every": forms.applied(optax.chain(inner, optax.apply_every(EVERY))),
    }
    if aggregating is not None:
        mean = aggregating.average_incrementally_updates(None, EVERY)
        process = aggregating.process(optax.identity(), mean, inner)
        found["aggregating"] = forms.applied(process)
    if id(inner) in KERAS and importlib.util.find_spec("keras"):
        found["keras"] = in_keras(KERAS[id(inner)])
    return found | {
        "accumulate": forms.applied(tx),
        "apply_gradients": Form(fused, tx.init),
    }


def in_keras(clip: float | None) -> Form:
    """AdamW with the values of `optax.adamw`, clipped to this norm of all gradients."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras  # pyright: ignore[reportMissingImports]

    made: dict[Any, Any] = {}

    def optimizer(params: Any) -> Any:
        leaves = jax.tree.leaves(params)
        key = tuple((x.shape, str(x.dtype)) for x in leaves)
        if key not in made:
            made[key] = keras.optimizers.AdamW(
                1e-3,
                weight_decay=1e-4,
                epsilon=1e-8,
                global_clipnorm=clip,
                gradient_accumulation_steps=EVERY,
            )
            with jax.ensure_compile_time_eval():
                made[key].build(
                    [
                        keras.Variable(initializer="zeros", shape=shape, dtype=dtype)
                        for shape, dtype in key
                    ]
                )
        return made[key]

    def init(params: Any) -> list[jax.Array]:
        return [jnp.asarray(x.value) for x in optimizer(params).variables]

    def step(params: Any, state: list[jax.Array], grads: Any) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(params)
        grads = jax.tree.leaves(grads)
        new, state = optimizer(params).stateless_apply(state, grads, leaves)
        return structure.unflatten(new), state

    return Form(step, init)


def gradients(
    loss: Callable[..., jax.Array], rows: int, unroll: bool = False
) -> dict[str, forms.Gradient]:
    """The peers' gradients of a whole batch, in microbatches of `rows`."""
    plain = jax.value_and_grad(loss)
    found: dict[str, forms.Gradient] = {WHOLE: plain}
    if hasattr(optax, "microbatching"):  # Optax 0.2.5 has none
        found["microbatching"] = forms.peer(plain, rows)
    found["scan"] = forms.scanned(plain, rows, unroll)
    found["array_refs"] = in_refs(loss, rows)
    return found


def in_refs(loss: Callable[..., jax.Array], rows: int) -> forms.Gradient:
    """The backward pass of each microbatch adds into refs."""

    def fun(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        split = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)
        count = len(jax.tree.leaves(split)[0])
        sums = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

        def body(total: jax.Array, microbatch: Any) -> tuple[jax.Array, None]:
            vjp: Any
            value, vjp = jax.vjp(lambda p: loss(p, microbatch), params)
            vjp.with_refs(sums)(jnp.ones_like(value) / count)
            return total + value / count, None

        value, _ = jax.lax.scan(body, jnp.zeros(()), split)
        return value, jax.tree.map(jax.freeze, sums)

    return fun


def steps(model: zoo.Model, unroll: bool = False) -> dict[str, Step]:
    """All train steps of `model`; `unroll` the loops over microbatches that can be."""
    loss, inner, rows = model.loss, model.inner, model.x.shape[0]
    ours = model.weighted or loss
    options: dict[str, Any] = {"weighted": model.weighted is not None}
    divided: dict[str, Any] = {"microbatch_size": rows, "unroll": unroll, **options}
    tx, twice = accumax.accumulate(inner, EVERY), accumax.accumulate(inner, 2)
    gradient, plain = jax.value_and_grad(loss), forms.applied(inner)
    found = {NONE: Step(forms.whole(plain, gradient), 1)}
    for name, form in optimizers(inner).items():
        found[name] = Step(forms.whole(form, gradient), 1)
    step = accumax.train_step(ours, tx, **options)
    found["train_step"] = Step(Form(step, tx.init), 1)
    for name, fun in gradients(loss, rows, unroll).items():
        found[name] = Step(forms.whole(plain, fun), EVERY)
    within = accumax.value_and_grad(ours, **divided)
    found["value_and_grad"] = Step(forms.whole(plain, within), EVERY)
    step = accumax.train_step(ours, twice, **divided)
    found["train_step_divided"] = Step(Form(step, twice.init), EVERY)
    return found
