"""One promise, every way to call: the update of the big batch in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import (
    big_batch,
    cast,
    data,
    distance,
    init,
    loss_fn,
    microbatches,
    weighted_loss_fn,
)

import accumax

ROWS = 8  # of one microbatch
WINDOWS = (3, 3)
INNER = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.adamw(optax.linear_schedule(0.05, 0.01, 3), eps=1e-3, weight_decay=0.1),
)


def stacked(calls):
    return jax.tree.map(lambda *x: jnp.stack(x), *calls)


def by_update(tx, params, calls, wrap=jax.jit):
    @wrap
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in calls:
        params, state = step(params, state, batch)
    return params


def by_scan(tx, params, calls):
    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    scan = jax.jit(lambda carry, calls: jax.lax.scan(step, carry, calls)[0])
    return scan((params, tx.init(params)), stacked(calls))[0]


def by_vmap(tx, params, calls):
    """Two models side by side: one that is a call behind, and the one that counts."""
    behind = jax.tree.map(jnp.zeros_like, stacked([calls[0], *calls[:-1]]))
    ahead = stacked(calls)
    both = jax.tree.map(lambda *x: jnp.stack(x), behind, ahead)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    run = jax.vmap(functools.partial(scan_with, tx))
    return jax.tree.map(lambda x: x[1], run(twice, both))


def scan_with(tx, params, calls):
    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss_fn)(params, batch)
        weight = jnp.where(jnp.any(batch["x"] != 0), 1.0, 0.0)
        updates, state = tx.update(grads, state, params, weight=weight)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), calls)[0][0]


def by_apply_gradients(tx, params, calls):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        return accumax.apply_gradients(tx, params, state, grads)

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for batch in calls:
        params, state = step(params, state, batch)
    return params


def by_train_step(tx, params, calls, wrap=jax.jit, **options):
    options = {"loss_fn": loss_fn} | options
    step = wrap(accumax.train_step(options.pop("loss_fn"), tx, **options))
    state = tx.init(params)
    for batch in calls:
        params, state, _ = step(params, state, batch)
    return params


def by_train_step_donated(tx, params, calls):
    jit = functools.partial(jax.jit, donate_argnums=(0, 1))
    return by_train_step(tx, jax.tree.map(jnp.copy, params), calls, jit)


def by_train_step_scan(tx, params, calls):
    step = accumax.train_step(loss_fn, tx)

    def body(carry, batch):
        params, state, _ = step(*carry, batch)
        return (params, state), None

    scan = jax.jit(lambda carry, calls: jax.lax.scan(body, carry, calls)[0])
    return scan((params, tx.init(params)), stacked(calls))[0]


def by_train_step_vmap(tx, params, calls):
    step = jax.jit(jax.vmap(accumax.train_step(loss_fn, tx)))
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    state = jax.vmap(tx.init)(twice)
    for batch in calls:
        other = jax.tree.map(lambda x: 0.5 * x, batch)
        pair = jax.tree.map(lambda *x: jnp.stack(x), other, batch)
        twice, state, _ = step(twice, state, pair)
    return jax.tree.map(lambda x: x[1], twice)


def by_train_step_checkpointed(tx, params, calls):
    return by_train_step(tx, params, calls, loss_fn=jax.checkpoint(loss_fn))


def by_explicit_mesh(tx, params, calls, form="update"):
    """Rows over four devices, under a mesh whose shardings are part of the types."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        calls = jax.device_put(calls, NamedSharding(mesh, P("rows")))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        return {"update": by_update, "train_step": by_train_step}[form](
            tx, params, calls
        )


def by_shard_map(tx, params, calls):
    """The whole step on each of four devices, with values that differ in type."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    step = accumax.train_step(loss_fn, tx)

    def body(params, state, batch):
        one = jax.tree.map(lambda x: x[0], (params, state))
        out = step(*one, batch)[:2]
        return jax.tree.map(lambda x: x[None], out)

    many = jax.tree.map(lambda x: jnp.stack([x] * 4), params)
    state = jax.vmap(tx.init)(many)
    specs = {"in_specs": (P("model"), P("model"), P()), "out_specs": P("model")}
    run = jax.jit(jax.shard_map(body, mesh=mesh, **specs))
    for batch in calls:
        many, state = run(many, state, batch)
    return jax.tree.map(lambda x: x[3], many)


def by_chain(tx, params, calls):
    return by_update(optax.chain(optax.identity(), tx, optax.scale(1.0)), params, calls)


def by_masked(tx, params, calls):
    mask = {"layer": True, "out": False, "scale": True}
    rest = jax.tree.map(lambda m: not m, mask)
    # Clipping by the global norm must see all leaves, so both masks are of the
    # identity.
    around = [optax.masked(optax.identity(), m) for m in (mask, rest)]
    return by_update(
        optax.chain(around[0], optax.masked(tx, True), around[1]), params, calls
    )


def by_partition(tx, params, calls):
    labels = {"layer": "all", "out": "all", "scale": "all"}
    others = {"all": tx, "none": accumax.accumulate(optax.set_to_zero(), 2)}
    return by_update(optax.partition(others, labels), params, calls)


WAYS = {
    "eager": functools.partial(by_update, wrap=lambda f: f),
    "jit": by_update,
    "scan": by_scan,
    "vmap": by_vmap,
    "chain": by_chain,
    "masked": by_masked,
    "multi_transform": by_partition,
    "apply_gradients, donated": by_apply_gradients,
    "train_step": by_train_step,
    "train_step, eager": functools.partial(by_train_step, wrap=lambda f: f),
    "train_step, carried": functools.partial(by_train_step, in_place=False),
    "train_step, weighted": functools.partial(
        by_train_step, loss_fn=weighted_loss_fn, weighted=True
    ),
    "train_step, donated": by_train_step_donated,
    "train_step, scan": by_train_step_scan,
    "train_step, vmap": by_train_step_vmap,
    "train_step, checkpointed": by_train_step_checkpointed,
    "explicit mesh": by_explicit_mesh,
    "train_step, explicit mesh": functools.partial(by_explicit_mesh, form="train_step"),
    "train_step, shard_map": by_shard_map,
}
DTYPES = ["float32", "bfloat16", "float16"]


@functools.cache
def references(windows, dtype):
    """(the float64 big batch, how far from it one may end in `dtype`)."""
    params, batches, _ = problem(windows, dtype)
    return bound(params, batches, dtype)


def bound(params, batches, dtype):
    want = big_batch(INNER, params, batches)
    big = big_batch(INNER, params, batches, jnp.dtype(dtype))
    # Where rounding happens to cancel in the big batch: an ulp of the parameters each
    # step.
    size = max(np.abs(x).max() for x in jax.tree.leaves(want))
    ulp = float(jnp.finfo(dtype).eps) * size
    return want, 2 * distance(big, want) + len(batches) * ulp


def check(got, dtype, reference):
    """No farther from float64 than the big batch of `dtype` is, within 2 x."""
    want, limit = reference
    assert distance(got, want) <= limit
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}


def problem(windows, dtype):
    batches = [data(1, dtype, ROWS * k)[0] for k in windows]
    calls = [
        call
        for k, batch in zip(windows, batches, strict=True)
        for call in microbatches(batch, [ROWS] * k)
    ]
    return init(dtype), batches, calls


# Without jit each call compiles anew: once is enough. Of two half precisions the second
# is for a few ways.
PAIRS = [
    (way, dtype)
    for way in WAYS
    for dtype in DTYPES
    if (way in ("jit", "train_step", "train_step, weighted") or dtype != "float16")
    and ("eager" not in way or dtype == "bfloat16")
]


@pytest.mark.parametrize(("way", "dtype"), PAIRS)
def test_the_update_is_that_of_the_big_batch(way, dtype):
    params, _, calls = problem(WINDOWS, dtype)
    got = WAYS[way](accumax.accumulate(INNER, WINDOWS[0]), params, calls)
    check(got, dtype, references(WINDOWS, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
@pytest.mark.parametrize(
    "way", ["jit", "scan", "vmap", "train_step", "train_step, vmap"]
)
def test_the_policies_cost_no_accuracy(way, nonfinite):
    params, _, calls = problem(WINDOWS, "float32")
    got = WAYS[way](accumax.accumulate(INNER, 3, nonfinite=nonfinite), params, calls)
    check(got, "float32", references(WINDOWS, "float32"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        "jit",
        "scan",
        "vmap",
        "multi_transform",
        "apply_gradients, donated",
        "train_step",
        "train_step, scan",
        "train_step, vmap",
    ],
)
def test_windows_may_have_the_lengths_of_a_schedule(way):
    windows = (1, 3, 2)
    params, _, calls = problem(windows, "float32")
    lengths = jnp.array(windows)
    tx = accumax.accumulate(INNER, lambda step: lengths[jnp.minimum(step, 2)])
    check(WAYS[way](tx, params, calls), "float32", references(windows, "float32"))


def one_call(form, tx):
    """`(params, state, batch, rows) -> (params, state)`."""

    def update(params, state, batch, rows):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, weight=rows)
        return optax.apply_updates(params, updates), state

    def apply_gradients(params, state, batch, rows):
        grads = jax.grad(loss_fn)(params, batch)
        return accumax.apply_gradients(tx, params, state, grads, weight=rows)

    def train_step(params, state, batch, rows):
        step = accumax.train_step(loss_fn, tx)
        return step(params, state, batch, weight=rows)[:2]

    def weighted(params, state, batch, rows):
        del rows
        step = accumax.train_step(weighted_loss_fn, tx, weighted=True)
        return step(params, state, batch)[:2]

    forms = (update, apply_gradients, train_step, weighted)
    return jax.jit({f.__name__: f for f in forms}[form])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("update", "float16"),
        ("apply_gradients", "bfloat16"),
        ("apply_gradients", "float32"),
        ("train_step", "float32"),
        ("train_step", "float16"),
        ("weighted", "bfloat16"),
    ],
)
def test_uneven_microbatches_and_a_partial_window(form, dtype):
    params, batches = init(dtype), data(2, dtype)
    sizes = [[7, 1, 16], [7, 17]]  # 24 rows each, the second window one call short
    tx = accumax.accumulate(INNER, 3)
    got, state, step = params, tx.init(params), one_call(form, tx)
    for batch, split in zip(batches, sizes, strict=True):
        for part, rows in zip(microbatches(batch, split), split, strict=True):
            got, state = step(got, state, part, rows)
    assert state.mini_step == 2
    got, state = accumax.flush(tx, got, state)
    assert state.gradient_step == 2
    check(got, dtype, bound(params, batches, dtype))


def test_fifty_windows_stay_as_close_to_float64_as_the_big_batch_does():
    batches = data(50, rows=8 * 4)
    calls = [part for batch in batches for part in microbatches(batch, [4] * 8)]
    params = init()
    got = by_train_step(accumax.accumulate(INNER, 8), params, calls)
    want = big_batch(INNER, params, batches)
    big = big_batch(INNER, params, batches, jnp.float32)
    assert distance(got, want) <= 2 * distance(big, want)
    assert distance(cast(params, jnp.float32), want) > 0.1  # it has moved


def test_weights_of_zero_make_padding_microbatches_harmless():
    params, _, calls = problem((2,), "float32")
    padding = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), calls[0])
    tx = accumax.accumulate(INNER, 3)
    step = jax.jit(accumax.train_step(loss_fn, tx))
    got, state = params, tx.init(params)
    for batch, weight in [(padding, 0.0), (calls[0], 8.0), (calls[1], 8.0)]:
        got, state, _ = step(got, state, batch, weight=weight)
    check(got, "float32", references((2,), "float32"))
