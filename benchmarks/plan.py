"""`accumax.plan` against the true largest microbatch, for a CPU, a GPU and a TPU.

    python benchmarks/plan.py cpu                    # minutes on two CPU cores
    python benchmarks/plan.py gpu --fill 0.02 0.1 0.5

Three unlike models take one step of `accumax.train_step`, compiled for the target. The
limit is what a microbatch of one row takes, and a part of what the whole batch takes
more. The true largest size is found by bisection around the planned one, each size
compiled; memory is taken to grow with the size. The bar: at most 5 % below the truth,
with at most 4 compiles, and with divisors alone the very divisor.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import forms
import jax
import jax.numpy as jnp
import models
import transformer
from devices import CHIPS, Device, device
from programs import peak

import accumax


class Model(NamedTuple):
    """A loss, the shapes of its parameters, and of a batch of `rows`."""

    name: str
    loss: Callable[[Any, Any], jax.Array]
    params: Any
    row: jax.ShapeDtypeStruct
    rows: int


def all_models() -> list[Model]:
    size = transformer.Size(layers=4, width=128, heads=4, vocabulary=512, length=64)
    text = jax.ShapeDtypeStruct((size.length + 1,), jnp.int32)
    image = jax.ShapeDtypeStruct((28, 28, 1), jnp.float32)
    row = jax.ShapeDtypeStruct((256,), jnp.float32)
    images = models.convolutions(1)
    loss = functools.partial(transformer.loss, size)
    return [
        Model("MLP", mlp, [array(256, 256)] * 4, row, 4096),
        Model(
            "convolutional net", images.loss, jax.eval_shape(images.init), image, 1024
        ),
        Model("scanned transformer", loss, transformer.shapes(size), text, 256),
    ]


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def mlp(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in params:
        x = jax.nn.gelu(x @ w)
    return jnp.mean(x * x)


def compiler(model: Model, on: Device) -> Callable[[int], jax.stages.Compiled]:
    """From a microbatch size to the compiled step; each size is compiled once."""
    sharding = jax.sharding.SingleDeviceSharding(on)
    tx = accumax.accumulate(forms.ADAMW, every=forms.EVERY)
    step = accumax.train_step(model.loss, tx)
    state = jax.eval_shape(tx.init, model.params)

    @functools.cache
    def compiled(size: int) -> jax.stages.Compiled:
        batch = jax.ShapeDtypeStruct((size, *model.row.shape), model.row.dtype)
        args = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            (model.params, state, batch),
        )
        return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()

    return compiled


def true_largest(fits: Callable[[int], bool], at: int, most: int) -> int:
    """The largest size that fits, around `at`, which does."""
    step, low = max(1, at // 20), at
    while (high := min(low + step, most + 1)) <= most and fits(high):
        low, step = high, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Result(NamedTuple):
    model: str
    fill: float
    plan: Any
    largest: int
    divisor: bool  # planned with divisors alone, it is the largest that fits
    divisor_compiles: int

    @property
    def met(self) -> bool:
        near = self.plan.microbatch_size >= 0.95 * self.largest
        few = max(self.plan.compiles, self.divisor_compiles) <= 4
        return near and few and self.divisor


def measure(model: Model, on: Device, fill: float) -> Result:
    compiled = compiler(model, on)
    one, whole = peak(compiled(1)), peak(compiled(model.rows))
    limit = int(one + fill * (whole - one))
    any_size = accumax.plan(
        compiled, model.rows, memory_limit=limit, divisors_only=False
    )
    dividing = accumax.plan(compiled, model.rows, memory_limit=limit)

    def fits(size: int) -> bool:
        return peak(compiled(size)) <= limit

    largest = true_largest(fits, any_size.microbatch_size, model.rows)
    best = max(d for d in (2**n for n in range(20)) if d <= largest)
    same = dividing.microbatch_size == min(best, model.rows)
    return Result(model.name, fill, any_size, largest, same, dividing.compiles)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="accumax.plan against the true largest microbatch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("target", choices=("cpu", *CHIPS))
    parser.add_argument(
        "--fill",
        type=float,
        nargs="+",
        default=[0.1, 0.4],
        help="part of the whole batch",
    )
    flags = parser.parse_args(argv)
    on = device(flags.target)
    print(f"accumax {accumax.__version__}, jax {jax.__version__}, {flags.target}")
    print(
        f"{'':20}{'fill':>6}{'planned':>9}{'true':>6}{'off':>8}{'compiles':>10}"
        f"{'divisor':>9}{'compiles':>10}"
    )
    results = []
    for model, fill in [(m, fill) for m in all_models() for fill in flags.fill]:
        r = measure(model, on, fill)
        results.append(r)
        planned = r.plan.microbatch_size
        off = planned / r.largest - 1
        print(
            f"{r.model:20}{r.fill:6}{planned:9}{r.largest:6}{off:8.1%}"
            f"{r.plan.compiles:10}{'right' if r.divisor else 'wrong':>9}"
            f"{r.divisor_compiles:10}",
            flush=True,
        )
    met = sum(r.met for r in results)
    print(f"bar: at most 5 % off, at most 4 compiles: {met} of {len(results)} met")


if __name__ == "__main__":
    main()
