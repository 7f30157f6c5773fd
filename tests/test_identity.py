"""identity() against numpy's corrcoef, cosines and python's sets over the stored latents of a tiny model; its command."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from tiny_host import save_tiny
from torch import Tensor

import rsae.identity
from rsae import RationalSAE, load_host
from rsae.harvest import SinkRule, harvest
from rsae.identity import identity
from rsae.sae import save_sae
from rsae.text import Contexts

HOOK = "blocks.1.hook_resid_post"
D_IN, D_SAE, N, T, TOP = 16, 40, 24, 16, 7
FAMILIES = ("standard", "jumprelu", "topk", "gated")
OVER_LATENTS = ("decoder_cosine", "encoder_cosine", "correlation", "top_contexts")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def host(folder: Path) -> Any:
    return load_host(str(folder), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    tokens = torch.randint(4, 64, (N, T), generator=torch.Generator().manual_seed(2))
    tokens[:, 0], tokens[3, 5] = 0, 1  # BOS, and a special token within
    return Contexts(tokens, torch.arange(N * T).view(N, T) // 50, ["a"])


@pytest.fixture(scope="module")
def stats(host: Any, contexts: Contexts) -> SinkRule:
    """So strict that a tenth of the tokens are sinks."""
    distance = host.activations(contexts.tokens, HOOK).norm(dim=-1)
    return SinkRule(torch.zeros(D_IN), float(distance.median()), float((distance / distance.median()).quantile(0.9)))


@pytest.fixture
def measured(host: Any, contexts: Contexts, stats: SinkRule) -> tuple[Tensor, np.ndarray]:
    """The measured activations (n, d_in) and their contexts (n,), by hand."""
    x = host.activations(contexts.tokens, HOOK)
    kept = (contexts.tokens >= 4) & (x.norm(dim=-1) <= stats.ratio * stats.median_norm)
    assert 250 < int(kept.sum()) < N * (T - 1) - 10
    return x[kept], np.nonzero(kept.numpy())[0]


@pytest.fixture
def compare(host: Any, contexts: Contexts, stats: SinkRule) -> Callable[..., dict[str, Any]]:
    """identity() of one arm."""

    def compare(teacher: Any, arm: Any, **options: Any) -> dict[str, Any]:
        options = {"store_stats": stats, "top": TOP} | options
        return identity(teacher, {"rsae": arm}, host, HOOK, contexts, **options)["rsae"]

    return compare


class Wrapped:
    """A host to meddle with."""

    def __init__(self, host: Any) -> None:
        self.host, self.d_model, self.tokenizer, self.token_losses = (
            host,
            host.d_model,
            host.tokenizer,
            host.token_losses,
        )

    def activations(self, tokens: Tensor, hook: str) -> Tensor:
        return self.host.activations(tokens, hook)


class Overflowing(Wrapped):
    def activations(self, tokens: Tensor, hook: str) -> Tensor:
        return super().activations(tokens, hook).masked_fill(tokens[..., None] == 9, torch.inf)


def perturbed(sae: Any, size: float = 0.5, seed: int = 5) -> Any:
    """The same SAE with noise on its weights."""
    sae, generator = copy.deepcopy(sae), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec):
            weights += size * weights.std() * torch.randn(weights.shape, generator=generator)
    return sae


def statistics(values: np.ndarray) -> dict[str, float]:
    quantiles = {f"{q}%": np.quantile(values, q / 100) for q in (5, 25, 50, 75, 95)}
    return {"n": len(values), "mean": values.mean(), **quantiles}


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """All cosines of rows, (rows of b, rows of a)."""
    units = []
    for rows in (a, b):
        rows = rows.detach().numpy().astype(float)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        units.append(rows / np.where(norms == 0, 1, norms))
    return units[1] @ units[0].T


def jaccard(a: np.ndarray, b: np.ndarray, context_of: np.ndarray) -> float:
    """Overlap of the contexts of the TOP largest non-zero values of a and of b."""
    tops = []
    for z in (a, b):
        best = sorted((t for t in range(len(z)) if z[t] != 0), key=lambda t: (-z[t], t))[:TOP]
        tops.append({context_of[t] for t in best})
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


def by_hand(teacher: Any, arm: Any, x: Tensor, context_of: np.ndarray) -> dict[str, Any]:
    """What identity() should say, from stored latents, one latent after the other."""
    with torch.no_grad():
        z, z_arm = (sae.encode(x).double().numpy().T for sae in (teacher, arm))
    pairs = list(zip(z, z_arm, strict=True))

    def left_out(reason: Callable[[np.ndarray], bool]) -> dict[str, int]:
        found = [(reason(a), reason(b)) for a, b in pairs]
        return {
            name: found.count(key)
            for name, key in (("teacher", (True, False)), ("arm", (False, True)), ("both", (True, True)))
        }

    correlation = [np.corrcoef(a, b)[0, 1] for a, b in pairs if np.ptp(a) and np.ptp(b)]
    overlap = [jaccard(a, b, context_of) for a, b in pairs if a.any() and b.any()]
    every = cosines(teacher.W_dec, arm.W_dec)
    return {
        "n_tokens": len(x),
        "n_latents": D_SAE,
        "moved": float((every.argmax(1) != np.arange(D_SAE)).mean()),
        "decoder_cosine": statistics(np.diag(every)),
        "encoder_cosine": statistics(np.diag(cosines(teacher.W_enc.T, arm.W_enc.T))),
        "correlation": statistics(np.array(correlation)) | {"undefined": left_out(lambda z: np.ptp(z) == 0)},
        "top_contexts": statistics(np.array(overlap)) | {"never_fires": left_out(lambda z: not z.any())},
    }


def assert_equal(got: dict[str, Any], expected: dict[str, Any], rel: float = 1e-5) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal(got[name], value, rel)
        else:
            assert got[name] == pytest.approx(value, rel=rel, abs=1e-6), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_against_numpy(family: str, make_teacher: Make, compare: Any, measured: Any) -> None:
    teacher = make_teacher(family, d_in=D_IN)
    arm = perturbed(teacher, size=1.5)
    expected = by_hand(teacher, arm, *measured)
    assert 0 < expected["moved"] < 1
    assert 0.1 < expected["top_contexts"]["mean"] < 0.9
    assert_equal(compare(teacher, arm), expected)


def test_latents_of_either_sign_and_equal_ones(make_teacher: Make, compare: Any, measured: Any) -> None:
    """All non-zero latents count, the largest first; of equal ones the earlier token."""
    teacher = make_teacher("standard", d_in=D_IN)
    arm = perturbed(teacher)
    arm.encode = lambda x: arm.process_sae_in(x) @ arm.W_enc + arm.b_enc  # what a ReLU would cut
    with torch.no_grad():
        for j, sae in enumerate((teacher, arm)):
            sae.W_enc[:, j], sae.b_enc[j] = 0, 1.1
        arm.b_enc[2] = -20  # negative throughout
    expected = by_hand(teacher, arm, *measured)
    assert expected["correlation"]["undefined"] == {"teacher": 1, "arm": 1, "both": 0}
    assert expected["top_contexts"]["never_fires"]["arm"] == 0
    assert_equal(compare(teacher, arm), expected)


def test_latents_that_vary_a_little_far_from_0(make_teacher: Make, compare: Any, measured: Any) -> None:
    """A sum of squares about 0 would have no digits left."""
    teacher = make_teacher("standard", d_in=D_IN)
    with torch.no_grad():
        teacher.W_enc *= 0.1
        teacher.b_enc += 1e6
    arm = perturbed(teacher)
    assert_equal(compare(teacher, arm)["correlation"], by_hand(teacher, arm, *measured)["correlation"], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_sae_is_the_same(family: str, make_teacher: Make, compare: Any) -> None:
    teacher = make_teacher(family, d_in=D_IN)
    got = compare(teacher, copy.deepcopy(teacher))
    assert got["moved"] == 0
    for name in OVER_LATENTS:
        for statistic in ("mean", "5%", "25%", "50%", "75%", "95%"):
            assert got[name][statistic] == pytest.approx(1.0, abs=1e-12)
            assert got[name][statistic] <= 1.0
    assert got["decoder_cosine"]["n"] == D_SAE


def test_an_rsae_starts_as_its_teacher(make_teacher: Make, compare: Any) -> None:
    """Scales of the weights are no change of meaning either: a gated SAE becomes a JumpReLU of other encoder norms."""
    teacher = make_teacher("gated", d_in=D_IN)
    got = compare(teacher, RationalSAE.from_teacher(teacher))
    assert got["moved"] == 0
    assert got["encoder_cosine"]["5%"] == pytest.approx(1.0, abs=1e-6)
    assert got["correlation"]["5%"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("cells", [1, 3 * D_SAE, 1 << 24])
def test_permuted_latents_have_moved(
    cells: int, make_teacher: Make, compare: Any, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rsae.identity, "_CELLS", cells)  # one row at a time, a few, all
    teacher = make_teacher("jumprelu", d_in=D_IN)
    arm = copy.deepcopy(teacher)
    order = torch.arange(D_SAE)
    order[[2, 5, 11, 30, 31, 39]] = order[[5, 11, 30, 2, 39, 31]]
    with torch.no_grad():
        for name, dim in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0), ("threshold", 0)):
            weights = arm.get_parameter(name)
            weights.copy_(weights.index_select(dim, order))
    got = compare(teacher, arm)
    assert got["moved"] == 6 / D_SAE
    assert got["decoder_cosine"]["50%"] == pytest.approx(1.0)
    assert got["decoder_cosine"]["5%"] < 0.9
    assert_equal(got, by_hand(teacher, arm, *measured))


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 128), (5, 3), (N, 1), (100, 1000)])
def test_no_number_depends_on_the_batches(
    batch_size: int, rows: int, make_teacher: Make, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_teacher("topk", d_in=D_IN)
    arm = perturbed(teacher)
    whole = compare(teacher, arm)
    monkeypatch.setattr(rsae.identity, "_ROWS", rows)
    assert_equal(compare(teacher, arm, batch_size=batch_size), whole)


def test_latents_that_never_fire_are_counted_apart(make_teacher: Make, compare: Any) -> None:
    teacher = make_teacher("standard", d_in=D_IN, apply_b_dec_to_input=False)
    with torch.no_grad():
        teacher.b_enc += 3  # the others all fire
    arm = copy.deepcopy(teacher)
    with torch.no_grad():
        teacher.b_enc[[0, 1]] = arm.b_enc[[1, 2, 3]] = -1000.0
        arm.W_enc[:, 4], arm.b_enc[4] = 0, 1.1  # fires always, and never varies
    got = compare(teacher, arm)
    assert got["top_contexts"]["never_fires"] == {"teacher": 1, "arm": 2, "both": 1}
    assert got["top_contexts"]["n"] == D_SAE - 4
    assert got["correlation"]["undefined"] == {"teacher": 1, "arm": 3, "both": 1}
    assert got["correlation"]["n"] == D_SAE - 5
    assert got["correlation"]["5%"] == pytest.approx(1.0)


def test_nothing_fires(make_teacher: Make, compare: Any) -> None:
    teacher = make_teacher("standard", d_in=D_IN)
    arm = copy.deepcopy(teacher)
    with torch.no_grad():
        arm.b_enc.fill_(-1000.0)
    got = compare(teacher, arm)
    for name in ("correlation", "top_contexts"):
        assert got[name]["n"] == 0
        assert got[name]["mean"] is None
        assert got[name]["95%"] is None
    json.dumps(got, allow_nan=False)


def test_small_latents_of_a_dense_arm_are_zeros(make_teacher: Make, compare: Any) -> None:
    teacher = make_teacher("standard", d_in=D_IN)
    arm = perturbed(teacher, seed=3)
    threshold = 0.5 * arm.encode(torch.randn(500, D_IN)).max().item()
    cut = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=D_IN, d_sae=arm.cfg.d_sae, apply_b_dec_to_input=arm.cfg.apply_b_dec_to_input)
    )
    cut.load_state_dict(arm.state_dict() | {"threshold": torch.full((arm.cfg.d_sae,), threshold)})
    got, expected = compare(teacher, arm, eps={"rsae": threshold}), compare(teacher, cut)
    assert got == expected
    assert got["top_contexts"] != compare(teacher, arm)["top_contexts"]


def test_a_row_of_zeros_has_cosine_0_and_has_not_moved(make_teacher: Make, compare: Any) -> None:
    teacher = make_teacher("standard", d_in=D_IN)
    arm = copy.deepcopy(teacher)
    with torch.no_grad():
        arm.W_dec.zero_()
        arm.W_enc *= 1e-12  # a small norm is none
    got = compare(teacher, arm)
    assert got["decoder_cosine"]["mean"] == 0
    assert got["moved"] == 0
    assert got["encoder_cosine"]["mean"] == pytest.approx(1.0, abs=1e-6)


def test_arms_are_measured_in_one_pass(host: Any, contexts: Contexts, stats: SinkRule, make_teacher: Make) -> None:
    class Counted(Wrapped):
        calls = 0

        def activations(self, tokens: Tensor, hook: str) -> Tensor:
            self.calls += len(tokens)
            return super().activations(tokens, hook)

    teacher, counted, told = make_teacher("topk", d_in=D_IN), Counted(host), []
    arms = {"control": perturbed(teacher, seed=1), "rsae": perturbed(teacher, seed=2)}
    options: dict[str, Any] = {"store_stats": stats, "batch_size": 10}
    got = identity(teacher, arms, counted, HOOK, contexts, **options, progress=lambda *a: told.append(a))
    assert counted.calls == N
    assert told == [("identity", 160, N * T), ("identity", 320, N * T), ("identity", N * T, N * T)]
    assert list(got) == ["control", "rsae"]
    for name, arm in arms.items():
        assert identity(teacher, {name: arm}, host, HOOK, contexts, **options)[name] == got[name]


def test_refusals(host: Any, contexts: Contexts, stats: SinkRule, make_teacher: Make, compare: Any) -> None:
    teacher = make_teacher("standard", d_in=D_IN)
    with pytest.raises(ValueError, match=r"'rsae' has d_in 16 and d_sae 24, the teacher 16 and 40.*by index"):
        compare(teacher, make_teacher("standard", d_in=D_IN, d_sae=24))
    with pytest.raises(ValueError, match="teacher has d_in 12, the host d_model 16"):
        compare(make_teacher("standard"), make_teacher("standard"))
    with pytest.raises(ValueError, match="one arm"):
        identity(teacher, {}, host, HOOK, contexts, store_stats=stats)
    with pytest.raises(ValueError, match="top 1"):
        compare(teacher, teacher, top=0)
    with pytest.raises(ValueError, match="none of 384 held-out tokens is measured"):
        compare(teacher, teacher, store_stats=stats._replace(ratio=0.0))
    damaged = copy.deepcopy(teacher)
    damaged.b_enc.data[7] = float("nan")
    with pytest.raises(ValueError, match="arm 'rsae': nan or inf"):
        compare(teacher, damaged)
    with pytest.raises(ValueError, match=r"nan or inf in the host's activations at 'blocks\.1"):
        identity(teacher, {"rsae": teacher}, Overflowing(host), HOOK, contexts, store_stats=stats)


class TestCommand:
    """rsae evaluate RUN --identity TEACHER."""

    @pytest.fixture
    def run(self, folder: Path, host: Any, tmp_path: Path, make_teacher: Make) -> Callable[..., Path]:
        """Call the command on a run of three arms."""
        generator = torch.Generator().manual_seed(0)
        lines = [" ".join(f"w{i}" for i in torch.randint(0, 58, (30,), generator=generator)) for _ in range(900)]
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        harvest(host, HOOK, str(text), tmp_path / "acts", n_tokens=500, context_length=T)
        teacher = make_teacher("jumprelu", d_in=D_IN)
        arms = {"teacher": teacher, "control": perturbed(teacher), "rsae": RationalSAE.from_teacher(teacher)}
        for arm, sae in arms.items():
            save_sae(sae, tmp_path / "run" / arm)

        def run(*options: Any) -> Path:
            from rsae.cli import app

            source = (
                () if (tmp_path / "run" / "run.json").exists() else ("--host", folder, "--hook", HOOK, "--text", text)
            )
            where = (*source, "--acts", tmp_path / "acts", "--tokens", 300)
            app(["evaluate", *map(str, (tmp_path / "run", *where, *options))], standalone_mode=False)
            return tmp_path / "run"

        return run

    @pytest.fixture(autouse=True)
    def leave_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rsae.cli._quiet", lambda: None)

    def test_writes_and_prints(
        self, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = run("--identity", tmp_path / "run" / "teacher")
        found = json.loads((out / "identity.json").read_text())
        metrics = json.loads((out / "metrics.json").read_text())
        assert set(found) == {"schema", "config", "provenance", "sources", "control", "rsae"}
        assert found["config"]["teacher"] == str(tmp_path / "run" / "teacher")
        assert found["provenance"] == metrics["provenance"]
        assert found["rsae"]["n_tokens"] == metrics["rsae"]["n_tokens"]
        assert found["rsae"]["correlation"]["50%"] == pytest.approx(1.0, abs=1e-5)
        assert found["control"]["correlation"]["50%"] < 0.99
        printed = capsys.readouterr().out
        assert "moved" in printed
        assert f"{found['control']['decoder_cosine']['50%']:.2f} [" in printed

    def test_is_not_computed_unasked(self, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        out = run()
        assert (out / "metrics.json").exists()
        assert not (out / "identity.json").exists()
        assert "moved" not in capsys.readouterr().out

    def test_what_the_run_knows_need_not_be_said(
        self, run: Callable[..., Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = json.loads((run() / "metrics.json").read_text())
        identity = {"host": str(folder), "hook": HOOK, "text": str(tmp_path / "text.jsonl")}
        (tmp_path / "run" / "run.json").write_text(json.dumps({"identity": identity}))
        known = json.loads((run() / "metrics.json").read_text())
        assert (known["config"], known["rsae"]["fvu"]) == (said["config"], said["rsae"]["fvu"])
        (tmp_path / "run" / "run.json").write_text(json.dumps({"identity": {"host": str(folder)}}))
        with pytest.raises(ValueError, match="give --host, --hook and --text"):
            run()

    def test_another_teacher_is_refused_before_anything_is_written(
        self, run: Callable[..., Path], tmp_path: Path, make_teacher: Make
    ) -> None:
        save_sae(make_teacher("jumprelu", d_in=D_IN, d_sae=24), tmp_path / "other")
        for teacher, message in (("other", "the teacher 16 and 24"), ("nowhere", "nowhere")):
            with pytest.raises(ValueError, match=message):
                run("--identity", tmp_path / teacher)
        assert not list((tmp_path / "run").glob("*.json"))
