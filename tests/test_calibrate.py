"""Calibration: L0 matched exactly, the k-th largest turned into one threshold, and a dense gate that reproduces its teacher."""

import pytest
import torch

from rsae import calibrate as calibration
from rsae.calibrate import _edge, calibrate, calibrate_threshold, gate_curves, match_l0, mean_l0, pre_acts
from rsae.finetune import FinetuneConfig
from rsae.pretrain import pretrain
from rsae.sae import RationalSAE, copied


def test_mean_l0_by_hand(make_teacher, x):
    teacher = make_teacher("topk")
    positive = (pre_acts(teacher, x) > 0).sum(1).clamp(max=5).sum()
    assert mean_l0(teacher, x.split(64)) == pytest.approx(float(positive) / len(x))


def test_one_threshold_with_the_same_l0(make_teacher, x):
    teacher = make_teacher("topk")
    threshold = calibrate_threshold(teacher, x.split(50))
    assert int((pre_acts(teacher, x) > threshold).sum()) == 5 * len(x)


@pytest.mark.parametrize("family", ["standard", "jumprelu", "rational", "alpha"])
@pytest.mark.parametrize("l0", [2.0, 6.5])
def test_l0_is_matched(make_teacher, x, family, l0):
    if family in ("rational", "alpha"):
        teacher = make_teacher("jumprelu")
        with torch.no_grad():
            teacher.threshold.clamp_(min=0.05)
        sae = RationalSAE.from_teacher(teacher)
        if family == "alpha":
            sae.gate.k, sae.gate.alpha = 4, 0.6
    else:
        sae = make_teacher(family)
        if family == "jumprelu":
            with torch.no_grad():
                sae.threshold.clamp_(min=0.05)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    matched = match_l0(sae, x.split(70), l0)
    assert mean_l0(matched, [x]) == pytest.approx(l0, abs=2 / len(x))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the SAE that was given has changed"


def test_l0_is_matched_where_some_rows_have_far_more(make_teacher, x):
    sae = make_teacher("jumprelu")
    with torch.no_grad():
        sae.threshold.clamp_(min=0.05)
    uneven = x * torch.where(torch.arange(len(x)) % 20 == 0, 8.0, 1.0)[:, None]
    matched = match_l0(sae, [uneven], 1.0)
    assert mean_l0(matched, [uneven]) == pytest.approx(1.0, abs=2 / len(x))
    assert (matched.encode(uneven) != 0).sum(1).max() > 5
    assert mean_l0(match_l0(sae, uneven.split(1), 1.0), [uneven]) == pytest.approx(1.0, abs=2 / len(x))


def test_a_batch_with_most_of_all_that_is_active_is_read_again():
    """Of each batch only the largest are kept: where the number that is looked for is not among them, it is not guessed."""
    values = [torch.rand(1, 600) + 1, torch.rand(1000, 600)]
    edge = _edge(values, lambda x: x, 0.3)
    assert 1 < edge < 2
    assert int((values[0] > edge).sum()) == 300
    with pytest.raises(ValueError, match="can be read twice"):
        _edge(iter(values), lambda x: x, 0.3)


@pytest.mark.parametrize("family", ["standard", "gated"])
def test_what_matches_l0_does_not_depend_on_how_rows_are_written(family, make_teacher, x):
    """Latent j times c_j, its row divided by it: the same function, of which the same entries stay."""
    sae = make_teacher(family)
    other = copied(sae)
    factor = torch.logspace(-1, 1, sae.cfg.d_sae)
    with torch.no_grad():
        other.W_dec /= factor[:, None]
        other.W_enc *= factor
        for name in ("b_gate", "b_mag") if family == "gated" else ("b_enc",):
            other.get_parameter(name).mul_(factor)
    l0 = 0.8 * mean_l0(sae, [x])
    one, two = match_l0(sae, [x], l0), match_l0(other, [x], l0)
    assert mean_l0(one, [x]) == pytest.approx(l0, rel=0.01)
    assert torch.equal(one.encode(x) > 0, two.encode(x) > 0)


def test_one_threshold_where_the_k_largest_are_by_norm(make_teacher, x):
    teacher = make_teacher("topk")
    teacher.cfg.rescale_acts_by_decoder_norm = True
    with torch.no_grad():
        teacher.W_dec.mul_(torch.linspace(0.2, 3, len(teacher.W_dec))[:, None])
    sae = RationalSAE.from_teacher(teacher, threshold=calibrate_threshold(teacher, [x]))
    assert mean_l0(sae, [x]) == pytest.approx(5.0, abs=2 / len(x))


@pytest.mark.parametrize("support", ["hard", "dense"])
def test_no_active_latent_is_said(make_teacher, x, support):
    teacher = make_teacher("standard")
    with torch.no_grad():
        teacher.b_enc.fill_(-1e6)
    with pytest.raises(ValueError, match="no latent is active"):
        calibrate(RationalSAE.from_teacher(teacher, support=support), [x])


def test_matching_refuses_thresholds_of_0(make_teacher, x):
    sae = RationalSAE.from_teacher(make_teacher("standard"))
    with pytest.raises(ValueError, match="no common factor of the thresholds gives an L0 of 3: too many of them are 0"):
        match_l0(sae, [x], 3.0)
    with torch.no_grad():
        sae.gate.threshold[0] = 1.0
    with pytest.raises(ValueError, match="too many of them are 0"):
        match_l0(sae, [x], 3.0)


def test_matching_refuses_a_dense_gate(make_teacher, x):
    with pytest.raises(ValueError, match="dense"):
        match_l0(RationalSAE.from_teacher(make_teacher("jumprelu"), support="dense"), [x], 3.0)


def test_empty_activations_are_refused(make_teacher):
    for function in (mean_l0, calibrate_threshold):
        with pytest.raises(ValueError, match="empty"):
            function(make_teacher("topk"), [])


@pytest.mark.parametrize("family", ["standard", "jumprelu", "topk"])
def test_hard_support_keeps_its_values(make_teacher, x, family):
    teacher = make_teacher(family)
    sae = calibrate(RationalSAE.from_teacher(teacher), [x])
    torch.testing.assert_close(sae.encode(x), teacher.encode(x), rtol=1e-5, atol=1e-5)
    if family == "standard":
        active = pre_acts(teacher, x)[pre_acts(teacher, x) > 0]
        assert (active < sae.gate.C_in).float().mean().item() == pytest.approx(0.999, abs=1e-3)


@pytest.mark.parametrize("family", ["standard", "jumprelu", "topk"])
def test_dense_support_is_nearer_the_teacher_where_the_data_is(make_teacher, family, monkeypatch):
    """Least squares on the pre-activations must beat the fit on the whole interval, on activations that it has not seen."""
    # Nothing is compared with x here, of which a random teacher knows nothing: a factor that seeks its error would be noise
    monkeypatch.setattr(calibration, "_equalise", lambda *args, **kwargs: None)
    generator = torch.Generator().manual_seed(5)
    seen, unseen = 2 * torch.randn(2, 1500, 12, generator=generator)
    teacher = make_teacher(family)
    with torch.no_grad():
        teacher.W_dec.div_(teacher.W_dec.norm(dim=1, keepdim=True))
    # the right scale without any data, so that what is compared is the coefficients
    C_in = float(pre_acts(teacher, seen).max())
    fresh = RationalSAE.from_teacher(teacher, support="dense", C_in=C_in)
    fitted = calibrate(fresh, seen.split(500))
    with torch.no_grad():
        errors = [float((sae(unseen) - teacher(unseen)).square().mean()) for sae in (fresh, fitted)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk"])
def test_gate_curves_draw_the_gates(family, x):
    from test_finetune import MemoryStore

    data = MemoryStore(500, 0)
    config = FinetuneConfig(steps=5, batch_size=64, target_l0=4.0, penalty=0.1)
    teacher = pretrain(family, data, config, d_sae=40, held_out=data)
    arms = {"teacher": teacher, "init": calibrate(RationalSAE.from_teacher(teacher), [data.x])}
    curves = gate_curves(arms, data.x)
    grid = torch.tensor(curves["x"])
    expected = torch.where(grid > (0 if family == "relu" else 1), grid, 0.0)
    torch.testing.assert_close(torch.tensor(curves["arms"]["teacher"]), expected)
    close = (torch.tensor(curves["arms"]["init"]) - expected).abs() < 1e-4
    assert close.float().mean() > 0.99  # but for the one point at the edge, where the median latent's threshold decides
    assert sum(curves["pre_acts"]["counts"]) == 500 * 40


@pytest.mark.parametrize("family", ["jumprelu", "topk"])
def test_gate_curves_of_an_rsae_that_is_the_teacher(make_teacher, family, x):
    """It is drawn in the same unit as the SAE that it was made from."""
    teacher = make_teacher(family)
    sae = RationalSAE.from_teacher(teacher)
    found, expected = (gate_curves({"teacher": each, "rsae": sae}, x) for each in (sae, teacher))
    assert found["x_label"] == expected["x_label"]
    assert found["pre_acts"] == expected["pre_acts"]
    assert found["arms"]["rsae"] == expected["arms"]["rsae"]


def test_gate_curves_draw_a_dense_gate_where_samples_have_it(make_teacher, x):
    """With k its scales are multiplied by the sample's own threshold: the jump stands at 1, and 2 comes out as 2."""
    teacher = make_teacher("topk")
    curves = gate_curves({"teacher": teacher, "init": RationalSAE.from_teacher(teacher, support="dense")}, x)
    away = [abs(at - 1) > 0.1 for at in curves["x"]]
    found = torch.tensor(curves["arms"]["init"]) - torch.tensor(curves["arms"]["teacher"])
    assert found[torch.tensor(away)].abs().max() < 0.05
