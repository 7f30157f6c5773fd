"""k-sparse probing: a planted latent is found, nothing leaks from test texts, arms share their splits, a killed run continues."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from tiny_host import WORDS, save_tiny

from rsae import probing
from rsae.artefacts import read_json, write_json
from rsae.hosts import Host, load_host
from rsae.probing import KS, LabelledSet, last_token_activations, probe, probe_arm, read_set, split, summarise
from rsae.sae import RationalSAE, save_sae

HOOK = "blocks.1.hook_resid_post"
D_IN, D_SAE, PLANTED = 16, 40, 7


def standard(seed=0, d_in=D_IN, d_sae=D_SAE, b_enc=0.0):
    """A ReLU SAE with random encoder directions."""
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d_in, d_sae, generator=g) / d_in**0.5)
        sae.W_dec.copy_(torch.randn(d_sae, d_in, generator=g))
        sae.b_enc.fill_(b_enc)
    return sae


def labelled_set(n=400, seed=0):
    """Random labels of texts that are all different."""
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1], n // 2))
    return LabelledSet("made up", [f"text {i}" for i in range(n)], labels)


def auc_by_counting(score, y):
    """Share of pairs, one of each class, that the score puts in order; a tie counts half."""
    pairs = score[y == 1][:, None] - score[y == 0][None, :]
    return ((pairs > 0).mean() + 0.5 * (pairs == 0).mean()).item()


@pytest.fixture
def planted():
    """Activations that hold their label along one direction, and a SAE whose latent PLANTED reads it."""
    labelled, sae = labelled_set(), standard()
    g = torch.Generator().manual_seed(3)
    direction = torch.nn.functional.normalize(torch.randn(D_IN, generator=g), dim=0)
    x = torch.randn(400, D_IN, generator=g) + 2.5 * torch.from_numpy(labelled.labels)[:, None] * direction
    with torch.no_grad():
        sae.W_enc -= torch.outer(direction, direction @ sae.W_enc)
        sae.W_enc[:, PLANTED] = direction
    return sae, x, labelled


def test_the_planted_latent_is_chosen_and_its_auc_is_that_of_counting_pairs(planted):
    sae, x, labelled = planted
    result = probe_arm(sae, x, labelled)
    assert result["1"]["latents"] == [[PLANTED]] * 3
    assert not result["all_zero"]
    latent = torch.relu(x @ sae.W_enc[:, PLANTED]).detach().numpy()
    for seed in range(3):
        test = split(labelled, seed)[1]
        y = labelled.labels[test]
        assert result["1"]["auc"][seed] == pytest.approx(auc_by_counting(latent[test], y), abs=1e-12)
        assert result["1"]["auc"][seed] > 0.85
        # a logistic regression on one number is a threshold: none does better than the best there is
        best = max(np.mean((latent[test] > t) == (y == 1)) for t in [-1.0, *latent[test]])
        assert best - 0.1 < result["1"]["accuracy"][seed] <= best
    for k in KS:
        assert all(len(set(chosen)) == k and chosen[0] == PLANTED for chosen in result[str(k)]["latents"])


def test_a_latents_scale_changes_nothing(planted):
    sae, x, labelled = planted
    before = probe_arm(sae, x, labelled)
    with torch.no_grad():
        sae.W_enc *= torch.logspace(-2, 2, D_SAE)
    after = probe_arm(sae, x, labelled)
    for k in KS:
        assert after[str(k)]["latents"] == before[str(k)]["latents"]
        assert after[str(k)]["auc"] == pytest.approx(before[str(k)]["auc"], abs=1e-3)


def test_permuted_labels_give_chance(monkeypatch):
    """Of 600 latents one fits 84 training texts by chance; on the test texts it must not."""
    monkeypatch.setattr(probing, "KS", (1,))
    monkeypatch.setattr(probing, "INVERSE_PENALTIES", [1.0])
    sae = standard(d_sae=600)
    x = torch.randn(120, D_IN, generator=torch.Generator().manual_seed(1))
    latents = torch.relu(x @ sae.W_enc).detach().numpy()
    ours, leaked = [], []
    for seed in range(40):
        labelled = labelled_set(120, seed)
        ours.append(np.mean(probe_arm(sae, x, labelled)["1"]["auc"]))
        y, test = labelled.labels, split(labelled, 0)[1]
        j = np.abs(latents[y == 1].mean(0) - latents[y == 0].mean(0)).argmax()  # chosen on test texts too
        auc = auc_by_counting(latents[test, j], y[test])
        leaked.append(max(auc, 1 - auc))
    error = np.std(ours, ddof=1) / 40**0.5
    assert abs(np.mean(ours) - 0.5) < 4 * error < 0.06
    assert np.mean(leaked) > 0.6


def test_latents_that_are_all_zero_have_auc_one_half(planted):
    _, x, labelled = planted
    result = probe_arm(standard(b_enc=-1e3), x, labelled)
    assert result["all_zero"]
    assert all(result[str(k)]["auc"] == [0.5] * 3 and result[str(k)]["accuracy"] == [0.5] * 3 for k in KS)


def test_a_split_is_stratified_fixed_by_set_and_seed_and_shares_no_text():
    labelled = LabelledSet("a", [f"t{i}" for i in range(130)], np.repeat([0, 1], [100, 30]))
    train, test = split(labelled, 0)
    assert [labelled.labels[part].tolist().count(1) for part in (train, test)] == [21, 9]
    assert [labelled.labels[part].tolist().count(0) for part in (train, test)] == [21, 9]
    assert not set(train) & set(test)
    assert split(labelled, 0) == (train, test)
    assert split(labelled, 1) != (train, test)
    assert split(labelled._replace(name="b"), 0) != (train, test)
    # by text, not by row: another order of the rows divides the texts in the same way
    turned = LabelledSet("a", labelled.texts[::-1], labelled.labels[::-1])
    assert {turned.texts[i] for i in split(turned, 0)[0]} == {labelled.texts[i] for i in train}
    with pytest.raises(ValueError, match="5 distinct texts"):
        split(LabelledSet("a", list("abcdefghij"), np.repeat([0, 1], 5)), 0)


def test_sets_of_the_package_hold_each_text_once():
    assert len(probing.benchmark()) == 113
    assert set(probing.QUICK) <= set(probing.benchmark())
    assert len(set(probing.QUICK)) == 12
    table = probing._package("utils_data").read_numbered_dataset_df("145_disease_class_digestive system diseases")
    labelled = read_set("145_disease_class_digestive system diseases")
    assert len(set(labelled.texts)) == len(labelled.texts) < len(table)
    assert labelled.labels.tolist() == sorted(labelled.labels)
    rows = table[table["prompt"] == labelled.texts[-1]]
    assert rows["target"].unique().tolist() == [1]
    both = table.groupby("prompt")["target"].nunique()
    assert (both > 1).any()
    assert not set(both.index[both > 1]) & set(labelled.texts)
    assert len(read_set("161_agnews_0").texts) == probing.MAX_TEXTS
    assert read_set("54_cs_tf").labels.mean() == 0.5  # targets "no" and "yes"


# --- a run folder on a tiny host ---


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("host")))


def made_up_texts(name):
    """40 texts a class, of 2 to 30 words: the last word says the class."""
    rng = np.random.default_rng(sum(map(ord, name)))
    texts, labels = [], np.repeat([0, 1], 40)
    for label in labels:
        start = " ".join(WORDS[i] for i in rng.integers(2, 58, size=rng.integers(1, 30)))
        texts.append(f"{start} w{label}")
    return LabelledSet(name, texts, labels)


@pytest.fixture
def run(host, tmp_path, monkeypatch):
    """A run folder of three arms, and three sets; a long text is one of more than 8 tokens."""
    monkeypatch.setattr(probing, "read_set", made_up_texts)
    monkeypatch.setattr(probing, "MAX_TOKENS", 8)
    monkeypatch.setattr(probing, "INVERSE_PENALTIES", [0.1, 10.0])
    folder = tmp_path / "run"
    for seed, arm in enumerate(probing.ARMS):
        save_sae(standard(seed=seed), folder / arm)
    write_json(folder / "run.json", {"identity": {"host": host, "hook": HOOK}})
    return folder


SETS = ["36_sciq_tf", "96_spam_is", "92_glue_sst2"]


def test_last_token_activations_are_those_of_each_text_alone(host, monkeypatch):
    monkeypatch.setattr(probing, "MAX_TOKENS", 8)
    model = load_host(host, dtype=torch.float32)
    texts = made_up_texts("a").texts
    found = last_token_activations(texts, model, HOOK, batch_tokens=40)
    for text, row in zip(texts, found, strict=True):
        ids = model.tokenizer.convert_tokens_to_ids(text.split()[-7:])
        alone = model.activations(torch.tensor([[model.tokenizer.bos_token_id, *ids]]), HOOK)[0, -1]
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no token"):
        last_token_activations(["w1", "  "], model, HOOK)


def test_a_run_is_probed_and_summed_up(run):
    found = probe(run, names=SETS)
    assert found == read_json(run / "probing.json")
    assert list(found["sets"]) == SETS
    assert found["all_zero"] == {arm: [] for arm in probing.ARMS}
    raw = {name: read_json(run / "probing" / f"{name}.json") for name in SETS}
    assert {(file["n_train"], file["n_test"]) for file in raw.values()} == {(56, 24)}
    by_seed = np.array([raw[name]["arms"]["rsae"]["5"]["auc"] for name in SETS])
    assert found["arms"]["rsae"]["5"]["auc"] == pytest.approx([by_seed.mean(), by_seed.mean(0).std(ddof=1)])
    assert found["sets"]["96_spam_is"]["rsae"]["5"]["auc"] == pytest.approx([by_seed[1].mean(), by_seed[1].std(ddof=1)])
    difference, low, high = found["rsae_minus_teacher"]["5"]["auc"]
    of_teacher = np.array([raw[name]["arms"]["teacher"]["5"]["auc"] for name in SETS])
    assert difference == pytest.approx((by_seed - of_teacher).mean())
    assert low <= difference <= high
    assert found["arms"]["teacher"]["16"]["auc"][0] > 0.9  # the last word is all there is to know


def test_small_latents_of_a_dense_arm_are_zeros(run):
    assert probe(run, names=SETS[:1])["all_zero"]["rsae"] == []
    write_json(run / "metrics.json", {"config": {"eps": {"rsae": 1e9}}})
    found = probe(run, names=SETS[:1])  # measured anew, though the models are the same
    assert found["all_zero"] == {"teacher": [], "control": [], "rsae": SETS[:1]}
    assert found["eps"] == {"rsae": 1e9}
    (run / "metrics.json").unlink()
    save_sae(RationalSAE.from_teacher(standard(), support="dense"), run / "rsae")
    with pytest.raises(ValueError, match=r"rsae has a dense gate, and no metrics\.json says what of it is counted"):
        probe(run, names=SETS[:1])


def test_arms_share_the_split_and_do_not_see_each_other(run):
    for arm in ("control", "rsae"):
        shutil.rmtree(run / arm)
    alone = probe(run, names=SETS[:1])
    assert set(alone["arms"]) == {"teacher"}
    assert "rsae_minus_control" not in alone
    for arm in ("control", "rsae"):
        shutil.copytree(run / "teacher", run / arm)
    found = probe(run, names=SETS[:1])
    assert found["arms"]["teacher"] == found["arms"]["control"] == found["arms"]["rsae"] == alone["arms"]["teacher"]
    assert found["rsae_minus_control"]["1"] == {"auc": [0.0, None, None], "verdict": None}


def test_a_killed_run_continues_to_the_identical_json(run, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    probe(whole, names=SETS)

    def killed(stage, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(run, names=SETS, progress=killed)
    assert sorted(file.name for file in (run / "probing").glob("*.json")) == ["36_sciq_tf.json"]
    assert not (run / "probing.json").exists()
    reads = []
    activations = Host.activations
    monkeypatch.setattr(Host, "activations", lambda *args: reads.append(args[1].shape) or activations(*args))
    probe(run, names=SETS)
    assert len(reads) == 2  # one batch for each of the two sets that were left
    for name in ("probing.json", *(f"probing/{name}.json" for name in SETS)):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert probe(run, names=SETS, seeds=4)["seeds"] == 4
    assert len(reads) == 2  # more seeds, other arms: the activations are there
    assert len(read_json(run / "probing" / "96_spam_is.json")["arms"]["rsae"]["1"]["auc"]) == 4


def test_the_interval_holds_the_mean_and_the_verdict_follows():
    def result(auc):
        return {str(k): {"auc": [auc, auc + 0.01, auc - 0.01], "accuracy": [auc] * 3} for k in KS} | {
            "all_zero": auc == 0.5
        }

    rng = np.random.default_rng(0)
    results = {
        f"s{i}": {"n_train": 1, "n_test": 1, "arms": {"control": result(0.5), "rsae": result(0.5 + gain)}}
        for i, gain in enumerate(rng.normal(0.02, 0.01, size=40))
    }
    found = summarise(results)
    gains = np.array([results[f"s{i}"]["arms"]["rsae"]["1"]["auc"][0] - 0.5 for i in range(40)])
    difference, low, high = found["rsae_minus_control"]["1"]["auc"]
    assert difference == pytest.approx(gains.mean())
    normal = 1.96 * gains.std(ddof=1) / 40**0.5  # of a mean of 40 the bootstrap is close to it
    assert [difference - low, high - difference] == pytest.approx([normal, normal], rel=0.1)
    assert found["rsae_minus_control"]["1"]["verdict"] == "win"
    assert len(found["all_zero"]["control"]) == 40
    assert found["arms"]["control"]["1"]["auc"] == pytest.approx([0.5, 0.01])
    assert "rsae_minus_teacher" not in found


# --- bad input ---


def refused(run, match, **kwargs):
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=match):
        probe(run, **kwargs)
    assert sorted(run.rglob("*")) == before


def test_bad_input_is_refused_before_anything_is_written(run, host):
    refused(run, "96_spam_is", names=["96_spam"])
    refused(run, "no sets", names=[])
    refused(run, "at least 3", names=SETS, seeds=2)
    write_json(run / "run.json", {"identity": {"host": host, "hook": "blocks.9.hook_resid_post"}})
    refused(run, "blocks.9", names=SETS)
    write_json(run / "run.json", {"identity": {"host": host, "hook": HOOK}})
    save_sae(standard(d_sae=12), run / "rsae")
    refused(run, "d_sae 12", names=SETS)
    shutil.rmtree(run / "rsae")
    save_sae(standard(d_in=8), run / "rsae")
    refused(run, "d_in 8", names=SETS)
    for arm in probing.ARMS:
        shutil.rmtree(run / arm)
    refused(run, "holds none of teacher, control, rsae", names=SETS)
    (run / "run.json").unlink()
    refused(run, "run.json does not exist", names=SETS)


def test_three_classes_are_no_binary_set(monkeypatch):
    import pandas as pd

    table = pd.DataFrame({"prompt": ["a", "b", "c"], "target": [0, 1, 2]})
    monkeypatch.setattr(probing._package("utils_data"), "read_numbered_dataset_df", lambda name: table)
    with pytest.raises(ValueError, match="3 classes"):
        read_set("36_sciq_tf")


def command(*args, missing=False):
    hide = "sys.modules['sae_probes'] = None; " if missing else ""
    code = f"import sys; {hide}sys.argv = ['rsae', *{list(map(str, args))!r}]; from rsae.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_command_says_what_is_wrong(run, tmp_path):
    result = command("probe", run, missing=True)
    assert result.returncode == 2
    assert 'pip install "sae-probes' in result.stderr
    result = command("probe", run, "--quick", "--sets", "96_spam_is")
    assert result.returncode == 2
    assert "--quick" in result.stderr
    (tmp_path / "run.json").write_text(json.dumps({"identity": {}}))
    result = command("probe", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("rsae: error: ")
    assert "holds none of" in result.stderr


def test_the_table_shows_arms_differences_and_silence(run, capsys):
    from rsae.cli import _print_probing

    save_sae(standard(b_enc=-1e3), run / "rsae")
    _print_probing(probe(run, names=SETS), title="probing")
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "k = 16",
        "teacher",
        "RSAE minus control, k = 5: AUC -0.",
        "loss",
        "rsae: every latent is 0 on 36_sciq_tf",
    ):
        assert words in shown
