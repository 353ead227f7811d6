"""What a call costs on the host: from the call to its return, before the devices end.

    python benchmarks/host.py                     # 1,000 leaves, one and eight devices
    python benchmarks/host.py --leaves 100

Each step is jitted and holds: it is a call within a window, whose arithmetic is least.
The leaves have 8 numbers each. "over plain" is the time over that of an Optax step of
the same leaves without accumulation, jitted in the same way; the steps take turns, and
the least of many calls counts. The state of a window has one array more for each
parameter than that of the plain step, which is a quarter of all arrays with Adam: that
alone is 1.33 in arrays to pass.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import devices
import jax
import jax.numpy as jnp
import optax
import report
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import accumax

INNER, EVERY, AXIS = optax.adam(1e-3), 1000, "data"


def loss(params: Any, x: jax.Array) -> jax.Array:
    each = [jnp.sum(w * x[0, :1]) for w in jax.tree.leaves(params)]
    return sum(each, jnp.zeros(()))


def plain(tx: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def functional(count: int, mesh: Mesh) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Steps of a dict of parameters, and what each is first called with."""
    whole = NamedSharding(mesh, P())

    def params() -> Any:
        each = {f"{i:05}": jnp.ones(8) for i in range(count)}
        return jax.device_put(each, whole)

    over = accumax.DataParallel(AXIS, mesh=mesh)
    ways = {
        "plain": (INNER, plain(INNER)),
        "optax.MultiSteps": (
            multi := optax.MultiSteps(INNER, EVERY).gradient_transformation(),
            plain(multi),
        ),
    }
    options = {"train_step": {}}
    if mesh.size > 1:
        options["train_step(reduce_axis)"] = {"reduce_axis": over}
    for name, given in options.items():
        tx = accumax.accumulate(INNER, EVERY, **given)
        ways[name] = tx, accumax.train_step(loss, tx)
    found = {}
    for name, (tx, step) in ways.items():
        new = params()
        state = tx.init(new)
        if "reduce_axis" not in name:
            state = jax.device_put(state, whole)
        found[name] = jax.jit(step, donate_argnums=(0, 1)), (new, state)
    return found


def of_flax(count: int) -> dict[str, tuple[Callable[..., Any], tuple]]:
    """Steps of Flax's states, on one device."""
    from flax import nnx
    from flax.training import train_state

    import accumax.linen
    import accumax.nnx

    def params() -> Any:
        return {f"{i:05}": jnp.ones(8) for i in range(count)}

    def flax_step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(state.params, x)
        return state.apply_gradients(grads=grads), value

    tx = accumax.accumulate(INNER, EVERY)
    theirs = train_state.TrainState.create(apply_fn=loss, params=params(), tx=INNER)
    ours = accumax.linen.TrainState.create(apply_fn=loss, params=params(), tx=tx)

    class Module(nnx.Module):
        def __init__(self) -> None:
            self.leaves = nnx.Dict({k: nnx.Param(v) for k, v in params().items()})

    def module_loss(module: Module, x: jax.Array) -> jax.Array:
        return loss(nnx.to_pure_dict(nnx.state(module, nnx.Param)), x)

    def nnx_plain(module: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        value, grads = nnx.value_and_grad(module_loss)(module, x)
        optimizer.update(module, grads)
        return value

    module, other = Module(), Module()
    step = accumax.nnx.train_step(module_loss)
    optimizer = accumax.nnx.Optimizer(other, tx, wrt=nnx.Param)
    pair = nnx.split((Module(), accumax.nnx.Optimizer(other, tx, wrt=nnx.Param)))

    def pure(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        both = nnx.merge(pair[0], state)
        value = step(*both, x)
        return nnx.state(both), value

    return {
        "linen: plain": (jax.jit(flax_step, donate_argnums=0), (theirs,)),
        "linen: accumax": (
            jax.jit(accumax.linen.TrainState.train_step(loss), donate_argnums=0),
            (ours,),
        ),
        "nnx.jit: plain": (
            nnx.jit(nnx_plain),
            (module, nnx.Optimizer(module, INNER, wrt=nnx.Param)),
        ),
        "nnx.jit: accumax": (nnx.jit(step), (other, optimizer)),
        "jax.jit, split: accumax": (jax.jit(pure, donate_argnums=0), (pair[1],)),
    }


def microseconds(
    steps: dict[str, tuple[Callable[..., Any], tuple]], x: jax.Array, calls: int
) -> dict[str, float]:
    """The least time of a call, in turns; each gives the state of the next."""
    least = dict.fromkeys(steps, float("inf"))
    states = {name: state for name, (_, state) in steps.items()}
    for call in range(calls + 2):
        for name, (step, _) in steps.items():
            jax.block_until_ready(jax.tree.leaves(states[name]))
            begin = time.perf_counter()
            out = step(*states[name], x)
            took = time.perf_counter() - begin
            jax.block_until_ready(out)
            if isinstance(out, tuple):  # else the state is changed in place
                states[name] = out[: len(states[name])]
            if call > 1:
                least[name] = min(least[name], took * 1e6)
    return least


def tables(leaves: int, calls: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By devices and step: microseconds of a call, and those over the plain step's."""
    on, found = devices.devices("cpu"), {}
    for count in (1, len(on)):
        mesh = Mesh(on[:count], (AXIS,))
        x = jax.device_put(jnp.ones((count, 8)), NamedSharding(mesh, P(AXIS)))
        steps = functional(leaves, mesh)
        found[f"{count} of 8 devices"] = microseconds(steps, x, calls)
    steps = of_flax(leaves)
    found["Flax, one device"] = microseconds(steps, jnp.ones((1, 8)), calls)
    return {title: over_plain(times) for title, times in found.items()}


def over_plain(times: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Each with its ratio to the plain step of its kind."""
    base = next(iter(times))

    def ratio(name: str) -> float:
        kind = name.split(":")[0].replace("jax.jit, split", "nnx.jit")
        return times[name] / times.get(f"{kind}: plain", times[base])

    return {name: (t, ratio(name)) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leaves", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=30)
    args = parser.parse_args()
    report.header("accumax on the host", report.host())
    for title, found in tables(args.leaves, args.calls).items():
        report.table(
            f"{args.leaves} leaves, {title}",
            ["", "microseconds", "over plain"],
            [[name, f"{t:.0f}", f"{over:.2f}"] for name, (t, over) in found.items()],
        )


if __name__ == "__main__":
    main()
