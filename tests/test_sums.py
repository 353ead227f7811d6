import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from problems import same_bits

from accumax._sums import accumulator, check_weight

F32 = np.finfo(np.float32).eps
REDUCTIONS = ["mean", "sum", "mean_of_sums"]


def over(steps, grads, weights, args=None):
    """`add` of each gradient, one after the other; then `result`."""
    sums = steps.init(grads[0])
    accepted = []
    args = args or [{}] * len(grads)
    for i, (grad, weight, arg) in enumerate(zip(grads, weights, args, strict=True)):
        weight = jnp.asarray(weight, jnp.float32)
        sums, ok = steps.add(sums, grad, weight, arg, first=i == 0)
        accepted.append(bool(ok))
    return *steps.result(sums), sums, accepted


def expected(reduction, grads, weights):
    grads, weights = np.asarray(grads, np.float64), np.asarray(weights, np.float64)
    weighted = np.tensordot(weights, grads, 1)
    return {
        "mean": weighted / weights.sum(),
        "sum": grads.sum(0),
        "mean_of_sums": grads.sum(0) / weights.sum(),
    }[reduction]


numbers = st.floats(-1e6, 1e6, width=32)
windows = st.lists(
    st.tuples(
        st.tuples(numbers, numbers),
        st.one_of(st.integers(1, 5000), st.floats(2**-10, 2**10, width=32)),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(windows)
def test_any_weights_give_the_weighted_mean_to_float32_rounding(reduction, window):
    grads = [np.array(grad, np.float32) for grad, _ in window]
    weights = [np.float32(weight) for _, weight in window]
    steps = accumulator(reduction=reduction)
    result, _, _, accepted = over(steps, grads, weights)
    assert all(accepted)
    # Any order of n float32 operations stays within (n + 3) eps of the sum of
    # magnitudes.
    bound = expected(reduction, np.abs(grads), weights) * (len(window) + 3) * F32
    want = expected(reduction, grads, weights)
    np.testing.assert_array_less(np.abs(result - want), bound + 1e-30)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.randoms())
def test_any_split_of_a_batch_in_any_order_gives_the_gradient_of_the_batch(
    sizes, random
):
    rows = np.random.default_rng(len(sizes)).normal(size=(sum(sizes), 3))
    ends = list(itertools.accumulate(sizes))
    parts = [rows[end - n : end] for n, end in zip(sizes, ends, strict=True)]
    random.shuffle(parts)
    grads = [part.mean(0).astype(np.float32) for part in parts]
    result, *_ = over(accumulator(), grads, [len(part) for part in parts])
    bound = (len(sizes) + 4) * F32 * np.abs(rows).sum(0)
    np.testing.assert_array_less(np.abs(result - rows.mean(0)), bound)


@given(windows, st.sampled_from(["propagate", "skip", "drop"]))
def test_calls_one_by_one_and_one_scan_over_them_agree_to_the_bit(window, nonfinite):
    grads = np.array([grad for grad, _ in window], np.float32)
    # Powers of two: their products are exact, so that it makes no difference where XLA
    # contracts a product and a sum into one instruction.
    weights = np.array([2.0 ** round(np.log2(weight)) for _, weight in window])
    weights = weights.astype(np.float32)
    grads[len(grads) // 2, 0] = np.nan
    steps = accumulator(nonfinite=nonfinite)

    @jax.jit
    def one(carry, x):
        sums, first = carry
        grad, weight = x
        sums, accepted = steps.add(sums, grad, weight, {}, first=first)
        return (sums, jnp.bool_(False)), accepted

    start = carry = (steps.init(grads[0]), jnp.bool_(True))
    for x in zip(grads, weights, strict=True):
        carry, _ = one(carry, x)
    scanned, _ = jax.lax.scan(one, start, (grads, weights))
    assert same_bits(carry, scanned)


def test_float32_holds_a_sum_that_bfloat16_loses():
    # 1024 ones in bf16 add up to 256: from there on, + 1 is rounded away.
    ones = [jnp.ones(2, jnp.bfloat16)] * 1024
    result, *_ = over(accumulator(reduction="sum"), ones, [1.0] * 1024)
    np.testing.assert_array_equal(result, [1024.0, 1024.0])
    result, _, sums, _ = over(accumulator(dtype=None), ones[:3], [1.0] * 3)
    assert sums.grads.dtype == jnp.bfloat16  # None keeps the gradient's own
    assert result.dtype == jnp.float32  # but the mean is not rounded a second time


def test_a_complex_gradient_stays_complex_in_any_accumulator_dtype():
    grads = [jnp.array([1 + 2j, 3j]), jnp.array([3 - 2j, 1.0 + 0j])]
    for dtype in (jnp.float32, jnp.bfloat16, None):
        result, *_ = over(accumulator(dtype=dtype), grads, [1.0, 1.0])
        np.testing.assert_array_equal(result, [2 + 0j, 0.5 + 1.5j])


@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_a_refused_gradient_leaves_no_trace(nonfinite, bad):
    # 3e38 twice is finite alone and overflows in the sum: as refused as the rest.
    good = [np.float32([1.0, 2.0]), np.float32([3e38, 5.0])]
    steps = accumulator(nonfinite=nonfinite, averaged_args=("value",))
    args = [{"value": 1.0}, {"value": 3.0}, {"value": 100.0}]
    grads = [*good, np.float32([bad, 1.0])]
    result, means, sums, accepted = over(steps, grads, [1, 1, 1], args)
    assert accepted == [True, True, False]
    want, want_means, want_sums, _ = over(steps, good, [1, 1], args[:2])
    assert same_bits((result, means, sums), (want, want_means, want_sums))


@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
def test_a_nan_in_an_averaged_argument_is_refused_too(nonfinite):
    steps = accumulator(nonfinite=nonfinite, averaged_args=("value",))
    grads = [np.float32([1.0])] * 2
    args = [{"value": np.nan}, {"value": 2.0}]
    _, means, _, accepted = over(steps, grads, [1, 1], args)
    assert accepted == [False, True]
    assert means["value"] == 2.0


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "drop"])
@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_an_unusable_traced_weight_is_refused_by_every_policy(nonfinite, weight):
    steps = accumulator(nonfinite=nonfinite)
    grads = [np.float32([1.0]), np.float32([7.0]), np.float32([3.0])]
    result, _, sums, accepted = over(steps, grads, [1.0, weight, 1.0])
    assert accepted == [True, False, True]
    assert result == 2.0
    assert sums.weight == 2.0


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "drop"])
@pytest.mark.parametrize("position", [0, 1])
def test_a_zero_weight_is_not_multiplied_in_because_its_mean_is_nan(
    nonfinite, position
):
    steps = accumulator(nonfinite=nonfinite)
    grads, weights = [np.float32([4.0])], [2.0]
    grads.insert(position, np.float32([np.nan]))
    weights.insert(position, 0.0)
    result, _, sums, accepted = over(steps, grads, weights)
    assert accepted == [True, True]
    assert result == 4.0
    assert sums.weight == 2.0


def test_a_window_without_weight_has_a_finite_result_where_it_becomes_a_select():
    result, means, sums, _ = over(
        accumulator(averaged_args=("value",)),
        [np.float32([np.nan])],
        [0.0],
        [{"value": 1}],
    )
    assert jnp.isfinite(result).all()
    assert jnp.isfinite(means["value"])
    assert sums.weight == 0


def test_the_first_gradient_overwrites_what_a_lost_window_left():
    steps = accumulator()
    sums = steps.init(np.float32([0.0]))
    one = jnp.float32(1)
    sums, _ = steps.add(sums, np.float32([np.nan]), one, {}, first=True)
    sums, _ = steps.add(
        sums._replace(weight=0 * one), np.float32([5.0]), one, {}, first=True
    )
    np.testing.assert_array_equal(steps.result(sums)[0], [5.0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_averaged_args_are_weighted_means_under_every_reduction(reduction):
    steps = accumulator(reduction=reduction, averaged_args=("value",))
    args = [{"value": 2.0, "other": 0.0}, {"value": jnp.bfloat16(5.0), "other": 1.0}]
    _, means, *_ = over(steps, [np.float32(0.0)] * 2, [1.0, 3.0], args)
    assert means == {"value": (2 * 1 + 5 * 3) / 4}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_sums_are_not_weighted_once_more(reduction):
    steps = accumulator(reduction=reduction)
    sums = steps.init(np.float32(0))
    for i, (grad, weight) in enumerate([(6.0, 2.0), (3.0, 1.0)]):
        sums, _ = steps.add(
            sums, np.float32(grad), jnp.float32(weight), {}, first=i == 0, summed=True
        )
    assert steps.result(sums)[0] == (9 if reduction == "sum" else 3)


@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
def test_a_window_that_another_policy_has_lost_is_begun_anew(nonfinite):
    # Resumed after "propagate" let a NaN in: nothing could ever be accepted again.
    lost = accumulator().add
    sums = accumulator().init(np.float32(0))
    one = jnp.float32(1)
    sums, _ = lost(sums, np.float32(np.nan), one, {}, first=True)
    steps = accumulator(nonfinite=nonfinite)
    for grad in (2.0, 4.0):
        sums, accepted = steps.add(sums, np.float32(grad), one, {}, first=False)
        assert accepted
    assert steps.result(sums)[0] == 3
    assert sums.weight == 2


@pytest.mark.parametrize("nonfinite", ["skip", "drop"])
def test_an_argument_that_is_not_averaged_is_not_looked_at(nonfinite):
    steps = accumulator(nonfinite=nonfinite, averaged_args=("value",))
    args = {"value": 1.0, "best": np.inf, "value_fn": lambda p: p, "hess": None}
    _, _, _, accepted = over(steps, [np.float32(1.0)], [1.0], [args])
    assert accepted == [True]


def test_tally_counts_as_add_does_without_the_gradient():
    steps = accumulator(averaged_args=("value",))
    sums = other = steps.init(np.float32([0.0]))
    for i, weight in enumerate([2.0, 0.0, -1.0, np.nan, 3.0]):
        weight, args = jnp.float32(weight), {"value": float(i)}
        sums, a = steps.add(sums, np.float32([0.0]), weight, args, first=i == 0)
        other, b = steps.tally(other, weight, args, first=i == 0)
        assert a == b
        assert same_bits((sums.weight, sums.args), (other.weight, other.args))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"reduction": "avg"}, ValueError, ["reduction='avg'", "mean_of_sums"]),
        ({"nonfinite": "ignore"}, ValueError, ["nonfinite='ignore'", "propagate"]),
        ({"dtype": jnp.int32}, TypeError, ["accumulator_dtype=int32", "floating"]),
        ({"dtype": "spam"}, TypeError, ["accumulator_dtype='spam'"]),
        ({"averaged_args": (1,)}, TypeError, ["averaged_args", "1"]),
        ({"averaged_args": None}, TypeError, ["averaged_args", "None"]),
        ({"averaged_args": ("weight",)}, ValueError, ["averaged_args", "weight"]),
    ],
)
def test_a_bad_option_is_named(options, error, words):
    with pytest.raises(error) as caught:
        accumulator(**options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("weight", "error"),
    [
        (-1, ValueError),
        (float("nan"), ValueError),
        (1e39, ValueError),  # infinite in float32
        (1e-42, ValueError),  # 0 in float32, where XLA flushes
        (10**400, ValueError),
        (np.float32("inf"), ValueError),
        (jnp.float32(-0.5), ValueError),
        (np.ones(3), TypeError),
        (jnp.ones((1,)), TypeError),
        ("4", TypeError),
        (None, TypeError),
        (1j, TypeError),
    ],
)
def test_a_bad_weight_that_is_known_is_an_error(weight, error):
    with pytest.raises(error, match=r"^weight"):
        check_weight(weight)


@pytest.mark.parametrize("weight", [0, 3, True, 2.5, np.int64(4), jnp.bfloat16(2)])
def test_a_weight_may_be_any_real_scalar(weight):
    checked = check_weight(weight)
    assert checked.dtype == jnp.float32
    assert checked == float(weight)
