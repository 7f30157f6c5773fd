"""What a run folder sends to W&B, seen by a stand-in for its client."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from rsae.tracking import track


class Session:
    def __init__(self, **about) -> None:
        self.about, self.rows, self.summary, self.finished = about, [], {}, False

    def log(self, row, step) -> None:
        self.rows.append((step, row))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def sessions(monkeypatch) -> list[Session]:
    opened: list[Session] = []
    stand_in = ModuleType("wandb")
    stand_in.init = lambda **about: opened.append(Session(**about)) or opened[-1]  # type: ignore[attr-defined]
    stand_in.errors = SimpleNamespace(Error=ZeroDivisionError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return opened


def test_logs_and_metrics_of_both_arms(tmp_path, sessions) -> None:
    for arm in ("control", "rsae"):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "finetune.json").write_text(json.dumps({"config": {"lr": 0.1}, "done": True}))
        rows = [{"step": step, "loss": 1 / step} for step in (10, 20)]
        (tmp_path / arm / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.json").write_text(
        json.dumps({"rsae": {"fvu": 0.1, "histograms": {}}, "control": {"fvu": 0.2}})
    )
    assert track(tmp_path, "mine") == 2
    control, rsae = sessions
    assert control.about["name"] == f"{tmp_path.name}-control"
    assert rsae.about == {**control.about, "name": f"{tmp_path.name}-rsae"}
    assert rsae.about["config"] == {"lr": 0.1}
    assert rsae.rows == [(10, {"step": 10, "loss": 0.1}), (20, {"step": 20, "loss": 0.05})]
    assert (control.summary, rsae.summary) == ({"fvu": 0.2}, {"fvu": 0.1})
    assert rsae.finished


def test_nobody_is_logged_in(tmp_path, sessions, monkeypatch) -> None:
    (tmp_path / "rsae").mkdir()
    (tmp_path / "rsae" / "finetune.json").write_text('{"config": {}, "done": true}')
    (tmp_path / "rsae" / "log.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **about: 1 / 0)
    with pytest.raises(ValueError, match="`wandb login` first, or set WANDB_MODE=offline"):
        track(tmp_path)


def test_an_arm_that_is_still_trained(tmp_path, sessions) -> None:
    for arm, done in (("control", True), ("rsae", False)):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "finetune.json").write_text(json.dumps({"config": {}, "done": done}))
        (tmp_path / arm / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="rsae is not trained to its end"):
        track(tmp_path)
    assert sessions == []


def test_no_run_folder(tmp_path, sessions) -> None:
    with pytest.raises(ValueError, match="is it a run folder"):
        track(tmp_path)
    assert sessions == []


def test_wandb_is_not_installed(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        track(tmp_path)
