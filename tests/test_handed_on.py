"""Which results are arguments, through every kind of program within a program."""

import jax
import jax.numpy as jnp
import pytest

from accumax._xla.handed_on import unchanged_leaves

TREE = {"kept": jnp.ones((3, 2)), "new": jnp.ones((3, 2)), "number": jnp.float32(1)}


def one_layer(x, tree):
    """Returns a layer's part of `TREE`, of which "new" is another."""
    return x + 1, {**tree, "new": tree["new"] * 2}


def as_it_is(tree):
    return tree, {"kept", "new", "number"}


def replaced(tree):
    return {**tree, "new": tree["new"] + 0}, {"kept", "number"}


def swapped(tree):
    return {**tree, "kept": tree["new"], "new": tree["kept"]}, {"number"}


def jitted(tree):
    return jax.jit(lambda t: replaced(t)[0])(tree), {"kept", "number"}


def checkpointed(tree):
    return jax.checkpoint(lambda t: replaced(t)[0])(tree), {"kept", "number"}


def scanned_over(tree):
    layers = {name: tree[name] for name in ("kept", "new")}
    _, out = jax.lax.scan(one_layer, 0.0, layers, reverse=True)
    return tree | out, {"kept", "number"}


def scanned_and_checkpointed(tree):
    layers = {name: tree[name] for name in ("kept", "new")}
    body = jax.checkpoint(lambda x, layer: one_layer(x, layer))
    _, out = jax.lax.scan(body, tree["number"], layers)
    return tree | out, {"kept", "number"}


def carried(tree):
    def body(tree, x):
        return replaced(tree)[0], x

    return jax.lax.scan(body, tree, jnp.arange(3))[0], {"kept", "number"}


def rotated(tree):
    """A carry that the loop hands on in another place."""

    def body(tree, _):
        return {**tree, "kept": tree["new"], "new": tree["kept"]}, None

    return jax.lax.scan(body, tree, None, length=2)[0], {"number"}


def looped(tree):
    def body(_, tree):
        return replaced(tree)[0]

    return jax.lax.fori_loop(0, tree["number"].astype(int), body, tree), {
        "kept",
        "number",
    }


def branched(tree):
    new = jax.lax.cond(
        tree["number"] > 0, lambda t: replaced(t)[0], lambda t: as_it_is(t)[0], tree
    )
    return new, {"kept", "number"}


def branched_apart(tree):
    def other(tree):
        return {**tree, "kept": tree["kept"] * 2}

    return jax.lax.cond(tree["number"] > 0, lambda t: t, other, tree), {"new", "number"}


def behind_a_barrier(tree):
    return jax.lax.optimization_barrier(tree), {"kept", "new", "number"}


def custom(tree):
    @jax.custom_vjp
    def fun(tree):
        return replaced(tree)[0]

    fun.defvjp(lambda tree: (fun(tree), None), lambda _, cotangent: (cotangent,))
    return fun(tree), set()  # its rule may return others


def mapped(tree):
    out = jax.vmap(lambda layer: one_layer(0.0, layer)[1])(
        {name: tree[name] for name in ("kept", "new")}
    )
    return tree | out, {"kept", "number"}


def scanned_along_another_axis(tree):
    """As NNX does for layers that are stacked along axis 1."""
    layers = {name: jnp.moveaxis(tree[name], 1, 0) for name in ("kept", "new")}
    _, out = jax.lax.scan(one_layer, 0.0, layers)
    return tree | {name: jnp.moveaxis(x, 0, 1) for name, x in out.items()}, {
        "kept",
        "number",
    }


def turned_back(tree):
    turn = jax.jit(jnp.transpose)
    return {**tree, "kept": turn(turn(tree["kept"]))}, {"kept", "new", "number"}


def broadcast(tree):
    """A scan that returns one array in each step: no argument has that shape."""
    _, out = jax.lax.scan(lambda c, _: (c, tree["kept"][0]), 0.0, None, length=3)
    return {**tree, "kept": out}, {"new", "number"}


@pytest.mark.parametrize(
    "fun",
    [
        *(as_it_is, replaced, swapped, jitted, checkpointed, scanned_over),
        *(scanned_and_checkpointed, carried, rotated, looped, branched),
        *(branched_apart, behind_a_barrier, custom, mapped, broadcast),
        *(scanned_along_another_axis, turned_back),
    ],
    ids=lambda fun: fun.__name__,
)
def test_finds_what_is_unchanged_and_nothing_else(fun):
    expected = []

    def run(tree):
        new, unchanged = fun(tree)
        expected[:] = [name in unchanged for name in sorted(tree)]
        return jnp.sum(new["kept"]), new

    out, kept = unchanged_leaves(run, TREE)
    assert out.shape == ()
    assert kept == expected


def test_without_leaves_only_shapes_are_asked():
    out, kept = unchanged_leaves(lambda tree: (jnp.ones(3), tree), ())
    assert out.shape == (3,)
    assert kept == []


def test_a_square_that_is_transposed_is_another():
    square = jnp.arange(4.0).reshape(2, 2)
    _, kept = unchanged_leaves(lambda x: ((), [x[0].T, x[1].T.T]), [square, square])
    assert kept == [False, True]
