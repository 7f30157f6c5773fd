"""The one training loop: every arm (teacher's own gate or rational) runs through it on the same batches.

An SAE is trained in units in which the centred activations have norm sqrt(d_in), whatever the scale of the host: every gate here is
exactly rescaled with its biases, thresholds and scales (phi_c(h) = c phi(h/c)), so the checkpoint is in the host's units again.
Rows of W_dec keep the norms they came with, or the l1 price and the thresholds would be paid in a sliding currency; but they are
divided by a common power of two, and all before them multiplied, so that they are about unit: Adam's steps have one size for all.
While it trains, an SAE that does not subtract b_dec from its input, or one far from the activations' mean, has that mean
subtracted, and its bias moved: a coordinate of the residual stream may be 100 away from 0, and Adam's steps in its weights would
do 100 times too much to a pre-activation.
An SAE that normalises each input (layer_norm, constant_norm_rescale) trains on the normalised ones, and every sample's error counts
by the scale that it is given back, so that the loss is in the host's units all the same.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rsae import sparse
from rsae.artefacts import Progress, atomic, config_hash, flush, provenance, read_json, write_json
from rsae.calibrate import HeldOut, calibrate_threshold, is_active, match_l0, mean_l0, pre_acts
from rsae.cpu import keep_pages, prefers_bfloat16
from rsae.mesh import ALONE, JOINING, Mesh, is_per_latent, save_joined, shard_of, with_weights
from rsae.metrics import NotFinite
from rsae.rational import RationalGate, Surrogate, hard_edge, sample_scale
from rsae.sae import RationalSAE, copied, without_rescaling
from rsae.teachers import load_teacher

if TYPE_CHECKING:
    from sae_lens import SAE

Objective = Literal["matched-l0", "l0", "l1"]
Part = Literal["weights", "thresholds", "scales", "shape"]

LOG_EVERY = 10
# No gradient from its edge tells a JumpReLU's encoder that latents come on as it grows: its thresholds have to keep up. Within 1%
# of the FVU of their best rate on each of three teachers, at the default lr (dev/LOG.md)
GATE_LR, JUMPRELU_LR = 1e-3, 1e-2
# The edge of an RSAE from a JumpReLU; from a TopK it gains a little, from a ReLU it does not (dev/LOG.md)
JUMPRELU_EDGE = Surrogate(strength=0.4, crowding=32.0, sparing=0.1)
NORMALISED = ("layer_norm", "constant_norm_rescale")
# A latent that was not active for so many tokens has its threshold lowered, by 2% a step, until it is; a TopK's, which has none,
# learns from what the active ones leave, by an auxiliary loss of this weight.
SILENT_TOKENS = 100_000
AUXILIARY = 1 / 32
# How often a latent is active is a mean over about so many of the last tokens.
RATE_TOKENS = 100_000
# No log-threshold, in training units, goes below: a latent that nothing wakes, or an L0 out of reach, would take it where exp is 0.
LOWEST = math.log(1e-6)
# A b_dec with a coordinate so far from the activations' mean, in training units, is no centre for them.
FAR = 10
# An L0 that was matched, and is further than this from the target, relatively, is warned of.
L0_TOLERANCE = 0.01
# The threshold that a ReLU teacher's latents start with keeps this share of them.
RELU_START = 0.8


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How an arm is fine-tuned."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 2048
    """Tokens in a step."""
    lr: float = 1e-3
    """Adam's learning rate of weights and biases."""
    gate_lr: float | None = None
    """Learning rate of log-thresholds, log C_in, log C_out, and of the rational's coefficients relative to their fit. None:
    JUMPRELU_LR for a JumpReLU's own thresholds, GATE_LR for every other gate."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly."""
    decay: float = 0.4
    """Share of the steps, at the end, in which it falls linearly to 0."""
    objective: Objective = "matched-l0"
    """"matched-l0": mean L0 is held at `target_l0`. "l0" and "l1": `penalty` times the L0 or the l1 norm is added to the loss."""
    target_l0: float | None = None
    """For matched-l0; None: the L0 that the SAE has when it comes."""
    penalty: float | None = None
    """Price of a unit of L0 or of l1, in units of the squared error per token (whose total is about d_in). Of L0 each latent of an
    RSAE pays what its `surrogate` weighs it by; the loss in the log is without it."""
    alpha: float = 0.25
    """How far the thresholds of a rational gate with hard support follow the sample: theta_j s(x)^alpha (see RationalGate)."""
    surrogate: Surrogate | None = None
    """The gradient at the edge of hard support. A JumpReLU always uses the rectangle, the standard of the field. None:
    JUMPRELU_EDGE for an RSAE from a JumpReLU, Surrogate() for every other gate."""
    frozen: tuple[Part, ...] = ()
    """Parts that do not train: "weights" (of encoder and decoder, with their biases), "thresholds", "scales" (C_in, C_out), "shape"
    (the rational's coefficients). With frozen thresholds L0 is not matched: it stays what the weights make of it."""
    seed: int = 0
    """Orders the batches."""
    checkpoint_every: int = 200
    """Steps between checkpoints that a killed run continues from."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("lr", "gate_lr", "penalty", "seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, and finite; got {value}")
        if self.target_l0 is not None and not 0 < self.target_l0 < math.inf:
            raise ValueError(f"target_l0 must be positive; got {self.target_l0}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is from 0 (thresholds are fixed) to 1 (they follow the sample); got {self.alpha}")
        if self.objective not in ("matched-l0", "l0", "l1"):
            raise ValueError(f"objective is 'matched-l0', 'l0' or 'l1'; got {self.objective!r}")
        if self.objective != "matched-l0" and self.penalty is None:
            raise ValueError(f"objective {self.objective!r} needs a penalty; or use 'matched-l0'")


class Store(Protocol):
    """What the loop reads: an ActivationStore, or anything like it."""

    d_in: int
    mean: Float[Tensor, " d_in"]
    fingerprint: str

    def batches(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Float[Tensor, "batch/world d_in"]]:
        """Endless shuffled batches, the same for the same seed; `start` skips that many. Of each, the rank-th of `world` parts."""
        ...

    def iterate(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "n d_in"], Any]]:
        """Once through, in order: (activations, document ids)."""
        ...


class Step(NamedTuple):
    """What one batch gave. All scalars."""

    loss: Tensor
    squared_error: Tensor
    """Summed over d_in, averaged over the batch, in training units."""
    l0: Tensor
    """Mean number of latents that are not 0."""


class Form(NamedTuple):
    """The same function, written otherwise for as long as it trains."""

    fold: float = 1.0
    """What rows of W_dec are divided by, and the encoder with its biases, thresholds and scales multiplied: a power of two."""
    centre: Float[Tensor, " d_in"] | None = None
    """What is subtracted from the input, and made up for in the bias, instead of what the SAE subtracts; in the host's units."""

    @classmethod
    def of(
        cls, sae: SAE[Any], folds: bool, sample: list[Tensor], mean: Float[Tensor, " d_in"], unit: float, mesh: Mesh
    ) -> Form:
        """The form that Adam can train: inputs about 0, and if it `folds` rows of about norm 1, in the middle of what is active.

        The rows of dead latents, which may be most of all, say nothing about the others.
        """
        fold = 1.0
        if folds:
            norms = mesh.whole(_row_norms(sae))
            active = sum(is_active(sae, x, mesh).sum(0) for x in sample)
            counts = torch.where((norms > 0) & norms.isfinite(), mesh.whole(torch.as_tensor(active)), 0)
            if bool((counts > 0).any()):
                norms, order = norms.sort()
                among = counts[order].cumsum(0)
                fold = 2.0 ** round(math.log2(norms[torch.searchsorted(among, among[-1:] / 2)].item()))
        is_far = not _reads_about_0(sae)
        if not is_far and sae.cfg.normalize_activations not in NORMALISED:
            is_far = float((sae.b_dec.detach().float().cpu() - mean.cpu()).abs().max()) > FAR * unit
        return cls(fold, mean if is_far else None)


AS_IT_IS = Form()


def _row_norms(sae: SAE[Any]) -> Float[Tensor, " d_sae"]:
    return torch.linalg.vector_norm(sae.W_dec.detach(), dim=1, dtype=torch.float32)


def _rows_differ_from_1(sae: SAE[Any]) -> bool:
    """Whether any row of W_dec has a norm that is nearer to another power of two. Those that are made unit first have none."""
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return False
    return bool((_row_norms(sae).log2().abs() > 0.5).any())


def _reads_about_0(sae: SAE[Any]) -> bool:
    """Whether the encoder reads what something was subtracted from."""
    return sae.cfg.apply_b_dec_to_input or sae.cfg.normalize_activations in NORMALISED


class Trainee(nn.Module, ABC):
    """The parameters of an SAE in training units, and one step's loss. A subclass for each kind of gate.

    On a mesh it has the latents of its own shard, `sae` being that part of the whole one, and sees its share of every batch.
    """

    centre: Float[Tensor, " d_in"]
    norms: Float[Tensor, "d_sae 1"]

    loop = 3
    """Raised whenever the same settings come to another result, so that an older run is not taken for one of this loop."""
    encoder_bias = "b_enc"
    """The bias of the pre-activations that decide which latents are active, by its name in the checkpoint."""
    row_scale: Float[Tensor, "batch 1"] | None = None
    """Of the batch at work, where inputs are normalised: what its reconstruction is multiplied by."""

    def __init__(
        self, sae: SAE[Any], unit: float, config: FinetuneConfig, mesh: Mesh = ALONE, form: Form = AS_IT_IS
    ) -> None:
        super().__init__()
        self.mesh = mesh
        self.normalize = sae.cfg.normalize_activations
        self.error_unit = unit
        unit = 1.0 if self.normalize in NORMALISED else unit
        self.config, self.unit, self.fold = config, unit, form.fold
        self.h_unit = unit / form.fold  # of pre-activations, thresholds and latents
        self.subtracts, self.is_centred = bool(sae.cfg.apply_b_dec_to_input), form.centre is not None
        weights = {name: tensor.detach().float() for name, tensor in sae.state_dict().items()}
        # (d_sae, d_in): a latent's weights lie together
        self.W_enc = nn.Parameter(weights["W_enc"].T.contiguous() * self.fold)
        self.b_enc = nn.Parameter(weights[self.encoder_bias] / self.h_unit)
        self.W_dec = nn.Parameter(weights["W_dec"] / self.fold)
        self.b_dec = nn.Parameter(weights["b_dec"] / unit)
        # What the encoder's input is centred on stays as it came, and b_dec learns as the decoder's alone: `export` puts what lies
        # between into the encoder's bias. Tied, the estimated gradient of an edge would shift every token's reconstruction
        centre = self.b_dec.detach().clone() if self.subtracts else torch.zeros_like(self.b_dec)
        self.register_buffer("centre", centre if form.centre is None else form.centre.to(centre) / unit)
        if self.is_centred:
            self.b_enc.data -= self.shift()
        norms = self.W_dec.detach().norm(dim=1, keepdim=True).clamp(min=1e-8)
        self.register_buffer("norms", norms, persistent=False)

    def gate_parts(self) -> dict[Part, list[nn.Parameter]]:
        """The parameters that are trained at `gate_lr`, by part."""
        return {}

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Everything that can train, by part."""
        gate = self.gate_parts()
        in_gate = {id(parameter) for part in gate.values() for parameter in part}
        weights = [p for p in self.parameters() if p.requires_grad and id(p) not in in_gate]
        return {"weights": weights, **gate}

    def for_ranks(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All that trains, whose gradients are averaged over the batch, and what of it all shards of the latents have alike."""
        trained = [p for part in self.parts().values() for p in part if p.requires_grad]
        gate = {id(p) for part in self.gate_parts().values() for p in part}
        alike = [p for name, p in self.named_parameters() if id(p) in gate and not is_per_latent(name, p)]
        return trained, alike

    def inputs(self, raw: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """A batch of activations in training units; sets `row_scale`. The same functions as SAELens applies at run time."""
        if self.normalize not in NORMALISED:
            return raw / self.unit
        if self.normalize == "layer_norm":
            raw = raw - raw.mean(dim=1, keepdim=True)
            scale = raw.std(dim=1, keepdim=True) + 1e-5
        else:
            scale = raw.norm(dim=1, keepdim=True) / raw.shape[1] ** 0.5
        self.row_scale = scale / self.error_unit
        return raw / scale

    def squared_error(self, x_hat: Float[Tensor, "batch d_in"], x: Float[Tensor, "batch d_in"]) -> Tensor:
        """Summed over d_in and averaged over the batch, in training units of the activations themselves."""
        if self.row_scale is not None:
            x_hat, x = x_hat * self.row_scale, x * self.row_scale
        return F.mse_loss(x_hat, x, reduction="sum") / len(x)

    def l0(self, z: Tensor, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
        """Mean number of latents of a sample that are not 0."""
        return self.mesh.latents.sum((z != 0).sum() / len(x))

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Loss of a batch, as `inputs` gives it."""

    @torch.no_grad()
    def constrain(self) -> None:
        """After an optimizer step: decoder rows back to their norms."""
        if self.W_dec.requires_grad:
            self.W_dec.mul_(self.norms / self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-8))

    def begin(self, x: Float[Tensor, "batch d_in"]) -> None:
        """See the first batch before the first step."""

    def steer(self, l0: Float[Tensor, ""], target: float) -> None:
        """Move whatever sets the sparsity towards `target`, given the L0 of the last batch."""

    def state_of_gate(self) -> dict[str, float]:
        """What the log tells of the gate."""
        return {}

    @abstractmethod
    def write_gate(self, sae: SAE[Any]) -> None:
        """Write thresholds and scales, in the host's units, into `sae`."""

    @torch.no_grad()
    def shift(self) -> Float[Tensor, " d_sae"]:
        """What the encoder's biases take up when the input is centred as the SAE does it: on b_dec as it is now, or not at all."""
        if not self.is_centred:
            return self.W_enc @ (self.b_dec - self.centre) if self.subtracts else torch.zeros_like(self.b_enc)
        by = (self.b_dec if self.subtracts else torch.zeros_like(self.b_dec)) - self.centre
        # In float64: it may be thousands of times what lies about the centre
        return torch.cat([(rows.double() @ by.double()).float() for rows in self.W_enc.split(4096)])

    @torch.no_grad()
    def export(self, sae: SAE[Any]) -> SAE[Any]:
        """A copy of `sae` with what was trained, in the host's units."""
        sae = copied(sae)
        sae.W_enc.copy_(self.W_enc.T / self.fold)
        sae.get_parameter(self.encoder_bias).copy_((self.b_enc + self.shift()) * self.h_unit)
        sae.W_dec.copy_(self.W_dec * self.fold)
        sae.b_dec.copy_(self.b_dec * self.unit)
        self.write_gate(sae)
        return sae


class SparseTrainee(Trainee):
    """A gate with exact zeros: only entries that are active, or near their edge, are worked on."""

    @abstractmethod
    def choose(self, h: Float[Tensor, "batch d_sae"]) -> sparse.Entries:
        """Entries that are active or near their edge."""

    @abstractmethod
    def latents(self, h: Float[Tensor, " n"], entries: sparse.Entries) -> Float[Tensor, " n"]:
        """Latents at the entries."""

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Step:
        inputs = x - self.centre
        dense = sparse.pre_activations(inputs, self.W_enc, self.b_enc)
        entries = self.choose(dense)
        h = sparse.encode(dense, inputs, self.W_enc, self.b_enc, entries)
        z = self.latents(h, entries)
        x_hat = self.decode(z, entries)
        squared_error = self.squared_error(x_hat, x)
        loss = squared_error + self.penalty(z, entries) + self.revival(dense, inputs, x, x_hat)
        return Step(loss, squared_error, self.l0(z, x))

    def decode(self, z: Float[Tensor, " n"], entries: sparse.Entries) -> Float[Tensor, "batch d_in"]:
        """x_hat from the latents at the entries."""
        return self.mesh.sum_latents(sparse.decode(z, self.W_dec, entries)) + self.b_dec

    def penalty(self, z: Float[Tensor, " n"], entries: sparse.Entries) -> Tensor | float:
        """What is added to the squared error."""
        if self.config.objective != "l1":
            return 0.0
        assert self.config.penalty is not None
        return self.config.penalty * self.l1(z, entries)

    def revival(self, h: Float[Tensor, "batch d_sae"], inputs: Tensor, x: Tensor, x_hat: Tensor) -> Tensor | float:
        """What is added for latents that are never active, given the pre-activations and what the active ones make of x."""
        return 0.0

    def see_active(
        self, is_active: Bool[Tensor, " n"], entries: sparse.Entries, silent: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For each latent: how often it was active in a batch over all ranks, and the tokens since it was (`silent` before)."""
        # Not bincount, which would wait for a GPU to tell it the largest
        count = torch.zeros_like(silent).index_add_(0, entries.latents, is_active.to(silent.dtype))
        active = self.mesh.data.sum(count)
        return active, torch.where(active > 0, 0, silent + entries.shape[0] * self.mesh.data.size)

    def l1(self, z: Float[Tensor, " n"], entries: sparse.Entries) -> Float[Tensor, ""]:
        """Sum of |z_j| ||w_j||, averaged over the batch."""
        l1 = (z.abs() * self.norms.squeeze(1).index_select(0, entries.latents)).sum() / entries.shape[0]
        return self.mesh.sum_latents(l1)


class ReLUTrainee(SparseTrainee):
    """ReLU with an l1 price. Its sparsity has no other handle, so matched L0 steers the price.

    A checkpoint does not say at what price it was trained. Without a `penalty` the first batch tells: at the optimum the gain
    of scaling all latents up is balanced by its price, sum (g + price ||w||) z = 0 with g the gradient of the squared error.
    """

    price: Tensor

    def __init__(
        self, sae: SAE[Any], unit: float, config: FinetuneConfig, mesh: Mesh = ALONE, form: Form = AS_IT_IS
    ) -> None:
        super().__init__(sae, unit, config, mesh, form)
        if config.objective == "l0":
            raise ValueError("a ReLU has no threshold for objective 'l0' to move: use 'l1' or 'matched-l0'")
        self.register_buffer("price", torch.tensor(float(config.penalty or 0.0)))

    def begin(self, x: Tensor) -> None:
        if self.config.penalty or self.config.objective == "l1":
            return
        inputs = x - self.centre
        entries = self.choose(h := sparse.pre_activations(inputs, self.W_enc, self.b_enc))
        z = h.view(-1)[entries.flat].float().requires_grad_()
        (g,) = torch.autograd.grad(self.squared_error(self.decode(z, entries), x), z)
        norms = self.norms.squeeze(1).index_select(0, entries.latents)
        gain, size = self.mesh.total(torch.stack([-(g * z).sum() * len(x), (norms * z).sum()]).detach())
        self.price.copy_((gain / size.clamp(min=1e-8)).clamp(min=1e-3))

    def choose(self, h: Tensor) -> sparse.Entries:
        return sparse.Entries.above(h, share=0.0)[0]

    def latents(self, h: Tensor, entries: sparse.Entries) -> Tensor:
        return h.relu()

    def penalty(self, z: Tensor, entries: sparse.Entries) -> Tensor:
        return self.price * self.l1(z, entries)

    def steer(self, l0: Tensor, target: float) -> None:
        self.price.mul_((0.01 * (l0.clamp(min=1e-3) / target).log().clamp(-1, 1)).exp())

    def state_of_gate(self) -> dict[str, float]:
        return {"price": self.price.item()}

    def write_gate(self, sae: SAE[Any]) -> None:
        pass


class GatedTrainee(ReLUTrainee):
    """A gated SAE: h > 0 opens the gate, exp(r_mag) (h - b_gate) + b_mag is what passes.

    The loss is that of Rajamanoharan et al. (2024, arXiv:2404.16014): besides the squared error, an l1 price on relu(h), and the
    squared error of the reconstruction from relu(h) by a decoder that does not learn from it.
    """

    encoder_bias = "b_gate"

    def __init__(
        self, sae: SAE[Any], unit: float, config: FinetuneConfig, mesh: Mesh = ALONE, form: Form = AS_IT_IS
    ) -> None:
        super().__init__(sae, unit, config, mesh, form)
        self.r_mag = nn.Parameter(sae.get_parameter("r_mag").detach().float().clone())
        b_mag = sae.get_parameter("b_mag").detach().float() / self.h_unit
        self.b_mag = nn.Parameter(b_mag - self.r_mag.detach().exp() * self.shift() if self.is_centred else b_mag)

    def latents(self, h: Tensor, entries: sparse.Entries) -> Tensor:
        r_mag, b_gate, b_mag = (sparse.at_latents(p, entries) for p in (self.r_mag, self.b_enc, self.b_mag))
        return (r_mag.exp() * (h - b_gate) + b_mag).relu()

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Step:
        inputs = x - self.centre
        entries = self.choose(dense := sparse.pre_activations(inputs, self.W_enc, self.b_enc))
        h = sparse.encode(dense, inputs, self.W_enc, self.b_enc, entries)
        z = self.latents(h, entries)
        squared_error = self.squared_error(self.decode(z, entries), x)
        by_gate = self.mesh.sum_latents(sparse.decode(h, self.W_dec.detach(), entries)) + self.b_dec.detach()
        loss = squared_error + self.squared_error(by_gate, x) + self.penalty(h, entries)
        return Step(loss, squared_error, self.l0(z, x))

    def write_gate(self, sae: SAE[Any]) -> None:
        sae.get_parameter("r_mag").copy_(self.r_mag)
        sae.get_parameter("b_mag").copy_((self.b_mag + self.r_mag.exp() * self.shift()) * self.h_unit)


class TopKTrainee(SparseTrainee):
    """The k largest pre-activations, if positive.

    Latents that were not among them for SILENT_TOKENS learn from what these leave of x, by the auxiliary loss of Gao et al. (2024,
    arXiv:2406.04093): the squared error of the largest silent ones, d_in/2 at most, in reconstructing it. (Their runs are longer
    than those here, and wait longer.)
    """

    loop = 4
    silent: Tensor

    def __init__(
        self, sae: SAE[Any], unit: float, config: FinetuneConfig, mesh: Mesh = ALONE, form: Form = AS_IT_IS
    ) -> None:
        super().__init__(sae, unit, config, mesh, form)
        self.k: int = sae.cfg.k
        self.register_buffer("silent", torch.zeros(sae.cfg.d_sae))  # tokens since a latent was last active

    def choose(self, h: Tensor) -> sparse.Entries:
        return self.among_all(h, sparse.Entries.largest(h, self.k), self.k)

    def latents(self, h: Tensor, entries: sparse.Entries) -> Tensor:
        _, self.silent = self.see_active(h > 0, entries, self.silent)
        return h.relu()

    def revival(self, h: Tensor, inputs: Tensor, x: Tensor, x_hat: Tensor) -> Tensor | float:
        is_silent = self.silent > SILENT_TOKENS
        n_silent = int(self.mesh.latents.sum(is_silent.sum()))
        if not n_silent:
            return 0.0
        entries = self.largest_silent(h, is_silent, min(n_silent, x.shape[1] // 2))
        z = sparse.encode(h, inputs, self.W_enc, self.b_enc, entries)
        found = self.mesh.sum_latents(sparse.decode(z, self.W_dec, entries))
        return AUXILIARY * self.squared_error(found, (x - x_hat).detach())

    def largest_silent(self, h: Tensor, is_silent: Bool[Tensor, " d_sae"], k: int) -> sparse.Entries:
        """Of each row the k largest silent latents over all shards, if positive."""
        columns = is_silent.nonzero().squeeze(1)
        few = h.index_select(1, columns)
        largest = self.among_all(few, sparse.Entries.largest(few, k), k)
        largest = largest.where(largest.read(few) > 0)
        return sparse.Entries(largest.rows, columns[largest.latents], (h.shape[0], h.shape[1]))

    def among_all(self, h: Float[Tensor, "batch n"], largest: sparse.Entries, k: int) -> sparse.Entries:
        """Of the `largest` of each row of this shard, as many in every row, those that are among the k largest over all shards."""
        if self.mesh.latents.size == 1:
            return largest
        values = largest.read(h).view(len(h), -1)
        missing = min(k, len(self.silent)) - values.shape[1]  # where another shard has more to choose from
        among = self.mesh.is_among_largest(F.pad(values, (0, missing), value=-torch.inf), k)
        return largest.where(among[:, : values.shape[1]].reshape(-1))

    def write_gate(self, sae: SAE[Any]) -> None:
        pass


class ThresholdTrainee(SparseTrainee):
    """A threshold for each latent, trained through its logarithm. Amplitude: h itself (JumpReLU), or the rational of h."""

    silent: Tensor
    rate: Tensor
    seen: Tensor

    def __init__(
        self, sae: SAE[Any], unit: float, config: FinetuneConfig, mesh: Mesh = ALONE, form: Form = AS_IT_IS
    ) -> None:
        super().__init__(sae, unit, config, mesh, form)
        gate = sae.gate if isinstance(sae, RationalSAE) else None
        threshold = gate.threshold if gate is not None else sae.threshold
        assert isinstance(threshold, Tensor)
        theta = threshold.detach().float() / self.h_unit
        self.log_threshold = nn.Parameter(theta.clamp(min=1e-3).log())  # a JumpReLU may have some at 0
        # the field's standard for JumpReLU, and all that a first-order estimate can do; it never moves the encoder
        assert config.surrogate is not None
        self.surrogate = config.surrogate
        if gate is None:
            self.surrogate = replace(config.surrogate, kind="rectangle", strength=0.0, crowding=0.0, sparing=0.0)
        if config.objective == "l0":
            self.surrogate = replace(self.surrogate, price=config.penalty)
        self.register_buffer("silent", torch.zeros(len(theta)))  # tokens since a latent was last active
        self.register_buffer("rate", torch.zeros(len(theta)))  # share of the tokens on which it is active
        self.register_buffer("seen", torch.zeros(()))  # tokens
        self.l0_asked = max(1, round(config.target_l0 or 1))  # whole, as the gate's k
        self.k, self.alpha = (gate.k, gate.alpha) if gate is not None else (None, 0.0)
        self.amplitude = TrainableGate(gate, self.h_unit, mesh) if gate is not None else None

    def gate_parts(self) -> dict[Part, list[nn.Parameter]]:
        return {"thresholds": [self.log_threshold], **(self.amplitude.parts() if self.amplitude is not None else {})}

    def choose(self, h: Tensor) -> sparse.Entries:
        share, threshold, scale = 1 - 0.5 * self.surrogate.bandwidth, self.log_threshold.detach().exp(), None
        if self.mesh.latents.size > 1 and self.k is not None:
            mine = sparse.Entries.largest(h, self.k + 1, threshold)
            relative = mine.read(h) * threshold.reciprocal().index_select(0, mine.latents)
            scale = sample_scale(self.mesh.largest(relative.view(len(h), -1), self.k + 1), self.k)
        entries, scale = sparse.Entries.above(h, threshold, share=share, k=self.k, alpha=self.alpha, scale=scale)
        self.follow = None if scale is None else scale**self.alpha
        return entries

    def latents(self, h: Tensor, entries: sparse.Entries) -> Tensor:
        threshold = sparse.at_latents(self.log_threshold.exp(), entries)
        if self.follow is not None:
            threshold = threshold * self.follow.squeeze(1).index_select(0, entries.rows)
        amplitude = h if self.amplitude is None else self.amplitude(h, entries)
        curvature = (self.norms.squeeze(1) ** 2 / entries.shape[0]).index_select(0, entries.latents)
        if self.row_scale is not None:
            curvature = curvature * self.row_scale.squeeze(1)[entries.rows] ** 2
        surrogate = self.surrogate
        if surrogate.price is not None:
            surrogate = replace(surrogate, price=surrogate.price / entries.shape[0])
        on = h > threshold.detach()
        active, self.silent = self.see_active(on, entries, self.silent)
        weight = None
        if surrogate.crowding or surrogate.sparing:
            n = entries.shape[0] * self.mesh.data.size
            share = active / n / self.l0_asked
            weight = surrogate.weights(share, self.often(active / n, n)).index_select(0, entries.latents)
        return hard_edge(amplitude, h, threshold, on, surrogate, curvature, weight, self.mesh.total)

    @torch.no_grad()
    def often(self, rate: Float[Tensor, " d_sae"], n: int) -> Float[Tensor, " d_sae"]:
        """How many times as often as the average latent each is active; its rate in the n tokens at hand joins the mean.

        A mean over batches, since a rare latent comes once or not at all in one, and the price is no linear function of it.
        """
        self.seen += n
        self.rate.lerp_(rate, n / self.seen.clamp(max=max(n, RATE_TOKENS)))
        return self.rate * (len(self.rate) * self.mesh.latents.size / self.l0_asked)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        # What never fires learns nothing: its threshold comes down to it
        if self.log_threshold.requires_grad:
            self.log_threshold.sub_(0.02 * (self.silent > SILENT_TOKENS)).clamp_(min=LOWEST)

    def steer(self, l0: Tensor, target: float) -> None:
        if self.alpha == 1:
            return  # a common factor cancels: L0 is k
        # s(x) falls as thresholds rise, and takes the share alpha of every step back
        step = 0.1 / (1 - self.alpha) * (l0.clamp(min=1e-3) / target).log()
        self.log_threshold.data.add_(step.clamp(-0.1, 0.1)).clamp_(min=LOWEST)

    def state_of_gate(self) -> dict[str, float]:
        return {"median_threshold": self.mesh.whole(self.log_threshold.detach()).exp().median().item() * self.h_unit}

    def write_gate(self, sae: SAE[Any]) -> None:
        threshold = self.log_threshold.exp() * self.h_unit if self.log_threshold.requires_grad else None
        if self.amplitude is not None:
            self.amplitude.write(sae, threshold)
        elif threshold is not None:
            sae.threshold.data.copy_(threshold)  # type: ignore[union-attr]


class DenseTrainee(Trainee):
    """The paper's gate: no latent is exactly 0, so everything is dense, and an l1 price is all that keeps latents small."""

    def __init__(
        self, sae: SAE[Any], unit: float, config: FinetuneConfig, mesh: Mesh = ALONE, form: Form = AS_IT_IS
    ) -> None:
        super().__init__(sae, unit, config, mesh, form)
        assert isinstance(sae, RationalSAE)
        if config.objective != "l1":
            raise ValueError(
                f"a dense gate has no zeros to count: use objective 'l1' with a penalty; got {config.objective!r}"
            )
        self.amplitude = TrainableGate(sae.gate, self.h_unit, mesh)

    def gate_parts(self) -> dict[Part, list[nn.Parameter]]:
        return self.amplitude.parts()

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Step:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda or prefers_bfloat16()):
            h = F.linear(x - self.centre, self.W_enc, self.b_enc)
            z = self.amplitude(h)
            x_hat = z @ self.W_dec
        squared_error = self.squared_error(self.mesh.sum_latents(x_hat.float()) + self.b_dec, x)
        l1 = self.mesh.sum_latents((z.abs() @ self.norms.to(z.dtype)).float().sum() / len(x))
        return Step(squared_error + (self.config.penalty or 0.0) * l1, squared_error, self.l0(z, x))

    def write_gate(self, sae: SAE[Any]) -> None:
        self.amplitude.write(sae)


class TrainableGate(nn.Module):
    """A rational gate in training units, its scales trained through their logarithms."""

    def __init__(self, gate: RationalGate, unit: float, mesh: Mesh = ALONE) -> None:
        super().__init__()
        self.mesh = mesh
        self.gate = copy.deepcopy(gate).requires_grad_(False)
        self.gate.num_relative.requires_grad_(True)
        self.gate.den_relative.requires_grad_(True)
        # With k a dense gate's scales multiply each sample's own threshold, and that is what has a unit
        self.unit = 1.0 if gate.support == "dense" and gate.k is not None else unit
        self.log_C_in = nn.Parameter((gate.C_in.detach() / self.unit).log())
        self.log_C_out = nn.Parameter((gate.C_out.detach() / self.unit).log())

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """What can train."""
        return {"scales": [self.log_C_in, self.log_C_out], "shape": [self.gate.num_relative, self.gate.den_relative]}

    def forward(self, h: Float[Tensor, "*batch"], entries: sparse.Entries | None = None) -> Float[Tensor, "*batch"]:
        """Amplitude of a (batch, d_sae) matrix, or of the entries of one."""
        C_in, C_out = self.log_C_in.exp(), self.log_C_out.exp()
        if entries is not None and C_in.ndim:
            C_in, C_out = sparse.at_latents(C_in, entries), sparse.at_latents(C_out, entries)
        elif entries is None and self.gate.k is not None:
            tau = sample_scale(self.mesh.largest(h.float(), self.gate.k + 1), self.gate.k)
            C_in, C_out = C_in * tau, C_out * tau
        return self.gate.amplitude(h, C_in, C_out)

    def write(self, sae: SAE[Any], threshold: Tensor | None = None) -> None:
        """Put the gate, in the host's units, into a RationalSAE."""
        assert isinstance(sae, RationalSAE)
        sae.gate = copy.deepcopy(self.gate).requires_grad_(True)
        sae.gate.rebase()
        sae.gate.C_in = nn.Parameter(self.log_C_in.exp() * self.unit)
        sae.gate.C_out = nn.Parameter(self.log_C_out.exp() * self.unit)
        if threshold is not None:
            sae.gate.threshold = nn.Parameter(threshold)
        sae.sync_config()


def kind_of(sae: SAE[Any]) -> type[Trainee]:
    """The class that trains an SAE's gate."""
    architecture = sae.cfg.architecture()
    kinds: dict[str, type[Trainee]] = {
        "standard": ReLUTrainee,
        "topk": TopKTrainee,
        "jumprelu": ThresholdTrainee,
        "gated": GatedTrainee,
        "rational": ThresholdTrainee,
    }
    if isinstance(sae, RationalSAE) and sae.gate.support == "dense":
        return DenseTrainee
    if architecture not in kinds:
        raise ValueError(f"fine-tuning knows {', '.join(kinds)}; this SAE is {architecture!r}")
    return kinds[architecture]


def trainee_for(
    sae: SAE[Any], unit: float, config: FinetuneConfig, mesh: Mesh = ALONE, form: Form = AS_IT_IS
) -> Trainee:
    """The Trainee of an SAE."""
    return kind_of(sae)(sae, unit, settled(config, sae), mesh, form)


def settled(config: FinetuneConfig, sae: SAE[Any]) -> FinetuneConfig:
    """The config with what it leaves to the kind of SAE."""
    is_from_jumprelu = isinstance(sae, RationalSAE) and sae.cfg.metadata.rsae_teacher_architecture == "jumprelu"
    surrogate = config.surrogate or (JUMPRELU_EDGE if is_from_jumprelu else Surrogate())
    rate = JUMPRELU_LR if sae.cfg.architecture() == "jumprelu" else GATE_LR
    return replace(config, surrogate=surrogate, gate_lr=rate if config.gate_lr is None else config.gate_lr)


def schedule(step: int, config: FinetuneConfig) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay to 0."""
    up = (step + 1) / max(1.0, config.warmup * config.steps)
    down = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(1.0, up, down)


def check_trainable(sae: SAE[Any]) -> None:
    """Refuse an SAE whose inputs are not what a store holds, or whose weights are not of one dtype.

    Raises:
        ValueError: says what to do.
    """
    cfg = sae.cfg
    if sae.W_enc.dtype != sae.W_dec.dtype:
        raise ValueError(
            f"W_enc is {sae.W_enc.dtype} and W_dec {sae.W_dec.dtype}: make them one (sae.to(torch.float32))"
        )
    if cfg.reshape_activations != "none":
        raise ValueError(
            f"this SAE has reshape_activations {cfg.reshape_activations!r}: it reads attention heads side by side, and rsae "
            "reads residual streams"
        )
    if cfg.normalize_activations not in ("none", *NORMALISED):
        raise ValueError(
            f"this SAE has normalize_activations {cfg.normalize_activations!r}, which should have been folded into its weights: "
            "do that first (SAELens: fold_activation_norm_scaling_factor, with sqrt(d_in) / mean norm of its inputs)"
        )


def check_width(sae: SAE[Any], d_in: int) -> None:
    """Refuse activations of another width than the SAE's."""
    if sae.cfg.d_in != d_in:
        raise ValueError(f"the SAE has d_in {sae.cfg.d_in} and the activations {d_in}: another model or hook?")


def check_mesh(sae: SAE[Any], config: FinetuneConfig, mesh: Mesh, out: Path | None) -> None:
    """Refuse ranks that the SAE or its batches cannot be divided among."""
    if mesh.devices is not None and out is None:
        raise ValueError("several ranks need a folder that they share: pass out")
    if config.batch_size % mesh.data.size:
        raise ValueError(
            f"a batch of {config.batch_size} cannot be divided among {mesh.data.size} ranks: choose a batch size that can"
        )
    if sae.cfg.d_sae % mesh.latents.size:
        raise ValueError(
            f"{sae.cfg.d_sae} latents cannot be divided into {mesh.latents.size} shards: choose a number that divides them"
        )


def check_weights(sae: SAE[Any], name: str, mesh: Mesh = ALONE) -> None:
    """Refuse to finish with an SAE that cannot be loaded again, whichever shard it is that cannot."""
    broken = [f"nan or inf in {key}" for key, tensor in sae.state_dict().items() if not bool(tensor.isfinite().all())]
    if isinstance(sae, RationalSAE) and not broken:
        try:
            sae.gate.check()
        except ValueError as error:
            broken.append(str(error))
    if broken := sorted({each for part in mesh.ranks.gather(broken) for each in part}):
        raise NotFinite(f"{name}: training ended with {'; '.join(broken)}: lower the learning rates")


def check_topk_l0(sae: SAE[Any], l0: float | None) -> None:
    """Refuse to ask a TopK for another L0 than its k, before work is done: it would be ignored."""
    if sae.cfg.architecture() == "topk" and l0 not in (None, sae.cfg.k):
        raise ValueError(f"L0 {l0:g} was asked for, and a TopK's is its k, {sae.cfg.k}: leave it out")


def check_settings(sae: SAE[Any], config: FinetuneConfig) -> None:
    """Refuse an objective or an L0 that an SAE cannot have, to freeze what it does not have, or to freeze all that it has."""
    without_weights = with_weights(sae, {name: tensor.to("meta") for name, tensor in sae.state_dict().items()})
    parts = set(trainee_for(without_weights, 1.0, config).parts())
    if config.target_l0 is not None and config.target_l0 > sae.cfg.d_sae:
        raise ValueError(f"target_l0 {config.target_l0:g} is more than the SAE's {sae.cfg.d_sae} latents")
    if (
        isinstance(sae, RationalSAE)
        and 0 < sae.gate.alpha < 1
        and config.alpha not in (sae.gate.alpha, FinetuneConfig.alpha)
    ):
        raise ValueError(
            f"the thresholds of this RSAE follow the sample by {sae.gate.alpha:g}, which it was trained with and keeps: "
            "leave alpha out"
        )
    if sae.cfg.architecture() == "topk" and config.objective == "l0":
        raise ValueError("a TopK's L0 is its k, which no price moves: use 'matched-l0', or upgrade it first")
    if not config.frozen:
        return
    if absent := set(config.frozen) - parts:
        raise ValueError(f"this SAE has no {', '.join(sorted(absent))} to freeze; it has {', '.join(sorted(parts))}")
    if set(config.frozen) == parts:
        raise ValueError(f"nothing is left to train: {', '.join(config.frozen)} is all that this SAE has")


def finetune(
    sae: SAE[Any],
    data: Store,
    config: FinetuneConfig,
    *,
    held_out: Store,
    out: Path | None = None,
    progress: Progress | None = None,
    name: str = "finetune",
    mesh: Mesh = ALONE,
) -> SAE[Any]:
    """Train an SAE with its own gate, on batches that depend on `data`, `config.seed` and `config.batch_size` alone.

    With the objective "matched-l0" the result has the target L0 on `held_out`, exactly but for ties (unless its thresholds are
    frozen): training steers it, and `rsae.calibrate.match_l0` does the rest. A rational gate that keeps the k largest first gets a
    threshold for each latent, which follows the sample as far as `config.alpha` says, and one whose thresholds are 0 (a ReLU's)
    gets low positive ones: an edge at 0 can learn nothing.

    Args:
        sae: StandardSAE, JumpReLUSAE, TopKSAE, GatedSAE or RationalSAE (a dense gate with the objective "l1", as in the paper). Not
            changed.
        data: activations to train on.
        held_out: activations on which L0 is measured and matched.
        out: folder for log.jsonl, checkpoint-STEP (while it runs) and the finished SAELens checkpoint. A run that was
            killed continues from its last checkpoint to the same result; a finished one is loaded.
        progress, name: progress(name, steps done, steps).
        mesh: the ranks that train together (`Mesh.of`), each on its share of every batch and with its shard of the latents. What
            comes out is what one process gets, but for the rounding of sums, and a run may be continued by other ranks. No rank
            holds more of the SAE in memory than its shard: what comes and what is returned can be mapped files. Needs `out`.

    Returns:
        A new SAE of the same class, in the units of the activations, on the device and in the dtype of `sae`. It is trained,
        matched and saved in float32; rounded to a narrower dtype, it has the target L0 as nearly as that can tell thresholds apart.

    Raises:
        ValueError: d_in differs, the SAE cannot be trained with these settings, no latent of it is active, `out` holds another run,
            the loss is not finite, or the mesh does not fit.
    """
    check_width(sae, data.d_in)
    if held_out.d_in != data.d_in:
        raise ValueError(
            f"activations to train on have d_in {data.d_in}, those held out {held_out.d_in}: another model or hook?"
        )
    check_trainable(sae)
    check_mesh(sae, config, mesh, out)
    keep_pages()
    check_settings(sae, config)
    config = settled(config, sae)
    inputs = {
        "loop": kind_of(sae).loop,
        "config": asdict(config),
        "sae": _hash_of(sae),
        "data": data.fingerprint,
        "held_out": held_out.fingerprint,
    }
    folds = _rows_differ_from_1(sae)
    if folds or not _reads_about_0(sae):
        inputs["form"] = 2  # raised as `loop` is, where there is one
    mesh.ranks.agree("inputs and settings", config_hash(inputs))
    folder = _Folder(out, inputs, mesh) if out is not None else None
    if folder is not None and folder.done:
        return folder.result().to(sae.W_enc.device, sae.W_enc.dtype)
    # A dense gate's L0 is d_sae, and nothing is steered to it
    dense = isinstance(sae, RationalSAE) and sae.gate.support == "dense"
    like, d_sae = sae.W_enc, sae.cfg.d_sae
    # In float32 all along: the factor that matches L0 is less than bfloat16 can tell apart
    part = shard_of(sae, mesh).to(mesh.device, torch.float32)
    target = config.target_l0 or (float(d_sae) if dense else mean_l0(part, HeldOut(held_out), mesh))
    if target == 0:
        raise ValueError("no latent of this SAE is active on the held-out activations: another model, hook or scale?")
    sample = list(islice(data.batches(config.batch_size, seed=config.seed), 8))
    part = _ready_to_train(part, sample, config, target, mesh)
    config = replace(config, target_l0=target)
    unit = _unit(sample[:4], data.mean)
    form = Form.of(part, folds, sample[:4], data.mean, unit, mesh)
    if folder is not None:
        form = form._replace(fold=folder.kept("fold", form.fold))
    trainee = trainee_for(part, unit, config, mesh, form).to(mesh.device)
    del sample
    part.cpu()  # the trainee has weights of its own
    with torch.enable_grad():
        _train(trainee, data, config, target, folder, progress, name)
    part = trainee.export(part).to(mesh.device)
    del trainee
    if config.objective == "matched-l0" and "thresholds" not in config.frozen:
        part = match_l0(part, HeldOut(held_out), target, mesh)
        found = mean_l0(part, HeldOut(held_out), mesh)
        if abs(found / target - 1) > L0_TOLERANCE:
            warnings.warn(
                f"{name}: the L0 asked for, {target:.4g}, was not reached: {found:.4g} on the held-out activations. Too few "
                "pre-activations are positive, or many are equal; do not compare this arm",
                stacklevel=2,
            )
    check_weights(part, name, mesh)
    if folder is not None:
        folder.finish(part)
    return (part if folder is None or mesh.devices is None else folder.result()).to(like.device, like.dtype)


def take_step(
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    raw: Float[Tensor, "batch d_in"],
    mean: Float[Tensor, " d_in"],
    target: float | None,
) -> Float[Tensor, " 4"]:
    """One step of the loop, on this rank's share of a batch of activations; with a `target`, L0 is moved towards it.

    Returns:
        Of the whole batch: loss; squared error and variance about `mean`, summed over d_in and averaged over tokens; L0.
    """
    mesh = trainee.mesh
    optimizer.zero_grad()
    result = trainee(trainee.inputs(raw))
    result.loss.backward()
    if mesh.devices is not None:
        mesh.sum_gradients(*trainee.for_ranks())
    optimizer.step()
    trainee.constrain()
    variance = F.mse_loss(raw, mean.expand_as(raw), reduction="sum") / (len(raw) * trainee.error_unit**2)
    found = mesh.data.mean(
        torch.stack([result.loss.detach(), result.squared_error.detach(), variance, result.l0.detach()])
    )
    if target is not None:
        trainee.steer(found[3], target)
    return found


def _train(
    trainee: Trainee,
    data: Store,
    config: FinetuneConfig,
    target: float,
    folder: _Folder | None,
    progress: Progress | None,
    name: str,
) -> None:
    """The loop."""
    parts = trainee.parts()
    for part in set(config.frozen):
        for parameter in parts.pop(part):
            parameter.requires_grad_(False)
    body = parts.pop("weights", [])
    gate = [parameter for part in parts.values() for parameter in part]
    groups = [{"params": body, "rate": config.lr}, {"params": gate, "rate": config.gate_lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99), fused=True)
    mesh = trainee.mesh

    def batches(start: int) -> Iterator[Tensor]:
        share = {"rank": mesh.data.rank, "world": mesh.data.size}
        return iter(data.batches(config.batch_size, seed=config.seed, start=start, **share))

    steers = config.objective == "matched-l0" and "thresholds" not in config.frozen
    first = folder.restore(trainee, optimizer) if folder is not None else 0
    mean = data.mean.to(mesh.device)
    sums, counted, began = torch.zeros(4, device=mesh.device), 0, time.perf_counter()
    for step, raw in zip(range(first, config.steps), batches(first), strict=False):
        raw = raw.to(mesh.device, non_blocking=True)
        if step == 0:
            trainee.begin(trainee.inputs(raw))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(step, config)
        found = take_step(trainee, optimizer, raw, mean, target if steers else None)
        sums += found
        counted += 1
        done = step + 1
        saves = folder is not None and done % config.checkpoint_every == 0 and done < config.steps
        if done % LOG_EVERY == 0 or saves or done == config.steps:  # a run that goes on from there logs the same
            loss, squared_error, variance, l0 = (sums / counted).tolist()
            if not math.isfinite(loss):
                raise NotFinite(f"{name}: the loss is {loss} at step {done}; lower the learning rate ({config.lr})")
            seconds = time.perf_counter() - began
            row = {
                "step": done,
                "tokens": done * config.batch_size,
                "seconds": round(seconds, 3),
                "loss": loss / data.d_in,
                "fvu": squared_error / variance,
                "l0": l0,
                "lr": config.lr * schedule(step, config),
                "tokens_per_s": round((done - first) * config.batch_size / seconds, 1),
                **trainee.state_of_gate(),
            }
            if folder is not None:
                folder.log(row)
            sums, counted = torch.zeros_like(sums), 0
        if folder is not None and saves:
            folder.checkpoint(trainee, optimizer, done)
        if progress is not None:
            progress(name, done, config.steps)


def _unit(sample: list[Tensor], mean: Tensor) -> float:
    """Root mean square of a coordinate of the centred activations: what training takes as 1."""
    total = sum(float((x - mean).double().square().sum()) for x in sample)
    return math.sqrt(total / sum(x.numel() for x in sample))


def _ready_to_train(sae: SAE[Any], sample: list[Tensor], config: FinetuneConfig, l0: float, mesh: Mesh) -> SAE[Any]:
    """An SAE in the form that trains: a rational gate with a positive threshold for each latent, a TopK with unit rows."""
    if sae.cfg.architecture() == "topk" and sae.cfg.rescale_acts_by_decoder_norm:
        return without_rescaling(sae)
    if not isinstance(sae, RationalSAE) or sae.gate.threshold is None or "thresholds" in config.frozen:
        return sae
    sae = copied(sae)
    gate = sae.gate
    assert gate.threshold is not None
    thresholds = mesh.whole(gate.threshold)
    if gate.alpha == 1:
        gate.threshold.data.mul_(calibrate_threshold(sae, sample, l0, mesh) / thresholds.median())
    elif not bool((thresholds > 0).all()):
        # In proportion to each latent's own size, so that none is silenced; the common factor keeps the larger activations,
        # since what l1 shrank to little more than nothing is what a threshold is there to leave out
        share = 1.0 if bool((thresholds > 0).any()) else RELU_START
        typical = _mean_active(sae, sample, mesh)
        gate.threshold.data.copy_(torch.where(gate.threshold > 0, gate.threshold, typical))
        matched = match_l0(sae, sample, share * l0, mesh)
        assert isinstance(matched, RationalSAE)
        sae, gate = matched, matched.gate
    if gate.alpha in (0, 1):  # what lies between was trained so
        gate.k, gate.alpha = (max(1, round(l0)), config.alpha) if config.alpha else (None, 0.0)
    sae.sync_config()
    return sae


@torch.no_grad()
def _mean_active(sae: SAE[Any], sample: list[Tensor], mesh: Mesh) -> Tensor:
    """Mean positive pre-activation of each latent, (d_sae,); of one that has none, the median latent's."""
    total = count = torch.zeros(sae.cfg.d_sae, device=sae.W_enc.device)
    for x in sample:
        h = pre_acts(sae, x)
        total, count = total + h.relu().sum(0), count + (h > 0).sum(0)
    mean = total / count  # nan where there is none
    return torch.where(count > 0, mean, mesh.whole(mean).nanmedian())


def _hash_of(sae: SAE[Any]) -> str:
    """Short hash of an SAE's weights and of what its configuration says about the function they make."""
    cfg = {name: value for name, value in sae.cfg.to_dict().items() if name not in ("metadata", "device", "dtype")}
    digest = hashlib.sha256(json.dumps(cfg, sort_keys=True, default=str).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        for piece in tensor.detach().flatten().split(1 << 24):  # a narrow dtype is not widened whole
            digest.update(piece.float().cpu().numpy().data)
    return digest.hexdigest()[:16]


class _Folder:
    """A fine-tuning run on disk: finetune.json (what it is, and whether it is done), log.jsonl, checkpoint-STEP, result.

    A checkpoint is written by torch.distributed.checkpoint as safetensors, each rank its shard, and read by any number of ranks.
    """

    def __init__(self, path: Path, inputs: dict[str, Any], mesh: Mesh) -> None:
        self.path, self.mesh = path, mesh
        self._about = mesh.once(lambda: self._open(config_hash(inputs), inputs))
        self.done = bool(self._about["done"])

    def _open(self, hash_: str, inputs: dict[str, Any]) -> dict[str, Any]:
        about = self.path / "finetune.json"
        shutil.rmtree(self.path / JOINING, ignore_errors=True)  # of a run that was killed as it ended
        if about.exists():
            found = read_json(about)
            if found["hash"] == hash_:
                return found
            names = [name for name, value in json.loads(json.dumps(inputs)).items() if found.get(name) != value]
            if found["done"] or (self.path / "log.jsonl").exists():  # else it was refused before its first step
                raise ValueError(
                    f"{self.path} holds another run (another {', '.join(names)}): choose another folder or delete it"
                )
        elif self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no fine-tuning run: choose another folder")
        write_json(about, {"hash": hash_, "done": False, **inputs, "provenance": provenance()})
        return read_json(about)

    def kept(self, name: str, found: float) -> float:
        """What the run began with, on whatever processor; `found`, if it begins now."""

        def keep() -> dict[str, Any]:
            if name not in self._about:
                write_json(self.path / "finetune.json", {**self._about, name: found})
            return read_json(self.path / "finetune.json")

        self._about = self.mesh.once(keep)
        return self._about[name]

    def result(self) -> SAE[Any]:
        """The SAE of a run that is done."""
        return load_teacher(self.path).sae

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to log.jsonl."""
        if self.mesh.ranks.is_main:
            with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def checkpoint(self, trainee: Trainee, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write everything that the rest of the run depends on."""
        partial = self.path / "checkpoint.partial"
        self.mesh.once(lambda: shutil.rmtree(partial, ignore_errors=True))
        self.mesh.save(_state(trainee, optimizer), partial)

        def publish() -> None:
            for file in [*partial.iterdir(), partial]:
                flush(file)
            partial.replace(self.path / f"checkpoint-{step}")
            self._drop(but=step)

        self.mesh.once(publish)

    def restore(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> int:
        """Load the last checkpoint if there is one; the step to go on from. Log lines after it are dropped."""
        step = max(self.mesh.once(self._steps), default=0)
        if step:
            self.mesh.load(_state(trainee, optimizer), self.path / f"checkpoint-{step}")

        def shorten() -> None:
            if (log := self.path / "log.jsonl").exists():
                # A last line without its end is what a run left that was cut off as it wrote
                whole = [row for row in log.read_text().splitlines(keepends=True) if row.endswith("\n")]
                kept = [row for row in whole if json.loads(row)["step"] <= step]
                with atomic(log) as temporary:
                    temporary.write_text("".join(kept))

        self.mesh.once(shorten)
        return step

    def finish(self, part: SAE[Any]) -> None:
        """Save the result, of which every rank brings its part, and mark the run as done."""
        save_joined(part, self.mesh, self.path)

        def close() -> None:
            write_json(self.path / "finetune.json", {**self._about, "done": True})
            self._drop()

        self.mesh.once(close)

    def _steps(self) -> list[int]:
        return [int(path.name.partition("-")[2]) for path in self.path.glob("checkpoint-*")]

    def _drop(self, but: int | None = None) -> None:
        for step in self._steps():
            if step != but:
                shutil.rmtree(self.path / f"checkpoint-{step}")


def _state(trainee: Trainee, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors that the rest of a run depends on, by name; loading writes into them."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in trainee.state_dict(keep_vars=True).items()}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trainee.named_parameters():
        if id(parameter) in trained:
            state = optimizer.state[parameter]
            if not state:  # as Adam begins
                zero = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state.update(step=torch.zeros((), device=parameter.device), exp_avg=zero, exp_avg_sq=zero.clone())
            tensors |= {f"adam.{moment}.{name}": tensor for moment, tensor in state.items()}
    return tensors
