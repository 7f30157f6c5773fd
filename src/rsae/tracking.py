"""A finished run sent to Weights & Biases: the training logs of its arms, and its metrics as the summary. Never by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsae.artefacts import read_json
from rsae.report.runs import read_log


def track(run: str | Path, project: str = "rsae") -> int:
    """Log a run folder to W&B, each fine-tuned arm as its own run in a group of the folder's name.

    Without network set WANDB_MODE=offline, and `wandb sync` sends it later.

    Returns:
        The number of arms logged.

    Raises:
        ValueError: wandb is not installed, or nobody is logged in to it; the folder holds no arm, or one that is not finished.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("wandb is not installed: pip install wandb") from error
    run = Path(run)
    arms = [arm for arm in ("control", "rsae") if (run / arm / "log.jsonl").exists()]
    if not arms:
        raise ValueError(f"{run} holds no log.jsonl in control/ or rsae/: is it a run folder?")
    metrics: dict[str, Any] = read_json(run / "metrics.json") if (run / "metrics.json").exists() else {}
    about = {arm: read_json(run / arm / "finetune.json") for arm in arms}
    if unfinished := [arm for arm in arms if not about[arm]["done"]]:
        raise ValueError(f"{run}: {' and '.join(unfinished)} is not trained to its end: run its command again first")
    logs = {arm: read_log(run / arm / "log.jsonl") for arm in arms}
    for arm in arms:
        config = about[arm]["config"]
        try:
            session = wandb.init(project=project, group=run.name, name=f"{run.name}-{arm}", config=config)
        except wandb.errors.Error as error:  # type: ignore[attr-defined]
            raise ValueError(
                f"W&B does not take the run ({error}): `wandb login` first, or set WANDB_MODE=offline"
            ) from error
        try:
            for row in logs[arm]:
                session.log(row, step=row["step"])
            session.summary.update({k: v for k, v in metrics.get(arm, {}).items() if isinstance(v, (int, float))})
        finally:
            session.finish()
    return len(arms)
