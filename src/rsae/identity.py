"""Does latent j of an upgraded SAE still mean what latent j of its teacher meant? Its weights, activations and top contexts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from rsae.artefacts import Progress
from rsae.cpu import keep_pages
from rsae.evaluate import LanguageModel, counted, measured_batches
from rsae.harvest import SinkRule
from rsae.metrics import RESOLUTION
from rsae.text import Contexts

if TYPE_CHECKING:
    from sae_lens import SAE

QUANTILES = {"5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95}
_ROWS = 128  # tokens encoded together: bounds the latents (_ROWS, d_sae) and their float64 copies, which stay in cache
_CELLS = 1 << 24  # numbers of a block of weights or cosines: bounds the scratch memory


@torch.inference_mode()
def identity(
    teacher: SAE[Any],
    arms: Mapping[str, SAE[Any]],
    host: LanguageModel,
    hook: str,
    contexts: Contexts,
    *,
    store_stats: SinkRule,
    eps: Mapping[str, float] | None = None,
    top: int = 20,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare every latent of each arm with the teacher's latent of the same index, over the tokens that `evaluate` measures.

    With w_j, w'_j a row of W_dec (or column of W_enc) and z_j, z'_j the latent on n tokens, of teacher and arm, and C_j, C'_j the
    contexts that hold its `top` largest activations other than exact zeros (the earlier token first among equal ones):

        decoder_cosine, encoder_cosine = w_j . w'_j / (||w_j|| ||w'_j||), 0 where a norm is 0
        correlation = S(z, z') / sqrt(S(z, z) S(z', z')),  S(a, b) = sum a b - sum a sum b / n
        top_contexts = |C_j and C'_j| / |C_j or C'_j|
        moved = share of the arm's j with max_i cosine(w_i, w'_j) > cosine(w_j, w'_j) + 1e-6, i over the teacher's rows of W_dec

    Sums are float64, about the first token. Memory grows with d_sae, not with the tokens.

    Args:
        teacher, arms: SAEs of one size, the arms by name; each computes on the device of its W_dec.
        host, hook, contexts, store_stats, batch_size, progress: as `rsae.evaluate.evaluate` takes them.
        eps: by arm, the size up to which its latents are set to 0 (those of a dense gate).
        top: how many activations of a latent have their contexts compared.

    Returns:
        By arm, JSON-ready: n_tokens, n_latents, moved; decoder_cosine, encoder_cosine, correlation and top_contexts over latents:
        {"n", "mean", "5%", "25%", "50%", "75%", "95%"}, None where n is 0. Latents left out are counted beside them, as
        {"teacher", "arm", "both"} by where the reason holds (one alone, or both): "undefined", no variance, in correlation;
        "never_fires", 0 throughout, in top_contexts.

    Raises:
        ValueError: no arms; SAEs of unequal sizes, or of another width than the host; nan or inf in the activations or in the
            latents of an arm (named); no token measured.
    """
    _check(teacher, arms, host, top, batch_size)
    eps = eps or {}
    theirs = _Running("teacher", teacher, top)
    ours = {name: _Running(name, sae, top, eps.get(name, 0.0)) for name, sae in arms.items()}
    n_tokens = 0
    keep_pages()
    for x, numbers in _measured(host, hook, contexts, store_stats, batch_size, progress):
        n_tokens += len(x)
        for part, where in zip(x.split(_ROWS), numbers.split(_ROWS), strict=True):
            offset = theirs.add(part, where)
            for running in ours.values():
                running.add(part, where, offset)
    if n_tokens == 0:
        raise ValueError(f"none of {contexts.tokens.numel()} held-out tokens is measured: is the sink ratio too small?")
    return {
        name: {
            "n_tokens": n_tokens,
            "n_latents": teacher.cfg.d_sae,
            "decoder_cosine": _summary(_cosines(teacher.W_dec, sae.W_dec)),
            "encoder_cosine": _summary(_cosines(teacher.W_enc.T, sae.W_enc.T)),
            "correlation": _correlation(theirs, ours[name], n_tokens),
            "top_contexts": _overlap(theirs, ours[name]),
            "moved": _moved(teacher.W_dec, sae.W_dec),
        }
        for name, sae in arms.items()
    }


class _Running:
    """What is kept of one SAE's latents: sums about the first token, and the `top` largest of each with their contexts."""

    def __init__(self, name: str, sae: SAE[Any], top: int, eps: float = 0.0) -> None:
        d_sae = sae.cfg.d_sae
        self.name, self.sae, self.eps = name, sae, eps
        self.origin: Tensor | None = None
        self.sums = torch.zeros(3, d_sae, dtype=torch.float64)  # z, z^2, z times the teacher's z
        self.largest = torch.full((top, d_sae), -torch.inf)  # descending; -inf where there is none yet
        self.contexts = torch.zeros(top, d_sae, dtype=torch.int64)

    def add(
        self, x: Float[Tensor, "n d_in"], contexts: Int[Tensor, " n"], theirs: Float[Tensor, "n d_sae"] | None = None
    ) -> Float[Tensor, "n d_sae"]:
        """Add tokens, later than all before; the latents about their origin (float64), which the arms take as `theirs`."""
        z = counted(self.sae.encode(x.to(self.sae.W_dec.device)), self.eps).float().cpu()
        if self.origin is None:
            self.origin = z[0].double()
        offset = z.double() - self.origin
        other = offset if theirs is None else theirs
        self.sums += torch.stack([offset.sum(0), offset.square().sum(0), (offset * other).sum(0)])
        if not self.sums.isfinite().all():
            raise ValueError(f"arm {self.name!r}: nan or inf in its latents: check the weights and activations")
        fired = torch.where(z != 0, z, -torch.inf)
        better = (fired.amax(0) > self.largest[-1]).nonzero()[:, 0]  # latents whose list changes
        both = torch.cat([self.largest[:, better], fired[:, better]])
        where = torch.cat([self.contexts[:, better], contexts[:, None].expand(-1, len(better))])
        both, order = both.sort(dim=0, descending=True, stable=True)  # stable: the earlier token first
        top = len(self.largest)
        self.largest[:, better], self.contexts[:, better] = both[:top], where.gather(0, order[:top])
        return offset

    @property
    def fires(self) -> Bool[Tensor, " d_sae"]:
        """Whether a latent was ever not exactly 0."""
        return self.largest[0] > -torch.inf

    def top_contexts(self) -> Int[Tensor, "pairs 2"]:
        """(latent, context) of the largest activations, each pair once."""
        kept = self.largest > -torch.inf
        latents = torch.arange(kept.shape[1]).expand_as(kept)[kept]
        return torch.stack([latents, self.contexts[kept]], dim=1).unique(dim=0)


def _measured(
    host: LanguageModel, hook: str, contexts: Contexts, stats: SinkRule, batch_size: int, progress: Progress | None
) -> Iterator[tuple[Float[Tensor, "n d_in"], Int[Tensor, " n"]]]:
    """Activations of the measured tokens of each batch of contexts, and the numbers of their contexts."""
    numbers = torch.arange(len(contexts.tokens))[:, None]
    for rows, _, measured, x in measured_batches(host, hook, contexts, stats, batch_size):
        if len(x):
            yield x, numbers[rows].expand_as(measured)[measured]
        if progress is not None:
            progress("identity", (int(numbers[rows][-1]) + 1) * contexts.tokens.shape[1], contexts.tokens.numel())


def _cosines(a: Float[Tensor, "d_sae d_in"], b: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Cosines of rows with the same index, float64, in blocks of rows."""
    rows, tiny = max(1, _CELLS // a.shape[1]), torch.finfo(torch.float64).tiny
    pairs = zip(a.split(rows), b.split(rows), strict=True)
    cosines = [cosine_similarity(p.cpu().double(), q.cpu().double(), dim=1, eps=tiny) for p, q in pairs]
    return torch.cat(cosines).clamp(-1, 1)


def _moved(theirs: Float[Tensor, "d_sae d_in"], ours: Float[Tensor, "d_sae d_in"]) -> float:
    """Share of our rows that are closer to a row of theirs with another index, in blocks of our rows."""
    unit, moved = normalize(theirs.float(), dim=1), 0
    rows = max(1, _CELLS // len(unit))
    for start in range(0, len(ours), rows):
        cosines = normalize(ours[start : start + rows].to(unit), dim=1) @ unit.T  # (rows, d_sae)
        moved += int((cosines.amax(1) > cosines.diagonal(start) + RESOLUTION).sum())
    return moved / len(ours)


def _correlation(theirs: _Running, ours: _Running, n: int) -> dict[str, Any]:
    """Pearson's correlation of the latents that vary in both; without variance their sums about the first token are exactly 0."""
    spread, of_ours = (running.sums[1] - running.sums[0].square() / n for running in (theirs, ours))
    defined = (spread > 0) & (of_ours > 0)
    together = ours.sums[2] - theirs.sums[0] * ours.sums[0] / n
    values = (together / (spread.sqrt() * of_ours.sqrt()))[defined].clamp(-1, 1)
    return _summary(values) | {"undefined": _where(spread <= 0, of_ours <= 0)}


def _overlap(theirs: _Running, ours: _Running) -> dict[str, Any]:
    """Jaccard's overlap of the top contexts of the latents that fire in both."""
    pairs = torch.cat([theirs.top_contexts(), ours.top_contexts()])
    union, count = pairs.unique(dim=0, return_counts=True)
    size = len(theirs.fires)
    shared = union[count == 2, 0].bincount(minlength=size).double() / union[:, 0].bincount(minlength=size)
    return _summary(shared[theirs.fires & ours.fires]) | {"never_fires": _where(~theirs.fires, ~ours.fires)}


def _where(teacher: Bool[Tensor, " d_sae"], arm: Bool[Tensor, " d_sae"]) -> dict[str, int]:
    """How many latents a reason holds for, by SAE; the three counts do not overlap."""
    masks = {"teacher": teacher & ~arm, "arm": arm & ~teacher, "both": teacher & arm}
    return {name: int(mask.sum()) for name, mask in masks.items()}


def _summary(values: Float[Tensor, " n"]) -> dict[str, Any]:
    """Number, mean and quantiles (linear between ranks)."""
    if len(values) == 0:
        return {"n": 0, "mean": None, **dict.fromkeys(QUANTILES)}
    quantiles = torch.quantile(values, torch.tensor(list(QUANTILES.values()), dtype=values.dtype)).tolist()
    return {"n": len(values), "mean": float(values.mean()), **dict(zip(QUANTILES, quantiles, strict=True))}


def _check(teacher: SAE[Any], arms: Mapping[str, SAE[Any]], host: LanguageModel, top: int, batch_size: int) -> None:
    """Refuse what cannot be compared before anything runs."""
    if not arms or top < 1 or batch_size < 1:
        raise ValueError(f"one arm, top 1 and batch_size 1 are the least; got {len(arms)}, {top} and {batch_size}")
    size = teacher.cfg.d_in, teacher.cfg.d_sae
    if size[0] != host.d_model:
        raise ValueError(f"the teacher has d_in {size[0]}, the host d_model {host.d_model}: it is of another model")
    for name, sae in arms.items():
        if (sae.cfg.d_in, sae.cfg.d_sae) != size:
            raise ValueError(
                f"arm {name!r} has d_in {sae.cfg.d_in} and d_sae {sae.cfg.d_sae}, the teacher {size[0]} and {size[1]}: latents are "
                "compared by index, is this the teacher that the arm was made from?"
            )
