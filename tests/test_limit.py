"""`num_microbatches=`: the first microbatches of a call run, and the rest do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import data, distance, init, loss_fn, losses, weighted_loss_fn

import accumax

SIZE, BATCH = 4, data(1)[0]  # 24 rows
FORMS = {
    "mean": (loss_fn, {}),
    "the twin": (loss_fn, {"in_place": False}),
    "weighted": (weighted_loss_fn, {"weighted": True}),
    "sum": (lambda p, b: jnp.sum(losses(p, b)), {"reduction": "sum"}),
    "two losses": ((loss_fn, loss_fn), {}),
    "a tail": (loss_fn, {"microbatch_size": 5}),
}


def first(batch, rows):
    return jax.tree.map(lambda x: x[:rows], batch)


@pytest.mark.parametrize("case", FORMS)
def test_one_program_has_the_gradient_of_the_rows_that_ran(case):
    fun, options = FORMS[case]
    options = {"microbatch_size": SIZE} | options
    size = options["microbatch_size"]

    @jax.jit
    def limited(params, batch, n):
        f = accumax.value_and_grad(fun, num_microbatches=n, **options)
        return f(params, batch)

    # What no microbatch may read.
    rest = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), BATCH)
    for n in (1, 3, -(-24 // size)):
        rows = min(n * size, 24)
        batch = jax.tree.map(
            lambda x, y, rows=rows: jnp.concatenate([x[:rows], y[rows:]]), BATCH, rest
        )
        want = accumax.value_and_grad(fun, **options)(init(), first(BATCH, rows))
        assert distance(want, limited(init(), batch, n)) < 1e-5
    nothing = limited(init(), rest, 0)
    assert all((x == 0).all() for x in jax.tree.leaves(nothing))
    assert limited._cache_size() == 1


def test_what_does_not_run_is_not_computed():
    seen = []

    def loss(params, x):
        jax.debug.callback(lambda row: seen.append(int(row)), x[0, 0])
        return jnp.mean(x @ params)

    @jax.jit
    def f(w, x, n):
        return accumax.grad(loss, microbatches=6, num_microbatches=n)(w, x)

    x = jnp.broadcast_to(jnp.arange(12.0)[:, None], (12, 3))
    jax.block_until_ready(f(jnp.ones(3), x, 2))
    jax.effects_barrier()
    assert sorted(set(seen)) == [0, 2]


@pytest.mark.parametrize("aux", ["mean", "sum", "last", "stack", "concat"])
def test_the_aux_is_that_of_the_microbatches_that_ran(aux):
    def loss(params, batch):
        each = losses(params, batch)
        return jnp.mean(each), each if aux == "concat" else jnp.mean(each)

    @jax.jit
    def f(params, batch, n):
        options = {"microbatch_size": SIZE, "num_microbatches": n, "aux": aux}
        return accumax.value_and_grad(loss, has_aux=True, **options)(params, batch)

    (_, found), _ = f(init(), BATCH, 2)
    each = np.asarray(losses(init(), BATCH))
    parts = each[:8].reshape(2, 4).mean(1)
    want = {
        "mean": parts.mean(),
        "sum": parts.sum(),
        "last": parts[-1],
        "stack": np.pad(parts, (0, 4)),
        "concat": np.where(np.arange(24) < 8, each, 0),
    }[aux]
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_train_step_runs_as_many_and_a_call_of_none_has_no_weight(weighted):
    fun = weighted_loss_fn if weighted else loss_fn
    tx = accumax.accumulate(optax.adam(0.1, eps=1e-3), every=3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, n):
        options = {"microbatch_size": SIZE, "num_microbatches": n, "weighted": weighted}
        return accumax.train_step(fun, tx, **options)(params, state, batch)

    params, state = init(), tx.init(init())
    for n in (2, 0, 2):
        params, state, loss = step(params, state, BATCH, n)
        assert loss != 0 or n == 0
    assert state.gradient_step == 1
    plain = accumax.accumulate(optax.adam(0.1, eps=1e-3), every=1)
    want, _, _ = accumax.train_step(loss_fn, plain)(
        init(), plain.init(init()), first(BATCH, 8)
    )
    assert distance(want, params) < 1e-6


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_device_runs_the_first_of_its_own(kind):
    mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])

    @jax.jit
    def f(params, batch, n):
        options = {"microbatch_size": 2 * SIZE, "num_microbatches": n}
        return accumax.value_and_grad(loss_fn, reduce_axis="data", **options)(
            params, batch
        )

    with jax.set_mesh(mesh):
        rows = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
        found = f(jax.device_put(init(), NamedSharding(mesh, P())), rows, 2)
    ran = jax.tree.map(lambda x: jnp.concatenate([x[:8], x[12:20]]), BATCH)
    assert distance(jax.value_and_grad(loss_fn)(init(), ran), found) < 1e-6


@pytest.mark.parametrize(
    ("n", "options", "error", "words"),
    [
        (7, {}, ValueError, r"num_microbatches=7 must be from 0 to 6"),
        (-1, {}, ValueError, r"num_microbatches=-1 must be from 0 to 6"),
        (1.0, {}, TypeError, r"num_microbatches=1\.0 must be an integer"),
        (np.arange(2), {}, TypeError, r"of shape \(\)"),
        (2, {"unroll": True}, ValueError, "unroll"),
    ],
)
def test_a_number_that_cannot_be_is_an_error(n, options, error, words):
    f = accumax.value_and_grad(
        loss_fn, microbatch_size=SIZE, num_microbatches=n, **options
    )
    with pytest.raises(error, match=words):
        f(init(), BATCH)


def test_it_is_for_microbatches():
    tx = accumax.accumulate(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match="num_microbatches=2: for microbatches"):
        accumax.train_step(loss_fn, tx, num_microbatches=2)
