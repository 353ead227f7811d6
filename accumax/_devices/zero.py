"""Devices that hold whole parameters and divide the optimizer's state (ZeRO-1)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _tree
from .._types import PyTree
from .._xla.loops import at_most_once
from .mesh import of_arrays
from .replicated import PerDevice
from .sharded import Cut
from .specs import joined, spec_of
from .wire import all_gather, reduce_scatter

T = TypeVar("T")
S = TypeVar("S")

LEAST = 2**14  # elements that are worth a collective of their own
LEAST_IN_TURNS = 2**18  # elements that are gathered in turns


@dataclasses.dataclass(frozen=True)
class Zero1(PerDevice):
    """Each device keeps its own sums, and a part of the optimizer's state.

    When a window closes, a reduce-scatter leaves each device with its part of the
    gradient. The optimizer runs on the parts under automatic sharding, so it computes
    what it computes of whole arrays. An all-gather returns the new parameters.

    Attributes:
      gather_dtype: the dtype in which the changes of the parameters cross the network;
        None for the new parameters themselves.
    """

    gather_dtype: Any = dataclasses.field(default=None, kw_only=True)

    sums_are_total = False

    def cut(self, x: Any) -> Cut:
        """How an array of this shape is divided: along the first dimension that can be.

        Behind another dimension it is exchanged in slices. Arrays with small slices,
        or of which no dimension can be divided, stay whole.
        """
        shape = jnp.shape(x)
        for dim, size in enumerate(shape):
            if dim and math.prod(shape[dim:]) < LEAST:
                break
            if size and size % self.count == 0:
                spec = PartitionSpec(*(None,) * dim, self.names)
                return Cut(spec, ((dim, self.names),), ())
        return Cut(PartitionSpec(), (), self.names)

    def check_without_window(self) -> None:
        raise ValueError(
            "shard_optimizer=True divides the state of an optimizer, which "
            "accumax.accumulate(..., reduce_axis=...) makes. Pass it there, and "
            "leave it away here."
        )

    def check_inside(self) -> None:
        raise TypeError(
            "shard_optimizer=True runs the optimizer on arrays that XLA has divided, "
            "and tx.update and accumax.apply_gradients are called on one device, with "
            "its own gradient. Use accumax.train_step, outside of any jax.shard_map "
            f"over {self.names}, or leave shard_optimizer away."
        )

    def init_optimizer(self, init: Callable[[PyTree], T], params: PyTree) -> T:
        self._check_outside()
        self.axes.check_whole("params", params)
        alike = _specs_of_state(init, params)

        def divided(params: PyTree) -> T:
            state = init(params)
            return self._divided(state, self._specs(state), alike)

        return jax.jit(divided)(params)

    def boundary(
        self,
        applies: jax.Array,
        divide: Callable[[PyTree, jax.Array], PyTree],
        fun: Callable[..., tuple[T, S]],
        carry: tuple[T, S],
        sums: PyTree,
        weight: jax.Array,
        extra: Any,
    ) -> tuple[tuple[T, S], PyTree]:
        self._check_outside()

        # The sums go through the loop, although they are only read: else XLA:GPU adds
        # all gradients to them after the backward pass, and so keeps all until then.
        def body(both: tuple[tuple[T, S], PyTree]) -> tuple[tuple[T, S], PyTree]:
            (params, state), sums = both
            # What has no gradient stays whole: it crosses the network never.
            old = _tree.used(params, sums)
            parts, mean = self._parts(old, sums, divide, weight)
            carry = _tree.restore(parts, params), state
            whole = jax.tree.map(lambda _: PartitionSpec(), params)
            specs = _tree.restore(self._specs(parts), whole), self._specs(state)
            all_new, state = self._by_compiler(fun, carry, specs, mean, weight, extra)
            new = _tree.used(all_new, sums)
            if self.gather_dtype is not None:
                new = jax.tree.map(self._change, new, parts)
            params = _tree.restore(self._gathered(new, old), all_new)
            return (params, state), sums

        return at_most_once(applies, body, (carry, sums))

    def _parts(
        self,
        params: PyTree,
        sums: PyTree,
        divide: Callable[[PyTree, jax.Array], PyTree],
        weight: jax.Array,
    ) -> tuple[PyTree, PyTree]:
        """The parts of the parameters and of the mean gradient, divided arrays."""

        def own(x: jax.Array) -> jax.Array:
            for dim, names in self.cut(x).dims:
                size = x.shape[dim] // self.count
                start = lax.axis_index(names) * size
                x = lax.dynamic_slice_in_dim(x, start, size, dim)
            return x

        def reduced(x: jax.Array) -> jax.Array:
            cut = self.cut(x)
            if not cut.dims:
                return self.sum_gradients(x)
            return scatter(x, *cut.dims[0], self.reduce_dtype)

        def on_device(params: PyTree, sums: PyTree, weight: jax.Array) -> Any:
            with jax.named_scope("accumax.reduce"):
                sums = jax.tree.map(reduced, self.unstack(sums))
            return jax.tree.map(own, params), divide(sums, weight)

        specs = PartitionSpec(), self.rows, PartitionSpec()
        shapes = self.shapes("sums", sums)
        out = self._specs(params), self._specs(shapes)
        return self.map(on_device, (params, sums, weight), specs, out)

    def _gathered(self, parts: T, old: T) -> T:
        """The whole parameters of their parts, in the memory of the old ones."""

        def whole(old: jax.Array, part: jax.Array) -> jax.Array:
            cut = self.cut(old)
            return gather(part, *cut.dims[0], old) if cut.dims else part

        def on_device(parts: T, old: T) -> T:
            with jax.named_scope("accumax.gather"):
                return jax.tree.map(whole, old, parts)

        specs = self._specs(parts), PartitionSpec()
        return self.map(on_device, (parts, old), specs, PartitionSpec())

    def _change(self, new: jax.Array, old: jax.Array) -> jax.Array:
        """What crosses for a parameter: its change, if that is of lower precision.

        All devices add the same change to the same old parameter. The parameters
        themselves, rounded to bfloat16, would lose the small changes of each window.
        """
        if not self.cut(old).dims or jnp.iscomplexobj(old):
            return new
        lower = jnp.finfo(self.gather_dtype).bits < jnp.finfo(old.dtype).bits
        return (new - old).astype(self.gather_dtype) if lower else new

    def _by_compiler(
        self, fun: Callable[..., Any], carry: T, specs: PyTree, *same: Any
    ) -> T:
        """Runs `carry = fun(carry, *same)`, whose arrays XLA divides as `specs` say."""
        if not self.axes.explicit:
            return self._divided(fun(carry, *same), specs)
        # On explicit axes, types would have to say how each product is divided.
        if any(map(callable, jax.tree.leaves(same))):
            raise ValueError(
                f"shard_optimizer=True on the explicit axes {self.names}, and the "
                "optimizer gets a function (value_fn, grad_fn): the arrays that it "
                "closes over have types that do not go with the optimizer's divided "
                "ones. Make these axes AxisType.Auto, or leave shard_optimizer out."
            )
        mesh = self.axes.where()
        out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        on_arrays, arrays = of_arrays(fun, (carry, *same))
        run: Any = jax.sharding.auto_axes(on_arrays, out_sharding=out)
        return run(*arrays.values())

    def _divided(self, tree: T, specs: PyTree, others: Any = None) -> T:
        """Constrains the arrays of `tree` to be divided as `specs` say.

        `others` has the sharding of each over the mesh's other axes; None for any.
        """
        mesh, free = self.axes.where(), PartitionSpec.UNCONSTRAINED

        def place(x: Any, own: PartitionSpec, other: PartitionSpec | None) -> Any:
            if self.axes.explicit:
                return jax.sharding.reshard(x, NamedSharding(mesh, own))
            spec = [free] * x.ndim if other is None else [*other]
            spec += [None] * (x.ndim - len(spec))
            for dim, names in enumerate(own):
                if names:
                    spec[dim] = names if spec[dim] is free else joined(names, spec[dim])
            if all(entry is free for entry in spec):
                return x
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            return lax.with_sharding_constraint(x, sharding)

        leaves, structure = jax.tree.flatten(tree)
        known = [None] * len(leaves) if others is None else others
        return structure.unflatten(map(place, leaves, jax.tree.leaves(specs), known))

    def _specs(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: self.cut(x).spec, tree)

    def _check_outside(self) -> None:
        if self.axes.in_shard_map:
            self.check_inside()
        others = [name for name in self.axes.explicit if name not in self.names]
        if others:
            raise ValueError(
                f"shard_optimizer=True and a mesh with the explicit axes {others} "
                "besides reduce_axis do not go together: the types of arrays would "
                "have to say how each product of the optimizer is divided. Make these "
                "axes AxisType.Auto."
            )


def _specs_of_state(init: Callable[[PyTree], Any], params: PyTree) -> list[Any]:
    """The sharding of each array of `init(params)`, as far as it is that of parameters.

    Under jit, nothing would say it: zeros do not depend on the parameters. An array
    belongs to the parameter of its shape whose path is the end of its own.
    """
    found = jax.tree_util.tree_leaves_with_path(params)
    specs = {(path, jnp.shape(p)): spec_of(p) for path, p in found}

    def spec(path: tuple[Any, ...], x: Any) -> PartitionSpec:
        ends = [(path[i:], jnp.shape(x)) for i in range(len(path) + 1)]
        return next((specs[end] for end in ends if end in specs), PartitionSpec())

    state = jax.eval_shape(init, params)
    return [spec(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(state)]


def scatter(
    x: jax.Array, dim: int, names: tuple[str, ...], dtype: Any = None
) -> jax.Array:
    """Sums `x` over devices and returns this device's part along a dimension.

    `dtype` is the one in which it crosses the network; None for its own.
    """

    def scattered(x: jax.Array) -> jax.Array:
        return reduce_scatter(x, names, dtype)

    if dim == 0:
        return scattered(x)
    # One slice at a time: XLA:GPU would transpose `x` to scatter another dimension.
    each = lax.map(scattered, x.reshape(-1, *x.shape[dim:]))
    return each.reshape(*x.shape[:dim], *each.shape[1:])


def gather(
    part: jax.Array, dim: int, names: tuple[str, ...], old: jax.Array
) -> jax.Array:
    """Returns the whole array of this device's `part`, in the memory of `old`.

    A `part` of another dtype is what is to be added to `old`.
    """
    if dim == 0:
        return _gather_rows(part, names, old)
    parts = part.reshape(-1, *part.shape[dim:])

    def write(i: jax.Array, whole: jax.Array) -> jax.Array:
        new = _added(all_gather(parts[i], names), whole[i])
        return lax.dynamic_update_index_in_dim(whole, new, i, 0)

    whole = lax.fori_loop(0, len(parts), write, old.reshape(-1, *old.shape[dim:]))
    return whole.reshape(old.shape)


def _gather_rows(part: jax.Array, names: tuple[str, ...], old: jax.Array) -> jax.Array:
    """`gather` along the first dimension, some rows of each device at a time.

    A loop writes into the memory of `old`. For an all-gather of the whole array,
    XLA:TPU copies all parameters before the loop at the boundary, in every call.
    """
    count, rows = len(old) // len(part), len(part)
    turns = next(n for n in range(8, 0, -1) if rows % n == 0)
    if old.size < LEAST_IN_TURNS or turns == 1:
        return _added(all_gather(part, names), old)
    parts = part.reshape(turns, rows // turns, *part.shape[1:])
    shape = count, turns, *parts.shape[1:]

    def write(i: jax.Array, whole: jax.Array) -> jax.Array:
        here = lax.dynamic_index_in_dim(whole, i, 1, keepdims=False)
        new = all_gather(parts[i], names).reshape(here.shape)
        return lax.dynamic_update_index_in_dim(whole, _added(new, here), i, 1)

    return lax.fori_loop(0, turns, write, old.reshape(shape)).reshape(old.shape)


def _added(x: jax.Array, old: jax.Array) -> jax.Array:
    return x if x.dtype == old.dtype else old + x.astype(old.dtype)
