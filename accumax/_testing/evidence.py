"""An accumulated gradient beside the gradients of its microbatches, as numbers."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import describe, differentiable
from .._types import PyTree

# The noise of a leaf is measured against its own gradients, but at least against this
# part of the largest ones. The gradient of a key's bias in attention, for example, is
# 0 but for rounding; that rounding is about 1e-7 of the gradients around it.
LEAST_SCALE = 1e-3
# A coefficient is determined if its error is below this part of the expected one.
PRECISE = 0.1


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the accumulated gradient, with that of each microbatch.

    Attributes:
      path: as `jax.tree_util.keystr` prints it.
      accumulated: the leaf as it came.
      gradients: k leaves as they came.
    """

    path: str
    accumulated: np.ndarray
    gradients: tuple[np.ndarray, ...]

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """The accumulated numbers, (n,), and the microbatches', (n, k), in float64."""
        columns = [numbers(x) for x in self.gradients]
        return numbers(self.accumulated), np.stack(columns, axis=1)

    @property
    def count(self) -> int:
        """The real numbers in the leaf."""
        return self.accumulated.size * (2 if np.iscomplexobj(self.accumulated) else 1)

    def rounding(self, part: np.ndarray) -> float:
        """The error that half-precision leaves have even if the sum is right.

        Args:
          part: (k,) the root mean square of each gradient times its coefficient.
        """
        of_sum, *of_each = (_half_eps(x) for x in (self.accumulated, *self.gradients))
        return math.hypot(of_sum * np.sum(part), *(np.array(of_each) * part))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A gradient and its microbatches, for questions about the coefficients.

    Each leaf is one triangular matrix of at most k + 1 rows: |R (-c, 1)| is the root
    mean square of what the coefficients c leave unexplained, relative to the scale of
    the leaf. So a question costs nothing that depends on the number of parameters.

    Attributes:
      leaves: those that have numbers.
      triangles: one (m, k + 1) float64 for each leaf.
      allowed: (leaves,) float64, the noise of each leaf in these units.
      expected: (k,) float64, the coefficients of the weighted mean.
      norms: (k,) float64, the norm of each microbatch's gradient over all leaves.
    """

    leaves: tuple[Leaf, ...]
    triangles: tuple[np.ndarray, ...]
    allowed: np.ndarray
    expected: np.ndarray
    norms: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.array([leaf.count for leaf in self.leaves])

    @property
    def noise(self) -> float:
        return float(np.max(self.allowed))

    def unexplained(self, coefficients: np.ndarray) -> np.ndarray:
        """(leaves,) the root mean square of what is left of each leaf, in its scale."""
        vector = np.append(-coefficients, 1.0)
        return np.array([np.linalg.norm(r @ vector) for r in self.triangles])

    def misfit(self, coefficients: np.ndarray) -> np.ndarray:
        """(leaves,) the same in units of the noise: a leaf is explained up to 1."""
        usual = self.expected @ self.norms
        size = np.abs(coefficients) @ self.norms / usual if usual else 1.0
        left = self.unexplained(coefficients)
        allowed = self.allowed * size
        return np.where(left == 0, 0.0, left / np.maximum(allowed, 1e-300))

    def explains(self, coefficients: np.ndarray) -> bool:
        return bool(np.all(self.misfit(coefficients) <= 1))

    @functools.cached_property
    def stacked(self) -> np.ndarray:
        """All leaves as one triangle in which each number counts the same."""
        weights = np.sqrt(self.sizes / np.sum(self.sizes))
        parts = zip(weights, self.triangles, strict=True)
        rows = np.concatenate([w * r for w, r in parts])
        return np.asarray(np.linalg.qr(rows, mode="r"))

    @functools.cached_property
    def solution(self) -> tuple[np.ndarray, np.ndarray]:
        """The coefficients of all leaves together, as `solve` gives those of one."""
        return self._least_squares(self.stacked, self.noise)

    def residual(self, coefficients: np.ndarray) -> float:
        """The norm of what is left over that of the whole, leaves in their scales."""
        matrix = self.stacked
        mean = np.linalg.norm(matrix[:, :-1] @ self.expected)
        whole = max(np.linalg.norm(matrix[:, -1]), 1e-6 * mean)  # it may be 0
        left = np.linalg.norm(matrix @ np.append(-coefficients, 1.0))
        return float(left / whole) if whole else 0.0

    def factor(self, shape: np.ndarray) -> float:
        """The f for which f times the coefficients `shape` explain the most."""
        matrix = self.stacked
        explained = matrix[:, :-1] @ shape
        square = explained @ explained
        return float(explained @ matrix[:, -1] / square) if square else 0.0

    def solve(self, leaf: int) -> tuple[np.ndarray, np.ndarray]:
        """The coefficients by least squares, from one leaf.

        Returns:
          (k,) the coefficients, and (k,) bool, whether they are determined. The others
          are as near to the expected ones as the gradient allows.
        """
        return self._least_squares(self.triangles[leaf], self.allowed[leaf])

    def _least_squares(
        self, matrix: np.ndarray, noise: float
    ) -> tuple[np.ndarray, np.ndarray]:
        columns = matrix[:, :-1]
        lengths = np.linalg.norm(columns, axis=0)
        lengths = np.where(lengths > 0, lengths, 1.0)
        _, s, vt = np.linalg.svd(columns / lengths)
        s = np.append(s, np.zeros(len(vt) - len(s)))
        inverse = np.where(s > 1e-10, 1 / np.maximum(s, 1e-10), 0.0)
        rest = matrix[:, -1] - columns @ self.expected
        correction = vt.T @ (inverse**2 * (vt @ ((columns / lengths).T @ rest)))
        error = noise * np.linalg.norm(vt.T / np.maximum(s, 1e-14), axis=1) / lengths
        typical = np.maximum(self.expected, np.mean(self.expected))
        return self.expected + correction / lengths, error <= PRECISE * typical


def gather(
    accumulated: PyTree,
    gradients: Sequence[PyTree],
    expected: np.ndarray,
    tolerance: float,
) -> Evidence:
    """Reads the trees; those of `check_trees`, with finite numbers only."""
    want = by_path(accumulated)
    each = [by_path(tree) for tree in gradients]
    leaves = [
        Leaf(path, x, tuple(tree[path] for tree in each))
        for path, x in want.items()
        if np.size(x)
    ]
    norms = [_rms(leaf) for leaf in leaves]
    scales = np.array([n @ expected for n in norms])
    if np.any(scales):
        scales = np.maximum(scales, LEAST_SCALE * np.max(scales))
    else:  # every gradient is 0
        scales[:] = max(np.sqrt(np.mean(leaf.load()[0] ** 2)) for leaf in leaves) or 1.0
    triangles, allowed = [], []
    for leaf, norm, scale in zip(leaves, norms, scales, strict=True):
        total, columns = leaf.load()
        matrix = np.column_stack([columns, total]) / scale / math.sqrt(total.size)
        triangles.append(np.linalg.qr(matrix, mode="r"))
        allowed.append(tolerance + leaf.rounding(norm * expected) / scale)
    squares = [x.count * n**2 for x, n in zip(leaves, norms, strict=True)]
    return Evidence(
        leaves=tuple(leaves),
        triangles=tuple(triangles),
        allowed=np.array(allowed),
        expected=expected,
        norms=np.sqrt(np.sum(squares, axis=0)),
    )


def check_trees(
    name: str, tree: PyTree, others: Mapping[str, PyTree]
) -> dict[str, np.ndarray]:
    """Returns the leaves of `tree` by path; those of `others` are alike.

    Raises:
      ValueError: they are not.
    """
    want = by_path(tree)
    for other_name, other in others.items():
        got = by_path(other)
        for path in [*want, *(p for p in got if p not in want)]:
            one, its = want.get(path), got.get(path)
            if one is None or its is None or one.shape != its.shape:
                mine, theirs = (
                    "nothing to differentiate" if x is None else describe(x)
                    for x in (one, its)
                )
                raise ValueError(
                    f"{other_name}{path} is {theirs}, and {name}{path} is {mine}. They "
                    "must have the same leaves, of the same shapes."
                )
    return want


def by_path(tree: PyTree) -> dict[str, np.ndarray]:
    """The differentiable leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(differentiable(tree))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def holes(trees: Mapping[str, PyTree]) -> list[str]:
    """The leaves that hold a NaN or an infinity, each by the name of its tree."""
    return [
        name + path
        for name, tree in trees.items()
        for path, x in by_path(tree).items()
        if not np.all(np.isfinite(numbers(x)))
    ]


def numbers(x: Any) -> np.ndarray:
    """The real numbers of an array, (n,) float64.

    Raises:
      ValueError: it is spread over processes.
    """
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    ):
        raise ValueError(
            f"{describe(x)} is spread over processes, and no process can read all of "
            "it. Pass what jax.experimental.multihost_utils.process_allgather(tree, "
            "tiled=True) gives, or compare in one process."
        )
    x = np.asarray(x)
    if np.iscomplexobj(x):
        x = np.stack([x.real, x.imag])
    return x.astype(np.float64).ravel()


def is_half(x: Any) -> bool:
    return _half_eps(x) > 0


def _half_eps(x: Any) -> float:
    """The distance of 1 to the next number, 0 for a dtype of 32 bits or more."""
    if np.iscomplexobj(x) or x.dtype.itemsize > 2:
        return 0.0
    return float(jnp.finfo(x.dtype).eps)


def _rms(leaf: Leaf) -> np.ndarray:
    square = [np.mean(numbers(x) ** 2) for x in leaf.gradients]
    return np.sqrt(np.array(square))
