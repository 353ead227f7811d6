import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    data,
    distance,
    init,
    loss_fn,
    microbatches,
    same_bits,
    weighted_loss_fn,
)

import accumax

TX = accumax.accumulate(optax.adamw(0.05), 3)


def run(step, tx, params, calls, **each):
    """(params, state, outputs) after a call for each batch; `each` has a value a
    call."""
    step = jax.jit(step)
    state, outputs = tx.init(params), []
    for i, batch in enumerate(calls):
        extra = {name: values[i] for name, values in each.items()}
        params, state, out = step(params, state, batch, **extra)
        outputs.append(out)
    return params, state, outputs


def calls(dtype=jnp.float32, windows=2):
    return [p for batch in data(windows, dtype) for p in microbatches(batch, [8, 8, 8])]


@pytest.mark.parametrize(
    ("weighted", "reduction"),
    [(False, "mean"), (False, "sum"), (True, "mean"), (True, "mean_of_sums")],
)
def test_in_place_equals_its_carried_twin_to_the_bit(reduction, weighted):
    fun = weighted_loss_fn if weighted else loss_fn
    tx = accumax.accumulate(optax.adamw(0.05), 3, reduction=reduction)
    results = [
        run(
            accumax.train_step(fun, tx, weighted=weighted, in_place=in_place),
            tx,
            init(),
            calls(),
        )
        for in_place in (True, False)
    ]
    assert same_bits(*results)
    assert results[0][1].gradient_step == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_have_float32_accumulators_in_both_forms(dtype):
    results = [
        run(
            accumax.train_step(loss_fn, TX, in_place=in_place),
            TX,
            init(dtype),
            calls(dtype),
        )
        for in_place in (True, False)
    ]
    for params, state, _ in results:
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        assert {x.dtype for x in jax.tree.leaves(state.acc_grads)} == {
            jnp.dtype(jnp.float32)
        }
    eps = float(jnp.finfo(dtype).eps)
    assert distance(results[0][0], results[1][0]) <= 8 * eps


def test_apply_gradients_and_update_and_train_step_agree():
    tx, params = TX, init()
    state = other = tx.init(params)
    a = b = params
    update = jax.jit(tx.update)
    fused = jax.jit(functools.partial(accumax.apply_gradients, tx))
    for batch in calls():
        grads = jax.grad(loss_fn)(a, batch)
        updates, state = update(grads, state, a)
        a = optax.apply_updates(a, updates)
        b, other = fused(b, other, grads)
    assert state.mini_step == 0
    stale = {"acc_grads": ()}  # the fused forms divide it in place
    state, other = state._replace(**stale), other._replace(**stale)
    assert distance((a, state), (b, other)) < 1e-6
    c, third, _ = run(accumax.train_step(loss_fn, tx), tx, params, calls())
    assert distance((a, state), (c, third._replace(**stale))) < 1e-5


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_aux_and_loss_come_out_as_the_loss_function_gave_them(weighted, in_place):
    def with_aux(params, batch):
        out = weighted_loss_fn(params, batch) if weighted else loss_fn(params, batch)
        return out, {"rows": batch["x"].shape[0], "params": params["scale"]}

    step = accumax.train_step(
        with_aux, TX, has_aux=True, weighted=weighted, in_place=in_place
    )
    batches = calls()[:1]
    _, _, [(loss, aux)] = run(step, TX, init(), batches)
    np.testing.assert_allclose(loss, loss_fn(init(), batches[0]), rtol=1e-6)
    assert aux["rows"] == 8
    assert aux["params"] == init()["scale"]


def test_the_loss_reaches_the_inner_as_value_and_a_passed_value_wins():
    inner = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau())
    tx = accumax.accumulate(inner, 3, averaged_args=("value",))
    step = accumax.train_step(loss_fn, tx)
    _, state, losses = run(step, tx, init(), calls()[:3])
    best = optax.tree.get(state, "best_value")
    np.testing.assert_allclose(best, np.mean(losses), rtol=1e-6)
    _, state, _ = run(step, tx, init(), calls()[:3], value=[1.0, 2.0, 6.0])
    assert optax.tree.get(state, "best_value") == 3.0


def test_a_weight_and_a_flush_may_be_passed():
    step = accumax.train_step(loss_fn, accumax.accumulate(optax.sgd(1.0), 9))
    tx = accumax.accumulate(optax.sgd(1.0), 9)
    batches = calls()[:2]
    got, state, _ = run(
        step, tx, init(), batches, weight=[3.0, 1.0], flush=[False, True]
    )
    grads = [jax.grad(loss_fn)(init(), batch) for batch in batches]
    want = jax.tree.map(lambda p, a, b: p - (3 * a + b) / 4, init(), *grads)
    assert distance(got, want) < 1e-5
    assert state.gradient_step == 1


def test_jax_issue_32411_layers_scanned_within_a_scan_over_microbatches():
    rng = np.random.default_rng(0)
    layers = jnp.asarray(rng.normal(size=(3, 16, 16)) / 4, jnp.float32)
    batch = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 7, 16), (5, 7))]

    def loss(layers, x, y):
        out, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)
        return jnp.mean((jnp.mean(out, -1) - y) ** 2)

    tx = accumax.accumulate(optax.sgd(1.0), 5)

    @functools.partial(jax.jit, static_argnums=0)
    def window(in_place, layers):
        step = accumax.train_step(loss, tx, in_place=in_place)

        def one(carry, xy):
            params, state, value = step(*carry, *xy)
            return (params, state), value

        (params, _), losses = jax.lax.scan(one, (layers, tx.init(layers)), tuple(batch))
        return params, losses

    assert same_bits(window(True, layers), window(False, layers))
    whole = [x.reshape(35, *x.shape[2:]) for x in batch]
    want = layers - jax.grad(loss)(layers, *whole)
    assert distance(window(True, layers)[0], want) < 1e-6


def test_a_nan_is_gone_by_the_next_window():
    batches = calls()
    batches[1] = jax.tree.map(lambda x: x * jnp.nan, batches[1])
    tx = accumax.accumulate(optax.sgd(0.1), 3)
    step = jax.jit(accumax.train_step(loss_fn, tx))
    state = tx.init(init())
    for batch in batches[:3]:
        lost, state, _ = step(init(), state, batch)
    assert jnp.isnan(lost["scale"])
    params = init()
    for batch in batches[3:]:
        params, state, _ = step(params, state, batch)
    want, _, _ = run(step, tx, init(), batches[3:])
    assert same_bits(params, want)


@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
def test_a_policy_that_must_see_the_gradient_sees_it(nonfinite):
    tx = accumax.accumulate(optax.sgd(0.1), 2, nonfinite=nonfinite)
    batches = calls()[:3]
    batches[1] = jax.tree.map(lambda x: x * jnp.nan, batches[1])
    params, state, _ = run(accumax.train_step(loss_fn, tx), tx, init(), batches)
    assert state.skipped == 1
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
    assert state.mini_step == {"skip": 0, "drop": 1}[nonfinite]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_weighted_call_without_items_adds_nothing(in_place):
    def fun(params, batch):
        total, _ = weighted_loss_fn(params, batch)
        return total * batch["items"], 8 * batch["items"]

    tx = accumax.accumulate(optax.sgd(0.1), 3)
    batches = [b | {"items": jnp.float32(i > 0)} for i, b in enumerate(calls()[:3])]
    step = accumax.train_step(fun, tx, weighted=True, in_place=in_place)
    got, state, losses = run(step, tx, init(), batches)
    assert losses[0] == 0
    tx = accumax.accumulate(optax.sgd(0.1), 2)
    step = accumax.train_step(weighted_loss_fn, tx, weighted=True, in_place=in_place)
    want, _, _ = run(step, tx, init(), calls()[1:3])
    assert distance(got, want) == 0
    assert state.skipped == 0


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_an_unusable_weight_from_the_loss_is_counted(bad, in_place):
    def fun(params, batch):
        return weighted_loss_fn(params, batch)[0], batch["items"]

    items = [8.0, bad, 8.0]
    batches = [
        b | {"items": jnp.float32(i)} for b, i in zip(calls()[:3], items, strict=True)
    ]
    tx = accumax.accumulate(optax.sgd(0.1), 3)
    step = accumax.train_step(fun, tx, weighted=True, in_place=in_place)
    got, state, _ = run(step, tx, init(), batches)
    assert state.skipped == 1
    tx = accumax.accumulate(optax.sgd(0.1), 2)
    step = accumax.train_step(fun, tx, weighted=True, in_place=in_place)
    want, _, _ = run(step, tx, init(), [batches[0], batches[2]])
    assert distance(got, want) == 0


def test_integers_keys_and_static_leaves_ride_along():
    class Model(eqx.Module):
        w: jax.Array
        ids: jax.Array
        key: jax.Array
        activation: object

        def __call__(self, x):
            noise = jax.random.normal(self.key, x.shape)
            return self.activation(x * self.w[self.ids] + 0 * noise)

    model = Model(jnp.ones(3), jnp.array([2, 1]), jax.random.key(0), jnp.tanh)
    tx = accumax.accumulate(optax.sgd(0.1), 1)

    def loss(model, x):
        return jnp.sum(model(x) ** 2)

    trained, state, value = accumax.train_step(loss, tx)(
        model, tx.init(model), jnp.ones(2)
    )
    assert value == loss(model, jnp.ones(2))
    assert trained.w[0] == 1
    assert jnp.all(trained.w[1:] < 1)
    assert trained.activation is jnp.tanh
    assert state.acc_grads.ids is None


def test_complex_parameters_descend():
    def loss(params, x):
        return jnp.sum(jnp.abs(params["c"] - x) ** 2)

    params = {"c": jnp.array([1 + 1j, -2j])}
    tx = accumax.accumulate(optax.sgd(0.1), 2)
    got = [
        run(accumax.train_step(loss, tx, in_place=p), tx, params, [jnp.zeros(2)] * 2)[0]
        for p in (True, False)
    ]
    assert same_bits(*got)


def test_arguments_of_the_loss_are_passed_on():
    def loss(params, a, b, c):
        return jnp.sum(params * (a + b["x"] * c))

    tx = accumax.accumulate(optax.sgd(1.0), 1)
    params, _, value = accumax.train_step(loss, tx)(
        jnp.ones(2), tx.init(jnp.ones(2)), 1.0, {"x": 2.0}, 3
    )
    np.testing.assert_array_equal(params, [-6.0, -6.0])
    assert value == 14


@pytest.mark.parametrize("in_place", [True, False])
def test_padding_with_a_nan_in_its_gradient_adds_nothing(in_place):
    def norm(params, scale, weight):  # the gradient of a norm at zero is NaN
        return jnp.sqrt(jnp.sum((params * scale) ** 2)), weight

    tx = accumax.accumulate(optax.sgd(0.1), 2)
    step = accumax.train_step(norm, tx, weighted=True, in_place=in_place)
    params, state = jnp.ones(2), tx.init(jnp.ones(2))
    for value in (0.0, 1.0):
        params, state, _ = jax.jit(step)(params, state, value, value)
    assert jnp.isfinite(params).all()
    assert state.gradient_step == 1


# --- errors -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["apply_gradients", "train_step"])
@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip(1.0), accumax.accumulate(optax.sgd(0.1), 2)),
        optax.adam(0.1),
        optax.MultiSteps(optax.adam(0.1), 2),
        None,
    ],
    ids=["chain", "adam", "MultiSteps", "None"],
)
def test_a_tx_that_cannot_be_fused_is_an_error_that_says_what_to_do(form, tx):
    def make():
        if form == "train_step":
            return accumax.train_step(loss_fn, tx)
        return accumax.apply_gradients(tx, 1.0, None, 1.0)

    with pytest.raises(TypeError, match=rf"accumax.{form} needs .* outermost.*chain"):
        make()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("fun", "options", "message"),
    [
        (lambda p, b: (loss_fn(p, b), 1), {}, "has_aux=True"),
        (lambda p, b: loss_fn(p, b), {"has_aux": True}, r"\(loss, aux\)"),
        (lambda p, b: loss_fn(p, b), {"weighted": True}, r"\(loss_sum, weight\)"),
        (lambda p, b: b["x"], {}, "scalar"),
        (lambda p, b: 3, {}, "floating-point scalar"),
    ],
)
def test_a_loss_of_another_form_is_an_error(fun, options, message, in_place):
    step = accumax.train_step(fun, TX, in_place=in_place, **options)
    with pytest.raises(TypeError, match=message):
        step(init(), TX.init(init()), calls()[0])


def test_a_weight_beside_a_weighted_loss_is_an_error():
    step = accumax.train_step(weighted_loss_fn, TX, weighted=True)
    with pytest.raises(TypeError, match=r"weight=2.*weighted=True"):
        step(init(), TX.init(init()), calls()[0], weight=2.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": -2.0}, ValueError, "weight=-2.0"),
        ({"flush": 1}, TypeError, "flush"),
        ({"opt_state": optax.EmptyState()}, TypeError, "AccumulateState"),
        ({"params": init() | {"scale": jnp.ones(2)}}, ValueError, r"params\['scale'\]"),
    ],
)
def test_bad_input_changes_nothing(change, error, message):
    step = accumax.train_step(loss_fn, TX)
    good = {"params": init(), "opt_state": TX.init(init())}
    before = jax.tree.map(np.array, good)
    passed = good | change
    args = passed.pop("params"), passed.pop("opt_state"), calls()[0]
    with pytest.raises(error, match=message):
        step(*args, **passed)
    assert same_bits(good, before)


def test_an_averaged_argument_that_is_missing_is_named():
    tx = accumax.accumulate(optax.sgd(0.1), 2, averaged_args=("norm",))
    with pytest.raises(TypeError, match='"norm"'):
        accumax.train_step(loss_fn, tx)(init(), tx.init(init()), calls()[0])


def test_a_keyword_that_the_loss_knows_is_not_swallowed():
    def loss(params, x, mask=None):
        return jnp.sum(params * x if mask is None else params * x * mask)

    step = accumax.train_step(loss, TX)
    state = TX.init(jnp.ones(2))
    with pytest.raises(TypeError, match=r"\['mask'\].*by position"):
        step(jnp.ones(2), state, jnp.ones(2), mask=jnp.zeros(2))
    step(jnp.ones(2), state, jnp.ones(2), jnp.zeros(2))


def test_a_loss_that_is_no_function_is_an_error():
    with pytest.raises(TypeError, match="loss_fn=None"):
        accumax.train_step(None, TX)


@pytest.mark.parametrize("form", ["train_step", "apply_gradients", "flush"])
def test_params_of_none_are_named(form):
    state = TX.init(init())
    forms = {
        "train_step": lambda: accumax.train_step(loss_fn, TX)(None, state, calls()[0]),
        "apply_gradients": lambda: accumax.apply_gradients(TX, None, state, init()),
        "flush": lambda: accumax.flush(TX, None, state),
    }
    with pytest.raises(ValueError, match="params has no leaf"):
        forms[form]()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda x: accumax.accumulate(optax.sgd(0.1), 2, track_norm=x), "track_norm"),
        (
            lambda x: accumax.accumulate(optax.sgd(0.1), 2, offload_optimizer=x),
            "offload_optimizer",
        ),
        (lambda x: accumax.train_step(loss_fn, TX, weighted=x), "weighted"),
        (lambda x: accumax.train_step(loss_fn, TX, has_aux=x), "has_aux"),
        (lambda x: accumax.train_step(loss_fn, TX, in_place=x), "in_place"),
        (
            lambda x: accumax.value_and_grad(loss_fn, microbatches=2, weighted=x),
            "weighted",
        ),
        (
            lambda x: accumax.value_and_grad(loss_fn, 0, x, microbatches=2),
            "has_aux",
        ),
        (lambda x: accumax.grad(loss_fn, microbatches=2, in_place=x), "in_place"),
        (
            lambda x: accumax.microbatch(loss_fn, microbatch_size=2, in_place=x),
            "in_place",
        ),
        (
            lambda x: accumax.DataParallel("data", shard_optimizer=x),
            "shard_optimizer",
        ),
    ],
)
@pytest.mark.parametrize("flag", ["no", 0.9, None, 1])
def test_a_flag_is_true_or_false(make, name, flag):
    with pytest.raises(TypeError, match=f"{name}={flag!r} must be True or False"):
        make(flag)
