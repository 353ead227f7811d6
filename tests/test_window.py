"""The contract table, row by row, on `update`; `test_contract.py` has the ways to
call."""

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import same_bits

import accumax

SGD = optax.sgd(1.0)


def run(tx, grads, params=None, **each):
    """(emitted updates, states) of a call for each gradient; `each` has a value a
    call."""
    params = jnp.zeros(np.shape(grads[0])) if params is None else params
    state = tx.init(params)
    update = jax.jit(tx.update)
    emitted, states = [], []
    for i, grad in enumerate(grads):
        extra = {name: values[i] for name, values in each.items()}
        updates, state = update(jnp.asarray(grad), state, params, **extra)
        emitted.append(updates)
        states.append(state)
    return emitted, states


def floats(emitted):
    return [float(x) for x in emitted]


@pytest.mark.parametrize(
    "every", [3, np.int64(3), np.int8(3), jnp.int32(3), np.array(3)]
)
def test_every_may_be_an_integer_of_any_kind(every):
    emitted, states = run(accumax.accumulate(SGD, every), [1.0, 2.0, 6.0, 9.0])
    assert floats(emitted) == [0, 0, -3, 0]
    assert [int(s.mini_step) for s in states] == [1, 2, 0, 1]
    assert [int(s.gradient_step) for s in states] == [0, 0, 1, 1]
    assert [bool(s.emitted) for s in states] == [False, False, True, False]


def test_every_may_be_a_schedule_of_the_gradient_step():
    lengths = jnp.array([1, 2, 3])
    tx = accumax.accumulate(SGD, lambda step: lengths[jnp.minimum(step, 2)])
    emitted, _ = run(tx, [1.0, 2.0, 4.0, 3.0, 3.0, 6.0, 1.0])
    assert floats(emitted) == [-1, 0, -3, 0, 0, -4, 0]


def test_an_optax_schedule_of_floats_serves_as_every():
    tx = accumax.accumulate(SGD, optax.piecewise_constant_schedule(1.0, {1: 2.0}))
    emitted, _ = run(tx, [1.0, 2.0, 4.0, 3.0, 5.0])
    assert floats(emitted) == [-1, 0, -3, 0, -4]


@pytest.mark.parametrize("length", [0, -5, jnp.nan])
def test_a_schedule_below_one_never_stops_the_updates(length):
    tx = accumax.accumulate(SGD, lambda step: jnp.where(step < 0, 1, length))
    assert floats(run(tx, [1.0, 2.0])[0]) == [-1, -2]


def test_a_hold_is_minus_zero_and_leaves_the_parameters_to_the_bit():
    params = jnp.array([-0.0, 0.0, 1e-30, jnp.inf])
    emitted, _ = run(accumax.accumulate(SGD, 2), [params], params)
    assert same_bits(emitted[0], jnp.full(4, -0.0))
    assert same_bits(jnp.asarray(optax.apply_updates(params, emitted[0])), params)


@pytest.mark.parametrize(
    ("reduction", "want"),
    [("mean", (3 * 1 + 1 * 5) / 4), ("sum", 1 + 5), ("mean_of_sums", 6 / 4)],
)
def test_reductions(reduction, want):
    tx = accumax.accumulate(SGD, 2, reduction=reduction)
    emitted, _ = run(tx, [1.0, 5.0], weight=[3, 1])
    assert emitted[1] == -want


def test_weights_may_be_traced_or_not_and_of_any_kind():
    tx = accumax.accumulate(SGD, 2)
    for a, b in [(3, 1), (3.0, np.int64(1)), (jnp.bfloat16(3), jnp.int8(1))]:
        state = tx.init(0.0)
        _, state = tx.update(1.0, state, weight=a)
        updates, _ = tx.update(5.0, state, weight=b)
        assert updates == -2.0


def test_a_nan_is_propagated_and_gone_by_the_next_window():
    emitted, states = run(accumax.accumulate(SGD, 2), [jnp.nan, 1.0, 2.0, 4.0])
    assert np.isnan(emitted[1])
    assert emitted[3] == -3.0
    assert emitted[0] == emitted[2] == 0
    assert states[-1].skipped == 0


def test_skip_waits_for_one_more():
    tx = accumax.accumulate(SGD, 2, nonfinite="skip")
    emitted, states = run(tx, [1.0, jnp.nan, jnp.inf, 3.0, jnp.nan])
    assert floats(emitted) == [0, 0, 0, -2, 0]
    assert [int(s.mini_step) for s in states] == [1, 1, 1, 0, 0]
    assert [int(s.skipped) for s in states] == [0, 1, 2, 2, 3]
    assert not accumax.has_updated(states[-1])  # never stale


def test_skip_is_as_if_the_call_had_never_happened():
    tx = accumax.accumulate(
        optax.adam(0.1), 2, nonfinite="skip", averaged_args=("value",)
    )
    good = [1.0, 3.0, 5.0, 2.0, 8.0]
    _, states = run(tx, good, value=good)
    bad = [*good[:3], jnp.nan, *good[3:]]
    _, others = run(tx, bad, value=bad)
    zero = jnp.int32(0)
    assert same_bits(
        others[-1]._replace(skipped=zero), states[-1]._replace(skipped=zero)
    )


def test_drop_counts_towards_the_window_with_weight_zero():
    tx = accumax.accumulate(SGD, 2, nonfinite="drop")
    emitted, states = run(tx, [1.0, jnp.nan, jnp.nan, 3.0])
    assert floats(emitted) == [0, -1, 0, -3]
    assert [int(s.mini_step) for s in states] == [1, 0, 1, 0]
    assert [int(s.skipped) for s in states] == [0, 1, 2, 2]


def test_a_window_that_was_all_dropped_applies_nothing():
    tx = accumax.accumulate(optax.adam(0.1), 2, nonfinite="drop")
    emitted, states = run(tx, [jnp.nan, jnp.nan, 1.0, 1.0])
    assert same_bits(emitted[1], jnp.float32(-0.0))
    assert states[1].gradient_step == 0
    assert not accumax.has_updated(states[1])
    assert states[1].inner_opt_state[0].count == 0
    assert states[3].gradient_step == 1


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "drop"])
def test_a_window_without_weight_applies_nothing(nonfinite):
    tx = accumax.accumulate(optax.adam(0.1), 2, nonfinite=nonfinite)
    emitted, states = run(tx, [1.0, jnp.nan, 1.0, 1.0], weight=[0.0, 0.0, 1.0, 1.0])
    assert emitted[1] == 0
    assert [int(s.gradient_step) for s in states] == [0, 0, 0, 1]
    assert states[-1].skipped == 0  # a weight of 0 is what the caller meant


@pytest.mark.parametrize("weight", [-1.0, jnp.nan, jnp.inf])
def test_a_traced_weight_that_is_unusable_is_counted(weight):
    emitted, states = run(
        accumax.accumulate(SGD, 2), [1.0, 9.0, 5.0], weight=[1, weight, 1]
    )
    assert emitted[1] == -1.0
    assert [int(s.skipped) for s in states] == [0, 1, 1]
    tx = accumax.accumulate(SGD, 2, nonfinite="skip")
    emitted, states = run(tx, [1.0, 9.0, 5.0], weight=[1, weight, 1])
    assert floats(emitted) == [0, 0, -3]


def test_averaged_args_reach_the_inner_as_their_window_mean():
    seen = []

    def update(updates, state, params=None, *, value, scale, **_):
        jax.debug.callback(lambda *x: seen.append([float(v) for v in x]), value, scale)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = accumax.accumulate(inner, 2, averaged_args=("value",))
    run(
        tx,
        [0.0] * 4,
        value=[1.0, 5.0, 2.0, 4.0],
        weight=[3, 1, 1, 1],
        scale=[1, 2, 3, 4],
    )
    jax.effects_barrier()
    # `scale` is not averaged: the boundary's own.
    assert seen == [[2.0, 2.0], [3.0, 4.0]]


def test_flush_closes_with_what_was_seen():
    emitted, states = run(
        accumax.accumulate(SGD, 4),
        [1.0, 3.0, 5.0],
        flush=[False, jnp.bool_(True), np.bool_(False)],
    )
    assert floats(emitted) == [0, -2, 0]
    assert [int(s.mini_step) for s in states] == [0 + 1, 0, 1]
    assert bool(states[1].emitted)


def test_a_window_longer_than_a_new_smaller_every_closes_with_the_mean_of_what_it_saw():
    _, states = run(accumax.accumulate(SGD, 8), [1.0, 3.0, 5.0])
    tx = accumax.accumulate(SGD, 2)  # resumed with another setting
    updates, state = tx.update(jnp.float32(7.0), states[-1], 0.0)
    assert updates == -4.0
    assert state.mini_step == 0


def test_counts_stop_at_the_largest_integer():
    top = jnp.int32(2**31 - 1)
    tx = accumax.accumulate(SGD, 2**31 - 1, nonfinite="drop")
    state = tx.init(0.0)._replace(gradient_step=top, skipped=top, mini_step=top - 1)
    _, state = jax.jit(tx.update)(jnp.float32(jnp.nan), state)
    assert (state.gradient_step, state.skipped, state.mini_step) == (top, top, 0)
    state = state._replace(mini_step=top)
    _, state = jax.jit(tx.update)(jnp.float32(1.0), state)
    assert (state.gradient_step, state.mini_step) == (top, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_inner_sees_the_mean_in_float32_and_one_rounding_remains(dtype):
    seen = []

    def update(updates, state, params=None):
        seen.append(updates.dtype)
        return updates * 1024, state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    grads = [
        jnp.asarray(x, dtype) for x in (1.0, 1.0, 1.0078125)
    ]  # an ulp of bf16 apart
    params = jnp.asarray(0, dtype)
    emitted, _ = run(accumax.accumulate(inner, 3), grads, params)
    assert jnp.dtype(jnp.float32) in seen
    assert emitted[2].dtype == dtype
    mean = np.mean(np.asarray(grads, np.float64)) * 1024
    assert emitted[2] == jnp.asarray(mean, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "inner", [optax.adam(0.1), optax.sgd(0.1, 0.9), optax.lion(0.1)]
)
def test_no_dtype_and_no_weak_type_drifts(dtype, inner):
    params = {"w": jnp.ones(2, dtype), "python": 1.0}
    tx = accumax.accumulate(inner, 2, averaged_args=("value",))
    state = tx.init(params)
    avals = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    for weight in (1, 2.5, jnp.bfloat16(1)):
        grads = {"w": jnp.ones(2, dtype), "python": 2.0}
        _, state = tx.update(grads, state, params, weight=weight, value=1)
        now = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
        assert now == avals
    assert state.acc_grads["w"].dtype == jnp.float32


def test_accumulator_dtype_is_honoured():
    params = {"half": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.complex64)}

    def dtypes(dtype):
        acc = accumax.accumulate(SGD, 2, accumulator_dtype=dtype).init(params).acc_grads
        return {name: str(a.dtype) for name, a in acc.items()}

    assert dtypes(jnp.float32) == {"half": "float32", "c": "complex64"}
    assert dtypes(None) == {"half": "bfloat16", "c": "complex64"}
    assert dtypes("bfloat16") == {"half": "bfloat16", "c": "complex64"}
    with jax.enable_x64(True):
        assert dtypes(jnp.float64) == {"half": "float64", "c": "complex128"}


def test_float64_stays_float64():
    with jax.enable_x64(True):
        tx = accumax.accumulate(SGD, 3, accumulator_dtype=None)
        emitted, states = run(
            tx, [1.0, 1e-12, 2.0], jnp.float64(0), weight=[1, 2**30, 1]
        )
        assert emitted[2].dtype == jnp.float64
        want = -(3.0 + 1e-12 * 2**30) / (2**30 + 2)
        np.testing.assert_allclose(emitted[2], want, rtol=1e-15)
        assert states[-1].acc_weight.dtype == jnp.float64


def test_leaves_without_a_gradient_come_out_as_they_went_in():
    key = jax.random.key(0)
    float0 = np.zeros(3, jax.dtypes.float0)
    params = {"w": jnp.ones(2), "none": None, "ids": jnp.arange(3), "key": key}
    grads = {
        "w": jnp.ones(2),
        "none": None,
        "ids": float0,
        "key": np.zeros((), float0.dtype),
    }
    tx = accumax.accumulate(optax.adam(0.1), 2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        assert updates["none"] is None
        assert updates["ids"] is float0
    assert jnp.all(updates["w"] < 0)
    assert state.acc_grads["ids"] is None
    masked = {"w": jnp.ones(2), "m": optax.MaskedNode()}
    updates, _ = tx.update(masked, tx.init(masked), masked)
    assert updates["m"] == optax.MaskedNode()


def test_the_state_works_with_optax_tree_and_eval_shape():
    tx = optax.chain(optax.clip(1.0), accumax.accumulate(optax.adam(0.1), 2))
    state = tx.init({"w": jnp.ones(2)})
    assert optax.tree.get(state, "mini_step") == 0
    new = optax.tree.set(state, gradient_step=jnp.int32(7))
    assert optax.tree.get(new, "gradient_step") == 7
    shapes = jax.eval_shape(tx.init, {"w": jnp.ones(2)})
    assert jax.tree.map(lambda s, x: s.dtype == x.dtype, shapes, state)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_random_calls_do_what_the_contract_says(seed):
    assert fuzz.wrong_calls(seed) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 40])
def test_many_random_calls_do_what_the_contract_says(seed):
    assert [x for i in range(30) for x in fuzz.wrong_calls(seed + i)] == []
