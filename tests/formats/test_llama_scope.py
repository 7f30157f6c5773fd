"""Llama Scope's and lm-saes' files in their published layouts, against plain NumPy and against lm-saes' own class."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rsae.teachers.llama_scope import matches, read

D_IN, D_SAE, K = 24, 96, 20
HOOK = "blocks.15.hook_resid_post"
AVERAGE = 2.5
S = D_IN**0.5 / AVERAGE
HYPERPARAMS = {
    "device": "cuda:0",
    "dtype": "torch.bfloat16",
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "expansion_factor": 4,
    "d_model": D_IN,
    "d_sae": D_SAE,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.8,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": AVERAGE, "out": AVERAGE},
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "top_k": K,
}
CONFIG = {
    "sae_type": "sae",
    "d_model": D_IN,
    "expansion_factor": 4.0,
    "use_decoder_bias": True,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": K,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "use_glu_encoder": False,
}


def random_weights(*, unit: bool = False) -> dict[str, Tensor]:
    """Nothing trivial: decoder rows of norm 0.3 to 3 (or 1), biases, mixed thresholds."""
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN), dim=1)
    return {
        "W_E": torch.randn(D_IN, D_SAE) * 0.3,
        "b_E": torch.randn(D_SAE) - 0.5,
        "W_D": rows if unit else rows * torch.linspace(0.3, 3, D_SAE)[torch.randperm(D_SAE)][:, None],
        "b_D": torch.randn(D_IN) + 1,
        "log_threshold": torch.randn(D_SAE) * 0.5,
    }


def write_first(root: Path, weights: dict[str, Tensor] | None = None, *, tensors: Any = None, **changes: Any) -> Path:
    """A folder as fnlp/Llama3_1-8B-Base-LXR-8x has them; a value ... leaves out a tensor or key."""
    w, folder = weights or random_weights(), root / "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x"
    stored = {
        "encoder.weight": w["W_E"].T,
        "encoder.bias": w["b_E"],
        "decoder.weight": w["W_D"].T,
        "decoder.bias": w["b_D"],
    } | (tensors or {})
    (folder / "checkpoints").mkdir(parents=True)
    save_file(present(stored), folder / "checkpoints/final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(present(HYPERPARAMS | changes)))
    return folder


def write_second(root: Path, weights: dict[str, Tensor] | None = None, *, tensors: Any = None, **changes: Any) -> Path:
    """A folder as llamascopium 2 saves them."""
    w, config = weights or random_weights(), CONFIG | changes
    stored = {name: w[name] for name in ("W_E", "b_E", "W_D", "b_D")}
    if config["act_fn"] == "jumprelu":
        stored["activation_function.log_jumprelu_threshold"] = w["log_threshold"]
    if not config["use_decoder_bias"]:
        del stored["b_D"]
    stored[f"dataset_average_activation_norm.{HOOK}"] = torch.tensor(AVERAGE)
    folder = root / "run"
    folder.mkdir()
    save_file(present(stored | (tensors or {})), folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(present(config)))
    return folder


def present(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if value is not ...}
    return {key: value.contiguous() if isinstance(value, Tensor) else value for key, value in kept.items()}


def inputs() -> Tensor:
    return torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1)) + 0.7


def llama_scope(x: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What Llama Scope's loader makes of the tensors, and what its class then computes, in float64."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    factor = 1.0
    if config["norm_activation"] == "dataset-wise":
        factor = D_IN**0.5 / config["dataset_average_activation_norm"]["in"]
    encoder, encoder_bias, decoder, decoder_bias = w["W_E"], w["b_E"] / factor, w["W_D"], w["b_D"] / factor
    if config["sparsity_include_decoder_norm"]:
        norm = np.linalg.norm(decoder, axis=1)
        encoder, encoder_bias, decoder = encoder * norm, encoder_bias * norm, decoder / norm[:, None]
    h = (x.double().numpy() - config["apply_decoder_bias_to_pre_encoder"] * decoder_bias) @ encoder + encoder_bias
    if config["act_fn"] == "relu":
        h = np.maximum(h, 0)
    elif config["act_fn"] == "jumprelu" or (config["jump_relu_threshold"] or 0) > 0:
        h = np.where(h > config["jump_relu_threshold"], h, 0)
    else:
        h = largest(h)
    return torch.from_numpy(h).float(), torch.from_numpy(h @ decoder + decoder_bias).float()


def lm_saes(x: Tensor, weights: dict[str, Tensor], config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, latents times decoder norms and reconstruction: normalise, encode, gate, decode, denormalise, in float64."""
    w, inside = {name: value.double().numpy() for name, value in weights.items()}, x.double().numpy()
    factor: Any = {
        "dataset-wise": D_IN**0.5 / AVERAGE,
        "token-wise": D_IN**0.5 / np.linalg.norm(inside, axis=-1, keepdims=True),
        "inference": 1.0,
    }[config["norm_activation"]]
    bias = w["b_D"] if config["use_decoder_bias"] else np.zeros(D_IN)
    h = (inside * factor - config.get("apply_decoder_bias_to_pre_encoder", False) * bias) @ w["W_E"] + w["b_E"]
    norm = np.linalg.norm(w["W_D"], axis=1)
    gate = h * norm if config["sparsity_include_decoder_norm"] else h
    opened = {
        "relu": lambda: gate > 0,
        "jumprelu": lambda: gate > np.exp(w["log_threshold"]),
        "topk": lambda: largest(gate) > 0,
    }[config["act_fn"]]()
    out = ((h * opened) @ w["W_D"] + bias) / factor
    return (
        torch.from_numpy(h * opened).float(),
        torch.from_numpy(h * opened * norm).float(),
        torch.from_numpy(out).float(),
    )


def largest(h: np.ndarray) -> np.ndarray:
    return np.where(h >= np.sort(h, axis=-1)[..., -K, None], np.maximum(h, 0), 0)


@torch.no_grad()
def assert_computes(sae: Any, x: Tensor, latents: Tensor, reconstruction: Tensor) -> None:
    ours = sae.encode(x)
    assert 0.05 < (ours > 0).float().mean() < 0.6
    assert (ours - latents).abs().max() <= 1e-5
    assert (sae.decode(ours) - reconstruction).abs().max() <= 1e-5
    assert (sae(x) - reconstruction).abs().max() <= 1e-5


ON_OFF = [False, True]


@pytest.mark.parametrize("subtract", ON_OFF)
@pytest.mark.parametrize("gated", ON_OFF)
@pytest.mark.parametrize("norm_activation", ["dataset-wise", "inference"])
def test_llama_scope_computes_what_its_own_loader_does(
    tmp_path: Path, norm_activation: str, gated: bool, subtract: bool
) -> None:
    changes = {
        "norm_activation": norm_activation,
        "sparsity_include_decoder_norm": gated,
        "apply_decoder_bias_to_pre_encoder": subtract,
    }
    weights, x = (
        random_weights(unit=not gated),
        inputs(),
    )  # its class saved unit rows where the gate does not see the norms
    path = write_first(tmp_path, weights, **changes)
    assert matches(path)
    reading = read(path)
    assert_computes(reading.sae, x, *llama_scope(x, weights, HYPERPARAMS | changes))
    for key in changes:  # a slip in any one would be seen
        other = {"dataset-wise": "inference", "inference": "dataset-wise"}.get(changes[key], not changes[key])
        if key != "sparsity_include_decoder_norm" or gated:
            slip = llama_scope(x, weights, HYPERPARAMS | changes | {key: other})[1]
            assert (slip - reading.sae(x)).abs().max() > 0.1
    assert reading.sae.cfg.apply_b_dec_to_input == subtract
    assert torch.allclose(reading.sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert reading.files == (path / "checkpoints/final.safetensors",)
    metadata = reading.sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("meta-llama/Llama-3.1-8B", HOOK)


@pytest.mark.parametrize(
    "changes",
    [
        {"act_fn": "relu", "jump_relu_threshold": 0.0},
        {"act_fn": "topk", "jump_relu_threshold": 0.0},
        {"act_fn": "topk", "jump_relu_threshold": None},
        {"act_fn": "topk", "jump_relu_threshold": 0.8},
        {"act_fn": "TopK", "jump_relu_threshold": 0.0, "sparsity_include_decoder_norm": False},
    ],
)
def test_llama_scopes_other_gates(tmp_path: Path, changes: dict[str, Any]) -> None:
    x, weights = inputs(), random_weights(unit=not changes.get("sparsity_include_decoder_norm", True))
    config = HYPERPARAMS | changes | {"act_fn": changes["act_fn"].lower()}
    assert_computes(read(write_first(tmp_path, weights, **changes)).sae, x, *llama_scope(x, weights, config))


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("gated", ON_OFF)
@pytest.mark.parametrize("norm_activation", ["dataset-wise", "token-wise", "inference"])
def test_lm_saes_computes_what_its_class_does(tmp_path: Path, act_fn: str, gated: bool, norm_activation: str) -> None:
    changes = {"act_fn": act_fn, "sparsity_include_decoder_norm": gated, "norm_activation": norm_activation}
    path, x = write_second(tmp_path, **changes), inputs()
    assert matches(path)
    sae = read(path).sae
    latents, gate, out = lm_saes(x, random_weights(), CONFIG | changes)
    assert_computes(sae, x, gate if act_fn == "topk" and gated else latents, out)
    if act_fn != "relu":
        slip = lm_saes(x, random_weights(), CONFIG | changes | {"sparsity_include_decoder_norm": not gated})[2]
        assert (slip - out).abs().max() > 0.1
    slip = lm_saes(
        x,
        random_weights(),
        CONFIG | changes | {"norm_activation": "inference" if norm_activation != "inference" else "dataset-wise"},
    )[2]
    assert (slip - out).abs().max() > 0.1
    assert not sae.cfg.apply_b_dec_to_input
    assert sae.cfg.metadata.hook_name == HOOK
    doubtful = (
        norm_activation == "dataset-wise"
    )  # lm-saes' train_sae leaves config.json as it was when it folds the scale
    assert ("train_sae" in read(path).decided["normalize_activations"]) == doubtful


@pytest.mark.parametrize("subtract", ON_OFF)
@pytest.mark.parametrize("act_fn", ["jumprelu", "topk"])
def test_the_decoders_bias_before_the_encoder(tmp_path: Path, act_fn: str, subtract: bool) -> None:
    changes, x = {"act_fn": act_fn, "apply_decoder_bias_to_pre_encoder": subtract}, inputs()
    sae = read(write_second(tmp_path, **changes)).sae
    latents, gate, out = lm_saes(x, random_weights(), CONFIG | changes)
    assert_computes(sae, x, gate if act_fn == "topk" else latents, out)
    slip = lm_saes(x, random_weights(), CONFIG | changes | {"apply_decoder_bias_to_pre_encoder": not subtract})[2]
    assert (slip - out).abs().max() > 0.1
    assert sae.cfg.apply_b_dec_to_input == subtract


def test_without_a_decoder_bias(tmp_path: Path) -> None:
    x, changes = inputs(), {"use_decoder_bias": False}
    latents, _, out = lm_saes(x, random_weights(), CONFIG | changes)
    assert_computes(read(write_second(tmp_path, **changes)).sae, x, latents, out)


def write_distill(root: Path, weights: dict[str, Tensor]) -> Path:
    """A folder as fnlp/Llama-Scope-R1-Distill has them: of the releases between, with the first one's names of tensors."""
    names = {"encoder.weight": weights["W_E"].T, "encoder.bias": weights["b_E"]}
    names |= {
        "decoder.weight": weights["W_D"].T,
        "decoder.bias": weights["b_D"],
        **dict.fromkeys(("W_E", "b_E", "W_D", "b_D"), ...),
    }
    names |= {"log_jumprelu_threshold": weights["log_threshold"], "activation_function.log_jumprelu_threshold": ...}
    folder = write_second(root, weights, tensors=names, apply_decoder_bias_to_pre_encoder=False)
    home = root / "Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k"
    home.mkdir(parents=True)
    return folder.rename(home / "L15R")


def test_the_releases_between(tmp_path: Path) -> None:
    x, weights = inputs(), random_weights()
    reading = read(write_distill(tmp_path, weights))
    latents, _, out = lm_saes(x, weights, CONFIG)
    assert_computes(reading.sae, x, latents, out)
    assert reading.sae.cfg.metadata.model_name == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_computed_with_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, x = {name: value.to(dtype) for name, value in random_weights().items()}, inputs()
    assert_computes(read(write_first(tmp_path, weights)).sae, x, *llama_scope(x, weights, HYPERPARAMS))


def test_files_and_torch_files(tmp_path: Path) -> None:
    first, second, x = write_first(tmp_path), write_second(tmp_path), inputs()
    for file in (first / "checkpoints/final.safetensors", second / "sae_weights.safetensors"):
        assert matches(file)
        assert torch.equal(read(file).sae(x), read(file.parent if file.parent == second else first).sae(x))
    assert not matches(tmp_path)
    assert not matches(tmp_path / "nowhere")
    from safetensors.torch import load_file

    expected = read(second).sae(x)
    state = load_file(second / "sae_weights.safetensors")
    (second / "sae_weights.safetensors").unlink()
    torch.save({"sae": state, "version": "2.0"}, second / "sae_weights.pt")
    assert torch.equal(read(second).sae(x), expected)
    torch.save(state, second / "sae_weights.pt")
    with pytest.raises(ValueError, match=r"sae_weights.pt has no dictionary 'sae'"):
        read(second)


def test_the_host_is_in_lm_config(tmp_path: Path) -> None:
    folder = write_second(tmp_path)
    reading = read(folder)
    metadata = reading.sae.cfg.metadata
    assert (metadata.model_name, metadata.prepend_bos) == (None, None)
    assert reading.decided["model_name"].startswith("unknown")
    (folder / "lm_config.json").write_text(json.dumps({"model_name": "Qwen/Qwen3-1.7B", "prepend_bos": False}))
    metadata = read(folder).sae.cfg.metadata
    assert (metadata.model_name, metadata.prepend_bos) == ("Qwen/Qwen3-1.7B", False)


@pytest.mark.parametrize("write", [write_first, write_second])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, r"hook_point_out = .* a transcoder"),
        ({"sae_type": "crosscoder"}, r"sae_type = 'crosscoder' cannot be upgraded"),
        ({"sae_type": "lorsa"}, r"sae_type = 'lorsa'"),
        ({"use_glu_encoder": True}, r"use_glu_encoder = True"),
        ({"act_fn": "batchtopk"}, r"act_fn = 'batchtopk' .* whole batch"),
        ({"act_fn": "layertopk"}, r"act_fn = 'layertopk' .* known are relu, jumprelu, topk"),
        ({"norm_activation": "batch-wise"}, r"norm_activation = 'batch-wise'"),
        ({"act_fn": ...}, r"json lacks act_fn; it has "),
        ({"hook_point_in": ...}, r"json lacks hook_point_in"),
        ({"hook_point_out": ...}, r"json lacks hook_point_out"),
        ({"norm_activation": ...}, r"json lacks norm_activation"),
        ({"sparsity_include_decoder_norm": ...}, r"json lacks sparsity_include_decoder_norm"),
        ({"use_decoder_bias": ...}, r"json lacks use_decoder_bias"),
        ({"d_model": ...}, r"json lacks d_model"),
        ({"expansion_factor": ...}, r"json lacks expansion_factor"),
        ({"d_model": "24"}, r"d_model = '24'; expected int"),
        ({"sparsity_include_decoder_norm": 1}, r"sparsity_include_decoder_norm = 1; expected bool"),
        ({"expansion_factor": 8}, r"expected .*192.*"),
    ],
)
def test_configurations_that_cannot_be_followed_are_refused(
    tmp_path: Path, write: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jump_relu_threshold": ...}, r"lacks jump_relu_threshold"),
        ({"jump_relu_threshold": -1.0}, r"jump_relu_threshold = -1.0"),
        ({"apply_decoder_bias_to_pre_encoder": ...}, r"lacks apply_decoder_bias_to_pre_encoder"),
        ({"dataset_average_activation_norm": ...}, r"lacks dataset_average_activation_norm"),
        ({"dataset_average_activation_norm": {"in": 2.0, "out": 3.0}}, r"in and out"),
        ({"dataset_average_activation_norm": {"in": 0.0, "out": 0.0}}, r"is 0.0; expected a positive number"),
        ({"dataset_average_activation_norm": {}}, r"is None; expected a positive number"),
        (
            {"act_fn": "topk", "jump_relu_threshold": 0.0, "top_k": 97},
            r"k from 1 to d_sae = 96; the checkpoint says 97",
        ),
    ],
)
def test_llama_scopes_own_keys(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write_first(tmp_path, **changes))


THRESHOLD = "activation_function.log_jumprelu_threshold"


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({THRESHOLD: ...}, {}, r"has no tensor 'activation_function.log_jumprelu_threshold'"),
        ({"b_D": ...}, {}, r"has no tensor 'b_D'"),
        ({"W_D": ...}, {}, r"has no tensor 'W_D'"),
        (
            {f"dataset_average_activation_norm.{HOOK}": ...},
            {},
            r"has no tensor 'dataset_average_activation_norm.blocks.15",
        ),
        ({f"dataset_average_activation_norm.{HOOK}": torch.tensor(0.0)}, {}, r"is 0.0; expected a positive number"),
        ({"W_E": torch.zeros(D_SAE, D_IN)}, {}, r"W_E has shape \(96, 24\); expected \(24, 96\): is it transposed"),
        ({"W_D": torch.zeros(D_IN, D_SAE)}, {}, r"W_D has shape \(24, 96\); expected \(96, 24\): is it transposed"),
        ({"b_E": torch.zeros(95)}, {}, r"b_E has shape \(95,\); expected \(96,\)"),
        ({THRESHOLD: torch.zeros(1)}, {}, r"log_jumprelu_threshold has shape \(1,\); expected \(96,\)"),
        ({"b_E": torch.full((D_SAE,), torch.nan)}, {}, r"b_E holds 96 nan or inf"),
        ({"W_D": torch.eye(D_SAE, D_IN)}, {}, r"72 rows of the decoder are zero"),
        ({"W_E_glu": torch.zeros(D_IN, D_SAE)}, {}, r"holds W_E_glu, which config.json does not account for"),
        (
            {THRESHOLD: torch.zeros(D_SAE)},
            {"act_fn": "topk"},
            r"holds activation_function.log_jumprelu_threshold, which",
        ),
        ({"b_D": torch.zeros(D_IN)}, {"use_decoder_bias": False}, r"holds b_D, which config.json does not account for"),
        ({"encoder.weight": torch.zeros(D_SAE, D_IN)}, {}, r"lacks apply_decoder_bias_to_pre_encoder"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = write_second(tmp_path, tensors=tensors, **changes)
    assert matches(path)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_transposed_linear_layers_are_refused(tmp_path: Path) -> None:
    path = write_first(tmp_path, tensors={"decoder.weight": random_weights()["W_D"]})
    with pytest.raises(ValueError, match=r"decoder.weight has shape \(96, 24\); expected \(24, 96\): is it transposed"):
        read(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write_first(tmp_path)
    weights, config = folder / "checkpoints/final.safetensors", folder / "hyperparams.json"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"final.safetensors cannot be read \(.*\): truncated"):
        read(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no weights: none of sae_weights.safetensors, .*final.pt"):
        read(folder)
    config.write_text("{")
    assert matches(folder)
    with pytest.raises(ValueError, match=r"hyperparams.json is not valid JSON"):
        read(folder)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"hyperparams.json holds a list"):
        read(folder)
    config.unlink()
    with pytest.raises(ValueError, match=r"neither hyperparams.json nor config.json"):
        read(folder)


def test_other_peoples_configurations_do_not_match(tmp_path: Path) -> None:
    for text in ("{", "[]", json.dumps({"trainer": {}}), json.dumps({"architecture": "jump_relu"})):
        (tmp_path / "config.json").write_text(text)
        assert not matches(tmp_path)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    folder = write_second(tmp_path)
    (folder / "sae_weights.safetensors").unlink()
    torch.save({"sae": Evil()}, folder / "sae_weights.pt")
    with pytest.raises(ValueError, match=r"would execute code: refused"):
        read(folder)
    assert not (tmp_path / "executed").exists()


# SAELens' loaders


def from_saelens(monkeypatch: pytest.MonkeyPatch, loader: str, folder: Path) -> Any:
    """The SAE as SAELens' from_pretrained makes it of this folder."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def local(_repo: str = "", name: str = "", *, filename: str = "", subfolder: str = "", **_: Any) -> str:
        return str(folder.parent / subfolder / (name or filename))

    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo="", name="", repo_id="", **k: local(repo, name, **k))
    _, state, _ = getattr(loaders, loader)("repo", folder.name, cfg_overrides={"dtype": "float32"})
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False))
    sae.load_state_dict(state)
    sae.fold_activation_norm_scaling_factor(S)
    return sae


@pytest.mark.parametrize("unit", ON_OFF)
def test_saelens_loader_leaves_the_decoder_norms_out_of_llama_scopes_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: bool
) -> None:
    """It is right where decoder rows have norm 1; the published ones do not."""
    weights, x = random_weights(unit=unit), inputs()
    folder = write_first(tmp_path, weights)
    theirs = from_saelens(monkeypatch, "llama_scope_sae_huggingface_loader", folder)
    latents, out = llama_scope(x, weights, HYPERPARAMS)
    differ = ((theirs.encode(x) > 0) != (latents > 0)).float().mean()
    if unit:
        assert (theirs(x) - out).abs().max() <= 1e-5
        assert (theirs.encode(x) / S - latents).abs().max() <= 1e-5  # theirs are those of the scaled activations
    else:
        assert (theirs(x) - out).abs().max() > 1
        assert differ > 0.05
    assert_computes(read(folder).sae, x, latents, out)


@pytest.mark.parametrize("unit", ON_OFF)
def test_saelens_loader_leaves_the_decoder_norms_out_of_the_distilled_ones_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: bool
) -> None:
    weights, x = random_weights(unit=unit), inputs()
    folder = write_distill(tmp_path, weights)
    theirs = from_saelens(monkeypatch, "llama_scope_r1_distill_sae_huggingface_loader", folder)
    latents, _, out = lm_saes(x, weights, CONFIG)
    assert ((theirs(x) - out).abs().max() <= 1e-5) == unit
    assert_computes(read(folder).sae, x, latents, out)


# lm-saes' own class


@pytest.fixture(scope="module")
def peer() -> Iterator[Any]:
    """llamascopium.models.sae without the package's __init__, which imports a database client, an API's and more."""
    spec = importlib.util.find_spec("llamascopium")
    if spec is None or sys.version_info < (3, 11):
        pytest.skip("needs Python 3.11 and llamascopium: pip install --no-deps llamascopium==2.0.0b34")
    package = types.ModuleType("llamascopium")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["llamascopium"] = package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of autocast for CUDA, where there is none
            yield importlib.import_module("llamascopium.models.sae")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "llamascopium"]:
            del sys.modules[name]


@torch.no_grad()
def save_with(peer: Any, folder: Path, *, fold: bool = False, **config: Any) -> Path:
    """A checkpoint as its upload_to_hf writes one: the weights, then the configuration."""
    weights = random_weights()
    values = {
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        "d_model": D_IN,
        "expansion_factor": 4,
        "top_k": K,
    } | config
    sae = peer.SparseAutoEncoder.from_config(peer.SAEConfig(**values))
    for name in ("W_E", "b_E", "W_D") + (("b_D",) if sae.cfg.use_decoder_bias else ()):
        getattr(sae, name).copy_(weights[name])
    if sae.cfg.act_fn == "jumprelu":
        sae.activation_function.log_jumprelu_threshold.copy_(weights["log_threshold"])
    if sae.cfg.norm_activation == "dataset-wise":
        sae.set_dataset_average_activation_norm({HOOK: AVERAGE})
    sae.save_pretrained(folder, fold_activation_scale=fold)
    sae.cfg.save_hyperparameters(folder)
    return folder


@pytest.mark.parametrize("gated", ON_OFF)
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("scaling", ["dataset-wise", "dataset-wise, folded", "token-wise", "inference"])
def test_it_computes_what_llamascopium_computes(
    peer: Any, tmp_path: Path, scaling: str, act_fn: str, gated: bool
) -> None:
    folder = save_with(
        peer,
        tmp_path / "sae",
        fold=scaling.endswith("folded"),
        act_fn=act_fn,
        norm_activation=scaling.split(",")[0],
        sparsity_include_decoder_norm=gated,
        use_decoder_bias=act_fn != "relu",
    )
    theirs, x = peer.SparseDictionary.from_pretrained(str(folder)), inputs()
    with torch.no_grad():
        batch, factors = theirs.normalize_activations({HOOK: x}, return_scale_factor=True)
        latents = theirs.encode(batch[HOOK])
        out = theirs.denormalize_activations({HOOK: theirs.decode(latents)}, factors)[HOOK]
        if act_fn == "topk" and gated:
            latents = latents * theirs.decoder_norm()
    assert_computes(read(folder).sae, x, latents, out)
