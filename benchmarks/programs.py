"""A step compiled for a device: what its program takes in memory, copies and time."""

import gc
import re
import statistics
import time
from typing import Any, NamedTuple

import forms
import jax
from devices import Device


class Compiled(NamedTuple):
    """A compiled step; memory in units of the parameters."""

    arguments: float
    temp: float
    results: float  # those that do not reuse the memory of a donated argument
    copies: int
    moves: int
    seconds: float
    processor: float  # seconds of work, in all threads

    @property
    def total(self) -> float:
        return self.arguments + self.temp + self.results


# Where nothing runs and no compilation is timed: half the time on a CPU, with the same
# buffers and copies.
HASTE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# By default XLA:CPU arranges a program so that much of it can run at a time. This is
# what it did before, and what the other backends do. XLA:TPU keeps what it can in the
# vector memory of a core, which its figures leave out; here nearly all of that memory
# is for the inside of operations, so that the figures of two programs can be compared.
LEAST = {
    "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    "tpu": {"xla_tpu_scoped_vmem_limit_kib": "126976"},
}


def lowered(
    form: forms.Form, params: Any, state: Any, x: Any, on: Device
) -> jax.stages.Lowered:
    """The program of a step whose arguments are on one device."""
    sharding = jax.sharding.SingleDeviceSharding(on)

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree
        )

    return forms.jitted(form).lower(place(params), place(state), place(x))


def compiled(
    form: forms.Form,
    params: Any,
    x: Any,
    on: Device,
    haste: bool = False,
    least: bool = False,
) -> Compiled:
    """Compiles a step for `on`.

    With `haste`, its times mean nothing. With `least`, it has the options in `LEAST`.
    """
    options: Any = LEAST[on.platform] if least else None
    if haste and on.platform == "cpu":
        options = HASTE | (options or {})
    state = jax.eval_shape(form.init, params)
    jax.clear_caches()  # else a form would profit from what another one has traced
    gc.collect()
    start, work = time.perf_counter(), time.process_time()
    step = lowered(form, params, state, x, on).compile(compiler_options=options)
    seconds, work = time.perf_counter() - start, time.process_time() - work
    memory: Any = step.memory_analysis()
    unit = bytes_of(params)
    return Compiled(
        memory.argument_size_in_bytes / unit,
        memory.temp_size_in_bytes / unit,
        (memory.output_size_in_bytes - memory.alias_size_in_bytes) / unit,
        *copies(step.as_text() or "", params),
        seconds,
        work,
    )


def peak(compiled: jax.stages.Compiled) -> int:
    """Bytes of the arguments, results and temporary memory of a device."""
    memory: Any = compiled.memory_analysis()
    fixed = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return fixed - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def bytes_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_in_turns(
    steps: dict[str, forms.Form], params: Any, x: Any, on: Device, turns: int
) -> dict[str, Compiled]:
    """Each step compiled `turns` times; the times are medians."""
    found = [
        {name: compiled(form, params, x, on) for name, form in steps.items()}
        for _ in range(turns)
    ]

    def median(name: str) -> Compiled:
        return found[0][name]._replace(
            seconds=statistics.median(turn[name].seconds for turn in found),
            processor=statistics.median(turn[name].processor for turn in found),
        )

    return {name: median(name) for name in steps}


def copies(text: str, params: Any) -> tuple[int, int]:
    """Copies of a parameter's size, and moves of one between two memories, in HLO.

    A copy counts wherever it stands: by itself, in a fusion, in a loop. XLA:GPU writes
    some as a transposition. `copy-start` gives (destination, source, context); on the
    TPU target the two are in different memories: S(1) is the vector memory.
    """
    shapes = {_dims(s) for p in jax.tree.leaves(params) for s in _sizes(p, params)}
    copied = moved = 0
    for result, op in re.findall(
        r" = (\(.*?\)|\S+) (copy|copy-start|transpose)\(", text
    ):
        arrays = re.findall(r"\w+\[([\d,]*)\](?:\{[^}]*?(S\(\d+\))?\})?", result)
        dims = [int(d) for d in arrays[0][0].split(",") if d]
        if _dims(dims) in shapes:
            within = op != "copy-start" or arrays[0][1] == arrays[1][1]
            copied, moved = copied + within, moved + (not within)
    return copied, moved


def _sizes(p: Any, params: Any) -> list[tuple[int, ...]]:
    most = max(leaf.size for leaf in jax.tree.leaves(params))
    if p.size < most / 1000:
        return []  # scales and biases
    return [p.shape, p.shape[1:]] if len(p.shape) > 2 else [p.shape]


def _dims(shape: Any) -> tuple[int, ...]:
    return tuple(sorted(d for d in shape if d > 1))
