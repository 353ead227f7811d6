"""Devices over which both the parameters and the rows are sharded (FSDP)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from .. import _tree
from .._types import ArrayLike, PyTree
from .mesh import Axes, AxisNames, MeshLike, axes_of_mesh, of_arrays
from .one import Devices
from .replicated import Replicated, on_first
from .specs import names_in, only, spec_of

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a parameter is sharded over the devices.

    Attributes:
      spec: the sharding, without the mesh's other axes.
      dims: the sharded dimensions, each with its mesh axes.
      rest: the axes along which the parameter is replicated.
    """

    spec: PartitionSpec
    dims: tuple[tuple[int, tuple[str, ...]], ...]
    rest: tuple[str, ...]

    def gather(self, x: jax.Array) -> jax.Array:
        """All-gathers the whole parameter from its shards."""
        for dim, names in self.dims:
            x = lax.all_gather(x, names, axis=dim, tiled=True)
        return x

    def scatter(self, x: jax.Array) -> jax.Array:
        """Sums `x` over all axes but `rest`, and returns this device's shard."""
        for dim, names in self.dims:
            x = lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True)
        return x

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the whole parameter whose shard has `shape`."""
        whole = list(shape)
        for dim, names in self.dims:
            whole[dim] *= math.prod(map(lax.axis_size, names))
        return tuple(whole)


@dataclasses.dataclass(frozen=True)
class Shards(Devices):
    """Parameters are sharded over the devices; `at` finds the sharding at each call.

    Attributes:
      axes: the mesh axes of the devices.
      once: True all-gathers parameters and reduce-scatters gradients once in a call;
        False does so for each microbatch.
      specs: the sharding of each differentiated argument; None: that of its arrays.
    """

    axes: Axes
    once: bool
    specs: tuple[PyTree, ...]

    needs_rows = True

    @property
    def names(self) -> tuple[str, ...]:
        return self.axes.names

    def at(self, args: tuple, argnums: tuple[int, ...]) -> Devices:
        pairs = zip(argnums, self.specs, strict=True)
        cuts = {n: cuts_of(self.axes, args[n], specs) for n, specs in pairs}
        if self.once or self.axes.in_shard_map:
            return Sharded(self.axes, cuts, self.once)
        return ByCompiler(self.axes, cuts)


@dataclasses.dataclass(frozen=True)
class Sharded(Replicated):
    """Each device has a shard of the parameters and of the gradient sums.

    Attributes:
      cuts: a tree of `Cut` for each differentiated position.
      once: see `Shards`.
    """

    cuts: dict[int, PyTree]
    once: bool

    @property
    def in_place(self) -> bool:
        return self.once

    @property
    def own_sums(self) -> bool:
        return self.once

    def check_measured(self) -> None:
        if self.axes.in_shard_map:
            raise ValueError(
                "track_noise and accumax.FSDP within your own shard_map: a device has "
                "a shard of the gradient there, and not its norm. Leave the shard_map "
                "to accumax: call this outside of it, under jax.set_mesh."
            )

    @property
    def sums(self) -> Any:
        return tuple(map(specs_of, self.cuts.values()))

    def arg(self, n: int, x: PyTree, spec: PartitionSpec) -> Any:
        return specs_of(self.cuts[n], x) if n in self.cuts else spec

    def zeros(self, init: Callable[[PyTree], PyTree], live: PyTree) -> PyTree:
        def zero(cut: Cut, x: Any) -> jax.Array:
            shape = x.shape if not self.once else cut.whole(x.shape)
            return jnp.full(shape, _tree.minus_zero(x.dtype), x.dtype)

        return self.vary(map_cuts(zero, self.cuts, jax.eval_shape(init, live)))

    def begin(self, sums: T, zeros: Callable[[], T]) -> tuple[Any, T]:
        if self.once:  # a whole gradient cannot be added to a shard
            return sums, zeros()

        def own(cut: Cut, s: jax.Array) -> jax.Array:
            return on_first(s, cut.rest) if cut.rest else s

        return (), map_cuts(own, self.cuts, sums)

    def end(self, held: Any, sums: T) -> T:
        if self.once:
            sums = self._scatter(sums)

        def over_rest(cut: Cut, x: jax.Array) -> jax.Array:
            return lax.psum(x, cut.rest) if cut.rest else x

        with jax.named_scope("accumax.reduce"):
            sums = map_cuts(over_rest, self.cuts, sums)
        return jax.tree.map(jnp.add, held, sums) if held else sums

    def gather_once(self, live: T) -> T:
        return map_cuts(Cut.gather, self.cuts, live) if self.once else live

    def gather(self, live: T, i: ArrayLike) -> T:
        if self.once:
            return live
        # The barrier keeps XLA from moving the all-gather out of the loop.
        live, _ = lax.optimization_barrier((live, jnp.asarray(i)))
        return map_cuts(Cut.gather, self.cuts, live)

    def scatter(self, grads: T, sums: PyTree, weight: jax.Array) -> tuple[T, jax.Array]:
        if self.once:
            return grads, weight

        def masked(g: jax.Array, s: jax.Array) -> jax.Array:
            # In the dtype of the sums; a gradient of weight 0 may be NaN.
            return jnp.where(weight != 0, g.astype(s.dtype), 0)

        parts = self._scatter(jax.tree.map(masked, grads, sums))
        # Else XLA:TPU adds up whole gradients and scatters the sum after the loop.
        return lax.optimization_barrier(parts), jnp.ones_like(weight)

    def _scatter(self, grads: T) -> T:
        with jax.named_scope("accumax.reduce"):
            return map_cuts(Cut.scatter, self.cuts, grads)


@dataclasses.dataclass(frozen=True)
class ByCompiler(Devices):
    """XLA gathers and reduces, layer by layer; the program is that of one device.

    `Sharded` gathers a whole parameter at a time, and scanned layers share one.
    """

    axes: Axes
    cuts: dict[int, PyTree]

    @property
    def sums(self) -> Any:
        return tuple(map(specs_of, self.cuts.values()))

    def map(self, fun: Callable[..., Any], args: tuple, specs: tuple, out: Any) -> Any:
        if not self.axes.explicit:
            return fun(*args)
        # On explicit axes, types fix the shardings and leave XLA nothing to decide.
        mesh = self.axes.where()
        out = jax.tree.map(lambda x: NamedSharding(mesh, x), out, is_leaf=_is_spec)
        on_arrays, arrays = of_arrays(fun, args)
        return jax.sharding.auto_axes(on_arrays, out_sharding=out)(*arrays.values())

    def zeros(self, init: Callable[[PyTree], PyTree], live: PyTree) -> PyTree:
        return self._placed(super().zeros(init, live))

    def begin(self, sums: T, zeros: Callable[[], T]) -> tuple[Any, T]:
        return (), self._placed(sums)

    def end(self, held: Any, sums: T) -> T:
        return self._placed(sums)

    def _placed(self, tree: T) -> T:
        """Constrains `tree` to the sharding of the parameters."""
        ambient = jax.sharding.get_abstract_mesh()  # without types, in `auto_axes`
        mesh = self.axes.where() if ambient.empty else ambient

        def place(cut: Cut, x: jax.Array) -> jax.Array:
            free = [names or PartitionSpec.UNCONSTRAINED for names in cut.spec]
            free += [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(free))
            if not cut.dims:
                return x
            sharding = NamedSharding(mesh, PartitionSpec(*free))
            return lax.with_sharding_constraint(x, sharding)

        return map_cuts(place, self.cuts, tree)


def map_cuts(
    fun: Callable[[Cut, Any], Any], cuts: dict[int, PyTree], trees: Any
) -> Any:
    """Maps `fun(cut, leaf)` over `trees`: a dict by position, or its values.

    `trees` may lack leaves that have a cut.
    """
    by_position = isinstance(trees, dict)
    like = {n: cuts[n] for n in trees} if by_position else tuple(cuts.values())
    return jax.tree.map(fun, _tree.masked(like, trees), trees)


def cuts_of(axes: Axes, params: PyTree, specs: PyTree) -> PyTree:
    """Returns a tree of `Cut` for the differentiable leaves of `params`.

    `specs` is the sharding, a pytree prefix; None reads it from the arrays.

    Raises:
      ValueError: the sharding is not known, or impossible.
    """
    explicit = axes.explicit
    others = [name for name in explicit if name not in axes.names]
    if others:
        raise ValueError(
            f"accumax.FSDP and a mesh with the explicit axes {others} "
            "besides reduce_axis do not go together: JAX cannot scatter over a "
            "part of explicit axes. Make these axes AxisType.Auto."
        )
    specs = _specs_of_arrays(axes, params) if specs is None else specs
    try:
        specs = jax.tree.broadcast(specs, params, is_leaf=_is_spec)
    except ValueError as error:
        raise ValueError(
            f"specs of accumax.FSDP must be a prefix of the parameters, "
            f"{_tree.outline(params)}: {error}"
        ) from None

    def cut(path: Any, x: Any, spec: Any) -> Cut:
        spec = spec.spec if isinstance(spec, NamedSharding) else spec
        here = only(spec, axes.names)
        dims = tuple((i, names_in(entry)) for i, entry in enumerate(here) if entry)
        for i, names in dims if not axes.in_shard_map else ():
            count = math.prod(axes.where().shape[name] for name in names)
            if i >= x.ndim or x.shape[i] % count:
                raise ValueError(
                    f"specs{jax.tree_util.keystr(path)}={spec} divides axis "
                    f"{i} of a parameter of shape {x.shape} by {count} devices, "
                    "which is impossible. Leave it whole: PartitionSpec()."
                )
        used = [name for _, names in dims for name in names]
        rest = tuple(name for name in axes.names if name not in used)
        return Cut(here, dims, rest)

    live = _tree.differentiable(params)
    specs = _tree.masked(specs, live)
    return jax.tree_util.tree_map_with_path(cut, live, specs)


def _specs_of_arrays(axes: Axes, params: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(params)
    typed = set(axes.names) <= set(axes.explicit) and not axes.in_shard_map
    if not typed and any(isinstance(x, Tracer) for x in leaves):
        raise ValueError(
            "accumax.FSDP needs to know how the parameters are "
            "sharded, which their types do not say under jit with a mesh of "
            "automatic axes, or in a shard_map. Pass specs=jax.tree.map(lambda "
            "p: p.sharding.spec, params)."
        )
    return structure.unflatten(map(spec_of, leaves))


def specs_of(cuts: PyTree, params: PyTree = None) -> PyTree:
    """Returns the specs of gradients, or of all leaves of `params` if passed."""
    specs = jax.tree.map(lambda cut: cut.spec, cuts)
    if params is None:
        return specs
    return _tree.restore(specs, jax.tree.map(lambda _: PartitionSpec(), params))


@dataclasses.dataclass(frozen=True)
class FSDP:
    """Fully sharded data parallelism: a mesh axis divides both parameters and rows.

    Pass it as `reduce_axis` to `accumax.train_step`, `value_and_grad` and `grad`. Sums
    and optimizer state are sharded as the parameters are. Gradients are reduced in
    every call.

    Args:
      axis: the mesh axis, or a tuple of axes.
      specs: the `PartitionSpec`s of the differentiated argument, a pytree prefix; for
        several arguments, a tuple. Required under jit with automatic axes and inside
        a `shard_map`, where the types of arrays do not contain them.
      once: False lets XLA gather parameters and reduce gradients, layer by layer in
        each microbatch: least memory, most traffic. The loss then sees the rows of all
        devices. True gathers all parameters and reduces all gradients once in a call:
        least traffic, but each device holds whole parameters and gradients for a while.
      mesh: the mesh; by default the mesh of `jax.set_mesh`.

    Raises:
      TypeError, ValueError: an argument is of a wrong type, or the mesh lacks the axis.
        At the call: the parameters cannot be sharded in this way.

    >>> import accumax, jax
    >>> import jax.numpy as jnp
    >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    >>> spec = PartitionSpec("data")
    >>> w = jax.device_put(jnp.ones(8), NamedSharding(mesh, spec))
    >>> grad_fn = accumax.grad(
    ...     lambda w, x: jnp.mean(x @ w),
    ...     microbatches=2,
    ...     reduce_axis=accumax.FSDP("data", spec, once=True, mesh=mesh),
    ... )
    >>> print(jax.jit(grad_fn)(w, jnp.ones((16, 8))))
    [1. 1. 1. 1. 1. 1. 1. 1.]
    """

    axis: AxisNames
    specs: PyTree = None
    _: dataclasses.KW_ONLY
    once: bool = False
    mesh: MeshLike | None = None

    def __post_init__(self):
        axes_of_mesh(self.axis, self.mesh)
        _tree.check_flags(once=self.once)


def _is_spec(x: Any) -> bool:
    return isinstance(x, (PartitionSpec, NamedSharding))
