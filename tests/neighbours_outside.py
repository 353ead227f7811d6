"""Rows of docs/neighbours.md: outside, around `accumulate` or in a chain with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from neighbours import (
    ADAM,
    ASCENT,
    SGD,
    STEPS,
    K,
    accumulated,
    at_the_worst,
    final,
    is_exact,
    lookahead_by_hand,
    table,
    train,
    value,
    whole,
)
from problems import distance, init, loss_fn, same_bits

import accumax
from accumax import accumulate

ROWS, outside = table()
NAN = float("nan")
contrib = optax.contrib


def of_each(gradient):
    """The mean over the calls of `gradient(params, call)`."""

    def mean(params, calls):
        each = [gradient(params, call) for call in calls]
        return jax.tree.map(lambda *g: sum(g) / len(g), *each)

    return mean


def moves_within_a_window(tx):
    """By more than rounding, where a window has two calls; the fifth opens one."""
    four, five = (final(tx, [1.0] * n, jnp.float32(5)) for n in (4, 5))
    return abs(five - four) > 1e-2


@outside("clipping")
def _():
    """`chain(clip, accumulate(adam, k))` | Clips each call's gradient."""
    clip = optax.clip_by_global_norm(0.5)

    def clipped(params, call):
        return clip.update(jax.grad(loss_fn)(params, call), optax.EmptyState())[0]

    got, _ = accumulated(optax.chain(clip, accumulate(ADAM, K)))
    is_exact(got, ADAM, of_each(clipped))


@outside("`differentially_private_aggregate`", works="with a note")
def _():
    """`chain(differentially_private_aggregate(c, s / k**0.5, key), accumulate(sgd, k))`
    | Each example is clipped, and k draws of noise are averaged: with noise multiplier
    s / √k their sum is distributed as the big batch's one draw with s. Then publish
    only the result of the window."""

    def private(noise, inner):
        key = jax.random.key(0)
        aggregate = contrib.differentially_private_aggregate(0.5, noise, key=key)
        return optax.chain(aggregate, inner)

    def per_example(params, batch):
        rows = jax.tree.map(lambda x: x[:, None], batch)
        return jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, rows)

    tx = private(0.0, accumulate(SGD, K))

    @jax.jit
    def step(params, state, call, window):
        updates, state = tx.update(per_example(params, call), state, params)
        return optax.apply_updates(params, updates), state

    def clipped(params, calls):
        each = per_example(params, whole(calls))
        squares = [jnp.sum(g**2, range(1, g.ndim)) for g in jax.tree.leaves(each)]
        factor = jnp.minimum(1, 0.5 / jnp.sqrt(sum(squares)))
        return jax.tree.map(lambda g: jnp.tensordot(factor, g, 1) / 24, each)

    got, _ = train(step, init(), tx.init(init()))
    is_exact(got, SGD, clipped)

    n = 100_000
    tx = private(2.0 / K**0.5, accumulate(optax.sgd(1.0), K))
    got = final(tx, [jnp.zeros((6, n))] * K, jnp.zeros(n))
    want = 2.0 * 0.5 / 24  # multiplier times norm over the examples of the window
    assert abs(jnp.std(got) / want - 1) < 5 / (2 * n) ** 0.5


@outside("what maps 0 to 0, after it")
def _():
    """`chain(accumulate(adam, k), optax.scale(0.5))` | `scale`, `masked(set_to_zero)`,
    `keep_params_nonnegative`, `freeze`: as inside."""
    after = optax.chain(optax.scale(0.5), optax.keep_params_nonnegative())
    params = jax.tree.map(jnp.abs, init())
    got, _ = accumulated(optax.chain(accumulate(SGD, K), after), params)
    is_exact(got, optax.chain(SGD, after), params=params)


@outside("what has a memory, noise or decay, after it", works="no")
def _():
    """`accumulate(chain(adam, optax.add_decayed_weights(1e-2)), k)` | `trace`, `ema`,
    `add_decayed_weights`, `add_noise` after it move the parameters within a window, and
    `scale_by_schedule` counts calls. Put them inside."""
    first = accumulate(optax.sgd(1.0), 2)
    assert not moves_within_a_window(first)
    for after in (
        optax.trace(0.9),
        optax.ema(0.9),
        optax.add_decayed_weights(0.1),
        optax.add_noise(0.1, 0.5, key=0),
    ):
        assert moves_within_a_window(optax.chain(first, after))
    tx = optax.chain(first, optax.scale_by_schedule(lambda n: n))
    assert final(tx, [1.0, 1.0, 1.0, 1.0]) == -(1 + 3)


@outside("what has a memory, noise or decay, before it", works="with a note")
def _():
    """`chain(optax.trace(0.9), accumulate(sgd, k))` | Runs in every call: momentum is
    over calls, k draws of noise whose mean is smaller by √k."""
    tx = optax.chain(optax.trace(0.5), accumulate(optax.sgd(1.0), 2))
    assert final(tx, [2.0, 4.0]) == -(2 + (4 + 0.5 * 2)) / 2


@outside("`masked`", works="with a note")
def _():
    """`chain(masked(accumulate(adam, k), mask), masked(set_to_zero(), rest))` | As
    inside, and leaves that the mask leaves out have no accumulator. As always with
    `masked`, the updates of these leaves are their gradients unless something follows.
    Or use `partition`."""
    mask = {"layer": True, "out": False, "scale": True}
    rest = jax.tree.map(lambda m: not m, mask)

    def both(inner):
        zero = optax.masked(optax.set_to_zero(), rest)
        return optax.chain(optax.masked(inner, mask), zero)

    got, state = accumulated(both(accumulate(ADAM, K)))
    is_exact(got, both(ADAM))
    assert jax.tree.leaves(optax.tree.get(state, "acc_grads")["out"]) == []
    tx = optax.masked(accumulate(SGD, 2), {"a": True, "b": False})
    tree = {"a": jnp.float32(1), "b": jnp.float32(1)}
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert updates == {"a": 0, "b": 1}


@outside("`partition`, `multi_transform`, `freeze`, `selective_transform`")
def _():
    """`partition({'a': accumulate(adam, 4), 'b': accumulate(sgd, 2)}, labels)` | Each
    label has its own windows; a frozen label (`set_to_zero`) has no accumulator. With
    equal windows, as inside. With unequal windows, each group steps when its window
    closes."""
    labels = {"layer": "a", "out": "b", "scale": "b"}
    split = {"a": ADAM, "b": SGD}
    outer = {label: accumulate(inner, K) for label, inner in split.items()}
    got, _ = accumulated(optax.partition(outer, labels))
    is_exact(got, optax.partition(split, labels))

    # The group "b" takes two steps of SGD in a window of the group "a".
    def gradient(params, calls):
        one = jax.grad(loss_fn)(params, whole(calls[:2]))
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, one)
        moved["layer"] = params["layer"]
        two = jax.grad(loss_fn)(moved, whole(calls[2:]))
        layer = jax.tree.map(lambda x, y: (x + y) / 2, one["layer"], two["layer"])
        return jax.tree.map(jnp.add, one, two) | {"layer": layer}

    outer = {"a": accumulate(SGD, K), "b": accumulate(SGD, K // 2)}
    got, _ = accumulated(optax.partition(outer, labels))
    is_exact(got, SGD, gradient)

    mask = {"layer": False, "out": True, "scale": True}
    selective = optax.transforms.selective_transform
    got, state = accumulated(selective(accumulate(SGD, K), freeze_mask=mask))
    assert same_bits([got["out"], got["scale"]], [init()["out"], init()["scale"]])
    assert len(jax.tree.leaves(optax.tree.get(state, "acc_grads"))) == 2


@outside("`inject_hyperparams`", works="with a note")
def _():
    """`inject_hyperparams(lambda rate, every: accumulate(sgd(rate), every))(...)` |
    Even the window can be a hyperparameter. Schedules are read in every call: define
    them in calls."""
    rate = optax.linear_schedule(0.1, 0.0, K * STEPS)

    def make(rate, every):
        return accumulate(optax.sgd(rate), every)

    got, _ = accumulated(optax.inject_hyperparams(make)(rate=rate, every=K))
    is_exact(got, optax.sgd(lambda window: rate(K * window + K - 1)))


@outside("`zero_nans`")
def _():
    """`chain(optax.zero_nans(), accumulate(adam, k))` | A NaN counts as 0 in its call's
    share of the mean."""
    tx = optax.chain(optax.zero_nans(), accumulate(optax.sgd(1.0), 2))
    np.testing.assert_array_equal(final(tx, [[NAN, 1.0], [3.0, 3.0]]), [-1.5, -2])


@outside("`apply_if_finite`", works="with a note")
def _():
    """`apply_if_finite(accumulate(adam, k), 5)` | A call with a NaN has no effect, as
    with `nonfinite='skip'`, until 5 in a row. After such a call `has_updated` still
    describes the call before."""
    tx = optax.apply_if_finite(accumulate(optax.sgd(1.0), 2), 5)
    assert final(tx, [1.0, NAN]) == 0
    assert final(tx, [1.0, NAN, 3.0]) == -2
    state = tx.init(0.0)
    for grad in (1.0, 3.0, NAN):
        _, state = tx.update(jnp.float32(grad), state)
    assert accumax.has_updated(state)


@outside(
    "`MultiSteps`' `skip_not_finite`, `skip_large_updates`; `conditionally_mask`",
    works="with a note",
    optax_names="skip_not_finite skip_large_updates",
)
def _():
    """`conditionally_mask(accumulate(adam, k), condition, forward_extra_args=True)` |
    In place of `skip_not_finite` use `nonfinite='skip'`. For other conditions, a call
    that the condition refuses has no effect: `tx.update(..., norm=norm)` with `lambda
    step, norm: norm < 9`. Its steps count calls. `conditionally_transform` would let
    the gradient through."""

    def small(step, norm):
        return norm < 9

    tx = accumulate(optax.sgd(1.0), 2)
    masked = optax.conditionally_mask(tx, small, forward_extra_args=True)
    params = jnp.float32(0)
    state = masked.init(params)
    for grad in (1.0, 99.0, 3.0):
        updates, state = masked.update(jnp.float32(grad), state, params, norm=grad)
        params = optax.apply_updates(params, updates)
    assert params == -2
    skip = accumulate(optax.sgd(1.0), 2, nonfinite="skip")
    assert final(skip, [1.0, NAN, 3.0]) == -2
    transform = optax.conditionally_transform(tx, lambda step: step > 0)
    assert final(transform, [5.0]) == 5.0


@outside("`reduce_on_plateau`")
def _():
    """`chain(accumulate(adam, k), reduce_on_plateau(accumulation_size=k))` | As inside
    for windows of equal weights: it takes the mean of k values by itself."""
    options = {"factor": 0.5, "patience": 1, "rtol": 0.9}
    plateau = contrib.reduce_on_plateau(**options, accumulation_size=K)
    got, _ = accumulated(optax.chain(accumulate(SGD, K), plateau), extra=value)
    is_exact(got, optax.chain(SGD, contrib.reduce_on_plateau(**options)))


@outside("`apply_every`, `lookahead`", works="with a note")
def _():
    """`lookahead(accumulate(adam, k), sync_period=6 * k, slow_step_size=0.5)` | As
    inside, but their periods count calls. Do not use `reset_state=True`: it multiplies
    the state's flags."""
    tx = optax.chain(accumulate(SGD, K), optax.apply_every(2 * K))
    got, _ = accumulated(tx)
    is_exact(got, optax.chain(SGD, optax.apply_every(2)))
    params = optax.LookaheadParams.init_synced(init())
    got, _ = accumulated(optax.lookahead(accumulate(SGD, K), 2 * K, 0.5), params)
    assert distance(got, lookahead_by_hand()) < 2e-6
    tx = optax.lookahead(accumulate(SGD, K), 2 * K, 0.5, reset_state=True)
    _, state = tx.update(init(), tx.init(params), params)
    assert state.fast_state.emitted.dtype != jnp.bool_


@outside("`contrib.sam`", works="with a note")
def _():
    """`sam(accumulate(sgd, k), ascent, opaque_mode=True)` | Each call climbs by the
    gradient of its rows. The mean of the gradients at these points is applied: another
    method than inside (m-sharpness in the paper of SAM). Without `opaque_mode` it
    multiplies the state's flags, so `lax.scan` refuses it."""

    def extra(value, call, window):
        return {"grad_fn": lambda params, i: jax.grad(loss_fn)(params, call)}

    tx = contrib.sam(accumulate(SGD, K), ASCENT, opaque_mode=True)
    got, _ = accumulated(tx, extra=extra)
    is_exact(got, SGD, of_each(at_the_worst))

    tx = contrib.sam(accumulate(SGD, K), ASCENT)

    def body(state, grads):
        return tx.update(grads, state, init())[1], None

    grads = jax.tree.map(lambda x: jnp.stack([x] * 2), init())
    with pytest.raises(TypeError, match="emitted"):
        jax.lax.scan(body, tx.init(init()), grads)


@outside("`contrib.schedule_free`, `contrib.mechanize`", works="no")
def _():
    """`accumulate(schedule_free(sgd, 0.1), k)` | Around `accumulate` they run in every
    call, on updates that are mostly 0: the parameters move within a window. Put them
    inside."""
    tx = accumulate(optax.sgd(1.0), 2)
    assert moves_within_a_window(contrib.schedule_free(tx, 0.1))
    assert moves_within_a_window(contrib.mechanize(tx, s_init=0.1))


@outside("`MultiSteps`")
def _():
    """`optax.MultiSteps(accumulate(adam, k), m)` | Windows of m k calls, with the costs
    of both. Prefer `accumulate(adam, m * k)`."""
    tx = optax.MultiSteps(accumulate(ADAM, K // 2), 2).gradient_transformation()
    got, _ = accumulated(tx)
    is_exact(got, ADAM)
