"""A run folder as the report reads it: JSON files only, everything but metrics.json optional."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsae.artefacts import read_json

ARMS = {
    "teacher": "teacher",
    "control": "control",
    "init": "RSAE init",
    "rsae": "RSAE",
    "rsae_dense": "RSAE, nothing zeroed",
}
"""Key of an arm in the files -> its name on the page, in the order of every table and legend."""

FAMILIES = {"relu": "ReLU", "jumprelu": "JumpReLU", "topk": "TopK", "gated": "Gated", "rational": "RSAE"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One upgraded teacher."""

    folder: Path
    metrics: dict[str, Any]
    """metrics.json: one dict per arm, the differences, the verdict, the evaluation's config and provenance."""
    info: dict[str, Any]
    """run.json: what ran; empty if the file is missing."""
    gate: dict[str, Any]
    """gate.json: the gate of each arm on a grid, and the histogram of pre-activations; empty if missing."""
    logs: dict[str, list[dict[str, Any]]]
    """Rows of log.jsonl by arm; an arm without a log is not a key."""
    place: str = ""
    """Where the run is, on a page where another one has the same title."""

    @property
    def title(self) -> str:
        """The family as it is written in the literature, with the run's name where that says more."""
        name = str(self.info.get("name") or self.folder.resolve().name)
        family = str(self.info.get("family") or name)
        title = FAMILIES.get(family, family)
        title = title if name.lower() == family.lower() else f"{title} ({name})"
        return f"{title} in {self.place}" if self.place else title

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The arms that were measured, in the order of ARMS."""
        return {arm: self.metrics[arm] for arm in ARMS if isinstance(self.metrics.get(arm), dict)}

    def value(self, arm: str, metric: str) -> float | None:
        """A metric of an arm; None where it was not measured."""
        return number(self.arms.get(arm, {}).get(metric))


def number(value: Any) -> float | None:
    """A finite float, or None for null, nan, inf and whatever is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: metrics.json is missing, broken, or holds no RSAE; another file is broken.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: `rsae evaluate` writes it (as do `rsae upgrade` and `rsae demo`); "
            f"is {folder} a run folder?"
        )
    metrics = _read_object(path)
    if not isinstance(metrics.get("rsae"), dict):
        raise ValueError(f"{path} has no arm 'rsae' (its keys: {sorted(metrics)}): run `rsae evaluate` again")
    info, gate = (_read_object(file) if (file := folder / name).is_file() else {} for name in ("run.json", "gate.json"))
    logs = {arm: read_log(log) for arm in ARMS if (log := folder / arm / "log.jsonl").is_file()}
    return Run(folder=folder, metrics=metrics, info=info, gate=gate, logs=logs)


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object: run its stage again")
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line cut short by a killed run is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for i, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i < len(lines):
                raise ValueError(f"{path}, line {i}, is not valid JSON ({error}): run `rsae finetune` again") from None
    return [row for row in rows if isinstance(row, dict)]
