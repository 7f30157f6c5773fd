"""What every reader of a foreign format needs: tensors taken from a file without executing code, and an SAE built from them.

Each format is a module with two functions: `matches(path)`, cheap, by file names and configuration keys, and
`read(path) -> Reading`.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

if TYPE_CHECKING:
    from sae_lens import SAE

Family = Literal["relu", "jumprelu", "topk", "gated"]


@dataclass(frozen=True)
class Reading:
    """An SAE read from a foreign checkpoint, and why it was read so."""

    sae: SAE[Any]
    format: str
    """The format in words, e.g. "dictionary_learning AutoEncoderTopK"."""
    files: tuple[Path, ...]
    """The files that hold the weights, by whose hash a run recognises its teacher."""
    decided: dict[str, str] = field(default_factory=dict)
    """Convention -> what it was read from, e.g. {"apply_b_dec_to_input": "the class JumpReluAutoEncoder never subtracts"}."""


class Tensors:
    """The contents of one weights file (.safetensors, .npz, or a torch file), taken by name with their shape checked.

    Attributes:
        file: where they come from.
        values: name -> tensor (or, in a torch file, whatever plain value stands there).

    Raises:
        ValueError: no such file, truncated, or a pickle that holds anything but tensors and plain values.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        if not self.file.is_file():
            raise ValueError(f"{self.file} does not exist: the checkpoint is not complete")
        try:
            self.values = _READERS.get(self.file.suffix, _read_torch)(self.file)
        except pickle.UnpicklingError as error:
            if self.file.read_bytes()[:100].startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{self.file} is a pointer of git-lfs, not the file itself: fetch it (git lfs pull)"
                ) from None
            reason = str(error).splitlines()[0].partition("Re-running")[0].strip(" .")
            raise ValueError(
                f"{self.file} holds more than tensors and plain values, and loading it would execute code: refused "
                f"({reason}). Save its state_dict alone"
            ) from error
        except ValueError as error:
            if "pickle" not in str(error):
                raise ValueError(f"{self.file} cannot be read ({error}): truncated? copy it again") from error
            raise ValueError(f"{self.file} holds pickled objects, which would execute code: refused") from error
        except (SafetensorError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.file} cannot be read ({reason}): truncated? copy it again") from error
        if not isinstance(self.values, dict):
            raise ValueError(
                f"{self.file} holds a {type(self.values).__name__}, where a dictionary of tensors was expected"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """The shape of a tensor that has `ndim` axes."""
        tensor = self._tensor(name)
        if tensor.ndim != ndim:
            raise ValueError(f"{self.file}: {name} has shape {tuple(tensor.shape)}; expected {ndim} axes")
        return tuple(tensor.shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of that shape, in float32 (a copy).

        Raises:
            ValueError: missing, of another shape, or with nan or inf; names the file, the tensor and the shapes.
        """
        tensor = self._tensor(name)
        if tuple(tensor.shape) != shape:
            hint = ": is it transposed?" if tuple(tensor.shape) == shape[::-1] else ""
            raise ValueError(f"{self.file}: {name} has shape {tuple(tensor.shape)}; expected {shape}{hint}")
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            cause = "it overflowed float16" if tensor.dtype == torch.float16 else "the checkpoint is damaged"
            raise ValueError(f"{self.file}: {name} holds {count} nan or inf of {tensor.numel()} numbers: {cause}")
        return tensor.detach().to(torch.float32).clone()

    def _tensor(self, name: str) -> Tensor:
        if name not in self.values:
            raise ValueError(f"{self.file} has no tensor {name!r}; it holds {', '.join(sorted(map(str, self.values)))}")
        value = self.values[name]
        if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
            found = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{self.file}: {name} is {found}; expected a tensor of floating point numbers")
        return value


def read_config(file: str | Path) -> dict[str, Any]:
    """A checkpoint's JSON configuration.

    Raises:
        ValueError: no such file, not JSON, or not an object.
    """
    file = Path(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: without it nothing says what the weights beside it are") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not a configuration")
    return value


def build(
    family: Family,
    weights: dict[str, Tensor],
    *,
    k: int | None = None,
    apply_b_dec_to_input: bool,
    normalize_activations: str = "none",
    metadata: dict[str, Any] | None = None,
) -> SAE[Any]:
    """A SAELens SAE of `family` with these weights, in float32.

    Args:
        weights: W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_dec (d_in,), and: b_enc (d_sae,) for "relu", "jumprelu" and "topk";
            threshold (d_sae,) for "jumprelu"; r_mag, b_mag, b_gate (d_sae,) for "gated". Missing biases are zeros.
        k: for "topk".
        metadata: model_name, hook_name, prepend_bos and the like.
    """
    from sae_lens import (
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata

    d_in, d_sae = weights["W_enc"].shape
    shared: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": apply_b_dec_to_input,
        "normalize_activations": normalize_activations,
        "metadata": SAEMetadata(**(metadata or {})),
    }
    sae: SAE[Any]
    if family == "relu":
        sae = StandardSAE(StandardSAEConfig(**shared))
    elif family == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**shared))
    elif family == "topk":
        if k is None or not 1 <= k <= d_sae:
            raise ValueError(f"TopK needs k from 1 to d_sae = {d_sae}; the checkpoint says {k}")
        sae = TopKSAE(TopKSAEConfig(k=int(k), **shared))
    else:
        sae = GatedSAE(GatedSAEConfig(**shared))
    missing, unexpected = sae.load_state_dict(weights, strict=False)
    required = [name for name in missing if name not in ("b_enc", "b_dec")]
    if required or unexpected:
        raise ValueError(f"a {family} SAE: tensors missing {required}, not known {unexpected}")
    with torch.no_grad():
        for name in missing:
            sae.get_parameter(name).zero_()
    return sae


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict


def _read_npz(file: Path) -> dict[str, Tensor]:
    with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _read_torch(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


_READERS = {".safetensors": _read_safetensors, ".npz": _read_npz}
