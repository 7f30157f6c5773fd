"""A teacher from disk or from the hub, in whatever format it is published, read exactly and checked before anything is built on it.

A module for each format says whether a path is of it and reads it into one of SAELens' classes; `load_teacher` asks them in turn.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from rsae.artefacts import Progress, config_hash, sha256_file
from rsae.teachers import dictionary_learning, gemma_scope, hub, llama_scope, named, openai, saelens, sparsify
from rsae.teachers.checkpoint import Reading, Tensors

if TYPE_CHECKING:
    from sae_lens import SAE

FORMATS = (named, sparsify, dictionary_learning, gemma_scope, llama_scope, openai, saelens)
FAMILIES = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated", "rational": "rational"}


@dataclass(frozen=True)
class Teacher:
    """A pretrained SAE and where its conventions came from."""

    sae: SAE[Any]
    family: str
    """"relu", "jumprelu" (BatchTopK and matryoshka too: they run with a threshold), "topk", "gated" or "rational"."""
    conventions: dict[str, Any] = field(default_factory=dict)
    """Format, b_dec subtracted or not, input normalisation, hook and so on; "decided": what each was read from."""
    fingerprint: str = ""
    """Hash of the weights and of what the configuration makes of them, by which a run recognises its teacher."""


def load_teacher(path_or_spec: str | Path, *, device: str = "cpu", progress: Progress | None = None) -> Teacher:
    """Load a checkpoint of any format that is known, as a SAELens SAE in float32. Nothing in it is executed.

    Args:
        path_or_spec: a local folder or file: SAELens, Gemma Scope, dictionary_learning, sparsify, OpenAI, Llama Scope and
            llamascopium, plain tensors with a rsae.yaml that names them, or an RSAE; or from the hub "RELEASE:SAE_ID" (as SAELens
            lists them), "OWNER/REPO" or "OWNER/REPO:PATH" with any of these.
        progress: told how far a download is.

    Returns:
        Teacher, whose `.sae` is a SAELens StandardSAE, JumpReLUSAE, TopKSAE, GatedSAE or a RationalSAE.

    Raises:
        ValueError: no such path, files missing or damaged, a format or family that is not known, tensors that are missing, of the
            wrong shape or not finite. The message names the file and the tensor.
    """
    source = str(path_or_spec)
    if Path(path_or_spec).exists():
        reading = read(Path(path_or_spec))
    else:
        repo, inner, release = hub.locate(source)
        path = hub.download(repo, inner, progress)
        if release is not None and (saelens.matches(path) or not any(reader.matches(path) for reader in FORMATS)):
            # SAELens' list of releases carries corrections to what their configurations say
            reading = Reading(
                hub.from_release(source), "SAELens", (), {"conventions": f"release {release} in SAELens' list"}
            )
        else:
            reading = read(path)
    sae = reading.sae
    if sae.cfg.architecture() not in FAMILIES:
        raise ValueError(
            f"teacher {source}: architecture {sae.cfg.architecture()!r}; rsae upgrades {', '.join(FAMILIES)}"
        )
    check_weights(sae, source)
    return Teacher(
        sae.to(device),
        FAMILIES[sae.cfg.architecture()],
        _conventions(reading, source),
        _fingerprint(reading, source),
    )


def read(path: Path) -> Reading:
    """Read a local checkpoint by the first format that it matches.

    Raises:
        ValueError: it matches none; or what the format's reader refuses.
    """
    for reader in FORMATS:
        if reader.matches(path):
            return reader.read(path)
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else path.name
    raise ValueError(
        f"{path} is of no format that rsae knows (found: {inside or 'nothing'}). Known: SAELens (cfg.json and "
        "sae_weights.safetensors), Gemma Scope (params.npz, params.safetensors), dictionary_learning (ae.pt and config.json), "
        "sparsify (cfg.json and sae.safetensors), OpenAI (.pt), Llama Scope (hyperparams.json or config.json); for anything else "
        "add a rsae.yaml that names its tensors"
    )


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
        "b_gate": (d_sae,),
        "b_mag": (d_sae,),
        "r_mag": (d_sae,),
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
        # By its ends: isfinite would take as much memory again
        if tensor.numel() and not bool(torch.stack(tensor.detach().aminmax()).isfinite().all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{source}: {name} holds {count} nan or inf of {math.prod(tensor.shape)} numbers: "
                "the checkpoint is damaged, or overflowed a dtype too narrow for it (float16)"
            )


def _conventions(reading: Reading, source: str) -> dict[str, Any]:
    cfg = reading.sae.cfg
    return {
        "source": source,
        "format": reading.format,
        "architecture": cfg.architecture(),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "hook_name": cfg.metadata.hook_name,
        "model_name": cfg.metadata.model_name,
        "prepend_bos": cfg.metadata.prepend_bos,
        "dtype": _stored_dtype(reading.files),
        "decided": reading.decided,
    }


def _fingerprint(reading: Reading, source: str) -> str:
    """Of the weights' files, and of the configuration that says what function they make."""
    cfg = {name: value for name, value in reading.sae.cfg.to_dict().items() if name not in ("metadata", "device")}
    digests = [sha256_file(file) for file in reading.files] or [source]
    return config_hash({"files": digests, "cfg": json.loads(json.dumps(cfg, default=str))})


def _stored_dtype(files: tuple[Path, ...]) -> str:
    """What the weights are stored in, before they came in float32."""
    names: set[str] = set()
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                names |= {_SAFETENSORS_DTYPES.get(d := str(opened.get_slice(n).get_dtype()), d) for n in opened.keys()}  # noqa: SIM118
        else:
            found: list[Any] = list(Tensors(file).values.values())
            found += [inner for value in found if isinstance(value, dict) for inner in value.values()]
            tensors = [value for value in found if isinstance(value, torch.Tensor) and value.is_floating_point()]
            names |= {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    return ", ".join(sorted(names)) or "not known"


_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
