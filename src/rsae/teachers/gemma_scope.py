"""Gemma Scope: the JumpReLU SAEs of Gemma 2 (params.npz, no configuration) and Gemma 3 (params.safetensors, config.json).

The function, from the class that its tutorials publish, on activations x as they are:

    p = x @ W_enc + b_enc;  latents = relu(p) where p > threshold, else 0;  reconstruction = latents @ W_dec + b_dec

Whose activations these are, the folders say, as they are named on the hub and in its cache:

    google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz
    google/gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_small/params.safetensors
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import torch

from rsae.teachers.checkpoint import Reading, Tensors, build, read_config

WEIGHTS = ("params.safetensors", "params.npz")
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
REPOSITORY = re.compile(
    r"gemma-scope-(2-)?(270m|1b|2b|4b|9b|12b|27b)-(pt|it)(?:-(res|att|mlp|transcoders))?(?![a-z0-9])"
)
SITES = {  # as a repository, a folder or config.json spells them -> TransformerLens' hook
    **dict.fromkeys(("res", "resid_post", "output"), "hook_resid_post"),
    **dict.fromkeys(("att", "attn_out", "self_attn.o_proj.input"), "attn.hook_z"),
    **dict.fromkeys(("mlp", "mlp_out", "post_feedforward_layernorm.output"), "hook_mlp_out"),
}


def matches(path: Path) -> bool:
    """A folder with params.npz or params.safetensors, or that file itself."""
    return _weights(path) is not None


def read(path: Path) -> Reading:
    """The checkpoint as a JumpReLUSAE.

    Tensors, whose names Gemma Scope 2 writes in lower case: W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc (d_sae,),
    b_dec (d_in,), threshold (d_sae,).

    Raises:
        ValueError: files missing or damaged, tensors that do not fit together, or a transcoder, crosscoder or another class.
    """
    file = _weights(path)
    if file is None:
        raise ValueError(f"{path} has neither {WEIGHTS[0]} nor {WEIGHTS[1]}: it is no Gemma Scope checkpoint")
    folder = Path(os.path.abspath(file)).parent  # not resolved: in the hub's cache a file is a link to a blob elsewhere
    second = file.suffix == ".safetensors"
    config = _config(folder / "config.json") if second and (folder / "config.json").is_file() else {}
    repository = next((found for part in reversed(folder.parts) if (found := REPOSITORY.search(part))), None)
    near = folder.parts[-3:]  # layer_20/width_16k/average_l0_71, or resid_post/layer_12_width_16k_l0_small
    kinds = [name for name in near if re.fullmatch(r"(transcoder|crosscoder|clt)(_all)?", name)]
    if repository and repository[4] == "transcoders":
        kinds.append(repository[0])
    if kinds:
        raise ValueError(f"{folder} is of {kinds[0]}, which are no SAEs: they predict other activations than they read")
    hook, hook_from = _hook(near, repository, config)
    model, model_from = _model(repository, config)
    weights = _tensors(file, config)
    norms = torch.linalg.vector_norm(weights["W_dec"], dim=1)
    decided = {
        "architecture": "JumpReLU: the tensor threshold" + (" and config.json" if config else ""),
        "threshold": "one a latent, from the weights; x @ W_enc + b_enc must exceed it",
        "apply_b_dec_to_input": "Gemma Scope never subtracts it",
        "normalize_activations": "none: the scale of training is folded into the published weights",
        "decoder norms": f"rows as stored, {norms.min():.3g} to {norms.max():.3g}",
        "hook_name": hook_from,
        "model_name": model_from,
        "prepend_bos": "not in the checkpoint: Gemma Scope was trained on texts that begin with <bos>",
    }
    if hook == "hook_embed":
        # trained on rows of the embedding matrix, which the host multiplies by sqrt(d_model) before anything reads them
        scale = math.sqrt(len(weights["b_dec"]))
        weights |= {
            "W_enc": weights["W_enc"] / scale,
            "W_dec": weights["W_dec"] * scale,
            "b_dec": weights["b_dec"] * scale,
        }
        decided["normalize_activations"] = "none: the sqrt(d_model) between the embedding and hook_embed is folded in"
        decided["decoder norms"] += f", then times {scale:.4g}"
    if hook and hook.endswith("hook_z"):
        decided["reshape_activations"] = (
            "none: it reads the heads' outputs side by side, (..., n_heads * d_head), as the attention's output projection "
            "does; TransformerLens' hook_z has n_heads and d_head apart, so flatten them first"
        )
    metadata = {"model_name": model, "hook_name": hook, "prepend_bos": True}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    sae = build("jumprelu", weights, apply_b_dec_to_input=False, metadata=metadata)
    return Reading(sae, "Gemma Scope 2" if second else "Gemma Scope", (file,), decided)


def _weights(path: Path) -> Path | None:
    path = Path(path)
    candidates = [path] if path.name in WEIGHTS else [path / name for name in WEIGHTS]
    return next((file for file in candidates if os.path.isfile(file)), None)  # unlike Path.is_file it never raises


def _tensors(file: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = Tensors(file)
    names = {name.lower(): name for name in tensors.values}
    if extra := sorted(set(names) - {"scaling_factor", *map(str.lower, TENSORS)}):
        raise ValueError(
            f"{file} holds {', '.join(names[name] for name in extra)}, which Gemma Scope's SAEs do not have"
        )
    d_in, d_sae = tensors.shape(names.get("w_enc", "W_enc"), 2)
    if config.get("width", d_sae) != d_sae:
        raise ValueError(f"{file} holds {d_sae} latents, but config.json says width {config['width']!r}")
    if "scaling_factor" in names and bool((tensors.take("scaling_factor", d_sae) != 1).any()):
        raise ValueError(f"{file}: scaling_factor is not 1: latents rescaled after their gate are not supported")
    shapes = ((d_in, d_sae), (d_sae, d_in), (d_sae,), (d_in,), (d_sae,))
    return {
        name: tensors.take(names.get(name.lower(), name), *shape) for name, shape in zip(TENSORS, shapes, strict=True)
    }


def _hook(near: tuple[str, ...], repository: re.Match[str] | None, config: dict[str, Any]) -> tuple[str | None, str]:
    """(TransformerLens' name of the hook or None, what it was read from): config.json, else the names of the folders."""
    if (stated := config.get("hf_hook_point_in")) is not None:
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", str(stated))
        if found and found[2] in SITES:
            return f"blocks.{found[1]}.{SITES[found[2]]}", f"hf_hook_point_in in config.json: {stated}"
        return None, f"unknown: config.json says {stated!r}, for which TransformerLens has no name"
    if "embedding" in near:
        return "hook_embed", "the folder embedding"
    layer = next((found[1] for name in reversed(near) if (found := re.match(r"layer_(\d+)", name))), None)
    site = next((SITES[part] for name in near if (part := name.removesuffix("_all")) in SITES), None)
    if site is None and repository and repository[4]:
        site = SITES[repository[4]]
    if layer is None or site is None:
        return (
            None,
            f"unknown: the path does not say which {'layer' if layer is None else 'activations of layer ' + layer}",
        )
    return f"blocks.{layer}.{site}", "the names of the folders" + (f" and of {repository[0]}" if repository else "")


def _model(repository: re.Match[str] | None, config: dict[str, Any]) -> tuple[str | None, str]:
    """(the host's name on the hub or None, what it was read from); not every base model is called -pt there."""
    if isinstance(name := config.get("model_name"), str):
        name, source = name.replace("gemma-v3", "gemma-3"), "model_name in config.json"
    elif repository:
        _, size, tuning, _ = repository.groups()
        name, source = f"gemma-{3 if repository[1] else 2}-{size}-{tuning}", f"the name {repository[0]} in the path"
    else:
        return None, "unknown: the path names none of Gemma Scope's repositories"
    name = re.sub(r"(gemma-2-\w+|gemma-3-270m)-pt$", r"\1", name)
    return name if "/" in name else f"google/{name}", source


def _config(file: Path) -> dict[str, Any]:
    """config.json of Gemma Scope 2. Raises ValueError: not JSON, or not of a JumpReLU SAE."""
    config = read_config(file)
    if "architecture" not in config:
        raise ValueError(f"{file} lacks architecture; it has {', '.join(sorted(config))}")
    if config["architecture"] != "jump_relu":
        raise ValueError(f"{file}: architecture {config['architecture']!r}; Gemma Scope's SAEs are jump_relu")
    before, kind = config.get("hf_hook_point_in"), config.get("type", "sae")
    after = config.get("hf_hook_point_out", before)
    if kind != "sae" or before != after or config.get("affine_connection"):
        raise ValueError(
            f"{file}: a {kind} from {before} to {after}, affine_connection {bool(config.get('affine_connection'))}: "
            "no SAE; rsae upgrades SAEs only"
        )
    return config
