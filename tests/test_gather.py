"""FSDP: parameters, sums and optimizer state that no device has whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    SPECS,
    big_batch,
    cast,
    data,
    distance,
    init,
    loss_fn,
    losses,
    weighted_loss_fn,
)

import accumax
from accumax import FSDP

ROWS = 48
BATCH = data(1, rows=ROWS)[0]
HOW = [False, True]  # once
# The axes along which rows are divided: the parameters are sharded over one of them.
MESHES = {
    "data": ("data", (4,), (AxisType.Auto,)),
    "explicit": ("data", (4,), (AxisType.Explicit,)),
    "beside another": ("data", (2, 2), (AxisType.Auto, AxisType.Auto)),
    "replicas": (("other", "data"), (2, 2), (AxisType.Auto, AxisType.Auto)),
}


def setting(name):
    axes, shape, kinds = MESHES[name]
    names = ("data", "other")[: len(shape)]
    mesh = jax.make_mesh(
        shape, names, axis_types=kinds, devices=jax.devices()[: np.prod(shape)]
    )
    return axes, mesh


def sharded(params, mesh):
    return jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, SPECS
    )


def options_of(how, axes, mesh):
    typed = AxisType.Explicit in mesh.axis_types
    return {"reduce_axis": FSDP(axes, None if typed else SPECS, once=how)}


def whole(params, batch):
    with jax.enable_x64(True):
        params, batch = cast(params, jnp.float64), cast(batch, jnp.float64)
        return jax.tree.map(np.asarray, jax.grad(loss_fn)(params, batch))


def is_sharded(tree):
    """As `SPECS` says, each device with its part."""
    w, b = tree["layer"]["w"], tree["layer"]["b"]
    assert w.sharding.spec[1] == b.sharding.spec[0] == tree["out"][0].sharding.spec[0]
    assert w.sharding.spec[1] == "data"
    devices = dict(w.sharding.mesh.shape)["data"]
    assert w.addressable_shards[0].data.shape == (3, 4 // devices)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("how", HOW, ids=["layer by layer", "once"])
@pytest.mark.parametrize("weighted", [False, True])
def test_shards_of_the_gradient_are_those_of_the_whole_batch(weighted, how, name):
    axes, mesh = setting(name)
    fun = weighted_loss_fn if weighted else loss_fn
    with jax.set_mesh(mesh):
        f = accumax.value_and_grad(
            fun, microbatch_size=8, weighted=weighted, **options_of(how, axes, mesh)
        )
        batch = jax.device_put(BATCH, NamedSharding(mesh, P(axes)))
        value, grads = jax.jit(f)(sharded(init(), mesh), batch)
    np.testing.assert_allclose(value, loss_fn(init(), BATCH), rtol=1e-5)
    assert distance(grads, whole(init(), BATCH)) < 1e-4
    is_sharded(grads)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("how", HOW, ids=["layer by layer", "once"])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_window_keeps_parameters_sums_and_moments_sharded(nonfinite, how, name):
    """Clipped by the norm of all shards, which no device could compute alone."""
    axes, mesh = setting(name)
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    batches = data(2, rows=3 * ROWS)
    with jax.set_mesh(mesh):
        tx = accumax.accumulate(inner, 3, nonfinite=nonfinite)
        step = accumax.train_step(
            loss_fn, tx, microbatch_size=8, **options_of(how, axes, mesh)
        )
        step = jax.jit(step, donate_argnums=(0, 1))
        params = sharded(init(), mesh)
        state = tx.init(params)
        is_sharded(state.acc_grads)
        for batch in batches:
            for i in range(3):
                rows = jax.tree.map(lambda x, i=i: x[i::3], batch)
                rows = jax.device_put(rows, NamedSharding(mesh, P(axes)))
                params, state, _ = step(params, state, rows)
    assert distance(params, big_batch(inner, init(), batches)) < 1e-5
    moments = optax.tree.get(state, "mu")
    for tree in (params, state.acc_grads, moments):
        is_sharded(tree)


@pytest.mark.parametrize("how", HOW, ids=["layer by layer", "once"])
def test_a_device_without_weight_adds_nothing_not_even_its_nan(how):
    def fun(params, batch):
        counts = batch["place"] < ROWS // 2
        each = jnp.sqrt(jnp.where(counts, losses(params, batch), -1.0))
        total = jnp.sum(jnp.where(counts, each, 0.0))
        return total, jnp.sum(counts)

    def first_half(params, batch):
        return jnp.mean(jnp.sqrt(losses(params, batch)[: ROWS // 2]))

    axes, mesh = setting("data")
    with jax.set_mesh(mesh):
        options = options_of(how, axes, mesh)
        f = accumax.value_and_grad(fun, microbatch_size=8, weighted=True, **options)
        batch = BATCH | {"place": jnp.arange(ROWS)}
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
        value, grads = jax.jit(f)(sharded(init(), mesh), batch)
    want, want_grads = jax.value_and_grad(first_half)(init(), BATCH)
    if not how:  # the loss sees rows of all devices
        assert np.isfinite(value)
        return
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert distance(grads, want_grads) < 1e-4


@pytest.mark.parametrize("how", HOW, ids=["layer by layer", "once"])
def test_in_a_shard_map_of_ones_own(how):
    axes, mesh = setting("data")
    options = options_of(how, axes, mesh)
    f = accumax.grad(loss_fn, microbatch_size=2, **options)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            f, in_specs=(SPECS, P("data")), out_specs=SPECS, axis_names={"data"}
        )
        batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
        grads = jax.jit(mapped)(sharded(init(), mesh), batch)
    assert distance(grads, whole(init(), BATCH)) < 1e-4
    is_sharded(grads)


def test_several_arguments_have_specs_of_their_own():
    _, mesh = setting("data")
    specs = (P("data"), P(None))
    w, v = jnp.arange(12.0).reshape(4, 3), jnp.ones(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)

    def fun(w, v, x):
        return jnp.mean(jnp.tanh(x @ w / 9 + jnp.broadcast_to(v, (len(x), 3))) ** 2)

    with jax.set_mesh(mesh):
        f = accumax.grad(
            fun,
            (0, 1),
            microbatch_size=8,
            batch_argnums=2,
            reduce_axis=FSDP("data", specs, once=True),
        )
        put = functools.partial(jax.device_put)
        args = (
            put(w, NamedSharding(mesh, P("data"))),
            put(v, NamedSharding(mesh, P())),
        )
        grads = jax.jit(f)(*args, put(x, NamedSharding(mesh, P("data"))))
    assert distance(grads, jax.grad(fun, (0, 1))(w, v, x)) < 1e-6
    assert grads[0].sharding.spec == P("data")


def test_bad_options_are_errors_that_say_what_to_do():
    axes, mesh = setting("data")
    f = functools.partial(accumax.grad, loss_fn, microbatch_size=8)
    with pytest.raises(TypeError, match=r"once='twice' must be True or False"):
        FSDP("data", once="twice")
    with pytest.raises(TypeError, match="must be the name of a mesh axis"):
        accumax.accumulate(optax.sgd(0.1), 2, reduce_axis=FSDP("data"))
    with jax.set_mesh(mesh):
        params = sharded(init(), mesh)
        unknown = f(reduce_axis=FSDP(axes, once=True))
        with pytest.raises(ValueError, match=r"Pass specs=jax.tree.map"):
            jax.jit(unknown)(params, BATCH)
        odd = SPECS | {"layer": {"w": P("data"), "b": P()}}
        with pytest.raises(ValueError, match=r"axis 0 .*shape \(3, 4\) by 4 devices"):
            f(reduce_axis=FSDP(axes, odd, once=True))(params, BATCH)
        with pytest.raises(ValueError, match="prefix of the parameters"):
            f(reduce_axis=FSDP(axes, [P()], once=True))(params, BATCH)
        tx = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data")
        with pytest.raises(ValueError, match="keeps a whole sum on each"):
            accumax.train_step(loss_fn, tx, reduce_axis=FSDP("data", SPECS))
    kinds = (AxisType.Explicit, AxisType.Explicit)
    both = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
    with (
        jax.set_mesh(both),
        pytest.raises(ValueError, match=r"explicit axes \['model'\]"),
    ):
        f(reduce_axis=FSDP(axes, once=True))(sharded(init(), both), BATCH)


@pytest.mark.parametrize("form", ["value_and_grad", "train_step"])
def test_an_explicit_mesh_gathers_no_more_at_a_time_than_an_automatic_one(form):
    """Scanned layers: all of them at once would be eight times a layer."""
    stack = jax.ShapeDtypeStruct((8, 256, 256), jnp.float32)

    def loss(stack, x):
        def layer(h, w):
            return jnp.tanh(h @ w), None

        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, stack)[0] ** 2)

    def takes(kind):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        spec = P(None, "data")
        options = {"microbatches": 2, "reduce_axis": FSDP("data", spec)}

        def placed(x, spec):
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        x = placed(jax.ShapeDtypeStruct((32, 256), jnp.float32), P("data"))
        params = placed(stack, spec)
        with jax.set_mesh(mesh):
            if form == "value_and_grad":
                run, args = accumax.value_and_grad(loss, **options), (params, x)
            else:
                tx = accumax.accumulate(optax.sgd(0.1), 2)
                run = accumax.train_step(loss, tx, **options)
                state = jax.eval_shape(tx.init, params)
                state = jax.tree.map(
                    lambda x: placed(x, spec if x.ndim else P()), state
                )
                args = (params, state, x)
            analysis = jax.jit(run).lower(*args).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert takes(AxisType.Explicit) <= 1.02 * takes(AxisType.Auto)


def test_rows_may_come_from_anywhere_to_an_explicit_mesh_without_set_mesh():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    params = jax.device_put(init(), NamedSharding(mesh, P()))
    for reduce_axis in (
        accumax.DataParallel("data", mesh=mesh),
        FSDP("data", P(), mesh=mesh),
        FSDP("data", P(), once=True, mesh=mesh),
    ):
        f = accumax.grad(loss_fn, microbatch_size=8, reduce_axis=reduce_axis)
        assert distance(jax.jit(f)(params, BATCH), whole(init(), BATCH)) < 1e-4
