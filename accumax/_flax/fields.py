"""The fields of a Linen train state that a loss reads or changes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict, freeze

from .. import _tree
from .._batch.loss import Loss, read_loss
from .._devices.one import fold_in
from .._types import PyTree
from .loss import Given, Handing

STATISTICS = "batch_stats"  # Flax's name for the collection of running statistics


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of the fields that a loss takes, and the form of its return value.

    Attributes:
      read: fields that the loss only reads.
      mutable: fields that it also returns, with new values.
      keys: fields that are PRNG keys.
      has_aux, weighted: as for `accumax.train_step`.
      divided: whether a call has microbatches; each then gets different keys.
    """

    read: tuple[str, ...]
    mutable: tuple[str, ...]
    keys: tuple[str, ...]
    has_aux: bool
    weighted: bool
    divided: bool

    def handing(
        self, state: Any, statistics: PyTree, loss_fn: Callable[..., Any]
    ) -> Handing:
        """Makes the loss of one call. `statistics`: the running statistics, or None."""
        pooled = statistics is not None

        def run(
            given: Given, rest: Any, args: tuple, kwargs: dict[str, Any]
        ) -> tuple[Loss, PyTree, PyTree]:
            (others, i), here = rest, given.fields | given.keys
            if self.divided:
                here |= {name: fold_in(here[name], i) for name in self.keys}
            here |= others | ({STATISTICS: given.statistics} if pooled else {})
            out = loss_fn(*args, **kwargs, **here)
            form = self.has_aux or bool(self.mutable)
            loss = read_loss(out, has_aux=form, weighted=self.weighted)
            new, aux = self._split(loss.aux)
            others = {name: frozen_as(new[name], old) for name, old in others.items()}
            moved = frozen_as(new[STATISTICS], statistics) if pooled else {}
            return loss._replace(aux=aux), moved, (others, i + 1)

        fold = functools.partial(fold_in, i=state.microstep)
        given = Given(
            statistics if pooled else {},
            {name: getattr(state, name) for name in self.read},
            {name: fold(getattr(state, name)) for name in self.keys},
        )
        rest = {n: getattr(state, n) for n in self.mutable if n != STATISTICS}
        return Handing(given, (rest, jnp.zeros((), jnp.int32)), run)

    def _split(self, aux: Any) -> tuple[Any, Any]:
        """Splits the auxiliary output of the loss into `(new fields, aux)`."""
        if not self.mutable:
            return {}, aux
        new, rest = aux, None
        if self.has_aux:
            if not isinstance(aux, tuple) or len(aux) != 2:
                raise TypeError(
                    f"With mutable={self.mutable} and has_aux=True the loss function "
                    "must return (loss, (new, aux)); its second part was "
                    f"{_tree.outline(aux)}."
                )
            new, rest = aux
        if not isinstance(new, Mapping) or set(new) != set(self.mutable):
            got = sorted(new) if isinstance(new, Mapping) else _tree.outline(new)
            raise TypeError(
                f"With mutable={self.mutable} the loss function must return (loss, "
                f"new) with exactly these in new, a mapping; it has {got}."
            )
        return new, rest


def frozen_as(new: PyTree, old: PyTree) -> PyTree:
    """Freezes `new` if `old` is frozen; `apply` returns a plain dict for both."""
    frozen = isinstance(old, FrozenDict) and not isinstance(new, FrozenDict)
    return freeze(new) if frozen else new
