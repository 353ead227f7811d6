"""`accumulate(offload_optimizer=True)`: the optimizer's state in host memory.

A CPU has such memory too, as a kind of its own, so the programs run here.
`benchmarks/offload.py` shows what a TPU saves.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import same_bits, slow_but

import accumax
from accumax._xla.jaxprs import inner_jaxprs

EVERY, WIDTH = 2, 256
OLD = jax.__version_info__ < (0, 10, 2)
INNERS = {
    "adamw, clipped": optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(1e-2, 0, 9))
    ),
    # The first parameter needs the state of all.
    "adam, clipped after": optax.chain(
        optax.scale_by_adam(), optax.clip_by_global_norm(0.5), optax.scale(-1e-2)
    ),
    "lion": optax.lion(1e-3),  # the update and the new moment both read the old one
    "adafactor": optax.adafactor(1e-2, momentum=0.9),
    "frozen": optax.multi_transform(
        {"on": optax.adam(1e-2), "off": optax.set_to_zero()},
        lambda params: {name: "off" if name == "a" else "on" for name in params},
    ),
}


def init():
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape) / 16, jnp.float32)

    return {name: leaf(WIDTH, WIDTH) for name in "abc"} | {"d": leaf(WIDTH)}


def loss_fn(params, x):
    for name in "abc":
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x + params["d"][None] - 1) ** 2)


def batches(count=5, rows=8):
    rng = np.random.default_rng(1)
    return [
        jnp.asarray(rng.normal(size=(rows, WIDTH)), jnp.float32) for _ in range(count)
    ]


def optax_step(tx):
    def step(params, state, x):
        grads = jax.grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, None

    return step


def fused_step(tx):
    def step(params, state, x):
        grads = jax.grad(loss_fn)(params, x)
        return *accumax.apply_gradients(tx, params, state, grads), None

    return step


FORMS = {
    "train_step": functools.partial(accumax.train_step, loss_fn),
    "apply_gradients": fused_step,
    "update": optax_step,
}


def trained(inner, form, offload, put=lambda x: x, jit=jax.jit, **options):
    """The parameters and the state after two windows and one that is flushed."""
    tx = accumax.accumulate(inner, EVERY, offload_optimizer=offload, **options)
    params = jax.tree.map(put, init())
    state = jit(tx.init)(params)
    step = jit(FORMS[form](tx))
    for x in batches():
        params, state, _ = step(params, state, x)
    return accumax.flush(tx, params, state)


def kinds(state):
    """The memory of each large array of the optimizer's state, and of all others."""
    leaves = jax.tree.leaves(state.inner_opt_state)
    large = {x.sharding.memory_kind for x in leaves if x.size >= WIDTH**2}
    others = jax.tree.leaves(state._replace(inner_opt_state=())) + [
        x for x in leaves if x.size < WIDTH**2
    ]
    return large, {x.sharding.memory_kind for x in others}


not_too_old = pytest.mark.skipif(OLD, reason="an error there, which is tested below")


@not_too_old
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inner", INNERS)
def test_the_update_is_the_same_to_the_bit(inner, form):
    params, state = trained(INNERS[inner], form, True)
    assert same_bits((params, state), trained(INNERS[inner], form, False))
    assert kinds(state) == ({"pinned_host"}, {"device"})


@not_too_old
def test_without_jit():
    def eager(fun):
        return fun

    got = trained(INNERS["lion"], "apply_gradients", True, jit=eager)
    assert kinds(got[1]) == ({"pinned_host"}, {"device"})
    assert same_bits(got, trained(INNERS["lion"], "apply_gradients", False, jit=eager))


def mesh():
    return jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])


AXES = {
    "automatic": None,
    "replicated": "data",
    "zero": accumax.DataParallel("data", shard_optimizer=True),
}


@not_too_old
@pytest.mark.parametrize("axis", slow_but(("replicated",), AXES))
def test_on_several_devices(axis):
    with jax.set_mesh(mesh()):
        spec = P("data") if axis == "automatic" else P()

        def put(x):
            return jax.device_put(x, NamedSharding(mesh(), spec))

        run = functools.partial(
            trained, INNERS["adamw, clipped"], "train_step", put=put
        )
        params, state = run(True, reduce_axis=AXES[axis])
        assert kinds(state) == ({"pinned_host"}, {"device"})
        assert same_bits((params, state), run(False, reduce_axis=AXES[axis]))
    moment = state.inner_opt_state[1][0].mu["b"]
    divided = axis != "replicated"
    assert moment.addressable_shards[0].data.shape[0] == WIDTH // (4 if divided else 1)


def eqns(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from eqns(inner)


def turns(inner):
    """How many arrays the step fetches from the host before each barrier."""
    tx = accumax.accumulate(inner, EVERY, offload_optimizer=True)
    params = init()
    args = params, tx.init(params), batches(1)[0]
    jaxpr = jax.make_jaxpr(accumax.train_step(loss_fn, tx))(*args).jaxpr
    found = [0]
    for eqn in eqns(jaxpr):
        if eqn.primitive.name == "optimization_barrier" and found != [0]:
            found.append(0)  # one before any fetch is of the backward pass
        elif eqn.primitive.name == "device_put":
            found[-1] += eqn.outvars[0].aval.memory_space == jax.memory.Space.Device
    return found


@not_too_old
def test_the_state_is_fetched_for_one_parameter_at_a_time():
    assert turns(INNERS["adamw, clipped"]) == [2, 2, 2]
    assert turns(INNERS["lion"]) == [1, 1, 1]
    assert turns(INNERS["frozen"]) == [2, 2]
    assert turns(INNERS["adam, clipped after"]) == [6]


@not_too_old
def test_the_optimizer_runs_once_in_a_window_and_its_effects_happen():
    calls = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return adam.update(updates, state, params)

    adam = optax.adam(1e-2)
    trained(optax.GradientTransformation(adam.init, update), "train_step", True)
    jax.effects_barrier()
    assert len(calls) == 3  # two windows, and one that is flushed


def test_where_it_does_not_work_an_error_says_so_before_anything_is_made(monkeypatch):
    tx = accumax.accumulate(optax.adam(1e-2), EVERY, offload_optimizer=True)
    if not OLD:
        with monkeypatch.context() as there:
            there.setattr(jax, "default_backend", lambda: "gpu")
            with pytest.raises(NotImplementedError, match="compile that for a GPU"):
                tx.init(init())
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
    with pytest.raises(NotImplementedError, match="Update JAX"):
        tx.init(init())


@not_too_old
def test_an_optimizer_that_takes_functions():
    def trained(offload):
        tx = accumax.accumulate(
            optax.lbfgs(memory_size=2),
            EVERY,
            averaged_args=("value",),
            offload_optimizer=offload,
        )
        whole = functools.partial(loss_fn, x=batches(1)[0])

        @jax.jit
        def step(params, state, x):
            value, grads = jax.value_and_grad(loss_fn)(params, x)
            extra = {"value": value, "grad": grads, "value_fn": whole}
            return accumax.apply_gradients(tx, params, state, grads, **extra)

        params = init()
        state = tx.init(params)
        for x in batches(EVERY):
            params, state = step(params, state, x)
        return params, state

    got = trained(True)
    assert kinds(got[1]) == ({"pinned_host"}, {"device"})
    assert same_bits(got, trained(False))


@not_too_old
@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_shard_map(check_vma):
    def trained(offload):
        tx = accumax.accumulate(
            INNERS["lion"], EVERY, reduce_axis="data", offload_optimizer=offload
        )
        params = init()
        state = jax.jit(tx.init)(params)

        def on_device(params, state, x):
            own = jax.lax.pcast(params, "data", to="varying")
            grads = jax.grad(loss_fn)(own, x)
            return accumax.apply_gradients(tx, params, state, grads)

        whole = jax.tree.map(lambda _: P(), state)
        whole = whole._replace(acc_grads=P("data"))
        step = jax.jit(
            jax.shard_map(
                on_device,
                in_specs=(P(), whole, P("data")),
                out_specs=(P(), whole),
                check_vma=check_vma,
            )
        )
        for x in batches(EVERY + 1):
            params, state = step(params, state, x)
        return params, state

    with jax.set_mesh(mesh()):
        got = trained(True)
        assert kinds(got[1]) == ({"pinned_host"}, {"device"})
        assert same_bits(got, trained(False))
