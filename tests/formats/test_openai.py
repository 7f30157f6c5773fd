"""State dicts of OpenAI's Autoencoder, against a forward pass in numpy."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rsae.teachers import load_teacher
from rsae.teachers.openai import matches, read

D_IN, D_SAE, K = 24, 96, 40


def state_dict(activation: str | None = "TopK", **changes: Any) -> OrderedDict[str, Any]:
    """What torch.save was given: tensors, buffers, and the activation's name and state."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    state: OrderedDict[str, Any] = OrderedDict(
        {
            "pre_bias": randn(D_IN) * 0.5 + 0.2,
            "latent_bias": randn(D_SAE) - 0.5,
            "stats_last_nonzero": torch.arange(D_SAE),
            "latents_activation_frequency": torch.ones(D_SAE),
            "latents_mean_square": torch.zeros(D_SAE),
            "encoder.weight": randn(D_SAE, D_IN) * 0.2,
            "decoder.weight": randn(D_IN, D_SAE) * 0.2,
        }
    )
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined] - as Module.state_dict leaves it
    if activation is not None:
        inner: OrderedDict[str, Any] = OrderedDict()
        inner._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
        if activation == "TopK":
            inner |= {"k": K, "postact_fn": "ReLU"}
        state |= {"activation": activation, "activation_state_dict": inner}
    for key, value in changes.items():
        state[key.replace("__", ".")] = value
    for key in [key for key, value in state.items() if value is None]:
        del state[key]
    return state


def save(folder: Path, state: Any, name: str = "6.pt", **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name, **options)
    return folder / name


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(0.7, 1.5, (64, D_IN)).astype(np.float32)


def forward(state: dict[str, Any], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and reconstruction, written from the description of the class."""
    topk = state.get("activation") == "TopK"
    mean = std = None
    if topk:
        mean = x.mean(axis=1, keepdims=True)
        std = x.std(axis=1, ddof=1, keepdims=True)
        x = (x - mean) / (std + 1e-5)
    bias = state["pre_bias"].numpy()
    z = (x - bias) @ state["encoder.weight"].numpy().T + state["latent_bias"].numpy()
    if topk:
        threshold = np.sort(z, axis=1)[:, -int(state["activation_state_dict"]["k"])][:, None]
        z = np.where(z >= threshold, z, 0)
    latents = np.maximum(z, 0)
    reconstruction = latents @ state["decoder.weight"].numpy().T + bias
    return latents, reconstruction if mean is None else reconstruction * std + mean


@pytest.mark.parametrize(
    "options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before zip was the format"]
)
@pytest.mark.parametrize("activation", ["TopK", "ReLU", None])
@torch.no_grad()
def test_same_latents_and_reconstruction(tmp_path: Path, activation: str | None, options: dict[str, Any]) -> None:
    state = state_dict(activation)
    file = save(tmp_path, state, **options)
    x = inputs()
    latents, reconstruction = forward(state, x)

    assert matches(file)
    reading = read(file)
    sae, given = reading.sae, torch.from_numpy(x)
    np.testing.assert_allclose(sae.encode(given), latents, atol=1e-5, rtol=0)
    np.testing.assert_allclose(sae(given), reconstruction, atol=1e-5, rtol=0)
    np.testing.assert_allclose(sae.decode(sae.encode(given)), reconstruction, atol=1e-5, rtol=0)

    active = latents > 0
    assert 0.05 < active.mean() < 0.6
    assert sae.cfg.normalize_activations == ("layer_norm" if activation == "TopK" else "none")
    if activation == "TopK":
        assert sae.cfg.k == K
        assert active.sum(axis=1).min() < K  # some of the K largest are negative, so that relu shows
    sae.cfg.apply_b_dec_to_input = False
    assert np.abs(sae(given).numpy() - reconstruction).max() > 0.1


@torch.no_grad()
def test_each_part_of_the_normalisation_shows(tmp_path: Path) -> None:
    state = state_dict()
    sae = read(save(tmp_path, state)).sae
    small = inputs() * 1e-3  # where 1e-5 added to std is seen
    x = torch.from_numpy(small)
    latents, reconstruction = forward(state, small)
    np.testing.assert_allclose(sae.encode(x), latents, atol=1e-5, rtol=0)
    np.testing.assert_allclose(sae(x), reconstruction, atol=1e-5, rtol=0)

    mean = x.mean(dim=1, keepdim=True)
    others = {
        "no normalisation": x,
        "biased std": (x - mean) / (x.std(dim=1, correction=0, keepdim=True) + 1e-5),
        "no epsilon": (x - mean) / x.std(dim=1, keepdim=True),
        "epsilon inside the root": (x - mean) / (x.var(dim=1, keepdim=True) + 1e-5).sqrt(),
        "no mean": x / (x.std(dim=1, keepdim=True) + 1e-5),
    }
    for name, wrong in others.items():
        pre = (wrong - sae.b_dec) @ sae.W_enc + sae.b_enc
        assert np.abs(sae.activation_fn(pre).numpy() - latents).max() > 1e-3, name


def test_k_may_be_a_tensor_and_relu_after_topk_unsaid(tmp_path: Path) -> None:
    sae = read(save(tmp_path, state_dict(activation_state_dict={"k": torch.tensor(7)}))).sae
    assert sae.cfg.k == 7


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("resid_post_mlp_v5_32k/autoencoders", "blocks.6.hook_resid_post"),
        ("resid_post_attn_v5_128k/autoencoders", "blocks.6.hook_resid_mid"),
        ("resid_delta_attn_v5_32k/autoencoders", "blocks.6.hook_attn_out"),
        ("resid_delta_mlp_v4/autoencoders", "blocks.6.hook_mlp_out"),
        ("mlp_post_act/autoencoders", "blocks.6.mlp.hook_post"),
        ("resid_post_mlp_v5_32k", None),
        ("elsewhere/autoencoders", None),
    ],
)
def test_host_and_hook_from_the_published_path(tmp_path: Path, folder: str, hook: str | None) -> None:
    file = save(tmp_path / "gpt2-small" / folder, state_dict())
    for path in (file, file.parent):
        assert matches(path)
        reading = read(path)
        assert reading.files == (file,)
        assert reading.sae.cfg.metadata.hook_name == hook
        assert reading.sae.cfg.metadata.model_name == "gpt2"
        assert reading.decided["hook_name"].startswith("unknown") == (hook is None)
    conventions = "architecture, k, apply_b_dec_to_input, normalize_activations, decoder norms, hook_name, model_name, prepend_bos"
    assert set(conventions.split(", ")) <= set(reading.decided)


def test_host_and_hook_unknown_elsewhere(tmp_path: Path) -> None:
    reading = read(save(tmp_path, state_dict()))
    assert reading.sae.cfg.metadata.hook_name is None
    assert reading.sae.cfg.metadata.model_name is None
    assert reading.decided["model_name"].startswith("unknown")


def test_a_folder_must_hold_one_file(tmp_path: Path) -> None:
    save(tmp_path, state_dict(), "0.pt")
    save(tmp_path, state_dict(), "1.pt")
    assert matches(tmp_path)
    with pytest.raises(ValueError, match=r"holds 2 \.pt files \(0\.pt, 1\.pt\): name the one"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "Identity"}, "activation 'Identity'; rsae upgrades ReLU and TopK"),
        ({"activation": "GELU"}, "activation 'GELU'"),
        ({"activation_state_dict": None}, "no k in activation_state_dict"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, "no k in activation_state_dict"),
        ({"activation_state_dict": {"k": 8, "postact_fn": "Identity"}}, "postact_fn 'Identity'"),
        ({"activation_state_dict": {"k": 8.5, "postact_fn": "ReLU"}}, "k = 8.5"),
        ({"activation_state_dict": {"k": 97, "postact_fn": "ReLU"}}, "k = 97 in activation_state_dict, of 96 latents"),
        ({"decoder__weight": None}, "no tensor 'decoder.weight'; it holds"),
        ({"encoder__weight": None}, "no tensor 'encoder.weight'"),
        ({"pre_bias": None}, "no tensor 'pre_bias'"),
        ({"encoder__weight": torch.ones(D_IN, D_SAE)}, r"latent_bias has shape \(96,\); expected \(24,\)"),
        ({"decoder__weight": torch.ones(D_SAE, D_IN)}, r"decoder.weight has shape \(96, 24\).*\(24, 96\).*transposed"),
        ({"latent_bias": torch.ones(D_SAE, 1)}, r"latent_bias has shape \(96, 1\); expected \(96,\)"),
        ({"pre_bias": torch.full((D_IN,), torch.inf)}, "pre_bias holds 24 nan or inf"),
    ],
    ids=str,
)
def test_contents_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = save(tmp_path, state_dict(**changes))
    with pytest.raises(ValueError, match=message):
        read(file)


def test_a_topk_trainers_state_dict_is_not_taken_for_relu(tmp_path: Path) -> None:
    # OpenAI's own training script has these tensors, no buffers but one, and does not name its activation
    state = state_dict(None, latents_activation_frequency=None, latents_mean_square=None)
    file = save(tmp_path, state)
    assert matches(file)
    with pytest.raises(ValueError, match=r"does not name its activation.*ReLU or TopK"):
        read(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file_refused(tmp_path: Path, zipped: bool) -> None:
    file = save(tmp_path, state_dict(), _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:-9000])
    assert matches(file)
    with pytest.raises(ValueError, match=r"6\.pt cannot be read.*truncated"):
        read(file)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_execute_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    trapped = state_dict(latents_mean_square=Trap(tmp_path / "executed"))
    file = save(tmp_path / "zoo", trapped, _use_new_zipfile_serialization=zipped)
    assert matches(file)
    with pytest.raises(ValueError, match="would execute code: refused"):
        read(file)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()  # the trap is a real one


def test_matches_nothing_else(tmp_path: Path) -> None:
    assert not matches(tmp_path)
    assert not matches(tmp_path / "nothing.pt")
    assert not matches(save(tmp_path, {"encoder.weight": torch.ones(2, 2), "bias": torch.ones(2)}, "ae.pt"))
    other = tmp_path / "notes.txt"
    other.write_text("pre_bias latent_bias")
    assert not matches(other)


def test_a_tensor_that_autoencoder_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds gain, which Autoencoder does not"):
        load_teacher(save(tmp_path, state_dict("TopK", gain=torch.ones(D_SAE))))


def test_host_and_hook_through_the_links_of_the_hub_s_cache(tmp_path: Path) -> None:
    blob = save(tmp_path / "blobs", state_dict("TopK"), "0123abc")
    folder = tmp_path / "snapshots" / "main" / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders"
    folder.mkdir(parents=True)
    (folder / "6.pt").symlink_to(blob)
    conventions = load_teacher(folder / "6.pt").conventions
    assert (conventions["hook_name"], conventions["model_name"]) == ("blocks.6.hook_resid_post", "gpt2")
