"""All stages in a row: a teacher, a host and a text in; a run folder with both fine-tuned arms, their evidence and a page out."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rsae.artefacts import Progress, config_hash, provenance, read_json, write_json
from rsae.calibrate import calibrate, gate_curves, mean_l0
from rsae.evaluate import StoreStats, compare, measure
from rsae.finetune import FinetuneConfig, finetune
from rsae.harvest import ActivationStore, harvest
from rsae.hosts import Host, load_host
from rsae.pretrain import Family, pretrain
from rsae.report import write_report
from rsae.sae import RationalSAE, save_sae
from rsae.teachers import Teacher, load_teacher
from rsae.text import evaluation_contexts

if TYPE_CHECKING:
    from sae_lens import SAE

ARMS = ("teacher", "control", "init", "rsae")


@dataclass(frozen=True, kw_only=True)
class UpgradeConfig:
    """How much data an upgrade takes, and how it fine-tunes."""

    train_tokens: int = 1_000_000
    """Activations harvested to train on."""
    validation_tokens: int = 60_000
    """Activations of held-out documents on which L0 is measured and matched."""
    evaluation_tokens: int = 200_000
    """Tokens of other held-out documents on which the arms are compared."""
    ce_tokens: int = 32_768
    """How many of these the language model's loss is measured on."""
    context_length: int = 256
    """Tokens in a context."""
    degree: tuple[int, int] | None = None
    """(p, q) of the rational; None: (3, 2) for ReLU, (9, 8) for JumpReLU and TopK."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Of both fine-tuned arms."""


class Data:
    """A host, and what was read from it: activations to train on and to match L0 on, held-out text to compare on."""

    def __init__(
        self, host: Host, hook: str, text: str, folder: Path, config: UpgradeConfig, progress: Progress | None
    ) -> None:
        self.host, self.hook, self.text = host, host.hook_point(hook).name, text
        common: dict[str, Any] = {"context_length": config.context_length, "progress": progress}
        self.train = harvest(host, hook, text, folder / "train", n_tokens=config.train_tokens, split="train", **common)
        self.validation = harvest(
            host, hook, text, folder / "validation", n_tokens=config.validation_tokens, split="validation", **common
        )
        self.evaluation = evaluation_contexts(
            host.tokenizer, text, n_tokens=config.evaluation_tokens, context_length=config.context_length
        )

    @property
    def stats(self) -> StoreStats:
        """Which tokens are sinks, and the mean activation: those of the training text."""
        rule = self.train.sink_rule
        return StoreStats(rule.mean, rule.median_norm, rule.ratio)


def upgrade(
    teacher: str | Path | Teacher,
    host: str,
    hook: str,
    text: str,
    out: str | Path,
    *,
    config: UpgradeConfig | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Upgrade a teacher to a Rational SAE, beside an equal-compute control, and measure both on held-out text.

    Leaves in `out`: acts/ (activations), teacher/, control/, init/, rsae/ (SAELens checkpoints; the two trained ones with
    log.jsonl), metrics.json, gate.json, run.json and report.html. A finished stage is not run again, a killed one continues.

    Args:
        teacher: what `rsae.load_teacher` takes, or its result.
        host: what `rsae.load_host` takes: a hub id, a local folder, or "package:gemma3-270m".
        hook: TransformerLens name ("blocks.9.hook_resid_post") or HF module path ("model.layers.9").
        text: what `rsae.harvest.harvest` takes: "package:sae-probes", a file or folder, "hf:dataset[split]".
        out: the run folder; new, empty, or of the same run.

    Returns:
        The contents of metrics.json.

    Raises:
        ValueError: any input that does not fit, before anything is written; `out` holds another run.
    """
    config = config or UpgradeConfig()
    out = Path(out)
    loaded = teacher if isinstance(teacher, Teacher) else load_teacher(teacher)
    identity = {
        "teacher": loaded.fingerprint, "host": host, "hook": hook, "text": text, "config": asdict(config),
    }  # fmt: skip
    if (finished := _finished(out, identity)) is not None:
        return finished
    lm = load_host(host)
    check_fit(loaded, lm, hook)
    _claim(out, identity)
    clock = Clock()
    with clock("harvest"):
        data = Data(lm, hook, text, out / "acts", config, progress)
    run = Run(out, loaded.family, loaded.sae, data, config, clock, progress, command)
    run.arms()
    with clock("evaluate"):
        measured = measure(run.saes, lm, data.hook, data.evaluation, store_stats=data.stats, ce_tokens=config.ce_tokens, progress=progress)
    metrics = run.record(compare(measured, {arm: arm for arm in ARMS}))
    write_report([out], out / "report.html")
    _mark_finished(out, identity)
    return metrics
