"""Small nets in Linen and NNX, and what their batch normalisations see, in float64."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

MOMENTUM, INNER_MOMENTUM = 0.9, 0.7


def rows(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of n rows, of another mean and variance in each third."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)) * np.linspace(1, 3, n)[:, None] + 2
    return {
        "x": x.astype(np.float32),
        "y": rng.normal(size=(n, 2)).astype(np.float32),
    }


def part(batch: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[start:stop], batch)


def divided(rows: Any, size: int) -> list[Any]:
    """Microbatch i of k has rows i, k + i, ...; the smaller one has the last ones."""
    n = len(rows["x"])
    size = min(size, n)
    k = n // size
    every_kth = [
        jax.tree.map(lambda x, i=i: x[i : k * size : k], rows) for i in range(k)
    ]
    return every_kth + ([part(rows, k * size, n)] if n % size else [])


class Linen(nn.Module):
    """Normalises its input, and a hidden layer; drops out between them."""

    rate: float = 0.0
    normalises: bool = True
    width: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        if self.normalises:
            x = nn.BatchNorm(not train, momentum=MOMENTUM, name="first")(x)
        x = nn.tanh(nn.Dense(self.width, name="hidden")(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        if self.normalises:
            x = nn.BatchNorm(not train, momentum=INNER_MOMENTUM, name="second")(x)
        return nn.Dense(2, name="out")(x)


MOMENTA = {"first": MOMENTUM, "second": INNER_MOMENTUM}


class NNX(nnx.Module):
    """The same, with a count of its calls."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        rate: float = 0.0,
        normalises: bool = True,
        width: int = 4,
    ):
        def norm(size, momentum):
            new = nnx.BatchNorm(size, momentum=momentum, rngs=rngs)
            return nnx.data(new if normalises else None)

        self.first, self.second = norm(3, MOMENTUM), norm(width, INNER_MOMENTUM)
        self.hidden = nnx.Linear(3, width, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(width, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        x = x if self.first is None else self.first(x)
        x = self.dropout(nnx.tanh(self.hidden(x)))
        x = x if self.second is None else self.second(x)
        return self.out(x)


def window_statistics(params: Any, parts: list[Any]) -> dict[str, dict[str, Any]]:
    """What one update by all `parts` makes of new running statistics, in float64.

    Each part is normalised by itself, as both nets do it.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    seen: dict[str, list[Any]] = {"first": [], "second": []}
    for batch in parts:
        x = np.asarray(batch["x"], np.float64)
        seen["first"].append(x)
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x = x * params["first"]["scale"] + params["first"]["bias"]
        x = np.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        seen["second"].append(x)
    new = {}
    for name, momentum in MOMENTA.items():
        x = np.concatenate(seen[name])
        new[name] = {
            "mean": (1 - momentum) * x.mean(0),
            "var": momentum + (1 - momentum) * x.var(0),
        }
    return new


def near(got: Any, want: Any, ulps: float = 16) -> bool:
    """Whether two trees agree to so many units of float32 rounding of the larger."""
    eps = ulps * np.finfo(np.float32).eps

    def close(a: Any, b: Any) -> bool:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return bool(np.abs(a - b).max() <= eps * max(1.0, np.abs(b).max()))

    return jax.tree.all(jax.tree.map(close, got, want))
