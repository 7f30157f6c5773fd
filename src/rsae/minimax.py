"""Best rational approximation of a gate in the maximum norm: float64 numpy and scipy, and nothing of SAEs.

A fit is r(t) = P(u) / (1 + |A(u)|), u = (t - centre) / scale, with A >= 0 wherever the gate is approximated, so that
the "safe" denominator with its absolute value is the optimum's own denominator, and r has no poles anywhere.

The optimum comes from `rsae.remez`; here are the gates, their symmetries, the safe form and the proof of optimality.

References:
    Filip, Nakatsukasa, Trefethen, Beckermann, "Rational minimax approximation via adaptive barycentric
    representations", SIAM J. Sci. Comput. 40 (2018) A2427, doi 10.1137/17M1132409.
    Trefethen, Approximation Theory and Approximation Practice (2013), chapter 24: alternation and defect, de la Vallée
    Poussin's bound.
    Chen, Chen, Lai, Zhang, Lu, "Rational Neural Networks for Approximating Jump Discontinuities of Graph Convolution
    Operator", ICDM 2018, arXiv 1808.10073: the "relaxed Remez" initialisation.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.polynomial import polynomial as poly
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular

from rsae.remez import Array, Failed, Interval, Problem, apart, clustered, extrema, inside, solve

Gate = str | Callable[[Array], Array]

GATES = ("relu", "jumprelu", "heaviside", "sign", "abs")
METHODS = ("minimax", "relaxed-remez")
_JUMPS = ("jumprelu", "heaviside", "sign")


class NumericalWarning(UserWarning):
    """A fit is not the proven optimum; the message names what failed and what came back instead."""


@dataclass(frozen=True, kw_only=True)
class RationalFit:
    """A rational r(t) = P(u) / (1 + |A(u)|), u = (t - centre) / scale, and how well it follows its gate."""

    gate: str
    """Name of the gate; of a callable, its __name__."""
    degree: tuple[int, int]
    """(p, q): the degrees of P and of A."""
    theta: float | None
    """Where the gate jumps; None for a gate without a threshold."""
    delta: float | None
    """Half-width of the gap left out around theta."""
    domain: tuple[Interval, ...]
    """Disjoint intervals, ascending, on which the error is measured."""
    num_coeffs: tuple[float, ...]
    """p + 1 coefficients of P, ascending powers of u."""
    den_coeffs: tuple[float, ...]
    """q coefficients of A, ascending powers of u from u^1 on; Q = 1 + |A| has the leading 1."""
    centre: float
    """Where u is 0: the minimum of the denominator on the domain's hull (relaxed-remez: the middle of it)."""
    scale: float
    """Unit of u; positive."""
    max_error: float
    """max |gate - r| on the domain, of this very form in float64, each extremum refined."""
    mse: float
    """Mean of (gate - r)^2 over a uniform grid of the domain's hull, points in gaps left out."""
    alternation: int
    """Number of alternating error extrema that reach max_error, to 1e-6 (q > 12: 1e-4) and rounding."""
    iterations: int
    """Exchange steps (minimax) or gradient steps (relaxed-remez) of the run that gave this fit."""
    converged: bool
    """minimax: the alternation proves the optimum. relaxed-remez: the loss has settled."""
    method: str
    """"minimax" or "relaxed-remez"."""
    notes: tuple[str, ...] = ()
    """What failed on the way, if anything; empty for a clean fit."""

    def __call__(self, t: ArrayLike) -> Array:
        """r(t) in float64, by Horner's rule; same shape as t."""
        u = (np.asarray(t, dtype=np.float64) - self.centre) / self.scale
        return _horner(self.num_coeffs, u) / (1.0 + np.abs(u * _horner(self.den_coeffs, u)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, for fit.json."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RationalFit:
        """The inverse of `to_dict`; ValueError for unknown or missing keys, or as many coefficients as fit no degree."""
        known = {field.name for field in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted(known - set(values) - {"notes"})
        if unknown or missing:
            raise ValueError(f"a rational fit has the keys {sorted(known)}; unknown: {unknown}, missing: {missing}")
        fit = cls(**{key: _frozen(value) for key, value in values.items()})
        if (len(fit.num_coeffs), len(fit.den_coeffs)) != (fit.degree[0] + 1, fit.degree[1]):
            raise ValueError(
                f"degree {fit.degree} needs {fit.degree[0] + 1} num_coeffs and {fit.degree[1]} den_coeffs, "
                f"got {len(fit.num_coeffs)} and {len(fit.den_coeffs)}"
            )
        return fit


def fit_gate(
    gate: Gate,
    degree: tuple[int, int],
    *,
    theta: float | None = None,
    delta: float | None = None,
    domain: Sequence[Interval] | None = None,
    method: Literal["minimax", "relaxed-remez"] = "minimax",
    grid: int = 4001,
    seed: int = 0,
) -> RationalFit:
    """The rational of type (p, q) that is closest to a gate in the maximum norm.

        min over P, Q of max |gate(t) - P(t)/Q(t)|,  t in the domain,  deg P <= p, deg Q <= q, Q > 0 on its hull

    Args:
        gate: "relu" and "abs" on [-1, 1]; "jumprelu" t H(t - theta), "heaviside" H(t - theta) and "sign" (theta 0
            unless given) on [-1, theta - delta] and [theta + delta, 1]; or a callable of a float64 array, with its `domain`.
        degree: (p, q), p >= 1, q >= 0.
        theta, delta: the threshold and the half-width of the gap left out around it, for gates that jump.
        domain: ascending disjoint intervals (low, high), for a callable only.
        method: "minimax" finds the optimum; "relaxed-remez" is the published initialisation (Chen et al. 2018), which
            exchanges no points and lands above the optimum: 1.3x for a ReLU of (3, 2), 90x for a JumpReLU of (9, 8).
        grid: number of uniform points on which `mse` is taken.
        seed: of the random start of "relaxed-remez".

    Returns:
        RationalFit. With "minimax" its alternation proves it optimal (de la Vallée Poussin: no rational of this type
        has a smaller error than the least of p + q + 2 - defect alternating ones, defect = min(p - deg P, q - deg Q));
        else `converged` is False, a NumericalWarning says why, and the fit is the best that was found.

    Raises:
        ValueError: unknown gate or method, degree not integers or out of range, a threshold or domain that leaves an
            empty interval, a grid under 2 points, a callable that gives nan, inf or another shape.

    Example:
        >>> round(fit_gate("relu", (3, 2)).max_error, 8)
        0.02184451
    """
    p, q = _check_degree(degree)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not _is_integer(grid) or grid < 2:
        raise ValueError(f"grid must be an integer >= 2 (points on which mse is taken); got {grid!r}: 4001 is usual")
    target = _target(gate, theta, delta, domain)
    with np.errstate(all="ignore"):
        draft = _minimax(target, p, q) if method == "minimax" else _relaxed_remez(target, p, q, seed)
        fit = _measured(target, draft, (p, q), method, grid)
    if not fit.converged:
        warnings.warn(
            f"{method} fit of {fit.gate}, degree ({p}, {q}): {'; '.join(fit.notes)}", NumericalWarning, stacklevel=2
        )
    return fit


# ----------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class _Target:
    """A gate on its domain, with the point where it is hardest (jump, kink), to which all inner coordinates refer."""

    name: str
    f: Callable[[Array], Array]
    domain: tuple[Interval, ...]
    feature: float
    theta: float | None = None
    delta: float | None = None


def _target(gate: Gate, theta: float | None, delta: float | None, domain: Sequence[Interval] | None) -> _Target:
    """Check the arguments that belong to the gate, and put them together."""
    if callable(gate):
        return _callable_target(gate, theta, delta, domain)
    if gate not in GATES:
        raise ValueError(f"unknown gate {gate!r}: use one of {', '.join(GATES)}, or a callable with its domain")
    if domain is not None:
        raise ValueError(f"the domain of {gate!r} follows from theta and delta: leave out domain={domain!r}")
    if gate not in _JUMPS:
        if theta is not None or delta is not None:
            raise ValueError(f"{gate!r} has no threshold: leave out theta and delta, or use 'jumprelu'")
        f = np.abs if gate == "abs" else (lambda t: np.maximum(t, 0.0))
        return _Target(gate, f, ((-1.0, 1.0),), 0.0)
    theta = 0.0 if theta is None and gate == "sign" else theta
    if not isinstance(theta, Real) or not -1 < theta < 1:
        raise ValueError(
            f"{gate!r} needs a threshold -1 < theta < 1; got theta={theta!r}: scale the gate's input first"
        )
    if not isinstance(delta, Real) or not 0 < delta < 1 - abs(theta):
        raise ValueError(
            f"{gate!r} needs a gap 0 < delta < 1 - |theta| = {1 - abs(theta):.6g}, which leaves both [-1, theta - delta] "
            f"and [theta + delta, 1]; got delta={delta!r}"
        )
    theta, delta = float(theta), float(delta)
    if not theta - delta < theta < theta + delta:
        raise ValueError(f"delta={delta!r} is lost in rounding beside theta={theta!r}: use a wider gap")
    f = {
        "jumprelu": lambda t: np.where(t > theta, t, 0.0),
        "heaviside": lambda t: np.where(t > theta, 1.0, 0.0),
        "sign": lambda t: np.where(t > theta, 1.0, -1.0),
    }[gate]
    return _Target(gate, f, ((-1.0, theta - delta), (theta + delta, 1.0)), theta, theta, delta)


def _callable_target(
    gate: Callable[[Array], Array], theta: float | None, delta: float | None, domain: Sequence[Interval] | None
) -> _Target:
    """A user's function; its feature is the middle of its widest gap, or else where it bends most."""
    if theta is not None or delta is not None:
        raise ValueError("a callable gate takes its gap from domain: leave out theta and delta")
    if domain is None:
        raise ValueError("a callable gate needs its domain, such as domain=[(-1.0, 1.0)]")
    try:
        intervals = tuple((float(low), float(high)) for low, high in domain)
    except (TypeError, ValueError):
        raise ValueError(f"domain must be a list of intervals (low, high); got {domain!r}") from None
    edges = np.array(intervals).ravel()
    if not len(edges) or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ValueError(f"domain must be finite intervals, low < high, ascending and disjoint; got {domain!r}")
    t = np.concatenate([np.linspace(low, high, 1001) for low, high in intervals])
    values = np.asarray(gate(t), dtype=np.float64)
    if values.shape != t.shape or not np.isfinite(values).all():
        raise ValueError(
            f"the gate must give one finite value for each of {t.shape} inputs; got shape {values.shape} with "
            f"{np.count_nonzero(~np.isfinite(values))} nan or inf: mend the function or narrow the domain"
        )
    if len(intervals) > 1:
        widest = int(np.argmax(edges[2::2] - edges[1:-1:2]))
        feature = (edges[1 + 2 * widest] + edges[2 + 2 * widest]) / 2
    else:
        bend = np.abs(np.diff(values, 2))
        feature = t[1 + np.argmax(bend)] if bend.max() > 20 * np.median(bend) else (edges[0] + edges[-1]) / 2
    name = getattr(gate, "__name__", type(gate).__name__)
    return _Target(name, lambda t: np.asarray(gate(t), dtype=np.float64), intervals, float(feature))


def _check_degree(degree: tuple[int, int]) -> tuple[int, int]:
    """(p, q) as ints."""
    if not (isinstance(degree, Sequence) and len(degree) == 2 and all(map(_is_integer, degree))):
        raise ValueError(f"degree must be two integers (p, q); got {degree!r}")
    p, q = map(operator.index, degree)
    if p < 1 or q < 0:
        raise ValueError(
            f"degree (p, q) needs p >= 1 and q >= 0; got {degree!r}: (q + 1, q) follows a gate's slope at both ends"
        )
    return p, q


# ----------------------------------------------------------------------------------- from the optimum to the safe form


@dataclass(frozen=True)
class _Draft:
    """Coefficients of a fit that is yet to be measured."""

    num: Array
    den: Array
    centre: float
    scale: float
    actual: tuple[int, int]
    """Degrees that the optimum really has, which may be lower than what was allowed."""
    iterations: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Symmetry:
    """f = constant + slope x + s(x), s even or odd: so is its optimum, which solves a problem of half the degree in x^2.

    In x itself such a problem is often degenerate: its optimum has lower degrees and more alternations than are needed.
    """

    odd: bool
    constant: float = 0.0
    slope: float = 0.0


def _symmetry(problem: Problem) -> _Symmetry | None:
    """The symmetry of a target about x = 0, if it has one and type (p, q) is closed under adding what is taken off."""
    ends = np.ravel(problem.intervals)
    if not np.allclose(ends, -ends[::-1], rtol=1e-14, atol=0):
        return None
    x = np.concatenate([np.linspace(max(low, 0), high, 203)[1:] for low, high in problem.intervals if high > 0])
    right, left = problem.f(x), problem.f(-x)
    even, odd = (right + left) / 2, (right - left) / 2
    tolerance = 1e-14 * np.abs([right, left]).max()
    slope = odd[-1] / x[-1] if np.abs(odd).max() > tolerance else 0.0
    if np.abs(odd - slope * x).max() <= tolerance and (slope == 0 or problem.p > problem.q):
        return _Symmetry(odd=False, slope=slope)
    constant = even[0] if np.abs(even).max() > tolerance else 0.0
    if np.abs(even - constant).max() <= tolerance and (constant == 0 or problem.p >= problem.q):
        return _Symmetry(odd=True, constant=constant)
    return None


def _minimax(target: _Target, p: int, q: int) -> _Draft:
    """The optimum of type (p, q); if it cannot be found, the optimum of a lower type that can, with notes."""
    intervals = tuple((low - target.feature, high - target.feature) for low, high in target.domain)
    problem = Problem(lambda x: target.f(x + target.feature), intervals, p, q)
    lower = [(1, 1), (0, 1), (1, 0), *((k, k) for k in range(2, q)), (0, q)]
    notes: tuple[str, ...] = ()
    if polynomial := _polynomial(target, p, q, exact=True):
        return polynomial
    for a, b in [(p, q), *((p - i, q - j) for i, j in lower if p - i >= 1 and q - j >= 0)]:
        try:
            draft = _optimum(replace(problem, p=a, q=b), target.feature)
        except Failed as reason:
            notes = notes or (f"no optimum of type ({p}, {q}) was found ({reason})",)
            continue
        for end in (target.domain[0][0], target.domain[-1][1]):
            if abs(draft.centre - end) < 1e-15 * (target.domain[-1][1] - target.domain[0][0]):
                draft = replace(draft, centre=end)  # a rounding beside it, A would be negative at the end
        if notes:
            notes += (f"the optimum of type ({a}, {b}) stands in for it",)
            draft = replace(draft, num=_padded(draft.num, p + 1), den=_padded(draft.den, q), notes=notes)
        return draft
    draft = _polynomial(target, p, q, exact=False)
    assert draft is not None
    return replace(draft, notes=(*notes, f"a least-squares polynomial of degree {draft.actual[0]} stands in for it"))


def _polynomial(target: _Target, p: int, q: int, *, exact: bool) -> _Draft | None:
    """A polynomial of low degree by least squares: the last resort, which cannot fail; `exact`: only if the gate is one."""
    low, high = target.domain[0][0], target.domain[-1][1]
    centre, scale, degree = (low + high) / 2, (high - low) / 2, min(p, 8)
    t = np.concatenate([np.linspace(a, b, 1001) for a, b in target.domain])
    u, f = (t - centre) / scale, target.f(t)
    num = np.asarray(poly.polyfit(u, f, degree), dtype=np.float64)
    if exact and np.abs(f - _horner(num, u)).max() > 16 * np.finfo(np.float64).eps * np.abs(f).max():
        return None
    return _Draft(_padded(num, p + 1), np.zeros(q), centre, scale, (degree, 0), 0)


def _optimum(problem: Problem, feature: float) -> _Draft:
    """The optimum in its safe form, found by way of y = x^2 if the target is symmetric."""
    p, q, f, symmetry = problem.p, problem.q, problem.f, _symmetry(problem)
    if symmetry is None:
        level = solve(problem)
        return _safe(problem, level, level.reference, level.iterations, _Symmetry(odd=False), 1, feature)
    odd, constant, slope = symmetry.odd, symmetry.constant, symmetry.slope
    squares = [(max(low, 0.0) ** 2, high**2) for low, high in problem.intervals if high > 0]
    if odd:  # weighted by x, the error at 0 is 0 whatever the rational does
        squares[0] = (max(squares[0][0], 1e-20 * squares[-1][1]), squares[0][1])

    def g(y: Array) -> Array:
        x = np.sqrt(y)
        return (f(x) - constant - slope * x) / (x if odd else 1.0)

    weight = np.sqrt if odd else np.ones_like
    level = solve(Problem(g, tuple(squares), (p - odd) // 2, q // 2, weight))

    def in_x(x: Array) -> tuple[Array, Array]:
        P, Q = level(x * x)
        return (x * P if odd else P), Q

    x = np.sqrt(level.reference)
    return _safe(problem, in_x, np.union1d(-x, x), level.iterations, symmetry, 2, feature)


def _safe(
    problem: Problem,
    optimum: Callable[[Array], tuple[Array, Array]],
    reference: Array,
    iterations: int,
    symmetry: _Symmetry,
    step: int,
    feature: float,
) -> _Draft:
    """P and Q (x -> values; step 2: Q is even) as powers of u = (t - centre) / scale, with Q(centre) = min Q = 1.

    Then Q = 1 + A with A >= 0. The coefficients solve the linear least squares (P(u) - r A(u)) / Q = r / Q on the
    domain, which keeps the error of r itself at rounding, however ill-conditioned they are.
    """
    low, high = problem.hull
    p = problem.p - (problem.p - symmetry.odd) % step
    q = problem.q - problem.q % step
    c = _argmin(lambda x: optimum(x)[1], clustered([(low, high)], reference)) if q else (low + high) / 2
    at_c, at_0 = optimum(np.array([c, 0.0]))[1]
    if step == 2 and at_0 <= at_c * (1 + 1e-12):
        c = 0.0
    elif step == 2:  # Q is even, but has its minimum at +-c
        step, symmetry = 1, replace(symmetry, odd=False)
    num_powers, den_powers = np.arange(symmetry.odd, p + 1, step), np.arange(step, q + 1, step)
    x = clustered(problem.intervals, reference, 6)
    length = max(high - c, c - low)
    v, (P, Q) = (x - c) / length, optimum(x)
    r, Q = P / Q, Q / optimum(np.array([c]))[1]
    v_to = np.vander(v, max(p, q) + 1, increasing=True)
    columns = np.hstack([v_to[:, num_powers], -r[:, None] * v_to[:, den_powers]]) / Q[:, None]
    norms = np.linalg.norm(columns, axis=0)
    orthonormal, triangle = np.linalg.qr(columns / norms)
    solution = solve_triangular(triangle, orthonormal.T @ (r / Q), check_finite=False) / norms
    num, den = np.zeros(problem.p + 1), np.zeros(problem.q + 1)
    num[num_powers], den[0], den[den_powers] = solution[: len(num_powers)], 1.0, solution[len(num_powers) :]
    added = poly.polymul(den, [symmetry.constant + symmetry.slope * c, symmetry.slope * length])[: problem.p + 1]
    num[: len(added)] += added
    # A is monic where that is sensible; where p > q + 1, its highest num_coeffs must not vanish in float32
    unit = float(np.clip(abs(den[q]) ** (-1 / q) if q and den[q] else 1.0, 10 ** (-30 / max(p - q, 1)), 1.0))
    powers = unit ** np.arange(max(problem.p, problem.q) + 1)
    num, den = num * powers[: problem.p + 1], den * powers[: problem.q + 1]
    r, u = r + symmetry.constant + symmetry.slope * x, v / unit
    lost = float(np.abs(_horner(num, u) / (1 + np.abs(u * _horner(den[1:], u))) - r).max())
    if not lost <= 0.1 * float(np.abs(problem.f(x) - r).max()) + 1e-12 * float(np.abs(r).max()):
        raise Failed(f"its safe form would be off by {lost:.1e}")
    return _Draft(num, den[1:], feature + c, unit * length, (p, q), iterations)


def _argmin(f: Callable[[Array], Array], x: Array) -> float:
    """The point of the least value on the grid x, refined by zooming in."""
    for _ in range(12):
        i = int(np.argmin(f(x)))
        x = np.linspace(x[max(i - 1, 0)], x[min(i + 1, len(x) - 1)], 33)
    return float(x[np.argmin(f(x))])


# ------------------------------------------------------------------------------------------------------- measuring


def _measured(target: _Target, draft: _Draft, degree: tuple[int, int], method: str, grid: int) -> RationalFit:
    """The fit with its errors and its certificate, taken from its float64 form alone and on points of its own."""
    (p, q), (low, high) = degree, (target.domain[0][0], target.domain[-1][1])
    fit = RationalFit(
        gate=target.name,
        degree=degree,
        theta=target.theta,
        delta=target.delta,
        domain=target.domain,
        num_coeffs=tuple(draft.num.tolist()),
        den_coeffs=tuple(draft.den.tolist()),
        centre=draft.centre,
        scale=draft.scale,
        max_error=np.inf,
        mse=np.inf,
        alternation=0,
        iterations=draft.iterations,
        converged=not draft.notes,
        method=method,
        notes=draft.notes,
    )

    def error(t: Array) -> Array:
        return target.f(t) - fit(t)

    steps = (high - low) * np.geomspace(1e-12, 1.0, 500)
    corners = np.array([target.feature, draft.centre, *np.ravel(target.domain)])
    points = np.concatenate([np.linspace(low, high, 4001), np.ravel(corners[:, None] + [*-steps, 0, *steps])])
    t = np.concatenate([apart(points, interval, corners) for interval in target.domain])
    _, peaks = extrema(error, t, target.domain)
    max_error = float(np.abs(peaks).max())
    rounding = 64 * float(np.finfo(np.float64).eps * np.abs(target.f(t)).max())
    reach = min((1e-6 if q <= 12 else 1e-4) + rounding / max_error, 1e-3) if max_error > 0 else 0.0
    alternation = 1 + int(np.count_nonzero(np.diff(np.sign(peaks[np.abs(peaks) >= (1 - reach) * max_error]))))
    uniform = np.linspace(low, high, grid)
    mse = float(np.mean(error(uniform[inside(target.domain, uniform)]) ** 2))
    fit = replace(fit, max_error=max_error, mse=mse, alternation=alternation)
    if method != "minimax":
        return fit
    notes = []
    needed = p + q + 2 - min(p - draft.actual[0], q - draft.actual[1])
    if not np.isfinite(max_error):
        notes.append("the error is not finite")
    elif alternation < needed and max_error > rounding:
        notes.append(f"{alternation} alternating extrema reach the largest error, {needed} would prove the optimum")
        if max_error < 1e7 * rounding:
            notes.append("float64 hardly resolves so small an error: lower the degree")
    u = (apart(points, (low, high), corners) - fit.centre) / fit.scale
    if (u * _horner(fit.den_coeffs, u)).min() < -1e-12:
        notes.append("the denominator falls below its value at the centre")
    return replace(fit, converged=not notes, notes=draft.notes + tuple(notes) if notes else ())


def save_picture(fit: RationalFit, path: str | Path) -> None:
    """Write one HTML file, in need of no network: a named gate with its fit above, their levelled difference below.

    Raises:
        ValueError: the fit is of a callable, which it does not keep.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from rsae.artefacts import atomic

    target = _target(fit.gate, fit.theta, fit.delta, None)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    for low, high in target.domain:
        interval, uniform = (low - target.feature, high - target.feature), np.linspace(low, high, 1001)
        t = np.clip(clustered([interval], uniform - target.feature, 2) + target.feature, low, high)
        figure.add_scatter(x=t, y=target.f(t), name=fit.gate, line={"color": "#9aa5b1", "width": 5}, row=1, col=1)
        figure.add_scatter(x=t, y=target.f(t) - fit(t), name="error", line_color="#30638e", row=2, col=1)
    hull = np.linspace(target.domain[0][0], target.domain[-1][1], 4001)
    figure.add_scatter(x=hull, y=fit(hull), name=f"rational {fit.degree}", line_color="#d1495b", row=1, col=1)
    for level in (-fit.max_error, fit.max_error):
        figure.add_hline(y=level, line=go.layout.shape.Line(dash="dot", width=1), row=2, col=1)  # pyright: ignore
    title = f"{fit.gate}, degree {fit.degree}: max error {fit.max_error:.5e}, {fit.alternation} alternations"
    figure.update_layout(title=title, template="plotly_white", showlegend=False, height=640)
    figure.update_xaxes(title_text="t", row=2, col=1)
    figure.update_yaxes(title_text="gate and fit", row=1, col=1)
    figure.update_yaxes(title_text="gate - fit", exponentformat="e", row=2, col=1)
    with atomic(path) as temporary:
        figure.write_html(temporary, include_plotlyjs=True)


# ------------------------------------------------------------------------------------------------------- relaxed Remez


def _relaxed_remez(target: _Target, p: int, q: int, seed: int, steps: int = 12000) -> _Draft:
    """Chen et al. 2018: Adam on p + q + 2 fixed equispaced points t_i, with the levelled error E one of the parameters.

        loss = mean (e_i - (-1)^i E)^2 + mean max(0, -(-1)^i e_i sign E) + max |e_i|,  e_i = gate(t_i) - P / (1 + |A|)

    Nothing is exchanged, so what it levels are not the extrema, and its error is above the optimum.
    """
    n, signs = p + q + 2, (-1.0) ** np.arange(p + q + 2)
    low, high = target.domain[0][0], target.domain[-1][1]
    lengths = np.array([b - a for a, b in target.domain])
    position = np.linspace(0, lengths.sum(), n)
    starts = np.concatenate([[0.0], np.cumsum(lengths)])
    piece = np.clip(np.searchsorted(starts, position, side="left") - 1, 0, len(lengths) - 1)
    t = np.clip(np.array(target.domain)[piece, 0] + position - starts[piece], low, high)
    centre, scale, f = (low + high) / 2, (high - low) / 2, target.f(t)
    powers = ((t - centre) / scale)[:, None] ** np.arange(max(p, q) + 1)
    N, D = powers[:, : p + 1], powers[:, 1 : q + 1]
    weights = np.random.default_rng(seed).normal(0.0, 0.1, n)  # num_coeffs, den_coeffs, E
    first, second, best, best_loss, losses = np.zeros(n), np.zeros(n), weights, np.inf, np.empty(steps)
    for step in range(steps):
        A, E = D @ weights[p + 1 : -1], weights[-1]
        Q = 1 + np.abs(A)
        r = (N @ weights[: p + 1]) / Q
        e = f - r
        off, wrong, worst = e - signs * E, -signs * e * np.sign(E), int(np.argmax(np.abs(e)))
        losses[step] = np.mean(off**2) + np.mean(np.maximum(wrong, 0)) + abs(e[worst])
        if losses[step] < best_loss:
            best, best_loss = weights, losses[step]
        slope = (2 * off - (wrong > 0) * signs * np.sign(E)) / n  # of the loss by e
        slope[worst] += np.sign(e[worst])
        by_r = -slope / Q
        gradient = np.concatenate([by_r @ N, -(by_r * r * np.sign(A)) @ D, [-2 * np.mean(off * signs)]])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = 0.02 * (1 + np.cos(np.pi * step / steps)) / 2
        unbiased = np.sqrt(second / (1 - 0.999 ** (step + 1)))
        weights = weights - rate * (first / (1 - 0.9 ** (step + 1))) / (unbiased + 1e-12)
    settled = losses[: steps * 9 // 10].min() < 1.02 * best_loss
    notes = () if settled else ("the loss was still falling in the last tenth of its steps",)
    return _Draft(best[: p + 1], best[p + 1 : -1], centre, scale, (p, q), steps, notes)


# ------------------------------------------------------------------------------------------------------ small things


def _horner(coefficients: Sequence[float] | Array, u: Array) -> Array:
    """sum_k c_k u^k."""
    value = np.zeros_like(u)
    for c in reversed(coefficients):
        value = value * u + c
    return value


def _padded(coefficients: Array, size: int) -> Array:
    return np.concatenate([coefficients, np.zeros(size - len(coefficients))])


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Tuples as lists, numpy numbers as Python's."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
