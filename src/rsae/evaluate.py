"""SAEs to numbers: every arm measured on the same held-out tokens of the same language model, and compared in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rsae.artefacts import Progress, provenance, read_json, write_json
from rsae.cpu import keep_pages
from rsae.harvest import SinkRule
from rsae.metrics import MATCHED, ArmSums, LossMetrics, NotFinite, ReconstructionMetrics, paired_difference, verdict
from rsae.text import Contexts

COMPARISON_RULE = (
    "a_minus_b: [difference, low, high], the 95% interval of a bootstrap paired by document; fvu is "
    "relative to the other's, delta_ce in nats per token; the verdict (on the control) is a tie where the interval "
    "holds 0, and for alive and dense within 0.1 percentage point; unmatched where their L0 differ by more than 1%"
)
_LATENTS = 1 << 23  # latents of the tokens that are encoded together
_VARIANTS = 16  # contexts that the host's later layers run at once, counting one for each arm
Key = tuple[str, str]
"""(run, arm)."""
PAIRS = (("rsae", "control"), ("rsae", "teacher"), ("control", "teacher"))
"""The arms that are compared: (a, b) for "a_minus_b"."""
_RESERVED = {"clean", "zero", "mean", "schema", "config", "provenance", "excluded", "sources", "verdict"}
"""Names that an arm may not have: those of the edits beside the arms', and of the other entries of metrics.json."""


def counted(latents: Float[Tensor, "n d_sae"], eps: float) -> Float[Tensor, "n d_sae"]:
    """Latents, those of at most `eps` in size set to 0: what is measured of a dense gate. (SAELens' TopK can return COO.)"""
    latents = latents.to_dense() if latents.is_sparse else latents
    return torch.where(latents.abs() <= eps, 0, latents) if eps > 0 else latents  # nan stays, to be found


def counting_thresholds_of(run: Path, arms: Mapping[str, Any]) -> dict[str, float]:
    """By dense arm the `eps` of `counted` that the upgrade in a run folder found.

    Raises:
        ValueError: a dense arm beside a control, and no metrics.json that says what of it is counted.
    """
    file = run / "metrics.json"
    eps = (read_json(file)["config"] if file.exists() else {}).get("eps", {})
    dense = {arm for arm, sae in arms.items() if getattr(getattr(sae, "gate", None), "support", "hard") == "dense"}
    if dense - eps.keys() and "control" in arms:
        raise ValueError(
            f"{run}: {', '.join(sorted(dense))} has a dense gate, and no metrics.json says what of it is counted: "
            "run `rsae upgrade --recipe paper` to its end first"
        )
    return eps


@runtime_checkable
class Autoencoder(Protocol):
    """What is measured: a SAELens SAE, or anything that encodes and decodes like one."""

    @property
    def cfg(self) -> Any:
        """Has d_in and d_sae."""
        ...

    @property
    def W_dec(self) -> Any:
        """Its device is where the arm computes."""
        ...

    def encode(self, x: Tensor, /) -> Tensor:
        """(n, d_in) -> latents (n, d_sae)."""
        ...

    def decode(self, latents: Tensor, /) -> Tensor:
        """(n, d_sae) -> x_hat (n, d_in)."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """What is needed of a host (rsae.hosts.Host)."""

    @property
    def d_model(self) -> int: ...

    @property
    def tokenizer(self) -> Any:
        """Has bos_token_id and all_special_ids."""
        ...

    def activations(self, tokens: Tensor, hook: str) -> Tensor:
        """(B, T) -> (B, T, d_model) at the hook."""
        ...

    def token_losses(
        self, tokens: Tensor, hook: str, edits: dict[str, Callable[[Tensor], Tensor]]
    ) -> Mapping[str, Any]:
        """(B, T) -> for "clean" and each edit of the activations at the hook: nll and kl (B, T-1), in nats."""
        ...


class Exclusions(NamedTuple):
    """Why a token is not measured; the three masks do not overlap."""

    bos: Bool[Tensor, "B T"]
    special: Bool[Tensor, "B T"]
    sink: Bool[Tensor, "B T"]


def exclusions(
    tokens: Int[Tensor, "B T"], activations: Float[Tensor, "B T d_in"], tokenizer: Any, sink_rule: SinkRule
) -> Exclusions:
    """The tokens that are not measured: BOS at the start of a context, other special tokens, attention sinks.

    The same as `rsae.harvest.harvest` leaves out of a store.
    """
    special = torch.isin(tokens, torch.tensor(tokenizer.all_special_ids, dtype=tokens.dtype, device=tokens.device))
    bos = torch.zeros_like(special)
    if tokenizer.bos_token_id is not None:
        bos[:, 0] = tokens[:, 0] == tokenizer.bos_token_id
    sink = sink_rule.is_sink(activations).to(tokens.device)
    return Exclusions(bos, special & ~bos, sink & ~special & ~bos)


class Measured(NamedTuple):
    """A batch of contexts, and which of its tokens are measured."""

    rows: slice
    """Which contexts."""
    masks: Exclusions
    measured: Bool[Tensor, "B T"]
    x: Float[Tensor, "n d_in"]
    """Activations of the measured tokens, float32, on the host's device."""


def measured_batches(
    host: LanguageModel, hook: str, contexts: Contexts, sink_rule: SinkRule, batch_size: int = 16
) -> Iterator[Measured]:
    """Run the host over contexts, and say of every token whether it is measured.

    Raises:
        ValueError: nan or inf in the activations.
    """
    for start in range(0, len(contexts.tokens), batch_size):
        rows = slice(start, min(start + batch_size, len(contexts.tokens)))
        activations = host.activations(contexts.tokens[rows], hook)
        if not activations.isfinite().all():
            raise ValueError(
                f"nan or inf in the host's activations at {hook!r}, contexts {start} to {rows.stop - 1}: "
                "load the host in bfloat16 or float32, float16 overflows"
            )
        masks = exclusions(contexts.tokens[rows], activations, host.tokenizer, sink_rule)
        measured = ~(masks.bos | masks.special | masks.sink)
        yield Measured(rows, masks, measured, activations[measured.to(activations.device)].float())


def evaluate(
    arms: Mapping[str, Autoencoder],
    host: LanguageModel,
    hook: str,
    contexts: Contexts,
    *,
    store_stats: SinkRule,
    ce_tokens: int | None = None,
    eps: float | Mapping[str, float] = 0.0,
    batch_size: int = 16,
    out: Path | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure arms on held-out text and compare "rsae" with "control" and "teacher", where they are among the arms.

    Every metric of `rsae.metrics`, over the same tokens for every arm. Reconstruction and sparsity are over all
    measured tokens; the loss is over `ce_tokens` of them, in contexts spread evenly over the text, with an arm's x_hat in
    place of the measured activations. Tokens that are not measured (`exclusions`) are not replaced either: their
    activation passes through.

    Args:
        arms: name -> SAE, in float32; each computes on the device of its W_dec.
        host: the language model.
        hook: where the arms read, in any spelling the host knows.
        contexts: tokens (N, T), their document ids (N, T), the sources they come from.
        store_stats: the store's sink rule, frozen at harvest; its mean is that of the mean ablation.
        ce_tokens: how many tokens the loss is measured on, rounded up to whole contexts; None for all.
        eps: latents with |z| <= eps are set to 0 before decoding and not counted, of every arm or of those named; 0 counts exact
            non-zeros.
        batch_size: contexts run together; no result depends on it, beyond the host's own rounding.
        out: the metrics.json to write, atomically, once all is measured.
        config: what ran, JSON-ready, kept as it is.
        progress: told the tokens done.

    Returns:
        What metrics.json holds: schema, config, provenance, the rules in words, the shares excluded, sources; the
        metrics by arm; "rsae_minus_control", "rsae_minus_teacher" (`paired_difference`); "verdict" of rsae on control ("unmatched"
        throughout where their L0 differ by more than MATCHED).

    Raises:
        ValueError: an arm whose d_in is not the host's d_model; nan or inf in the activations, or in the latents or
            reconstruction of an arm (named); no text, or none of it measured; fewer than two documents to compare over.
    """
    (result,) = evaluate_runs(
        {"": arms}, host, hook, contexts, store_stats=store_stats, ce_tokens=ce_tokens, eps=eps, batch_size=batch_size,
        config=config, progress=progress,
    ).values()  # fmt: skip
    if out is not None:
        write_json(out, result)
    return result


def evaluate_runs(
    runs: Mapping[str, Mapping[str, Autoencoder]],
    host: LanguageModel,
    hook: str,
    contexts: Contexts,
    *,
    store_stats: SinkRule,
    ce_tokens: int | None = None,
    eps: float | Mapping[str, float] = 0.0,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    batch_size: int = 16,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """`evaluate` for several runs (name -> arms) on the same text: the host runs once for all of them.

    Args:
        pairs: the arms to compare, where a run has both: (a, b) makes "a_minus_b".

    Returns:
        For each run what `evaluate` returns for its arms.
    """
    (ce_contexts, *_) = [
        _check(arms, host, contexts, store_stats, ce_tokens, batch_size, pairs) for arms in runs.values()
    ]
    saes = {(run, arm): sae for run, arms in runs.items() for arm, sae in arms.items()}
    by_arm = eps if isinstance(eps, Mapping) else {arm: eps for _, arm in saes}
    if unknown := by_arm.keys() - {arm for _, arm in saes}:
        raise ValueError(f"eps names arms that are not measured: {sorted(unknown)}")
    reconstruction = {
        (run, arm): ReconstructionMetrics(host.d_model, sae.cfg.d_sae, eps=by_arm.get(arm, 0.0))
        for (run, arm), sae in saes.items()
    }
    losses = {key: LossMetrics() for key in saes}
    n_contexts, length = contexts.tokens.shape
    keep_pages()
    excluded = dict.fromkeys(Exclusions._fields, 0)
    with torch.inference_mode():
        for rows, masks, measured, x in measured_batches(host, hook, contexts, store_stats, batch_size):
            tokens, documents = contexts.tokens[rows], contexts.documents[rows]
            for name, mask in masks._asdict().items():
                excluded[name] += int(mask.sum())
            x_hats = {
                key: _reconstruct("/".join(key).strip("/"), sae, x, documents[measured], reconstruction[key])
                for key, sae in saes.items()
            }
            for some in ce_contexts[rows].nonzero().squeeze(1).split(max(1, _VARIANTS // len(saes))):
                if len(some) == 0:  # nothing splits into one part of nothing
                    continue
                chosen = torch.zeros(len(tokens), dtype=torch.bool).index_fill_(0, some, True)
                spliced = chosen[:, None].expand_as(measured)[measured]  # the rows of x that these contexts hold
                _losses(
                    losses, host, hook, tokens[chosen], documents[chosen], measured[chosen],
                    {key: x_hat[spliced] for key, x_hat in x_hats.items()}, store_stats.mean,
                )  # fmt: skip
            if progress is not None:
                progress("evaluate", rows.stop * length, n_contexts * length)

    total = contexts.tokens.numel()
    if sum(excluded.values()) == total:
        raise ValueError(f"all {total} held-out tokens are excluded ({excluded}): is the sink ratio too small?")
    results = {}
    for run, arms in runs.items():
        ours = {arm: reconstruction[run, arm] for arm in arms}
        our_losses = {arm: losses[run, arm] for arm in arms}
        result: dict[str, Any] = {
            "schema": 1,
            "config": dict(config or {}),
            "provenance": provenance(),
            "counting_rule": _counting_rule(ours),
            "exclusion_rule": _exclusion_rule(store_stats.ratio),
            "comparison_rule": COMPARISON_RULE,
            "excluded": {name: count / total for name, count in excluded.items()},
            "sources": list(contexts.sources),
            **{arm: ours[arm].compute() | our_losses[arm].compute() for arm in arms},
        }
        results[run] = result | _comparisons(result, ours, our_losses, pairs)
    return results


def _reconstruct(
    name: str,
    sae: Autoencoder,
    x: Float[Tensor, "n d_in"],
    documents: Int[Tensor, " n"],
    metrics: ReconstructionMetrics,
) -> Float[Tensor, "n d_in"]:
    """x_hat of every row, added to the metrics on the way."""
    x_hat = torch.empty_like(x)
    together = max(1, _LATENTS // sae.cfg.d_sae)
    for start in range(0, len(x), together):
        rows = slice(start, start + together)
        part = x[rows].to(sae.W_dec.device)
        latents = counted(sae.encode(part), metrics.eps)
        decoded = sae.decode(latents)
        with _naming(name):
            metrics.update(part, decoded, latents, documents[rows])
        x_hat[rows] = decoded
    return x_hat


def _losses(
    metrics: Mapping[Key, LossMetrics],
    host: LanguageModel,
    hook: str,
    tokens: Int[Tensor, "B T"],
    documents: Int[Tensor, "B T"],
    measured: Bool[Tensor, "B T"],
    spliced: Mapping[Key, Float[Tensor, "n d_in"]],
    mean: Float[Tensor, " d_in"],
) -> None:
    """Add the losses of every arm, with its x_hat (n = measured tokens) spliced in, beside the two ablations."""
    edits = {"/".join(key): _splice(measured, x_hat) for key, x_hat in spliced.items()}
    ablations = {"zero": _splice(measured, torch.zeros_like(mean)), "mean": _splice(measured, mean)}
    by_edit = host.token_losses(tokens, hook, edits | ablations)
    counted = measured[:, :-1]  # the activation at t predicts token t+1
    predicted = documents[:, 1:][counted]
    nll = {name: losses.nll.to(counted.device)[counted] for name, losses in by_edit.items()}
    for key in spliced:
        name = "/".join(key)
        kl = by_edit[name].kl.to(counted.device)[counted]
        with _naming(name.strip("/")):
            metrics[key].update(nll["clean"], nll[name], nll["zero"], nll["mean"], kl, predicted)


def _splice(measured: Bool[Tensor, "B T"], values: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit that puts values, (n, d_in) or (d_in,), at the measured positions and leaves the others as they are."""

    def edit(activations: Tensor) -> Tensor:
        edited = activations.clone()
        edited[measured.to(edited.device)] = values.to(edited)
        return edited

    return edit


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the arm's name before a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise (NotFinite if isinstance(error, NotFinite) else ValueError)(f"arm {name!r}: {error}") from None


def _comparisons(
    result: Mapping[str, Any],
    reconstruction: Mapping[str, ReconstructionMetrics],
    losses: Mapping[str, LossMetrics],
    pairs: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """The difference of each pair, and the verdict on rsae against the control; result holds the arms' metrics."""
    comparisons: dict[str, Any] = {}
    for pair in _compared(reconstruction, pairs):
        ours, theirs = (ArmSums(reconstruction[arm].document_sums(), losses[arm].document_sums()) for arm in pair)
        comparisons["_minus_".join(pair)] = paired_difference(ours, theirs)
    if "rsae_minus_control" in comparisons:
        found = verdict(comparisons["rsae_minus_control"], result["rsae"], result["control"])
        ours, theirs = (result[arm]["l0"] for arm in ("rsae", "control"))
        is_matched = abs(ours - theirs) <= MATCHED * theirs
        comparisons["verdict"] = found if is_matched else dict.fromkeys(found, "unmatched")
    return comparisons


def _compared(arms: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of which both arms are there."""
    return [(a, b) for a, b in pairs if a in arms and b in arms]


def _counting_rule(reconstruction: Mapping[str, ReconstructionMetrics]) -> str:
    """The rule that all arms share, or each arm's."""
    rules = {arm: metrics.counting_rule for arm, metrics in reconstruction.items()}
    if len(set(rules.values())) == 1:
        return next(iter(rules.values()))
    return "; ".join(f"{arm}: {rule}" for arm, rule in rules.items())


def _exclusion_rule(sink_ratio: float) -> str:
    """The rule of `exclusions` and `_losses` in words."""
    return (
        "not measured, and passed through unchanged when an arm or an ablation is spliced in: BOS at the start of a "
        "context; other special tokens; attention sinks (distance from the training text's mean activation more than "
        f"{sink_ratio:g}x its median there). Contexts are full, there is no padding. The loss on a token counts where "
        "the activation that predicts it, one position earlier, is measured; its document is the predicted token's. "
        "Ablations put zeros or the training text's mean activation at the measured positions."
    )


def _check(
    arms: Mapping[str, Autoencoder],
    host: LanguageModel,
    contexts: Contexts,
    stats: SinkRule,
    ce_tokens: int | None,
    batch_size: int,
    pairs: Sequence[tuple[str, str]],
) -> Bool[Tensor, " N"]:
    """Refuse what cannot be measured before anything runs; the contexts that the loss is measured on, evenly spread."""
    if not arms or _RESERVED & set(arms):
        raise ValueError(f"arms must be named, and not one of {sorted(_RESERVED)}; got {sorted(arms)}")
    for name, sae in arms.items():
        if sae.cfg.d_in != host.d_model:
            raise ValueError(
                f"arm {name!r} has d_in {sae.cfg.d_in} but the host's d_model is {host.d_model}: "
                "the SAE was trained on another model"
            )
    if stats.mean.shape != (host.d_model,):
        raise ValueError(f"store_stats.mean must be ({host.d_model},), got {tuple(stats.mean.shape)}: another harvest?")
    if contexts.tokens.ndim != 2 or contexts.tokens.shape != contexts.documents.shape:
        raise ValueError(
            "contexts must have tokens and documents of one shape (N, T), got "
            f"{tuple(contexts.tokens.shape)} and {tuple(contexts.documents.shape)}"
        )
    n_contexts, length = contexts.tokens.shape
    if n_contexts == 0 or length < 2:
        raise ValueError(f"no held-out text: {n_contexts} contexts of {length} tokens, where one of two is the least")
    if batch_size < 1 or (ce_tokens is not None and ce_tokens < 1):
        raise ValueError(f"batch_size and ce_tokens must be at least 1, got {batch_size} and {ce_tokens}")
    return loss_contexts(contexts, ce_tokens, compared=bool(_compared(arms, pairs)))


def loss_contexts(contexts: Contexts, ce_tokens: int | None, *, compared: bool = True) -> Bool[Tensor, " N"]:
    """The contexts that the loss is measured on, evenly spread, of at least `ce_tokens` tokens (None: all).

    Raises:
        ValueError: they hold one document, and arms are to be `compared`.
    """
    n_contexts, length = contexts.tokens.shape
    n_chosen = n_contexts if ce_tokens is None else min(n_contexts, -(-ce_tokens // length))
    chosen = torch.zeros(n_contexts, dtype=torch.bool)
    chosen[torch.linspace(0, n_contexts - 1, n_chosen).round().long()] = True
    if compared and len(contexts.documents[chosen, 1:].unique()) < 2:
        raise ValueError(
            f"the {n_chosen} contexts that the loss is measured on hold one document: an interval needs two at "
            "least, give more evaluation text (a .txt is one document) or measure the loss on more tokens"
        )
    return chosen
