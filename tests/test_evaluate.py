"""evaluate() against losses worked out with torch directly, on a small language model that mixes positions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rsae.evaluate import counted, evaluate, evaluate_runs, exclusions
from rsae.harvest import SinkRule
from rsae.text import Contexts

D, D_SAE, VOCAB = 6, 10, 12
BOS, EOS, SINK = 0, 1, 11  # token 11 has an embedding 100 times the others'
HOOK = "blocks.0.hook_resid_post"


class Losses(NamedTuple):
    nll: Tensor
    kl: Tensor


class CausalMean(nn.Module):
    """A language model without attention in which a position still sees the earlier ones.

    embedding -> linear -> [hook] -> mean over the positions so far -> head
    """

    d_model = D

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.linear, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, D), nn.Linear(D, VOCAB)
        self.tokenizer = SimpleNamespace(bos_token_id=BOS, all_special_ids=[BOS, EOS])
        with torch.no_grad():
            self.embed.weight[SINK] *= 100

    def activations(self, tokens: Tensor, hook: str) -> Tensor:
        assert hook == HOOK
        return self.linear(self.embed(tokens))

    def log_probs(self, activations: Tensor) -> Tensor:
        positions = torch.arange(1, activations.shape[1] + 1)[:, None]
        return self.head(2 * activations.cumsum(1) / positions).log_softmax(-1)[:, :-1]

    def token_losses(
        self, tokens: Tensor, hook: str, edits: dict[str, Callable[[Tensor], Tensor]]
    ) -> dict[str, Losses]:
        assert len(tokens) > 0  # transformers' models refuse to run on nothing
        x = self.activations(tokens, hook)
        clean = self.log_probs(x)
        result = {}
        for name, edit in {"clean": lambda x: x, **edits}.items():
            edited = self.log_probs(edit(x))
            nll = -edited.gather(2, tokens[:, 1:, None])[..., 0]
            result[name] = Losses(nll, (clean.exp() * (clean - edited)).sum(-1))
        return result


class TinySAE:
    """A ReLU SAE with a bias that keeps part of its latents silent."""

    def __init__(self, seed: int, d_in: int = D) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cfg = SimpleNamespace(d_in=d_in, d_sae=D_SAE)
        self.W_enc = torch.randn(d_in, D_SAE, generator=generator)
        self.W_dec = torch.randn(D_SAE, d_in, generator=generator) / 5

    def encode(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return torch.relu(x @ self.W_enc - 0.5)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.W_dec


class Perfect(TinySAE):
    """Reconstructs everything: the signed activations are its latents."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, D_SAE - D))

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :D]


@pytest.fixture
def host() -> CausalMean:
    return CausalMean().eval().requires_grad_(False)


@pytest.fixture
def contexts() -> Contexts:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, SINK, (9, 8), generator=generator)
    tokens[:, 0] = BOS
    tokens[2, 4] = EOS
    tokens[3, 3] = tokens[7, 6] = SINK
    tokens[5, 5] = BOS  # in the middle of a context: special, but not its BOS
    documents = torch.arange(72).view(9, 8) // 11
    return Contexts(tokens, documents, ["a.txt", "b.txt"])


@pytest.fixture
def stats(host: CausalMean, contexts: Contexts) -> SinkRule:
    mean = torch.linspace(-0.5, 0.5, D)
    distance = (host.activations(contexts.tokens, HOOK) - mean).norm(dim=-1)
    return SinkRule(mean, float(distance.median()), 10.0)


def measured_by_hand(contexts: Contexts) -> Tensor:
    measured = torch.ones(9, 8, dtype=torch.bool)
    measured[:, 0] = False
    for position in ((2, 4), (3, 3), (7, 6), (5, 5)):
        measured[position] = False
    return measured


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_everything_from_first_principles(host: CausalMean, contexts: Contexts, stats: SinkRule) -> None:
    arms = {"teacher": TinySAE(0), "control": TinySAE(1), "init": TinySAE(0), "rsae": TinySAE(2)}
    result = evaluate(arms, host, HOOK, contexts, store_stats=stats, config={"seed": 3}, batch_size=4)
    measured = measured_by_hand(contexts)
    x = host.activations(contexts.tokens, HOOK)
    kept = x[measured]
    for name, sae in arms.items():
        latents = sae.encode(kept)
        x_hat = sae.decode(latents)
        got = result[name]
        sse = (kept - x_hat).square().sum()
        assert got["mse"] == close(float(sse / len(kept)))
        assert got["fvu"] == close(float(sse / (kept - kept.mean(0)).square().sum()))
        assert got["explained_variance"] == close(1 - got["fvu"])
        assert got["l0"] == close(float((latents != 0).float().sum(1).mean()))
        assert got["alive"] == float((latents != 0).any(0).float().mean().double())
        assert got["n_tokens"] == 9 * 8 - 9 - 4
        assert got["n_documents"] == 7
        # The loss, position by position: of token t+1 from the replaced activations up to t, where t is measured.
        replacements = {"clean": x, "zero": x.clone(), "mean": x.clone(), "spliced": x.clone()}
        replacements["zero"][measured] = 0
        replacements["mean"][measured] = stats.mean
        replacements["spliced"][measured] = x_hat
        log_probs = {key: host.log_probs(value) for key, value in replacements.items()}
        nll: dict[str, list[float]] = {key: [] for key in replacements}
        kl, documents = [], set()
        for c in range(9):
            for t in range(7):
                if measured[c, t]:
                    for key in replacements:
                        nll[key].append(-float(log_probs[key][c, t, contexts.tokens[c, t + 1]]))
                    p, q = log_probs["clean"][c, t], log_probs["spliced"][c, t]
                    kl.append(float((p.exp() * (p - q)).sum()))
                    documents.add(int(contexts.documents[c, t + 1]))
        n = len(kl)
        clean, zero, mean, spliced = (sum(nll[key]) / n for key in ("clean", "zero", "mean", "spliced"))
        assert got["n_ce_tokens"] == n
        assert got["n_ce_documents"] == len(documents)
        assert got["ce_clean"] == close(clean)
        assert got["ce_spliced"] == close(spliced)
        assert got["delta_ce"] == close(spliced - clean)
        assert got["kl"] == close(sum(kl) / n)
        assert got["loss_recovered"] == pytest.approx((zero - spliced) / (zero - clean), rel=1e-4)
        assert got["loss_recovered_mean"] == pytest.approx((mean - spliced) / (mean - clean), rel=1e-4)
    assert result["init"] == result["teacher"]
    assert result["excluded"] == {"bos": 9 / 72, "special": 2 / 72, "sink": 2 / 72}
    assert result["sources"] == ["a.txt", "b.txt"]
    assert result["config"] == {"seed": 3}
    assert result["schema"] == 1
    assert "torch" in result["provenance"]["versions"]
    assert "10x" in result["exclusion_rule"]
    assert "z != 0" in result["counting_rule"]


def test_differences_and_verdict(host: CausalMean, contexts: Contexts, stats: SinkRule) -> None:
    arms = {"teacher": TinySAE(2), "control": TinySAE(1), "rsae": TinySAE(2)}
    result = evaluate(arms, host, HOOK, contexts, store_stats=stats)
    assert result["rsae_minus_teacher"] == {"fvu": [0, 0, 0], "delta_ce": [0, 0, 0]}
    fvu, low, high = result["rsae_minus_control"]["fvu"]
    assert fvu == pytest.approx(result["rsae"]["fvu"] / result["control"]["fvu"] - 1)
    assert low < fvu < high
    delta = result["rsae_minus_control"]["delta_ce"][0]
    assert delta == pytest.approx(result["rsae"]["delta_ce"] - result["control"]["delta_ce"])
    assert set(result["verdict"]) == {"fvu", "delta_ce", "alive", "dense"}
    assert abs(result["rsae"]["l0"] / result["control"]["l0"] - 1) > 0.01
    assert set(result["verdict"].values()) == {"unmatched"}
    alike = evaluate(arms | {"control": TinySAE(2)}, host, HOOK, contexts, store_stats=stats)
    assert set(alike["verdict"].values()) == {"tie"}


def test_nan_is_found_whatever_is_counted() -> None:
    assert counted(torch.tensor([[0.2, torch.nan, -0.7]]), 0.5).isnan().tolist() == [[False, True, False]]


def test_a_perfect_reconstruction_costs_nothing(host: CausalMean, contexts: Contexts, stats: SinkRule) -> None:
    result = evaluate({"teacher": Perfect(0)}, host, HOOK, contexts, store_stats=stats)
    got = result["teacher"]
    assert (got["fvu"], got["delta_ce"], got["kl"]) == (0, 0, 0)
    assert (got["loss_recovered"], got["loss_recovered_mean"]) == (1, 1)
    assert got["l0"] == D  # signed latents are counted, and
    assert 0.2 < got["negative"] < 0.8  # said to be negative
    assert "verdict" not in result
    assert "rsae_minus_teacher" not in result


@pytest.mark.parametrize("batch_size", [1, 2, 9, 100])
def test_no_number_depends_on_the_batch_size(
    host: CausalMean, contexts: Contexts, stats: SinkRule, batch_size: int
) -> None:
    arms = {"teacher": TinySAE(0), "control": TinySAE(1), "rsae": TinySAE(2)}
    one = evaluate(arms, host, HOOK, contexts, store_stats=stats, batch_size=4, ce_tokens=33)
    other = evaluate(arms, host, HOOK, contexts, store_stats=stats, batch_size=batch_size, ce_tokens=33)

    def same(a: Any, b: Any) -> None:
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                same(a[key], b[key])
        elif isinstance(a, float) or (isinstance(a, list) and isinstance(a[0], float)):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
        else:
            assert a == b

    same(one, other)


def test_the_loss_is_over_contexts_spread_evenly(host: CausalMean, contexts: Contexts, stats: SinkRule) -> None:
    chosen = [0, 2, 4, 6, 8]  # five of nine: round(linspace(0, 8, 5))
    assert len(contexts.tokens) == 9
    some = Contexts(contexts.tokens[chosen], contexts.documents[chosen], contexts.sources)
    for ce_tokens in (33, 40):  # rounded up to five contexts of eight
        part = evaluate(
            {"teacher": TinySAE(0)}, host, HOOK, contexts, store_stats=stats, ce_tokens=ce_tokens, batch_size=2
        )
        whole = evaluate({"teacher": TinySAE(0)}, host, HOOK, some, store_stats=stats)
        assert part["teacher"]["n_tokens"] > whole["teacher"]["n_tokens"]
        for key in ("n_ce_tokens", "ce_clean", "ce_spliced", "kl", "ce_zero_ablated", "ce_mean_ablated"):
            assert part["teacher"][key] == close(whole["teacher"][key])


def test_runs_measured_together_are_as_measured_alone(host: CausalMean, contexts: Contexts, stats: SinkRule) -> None:
    runs = {name: {"rsae": TinySAE(seed), "control": TinySAE(seed + 1)} for seed, name in enumerate(("relu", "topk"))}
    together = evaluate_runs(runs, host, HOOK, contexts, store_stats=stats)
    for name, arms in runs.items():
        alone = evaluate(arms, host, HOOK, contexts, store_stats=stats)
        for key in ("rsae", "control", "rsae_minus_control", "verdict"):
            assert together[name][key] == alone[key]


def test_a_loss_belongs_to_the_document_of_the_predicted_token(
    host: CausalMean, contexts: Contexts, stats: SinkRule
) -> None:
    documents = torch.zeros(9, 8, dtype=torch.int64)
    documents[:, -1] = 1  # predicted, never predicting
    result = evaluate({"teacher": TinySAE(0)}, host, HOOK, contexts._replace(documents=documents), store_stats=stats)
    assert result["teacher"]["n_ce_documents"] == 2
    documents[:, 1:] = 0
    documents[:, 0] = 1  # BOS: neither
    result = evaluate({"teacher": TinySAE(0)}, host, HOOK, contexts._replace(documents=documents), store_stats=stats)
    assert result["teacher"]["n_ce_documents"] == 1


def test_what_is_not_counted_does_not_help(host: CausalMean, contexts: Contexts, stats: SinkRule) -> None:
    sae, eps = TinySAE(0), 0.7
    got = evaluate({"teacher": sae}, host, HOOK, contexts, store_stats=stats, eps=eps)
    kept = host.activations(contexts.tokens, HOOK)[measured_by_hand(contexts)]
    latents = sae.encode(kept)
    latents[latents <= eps] = 0
    sse = (kept - sae.decode(latents)).square().sum()
    assert got["teacher"]["fvu"] == close(float(sse / (kept - kept.mean(0)).square().sum()))
    assert got["teacher"]["l0"] == close(float((latents != 0).float().sum(1).mean()))
    plain = evaluate({"teacher": sae}, host, HOOK, contexts, store_stats=stats)["teacher"]
    assert got["teacher"]["l0"] < plain["l0"]
    assert got["teacher"]["ce_spliced"] != plain["ce_spliced"]
    assert "|z| > 0.7" in got["counting_rule"]
    by_arm = evaluate(
        {"teacher": sae, "control": sae}, host, HOOK, contexts, store_stats=stats, eps={"control": eps}
    )  # fmt: skip
    assert by_arm["control"] == got["teacher"]
    assert by_arm["teacher"] == plain
    assert "|z| > 0.7" in by_arm["counting_rule"]
    assert "exact" in by_arm["counting_rule"]


def test_any_pairs_of_arms_are_compared(host: CausalMean, contexts: Contexts, stats: SinkRule) -> None:
    arms = {name: TinySAE(seed) for seed, name in enumerate(("teacher", "control", "rsae", "other"))}
    pairs = [("other", "control"), ("rsae", "other"), ("rsae", "absent")]
    (got,) = evaluate_runs({"": arms}, host, HOOK, contexts, store_stats=stats, pairs=pairs).values()
    assert {name for name in got if "_minus_" in name} == {"other_minus_control", "rsae_minus_other"}
    swapped = {"control": arms["control"], "rsae": arms["other"]}
    expected = evaluate(swapped, host, HOOK, contexts, store_stats=stats)["rsae_minus_control"]
    assert got["other_minus_control"] == expected
    assert "verdict" not in got


def test_metrics_json_and_progress(host: CausalMean, contexts: Contexts, stats: SinkRule, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "run" / "metrics.json"
    arms = {"teacher": TinySAE(0), "control": TinySAE(1), "init": TinySAE(0), "rsae": TinySAE(2)}
    result = evaluate(
        arms, host, HOOK, contexts, store_stats=stats, out=out, batch_size=4, progress=lambda *call: seen.append(call)
    )
    assert json.loads(out.read_text()) == result
    assert list(out.parent.iterdir()) == [out]
    assert seen == [("evaluate", 32, 72), ("evaluate", 64, 72), ("evaluate", 72, 72)]
    promised = (
        "mse fvu l0 alive dense ce_clean ce_spliced delta_ce loss_recovered kl n_tokens n_documents counting_rule"
    )
    assert all(set(promised.split()) <= set(result[name]) for name in arms)


def test_exclusions_do_not_overlap_and_need_no_bos(stats: SinkRule) -> None:
    tokens = torch.tensor([[BOS, 5, EOS, 6]])
    activations = torch.full((1, 4, D), 1e6)  # everything is far from the mean
    masks = exclusions(tokens, activations, SimpleNamespace(bos_token_id=BOS, all_special_ids=[BOS, EOS]), stats)
    assert [mask[0].tolist() for mask in masks] == [
        [True, False, False, False],
        [False, False, True, False],
        [False, True, False, True],
    ]
    plain = exclusions(tokens, activations[..., :] * 0, SimpleNamespace(bos_token_id=None, all_special_ids=[]), stats)
    assert not any(mask.any() for mask in plain)


class Broken(TinySAE):
    """Goes wrong in its latents or in its reconstruction."""

    def __init__(self, where: str, value: float) -> None:
        super().__init__(0)
        self.where, self.value = where, value

    def encode(self, x: Tensor) -> Tensor:
        latents = super().encode(x)
        if self.where == "latents":
            latents[-1, 3] = self.value
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        x_hat = super().decode(latents.nan_to_num(0, 0, 0))
        if self.where == "x_hat":
            x_hat[-1, 2] = self.value
        return x_hat


@pytest.mark.parametrize("where", ["latents", "x_hat"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_names_the_arm_and_writes_nothing(
    host: CausalMean, contexts: Contexts, stats: SinkRule, where: str, value: float, tmp_path: Path
) -> None:
    arms = {"teacher": TinySAE(0), "control": Broken(where, value)}
    with pytest.raises(ValueError, match=f"arm 'control': nan or inf in {where}"):
        evaluate(arms, host, HOOK, contexts, store_stats=stats, out=tmp_path / "metrics.json")
    assert not list(tmp_path.iterdir())


def test_bad_input(host: CausalMean, contexts: Contexts, stats: SinkRule) -> None:
    def run(arms: dict[str, Any] | None = None, text: Contexts = contexts, **changes: Any) -> None:
        evaluate(arms or {"teacher": TinySAE(0)}, host, HOOK, text, **({"store_stats": stats} | changes))

    with pytest.raises(ValueError, match=r"arm 'rsae' has d_in 7 but the host's d_model is 6"):
        run({"teacher": TinySAE(0), "rsae": TinySAE(0, d_in=7)})
    with pytest.raises(ValueError, match="not one of"):
        run({"clean": TinySAE(0)})
    with pytest.raises(ValueError, match=r"store_stats.mean must be \(6,\), got \(5,\)"):
        run(store_stats=stats._replace(mean=torch.zeros(5)))
    with pytest.raises(ValueError, match="no held-out text: 0 contexts"):
        run(text=Contexts(contexts.tokens[:0], contexts.documents[:0], []))
    with pytest.raises(ValueError, match=r"one shape \(N, T\), got \(9, 8\) and \(8, 8\)"):
        run(text=contexts._replace(documents=contexts.documents[1:]))
    with pytest.raises(ValueError, match="hold one document"):
        run({"control": TinySAE(0), "rsae": TinySAE(1)}, contexts._replace(documents=torch.zeros(9, 8).long()))
    with pytest.raises(ValueError, match=r"hold one document.*measure the loss on more tokens"):
        run({"control": TinySAE(0), "rsae": TinySAE(1)}, ce_tokens=1)
    with pytest.raises(ValueError, match=r"at least 1, got 16 and 0"):
        run(ce_tokens=0)
    with pytest.raises(ValueError, match=r"eps names arms that are not measured: \['absent'\]"):
        run(eps={"absent": 0.1})
    with pytest.raises(ValueError, match="eps must be"):
        run(eps=-0.1)
    with pytest.raises(ValueError, match="all 72 held-out tokens are excluded"):
        run(store_stats=stats._replace(ratio=1e-6))
    with torch.no_grad():
        host.linear.bias[0] = math.nan
    with pytest.raises(ValueError, match=rf"nan or inf in the host's activations at '{HOOK}', contexts 0 to 8"):
        run()


@pytest.mark.slow
def test_saelens_saes_in_a_real_transformer(contexts: Contexts) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from rsae.hosts import Host

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=16, initializer_range=0.5, **size))
    tokenizer = SimpleNamespace(bos_token_id=BOS, all_special_ids=[BOS, EOS])
    host = Host(model, tokenizer, spec="test", fingerprint="test")  # type: ignore[arg-type]
    standard = StandardSAE(StandardSAEConfig(d_in=16, d_sae=24))
    topk = TopKSAE(TopKSAEConfig(d_in=16, d_sae=24, k=5))
    for sae in (standard, topk):
        for parameter in sae.parameters():
            nn.init.normal_(parameter, std=0.3)
    stats = SinkRule(torch.full((16,), 0.1), 1.0, 1e9)
    hook = "blocks.1.hook_resid_post"
    result = evaluate({"teacher": standard, "control": topk}, host, hook, contexts, store_stats=stats, batch_size=4)
    assert result["control"]["l0"] == pytest.approx(5, abs=0.05)

    # The oracle: a plain forward hook on the layer and torch's cross entropy.
    tokens = contexts.tokens
    measured = (tokens != BOS) & (tokens != EOS)
    for name, sae in {"teacher": standard, "control": topk}.items():

        def replace(_: nn.Module, __: Any, output: Any, sae: Any = sae) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            x_hat = torch.where(measured[..., None], sae.decode(sae.encode(x)), x)
            return (x_hat, *output[1:]) if isinstance(output, tuple) else x_hat

        with torch.no_grad():
            clean = model(tokens).logits[:, :-1]
            handle = model.model.layers[1].register_forward_hook(replace)
            spliced = model(tokens).logits[:, :-1]
            handle.remove()
        counted = measured[:, :-1]
        targets = tokens[:, 1:][counted]
        ce_clean, ce_spliced = (nn.functional.cross_entropy(logits[counted], targets) for logits in (clean, spliced))
        assert result[name]["ce_clean"] == pytest.approx(float(ce_clean), rel=1e-4)
        assert result[name]["ce_spliced"] == pytest.approx(float(ce_spliced), rel=1e-4)
        kl = nn.functional.kl_div(
            spliced[counted].log_softmax(-1), clean[counted].log_softmax(-1), reduction="batchmean", log_target=True
        )
        assert result[name]["kl"] == pytest.approx(float(kl), rel=1e-3)
        assert result[name]["n_ce_tokens"] == int(counted.sum())
