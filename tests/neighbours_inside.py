"""Rows of docs/neighbours.md: inside, what wraps an optimizer or stands beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from neighbours import (
    ADAM,
    ASCENT,
    FORMS,
    OPTAX,
    SGD,
    STEPS,
    K,
    accumulated,
    at_the_worst,
    final,
    is_exact,
    is_inside,
    lookahead_by_hand,
    table,
    whole,
)
from problems import big_batch, cast, data, distance, init, loss_fn

import accumax
from accumax import accumulate

ROWS, inside = table()
NAN = float("nan")
contrib = optax.contrib


@inside("`contrib.schedule_free`", optax_names="contrib.schedule_free")
def _():
    """`accumulate(optax.contrib.schedule_free(sgd, 0.1), k)` | Evaluate at
    `optax.contrib.schedule_free_eval_params(opt_state.inner_opt_state, params)`."""
    inner = contrib.schedule_free(SGD, 0.1)
    got, state = accumulated(accumulate(inner, K), form="train_step")
    is_exact(got, inner)
    # By the definition: z descends, x is the mean of the z, y = 0.9 x + 0.1 z.
    with jax.enable_x64(True):
        x = y = z = cast(init(), jnp.float64)
        for n, batch in enumerate(cast(data(STEPS), jnp.float64)):
            grads = jax.grad(loss_fn)(y, batch)
            z = jax.tree.map(lambda z, g: z - 0.1 * g, z, grads)
            x = jax.tree.map(lambda x, z, n=n: (n * x + z) / (n + 1), x, z)
            y = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z, x, z)
        assert distance(got, y) < 1e-5
        got = contrib.schedule_free_eval_params(state.inner_opt_state, got)
        assert distance(got, x) < 1e-5


@inside("`lookahead`", optax_names="lookahead")
def _():
    """`accumulate(optax.lookahead(adam, sync_period=6, slow_step_size=0.5), k)` |
    `sync_period` counts windows. Parameters are `optax.LookaheadParams`; `train_step`
    calls the loss with the fast parameters."""
    params = optax.LookaheadParams.init_synced(init())
    tx = accumulate(optax.lookahead(SGD, 2, 0.5), K)
    got, _ = accumulated(tx, params, form="train_step")
    assert distance(got, lookahead_by_hand()) < 2e-6


@inside("`contrib.mechanize`", optax_names="contrib.mechanize")
def _():
    """`accumulate(optax.contrib.mechanize(adam), k)` | Its state begins with the
    parameters. `accumulate` copies them, so that both can be donated."""
    is_inside(contrib.mechanize(SGD, s_init=0.1))
    params = init()
    held = accumulate(contrib.mechanize(SGD), K).init(params).inner_opt_state.x0
    pointers = [x["layer"]["w"].unsafe_buffer_pointer() for x in (params, held)]
    assert pointers[0] != pointers[1]


@inside(
    "`novograd`, `contrib.mechanize`, `contrib.galore` with half-precision parameters",
    works="with a note",
)
def _():
    """`accumulate(optax.chain(as_parameters, optax.novograd(3e-4)), k)` | They need
    gradients in the parameters' dtype, in Optax alone too. Here they get the float32
    mean: a TypeError. Cast the mean: `as_parameters = optax.stateless(lambda g, p:
    optax.tree.cast_like(g, p))`."""
    as_parameters = optax.stateless(lambda g, p: optax.tree.cast_like(g, p))
    half = init(jnp.bfloat16)
    for bare in (optax.novograd(1e-2), contrib.mechanize(SGD, s_init=0.1)):
        tx = accumulate(optax.chain(as_parameters, bare), K)
        got, state = accumulated(tx, half)
        assert state.gradient_step == STEPS
        is_exact(got, bare, params=half, dtype=jnp.bfloat16)
        with pytest.raises(TypeError) as found:
            accumulated(accumulate(bare, K), half)
        assert any("cast the mean" in x for x in found.value.__notes__)


def sam_of_windows(params, calls):
    return at_the_worst(params, whole(calls))


@inside("`contrib.sam`, transparent", works="with a note", optax_names="contrib.sam")
def _():
    """`accumulate(optax.contrib.sam(sgd, ascent), k)` | Windows alternate: the first
    climbs, the second goes back and descends. So pass each window's data twice, and
    read the parameters after the second time. `ascent` is `chain(contrib.normalize(),
    sgd(rho))`. Donation: as for `mechanize`."""
    twice = [batch for batch in data(STEPS) for _ in range(2)]
    for form in FORMS:
        tx = accumulate(contrib.sam(SGD, ASCENT), K)
        got, _ = accumulated(tx, batches=twice, form=form)
        is_exact(got, SGD, sam_of_windows)


@inside("`contrib.sam`, opaque", works="with a note", optax_names="contrib.sam")
def _():
    """`accumulate(optax.contrib.sam(sgd, ascent, opaque_mode=True), k)` | Exact if
    `grad_fn=` is the gradient of the whole window, for instance `lambda params, i:
    accumax.grad(loss, microbatch_size=4)(params, window)`; with the gradient of the
    call's rows it is another method."""
    grad = accumax.grad(loss_fn, microbatch_size=6)

    def extra(value, call, window):
        return {"grad_fn": lambda params, i: grad(params, window)}

    tx = accumulate(contrib.sam(SGD, ASCENT, opaque_mode=True), K)
    got, _ = accumulated(tx, extra=extra)
    is_exact(got, SGD, sam_of_windows)


@inside(
    "`contrib.sophia`",
    works="with a note",
    optax_names="contrib.sophia contrib.hutchinson_estimator_diag_hessian",
)
def _():
    """`accumulate(optax.contrib.sophia(1e-3), k)` | Exact if `obj_fn=` is the loss of
    the whole window; it is used at the boundary. (The random signs differ between
    float64 and float32, so the test compares with the big batch in float32.)"""
    # With a small gamma it clips nearly all to a sign, which any gradient would have.
    inner = contrib.sophia(0.1, update_interval=1, gamma=10.0)

    def extra(value, call, window):
        return {"obj_fn": lambda params: loss_fn(params, window)}

    def with_value_fn(grads, state, params, value_fn, **_):
        return inner.update(grads, state, params, obj_fn=value_fn)

    alone = optax.GradientTransformationExtraArgs(inner.init, with_value_fn)
    want = big_batch(alone, init(), data(STEPS), jnp.float32)
    got, _ = accumulated(accumulate(inner, K), extra=extra)
    assert distance(got, want) < 1e-5
    assert distance(want, init()) > 0.1


def noise_in_float32(noise):
    """Draws as in float32, whatever the gradient is; it must come first."""

    def update(updates, state, params=None):
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), updates)
        drawn, state = noise.update(zeros, state, params)
        return jax.tree.map(jnp.add, updates, drawn), state

    return optax.GradientTransformation(noise.init, update)


@inside("`add_noise`, `noisy_sgd`", optax_names="add_noise noisy_sgd")
def _():
    """`accumulate(optax.noisy_sgd(0.1, key=key), k)` | One draw per window, added to
    the mean."""
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    got, _ = accumulated(accumulate(optax.chain(noise, SGD), K))
    is_exact(got, optax.chain(noise_in_float32(noise), SGD))
    noisy = optax.noisy_sgd(0.1, 0.1, 0.5, key=jax.random.key(0))
    again, _ = accumulated(accumulate(noisy, K))
    assert distance(again, got) < 1e-6


@inside("`zero_nans`", works="with a note", optax_names="zero_nans")
def _():
    """`accumulate(optax.chain(optax.zero_nans(), adam), k)` | An entry that was NaN in
    any call is 0 for the window. `nonfinite='skip'` or `'drop'` leaves out only the
    call."""
    tx = accumulate(optax.chain(optax.zero_nans(), optax.sgd(1.0)), 2)
    np.testing.assert_array_equal(final(tx, [[NAN, 1.0], [3.0, 3.0]]), [0, -2])


@inside("`apply_if_finite`", works="with a note", optax_names="apply_if_finite")
def _():
    """`accumulate(optax.apply_if_finite(adam, 5), k)` | A NaN in any call rejects the
    window: nothing is applied and the moments stay, though the window counts."""
    tx = accumulate(optax.apply_if_finite(optax.adam(1.0), 5), 2)
    assert final(tx, [NAN, 1.0]) == 0
    got = final(tx, [NAN, 1.0, 2.0, 4.0])
    np.testing.assert_allclose(got, -1.0, rtol=1e-5)  # Adam's first step


@inside(
    "`conditionally_transform`, `conditionally_mask`, `apply_every`",
    optax_names="conditionally_transform conditionally_mask apply_every",
)
def _():
    """`accumulate(optax.conditionally_mask(sgd, lambda step: step % 2 == 0), k)` |
    Their steps count windows."""
    inner = optax.chain(
        optax.conditionally_transform(optax.scale(3.0), lambda step: step % 2 == 0),
        optax.conditionally_mask(optax.identity(), lambda step: step > 0),
        SGD,
        optax.apply_every(2),
    )
    is_inside(inner)


@inside("`snapshot`", optax_names="snapshot")
def _():
    """`accumulate(optax.chain(optax.snapshot('norm', optax.tree.norm), adam), k)` |
    Measures the big batch's gradient: `optax.tree.get(opt_state, 'norm')`."""
    if snapshot := OPTAX.get("snapshot"):
        tx = accumulate(optax.chain(snapshot("sum", jnp.sum), SGD), 2)
        state = tx.init(jnp.zeros(2))
        for grad in ([1.0, 2.0], [3.0, 4.0], [9.0, 9.0]):
            _, state = tx.update(jnp.array(grad), state)
        assert optax.tree.get(state, "sum") == 5.0


@inside(
    "`monitor`, `measure_with_ema`", works="no", optax_names="monitor measure_with_ema"
)
def _():
    """`optax.chain(optax.monitor(...), accumulate(adam, k))` | Its first update changes
    the structure of its state (also under `lax.scan`, without accumax), so inside it is
    a TypeError. Outside it measures each call. Inside, use `snapshot`."""
    if monitor := OPTAX.get("monitor"):
        norm = optax.tree.norm
        measure = monitor({"norm": norm, "ema": optax.measure_with_ema(norm, 0.9)})
        tx = accumulate(optax.chain(measure, SGD), 2)
        with pytest.raises(TypeError, match=r"changes the structure.*MonitorState"):
            tx.update(init(), tx.init(init()), init())
        got, state = accumulated(optax.chain(measure, accumulate(SGD, K)))
        is_exact(got, SGD)
        assert "norm" in state[0].measurements


@inside(
    "per-example clipping: `contrib.differentially_private_aggregate`, `dpsgd`",
    works="no",
    optax_names="contrib.differentially_private_aggregate contrib.dpsgd",
)
def _():
    """`chain(differentially_private_aggregate(...), accumulate(sgd, k))` | Its
    gradients have an axis of examples, which the parameters lack: a ValueError. Put it
    outside (see the next table)."""
    private = contrib.differentially_private_aggregate(1.0, 0.0, key=jax.random.key(0))
    tx = accumulate(private, 2)
    with pytest.raises(ValueError, match=r"grads has shape \(5, 3\).*\(3,\) there"):
        tx.update(jnp.ones((5, 3)), tx.init(jnp.ones(3)), jnp.ones(3))


@inside(
    "`MultiSteps`, another `accumulate`", works="with a note", optax_names="MultiSteps"
)
def _():
    """`accumulate(optax.MultiSteps(adam, m).gradient_transformation(), k)` | Windows of
    m k calls, the mean of means. A bare `MultiSteps` is no transformation: a
    TypeError."""
    with pytest.raises(TypeError, match="GradientTransformation"):
        accumulate(optax.MultiSteps(SGD, 2), 2)
    steps = optax.MultiSteps(ADAM, 2).gradient_transformation()
    for inner in (steps, accumulate(ADAM, 2)):
        got, _ = accumulated(accumulate(inner, K // 2))
        is_exact(got, ADAM)
