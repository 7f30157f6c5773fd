"""The gate against mpmath, gradcheck, finite differences of the smoothed loss, and laws that hold for every input."""

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from rsae.minimax import fit_gate
from rsae.rational import RationalGate, Surrogate, hard_edge, rational

DOUBLE = torch.float64
finite = st.floats(-1e4, 1e4, allow_nan=False, width=32)


def gate_from(fit, **kwargs):
    return RationalGate(fit.num_coeffs, fit.den_coeffs, centre=fit.centre, scale=fit.scale, **kwargs)


def phi_mpmath(h, fit, C_in=1.0, C_out=1.0):
    """The formula of the module's docstring, in 50 digits, from the fit's float64 coefficients."""
    with mpmath.workdps(50):
        t = mpmath.mpf(h) / C_in
        u = (max(-1, min(1, t)) - mpmath.mpf(fit.centre)) / mpmath.mpf(fit.scale)
        P = sum(mpmath.mpf(float(a)) * u**i for i, a in enumerate(fit.num_coeffs))
        A = sum(mpmath.mpf(float(b)) * u ** (j + 1) for j, b in enumerate(fit.den_coeffs))
        return float(C_out * (P / (1 + abs(A)) + max(mpmath.mpf(0), t - 1)))


@pytest.mark.parametrize(("theta", "delta"), [(0.1, 0.001), (0.1, 0.005), (0.1, 0.01), (0.4, 0.01), (0.02, 0.005)])
def test_float32_is_within_1e_6_of_mpmath_at_degree_9_8(theta, delta):
    fit = fit_gate("jumprelu", (9, 8), theta=theta, delta=delta)
    t = np.concatenate([np.linspace(-1.2, theta - delta, 200), np.linspace(theta + delta, 1.2, 200)]).astype(np.float32)
    exact = np.array([phi_mpmath(float(v), fit) for v in t])
    ours = gate_from(fit)(torch.from_numpy(t)).detach().numpy()
    assert np.abs(ours - exact).max() < 1e-6


def test_scales_and_extension_by_hand():
    # r(t) = t / (1 + |t|), C_in = 2, C_out = 3: phi(1) = 3 * 0.5/1.5 = 1; phi(4) = 3 * (1/2 + (2 - 1)); phi(-8) = 3 * (-1/2)
    gate = RationalGate([0.0, 1.0], [1.0], C_in=2.0, C_out=3.0)
    torch.testing.assert_close(gate(torch.tensor([1.0, 4.0, -8.0])), torch.tensor([1.0, 4.5, -1.5]))


def parameters(p, q, shape, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=DOUBLE)

    num, den = draw(p + 1), draw(q)
    C_in, C_out = (0.5 + torch.rand(shape, generator=generator, dtype=DOUBLE) for _ in range(2))
    return [tensor.requires_grad_() for tensor in (num, den, C_in, C_out)]


@pytest.mark.parametrize("shape", [(), (5,), (6, 1), (6, 5)])
@pytest.mark.parametrize(("p", "q"), [(1, 0), (3, 2), (5, 4), (9, 8), (2, 5)])
def test_gradcheck(p, q, shape):
    h = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).mul(1.5).requires_grad_()
    assert gradcheck(lambda *args: rational(*args, 0.1, 0.7), (h, *parameters(p, q, shape, seed=p + q)))


def test_gradcheck_beside_the_clamp_and_beside_a_sign_change_of_A():
    # A(u) = u - u^2 changes sign at u = 0 and u = 1; the clamp is at |t| = 1. Both sides of each, closer than any step of a fit
    num, den = torch.tensor([0.3, -1.0, 0.5], dtype=DOUBLE), torch.tensor([1.0, -1.0], dtype=DOUBLE)
    edges = torch.tensor(
        [-1.0, 0.1, 0.8, 1.0], dtype=DOUBLE
    )  # centre 0.1, scale 0.7: u = 0 and u = 1 at t = 0.1 and 0.8
    h = torch.cat([edges - 1e-4, edges + 1e-4]).requires_grad_()
    one = torch.ones((), dtype=DOUBLE)
    inputs = (h, num.requires_grad_(), den.requires_grad_(), one.clone().requires_grad_(), one.clone().requires_grad_())
    assert gradcheck(lambda *args: rational(*args, 0.1, 0.7), inputs, eps=1e-6)


def test_chunks_do_not_change_values_or_gradients(monkeypatch):
    h = torch.randn(37, 11, dtype=DOUBLE)
    results = []
    for chunk in (1 << 16, 25):
        monkeypatch.setattr("rsae.rational.CHUNK", chunk)
        inputs = [h.clone().requires_grad_(), *parameters(3, 2, (11,), seed=0)]
        out = rational(*inputs, 0.0, 1.0)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in inputs)])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole)


@settings(max_examples=200, deadline=None)
@given(
    den=st.lists(finite, min_size=1, max_size=8),
    h=st.lists(st.floats(-(2.0**100), 2.0**100, allow_nan=False, width=32), min_size=1, max_size=20),
    C=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_the_denominator_is_at_least_one_and_nothing_is_nan(den, h, C, seed):
    num = torch.randn(len(den) + 2, generator=torch.Generator().manual_seed(seed))
    h32 = torch.tensor(h)
    of_Q = RationalGate([1.0], den, C_in=C)((C * torch.linspace(-1, 1, 21)).clamp(max=C))
    assert bool(((of_Q > 0) & (of_Q <= 1)).all())
    gate = RationalGate(num, den, C_in=C, C_out=C)
    out = gate(h32.requires_grad_())
    assert not bool(out.isnan().any())
    # |P| is at most the sum of |a_i| on [-1, 1], Q at least 1, and above 1 the slope is 1
    assert bool((out.abs() <= 1.001 * C * num.abs().sum() + h32.abs() * 1.001).all())
    out.sum().backward()
    for tensor in (h32.grad, *(parameter.grad for parameter in gate.parameters())):
        assert tensor is not None
        assert not bool(tensor.isnan().any())


@settings(max_examples=100, deadline=None)
@given(a=st.floats(1.0, 1e6), b=st.floats(1.0, 1e6))
def test_beyond_the_design_interval_it_rises_with_slope_one_and_is_flat_below(a, b):
    gate = gate_from(fit_gate("jumprelu", (9, 8), theta=0.1, delta=0.01))
    low, high = sorted((a, b))
    y = gate(torch.tensor([low, high, -low, -high], dtype=DOUBLE))
    torch.testing.assert_close(y[1] - y[0], torch.tensor(high - low, dtype=DOUBLE), rtol=1e-6, atol=1e-9)
    assert y[2] == y[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_worked_on_in_float32(dtype):
    gate = gate_from(fit_gate("jumprelu", (9, 8), theta=0.1, delta=0.005))
    h = torch.linspace(-1, 1, 999).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gate(h)
    assert out.dtype == dtype
    # the same to the rounding of the result: lists of float32 go through the compiled kernels, which round otherwise
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(out, gate(h.float()).to(dtype), rtol=ulp, atol=1e-5)


def test_the_coefficients_stay_float32_when_the_module_is_cast():
    gate = gate_from(fit_gate("relu", (3, 2)), support="hard", threshold=torch.rand(4)).to(torch.bfloat16)
    assert {tensor.dtype for tensor in gate.state_dict().values()} == {torch.float32}
    assert {tensor.dtype for tensor in gate.double().state_dict().values()} == {DOUBLE}


def test_coefficients_move_relative_to_their_fit():
    gate = RationalGate([0.0, 1e-4, 100.0], [1e3])
    with torch.no_grad():
        gate.num_relative.fill_(0.5)
    # the one that is zero moves in units of the smallest that is not
    torch.testing.assert_close(gate.num_coeffs, torch.tensor([0.5e-4, 1.5e-4, 150.0]))


def test_no_tensor_of_batch_times_degree_is_built():
    """Peak memory of forward and backward does not grow with the degree."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.elements = max(Largest.elements, tensor.numel())
            return out

    gate = RationalGate(torch.randn(10), torch.randn(8))
    h = torch.randn(64, 512, requires_grad=True)
    with Largest():
        gate(h).sum().backward()
    assert Largest.elements == h.numel()


class TestHardSupport:
    def test_exact_zeros_at_and_below_the_threshold(self):
        gate = RationalGate([0.0, 1.0], [], support="hard", threshold=[0.5, 1.0])
        h = torch.tensor([[0.5, 1.0], [0.6, 1.1], [-2.0, 5.0]])
        torch.testing.assert_close(gate(h), torch.tensor([[0.0, 0.0], [0.6, 1.1], [0.0, 5.0]]), rtol=0, atol=1e-6)
        assert bool((gate(h)[0] == 0).all())

    def test_k_largest_of_each_sample(self):
        gate = RationalGate([0.0, 1.0], [], support="hard", threshold=1.0, k=2, alpha=1.0)
        h = torch.tensor([[3.0, 1.0, 2.0], [-1.0, -2.0, 4.0]])
        torch.testing.assert_close(gate(h), torch.tensor([[3.0, 0.0, 2.0], [0.0, 0.0, 4.0]]))

    def test_gradient_is_that_of_the_active_latents(self):
        gate = RationalGate([0.0, 1.0, 0.2], [0.3], support="hard", threshold=0.5)
        h = torch.tensor([0.2, 0.9], requires_grad=True)
        gate(h).sum().backward()
        expected = torch.tensor([0.9], requires_grad=True)
        gate.amplitude(expected).sum().backward()
        torch.testing.assert_close(h.grad, torch.stack([torch.tensor(0.0), expected.grad[0]]))

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"support": "hard"}, "needs a threshold"),
            ({"support": "hard", "threshold": -1.0}, ">= 0"),
            ({"support": "soft"}, "'dense' or 'hard'"),
            ({"C_in": 0.0}, "positive"),
            ({"k": 0}, "at least 1"),
            ({"alpha": 0.5}, "needs k"),
            ({"alpha": 0.5, "k": 2, "support": "hard", "threshold": 0.0}, "must be positive"),
            ({"scale": 0.0}, "scale"),
        ],
    )
    def test_bad_arguments(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            RationalGate([0.0, 1.0], [], **kwargs)


class TestSurrogate:
    """On a problem small enough to smooth by brute force: one sample, two latents, squared error."""

    W = torch.tensor([[0.8, 0.3, -0.2], [0.1, -0.5, 0.9]], dtype=DOUBLE)
    x = torch.tensor([0.9, 0.2, 0.4], dtype=DOUBLE)
    other = 0.6  # the second latent stands at this value

    def loss(self, z0):
        z = torch.stack([torch.as_tensor(z0, dtype=DOUBLE), torch.tensor(self.other, dtype=DOUBLE)])
        return (z @ self.W - self.x).square().sum()

    def smoothed(self, h, theta, bandwidth):
        """E over e ~ U(-1/2, 1/2) of the loss with the gate opening at theta (1 + bandwidth e): F L_on + (1 - F) L_off."""
        F = min(1.0, max(0.0, (h / theta - 1) / bandwidth + 0.5))
        return F * self.loss(h) + (1 - F) * self.loss(0.0)

    @pytest.mark.parametrize("h", [0.46, 0.499, 0.51, 0.55])
    @pytest.mark.parametrize("what", ["h", "theta"])
    def test_jump_corrected_is_the_derivative_of_the_smoothed_loss(self, h, what):
        theta, bandwidth, eps = 0.5, 0.5, 1e-6
        h_, theta_ = (torch.tensor([v], dtype=DOUBLE, requires_grad=True) for v in (h, theta))
        surrogate = Surrogate("jump-corrected", bandwidth, strength=1.0, price=0.0)
        on = h_ > theta_.detach()
        z = hard_edge(h_, h_, theta_, on, surrogate, self.W[0].square().sum())
        self.loss(z[0]).backward()
        if what == "theta":
            numeric = (self.smoothed(h, theta + eps, bandwidth) - self.smoothed(h, theta - eps, bandwidth)) / (2 * eps)
            assert theta_.grad.item() == pytest.approx(numeric.item(), rel=1e-5)
            return
        numeric = (self.smoothed(h + eps, theta, bandwidth) - self.smoothed(h - eps, theta, bandwidth)) / (2 * eps)
        # The pathwise part is weighted by the sample's own decision where the smoothed loss has F: take both parts away
        F = (h / theta - 1) / bandwidth + 0.5
        on_value = torch.tensor(h, dtype=DOUBLE, requires_grad=True)
        pathwise = torch.autograd.grad(self.loss(on_value), on_value)[0].item()
        edge = h_.grad.item() - (pathwise if h > theta else 0.0)
        assert edge == pytest.approx(numeric.item() - F * pathwise, rel=1e-5)

    def test_the_jump_is_the_same_seen_from_either_side(self):
        """L_on - L_off from the gradient where the latent is on equals that from where it is off (exact for squared error)."""
        a, curvature = 0.5, self.W[0].square().sum().item()
        jumps = []
        for z0, sign in ((0.0, 1.0), (a, -1.0)):
            z = torch.tensor(z0, dtype=DOUBLE, requires_grad=True)
            g = torch.autograd.grad(self.loss(z), z)[0].item()
            jumps.append(a * g + sign * a * a * curvature)
        assert jumps[0] == pytest.approx(jumps[1])
        assert jumps[0] == pytest.approx((self.loss(a) - self.loss(0.0)).item())

    def test_rectangle_is_the_published_estimate(self):
        # d/dtheta = -(theta/eps) K((h - theta)/eps) g with eps = bandwidth * theta, K = 1 on |.| < 1/2; nothing to h from the edge
        h = torch.tensor([0.45, 0.55, 0.9, 0.1], dtype=DOUBLE, requires_grad=True)
        theta = torch.full((4,), 0.5, dtype=DOUBLE, requires_grad=True)
        g = torch.tensor([2.0, -3.0, 5.0, 7.0], dtype=DOUBLE)
        z = hard_edge(theta * 1.0, h, theta, h > theta.detach(), Surrogate("rectangle", 0.5, 0.0, 0.0))
        (grad_theta,) = torch.autograd.grad((z * g).sum(), theta, retain_graph=True)
        # amplitude = theta here, so that the edge's value is theta itself: its own gradient adds g where the latent is on
        edge = grad_theta - torch.where(h > theta, g, 0.0).detach()
        expected = -(0.5 / 0.25) * g * torch.tensor([0.45 / 0.5, 0.55 / 0.5, 0.0, 0.0], dtype=DOUBLE)
        torch.testing.assert_close(edge, expected)

    def test_the_price_makes_the_signals_sum_to_zero(self):
        generator = torch.Generator().manual_seed(0)
        h = torch.rand(200, generator=generator, dtype=DOUBLE, requires_grad=True)
        theta = torch.full((200,), 0.5, dtype=DOUBLE)
        g = torch.randn(200, generator=generator, dtype=DOUBLE)
        on = h > theta
        z = hard_edge(
            h.detach(), h, theta, on, Surrogate("jump-corrected", 0.5, 1.0, None), torch.tensor(0.01, dtype=DOUBLE)
        )
        (z * g).sum().backward()
        window = (h - theta).abs() < 0.125
        assert window.sum() > 20
        assert abs(h.grad[window].sum().item()) < 1e-9 * h.grad.abs().sum().item() + 1e-12
        assert bool((h.grad[~window] == 0).all())

    def test_weights_are_of_the_price(self):
        """Entries with the same gain, of latents with two weights: the price differs by price * the difference."""
        theta, width = torch.full((8,), 0.5, dtype=DOUBLE), 0.25
        weight = torch.tensor([7.0, 1.2] * 4, dtype=DOUBLE)
        h = torch.linspace(0.4, 0.6, 8, dtype=DOUBLE)

        def edge(weight: torch.Tensor | None, price: float | None) -> torch.Tensor:
            h_ = h.clone().requires_grad_()
            surrogate = Surrogate("rectangle", 0.5, 1.0, price)
            z = hard_edge(torch.ones_like(h), h_, theta, h > theta, surrogate, weight=weight)
            (-2.0 * z).sum().backward()  # a gain of 2 for every latent that is on
            return h_.grad * width

        assert edge(None, None).abs().max() < 1e-12  # all alike, and nothing to exchange
        torch.testing.assert_close(edge(weight, 0.7), -2 + 0.7 * weight)
        torch.testing.assert_close(edge(weight, None), -2 + 2 * weight / weight.mean())
        assert abs(edge(weight, None).sum().item()) < 1e-12

    def test_crowding_raises_the_price_and_sparing_lowers_it(self):
        share = torch.tensor([0.3, 0.01, 0.0, 0.0], dtype=DOUBLE)
        often = torch.tensor([20.0, 1.0, 0.1, 0.0], dtype=DOUBLE)
        crowded = 1 + 20 * share
        torch.testing.assert_close(Surrogate(crowding=20.0).weights(share, often), crowded)
        spared = torch.tensor([20 / 20.1, 1 / 1.1, 0.5, 0.0], dtype=DOUBLE)
        torch.testing.assert_close(Surrogate(crowding=20.0, sparing=0.1).weights(share, often), crowded * spared)

    def test_needs_curvature(self):
        h = torch.ones(1)
        with pytest.raises(ValueError, match="curvature"):
            hard_edge(h, h, h, h > 0, Surrogate())


def test_a_threshold_of_0_gets_no_gradient():
    h, threshold = torch.tensor([5.0, 5.0, 0.5]), torch.tensor([0.0, 4.9, 0.5], requires_grad=True)
    hard_edge(h, h, threshold, h > threshold, Surrogate(), torch.ones(3)).sum().backward()
    assert threshold.grad is not None
    assert threshold.grad[0] == 0
    assert bool((threshold.grad[1:] != 0).all())


def test_a_rational_that_exceeds_float32_is_refused():
    fit = fit_gate("relu", (25, 20))
    with pytest.raises(ValueError, match="exceeds float32 at the ends of its interval"):
        gate_from(fit)
