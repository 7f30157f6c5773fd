"""SAELens' own checkpoints: cfg.json + sae_weights.safetensors, in its present and its older layouts."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rsae.teachers.checkpoint import Reading, read_config

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", "rational")
# Checkpoints of a training run: SAELens has no inference class for them, and makes a JumpReLU of them when training ends
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
_SHARED = (
    "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations", "metadata",
    "rescale_acts_by_decoder_norm",
)  # fmt: skip


def matches(path: Path) -> bool:
    """A folder with either of the two files, or one of these, unless it is of a format that shares the name."""
    path = _folder(path)
    has_cfg = (path / CFG).is_file() and not (path / "sae.safetensors").is_file()
    return has_cfg or ((path / WEIGHTS).is_file() and not (path / "config.json").is_file())


def read(path: Path) -> Reading:
    """Read by SAELens' loader, in float32 whatever the weights are stored in."""
    from rsae.sae import RationalSAEConfig  # and SAELens knows "rational"

    path = _folder(path)
    for name in (CFG, WEIGHTS):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no {name}: a SAELens checkpoint is a folder with {CFG} and {WEIGHTS}")
    config = read_config(path / CFG)
    architecture = config.get("architecture", "standard")
    decided = {"conventions": f"{CFG}, as SAELens reads it"}
    _refuse_what_would_be_dropped(path / CFG, config, str(architecture))
    try:
        if architecture in TRAINING_ONLY:
            sae, decided["architecture"] = _as_inference(path, str(architecture))
        elif architecture in ARCHITECTURES:
            _refuse_what_is_missing(path / CFG, config, str(architecture))
            if architecture == "rational":
                RationalSAEConfig.from_dict(config)  # refuses what SAELens would drop in silence
            sae = _load(path)
            _refuse_another_gate(path / CFG, config, sae)
        else:
            known = ", ".join((*ARCHITECTURES, *TRAINING_ONLY))
            raise ValueError(f"{path}/{CFG}: architecture {architecture!r}; rsae upgrades {known}")
    except SafetensorError as error:
        raise ValueError(f"{path}/{WEIGHTS} cannot be read ({error}): truncated? copy it again") from error
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: weights and {CFG} do not agree ({error})") from error
    return Reading(sae, "SAELens", (path / WEIGHTS,), decided)


def _refuse_what_is_missing(file: Path, config: dict[str, Any], architecture: str) -> None:
    """SAELens fills in what a configuration does not say: refuse where that would be another function."""
    if architecture == "topk":
        k, d_sae = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k")), config.get("d_sae")
        if not isinstance(k, int) or not isinstance(d_sae, int) or not 1 <= k <= d_sae:
            raise ValueError(f"{file}: a TopK needs an integer k from 1 to d_sae = {d_sae}; it says {k!r}")
    elif architecture == "rational":
        needed = ("num_coeffs", "den_coeffs", "centre", "scale", "C_in", "C_out", "support", "k", "alpha")
        if missing := [name for name in needed if name not in config]:
            raise ValueError(f"{file}: a rational gate needs {', '.join(needed)}; missing: {', '.join(missing)}")
        k, d_sae = config["k"], config.get("d_sae")
        if k is not None and not (isinstance(k, int) and isinstance(d_sae, int) and 1 <= k <= d_sae):
            raise ValueError(
                f"{file}: the k of a rational gate is null or an integer from 1 to d_sae = {d_sae}; it says {k!r}"
            )


def _refuse_another_gate(file: Path, config: dict[str, Any], sae: Any) -> None:
    """SAELens makes a ReLU of a configuration that says topk where it does not look for it."""
    activation = config.get("activation_fn_str", config.get("activation_fn"))
    if activation == "topk" and sae.cfg.architecture() != "topk":
        raise ValueError(
            f"{file}: activation 'topk' and architecture {config.get('architecture', 'standard')!r}, which SAELens reads as "
            f"{sae.cfg.architecture()!r}: set architecture to 'topk', and k beside it"
        )


def _load(path: Path) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(path, device="cpu", dtype="float32")


def _folder(path: Path) -> Path:
    return path.parent if path.name in (CFG, WEIGHTS) and path.is_file() else path


def _refuse_what_would_be_dropped(file: Path, config: dict[str, Any], architecture: str) -> None:
    """SAELens drops what it does not know in silence: refuse a key that would change the function."""
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation not in ("relu", "topk"):
        raise ValueError(
            f"{file}: activation {activation!r}, which SAELens would read as relu; rsae upgrades relu and topk"
        )
    if config.get("rescale_acts_by_decoder_norm") and architecture not in ("topk", *TRAINING_ONLY):
        raise ValueError(f"{file}: rescale_acts_by_decoder_norm, which SAELens drops for {architecture!r}")
    for key in ("apply_b_dec_to_input", "normalize_activations", "rescale_acts_by_decoder_norm", "reshape_activations"):
        if near := [name for name in get_close_matches(key, config, n=3, cutoff=0.9) if name != key]:
            raise ValueError(f"{file}: unknown key {near[0]!r}, which SAELens drops in silence: is {key!r} meant?")


def _as_inference(path: Path, architecture: str) -> tuple[Any, str]:
    """What SAELens would save at the end of training, and why; a threshold that was never learnt leaves the rule of one sample."""
    from sae_lens import TopKSAE, TopKSAEConfig, TrainingSAE
    from sae_lens.registry import get_sae_class

    training: Any = TrainingSAE.load_from_disk(path, device="cpu", dtype="float32")
    if not float(training.topk_threshold) > 0:
        cfg = training.cfg
        shared = {name: getattr(cfg, name) for name in _SHARED}
        sae = TopKSAE(TopKSAEConfig(k=round(cfg.k), **shared))
        sae.load_state_dict(
            {name: tensor for name, tensor in training.state_dict().items() if name != "topk_threshold"}
        )
        return (
            sae,
            f"{architecture} whose threshold was never learnt ({float(training.topk_threshold):g}): TopK of each sample",
        )
    weights = {name: tensor.detach().clone() for name, tensor in training.state_dict().items()}
    training.process_state_dict_for_saving_inference(weights)
    config = training.cfg.get_inference_sae_cfg_dict()
    sae_class, config_class = get_sae_class(config["architecture"])
    sae = sae_class(config_class.from_dict(config))
    sae.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return sae, f"{architecture}: a JumpReLU with its learnt threshold"
