"""The Triton kernels against the plain path: compiled where there is a GPU, else run on the CPU by Triton's interpreter."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import rsae
from rsae import kernels, sparse
from rsae.calibrate import calibrate
from rsae.finetune import FinetuneConfig, trainee_for
from rsae.minimax import fit_gate
from rsae.rational import Surrogate, hard_edge, rational, sample_scale
from rsae.sae import RationalSAE
from rsae.trainees import ThresholdTrainee, TopKTrainee

triton_kernels: Any = pytest.importorskip(
    "rsae.triton_kernels", reason="Triton is not installed (it is for Linux alone)"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (batch, d_sae): multiples of nothing, single rows and latents, rows longer than a program's block
SHAPES = [(1, 1), (3, 5), (7, 33), (2, 1500)]
Both = Callable[[Callable[[], Any]], tuple[Any, Any]]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Both:
    """What a function gives by the plain path, and by Triton."""

    def run(function: Callable[[], Any]) -> tuple[Any, Any]:
        results = []
        for library in (None, triton_kernels):
            monkeypatch.setattr(kernels, "usable", lambda *tensors, dtype=None, found=library: found)
            results.append(function())
        return results[0], results[1]

    return run


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, name: str = "") -> None:
    """Within `tolerance` of the largest entry."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    if expected.numel():
        error = float((actual.double() - expected.double()).abs().max())
        assert error <= tolerance * float(expected.double().abs().max()), f"{name}: off by {error}"


# -- Which kernels -----------------------------------------------------------------------------------------------------


def test_the_device_chooses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        there = torch.empty(4, 3, device="cuda")
    here = torch.empty(4, 3)
    monkeypatch.setattr(triton_kernels, "start", lambda: None)
    kernels.gpu_library.cache_clear()
    assert kernels.usable(there) is triton_kernels
    assert kernels.usable(there, there.bfloat16()) is triton_kernels
    assert kernels.usable(there.double()) is None
    assert kernels.usable(there.T) is None
    assert kernels.usable(there, here) is None
    assert kernels.usable(here) is kernels.library()
    kernels.gpu_library.cache_clear()


def test_where_triton_does_not_start_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(triton_kernels, "start", start)
    kernels.gpu_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="rsae"):
            assert kernels.gpu_library() is None
        (record,) = caplog.records
        assert "do not start: Failed to find C compiler" in record.getMessage()
    finally:
        kernels.gpu_library.cache_clear()


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delattr(rsae, "triton_kernels")
    monkeypatch.setitem(sys.modules, "rsae.triton_kernels", None)
    kernels.gpu_library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="rsae"):
            assert kernels.gpu_library() is None
            assert kernels.gpu_library() is None
        (record,) = caplog.records
        assert "no Triton" in record.getMessage()
        assert "plain path" in record.getMessage()
    finally:
        kernels.gpu_library.cache_clear()


# -- Entries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "d_sae"), SHAPES)
@pytest.mark.parametrize("share", [0.6, 100.0, -100.0], ids=["some", "none", "all"])
def test_entries_above_a_threshold(both: Both, batch: int, d_sae: int, share: float) -> None:
    h = randn(batch, d_sae).bfloat16()
    h[-1] = -1.0  # with a positive share a row of none
    for threshold in (None, torch.linspace(0.5, 2.0, d_sae, device=DEVICE)):
        (slow, _), (fast, scale) = both(lambda t=threshold: sparse.Entries.above(h, t, share=share))
        assert scale is None
        assert torch.equal(slow.rows, fast.rows)
        assert torch.equal(slow.latents, fast.latents)
        assert torch.equal(fast.values, h[fast.rows, fast.latents].float())
        expected = {100.0: 0, -100.0: batch * d_sae}.get(share)
        assert expected is None or len(fast.rows) == expected


@pytest.mark.parametrize("longest", [1 << 15, 8], ids=["in registers", "by torch"])
@pytest.mark.parametrize("k", [1, 7, 256, 257, 10_000])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_entries_that_follow_the_sample(
    both: Both, monkeypatch: pytest.MonkeyPatch, k: int, alpha: float, longest: int
) -> None:
    monkeypatch.setattr(triton_kernels, "LONGEST", longest)
    h = randn(6, 257, seed=1).bfloat16()
    h[0] = -1.0  # a sample with no positive pre-activation
    h[1] = 0.5  # one of equal ones
    h[2, ::2] = -0.0
    threshold = torch.linspace(0.5, 2.0, 257, device=DEVICE)
    (slow, s), (fast, t) = both(lambda: sparse.Entries.above(h, threshold, share=0.7, k=k, alpha=alpha))
    close(t, s, 0.0)
    close(t, sample_scale(h.float() * threshold.reciprocal(), k), 0.0)
    assert torch.equal(slow.flat, fast.flat)
    assert torch.equal(fast.values, h[fast.rows, fast.latents].float())
    # Of a shard: above a scale that all shards have found
    given = torch.linspace(0.2, 3.0, 6, device=DEVICE)[:, None]
    how = {"share": 0.7, "k": k, "alpha": alpha, "scale": given}
    (slow, s), (fast, t) = both(lambda: sparse.Entries.above(h, threshold, **how))
    assert torch.equal(s, t)
    assert torch.equal(slow.flat, fast.flat)


@pytest.mark.parametrize("longest", [1 << 15, 8], ids=["in registers", "by torch"])
@pytest.mark.parametrize(("d_sae", "k"), [(60, 1), (60, 13), (60, 59), (60, 60), (2, 1), (1, 1), (1500, 400)])
def test_the_k_largest_with_ties(both: Both, monkeypatch: pytest.MonkeyPatch, d_sae: int, k: int, longest: int) -> None:
    monkeypatch.setattr(triton_kernels, "LONGEST", longest)
    generator = torch.Generator().manual_seed(d_sae)
    h = torch.randint(-3, 4, (4, d_sae), generator=generator).bfloat16().to(DEVICE)  # many equal values
    h[0] = 0.0
    h[0, ::2] = -0.0
    slow, fast = both(lambda: sparse.Entries.largest(h, k))
    assert torch.equal(fast.rows, slow.rows)
    first = h.float().argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    assert torch.equal(fast.latents.view(4, k).sort(dim=1).values, first)


@pytest.mark.parametrize("longest", [1 << 15, 8], ids=["in registers", "by torch"])
def test_nan_and_infinity_stay_within_bounds(both: Both, monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    monkeypatch.setattr(triton_kernels, "LONGEST", longest)
    h = randn(5, 40).bfloat16()
    h[1] = float("nan")
    h[2, ::3] = float("nan")
    h[3, :12] = float("inf")
    h[3, 12:] = float("-inf")
    entries = both(lambda: sparse.Entries.largest(h, 35))[1]
    assert torch.equal(entries.rows, torch.arange(5, device=DEVICE).repeat_interleave(35))
    for row in range(5):
        mine = entries.latents[entries.rows == row]
        assert len(mine.unique()) == 35
        assert 0 <= int(mine.min()) <= int(mine.max()) < 40
    entries, _ = both(lambda: sparse.Entries.above(h, torch.ones(40, device=DEVICE), k=5, alpha=1.0))[1]
    assert 0 <= int(entries.latents.min()) <= int(entries.latents.max()) < 40
    assert int((entries.rows == 1).sum()) == 0


# -- Sums over entries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "d_sae", "d"), [(1, 1, 1), (3, 5, 2), (40, 7, 17), (5, 37, 300)])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0], ids=["empty", "some", "full"])
def test_sums_and_products_over_entries(both: Both, batch: int, d_sae: int, d: int, density: float) -> None:
    mask = torch.rand(batch, d_sae, generator=torch.Generator().manual_seed(2)).to(DEVICE) < density
    if density < 1:
        mask[::2] = False  # empty rows and latents
        mask[:, -1] = False
    weights = randn(int(mask.sum()), seed=3)
    weights[::3] = 0.0
    W, x = randn(d_sae, d, seed=4), randn(batch, d, seed=5)

    def results() -> tuple[Tensor, ...]:
        entries = sparse.Entries.of(mask)
        return (
            entries.by_latent[0],
            entries.sum_by_row(weights, W),
            entries.sum_by_latent(weights, x),
            entries.dots(x, W),
            *entries.sum_and_dots(weights, x, W),
        )

    (order, by_row, by_latent, *_), (fast_order, *fast) = both(results)
    assert torch.equal(order, fast_order)
    close(fast[0], by_row)
    close(fast[1], by_latent)
    close(fast[2], (x.double() @ W.double().T)[mask].float())  # the plain path rounds these to bfloat16
    assert torch.equal(fast[3], fast[1])
    assert torch.equal(fast[4], fast[2])


# -- The rational gate -------------------------------------------------------------------------------------------------


def gate(degree: tuple[int, int], h: Tensor, shapes: tuple[tuple[int, ...], ...]) -> tuple[Any, dict[str, Tensor]]:
    fit = fit_gate("jumprelu", degree, theta=0.1, delta=0.005) if degree[1] > 2 else fit_gate("relu", degree)
    tensors = {
        "h": h,
        "num": torch.tensor(fit.num_coeffs, dtype=torch.float32, device=DEVICE),
        "den": torch.tensor(fit.den_coeffs, dtype=torch.float32, device=DEVICE),
        "C_in": 0.75 + randn(*shapes[0], seed=7).abs(),
        "C_out": 0.75 + randn(*shapes[1], seed=8).abs(),
    }
    return fit, tensors


def value_and_gradients(fit: Any, tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """phi(h), and the gradients of h, both coefficients and both scales, for an upstream `grad`."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = rational(*leaves.values(), fit.centre, fit.scale)
    out.backward(grad)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(gradients) == len(leaves)
    return {"out": out.detach(), **gradients}


@pytest.mark.parametrize("n", [0, 1, 1023, 1025, 3000])
@pytest.mark.parametrize("per_entry", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("degree", [(9, 8), (3, 2), (1, 0)])
def test_the_rational_and_its_gradients(
    both: Both, n: int, per_entry: tuple[bool, bool], degree: tuple[int, int]
) -> None:
    shapes = tuple((n,) if each else () for each in per_entry)
    fit, tensors = gate(degree, 2 * randn(n), shapes)
    slow, fast = both(lambda: value_and_gradients(fit, tensors, randn(n, seed=9)))
    for name, value in slow.items():
        close(fast[name], value, 1e-5, name)


@pytest.mark.parametrize("n", [5, 3000])
@pytest.mark.parametrize("shape", [(), (3000,)])
def test_the_rational_in_bfloat16(both: Both, n: int, shape: tuple[int, ...]) -> None:
    """Read and written as bfloat16: within a unit in the last place (the interpreter cuts off where a GPU rounds); sums are of
    what was not rounded."""
    fit, tensors = gate((9, 8), (2 * randn(n)).bfloat16(), (shape and (n,), shape and (n,)))
    slow, fast = both(lambda: value_and_gradients(fit, tensors, randn(n, seed=9).bfloat16()))
    for name, value in slow.items():
        close(fast[name], value, 2**-7 if name in ("h", "out") else 1e-5, name)


@pytest.mark.parametrize("shape", [(), (301,), (7, 1)])
def test_the_rational_of_a_matrix(both: Both, shape: tuple[int, ...]) -> None:
    """A dense gate in training: scalar scales, one for each latent, one for each sample."""
    fit, tensors = gate((9, 8), 2 * randn(7, 301), (shape, shape))
    slow, fast = both(lambda: value_and_gradients(fit, tensors, randn(7, 301, seed=9)))
    for name, value in slow.items():
        close(fast[name], value, 1e-5, name)


def test_nan_passes_through(both: Both) -> None:
    fit, tensors = gate((3, 2), torch.tensor([0.5, float("nan"), -3.0], device=DEVICE), ((), ()))
    for out in both(lambda: rational(*tensors.values(), fit.centre, fit.scale)):
        assert out.isnan().tolist() == [False, True, False]


# -- The edge, and the norms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 1023, 3000])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "surrogate",
    [Surrogate("rectangle", strength=0.0), Surrogate("jump-corrected"), Surrogate("jump-corrected", 3.0, price=0.3)],
)
def test_the_edge_and_its_gradients(both: Both, n: int, weighted: bool, surrogate: Surrogate) -> None:
    given = [randn(n, seed=seed).abs() + 0.1 for seed in range(3)]
    given[2][::7] = 0.0  # a threshold that nothing is near
    grad, curvature, weight = randn(n, seed=3), randn(n, seed=4).abs(), randn(n, seed=5).abs() if weighted else None

    def gradients() -> tuple[Tensor | None, ...]:
        amplitude, h, threshold = (tensor.clone().requires_grad_() for tensor in given)
        z = hard_edge(amplitude, h, threshold, h > threshold, surrogate, curvature, weight)
        z.backward(grad)
        return z.detach(), amplitude.grad, h.grad, threshold.grad

    for slow, fast in zip(*both(gradients), strict=True):
        if slow is None:
            assert fast is None
        else:
            close(fast, slow)


@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 1), (5, 1500)])
def test_rows_back_to_their_norms(n: int, d: int) -> None:
    rows, norms = randn(n, d), randn(n, 1, seed=1).abs()
    rows[:1] = 0.0
    found = rows.clone()
    triton_kernels.rescale_rows(found, norms)
    close(found, rows * norms / rows.norm(dim=1, keepdim=True).clamp(min=1e-8))


# -- Together ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["topk", "jumprelu", "rational"])
def test_a_training_step(both: Both, make_teacher: Callable[..., Any], x: Tensor, family: str) -> None:
    x = x[:40]
    sae = make_teacher("topk" if family == "topk" else "jumprelu")
    if family == "rational":
        sae = calibrate(RationalSAE.from_teacher(sae), [x])
        sae.gate.threshold.data.clamp_(min=0.05)
        sae.gate.k, sae.gate.alpha = 5, 0.25

    def step() -> dict[str, Tensor]:
        trainee = trainee_for(sae, 1.0, FinetuneConfig()).to(DEVICE)
        assert isinstance(trainee, TopKTrainee if family == "topk" else ThresholdTrainee)
        result = trainee(x.to(DEVICE))
        result.loss.backward()
        gradients = {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}
        assert len(gradients) == len([p for p in trainee.parameters() if p.requires_grad])
        return {"loss": result.loss.detach(), "l0": result.l0, **gradients}

    slow, fast = both(step)
    assert torch.equal(slow["l0"], fast["l0"])
    for name, value in slow.items():
        # the plain path takes the gradient of the latents from a product in bfloat16
        close(fast[name], value, 1e-5 if name in ("loss", "W_dec", "b_dec") else 2**-7, name)


COMPILE = '''
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rsae import kernels, sparse
from rsae.rational import Surrogate, hard_edge, rational
assert "rsae.triton_kernels" not in sys.modules
from rsae import triton_kernels

types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.bool: "i1"}

def typed(argument):
    if isinstance(argument, torch.Tensor):
        return "*" + types[argument.dtype]
    return {int: "i32", float: "fp32"}[type(argument)]

def compiled(kernel, grid, *arguments, num_warps=4, **constants):
    """Compile as for these arguments, and have the kernel write zeros."""
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    # Triton makes a constant of what is not there, and of 1
    constants |= {name: value for name, value in given.items() if value is None or type(value) is int and value == 1}
    signature = {name: "constexpr" if name in constants else typed(given[name]) for name in [*given, *constants]}
    source = ASTSource(kernel, signature, constants)
    code = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": num_warps})
    print(kernel.__name__, len(code.asm["cubin"]))
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            argument.zero_()

triton_kernels._launch = compiled
kernels.usable = lambda *tensors, dtype=None: triton_kernels
coeffs = torch.ones(4, requires_grad=True), torch.ones(3, requires_grad=True)
for batch, d_sae, d, k in ((4, 300, 5, 3), (1, 2, 1, 1)):
    h, ones = torch.randn(batch, d_sae).bfloat16(), torch.ones(d_sae)
    entries, _ = sparse.Entries.above(h, ones, k=k)
    sparse.Entries.largest(h, k)
    for n in (0, batch):
        entries = sparse.Entries(torch.zeros(n).long(), torch.zeros(n).long(), (batch, d_sae))
        entries.sum_by_row(torch.ones(n), torch.ones(d_sae, d)), entries.sum_by_latent(torch.ones(n), torch.ones(batch, d))
        entries.dots(torch.ones(batch, d), torch.ones(d_sae, d))
    rational(torch.ones(batch), *coeffs, torch.tensor(1.0), torch.tensor(1.0), 0.0, 1.0).sum().backward()
    rational(torch.ones(batch).bfloat16(), *coeffs, torch.ones(batch), torch.ones(batch), 0.0, 1.0).sum().backward()
    for weight in (None, torch.ones(batch)):
        h = torch.ones(batch, requires_grad=True)
        hard_edge(h, h, torch.ones(batch), h > 0, Surrogate(), torch.ones(batch), weight).sum().backward()
    triton_kernels.rescale_rows(torch.ones(batch, d), torch.ones(batch, 1))
'''


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes more than the compiler does. Triton brings NVIDIA's assembler, so no GPU is needed."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len({line.split()[0] for line in done.stdout.splitlines()}) == 10  # one for each kernel
