"""Small charts as geometry: figure.html.j2 turns them into SVG, so that escaping and colours stay in one place."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsae.report.runs import ARMS, Run, number
from rsae.report.words import fixed, percent, short, significant

WIDTH, HEIGHT = 340.0, 214.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 326.0, 8.0, 178.0
COLUMNS = 40  # hover columns of a chart
POINTS = 100  # points of a training curve

Point = tuple[float, float | None]
"""A None breaks the line."""
Format = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm of a chart: what is drawn, and what is said about it."""

    arm: str
    points: Sequence[Point]
    samples: Sequence[tuple[float, float]]
    """(x, y) that a hover column quotes."""
    note: str = ""
    """Beside the name in the legend."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart in viewBox units, ready to be written."""

    title: str
    x_label: str
    alt: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    paths: list[tuple[str, str]]
    """(arm, SVG path)."""
    legend: list[tuple[str, str, str]]
    """(arm or "target" or "hist", name, note)."""
    columns: list[tuple[float, float, str]]
    """(x, width, text) of the hover columns."""
    zero: float | None = None
    """y of the line at 0, if 0 is inside."""
    target: float | None = None
    """y of a horizontal reference."""
    backdrop: str = ""
    """SVG path of a histogram behind the lines."""
    note: str = ""
    width: float = field(default=WIDTH, init=False)
    height: float = field(default=HEIGHT, init=False)
    box: tuple[float, float, float, float] = field(default=(LEFT, RIGHT, TOP, BOTTOM), init=False)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 x 10^n within [low, high], about `wanted` of them."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw / 1.4)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    x_format: Format | None = None,
    y_format: Format | None = None,
    y_from_zero: bool = False,
    x_integers: bool = False,
    x_margin: float = 0.0,
    target: tuple[float, str] | None = None,
    backdrop: tuple[Sequence[float], Sequence[float], str] | None = None,
    note: str = "",
) -> Figure | None:
    """Lines over a common frame; None if there is nothing to draw.

    Args:
        x_integers: ticks at whole numbers only.
        x_margin: room left and right of the data, in units of x.
        target: (y, name) of a horizontal reference line.
        backdrop: (edges, heights in [0, 1], name) of a histogram behind the lines, on a scale of its own.
    """
    xs = [x for line in lines for x, y in line.points if y is not None]
    ys = [y for line in lines for _, y in line.points if y is not None] + ([target[0]] if target else [])
    if not xs:
        return None
    x_low, x_high = _widened(min(xs) - x_margin, max(xs) + x_margin, 0.0)
    y_low, y_high = _widened(min(ys), max(ys), 0.06)
    if y_from_zero:
        y_low = 0.0

    def to_x(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def to_y(y: float) -> float:
        return round(BOTTOM - (y - y_low) / (y_high - y_low) * (BOTTOM - TOP), 1)

    x_ticks = ticks(x_low, x_high)
    if x_integers:
        x_ticks = [x for x in x_ticks if abs(x - round(x)) < 1e-9]
    y_ticks = ticks(y_low, y_high)
    x_text, y_text = x_format or _tick_format(x_ticks), y_format or _tick_format(y_ticks)

    backdrop_path, legend = "", [(line.arm, ARMS[line.arm], line.note) for line in lines]
    if target:
        legend.append(("target", target[1], ""))
    if backdrop:
        edges, heights, name = backdrop
        bars = [(max(a, x_low), min(b, x_high), h) for a, b, h in zip(edges[:-1], edges[1:], heights, strict=True)]
        backdrop_path = "".join(
            f"M{to_x(a)} {BOTTOM:g}V{round(BOTTOM - h * (BOTTOM - TOP), 1)}H{to_x(b)}V{BOTTOM:g}Z"
            for a, b, h in bars
            if a < b and h > 0
        )
        legend.append(("hist", name, ""))
    said = "; ".join(f"{ARMS[line.arm]} {line.note}".strip() for line in lines)
    return Figure(
        title=title,
        x_label=x_label,
        alt=f"{title}, against {x_label}. {said}.",
        x_ticks=[(to_x(x), x_text(x)) for x in x_ticks],
        y_ticks=[(to_y(y), y_text(y)) for y in y_ticks],
        paths=[(line.arm, _path(line.points, to_x, to_y)) for line in lines],
        legend=legend,
        columns=_columns(lines, to_x, x_low, x_high, x_format or significant, y_format or significant, x_label),
        zero=to_y(0.0) if y_low < 0 < y_high else None,
        target=to_y(target[0]) if target else None,
        backdrop=backdrop_path,
        note=note,
    )


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    """A range with a margin on both sides, never empty."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def _tick_format(values: Sequence[float]) -> Format:
    """As few decimals as tell the ticks apart."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return lambda value: fixed(value, places)


def _path(points: Sequence[Point], to_x: Format | Callable[[float], float], to_y: Callable[[float], float]) -> str:
    parts, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        parts.append(f"{pen}{to_x(x)} {to_y(y)}")
        pen = "L"
    return "".join(parts)


def _columns(
    lines: Sequence[Line],
    to_x: Callable[[float], float],
    low: float,
    high: float,
    x_text: Format,
    y_text: Format,
    x_label: str,
) -> list[tuple[float, float, str]]:
    """Hover columns: each quotes every line's nearest sample, where the line has one about there."""
    step = (high - low) / COLUMNS
    result = []
    for i in range(COLUMNS):
        x = low + (i + 0.5) * step
        quotes = []
        for line in lines:
            at = bisect_left(line.samples, (x,))
            near = min(line.samples[max(at - 1, 0) : at + 1], key=lambda sample: abs(sample[0] - x), default=None)
            if near is not None and (line.samples[0][0] - step <= x <= line.samples[-1][0] + step):
                quotes.append(f"{ARMS[line.arm]} {y_text(near[1])}")
        if quotes:
            text = "\n".join([f"{x_label} {x_text(x)}", *quotes])
            result.append((to_x(x - step / 2), round((RIGHT - LEFT) / COLUMNS, 2), text))
    return result


# The charts of a run


def gate_figures(run: Run) -> list[Figure]:
    """The gate of each arm over the histogram of pre-activations, and its distance from the teacher's; [] without."""
    xs = [number(x) for x in run.gate.get("x") or []]
    arms = {arm: [number(y) for y in ys] for arm, ys in (run.gate.get("arms") or {}).items() if arm in ARMS and ys}
    if not xs or not arms or any(len(ys) != len(xs) for ys in arms.values()):
        return []
    x_label = str(run.gate.get("x_label") or "pre-activation")
    backdrop = None
    edges, counts = _bins(run.gate.get("pre_acts"))
    if counts and max(counts) > 0:
        top = math.log1p(max(counts))
        backdrop = (edges, [0.92 * math.log1p(count) / top for count in counts], "pre-activations (log counts)")
    lines = [_curve(arm, xs, arms[arm]) for arm in ARMS if arm in arms]
    figures = [chart("Gate: output", lines, x_label=x_label, backdrop=backdrop)]
    if "teacher" in arms and len(arms) > 1:
        teacher = arms["teacher"]
        apart = [
            _curve(arm, xs, [_minus(a, b) for a, b in zip(arms[arm], teacher, strict=True)])
            for arm in ARMS
            if arm in arms and arm != "teacher"
        ]
        figures.append(chart("Gate: output minus the teacher's", apart, x_label=x_label))
    return [figure for figure in figures if figure is not None]


def training_figures(run: Run) -> list[Figure]:
    """FVU and L0 on the training batches against tokens, control and RSAE; [] without logs."""
    target = number(run.info.get("target_l0"))
    uncounted = {"rsae"} if "rsae_dense" in run.arms else set()  # while it trains, nothing says what of it counts
    figures = []
    for metric, title in (("fvu", "FVU while training"), ("l0", "L0 while training")):
        lines, most = [], 1
        for arm in (arm for arm in ARMS if metric != "l0" or arm not in uncounted):
            rows = [
                (tokens, value)
                for row in run.logs.get(arm, [])
                if (tokens := number(row.get("tokens"))) is not None and (value := number(row.get(metric))) is not None
            ]
            if rows:
                size = math.ceil(len(rows) / POINTS)
                most = max(most, size)
                groups = [rows[i : i + size] for i in range(0, len(rows), size)]
                points = [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]
                note = f"ends at {significant(points[-1][1])}"
                lines.append(Line(arm=arm, points=points, samples=points, note=note))
        figure = chart(
            title,
            lines,
            x_label="tokens",
            x_format=short,
            target=(target, f"target {significant(target)}") if metric == "l0" and target is not None else None,
            note="On training batches"
            + (f", means of {most} logged rows." if most > 1 else ".")
            + (" Of the RSAE's dense gate nothing is counted while it trains." if metric == "l0" and uncounted else ""),
        )
        figures += [figure] if figure else []
    return figures


def histogram_figures(run: Run) -> list[Figure]:
    """How many latents fire per token, and how often each latent fires, by arm; [] without histograms."""
    return [figure for figure in (_l0_histogram(run), _density_histogram(run)) if figure is not None]


def _l0_histogram(run: Run) -> Figure | None:
    lines = []
    for arm, metrics in run.arms.items():
        edges, counts = _bins((metrics.get("histograms") or {}).get("l0"))
        # Of rsae_dense nearly all latents are active: beside it the others would be a line at the edge
        if not sum(counts) or arm == "rsae_dense":
            continue
        # Bins hold integers; their width differs between arms, so percent per integer. [2, 3) is drawn about 2.
        shares = [100 * c / sum(counts) / (b - a) for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)]
        lines.append(
            _steps(arm, [edge - 0.5 for edge in edges], shares, f"mean {significant(run.value(arm, 'l0'), 4)}")
        )
    return chart(
        "Tokens (%) at each L0",
        lines,
        x_label="active latents per token",
        x_integers=True,
        y_from_zero=True,
        x_margin=2.0,
    )


def _density_histogram(run: Run) -> Figure | None:
    lines = []
    for arm, metrics in run.arms.items():
        histogram = (metrics.get("histograms") or {}).get("log10_density") or {}
        edges, counts = _bins(histogram)
        dead = number(histogram.get("dead")) or 0.0
        if not sum(counts):
            continue
        whole = sum(counts) + dead
        lines.append(_steps(arm, edges, [100 * count / whole for count in counts], f"dead {percent(dead / whole)}"))
    return chart(
        "Latents (%) by how often they fire",
        lines,
        x_label="share of tokens on which a latent fires",
        x_format=_power_of_ten,
        x_integers=True,
        y_from_zero=True,
        note="Dead: never fired, so not on this axis.",
    )


def _steps(arm: str, edges: Sequence[float], heights: Sequence[float], note: str) -> Line:
    """A histogram's outline, without the empty bins at its ends."""
    filled = [i for i, height in enumerate(heights) if height > 0]
    bins = range(filled[0], filled[-1] + 1)
    points: list[Point] = [(edges[bins[0]], 0.0)]
    for i in bins:
        points += [(edges[i], heights[i]), (edges[i + 1], heights[i])]
    points.append((edges[bins[-1] + 1], 0.0))
    return Line(arm=arm, points=points, samples=[((edges[i] + edges[i + 1]) / 2, heights[i]) for i in bins], note=note)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _curve(arm: str, xs: Sequence[float | None], ys: Sequence[float | None]) -> Line:
    points: list[Point] = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None]
    samples = [(x, y) for x, y in points if y is not None]
    return Line(arm=arm, points=points, samples=samples)


def _bins(histogram: Mapping[str, Any] | None) -> tuple[list[float], list[float]]:
    """(edges, counts) of a histogram; empty if it is missing or its lengths disagree."""
    edges = [number(edge) for edge in (histogram or {}).get("edges") or []]
    counts = [number(count) or 0.0 for count in (histogram or {}).get("counts") or []]
    if len(edges) != len(counts) + 1 or None in edges:
        return [], []
    return [edge for edge in edges if edge is not None], counts


def _power_of_ten(exponent: float) -> str:
    """10⁻³ for a whole exponent, else the number itself."""
    if abs(exponent - round(exponent)) < 1e-9:
        return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return significant(10**exponent, 2)
