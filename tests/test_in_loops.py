"""Gradients in the turns of a loop that JAX differentiates.

JAX takes such a loop apart, also if what is differentiated is not ours: what is the
same in each turn moves before the loop. JAX 0.12 then lost gradients in place.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import accumax

OLD = jax.__version_info__ < (0, 11)  # an error of JAX; `in_place=False` is right
# So it is in newer ones where a loop of ours carries the sums.
IN_SCAN = (
    "grad",
    "grad, a tail",
    "grad, weighted",
    "two losses",
    "two losses, unrolled",
    "step, microbatches",
    "microbatch",
)
W = jnp.float32(np.random.default_rng(0).normal(size=4)) / 3
X = jnp.float32(np.random.default_rng(1).normal(size=(3, 6, 4)))


def loss_fn(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def weighted(w, x):
    return loss_fn(w, x) * len(x), jnp.float32(len(x))


def by_grad(loss=loss_fn, **options):
    return accumax.grad(loss, **options), jax.grad(loss_fn)


def of_two(**options):
    want = jax.grad(lambda w, x: 2 * loss_fn(w, x))
    return accumax.grad([loss_fn, loss_fn], **options), want


def by_steps(loss=loss_fn, **options):
    tx = accumax.accumulate(optax.sgd(0.5), 2)

    def trained(w, x):
        state = tx.init(w)
        for _ in range(2):
            w, state, _ = accumax.train_step(loss, tx, **options)(w, state, x)
        return w

    return trained, lambda w, x: w - 0.5 * jax.grad(loss_fn)(w, x)


def recomputed(**options):
    def gradient(fun):
        return jax.grad(lambda w, x: jnp.sum(fun(w, x) ** 3))

    def fun(w, x):
        return jnp.tanh(x @ w)

    return gradient(accumax.microbatch(fun, **options)), gradient(fun)


UNROLLED = {"microbatch_size": 2, "unroll": True}
TOKENS = {"loss": weighted, "weighted": True}
FORMS = {
    "grad": by_grad(microbatch_size=2),
    "grad, a tail": by_grad(microbatch_size=4),
    "grad, one microbatch": by_grad(microbatch_size=6, unroll=True),
    "grad, unrolled": by_grad(**UNROLLED),
    "grad, weighted": by_grad(microbatch_size=2, **TOKENS),
    "grad, weighted, unrolled": by_grad(**UNROLLED, **TOKENS),
    "two losses": of_two(microbatch_size=2),
    "two losses, unrolled": of_two(**UNROLLED),
    "step": by_steps(),
    "step, weighted": by_steps(**TOKENS),
    "step, microbatches": by_steps(microbatch_size=2),
    "step, unrolled": by_steps(**UNROLLED),
    "microbatch": recomputed(microbatch_size=2),
    "microbatch, unrolled": recomputed(**UNROLLED),
}


def scan(f, a):
    return lax.scan(lambda total, x: (total + f(a, x), None), 0.0, X)[0]


def scan_with_checkpoints(f, a):
    body = jax.checkpoint(lambda total, x: (total + f(a, x), None))
    return lax.scan(body, 0.0, X)[0]


def map_(f, a):
    return jnp.sum(lax.map(functools.partial(f, a), X))


def fori(f, a):
    return lax.fori_loop(0, len(X), lambda i, total: total + f(a, X[i]), 0.0)


def nested(f, a):
    def turn(total, x):
        return scan(lambda a, other: f(a, x + other), a) + total, None

    return lax.scan(turn, 0.0, X)[0]


# Where the parameters and the rows of the gradient come from.
SOURCES = {
    "constant": lambda a, x: (W, x),
    "all constant": lambda a, x: (W, X[0]),
    "stopped": lambda a, x: (lax.stop_gradient(a), x),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loop", [scan, scan_with_checkpoints, map_, fori, nested])
def test_a_loop_that_is_differentiated_leaves_the_gradient_as_it_is(loop, form, source):
    def outer(gradient):
        def turn(a, x):
            grads = gradient(*SOURCES[source](a, x))
            return loss_fn(a * lax.stop_gradient(grads), x)

        return jax.jit(jax.value_and_grad(functools.partial(loop, turn)))

    ours, theirs = FORMS[form]
    want = outer(theirs)(W)
    try:
        got = outer(ours)(W)
    except ValueError:
        assert OLD or form in IN_SCAN
        return
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("form", [x for x in FORMS if x.startswith("grad")])
def test_a_gradient_in_place_has_a_derivative_where_it_is_seen(form):
    def outer(gradient):
        return jax.jit(
            jax.grad(lambda w: sum(loss_fn(w - 0.1 * gradient(w, x), x) for x in X))
        )

    ours, theirs = FORMS[form]
    np.testing.assert_allclose(outer(ours)(W), outer(theirs)(W), atol=1e-6)


@pytest.mark.parametrize("form", ["grad", "grad, unrolled"])
def test_a_derivative_in_a_loop_is_right_or_an_error(form):
    def outer(gradient):
        def turn(w, x):
            return loss_fn(w - 0.1 * gradient(w, x), x)

        return jax.jit(jax.grad(functools.partial(scan, turn)))

    ours, theirs = FORMS[form]
    try:
        got = outer(ours)(W)
    except ValueError:
        return
    np.testing.assert_allclose(got, outer(theirs)(W), atol=1e-6)


def layers(ws, x):
    def layer(h, w):
        return jnp.tanh(h * w), None

    return jnp.mean(lax.scan(layer, x, ws)[0] ** 2)


@pytest.mark.parametrize("loss", [loss_fn, layers])
def test_a_sweep_is_that_of_jax(loss):
    """`vmap` around a loop of steps, as for several seeds or learning rates."""
    ws = jnp.stack([W, 2 * W, -W])

    def train(step):
        def trained(w):
            return lax.scan(lambda w, x: (step(w, x), None), w, X)[0]

        return jax.jit(jax.vmap(trained))

    f = accumax.grad(loss, microbatch_size=2)
    want = train(lambda w, x: w - 0.5 * jax.grad(loss)(w, x))(ws)
    if loss is layers:
        # JAX 0.10 raises before what would name the option.
        with pytest.raises(Exception, match=r"in_place=False|__jax_array__"):
            train(lambda w, x: w - 0.5 * f(w, x))(ws)
        f = accumax.grad(loss, microbatch_size=2, in_place=False)
    got = train(lambda w, x: w - 0.5 * f(w, x))(ws)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("form", ["step", "step, unrolled", "grad, unrolled"])
@pytest.mark.parametrize("where", ["callback", "shard_map"])
def test_an_effect_or_a_mesh_axis_does_not_bring_the_fault_back(form, where):
    seen = []

    def noticed(w, x):
        jax.debug.callback(seen.append, x[0, 0])
        return loss_fn(w, x)

    make, options = by_grad, UNROLLED
    if form.startswith("step"):
        make, options = by_steps, {} if form == "step" else UNROLLED
    ours, theirs = make(noticed if where == "callback" else loss_fn, **options)

    def outer(gradient):
        def turn(a, x):
            return loss_fn(a * lax.stop_gradient(gradient(W, x)), x)

        return jax.value_and_grad(functools.partial(scan, turn))

    want = outer(theirs)(W)
    f = outer(ours)
    if where == "shard_map":
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        none = jax.sharding.PartitionSpec()
        f = jax.shard_map(f, mesh=mesh, in_specs=none, out_specs=none)
    try:
        got = jax.jit(f)(W)
    except (ValueError, AttributeError):
        assert OLD
        return
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    jax.effects_barrier()
    assert seen or where == "shard_map"
