"""The faults of today's peers, each reproduced there, each absent here.

`optax.MultiSteps`, `optax.apply_every` and `optax.microbatching` are of Optax 0.2.8.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import data, distance, init, loss_fn, microbatches

import accumax

SGD = optax.sgd(1.0)


def run(tx, grads, params=0.0, **extra):
    state, emitted = tx.init(params), []
    update = jax.jit(tx.update)
    for grad in grads:
        updates, state = update(grad, state, params, **extra)
        emitted.append(updates)
    return emitted, state


def counting(calls):
    """An inner that notes each time that it runs."""

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def test_multisteps_keeps_a_nan_for_ever():
    nan = jnp.float32(jnp.nan)
    emitted, _ = run(accumax.accumulate(SGD, 2), [nan, 1.0, 2.0, 4.0])
    assert emitted[3] == -3


def test_multisteps_emits_a_nan_on_a_call_that_is_no_boundary():
    emitted, _ = run(accumax.accumulate(SGD, 2), [jnp.float32(jnp.nan), 1.0])
    assert emitted[0] == 0


@pytest.mark.parametrize("form", ["update", "fused"])
def test_multisteps_poisons_a_window_whose_first_gradient_is_zero(form):
    def normalize(updates, state, params=None):
        norm = optax.tree.norm(updates)
        return jax.tree.map(lambda u: -u / norm, updates), state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), normalize)
    tx = accumax.accumulate(inner, 2)
    grads = [jnp.zeros(2), jnp.array([3.0, 4.0])]
    if form == "update":
        emitted, _ = run(tx, grads, jnp.zeros(2))
        np.testing.assert_array_equal(emitted[0], [0, 0])
        np.testing.assert_allclose(emitted[1], [-0.6, -0.8], rtol=1e-6)
    else:
        params, state = jnp.zeros(2), tx.init(jnp.zeros(2))
        for grad in grads:
            params, state = accumax.apply_gradients(tx, params, state, grad)
        np.testing.assert_allclose(params, [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("form", ["update", "apply_gradients", "train_step", "scan"])
def test_multisteps_runs_the_inner_eight_times_for_one(form):
    ran = []
    tx = accumax.accumulate(counting(ran), 8)
    params, state, batch = init(), tx.init(init()), data(1)[0]
    grads = jax.grad(loss_fn)(params, batch)
    steps = {
        "update": lambda p, s: tx.update(grads, s, p),
        "apply_gradients": lambda p, s: accumax.apply_gradients(tx, p, s, grads),
        "train_step": lambda p, s: accumax.train_step(loss_fn, tx)(p, s, batch)[:2],
    }
    if form == "scan":
        one = steps["train_step"]
        carry = (params, state)
        carry, _ = jax.lax.scan(lambda c, _: (one(*c), None), carry, None, length=16)
    else:
        one = jax.jit(steps[form])
        for _ in range(16):
            params, state = one(params, state)
    jax.effects_barrier()
    assert len(ran) == 2


@pytest.mark.slow
def test_multisteps_searches_the_line_eight_times_for_one():
    searched = []
    batch = data(1)[0]

    def value_fn(params):
        jax.debug.callback(lambda: searched.append(1))
        return loss_fn(params, batch)

    def calls_of(tx, times):
        searched.clear()
        params, state = init(), tx.init(init())

        @functools.partial(jax.jit, static_argnums=2)
        def step(params, state, pass_value_fn):
            value, grads = jax.value_and_grad(loss_fn)(params, batch)
            extra = {"value": value, "grad": grads, "value_fn": pass_value_fn}
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        for _ in range(times):
            params, state = step(params, state, value_fn)
        jax.effects_barrier()
        return len(searched), params

    alone, want = calls_of(optax.lbfgs(), 1)
    window, got = calls_of(
        accumax.accumulate(optax.lbfgs(), 8, averaged_args=("value",)), 8
    )
    assert window == alone > 0
    assert distance(got, want) < 1e-5


def test_multisteps_gives_five_for_three_with_three_and_one_examples():
    # Examples 1, 1, 1 and 9: the mean is 3, the mean of the two means is 5.
    tx = accumax.accumulate(SGD, 2)
    state = tx.init(0.0)
    _, state = tx.update(1.0, state, weight=3)
    updates, _ = tx.update(9.0, state, weight=1)
    assert updates == -3


def test_multisteps_casts_the_float32_mean_to_bfloat16_before_the_inner_sees_it():
    # The mean of 1, 1 and 1.0078125 minus 1: a third of an ulp, lost if rounded first.
    def minus_one(updates, state, params=None):
        return updates - 1, state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), minus_one)
    grads = [jnp.bfloat16(x) for x in (1.0, 1.0, 1.0078125)]
    emitted, _ = run(accumax.accumulate(inner, 3), grads, jnp.bfloat16(0))
    np.testing.assert_allclose(float(emitted[2]), 0.0078125 / 3, rtol=0.01)
    assert emitted[2].dtype == jnp.bfloat16


def test_multisteps_says_has_updated_on_a_skipped_call_after_a_boundary():
    tx = accumax.accumulate(SGD, 1, nonfinite="skip")
    _, state = run(tx, [1.0])
    assert accumax.has_updated(state)
    _, state = tx.update(jnp.float32(jnp.nan), state)
    assert not accumax.has_updated(state)


@pytest.mark.parametrize("every", [0, -1])
def test_multisteps_never_updates_with_every_of_zero(every):
    with pytest.raises(ValueError, match="every="):
        accumax.accumulate(SGD, every)


def test_multisteps_takes_a_numpy_integer_for_a_schedule():
    emitted, _ = run(accumax.accumulate(SGD, np.int64(2)), [1.0, 3.0])
    assert emitted[1] == -2


def test_multisteps_in_a_chain_refuses_the_value_of_reduce_on_plateau():
    inner = optax.chain(SGD, optax.contrib.reduce_on_plateau())
    tx = accumax.accumulate(inner, 2, averaged_args=("value",))
    emitted, _ = run(optax.chain(optax.clip(9.0), tx), [1.0, 3.0], value=jnp.float32(1))
    assert emitted[1] == -2


def test_multisteps_fails_on_float0_and_none_leaves():
    params = {"w": jnp.ones(2), "ids": jnp.arange(2), "none": None}
    grads = {"w": jnp.ones(2), "ids": np.zeros(2, jax.dtypes.float0), "none": None}
    tx = accumax.accumulate(SGD, 1)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], [-1, -1])
    assert updates["none"] is None


def test_multisteps_fails_with_lookahead():
    inner = optax.lookahead(SGD, sync_period=1, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(jnp.zeros(2))
    tx = accumax.accumulate(inner, 2)
    state = tx.init(params)
    for grad in (1.0, 3.0):
        updates, state = tx.update(jnp.full(2, grad), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params.slow, [-1, -1])


def test_multisteps_emits_a_wrong_mean_when_a_smaller_every_resumes_a_longer_window():
    _, state = run(accumax.accumulate(SGD, 8), [1.0, 3.0, 5.0])
    updates, _ = accumax.accumulate(SGD, 2).update(7.0, state)
    assert updates == -4


def test_multisteps_loses_or_overscales_the_last_window():
    tx = accumax.accumulate(SGD, 4)
    params, state = 0.0, tx.init(0.0)
    for grad in (2.0, 4.0):
        params, state = accumax.apply_gradients(tx, params, state, grad)
    params, _ = accumax.flush(tx, params, state)
    assert params == -3


def test_apply_every_counts_and_decays_in_every_call():
    # Decoupled decay by 0.1 once per window of 4, and Adam's count likewise.
    tx = accumax.accumulate(optax.adamw(0.1, weight_decay=1.0), 4)
    params = jnp.float32(1.0)
    emitted, state = run(tx, [jnp.float32(0)] * 8, params)
    assert optax.tree.get(state, "count") == 2
    np.testing.assert_allclose(np.sum(emitted), -0.1 * 2, rtol=1e-6)


def test_keras_advances_the_learning_rate_schedule_in_every_microstep():
    rate = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    emitted, _ = run(accumax.accumulate(optax.sgd(rate), 2), [1.0] * 4)
    assert [float(x) for x in emitted] == [0, -1, 0, -0.5]


def test_microbatching_loses_a_sum_of_ones_in_bfloat16():
    def mean(w, x):
        return jnp.mean(w * x)

    w, ones = jnp.bfloat16(1), jnp.ones(1024, jnp.bfloat16)
    if hasattr(optax, "microbatching"):  # Optax 0.2.5 has none
        how = optax.microbatching.AccumulationType.MEAN
        peer = optax.microbatching.microbatch(jax.grad(mean), 1, 1, how)
        assert peer(w, ones) == 0.25
    assert accumax.grad(mean, microbatch_size=1)(w, ones) == 1
    # And across calls.
    emitted, _ = run(accumax.accumulate(SGD, 1024), list(ones), jnp.bfloat16(0))
    assert emitted[-1] == -1


def test_microbatching_has_one_dropout_mask_for_all():
    def fun(w, x, key):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.mean(w * x * mask), mask

    x, key = jnp.ones(64), jax.random.key(0)
    if hasattr(optax, "microbatching"):
        how = optax.microbatching.AccumulationType.CONCAT
        _, mask = optax.microbatching.microbatch(fun, 1, 32, how)(1.0, x, key)
        assert jnp.all(mask[::2] == mask[1::2])
    f = accumax.grad(fun, has_aux=True, microbatch_size=32, rng_argnums=2, aux="concat")
    _, mask = f(1.0, x, key)
    assert not jnp.all(mask[::2] == mask[1::2])


def test_microbatching_refuses_integer_aux_scalars_and_uneven_batches():
    def fun(w, x, scale):
        return jnp.mean(w * x) * scale, jnp.sum(x > 2)

    f = accumax.value_and_grad(fun, has_aux=True, microbatch_size=3, aux="sum")
    (value, count), grad = jax.jit(f)(1.0, jnp.arange(8.0), 2)
    assert (value, count, grad) == (7, 5, 7)


def test_a_part_of_a_batch_is_never_lost_between_calls_of_different_size():
    batch, tx = data(1)[0], accumax.accumulate(SGD, 3)
    params, state = init(), tx.init(init())
    for part in microbatches(batch, [20, 1, 3]):
        grads = jax.grad(loss_fn)(params, part)
        rows = len(part["x"])
        params, state = accumax.apply_gradients(tx, params, state, grads, weight=rows)
    grads = jax.grad(loss_fn)(init(), batch)
    assert distance(params, jax.tree.map(jnp.subtract, init(), grads)) < 1e-5
