"""The rational gate on a dense matrix, forward and backward, beside a copy of as many bytes and beside rational_activations.

    python -m benchmarks.gate [--json]

The gate has degrees (9, 8) and scalar scales, as in the paper. The copy moves what the gate must: h read and phi(h) written, then h
and the gradient read and the gradient of h written. rational_activations computes the same P/(1 + |A|) by what torch alone has, its
path without CUDA; its gradients are autograd's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location

import torch
from benchmarks.step import BATCH, D_SAE, without_kernels
from benchmarks.timing import machine, median_ms

from rsae.cpu import keep_pages
from rsae.minimax import RationalFit, fit_gate
from rsae.rational import rational


def gates(batch: int, d_sae: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The gate, forward and backward, and the copy of as many bytes."""
    fit, coeffs = paper_gate(device)
    scales = [torch.tensor(1.0, device=device, requires_grad=True) for _ in range(2)]
    h = torch.randn(batch, d_sae, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(h)
    source = torch.empty(5 * h.numel() // 2, dtype=dtype, device=device)
    target = torch.empty_like(source)

    def gate() -> None:
        out = rational(h, *coeffs, *scales, fit.centre, fit.scale)
        torch.autograd.grad(out, (h, *coeffs, *scales), grad)

    return {"gate": gate, "copy": lambda: target.copy_(source)}


def paper_gate(device: str) -> tuple[RationalFit, tuple[torch.Tensor, torch.Tensor]]:
    """A JumpReLU's fit, and its coefficients (of the denominator, those from u on) as parameters."""
    fit = fit_gate("jumprelu", (9, 8), theta=0.1, delta=0.005)
    num, den = (torch.tensor(c, dtype=torch.float32, device=device) for c in (fit.num_coeffs, fit.den_coeffs))
    return fit, (num.requires_grad_(), den.requires_grad_())


def rational_activations(batch: int, d_sae: int) -> Callable[[], object]:
    """The peer's function of version B, P/(1 + |A|), forward and backward, float32."""
    # Its package imports what draws its plots; the function itself needs torch alone
    file = distribution("rational-activations").locate_file("rational/torch/rational_pytorch_functions.py")
    spec = spec_from_file_location("rational_pytorch_functions", str(file))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    fit, (num, den) = paper_gate("cpu")
    h = torch.randn(batch, d_sae).requires_grad_()
    grad = torch.randn_like(h)

    def theirs(u: torch.Tensor) -> torch.Tensor:
        return module.Rational_PYTORCH_B_F(u, num, den, True)

    with torch.no_grad():
        u = torch.linspace(-1, 1, 1001)
        ours = rational(
            fit.scale * u + fit.centre, num, den, torch.tensor(1.0), torch.tensor(1.0), fit.centre, fit.scale
        )
        torch.testing.assert_close(theirs(u), ours, rtol=1e-4, atol=1e-4)  # the same function

    def gate() -> None:
        torch.autograd.grad(theirs(h), (h, num, den), grad)

    return gate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    keep_pages()
    steps = gates(BATCH, D_SAE, "cpu", torch.float32)
    ms = {name: median_ms(step) for name, step in steps.items()}
    ms["gate_plain"] = median_ms(without_kernels(steps["gate"]), runs=5, warmup=1)
    ms["rational_activations"] = median_ms(rational_activations(BATCH, D_SAE), runs=3, warmup=1)
    result = {
        "vs_copy": round(ms["gate"] / ms["copy"], 2),
        "vs_plain": round(ms["gate_plain"] / ms["gate"], 1),
        "vs_rational_activations": round(ms["rational_activations"] / ms["gate"], 1),
        "ms": {name: round(value, 1) for name, value in ms.items()},
        "machine": machine(),
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"gate of degree (9, 8) on {BATCH} x {D_SAE}, float32, forward and backward; {result['machine']}")
    for name, value in ms.items():
        print(f"  {name:<22}{value:>9.1f} ms  {value / ms['gate']:>6.2f} x ours")


if __name__ == "__main__":
    main()
