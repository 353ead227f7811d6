"""The backward pass that adds gradients into refs, so that no gradient tree exists.

Measured with jax 0.10.2 to 0.12 for CPU, GPU (H100) and TPU (v5e);
`benchmarks/targets.py` repeats the measurements.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .._tree import strong
from .._types import PyTree
from .chains import Chain, may_move, moves, run, value
from .jaxprs import of_linear_program, sliced, sliced_in_place, unsafe_refs
from .loops import at_most_once, reset
from .programs import join_arrays, program_of, run_isolated, split_arrays
from .varying import on_mesh_of, typed_like, zeros

T = TypeVar("T")

# Through which port a gradient leaves: none; one at each place where the parameter is
# used, if a scan reads it; or one before all places. In a question about the loss, a
# parameter with a port before all places is a value, in which no chain begins.
_NO, _INSIDE, _OUTSIDE, _VALUE = "no port", "inside", "outside", "a value"

# Whether this JAX adds gradients into the wrong refs; see `unsafe_refs`.
_MISPLACES = jax.__version_info__ < (0, 11)

# JAX takes a loop apart if something in it is differentiated, also if that is nothing
# of ours: it computes once, before the loop, what is the same in each turn. JAX 0.12
# moves a new ref there without what is added to it. Then each turn goes on adding to
# the sums of the turn before, and no error says so (first-order MAML in a scan: off by
# 0.3; 0.11 raises an error). So a ref begins with sums that depend on the loss. Where a
# loop of ours carries the sums, JAX raises; there a barrier costs memory (a perceptron
# on a TPU: 5.4 for 4.5 x parameters).
_MOVES_REFS = jax.__version_info__ >= (0, 11)


def add_backward(
    fun: Callable[[PyTree], Any],
    params: PyTree,
    sums: PyTree,
    first: jax.Array | None = None,
    taken: jax.Array | None = None,
    alone: bool = True,
) -> tuple[Any, PyTree]:
    """Runs `fun` forward, and backward into `sums`.

    With `jax.vjp(...).with_refs` the backward pass adds into the accumulator, so that
    no gradient tree exists. The twin that carries the tree is `jax.vjp` and
    `Accumulator.add`.

    A cast of stacked parameters is moved into the scan that reads them (`chains.run`),
    and so is the port of a parameter whose accumulator has another dtype: only one
    layer's gradient exists in the parameter's dtype.

    JAX cannot differentiate every loss into refs: before 0.12 it fails if the loss
    slices a parameter, in 0.12 if the loss calls `lax.optimization_barrier`. After a
    failure, ports are put before the sliced parameters and then, with a warning, before
    all. The gradient of a parameter with a port before it is built and then added.
    Without jit all have one: XLA compiles no single program that could save memory.

    JAX before 0.11 silently swaps or loses gradients where a scan has parameters beside
    values computed from parameters, or a call gets a parameter twice. `unsafe_refs`
    finds such parameters in the loss's linear program. A port is put before them, with
    a warning that states the memory.

    Args:
      fun: `(params) -> (loss, (values, aux))`: loss a real scalar; values and aux any
        trees.
      params: the parameters; each leaf a float array or None.
      sums: the accumulator, of the same structure, in any float dtypes.
      first: () bool, whether a window opens; `sums` is then stale and not read. None
        if no window opens.
      taken: () bool, whether the gradient is added; None for always. If it is False,
        `values` are zeros, and nothing is computed if `aux` has no arrays.
      alone: whether no loop of ours is around it, which would carry `sums`; static.

    Returns:
      `((values, aux), sums)`.
    """
    failure = None
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((params, sums))):
        attempts = _attempts(fun, params, sums)
        while True:
            try:
                attempt = next(attempts, None)
                if attempt is None:
                    break
                of_leaves, ports, unless = attempt
                add = functools.partial(_add_backward, of_leaves, ports, alone)
                # A loop has no derivative in reverse mode that this could hide.
                options: Any = {"unless": unless, "as_one": taken is not None}
                out = run_isolated(add, params, sums, first, taken, **options)
                if out is not None:
                    return out
            except Exception as error:  # an error of `fun` itself is raised again below
                failure = repr(error).splitlines()[0]
    ports = [_OUTSIDE] * len(jax.tree.leaves(params))
    add = functools.partial(_add_backward, _of_leaves(fun, params), ports, alone)
    out = add(params, sums, first, taken)
    if failure is not None:
        warnings.warn(
            f"JAX {jax.__version__} could not add this loss's gradient in place "
            f"({failure}), so a gradient tree is built and added. The update is the "
            "same; in_place=False does it without this warning.",
            stacklevel=3,
        )
    return out


def _attempts(
    fun: Callable[[PyTree], Any], params: PyTree, sums: PyTree
) -> Iterator[tuple[Callable[..., Any], list[str], Callable[[Any], bool] | None]]:
    """Yields what to try: the loss, a port for each leaf, and what refuses the program.

    The first attempt traces the loss once. It is refused if a cast could move.
    """
    ports = _required(jax.tree.leaves(params), jax.tree.leaves(sums))
    if not _MISPLACES and _INSIDE not in ports:
        yield _of_leaves(fun, params), ports, lambda x: may_move(x, len(ports))
    traced = _traced(fun, params)
    for ports in _ports(traced, params, sums):
        yield traced, ports, None


def _of_leaves(fun: Callable[[PyTree], Any], params: PyTree) -> Callable[..., Any]:
    """Returns `fun` as a function of the leaves of `params`, arrays or `Chain`s."""
    structure = jax.tree.structure(params)
    return lambda leaves: fun(structure.unflatten(map(value, leaves)))


def _traced(fun: Callable[[PyTree], Any], params: PyTree) -> Callable[..., Any]:
    """As `_of_leaves`, with chains moved into scans."""
    program, join = program_of(fun, params)
    as_it_is = _of_leaves(fun, params)

    def of_leaves(leaves: list[Any]) -> Any:
        # To trace `fun` again is cheaper than to differentiate its equations: JAX
        # differentiates what is jitted in it, such as a matmul, once for all layers.
        if not moves(program, leaves):
            return as_it_is(leaves)
        return join(run(program, leaves))

    return of_leaves


def _through(
    fun: Callable[..., Any],
    ports: list[str],
    leaves: list[jax.Array],
    variables: list[jax.Array],
) -> Any:
    """Calls `fun`; the gradients of `leaves` leave through `variables`."""

    def argument(p: jax.Array, v: jax.Array, port: str) -> jax.Array | Chain:
        if port == _VALUE:
            return v
        if port == _OUTSIDE:
            return _port(p, v)
        return Chain((v,)) if port == _NO else Chain((p, v), _port)

    return fun(list(map(argument, leaves, variables, ports)))


def _variables(
    ports: list[str], leaves: list[jax.Array], sums: list[jax.Array]
) -> list[jax.Array]:
    """The variables of `_through`. A port is zeros, which XLA drops.

    A parameter's cotangent leaves through the port in the accumulator's dtype.
    """

    def variable(p: jax.Array, s: jax.Array, port: str) -> jax.Array:
        return p if port in (_NO, _VALUE) else typed_like(jnp.zeros_like(s), s)

    return list(map(variable, leaves, sums, ports))


def _add_backward(
    fun: Callable[..., Any],
    ports: list[str],
    alone: bool,
    params: PyTree,
    sums: PyTree,
    first: jax.Array | None,
    taken: jax.Array | None,
) -> tuple[Any, PyTree]:
    leaves, totals = jax.tree.leaves(params), jax.tree.leaves(sums)
    through = functools.partial(_through, fun, ports, leaves)

    def add(vjp: Any, sums: PyTree, seed: jax.Array) -> PyTree:
        refs = jax.tree.map(jax.new_ref, sums)
        with jax.named_scope("accumax.backward"):
            vjp.with_refs(jax.tree.leaves(refs))(seed)
        return jax.tree.map(jax.freeze, refs)

    variables = _variables(ports, leaves, totals)
    if taken is None:
        loss, vjp, aux = jax.vjp(through, variables, has_aux=True)
        seed, sums = jnp.ones_like(loss), on_mesh_of(jax.typeof(loss), sums)
        if _MOVES_REFS and alone:
            sums, _ = lax.optimization_barrier((sums, loss))
        if first is not None:
            sums, seed = reset(sums, first, seed)
        return aux, add(vjp, sums, seed)
    # One loop runs both passes. A loop around the backward pass alone would keep the
    # residuals alive to its end: 2.0 times the temp of the mean loss, for layers that
    # are not scanned. A seed of 0 instead of a loop would not remove a NaN.
    static: list[Any] = []

    def through_arrays(variables: list[jax.Array]) -> Any:
        loss, (values, aux) = through(variables)
        arrays, *static[:] = split_arrays(aux)
        return loss, jax.tree.map(strong, (values, arrays))

    like, out = jax.eval_shape(through_arrays, variables)
    seed, sums = jnp.ones((), like.dtype), on_mesh_of(like, sums)
    if first is not None:
        sums, seed = reset(sums, first, seed)

    def both(carry: Any) -> Any:
        loss, vjp, out = jax.vjp(through_arrays, variables, has_aux=True)
        return out, add(vjp, carry[1], typed_like(seed, loss))

    def forward(aux: list[jax.Array]) -> list[jax.Array]:
        del aux
        return through_arrays(variables)[1][1]

    (values, aux), sums = at_most_once(taken, both, (jax.tree.map(zeros, out), sums))
    if aux:
        aux = at_most_once(~taken, forward, aux)
    return (values, join_arrays(aux, *static)), sums


@jax.custom_vjp
def _port(p: jax.Array, q: jax.Array) -> jax.Array:
    """Returns `p`; its cotangent leaves through `q`, in the dtype of `q`."""
    del q
    return p


def _port_fwd(p: jax.Array, q: jax.Array) -> tuple[jax.Array, Any]:
    return p, jnp.zeros((0,), q.dtype)


def _port_bwd(like: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    zeros = typed_like(jnp.zeros_like(cotangent), cotangent)
    return zeros, cotangent.astype(like.dtype)


_port.defvjp(_port_fwd, _port_bwd)


def _required(leaves: list[jax.Array], sums: list[jax.Array]) -> list[str]:
    """The ports that JAX requires."""

    def port(p: jax.Array, s: jax.Array) -> str:
        if not p.size:  # XLA cannot slice a ref of no layers
            return _OUTSIDE
        # From 0.12 on, JAX requires that a ref has the dtype of its variable.
        return _NO if p.dtype == s.dtype else _INSIDE

    return list(map(port, leaves, sums))


def _ports(
    fun: Callable[..., Any], params: PyTree, sums: PyTree
) -> Iterator[list[str]]:
    """Yields a port for each leaf: those that JAX requires, then also sliced ones."""
    leaves, totals = jax.tree.leaves(params), jax.tree.leaves(sums)
    ports = _required(leaves, totals)

    def found(ask: Callable[[Any], set[int]]) -> set[int]:
        """Asks the linear program; leaves with a port outside are variables in it."""
        asked = [_VALUE if port == _OUTSIDE else port for port in ports]
        loss = functools.partial(_through, fun, asked, leaves)
        return of_linear_program(ask, loss, _variables(asked, leaves, totals))

    def outside() -> set[int]:
        return {i for i, port in enumerate(ports) if port == _OUTSIDE}

    def with_outside(ported: set[int]) -> list[str]:
        return [_OUTSIDE if i in ported else port for i, port in enumerate(ports)]

    def safe(program: Any, ported: set[int]) -> set[int]:
        return unsafe_refs(program, ported) if _MISPLACES else ported

    if _MISPLACES:
        # An attempt that fails is never freed: JAX holds on to a trace that raised.
        slices: set[int] = set()

        def ask(program: Any) -> set[int]:
            slices.update(sliced_in_place(program))
            return unsafe_refs(program, outside() | slices)

        ported = found(ask)
        if wrong := ported - slices - outside():
            _warn_of_ports(params, wrong)
        ports = with_outside(ported)
    yield ports
    more = found(lambda program: safe(program, outside() | sliced(program)))
    if more != outside():  # else the same ports again
        yield with_outside(more)


def _warn_of_ports(params: PyTree, ported: set[int]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = ", ".join(jax.tree_util.keystr(leaves[i][0]) for i in sorted(ported)[:8])
    size = sum(leaves[i][1].nbytes for i in ported)
    warnings.warn(
        f"JAX {jax.__version__} would get the gradients of this loss wrong in place, "
        "where a lax.scan has parameters beside values computed from parameters, or a "
        "call is handed a parameter twice (JAX pull request 38929). So the gradients "
        f"of {len(ported)} parameters ({paths}) are built and then added: the update "
        f"is right, and a step takes up to {size} bytes more. JAX 0.11 does not need "
        "this; in_place=False builds the gradients of all parameters without this "
        "warning.",
        stacklevel=4,
    )
