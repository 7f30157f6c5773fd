"""The command line: help, version, exit codes, one line on stderr, and the fit command's files."""

import json
import resource
import subprocess
import sys

import pytest

from rsae.minimax import RationalFit


def rsae(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "rsae.cli", *map(str, args)], capture_output=True, text=True, timeout=120, **kwargs
    )


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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "gelu"], "gelu"),
        (["fit", "relu", "--degree", "0", "2"], "degree"),
        (["fit", "jumprelu", "--theta", "1.5", "--delta", "0.1"], "theta"),
        (["fit", "jumprelu", "--theta", "0.1", "--delta", "0.95"], "delta"),
        (["upgrade", "nowhere", "--host", "h", "--hook", "b", "--text", "t", "--out", "o"], "nowhere"),
        (["harvest", "--host", "package:none", "--hook", "b", "--text", "t", "--out", "o"], "package:"),
        (["report", "nowhere"], "metrics.json"),
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
