"""Loss functions in one form: with a checked return value and a state."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from .. import _tree
from .._devices.one import Devices
from .._sums import check_weight
from .._types import ArrayLike, PyTree

T = TypeVar("T")


class Loss(NamedTuple):
    """The return value of a loss function.

    Attributes:
      value: () float, differentiated: the loss, or the sum of losses if it is weighted.
      weight: () float, the number of items; None if the loss is not weighted.
      aux: the auxiliary output; None if there is none.
    """

    value: jax.Array
    weight: jax.Array | None
    aux: Any

    def mean(self) -> jax.Array:
        """Returns the mean loss that users see: () float, 0 if the weight is 0."""
        if self.weight is None:
            return self.value
        # In at least float32: a weight of 70000 is infinite in float16.
        dtype = _tree.wide(self.value.dtype)
        weight = self.weight.astype(dtype)
        weighs = weight != 0  # not "> 0": a NaN weight gives a NaN mean
        mean = self.value.astype(dtype) / jnp.where(weighs, weight, 1)
        return jnp.where(weighs, mean, 0).astype(self.value.dtype)


def _as_begun(devices: Devices, given: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
    del devices
    return given, state


def _as_ended(devices: Devices, first: PyTree, last: PyTree, kept: PyTree) -> PyTree:
    del devices, first, kept
    return last


@dataclasses.dataclass(frozen=True)
class StatefulLoss:
    """A loss that carries a state; every loss is brought into this form.

    Attributes:
      run: `(given, state, args, kwargs) -> (Loss, state)`. `args` and `kwargs` are
        those of the user's function. `given` is the same for all microbatches. `state`
        comes from the microbatch before. Both are () if the loss does not need them.
      source: the user's function, for its signature and its name.
      begin: `(devices, given, state) -> (given, state)`: the values for the first
        microbatch of a device.
      end: `(devices, first, last, kept) -> state`: combines the states of all devices.
        `first` is a device's state before its first microbatch, `last` after its last.
        `kept` says for each leaf whether the loss always returns it unchanged.
    """

    run: Callable[[PyTree, PyTree, tuple, dict[str, Any]], tuple[Loss, PyTree]]
    source: Callable[..., Any]
    begin: Callable[[Devices, PyTree, PyTree], tuple[PyTree, PyTree]] = _as_begun
    end: Callable[[Devices, PyTree, PyTree, PyTree], PyTree] = _as_ended


def stateless(
    fun: Callable[..., Any], *, has_aux: bool, weighted: bool
) -> StatefulLoss:
    """Makes a `StatefulLoss` of a user's function; its state is ()."""

    def run(
        given: PyTree, state: PyTree, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Loss, PyTree]:
        del given
        out = fun(*args, **kwargs)
        return read_loss(out, has_aux=has_aux, weighted=weighted), state

    return StatefulLoss(run, fun)


def read_loss(out: Any, *, has_aux: bool, weighted: bool) -> Loss:
    """Reads `out`, the return value of a loss function, as a `Loss`.

    Raises:
      TypeError: `out` does not have the form that the options require.
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
    if not _is_scalar(value):
        hint = "" if has_aux else " If it returns (loss, aux), pass has_aux=True."
        pair = isinstance(value, tuple) and len(value) == 2 and not weighted
        if pair and _is_scalar(value[0]) and _is_scalar(value[1], jnp.number):
            hint = f" If it returns (loss_sum, weight), pass weighted=True.{hint}"
        raise TypeError(
            f"The loss must be a real floating-point scalar; the loss function "
            f"returned {_tree.outline(value)}.{hint}"
        )
    return Loss(jnp.asarray(value), weight, aux)


def _is_scalar(x: Any, kind: Any = jnp.floating) -> bool:
    dtype = _tree.dtype_of(x)
    return dtype is not None and jnp.issubdtype(dtype, kind) and jnp.shape(x) == ()


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a loss.

    Attributes:
      args, kwargs: the arguments of the user's function.
      argnums: the positions of the differentiated arguments, static.
      given, state: see `StatefulLoss`.
      like: for each of `argnums` a tree, such as the sums of a window, whose leaves say
        which leaves are differentiated. None differentiates all.
      limit: () integer, how many of the microbatches run; None for all.
    """

    args: tuple
    kwargs: dict[str, Any]
    argnums: tuple[int, ...]
    given: PyTree = ()
    state: PyTree = ()
    like: tuple[PyTree, ...] | None = None
    limit: ArrayLike | None = None

    @functools.cached_property
    def _floats(self) -> tuple[PyTree, ...]:
        return tuple(live_part(self.args[n]) for n in self.argnums)

    @functools.cached_property
    def live(self) -> tuple[PyTree, ...]:
        """The differentiated part of each argument in `argnums`."""
        return (
            self._floats if self.like is None else _tree.masked(self._floats, self.like)
        )

    @property
    def frozen(self) -> dict[int, PyTree]:
        """The other floating-point leaves of these arguments, by position, if any."""
        count, trained = (len(jax.tree.leaves(x)) for x in (self._floats, self.live))
        if count == trained:  # a class may refuse to hold None in every place
            return {}
        others = map(_tree.others, self._floats, self.live)
        return dict(zip(self.argnums, others, strict=True))

    @property
    def arrays(self) -> PyTree:
        return self.args, self.kwargs, self.given, self.state


def fresh(tree: T) -> T:
    """Returns `tree` with new dicts and lists; what they hold is the same."""
    plain = dict, list, tuple

    def inside(x: Any) -> bool:
        return type(x) not in plain

    return jax.tree.map(lambda x: x, tree, is_leaf=inside)


def with_live(args: tuple, live: Mapping[int, PyTree]) -> tuple:
    """Returns `args` with `live[n]` as the differentiated part of argument n."""
    return tuple(
        _tree.restore(live[n], x) if n in live else x for n, x in enumerate(args)
    )


def live_part(tree: PyTree) -> PyTree:
    """Returns the differentiable part of `tree`, as arrays without weak types."""
    return jax.tree.map(_tree.strong, _tree.differentiable(tree))
