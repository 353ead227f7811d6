"""Memory and copies of a Flax step with BatchNorm and an average of the parameters.

    python benchmarks/flax_states.py cpu     # or gpu, tpu: see devices.py

Arguments and temporary memory in units of the parameters, and copies of a parameter's
size, of eight layers of BatchNorm and Dense with AdamW. Plain Flax and Optax first: a
step without accumulation. The one unit between them is the accumulator; this step's
gradient is used up as it comes, so there is none that the accumulator could replace.
With --width 512 and less, XLA:CPU transposes the matrices for its products, and counts
copies for the plain step too (16, accumax 10, with microbatches 39).
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

import accumax.linen
import accumax.nnx

LAYERS, ROWS, DECAY = 8, 32, 0.99


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


class State(accumax.linen.TrainState):
    batch_stats: Any
    ema_params: Any


Step = tuple[Callable[..., Any], Any]


def steps(width: int) -> dict[str, Step]:
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
    graphdef, state = nnx.split((model, optimizer))
    nnx_step = accumax.nnx.train_step(lambda model, x: jnp.mean(model(x) ** 2))

    def of_module(state: Any, x: jax.Array) -> Any:
        both = nnx.merge(graphdef, state)
        loss = nnx_step(*both, x)
        return nnx.as_pure(nnx.state(both)), loss

    return {
        "plain Flax and Optax": (plain, jax.eval_shape(plain_state)),
        "TrainState.train_step": (linen, jax.eval_shape(linen_state)),
        "  microbatch_size": (divided, jax.eval_shape(linen_state)),
        "nnx.train_step, no average": (of_module, nnx.as_pure(state)),
    }


def figures(target: str, width: int = 1024) -> dict[str, tuple[float, float, int]]:
    """From each name to arguments, temporary memory and copies."""
    sharding = jax.sharding.SingleDeviceSharding(devices.device(target))

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    x = place(jax.ShapeDtypeStruct((ROWS, width), jnp.float32))
    found = {}
    params = jax.eval_shape(Linen(width).init, jax.random.key(0), x)["params"]
    unit = programs.bytes_of(params)
    for name, (step, state) in steps(width).items():
        jitted = jax.jit(step, donate_argnums=0)
        compiled = jitted.lower(place(state), x).compile()
        memory: Any = compiled.memory_analysis()
        copies, _ = programs.copies(compiled.as_text() or "", params)
        arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        found[name] = arguments / unit, temp / unit, copies
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of Flax steps.")
    parser.add_argument("target", choices=("cpu", "gpu", "tpu"))
    parser.add_argument("--width", type=int, default=1024)
    flags = parser.parse_args()
    print(f"{'':28}{'arguments':>10}{'temp':>8}{'copies':>8}  ({flags.target})")
    for name, (arguments, temp, copies) in figures(flags.target, flags.width).items():
        print(f"{name:28}{arguments:10.3f}{temp:8.3f}{copies:8}")


if __name__ == "__main__":
    main()
