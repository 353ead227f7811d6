"""A loss whose logits never exist at once, at the sizes of JAX's pull request 35915.

    python benchmarks/logits.py        # or gpu, tpu: compiled for one that is not here

8,192 tokens, a vocabulary of 128,000, width 4,096, bfloat16. Temporary memory of the
loss, and of its gradient for the weights and the hidden states. Nothing runs. "sum" is
the float32 sum of the weights' gradient, a part of it where bf16 is not in the name.
The pull request's description has 4.0 GB of logits, and 128 MB in its own function.
"""

import argparse
from collections.abc import Callable
from typing import Any

import devices
import jax
import jax.numpy as jnp
import optax
import report
from devices import CHIPS, Device
from results import Row

import accumax

VOCABULARY, TOKENS, WIDTH = 128_000, 8192, 4096
SIZES = 512, 256
ROWS = "logits"


def token_losses(weights: jax.Array, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    logits = (hidden @ weights.T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def divided(size: int, **options: Any) -> Callable[..., jax.Array]:
    return accumax.microbatch(
        token_losses, microbatch_size=size, batch_argnums=(1, 2), **options
    )


def mapped(size: int) -> Callable[..., jax.Array]:
    """What one writes by hand."""

    def losses(weights: jax.Array, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        one = jax.checkpoint(lambda part: token_losses(weights, *part))
        parts = hidden.reshape(-1, size, WIDTH), labels.reshape(-1, size)
        return jax.lax.map(one, parts).reshape(-1)

    return losses


def forms() -> dict[str, Callable[..., jax.Array]]:
    found: dict[str, Callable[..., jax.Array]] = {"whole": token_losses}
    found |= {f"checkpoint_{n}": mapped(n) for n in SIZES}
    found |= {f"microbatch_{n}": divided(n) for n in SIZES}
    own = {f"microbatch_{n}_bf16": divided(n, accumulator_dtype=None) for n in SIZES}
    return found | own


def rows(on: Device, target: str) -> list[Row]:
    """Megabytes: `logits/TARGET/forward/FORM` and `logits/TARGET/gradient/FORM`."""
    sharding = jax.sharding.SingleDeviceSharding(on)

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    args = array(VOCABULARY, WIDTH), array(TOKENS, WIDTH), array(TOKENS, dtype="int32")
    found = [
        Row(f"{ROWS}/{target}/logits_float32", TOKENS * VOCABULARY * 4e-6, "MB"),
        Row(f"{ROWS}/{target}/sum", VOCABULARY * WIDTH * 4e-6, "MB"),
    ]
    for name, losses in forms().items():

        def loss(*args: jax.Array, losses: Any = losses) -> jax.Array:
            return losses(*args).mean()

        for what, fun in (
            ("forward", loss),
            ("gradient", jax.value_and_grad(loss, (0, 1))),
        ):
            memory: Any = jax.jit(fun).lower(*args).compile().memory_analysis()
            megabytes = memory.temp_size_in_bytes / 1e6
            found.append(Row(f"{ROWS}/{target}/{what}/{name}", megabytes, "MB"))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="cpu", choices=("cpu", *CHIPS))
    target = parser.parse_args(argv).target
    on = devices.device(target)
    report.header("accumax, compiled", CHIPS.get(target, "CPU"))
    found = rows(on, target)
    report.table(
        "Temporary memory", ["", "MB"], [[r.name, f"{r.value:.0f}"] for r in found]
    )


if __name__ == "__main__":
    main()
