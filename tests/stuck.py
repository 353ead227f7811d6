"""Weighted losses that communicate, where one device has no weight.

    python tests/stuck.py FORM

A device that left out a collective that the others wait for would wait for ever, and so
each form runs in a process of its own, that its caller may stop. It compares each loss
with what the definition gives, and prints `right` if all are.
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

import accumax

AXIS = "data"
RING = [(i, (i + 1) % 4) for i in range(4)]


def identity(backward):
    """A function that hands on its argument, and `backward` of its cotangent."""
    fun = jax.custom_vjp(lambda x: x)
    fun.defvjp(lambda x: (x, None), lambda _, ct: (backward(ct),))
    return fun


# Each keeps the sum over the devices of what is added, so that the gradient is known.
INSIDE = {
    "in the forward pass": lambda w: w + 0 * lax.psum(lax.stop_gradient(w), AXIS),
    "in the backward pass": identity(lambda ct: lax.pmean(ct, AXIS)),
    "by ppermute in it": identity(lambda ct: lax.ppermute(ct, AXIS, RING)),
    "in its scan": identity(
        lambda ct: lax.scan(lambda c, _: (lax.pmean(c, AXIS), None), ct, length=2)[0]
    ),
    "under a checkpoint": jax.checkpoint(identity(lambda ct: lax.pmean(ct, AXIS))),
}


def put(mesh, rows):
    return jax.device_put(rows, jax.NamedSharding(mesh, P(AXIS)))


def value_and_grad(loss, mesh, w, rows):
    options = {"microbatch_size": 4, "weighted": True}
    devices = accumax.DataParallel(AXIS, mesh=mesh)
    return jax.jit(accumax.grad(loss, reduce_axis=devices, **options))(
        w, put(mesh, rows)
    )


def own_shard_map(loss, mesh, w, rows):
    options = {"microbatch_size": 1, "weighted": True, "reduce_axis": AXIS}
    fun = jax.shard_map(
        accumax.grad(loss, **options),
        mesh=mesh,
        in_specs=(P(), P(AXIS)),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(fun)(w, put(mesh, rows))


def train_step(loss, mesh, w, rows):
    devices = accumax.DataParallel(AXIS, mesh=mesh)
    tx = accumax.accumulate(optax.sgd(1.0), 2, reduce_axis=devices)
    step = jax.jit(accumax.train_step(loss, tx, weighted=True))
    state, new = tx.init(w), w
    for half in (rows[::2], rows[1::2]):
        new, state, _ = step(new, state, put(mesh, half))
    return w - new


def main(form):
    mesh = jax.make_mesh((4,), (AXIS,))
    w = jnp.array([0.5, -1.0])
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)), jnp.float32)
    rows = rows.at[:2].set(0)  # the rows of the first device

    def each(w, x):
        return jnp.sum((x @ w - 1) ** 2 * (x[:, 0] != 0)), jnp.sum(x[:, 0] != 0)

    want = jax.grad(lambda w: each(w, rows)[0])(w) / each(w, rows)[1]
    run = {f.__name__: f for f in (value_and_grad, own_shard_map, train_step)}[form]
    for name, inside in INSIDE.items():
        got = run(lambda w, x, inside=inside: each(inside(w), x), mesh, w, rows)
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
    print("right")


if __name__ == "__main__":
    main(sys.argv[1])
