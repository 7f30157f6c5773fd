"""Llama Scope (hyperparams.json) and lm-saes / llamascopium (config.json): SAEs of scaled activations, gated by decoder norms.

The function of lm-saes, all as stored; s = sqrt(d_model) / (mean norm of the activations in training), n_j = ||W_D[j]||:

    h = s x @ W_E + b_E            (s x - b_D) @ W_E + b_E where apply_decoder_bias_to_pre_encoder
    z = h where its gate is open   relu: g > 0;  jumprelu: g_j > theta_j;  topk: the k largest of relu(g)
    reconstruction = (z @ W_D + b_D) / s

The gate sees g_j = h_j n_j if sparsity_include_decoder_norm, else g = h. Llama Scope's own loader folds s, and after it n, into the
weights, and its jump_relu_threshold is of that scale: its latents are h_j n_j / s, and must exceed it.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from rsae.teachers.checkpoint import Family, Reading, Tensors, build, read_config

CONFIGS = ("hyperparams.json", "config.json")
STEMS = ("sae_weights", "checkpoints/pruned", "checkpoints/final")  # in lm-saes' order of preference
WEIGHTS = tuple(f"{stem}{suffix}" for stem in STEMS for suffix in (".safetensors", ".pt"))
NORM = "dataset_average_activation_norm"
FAMILIES: dict[str, Family] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
MODELS = {
    "Llama3_1-8B-Base-L": "meta-llama/Llama-3.1-8B",
    "Llama-Scope-R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}


def matches(path: Path) -> bool:
    """A folder, or a weights file in it, with hyperparams.json or with a config.json of lm-saes."""
    file = _config_file(path)
    if file is None or file.name == "hyperparams.json":
        return file is not None
    try:
        return {"d_model", "act_fn", "norm_activation"} <= set(read_config(file))
    except ValueError:
        return False


def read(path: Path) -> Reading:
    """The checkpoint as a StandardSAE, JumpReLUSAE or TopKSAE of activations as they are.

    Tensors: W_E (d_model, d_sae), b_E (d_sae,), W_D (d_sae, d_model), b_D (d_model,), or as they were called until 2025
    encoder.weight (d_sae, d_model), encoder.bias, decoder.weight (d_model, d_sae), decoder.bias; log_jumprelu_threshold (d_sae,);
    dataset_average_activation_norm.HOOK ().

    Raises:
        ValueError: files missing or damaged, a key missing, tensors that do not agree with the configuration, or a function that
            no SAELens SAE computes; the message says which.
    """
    config_file = _config_file(path)
    if config_file is None:
        raise ValueError(
            f"{path} has neither {CONFIGS[0]} nor {CONFIGS[1]}: it is no checkpoint of Llama Scope or lm-saes"
        )
    config, first = _Config(config_file), config_file.name == "hyperparams.json"
    hook, family = config.hook(), config.family()
    tensors = _open(Path(path), config_file.parent)
    w_enc, b_enc, w_dec, b_dec, theta = _weights(tensors, config, family, first)
    scale, normalize, scaled = _scale(tensors, config, hook, first)
    gated = config.need("sparsity_include_decoder_norm", bool)
    norms = torch.linalg.vector_norm(w_dec, dim=1) if gated else torch.ones(len(w_dec))  # g = h * norms
    if dead := int((norms == 0).sum()):
        raise ValueError(f"{tensors.file}: {dead} rows of the decoder are zero, and the gate divides by their norms")

    # SAELens' gates see the latents themselves, so these are measured in units in which that opens the same ones.
    unit = torch.ones_like(norms)
    if first:
        unit = norms / scale
        folded = "folded, as in Llama Scope's loader: decoder rows have norm 1, latents are times the norms they had"
    elif family == "topk":
        unit, folded = norms, "folded: latents are times the norms of their rows, as the gate sees them"
    elif theta is not None:
        theta, folded = theta / norms, "thresholds are divided by them, as the gate sees latents times norms"
    else:
        folded = "no matter: a ReLU opens whatever they are"
    weights = {
        "W_enc": w_enc * (scale * unit),
        "b_enc": b_enc * unit,
        "W_dec": w_dec / (scale * unit)[:, None],
        "b_dec": b_dec / scale,
    }
    name, subtracts = config_file.name, bool(config.values.get("apply_decoder_bias_to_pre_encoder"))
    decided = {
        "architecture": f"act_fn {config.values['act_fn']} in {name}",
        "apply_b_dec_to_input": f"apply_decoder_bias_to_pre_encoder in {name}: {subtracts}"
        if "apply_decoder_bias_to_pre_encoder" in config.values
        else "never subtracted: later releases dropped apply_decoder_bias_to_pre_encoder",
        "normalize_activations": scaled,
        "decoder norms": folded if gated else f"sparsity_include_decoder_norm in {name}: the gate does not see them",
        "hook_name": f"hook_point_in in {name}",
    }
    if theta is not None:
        weights["threshold"] = theta
        decided["threshold"] = (
            f"jump_relu_threshold in {name}" if first else "exp(log_jumprelu_threshold), one a latent"
        )
    k = config.need("top_k", int) if family == "topk" else None
    if k is not None:
        decided["k"] = f"top_k in {name}"
    metadata = {"hook_name": hook} | _host(config_file.parent, decided)
    sae = build(
        family, weights, k=k, apply_b_dec_to_input=subtracts, normalize_activations=normalize, metadata=metadata
    )
    return Reading(sae, "Llama Scope" if first else "lm-saes / llamascopium", (tensors.file,), decided)


class _Config:
    """A configuration whose complaints name the file and the key."""

    def __init__(self, file: Path) -> None:
        self.file, self.values = file, read_config(file)

    def need(self, key: str, *kinds: type) -> Any:
        if key not in self.values:
            raise ValueError(f"{self.file} lacks {key}; it has {', '.join(sorted(self.values))}")
        value = self.values[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{self.file}: {key} = {value!r}; expected {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    def refuse(self, key: str, why: str) -> NoReturn:
        raise ValueError(f"{self.file}: {key} = {self.values[key]!r} cannot be upgraded: {why}")

    def hook(self) -> str:
        if self.values.get("sae_type", "sae") != "sae":
            self.refuse("sae_type", "only 'sae' can, a plain SAE")
        hook = self.need("hook_point_in", str)
        if self.need("hook_point_out", str) != hook:
            self.refuse("hook_point_out", f"a transcoder, as hook_point_in is {hook!r}; rsae upgrades SAEs only")
        return hook

    def family(self) -> Family:
        if self.values.get("use_glu_encoder"):
            self.refuse("use_glu_encoder", "no SAELens SAE has a gated linear unit as its encoder")
        act_fn = self.need("act_fn", str).lower()
        if act_fn == "batchtopk":
            self.refuse("act_fn", "it ranks the latents of a whole batch, so that a sample's depend on the others'")
        if act_fn not in FAMILIES:
            self.refuse("act_fn", f"known are {', '.join(FAMILIES)}")
        if act_fn == "topk" and (self.values.get("jump_relu_threshold") or 0) > 0:
            return "jumprelu"  # Llama Scope's loader prefers the threshold
        return FAMILIES[act_fn]


def _config_file(path: Path) -> Path | None:
    path = Path(path)
    folders = [path]
    if path.suffix in (".safetensors", ".pt"):
        folders = [path.parent, path.parent.parent] if path.parent.name == "checkpoints" else [path.parent]
    files = [folder / name for folder in folders for name in CONFIGS]
    return next((file for file in files if os.path.isfile(file)), None)  # unlike Path.is_file it never raises


def _open(path: Path, folder: Path) -> Tensors:
    files = [path] if path.is_file() else [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not files:
        raise ValueError(
            f"{folder} has no weights: none of {', '.join(WEIGHTS)} (a .dcp folder must be saved unsharded first)"
        )
    tensors = Tensors(files[0])
    if tensors.file.suffix == ".pt":
        saved: dict[str, Any] = tensors.values
        if not isinstance(saved.get("sae"), dict):
            raise ValueError(f"{tensors.file} has no dictionary 'sae'; it holds {', '.join(map(str, saved))}")
        tensors.values = saved["sae"]
    return tensors


def _weights(
    tensors: Tensors, config: _Config, family: Family, first: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """W_E (d_model, d_sae), b_E, W_D (d_sae, d_model), b_D and theta. Raises ValueError: the file holds anything else."""
    d_model = config.need("d_model", int)
    d_sae = int(d_model * config.need("expansion_factor", int, float))
    linear = "encoder.weight" in tensors
    if linear:
        config.need("apply_decoder_bias_to_pre_encoder", bool)  # true by default in some releases, false in others
    names = (
        ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"] if linear else ["W_E", "b_E", "W_D", "b_D"]
    )
    shape = (d_sae, d_model) if linear else (d_model, d_sae)
    w_enc, b_enc, w_dec = (
        tensors.take(names[0], *shape),
        tensors.take(names[1], d_sae),
        tensors.take(names[2], *shape[::-1]),
    )
    used, b_dec, theta = set(names[:3]), torch.zeros(d_model), None
    if config.need("use_decoder_bias", bool):
        b_dec = tensors.take(names[3], d_model)
        used.add(names[3])
    if family == "jumprelu" and first:
        if config.need("jump_relu_threshold", int, float) < 0:
            config.refuse("jump_relu_threshold", "it lets negative latents through, which SAELens' JumpReLU does not")
        theta = torch.full((d_sae,), float(config.values["jump_relu_threshold"]))
    elif family == "jumprelu":
        stored = "log_jumprelu_threshold"
        stored = stored if stored in tensors else f"activation_function.{stored}"
        theta = tensors.take(stored, d_sae).exp()
        used.add(stored)
    if extra := sorted(name for name in tensors.values if name not in used and not name.startswith(f"{NORM}.")):
        raise ValueError(f"{tensors.file} holds {', '.join(extra)}, which {config.file.name} does not account for")
    return (w_enc.T, b_enc, w_dec.T, b_dec, theta) if linear else (w_enc, b_enc, w_dec, b_dec, theta)


def _scale(tensors: Tensors, config: _Config, hook: str, first: bool) -> tuple[float, str, str]:
    """(s, SAELens' normalize_activations, why)."""
    mode = config.need("norm_activation", str)
    if mode == "inference":
        return 1.0, "none", "none: norm_activation inference, the scale is in the weights already"
    if mode == "token-wise":
        return (
            1.0,
            "constant_norm_rescale",
            "norm_activation token-wise: each sample to the norm sqrt(d_model) and back",
        )
    if mode != "dataset-wise":
        config.refuse("norm_activation", "it scales a sample by the others of its batch")
    if first:
        norms, source = config.need(NORM, dict), f"{NORM} in {config.file.name}"
        norm = norms.get("in")
        if norms.get("out") != norm:
            config.refuse(NORM, f"in and out are both of {hook}, and must be the same")
    else:
        norm, source = float(tensors.take(f"{NORM}.{hook}")), f"the tensor {NORM}.{hook}"
    if not isinstance(norm, (int, float)) or not 0 < norm < math.inf:
        raise ValueError(f"{source} of {config.file.parent} is {norm!r}; expected a positive number")
    scale = math.sqrt(config.need("d_model", int)) / norm
    why = f"none: norm_activation dataset-wise, the scale {scale:.6g} from {source} is folded into the weights"
    # train_sae writes config.json first; when it saves the weights at the end, it folds the scale into them unless told not to
    doubt = "" if first else "; config.json does not tell whether lm-saes' train_sae had folded it before"
    return scale, "none", why + doubt


def _host(folder: Path, decided: dict[str, str]) -> dict[str, Any]:
    """What is known of the host: from lm_config.json beside the configuration, else from the names in the path."""
    host: dict[str, Any] = {}
    if (file := folder / "lm_config.json").is_file():
        stated = _Config(file).values
        host = {key: stated[key] for key in ("model_name", "prepend_bos") if stated.get(key) is not None}
        decided |= {key: f"{key} in {file.name}" for key in host}
    for name, model in MODELS.items():
        if "model_name" not in host and (parts := [part for part in folder.absolute().parts if name in part]):
            host["model_name"], decided["model_name"] = model, f"the name {parts[-1]} in the path"
    for key in ("model_name", "prepend_bos"):
        decided.setdefault(key, "unknown: not in the checkpoint")
    return host
