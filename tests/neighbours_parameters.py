"""Rows of docs/neighbours.md: what may be a parameter."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import optax
import pytest
from neighbours import ADAM, FORMS, SGD, STEPS, K, accumulated, is_exact, table, train
from problems import cast, data, init, loss_fn, same_bits

import accumax
from accumax import accumulate

ROWS, row = table()


def as_parameters(wrap, unwrap, forms=("update", "train_step")):
    params = wrap(init())

    def loss(params, batch):
        return loss_fn(unwrap(params), batch)

    for form in forms:
        got, _ = accumulated(accumulate(ADAM, K), params, loss, form=form)
        assert jax.tree.structure(got) == jax.tree.structure(params)
        is_exact(unwrap(got), ADAM)


@row("dicts, lists, tuples, None")
def _():
    """`tx.init({'w': w, 'layers': [a, None]})` | Leaves may be of any shape, also ().
    None stays None."""
    as_parameters(lambda p: (p, [None]), lambda p: p[0], FORMS)


@row("one array, also a scalar")
def _():
    """`tx.init(jnp.float32(1.0))` | The tree may be a single leaf."""
    params = jnp.float32(0.3)

    def loss(params, batch):
        return loss_fn(init(params.dtype) | {"scale": params}, batch)

    for form in FORMS:
        got, _ = accumulated(accumulate(SGD, K), params, loss, form=form)
        is_exact(got, SGD, loss=loss, params=params)


class Tuple(NamedTuple):
    net: Any
    none: None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["net"], meta_fields=["depth"]
)
@dataclasses.dataclass
class Dataclass:
    net: Any
    depth: int = 2


class Struct(flax.struct.PyTreeNode):
    net: Any
    depth: int = flax.struct.field(pytree_node=False, default=2)


class Module(eqx.Module):
    net: Any
    activation: Callable  # a leaf that is a function
    depth: int = eqx.field(static=True, default=2)


@row("NamedTuples")
def _():
    """`class Params(NamedTuple)` | As dicts."""
    as_parameters(Tuple, lambda p: p.net)


@row("dataclasses")
def _():
    """`jax.tree_util.register_dataclass(Params, ...)` | Static fields pass through
    unchanged."""
    as_parameters(Dataclass, lambda p: p.net)


@row("Flax: variables, `struct.dataclass`, `FrozenDict`")
def _():
    """`tx.init(variables['params'])` | As dicts and dataclasses."""
    as_parameters(Struct, lambda p: p.net)
    as_parameters(flax.core.freeze, flax.core.unfreeze)


@row("Equinox modules")
def _():
    """`eqx.filter_jit(accumax.train_step(loss, tx))` | `tx.init(model)`, without
    `eqx.filter`: functions and other static leaves pass through unchanged. With
    `tx.update` use `eqx.filter_grad` and `eqx.apply_updates`."""
    tx = accumulate(ADAM, K)

    def loss(model, batch):
        assert model.depth == 2
        assert model.activation is jnp.tanh
        return loss_fn(model.net, batch)

    def by_update(model, state, call, window):
        grads = eqx.filter_grad(loss)(model, call)
        updates, state = tx.update(grads, state, model)
        return eqx.apply_updates(model, updates), state

    def by_apply_gradients(model, state, call, window):
        grads = eqx.filter_grad(loss)(model, call)
        return accumax.apply_gradients(tx, model, state, grads)

    def by_train_step(model, state, call, window):
        return accumax.train_step(loss, tx)(model, state, call)[:2]

    for step in (by_update, by_apply_gradients, by_train_step):
        model = Module(init(), jnp.tanh)
        model, _ = train(eqx.filter_jit(step), model, tx.init(model))
        is_exact(model.net, ADAM)


@row("integers and PRNG keys", works="with a note")
def _():
    """`{'w': w, 'step': 0, 'key': jax.random.key(0)}` | They pass through unchanged.
    Use `train_step` or `apply_gradients`: `optax.apply_updates` cannot add to a key."""
    rest = {"step": jnp.int32(7), "key": jax.random.key(3)}
    tx = accumulate(ADAM, K)

    def loss(params, batch):
        return loss_fn(params["net"], batch)

    def by_apply_gradients(params, state, call, window):
        net = jax.grad(loss_fn)(params["net"], call)
        grads = {"net": net, "step": None, "key": None}
        return accumax.apply_gradients(tx, params, state, grads)

    def by_train_step(params, state, call, window):
        return accumax.train_step(loss, tx)(params, state, call)[:2]

    for step in (by_apply_gradients, by_train_step):
        params = {"net": init()} | rest
        params, _ = train(jax.jit(step), params, tx.init(params))
        is_exact(params["net"], ADAM)
        assert same_bits(*(jax.random.key_data(x["key"]) for x in (params, rest)))
        assert params["step"] == 7
    with pytest.raises(TypeError):
        optax.apply_updates(rest, {"step": None, "key": jnp.float32(0)})


@row(
    "complex numbers",
    works="with a note",
    optax_names="contrib.split_real_and_imaginary",
)
def _():
    """`accumulate(optax.chain(conjugate, adam), k)` | As in JAX alone, the gradient
    must be conjugated before a step: `conjugate = optax.stateless(lambda g, p:
    jax.tree.map(jnp.conj, g))`. Inside, `train_step` applies it too. For Adam on the
    real and the imaginary part, use `contrib.split_real_and_imaginary`."""
    conjugate = optax.stateless(lambda g, p: jax.tree.map(jnp.conj, g))
    split = optax.contrib.split_real_and_imaginary
    params = {"re": jnp.array([0.3, -0.2, 0.5]), "im": jnp.array([-0.1, 0.4, 0.2])}

    def join(parts):
        return {"z": parts["re"] + 1j * parts["im"]}

    def parts(params):
        return {"re": jnp.real(params["z"]), "im": jnp.imag(params["z"])}

    def loss(params, batch):
        return jnp.mean(jnp.abs(batch["x"] @ params["z"] - batch["y"][:, 0]) ** 2)

    def loss_of_parts(parts, batch):
        return loss(join(parts), batch)

    for tx, real, form in [
        (accumulate(optax.chain(conjugate, SGD), K), SGD, "update"),
        (accumulate(optax.chain(conjugate, split(ADAM)), K), ADAM, "train_step"),
        (optax.chain(conjugate, split(accumulate(ADAM, K))), ADAM, "update"),
    ]:
        got, _ = accumulated(tx, join(params), loss, form=form)
        is_exact(parts(got), real, loss=loss_of_parts, params=params)


@row("bfloat16, float16")
def _():
    """`tx.init(params_in_bfloat16)` | The sum is float32 and the mean reaches the
    optimizer in float32; the parameters keep their dtype."""
    for dtype, form in [(jnp.bfloat16, "update"), (jnp.float16, "train_step")]:
        tx, batches = accumulate(SGD, K), cast(data(STEPS), dtype)
        got, state = accumulated(tx, init(dtype), form=form, batches=batches)
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
        sums = jax.tree.leaves(state.acc_grads)
        assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}
        is_exact(got, SGD, params=init(dtype), dtype=dtype)
