"""OpenAI's sparse_autoencoder: one .pt file, the state dict of its class Autoencoder.

The function, from that class: latents = activation(encoder.weight @ (x - pre_bias) + latent_bias), reconstruction =
decoder.weight @ latents + pre_bias. The activation is ReLU, or TopK (the k largest, then relu); models with TopK, and only they,
work on (x - mean) / (std + 1e-5), with the unbiased std over each vector, and undo it with x * std + mean. SAELens' "layer_norm"
is this very normalisation.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from rsae.teachers.checkpoint import Reading, Tensors, build

# The locations of the published files, as TransformerLens calls them.
HOOKS = {
    "mlp_post_act": "blocks.{}.mlp.hook_post",
    "resid_delta_attn": "blocks.{}.hook_attn_out",
    "resid_post_attn": "blocks.{}.hook_resid_mid",
    "resid_delta_mlp": "blocks.{}.hook_mlp_out",
    "resid_post_mlp": "blocks.{}.hook_resid_post",
}
WEIGHTS = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
STATISTICS = ("latents_activation_frequency", "latents_mean_square")


def matches(path: Path) -> bool:
    """A .pt file that names pre_bias and latent_bias near its beginning, or a folder that holds one."""
    try:
        return any(map(_names_the_biases, path.glob("*.pt") if path.is_dir() else [path]))
    except OSError:
        return False


def read(path: Path) -> Reading:
    """The checkpoint as a TopKSAE or a StandardSAE.

    Tensors: encoder.weight (d_sae, d_in), latent_bias (d_sae,), decoder.weight (d_in, d_sae), pre_bias (d_in,); beside them
    "activation", the name of a class, and "activation_state_dict" with TopK's k.

    Raises:
        ValueError: no file or several, a damaged one, one that would execute code, an activation that is not named or not known,
            tensors that are missing or of a wrong shape.
    """
    file = _only_file(Path(path))
    tensors = Tensors(file)
    if unknown := sorted(
        set(tensors.values) - {*WEIGHTS, *STATISTICS, "stats_last_nonzero", "activation", "activation_state_dict"}
    ):
        raise ValueError(
            f"{file} holds {', '.join(unknown)}, which Autoencoder does not: a fork with another function?"
        )
    activation, k, why = _activation(tensors)
    d_sae, d_in = tensors.shape("encoder.weight", 2)
    weights = {
        "W_enc": tensors.take("encoder.weight", d_sae, d_in).T.contiguous(),
        "b_enc": tensors.take("latent_bias", d_sae),
        "W_dec": tensors.take("decoder.weight", d_in, d_sae).T.contiguous(),
        "b_dec": tensors.take("pre_bias", d_in),
    }
    if k is not None and not 1 <= k <= d_sae:
        raise ValueError(f"{file}: k = {k} in activation_state_dict, of {d_sae} latents")
    normalisation = "none" if k is None else "layer_norm"
    norms = weights["W_dec"].norm(dim=1)
    metadata, decided = _origin(file)
    sae = build(
        "relu" if k is None else "topk",
        weights,
        k=k,
        apply_b_dec_to_input=True,
        normalize_activations=normalisation,
        metadata=metadata,
    )
    return Reading(
        sae,
        f"OpenAI sparse_autoencoder ({activation})",
        (file,),
        {
            "architecture": why,
            **({} if k is None else {"k": f"k = {k} in activation_state_dict"}),
            "apply_b_dec_to_input": "Autoencoder always subtracts pre_bias, after the normalisation",
            "normalize_activations": f"{normalisation}: Autoencoder normalises if the activation is TopK, and only then",
            "decoder norms": f"columns as stored, {norms.min():.3g} to {norms.max():.3g}: nothing is normalised at run time",
            **decided,
        },
    )


def _names_the_biases(file: Path) -> bool:
    # A torch file, zipped or not, begins with its pickle, where names stand as they are. Nothing is unpickled.
    if file.suffix != ".pt" or not file.is_file():
        return False
    with open(file, "rb") as opened:
        head = opened.read(1 << 16)
    return b"pre_bias" in head and b"latent_bias" in head


def _only_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.pt"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{path} holds {len(files)} .pt files ({found}): name the one that is the teacher")
    return files[0]


def _activation(tensors: Tensors) -> tuple[str, int | None, str]:
    """The activation's class, k if it is TopK, and where that was read."""
    if "activation" not in tensors:
        # Without a name the class takes ReLU, but it also demands these, which a bare TopK trainer's state dict has not.
        if absent := [name for name in STATISTICS if name not in tensors]:
            raise ValueError(
                f"{tensors.file} does not name its activation, and without {absent[0]} it is no state dict of Autoencoder: "
                'ReLU or TopK? Add "activation", and for TopK "activation_state_dict"'
            )
        return "ReLU", None, "no activation is named: Autoencoder takes ReLU"
    name: Any = tensors.values["activation"]
    if name == "ReLU":
        return name, None, "activation ReLU"
    if name != "TopK":
        raise ValueError(f"{tensors.file}: activation {name!r}; rsae upgrades ReLU and TopK")
    state: Any = tensors.values.get("activation_state_dict")
    if not isinstance(state, dict) or "k" not in state:
        raise ValueError(f"{tensors.file}: activation TopK, but no k in activation_state_dict")
    if (after := state.get("postact_fn", "ReLU")) != "ReLU":
        raise ValueError(f"{tensors.file}: TopK with postact_fn {after!r}; rsae upgrades TopK followed by ReLU")
    k = state["k"].item() if isinstance(state["k"], Tensor) and state["k"].numel() == 1 else state["k"]
    if not isinstance(k, int) or isinstance(k, bool):
        raise ValueError(f"{tensors.file}: k = {k!r} in activation_state_dict; expected a whole number")
    return name, k, "activation TopK, followed by ReLU"


def _origin(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Host and hook, from gpt2-small/{location}{version}/autoencoders/{layer}.pt: the file itself does not say."""
    file = Path(os.path.abspath(file))  # as it is named: in the hub's cache it is a link to a blob
    autoencoders, location = file.parent.name, re.sub(r"_v\d+(_\d+k)?$", "", file.parent.parent.name)
    metadata: dict[str, Any] = {}
    decided = {
        "hook_name": "unknown: the path is not LOCATION/autoencoders/LAYER.pt",
        "model_name": "unknown: the path has no gpt2-small",
        "prepend_bos": "not in the checkpoint",
    }
    if autoencoders == "autoencoders" and location in HOOKS and file.stem.isdecimal():
        metadata["hook_name"] = HOOKS[location].format(int(file.stem))
        decided["hook_name"] = f"the path {'/'.join(file.parts[-3:])}"
    if "gpt2-small" in file.parts:
        metadata["model_name"] = "gpt2"
        decided["model_name"] = "the path's gpt2-small; OpenAI's example runs it without centring the writing weights"
    return metadata, decided
