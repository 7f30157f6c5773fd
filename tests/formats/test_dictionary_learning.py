"""dictionary_learning: every class computes what the package's own load_dictionary computes, and every contradiction is refused."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rsae.teachers.checkpoint import Reading
from rsae.teachers.dictionary_learning import matches, read

D_IN, D_SAE, K = 24, 96, 6
CLASSES = {
    "AutoEncoder": "StandardSAE",
    "AutoEncoderNew": "StandardSAE",
    "AutoEncoderTopK": "TopKSAE",
    "BatchTopKSAE": "JumpReLUSAE",
    "MatryoshkaBatchTopKSAE": "JumpReLUSAE",
    "JumpReluAutoEncoder": "JumpReLUSAE",
    "GatedAutoEncoder": "GatedSAE",
}
NEVER_SUBTRACT = ("AutoEncoderNew", "JumpReluAutoEncoder")
BATCHED = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def weights(dict_class: str, *, threshold: float = 0.7, norms: tuple[float, float] = (0.5, 1.5)) -> dict[str, Tensor]:
    """A state_dict as that class saves it, nothing in it 0, 1 or normalised."""
    g = torch.Generator().manual_seed(len(dict_class))

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=g)

    W_enc, b_enc = normal(D_IN, D_SAE, scale=D_IN**-0.5), normal(D_SAE, scale=0.3)
    rows = torch.nn.functional.normalize(normal(D_SAE, D_IN, scale=1.0), dim=1)
    W_dec = rows * torch.empty(D_SAE, 1).uniform_(*norms, generator=g)
    b_dec = normal(D_IN, scale=0.5)
    linear = {"encoder.weight": W_enc.T.contiguous(), "decoder.weight": W_dec.T.contiguous()}
    plain = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    topk = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    if dict_class == "AutoEncoder":
        return {"bias": b_dec, "encoder.bias": b_enc, **linear}
    if dict_class == "AutoEncoderNew":
        return {"decoder.bias": b_dec, "encoder.bias": b_enc, **linear}
    if dict_class in ("AutoEncoderTopK", "BatchTopKSAE"):
        return {"b_dec": b_dec, "encoder.bias": b_enc, **linear, **topk}
    if dict_class == "MatryoshkaBatchTopKSAE":
        return {**plain, **topk, "group_sizes": torch.tensor([16, 32, 48])}
    if dict_class == "JumpReluAutoEncoder":
        mixed = torch.empty(D_SAE).uniform_(0.05, 1.5, generator=g)
        mixed[::7], mixed[3], mixed[5] = 0.0, -0.4, -1.0
        return {**plain, "threshold": mixed}
    biases = {"mag_bias": b_enc, "gate_bias": normal(D_SAE, scale=0.3), "r_mag": normal(D_SAE, scale=0.3)}
    return {"decoder_bias": b_dec, **linear, **biases}


def write(
    folder: Path, dict_class: str, state: dict[str, Any] | None = None, *, buffer: Any = None, **trainer: Any
) -> Path:
    """ae.pt and config.json in `folder`; a trainer's key given as None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights(dict_class) if state is None else state, folder / "ae.pt")
    config = {
        "trainer_class": "ATrainer",
        "dict_class": dict_class,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": 4,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_4",
    }
    config |= {"k": K} if "TopK" in dict_class else {}
    config = {key: value for key, value in (config | trainer).items() if value is not None}
    (folder / "config.json").write_text(json.dumps({"trainer": config} | ({"buffer": buffer} if buffer else {})))
    return folder


@pytest.fixture
def x() -> Tensor:
    """(64, D_IN) activations around a mean that is not 0."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(64, D_IN, generator=g) + torch.linspace(-1.0, 1.5, D_IN)


@pytest.fixture(scope="module")
def peer() -> Iterator[SimpleNamespace]:
    """The package's own classes and functions. What it imports but does not need for them is replaced by empty modules."""
    with pytest.MonkeyPatch.context() as patch:
        for name, attribute in {"nnsight": "LanguageModel", "wandb": "init"}.items():
            if importlib.util.find_spec(name) is None:
                stub = ModuleType(name)
                setattr(stub, attribute, object)
                patch.setitem(sys.modules, name, stub)
        pytest.importorskip("dictionary_learning")
        from dictionary_learning import dictionary, trainers, training, utils
        from dictionary_learning.trainers import matryoshka_batch_top_k, standard

        yield SimpleNamespace(
            load=lambda folder: utils.load_dictionary(str(folder), "cpu")[0],
            train=training.trainSAE,
            AutoEncoder=dictionary.AutoEncoder,
            trainers={
                **{name: getattr(trainers, name) for name in trainers.__all__},
                "StandardTrainerAprilUpdate": standard.StandardTrainerAprilUpdate,
                "MatryoshkaBatchTopKTrainer": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
            },
        )


@torch.no_grad()
def agree(reading: Reading, theirs: Any, x: Tensor) -> Tensor:
    """Latents and reconstructions are those of the peer; the latents."""
    ours = reading.sae
    latents, expected = ours.encode(x), theirs.encode(x)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float32}
    assert 0.01 < (latents > 0).float().mean() < 0.9
    assert torch.equal(latents > 0, expected > 0)
    assert (latents - expected).abs().max() <= 1e-5
    assert (ours(x) - theirs(x)).abs().max() <= 1e-5
    return latents


# -- good --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dict_class", CLASSES)
def test_every_class(peer, x, tmp_path, dict_class) -> None:
    reading = read(write(tmp_path, dict_class))
    agree(reading, peer.load(tmp_path), x)
    assert type(reading.sae).__name__ == CLASSES[dict_class]
    assert reading.sae.cfg.apply_b_dec_to_input is (dict_class not in NEVER_SUBTRACT)
    assert reading.format == f"dictionary_learning {dict_class}"
    assert reading.files == (tmp_path / "ae.pt",)
    with torch.no_grad():
        right = reading.sae.encode(x)
        reading.sae.cfg.apply_b_dec_to_input ^= True
        assert (reading.sae.encode(x) - right).abs().max() > 0.1


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "trainer",
    [
        "StandardTrainer",
        "StandardTrainerAprilUpdate",
        "PAnnealTrainer",
        "GatedSAETrainer",
        "TopKTrainer",
        "BatchTopKTrainer",
        "MatryoshkaBatchTopKTrainer",
        "JumpReluTrainer",
    ],
)
def test_what_every_trainer_saves(peer, x, tmp_path, capsys, trainer, scaled) -> None:
    """Trained for real, with and without an input scale: trainSAE writes no "buffer" for a plain list of batches."""
    config = {"steps": 40, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 2, "lm_name": "pythia", "device": "cpu"}
    config |= {"trainer": peer.trainers[trainer], "lr": 1e-2, "warmup_steps": 1, "seed": 0}
    if "TopK" in trainer:
        config |= {"k": K, "threshold_start_step": 5}
    else:
        config |= {"sparsity_warmup_steps": 2}
    if trainer == "PAnnealTrainer":
        config |= {"anneal_start": 20, "n_sparsity_updates": 5, "p_end": 0.2}
    if trainer == "MatryoshkaBatchTopKTrainer":
        config |= {"group_fractions": [0.25, 0.75]}
    peer.train(
        [3 * x.clone() for _ in range(40)],
        [config],
        40,
        save_dir=str(tmp_path),
        normalize_activations=scaled,
        device="cpu",
    )
    reading = read(tmp_path / "trainer_0")
    agree(reading, peer.load(tmp_path / "trainer_0"), 3 * x)
    assert reading.sae.cfg.metadata.context_size is None
    assert reading.sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"


@pytest.mark.parametrize("dict_class", CLASSES)
def test_weights_in_half_precision(peer, x, tmp_path, dict_class) -> None:
    state = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights(dict_class).items()}
    agree(read(write(tmp_path, dict_class, state)), peer.load(tmp_path), x)


def test_autoencoder_has_its_decoder_norms_folded(peer, x, tmp_path) -> None:
    """As from_pretrained does by default; the stored weights give other latents and the same reconstruction."""
    reading = read(write(tmp_path, "AutoEncoder"))
    stored = peer.AutoEncoder.from_pretrained(tmp_path / "ae.pt", normalize_decoder=False)
    with torch.no_grad():
        assert torch.allclose(reading.sae.W_dec.norm(dim=1), torch.ones(D_SAE))
        assert (reading.sae.encode(x) - stored.encode(x)).abs().max() > 0.1
        assert (reading.sae(x) - stored(x)).abs().max() <= 1e-5
    assert "folded" in reading.decided["decoder norms"]


def test_unit_rows_are_left_alone(peer, x, tmp_path) -> None:
    state = weights("AutoEncoder", norms=(1.0, 1.0))
    reading = read(write(tmp_path, "AutoEncoder", state))
    agree(reading, peer.load(tmp_path), x)
    assert torch.equal(reading.sae.W_dec, state["decoder.weight"].T)
    assert reading.decided["decoder norms"] == "1 already"


def test_a_decoder_row_of_zeros(x, tmp_path) -> None:
    state = weights("AutoEncoder")
    state["decoder.weight"][:, 7] = 0
    with torch.no_grad():
        assert bool(torch.isfinite(read(write(tmp_path, "AutoEncoder", state)).sae(x)).all())


@pytest.mark.parametrize("dict_class", BATCHED)
def test_never_calibrated_is_topk_of_each_sample(peer, x, tmp_path, dict_class) -> None:
    reading = read(write(tmp_path, dict_class, weights(dict_class, threshold=-1.0)))
    ours, theirs = reading.sae, peer.load(tmp_path)
    assert type(ours).__name__ == "TopKSAE"
    assert ours.cfg.k == K
    assert "never calibrated" in reading.decided["threshold"]
    with torch.no_grad():
        rows = [theirs.encode(row[None], use_threshold=False) for row in x]
        expected = torch.cat(rows)
        assert ((expected > 0).sum(1) == K).all()
        assert (ours.encode(x) - expected).abs().max() <= 1e-5
        assert (ours(x) - theirs.decode(expected)).abs().max() <= 1e-5
        assert (theirs.encode(x, use_threshold=False) - expected).abs().max() > 0.1  # the batch rule over 64 samples
        assert (theirs.encode(x) > 0).sum(1).float().mean() > 3 * K  # what its default does with -1


@pytest.mark.parametrize("dict_class", ["AutoEncoderTopK", "BatchTopKSAE"])
def test_files_from_before_k_and_threshold_were_saved(peer, x, tmp_path, dict_class) -> None:
    state = weights(dict_class)
    write(tmp_path / "new", "AutoEncoderTopK", state)
    reading = read(write(tmp_path / "old", dict_class, {n: t for n, t in state.items() if n not in ("k", "threshold")}))
    agree(reading, peer.load(tmp_path / "new"), x)


def test_topk_does_not_use_its_threshold(peer, x, tmp_path) -> None:
    reading = read(write(tmp_path, "AutoEncoderTopK"))
    latents = agree(reading, peer.load(tmp_path), x)
    assert ((latents > 0).sum(1) == K).all()
    with torch.no_grad():
        assert (peer.load(tmp_path).encode(x, use_threshold=True) - latents).abs().max() > 0.1
    assert "not used" in reading.decided["threshold"]


def test_k_from_either_file(x, tmp_path) -> None:
    state = weights("AutoEncoderTopK")
    del state["k"]
    from_config = read(write(tmp_path / "config", "AutoEncoderTopK", state))
    from_weights = read(write(tmp_path / "weights", "AutoEncoderTopK", k=None))
    assert from_config.sae.cfg.k == from_weights.sae.cfg.k == K


@pytest.mark.parametrize("dict_class", ["JumpReluAutoEncoder", *BATCHED])
def test_at_the_threshold_a_latent_is_off(peer, x, tmp_path, dict_class) -> None:
    """Pre-activations that equal the threshold to the bit: b_enc alone, no input."""
    state = weights(dict_class)
    for name in ("W_enc", "encoder.weight", "b_dec"):
        if name in state:
            state[name].zero_()
    bias = state["b_enc" if "b_enc" in state else "encoder.bias"]
    bias.copy_(state["threshold"].expand(D_SAE))
    bias[1::2] += 0.125
    ours, theirs = read(write(tmp_path, dict_class, state)).sae, peer.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(ours.encode(x), theirs.encode(x))
        assert not bool(ours.encode(x)[:, ::2].any())
        assert bool(ours.encode(x)[:, 1::2].any())


def test_negative_thresholds_are_a_relu(peer, x, tmp_path) -> None:
    state = weights("JumpReluAutoEncoder")
    state["threshold"] = -state["threshold"].abs() - 0.1
    reading = read(write(tmp_path, "JumpReluAutoEncoder", state))
    latents = agree(reading, peer.load(tmp_path), x)
    with torch.no_grad():
        assert torch.allclose(latents, (x @ state["W_enc"] + state["b_enc"]).relu(), atol=1e-5)


def test_the_first_spelling_of_matryoshka(peer, x, tmp_path) -> None:
    state = weights("MatryoshkaBatchTopKSAE")
    write(tmp_path / "now", "MatryoshkaBatchTopKSAE", state)
    agree(read(write(tmp_path / "then", "MatroyshkaBatchTopKSAE", state, k=K)), peer.load(tmp_path / "now"), x)


# -- what the configuration says ---------------------------------------------------------------------------------------


def test_metadata_without_a_buffer(tmp_path) -> None:
    reading = read(write(tmp_path, "AutoEncoder"))
    metadata = reading.sae.cfg.metadata
    assert metadata.model_name == "EleutherAI/pythia-70m-deduped"
    assert metadata.hook_name == "blocks.4.hook_resid_post"
    assert metadata.context_size is None
    assert metadata.prepend_bos is None
    said = {"architecture", "apply_b_dec_to_input", "normalize_activations", "decoder norms", "context_size"}
    assert said | {"hook_name", "model_name", "prepend_bos"} == set(reading.decided)


def test_context_size_from_the_buffer(tmp_path) -> None:
    reading = read(write(tmp_path, "AutoEncoder", buffer={"d_submodule": D_IN, "io": "out", "ctx_len": 128}))
    assert reading.sae.cfg.metadata.context_size == 128


@pytest.mark.parametrize(
    ("folder", "io", "trainer", "hook"),
    [
        ("run", "out", {}, "blocks.4.hook_resid_post"),
        ("run", "out", {"submodule_name": "resid_post_layer_7", "layer": 7}, "blocks.7.hook_resid_post"),
        ("run", "out", {"submodule_name": "mlp_out_layer4"}, "blocks.4.hook_mlp_out"),
        ("run", "out", {"submodule_name": "attn_out_layer_4", "layer": None}, "blocks.4.hook_attn_out"),
        ("run", "out", {"submodule_name": None}, "blocks.4.hook_resid_post"),
        ("run", "in", {"submodule_name": None}, "blocks.4.hook_resid_pre"),
        ("mlp_out_layer4/10_32768", "out", {"submodule_name": None}, "blocks.4.hook_mlp_out"),
        ("run", "out", {"submodule_name": "mlp_out_layer4", "layer": 5}, None),
        ("run", "out", {"submodule_name": "dit_block"}, None),
        ("run", "out", {"submodule_name": None, "layer": None}, None),
    ],
)
def test_hook_name(tmp_path, folder, io, trainer, hook) -> None:
    reading = read(write(tmp_path / folder, "AutoEncoder", buffer={"io": io, "ctx_len": 64}, **trainer))
    assert reading.sae.cfg.metadata.hook_name == hook
    assert reading.decided["hook_name"].startswith("unclear") is (hook is None)


def test_ways_to_name_a_checkpoint(tmp_path) -> None:
    run = write(tmp_path / "trainer_0", "AutoEncoder")
    (run / "checkpoints").mkdir()
    step = run / "checkpoints" / "ae_100.pt"
    step.write_bytes((run / "ae.pt").read_bytes())
    for path, file in {tmp_path: run / "ae.pt", run: run / "ae.pt", run / "ae.pt": run / "ae.pt", step: step}.items():
        assert matches(path)
        assert read(path).files == (file,)


def test_matches_is_specific(tmp_path) -> None:
    assert not matches(tmp_path / "nowhere")
    assert not matches(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma3"]}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not matches(tmp_path)
    assert not matches(tmp_path / "model.safetensors")
    for text in ("[]", "{", '{"trainer": 3}', "\xff"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        assert not matches(tmp_path)
    write(tmp_path, "AutoEncoder")
    (tmp_path / "ae.pt").unlink()
    assert matches(tmp_path)


# -- bad ---------------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    """What read says when it refuses."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("dict_class", CLASSES)
def test_a_missing_tensor(tmp_path, dict_class) -> None:
    may_lack = {"k", "threshold"} if dict_class in ("AutoEncoderTopK", "BatchTopKSAE") else set()
    for name in set(weights(dict_class)) - may_lack:
        state = weights(dict_class)
        del state[name]
        message = refusal(write(tmp_path, dict_class, state))
        assert str(tmp_path / "ae.pt") in message
        assert f"lacks ['{name}']" in message


@pytest.mark.parametrize("dict_class", CLASSES)
def test_a_wrong_shape(tmp_path, dict_class) -> None:
    for name in set(weights(dict_class)) - {"k", "group_sizes"}:
        state = weights(dict_class)
        right, state[name] = tuple(state[name].shape), torch.ones(3, 5)
        if name == "threshold" and dict_class == "AutoEncoderTopK":
            continue  # it is not used
        message = refusal(write(tmp_path, dict_class, state))
        assert f"{tmp_path / 'ae.pt'}: {name} has shape (3, 5); expected {right}" in message


@pytest.mark.parametrize("dict_class", CLASSES)
def test_a_transposed_encoder(tmp_path, dict_class) -> None:
    state = weights(dict_class)
    name = "W_enc" if "W_enc" in state else "encoder.weight"
    state[name] = state[name].T.contiguous()
    assert "transposed" in refusal(write(tmp_path, dict_class, state))
    assert "expected" in refusal(write(tmp_path, dict_class, state, activation_dim=None, dict_size=None))


@pytest.mark.parametrize("dict_class", CLASSES)
def test_nan(tmp_path, dict_class) -> None:
    state = weights(dict_class)
    for name in set(state) - {"k", "group_sizes", "threshold"}:
        damaged = {n: t.clone() for n, t in state.items()}
        damaged[name].flatten()[2] = torch.nan
        message = refusal(write(tmp_path, dict_class, damaged))
        assert name in message
        assert "1 nan" in message


@pytest.mark.parametrize("declared", CLASSES)
@pytest.mark.parametrize("saved", CLASSES)
def test_another_class_declared(tmp_path, declared, saved) -> None:
    same_tensors = {"AutoEncoderTopK", "BatchTopKSAE"}
    if declared == saved or {declared, saved} == same_tensors:
        return
    message = refusal(write(tmp_path, declared, weights(saved), k=K))
    assert f"not the {declared}" in message
    assert f"it could be {saved}" in message or saved in same_tensors


def test_a_tensor_that_would_change_the_result(tmp_path) -> None:
    state = weights("BatchTopKSAE") | {"activation_rescale_factor": torch.ones(D_SAE)}
    message = refusal(write(tmp_path, "BatchTopKSAE", state))
    assert "activation_rescale_factor" in message


@pytest.mark.parametrize("key", ["trainer.k", "trainer.dict_class", "trainer"])
def test_a_key_is_lacking(tmp_path, key) -> None:
    state = weights("AutoEncoderTopK")
    del state["k"]
    write(tmp_path, "AutoEncoderTopK", state)
    config = json.loads((tmp_path / "config.json").read_text())
    section, _, name = key.partition(".")
    del (config[section] if name else config)[name or section]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"{tmp_path / 'config.json'} lacks {key}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"k": K + 1}, "two values of k"),
        ({"k": "many"}, "whole number"),
        ({"activation_dim": D_IN + 1}, "expected (96, 25)"),
        ({"dict_size": 2 * D_SAE}, "expected (192, 24)"),
    ],
)
def test_a_wrong_configuration(tmp_path, trainer, says) -> None:
    assert says in refusal(write(tmp_path, "AutoEncoderTopK", **trainer))


@pytest.mark.parametrize("dict_class", ["CrossCoder", ["AutoEncoder"]])
def test_a_class_that_is_not_known(tmp_path, dict_class) -> None:
    message = refusal(write(tmp_path, dict_class, weights("AutoEncoder")))
    assert f"{tmp_path / 'config.json'}: trainer.dict_class is" in message
    assert "rsae reads AutoEncoder, " in message


def test_more_latents_asked_for_than_there_are(tmp_path) -> None:
    state = weights("AutoEncoderTopK") | {"k": torch.tensor(D_SAE + 1)}
    assert "k from 1 to d_sae = 96" in refusal(write(tmp_path, "AutoEncoderTopK", state, k=None))


def test_a_transcoder(tmp_path) -> None:
    assert "transcoder" in refusal(write(tmp_path, "AutoEncoder", buffer={"io": "in_and_out", "ctx_len": 128}))


def test_several_trainers(tmp_path) -> None:
    for name in ("trainer_0", "trainer_1"):
        write(tmp_path / name, "AutoEncoder")
    assert matches(tmp_path)
    assert "trainer_0, trainer_1" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["ae.pt", "config.json"])
def test_a_file_is_missing(tmp_path, name) -> None:
    write(tmp_path, "AutoEncoder")
    (tmp_path / name).unlink()
    assert matches(tmp_path)
    assert name in refusal(tmp_path)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize("text", ['{"trainer": ', "é", "[]"])
def test_a_broken_configuration(tmp_path, text) -> None:
    write(tmp_path, "AutoEncoder")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert matches(tmp_path)
    assert str(tmp_path / "config.json") in refusal(tmp_path)


@pytest.mark.parametrize("length", [0, 100, -100])
def test_truncated(tmp_path, length) -> None:
    file = write(tmp_path, "AutoEncoder") / "ae.pt"
    file.write_bytes(file.read_bytes()[:length])
    message = refusal(tmp_path)
    assert str(file) in message
    assert "truncated" in message


class Intruder:
    """Unpickled, it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_would_execute_code(tmp_path, as_zip) -> None:
    write(tmp_path, "AutoEncoder")
    state = weights("AutoEncoder") | {"intruder": Intruder(tmp_path / "was_here")}
    if as_zip:
        torch.save(state, tmp_path / "ae.pt")
    else:
        (tmp_path / "ae.pt").write_bytes(pickle.dumps({"intruder": state["intruder"]}, protocol=2))
    assert "execute code" in refusal(tmp_path)
    assert not (tmp_path / "was_here").exists()


# -- SAELens' own loader -----------------------------------------------------------------------------------------------


@pytest.fixture
def sae_lens_reads(monkeypatch) -> Any:
    """SAELens' own reading of a local folder: (SAE, configuration)."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo_id, filename, **_: str(Path(repo_id) / filename))

    def reads(folder: Path) -> tuple[Any, dict[str, Any]]:
        config, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1(str(folder.parent), folder.name)
        sae = SAE.from_dict(loaders.handle_pre_6_0_config(config))
        sae.load_state_dict(state)
        return sae, config

    return reads


BUFFER = {"io": "out", "ctx_len": 128}


def test_sae_lens_fails_without_a_buffer(sae_lens_reads, tmp_path) -> None:
    with pytest.raises(KeyError, match="buffer"):
        sae_lens_reads(write(tmp_path / "sae", "AutoEncoder"))


def test_sae_lens_loses_the_bias_of_autoencoder_new(sae_lens_reads, tmp_path) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder = write(tmp_path / "sae", "AutoEncoderNew", buffer=BUFFER)
    config, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1(str(tmp_path), "sae")
    assert state["b_dec"] is None
    assert config["apply_b_dec_to_input"] is True  # nor does AutoEncoderNew subtract it
    with pytest.raises(RuntimeError, match="b_dec"):
        sae_lens_reads(folder)


@pytest.mark.parametrize("dict_class", BATCHED)
def test_sae_lens_keeps_all_latents_of_a_threshold_never_calibrated(sae_lens_reads, x, tmp_path, dict_class) -> None:
    folder = write(tmp_path / "sae", dict_class, weights(dict_class, threshold=-1.0), buffer=BUFFER)
    with torch.no_grad():
        assert (sae_lens_reads(folder)[0].encode(x) > 0).sum(1).float().mean() > 3 * K
        assert ((read(folder).sae.encode(x) > 0).sum(1) == K).all()


def test_sae_lens_does_not_fold_decoder_norms(sae_lens_reads, peer, x, tmp_path) -> None:
    folder = write(tmp_path / "sae", "AutoEncoder", buffer=BUFFER)
    with torch.no_grad():
        assert (sae_lens_reads(folder)[0].encode(x) - peer.load(folder).encode(x)).abs().max() > 0.1


def test_sae_lens_says_resid_post_of_every_submodule(sae_lens_reads, tmp_path) -> None:
    folder = write(tmp_path / "sae", "AutoEncoder", buffer=BUFFER, submodule_name="mlp_out_layer4")
    assert sae_lens_reads(folder)[1]["hook_name"] == "blocks.4.hook_resid_post"
    assert read(folder).sae.cfg.metadata.hook_name == "blocks.4.hook_mlp_out"


@pytest.mark.parametrize("dict_class", ["AutoEncoderTopK", *BATCHED, "JumpReluAutoEncoder", "GatedAutoEncoder"])
def test_where_sae_lens_is_right_it_agrees(sae_lens_reads, x, tmp_path, dict_class) -> None:
    folder = write(tmp_path / "sae", dict_class, buffer=BUFFER)
    with torch.no_grad():
        assert torch.equal(sae_lens_reads(folder)[0].encode(x), read(folder).sae.encode(x))
