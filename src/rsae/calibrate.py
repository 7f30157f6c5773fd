"""What stage 1 takes from data: scales, thresholds, and a dense gate's coefficients, refitted where pre-activations really are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.polynomial.polynomial import polyval
from scipy.optimize import brentq, least_squares
from torch import Tensor

from rsae.mesh import ALONE, Mesh
from rsae.metrics import NotFinite
from rsae.rational import RationalGate, sample_scale
from rsae.sae import THETA, RationalSAE, as_jumprelu, copied, without_rescaling

if TYPE_CHECKING:
    from sae_lens import SAE

    from rsae.finetune import Store

Activations = Iterable[Float[Tensor, "batch d_in"]]
"""Batches. Where a rank among all their values is looked for they may be read twice: a list, or `HeldOut`."""
NONE_ACTIVE = "no latent is active on these activations: are they of the model and hook that the SAE is of?"


class HeldOut:
    """The activations of a store in its own order, as often as they are asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        return (x for x, _ in self.store.iterate(2048))


@torch.no_grad()
def pre_acts(sae: SAE[Any], x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """Pre-activations W_enc^T (x - b_dec) + b_enc of any SAELens SAE, in its own conventions; of a gated one, its gating path's."""
    bias = sae.get_parameter("b_gate" if sae.cfg.architecture() == "gated" else "b_enc")
    return sae.process_sae_in(x.to(sae.W_enc.device)) @ sae.W_enc + bias


@torch.no_grad()
def mean_l0(sae: SAE[Any], activations: Activations, mesh: Mesh = ALONE) -> float:
    """Mean number of latents per token that are not exactly 0. With a mesh `sae` is this rank's shard, here as elsewhere."""
    active = tokens = 0
    for x in activations:
        active += int(mesh.latents.sum(is_active(sae, x, mesh).sum()))
        tokens += len(x)
    _require(tokens)
    return active / tokens


def is_active(sae: SAE[Any], x: Float[Tensor, "batch d_in"], mesh: Mesh) -> Bool[Tensor, "batch d_shard"]:
    """Which latents are not 0. Where a sample's largest decide, those of all shards do."""
    if mesh.latents.size > 1 and sae.cfg.architecture() == "topk":
        h = pre_acts(sae, x)
        return mesh.is_among_largest(h, sae.cfg.k) & (h > 0)
    if mesh.latents.size > 1 and isinstance(sae, RationalSAE) and sae.gate.support == "hard":
        h = pre_acts(sae, x)
        return h > sae.gate.sample_threshold(h, mesh.largest)
    return sae.encode(x.to(sae.W_enc.device)) != 0


@torch.no_grad()
def calibrate_threshold(
    teacher: SAE[Any], activations: Activations, l0: float | None = None, mesh: Mesh = ALONE
) -> float:
    """The one threshold at which a TopK teacher has, on average, as many active latents as with its per-sample rule.

    Args:
        teacher: a TopKSAE (or any SAE with pre-activations, if `l0` is given).
        activations: batches of activations; a few tens of thousands of tokens.
        l0: the L0 to reach; default the teacher's k.
    """
    teacher = _as_it_selects(teacher)
    return _edge(activations, lambda x: pre_acts(teacher, x), float(teacher.cfg.k if l0 is None else l0), mesh)


def _as_it_selects(sae: SAE[Any]) -> SAE[Any]:
    """An SAE whose pre-activations are what its k largest are chosen by; SAELens can choose by h times the decoder's norm."""
    return without_rescaling(sae) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else sae


@torch.no_grad()
def counting_threshold(sae: SAE[Any], activations: Activations, l0: float) -> float:
    """The eps at which, on average, `l0` latents of a token have |z| > eps: what sparsity means for a dense gate."""
    return _edge(activations, lambda x: sae.encode(x.to(sae.W_enc.device)).abs(), l0)


@torch.no_grad()
def match_l0(sae: SAE[Any], activations: Activations, l0: float, mesh: Mesh = ALONE) -> SAE[Any]:
    """A copy of `sae` whose mean L0 on `activations` is `l0`, by the one number its family leaves open.

    Thresholds (JumpReLU, rational with hard support) are multiplied by a common factor; a ReLU's b_enc and a gated SAE's b_gate get
    a shift that is common to all h_j ||w_j||, w_j the row of W_dec; a TopK is left as it is. Meant for the last per cent, after
    training has steered L0 close. Where there are fewer positive pre-activations than that, L0 stays below.

    Raises:
        ValueError: a dense gate; so many thresholds are 0, which no factor moves, that `l0` is out of reach; what `_edge` says.
    """
    sae = copied(sae)
    architecture = sae.cfg.architecture()
    if architecture == "topk":
        return sae
    gate = getattr(sae, "gate", None)
    if gate is not None and gate.support != "hard":
        raise ValueError("matching L0 needs thresholds: this gate is dense")
    alpha = gate.alpha if gate is not None else 0.0
    if alpha == 1:
        return sae  # every sample has its k largest, whatever the thresholds' common factor
    threshold = gate.threshold if gate is not None else getattr(sae, "threshold", None)
    norms = torch.linalg.vector_norm(sae.W_dec.detach(), dim=1, dtype=torch.float32)
    norms = torch.where(norms > 0, norms, 1.0)

    def relative(x: Tensor) -> Tensor:
        h = pre_acts(sae, x)
        if threshold is not None:
            return h / (gate.sample_threshold(h, mesh.largest) if gate is not None else threshold).clamp(min=1e-12)
        sizes = h * norms
        if architecture == "gated":
            # An open gate lets nothing through where the magnitude is not positive: such come last
            magnitude = (h - sae.b_gate) * sae.r_mag.exp() + sae.b_mag  # type: ignore[operator]
            sizes = torch.where(magnitude > 0, sizes, mesh.whole(sizes.amin()[None]).amin())
        return sizes

    edge = _edge(activations, relative, l0, mesh)
    if threshold is not None and (not bool((mesh.whole(threshold) > 0).any()) or edge > 1e6):
        raise ValueError(
            f"no common factor of the thresholds gives an L0 of {l0:g}: too many of them are 0. Fine-tuning (rsae.finetune) gives "
            "each latent a threshold first"
        )
    if threshold is None:
        sae.get_parameter("b_gate" if architecture == "gated" else "b_enc").data.sub_(edge / norms)
    else:
        # theta -> c theta moves theta s^alpha by c^(1 - alpha). Where there are fewer positive pre-activations than latents to be
        # active, the edge is not positive, and the thresholds go to where next to all of the positive ones are above them
        threshold.data.mul_(max(max(edge, 0.0) ** (1 / (1 - alpha)), 1e-6))
    return sae


@torch.no_grad()
def calibrate(sae: RationalSAE, activations: Activations) -> RationalSAE:
    """Fit a fresh RationalSAE's gate to where its teacher's pre-activations really are. Returns a copy.

    Hard support: a scalar C_in = C_out is put at the 99.9% quantile of the active pre-activations, so that they use the design
    interval; the gate is the identity there, and its values do not change.

    Dense support: (a, b, C_in, C_out) by least squares. With t = h/C_in, the histogram w(t) of the pre-activations, weighted by
    (C_out,j ||w_j||)^2 since that is what an error costs in x_hat, gives

        min over alpha, c_in, c_out of  sum_t w(t) (c_out r_alpha(t/c_in) - gate(t))^2

    by Levenberg-Marquardt from the min-max fit; gate is the teacher's, ReLU or the jump at the design threshold. What a smooth gate
    lets through just below the edge reconstructs more than it takes away just above, so last the gate is multiplied by the
    factor (a jump's is stretched, c phi(h/c)) at which the squared error of x_hat on these activations is the teacher's.

    Args:
        sae: from `RationalSAE.from_teacher`.
        activations: batches of activations; some thousands of tokens are enough.
    """
    sae = copied(sae)
    gate = sae.gate
    if gate.support == "hard":
        if gate.C_in.ndim == 0:
            found = [h[gate(h) != 0][:1_000_000] for h in (pre_acts(sae, x) for x in activations)]
            _require(len(found))
            active = torch.cat(found)
            if len(active) == 0:
                raise ValueError(NONE_ACTIVE)
            top = active.sort().values[min(len(active) - 1, int(0.999 * len(active)))]
            gate.C_in.fill_(top)
            gate.C_out.fill_(top)
            sae.sync_config()
        return sae
    activations = list(activations)
    is_jump = _is_jump(sae)
    if not is_jump:
        _require(len(activations))
        largest = max(float(pre_acts(sae, x).max()) for x in activations)
        if largest <= 0:
            raise ValueError(NONE_ACTIVE)
        gate.C_in.fill_(largest)
        gate.C_out.fill_(largest)
    centres, weights = _histogram(sae, activations)
    target = np.where(centres > THETA, centres, 0.0) if is_jump else centres.clip(0)
    teacher_error = _squared_error(sae, activations, _teacher_latents)
    num, den, c_in, c_out = _least_squares(gate, centres, weights, target)
    gate.num_fit.copy_(torch.from_numpy(num))
    gate.den_fit.copy_(torch.from_numpy(den))
    gate.C_in.mul_(c_in)
    gate.C_out.mul_(c_out)
    _equalise(sae, activations, teacher_error, stretch=is_jump)
    sae.sync_config()
    return sae


def _is_jump(sae: RationalSAE) -> bool:
    """Whether the gate that was replaced has a jump: all but a ReLU."""
    return sae.cfg.metadata.rsae_teacher_architecture != "standard"


def _teacher_latents(sae: RationalSAE, h: Tensor) -> Tensor:
    """What a fresh dense gate approximates: h above its edge, which is 0 or the design threshold of its scales; else 0."""
    if not _is_jump(sae):
        return h.relu()
    tau = sample_scale(h, sae.gate.k) if sae.gate.k is not None else torch.ones((), device=h.device)
    return torch.where(h > THETA * sae.gate.C_in * tau, h, 0.0)


def _squared_error(
    sae: RationalSAE, activations: Activations, latents: Callable[[RationalSAE, Tensor], Tensor]
) -> float:
    """Sum of ||x - x_hat||^2 with latents(sae, h) as what is decoded."""
    batches = (x.to(sae.W_enc.device) for x in activations)
    return sum(float((sae.decode(latents(sae, pre_acts(sae, x))) - x).double().square().sum()) for x in batches)


def _equalise(sae: RationalSAE, activations: Activations, error: float, *, stretch: bool, most: float = 1.02) -> None:
    """Multiply C_out (to stretch: C_in too) by the factor, from 1/most to most, at which x_hat has that squared error."""
    gate = sae.gate
    C_in, C_out = gate.C_in.clone(), gate.C_out.clone()

    def excess(log_factor: float) -> float:
        gate.C_out.copy_(C_out * math.exp(log_factor))
        if stretch:
            gate.C_in.copy_(C_in * math.exp(log_factor))
        return _squared_error(sae, activations, lambda sae, h: sae.gate(h)) / error - 1

    low, high = -math.log(most), math.log(most)
    if excess(low) * excess(high) < 0:
        excess(float(brentq(excess, low, high, xtol=1e-5)))  # type: ignore[arg-type]
    else:  # no factor does it: the least-squares fit stays
        excess(0.0)


def _histogram(sae: RationalSAE, activations: Activations) -> tuple[np.ndarray, np.ndarray]:
    """Mean t and summed weight of the bins that are not empty; bins are narrow at the threshold, where the gate jumps."""
    gate = sae.gate
    near = np.geomspace(1e-6, 0.1, 400)
    edges = torch.from_numpy(
        np.unique(np.concatenate([np.linspace(-1.5, 2.0, 1401), THETA - near, [THETA], THETA + near])).astype(
            np.float32
        )
    )
    sums = torch.zeros(2, len(edges) + 1, dtype=torch.float64, device=sae.W_enc.device)
    norms = sae.W_dec.norm(dim=1)
    for x in activations:
        h = pre_acts(sae, x)
        tau = sample_scale(h, gate.k) if gate.k is not None else torch.ones((), device=h.device)
        t = h / (gate.C_in * tau)
        weight = ((gate.C_out * tau * norms) ** 2).expand_as(t).double().flatten()
        index = torch.bucketize(t.flatten(), edges.to(t.device))
        sums[0].index_add_(0, index, weight)
        sums[1].index_add_(0, index, weight * t.flatten())
    filled = sums[0] > 0
    _require(int(filled.sum()))
    return (sums[1] / sums[0])[filled].cpu().numpy(), (sums[0] / sums[0].sum())[filled].cpu().numpy()


def _least_squares(
    gate: RationalGate, t: np.ndarray, weights: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Coefficients and factors of C_in and C_out that fit `target` at `t`, from the gate's own as a start."""
    num, den = (c.detach().double().cpu().numpy() for c in (gate.num_coeffs, gate.den_coeffs))
    p = len(num)
    root = np.sqrt(weights)

    def unpack(v: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
        c_in, c_out = np.exp(v[-2:].clip(-5, 5))  # a step that goes astray must not divide by 0
        return num * (1 + v[:p]), den * (1 + v[p:-2]), float(c_in), float(c_out)

    def residual(v: np.ndarray) -> np.ndarray:
        a, b, c_in, c_out = unpack(v)
        scaled = t / c_in
        u = (scaled.clip(-1, 1) - gate.centre) / gate.scale
        r = polyval(u, a) / (1 + np.abs(polyval(u, np.concatenate([[0.0], b]))))
        return root * (c_out * (r + (scaled - 1).clip(0)) - target)

    start = np.zeros(p + len(den) + 2)
    solution = least_squares(residual, start, method="trf", x_scale="jac", max_nfev=200)
    best = solution.x if solution.cost <= 0.5 * np.square(residual(start)).sum() else start
    return unpack(best)


@torch.no_grad()
def gate_curves(arms: Mapping[str, SAE[Any]], x: Float[Tensor, "n d_in"], points: int = 401) -> dict[str, Any]:
    """The gate of each arm on a grid, over the histogram of the teacher's pre-activations: what gate.json holds.

    The unit of both axes is the teacher's threshold (the median over latents; for TopK, and an RSAE whose thresholds follow the
    sample as fully, the calibrated one; for a ReLU, which has none, the median active pre-activation). Gates with scales for each
    latent are drawn at their median latent.
    """
    teacher = arms["teacher"]
    if teacher.cfg.architecture() == "gated":
        teacher = as_jumprelu(teacher)
    teacher = _as_it_selects(teacher)
    h = pre_acts(teacher, x)
    family = teacher.cfg.architecture()
    own = teacher.gate if isinstance(teacher, RationalSAE) else None
    thresholds = teacher.state_dict().get("threshold" if own is None else "gate.threshold", h.new_zeros(1))
    if family == "topk" or (own is not None and own.support == "hard" and own.alpha == 1):
        unit = calibrate_threshold(teacher, [x], mean_l0(teacher, [x]))
        label = "pre-activation / k-th largest of a typical sample"
    elif bool((thresholds > 0).any()):
        unit, label = float(thresholds[thresholds > 0].median()), "pre-activation / median threshold of the teacher"
    else:
        unit, label = float(h[h > 0].median()), "pre-activation / median active one of the teacher"
    grid = torch.linspace(-2, 8, points)
    curves = {}
    for name, sae in arms.items():
        if name == "control":
            continue
        gate = getattr(sae, "gate", None)
        if gate is None:
            edge = 1.0 if family == "topk" or bool((thresholds > 0).any()) else 0.0
            curves[name] = torch.where(grid > edge, grid, 0.0)
            continue
        threshold = 0.0 if gate.threshold is None else gate.threshold.median()
        edge = unit if gate.alpha == 1 else threshold  # with alpha = 1 the sample's own k-th largest decides
        at = (grid * unit).to(gate.C_in.device)
        tau = unit if gate.support == "dense" and gate.k is not None else 1.0  # what a sample multiplies its scales by
        values = gate.amplitude(at, tau * gate.C_in.median(), tau * gate.C_out.median()) / unit
        curves[name] = torch.where(at > edge, values, 0.0) if gate.support == "hard" else values
    counts, edges = np.histogram((h / unit).clamp(-2, 8).cpu().numpy(), bins=200, range=(-2.0, 8.0))
    upgraded = arms.get("rsae")
    formula: dict[str, Any] = {}
    if isinstance(upgraded, RationalSAE):
        upgraded.sync_config()
        names = ("num_coeffs", "den_coeffs", "centre", "scale", "support", "k", "alpha")
        formula = {"degree": list(upgraded.gate.degree)} | {name: getattr(upgraded.cfg, name) for name in names}
    return {
        "x_label": label,
        "x": grid.tolist(),
        "arms": {name: curve.tolist() for name, curve in curves.items()},
        "pre_acts": {"edges": edges.tolist(), "counts": counts.tolist()},
        "formula": formula,
    }


def _edge(
    activations: Activations,
    values: Callable[[Float[Tensor, "batch d_in"]], Float[Tensor, "batch d_shard"]],
    l0: float,
    mesh: Mesh = ALONE,
) -> float:
    """The number that, on average over all rows, `l0` of the values of a row are above.

    Raises:
        NotFinite: nan among the values.
        ValueError: no rows; in one batch four times as many are above it as on average, and the batches cannot be read twice.
    """
    room = 4
    while True:
        largest, rows, seen_to = [], 0, -math.inf
        for x in activations:
            batch = values(x)
            rows += len(batch)
            total = batch.numel() * mesh.latents.size
            # Of the batch, since some rows have many times l0; and a batch may be what was left of a store, a row or two
            n = min(math.ceil(l0 * (room * len(batch) + 256)) + 1, total)
            largest.append(mesh.largest(batch.reshape(1, -1), n)[0].topk(n, sorted=False).values)
            if n < total:
                seen_to = max(seen_to, float(largest[-1].min()))
        if rows == 0 and room > 4:
            raise ValueError(
                f"a batch has more than four times the mean L0 of {l0:g}: give activations that can be read twice (a list), or "
                "larger batches"
            )
        _require(rows)
        edge = _value_at_rank(torch.cat(largest), round(l0 * rows))
        if math.isnan(edge):
            raise NotFinite(
                f"nan among the pre-activations, so nothing gives an L0 of {l0:g}: training has diverged (lower the learning "
                "rates), or the checkpoint is damaged"
            )
        if edge >= seen_to:
            return edge
        room *= 8  # a stretch of code or of tables among prose


def _value_at_rank(values: Tensor, rank: int) -> float:
    """A number that exactly `rank` of the values are above (ties apart)."""
    rank = max(1, min(rank, len(values) - 1))
    top = values.topk(rank + 1).values if rank < 1 << 16 else values.sort(descending=True).values[: rank + 1]
    return float((top[rank - 1].double() + top[rank].double()) / 2)


def _require(tokens: int) -> None:
    if tokens == 0:
        raise ValueError("calibration needs activations; the iterable was empty (was it a generator that is used up?)")
