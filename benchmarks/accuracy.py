"""How far accumulation ends from the float64 big batch."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import forms
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import report
from forms import EVERY
from results import Row

import accumax

OPTIMIZERS = {"AdamW": forms.ADAMW, "SGD with momentum": optax.sgd(0.05, momentum=0.9)}
ROWS = 32  # of a microbatch
WIDTHS = (16, 64, 64, 1)
ONES = 1024


def loss(params: list[jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean squared error of an MLP. batch: (rows, 16) and (rows, 1)."""
    return jnp.mean(errors(params, batch))


def masked_loss(params: list[jax.Array], batch: Any) -> tuple[jax.Array, jax.Array]:
    """The sum over the rows whose target is positive, and their number."""
    counts = batch[1] > 0
    return jnp.sum(jnp.where(counts, errors(params, batch), 0)), jnp.sum(counts)


def masked_mean(params: list[jax.Array], batch: Any) -> jax.Array:
    total, count = masked_loss(params, batch)
    return total / count


def errors(params: list[jax.Array], batch: Any) -> jax.Array:
    x, y = batch
    *hidden, last = params
    for w in hidden:
        x = jnp.tanh(x @ w)
    return (x @ last - y) ** 2


def problem(seed: int, *rows: int) -> tuple[list[np.ndarray], Any]:
    """Parameters and a batch, drawn in float32, and so the same for all."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    params = [normal(m, n) * m**-0.5 for m, n in itertools.pairwise(WIDTHS)]
    x = normal(*rows, WIDTHS[0])
    y = np.tanh(x @ normal(WIDTHS[0], 1)) + 0.1 * normal(*rows, 1)
    return params, (x, y)


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

    Each window has rows of its own. Gives the float32 big batch's distance, and that of
    accumax.
    """
    params, whole = problem(seed, windows, EVERY * ROWS)
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
        numbers, median = summary(found)
        rows.append([name, *numbers])
        medians.append(median)
    report.table(
        f"Distance from the float64 big batch after {windows} windows of {EVERY}, "
        f"{seeds} seeds",
        ["", "float32 big batch", "train_step", "least ratio", "median", "most"],
        rows,
    )
    return max(medians)


def summary(found: list[tuple[float, ...]]) -> tuple[list[str], float]:
    """Medians of the columns, and the second's ratio to the first; its median again."""
    ratios = [ours / big for big, ours, *_ in found]
    typical = [statistics.median(column) for column in zip(*found, strict=True)]
    median = statistics.median(ratios)
    numbers = [f"{x:.2f}" for x in (min(ratios), median, max(ratios))]
    distances = ["-" if math.isnan(x) else f"{x:.1e}" for x in typical]
    return distances + numbers, median


class Case(NamedTuple):
    """A batch of so many rows, its gradient at once and in microbatches, and by a scan.

    The scan averages the means of the microbatches, which is not the mean of all rows
    where those have unlike weights.
    """

    rows: int
    big: forms.Gradient
    ours: forms.Gradient
    scan: forms.Gradient | None = None


def cases() -> dict[str, Case]:
    big, mean = jax.value_and_grad(loss), jax.value_and_grad(masked_mean)
    ours = accumax.value_and_grad(loss, microbatch_size=ROWS)
    weighted = accumax.value_and_grad(masked_loss, microbatch_size=ROWS, weighted=True)
    rows = EVERY * ROWS
    return {
        "equal": Case(rows, big, ours, forms.scanned(big, ROWS)),
        "uneven tail": Case(rows - ROWS // 2 - 3, big, ours),
        "weighted": Case(rows, mean, weighted, forms.scanned(mean, ROWS)),
    }


def gradient_distances(case: Case, seed: int) -> tuple[float, ...]:
    """Of the float32 big batch, of ours and of the scan; NaN if there is none."""
    batch = problem(seed, case.rows)
    exact = gradient(case.big, *batch, jnp.float64)
    found = case.big, case.ours, case.scan

    def distance(f: forms.Gradient | None) -> float:
        if f is None:
            return math.nan
        return relative(gradient(f, *batch, jnp.float32), exact)

    return tuple(distance(f) for f in found)


def gradient(f: forms.Gradient, params: Any, batch: Any, dtype: Any) -> np.ndarray:
    """All of the gradient, with parameters and batch in `dtype`."""
    with jax.enable_x64(dtype == jnp.float64):
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch))
        leaves = jax.tree.leaves(jax.jit(f)(*cast)[1])
        return np.concatenate([np.asarray(g, np.float64).ravel() for g in leaves])


def relative(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def gradient_table(seeds: int) -> float:
    """Prints a table; gives the ratio of the two distances: the greatest median."""
    rows, medians = [], []
    for name, case in cases().items():
        found = [gradient_distances(case, seed) for seed in range(seeds)]
        numbers, median = summary(found)
        rows.append([name, *numbers])
        medians.append(median)
    report.table(
        f"Distance of a float32 gradient from the float64 big batch's, over the norm, "
        f"{EVERY} microbatches, {seeds} seeds",
        [
            "",
            "big batch",
            "value_and_grad",
            "lax.scan",
            "least ratio",
            "median",
            "most",
        ],
        rows,
    )
    return max(medians)


def half_precision_table(seeds: int, sizes: Sequence[int] = (ROWS, 1)) -> float:
    """The same for bfloat16, in microbatches of each size.

    Exact is the float64 gradient for the parameters and rows that are left when they
    are rounded to bfloat16.
    """
    rows, medians = [], []
    names: list[str] = []
    for size in sizes:
        found, f = [], forms.gradients(loss, rows=size)
        names = [forms.WHOLE, forms.VALUE_AND_GRAD]
        names += [name for name in (forms.SCAN, forms.MICROBATCHING) if name in f]
        for seed in range(seeds):
            drawn = problem(seed, EVERY * ROWS)
            half = [jnp.asarray(x, jnp.bfloat16) for x in jax.tree.leaves(drawn)]
            params, batch = jax.tree.unflatten(jax.tree.structure(drawn), half)
            exact = gradient(f[forms.WHOLE], params, batch, jnp.float64)
            each = [gradient(f[name], params, batch, jnp.bfloat16) for name in names]
            found.append(tuple(relative(got, exact) for got in each))
        numbers, median = summary(found)
        rows.append([f"{EVERY * ROWS // size} microbatches of {size}", *numbers])
        medians.append(median)
    report.table(
        f"Distance of a bfloat16 gradient, {seeds} seeds",
        ["", *names, "least ratio", "median", "most"],
        rows,
    )
    return max(medians)


SUMS = "float32", "own", "compensated"


def half_sums(seed: int, count: int) -> tuple[float, ...]:
    """How far the mean of `count` bfloat16 gradients is off, for each of `SUMS`.

    Relative to the norm of the float64 mean of the same gradients. The first two are
    accumulator_dtype=jnp.float32 and None; the last, by hand, is a bfloat16 sum and a
    bfloat16 error (Kahan), which takes as much memory as a float32 sum.
    """
    drawn = problem(seed, count, 1)
    params, batches = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), drawn)

    @jax.jit
    def each(params: Any, batches: Any) -> Any:
        return jax.lax.map(lambda batch: jax.grad(loss)(params, batch), batches)

    def flat(leaves: Any, axes: int = 0) -> np.ndarray:
        arrays = [np.asarray(g, np.float64) for g in jax.tree.leaves(leaves)]
        return np.concatenate([a.reshape(*a.shape[:axes], -1) for a in arrays], -1)

    grads = each(params, batches)
    exact = flat(grads, 1).mean(0)

    def ours(dtype: Any) -> np.ndarray:
        inner = optax.trace(0.0, accumulator_dtype=jnp.float32)  # keeps what it sees
        tx = accumax.accumulate(inner, count, accumulator_dtype=dtype)

        @jax.jit
        def window(params: Any, batches: Any) -> Any:
            def call(carry: Any, batch: Any) -> Any:
                params, state, _ = accumax.train_step(loss, tx)(*carry, batch)
                return (params, state), None

            state: Any = tx.init(params)
            (_, state), _ = jax.lax.scan(call, (params, state), batches)
            return state.inner_opt_state.trace

        return flat(window(params, batches))

    @jax.jit
    def compensated(grads: Any) -> Any:
        def add(carry: Any, g: jax.Array) -> Any:
            total, error = carry
            g = g - error
            new = total + g
            return (new, (new - total) - g), None

        def mean(g: jax.Array) -> jax.Array:
            (total, error), _ = jax.lax.scan(add, (g[0] * 0, g[0] * 0), g)
            return (total.astype(jnp.float32) - error.astype(jnp.float32)) / count

        return jax.tree.map(mean, grads)

    found = ours(jnp.float32), ours(None), flat(compensated(grads))
    return tuple(relative(got, exact) for got in found)


def half_sums_rows(counts: Sequence[int], seeds: int = 5) -> list[Row]:
    """Medians over seeds of `half_sums`, for so many microbatches of one row."""
    rows = []
    for count in counts:
        found = zip(*(half_sums(seed, count) for seed in range(seeds)), strict=True)
        for name, column in zip(SUMS, found, strict=True):
            error = statistics.median(column)
            rows.append(Row(f"half_sums/{count}/{name}", error, "x gradient"))
    return rows


def ones_table() -> float:
    """The mean of ones in bfloat16, one a microbatch; gives what ours is off by."""

    def mean(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(w * x)

    w, x = jnp.ones((), jnp.bfloat16), jnp.ones(ONES, jnp.bfloat16)
    found = {
        name: float(jax.jit(f)(w, x)[1]) for name, f in forms.gradients(mean).items()
    }
    report.table(
        f"The mean of {ONES} gradients of 1 in bfloat16",
        ["", "mean"],
        [[name, f"{value:g}"] for name, value in found.items()],
    )
    return abs(found[forms.VALUE_AND_GRAD] - 1)


def tables(seeds: int, windows: int) -> list[report.Bar]:
    """Prints all of them; gives their bars."""
    return [
        ("distance / the float32 big batch's, median", table(seeds, windows), 2.0),
        ("the same for one gradient", gradient_table(seeds), 2.0),
        ("the same for one gradient in bfloat16", half_precision_table(seeds), 2.0),
        (f"error of the mean of {ONES} ones in bfloat16", ones_table(), 0.0),
    ]


def over_big_batch(
    big: forms.Gradient,
    each: dict[str, forms.Gradient],
    rows: int,
    seeds: int,
    dtype: Any = jnp.float32,
) -> dict[str, float | None]:
    """Each gradient's distance from the float64 big batch's, over the big batch's own.

    Medians over the seeds; None for a form that refuses such a batch.
    """
    found: dict[str, list[float] | None] = {name: [] for name in each}
    for seed in range(seeds):
        drawn = problem(seed, rows)
        params, batch = jax.tree.map(lambda x: jnp.asarray(x, dtype), drawn)
        exact = gradient(big, params, batch, jnp.float64)
        own = relative(gradient(big, params, batch, dtype), exact)
        for name, f in each.items():
            ratios = found[name]
            if ratios is None:
                continue
            try:
                got = gradient(f, params, batch, dtype)
            except (TypeError, ValueError):
                found[name] = None
            else:
                ratios.append(relative(got, exact) / own)
    return {
        name: None if ratios is None else statistics.median(ratios)
        for name, ratios in found.items()
    }


def trained_over_big_batch(
    big: forms.Form, each: dict[str, forms.Form], seeds: int, windows: int
) -> dict[str, float]:
    """The same of the parameters after some windows of eight calls."""
    found: dict[str, list[float]] = {name: [] for name in each}
    for seed in range(seeds):
        params, whole = problem(seed, windows, EVERY * ROWS)
        split = [a.reshape(windows * EVERY, ROWS, -1) for a in whole]
        with jax.enable_x64(True):
            exact = _flat(train(big, params, whole, jnp.float64))
        own = relative(_flat(train(big, params, whole, jnp.float32)), exact)
        for name, form in each.items():
            got = _flat(train(form, params, split, jnp.float32))
            found[name].append(relative(got, exact) / own)
    return {name: statistics.median(ratios) for name, ratios in found.items()}


def _flat(params: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([p.ravel() for p in params])


def rows(seeds: int, windows: int) -> list[Row]:
    """Errors of all forms over the big batch's own."""

    def within(loss: Any, ours: Any, **options: Any) -> dict[str, forms.Gradient]:
        found = peers.gradients(loss, ROWS)
        del found[peers.WHOLE]
        found["value_and_grad"] = accumax.value_and_grad(
            ours, microbatch_size=ROWS, **options
        )
        return found

    def across(loss: Any, ours: Any, **options: Any) -> dict[str, forms.Form]:
        # Without Keras, whose AdamW adds its epsilon elsewhere.
        gradient = jax.value_and_grad(loss)
        found = {
            name: forms.whole(form, gradient)
            for name, form in peers.optimizers(forms.ADAMW).items()
            if (not options or name not in peers.ACROSS) and name != "keras"
        }
        tx = accumax.accumulate(forms.ADAMW, EVERY)
        step = accumax.train_step(ours, tx, **options)
        return found | {"train_step": forms.Form(step, tx.init)}

    count, mean, weighted = EVERY * ROWS, masked_mean, {"weighted": True}
    big, masked = jax.value_and_grad(loss), jax.value_and_grad(mean)
    equal, tokens = within(loss, loss), within(mean, masked_loss, **weighted)
    adamw = forms.applied(forms.ADAMW)
    errors: dict[str, Any] = {
        "equal": over_big_batch(big, equal, count, seeds),
        "uneven": over_big_batch(big, equal, count - ROWS // 2 - 3, seeds),
        "weighted": over_big_batch(masked, tokens, count, seeds),
        "bf16": over_big_batch(big, equal, count, seeds, jnp.bfloat16),
        f"after_{windows}_windows": trained_over_big_batch(
            forms.whole(adamw, big), across(loss, loss), seeds, windows
        ),
        f"weighted_after_{windows}_windows": trained_over_big_batch(
            forms.whole(adamw, masked),
            across(mean, masked_loss, **weighted),
            seeds,
            windows,
        ),
    }
    refused = "It refuses a batch that its microbatch does not divide."
    return [
        Row(
            f"error/{case}/{form}",
            ratio,
            "x big batch",
            note=refused if ratio is None else "",
        )
        for case, found in errors.items()
        for form, ratio in found.items()
    ]
