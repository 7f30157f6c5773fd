"""Checkpoints of dictionary_learning: ae.pt, the state_dict of one of its classes, beside config.json with the trainer's settings.

Nothing but the class's name says how its encoder works; the table below holds what the classes of release 0.1.0 do. Its trainers
fold their input scale into the biases and thresholds they save, so every class takes activations as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsae.teachers.checkpoint import Family, Reading, Tensors, build, read_config


class _Class(NamedTuple):
    """Where a class keeps its tensors, and what its encoder does with them."""

    family: Family
    """For the BatchTopK classes "topk": what they are until a threshold is calibrated."""
    linear: bool
    """encoder.weight (d_sae, d_in) and decoder.weight (d_in, d_sae); else W_enc (d_in, d_sae) and W_dec (d_sae, d_in)."""
    subtracts: bool
    """Whether the encoder subtracts the decoder's bias from its input."""
    vectors: dict[str, str]
    """SAELens name -> name in the file."""
    buffers: frozenset[str] = frozenset()
    """What else may be in the file; the first versions of the class did not save them."""
    marks: frozenset[str] = frozenset()
    """What else must be."""
    calibrates: bool = False
    """Whether encode uses the scalar threshold of the file."""

    @property
    def names(self) -> set[str]:
        """What the file must hold."""
        matrices = ("encoder.weight", "decoder.weight") if self.linear else ("W_enc", "W_dec")
        return {*matrices, *self.vectors.values(), *self.marks}


_PLAIN = {"b_dec": "b_dec", "b_enc": "b_enc"}
_LINEAR = {"b_dec": "b_dec", "b_enc": "encoder.bias"}
_GATED = {"b_dec": "decoder_bias", "r_mag": "r_mag", "b_mag": "mag_bias", "b_gate": "gate_bias"}
_TOPK = frozenset({"k", "threshold"})
_MATRYOSHKA = _Class("topk", False, True, _PLAIN, marks=_TOPK | {"group_sizes"}, calibrates=True)
_CLASSES = {
    "AutoEncoder": _Class("relu", True, True, _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": _Class("relu", True, False, _LINEAR | {"b_dec": "decoder.bias"}),
    "AutoEncoderTopK": _Class("topk", True, True, _LINEAR, _TOPK),
    "BatchTopKSAE": _Class("topk", True, True, _LINEAR, _TOPK, calibrates=True),
    "MatryoshkaBatchTopKSAE": _MATRYOSHKA,
    "MatroyshkaBatchTopKSAE": _MATRYOSHKA,  # its first spelling
    "JumpReluAutoEncoder": _Class("jumprelu", False, False, _PLAIN | {"threshold": "threshold"}),
    "GatedAutoEncoder": _Class("gated", True, True, _GATED),
}

_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "resid_out": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}


def matches(path: Path) -> bool:
    """Whether `path` is ae.pt, a folder with it or with trainer_N/ae.pt, or a folder whose config.json names a dict_class."""
    path = Path(path)
    try:
        return bool(_weights_files(path)) or "dict_class" in read_config(path / "config.json")["trainer"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read(path: Path) -> Reading:
    """The SAE of a folder with ae.pt and config.json (or with one folder trainer_N), of ae.pt, or of checkpoints/ae_STEP.pt.

    Raises:
        ValueError: a file is missing or damaged, several trainers to choose from, a class that is not known or whose tensors are
            others, shapes that do not agree, no k, or a transcoder. The message names the file and the key or tensor.
    """
    file = _weights_file(Path(path))
    config_file = (file.parent.parent if file.parent.name == "checkpoints" else file.parent) / "config.json"
    trainer, buffer = _sections(config_file)
    name = str(trainer["dict_class"])
    if name not in _CLASSES:
        raise ValueError(f"{config_file}: trainer.dict_class is {name!r}; rsae reads {', '.join(_CLASSES)}")
    kind, tensors = _CLASSES[name], Tensors(file)
    weights = _weights(name, tensors, trainer)
    k = _k(trainer, tensors, config_file)

    family = kind.family
    decided = {
        "architecture": f"trainer.dict_class {name}",
        "apply_b_dec_to_input": f"{name} {'subtracts' if kind.subtracts else 'never subtracts'} {kind.vectors['b_dec']}",
        "normalize_activations": "none: input scales are folded into the saved weights",
        "decoder norms": _fold_norms(weights) if name == "AutoEncoder" else "latents are not scaled by them",
        "model_name": "trainer.lm_name" if trainer.get("lm_name") else "not recorded",
        "prepend_bos": "not recorded: the training text had whatever the tokenizer adds by default",
        "context_size": "buffer.ctx_len" if buffer.get("ctx_len") else "not recorded",
    }
    if family == "jumprelu":
        decided["threshold"] = "one a latent, from the weights"
    elif kind.calibrates and "threshold" in tensors and (theta := tensors.take("threshold")) >= 0:
        family = "jumprelu"
        weights["threshold"] = theta.expand(len(weights["W_dec"])).clone()
        decided["threshold"] = f"{float(theta):g} for every latent, as calibrated in training"
    elif kind.calibrates:
        decided["threshold"] = (
            "never calibrated: the batch rule at one sample a batch, the k largest of each sample "
            f"({name} itself keeps all positive latents then, unless called with use_threshold=False)"
        )
    elif family == "topk":
        decided["threshold"] = f"not used: {name} takes the k largest of each sample, whatever threshold it stores"
    if family == "topk":
        if k is None:
            raise ValueError(f"{config_file} lacks trainer.k, and {file} has no k either")
        decided["k"] = f"trainer.k or k in {file.name}, which agree where both stand"

    hook, decided["hook_name"] = _hook(trainer, buffer, file.parent)
    metadata = {"model_name": trainer.get("lm_name"), "hook_name": hook, "context_size": buffer.get("ctx_len")}
    metadata = {key: value for key, value in metadata.items() if value}
    sae = build(family, weights, k=k, apply_b_dec_to_input=kind.subtracts, metadata=metadata)
    return Reading(sae, f"dictionary_learning {name}", (file,), decided)


def _weights_files(path: Path) -> list[Path]:
    if path.is_file():
        of_a_step = path.parent.name == "checkpoints" and re.fullmatch(r"ae_\d+\.pt", path.name)
        return [path] if path.name == "ae.pt" or of_a_step else []
    return [path / "ae.pt"] if (path / "ae.pt").is_file() else sorted(path.glob("trainer_*/ae.pt"))


def _weights_file(path: Path) -> Path:
    files = _weights_files(path)
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(
            f"{path} holds several dictionaries: name one of {', '.join(file.parent.name for file in files)}"
        )
    raise ValueError(f"{path} has no ae.pt: a dictionary_learning checkpoint is a folder with ae.pt and config.json")


def _sections(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json's "trainer", and its "buffer", which only training from a buffer of activations writes."""
    config = read_config(file)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise ValueError(
            f"{file} lacks {'trainer.dict_class' if isinstance(trainer, dict) else 'trainer, a dictionary'}"
        )
    buffer = config.get("buffer")
    buffer = buffer if isinstance(buffer, dict) else {}
    if buffer.get("io") == "in_and_out":
        raise ValueError(
            f"{file}: buffer.io is 'in_and_out', a transcoder; rsae upgrades SAEs, which rebuild their input"
        )
    return trainer, buffer


def _weights(name: str, tensors: Tensors, trainer: dict[str, Any]) -> dict[str, Tensor]:
    """The class's tensors under SAELens' names, turned its way. One left over is refused: it would have changed the result."""
    kind, found = _CLASSES[name], set(map(str, tensors.values))
    if kind.names - found or found - kind.names - kind.buffers:
        fits = [other for other, its in _CLASSES.items() if its.names <= found and found - its.names <= its.buffers]
        raise ValueError(
            f"{tensors.file} is not the {name} that config.json declares: it lacks {sorted(kind.names - found)} and has "
            f"{sorted(found - kind.names - kind.buffers)} besides"
            + (f"; it could be {' or '.join(fits)}" if fits else "")
        )
    shape = tensors.shape("encoder.weight" if kind.linear else "W_enc", 2)
    d_in, d_sae = shape[::-1] if kind.linear else shape
    d_in, d_sae = trainer.get("activation_dim") or d_in, trainer.get("dict_size") or d_sae
    if kind.linear:
        weights = {
            "W_enc": tensors.take("encoder.weight", d_sae, d_in).T.contiguous(),
            "W_dec": tensors.take("decoder.weight", d_in, d_sae).T.contiguous(),
        }
    else:
        weights = {"W_enc": tensors.take("W_enc", d_in, d_sae), "W_dec": tensors.take("W_dec", d_sae, d_in)}
    return weights | {
        ours: tensors.take(theirs, d_in if ours == "b_dec" else d_sae) for ours, theirs in kind.vectors.items()
    }


def _fold_norms(weights: dict[str, Tensor]) -> str:
    """Give AutoEncoder unit decoder rows where it has others, as its from_pretrained does: same output, latents times the norms."""
    norms = weights["W_dec"].norm(dim=1)
    if torch.allclose(norms, torch.ones_like(norms)):
        return "1 already"
    norms = norms.where(norms > 0, 1.0)  # a row of zeros has no direction to keep
    weights["W_enc"] *= norms
    weights["b_enc"] *= norms
    weights["W_dec"] /= norms[:, None]
    return "folded into the encoder, as AutoEncoder.from_pretrained does"


def _k(trainer: dict[str, Any], tensors: Tensors, config_file: Path) -> int | None:
    stated = {"trainer.k": trainer.get("k"), f"k in {tensors.file}": tensors.values.get("k")}
    try:
        found = {where: int(value) for where, value in stated.items() if value is not None}
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{config_file}: k must be a whole number; found {stated}") from None
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{config_file}: two values of k, {' and '.join(f'{v} ({where})' for where, v in found.items())}"
        )
    return next(iter(found.values()), None)


def _hook(trainer: dict[str, Any], buffer: dict[str, Any], folder: Path) -> tuple[str | None, str]:
    """The TransformerLens hook where the SAE was trained, None if nothing clear says it; and what says so."""
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    parts = folder.absolute().parts[:-4:-1]  # e.g. resid_post_layer_4/trainer_8
    for text in [str(submodule)] if submodule else parts:
        if match := re.search(rf"({'|'.join(_HOOKS)})_layer_?(\d+)", text):
            if isinstance(layer, int) and layer != int(match[2]):
                return None, f"unclear: trainer.layer is {layer}, but the submodule {text!r}"
            return f"blocks.{match[2]}.{_HOOKS[match[1]]}", f"the submodule {text!r}"
    if submodule or not isinstance(layer, int):
        return None, f"unclear: trainer.layer {layer!r}, trainer.submodule_name {submodule!r}"
    side = "pre" if buffer.get("io") == "in" else "post"
    return f"blocks.{layer}.hook_resid_{side}", f"trainer.layer {layer}; no submodule is named, so the block itself"
