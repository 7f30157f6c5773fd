"""What is trained: an SAE's parameters in training units, and one step's loss, by kind of gate.

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
import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rsae import kernels, sparse
from rsae.calibrate import is_active
from rsae.cpu import prefers_bfloat16
from rsae.mesh import ALONE, Mesh, is_per_latent
from rsae.rational import RationalGate, hard_edge, sample_scale
from rsae.sae import RationalSAE, copied

if TYPE_CHECKING:
    from sae_lens import SAE

    from rsae.finetune import FinetuneConfig, Part

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
        is_far = not reads_about_0(sae)
        if not is_far and sae.cfg.normalize_activations not in NORMALISED:
            is_far = float((sae.b_dec.detach().float().cpu() - mean.cpu()).abs().max()) > FAR * unit
        return cls(fold, mean if is_far else None)


AS_IT_IS = Form()


def _row_norms(sae: SAE[Any]) -> Float[Tensor, " d_sae"]:
    return torch.linalg.vector_norm(sae.W_dec.detach(), dim=1, dtype=torch.float32)


def rows_differ_from_1(sae: SAE[Any]) -> bool:
    """Whether any row of W_dec has a norm that is nearer to another power of two. Those that are made unit first have none."""
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return False
    return bool((_row_norms(sae).log2().abs() > 0.5).any())


def reads_about_0(sae: SAE[Any]) -> bool:
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
        return self.mesh.latents.sum(z.count_nonzero() / len(x))

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch d_in"]) -> Step:
        """Loss of a batch, as `inputs` gives it."""

    @torch.no_grad()
    def constrain(self) -> None:
        """After an optimizer step: decoder rows back to their norms."""
        if not self.W_dec.requires_grad:
            return
        if (lib := kernels.usable(self.W_dec, self.norms)) is not None:
            lib.rescale_rows(self.W_dec, self.norms)
        else:
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
