"""Losses with effects: an effect happens once, and what reads it sees it.

The weight of a microbatch is found before its loss, by the equations that it needs. A
`jax.Ref` of the loss's own may be written twice; what anyone else sees may not.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import accumax

ROWS, PARTS = 8, 2
W = jnp.array([1.0, -0.5, 2.0])
X = jnp.arange(24.0).reshape(ROWS, 3) / 7
MASK = jnp.arange(float(ROWS)) % 3
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def in_a_ref(mask):
    total = jax.new_ref(jnp.zeros(()))
    total[...] += mask.sum()
    return total[...]


def in_a_ref_of_a_loop(mask):
    total = jax.new_ref(jnp.zeros(()))

    @jax.jit
    def add(i, _):
        total[...] += mask[i]
        return i + 1, None

    jax.lax.scan(add, 0, length=len(mask))
    return jax.freeze(total)


def in_two_refs(mask):
    one, other = jax.new_ref(mask), jax.new_ref(jnp.zeros(()))
    one[...] = 2 * one[...]
    other[...] = one[...].sum()
    return other[...] / 2


def in_a_ref_of_a_branch(mask):
    total = jax.new_ref(jnp.zeros(()))

    def add():
        total[...] += mask.sum()

    jax.lax.cond(mask.sum() >= 0, add, lambda: None)
    return total[...]


def on_the_host(mask):
    return jax.pure_callback(lambda m: np.float32(np.sum(m)), SCALAR, mask)


WEIGHTS = in_a_ref, in_a_ref_of_a_loop, in_two_refs, in_a_ref_of_a_branch, on_the_host


def weighted(weight):
    def loss(w, x, mask):
        return jnp.sum((x @ w) ** 2 * mask), weight(mask)

    return loss


def mean(w):
    return jnp.sum((X @ w) ** 2 * MASK) / MASK.sum()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_may_be_computed_in_refs(weight, in_place):
    options = {"weighted": True, "in_place": in_place}
    divided = {"microbatches": PARTS, "batch_argnums": (1, 2)}
    value, grads = jax.value_and_grad(mean)(W)
    loss = weighted(weight)
    f = accumax.value_and_grad(loss, **options, **divided)
    got, ours = jax.jit(f)(W, X, MASK)
    assert jnp.allclose(got, value, rtol=1e-6)
    assert jnp.allclose(ours, grads, rtol=1e-5)
    tx = accumax.accumulate(optax.sgd(0.1), every=1)
    for call in ({}, divided):
        step = jax.jit(accumax.train_step(loss, tx, **options, **call))
        params, state, got = step(W, tx.init(W), X, MASK)
        assert state.gradient_step == 1
        assert jnp.allclose(got, value, rtol=1e-6)
        assert jnp.allclose(params, W - 0.1 * grads, rtol=1e-5)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_several_losses_may_have_such_weights(weight):
    losses = weighted(weight), weighted(jnp.sum)
    f = accumax.value_and_grad(
        losses, microbatches=PARTS, weighted=True, batch_argnums=(1, 2)
    )
    (one, other), grads = jax.jit(f)(W, X, MASK)
    assert jnp.allclose(one, other, rtol=1e-6)
    assert jnp.allclose(grads, 2 * jax.grad(mean)(W), rtol=1e-5)


def counting():
    """A loss whose weight counts how often it is asked for, and the counts."""
    seen, numbers = [], itertools.count(1)

    def count(mask):
        seen.append(float(next(numbers)))
        return np.float32(seen[-1])

    def loss(w, x):
        n = io_callback(count, SCALAR, x, ordered=False)
        return n * jnp.sum(x @ w), n

    return loss, seen


@pytest.mark.parametrize("in_place", [True, False])
def test_an_effect_happens_once_for_each_microbatch(in_place):
    loss, seen = counting()
    f = accumax.value_and_grad(
        loss, microbatches=PARTS, weighted=True, in_place=in_place
    )
    jax.block_until_ready(jax.jit(f)(W, X))
    assert sorted(seen) == [1, 2]


@pytest.mark.parametrize("options", [{}, {"microbatches": 1}])
def test_the_loss_and_the_divisor_see_the_same_effect(options):
    loss, seen = counting()
    tx = accumax.accumulate(optax.sgd(1.0), every=2)
    step = jax.jit(accumax.train_step(loss, tx, weighted=True, **options))
    params, state = W, tx.init(W)
    for _ in range(2):
        params, state, value = step(params, state, X)
        assert jnp.allclose(value, jnp.sum(X @ W), rtol=1e-6)
    # (1 g + 2 g) / (1 + 2)
    assert jnp.allclose(params, W - X.sum(0), rtol=1e-5)
    assert seen == [1, 2]


def test_a_ref_from_outside_is_written_once():
    calls = jax.new_ref(jnp.zeros(()))

    def loss(w, x):
        calls[...] += 1
        return jnp.sum(x @ w), calls[...]

    f = accumax.value_and_grad(loss, microbatches=PARTS, weighted=True)
    value, _ = jax.jit(f)(W, X)
    assert calls[...] == PARTS
    assert jnp.allclose(value, jnp.sum(X @ W) / 3, rtol=1e-6)


@pytest.mark.parametrize("wrap", [jax.jit, lambda loss: jax.jit(jax.jit(loss))])
def test_a_jitted_loss_that_prints_has_a_weight_without_an_effect(wrap, capfd):
    @wrap
    def loss(w, x):
        jax.debug.print("loss of {}", x.shape[0])
        return jnp.sum(x @ w), jnp.sum(x)

    options = {"microbatches": PARTS, "weighted": True}
    f = accumax.value_and_grad((loss, loss), **options)  # refused if it had one
    (one, _), _ = jax.jit(f)(W, X)
    assert jnp.allclose(one, jnp.sum(X @ W) / jnp.sum(X), rtol=1e-6)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("loss of") == 2 * PARTS


def test_a_refused_weight_with_an_effect_adds_nothing():
    def loss(w, x):
        n = io_callback(lambda: np.float32(-2), SCALAR)
        return jnp.sum(x @ w), n

    tx = accumax.accumulate(optax.sgd(1.0), every=1)
    for options in ({}, {"microbatches": 1}):
        step = jax.jit(accumax.train_step(loss, tx, weighted=True, **options))
        params, state, value = step(W, tx.init(W), X)
        assert jnp.all(params == W)
        assert value == 0
        assert state.skipped == 1


def test_several_losses_refuse_a_weight_with_an_effect():
    loss, _ = counting()

    def other(w, x):
        return jnp.sum(x @ w), jnp.sum(x)

    f = accumax.value_and_grad((loss, other), microbatches=PARTS, weighted=True)
    with pytest.raises(NotImplementedError, match="would happen twice"):
        jax.jit(f)(W, X)


@pytest.mark.parametrize("value", [1.0, jnp.asarray(1.0), np.float32(1)])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_loss_may_be_constant(value, in_place):
    options = {"microbatches": PARTS, "in_place": in_place}
    f = accumax.value_and_grad(lambda w, x: value, **options)
    for call in (f, jax.jit(f)):
        got, grads = call(W, X)
        assert got == 1
        assert jnp.all(grads == 0)
    tx = accumax.accumulate(optax.sgd(1.0), every=1)
    for given in ({"in_place": in_place}, options):
        step = accumax.train_step(lambda w, x: value, tx, **given)
        params, _, got = jax.jit(step)(W, tx.init(W), X)
        assert got == 1
        assert jnp.all(params == W)


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="is an error there")
def test_an_offloaded_optimizer_may_be_written_with_refs():
    def update(grads, momentum, params=None):
        del params
        new = jax.new_ref(0.9 * momentum)
        new[...] += grads
        return -0.1 * new[...], new[...]

    inner = optax.GradientTransformation(jnp.zeros_like, update)
    params = jnp.ones((300, 300))
    for offload in (False, True):
        tx = accumax.accumulate(inner, every=1, offload_optimizer=offload)
        step = jax.jit(lambda p, s, tx=tx: accumax.apply_gradients(tx, p, s, p))
        new, _ = step(params, tx.init(params))
        assert jnp.allclose(new, 0.9)
