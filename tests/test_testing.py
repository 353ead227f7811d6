"""Each fault of an accumulated gradient is named, and no right program is accused."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import data, init, loss_fn, microbatches

import accumax
import accumax.testing
from accumax._testing.precise import in_float64

UNEVEN = [8, 8, 5, 3]
coefficients = accumax.testing.coefficients


def tree(seed, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": (5, 4), "b": (5, 4), "c": (7,), "d": ()}
    return {
        name: np.asarray(scale * rng.normal(size=shape), dtype)
        for name, shape in shapes.items()
    }


def trees(k, dtype=np.float32):
    return [tree(i, 1 + 0.3 * i, dtype) for i in range(k)]


def combine(weights, gradients):
    """The sum of weights times gradients, rounded once to float32."""
    return jax.tree.map(
        lambda *x: np.asarray(
            sum(w * np.asarray(a, np.float64) for w, a in zip(weights, x, strict=True)),
            np.float32,
        ),
        *gradients,
    )


def halved(gradients, dtype=jnp.bfloat16):
    """Their mean, each addition rounded."""
    total = jax.tree.map(lambda x: np.zeros(np.shape(x), dtype), gradients[0])
    for grads in gradients:
        total = jax.tree.map(lambda t, g: t + np.asarray(g, dtype), total, grads)
    return jax.tree.map(lambda t: t.astype(np.float32) / len(gradients), total)


def norm(gradient):
    return float(optax.tree.norm(jax.tree.map(jnp.asarray, gradient)))


def clipped(gradients, most):
    factors = [min(1, most / norm(g)) / len(gradients) for g in gradients]
    return combine(factors, gradients)


# From the four gradients to a wrong accumulated one; then the arguments.
SEEDED = {
    "mean of means": (lambda g: combine([0.25] * 4, g), {"weights": UNEVEN}),
    "sum for a mean": (lambda g: combine([1.0] * 4, g), {}),
    "lost tail": (lambda g: combine([1 / 3] * 3 + [0], g), {}),
    "partial window": (lambda g: combine([1 / 6] * 4, g), {"window": 6}),
    "counted twice": (lambda g: combine([0.25, 0.5, 0.25, 0.25], g), {}),
    "left out": (lambda g: combine([0.25, 0, 0.25, 0.25], g), {}),
    "reduced twice over devices": (lambda g: combine([2] * 4, g), {"devices": 8}),
    "clipped each": (lambda g: clipped(g, 11.0), {}),
    "half-precision accumulation": (halved, {}),
    "over-weighted tail": (lambda g: combine([0.25] * 3 + [0.4], g), {}),
}
SCALES = [
    ("sum for a mean", 24 / 24 * np.ones(4), {"weights": UNEVEN}),
    ("sum for a mean", np.array(UNEVEN, float), {"weights": UNEVEN}),
    ("sum for a mean", np.array(UNEVEN) / 6, {"weights": UNEVEN}),
    ("divided twice", np.ones(4) / 16, {}),
    ("divided twice", np.ones(4) / 32, {"devices": 8}),
    ("partial window", np.ones(4) / 6, {}),
    ("partial window", np.ones(4) / 16, {"window": 16}),
    ("partial window", np.ones(4) / 6, {"weights": UNEVEN}),
    ("reduced twice over devices", 3 * np.ones(4) / 4, {}),
    ("reduced twice over devices", 8 * np.array(UNEVEN) / 24, {"weights": UNEVEN}),
    ("wrong scale", 2.0**15 * np.ones(4) / 4, {}),
    ("wrong scale", -np.ones(4) / 4, {}),
    ("wrong scale", 0.0371 * np.ones(4), {"window": 5}),
    ("left out", np.zeros(4), {}),
    ("left out", np.array([0, 0, 0, 1.0]), {}),
    ("lost tail", np.array([0.5, 0.5, 0, 0]), {}),
    ("lost tail", np.array([0.25, 0.25, 0, 0]), {}),
    ("lost tail", np.array([8, 8, 5, 0]) / 21, {"weights": UNEVEN}),
    ("left out", np.array([8, 0, 5, 3]) / 24, {"weights": UNEVEN}),
    ("counted twice", np.array([2, 1, 1, 1]) / 5, {}),
    ("counted twice", np.array([1, 1, 1, 2]) / 5, {}),
    ("counted twice", np.array([2, 0, 1, 1]) / 4, {}),
    ("over-weighted tail", np.array([8, 8, 8, 8]) / 28, {"weights": [8, 8, 8, 4]}),
    ("mean of means", np.ones(4) / 4, {"weights": [8, 8, 8, 4]}),
    ("unknown", np.array([0.1, 0.5, 0.7, 0.2]), {}),
]


@pytest.mark.parametrize("fault", SEEDED)
def test_names_the_seeded_fault(fault):
    wrong, options = SEEDED[fault]
    gradients = trees(4)
    found = coefficients(wrong(gradients), gradients, **options)
    assert found.fault == fault, found
    assert len(found.diagnosis) > 40


@pytest.mark.parametrize(("fault", "values", "options"), SCALES)
def test_names_what_the_coefficients_are(fault, values, options):
    gradients = trees(4)
    found = coefficients(combine(values, gradients), gradients, **options)
    assert found.fault == fault, found
    np.testing.assert_allclose(found.values, values, rtol=1e-4, atol=1e-6)
    assert found.residual < 1e-6


def test_names_a_repeated_dropout_mask():
    rng = np.random.default_rng(0)
    gradients = trees(3)
    masks = [rng.integers(0, 2, (5, 4)) for _ in range(3)]

    def masked(masks):
        pairs = zip(gradients, masks, strict=True)
        return [{**g, "a": g["a"] * m, "b": g["b"] * m} for g, m in pairs]

    fresh, repeated = masked(masks), masked(masks[:1] * 3)
    wrong = combine([1 / 3] * 3, repeated)
    alternatives = {"repeated dropout mask": repeated}
    found = coefficients(wrong, fresh, alternatives=alternatives)
    assert found.fault == "repeated dropout mask", found
    assert coefficients(wrong, fresh).fault in ("leaves differ", "unknown")
    right = combine([1 / 3] * 3, fresh)
    assert coefficients(right, fresh, alternatives=alternatives).fault == "none"


def test_names_swapped_leaves():
    gradients = trees(4)
    wrong = combine([0.25] * 4, gradients)
    wrong["a"], wrong["b"] = wrong["b"], wrong["a"]
    found = coefficients(wrong, gradients)
    assert found.fault == "leaves differ", found
    assert "['a'] has the gradient of ['b']: swapped" in found.diagnosis
    assert "['c'], ['d'] as expected" in found.diagnosis


@pytest.mark.parametrize("stale", ["old", "zero", "twice"])
def test_names_a_stale_leaf(stale):
    gradients = trees(4)
    wrong = combine([0.25] * 4, gradients)
    wrong["a"] = {
        "old": tree(99)["a"],
        "zero": 0 * wrong["a"],
        "twice": 2 * wrong["a"],
    }[stale]
    found = coefficients(wrong, gradients)
    assert found.fault == "leaves differ", found
    told = {"old": "stale", "zero": "is 0", "twice": "coefficients (0.5, 0.5"}
    assert "['a']" in found.diagnosis
    assert told[stale] in found.diagnosis
    np.testing.assert_allclose(found.by_leaf["['b']"], 0.25, rtol=1e-4)
    assert found.by_leaf["['d']"] is None


def test_names_a_gradient_that_no_coefficients_explain():
    found = coefficients(tree(99), trees(4))
    assert found.fault == "unknown", found
    assert found.residual > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("k", [4, 8, 64])
def test_names_a_sum_in_half_precision(dtype, k):
    gradients = [{"w": x} for x in np.random.default_rng(0).normal(size=(k, 300)) + 1.0]
    found = coefficients(halved(gradients, dtype), gradients)
    assert found.fault == "half-precision accumulation", found
    assert jnp.dtype(dtype).name in found.diagnosis
    # Gradients in half precision whose right sum is rounded once are no fault.
    low = [{"w": np.asarray(g["w"], dtype)} for g in gradients]
    mean = combine([1 / k] * k, low)
    assert coefficients(mean, low).fault == "none"
    rounded = jax.tree.map(lambda x: np.asarray(x, dtype), mean)
    assert coefficients(rounded, low).fault == "none"
    if k > 2:
        summed = jax.tree.map(lambda x: np.asarray(x, dtype), halved(low, dtype))
        found = coefficients(summed, low)
        assert found.fault == "half-precision accumulation", found


def test_a_mean_that_is_rounded_to_bfloat16_in_the_end_is_named_in_float32():
    gradients = trees(4)
    mean = combine([0.25] * 4, gradients)
    rounded = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), mean
    )
    found = coefficients(rounded, gradients)
    assert found.fault == "half-precision accumulation", found
    assert "bfloat16" in found.diagnosis


# Degenerate data.


def test_gradients_that_are_too_alike_raise_no_alarm():
    one = tree(0)
    found = coefficients(one, [one] * 4, weights=UNEVEN)
    assert found.fault == "none"
    assert "too alike" in found.diagnosis
    assert np.all(np.isnan(found.values))
    lost = combine([0.75], [one])
    assert coefficients(lost, [one] * 4).fault == "too alike"
    several = combine([4], [one])
    assert coefficients(several, [one] * 4).fault == "sum for a mean"


def test_one_microbatch():
    one = [tree(0)]
    assert coefficients(one[0], one).fault == "none"
    assert coefficients(combine([2], one), one).fault == "reduced twice over devices"
    assert coefficients(combine([0.125], one), one, window=8).fault == "partial window"
    assert coefficients(combine([0], one), one).fault == "left out"
    assert coefficients(tree(1), one).fault == "unknown"


def test_a_microbatch_without_a_gradient():
    gradients = [*trees(3), combine([0], [tree(0)])]
    found = coefficients(combine([0.25] * 4, gradients), gradients)
    assert found.fault == "none"
    assert np.isnan(found.values[3])
    np.testing.assert_allclose(found.values[:3], 0.25, rtol=1e-4)
    zero = gradients[3]
    assert coefficients(zero, [zero] * 2).fault == "none"
    assert coefficients(tree(0), [zero] * 2).fault != "none"


def test_a_microbatch_of_weight_zero():
    gradients, weights = trees(4), [2, 0, 1, 1]
    right = combine(np.array(weights) / 4, gradients)
    assert coefficients(right, gradients, weights=weights).fault == "none"
    wrong = combine([0.25] * 4, gradients)
    assert coefficients(wrong, gradients, weights=weights).fault == "mean of means"


def test_a_leaf_that_is_rounding_alone_raises_no_alarm():
    # As the bias of a key in attention, whose gradient is 0 but for rounding.
    gradients = [{**tree(i), "bias": 1e-8 * tree(50 + i)["c"]} for i in range(4)]
    right = {**combine([0.25] * 4, gradients), "bias": 1e-8 * tree(60)["c"]}
    assert coefficients(right, gradients).fault == "none"


def test_leaves_without_a_gradient_are_ignored():
    def more(gradient):
        ids = np.zeros(2, jax.dtypes.float0)
        return {**gradient, "none": None, "ids": ids, "n": 3, "empty": np.zeros((0, 2))}

    gradients = trees(2)
    right = more(combine([0.5] * 2, gradients))
    found = coefficients(right, [more(g) for g in gradients])
    assert found.fault == "none"
    assert set(found.by_leaf) == {"['a']", "['b']", "['c']", "['d']"}


def test_complex_leaves():
    gradients = [{"z": x["a"] + 1j * x["b"]} for x in trees(3)]
    total = jax.tree.map(lambda *x: sum(x), *gradients)
    assert coefficients(total, gradients).fault == "sum for a mean"
    mean = jax.tree.map(lambda x: x / 3, total)
    assert coefficients(mean, gradients).fault == "none"
    conjugated = jax.tree.map(np.conj, mean)
    assert coefficients(conjugated, gradients).fault == "unknown"


@pytest.mark.parametrize("where", ["accumulated", "microbatch_gradients[1]", "both"])
def test_a_nan_is_a_diagnosis(where):
    gradients = trees(3)
    right = combine([1 / 3] * 3, gradients)
    if where != "accumulated":
        gradients[1]["c"][2] = np.nan
    if where != "microbatch_gradients[1]":
        right["c"][2] = np.inf
    found = coefficients(right, gradients)
    assert found.fault == "non-finite"
    assert ("accumulated" if where == "both" else where) + "['c']" in found.diagnosis
    assert "nan" in str(found)


# Peers.


def test_multisteps_is_a_mean_of_means():
    gradients = [{"w": jnp.asarray(x["a"])} for x in trees(2)]

    def run(tx, **extra):
        state = tx.init(gradients[0])
        for i, grads in enumerate(gradients):
            each = {name: values[i] for name, values in extra.items()}
            got, state = jax.jit(tx.update)(grads, state, **each)
        return coefficients(got, gradients, weights=[3, 1])

    found = run(optax.MultiSteps(optax.identity(), 2))
    assert found.fault == "mean of means", found
    found = run(accumax.accumulate(optax.identity(), 2), weight=[3.0, 1.0])
    assert found.fault == "none", found


def test_multisteps_loses_an_open_window():
    gradients = trees(2)
    tx = optax.MultiSteps(optax.identity(), 4)
    state = tx.init(gradients[0])
    for grads in gradients:
        got, state = tx.update(grads, state)
    assert coefficients(got, gradients, window=4).fault == "left out"


def test_clip_before_multisteps_clips_each():
    gradients = trees(4)
    tx = optax.chain(
        optax.clip_by_global_norm(11.0),
        optax.MultiSteps(optax.identity(), 4).gradient_transformation(),
    )
    state = tx.init(gradients[0])
    for grads in gradients:
        got, state = tx.update(grads, state)
    assert coefficients(got, gradients).fault == "clipped each"


def test_microbatching_sums_in_bfloat16():
    if not hasattr(optax, "microbatching"):  # Optax 0.2.5 has none
        return
    size = 64
    w = jnp.ones(300, jnp.bfloat16)
    x = jax.random.uniform(jax.random.key(0), (size, 300), jnp.bfloat16, 0.5, 1.5)

    def mean(w, x):
        return jnp.mean(x @ w)

    how = optax.microbatching.AccumulationType.MEAN
    peer = optax.microbatching.microbatch(jax.grad(mean), 1, 1, how)
    one = jax.jit(jax.grad(mean))
    gradients = [one(w, part[None]) for part in x]
    found = coefficients(jax.jit(peer)(w, x), gradients)
    assert found.fault == "half-precision accumulation", found
    ours = accumax.grad(mean, microbatch_size=1)
    assert coefficients(jax.jit(ours)(w, x), gradients).fault == "none"


def test_microbatching_repeats_the_dropout_mask():
    def loss(w, x, key):
        mask = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.mean((x * mask) @ w)

    key, w = jax.random.key(0), jnp.ones(20)
    x = jax.random.normal(jax.random.key(1), (8, 20))
    ours = accumax.grad(loss, microbatch_size=4, rng_argnums=2)(w, x, key)
    parts = [x[::2], x[1::2]]  # both have such microbatches
    fresh = [
        jax.grad(loss)(w, part, jax.random.fold_in(key, i))
        for i, part in enumerate(parts)
    ]
    repeated = {
        "repeated dropout mask": [jax.grad(loss)(w, part, key) for part in parts]
    }
    found = coefficients(ours, fresh, alternatives=repeated)
    assert found.fault == "none", found
    if hasattr(optax, "microbatching"):
        how = optax.microbatching.AccumulationType.MEAN
        peer = optax.microbatching.microbatch(jax.grad(loss), 1, 4, how)
        found = coefficients(peer(w, x, key), fresh, alternatives=repeated)
        assert found.fault == "repeated dropout mask", found


@pytest.mark.versions
def test_jax_before_0_11_gives_each_of_two_leaves_the_gradient_of_the_other():
    def loss(p, x):
        def layer(h, w):
            return jnp.tanh(h @ w[0]) @ w[1], None

        h, _ = jax.lax.scan(layer, x, (p["a"] * 2.0, p["b"]))
        return jnp.mean(h**2)

    rng = np.random.default_rng(0)
    params = {x: jnp.asarray(rng.normal(size=(3, 4, 4)) / 2, jnp.float32) for x in "ab"}
    parts = jnp.asarray(rng.normal(size=(4, 6, 4)), jnp.float32)

    @jax.jit
    def accumulated(params):
        refs = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), params)
        for part in parts:
            _, vjp = jax.vjp(functools.partial(loss, x=part), params)
            vjp.with_refs(refs)(jnp.float32(1 / len(parts)))
        return jax.tree.map(jax.freeze, refs)

    gradients = [jax.jit(jax.grad(loss))(params, part) for part in parts]
    found = coefficients(accumulated(params), gradients)
    if jax.__version_info__ < (0, 11):
        assert found.fault == "leaves differ", found
        assert "['a'] has 2 times the gradient of ['b']: swapped" in found.diagnosis
    else:
        assert found.fault == "none", found


# Right programs.


def right_program(seed):
    """A random tree, dtype, k and weights, and their mean from NumPy or `accumax`."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 9))
    dtype = [np.float32, np.float32, jnp.bfloat16, np.float16][rng.integers(4)]
    weights = None if rng.integers(2) else rng.integers(1, 9, k)
    # Of few sizes, since JAX compiles each operation for each shape.
    sizes = [1, 2, 7, 39]
    shapes = [(sizes[rng.integers(4)], 3), (sizes[rng.integers(1, 4)],), (), (4, 4)]
    shapes = [(9,), *shapes[: rng.integers(1, 5)]]
    common = rng.choice([0.0, 1.0, 30.0])  # how alike the microbatches are
    scales = 10.0 ** rng.integers(-3, 3, len(shapes))
    means = [rng.normal(size=shape) for shape in shapes]
    gradients = [
        [
            jnp.asarray(s * (common * m + rng.normal(size=m.shape)), dtype)
            for s, m in zip(scales, means, strict=True)
        ]
        for _ in range(k)
    ]
    w = np.ones(k) if weights is None else weights
    if seed % 2 == 0:
        # One rounding after each operation, in float32; then the gradient's dtype.
        total = [np.zeros(shape, np.float32) for shape in shapes]
        for each, grads in zip(w, gradients, strict=True):
            total = [
                t + np.float32(each) * np.asarray(g, np.float32)
                for t, g in zip(total, grads, strict=True)
            ]
        mean = [jnp.asarray(t / np.float32(np.sum(w)), dtype) for t in total]
    else:
        tx = accumax.accumulate(optax.identity(), k)
        state = tx.init(gradients[0])
        for each, grads in zip(w, gradients, strict=True):
            mean, state = tx.update(grads, state, weight=float(each))
    return mean, gradients, weights


@pytest.mark.parametrize("seed", [1, *range(0, 58, 2)])
def test_a_right_program_raises_no_alarm(seed):
    mean, gradients, weights = right_program(seed)
    found = coefficients(mean, gradients, weights=weights)
    assert found.fault == "none", found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 260))
def test_no_right_program_raises_an_alarm(seed):
    mean, gradients, weights = right_program(seed)
    found = coefficients(mean, gradients, weights=weights)
    assert found.fault == "none", found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_no_right_value_and_grad_raises_an_alarm(seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 7))
    rows, dtype = int(rng.integers(1, 5)), [jnp.float32, jnp.bfloat16][seed % 2]
    params = init(dtype, seed)
    batch = data(1, dtype, rows * k)[0]
    got = jax.jit(accumax.grad(loss_fn, microbatches=k))(params, batch)
    parts = [jax.tree.map(lambda x, i=i: x[i::k], batch) for i in range(k)]
    found = coefficients(got, [jax.grad(loss_fn)(params, part) for part in parts])
    assert found.fault == "none", found


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"microbatch_gradients": []}, ValueError, "microbatch_gradients is empty"),
        ({"microbatch_gradients": tree(0)}, TypeError, "is a dict; expected a list"),
        ({"microbatch_gradients": trees(60)}, ValueError, "has 48 numbers"),
        (
            {"microbatch_gradients": [{"a": 1.0}]},
            ValueError,
            r"\[0\]\['a'\] is float32",
        ),
        ({"accumulated": {"a": tree(0)["a"]}}, ValueError, "nothing to differentiate"),
        ({"accumulated": {}}, ValueError, "nothing to differentiate"),
        (
            {"weights": [1, 2, 3]},
            ValueError,
            r"weights has shape \(3,\), but there are 2",
        ),
        ({"weights": [1, -1]}, ValueError, "not negative"),
        ({"weights": [0, 0]}, ValueError, "not all 0"),
        ({"weights": [1, np.nan]}, ValueError, "must be finite"),
        ({"tolerance": 0}, ValueError, "tolerance=0 must be"),
        ({"devices": 0}, ValueError, "devices=0 must be at least 1"),
        ({"devices": 1.5}, TypeError, "devices=1.5 must be an integer"),
        ({"window": 1}, ValueError, "window=1 must be at least 2"),
        (
            {"alternatives": {"x": trees(3)}},
            ValueError,
            "'x'] has 3; expected a list of",
        ),
        ({"alternatives": {"x": [{}] * 2}}, ValueError, "nothing to differentiate"),
        ({"weigths": [1, 1]}, TypeError, "weigths"),
    ],
)
def test_bad_input_is_an_error_that_names_it(change, error, match):
    arguments = {"accumulated": tree(0), "microbatch_gradients": trees(2), **change}
    if change.get("microbatch_gradients") == 40:
        arguments["accumulated"] = tree(0)
    with pytest.raises(error, match=match):
        coefficients(
            arguments.pop("accumulated"),
            arguments.pop("microbatch_gradients"),
            **arguments,
        )


# One window of a step beside the big batch.

SIZES = [6, 6, 6, 6]
SGD = optax.sgd(1.0)
check_update = accumax.testing.check_update


def window_of(sizes):
    return microbatches(data(1)[0], sizes)


def by_optax(tx):
    """A step as users of Optax write it."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


@pytest.mark.parametrize(
    "inner",
    [SGD, pytest.param(optax.adamw(0.1), marks=pytest.mark.slow)],
    ids=["sgd", "adamw"],
)
def test_a_right_step_passes_and_its_arguments_live(inner):
    params, tx = init(), accumax.accumulate(inner, 4)
    state, reference = tx.init(params), (loss_fn, inner)
    hides = pytest.warns(UserWarning, match="twice the size")
    with contextlib.nullcontext() if inner is SGD else hides:
        report = check_update(
            by_optax(tx), params, state, window_of(SIZES), reference=reference
        )
    assert report.passed
    assert report.distances[0].path == "['layer']['b']"
    assert all(0 <= x.ratio <= 2 for x in report.distances)
    if inner is SGD:
        assert report.coefficients.fault == "none"
    else:
        assert "pass gradient=" in str(report)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, state)))


def test_an_uneven_multisteps_fails_with_its_diagnosis():
    tx = optax.MultiSteps(SGD, 4)
    with pytest.raises(AssertionError, match="mean of means") as error:
        check_update(
            by_optax(tx),
            init(),
            tx.init(init()),
            window_of([9, 9, 3, 3]),
            reference=(loss_fn, SGD),
        )
    assert "['layer']['w']" in str(error.value)
    assert "wrong" in str(error.value)
    assert "(9, 9, 3, 3)" in str(error.value)


def test_a_window_that_does_not_close_fails():
    tx = optax.MultiSteps(SGD, 5)
    with pytest.raises(AssertionError, match="fault: left out"):
        check_update(
            by_optax(tx),
            init(),
            tx.init(init()),
            window_of(SIZES),
            reference=(loss_fn, SGD),
        )


@pytest.mark.slow
def test_a_train_state_and_the_gradient_of_adam():
    train_state = pytest.importorskip("flax.training.train_state")
    adam = optax.adam(0.1)
    state = train_state.TrainState.create(
        apply_fn=None, params=init(), tx=optax.MultiSteps(adam, 4)
    )

    def call(step, params, state, microbatch):
        state = step(state, microbatch)
        return state.params, state

    def gradient(before, after, state):
        mu = optax.tree.get(state.opt_state, "mu")
        return jax.tree.map(lambda m: m / 0.1, mu)

    @jax.jit
    def step(state, batch):
        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params, batch))

    check = functools.partial(
        check_update,
        step,
        init(),
        state,
        reference=(loss_fn, adam),
        call=call,
        gradient=gradient,
    )
    assert check(window_of(SIZES)).coefficients.fault == "none"
    with pytest.raises(AssertionError, match="mean of means"):
        check(window_of([9, 9, 3, 3]))


@pytest.mark.slow
def test_adam_does_not_hide_a_mean_of_means():
    adam = optax.adam(0.1)
    tx = optax.MultiSteps(adam, 4)
    with pytest.raises(AssertionError, match="pass gradient="):
        check_update(
            by_optax(tx),
            init(),
            tx.init(init()),
            window_of([9, 9, 3, 3]),
            reference=(loss_fn, adam),
        )


@pytest.mark.parametrize(
    "inner",
    [
        optax.adamw(0.1),
        optax.lion(0.1),
        optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(0.1)),
        optax.chain(optax.clip_by_global_norm(1e-3), SGD),
    ],
)
def test_an_optimizer_that_hides_the_scale_is_named(inner):
    tx = accumax.accumulate(inner, 4, reduction="sum")  # which is four times the mean
    params = {"w": jnp.ones(3)}

    def loss(params, batch):
        return jnp.mean(batch @ params["w"])

    with pytest.warns(UserWarning, match="gradient of twice the size"):
        report = check_update(
            jax.jit(accumax.train_step(loss, tx)),
            params,
            tx.init(params),
            jnp.split(jnp.arange(1.0, 25).reshape(8, 3), 4),
            reference=(loss, inner),
        )
    assert report.passed
    assert "optax.sgd(1.0)" in report.note


def test_a_diagnosis_without_the_tokens_of_each_microbatch_asks_for_them():
    masks = [jnp.arange(4) < n for n in (1, 2, 4)]
    parts = jnp.split(jnp.arange(1.0, 37).reshape(12, 3) / 20, 3)
    calls = [{"x": x, "mask": m} for x, m in zip(parts, masks, strict=True)]

    def sums(params, batch):
        each = (batch["x"] @ params["w"]) ** 2 * batch["mask"]
        return each.sum(), batch["mask"].sum().astype(float)

    def mean(params, batch):
        total, count = sums(params, batch)
        return total / count

    params, tx = {"w": jnp.ones(3)}, accumax.accumulate(SGD, 3)
    check = functools.partial(
        check_update, params=params, microbatches=calls, reference=(mean, SGD)
    )
    right = jax.jit(accumax.train_step(sums, tx, weighted=True))
    report = check(right, opt_state=tx.init(params))
    assert "pass them as weights=" in report.note
    report = check(right, opt_state=tx.init(params), weights=[1, 2, 4])
    assert report.coefficients.fault == "none"
    assert report.note == ""
    wrong = jax.jit(accumax.train_step(mean, tx))
    with pytest.raises(AssertionError, match="pass them as weights="):
        check(wrong, opt_state=tx.init(params))


@pytest.mark.slow
def test_a_step_that_splits_the_batch_itself():
    grad = accumax.grad(loss_fn, microbatch_size=7)

    @jax.jit
    def step(params, opt_state, batch):
        return jax.tree.map(lambda p, g: p - g, params, grad(params, batch)), opt_state

    report = check_update(
        step, init(), (), window_of(SIZES), reference=(loss_fn, SGD), once=True
    )
    assert report.passed


@pytest.mark.slow
def test_a_function_as_reference():
    def reference(params, batch):
        grads = jax.jit(jax.grad(loss_fn))(params, batch)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    tx = accumax.accumulate(optax.sgd(0.5), 4)
    step, state = by_optax(tx), tx.init(init())
    report = check_update(step, init(), state, window_of(SIZES), reference=reference)
    assert report.passed
    assert "pass reference=(loss_fn, optimizer)" in str(report)


@pytest.mark.slow
def test_bfloat16_parameters_pass():
    params, tx = init(jnp.bfloat16), accumax.accumulate(SGD, 4)
    parts = microbatches(data(1, jnp.bfloat16)[0], SIZES)
    report = check_update(
        by_optax(tx), params, tx.init(params), parts, reference=(loss_fn, SGD)
    )
    assert report.passed


@pytest.mark.slow
def test_a_gradient_that_rounding_hides_is_not_diagnosed():
    sgd = optax.sgd(1e-6)
    tx = accumax.accumulate(sgd, 4)
    report = check_update(
        by_optax(tx),
        init(),
        tx.init(init()),
        window_of(SIZES),
        reference=(loss_fn, sgd),
    )
    assert report.coefficients is None
    assert "use a larger learning rate" in report.note


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"reference": (SGD, loss_fn)}, TypeError, "in this order"),
        ({"reference": SGD}, TypeError, "reference="),
        ({"reference": lambda p, b: {}}, ValueError, "reference returned no parameter"),
        ({"microbatches": []}, ValueError, "those of one window"),
        ({"microbatches": [{"x": 1.0}]}, ValueError, "a scalar at"),
        (
            {"microbatches": [{"x": np.ones(2)}, {}]},
            ValueError,
            r"microbatches\[1\] is",
        ),
        ({"factor": 0.5}, ValueError, "factor=0.5 must be"),
        ({"step": lambda p, s, b: p}, TypeError, "step returned a dict"),
        (
            {"step": lambda p, s, b: ({}, s)},
            ValueError,
            "the parameters after the step",
        ),
        ({"refrence": 1}, TypeError, "refrence"),
    ],
)
def test_bad_arguments_of_check_update_are_errors(change, error, match):
    arguments = {
        "step": lambda p, s, b: (p, s),
        "params": init(),
        "opt_state": (),
        "microbatches": window_of([12, 12]),
        "reference": (loss_fn, SGD),
        **change,
    }
    with pytest.raises(error, match=match):
        check_update(**arguments)


def test_a_step_with_fewer_numbers_than_microbatches_passes_without_a_diagnosis():
    params, tx = {"s": jnp.float32(2)}, accumax.accumulate(SGD, 4)

    def loss(params, x):
        return jnp.mean((x * params["s"] - 1) ** 2)

    report = check_update(
        jax.jit(accumax.train_step(loss, tx)),
        params,
        tx.init(params),
        jnp.split(jnp.arange(8.0) / 8, 4),
        reference=(loss, SGD),
    )
    assert report.passed
    assert report.coefficients is None
    assert "fewer numbers than microbatches" in report.note


def test_an_equinox_module_and_a_batch_with_a_scalar_can_be_checked():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    parts = [{"c": jnp.float32(1), "x": x} for x in jnp.split(jnp.ones((8, 3)), 2)]

    def loss(model, batch):
        return batch["c"] * jnp.mean(jax.vmap(model)(batch["x"]) ** 2)

    def join(parts):
        return {"c": parts[0]["c"], "x": jnp.concatenate([p["x"] for p in parts])}

    tx = accumax.accumulate(SGD, 2)
    report = check_update(
        eqx.filter_jit(accumax.train_step(loss, tx)),
        model,
        tx.init(model),
        parts,
        reference=(loss, SGD),
        join=join,
    )
    assert report.passed
    assert report.coefficients.fault == "none"


@pytest.mark.parametrize("out", [None, (1, 2, 3)])
def test_a_call_that_returns_no_pair_is_named(out):
    with pytest.raises(
        TypeError, match=r"call returned .* expected \(params, opt_state\)"
    ):
        check_update(
            by_optax(SGD),
            init(),
            SGD.init(init()),
            window_of(SIZES),
            reference=(loss_fn, SGD),
            call=lambda *args: out,
        )


def logits_loss(params, batch):
    """One bias for all logits: its gradient is 0, but for rounding."""
    x, labels = batch
    logits = x @ params["w"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def never_closes(params, opt_state, batch):
    del batch
    return params, opt_state


def sums_up(params, opt_state, batch):
    grads = jax.grad(logits_loss)(params, batch)
    return jax.tree.map(lambda p, g: p - g, params, grads), opt_state


@pytest.mark.parametrize("step", [never_closes, sums_up])
def test_parameters_without_a_gradient_do_not_excuse_the_others(step):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.float32(rng.normal(size=(4, 3))),
        "bias": jnp.float32(rng.normal()),
    }
    x, labels = (
        jnp.float32(rng.normal(size=(24, 4))),
        jnp.asarray(rng.integers(3, size=24)),
    )
    parts = [(x[i : i + 6], labels[i : i + 6]) for i in range(0, 24, 6)]
    reference = logits_loss, optax.sgd(1.0)
    with pytest.raises(AssertionError, match=r"\['w'\].*wrong"):
        accumax.testing.check_update(step, params, (), parts, reference=reference)
    tx = accumax.accumulate(optax.sgd(1.0), 4)
    right = jax.jit(accumax.train_step(logits_loss, tx))
    accumax.testing.check_update(
        right, params, tx.init(params), parts, reference=reference
    )


@pytest.mark.parametrize("weights", [None, [6, 6, 6, 6]])
def test_a_loss_that_couples_the_rows_is_told(weights):
    def root(params, batch):
        return jnp.sqrt(loss_fn(params, batch))

    tx = accumax.accumulate(optax.sgd(1.0), 4)
    step = jax.jit(accumax.train_step(root, tx))
    with pytest.raises(AssertionError, match="couples the rows"):
        accumax.testing.check_update(
            step,
            init(),
            tx.init(init()),
            window_of([6, 6, 6, 6]),
            reference=(root, optax.sgd(1.0)),
            weights=weights,
        )


@pytest.mark.parametrize(
    ("factor", "fault", "words"),
    [
        (6.0, "sum for a mean", "sum over its 6 rows"),
        (1 / 6, "divided twice", "weighted=True a loss returns the sum"),
    ],
)
@pytest.mark.parametrize("rows", [[6, 6, 6, 6], [6, 6, 8, 4]])
def test_a_factor_of_the_rows_of_a_microbatch(factor, fault, words, rows):
    parts = trees(4)
    even = len(set(rows)) == 1
    weights = factor * np.array(rows) / 24 if even else np.full(4, factor / 4)
    found = coefficients(combine(weights, parts), parts, weights=rows)
    assert found.fault == fault
    assert words in " ".join(str(found).split())


def dropped(params, batch):
    """A loss that draws a mask for each row, from a key that the row has."""
    hidden = jnp.tanh(batch["x"] @ params["w"])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (6,)))(batch["key"])
    return jnp.mean((2 * hidden * keep @ params["v"] - batch["x"][:, 0]) ** 2)


def halved_products(params, batch):
    """A loss of float32 parameters that computes in bfloat16."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    hidden = jnp.tanh(batch["x"].astype(jnp.bfloat16) @ half["w"])
    out = (hidden @ half["v"]).astype(jnp.float32)
    return jnp.mean((out - batch["x"][:, 0]) ** 2)


def drawn(sizes):
    keys = jax.random.split(jax.random.key(3), sum(sizes))
    x = jax.random.normal(jax.random.key(1), (sum(sizes), 5))
    ends = np.cumsum(sizes)[:-1]
    return [
        {"x": a, "key": b}
        for a, b in zip(jnp.split(x, ends), jnp.split(keys, ends), strict=True)
    ]


def two_matrices():
    keys = jax.random.split(jax.random.key(0))
    return {
        "w": 0.5 * jax.random.normal(keys[0], (5, 6)),
        "v": jax.random.normal(keys[1], (6,)),
    }


WRONG = {
    "none": (1.0, "mean", 4, [4, 4, 4, 4]),
    "mean of means": (1.0, "mean", 4, [5, 5, 5, 1]),
    "sum for a mean": (1.0, "sum", 4, [4, 4, 4, 4]),
    "wrong scale": (-0.3, "mean", 4, [4, 4, 4, 4]),
    "lost tail": (1.0, "mean", 3, [4, 4, 4, 4]),
}


@pytest.mark.parametrize("loss", [dropped, halved_products])
@pytest.mark.parametrize("fault", WRONG)
def test_random_numbers_and_half_precision_hide_no_fault(fault, loss):
    """The truth is the reference's own program in float64: the masks are the same."""
    scale, reduction, every, sizes = WRONG[fault]
    tx = accumax.accumulate(SGD, every, reduction=reduction)
    step = jax.jit(accumax.train_step(lambda p, b: scale * loss(p, b), tx))
    params = two_matrices()
    check = functools.partial(
        check_update, step, params, tx.init(params), drawn(sizes), reference=(loss, SGD)
    )
    if fault == "none":
        report = check()
        assert report.passed
        assert report.coefficients.fault == "none"
    else:
        with pytest.raises(AssertionError, match=f"fault: {fault}"):
            check()


def test_a_reference_that_is_not_finite_or_not_exact_is_told():
    def overflows(params, batch):
        return jnp.mean(jnp.log(1 + jnp.exp(200 * batch["x"] @ params["w"])))

    params, parts = two_matrices(), drawn([4, 4])
    tx = accumax.accumulate(SGD, 2)
    step = accumax.train_step(overflows, tx)
    with pytest.raises(ValueError, match="own update is not finite at "):
        check_update(step, params, tx.init(params), parts, reference=(overflows, SGD))
    # In bfloat16, a step of 1e-4 is rounded away, and any step passes.
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    small = optax.sgd(1e-5)
    tx = accumax.accumulate(small, 2)
    step = accumax.train_step(dropped, tx)
    with pytest.warns(UserWarning, match="precision hides faults of that size"):
        check_update(step, params, tx.init(params), parts, reference=(dropped, small))


@pytest.mark.parametrize("part", ["an update", "a part of the update"])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_parameters_that_move_within_the_window_are_named(part, rate):
    sgd = optax.sgd(rate)

    def step(params, state, batch):
        grads = jax.grad(dropped)(params, batch)
        size = rate if part == "an update" else rate / 4
        return jax.tree.map(lambda p, g: p - size * g, params, grads), state

    with pytest.raises(AssertionError, match=f"fault: {part} in every microbatch"):
        check_update(step, two_matrices(), (), drawn([4] * 4), reference=(dropped, sgd))


def test_a_fault_that_the_optimizer_hides_is_told():
    adam = optax.adam(1e-3)
    tx = accumax.accumulate(adam, 4, reduction="sum")
    params = two_matrices()
    with pytest.warns(UserWarning, match="and the gradient is not: sum for a mean"):
        check_update(
            jax.jit(accumax.train_step(dropped, tx)),
            params,
            tx.init(params),
            drawn([4] * 4),
            reference=(dropped, adam),
            gradient=lambda before, after, state: jax.tree.map(
                lambda m: m / 0.1, optax.tree.get(state, "mu")
            ),
        )


def test_a_step_of_other_arguments_is_told_of_call():
    def step(params, state, x, key):
        return params, state

    with pytest.raises(
        TypeError, match=r"pass call=, such as .*\(params, opt_state, x"
    ):
        check_update(step, two_matrices(), (), drawn([2, 2]), reference=(dropped, SGD))


def mixed(p, x):
    """Most kinds of operations, and each kind of a program within a program."""
    key = jax.random.key(0)
    hidden = jax.checkpoint(
        lambda x: jnp.tanh(x @ p) * jax.random.bernoulli(key, 0.5, (3, 4))
    )(x)
    hidden = jax.nn.relu(hidden.astype(jnp.bfloat16)).astype(jnp.float32)
    hidden, rows = jax.lax.scan(
        lambda c, w: (jnp.sin(c) + w[None], c[0]), hidden, p[:3], reverse=True
    )
    hidden = jax.lax.cond(hidden[0, 0] > 0, jnp.cos, lambda h: 2 * h, hidden)
    count = jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1.0, x)
    looped = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p), hidden)
    sums = jax.ops.segment_sum(looped, jnp.array([0, 1, 0]), 2)
    most = jax.ops.segment_max(looped, jnp.array([0, 1, 0]), 2)
    rated = jax.random.gamma(key, jax.nn.softplus(p) + 1) + jax.random.normal(
        key, (4, 4)
    )
    picked = p[jnp.argmax(x, -1)] * jax.lax.stop_gradient(count)
    spectrum = jnp.abs(jnp.fft.fft(looped)) ** 2
    parts = rows, sums, most, rated, picked, spectrum, jnp.sort(p, 0), jnp.cumsum(p)
    return sum(jnp.mean(part) for part in parts) + optax.safe_norm(p, 1e-6)


def test_a_program_runs_in_float64_as_it_was_traced():
    p, x = (jax.random.normal(jax.random.key(i), (n, 4)) for i, n in ((1, 4), (2, 3)))
    own = jax.value_and_grad(mixed)(p, x)
    found = in_float64(jax.value_and_grad(mixed), p, x)
    assert {a.dtype for a in jax.tree.leaves(found)} == {np.dtype(np.float64)}
    np.testing.assert_allclose(own[0], found[0], rtol=3e-3)
    np.testing.assert_allclose(own[1], found[1], rtol=3e-2, atol=3e-3)

    # Without bfloat16 and draws that depend on the dtype, it is what x64 gives.
    def plain(p, x):
        return optax.softmax_cross_entropy_with_integer_labels(
            jnp.tanh(x @ p), jnp.arange(3)
        ).mean()

    found = in_float64(jax.grad(plain), p, x)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (p, x)]
        want = jax.grad(plain)(*wide)
    np.testing.assert_allclose(found, want, rtol=1e-12)


def test_what_cannot_run_as_it_is_gets_float64_arrays():
    def counts(p, x):
        total = jax.new_ref(jnp.zeros((), p.dtype))
        total[...] += jnp.sum(x @ p)
        return total[...] / 3

    def looks(p, x):
        return p * float(x.sum())

    x = jnp.arange(6.0).reshape(3, 2)
    for fun in (counts, looks):
        found = in_float64(fun, jnp.ones((2, 2)), x)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, fun(jnp.ones((2, 2)), x), rtol=1e-6)


def test_a_scatter_that_applies_a_function_is_not_taken_for_a_set():
    x = jnp.arange(3.0)
    found = in_float64(lambda x: x.at[1].apply(jnp.sin), x)
    np.testing.assert_allclose(found, [0, np.sin(1.0), 2], rtol=1e-12)


def test_random_numbers_that_would_be_others_are_an_error():
    def solves(params, batch):
        matrix = jnp.eye(6) + params["w"].T @ params["w"]
        return dropped(params, batch) + jnp.sum(jnp.linalg.solve(matrix, params["v"]))

    tx, params = accumax.accumulate(SGD, 2), two_matrices()
    step = jax.jit(accumax.train_step(solves, tx))
    with pytest.raises(ValueError, match="draws random numbers, and has an operation"):
        check_update(
            step, params, tx.init(params), drawn([4, 4]), reference=(solves, SGD)
        )


def test_integers_of_numpy_are_what_is_traced():
    table = np.arange(3)  # int64
    found = in_float64(lambda i, x: x[i] * 2, table, jnp.arange(4.0))
    np.testing.assert_array_equal(found, [0, 2, 4])
