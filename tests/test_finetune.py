"""The loop: gradients against the plain dense formula, matched L0, resuming, what it refuses, and that it learns."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

from rsae import finetune as finetuning
from rsae import pretrain as pretraining
from rsae import sparse, trainees
from rsae.calibrate import calibrate, counting_threshold, match_l0, mean_l0
from rsae.finetune import FinetuneConfig, check_topk_l0, finetune, schedule, trainee_for
from rsae.metrics import NotFinite
from rsae.pretrain import initial_sae, pretrain
from rsae.rational import Surrogate
from rsae.sae import RationalSAE, copied, save_sae
from rsae.sparse import Entries
from rsae.teachers import load_teacher
from rsae.teachers.checkpoint import build
from rsae.trainees import Form

D_IN, D_SAE, L0 = 12, 40, 4
SMALL = FinetuneConfig(steps=30, batch_size=64, lr=3e-3, checkpoint_every=10)


class MemoryStore:
    """Activations in memory, read as an ActivationStore is."""

    def __init__(self, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        features = F.normalize(torch.randn(24, D_IN, generator=torch.Generator().manual_seed(99)), dim=1)
        codes = torch.rand(rows, 24, generator=generator) * (torch.rand(rows, 24, generator=generator) < 0.12)
        self.x = 50 * (codes @ features + 0.3 + 0.01 * torch.randn(rows, D_IN, generator=generator))
        self.mean, self.d_in, self.fingerprint = self.x.mean(0), D_IN, f"memory-{rows}-{seed}"

    def batches(self, batch_size, *, seed, start=0, rank=0, world=1):
        step = start
        while True:
            generator = torch.Generator().manual_seed(1000 * seed + step)
            yield self.x[torch.randint(len(self.x), (batch_size,), generator=generator)].chunk(world)[rank]
            step += 1

    def iterate(self, batch_size):
        for part in self.x.split(batch_size):
            yield part, torch.zeros(len(part), dtype=torch.int64)


@pytest.fixture(scope="module")
def data():
    return MemoryStore(2000, seed=0)


@pytest.fixture(scope="module")
def held_out():
    return MemoryStore(1000, seed=1)


@pytest.fixture(scope="module")
def teachers(data, held_out):
    config = replace(SMALL, steps=150, target_l0=float(L0), penalty=0.05)
    return {
        family: pretrain(family, data, config, d_sae=D_SAE, held_out=held_out)
        for family in ("relu", "jumprelu", "topk", "gated")
    }


def fvu(sae, store):
    with torch.no_grad():
        return float((sae(store.x) - store.x).square().sum() / (store.x - store.x.mean(0)).square().sum())


def dense_reference(trainee, x, gate):
    """The loss of a trainee by the plain formula on (batch, d_sae) tensors, from the same bfloat16 pre-activations."""
    centred = x - trainee.centre
    h = centred @ trainee.W_enc.T + trainee.b_enc
    rounded = F.linear(*(t.to(sparse.NARROW) for t in (centred, trainee.W_enc, trainee.b_enc)))
    h = h + (rounded.float() - h).detach()  # bfloat16 values, float32 gradients
    z = gate(h)
    return (z @ trainee.W_dec + trainee.b_dec - x).square().sum() / len(x), z


class TestGradients:
    """One step's gradients against autograd on the dense formula, with the bfloat16 products done in float32."""

    @pytest.fixture(autouse=True)
    def in_float32(self, monkeypatch):
        monkeypatch.setattr(sparse, "NARROW", torch.float32)

    def compare(self, trainee, x, gate, extra=lambda z: 0.0):
        step = trainee(x)
        step.loss.backward()
        ours = {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}
        trainee.zero_grad()
        loss, z = dense_reference(trainee, x, gate)
        (loss + extra(z)).backward()
        torch.testing.assert_close(step.squared_error, loss, rtol=1e-5, atol=1e-5)
        assert step.l0.item() == pytest.approx(float((z != 0).sum() / len(x)))
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            expected = getattr(trainee, name).grad
            error = (ours[name] - expected).norm() / expected.norm()
            assert error < 1e-4, (name, error)

    def test_relu(self, teachers, data):
        trainee = trainee_for(teachers["relu"], 10.0, replace(SMALL, penalty=0.3))
        norms = trainee.W_dec.detach().norm(dim=1)
        self.compare(trainee, data.x[:64] / 10, torch.relu, lambda z: 0.3 * (z * norms).sum() / 64)

    def test_topk(self, teachers, data):
        trainee = trainee_for(teachers["topk"], 10.0, SMALL)

        def topk(h):
            kept = h.topk(L0, dim=1).indices
            return torch.zeros_like(h).scatter(1, kept, h.gather(1, kept).relu())

        self.compare(trainee, data.x[:64] / 10, topk)

    def test_topk_with_silent_latents(self, teachers, data):
        """What they make of the error is an error of its own, in which nothing else learns."""
        trainee, x = trainee_for(teachers["topk"], 10.0, SMALL), data.x[:64] / 10
        is_silent = torch.arange(D_SAE) % 2 == 0
        trainee.choose = lambda h: Entries.largest(torch.where(is_silent, -torch.inf, h), L0)
        trainee(x).loss.backward()
        assert not trainee.W_enc.grad[is_silent].any()
        active = {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}
        trainee.zero_grad()
        trainee.silent[is_silent] = trainees.SILENT_TOKENS
        step = trainee(x)
        step.loss.backward()
        found = {name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None}
        trainee.zero_grad()
        h = (x - trainee.centre) @ trainee.W_enc.T + trainee.b_enc
        kept = torch.where(is_silent, -torch.inf, h).topk(L0, dim=1).indices
        z = torch.zeros_like(h).scatter(1, kept, h.gather(1, kept).relu())
        error = (x - z @ trainee.W_dec - trainee.b_dec).detach()
        others = torch.where(is_silent, h, -torch.inf).topk(D_IN // 2, dim=1).indices
        z = torch.zeros_like(h).scatter(1, others, h.gather(1, others).relu())
        auxiliary = (error - z @ trainee.W_dec).square().sum(1).mean() / 32
        auxiliary.backward()
        torch.testing.assert_close(step.loss - step.squared_error, auxiliary, rtol=1e-4, atol=1e-4)
        for name in ("W_enc", "b_enc", "W_dec"):
            expected = active[name] + getattr(trainee, name).grad
            assert (getattr(trainee, name).grad[is_silent] != 0).any()
            assert (found[name] - expected).norm() / expected.norm() < 1e-4, name
        torch.testing.assert_close(found["b_dec"], active["b_dec"])

    @pytest.mark.parametrize("alpha", [0.0, 0.25])
    @pytest.mark.parametrize("kind", ["rectangle", "jump-corrected"])
    def test_rational_with_hard_support(self, teachers, data, kind, alpha):
        sae = RationalSAE.from_teacher(teachers["jumprelu"])
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            sae.gate.num_relative.normal_(std=1e-3, generator=generator)
        if alpha:  # thresholds follow the sample, and every latent has scales of its own
            sae.gate.k, sae.gate.alpha = L0, alpha
            for name in ("C_in", "C_out"):
                scales = getattr(sae.gate, name).detach() * (1 + 0.1 * torch.rand(D_SAE, generator=generator))
                setattr(sae.gate, name, torch.nn.Parameter(scales))
            sae.sync_config()
        surrogate = Surrogate(kind, 0.5, 0.3, None, sparing=0.1)
        trainee = trainee_for(sae, 10.0, replace(SMALL, surrogate=surrogate, target_l0=float(L0)))
        reference = copy.deepcopy(sae.gate)
        reference.C_in.data /= 10
        reference.C_out.data /= 10
        reference.threshold.data /= 10
        curvature = trainee.norms.squeeze(1) ** 2 / 64
        # The loop takes a latent's share of the L0 that was asked for, the module alone of that of its batch
        more = mean_l0(sae, [data.x[:64]]) / L0
        surrogate = replace(surrogate, crowding=surrogate.crowding * more, sparing=surrogate.sparing / more)
        self.compare(trainee, data.x[:64] / 10, lambda h: reference(h, surrogate=surrogate, curvature=curvature))
        for name, theirs in (("num_relative", reference.num_relative), ("den_relative", reference.den_relative)):
            trainee.zero_grad()
            trainee(data.x[:64] / 10).loss.backward()
            ours = getattr(trainee.amplitude.gate, name).grad
            assert (ours - theirs.grad).norm() / theirs.grad.norm() < 1e-3
        # What trains is the logarithm: its gradient is the value's, times the value
        for ours, theirs in (
            (trainee.log_threshold, reference.threshold),
            (trainee.amplitude.log_C_in, reference.C_in),
            (trainee.amplitude.log_C_out, reference.C_out),
        ):
            expected = theirs.grad * theirs.detach()
            assert expected.norm() > 0
            assert (ours.grad - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk", "gated"])
class TestArms:
    def test_the_control_keeps_its_class_and_its_l0(self, family, teachers, data, held_out):
        teacher = teachers[family]
        before = mean_l0(teacher, [held_out.x])
        control = finetune(teacher, data, SMALL, held_out=held_out)
        assert type(control) is type(teacher)
        assert mean_l0(control, [held_out.x]) == pytest.approx(before, rel=0.01)
        assert fvu(control, data) < fvu(teacher, data)
        torch.testing.assert_close(control.W_dec.norm(dim=1), teacher.W_dec.norm(dim=1), rtol=1e-4, atol=1e-5)

    def test_the_rsae_keeps_the_l0_and_learns(self, family, teachers, data, held_out):
        teacher = teachers[family]
        init = calibrate(RationalSAE.from_teacher(teacher), [data.x])
        assert fvu(init, data) == pytest.approx(fvu(teacher, data), rel=1e-5)
        rsae = finetune(init, data, replace(SMALL, steps=100), held_out=held_out)
        assert isinstance(rsae, RationalSAE)
        assert mean_l0(rsae, [held_out.x]) == pytest.approx(mean_l0(teacher, [held_out.x]), rel=0.01)
        assert fvu(rsae, data) < fvu(teacher, data)
        assert bool((rsae.gate.num_fit != init.gate.num_fit).any() or (rsae.gate.num_relative != 0).any())

    def test_a_killed_run_ends_with_the_same_bytes(self, family, teachers, data, held_out, tmp_path):
        start = calibrate(RationalSAE.from_teacher(teachers[family]), [data.x])

        def stop(name, done, total):
            if done == 17:
                raise KeyboardInterrupt

        whole = finetune(start, data, SMALL, held_out=held_out, out=tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            finetune(start, data, SMALL, held_out=held_out, out=tmp_path / "killed", progress=stop)
        assert list((tmp_path / "killed").glob("checkpoint-*"))
        finetune(start, data, SMALL, held_out=held_out, out=tmp_path / "killed")
        for name in ("sae_weights.safetensors", "cfg.json"):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        steps = [
            [json.loads(line)["step"] for line in (tmp_path / f / "log.jsonl").read_text().splitlines()]
            for f in ("whole", "killed")
        ]
        assert steps[0] == steps[1] == [10, 20, 30]
        loaded = SAE.load_from_disk(tmp_path / "whole")
        torch.testing.assert_close(loaded(data.x), whole(data.x), rtol=1e-5, atol=1e-4)

    def test_the_teacher_is_not_changed(self, family, teachers, data, held_out):
        before = copy.deepcopy(teachers[family].state_dict())
        finetune(teachers[family], data, replace(SMALL, steps=3), held_out=held_out)
        for name, tensor in teachers[family].state_dict().items():
            assert torch.equal(tensor, before[name])


def scaled(sae, factor):
    """The same function, with rows of W_dec so many times as long."""
    sae = copied(sae)
    with torch.no_grad():
        sae.W_dec *= factor
        for name in ("W_enc", "b_enc", "b_gate", "b_mag", "threshold"):
            if name in dict(sae.named_parameters()):
                sae.get_parameter(name).div_(factor)
    return sae


def without_subtraction(sae, offset):
    """The same function of activations that are shifted by `offset`, without b_dec subtracted from the input."""
    sae = copied(sae)
    with torch.no_grad():
        for name in ("b_gate", "b_enc", "b_mag"):
            if name in dict(sae.named_parameters()):
                slope = sae.r_mag.double().exp() if name == "b_mag" else 1.0
                sae.get_parameter(name).sub_((slope * ((sae.b_dec + offset).double() @ sae.W_enc.double())).float())
        sae.b_dec += offset
    sae.cfg.apply_b_dec_to_input = False
    return sae


def with_a_constant_latent(sae, offset):
    """The same function of activations that are shifted by `offset`, which a latent that is always active makes up for."""
    sae, size = copied(sae), offset.norm()
    with torch.no_grad():
        sae.b_enc -= offset @ sae.W_enc
        sae.W_enc[:, 0], sae.b_enc[0], sae.W_dec[0] = 0.0, size, offset / size
    return sae


def with_dead_latents(sae, norm):
    """The same function: three latents more for each, which are never active, their rows of that norm."""
    generator, (d_sae, d_in) = torch.Generator().manual_seed(4), sae.W_dec.shape
    more = F.normalize(torch.randn(3 * d_sae, d_in, generator=generator), dim=1)
    added = {"W_enc": more.T, "W_dec": norm * more}
    added |= {name: torch.full((3 * d_sae,), -1e4) for name in ("b_enc", "b_gate", "b_mag")}
    added |= {"r_mag": torch.zeros(3 * d_sae), "threshold": torch.ones(3 * d_sae)}
    weights = {
        name: tensor if name == "b_dec" else torch.cat([tensor, added[name]], dim=1 if name == "W_enc" else 0)
        for name, tensor in sae.state_dict().items()
    }
    family = {"standard": "relu"}.get(sae.cfg.architecture(), sae.cfg.architecture())
    return build(family, weights, k=getattr(sae.cfg, "k", None), apply_b_dec_to_input=True, metadata=None)


def moved(store, offset):
    store = copy.copy(store)
    store.x, store.mean = store.x + offset, store.mean + offset
    return store


class TestForm:
    """Adam's steps have one size, so an SAE is trained in a form for which that is right, whatever the one it comes in."""

    @pytest.mark.parametrize("is_rational", [False, True])
    @pytest.mark.parametrize("family", ["relu", "jumprelu", "topk", "gated"])
    def test_rows_of_any_length_train_alike(self, teachers, data, held_out, family, is_rational):
        def trained(sae):
            if is_rational:
                sae = calibrate(RationalSAE.from_teacher(sae), [data.x])
            return finetune(sae, data, SMALL, held_out=held_out)

        unit, long = trained(teachers[family]), trained(scaled(teachers[family], 256.0))
        assert long.W_dec.norm(dim=1).median() > 100
        torch.testing.assert_close(long(data.x), unit(data.x), rtol=1e-5, atol=1e-4)
        assert fvu(long, data) < fvu(teachers[family], data)

    @pytest.mark.parametrize("is_rational", [False, True])
    @pytest.mark.parametrize("family", ["relu", "jumprelu", "topk", "gated"])
    def test_inputs_far_from_0_train_as_those_about_it(self, teachers, data, held_out, family, is_rational):
        def trained(offset):
            store, sae = moved(data, offset), without_subtraction(teachers[family], offset)
            if is_rational:
                sae = calibrate(RationalSAE.from_teacher(sae), [store.x])
            return fvu(finetune(sae, store, SMALL, held_out=moved(held_out, offset)), store)

        far = torch.zeros(D_IN)
        far[5] = 30_000.0  # some 2,000 in training units
        assert trained(far) == pytest.approx(trained(torch.zeros(D_IN)), rel=0.03)

    @pytest.mark.parametrize("family", ["relu", "jumprelu", "topk"])
    def test_a_b_dec_far_from_the_mean_is_no_centre(self, teachers, data, held_out, family):
        far = torch.zeros(D_IN)
        far[5] = 5_000.0
        teacher, store = with_a_constant_latent(teachers[family], far), moved(data, far)
        sae = finetune(teacher, store, replace(SMALL, lr=1e-3), held_out=moved(held_out, far))
        assert sae.cfg.apply_b_dec_to_input
        assert fvu(sae, store) < fvu(teacher, store)

    def test_what_is_frozen_comes_back(self, teachers, data, held_out):
        sae = RationalSAE.from_teacher(scaled(without_subtraction(teachers["jumprelu"], 0.0), 40.0))
        frozen = finetune(sae, data, replace(SMALL, frozen=("weights",)), held_out=held_out)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            torch.testing.assert_close(getattr(frozen, name), getattr(sae, name), rtol=1e-6, atol=1e-6)

    def test_a_run_in_the_form_that_it_came_in_has_no_form(self, teachers, data, held_out, tmp_path):
        finetune(teachers["relu"], data, SMALL, held_out=held_out, out=tmp_path / "unit")
        finetune(scaled(teachers["relu"], 4.0), data, SMALL, held_out=held_out, out=tmp_path / "long")
        assert "form" not in json.loads((tmp_path / "unit" / "finetune.json").read_text())
        long = json.loads((tmp_path / "long" / "finetune.json").read_text())
        assert (long["form"], long["fold"]) == (2, 4.0)

    @pytest.mark.parametrize("family", ["relu", "jumprelu", "topk", "gated"])
    @pytest.mark.parametrize("norm", [1e-4, 1e3])
    def test_rows_of_dead_latents_say_nothing(self, teachers, data, held_out, family, norm):
        """Three times as many dead latents as there are latents, their rows of another norm: all the others train as before."""
        plain = finetune(teachers[family], data, SMALL, held_out=held_out)
        padded = finetune(with_dead_latents(teachers[family], norm), data, SMALL, held_out=held_out)
        assert mean_l0(padded, [held_out.x]) == pytest.approx(mean_l0(plain, [held_out.x]), rel=0.01)
        assert fvu(padded, data) < fvu(teachers[family], data)
        assert fvu(padded, data) == pytest.approx(fvu(plain, data), rel=0.05)

    def test_a_run_keeps_its_fold(self, teachers, data, held_out, tmp_path):
        """Weights of a checkpoint are in it, and another processor might find another one."""
        sae = scaled(teachers["jumprelu"], 64.0)
        whole = finetune(sae, data, SMALL, held_out=held_out)

        def stop(name, done, steps):
            if done == 15:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune(sae, data, SMALL, held_out=held_out, out=tmp_path, progress=stop)
        about = json.loads((tmp_path / "finetune.json").read_text())
        assert about["fold"] == 64.0
        with pytest.MonkeyPatch.context() as patch:
            of = Form.of
            patch.setattr(Form, "of", lambda *given: of(*given)._replace(fold=128.0))
            resumed = finetune(sae, data, SMALL, held_out=held_out, out=tmp_path)
        assert torch.equal(resumed.W_enc, whole.W_enc)


def test_gradients_are_taken_where_the_caller_takes_none(teachers, data, held_out):
    with torch.no_grad():
        assert fvu(finetune(teachers["relu"], data, SMALL, held_out=held_out), data) < fvu(teachers["relu"], data)


def test_a_stretch_of_other_text_may_have_many_active_latents(teachers, data, held_out):
    """2,048 tokens in a row of tables or code, with more than four times the mean L0."""
    sae = teachers["relu"]
    busy = 6 * held_out.x[:256].repeat(8, 1)
    calm = data.mean + 0.02 * (busy - data.mean).repeat(5, 1)
    uneven = copy.copy(held_out)
    uneven.x = torch.cat([busy, calm])
    l0 = mean_l0(sae, [uneven.x])
    assert mean_l0(sae, [busy]) > 4 * l0
    trained = finetune(sae, data, replace(SMALL, target_l0=l0), held_out=uneven)
    assert mean_l0(trained, [uneven.x]) == pytest.approx(l0, rel=0.01)


def test_an_l0_that_was_missed_is_said(teachers, data, held_out, monkeypatch):
    monkeypatch.setattr("rsae.finetune.match_l0", lambda sae, *_: sae)
    with pytest.warns(UserWarning, match=r"L0 asked for, 9, was not reached: .* on the held-out"):
        finetune(teachers["relu"], data, replace(SMALL, steps=1, target_l0=9.0), held_out=held_out)


def test_an_rsae_keeps_the_alpha_that_it_was_trained_with(teachers, data, held_out):
    once = finetune(calibrate(RationalSAE.from_teacher(teachers["topk"]), [data.x]), data, SMALL, held_out=held_out)
    with pytest.raises(ValueError, match=r"follow the sample by 0\.25.*leave alpha out"):
        finetune(once, data, replace(SMALL, alpha=0.5), held_out=held_out)


def test_a_row_that_is_left_over_may_have_many_active_latents(teachers, data):
    """The last batch of a store may be one row, and that one with ten times the mean L0."""
    busy = 5 * data.x[:256].amax(0, keepdim=True)
    sae = teachers["jumprelu"]
    l0 = mean_l0(sae, [data.x, busy])
    assert mean_l0(sae, [busy]) > 4 * l0
    found = match_l0(sae, [data.x, busy], l0)
    assert mean_l0(found, [data.x, busy]) == pytest.approx(l0, rel=1e-3)


def test_a_damaged_checkpoint_is_named(teachers, data, held_out, tmp_path):
    def stop(name, done, total):
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(teachers["topk"], data, SMALL, held_out=held_out, out=tmp_path, progress=stop)
    (file,) = tmp_path.glob("checkpoint-*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"checkpoint-10 cannot be read .*: delete it, and the run begins anew"):
        finetune(teachers["topk"], data, SMALL, held_out=held_out, out=tmp_path)


def test_a_finished_run_is_loaded_and_not_run_again(teachers, data, held_out, tmp_path):
    first = finetune(teachers["topk"], data, SMALL, held_out=held_out, out=tmp_path)
    calls = []
    again = finetune(
        teachers["topk"], data, SMALL, held_out=held_out, out=tmp_path, progress=lambda *a: calls.append(a)
    )
    assert calls == []
    assert torch.equal(again.W_dec, first.W_dec)


def test_what_is_returned_is_what_was_stored(teachers, data, held_out, tmp_path):
    """A run that starts from the result of another goes on when it is called again: the other is then read from its folder."""
    start = RationalSAE.from_teacher(teachers["jumprelu"])
    returned = finetune(start, data, SMALL, held_out=held_out, out=tmp_path / "first")
    read = finetune(start, data, SMALL, held_out=held_out, out=tmp_path / "first")
    assert not torch.equal(returned.gate.num_fit, start.gate.num_fit)  # the shape was trained
    for (name, ours), theirs in zip(returned.state_dict().items(), read.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    finetune(returned, data, SMALL, held_out=held_out, out=tmp_path / "second")
    finetune(read, data, SMALL, held_out=held_out, out=tmp_path / "second")


@pytest.mark.parametrize("n_broken", [2, L0 + 4])
def test_latents_that_are_nan_end_a_run_with_the_reason(teachers, data, held_out, n_broken):
    """nan is never above a threshold, so that no loss is nan; matching L0 must not look for its rank for ever."""
    broken = copied(teachers["jumprelu"])
    with torch.no_grad():
        broken.W_enc[:, :n_broken] = torch.nan
    with pytest.raises(NotFinite, match="nan"):
        finetune(broken, data, replace(SMALL, target_l0=float(L0)), held_out=held_out)


def test_another_run_in_the_folder_is_refused_and_kept(teachers, data, held_out, tmp_path):
    finetune(teachers["topk"], data, SMALL, held_out=held_out, out=tmp_path)
    before = (tmp_path / "sae_weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another run"):
        finetune(teachers["topk"], data, replace(SMALL, lr=1e-2), held_out=held_out, out=tmp_path)
    assert (tmp_path / "sae_weights.safetensors").read_bytes() == before


def test_each_gate_has_its_own_rate_unless_one_is_asked_for(teachers, data, held_out, tmp_path):
    """The thresholds of a JumpReLU, which alone learn from its edge, learn faster than a rational gate; what ran is recorded."""
    short = replace(SMALL, steps=2)
    arms = {
        "jumprelu": teachers["jumprelu"],
        "rational": RationalSAE.from_teacher(teachers["jumprelu"], support="hard"),
        "topk": teachers["topk"],
    }
    for name, sae in arms.items():
        finetune(sae, data, short, held_out=held_out, out=tmp_path / name)
        rate = json.loads((tmp_path / name / "finetune.json").read_text())["config"]["gate_lr"]
        assert rate == (finetuning.JUMPRELU_LR if name == "jumprelu" else finetuning.GATE_LR)
    moves = []
    for rate in (None, finetuning.GATE_LR, finetuning.JUMPRELU_LR):
        tuned = finetune(teachers["jumprelu"], data, replace(short, gate_lr=rate), held_out=held_out)
        moves.append((tuned.threshold / teachers["jumprelu"].threshold).log())
    assert torch.equal(moves[0], moves[2])
    assert moves[0].std() > 3 * moves[1].std()  # ten times the rate; what all of them have in common matches L0


def test_the_edge_is_that_of_the_family_unless_one_is_asked_for(teachers, tmp_path):
    """Rare latents are spared in an RSAE from a JumpReLU, also after it was stored, and in no control."""
    for family in ("relu", "jumprelu", "topk"):
        edge = finetuning.JUMPRELU_EDGE if family == "jumprelu" else Surrogate()
        save_sae(RationalSAE.from_teacher(teachers[family]), tmp_path / family)
        sae = load_teacher(tmp_path / family).sae
        assert finetuning.settled(SMALL, sae).surrogate == edge
        asked = replace(SMALL, surrogate=Surrogate(strength=0.1))
        assert finetuning.settled(asked, sae).surrogate == asked.surrogate
    control = trainee_for(teachers["jumprelu"], 10.0, replace(SMALL, surrogate=finetuning.JUMPRELU_EDGE))
    assert control.surrogate == Surrogate("rectangle", strength=0.0, crowding=0.0)


def test_how_often_a_latent_is_active_is_a_mean_over_the_last_tokens(teachers, monkeypatch):
    monkeypatch.setattr(trainees, "RATE_TOKENS", 400)
    trainee = trainee_for(RationalSAE.from_teacher(teachers["jumprelu"]), 10.0, replace(SMALL, target_l0=float(L0)))
    rates = torch.rand(5, D_SAE, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(D_SAE)
    for i, rate in enumerate(rates):
        n = 300 if i == 2 else 100  # batches of 100, 100 and 300 tokens, then two that are most of the memory
        often = trainee.often(rate, n)
        expected = expected + min(1.0, n / min(400, (100, 200, 500, 600, 700)[i])) * (rate - expected)
        torch.testing.assert_close(often, expected * D_SAE / L0)
    torch.testing.assert_close(trainee.often(rates[0], 1000), rates[0] * D_SAE / L0)  # more than it remembers


def test_a_rare_latent_keeps_its_place(teachers, data):
    """At an edge where little is to be gained, the price drives a latent out; one that was hardly ever active pays none."""
    sae = RationalSAE.from_teacher(teachers["jumprelu"])
    gradients = {}
    for sparing in (0.0, 0.1):
        how = replace(SMALL, target_l0=float(L0), surrogate=Surrogate(strength=0.4, price=1e3, sparing=sparing))
        trainee = trainee_for(sae, 10.0, how)
        trainee.rate.fill_(L0 / D_SAE)
        trainee.rate[: D_SAE // 2] = 0
        trainee.seen.fill_(1e9)
        trainee(data.x[:64] / 10).loss.backward()
        gradients[sparing] = -trainee.log_threshold.grad  # how they rise
    rare, usual = slice(None, D_SAE // 2), slice(D_SAE // 2, None)
    assert gradients[0.0][rare].mean() > 0
    assert gradients[0.1][rare].mean() < 0.1 * gradients[0.0][rare].mean()
    assert gradients[0.1][usual].mean() > 0.8 * gradients[0.0][usual].mean()


def test_objective_l0_prices_latents(teachers, data, held_out):
    cheap, dear = (
        finetune(
            RationalSAE.from_teacher(teachers["jumprelu"]), data,
            replace(SMALL, steps=100, objective="l0", penalty=price, alpha=0.0, gate_lr=1e-2), held_out=held_out,
        )
        for price in (0.001, 1.0)
    )  # fmt: skip
    assert mean_l0(dear, [held_out.x]) < 0.8 * mean_l0(cheap, [held_out.x])


def test_objective_l1_shrinks(teachers, data, held_out):
    free, taxed = (
        finetune(teachers["topk"], data, replace(SMALL, objective="l1", penalty=price), held_out=held_out)
        for price in (0.0, 1.0)
    )
    assert taxed.encode(data.x).abs().sum() < 0.95 * free.encode(data.x).abs().sum()


GATE_PARTS = {
    "thresholds": ("gate.threshold",),
    "scales": ("gate.C_in", "gate.C_out"),
    "shape": ("gate.num_coeffs", "gate.den_coeffs"),
    "weights": ("W_enc", "b_enc", "W_dec", "b_dec"),
}


def values(sae, names):
    return [sae.get_parameter(n) if "coeffs" not in n else getattr(sae.gate, n.removeprefix("gate.")) for n in names]


@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize(
    "frozen", [("weights",), ("scales", "shape"), ("weights", "thresholds", "shape"), ("thresholds",)]
)
def test_what_is_frozen_stays_and_all_else_learns(family, frozen, teachers, data, held_out):
    init = calibrate(RationalSAE.from_teacher(teachers[family]), [data.x])
    trained = finetune(init, data, replace(SMALL, frozen=frozen), held_out=held_out)
    for part, names in GATE_PARTS.items():
        same = [torch.equal(a, b) for a, b in zip(values(trained, names), values(init, names), strict=True)]
        if part not in frozen:
            assert not any(same), part
        elif part == "scales":  # kept through their logarithms
            for a, b in zip(values(trained, names), values(init, names), strict=True):
                torch.testing.assert_close(a, b)
        elif part == "weights":  # biases pass through training units
            torch.testing.assert_close(values(trained, names), values(init, names), rtol=1e-6, atol=1e-6)
        else:
            assert all(same), part
    if "thresholds" not in frozen or "weights" in frozen:  # matched, or nothing that L0 depends on has moved
        assert mean_l0(trained, [held_out.x]) == pytest.approx(mean_l0(init, [held_out.x]), rel=0.02)


def test_what_cannot_be_frozen(teachers, data, held_out, tmp_path):
    for sae, frozen, message in (
        (teachers["topk"], ("thresholds",), "no thresholds to freeze; it has weights"),
        (teachers["topk"], ("weights",), "nothing is left to train"),
        (teachers["jumprelu"], ("weights", "thresholds"), "nothing is left to train"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(sae, data, replace(SMALL, frozen=frozen), held_out=held_out, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_killed_run_with_frozen_parts_resumes_to_the_same_bytes(teachers, data, held_out, tmp_path):
    init = calibrate(RationalSAE.from_teacher(teachers["jumprelu"]), [data.x])
    config = replace(SMALL, frozen=("weights", "shape"))

    def stop(name, done, total):
        if done == 17:
            raise KeyboardInterrupt

    whole = finetune(init, data, config, held_out=held_out)
    with pytest.raises(KeyboardInterrupt):
        finetune(init, data, config, held_out=held_out, out=tmp_path, progress=stop)
    resumed = finetune(init, data, config, held_out=held_out, out=tmp_path)
    assert torch.equal(resumed.gate.threshold, whole.gate.threshold)
    assert torch.equal(resumed.W_dec, whole.W_dec)


@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk"])
def test_a_counting_threshold_counts_what_it_is_asked_to(family, teachers, data, held_out):
    dense = calibrate(RationalSAE.from_teacher(teachers[family], support="dense"), [data.x])
    eps = counting_threshold(dense, [held_out.x], 3.5)
    assert (dense.encode(held_out.x).abs() > eps).sum() == 3.5 * len(held_out.x)


@pytest.mark.parametrize(("family", "narrow"), [("relu", True), ("jumprelu", True), ("topk", True), ("topk", False)])
def test_the_papers_recipe_trains_a_dense_gate(family, narrow, teachers, data, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr("rsae.trainees.prefers_bfloat16", lambda: narrow)
    dense = calibrate(RationalSAE.from_teacher(teachers[family], support="dense"), [data.x])
    config = replace(SMALL, objective="l1", penalty=0.05)
    trained = finetune(dense, data, config, held_out=held_out, out=tmp_path)
    assert fvu(trained, data) < fvu(dense, data)
    assert bool((trained.encode(data.x) != 0).all())
    loaded = SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(loaded(data.x), trained(data.x), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="no zeros to count"):
        finetune(dense, data, SMALL, held_out=held_out)


def test_schedule_by_hand():
    config = FinetuneConfig(steps=100, warmup=0.1, decay=0.2)
    assert [schedule(s, config) for s in (0, 4, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"objective": "l2"}, "matched-l0"),
        ({"objective": "l1"}, "needs a penalty"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_d_in_of_sae_and_activations_must_agree(data, held_out):
    with pytest.raises(ValueError, match="d_in 8 and the activations 12"):
        finetune(StandardSAE(StandardSAEConfig(d_in=8, d_sae=16)), data, SMALL, held_out=held_out)


def test_weights_of_two_dtypes_are_refused(data, held_out):
    sae = initial_sae("topk", data, d_sae=D_SAE, l0=L0, seed=0)
    sae.W_dec.data = sae.W_dec.data.bfloat16()
    with pytest.raises(ValueError, match=r"W_enc is torch\.float32 and W_dec torch\.bfloat16"):
        finetune(sae, data, SMALL, held_out=held_out)


@pytest.mark.parametrize(
    "change", [{"normalize_activations": "expected_average_only_in"}, {"reshape_activations": "hook_z"}]
)
def test_inputs_that_are_not_those_of_the_store_are_refused(data, held_out, change):
    sae = StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=16))
    for name, value in change.items():
        setattr(sae.cfg, name, value)
    with pytest.raises(ValueError, match=next(iter(change.values()))):
        finetune(sae, data, SMALL, held_out=held_out)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("family", ["relu", "topk", "rational"])
def test_normalised_inputs(teachers, data, held_out, monkeypatch, normalize, family):
    """The loss is that of the SAE as SAELens runs it, in the units of the activations; and training lowers it."""
    sae = copy.deepcopy(teachers["topk" if family == "rational" else family])
    sae.cfg.normalize_activations = normalize
    sae = type(sae)(sae.cfg)
    start = initial_sae("relu" if family == "relu" else "topk", data, d_sae=D_SAE, l0=L0, seed=3)
    with torch.no_grad():
        sae.load_state_dict(start.state_dict())
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    sae = calibrate(RationalSAE.from_teacher(sae), [data.x]) if family == "rational" else sae
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "NARROW", torch.float32)
        trainee = trainee_for(sae, 7.0, replace(SMALL, penalty=0.0 if family == "relu" else None))
        error = trainee(trainee.inputs(data.x[:200])).squared_error * 7.0**2
    with torch.no_grad():
        expected = (sae(data.x[:200]) - data.x[:200]).square().sum() / 200
    torch.testing.assert_close(error, expected, rtol=1e-4, atol=0.0)
    trained = finetune(sae, data, replace(SMALL, steps=60, target_l0=float(L0)), held_out=held_out)
    assert trained.cfg.normalize_activations == normalize
    assert fvu(trained, held_out) < 0.8 * fvu(sae, held_out)


def gated_teacher(data):
    """A gated SAE with some structure: the directions of a random one, its gate open for a tenth of the latents."""
    sae = GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE))
    generator = torch.Generator().manual_seed(5)
    start = initial_sae("relu", data, d_sae=D_SAE, l0=L0, seed=2)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_dec"):
            sae.get_parameter(name).copy_(start.get_parameter(name))
        sae.r_mag.uniform_(-0.4, 0.4, generator=generator)
        sae.b_gate.copy_(start.b_enc + torch.rand(D_SAE, generator=generator))
        sae.b_mag.copy_(start.b_enc + 2 * torch.rand(D_SAE, generator=generator))
    return sae


def test_a_gated_sae_trains_as_itself(data, held_out):
    sae = gated_teacher(data)
    trained = finetune(sae, data, replace(SMALL, steps=100, target_l0=float(L0)), held_out=held_out)
    assert type(trained) is GatedSAE
    assert mean_l0(trained, [held_out.x]) == pytest.approx(L0, rel=0.01)
    for name in ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag"):
        assert not torch.equal(trained.get_parameter(name), sae.get_parameter(name)), name
    matched = match_l0(sae, [held_out.x], L0)
    assert fvu(trained, held_out) < 0.8 * fvu(matched, held_out)


def test_the_gated_loss_is_the_paper_s(data, monkeypatch):
    monkeypatch.setattr(sparse, "NARROW", torch.float32)
    sae, x = gated_teacher(data), data.x[:64]
    trainee = trainee_for(sae, 10.0, replace(SMALL, penalty=0.3))
    result = trainee(trainee.inputs(x))
    result.loss.backward()
    names = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")
    w = {name: sae.get_parameter(name).detach().clone().requires_grad_() for name in names}
    projection = (x - w["b_dec"].detach()) @ w["W_enc"]
    opening = projection + w["b_gate"]
    passing = (projection * w["r_mag"].exp() + w["b_mag"]).relu()
    z = torch.where(opening > 0, passing, 0.0)
    norms = w["W_dec"].detach().norm(dim=1)
    auxiliary = opening.relu() @ w["W_dec"].detach() + w["b_dec"].detach() - x
    loss = (z @ w["W_dec"] + w["b_dec"] - x).square().sum() + auxiliary.square().sum()
    loss = (loss / 100 + 0.3 * (opening.relu() * norms).sum() / 10) / 64
    loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(result.l0, (z != 0).sum() / 64)
    ours = {"W_enc": trainee.W_enc.grad.T, "b_gate": trainee.b_enc.grad / 10, "b_mag": trainee.b_mag.grad / 10}
    ours |= {"r_mag": trainee.r_mag.grad, "W_dec": trainee.W_dec.grad, "b_dec": trainee.b_dec.grad / 10}
    for name, gradient in ours.items():
        error = (gradient - w[name].grad).norm() / w[name].grad.norm()
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk", "rational", "gated"])
def test_what_b_dec_learns_does_not_move_the_encoder(family, teachers, data, monkeypatch):
    """b_dec trains as the decoder's alone; the checkpoint, whose encoder subtracts it, is the same function all the same."""
    monkeypatch.setattr(sparse, "NARROW", torch.float32)
    sae = gated_teacher(data) if family == "gated" else teachers["jumprelu" if family == "rational" else family]
    sae = RationalSAE.from_teacher(sae) if family == "rational" else sae
    trainee = trainee_for(sae, 10.0, replace(SMALL, penalty=0.0 if family in ("relu", "gated") else None))
    with torch.no_grad():
        trainee.b_dec += torch.randn(D_IN, generator=torch.Generator().manual_seed(0))
        if family == "gated":
            trainee.r_mag += 0.1
        step = trainee(trainee.inputs(data.x))
        exported = trainee.export(sae)
        latents = exported.encode(data.x)
        error = (exported.decode(latents) - data.x).square().sum() / len(data.x) / 100
    assert not torch.equal(exported.b_dec, sae.b_dec)
    torch.testing.assert_close(step.squared_error, error, rtol=1e-4, atol=1e-4)
    assert step.l0.item() == pytest.approx(float((latents != 0).sum() / len(data.x)), rel=1e-3)


def test_a_topk_that_rescales_by_its_decoder_norm(teachers, data, held_out):
    """With unequal rows it selects by h ||w||; training must go on from the same function."""
    scaled = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=L0, rescale_acts_by_decoder_norm=True))
    plain = teachers["topk"]
    scale = torch.linspace(0.5, 2, D_SAE)
    with torch.no_grad():
        scaled.W_enc.copy_(plain.W_enc / scale)
        scaled.b_enc.copy_(plain.b_enc / scale)
        scaled.W_dec.copy_(plain.W_dec * scale[:, None])
        scaled.b_dec.copy_(plain.b_dec)
    torch.testing.assert_close(scaled(data.x), plain(data.x), rtol=1e-4, atol=1e-3)
    tiny = replace(SMALL, steps=3, lr=1e-5)
    torch.testing.assert_close(
        finetune(scaled, data, tiny, held_out=held_out)(data.x),
        finetune(plain, data, tiny, held_out=held_out)(data.x),
        rtol=1e-2, atol=0.3,
    )  # fmt: skip


def test_a_loss_that_is_not_finite_stops_the_run(teachers, held_out):
    broken = MemoryStore(200, seed=0)
    broken.x[5] = float("nan")
    with pytest.raises(ValueError, match="the loss is nan"):
        finetune(teachers["topk"], broken, replace(SMALL, target_l0=4.0, batch_size=400), held_out=held_out)


def test_pretrained_teachers_are_saelens_own_classes(teachers, data, held_out):
    kinds = {"relu": StandardSAE, "jumprelu": JumpReLUSAE, "topk": TopKSAE, "gated": GatedSAE}
    for family, sae in teachers.items():
        assert type(sae) is kinds[family]
        assert fvu(sae, data) < 0.8 * fvu(initial_sae(family, data, d_sae=D_SAE, l0=L0, seed=0), data)
        assert mean_l0(sae, [held_out.x]) == pytest.approx(L0, rel=0.02)


@pytest.mark.parametrize("family", ["relu", "jumprelu", "topk", "gated"])
def test_a_teacher_goes_on_where_arithmetic_rounds_otherwise(family, data, held_out, tmp_path, monkeypatch):
    """The start of its training is computed anew, and there comes out by a little otherwise."""
    config = replace(SMALL, steps=20, checkpoint_every=5, target_l0=float(L0))
    how = {"d_sae": D_SAE, "held_out": held_out, "out": tmp_path / "teacher"}

    def stop(stage, done, total):
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(family, data, config, **how, progress=stop)
    initial = pretraining.initial_sae

    def rounded_otherwise(*arguments, **others):
        sae = initial(*arguments, **others)
        with torch.no_grad():
            sae.get_parameter("b_gate" if family == "gated" else "b_enc").add_(1e-7)
        return sae

    monkeypatch.setattr(pretraining, "initial_sae", rounded_otherwise)
    trained = pretrain(family, data, config, **how)
    assert [json.loads(row)["step"] for row in (tmp_path / "teacher" / "log.jsonl").read_text().splitlines()][-1] == 20
    assert torch.equal(pretrain(family, data, config, **how).W_dec, trained.W_dec)  # and is finished there
    with pytest.raises(ValueError, match=r"another run \(another sae\)"):
        pretrain(family, data, config, **{**how, "d_sae": D_SAE + 1})


def test_pretrain_refuses():
    with pytest.raises(ValueError, match="target_l0"):
        pretrain("topk", MemoryStore(10, 0), SMALL, d_sae=4, held_out=MemoryStore(10, 1))
    with pytest.raises(ValueError, match="relu, jumprelu, topk, gated"):
        initial_sae("gelu", MemoryStore(10, 0), d_sae=4, l0=2, seed=0)  # type: ignore[arg-type]


def test_an_sae_without_an_active_latent_is_refused(teachers, data, held_out):
    dead = copied(teachers["jumprelu"])
    dead.threshold.data.fill_(1e6)
    with pytest.raises(ValueError, match="no latent of this SAE is active"):
        finetune(dead, data, SMALL, held_out=held_out)


def test_other_architectures_are_named(data, held_out):
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=8))
    sae.cfg.__class__ = type("Other", (type(sae.cfg),), {"architecture": classmethod(lambda cls: "other")})
    with pytest.raises(ValueError, match="'other'"):
        trainee_for(sae, 1.0, SMALL)
    assert isinstance(TopKSAE(TopKSAEConfig(d_in=2, d_sae=4, k=1)), TopKSAE)


class TestTheLimits:
    def rsae(self, teachers, data, family="relu"):
        return calibrate(RationalSAE.from_teacher(teachers[family]), list(data.x.split(500)))

    def test_thresholds_of_latents_that_nothing_wakes_stay_positive(self, teachers, data, held_out):
        trained = finetune(self.rsae(teachers, data), data, replace(SMALL, target_l0=float(L0)), held_out=held_out)
        trainee = trainee_for(trained, 1.0, SMALL)
        trainee.silent[:3] = 10**6
        for _ in range(8000):
            trainee.constrain()
        sae = trainee.export(trained)
        sae.gate.check()
        threshold = sae.gate.threshold.detach()
        assert 0 < float(threshold[:3].max()) < float(threshold[3:].min())

    def test_an_l0_out_of_reach_ends_as_near_as_it_gets(self, teachers, data, held_out, tmp_path):
        how = replace(SMALL, steps=400, target_l0=D_SAE - 1.0)
        with pytest.warns(UserWarning, match="L0 asked for, 39, was not reached: 6"):
            sae = finetune(self.rsae(teachers, data), data, how, held_out=held_out, out=tmp_path / "run")
        assert all(bool(tensor.isfinite().all()) for tensor in sae.state_dict().values())
        with torch.no_grad():
            positive = float((sae.pre_acts(held_out.x) > 0).sum(1).float().mean())
        assert mean_l0(sae, [held_out.x]) == pytest.approx(positive, rel=0.01)
        assert (
            finetune(self.rsae(teachers, data), data, how, held_out=held_out, out=tmp_path / "run").cfg.d_sae == D_SAE
        )

    def test_a_gated_sae_whose_magnitudes_are_too_few(self, data):
        sae = gated_teacher(data)
        with torch.no_grad():
            magnitude = ((data.x - sae.b_dec) @ sae.W_enc) * sae.r_mag.exp() + sae.b_mag
            reachable = float((magnitude > 0).sum(1).float().mean())
        matched = match_l0(sae, [data.x], min(reachable + 5, D_SAE - 1.0))
        assert matched.b_gate.isfinite().all()
        assert mean_l0(matched, [data.x]) == pytest.approx(reachable, rel=0.02)

    def test_narrow_saes_are_matched_before_they_are_rounded(self, teachers, data, held_out, tmp_path):
        narrow = copy.deepcopy(teachers["jumprelu"]).to(torch.bfloat16)
        found = finetune(narrow, data, replace(SMALL, target_l0=5.0), held_out=held_out, out=tmp_path / "run")
        assert found.W_enc.dtype == torch.bfloat16
        saved = load_teacher(tmp_path / "run").sae
        assert saved.W_enc.dtype == torch.float32
        assert mean_l0(saved, [held_out.x]) == pytest.approx(5.0, rel=1e-3)

    def test_a_relu_with_a_price_of_0_finds_its_own(self, teachers, data, held_out):
        config = replace(SMALL, target_l0=float(L0))
        priced, free = (
            finetune(teachers["relu"], data, replace(config, penalty=penalty), held_out=held_out)
            for penalty in (0.0, None)
        )
        assert torch.equal(priced.W_enc, free.W_enc)

    def test_a_topk_has_no_other_l0_than_k(self, teachers):
        check_topk_l0(teachers["topk"], float(L0))
        check_topk_l0(teachers["topk"], None)
        check_topk_l0(teachers["jumprelu"], 9.0)
        with pytest.raises(ValueError, match="L0 9 was asked for, and a TopK's is its k, 4"):
            check_topk_l0(teachers["topk"], 9.0)

    def test_a_torn_line_of_the_log_is_dropped(self, teachers, data, held_out, tmp_path):
        config = replace(SMALL, target_l0=float(L0))
        whole = finetune(teachers["topk"], data, config, held_out=held_out, out=tmp_path / "whole")

        class Stop(Exception):
            pass

        def stop(_, done, __):
            if done == 25:
                raise Stop

        with pytest.raises(Stop):
            finetune(teachers["topk"], data, config, held_out=held_out, out=tmp_path / "torn", progress=stop)
        with open(tmp_path / "torn" / "log.jsonl", "a") as log:
            log.write('{"step": 25, "tok')
        again = finetune(teachers["topk"], data, config, held_out=held_out, out=tmp_path / "torn")
        assert torch.equal(again.W_enc, whole.W_enc)
        rows = [json.loads(line) for line in (tmp_path / "torn" / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [10, 20, 30]


def test_copies_of_an_sae_that_normalises_share_nothing(teachers, data):
    sae = copied(teachers["jumprelu"])
    sae.cfg.normalize_activations = "layer_norm"
    sae._setup_activation_normalization()
    twin = copied(sae)
    expected = sae(data.x[:4])
    latents = sae.encode(data.x[:4])
    twin.encode(data.x[4:8])
    torch.testing.assert_close(sae.decode(latents), expected)
