"""`value_and_grad` and `grad` against the big batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from problems import (
    ROWS,
    cast,
    data,
    distance,
    init,
    loss_fn,
    losses,
    microbatches,
    same_bits,
    weighted_loss_fn,
)

import accumax

(BATCH,) = data(1)
# 24 rows: equal parts, a smaller last one, one part, fewer rows than a microbatch.
SIZES = [{"microbatch_size": n} for n in (4, 7, 24, 100)] + [{"microbatches": 3}]
BOTH = pytest.mark.parametrize("in_place", [True, False])


def exact(fun=loss_fn, params=None, batch=None, **options):
    """Value and gradient of the whole batch in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        params, batch = (
            cast(init() if params is None else params, jnp.float64),
            cast(BATCH if batch is None else batch, jnp.float64),
        )
        out = jax.jit(jax.value_and_grad(fun, **options))(params, batch)
        return jax.tree.map(np.asarray, out)


def tokens_loss(params, batch):
    """A mean over the rows that are not padding: (loss_sum, weight)."""
    each = jnp.where(batch["mask"], losses(params, batch), 0)
    return jnp.sum(each), jnp.sum(batch["mask"])


def masked(counts=(3, 0, 4, 1, 4, 0)):
    """The batch, of which microbatch i of 4 rows has `counts[i]` real ones."""
    mask = np.arange(4)[:, None] < np.array(counts)[None]  # rows are dealt out in turn
    return BATCH | {"mask": jnp.asarray(mask.reshape(-1))}


@BOTH
@pytest.mark.rounding
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_value_and_gradient_are_those_of_the_big_batch(size, dtype, in_place):
    params, batch = init(dtype), cast(BATCH, dtype)
    want = exact(params=params, batch=batch)
    big = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    f = accumax.value_and_grad(loss_fn, in_place=in_place, **size)
    got = jax.jit(f)(params, batch)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, big)
    assert distance(got, want) <= 2 * distance(big, want) + jnp.finfo(dtype).eps


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_in_float64_they_are_exact(size, in_place):
    with jax.enable_x64(True):
        params, batch = cast(init(), jnp.float64), cast(BATCH, jnp.float64)
        for fun, weighted in ((loss_fn, False), (weighted_loss_fn, True)):
            f = accumax.value_and_grad(
                fun,
                weighted=weighted,
                accumulator_dtype=None,
                in_place=in_place,
                **size,
            )
            assert distance(jax.jit(f)(params, batch), exact()) < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_in_place_equals_its_carried_twin_to_the_bit(size, weighted, count):
    fun = weighted_loss_fn if weighted else loss_fn
    fun = fun if count == 1 else [fun] * count
    twins = [
        jax.jit(
            accumax.value_and_grad(fun, weighted=weighted, in_place=in_place, **size)
        )(init(), BATCH)
        for in_place in (True, False)
    ]
    assert same_bits(*twins)


@BOTH
@pytest.mark.parametrize("calls", [3, 8])
def test_k_calls_are_one_scan_of_k_to_the_bit(calls, in_place):
    rows = [BATCH | {n: x[i::calls] for n, x in BATCH.items()} for i in range(calls)]
    tx = accumax.accumulate(optax.identity(), calls)
    params, state = init(), tx.init(init())
    for part in rows:
        grads = jax.jit(jax.grad(loss_fn))(params, part)
        updates, state = jax.jit(tx.update)(grads, state, params)
    f = accumax.grad(loss_fn, microbatches=calls, in_place=in_place)
    assert same_bits(jax.jit(f)(params, BATCH), updates)


def test_bfloat16_ones_are_not_lost():
    def mean(w, x):
        return jnp.mean(w * x)

    f = accumax.value_and_grad(mean, microbatch_size=1)
    ones = jnp.ones(1024, jnp.bfloat16)
    value, grad = jax.jit(f)(jnp.bfloat16(1), ones)
    assert (value, grad) == (1, 1)
    assert value.dtype == grad.dtype == jnp.bfloat16


def test_the_accumulator_has_the_dtype_that_was_asked_for():
    def mean(w, x):
        return jnp.mean(w * x)

    f = accumax.grad(mean, microbatch_size=1, accumulator_dtype=jnp.bfloat16)
    assert f(jnp.float32(1), jnp.ones(1024)) == 0.25  # 256 + 1 is 256 in bfloat16


@BOTH
@pytest.mark.parametrize("size", [4, 5, 24])
def test_tokens_weigh_the_same_wherever_they_are(size, in_place):
    batch = masked()

    def mean(params, batch):
        total, weight = tokens_loss(params, batch)
        return total / weight

    f = accumax.value_and_grad(
        tokens_loss, microbatch_size=size, weighted=True, in_place=in_place
    )
    got = jax.jit(f)(init(), batch)
    assert distance(got, exact(mean, batch=batch)) < 5e-6
    naive = jax.jit(accumax.value_and_grad(loss_fn, microbatch_size=size))
    assert distance(naive(init(), batch), exact(mean, batch=batch)) > 0.1


@BOTH
@pytest.mark.parametrize("count", [1, 2])
def test_microbatches_of_padding_add_neither_their_loss_nor_their_gradient(
    count, in_place
):
    def fun(w, x):  # sqrt has an infinite slope at the padding, so its gradient is NaN
        one = jnp.max(x) / jnp.max(x)  # and of padding alone, the loss is NaN as well
        return one * jnp.sum(jnp.where(x > 0, jnp.sqrt(w * x), 0)), jnp.sum(x > 0)

    f = accumax.value_and_grad(
        fun if count == 1 else [fun] * count,
        microbatch_size=2,
        weighted=True,
        has_aux=False,
        in_place=in_place,
    )
    x = jnp.array([4.0, 0, 16.0, 4.0, 0, 16.0])  # the second microbatch is padding
    value, grad = jax.jit(f)(1.0, x)
    np.testing.assert_allclose(value if count == 1 else value[1], 3.0, rtol=1e-6)
    np.testing.assert_allclose(grad, 1.5 * count, rtol=1e-6)
    value, grad = jax.jit(f)(1.0, jnp.zeros(6))
    assert not np.any(value)
    assert grad == 0


@BOTH
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_a_weight_that_cannot_be_is_not_hidden(weight, count, in_place):
    def fun(w, x):
        return jnp.sum(w * x), jnp.sum(x)

    f = accumax.value_and_grad(
        fun if count == 1 else [fun] * count,
        microbatch_size=1,
        weighted=True,
        in_place=in_place,
    )
    out = jax.jit(f)(1.0, jnp.array([1.0, weight, 2.0]))
    assert np.all(np.isnan(jax.tree.leaves(out)))


@BOTH
def test_large_weights_do_not_make_a_half_precision_gradient_vanish(in_place):
    def fun(w, x):
        return jnp.sum(w * x).astype(jnp.float16), jnp.float32(2e5)

    def grad(fun):
        f = accumax.grad(fun, microbatch_size=1, weighted=True, in_place=in_place)
        return jax.jit(f)(jnp.float16(1), jnp.full(64, 512, jnp.float16))

    np.testing.assert_allclose(grad(fun), 512 / 2e5, rtol=1e-3)
    np.testing.assert_allclose(grad([fun, fun]), 2 * 512 / 2e5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_is_not_divided(weighted):
    fun = tokens_loss if weighted else (lambda p, b: jnp.sum(losses(p, b)))

    def total(params, batch):
        return tokens_loss(params, batch)[0] if weighted else fun(params, batch)

    batch = masked()
    for losses_ in (fun, [fun, fun]):
        f = accumax.value_and_grad(
            losses_, microbatch_size=5, reduction="sum", weighted=weighted
        )
        value, grads = jax.jit(f)(init(), batch)
        count = 1 if losses_ is fun else 2
        want, want_grads = exact(total, batch=batch)
        np.testing.assert_allclose(value, [want] * 2 if count == 2 else want, rtol=1e-6)
        want_grads = jax.tree.map(lambda g, n=count: n * g, want_grads)
        assert distance(grads, want_grads) < 1e-4


# Several losses


def shared(params, batch):
    return 0.1 * jnp.mean(jnp.sum((batch["x"] @ params["layer"]["w"]) ** 2, -1))


def separate(params, batch):
    return jnp.mean(batch["y"] ** 2) * params["scale"] ** 2


@BOTH
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_gradient_of_several_losses_is_that_of_their_sum(size, in_place):
    funs = (loss_fn, shared, separate)

    def total(params, batch):
        values = tuple(fun(params, batch) for fun in funs)
        return sum(values), values

    (_, values), grads = exact(total, has_aux=True)
    f = accumax.value_and_grad(funs, in_place=in_place, **size)
    got, got_grads = jax.jit(f)(init(), BATCH)
    assert isinstance(got, tuple)
    assert distance(got, values) < 2e-6
    assert distance(got_grads, grads) < 5e-6


@BOTH
def test_several_weighted_losses_are_divided_by_their_own_weights(in_place):
    def per_row(params, batch):
        each = jnp.sum((batch["x"] @ params["layer"]["w"]) ** 2, -1)
        return jnp.sum(each), each.shape[0]

    def total(params, batch):
        (a, n), (b, m) = tokens_loss(params, batch), per_row(params, batch)
        return a / n + b / m

    f = accumax.value_and_grad(
        [tokens_loss, per_row], microbatch_size=4, weighted=True, in_place=in_place
    )
    values, grads = jax.jit(f)(init(), masked())
    want, want_grads = exact(total, batch=masked())
    np.testing.assert_allclose(sum(values), want, rtol=1e-6)
    assert distance(grads, want_grads) < 5e-6


def test_each_of_several_losses_has_its_aux():
    def with_aux(fun, name):
        return lambda params, batch: (fun(params, batch), {name: jnp.sum(batch["x"])})

    funs = [with_aux(loss_fn, "a"), with_aux(shared, "b")]
    want = np.sum(np.asarray(BATCH["x"], np.float64))
    for aux in ("sum", ({"a": "sum"}, "sum"), [{"a": "sum"}, {"b": "sum"}]):
        f = accumax.value_and_grad(funs, has_aux=True, microbatch_size=5, aux=aux)
        (_, (first, second)), _ = jax.jit(f)(init(), BATCH)
        np.testing.assert_allclose([first["a"], second["b"]], want, rtol=1e-5)
    with pytest.raises(ValueError, match="1 entries for 2 loss functions"):
        accumax.grad(funs, has_aux=True, microbatch_size=5, aux=("sum",))


# Aux


def aux_fn(params, batch):
    each = losses(params, batch)
    aux = {
        "mean": jnp.mean(each),
        "sum": jnp.sum(each),
        "count": jnp.sum(batch["y"][:, 0] > 0),
        "flag": jnp.bool_(True),
        "last": each[-1],
        "row": jnp.arange(each.shape[0]),
        "x": batch["x"],
        "none": None,
    }
    return jnp.mean(each), aux


HOW = {
    "mean": "mean",
    "sum": "sum",
    "count": "sum",
    "flag": "sum",
    "last": "last",
    "row": "concat",
    "x": "concat",
    "none": "mean",
}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_aux_is_that_of_the_big_batch(size, in_place):
    f = accumax.value_and_grad(aux_fn, has_aux=True, aux=HOW, in_place=in_place, **size)
    (value, aux), grads = jax.jit(f)(init(), BATCH)
    (want_value, want), want_grads = jax.jit(jax.value_and_grad(aux_fn, has_aux=True))(
        init(), BATCH
    )
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    assert distance(grads, want_grads) < 5e-6
    np.testing.assert_allclose(aux["mean"], want["mean"], rtol=1e-6)
    np.testing.assert_allclose(aux["sum"], want["sum"], rtol=1e-6)
    assert aux["count"] == want["count"]
    assert aux["count"].dtype == want["count"].dtype
    np.testing.assert_array_equal(aux["x"], want["x"])  # in the order of the batch
    assert aux["row"].shape == (ROWS,)
    assert aux["none"] is None
    parts = size.get("microbatches") or -(-ROWS // size["microbatch_size"])
    assert aux["flag"] == parts  # a sum of booleans counts
    np.testing.assert_allclose(  # the last row is in the last microbatch
        aux["last"], losses(init(), BATCH)[-1], rtol=1e-5
    )


def test_stacked_aux_has_a_value_for_each_microbatch_in_turn():
    def fun(w, x):
        return jnp.mean(w * x), jnp.sum(x).astype(jnp.int32)

    f = accumax.grad(fun, has_aux=True, microbatch_size=2, aux="stack")
    _, aux = jax.jit(f)(1.0, jnp.arange(7.0))  # 0 3 | 1 4 | 2 5 | 6
    np.testing.assert_array_equal(aux, [3, 5, 7, 6])
    assert aux.dtype == jnp.int32


def test_the_mean_of_aux_is_weighted_and_leaves_padding_out():
    def fun(w, x):
        weight = jnp.sum(x)
        return (jnp.sum(w * x), weight), jnp.sum(x * x) / weight  # 0/0 for padding

    f = accumax.value_and_grad(fun, has_aux=True, weighted=True, microbatch_size=1)
    (_, aux), _ = jax.jit(f)(1.0, jnp.array([1.0, 0.0, 3.0]))
    assert aux == (1 * 1 + 3 * 3) / 4
    (_, aux), _ = jax.jit(f)(1.0, jnp.zeros(3))
    assert aux == 0


def test_the_mean_of_aux_counts_the_rows_of_a_smaller_last_microbatch():
    f = accumax.grad(
        lambda w, x: (w * jnp.mean(x), jnp.mean(x)), has_aux=True, microbatch_size=4
    )
    _, aux = f(1.0, jnp.arange(10.0))
    assert aux == 4.5


def test_keys_ride_along_in_aux():
    def fun(w, x, key):
        return jnp.mean(w * x), {"key": key}

    for how in ("last", "stack"):
        f = accumax.grad(fun, has_aux=True, microbatches=2, rng_argnums=2, aux=how)
        _, aux = jax.jit(f)(1.0, jnp.ones(4), jax.random.key(0))
        want = [jax.random.fold_in(jax.random.key(0), i) for i in range(2)]
        want = want[-1] if how == "last" else jnp.stack(want)
        assert jnp.all(aux["key"] == want)


# Keys


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("in_place", [True, False])
def test_every_microbatch_has_a_key_of_its_own(make, in_place):
    def fun(w, x, keys):
        mask = jax.random.bernoulli(keys["dropout"], 0.5, x.shape)
        return jnp.mean(w * x * mask), mask

    f = accumax.value_and_grad(
        fun,
        has_aux=True,
        microbatch_size=40,
        rng_argnums=2,
        aux="concat",
        in_place=in_place,
    )
    x, key = jnp.linspace(-1, 1, 90), make(3)
    (value, mask), grad = jax.jit(f)(2.0, x, {"dropout": key})
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    masks = [
        jax.random.bernoulli(k, 0.5, (n,))
        for k, n in zip(keys, (40, 40, 10), strict=True)
    ]
    np.testing.assert_array_equal(mask[:80:2], masks[0])
    np.testing.assert_array_equal(mask[1:80:2], masks[1])
    np.testing.assert_array_equal(mask[80:], masks[2])
    np.testing.assert_allclose(grad, np.mean(np.asarray(x) * mask), rtol=1e-5)
    np.testing.assert_allclose(value, 2 * grad, rtol=1e-5)


def test_a_key_for_each_row_is_part_of_the_batch():
    def fun(w, x, keys):
        return jnp.mean(w * x * jax.vmap(jax.random.uniform)(keys))

    keys, x = jax.random.split(jax.random.key(0), 6), jnp.arange(6.0)
    f = accumax.grad(fun, microbatch_size=4, batch_argnums=(1, 2))
    want = jax.grad(fun)(1.0, x, keys)
    np.testing.assert_allclose(jax.jit(f)(1.0, x, keys), want, rtol=1e-6)


# Arguments


def test_the_batch_may_be_anywhere_and_of_any_rank():
    def fun(x, a, y, *, scale, mask, b):
        image = jnp.einsum("nhwc,hw->nc", x["image"], a) * scale
        return jnp.mean(mask * (jnp.sum(image, -1) * b[0] - y) ** 2)

    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(6, 2, 3, 2)).astype(np.float32), "no": None}
    a = jnp.ones((2, 3))
    y, mask = jnp.arange(6.0), np.arange(6) > 2
    rest = {"scale": 0.5, "mask": mask, "b": (jnp.float32(2),)}
    want = jax.value_and_grad(fun, argnums=1)(x, a, y, **rest)
    for names in ((0, 2, "mask"), ["x", "y", "mask"], (0, -1, "mask")):
        f = accumax.value_and_grad(fun, 1, microbatch_size=4, batch_argnums=names)
        assert distance(f(x, a, y, **rest), want) < 1e-5
    # A position may be passed by keyword.
    f = accumax.grad(lambda w, x: w * jnp.mean(x), microbatches=2)
    assert f(1.0, x=y) == 2.5


def test_argnums_are_those_of_jax():
    def fun(a, x, b):
        return jnp.mean((x @ a["w"] - b) ** 2)

    a, x, b = {"w": jnp.ones(3)}, jnp.arange(12.0).reshape(4, 3), jnp.float32(2)
    for argnums in (0, (0,), (0, 2), (2, 0), -1, [2], np.int64(0)):
        want = jax.value_and_grad(fun, argnums)(a, x, b)
        got = accumax.value_and_grad(fun, argnums, microbatch_size=3)(a, x, b)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert distance(got, want) < 1e-4
        assert distance(
            accumax.grad(fun, argnums, microbatches=2)(a, x, b), want[1]
        ) < (1e-4)


def test_what_is_no_number_rides_along_in_the_parameters():
    params = {"w": 0.2, "n": 3, "f": jnp.tanh, "none": None}
    f = accumax.grad(lambda p, x: p["f"](p["w"] * p["n"]) * jnp.mean(x), microbatches=2)
    grads = f(params, jnp.ones(4))
    np.testing.assert_allclose(grads["w"], 3 * (1 - np.tanh(0.6) ** 2), rtol=1e-3)
    assert grads["n"] is grads["f"] is grads["none"] is None


def test_complex_parameters_have_the_gradient_of_jax():
    def fun(z, x):
        return jnp.mean(jnp.abs(z * x - 1j) ** 2)

    z, x = jnp.complex64(1 + 2j), jnp.arange(6.0)
    got = accumax.grad(fun, microbatch_size=4)(z, x)
    np.testing.assert_allclose(got, jax.grad(fun)(z, x), rtol=1e-6)


# Transformations


@pytest.mark.slow
@BOTH
def test_under_vmap_and_scan_and_without_jit(in_place):
    f = accumax.grad(loss_fn, microbatch_size=7, in_place=in_place)
    _, want = exact()
    assert distance(f(init(), BATCH), want) < 5e-6
    pair = jax.tree.map(lambda x: jnp.stack([x * 2, x]), init())
    for got in (
        jax.jit(jax.vmap(f, (0, None)))(pair, BATCH),
        jax.jit(lambda p: jax.lax.map(lambda p: f(p, BATCH), p))(pair),
    ):
        assert distance(jax.tree.map(lambda x: x[1], got), want) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_the_carried_twin_can_be_differentiated_again(weighted):
    fun = weighted_loss_fn if weighted else loss_fn
    f = accumax.grad(fun, microbatch_size=7, weighted=weighted, in_place=False)

    def norm(grad):
        return lambda p: optax.tree.norm(grad(p, BATCH), squared=True)

    want = jax.jit(jax.grad(norm(jax.grad(loss_fn))))(init())
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(want))
    for outer in (
        jax.grad(norm(f)),
        jax.grad(jax.checkpoint(norm(f))),
        jax.jacfwd(norm(f)),
    ):
        assert distance(jax.jit(outer)(init()), want) <= 1e-5 * largest


def test_a_loss_is_traced_for_each_size_and_never_again():
    traces = []

    def fun(params, batch):
        traces.append(len(batch["x"]))
        return loss_fn(params, batch)

    f = jax.jit(accumax.value_and_grad(fun, microbatch_size=7))
    for _ in range(3):
        f(init(), BATCH)
    # Its shapes, on JAX 0.10 where refs are safe and whether a cast can move into a
    # scan, and the backward pass.
    times = 2 if jax.__version_info__ >= (0, 11) else 4
    assert sorted(traces) == [3] * times + [7] * times


class Largest(NamedTuple):
    """The largest of all microbatches, and which one it was in."""

    @staticmethod
    def init(like):
        return jnp.full(like.shape, -jnp.inf, like.dtype), jnp.int32(-1)

    @staticmethod
    def update(carry, x, i):
        return jnp.maximum(carry[0], x), jnp.where(x > carry[0], i, carry[1])

    @staticmethod
    def finalize(carry):
        return carry[0] + 1000 * carry[1]


@pytest.mark.parametrize("size", [4, 7], ids=["even", "uneven"])
def test_a_reduction_of_ones_own_sees_each_microbatch_in_turn(size):
    def fun(w, x):
        return jnp.mean(w * x), {"largest": jnp.max(x), "mean": jnp.mean(x)}

    x = jnp.asarray(np.random.default_rng(0).normal(size=24), jnp.float32)
    options = {"has_aux": True, "microbatch_size": size}
    f = accumax.value_and_grad(
        fun, aux={"largest": Largest(), "mean": "mean"}, **options
    )
    (_, aux), _ = jax.jit(f)(1.0, x)
    count = len(x) // size
    where = int(jnp.argmax(x))
    i = where % count if where < count * size else count
    np.testing.assert_allclose(aux["largest"], jnp.max(x) + 1000 * i, rtol=1e-6)
    np.testing.assert_allclose(aux["mean"], jnp.mean(x), atol=1e-6)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    f = accumax.value_and_grad(
        fun,
        reduce_axis=accumax.DataParallel("data", mesh=mesh),
        aux=Largest(),
        has_aux=True,
        microbatch_size=4,
    )
    with pytest.raises(ValueError, match="what several devices have together"):
        jax.jit(f)(1.0, x)


def test_unrolling_changes_nothing():
    whole = accumax.value_and_grad(loss_fn, microbatch_size=4)
    want = jax.jit(whole)(init(), BATCH)
    for unroll in (2, 4, True):
        f = accumax.value_and_grad(loss_fn, microbatch_size=4, unroll=unroll)
        assert distance(jax.jit(f)(init(), BATCH), want) < 1e-6


def test_unroll_false_leaves_the_loop_rolled_as_for_a_scan():
    def program(**options):
        f = accumax.value_and_grad(loss_fn, microbatch_size=4, **options)
        return str(jax.make_jaxpr(f)(init(), BATCH))

    assert program(unroll=False) == program()


def test_the_name_and_the_words_of_the_function_are_kept():
    f = accumax.grad(loss_fn, microbatches=2)
    assert f.__name__ == "loss_fn"


def test_donated_parameters_are_updated_in_place():
    f = accumax.value_and_grad(loss_fn, microbatch_size=4)

    def step(params, batch):
        value, grads = f(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    want, _ = step(init(), BATCH)
    params = init()
    got, _ = jax.jit(step, donate_argnums=0)(params, BATCH)
    assert params["scale"].is_deleted()
    assert distance(got, want) < 1e-6


def test_a_sharded_batch_stays_where_it_is():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batch = jax.device_put(BATCH, rows)
    params = jax.device_put(init(), everywhere)
    # The devices divide the rows of a microbatch.
    f = jax.jit(accumax.value_and_grad(loss_fn, microbatch_size=8))
    text = f.lower(params, batch).compile().as_text()
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text
    assert distance(f(params, batch), exact()) < 5e-6


# Bad input

X = jnp.arange(8.0)


def mean(w, x, key=None):
    return jnp.mean(w * x)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, ["exactly one", "microbatch_size", "microbatches"]),
        ({"microbatch_size": 2, "microbatches": 4}, ValueError, ["exactly one"]),
        ({"microbatch_size": 0}, ValueError, ["microbatch_size=0", "at least 1"]),
        ({"microbatch_size": -2}, ValueError, ["microbatch_size=-2"]),
        ({"microbatches": 0}, ValueError, ["microbatches=0"]),
        ({"microbatch_size": 2.5}, TypeError, ["microbatch_size=2.5", "integer"]),
        ({"microbatches": 2.0}, TypeError, ["microbatches=2.0", "integer"]),
        ({"microbatch_size": True}, TypeError, ["microbatch_size=True"]),
        ({"microbatches": 3}, ValueError, ["8 rows", "microbatches=3"]),
        ({"microbatches": 16}, ValueError, ["8 rows", "microbatches=16"]),
        ({"microbatches": 2, "batch_argnums": 3}, ValueError, ["argument 3", "2 pos"]),
        ({"microbatches": 2, "batch_argnums": -3}, ValueError, ["argument -3"]),
        ({"microbatches": 2, "batch_argnums": "y"}, ValueError, ["argument 'y'"]),
        ({"microbatches": 2, "batch_argnums": ()}, ValueError, ["batch_argnums"]),
        ({"microbatches": 2, "batch_argnums": 1.0}, TypeError, ["batch_argnums=1.0"]),
        ({"microbatches": 2, "batch_argnums": 0}, ValueError, ["differentiated"]),
        ({"microbatches": 2, "argnums": 1}, ValueError, ["differentiated"]),
        ({"microbatches": 2, "argnums": 2}, ValueError, ["argnums", "argument 2"]),
        ({"microbatches": 2, "argnums": (0, 0)}, ValueError, ["twice"]),
        ({"microbatches": 2, "argnums": "w"}, TypeError, ["argnums='w'"]),
        ({"microbatches": 2, "rng_argnums": 1}, ValueError, ["share an argument"]),
        ({"microbatches": 2, "rng_argnums": 0}, ValueError, ["differentiated"]),
        ({"microbatches": 2, "aux": "median"}, ValueError, ["'median'", "concat"]),
        ({"microbatches": 2, "aux": {"a": 1}}, ValueError, ["aux['a']=1"]),
        ({"microbatches": 2, "reduction": "max"}, ValueError, ["'max'", "mean"]),
        ({"microbatches": 2, "unroll": 0}, ValueError, ["unroll=0"]),
        ({"microbatches": 2, "weighted": True}, TypeError, ["(loss_sum, weight)"]),
        ({"microbatches": 2, "has_aux": True}, TypeError, ["(loss, aux)"]),
        (
            {"microbatches": 2, "accumulator_dtype": jnp.int32},
            TypeError,
            ["accumulator_dtype=int32"],
        ),
    ],
    ids=str,
)
def test_a_bad_option_is_an_error_that_says_what_to_do(options, error, words):
    for in_jit in (False, True):

        def call(jit=jax.jit if in_jit else (lambda f: f)):
            return jit(accumax.value_and_grad(mean, **options))(1.0, X)

        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        ({"x": X, "y": X[:6]}, ValueError, ["8 in leaf ['x']", "6 in leaf ['y']"]),
        ({"x": X, "n": jnp.float32(1)}, ValueError, ["['n']", "scalar", "float32[]"]),
        ({"x": X, "n": 3}, ValueError, ["['n']", "scalar"]),
        ({"x": X[:0]}, ValueError, ["empty"]),
        ({"x": None}, ValueError, ["no arrays"]),
        ({"x": X, "s": "text"}, TypeError, ["['s']", "'text'"]),
        ({"x": X, "s": np.array(["text"] * 8)}, TypeError, ["['s']", "an array"]),
    ],
    ids=["lengths", "scalar", "number", "empty", "none", "text", "texts"],
)
def test_a_bad_batch_is_an_error_that_names_the_leaf(batch, error, words):
    f = accumax.grad(lambda w, b: jnp.mean(w * b["x"]), microbatch_size=2)
    with pytest.raises(error) as caught:
        f(1.0, batch)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (3, "int32[]"),
        (jnp.float32(1), "float32[]"),
        (jnp.arange(2), "int32[2]"),
        (jax.random.split(jax.random.key(0), 8), "key<fry>[8]"),
        (None, "None"),
        ("key", "'key'"),
    ],
)
def test_a_key_that_is_none_is_an_error_that_says_what_came(key, words):
    f = accumax.grad(mean, microbatches=2, rng_argnums=2)
    with pytest.raises(TypeError, match="one PRNG key") as caught:
        f(1.0, X, key)
    assert words in str(caught.value)


def test_a_key_that_every_microbatch_would_share_is_an_error():
    for key in (jax.random.key(0), {"dropout": jax.random.key(0)}):
        with pytest.raises(ValueError, match=r"same random numbers.*rng_argnums=2"):
            accumax.grad(mean, microbatches=2)(1.0, X, key)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (lambda w, x: w * x, "scalar"),
        (lambda w, x: jnp.int32(1), "floating-point"),
        (lambda w, x: w * 1j * jnp.mean(x), "real"),
        (lambda w, x: None, "None"),
    ],
)
def test_a_loss_that_is_not_a_real_scalar_is_an_error(out, words):
    for fun in (out, [mean, out]):
        with pytest.raises(TypeError, match=words):
            jax.jit(accumax.grad(fun, microbatches=2))(1.0, X)


@pytest.mark.parametrize(
    ("aux", "made", "error", "words"),
    [
        ({"a": "sum"}, {"b": 1.0}, ValueError, ["prefix", "'b'"]),
        ("mean", jnp.int32(1), TypeError, ["int32[]", '"sum"']),
        ({"a": "mean"}, {"a": True}, TypeError, ["aux['a']", "bool[]"]),
        ("concat", jnp.float32(1), ValueError, ["2 rows", "one value a row"]),
        ("concat", jnp.ones(3), ValueError, ["float32[3]"]),
        ("sum", jax.random.key(0), TypeError, ["key<fry>", '"last"']),
    ],
)
def test_aux_that_does_not_fit_is_an_error_that_says_which(aux, made, error, words):
    f = accumax.grad(lambda w, x: (w, made), has_aux=True, microbatch_size=2, aux=aux)
    with pytest.raises(error) as caught:
        f(1.0, X)
    for word in words:
        assert word in str(caught.value)


def test_aux_of_another_shape_in_the_last_microbatch_is_an_error():
    f = accumax.grad(lambda w, x: (w, x), has_aux=True, microbatch_size=3, aux="stack")
    with pytest.raises(ValueError, match=r"3 rows.*2.*concat"):
        f(1.0, X)


def test_what_is_no_loss_function_is_an_error():
    for fun in ([], [mean, 3], 3):
        with pytest.raises(TypeError, match="loss function"):
            accumax.grad(fun, microbatches=2)


def test_parameters_without_a_number_are_an_error():
    with pytest.raises(TypeError, match=r"Argument 0.*int32\[\]"):
        accumax.grad(mean, microbatches=2)(jnp.int32(1), X)
    f = accumax.grad(lambda w, x: jnp.mean(x), microbatches=2)
    assert f({}, X) == {}  # as JAX has it


@BOTH
def test_the_loss_may_be_any_callable(in_place):
    class Model:
        def __call__(self, w, x):
            return jnp.mean(w * x)

    for fun in (Model(), functools.partial(mean, key=3), jax.jit(mean)):
        f = accumax.grad(fun, microbatches=2, in_place=in_place)
        assert jax.jit(f)(1.0, X) == 3.5


def test_the_rows_are_dealt_out_in_turn():
    def fun(w, x):
        return jnp.mean(w * x), x

    f = accumax.grad(fun, has_aux=True, microbatches=3, aux="stack")
    _, rows = f(1.0, jnp.arange(6.0))
    np.testing.assert_array_equal(rows, [[0, 3], [1, 4], [2, 5]])


def test_microbatches_of_the_same_rows_as_calls_are_equal():
    """Those of `problems.microbatches` are consecutive; the sum is the same."""
    parts = microbatches(BATCH, [8, 8, 8])
    grads = [jax.grad(loss_fn)(init(), part) for part in parts]
    want = jax.tree.map(lambda *g: sum(g) / 3, *grads)
    got = accumax.grad(loss_fn, microbatch_size=8)(init(), BATCH)
    assert distance(got, want) < 1e-5


def test_without_a_loop_there_is_still_one_microbatch_at_a_time():
    # XLA:CPU computes the gradient of a convolution far slower in a loop.
    def fun(w, x):
        for _ in range(3):
            x = jnp.tanh(
                jax.lax.conv_general_dilated(
                    x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return jnp.mean(x**2)

    w, x = jnp.ones((3, 3, 8, 8)) / 72, jnp.ones((64, 8, 8, 8))
    programs = [
        jax.jit(f).lower(w, x).compile()
        for f in (
            jax.grad(fun),
            accumax.grad(fun, microbatches=8),
            accumax.grad(fun, microbatches=8, unroll=True),
        )
    ]
    whole, scanned, unrolled = (
        p.memory_analysis().temp_size_in_bytes for p in programs
    )
    assert "while" not in programs[2].as_text()
    assert unrolled < 0.4 * whole
    assert scanned < 0.4 * whole
    assert distance(programs[2](w, x), programs[0](w, x)) < 1e-6


def test_the_scales_of_fp8_are_not_averaged():
    params = {"params": {"w": jnp.ones(3)}, "_overwrite_with_gradient": jnp.ones(16)}

    def loss(variables, x):
        return jnp.mean(x @ variables["params"]["w"])

    with pytest.raises(TypeError, match=r"_overwrite_with_gradient.*apply_gradients"):
        accumax.grad(loss, microbatches=2)(params, jnp.ones((4, 3)))
    with pytest.raises(TypeError, match="_overwrite_with_gradient"):
        accumax.accumulate(optax.sgd(0.1), 2).init(params)
