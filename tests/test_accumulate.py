"""Arguments, errors, wrappers, `has_updated` and `flush`."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import distance, same_bits

import accumax

SGD = optax.sgd(1.0)
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


def test_it_is_an_optax_transformation():
    tx = accumax.accumulate(SGD, 2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert isinstance(tx.init(PARAMS), accumax.AccumulateState)


@pytest.mark.parametrize(
    "every", [2.5, True, np.True_, "4", None, [4], np.ones(2, int)]
)
def test_every_of_another_type_is_an_error(every):
    with pytest.raises(TypeError, match=r"every=.*integer of at least 1.*schedule"):
        accumax.accumulate(SGD, every)


@pytest.mark.parametrize("every", [0, -1, np.int64(-3), 2**31])
def test_every_out_of_range_is_an_error(every):
    with pytest.raises(ValueError, match="every="):
        accumax.accumulate(SGD, every)


def test_every_as_a_jax_array_that_is_not_a_scalar_is_an_error():
    with pytest.raises(TypeError, match="every="):
        accumax.accumulate(SGD, jnp.array([2, 3]))


@pytest.mark.parametrize("length", ["4", None, True, jnp.ones(2), 1j])
def test_a_schedule_that_gives_no_length_is_an_error(length):
    tx = accumax.accumulate(SGD, lambda _: length)
    with pytest.raises(TypeError, match="every gives"):
        tx.update(1.0, tx.init(1.0))


@pytest.mark.parametrize("inner", [None, optax.adam, "adam"])
def test_an_inner_that_is_no_transformation_is_an_error(inner):
    with pytest.raises(TypeError, match=r"inner=.*GradientTransformation"):
        accumax.accumulate(inner, 2)


CALLS = {
    "update": lambda tx, params, state, grads, **kw: tx.update(
        grads, state, params, **kw
    ),
    "jit": lambda tx, params, state, grads, **kw: jax.jit(
        functools.partial(tx.update, **kw)
    )(grads, state, params),
    "apply_gradients": lambda tx, params, state, grads, **kw: accumax.apply_gradients(
        tx, params, state, grads, **kw
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grads": {"w": PARAMS["w"]}}, ValueError, ["grads", "['b']"]),
        ({"grads": PARAMS | {"c": jnp.ones(1)}}, ValueError, ["grads['c']"]),
        ({"grads": PARAMS | {"b": jnp.ones(4)}}, ValueError, ["grads['b']", "(4,)"]),
        ({"grads": PARAMS | {"b": jnp.ones(3) * 1j}}, TypeError, ["grads['b']"]),
        ({"grads": PARAMS | {"b": jnp.arange(3)}}, TypeError, ["grads['b']", "int32"]),
        ({"params": PARAMS | {"b": jnp.ones(4)}}, ValueError, ["params['b']", "(4,)"]),
        ({"weight": -1.0}, ValueError, ["weight=-1.0"]),
        ({"grads": None}, ValueError, ["grads", "['b']"]),
        ({"weight": float("nan")}, ValueError, ["weight=nan"]),
        ({"weight": np.ones(3)}, TypeError, ["weight", "(3,)"]),
        ({"flush": 1}, TypeError, ["flush", "bool"]),
        ({"flush": np.array([True])}, TypeError, ["flush", "bool"]),
        ({"state": optax.EmptyState()}, TypeError, ["EmptyState", "AccumulateState"]),
        ({"state": optax.adam(0.1).init(PARAMS)}, TypeError, ["AccumulateState"]),
        (
            {"state": accumax.accumulate(optax.sgd(0.1), 2).init(PARAMS)},
            TypeError,
            ["state.inner_opt_state", "ScaleByAdamState"],
        ),
        (
            {"state": accumax.accumulate(optax.adam(0.1), 2).init({"w": PARAMS["w"]})},
            ValueError,
            ["['b']"],
        ),
    ],
)
def test_bad_input_is_an_error_before_anything_is_changed(call, change, error, words):
    tx = accumax.accumulate(optax.adam(0.1), 2)
    good = {"params": PARAMS, "state": tx.init(PARAMS), "grads": PARAMS}
    before = jax.tree.map(np.array, good)
    with pytest.raises(error) as caught:
        CALLS[call](tx, **(good | change))
    for word in words:
        assert word in str(caught.value)
    assert same_bits(good, before)
    CALLS[call](tx, **good)


def test_averaged_args_that_the_call_does_not_pass_are_named():
    tx = accumax.accumulate(SGD, 2, averaged_args=("value",))
    state = tx.init(1.0)
    with pytest.raises(TypeError, match=r'"value".*does not pass.*\[\'loss\'\]'):
        tx.update(1.0, state, loss=3.0)
    for value in ("x", jnp.ones(2), 1j):
        with pytest.raises(TypeError, match=r'"value".*real scalar'):
            tx.update(1.0, state, value=value)


def test_a_state_of_another_window_is_an_error():
    a = accumax.accumulate(SGD, 2)
    b = accumax.accumulate(SGD, 2, averaged_args=("value",))
    with pytest.raises(TypeError, match="averaged_args"):
        b.update(1.0, a.init(1.0), value=1.0)


# --- has_updated --------------------------------------------------------------------


def test_has_updated_finds_the_state_inside_a_chain():
    tx = optax.chain(optax.clip(9.0), accumax.accumulate(SGD, 2), optax.scale(2.0))
    state = tx.init(1.0)
    seen = [accumax.has_updated(state)]
    for _ in range(4):
        _, state = jax.jit(tx.update)(jnp.float32(1.0), state)
        seen.append(accumax.has_updated(state))
    assert [bool(x) for x in seen] == [False, False, True, False, True]


def test_has_updated_is_true_if_any_of_several_applied():
    tx = optax.partition(
        {"a": accumax.accumulate(SGD, 1), "b": accumax.accumulate(SGD, 2)},
        {"x": "a", "y": "b"},
    )
    params = {"x": 1.0, "y": 1.0}
    _, state = tx.update(params, tx.init(params), params)
    assert accumax.has_updated(state)


def test_has_updated_without_a_state_is_an_error():
    with pytest.raises(TypeError, match="no AccumulateState"):
        accumax.has_updated(optax.adam(0.1).init(1.0))


def test_has_updated_of_an_accumulate_within_another_is_that_of_both():
    tx = accumax.accumulate(accumax.accumulate(SGD, 2), 2)
    params, state, seen = 0.0, tx.init(0.0), []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(jnp.float32(1.0), state, params)
        seen.append((float(updates), bool(accumax.has_updated(state))))
    assert seen == [(0, False), (0, False), (0, False), (-1, True)]


# --- flush --------------------------------------------------------------------------


def test_flush_closes_an_open_window_and_leaves_an_empty_one():
    tx = accumax.accumulate(optax.adam(0.1), 4)
    params, state = 1.0, tx.init(1.0)
    params, state = accumax.apply_gradients(tx, params, state, 2.0, weight=3)
    params, state = accumax.apply_gradients(tx, params, state, 6.0, weight=1)
    flush = jax.jit(functools.partial(accumax.flush, tx))
    flushed, after = flush(params, state)
    assert accumax.has_updated(after)
    assert (after.gradient_step, after.mini_step, after.acc_weight) == (1, 0, 0)
    inner = optax.adam(0.1)
    updates, want = inner.update(3.0, inner.init(1.0), 1.0)
    assert distance(after.inner_opt_state, want) < 1e-6
    np.testing.assert_allclose(flushed, optax.apply_updates(1.0, updates), rtol=1e-6)

    again, unchanged = flush(flushed, after)
    assert same_bits(again, flushed)
    assert not accumax.has_updated(unchanged)  # the latest call applied nothing
    assert same_bits(unchanged._replace(emitted=after.emitted), after)


def test_flush_of_a_fresh_state_with_stale_sums_changes_nothing():
    tx = accumax.accumulate(SGD, 2)
    params, state = 1.0, tx.init(1.0)._replace(acc_grads=jnp.float32(jnp.nan))
    flushed, state = accumax.flush(tx, params, state)
    assert flushed == 1.0
    assert state.gradient_step == 0


def test_flush_passes_the_averaged_args_that_the_window_has_seen():
    inner = optax.chain(SGD, optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    tx = accumax.accumulate(inner, 4, averaged_args=("value",))
    params, state = 1.0, tx.init(1.0)
    params, state = accumax.apply_gradients(tx, params, state, 1.0, value=8.0)
    _, state = accumax.flush(tx, params, state)
    assert optax.tree.get(state, "best_value") == 8.0


def test_flush_needs_an_accumulate_outermost():
    tx = optax.chain(optax.clip(1.0), accumax.accumulate(SGD, 2))
    with pytest.raises(TypeError, match=r"accumax.flush needs .* outermost"):
        accumax.flush(tx, 1.0, tx.init(1.0))


@pytest.mark.parametrize("extra", [{"weight": 3.0}, {"flush": True}])
def test_flush_takes_no_weight(extra):
    tx = accumax.accumulate(SGD, 2)
    with pytest.raises(TypeError, match=rf"{next(iter(extra))}=.*accumax.flush"):
        accumax.flush(tx, 1.0, tx.init(1.0), **extra)


# --- inside and around other transformations ----------------------------------------


def test_inject_hyperparams_can_change_the_inner_and_the_window():
    make = optax.inject_hyperparams(
        lambda every, rate: accumax.accumulate(optax.sgd(rate), every)
    )
    tx = make(every=2, rate=1.0)
    state = tx.init(0.0)
    _, state = jax.jit(tx.update)(jnp.float32(2.0), state)
    updates, state = jax.jit(tx.update)(jnp.float32(4.0), state)
    assert updates == -3.0
    state.hyperparams["every"] = jnp.asarray(1)
    state.hyperparams["rate"] = jnp.float32(10.0)
    updates, state = jax.jit(tx.update)(jnp.float32(4.0), state)
    assert updates == -40.0


def test_inject_hyperparams_takes_accumulate_itself():
    tx = optax.inject_hyperparams(accumax.accumulate, static_args=("averaged_args",))(
        optax.sgd(1.0), every=2
    )
    state = tx.init(0.0)
    _, state = tx.update(jnp.float32(2.0), state)
    updates, state = tx.update(jnp.float32(4.0), state)
    assert updates == -3.0


def test_accumulate_may_wrap_injected_hyperparams():
    tx = accumax.accumulate(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), 2)
    params, state = 0.0, tx.init(0.0)
    for rate in (1.0, 0.5):
        state = optax.tree.set(state, learning_rate=jnp.float32(rate))
        params, state = accumax.apply_gradients(tx, params, state, 2.0)
    assert params == -1.0  # the rate that holds at the boundary


def test_clipping_inside_is_of_the_mean_and_outside_of_each():
    grads = [jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0])]
    clip = optax.clip_by_global_norm(1.0)

    def final(tx):
        params = jnp.zeros(2)
        state = tx.init(params)
        for grad in grads:
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params

    inside = final(accumax.accumulate(optax.chain(clip, SGD), 2))
    outside = final(optax.chain(clip, accumax.accumulate(SGD, 2)))
    np.testing.assert_allclose(inside, [-0.6, -0.8], rtol=1e-6)  # (1.5, 2) / 2.5
    np.testing.assert_allclose(outside, [-0.5, -0.5], rtol=1e-6)


@pytest.mark.slow
def test_an_equinox_module_passes_through_with_its_static_leaves():
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))  # holds functions
    tx = accumax.accumulate(optax.adam(0.1), 2)
    state = tx.init(model)
    x = jnp.ones((4, 2))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    before = loss(model, x)
    trained = model
    for _ in range(2):
        grads = eqx.filter_grad(loss)(trained, x)
        updates, state = tx.update(grads, state, trained)
        trained = eqx.apply_updates(trained, updates)
    assert loss(trained, x) < before
    fused, _ = accumax.apply_gradients(tx, model, tx.init(model), grads, flush=True)
    assert fused.activation is model.activation


def test_an_int_every_of_one_is_the_inner_alone():
    tx, inner = accumax.accumulate(optax.adamw(0.1), 1), optax.adamw(0.1)
    state, plain = tx.init(PARAMS), inner.init(PARAMS)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
        want, plain = jax.jit(inner.update)(PARAMS, plain, PARAMS)
        assert same_bits((updates, state.inner_opt_state), (want, plain))


def test_an_empty_tree_is_accepted():
    tx = accumax.accumulate(optax.adam(0.1), 1, nonfinite="skip")
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert state.gradient_step == 1


def test_the_state_can_be_donated_as_init_gave_it():
    tx = accumax.accumulate(optax.adam(0.1), 2, averaged_args=("value", "norm"))
    state = tx.init(PARAMS)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    jax.jit(tx.update, donate_argnums=1)(PARAMS, state, value=1.0, norm=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "drop"])
def test_extra_arguments_may_be_functions_and_trees(nonfinite):
    tx = accumax.accumulate(
        optax.lbfgs(), 2, nonfinite=nonfinite, averaged_args=("value",)
    )
    value_fn = lambda p: jnp.sum(p**2)  # noqa: E731
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(2):
        value, grads = jax.value_and_grad(value_fn)(params)
        extra = {"grad": grads, "value_fn": value_fn}
        params, state = accumax.apply_gradients(
            tx, params, state, grads, value=value, **extra
        )
    assert state.gradient_step == 1
    assert jnp.sum(params**2) < 0.5


def test_numpy_float64_parameters_are_float32_without_a_warning():
    params = np.ones(3)
    for dtype in (None, jnp.float32):
        tx = accumax.accumulate(optax.adam(0.1), 1, accumulator_dtype=dtype)
        tx.update(params, tx.init(params), params)
        got, _ = accumax.apply_gradients(tx, params, tx.init(params), params)
        assert got.dtype == jnp.float32


def test_an_accumulator_dtype_that_jax_has_disabled_is_an_error():
    tx = accumax.accumulate(SGD, 2, accumulator_dtype=jnp.float64)
    with pytest.raises(ValueError, match=r"accumulator_dtype=float64.*jax_enable_x64"):
        tx.init(1.0)
    with jax.enable_x64(True):
        assert tx.init(jnp.float64(1)).acc_grads.dtype == jnp.float64


def test_a_hold_leaves_the_sign_of_complex_zeros():
    tx = accumax.accumulate(SGD, 2)
    params = jnp.array([complex(1, -0.0), complex(-0.0, 1)])
    updates, _ = tx.update(params, tx.init(params), params)
    assert same_bits(optax.apply_updates(params, updates), params)
