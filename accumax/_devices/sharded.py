"""Parameters that are sharded over the devices whose gradients are summed (FSDP)."""

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from .. import _tree
from .._types import ArrayLike, PyTree
from .._xla.varying import explicit_axes
from .replicated import (
    Axes,
    AxisNames,
    DataParallel,
    MeshLike,
    axes_of_mesh,
    check_axes,
    on_first,
)
from .specs import names_in, only, spec_of


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a parameter is divided over the devices.

    Attributes:
      spec: the sharding, without the mesh's other axes.
      dims: the dimensions that are divided, and over which axes.
      rest: the axes along which all devices have the same part.
    """

    spec: PartitionSpec
    dims: tuple[tuple[int, tuple[str, ...]], ...]
    rest: tuple[str, ...]

    def gathered(self, x: jax.Array) -> jax.Array:
        for dim, names in self.dims:
            x = lax.all_gather(x, names, axis=dim, tiled=True)
        return x

    def scattered(self, x: jax.Array) -> jax.Array:
        """The device's part of the sum over those that have another part."""
        for dim, names in self.dims:
            x = lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True)
        return x

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of which a device's part has `shape`."""
        whole = list(shape)
        for dim, names in self.dims:
            whole[dim] *= math.prod(map(lax.axis_size, names))
        return tuple(whole)


@dataclasses.dataclass(frozen=True)
class Gather:
    """When each device has whole parameters, and whole gradients.

    Trees of `Cut` have one for each leaf that is differentiated. All that works with
    them is `Axes.inside`.

    Attributes:
      axes: the devices.
      once: parameters are gathered, and gradients are reduced to the device's part,
        once for a call, until when a device keeps whole ones. Else for each microbatch.
      specs: for each argument that is differentiated how it is sharded, None for what
        its arrays say.
    """

    axes: Axes
    once: bool
    specs: tuple[PyTree, ...]

    def cuts_of(self, args: tuple, argnums: tuple[int, ...]) -> tuple[PyTree, ...]:
        """How the arguments that are differentiated are divided; see `cuts`."""
        pairs = zip(argnums, self.specs, strict=True)
        return tuple(self.cuts(args[n], specs) for n, specs in pairs)

    def cuts(self, params: PyTree, specs: PyTree) -> PyTree:
        """How `params`, not yet `inside`, are divided; `specs`: their own, or None.

        Raises:
          ValueError: that is not known, or impossible.
        """
        axes, mesh = self.axes, self.axes.where()
        explicit = explicit_axes(mesh)
        others = [name for name in explicit if name not in axes.names]
        if others:
            raise ValueError(
                f"accumax.FSDP and a mesh with the explicit axes {others} "
                "besides reduce_axis do not go together: JAX cannot scatter over a "
                "part of explicit axes. Make these axes AxisType.Auto."
            )
        if specs is None:
            leaves, structure = jax.tree.flatten(params)
            typed = set(axes.names) <= set(explicit) and not axes.inside
            if not typed and any(isinstance(x, Tracer) for x in leaves):
                raise ValueError(
                    "accumax.FSDP needs to know how the parameters are "
                    "sharded, which their types do not say under jit with a mesh of "
                    "automatic axes, or in a shard_map. Pass specs=jax.tree.map(lambda "
                    "p: p.sharding.spec, params)."
                )
            specs = structure.unflatten(map(spec_of, leaves))
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
            used = [name for _, names in dims for name in names]
            for i, names in dims if not axes.inside else ():
                count = math.prod(mesh.shape[name] for name in names)
                if i >= x.ndim or x.shape[i] % count:
                    raise ValueError(
                        f"specs{jax.tree_util.keystr(path)}={spec} divides axis "
                        f"{i} of a parameter of shape {x.shape} by {count} devices, "
                        "which is impossible. Leave it whole: PartitionSpec()."
                    )
            rest = tuple(name for name in axes.names if name not in used)
            return Cut(here, dims, rest)

        live = _tree.differentiable(params)
        specs = _tree.masked(specs, live)
        return jax.tree_util.tree_map_with_path(cut, live, specs)

    @property
    def automatic(self) -> bool:
        """Whether XLA is to gather and to reduce: it does so layer by layer.

        Here, a parameter is gathered as a whole, which for layers that are scanned is
        all of them at once.
        """
        explicit = set(explicit_axes(self.axes.where()))
        return (
            not self.once
            and not self.axes.inside
            and explicit.isdisjoint(self.axes.names)
        )

    def placed(self, tree: PyTree, cuts: PyTree) -> PyTree:
        """`tree` as the parameters are sharded, if `automatic`."""
        mesh = self.axes.where()

        def place(cut: Cut, x: jax.Array) -> jax.Array:
            free = [names or PartitionSpec.UNCONSTRAINED for names in cut.spec]
            free += [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(free))
            if not cut.dims:
                return x
            sharding = NamedSharding(mesh, PartitionSpec(*free))
            return lax.with_sharding_constraint(x, sharding)

        return jax.tree.map(place, cuts, tree)

    def whole(self, params: PyTree, cuts: PyTree, i: ArrayLike = 0) -> PyTree:
        """`params` gathered, for microbatch i, () integer."""
        if not self.once:  # else XLA does it before the loop, once for all
            params, _ = lax.optimization_barrier((params, jnp.asarray(i)))
        return jax.tree.map(lambda x, cut: cut.gathered(x), params, cuts)

    def zeros(self, shapes: PyTree, cuts: PyTree) -> PyTree:
        """-0.0 to add the gradients of a call in; `shapes`: of a device's parts."""

        def zero(x: Any, cut: Cut) -> jax.Array:
            shape = x.shape if not self.once else cut.whole(x.shape)
            return jnp.full(shape, _tree.minus_zero(x.dtype))

        return self.axes.vary(jax.tree.map(zero, shapes, cuts))

    def begun(self, sums: PyTree, cuts: PyTree) -> PyTree:
        """Sums to go on with, where several devices have the same part: on one."""

        def own(s: jax.Array, cut: Cut) -> jax.Array:
            return on_first(s, cut.rest) if cut.rest else s

        return jax.tree.map(own, sums, cuts)

    def parts(self, grads: PyTree, cuts: PyTree) -> PyTree:
        """A device's parts of the gradients of one microbatch, summed over devices."""
        with jax.named_scope("accumax.reduce"):
            parts = jax.tree.map(lambda g, cut: cut.scattered(g), grads, cuts)
        # Or XLA:TPU adds up whole gradients, and scatters their sum after the loop.
        return lax.optimization_barrier(parts) if not self.once else parts

    def sum(self, sums: PyTree, cuts: PyTree) -> PyTree:
        """The device's parts of the sums of all."""
        if self.once:
            sums = self.parts(sums, cuts)

        def over_rest(x: jax.Array, cut: Cut) -> jax.Array:
            return lax.psum(x, cut.rest) if cut.rest else x

        with jax.named_scope("accumax.reduce"):
            return jax.tree.map(over_rest, sums, cuts)


def specs_of(cuts: PyTree, params: PyTree = None) -> PyTree:
    """How gradients with these cuts are sharded; or `params`, with all leaves."""
    specs = jax.tree.map(lambda cut: cut.spec, cuts)
    if params is None:
        return specs
    return _tree.restore(specs, jax.tree.map(lambda _: PartitionSpec(), params))


@dataclasses.dataclass(frozen=True)
class FSDP:
    """Devices along a mesh axis over which parameters are sharded, as rows are.

    For `reduce_axis=` of `accumax.train_step`, `value_and_grad` and `grad`. Sums and
    optimizer state are sharded as the parameters are. Gradients are reduced in every
    call.

    Args:
      axis: the mesh axis, or a tuple of several.
      specs: the `PartitionSpec`s of what is differentiated, a prefix of it (of several
        arguments, a tuple). Needed under jit with automatic axes, where types do not
        say them.
      once: False leaves it to XLA to gather parameters and to reduce gradients, layer
        by layer in each microbatch: least memory, most traffic. The loss then sees the
        rows of all devices. True gathers all parameters once in a call and reduces all
        gradients once: least traffic, and each device has whole ones for a while.
      mesh: the mesh; that of `jax.set_mesh` by default.

    Raises:
      TypeError, ValueError: an argument is none of these, or the mesh lacks the axis;
        at the call, if the parameters cannot be divided so.

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
        if not isinstance(self.once, bool):
            raise TypeError(f"once={self.once!r} must be True or False.")


Devices: TypeAlias = AxisNames | DataParallel | FSDP


def check_devices(
    reduce_axis: Any, count: int | None = None
) -> tuple[Axes | None, Gather | None]:
    """What `reduce_axis` says: the devices, and how parameters are divided over them.

    `count`: of arguments, if specs have one for each, else None for one argument.

    Raises:
      TypeError, ValueError: it is none of `Devices`, or the mesh lacks an axis.
    """
    if not isinstance(reduce_axis, FSDP):
        return check_axes(reduce_axis), None
    axes, specs = axes_of_mesh(reduce_axis.axis, reduce_axis.mesh), reduce_axis.specs
    each = (specs,) if count is None else (None,) * count if specs is None else specs
    return axes, Gather(axes, reduce_axis.once, each)


def _is_spec(x: Any) -> bool:
    return isinstance(x, (PartitionSpec, NamedSharding))
