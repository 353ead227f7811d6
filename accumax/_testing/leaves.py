"""What the leaves say one by one: rounding, swapped and stale gradients."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from .evidence import Evidence, Leaf, is_half

HALVES = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
SAMPLE = 4096  # numbers of a leaf in which a sum in half precision is looked for
LEAST = 8  # numbers below which rounding is not judged
FLOAT32 = 1e-5  # what programs in float32 differ by, and sums in half precision do not
# The part of a gradient that sums in half precision may lose without a fixed pattern.
MOST = 2.0**-4


def half_sums(seen: Evidence) -> str | None:
    """What was summed in half precision, from repeating such sums; None if nothing."""
    found = {}
    for i, leaf in enumerate(seen.leaves):
        if len(leaf.gradients) < 2 or leaf.count < LEAST:
            continue
        total, columns = (x[:SAMPLE] for x in leaf.load())
        mean = columns @ seen.expected
        right = [mean]
        if is_half(leaf.accumulated):  # then the right sum is rounded once, too
            right.append(mean.astype(leaf.accumulated.dtype).astype(np.float64))
        wrong = min(_rms(total - x) for x in right)
        if wrong <= FLOAT32 * max(_rms(mean), _rms(total)):
            continue
        for dtype, simulated in _simulate(columns, seen.expected):
            if 8 * _rms(total - simulated) < wrong:
                found[i] = dtype.name
                break
    if not found:
        return None
    dtypes = ", ".join(sorted(set(found.values())))
    where = "" if len(found) == len(seen.leaves) else f" in {_names(seen, list(found))}"
    left = max(seen.unexplained(seen.expected)[i] for i in found)
    return (
        f"A sum of the microbatches in {dtypes} gives this gradient{where}, and one in "
        f"float32 does not: {left:.3g} of it is lost. Accumulate in float32."
    )


def _simulate(
    columns: np.ndarray, expected: np.ndarray
) -> Iterator[tuple[np.dtype, np.ndarray]]:
    """Means of the columns in half precision, in the ways that programs have."""
    weights = expected / np.max(expected)
    for dtype in HALVES:
        total = np.zeros(len(columns), dtype)
        scaled, running = total, total
        seen = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for column, w, e in zip(columns.T, weights, expected, strict=True):
                term = column.astype(dtype)
                total = total + (term * dtype.type(w)).astype(dtype)
                scaled = scaled + (term * dtype.type(e)).astype(dtype)
                seen += w
                part = dtype.type(w / seen if seen else 0)
                running = running + ((term - running) * part).astype(dtype)
            mean = total.astype(np.float64) / np.sum(weights)
            ways = mean, mean.astype(dtype), scaled, running
            for way in ways:
                way = way.astype(np.float64)
                if np.all(np.isfinite(way)):
                    yield dtype, way


def compare(seen: Evidence) -> tuple[str, str]:
    """The fault and the diagnosis of a gradient that no coefficients explain."""
    misfit = seen.misfit(seen.expected)
    bad = [i for i, x in enumerate(misfit) if x > 1]
    left = seen.unexplained(seen.expected)
    rounded = _representable(seen, bad)
    large = [i for i, leaf in enumerate(seen.leaves) if leaf.count >= LEAST]
    everywhere = set(large) <= set(bad) and _near_expected(seen)
    if np.max(left[bad]) <= MOST and (rounded or everywhere):
        return "half-precision accumulation", _small(seen, bad, rounded)
    told = [text for i in bad if (text := _origin(seen, i))]
    if told or len(bad) < len(seen.leaves):
        told += [
            f"{_names(seen, [i])} is not explained by its own microbatches "
            f"({left[i]:.3g} of it is left): stale, or of another computation."
            for i in bad
            if not _origin(seen, i)
        ]
        good = [i for i in range(len(seen.leaves)) if i not in bad]
        right = f" {_names(seen, good)} as expected." if good else ""
        return "leaves differ", " ".join(told[:6]) + right
    least = np.max(seen.unexplained(seen.solution[0]))
    return (
        "unknown",
        f"No coefficients explain the gradient: {least:.3g} of it is left. So the "
        "step has other gradients of each microbatch than these: other parameters, "
        "dropout masks, batch statistics, data, or clipping of each number. If one of "
        "these may be the cause, pass such gradients in alternatives=.",
    )


def _small(seen: Evidence, bad: list[int], rounded: str | None) -> str:
    left = np.max(seen.unexplained(seen.expected))
    where = "" if len(bad) == len(seen.leaves) else f" in {_names(seen, bad)}"
    if rounded:
        return (
            f"The coefficients are as expected, but {left:.3g} is lost{where}, and "
            f"every number of the gradient is one of {rounded}. Accumulate in float32, "
            "and cast the mean last."
        )
    return (
        f"The coefficients are as expected, but {left:.3g} of the gradient{where} is "
        "random: likely a sum in bfloat16 or float16. Accumulate in float32. Matrix "
        "products in bfloat16 or TF32 look the same: if the step has them, pass "
        "gradients that have them too, or tolerance=. So do parameters that move a "
        "little within the window, where every microbatch updates them."
    )


def _near_expected(seen: Evidence) -> bool:
    values, determined = seen.solution
    # What is random in n numbers moves the coefficients by its part over sqrt(n).
    typical = np.maximum(seen.expected, np.mean(seen.expected))
    off = np.abs(values - seen.expected)[determined] / typical[determined]
    return bool(np.all(off <= 2 * MOST))


def _representable(seen: Evidence, bad: list[int]) -> str | None:
    """The half-precision dtype of which all numbers of these leaves are, if one."""
    if sum(seen.leaves[i].count for i in bad) < LEAST:
        return None
    for dtype in HALVES:
        with np.errstate(over="ignore"):
            loaded = [seen.leaves[i].load() for i in bad]
            if all(_is_of(total, dtype) for total, _ in loaded) and not all(
                _is_of(columns @ seen.expected, dtype) for _, columns in loaded
            ):
                return dtype.name
    return None


def _is_of(x: np.ndarray, dtype: np.dtype) -> bool:
    return bool(np.all(x.astype(dtype).astype(np.float64) == x))


def _origin(seen: Evidence, i: int) -> str | None:
    """Where the gradient of a leaf comes from, if that can be told."""
    leaf = seen.leaves[i]
    total, _ = leaf.load()
    name = leaf.path or "the gradient"
    if not np.any(total):
        return f"{name} is 0: nothing was added to it, or it is stale."
    for j, other in enumerate(seen.leaves):
        if j == i or other.accumulated.shape != leaf.accumulated.shape:
            continue
        mean = other.load()[1] @ seen.expected
        factor = _explains(mean, total, float(seen.allowed[i]))
        if factor is not None:
            times = "" if abs(factor - 1) < 1e-3 else f"{factor:.4g} times "
            return f"{name} has {times}the gradient of {other.path}: swapped."
    values, determined = seen.solve(i)
    left = np.linalg.norm(seen.triangles[i] @ np.append(-values, 1.0))
    if np.all(determined) and left <= seen.allowed[i] and _overdetermined(leaf):
        ratio = ", ".join(f"{x:.4g}" for x in values[:8])
        return f"{name} has the coefficients ({ratio}) of its own."
    return None


def _explains(mean: np.ndarray, total: np.ndarray, noise: float) -> float | None:
    """The f for which `total` is f `mean`, None if there is none or too few numbers."""
    square = mean @ mean
    if not square or mean.size < 2:
        return None
    factor = float(mean @ total / square)
    fits = _rms(total - factor * mean) <= 4 * noise * _rms(total)
    return factor if fits else None


def _overdetermined(leaf: Leaf) -> bool:
    """Whether other numbers than a mean of its gradients would not be explained.

    Gradients that each sum to 0, as those of the biases of a softmax, have one number
    less than the leaf.
    """
    _, columns = leaf.load()
    rank = np.linalg.matrix_rank(columns, tol=1e-5 * np.linalg.norm(columns))
    free = leaf.count - int(
        np.all(np.abs(np.sum(columns, 0)) <= 1e-5 * np.linalg.norm(columns, axis=0))
    )
    return free > rank


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _names(seen: Evidence, indices: list[int], most: int = 6) -> str:
    paths = [seen.leaves[i].path or "the root" for i in indices]
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more
