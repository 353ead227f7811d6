"""The memory that one compiled step takes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from . import hlo
from .buffers import timeline
from .findings import Shapes, collectives


class Peak(NamedTuple):
    """Bytes of one device.

    Attributes:
      size: the microbatch size that was compiled.
      total: the most that the program holds at a time; None if the compiler refused the
        program because it does not fit the device.
      fixed: arguments and results, which are there from the beginning to the end.
      devices: those that the program runs on; empty if it has no arrays.
      sent: the results of its collective operations in a call; None if the program does
        not say how often a loop runs them.
    """

    size: int
    total: int | None
    fixed: int
    devices: frozenset[Any]
    sent: int | None = None


def measure(make_step: Callable[[int], Any], size: int) -> Peak:
    """Compiles the step of one microbatch size. Nothing runs.

    Raises:
      RuntimeError: the step fails at this size; its own error is the cause.
      TypeError: `make_step` does not return a step.
      ValueError: the backend does not tell the memory.
    """
    try:
        step = make_step(size)
    except Exception as error:
        raise _failed(size, error) from error
    compiled = step
    if not isinstance(step, jax.stages.Compiled):
        try:
            compiled = _lowered(step, size).compile()
        except jax.errors.JaxRuntimeError as error:
            # XLA:TPU does not compile a program that is larger than the memory.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise _failed(size, error) from error
            return Peak(size, None, 0, frozenset())
        except _NoStep as error:
            raise TypeError(str(error)) from None
        except Exception as error:
            raise _failed(size, error) from error
    return _peak(compiled, size)


class _NoStep(TypeError):
    """Told apart from a TypeError of the user's step; never seen outside."""


def _lowered(step: Any, size: int) -> jax.stages.Lowered:
    if isinstance(step, jax.stages.Lowered):
        return step
    if not (
        isinstance(step, (tuple, list))
        and len(step) == 2
        and callable(step[0])
        and isinstance(step[1], (tuple, list))
    ):
        got = "a function alone" if callable(step) else f"a {type(step).__name__}"
        raise _NoStep(
            f"make_step({size}) returned {got}. It must return (function, args), where "
            "args is the tuple of the function's arguments, or a jax.stages.Lowered, "
            "or a jax.stages.Compiled."
        )
    fun, args = step
    with without_debugging():
        return (fun if hasattr(fun, "lower") else jax.jit(fun)).lower(*args)


@contextlib.contextmanager
def without_debugging() -> Iterator[None]:
    """Lowers what a training runs: these flags unroll loops, and donate nothing."""
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        yield


class Sizes(NamedTuple):
    """The memory of one device for a compiled program, in bytes.

    `aliased` is the part of `output` that reuses donated arguments. `host` is what the
    program has in the memory of the host, which is in none of the others.
    """

    arguments: int
    output: int
    aliased: int
    temp: int
    host: int

    @property
    def fixed(self) -> int:
        """Arguments and results, which are there from the beginning to the end."""
        return self.arguments + self.output - self.aliased

    @property
    def total(self) -> int:
        """What the device needs.

        And not the peak that backends tell, about which they do not agree. For 64 rows
        of the transformer of benchmarks/plan.py, XLA:CPU leaves the temporary part out
        of it (13.7 of 111.7 MB), and XLA:TPU counts its vector memory in (67.4 for 17.8
        MB). XLA:GPU agrees to 0.1 %.
        """
        return self.fixed + self.temp


def sizes_of(compiled: Any) -> Sizes | None:
    """What the compiler says about the memory; None if it does not."""
    found = compiled.memory_analysis()
    if not hasattr(found, "temp_size_in_bytes"):
        return None

    def sizes(place: str = "") -> list[int]:
        names = "argument", "output", "alias", "temp"
        return [int(getattr(found, f"{place}{n}_size_in_bytes")) for n in names]

    arguments, output, aliased, temp = sizes("host_")
    return Sizes(*sizes(), host=arguments + output - aliased + temp)


def _peak(compiled: Any, size: int) -> Peak:
    sizes = sizes_of(compiled)
    if sizes is None:
        raise ValueError(
            f"The compiled step of microbatch_size={size} does not tell its memory "
            f"(memory_analysis() is {compiled.memory_analysis()!r}). Compile for a "
            "backend that does: CPU, GPU and TPU do."
        )
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    devices = frozenset().union(*(s.device_set for s in shardings))
    return Peak(size, sizes.total, sizes.fixed, devices, _sent(compiled, devices))


def _sent(compiled: Any, devices: frozenset[Any]) -> int | None:
    if len(devices) < 2:
        return 0
    text = compiled.as_text()
    if not text:
        return None
    module = hlo.parse(text)
    found = collectives(module, timeline(module), Shapes.make([]))
    if any(x.times is None for x in found):
        return None
    return sum(x.bytes * (x.times or 0) for x in found)


def _failed(size: int, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"The step of microbatch_size={size} failed: {type(error).__name__}: {error}"
    )
