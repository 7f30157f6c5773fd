"""Plain state dicts described by a yaml: SAELens' SAEs under other names, and a forward pass in numpy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from rsae.teachers.checkpoint import Family, build
from rsae.teachers.named import matches, read

D_IN, D_SAE, K = 24, 96, 40
NAMES = {
    "W_enc": "enc.weight",
    "b_enc": "enc.bias",
    "W_dec": "dec.weight",
    "b_dec": "dec.bias",
    "threshold": "theta",
    "r_mag": "gate.scale",
    "b_mag": "gate.magnitude",
    "b_gate": "gate.bias",
}


def weights_of(family: str) -> dict[str, Tensor]:
    """Nothing trivial: biases, thresholds on both sides of the pre-activations, decoder rows of all lengths."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = {"W_enc": randn(D_IN, D_SAE) * 0.2, "W_dec": randn(D_SAE, D_IN) * 0.2, "b_dec": randn(D_IN) + 0.5}
    if family == "gated":
        return weights | {"r_mag": randn(D_SAE) * 0.3, "b_mag": randn(D_SAE) * 0.3, "b_gate": randn(D_SAE) - 0.5}
    weights["b_enc"] = randn(D_SAE) - 0.5
    if family == "jumprelu":
        weights["threshold"] = randn(D_SAE).exp() * 0.4
    return weights


def description(family: str, /, **changes: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = {key: NAMES[key] for key in weights_of(family)}
    for key in ("W_enc", "W_dec"):
        tensors[key] = {"name": NAMES[key], "transpose": True}
    values = {"family": family, "weights": "model.safetensors", "tensors": tensors, "apply_b_dec_to_input": True}
    values |= {"k": K} if family == "topk" else {}
    return {key: value for key, value in (values | changes).items() if value is not ...}


def stored(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other names, and matrices as torch's Linear keeps them."""
    return {NAMES[key]: (value.T if value.ndim == 2 else value).contiguous() for key, value in weights.items()}


def write(folder: Path, values: Any, tensors: dict[str, Any] | None = None, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    tensors = stored(weights_of(values["family"])) if tensors is None else tensors
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    elif name.endswith(".npz"):
        np.savez(folder / name, **{key: value.numpy() for key, value in tensors.items()})
    else:
        torch.save(tensors, folder / name)
    (folder / "rsae.yaml").write_text(yaml.safe_dump(values))
    return folder


def inputs() -> Tensor:
    return torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.7


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.npz"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk", "gated"])
@torch.no_grad()
def test_round_trip_of_every_family(tmp_path: Path, family: Family, normalisation: str, name: str) -> None:
    original = build(
        family,
        weights_of(family),
        k=K,
        apply_b_dec_to_input=True,
        normalize_activations=normalisation,
    )
    folder = write(tmp_path, description(family, weights=name, normalize_activations=normalisation), name=name)
    x = inputs()
    latents, reconstruction = original.encode(x), original(x)
    assert 0.05 < (latents != 0).float().mean() < 0.7

    for path in (folder, folder / "rsae.yaml"):
        assert matches(path)
        reading = read(path)
        sae = reading.sae
        assert type(sae) is type(original)
        torch.testing.assert_close(sae.encode(x), latents, atol=1e-5, rtol=0)
        torch.testing.assert_close(sae(x), reconstruction, atol=1e-5, rtol=0)
        assert reading.files == (folder / name,)
    other = read(
        write(
            tmp_path,
            description(family, weights=name, normalize_activations=normalisation, apply_b_dec_to_input=False),
            name=name,
        )
    )
    assert (other.sae(x) - reconstruction).abs().max() > 0.1


@pytest.mark.parametrize("subtract", [True, False])
@torch.no_grad()
def test_scaled_jumprelu_against_numpy(tmp_path: Path, subtract: bool) -> None:
    scale = 0.37
    weights = weights_of("jumprelu")
    tensors = stored(weights | {"threshold": weights["threshold"].log()})
    values = description("jumprelu", input_scale=scale, apply_b_dec_to_input=subtract)
    values["tensors"]["threshold"] = {"name": "theta", "exp": True}
    sae = read(write(tmp_path, values, tensors)).sae

    x = inputs().numpy() * 3
    enc, dec, bias = (tensors[name].numpy() for name in ("enc.weight", "dec.weight", "dec.bias"))
    scaled = x * scale  # what the SAE saw in training
    z = (scaled - bias * subtract) @ enc.T + tensors["enc.bias"].numpy()
    latents = np.where(z > np.exp(tensors["theta"].numpy()), np.maximum(z, 0), 0)
    reconstruction = (latents @ dec.T + bias) / scale

    given = torch.from_numpy(x)
    assert 0.05 < (latents > 0).mean() < 0.7
    np.testing.assert_allclose(sae.encode(given), latents, atol=1e-5, rtol=0)
    np.testing.assert_allclose(sae(given), reconstruction, atol=1e-5, rtol=0)

    unscaled = read(
        write(
            tmp_path, description("jumprelu", apply_b_dec_to_input=subtract) | {"tensors": values["tensors"]}, tensors
        )
    ).sae
    assert np.abs(unscaled(given).numpy() - reconstruction).max() > 0.1
    raw = read(write(tmp_path, description("jumprelu", input_scale=scale, apply_b_dec_to_input=subtract), tensors)).sae
    assert np.abs(raw(given).numpy() - reconstruction).max() > 0.1  # the logarithm taken for the threshold


@pytest.mark.parametrize("family", ["relu", "topk", "gated"])
@torch.no_grad()
def test_input_scale_in_the_other_families(tmp_path: Path, family: Family) -> None:
    scale = 2.5
    original = build(family, weights_of(family), k=K, apply_b_dec_to_input=True)
    sae = read(write(tmp_path, description(family, input_scale=scale))).sae
    x = inputs()
    torch.testing.assert_close(sae.encode(x), original.encode(x * scale), atol=1e-5, rtol=0)
    torch.testing.assert_close(sae(x), original(x * scale) / scale, atol=1e-5, rtol=0)


def test_one_matrix_for_both_and_no_biases(tmp_path: Path) -> None:
    matrix = weights_of("relu")["W_dec"]
    tensors = {"W_enc": {"name": "D", "transpose": True}, "W_dec": "D"}
    reading = read(write(tmp_path, description("relu", tensors=tensors, apply_b_dec_to_input=False), {"D": matrix}))
    assert torch.equal(reading.sae.W_enc.data, matrix.T)
    assert torch.equal(reading.sae.W_dec.data, matrix)
    assert not reading.sae.b_dec.data.any()
    assert reading.decided["zeros"].startswith("b_dec, b_enc: not named")


def test_origin_and_what_was_decided(tmp_path: Path) -> None:
    origin = {
        "hook_name": "blocks.9.hook_resid_post",
        "model_name": "gpt2",
        "prepend_bos": False,
        "context_size": 128,
        "dataset_path": "some/text",
    }
    reading = read(write(tmp_path, description("topk", **origin, d_in=D_IN, d_sae=D_SAE)))
    metadata = reading.sae.cfg.metadata
    assert {key: metadata[key] for key in origin} == origin
    assert reading.decided["k"] == "rsae.yaml says 40"
    assert reading.decided["tensors"].startswith(
        "W_dec = dec.weight transpose, W_enc = enc.weight transpose, b_dec = dec.bias"
    )
    assert reading.decided["hook_name"] == "rsae.yaml says blocks.9.hook_resid_post"
    conventions = (
        "architecture, apply_b_dec_to_input, normalize_activations, input_scale, decoder norms, model_name, prepend_bos"
    )
    assert set(conventions.split(", ")) <= set(reading.decided)
    bare = read(write(tmp_path, description("relu")))
    assert bare.decided["hook_name"] == "unknown: not in rsae.yaml"
    assert bare.decided["normalize_activations"] == "none: not in rsae.yaml"


def test_the_only_weights_file_need_not_be_named(tmp_path: Path) -> None:
    folder = write(tmp_path, description("relu", weights=...), name="anything.npz")
    assert read(folder).files == (folder / "anything.npz",)
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights, and its folder holds 2 weights files \(anything.npz, other"):
        read(folder)


def test_what_the_yaml_does_not_explain_is_refused_unless_ignored(tmp_path: Path) -> None:
    tensors = stored(weights_of("relu")) | {"steps": torch.zeros(D_SAE, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"also holds steps, which rsae\.yaml does not name"):
        read(write(tmp_path, description("relu"), tensors))
    read(write(tmp_path, description("relu", ignore=["steps"]), tensors))


def test_a_narrow_sae_must_say_so(tmp_path: Path) -> None:
    # without biases, shapes alone cannot tell it from two matrices that should have been transposed
    tensors = {"E": torch.randn(D_SAE, D_IN), "D": torch.randn(D_IN, D_SAE)}
    values = description("relu", tensors={"W_enc": "E", "W_dec": "D"}, apply_b_dec_to_input=False)
    with pytest.raises(ValueError, match="E makes d_in 96 and d_sae 24: is it transposed"):
        read(write(tmp_path, values, tensors))
    with pytest.raises(ValueError, match=r"E makes d_in 96; rsae\.yaml says 24"):
        read(write(tmp_path, values | {"d_in": D_IN}, tensors))
    assert read(write(tmp_path, values | {"d_in": D_SAE}, tensors)).sae.cfg.d_sae == D_IN


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("relu", {"family": ...}, "lacks family"),
        ("relu", {"tensors": ...}, "lacks tensors"),
        ("relu", {"apply_b_dec_to_input": ...}, "lacks apply_b_dec_to_input: .*a guess would be silent"),
        (
            "relu",
            {"apply_b_dec_to_inputs": True},
            "'apply_b_dec_to_inputs' is not known; the nearest: apply_b_dec_to_input",
        ),
        ("relu", {"hook": "x"}, "key 'hook' is not known; the nearest: .*hook_name"),
        ("relu", {"family": "relus"}, "family 'relus' is not known; the nearest: relu"),
        ("relu", {"family": "jumprelu"}, "a jumprelu SAE needs tensors: threshold"),
        ("relu", {"family": "topk"}, "topk needs k"),
        ("relu", {"family": "gated"}, "gated SAE: name 'b_enc' is not known"),
        ("jumprelu", {"family": "relu"}, "relu SAE: name 'threshold' is not known"),
        ("relu", {"k": 3}, "relu has no k"),
        ("topk", {"k": 97}, "k from 1 to d_sae = 96"),
        ("topk", {"k": True}, "k is True; expected a whole number"),
        ("topk", {"k": "40"}, "k is '40'; expected a whole number"),
        ("relu", {"apply_b_dec_to_input": "true"}, "apply_b_dec_to_input is 'true'; expected true or false"),
        ("relu", {"normalize_activations": "expected_average_only_in"}, "give that scale as input_scale"),
        ("relu", {"normalize_activations": "batch_norm"}, "'batch_norm'; it may be none, layer_norm"),
        ("relu", {"input_scale": 0}, "input_scale is 0"),
        ("relu", {"input_scale": float("nan")}, "input_scale is nan"),
        ("relu", {"input_scale": "5e-2"}, "input_scale is '5e-2'; expected a number"),
        ("relu", {"input_scale": 2, "normalize_activations": "layer_norm"}, "exclude each other"),
        ("relu", {"weights": "other.safetensors"}, r"other\.safetensors does not exist"),
        ("relu", {"tensors": {"W_enc": "enc.weight"}}, "a relu SAE needs tensors: W_dec"),
        ("relu", {"tensors": {"W_enc": "enc.weight", "W_dec": "dec.weight"}}, "names no b_dec"),
    ],
    ids=str,
)
def test_descriptions_refused(tmp_path: Path, family: str, changes: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, description(family, **changes), stored(weights_of(family)))
    assert matches(folder)
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("tensor", "source", "message"),
    [
        ("W_enc", "enc.weight", "enc.weight makes d_in 96 and d_sae 24: is it transposed"),
        ("W_dec", "dec.weight", r"dec.weight has shape \(24, 96\); expected \(96, 24\): is it transposed"),
        ("W_enc", "encoder", "no tensor 'encoder'; it holds dec.bias"),
        ("b_enc", "dec.bias", r"enc.bias, which rsae\.yaml does not name"),
        ("b_enc", 3, "tensors.b_enc is 3; expected a tensor's name"),
        ("b_enc", {"name": "enc.bias", "transpose": True}, "tensors.b_enc: option 'transpose' is not known"),
        (
            "W_enc",
            {"name": "enc.weight", "transposed": True},
            "option 'transposed' is not known; the nearest: transpose",
        ),
        ("W_enc", {"name": "enc.weight", "transpose": "yes"}, "transpose is 'yes'; expected true or false"),
        ("W_encoder", "enc.weight", "name 'W_encoder' is not known; the nearest: W_enc"),
    ],
    ids=str,
)
def test_sources_refused(tmp_path: Path, tensor: str, source: Any, message: str) -> None:
    values = description("relu")
    values["tensors"][tensor] = source
    if source == "encoder":
        values["ignore"] = ["enc.weight"]
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, values))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("enc.bias", torch.full((D_SAE,), torch.nan), "enc.bias holds 96 nan or inf"),
        ("enc.bias", torch.zeros(D_IN), r"enc.bias has shape \(24,\); expected \(96,\)"),
        ("enc.bias", torch.zeros(D_SAE, dtype=torch.long), "enc.bias is torch.int64"),
        ("enc.weight", torch.zeros(D_SAE), r"enc.weight has shape \(96,\); expected 2 axes"),
        ("theta", torch.full((D_SAE,), 100.0), r"exp\(theta\) is infinite"),
    ],
    ids=str,
)
def test_tensors_refused(tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
    values = description("jumprelu")
    values["tensors"]["threshold"] = {"name": "theta", "exp": True}
    folder = write(tmp_path, values, stored(weights_of("jumprelu")) | {name: tensor})
    with pytest.raises(ValueError, match=message) as error:
        read(folder)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_truncated_file_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, description("relu", weights=name), name=name)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name} cannot be read.*truncated"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not valid yaml"), ("- a", "holds a list"), ("", "holds a NoneType")]
)
def test_broken_yaml_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = write(tmp_path, description("relu"))
    (folder / "rsae.yaml").write_text(text)
    assert matches(folder)
    with pytest.raises(ValueError, match=rf"rsae\.yaml {message}"):
        read(folder)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_neither_pickle_nor_yaml_executes_code(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    trapped = stored(weights_of("relu")) | {"trap": Trap(executed)}
    folder = write(tmp_path / "pickle", description("relu", weights="model.pt"), trapped, "model.pt")
    with pytest.raises(ValueError, match="would execute code: refused"):
        read(folder)
    (folder / "rsae.yaml").write_text(f"family: !!python/object/apply:os.system ['touch {executed}']")
    with pytest.raises(ValueError, match="is not valid yaml"):
        read(folder)
    assert not executed.exists()
    pickle.loads(pickle.dumps(Trap(executed)))
    assert executed.exists()  # the trap is a real one


def test_matches_nothing_else(tmp_path: Path) -> None:
    assert not matches(tmp_path)
    assert not matches(tmp_path / "rsae.yaml")
    (tmp_path / "config.json").write_text("{}")
    assert not matches(tmp_path / "config.json")
