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
