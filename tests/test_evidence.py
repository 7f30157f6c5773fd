"""The evidence grid: its cells, one cell end to end on a tiny random model, and the pages made of it."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from tiny_host import save_text, save_tiny

from rsae.artefacts import read_json
from rsae.finetune import JUMPRELU_EDGE
from rsae.hosts import load_host

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(not FOLDER.exists(), reason="benchmarks are not part of the source distribution"),
    pytest.mark.filterwarnings("ignore:.*the L0 asked for.*was not reached"),  # of tiny teachers after some steps
]


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The benchmark with a tiny host and text, two steps where it takes thousands, and folders of its own."""
    load("evidence_tables")
    bench = load("evidence")
    host, text = str(save_tiny(tmp_path / "host")), save_text(tmp_path / "text.jsonl")
    small = {"batch_size": 64, "checkpoint_every": 10}
    monkeypatch.setattr(bench, "LAYERS", {host: (0, 1, 1)})
    monkeypatch.setattr(bench, "TEXT", text)
    monkeypatch.setattr(bench, "BATCH", 64)
    monkeypatch.setattr(bench, "TEACHER", replace(bench.TEACHER, steps=20, **small))
    by_saelens = {"steps": 400, "batch_size": 64, "warm_up_steps": 2, "decay_steps": 5, "norm_batches": 3}
    monkeypatch.setattr(bench, "BATCHTOPK", bench.BATCHTOPK | by_saelens)
    monkeypatch.setattr(bench, "FINETUNE", replace(bench.FINETUNE, steps=5, **small))
    sizes = {
        "train_tokens": 1500,
        "validation_tokens": 400,
        "evaluation_tokens": 400,
        "ce_tokens": 200,
        "context_length": 16,
    }
    monkeypatch.setattr(bench, "DATA", replace(bench.DATA, **sizes))
    monkeypatch.setattr(bench, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench, "L0_TOLERANCE", 1.0)
    monkeypatch.setattr("rsae.evaluate.MATCHED", 1.0)
    (tmp_path / "README.md").write_text(
        f"# Title\n\n{sys.modules['benchmarks.evidence_tables'].MARKS[0]}\nold\n"
        f"{sys.modules['benchmarks.evidence_tables'].MARKS[1]}\nafter\n"
    )
    monkeypatch.setattr(bench, "grid", lambda: [bench.Cell(host, 1, family, 32, 0) for family in ("topk", "relu")])
    return bench


def call(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evidence", *arguments])
    bench.main()


def test_what_the_claims_stand_on():
    """Control and RSAE differ in what they start from, and by RATES; L0 may differ by 1%; which cells there are."""
    tables, bench = load("evidence_tables"), load("evidence")
    assert (bench.ARMS["control"], bench.ARMS["rsae"]) == (bench.Arm("teacher", {}), bench.Arm("init", {}))
    assert bench.L0_TOLERANCE == 0.01
    cells = bench.grid()
    assert len(cells) == len({cell.name for cell in cells}) == 47
    assert sum(cell.has_all_arms for cell in cells) == 6
    for family in ("gated", "batchtopk"):
        found = sorted((cell.host[8:13], cell.layer) for cell in cells if cell.family == family)
        assert found == [("gemma", 9), ("smoll", 15)]
    assert [(cell.family, cell.layer, cell.expansion * 640) for cell in cells if cell.expansion != 8] == [
        ("topk", 9, 16_000)
    ]
    for layer, host in ((3, "gemma3-270m"), (14, "gemma3-270m"), (5, "smollm2-135m"), (25, "smollm2-135m")):
        assert sum(cell.layer == layer and cell.host.endswith(host) for cell in cells) == 3
    cell = {
        "host": "package:smollm2-135m",
        "family": "jumprelu",
        "target_l0": 64,
        "seed": 0,
        "expansion": 8,
        "hook": "blocks.15.hook_resid_post",
    }
    assert tables._chosen_on(cell)
    assert tables._chosen_on(cell | {"seed": 1})  # of the same documents
    for change in (
        {"hook": "blocks.5.hook_resid_post"},
        {"expansion": 25},
        {"family": "gated"},
        {"host": "package:gemma3-270m", "family": "topk"},
    ):
        assert not tables._chosen_on(cell | change)


def test_the_grid_is_the_one_that_was_promised():
    load("evidence_tables")
    cells = load("evidence").grid()
    assert len({cell.name for cell in cells}) == len(cells)
    for host, layer in (("package:smollm2-135m", 15), ("package:gemma3-270m", 9)):
        for family in ("relu", "jumprelu", "topk"):
            ours = [
                (c.l0, c.seed) for c in cells if (c.host, c.layer, c.family, c.expansion) == (host, layer, family, 8)
            ]
            assert sorted(ours) == [(16, 0), (32, 0), (32, 1), (32, 2), (64, 0)]


def test_rates_that_the_control_is_best_with():
    """All arms have its rate of the weights, it alone that of its own thresholds, and cells of other rates are other cells."""
    bench, tables = sys.modules.get("benchmarks.evidence") or load("evidence"), load("evidence_tables")
    fast = bench.Cell("package:gemma3-270m", 9, "jumprelu", 32, 0)
    plain = replace(fast, family="topk")
    assert bench.fine_tuning(fast).lr == 2e-3
    assert bench.fine_tuning(plain) == bench.FINETUNE
    assert bench.change(fast, "control") == {"gate_lr": 3e-3}
    assert bench.change(fast, "rsae") == {"surrogate": JUMPRELU_EDGE}
    assert bench.change(plain, "rsae") == bench.change(plain, "control") == {}
    without_crowds = {"surrogate": replace(JUMPRELU_EDGE, crowding=0.0, sparing=0.0), "gate_lr": 3e-3}
    assert bench.change(fast, "threshold_uncrowded") == bench.ARMS["threshold_uncrowded"].change | without_crowds
    assert bench.settings(fast)["arms"]["control"]["change"] == {"gate_lr": 3e-3}
    settings = {cell.setting: bench.settings(cell) for cell in (plain, replace(plain, layer=3), fast)}
    said = "0.002 and 0.003 for the control's thresholds: gemma3-270m layer-9 jumprelu"
    assert tables._other_rates({"settings": settings}) == said


def test_a_teacher_of_another_loop(bench, monkeypatch, tmp_path):
    """SAELens' own BatchTopK: its loop, its scale, its threshold; trained once, and never taken for one of other settings."""
    (cell,) = (c for c in bench.grid() if c.family == "topk")
    cell = replace(cell, family="batchtopk", l0=8)
    monkeypatch.setattr(bench, "grid", lambda: [cell])
    call(bench, monkeypatch, "--arms")
    (found,) = read_json(tmp_path / "results" / "evidence.json")["cells"]
    assert found["family"] == "batchtopk"
    assert not found["failed"]
    folder = tmp_path / "runs" / cell.name / "teacher"
    teacher = SAE.load_from_disk(folder)
    assert teacher.cfg.architecture() == "jumprelu"
    assert bool((teacher.threshold == teacher.threshold[0]).all())
    assert teacher.threshold[0] > 0
    assert teacher.cfg.metadata.model_name == cell.host
    assert 4 < found["arms"]["teacher"]["l0"] < 16  # k on average, by a threshold that follows
    monkeypatch.setattr(bench, "BATCHTOPK", bench.BATCHTOPK | {"lr": 1e-4})
    with pytest.raises(ValueError, match=r"was trained otherwise.*0\.0001"):
        call(bench, monkeypatch, "--arms")


def test_a_cell_from_end_to_end(bench, monkeypatch, tmp_path):
    call(bench, monkeypatch, "--only", "topk")
    evidence = read_json(tmp_path / "results" / "evidence.json")
    assert evidence["shared_documents"] == 0
    (cell,) = evidence["cells"]
    assert {"host", "hook", "family", "d_sae", "target_l0", "seed", "train_tokens", "rsae_minus_teacher"} <= set(cell)
    assert set(cell["arms"]) == {"teacher", "init", *bench.ARMS, "paper_hardened"}
    assert cell["arms"]["init"]["fvu"] == pytest.approx(cell["arms"]["teacher"]["fvu"], rel=1e-4)
    assert cell["arms"]["paper"]["l0"] > 3 * cell["arms"]["paper_hardened"]["l0"]
    assert cell["arms"]["scale_only"]["l0"] == pytest.approx(cell["arms"]["teacher"]["l0"], rel=1e-6)
    for arm in set(cell["arms"]) - {"control"}:
        assert len(cell[f"{arm}_minus_control"]["fvu"]) == 3
    mean, low, high = cell["rsae_minus_control"]["fvu"]
    assert low <= mean <= high
    expected = cell["arms"]["rsae"]["fvu"] / cell["arms"]["control"]["fvu"] - 1
    assert mean == pytest.approx(expected, rel=1e-6)
    assert set(cell["verdict"]) == {"fvu", "delta_ce", "alive", "dense"}
    assert not cell["failed_arms"]

    weights = next((tmp_path / "runs").rglob("rsae/sae_weights.safetensors"))
    before = weights.stat().st_mtime_ns
    call(bench, monkeypatch)  # adds the other cell, and leaves this one alone
    again = read_json(tmp_path / "results" / "evidence.json")
    assert [cell["family"] for cell in again["cells"]] == ["topk", "relu"]
    assert again["cells"][0] == cell
    added = {cell["family"]: cell["cost"]["scalars_added"] for cell in again["cells"]}
    shape = sum((9 + 1, 8)) + 2  # coefficients, and C_in, C_out
    assert added["topk"] == cell["d_sae"] + shape  # and a threshold for each latent
    assert added["relu"] == cell["d_sae"] + sum((3 + 1, 2)) + 2
    assert weights.stat().st_mtime_ns == before

    with monkeypatch.context() as patch:
        patch.setattr(bench, "probe", lambda *_, **__: {"arms": {}, "rsae_minus_control": {}})
        for arm in ("teacher", "rsae"):
            weights = next((tmp_path / "runs").rglob(f"topk*/{arm}/sae_weights.safetensors"))
            original = weights.read_bytes()
            weights.write_bytes(b"another's")
            with pytest.raises(ValueError, match="not those that were measured"):
                call(bench, monkeypatch, "--probe", "--only", "topk")
            weights.write_bytes(original)
        call(bench, monkeypatch, "--probe", "--only", "topk")
        assert "probing" in read_json(tmp_path / "results" / "evidence.json")["cells"][0]

    auc = {arm: {"1": {"auc": [0.5 + i / 8, 0.01]}} for i, arm in enumerate(("teacher", "control", "rsae"))}
    again["cells"][0]["probing"] = {
        "arms": auc,
        "rsae_minus_control": {"1": {"auc": [0.125, 0.1, 0.15], "verdict": "win"}},
    }
    (tmp_path / "results" / "evidence.json").write_text(json.dumps(again))
    call(bench, monkeypatch, "--tables")
    page = (tmp_path / "results" / "EVIDENCE.md").read_text()
    assert "| 1 | 0.5000 ± 0.0100 | 0.6250 ± 0.0100 | 0.7500 ± 0.0100 | +0.1250 [+0.1000, +0.1500] win |" in page
    assert f"{mean:+.2%}" in page
    assert page.count("| topk |") >= 3
    assert next((tmp_path / "results").glob("evidence-*.svg")).read_text().startswith("<svg")
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("# Title\n")
    assert readme.endswith("after\n")
    assert "old" not in readme
    assert f"| topk | 1 | {mean:+.2%} [{low:+.2%}, {high:+.2%}] |" in readme
    assert "2 of 2 cells" in readme

    topk, *others = again["cells"]
    (tmp_path / "results" / "evidence.json").write_text(
        json.dumps(again | {"cells": [topk | {"settings": "others"}, *others]})
    )
    call(bench, monkeypatch, "--tables")
    assert "| topk |" not in (tmp_path / "README.md").read_text()


def test_what_another_loop_measured_is_measured_again(bench, monkeypatch, tmp_path):
    """Of the control, the whole cell; of an arm that few cells have, that arm alone is out of the tables until then."""
    (cell,) = (cell for cell in bench.grid() if cell.family == "topk")
    call(bench, monkeypatch, "--only", "topk")
    done = bench.known(cell)
    says = sys.modules["benchmarks.evidence_tables"].SAYS
    page = tmp_path / "results" / "EVIDENCE.md"
    assert all(says[arm] in page.read_text() for arm in ("paper", "paper_hardened", "threshold_uncrowded"))
    assert bench.is_measured(cell, cell.arms, done)
    with monkeypatch.context() as patch:
        patch.setattr(bench.TopKTrainee, "loop", 99)
        assert not bench.is_measured(cell, bench.MAIN, done)
        call(bench, monkeypatch, "--tables")
        assert "| topk |" not in page.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(bench.DenseTrainee, "loop", 99)
        assert bench.is_measured(cell, bench.MAIN, done)
        assert not bench.is_measured(cell, cell.arms, done)
        call(bench, monkeypatch, "--tables")
        assert says["threshold_uncrowded"] in page.read_text()
        assert says["paper"] not in page.read_text()
        assert says["paper_hardened"] not in page.read_text()
    monkeypatch.setitem(bench.ARMS, "new", bench.Arm("init", {"alpha": 0.5}))
    assert bench.is_measured(cell, bench.MAIN, done)
    assert not bench.is_measured(cell, cell.arms, done)


def test_arms_are_added_to_those_that_a_cell_has(bench, monkeypatch, tmp_path):
    def has(*arms):
        call(bench, monkeypatch, "--only", "topk", "--arms", *arms)
        (cell,) = read_json(tmp_path / "results" / "evidence.json")["cells"]
        return set(cell["arms"]) - {"teacher", "init"}

    assert has("scale_only") == {*bench.MAIN, "scale_only"}
    with monkeypatch.context() as patch:
        patch.setattr(bench, "pretrain", lambda *_, **__: pytest.fail("measured again, with nothing new"))
        assert has() == {*bench.MAIN, "scale_only"}
    assert has("gate_only") == {*bench.MAIN, "scale_only", "gate_only"}


def test_a_cell_whose_l0_missed_gets_its_other_arms(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "L0_TOLERANCE", -1.0)
    call(bench, monkeypatch, "--arms", "--only", "topk")
    (cell,) = read_json(tmp_path / "results" / "evidence.json")["cells"]
    assert cell["failed"]
    assert set(cell["arms"]) == {"teacher", *bench.MAIN}
    call(bench, monkeypatch, "--only", "topk")
    (cell,) = read_json(tmp_path / "results" / "evidence.json")["cells"]
    assert cell["failed"]
    assert set(bench.ARMS) <= set(cell["arms"])


def test_arms_that_are_apart_in_l0_are_matched_on_the_text_they_are_measured_on(bench, monkeypatch, tmp_path):
    """What they measured as trained stays beside it."""

    def call_with(tolerance):
        monkeypatch.setattr(bench, "L0_TOLERANCE", tolerance)
        call(bench, monkeypatch, "--arms", "--only", "topk")
        (cell,) = read_json(tmp_path / "results" / "evidence.json")["cells"]
        return cell

    def forget():
        (tmp_path / "results" / "evidence.json").unlink()

    plain = call_with(1.0)
    gap = max(l0s := [plain["arms"][arm]["l0"] for arm in ("teacher", *bench.MAIN)]) / min(l0s) - 1
    assert plain["as_trained"] is None
    assert gap > 0.005  # or there is nothing to show
    forget()
    cell = call_with(0.005)
    was, now = cell["as_trained"], cell["arms"]
    assert was["gap"] == pytest.approx(gap)
    assert was["arms"] == {arm: plain["arms"][arm] for arm in bench.MAIN}
    assert was["rsae_minus_control"] == plain["rsae_minus_control"] != cell["rsae_minus_control"]
    assert now["teacher"] == plain["arms"]["teacher"]
    for arm in bench.MAIN:
        assert now[arm]["l0"] == pytest.approx(now["teacher"]["l0"], rel=0.005)
    assert not cell["failed"]
    assert "failed" not in cell["verdict"].values()
    page = (tmp_path / "results" / "EVIDENCE.md").read_text()
    assert "## Matched on the text they are measured on" in page
    assert f"{gap:.1%}" in page


def test_several_calls_share_the_grid(bench, monkeypatch, tmp_path):
    relu = next(cell for cell in bench.grid() if cell.family == "relu")
    measure = bench.attempt

    def meanwhile(cell, *arguments):
        with bench.locked(bench.RUNS / cell.name, wait=False) as free:
            assert not free  # another call would leave this cell alone
        found = measure(cell, *arguments)
        bench.record(relu, found | {"family": "relu"})  # another call has finished a cell
        return found

    monkeypatch.setattr(bench, "attempt", meanwhile)
    with bench.locked(bench.RUNS / relu.name):  # which it is still at work on, as far as this one can tell
        call(bench, monkeypatch, "--arms")
    cells = read_json(tmp_path / "results" / "evidence.json")["cells"]
    assert [cell["family"] for cell in cells] == ["topk", "relu"]


def test_an_arm_that_diverges_does_not_take_the_cell_with_it(bench, monkeypatch, tmp_path):
    train = bench.finetune

    def diverge(*arguments, name, **others):
        if name.endswith("scale_only"):
            raise bench.NotFinite("scale_only: the loss is nan at step 10")
        return train(*arguments, name=name, **others)

    monkeypatch.setattr(bench, "finetune", diverge)
    call(bench, monkeypatch, "--only", "topk")
    (cell,) = json.loads((tmp_path / "results" / "evidence.json").read_text())["cells"]
    assert set(cell["failed_arms"]) == {"scale_only"}
    assert set(cell["arms"]) == {"teacher", "init", *bench.ARMS, "paper_hardened"} - {"scale_only"}
    assert cell["verdict"]["fvu"] in ("win", "tie", "loss")
    monkeypatch.setattr(bench, "attempt", lambda *_: pytest.fail("measured again, for an arm that is known to fail"))
    call(bench, monkeypatch, "--only", "topk")


def test_a_cell_that_cannot_be_run_stands_in_the_table(bench, monkeypatch, tmp_path):
    def diverge(*_, **__):
        raise bench.NotFinite("rsae: the loss is nan at step 10")

    monkeypatch.setattr(bench, "finetune", diverge)
    call(bench, monkeypatch, "--only", "relu")
    (cell,) = json.loads((tmp_path / "results" / "evidence.json").read_text())["cells"]
    assert cell["failed"] == "rsae: the loss is nan at step 10"
    assert cell["arms"] == {}
    page = (tmp_path / "results" / "EVIDENCE.md").read_text()
    assert "the loss is nan" in page
    assert "| fvu | 0 | 0 | 0 | 1 |" in page


def test_a_jumprelu_from_the_start_beside_the_rsae_from_a_relu(bench):
    say = sys.modules["benchmarks.evidence_tables"]._from_scratch
    place = {"host": "h", "hook": "b", "expansion": 8, "target_l0": 32, "seed": 0}
    relu = {**place, "family": "relu", "arms": {"rsae": {"fvu": 0.11, "delta_ce": 0.3}}}
    jump = {**place, "family": "jumprelu", "arms": {"control": {"fvu": 0.10, "delta_ce": 0.4}}}
    other = {**jump, "seed": 1, "arms": {"control": {"fvu": 0.5, "delta_ce": 0.1}}}
    assert say([jump]) == say([relu, other]) == ""
    said = say([relu, jump, other])
    assert (
        "lower FVU than that RSAE in 1 of 1 places, and a lower delta-CE in 0; the RSAE's FVU is +10.0% to +10.0% beside"
        in said
    )


def test_times_that_are_too_short_to_compare_are_left_out(bench):
    say = sys.modules["benchmarks.evidence_tables"]._slower
    cells = [
        {"cost": {"seconds": {"control": c, "rsae": r}}} for c, r in ((0.0, 0.1), (2.0, 3.0), (1.0, 1.0), (1.0, 2.0))
    ]
    assert "1.50 times as long as its control's in the median of the cells (1.00 to 2.00" in say(cells)
    assert say(cells[:1]) == ""


def test_arms_too_far_apart_in_l0_have_failed(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "L0_TOLERANCE", -1.0)
    call(bench, monkeypatch, "--only", "relu")
    (cell,) = json.loads((tmp_path / "results" / "evidence.json").read_text())["cells"]
    assert "apart" in cell["failed"]
    assert "rsae" in cell["arms"]
    assert set(cell["verdict"].values()) == {"failed"}
    assert "| relu |" not in (tmp_path / "README.md").read_text()  # no headline of a cell that has failed
    assert bench.is_measured(bench.grid()[1], bench.MAIN, cell)
    assert not bench.is_measured(bench.grid()[1], bench.MAIN, cell | {"as_trained": None})  # from before it was tried
    assert "| fvu | 0 | 0 | 0 | 1 |" in (tmp_path / "results" / "EVIDENCE.md").read_text()


def test_activations_are_read_once_for_all_hooks(bench, monkeypatch, tmp_path):
    host, asked = load_host(str(save_tiny(tmp_path / "again"))), []
    run = host.activations_at

    def activations_at(tokens, hooks):
        asked.append(hooks)
        return run(tokens, hooks)

    monkeypatch.setattr(host, "activations_at", activations_at)
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    for _ in range(2):  # another process finds them too
        activations = bench.remembered(host, {hook: tmp_path / hook for hook in hooks})
        for hook in hooks:
            for tokens in torch.arange(48).view(2, 2, 12):
                found = activations(tokens, hook)
                assert found.dtype == host.dtype
                assert torch.equal(found, run(tokens, [hook])[hook])
    assert asked == [hooks, hooks]


def test_ablations_are_run_once_for_the_same_tokens(bench, monkeypatch, tmp_path):
    host, asked = load_host(str(save_tiny(tmp_path / "again")), dtype=torch.float32), []
    run, hook = host.token_losses, "blocks.1.hook_resid_post"

    def token_losses(tokens, hook, edits):
        asked.append(set(edits))
        return run(tokens, hook, edits)

    monkeypatch.setattr(host, "token_losses", token_losses)
    first, second = torch.arange(24).view(2, 12), torch.arange(24, 48).view(2, 12)
    for i, (tokens, mean) in enumerate([(first, 0.5), (first, 0.5), (second, 0.5), (first, 0.25)]):
        losses = bench.with_ablations_remembered(host, {hook: tmp_path})  # another process finds them too
        edits = {
            "zero": torch.zeros_like,
            "mean": lambda x, mean=mean: torch.full_like(x, mean),
            "arm": lambda x, i=i: (1 - 0.1 * i) * x,
        }
        found, expected = losses(tokens, hook, edits), run(tokens, hook, edits)
        assert set(found) == set(expected)
        for name, (nll, kl) in expected.items():
            torch.testing.assert_close(found[name].nll, nll)
            torch.testing.assert_close(found[name].kl, kl)
    assert asked == [{"zero", "mean", "arm"}, {"arm"}, {"zero", "mean", "arm"}, {"mean", "arm"}]
