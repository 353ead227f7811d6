"""The largest size whose memory is within a limit, from few compiles."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from .peak import Peak

TOLERANCE = 1.05  # between the size that is found and the largest
LOWER = 0.98  # aimed at, so that a step in the memory does not spoil the last compile
FARTHEST = 16  # times the largest compiled size
PADDED = 8  # rows: a TPU takes as much memory for one as for eight


@dataclasses.dataclass(frozen=True)
class Curve:
    """Memory as a function of the size, from what was compiled.

    Between two compiled sizes it is the line through both, beyond them the line through
    the two that are next.

    Attributes:
      limit: bytes.
      points: what was compiled, sorted by size.
      refused: sizes that the compiler refused because they are too large.
    """

    limit: int
    points: tuple[Peak, ...] = ()
    refused: tuple[int, ...] = ()

    def add(self, peak: Peak) -> "Curve":
        if peak.total is None:
            return dataclasses.replace(self, refused=(*self.refused, peak.size))
        points = tuple(sorted((*self.points, peak)))
        return dataclasses.replace(self, points=points)

    @property
    def fits(self) -> int:
        """The largest size that was compiled and fits, or 0."""
        within = [p.size for p in self.points if _total(p) <= self.limit]
        return max(within, default=0)

    @property
    def too_large(self) -> float:
        """The smallest size that was compiled and does not fit, or infinity."""
        above = [p.size for p in self.points if _total(p) > self.limit]
        return min([*above, *self.refused], default=math.inf)

    def predict(self, size: float) -> float:
        """Bytes. Of one point: as if all but arguments and results were linear."""
        sizes = [p.size for p in self.points]
        if len(sizes) == 1:
            (only,) = self.points
            return only.fixed + (_total(only) - only.fixed) * size / only.size
        right = min(max(bisect.bisect_left(sizes, size), 1), len(sizes) - 1)
        a, b = self.points[right - 1 : right + 1]
        return _total(b) + _slope(a, b) * (size - b.size)

    @property
    def bounds(self) -> tuple[float, float]:
        """Two sizes above which nothing fits, at least `fits`; or infinity.

        Memory is the maximum over the moments of a program, each of them close to
        linear: it bends upwards. So it is above the line through two sizes that fit, to
        their right, and above that through two that do not, to their left. The second
        does not hold where an algorithm begins that needs more memory.
        """
        within = [p for p in self.points if _total(p) <= self.limit][-2:]
        above = [p for p in self.points if _total(p) > self.limit][:2]

        def crossing(pair: list[Peak]) -> float:
            if len(pair) < 2 or (slope := _slope(*pair)) <= 0:
                return math.inf
            a, _ = pair
            return max(a.size + (self.limit - _total(a)) / slope, self.fits)

        return crossing(within), crossing(above)

    @property
    def crossing(self) -> float:
        """The size whose predicted memory is the limit; infinity if all fit."""
        if self.too_large == math.inf:
            return math.inf
        if not self.fits or self.too_large in self.refused:
            return self.fits
        sizes = [p.size for p in self.points]
        at = sizes.index(self.fits)
        a, b = self.points[at : at + 2]
        return a.size + (self.limit - _total(a)) / _slope(a, b)

    def largest(self, most: int) -> int:
        """The largest size up to `most` that fits, compiled or predicted."""
        sizes = range(1, int(min(most, self.too_large - 1)) + 1)
        return max(self.fits, bisect.bisect_right(sizes, self.limit, key=self.predict))


def _slope(a: Peak, b: Peak) -> float:
    return (_total(b) - _total(a)) / (b.size - a.size)


def search(
    measure: Callable[[int], Peak],
    candidates: Sequence[int],
    limit_of: Callable[[Peak], int],
) -> Iterator[Curve]:
    """Measures one candidate after another; the last curve's `fits` is the answer.

    The first is the one in the middle of the candidates' logarithms. The second is
    where the first one's temporary memory would fill the limit if it had no constant
    part, but twice or half the first at least. From then on a line through two
    compiled sizes says which one to compile, until a size fits, and no candidate that
    is 5 % larger is below the bound. Where no line tells, and after five compiles every
    other time, it is the middle of the logarithms of what is left.

    Args:
      measure: from a size to its memory.
      candidates: sizes, increasing. `fits` is 0 if not even the first one fits.
      limit_of: from the first measurement to the limit in bytes.
    """
    middle = _nearest(candidates, math.sqrt(candidates[0] * candidates[-1]))
    peak = measure(middle)
    curve = Curve(limit_of(peak)).add(peak)
    yield curve
    while (size := _next(curve, candidates)) is not None:
        curve = curve.add(measure(size))
        yield curve


def _next(curve: Curve, candidates: Sequence[int]) -> int | None:
    """The candidate to compile; None once the answer is known."""
    fits, (sure, likely) = curve.fits, curve.bounds
    begin = bisect.bisect_right(candidates, fits)
    end = bisect.bisect_left(candidates, curve.too_large)
    left = candidates[begin:end]
    larger = left[bisect.bisect_left(left, TOLERANCE * fits) :]
    if not left or (fits and not larger):
        return None
    if not curve.points:
        return left[0]  # all were refused
    compiled = len(curve.points) + len(curve.refused)
    if compiled == 1:  # far enough from the first for a line
        return _nearest(left, _second(curve, left))
    # A few compiles are not trusted far, least where a line was drawn far. An MLP on a
    # GPU takes 15.2 MB for 512 rows and 12.6 MB for 768. And among sizes that are
    # padded to one, no line tells which is the largest.
    far = larger[0] > 1.2 * fits
    trust = 1.5 if far and compiled < 4 else 1.25 if compiled == 2 else 1
    if fits >= PADDED and larger[0] > trust * sure:
        return None
    # Far beyond what was compiled, a line says little.
    upper = min(curve.too_large, left[-1] + 1, FARTHEST * curve.points[-1].size)
    if compiled > 4 and compiled % 2:
        return _nearest(left, math.sqrt(max(fits, 1) * upper))
    if fits and larger[0] > likely:
        return larger[0]  # to see that it does not fit
    if min(sure, likely) < upper:
        aim = min(sure, likely)
    elif compiled == 2 and fits < curve.crossing < math.inf:
        aim = curve.crossing
    elif curve.too_large == math.inf:
        aim = upper
    else:
        aim = math.sqrt(max(curve.crossing, 1) * upper)
    at = bisect.bisect_right(left, aim)
    if not at:
        return left[0]  # nothing is predicted to fit: the answer is that of this one
    near = left[bisect.bisect_left(left, math.floor(LOWER * left[at - 1]) + 1) : at]
    return max((n for n in near if n % PADDED == 0), default=near[0])


def _second(curve: Curve, left: Sequence[int]) -> float:
    """The second size to compile, at least twice or half the first."""
    first = curve.points[0].size
    at = bisect.bisect_right(left, curve.limit, key=curve.predict)
    best = left[max(at - 1, 0)]
    return max(best, 2 * first) if curve.fits else min(best, first / 2)


def _nearest(candidates: Sequence[int], size: float) -> int:
    """The candidate with the smallest ratio to `size`."""
    at = bisect.bisect_left(candidates, size)
    near = candidates[max(at - 1, 0) : at + 1]
    return min(near, key=lambda c: max(c / size, size / c) if size else c)


def _total(peak: Peak) -> int:
    assert peak.total is not None  # those without are in `refused`
    return peak.total


def divisors(number: int) -> list[int]:
    """All of them, increasing.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
