"""Times as rows: of windows, hold calls, tracing, compiling and the host.

All are ratios within one run, or say that they are not. The forms take turns, and each
time is the least of all turns, which other work on the machine disturbs least.
"""

import functools
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import forms
import jax
import jax.numpy as jnp
import optax
import peers
import zoo
from forms import EVERY, Form
from results import Row
from runs import Runner, in_turns

FLOOR = "floor"  # eight gradients, each written over the one before, and one update
ADD = "acc += g"


def arrays(shapes: Any, seed: int = 0) -> Any:
    """Arrays of these shapes: small normal ones, or integers below 64."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = jax.random.key(seed)

    def array(n: int, s: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.fold_in(rng, n)
        if jnp.issubdtype(s.dtype, jnp.integer):
            return jax.random.randint(key, s.shape, 0, 64, s.dtype)
        return 0.02 * jax.random.normal(key, s.shape, s.dtype)

    return structure.unflatten([array(n, s) for n, s in enumerate(leaves)])


def least(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(turn[name] for turn in turns) for name in turns[0]}


def windows(model: zoo.Model, target: str, turns: int) -> list[Row]:
    """Time of a window of each form over that of the floor."""
    params, x = arrays(model.params), arrays(model.x, 1)
    whole = jnp.concatenate([x] * EVERY)
    # XLA:CPU computes convolutions slowly in a loop (JAX issue 12868).
    steps = peers.steps(model, unroll=model.name == "resnet" and target == "cpu")
    if model.name == "resnet" and target == "cpu":
        del steps["microbatching"]  # it cannot unroll: minutes
    gradient = Runner(forms.kept(jax.value_and_grad(model.loss)), params)
    update = Runner(steps[peers.NONE].form, params)

    def floor() -> float:
        return gradient.run(x, EVERY - 1) + update.run(x, 1)

    runs: dict[str, Callable[[], float]] = {FLOOR: floor}
    for name, (form, count) in steps.items():
        calls, batch = (EVERY, x) if count == 1 else (1, whole)
        runner = Runner(form, params)
        runs[name] = functools.partial(runner.run, batch, calls)
    found = least(in_turns(runs, turns))
    case = f"time/{model.name}/{model.optimizer}/{target}"
    return [
        Row(f"{case}/{name}", seconds / found[FLOOR], "x floor")
        for name, seconds in found.items()
        if name != FLOOR
    ] + [Row(f"{case}/floor_ms", 1e3 * found[FLOOR], "ms")]


def hold(target: str, count: int, width: int, turns: int) -> list[Row]:
    """A call within a window that is given the gradient, over `acc += g`."""
    params = arrays(forms.matrices(count, width))
    grads = jax.tree.map(jnp.cos, params)

    def add(acc: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return jax.tree.map(jnp.add, acc, grads), state

    steps = {ADD: Form(add, lambda params: ()), **peers.optimizers(forms.ADAMW)}
    runners = {name: Runner(form, params) for name, form in steps.items()}

    def held(runner: Runner) -> float:
        seconds = runner.run(grads, EVERY - 1)
        runner.run(grads, 1)  # closes the window
        return seconds

    runs = {name: functools.partial(held, r) for name, r in runners.items()}
    found = least(in_turns(runs, turns))
    case = f"hold/{count}x{width}x{width}/{target}"
    return [
        Row(f"{case}/{name}", found[name] / found[ADD], "x acc += g")
        for name in steps
        if name != ADD
    ]


def host(target: str, leaves: int, turns: int) -> list[Row]:
    """Microseconds of a hold call where the arrays are so small that Python counts."""
    params = arrays([zoo.array(16)] * leaves)
    steps = {peers.NONE: forms.applied(forms.ADAMW), **peers.optimizers(forms.ADAMW)}
    runners = {name: Runner(form, params) for name, form in steps.items()}
    calls = EVERY * max(1, 200 // leaves)
    runs = {
        name: functools.partial(r.run, params, calls) for name, r in runners.items()
    }
    found = least(in_turns(runs, turns))
    return [
        Row(f"host/leaves_{leaves}/{target}/{name}", 1e6 * seconds / calls, "us")
        for name, seconds in found.items()
    ]


class Compiling(NamedTuple):
    """Seconds: to trace and lower, and processor seconds to compile."""

    trace: float
    work: float


def compiling(
    steps: dict[str, peers.Step],
    model: zoo.Model,
    on: Any,
    turns: int,
    compiles: bool = True,
) -> dict[str, Compiling]:
    """The least of `turns`; without `compiles`, it only traces."""
    sharding = jax.sharding.SingleDeviceSharding(on)

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    def once(step: peers.Step) -> Compiling:
        (form, count), (rows, *shape) = step, model.x.shape
        state = jax.eval_shape(form.init, model.params)
        x = jax.ShapeDtypeStruct((count * rows, *shape), model.x.dtype)
        jax.clear_caches()
        gc.collect()
        start = time.perf_counter()
        lowered = forms.jitted(form).lower(place(model.params), place(state), place(x))
        trace, work = time.perf_counter() - start, time.process_time()
        if compiles:
            lowered.compile()
        return Compiling(trace, time.process_time() - work)

    found = [{name: once(s) for name, s in steps.items()} for _ in range(turns)]
    return {
        name: Compiling(*(min(turn[name][i] for turn in found) for i in range(2)))
        for name in steps
    }


def compile_rows(
    model: zoo.Model, on: Any, target: str, turns: int, only: Iterable[str] = ()
) -> list[Row]:
    """Times to trace and to compile a train step, over those of the plain step."""
    steps = peers.steps(model)
    steps = {name: steps[name] for name in only or steps if name in steps}
    found = compiling(steps, model, on, turns)
    plain = found[peers.NONE]
    rows = []
    for name, times in found.items():
        case = f"{model.name}/{model.optimizer}/{target}/{name}"
        rows.append(Row(f"trace/{case}", times.trace / plain.trace, "x none"))
        rows.append(Row(f"compile/{case}", times.work / plain.work, "x none"))
    return rows


def inner_runs() -> list[Row]:
    """How often the inner optimizer runs in a window of eight."""
    calls = []

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        jax.debug.callback(lambda: calls.append(1))
        return forms.ADAMW.update(updates, state, params)

    inner = optax.GradientTransformation(forms.ADAMW.init, update)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(x @ params)

    model = zoo.Model("", loss, zoo.array(4), zoo.array(2, 4), inner)
    rows = []
    for name, (form, count) in peers.steps(model).items():
        if name in (peers.NONE, "train_step_divided"):  # a window is one call, or two
            continue
        calls.clear()
        x = jnp.ones((2 * count, 4))
        Runner(form, jnp.ones(4)).run(x, EVERY if count == 1 else 1)
        jax.effects_barrier()
        rows.append(Row(f"inner_runs/{name}", len(calls), "runs"))
    return rows
