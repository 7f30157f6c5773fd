"""The rational gate: its evaluation with a hand-written gradient, its hard edge, and the module that holds both.

    phi(h) = C_out * (P(u) / (1 + |A(u)|) + relu(h/C_in - 1))        u = (clamp(h/C_in, -1, 1) - centre) / scale

P has degree p and A degree q without constant term, so the denominator Q = 1 + |A| is never below 1 (the "safe Padé" form of
Molina et al., 2020, arXiv:1907.06732). Outside the design interval [-1, 1] the gate goes on with the slopes of the gates that it
replaces, 0 below and 1 above. Written in u, with `centre` where Q is smallest, float32 is enough; in h/C_in it is not.

Knows torch and the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rsae import kernels

# Elements worked on at a time: the few temporaries of a chunk stay in cache, and memory does not grow with the degree.
CHUNK = 1 << 16
# The least scale of a sample: all positive pre-activations are above it
SMALLEST = torch.finfo(torch.float32).tiny ** 0.5

Support = Literal["dense", "hard"]


def _horner(coeffs: Tensor, u: Tensor) -> Tensor:
    """sum_i coeffs[i] u^i."""
    value = torch.full_like(u, 0.0).add_(coeffs[-1])
    for coefficient in coeffs[:-1].flip(0):
        value.mul_(u).add_(coefficient)
    return value


def _derivative(coeffs: Tensor) -> Tensor:
    """Coefficients of the derivative of sum_i coeffs[i] u^i; one zero for a constant."""
    if len(coeffs) == 1:
        return torch.zeros_like(coeffs)
    return coeffs[1:] * torch.arange(1, len(coeffs), dtype=coeffs.dtype, device=coeffs.device)


class _Rational(torch.autograd.Function):
    """phi(h) and its gradient in h, the coefficients, C_in and C_out, over a list of chunks of equal shapes.

    With t = h/C_in, r = P/Q, w = C_out * grad / Q, and [.] an indicator:

        dh      = grad * C_out/C_in * r'(t)            r'(t) = [|t| < 1] (P' - r sgn(A) A') / (Q scale) + [t > 1]
        dC_in   = -grad * C_out/C_in * r'(t) * t
        dC_out  = grad * phi / C_out
        da_i    = sum w u^i                            db_j = -sum w r sgn(A) u^j
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, num: Tensor, den: Tensor, C_in: Tensor, C_out: Tensor, centre: float, scale: float
    ) -> Tensor:
        ctx.save_for_backward(h, num, den, C_in, C_out)
        ctx.centre, ctx.scale = centre, scale
        dtype = _working_dtype(h)
        num, den = num.to(dtype), _with_zero(den.to(dtype))
        if (lib := _kernels(h, num, den, C_in, C_out)) is not None:
            return lib.rational_forward(h, C_in, C_out, num, den, centre, scale)
        out = torch.empty_like(h)
        for h_i, C_in_i, C_out_i, out_i in _chunks(h, C_in, C_out, out):
            h_i, C_in_i, C_out_i = h_i.to(dtype), C_in_i.to(dtype), C_out_i.to(dtype)
            u = (h_i / C_in_i).clamp_(-1, 1).sub_(centre).div_(scale)
            r = _horner(num, u).div_(_horner(den, u).abs_().add_(1))
            # relu(h - C_in) / C_in, and not relu(h/C_in - 1): h/C_in may overflow where its product with C_out does not
            out_i.copy_(r.mul_(C_out_i).add_((h_i - C_in_i).relu_().mul_(C_out_i / C_in_i)))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        h, num, den, C_in, C_out = ctx.saved_tensors
        (grad,) = grad_outputs
        dtype = _working_dtype(h)
        a, b = num.to(dtype), _with_zero(den.to(dtype))
        a_prime, b_prime = _derivative(a), _derivative(b)
        if (lib := _kernels(h, grad := grad.contiguous(), a, b, C_in, C_out)) is not None:
            d_h, d_C_in, d_C_out, d_num, d_den = lib.rational_backward(
                h, grad, C_in, C_out, a, a_prime, b, b_prime, ctx.centre, ctx.scale
            )
            return d_h, d_num.to(num.dtype), d_den[1:].to(den.dtype), d_C_in, d_C_out, None, None
        d_num, d_den = torch.zeros_like(a), torch.zeros_like(b)
        d_h = torch.empty_like(h)
        d_C_in, d_C_out = torch.zeros_like(C_in, dtype=dtype), torch.zeros_like(C_out, dtype=dtype)
        for h_i, g, C_in_i, C_out_i, d_h_i, d_C_in_i, d_C_out_i in _chunks(h, grad, C_in, C_out, d_h, d_C_in, d_C_out):
            h_i, g, C_in_i, C_out_i = h_i.to(dtype), g.to(dtype), C_in_i.to(dtype), C_out_i.to(dtype)
            t = h_i / C_in_i
            above = t > 1
            u = t.clamp(-1, 1).sub_(ctx.centre).div_(ctx.scale)
            A = _horner(b, u)
            sign, Q = A.sign(), A.abs().add_(1)
            r = _horner(a, u).div_(Q)
            slope = (_horner(a_prime, u) - r * sign * _horner(b_prime, u)).div_(Q).div_(ctx.scale)
            slope = torch.where(above, 1.0, torch.where(t > -1, slope, 0.0))
            through = g * (C_out_i / C_in_i) * slope
            d_h_i.copy_(through)
            _add_reduced(d_C_in_i, -through * t)
            _add_reduced(d_C_out_i, g * (r + (t - 1).relu_()))
            w = g * C_out_i / Q
            power = w
            for i in range(len(a)):
                d_num[i] += power.sum()
                power = power * u if i + 1 < len(a) else power
            power = -w * r * sign
            for j in range(1, len(b)):
                power = power * u
                d_den[j] += power.sum()
        return (
            d_h,
            d_num.to(num.dtype),
            d_den[1:].to(den.dtype),
            d_C_in.to(C_in.dtype),
            d_C_out.to(C_out.dtype),
            None,
            None,
        )


def _kernels(h: Tensor, *others: Tensor) -> kernels.Kernels | None:
    """The kernels, if they take these: scales are for all entries or for each."""
    C_in, C_out = others[-2:]
    fits = (
        h.numel() > 0
        and (h.is_cuda or h.numel() < 2**31)
        and all(C.ndim == 0 or C.shape == h.shape for C in (C_in, C_out))
    )
    return kernels.usable(h, *others) if fits else None


def _working_dtype(h: Tensor) -> torch.dtype:
    """float32 for anything narrower, float64 for float64."""
    return torch.promote_types(h.dtype, torch.float32)


def _with_zero(den: Tensor) -> Tensor:
    """The coefficients of A with its absent constant term."""
    return torch.cat([den.new_zeros(1), den])


def _chunks(h: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Views of `h` and of tensors that broadcast to it, cut along the first axis into pieces of about CHUNK elements."""
    if h.ndim == 0 or h.numel() == 0:
        return [(h, *others)] if h.ndim == 0 else []
    rows = max(1, CHUNK * h.shape[0] // h.numel())
    pieces = [tensor.split(rows) if _has_rows(tensor, h) else None for tensor in (h, *others)]
    n = len(pieces[0] or ())
    return [
        tuple(piece[i] if piece is not None else tensor for piece, tensor in zip(pieces, (h, *others), strict=True))
        for i in range(n)
    ]


def _has_rows(tensor: Tensor, h: Tensor) -> bool:
    """Whether `tensor` runs along the first axis of `h`, and is not broadcast over it."""
    return tensor.ndim == h.ndim and tensor.shape[0] == h.shape[0] and (h.shape[0] > 1 or tensor.shape == h.shape)


def _add_reduced(total: Tensor, terms: Tensor) -> None:
    """Add to `total` the sum of `terms` over the axes that `total` was broadcast along."""
    total.add_(terms.sum_to_size(total.shape))


def rational(
    h: Float[Tensor, "*batch"],
    num_coeffs: Float[Tensor, " p_plus_1"],
    den_coeffs: Float[Tensor, " q"],
    C_in: Float[Tensor, "*#batch"],
    C_out: Float[Tensor, "*#batch"],
    centre: float,
    scale: float,
) -> Float[Tensor, "*batch"]:
    """phi(h), element by element, with gradients in h, both sets of coefficients, C_in and C_out.

    Args:
        h: pre-activations, any shape and floating dtype. float16 and bfloat16 are worked on in float32.
        num_coeffs: of P, ascending powers of u, length p + 1.
        den_coeffs: of A, ascending powers of u from the first, length q.
        C_in, C_out: positive, of a shape that broadcasts to h's.
        centre, scale: u = (t - centre) / scale.

    Returns:
        phi(h) in the dtype of h.
    """
    centre, scale = float(centre), float(scale)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (h, num_coeffs, den_coeffs, C_in, C_out))
    if h.ndim > 1 and h.dtype != torch.float64 and (learns or h.is_cuda):
        # As a list of entries the kernels take it, several times as fast; for that each has its own scales
        entries = (h if h.is_cuda else h.float()).reshape(-1)
        if kernels.usable(entries) is not None:
            C_in, C_out = (C if C.ndim == 0 else C.float().expand(h.shape).reshape(-1) for C in (C_in, C_out))
            listed = _Rational.apply(entries, num_coeffs, den_coeffs, C_in, C_out, centre, scale)
            return listed.view(h.shape).to(h.dtype)  # type: ignore[union-attr]
    return _Rational.apply(h, num_coeffs, den_coeffs, C_in, C_out, centre, scale)  # type: ignore[return-value]


@dataclass(frozen=True)
class Surrogate:
    """How a gradient is got across the hard edge, where the true one is zero almost everywhere and a jump at the threshold."""

    kind: Literal["rectangle", "jump-corrected"] = "jump-corrected"
    bandwidth: float = 0.5
    """Width of the window about the threshold, in units of the threshold."""
    strength: float = 0.2
    """Share of the edge's gradient that goes to the pre-activation (all of it goes to the threshold)."""
    price: float | None = None
    """What an active latent costs, in units of the loss. None: the price at which the batch's signals sum to zero, so that
    the edge exchanges latents but does not change how many there are."""
    crowding: float = 320.0
    """How fast a latent's price rises with its share s of all that is active: price (1 + crowding s). s is the latent's firing
    rate over L0, so that the same number is as strong at every L0."""
    sparing: float = 0.0
    """A latent that is active r times as often as the average one pays r / (r + sparing) of that: what is rarely active is not
    driven out."""

    def weights(self, share: Float[Tensor, "*n"], often: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """What latents pay, in units of the price, by their shares s of all that is active and by r: `crowding` and `sparing`."""
        weights = 1 + self.crowding * share
        return weights * (often / (often + self.sparing)) if self.sparing else weights


class _HardEdge(torch.autograd.Function):
    """amplitude where `on`, else exactly 0, with a surrogate gradient in h and the threshold. See `hard_edge`."""

    @staticmethod
    def forward(
        ctx: Any,
        amplitude: Tensor,
        h: Tensor,
        threshold: Tensor,
        on: Tensor,
        surrogate: Surrogate,
        curvature: Tensor | None,
        weight: Tensor | None,
        total: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(amplitude, h, threshold, on, curvature, weight)
        ctx.surrogate, ctx.total = surrogate, total
        return amplitude * on

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        amplitude, h, threshold, on, curvature, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        surrogate: Surrogate = ctx.surrogate
        if surrogate.kind != "jump-corrected":
            curvature = None
        if (lib := _edge_kernels(h, amplitude, threshold, grad, curvature, weight)) is not None:
            gain, sums = lib.edge_gain(amplitude, h, threshold, on, grad, curvature, weight, surrogate.bandwidth)
            price = _price(sums, surrogate, ctx.total)
            found = lib.edge_backward(
                gain, h, threshold, on, grad, weight, price, surrogate.bandwidth, surrogate.strength
            )
            return *found, None, None, None, None, None
        width = surrogate.bandwidth * threshold
        window = _window(h - threshold, width)
        gain = amplitude * grad  # L_on - L_off, to first order
        if curvature is not None:
            gain = gain + torch.where(on, -1.0, 1.0) * curvature * amplitude**2
        weight = 1 if weight is None else weight
        price = _price(torch.stack([(window * gain).sum(), (window * weight).sum()]), surrogate, ctx.total)
        edge = window * (gain + price * weight) / torch.where(width > 0, width, 1.0)  # per unit of h
        d_h = surrogate.strength * edge if surrogate.strength else None
        d_threshold = (-edge * (h / torch.where(threshold > 0, threshold, 1.0))).sum_to_size(threshold.shape)
        return torch.where(on, grad, 0.0), d_h, d_threshold, None, None, None, None, None


def _edge_kernels(h: Tensor, *others: Tensor | None) -> kernels.Kernels | None:
    """The kernels, if they take these: a list of entries, with a threshold for each."""
    given = [h, *(t for t in others if t is not None)]
    fits = h.ndim == 1 and h.numel() > 0 and all(t.shape == h.shape for t in given)
    return kernels.usable(*given) if fits else None


def _price(
    sums: Float[Tensor, " 2"], surrogate: Surrogate, total: Callable[[Tensor], Tensor] | None
) -> Float[Tensor, ""]:
    """What one active latent of weight 1 costs, given the sums over the window of L_on - L_off and of the weights."""
    if surrogate.price is not None:
        return sums.new_full((), surrogate.price)
    signals, weights = sums if total is None else total(sums)
    return -signals / weights.clamp(min=1)


def _window(distance: Tensor, width: Tensor) -> Tensor:
    """width times the density K at that distance from the threshold: the rectangle."""
    return (distance.abs() < 0.5 * width).to(distance.dtype)


def hard_edge(
    amplitude: Float[Tensor, "*batch"],
    h: Float[Tensor, "*batch"],
    threshold: Float[Tensor, "*#batch"],
    on: Bool[Tensor, "*batch"],
    surrogate: Surrogate,
    curvature: Float[Tensor, "*#batch"] | None = None,
    weight: Float[Tensor, "*#batch"] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*batch"]:
    """Latents that are `amplitude` where `on` and exactly 0 elsewhere, with a surrogate gradient at the threshold.

    Derivation. Let the gate open not at theta but at theta (1 + b e), e a random number with density K: the loss smoothed so is

        L~(h) = F(v) L_on + (1 - F(v)) L_off        v = (h/theta - 1)/b,  F' = K,  b the bandwidth

    where L_on is the loss with latent j at its amplitude a = phi(h) and L_off the loss with it at 0. Hence

        dL~/dh     =  K(v)/(b theta)            * (L_on - L_off) + F(v) dL_on/dh
        dL~/dtheta = -K(v)/(b theta) * h/theta  * (L_on - L_off)

    The last term of the first line is the ordinary gradient (with the sample's own decision in place of F). For the squared
    error summed over d_in and averaged over B samples the jump is known exactly from the gradient g = dL/dz_j where we stand,
    because the loss is quadratic in z_j with second derivative 2 ||w_j||^2 / B:

        L_on - L_off = a g + a^2 ||w_j||^2 / B    where the latent is off (g taken at z_j = 0)
                     = a g - a^2 ||w_j||^2 / B    where it is on          (g taken at z_j = a)

    "jump-corrected" uses this, with K the rectangle on [-1/2, 1/2]; "rectangle" keeps a g alone, the first-order estimate of
    Rajamanoharan et al. (2024, arXiv:2407.14435). `price`, times the entry's `weight`, is added to L_on - L_off: the cost of one
    more active latent.

    Args:
        amplitude: phi(h) of every entry, active or not.
        h: pre-activations.
        threshold: positive where the edge is to learn; entries of threshold 0 get no gradient there.
        on: which latents are active. Usually h > threshold, but the caller decides.
        surrogate: kind, bandwidth, strength, price.
        curvature: ||w_j||^2 / B, for "jump-corrected".
        weight: of the price, what an entry's latent pays (`Surrogate.weights`); None: all pay alike.
        total: adds up what other processes have of the batch, where this is a part of it: the price is that of all.
    """
    if surrogate.kind == "jump-corrected" and curvature is None:
        raise ValueError(
            "the jump-corrected surrogate needs curvature = ||W_dec[j]||^2 / batch size; pass it, or use kind='rectangle'"
        )
    return _HardEdge.apply(amplitude, h, threshold, on, surrogate, curvature, weight, total)  # type: ignore[return-value]


class RationalGate(nn.Module):
    """The gate of a rational sparse autoencoder: phi(h) element by element, dense or with exact zeros.

    `support="dense"` is the gate of the paper: no latent is exactly 0. With `support="hard"` a latent is phi(h) where its
    pre-activation is above its threshold, and exactly 0 elsewhere. The threshold of latent j in sample x is

        theta_j * s(x)^alpha        s(x): the k-th largest h/theta of the sample

    alpha = 0 is a JumpReLU's rule and needs no k, alpha = 1 with equal theta_j is TopK, and what lies between adapts to how
    strongly a sample excites the dictionary. (s is the midpoint of the k-th and the next, so that k are above it.)
    A dense gate with `k` is scaled for each sample by that midpoint of its pre-activations: C_in and C_out are multiplied
    by it, so that one rational serves every threshold.

    The coefficients are trained relative to those of the fit, a_i = a_i0 (1 + alpha_i), because they span orders of
    magnitude; one that is 0 in the fit moves in units of the smallest that is not. They, C_in, C_out and the threshold stay
    float32 when the module is cast to something narrower.

    Args:
        num_coeffs, den_coeffs: the fit (ascending powers; den_coeffs without the leading 1 of Q).
        centre, scale: u = (t - centre) / scale, from the fit.
        C_in, C_out: positive scalars, or (d_sae,).
        support: "dense" or "hard".
        threshold: (d_sae,) or scalar, >= 0; required by hard support, where it is a parameter.
        k: rank of the pre-activation that sets a sample's threshold (TopK), or None.
        alpha: how far hard thresholds follow it, from 0 to 1; above 0 it needs k.

    Raises:
        ValueError: an empty numerator, a C that is not positive, a negative or missing threshold, k < 1.

    Example:
        >>> gate = RationalGate([0.0, 1.0], [], centre=0.0, scale=1.0, support="hard", threshold=0.5)
        >>> gate(torch.tensor([-1.0, 0.25, 0.75, 3.0])).tolist()
        [0.0, 0.0, 0.75, 3.0]
    """

    num_fit: Tensor
    den_fit: Tensor

    def __init__(
        self,
        num_coeffs: Sequence[float] | Tensor,
        den_coeffs: Sequence[float] | Tensor,
        *,
        centre: float = 0.0,
        scale: float = 1.0,
        C_in: float | Tensor = 1.0,
        C_out: float | Tensor = 1.0,
        support: Support = "dense",
        threshold: float | Tensor | None = None,
        k: int | None = None,
        alpha: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def float32(value: Any) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float32, device=device).clone()

        if support not in ("dense", "hard"):
            raise ValueError(f"support is 'dense' or 'hard'; got {support!r}")
        if len(num_coeffs) < 1 or scale == 0:
            raise ValueError(f"a gate needs num_coeffs and a scale that is not 0; got {len(num_coeffs)} and {scale}")
        if k is not None and k < 1:
            raise ValueError(f"k is the number of active latents per sample, at least 1; got {k}")
        if not 0 <= alpha <= 1 or (alpha > 0 and k is None):
            raise ValueError(f"alpha is from 0 to 1, and above 0 it needs k; got alpha={alpha}, k={k}")
        self.centre, self.scale, self.support, self.k, self.alpha = (
            float(centre),
            float(scale),
            support,
            k,
            float(alpha),
        )
        self.register_buffer("num_fit", float32(num_coeffs))
        self.register_buffer("den_fit", float32(den_coeffs))
        self.num_relative = nn.Parameter(torch.zeros_like(self.num_fit))
        self.den_relative = nn.Parameter(torch.zeros_like(self.den_fit))
        self.C_in = nn.Parameter(float32(C_in))
        self.C_out = nn.Parameter(float32(C_out))
        if support == "hard":
            if threshold is None:
                raise ValueError("hard support needs a threshold: 0 for a ReLU teacher, theta_j for a JumpReLU")
            self.threshold = nn.Parameter(float32(threshold))
        else:
            self.register_parameter("threshold", None)
        if not self.num_fit.is_meta:
            self.check()

    def check(self) -> None:
        """Raise a ValueError if a scale or a threshold has a value that it must not have, or the rational none in float32."""
        for name in ("C_in", "C_out"):
            value = getattr(self, name)
            if not bool((value > 0).all()):
                raise ValueError(f"{name} must be positive; its smallest value is {value.min().item()}")
        if self.threshold is not None and not bool((self.threshold >= 0).all()):
            raise ValueError(f"thresholds must be >= 0; the smallest is {self.threshold.min().item()}")
        if self.threshold is not None and self.alpha > 0 and not bool((self.threshold > 0).all()):
            raise ValueError("thresholds that follow the sample (alpha > 0) must be positive; some are 0")
        ends = (torch.tensor([-1.0, 1.0], device=self.num_fit.device) - self.centre) / self.scale
        for coeffs in (self.num_coeffs.detach().float(), self.den_coeffs.detach().float()):
            if len(coeffs) and bool(coeffs.isfinite().all()) and not bool(_horner(coeffs, ends).isfinite().all()):
                raise ValueError(
                    f"a rational of degree {self.degree} exceeds float32 at the ends of its interval: choose a lower one"
                )

    @torch.no_grad()
    def rebase(self) -> None:
        """Take the coefficients as trained for the fit that training is relative to, as they are when read from disk."""
        for fit, relative in ((self.num_fit, self.num_relative), (self.den_fit, self.den_relative)):
            fit += _unit(fit) * relative
            relative.zero_()

    @property
    def degree(self) -> tuple[int, int]:
        """(p, q)."""
        return len(self.num_fit) - 1, len(self.den_fit)

    @property
    def num_coeffs(self) -> Float[Tensor, " p_plus_1"]:
        """Coefficients of P as trained."""
        return self.num_fit + _unit(self.num_fit) * self.num_relative

    @property
    def den_coeffs(self) -> Float[Tensor, " q"]:
        """Coefficients of A as trained."""
        return self.den_fit + _unit(self.den_fit) * self.den_relative

    def amplitude(
        self,
        h: Float[Tensor, "*batch"],
        C_in: Float[Tensor, "*#batch"] | None = None,
        C_out: Float[Tensor, "*#batch"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """phi(h) without any edge. C_in and C_out may be given, for entries picked out of a batch."""
        C_in = self.C_in if C_in is None else C_in
        C_out = self.C_out if C_out is None else C_out
        return rational(h, self.num_coeffs, self.den_coeffs, C_in, C_out, self.centre, self.scale)

    def sample_threshold(
        self, h: Float[Tensor, "*batch d_sae"], largest: Callable[[Tensor, int], Tensor] | None = None
    ) -> Float[Tensor, "*batch d_sae"]:
        """Threshold of every latent in every sample, theta_j s(x)^alpha; (d_sae,) or scalar where samples do not matter.

        Where these are some latents of several shards, `largest(values, n)` gives the n largest of each sample over all.
        """
        assert self.threshold is not None
        if self.alpha == 0 or self.k is None:
            return self.threshold
        relative = h / self.threshold.detach()
        if largest is not None:
            relative = largest(relative, self.k + 1)
        return self.threshold * sample_scale(relative, self.k) ** self.alpha

    def forward(
        self,
        h: Float[Tensor, "*batch d_sae"],
        *,
        surrogate: Surrogate | None = None,
        curvature: Float[Tensor, " d_sae"] | None = None,
    ) -> Float[Tensor, "*batch d_sae"]:
        """Latents, in the dtype of h.

        Without `surrogate` hard support passes the ordinary gradient of the active latents and none at the edge.
        Hard support evaluates the rational on the active latents alone (with a surrogate, on all).
        """
        if self.support == "dense":
            if self.k is None:
                return self.amplitude(h)
            tau = sample_scale(h.to(self.C_in.dtype), self.k)
            return self.amplitude(h, self.C_in * tau, self.C_out * tau)
        on = self._is_on(h)
        if surrogate is not None:
            threshold = self.sample_threshold(h)
            active = on.to(h.dtype).view(-1, h.shape[-1]).sum(0)
            share = active / active.sum().clamp(min=1)
            weight = surrogate.weights(share, share * h.shape[-1])
            return hard_edge(self.amplitude(h), h, threshold, on, surrogate, curvature, weight)
        index = on.nonzero(as_tuple=True)
        values = self.amplitude(h[index], _at(self.C_in, index[-1]), _at(self.C_out, index[-1]))
        return torch.zeros_like(h).index_put(index, values)

    def _is_on(self, h: Float[Tensor, "*batch d_sae"]) -> Bool[Tensor, "*batch d_sae"]:
        """Which latents are active."""
        if self.alpha < 1 or self.k is None or self.k >= h.shape[-1]:
            return h > self.sample_threshold(h)
        # By rank, not by the midpoint of two: in bfloat16 the k-th largest often ties with the next, and no tie is above that
        assert self.threshold is not None
        among = (h.detach() / self.threshold.detach()).topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(h, dtype=torch.bool).scatter_(-1, among, True) & (h > 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RationalGate:
        """Moves between devices, and refuses to go below float32: bfloat16 coefficients would be another function."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        return f"degree={self.degree}, support={self.support!r}, k={self.k}, centre={self.centre:.6g}, scale={self.scale:.6g}"


def sample_scale(h: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch 1"]:
    """Midpoint of the k-th and the (k+1)-th largest of each sample, without a gradient; k are above it, or fewer if these two tie.

    A sample with fewer than k positive ones gets a tiny positive number, which all of its positive ones are above.
    """
    top = h.detach().topk(min(k + 1, h.shape[-1]), dim=-1).values
    edge = top[..., -2:].mean(-1, keepdim=True) if k < h.shape[-1] else torch.zeros_like(top[..., :1])
    return edge.clamp(min=SMALLEST)


def _unit(fit: Tensor) -> Tensor:
    """The step in which each coefficient is trained: its own size, or the smallest non-zero one where it is 0."""
    size = fit.abs()
    if size.numel() == 0:
        return size
    smallest = torch.where(size > 0, size, torch.inf).amin()
    return torch.where(size > 0, size, torch.where(smallest.isinf(), 1.0, smallest))


def _at(per_latent: Tensor, latents: Tensor) -> Tensor:
    """The value of each listed latent, of a tensor that is scalar or (d_sae,)."""
    return per_latent if per_latent.ndim == 0 else per_latent[latents]
