"""Devices that hold whole parameters and divide the rows of a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .. import _tree
from .._types import PyTree
from .._xla.jaxprs import exchanges
from .._xla.loops import apart, at_most_once
from .._xla.varying import is_checked, vary, varying
from .mesh import Axes
from .one import ONE, Devices, fold_in
from .specs import names_in, only, spec_of
from .wire import all_reduce

T = TypeVar("T")
S = TypeVar("S")

BUCKET = 2**20  # elements: so many are reduced together, if no array has more


@dataclasses.dataclass(frozen=True)
class Replicated(Devices):
    """Each device has whole parameters; gradients are summed at the end of a call.

    Attributes:
      axes: the mesh axes of the devices.
      reduce_dtype: the dtype in which gradients cross the network; None for their own.
    """

    axes: Axes
    reduce_dtype: Any = dataclasses.field(default=None, kw_only=True)

    needs_rows = True
    own_sums = True

    @property
    def names(self) -> tuple[str, ...]:
        return self.axes.names

    @property
    def count(self) -> int:
        return self.axes.count

    @property
    def divides(self) -> int:
        return 1 if self.axes.in_shard_map else self.axes.count

    def at(self, args: tuple, argnums: tuple[int, ...]) -> Devices:
        for n in argnums:
            self.axes.check_whole(f"Argument {n}", args[n])
        return self

    def map(self, fun: Callable[..., Any], args: tuple, specs: tuple, out: Any) -> Any:
        return (
            fun(*args)
            if self.axes.in_shard_map
            else self.axes.map(fun, args, specs, out)
        )

    @property
    def rows(self) -> PartitionSpec:
        return self.axes.rows

    def vary(self, tree: T) -> T:
        names = frozenset(filter(is_checked, self.names))
        return jax.tree.map(lambda x: vary(x, names), tree)

    def sum(self, tree: T) -> T:
        with jax.named_scope("accumax.reduce"):
            return lax.psum(self.vary(tree), self.names)

    def sum_gradients(self, sums: T) -> T:
        """Sums gradients over devices: an all-reduce, in `reduce_dtype`."""
        if self.reduce_dtype is None:
            return self.sum(sums)
        with jax.named_scope("accumax.reduce"):
            reduce = functools.partial(
                all_reduce, names=self.names, dtype=self.reduce_dtype
            )
            return jax.tree.map(reduce, self.vary(sums))

    def last(self, x: jax.Array) -> jax.Array:
        dtype = x.dtype
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(x)
            data = self.last(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=impl)
        if dtype == jnp.bool_:
            return self.last(x.astype(jnp.int32)) != 0
        is_last = lax.axis_index(self.names) == self.count - 1
        return self.sum(jnp.where(is_last, x, _tree.minus_zero(dtype)))

    def any(self, flags: jax.Array) -> jax.Array:
        return self.sum(jnp.float32(flags)) > 0

    def all(self, flags: jax.Array) -> jax.Array:
        return ~self.any(~flags)

    def same(self, name: str, x: jax.Array) -> jax.Array:
        if not self.axes.in_shard_map:
            return x
        if not varying(x).isdisjoint(self.names):
            raise ValueError(
                f"{name} may differ by device of reduce_axis={self.names}, and stands "
                "for the rows of all. Let the loss return what its own rows weigh "
                "(weighted=True), or reduce it."
            )
        # Under check_vma=False `x` may differ; with the mean, all devices agree.
        return self.sum(x) / self.count

    def keys_of_device(self, keys: T) -> T:
        return fold_in(keys, lax.axis_index(self.names))

    def reduce(self, own: T, fun: Callable[[Devices], T]) -> T:
        return apart(lambda: fun(self), seen=jax.tree.leaves(own)[0])

    def check_unreduced(self, name: str, tree: PyTree) -> None:
        # Under check_vma=False JAX does not say whether a value was reduced.
        for axis in filter(is_checked, self.names):
            for path, x in jax.tree_util.tree_leaves_with_path(tree):
                if axis not in varying(x):
                    raise ValueError(
                        f"{name}{jax.tree_util.keystr(path)} is the same on all "
                        f"devices of {axis!r}: it is reduced already, and would be "
                        f"counted {self.count} times. Pass each device's own: "
                        "differentiate with respect to jax.lax.pcast(params, "
                        f'{axis!r}, to="varying"), and leave psum and pmean to '
                        "accumax."
                    )

    def agreement(
        self, gradients: list[Callable[..., Any]], *args: Any
    ) -> tuple[Callable[[jax.Array], jax.Array], bool]:
        if any(exchanges(self.names, fun, *args) for fun in gradients):
            # Other devices need the data of a device whose weight is 0, too.
            return self.any, True
        # Beside another mesh axis, XLA may make devices exchange values in the backward
        # pass, and their weights may differ.
        return ONE.all, self.axes.covers_mesh

    def begin(self, sums: T, zeros: Callable[[], T]) -> tuple[Any, T]:
        # Only the first device continues the sums; this needs no second tree.
        return (), jax.tree.map(lambda s: on_first(s, self.names), sums)

    def end(self, held: Any, sums: T) -> T:
        return self.sum_gradients(sums)


@dataclasses.dataclass(frozen=True)
class PerDevice(Replicated):
    """Each device keeps its own sums; one all-reduce at the end of a window adds them.

    In a state, sums have an extra first axis, which is sharded over the devices.
    """

    @property
    def parts(self) -> int:
        return self.count

    @property
    def sums(self) -> Any:
        return self.axes.rows

    def begin(self, sums: T, zeros: Callable[[], T]) -> tuple[Any, T]:
        return (), sums

    def end(self, held: Any, sums: T) -> T:
        return sums

    def unstack(self, sums: T) -> T:
        return jax.tree.map(lambda x: x[0], sums)

    def stack(self, sums: T) -> T:
        return jax.tree.map(lambda x: x[None], sums)

    def join(self, other: Devices) -> Devices:
        if not other.names:
            return self
        if not isinstance(other, Replicated) or not other.in_place:
            raise ValueError(
                "accumax.FSDP is for parameters that no device has whole, "
                "and an accumulate with reduce_axis="
                f"{self.names} keeps a whole sum on each. Leave "
                "reduce_axis to train_step, which then reduces in every call."
            )
        if self.names != other.names:
            raise ValueError(
                f"reduce_axis={other.names}, where the accumulate has reduce_axis="
                f"{self.names}. Pass the same, or pass it to the accumulate alone."
            )
        return (
            self
            if other.axes.mesh is None
            else dataclasses.replace(self, axes=other.axes)
        )

    def init(self, init: Callable[[PyTree], PyTree], grads: PyTree) -> PyTree:
        """Makes zeros on each device.

        Over the mesh's other axes, the zeros are sharded as the parameters are.
        """
        explicit = self.axes.explicit
        shapes, like = jax.eval_shape(init, grads), _tree.differentiable(grads)
        self.axes.check_whole("params", like)
        specs = jax.tree.map(spec_of, like)

        def zero(s: Any, spec: PartitionSpec) -> jax.Array:
            x = jnp.zeros(s.shape, s.dtype)
            if explicit:
                return jax.sharding.reshard(x, PartitionSpec(*only(spec, explicit)))
            if not any(map(names_in, spec)):
                return x  # not sharded, or not known under jit
            return lax.with_sharding_constraint(x, spec)

        def zeros() -> PyTree:
            return self.stack(jax.tree.map(zero, shapes, specs))

        if self.axes.in_shard_map:
            return self.vary(zeros())
        return self.axes.map(zeros, (), (), self.rows)

    def check_inside(self) -> None:
        if not self.axes.in_shard_map:
            raise TypeError(
                f"accumulate(..., reduce_axis={self.names}) keeps the sums of the "
                "devices apart, and outside of a jax.shard_map over them there is "
                "one gradient for all. Call this within one, or use "
                "accumax.train_step, or leave reduce_axis away."
            )

    def on_each(
        self, fun: Callable[..., Any], own: tuple, same: tuple
    ) -> tuple[Any, Any]:
        def on_device(own: tuple, same: tuple) -> tuple[Any, Any]:
            own, out = fun(*self.unstack(own), *same)
            return self.stack(own), out

        specs = self.rows, PartitionSpec()
        return self.map(on_device, (own, same), specs, specs)

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
        # In a shard_map that checks types, what a loop reduces in place would have the
        # type of a device's own.
        typed = self.axes.in_shard_map and any(map(is_checked, self.names))
        if not typed:
            sums = self._in_turn(applies, sums)

        def mean_of(sums: PyTree, weight: jax.Array) -> PyTree:
            return divide(self.sum_gradients(sums) if typed else sums, weight)

        # The sums go through the loop, so that they are divided in place.
        def body(both: tuple[tuple[T, S], PyTree]) -> tuple[tuple[T, S], PyTree]:
            carry, sums = both
            sums, mean = self._on_all(mean_of, sums, weight)
            return fun(carry, mean, weight, extra), sums

        return at_most_once(applies, body, (carry, sums))

    def _in_turn(self, applies: jax.Array, sums: T) -> T:
        """Sums a state's sums over devices in place, a bucket of arrays at a time.

        Each bucket has a loop of its own: XLA:GPU concatenates arrays to reduce them
        together (16 matrices: temp of 1.0; with the loops, 0).
        """

        def reduce(sums: PyTree) -> PyTree:
            def on_device(own: PyTree) -> tuple[PyTree, Any]:
                return self.vary(self.sum_gradients(own)), ()

            return self.on_each(on_device, (sums,), ())[0]

        leaves, structure = jax.tree.flatten(sums)
        for bucket in buckets([x.size // self.divides for x in leaves]):
            new = at_most_once(applies, reduce, [leaves[i] for i in bucket])
            for i, x in zip(bucket, new, strict=True):
                leaves[i] = x
        return structure.unflatten(leaves)

    def total(self, sums: T) -> T:
        return self._on_all(self.sum_gradients, sums)[1]

    def _on_all(self, fun: Callable[..., T], sums: T, *same: Any) -> tuple[T, T]:
        """`fun(sums, *same)`, in the layouts of a state and of a gradient."""

        def on_device(sums: T, *same: Any) -> tuple[T, T]:
            total = fun(sums, *same)
            return self.vary(total), total

        return self.on_each(on_device, (sums,), same)

    def shapes(self, name: str, sums: PyTree) -> PyTree:
        def shape(path: Any, x: Any) -> jax.ShapeDtypeStruct:
            if x.shape[:1] != (self.divides,):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} has shape {x.shape}; expected "
                    f"a first axis of {self.divides}, for the sum of each device along "
                    f"reduce_axis={self.names}. A window begins and ends with one "
                    "number of devices, and with what its accumulate was asked for."
                )
            return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

        return jax.tree_util.tree_map_with_path(shape, sums)

    def as_replicated(self, grads: PyTree) -> PyTree:
        return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape, g.dtype), grads)


def buckets(sizes: list[int]) -> list[list[int]]:
    """Groups indices of `sizes`, about `BUCKET` in each; a larger one is alone."""
    groups: list[list[int]] = []
    open_group, total = [], 0
    for i, size in enumerate(sizes):
        if size >= BUCKET:
            groups.append([i])
            continue
        open_group, total = [*open_group, i], total + size
        if total >= BUCKET:
            groups.append(open_group)
            open_group, total = [], 0
    return [*groups, open_group] if open_group else groups


def on_first(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """`x` on the first device along these axes, -0.0 on the others."""
    return jnp.where(lax.axis_index(names) == 0, x, _tree.minus_zero(x.dtype))
