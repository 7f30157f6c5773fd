"""The report: one self-contained HTML page from the JSON files of run folders, with verdict, tables and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsae import __version__
from rsae.artefacts import atomic
from rsae.report.figures import gate_figures, histogram_figures, training_figures
from rsae.report.runs import ARMS, Run, number, read_run
from rsae.report.words import MISSING, compare, counts, duration, facts, harmed, headline, listed, other_l0, table

_ROLES = {
    "teacher": "frozen",
    "control": "own gate, fine-tuned",
    "init": "before fine-tuning",
    "rsae": "fine-tuned",
    "rsae_dense": "the same, small latents kept",
}
_GLOSSARY = (
    (
        "Control",
        "The teacher's own architecture and gate, fine-tuned on the same batches, in the same order, "
        "for as many steps as the RSAE.",
    ),
    ("RSAE init", "The teacher's weights with a fitted rational gate, before any fine-tuning."),
    (
        "Win, tie, loss",
        "The 95% interval of the difference lies on the better side of 0, holds 0, or lies on the worse side. "
        "Alive and dense have no interval: a tie is a difference of at most 0.1 percentage point (pp).",
    ),
    (
        "FVU",
        "Fraction of variance unexplained: the sum of ‖x − x̂‖² over the sum of ‖x − mean‖², over all tokens. "
        "Differences are relative to the other arm's FVU.",
    ),
    ("MSE", "Mean over tokens of ‖x − x̂‖²."),
    ("L0", "Mean number of active latents per token. Arms are compared at equal L0: within 1%."),
    ("Alive, dense", "Share of latents that fire at least once on the evaluation tokens; on more than 10% of them."),
    (
        "ΔCE",
        "Next-token cross-entropy of the language model with the reconstruction spliced in, minus that without, "
        "in nats per token.",
    ),
    (
        "Loss recovered",
        "Share of the cross-entropy lost by ablating the activation that the reconstruction gives back.",
    ),
    ("KL", "Divergence of the spliced model's next-token distribution from the clean one, in nats per token."),
)


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about one or more run folders and return its path.

    Args:
        runs: folders with a metrics.json each; run.json, gate.json and */log.jsonl are used where they are, and a
            sentence says where they are not.
        out: the HTML file; its folder is made, and the file is replaced only once the new one is complete.

    Raises:
        ValueError: no runs; a metrics.json that is missing (the message names the command that writes it); a broken
            file; `out` is a folder.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder, got none")
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder, expected the path of an HTML file such as {out / 'report.html'}")
    read = [read_run(Path(folder)) for folder in runs]
    often = Counter(run.title for run in read)
    html = render([replace(run, place=str(run.folder)) if often[run.title] > 1 else run for run in read])
    with atomic(out) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return out


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    merged = _merged(runs, [facts(run) for run in runs])
    stages, totals = _stages(runs)
    hosts = {(str(run.info.get("host", "")), str(run.info.get("hook", ""))) for run in runs}
    return environment.get_template("report.html.j2").render(
        title="RSAE report: " + ", ".join(run.title for run in runs),
        subject=" · ".join(part for part in hosts.pop() if part) if len(hosts) == 1 else "",
        headline=headline(runs),
        pages=[_page(run) for run in runs],
        arms=ARMS,
        roles=_ROLES,
        facts=merged,
        commands=_grouped(runs, [str(run.info.get("command") or "") for run in runs]),
        stages=stages,
        totals=totals,
        glossary=_GLOSSARY,
        version=__version__,
    )


def _page(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    gate, training, histograms = gate_figures(run), training_figures(run), histogram_figures(run)
    logged = [arm for arm in ("control", "rsae") if run.logs.get(arm)]
    missing = (
        (not run.info, "run.json is missing: what ran is told as far as metrics.json knows it."),
        (not gate, "No picture of the gate: gate.json is missing or empty."),
        (not training, "No training curves: neither control/log.jsonl nor rsae/log.jsonl has rows."),
        (bool(training) and logged == ["rsae"], "No training curve of the control: control/log.jsonl has no rows."),
        (bool(training) and logged == ["control"], "No training curve of the RSAE: rsae/log.jsonl has no rows."),
        (not histograms, "No histograms of L0 and firing rates: metrics.json holds none."),
    )
    rule = run.metrics.get("counting_rule") or run.metrics["rsae"].get("counting_rule")
    return {
        "run": run,
        "control": compare(run, "control"),
        "teacher": compare(run, "teacher"),
        "rows": table(run),
        "counts": counts(run),
        "counting_rule": str(rule).rstrip(".") + "." if rule else "",
        "other_l0": other_l0(run),
        "harmed": harmed(run.metrics),
        "figures": [*gate, *training, *histograms],
        "missing": [sentence for absent, sentence in missing if absent],
    }


def _grouped(runs: Sequence[Run], texts: Sequence[str]) -> list[tuple[str, str]]:
    """(names of the runs that share a text, the text); the names are empty if all do; empty texts are left out."""
    groups: dict[str, list[str]] = {}
    for run, text in zip(runs, texts, strict=True):
        if text:
            groups.setdefault(text, []).append(run.title)
    return [("" if len(names) == len(runs) else listed(names), text) for text, names in groups.items()]


def _merged(runs: Sequence[Run], found: Sequence[dict[str, str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Facts of all runs, label by label, said once where the runs agree."""
    labels = dict.fromkeys(label for each in found for label in each)
    return [(label, _grouped(runs, [each.get(label, "") for each in found])) for label in labels]


def _stages(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Seconds by stage and run, and their sums, as text."""
    seconds = [{stage: number(value) for stage, value in (run.info.get("seconds") or {}).items()} for run in runs]
    names = dict.fromkeys(stage for each in seconds for stage in each)
    rows = [(name, [duration(each.get(name)) for each in seconds]) for name in names]
    return rows, [duration(sum(value or 0.0 for value in each.values())) if each else MISSING for each in seconds]
