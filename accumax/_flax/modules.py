"""Splits the NNX modules among the arguments of a call, and merges them again."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from .. import _tree
from .._batch.arguments import Place
from .._batch.loss import read_loss
from .._types import PyTree
from .._xla.handed_on import unchanged_leaves
from . import statistics as running
from .loss import Given, Handing


class Modules:
    """The modules among the arguments of a call, split into graph and states.

    `args` and `kwargs` have the differentiated state of a module in its place, or None.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any], wrt: dict[int, Any]):
        call: dict[Place, Any] = {**dict(enumerate(args)), **kwargs}
        self.places = [place for place in call if _holds_module(call[place])]
        self.nodes = tuple(call[place] for place in self.places)
        self.live = {p: i for i, p in enumerate(self.places) if p in wrt}
        self.filters = [_under(i, wrt[place]) for place, i in self.live.items()]
        others = [call[place] for place in self.places if place not in wrt]
        live = [call[place] for place in self.live]
        if others and _variables(others) & _variables(live):
            raise ValueError(
                "A module that is differentiated shares variables with an argument "
                f"that is not. Differentiate all of {self.places}, or pass a copy."
            )
        self.graphdef, *lives, statistics, rest = nnx.split(
            self.nodes, *self.filters, nnx.BatchStat, ...
        )
        # What a variable holds may be a tree: here the tree ends, there it begins.
        self.boxes = tuple(map(jax.tree.structure, (*lives, statistics, rest)))
        for place in self.places:
            call[place] = None
        for (place, i), state in zip(self.live.items(), lives, strict=True):
            check_some(state, self.nodes[i], wrt[place])
            call[place] = state[i]
        self.args = tuple(call[n] for n in range(len(args)))
        self.kwargs = {name: call[name] for name in kwargs}
        self.statistics, self.rest = nnx.as_pure(statistics), nnx.as_pure(rest)

    def handing(
        self, fun: Callable[..., Any], has_aux: bool, weighted: bool
    ) -> Handing:
        """Makes `fun` a loss of `args`, `kwargs` and the state of the modules."""

        unchecked = [True]

        def run(given: Given, rest: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            call: dict[Place, Any] = {**dict(enumerate(args)), **kwargs}
            lives = [nnx.State({i: call[place]}) for place, i in self.live.items()]

            def called(lives: list[nnx.State]) -> tuple[Any, list[nnx.State]]:
                # New variables, to which `fun` may write, of this trace.
                states = map(_box, self.boxes, (*lives, given.statistics, rest))
                nodes = nnx.merge(self.graphdef, *states)
                after = call | dict(zip(self.places, nodes, strict=True))
                named = {name: after[name] for name in kwargs}
                out = fun(*(after[n] for n in range(len(args))), **named)
                graphdef, *lives, statistics, others = nnx.split(
                    nodes, *self.filters, nnx.BatchStat, ...
                )
                return (out, graphdef, statistics, others), lives

            before = jax.tree.leaves(lives)
            (out, graphdef, statistics, others), after = called(lives)
            loss = read_loss(out, has_aux=has_aux, weighted=weighted)
            statistics, others = nnx.as_pure(statistics), nnx.as_pure(others)
            _tree.check_same("state of the modules", others, self.rest)
            if graphdef != self.graphdef:
                raise ValueError(
                    "The loss changed a static attribute of a module, as eval() does, "
                    "which cannot be handed on. Do it before."
                )
            if unchecked and not _same(before, after):
                _check_not_written(called, lives)
            unchecked.clear()  # another trace is of the same program
            return loss, statistics, others

        return Handing(Given(self.statistics), self.rest, run)

    def write(self, handing: Handing, carried: Any, taken: Any) -> jax.Array:
        """Writes the last state to the modules; returns the rows of the call."""
        momenta = momenta_of(self.nodes, self.statistics)
        statistics, rest, rows = handing.settle(carried, momenta, taken)
        nnx.update(self.nodes, *map(_box, self.boxes[-2:], (statistics, rest)))
        return rows


def _box(box: Any, state: PyTree) -> Any:
    """The values of a state, in variables as they were where `box` is from."""
    return box.unflatten(jax.tree.leaves(state))


def _same(before: list[Any], after: list[nnx.State]) -> bool:
    pairs = zip(before, jax.tree.leaves(after), strict=True)
    return all(x is y for x, y in pairs)


def _check_not_written(called: Callable[..., Any], lives: list[nnx.State]) -> None:
    """Warns if the loss may change what is differentiated.

    A scan over layers returns new arrays of all their variables, changed or not. What
    comes through a `shard_map` or a reshape may be unchanged, too: so no error.
    """
    _, kept = unchanged_leaves(lambda lives: ((), called(lives)[1]), lives)
    paths = jax.tree_util.tree_leaves_with_path(nnx.as_pure(lives))
    changed = [
        jax.tree_util.keystr(path[2:])
        for (path, _), same in zip(paths, kept, strict=True)
        if not same
    ]
    if changed:
        warnings.warn(
            f"The loss writes to {', '.join(changed[:6])}, it seems, which is "
            "differentiated, as nnx.WeightNorm and nnx.SpectralNorm do. What it writes "
            "there is lost: each microbatch would write again, which the big batch "
            "does not. Compute that value where it is used, without a write (Flax "
            "Linen's WeightNorm and SpectralNorm do), or write to a variable of "
            "another type.",
            stacklevel=2,
        )


def _variables(nodes: list[Any]) -> set[int]:
    return {id(x) for _, x in nnx.iter_graph(nodes) if isinstance(x, nnx.Variable)}


def _holds_module(x: Any) -> bool:
    return any(map(_is_node, jax.tree.leaves(x, is_leaf=_is_node)))


def _is_node(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def _under(i: int, wrt: Any) -> Callable[[tuple, Any], bool]:
    """Returns the filter `wrt` for item i of a tuple."""
    within = nnx.filterlib.to_predicate(wrt)
    return lambda path, x: path[0] == i and within(path[1:], x)


def check_function(name: str, fun: Any) -> None:
    """Checks that `fun` is a function that gets all modules as arguments.

    Raises:
      TypeError: it is not.
    """
    if not callable(fun):
        raise TypeError(f"{name}={fun!r} must be a function (model, *args) -> loss.")
    fun = inspect.unwrap(getattr(fun, "func", fun))  # of a partial, of `jax.jit`
    if isinstance(module := getattr(fun, "__self__", None), nnx.Pytree):
        called = f"{type(module).__name__}.{fun.__name__}"
        raise TypeError(
            f"{name} is a method of a module, so the module is no argument, and is "
            f"not differentiated. Pass {name}={called}, and the module as the first "
            "argument."
        )


def check_some(state: Any, module: Any, wrt: Any) -> None:
    if not jax.tree.leaves(state):
        raise ValueError(
            f"{type(module).__name__} has no variable for {wrt}. Pass the filter of "
            "what to differentiate, such as nnx.Param."
        )


def momenta_of(nodes: Any, statistics: PyTree) -> tuple[float, ...]:
    """Returns the `momentum` of each module that has running statistics."""
    if not running.pairs(statistics):  # saves a walk through the model
        return ()
    modules = {tuple(map(str, path)): x for path, x in nnx.iter_graph(nodes)}
    remedy = "Give that module an attribute `momentum`, as nnx.BatchNorm has"
    holders = [modules.get(path) for path in running.pairs(statistics)]
    if not all(isinstance(x, nnx.Module) for x in holders):
        remedy = "An nnx.State does not hold it: pass the module, not its parts"

    def momentum(path: tuple[str, ...]) -> Any:
        return getattr(modules.get(path), "momentum", None)

    return running.check_momenta(statistics, momentum, "The model", remedy)
