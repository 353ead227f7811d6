"""A function of a batch, computed and differentiated one microbatch at a time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from . import _tree
from ._batch.arguments import Place, Places
from ._batch.outputs import Reducer, reducer
from ._batch.scan import add_carried
from ._batch.split import Part, Parts, split
from ._sums import Accumulator, accumulator
from ._types import DTypeLike, PyTree
from ._xla.programs import needs_tree
from ._xla.refs import add_backward
from ._xla.varying import typed_like


def microbatch(
    fun: Callable[..., PyTree],
    *,
    microbatch_size: int,
    batch_argnums: Places = 1,
    rng_argnums: Places = (),
    accumulator_dtype: DTypeLike | None = jnp.dtype(jnp.float32),
    unroll: int | bool = 1,
    in_place: bool = True,
) -> Callable[..., PyTree]:
    """Computes `fun` of a batch one microbatch at a time, with the same outputs.

    The forward pass stores only arguments and outputs. The backward pass computes each
    microbatch again and adds its parameter gradient into one accumulator.

    Use it for a loss in which every example sees every other (InfoNCE and other
    contrastive losses). The gradient is exact, at the memory of one microbatch and of
    all outputs.

    Args:
      fun: a function that returns a tree of arrays, with one row for each row of the
        batch along the first axis. It must compute each row from that row only.
      microbatch_size: the rows of a microbatch; the last microbatch may have fewer.
        Static, as are all arguments below.
      batch_argnums: the arguments that hold the batch; see `accumax.value_and_grad`.
      rng_argnums: PRNG keys. Microbatch i gets `jax.random.fold_in(key, i)`, the same
        in both passes.
      accumulator_dtype: the dtype that gradients of parameters are added in; None for
        their own. With float64 parameters pass float64 or None.
      unroll: as for `accumax.value_and_grad`: True for convolutions on a CPU.
      in_place: False carries a gradient tree through the scan instead.

    Returns:
      A function of the arguments of `fun`. It can be differentiated in reverse mode
      with respect to all floating-point arguments, the batch included, and to arrays
      that `fun` closes over.

    Raises:
      TypeError, ValueError: an argument is wrong, at once; or a call does not fit it,
        or an output does not have the rows of its microbatch.

    >>> import accumax, jax, optax
    >>> import jax.numpy as jnp
    >>> embed = accumax.microbatch(lambda w, x: jnp.tanh(x @ w), microbatch_size=2)
    >>> def loss_fn(w, x, y):
    ...     scores = embed(w, x) @ embed(w, y).T  # each x with every y
    ...     which = jnp.arange(len(x))
    ...     losses = optax.softmax_cross_entropy_with_integer_labels(scores, which)
    ...     return losses.mean()
    >>> x = jnp.linspace(-1, 1, 24).reshape(8, 3)
    >>> print(jax.jit(jax.grad(loss_fn))(jnp.eye(3), x, x).shape)
    (3, 3)

    References:
      Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited
      Setup, arXiv 2101.06983 (GradCache).
    """
    if not callable(fun):
        raise TypeError(f"{fun=} must be a function that returns a row for each row.")
    _tree.check_flags(in_place=in_place)
    divide = split(microbatch_size, None, batch_argnums, rng_argnums, unroll)
    accumulated = accumulator(reduction="sum", dtype=accumulator_dtype)

    @functools.wraps(fun, updated=())
    def microbatch_fun(*args: Any, **kwargs: Any) -> PyTree:
        divide.rows(fun, (), args, kwargs)
        given = _arrays((args, kwargs))
        # What `backward` closes over must hold no tracer of the call.
        leaves, structure = jax.tree.flatten((args, kwargs))
        static = [None if _is_array(x) else x for x in leaves]

        def call_of(arrays: PyTree) -> tuple[tuple, dict[str, Any]]:
            each = zip(static, structure.flatten_up_to(arrays), strict=True)
            return structure.unflatten([x if s is None else s for s, x in each])

        def parts_of(arrays: PyTree) -> Parts:
            return divide.parts(fun, (), *call_of(arrays))

        def pure(part: Part) -> tuple[Callable[..., PyTree], list[jax.Array]]:
            """Returns `fun` of arrays, and the arrays that it closes over."""

            def of_arrays(arrays: PyTree) -> PyTree:
                args, kwargs = call_of(arrays)
                out = fun(*args, **kwargs)
                _check_rows(out, part.rows)
                return out

            return _convert(of_arrays, _arrays(part.call()))

        each = parts_of(given).each()
        funs, closed = zip(*map(pure, each), strict=True)

        def outputs(inputs: PyTree) -> PyTree:
            return _outputs(funs, parts_of(inputs[0]), inputs[1])

        def forward(primals: PyTree) -> tuple[PyTree, Any]:
            # No gradient is computed for inputs that are not differentiated.
            wanted = jax.tree.map(lambda x: x.value if x.perturbed else None, primals)
            others = jax.tree.map(lambda x: None if x.perturbed else x.value, primals)
            return outputs(_tree.restore(wanted, others)), (wanted, others)

        def backward(residuals: Any, cotangents: PyTree) -> tuple[PyTree]:
            wanted, others = residuals
            arrays, _ = _tree.restore(wanted, others)
            return (
                _gradient(
                    funs,
                    parts_of(arrays),
                    wanted,
                    others[1],
                    cotangents,
                    accumulated,
                    in_place and not needs_tree((residuals, cotangents)),
                ),
            )

        differentiable = jax.custom_vjp(outputs)
        differentiable.defvjp(forward, backward, symbolic_zeros=True)
        return differentiable((given, closed))

    return microbatch_fun


def _convert(
    fun: Callable[[PyTree], PyTree], example: PyTree
) -> tuple[Callable[..., PyTree], list[jax.Array]]:
    """Returns `fun` of `(arrays, *closed)`, and all arrays that it closes over.

    `jax.closure_convert` leaves out integers and keys. `jax.custom_vjp` must not close
    over these either, within a scan, a checkpoint or a vmap.
    """
    jaxpr, shapes = jax.make_jaxpr(fun, return_shape=True)(example)
    structure = jax.tree.structure(shapes)

    def converted(arrays: PyTree, *closed: jax.Array) -> PyTree:
        run = jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, closed))
        return structure.unflatten(run(*jax.tree.leaves(arrays)))

    return converted, [jnp.asarray(x) for x in jaxpr.consts]


def _outputs(funs: Sequence[Callable[..., PyTree]], parts: Parts, closed: Any) -> Any:
    def run(part: Part) -> PyTree:
        return funs[part.tail](_arrays(part.call()), *closed[part.tail])

    def body(sums: list[Any], part: Part) -> list[Any]:
        return reducer.add(sums, run(part), part, 1.0)

    reducer = _concatenated(run, parts)
    return reducer.result(parts.scan(body, reducer.init()), 1.0)


def _gradient(
    funs: Sequence[Callable[..., PyTree]],
    parts: Parts,
    wanted: PyTree,
    closed: Any,
    cotangents: PyTree,
    accumulated: Accumulator,
    in_place: bool,
) -> PyTree:
    """Computes the gradient for `wanted`: `(arguments of the call, closed arrays)`.

    It is None where `wanted` is None; `closed` has the other closed-over arrays.
    """
    shared = _of_places(wanted[0], parts.places, False), wanted[1]
    rows = _of_places(wanted[0], parts.places, True)
    cut = parts.divide(jax.tree.map(_known, cotangents, is_leaf=_is_symbolic))

    def body(carry: tuple[PyTree, list[Any]], part: Part) -> Any:
        grads, given = carry
        arrays, ct = _arrays(part.call()), cut(part.index, part.tail)
        here = _tree.masked(arrays, rows)

        def product(live: PyTree) -> tuple[jax.Array, Any]:
            # The gradient of <cotangent, outputs> is the vector-Jacobian product.
            consts = _tree.restore(live[1], closed)[part.tail]
            out = funs[part.tail](_tree.restore(live[0], arrays), *consts)
            terms = jax.tree.map(
                lambda c, x: None if c is None else _wide_sum(c * x),
                ct,
                out,
                is_leaf=lambda c: c is None,
            )
            return sum(jax.tree.leaves(terms), jnp.zeros(())), ((), ())

        def with_rows(tree: PyTree, here: PyTree) -> PyTree:
            return _tree.restore(tree[0], here), tree[1]

        live = with_rows(shared, here)
        zeros = typed_like(_tree.minus_zeros_like(here), here)
        sums = with_rows(grads, zeros)
        in_refs = functools.partial(add_backward, alone=part.alone)
        add = in_refs if in_place else add_carried
        _, sums = add(product, live, sums)
        given = reducer.add(given, _tree.masked(sums[0], rows), part, 1.0)
        return _tree.masked(sums, shared), given

    def rows_of(part: Part) -> PyTree:
        return _tree.masked(_arrays(part.call()), rows)

    reducer = _concatenated(rows_of, parts)
    grads = _tree.minus_zeros_like(accumulated.init(shared).grads)
    grads = typed_like(grads, shared)
    grads, given = parts.scan(body, (grads, reducer.init()))
    grads = _tree.cast_like(grads, shared)
    return _tree.restore(grads[0], reducer.result(given, 1.0)), grads[1]


def _concatenated(fun: Callable[[Part], PyTree], parts: Parts) -> Reducer:
    """Makes the `Reducer` that concatenates the outputs of `fun`, one value a row."""

    shapes = [jax.eval_shape(lambda part=part: fun(part)) for part in parts.each()]
    return reducer("concat", shapes[0], shapes[-1], parts)


def _check_rows(out: PyTree, rows: int) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(out):
        if np.shape(x)[:1] != (rows,):
            raise ValueError(
                f"The output{jax.tree_util.keystr(path)} of the function is "
                f"{_tree.describe(x)} for a microbatch of {rows} rows; expected one "
                "value a row, along the first axis. Arguments with rows that "
                "batch_argnums does not name go whole to each microbatch."
            )


def _wide_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x).astype(_tree.wide(x.dtype))


def _arrays(tree: PyTree) -> PyTree:
    """Returns the arrays of `tree`, with None for the rest, such as Python numbers."""

    return jax.tree.map(lambda x: jnp.asarray(x) if _is_array(x) else None, tree)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


def _of_places(call: PyTree, places: frozenset[Place], inside: bool) -> PyTree:
    """Keeps the arguments in `places` if `inside`, else the others; None elsewhere."""

    def part(place: Place, tree: PyTree) -> PyTree:
        return tree if (place in places) == inside else jax.tree.map(_none, tree)

    args, kwargs = call
    return (
        tuple(part(n, x) for n, x in enumerate(args)),
        {name: part(name, x) for name, x in kwargs.items()},
    )


def _none(_: Any) -> None:
    return None


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _known(ct: Any) -> jax.Array | None:
    """Returns a cotangent, or None if it is zero, as for an integer."""
    return ct if not _is_symbolic(ct) and _tree.is_differentiable(ct) else None
