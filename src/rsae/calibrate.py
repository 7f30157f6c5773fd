"""What stage 1 takes from data: scales, thresholds, and the coefficients of a dense gate refitted where pre-activations really are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from sae_lens import SAE

Activations = Iterable[Float[Tensor, "batch d_in"]]


@torch.no_grad()
def pre_acts(sae: SAE[Any], x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """Pre-activations W_enc^T (x - b_dec) + b_enc of any SAELens SAE, in its own conventions."""
    return sae.process_sae_in(x) @ sae.W_enc + sae.b_enc  # type: ignore[operator]


@torch.no_grad()
def mean_l0(sae: SAE[Any], activations: Activations) -> float:
    """Mean number of latents per token that are not exactly 0."""
    active = tokens = 0
    for x in activations:
        active += int((sae.encode(x) != 0).sum())
        tokens += len(x)
    _require(tokens)
    return active / tokens


@torch.no_grad()
def calibrate_threshold(teacher: SAE[Any], activations: Activations, l0: float | None = None) -> float:
    """The one threshold at which a TopK teacher has, on average, as many active latents as with its per-sample rule.

    Args:
        teacher: a TopKSAE (or any SAE with pre-activations, if `l0` is given).
        activations: batches of activations; a few tens of thousands of tokens.
        l0: the L0 to reach; default the teacher's k.
    """
    target = float(teacher.cfg.k if l0 is None else l0)
    largest, tokens = [], 0
    for x in activations:
        tokens += len(x)
        # The threshold lies far below the mean's (4 k)-th value in any sample that matters
        keep = min(math.ceil(4 * target) + 1, teacher.cfg.d_sae)
        largest.append(pre_acts(teacher, x).topk(keep, dim=1).values.flatten())
    _require(tokens)
    return _value_at_rank(torch.cat(largest), round(target * tokens))


@torch.no_grad()
def match_l0(sae: SAE[Any], activations: Activations, l0: float) -> SAE[Any]:
    """A copy of `sae` whose mean L0 on `activations` is `l0`, by the one number its family leaves open.

    Thresholds (JumpReLU, rational with hard support) are multiplied by a common factor; a ReLU's b_enc gets a common shift; a
    TopK is left as it is. Meant for the last per cent, after training has steered L0 close.
    """
    sae = copy.deepcopy(sae)
    architecture = sae.cfg.architecture()
    if architecture == "topk":
        return sae
    gate = getattr(sae, "gate", None)
    threshold = gate.threshold if gate is not None else getattr(sae, "threshold", None)
    if gate is not None and (gate.support != "hard" or gate.k is not None):
        raise ValueError("matching L0 needs a threshold for each latent: this gate is dense, or keeps the k largest")
    near, tokens = [], 0
    for x in activations:
        h = pre_acts(sae, x)
        tokens += len(x)
        distance = h / threshold.clamp(min=1e-12) if threshold is not None else h
        keep = min(math.ceil(4 * l0) + 1, sae.cfg.d_sae)
        near.append(distance.topk(keep, dim=1).values.flatten())
    _require(tokens)
    edge = _value_at_rank(torch.cat(near), round(l0 * tokens))
    if threshold is None:
        sae.b_enc.data.sub_(edge)  # type: ignore[union-attr, operator]
    else:
        threshold.data.mul_(edge)
    return sae


def _value_at_rank(values: Tensor, rank: int) -> float:
    """A number that exactly `rank` of the values are above (ties apart)."""
    rank = max(1, min(rank, len(values) - 1))
    top = values.topk(rank + 1).values if rank < 1 << 16 else values.sort(descending=True).values[: rank + 1]
    return float((top[rank - 1].double() + top[rank].double()) / 2)


def _require(tokens: int) -> None:
    if tokens == 0:
        raise ValueError("calibration needs activations; the iterable was empty (was it a generator that is used up?)")
