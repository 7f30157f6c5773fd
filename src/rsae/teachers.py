"""A teacher from disk or from the hub, read by SAELens and checked before anything is built on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rsae.artefacts import read_json, sha256_file

if TYPE_CHECKING:
    from sae_lens import SAE

FAMILIES = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "rational": "rational"}


@dataclass(frozen=True)
class Teacher:
    """A pretrained SAE and where its conventions came from."""

    sae: SAE[Any]
    family: str
    """"relu", "jumprelu", "topk" or "rational"."""
    conventions: dict[str, Any] = field(default_factory=dict)
    """b_dec subtracted or not, input normalisation, dtype, hook: as the checkpoint declares them."""
    fingerprint: str = ""
    """Hash of the weights, by which a run recognises its teacher."""


def load_teacher(path_or_spec: str | Path, *, device: str = "cpu") -> Teacher:
    """Load a SAELens checkpoint: a local folder (cfg.json + sae_weights.safetensors), or "RELEASE:SAE_ID" from the hub.

    The weights come in float32 whatever they are stored in.

    Returns:
        Teacher, whose `.sae` is a SAELens StandardSAE, JumpReLUSAE, TopKSAE or RationalSAE.

    Raises:
        ValueError: no such folder, files missing or damaged, a family that cannot be upgraded, shapes that do not agree,
            or weights with nan or inf. The message names the file and the tensor.
    """
    from sae_lens import SAE

    import rsae.sae  # noqa: F401 - so that SAELens knows "rational"

    path = Path(path_or_spec)
    if path.is_dir():
        sae = _from_folder(path, device)
        fingerprint = sha256_file(path / "sae_weights.safetensors")[:16]
        source = str(path)
    elif ":" in str(path_or_spec):
        source = str(path_or_spec)
        release, sae_id = source.split(":", 1)
        try:
            sae = SAE.from_pretrained(release, sae_id, device=device, dtype="float32")
            if sae.cfg.architecture() not in FAMILIES:
                raise KeyError(sae.cfg.architecture())
        except KeyError as error:
            raise ValueError(f"teacher {source}: architecture {error}; rsae upgrades {', '.join(FAMILIES)}") from error
        except OSError as error:
            raise ValueError(
                f"teacher {source}: the hub did not give it ({error}). A local folder works without it"
            ) from error
        fingerprint = source
    else:
        raise ValueError(
            f"teacher {str(path_or_spec)!r} is neither a folder with cfg.json and sae_weights.safetensors nor RELEASE:SAE_ID"
        )
    check_weights(sae, source)
    return Teacher(sae, FAMILIES[sae.cfg.architecture()], _conventions(sae, source), fingerprint)


def _from_folder(path: Path, device: str) -> SAE[Any]:
    from sae_lens import SAE
    from safetensors import SafetensorError

    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (path / name).is_file():
            raise ValueError(
                f"{path} has no {name}: a SAELens checkpoint is a folder with cfg.json and sae_weights.safetensors"
            )
    config = read_json(path / "cfg.json")
    if not isinstance(config, dict):
        raise ValueError(f"{path}/cfg.json holds a {type(config).__name__}, not a SAELens configuration")
    architecture = config.get("architecture", "standard")
    if architecture not in FAMILIES:
        raise ValueError(f"{path}/cfg.json: architecture {architecture!r}; rsae upgrades {', '.join(FAMILIES)}")
    try:
        return SAE.load_from_disk(path, device=device, dtype="float32")
    except SafetensorError as error:
        raise ValueError(
            f"{path}/sae_weights.safetensors cannot be read ({error}): truncated? copy it again"
        ) from error
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: weights and cfg.json do not agree ({error})") from error


def check_weights(sae: SAE[Any], source: str) -> None:
    """Shapes as the configuration says, every number finite.

    Raises:
        ValueError: names the tensor, the shape expected and found.
    """
    d_in, d_sae = sae.cfg.d_in, sae.cfg.d_sae
    expected = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    if sae.cfg.architecture() == "rational":
        try:
            sae.gate.check()  # type: ignore[union-attr, operator]
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    for name, tensor in sae.state_dict().items():
        shape = expected.get(name.removeprefix("gate."))
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}; d_in {d_in} and d_sae {d_sae} make it {shape}"
            )
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{source}: {name} holds {count} nan or inf of {math.prod(tensor.shape)} numbers: "
                "the checkpoint is damaged, or was saved in a dtype too narrow for it"
            )


def _conventions(sae: SAE[Any], source: str) -> dict[str, Any]:
    cfg = sae.cfg
    return {
        "source": source,
        "architecture": cfg.architecture(),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "hook_name": cfg.metadata.hook_name,
        "model_name": cfg.metadata.model_name,
    }
