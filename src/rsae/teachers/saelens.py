"""SAELens' own checkpoints: cfg.json + sae_weights.safetensors, in its present and its older layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rsae.artefacts import read_json
from rsae.teachers.checkpoint import Reading

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", "rational")
# Checkpoints of a training run: SAELens has no inference class for them, and makes a JumpReLU of them when training ends
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")


def matches(path: Path) -> bool:
    """A folder with either of the two files, unless it is of a format that shares the name."""
    has_cfg = (path / CFG).is_file() and not (path / "sae.safetensors").is_file()
    return has_cfg or ((path / WEIGHTS).is_file() and not (path / "config.json").is_file())


def read(path: Path) -> Reading:
    """Read by SAELens' loader, in float32 whatever the weights are stored in."""
    from rsae.sae import RationalSAEConfig  # and SAELens knows "rational"

    for name in (CFG, WEIGHTS):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no {name}: a SAELens checkpoint is a folder with {CFG} and {WEIGHTS}")
    config = read_json(path / CFG)
    if not isinstance(config, dict):
        raise ValueError(f"{path}/{CFG} holds a {type(config).__name__}, not a SAELens configuration")
    architecture = config.get("architecture", "standard")
    decided = {"conventions": f"{CFG}, as SAELens reads it"}
    try:
        if architecture in TRAINING_ONLY:
            sae, decided["architecture"] = _as_inference(path), f"{architecture}: a JumpReLU with its learnt threshold"
        elif architecture in ARCHITECTURES:
            if architecture == "rational":
                RationalSAEConfig.from_dict(config)  # refuses what SAELens would drop in silence
            sae = _load(path)
        else:
            known = ", ".join((*ARCHITECTURES, *TRAINING_ONLY))
            raise ValueError(f"{path}/{CFG}: architecture {architecture!r}; rsae upgrades {known}")
    except SafetensorError as error:
        raise ValueError(f"{path}/{WEIGHTS} cannot be read ({error}): truncated? copy it again") from error
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: weights and {CFG} do not agree ({error})") from error
    return Reading(sae, "SAELens", (path / WEIGHTS,), decided)


def _load(path: Path) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(path, device="cpu", dtype="float32")


def _as_inference(path: Path) -> Any:
    """What SAELens would save at the end of training."""
    from sae_lens import TrainingSAE
    from sae_lens.registry import get_sae_class

    training = TrainingSAE.load_from_disk(path, device="cpu", dtype="float32")
    weights = {name: tensor.detach().clone() for name, tensor in training.state_dict().items()}
    training.process_state_dict_for_saving_inference(weights)
    config = training.cfg.get_inference_sae_cfg_dict()
    sae_class, config_class = get_sae_class(config["architecture"])
    sae = sae_class(config_class.from_dict(config))
    sae.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return sae
