"""Running statistics of a window, against its moments in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import accumax
from accumax._flax import statistics
from accumax._window.state import AccumulateState

START = {"norm": {"mean": np.array([3.0, -1.0]), "var": np.array([2.0, 0.5])}}


def moved(rows, momentum):
    """What a batch normalisation makes of START, in float64."""
    moments = {"mean": rows.mean(0), "var": rows.var(0)}
    return {
        "norm": {
            name: momentum * START["norm"][name] + (1 - momentum) * moments[name]
            for name in moments
        }
    }


def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def pool_of(parts, momentum):
    pool = statistics.begin(f32(START))
    for part in parts:
        pool = statistics.add(pool, f32(moved(part, momentum)), len(part))
    return pool


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]),
    offset=st.sampled_from([0.0, 10.0, -100.0]),
    seed=st.integers(0, 99),
)
def test_a_window_moves_them_by_the_moments_of_all_its_rows(
    sizes, momentum, offset, seed
):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, 1 + i, size=(n, 2)) for i, n in enumerate(sizes)]
    pool = pool_of(parts, momentum)
    got = statistics.result(pool, f32(START), (momentum,))["norm"]
    want = moved(np.concatenate(parts), momentum)["norm"]
    # The rounding of a mean enters the variance twice, times the spread of the means.
    spread = np.ptp([part.mean(0) for part in parts]) + np.abs(want["var"]).max()
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(got["mean"], want["mean"], rtol=8 * eps, atol=8 * eps)
    scale = np.abs(want["mean"]).max() * (1 + spread)
    np.testing.assert_allclose(
        got["var"], want["var"], rtol=16 * eps, atol=8 * eps * scale
    )


def test_one_microbatch_is_its_own_update_to_the_bit():
    rows = np.random.default_rng(0).normal(size=(7, 2))
    got = statistics.result(pool_of([rows], 0.99), f32(START), (0.99,))
    for name in ("mean", "var"):
        assert (got["norm"][name] == f32(moved(rows, 0.99))["norm"][name]).all()


def test_calls_of_microbatches_give_what_their_microbatches_would():
    rng = np.random.default_rng(0)
    parts = [rng.normal(i, 1, size=(n, 2)) for i, n in enumerate((3, 4, 5, 6))]
    calls = statistics.begin(f32(START))
    for pair in (parts[:2], parts[2:]):
        of_call = statistics.result(pool_of(pair, 0.9), f32(START), (0.9,))
        calls = statistics.add(calls, of_call, sum(map(len, pair)))
    got = statistics.result(calls, f32(START), (0.9,))["norm"]
    want = moved(np.concatenate(parts), 0.9)["norm"]
    for name in ("mean", "var"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)


def test_no_weight_adds_nothing_and_a_nan_neither():
    rows = np.random.default_rng(0).normal(size=(7, 2))
    pool = pool_of([rows], 0.9)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), f32(START))
    after = statistics.add(pool, nan, 0)
    jax.tree.map(np.testing.assert_array_equal, pool, after)


def test_an_empty_pool_leaves_them_as_they_were():
    got = statistics.result(statistics.begin(f32(START)), f32(START), (0.9,))
    jax.tree.map(np.testing.assert_array_equal, got, f32(START))


def test_a_momentum_of_1_moves_nothing():
    same = f32(START)
    pool = statistics.begin(same)
    for n in (3, 5):
        pool = statistics.add(pool, same, n)
    jax.tree.map(
        np.testing.assert_array_equal, statistics.result(pool, same, (1.0,)), same
    )


def test_others_are_averaged_and_integers_are_the_latest():
    start = {"sigma": jnp.float32(0), "count": jnp.int32(0)}
    pool = statistics.begin(start)
    for value, rows in ((1.0, 1), (4.0, 2)):
        new = {"sigma": jnp.float32(value), "count": jnp.int32(value)}
        pool = statistics.add(pool, new, rows)
    got = statistics.result(pool, start, ())
    assert (got["sigma"], got["count"]) == (3.0, 4)
    assert got["count"].dtype == jnp.int32


def test_half_precision_statistics_are_pooled_in_float32():
    start = {"mean": jnp.ones(1, jnp.bfloat16)}
    pool = statistics.begin(start)
    for _ in range(1024):
        pool = statistics.add(pool, start, 1)
    got = statistics.result(pool, start, ())
    assert pool.mean["mean"].dtype == jnp.float32
    assert got["mean"].dtype == jnp.bfloat16
    assert got["mean"] == 1


def test_pairs_are_known_by_their_names():
    leaf = np.zeros(1)
    tree = {
        "a": {"mean": leaf, "var": leaf},
        "b": [{"var": leaf, "mean": leaf}, {"mean": leaf}],
        "c": {"mean": {"u": leaf}, "var": leaf},
    }
    assert list(statistics.pairs(tree)) == [("a",), ("b", "0")]
    boxed = {k: nn.Partitioned(leaf, ("x",)) for k in ("mean", "var")}
    assert list(statistics.pairs({"a": boxed})) == [("a",)]
    assert statistics.pairs({}) == statistics.pairs(leaf) == {}


@pytest.mark.parametrize(
    ("momentum", "error", "words"),
    [
        (None, ValueError, "norm, without a momentum"),
        ({"other": 0.9}, ValueError, "norm, without a momentum"),
        ({"norm": {"deeper": 0.9}}, ValueError, "norm, without a momentum"),
        (1.5, ValueError, "not from 0 to 1"),
        (-0.1, ValueError, "not from 0 to 1"),
        (True, TypeError, "Python float"),
        ("0.9", TypeError, "Python float"),
    ],
)
def test_a_momentum_that_is_none_is_refused(momentum, error, words):
    with pytest.raises(error, match=words):
        statistics.check_momenta(
            START, lambda path: statistics.lookup(momentum, path), "It", "Pass one"
        )


def test_a_refused_call_leaves_no_statistics_behind():
    tx = accumax.accumulate(optax.sgd(1.0), 2, nonfinite="skip")
    before = tx.init(jnp.zeros(1))
    _, after = tx.update(jnp.full(1, jnp.nan), before, jnp.zeros(1))
    assert isinstance(after, AccumulateState)
    pool = statistics.begin(f32(START))
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), f32(START))
    pool, same = statistics.after_call(
        pool, f32(START), (0.9,), (nan, 8), before=before, after=after
    )
    assert pool.weight == 0
    jax.tree.map(np.testing.assert_array_equal, same, f32(START))
