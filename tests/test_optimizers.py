"""Optax's optimizers that take a plain gradient, each against its own big batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import big_batch, data, distance, init, loss_fn, microbatches

import accumax

WINDOW, STEPS = 4, 3

OPTIMIZERS = {
    name: optax.__dict__[name]
    for name in (
        "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan "
        "amsgrad fromage lamb lars lion nadam nadamw novograd "
        "optimistic_adam_v2 optimistic_gradient_descent radam rmsprop rprop "
        "sgd sign_sgd signum sm3 yogi"
    ).split()
    if name in optax.__dict__  # the oldest Optax that is supported lacks some
} | {
    f"contrib.{name}": optax.contrib.__dict__[name]
    for name in (
        "acprop ademamix simplified_ademamix adopt cocob dadapt_adamw dog "
        "dowg madgrad muon prodigy schedule_free_adamw schedule_free_sgd"
    ).split()
    if name in optax.contrib.__dict__
}
OPTIONS = {
    "contrib.dog": {"learning_rate": 1.0},
    "contrib.prodigy": {"estim_lr0": 1e-2},
    "contrib.dadapt_adamw": {"estim_lr0": 1e-2},
}
WITHOUT_RATE = {
    "contrib.cocob",
    "contrib.dowg",
    "contrib.prodigy",
    "contrib.dadapt_adamw",
}


def make(name):
    rate = {} if name in WITHOUT_RATE else {"learning_rate": 0.01}
    inner = OPTIMIZERS[name](**rate | OPTIONS.get(name, {}))
    if name == "sm3":  # cannot take a scalar parameter
        mask = jax.tree.map(lambda x: x.ndim > 0, init())
        inner = optax.masked(inner, mask)
    return inner


def accumulated(tx, params, batches, *, pass_value=False):
    @jax.jit
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        extra = {"value": value} if pass_value else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches:
        rows = len(batch["x"]) // WINDOW
        for part in microbatches(batch, [rows] * WINDOW):
            params, state = step(params, state, part)
    assert state.gradient_step == STEPS
    return params


def check(got, inner, params, batches):
    want = big_batch(inner, params, batches)
    big = big_batch(inner, params, batches, jnp.float32)
    assert distance(want, params) > 1e-6  # it moves
    # Where the big batch's own rounding cancels: an ulp of the parameters each step.
    size = max(1, *(np.abs(x).max() for x in jax.tree.leaves(want)))
    ulps = STEPS * np.finfo(np.float32).eps * size
    assert distance(got, want) <= 2 * distance(big, want) + ulps


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_the_steps_of_its_big_batch(name):
    params, batches, inner = init(), data(STEPS), make(name)
    got = accumulated(accumax.accumulate(inner, WINDOW), params, batches)
    check(got, inner, params, batches)


@pytest.mark.parametrize(
    "inner",
    [optax.polyak_sgd(), optax.contrib.momo(0.1), optax.contrib.momo_adam(0.1)],
    ids=["polyak_sgd", "momo", "momo_adam"],
)
def test_an_optimizer_that_needs_the_loss_gets_the_windows_mean(inner):
    params, batches = init(), data(STEPS)
    tx = accumax.accumulate(inner, WINDOW, averaged_args=("value",))
    check(accumulated(tx, params, batches, pass_value=True), inner, params, batches)


def test_random_noise_is_drawn_once_per_window():
    # In float64 jax.random draws other numbers, so the big batch here is in float32.
    params, batches = init(), data(STEPS)
    inner = optax.noisy_sgd(0.01, key=jax.random.key(0))
    got = accumulated(accumax.accumulate(inner, WINDOW), params, batches)
    assert distance(got, big_batch(inner, params, batches, jnp.float32)) < 1e-5


def test_lookahead_synchronizes_by_windows():
    inner = optax.lookahead(optax.adam(0.1), sync_period=2, slow_step_size=0.5)
    batches = data(4)
    tx = accumax.accumulate(inner, WINDOW)
    params = optax.LookaheadParams.init_synced(init())
    state = tx.init(params)
    step = jax.jit(accumax.train_step(loss_fn, tx))
    for batch in batches:
        for part in microbatches(batch, [6] * WINDOW):
            params, state, _ = step(params, state, part)

    want, plain = optax.LookaheadParams.init_synced(init()), None
    plain = inner.init(want)
    for batch in batches:
        grads = jax.grad(loss_fn)(want.fast, batch)
        updates, plain = inner.update(grads, plain, want)
        want = optax.apply_updates(want, updates)
    assert distance(params, want) < 1e-5
    assert distance(want.fast, init()) > 0.1


def all_arrays_differ(tree):
    arrays = jax.tree.leaves(tree)
    return len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_state_can_be_donated_together(name):
    params = init()
    tx = accumax.accumulate(make(name), WINDOW)
    assert all_arrays_differ((params, tx.init(params)))


@pytest.mark.parametrize("name", ["contrib.cocob", "contrib.prodigy"])
def test_so_can_those_of_a_jitted_init_and_those_on_the_host(name):
    params = {"w": jnp.ones((300, 300))}
    tx = accumax.accumulate(make(name), WINDOW)
    assert all_arrays_differ((params, jax.jit(tx.init)(params)))
    if jax.__version_info__ >= (0, 10, 2):
        tx = accumax.accumulate(make(name), WINDOW, offload_optimizer=True)
        assert all_arrays_differ((params, tx.init(params)))
