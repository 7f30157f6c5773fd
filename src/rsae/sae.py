"""RationalSAE: a SAELens sparse autoencoder whose gate is a trainable rational. Registered with SAELens as "rational".

SAELens saves it (cfg.json + sae_weights.safetensors), loads it, hooks it into models and evaluates it like its own. The scalars of
the gate live in cfg.json, in full precision and readable: SAELens casts every tensor of the weights file to the dtype asked for.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, register_sae_class
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn
from typing_extensions import Self

from rsae.minimax import RationalFit, fit_gate
from rsae.rational import RationalGate, Support

S = TypeVar("S", bound=SAE[Any])

# The design threshold and half gap of the rational for jumps: C_in,j = theta_j / THETA puts 1/THETA thresholds into [-1, 1].
THETA, DELTA = 0.1, 0.005
DEFAULT_DEGREE = {"standard": (3, 2), "jumprelu": (9, 8), "topk": (9, 8), "gated": (9, 8)}


@dataclass
class RationalSAEConfig(SAEConfig):
    """Configuration of a RationalSAE, as SAELens writes it to cfg.json.

    The default gate is the identity above a threshold of 0: a ReLU.
    """

    num_coeffs: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Of P, ascending powers of u = (h/C_in - centre)/scale."""
    den_coeffs: list[float] = field(default_factory=list)
    """Of A, ascending powers from the first; the denominator is 1 + |A|."""
    centre: float = 0.0
    scale: float = 1.0
    C_in: float | None = 1.0
    """Scale of the input of the gate; None: one for each latent, in the weights file."""
    C_out: float | None = 1.0
    """Scale of its output; None: one for each latent, in the weights file."""
    support: Support = "hard"
    """"hard": latents at or below their threshold are exactly 0. "dense": none is."""
    k: int | None = None
    """Rank of the pre-activation that a sample's own threshold follows (a TopK teacher's rule), or None."""
    alpha: float = 0.0
    """How far it follows it: threshold_j * s(x)^alpha, s(x) the k-th largest h/threshold. 1: TopK. 0: JumpReLU."""

    @classmethod
    def architecture(cls) -> str:
        return "rational"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Self:
        """As SAELens reads cfg.json, but with a ValueError for a key that it would drop in silence."""
        known = {f.name for f in fields(cls)} | {"architecture", "finetuning_scaling_factor"}
        if unknown := sorted(set(config_dict) - known):
            raise ValueError(f"cfg.json of a rational SAE has unknown keys {unknown}; known are {sorted(known)}")
        return super().from_dict(config_dict)


class RationalSAE(SAE[RationalSAEConfig]):
    """latents = gate(W_enc^T (x - b_dec) + b_enc); x_hat = W_dec^T latents + b_dec.

    b_dec is subtracted and the input normalised as `cfg.apply_b_dec_to_input` and `cfg.normalize_activations` say.

    Shapes: W_enc (d_in, d_sae), b_enc (d_sae,), W_dec (d_sae, d_in), b_dec (d_in,).
    """

    b_enc: nn.Parameter
    gate: RationalGate

    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        per_latent = torch.ones(cfg.d_sae)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=self.dtype, device=self.device))
        self.gate = RationalGate(
            cfg.num_coeffs,
            cfg.den_coeffs,
            centre=cfg.centre,
            scale=cfg.scale,
            C_in=per_latent if cfg.C_in is None else cfg.C_in,
            C_out=per_latent if cfg.C_out is None else cfg.C_out,
            support=cfg.support,
            threshold=None if cfg.support == "dense" else per_latent if cfg.alpha > 0 else torch.zeros(cfg.d_sae),
            k=cfg.k,
            alpha=cfg.alpha,
            device=self.device,
        )

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return lambda h: self.gate(h)

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations h, what the gate sees."""
        return self.process_sae_in(x) @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of activations x."""
        return self.hook_sae_acts_post(self.gate(self.hook_sae_acts_pre(self.pre_acts(x))))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction x_hat from latents."""
        out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(out), self.d_head)

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Make the rows of W_dec unit vectors without changing the reconstruction.

        With n = ||W_dec[j]|| the pre-activation becomes n h, and n phi(h) has to come out: the gate is not homogeneous, so its
        scales carry n (C_in, C_out and the threshold are multiplied by it, and become per latent). A sample's own threshold
        is the k-th largest h/threshold, which folding does not change.

        Raises:
            NotImplementedError: a dense gate with k, and norms that differ: there the k-th largest is one of h itself.
        """
        norms = self.get_W_dec_norm().float()
        if self.gate.support == "dense" and self.gate.k is not None and not torch.allclose(norms, norms[:1], rtol=1e-4):
            raise NotImplementedError(
                "folding unequal decoder norms would change the order of a dense gate's pre-activations, and with it each "
                "sample's threshold; use hard support, or one calibrated threshold (rsae.calibrate.calibrate_threshold)"
            )
        self.fold_and_get_W_dec_norm()
        if self.gate.support == "hard" or self.gate.k is None:  # else each sample's own threshold carries n already
            self.gate.C_in = nn.Parameter(self.gate.C_in * norms)
            self.gate.C_out = nn.Parameter(self.gate.C_out * norms)
        if self.gate.threshold is not None:
            self.gate.threshold = nn.Parameter(self.gate.threshold * norms)
        self.sync_config()

    def sync_config(self) -> None:
        """Write the gate's scalars into cfg, where they are kept on disk."""
        gate = self.gate
        self.cfg = replace(
            self.cfg,
            num_coeffs=gate.num_coeffs.tolist(),
            den_coeffs=gate.den_coeffs.tolist(),
            C_in=None if gate.C_in.ndim else gate.C_in.item(),
            C_out=None if gate.C_out.ndim else gate.C_out.item(),
            support=gate.support,
            k=gate.k,
            alpha=gate.alpha,
        )

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        self.sync_config()
        for name in ("num_fit", "den_fit", "num_relative", "den_relative"):
            del state_dict[f"gate.{name}"]
        for name in ("C_in", "C_out"):
            if getattr(self.cfg, name) is not None:
                del state_dict[f"gate.{name}"]
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        cfg, device = self.cfg, state_dict["W_enc"].device
        for name, coeffs in (("num", cfg.num_coeffs), ("den", cfg.den_coeffs)):
            state_dict[f"gate.{name}_fit"] = torch.tensor(coeffs, dtype=torch.float32, device=device)
            state_dict[f"gate.{name}_relative"] = torch.zeros(len(coeffs), device=device)
        for name in ("C_in", "C_out"):
            if (value := getattr(cfg, name)) is not None:
                state_dict[f"gate.{name}"] = torch.tensor(value, dtype=torch.float32, device=device)
        for name in ("gate.C_in", "gate.C_out", "gate.threshold"):
            if name in state_dict:
                state_dict[name] = state_dict[name].float()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickling and copying by config and weights: SAELens' own modules hold lambdas, which cannot be pickled."""
        return _rebuild, (copy.deepcopy(self.cfg), self.state_dict(), self._use_error_term)

    @classmethod
    def from_teacher(
        cls,
        teacher: SAE[Any],
        degree: tuple[int, int] | None = None,
        *,
        support: Support = "hard",
        threshold: float | None = None,
        C_in: float = 1.0,
    ) -> RationalSAE:
        """A RationalSAE that does what `teacher` does: stage 1 of the method, before any data is seen.

        Weights are copied bit for bit (a gated SAE's as those of the JumpReLU that it is, `as_jumprelu`). A JumpReLU's threshold
        theta_j goes into per-latent scales, by
        JumpReLU_theta(h) = theta JumpReLU_1(h/theta): C_in,j = C_out,j = theta_j / 0.1, so one rational serves all latents.
        Hard support starts as the identity t = (t Q)/Q on the teacher's own support, Q the denominator of the gate's best fit:
        its latents are the teacher's, to float32 rounding. Dense support starts as the best fit itself.

        Args:
            teacher: a SAELens StandardSAE, JumpReLUSAE, TopKSAE or GatedSAE.
            degree: (p, q); default (3, 2) for ReLU and (9, 8) for the others, as in the paper.
            support: "hard" (exact zeros) or "dense" (the paper's).
            threshold: for TopK: one calibrated threshold for all samples, instead of each sample's k-th largest.
            C_in: for ReLU and TopK: the size of a large pre-activation, which is where the design interval ends.
                `rsae.calibrate.calibrate` finds it from data.

        Raises:
            ValueError: another architecture, weights that are not finite, a degree that cannot hold the gate.
        """
        family = teacher.cfg.architecture()
        if family not in DEFAULT_DEGREE:
            raise ValueError(
                f"from_teacher upgrades {', '.join(DEFAULT_DEGREE)}; this teacher is {family!r}. "
                "Save it as jumprelu first if it has a threshold for each latent"
            )
        for name, tensor in teacher.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"the teacher's {name} holds nan or inf: the checkpoint is damaged or overflowed its dtype"
                )
        if family == "gated":
            teacher = as_jumprelu(teacher)
        if family == "topk" and teacher.cfg.rescale_acts_by_decoder_norm:
            teacher = without_rescaling(teacher)
        if threshold is not None and (family != "topk" or threshold <= 0):
            raise ValueError(f"a threshold is for a TopK teacher, and positive; got {threshold} for a {family} teacher")
        degree = degree or DEFAULT_DEGREE[family]
        k = teacher.cfg.k if family == "topk" and threshold is None else None
        d_sae = teacher.cfg.d_sae

        theta: Tensor | None = None
        if family in ("jumprelu", "gated"):
            theta = teacher.state_dict()["threshold"].detach().float().clamp(min=0)
        elif threshold is not None:
            theta = torch.full((d_sae,), float(threshold), device=teacher.W_enc.device)
        scales: float | Tensor = C_in
        if theta is not None:
            # A latent whose threshold is 0 is a ReLU. Hard support has it exactly at any scale; a dense jump at a tiny
            # threshold, with the gate's own slope 1 beyond the design interval, is as good as one. Most thresholds may be
            # those of dead latents, far above the others: with hard support each is its own latent's scale
            typical = theta[theta > 0].median() if bool((theta > 0).any()) else theta.new_tensor(C_in * THETA)
            least, instead = (1e-12 * typical, typical) if support == "hard" else (1e-3 * typical, 1e-3 * typical)
            scales = torch.where(theta > least, theta, instead) / THETA
        elif k is not None and support == "dense":
            scales = 1.0 / THETA  # times the sample's own threshold, in the gate

        is_jump = theta is not None or k is not None
        fit = fit_gate("jumprelu", degree, theta=THETA, delta=DELTA) if is_jump else fit_gate("relu", degree)
        num_coeffs = identity_numerator(fit) if support == "hard" else fit.num_coeffs
        per_latent = isinstance(scales, Tensor)
        cfg = RationalSAEConfig(
            d_in=teacher.cfg.d_in,
            d_sae=d_sae,
            dtype=teacher.cfg.dtype,
            device=teacher.cfg.device,
            apply_b_dec_to_input=teacher.cfg.apply_b_dec_to_input,
            normalize_activations=teacher.cfg.normalize_activations,
            reshape_activations=teacher.cfg.reshape_activations,
            metadata=SAEMetadata.from_dict({**teacher.cfg.metadata.to_dict(), "rsae_teacher_architecture": family}),
            num_coeffs=[float(a) for a in num_coeffs],
            den_coeffs=[float(b) for b in fit.den_coeffs],
            centre=float(fit.centre),
            scale=float(fit.scale),
            C_in=None if per_latent else float(scales),
            C_out=None if per_latent else float(scales),
            support=support,
            k=k,
            alpha=1.0 if k is not None and support == "hard" else 0.0,
        )
        sae = cls(cfg)
        with torch.no_grad():
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                getattr(sae, name).copy_(getattr(teacher, name))
            if per_latent:
                sae.gate.C_in.copy_(scales)
                sae.gate.C_out.copy_(scales)
            if sae.gate.threshold is not None and (theta is not None or k is not None):
                # With alpha = 1 only the ratios of thresholds matter, and a TopK's are equal
                sae.gate.threshold.copy_(theta if theta is not None else torch.tensor(1.0))
        return sae


def identity_numerator(fit: RationalFit) -> list[float]:
    """Coefficients of P = t Q(u) in powers of u, t = centre + scale u, padded to degree p: then P/Q is the identity.

    Raises:
        ValueError: p < q + 1, where the identity does not fit.
    """
    p, q = fit.degree
    if p < q + 1:
        raise ValueError(
            f"hard support starts as the identity t Q(t) / Q(t), which needs degree p >= q + 1; got ({p}, {q}). "
            f"Use degree ({q + 1}, {q}), or support='dense'"
        )
    Q = [1.0, *(float(b) for b in fit.den_coeffs)]
    product = [fit.centre * a + fit.scale * b for a, b in zip([*Q, 0.0], [0.0, *Q], strict=True)]
    return product + [0.0] * (p + 1 - len(product))


def save_sae(sae: SAE[Any], folder: str | Path) -> None:
    """Save a SAELens checkpoint; each of its two files is written whole, then put in its place."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        for file in sae.save_model(scratch):
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(file, folder / file.name)


def copied(sae: S) -> S:
    """A copy that shares nothing: SAELens normalises and reshapes by functions that are bound to the SAE they were made for."""
    copy_ = copy.deepcopy(sae)
    copy_._setup_activation_normalization()
    if copy_.cfg.reshape_activations == "hook_z":
        copy_.turn_on_forward_pass_hook_z_reshaping()
    return copy_


def without_rescaling(teacher: SAE[Any]) -> SAE[Any]:
    """The same TopK with unit decoder rows, for which rescaling by the decoder norm does nothing."""
    teacher = copied(teacher)
    norms = teacher.W_dec.norm(dim=-1)
    if not torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
        teacher.fold_W_dec_norm()
    return teacher


def as_jumprelu(teacher: SAE[Any]) -> SAE[Any]:
    """The same function as a gated SAE, as a JumpReLUSAE.

    Both paths of a gated SAE are affine in the same projection: the gate opens where W x + b_gate > 0, and what passes is
    m = exp(r_mag) W x + b_mag where that is positive. So it is a JumpReLU of m with threshold max(0, b_mag - exp(r_mag) b_gate)
    (Rajamanoharan et al., 2024, arXiv:2404.16014, section 2.2): the gating path decides, the magnitude path is the amplitude.
    """
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    weights = teacher.state_dict()
    slope = weights["r_mag"].exp()
    shared = {f.name: getattr(teacher.cfg, f.name) for f in fields(JumpReLUSAEConfig)}
    sae = JumpReLUSAE(JumpReLUSAEConfig(**shared))
    sae.load_state_dict(
        {
            "W_enc": weights["W_enc"] * slope,
            "b_enc": weights["b_mag"],
            "threshold": (weights["b_mag"] - slope * weights["b_gate"]).clamp(min=0),
            "W_dec": weights["W_dec"],
            "b_dec": weights["b_dec"],
        }
    )
    return sae


def _rebuild(cfg: RationalSAEConfig, state_dict: dict[str, Tensor], use_error_term: bool) -> RationalSAE:
    sae = RationalSAE(cfg)
    sae._use_error_term = use_error_term
    sae.load_state_dict(state_dict)
    return sae


register_sae_class("rational", RationalSAE, RationalSAEConfig)
