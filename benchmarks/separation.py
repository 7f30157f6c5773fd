"""What a rational gate can do that piecewise linear ones cannot, and how its degree grows: the theory, measured.

    OMP_NUM_THREADS=1 python -m benchmarks.separation [--json]

writes results/separation.json, SEPARATION.md and separation.svg.

Separation. f(x) = eta^2 / (x^2 + eta^2) on [-1, 1] is one rational latent. A latent that is affine on a half-line and 0 on
the other (ReLU, JumpReLU) adds one edge, so m of them make at most m + 1 affine pieces, and a piece of length h misses f by
|f''| h^2 / 16 at best, jumps or not. So the sup error eps needs Omega(eps^-1/2) of them; asymptotically the best have
eps^-1/2 / 4 * integral sqrt|f''| (free knots, equal errors: de Boor). "Active latents" can be read in two ways:

    active on a part of [-1, 1] only    `bound`, `relu`: the proof above
    active at one x                     `at_once`: a half-line reaches one end of [-1, 1], so at one end at least half are active

TopK gates have no such edges. With k fixed, N latents make O(N k^(1/3)) pieces (Dey), so in the first reading it needs as many.
In the second it does not: two active latents reach any eps (`topk_encoder`, built here and measured).

Growth. The error of type (n, n) for a sign with a gap of half-width delta falls as 4 exp(-n rho), rho = pi K(delta) / K'(delta)
~ pi^2 / (2 log(4 / delta)) (Zolotarev): error eps needs n ~ (2 / pi^2) log(4 / eps) log(4 / delta). A heaviside is half a sign.
ReLU is (x + |x|) / 2: e^(-9 sqrt n) / 2 <= E_n(|x|) <= 3 e^(-sqrt n) for n > 4 (Newman), E_n(|x|) ~ 8 e^(-pi sqrt n) (Stahl).

References:
    de Boor, A Practical Guide to Splines (2001). Dey, Discrete Comput. Geom. 19 (1998) 373, doi 10.1007/PL00009354.
    Imai, Iri, J. Inform. Process. 9 (1986) 159: the fewest links of a path in a corridor.
    Beckermann, Townsend, SIAM J. Matrix Anal. Appl. 38 (2017) 1227, doi 10.1137/16M1096426: Zolotarev's numbers, the Moebius map.
    Akhiezer, Elements of the Theory of Elliptic Functions (1990): Zolotarev's sign function, exactly.
    Newman, Michigan Math. J. 11 (1964) 11, doi 10.1307/mmj/1028999029. Stahl, Russian Acad. Sci. Sb. Math. 76 (1993) 461.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.special import ellipk, ellipkm1

from rsae.artefacts import atomic, provenance, write_json
from rsae.minimax import NumericalWarning, fit_gate

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

OUT = Path(__file__).resolve().parents[1] / "results"
ETAS = (0.3, 0.1, 0.03)
ERRORS = tuple(10.0 ** (-k / 2) for k in range(4, 13))  # 1e-2 ... 1e-6
LEVELS = (1e-2, 1e-4, 1e-6)
DELTAS = (0.1, 0.03, 0.01, 0.003, 0.001)
GATES: tuple[tuple[str, dict[str, float], int], ...] = (  # gate, options, p - q
    ("sign", {}, 0),
    ("heaviside", {"theta": 0.2}, 0),
    ("jumprelu", {"theta": 0.2}, 1),
)
FLOOR = 1e-8  # below it float64 is in the way
COLOURS = ("#d1495b", "#30638e", "#edae49", "#3d8b6e", "#7a4e8a")

# ------------------------------------------------------------------------------------------------ piecewise linear


def _reach(f: Function, a: float, y: float, high: float, eps: float) -> tuple[float, float, float]:
    """How far a line from (a, y) stays within eps of f: the last x that some line passes, the first it cannot, the slope."""
    length = high - a
    while True:
        x = a + length * np.arange(1, 8193) / 8192
        lowest = np.maximum.accumulate((f(x) - eps - y) / (x - a))
        highest = np.minimum.accumulate((f(x) + eps - y) / (x - a))
        i = int(np.argmax(lowest > highest)) if lowest[-1] > highest[-1] else len(x)
        if 0 < i < 4096:  # a finer look, so that x is known to a part in 4096 at least
            length = 1.5 * (x[i] - a)
            continue
        i = max(i, 1)
        return x[i - 1], x[i] if i < len(x) else np.inf, (lowest[i - 1] + highest[i - 1]) / 2


def polyline(f: Function, low: float, high: float, eps: float) -> tuple[Array, Array]:
    """Knots and values of a continuous piecewise linear function within eps of f, each piece as long as it can be.

    Where f'' has one sign its knots lie on f - sign(f'') eps and no function has fewer pieces; an inflection may cost one.
    """
    starts = [float(f(np.array(low))) + shift for shift in (-eps, eps)]
    knots, values = [low], [max(starts, key=lambda y: _reach(f, low, y, high, eps)[0])]
    while knots[-1] < high * (1 - 1e-12):
        x, _, slope = _reach(f, knots[-1], values[-1], high, eps)
        values.append(values[-1] + slope * (x - knots[-1]))
        knots.append(x)
    return np.array(knots), np.array(values)


def fewest_pieces(f: Function, low: float, high: float, eps: float) -> int:
    """No fewer affine pieces, jumps allowed, are within eps of f on [low, high], where f'' has one sign.

    The best line of an interval misses f by the same at both ends, so it starts at f - sign(f'') eps; each piece is taken up to
    a point that it provably cannot pass, and greed is optimal as part of an interval is never harder than all of it.
    """
    sign = np.sign(f(np.array(low)) + f(np.array(high)) - 2 * f(np.array((low + high) / 2)))
    count, a = 0, low
    while a < high:
        a, count = _reach(f, a, float(f(np.array(a)) - sign * eps), high, eps)[1], count + 1
    return count


class Encoder(NamedTuple):
    """x_hat(x) = W_dec . latents(W_enc x + b_enc) + b_dec, for a scalar x."""

    W_enc: Array
    b_enc: Array
    W_dec: Array
    b_dec: float

    def __call__(self, x: Array, k: int | None = None) -> tuple[Array, Array]:
        """x_hat and the number of non-zero latents at every x: of ReLU or, given k, of TopK."""
        x_hat, active = np.empty_like(x), np.empty_like(x)
        for at in np.array_split(np.arange(len(x)), len(x) * len(self.W_enc) // 2**22 + 1):
            latents = np.maximum(x[at, None] * self.W_enc + self.b_enc, 0.0)
            if k is not None:
                np.put_along_axis(latents, np.argpartition(latents, -k, axis=1)[:, :-k], 0.0, axis=1)
            x_hat[at], active[at] = latents @ self.W_dec + self.b_dec, np.count_nonzero(latents, axis=1)
        return x_hat, active


def relu_encoder(knots: Array, values: Array) -> Encoder:
    """The even function p(|x|), p the polyline from knots[0] = 0, by two ReLU latents a knot, each facing outwards."""
    kinks = np.diff(np.diff(values) / np.diff(knots), prepend=0.0)
    facing = np.repeat([1.0, -1.0], len(kinks))
    return Encoder(facing, -np.tile(knots[:-1], 2), np.tile(kinks, 2), float(values[0]))


def topk_encoder(knots: Array, values: Array, slack: float) -> Encoder:
    """The same p(|x|), concave inside and convex outside, by TopK with k = 2: p(|x|) = b_dec + g(x) - h(x), up to `slack`.

    g and h are convex maxima of lines, a latent each, with decoder weights 1 and -1. The lower of them bends: g outside, where
    p < b_dec, and h inside. Where they cross both also bend by `extra`, which cancels in p and keeps the other lines of the
    upper one out of the top two; they do so shortly one after the other, so that x_hat is unique.
    """
    slopes = np.diff(values) / np.diff(knots)
    kinks = np.concatenate([[2 * slopes[0]], np.diff(slopes)])  # of p(|x|), at knots[:-1]
    i = int(np.argmax(kinks > 0))  # the first convex one: piece i - 1 leads from concave to convex
    cross, extra = (knots[i - 1] + knots[i]) / 2, 3 * np.abs(slopes).max()
    b_dec, shift = values[i - 1] + slopes[i - 1] * (cross - knots[i - 1]), slack / extra

    def lines(at: Array, bends: Array, value: float, slope: float) -> tuple[Array, Array]:
        """Slopes and intercepts of the even function with these bends at +-at, its value and slope at -knots[-1]."""
        at, bends = np.concatenate([-at[at > 0][::-1], at]), np.concatenate([bends[at > 0][::-1], bends])
        W = slope + np.concatenate([[0.0], np.cumsum(bends)])
        return W, value + slope * knots[-1] - np.concatenate([[0.0], np.cumsum(bends * at)])

    g = lines(np.append(cross - shift, knots[i:-1]), np.append(extra, kinks[i:]), 0.0, 0.0)
    h = lines(np.append(knots[:i], cross - 2 * shift), np.append(-kinks[:i], extra), b_dec - values[-1], slopes[-1])
    W, b = np.concatenate([g[0], h[0]]), np.concatenate([g[1], h[1]])
    positive = 1.0 + np.abs(W).max() + np.abs(b).max()  # added to both of the top two: cancels
    return Encoder(W, b + positive, np.repeat([1.0, -1.0], [len(g[0]), len(h[0])]), float(b_dec))


def separation(eta: float, errors: Sequence[float]) -> dict[str, Any]:
    """Latents needed for each sup error: the proved least, those of a ReLU encoder that was built, those of a TopK one."""

    def f(x: Array) -> Array:
        return eta**2 / (x**2 + eta**2)

    def root_curvature(x: float) -> float:
        return abs(6 * (x / eta) ** 2 - 2) ** 0.5 / (1 + (x / eta) ** 2) ** 1.5 / eta

    inflection, rows = eta / 3**0.5, []
    for eps in errors:
        # a piece can serve on both sides of an inflection, hence - 1 for each; m latents have m + 1 pieces, hence - 1
        pieces = fewest_pieces(f, -inflection, inflection, eps) + 2 * fewest_pieces(f, inflection, 1.0, eps) - 2
        knots, values = polyline(f, 0.0, 1.0, eps)
        relu, topk = relu_encoder(knots, values), topk_encoder(knots, values, 1e-3 * eps)
        half = np.concatenate([knots[:-1] + i / 16 * np.diff(knots) for i in range(16)])
        x = np.unique(np.concatenate([half, -half, [-1.0, 1.0]]))
        x_hat, active = relu(x)
        two_hat, two_active = topk(x, k=2)
        rows.append(
            {
                "sup_error": float(np.abs(x_hat - f(x)).max()),
                "bound": pieces - 1,
                "relu": len(relu.W_enc),
                "at_once": int(active.max()),
                "topk_sup_error": float(np.abs(two_hat - f(x)).max()),
                "topk": len(topk.W_enc),
                "topk_at_once": int(two_active.max()),
            }
        )
    rational = fit_gate(f, (1, 2), domain=[(-1.0, 1.0)])
    small = [row for row in rows if row["sup_error"] < 2e-4] or rows  # a latent more or less no longer tells
    log_eps = -np.log([row["sup_error"] for row in small])
    return {
        "eta": eta,
        "rational_error": rational.max_error,
        "rows": rows,
        "exponents": {
            key: float(np.polyfit(log_eps, np.log([row[key] for row in small]), 1)[0])
            for key in ("bound", "relu", "topk")
        },
        "constant_theory": sum(2 * quad(root_curvature, *ab)[0] for ab in ((0, inflection), (inflection, 1))) / 4,
    }


# --------------------------------------------------------------------------------------------- growth of the degree


def rate(delta: float) -> float:
    """rho(delta) = pi K(delta) / K'(delta): the error of the best sign of type (n, n) falls as 4 exp(-n rho)."""
    return float(np.pi * ellipk(delta**2) / ellipkm1(delta**2))


def zolotarev(n: int, delta: float) -> float:
    """The error of the best rational sign of type (n, n): (theta_2(q) / theta_3(q))^2 of the nome q = exp(-2 n rho)."""
    q, k = np.exp(-2 * n * rate(delta)), np.arange(1, 20)
    return float((2 * q**0.25 * (1 + np.sum(q ** (k * (k + 1)))) / (1 + 2 * np.sum(q ** (k * k)))) ** 2)


def symmetric_gap(theta: float, delta: float) -> float:
    """The gap about 0 that a Moebius map makes of one about theta: of equal cross-ratio (1 + d)^2 / (4 d)."""
    cross = (1 + theta + delta) * (1 - theta + delta) / (4 * delta)
    return (cross**0.5 - (cross - 1) ** 0.5) ** 2


def sweep(gate: str, excess: int, degrees: Sequence[int], **options: Any) -> list[dict[str, Any]]:
    """The best error of type (n + excess, n) for each n, until it falls below FLOOR."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # `converged` and `notes` say it
        for n in degrees:
            fit = fit_gate(gate, (n + excess, n), **options)
            rows.append({"n": n, "error": fit.max_error, "converged": fit.converged, "notes": list(fit.notes)})
            if fit.max_error < FLOOR:
                break
    return rows


def _slope(rows: Sequence[dict[str, Any]], x: Callable[[int], float], below: float) -> float:
    """Least-squares slope of log(1 / error) against x(n), of converged fits with an error below a level."""
    used = [row for row in rows if row["converged"] and row["error"] < below]
    return float(np.polyfit([x(row["n"]) for row in used], [-np.log(row["error"]) for row in used], 1)[0])


def _least(rows: Sequence[dict[str, Any]], eps: float) -> int | None:
    """The least degree whose fit reaches eps; None if none does, or a fit below it did not converge."""
    reached = next((i for i, row in enumerate(rows) if row["error"] <= eps), None)
    return rows[reached]["n"] if reached is not None and all(r["converged"] for r in rows[: reached + 1]) else None


def _slope_by_gap(gaps: Sequence[dict[str, Any]], log_gap: Array, i: int) -> float | None:
    """Slope against log(1 / gap) of the real n at which the errors, log-linear in between, cross LEVELS[i]."""
    if any(gap["least"][i] is None for gap in gaps):
        return None
    x = -np.log(LEVELS[i])
    n = [np.interp(x, [-np.log(r["error"]) for r in gap["rows"]], [r["n"] for r in gap["rows"]]) for gap in gaps]
    return float(np.polyfit(log_gap, n, 1)[0])


def growth_with_gap(gate: str, options: dict[str, float], excess: int, deltas: Sequence[float]) -> dict[str, Any]:
    """Errors for every delta and degree, their rate, and the degree's slope against log(1 / delta), each beside theory.

    A heaviside is half a sign. A JumpReLU is t times a heaviside, so n degrees do at least as well as for the latter.
    """
    symmetric = [symmetric_gap(options.get("theta", 0.0), delta) for delta in deltas]
    gaps, part = [], 1.0 if gate == "sign" else 0.5
    for delta, gap in zip(deltas, symmetric, strict=True):
        rows = sweep(gate, excess, range(1, 41), delta=delta, **options)
        proved = [row for row in rows if row["converged"]]
        off = max(abs(row["error"] / (part * zolotarev(row["n"], gap)) - 1) for row in proved)
        gaps.append(
            {
                "delta": delta,
                "rows": rows,
                "rate": _slope(rows, float, 1e-2),
                "rate_theory": rate(gap),
                "factor": proved[-1]["error"] * float(np.exp(proved[-1]["n"] * rate(gap))),
                "off_zolotarev": None if gate == "jumprelu" else off,
                "least": [_least(rows, eps) for eps in LEVELS],
                "least_theory": [next(n for n in range(1, 999) if part * zolotarev(n, gap) <= eps) for eps in LEVELS],
            }
        )
    log_gap = -np.log(symmetric)
    by_gap = [_slope_by_gap(gaps, log_gap, i) for i in range(len(LEVELS))]
    theory = [2 / np.pi**2 * float(np.log(gaps[-1]["factor"] / eps)) for eps in LEVELS]
    return {"gate": gate, **options, "excess": excess, "gaps": gaps, "by_gap": by_gap, "by_gap_theory": theory}


def growth_of_relu(degrees: Sequence[int]) -> dict[str, Any]:
    """ReLU, type (n + 1, n), half of |x| of type (n, n): its errors beside Stahl's 4 exp(-pi sqrt n) and Newman's bounds."""
    rows = sweep("relu", 1, degrees)
    proved, roots = [row for row in rows if row["converged"]], np.sqrt([row["n"] for row in rows])
    newman = zip(np.exp(-9 * roots) / 4, [row["error"] for row in rows], 1.5 * np.exp(-roots), strict=True)
    return {
        "rows": [
            row | {"over_stahl": row["error"] / float(4 * np.exp(-np.pi * root))}
            for row, root in zip(rows, roots, strict=True)
        ],
        "rate": _slope(proved, np.sqrt, 1e-2),
        "rate_last": _slope(proved[-4:], np.sqrt, 1.0),
        "within_newman": bool(all(low <= error <= high for low, error, high in newman)),
        "least": [_least(rows, eps) for eps in LEVELS],
        "least_theory": [float((np.log(4 / eps) / np.pi) ** 2) for eps in LEVELS],
    }


def measure() -> dict[str, Any]:
    """Everything, as JSON values."""
    start = time.perf_counter()
    return {
        "separation": [separation(eta, ERRORS) for eta in ETAS],
        "levels": LEVELS,
        "growth": [growth_with_gap(*gate, DELTAS) for gate in GATES],
        "relu": growth_of_relu(range(2, 42, 2)),
        "seconds": time.perf_counter() - start,
        "provenance": provenance(),
    }


# ------------------------------------------------------------------------------------------------------- on paper


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def _converged(rows: Sequence[dict[str, Any]]) -> str:
    """How many fits are proven optima, and the degrees of those that are not."""
    failed = [row["n"] for row in rows if not row["converged"]]
    return f"{len(rows) - len(failed)} of {len(rows)}" + (f" (not n = {', '.join(map(str, failed))})" if failed else "")


def page(results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    where, levels = results["provenance"], [f"eps = {eps:.0e}" for eps in results["levels"]]
    parts = [
        "# Rational gates: separation and growth, measured\n",
        f"`python -m benchmarks.separation`, commit {where['commit']}, {where['machine']['processor']}, "
        f"{results['seconds']:.0f} s. What is proved, and by whom, stands in the docstring of `benchmarks/separation.py`.\n",
        "![latents against error, degree against error](separation.svg)\n",
        "## Latents for f(x) = eta^2 / (x^2 + eta^2) on [-1, 1]\n",
        "`bound`: no ReLU or JumpReLU encoder within eps has fewer latents that are active on a part of [-1, 1] only. `ReLU`: the\n"
        "latents of such an encoder, built and evaluated. The best ReLU and the best JumpReLU lie between the two: jumps gain\n"
        "nothing. `at once`: the most of them active at one x; any such encoder needs bound / 2. `TopK`: another encoder,\n"
        "k = 2. It is as wide, but two of its latents are active at every x, at any eps: the bound on latents active at one x\n"
        "does not extend to TopK; that its width grows as eps^-1/2 is proved for fixed k.\n",
    ]
    for s in results["separation"]:
        e, last = s["exponents"], s["rows"][-1]
        parts += [
            f"### eta = {s['eta']}; one rational latent of type (0, 2) has error {s['rational_error']:.0e}\n",
            _table(
                ["sup error", "bound", "ReLU", "at once", "TopK: sup error", "TopK", "at once"],
                [
                    [
                        *(f"{r['sup_error']:.3e}", r["bound"], r["relu"], r["at_once"]),
                        *(f"{r['topk_sup_error']:.3e}", r["topk"], r["topk_at_once"]),
                    ]
                    for r in s["rows"]
                ],
            ),
            f"Latents ~ eps^-a, fitted where eps <= 1e-4: a = {e['bound']:.4f} (bound), {e['relu']:.4f} (ReLU), "
            f"{e['topk']:.4f} (TopK); proved 1/2. Latents x eps^(1/2), last row: "
            f"{last['bound'] * last['sup_error'] ** 0.5:.4f} (bound), {last['relu'] * last['sup_error'] ** 0.5:.4f} (ReLU); "
            f"in the limit {s['constant_theory']:.4f}.\n",
        ]
    parts += [
        "## Degree of gates that jump: type (n, n), jumprelu (n + 1, n)\n",
        "`rate`: slope of log(1 / E_n) against n where E_n < 1e-2, beside rho. `factor`: E_n exp(n rho) at the last n; in theory\n"
        "4 for sign, 2 for heaviside. `off`: largest relative distance from Zolotarev's exact error. Least n with E_n <= eps:\n"
        "measured / exact; of jumprelu measured / proved upper bound. Degrees grow until "
        f"E_n < {FLOOR:.0e}; fits not proven optimal are named.\n",
    ]
    for g in results["growth"]:
        slopes = zip(levels, g["by_gap"], g["by_gap_theory"], strict=True)
        parts += [
            f"### {g['gate']}, theta = {g.get('theta', 0)}\n",
            _table(
                ["delta", "rate", "rho", "factor", "off", *levels, "converged"],
                [
                    [gap["delta"], *(f"{gap[key]:.4f}" for key in ("rate", "rate_theory", "factor"))]
                    + ["" if gap["off_zolotarev"] is None else f"{gap['off_zolotarev']:.0e}"]
                    + [f"{n or '-'} / {m}" for n, m in zip(gap["least"], gap["least_theory"], strict=True)]
                    + [_converged(gap["rows"])]
                    for gap in g["gaps"]
                ],
            ),
            "Slope of n (interpolated to E_n = eps) against log(1 / delta) [(2 / pi^2) log(factor / eps)]: "
            + "; ".join(
                f"{level}: {'-' if slope is None else format(slope, '.3f')} [{theory:.3f}]"
                for level, slope, theory in slopes
            )
            + ". The gap is the symmetric one of equal cross-ratio"
            + ("; the factor falls with it, so n grows a little less.\n" if g["gate"] == "jumprelu" else ".\n"),
        ]
    relu = results["relu"]
    least = zip(levels, relu["least"], relu["least_theory"], strict=True)
    parts += [
        "## Degree of ReLU: type (n + 1, n)\n",
        _table(
            ["n", "error", "error / (4 exp(-pi sqrt n))", "converged"],
            [
                [r["n"], f"{r['error']:.5e}", f"{r['over_stahl']:.4f}", "; ".join(r["notes"]) or "yes"]
                for r in relu["rows"]
            ],
        ),
        f"Slope of log(1 / E) against sqrt n: {relu['rate']:.4f} (E < 1e-2), {relu['rate_last']:.4f} (last four); pi in the "
        "limit,\nwhich is as slow to come as 1 in the third column. Within Newman's bounds: "
        f"{'all' if relu['within_newman'] else 'NOT ALL'}. Least even n [(log(4 / eps) / pi)^2]:\n"
        + "; ".join(f"{level}: {n or '-'} [{m:.1f}]" for level, n, m in least)
        + ".\n",
    ]
    return "\n".join(parts)


def picture(results: dict[str, Any]) -> str:
    """Three panels as SVG, base-10 logarithms along which theory is a straight line (thin, grey)."""
    width, ends = [], [-np.log10(results["separation"][0]["rows"][i]["sup_error"]) for i in (0, -1)]
    for s in results["separation"]:
        width.append((f"eta {s['eta']}", [(-np.log10(r["sup_error"]), np.log10(r["relu"])) for r in s["rows"]]))
        width.append(("", [(x, np.log10(s["constant_theory"]) + x / 2) for x in ends]))
    degree = []
    for gap in results["growth"][0]["gaps"]:
        points = [(r["n"], -np.log10(r["error"])) for r in gap["rows"] if r["converged"]]
        degree.append((f"delta {gap['delta']}", points))
        degree.append(("", [(n, (n * gap["rate_theory"] - np.log(4)) / np.log(10)) for n in (3, points[-1][0])]))
    relu = [(r["n"] ** 0.5, -np.log10(r["error"])) for r in results["relu"]["rows"] if r["converged"]]
    stahl = [(x, (np.pi * x - np.log(4)) / np.log(10)) for x in (relu[0][0], relu[-1][0])]
    panels = [
        ("ReLU latents: log10 units against log10 1/eps", width),
        ("sign: log10 1/E against n", degree),
        ("ReLU: log10 1/E against sqrt n", [("ReLU", relu), ("", stahl)]),
    ]
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1080 330" font-family="sans-serif" font-size="12">']
    svg.append('<rect width="1080" height="330" fill="white"/>')
    for k, (title, series) in enumerate(panels):
        points = np.array([point for _, line in series for point in line])
        (x0, y0), (x1, y1), left = np.floor(points.min(0)), np.ceil(points.max(0)), 360 * k + 40
        svg.append(
            f'<text x="{left}" y="20">{title}</text><path d="M{left} 30V290H{left + 300}" fill="none" stroke="black"/>'
        )
        for i in range(5):
            x, y = x0 + i / 4 * (x1 - x0), y0 + i / 4 * (y1 - y0)
            svg.append(f'<text x="{left + 75 * i}" y="308" text-anchor="middle">{x:.3g}</text>')
            svg.append(f'<text x="{left - 5}" y="{294 - 65 * i}" text-anchor="end">{y:.3g}</text>')
        for i, (name, line) in enumerate(series):
            at = [(left + 300 * (x - x0) / (x1 - x0), 290 - 260 * (y - y0) / (y1 - y0)) for x, y in line]
            colour = COLOURS[i // 2] if name else "#9aa5b1"
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
            svg.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{2 if name else 1}"/>')
            svg.append(f'<text x="{left + 8}" y="{44 + 8 * i}" fill="{colour}">{name}</text>')
    return "\n".join([*svg, "</svg>\n"])


def write(results: dict[str, Any], folder: Path) -> None:
    """separation.json, SEPARATION.md and separation.svg."""
    write_json(folder / "separation.json", results)
    for name, text in (("SEPARATION.md", page(results)), ("separation.svg", picture(results))):
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    results = measure()
    write(results, OUT)
    print(json.dumps(results) if arguments.json else page(results))


if __name__ == "__main__":
    main()
