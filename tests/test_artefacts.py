"""What artefacts record of the code that made them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from rsae import artefacts


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_commit_is_that_of_a_checkout_of_rsae_and_of_no_project_around_it(tmp_path, monkeypatch) -> None:
    file = tmp_path / ".venv" / "artefacts.py"
    file.parent.mkdir()
    file.write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a project")
    monkeypatch.setattr(artefacts, "__file__", str(file))
    assert artefacts.provenance()["commit"] is None
    git(tmp_path, "add", "-f", ".venv/artefacts.py")
    assert artefacts.provenance()["commit"] == git(tmp_path, "rev-parse", "HEAD").strip()
