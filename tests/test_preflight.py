"""Preflight: a teacher read right agrees with its activations, and each convention read wrong is found and named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tiny_host import save_text, save_tiny

from rsae.hosts import Host, load_host
from rsae.preflight import preflight
from rsae.teachers import load_teacher

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    """Activations far from 0, as those of real models are: what is added to an embedding stays in the residual stream."""
    host = load_host(str(save_tiny(tmp_path_factory.mktemp("host"))))
    host.model.get_input_embeddings().weight.data += 3.0
    return host


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def sample(host: Host) -> torch.Tensor:
    tokens = torch.randint(6, 64, (64, 16), generator=torch.Generator().manual_seed(1))
    return host.activations(tokens, HOOK).float().reshape(-1, host.d_model)


def near_identity(
    host: Host,
    *,
    subtracts: bool,
    declared: bool | None = None,
    scale: float = 1.0,
    norm: float = 1.0,
    x: torch.Tensor | None = None,
) -> JumpReLUSAE:
    """A JumpReLU that gives every coordinate back while it is between two bounds: x_hat = low + relu(x - low) - relu(x - high).

    Args:
        subtracts: whether b_dec has to be subtracted; declared: what the checkpoint says of it, by default the same.
        scale: the factor by which its inputs have to be multiplied.
        norm: of the decoder rows, which encoder and threshold make up for.
        x: what it has to give back, if not the host's activations.
    """
    x = scale * sample(host) if x is None else x
    d = x.shape[1]
    low, high = x.mean(0) - 1.7 * x.std(0), x.mean(0) + 1.7 * x.std(0)
    metadata = SAEMetadata(hook_name=HOOK, model_name="tiny", prepend_bos=True)
    cfg = JumpReLUSAEConfig(
        d_in=d, d_sae=2 * d, apply_b_dec_to_input=subtracts if declared is None else declared, metadata=metadata
    )
    sae = JumpReLUSAE(cfg)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d).repeat(1, 2) / norm)
        sae.W_dec.copy_(torch.cat([torch.eye(d), -torch.eye(d)]) * norm)
        sae.b_dec.copy_(low)
        bounds = torch.cat([low, high]) - (low.repeat(2) if subtracts else 0)
        sae.b_enc.copy_(-bounds / norm)
        sae.threshold.copy_(0.2 * x.std(0).repeat(2) / norm)
    return sae


def run(sae: JumpReLUSAE | TopKSAE, host: Host, text: str, folder: Path, hook: str = HOOK) -> dict:
    sae.save_model(folder / "teacher")
    teacher = load_teacher(folder / "teacher")
    return preflight(
        teacher, host, hook, text, tokens=600, ce_tokens=200, context_length=16, out=folder / "preflight.json"
    )


@pytest.mark.parametrize("subtracts", [True, False])
def test_a_teacher_that_reads_right(host, text, tmp_path, subtracts) -> None:
    found = run(near_identity(host, subtracts=subtracts), host, text, tmp_path)
    assert found["verdict"] == "agrees"
    assert found["warnings"] == []
    assert 0 < found["metrics"]["fvu"] < 0.2
    assert found["metrics"]["delta_ce"] is not None
    assert found["found"]["decoder_norms"] == pytest.approx(dict.fromkeys(("0%", "5%", "50%", "95%", "100%"), 1.0))
    tested = {row["convention"] for row in found["alternatives"]}
    assert tested == {"b_dec before the encoder", "inputs", "BOS"}
    assert json.loads((tmp_path / "preflight.json").read_text()) == found


@pytest.mark.parametrize("subtracts", [True, False])
def test_b_dec_read_wrong(host, text, tmp_path, subtracts) -> None:
    found = run(near_identity(host, subtracts=subtracts, declared=not subtracts), host, text, tmp_path)
    assert found["verdict"] == "contradicted"
    assert found["warnings"][0].startswith("b_dec before the encoder: read as")
    (right,) = [row for row in found["alternatives"] if row["convention"] == "b_dec before the encoder"]
    assert right["instead"] == ("subtracted" if subtracts else "not subtracted")
    assert right["fvu"] < 0.2 < found["metrics"]["fvu"]


def test_inputs_that_had_to_be_scaled(host, text, tmp_path) -> None:
    factor = host.d_model**0.5 / float(sample(host).norm(dim=1).mean())
    assert factor < 0.7
    found = run(near_identity(host, subtracts=True, scale=factor), host, text, tmp_path)
    assert found["verdict"] == "contradicted"
    assert "scaled to mean norm sqrt(d_in)" in found["warnings"][0]


def test_a_scale_that_is_in_the_weights_and_declared_again(host, text, tmp_path) -> None:
    factor = host.d_model**0.5 / float(sample(host).norm(dim=1).mean())
    found = run(near_identity(host, subtracts=True, scale=1 / factor), host, text, tmp_path)
    assert "scaled back" in found["warnings"][0]


def test_decoder_rows_that_should_be_of_unit_norm(host, text, tmp_path) -> None:
    sae = near_identity(host, subtracts=True, norm=1.0)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(1.5, 3, len(sae.W_dec))[:, None])
    found = run(sae, host, text, tmp_path)
    assert any(w.startswith("decoder rows: read as 'as stored'") for w in found["warnings"])


def test_a_threshold_on_h_times_the_decoder_norm(host, text, tmp_path) -> None:
    sae = near_identity(host, subtracts=True, norm=4.0)
    with torch.no_grad():
        sae.threshold.mul_(4.0)
    found = run(sae, host, text, tmp_path)
    assert any(w.startswith("thresholds compared with: read as 'h'") for w in found["warnings"])


def test_layer_norm_that_is_not_declared(host, text, tmp_path) -> None:
    x = sample(host)
    normed = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    sae = near_identity(host, subtracts=True, x=normed)
    found = run(sae, host, text, tmp_path)
    assert found["verdict"] == "contradicted"
    assert "as 'layer_norm'" in found["warnings"][0]
    sae.cfg.normalize_activations = "layer_norm"
    assert run(sae, host, text, tmp_path / "right")["verdict"] == "agrees"


def test_layer_norm_that_is_declared_wrongly(host, text, tmp_path) -> None:
    sae = near_identity(host, subtracts=True)
    sae.cfg.normalize_activations = "layer_norm"
    found = run(sae, host, text, tmp_path)
    assert any(w.startswith("inputs: read as 'layer_norm'") and "as 'none'" in w for w in found["warnings"])


@pytest.mark.parametrize("declared", [False, True])
def test_the_k_largest_of_h_times_the_decoder_norm(host, text, tmp_path, declared) -> None:
    """One half of the latents has long rows and small pre-activations: by h alone they would never be among the k largest."""
    d, good = host.d_model, near_identity(host, subtracts=True)
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=2 * d, k=d, rescale_acts_by_decoder_norm=declared))
    norms = torch.cat([torch.full((d,), 20.0), torch.full((d,), 0.05)])
    high = sample(host).mean(0) + 1.7 * sample(host).std(0)
    with torch.no_grad():
        # x_hat = high - relu(high - x): those are the long rows; what the others say is noise
        sae.W_enc.copy_(torch.cat([-torch.eye(d) / 20, 5 * torch.eye(d)], dim=1))
        sae.W_dec.copy_(torch.cat([-torch.eye(d), torch.eye(d).roll(1, 0)]) * norms[:, None])
        sae.b_enc.copy_(torch.cat([torch.zeros(d), 5 * (high - good.b_dec)]))
        sae.b_dec.copy_(high)
    if declared:  # latents come out multiplied by the norms, and the decoder divides by them
        found = run(sae, host, text, tmp_path)
        assert not any(w.startswith("the k largest of") for w in found["warnings"])
    else:
        found = run(sae, host, text, tmp_path)
        assert any(w.startswith("the k largest of: read as 'h'") for w in found["warnings"])


def test_worse_than_the_mean(host, text, tmp_path) -> None:
    sae = near_identity(host, subtracts=True)
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.flip(0).roll(3, 1))
    found = run(sae, host, text, tmp_path)
    assert found["verdict"] == "contradicted"
    assert any("worse than the mean activation" in w for w in found["warnings"])


def test_a_shrunk_relu_is_no_contradiction(host, text, tmp_path) -> None:
    """Rows a little shorter than 1 and latents shrunk by l1: a longer decoder reconstructs better, and is not what was trained."""
    sae = near_identity(host, subtracts=True)
    with torch.no_grad():
        sae.W_dec.mul_(0.97)
    assert not any(w.startswith("decoder rows") for w in run(sae, host, text, tmp_path)["warnings"])


def test_a_decoder_row_of_zeros_hides_nothing(host, text, tmp_path) -> None:
    sae = near_identity(host, subtracts=True)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(1.5, 3, len(sae.W_dec))[:, None])
        sae.W_dec[5] = 0.0
    assert any(w.startswith("decoder rows: read as 'as stored'") for w in run(sae, host, text, tmp_path)["warnings"])


def test_attention_heads_are_refused(host, text, tmp_path) -> None:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=16, d_sae=32, reshape_activations="hook_z"))
    with pytest.raises(ValueError, match="attention heads"):
        run(sae, host, text, tmp_path)


def test_the_command(host, text, tmp_path) -> None:
    near_identity(host, subtracts=True, declared=False).save_model(tmp_path / "teacher")
    host.model.save_pretrained(tmp_path / "host")
    host.tokenizer.save_pretrained(tmp_path / "host")
    arguments = [str(tmp_path / "teacher"), "--host", str(tmp_path / "host"), "--hook", HOOK, "--text", text]
    out = str(tmp_path / "found")
    done = subprocess.run(
        [sys.executable, "-m", "rsae", "inspect", *arguments, "--out", out, "--tokens", "2000"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONTRADICT" in done.stdout
    assert "b_dec before the encoder" in done.stdout
    found = (tmp_path / "found" / "preflight.json").read_bytes()
    assert json.loads(found)["verdict"] == "contradicted"
    other = [*arguments[:-3], "blocks.0.hook_resid_post", *arguments[-2:]]
    done = subprocess.run(
        [sys.executable, "-m", "rsae", "inspect", *other, "--out", out], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "preflight.json is of another hook: choose another --out" in done.stderr
    assert (tmp_path / "found" / "preflight.json").read_bytes() == found


def test_another_layer(host, text, tmp_path) -> None:
    found = run(near_identity(host, subtracts=True), host, text, tmp_path, hook="blocks.0.hook_resid_pre")
    assert f"the checkpoint names the hook '{HOOK}'; it is read at 'blocks.0.hook_resid_pre'" in found["warnings"]


def test_trained_without_bos_is_told(host, text, tmp_path) -> None:
    sae = near_identity(host, subtracts=True)
    sae.cfg.metadata.prepend_bos = False
    assert any("without BOS" in warning for warning in run(sae, host, text, tmp_path)["warnings"])


@pytest.mark.filterwarnings("ignore:(?s).*model_from_pretrained_kwargs")
def test_trained_on_centred_activations_is_told(host, text, tmp_path, monkeypatch) -> None:
    sae = near_identity(host, subtracts=True)
    assert not any("center_writing" in warning for warning in run(sae, host, text, tmp_path)["warnings"])
    monkeypatch.setattr(host, "is_centred", True)
    assert any("does not say that it was trained on such" in w for w in run(sae, host, text, tmp_path)["warnings"])
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    assert not any("center_writing" in warning for warning in run(sae, host, text, tmp_path)["warnings"])
    monkeypatch.setattr(host, "is_centred", False)
    assert not any("center_writing" in w for w in run(sae, host, text, tmp_path)["warnings"])  # it cannot be: RMSNorm
    monkeypatch.setattr(host, "reads_mean", False)
    assert any(f"name it centred:{host.spec}" in warning for warning in run(sae, host, text, tmp_path)["warnings"])


def test_another_width(host, text, tmp_path) -> None:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=16))
    with pytest.raises(ValueError, match=r"d_in 8, the host .* d_model 16"):
        run(sae, host, text, tmp_path)
