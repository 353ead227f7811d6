"""Losses: what one returns, checked and in one form, and those with a state."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _tree
from .._sums import check_weight


class Loss(NamedTuple):
    """What a loss function returned.

    Attributes:
      value: () float, what is differentiated: the loss, or the sum if it is weighted.
      weight: () float, the items it stands for; None if the loss is not weighted.
      aux: whatever came with it, None if nothing did.
    """

    value: jax.Array
    weight: jax.Array | None
    aux: Any

    def mean(self) -> jax.Array:
        """The loss as users read it: () float, 0 if its weight is 0."""
        if self.weight is None:
            return self.value
        # In at least float32: 70000 items are infinitely many in float16.
        dtype = _tree.wide(self.value.dtype)
        weight = self.weight.astype(dtype)
        counts = weight != 0  # and not "> 0": a NaN is to be seen
        mean = self.value.astype(dtype) / jnp.where(counts, weight, 1)
        return jnp.where(counts, mean, 0).astype(self.value.dtype)


@dataclasses.dataclass(frozen=True)
class Carrying:
    """A loss that is handed a state by the microbatch before it.

    `fun` takes `(given, state)` as one more argument, the first, where `given` is the
    same for all, and returns the next state in `(state, aux)`, with or without
    `has_aux`. `value_and_grad` of this takes that argument first and returns `(state,
    result)`; a `train_step` of it takes it third and returns `(state, aux)` for the
    aux.

    `begin`: on one of several devices, `(axes, given, state) -> (given, state)` for its
    own microbatches. `end`: `(axes, first, last) -> state`, what all devices have
    together, from what its first microbatch was to be handed and its last one gave.
    """

    fun: Callable[..., Any]
    begin: Callable[..., Any]
    end: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fun(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.fun  # for inspect.signature


def read_loss(out: Any, *, has_aux: bool, weighted: bool) -> Loss:
    """`out`, what a loss function gave for these options, as a `Loss`.

    Raises:
      TypeError: `out` is not of the form that the options say.
    """
    form = "(loss_sum, weight)" if weighted else "loss"
    aux = None
    if has_aux:
        expected = f"({form}, aux)"
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"With {has_aux=} and {weighted=} the loss function must return "
                f"{expected}; it returned {_tree.outline(out)}."
            )
        out, aux = out
    value, weight = out, None
    if weighted:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(
                f"With {weighted=} the loss function must return {form}, the sum of "
                f"its items' losses and their number; it returned "
                f"{_tree.outline(out)}."
            )
        value, weight = out
        weight = check_weight(weight, "the weight from the loss function")
    dtype = _tree.dtype_of(value)
    if (
        dtype is None
        or not jnp.issubdtype(dtype, jnp.floating)
        or jnp.shape(value) != ()
    ):
        hint = "" if has_aux else " If it returns (loss, aux), pass has_aux=True."
        raise TypeError(
            f"The loss must be a real floating-point scalar; the loss function "
            f"returned {_tree.outline(value)}.{hint}"
        )
    return Loss(jnp.asarray(value), weight, aux)


def split_aux(aux: Any, names: tuple[str, ...], has_aux: bool) -> tuple[Any, Any]:
    """`(new, aux)` of what came with the loss."""
    if not names:
        return {}, aux
    new, rest = aux, None
    if has_aux:
        if not isinstance(aux, tuple) or len(aux) != 2:
            raise TypeError(
                f"With mutable={names} and has_aux=True the loss function must return "
                f"(loss, (new, aux)); its second part was {_tree.outline(aux)}."
            )
        new, rest = aux
    if not isinstance(new, Mapping) or set(new) != set(names):
        got = sorted(new) if isinstance(new, Mapping) else _tree.outline(new)
        raise TypeError(
            f"With mutable={names} the loss function must return (loss, new) with "
            f"exactly these in new, a mapping; it has {got}."
        )
    return new, rest
