"""docs/coming_from.md runs, and gives what the big batch gives."""

import functools
import operator
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import dynamic_scale
from optax import microbatching
from problems import big_batch, distance

import accumax
import accumax.linen
import accumax.nnx

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "coming_from.md").read_text()
ROWS = np.asarray(jax.random.normal(jax.random.key(0), (30, 4)))
CALLS = [(ROWS[i : i + 4, :3], ROWS[i : i + 4, 3:]) for i in range(0, 30, 4)]
WINDOWS = [ROWS[:12], ROWS[12:24], ROWS[24:]]
PARAMS = {"w": jnp.ones((3, 1))}
TOLERANCE = 2e-6


def mean_loss(params, rows):
    return jnp.mean((rows[:, :3] @ params["w"] - rows[:, 3:]) ** 2)


GRADIENT = jax.jit(jax.grad(mean_loss))


@pytest.fixture(scope="module")
def sections():
    """What the names are at the end of each section."""
    namespace, found = {}, {}
    for section in PAGE.split("\n## "):
        blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        assert blocks
        for block in blocks:
            exec(block, namespace)
        found[section.splitlines()[0]] = dict(namespace)
    np.testing.assert_array_equal(namespace["rows"], ROWS)
    return found


def run(tx, grads, params=PARAMS, **extra_args):
    """The parameters after a call with each gradient, by Optax's own way."""
    state, update = tx.init(params), jax.jit(tx.update)
    for i, grad in enumerate(grads):
        extra = {name: values[i] for name, values in extra_args.items()}
        updates, state = update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def gradients(calls=CALLS, params=PARAMS):
    return [GRADIENT(params, np.hstack(xy)) for xy in calls]


def test_every_name_of_accumax_on_the_page_exists():
    names = set(re.findall(r"\baccumax((?:\.\w+)+)", PAGE))
    assert len(names) > 8
    for name in names:
        operator.attrgetter(name[1:])(accumax)


# --- Optax --------------------------------------------------------------------------


def test_the_line_for_multisteps_is_the_big_batch_and_multisteps(sections):
    section = sections["`optax.MultiSteps`"]
    want = big_batch(optax.adamw(1e-2), PARAMS, WINDOWS[:2], loss=mean_loss)
    assert distance(section["params"], want) < TOLERANCE

    tx = optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=3)
    params, state = PARAMS, tx.init(PARAMS)
    for xy in CALLS[:6]:
        updates, state = tx.update(gradients([xy], params)[0], state, params)
        params = optax.apply_updates(params, updates)
    assert distance(section["params"], params) < TOLERANCE


@pytest.mark.parametrize("calls", [2, 3])  # after a window, and within one
def test_a_stored_multisteps_state_goes_on(calls):
    inner = optax.adam(optax.linear_schedule(0.1, 0.0, 4))
    first, grads = optax.MultiSteps(inner, 2), gradients()
    params, old = run(first, grads[:calls])
    want, _ = run(first, grads[:4])
    tx = accumax.accumulate(inner, every=2)
    state = tx.init(params)._replace(
        inner_opt_state=old.inner_opt_state,
        gradient_step=old.gradient_step,
        mini_step=old.mini_step,
        acc_grads=jax.tree.map(lambda mean: mean * old.mini_step, old.acc_grads),
        acc_weight=jnp.float32(old.mini_step),
    )
    for grad in grads[calls:4]:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    assert distance(params, want) < TOLERANCE
    assert state.gradient_step == 2


@pytest.mark.parametrize("mean", [True, False])
def test_use_grad_mean_is_the_reduction(mean):
    grads = gradients()[:6]
    tx = optax.MultiSteps(optax.adam(0.1), 3, use_grad_mean=mean)
    reduction = "mean" if mean else "sum"
    got, _ = run(accumax.accumulate(optax.adam(0.1), 3, reduction=reduction), grads)
    assert distance(got, run(tx, grads)[0]) < TOLERANCE


def test_skip_not_finite_is_nonfinite_skip():
    good = gradients()[:3]
    grads = [good[0], {"w": good[0]["w"] * np.nan}, *good[1:]]
    tx = optax.MultiSteps(
        optax.sgd(0.1), 3, should_skip_update_fn=optax.skip_not_finite
    )
    got, state = run(accumax.accumulate(optax.sgd(0.1), 3, nonfinite="skip"), grads)
    want, _ = run(optax.sgd(0.1), [{"w": sum(g["w"] for g in good) / 3}])
    assert distance(got, want) < TOLERANCE
    assert distance(got, run(tx, grads)[0]) < TOLERANCE
    assert state.skipped == 1


@pytest.mark.parametrize("way", ["drop", "weight"])
def test_a_refused_call_counts_towards_the_window_and_adds_nothing(way):
    good, bad = gradients()[:2], np.nan if way == "drop" else 1e9
    grads = [good[0], {"w": good[0]["w"] * bad}, good[1]]
    options = {"nonfinite": "drop"} if way == "drop" else {}
    extra = {} if way == "drop" else {"weight": [1.0, 0.0, 1.0]}
    got, state = run(accumax.accumulate(optax.sgd(0.1), 3, **options), grads, **extra)
    want, _ = run(optax.sgd(0.1), [{"w": (good[0]["w"] + good[1]["w"]) / 2}])
    assert distance(got, want) < TOLERANCE
    assert accumax.has_updated(state)


def test_apply_if_finite_inside_passes_over_the_window():
    good = gradients()[:4]
    grads = [{"w": good[0]["w"] * np.inf}, *good[1:]]
    inner = optax.apply_if_finite(optax.adam(0.1), 5)
    got, _ = run(accumax.accumulate(inner, 2), grads)
    want, _ = run(optax.adam(0.1), [{"w": (good[2]["w"] + good[3]["w"]) / 2}])
    assert distance(got, want) < TOLERANCE


def test_apply_every_after_sgd_is_the_reduction_sum():
    grads = gradients()[:6]
    old = optax.chain(optax.sgd(0.1), optax.apply_every(3))
    got, _ = run(accumax.accumulate(optax.sgd(0.1), 3, reduction="sum"), grads)
    assert distance(got, run(old, grads)[0]) < TOLERANCE


def test_microbatches_are_those_of_a_scan_by_hand_and_of_the_whole_batch(sections):
    section = sections["`optax.microbatching`, or a `lax.scan` by hand"]
    with jax.enable_x64(True):
        params = {"w": jnp.ones((3, 1), jnp.float64)}
        want = jax.grad(mean_loss)(params, jnp.asarray(ROWS, jnp.float64))
    assert distance(section["grads"], want) < TOLERANCE

    mean = microbatching.AccumulationType.MEAN
    old = microbatching.microbatch(
        jax.grad(mean_loss), argnums=1, microbatch_size=4, accumulator=mean
    )
    new = jax.jit(accumax.grad(mean_loss, microbatch_size=4))
    assert distance(new(PARAMS, ROWS[:12]), old(PARAMS, ROWS[:12])) < TOLERANCE


# --- Flax ---------------------------------------------------------------------------


def running(decay):
    """The running statistics after an update by each whole window."""
    mean, var = np.zeros(3), np.ones(3)
    for rows in WINDOWS:
        x = np.asarray(rows[:, :3], np.float64)
        mean = decay * mean + (1 - decay) * x.mean(0)
        var = decay * var + (1 - decay) * x.var(0)
    return {"mean": mean, "var": var}


def weighted_mean(grads, weights):
    """Of what a window's calls gave, with plain JAX."""
    total = sum(weights)
    return jax.tree.map(
        lambda *gs: sum(w * g for w, g in zip(weights, gs, strict=True)) / total, *grads
    )


def windows():
    return [CALLS[:3], CALLS[3:6], CALLS[6:]]


def linen_loss(net, params, stats, key, x, y):
    predicted, new = net.apply(
        {"params": params, "batch_stats": stats},
        x,
        True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    return jnp.mean((predicted - y) ** 2), new


def test_linen_is_the_mean_of_all_rows_with_a_mask_for_each_call(sections):
    section = sections["Flax Linen"]
    net, tx, key = section["Net"](), optax.adamw(1e-2), jax.random.key(1)
    variables = net.init(jax.random.key(0), CALLS[0][0], False)
    params, stats = variables["params"], variables["batch_stats"]
    grad = jax.jit(jax.grad(functools.partial(linen_loss, net), has_aux=True))
    average, opt_state, i = params, tx.init(params), 0
    for n, calls in enumerate(windows()):
        grads = []
        for x, y in calls:
            grads.append(grad(params, stats, jax.random.fold_in(key, i), x, y)[0])
            i += 1
        grads = weighted_mean(grads, [len(x) for x, _ in calls])
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if n < 2:  # the page's average does not see the flush
            average = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, average, params)
    state = section["state"]
    assert distance(state.params, params) < TOLERANCE
    assert distance(section["average"], average) < TOLERANCE
    assert distance(state.batch_stats["BatchNorm_0"], running(0.9)) < TOLERANCE
    assert (state.step, state.microstep) == (3, 8)


def test_a_key_folded_with_step_repeats_in_a_window_and_one_with_microstep_not():
    tx = {"apply_fn": None, "tx": optax.sgd(0.1), "every": 3}
    state, key = accumax.linen.TrainState.create(params=PARAMS, **tx), jax.random.key(1)
    masks = {"step": [], "microstep": []}
    for grad in gradients()[:3]:
        for name, found in masks.items():
            folded = jax.random.fold_in(key, getattr(state, name))
            found.append(np.asarray(jax.random.bernoulli(folded, 0.5, (64,))))
        state = state.apply_gradients(grads=grad)
    assert len(np.unique(masks["step"], axis=0)) == 1
    assert len(np.unique(masks["microstep"], axis=0)) == 3


def test_linens_train_step_is_the_step_of_the_page(sections):
    section = sections["Flax Linen"]
    net = section["Net"]()

    class State(section["TrainState"]):
        key: jax.Array

    def loss_fn(params, x, y, batch_stats, key):
        return linen_loss(net, params, batch_stats, key, x, y)

    states = [
        State.create(
            apply_fn=net.apply,
            tx=optax.adamw(1e-2),
            every=3,
            momentum=0.9,
            key=jax.random.key(1),
            **net.init(jax.random.key(0), CALLS[0][0], False),
        )
        for _ in range(2)
    ]
    step = State.train_step(loss_fn, mutable=("batch_stats",), rngs=("key",))
    step, (got, want) = jax.jit(step), states
    average = jax.tree.map(jnp.copy, want.params)
    for x, y in CALLS[:6]:  # those of one size
        got, loss = step(got, x, y)
        want, average, want_loss = section["step"](want, average, x, y)
        assert abs(loss - want_loss) < TOLERANCE
    assert distance(got.params, want.params) < TOLERANCE
    assert distance(got.batch_stats, want.batch_stats) < TOLERANCE


def network():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.BatchNorm(3, momentum=0.9, rngs=rngs),
        nnx.Dropout(0.1, rngs=rngs),
        nnx.Linear(3, 1, rngs=rngs),
    )


def test_nnx_is_the_mean_of_all_rows_with_a_mask_for_each_call(sections):
    section = sections["Flax NNX"]
    model = network()
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    grad = nnx.jit(nnx.grad(section["nnx_loss"]))
    for calls in windows():
        grads = [grad(model, x, y) for x, y in calls]
        optimizer.update(model, weighted_mean(grads, [len(x) for x, _ in calls]))
    got = section["model"]
    params = [nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (got, model)]
    assert distance(*params) < TOLERANCE
    norm = got.layers[0]
    assert distance({"mean": norm.mean[...], "var": norm.var[...]}, running(0.9)) < (
        TOLERANCE
    )
    assert got.layers[1].rngs.count[...] == len(CALLS)  # a mask of its own for each
    optimizer = section["optimizer"]
    assert (optimizer.step[...], optimizer.microstep[...]) == (3, 8)


def test_nnxs_train_step_is_the_step_of_the_page(sections):
    section = sections["Flax NNX"]
    models = [network(), network()]
    optimizers = [
        accumax.nnx.Optimizer(m, optax.adamw(1e-2), wrt=nnx.Param, every=3)
        for m in models
    ]
    steps = [nnx.jit(accumax.nnx.train_step(section["nnx_loss"])), section["step"]]
    for step, model, optimizer in zip(steps, models, optimizers, strict=True):
        for x, y in CALLS[:6]:  # those of one size
            step(model, optimizer, x, y)
    states = [
        nnx.to_pure_dict(nnx.state(m, (nnx.Param, nnx.BatchStat))) for m in models
    ]
    assert distance(*states) < TOLERANCE


def test_nnxs_value_and_grad_is_that_of_the_whole_batch(sections):
    section = sections["Flax NNX"]
    kernel = np.asarray(section["plain"].kernel[...], np.float64)
    x, y = np.asarray(ROWS[:, :3], np.float64), np.asarray(ROWS[:, 3:], np.float64)
    errors = x @ kernel - y
    assert abs(section["loss"] - np.mean(errors**2)) < TOLERANCE
    want = {"kernel": 2 * x.T @ errors / 30, "bias": 2 * errors.mean(0)}
    assert distance(nnx.to_pure_dict(section["grads"]), want) < TOLERANCE


def test_a_batchnorm_has_one_update_within_a_call():
    model = nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    loss = accumax.nnx.value_and_grad(
        lambda model, x: jnp.mean(model(x) ** 2), microbatch_size=4
    )
    for rows in WINDOWS:
        nnx.jit(loss)(model, rows[:, :3])
    statistics = {"mean": model.mean[...], "var": model.var[...]}
    assert distance(statistics, running(0.9)) < TOLERANCE


# --- PyTorch ------------------------------------------------------------------------


def test_the_loop_is_three_clipped_steps_on_whole_windows(sections):
    section = sections["PyTorch loops"]
    schedule = optax.cosine_decay_schedule(1e-2, decay_steps=3)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    want = big_batch(inner, PARAMS, WINDOWS, loss=mean_loss)
    assert distance(section["params"], want) < TOLERANCE
    assert section["opt_state"].gradient_step == 3


def test_the_partial_window_is_divided_by_what_it_saw_and_pytorchs_is_not():
    grads, weights = gradients(CALLS[6:]), [4.0, 2.0]
    whole = GRADIENT(PARAMS, WINDOWS[2])
    tx = accumax.accumulate(optax.sgd(1.0), every=3)
    got, state = run(tx, grads, weight=weights)
    assert distance(got, PARAMS) == 0
    got, _ = accumax.flush(tx, got, state)
    want = jax.tree.map(operator.sub, PARAMS, whole)
    assert distance(got, want) < TOLERANCE
    torchs = {"w": sum(g["w"] for g in grads) / 3}
    assert distance(torchs, whole) > 0.01


def test_sums_over_items_are_divided_by_the_items_of_the_window():
    sums = [
        {"w": g["w"] * len(x)} for g, (x, _) in zip(gradients(), CALLS, strict=True)
    ]
    weights = [float(len(x)) for x, _ in CALLS]
    whole = GRADIENT(PARAMS, ROWS)
    for reduction, factor in (("mean_of_sums", 1), ("sum", len(ROWS))):
        tx = accumax.accumulate(optax.sgd(1 / factor), every=8, reduction=reduction)
        got, _ = run(tx, sums, weight=weights)
        want = jax.tree.map(operator.sub, PARAMS, whole)
        assert distance(got, want) < TOLERANCE


def test_momentum_of_pytorch_is_the_rest_of_flaxs():
    # PyTorch: running = (1 - 0.1) running + 0.1 batch.
    model = linen.BatchNorm(False, momentum=0.9)
    x = jnp.asarray(ROWS)
    variables = model.init(jax.random.key(0), x)
    _, new = model.apply(variables, x, mutable=["batch_stats"])
    assert distance(new["batch_stats"]["mean"], 0.1 * ROWS.mean(0)) < TOLERANCE


def test_a_step_that_donates_takes_no_more_than_multisteps_and_one_that_does_not_more():
    params = {"w": jnp.ones((256, 256))}

    def memory(tx, donate):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        donated = (0, 1) if donate else ()
        state = jax.eval_shape(tx.init, params)
        found = jax.jit(step, donate_argnums=donated).lower(params, state, params)
        found = found.compile().memory_analysis()
        whole = found.argument_size_in_bytes + found.temp_size_in_bytes
        return whole + found.output_size_in_bytes - found.alias_size_in_bytes

    ours = accumax.accumulate(optax.adamw(1e-2), 3)
    theirs = optax.MultiSteps(optax.adamw(1e-2), 3)
    assert memory(ours, True) <= memory(theirs, True)
    assert memory(ours, False) > memory(ours, True)


def test_the_norm_in_a_snapshot_is_that_of_the_window():
    norm = optax.snapshot("norm", optax.tree.norm)
    tx = accumax.accumulate(optax.chain(norm, optax.sgd(1.0)), 2)
    state = tx.init(jnp.zeros(2))
    for grad in (jnp.array([6.0, 0.0]), jnp.array([0.0, 8.0])):
        _, state = tx.update(grad, state)
    assert optax.tree.get(state, "norm") == 5.0


@pytest.mark.parametrize("where", [False, True], ids=["as the page", "with a where"])
def test_a_dynamic_scale_refuses_a_call_by_the_policy_and_not_by_a_where(where):
    tx = accumax.accumulate(optax.sgd(1.0), 2, nonfinite="skip")
    start = accumax.linen.TrainState.create(apply_fn=None, params=jnp.ones(()), tx=tx)
    scale = dynamic_scale.DynamicScale(scale=2.0**100)

    @jax.jit
    def step(state, scale, x):
        fun = scale.value_and_grad(lambda w: jnp.mean(w * x))
        scale, finite, _, grads = fun(state.params)
        new = state.apply_gradients(grads=grads)
        if where:
            keep = lambda a, b: jnp.where(finite, a, b)  # noqa: E731
            new = new.replace(
                params=jax.tree.map(keep, new.params, state.params),
                opt_state=jax.tree.map(keep, new.opt_state, state.opt_state),
            )
        return new, scale

    state = start
    for x in (1.0, 1e30, 3.0):  # the second overflows
        state, scale = step(state, scale, jnp.float32(x))
    assert state.step == 1
    assert state.params == 1 - 2
    # With the where, the state does not know of the call that was refused.
    assert state.opt_state.skipped == (0 if where else 1)


def test_a_scaled_loss_gives_the_update_of_the_loss():
    tx = accumax.accumulate(optax.sgd(1.0), 2)

    def run(scale):
        def loss(w, x):
            return scale * jnp.sum(w * x), scale * x.shape[0]

        step = jax.jit(accumax.train_step(loss, tx, weighted=True))
        w, state = jnp.ones(()), tx.init(jnp.ones(()))
        for x in (jnp.ones(1), jnp.arange(3.0)):
            w, state, _ = step(w, state, x)
        return w

    assert run(2.0**15) == run(1.0) == 0


def test_what_was_donated_is_gone():
    tx = accumax.accumulate(optax.sgd(1.0), 2)
    step = accumax.train_step(lambda w, x: jnp.sum(w * x), tx)
    w = jnp.ones(2)
    jax.jit(step, donate_argnums=(0, 1))(w, tx.init(w), jnp.ones(2))
    assert w.is_deleted()
