"""How far accumulation in float32 ends from the float64 big batch."""

import itertools
import statistics
from typing import Any

import forms
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from forms import EVERY

OPTIMIZERS = {"AdamW": forms.ADAMW, "SGD with momentum": optax.sgd(0.05, momentum=0.9)}
ROWS = 32  # of a microbatch
WIDTHS = (16, 64, 64, 1)


def loss(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean squared error of an MLP. batch: (rows, 16) and (rows, 1)."""
    x, y = batch
    *hidden, last = params
    for w in hidden:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ last - y) ** 2)


def train(form: forms.Form, params: Any, batches: Any, dtype: Any) -> list[np.ndarray]:
    """The parameters after all of `batches`, everything in `dtype`."""
    params = [jnp.asarray(p, dtype) for p in params]
    state = form.init(params)
    step = jax.jit(form.step)
    for batch in zip(*(jnp.asarray(a, dtype) for a in batches), strict=True):
        params, state, _ = step(params, state, batch)
    return [np.asarray(p, np.float64) for p in params]


def distances(
    optimizer: optax.GradientTransformation, seed: int, windows: int
) -> tuple[float, float]:
    """The greatest distance of a parameter from the float64 big batch's.

    Parameters and data are drawn in float32, and are the same for all. Each window has
    rows of its own. Gives the float32 big batch's distance, and that of accumax.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    params = [normal(m, n) * m**-0.5 for m, n in itertools.pairwise(WIDTHS)]
    x = normal(windows, EVERY * ROWS, WIDTHS[0])
    y = np.tanh(x @ normal(WIDTHS[0], 1)) + 0.1 * normal(windows, EVERY * ROWS, 1)
    whole = x, y
    split = [a.reshape(windows * EVERY, ROWS, -1) for a in whole]
    steps = forms.train_steps(loss, inner=optimizer)
    with jax.enable_x64(True):
        exact = train(steps[forms.PLAIN], params, whole, jnp.float64)

    def distance(got: list[np.ndarray]) -> float:
        pairs = zip(got, exact, strict=True)
        return float(max(np.abs(a - b).max() for a, b in pairs))

    return (
        distance(train(steps[forms.PLAIN], params, whole, jnp.float32)),
        distance(train(steps[forms.TRAIN_STEP], params, split, jnp.float32)),
    )


def table(seeds: int, windows: int) -> float:
    """Prints a table; gives the ratio of the two distances, median over the seeds.

    Of two optimizers' medians, the greater. The distance is mostly the optimizer's own
    rounding, so that the ratio is 1. Under AdamW it now and then is not, up or down:
    where a gradient is all but zero, rounding decides its sign, and AdamW makes a whole
    step of it.
    """
    rows, medians = [], []
    for name, optimizer in OPTIMIZERS.items():
        found = [distances(optimizer, seed, windows) for seed in range(seeds)]
        ratios = [ours / big for big, ours in found]
        medians.append(statistics.median(ratios))
        typical = [statistics.median(column) for column in zip(*found, strict=True)]
        rows.append(
            [name]
            + [f"{x:.1e}" for x in typical]
            + [f"{x:.2f}" for x in (min(ratios), medians[-1], max(ratios))]
        )
    report.table(
        f"Distance from the float64 big batch after {windows} windows of {EVERY}, "
        f"{seeds} seeds",
        ["", "float32 big batch", "train_step", "least ratio", "median", "most"],
        rows,
    )
    return max(medians)
