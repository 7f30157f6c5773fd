"""The command line: help, version, exit codes, one line on stderr, and the fit command's files."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors import SafetensorError
from tiny_host import save_text, save_tiny

from rsae import cli
from rsae.minimax import RationalFit


def rsae(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "rsae.cli", *map(str, args)], capture_output=True, text=True, timeout=120, **kwargs
    )


def torchrun(*args, **kwargs):
    """The command in two processes, on the CPU."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rsae"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        **kwargs,
    )


@pytest.mark.slow
def test_commands_on_two_ranks(tmp_path):
    given = ("--text", save_text(tmp_path / "t.jsonl"), "--hook", "blocks.1.hook_resid_post", "--tokens", 300)
    refused = torchrun("harvest", "--host", "package:none", *given, "--out", tmp_path / "both")
    assert refused.returncode != 0
    assert "there are 2 ranks: start fewer, or harvest more tokens" in refused.stderr  # before there is a host
    acts = tmp_path / "acts"
    assert rsae("harvest", "--host", save_tiny(tmp_path / "host"), *given, "--out", acts).returncode == 0
    StandardSAE(StandardSAEConfig(d_in=8, d_sae=16)).save_model(tmp_path / "narrow")
    refused = rsae("init", tmp_path / "narrow", "--acts", acts, "--out", tmp_path / "init")
    assert "rsae: error: the SAE has d_in 8 and the activations 16: another model or hook?" in refused.stderr
    teacher = tmp_path / "teacher"
    done = rsae(
        "pretrain", "topk", "--acts", acts, "--held-out", acts, "--out", teacher, "--d-sae", 40, "--l0", 4, "--steps", 5
    )
    assert done.returncode == 0, done.stderr
    train = ("finetune", teacher, "--steps", 5, "--out", tmp_path / "control", "--held-out", acts)
    refused = torchrun(*train, "--acts", "nowhere", "--batch-size", 63)
    assert refused.returncode != 0
    assert "rsae: error: a batch of 63 cannot be divided among 2 ranks" in refused.stderr  # before anything is read
    assert not (tmp_path / "control").exists()
    for given, said in (
        (("--l0", 4, "--objective", "l1", "--penalty", 1), "--l0 is what matched-l0 holds"),
        (("--penalty", 1), "--penalty needs --objective l0 or l1"),
    ):
        refused = rsae(*train, "--acts", acts, *given)
        assert refused.returncode == 2
        assert f"rsae: error: {said}" in refused.stderr
    assert not (tmp_path / "control").exists()
    done = torchrun(*train, "--acts", acts, "--batch-size", 64)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"fine-tuned: {tmp_path / 'control'}"]  # by the first rank alone
    assert (tmp_path / "control" / "sae_weights.safetensors").exists()


def test_version():
    from rsae import __version__

    assert rsae("--version").stdout.strip() == f"rsae {__version__}"


def test_help_teaches_and_is_quick():
    def seconds() -> float:
        """Processor time of all ended subprocesses: what a busy machine does not stretch."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    began = seconds()
    result = rsae("--help")
    assert seconds() - began < 1.0
    assert result.returncode == 0
    stages = ("harvest", "pretrain", "init", "finetune", "evaluate", "report", "probe", "inspect", "track", "fit")
    for command in ("demo", "upgrade", *stages):
        assert command in result.stdout


def test_fit_prints_and_writes(tmp_path):
    result = rsae("fit", "jumprelu", "--theta", 0.1, "--delta", 0.005, "--degree", 9, 8, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "8.766140e-04" in result.stdout  # the verified optimum: 0.0008766140497638128
    fit = RationalFit.from_dict(json.loads((tmp_path / "fit.json").read_text()))
    assert fit.max_error == pytest.approx(0.0008766140497638128, rel=1e-6)
    assert "plotly" in (tmp_path / "fit.html").read_text()


def test_a_fit_does_not_replace_another(tmp_path):
    assert rsae("fit", "relu", "--degree", 3, 2, "--out", tmp_path).returncode == 0
    kept = (tmp_path / "fit.json").read_bytes()
    assert rsae("fit", "relu", "--degree", 3, 2, "--out", tmp_path).returncode == 0
    result = rsae("fit", "abs", "--degree", 2, 2, "--out", tmp_path)
    assert result.returncode == 2
    assert "fit.json is of another gate, degree: choose another --out" in result.stderr
    assert (tmp_path / "fit.json").read_bytes() == kept


def test_harvest_of_several_hooks_has_a_folder_for_each(tmp_path):
    hooks = ("blocks.0.hook_resid_post", "model.layers.1")
    given = ("--host", save_tiny(tmp_path / "host"), "--text", save_text(tmp_path / "t.jsonl"), "--tokens", 300)
    result = rsae("harvest", *given, "--hook", hooks[0], "--hook", hooks[1], "--out", tmp_path / "both")
    assert result.returncode == 0, result.stderr
    assert [line.split(" (")[0] for line in result.stdout.splitlines()] == [
        f"300 activations of width 16 in {tmp_path / 'both' / hook}" for hook in hooks
    ]
    rsae("harvest", *given, "--hook", hooks[1], "--out", tmp_path / "one")
    shard = "shard-00000.safetensors"
    assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "both" / hooks[1] / shard).read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "gelu"], "gelu"),
        (["fit", "relu", "--degree", "0", "2"], "degree"),
        (["fit", "jumprelu", "--theta", "1.5", "--delta", "0.1"], "theta"),
        (["fit", "jumprelu", "--theta", "0.1", "--delta", "0.95"], "delta"),
        (["upgrade", "nowhere", "--host", "h", "--hook", "b", "--text", "t", "--out", "o"], "nowhere"),
        (
            [
                "upgrade",
                "t",
                "--host",
                "h",
                "--hook",
                "b",
                "--text",
                "t",
                "--out",
                "o",
                "--online",
                "--train-tokens",
                "9",
            ],
            "--train-tokens",
        ),
        (
            ["upgrade", "t", "--host", "h", "--hook", "b", "--text", "t", "--out", "o", "--train-tokens", "0"],
            "train_tokens",
        ),
        (["upgrade", "t", "--host", "h", "--hook", "b", "--text", "t", "--out", "o", "--seed", "-1"], "seed"),
        (["harvest", "--host", "package:none", "--hook", "b", "--text", "t", "--out", "o"], "package:"),
        (["report", "nowhere"], "metrics.json"),
        (
            ["evaluate", "nowhere", "--host", "h", "--hook", "b", "--text", "t"],
            "nowhere holds none of teacher, control, init, rsae",
        ),
        (["evaluate", "nowhere", "--host", "h", "--hook", "b", "--text", "t", "--acts", "a"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, tmp_path):
    result = rsae(*args, cwd=tmp_path)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("rsae: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not any(tmp_path.iterdir())


def test_a_stage_that_comes_again_is_timed_anew(capsys, monkeypatch):
    from rsae import cli

    clock = iter([0.0, 40.0, 100.0, 101.0, 110.0, 115.0, 120.0, 160.0])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    for done, total in ((0, 4000), (4000, 4000), (10, 30), (30, 30), (0, 90), (50, 90), (0, 40), (20, 40)):
        cli._lines("evaluate", done, total)
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: 0 of 4,000",
        "evaluate: 4,000 of 4,000 100/s",
        "evaluate: 10 of 30",
        "evaluate: 30 of 30 20/s",
        "evaluate: 0 of 90",
        "evaluate: 0 of 40",  # the one before ended early
        "evaluate: 20 of 40 0.5/s, 40 s left",
    ]


def test_upgrade_says_how_many_hooks_it_takes():
    result = rsae("upgrade", "a", "--host", "h", "--hook", "b", "--hook", "c", "--text", "t", "--out", "o")
    assert result.returncode == 2
    assert "teachers: 1, --hook: 2; give one hook for all, or one for each teacher" in result.stderr


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "fit.json").write_text("{}")
    (tmp_path / "cfg.json").write_text("mine")
    for command in (("fit", "relu", "--degree", 3, 2), ("init", tmp_path, "--acts", tmp_path)):
        result = rsae(*command, "--out", tmp_path)
        assert result.returncode == 2
        assert "choose another --out" in result.stderr
    assert (tmp_path / "cfg.json").read_text() == "mine"
    assert (tmp_path / "fit.json").read_text() == "{}"


class OfTheHub(Exception):
    """As the client that huggingface_hub brings along raises it: httpx in some versions, httpx2 in others."""


OfTheHub.__module__ = "httpx2"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "os error 28); what is done is kept, and",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; what is done is kept, and"),
        (OfTheHub("the peer closed the connection"), "the peer closed the connection; what is done is kept, and"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory. A smaller --batch-size"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "Permission denied: 'runs'\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_bug_has_no_traceback(error, message, monkeypatch, capsys):
    def app(**_):
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert message in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def app(**_):
        raise RuntimeError("a shape")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(RuntimeError, match="a shape"):
        cli.main()
