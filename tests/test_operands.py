"""Gradients in place, for each kind of operand in each place of a loss.

JAX before 0.11 swaps gradients where a scan has refs beside values, and loses some
where a call is handed a ref twice, without a word. So a loss is built for each pair of
a kind of operand and a place that could tell them apart, and its gradient in place is
compared with the carried twin and with `jax.grad`. All operands have one shape, for
then nothing fails. `tests/fuzz.py` combines what this takes one by one.
"""

import functools
import warnings

import flax.linen as nn
import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import accumax
import accumax.nnx

SIZE = 3

# From the parameters a and b to two operands.
KINDS = {
    "two parameters": lambda a, b: (a, b),
    "computed first": lambda a, b: (2.0 * a, b),
    "computed last": lambda a, b: (a, jnp.tanh(b)),
    "cast": lambda a, b: (a.astype(jnp.bfloat16).astype(jnp.float32), b),
    "a view": lambda a, b: (jnp.swapaxes(a, -1, -2), b),
    "conjugated": lambda a, b: (jnp.real(jnp.conj(a * (1 + 2j))), b),
    "stopped": lambda a, b: (lax.stop_gradient(a), b),
    "a constant": lambda a, b: (jnp.full_like(a, 0.5), b),
    "integers": lambda a, b: (jnp.ones(a.shape, jnp.int32), b),
    "one twice": lambda a, b: (b, b),
    "one twice, once computed": lambda a, b: (-b, b),
    "of both": lambda a, b: (a + b, b),
}
FEW = "computed first", "one twice", "one twice, once computed"
# Where nothing is computed from a gradient, which XLA may fuse in one form alone.
AS_THEY_ARE = "two parameters", "stopped", "a constant", "integers"


def mix(h, p, q):
    return jnp.sin(h @ p + h) @ q


def scanned(h, p, q, length=SIZE, **options):
    xs = (p, q) if length == SIZE else (p[:length], q[:length])

    def turn(h, x):
        return mix(h, x[0] * 1, x[1]), None

    return lax.scan(turn, h, xs, length, **options)[0]


def constants(h, p, q):
    return lax.scan(lambda h, _: (mix(h, p, q), None), h, length=SIZE)[0]


def carried(h, p, q):
    def turn(carry, _):
        h, p, q = carry
        return (mix(h, p, q), 0.9 * p, q), None

    return lax.scan(turn, (h, p.astype(h.dtype), q), length=2)[0][0]


def stacked(h, p, q):
    return h + jnp.sum(
        lax.scan(lambda h, x: (h, mix(h, *x)), h, (p, q), SIZE)[1], axis=0
    )


def nested(h, p, q):
    def turn(h, x):
        return constants(h, *x), None

    return lax.scan(turn, h, (p, q))[0]


def whiled(h, p, q):
    steps = lax.while_loop(
        lambda i: i < 3, lambda i: i + 1, jnp.int32(jnp.sum(lax.stop_gradient(p)) > 0)
    )
    return mix(h, p, q) * steps.astype(h.dtype)


def in_cond(fun, h, p, q):
    return lax.cond(jnp.sum(q) > 0, fun, lambda h, p, q: fun(h, q, p), h, p, q)


def switched(h, p, q):
    branches = [lambda: mix(h, p, q), lambda: mix(h, q, p), lambda: h]
    return lax.switch(jnp.int32(jnp.sum(lax.stop_gradient(q)) > 0), branches)


def looped(h, p, q):
    return lax.fori_loop(0, 2, lambda i, h: mix(h, p[i], q[i]), h)


def over_rows(fun, h, p, q):
    return jax.vmap(lambda row: fun(row[None], p, q)[0])(h)


def over_stacks(h, p, q):
    each = jax.vmap(lambda p, q: mix(h, p, q), in_axes=(0, 1), out_axes=1)
    return jnp.sum(each(p, q), axis=1)


def with_rule(fun, h, p, q):
    ruled = jax.custom_vjp(fun)
    ruled.defvjp(
        lambda *args: (fun(*args), args), lambda args, ct: jax.vjp(fun, *args)[1](ct)
    )
    return ruled(h, p, q)


def with_forward_rule(fun, h, p, q):
    ruled = jax.custom_jvp(lambda h, p, q: fun(h, p, q))
    ruled.defjvp(functools.partial(jax.jvp, fun))
    return ruled(h, p, q)


def gathered(h, p, q):
    i = jnp.arange(SIZE)[::-1]
    return mix(h, p[i], q.at[i].get(mode="clip"))


def sliced(h, p, q):
    def part(x, i):
        rows = lax.dynamic_slice_in_dim(x, i, SIZE - 1)
        return jnp.concatenate([rows, x[:1]])

    return mix(h, part(p, 1), part(q, jnp.int32(0)))


# Where a microbatch adds to each gradient once, so that all sums have one order.
ONE_ORDER = {
    "plainly",
    "cond",
    "switch",
    "jit",
    "scan, xs",
    "scan, reversed",
    "scan, unrolled",
    "scan of one",
    "scan of none",
    "scan, stacked",
    "scan of checkpoints",
    "cond around a scan of xs",
    "checkpoint of a scan of xs",
}

SAVED = jax.checkpoint_policies.dots_saveable

MATRICES = {
    "plainly": mix,
    "scan, constants": constants,
    "scan, carry": carried,
    "while loop": whiled,
    "cond": functools.partial(in_cond, mix),
    "cond around a scan": functools.partial(in_cond, constants),
    "switch": switched,
    "jit": jax.jit(mix),
    "jit around a scan": jax.jit(constants),
    "jit twice around a scan": jax.jit(lambda *args: jax.jit(constants)(*args)),
    "vmap around a scan": functools.partial(over_rows, constants),
    "custom_vjp": functools.partial(with_rule, constants),
    "custom_jvp": functools.partial(with_forward_rule, constants),
    "gather": gathered,
    "slices": sliced,
    "checkpoint": jax.checkpoint(constants),
    "checkpoint with a policy": jax.checkpoint(constants, policy=SAVED),
}
STACKS = {
    "scan, xs": scanned,
    "scan, reversed": functools.partial(scanned, reverse=True),
    "scan, unrolled": functools.partial(scanned, unroll=2),
    "scan of one": functools.partial(scanned, length=1),
    "scan of none": functools.partial(scanned, length=0),
    "scan, stacked": stacked,
    "scan in a scan": nested,
    "scan of checkpoints": lambda h, p, q: lax.scan(
        lambda h, x: (jax.checkpoint(mix)(h, *x), None), h, (p, q)
    )[0],
    "fori_loop": looped,
    "vmap": over_stacks,
    "vmap around a scan of xs": functools.partial(over_rows, scanned),
    "cond around a scan of xs": functools.partial(in_cond, scanned),
    "checkpoint of a scan of xs": jax.checkpoint(scanned),
    "custom_jvp of a scan of xs": functools.partial(with_forward_rule, scanned),
}


@pytest.fixture(autouse=True)
def no_words():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="JAX .* in place")
        yield


WAYS = "within", "across", "carried"  # a call, calls, and no refs


def gradients(losses, params, x, ways=lambda name: WAYS):
    """For each loss the gradients by `jax.grad` and by these ways."""

    def found(name, loss):
        def across(params, x):
            tx = accumax.accumulate(optax.sgd(1.0), 1)
            new, *_ = accumax.train_step(loss, tx)(params, tx.init(params), x)
            return jax.tree.map(jnp.subtract, params, new)

        within = functools.partial(accumax.grad, loss, microbatch_size=2)
        forms = {
            "jax.grad": jax.grad(loss),
            "within": within(),
            "across": across,
            "carried": within(in_place=False),
        }
        return {way: forms[way](params, x) for way in ("jax.grad", *ways(name))}

    @jax.jit
    def run(params, x):
        return {name: found(name, loss) for name, loss in losses.items()}

    return jax.device_get(run.lower(params, x).compile(fuzz.FAST)(params, x))


def check(place, kinds):
    matrices = place in MATRICES
    fun = MATRICES[place] if matrices else STACKS[place]
    shape = (SIZE,) * (2 if matrices else 3)
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape) / SIZE, jnp.float32) for name in "abc"
    }
    x = jnp.asarray(rng.normal(size=(4, SIZE)), jnp.float32)

    def loss(kind, params, x):
        out = fun(x, *KINDS[kind](params["a"], params["b"]))  # c is not used
        return jnp.mean(jnp.sum(out**2, axis=-1))

    def ways(kind):
        """Each kind in a form that adds to refs; each form in each place, and kind."""
        if kind in AS_THEY_ARE and place in ONE_ORDER:
            return WAYS  # to the bit
        index = [*MATRICES, *STACKS].index(place) + [*KINDS].index(kind)
        return (WAYS[index % 2],)

    losses = {kind: functools.partial(loss, kind) for kind in kinds}
    for kind, found in gradients(losses, params, x, ways).items():
        # A cast rounds the gradient of each microbatch.
        close = {"within": 0.01 if kind == "cast" else 1e-4, "across": 1e-5}
        want = found["jax.grad"]
        for name in params:
            largest = max(1, np.abs(want[name]).max())
            for way, atol in close.items():
                if way not in found:
                    continue
                np.testing.assert_allclose(
                    found[way][name] / largest,
                    want[name] / largest,
                    err_msg=f"{kind}, {way}",
                    rtol=1e-4,
                    atol=atol,
                )
            if "carried" in found:
                np.testing.assert_array_equal(
                    found["within"][name], found["carried"][name], err_msg=kind
                )


@pytest.mark.parametrize(
    "place",
    [
        "cond around a scan",
        "custom_jvp",
        "jit twice around a scan",
        "scan in a scan",
        "scan, constants",
        "scan, xs",
        "switch",
        "vmap around a scan of xs",
    ],
)
def test_no_gradient_is_that_of_another_operand(place):
    check(place, FEW)


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("place", [*MATRICES, *STACKS])
def test_no_kind_of_operand_is_mistaken_in_any_place(place):
    """Half of the kinds, which are others in the next place and on the next JAX."""
    half = [*MATRICES, *STACKS].index(place) + (jax.__version_info__ >= (0, 11))
    check(place, [*KINDS][half % 2 :: 2])


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("place", [*MATRICES, *STACKS])
def test_none_of_all_kinds_of_operands_is_mistaken_in_any_place(place):
    check(place, KINDS)


class Block(nn.Module):
    """A layer whose parameters are used as they are and cast, as mixed precision is."""

    @nn.compact
    def __call__(self, h, _=None):
        w = self.param("w", nn.initializers.normal(0.5), (SIZE, SIZE))
        v = self.param("v", nn.initializers.normal(0.5), (SIZE, SIZE))
        return jnp.sin(h @ w.astype(jnp.bfloat16).astype(jnp.float32) + h) @ v, None


@pytest.mark.parametrize("lift", ["scan", "remat", "remat_scan"])
def test_the_lifted_transformations_of_linen_keep_gradients_apart(lift):
    stack = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    kinds = {
        "scan": lambda: nn.scan(Block, **stack, length=SIZE)(),
        "remat": lambda: nn.remat(Block)(),
        "remat_scan": lambda: nn.scan(nn.remat(Block), **stack, length=SIZE)(),
    }
    model, x = kinds[lift](), jnp.linspace(-1, 1, 12).reshape(4, SIZE)
    variables = model.init(jax.random.key(0), x, None)

    def loss(variables, x):
        return jnp.mean(model.apply(variables, x, None)[0] ** 2)

    (found,) = gradients({lift: loss}, variables, x).values()
    want = found.pop("jax.grad")
    for other in found.values():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-2), other, want
        )


def test_the_scan_of_nnx_keeps_gradients_apart():
    class Layers(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jax.random.normal(rngs.params(), (SIZE,) * 3) / 2)
            self.v = nnx.Param(jax.random.normal(rngs.params(), (SIZE,) * 3) / 2)

    def loss(layers, x):
        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
        def turn(h, w, v):
            return mix(h, w, v)

        return jnp.mean(turn(x, 2.0 * layers.w[...], layers.v[...]) ** 2)

    layers, x = Layers(nnx.Rngs(0)), jnp.linspace(-1, 1, 12).reshape(4, SIZE)
    want = nnx.grad(loss)(layers, x)
    grad = nnx.jit(accumax.nnx.value_and_grad(loss, microbatch_size=2))
    got = grad(layers, x)[1]
    for name in ("w", "v"):
        np.testing.assert_allclose(got[name][...], want[name][...], atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_a_random_loss_is_that_of_jax(seed):
    assert fuzz.wrong_gradients(1000 + seed) == []


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("seed", [0, 6])
def test_the_gradients_of_random_losses_are_those_of_jax(seed):
    assert [x for i in range(6) for x in fuzz.wrong_gradients(2000 + seed + i)] == []


def test_memory_that_a_port_takes_is_said():
    def loss(p, x):
        return jnp.mean(scanned(x, jnp.tanh(p["a"]), p["b"]))

    params = {name: jnp.ones((SIZE,) * 3) for name in "ab"}
    step = jax.jit(accumax.grad(loss, microbatch_size=2))
    if jax.__version_info__ >= (0, 11):  # and nothing is said
        step(params, jnp.ones((4, SIZE)))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(params, jnp.ones((4, SIZE)))
    said = str(caught[0].message)
    assert "['b']" in said
    assert "108 bytes" in said
    assert "in_place=False" in said
