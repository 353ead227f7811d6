"""`accumax.nnx` against Flax's own optimizer and gradient on the whole batch."""

import functools

import jax
import jax.numpy as jnp
import nets
import numpy as np
import optax
import pytest
from flax import nnx
from problems import distance, same_bits

import accumax.nnx

INNER = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(optax.linear_schedule(0.05, 0.01, 3), eps=1e-3, weight_decay=0.1),
)


def loss_fn(model, batch):
    return jnp.mean(jnp.sum((model(batch["x"]) - batch["y"]) ** 2, axis=-1))


def weighted_loss_fn(model, batch):
    each = jnp.sum((model(batch["x"]) - batch["y"]) ** 2, axis=-1)
    return each.sum(), jnp.float32(len(each))


def net(**options):
    return nets.NNX(nnx.Rngs(0), **options)


def optimizer_of(model, tx=INNER, every=3, **options):
    return accumax.nnx.Optimizer(
        model, tx, **{"wrt": nnx.Param, "every": every} | options
    )


def pure(module, *filters):
    """The values of a module, typed keys as numbers."""
    state = nnx.to_pure_dict(nnx.state(module, *filters))

    def number(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if key else x

    return jax.tree.map(number, state)


def by_update(model, optimizer, batches):
    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(loss_fn)(model, batch))

    for batch in batches:
        step(model, optimizer, batch)


def by_train_step(model, optimizer, batches, **options):
    step = nnx.jit(accumax.nnx.train_step(loss_fn, **options))
    for batch in batches:
        step(model, optimizer, batch)


def by_jax_jit(model, optimizer, batches):
    graphdef, state = nnx.split((model, optimizer))
    step = accumax.nnx.train_step(loss_fn)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, batch):
        both = nnx.merge(graphdef, state)
        step(*both, batch)
        return nnx.state(both)

    state = jax.tree.map(jnp.copy, state)
    for batch in batches:
        state = run(state, batch)
    nnx.update((model, optimizer), state)


FORMS = {
    "update": by_update,
    "train_step": by_train_step,
    "microbatches": functools.partial(by_train_step, microbatch_size=4),
    "carried": functools.partial(by_train_step, microbatch_size=4, in_place=False),
    "jax.jit": by_jax_jit,
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_those_of_the_big_batch(form):
    batches = [nets.rows(24, seed) for seed in range(4)]
    calls = [nets.part(b, 8 * i, 8 * i + 8) for b in batches for i in range(3)]
    model, big = net(normalises=False), net(normalises=False)
    optimizer = optimizer_of(model)
    FORMS[form](model, optimizer, calls)
    whole = nnx.Optimizer(big, INNER, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(loss_fn)(model, batch))

    for batch in batches:
        step(big, whole, batch)
    got, want = pure(model, nnx.Param), pure(big, nnx.Param)
    assert distance(got, want) < 2e-6
    assert distance(got, pure(net(normalises=False), nnx.Param)) > 0.05
    assert (optimizer.step[...], optimizer.microstep[...]) == (4, 12)
    assert optimizer.step[...] == whole.step[...]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_statistics_are_those_of_the_whole_window(form):
    # Uneven, but where weights have to be told; see below.
    ends = (8, 16, 24) if form == "update" else (3, 13, 24)
    model, batch = net(), nets.rows(24)
    optimizer = optimizer_of(model)
    params = pure(model, nnx.Param)
    parts = [nets.part(batch, i, j) for i, j in zip((0, *ends[:-1]), ends, strict=True)]
    FORMS[form](model, optimizer, parts[:2])
    # Within the window they are as they were, for an evaluation too.
    assert same_bits(pure(model, nnx.BatchStat), pure(net(), nnx.BatchStat))
    FORMS[form](model, optimizer, parts[2:])
    if "size" in str(getattr(FORMS[form], "keywords", "")):
        parts = [part for rows in parts for part in nets.divided(rows, 4)]
    want = nets.window_statistics(params, parts)
    assert nets.near(pure(model, nnx.BatchStat), want)
    assert optimizer.step[...] == 1


@pytest.mark.slow
def test_both_forms_agree_and_their_twins_to_the_bit():
    batch = nets.rows(24)
    results = {}
    carry = functools.partial(by_train_step, in_place=False)
    for form in (by_update, by_train_step, carry, by_jax_jit):
        model = net()
        optimizer = optimizer_of(model)
        parts = [nets.part(batch, 8 * i, 8 * i + 8) for i in range(3)] * 2
        form(model, optimizer, parts)
        results[form] = pure(model), pure(optimizer)
    for form in (carry, by_jax_jit):
        assert same_bits(results[form], results[by_train_step])
    # Of a program of one's own, XLA may round the gradient in another way.
    assert nets.near(results[by_update][0], results[by_train_step][0])


def test_value_and_grad_is_that_of_the_whole_batch():
    batch = nets.rows(24)
    model, big = net(normalises=False), net(normalises=False)
    options = {"microbatch_size": 5}
    for loss, more in ((loss_fn, {}), (weighted_loss_fn, {"weighted": True})):
        f = nnx.jit(accumax.nnx.value_and_grad(loss, **options, **more))
        value, grads = f(model, batch)
        want, want_grads = nnx.value_and_grad(loss_fn)(big, batch)
        assert abs(value - want) < 1e-5
        assert jax.tree.structure(grads) == jax.tree.structure(want_grads)
        assert distance(nnx.as_pure(grads), nnx.as_pure(want_grads)) < 1e-5
        # An optimizer of Flax takes it.
        nnx.Optimizer(model, optax.set_to_zero(), wrt=nnx.Param).update(model, grads)


def test_value_and_grad_moves_the_statistics_once():
    model, batch = net(), nets.rows(24)
    params = pure(model, nnx.Param)
    f = nnx.jit(accumax.nnx.value_and_grad(loss_fn, microbatch_size=5))
    f(model, batch)
    want = nets.window_statistics(params, nets.divided(batch, 5))
    assert nets.near(pure(model, nnx.BatchStat), want)
    assert model.calls[...] == 5  # what is no statistic is handed on
    # And an optimizer that accumulates pools what calls of it give.
    model = net()
    optimizer = optimizer_of(model, every=2)

    @nnx.jit
    def step(model, optimizer, rows):
        _, grads = f(model, rows)
        optimizer.update(model, grads, weight=len(rows["x"]))

    parts = [nets.part(batch, 0, 7), nets.part(batch, 7, 24)]
    for rows in parts:
        step(model, optimizer, rows)
    parts = [part for rows in parts for part in nets.divided(rows, 5)]
    assert nets.near(pure(model, nnx.BatchStat), nets.window_statistics(params, parts))


@pytest.mark.parametrize("form", ["value_and_grad", "train_step", "update"])
def test_every_microbatch_has_a_mask_of_its_own(form):
    class Masks(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones(()))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def loss(model, x):
        mask = model.dropout(jnp.ones((1, 64)))
        return jnp.mean(x) * model.w[...], mask

    model, seen = Masks(nnx.Rngs(0)), []
    optimizer = optimizer_of(model, optax.sgd(0.0), every=2)
    options = {"has_aux": True, "microbatch_size": 2, "aux": "concat"}

    def loss_many(model, x):
        value, mask = loss(model, x)
        return value, jnp.repeat(mask, len(x), axis=0)

    for _ in range(3):
        x = jnp.ones((8, 1))
        if form == "update":
            f = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
            (_, mask), grads = f(model, x)
            optimizer.update(model, grads)
        elif form == "train_step":
            step = nnx.jit(accumax.nnx.train_step(loss_many, **options))
            _, mask = step(model, optimizer, x)
        else:
            f = nnx.jit(accumax.nnx.value_and_grad(loss_many, **options))
            (_, mask), _ = f(model, x)
        seen += [row.tobytes() for row in np.asarray(mask)]
    assert len(set(seen)) == (3 if form == "update" else 12)


def test_rngs_that_are_an_argument_advance_too():
    def loss(model, rngs, x):
        return jnp.mean(model(x) * rngs.noise.normal(()))

    model, rngs, x = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Rngs(3), jnp.ones((6, 2))
    f = nnx.jit(accumax.nnx.value_and_grad(loss, microbatch_size=2, batch_argnums=2))
    f(model, rngs, x)
    assert rngs.default.count[...] == 3
    optimizer = optimizer_of(model, every=2)
    step = accumax.nnx.train_step(loss, batch_argnums=2, microbatch_size=2)
    nnx.jit(step)(model, optimizer, rngs, x)
    assert rngs.default.count[...] == 6


def test_the_filter_says_what_is_differentiated():
    model, batch = net(normalises=False), nets.rows(24)
    wrt = nnx.All(nnx.Param, nnx.PathContains("out"))
    f = accumax.nnx.value_and_grad(
        loss_fn, argnums=nnx.DiffState(0, wrt), microbatches=3
    )
    _, grads = nnx.jit(f)(model, batch)
    _, want = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, batch)
    assert jax.tree.structure(grads) == jax.tree.structure(want)
    assert distance(nnx.as_pure(grads), nnx.as_pure(want)) < 1e-5
    before = pure(model)
    optimizer = optimizer_of(model, every=1, wrt=wrt)
    nnx.jit(accumax.nnx.train_step(loss_fn))(model, optimizer, batch)
    after = pure(model)
    assert same_bits(before["hidden"], after["hidden"])
    assert distance(before["out"], after["out"]) > 0.01


def test_two_modules_and_an_array_are_differentiated():
    a, b = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    batch, scale = nets.rows(24), jnp.float32(2)

    def loss(a, b, scale, batch):
        return jnp.mean((b(jnp.tanh(a(batch["x"]))) * scale - batch["y"]) ** 2)

    options = {"argnums": (1, 0, 2)}
    f = accumax.nnx.value_and_grad(loss, **options, microbatch_size=7, batch_argnums=3)
    value, grads = nnx.jit(f)(a, b, scale, batch)
    want, want_grads = nnx.value_and_grad(loss, **options)(a, b, scale, batch)
    assert abs(value - want) < 1e-5
    assert distance(nnx.as_pure(grads), nnx.as_pure(want_grads)) < 1e-5


def test_a_teacher_is_an_argument_like_any_other():
    model, teacher = net(normalises=False), net()
    batch = nets.rows(24)

    def loss(model, teacher, batch):
        return jnp.mean((model(batch["x"]) - teacher(batch["x"])) ** 2)

    optimizer = optimizer_of(model, every=1)
    before = pure(teacher, nnx.Param)
    step = accumax.nnx.train_step(loss, batch_argnums=2, microbatch_size=8)
    nnx.jit(step)(model, optimizer, teacher, batch)
    assert same_bits(before, pure(teacher, nnx.Param))
    # It runs in training mode, so its statistics move: once, for all rows.
    want = nets.window_statistics(before, nets.divided(batch, 8))
    assert nets.near(pure(teacher, nnx.BatchStat), want)


def test_flush_closes_a_window():
    model, batch = net(), nets.rows(24)
    optimizer = optimizer_of(model, every=8)
    params, parts = pure(model, nnx.Param), [nets.part(batch, 0, 24)]
    by_update(model, optimizer, parts)
    assert optimizer.step[...] == 0
    nnx.jit(lambda model, optimizer: optimizer.flush(model))(model, optimizer)
    assert (optimizer.step[...], optimizer.microstep[...]) == (1, 1)
    assert nets.near(pure(model, nnx.BatchStat), nets.window_statistics(params, parts))
    before = pure((model, optimizer.opt_state))
    optimizer.flush(model)
    assert same_bits(before[0], pure((model, optimizer.opt_state))[0])


def test_update_is_told_weights_and_what_the_optimizer_takes():
    tx = accumax.accumulate(
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
        2,
        averaged_args=("value",),
    )
    model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = optimizer_of(model, tx, every=None)
    start = model.kernel[...]
    for weight, value in ((1, 1.0), (3, 3.0)):
        grads = nnx.grad(lambda m, v=value: v * jnp.sum(m.kernel[...]))(model)
        optimizer.update(model, grads, weight=weight, value=value)
    np.testing.assert_allclose(model.kernel[...], start - 0.1 * 2.5, rtol=1e-6)
    best = optax.tree.get(nnx.as_pure(optimizer.opt_state), "best_value")
    assert best == 2.5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["update", "train_step"])
def test_a_call_that_is_refused_leaves_no_statistics(form):
    model, batch = net(), nets.rows(24)
    tx = accumax.accumulate(INNER, 2, nonfinite="skip")
    optimizer = optimizer_of(model, tx, every=None)
    params = pure(model, nnx.Param)
    parts = [nets.part(batch, 0, 12), nets.part(batch, 12, 24)]
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), parts[0])
    FORMS[form](model, optimizer, [parts[0], bad, parts[1]])
    assert (optimizer.step[...], optimizer.microstep[...]) == (1, 3)
    want = nets.window_statistics(params, parts)
    assert nets.near(pure(model, nnx.BatchStat), want)
    # The step undoes what it did; a gradient of the user's own is not ours to undo.
    assert model.calls[...] == (2 if form == "train_step" else 3)


def test_statistics_that_were_loaded_are_what_a_window_finds():
    model, batch = net(), nets.rows(24)
    optimizer = optimizer_of(model, every=2)
    nnx.update(model, jax.tree.map(lambda x: x + 1, nnx.state(model, nnx.BatchStat)))
    by_train_step(model, optimizer, [nets.part(batch, 0, 12), nets.part(batch, 12, 24)])
    x = np.asarray(batch["x"], np.float64)
    want = nets.MOMENTUM * 1 + (1 - nets.MOMENTUM) * x.mean(0)
    np.testing.assert_allclose(model.first.mean[...], want, rtol=1e-5)


def test_a_model_that_is_evaluated_keeps_its_statistics():
    model, batch = net(), nets.rows(24)
    optimizer = optimizer_of(model, every=2)
    model.eval()
    by_train_step(model, optimizer, [nets.part(batch, 0, 12), nets.part(batch, 12, 24)])
    assert optimizer.step[...] == 1
    assert same_bits(pure(model, nnx.BatchStat), pure(net(), nnx.BatchStat))


def test_tied_weights_and_the_average():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 3, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))[:, :2]

    model, batch = Tied(nnx.Rngs(0)), nets.rows(24)
    _, want = nnx.value_and_grad(loss_fn)(model, batch)
    f = accumax.nnx.value_and_grad(loss_fn, microbatches=4)
    _, grads = nnx.jit(f)(model, batch)
    assert distance(nnx.as_pure(grads), nnx.as_pure(want)) < 1e-5
    optimizer = optimizer_of(model, optax.sgd(0.1), every=2)
    average = nnx.as_pure(nnx.state(model, nnx.Param))
    average = start = jax.tree.map(jnp.copy, average)
    for n in range(2):
        optimizer.update(model, nnx.grad(loss_fn)(model, batch))
        params = nnx.as_pure(nnx.state(model, nnx.Param))
        average = accumax.nnx.ema(average, params, optimizer.opt_state, 0.9)
        assert same_bits(average, start) == (n == 0)
    want = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, params)
    assert distance(average, want) < 1e-6
    assert accumax.has_updated(optimizer.opt_state)


def test_traced_once_and_donated():
    model, batch, traces = net(rate=0.1), nets.rows(24), []
    optimizer = optimizer_of(model)

    def loss(model, batch):
        traces.append(1)
        return loss_fn(model, batch)

    step = nnx.jit(accumax.nnx.train_step(loss), donate_argnums=(0, 1))
    step(model, optimizer, batch)
    once = len(traces)
    for _ in range(6):
        step(model, optimizer, batch)
    assert len(traces) == once
    assert model.dropout.rngs.count[...] == 7


def test_a_step_costs_what_accumax_train_step_does():
    model = nnx.Sequential(
        nnx.Linear(256, 256, rngs=nnx.Rngs(0)), nnx.Linear(256, 256, rngs=nnx.Rngs(1))
    )
    x, tx = jnp.ones((8, 256)), accumax.accumulate(optax.adamw(1e-3), 4)
    optimizer = accumax.nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    graphdef, state = nnx.split((model, optimizer))
    step = accumax.nnx.train_step(loss)

    def run(state, x):
        both = nnx.merge(graphdef, state)
        return nnx.state(both), step(*both, x)

    ours = jax.jit(run, donate_argnums=0).lower(state, x).compile()
    definition, params = nnx.split(model)
    params = nnx.as_pure(params)
    core = accumax.train_step(lambda p, x: loss(nnx.merge(definition, p), x), tx)
    core = jax.jit(core, donate_argnums=(0, 1)).lower(params, tx.init(params), x)
    ours, plain = ours.memory_analysis(), core.compile().memory_analysis()
    assert ours.temp_size_in_bytes <= plain.temp_size_in_bytes + 1024
    assert ours.alias_size_in_bytes >= plain.alias_size_in_bytes


class Norm(nnx.Module):
    def __init__(self, **attributes):
        self.w = nnx.Param(jnp.ones(2))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(2)), nnx.BatchStat(jnp.ones(2))
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        (net, {"every": None}, TypeError, "every=..., the calls in a window"),
        (
            net,
            {"tx": accumax.accumulate(INNER, 2)},
            ValueError,
            "every=3 was passed with a tx that is an accumax.accumulate",
        ),
        (net, {"every": 0}, ValueError, "every=0"),
        (net, {"wrt": nnx.LoRAParam}, ValueError, "NNX has no variable for"),
        (Norm, {}, ValueError, "has an attribute|attribute `momentum`"),
        (lambda: Norm(momentum=2.0), {}, ValueError, "not from 0 to 1"),
    ],
)
def test_the_optimizer_refuses(model, options, error, words):
    model = model()
    with pytest.raises(error, match=words):
        optimizer_of(model, **options)


def test_other_bad_input_and_nothing_is_changed():
    model, batch = net(), nets.rows(24)
    optimizer = optimizer_of(model)
    before = pure((model, optimizer))
    with pytest.raises(TypeError, match="loss_fn=3"):
        accumax.nnx.train_step(3)
    with pytest.raises(TypeError, match="f=3"):
        accumax.nnx.value_and_grad(3, microbatches=2)
    with pytest.raises(ValueError, match="exactly one of microbatch_size"):
        accumax.nnx.value_and_grad(loss_fn)
    plain = nnx.Optimizer(model, INNER, wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"not an accumax\.nnx\.Optimizer"):
        accumax.nnx.train_step(loss_fn)(model, plain, batch)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    f = accumax.nnx.value_and_grad(loss_fn, argnums=wrt, microbatches=2)
    with pytest.raises(ValueError, match="NNX has no variable for"):
        f(model, batch)
    with pytest.raises(ValueError, match="batch_argnums"):
        accumax.nnx.train_step(loss_fn, batch_argnums=4)(model, optimizer, batch)
    with pytest.raises(ValueError, match="weight=-1"):
        optimizer.update(model, nnx.state(model, nnx.Param), weight=-1)
    with pytest.raises(TypeError, match="must return"):
        accumax.nnx.train_step(loss_fn, has_aux=True)(model, optimizer, batch)

    def grows(model, batch):
        model.seen = nnx.Variable(jnp.zeros(()))
        return loss_fn(model, batch)

    with pytest.raises(ValueError, match="must stay of that structure"):
        accumax.nnx.train_step(grows)(model, optimizer, batch)
    assert same_bits(before, pure((model, optimizer)))


def test_statistics_that_others_move_within_a_window_stay_sane():
    """As a generator's do: its discriminator's step runs it too."""
    x = nets.rows(24)["x"].astype(np.float64)
    g, d = (
        nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0)),
        nnx.Linear(3, 1, rngs=nnx.Rngs(1)),
    )
    og, od = optimizer_of(g, every=4), optimizer_of(d, every=4)
    options = {"batch_argnums": 2}
    step_d = nnx.jit(
        accumax.nnx.train_step(lambda d, g, x: jnp.mean(d(g(x)) ** 2), **options)
    )
    step_g = nnx.jit(
        accumax.nnx.train_step(lambda g, d, x: jnp.mean(d(g(x)) ** 2), **options)
    )
    mean, var = np.zeros(3), np.ones(3)
    for n in range(8):
        rows = (x[3 * n : 3 * n + 3] + 50).astype(np.float32)
        step_d(d, od, g, rows)  # one update by this call, of what is not its model
        mean = 0.9 * mean + 0.1 * rows.mean(0)
        var = 0.9 * var + 0.1 * rows.var(0)
        step_g(g, og, d, rows)
        if n % 4 == 3:  # and one by the window
            seen = (x[3 * n - 9 : 3 * n + 3] + 50).astype(np.float32)
            mean = 0.9 * mean + 0.1 * seen.mean(0)
            var = 0.9 * var + 0.1 * seen.var(0)
    np.testing.assert_allclose(g.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(g.var[...], var, rtol=1e-3)


@pytest.mark.slow
def test_of_two_optimizers_of_a_model_one_pools():
    model, batch = net(), nets.rows(24)
    params = pure(model, nnx.Param)
    wrt = nnx.All(nnx.Param, nnx.PathContains("out"))
    rest = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("out")))
    one = optimizer_of(model, every=2, wrt=wrt, batch_stats=False)
    other = optimizer_of(model, every=2, wrt=rest)
    parts = [nets.part(batch, 0, 12), nets.part(batch, 12, 24)]
    for rows in parts:
        grads = nnx.grad(loss_fn)(model, rows)
        one.update(model, grads)
        other.update(model, grads)
    assert one.pool is None
    want = nets.window_statistics(params, parts)
    assert nets.near(pure(model, nnx.BatchStat), want)


@pytest.mark.slow
def test_no_buffer_is_in_two_places_after_an_eager_call():
    model, batch = net(), nets.rows(24)
    optimizer = optimizer_of(model, every=2)

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(loss_fn)(model, batch))

    step(model, optimizer, batch)
    optimizer.flush(model)
    step(model, optimizer, batch)
    optimizer.update(model, nnx.grad(loss_fn)(model, batch))
    step(model, optimizer, batch)
    assert (optimizer.step[...], optimizer.microstep[...]) == (2, 4)


def test_a_module_that_shares_what_is_differentiated_is_refused():
    class Holds(nnx.Module):
        def __init__(self, shared, rngs):
            self.shared, self.own = shared, nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.own(self.shared(x))

    rngs = nnx.Rngs(0)
    shared = nnx.Linear(3, 3, rngs=rngs)
    a, b = Holds(shared, rngs), Holds(shared, rngs)
    batch = nets.rows(24)

    def loss(a, b, batch):
        return jnp.mean(a(batch["x"]) * b(batch["x"]))

    options = {"microbatch_size": 6, "batch_argnums": 2}
    for argnums in (0, 1):
        f = accumax.nnx.value_and_grad(loss, argnums=argnums, **options)
        with pytest.raises(ValueError, match="shares variables"):
            f(a, b, batch)
    f = accumax.nnx.value_and_grad(loss, argnums=(0, 1), **options)
    _, got = nnx.jit(f)(a, b, batch)
    _, want = nnx.value_and_grad(loss, argnums=(0, 1))(a, b, batch)
    assert distance(nnx.as_pure(got), nnx.as_pure(want)) < 1e-5


def test_a_model_that_has_changed_is_refused_and_nothing_is_written():
    model, batch = net(), nets.rows(24)
    optimizer = optimizer_of(model, every=1, wrt=nnx.PathContains("hidden"))
    model.third = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    before = pure((model, optimizer))
    with pytest.raises(ValueError, match="must stay of that structure"):
        optimizer.update(model, nnx.state(model, nnx.PathContains("hidden")))
    with pytest.raises(ValueError, match="must stay of that structure"):
        accumax.nnx.train_step(loss_fn)(model, optimizer, batch)
    assert same_bits(before, pure((model, optimizer)))


def test_a_static_change_within_the_loss_is_refused():
    def loss(model, batch):
        model.eval()
        return loss_fn(model, batch)

    model, batch = net(), nets.rows(24)
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="static attribute"):
        accumax.nnx.train_step(loss)(model, optimizer, batch)
    with pytest.raises(ValueError, match="static attribute"):
        accumax.nnx.value_and_grad(loss, microbatches=2)(model, batch)


def test_a_step_in_nnx_jit_can_be_audited():
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    tx = accumax.accumulate(optax.adam(1e-3), every=2)
    optimizer = accumax.nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = accumax.nnx.train_step(lambda model, x: jnp.mean(model(x) ** 2))
    step = nnx.jit(step, donate_argnums=(0, 1))
    args = model, optimizer, jnp.ones((8, 64))
    lowered = step.lower(*args)
    for report in (
        accumax.audit(step, *args),
        accumax.audit(lowered),
        accumax.audit(lowered.compile()),
    ):
        assert report.memory.aliased >= 4 * 64 * 64 * 4
        assert report.warnings == ()
        kinds = {x.kind for x in report.largest if x.bytes == 64 * 64 * 4}
        assert {"parameters", "optimizer state"} <= kinds


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm])
def test_a_write_to_what_is_differentiated_is_warned_of(norm):
    """Flax's two norms of weights store the kernel that they have normalised."""
    model = norm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    optimizer, x = optimizer_of(model), jnp.ones((4, 3))

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    for call in (
        lambda: accumax.nnx.train_step(loss)(model, optimizer, x),
        lambda: accumax.nnx.train_step(loss, microbatch_size=2)(model, optimizer, x),
        lambda: accumax.nnx.value_and_grad(loss, microbatches=2)(model, x),
    ):
        with pytest.warns(UserWarning, match=r"writes to .*\['kernel'\].*is lost"):
            call()


def test_a_custom_rule_may_change_a_state():
    """Its forward pass in training counts; the function alone does not."""

    class Counted(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))
            self.count = nnx.Variable(jnp.zeros(70_000))

        def __call__(self, x):
            @jax.custom_vjp
            def fun(w, count):
                return jnp.mean(x @ w), count

            def forward(w, count):
                return (jnp.mean(x @ w), count + 1), x

            def backward(x, cotangents):
                return jnp.mean(x, 0) * cotangents[0], cotangents[1]

            fun.defvjp(forward, backward)
            loss, self.count[...] = fun(self.w[...], self.count[...])
            return loss

    model, x = Counted(), jnp.ones((4, 3))
    f = accumax.nnx.value_and_grad(lambda model, x: model(x), microbatches=2)
    nnx.jit(f)(model, x)
    assert model.count[...][0] == 2
    optimizer = optimizer_of(model, every=1)
    nnx.jit(accumax.nnx.train_step(lambda model, x: model(x)))(model, optimizer, x)
    assert model.count[...][0] == 3


def test_a_parameter_that_the_loss_adds_is_named():
    def loss(model, x):
        model.more = nnx.Param(jnp.ones(2))
        return jnp.mean(model(x))

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="static attribute"):
        accumax.nnx.value_and_grad(loss, microbatches=2)(model, jnp.ones((4, 3)))


class Adapted(nnx.Module):
    """Layers that are scanned, rematerialised, and trained through adapters alone."""

    def __init__(self, rngs, wide=128):
        def layer(rngs):
            return nnx.Sequential(
                nnx.LoRALinear(wide, wide, lora_rank=2, rngs=rngs), jnp.tanh
            )

        self.layers = nnx.split_rngs(splits=8)(nnx.vmap(layer))(rngs)

    def __call__(self, x):
        def apply(x, layer):
            return layer(x)

        layers = nnx.scan(nnx.remat(apply), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return layers(x, self.layers)


@pytest.mark.parametrize("size", [None, 8, 7])
def test_a_frozen_base_is_not_carried_through_scanned_layers(size):
    """NNX returns each variable of the layers from its scan, as a new array."""
    rngs, wrt = nnx.Rngs(0), nnx.LoRAParam
    model = Adapted(rngs)
    optimizer = optimizer_of(model, every=2, wrt=wrt)
    x = jnp.ones((32 if size else 8, 128))
    step = accumax.nnx.train_step(
        lambda model, x: jnp.mean((model(x) - 1) ** 2), microbatch_size=size
    )

    def on_arrays(graph, state, x):
        model, optimizer = nnx.merge(graph, state)
        loss = step(model, optimizer, x)
        return nnx.state((model, optimizer)), loss

    graph, state = nnx.split((model, optimizer))
    jitted = jax.jit(on_arrays, static_argnums=0, donate_argnums=1)
    base = 4 * sum(v.size for v in jax.tree.leaves(nnx.state(model, nnx.Param)))
    temp = jitted.lower(graph, state, x).compile().memory_analysis()
    assert temp.temp_size_in_bytes < 0.5 * base
    _, want = nnx.value_and_grad(
        lambda model, x: jnp.mean((model(x) - 1) ** 2), argnums=nnx.DiffState(0, wrt)
    )(model, x)
    f = accumax.nnx.value_and_grad(
        lambda model, x: jnp.mean((model(x) - 1) ** 2),
        argnums=nnx.DiffState(0, wrt),
        microbatch_size=size or 8,
    )
    _, got = nnx.jit(f)(model, x)
    assert distance(nnx.as_pure(got), nnx.as_pure(want)) < 1e-5


def test_layers_along_another_axis_are_not_taken_for_written():
    def layer(rngs):
        return nnx.Linear(3, 3, rngs=rngs)

    along = nnx.StateAxes({nnx.Param: 1, ...: 0})
    layers = nnx.split_rngs(splits=2)(nnx.vmap(layer, out_axes=along))(nnx.Rngs(0))

    def loss(layers, x):
        def apply(layer, x):
            return jnp.tanh(layer(x))

        run = nnx.scan(apply, in_axes=(along, nnx.Carry), out_axes=nnx.Carry)
        return jnp.mean(run(layers, x) ** 2)

    x = jnp.arange(12.0).reshape(4, 3)
    f = accumax.nnx.value_and_grad(loss, microbatch_size=2)
    value, grads = nnx.jit(f)(layers, x)
    want, like = nnx.value_and_grad(loss)(layers, x)
    assert abs(value - want) < 1e-6
    assert distance(nnx.as_pure(grads), nnx.as_pure(like)) < 1e-5
    optimizer = optimizer_of(layers, every=1)
    nnx.jit(accumax.nnx.train_step(loss))(layers, optimizer, x)


def test_a_method_of_a_module_is_no_loss():
    """The module would be closed over: no gradient, without a word."""

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(3))

        def loss(self, scale, x):
            return jnp.mean((x @ self.w[...] * scale) ** 2)

    model = Model()
    for make in (accumax.nnx.value_and_grad, accumax.nnx.train_step):
        for loss in (model.loss, jax.jit(model.loss), functools.partial(model.loss)):
            with pytest.raises(TypeError, match=r"Pass (f|loss_fn)=Model\.loss"):
                make(loss)
    run = accumax.nnx.value_and_grad(Model.loss, microbatches=2, batch_argnums=2)
    _, grads = run(model, jnp.float32(2.0), jnp.ones((4, 3)))
    np.testing.assert_allclose(grads["w"][...], 24 * np.ones(3))


def test_running_statistics_in_a_state_have_no_momentum():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest, x):
        return jnp.mean(nnx.merge(graphdef, params, rest)(x) ** 2)

    run = accumax.nnx.value_and_grad(loss, microbatches=2, batch_argnums=2)
    with pytest.raises(ValueError, match="pass the module, not its parts"):
        run(params, rest, jnp.ones((4, 3)))


class Stat(nnx.Variable):
    pass


class Calibrated(nnx.Module):
    """A layer with variables that hold trees, as qwix's have."""

    def __init__(self):
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.affine = nnx.Param({"scale": jnp.ones((1, 2)), "shift": jnp.zeros((1, 2))})
        self.seen = Stat({"count": jnp.zeros((), jnp.int32), "sum": jnp.zeros(())})

    def __call__(self, x):
        seen, affine = self.seen.get_value(), self.affine.get_value()
        self.seen.set_value({"count": seen["count"] + 1, "sum": seen["sum"] + x.sum()})
        return self.linear(x) * affine["scale"] + affine["shift"]


@pytest.mark.parametrize("size", [8, 2, 3])
@pytest.mark.parametrize("form", ["value_and_grad", "train_step", "update"])
def test_a_variable_may_hold_a_tree(form, size):
    def loss(model, x):
        return jnp.mean((model(x) - 1) ** 2)

    x, sgd = jnp.arange(24.0).reshape(8, 3) / 8, optax.sgd(0.1)
    want, model = Calibrated(), Calibrated()
    nnx.Optimizer(want, sgd, wrt=nnx.Param).update(want, nnx.grad(loss)(want, x))
    optimizer = accumax.nnx.Optimizer(model, sgd, wrt=nnx.Param, every=1)
    options = {"microbatch_size": size}

    @nnx.jit
    def step(model, optimizer, x):
        if form == "train_step":
            accumax.nnx.train_step(loss, **options)(model, optimizer, x)
            return
        if form == "value_and_grad":
            _, grads = accumax.nnx.value_and_grad(loss, **options)(model, x)
        else:
            grads = nnx.grad(loss)(model, x)
        optimizer.update(model, grads)

    step(model, optimizer, x)
    got, expected = (pure(nnx.state(m, nnx.Param)) for m in (model, want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    seen = model.seen.get_value()
    divided = form != "update"
    assert seen["count"] == (-(-8 // size) if divided else 1)
    np.testing.assert_allclose(seen["sum"], x.sum(), rtol=1e-6)
