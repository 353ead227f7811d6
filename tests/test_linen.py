"""`accumax.linen.TrainState` against Flax's own on the whole batch."""

import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax.training import train_state
from problems import big_batch, data, distance, init, loss_fn, microbatches, same_bits

import accumax.linen

INNER = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(optax.linear_schedule(0.05, 0.01, 3), eps=1e-3, weight_decay=0.1),
)


class State(accumax.linen.TrainState):
    """As Flax's users subclass it: fields without defaults."""

    batch_stats: Any
    key: jax.Array


def state_of(model, variables=None, **options):
    batch = nets.rows(8)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = variables or model.init(keys, batch["x"])
    options = {"tx": INNER, "every": 3, "momentum": nets.MOMENTA} | options
    options["key"] = options.get("key", jax.random.key(2))
    return State.create(apply_fn=model.apply, **variables, **options)


def net_loss(model, has_aux=False, weighted=False):
    def loss(params, batch, batch_stats, key):
        variables = {"params": params, "batch_stats": batch_stats}
        y, new = model.apply(
            variables, batch["x"], mutable=["batch_stats"], rngs={"dropout": key}
        )
        each = jnp.sum((y - batch["y"]) ** 2, axis=-1)
        value = (each.sum(), jnp.float32(len(each))) if weighted else each.mean()
        return value, ((new, {"key": jax.random.key_data(key)}) if has_aux else new)

    return loss


def step_of(model, jit=True, has_aux=False, weighted=False, **options):
    step = State.train_step(
        net_loss(model, has_aux, weighted),
        mutable=("batch_stats",),
        rngs=("key",),
        has_aux=has_aux,
        weighted=weighted,
        **options,
    )
    return jax.jit(step) if jit else step


@pytest.mark.parametrize("form", ["apply_gradients", "train_step", "microbatches"])
def test_parameters_are_those_of_the_big_batch(form):
    params, batches = init(), data(4)
    state = accumax.linen.TrainState.create(
        apply_fn=None, params=params, tx=INNER, every=3
    )
    by_gradient = jax.jit(
        lambda state, batch: (
            state.apply_gradients(grads=jax.grad(loss_fn)(state.params, batch)),
            0,
        )
    )
    step = {
        "apply_gradients": by_gradient,
        "train_step": jax.jit(state.train_step(loss_fn)),
        "microbatches": jax.jit(state.train_step(loss_fn, microbatch_size=4)),
    }[form]
    for batch in batches:
        for rows in microbatches(batch, (8, 8, 8)):
            state, _ = step(state, rows)
    want = big_batch(INNER, params, batches)
    big = big_batch(INNER, params, batches, jnp.float32)
    assert distance(state.params, want) <= 2 * distance(big, want) + 1e-6
    assert (state.step, state.microstep) == (4, 12)


def test_one_line_changes_what_flax_users_write():
    """The train step of Flax's guide, with BatchNorm, and both train states."""
    model, batch = nets.Linen(), nets.rows(24)

    class Plain(train_state.TrainState):
        batch_stats: Any

    class Accumulating(accumax.linen.TrainState):
        batch_stats: Any

    @jax.jit
    def step(state, batch):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            y, new = state.apply_fn(variables, batch["x"], mutable=["batch_stats"])
            return jnp.mean((y - batch["y"]) ** 2), new

        (_, new), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])

    variables = model.init(jax.random.key(0), batch["x"])
    create = {"apply_fn": model.apply, "tx": optax.sgd(0.1)} | variables
    plain = step(Plain.create(**create), batch)
    state = Accumulating.create(**create, every=3, momentum=nets.MOMENTA)
    for i in range(3):
        assert same_bits(state.batch_stats, variables["batch_stats"])
        state = step(state, nets.part(batch, 8 * i, 8 * i + 8))
    assert state.step == plain.step == 1
    first = state.batch_stats["first"], plain.batch_stats["first"]
    assert nets.near(*first)
    naive = Plain.create(**create)
    for i in range(3):
        naive = step(naive, nets.part(batch, 8 * i, 8 * i + 8))
    assert distance(naive.batch_stats["first"], first[1]) > 0.1


@pytest.mark.parametrize(
    ("ends", "size"),
    [
        pytest.param((8, 16, 24), None, id="calls", marks=pytest.mark.slow),
        pytest.param((3, 13, 24), None, id="uneven calls"),
        pytest.param((24,), 5, id="microbatches", marks=pytest.mark.slow),
        pytest.param((9, 24), 4, id="both"),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_are_those_of_the_whole_window(ends, size, weighted):
    model, batch = nets.Linen(), nets.rows(24)
    state = state_of(model, every=len(ends))
    step = step_of(model, microbatch_size=size, weighted=weighted)
    params, parts, start = state.params, [], 0
    for stop in ends:
        rows = nets.part(batch, start, stop)
        state, _ = step(state, rows)
        start = stop
        if size is None:
            parts.append(rows)
        else:
            parts += nets.divided(rows, size)
    assert state.step == 1
    assert nets.near(state.batch_stats, nets.window_statistics(params, parts))
    assert state.pool.weight == 0


def test_both_forms_agree_and_their_twins_to_the_bit():
    model, batch = nets.Linen(), nets.rows(24)
    loss = net_loss(model)
    by_step = carried = by_gradient = state_of(model)
    step, carry = step_of(model), step_of(model, in_place=False)

    @jax.jit
    def gradient_step(state, batch):
        def of(params):
            return loss(params, batch, state.batch_stats, state.key)

        grads, new = jax.grad(of, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, weight=8.0, **new)

    for i in range(6):
        rows = nets.part(batch, 8 * (i % 3), 8 * (i % 3) + 8)
        (by_step, _), (carried, _) = step(by_step, rows), carry(carried, rows)
        by_gradient = gradient_step(by_gradient, rows)
    assert same_bits(by_step.replace(key=None), carried.replace(key=None))
    # Of a program of one's own, XLA may round the gradient in another way.
    assert nets.near(by_step.batch_stats, by_gradient.batch_stats)
    assert nets.near(by_step.params, by_gradient.params)
    assert by_step.step == 2


@pytest.mark.slow
def test_flush_closes_a_window_with_the_statistics_of_what_was_seen():
    model, batch = nets.Linen(), nets.rows(24)
    state, step = state_of(model, every=8), step_of(model)
    params, parts = state.params, [nets.part(batch, 0, 10), nets.part(batch, 10, 24)]
    for rows in parts:
        state, _ = step(state, rows)
    assert state.step == 0
    state = jax.jit(State.flush)(state)
    assert (state.step, state.microstep) == (1, 2)
    assert nets.near(state.batch_stats, nets.window_statistics(params, parts))
    again = state.flush()
    assert same_bits(again.replace(key=0).params, state.params)
    assert same_bits(again.batch_stats, state.batch_stats)
    # and flush=True closes it with the call
    other = state_of(model, every=8)
    other, _ = step(other, parts[0])
    other, _ = step(other, parts[1], flush=True)
    assert same_bits(other.batch_stats, state.batch_stats)


@pytest.mark.slow
def test_weights_say_how_many_rows_a_gradient_has():
    model, batch = nets.Linen(), nets.rows(24)
    state = state_of(model, every=2)
    parts = [nets.part(batch, 0, 6), nets.part(batch, 6, 24)]
    params = state.params

    @jax.jit
    def step(state, batch, weight):
        def of(params):
            return net_loss(model)(params, batch, state.batch_stats, state.key)

        grads, new = jax.grad(of, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, weight=weight, **new)

    for rows in parts:
        state = step(state, rows, len(rows["x"]))
    assert nets.near(state.batch_stats, nets.window_statistics(params, parts))


def test_each_call_and_microbatch_has_a_key_of_its_own():
    model, batch = nets.Linen(rate=0.5), nets.rows(24)
    state = state_of(model)
    step = step_of(model, has_aux=True, microbatch_size=4, aux="stack")
    keys = []
    for _ in range(4):  # more calls than a window has
        state, (_, aux) = step(state, nets.part(batch, 0, 8))
        keys += [tuple(key.tolist()) for key in aux["key"]]
    assert len(set(keys)) == 8
    assert same_bits(*(jax.random.key_data(s.key) for s in (state, state_of(model))))


def test_a_key_folded_with_step_repeats_and_with_microstep_does_not():
    model, batch = nets.Linen(rate=0.5), nets.rows(8)
    state, step = state_of(model), step_of(model)
    by_step, by_microstep = set(), set()
    for _ in range(3):
        for seen, count in ((by_step, state.step), (by_microstep, state.microstep)):
            key = jax.random.fold_in(state.key, count)
            seen.add(tuple(jax.random.key_data(key).tolist()))
        state, _ = step(state, batch)
    assert (len(by_step), len(by_microstep)) == (1, 3)


def test_other_fields_are_handed_on():
    class Counting(accumax.linen.TrainState):
        count: jax.Array
        scale: jax.Array

    def loss(params, x, count, scale):
        return jnp.mean(x @ params["w"]) * scale, {"count": count + 1}

    state = Counting.create(
        apply_fn=None,
        params={"w": jnp.ones(2)},
        tx=accumax.accumulate(optax.sgd(0.1), 2, nonfinite="skip"),
        count=jnp.zeros((), jnp.int32),
        scale=jnp.float32(2),
    )
    options = {"mutable": "count", "fields": "scale"}
    step = jax.jit(state.train_step(loss, microbatch_size=2, **options))
    for _ in range(2):
        state, value = step(state, jnp.ones((6, 2)))
    assert (state.count, state.step, value) == (6, 1, 4.0)
    # A call that is refused leaves it as it was.
    refused, _ = step(state, jnp.full((6, 2), jnp.nan))
    assert (refused.count, refused.step, refused.microstep) == (6, 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "drop"])
@pytest.mark.parametrize("form", ["train_step", "apply_gradients"])
def test_a_call_that_is_refused_leaves_no_statistics(policy, form):
    model, batch = nets.Linen(), nets.rows(24)
    tx = accumax.accumulate(INNER, 3 if policy == "drop" else 2, nonfinite=policy)
    state = state_of(model, tx=tx, every=None)
    parts = [nets.part(batch, 0, 8), nets.part(batch, 8, 24)]
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), parts[0])
    params = state.params

    @jax.jit
    def by_gradient(state, batch):
        def of(params):
            return net_loss(model)(params, batch, state.batch_stats, state.key)

        grads, new = jax.grad(of, has_aux=True)(state.params)
        weight = len(batch["x"])
        return state.apply_gradients(grads=grads, weight=weight, **new), 0

    step = step_of(model) if form == "train_step" else by_gradient
    for rows in (parts[0], bad, parts[1]):
        state, _ = step(state, rows)
    assert (state.step, state.microstep, state.opt_state.skipped) == (1, 3, 1)
    assert nets.near(state.batch_stats, nets.window_statistics(params, parts))


def test_a_lost_window_does_not_reach_the_next_ones_statistics():
    model, batch = nets.Linen(), nets.rows(24)
    state, step = state_of(model, tx=optax.set_to_zero(), every=2), step_of(model)
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), batch)
    good = [nets.part(batch, 0, 12), nets.part(batch, 12, 24)]
    before = state
    for rows in (bad, good[0]):  # "propagate": lost, statistics and all
        state, _ = step(state, rows)
    assert np.isnan(state.batch_stats["first"]["mean"]).all()
    state = state.replace(batch_stats=before.batch_stats)  # as its user would
    for rows in good:
        state, _ = step(state, rows)
    assert nets.near(state.batch_stats, nets.window_statistics(before.params, good))


def test_a_window_without_weight_moves_no_statistics():
    model, batch = nets.Linen(), nets.rows(8)
    tx = accumax.accumulate(INNER, 1, nonfinite="drop")
    state = state_of(model, tx=tx, every=None)
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), batch)
    after, _ = step_of(model)(state, bad)
    assert same_bits(after.batch_stats, state.batch_stats)
    assert (after.step, after.microstep) == (0, 1)


def test_calls_that_give_no_statistics_change_none():
    model, batch = nets.Linen(), nets.rows(8)
    state = state_of(model, every=2)
    grads = jax.tree.map(jnp.ones_like, state.params)
    for _ in range(2):
        state = state.apply_gradients(grads=grads)
    assert state.step == 1
    assert same_bits(state.batch_stats, state_of(model).batch_stats)
    del batch


def test_the_average_moves_when_a_window_closes():
    class Averaging(accumax.linen.TrainState):
        ema_params: Any

    params, batches = init(), data(3)
    state = Averaging.create(
        apply_fn=None,
        params=params,
        tx=INNER,
        every=3,
        ema_params=jax.tree.map(jnp.copy, params),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        state, _ = state.train_step(loss_fn)(state, batch)
        average = accumax.linen.ema(
            state.ema_params, state.params, state.opt_state, 0.75
        )
        return state.replace(ema_params=average)

    params = jax.tree.map(np.array, params)
    want = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for i, batch in enumerate(batches):
        for n, rows in enumerate(microbatches(batch, (8, 8, 8))):
            before = jax.tree.map(np.array, state.ema_params)
            state = step(state, rows)
            assert same_bits(before, state.ema_params) == (n < 2)
        after = big_batch(INNER, params, batches[: i + 1])
        want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, want, after)
    assert distance(state.ema_params, want) < 1e-5


def test_a_plateau_gets_the_windows_mean_loss():
    tx = accumax.accumulate(
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
        2,
        averaged_args=("value",),
    )
    state = accumax.linen.TrainState.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=tx
    )
    for value in (1.0, 3.0):
        state = state.apply_gradients(
            grads={"w": jnp.ones(2)}, extra_args={"value": value}
        )
    assert optax.tree.get(state.opt_state, "best_value") == 2.0


def test_values_that_are_overwritten_and_not_differentiated():
    """Flax's fp8 layers give new scales for gradients of their params."""
    scales = "_overwrite_with_gradient"
    params = {"params": {"w": jnp.ones(2)}, scales: {"s": jnp.ones(3)}}
    state = accumax.linen.TrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(1.0), every=2
    )
    for n in (1.0, 3.0):
        grads = {"params": {"w": jnp.full(2, n)}, scales: {"s": jnp.full(3, n)}}
        state = state.apply_gradients(grads=grads)
        assert (state.params[scales]["s"] == n).all()
    assert (state.params["params"]["w"] == -1).all()
    assert (state.flush().params[scales]["s"] == 3).all()
    with pytest.raises(TypeError, match="Use apply_gradients"):
        state.train_step(lambda p: p["params"]["w"].sum())(state)


def test_traced_once_donated_and_its_own_shape():
    model, batch = nets.Linen(), nets.rows(24)
    traces = []

    def step(state, batch):
        traces.append(1)
        return step_of(model, jit=False)(state, batch)

    step = jax.jit(step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, state_of(model))
    for _ in range(7):
        state, _ = step(state, batch)
    assert len(traces) == 1
    shapes = jax.eval_shape(lambda: state_of(model))
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for x, y in zip(*map(jax.tree.leaves, (shapes, state)), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_flax_serializes_it_in_the_middle_of_a_window():
    model, batch = nets.Linen(), nets.rows(24)
    state, step = state_of(model, key=jax.random.PRNGKey(0)), step_of(model)
    for _ in range(4):
        state, _ = step(state, batch)
    template = state_of(model, key=jax.random.PRNGKey(1))
    assert jax.tree.structure(template) == jax.tree.structure(state)
    back = flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    for _ in range(2):
        (state, _), (back, _) = step(state, batch), step(back, batch)
    assert same_bits(state, back)
    assert (state.step, back.microstep) == (2, 6)


def test_has_updated_finds_it():
    state = accumax.linen.TrainState.create(
        apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1), every=1
    )
    assert not accumax.has_updated(state)
    assert accumax.has_updated(state.apply_gradients(grads={"w": jnp.ones(2)}))


def create(**options):
    class WithStatistics(accumax.linen.TrainState):
        batch_stats: Any = None

    options = {"apply_fn": None, "params": {"w": jnp.ones(2)}} | options
    return WithStatistics.create(**options)


NORM = {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tx": optax.sgd(0.1)}, TypeError, "every=..., the calls in a window"),
        (
            {"tx": optax.chain(optax.clip(1.0), accumax.accumulate(optax.sgd(0.1), 2))},
            TypeError,
            "must be outermost",
        ),
        (
            {"tx": accumax.accumulate(optax.sgd(0.1), 2), "every": 2},
            ValueError,
            "every=2 was passed with a tx that is an accumax.accumulate",
        ),
        ({"tx": optax.sgd(0.1), "every": 0}, ValueError, "every=0"),
        ({"tx": None, "every": 2}, TypeError, "inner=None"),
        (
            {"tx": optax.sgd(0.1), "every": 2, "batch_stats": NORM},
            ValueError,
            "momentum=None, has a running mean and variance at norm",
        ),
        (
            {"tx": optax.sgd(0.1), "every": 2, "momentum": 0.9},
            ValueError,
            "momentum=0.9 is for running statistics",
        ),
        (
            {"tx": optax.sgd(0.1), "every": 2, "nothing": 1},
            TypeError,
            "nothing",
        ),
    ],
)
def test_create_refuses(options, error, words):
    with pytest.raises(error, match=words):
        create(**options)


@pytest.mark.parametrize(
    ("options", "loss", "error", "words"),
    [
        ({"mutable": "nothing"}, None, ValueError, "'nothing' is not a field"),
        ({"fields": "params"}, None, ValueError, "'params' is not a field"),
        ({"fields": "key", "rngs": "key"}, None, ValueError, "more than once"),
        ({"fields": (1,)}, None, TypeError, "must be names of fields"),
        (
            {"mutable": "batch_stats"},
            lambda p, b, batch_stats: 1.0,
            TypeError,
            "must return",
        ),
        (
            {"mutable": "batch_stats"},
            lambda p, b, batch_stats: (1.0, {}),
            TypeError,
            "exactly these",
        ),
        (
            {"mutable": "batch_stats", "has_aux": True},
            lambda p, b, batch_stats: (1.0, {"batch_stats": batch_stats}),
            TypeError,
            r"\(loss, \(new, aux\)\)",
        ),
        (
            {"mutable": "batch_stats"},
            lambda p, b, batch_stats: (1.0, {"batch_stats": {"a": 1}}),
            ValueError,
            "must stay of that structure",
        ),
        (
            {"mutable": "batch_stats", "batch_argnums": 3},
            lambda p, b, batch_stats: (1.0, {"batch_stats": batch_stats}),
            ValueError,
            "batch_argnums",
        ),
    ],
)
def test_train_step_refuses_and_changes_nothing(options, loss, error, words):
    state = state_of(nets.Linen())

    def run():
        step = State.train_step(loss or (lambda p, b, **_: 1.0), **options)
        step(state, nets.rows(8))

    with pytest.raises(error, match=words):
        run()


def test_other_bad_input():
    state = create(tx=optax.sgd(0.1), every=2)
    with pytest.raises(TypeError, match="loss_fn=3"):
        state.train_step(3)
    with pytest.raises(TypeError, match="expected an accumax"):
        state.train_step(lambda p: 1.0)(state.params)
    with pytest.raises(ValueError, match="pools no batch_stats"):
        state.apply_gradients(grads={"w": jnp.ones(2)}, batch_stats=NORM)
    state = create(tx=optax.sgd(0.1), every=2, batch_stats=NORM, momentum=0.9)
    with pytest.raises(ValueError, match="must stay of that structure"):
        state.apply_gradients(grads={"w": jnp.ones(2)}, batch_stats={})
    with pytest.raises(ValueError, match="no leaf at"):
        state.apply_gradients(grads={})
    with pytest.raises(ValueError, match="weight=-1"):
        state.apply_gradients(grads={"w": jnp.ones(2)}, weight=-1)
    with pytest.raises(ValueError, match="average"):
        accumax.linen.ema({}, state.params, state.opt_state, 0.9)


def test_a_step_costs_what_accumax_train_step_does():
    """Temporary memory and copies, with statistics and the average besides."""
    model = nn.Sequential([nn.Dense(256), nn.tanh, nn.Dense(256)])
    x = jnp.ones((8, 256))
    variables = model.init(jax.random.key(0), x)
    tx = accumax.accumulate(optax.adamw(1e-3), 4)

    def loss(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    state = accumax.linen.TrainState.create(apply_fn=model.apply, **variables, tx=tx)
    core = jax.jit(accumax.train_step(loss, tx), donate_argnums=(0, 1))
    step = jax.jit(state.train_step(loss), donate_argnums=0)
    plain = core.lower(state.params, state.opt_state, x).compile().memory_analysis()
    ours = step.lower(state, x).compile().memory_analysis()
    assert ours.temp_size_in_bytes <= plain.temp_size_in_bytes + 1024
    assert ours.alias_size_in_bytes >= plain.alias_size_in_bytes


def test_statistics_that_are_replaced_within_a_window_are_what_it_moves():
    model, batch = nets.Linen(), nets.rows(24)
    state, step = state_of(model, every=2), step_of(model)
    params, parts = state.params, [nets.part(batch, 0, 12), nets.part(batch, 12, 24)]
    state, _ = step(state, parts[0])
    other = jax.tree.map(lambda x: x + 3, state.batch_stats)
    state, _ = step(state.replace(batch_stats=other), parts[1])
    want = nets.window_statistics(params, parts)
    for name, momentum in nets.MOMENTA.items():
        want[name] = {n: x + 3 * momentum for n, x in want[name].items()}
    assert nets.near(state.batch_stats, want, ulps=64)


def test_frozen_statistics_stay_frozen():
    model, batch = nets.Linen(), nets.rows(24)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = flax.core.freeze(model.init(keys, batch["x"]))
    state, step = state_of(model, variables, every=1), step_of(model)
    params = state.params
    state, _ = step(state, batch)
    assert isinstance(state.batch_stats, flax.core.FrozenDict)
    want = nets.window_statistics(flax.core.unfreeze(params), [batch])
    assert nets.near(flax.core.unfreeze(state.batch_stats), want)


def test_a_schedule_that_cannot_be_hashed():
    class Every:
        __hash__ = None

        def __call__(self, step):
            return 2

    state = create(tx=optax.sgd(0.1), every=Every())
    for _ in range(2):
        state = state.apply_gradients(grads={"w": jnp.ones(2)})
    assert state.step == 1


def test_gradients_without_new_values_keep_those_that_are():
    scales = "_overwrite_with_gradient"
    params = {"params": {"w": jnp.ones(2)}, scales: {"s": jnp.ones(3)}}
    state = accumax.linen.TrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(1.0), every=1
    )
    state = state.apply_gradients(grads={"w": jnp.ones(2)})
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    assert (state.params[scales]["s"] == 1).all()


def test_a_frozen_field_stays_frozen():
    class State(accumax.linen.TrainState):
        memo: object

    frozen = flax.core.freeze({"n": jnp.zeros(())})
    state = State.create(
        apply_fn=None,
        params={"w": jnp.ones(2)},
        tx=optax.sgd(1.0),
        every=2,
        memo=frozen,
    )

    def loss(params, x, memo):
        return jnp.mean(x @ params["w"]), {"memo": {"n": memo["n"] + 1}}

    for options, count in (({}, 1), ({"microbatches": 2}, 2)):
        step = jax.jit(State.train_step(loss, mutable=("memo",), **options))
        new, _ = step(state, jnp.ones((4, 2)))
        assert isinstance(new.memo, flax.core.FrozenDict)
        assert new.memo["n"] == count
