"""The report says what the files say: every arm and number, losses as losses, and nothing from or to the network."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rsae.report import write_report
from rsae.report.figures import chart, gate_figures, histogram_figures, ticks, training_figures
from rsae.report.runs import read_run
from rsae.report.words import compare, duration, fixed, headline, percent, short, significant

# Synthetic run folders, in the shapes that the stages write

D_SAE = 5120
LEVELS = {  # family -> arm -> (mse, fvu, l0, alive, dense, delta_ce, loss recovered, kl)
    "relu": {
        "teacher": (4213.6, 0.2417, 63.92, 0.8713, 0.0094, 0.2113, 0.9571, 0.2304),
        "control": (4057.1, 0.2327, 64.07, 0.8842, 0.0101, 0.1987, 0.9597, 0.2179),
        "init": (4214.9, 0.2418, 63.92, 0.8713, 0.0094, 0.2114, 0.9571, 0.2305),
        "rsae": (2986.2, 0.1713, 64.31, 0.9127, 0.0071, 0.1254, 0.9745, 0.1391),
    },
    "jumprelu": {
        "teacher": (3120.4, 0.1790, 31.97, 0.9312, 0.0049, 0.1402, 0.9715, 0.1533),
        "control": (2989.9, 0.1715, 32.04, 0.9361, 0.0051, 0.1307, 0.9734, 0.1438),
        "init": (3120.4, 0.1790, 31.97, 0.9312, 0.0049, 0.1402, 0.9715, 0.1533),
        "rsae": (2991.6, 0.1716, 32.11, 0.9364, 0.0049, 0.1311, 0.9733, 0.1440),
    },
    "topk": {
        "teacher": (2877.2, 0.1651, 32.0, 0.9541, 0.0037, 0.1288, 0.9738, 0.1417),
        "control": (2811.0, 0.1613, 32.0, 0.9583, 0.0037, 0.1195, 0.9757, 0.1320),
        "init": (2877.2, 0.1651, 32.0, 0.9541, 0.0037, 0.1288, 0.9738, 0.1417),
        "rsae": (2755.8, 0.1581, 32.0, 0.9511, 0.0036, 0.1248, 0.9747, 0.1371),
    },
}
MINUS_CONTROL = {
    "relu": {"fvu": [-0.2639, -0.2791, -0.2487], "delta_ce": [-0.0733, -0.0791, -0.0677]},
    "jumprelu": {"fvu": [0.0006, -0.0011, 0.0023], "delta_ce": [0.0004, -0.0009, 0.0018]},
    "topk": {"fvu": [-0.0198, -0.0231, -0.0167], "delta_ce": [0.0053, 0.0031, 0.0076]},
}
MINUS_TEACHER = {
    "relu": {"fvu": [-0.2913, -0.3102, -0.2731], "delta_ce": [-0.0859, -0.0922, -0.0797]},
    "jumprelu": {"fvu": [-0.0413, -0.0448, -0.0380], "delta_ce": [-0.0091, -0.0114, -0.0068]},
    "topk": {"fvu": [-0.0424, -0.0461, -0.0389], "delta_ce": [-0.0040, -0.0067, -0.0014]},
}
VERDICT = {
    "relu": {"fvu": "win", "delta_ce": "win", "alive": "win", "dense": "win"},
    "jumprelu": {"fvu": "tie", "delta_ce": "tie", "alive": "tie", "dense": "tie"},
    "topk": {"fvu": "win", "delta_ce": "loss", "alive": "loss", "dense": "tie"},
}
RULE = "a latent fires on exact non-zeros (z != 0); alive: on at least one of the n_tokens measured tokens"


def arm_metrics(family: str, arm: str, rng: np.random.Generator) -> dict[str, Any]:
    mse, fvu, l0, alive, dense, delta_ce, recovered, kl = LEVELS[family][arm]
    n_tokens = 65_204
    spread = rng.gamma(9.0, l0 / 9.0, n_tokens).round().astype(int)
    per_token = np.full(n_tokens, 32) if family == "topk" else spread
    width = next(w for w in (1, 2, 5, 10) if per_token.max() < 64 * w)
    l0_counts, l0_edges = np.histogram(per_token, bins=width * np.arange(per_token.max() // width + 2))
    living = round(alive * D_SAE)
    densities = np.clip(rng.normal(-2.6 + 0.3 * (arm == "rsae"), 0.55, living), -4.8, -0.01)
    counts, edges = np.histogram(densities, bins=np.round(np.arange(-50, 1) / 10, 1))
    return {
        "mse": mse,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": l0,
        "alive": alive,
        "dense": dense,
        "negative": 0.0,
        "n_tokens": n_tokens,
        "n_documents": 412,
        "counting_rule": RULE,
        "histograms": {
            "l0": {"edges": l0_edges.tolist(), "counts": l0_counts.tolist()},
            "log10_density": {"edges": edges.tolist(), "counts": counts.tolist(), "dead": D_SAE - living},
        },
        "ce_clean": 3.1142,
        "ce_spliced": 3.1142 + delta_ce,
        "delta_ce": delta_ce,
        "ce_zero_ablated": 8.0361,
        "ce_mean_ablated": 7.1213,
        "loss_recovered": recovered,
        "loss_recovered_mean": recovered - 0.006,
        "kl": kl,
        "n_ce_tokens": 16_301,
        "n_ce_documents": 104,
    }


def provenance() -> dict[str, Any]:
    return {
        "versions": {
            "python": "3.11.2",
            "rsae": "0.1.0",
            "torch": "2.9.0",
            "sae-lens": "6.40.1",
            "transformers": "4.57.1",
        },
        "commit": "3f2a9c1d7b8e4f60a1b2c3d4e5f60718293a4b5c",
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2, "device": "CPU"},
    }


def gate_json(family: str, rng: np.random.Generator) -> dict[str, Any]:
    x = np.linspace(-1.0, 3.0, 321)
    theta = 0.0 if family == "relu" else 1.0
    teacher = np.where(x > theta, x, 0.0)
    wiggle = 0.0 if family != "relu" else 0.012
    init = teacher + wiggle * np.sin(9 * x) * np.exp(-(x**2))
    rsae = np.where(x > theta, 1.06 * x - 0.05 * np.exp(-3 * (x - theta)), 0.0)
    counts, edges = np.histogram(rng.normal(-0.6, 0.55, 400_000), bins=120, range=(-3, 3))
    return {
        "x_label": "h" if family == "relu" else "h / θ",
        "x": x.tolist(),
        "arms": {"teacher": teacher.tolist(), "init": init.tolist(), "rsae": rsae.tolist()},
        "pre_acts": {"edges": edges.tolist(), "counts": counts.tolist()},
        "formula": {
            "degree": [3, 2] if family == "relu" else [9, 8],
            "num_coeffs": [0.012, 0.51, 0.98, 0.47],
            "den_coeffs": [0.03, 1.21],
            "centre": 0.0,
            "scale": 1.0,
        },
    }


def make_run(root: Path, family: str = "relu", change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A complete run folder; `change` edits {"run": ..., "metrics": ..., "gate": ...} before it is written."""
    rng = np.random.default_rng(7)
    command = "rsae demo --out runs/demo"
    sources = ["agnews", "imdb", "amazon_reviews", "stackexchange", "arxiv_abstracts"]
    files = {
        "metrics": {
            "schema": 1,
            "config": {"host": "package:gemma3-270m", "hook": "blocks.9.hook_resid_post", "text": "package:sae-probes"}
            | {"context_length": 256, "seed": 0},
            "provenance": provenance(),
            "counting_rule": RULE,
            "exclusion_rule": "BOS, special tokens, and tokens whose norm about the mean is over 3 times the median",
            "excluded": {"bos": 0.0039, "special": 0.0, "sink": 0.0012},
            "sources": sources,
            **{arm: arm_metrics(family, arm, rng) for arm in ("teacher", "control", "init", "rsae")},
            "rsae_minus_control": MINUS_CONTROL[family],
            "rsae_minus_teacher": MINUS_TEACHER[family],
            "verdict": VERDICT[family],
        },
        "run": {
            "name": family,
            "family": family,
            "host": "package:gemma3-270m",
            "hook": "blocks.9.hook_resid_post",
            "text": "package:sae-probes",
            "command": command,
            "started": "2026-06-14T09:12:31+00:00",
            "seconds": {
                "harvest": 212.4,
                "pretrain": 95.0 if family == "relu" else 61.2,
                "finetune": 148.9,
                "evaluate": 44.7,
            },
            "peak_memory_gb": 5.31,
            "target_l0": LEVELS[family]["teacher"][2],
            "d_in": 640,
            "d_sae": D_SAE,
            "tokens": {"train": 1_500_000, "finetune": 1_000_000, "evaluation": 65_204},
            "finetune": {"objective": "matched-l0", "lr": 3e-4, "steps": 977, "batch_size": 1024, "seed": 0}
            | {"adam": {"beta1": 0.9, "beta2": 0.999}},
            "provenance": provenance(),
        },
        "gate": gate_json(family, rng),
    }
    files = copy.deepcopy(files)
    if change is not None:
        change(files)
    folder = root / family
    for name, value in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(value))
    for arm in ("control", "rsae"):
        start, end = LEVELS[family]["teacher"], LEVELS[family][arm]
        (folder / arm).mkdir()
        with open(folder / arm / "log.jsonl", "w") as log:
            for step in range(977):
                ease = 1 - math.exp(-step / 150)
                fvu = start[1] + (end[1] - start[1]) * ease + 0.004 * rng.standard_normal()
                l0 = end[2] + 6 * math.exp(-step / 60) * math.sin(step / 12) + 0.4 * rng.standard_normal()
                row = {"step": step, "tokens": 1024 * (step + 1), "seconds": 0.15 * step, "loss": 17_000 * fvu}
                log.write(json.dumps(row | {"fvu": fvu, "l0": l0, "lr": 3e-4, "tokens_per_s": 6800.0}) + "\n")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three runs."""
    root = tmp_path_factory.mktemp("demo")
    return write_report([make_run(root, family) for family in LEVELS], root / "report.html")


class Page(HTMLParser):
    """A page's text, references and tags; a tag closed out of order is an AssertionError."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})
    SVG = frozenset({"path", "rect"})  # self-closed

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.SVG, f"<{tag}/> is not self-closing in HTML"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def words(html: str) -> str:
    return " ".join(Page(html).text.split())


def one(tmp_path: Path, family: str = "relu", change: Callable[[dict[str, Any]], None] | None = None) -> str:
    """The HTML of one run."""
    return write_report([make_run(tmp_path, family, change)], tmp_path / "report.html").read_text(encoding="utf-8")


# What the page says


def test_every_arm_and_number_appears(demo: Path) -> None:
    text = words(demo.read_text(encoding="utf-8"))
    for name in ("ReLU", "JumpReLU", "TopK", "teacher", "control", "RSAE init", "RSAE"):
        assert name in text
    for family in LEVELS.values():
        for mse, fvu, l0, alive, dense, delta_ce, recovered, kl in family.values():
            for expected in (
                f"{mse:,.0f}",
                f"{fvu:.4f}",
                f"{l0:.2f}",
                f"{100 * alive:.2f}",
                f"{100 * dense:.2f}",
                f"{delta_ce:.4f}",
                f"{100 * recovered:.2f}",
                f"{kl:.4f}",
            ):
                assert expected in text
    assert "65,204 tokens of 412 documents" in text
    assert "16,301 tokens of 104 documents" in text
    assert "exact non-zeros" in text


def test_verdict_is_in_the_first_lines(demo: Path) -> None:
    text = words(demo.read_text(encoding="utf-8"))
    first = "Reconstruction: better for ReLU and TopK, a tie for JumpReLU."
    second = "Language-model loss: better for ReLU, a tie for JumpReLU, worse for TopK."
    assert text.index(first) < text.index(second) < text.index("What ran") < text.index("Time by stage")
    assert text.index(second) < 400


def test_differences_show_value_interval_and_outcome(demo: Path) -> None:
    text = words(demo.read_text(encoding="utf-8"))
    assert "FVU−26.4%−27.9 to −24.9" in text
    assert "ΔCE+0.0053 nats+0.0031 to +0.0076" in text
    assert "ΔCE−0.073 nats−0.079 to −0.068" in text
    assert text.index("RSAE − control") < text.index("RSAE − frozen teacher")


def test_losses_are_called_losses(tmp_path: Path) -> None:
    html = one(tmp_path, "topk")
    assert re.search(r'<span class="chip loss"><span aria-hidden="true">▼</span> loss</span>', html)
    text = words(html)
    assert "the language model's loss is 0.0053 nats higher than the control's (a loss)" in text
    assert "fewer latents are alive (a loss)" in text
    assert "FVU is 1.98% lower than the control's (a win)" in text
    assert "Language-model loss: worse." in text


def test_a_loss_everywhere_is_the_headline(tmp_path: Path) -> None:
    def worse(files: dict[str, Any]) -> None:
        files["metrics"]["rsae_minus_control"] = {"fvu": [0.031, 0.02, 0.042], "delta_ce": [0.02, 0.01, 0.03]}
        files["metrics"]["verdict"] = {"fvu": "loss", "delta_ce": "loss", "alive": "tie", "dense": "loss"}
        files["metrics"]["rsae"]["dense"] = 0.0143

    text = words(one(tmp_path, "relu", worse))
    assert "Reconstruction: worse.Language-model loss: worse." in text
    assert "FVU is 3.1% higher than the control's (a loss)" in text
    assert "more latents are dense (a loss)" in text


def test_l0_mismatch_is_loud_and_no_win(tmp_path: Path) -> None:
    def richer(files: dict[str, Any]) -> None:
        files["metrics"]["rsae"]["l0"] = 64.07 * 1.05

    html = one(tmp_path, "relu", richer)
    text = words(html)
    assert '<p class="warning" role="note">! L0 not matched: L0 67.27 vs 64.07 (+5.0%)</p>' in html
    assert "Reconstruction: no verdict (L0 not matched)." in text
    assert "Not at the same sparsity, so the differences are evidence for neither side." in text
    assert 'class="chip win"' not in html
    assert html.count('<span class="chip unmatched"><span aria-hidden="true">!</span> not matched</span>') >= 4
    # and its lower FVU does not win the table's contest
    assert re.search(r"L0 is more than 1% away from the control's for RSAE \(\+5\.0%\)", text)
    row = next(tr for tr in re.findall(r"<tr>.*?</tr>", html, re.S) if 'scope="row">FVU' in tr and "0.1713" in tr)
    assert re.search(r'<td class="best">0\.2327', row)


def test_a_control_that_training_harmed_is_loud(tmp_path: Path) -> None:
    def interval(fvu: list[float], delta_ce: list[float]) -> Callable[[dict[str, Any]], None]:
        return lambda files: files["metrics"].update(control_minus_teacher={"fvu": fvu, "delta_ce": delta_ce})

    better = one(tmp_path / "better", "relu", interval([-0.03, -0.04, -0.02], [0.0, -0.01, 0.01]))
    assert "worse than the frozen teacher" not in better + one(tmp_path / "unknown", "relu")
    text = words(one(tmp_path / "worse", "relu", interval([0.022, 0.02, 0.024], [0.031, 0.02, 0.04])))
    assert "! The control is worse than the frozen teacher (FVU +2.2% and ΔCE +0.031 nats)" in text


@pytest.mark.parametrize(("ratio", "matched"), [(1.0099, True), (0.9901, True), (1.0101, False), (0.9899, False)])
def test_l0_is_matched_within_one_percent(tmp_path: Path, ratio: float, matched: bool) -> None:
    def scale(files: dict[str, Any]) -> None:
        files["metrics"]["rsae"]["l0"] = ratio * files["metrics"]["control"]["l0"]

    comparison = compare(read_run(make_run(tmp_path, "relu", scale)), "control")
    assert comparison is not None
    assert comparison.matched is matched


def test_best_of_each_metric_is_marked(tmp_path: Path) -> None:
    html = one(tmp_path, "topk")
    rows = re.findall(r'<tr><th scope="row">(\w[\w ]*)(?:&nbsp;|<)(.*?)</tr>', html, re.S)
    best = {label: marked for label, row in rows if (marked := re.findall(r'<td class="best">([^<]*)', row))}
    assert best["FVU"] == ["0.1581"]
    assert best["Alive"] == ["95.83"]
    assert best["ΔCE"] == ["0.1195"]  # the control's
    assert "L0" not in best


def test_teacher_outcome_follows_its_interval(tmp_path: Path) -> None:
    def mixed(files: dict[str, Any]) -> None:
        files["metrics"]["rsae_minus_teacher"] = {"fvu": [0.02, -0.01, 0.05], "delta_ce": [0.02, 0.01, 0.03]}

    comparison = compare(read_run(make_run(tmp_path, "relu", mixed)), "teacher")
    assert comparison is not None
    assert [line.outcome for line in comparison.differences[:2]] == ["tie", "loss"]


def test_what_ran(demo: Path) -> None:
    text = words(demo.read_text(encoding="utf-8"))
    for expected in (
        "package:gemma3-270m",
        "blocks.9.hook_resid_post",
        "agnews, imdb",
        "BOS 0.39%",
        "attention sinks 0.12%",
        "train 1,500,000",
        "640 → 5,120",
        "adam.beta1 0.9",
        "evaluation 0 · fine-tuning 0",
        "torch 2.9.0",
        "3f2a9c1d7b8e4f60",
        "cores 2",
        "5.31 GB",
        "3 min 32 s",
        "rsae demo --out runs/demo",
        "JumpReLU and TopK: degree (9, 8)",
    ):
        assert expected in text, expected


# What the page is made of


def test_tags_balance_and_figures_have_alt_texts(demo: Path) -> None:
    page = Page(demo.read_text(encoding="utf-8"))
    charts = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "chart"]
    assert len(charts) == 18
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.elements if tag == "th")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs["aria-labelledby"] in ids for _, attrs in page.elements if "aria-labelledby" in attrs)


def test_nothing_comes_from_the_network_and_nothing_runs(demo: Path) -> None:
    html = demo.read_text(encoding="utf-8")
    page = Page(html)
    for tag, attrs in page.elements:
        assert tag not in ("script", "iframe", "object", "embed", "img")
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:,")), (tag, name, attrs[name])
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert len(html) < 600_000


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(demo: Path, scheme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for lines of charts."""
    blocks = re.findall(r":root \{([^}]*--page[^}]*--ink[^}]*)\}", demo.read_text(encoding="utf-8"))
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[scheme]))
    text = [(ink, back) for ink in ("ink", "soft") for back in ("page", "card")] + [("ink", "best")]
    text += [(name, f"{name}-back") for name in ("win", "tie", "loss", "warn")] + [("rsae", "page")]
    lines = [(arm, back) for arm in ("teacher", "control", "init", "rsae", "soft") for back in ("card", "hist")]
    for pairs, least in ((text, 4.5), (lines, 3.0)):
        for front, back in pairs:
            low, high = sorted((luminance(colours[front]), luminance(colours[back])))
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"

    def named(files: dict[str, Any]) -> None:
        files["run"]["name"] = files["run"]["command"] = files["run"]["host"] = evil
        files["run"]["finetune"] = {evil: evil}
        files["run"]["seconds"] = {evil: 1.0}
        files["metrics"]["sources"] = [evil]
        files["metrics"]["counting_rule"] = evil
        files["gate"]["x_label"] = f'{evil} " onload="x'

    html = one(tmp_path, "relu", named)
    assert "<script" not in html
    assert 'onload="' not in html
    assert Page(html).text.count(evil) >= 7


# What is missing


def test_no_control(tmp_path: Path) -> None:
    def without(files: dict[str, Any]) -> None:
        for key in ("control", "rsae_minus_control", "verdict"):
            del files["metrics"][key]

    text = words(one(tmp_path, "relu", without))
    assert "No control was measured, so a gain over the teacher may be the extra training alone." in text
    assert "Reconstruction: no verdict (no control)." in text
    assert "RSAE − frozen teacher" in text


def test_runs_with_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place, "topk") for place in ("one", "other")]
    page = write_report([*runs, make_run(tmp_path, "relu")], tmp_path / "report.html").read_text()
    for run in runs:
        assert f"<h2>TopK in {run}</h2>" in re.sub(r' id="[^"]*"', "", page)
    assert "<h2>ReLU</h2>" in re.sub(r' id="[^"]*"', "", page)


def test_optional_files_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    for name in ("run.json", "gate.json", "control/log.jsonl", "rsae/log.jsonl"):
        (folder / name).unlink()
    metrics = json.loads((folder / "metrics.json").read_text())
    for arm in ("teacher", "control", "init", "rsae"):
        del metrics[arm]["histograms"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = words(write_report([folder], tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "run.json is missing" in text
    assert "gate.json is missing" in text
    assert "No training curves" in text
    assert "No histograms" in text
    assert "package:gemma3-270m" in text  # from metrics.json


def test_null_values(tmp_path: Path) -> None:
    def null(files: dict[str, Any]) -> None:
        for arm in ("teacher", "control", "init", "rsae"):
            files["metrics"][arm] |= {"delta_ce": None, "loss_recovered": None, "kl": None}
        files["metrics"]["control"]["mse"] = None
        files["metrics"]["rsae_minus_control"]["delta_ce"] = None
        files["metrics"]["rsae_minus_teacher"]["delta_ce"] = [None, None, None]
        files["gate"]["arms"]["rsae"][3] = None
        files["run"]["peak_memory_gb"] = files["run"]["target_l0"] = None

    html = one(tmp_path, "relu", null)
    text = words(html)
    assert "Language-model loss: not measured." in text
    assert "the language model's loss is not compared" in text
    assert "4,214–4,215" in text.replace(" ", "").replace("best", "")  # teacher, no control, init
    assert "nan" not in re.sub(r"<[^>]*>", "", html).lower()


def test_metrics_missing_names_the_file_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/metrics\.json does not exist: `rsae evaluate` writes it"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "{", r"metrics\.json is not valid JSON"),
        ("metrics.json", "[]", r"metrics\.json holds a list, expected an object"),
        ("metrics.json", '{"teacher": {}}', r"has no arm 'rsae' \(its keys: \['teacher'\]\)"),
        ("run.json", "3", r"run\.json holds a int"),
        ("rsae/log.jsonl", '{"a": 1}\n{\n{"a": 2}\n', r"log\.jsonl, line 2, is not valid JSON"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = make_run(tmp_path)
    (folder / name).write_text(content)
    (tmp_path / "report.html").write_text("the old one")
    with pytest.raises(ValueError, match=message):
        write_report([folder], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "the old one"


def test_a_last_log_line_cut_short_is_dropped(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    whole = (folder / "rsae" / "log.jsonl").read_text()
    (folder / "rsae" / "log.jsonl").write_text(whole + '{"step": 97')
    assert len(read_run(folder).logs["rsae"]) == 977


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report([make_run(tmp_path)], tmp_path)


# Numbers and charts, by hand


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fixed(-1234567.891, 1), "−1,234,567.9"),
        (fixed(-0.0004, 2), "0.00"),
        (fixed(0.0, 1, sign=True), "0.0"),
        (fixed(0.126, 2, sign=True), "+0.13"),
        (fixed(None, 2), "–"),
        (significant(0.0012345), "0.00123"),
        (significant(31.97, 4), "31.97"),
        (significant(12345.6), "12,346"),
        (significant(0.0), "0.00"),
        (percent(0.97168, 2), "97.17%"),
        (percent(None), "–"),
        (short(1_500_000), "1.5M"),
        (short(250_000), "250K"),
        (short(999_700), "1M"),
        (short(0.0), "0"),
        (duration(8.31), "8.3 s"),
        (duration(59.99), "60.0 s"),
        (duration(125), "2 min 05 s"),
        (duration(4800), "1 h 20 min"),
        (duration(None), "–"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-1.0, 3.0, [-1.0, 0.0, 1.0, 2.0, 3.0]),
        (0.171, 0.244, [0.18, 0.2, 0.22, 0.24]),
        (1024.0, 1_000_448.0, [2e5, 4e5, 6e5, 8e5, 1e6]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_headline_counts_every_run_once(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path, family)) for family in LEVELS]
    for _, said in headline(runs):
        assert sum(len(re.findall(rf"\b{name}\b", said)) for name in ("ReLU", "JumpReLU", "TopK")) == 3


def test_charts_lie_inside_their_frame(tmp_path: Path) -> None:
    for family in LEVELS:
        run = read_run(make_run(tmp_path, family))
        figures = [*gate_figures(run), *training_figures(run), *histogram_figures(run)]
        assert len(figures) == 6
        for figure in figures:
            left, right, top, bottom = figure.box
            for _, path in figure.paths:
                points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
                assert points
                assert all(left <= x <= right and top <= y <= bottom for x, y in points)
            assert 2 <= len(figure.x_ticks) <= 8
            assert 2 <= len(figure.y_ticks) <= 8
            assert len({text for _, text in figure.y_ticks}) == len(figure.y_ticks)


def test_l0_histogram_is_percent_per_integer(tmp_path: Path) -> None:
    """Bins of width 2 holding all tokens evenly over L0 = 10..13: 25% at each, drawn from 9.5 to 13.5."""

    def even(files: dict[str, Any]) -> None:
        for arm in ("teacher", "control", "init", "rsae"):
            histogram = {"edges": [8, 10, 12, 14], "counts": [0, 50, 50]}
            files["metrics"][arm]["histograms"]["l0"] = histogram

    figure = histogram_figures(read_run(make_run(tmp_path, "relu", even)))[0]
    assert "RSAE 25.0" in figure.columns[len(figure.columns) // 2][2]
    left, right, _, _ = figure.box
    xs = [float(point.split()[0]) for point in re.split("[ML]", figure.paths[0][1])[1:]]
    assert (max(xs) - min(xs)) / (right - left) == pytest.approx(4 / 8, abs=0.01)  # 2 of margin on both sides


def test_what_is_not_counted_is_in_no_chart_of_l0(tmp_path: Path) -> None:
    """Of the paper's dense gate nearly all latents are active: beside it nothing else could be read."""

    def dense(files: dict[str, Any]) -> None:
        files["metrics"]["rsae_dense"] = files["metrics"]["rsae"]

    run = read_run(make_run(tmp_path, "relu", dense))
    of_training = {figure.title: figure for figure in training_figures(run)}
    assert "RSAE" not in str(of_training["L0 while training"].columns)
    assert "nothing is counted while it trains" in of_training["L0 while training"].note
    assert "RSAE" in str(of_training["FVU while training"].columns)
    assert "nothing zeroed" not in str(histogram_figures(run)[0].columns)


def test_nothing_to_draw() -> None:
    assert chart("empty", [], x_label="x") is None


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def chromium(tmp_path: Path, page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    names = ("gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage")
    quiet = [f"--user-data-dir={tmp_path / 'profile'}", *(f"--disable-{name}" for name in names)]
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars", *quiet, *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_browser_shows_it_on_a_phone_without_errors_or_sideways_scroll(tmp_path: Path, demo: Path) -> None:
    # A frame of 360 px, since headless windows are no narrower than 500; its page reports its own width.
    probe = tmp_path / "probe.html"
    script = (
        "frame.onload = () => {"
        " const page = frame.contentDocument;"
        " document.title = [page.documentElement.clientWidth, page.documentElement.scrollWidth,"
        " page.querySelectorAll('svg.chart').length].join(' '); }"
    )
    probe.write_text(
        f'<!DOCTYPE html><body><iframe id="frame" src="{demo.as_uri()}" style="width:360px;height:800px;border:0">'
        f"</iframe><script>{script}</script>"
    )
    flags = ("--enable-logging=stderr", "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    result = chromium(tmp_path, probe, *flags)
    width, scroll_width, charts = map(int, re.findall(r"<title>([\d ]+)</title>", result.stdout)[0].split())
    assert (width, charts) == (360, 18)
    assert scroll_width == 360
    assert "CONSOLE" not in result.stderr, result.stderr
