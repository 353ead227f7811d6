"""`train_step(..., microbatch_size=)`: microbatches within the calls of a window."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    big_batch,
    data,
    distance,
    init,
    loss_fn,
    losses,
    microbatches,
    same_bits,
    weighted_loss_fn,
)

import accumax

SGD = optax.sgd(0.1)
BOTH = pytest.mark.parametrize("in_place", [True, False])


def run(fun, tx, calls, **options):
    step = jax.jit(accumax.train_step(fun, tx, **options), donate_argnums=(0, 1))
    params = init()
    state, outs = tx.init(params), []
    for batch in calls:
        params, state, out = step(params, state, batch)
        outs.append(out)
    return params, state, outs


def calls(windows=2, sizes=(8, 8, 8)):
    return [part for batch in data(windows) for part in microbatches(batch, sizes)]


@BOTH
@pytest.mark.parametrize("size", [2, 3, 8, 20])
@pytest.mark.parametrize(
    ("weighted", "reduction"),
    [
        (False, "mean"),
        (False, "sum"),
        (True, "mean"),
        (True, "sum"),
        (True, "mean_of_sums"),
    ],
)
def test_microbatches_change_the_memory_and_nothing_else(
    weighted, reduction, size, in_place
):
    if weighted:
        fun = weighted_loss_fn
    elif reduction == "mean":
        fun = loss_fn
    else:

        def fun(params, batch):
            return jnp.sum(losses(params, batch))

    tx = accumax.accumulate(optax.sgd(1e-3, momentum=0.9), 3, reduction=reduction)
    options = {"weighted": weighted, "in_place": in_place}
    want = run(fun, tx, calls(), **options)
    got = run(fun, tx, calls(), microbatch_size=size, **options)
    assert distance(got[0], want[0]) < 1e-6
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5)
    for name in ("mini_step", "gradient_step", "acc_weight", "emitted", "skipped"):
        assert getattr(got[1], name) == getattr(want[1], name)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_number_of_microbatches_and_unrolling_change_nothing(weighted):
    fun, tx = weighted_loss_fn if weighted else loss_fn, accumax.accumulate(SGD, 2)
    parts = calls(1, (12, 12))
    want, *_ = run(fun, tx, parts, weighted=weighted, microbatch_size=4)
    for options in ({"microbatches": 3}, {"microbatch_size": 4, "unroll": True}):
        got, _, outs = run(fun, tx, parts, weighted=weighted, **options)
        assert distance(got, want) < 1e-6
        assert len(outs) == 2
    with pytest.raises(ValueError, match="exactly one of microbatch_size"):
        run(fun, tx, parts, weighted=weighted, microbatch_size=4, microbatches=3)


@BOTH
def test_a_window_of_calls_of_microbatches_is_the_big_batch(in_place):
    want = big_batch(optax.adamw(0.05), init(), data(2))
    tx = accumax.accumulate(optax.adamw(0.05), 3)
    options = {"microbatch_size": 3, "in_place": in_place}
    assert distance(run(loss_fn, tx, calls(), **options)[0], want) < 1e-5
    # Calls of unequal size: the loss says how many rows it has.
    uneven = calls(sizes=(13, 1, 10))
    got = run(weighted_loss_fn, tx, uneven, weighted=True, **options)[0]
    assert distance(got, want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_in_place_equals_its_carried_twin_to_the_bit(weighted):
    fun = weighted_loss_fn if weighted else loss_fn
    tx = accumax.accumulate(optax.sgd(0.05), 1)  # with more calls, sums of sums
    options = {"microbatch_size": 3, "weighted": weighted}
    twins = [
        run(fun, tx, calls(), in_place=in_place, **options)
        for in_place in (True, False)
    ]
    assert same_bits(*twins)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "drop"])
def test_a_policy_sees_the_call_as_a_whole(nonfinite, in_place):
    tx = accumax.accumulate(optax.sgd(0.1), 2, nonfinite=nonfinite)
    first, second, third, *rest = calls()
    bad = first | {"x": first["x"].at[0].set(jnp.nan)}  # in one of its microbatches
    options = {"microbatch_size": 3, "in_place": in_place}
    given = [second, bad, third, *rest[:1]]
    params, state, _ = run(loss_fn, tx, given, **options)
    clean = {"skip": [second, third, rest[0]], "drop": None}.get(nonfinite)
    if nonfinite == "propagate":
        assert not np.all(np.isfinite(params["scale"]))
        return
    assert state.skipped == 1
    if nonfinite == "skip":
        want, want_state, _ = run(loss_fn, tx, clean, **options)
        assert state.mini_step == want_state.mini_step == 1
    else:
        want, _, _ = run(loss_fn, accumax.accumulate(optax.sgd(0.1), 1), [second])
        tx = accumax.accumulate(optax.sgd(0.1), 2)
        step = jax.jit(accumax.train_step(loss_fn, tx))
        state = tx.init(want)
        for batch in (third, rest[0]):
            want, state, _ = step(want, state, batch)
    assert distance(params, want) < 1e-6


@BOTH
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "drop"])
def test_a_microbatch_whose_weight_is_unusable_is_counted(nonfinite, in_place):
    def fun(w, x):
        return jnp.sum(w * x), jnp.sum(x)

    tx = accumax.accumulate(optax.sgd(1.0), 9, nonfinite=nonfinite)
    step = accumax.train_step(
        fun, tx, weighted=True, microbatch_size=1, in_place=in_place
    )
    w, state = 1.0, tx.init(1.0)
    w, state, _ = jax.jit(step)(w, state, jnp.array([1.0, -5.0, 2.0]))
    assert state.skipped == 1
    if nonfinite == "propagate":  # the valid weights are added
        assert (state.acc_grads, state.acc_weight, state.mini_step) == (3, 3, 1)
    else:  # all of the call, or nothing
        assert state.acc_weight == 0
        assert state.mini_step == (nonfinite == "drop")


@BOTH
def test_a_call_without_items_adds_nothing(in_place):
    def fun(w, x):
        return jnp.sum(jnp.where(x > 0, jnp.sqrt(w * x), 0)), jnp.sum(x > 0)

    tx = accumax.accumulate(optax.sgd(1.0), 2)
    step = accumax.train_step(
        fun, tx, weighted=True, microbatch_size=2, in_place=in_place
    )
    w, state = jnp.float32(1), tx.init(1.0)
    for x in (jnp.zeros(4), jnp.array([4.0, 0, 16, 0])):
        w, state, loss = jax.jit(step)(w, state, x)
    assert loss == 3
    assert w == 1 - 1.5


def test_aux_and_keys_are_those_of_value_and_grad():
    def fun(w, x, key):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.mean(w * x * mask), {"mask": mask, "n": jnp.sum(mask)}

    options = {
        "has_aux": True,
        "microbatch_size": 3,
        "rng_argnums": 2,
        "aux": {"mask": "concat", "n": "sum"},
    }
    x, key = jnp.arange(8.0), jax.random.key(1)
    tx = accumax.accumulate(optax.sgd(1.0), 1)
    step = jax.jit(accumax.train_step(fun, tx, **options))
    w, _, (loss, aux) = step(1.0, tx.init(1.0), x, key)
    (want, want_aux), grad = accumax.value_and_grad(fun, **options)(1.0, x, key)
    np.testing.assert_allclose([loss, w], [want, 1 - grad], rtol=1e-6)
    np.testing.assert_array_equal(aux["mask"], want_aux["mask"])
    assert aux["n"] == want_aux["n"] == jnp.sum(aux["mask"])


def test_several_arguments_may_hold_the_batch():
    def fun(w, x, y, scale):
        return scale * jnp.mean((w * x - y) ** 2)

    x, y = jnp.arange(8.0), jnp.ones(8)
    tx = accumax.accumulate(optax.sgd(1e-2), 1)
    for batch_argnums in ((1, 2), ("x", "y")):
        step = accumax.train_step(
            fun, tx, microbatch_size=4, batch_argnums=batch_argnums
        )
        w, *_ = step(0.5, tx.init(0.5), x, y, 2.0)
        want = 0.5 - 1e-2 * jax.grad(fun)(0.5, x, y, 2.0)
        np.testing.assert_allclose(w, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"microbatch_size": 0}, ValueError, "microbatch_size=0"),
        ({"microbatch_size": 2.5}, TypeError, "microbatch_size=2.5"),
        ({"microbatch_size": 2, "batch_argnums": 0}, ValueError, "differentiated"),
        ({"microbatch_size": 2, "batch_argnums": 5}, ValueError, "argument 5"),
        ({"microbatch_size": 2, "aux": "none"}, ValueError, "'none'"),
        ({"rng_argnums": 2}, ValueError, "Pass microbatch_size"),
        ({"batch_argnums": 2}, ValueError, "Pass microbatch_size"),
        ({"aux": "sum", "has_aux": True}, ValueError, "Pass microbatch_size"),
        ({"aux": "sum", "microbatch_size": 2}, ValueError, "Pass has_aux=True"),
    ],
    ids=str,
)
def test_a_bad_option_is_an_error_that_says_what_to_do(options, error, message):
    tx = accumax.accumulate(optax.sgd(1.0), 2)

    def call():
        step = accumax.train_step(loss_fn, tx, **options)
        step(init(), tx.init(init()), data(1)[0])

    with pytest.raises(error, match=message):
        call()
