"""What a window measures: its mean loss, its gradient's norm, and the noise scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problems import same_bits

import accumax

D = 8


def loss_fn(params, x):
    """Its gradient by w is the mean of the rows of x, and by b that of their sums."""
    return jnp.mean(x @ params["w"]) + jnp.mean(jnp.sum(x, -1)) * params["b"]


def weighted_loss(params, x):
    return loss_fn(params, x) * x.shape[0], jnp.float32(x.shape[0])


PARAMS = {"w": jnp.zeros(D), "b": jnp.float32(0)}
ROWS = np.random.default_rng(0).normal(size=(12, D)) + 1


def norm_of(rows):
    mean = rows.mean(0)
    return np.sqrt((mean**2).sum() + mean.sum() ** 2)


def forms(tx):
    """Each form of a call, `(params, state, x) -> (params, state)`."""

    def updated(params, state, x):
        value, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, weight=len(x), value=value)
        return optax.apply_updates(params, updates), state

    def applied(params, state, x):
        value, grads = jax.value_and_grad(loss_fn)(params, x)
        options = {"weight": jnp.float32(len(x)), "value": value}
        return accumax.apply_gradients(tx, params, state, grads, **options)

    def stepped(params, state, x, **options):
        step = accumax.train_step(weighted_loss, tx, weighted=True, **options)
        return step(params, state, x)[:2]

    return {
        "update": updated,
        "apply_gradients": applied,
        "train_step": stepped,
        "carried": functools.partial(stepped, in_place=False),
        "microbatches": functools.partial(stepped, microbatch_size=1),
    }


FORMS = "update", "apply_gradients", "train_step", "carried", "microbatches"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_window_keeps_its_mean_loss_and_the_norm_of_its_gradient(form, nonfinite):
    tx = accumax.accumulate(
        optax.sgd(0.0),
        3,
        nonfinite=nonfinite,
        averaged_args=("value",),
        track_norm=True,
    )
    call = jax.jit(forms(tx)[form])
    params = PARAMS | {"w": jnp.ones(D)}
    state = tx.init(params)
    assert state.acc_args["grad_norm"] == 0
    for rows in (ROWS[:8], ROWS[4:]):
        before = state.acc_args["grad_norm"]
        for x in (rows[:1], rows[1:4], rows[4:]):
            assert state.acc_args["grad_norm"] == before
            params, state = call(params, state, jnp.float32(x))
        assert accumax.has_updated(state)
        np.testing.assert_allclose(
            state.acc_args["grad_norm"], norm_of(rows), rtol=1e-5
        )
        mean = rows.sum(1).mean()
        np.testing.assert_allclose(state.acc_args["value"], mean, rtol=1e-5)
    # A flush with no window open changes nothing.
    _, after = accumax.flush(tx, params, state)
    assert same_bits(after.acc_args, state.acc_args)
    assert after.acc_args["grad_norm"] == state.acc_args["grad_norm"]


@pytest.mark.parametrize("reduction", ["sum", "mean_of_sums"])
def test_the_norm_is_that_of_what_the_inner_sees(reduction):
    tx = accumax.accumulate(
        optax.sgd(1.0), 2, reduction=reduction, track_norm=True, track_noise=True
    )
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        grads = jax.tree.map(lambda p: jnp.full_like(p, 3.0), params)
        params, state = accumax.apply_gradients(tx, params, state, grads, weight=1.0)
    want = 3 if reduction == "mean_of_sums" else 6
    np.testing.assert_allclose(
        state.acc_args["grad_norm"], want * np.sqrt(D + 1), rtol=1e-6
    )


@pytest.mark.parametrize("form", ["update", "apply_gradients", "train_step"])
def test_the_norm_of_half_precision_sums_is_that_of_their_mean(form):
    tx = accumax.accumulate(
        optax.sgd(1.0), 2, accumulator_dtype=None, track_norm=True, track_noise=0.0
    )
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = tx.init(params)
    assert state.acc_grads["w"].dtype == jnp.bfloat16
    for x in (ROWS[:4], ROWS[4:]):
        _, state = jax.jit(forms(tx)[form])(params, state, jnp.bfloat16(x))
    np.testing.assert_allclose(state.acc_args["grad_norm"], norm_of(ROWS), rtol=0.02)
    first = norm_of(ROWS[:4]) ** 2
    small = (
        state.acc_args["noise"].small_square / state.acc_args["noise"].small_weight ** 2
    )
    if form != "train_step":  # there it holds the square that was read last
        np.testing.assert_allclose(small, first, rtol=0.03)


def rows_of(key, calls, rows, dim=400, spread=3.0):
    """Rows whose mean is 1 and whose variance is spread ** 2, in each element."""
    return 1 + spread * jax.random.normal(key, (calls, rows, dim))


@pytest.mark.parametrize("form", ["update", "apply_gradients", "train_step"])
def test_the_noise_scale_of_known_gradients_is_found(form):
    """Within 10 % after 200 windows; it is 9 rows."""
    tx = accumax.accumulate(optax.sgd(0.0), 4, track_noise=True)
    dim = 400
    params = {"w": jnp.zeros(dim), "b": jnp.float32(0)}

    def loss(params, x):
        return jnp.mean(x @ params["w"]) + 0 * params["b"]

    def weighted(params, x):
        return loss(params, x) * len(x), jnp.float32(len(x))

    step = accumax.train_step(weighted, tx, weighted=True)

    def call(state, x):
        if form == "train_step":
            return step(params, state, x)[1], None
        grads = jax.grad(loss)(params, x)
        if form == "update":
            return tx.update(grads, state, params, weight=len(x))[1], None
        options = {"weight": jnp.float32(len(x))}
        return accumax.apply_gradients(tx, params, state, grads, **options)[1], None

    x = rows_of(jax.random.key(1), 800, 5)
    state, _ = jax.jit(functools.partial(jax.lax.scan, call))(tx.init(params), x)
    assert abs(accumax.noise_scale(state) / 9 - 1) < 0.1
    # Numerator and denominator are each what they stand for.
    assert (
        abs(state.acc_args["noise"].signal / (0.866 * dim) - 1) < 0.1
    )  # 1 - 0.99 ** 200
    assert abs(state.acc_args["noise"].spread / (0.866 * 9 * dim) - 1) < 0.1


CALLS = {  # of 16 rows: the loss, the options of the step and of the window, the unit
    "mean": ("mean", {}, {}, 16),
    "tail": ("mean", {"microbatch_size": 3}, {}, 16),
    "unrolled": ("mean", {"unroll": True}, {}, 16),
    "carried": ("mean", {"in_place": False}, {}, 16),
    "skip": ("mean", {}, {"nonfinite": "skip"}, 16),
    "half": ("mean", {}, {"accumulator_dtype": jnp.bfloat16}, 16),
    "weighted": ("weighted", {"weighted": True}, {}, 1),
    "weighted, drop": ("weighted", {"weighted": True}, {"nonfinite": "drop"}, 1),
    "weight": ("mean", {"weight": 16.0}, {}, 1),
    "sum": ("sum", {}, {"reduction": "sum"}, 16),
    "mean of sums": ("sum", {"weight": 16.0}, {"reduction": "mean_of_sums"}, 1),
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", CALLS)
def test_the_first_microbatch_is_a_small_batch(kind, every):
    """The noise scale is 9 rows; a window may be one call."""
    form, options, of_window, unit = CALLS[kind]
    losses = {
        "mean": lambda w, x: jnp.mean(x @ w),
        "sum": lambda w, x: jnp.sum(x @ w),
        # Where the first microbatch has no item, the second is the first.
        "weighted": lambda w, x: (jnp.sum(x[:, 1:] @ w[1:]), jnp.sum(x[:, 0])),
    }
    options = {"microbatch_size": 4} | options
    passed = {"weight": options.pop("weight")} if "weight" in options else {}
    tx = accumax.accumulate(optax.sgd(0.0), every, track_noise=True, **of_window)
    step = accumax.train_step(losses[form], tx, **options)
    params = jnp.zeros(401)

    def call(state, key):
        x = rows_of(key, 1, 16, dim=401)[0].at[:, 0].set(1)
        if form == "weighted":  # microbatch 0 is rows 0, 4, 8 and 12
            x = x.at[::4].set(0)
        return step(params, state, x, **passed)[1], None

    keys = jax.random.split(jax.random.key(5), 300)
    state, _ = jax.jit(functools.partial(jax.lax.scan, call))(tx.init(params), keys)
    assert abs(accumax.noise_scale(state) * unit / 9 - 1) < 0.1
    rows = 3 if kind == "tail" else 4
    assert state.acc_args["noise"].small_weight == pytest.approx(rows / unit)


def test_the_first_microbatch_of_an_open_window_is_not_measured_again():
    tx = accumax.accumulate(optax.sgd(0.0), 3, track_noise=True)
    params, state = PARAMS, tx.init(PARAMS)
    step = jax.jit(accumax.train_step(loss_fn, tx, microbatches=2))
    rows = jnp.float32(ROWS)
    seen = []
    for x in (rows[:4], rows[4:8], rows[8:]):
        params, state, _ = step(params, state, x)
        seen.append(state.acc_args["noise"])
    assert same_bits([x.small_square for x in seen], [seen[0].small_square] * 3)
    assert [x.small_weight for x in seen] == [0.5] * 3
    first = norm_of(ROWS[:4:2]) ** 2 / 4  # the sum of half a call
    np.testing.assert_allclose(seen[0].small_square, first, rtol=1e-5)
    assert jnp.isfinite(accumax.noise_scale(state))


GRADIENTS = {  # of 16 rows: the loss and the options
    "mean": ("mean", {}),
    "tail": ("mean", {"microbatch_size": 3}),
    "unrolled": ("mean", {"unroll": True}),
    "carried": ("mean", {"in_place": False}),
    "the first three": ("mean", {"num_microbatches": 3}),
    "several": (("mean", "twice"), {}),
    "sum": ("sum", {"reduction": "sum"}),
    "weighted": ("weighted", {"weighted": True}),
    "weighted sum": ("weighted", {"weighted": True, "reduction": "sum"}),
    "half": ("mean", {"accumulator_dtype": jnp.bfloat16}),
}


def average_of(call, keys):
    """The mean of the noises of many calls, as a user would average them."""
    like = jax.eval_shape(call, keys[0])
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def add(average, key):
        return jax.tree.map(lambda a, n: a + n / len(keys), average, call(key)), None

    return jax.jit(functools.partial(jax.lax.scan, add))(start, keys)[0]


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_gradient_within_a_call_tells_its_noise(kind):
    """The noise scale is 9 rows, and in rows."""
    names, options = GRADIENTS[kind]
    losses = {
        "mean": lambda w, x: jnp.mean(x @ w),
        "twice": lambda w, x: 2 * jnp.mean(x @ w),
        "sum": lambda w, x: jnp.sum(x @ w),
        "weighted": lambda w, x: (jnp.sum(x[:, 1:] @ w[1:]), jnp.sum(x[:, 0])),
    }
    fun = losses[names] if isinstance(names, str) else [losses[n] for n in names]
    options = {"microbatch_size": 4} | options
    f = accumax.value_and_grad(fun, track_noise=True, **options)
    w = jnp.zeros(401)

    def rows(key):
        x = rows_of(key, 1, 16, dim=401)[0].at[:, 0].set(1)
        return x.at[::4].set(0) if names == "weighted" else x

    keys = jax.random.split(jax.random.key(5), 300)
    noise = average_of(lambda key: f(w, rows(key))[2], keys)
    assert abs(accumax.noise_scale(noise) / 9 - 1) < 0.1
    size = 9.0 if kind == "several" else 1.0  # the squared factor of the gradient
    assert abs(noise.signal / (401 * size) - 1) < 0.1
    assert noise.small_weight == pytest.approx(3 if kind == "tail" else 4)
    # The gradient is what it is without.
    x = rows(keys[0])
    plain = jax.jit(accumax.value_and_grad(fun, **options))(w, x)
    assert same_bits(jax.jit(f)(w, x)[:2], plain)
    grads, noise = accumax.grad(fun, track_noise=True, **options)(w, x)
    assert same_bits(grads, plain[1])
    assert noise.signal != 0


def test_a_gradient_of_one_microbatch_tells_nothing():
    f = accumax.value_and_grad(loss_fn, microbatches=1, track_noise=True)
    noise = jax.jit(f)(PARAMS, jnp.float32(ROWS))[2]
    assert noise.signal == noise.spread == 0
    assert jnp.isnan(accumax.noise_scale(noise))
    rows = jnp.float32(ROWS).at[0].set(jnp.nan)
    f = accumax.value_and_grad(loss_fn, microbatches=2, track_noise=True)
    (_, grads, noise) = jax.jit(f)(PARAMS, rows)
    assert jnp.isnan(grads["b"])
    assert tuple(noise) == (0, 0, 0, 0)  # a NaN would stay in an average
    f = accumax.value_and_grad(
        lambda p, x: (loss_fn(p, x), jnp.min(x)),
        microbatches=2,
        weighted=True,
        track_noise=True,
    )
    _, grads, noise = jax.jit(f)(PARAMS, jnp.float32(ROWS).at[0].set(-1.0))
    assert jnp.isnan(grads["b"])  # of a negative weight
    assert tuple(noise) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="2 weighted losses"):
        accumax.value_and_grad(
            [weighted_loss] * 2, microbatches=2, weighted=True, track_noise=True
        )
    with pytest.raises(TypeError, match=r"track_noise=0\.9"):
        accumax.value_and_grad(loss_fn, microbatches=2, track_noise=0.9)


AXES = {
    "data parallel": (lambda: "data", P()),
    "FSDP": (lambda: accumax.FSDP("data", P("data")), P("data")),
    "FSDP once": (lambda: accumax.FSDP("data", P("data"), once=True), P("data")),
}


@pytest.mark.parametrize("form", ["value_and_grad", "train_step"])
@pytest.mark.parametrize("kind", AXES)
def test_each_device_is_a_small_batch_of_a_call(kind, form):
    axis, spec = AXES[kind]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"microbatch_size": 8, "reduce_axis": axis()}

    def loss(w, x):
        return jnp.mean(x @ w)

    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.zeros(400), NamedSharding(mesh, spec))
        keys = jax.random.split(jax.random.key(7), 300)
        place = NamedSharding(mesh, P("data"))

        def rows(key):
            x = rows_of(key, 1, 16)[0]
            return jax.lax.with_sharding_constraint(x, place)

        if form == "value_and_grad":
            f = accumax.value_and_grad(loss, track_noise=True, **options)
            noise = average_of(lambda key: f(w, rows(key))[2], keys)
            unit, weight = 1, noise.small_weight
        else:
            tx = accumax.accumulate(optax.sgd(0.0), 1, track_noise=True)
            step = accumax.train_step(loss, tx, **options)

            def call(state, key):
                return step(w, state, rows(key))[1], None

            scan = jax.jit(functools.partial(jax.lax.scan, call))
            noise, _ = scan(tx.init(w), keys)
            unit, weight = 16, 16 * noise.acc_args["noise"].small_weight
        assert abs(accumax.noise_scale(noise) * unit / 9 - 1) < 0.1
        # Where XLA reduces in each microbatch, the small batch is one of them.
        assert weight == pytest.approx(8 if kind == "FSDP" else 4)


def test_a_shard_does_not_tell_the_norm():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        axis = accumax.FSDP("data", P("data"), once=True)
        f = accumax.value_and_grad(
            lambda w, x: jnp.mean(x @ w),
            microbatches=2,
            reduce_axis=axis,
            track_noise=True,
        )
        inside = jax.shard_map(
            lambda w, x: f(w, x)[1],
            in_specs=(P("data"), P("data")),
            out_specs=P("data"),
        )
        with pytest.raises(ValueError, match=r"track_noise and accumax\.FSDP within"):
            jax.jit(inside)(jnp.zeros(8), jnp.ones((16, 8)))


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 3}, {"reduce_axis": "x"}])
def test_the_noise_of_a_gradient_costs_no_buffer(options):
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64))}

    def loss(params, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["v"]) ** 2)

    def report(track_noise):
        f = accumax.value_and_grad(
            loss, track_noise=track_noise, **({"microbatch_size": 4} | options)
        )
        return accumax.audit(f, params, jnp.ones((16, 64)))

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        plain, tracked = report(False), report(True)
    assert tracked.memory.temp <= plain.memory.temp + 1024  # of 32768
    assert tracked.memory.output <= plain.memory.output + 64  # four scalars
    assert len(tracked.copies) <= len(plain.copies)


def test_the_noise_of_windows_of_unlike_calls_is_that_of_their_rows():
    tx = accumax.accumulate(optax.sgd(0.0), 3, track_noise=0.98)
    params = jnp.zeros(400)

    @jax.jit
    def window(state, x):
        for part in (x[:2], x[2:3], x[3:8]):
            grads, weight = part.mean(0), jnp.float32(len(part))
            params_ = params
            _, state = accumax.apply_gradients(tx, params_, state, grads, weight=weight)
        return state

    state = tx.init(params)
    for x in rows_of(jax.random.key(2), 100, 8):
        state = window(state, x)
    assert abs(accumax.noise_scale(state) / 9 - 1) < 0.15


def test_the_noise_of_several_devices_comes_from_the_sum_of_each():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        tx = accumax.accumulate(
            optax.sgd(0.0), 2, reduce_axis="data", track_noise=True, track_norm=True
        )
        params = jax.device_put(jnp.zeros(400), NamedSharding(mesh, P()))
        step = accumax.train_step(lambda w, x: jnp.mean(x @ w), tx)
        x = rows_of(jax.random.key(3), 400, 8)
        x = jax.device_put(x, NamedSharding(mesh, P(None, "data")))

        @jax.jit
        def run(state, x):
            def call(state, x):
                return step(params, state, x)[1], None

            return jax.lax.scan(call, state, x)[0]

        state = run(tx.init(params), x)
        # A call of 8 rows has the weight 1.
        assert abs(accumax.noise_scale(state) * 8 / 9 - 1) < 0.1
        mean = jnp.linalg.norm(x[-2:].mean((0, 1)))
        np.testing.assert_allclose(state.acc_args["grad_norm"], mean, rtol=1e-5)
        found = accumax.audit(jax.jit(step, donate_argnums=(0, 1)), params, state, x[0])
    # What tells the noise is reduced with the window: one number.
    assert {(c.where, c.times) for c in found.collectives if c.gradient} == {
        ("branch", 1)
    }
    measured = [c for c in found.collectives if "accumax.measure" in c.scope]
    assert {c.bytes for c in measured} == {4}


def test_a_nan_does_not_outlive_its_window():
    tx = accumax.accumulate(optax.sgd(0.0), 2, track_noise=True, track_norm=True)
    params = jnp.zeros(100)
    state = tx.init(params)

    @jax.jit
    def call(state, grads):
        return accumax.apply_gradients(tx, params, state, grads)[1]

    gradients = rows_of(jax.random.key(4), 6, 1, dim=100)[:, 0]
    for grads in gradients[:2]:
        state = call(state, grads)
    before = state.acc_args["noise"]
    for grads in (gradients[2] * jnp.nan, gradients[3]):
        state = call(state, grads)
    assert jnp.isnan(state.acc_args["grad_norm"])
    assert same_bits(state.acc_args["noise"].signal, before.signal)
    for grads in gradients[4:]:
        state = call(state, grads)
    assert jnp.isfinite(state.acc_args["grad_norm"])
    assert jnp.isfinite(state.acc_args["noise"].signal)
    assert state.acc_args["noise"].signal != before.signal


def test_windows_of_one_call_tell_nothing():
    tx = accumax.accumulate(optax.sgd(0.0), 1, track_noise=True)
    params, state = jnp.zeros(3), tx.init(jnp.zeros(3))
    for _ in range(2):
        _, state = accumax.apply_gradients(tx, params, state, jnp.ones(3))
    assert jnp.isnan(accumax.noise_scale(state))


@pytest.mark.parametrize("size", [None, 2])
def test_what_is_measured_costs_no_buffer_and_no_copy(size):
    params = {"w": jnp.ones((64, 64))}

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["w"]) ** 2)

    def report(**options):
        tx = accumax.accumulate(optax.adam(1e-3), 4, **options)
        state = tx.init(params)
        step = accumax.train_step(loss, tx, microbatch_size=size)
        x = jnp.ones((8, 64))
        return accumax.audit(step, params, state, x, donate_argnums=(0, 1))

    plain, tracked = report(), report(track_norm=True, track_noise=True)
    assert tracked.memory.arguments - plain.memory.arguments == 5 * 4
    assert tracked.memory.temp <= plain.memory.temp + 1024  # of 16384
    assert tracked.copies == plain.copies == ()
    assert tracked.warnings == ()


def test_no_program_changes_without_a_measure():
    tx = accumax.accumulate(optax.sgd(0.1), 2)
    state = tx.init(PARAMS)
    assert not state.acc_args
    step = accumax.train_step(loss_fn, tx)
    text = jax.jit(step).lower(PARAMS, state, jnp.ones((2, D))).as_text(debug_info=True)
    assert "accumax.boundary" in text
    assert "accumax.measure" not in text


def test_a_state_without_the_measure_is_refused():
    plain = accumax.accumulate(optax.sgd(0.1), 2)
    tracked = accumax.accumulate(optax.sgd(0.1), 2, track_noise=True)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    for tx, other, has in ((plain, tracked, "has one"), (tracked, plain, "has none")):
        with pytest.raises(TypeError, match=has):
            accumax.apply_gradients(tx, PARAMS, other.init(PARAMS), grads)
    # As the message says:
    state = plain.init(PARAMS)._replace(acc_args=tracked.init(PARAMS).acc_args)
    accumax.apply_gradients(tracked, PARAMS, state, grads)
    with pytest.raises(TypeError, match="track_noise=True"):
        accumax.noise_scale(plain.init(PARAMS))
    for wrong in (1, 1.0, -0.5, "yes", None):
        with pytest.raises(ValueError, match="track_noise"):
            accumax.accumulate(optax.sgd(0.1), 2, track_noise=wrong)


def test_an_averaged_argument_may_have_the_name_of_a_measure_that_is_not_taken():
    grads = jnp.ones(3)
    for name, option in (("noise", "track_noise"), ("grad_norm", "track_norm")):
        tx = accumax.accumulate(optax.sgd(0.1), 2, averaged_args=(name,))
        state = tx.init(grads)
        for value in (1.0, 3.0):
            _, state = accumax.apply_gradients(tx, grads, state, grads, **{name: value})
        assert state.acc_args[name] == 2
        with pytest.raises(ValueError, match=f"has '{name}'"):
            accumax.accumulate(
                optax.sgd(0.1), 2, averaged_args=(name,), **{option: True}
            )
