"""The arithmetic of accumulation: weights, reductions and the non-finite policy.

Accumulation across calls and accumulation within a call differ only in the loop. Both
call `add` once for each microbatch and `result` once for each window.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from . import _tree
from ._noise import Share, Small
from ._types import ArrayLike, DTypeLike, NonFinite, PyTree, Reduction


class Sums(NamedTuple):
    """The running sums of a window.

    Attributes:
      grads: the gradients' sum, shaped as the parameters, in the accumulator dtype;
        None at leaves without a gradient. Stale (not zero) while no window is open.
      weight: () float, the sum of the weights; 0 while no window is open.
      args: the weighted sum of each averaged argument, () float. Stale as `grads` is.
    """

    grads: PyTree
    weight: jax.Array
    args: dict[str, jax.Array]


def _as_it_is(x: Any) -> Any:
    return x


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """The arithmetic of a window; made by `accumulator`. All fields are static.

    Attributes:
      reduction, nonfinite, averaged_args: see `accumax.accumulate`.
      dtype: the dtype of the sum; None for the dtype of each gradient.
    """

    reduction: Reduction
    dtype: Any
    nonfinite: NonFinite
    averaged_args: tuple[str, ...]

    def init(self, params: PyTree) -> Sums:
        """Returns zeros for the gradients of `params`."""

        def zeros(p: Any) -> jax.Array:
            like = jnp.asarray(p)
            # `zeros_like` also keeps the sharding, if the type of the parameter has it.
            return jnp.zeros_like(like, dtype=accumulator_dtype(like.dtype, self.dtype))

        def scalar() -> jax.Array:  # a new array each time: no buffer is donated twice
            return jnp.zeros((), float)  # float64 under jax_enable_x64

        grads = jax.tree.map(zeros, _tree.differentiable(params))
        return Sums(grads, scalar(), {name: scalar() for name in self.averaged_args})

    def tally(
        self,
        sums: Sums,
        weight: jax.Array,
        args: Mapping[str, ArrayLike],
        *,
        first: ArrayLike,
    ) -> tuple[Sums, jax.Array]:
        """Counts a microbatch whose gradients the backward pass has already added.

        Like `add`, but only the weight can be refused.
        """
        return _count(sums, weight, args, first, has_items(weight)), is_valid_weight(
            weight
        )

    def scale(self, weight: jax.Array, summed: bool) -> ArrayLike:
        """Returns the factor of a gradient that is added; see `add`."""
        return weight if self.reduction == "mean" and not summed else 1.0

    def part(self, part: Share | None, weight: jax.Array, summed: bool) -> Small | None:
        """Returns a part of a call as a part of a window to which `add` adds it."""
        if part is None:
            return None
        scale = self.scale(weight, summed)
        return Small(part.square * scale**2, part.share * weight)

    def add(
        self,
        sums: Sums,
        grads: PyTree,
        weight: jax.Array,
        args: Mapping[str, ArrayLike],
        *,
        first: ArrayLike,
        summed: bool = False,
        agree: Callable[[jax.Array], jax.Array] = _as_it_is,
        sum_over: Callable[[PyTree], PyTree] = _as_it_is,
    ) -> tuple[Sums, jax.Array]:
        """Adds one microbatch.

        Args:
          sums: the sums of the window so far.
          grads: the gradients, means or sums over items, as the reduction says.
          weight: () float, the number of items; it weighs `args` too.
          args: a superset of the averaged arguments.
          first: () bool, whether a window opens; `sums` is then overwritten, not read.
          summed: the gradients are sums over items, under "mean" too. Static.
          agree: `agree(flags)`, () or (n,) bool: true where a flag is true on every
            device. The identity on one device.
          sum_over: sums a tree over devices; for a weight that each has by itself.

        Returns:
          `(sums, accepted)`. `accepted`, () bool, is false if the policy or the weight
          refused the microbatch; it was then left out.
        """
        scale = self.scale(weight, summed)

        def scaled(a: jax.Array, g: ArrayLike) -> jax.Array:
            # In float32: a weight of 1e5 is infinite in float16.
            dtype = _tree.wide(a.dtype)
            product = jnp.asarray(g, dtype) * jnp.asarray(scale, dtype)
            return product.astype(a.dtype)

        grads = jax.tree.map(scaled, sums.grads, grads)
        added = jax.tree.map(jnp.add, sums.grads, grads)
        if self.nonfinite == "propagate":
            accepted = agree(is_valid_weight(weight))
        else:
            averaged = [jnp.asarray(args[name]) for name in self.averaged_args]

            def fits(new: PyTree) -> jax.Array:
                # Check the sum and not the gradient: this finds a NaN, an infinite
                # product and an overflow of the sum.
                finite = _tree.all_finite((new, averaged))
                return is_valid_weight(weight) & ((weight == 0) | finite)

            # In one array, so that several devices communicate once.
            checks = _tree.all_finite(sums), fits(grads), fits(added)
            sound, opens, goes_on = agree(jnp.stack(checks))
            # Sums that another policy left non-finite would refuse every gradient, and
            # no window would close under "skip". So the window begins anew.
            first |= ~sound
            sums = sums._replace(weight=jnp.where(first, 0, sums.weight))
            accepted = jnp.where(first, opens, goes_on)
        # Weight 0 leaves the gradient out: the mean over no items is 0/0.
        taken = accepted & (weight > 0)

        def keep(a: jax.Array, g: jax.Array, sum: jax.Array) -> jax.Array:
            old = jnp.where(first, _tree.minus_zero(a.dtype), a)
            return jnp.where(taken, jnp.where(first, g, sum), old)

        new = jax.tree.map(keep, sums.grads, grads, added)
        sums = sums._replace(grads=new)
        return _count(sums, weight, args, first, taken, sum_over), accepted

    def result(self, sums: Sums) -> tuple[PyTree, dict[str, jax.Array]]:
        """Returns the reduced gradient, in at least float32, and averaged arguments."""
        grads = self.divide_in_place(sums.grads, sums.weight)
        return self.divide_half(grads, sums.weight), self.means(sums)

    def divide_in_place(self, grads: PyTree, weight: jax.Array) -> PyTree:
        """Divides those sums that are in at least float32; their dtypes stay."""
        factor = self._factor(weight)
        return jax.tree.map(
            lambda a: a if _is_half(a) else a * factor.astype(a.dtype), grads
        )

    def divide_half(self, grads: PyTree, weight: jax.Array) -> PyTree:
        """Divides the other sums, in float32."""
        factor = self._factor(weight)

        def divided(a: jax.Array) -> jax.Array:
            dtype = _tree.wide(a.dtype)
            return a.astype(dtype) * factor.astype(dtype) if _is_half(a) else a

        return jax.tree.map(divided, grads)

    def means(self, sums: Sums) -> dict[str, jax.Array]:
        """Returns the averaged arguments, () float each."""
        return {
            name: value / _divisor(sums.weight) for name, value in sums.args.items()
        }

    def _factor(self, weight: jax.Array) -> jax.Array:
        # The reciprocal: XLA materialises a quotient that has two readers (Adam's
        # moments), one more copy of the parameters. It fuses a product.
        factor = jnp.ones_like(weight)
        if self.reduction != "sum":
            factor = 1 / _divisor(weight)
        return jnp.where(weight > _most(weight.dtype), jnp.nan, factor)


def _divisor(weight: jax.Array) -> jax.Array:
    # A window without weight is never applied, but it is computed if a conditional
    # becomes a select (under vmap, on some backends). A NaN weight stays a NaN.
    return jnp.where(weight != 0, weight, 1)


def _is_half(x: jax.Array) -> bool:
    return _tree.wide(x.dtype) != x.dtype


def accumulator(
    *,
    reduction: Reduction = "mean",
    dtype: DTypeLike | None = jnp.float32,
    nonfinite: NonFinite = "propagate",
    averaged_args: tuple[str, ...] = (),
) -> Accumulator:
    """Makes an `Accumulator`. All arguments are static; see `accumax.accumulate`."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"{reduction=} must be one of {get_args(Reduction)}.")
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f"{nonfinite=} must be one of {get_args(NonFinite)}.")
    names = _check_names(averaged_args)
    return Accumulator(reduction, _check_dtype(dtype), nonfinite, names)


def accumulator_dtype(grad_dtype: Any, dtype: Any) -> Any:
    """Returns the accumulator dtype of a gradient; a complex gradient stays complex.

    Raises:
      ValueError: `dtype` is float64 and JAX has it disabled.
    """
    if dtype is None:
        return grad_dtype
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"accumulator_dtype={dtype.name} is disabled in JAX: switch it on with "
            'jax.config.update("jax_enable_x64", True), or choose float32.'
        )
    if jnp.issubdtype(grad_dtype, jnp.complexfloating):
        return _tree.wide(dtype, jnp.complex64)
    return dtype


def check_weight(weight: Any, name: str = "weight") -> jax.Array:
    """Returns `weight` as a () float array. Checks its value, unless it is traced.

    Raises:
      TypeError: `weight` is not a real scalar.
      ValueError: it is negative, NaN, infinite or too small or large to invert.
    """
    dtype = _tree.dtype_of(weight)
    if dtype is None or not (
        jnp.issubdtype(dtype, jnp.floating)
        or jnp.issubdtype(dtype, jnp.integer)
        or dtype == jnp.bool_
    ):
        raise TypeError(
            f"{name} is {_tree.describe(weight)}; expected a real scalar: the "
            "number of items (examples, tokens) that the gradient stands for."
        )
    if jnp.shape(weight) != ():
        raise TypeError(
            f"{name} has shape {jnp.shape(weight)}; expected a scalar, the number of "
            "items that the whole gradient stands for. Sum it first."
        )
    known = _tree.concrete(weight)
    if known is not None:
        # The value in its later dtype: 1e39 is infinite in float32, and 1e-42 is 0.
        info = jnp.finfo(jax.dtypes.canonicalize_dtype(float))
        most = _most(info.dtype)
        if not (known == 0 or float(info.tiny) <= known <= most):
            what = f"{name}={weight}" if name.isidentifier() else f"{name} is {weight}"
            raise ValueError(
                f"{what}; it must be 0, or from {info.tiny} to {most} "
                f"so that {info.dtype} has its reciprocal. For a gradient that should "
                "not count, let it be 0."
            )
    return jnp.asarray(weight, float)


def is_valid_weight(weight: jax.Array) -> jax.Array:
    """() bool: whether `weight` is finite and not negative."""
    return (weight >= 0) & jnp.isfinite(weight)  # NaN fails both


def divides(total: jax.Array) -> jax.Array:
    """() bool: whether sums can be divided by `total`, a sum of weights."""
    # Its own dtype: float64 may have been switched on since the state was made.
    return (total > 0) & (total <= _most(total.dtype))


def _most(dtype: DTypeLike) -> float:
    """The largest weight whose reciprocal is not flushed to 0."""
    return 1 / float(jnp.finfo(dtype).tiny)


def has_items(weight: jax.Array) -> jax.Array:
    """() bool: whether a microbatch of this weight adds anything."""
    return is_valid_weight(weight) & (weight > 0)


def _count(
    sums: Sums,
    weight: jax.Array,
    args: Mapping[str, ArrayLike],
    first: ArrayLike,
    taken: jax.Array,
    sum_over: Callable[[PyTree], PyTree] = _as_it_is,
) -> Sums:
    def weighed(name: str, a: jax.Array) -> jax.Array:
        return jnp.where(taken, weight * jnp.asarray(args[name], a.dtype), 0)

    values = {name: weighed(name, a) for name, a in sums.args.items()}
    seen, values = sum_over((jnp.where(taken, weight, 0), values))
    return sums._replace(
        weight=(sums.weight + seen).astype(sums.weight.dtype),
        args={n: jnp.where(first, 0, a) + values[n] for n, a in sums.args.items()},
    )


def _check_dtype(dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        checked = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(
            f"accumulator_dtype={dtype!r} is not a dtype. Pass a floating-point dtype "
            "or None for the gradient's own. Under `optax.inject_hyperparams`, name it "
            "in static_args."
        ) from error
    if not jnp.issubdtype(checked, jnp.floating):
        raise TypeError(
            f"accumulator_dtype={checked.name} must be a floating-point dtype, or None "
            "for the gradient's own."
        )
    return checked


def _check_names(names: Any) -> tuple[str, ...]:
    several = isinstance(names, Iterable) and not isinstance(names, str)
    names = tuple(names) if several else (names,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"averaged_args={names} must be names of keyword arguments of "
                f'`update`, such as ("value",); got {name!r}.'
            )
        if name in ("weight", "flush"):
            raise ValueError(
                f'averaged_args={names} names "{name}", which `update` keeps for '
                "itself. Name arguments that the inner transformation takes."
            )
    return names
