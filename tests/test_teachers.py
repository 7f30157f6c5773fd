"""Teachers from folders: every family read as SAELens reads it, every kind of damage named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import D_IN, D_SAE, K
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import load_file, save_file

from rsae.sae import RationalSAE
from rsae.teachers import load_teacher
from rsae.teachers.hub import _wanted, from_release

FAMILIES = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}


@pytest.fixture
def folder(make_teacher, tmp_path: Path) -> Path:
    """A good checkpoint of a JumpReLU, to be damaged."""
    path = tmp_path / "teacher"
    make_teacher("jumprelu").save_model(path)
    return path


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "sae_weights.safetensors")
    edit(weights)
    save_file(weights, folder / "sae_weights.safetensors")


# -- good --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family(make_teacher, x, tmp_path, architecture, as_text) -> None:
    sae = make_teacher(architecture, apply_b_dec_to_input=False, normalize_activations="layer_norm")
    sae.save_model(tmp_path)
    teacher = load_teacher(str(tmp_path) if as_text else tmp_path)
    assert type(teacher.sae) is type(sae)
    assert teacher.family == FAMILIES[architecture]
    with torch.no_grad():
        assert torch.equal(teacher.sae(x), sae(x))
    assert teacher.conventions == {
        "source": str(tmp_path),
        "format": "SAELens",
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "apply_b_dec_to_input": False,
        "normalize_activations": "layer_norm",
        "hook_name": "blocks.1.hook_resid_post",
        "model_name": "tiny",
        "prepend_bos": True,
        "dtype": "float32",
        "decided": {"conventions": "cfg.json, as SAELens reads it"},
    }


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_a_rational_is_a_teacher_too(make_teacher, x, tmp_path, architecture) -> None:
    sae = RationalSAE.from_teacher(make_teacher(architecture))
    sae.save_model(tmp_path)
    teacher = load_teacher(tmp_path)
    assert type(teacher.sae) is RationalSAE
    assert teacher.family == "rational"
    with torch.no_grad():
        assert torch.equal(teacher.sae(x), sae(x))


def test_bfloat16_weights_come_in_float32(make_teacher, tmp_path) -> None:
    sae = make_teacher("standard").to(torch.bfloat16)
    sae.save_model(tmp_path)
    teacher = load_teacher(tmp_path)
    assert {tensor.dtype for tensor in teacher.sae.state_dict().values()} == {torch.float32}
    assert torch.equal(teacher.sae.W_enc, sae.W_enc.float())
    assert teacher.sae.cfg.dtype == "float32"


def test_the_fingerprint_tells_weights_apart(make_teacher, tmp_path) -> None:
    make_teacher("standard").save_model(tmp_path / "a")
    make_teacher("standard").save_model(tmp_path / "copy")
    make_teacher("standard", seed=1).save_model(tmp_path / "b")
    a, copy, b = (load_teacher(tmp_path / name).fingerprint for name in ("a", "copy", "b"))
    assert a
    assert a == copy
    assert a != b


def test_loading_changes_no_file(folder) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    load_teacher(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# -- bad ---------------------------------------------------------------------------------------------------------------


def refusal(spec: str | Path) -> str:
    """What load_teacher says when it refuses, in one line."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        load_teacher(spec)
    return str(caught.value)


def test_no_folder(tmp_path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "cfg.json and sae_weights.safetensors" in message


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_file_is_missing(folder, name) -> None:
    (folder / name).unlink()
    message = refusal(folder)
    assert f"{folder} has no {name}" in message


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_file_stands_for_its_folder(folder, make_teacher, x, name) -> None:
    with torch.no_grad():
        assert torch.equal(load_teacher(folder / name).sae(x), make_teacher("jumprelu")(x))


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights(folder, length) -> None:
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    message = refusal(folder)
    assert str(file) in message
    assert "truncated" in message


def test_broken_json(folder) -> None:
    (folder / "cfg.json").write_text('{"architecture": "jumprelu", ')
    assert f"{folder}/cfg.json is not valid JSON" in refusal(folder)


def test_json_that_is_no_object(folder) -> None:
    (folder / "cfg.json").write_text("[]")
    assert f"{folder}/cfg.json" in refusal(folder)


def test_config_in_another_encoding(folder) -> None:
    (folder / "cfg.json").write_bytes('{"architecture": "jumprelu", "note": "é"}'.encode("latin-1"))
    assert f"{folder}/cfg.json" in refusal(folder)


@pytest.mark.parametrize("architecture", ["abstopk", "transcoder", "no-such"])
def test_unknown_architecture(folder, architecture) -> None:
    edit_config(folder, architecture=architecture)
    message = refusal(folder)
    assert f"{folder}/cfg.json" in message
    assert repr(architecture) in message
    assert "standard, jumprelu, topk, gated, rational, batchtopk, matryoshka_batchtopk" in message


@pytest.mark.parametrize("key", ["d_in", "d_sae"])
def test_a_key_is_missing(folder, key) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    del config[key]
    (folder / "cfg.json").write_text(json.dumps(config))
    message = refusal(folder)
    assert str(folder) in message
    assert key in message


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("W_enc", (D_IN, D_SAE - 1)),
        ("b_enc", (1,)),
        ("W_dec", (D_IN, D_SAE)),
        ("b_dec", (D_IN, 1)),
        ("threshold", (3,)),
    ],
)
def test_a_tensor_of_the_wrong_shape(folder, name, found) -> None:
    expected = load_file(folder / "sae_weights.safetensors")[name].shape
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(found)}))
    message = refusal(folder)
    assert str(folder) in message
    assert name in message
    for shape in (tuple(expected), found):
        assert ", ".join(map(str, shape)) in message


def test_config_and_weights_of_different_sizes(folder) -> None:
    edit_config(folder, d_in=D_IN + 1)
    message = refusal(folder)
    assert str(folder) in message
    assert "W_enc" in message
    assert str(D_IN + 1) in message


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_a_tensor_is_missing(folder, name) -> None:
    edit_weights(folder, lambda weights: weights.pop(name))
    message = refusal(folder)
    assert str(folder) in message
    assert name in message


def test_a_tensor_too_many(folder) -> None:
    edit_weights(folder, lambda weights: weights.update(mystery=torch.zeros(3)))
    assert "mystery" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_nan_and_inf(folder, name, value) -> None:
    edit_weights(folder, lambda weights: weights[name].view(-1)[:2].fill_(value))
    message = refusal(folder)
    assert str(folder) in message
    assert f"{name} holds 2 nan or inf" in message


@pytest.mark.parametrize("changes", [{"num_coeffs": [float("nan"), 1.0]}, {"C_in": float("inf")}])
def test_a_gate_that_is_not_finite(make_teacher, tmp_path, changes) -> None:
    RationalSAE.from_teacher(make_teacher("standard")).save_model(tmp_path)
    edit_config(tmp_path, **changes)
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "nan or inf" in message


@pytest.mark.parametrize("changes", [{"C_in": -1.0}, {"C_out": 0.0}])
def test_a_gate_whose_scale_is_not_positive(make_teacher, tmp_path, changes) -> None:
    RationalSAE.from_teacher(make_teacher("standard")).save_model(tmp_path)
    edit_config(tmp_path, **changes)
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert f"{next(iter(changes))} must be positive" in message


def test_an_unknown_key_of_a_rational_configuration(make_teacher, tmp_path) -> None:
    RationalSAE.from_teacher(make_teacher("jumprelu")).save_model(tmp_path)
    edit_config(tmp_path, num_coefs=[0.0])
    message = refusal(tmp_path)
    assert "unknown keys ['num_coefs']" in message
    assert "'num_coeffs'" in message


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("standard", {"activation_fn_str": "tanh-relu"}, "activation 'tanh-relu', which SAELens would read as relu"),
        ("standard", {"activation_fn": "topk", "k": 5}, "activation 'topk' and architecture 'standard'"),
        ("standard", {"activation_fn_str": "topk"}, "activation 'topk' and architecture 'standard'"),
        ("standard", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm, which SAELens drops"),
        ("jumprelu", {"apply_b_dec_to_inputs": False}, "'apply_b_dec_to_inputs', which SAELens drops in silence"),
    ],
)
def test_what_saelens_would_drop_in_silence(make_teacher, tmp_path, architecture, changes, message) -> None:
    make_teacher(architecture).save_model(tmp_path)
    edit_config(tmp_path, **changes)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("topk", {"k": None}, "an integer k from 1 to d_sae"),
        ("topk", {"k": 0}, "an integer k from 1 to d_sae"),
        ("topk", {"k": D_SAE + 1}, "an integer k from 1 to d_sae"),
        ("topk", {"k": 3.5}, "an integer k from 1 to d_sae"),
        ("rational", {"num_coeffs": None}, "missing: num_coeffs"),
        ("rational", {"alpha": None}, "missing: alpha"),
        ("rational", {"k": 2.5}, "null or an integer from 1 to d_sae"),
        ("rational", {"k": D_SAE + 1}, "null or an integer from 1 to d_sae"),
    ],
)
def test_what_saelens_would_fill_in(make_teacher, tmp_path, architecture, change, message) -> None:
    sae = make_teacher("topk")
    (RationalSAE.from_teacher(sae) if architecture == "rational" else sae).save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | change
    (tmp_path / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path)


def test_a_pointer_of_git_lfs(tmp_path) -> None:
    (tmp_path / "ae.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    assert "git lfs pull" in refusal(tmp_path)


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client with an empty cache and no network; returns the cache."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_on_hub(cache: Path, folder: Path) -> None:
    """`folder` as org/repo's "layer", downloaded earlier."""
    root = cache / "models--org--repo"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots" / ("0" * 40)).mkdir(parents=True)
    folder.rename(root / "snapshots" / ("0" * 40) / "layer")


def test_from_the_hub(folder, offline, make_teacher, x) -> None:
    put_on_hub(offline, folder)
    teacher = load_teacher("org/repo:layer")
    assert teacher.family == "jumprelu"
    assert teacher.conventions["source"] == "org/repo:layer"
    with torch.no_grad():
        assert torch.equal(teacher.sae(x), make_teacher("jumprelu")(x))


def test_the_hub_is_out_of_reach(offline) -> None:
    message = refusal("org/elsewhere:layer")
    assert "org/elsewhere:layer" in message
    assert "local folder" in message


def test_no_such_release(offline) -> None:
    assert "no-such-release" in refusal("no-such-release:layer")


def test_unknown_architecture_on_the_hub(folder, offline) -> None:
    edit_config(folder, architecture="no-such")
    put_on_hub(offline, folder)
    assert "'no-such'" in refusal("org/repo:layer")


def test_the_whole_of_a_repository_on_the_hub(folder, offline, make_teacher, x) -> None:
    put_on_hub(offline, folder)
    layer = offline / "models--org--repo" / "snapshots" / ("0" * 40) / "layer"
    for file in layer.iterdir():
        file.rename(layer.parent / file.name)
    layer.rmdir()
    with torch.no_grad():
        assert torch.equal(load_teacher("org/repo").sae(x), make_teacher("jumprelu")(x))


def test_nothing_at_that_path_of_the_repository(folder, offline) -> None:
    put_on_hub(offline, folder)
    assert "holds nothing at 'other'" in refusal("org/repo:other")


def test_a_release_of_saelens_list(folder, offline, make_teacher, x) -> None:
    """By release and SAE id, with the files where the hub's client would have put them."""
    release, sae_id = "gpt2-small-res-jb", "blocks.0.hook_resid_pre"
    entry = get_pretrained_saes_directory()[release]
    root = offline / f"models--{entry.repo_id.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    folder.rename(snapshot / entry.saes_map[sae_id])
    teacher = load_teacher(f"{release}:{sae_id}")
    assert release in teacher.conventions["decided"]["conventions"]
    with torch.no_grad():
        assert torch.equal(teacher.sae(x), make_teacher("jumprelu")(x))


def test_an_sae_that_the_release_does_not_have(offline) -> None:
    message = refusal("gpt2-small-res-jb:blocks.0.hook_resid_pr")
    assert "blocks.0.hook_resid_pre" in message


# -- SAELens' other layouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_layout_before_version_6(make_teacher, x, tmp_path, architecture) -> None:
    sae = make_teacher(architecture, apply_b_dec_to_input=False)
    sae.save_model(tmp_path)
    old = {
        "architecture": "standard" if architecture == "topk" else architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "tiny",
        "hook_point": "blocks.1.hook_resid_post",
        "activation_fn_str": "topk" if architecture == "topk" else "relu",
        "activation_fn_kwargs": {"k": K} if architecture == "topk" else {},
        "apply_b_dec_to_input": False,
        "normalize_activations": False,
        "prepend_bos": True,
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    teacher = load_teacher(tmp_path)
    assert type(teacher.sae) is type(sae)
    assert teacher.conventions["hook_name"] == "blocks.1.hook_resid_post"
    with torch.no_grad():
        assert torch.equal(teacher.sae(x), sae(x))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("saved", ["as inference", "as training"])
def test_batch_topk(x, tmp_path, kind, rescale, saved) -> None:
    """Both checkpoints of a BatchTopK run: latents are those of the training class that are above its learnt threshold."""
    classes = {
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
        "matryoshka_batchtopk": (
            MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": [16, D_SAE]},
        ),
    }  # fmt: skip
    sae_class, config_class, more = classes[kind]
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, k=K, rescale_acts_by_decoder_norm=rescale, **more))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            parameter = sae.get_parameter(name)
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=g))
        sae.topk_threshold.fill_(1.3)
        hidden = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
        norms = sae.W_dec.norm(dim=1)
        hidden = hidden * norms if rescale else hidden
        expected = torch.where(hidden > 1.3, hidden, 0.0)
        x_hat = (expected / norms if rescale else expected) @ sae.W_dec + sae.b_dec
        (sae.save_inference_model if saved == "as inference" else sae.save_model)(tmp_path)
        teacher = load_teacher(tmp_path)
        assert teacher.family == "jumprelu"
        assert 0.05 < (expected != 0).float().mean() < 0.5
        torch.testing.assert_close(teacher.sae.encode(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(teacher.sae(x), x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_a_batch_threshold_that_was_never_learnt(x, tmp_path, kind) -> None:
    """SAELens starts it at 0, where its JumpReLU would be a plain ReLU: read as what the batch rule is for one sample."""
    more = {"matryoshka_widths": [16, D_SAE]} if kind.startswith("m") else {}
    kinds = {
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        "matryoshka_batchtopk": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    }
    sae_class, config_class = kinds[kind]
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, k=K, rescale_acts_by_decoder_norm=True, **more))
    sae.save_model(tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.family == "topk"
    assert "never learnt" in teacher.conventions["decided"]["architecture"]
    with torch.no_grad():
        expected = torch.cat([sae.encode(row[None]) for row in x[:20]])
        torch.testing.assert_close(teacher.sae.encode(x[:20]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rescale", [False, True])
def test_topk_by_h_times_the_decoder_norm(make_teacher, x, tmp_path, rescale) -> None:
    sae = make_teacher("topk", rescale_acts_by_decoder_norm=rescale)
    sae.save_model(tmp_path)
    with torch.no_grad():
        h = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        h = h * sae.W_dec.norm(dim=1) if rescale else h
        top = h.topk(K, dim=1)
        z = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
        torch.testing.assert_close(load_teacher(tmp_path).sae.encode(x), z)


def test_the_dtype_that_weights_are_stored_in_is_told(make_teacher, tmp_path) -> None:
    make_teacher("standard").to(torch.bfloat16).save_model(tmp_path)
    assert load_teacher(tmp_path).conventions["dtype"] == "bfloat16"


def test_float16_overflow_is_named(folder) -> None:
    def to_half(weights):
        for name, tensor in list(weights.items()):
            weights[name] = tensor.half()
        weights["W_dec"][0, 0] = 1e6

    edit_weights(folder, to_half)
    message = refusal(folder)
    assert "W_dec holds 1 nan or inf" in message
    assert "float16" in message


def test_a_folder_of_no_known_format(tmp_path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    message = refusal(tmp_path)
    assert "found: model.bin" in message
    assert "rsae.yaml" in message


def test_damage_on_the_hub(folder, offline) -> None:
    edit_weights(folder, lambda weights: weights["W_dec"].view(-1)[:3].fill_(float("nan")))
    put_on_hub(offline, folder)
    assert "org/repo:layer: W_dec holds 3 nan or inf" in refusal("org/repo:layer")


@pytest.mark.parametrize(
    ("inner", "there", "wanted"),
    [
        ("resid/trainer_0/ae.pt", ["resid/trainer_0/ae.pt", "resid/trainer_0/config.json"], True),
        ("resid/trainer_0", ["resid/trainer_0/ae.pt", "resid/trainer_0/config.json"], True),
        ("lc/checkpoints/final.safetensors", ["lc/checkpoints/final.safetensors", "lc/hyperparams.json"], True),
        ("layers.5", ["layers.5/sae.safetensors", "layers.5/cfg.json", "config.json"], True),
        ("mine/rsae.yaml", ["mine/rsae.yaml", "mine/model.safetensors"], True),
        ("", ["cfg.json", "sae_weights.safetensors"], True),
        ("", ["layer_1/params.npz"], False),
        ("resid/trainer_0", ["resid/trainer_1/ae.pt"], False),
    ],
)
def test_what_is_downloaded(inner, there, wanted) -> None:
    from huggingface_hub.utils import filter_repo_objects

    allowed, ignored = _wanted(inner)
    found = list(filter_repo_objects(there, allow_patterns=allowed, ignore_patterns=ignored))
    assert found == (there if wanted else [])


def test_a_release_s_pickle_is_not_executed(tmp_path, monkeypatch) -> None:
    """SAELens' loaders of some releases call torch.load as it comes, and the environment may say that it is to trust."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (ran,))

    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    from sae_lens import SAE

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(SAE, "from_pretrained", lambda *args, **options: torch.load(tmp_path / "evil.pt"))
    with pytest.raises(ValueError, match="SAELens cannot read it"):
        from_release("release:sae")
    assert not ran.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
