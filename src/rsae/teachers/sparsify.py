"""EleutherAI sparsify: a folder named after the hookpoint, with cfg.json and sae.safetensors.

The function, from the package's SparseCoder (releases 1.0 to 1.3): z = relu(encoder.weight @ (x - b_dec) + encoder.bias); the k
largest z weigh their rows of W_dec, and b_dec is added to the sum. Inputs and decoder rows are used as they are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from rsae.teachers.checkpoint import Reading, Tensors, build, read_config

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"

# What SparseCoder adds to, or takes away from, the function above. False or absent in a plain autoencoder.
REFUSED = {
    "transcode": "a transcoder predicts a module's output from its input; rsae upgrades autoencoders",
    "skip_connection": "W_skip adds a linear map of the input, which no SAELens SAE has",
    "signed": "the k largest |z| keep their sign, which no SAELens SAE computes",
    "embed_skip": "it adds a map of the host's embeddings, which an SAE does not see",
    "gram_lookup": "it subtracts an n-gram table that is not in the checkpoint",
}
READ = {"activation", "d_in", "expansion_factor", "k", "num_latents"}
TRAINING_ONLY = {"gram_table_hash", "lookup_max_order", "multi_topk", "normalize_decoder"}


def matches(path: Path) -> bool:
    """A folder with sae.safetensors and a cfg.json that is not SAELens', or that sae.safetensors itself."""
    folder = path.parent if path.name == WEIGHTS else path
    if not all(os.path.isfile(folder / name) for name in (WEIGHTS, CONFIG)):  # unlike Path.is_file it never raises
        return False
    try:
        config = read_config(folder / CONFIG)
    except ValueError:
        return True  # so that read() can say what is wrong with it
    return ("k" in config or "expansion_factor" in config) and "architecture" not in config


def read(path: Path) -> Reading:
    """The checkpoint as a TopKSAE.

    Tensors: encoder.weight (d_sae, d_in), encoder.bias (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,).

    Raises:
        ValueError: files missing or damaged, a configuration that does not say everything or says what a TopKSAE cannot
            compute, tensors that do not agree with it.
    """
    path = Path(path)
    folder = path.parent if path.name == WEIGHTS else path
    config = read_config(folder / CONFIG)
    _check(config, folder / CONFIG)
    d_in, k = (_count(config, key, folder / CONFIG) for key in ("d_in", "k"))
    if config.get("num_latents"):
        d_sae = _count(config, "num_latents", folder / CONFIG)
    else:
        d_sae = d_in * _count(config, "expansion_factor", folder / CONFIG)
    if k > d_sae:
        raise ValueError(f"{folder / CONFIG}: k = {k}, of {d_sae} latents")

    tensors = Tensors(folder / WEIGHTS)
    if "W_skip" in tensors:
        raise ValueError(f"{tensors.file} holds W_skip: {REFUSED['skip_connection']}")
    if extra := sorted(set(tensors.values) - {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}):
        raise ValueError(f"{tensors.file} holds {', '.join(extra)}, which a sparsify autoencoder does not have")
    weights = {
        "W_enc": tensors.take("encoder.weight", d_sae, d_in).T.contiguous(),
        "b_enc": tensors.take("encoder.bias", d_sae),
        "W_dec": tensors.take("W_dec", d_sae, d_in),
        "b_dec": tensors.take("b_dec", d_in),
    }
    norms = weights["W_dec"].norm(dim=1)
    multi = (
        f"; forward() of a multi_topk model returns the {4 * k} latents of its second loss"
        if config.get("multi_topk")
        else ""
    )
    metadata, decided = _origin(folder)
    sae = build("topk", weights, k=k, apply_b_dec_to_input=True, metadata=metadata)
    return Reading(
        sae,
        "EleutherAI sparsify SparseCoder",
        (tensors.file,),
        {
            "architecture": "cfg.json activation topk: relu, then the k largest",
            "k": f"cfg.json k = {k}, as encode() and decode() use it{multi}",
            "apply_b_dec_to_input": "SparseCoder subtracts b_dec whenever it is no transcoder, whatever normalize_decoder says",
            "normalize_activations": "SparseCoder has none",
            "decoder norms": f"rows as stored, {norms.min():.3g} to {norms.max():.3g}: normalize_decoder acts in training only",
            **decided,
        },
    )


def _check(config: dict[str, Any], file: Path) -> None:
    if (activation := config.get("activation", "topk")) != "topk":
        groupmax = "it takes the largest latent of each of k groups, which no SAELens SAE computes"
        why = groupmax if activation == "groupmax" else "not known"
        raise ValueError(f"{file}: activation {activation!r} cannot be upgraded: {why}")
    for key, value in config.items():
        if key in REFUSED and value:
            raise ValueError(f"{file}: {key} = {value!r} cannot be upgraded: {REFUSED[key]}")
        if key not in {*REFUSED, *READ, *TRAINING_ONLY} and value:
            raise ValueError(
                f"{file}: {key} = {value!r} is not a key of sparsify's releases and may change the function"
            )


def _count(config: dict[str, Any], key: str, file: Path) -> int:
    if key not in config:
        raise ValueError(f"{file} lacks {key}; it has {', '.join(sorted(config))}")
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{file}: {key} = {value!r}; expected a whole number from 1")
    return value


def _origin(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Host and hook: the run's config.json stands beside the hookpoint's folder, which a seed's folder may stand in."""
    folder = folder.resolve()
    hookpoint = folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder
    metadata: dict[str, Any] = {}
    decided = {"prepend_bos": "not in the checkpoint: the training text had whatever special tokens the tokenizer adds"}
    name = hookpoint.name
    if match := re.fullmatch(r"(?:model\.|decoder\.|language_model\.)*(?:layers|h|blocks)\.(\d+)", name):
        metadata["hook_name"] = f"blocks.{match[1]}.hook_resid_post"
        decided["hook_name"] = f"the folder's name {name}: that layer's output"
    elif name in ("embed_tokens", "embed_in", "wte") or re.fullmatch(r"\w+(\.\w+)*\.\d+(\.\w+)+", name):
        metadata["hook_name"] = name  # TransformerLens' hooks differ from the module's output in some hosts
        decided["hook_name"] = f"the folder's name {name}: the output of that module of the host's base model"
    else:
        decided["hook_name"] = f"unknown: the folder's name {name} is no hookpoint"
    run = hookpoint.parent / "config.json"
    config = read_config(run) if run.is_file() else {}
    if isinstance(config.get("model"), str):  # a host's own config.json has no such key
        known = {
            "model_name": config["model"],
            "dataset_path": config.get("dataset"),
            "context_size": config.get("ctx_len"),
        }
        metadata |= {key: value for key, value in known.items() if value is not None}
        decided["model_name"] = f"model in {run.name} beside the folder"
    else:
        decided["model_name"] = "unknown: no config.json of the training run beside the folder"
    return metadata, decided
