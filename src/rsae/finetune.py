"""The one training loop: every arm (teacher's own gate or rational) runs through it on the same batches.

An SAE is trained in units in which the centred activations have norm sqrt(d_in), whatever the scale of the host: every gate here is
exactly rescaled with its biases, thresholds and scales (phi_c(h) = c phi(h/c)), so the checkpoint is in the host's units again.
Rows of W_dec keep the norms they came with, or the l1 price and the thresholds would be paid in a sliding currency.
An SAE that normalises each input (layer_norm, constant_norm_rescale) trains on the normalised ones, and every sample's error counts
by the scale that it is given back, so that the loss is in the host's units all the same.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from rsae import sparse
from rsae.allocator import keep_pages
from rsae.artefacts import Progress, atomic, config_hash, provenance, read_json, write_json, write_safetensors
from rsae.calibrate import calibrate_threshold, match_l0, mean_l0, pre_acts
from rsae.rational import RationalGate, Surrogate, hard_edge, sample_scale
from rsae.sae import RationalSAE, save_sae, without_rescaling
from rsae.teachers import load_teacher

if TYPE_CHECKING:
    from sae_lens import SAE

Objective = Literal["matched-l0", "l0", "l1"]
Part = Literal["weights", "thresholds", "scales", "shape"]

LOG_EVERY = 10
LOOP = 2
"""Raised whenever the same settings come to another result, so that an older run is not taken for one of this loop."""
NORMALISED = ("layer_norm", "constant_norm_rescale")
# A latent that was not active for so many tokens has its threshold lowered, by 2% a step, until it is.
SILENT_TOKENS = 100_000
# The threshold that a ReLU teacher's latents start with keeps this share of them.
RELU_START = 0.8


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How an arm is fine-tuned."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 2048
    """Tokens in a step."""
    lr: float = 4e-4
    """Adam's learning rate of weights and biases."""
    gate_lr: float = 3e-4
    """Learning rate of log-thresholds, log C_in, log C_out, and of the rational's coefficients relative to their fit."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly."""
    decay: float = 0.4
    """Share of the steps, at the end, in which it falls linearly to 0."""
    objective: Objective = "matched-l0"
    """"matched-l0": mean L0 is held at `target_l0`. "l0" and "l1": `penalty` times the L0 or the l1 norm is added to the loss."""
    target_l0: float | None = None
    """For matched-l0; None: the L0 that the SAE has when it comes."""
    penalty: float | None = None
    """Price of a unit of L0 or of l1, in units of the squared error per token (whose total is about d_in)."""
    alpha: float = 0.25
    """How far the thresholds of a rational gate with hard support follow the sample: theta_j s(x)^alpha (see RationalGate)."""
    surrogate: Surrogate = field(default_factory=Surrogate)
    """The gradient at the edge of hard support. A JumpReLU always uses the rectangle, the standard of the field."""
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
        if self.objective not in ("matched-l0", "l0", "l1"):
            raise ValueError(f"objective is 'matched-l0', 'l0' or 'l1'; got {self.objective!r}")
        if self.objective != "matched-l0" and self.penalty is None:
            raise ValueError(f"objective {self.objective!r} needs a penalty; or use 'matched-l0'")


class Store(Protocol):
    """What the loop reads: an ActivationStore, or anything like it."""

    d_in: int
    mean: Float[Tensor, " d_in"]
    fingerprint: str

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Endless shuffled batches, the same for the same seed; `start` skips that many."""
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


class Trainee(nn.Module, ABC):
    """The parameters of an SAE in training units, and one step's loss. A subclass for each kind of gate."""

    centre: Float[Tensor, " d_in"]

    encoder_bias = "b_enc"
    """The bias of the pre-activations that decide which latents are active, by its name in the checkpoint."""
    row_scale: Float[Tensor, "batch 1"] | None = None
    """Of the batch at work, where inputs are normalised: what its reconstruction is multiplied by."""

    def __init__(self, sae: SAE[Any], unit: float, config: FinetuneConfig) -> None:
        super().__init__()
        self.normalize = sae.cfg.normalize_activations
        self.error_unit = unit
        unit = 1.0 if self.normalize in NORMALISED else unit
        self.config, self.unit = config, unit
        self.subtracts = bool(sae.cfg.apply_b_dec_to_input)
        weights = {name: tensor.detach().float() for name, tensor in sae.state_dict().items()}
        self.W_enc = nn.Parameter(weights["W_enc"].T.contiguous())  # (d_sae, d_in): a latent's weights lie together
        self.b_enc = nn.Parameter(weights[self.encoder_bias] / unit)
        self.W_dec = nn.Parameter(weights["W_dec"].clone())
        self.b_dec = nn.Parameter(weights["b_dec"] / unit)
        # What the encoder's input is centred on stays as it came, and b_dec learns as the decoder's alone: `export` puts what lies
        # between into the encoder's bias. Tied, the estimated gradient of an edge would shift every token's reconstruction
        self.register_buffer("centre", self.b_dec.detach().clone() if self.subtracts else torch.zeros_like(self.b_dec))
        self.norms = self.W_dec.detach().norm(dim=1, keepdim=True).clamp(min=1e-8)

    def gate_parts(self) -> dict[Part, list[nn.Parameter]]:
        """The parameters that are trained at `gate_lr`, by part."""
        return {}

    def parts(self) -> dict[Part, list[nn.Parameter]]:
        """Everything that can train, by part."""
        gate = self.gate_parts()
        in_gate = {id(parameter) for part in gate.values() for parameter in part}
        weights = [p for p in self.parameters() if p.requires_grad and id(p) not in in_gate]
        return {"weights": weights, **gate}

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
        error = x_hat - x if self.row_scale is None else (x_hat - x) * self.row_scale
        return error.square().sum() / len(x)

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

    def steer(self, l0: float, target: float) -> None:
        """Move whatever sets the sparsity towards `target`, given the L0 of the last batch."""

    def state_of_gate(self) -> dict[str, float]:
        """What the log tells of the gate."""
        return {}

    @abstractmethod
    def write_gate(self, sae: SAE[Any]) -> None:
        """Write thresholds and scales, in the host's units, into `sae`."""

    def shift(self) -> Float[Tensor, " d_sae"]:
        """What b_enc takes up when the input is centred on b_dec as it is now."""
        return self.W_enc @ (self.b_dec - self.centre) if self.subtracts else torch.zeros_like(self.b_enc)

    @torch.no_grad()
    def export(self, sae: SAE[Any]) -> SAE[Any]:
        """A copy of `sae` with what was trained, in the host's units."""
        sae = copy.deepcopy(sae)
        sae.W_enc.copy_(self.W_enc.T)
        sae.get_parameter(self.encoder_bias).copy_((self.b_enc + self.shift()) * self.unit)
        sae.W_dec.copy_(self.W_dec)
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
        squared_error = self.squared_error(sparse.decode(z, self.W_dec, self.b_dec, entries), x)
        return Step(squared_error + self.penalty(z, entries), squared_error, (z != 0).sum() / len(x))

    def penalty(self, z: Float[Tensor, " n"], entries: sparse.Entries) -> Tensor | float:
        """What is added to the squared error."""
        if self.config.objective != "l1":
            return 0.0
        assert self.config.penalty is not None
        return self.config.penalty * (z.abs() * self.norms.squeeze(1)[entries.latents]).sum() / entries.shape[0]


class ReLUTrainee(SparseTrainee):
    """ReLU with an l1 price. Its sparsity has no other handle, so matched L0 steers the price.

    A checkpoint does not say at what price it was trained. Without a `penalty` the first batch tells: at the optimum the gain
    of scaling all latents up is balanced by its price, sum (g + price ||w||) z = 0 with g the gradient of the squared error.
    """

    price: Tensor

    def __init__(self, sae: SAE[Any], unit: float, config: FinetuneConfig) -> None:
        super().__init__(sae, unit, config)
        if config.objective == "l0":
            raise ValueError("a ReLU has no threshold for objective 'l0' to move: use 'l1' or 'matched-l0'")
        self.register_buffer("price", torch.tensor(float(config.penalty or 0.0)))

    def begin(self, x: Tensor) -> None:
        if self.config.penalty is not None:
            return
        inputs = x - self.centre
        entries = self.choose(h := sparse.pre_activations(inputs, self.W_enc, self.b_enc))
        z = h.view(-1)[entries.flat].float().requires_grad_()
        error = self.squared_error(sparse.decode(z, self.W_dec.detach(), self.b_dec.detach(), entries), x)
        (g,) = torch.autograd.grad(error, z)
        norms = self.norms.squeeze(1)[entries.latents]
        balance = -(g * z).sum() / (norms * z).sum() * len(x)
        self.price.fill_(max(1e-3, balance.item()))

    def choose(self, h: Tensor) -> sparse.Entries:
        return sparse.Entries.above(h, share=0.0)[0]

    def latents(self, h: Tensor, entries: sparse.Entries) -> Tensor:
        return h.relu()

    def penalty(self, z: Tensor, entries: sparse.Entries) -> Tensor:
        return self.price * (z * self.norms.squeeze(1)[entries.latents]).sum() / entries.shape[0]

    def steer(self, l0: float, target: float) -> None:
        self.price.mul_(math.exp(0.01 * max(-1.0, min(1.0, math.log(max(l0, 1e-3) / target)))))

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

    def __init__(self, sae: SAE[Any], unit: float, config: FinetuneConfig) -> None:
        super().__init__(sae, unit, config)
        self.r_mag = nn.Parameter(sae.get_parameter("r_mag").detach().float().clone())
        self.b_mag = nn.Parameter(sae.get_parameter("b_mag").detach().float() / self.unit)

    def latents(self, h: Tensor, entries: sparse.Entries) -> Tensor:
        j = entries.latents
        return (self.r_mag.exp()[j] * (h - self.b_enc[j]) + self.b_mag[j]).relu()

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Step:
        inputs = x - self.centre
        entries = self.choose(dense := sparse.pre_activations(inputs, self.W_enc, self.b_enc))
        h = sparse.encode(dense, inputs, self.W_enc, self.b_enc, entries)
        z = self.latents(h, entries)
        squared_error = self.squared_error(sparse.decode(z, self.W_dec, self.b_dec, entries), x)
        by_gate = self.squared_error(sparse.decode(h, self.W_dec.detach(), self.b_dec.detach(), entries), x)
        return Step(squared_error + by_gate + self.penalty(h, entries), squared_error, (z != 0).sum() / len(x))

    def write_gate(self, sae: SAE[Any]) -> None:
        sae.get_parameter("r_mag").copy_(self.r_mag)
        sae.get_parameter("b_mag").copy_((self.b_mag + self.r_mag.exp() * self.shift()) * self.unit)


class TopKTrainee(SparseTrainee):
    """The k largest pre-activations, if positive."""

    def __init__(self, sae: SAE[Any], unit: float, config: FinetuneConfig) -> None:
        super().__init__(sae, unit, config)
        self.k: int = sae.cfg.k

    def choose(self, h: Tensor) -> sparse.Entries:
        return sparse.Entries.largest(h, self.k)

    def latents(self, h: Tensor, entries: sparse.Entries) -> Tensor:
        return h.relu()

    def write_gate(self, sae: SAE[Any]) -> None:
        pass


class ThresholdTrainee(SparseTrainee):
    """A threshold for each latent, trained through its logarithm. Amplitude: h itself (JumpReLU), or the rational of h."""

    silent: Tensor

    def __init__(self, sae: SAE[Any], unit: float, config: FinetuneConfig) -> None:
        super().__init__(sae, unit, config)
        gate = sae.gate if isinstance(sae, RationalSAE) else None
        threshold = gate.threshold if gate is not None else sae.threshold
        assert isinstance(threshold, Tensor)
        theta = threshold.detach().float() / self.unit
        self.log_threshold = nn.Parameter(theta.clamp(min=1e-3).log())  # a JumpReLU may have some at 0
        # the field's standard for JumpReLU, and all that a first-order estimate can do; it never moves the encoder
        self.surrogate = config.surrogate
        if gate is None:
            self.surrogate = replace(config.surrogate, kind="rectangle", strength=0.0)
        if config.objective == "l0":
            self.surrogate = replace(self.surrogate, price=config.penalty)
        self.register_buffer("silent", torch.zeros(len(theta)))  # tokens since a latent was last active
        self.k, self.alpha = (gate.k, gate.alpha) if gate is not None else (None, 0.0)
        self.amplitude = TrainableGate(gate, self.unit) if gate is not None else None

    def gate_parts(self) -> dict[Part, list[nn.Parameter]]:
        return {"thresholds": [self.log_threshold], **(self.amplitude.parts() if self.amplitude is not None else {})}

    def choose(self, h: Tensor) -> sparse.Entries:
        share = 1 - 0.5 * self.surrogate.bandwidth
        entries, scale = sparse.Entries.above(
            h, self.log_threshold.detach().exp(), share=share, k=self.k, alpha=self.alpha
        )
        self.follow = None if scale is None else scale**self.alpha
        return entries

    def latents(self, h: Tensor, entries: sparse.Entries) -> Tensor:
        threshold = self.log_threshold.exp()[entries.latents]
        if self.follow is not None:
            threshold = threshold * self.follow.squeeze(1)[entries.rows]
        amplitude = h if self.amplitude is None else self.amplitude(h, entries.latents)
        curvature = self.norms.squeeze(1)[entries.latents] ** 2 / entries.shape[0]
        if self.row_scale is not None:
            curvature = curvature * self.row_scale.squeeze(1)[entries.rows] ** 2
        surrogate = self.surrogate
        if surrogate.price is not None:
            surrogate = replace(surrogate, price=surrogate.price / entries.shape[0])
        on = h > threshold.detach()
        active = torch.bincount(entries.latents[on], minlength=entries.shape[1])
        self.silent = torch.where(active > 0, 0, self.silent + entries.shape[0])
        rate = (active / entries.shape[0])[entries.latents] if surrogate.crowding else None
        return hard_edge(amplitude, h, threshold, on, surrogate, curvature, rate)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        # What never fires learns nothing: its threshold comes down to it
        if self.log_threshold.requires_grad:
            self.log_threshold[self.silent > SILENT_TOKENS] -= 0.02

    def steer(self, l0: float, target: float) -> None:
        if self.alpha == 1:
            return  # a common factor cancels: L0 is k
        # s(x) falls as thresholds rise, and takes the share alpha of every step back
        step = 0.1 * math.log(max(l0, 1e-3) / target) / (1 - self.alpha)
        self.log_threshold.data.add_(max(-0.1, min(0.1, step)))

    def state_of_gate(self) -> dict[str, float]:
        return {"median_threshold": self.log_threshold.detach().exp().median().item() * self.unit}

    def write_gate(self, sae: SAE[Any]) -> None:
        threshold = self.log_threshold.exp() * self.unit if self.log_threshold.requires_grad else None
        if self.amplitude is not None:
            self.amplitude.write(sae, threshold)
        elif threshold is not None:
            sae.threshold.data.copy_(threshold)  # type: ignore[union-attr]


class DenseTrainee(Trainee):
    """The paper's gate: no latent is exactly 0, so everything is dense, and an l1 price is all that keeps latents small."""

    def __init__(self, sae: RationalSAE, unit: float, config: FinetuneConfig) -> None:
        super().__init__(sae, unit, config)
        if config.objective != "l1":
            raise ValueError(
                f"a dense gate has no zeros to count: use objective 'l1' with a penalty; got {config.objective!r}"
            )
        self.amplitude = TrainableGate(sae.gate, self.unit)

    def gate_parts(self) -> dict[Part, list[nn.Parameter]]:
        return self.amplitude.parts()

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Step:
        with torch.autocast(x.device.type, torch.bfloat16):
            h = F.linear(x - self.centre, self.W_enc, self.b_enc)
            z = self.amplitude(h)
            x_hat = z @ self.W_dec
        squared_error = self.squared_error(x_hat.float() + self.b_dec, x)
        l1 = (z.abs() @ self.norms.to(z.dtype)).float().sum() / len(x)
        return Step(squared_error + (self.config.penalty or 0.0) * l1, squared_error, (z != 0).sum() / len(x))

    def write_gate(self, sae: SAE[Any]) -> None:
        self.amplitude.write(sae)


class TrainableGate(nn.Module):
    """A rational gate in training units, its scales trained through their logarithms."""

    def __init__(self, gate: RationalGate, unit: float) -> None:
        super().__init__()
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

    def forward(self, h: Float[Tensor, "*batch"], latents: Tensor | None = None) -> Float[Tensor, "*batch"]:
        """Amplitude of a (batch, d_sae) matrix, or of entries with the indices of their latents."""
        C_in, C_out = self.log_C_in.exp(), self.log_C_out.exp()
        if latents is not None and C_in.ndim:
            C_in, C_out = C_in[latents], C_out[latents]
        elif latents is None and self.gate.k is not None:
            tau = sample_scale(h.float(), self.gate.k)
            C_in, C_out = C_in * tau, C_out * tau
        return self.gate.amplitude(h, C_in, C_out)

    def write(self, sae: SAE[Any], threshold: Tensor | None = None) -> None:
        """Put the gate, in the host's units, into a RationalSAE."""
        assert isinstance(sae, RationalSAE)
        sae.gate = copy.deepcopy(self.gate).requires_grad_(True)
        sae.gate.C_in = nn.Parameter(self.log_C_in.exp() * self.unit)
        sae.gate.C_out = nn.Parameter(self.log_C_out.exp() * self.unit)
        if threshold is not None:
            sae.gate.threshold = nn.Parameter(threshold)
        sae.sync_config()


def trainee_for(sae: SAE[Any], unit: float, config: FinetuneConfig) -> Trainee:
    """The Trainee of an SAE's architecture."""
    architecture = sae.cfg.architecture()
    kinds: dict[str, type[Trainee]] = {
        "standard": ReLUTrainee,
        "topk": TopKTrainee,
        "jumprelu": ThresholdTrainee,
        "gated": GatedTrainee,
        "rational": ThresholdTrainee,
    }
    if isinstance(sae, RationalSAE) and sae.gate.support == "dense":
        return DenseTrainee(sae, unit, config)
    if architecture not in kinds:
        raise ValueError(f"fine-tuning knows {', '.join(kinds)}; this SAE is {architecture!r}")
    return kinds[architecture](sae, unit, config)


def schedule(step: int, config: FinetuneConfig) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay to 0."""
    up = (step + 1) / max(1.0, config.warmup * config.steps)
    down = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(1.0, up, down)


def check_trainable(sae: SAE[Any]) -> None:
    """Refuse an SAE whose inputs are not what a store holds.

    Raises:
        ValueError: says what to do.
    """
    cfg = sae.cfg
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


def check_frozen(sae: SAE[Any], config: FinetuneConfig) -> None:
    """Refuse to freeze what an SAE does not have, or all that it has."""
    if not config.frozen:
        return
    parts = set(trainee_for(sae, 1.0, config).parts())
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
        out: folder for log.jsonl, checkpoint.safetensors (while it runs) and the finished SAELens checkpoint. A run that was
            killed continues from its last checkpoint to the same result; a finished one is loaded.
        progress, name: progress(name, steps done, steps).

    Returns:
        A new SAE of the same class, in the units of the activations.

    Raises:
        ValueError: d_in differs, `out` holds another run, or the loss is not finite.
    """
    if sae.cfg.d_in != data.d_in:
        raise ValueError(f"the SAE has d_in {sae.cfg.d_in} and the activations {data.d_in}: another model or hook?")
    check_trainable(sae)
    keep_pages()
    check_frozen(sae, config)
    inputs = {
        "loop": LOOP,
        "config": asdict(config),
        "sae": _hash_of(sae),
        "data": data.fingerprint,
        "held_out": held_out.fingerprint,
    }
    folder = _Folder(out, inputs) if out is not None else None
    if folder is not None and (finished := folder.finished()) is not None:
        return finished
    # A dense gate's L0 is d_sae, and nothing is steered to it
    dense = isinstance(sae, RationalSAE) and sae.gate.support == "dense"
    target = config.target_l0 or (float(sae.cfg.d_sae) if dense else mean_l0(sae, _activations(held_out)))
    unit = _unit(data, config)
    start = _ready_to_train(sae, data, config, target)
    trainee = trainee_for(start, unit, config)
    _train(trainee, data, config, target, folder, progress, name)
    result = trainee.export(start)
    if config.objective == "matched-l0" and "thresholds" not in config.frozen:
        result = match_l0(result, _activations(held_out), target)
    if folder is not None:
        folder.finish(result)
    return result


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
    steers = config.objective == "matched-l0" and "thresholds" not in config.frozen
    first = folder.restore(trainee, optimizer) if folder is not None else 0
    if first == 0:
        trainee.begin(trainee.inputs(next(iter(data.batches(config.batch_size, seed=config.seed)))))
    sums, counted, began = torch.zeros(4), 0, time.perf_counter()
    for step, raw in zip(
        range(first, config.steps), data.batches(config.batch_size, seed=config.seed, start=first), strict=False
    ):
        x = trainee.inputs(raw)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(step, config)
        optimizer.zero_grad()
        result = trainee(x)
        result.loss.backward()
        optimizer.step()
        trainee.constrain()
        l0 = result.l0.item()
        if steers:
            trainee.steer(l0, target)
        variance = ((raw - data.mean) / trainee.error_unit).square().sum() / len(raw)
        sums += torch.stack([result.loss.detach(), result.squared_error.detach(), variance, result.l0])
        counted += 1
        done = step + 1
        if done % LOG_EVERY == 0 or done == config.steps:
            loss, squared_error, variance, l0 = (sums / counted).tolist()
            if not math.isfinite(loss):
                raise ValueError(f"{name}: the loss is {loss} at step {done}; lower the learning rate ({config.lr})")
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
            sums, counted = torch.zeros(4), 0
        if folder is not None and done % config.checkpoint_every == 0 and done < config.steps:
            folder.checkpoint(trainee, optimizer, done)
        if progress is not None:
            progress(name, done, config.steps)


def _activations(store: Store, batch_size: int = 2048) -> Iterator[Tensor]:
    for x, _ in store.iterate(batch_size):
        yield x


def _unit(data: Store, config: FinetuneConfig) -> float:
    """Root mean square of a coordinate of the centred activations: what training takes as 1."""
    total = rows = 0
    for x in islice(data.batches(config.batch_size, seed=config.seed), 4):
        total += float((x - data.mean).double().square().sum())
        rows += len(x)
    return math.sqrt(total / (rows * data.d_in))


def _ready_to_train(sae: SAE[Any], data: Store, config: FinetuneConfig, l0: float) -> SAE[Any]:
    """An SAE in the form that trains: a rational gate with a positive threshold for each latent, a TopK with unit rows."""
    if sae.cfg.architecture() == "topk" and sae.cfg.rescale_acts_by_decoder_norm:
        return without_rescaling(sae)
    if not isinstance(sae, RationalSAE) or sae.gate.threshold is None or "thresholds" in config.frozen:
        return sae
    sae = copy.deepcopy(sae)
    gate = sae.gate
    assert gate.threshold is not None
    sample = list(islice(data.batches(config.batch_size, seed=config.seed), 8))
    if gate.alpha == 1:
        gate.threshold.data.mul_(calibrate_threshold(sae, sample, l0) / gate.threshold.median())
    elif not bool((gate.threshold > 0).all()):
        # In proportion to each latent's own size, so that none is silenced; the common factor keeps the larger activations,
        # since what l1 shrank to little more than nothing is what a threshold is there to leave out
        typical = _mean_active(sae, sample)
        gate.threshold.data.copy_(torch.where(gate.threshold > 0, gate.threshold, typical))
        matched = match_l0(sae, sample, RELU_START * l0)
        assert isinstance(matched, RationalSAE)
        sae, gate = matched, matched.gate
    if gate.alpha in (0, 1):  # what lies between was trained so
        gate.k, gate.alpha = (max(1, round(l0)), config.alpha) if config.alpha else (None, 0.0)
    sae.sync_config()
    return sae


@torch.no_grad()
def _mean_active(sae: SAE[Any], sample: list[Tensor]) -> Tensor:
    """Mean positive pre-activation of each latent, (d_sae,); of one that has none, the median latent's."""
    total = count = torch.zeros(sae.cfg.d_sae)
    for x in sample:
        h = pre_acts(sae, x)
        total, count = total + h.relu().sum(0), count + (h > 0).sum(0)
    mean = total / count
    return torch.where(count > 0, mean, mean[count > 0].median())


def _hash_of(sae: SAE[Any]) -> str:
    """Short hash of an SAE's weights and of what its configuration says about the function they make."""
    cfg = {name: value for name, value in sae.cfg.to_dict().items() if name not in ("metadata", "device", "dtype")}
    digest = hashlib.sha256(json.dumps(cfg, sort_keys=True, default=str).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().numpy().data)
    return digest.hexdigest()[:16]


class _Folder:
    """A fine-tuning run on disk: finetune.json (what it is, and whether it is done), log.jsonl, checkpoint, result."""

    def __init__(self, path: Path, inputs: dict[str, Any]) -> None:
        self.path, self.hash = path, config_hash(inputs)
        about = path / "finetune.json"
        if about.exists():
            found = read_json(about)
            if found["hash"] != self.hash:
                raise ValueError(
                    f"{path} holds another run (its inputs or settings differ): choose another folder or delete it"
                )
            self.done = bool(found["done"])
        elif path.exists() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no fine-tuning run: choose another folder")
        else:
            self.done = False
            self._about = {"hash": self.hash, "done": False, **inputs, "provenance": provenance()}
            write_json(about, self._about)
        self._about = read_json(about)

    def finished(self) -> SAE[Any] | None:
        """The result, if the run is done."""
        return load_teacher(self.path).sae if self.done else None

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to log.jsonl."""
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def checkpoint(self, trainee: Trainee, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write everything that the rest of the run depends on."""
        tensors = {f"model.{name}": tensor for name, tensor in trainee.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": tensor for name, tensor in state.items()}
        write_safetensors(self.path / "checkpoint.safetensors", tensors, {"step": str(step)})

    def restore(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> int:
        """Load the last checkpoint if there is one; the step to go on from. Log lines after it are dropped."""
        file, log = self.path / "checkpoint.safetensors", self.path / "log.jsonl"
        step = 0
        if file.exists():
            with safe_open(file, "pt") as checkpoint:
                step = int(checkpoint.metadata()["step"])
                tensors = {name: checkpoint.get_tensor(name) for name in checkpoint.keys()}  # noqa: SIM118
            trainee.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith("adam."):
                    _, index, name = key.split(".")
                    state.setdefault(int(index), {})[name] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        if log.exists():
            rows = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
            with atomic(log) as temporary:
                temporary.write_text("".join(row + "\n" for row in rows))
        return step

    def finish(self, sae: SAE[Any]) -> None:
        """Save the result and mark the run as done."""
        save_sae(sae, self.path)
        write_json(self.path / "finetune.json", {**self._about, "done": True})
        (self.path / "checkpoint.safetensors").unlink(missing_ok=True)
