"""Teachers to upgrade where there is none: SAEs of each family, trained from scratch by the loop that fine-tunes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.nn.functional as F

from rsae.artefacts import Progress
from rsae.calibrate import calibrate_threshold
from rsae.finetune import FinetuneConfig, Store, finetune
from rsae.teachers.checkpoint import Family, build

if TYPE_CHECKING:
    from sae_lens import SAE


def pretrain(
    family: Family,
    data: Store,
    config: FinetuneConfig,
    *,
    d_sae: int,
    held_out: Store,
    metadata: dict[str, Any] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> SAE[Any]:
    """Train an SAE of `family` from scratch to the L0 of `config.target_l0`, as one of SAELens' own classes.

    Starts from random unit decoder rows, the encoder their transpose, b_dec the mean activation.

    Args:
        family: "relu" (StandardSAE, l1 price), "jumprelu" (JumpReLUSAE, rectangle surrogate), "topk" (TopKSAE) or "gated"
            (GatedSAE, l1 price on its gate).
        config: of the loop; `target_l0` is needed, and is TopK's k.
        d_sae: number of latents.
        metadata: model_name, hook_name and the like, for cfg.json.

    Raises:
        ValueError: unknown family, no target_l0, or whatever `rsae.finetune.finetune` refuses.
    """
    if config.target_l0 is None:
        raise ValueError("pretraining needs target_l0: how many latents a token should have")
    sae = initial_sae(family, data, d_sae=d_sae, l0=config.target_l0, seed=config.seed, metadata=metadata)
    return finetune(
        sae, data, config, held_out=held_out, out=out, origin=f"untrained {family}, d_sae {d_sae}", progress=progress,
        name=f"{family} teacher",
    )  # fmt: skip


def initial_sae(
    family: Family, data: Store, *, d_sae: int, l0: float, seed: int, metadata: dict[str, Any] | None = None
) -> SAE[Any]:
    """An untrained SAE: random unit decoder rows, the encoder their transpose, b_dec the mean activation."""
    if family not in get_args(Family):
        raise ValueError(f"family is one of {', '.join(get_args(Family))}; got {family!r}")
    if not 0 < l0 <= d_sae:
        raise ValueError(f"the L0 asked for, {l0:g}, must be positive and at most d_sae, {d_sae}")
    directions = F.normalize(torch.randn(d_sae, data.d_in, generator=torch.Generator().manual_seed(seed)), dim=1)
    weights = {"W_enc": directions.T.contiguous(), "W_dec": directions, "b_dec": data.mean}
    needed = {"jumprelu": ["threshold"], "gated": ["r_mag", "b_mag", "b_gate"]}
    weights |= {name: torch.zeros(d_sae) for name in needed.get(family, [])}
    k = round(l0) if family == "topk" else None
    sae = build(family, weights, k=k, apply_b_dec_to_input=True, metadata=metadata)
    with torch.no_grad():
        first = [next(iter(data.batches(2048, seed=seed)))]
        if family == "jumprelu":
            sae.get_parameter("threshold").fill_(calibrate_threshold(sae, first, l0))
        elif family in ("relu", "gated"):
            # From half of its latents active, the l1 price would have to overshoot, and kill, to bring it down in time
            bias = sae.get_parameter("b_enc" if family == "relu" else "b_gate")
            bias.fill_(-calibrate_threshold(sae, first, min(2 * l0, 0.5 * d_sae)))
    return sae
