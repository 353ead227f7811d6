"""How much a gradient loses that crosses the network in half precision.

    python benchmarks/wire.py                     # eight of this machine's CPU

Each of eight devices has a sum of its own: a mean that all share, and noise. The error
is the root mean square, over that of the true total, which is added in float64. "psum"
is what a step does that casts its gradient before `lax.psum`; the other rows are what
`DataParallel(reduce_dtype=)` does, whose additions are in float32. "bytes" is what a
device sends, for one that sends float32 in a ring.

    accumax on the wire, 2026-11-26, jax 0.10.2, optax 0.2.8, accumax 0.1.0
    AMD EPYC x 2

    Relative error of a sum over 8 devices, 1,048,576 numbers
                                             noise 0.1  noise 10  bytes
    float32: psum                              4.7e-08   5.6e-08      1
    bfloat16: psum                             2.6e-03   3.6e-03    0.5
    bfloat16: reduce_dtype                     1.8e-03   2.3e-03    0.5
    bfloat16: reduce_dtype, shard_optimizer    5.9e-04   1.6e-03   0.25
    float16: psum                              3.9e-04   5.0e-04    0.5
    float16: reduce_dtype                      2.2e-04   2.9e-04    0.5
    float16: reduce_dtype, shard_optimizer     7.4e-05   2.0e-04   0.25
"""

import functools
from collections.abc import Callable

import devices
import jax
import jax.numpy as jnp
import numpy as np
import report
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from accumax._devices import wire

AXIS, SIZE = ("data",), 2**20


def cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Half precision at each addition, as on a network that adds what it carries."""
    parts = lax.all_gather(x.astype(dtype), AXIS)
    return functools.reduce(jnp.add, list(parts)).astype(x.dtype)


def scattered(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return lax.all_gather(wire.reduce_scatter(x, AXIS, dtype), AXIS, tiled=True)


def reduced(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return wire.all_reduce(x, AXIS, dtype)


def whole(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    del dtype
    return lax.psum(x, AXIS)


WAYS: dict[str, tuple[Callable[..., jax.Array], str, float]] = {
    "float32: psum": (whole, "float32", 1),
    "bfloat16: psum": (cast, "bfloat16", 0.5),
    "bfloat16: reduce_dtype": (reduced, "bfloat16", 0.5),
    "bfloat16: reduce_dtype, shard_optimizer": (scattered, "bfloat16", 0.25),
    "float16: psum": (cast, "float16", 0.5),
    "float16: reduce_dtype": (reduced, "float16", 0.5),
    "float16: reduce_dtype, shard_optimizer": (scattered, "float16", 0.25),
}


def errors(noise: float) -> dict[str, float]:
    """Of each way, for sums whose noise is so many times the mean."""
    mesh = Mesh(np.array(devices.devices("cpu")), AXIS)
    chance = np.random.default_rng(0)
    shared = chance.normal(size=SIZE)
    own = shared + noise * chance.normal(size=(mesh.size, SIZE))
    own = own.astype(np.float32)
    want = own.astype(np.float64).sum(0)
    found = {}
    for name, (way, dtype, _) in WAYS.items():
        on_device = functools.partial(way, dtype=jnp.dtype(dtype))
        mapped = jax.shard_map(
            lambda x, on_device=on_device: on_device(x[0]),
            mesh=mesh,
            in_specs=P(AXIS),
            out_specs=P(),
            check_vma=False,
        )
        got = np.asarray(jax.jit(mapped)(own), np.float64)
        found[name] = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    return found


def main() -> None:
    few, many = errors(0.1), errors(10.0)
    report.header("accumax on the wire", report.host())
    report.table(
        f"Relative error of a sum over 8 devices, {SIZE:,} numbers",
        ["", "noise 0.1", "noise 10", "bytes"],
        [
            [name, f"{few[name]:.1e}", f"{many[name]:.1e}", f"{WAYS[name][2]:g}"]
            for name in WAYS
        ],
    )


if __name__ == "__main__":
    main()
