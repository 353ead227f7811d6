"""What 0.1.0 got wrong, or took without a word. Each of these failed before."""

import gc
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from problems import data, distance, init, loss_fn

import accumax
import accumax.linen

SGD = optax.sgd(1.0)


class Norm(eqx.Module):
    scale: jax.Array
    eps: float = 0.01
    repeat: int = 2

    def __call__(self, x):
        assert isinstance(self.eps, float)
        assert isinstance(self.repeat, int)
        return x * self.scale / jnp.sqrt(jnp.mean(x**2) + self.eps)


def module_loss(module, x):
    return jnp.mean(jax.vmap(module)(x) ** 2)


# The Python numbers of an Equinox module were trained.


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}], ids=str)
def test_the_python_numbers_of_an_equinox_module_are_not_trained(options):
    module, x = Norm(jnp.ones(3)), jnp.arange(12.0).reshape(4, 3)
    tx = accumax.accumulate(optax.adam(0.1), 2)
    step = eqx.filter_jit(accumax.train_step(module_loss, tx, **options))
    results = []
    for part in (module, eqx.filter(module, eqx.is_inexact_array)):
        new, state = module, tx.init(part)
        for _ in range(4):
            new, state, _ = step(new, state, x)
        assert new.eps == 0.01
        results.append(new.scale)
    np.testing.assert_array_equal(*results)
    assert distance(results[0], jnp.ones(3)) > 0.1
    grads = eqx.filter_jit(accumax.grad(module_loss, microbatch_size=2))(module, x)
    want = eqx.filter_grad(module_loss)(module, x)
    assert jax.tree.structure(grads) == jax.tree.structure(want)


def test_a_state_of_a_part_of_a_module_says_what_is_trained():
    class Two(eqx.Module):
        first: Norm
        second: Norm

        def __call__(self, x):
            return self.second(self.first(x))

    x = jnp.arange(12.0).reshape(4, 3)
    model = Two(Norm(jnp.ones(3)), Norm(jnp.full(3, 0.5)))
    part = eqx.tree_at(lambda m: m.second.scale, model, None)
    tx = accumax.accumulate(optax.adam(0.1), 1)
    state = tx.init(eqx.filter(part, eqx.is_inexact_array))
    for options in ({}, {"microbatch_size": 2}, {"in_place": False}):
        step = eqx.filter_jit(accumax.train_step(module_loss, tx, **options))
        new, *_ = step(model, state, x)
        np.testing.assert_array_equal(new.second.scale, model.second.scale)
        assert distance(new.first.scale, model.first.scale) > 0.05


class Scaled(eqx.Module):
    w: Any
    scale: Any

    def __call__(self, x):
        return x @ self.w * self.scale


FORMS = ["update", "apply_gradients", "train_step", "train_step_divided"]


def after_a_window(form, tx, model, state, x, jit):
    """Two calls of two rows each, in any form."""

    def grad(model, x):
        return eqx.filter_grad(module_loss)(model, x)

    def update(model, state, x):
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grad(model, x), state, params)
        return eqx.apply_updates(model, updates), state

    options = {"microbatch_size": 1} if form == "train_step_divided" else {}
    train_step = accumax.train_step(module_loss, tx, **options)
    step = {
        "update": update,
        "apply_gradients": lambda model, state, x: accumax.apply_gradients(
            tx, model, state, grad(model, x)
        ),
    }.get(form, lambda *args: train_step(*args)[:2])
    for rows in (x[:2], x[2:]):
        model, state = jit(step)(model, state, rows)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("jit", [eqx.filter_jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    "scale",
    [jnp.asarray(0.2), jnp.asarray([0.2, 0.2, 0.2]), np.float32(0.2), 0.2, None],
    ids=["weak", "strong", "numpy", "number", "none"],
)
def test_the_arrays_of_an_equinox_module_are_trained(form, jit, scale):
    """jnp.asarray(0.2) is of weak type, and was taken for a Python number."""
    model = Scaled(jnp.full((3, 3), 0.5), jnp.ones(3) if scale is None else scale)
    if scale is None:  # it stays as it is
        model = eqx.tree_at(lambda m: m.scale, model, replace_fn=np.ones_like)
    x = jnp.arange(12.0).reshape(4, 3) / 10
    adam = optax.adam(0.1)
    trained = eqx.filter(model, eqx.is_inexact_array)
    if scale is None:
        trained = Scaled(trained.w, None)
    tx = accumax.accumulate(adam, 2)
    got = after_a_window(form, tx, model, jit(tx.init)(trained), x, jit)

    def of_trained(trained):
        return module_loss(eqx.combine(trained, model), x)

    updates, _ = adam.update(jax.grad(of_trained)(trained), adam.init(trained), trained)
    want = eqx.apply_updates(model, updates)
    assert distance(got.w, want.w) < 1e-6 < distance(got.w, model.w)
    assert distance(got.scale, want.scale) < 1e-6
    moved = not isinstance(scale, float | None)
    assert (distance(got.scale, model.scale) > 0.05) == moved


@pytest.mark.parametrize("kind", [np.float32, np.ndarray, jax.Array, jnp.bfloat16])
@pytest.mark.parametrize("size", [None, 2])
def test_a_class_of_arrays_is_no_array(kind, size):
    """np.float32 has a `dtype` and a `shape`: descriptors."""

    class Cast(eqx.Module):
        w: jax.Array
        dtype: Any

    def loss(module, x, dtype):
        assert module.dtype is dtype
        return jnp.mean((x @ module.w) ** 2)

    module, x = Cast(jnp.ones(3), kind), jnp.ones((4, 3))
    tx = accumax.accumulate(SGD, 1)
    step = accumax.train_step(loss, tx, microbatch_size=size)
    new, *_ = eqx.filter_jit(step)(module, tx.init(module), x, kind)
    assert new.dtype is kind
    np.testing.assert_allclose(new.w, -5 * np.ones(3))


def test_a_number_of_a_module_that_jit_made_an_array_is_named():
    module = Norm(jnp.ones(3))
    tx = accumax.accumulate(SGD, 1)
    with pytest.raises(
        TypeError, match=r"params\.eps is the Python number 0\.01.*filter"
    ):
        accumax.apply_gradients(tx, module, jax.jit(tx.init)(module), module)


@pytest.mark.parametrize("make", [optax.adam, optax.lion, optax.rmsprop])
def test_what_an_optimizer_lacks_for_float8_is_said(make):
    w = jnp.ones(3, jnp.float8_e4m3fn)
    tx = accumax.accumulate(make(0.1), 1)
    with pytest.raises(ValueError, match="promotion") as found:
        accumax.apply_gradients(tx, w, tx.init(w), w)
    assert "cast the mean" in found.value.__notes__[0]


def test_a_gradient_beside_a_module_of_a_name_that_begins_alike_is_an_error():
    class Params(NamedTuple):
        net: Any
        net_scale: Any

    net = Norm(jnp.ones(3), None)
    tx = accumax.accumulate(SGD, 1)
    params = Params(net, jnp.ones(2))
    with pytest.raises(ValueError, match=r"grads\.net_scale is"):
        tx.update(params, tx.init(Params(net, None)), params)


def test_the_python_numbers_of_other_trees_are_parameters():
    tx = accumax.accumulate(SGD, 1)
    step = accumax.train_step(lambda p, x: p["w"] * x, tx)
    new, *_ = step({"w": 3.0}, tx.init({"w": 3.0}), jnp.float32(2))
    assert new["w"] == 1.0


# Keywords that nobody took were swallowed.


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ({"weigth": 0.0}, "weight"),
        ({"Weight": 0.0}, "weight"),
        ({"weights": 0.0}, "weight"),
        ({"Flush": True}, "flush"),
        ({"flsh": True}, "flush"),
        ({"valeu": 1.0}, "value"),
    ],
    ids=str,
)
def test_a_misspelt_keyword_is_an_error_that_names_the_right_one(misspelt, meant):
    tx = accumax.accumulate(optax.adam(0.1), 2, averaged_args=("value",))
    state = tx.init(1.0)
    step = accumax.train_step(lambda w, x: w * x, tx)
    calls = [
        lambda **kw: tx.update(1.0, state, 1.0, **kw),
        lambda **kw: accumax.apply_gradients(tx, 1.0, state, 1.0, **kw),
        lambda **kw: step(1.0, state, jnp.float32(1), **kw),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"Is {meant}="):
            call(**({"value": 1.0} | misspelt))


@pytest.mark.parametrize("inner", [SGD, optax.adam(0.1), optax.scale_by_adam()])
def test_the_fused_forms_take_no_keyword_that_nobody_uses(inner):
    tx = accumax.accumulate(inner, 2)
    state = tx.init(1.0)
    step = accumax.train_step(lambda w, x: w * x, tx)
    with pytest.raises(TypeError, match="temperature="):
        accumax.apply_gradients(tx, 1.0, state, 1.0, temperature=0.5)
    with pytest.raises(TypeError, match="temperature="):
        step(1.0, state, jnp.float32(1), temperature=0.5)
    with pytest.raises(TypeError, match="temperature="):
        accumax.flush(tx, 1.0, state, temperature=0.5)
    # In a chain it may be for another member.
    optax.chain(SGD, tx).update(1.0, (SGD.init(1.0), state), 1.0, temperature=0.5)


def test_a_keyword_for_a_loss_that_takes_any_is_not_swallowed():
    def fun(w, x, **options):
        return w * x

    tx = accumax.accumulate(optax.chain(optax.adam(0.1)), 2)
    step = accumax.train_step(fun, tx)
    with pytest.raises(TypeError, match=r"deterministic.*functools.partial"):
        step(1.0, tx.init(1.0), jnp.float32(1), deterministic=True)
    step(1.0, tx.init(1.0), jnp.float32(1), value=1.0, weight=2.0)


# All microbatches had one dropout mask.


def noisy(w, x, extra):
    key = extra["key"] if isinstance(extra, dict) else extra
    return jnp.mean(w * x * jax.random.bernoulli(key, 0.5, x.shape))


@pytest.mark.parametrize(
    "extra", [jax.random.key(0), {"key": jax.random.key(0), "rate": 0.5}], ids=str
)
def test_a_key_that_all_microbatches_would_share_is_an_error(extra):
    with pytest.raises(ValueError, match="same random numbers"):
        accumax.grad(noisy, microbatch_size=2)(1.0, jnp.ones(4), extra)


def test_a_key_among_the_parameters_is_an_error():
    params = {"w": 1.0, "key": jax.random.key(0)}
    fun = accumax.grad(lambda p, x: noisy(p["w"], x, p["key"]), microbatch_size=2)
    with pytest.raises(ValueError, match=r"\['key'\] is a PRNG key"):
        fun(params, jnp.ones(4))


def test_what_may_be_a_raw_key_is_said():
    with pytest.warns(UserWarning, match=r"uint32\[2\].*rng_argnums=2"):
        accumax.grad(noisy, microbatch_size=2)(1.0, jnp.ones(4), jax.random.PRNGKey(0))


def test_a_key_in_a_field_of_a_train_state_is_an_error_with_microbatches():
    class State(accumax.linen.TrainState):
        key: jax.Array

    state = State.create(
        apply_fn=None, params=1.0, tx=SGD, every=1, key=jax.random.key(0)
    )
    fun = lambda w, x, key: noisy(w, x, key)  # noqa: E731
    with pytest.raises(ValueError, match="'key' is a PRNG key"):
        State.train_step(fun, fields=("key",), microbatch_size=2)(state, jnp.ones(4))
    State.train_step(fun, rngs=("key",), microbatch_size=2)(state, jnp.ones(4))


# The number of rows was that of calls.


def test_a_mean_of_sums_is_told_over_how_many():
    tx = accumax.accumulate(SGD, 2, reduction="mean_of_sums")
    state = tx.init(1.0)
    step = accumax.train_step(lambda w, x: jnp.sum(w * x), tx)
    within = accumax.train_step(lambda w, x: jnp.sum(w * x), tx, microbatch_size=2)
    for call in (
        lambda: tx.update(1.0, state),
        lambda: accumax.apply_gradients(tx, 1.0, state, 1.0),
        lambda: step(1.0, state, jnp.ones(4)),
        lambda: within(1.0, state, jnp.ones(4)),
    ):
        with pytest.raises(TypeError, match=r"weight=.*weighted=True"):
            call()
    tx.update(1.0, state, weight=4)


def test_the_state_of_another_optimizer_is_an_error():
    adam, sgd = (accumax.accumulate(tx, 2) for tx in (optax.adam(0.1), SGD))
    state = adam.init(1.0)
    step = accumax.train_step(lambda w, x: w * x, sgd)
    for call in (
        lambda: accumax.apply_gradients(sgd, 1.0, state, 1.0),
        lambda: step(1.0, state, jnp.float32(1)),
        lambda: accumax.flush(sgd, 1.0, state),
        lambda: sgd.update(1.0, state, 1.0),
    ):
        with pytest.raises(TypeError, match="not a state of the inner transformation"):
            call()


def test_an_inner_state_of_other_shapes_is_an_error():
    tx = accumax.accumulate(optax.adam(0.1), 2)
    small, large = tx.init(jnp.ones(2)), tx.init(jnp.ones(3))
    mixed = large._replace(inner_opt_state=small.inner_opt_state)
    with pytest.raises(ValueError, match=r"inner_opt_state.*\(2,\).*\(3,\)"):
        accumax.apply_gradients(tx, jnp.ones(3), mixed, jnp.ones(3))


# Weights that overflow.


def test_a_weight_does_not_overflow_in_a_half_precision_accumulator():
    tx = accumax.accumulate(SGD, 2, accumulator_dtype=None)
    params = jnp.zeros(2, jnp.float16)
    state = tx.init(params)
    grads = jnp.array([1e-3, 2e-3], jnp.float16)
    for _ in range(2):
        params, state = accumax.apply_gradients(tx, params, state, grads, weight=1e5)
    np.testing.assert_allclose(params, -grads, rtol=0.01)


def test_weights_whose_sum_has_no_reciprocal_are_refused():
    for weight in (1e38, 3e38):
        with pytest.raises(ValueError, match="reciprocal"):
            accumax.accumulate(SGD, 2).update(
                1.0, accumax.accumulate(SGD, 2).init(1.0), weight=weight
            )
    tx = accumax.accumulate(SGD, 2)
    step = accumax.train_step(lambda w, x: (w * x, 8e37 + 0 * x), tx, weighted=True)
    params, state = jnp.float32(1), tx.init(jnp.float32(1))
    for _ in range(2):
        params, state, _ = jax.jit(step)(params, state, jnp.float32(1))
    assert params == 1  # and not an update of 0, which nobody would see
    assert state.skipped == 1
    assert state.gradient_step == 0
    assert not state.emitted


# Schedules.


@pytest.mark.parametrize("length", [0, -3, 2.5, float("nan")])
def test_a_schedule_that_gives_no_length_is_an_error(length):
    tx = accumax.accumulate(SGD, lambda step: length)
    with pytest.raises(ValueError, match=f"every gives {length}"):
        jax.jit(tx.update)(1.0, tx.init(1.0))


# Trees.


def test_leaves_with_a_dtype_that_are_no_arrays_ride_along():
    params = {"w": jnp.ones(2), "dtype": jnp.float32, "layer": nn.Dense(2)}
    tx = accumax.accumulate(SGD, 1)
    state = tx.init(params)
    assert jax.tree.leaves(state.acc_grads)[0].shape == (2,)
    grads = {"w": jnp.ones(2), "dtype": None, "layer": None}
    new, _ = accumax.apply_gradients(tx, params, state, grads)
    np.testing.assert_array_equal(new["w"], 0)
    assert new["dtype"] is jnp.float32


def test_a_train_state_that_was_not_created_names_create():
    tx = accumax.accumulate(SGD, 1)
    state = accumax.linen.TrainState(
        step=0, apply_fn=None, params=1.0, tx=tx, opt_state=tx.init(1.0)
    )
    step = accumax.linen.TrainState.train_step(lambda w, x: w * x)
    for call in (
        lambda: state.apply_gradients(grads=1.0),
        lambda: step(state, jnp.float32(1)),
        state.flush,
    ):
        with pytest.raises(TypeError, match=r"TrainState.create"):
            call()


# Errors that did not say what to do.


def shapes(tx):
    return tx.init({"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def row_loss(w, x, *others):
    return jnp.mean(x * w)


X = jnp.ones(4)
BAD = {
    "a module": (lambda tx: tx.init(nn.Dense(2)), TypeError, "is a Dense"),
    "a module, differentiated": (
        lambda tx: accumax.grad(row_loss, microbatch_size=2)(nn.Dense(2), X),
        TypeError,
        "Argument 0 is a Dense",
    ),
    "shapes": (shapes, TypeError, "eval_shape"),
    "MultiSteps": (
        lambda tx: accumax.accumulate(optax.MultiSteps(SGD, 2), 2),
        TypeError,
        "accumulate replaces it",
    ),
    "has_updated": (lambda tx: tx.has_updated, AttributeError, "accumax.has_updated"),
    "gradient_transformation": (
        lambda tx: tx.gradient_transformation(),
        AttributeError,
        "Use tx itself",
    ),
    "a MultiStepsState": (
        lambda tx: tx.update(1.0, optax.MultiSteps(SGD, 2).init(1.0)),
        TypeError,
        "coming_from.md",
    ),
    "aux without has_aux": (
        lambda tx: accumax.grad(row_loss, microbatch_size=2, aux="sum"),
        ValueError,
        "has_aux=True",
    ),
    "aux without has_aux in a step": (
        lambda tx: accumax.train_step(row_loss, tx, microbatch_size=2, aux="sum"),
        ValueError,
        "has_aux=True",
    ),
    "a string for an aux": (
        lambda tx: accumax.grad(
            lambda w, x: (row_loss(w, x), {"name": "relu"}), 0, True, microbatch_size=2
        )(1.0, X),
        TypeError,
        "aux.'name'. is 'relu'",
    ),
    "an aux of another structure": (
        lambda tx: accumax.grad(
            lambda w, x: (row_loss(w, x), {"a": x}),
            0,
            True,
            microbatch_size=2,
            aux={"b": "sum"},
        )(1.0, X),
        ValueError,
        "a tree with its keys",
    ),
    "a negative weight": (
        lambda tx: accumax.grad(
            lambda w, x: (row_loss(w, x), -2.0), weighted=True, microbatch_size=2
        )(1.0, X),
        ValueError,
        "the weight from the loss function is -2.0",
    ),
    "a batch that is a key": (
        lambda tx: accumax.grad(row_loss, microbatch_size=2, rng_argnums=1)(1.0, X),
        ValueError,
        "^batch_argnums=",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_says_what_came_and_what_to_do(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call(accumax.accumulate(SGD, 2))


def test_an_argument_that_may_hold_rows_is_not_handed_on_in_silence():
    with pytest.warns(UserWarning, match=r"batch_argnums=\(1, 2\)"):
        accumax.grad(row_loss, microbatch_size=2)(1.0, X, X)


def test_an_inner_that_changes_the_structure_of_its_state_is_named():
    inner = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (g, (s,)))
    tx, w = accumax.accumulate(inner, 2), jnp.ones(2)
    with pytest.raises(TypeError, match="the structure of its own state"):
        accumax.apply_gradients(tx, w, tx.init(w), w)


@pytest.mark.parametrize("begun", [0, False, 0.0, 1 + 0j])
@pytest.mark.parametrize("form", ["update", "apply_gradients", "train_step"])
def test_a_state_that_becomes_a_float_is_not_cut(form, begun):
    """Each call added 0.3 to an int32 0, and kept 0."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u * jnp.real(state), updates), state + 0.3

    inner = optax.GradientTransformation(lambda params: jnp.asarray(begun), update)
    tx, params = accumax.accumulate(inner, every=2), jnp.ones(3)

    def call(params, state):
        if form == "train_step":
            return accumax.train_step(lambda p, x: p @ x, tx)(params, state, params)[:2]
        if form == "apply_gradients":
            return accumax.apply_gradients(tx, params, state, params)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    if isinstance(begun, int):
        with pytest.raises(TypeError, match=r"from (int32|bool) to float32"):
            jax.jit(call)(params, state)
        return
    for _ in range(4):
        params, state = call(params, state)
    np.testing.assert_allclose(state.inner_opt_state, begun + 0.6, rtol=1e-6)


# Settings of JAX.


@pytest.mark.parametrize("in_place", [True, False])
def test_strict_promotion_of_dtypes_is_kept(in_place):
    params = {"w": jnp.ones((3, 2), jnp.bfloat16)}
    x = jnp.ones((4, 3), jnp.bfloat16)

    def fun(p, x):
        return jnp.mean(x @ p["w"])

    def weighted(p, x):
        return fun(p, x), jnp.sum(x[:, 0])

    tx = accumax.accumulate(SGD, 2)
    with jax.numpy_dtype_promotion("strict"):
        options = {"microbatch_size": 3, "in_place": in_place}
        for loss in (fun, [fun, fun]):
            jax.jit(accumax.grad(loss, **options))(params, x)
        jax.jit(accumax.grad(weighted, weighted=True, **options))(params, x)
        step = accumax.train_step(weighted, tx, weighted=True, in_place=in_place)
        jax.jit(step)(params, tx.init(params), x)


def scanned_loss(w, x):
    return jnp.mean(lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, w)[0] ** 2)


# A vmap of what is in place, where JAX cannot batch the refs of a scan.


def branched_loss(w, x):
    branches = [lambda x, w, i=i: jnp.sin(x @ w[i]) for i in range(2)]
    return jnp.mean(lax.cond(w[0, 0, 0] > 0, *branches, x, w) ** 2)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("fun", [scanned_loss, branched_loss])
@pytest.mark.parametrize("form", ["grad", "train_step", "microbatch"])
@pytest.mark.filterwarnings("ignore:JAX 0.1.*in place")
def test_a_vmap_of_a_loss_that_scans_is_that_of_jax(form, fun, axes):
    rng = np.random.default_rng(0)
    ws = jnp.asarray(rng.normal(size=(3, 2, 2, 2)), jnp.float32)
    xs = jnp.asarray(rng.normal(size=(3, 4, 2)), jnp.float32)
    args = [all_ if a == 0 else all_[0] for all_, a in zip((ws, xs), axes, strict=True)]

    def by_step(w, x):
        tx = accumax.accumulate(SGD, 1)
        step = accumax.train_step(fun, tx, microbatch_size=2)
        return w - step(w, tx.init(w), x)[0]

    def recomputed(w, x):
        each = jax.vmap(lambda row: fun(w, row[None]))
        return jnp.mean(
            accumax.microbatch(lambda w, x: each(x), microbatch_size=2)(w, x)
        )

    forms = {
        "grad": accumax.grad(fun, microbatch_size=2),
        "train_step": by_step,
        "microbatch": jax.grad(recomputed),
    }
    got = jax.jit(jax.vmap(forms[form], axes))(*args)
    want = jax.vmap(jax.grad(fun), axes)(*args)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_vmap_around_jit_of_a_loss_that_scans_says_what_to_do():
    args = jnp.ones((3, 2, 2, 2)), jnp.ones((4, 2))

    def gradients(**options):
        f = jax.jit(accumax.grad(scanned_loss, microbatch_size=2, **options))
        return jax.vmap(f, (0, None))(*args)

    want = jax.vmap(jax.grad(scanned_loss), (0, None))(*args)
    with pytest.raises(NotImplementedError, match="in_place=False"):
        gradients()
    np.testing.assert_allclose(gradients(in_place=False), want, atol=1e-6)


def test_a_check_for_leaks_finds_none_and_nothing_falls_back():
    tx, w, x = accumax.accumulate(SGD, 2), jnp.ones((3, 2, 2)), jnp.ones((4, 2))
    with jax.checking_leaks():  # a fallback warns, and warnings are errors here
        jax.jit(accumax.grad(scanned_loss, microbatch_size=2))(w, x)
        for options in ({}, {"microbatch_size": 2}):
            step = accumax.train_step(scanned_loss, tx, **options)
            jax.jit(step)(w, tx.init(w), x)


SLICES = {
    "static": lambda w: w[:2],
    "strided": lambda w: w[::2],
    "row": lambda w: w[1],
    "dynamic": lambda w: lax.dynamic_slice_in_dim(w, 1, 2),
    "split": lambda w: jnp.split(w, 2)[0],
    "jit": jax.jit(lambda w: w[:2]),
    "checkpoint": jax.checkpoint(lambda w: w[:2]),
    "cond": lambda w: lax.cond(w.sum() > 0, lambda w: w[:2], lambda w: w[2:], w),
    "scan": lambda w: lax.scan(lambda c, _: (c + w[:2].sum(), None), 0.0, None, 2)[0],
    "cast": lambda w: w.astype(jnp.bfloat16)[:2].astype(jnp.float32),
    "none": lambda w: w,
}


@pytest.mark.parametrize("kind", SLICES)
@pytest.mark.parametrize("form", ["train_step", "divided", "grad", "weighted"])
def test_a_loss_that_slices_leaks_neither_a_trace_nor_what_it_captures(form, kind):
    """JAX 0.10 never frees a trace that raised, and each trace had one that did."""
    x, w, table = jnp.ones((4, 3)), jnp.ones((3, 6)), jnp.ones((4, 6))
    tx, weighted = accumax.accumulate(SGD, 2), form == "weighted"

    def run():
        captured = jnp.ones((12345,))

        def loss(params, x):
            w, table = params
            each = jnp.tanh(x @ w).sum() + SLICES[kind](table).sum() + captured.sum()
            return (each, jnp.float32(len(x))) if weighted else each

        if form == "grad":
            jax.jit(accumax.grad(loss, microbatch_size=2))((w, table), x)
            return
        options = {"microbatch_size": 2} if form == "divided" else {}
        step = accumax.train_step(loss, tx, weighted=weighted, **options)
        jax.jit(step)((w, table), tx.init((w, table)), x)

    run()
    jax.clear_caches()
    gc.collect()
    assert not any(a.shape == (12345,) for a in jax.live_arrays())
    with jax.checking_leaks():
        run()


@pytest.mark.parametrize("every", [4, lambda step: 4], ids=["number", "schedule"])
def test_an_optimizer_that_is_wrapped_is_not_kept(every):
    """Its functions may hold arrays as large as the model."""

    def create():
        anchor = jnp.ones((12345,))
        near = optax.stateless(lambda u, p: jax.tree.map(lambda a: a + anchor[0], u))
        tx = optax.chain(near, SGD)
        made = [
            accumax.linen.TrainState.create(
                apply_fn=None, params={"w": jnp.ones(2)}, tx=tx, every=every
            )
            for _ in range(2)
        ]
        assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])

    create()
    gc.collect()
    assert not any(a.shape == (12345,) for a in jax.live_arrays())


def test_an_update_of_the_big_batch_is_the_same_as_before():
    # That none of the checks above costs what is right.
    tx = accumax.accumulate(optax.adamw(0.05), 1)
    params, state = init(), tx.init(init())
    params, *_ = accumax.train_step(loss_fn, tx)(params, state, data(1)[0])
    assert distance(params, init()) > 0.01


# A loss is traced more than once, each time on a batch of its own.


def pops(w, batch):
    labels = batch.pop("labels")
    batch["x"] = batch["x"] / 2
    return jnp.mean((batch["x"] @ w - labels) ** 2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"in_place": False}, {"microbatch_size": 2}])
def test_a_loss_may_change_the_dict_that_it_is_given(options, weighted):
    w = jnp.ones(3)
    batch = {"x": jnp.arange(12.0).reshape(4, 3), "labels": jnp.ones(4)}

    def loss(w, batch):
        value = pops(w, batch)
        return (value * len(batch["x"]), len(batch["x"]) * 1.0) if weighted else value

    tx = accumax.accumulate(SGD, 1)
    step = jax.jit(accumax.train_step(loss, tx, weighted=weighted, **options))
    got, _, value = step(w, tx.init(w), batch)
    want, grads = jax.value_and_grad(pops)(w, dict(batch))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(got, w - grads, rtol=1e-6)
    assert set(batch) == {"x", "labels"}


def test_parameters_that_are_all_integers_are_refused():
    params, tx = {"w": jnp.arange(3)}, accumax.accumulate(SGD, 1)
    step = accumax.train_step(lambda p, x: jnp.mean(x @ p["w"]), tx)
    with pytest.raises(TypeError, match="no floating-point number"):
        step(params, tx.init(params), jnp.ones((4, 3)))


def test_rows_that_are_forgotten_in_a_dict_are_warned_of():
    w, x, more = jnp.ones(3), jnp.ones((8, 3)), {"y": jnp.ones(8), "n": 2.0}

    def loss(w, x, more):
        return jnp.mean((x @ w - more["y"]) ** 2) * more["n"]

    with pytest.warns(UserWarning, match=r"batch_argnums=\(1, 2\)"):
        jax.jit(accumax.grad(loss, microbatch_size=1))(w, x, more)
    # A table that has as many entries, beside one that has not, may be no rows.
    more = {"y": jnp.ones(8), "table": jnp.ones((5, 2)), "n": 2.0}
    jax.jit(accumax.grad(loss, microbatch_size=1))(w, x, more)


@pytest.mark.parametrize("size", [3, 4])
def test_strict_promotion_takes_float64_a_tail_and_measures(size):
    def loss(w, x):
        return jnp.mean((x @ w - 1) ** 2)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        w = jnp.ones(2, jnp.float64)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)))
        tx = accumax.accumulate(
            SGD, 1, accumulator_dtype=None, track_norm=True, track_noise=True
        )
        want = jax.grad(loss)(w, x)
        steps = [
            accumax.train_step(loss, tx),
            accumax.train_step(loss, tx, microbatch_size=size),
            lambda w, s, x: accumax.apply_gradients(tx, w, s, jax.grad(loss)(w, x)),
        ]
        for step in steps:
            got, state, *_ = jax.jit(step)(w, tx.init(w), x)
            np.testing.assert_allclose(got, w - want, rtol=1e-12)
            np.testing.assert_allclose(
                state.acc_args["grad_norm"], jnp.linalg.norm(want), rtol=1e-12
            )
        f = jax.jit(accumax.grad(loss, microbatch_size=size, accumulator_dtype=None))
        np.testing.assert_allclose(f(w, x), want, rtol=1e-12)


def test_a_weight_that_the_loss_misses_is_named():
    def loss(w, x, weight):
        return weight * jnp.mean(x @ w)

    w, x, tx = jnp.ones(3), jnp.ones((4, 3)), accumax.accumulate(SGD, 1)
    step = accumax.train_step(loss, tx)
    with pytest.raises(TypeError, match=r"\['weight'\] are named like arguments"):
        step(w, tx.init(w), x, weight=2.0)
    step(w, tx.init(w), x, 2.0, weight=3.0)  # one for each


@jax.tree_util.register_pytree_node_class
class Dense:
    """Checks what it is made of, as no placeholder of JAX passes."""

    def __init__(self, w, b):
        assert w.ndim == 2
        assert w.shape[1:] == b.shape
        self.w, self.b = w, b

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_parameters_may_be_in_a_class_that_checks_its_fields():
    def loss(p, x):
        return jnp.mean((x @ p.w + p.b[None]) ** 2)

    params, x = Dense(jnp.ones((3, 1)), jnp.zeros(1)), jnp.ones((4, 3))
    tx = accumax.accumulate(optax.adam(0.1), 1)
    want = optax.adam(0.1)
    grads = jax.grad(loss)(params, x)
    updates, _ = want.update(grads, want.init(params), params)
    want = optax.apply_updates(params, updates)
    for step in (
        accumax.train_step(loss, tx),
        accumax.train_step(loss, tx, microbatch_size=2),
        lambda p, s, x: accumax.apply_gradients(tx, p, s, jax.grad(loss)(p, x)),
    ):
        got = jax.jit(step)(params, tx.init(params), x)[0]
        assert jnp.allclose(got.w, want.w)
        assert jnp.allclose(got.b, want.b)
    got = jax.jit(accumax.grad(loss, microbatch_size=2))(params, x)
    assert jnp.allclose(got.w, grads.w)
    with pytest.raises(TypeError, match=r"float32\[\], .*float32\[3, 1\]"):
        accumax.value_and_grad(lambda p, x: (loss(p, x), p), microbatches=1)(params, x)


@pytest.mark.parametrize("x64", [False, True])
def test_weights_too_large_to_invert_are_refused_also_if_float64_came_later(x64):
    w, tx = jnp.ones(3), accumax.accumulate(optax.sgd(0.1), 2)
    state = tx.init(w)
    with jax.enable_x64(x64):
        grad, weight = jnp.ones(3, jnp.float32), np.float32(5e37)
        step = jax.jit(lambda *a: accumax.apply_gradients(tx, *a, weight=weight))
        for _ in range(2):
            w, state = step(w, state, grad)
    assert (state.skipped, state.gradient_step) == (1, 0)


def test_microbatch_takes_a_batch_in_a_class_that_checks_its_fields():
    batch = Dense(jnp.ones((4, 4)), jnp.arange(4.0))
    encode = accumax.microbatch(lambda w, x: x.b * w, microbatch_size=4)
    assert jnp.allclose(jax.jit(encode)(2.0, batch), 2 * jnp.arange(4.0))


def test_microbatch_leaks_no_tracer():
    encode = accumax.microbatch(lambda w, x: jnp.tanh(x @ w), microbatch_size=2)
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda w, x: jnp.mean(encode(w, x))))(
            jnp.eye(3), jnp.ones((4, 3))
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("unroll", [1, True])
def test_devices_go_on_where_jit_is_disabled(weighted, unroll):
    def loss(w, x):
        mean = jnp.mean((x @ w - 1) ** 2)
        return (mean * len(x), jnp.float32(len(x))) if weighted else mean

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), auto, devices=jax.devices()[:2])
    w, x = jnp.zeros(3), jnp.arange(12.0).reshape(4, 3)
    reduce_axis = accumax.DataParallel("data", mesh=mesh)
    options = {"microbatch_size": 2, "weighted": weighted, "unroll": unroll}
    grad = accumax.grad(loss, reduce_axis=reduce_axis, **options)
    tx = accumax.accumulate(optax.sgd(1.0), 1, reduce_axis=reduce_axis)
    state = jax.jit(tx.init)(w)
    want = jax.grad(lambda w: jnp.mean((x @ w - 1) ** 2))(w)
    with jax.disable_jit():
        assert jnp.allclose(grad(w, x), want)
        for divided in (options, {"weighted": weighted}):
            new, *_ = accumax.train_step(loss, tx, **divided)(w, state, x)
            assert jnp.allclose(-new, want)


def test_a_batch_of_symbolic_length_is_exported():
    (n,) = jax.export.symbolic_shape("n")
    grad = accumax.grad(lambda w, x: jnp.mean(x @ w), microbatches=3)
    exported = jax.export.export(jax.jit(grad))(
        jnp.ones(3), jax.ShapeDtypeStruct((12 * n, 3), jnp.float32)
    )
    x = jnp.arange(36.0).reshape(12, 3)
    assert jnp.allclose(exported.call(jnp.ones(3), x), jnp.mean(x, 0))
