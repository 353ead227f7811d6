"""The transformation inside an `accumulate`: its state and extra arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _tree
from .._types import PyTree
from .._xla.host import in_turns, to_device, to_host
from .._xla.jaxprs import unused_leaves
from .checks import is_near

# Extra arguments of Optax's own transformations, anywhere in a chain.
OF_OPTAX = frozenset({"value", "grad", "value_fn"})

_OTHER_DTYPES = (
    "accumax gives the inner transformation a mean in {}, which no parameter has. If "
    "it needs gradients in the dtype of the parameters (optax.novograd, "
    "contrib.mechanize and contrib.galore do), cast the mean: accumulate(optax.chain("
    "optax.stateless(lambda g, p: optax.tree.cast_like(g, p)), inner), every)."
)


class Inner(NamedTuple):
    """A transformation, and which extra arguments it takes.

    Attributes:
      init, update: its functions; `update` takes any extra arguments.
      names: the extra arguments that its signature names.
      takes_any: whether its signature has a `**` for others, as a chain has.
      placed: places a state in the memory in which calls keep it.
      arranged: arranges a function that runs `update` and returns `(params, (state,
        ...))` for this memory.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    names: frozenset[str]
    takes_any: bool
    placed: Callable[[Any], Any] = lambda state: state
    arranged: Callable[[Any], Any] = lambda fun: fun

    def offloaded(self) -> "Inner":
        """Returns this transformation with a state that is kept in host memory."""

        def init(params: PyTree) -> Any:
            return to_host(self.init(params))

        def update(
            grads: PyTree, state: Any, params: PyTree = None, **extra_args: Any
        ) -> tuple[PyTree, Any]:
            updates, state = self.update(grads, to_device(state), params, **extra_args)
            return updates, to_host(state)

        return self._replace(
            init=init, update=update, placed=to_host, arranged=in_turns
        )

    def emits(
        self,
        grads: PyTree,
        inner_state: Any,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> PyTree:
        """Returns the shapes and dtypes of the updates for gradients like `grads`."""
        updated = functools.partial(self.updated, extra_args=extra_args)
        return jax.eval_shape(updated, grads, inner_state, params)[0]

    def updated(
        self,
        grads: PyTree,
        inner_state: Any,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> tuple[PyTree, Any]:
        """Runs `update`. The new state has the dtypes of the old one."""
        try:
            found = self.update(grads, inner_state, params, **extra_args)
        except (TypeError, ValueError) as error:  # of promotion, too
            dtypes = _tree.dtypes(grads) - _tree.dtypes(params)
            if params is not None and dtypes:
                error.add_note(_OTHER_DTYPES.format(", ".join(sorted(dtypes))))
            raise
        _check_kept(inner_state, found[1])
        return found[0], _tree.cast_like(found[1], inner_state)

    def check_state(self, inner_state: Any, like: PyTree) -> None:
        """Checks that `inner_state` is one for parameters with the shapes of `like`.

        Raises:
          TypeError, ValueError: it is not.
        """
        try:
            expected = jax.eval_shape(self.init, like)
        except Exception:  # `init` needs values: nothing to compare with
            return
        got, want = jax.tree.structure(inner_state), jax.tree.structure(expected)
        if want != got:
            raise TypeError(
                f"state.inner_opt_state is not a state of the inner transformation: it "
                f"is {got}, where {want} was expected. Pass what init of this "
                "accumulate gave, or its last update."
            )
        paths = jax.tree_util.tree_leaves_with_path(inner_state)
        for (path, x), y in zip(paths, jax.tree.leaves(expected), strict=True):
            if jnp.shape(x) != y.shape:
                raise ValueError(
                    f"state.inner_opt_state{jax.tree_util.keystr(path)} has shape "
                    f"{jnp.shape(x)}, where these parameters need {y.shape}. Pass the "
                    "state that init of this accumulate gave for them."
                )

    def check_used(
        self,
        grads: PyTree,
        state: Any,
        params: PyTree,
        extra_args: dict[str, Any],
        averaged: tuple[str, ...],
    ) -> None:
        """Checks that extra arguments are used, because a chain takes all names.

        Raises:
          TypeError: an extra argument is not used.
        """
        known = self.names | OF_OPTAX | set(averaged)
        arrays = {
            name: jnp.asarray(x)
            for name, x in extra_args.items()
            if name not in known and _tree.dtype_of(x) is not None
        }
        if not arrays:
            return
        others = {n: x for n, x in extra_args.items() if n not in arrays}

        def updates(arrays: dict[str, Any], *args: Any) -> Any:
            return self.update(*args, **arrays, **others)

        jaxpr = jax.make_jaxpr(updates)(arrays, grads, state, params).jaxpr
        used = {x for eqn in jaxpr.eqns for x in eqn.invars if not hasattr(x, "val")}
        used |= {x for x in jaxpr.outvars if not hasattr(x, "val")}
        for name, x in zip(sorted(arrays), jaxpr.invars, strict=False):
            if x not in used:
                raise TypeError(
                    f"{name}={extra_args[name]!r} was passed, and nobody takes it: not "
                    "the loss function, whose arguments are passed by position, not "
                    "accumulate, and not the inner transformation."
                )

    def without_unused(self, grads: PyTree, state: PyTree, params: PyTree) -> PyTree:
        """`grads`, with `Unused` in place of each leaf on which no result depends.

        `optax.set_to_zero` for a part of the parameters, in an `optax.partition`, does
        not use their gradients. The jaxpr of `update` says on which gradients it
        depends. It is traced only if a part of the transformation is masked, because
        1,000 leaves take seconds. If it needs extra arguments, all are used.
        """
        if not any(map(_is_masked, jax.tree.leaves(state, is_leaf=_is_masked))):
            return grads
        try:
            unused = unused_leaves(self.update, grads, state, params)
        except Exception:  # `init` must not fail where a later `update` would not
            return grads
        leaves, structure = jax.tree.flatten(grads)
        pairs = zip(leaves, unused, strict=True)
        return structure.unflatten(_tree.Unused() if u else x for x, u in pairs)

    def check_unused(
        self,
        sums: PyTree,
        grads: PyTree,
        state: PyTree,
        params: PyTree,
        extra_args: dict[str, Any],
    ) -> None:
        """Checks that the gradients without a sum are not used in this call either.

        Extra arguments that `init` did not have may change which ones are.

        Raises:
          TypeError: one is used.
        """
        leaves = jax.tree.leaves(sums, is_leaf=_tree.is_unused)
        if not any(map(_tree.is_unused, leaves)):
            return
        updates = functools.partial(self.update, **extra_args)
        unused = unused_leaves(updates, grads, state, params)
        paths = jax.tree_util.tree_leaves_with_path(grads)
        for total, (path, _), is_unused in zip(leaves, paths, unused, strict=True):
            if _tree.is_unused(total) and not is_unused:
                name = jax.tree_util.keystr(path)
                raise TypeError(
                    f"The inner transformation uses the gradient{name}, but not as "
                    "init called it, without extra arguments, so the state has no sum "
                    "of it. Give it one before the first call: state._replace("
                    "acc_grads=jax.tree.map(jnp.zeros_like, params))."
                )

    def takes(self, name: str) -> bool:
        """Whether `update` takes an extra argument of this name."""
        return self.takes_any or name in self.names

    def check_names(
        self, extra_args: dict[str, Any], averaged: tuple[str, ...], strict: bool
    ) -> None:
        """Checks the names of extra arguments.

        By Optax's convention, an extra argument may be for another member of a chain.
        If `strict`, all must be for this transformation. `averaged` names the arguments
        that are averaged over a window.

        Raises:
          TypeError: a name is nearly that of a known argument or, if `strict`, unknown.
        """
        for name in extra_args.keys() - self.names - set(averaged):
            for known in ("weight", "flush", *averaged):
                if is_near(name, known):
                    raise TypeError(
                        f"{name}={extra_args[name]!r} was passed, which nobody takes. "
                        f"Is {known}=... meant?"
                    )
            if strict and not self.takes_any:
                raise TypeError(
                    f"{name}={extra_args[name]!r} was passed, and neither accumulate "
                    "nor the inner transformation takes an argument of this name. The "
                    "inner transformation takes "
                    f"{', '.join(sorted(self.names)) or 'no extra arguments'}."
                )


def _check_kept(old: PyTree, new: PyTree) -> None:
    """Checks that the new state of a transformation can be stored in place of the old.

    Raises:
      TypeError: it has another structure, or a dtype of a higher kind, such as floats
        where `init` gave integers.
    """
    got, gave = jax.tree.structure(old), jax.tree.structure(new)
    if gave != got:
        raise TypeError(
            f"The inner transformation changes the structure of its own state, from "
            f"{got} to {gave}, which no branch or loop of JAX can do. Put it around "
            "the accumulate, or give its init what its update needs."
        )
    leaves = jax.tree_util.tree_leaves_with_path(old)
    for (path, before), after in zip(leaves, jax.tree.leaves(new), strict=True):
        if _kind(before) < _kind(after):
            raise TypeError(
                "The inner transformation turns "
                f"{jax.tree_util.keystr(path) or 'the leaf'} of its state from "
                f"{_tree.dtype_of(before)} to {_tree.dtype_of(after)}. A state keeps "
                "the dtypes of init, so what that cannot hold would be lost. Let init "
                "give it the dtype that update does."
            )


def _kind(x: Any) -> int:
    """The place of its dtype in the order bool, integer, float, complex."""
    if (dtype := _tree.dtype_of(x)) is None:
        return 0
    kinds = jnp.integer, jnp.floating, jnp.complexfloating
    return next((n for n, k in enumerate(kinds, 1) if jnp.issubdtype(dtype, k)), 0)


def _is_masked(state: Any) -> bool:
    return isinstance(state, optax.MaskedState)


def inner_of(tx: optax.GradientTransformation) -> Inner:
    """Returns `tx` with the extra arguments that its signature names."""
    wrapped = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Any:
        return _tree.unshare(wrapped.init(params), params)

    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return Inner(init, wrapped.update, frozenset(), False)
    found = list(inspect.signature(tx.update).parameters.values())
    variadic = inspect.Parameter.VAR_KEYWORD
    names = frozenset(p.name for p in found[3:] if p.kind != variadic)
    takes_any = any(p.kind == variadic for p in found)
    return Inner(init, wrapped.update, names, takes_any)
