"""The search's own parts: the other kernels of the edge, and the gate with two sides."""

import math

import pytest
import torch
from test_evidence import load, pytestmark  # noqa: F401
from test_finetune import D_IN, D_SAE, MemoryStore, fvu

from rsae import rational
from rsae.calibrate import calibrate, mean_l0
from rsae.finetune import FinetuneConfig, finetune, trainee_for
from rsae.pretrain import initial_sae
from rsae.sae import RationalSAE


@pytest.fixture(scope="module")
def search():
    load("evidence_tables")
    load("evidence")
    return load("search")


def test_the_kernels_are_densities_and_of_one_variance(search):
    distance = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    for kernel, width in (
        (rational._window, 0.5),
        (search.triangle, 0.7),
        (search.gaussian, 0.87),
        (search.own_derivative, 0.67),
    ):
        density = kernel(distance, torch.tensor(width, dtype=torch.float64)) / width
        mass = torch.trapezoid(density, distance)
        assert float(mass) == pytest.approx(1, abs=4e-3)
        assert float((density * distance.square()).sum().sqrt() / density.sum().sqrt()) == pytest.approx(
            0.5 / math.sqrt(12), rel=0.03
        )
    assert not search.triangle(torch.zeros(3), torch.zeros(3)).any()
    assert not search.gaussian(torch.zeros(3), torch.zeros(3)).any()
    assert not search.own_derivative(torch.zeros(3), torch.zeros(3)).any()


def test_the_loop_trains_by_the_kernel_that_was_asked_for(search):
    def threshold_gradient():
        threshold = torch.tensor([1.0], requires_grad=True)
        h = torch.tensor([1.1])
        surrogate = rational.Surrogate("rectangle", bandwidth=0.5, price=1.0)
        rational.hard_edge(h, h, threshold, h > 1, surrogate).backward(torch.zeros(1))
        return threshold.grad

    density = {}
    for kernel in (rational._window, search.triangle, search.gaussian, search.own_derivative):
        with search.Variation(kernel=kernel).in_the_loop():
            density[kernel] = threshold_gradient()
        expected = kernel(torch.tensor([0.1]), torch.tensor([0.5]))
        torch.testing.assert_close(density[kernel] / density[rational._window], expected)
    torch.testing.assert_close(threshold_gradient(), density[rational._window])


@pytest.mark.parametrize("family", ["jumprelu", "topk"])
def test_a_gate_with_two_sides_is_what_was_trained(search, family):
    data, held_out = MemoryStore(1000, seed=0), MemoryStore(500, seed=1)
    start = calibrate(
        RationalSAE.from_teacher(initial_sae(family, data, d_sae=D_SAE, l0=4, seed=0)), list(data.x.split(250))
    )
    how = FinetuneConfig(steps=40, batch_size=64, lr=3e-3, target_l0=4.0)
    with search.Variation(is_signed=True).in_the_loop():
        sae = finetune(start, data, how, held_out=held_out)
        trainee = trainee_for(sae, 1.0, how)
        assert isinstance(trainee, search.SignedTrainee)
        step = trainee(held_out.x)
    doubled = search.two_sided(sae)
    assert (doubled.cfg.d_in, doubled.cfg.d_sae) == (D_IN, 2 * D_SAE)
    assert (doubled.encode(held_out.x)[:, D_SAE:] > 0).any()
    # The trainee chooses by pre-activations in bfloat16
    assert mean_l0(doubled, [held_out.x]) == pytest.approx(float(step.l0), rel=0.02)
    variance = (held_out.x - held_out.x.mean(0)).square().sum() / len(held_out.x)
    assert fvu(doubled, held_out) == pytest.approx(float(step.squared_error.detach() / variance), rel=0.02)
