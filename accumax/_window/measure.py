"""What a window measures of its gradient: its norm, and the gradient noise scale."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _tree
from .._devices.one import Devices
from .._noise import Noise, Small, estimate, square_of
from .._sums import Accumulator, Sums
from .._types import PyTree
from .._xla.loops import at_most_once
from .state import MEASURES, NOISE, NORM, AccumulateState, is_state


@dataclasses.dataclass(frozen=True)
class Measure:
    """Which measures a window takes. All fields are static.

    Attributes:
      accumulator: the arithmetic of the window.
      norm: the norm of the gradient that the inner transformation sees.
      decay: of the averages of the noise over windows; None for no noise.
    """

    accumulator: Accumulator
    norm: bool
    decay: float | None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the measures in a state's `acc_args`."""
        wanted = self.norm, self.decay is not None
        return tuple(itertools.compress(MEASURES, wanted))

    def init(self) -> dict[str, Any]:
        def scalar() -> jax.Array:  # a new array each time: no buffer is donated twice
            return jnp.zeros((), float)

        found = {NORM: scalar(), NOISE: Noise(*(scalar() for _ in Noise._fields))}
        return {name: found[name] for name in self.names}

    def wants_small(self, state: AccumulateState, devices: Devices) -> jax.Array | None:
        """Whether a call of microbatches should measure a part of it, () bool.

        None if it never should.
        """
        if self.decay is None or devices.parts > 1:
            return None
        return state.acc_weight == 0

    def small_batch(
        self,
        state: AccumulateState,
        sums: Sums,
        applies: jax.Array,
        devices: Devices,
    ) -> Noise | None:
        """Measures a part of the window, beside which the window is the large batch.

        Where several devices have sums of their own it is one device, in the call that
        closes the window. Else it is the first call or a part of it, its first
        microbatch or what one device has of it, which `measured` knows.
        """
        if self.decay is None:
            return None
        noise = state.acc_args[NOISE]
        if devices.parts == 1:
            fresh = state.acc_weight == 0  # nothing was measured in this window
            weight = jnp.where(fresh, 0, noise.small_weight)
            return noise._replace(small_weight=weight)
        square = _read(applies, square_of, (sums.grads,), noise.small_square, devices)
        return noise._replace(
            small_square=square, small_weight=sums.weight / devices.parts
        )

    def measured(
        self,
        state: AccumulateState,
        sums: Sums,
        noise: Noise | None,
        applies: jax.Array,
        devices: Devices,
        square: jax.Array | None = None,
        small: Small | None = None,
    ) -> dict[str, Any]:
        """Measures a window at the end of a call, if it has closed or has just opened.

        Args:
          state: before the call.
          sums: after the call, divided in place if the window has closed.
          noise: that of `small_batch`.
          applies: () bool, whether the window has closed.
          devices: of the sums.
          square: () float, the squared norm of the gradient that the inner
            transformation saw; None to read it from `sums`.
          small: a part of the call, measured; None if it has no part.
        """
        if not self.names:
            return {}
        opens = (state.acc_weight == 0) & (sums.weight > 0)
        reads = jnp.bool_(False)
        if noise is not None and devices.parts == 1 and small is None:
            opens &= ~applies  # a window of one call has no smaller batch
            reads = opens
        weight = jnp.where(applies, sums.weight, 1)

        def mean_square(own: PyTree, weight: jax.Array) -> jax.Array:
            return square_of(self.accumulator.divide_half(own, weight))

        # In a loop of its own, behind the optimizer: XLA:CPU keeps the squares of all
        # gradients if Adam computes them in the same loop, and copies sums that are
        # changed after they were read.
        old = jnp.zeros((), float) if square is None else square
        reads = reads | applies if square is None else reads
        square = _read(reads, mean_square, (sums.grads, weight), old, devices)
        found: dict[str, Any] = {}
        if self.norm:
            found[NORM] = _pick(applies, jnp.sqrt(square), state.acc_args[NORM])
        if noise is not None:
            if devices.parts == 1:
                least = Small(square, sums.weight) if small is None else small
                noise = noise._replace(
                    small_square=_pick(opens, least.square, noise.small_square),
                    small_weight=_pick(opens, least.weight, noise.small_weight),
                )
            found[NOISE] = self._averaged(noise, square, sums.weight, applies)
        return found

    def _averaged(
        self, noise: Noise, square: jax.Array, weight: jax.Array, applies: jax.Array
    ) -> Noise:
        """Adds a window that closes to the averages."""
        assert self.decay is not None
        divides, decay = self.accumulator.reduction != "sum", self.decay
        large = square if divides else square / weight**2
        small = Small(noise.small_square, noise.small_weight)
        signal, spread, known = estimate(small, large, weight)
        # A window of one call has no smaller batch; a NaN must not stay in an average.
        counts = applies & known

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return _pick(counts, decay * old + (1 - decay) * new, old)

        return noise._replace(
            signal=average(noise.signal, signal), spread=average(noise.spread, spread)
        )


def _pick(flag: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(flag, new, old).astype(old.dtype)


def _read(
    reads: jax.Array,
    fun: Callable[..., jax.Array],
    args: tuple[Any, ...],
    old: jax.Array,
    devices: Devices,
) -> jax.Array:
    """The mean over devices of `fun(*args)` if `reads`, else `old`.

    The first argument is the sums, in the layout of a state; others are replicated.
    """

    def on_device(*args: Any) -> tuple[Any, jax.Array]:
        return (), devices.sum(fun(*args))

    def read(old: jax.Array) -> jax.Array:
        _, total = devices.on_each(on_device, args[:1], args[1:])
        return (total / devices.parts).astype(old.dtype)

    with jax.named_scope("accumax.measure"):
        return at_most_once(reads, read, old)


def measure(accumulator: Accumulator, track_norm: Any, track_noise: Any) -> Measure:
    """Makes a `Measure`; see `accumax.accumulate`.

    Raises:
      TypeError, ValueError: an option is wrong, or an averaged argument has the name of
        a measure.
    """
    _tree.check_flags(track_norm=track_norm)
    found = Measure(accumulator, track_norm, _check_decay(track_noise))
    for name in set(found.names) & set(accumulator.averaged_args):
        raise ValueError(
            f"averaged_args={accumulator.averaged_args} has {name!r}, the name of a "
            "measure in the state's acc_args. Rename the argument, or do not track."
        )
    return found


def _check_decay(track_noise: Any) -> float | None:
    """The decay of the averages that `track_noise` asks for; None for none."""
    if isinstance(track_noise, bool):
        return 0.99 if track_noise else None
    if not isinstance(track_noise, float) or not 0 <= track_noise < 1:
        raise ValueError(
            f"{track_noise=} must be a bool, or the decay of its averages over "
            "windows: a float of at least 0 and below 1. 0.99 averages some 100."
        )
    return track_noise


def noise_scale(opt_state: Any) -> jax.Array:
    r"""The gradient noise scale: () float, a batch size, from a window's own sums.

    It is :math:`\operatorname{tr}(\Sigma) / |G|^2`: the variance of the gradient of one
    item, over the square of the mean gradient. A batch much smaller than that is mostly
    noise, and a larger one gains little for each step. It is unbiased in numerator and
    denominator, each of which is averaged over windows. It is telemetry: log it, and
    read `docs/batch_size.md` before you act on it.

    The unit is that of the weights. Where each call has the weight 1, it counts calls:
    multiply by the rows of a call.

    Args:
      opt_state: the state of an `accumax.accumulate(..., track_noise=True)`, or a state
        that holds one. Or the noise of an `accumax.value_and_grad(...,
        track_noise=True)`, whose unit is rows or, of a weighted loss, weights. Average
        it over calls, as any tree, before you pass it.

    Returns:
      NaN before the first window of at least two calls (or two microbatches of
      `accumax.train_step`, or two devices) has closed. Negative or very large values
      mean that the noise hides the gradient: average over more windows.

    Raises:
      TypeError: no state in `opt_state` tracks the noise.

    >>> import accumax, jax, optax
    >>> import jax.numpy as jnp
    >>> tx = accumax.accumulate(optax.sgd(0.0), every=8, track_noise=True)
    >>> params = jnp.zeros(1000)
    >>> state = tx.init(params)
    >>> def step(state, key):  # gradients of mean 1 and variance 4
    ...     grads = 1 + 2 * jax.random.normal(key, (1000,))
    ...     return accumax.apply_gradients(tx, params, state, grads)[1], None
    >>> keys = jax.random.split(jax.random.key(0), 800)
    >>> state, _ = jax.lax.scan(step, state, keys)
    >>> print(f"{accumax.noise_scale(state):.1f}")
    4.0

    References:
      McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162,
      appendix A.1. The norms are those of the sum after a window's first call, or its
      first microbatch, and at its end, or of each device's own sum, so no gradient tree
      is needed.
    """

    def ends(x: Any) -> bool:
        return is_state(x) or isinstance(x, Noise)

    for found in jax.tree.leaves(opt_state, is_leaf=ends):
        noise = found.acc_args.get(NOISE) if is_state(found) else found
        if isinstance(noise, Noise):  # and not an averaged argument of this name
            seen = (noise.spread != 0) | (noise.signal != 0)
            return jnp.where(seen, noise.spread / noise.signal, jnp.nan)
    raise TypeError(
        "noise_scale found no state that tracks the noise in a "
        f"{type(opt_state).__name__}. Make the transformation with "
        "accumax.accumulate(..., track_noise=True)."
    )
