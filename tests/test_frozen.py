"""Parameters whose gradient the optimizer does not use: no accumulator, no backward."""

import functools

import equinox as eqx
import flax.linen
import forms
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
import zoo
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    SPECS,
    big_batch,
    data,
    distance,
    init,
    loss_fn,
    losses,
    weighted_loss_fn,
)
from test_compiled import compiled, memory

import accumax
import accumax.linen
import accumax.nnx

FROZEN = {"layer": True, "out": False, "scale": True}
ADAM = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05))


def partly(inner, frozen):
    labels = jax.tree.map(lambda x: "frozen" if x else "trained", frozen)
    return optax.partition({"trained": inner, "frozen": optax.set_to_zero()}, labels)


PARTLY = partly(ADAM, FROZEN)
WAYS = {
    "partition": PARTLY,
    "jitted": optax.GradientTransformation(PARTLY.init, jax.jit(PARTLY.update)),
    "with decay": optax.chain(PARTLY, optax.add_decayed_weights(-0.01)),
    "frozen after": optax.chain(
        optax.sgd(0.1), optax.masked(optax.set_to_zero(), FROZEN)
    ),
}


def test_there_are_sums_only_where_a_gradient_is_used():
    for inner in WAYS.values():
        sums = accumax.accumulate(inner, 2).init(init()).acc_grads
        assert [x.shape for x in jax.tree.leaves(sums)] == [(4, 2)]
    # The norm of all gradients, and moments, need all of them.
    for inner in (
        optax.chain(optax.clip_by_global_norm(1.0), PARTLY),
        optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), FROZEN)),
        optax.polyak_sgd(),  # which cannot be traced without a `value`
    ):
        sums = accumax.accumulate(inner, 2).init(init()).acc_grads
        assert len(jax.tree.leaves(sums)) == 4


def update(tx, params, state, batch):
    updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
    return optax.apply_updates(params, updates), state


def apply_gradients(tx, params, state, batch):
    return accumax.apply_gradients(tx, params, state, jax.grad(loss_fn)(params, batch))


def train_step(tx, params, state, batch, loss=loss_fn, **options):
    step = accumax.train_step(loss, tx, **options)
    return step(params, state, batch)[:2]


FORMS = {
    "update": update,
    "apply_gradients": apply_gradients,
    "train_step": train_step,
    "carried": functools.partial(train_step, in_place=False),
    "microbatches": functools.partial(train_step, microbatch_size=4),
    "weighted": functools.partial(train_step, loss=weighted_loss_fn, weighted=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_the_update_is_that_of_the_big_batch(nonfinite, way, form):
    tx = accumax.accumulate(WAYS[way], 3, nonfinite=nonfinite)
    step = jax.jit(functools.partial(FORMS[form], tx))
    params, state = init(), tx.init(init())
    batches = data(2)
    for batch in batches:
        for i in range(3):
            rows = jax.tree.map(lambda x, i=i: x[i::3], batch)
            params, state = step(params, state, rows)
    assert accumax.has_updated(state)
    assert distance(params, big_batch(WAYS[way], init(), batches)) < 1e-5
    if way != "with decay":
        assert distance(params["layer"], init()["layer"]) == 0


def test_a_frozen_parameter_is_not_differentiated():
    @jax.custom_vjp
    def once(w):
        return w

    def backward(_, cotangent):
        raise AssertionError("differentiated")

    once.defvjp(lambda w: (w, ()), backward)

    def loss(params, batch):
        return loss_fn(params | {"layer": jax.tree.map(once, params["layer"])}, batch)

    tx = accumax.accumulate(PARTLY, 2)
    for options in ({}, {"microbatch_size": 8}, {"in_place": False}):
        step = jax.jit(accumax.train_step(loss, tx, **options))
        step(init(), tx.init(init()), data(1)[0])
    with pytest.raises(AssertionError, match="differentiated"):
        jax.grad(loss)(init(), data(1)[0])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("how", ["per call", "per window", "layer by layer", "once"])
@pytest.mark.parametrize("way", ["partition", "equinox"])
def test_devices_have_frozen_parameters_sharded_or_whole(way, how, kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    fsdp = how in ("layer by layer", "once")
    batches, inner = data(2, rows=48), PARTLY if way == "partition" else ADAM
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s if fsdp else P())),
            init(),
            SPECS,
        )
        if fsdp:
            typed = kind == AxisType.Explicit
            axis = accumax.FSDP("data", None if typed else SPECS, once=how == "once")
        else:
            axis = "data"
        across = {"reduce_axis": axis} if how == "per window" else {}
        tx = accumax.accumulate(inner, 2, **across)
        if way == "equinox":  # a state made from a part says what is trained
            loss = functools.partial(of_module, of=loss_fn)
            params = Module(params)
            state = tx.init(eqx.filter(params, Module(FROZEN_EQX)))
        else:
            loss, state = loss_fn, tx.init(params)
        options = {"reduce_axis": axis, "microbatch_size": 8}
        if way == "equinox" and fsdp and axis.specs is not None:
            options["reduce_axis"] = accumax.FSDP(
                "data", Module(SPECS), once=how == "once"
            )
        step = jax.jit(accumax.train_step(loss, tx, **options))
        for batch in batches:
            for i in range(2):
                rows = jax.tree.map(lambda x, i=i: x[i::2], batch)
                rows = jax.device_put(rows, NamedSharding(mesh, P("data")))
                params, state, _ = step(params, state, rows)
    assert len(jax.tree.leaves(state.acc_grads)) == 1
    got = params.tree if way == "equinox" else params
    assert distance(got, big_batch(PARTLY, init(), batches)) < 1e-5
    if fsdp:
        assert got["layer"]["w"].sharding.spec[1] == "data"


class Module(eqx.Module):
    tree: dict


def of_module(module, batch, of):
    return of(module.tree, batch)


FROZEN_EQX = {
    "layer": {"w": False, "b": False},
    "out": [True, None],
    "scale": False,
}


def test_in_a_shard_map_of_ones_own_frozen_shards_are_gathered():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    tx = accumax.accumulate(PARTLY, 1)
    fsdp = accumax.FSDP("data", SPECS)
    step = accumax.train_step(loss_fn, tx, microbatch_size=2, reduce_axis=fsdp)
    batch = data(1, rows=48)[0]

    def whole(params, batch):
        # The optimizer sees shards, so that only what has no norm is the same.
        return step(params, tx.init(params), batch)[2]

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(whole, in_specs=(SPECS, P("data")), out_specs=P())
        loss = jax.jit(mapped)(init(), batch)
    assert abs(loss - loss_fn(init(), batch)) < 1e-5


@pytest.mark.parametrize("name", ["lora_unscanned", "lora"])
@pytest.mark.parametrize("form", [forms.APPLY_GRADIENTS, forms.TRAIN_STEP])
def test_low_ranks_over_a_frozen_base_take_the_memory_of_no_accumulation(form, name):
    (model,) = (m for m in zoo.models(1 / 4) if m.name == name)

    def of(form):
        step, init_state = forms.train_steps(model.loss, inner=model.inner)[form]
        return memory(compiled(step, init_state, model.params, model.x))

    assert of(form) <= 1.02 * of(forms.PLAIN)


def test_flax_states_have_no_sums_of_frozen_parameters():
    model = flax.linen.Sequential([flax.linen.Dense(3), flax.linen.Dense(2)])
    x = jnp.linspace(-1, 1, 24).reshape(8, 3)
    params = model.init(jax.random.key(0), x)["params"]
    inner = partly(optax.adam(0.1), {"layers_0": True, "layers_1": False})

    def loss(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    plain = train_state.TrainState.create(apply_fn=None, params=params, tx=inner)
    plain = plain.apply_gradients(grads=jax.grad(loss)(params, x))
    state = accumax.linen.TrainState.create(
        apply_fn=None, params=params, tx=accumax.accumulate(inner, 2)
    )
    step = jax.jit(accumax.linen.TrainState.train_step(loss))
    for rows in (x[:4], x[4:]):
        state, _ = step(state, rows)
    assert distance(state.params, plain.params) < 1e-6
    assert len(jax.tree.leaves(state.opt_state.acc_grads)) == 2


def test_an_nnx_optimizer_has_no_sums_of_frozen_parameters():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.last = nnx.Linear(4, 2, rngs=rngs)

    def loss(net, x):
        return jnp.mean(net.last(nnx.tanh(net.first(x))) ** 2)

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if "last" in str(path[0]) else "frozen", params
        )

    inner = optax.partition(
        {"trained": optax.adam(0.1), "frozen": optax.set_to_zero()}, labels
    )
    x = jnp.linspace(-1, 1, 24).reshape(8, 3)
    nets = [Net(nnx.Rngs(0)) for _ in range(2)]
    plain = nnx.Optimizer(nets[0], inner, wrt=nnx.Param)
    plain.update(nets[0], nnx.grad(loss)(nets[0], x))
    ours = accumax.nnx.Optimizer(nets[1], accumax.accumulate(inner, 2), wrt=nnx.Param)
    step = nnx.jit(accumax.nnx.train_step(loss))
    for rows in (x[:4], x[4:]):
        step(nets[1], ours, rows)
    states = [nnx.to_pure_dict(nnx.state(net, nnx.Param)) for net in nets]
    assert distance(*states) < 1e-6


def test_a_state_is_saved_and_restored(tmp_path):
    tx = accumax.accumulate(PARTLY, 3)
    step = jax.jit(functools.partial(train_step, tx))
    _, state = step(init(), tx.init(init()), data(1)[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(tx.init, init())
        restored = checkpointer.restore(tmp_path / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert distance(restored, state) == 0


def test_a_window_within_a_window_freezes_the_same():
    inner = accumax.accumulate(PARTLY, 2)
    tx = accumax.accumulate(inner, 2)
    params, state = init(), tx.init(init())
    assert len(jax.tree.leaves(state.acc_grads)) == 1
    (batch,) = data(1)
    for i in range(4):
        rows = jax.tree.map(lambda x, i=i: x[i::4], batch)
        params, state = update(tx, params, state, rows)
    assert distance(params, big_batch(PARTLY, init(), [batch])) < 1e-5


def test_a_state_with_sums_of_all_goes_on_with_them():
    # As version 0.1 made it.
    tx, (batch,) = accumax.accumulate(PARTLY, 2), data(1)
    state = tx.init(init())
    state = state._replace(acc_grads=jax.tree.map(jnp.zeros_like, init()))
    params = init()
    for i in range(2):
        rows = jax.tree.map(lambda x, i=i: x[i::2], batch)
        params, state = jax.jit(functools.partial(train_step, tx))(params, state, rows)
    assert len(jax.tree.leaves(state.acc_grads)) == 4
    assert distance(params, big_batch(PARTLY, init(), [batch])) < 1e-5


def test_nothing_is_trained():
    frozen = {"layer": True, "out": True, "scale": True}
    tx = accumax.accumulate(partly(ADAM, frozen), 2)
    params, state = jax.jit(functools.partial(train_step, tx))(
        init(), tx.init(init()), data(1)[0]
    )
    assert distance(params, init()) == 0
    assert not jax.tree.leaves(state.acc_grads)
    assert losses(params, data(1)[0]).shape == (24,)


def test_a_gradient_that_an_extra_argument_brings_into_use_is_an_error():
    def thawed(updates, state, params=None, *, thaw=None, **_):
        rate = 0.0 if thaw is None else -thaw
        return jax.tree.map(
            lambda g: jnp.zeros_like(g) if thaw is None else rate * g, updates
        ), state

    later = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), thawed)
    labels = {"layer": "later", "out": "now", "scale": "later"}
    inner = optax.partition({"now": optax.sgd(0.1), "later": later}, labels)
    tx, (batch,) = accumax.accumulate(inner, 1), data(1)
    grads = jax.grad(loss_fn)(init(), batch)
    state = tx.init(init())
    accumax.apply_gradients(tx, init(), state, grads)
    with pytest.raises(TypeError, match=r"uses the gradient\['layer'\]"):
        accumax.apply_gradients(tx, init(), state, grads, thaw=1.0)
    with pytest.raises(TypeError, match="acc_grads="):
        tx.update(grads, state, init(), thaw=1.0)
    state = state._replace(acc_grads=jax.tree.map(jnp.zeros_like, init()))
    params, _ = accumax.apply_gradients(tx, init(), state, grads, thaw=1.0)
    want = jax.tree.map(jnp.subtract, init()["layer"], grads["layer"])
    assert distance(params["layer"], want) < 1e-6


def test_optax_maps_over_the_parameters_in_a_state():
    tx = accumax.accumulate(PARTLY, 2)
    names = {"layer": {"w": "w", "b": "b"}, "out": ["o", None], "scale": "s"}
    named = optax.tree_utils.tree_map_params(
        tx,
        lambda x, name: name,
        tx.init(init()),
        names,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert named.acc_grads["out"][0] == "o"
