"""RationalSAE against SAELens' own SAEs: the same latents, the same files, the same evaluation."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import D_IN, D_SAE, K
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

from rsae.minimax import fit_gate
from rsae.sae import DELTA, THETA, RationalSAE, RationalSAEConfig, as_jumprelu, copied, identity_numerator, save_sae

FAMILIES = ["standard", "jumprelu", "topk"]


def train(sae: RationalSAE, seed: int = 0) -> RationalSAE:
    """Move every parameter as training would, so that no gate is the identity (which hides wrong scales) any more."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=g)
            if name.endswith("_relative"):
                parameter.add_(0.1 * noise)
            elif name in ("gate.C_in", "gate.C_out", "gate.threshold"):
                parameter.mul_((0.2 * noise).exp())
            else:
                parameter.mul_(1 + 0.1 * noise)
    return sae


def bent(support: str, per_latent: bool, k: int | None, alpha: float, *, seed: int = 0) -> RationalSAE:
    """A RationalSAE with a bent gate, C_in != C_out, random weights and unequal decoder norms."""
    fit = fit_gate("jumprelu", (5, 4), theta=THETA, delta=0.02)
    num = identity_numerator(fit) if support == "hard" else list(fit.num_coeffs)
    C = None if per_latent else 2.0
    sae = RationalSAE(
        RationalSAEConfig(
            d_in=D_IN,
            d_sae=D_SAE,
            num_coeffs=num,
            den_coeffs=list(fit.den_coeffs),
            centre=fit.centre,
            scale=fit.scale,
            C_in=C,
            C_out=C,
            support=support,
            k=k,
            alpha=alpha,
        )
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(D_IN, D_SAE, generator=g) / D_IN**0.5)
        sae.W_dec.copy_(torch.randn(D_SAE, D_IN, generator=g) * torch.empty(D_SAE, 1).uniform_(0.1, 1, generator=g))
        sae.b_enc.copy_(0.3 * torch.randn(D_SAE, generator=g))
        sae.b_dec.copy_(torch.randn(D_IN, generator=g))
        if per_latent:
            sae.gate.C_in.uniform_(1.0, 4.0, generator=g)
            sae.gate.C_out.uniform_(1.0, 4.0, generator=g)
        else:
            sae.gate.C_out.mul_(1.5)
        if sae.gate.threshold is not None:
            sae.gate.threshold.uniform_(0.1, 1.0, generator=g)
    return train(sae, seed)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


# -- from_teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", ["hard", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_teacher_copies_the_weights_bit_for_bit(make_teacher, family, support) -> None:
    teacher = make_teacher(family)
    sae = RationalSAE.from_teacher(teacher, support=support)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(sae, name), getattr(teacher, name)), name
    # and shares none of them
    with torch.no_grad():
        sae.W_dec.zero_()
    assert bool(teacher.W_dec.any())


CONVENTIONS = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
    {"normalize_activations": "constant_norm_rescale"},
]


@pytest.mark.parametrize("conventions", CONVENTIONS, ids=lambda c: ",".join(map(str, c.values())) or "default")
@pytest.mark.parametrize("family", FAMILIES)
def test_hard_support_starts_as_the_teacher(make_teacher, x, family, conventions) -> None:
    teacher = make_teacher(family, **conventions)
    sae = RationalSAE.from_teacher(teacher)
    with torch.no_grad():
        expected_x_hat, x_hat = teacher(x), sae(x)
        expected, latents = teacher.encode(x), sae.encode(x)
    assert 0.05 < (expected != 0).float().mean() < 0.7
    assert torch.equal(latents != 0, expected != 0)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x_hat, expected_x_hat, rtol=1e-5, atol=2e-5)
    assert sae.cfg.apply_b_dec_to_input == teacher.cfg.apply_b_dec_to_input
    assert sae.cfg.normalize_activations == teacher.cfg.normalize_activations
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


@pytest.mark.parametrize("family", FAMILIES)
def test_leading_axes_are_free(make_teacher, x, family) -> None:
    teacher = make_teacher(family)
    sae = RationalSAE.from_teacher(teacher)
    with torch.no_grad():
        torch.testing.assert_close(sae(x.view(20, 15, D_IN)), sae(x).view(20, 15, D_IN))
        torch.testing.assert_close(sae.encode(x[0]), sae.encode(x[:1])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_reshaped_as_the_teacher_does(make_teacher, x, family) -> None:
    teacher = make_teacher(family, reshape_activations="hook_z", metadata=SAEMetadata(hook_name="blocks.0.attn.hook_z"))
    heads = x.view(300, 3, D_IN // 3)
    sae = RationalSAE.from_teacher(teacher)
    with torch.no_grad():
        assert sae(heads).shape == heads.shape
        close(sae(heads), teacher(heads))


@pytest.mark.parametrize("C_in", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("family", ["standard", "topk"])
def test_the_scale_does_not_move_a_hard_start(make_teacher, x, family, C_in) -> None:
    teacher = make_teacher(family)
    with torch.no_grad():
        close(RationalSAE.from_teacher(teacher, C_in=C_in).encode(x), teacher.encode(x))


def test_each_latent_of_a_jumprelu_gets_its_own_scale(make_teacher) -> None:
    teacher = make_teacher("jumprelu")
    gate = RationalSAE.from_teacher(teacher).gate
    positive = teacher.threshold > 0
    expected = teacher.threshold[positive] / 0.1
    torch.testing.assert_close(gate.C_in[positive], expected)
    torch.testing.assert_close(gate.C_out[positive], expected)
    assert torch.equal(gate.threshold, teacher.threshold.clamp(min=0))
    assert bool((gate.C_in > 0).all())


def test_thresholds_of_dead_latents_do_not_set_the_scale_of_the_others(make_teacher, x) -> None:
    teacher = make_teacher("jumprelu")
    is_dead = torch.arange(D_SAE) % 5 < 3
    with torch.no_grad():
        teacher.threshold.clamp_(min=0.01)
        teacher.threshold[is_dead] *= 1e6
    sae = RationalSAE.from_teacher(teacher)
    torch.testing.assert_close(sae.gate.C_in, teacher.threshold / 0.1)
    with torch.no_grad():
        expected = teacher.encode(x)
        assert torch.equal(sae.encode(x) != 0, expected != 0)
        close(sae.encode(x), expected)


@pytest.mark.parametrize("norms", ["unit", "non-unit"])
@pytest.mark.parametrize("support", ["hard", "dense"])
def test_topk_that_rescales_by_the_decoder_norm(make_teacher, x, norms, support) -> None:
    teacher = make_teacher("topk", rescale_acts_by_decoder_norm=True)
    if norms == "unit":
        with torch.no_grad():
            teacher.W_dec.div_(teacher.W_dec.norm(dim=1, keepdim=True))
    before = copy.deepcopy(teacher.state_dict())
    sae = RationalSAE.from_teacher(teacher, support=support)
    with torch.no_grad():
        expected, x_hat = teacher.encode(x), teacher(x)
        # its order is that of h ||w||: not the same support as without rescaling, unless the norms are equal
        plain = make_teacher("topk")
        plain.W_dec.data.copy_(teacher.W_dec)
        assert torch.equal(expected != 0, plain.encode(x) != 0) == (norms == "unit")
        if support == "hard":
            assert torch.equal(sae.encode(x) != 0, expected != 0)
            close(sae.encode(x), expected)
            close(sae(x), x_hat)
        else:
            assert (sae(x) - x_hat).square().mean() < 1e-2 * x_hat.square().mean()
    if norms == "unit":
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(getattr(sae, name), getattr(teacher, name))
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), f"from_teacher changed the teacher's {name}"


def test_topk_by_one_calibrated_threshold_is_a_jumprelu(make_teacher, x) -> None:
    teacher = make_teacher("topk")
    sae = RationalSAE.from_teacher(teacher, threshold=0.7)
    h = (x - teacher.b_dec) @ teacher.W_enc + teacher.b_enc
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), torch.where(h > 0.7, h, 0.0), rtol=1e-5, atol=1e-6)
    assert sae.cfg.k is None


def test_topk_with_few_positive_pre_activations(make_teacher, x) -> None:
    """SAELens' TopK takes the k largest and then their positive part: samples may have fewer than k, or none."""
    teacher = make_teacher("topk")
    with torch.no_grad():
        teacher.b_enc.sub_(2.0)
        expected, latents = teacher.encode(x), RationalSAE.from_teacher(teacher).encode(x)
    count = (expected != 0).sum(1)
    assert count.min() == 0
    assert count.max() == K
    assert torch.equal((latents != 0).sum(1), count)
    close(latents, expected)


@pytest.mark.parametrize("k", [1, D_SAE - 1, D_SAE])
def test_topk_at_the_ends_of_k(make_teacher, x, k) -> None:
    teacher = make_teacher("topk", k=k)
    with torch.no_grad():
        teacher.b_enc.add_(6.0)  # all positive in many samples
        expected, latents = teacher.encode(x), RationalSAE.from_teacher(teacher).encode(x)
    assert torch.equal(latents != 0, expected != 0)
    close(latents, expected)


def test_dense_relu_is_as_near_as_the_fit_says(make_teacher, x) -> None:
    teacher = make_teacher("standard")
    with torch.no_grad():
        C_in = float(((x - teacher.b_dec) @ teacher.W_enc + teacher.b_enc).abs().max())
        sae = RationalSAE.from_teacher(teacher, C_in=C_in, support="dense")
        error = (sae.encode(x) - teacher.encode(x)).abs()
    # reference/minimax: the best (3, 2) safe-Pade ReLU on [-1, 1] is 0.0218 off
    assert 0.01 * C_in < error.max() < 0.02185 * C_in
    assert bool((sae.encode(x) != 0).all())


@pytest.mark.parametrize("family", ["jumprelu", "topk"])
def test_dense_jumps_are_near_but_for_the_gap(make_teacher, x, family) -> None:
    """Outside theta (1 -+ DELTA/THETA) each latent is within the fit's error, times its own scale, of the teacher's."""
    teacher = make_teacher(family)
    sae = RationalSAE.from_teacher(teacher, support="dense")
    max_error = fit_gate("jumprelu", (9, 8), theta=THETA, delta=DELTA).max_error
    with torch.no_grad():
        h = (x - teacher.b_dec) @ teacher.W_enc + teacher.b_enc
        if family == "jumprelu":
            theta = teacher.threshold.clamp(min=0).expand_as(h)
        else:
            top = h.topk(K + 1, dim=1).values
            assert bool((top[:, -1] > 0).all())
            theta = top[:, -2:].mean(1, keepdim=True).expand_as(h)
        t = h / theta * THETA
        inside = (theta > 0) & ((t - THETA).abs() > DELTA) & (t > -1)
        error = (sae.encode(x) - teacher.encode(x)).abs() / (theta / THETA)
    assert inside.float().mean() > 0.5
    assert error[inside].max() < 1.001 * max_error + 1e-5


def test_dense_latents_without_a_threshold_are_relus(make_teacher, x) -> None:
    """theta_j = 0 beside positive ones: the shared rational is a jump, which must come close to that latent's ReLU too."""
    teacher = make_teacher("jumprelu")
    sae = RationalSAE.from_teacher(teacher, support="dense")
    relu = teacher.threshold <= 0
    with torch.no_grad():
        error = (sae.encode(x) - teacher.encode(x))[:, relu].square().sum() / teacher.encode(x)[:, relu].square().sum()
    assert error < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["standard", "jumprelu", "topk"])
def test_a_teacher_in_another_dtype(make_teacher, x, family, dtype) -> None:
    """In bfloat16 the k-th and the (k+1)-th largest often tie."""
    teacher = make_teacher(family).to(dtype)
    sae = RationalSAE.from_teacher(teacher)
    assert sae.W_enc.dtype == dtype
    assert sae.gate.num_fit.dtype == torch.float32
    with torch.no_grad():
        expected, latents = teacher.encode(x), sae.encode(x)
    assert latents.dtype == dtype
    assert torch.equal(latents != 0, expected != 0)
    torch.testing.assert_close(latents, expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [(2, 2), (3, 3), (8, 8), (1, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_hard_support_needs_room_for_the_identity(make_teacher, family, degree) -> None:
    p, q = degree
    with pytest.raises(
        ValueError, match=rf"p >= q \+ 1; got \({p}, {q}\). Use degree \({q + 1}, {q}\), or support='dense'"
    ):
        RationalSAE.from_teacher(make_teacher(family), degree)


@pytest.mark.parametrize("degree", [(0, 0), (3, -1)])
@pytest.mark.parametrize("support", ["hard", "dense"])
def test_impossible_degrees(make_teacher, degree, support) -> None:
    with pytest.raises(ValueError, match="degree"):
        RationalSAE.from_teacher(make_teacher("standard"), degree, support=support)


def test_another_support(make_teacher) -> None:
    with pytest.raises(ValueError, match="support is 'dense' or 'hard'; got 'soft'"):
        RationalSAE.from_teacher(make_teacher("standard"), support="soft")


@pytest.mark.parametrize("conventions", CONVENTIONS)
def test_a_gated_sae_is_a_jumprelu_of_its_magnitude(make_teacher, x, conventions) -> None:
    teacher = make_teacher("gated", **conventions)
    with torch.no_grad():
        opening = teacher.process_sae_in(x) @ teacher.W_enc + teacher.b_gate
        magnitude = teacher.process_sae_in(x) @ (teacher.W_enc * teacher.r_mag.exp()) + teacher.b_mag
        # the float rounding of either path may decide within 1e-6 of the edge
        clear = (opening.abs() > 1e-5) & (magnitude.abs() > 1e-5)
        assert ((opening > 0) & (magnitude <= 0)).any()
        assert ((opening <= 0) & (magnitude > 0)).any()
        for other in (as_jumprelu(teacher), RationalSAE.from_teacher(teacher)):
            z, expected = other.encode(x), teacher.encode(x)
            torch.testing.assert_close(z[clear], expected[clear], rtol=2e-5, atol=1e-5)
            assert clear.float().mean() > 0.999
            torch.testing.assert_close(other.decode(expected), teacher.decode(expected), rtol=1e-5, atol=1e-5)


def test_a_dense_gated_start_is_that_of_the_jumprelu_that_it_is(make_teacher, x) -> None:
    teacher = make_teacher("gated")
    with torch.no_grad():
        dense, same = (RationalSAE.from_teacher(sae, support="dense") for sae in (teacher, as_jumprelu(teacher)))
        assert torch.equal(dense(x), same(x))
        errors = (dense.encode(x) - teacher.encode(x)).abs()
    assert errors.median() < 0.01
    assert dense.cfg.metadata.rsae_teacher_architecture == "gated"


def test_other_architectures_are_refused(make_teacher) -> None:
    from sae_lens import AbsTopKSAE, AbsTopKSAEConfig

    signed = AbsTopKSAE(AbsTopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=3))
    with pytest.raises(ValueError, match="upgrades standard, jumprelu, topk, gated; this teacher is 'abstopk'"):
        RationalSAE.from_teacher(signed)
    with pytest.raises(ValueError, match="this teacher is 'rational'"):
        RationalSAE.from_teacher(RationalSAE.from_teacher(make_teacher("standard")))


@pytest.mark.parametrize("family", FAMILIES)
def test_saelens_training_classes_are_teachers_too(make_teacher, x, family) -> None:
    import sae_lens

    name, state = (
        type(make_teacher(family)).__name__.removesuffix("SAE") + "TrainingSAE",
        make_teacher(family).state_dict(),
    )
    config = getattr(sae_lens, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, **({"k": K} if family == "topk" else {}))
    training = getattr(sae_lens, name)(config)
    training.load_state_dict({name: w.clamp(min=0) if name == "threshold" else w for name, w in state.items()})
    sae = RationalSAE.from_teacher(training)
    with torch.no_grad():
        assert torch.equal(sae.encode(x) != 0, training.encode(x) != 0)
        close(sae(x), training(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_weights_that_are_not_finite_are_refused(make_teacher, name, value) -> None:
    teacher = make_teacher("jumprelu")
    with torch.no_grad():
        getattr(teacher, name).view(-1)[5] = value
    with pytest.raises(ValueError, match=f"the teacher's {name} holds nan or inf"):
        RationalSAE.from_teacher(teacher)


# -- files -------------------------------------------------------------------------------------------------------------

SHAPES = {
    "relu": ("standard", {}),
    "relu-dense": ("standard", {"support": "dense"}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu-dense": ("jumprelu", {"support": "dense"}),
    "topk": ("topk", {}),
    "topk-dense": ("topk", {"support": "dense"}),
    "topk-calibrated": ("topk", {"threshold": 0.7}),
}


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("shape", SHAPES)
def test_save_and_load_by_saelens(make_teacher, x, tmp_path, shape, trained) -> None:
    family, kwargs = SHAPES[shape]
    conventions = {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"} if trained else {}
    sae = RationalSAE.from_teacher(make_teacher(family, **conventions), **kwargs)
    if trained:
        train(sae)
    per_latent = sae.gate.C_in.ndim == 1
    with torch.no_grad():
        expected, x_hat = sae.encode(x), sae(x)
        assert bool((expected != 0).any())
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is RationalSAE
    with torch.no_grad():
        assert torch.equal(loaded.encode(x), expected)
        assert torch.equal(loaded(x), x_hat)
        assert torch.equal(sae(x), x_hat)  # saving changed nothing
    assert loaded.gate.C_in.ndim == per_latent
    assert loaded.cfg.k == sae.cfg.k
    assert loaded.cfg.metadata.rsae_teacher_architecture == family
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("per_latent", [False, True])
def test_what_the_files_hold(tmp_path, per_latent) -> None:
    """cfg.json holds the gate in full; the weights file holds SAELens' names, and scales where they are per latent."""
    from safetensors.torch import load_file

    sae = bent("hard", per_latent, K, 0.5)
    sae.save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "rational"
    for name in ("num_coeffs", "den_coeffs"):
        assert torch.equal(torch.tensor(config[name]), getattr(sae.gate, name))
    assert (config["k"], config["alpha"], config["support"]) == (K, 0.5, "hard")
    assert (config["C_in"] is None) == per_latent
    names = {"W_enc", "b_enc", "W_dec", "b_dec", "gate.threshold"} | (
        {"gate.C_in", "gate.C_out"} if per_latent else set()
    )
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == names
    if not per_latent:
        assert config["C_in"] == sae.gate.C_in.item() != config["C_out"] == sae.gate.C_out.item()


def test_save_load_save_is_stable(tmp_path, x) -> None:
    sae = bent("hard", True, None, 0.0)
    sae.save_model(tmp_path / "a")
    SAE.load_from_disk(tmp_path / "a").save_model(tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bfloat16_load_keeps_the_gate_in_float32(make_teacher, x, tmp_path, shape) -> None:
    family, kwargs = SHAPES[shape]
    sae = train(RationalSAE.from_teacher(make_teacher(family), **kwargs))
    num, den = sae.gate.num_coeffs.detach(), sae.gate.den_coeffs.detach()
    assert not torch.equal(num, num.bfloat16().float())
    sae.save_model(tmp_path)
    for loaded in (SAE.load_from_disk(tmp_path, dtype="bfloat16"), SAE.load_from_disk(tmp_path).to(torch.bfloat16)):
        assert loaded.W_enc.dtype == torch.bfloat16
        assert {t.dtype for t in loaded.gate.state_dict().values()} == {torch.float32}
        assert torch.equal(loaded.gate.num_coeffs, num)
        assert torch.equal(loaded.gate.den_coeffs, den)
        if sae.gate.C_in.ndim == 0:
            assert torch.equal(loaded.gate.C_in, sae.gate.C_in)
        with torch.no_grad():
            latents, x_hat = loaded.encode(x), loaded(x)
            assert latents.dtype == x_hat.dtype == torch.bfloat16
            # thresholds and rounded pre-activations swap a few latents; the reconstruction stays
            assert (x_hat.float() - sae(x)).square().mean() < 0.01 * sae(x).square().mean()
        # and once more, from bfloat16: the coefficients are still those
        loaded.save_model(tmp_path / "again")
        assert torch.equal(SAE.load_from_disk(tmp_path / "again").gate.num_coeffs, num)


def test_casting_to_bfloat16_and_back_keeps_the_gate(x) -> None:
    sae = bent("hard", True, None, 0.0)
    before = copy.deepcopy(sae.gate.state_dict())
    sae.to(torch.bfloat16).to(torch.float32)
    for name, tensor in sae.gate.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_load_with_fold(tmp_path, x) -> None:
    sae = bent("hard", True, None, 0.0)
    sae.save_model(tmp_path)
    folded = SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(D_SAE))
    with torch.no_grad():
        close(folded(x), sae(x))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which is told that there is no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def put_on_hub(cache: Path, repo: str, folder: str, files: Path) -> None:
    """The layout that the hub's client leaves after a download: blobs, a snapshot that links to them, and a ref."""
    root, commit = cache / f"models--{repo.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    snapshot = root / "snapshots" / commit / folder
    for made in (root / "refs", root / "blobs", snapshot):
        made.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for file in files.iterdir():
        blob = root / "blobs" / f"blob-of-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.mark.parametrize("shape", ["relu", "jumprelu", "topk-dense"])
def test_from_pretrained_by_hub_name(make_teacher, x, tmp_path, hub, shape) -> None:
    family, kwargs = SHAPES[shape]
    sae = train(RationalSAE.from_teacher(make_teacher(family), **kwargs))
    sae.save_model(tmp_path / "saved")
    put_on_hub(hub, "org/repo", "layer_1/rational", tmp_path / "saved")
    loaded = SAE.from_pretrained("org/repo", "layer_1/rational")
    assert type(loaded) is RationalSAE
    with torch.no_grad():
        assert torch.equal(loaded(x), sae(x))
    narrow = RationalSAE.from_pretrained("org/repo", "layer_1/rational", dtype="bfloat16")
    assert torch.equal(narrow.gate.num_coeffs, sae.gate.num_coeffs)


# -- folding -----------------------------------------------------------------------------------------------------------

RULES = [("hard", None, 0.0), ("hard", K, 0.0), ("hard", K, 0.5), ("hard", K, 1.0), ("dense", None, 0.0)]


@pytest.mark.parametrize(("support", "k", "alpha"), RULES)
@pytest.mark.parametrize("per_latent", [False, True], ids=["scalar", "per-latent"])
def test_folding_is_exact(x, tmp_path, support, per_latent, k, alpha) -> None:
    sae = bent(support, per_latent, k, alpha)
    norms = sae.W_dec.detach().norm(dim=1)
    with torch.no_grad():
        latents, x_hat = sae.encode(x), sae(x)
        homogeneous = sae.gate(2 * sae.pre_acts(x))
        sae.fold_W_dec_norm()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
        close(sae(x), x_hat)
        close(sae.encode(x), latents * norms)
    assert (homogeneous - 2 * latents).abs().max() > 1e-2  # else the inherited fold would pass as well
    sae.save_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(SAE.load_from_disk(tmp_path)(x), sae(x))


@pytest.mark.parametrize("per_latent", [False, True], ids=["scalar", "per-latent"])
@pytest.mark.parametrize("shared_norm", [1.0, 2.5])
def test_folding_equal_norms_of_a_dense_gate_with_k(x, per_latent, shared_norm) -> None:
    sae = bent("dense", per_latent, K, 0.0)
    with torch.no_grad():
        sae.W_dec.mul_(shared_norm / sae.W_dec.norm(dim=1, keepdim=True))
        latents, x_hat = sae.encode(x), sae(x)
        sae.fold_W_dec_norm()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
        close(sae(x), x_hat, 1e-4)
        close(sae.encode(x), shared_norm * latents, 1e-4)


@pytest.mark.parametrize("per_latent", [False, True], ids=["scalar", "per-latent"])
def test_folding_unequal_norms_of_a_dense_gate_with_k_is_refused(x, per_latent) -> None:
    sae = bent("dense", per_latent, K, 0.0)
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(NotImplementedError, match="use hard support, or one calibrated threshold"):
        sae.fold_W_dec_norm()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed before the refusal"


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_equal_and_apart(make_teacher, x, tmp_path, way, normalize_activations, family) -> None:
    sae = train(RationalSAE.from_teacher(make_teacher(family, normalize_activations=normalize_activations)))
    with torch.no_grad():
        expected = sae(x)
    if way == "deepcopy":
        other = copy.deepcopy(sae)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(sae))
    else:
        torch.save(sae, tmp_path / "sae.pt")
        other = torch.load(tmp_path / "sae.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        for parameter in other.parameters():
            parameter.zero_()
        other.cfg.metadata.hook_name = "elsewhere"
        assert torch.equal(sae(x), expected)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert {n for n, _ in other.named_parameters()} == {n for n, _ in sae.named_parameters()}


def test_a_copy_reshapes_heads_by_itself(make_teacher, x) -> None:
    teacher = make_teacher(
        "standard", reshape_activations="hook_z", metadata=SAEMetadata(hook_name="blocks.0.attn.hook_z")
    )
    heads, other = x.view(300, 3, D_IN // 3), copied(teacher)
    with torch.no_grad():
        assert torch.equal(other(heads), teacher(heads))


def test_a_folded_sae_copies(x) -> None:
    sae = bent("hard", False, K, 1.0)
    sae.fold_W_dec_norm()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(sae)(x), sae(x))


def test_a_bfloat16_sae_copies(x) -> None:
    sae = bent("hard", True, None, 0.0).to(torch.bfloat16)
    other = pickle.loads(pickle.dumps(sae))
    with torch.no_grad():
        assert torch.equal(other(x), sae(x))
    assert other.W_enc.dtype == torch.bfloat16
    assert torch.equal(other.gate.num_coeffs, sae.gate.num_coeffs)


# -- save_sae ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_save_sae_writes_what_save_model_writes(make_teacher, tmp_path, family) -> None:
    for sae in (make_teacher(family), RationalSAE.from_teacher(make_teacher(family))):
        sae.save_model(tmp_path / "theirs")
        save_sae(sae, tmp_path / "ours")
        assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
        for file in (tmp_path / "theirs").iterdir():
            assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()


def test_save_sae_replaces_the_old_one(make_teacher, tmp_path, x) -> None:
    save_sae(make_teacher("standard"), tmp_path)
    sae = train(RationalSAE.from_teacher(make_teacher("jumprelu")))
    save_sae(sae, tmp_path)
    with torch.no_grad():
        assert torch.equal(SAE.load_from_disk(tmp_path)(x), sae(x))
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("half_written", [False, True])
def test_a_failed_save_leaves_the_old_checkpoint(make_teacher, tmp_path, monkeypatch, half_written) -> None:
    sae = RationalSAE.from_teacher(make_teacher("standard"))
    save_sae(sae, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    train(sae)
    whole = RationalSAE.save_model

    def save_model(self, path):
        if half_written:
            weights, _ = whole(self, path)
            weights.write_bytes(weights.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RationalSAE, "save_model", save_model)
    with pytest.raises(OSError, match="No space left"):
        save_sae(sae, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# -- SAELens' own use of it --------------------------------------------------------------------------------------------

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_host import save_tiny

    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def hooked(llama: Path):
    """A HookedSAETransformer, which TransformerLens builds from a configuration alone: random, and offline."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=16, n_ctx=64, d_head=8, n_heads=2, d_mlp=32, d_vocab=64, act_fn="silu", seed=0, device="cpu"
    )
    return HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(llama))


@pytest.fixture
def bridge(llama: Path):
    """A SAETransformerBridge about transformers' own llama, from a local folder.

    A new one each time: SAELens 6.54 leaves a bridge's hook point deaf where an SAE has been spliced in and taken out.
    """
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    return SAETransformerBridge.boot_transformers(str(llama), device="cpu")


@pytest.fixture(params=["hooked", "bridge"])
def model(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 64, (4, 16), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_runs_with_it_as_with_the_teacher(make_teacher, model, tokens, family) -> None:
    teacher = make_teacher(family, d_in=16)
    sae = RationalSAE.from_teacher(teacher)
    latents = f"{HOOK}.hook_sae_acts_post"
    if hasattr(model, "get_sae_hook_name"):
        latents = model.get_sae_hook_name(sae)
    with torch.no_grad():
        clean = model(tokens)
        expected, expected_cache = model.run_with_cache_with_saes(tokens, saes=[teacher])
        logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
        close(logits, expected, 1e-4)
        assert torch.equal(cache[latents] != 0, expected_cache[latents] != 0)
        close(cache[latents], expected_cache[latents], 1e-4)
        # it was spliced in, and taken out again
        assert (logits - clean).abs().max() > 0.01 * clean.abs().max()
        assert torch.equal(model(tokens), clean)
        # the latents can be steered through SAELens' hooks
        off = model.run_with_hooks_with_saes(
            tokens, saes=[sae], fwd_hooks=[(latents, lambda z, hook: torch.zeros_like(z))]
        )
        sae.W_dec.zero_()
        only_bias = model.run_with_saes(tokens, saes=[sae])
        close(off, only_bias, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_term_gives_the_model_back(make_teacher, model, tokens, family) -> None:
    sae = train(RationalSAE.from_teacher(make_teacher(family, d_in=16)))
    with torch.no_grad():
        close(model.run_with_saes(tokens, saes=[sae], use_error_term=True), model(tokens), 1e-4)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # in SAELens' store
@pytest.mark.parametrize("family", FAMILIES)
def test_run_evals_says_of_it_what_it_says_of_the_teacher(make_teacher, model, family) -> None:
    """SAELens' run_evals on the RationalSAE that starts as the teacher, and on the teacher itself; then on a bent one."""
    from datasets import Dataset
    from sae_lens import ActivationsStore
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    g = torch.Generator().manual_seed(3)
    dataset = Dataset.from_dict({"tokens": torch.randint(4, 64, (64, 16), generator=g).tolist()})
    config = get_eval_everything_config(
        batch_size_prompts=8, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2
    )

    def metrics(sae):
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset,
            context_size=16,
            store_batch_size_prompts=8,
            total_tokens=64,
            streaming=False,
            device="cpu",
        )
        values, by_latent = run_evals(sae, store, model, ActivationScaler(), config)
        return {f"{group}/{name}": value for group, row in values.items() for name, value in row.items()}, by_latent

    teacher = make_teacher(family, d_in=16)
    if hasattr(model, "get_sae_hook_name"):
        # SAELens 6.54's bridge knows the other name when it splices an SAE in, but not in run_with_hooks, which run_evals calls
        teacher.cfg.metadata.hook_name = "blocks.1.hook_out"
    teacher.b_enc.data.sub_(0.3)
    sae = RationalSAE.from_teacher(teacher)
    (expected, expected_by_latent), (actual, by_latent) = metrics(teacher), metrics(sae)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert by_latent["feature_density"] == pytest.approx(expected_by_latent["feature_density"], abs=1e-6)
    assert 0 < actual["sparsity/l0"] < D_SAE
    assert actual["model_behavior_preservation/kl_div_with_sae"] > 1e-3
    with torch.no_grad():
        moved = metrics(train(sae))[0]
    assert moved["reconstruction_quality/mse"] != pytest.approx(actual["reconstruction_quality/mse"], rel=1e-3)


def test_gradients_reach_every_parameter(x) -> None:
    """Against torch's own autograd of the formula, written out densely in float64."""
    for (support, k, alpha), per_latent in itertools.product(
        [("hard", None, 0.0), ("dense", None, 0.0)], [False, True]
    ):
        sae = bent(support, per_latent, k, alpha)
        target = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        (sae(x) - target).square().sum().backward()

        leaves = {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}
        gate = sae.gate
        num, den = (
            (fit.double() + unit.double() * leaves[f"gate.{name}_relative"])
            for name, fit, unit in (
                ("num", gate.num_fit, gate.num_fit.abs()),
                ("den", gate.den_fit, gate.den_fit.abs()),
            )
        )
        h = (x.double() - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
        t = h / leaves["gate.C_in"]
        u = (t.clamp(-1, 1) - gate.centre) / gate.scale
        P = sum(a * u**i for i, a in enumerate(num))
        A = sum(b * u ** (j + 1) for j, b in enumerate(den))
        latents = leaves["gate.C_out"] * (P / (1 + A.abs()) + (t - 1).relu())
        if support == "hard":
            latents = torch.where(sae.pre_acts(x).detach() > gate.threshold.detach(), latents, 0.0)
        (latents @ leaves["W_dec"] + leaves["b_dec"] - target).square().sum().backward()
        for name, parameter in sae.named_parameters():
            if name == "gate.threshold":
                continue
            assert parameter.grad is not None, name
            close(parameter.grad.double(), leaves[name].grad, 1e-3)
