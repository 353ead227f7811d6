"""`microbatch`: outputs and gradients of the whole batch, by recomputation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import cast, distance, same_bits

import accumax

BOTH = pytest.mark.parametrize("in_place", [True, False])
ROWS = 11


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    tower = {"a": leaf(5, 4), "b": leaf(4, 3)}
    return (tower, {"a": leaf(5, 4), "b": leaf(4, 3)}), leaf(ROWS, 5), leaf(ROWS, 5)


def embed(tower, x):
    return jnp.tanh(x @ tower["a"]) @ tower["b"]


def info_nce(first, second):
    scores = (first @ second.T).astype(jnp.promote_types(first.dtype, jnp.float32))
    which = jnp.arange(len(scores))
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, which)
    return losses.mean()


def one_tower(embed):
    return lambda towers, x, y: info_nce(embed(towers[0], x), embed(towers[0], y))


def two_towers(embed):
    return lambda towers, x, y: info_nce(embed(towers[0], x), embed(towers[1], y))


@BOTH
@pytest.mark.parametrize("towers", [one_tower, two_towers])
@pytest.mark.parametrize("size", [1, 4, 11, 50])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_contrastive_loss_has_the_gradient_of_the_big_batch(
    dtype, size, towers, in_place
):
    args = arrays(dtype)
    with jax.enable_x64(True):
        exact = [cast(x, jnp.float64) for x in args]
        exact = jax.jit(jax.value_and_grad(towers(embed), (0, 1, 2)))(*exact)
        exact = jax.tree.map(np.asarray, exact)
    big = jax.jit(jax.value_and_grad(towers(embed), (0, 1, 2)))(*args)
    by_part = accumax.microbatch(embed, microbatch_size=size, in_place=in_place)
    got = jax.jit(jax.value_and_grad(towers(by_part), (0, 1, 2)))(*args)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, big)
    assert distance(got, exact) <= 2 * distance(big, exact) + jnp.finfo(dtype).eps


@pytest.mark.parametrize("size", [4, 11])
def test_in_place_equals_its_carried_twin_to_the_bit(size):
    twins = []
    for in_place in (True, False):
        by_part = accumax.microbatch(embed, microbatch_size=size, in_place=in_place)
        loss = jax.value_and_grad(two_towers(by_part), (0, 1, 2))
        twins.append(jax.jit(loss)(*arrays()))
    assert same_bits(*twins)


def test_in_float64_it_is_exact():
    with jax.enable_x64(True):
        args = [cast(x, jnp.float64) for x in arrays()]
        by_part = accumax.microbatch(embed, microbatch_size=4, accumulator_dtype=None)
        want = jax.jit(jax.grad(two_towers(embed)))(*args)
        got = jax.jit(jax.grad(two_towers(by_part)))(*args)
        assert distance(got, want) < 1e-13


def test_half_precision_gradients_are_added_in_float32():
    def fun(w, x):
        return w * x

    def loss(w, dtype):
        by_part = accumax.microbatch(fun, microbatch_size=1, accumulator_dtype=dtype)
        return jnp.sum(by_part(w, jnp.ones(1024, jnp.bfloat16)).astype(jnp.float32))

    for dtype, want in ((jnp.float32, 1024), (jnp.bfloat16, 256)):
        grad = jax.jit(jax.grad(loss), static_argnums=1)(jnp.bfloat16(1), dtype)
        assert grad == want
        assert grad.dtype == jnp.bfloat16


def test_outputs_come_in_the_order_of_the_batch_and_in_its_tree():
    def fun(w, x, *, flag, names):
        assert flag is True  # Python values stay Python values
        return {"y": w * x["x"], "n": x["n"], names[0]: x["key"]}

    rng = np.random.default_rng(0)
    x = {
        "x": rng.normal(size=(7, 2, 3)).astype(np.float32),
        "n": np.arange(7),
        "key": jax.random.split(jax.random.key(0), 7),
    }
    by_part = accumax.microbatch(fun, microbatch_size=3)
    got = by_part(2.0, x, flag=True, names=("k",))
    np.testing.assert_array_equal(got["y"], 2 * x["x"])
    np.testing.assert_array_equal(got["n"], x["n"])
    assert got["n"].dtype == jnp.int32
    assert jnp.all(got["k"] == x["key"])


@BOTH
def test_integer_outputs_and_arguments_have_no_gradient(in_place):
    def fun(w, x, scale):
        return x["x"] @ w * scale, x["n"]

    x = {"x": jnp.arange(12.0).reshape(6, 2), "n": jnp.arange(6)}

    def loss(fun):
        def of(w, x):
            y, n = fun(w, x, jnp.int32(3))
            return jnp.sum(y * n)

        return jax.grad(of, allow_int=True, argnums=(0, 1))

    by_part = accumax.microbatch(fun, microbatch_size=4, in_place=in_place)
    w = jnp.array([1.0, 2.0])
    got, want = jax.jit(loss(by_part))(w, x), jax.jit(loss(fun))(w, x)
    assert distance([got[0], got[1]["x"]], [want[0], want[1]["x"]]) == 0
    assert got[1]["n"].dtype == jax.dtypes.float0


@BOTH
def test_what_the_function_closes_over_is_differentiated_too(in_place):
    towers, x, y = arrays()

    def loss(towers, x, y, wrap):
        first = wrap(lambda x: embed(towers[0], x))
        second = wrap(lambda y: embed(towers[1], y))
        return info_nce(first(x), second(y))

    def by_part(fun):
        return accumax.microbatch(
            fun, microbatch_size=4, batch_argnums=0, in_place=in_place
        )

    want = jax.jit(jax.grad(lambda *args: loss(*args, lambda f: f)))(towers, x, y)
    got = jax.jit(jax.grad(lambda *args: loss(*args, by_part)))(towers, x, y)
    assert distance(got, want) < 1e-5


@BOTH
@pytest.mark.parametrize(
    "around",
    [
        lambda loss: loss,
        jax.checkpoint,
        lambda loss: lambda *a: jax.lax.cond(a[0][0] > -9, loss, loss, *a),
        lambda loss: (
            lambda w, *a: jax.lax.scan(
                lambda c, _: (c + loss(w, *a), None), 0.0, None, length=1
            )[0]
        ),
        lambda loss: lambda w, *a: jax.vmap(lambda w: loss(w, *a))(w[None])[0],
    ],
    ids=["alone", "checkpoint", "cond", "scan", "vmap"],
)
def test_it_may_close_over_integers_keys_and_numbers(around, in_place):
    def loss(w, x, index, key, wrap):
        def fun(w, x):
            noise = jax.random.normal(key, (3,))
            return x * w[index] * jnp.sum(noise) * scale

        scale = jnp.sin(w[0])
        return jnp.sum(wrap(fun)(w, x) ** 2)

    def by_part(fun):
        return accumax.microbatch(fun, microbatch_size=3, in_place=in_place)

    args = jnp.arange(1.0, 4.0), jnp.arange(7.0), jnp.int32(2), jax.random.key(0)
    got, want = (
        jax.jit(jax.grad(around(lambda *a, wrap=wrap: loss(*a, wrap))))(*args)
        for wrap in (by_part, lambda f: f)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gradients_flow_through_one_into_another():
    towers, x, y = arrays()

    def head(w, x):
        return jnp.tanh(x * w)

    def loss(towers, w, x, y, wrap=lambda f: f):
        first = wrap(head)(w, wrap(embed)(towers[0], x))
        return info_nce(first, wrap(embed)(towers[1], y))

    def by_part(fun):
        return accumax.microbatch(fun, microbatch_size=4)

    w = jnp.ones(1)[:, None] * 0.5
    want = jax.jit(jax.grad(loss, (0, 1)))(towers, w, x, y)
    got = jax.jit(
        jax.grad(lambda *args: loss(*args, by_part), (0, 1)),
    )(towers, w, x, y)
    assert distance(got, want) < 1e-5


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_both_passes_have_the_same_key_and_each_microbatch_its_own(make):
    def dropped(w, x, key):
        return w * x * jax.random.bernoulli(key, 0.5, x.shape)

    by_part = accumax.microbatch(dropped, microbatch_size=20, rng_argnums=2)
    x = jnp.ones(40)

    def loss(w):
        out = by_part(w, x, make(0))
        return jnp.sum(out**2), out

    grad, out = jax.jit(jax.grad(loss, has_aux=True))(3.0)
    assert grad == 2 * 3 * jnp.sum(out != 0)
    masks = [
        jax.random.bernoulli(jax.random.fold_in(make(0), i), 0.5, (20,)) for i in (0, 1)
    ]
    np.testing.assert_array_equal(out[::2] != 0, masks[0])
    np.testing.assert_array_equal(out[1::2] != 0, masks[1])


@pytest.mark.slow
@BOTH
def test_it_composes_with_other_transformations(in_place):
    towers, x, y = arrays()
    by_part = accumax.microbatch(embed, microbatch_size=4, in_place=in_place)

    def loss(towers):
        return two_towers(by_part)(towers, x, y)

    want = jax.grad(lambda towers: two_towers(embed)(towers, x, y))(towers)
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), towers)

    def scanned(towers):
        def body(total, _):
            return total + loss(towers), None

        return jax.lax.scan(body, 0.0, None, length=2)[0] / 2

    second = jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(jax.grad(loss)))(pair))
    for got in (
        jax.grad(loss)(towers),  # without jit
        second,
        jax.jit(jax.grad(jax.checkpoint(loss)))(towers),
        jax.jit(jax.grad(scanned))(towers),
    ):
        assert distance(got, want) < 1e-5


def test_forward_mode_is_an_error():
    by_part = accumax.microbatch(embed, microbatch_size=4)
    (tower, _), x, _ = arrays()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda t: by_part(t, x), (tower,), (tower,))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"microbatch_size": None}, ValueError, ["microbatch_size"]),
        ({"microbatch_size": 0}, ValueError, ["microbatch_size=0"]),
        ({"microbatch_size": 1.5}, TypeError, ["microbatch_size=1.5"]),
        ({"batch_argnums": 2}, ValueError, ["argument 2"]),
        ({"batch_argnums": (0, 1)}, ValueError, ["scalar"]),
        ({"rng_argnums": 1}, ValueError, ["share an argument"]),
        ({"rng_argnums": 0}, TypeError, ["PRNG key"]),
        ({"accumulator_dtype": "int32"}, TypeError, ["accumulator_dtype"]),
    ],
    ids=str,
)
def test_a_bad_option_is_an_error_that_says_what_to_do(options, error, words):
    def call():
        f = accumax.microbatch(jnp.multiply, **({"microbatch_size": 2} | options))
        return f(jnp.float32(1), jnp.arange(4.0))

    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_an_output_without_the_rows_of_its_microbatch_is_an_error():
    for fun in (lambda w, x: jnp.sum(w * x), lambda w, x: {"y": jnp.ones(5)}):
        f = accumax.microbatch(fun, microbatch_size=2)
        with pytest.raises(ValueError, match=r"output.*2 rows.*one value a row"):
            f(1.0, jnp.arange(4.0))


def test_what_is_no_function_is_an_error():
    with pytest.raises(TypeError, match="function"):
        accumax.microbatch(3, microbatch_size=2)
