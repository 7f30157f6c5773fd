"""The whole road on a tiny random model: what it leaves, that it resumes, and what it refuses before it writes."""

import json
import os
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from launch import torchrun
from sae_lens import SAE
from tiny_host import save_text, save_tiny

from rsae import cli, hosts, pipeline
from rsae import text as text_module
from rsae.artefacts import read_json, write_json
from rsae.finetune import FinetuneConfig
from rsae.hosts import load_host
from rsae.pipeline import ARMS, UpgradeConfig, demo, evaluate_folder, upgrade, upgrade_all
from rsae.report import write_report
from rsae.sae import RationalSAE

# SAEs that were trained for seconds on a random model read nothing as they should
pytestmark = pytest.mark.filterwarnings("ignore:preflight of:UserWarning")

HOOK = "blocks.1.hook_resid_post"
CONFIG = UpgradeConfig(
    train_tokens=1500,
    validation_tokens=400,
    evaluation_tokens=400,
    ce_tokens=200,
    context_length=16,
    finetune=FinetuneConfig(steps=12, batch_size=64, checkpoint_every=5),
)
TEACHER = FinetuneConfig(steps=20, batch_size=64, target_l0=4.0, penalty=0.5)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("host")))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def demo_run(host, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    results = demo(out, host=host, hook=HOOK, text=text, config=CONFIG, teacher=TEACHER)
    return out, results


def test_demo_leaves_what_it_promises(demo_run):
    out, results = demo_run
    assert (out / "report.html").read_text().startswith("<!")
    for family in ("relu", "jumprelu", "topk"):
        metrics = read_json(out / family / "metrics.json")
        assert metrics == results[family]
        architectures = [SAE.load_from_disk(out / family / arm).cfg.architecture() for arm in ARMS]
        teacher = {"relu": "standard"}.get(family, family)
        assert architectures == [teacher, teacher, "rational", "rational"]
        for arm in ARMS:
            assert {
                "mse",
                "fvu",
                "l0",
                "alive",
                "dense",
                "ce_clean",
                "ce_spliced",
                "delta_ce",
                "loss_recovered",
                "kl",
            } <= set(metrics[arm])
            assert metrics[arm]["n_tokens"] > 300
            assert metrics[arm]["counting_rule"]
        # hard support starts as the teacher
        assert metrics["init"]["fvu"] == pytest.approx(metrics["teacher"]["fvu"], rel=1e-4)
        assert metrics["init"]["l0"] == pytest.approx(metrics["teacher"]["l0"], rel=1e-3)
        assert set(metrics["verdict"]) == {"fvu", "delta_ce", "alive", "dense"}
        for arm in ("control", "rsae"):
            rows = [json.loads(line) for line in (out / family / arm / "log.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == [5, 10, 12]
        assert read_json(out / family / "run.json")["done"]
        assert set(read_json(out / family / "gate.json")["arms"]) == {"teacher", "init", "rsae"}


def test_a_second_demo_runs_nothing_and_verifies(demo_run, host, text):
    out, results = demo_run
    calls = []
    again = demo(
        out, host=host, hook=HOOK, text=text, config=CONFIG, teacher=TEACHER, progress=lambda *a: calls.append(a)
    )
    assert again == results
    assert calls == []


def test_a_killed_demo_ends_with_the_same_weights(demo_run, host, text, tmp_path):
    def stop(stage, done, total):
        if stage == "jumprelu rsae" and done == 7:
            raise KeyboardInterrupt

    arguments = {"host": host, "hook": HOOK, "text": text, "config": CONFIG, "teacher": TEACHER}
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "run", **arguments, progress=stop)
    resumed = demo(tmp_path / "run", **arguments)
    for family in ("relu", "jumprelu", "topk"):
        for arm in ("teacher", "control", "init", "rsae"):
            name = f"{family}/{arm}/sae_weights.safetensors"
            assert (tmp_path / "run" / name).read_bytes() == (demo_run[0] / name).read_bytes(), name
        assert resumed[family]["rsae"] == demo_run[1][family]["rsae"]


def test_a_changed_file_is_noticed(demo_run, host, text):
    out, _ = demo_run
    file = out / "topk" / "rsae" / "sae_weights.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + b"x")
        with pytest.raises(ValueError, match=r"sae_weights\.safetensors is missing or has changed"):
            demo(out, host=host, hook=HOOK, text=text, config=CONFIG, teacher=TEACHER)
    finally:
        file.write_bytes(whole)


def test_a_finished_run_may_be_measured_again_but_not_lose_its_page(demo_run, host, text):
    out, results = demo_run
    page, metrics = out / "report.html", out / "topk" / "metrics.json"
    again = {"host": host, "hook": HOOK, "text": text, "config": CONFIG, "teacher": TEACHER}
    kept = page.read_bytes(), metrics.read_bytes()
    try:
        metrics.write_text(json.dumps(results["topk"] | {"config": {"tokens": 300}}))
        assert demo(out, **again)["topk"]["config"] == {"tokens": 300}
        page.unlink()
        with pytest.raises(ValueError, match=r"report\.html is missing"):
            demo(out, **again)
    finally:
        page.write_bytes(kept[0])
        metrics.write_bytes(kept[1])


def test_a_finished_run_that_lost_its_numbers_is_measured_again(demo_run, host, text, tmp_path):
    shutil.copytree(demo_run[0] / "relu", tmp_path / "relu")
    (tmp_path / "relu" / "metrics.json").unlink()
    store = next((demo_run[0] / "acts").glob("**/train"))
    found, _ = evaluate_folder(tmp_path / "relu", host, HOOK, text, store, tokens=300, ce_tokens=200, progress=None)
    assert json.loads((tmp_path / "relu" / "metrics.json").read_text()) == found


def test_a_run_without_activations_needs_a_store(demo_run, host, text, tmp_path):
    shutil.copytree(demo_run[0] / "relu", tmp_path / "relu")
    with pytest.raises(ValueError, match=r"no activations in .*: name a store of .* with --acts"):
        evaluate_folder(tmp_path / "relu", host, HOOK, text, None, tokens=200, ce_tokens=200, progress=None)


def test_a_page_about_several_runs_follows_when_one_is_measured_again(demo_run, host, text, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(demo_run[0], out)
    before = (out / "report.html").read_text()
    evaluate_folder(out / "relu", host, HOOK, text, out / "acts" / "train", tokens=200, ce_tokens=200, progress=None)
    after = (out / "report.html").read_text()
    assert after != before
    assert after == write_report([out / name for name in ("relu", "jumprelu", "topk")], tmp_path / "again").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degree": (8, 8)}, "p >= q"),
        ({"finetune": replace(CONFIG.finetune, frozen=("thresholds",))}, "no thresholds to freeze"),
        ({"finetune": replace(CONFIG.finetune, objective="l0", penalty=1.0)}, "objective"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    demo_run, host, text, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message):
        upgrade(demo_run[0] / "relu" / "teacher", host, HOOK, text, tmp_path / "run", config=replace(CONFIG, **change))
    assert not (tmp_path / "run").exists()


def test_upgrade_a_saelens_checkpoint_and_resume_after_a_kill(demo_run, host, text, tmp_path):
    teacher = demo_run[0] / "jumprelu" / "teacher"
    whole = upgrade(
        teacher, host, HOOK, text, tmp_path / "whole", config=CONFIG, trust=True
    )  # 20 steps make no good SAE

    def stop(stage, done, total):
        if "rsae" in stage and done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upgrade(teacher, host, HOOK, text, tmp_path / "killed", config=CONFIG, trust=True, progress=stop)
    resumed = upgrade(teacher, host, HOOK, text, tmp_path / "killed", config=CONFIG)
    weights = [(tmp_path / run / "rsae" / "sae_weights.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert resumed["rsae"]["fvu"] == whole["rsae"]["fvu"]
    assert (tmp_path / "killed" / "report.html").exists()
    assert read_json(tmp_path / "killed" / "preflight.json")["fingerprint"]


def test_a_killed_upgrade_goes_on_where_arithmetic_rounds_otherwise(demo_run, host, text, tmp_path, monkeypatch):
    """What another processor would find otherwise, by a little, is read from the run: its L0, and the fitted gate."""
    teacher = demo_run[0] / "jumprelu" / "teacher"

    def stop(stage, done, total):
        if "rsae" in stage and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upgrade(teacher, host, HOOK, text, tmp_path / "run", config=CONFIG, trust=True, progress=stop)
    init = (tmp_path / "run" / "init" / "sae_weights.safetensors").read_bytes()
    calibrate, mean_l0 = pipeline.calibrate, pipeline.mean_l0

    def calibrate_otherwise(sae, sample):
        sae = calibrate(sae, sample)
        with torch.no_grad():
            sae.gate.log_threshold += 1e-6
        return sae

    monkeypatch.setattr(pipeline, "calibrate", calibrate_otherwise)
    monkeypatch.setattr(pipeline, "mean_l0", lambda *arguments: mean_l0(*arguments) * (1 + 1e-7))
    results = upgrade(teacher, host, HOOK, text, tmp_path / "run", config=CONFIG)
    assert results["rsae"]["fvu"] > 0
    assert (tmp_path / "run" / "init" / "sae_weights.safetensors").read_bytes() == init


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_keeps_the_dtype_that_its_host_began_in(dtype, demo_run, host, text, tmp_path, monkeypatch):
    """Also where it goes on on a processor that would choose another; one that did not write it down was in bfloat16."""
    teacher, run = demo_run[0] / "jumprelu" / "teacher", tmp_path / "run"

    def stop(stage, done, total):
        if "control" in stage and done == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(hosts, "prefers_bfloat16", lambda: dtype == "bfloat16")
    with pytest.raises(KeyboardInterrupt):
        upgrade(teacher, host, HOOK, text, run, config=CONFIG, trust=True, progress=stop)
    monkeypatch.setattr(hosts, "prefers_bfloat16", lambda: dtype == "float32")
    if dtype == "bfloat16":
        about = read_json(run / "run.json")
        del about["host_dtype"]
        write_json(run / "run.json", about)
    metrics = upgrade(teacher, host, HOOK, text, run, config=CONFIG)
    assert read_json(run / "run.json")["host_dtype"] == dtype
    assert read_json(run / "acts" / "validation" / "meta.json")["config"]["dtype"] == dtype
    cli.evaluate(run)  # the command, by default at the run's own sizes
    assert read_json(run / "metrics.json")["rsae"] == metrics["rsae"]


def test_checkpoints_say_where_they_belong(demo_run, host, text, tmp_path):
    """SAELens puts no SAE into a model without: what the teacher says stands, the rest is what was read."""
    assert SAE.load_from_disk(demo_run[0] / "relu" / "rsae").cfg.metadata.prepend_bos is True
    teacher = SAE.load_from_disk(demo_run[0] / "topk" / "teacher")
    for name in ("model_name", "hook_name", "prepend_bos", "context_size"):
        delattr(teacher.cfg.metadata, name)
    teacher.cfg.metadata.model_name = "mine"
    teacher.save_model(tmp_path / "teacher")
    upgrade(tmp_path / "teacher", host, "model.layers.1", text, tmp_path / "run", config=CONFIG, trust=True)
    for arm in ARMS:
        about = SAE.load_from_disk(tmp_path / "run" / arm).cfg.metadata
        named = (about.model_name, about.hook_name, about.prepend_bos, about.context_size)
        assert named == ("mine", HOOK, True, CONFIG.context_length)


def test_several_teachers_share_one_harvest(demo_run, host, text, tmp_path):
    early = "blocks.0.hook_resid_post"
    teachers = [(demo_run[0] / family / "teacher", hook) for family, hook in (("topk", HOOK), ("jumprelu", early))]
    out = tmp_path / "all"
    results = upgrade_all(teachers, host, text, out, config=CONFIG, trust=True)
    assert list(results) == ["1-teacher", "2-teacher"]
    assert sorted(path.name for path in (out / "acts").iterdir()) == [early, HOOK]
    assert not (out / "1-teacher" / "acts").exists()
    assert (out / "report.html").exists()
    alone = upgrade(teachers[1][0], host, early, text, tmp_path / "alone", config=CONFIG, trust=True)
    assert results["2-teacher"]["rsae"] == alone["rsae"]
    assert results["1-teacher"]["rsae"] != alone["rsae"]
    calls = []
    again = upgrade_all(teachers, host, text, out, config=CONFIG, trust=True, progress=lambda *a: calls.append(a))
    assert again == results
    assert calls == []
    with pytest.raises(ValueError, match="no teacher to upgrade"):
        upgrade_all([], host, text, tmp_path / "none")


@pytest.mark.slow
def test_ranks_upgrade_as_one_process_does(demo_run, host, text, tmp_path):
    """Two shards of the latents; bfloat16 products round otherwise where their width differs, so nothing is exact."""
    teacher = demo_run[0] / "topk" / "teacher"
    code = f"""
from test_pipeline import CONFIG, HOOK
from rsae.mesh import Mesh
from rsae.pipeline import upgrade
arguments = {str(teacher)!r}, {host!r}, HOOK, {text!r}, {str(tmp_path / "ranks")!r}
print(sorted(upgrade(*arguments, config=CONFIG, trust=True, mesh=Mesh.of(2))))
"""
    done = torchrun(tmp_path, code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "1").read_text() == "[]\n"  # the first rank measures
    alone = upgrade(teacher, host, HOOK, text, tmp_path / "alone", config=CONFIG, trust=True)
    together = read_json(tmp_path / "ranks" / "metrics.json")
    for arm in ARMS:
        assert together[arm]["fvu"] == pytest.approx(alone[arm]["fvu"], rel=5e-3), arm
        assert together[arm]["l0"] == pytest.approx(alone[arm]["l0"], rel=5e-3), arm
    assert read_json(tmp_path / "ranks" / "run.json")["done"]
    assert (tmp_path / "ranks" / "report.html").exists()


def test_an_rsae_continues(demo_run, host, text, tmp_path):
    start = demo_run[0] / "topk" / "rsae"
    metrics = upgrade(start, host, HOOK, text, tmp_path / "run", config=CONFIG, trust=True)
    saes = {arm: SAE.load_from_disk(tmp_path / "run" / arm) for arm in ARMS}
    assert all(sae.cfg.architecture() == "rational" for sae in saes.values())
    assert metrics["init"]["fvu"] == metrics["teacher"]["fvu"]
    assert torch.equal(saes["control"].gate.num_coeffs, saes["teacher"].gate.num_coeffs)
    assert saes["control"].gate.alpha == saes["teacher"].gate.alpha
    assert not torch.equal(saes["rsae"].gate.num_coeffs, saes["teacher"].gate.num_coeffs)
    assert not torch.equal(saes["control"].W_dec, saes["teacher"].W_dec)


def test_the_paper_s_recipe_counts_as_many_as_is_asked(demo_run, host, text, tmp_path):
    config = replace(CONFIG, recipe="paper", finetune=replace(CONFIG.finetune, target_l0=2.0))
    metrics = upgrade(demo_run[0] / "relu" / "teacher", host, HOOK, text, tmp_path / "run", config=config, trust=True)
    assert metrics["control"]["l0"] == pytest.approx(2, rel=0.2)
    assert metrics["rsae"]["l0"] == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("family", ["relu", "topk"])
def test_the_paper_s_recipe_counts_as_many_latents_as_the_teacher(family, demo_run, host, text, tmp_path):
    config = replace(CONFIG, recipe="paper")
    run = tmp_path / "run"
    metrics = upgrade(demo_run[0] / family / "teacher", host, HOOK, text, run, config=config, trust=True)
    assert SAE.load_from_disk(run / "rsae").cfg.support == "dense"
    eps = metrics["config"]["eps"]
    assert set(eps) == {"init", "rsae"}
    assert min(eps.values()) > 0
    assert metrics["rsae_dense"]["l0"] > 0.9 * SAE.load_from_disk(run / "rsae").cfg.d_sae
    assert metrics["rsae"]["l0"] == pytest.approx(
        metrics["control"]["l0"], rel=0.2
    )  # matched on other text, of 400 tokens
    assert metrics["rsae"]["fvu"] != metrics["rsae_dense"]["fvu"]
    assert f"|z| > {eps['rsae']:g}" in metrics["counting_rule"]
    assert "RSAE, nothing zeroed" in (run / "report.html").read_text()
    assert "objective l1" in (run / "report.html").read_text()
    acts = {"tokens": 300, "ce_tokens": 200, "progress": None}
    again, _ = evaluate_folder(run, host, HOOK, text, run / "acts" / "train", **acts)
    assert again["rsae"]["n_tokens"] < metrics["rsae"]["n_tokens"]
    assert f"evaluation {again['rsae']['n_tokens']}" in (run / "report.html").read_text()
    # What the upgrade measured is kept, and is what it gives when it is called again
    assert upgrade(demo_run[0] / family / "teacher", host, HOOK, text, run, config=config, trust=True) == metrics
    assert again["config"]["eps"] == eps
    assert again["rsae"]["l0"] < again["rsae_dense"]["l0"]
    shutil.rmtree(run / "init")  # whoever is short of space
    without, _ = evaluate_folder(run, host, HOOK, text, run / "acts" / "train", **acts)
    assert without["rsae"] == again["rsae"]
    (run / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"no metrics\.json says what of it is counted"):
        evaluate_folder(run, host, HOOK, text, run / "acts" / "train", **acts)


class TestRefusals:
    """Each before anything is written or overwritten."""

    @pytest.fixture
    def teacher(self, demo_run):
        return demo_run[0] / "topk" / "teacher"

    def refused(self, message, *args, out):
        before = sorted(out.parent.rglob("*"))
        with pytest.raises(ValueError, match=message):
            upgrade(*args, out, config=CONFIG)
        assert sorted(out.parent.rglob("*")) == before

    def test_hook(self, teacher, host, text, tmp_path):
        self.refused(r"blocks\.1\.hook_resid_post", teacher, host, "blocks.1.hook_resid_pots", text, out=tmp_path / "o")

    def test_width(self, teacher, text, tmp_path_factory, tmp_path):
        wide = save_tiny(tmp_path_factory.mktemp("wide"), "llama-24")
        self.refused("d_in 16, the host .* d_model 24", teacher, str(wide), HOOK, text, out=tmp_path / "o")

    def test_teacher(self, host, text, tmp_path):
        self.refused("neither a folder", tmp_path / "none", host, HOOK, text, out=tmp_path / "o")

    def test_a_teacher_that_declares_the_wrong_convention(self, host, text, tmp_path):
        from test_preflight import near_identity

        near_identity(load_host(host), subtracts=True, declared=False).save_model(tmp_path / "teacher")
        message = "does not read as it declares: b_dec before the encoder: read as 'not subtracted'.*--trust"
        with pytest.raises(ValueError, match=message):
            upgrade(tmp_path / "teacher", host, HOOK, text, tmp_path / "o", config=CONFIG)
        assert [file.name for file in (tmp_path / "o").iterdir()] == ["preflight.json"]
        upgrade(tmp_path / "teacher", host, HOOK, text, tmp_path / "o", config=CONFIG, trust=True)
        assert "CONTRADICTED, and trusted" in (tmp_path / "o" / "report.html").read_text()

    def test_an_rsae_without_zeros(self, teacher, host, text, tmp_path):
        dense = RationalSAE.from_teacher(SAE.load_from_disk(teacher), support="dense")
        dense.save_model(tmp_path / "dense")
        self.refused("dense support.*--objective l1", tmp_path / "dense", host, HOOK, text, out=tmp_path / "o")

    def test_another_run_in_the_folder(self, demo_run, host, text):
        out = demo_run[0]
        before = (out / "run.json").read_bytes()
        with pytest.raises(ValueError, match="holds another run"):
            demo(out, host=host, hook=HOOK, text=text, config=replace(CONFIG, train_tokens=99), teacher=TEACHER)
        assert (out / "run.json").read_bytes() == before

    def test_a_folder_with_something_else(self, teacher, host, text, tmp_path):
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "thesis.tex").write_text("keep me")
        self.refused("not empty", teacher, host, HOOK, text, out=tmp_path / "o")


def test_a_text_with_too_few_documents_to_compare_over_is_found_before_the_harvest(
    demo_run, host, text, tmp_path, monkeypatch
):
    one = text_module.evaluation_contexts(load_host(host).tokenizer, text, n_tokens=400, context_length=16)
    monkeypatch.setattr(
        pipeline, "evaluation_contexts", lambda *_, **__: one._replace(documents=torch.zeros_like(one.documents))
    )
    with pytest.raises(ValueError, match="hold one document: an interval needs two"):
        upgrade(demo_run[0] / "topk" / "teacher", host, HOOK, text, tmp_path / "o", config=CONFIG, trust=True)
    assert not (tmp_path / "o" / "acts").exists()


def test_what_is_measured_before_an_upgrade_has_ended_is_not_taken_for_its_own(demo_run, host, text, tmp_path):
    def stop(stage, done, total):
        if stage == "evaluate" and (tmp_path / "run" / "rsae" / "cfg.json").exists():
            raise KeyboardInterrupt

    arguments = (demo_run[0] / "topk" / "teacher", host, HOOK, text, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        upgrade(*arguments, config=CONFIG, trust=True, progress=stop)
    for _ in range(2):
        evaluate_folder(
            tmp_path / "run",
            host,
            HOOK,
            text,
            tmp_path / "run" / "acts" / "train",
            tokens=200,
            ce_tokens=200,
            progress=None,
        )
    metrics = upgrade(*arguments, config=CONFIG, trust=True)
    assert metrics["config"]["config"]["evaluation_tokens"] == CONFIG.evaluation_tokens
    assert read_json(tmp_path / "run" / "metrics.json") == metrics


def test_a_run_inside_the_folder_that_is_read_as_text_is_refused(demo_run, host, text, tmp_path):
    """Its log.jsonl would be text."""
    shutil.copy(text, tmp_path)
    teacher, out = demo_run[0] / "relu" / "teacher", tmp_path / "run"
    calls = (
        lambda: upgrade(teacher, host, HOOK, str(tmp_path), out, config=CONFIG),
        lambda: upgrade_all([(teacher, HOOK)] * 2, host, str(tmp_path), out, config=CONFIG),
        lambda: demo(out, host=host, hook=HOOK, text=str(tmp_path), config=CONFIG, teacher=TEACHER),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"whose files are read as text.*choose an --out elsewhere"):
            call()
    assert not out.exists()


def test_a_run_that_begins_anew_keeps_the_activations(demo_run, host, text, tmp_path, monkeypatch):
    """As after a divergence: everything but acts/ is deleted, and another rate tried."""
    arguments = demo_run[0] / "topk" / "teacher", host, HOOK, text, tmp_path / "run"
    upgrade(*arguments, config=CONFIG, trust=True)
    slower = replace(CONFIG, finetune=replace(CONFIG.finetune, lr=5e-4))
    with pytest.raises(ValueError, match=r"another lr\).*acts/ may stay"):
        upgrade(*arguments, config=slower, trust=True)
    for path in (tmp_path / "run").iterdir():
        if path.name != "acts":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr("rsae.harvest.run_batch", lambda *_: pytest.fail("harvested again"))
    assert upgrade(*arguments, config=slower, trust=True)["rsae"]["fvu"] > 0


def test_a_family_s_folder_is_measured_from_inside_it(demo_run, host, text, tmp_path, monkeypatch):
    shutil.copytree(demo_run[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run" / "relu")
    before = (tmp_path / "run" / "report.html").read_text()
    found, _ = evaluate_folder(Path(), host, HOOK, text, None, tokens=200, ce_tokens=200, progress=None)
    assert found == read_json("metrics.json")
    assert (tmp_path / "run" / "report.html").read_text() != before


def test_another_run_says_which_setting_differs(demo_run, host, text, tmp_path):
    def identity(text, config):
        return json.loads(json.dumps({"text": text, "config": asdict(config)}))

    found = {"identity": identity(text, CONFIG)}
    config = replace(CONFIG, finetune=replace(CONFIG.finetune, steps=5))
    assert pipeline._differences(found, identity(text, config)) == "another steps"
    assert pipeline._differences(found, identity("other", CONFIG)) == "another text"


def test_a_text_that_has_changed_since_is_noticed(demo_run, host, text):
    stat = os.stat(text)
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        with pytest.raises(ValueError, match="another text_content"):
            demo(demo_run[0], host=host, hook=HOOK, text=text, config=CONFIG, teacher=TEACHER)
    finally:
        os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert demo(demo_run[0], host=host, hook=HOOK, text=text, config=CONFIG, teacher=TEACHER)


def test_an_upgrade_without_stored_activations(demo_run, host, text, tmp_path):
    teacher = demo_run[0] / "topk" / "teacher"
    found = upgrade(teacher, host, HOOK, text, tmp_path / "run", config=replace(CONFIG, train_tokens=None), trust=True)
    assert not (tmp_path / "run" / "acts" / "train").exists()
    assert read_json(tmp_path / "run" / "run.json")["done"]
    assert found["rsae"]["fvu"] != found["init"]["fvu"]
    sizes = {"tokens": CONFIG.evaluation_tokens, "ce_tokens": CONFIG.ce_tokens, "progress": None}
    again, _ = evaluate_folder(tmp_path / "run", host, HOOK, text, None, **sizes)
    assert again["rsae"] == found["rsae"]  # by the sinks and the mean of the text that was trained on
    other, _ = evaluate_folder(tmp_path / "run", host, HOOK, text, tmp_path / "run" / "acts" / "validation", **sizes)
    assert other["rsae"] != found["rsae"]
    logs = [
        json.loads((tmp_path / "run" / arm / "log.jsonl").read_text().splitlines()[-1]) for arm in ("control", "rsae")
    ]
    assert [log["step"] for log in logs] == [12, 12]


def test_what_preflight_warns_of_is_said_before_training(demo_run, host, text, tmp_path):
    """On another layer's activations. A warning is an error here, so what is there then was there before it."""
    teacher, early = demo_run[0] / "jumprelu" / "teacher", "blocks.0.hook_resid_post"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"preflight of run: .*another layer"):
            upgrade(teacher, host, early, text, tmp_path / "run", config=CONFIG, trust=True)
    assert (tmp_path / "run" / "preflight.json").exists()
    assert not (tmp_path / "run" / "acts").exists()


def test_several_teachers_killed_while_they_are_inspected(demo_run, host, text, tmp_path):
    teachers = [(demo_run[0] / family / "teacher", HOOK) for family in ("relu", "topk")]
    how = {"config": CONFIG, "trust": True}

    def stop(stage, done, total):
        if stage == "evaluate":  # of the first teacher, as it is inspected
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upgrade_all(teachers, host, text, tmp_path / "run", **how, progress=stop)
    assert set(upgrade_all(teachers, host, text, tmp_path / "run", **how)) == {"1-teacher", "2-teacher"}


def test_one_of_several_teachers_is_mended_after_the_inspection(demo_run, host, text, tmp_path, monkeypatch):
    """Nothing is harvested by then, so that the folder is not yet this run's."""
    mended = tmp_path / "mended"
    shutil.copytree(demo_run[0] / "topk" / "teacher", mended)
    teachers = [(demo_run[0] / "relu" / "teacher", HOOK), (mended, HOOK)]
    inspect = pipeline.preflight

    def contradicted(teacher, *arguments, **others):
        verdict = {"verdict": "contradicted"} if teacher.family == "topk" else {"verdict": "consistent"}
        return {**inspect(teacher, *arguments, **others), **verdict}

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "preflight", contradicted)
        with pytest.raises(ValueError, match="Mend the checkpoint"):
            upgrade_all(teachers, host, text, tmp_path / "run", config=CONFIG)
    sae = SAE.load_from_disk(mended)
    sae.b_dec.data += 0.01
    shutil.rmtree(mended)
    sae.save_model(mended)
    assert set(upgrade_all(teachers, host, text, tmp_path / "run", config=CONFIG, trust=True)) == {
        "1-teacher",
        "2-mended",
    }


def test_several_teachers_read_one_host_as_it_goes(demo_run, host, text, tmp_path, monkeypatch):
    """Its sinks are looked for once, and no buffer is held for a teacher that waits to be measured."""
    measure = pipeline._Upgrade.measure

    def without_buffer(job, data, progress):
        assert data.train._buffer is None
        measure(job, data, progress)

    monkeypatch.setattr(pipeline._Upgrade, "measure", without_buffer)
    teachers = [(demo_run[0] / family / "teacher", HOOK) for family in ("relu", "topk")]
    how = {
        "config": replace(CONFIG, train_tokens=None),
        "trust": True,
        "progress": lambda *so_far: calls.append(so_far),
    }
    calls = []
    assert len(upgrade_all(teachers, host, text, tmp_path / "run", **how)) == 2
    assert [done for stage, done, _ in calls if stage == "look for sinks"].count(1) == 1


def test_another_hook_is_not_measured_with_these_activations(demo_run, host, text):
    out = demo_run[0]
    kept = (out / "topk" / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post; what is measured"):
        evaluate_folder(
            out / "topk",
            host,
            "blocks.0.hook_resid_post",
            text,
            out / "acts" / "train",
            tokens=300,
            ce_tokens=100,
            progress=None,
        )
    assert (out / "topk" / "metrics.json").read_bytes() == kept
