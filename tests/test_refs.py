import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from problems import distance, same_bits

from accumax._xla import refs
from accumax._xla.loops import at_most_once
from accumax._xla.refs import add_backward

pytestmark = pytest.mark.versions


def test_a_loop_that_runs_at_most_once_is_a_conditional():
    operand = {"w": jnp.array([1.0, -0.0]), "n": jnp.arange(2), "none": None}

    def double(tree):
        return jax.tree.map(lambda x: x * 2, tree)

    for run in (at_most_once, jax.jit(at_most_once, static_argnums=1)):
        assert same_bits(run(jnp.bool_(False), double, operand), operand)
        assert same_bits(run(jnp.bool_(True), double, operand), double(operand))


def test_under_vmap_each_lane_runs_for_itself():
    preds, x = jnp.array([True, False, True]), jnp.arange(3.0)
    got = jax.vmap(lambda p, x: at_most_once(p, lambda x: x + 10, x))(preds, x)
    np.testing.assert_array_equal(got, [10.0, 1.0, 12.0])


def plain(p, x):
    return jnp.sum(jnp.tanh(x @ p["a"]) * p["b"].reshape(1, -1))


def scanned(p, x):
    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = lax.scan(layer, x, p["stack"])
    return jnp.sum(h**2)


def checkpointed(p, x):
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    h, _ = lax.scan(layer, x, p["stack"])
    return jnp.sum(h**2)


def gathered(p, x):
    return jnp.sum(p["a"][jnp.array([0, 2, 1])] * x[:3])


def branched(p, x):
    branches = [lambda p: jnp.sum(x @ p["a"]), lambda p: jnp.sum(p["b"]) ** 2]
    return lax.cond(x[0, 0] > 0, *branches, p)


def unused(p, x):
    return jnp.sum((x @ p["a"]) ** 3)


def custom(p, x):
    @jax.custom_vjp
    def f(a):
        return jnp.sum(a * x)

    f.defvjp(lambda a: (f(a), None), lambda _, g: (g * x,))
    return f(p["a"]) + jnp.linalg.norm(p["b"])


def doubled(p, x):  # the gradient is itself built from a derivative
    return jnp.sum(jax.grad(lambda a: jnp.sum(jnp.tanh(x @ a) ** 2))(p["a"]) ** 2)


# JAX before 0.12 fails on a static slice of a variable that has a ref; 0.12 does not.


def tied(p, x):
    return jnp.sum(jnp.tanh(x @ p["a"]) @ p["a"].T)


def sliced(p, x):
    return jnp.sum(p["a"][0] ** 2) + jnp.sum(p["a"][1:3] * p["a"][::2]) + p["b"][-1]


def sliced_in_a_checkpoint(p, x):
    return jax.jit(jax.checkpoint(lambda a: jnp.sum(jnp.tanh(a[0, 1:3]))))(p["a"])


def sliced_in_a_scan(p, x):
    def layer(h, w):
        return jnp.tanh(h @ w) + p["a"][1][None] * w[0][None], None

    h, _ = lax.scan(layer, x, p["stack"])
    return jnp.sum(h**2)


def sliced_in_a_branch(p, x):
    return lax.cond(x[0, 0] > 0, lambda a: a[2, 0] ** 2, lambda a: a[1, 1], p["a"])


def straight_through(p, x):  # the tangent of what is sliced is that of `a`
    rounded = p["a"] + lax.stop_gradient(jnp.round(p["a"]) - p["a"])
    return jnp.sum(rounded[:, :2] ** 2)


def sliced_dynamically(p, x):
    def layer(h, i):
        return jnp.tanh(
            h @ lax.dynamic_index_in_dim(p["stack"], i, keepdims=False)
        ), None

    h, _ = lax.scan(layer, x, jnp.arange(3))
    return jnp.sum(h**2)


ONCE = [
    plain,
    scanned,
    checkpointed,
    gathered,
    branched,
    unused,
    custom,
    doubled,
    sliced_in_a_checkpoint,
    sliced_in_a_branch,
    sliced_dynamically,
    straight_through,
]
# They use a parameter more than once: (s + g1) + g2 is not s + (g1 + g2).
OFTEN = [tied, sliced, sliced_in_a_scan]


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {"a": leaf(4, 4), "b": leaf(4), "stack": leaf(3, 4, 4), "none": None}


def run(fun, p, sums, first, x, **options):
    """(in place, carried): aux and sums after one backward pass."""
    return runs(fun, p, sums, x, (first,), **options)[0]


def runs(fun, p, sums, x, firsts=(True, False), taken=None, jit=jax.jit):
    """The same for each of `firsts`: whether a window opens with it."""

    @jit
    def in_place(p, sums, first, x):
        def with_aux(p):
            return fun(p, x), ((), x)

        (_, aux), sums = add_backward(with_aux, p, sums, first, taken)
        return aux, sums

    @jit
    def carried(p, sums, first, x):
        grads, aux = jax.grad(lambda p: (fun(p, x), x), has_aux=True)(p)

        def add(a, g):
            return jnp.where(first, g.astype(a.dtype), a + g.astype(a.dtype))

        return aux, jax.tree.map(add, sums, grads)

    args = [(p, sums, jnp.bool_(first), x) for first in firsts]
    return [(in_place(*a), carried(*a)) for a in args]


@pytest.mark.parametrize("fun", ONCE)
def test_in_place_equals_carried_to_the_bit(fun):
    p = params()
    sums = jax.tree.map(lambda x: x - 0.5, params())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
    for in_place, carried in runs(fun, p, sums, x):
        # -0.0 + g is g, so equal as numbers is equal in bits but for a zero's sign.
        assert jax.tree.structure(in_place) == jax.tree.structure(carried)
        for a, b in zip(
            jax.tree.leaves(in_place), jax.tree.leaves(carried), strict=True
        ):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("fun", ONCE + OFTEN)
def test_without_jit_the_same_is_accepted(fun):
    p, x = params(), jnp.eye(4)
    (_, in_place), (_, carried) = run(fun, p, p, jnp.bool_(False), x, jit=lambda f: f)
    assert distance(in_place, carried) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fun", ONCE + OFTEN)
def test_a_half_precision_cotangent_is_added_in_float32(fun):
    dtype = jnp.bfloat16
    p = params(dtype)
    sums = params(jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), dtype)
    (_, in_place), (_, carried) = run(fun, p, sums, jnp.bool_(False), x)
    assert {a.dtype for a in jax.tree.leaves(in_place)} == {jnp.dtype(jnp.float32)}
    size = distance(carried, sums)
    eps = float(jnp.finfo(dtype).eps)
    # The same cotangents; XLA may skip a rounding to `dtype` where it fuses one form.
    assert distance(in_place, carried) <= 4 * eps * size


@pytest.mark.parametrize("fun", OFTEN)
def test_parameters_that_are_used_often_agree_to_rounding(fun):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
    in_place, carried = run(fun, params(), params(), jnp.bool_(False), x)
    assert distance(in_place, carried) < 4e-6


def test_complex_parameters_get_the_gradient_that_jax_gives():
    def fun(p, x):
        return jnp.sum(jnp.abs(x @ p["c"]) ** 2)

    p = {"c": params()["a"] * (1 + 2j)}
    sums = {"c": jnp.ones((4, 4), jnp.complex64)}
    in_place, carried = run(fun, p, sums, jnp.bool_(False), jnp.eye(4))
    np.testing.assert_allclose(in_place[1]["c"], carried[1]["c"], rtol=1e-6)


def test_a_nan_from_the_last_window_is_gone_when_the_next_one_opens():
    p = params()
    sums = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), p)
    (_, in_place), _ = run(plain, p, sums, jnp.bool_(True), jnp.eye(4))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(in_place))


def test_what_is_not_taken_adds_nothing_and_not_its_nan():
    p, x = params(), jnp.eye(4).at[0, 0].set(jnp.nan)
    (_, none), _ = run(plain, p, p, jnp.bool_(False), x, taken=jnp.bool_(False))
    assert same_bits(none, p)
    (_, some), (_, want) = run(
        plain, p, p, jnp.bool_(False), jnp.eye(4), taken=jnp.bool_(True)
    )
    assert distance(some, want) == 0
    (_, opened), _ = run(plain, p, p, jnp.bool_(True), x, taken=jnp.bool_(False))
    assert same_bits(opened, jax.tree.map(lambda s: jnp.full_like(s, -0.0), p))


def test_what_jax_cannot_add_into_a_ref_falls_back_and_leaves_nothing_behind():
    # 0.12 fails on a barrier, versions before on a slice: each traced under each.
    def barrier(p, x):
        return jnp.sum(lax.optimization_barrier(p["a"]) * x) + p["b"][1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.12 says that it needs all ports
        (_, in_place), (_, carried) = run(
            barrier, params(), params(), jnp.bool_(False), jnp.eye(4)
        )
    assert distance(in_place, carried) < 1e-6

    def step(p, sums):
        return add_backward(
            lambda p: (barrier(p, jnp.eye(4)), ((), ())), p, sums, jnp.bool_(False)
        )

    # Refs of a trace that failed would stay in the program, and be copies of the sums.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refs = str(jax.make_jaxpr(step)(params(), params())).count("new_ref")
    assert refs <= len(jax.tree.leaves(params()))


def test_a_gradient_tree_that_has_to_be_built_is_not_hidden(monkeypatch):
    def fails(*args, **options):
        raise NotImplementedError("no ref for this")

    monkeypatch.setattr(refs, "run_isolated", fails)

    @jax.jit
    def step(p, sums):
        return add_backward(
            lambda p: (plain(p, jnp.eye(4)), ((), ())), p, sums, jnp.bool_(False)
        )[1]

    with pytest.warns(UserWarning, match=r"no ref for this.*in_place=False"):
        got = step(params(), params())
    want = jax.tree.map(jnp.add, params(), jax.grad(plain)(params(), jnp.eye(4)))
    assert distance(got, want) < 1e-6


@pytest.mark.parametrize("taken", [None, True, False])
def test_aux_may_hold_what_is_no_array(taken):
    aux = {"name": "relu", "f": jnp.tanh, "n": 3, "none": None, "np": np.arange(2)}

    @jax.jit
    def step(p, sums):
        def fun(p):
            return plain(p, jnp.eye(4)), (p["a"], aux | {"p": p["a"]})

        flag = None if taken is None else jnp.bool_(taken)
        (values, got), sums = add_backward(fun, p, sums, jnp.bool_(False), flag)
        assert {k: got[k] for k in aux} == aux
        return values, got["p"], sums

    values, got, sums = step(params(), params())
    assert same_bits(got, params()["a"])
    zeros = jnp.zeros_like(params()["a"])
    assert same_bits(values, zeros if taken is False else params()["a"])
    assert same_bits(sums, params()) == (taken is False)


def test_an_error_of_the_loss_is_its_own():
    def fails(p, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(fails, params(), params(), jnp.bool_(False), jnp.eye(4))


def test_no_gradient_tree_exists():
    x = jnp.eye(4)

    def step(p, sums):
        return add_backward(
            lambda p: (checkpointed(p, x), ((), ())), p, sums, jnp.bool_(False)
        )[1]

    def carried(p, sums):
        grads = jax.grad(checkpointed)(p, x)
        return jax.tree.map(jnp.add, sums, grads)

    big = {"stack": jnp.ones((64, 4, 4))}
    temp = {}
    for f in (step, carried):
        compiled = jax.jit(f, donate_argnums=1).lower(big, big).compile()
        temp[f] = compiled.memory_analysis().temp_size_in_bytes
    size = big["stack"].nbytes
    # The carried form holds the stacked gradient besides the sums.
    assert temp[carried] - temp[step] > 0.9 * size
