"""Groups of devices that each hold the parameters once (HSDP): replicas of shards.

`reduce_axis` names the replicas. XLA gathers and reduces within a group, in each call,
and the sums of the groups are added once in a window.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exchanges import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import distance

import accumax

EVERY, ROWS, LAYERS, WIDTH = 3, 16, 3, 64
SPECS = {"layers": P(None, "shard"), "last": P(None, "shard")}


def mesh_of():
    kinds = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((2, 2), ("replica", "shard"), kinds, devices=jax.devices()[:4])


def init():
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)

    return {"layers": leaf(LAYERS, WIDTH, WIDTH), "last": leaf(WIDTH, WIDTH)}


def loss_fn(params, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
    return jnp.mean((x @ params["last"]) ** 2)


def calls():
    rng = np.random.default_rng(1)
    return [rng.normal(size=(ROWS, WIDTH)).astype(np.float32) for _ in range(2 * EVERY)]


def put(tree, specs):
    mesh = jax.sharding.get_mesh()
    specs = jax.tree.broadcast(specs, tree, is_leaf=lambda x: isinstance(x, P))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put(tree, shardings)


def transformation(reduce_axis):
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2, eps=1e-3))
    return accumax.accumulate(inner, EVERY, reduce_axis=reduce_axis)


OVER = {
    "replicas": "replica",
    "and the optimizer divided": accumax.DataParallel("replica", shard_optimizer=True),
}


@pytest.mark.parametrize("over", OVER)
def test_a_window_of_groups_is_one_of_one_device(over):
    ends = []
    for reduce_axis in (None, OVER[over]):
        with jax.set_mesh(mesh_of()):
            tx = transformation(reduce_axis)
            params = put(init(), SPECS) if reduce_axis else init()
            state = tx.init(params)
            step = jax.jit(accumax.train_step(loss_fn, tx), donate_argnums=(0, 1))
            for x in calls():
                rows = put(x, P(("replica", "shard"))) if reduce_axis else x
                params, state, _ = step(params, state, rows)
            assert state.gradient_step == 2
            ends.append(params)
    assert distance(*ends) < 1e-6


@pytest.mark.parametrize("over", OVER)
def test_groups_exchange_gradients_once_and_only_where_the_window_closes(over):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        tx = transformation(OVER[over])
        params = put(init(), SPECS)
        state = tx.init(params)
        shards = {x.data.shape for x in state.acc_grads["layers"].addressable_shards}
        assert shards == {(1, LAYERS, WIDTH // 2, WIDTH)}
        step = jax.jit(accumax.train_step(loss_fn, tx), donate_argnums=(0, 1))
        rows = put(calls()[0], P(("replica", "shard")))
        found = collectives(step.lower(params, state, rows).compile().as_text())
    ids = mesh.device_ids
    within = {frozenset(group.tolist()) for group in ids}
    large = [x for x in found if x.bytes > 1024]
    across = [x for x in large if not x.groups <= within]
    unit = 4 * sum(x.size for x in jax.tree.leaves(params)) // 2  # of a device
    assert {x.place for x in across} == {"boundary"}
    if over == "replicas":
        assert sum(x.bytes * x.executions for x in across) == unit
    # Beside another axis, XLA:CPU scatters a sum that it has gathered over that axis.
    assert [x for x in large if x.place == "loop"]  # gathered layer by layer
