"""Every metric once: a formula, and a streaming accumulator whose result does not depend on how the tokens were split.

Sums are float64 and kept per document, so that memory grows with documents, never with tokens, and so that two arms can
be compared by a bootstrap that is paired by document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

DENSE_SHARE = 0.1
"""A latent is dense when it fires on more than this share of the tokens."""
TIE_SHARE = 0.001
"""Shares of latents (alive, dense) within 0.1 percentage point of each other are a tie."""
MATCHED = 0.01
"""Two arms are at the same sparsity when their L0 differ by no more than this share."""
RESOLUTION = 1e-6
"""Float32 rounding of a reconstruction: an interval that comes this close to 0 holds 0."""
_ROWS = 2048  # rows of latents looked at together: bounds the scratch memory
_DRAWS = 1 << 22  # document draws of the bootstrap held together: bounds its memory


class NotFinite(ValueError):
    """nan or inf where a number should be: a run has diverged, or a checkpoint is damaged."""


class DocumentSums(NamedTuple):
    """One ratio metric by document: over any set of documents it is sum(numerator) / sum(denominator)."""

    documents: Int[Tensor, " docs"]
    """Document ids, ascending."""
    numerator: Float[Tensor, " docs"]
    """float64; squared error for the FVU, added nats for delta-CE."""
    denominator: Float[Tensor, " docs"]
    """float64; squared distance from the mean over ALL tokens for the FVU, predicted tokens for delta-CE."""

    @property
    def value(self) -> float:
        """The metric over all documents."""
        return float(self.numerator.sum() / self.denominator.sum())


class ArmSums(NamedTuple):
    """What a paired comparison needs of one arm: the `document_sums()` of its two accumulators."""

    fvu: DocumentSums
    delta_ce: DocumentSums


class _Table:
    """float64 column sums per document id, rows added as documents appear."""

    def __init__(self, width: int) -> None:
        self._row_of: dict[int, int] = {}
        self._sums = torch.zeros(0, width, dtype=torch.float64)

    def add(self, documents: Tensor, values: Tensor) -> None:
        """Add values (n, width) to the rows of documents (n,)."""
        ids, inverse = torch.unique(documents, return_inverse=True)
        batch = values.new_zeros(len(ids), values.shape[1]).index_add_(0, inverse, values)
        rows = torch.tensor([self._row_of.setdefault(i, len(self._row_of)) for i in ids.tolist()])
        if len(self._row_of) > len(self._sums):  # doubled, so that growing costs nothing on average
            grown = torch.zeros(2 * len(self._row_of), self._sums.shape[1], dtype=torch.float64)
            grown[: len(self._sums)] = self._sums
            self._sums = grown
        self._sums[rows] += batch.cpu()

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Document ids ascending (docs,), their sums (docs, width)."""
        ids = torch.tensor(list(self._row_of), dtype=torch.int64)
        order = ids.argsort()
        return ids[order], self._sums[order]


class ReconstructionMetrics:
    """Reconstruction and sparsity over a stream of tokens.

    With x the activations, x_hat their reconstruction, z the latents, m the mean of x over all n tokens, and sums over
    all tokens:

        mse = sum ||x - x_hat||^2 / n
        fvu = sum ||x - x_hat||^2 / sum ||x - m||^2,  explained_variance = 1 - fvu
        l0 = number of z that fire / n,  negative = share of those that are < 0
        alive = share of latents that fire at least once,  dense = share that fire on more than 10% of the tokens

    A latent fires when it is not exactly 0, whatever its sign. With `eps` > 0 it fires when |z| > eps, and the caller
    must pass an x_hat decoded from latents in which the others were set to 0: what is not counted may not help.

    The spread about m, which is known only at the end, is summed about the first token and shifted when asked for.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        eps: counting threshold in units of z; 0 counts exact non-zeros.
    """

    def __init__(self, d_in: int, d_sae: int, *, eps: float = 0.0) -> None:
        if not (eps >= 0 and math.isfinite(eps)):
            raise ValueError(f"eps must be a finite number >= 0, got {eps}: 0 counts exact non-zeros")
        self.d_in, self.d_sae, self.eps = d_in, d_sae, eps
        self._table = _Table(3 + d_in)  # tokens, squared error, squared distance from the origin, sum of x - origin
        self._origin: Tensor | None = None
        self._fires = torch.zeros(d_sae, dtype=torch.int64)
        self._l0_counts = torch.zeros(d_sae + 1, dtype=torch.int64)
        self._negative = 0
        self._scratch = torch.empty(0)

    @torch.inference_mode()
    def update(
        self,
        x: Float[Tensor, "n d_in"],
        x_hat: Float[Tensor, "n d_in"],
        latents: Float[Tensor, "n d_sae"],
        documents: Int[Tensor, " n"],
    ) -> None:
        """Add n tokens.

        Raises:
            ValueError: shapes that disagree; nan or inf in one of the tensors, which is named.
        """
        n = len(documents)
        for name, tensor, width in (("x", x, self.d_in), ("x_hat", x_hat, self.d_in), ("latents", latents, self.d_sae)):
            if tensor.shape != (n, width):
                raise ValueError(f"{name} must be ({n}, {width}) beside {n} documents, got {tuple(tensor.shape)}")
        if n == 0:
            return
        if self._origin is None:  # any token does: float64 has digits to spare, and the first depends on no batch size
            self._origin = x[0].double().clone()
        offset = x.double() - self._origin
        error = (x.double() - x_hat).square().sum(1, keepdim=True)
        for name, tensor in (("x", offset), ("x_hat", error)):
            _finite(name, tensor)
        for start in range(0, n, _ROWS):
            self._count(latents[start : start + _ROWS])
        columns = torch.cat([torch.ones_like(error), error, offset.square().sum(1, keepdim=True), offset], dim=1)
        self._table.add(documents.to(columns.device), columns)

    def _count(self, latents: Tensor) -> None:
        """Add at most _ROWS rows to the counts of firing."""
        low = _finite("latents", latents)
        # A float32 0/1 mask in a reused buffer: its sums are exact below 2^24 and 20x faster than those of a bool mask.
        if len(self._scratch) < len(latents) or self._scratch.device != latents.device:
            self._scratch = torch.empty(latents.shape, device=latents.device)
        mask = self._scratch[: len(latents)]
        if self.eps == 0:
            torch.ne(latents, 0, out=mask)
        else:
            torch.gt(latents.abs(), self.eps, out=mask)
        self._fires += mask.sum(0).long().cpu()
        self._l0_counts += torch.bincount(mask.sum(1).long(), minlength=self.d_sae + 1).cpu()
        if low < -self.eps:
            self._negative += int(torch.count_nonzero(latents < -self.eps))

    def document_sums(self) -> DocumentSums:
        """Squared error and squared distance from the mean over ALL tokens (not the document's own), by document.

        Raises:
            ValueError: no tokens, or activations that are all equal.
        """
        documents, sums = self._table.sorted()
        if not len(documents):
            raise ValueError("no tokens were measured: call update() before asking for metrics")
        tokens, sse, about_origin, offset = sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3:]
        mean = offset.sum(0) / tokens.sum()  # about the origin
        sst = about_origin - 2 * offset @ mean + tokens * mean.square().sum()
        if sst.sum() <= 1e-14 * about_origin.sum():
            raise ValueError(f"all {int(tokens.sum())} activations are equal: a share of their variance means nothing")
        return DocumentSums(documents, sse, sst)

    @property
    def counting_rule(self) -> str:
        """What l0, alive and dense count, in words."""
        exact, above = "exact non-zeros (z != 0)", f"|z| > {self.eps:g}, the others set to 0 before decoding"
        counted = above if self.eps else exact
        return (
            f"a latent fires on {counted}; alive: on at least one of the n_tokens measured tokens; "
            f"dense: on more than {DENSE_SHARE:.0%} of them"
        )

    def compute(self) -> dict[str, Any]:
        """All metrics, JSON-ready: mse, fvu, explained_variance, l0, alive, dense, negative, n_tokens, n_documents,
        counting_rule, histograms.

        `histograms["l0"]` counts tokens by their L0 (integers in [edge, next edge)); `histograms["log10_density"]`
        counts latents by log10 of the share of tokens they fire on, with those that never fire apart as "dead".

        Raises:
            ValueError: as `document_sums`.
        """
        sums = self.document_sums()
        n = int(self._l0_counts.sum())
        counted = int(self._fires.sum())
        fvu = sums.value
        return {
            "mse": float(sums.numerator.sum()) / n,
            "fvu": fvu,
            "explained_variance": 1.0 - fvu,
            "l0": counted / n,
            "alive": int(torch.count_nonzero(self._fires)) / self.d_sae,
            "dense": int(torch.count_nonzero(self._fires.double() > DENSE_SHARE * n)) / self.d_sae,
            "negative": self._negative / counted if counted else 0.0,
            "n_tokens": n,
            "n_documents": len(sums.documents),
            "counting_rule": self.counting_rule,
            "histograms": {"l0": self._l0_histogram(), "log10_density": self._density_histogram(n)},
        }

    def _l0_histogram(self) -> dict[str, list[int]]:
        """Tokens by L0, at most 64 bins of a round width from 0 up."""
        top = int(self._l0_counts.nonzero().max())
        width = next(w for p in range(12) for w in (10**p, 2 * 10**p, 5 * 10**p) if top < 64 * w)
        bins = top // width + 1
        padded = torch.nn.functional.pad(self._l0_counts[: top + 1], (0, bins * width - top - 1))
        counts = padded.view(bins, width).sum(1).tolist()
        return {"edges": [width * i for i in range(bins + 1)], "counts": counts}

    def _density_histogram(self, n: int) -> dict[str, Any]:
        """Latents by log10 density, ten bins a decade from the rarest density that n tokens can show up to 1."""
        decades = max(1, math.ceil(math.log10(n)))
        bins = 10 * decades
        fires = self._fires[self._fires > 0].double()
        # The nudge keeps a density of exactly 10^-k in the bin that begins there; density 1 belongs to the last bin.
        index = ((fires / n).log10() * 10 + bins + 1e-9).floor().long().clamp(0, bins - 1)
        edges = [round(-decades + i / 10, 1) for i in range(bins + 1)]
        counts = torch.bincount(index, minlength=bins).tolist()
        return {"edges": edges, "counts": counts, "dead": self.d_sae - len(fires)}


class LossMetrics:
    """The language model's loss with the reconstruction spliced in, in nats per predicted token.

        delta_ce = ce_spliced - ce_clean
        loss_recovered = (ce_ablated - ce_spliced) / (ce_ablated - ce_clean)
        kl = KL(clean || spliced)

    `loss_recovered` is against ablation by zeros, `loss_recovered_mean` against ablation by the mean activation.
    """

    def __init__(self) -> None:
        self._table = _Table(6)  # tokens, clean, spliced, zero-ablated, mean-ablated, kl

    @torch.inference_mode()
    def update(
        self,
        nll_clean: Float[Tensor, " n"],
        nll_spliced: Float[Tensor, " n"],
        nll_zero: Float[Tensor, " n"],
        nll_mean: Float[Tensor, " n"],
        kl: Float[Tensor, " n"],
        documents: Int[Tensor, " n"],
    ) -> None:
        """Add n predicted tokens: their negative log-likelihoods and KL, in nats, and the documents they are in.

        Raises:
            ValueError: shapes that disagree; nan or inf in one of the tensors, which is named.
        """
        n = len(documents)
        losses = {
            "nll_clean": nll_clean,
            "nll_spliced": nll_spliced,
            "nll_zero": nll_zero,
            "nll_mean": nll_mean,
            "kl": kl,
        }
        for name, tensor in losses.items():
            if tensor.shape != (n,):
                raise ValueError(f"{name} must be ({n},) beside {n} documents, got {tuple(tensor.shape)}")
            if n:
                _finite(name, tensor)
        if n:
            columns = [torch.ones(n), *losses.values()]
            self._table.add(documents.cpu(), torch.stack([column.double().cpu() for column in columns], dim=1))

    def document_sums(self) -> DocumentSums:
        """Added nats (spliced - clean) and predicted tokens, by document. ValueError if there are no tokens."""
        documents, sums = self._table.sorted()
        if not len(documents):
            raise ValueError("no predicted tokens were measured: call update() before asking for metrics")
        return DocumentSums(documents, sums[:, 2] - sums[:, 1], sums[:, 0])

    def compute(self) -> dict[str, Any]:
        """All metrics, JSON-ready, in nats per token: ce_clean, ce_spliced, delta_ce, ce_zero_ablated, ce_mean_ablated,
        kl; loss_recovered, loss_recovered_mean (None where the ablation changed nothing); n_ce_tokens, n_ce_documents.

        Raises:
            ValueError: no tokens.
        """
        delta = self.document_sums()
        n, *totals = self._table.sorted()[1].sum(0).tolist()
        clean, spliced, zero, mean, kl = (total / n for total in totals)
        return {
            "ce_clean": clean,
            "ce_spliced": spliced,
            "delta_ce": delta.value,
            "ce_zero_ablated": zero,
            "ce_mean_ablated": mean,
            "loss_recovered": _ratio(zero - spliced, zero - clean),
            "loss_recovered_mean": _ratio(mean - spliced, mean - clean),
            "kl": kl,
            "n_ce_tokens": int(n),
            "n_ce_documents": len(delta.documents),
        }


def paired_difference(a: ArmSums, b: ArmSums, *, samples: int = 2000, seed: int = 0) -> dict[str, list[float]]:
    """Difference of arm a from arm b with its bootstrap 95% interval, paired by document.

    Documents are drawn with replacement, as many as there are; one drawn w_d times counts w_d times in both arms:

        fvu_w = sum_d w_d sse_d / sum_d w_d sst_d,  sst_d about the mean over all tokens of all documents (held fixed)
        "fvu": (fvu_w(a) - fvu_w(b)) / fvu_w(b), relative
        "delta_ce": delta_ce_w(a) - delta_ce_w(b), nats per token

    The loss may be measured on fewer documents than the FVU: each metric is resampled over its own.

    Args:
        a, b: the two arms' sums, over the same tokens.
        samples: bootstrap samples.
        seed: of the draws; the result depends on it and on nothing else that is random.

    Returns:
        {"fvu": [difference, low, high], "delta_ce": [difference, low, high]}: the difference over all documents as they
        are, and the 2.5% and 97.5% quantiles of its bootstrap. Negative: a is better.

    Raises:
        ValueError: arms over different tokens; fewer than two documents; an FVU of exactly 0 in b.

    Reference:
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), sections 8.3 and 13.3 (percentile interval).
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}: 2000 settle a 95% interval")
    result = {}
    for name in ArmSums._fields:
        of_a, of_b = getattr(a, name), getattr(b, name)
        sums = _paired_sums(name, of_a, of_b)
        whole = sums.sum(0, keepdim=True)
        difference = _difference(name, torch.cat([whole, _resample(sums, samples, seed)]))
        if not difference.isfinite().all():
            raise ValueError(f"the {name} of the second arm is 0 in a bootstrap sample: nothing can be relative to it")
        low, high = torch.quantile(difference[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        result[name] = [float(difference[0]), low, high]
    return result


def verdict(
    difference: Mapping[str, list[float]], metrics_a: Mapping[str, Any], metrics_b: Mapping[str, Any]
) -> dict[str, str]:
    """Is arm a better than arm b? "win", "tie" or "loss" for fvu, delta_ce, alive and dense.

    fvu and delta_ce (lower is better): a tie where the 95% interval of `paired_difference` holds 0 (to RESOLUTION).
    alive (higher is better) and dense (lower is better): a tie within 0.1 percentage point; they carry no interval.
    """
    by_interval = {name: outcome_of_interval(difference[name]) for name in ArmSums._fields}
    return by_interval | {
        name: outcome_of_shares(name, metrics_a[name], metrics_b[name]) for name in ("alive", "dense")
    }


def outcome_of_interval(interval: Sequence[float]) -> str:
    """Of [mean, low, high] of a difference in what should be low."""
    _, low, high = interval
    return "win" if high < -RESOLUTION else "loss" if low > RESOLUTION else "tie"


def outcome_of_shares(name: str, a: float, b: float) -> str:
    """Of two arms' shares of latents that are "alive", which should be high, or "dense", which should be low."""
    gain = a - b if name == "alive" else b - a
    is_tie = abs(gain) <= TIE_SHARE + 1e-12  # the shares are rounded fractions of d_sae
    return "tie" if is_tie else "win" if gain > 0 else "loss"


def _finite(name: str, tensor: Tensor) -> float:
    """Smallest entry of a non-empty tensor; NotFinite if one is nan or inf (aminmax passes both on, in one pass)."""
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NotFinite(f"nan or inf in {name} (smallest {low}, largest {high}): check the weights and activations")
    return low


def _ratio(numerator: float, denominator: float) -> float | None:
    """numerator / denominator, None (null in JSON) where there is none."""
    return numerator / denominator if denominator else None


def _paired_sums(name: str, a: DocumentSums, b: DocumentSums) -> Tensor:
    """Numerators and denominators side by side (docs, 4): a's, a's, b's, b's."""
    rounding = 1e-9 * float(b.denominator.abs().sum())
    if not torch.equal(a.documents, b.documents) or (a.denominator - b.denominator).abs().max() > rounding:
        raise ValueError(
            f"the {name} of these arms is over different tokens ({len(a.documents)} and {len(b.documents)} documents; "
            f"denominators {float(a.denominator.sum()):g} and {float(b.denominator.sum()):g}): measure both on the same"
        )
    if len(a.documents) < 2:
        raise ValueError(
            f"the {name} is over {len(a.documents)} document: an interval needs two at least, give more evaluation text"
        )
    return torch.stack([a.numerator, a.denominator, b.numerator, b.denominator], dim=1)


def _resample(sums: Tensor, samples: int, seed: int) -> Tensor:
    """Column totals (samples, columns) of rows drawn with replacement, as many as there are."""
    rows = len(sums)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _DRAWS // rows)
    totals = []
    for start in range(0, samples, chunk):
        k = min(chunk, samples - start)
        draws = torch.randint(rows, (k, rows), generator=generator) + rows * torch.arange(k)[:, None]
        weights = torch.bincount(draws.view(-1), minlength=k * rows).view(k, rows)  # multinomial
        totals.append(weights.double() @ sums)
    return torch.cat(totals)


def _difference(name: str, totals: Tensor) -> Tensor:
    """Difference of the arms (k,) from the totals (k, 4) of _paired_sums: relative to b for the FVU."""
    value_a, value_b = totals[:, 0] / totals[:, 1], totals[:, 2] / totals[:, 3]
    return (value_a - value_b) / value_b if name == "fvu" else value_a - value_b
