"""Numbers as a reader wants them, and the verdict in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rsae.metrics import MATCHED, outcome_of_interval, outcome_of_shares
from rsae.report.runs import ARMS, Run, number

MISSING = "\u2013"
MINUS = "\u2212"

OUTCOMES = ("win", "tie", "loss")
_SAYINGS = {
    "win": "better{}",
    "tie": "a tie{}",
    "loss": "worse{}",
    "unmatched": "no verdict{} (L0 not matched)",
    "alone": "no verdict{} (no control)",
    None: "not measured{}",
}


# Numbers


def fixed(value: float | None, decimals: int, *, sign: bool = False) -> str:
    """`value` with thousands separators and a true minus; a rounded zero carries no sign; None is an en dash."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if sign else ''},.{decimals}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def decimals(values: Iterable[float | None], digits: int) -> int:
    """Decimals that give the largest of `values` so many significant digits; the others of its row share them."""
    largest = max((abs(value) for value in values if value), default=1.0)
    return min(max(digits - 1 - math.floor(math.log10(largest)), 0), 8)


def significant(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, never in exponent notation."""
    return fixed(value, decimals([value], digits))


def percent(value: float | None, places: int = 1) -> str:
    """A share as a percentage."""
    return MISSING if value is None else fixed(100 * value, places) + "%"


def short(value: float) -> str:
    """1234567 as 1.23M: for axis ticks."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(float(f"{value:.3g}")) >= size:
            return f"{value / size:.3g}{suffix}".replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Seconds as 8.3 s, 2 min 05 s or 1 h 20 min."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def listed(items: Sequence[str]) -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


# RSAE minus another arm


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One line of a verdict: RSAE minus another arm in one metric."""

    metric: str
    value: str
    interval: str
    outcome: str | None
    """win, tie or loss; unmatched if the sparsity is not known to be the same; None if not measured."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """RSAE minus `other`: the numbers, whether they are at the same sparsity, and a sentence that says both."""

    other: str
    differences: tuple[Difference, ...]
    l0: str
    matched: bool | None
    """None if either L0 was not measured."""
    sentence: str


def compare(run: Run, other: str) -> Comparison | None:
    """RSAE minus `other` ("control" or "teacher"); None if that arm was not measured.

    A win is an interval below 0 (FVU and delta-CE: less is better), a loss one above 0, a tie one that holds 0. Where
    metrics.json has a verdict on RSAE minus control, that stands. At another sparsity, nothing wins or loses.
    """
    if other not in run.arms:
        return None
    found = run.metrics.get(f"rsae_minus_{other}") or {}
    stated = (run.metrics.get("verdict") if other == "control" else None) or {}

    def stated_or(derived: str, metric: str) -> str:
        return stated[metric] if stated.get(metric) in OUTCOMES else derived

    def judged(metric: str, interval: list[float] | None) -> str | None:
        return None if interval is None else stated_or(outcome_of_interval(interval), metric)

    fvu, delta_ce = (_interval(found.get(metric)) for metric in ("fvu", "delta_ce"))
    lines = [
        _difference("FVU", fvu and [100 * x for x in fvu], "%", judged("fvu", fvu), (1, 4)),
        _difference("ΔCE", delta_ce, " nats", judged("delta_ce", delta_ce), (3, 6)),
    ]
    for metric in ("alive", "dense"):
        a, b = run.value("rsae", metric), run.value(other, metric)
        if a is not None and b is not None:
            value = fixed(100 * (a - b), 1, sign=True) + " pp"
            sides = f"{fixed(100 * a, 1)} vs {fixed(100 * b, 1)}%"
            outcome = stated_or(outcome_of_shares(metric, a, b), metric)
            lines.append(Difference(metric=metric, value=value, interval=sides, outcome=outcome))

    ours, theirs = run.value("rsae", "l0"), run.value(other, "l0")
    matched, l0 = None, f"L0 {significant(ours, 4)} vs {significant(theirs, 4)}"
    if ours is not None and theirs:
        matched = abs(ours / theirs - 1) <= MATCHED
        l0 += f" ({fixed(100 * (ours / theirs - 1), 1, sign=True)}%)"
    if not matched:
        lines = [replace(line, outcome=line.outcome and "unmatched") for line in lines]
    sentence = _sentence(other, lines, matched)
    return Comparison(other=other, differences=tuple(lines), l0=l0, matched=matched, sentence=sentence)


def harmed(metrics: Mapping[str, Any]) -> str:
    """What metrics.json makes one say of a control that its training left worse than the frozen teacher; nothing, if it did not."""
    found = metrics.get("control_minus_teacher") or {}
    fvu, delta_ce = (_interval(found.get(metric)) for metric in ("fvu", "delta_ce"))
    worse = [f"FVU {fixed(100 * fvu[0], 1, sign=True)}%"] if fvu and outcome_of_interval(fvu) == "loss" else []
    worse += (
        [f"ΔCE {fixed(delta_ce[0], 3, sign=True)} nats"] if delta_ce and outcome_of_interval(delta_ce) == "loss" else []
    )
    if not worse:
        return ""
    return (
        f"The control is worse than the frozen teacher ({listed(worse)}): these steps at this learning rate did it harm, and there "
        "RSAE minus control says little. Train longer, or at a lower rate."
    )


def headline(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The page's first lines: (subject, verdict on all runs against their controls), each run named once a line."""
    result = []
    for subject, metric in (("Reconstruction", "FVU"), ("Language-model loss", "ΔCE")):
        groups: dict[str, list[str]] = {saying: [] for saying in _SAYINGS.values()}
        for run in runs:
            comparison = compare(run, "control")
            found = {line.metric: line.outcome for line in comparison.differences}[metric] if comparison else "alone"
            groups[_SAYINGS[found]].append(run.title)
        said = [
            saying.format("" if len(runs) == 1 else f" for {listed(names)}")
            for saying, names in groups.items()
            if names
        ]
        result.append((subject, ", ".join(said)))
    return result


def _interval(value: Any) -> list[float] | None:
    """[mean, low, high], or None if any of them is missing."""
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    numbers = [x for x in map(number, value) if x is not None]
    return numbers if len(numbers) == 3 else None


def _difference(
    metric: str, interval: list[float] | None, unit: str, outcome: str | None, bounds: tuple[int, int]
) -> Difference:
    """Decimals follow the interval's width: two digits of it, within `bounds`."""
    if interval is None:
        return Difference(metric=metric, value="not measured", interval="", outcome=None)
    places = max(bounds[0], min(bounds[1], decimals([interval[2] - interval[1]], 2)))
    mean, low, high = (fixed(x, places, sign=True) for x in interval)
    return Difference(metric=metric, value=mean + unit, interval=f"{low} to {high}", outcome=outcome)


def _sentence(other: str, differences: Sequence[Difference], matched: bool | None) -> str:
    """The same numbers in words, losses as plainly as wins."""
    whose = "the control's" if other == "control" else "the frozen teacher's"
    names = {"FVU": "FVU", "ΔCE": "the language model's loss"}
    parts, tied = [], []

    def verdict(d: Difference) -> str:
        return f" (a {d.outcome})" if matched else ""

    for d in differences:
        if d.metric in names and d.outcome is None:
            parts.append(f"{names[d.metric]} is not compared")
        elif d.metric in names and d.outcome == "tie":
            tied.append(names[d.metric])
        elif d.metric in names:
            size, way = d.value.lstrip(f"+{MINUS}"), "lower" if d.value.startswith(MINUS) else "higher"
            parts.append(f"{names[d.metric]} is {size} {way} than {whose}{verdict(d)}")
        elif d.outcome in ("win", "loss"):
            parts.append(f"{'fewer' if d.value.startswith(MINUS) else 'more'} latents are {d.metric} (a {d.outcome})")
    if tied:
        parts.append(f"no difference shows in {listed(tied)} (a tie: the interval holds 0)")
    text = f"{listed(parts)}."
    text = text[0].upper() + text[1:]
    if matched is None:
        return f"L0 was not measured on both sides, so nothing shows that the sparsity is the same. {text}"
    if not matched:
        return f"Not at the same sparsity, so the differences are evidence for neither side. {text}"
    return text


# The comparison table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric over the arms."""

    label: str
    unit: str
    better: str
    """lower, higher, or nothing where neither is better."""
    cells: tuple[tuple[str, str, bool], ...]
    """(arm, text, whether it is the best of the comparable arms)."""


_ROWS = (
    ("fvu", "FVU", "", "lower", 1, 4),
    ("mse", "MSE", "", "lower", 1, 4),
    ("l0", "L0", "per token", "", 1, 4),
    ("alive", "Alive", "% of latents", "higher", 100, None),
    ("dense", "Dense", "% of latents", "lower", 100, None),
    ("negative", "Negative", "% of non-zeros", "lower", 100, None),
    ("delta_ce", "ΔCE", "nats", "lower", 1, 4),
    ("loss_recovered", "Loss recovered", "%, by zeros", "higher", 100, None),
    ("loss_recovered_mean", "Loss recovered", "%, by the mean", "higher", 100, None),
    ("kl", "KL", "nats", "lower", 1, 4),
)
"""(key, label, unit, which is better, factor, significant digits or None for two decimals)."""


def comparable(run: Run) -> tuple[str, list[str]]:
    """(reference arm, the arms whose L0 is within 1% of its L0): best values are marked among these only."""
    reference = "control" if "control" in run.arms else "teacher"
    l0 = run.value(reference, "l0")
    if not l0:
        return reference, []
    return reference, [arm for arm in run.arms if abs((run.value(arm, "l0") or 0) / l0 - 1) <= MATCHED]


def table(run: Run) -> list[Row]:
    """Rows of the comparison table; a metric that no arm has is left out, one that all arms share marks no best."""
    _, rivals = comparable(run)
    rows = []
    for key, label, unit, better, factor, digits in _ROWS:
        values = {arm: run.value(arm, key) for arm in run.arms}
        if all(value is None for value in values.values()) or (key == "negative" and not any(values.values())):
            continue
        scaled = {arm: None if value is None else factor * value for arm, value in values.items()}
        places = 2 if digits is None else decimals(scaled.values(), digits)
        texts = {arm: fixed(value, places) for arm, value in scaled.items()}
        contest = [(value, texts[arm]) for arm in rivals if (value := scaled[arm]) is not None]
        best = None
        if better and len({text for _, text in contest}) > 1:
            best = (min if better == "lower" else max)(contest)[1]
        cells = tuple((arm, text, text == best and arm in rivals) for arm, text in texts.items())
        rows.append(Row(label=label, unit=unit, better=better, cells=cells))
    return rows


# What ran


def facts(run: Run) -> dict[str, str]:
    """What ran, as label -> text; only what the files say."""
    info, metrics = run.info, run.metrics
    config = metrics.get("config") or {}
    tokens = info.get("tokens") or {}
    # `rsae evaluate` may have had others than the upgrade
    if measured := [run.value(arm, "n_tokens") for arm in run.arms]:
        tokens = {**tokens, "evaluation": measured[0]}
    excluded = metrics.get("excluded") or {}
    provenance = info.get("provenance") or metrics.get("provenance") or {}
    versions = provenance.get("versions") or {}
    machine = provenance.get("machine") or {}
    finetune = info.get("finetune") or {}
    formula = run.gate.get("formula") or {}
    names = {"bos": "BOS", "special": "other special tokens", "sink": "attention sinks"}
    known = {"host", "hook", "text", "text_content", "seed"}
    seeds = {"evaluation": config.get("seed"), "fine-tuning": finetune.get("seed")}
    memory = number(info.get("peak_memory_gb"))
    found = {
        "Host": info.get("host") or config.get("host"),
        "Hook": info.get("hook") or config.get("hook"),
        "Text": info.get("text") or config.get("text"),
        **{
            f"Evaluation {name}": config.get(name) if info.get(name) not in (None, config.get(name)) else None
            for name in ("host", "hook", "text")
        },
        "Evaluation sources": ", ".join(map(str, metrics.get("sources") or [])),
        "Excluded tokens": ", ".join(f"{names.get(k, k)} {percent(number(v), 2)}" for k, v in excluded.items()),
        "Rule of exclusion": metrics.get("exclusion_rule"),
        "Tokens": ", ".join(f"{k} {fixed(number(v), 0)}" for k, v in tokens.items()),
        "Width": " → ".join(fixed(number(info[k]), 0) for k in ("d_in", "d_sae") if k in info),
        "Preflight": _preflight(info.get("preflight") or {}),
        "Target L0": significant(number(info.get("target_l0")), 4) if info.get("target_l0") is not None else None,
        "Rational gate": f"degree ({', '.join(map(str, formula['degree']))})" if formula.get("degree") else None,
        "Fine-tuning": _flat({k: v for k, v in finetune.items() if k != "seed"}),
        "Evaluation": _flat({k: v for k, v in config.items() if k not in known}),
        "Seeds": _flat(seeds),
        "Versions": _flat(versions),
        "Commit": provenance.get("commit"),
        "Machine": _flat(machine) if isinstance(machine, dict) else machine,
        "Peak memory": f"{significant(memory)} GB" if memory else None,
        "Started": info.get("started"),
    }
    return {label: str(text) for label, text in found.items() if text}


def _preflight(found: dict[str, Any]) -> str:
    """Whether the teacher agreed with its activations, and what was warned of."""
    verdict = {
        "agrees": "the activations agree with the declared conventions",
        "contradicted": "CONTRADICTED, and trusted",
    }
    return "; ".join([verdict.get(str(found.get("verdict")), ""), *map(str, found.get("warnings") or [])]).strip("; ")


def counts(run: Run) -> str:
    """How many tokens and documents the numbers rest on, as far as the files say."""
    arm = run.metrics["rsae"]

    def count(key: str, noun: str) -> str:
        value = number(arm.get(key))
        return f"{fixed(value, 0)} {noun}" if value is not None else f"an unknown number of {noun}"

    text = f"Reconstruction and sparsity over {count('n_tokens', 'tokens')} of {count('n_documents', 'documents')}"
    if number(arm.get("n_ce_tokens")) is not None:
        predicted = f"{count('n_ce_tokens', 'tokens')} of {count('n_ce_documents', 'documents')}"
        text += f"; ΔCE, loss recovered and KL over {predicted}"
    return f"{text}, all held out."


def _flat(config: dict[str, Any], prefix: str = "") -> str:
    """A nested config as "a 1 · b.c 2"; None is left out."""
    parts = []
    for key, value in config.items():
        if isinstance(value, dict):
            parts.append(_flat(value, f"{prefix}{key}."))
        elif value is not None:
            parts.append(f"{prefix}{key} {value}")
    return " · ".join(part for part in parts if part)


def other_l0(run: Run) -> str:
    """Names the arms that are not at the reference's sparsity, if any."""
    reference, rivals = comparable(run)
    l0 = run.value(reference, "l0")
    off = [
        f"{ARMS[arm]} ({fixed(100 * (value / l0 - 1), 1, sign=True)}%)"
        for arm in run.arms
        if l0 and arm not in rivals and (value := run.value(arm, "l0")) is not None
    ]
    return f"L0 is more than 1% away from the {reference}'s for {listed(off)}: left out of the contest." if off else ""
