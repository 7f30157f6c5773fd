"""Checkpoints written by EleutherAI's sparsify, against the package's own SparseCoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsae.teachers.sparsify import matches, read

D_IN, D_SAE, K = 24, 96, 40


@pytest.fixture(scope="module")
def peer() -> Any:
    """The package, with its decoder for CPUs wherever it runs."""
    package = pytest.importorskip("sparsify")
    from sparsify.utils import eager_decode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsify.sparse_coder.decoder_impl", eager_decode)
        yield package


def write_with(peer: Any, folder: Path, **config: Any) -> Path:
    """A checkpoint with nothing trivial in it, and the configuration of its run beside it."""
    torch.manual_seed(0)
    coder = peer.SparseCoder(D_IN, peer.SparseCoderConfig(**{"num_latents": D_SAE, "k": K} | config))
    with torch.no_grad():
        for tensor in coder.parameters():
            tensor.copy_(torch.randn(tensor.shape))
        coder.encoder.weight *= 0.2
        coder.encoder.bias -= 0.5
        coder.W_dec *= 0.2
        coder.b_dec += 1
    coder.save_to_disk(folder)
    (folder.parent / "config.json").write_text(
        json.dumps({"model": "EleutherAI/pythia-160m", "dataset": "some/text", "ctx_len": 2048, "sae": {}})
    )
    return folder


def write(folder: Path, **config: Any) -> Path:
    """The same layout without the package, for checkpoints that must be refused."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": torch.randn(D_SAE, D_IN),
        "encoder.bias": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
    }
    save_file(tensors, folder / "sae.safetensors")
    values = {"activation": "topk", "num_latents": D_SAE, "expansion_factor": 32, "k": K, "d_in": D_IN} | config
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return folder


def change(folder: Path, **tensors: Tensor | None) -> None:
    values = load_file(folder / "sae.safetensors") | {key.replace("__", "."): value for key, value in tensors.items()}
    save_file({key: value for key, value in values.items() if value is not None}, folder / "sae.safetensors")


def inputs() -> Tensor:
    return torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1)) * 1.5 + 1


@torch.no_grad()
def forward(peer: Any, folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (dense) and reconstruction as the package's own loader, encode and decode give them."""
    coder = peer.SparseCoder.load_from_disk(folder)
    values, indices, _ = coder.encode(x)
    reconstruction = coder.decode(values, indices)
    if not coder.cfg.multi_topk:
        assert torch.equal(coder(x).sae_out, reconstruction)
    return torch.zeros(len(x), coder.num_latents).scatter(1, indices, values), reconstruction


@pytest.mark.parametrize(
    "config",
    [{}, {"normalize_decoder": False}, {"multi_topk": True, "k": 8}, {"num_latents": 0, "expansion_factor": 4}],
    ids=str,
)
@torch.no_grad()
def test_same_latents_and_reconstruction(peer: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_with(peer, tmp_path / "run" / "layers.9", **config)
    x = inputs()
    latents, reconstruction = forward(peer, folder, x)

    assert matches(folder)
    reading = read(folder)
    sae = reading.sae
    torch.testing.assert_close(sae.encode(x), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(sae(x), reconstruction, atol=1e-5, rtol=0)

    active = (latents > 0).float()
    assert 0 < active.mean() < 0.6
    assert sae.cfg.architecture() == "topk"
    assert sae.cfg.k == config.get("k", K)
    if not config:  # some of the K largest are negative, so that relu shows
        assert active.sum(dim=1).min() < K
    sae.cfg.apply_b_dec_to_input = False
    assert (sae(x) - reconstruction).abs().max() > 0.1


@torch.no_grad()
def test_forward_of_a_multi_topk_model_is_its_training_loss(peer: Any, tmp_path: Path) -> None:
    folder = write_with(peer, tmp_path / "layers.0", multi_topk=True, k=8)
    x = inputs()
    reading = read(folder)
    trained = peer.SparseCoder.load_from_disk(folder)(x).sae_out
    assert (reading.sae(x) - trained).abs().max() > 0.1
    assert "returns the 32 latents" in reading.decided["k"]
    with_32 = read(write_with(peer, tmp_path / "layers.1", k=32)).sae
    torch.testing.assert_close(with_32(x), trained, atol=1e-5, rtol=0)


def test_float16_weights_are_widened_not_rounded(tmp_path: Path) -> None:
    folder = write(tmp_path / "layers.0")
    change(
        folder, **{key.replace(".", "__"): value.half() for key, value in load_file(folder / "sae.safetensors").items()}
    )
    sae = read(folder).sae
    stored = load_file(folder / "sae.safetensors")
    assert sae.W_dec.dtype == torch.float32
    assert torch.equal(sae.W_dec.data, stored["W_dec"].float())
    assert torch.equal(sae.W_enc.data, stored["encoder.weight"].float().T)


def test_origin_is_read_from_the_run(peer: Any, tmp_path: Path) -> None:
    folder = write_with(peer, tmp_path / "run" / "layers.9")
    for path in (folder, folder / "sae.safetensors"):
        assert matches(path)
        reading = read(path)
        metadata = reading.sae.cfg.metadata
        assert metadata.hook_name == "blocks.9.hook_resid_post"
        assert metadata.model_name == "EleutherAI/pythia-160m"
        assert (metadata.dataset_path, metadata.context_size) == ("some/text", 2048)
        assert metadata.prepend_bos is None
        assert reading.files == (folder / "sae.safetensors",)
    conventions = "architecture, k, apply_b_dec_to_input, normalize_activations, decoder norms, hook_name, model_name, prepend_bos"
    assert set(conventions.split(", ")) <= set(reading.decided)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("h.3", "blocks.3.hook_resid_post"),
        ("model.layers.11", "blocks.11.hook_resid_post"),
        ("layers.4/seed1", "blocks.4.hook_resid_post"),
        ("layers.5.mlp", "layers.5.mlp"),
        ("embed_tokens", "embed_tokens"),
        ("my_sae", None),
        ("layers_5", None),
    ],
)
def test_hook_from_the_folders_name(tmp_path: Path, name: str, hook: str | None) -> None:
    reading = read(write(tmp_path / name))
    assert reading.sae.cfg.metadata.hook_name == hook
    assert reading.sae.cfg.metadata.model_name is None
    assert reading.decided["model_name"].startswith("unknown")
    assert reading.decided["hook_name"].startswith("unknown") == (hook is None)


def test_the_hosts_own_config_beside_it_names_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read(write(tmp_path / "layers.1")).sae.cfg.metadata.model_name is None


@torch.no_grad()
def test_saelens_own_loader_gets_the_decoder_b_dec_and_the_hook_wrong(peer: Any, tmp_path: Path) -> None:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    folder = write_with(peer, tmp_path / "run" / "layers.5.mlp")
    config, state = sparsify_disk_loader(folder)
    assert state["W_dec"].shape == (D_IN, D_SAE)  # transposed
    assert config["apply_b_dec_to_input"] is False  # the package subtracts it
    assert config["hook_name"] == "blocks.5.hook_resid_post"  # the MLP's output is meant
    assert state["W_enc"].dtype == torch.bfloat16  # rounded, and the rounding stays
    with pytest.raises(RuntimeError, match="size mismatch for W_dec"):
        SAE.load_from_disk(folder, converter=sparsify_disk_loader, dtype="float32")

    # where d_in = d_sae nothing stops it
    square = write_with(peer, tmp_path / "run" / "layers.6", num_latents=D_IN, k=8)
    x = inputs()
    latents, reconstruction = forward(peer, square, x)
    theirs = SAE.load_from_disk(square, converter=sparsify_disk_loader, dtype="float32")
    assert (theirs.encode(x) - latents).abs().max() > 0.1
    assert (theirs(x) - reconstruction).abs().max() > 0.1
    torch.testing.assert_close(read(square).sae(x), reconstruction, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "groupmax"}, "groupmax.*largest latent of each of k groups"),
        ({"activation": "gelu"}, "'gelu' cannot be upgraded: not known"),
        ({"transcode": True}, "transcode.*rsae upgrades autoencoders"),
        ({"skip_connection": True}, "skip_connection.*linear map"),
        ({"signed": True}, "signed.*keep their sign"),
        ({"gram_lookup": True}, "gram_lookup.*not in the checkpoint"),
        ({"monet": True}, "monet = True is not a key"),
        ({"k": ...}, "lacks k; it has activation"),
        ({"d_in": ...}, "lacks d_in"),
        ({"num_latents": 0, "expansion_factor": ...}, "lacks expansion_factor"),
        ({"k": "32"}, "k = '32'"),
        ({"k": D_SAE + 1}, r"cfg\.json: k = 97, of 96 latents"),
        ({"d_in": 25}, r"encoder.weight has shape \(96, 24\); expected \(96, 25\)"),
        ({"num_latents": 0}, r"encoder.weight has shape \(96, 24\); expected \(768, 24\)"),
    ],
    ids=str,
)
def test_configurations_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = write(tmp_path / "layers.0", **config)
    assert matches(folder)
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W_dec": None}, "no tensor 'W_dec'; it holds"),
        ({"encoder__bias": None}, "no tensor 'encoder.bias'"),
        ({"W_dec": torch.ones(D_IN, D_SAE)}, r"W_dec has shape \(24, 96\); expected \(96, 24\): is it transposed"),
        ({"encoder__weight": torch.ones(D_IN, D_SAE)}, r"encoder.weight has shape \(24, 96\).*transposed"),
        ({"b_dec": torch.full((D_IN,), torch.nan)}, "b_dec holds 24 nan or inf"),
        ({"W_skip": torch.zeros(D_IN, D_IN)}, "W_skip: W_skip adds a linear map"),
        ({"threshold": torch.zeros(D_SAE)}, "holds threshold, which a sparsify autoencoder does not have"),
    ],
    ids=str,
)
def test_tensors_refused(tmp_path: Path, tensors: dict[str, Tensor | None], message: str) -> None:
    folder = write(tmp_path / "layers.0")
    change(folder, **tensors)
    with pytest.raises(ValueError, match=message) as error:
        read(folder)
    assert "sae.safetensors" in str(error.value)


def test_damaged_files_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "layers.0")
    weights, config = folder / "sae.safetensors", folder / "cfg.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"sae\.safetensors cannot be read.*truncated"):
        read(folder)
    weights.unlink()
    assert not matches(folder)
    with pytest.raises(ValueError, match=r"sae\.safetensors does not exist"):
        read(folder)
    weights.write_bytes(whole)
    config.write_text('{"k": 3')
    assert matches(folder)
    with pytest.raises(ValueError, match=r"cfg\.json is not valid JSON"):
        read(folder)
    config.write_text("[1]")
    with pytest.raises(ValueError, match=r"cfg\.json holds a list"):
        read(folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"cfg\.json does not exist"):
        read(folder)


def test_matches_nothing_else(tmp_path: Path) -> None:
    assert not matches(tmp_path)
    assert not matches(tmp_path / "nothing")
    folder = write(tmp_path / "saelens", architecture="topk")
    assert not matches(folder)
