"""Any state dict (.safetensors, .pt or .npz) with a small yaml beside it, rsae.yaml, that says what its tensors are.

    family: jumprelu                  # relu, jumprelu, topk or gated
    weights: model.safetensors        # may be left out where the folder holds one weights file
    tensors:                          # wanted as W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_dec (d_in,), all others (d_sae,)
      W_enc: {name: enc.weight, transpose: true}
      b_enc: enc.bias
      W_dec: {name: dec.weight, transpose: true}
      b_dec: dec.bias
      threshold: {name: log_theta, exp: true}
    ignore: [steps_since_active]      # tensors of the file that are no part of the function
    apply_b_dec_to_input: true        # is b_dec subtracted from the input before the encoder?
    normalize_activations: none       # or layer_norm, constant_norm_rescale, as SAELens computes them
    input_scale: 0.05                 # inputs were multiplied by this in training: folded into the weights
    k: 32                             # topk only
    d_in: 768                         # checked, as is d_sae; needed only where the SAE is narrower than its input
    hook_name: blocks.9.hook_resid_post
    model_name: gpt2                  # and prepend_bos, context_size, dataset_path

The function, with a = 1 if apply_b_dec_to_input and 0 otherwise: z = (x - a b_dec) W_enc + b_enc; latents = relu(z) for relu, the k
largest relu(z) for topk, relu(z) where z > threshold for jumprelu; reconstruction = latents W_dec + b_dec. For gated, with
y = (x - a b_dec) W_enc: latents = relu(y exp(r_mag) + b_mag) where y + b_gate > 0.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rsae.teachers.checkpoint import Reading, Tensors, build

CONFIG = "rsae.yaml"
# family -> (tensors it cannot do without, tensors that are zeros unless named)
FAMILIES = {
    "relu": ({"W_enc", "W_dec"}, {"b_enc", "b_dec"}),
    "jumprelu": ({"W_enc", "W_dec", "threshold"}, {"b_enc", "b_dec"}),
    "topk": ({"W_enc", "W_dec"}, {"b_enc", "b_dec"}),
    "gated": ({"W_enc", "W_dec", "r_mag", "b_mag", "b_gate"}, {"b_dec"}),
}
NUMBER = (int, float)
WORDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    NUMBER: "a number",
    list: "a list",
    dict: "names and values",
}
METADATA = {"hook_name": str, "model_name": str, "prepend_bos": bool, "context_size": int, "dataset_path": str}
KEYS: dict[str, Any] = {
    "family": str,
    "weights": str,
    "tensors": dict,
    "ignore": list,
    "apply_b_dec_to_input": bool,
    "normalize_activations": str,
    "input_scale": NUMBER,
    "k": int,
    "d_in": int,
    "d_sae": int,
    **METADATA,
}
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")


def matches(path: Path) -> bool:
    """A folder with rsae.yaml, or a file that ends in .yaml or .yml."""
    try:
        return (path / CONFIG).is_file() or (path.suffix in (".yaml", ".yml") and path.is_file())
    except OSError:
        return False


def read(path: Path) -> Reading:
    """The checkpoint as the yaml describes it.

    Raises:
        ValueError: a yaml that is broken, lacks what would otherwise be guessed, or has keys that are not known; a weights file
            with tensors that are missing, of a wrong shape, or not accounted for.
    """
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    config = _config(file)
    sources = {key: _source(key, value, file) for key, value in config["tensors"].items()}
    tensors = Tensors(_weights_file(config, file))
    weights = _weights(config, sources, tensors, file)
    scale = float(config.get("input_scale", 1))
    weights["W_enc"] *= scale  # latents stay as they are; the reconstruction becomes that of x instead of scale * x
    for key in weights.keys() & {"W_dec", "b_dec"}:
        weights[key] /= scale
    family, normalisation = config["family"], config.get("normalize_activations", "none")
    try:
        sae = build(
            family,
            weights,
            k=config.get("k"),
            apply_b_dec_to_input=config["apply_b_dec_to_input"],
            normalize_activations=normalisation,
            metadata={key: config[key] for key in METADATA if key in config},
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    says, silent = f"{file.name} says", f"not in {file.name}"
    decided = {
        "architecture": f"{says} family {family}",
        "apply_b_dec_to_input": f"{says} {config['apply_b_dec_to_input']}",
        "normalize_activations": f"{says} {normalisation}" if "normalize_activations" in config else f"none: {silent}",
        "input_scale": f"{says} {scale:g}: folded into the weights" if "input_scale" in config else f"1: {silent}",
        "decoder norms": "rows as stored",
        "tensors": ", ".join(
            " ".join([key, "=", source["name"], *_options(source)]) for key, source in sources.items()
        ),
    }
    if zeros := sorted(FAMILIES[family][1] - weights.keys()):
        decided["zeros"] = f"{', '.join(zeros)}: not named, and no tensor of the file is left over"
    if family == "topk":
        decided["k"] = f"{says} {config['k']}"
    decided |= {key: f"{says} {config[key]}" if key in config else f"unknown: {silent}" for key in METADATA}
    return Reading(sae, f"named tensors ({family})", (tensors.file,), decided)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not valid yaml ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not keys and values")
    _known(config, KEYS, str(file), "key")
    for key in ("family", "tensors", "apply_b_dec_to_input"):
        if key not in config:
            raise ValueError(f"{file} lacks {key}: it cannot be told from the weights, and a guess would be silent")
    for key, value in config.items():
        kind = KEYS[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{file}: {key} is {value!r}; expected {WORDS[kind]}")
    _check(config, file)
    return config


def _check(config: dict[str, Any], file: Path) -> None:
    """The values of the keys, and that they go together."""
    family = config["family"]
    _known([family], FAMILIES, str(file), "family")
    required, optional = FAMILIES[family]
    _known(config["tensors"], required | optional, f"{file}: tensors of a {family} SAE", "name")
    if missing := sorted(required - config["tensors"].keys()):
        raise ValueError(f"{file}: a {family} SAE needs tensors: {', '.join(missing)}")
    if config["apply_b_dec_to_input"] and "b_dec" not in config["tensors"]:
        raise ValueError(f"{file}: apply_b_dec_to_input is true, and tensors names no b_dec")
    if (family == "topk") != ("k" in config):
        raise ValueError(f"{file}: family {family} {'needs k' if family == 'topk' else 'has no k; topk has'}")
    normalisation, scale = config.get("normalize_activations", "none"), config.get("input_scale", 1)
    if normalisation not in NORMALISATIONS:
        hint = "; give that scale as input_scale" if normalisation == "expected_average_only_in" else ""
        raise ValueError(
            f"{file}: normalize_activations {normalisation!r}; it may be {', '.join(NORMALISATIONS)}{hint}"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{file}: input_scale is {scale}; expected a number above 0")
    if scale != 1 and normalisation != "none":
        raise ValueError(f"{file}: input_scale {scale} and normalize_activations {normalisation} exclude each other")


def _weights_file(config: dict[str, Any], file: Path) -> Path:
    if "weights" in config:
        return file.parent / config["weights"]
    found = sorted(entry for entry in file.parent.iterdir() if entry.suffix in (".safetensors", ".pt", ".npz"))
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise ValueError(f"{file} lacks weights, and its folder holds {len(found)} weights files ({names})")
    return found[0]


def _source(key: str, value: Any, file: Path) -> dict[str, Any]:
    """{name, transpose, exp} of one tensor; a plain string is its name."""
    source = {"name": value} if isinstance(value, str) else value
    if not isinstance(source, dict) or not isinstance(source.get("name"), str):
        raise ValueError(
            f"{file}: tensors.{key} is {value!r}; expected a tensor's name, or {{name: ..., transpose: true}}"
        )
    options = {"W_enc": ["transpose"], "W_dec": ["transpose"], "threshold": ["exp"]}.get(key, [])
    _known(source, ["name", *options], f"{file}: tensors.{key}", "option")
    for option in options:
        if not isinstance(source.get(option, False), bool):
            raise ValueError(f"{file}: tensors.{key}.{option} is {source[option]!r}; expected true or false")
    return source


def _options(source: dict[str, Any]) -> list[str]:
    return [option for option in source if source[option] is True]


def _weights(
    config: dict[str, Any], sources: dict[str, dict[str, Any]], tensors: Tensors, file: Path
) -> dict[str, Tensor]:
    """The tensors under SAELens' names and in its orientation, none of the file's left unexplained."""
    explained = {source["name"] for source in sources.values()} | set(map(str, config.get("ignore", [])))
    left = sorted(name for name, value in tensors.values.items() if isinstance(value, Tensor) and name not in explained)
    if left:
        raise ValueError(
            f"{tensors.file} also holds {', '.join(left)}, which {file.name} does not name: name them, or list them under "
            "ignore if the SAE's function does without them"
        )
    encoder = sources["W_enc"]
    shape = tensors.shape(encoder["name"], 2)
    d_in, d_sae = shape[::-1] if encoder.get("transpose") else shape
    for key, size in (("d_in", d_in), ("d_sae", d_sae)):
        if config.get(key, size) != size:
            raise ValueError(
                f"{tensors.file}: {encoder['name']} makes {key} {size}; {file.name} says {config[key]}: is it transposed?"
            )
    if d_sae < d_in and "d_in" not in config:
        raise ValueError(
            f"{tensors.file}: {encoder['name']} makes d_in {d_in} and d_sae {d_sae}: is it transposed? If the SAE is narrower "
            f"than its input, say d_in: {d_in}"
        )
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    weights = {}
    for key, source in sources.items():
        wanted = shapes.get(key, (d_sae,))
        if source.get("transpose"):
            weights[key] = tensors.take(source["name"], *wanted[::-1]).T.contiguous()
        else:
            weights[key] = tensors.take(source["name"], *wanted)
        if source.get("exp"):
            weights[key].exp_()
            if not bool(torch.isfinite(weights[key]).all()):
                raise ValueError(f"{tensors.file}: exp({source['name']}) is infinite: is it a logarithm?")
    return weights


def _known(found: Iterable[Any], known: Iterable[str], where: str, what: str) -> None:
    known = sorted(known)
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) or known
            raise ValueError(f"{where}: {what} {name!r} is not known; the nearest: {', '.join(near)}")
