"""Flax's states on several devices: pooled statistics, and keys of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import accumax.linen
import accumax.nnx

ROWS, MOMENTUM = 48, 0.9
# Far from 0, so that cancellation would show; rows that differ by device.
CALLS = [
    np.random.default_rng(i).normal(size=(ROWS, 3)).astype(np.float32) * (i + 1)
    + np.linspace(50, 60, ROWS, dtype=np.float32)[:, None]
    for i in range(4)
]
KINDS = [AxisType.Auto, AxisType.Explicit]


def update_of(calls):
    """Of running statistics that begin at 0 and 1, in float64, by all rows at once."""
    rows = np.concatenate(calls).astype(np.float64)
    mean = (1 - MOMENTUM) * rows.mean(0)
    return mean, MOMENTUM + (1 - MOMENTUM) * rows.var(0)


def mesh_of(kind):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])


def put(tree, *axes):
    sharding = NamedSharding(jax.sharding.get_mesh(), P(*axes))
    return jax.device_put(tree, sharding)


class TrainState(accumax.linen.TrainState):
    batch_stats: dict
    key: jax.Array
    scale: jax.Array
    calls: jax.Array


@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("apart", [True, False])
def test_linen_statistics_are_those_of_all_rows_and_keys_differ(apart, size, kind):
    model = nn.BatchNorm(False, momentum=MOMENTUM, use_fast_variance=False)

    def loss_fn(params, x, batch_stats, key, scale, calls):
        variables = {"params": params, "batch_stats": batch_stats}
        y, new = model.apply(variables, x, mutable=["batch_stats"])
        drawn = jax.random.uniform(key, (x.shape[0],))
        return jnp.mean((y - 1) ** 2) * scale, (new | {"calls": calls + 1}, drawn)

    over = {"reduce_axis": "data"}
    with jax.set_mesh(mesh_of(kind)):
        tx = accumax.accumulate(optax.sgd(0.1), 4, **(over if apart else {}))
        state = TrainState.create(
            apply_fn=model.apply,
            tx=tx,
            momentum=MOMENTUM,
            key=put(jax.random.key(0)),
            scale=put(jnp.ones(())),
            calls=put(jnp.zeros((), jnp.int32)),
            **put(model.init(jax.random.key(0), CALLS[0])),
        )
        step = TrainState.train_step(
            loss_fn,
            fields=("scale",),
            mutable=("batch_stats", "calls"),
            rngs=("key",),
            has_aux=True,
            aux="concat",
            microbatch_size=size,
            **over,
        )
        step, drawn = jax.jit(step, donate_argnums=0), []
        for x in CALLS:
            state, (_, new) = step(state, put(x, "data"))
            drawn.append(np.asarray(new))
    mean, var = update_of(CALLS)
    np.testing.assert_allclose(state.batch_stats["mean"], mean, rtol=2e-6)
    np.testing.assert_allclose(state.batch_stats["var"], var, rtol=2e-6)
    assert len(np.unique(drawn)) == 4 * ROWS
    assert (state.step, state.microstep) == (1, 4)
    assert state.calls == 4 * (6 if size else 1)  # the microbatches of one device


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=["auto", "explicit"])
@pytest.mark.parametrize("size", [None, 8])
def test_nnx_statistics_are_those_of_all_rows_and_masks_differ(size, kind):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(
                3, momentum=MOMENTUM, use_fast_variance=False, rngs=rngs
            )
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(x)

    def loss_fn(net, x):
        masks = net.dropout(jnp.ones((x.shape[0], 32)))
        return jnp.mean((net(x) - 1) ** 2), masks

    with jax.set_mesh(mesh_of(kind)):
        graphdef, state = nnx.split(Net(nnx.Rngs(0)))
        keys = [
            x
            for x in jax.tree.leaves(state)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ]
        net = nnx.merge(graphdef, put(state))
        tx = accumax.accumulate(optax.sgd(0.1), 4, reduce_axis="data")
        optimizer = accumax.nnx.Optimizer(net, tx, wrt=nnx.Param)
        step = accumax.nnx.train_step(
            loss_fn, has_aux=True, aux="concat", microbatch_size=size
        )
        step, masks = nnx.jit(step), []
        for x in CALLS:
            _, drawn = step(net, optimizer, put(x, "data"))
            masks.append(np.asarray(drawn))
    mean, var = update_of(CALLS)
    np.testing.assert_allclose(net.norm.mean[...], mean, rtol=2e-6)
    np.testing.assert_allclose(net.norm.var[...], var, rtol=2e-6)
    assert len(np.unique(np.concatenate(masks), axis=0)) == 4 * ROWS
    # The key itself is as it was, and its count as on one device.
    left = jax.tree.leaves(nnx.state(net, nnx.RngKey))
    assert keys
    assert all(x == y for x, y in zip(left, keys, strict=True))
    counts = jax.tree.leaves(nnx.state(net, nnx.RngCount))
    assert max(map(int, counts)) == 4 * (6 if size else 1)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(32, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.linear(x))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)

    def __call__(self, x):
        def apply(x, block):
            return block(x)

        return nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.blocks
        )


@pytest.mark.parametrize("form", ["train_step", "value_and_grad"])
def test_scanned_layers_have_a_key_each_on_each_device(form):
    def loss_fn(net, x):
        out = net(x)
        return jnp.mean(out**2), out

    options = {"has_aux": True, "aux": "concat", "microbatch_size": 8}
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        net = Scanned(nnx.Rngs(0))
        nnx.update(net, put(nnx.state(net)))
        x = put(jnp.ones((16, 32)), "data")
        if form == "value_and_grad":
            f = accumax.nnx.value_and_grad(loss_fn, reduce_axis="data", **options)
            (_, out), _ = nnx.jit(f)(net, x)
        else:
            tx = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data")
            optimizer = accumax.nnx.Optimizer(net, tx, wrt=nnx.Param)
            step = nnx.jit(accumax.nnx.train_step(loss_fn, **options))
            _, out = step(net, optimizer, x)
    assert len(np.unique(np.asarray(out), axis=0)) == 16


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_raw_key_in_a_state_is_warned_of(make):
    """It may be data, so it is not made another one for each device."""

    class State(accumax.linen.TrainState):
        key: jax.Array

    def loss_fn(params, x, key):
        key, now = jax.random.split(key)
        drawn = jax.random.uniform(now, (x.shape[0],))
        return jnp.mean(x * params), ({"key": key}, drawn)

    with jax.set_mesh(mesh_of(AxisType.Auto)):
        tx = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data")
        state = put(
            State.create(apply_fn=None, params=jnp.ones(()), tx=tx, key=make(1))
        )
        step = State.train_step(loss_fn, mutable=("key",), has_aux=True, aux="concat")
        x = put(jnp.ones((8, 3)), "data")
        if make is jax.random.key:
            _, (_, drawn) = jax.jit(step)(state, x)
            assert len(np.unique(drawn)) == 8
        else:
            with pytest.warns(UserWarning, match=r"uint32\[2\].*jax.random.key"):
                jax.jit(step)(state, x)
