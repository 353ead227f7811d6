"""`DataParallel(shard_optimizer=True)`: windows whose optimizer state is divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exchanges import REDUCTIONS, collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import big_batch, data, distance, same_bits, slow_but

import accumax
import accumax.linen
import accumax.nnx

EVERY, ROWS = 2, 16
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
ADAMW = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, eps=1e-3))
INNERS = {
    "adamw, clipped": ADAMW,
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "lamb": optax.lamb(1e-2, eps=1e-3),
    "muon": optax.contrib.muon(1e-2),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.5), 0.5),
    "sgd": optax.sgd(0.1),
}
FEW = "adamw, clipped", "muon", "schedule_free"


def mesh_of(kind="auto", count=4):
    return jax.make_mesh(
        (count,), ("data",), (KINDS[kind],), devices=jax.devices()[:count]
    )


def init(dtype=jnp.float32):
    """Divided along the first dimension, along the second in slices, and not at all."""
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape) / 8, dtype)

    return {"in": leaf(3, 8), "layers": leaf(3, 128, 128), "out": [leaf(8, 2), None]}


def loss_fn(params, batch):
    x = batch["x"] @ params["in"]
    wide = jnp.concatenate([x] * 16, 1)
    x = x + jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), wide, params["layers"])[
        0
    ].reshape(-1, 16, 8).mean(1)
    return jnp.mean((x @ params["out"][0] - batch["y"]) ** 2)


def put(tree, spec=None):
    mesh = jax.sharding.get_mesh()
    return jax.device_put(tree, NamedSharding(mesh, spec or P()))


def divided(**options):
    return accumax.DataParallel("data", shard_optimizer=True, **options)


def calls_of(windows):
    """The calls, and the batches that they are parts of."""
    whole = data(windows, rows=ROWS * EVERY)
    halves = [
        jax.tree.map(lambda x, i=i: x[i * ROWS : (i + 1) * ROWS], b)
        for b in whole
        for i in range(EVERY)
    ]
    return halves, whole


def trained(inner, calls, dtype=jnp.float32, reduce_axis=None, **options):
    tx = accumax.accumulate(inner, EVERY, reduce_axis=reduce_axis or divided())
    params = put(init(dtype))
    state = tx.init(params)
    step = accumax.train_step(loss_fn, tx, **options)
    step = jax.jit(step, donate_argnums=(0, 1))
    for batch in calls:
        params, state, _ = step(params, state, put(batch, P("data")))
    return params, state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", slow_but(FEW, INNERS))
def test_a_divided_optimizer_makes_the_update_of_the_big_batch(name, kind):
    calls, whole = calls_of(2)
    inner = INNERS[name]
    with jax.set_mesh(mesh_of(kind)):
        params, _ = trained(inner, calls)
    want = big_batch(inner, init(), whole, loss=loss_fn)
    big = big_batch(inner, init(), whole, jnp.float32, loss=loss_fn)
    assert distance(params, want) <= 4 * distance(big, want) + 1e-6


def integers(count):
    """An update in which nothing is rounded: the sums are integers, and Lion signs."""
    inner = optax.lion(1 / 8, weight_decay=0)
    rng = np.random.default_rng(0)

    def loss(params, x):
        hidden = x @ params["in"]
        return jnp.sum(hidden @ params["layers"].sum(0)[:8] * 1.0) / ROWS

    params = jax.tree.map(lambda x: jnp.round(8 * x), init()) | {"out": None}
    tx = accumax.accumulate(inner, EVERY, reduce_axis=divided() if count > 1 else None)
    params = put(params)
    state = tx.init(params)
    step = jax.jit(accumax.train_step(loss, tx))
    for _ in range(5):  # the last is in an open window
        x = jnp.asarray(rng.integers(-4, 5, (ROWS, 3)), jnp.float32)
        params, state, _ = step(params, state, put(x, P("data")))
    return params, state


def test_integers_give_the_bits_of_one_device():
    ends = []
    for count in (1, 4):
        with jax.set_mesh(mesh_of(count=count)):
            params, state = integers(count)
        sums = state.acc_grads
        if count > 1:
            sums = jax.tree.map(lambda x: x.sum(0), sums)
        ends.append(jax.device_get((params, state._replace(acc_grads=sums))))
    same_bits(*ends)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_holds_its_part_of_the_state_from_the_beginning(kind, jitted):
    with jax.set_mesh(mesh_of(kind)):
        params = put(init())
        tx = accumax.accumulate(ADAMW, EVERY, reduce_axis=divided())
        state = (jax.jit(tx.init) if jitted else tx.init)(params)
        after = trained(ADAMW, calls_of(1)[0])[1]
    for found in (state, after):
        moment = optax.tree.get(found.inner_opt_state, "mu")
        shapes = {
            name: {x.data.shape for x in jax.tree.leaves(moment[name])[0].global_shards}
            for name in moment
        }
        assert shapes == {"in": {(3, 8)}, "layers": {(3, 32, 128)}, "out": {(2, 2)}}


def compiled(every=EVERY, **options):
    """Of a step of matrices and layers, on four devices."""
    mesh = mesh_of()
    over = accumax.DataParallel("data", mesh=mesh, **options)
    tx = accumax.accumulate(optax.adamw(1e-3), every, reduce_axis=over)
    params = {
        "layers": jax.ShapeDtypeStruct((3, 256, 256), jnp.float32),
        "last": jax.ShapeDtypeStruct((256, 256), jnp.float32),
    }

    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.mean((x @ params["last"]) ** 2)

    def placed(x, spec):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    params = jax.tree.map(lambda x: placed(x, P()), params)
    state = jax.jit(tx.init).lower(params).compile()
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state.out_info,
        state.output_shardings,
    )
    batch = placed(jax.ShapeDtypeStruct((32, 256), jnp.float32), P("data"))
    step = jax.jit(accumax.train_step(loss, tx), donate_argnums=(0, 1))
    unit = sum(4 * x.size for x in jax.tree.leaves(params))
    return step.lower(params, state, batch).compile(), unit


def test_a_window_scatters_and_gathers_once_and_only_where_it_closes():
    found, unit = compiled(shard_optimizer=True)
    each = [x for x in collectives(found.as_text()) if x.bytes > 64]
    assert {x.place for x in each} == {"boundary"}
    volumes = {
        op: sum(x.bytes * x.executions for x in each if x.op == op) / unit
        for op in {x.op for x in each}
    }
    assert volumes == {"reduce-scatter": 1, "all-gather": 1}


def test_the_state_is_divided_and_nothing_is_kept_whole_beside_the_sums():
    whole, unit = compiled()
    parts, _ = compiled(shard_optimizer=True)
    before, after = whole.memory_analysis(), parts.memory_analysis()
    saved = before.argument_size_in_bytes - after.argument_size_in_bytes
    assert saved == 2 * unit * 3 // 4
    assert after.temp_size_in_bytes <= before.temp_size_in_bytes + unit // 10
    assert after.alias_size_in_bytes >= after.output_size_in_bytes - 4096


@pytest.mark.parametrize("options", [{}, {"shard_optimizer": True}])
def test_gradients_cross_in_half_precision_and_are_added_in_float32(options):
    found, unit = compiled(reduce_dtype=jnp.bfloat16, **options)
    each = [x for x in collectives(found.as_text()) if x.bytes > 64]
    gathered = options and [x for x in each if x.op == "all-gather"]
    sent = [x for x in each if x not in (gathered or ())]
    assert not [x for x in sent if x.op in REDUCTIONS]
    assert sum(x.bytes * x.executions for x in sent) <= unit * (0.5 if options else 1)


@pytest.mark.parametrize("shard_optimizer", [False, True])
def test_half_precision_on_the_wire_rounds_each_device_once(shard_optimizer):
    calls, whole = calls_of(1)
    inner = optax.sgd(1.0)
    want = big_batch(inner, init(), whole, loss=loss_fn)
    moved = distance(init(), want)
    with jax.set_mesh(mesh_of()):
        over = accumax.DataParallel(
            "data", shard_optimizer=shard_optimizer, reduce_dtype=jnp.bfloat16
        )
        params, _ = trained(inner, calls, reduce_axis=over)
    assert 1e-5 * moved < distance(params, want) <= 2**-8 * moved


def test_a_change_that_crosses_in_half_precision_is_not_lost():
    calls, whole = calls_of(2)
    inner = optax.adam(1e-5, eps=1e-3)  # bfloat16 parameters would not move
    want = big_batch(inner, init(), whole, loss=loss_fn)
    with jax.set_mesh(mesh_of()):
        params, _ = trained(
            inner, calls, reduce_axis=divided(gather_dtype=jnp.bfloat16)
        )
    for x in jax.tree.leaves(params):
        parts = [np.asarray(s.data) for s in x.addressable_shards]
        assert all((parts[0] == part).all() for part in parts)
    assert distance(params, want) <= 2**-6 * distance(init(), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_the_window_of_whole_states(dtype):
    calls, _ = calls_of(2)
    with jax.set_mesh(mesh_of()):
        found, state = trained(ADAMW, calls, dtype)
        want, whole = trained(ADAMW, calls, dtype, reduce_axis="data")
    close = 1e-6 if dtype == jnp.float32 else 2**-7
    assert distance(want, found) < close
    assert distance(whole.inner_opt_state, state.inner_opt_state) < close


def test_the_norm_and_the_noise_are_those_of_whole_states():
    calls, _ = calls_of(3)
    numbers = []
    with jax.set_mesh(mesh_of()):
        for over in ("data", divided()):
            tx = accumax.accumulate(
                optax.sgd(0.0), EVERY, reduce_axis=over, track_norm=True,
                track_noise=True,
            )  # fmt: skip
            params = put(init())
            state, step = tx.init(params), jax.jit(accumax.train_step(loss_fn, tx))
            for batch in calls:
                params, state, _ = step(params, state, put(batch, P("data")))
            numbers.append((state.acc_args["grad_norm"], accumax.noise_scale(state)))
    np.testing.assert_allclose(*numbers, rtol=1e-4)


def test_a_flush_and_skipped_calls_are_as_with_a_whole_state():
    calls, _ = calls_of(2)
    calls[1] = jax.tree.map(lambda x: x * jnp.nan, calls[1])
    ends = []
    with jax.set_mesh(mesh_of()):
        for over in ("data", divided()):
            tx = accumax.accumulate(
                ADAMW,
                EVERY,
                reduce_axis=over,
                nonfinite="skip",
                averaged_args=("value",),
            )
            params = put(init())
            state = tx.init(params)
            step = jax.jit(accumax.train_step(loss_fn, tx))
            for batch in calls:
                params, state, _ = step(params, state, put(batch, P("data")))
            params, state = jax.jit(functools.partial(accumax.flush, tx))(params, state)
            ends.append((params, state._replace(acc_grads=())))
    assert distance(*ends) < 1e-6
    assert ends[1][1].skipped == 1
    assert ends[1][1].gradient_step == 2


def test_between_windows_a_state_moves_to_another_number_of_devices():
    calls, whole = calls_of(2)
    with jax.set_mesh(mesh_of(count=4)):
        params, state = trained(ADAMW, calls[:EVERY])
    saved = jax.device_get((params, state))
    with jax.set_mesh(mesh_of(count=2)):
        tx = accumax.accumulate(ADAMW, EVERY, reduce_axis=divided())
        params = put(saved[0])
        fresh = tx.init(params)
        state = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding),
            saved[1]._replace(acc_grads=jax.device_get(fresh.acc_grads)),
            fresh,
        )
        step = jax.jit(accumax.train_step(loss_fn, tx))
        for batch in calls[EVERY:]:
            params, state, _ = step(params, state, put(batch, P("data")))
    want = big_batch(ADAMW, init(), whole, loss=loss_fn)
    assert distance(params, want) < 1e-5
    with jax.set_mesh(mesh_of(count=2)), pytest.raises(ValueError, match="first axis"):
        step(params, jax.device_put(saved[1]), put(calls[0], P("data")))


def test_flax_states_divide_their_optimizer():
    import flax.linen as nn
    from flax import nnx

    calls, _ = calls_of(1)
    x = calls[0]["x"]
    model = nn.Dense(8)
    with jax.set_mesh(mesh_of()):
        ends = {}
        for name, over in (("whole", "data"), ("divided", divided())):
            tx = accumax.accumulate(optax.adam(0.1), EVERY, reduce_axis=over)
            params = put(model.init(jax.random.key(0), x)["params"])
            state = accumax.linen.TrainState.create(
                apply_fn=model.apply, params=params, tx=tx
            )
            step = accumax.linen.TrainState.train_step(
                lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
            )
            module = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
            nnx.update(module, put(nnx.state(module)))
            optimizer = accumax.nnx.Optimizer(module, tx, wrt=nnx.Param)
            train = nnx.jit(accumax.nnx.train_step(lambda m, x: jnp.mean(m(x) ** 2)))
            for _ in range(EVERY):
                state, _ = jax.jit(step)(state, put(x, P("data")))
                train(module, optimizer, put(x, P("data")))
            ends[name] = state.params, nnx.to_pure_dict(nnx.state(module))
            moment = optax.tree.get(state.opt_state.inner_opt_state, "mu")
            shards = moment["bias"].addressable_shards
            assert shards[0].data.shape == ((8,) if name == "whole" else (2,))
    assert distance(ends["whole"], ends["divided"]) < 1e-6


def test_what_is_frozen_crosses_the_network_never():
    mesh = mesh_of()
    label = {"base": "frozen", "adapter": "trained"}
    inner = optax.partition(
        {"trained": optax.adam(0.1), "frozen": optax.set_to_zero()}, label
    )
    tx = accumax.accumulate(
        inner, EVERY, reduce_axis=accumax.DataParallel(
            "data", shard_optimizer=True, mesh=mesh
        )
    )  # fmt: skip

    def loss(params, x):
        return jnp.mean((x @ params["base"] @ params["adapter"]) ** 2)

    with jax.set_mesh(mesh):
        params = put({"base": jnp.ones((256, 256)), "adapter": jnp.ones((256, 4))})
        state = tx.init(params)
        x = put(jnp.ones((16, 256)), P("data"))
        step = jax.jit(accumax.train_step(loss, tx))
        text = step.lower(params, state, x).compile().as_text()
        for _ in range(EVERY):
            params, state, _ = step(params, state, x)
    assert max(x.bytes for x in collectives(text)) <= 4 * 256 * 4
    assert (params["base"] == 1).all()
    assert (params["adapter"] != 1).all()


def test_what_cannot_be_divided_is_an_error():
    with jax.set_mesh(mesh_of()):
        tx = accumax.accumulate(ADAMW, EVERY, reduce_axis=divided())
        params = put(init())
        state = tx.init(params)
        grads = jax.tree.map(jnp.zeros_like, params)
        for call in (
            lambda: tx.update(grads, state, params),
            lambda: accumax.apply_gradients(tx, params, state, grads),
        ):
            with pytest.raises(TypeError, match=r"accumax\.train_step"):
                call()
        batch = put(calls_of(1)[0][0], P("data"))
        inside = jax.shard_map(
            accumax.train_step(loss_fn, tx),
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=False,
        )
        with pytest.raises((TypeError, ValueError), match=r"shard_map|first axis"):
            inside(params, state, batch)
        with pytest.raises(ValueError, match=r"accumax\.accumulate\(\.\.\."):
            accumax.value_and_grad(loss_fn, microbatches=2, reduce_axis=divided())
        plain = accumax.accumulate(ADAMW, EVERY)
        with pytest.raises(ValueError, match=r"accumax\.accumulate\(\.\.\."):
            accumax.train_step(loss_fn, plain, reduce_axis=divided())
    kinds = (AxisType.Explicit,) * 2
    both = jax.make_mesh((2, 2), ("data", "model"), kinds, devices=jax.devices()[:4])
    with jax.set_mesh(both), pytest.raises(ValueError, match=r"\['model'\]"):
        tx.init(put(init()))
    with pytest.raises(TypeError, match="shard_optimizer=1"):
        accumax.DataParallel("data", shard_optimizer=1)
    with pytest.raises(TypeError, match="reduce_dtype"):
        accumax.DataParallel("data", reduce_dtype=jnp.int8)
    with pytest.raises(ValueError, match="gather_dtype"):
        accumax.DataParallel("data", gather_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="no axis 'rows'"):
        accumax.DataParallel("rows", shard_optimizer=True, mesh=mesh_of())


def test_parameters_that_are_divided_over_the_axis_are_refused_by_name():
    with jax.set_mesh(mesh_of()):
        params = {"w": put(jnp.ones((8, 4)), P("data"))}
        zero = accumax.DataParallel("data", shard_optimizer=True)
        tx = accumax.accumulate(optax.adam(1e-2), 2, reduce_axis=zero)
        with pytest.raises(ValueError, match=r"params\['w'\] is sharded by .*FSDP"):
            tx.init(params)


def test_a_function_for_the_optimizer_on_explicit_axes_is_refused():
    """Its arrays have explicit types, and the optimizer runs on automatic axes."""
    with jax.set_mesh(mesh_of("explicit")):
        axis = accumax.DataParallel("data", shard_optimizer=True)
        tx = accumax.accumulate(optax.lbfgs(), 1, reduce_axis=axis)
        w = jax.device_put(jnp.ones(8), P())
        x = jax.device_put(jnp.ones((16, 8)), P("data"))

        def loss(w, x):
            return jnp.mean((x @ w - 1) ** 2)

        step = accumax.train_step(loss, tx)
        with pytest.raises(ValueError, match="the optimizer gets a function"):
            jax.jit(lambda w, s: step(w, s, x, value_fn=lambda w: loss(w, x)))(
                w, tx.init(w)
            )
