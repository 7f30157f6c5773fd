"""Gemma Scope's files in their published layouts, against its tutorial's function in plain NumPy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rsae.teachers.gemma_scope import matches, read

D_IN, D_SAE = 24, 96
FIRST = "google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
SECOND = "google/gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_small"
CONFIG = {
    "hf_hook_point_in": "model.layers.12.output",
    "hf_hook_point_out": "model.layers.12.output",
    "width": D_SAE,
    "model_name": "google/gemma-3-270m-pt",
    "architecture": "jump_relu",
    "l0": 20,
    "affine_connection": False,
    "type": "sae",
}


def random_weights() -> dict[str, Tensor]:
    """Nothing trivial: rows of other norms than 1, biases, thresholds from below zero to above."""
    torch.manual_seed(0)
    return {
        "W_enc": torch.randn(D_IN, D_SAE) * 0.3,
        "W_dec": torch.randn(D_SAE, D_IN) * torch.linspace(0.02, 0.3, D_SAE)[:, None],
        "b_enc": torch.randn(D_SAE) - 0.5,
        "b_dec": torch.randn(D_IN) + 1,
        "threshold": torch.randn(D_SAE) * 0.5 + 0.8,
    }


def write(root: Path, folder: str = FIRST, config: Any = None, **changes: Any) -> Path:
    """A checkpoint of Gemma Scope, or of Gemma Scope 2 where its folder is one's; None as a tensor leaves it out."""
    path = root / folder
    path.mkdir(parents=True)
    values = {name: value for name, value in (random_weights() | changes).items() if value is not None}
    if "gemma-scope-2-" in folder:
        save_file({name.lower(): value.contiguous() for name, value in values.items()}, path / "params.safetensors")
    else:
        np.savez(path / "params.npz", **{name: value.numpy() for name, value in values.items()})
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def inputs() -> Tensor:
    return torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1)) + 0.7


def forward(x: Tensor, weights: dict[str, Tensor], *, subtract: bool = False) -> tuple[Tensor, Tensor]:
    """The tutorial's encode and decode, in float64."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    pre = (x.double().numpy() - subtract * w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    latents = (pre > w["threshold"]) * np.maximum(pre, 0)
    return torch.from_numpy(latents).float(), torch.from_numpy(latents @ w["W_dec"] + w["b_dec"]).float()


@torch.no_grad()
def assert_computes(sae: Any, x: Tensor, expected: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    latents = sae.encode(x)
    assert 0.05 < (latents > 0).float().mean() < 0.6
    assert (latents - expected[0]).abs().max() <= tolerance
    assert (sae.decode(latents) - expected[1]).abs().max() <= tolerance
    assert (sae(x) - expected[1]).abs().max() <= tolerance


@pytest.mark.parametrize(("folder", "config"), [(FIRST, None), (SECOND, CONFIG), (SECOND, None)])
def test_it_computes_what_the_tutorial_computes(tmp_path: Path, folder: str, config: Any) -> None:
    path, x = write(tmp_path, folder, config), inputs()
    assert matches(path)
    reading = read(path)
    assert_computes(reading.sae, x, forward(x, random_weights()))
    assert (forward(x, random_weights(), subtract=True)[1] - reading.sae(x)).abs().max() > 0.1  # a slip would be seen
    assert reading.sae.cfg.architecture() == "jumprelu"
    assert not reading.sae.cfg.apply_b_dec_to_input
    assert [file.parent for file in reading.files] == [path]
    assert reading.sae.W_enc.dtype == torch.float32


def test_a_file_is_read_as_its_folder_is(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert matches(path / "params.npz")
    assert not matches(tmp_path)
    assert not matches(tmp_path / "nowhere")
    assert read(path / "params.npz").sae.cfg.metadata.hook_name == "blocks.20.hook_resid_post"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_computed_with_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    narrow = {name: value.to(dtype) for name, value in random_weights().items()}
    x = inputs()
    assert_computes(read(write(tmp_path, SECOND, CONFIG, **narrow)).sae, x, forward(x, narrow))


@pytest.mark.parametrize(
    ("folder", "model", "hook"),
    [
        (FIRST, "google/gemma-2-2b", "blocks.20.hook_resid_post"),
        ("gemma-scope-9b-it-res/layer_9/width_16k/average_l0_88", "google/gemma-2-9b-it", "blocks.9.hook_resid_post"),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_104", "google/gemma-2-2b", "blocks.3.attn.hook_z"),
        ("gemma-scope-27b-pt-mlp/layer_0/width_131k/average_l0_5", "google/gemma-2-27b", "blocks.0.hook_mlp_out"),
        (
            "hub/models--google--gemma-scope-9b-pt-res/snapshots/0123abcd/layer_31/width_16k/average_l0_114",
            "google/gemma-2-9b",
            "blocks.31.hook_resid_post",
        ),
        ("somewhere/layer_7/width_16k/average_l0_60", None, None),
        ("renamed", None, None),
        ("gemma-scope-2-1b-pt/attn_out_all/layer_11_width_16k_l0_big", "google/gemma-3-1b-pt", "blocks.11.attn.hook_z"),
        (
            "gemma-scope-2-270m-it/mlp_out/layer_5_width_65k_l0_medium",
            "google/gemma-3-270m-it",
            "blocks.5.hook_mlp_out",
        ),
        (SECOND, "google/gemma-3-270m", "blocks.12.hook_resid_post"),
    ],
)
def test_host_and_hook_are_what_the_path_says_and_no_more(
    tmp_path: Path, folder: str, model: str | None, hook: str | None
) -> None:
    reading = read(write(tmp_path, folder))
    metadata = reading.sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.prepend_bos) == (model, hook, True)
    assert ("unknown" in reading.decided["model_name"]) == (model is None)
    assert ("unknown" in reading.decided["hook_name"]) == (hook is None)


def test_in_the_hubs_cache_the_files_are_links_to_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "models--google--gemma-scope-2b-pt-mlp"
    path = write(repository, "snapshots/0123abcd/layer_4/width_16k/average_l0_60")
    (repository / "blobs").mkdir()
    shutil.move(path / "params.npz", repository / "blobs" / "f00d")
    (path / "params.npz").symlink_to(repository / "blobs" / "f00d")
    metadata = read(path).sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("google/gemma-2-2b", "blocks.4.hook_mlp_out")


def test_config_json_says_more_than_the_path(tmp_path: Path) -> None:
    config = CONFIG | dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.3.self_attn.o_proj.input")
    reading = read(write(tmp_path, "gemma-scope-2-mine", config | {"model_name": "gemma-v3-4b-it"}))
    metadata = reading.sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("google/gemma-3-4b-it", "blocks.3.attn.hook_z")
    assert "flatten" in reading.decided["reshape_activations"]
    elsewhere = dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.3.mlp.up_proj.output")
    assert read(write(tmp_path, SECOND, CONFIG | elsewhere)).sae.cfg.metadata.hook_name is None


def test_attention_saes_take_the_heads_side_by_side(tmp_path: Path) -> None:
    reading = read(write(tmp_path, "gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_104"))
    z = inputs().reshape(4, 16, 3, 8)  # (batch, position, head, d_head), as TransformerLens' hook_z
    latents, out = forward(inputs(), random_weights())
    assert_computes(reading.sae, z.flatten(-2), (latents.reshape(4, 16, -1), out.reshape(4, 16, -1)))
    assert "n_heads * d_head" in reading.decided["reshape_activations"]


EMBEDDING = "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"


def test_embedding_saes_take_the_embedding_as_the_first_block_does(tmp_path: Path) -> None:
    reading, rows = read(write(tmp_path, EMBEDDING)), inputs()
    latents, out = forward(rows, random_weights())
    assert_computes(reading.sae, rows * D_IN**0.5, (latents, out * D_IN**0.5))
    assert reading.sae.cfg.metadata.hook_name == "hook_embed"


def test_saelens_leaves_the_bias_of_embedding_saes_unscaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.loading import pretrained_sae_loaders as loaders

    path, rows = write(tmp_path, EMBEDDING), inputs()
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(path / "params.npz"))
    overrides = {"d_in": D_IN, "d_sae": D_SAE}
    _, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", EMBEDDING.split("res/")[1], cfg_overrides=overrides
    )
    theirs = JumpReLUSAE(JumpReLUSAEConfig(**overrides, apply_b_dec_to_input=False))
    theirs.load_state_dict(state)
    latents, out = forward(rows, random_weights())
    assert (theirs.encode(rows * D_IN**0.5) - latents).abs().max() <= 1e-5
    assert (theirs(rows * D_IN**0.5) - out * D_IN**0.5).abs().max() > 1
    assert (read(path).sae(rows * D_IN**0.5) - out * D_IN**0.5).abs().max() <= 1e-3


@pytest.mark.parametrize(
    "folder",
    [
        "google/gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_76",
        "models--google--gemma-scope-2b-pt-transcoders/snapshots/0123abcd/layer_3/width_16k/average_l0_76",
        "google/gemma-scope-2-1b-pt/transcoder/layer_7_width_16k_l0_small",
        "google/gemma-scope-2-1b-pt/transcoder_all/layer_7_width_16k_l0_small",
        "google/gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_22_width_65k_l0_medium",
    ],
)
def test_folders_of_transcoders_and_crosscoders_are_refused(tmp_path: Path, folder: str) -> None:
    path = write(tmp_path, folder)
    assert matches(path)
    with pytest.raises(ValueError, match=r"no SAEs"):
        read(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", r"config.json is not valid JSON"),
        ("[]", r"holds a list, not a configuration"),
        ({"width": D_SAE}, r"config.json lacks architecture; it has width"),
        (CONFIG | {"architecture": "topk"}, r"architecture 'topk'"),
        (CONFIG | {"type": "transcoder"}, r"a transcoder from"),
        (CONFIG | {"type": "crosscoder"}, r"a crosscoder from"),
        (CONFIG | {"hf_hook_point_out": "model.layers.12.post_feedforward_layernorm.output"}, r"no SAE"),
        (CONFIG | {"affine_connection": True}, r"affine_connection True"),
        (CONFIG | {"width": 16384}, r"holds 96 latents, but config.json says width 16384"),
    ],
)
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, SECOND, config))


@pytest.mark.parametrize("folder", [FIRST, SECOND])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, r"params\.\w+ has no tensor 'threshold'; it holds .*b_dec"),
        ({"W_enc": None}, r"has no tensor 'W_enc'"),
        ({"W_dec": torch.zeros(D_IN, D_SAE)}, r"(?i)w_dec has shape \(24, 96\); expected \(96, 24\): is it transposed"),
        ({"W_enc": torch.zeros(D_SAE, D_IN)}, r"(?i)w_dec has shape \(96, 24\); expected \(24, 96\)"),
        ({"W_dec": torch.zeros(D_SAE, 30)}, r"(?i)w_dec has shape \(96, 30\); expected \(96, 24\)"),
        ({"b_enc": torch.zeros(95)}, r"b_enc has shape \(95,\); expected \(96,\)"),
        ({"b_dec": torch.full((D_IN,), torch.nan)}, r"b_dec holds 24 nan or inf"),
        ({"W_enc": torch.zeros(3, D_IN, D_SAE)}, r"(?i)w_enc has shape \(3, 24, 96\); expected 2 axes"),
        ({"threshold": torch.zeros(D_SAE, dtype=torch.int64)}, r"threshold is torch.int64"),
        ({"W_skip": torch.zeros(D_IN, D_IN)}, r"(?i)holds w_skip, which Gemma Scope's SAEs do not have"),
        ({"affine_skip_connection": torch.zeros(D_IN, D_IN)}, r"holds affine_skip_connection"),
        ({"scaling_factor": torch.full((D_SAE,), 2.0)}, r"scaling_factor is not 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, folder: str, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, folder, **changes)
    assert matches(path)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_scaling_factor_of_one_is_no_matter(tmp_path: Path) -> None:
    x = inputs()
    assert_computes(read(write(tmp_path, scaling_factor=torch.ones(D_SAE))).sae, x, forward(x, random_weights()))


@pytest.mark.parametrize(("folder", "name"), [(FIRST, "params.npz"), (SECOND, "params.safetensors")])
def test_a_truncated_file_is_refused(tmp_path: Path, folder: str, name: str) -> None:
    file = write(tmp_path, folder) / name
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*\): truncated"):
        read(file)


def test_a_pickle_in_the_arrays_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    path = write(tmp_path)
    np.savez(path / "params.npz", W_enc=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match=r"params.npz holds pickled objects, which would execute code: refused"):
        read(path)
    assert not (tmp_path / "executed").exists()


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither params.safetensors nor params.npz"):
        read(tmp_path)
