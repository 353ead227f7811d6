"""`reduce_axis`: what devices have between them is what one device has of it all.

What is sent between them is counted in `test_collectives.py`, several processes are in
`test_processes.py`, and parameters that no device has whole in `test_gather.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    big_batch,
    cast,
    data,
    distance,
    init,
    loss_fn,
    losses,
    same_bits,
    weighted_loss_fn,
)

import accumax

ROWS, MICRO = 48, 8
BATCH = data(1, rows=ROWS)[0]
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
AXES = {"one axis": "data", "two axes": ("data", "model")}


def mesh_of(kind="auto", shape=(2, 2)):
    names = ("data", "model")[: len(shape)]
    return jax.make_mesh(
        shape,
        names,
        axis_types=(KINDS[kind],) * len(shape),
        devices=jax.devices()[: np.prod(shape)],
    )


def put(tree, spec=None):
    mesh = jax.sharding.get_mesh()
    return jax.device_put(tree, NamedSharding(mesh, spec or P()))


def some_count(params, batch):
    """Weights that differ by device, and are 0 on one of them."""
    counts = (batch["x"][:, 0] > 0) & (batch["place"] >= ROWS // 4)
    return jnp.sum(losses(params, batch) * counts), jnp.sum(counts)


def exact(params, batch):
    """Its gradient is of integers, and exact in every order."""
    return jnp.mean(batch["x"] @ params["w"] * batch["y"]) + jnp.sum(params["b"])


UNEVEN = BATCH | {"place": jnp.arange(ROWS)}
INTEGERS = {
    "x": jnp.asarray(np.random.default_rng(0).integers(-8, 9, (64, 4)), jnp.float32),
    "y": jnp.asarray(np.random.default_rng(1).integers(-8, 9, (64,)), jnp.float32),
}
WITHIN = {
    "mean": (loss_fn, {}),
    "the twin": (loss_fn, {"in_place": False}),
    "sum": (lambda p, b: jnp.sum(losses(p, b)), {"reduction": "sum"}),
    "weighted": (some_count, {"weighted": True}),
    "two losses": ((loss_fn, loss_fn), {}),
    "two weighted losses": ((some_count, weighted_loss_fn), {"weighted": True}),
    "unrolled": (loss_fn, {"unroll": True}),
    "a tail": (loss_fn, {"microbatch_size": 20}),
}


def whole(fun, params, batch):
    """Value and gradient of the whole batch in float64, without accumax."""
    with jax.enable_x64(True):
        params, batch = cast(params, jnp.float64), cast(batch, jnp.float64)

        def total(params):
            def one(f):
                out = f(params, batch)
                return out[0] / out[1] if isinstance(out, tuple) else out

            values = tuple(one(f) for f in (fun if isinstance(fun, tuple) else (fun,)))
            return sum(values), values

        grads, values = jax.grad(total, has_aux=True)(params)
        return jax.tree.map(np.asarray, (values, grads))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("case", WITHIN)
def test_devices_have_the_gradient_of_the_whole_batch(case, axes, kind):
    fun, options = WITHIN[case]
    options = {"microbatch_size": MICRO} | options
    with jax.set_mesh(mesh_of(kind)):
        f = accumax.value_and_grad(fun, reduce_axis=AXES[axes], **options)
        value, grads = jax.jit(f)(put(init()), put(UNEVEN, P(AXES[axes])))
    values, want = whole(fun, init(), UNEVEN)
    assert distance(value if isinstance(value, tuple) else (value,), values) < 1e-4
    assert distance(grads, want) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WITHIN)
def test_within_a_shard_map_of_ones_own_it_is_the_same(case, kind, checked):
    fun, options = WITHIN[case]
    options = {"microbatch_size": MICRO} | options
    options["microbatch_size"] //= 2  # a device's own rows
    f = accumax.value_and_grad(fun, reduce_axis="data", **options)
    with jax.set_mesh(mesh_of(kind)):
        mapped = jax.shard_map(
            f,
            in_specs=(P(), P("data")),
            out_specs=P(),
            axis_names={"data"},
            check_vma=checked,
        )
        value, grads = jax.jit(mapped)(put(init()), put(UNEVEN, P("data")))
    values, want = whole(fun, init(), UNEVEN)
    assert distance(value if isinstance(value, tuple) else (value,), values) < 1e-4
    assert distance(grads, want) < 1e-4


def test_integers_give_the_bits_of_one_device():
    params = {"w": jnp.zeros(4), "b": jnp.ones(3)}
    one = jax.jit(accumax.value_and_grad(exact, microbatch_size=16))(params, INTEGERS)
    with jax.set_mesh(mesh_of(shape=(4,))):
        f = accumax.value_and_grad(exact, microbatch_size=16, reduce_axis="data")
        many = jax.jit(f)(put(params), put(INTEGERS, P("data")))
    assert same_bits(one, many)
    assert np.any(np.asarray(many[1]["w"]))


@pytest.mark.parametrize("in_place", [True, False])
def test_integers_give_the_bits_of_one_device_across_calls(in_place):
    def end(reduce_axis, put=lambda x, spec=None: x):
        tx = accumax.accumulate(optax.sgd(0.5, 0.5), 2, reduce_axis=reduce_axis)
        step = accumax.train_step(exact, tx, microbatch_size=16, in_place=in_place)
        params = put({"w": jnp.zeros(4), "b": jnp.ones(3)})
        state, step = tx.init(params), jax.jit(step, donate_argnums=(0, 1))
        for i in range(5):  # two windows, and a part of the third
            rows = jax.tree.map(lambda x, i=i: x - i, INTEGERS)
            params, state, loss = step(params, state, put(rows, P("data")))
        return params, state, loss

    want, state, want_loss = end(None)
    with jax.set_mesh(mesh_of(shape=(4,))):
        params, apart, loss = end("data", put)
    assert same_bits((want, want_loss), (params, loss))
    sums = jax.tree.map(lambda a: np.asarray(a).sum(0), apart.acc_grads)
    assert jax.tree.all(jax.tree.map(np.array_equal, sums, state.acc_grads))
    assert same_bits(apart._replace(acc_grads=()), state._replace(acc_grads=()))


def test_a_loss_that_begins_a_scan_with_zeros_needs_no_change():
    def recurrent(params, batch):
        def step(h, x):
            return jnp.tanh(
                h @ params["layer"]["w"].T @ params["layer"]["w"] + x[:4]
            ), ()

        x = jnp.pad(batch["x"], ((0, 0), (0, 1)))
        return jnp.mean(jax.vmap(lambda x: lax.scan(step, jnp.zeros(4), x[None])[0])(x))

    with jax.set_mesh(mesh_of()):
        f = accumax.value_and_grad(recurrent, microbatch_size=MICRO, reduce_axis="data")
        value, grads = jax.jit(f)(put(init()), put(BATCH, P("data")))
    values, want = whole(recurrent, init(), BATCH)
    assert distance((value,), values) < 1e-5
    assert distance(grads, want) < 1e-5


@pytest.mark.parametrize("mean", [lax.pmean, lambda x, _: x], ids=["pmean", "own"])
def test_a_loss_may_use_the_axis_itself(mean):
    """As a batch normalisation does with axis_name="data"."""

    def normalised(params, batch):
        out = losses(params, batch)
        return jnp.mean((out - mean(jnp.mean(out), "data")) ** 2)

    def of_all(params, batch):
        out = losses(params, batch).reshape(2, -1)
        centre = jnp.mean(out) if mean is lax.pmean else jnp.mean(out, 1)[:, None]
        return jnp.mean((out - centre) ** 2)

    with jax.set_mesh(mesh_of()):
        f = accumax.value_and_grad(normalised, microbatches=1, reduce_axis="data")
        value, grads = jax.jit(f)(put(init()), put(BATCH, P("data")))
    values, want = whole(of_all, init(), BATCH)
    np.testing.assert_allclose(value, values[0], rtol=1e-6)
    assert distance(grads, want) < 1e-5 * max(map(np.max, jax.tree.leaves(want)))


def test_aux_is_that_of_all_devices():
    def fun(params, batch):
        each = losses(params, batch)
        flag = batch["place"][-1] == ROWS - 1
        key = jax.random.key(batch["place"][-1])
        aux = {"mean": jnp.mean(each), "sum": jnp.sum(each > 0), "concat": each}
        return jnp.mean(each), aux | {"stack": jnp.sum(each), "last": (flag, key)}

    how = {name: name for name in ("mean", "sum", "concat", "stack", "last")}
    with jax.set_mesh(mesh_of(shape=(4,))):
        f = accumax.value_and_grad(
            fun, has_aux=True, aux=how, microbatch_size=MICRO, reduce_axis="data"
        )
        (_, aux), _ = jax.jit(f)(put(init()), put(UNEVEN, P("data")))
    each = losses(init(), UNEVEN)
    np.testing.assert_allclose(aux["mean"], jnp.mean(each), rtol=1e-5)
    assert aux["sum"] == ROWS
    np.testing.assert_allclose(aux["concat"], each, rtol=1e-5)
    # Of device d its microbatch i: rows d * 12 + i and d * 12 + 6 + i.
    rows = each.reshape(4, 2, 6).sum(1).reshape(-1)
    np.testing.assert_allclose(aux["stack"], rows, rtol=1e-5)
    assert aux["last"][0]
    assert aux["last"][1] == jax.random.key(ROWS - 1)
    assert aux["concat"].sharding.spec == P("data")


@pytest.mark.parametrize("typed", [True, False])
def test_no_two_devices_or_microbatches_have_the_same_key(typed):
    def fun(params, batch, key):
        return loss_fn(params, batch), jax.random.uniform(key, (batch["x"].shape[0],))

    key = jax.random.key(0) if typed else jax.random.PRNGKey(0)
    with jax.set_mesh(mesh_of(shape=(4,))):
        f = accumax.value_and_grad(
            fun,
            has_aux=True,
            aux="concat",
            microbatch_size=MICRO,
            rng_argnums=2,
            reduce_axis="data",
        )
        (_, drawn), _ = jax.jit(f)(put(init()), put(BATCH, P("data")), put(key))
    assert len(np.unique(drawn)) == ROWS


ACROSS = {
    "mean": (loss_fn, {}, {}),
    "divided": (loss_fn, {"microbatch_size": MICRO}, {}),
    "weighted": (some_count, {"weighted": True, "microbatch_size": MICRO}, {}),
    "the twin": (loss_fn, {"in_place": False}, {}),
    "skip": (loss_fn, {}, {"nonfinite": "skip"}),
    "drop": (some_count, {"weighted": True}, {"nonfinite": "drop"}),
}


def trained(step, tx, params, state, calls):
    """After all calls and a flush: parameters, last loss and state."""
    step, loss = jax.jit(step, donate_argnums=(0, 1)), None
    for batch in calls:
        params, state, loss = step(params, state, batch)
    params, state = jax.jit(functools.partial(accumax.flush, tx))(params, state)
    return params, loss, state._replace(acc_grads=())


def calls_of(options):
    calls = [b | {"place": jnp.arange(ROWS)} for b in data(6, rows=ROWS)]
    if "nonfinite" in options:  # on one device alone
        calls[2] = calls[2] | {"x": calls[2]["x"].at[ROWS - 1].set(np.nan)}
    return calls


@functools.cache
def on_one(case):
    fun, options, policy = ACROSS[case]
    tx = accumax.accumulate(optax.adamw(1e-2), 4, **policy)
    params = init()
    step = accumax.train_step(fun, tx, **options)
    return trained(step, tx, params, tx.init(params), calls_of(policy))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart", [True, False], ids=["apart", "together"])
@pytest.mark.parametrize("case", ACROSS)
def test_a_window_of_devices_is_one_of_one_device(case, apart, kind):
    fun, options, policy = ACROSS[case]
    with jax.set_mesh(mesh_of(kind)):
        over = {"reduce_axis": "data"}
        policy = policy | (over if apart else {})
        tx = accumax.accumulate(optax.adamw(1e-2), 4, **policy)
        step = accumax.train_step(fun, tx, **options, **({} if apart else over))
        params = put(init())
        calls = [put(b, P("data")) for b in calls_of(policy)]
        many = trained(step, tx, params, tx.init(params), calls)
    assert distance(on_one(case), many) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("apart", [True, False], ids=["apart", "together"])
def test_a_window_in_a_shard_map_of_ones_own(apart):
    fun, options, _ = ACROSS["weighted"]
    with jax.set_mesh(mesh_of()):
        over = {"reduce_axis": "data"}
        tx = accumax.accumulate(optax.adamw(1e-2), 4, **(over if apart else {}))
        params = put(init())
        state = tx.init(params)
        specs = jax.tree.map(lambda _: P(), state)
        specs = specs._replace(acc_grads=P("data") if apart else P())
        step = jax.shard_map(
            accumax.train_step(fun, tx, **options | {"microbatch_size": 4}, **over),
            in_specs=(P(), specs, P("data")),
            out_specs=(P(), specs, P()),
            axis_names={"data"},
        )
        calls = [put(b, P("data")) for b in calls_of({})]
        many = trained(step, tx, params, state, calls)
    assert distance(on_one("weighted"), many) < 2e-6


@pytest.mark.parametrize("form", ["update", "apply_gradients"])
def test_gradients_of_ones_own_shard_map_are_weighed_by_device(form):
    def weighed(params, batch):
        total, count = some_count(params, batch)
        return total / jnp.maximum(count, 1), count

    def step(tx, params, state, batch):
        mine = lax.pcast(params, "data", to="varying")
        (_, weight), grads = jax.value_and_grad(weighed, has_aux=True)(mine, batch)
        if form == "apply_gradients":
            return accumax.apply_gradients(tx, params, state, grads, weight=weight)
        updates, state = tx.update(grads, state, params, weight=weight)
        return optax.apply_updates(params, updates), state

    calls = calls_of({})
    with jax.set_mesh(mesh_of()):
        tx = accumax.accumulate(optax.sgd(0.1), 3, reduce_axis="data")
        params = put(init())
        state = tx.init(params)
        specs = jax.tree.map(lambda _: P(), state)._replace(acc_grads=P("data"))
        mapped = jax.shard_map(
            functools.partial(step, tx),
            in_specs=(P(), specs, P("data")),
            out_specs=(P(), specs),
            axis_names={"data"},
        )
        for batch in calls:
            params, state = jax.jit(mapped)(params, state, put(batch, P("data")))

    def of_window(params, batch):
        total, count = some_count(params, batch)
        return total / count

    windows = [
        jax.tree.map(lambda *x: jnp.concatenate(x), *calls[i : i + 3]) for i in (0, 3)
    ]
    want = big_batch(optax.sgd(0.1), init(), windows, loss=of_window)
    assert distance(params, want) < 1e-5
    assert state.gradient_step == 2


def test_each_device_holds_its_own_sums_and_they_stay_there():
    with jax.set_mesh(mesh_of()):
        tx = accumax.accumulate(optax.adamw(1e-2), 4, reduce_axis="data")
        params = put(init())
        params["layer"]["w"] = put(params["layer"]["w"], P(None, "model"))
        state = tx.init(params)
        w = state.acc_grads["layer"]["w"]
        assert w.shape == (2, 3, 4)
        assert w.sharding.spec == P("data", None, "model")
        assert {s.data.shape for s in w.addressable_shards} == {(1, 3, 2)}
        assert jax.jit(tx.init)(params).acc_grads["out"][0].sharding.spec == P("data")
        step = jax.jit(accumax.train_step(loss_fn, tx), donate_argnums=(0, 1))
        for batch in data(2, rows=ROWS):
            params, state, _ = step(params, state, put(batch, P("data")))
        own = np.asarray(state.acc_grads["scale"])
    assert state.acc_grads["layer"]["w"].sharding.spec[0] == "data"
    halves = [
        sum(
            jax.grad(loss_fn)(init(), jax.tree.map(part, b))["scale"] / 2
            for b in data(2, rows=ROWS)
        )
        for part in (lambda x: x[: ROWS // 2], lambda x: x[ROWS // 2 :])
    ]
    np.testing.assert_allclose(own, halves, rtol=1e-5)


def test_an_explicit_mesh_is_not_only_for_reduce_axis():
    """Rows over an axis that is part of the types, and no reduce_axis."""

    def embedded(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["layer"]["w"])
        return hidden @ params["out"][0]

    def coupled(params, batch):
        embed = accumax.microbatch(embedded, microbatch_size=MICRO)
        return jnp.mean(jnp.mean(embed(params, batch), 0) ** 2)

    def direct(params, batch):
        return jnp.mean(jnp.mean(embedded(params, batch), 0) ** 2)

    def with_aux(params, batch):
        each = losses(params, batch)
        return jnp.mean(each), (each, batch["x"])

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    rows = NamedSharding(mesh, P("data"))
    params = jax.device_put(init(), NamedSharding(mesh, P()))
    batch = jax.device_put(BATCH, rows)
    grads = jax.jit(jax.grad(coupled))(params, batch)  # and without jax.set_mesh
    assert distance(grads, whole(direct, init(), BATCH)[1]) < 1e-5
    f = accumax.value_and_grad(
        with_aux, has_aux=True, microbatch_size=MICRO, aux=("concat", "stack")
    )
    with jax.set_mesh(mesh):
        (_, (each, x)), _ = jax.jit(f)(params, batch)
    np.testing.assert_allclose(each, losses(init(), BATCH), rtol=1e-5)
    assert x.shape == (6, 8, 3)
    with pytest.raises(ValueError, match=r"48 rows.*microbatch_size=20.*reduce_axis"):
        jax.jit(accumax.grad(loss_fn, microbatch_size=20))(params, batch)


def bad(match, error=ValueError):
    return pytest.raises(error, match=match)


def test_what_the_devices_do_not_divide_is_an_error_with_the_numbers():
    with jax.set_mesh(mesh_of(shape=(4,))):
        make = functools.partial(accumax.value_and_grad, loss_fn, reduce_axis="data")
        with bad(r"46 rows.* 4 devices along reduce_axis=\('data',\) do not divide"):
            make(microbatch_size=8)(init(), jax.tree.map(lambda x: x[:46], BATCH))
        with bad(r"48 rows.* 4 devices.*microbatches=5, that is 20, do not divide"):
            make(microbatches=5)(init(), BATCH)
        for size in (2, 6):  # fewer than there are devices, and not a multiple
            with bad(rf"microbatch_size={size} .*4 devices.*multiple of 4"):
                make(microbatch_size=size)(init(), BATCH)
        tx = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data")
        with bad(r"46 rows.* 4 devices"):
            rows = jax.tree.map(lambda x: x[:46], BATCH)
            accumax.train_step(loss_fn, tx)(init(), tx.init(init()), rows)


def test_a_mesh_that_is_missing_or_lacks_the_axis_is_an_error():
    f = accumax.value_and_grad(loss_fn, microbatch_size=8, reduce_axis="data")
    with bad(r"no mesh.*jax.set_mesh\(mesh\), or pass accumax"):
        f(init(), BATCH)
    with bad(r"no mesh"):
        accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data").init(init())
    wrong = functools.partial(accumax.grad, loss_fn, microbatch_size=8)
    with jax.set_mesh(mesh_of()), bad(r"no axis 'rows': its axes are .*'data': 2"):
        wrong(reduce_axis="rows")(init(), BATCH)
    with bad(r"no axis 'rows'"):
        wrong(reduce_axis=accumax.DataParallel("rows", mesh=mesh_of()))
    with bad("names an axis twice"):
        wrong(reduce_axis=("data", "data"))
    with bad("must be the name of a mesh axis", TypeError):
        wrong(reduce_axis=1)
    with bad("must be a jax.sharding.Mesh", TypeError):
        accumax.DataParallel("data", mesh=4)
    tx = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data")
    with bad(r"reduce_axis=\('model',\), where the accumulate has .*\('data',\)"):
        accumax.train_step(loss_fn, tx, reduce_axis="model")


def test_mesh_may_be_passed_instead_of_set():
    mesh = mesh_of()
    devices = accumax.DataParallel("data", mesh=mesh)
    f = accumax.value_and_grad(loss_fn, microbatch_size=8, reduce_axis=devices)
    assert distance(f(init(), BATCH)[1], whole(loss_fn, init(), BATCH)[1]) < 1e-4
    tx = accumax.accumulate(optax.sgd(0.1), 1, reduce_axis=devices)
    params, _, _ = accumax.train_step(loss_fn, tx)(init(), tx.init(init()), BATCH)
    assert distance(params, big_batch(optax.sgd(0.1), init(), [BATCH])) < 1e-4


def test_what_was_reduced_before_is_an_error_and_no_factor():
    tx = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data")

    def by_jax(params, state, batch):
        # With respect to parameters that are the same everywhere, JAX reduces.
        grads = jax.grad(loss_fn)(params, batch)
        return accumax.apply_gradients(tx, params, state, grads)

    def by_hand(params, state, batch):
        def reduced(params, batch):
            return lax.pmean(loss_fn(params, batch), "data")

        f = accumax.grad(reduced, microbatch_size=4, reduce_axis="data")
        return f(params, batch), state

    with jax.set_mesh(mesh_of()):
        state = tx.init(put(init()))
        specs = jax.tree.map(lambda _: P(), state)._replace(acc_grads=P("data"))
        for step, what in ((by_jax, r"grads\['layer'\]\['b'\]"), (by_hand, "The loss")):
            mapped = jax.shard_map(
                step, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)
            )
            with bad(rf"{what} is the same on all devices of 'data'.*2 times"):
                jax.jit(mapped)(put(init()), state, put(BATCH, P("data")))
        grads = jax.grad(loss_fn)(init(), BATCH)
        for form in (
            lambda: tx.update(grads, state),
            lambda: accumax.apply_gradients(tx, init(), state, grads),
        ):
            with bad("outside of a jax.shard_map", TypeError):
                form()


def test_a_state_of_other_devices_is_an_error():
    with jax.set_mesh(mesh_of(shape=(4,))):
        four = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data").init(init())
    with jax.set_mesh(mesh_of(shape=(2,))):
        tx = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data")
        with bad(r"state.acc_grads\['layer'\]\['b'\] has shape \(4, 4\).*axis of 2"):
            accumax.train_step(loss_fn, tx)(init(), four, BATCH)
        plain = accumax.accumulate(optax.sgd(0.1), 2)
        with bad(r"expected a first axis of 2"):
            accumax.train_step(loss_fn, tx)(init(), plain.init(init()), BATCH)


def test_shards_over_the_axis_are_an_error_without_gather():
    with jax.set_mesh(mesh_of()):
        params = put(init())
        params["layer"]["w"] = put(params["layer"]["w"], P(None, "data"))
        tx = accumax.accumulate(optax.sgd(0.1), 2, reduce_axis="data")
        with bad(r"\['layer'\]\['w'\] is sharded by .*reduce_axis=.*FSDP"):
            tx.init(params)
        with bad(r"\['layer'\]\['w'\] is sharded by .*reduce_axis=.*FSDP"):
            accumax.grad(loss_fn, microbatch_size=8, reduce_axis="data")(params, BATCH)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_device_without_weight_takes_part_in_what_the_loss_exchanges(in_place):
    """Else it leaves out a backward pass in which the others wait for it."""

    def fun(params, batch, mean):
        out = losses(params, batch)
        counts = batch["place"] >= ROWS // 2
        centred = (out - mean(jnp.mean(out))) / 100
        return jnp.sum(centred**2 * counts), jnp.sum(counts)

    def normalised(params, batch):
        return fun(params, batch, lambda x: lax.pmean(x, "data"))

    with jax.set_mesh(mesh_of()):
        f = accumax.value_and_grad(
            normalised,
            microbatches=1,
            weighted=True,
            reduce_axis="data",
            in_place=in_place,
        )
        value, grads = jax.jit(f)(put(init()), put(UNEVEN, P("data")))
    values, want = whole(functools.partial(fun, mean=lambda x: x), init(), UNEVEN)
    assert distance((value,), values) < 1e-6
    assert distance(grads, want) < 1e-5


def test_nor_in_what_xla_lets_devices_exchange_along_another_axis():
    """Shifted columns of a matrix that is sharded over them: XLA permutes."""

    def fun(params, batch):
        counts = batch["place"] >= ROWS // 2
        hidden = jnp.roll(jnp.tanh(batch["x"] @ params["w"]), 1, axis=1)
        out = jnp.sum(jnp.tanh(hidden @ params["v"]), 1)
        return jnp.sum((out - 1) ** 2 * counts), jnp.sum(counts)

    chance = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(chance.normal(size=(3, 8)), jnp.float32),
        "v": jnp.asarray(chance.normal(size=(8, 8)), jnp.float32),
    }
    with jax.set_mesh(mesh_of()):
        f = accumax.value_and_grad(
            fun, microbatch_size=MICRO, weighted=True, reduce_axis="data"
        )
        placed = {
            "w": put(params["w"], P(None, "model")),
            "v": put(params["v"], P("model")),
        }
        value, grads = jax.jit(f)(placed, put(UNEVEN, P("data")))
    values, want = whole(fun, params, UNEVEN)
    assert distance((value,), values) < 1e-5
    assert distance(grads, want) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_that_are_no_float_arrays_ride_along(kind):
    def fun(params, batch):
        return loss_fn(params["net"], batch) * params["times"]

    with jax.set_mesh(mesh_of(kind)):
        params = {"net": put(init()), "i": put(jnp.arange(3)), "times": 2.0}
        f = accumax.grad(fun, microbatch_size=MICRO, reduce_axis="data")
        grads = f(params, put(BATCH, P("data")))
        tx = accumax.accumulate(optax.sgd(0.1), 1, reduce_axis="data")
        step = jax.jit(accumax.train_step(fun, tx))
        new, _, _ = step(params, tx.init(params), put(BATCH, P("data")))
    assert grads["i"] is None
    _, want = whole(loss_fn, init(), BATCH)
    double = jax.tree.map(lambda g: 2 * g, want)
    assert distance(grads["net"], double) < 1e-4
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, init(), double)
    assert distance(new["net"], stepped) < 1e-4
    assert same_bits(new["i"], jnp.arange(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_map_over_another_axis_may_be_around_it(kind):
    def fun(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["w"])
        return jnp.mean((lax.psum(hidden @ params["v"], "model") - 1) ** 2)

    def direct(params, batch):
        return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - 1) ** 2)

    chance = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(chance.normal(size=(3, 4)), jnp.float32),
        "v": jnp.asarray(chance.normal(size=4), jnp.float32),
    }
    specs = {"w": P(None, "model"), "v": P("model")}
    with jax.set_mesh(mesh_of(kind)):
        f = accumax.value_and_grad(fun, microbatch_size=MICRO, reduce_axis="data")
        mapped = jax.shard_map(
            f, in_specs=(specs, P()), out_specs=(P(), specs), axis_names={"model"}
        )
        placed = {name: put(params[name], specs[name]) for name in specs}
        value, grads = jax.jit(mapped)(placed, put(BATCH, P("data")))
    values, want = whole(direct, params, BATCH)
    assert distance((value,), values) < 1e-5
    assert distance(grads, want) < 1e-5


def test_an_axis_of_one_device_has_everything():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = put(init())
        params["layer"]["w"] = put(params["layer"]["w"], P("data"))
        f = accumax.grad(loss_fn, microbatch_size=MICRO, reduce_axis="data")
        grads = jax.jit(f)(params, put(BATCH, P("data")))
    assert distance(grads, whole(loss_fn, init(), BATCH)[1]) < 1e-4


@pytest.mark.parametrize("checked", [True, False])
def test_the_weight_of_a_call_is_that_of_all_devices(checked):
    tx = accumax.accumulate(optax.sgd(0.1), 1, reduce_axis="data")
    run = accumax.train_step(loss_fn, tx)

    def step(params, state, batch):
        own = jnp.sum(batch["place"] > ROWS // 4).astype(float)  # 23 and 12
        return run(params, state, batch, weight=own)

    with jax.set_mesh(mesh_of()):
        state = tx.init(put(init()))
        specs = jax.tree.map(lambda _: P(), state)._replace(acc_grads=P("data"))
        mapped = jax.shard_map(
            step,
            in_specs=(P(), specs, P("data")),
            out_specs=(P(), specs, P()),
            check_vma=checked,
        )
        mapped, args = jax.jit(mapped), (put(init()), state, put(UNEVEN, P("data")))
        if checked:
            with bad(r"weight may differ by device.*weighted=True"):
                mapped(*args)
            return
        params, _, _ = mapped(*args)
    for leaf in jax.tree.leaves(params):  # they stay together, whatever it means
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all(np.array_equal(copies[0], x) for x in copies)


@pytest.mark.parametrize("how", ["mean", "sum", "last", "stack", "concat"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduce_axis", [None, "data"])
def test_an_aux_may_be_sharded_over_another_explicit_axis(how, weighted, reduce_axis):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def fun(w, x):
        y = x @ w  # (rows, 4), its columns over "model"
        aux = y if how == "concat" else jnp.sum(y, 0)
        loss = jnp.sum(y**2), jnp.float32(len(x))
        return (loss if weighted else loss[0] / loss[1]), aux

    w = jnp.arange(12.0).reshape(3, 4) / 12
    x = jnp.arange(24.0).reshape(8, 3) / 24
    f = accumax.value_and_grad(
        fun,
        has_aux=True,
        weighted=weighted,
        microbatches=2,
        aux=how,
        reduce_axis=reduce_axis,
    )
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(w, NamedSharding(mesh, P(None, "model"))),
            jax.device_put(x, NamedSharding(mesh, P("data"))),
        )
        (_, aux), grads = jax.jit(f)(*placed)
    (_, want), want_grads = f_on_one(fun, weighted, how, w, x, reduce_axis)
    np.testing.assert_allclose(aux, want, rtol=1e-5)
    np.testing.assert_allclose(grads, want_grads, rtol=1e-5)


def f_on_one(fun, weighted, how, w, x, reduce_axis):
    """The same microbatches, by hand: those of one device after those of another."""
    devices = 1 if reduce_axis is None else 2
    rows = x.reshape(devices, -1, 2, 3)  # (device, row, microbatch, ...)
    parts = [rows[d, :, i] for d in range(devices) for i in range(2)]
    auxs = [fun(w, part)[1] for part in parts]
    aux = {
        "mean": lambda: sum(auxs) / len(auxs),
        "sum": lambda: sum(auxs),
        "last": lambda: auxs[-1],
        "stack": lambda: jnp.stack(auxs),
        "concat": lambda: x @ w,
    }[how]()
    grads = jax.grad(lambda w: jnp.sum((x @ w) ** 2) / len(x))(w)
    return (None, aux), grads


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("microbatches", [None, 2])
@pytest.mark.parametrize("in_place", [True, False])
def test_parameters_on_no_mesh_learn_from_rows_on_an_explicit_one(
    weighted, microbatches, in_place
):
    """Element-wise: a product along explicit axes must name its own sharding."""

    def fun(w, x):
        loss = jnp.sum(jnp.tanh(w["scale"] * x + w["shift"]) ** 2)
        return (loss, jnp.float32(len(x))) if weighted else loss / len(x)

    def mean(w, x):
        return jnp.sum(jnp.tanh(w["scale"] * x + w["shift"]) ** 2) / len(x)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    x = jnp.linspace(-1, 1, 48).reshape(16, 3)
    begun = {"scale": jnp.arange(3.0)[None], "shift": jnp.float32(0.5)}
    tx = accumax.accumulate(optax.sgd(1.0), 2)
    step = jax.jit(
        accumax.train_step(
            fun, tx, weighted=weighted, microbatches=microbatches, in_place=in_place
        )
    )
    params, state = begun, tx.init(begun)
    for _ in range(2):
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        params, state, _ = step(params, state, rows)
    got = jax.tree.map(lambda p, q: p - q, begun, params)
    assert distance(got, jax.grad(mean)(begun, x)) < 1e-5


@pytest.mark.parametrize(
    ("kinds", "axis"),
    [("ae", "data"), ("ae", ("data", "model")), ("ea", ("data", "model"))],
)
def test_an_automatic_reduce_axis_beside_an_explicit_axis_is_an_error(kinds, axis):
    types = {"a": AxisType.Auto, "e": AxisType.Explicit}
    mesh = jax.make_mesh((2, 2), ("data", "model"), tuple(types[k] for k in kinds))
    grad_fn = accumax.grad(
        lambda w, x: jnp.mean(x @ w), microbatches=2, reduce_axis=axis
    )
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"reduce_axis=.*explicit axes .*Auto"):
            jax.jit(grad_fn)(jnp.ones(3), jnp.ones((8, 3)))
        if kinds == "ea":  # the explicit one alone
            grad_fn = accumax.grad(
                lambda w, x: jnp.mean(x @ w), microbatches=2, reduce_axis="data"
            )
            x = jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("data")))
            assert jnp.allclose(jax.jit(grad_fn)(jnp.ones(3), x), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{"microbatch_size": 4}, {"microbatch_size": 5, "unroll": True}],
    ids=["tail", "unrolled"],
)
def test_a_tail_gathers_no_parameter_that_is_divided(options, kind):
    """The next microbatch waits for a number of the sums, not for all of them."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (KINDS[kind],) * 2)
    x = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)

    def loss(w, x):
        return jnp.mean(jnp.sum(x @ w, -1) ** 2)

    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((6, 8)), NamedSharding(mesh, P(None, "model")))
        f = jax.jit(accumax.grad(loss, **options))
        np.testing.assert_allclose(f(w, x), jax.grad(loss)(w, x), rtol=1e-5)
        found = accumax.audit(f, w, x).collectives
        assert all(c.bytes < 6 * 8 * 4 for c in found if "gather" in c.op)


def forgetful(reduce_axis, **options):
    """A step in which each device should have its rows of two arguments."""
    if isinstance(reduce_axis, accumax.FSDP):
        return accumax.value_and_grad(masked_sum, reduce_axis=reduce_axis, **options)
    tx = accumax.accumulate(optax.sgd(1.0), 1, reduce_axis=reduce_axis)
    step = accumax.train_step(masked_sum, tx, **options)
    return lambda w, x, m: step(w, tx.init(w), x, m)[2:]


def masked_sum(w, x, m):
    return jnp.sum((x @ w) ** 2), jnp.sum(m)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["data", accumax.FSDP("data", specs=P("data"))])
@pytest.mark.parametrize("rows", [4, 8])
def test_rows_that_every_device_would_have_whole_are_warned_of(kind, axis, rows):
    with jax.set_mesh(mesh_of(kind, (4,))):
        w, x, m = put(jnp.ones(4)), jnp.ones((rows, 4)), jnp.ones(rows)
        options = {"microbatches": 1, "weighted": True}
        with pytest.warns(UserWarning, match=r"float32\[\d\].*batch_argnums=\(1, 2\)"):
            jax.jit(forgetful(axis, **options))(w, x, m)
        options["batch_argnums"] = 1, 2
        value, *_ = jax.jit(forgetful(axis, **options))(w, x, m)
        assert value == 16  # warnings are errors here
        # As many numbers as a device has rows are no rows.
        fewer = {"batch_argnums": 1}
        jax.jit(forgetful(axis, **(options | fewer)))(w, x, jnp.ones(rows // 4))
