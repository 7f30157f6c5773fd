"""Best rational approximation on intervals by Remez exchange: float64 in, an optimum or `Failed` out; knows no gates.

The error levelled on p + q + 2 points is an eigenvalue, P and Q live in bases orthonormal on these points, so nothing
overflows or cancels although the points crowd at a jump or a kink, which by convention lies at x = 0.

References:
    Filip, Nakatsukasa, Trefethen, Beckermann, "Rational minimax approximation via adaptive barycentric
    representations", SIAM J. Sci. Comput. 40 (2018) A2427, doi 10.1137/17M1132409: the levelled error as an eigenvalue.
    Brubeck, Nakatsukasa, Trefethen, "Vandermonde with Arnoldi", SIAM Rev. 63 (2021) 405, doi 10.1137/19M130100X.
    Akhiezer, Elements of the Theory of Elliptic Functions (1990): Zolotarev's best approximation of sign(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.special import ellipj, ellipk

Array = NDArray[np.float64]
Interval = tuple[float, float]


class Failed(Exception):
    """The exchange did not end at an alternation; the message says how."""


@dataclass(frozen=True)
class Problem:
    """min max |weight (f - P/Q)| over intervals of x; the feature lies at x = 0."""

    f: Callable[[Array], Array]
    intervals: tuple[Interval, ...]
    p: int
    q: int
    weight: Callable[[Array], Array] = np.ones_like

    @property
    def hull(self) -> Interval:
        return self.intervals[0][0], self.intervals[-1][1]

    @property
    def gap(self) -> float:
        """Distance of the domain from x = 0."""
        return max(0.0, min(max(low, -high) for low, high in self.intervals))

    def widened(self, gap: float) -> Problem:
        """The same problem without |x| < gap."""
        left = [(low, min(high, -gap)) for low, high in self.intervals]
        right = [(max(low, gap), high) for low, high in self.intervals]
        return replace(self, intervals=tuple((low, high) for low, high in left + right if low < high))


@dataclass(frozen=True)
class Levelled:
    """P and Q in bases orthonormal on a reference (Vandermonde with Arnoldi), with error (-1)^i E / weight there."""

    reference: Array
    error: float
    num: Array
    den: Array
    hessenberg: Array
    norm: float
    max_error: float = np.inf
    iterations: int = 0

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """P(x), Q(x) up to a common factor."""
        basis = np.empty((self.hessenberg.shape[1] + 1, len(x)))
        basis[0] = 1.0 / self.norm
        for k in range(len(basis) - 1):
            h = self.hessenberg[: k + 2, k]
            basis[k + 1] = (x * basis[k] - h[:-1] @ basis[: k + 1]) / h[-1]
        return self.num @ basis[: len(self.num)], self.den @ basis[: len(self.den)]


def _level(problem: Problem, x: Array) -> Levelled:
    """Solve f - P/Q = (-1)^i E / weight on the p + q + 2 points x for E, P and Q > 0.

    P is orthogonal to all polynomials of degree <= q under w_i = 1 / prod_k (x_i - x_k), whose signs alternate, so E
    and Q are an eigenpair of the symmetric pencil V' diag((-1)^i f) V, V' diag(1/weight) V, with V an orthonormal basis
    of sqrt|w| times the polynomials of degree <= q (Filip et al. 2018). One eigenvector at most has Q of one sign.
    """
    p, q, f, signs = problem.p, problem.q, problem.f(x), (-1.0) ** np.arange(len(x))
    distance = np.abs(x[:, None] - x)
    np.fill_diagonal(distance, 1.0)
    log_w = -np.log(distance).sum(axis=1)
    root_w = np.exp((log_w - log_w.max()) / 2)
    n = max(p, q)
    V, H, norm = np.empty((len(x), n + 1)), np.zeros((n + 1, n)), float(np.linalg.norm(root_w))
    V[:, 0] = root_w / norm
    for k in range(n):
        v = x * V[:, k]
        for _ in range(2):  # once is not enough to be orthogonal when points crowd at a jump
            h = V[:, : k + 1].T @ v
            H[: k + 1, k] += h
            v = v - V[:, : k + 1] @ h
        H[k + 1, k] = np.linalg.norm(v)
        V[:, k + 1] = v / H[k + 1, k]
    V_q, size = V[:, : q + 1], 1.0 / problem.weight(x)
    try:
        errors, vectors = scipy.linalg.eigh((V_q.T * (signs * f)) @ V_q, (V_q.T * size) @ V_q)
    except (np.linalg.LinAlgError, ValueError) as reason:
        raise Failed(f"the eigenproblem of the levelled error failed ({reason})") from None
    one_signed = np.flatnonzero(np.abs(np.sign(V_q @ vectors).sum(axis=0)) == len(x))
    if not len(one_signed):
        raise Failed("no denominator of one sign on the reference")
    best = one_signed[np.argmin(np.abs(errors[one_signed]))]
    den = vectors[:, best] * np.sign(V_q[0] @ vectors[:, best])
    num = V[:, : p + 1].T @ ((f - errors[best] * signs * size) * (V_q @ den))
    return Levelled(x, abs(float(errors[best])), num, den, H, norm)


def _exchange(problem: Problem, reference: Array, max_steps: int = 40) -> Levelled:
    """Remez' multiple exchange from a reference to the optimum; Failed if it does not get there."""
    n, best = problem.p + problem.q + 2, None
    for step in range(max_steps):
        level = _level(problem, reference)

        def error(x: Array, level: Levelled = level) -> Array:
            P, Q = level(x)
            return problem.weight(x) * (problem.f(x) - P / Q)

        x, e = extrema(error, clustered(problem.intervals, reference), problem.intervals)
        level = replace(level, max_error=float(np.abs(e).max()), iterations=step + 1)
        if level.max_error <= 4 * np.finfo(np.float64).eps * np.abs(problem.f(x)).max():
            best = level  # f is itself such a rational
            break
        if len(x) < n or not np.isfinite(e).all():
            raise Failed(f"{len(x)} alternations of the error where {n} are needed")
        if best is None or level.max_error < best.max_error:
            best = level
        if level.max_error - level.error < 1e-9 * level.max_error or step > best.iterations + 4:
            break
        reference = _trimmed(x, e, n)
    assert best is not None
    if best.max_error - best.error > 1e-7 * best.max_error + 1e-14 * np.abs(problem.f(best.reference)).max():
        raise Failed(
            f"the exchange stalled with max error / levelled error - 1 = {best.max_error / best.error - 1:.1e}"
        )
    low, high = problem.hull
    if best(clustered([(low, high)], best.reference))[1].min() <= 0:
        raise Failed("the denominator has a zero between the ends of the domain")
    return best


def clustered(intervals: Sequence[Interval], around: Array, per_piece: int = 20) -> Array:
    """Points of the intervals, dense where `around` is dense, and log-spaced towards x = 0."""
    low, high = intervals[0][0], intervals[-1][1]
    steps = (high - low) * np.geomspace(1e-14, 1.0, 150)
    theta = (1 - np.cos(np.pi * np.arange(per_piece) / per_piece)) / 2
    pieces = []
    for a, b in intervals:
        knots = np.concatenate([[a], around[(around > a) & (around < b)], [b]])
        between = knots[:-1, None] + np.diff(knots)[:, None] * theta
        pieces.append(apart(np.concatenate([between.ravel(), -steps, steps, [0.0]]), (a, b), np.zeros(1)))
    return np.concatenate(pieces)


def apart(x: Array, interval: Interval, corners: Array) -> Array:
    """The points in an interval, ascending, with its ends, without those much nearer to the last than to all corners.

    Of points that nearly coincide rounding decides which has the largest error, and they are no bracket of an extremum.
    """
    x = np.unique(x[(interval[0] < x) & (x < interval[1])])
    nearest = np.abs(x[:, None] - corners).min(axis=1)
    x = x[np.diff(x, prepend=interval[0]) > 1e-6 * nearest]
    return np.concatenate(
        [[interval[0]], x[interval[1] - x > 1e-6 * np.abs(corners - interval[1]).min()], [interval[1]]]
    )


def inside(intervals: Sequence[Interval], x: Array) -> NDArray[np.bool_]:
    """Which x lie in one of the intervals."""
    return np.any([(low <= x) & (x <= high) for low, high in intervals], axis=0)


def extrema(error: Callable[[Array], Array], x: Array, intervals: Sequence[Interval]) -> tuple[Array, Array]:
    """The largest |error| of each run of one sign, refined by zooming in (which a kink does not disturb)."""
    e = error(x)
    signs = np.where(e < 0, -1.0, 1.0)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(signs)) + 1])
    peaks = np.array([a + np.argmax(np.abs(part)) for a, part in zip(starts, np.split(e, starts[1:]), strict=True)])
    sign, here = signs[peaks], x[peaks]
    middles = [(left[1] + right[0]) / 2 for left, right in pairwise(intervals)]
    bounds = np.array(intervals)[np.searchsorted(middles, here)].T
    left = np.clip(x[np.maximum(peaks - 1, 0)], *bounds)
    right = np.clip(x[np.minimum(peaks + 1, len(x) - 1)], *bounds)
    rows, fractions = np.arange(len(peaks)), np.linspace(0, 1, 17)
    value = np.abs(e[peaks])
    for _ in range(4):
        between = np.minimum(left[:, None] + (right - left)[:, None] * fractions, right[:, None])
        probes = np.column_stack([between, here])
        values = error(probes.ravel()).reshape(probes.shape) * sign[:, None]
        top = values.argmax(axis=1)
        here, value, step = probes[rows, top], values[rows, top], (right - left) / 16
        left, right = np.maximum(left, here - step), np.minimum(right, here + step)
    return here, sign * value


def _trimmed(x: Array, e: Array, n: int) -> Array:
    """n alternating extrema: drop the smaller end, or the smallest neighbouring pair, until n are left."""
    x, a = x.copy(), np.abs(e)
    while len(x) > n:
        pairs = np.maximum(a[:-1], a[1:])
        if len(x) == n + 1 or min(a[0], a[-1]) <= pairs.min():
            drop = [0 if a[0] < a[-1] else len(x) - 1]
        else:
            drop = [int(np.argmin(pairs)), int(np.argmin(pairs)) + 1]
        x, a = np.delete(x, drop), np.delete(a, drop)
    return x


def solve(problem: Problem) -> Levelled:
    """The optimum: from Zolotarev's points, else by shrinking a wider gap, else by growing the degree."""
    reasons: list[str] = []
    for route in (_from_zolotarev, _from_wider_gap, _from_lower_degree):
        try:
            # A step that goes astray may divide by 0: its error is not finite, and refused
            with np.errstate(all="ignore"):
                return route(problem)
        except Failed as reason:
            reasons.append(str(reason))
    raise Failed("; ".join(reasons))


def _from_zolotarev(problem: Problem) -> Levelled:
    """Exchange from the first of `_starts` that leads to the optimum."""
    reasons: list[str] = []
    for start in _starts(problem):
        try:
            return _exchange(problem, start)
        except Failed as reason:
            reasons.append(str(reason))
    raise Failed(
        max(set(reasons), key=reasons.count) if reasons else "no reference of p + q + 2 points fits the domain"
    )


def _starts(problem: Problem) -> Iterator[Array]:
    """References of p + q + 2 points, spread as Zolotarev's extrema, for several gaps and numbers left of 0."""
    low, high = problem.hull
    n, length, gap = problem.p + problem.q + 2, high - low, problem.gap
    if gap > 0:
        gaps = [gap, np.sqrt(gap * length / 8), length / 8]
    else:  # about the error of the best approximation of |x|, or of sqrt(x), which is |x| in the square root of x
        scale = length * np.exp(-2.2 * np.sqrt(problem.q)) ** (1 if low < 0 < high else 2)
        gaps = [scale * 8.0**k for k in (0, 1, -1, 2, -2, 3, -3)]
    for zolotarev_gap in gaps:
        left, right = _zolotarev(problem, max(zolotarev_gap, 1e-7 * length))  # below, his modulus is lost in rounding
        two_sided = len(left) > 0 and len(right) > 0
        for shift in (0, 1, -1, 2, -2, 3, -3) if two_sided else (0,):
            n_left = (n + 1) // 2 - shift if two_sided else n * (len(left) > 0)
            if not 0 <= n_left <= n:
                continue
            sides = ((left, n_left), (right, n - n_left))
            chosen = [side[np.linspace(0, len(side) - 1, k).round().astype(int)] for side, k in sides if k]
            reference = np.unique(np.concatenate(chosen))
            if len(reference) == n:
                yield reference


def _zolotarev(problem: Problem, gap: float, dense: int = 2000) -> tuple[Array, Array]:
    """Points of the domain left and right of 0, spread as Zolotarev's extrema dn(j K'/n) for a gap.

    A Moebius map takes his [-1, -l] u [l, 1] to [low, -gap] u [gap, high]; l follows from the four ends' cross-ratio.
    """
    low, high = problem.hull
    a, d = (low if low < 0 else -high), (high if high > 0 else -low)
    b, c = max(-gap, a / 2), min(gap, d / 2)
    ratio = 2 * (c - a) * (d - b) / ((d - a) * (c - b)) - 1
    l = 1 / (ratio + np.sqrt(ratio**2 - 1))
    m1 = (1 - l) * (1 + l)
    z = ellipj(np.linspace(0, 1, dense) * ellipk(m1), m1)[2]  # from 1 down to l
    z = np.concatenate([-z, z[::-1]])
    k, h = (z + 1) * 2 * l * (c - a), (z + l) * (l + 1) * (c - b)
    x = (a * h - b * k) / (h - k)
    x = np.concatenate([np.clip(x[:dense], a, b), np.clip(x[dense:], c, d)])
    x = np.unique(x[inside(problem.intervals, x)])
    return x[x < 0], x[x > 0]


def _from_wider_gap(problem: Problem) -> Levelled:
    """Solve with a wider gap around 0, which is easier, and shrink it, the reference moving along in log-distance."""
    gap, (low, high) = problem.gap, problem.hull
    if gap == 0:
        raise Failed("there is no gap to widen")
    level, wide = None, 0.0
    for wide in np.geomspace(0.7 * (min(-low, high) if low < 0 < high else max(-low, high)), gap, 6)[:-1]:
        if wide > gap:
            try:
                level = _from_zolotarev(problem.widened(wide))
                break
            except Failed:
                continue
    if level is None:
        raise Failed("no start converged with a wider gap either")
    ratio = np.sqrt(gap / wide)
    while wide > gap:
        narrower = max(gap, wide * ratio) if wide * ratio > 1.001 * gap else gap
        try:
            level = _exchange(problem.widened(narrower), _moved(level.reference, wide, narrower, problem.hull))
            wide, ratio = narrower, ratio**1.5
        except Failed:
            ratio = np.sqrt(ratio)
            if ratio > 0.97:
                raise Failed(f"the optimum of gap {wide:.3g} could not be followed to gap {gap:.3g}") from None
    return level


def _moved(x: Array, gap: float, new_gap: float, hull: Interval) -> Array:
    """Points of |x| >= gap taken to |x| >= new_gap, the hull's ends staying where they are, linearly in log |x|."""
    far = np.where(x < 0, -hull[0], hull[1])
    share = np.log(np.abs(x) / far) / np.log(gap / far)
    return np.clip(np.sign(x) * far * (new_gap / far) ** share, *hull)


def _from_lower_degree(problem: Problem) -> Levelled:
    """Grow p or q by one from the optimum of the lower degree, with one point more wherever that leads on."""
    low, high = problem.hull
    for p, q in ((problem.p - 1, problem.q), (problem.p, problem.q - 1)):
        if p < 0 or q < 0:
            continue
        try:
            x = _from_zolotarev(replace(problem, p=p, q=q)).reference
        except Failed:
            continue
        knots = np.concatenate([[low], x, [high]])
        new = np.concatenate([knots[:-1] + share * np.diff(knots) for share in (0.5, 0.1, 0.9, 0.002, 0.998)])
        near_ends = (high - low) * np.geomspace(1e-9, 1e-3, 13)  # for a pole just beyond an end
        new = np.concatenate([new, low + near_ends, high - near_ends])
        for point in np.setdiff1d(new[inside(problem.intervals, new)], x):
            try:
                return _exchange(problem, np.sort(np.append(x, point)))
            except Failed:
                continue
    raise Failed("the optimum of no lower degree could be extended")
