"""Arrays in the memory of the host, which a device reads and writes by its link.

Measured with jax 0.10.2 for a TPU (v5e); `benchmarks/offload.py` repeats it.
"""

import collections
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr

from .jaxprs import evaluate_part, inlined, is_variable, known_at_start

T = TypeVar("T")

LEAST = 2**16  # elements that are worth a transfer


def to_host(tree: T) -> T:
    """Places the large arrays of `tree` in host memory.

    Also tells JAX that they are there: under jit, the type of an argument does not say
    in which memory it is, and the carry of a loop must have one type.

    Raises:
      NotImplementedError: the default backend is a GPU, or JAX is too old.
    """
    if jax.__version_info__ < (0, 10, 2):  # a CPU's arrays stay where they are
        raise NotImplementedError(
            f"offload_optimizer=True needs JAX 0.10.2 or newer, and this is JAX "
            f"{jax.__version__}. Update JAX, or leave it out."
        )
    # With jax 0.10.2 for an H100: "Copy-start ... doesn't have correct host memory
    # space color". Without donation it compiles, with all of the state on the device.
    if jax.default_backend() == "gpu":
        raise NotImplementedError(
            "offload_optimizer=True carries the optimizer's state, in host memory, "
            "through a loop, and XLA does not compile that for a GPU. Leave it out. "
            'accumax.DataParallel("data", shard_optimizer=True) divides the state over '
            "devices."
        )
    return _placed(tree, jax.memory.Space.Host)


def to_device(tree: T) -> T:
    """Places what `to_host` has placed back in the memory of the device."""
    return _placed(tree, jax.memory.Space.Device)


def _placed(tree: T, space: Any) -> T:
    def place(x: Any) -> Any:
        return jax.device_put(x, space) if getattr(x, "size", 0) >= LEAST else x

    return jax.tree.map(place, tree)


def in_turns(fun: Callable[..., T]) -> Callable[..., T]:
    """Returns `fun`, `(carry, *args) -> carry`, with its transfers one after another.

    `fun` fetches arrays of the carry from the host, and sends new ones back. XLA:TPU
    would fetch all of them first, since Optax takes each step of an optimizer for all
    parameters: a device then needs the memory that the host was to save (16 matrices,
    Adam: 2.2 of temp, and 0.25 in turns). So the program of `fun` is arranged by
    results: what the first parameter needs, then what the second needs, and so on. The
    arrays for a parameter are fetched when those for the one before it are back on the
    host. No value changes. A program with effects, as on a `jax.Ref`, keeps its order.
    """

    def run(carry: T, *args: Any) -> T:
        leaves, structure = jax.tree.flatten((carry, args))
        # An extra argument of an optimizer may be a function, such as `value_fn`.
        places = [i for i, x in enumerate(leaves) if _is_array(x)]
        arrays = [leaves[i] for i in places]

        def of_arrays(*arrays: jax.Array) -> T:
            new = leaves.copy()
            for i, x in zip(places, arrays, strict=True):
                new[i] = x
            carry, args = structure.unflatten(new)
            return fun(carry, *args)

        program, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
        if program.effects:
            return fun(carry, *args)
        # Optax has steps under `jax.jit` that take the arrays of all parameters.
        flat = jax.make_jaxpr(lambda *x: inlined(program, x))(*arrays)
        out = _evaluate_in_turns(flat, arrays, len(jax.tree.leaves(carry)))
        return jax.tree.structure(shapes).unflatten(out)

    return run


def _evaluate_in_turns(
    program: ClosedJaxpr, args: list[jax.Array], carried: int
) -> list[Any]:
    """Evaluates a program whose results replace the first `carried` arguments."""
    jaxpr, known = program.jaxpr, known_at_start(program, args)
    made_by = {x: i for i, eqn in enumerate(jaxpr.eqns) for x in eqn.outvars}
    left = dict(enumerate(jaxpr.eqns))
    readers = collections.Counter(
        x for eqn in jaxpr.eqns for x in eqn.invars if is_variable(x)
    ) + collections.Counter(filter(is_variable, jaxpr.outvars))
    on_host = [_is_on_host(x) for x in args[:carried]]
    waiting = {x: i for i, x in enumerate(jaxpr.invars[:carried]) if on_host[i]}
    before: list[jax.Array] = []  # nothing is fetched until these are there

    def needed(variables: Iterable[Any]) -> set[int]:
        found, stack = set[int](), list(filter(is_variable, variables))
        while stack:
            i = made_by.get(stack.pop())
            if i in left and i not in found:
                found.add(i)
                stack += filter(is_variable, left[i].invars)
        return found

    def evaluate(indices: set[int]) -> list[int]:
        """Returns which arguments on the host these equations are the first to read."""
        eqns = [left.pop(i) for i in sorted(indices)]
        if not eqns:
            return []
        read = [x for eqn in eqns for x in eqn.invars if is_variable(x)]
        readers.subtract(read)
        fetched = [x for x in dict.fromkeys(read) if x in waiting]
        if fetched and before:
            arrays = [known[x] for x in fetched]
            arrays, _ = lax.optimization_barrier((arrays, before))
            known.update(zip(fetched, arrays, strict=True))
        evaluate_part(jaxpr, eqns, lambda x: readers[x] > 0, known)
        return [waiting.pop(x) for x in fetched]

    def value(x: Any) -> Any:
        return known[x] if is_variable(x) else x.val

    for x, is_state in zip(jaxpr.outvars, on_host, strict=True):
        if is_state:
            continue
        if fetched := evaluate(needed([x])):
            back = [jaxpr.outvars[i] for i in fetched]
            evaluate(needed(back))
            before = [value(y) for y in (x, *back)]
    effects = {i for i, eqn in left.items() if eqn.effects}
    evaluate(needed(jaxpr.outvars) | effects)
    return [value(x) for x in jaxpr.outvars]


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype") or isinstance(x, (bool, int, float, complex))


def _is_on_host(x: jax.Array) -> bool:
    return getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host
