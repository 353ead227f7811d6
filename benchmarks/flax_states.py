"""Memory and copies of steps of Flax modules.

    python benchmarks/flax_states.py cpu     # or gpu, tpu: see devices.py

Arguments and temporary memory in units of all parameters, and copies of a parameter's
size, with AdamW. Plain Flax and Optax first: a step without accumulation.

"batchnorm": eight layers of BatchNorm and Dense, with an average of the parameters.
The one unit between the plain step and ours is the accumulator; this step's gradient is
used up as it comes, so there is none that the accumulator could replace. With --width
512 and less, XLA:CPU transposes the matrices for its products, and counts copies for
the plain step too (16, accumax 10, with microbatches 39).

"lora": eight scanned and rematerialised layers of which only a low-rank addition is
trained. Flax gives each variable of scanned layers back as a new array.
"""

import argparse
from collections.abc import Callable
from typing import Any

import devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import programs
from flax import nnx
from results import Row

import accumax.linen
import accumax.nnx

LAYERS, ROWS, DECAY, RANK = 8, 32, 0.99, 4


class Linen(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(LAYERS):
            x = nn.Dense(self.width)(nn.tanh(nn.BatchNorm(False, momentum=0.9)(x)))
        return x


class NNX(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) for _ in range(LAYERS)])
        self.dense = nnx.List(
            [nnx.Linear(width, width, rngs=rngs) for _ in range(LAYERS)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for norm, dense in zip(self.norms, self.dense, strict=True):
            x = dense(nnx.tanh(norm(x)))
        return x


class LoRA(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> nnx.LoRALinear:
            return nnx.LoRALinear(width, width, lora_rank=RANK, rngs=rngs)

        self.layers = stacked(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def through(x: jax.Array, layer: nnx.LoRALinear) -> jax.Array:
            return nnx.tanh(layer(x))

        return through(x, self.layers)


class State(accumax.linen.TrainState):
    batch_stats: Any
    ema_params: Any


Step = tuple[Callable[..., Any], Any]


def square(model: nnx.Module, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


def of_modules(step: Any, model: nnx.Module, optimizer: Any) -> Step:
    """A step of a module and its optimizer, as one of arrays."""
    graphdef, state = nnx.split((model, optimizer))

    def run(state: Any, x: jax.Array) -> Any:
        both = nnx.merge(graphdef, state)
        loss = step(*both, x)
        return nnx.as_pure(nnx.state(both)), loss

    return run, nnx.as_pure(state)


def batchnorm(width: int) -> dict[str, Step]:
    """From the name of each step to it, and to the state that it takes."""
    net, tx = Linen(width), optax.adamw(1e-3)

    def loss_fn(params: Any, x: jax.Array, batch_stats: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        y, new = net.apply(variables, x, mutable=["batch_stats"])
        return jnp.mean(jnp.asarray(y) ** 2), new

    def variables() -> Any:
        return net.init(jax.random.key(0), jnp.ones((ROWS, width)))

    def plain_state() -> Any:
        params, batch_stats = (variables()[k] for k in ("params", "batch_stats"))
        return params, tx.init(params), batch_stats, jax.tree.map(jnp.copy, params)

    def plain(state: Any, x: jax.Array) -> Any:
        params, opt_state, batch_stats, average = state
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, new), grads = grad_fn(params, x, batch_stats)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 1 - DECAY)
        return (params, opt_state, new["batch_stats"], average), loss

    def linen_state() -> Any:
        found = variables()
        average = jax.tree.map(jnp.copy, found["params"])
        options = {"every": 8, "momentum": 0.9, "ema_params": average}
        return State.create(apply_fn=net.apply, tx=tx, **options, **found)

    def linen(state: Any, x: jax.Array, **options: Any) -> Any:
        step = State.train_step(loss_fn, mutable=("batch_stats",), **options)
        state, loss = step(state, x)
        average = accumax.linen.ema(
            state.ema_params, state.params, state.opt_state, DECAY
        )
        return state.replace(ema_params=average), loss

    def divided(state: Any, x: jax.Array) -> Any:
        return linen(state, x, microbatch_size=ROWS // 4)

    model = NNX(width, nnx.Rngs(0))
    optimizer = accumax.nnx.Optimizer(model, tx, wrt=nnx.Param, every=8)
    return {
        "none": (plain, jax.eval_shape(plain_state)),
        "linen": (linen, jax.eval_shape(linen_state)),
        "linen_divided": (divided, jax.eval_shape(linen_state)),
        "nnx": of_modules(accumax.nnx.train_step(square), model, optimizer),
    }


def lora(width: int) -> dict[str, Step]:
    """As `batchnorm`, of a model whose base is frozen."""
    model, tx = LoRA(width, nnx.Rngs(0)), optax.adamw(1e-3)

    def plain(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        trained = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(square, argnums=trained)(model, x)
        optimizer.update(model, grads)
        return loss

    def ours(**options: Any) -> Step:
        optimizer = accumax.nnx.Optimizer(model, tx, wrt=nnx.LoRAParam, every=8)
        step = accumax.nnx.train_step(square, **options)
        return of_modules(step, model, optimizer)

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    return {
        "none": of_modules(plain, model, optimizer),
        "nnx": ours(),
        "nnx_divided": ours(microbatch_size=ROWS // 4),
    }


def figures(
    on: devices.Device, width: int = 1024
) -> dict[str, tuple[float, float, int]]:
    """From `MODEL/STEP` to arguments, temporary memory and copies."""
    sharding = jax.sharding.SingleDeviceSharding(on)

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    x = place(jax.ShapeDtypeStruct((ROWS, width), jnp.float32))
    found = {}
    for make, model in ((batchnorm, NNX), (lora, LoRA)):
        params = nnx.as_pure(nnx.state(model(width, nnx.Rngs(0)), nnx.Param))
        unit = programs.bytes_of(params)
        for name, (step, state) in make(width).items():
            jitted = jax.jit(step, donate_argnums=0)
            compiled = jitted.lower(place(state), x).compile()
            memory: Any = compiled.memory_analysis()
            copies, _ = programs.copies(compiled.as_text() or "", params)
            arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            case = f"{make.__name__}/{name}"
            found[case] = arguments / unit, temp / unit, copies
    return found


def rows(on: devices.Device, target: str, width: int = 1024) -> list[Row]:
    """`flax/MODEL/TARGET/STEP`: arguments and temporary memory."""
    found = []
    for case, (arguments, temp, _) in figures(on, width).items():
        model, step = case.split("/")
        name = f"flax/{model}/{target}/{step}"
        found.append(Row(name, arguments + temp, "x parameters"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of Flax steps.")
    parser.add_argument("target", choices=("cpu", "gpu", "tpu"))
    parser.add_argument("--width", type=int, default=1024)
    flags = parser.parse_args()
    on = devices.device(flags.target)
    print(f"{'':28}{'arguments':>10}{'temp':>8}{'copies':>8}  ({flags.target})")
    for name, (arguments, temp, copies) in figures(on, flags.width).items():
        print(f"{name:28}{arguments:10.3f}{temp:8.3f}{copies:8}")


if __name__ == "__main__":
    main()
