"""Is this teacher read right? Its own metrics on real activations, and those of every other way to read the same weights.

A wrong convention (b_dec, input scale, decoder norms, BOS) loads without an error and computes something else. What tells is the
reconstruction: the weights were trained to make it good under one convention, and under another it is clearly worse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rsae.artefacts import Progress, provenance, write_json
from rsae.evaluate import Autoencoder, evaluate, measured_batches
from rsae.finetune import check_trainable
from rsae.harvest import SinkRule
from rsae.hosts import CENTRED, Host
from rsae.metrics import ReconstructionMetrics
from rsae.sae import copied
from rsae.teachers import Teacher
from rsae.text import Contexts, evaluation_contexts

if TYPE_CHECKING:
    from sae_lens import SAE

CLEARLY, BY_FAR = 0.9, 0.5
"""A reading contradicts the declared one if its FVU, with no more latents active, is below the first share of the declared one's:
the sample's own error is far smaller. The second is asked of readings that a well-read teacher gains a little from as well: more
latents, another length of the decoder rows (l1 shrinks latents), other activations (without BOS)."""
NEARLY_DEAD = 0.25
"""Below this share of another reading's L0 the declared one is not compared at its own: it hardly has latents to compare."""
SINK_RATIO = 3.0
_ROWS = 1024


class Alternative(NamedTuple):
    """Another way to read the same weights."""

    convention: str
    declared: str
    instead: str
    sae: Autoencoder
    enough: float = CLEARLY
    with_bos: bool = True


class Scaled:
    """An SAE that was trained on inputs multiplied by a constant, which its checkpoint does not say."""

    def __init__(self, sae: SAE[Any], factor: float) -> None:
        self.sae, self.factor, self.cfg, self.W_dec = sae, factor, sae.cfg, sae.W_dec

    def encode(self, x: Tensor, /) -> Tensor:
        return self.sae.encode(x * self.factor)

    def decode(self, latents: Tensor, /) -> Tensor:
        return self.sae.decode(latents) / self.factor


def preflight(
    teacher: Teacher,
    host: Host,
    hook: str,
    text: str,
    *,
    tokens: int = 16_384,
    ce_tokens: int = 4_096,
    context_length: int = 256,
    out: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a teacher as it is declared, and its FVU under every other convention, on the validation part of a text.

    Args:
        teacher, host, hook, text: as `rsae.pipeline.upgrade` takes them, the first two loaded.
        tokens, ce_tokens: how many tokens the reconstruction and the loss are measured on.
        out: the preflight.json to write.

    Returns:
        What preflight.json holds: "conventions" (and how each was decided), "found" (k, thresholds, norms), "metrics" (as in
        metrics.json), "alternatives" with the FVU of each, "warnings", and "verdict": "agrees" or "contradicted".

    Raises:
        ValueError: d_in and d_model differ, no such hook, text shorter than a context.
    """
    sae = teacher.sae
    if sae.W_dec.device != host.device:
        sae = copied(sae).to(host.device)
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1; got {tokens}")
    if sae.cfg.reshape_activations != "none":
        check_trainable(sae)  # refuses it: there are no activations to read it on
    if sae.cfg.d_in != host.d_model:
        raise ValueError(
            f"the teacher has d_in {sae.cfg.d_in}, the host {host.spec} has d_model {host.d_model}: "
            "it was trained on another model, or on attention heads side by side (hook_z), which rsae does not read"
        )
    hook = host.hook_point(hook).name
    contexts = evaluation_contexts(
        host.tokenizer, text, n_tokens=tokens, split="validation", context_length=context_length
    )
    with_bos, rule, excluded = _activations(host, hook, contexts, progress)
    metrics = evaluate(
        {"teacher": sae}, host, hook, contexts, store_stats=rule, ce_tokens=ce_tokens, progress=progress
    )["teacher"]  # fmt: skip
    del metrics["histograms"]
    declared, declared_l0 = _measure(sae, with_bos)
    if declared is None:
        raise ValueError(f"the teacher's reconstruction at {hook} is not finite")
    alternatives = []
    without_bos: Tensor | None = None
    for other in _other_readings(sae, with_bos, host):
        if not other.with_bos and without_bos is None:
            without_bos, _, _ = _activations(host, hook, _without_bos(contexts), progress)
        x = with_bos if other.with_bos or without_bos is None else without_bos
        fvu, l0 = _measure(other.sae, x)
        same_l0 = fvu
        if l0 > declared_l0 >= NEARLY_DEAD * l0:
            same_l0, _ = _measure(other.sae, x, keep=max(1, round(declared_l0)))
        row = {
            "convention": other.convention,
            "declared": other.declared,
            "instead": other.instead,
            "fvu": fvu,
            "l0": None if fvu is None else l0,
        }
        ratio, at_same_l0 = (None if value is None else value / declared for value in (fvu, same_l0))
        better = False
        if fvu is not None and same_l0 is not None:
            better = fvu < BY_FAR * declared or same_l0 < other.enough * declared
        alternatives.append({**row, "ratio": ratio, "ratio_at_same_l0": at_same_l0, "contradicts": better})
    contradicted = [row for row in alternatives if row["contradicts"]]
    warnings = [
        f"{row['convention']}: read as {row['declared']!r} the FVU is {declared:.4f} at L0 {declared_l0:.1f}, as "
        f"{row['instead']!r} it is {row['fvu']:.4f} at {row['l0']:.1f}"
        + ("" if row["fvu"] < declared else f", and {row['ratio_at_same_l0'] * declared:.4f} at the declared one's L0")
        for row in sorted(contradicted, key=lambda row: row["fvu"])
    ]
    if declared >= 1:
        warnings.append(
            f"the reconstruction is worse than the mean activation (FVU {declared:.3f}): another layer or model?"
        )
    result = {
        "schema": 1,
        "family": teacher.family,
        "fingerprint": teacher.fingerprint,
        "host": host.spec,
        "hook": hook,
        "text": text,
        "conventions": teacher.conventions,
        "found": _found(sae),
        "metrics": metrics,
        "excluded": excluded,
        "alternatives": alternatives,
        "warnings": warnings + _mismatches(teacher, host, hook),
        "verdict": "contradicted" if contradicted or declared >= 1 else "agrees",
        "provenance": provenance(),
    }
    if out is not None:
        write_json(out, result)
    return result


def _other_readings(sae: SAE[Any], x: Float[Tensor, "n d_in"], host: Host) -> Iterator[Alternative]:
    """Every convention of the checkpoint, the other way round."""

    def altered(**changes: Any) -> SAE[Any]:
        # Made anew: SAELens reads parts of a configuration only at the start
        other = type(sae)(replace(sae.cfg, **changes))
        other.load_state_dict(sae.state_dict())
        return other.to(sae.W_dec.device)

    subtracted = ("subtracted", "not subtracted")
    declared, instead = subtracted if sae.cfg.apply_b_dec_to_input else subtracted[::-1]
    if bool((sae.b_dec != 0).any()):
        yield Alternative(
            "b_dec before the encoder",
            declared,
            instead,
            altered(apply_b_dec_to_input=not sae.cfg.apply_b_dec_to_input),
        )

    normalize = sae.cfg.normalize_activations
    plain = sae if normalize == "none" else altered(normalize_activations="none")
    factor = sae.cfg.d_in**0.5 / float(x.norm(dim=1).mean())
    yield Alternative("inputs", normalize, f"scaled to mean norm sqrt(d_in), by {factor:.5g}", Scaled(plain, factor))
    yield Alternative("inputs", normalize, f"scaled back, by {1 / factor:.5g}", Scaled(plain, 1 / factor))
    if normalize == "none":
        yield Alternative("inputs", normalize, "layer_norm", altered(normalize_activations="layer_norm"))
    else:
        yield Alternative("inputs", normalize, "none", plain)

    norms = sae.W_dec.detach().norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    if bool(((norms - 1).abs() > 1e-3).any()):
        unit = copied(sae)
        unit.W_dec.data.div_(norms[:, None])
        yield Alternative("decoder rows", "as stored", "of unit norm", unit, BY_FAR)
        if sae.cfg.architecture() == "jumprelu":
            by_size = copied(sae)
            by_size.get_parameter("threshold").data.div_(norms)
            yield Alternative("thresholds compared with", "h", "h ||w||", by_size)
        elif sae.cfg.architecture() == "topk":
            rescaled = sae.cfg.rescale_acts_by_decoder_norm
            rules = ("h", "h ||w||")
            declared, instead = rules[::-1] if rescaled else rules
            yield Alternative("the k largest of", declared, instead, altered(rescale_acts_by_decoder_norm=not rescaled))

    if host.tokenizer.bos_token_id is not None:
        yield Alternative("BOS", "at the start of a context", "left out", sae, BY_FAR, with_bos=False)


@torch.no_grad()
def _activations(
    host: Host, hook: str, contexts: Contexts, progress: Progress | None
) -> tuple[Float[Tensor, "n d_in"], SinkRule, dict[str, float]]:
    """Activations of all tokens that are measured, in float32; the sink rule they make; the shares left out."""
    parts, counts = [], {"bos": 0, "special": 0}
    every_token = SinkRule(torch.zeros(host.d_model), math.inf, 1.0)  # what a sink is, these tokens are to say
    for rows, masks, _, x in measured_batches(host, hook, contexts, every_token):
        parts.append(x.cpu())
        counts = {name: count + int(getattr(masks, name).sum()) for name, count in counts.items()}
        if progress is not None:
            progress("inspect", rows.stop, len(contexts.tokens))
    x = torch.cat(parts)
    rule = SinkRule.fit(x, SINK_RATIO)
    sinks = rule.is_sink(x)
    counts["sink"] = int(sinks.sum())
    return x[~sinks], rule, {name: count / contexts.tokens.numel() for name, count in counts.items()}


def _without_bos(contexts: Contexts) -> Contexts:
    return contexts._replace(tokens=contexts.tokens[:, 1:], documents=contexts.documents[:, 1:])


@torch.inference_mode()
def _measure(sae: Autoencoder, x: Float[Tensor, "n d_in"], keep: int | None = None) -> tuple[float | None, float]:
    """FVU (None where something is not finite) and mean L0; of the `keep` largest latents, if given."""
    metrics = ReconstructionMetrics(x.shape[1], sae.cfg.d_sae)
    for part in x.split(_ROWS):
        part = part.to(sae.W_dec.device)
        latents = sae.encode(part)
        if keep is not None:  # by what they contribute
            size = latents.abs() * sae.W_dec.norm(dim=1)
            kept = size.topk(min(keep, size.shape[1]), dim=1).indices
            latents = torch.zeros_like(latents).scatter(1, kept, latents.gather(1, kept))
        x_hat = sae.decode(latents)
        if not (latents.isfinite().all() and x_hat.isfinite().all()):
            return None, math.nan
        metrics.update(part, x_hat, latents, torch.zeros(len(part), dtype=torch.int64))
    found = metrics.compute()
    return found["fvu"], found["l0"]


def _found(sae: SAE[Any]) -> dict[str, Any]:
    """What the weights themselves say."""
    weights = sae.state_dict()
    found: dict[str, Any] = {
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "decoder_norms": _quantiles(weights["W_dec"].norm(dim=1)),
        "b_dec_norm": float(weights["b_dec"].norm()),
    }
    threshold = weights.get("threshold", weights.get("gate.threshold"))
    if threshold is not None:
        found["thresholds"] = _quantiles(threshold)
    if (k := getattr(sae.cfg, "k", None)) is not None:
        found["k"] = k
    return found


def _quantiles(values: Tensor) -> dict[str, float]:
    shares = (0.0, 0.05, 0.5, 0.95, 1.0)
    ordered = values.float().flatten().sort().values  # torch.quantile refuses more than 16 M values
    return {f"{share:.0%}": float(ordered[round(share * (len(ordered) - 1))]) for share in shares}


def _mismatches(teacher: Teacher, host: Host, hook: str) -> list[str]:
    """Where the checkpoint names another hook, another BOS or other activations than it is read with."""
    warnings = []
    named = teacher.conventions.get("hook_name")
    if named and _place(host, named) not in (None, _place(host, hook)):
        warnings.append(f"the checkpoint names the hook {named!r}; it is read at {hook!r}")
    if teacher.conventions.get("prepend_bos") is False and host.tokenizer.bos_token_id is not None:
        warnings.append("the checkpoint says that it was trained without BOS; contexts here begin with one")
    loaded_with = teacher.sae.cfg.metadata.to_dict().get("model_from_pretrained_kwargs") or {}
    was_centred = bool(loaded_with.get("center_writing_weights"))
    if was_centred and not host.is_centred and not host.reads_mean:
        warnings.append(
            "the checkpoint says that its model was loaded with center_writing_weights: every activation had its mean over d_model "
            f"subtracted, and those of {host.spec} have not; name it {CENTRED}{host.spec}"
        )
    if host.is_centred and not was_centred:
        warnings.append(
            f"the activations of {host.spec} have their mean over d_model subtracted, and the checkpoint does not say that it was "
            f"trained on such (center_writing_weights); it may want {host.spec.removeprefix(CENTRED)}"
        )
    return warnings


def _place(host: Host, hook: str) -> tuple[str, str] | None:
    """Where in the host a hook is, the input of a layer as the output of the one before; None if its name says nothing here."""
    if (before := re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook)) and int(before[1]) > 0:
        hook = f"blocks.{int(before[1]) - 1}.hook_resid_post"
    try:
        return host.hook_point(hook)[1:3]
    except ValueError:
        return None
