"""The one training loop: every arm (teacher's own gate or rational) runs through it on the same batches.

`rsae.trainees` says what one step of it trains, and in which units.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rsae.artefacts import Progress, atomic, config_hash, flush, provenance, read_json, write_json
from rsae.calibrate import HeldOut, calibrate_threshold, match_l0, mean_l0, pre_acts
from rsae.cpu import keep_pages
from rsae.mesh import ALONE, JOINING, Mesh, save_joined, shard_of, with_weights
from rsae.metrics import NotFinite
from rsae.rational import Surrogate
from rsae.sae import RationalSAE, copied, without_rescaling
from rsae.teachers import load_teacher
from rsae.trainees import (
    AS_IT_IS,
    NORMALISED,
    DenseTrainee,
    Form,
    GatedTrainee,
    ReLUTrainee,
    ThresholdTrainee,
    TopKTrainee,
    Trainee,
    reads_about_0,
    rows_differ_from_1,
)

if TYPE_CHECKING:
    from sae_lens import SAE

Objective = Literal["matched-l0", "l0", "l1"]
Part = Literal["weights", "thresholds", "scales", "shape"]

LOG_EVERY = 10
# No gradient from its edge tells a JumpReLU's encoder that latents come on as it grows: its thresholds have to keep up. Within 1%
# of the FVU of their best rate on each of three teachers, at the default lr (dev/LOG.md)
GATE_LR, JUMPRELU_LR = 1e-3, 1e-2
# The edge of an RSAE from a JumpReLU; from a TopK it gains a little, from a ReLU it does not (dev/LOG.md)
JUMPRELU_EDGE = Surrogate(strength=0.4, crowding=32.0, sparing=0.1)
# An L0 that was matched, and is further than this from the target, relatively, is warned of.
L0_TOLERANCE = 0.01
# The threshold that a ReLU teacher's latents start with keeps this share of them.
RELU_START = 0.8


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How an arm is fine-tuned."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 2048
    """Tokens in a step."""
    lr: float = 1e-3
    """Adam's learning rate of weights and biases."""
    gate_lr: float | None = None
    """Learning rate of log-thresholds, log C_in, log C_out, and of the rational's coefficients relative to their fit. None:
    JUMPRELU_LR for a JumpReLU's own thresholds, GATE_LR for every other gate."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly."""
    decay: float = 0.4
    """Share of the steps, at the end, in which it falls linearly to 0."""
    objective: Objective = "matched-l0"
    """"matched-l0": mean L0 is held at `target_l0`. "l0" and "l1": `penalty` times the L0 or the l1 norm is added to the loss."""
    target_l0: float | None = None
    """For matched-l0; None: the L0 that the SAE has when it comes."""
    penalty: float | None = None
    """Price of a unit of L0 or of l1, in units of the squared error per token (whose total is about d_in). Of L0 each latent of an
    RSAE pays what its `surrogate` weighs it by; the loss in the log is without it."""
    alpha: float = 0.25
    """How far the thresholds of a rational gate with hard support follow the sample: theta_j s(x)^alpha (see RationalGate)."""
    surrogate: Surrogate | None = None
    """The gradient at the edge of hard support. A JumpReLU always uses the rectangle, the standard of the field. None:
    JUMPRELU_EDGE for an RSAE from a JumpReLU, Surrogate() for every other gate."""
    frozen: tuple[Part, ...] = ()
    """Parts that do not train: "weights" (of encoder and decoder, with their biases), "thresholds", "scales" (C_in, C_out), "shape"
    (the rational's coefficients). With frozen thresholds L0 is not matched: it stays what the weights make of it."""
    seed: int = 0
    """Orders the batches."""
    checkpoint_every: int = 200
    """Steps between checkpoints that a killed run continues from."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("lr", "gate_lr", "penalty", "seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, and finite; got {value}")
        if self.target_l0 is not None and not 0 < self.target_l0 < math.inf:
            raise ValueError(f"target_l0 must be positive; got {self.target_l0}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is from 0 (thresholds are fixed) to 1 (they follow the sample); got {self.alpha}")
        if self.objective not in ("matched-l0", "l0", "l1"):
            raise ValueError(f"objective is 'matched-l0', 'l0' or 'l1'; got {self.objective!r}")
        if self.objective != "matched-l0" and self.penalty is None:
            raise ValueError(f"objective {self.objective!r} needs a penalty; or use 'matched-l0'")


class Store(Protocol):
    """What the loop reads: an ActivationStore, or anything like it."""

    d_in: int
    mean: Float[Tensor, " d_in"]
    fingerprint: str

    def batches(
        self, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Float[Tensor, "batch/world d_in"]]:
        """Endless shuffled batches, the same for the same seed; `start` skips that many. Of each, the rank-th of `world` parts."""
        ...

    def iterate(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "n d_in"], Any]]:
        """Once through, in order: (activations, document ids)."""
        ...


def kind_of(sae: SAE[Any]) -> type[Trainee]:
    """The class that trains an SAE's gate."""
    architecture = sae.cfg.architecture()
    kinds: dict[str, type[Trainee]] = {
        "standard": ReLUTrainee,
        "topk": TopKTrainee,
        "jumprelu": ThresholdTrainee,
        "gated": GatedTrainee,
        "rational": ThresholdTrainee,
    }
    if isinstance(sae, RationalSAE) and sae.gate.support == "dense":
        return DenseTrainee
    if architecture not in kinds:
        raise ValueError(f"fine-tuning knows {', '.join(kinds)}; this SAE is {architecture!r}")
    return kinds[architecture]


def trainee_for(
    sae: SAE[Any], unit: float, config: FinetuneConfig, mesh: Mesh = ALONE, form: Form = AS_IT_IS
) -> Trainee:
    """The Trainee of an SAE."""
    return kind_of(sae)(sae, unit, settled(config, sae), mesh, form)


def settled(config: FinetuneConfig, sae: SAE[Any]) -> FinetuneConfig:
    """The config with what it leaves to the kind of SAE."""
    is_from_jumprelu = isinstance(sae, RationalSAE) and sae.cfg.metadata.rsae_teacher_architecture == "jumprelu"
    surrogate = config.surrogate or (JUMPRELU_EDGE if is_from_jumprelu else Surrogate())
    rate = JUMPRELU_LR if sae.cfg.architecture() == "jumprelu" else GATE_LR
    return replace(config, surrogate=surrogate, gate_lr=rate if config.gate_lr is None else config.gate_lr)


def schedule(step: int, config: FinetuneConfig) -> float:
    """Factor of the learning rate: linear warm-up, constant, linear decay to 0."""
    up = (step + 1) / max(1.0, config.warmup * config.steps)
    down = (config.steps - step) / max(1.0, config.decay * config.steps)
    return min(1.0, up, down)


def check_trainable(sae: SAE[Any]) -> None:
    """Refuse an SAE whose inputs are not what a store holds, or whose weights are not of one dtype.

    Raises:
        ValueError: says what to do.
    """
    cfg = sae.cfg
    if sae.W_enc.dtype != sae.W_dec.dtype:
        raise ValueError(
            f"W_enc is {sae.W_enc.dtype} and W_dec {sae.W_dec.dtype}: make them one (sae.to(torch.float32))"
        )
    if cfg.reshape_activations != "none":
        raise ValueError(
            f"this SAE has reshape_activations {cfg.reshape_activations!r}: it reads attention heads side by side, and rsae "
            "reads residual streams"
        )
    if cfg.normalize_activations not in ("none", *NORMALISED):
        raise ValueError(
            f"this SAE has normalize_activations {cfg.normalize_activations!r}, which should have been folded into its weights: "
            "do that first (SAELens: fold_activation_norm_scaling_factor, with sqrt(d_in) / mean norm of its inputs)"
        )


def check_width(sae: SAE[Any], d_in: int) -> None:
    """Refuse activations of another width than the SAE's."""
    if sae.cfg.d_in != d_in:
        raise ValueError(f"the SAE has d_in {sae.cfg.d_in} and the activations {d_in}: another model or hook?")


def check_mesh(sae: SAE[Any], config: FinetuneConfig, mesh: Mesh, out: Path | None) -> None:
    """Refuse ranks that the SAE or its batches cannot be divided among."""
    if mesh.devices is not None and out is None:
        raise ValueError("several ranks need a folder that they share: pass out")
    if config.batch_size % mesh.data.size:
        raise ValueError(
            f"a batch of {config.batch_size} cannot be divided among {mesh.data.size} ranks: choose a batch size that can"
        )
    if sae.cfg.d_sae % mesh.latents.size:
        raise ValueError(
            f"{sae.cfg.d_sae} latents cannot be divided into {mesh.latents.size} shards: choose a number that divides them"
        )


def check_weights(sae: SAE[Any], name: str, mesh: Mesh = ALONE) -> None:
    """Refuse to finish with an SAE that cannot be loaded again, whichever shard it is that cannot."""
    broken = [f"nan or inf in {key}" for key, tensor in sae.state_dict().items() if not bool(tensor.isfinite().all())]
    if isinstance(sae, RationalSAE) and not broken:
        try:
            sae.gate.check()
        except ValueError as error:
            broken.append(str(error))
    if broken := sorted({each for part in mesh.ranks.gather(broken) for each in part}):
        raise NotFinite(f"{name}: training ended with {'; '.join(broken)}: lower the learning rates")


def check_topk_l0(sae: SAE[Any], l0: float | None) -> None:
    """Refuse to ask a TopK for another L0 than its k, before work is done: it would be ignored."""
    if sae.cfg.architecture() == "topk" and l0 not in (None, sae.cfg.k):
        raise ValueError(f"L0 {l0:g} was asked for, and a TopK's is its k, {sae.cfg.k}: leave it out")


def check_settings(sae: SAE[Any], config: FinetuneConfig) -> None:
    """Refuse an objective or an L0 that an SAE cannot have, to freeze what it does not have, or to freeze all that it has."""
    without_weights = with_weights(sae, {name: tensor.to("meta") for name, tensor in sae.state_dict().items()})
    parts = set(trainee_for(without_weights, 1.0, config).parts())
    if config.target_l0 is not None and config.target_l0 > sae.cfg.d_sae:
        raise ValueError(f"target_l0 {config.target_l0:g} is more than the SAE's {sae.cfg.d_sae} latents")
    if (
        isinstance(sae, RationalSAE)
        and 0 < sae.gate.alpha < 1
        and config.alpha not in (sae.gate.alpha, FinetuneConfig.alpha)
    ):
        raise ValueError(
            f"the thresholds of this RSAE follow the sample by {sae.gate.alpha:g}, which it was trained with and keeps: "
            "leave alpha out"
        )
    if sae.cfg.architecture() == "topk" and config.objective == "l0":
        raise ValueError("a TopK's L0 is its k, which no price moves: use 'matched-l0', or upgrade it first")
    if not config.frozen:
        return
    if absent := set(config.frozen) - parts:
        raise ValueError(f"this SAE has no {', '.join(sorted(absent))} to freeze; it has {', '.join(sorted(parts))}")
    if set(config.frozen) == parts:
        raise ValueError(f"nothing is left to train: {', '.join(config.frozen)} is all that this SAE has")


def finetune(
    sae: SAE[Any],
    data: Store,
    config: FinetuneConfig,
    *,
    held_out: Store,
    out: Path | None = None,
    origin: str | None = None,
    progress: Progress | None = None,
    name: str = "finetune",
    mesh: Mesh = ALONE,
) -> SAE[Any]:
    """Train an SAE with its own gate, on batches that depend on `data`, `config.seed` and `config.batch_size` alone.

    With the objective "matched-l0" the result has the target L0 on `held_out`, exactly but for ties (unless its thresholds are
    frozen): training steers it, and `rsae.calibrate.match_l0` does the rest. A rational gate that keeps the k largest first gets a
    threshold for each latent, which follows the sample as far as `config.alpha` says, and one whose thresholds are 0 (a ReLU's)
    gets low positive ones: an edge at 0 can learn nothing.

    Args:
        sae: StandardSAE, JumpReLUSAE, TopKSAE, GatedSAE or RationalSAE (a dense gate with the objective "l1", as in the paper). Not
            changed.
        data: activations to train on.
        held_out: activations on which L0 is measured and matched.
        out: folder for log.jsonl, checkpoint-STEP (while it runs) and the finished SAELens checkpoint. A run that was
            killed continues from its last checkpoint to the same result; a finished one is loaded.
        origin: what `sae` is to a run in `out`, where another processor would make it of other weights; None: its weights' hash.
        progress, name: progress(name, steps done, steps).
        mesh: the ranks that train together (`Mesh.of`), each on its share of every batch and with its shard of the latents. What
            comes out is what one process gets, but for the rounding of sums, and a run may be continued by other ranks. No rank
            holds more of the SAE in memory than its shard: what comes and what is returned can be mapped files. Needs `out`.

    Returns:
        A new SAE of the same class, in the units of the activations, on the device and in the dtype of `sae`. It is trained,
        matched and saved in float32; rounded to a narrower dtype, it has the target L0 as nearly as that can tell thresholds apart.

    Raises:
        ValueError: d_in differs, the SAE cannot be trained with these settings, no latent of it is active, `out` holds another run,
            the loss is not finite, or the mesh does not fit.
    """
    check_width(sae, data.d_in)
    if held_out.d_in != data.d_in:
        raise ValueError(
            f"activations to train on have d_in {data.d_in}, those held out {held_out.d_in}: another model or hook?"
        )
    check_trainable(sae)
    check_mesh(sae, config, mesh, out)
    keep_pages()
    check_settings(sae, config)
    config = settled(config, sae)
    inputs = {
        "loop": kind_of(sae).loop,
        "config": asdict(config),
        "sae": origin or _hash_of(sae),
        "data": data.fingerprint,
        "held_out": held_out.fingerprint,
    }
    folds = rows_differ_from_1(sae)
    if folds or not reads_about_0(sae):
        inputs["form"] = 2  # raised as `loop` is, where there is one
    mesh.ranks.agree("inputs and settings", config_hash(inputs))
    folder = _Folder(out, inputs, mesh) if out is not None else None
    if folder is not None and folder.done:
        return folder.result().to(sae.W_enc.device, sae.W_enc.dtype)
    # A dense gate's L0 is d_sae, and nothing is steered to it
    dense = isinstance(sae, RationalSAE) and sae.gate.support == "dense"
    like, d_sae = sae.W_enc, sae.cfg.d_sae
    # In float32 all along: the factor that matches L0 is less than bfloat16 can tell apart
    part = shard_of(sae, mesh).to(mesh.device, torch.float32)
    target = config.target_l0 or (float(d_sae) if dense else mean_l0(part, HeldOut(held_out), mesh))
    if target == 0:
        raise ValueError("no latent of this SAE is active on the held-out activations: another model, hook or scale?")
    sample = list(islice(data.batches(config.batch_size, seed=config.seed), 8))
    part = _ready_to_train(part, sample, config, target, mesh)
    config = replace(config, target_l0=target)
    unit = _unit(sample[:4], data.mean)
    form = Form.of(part, folds, sample[:4], data.mean, unit, mesh)
    if folder is not None:
        form = form._replace(fold=folder.kept("fold", form.fold))
    trainee = trainee_for(part, unit, config, mesh, form).to(mesh.device)
    del sample
    part.cpu()  # the trainee has weights of its own
    with torch.enable_grad():
        _train(trainee, data, config, target, folder, progress, name)
    part = trainee.export(part).to(mesh.device)
    del trainee
    if config.objective == "matched-l0" and "thresholds" not in config.frozen:
        part = match_l0(part, HeldOut(held_out), target, mesh)
        found = mean_l0(part, HeldOut(held_out), mesh)
        if abs(found / target - 1) > L0_TOLERANCE:
            warnings.warn(
                f"{name}: the L0 asked for, {target:.4g}, was not reached: {found:.4g} on the held-out activations. Too few "
                "pre-activations are positive, or many are equal; do not compare this arm",
                stacklevel=2,
            )
    check_weights(part, name, mesh)
    if folder is not None:
        folder.finish(part)
    return (part if folder is None or mesh.devices is None else folder.result()).to(like.device, like.dtype)


def take_step(
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    raw: Float[Tensor, "batch d_in"],
    mean: Float[Tensor, " d_in"],
    target: float | None,
) -> Float[Tensor, " 4"]:
    """One step of the loop, on this rank's share of a batch of activations; with a `target`, L0 is moved towards it.

    Returns:
        Of the whole batch: loss; squared error and variance about `mean`, summed over d_in and averaged over tokens; L0.
    """
    mesh = trainee.mesh
    # Before anything else: the batch is in the cache
    variance = F.mse_loss(raw, mean.expand_as(raw), reduction="sum") / (len(raw) * trainee.error_unit**2)
    optimizer.zero_grad()
    result = trainee(trainee.inputs(raw))
    result.loss.backward()
    if mesh.devices is not None:
        mesh.sum_gradients(*trainee.for_ranks())
    optimizer.step()
    trainee.constrain()
    found = mesh.data.mean(
        torch.stack([result.loss.detach(), result.squared_error.detach(), variance, result.l0.detach()])
    )
    if target is not None:
        trainee.steer(found[3], target)
    return found


def _train(
    trainee: Trainee,
    data: Store,
    config: FinetuneConfig,
    target: float,
    folder: _Folder | None,
    progress: Progress | None,
    name: str,
) -> None:
    """The loop."""
    parts = trainee.parts()
    for part in set(config.frozen):
        for parameter in parts.pop(part):
            parameter.requires_grad_(False)
    body = parts.pop("weights", [])
    gate = [parameter for part in parts.values() for parameter in part]
    groups = [{"params": body, "rate": config.lr}, {"params": gate, "rate": config.gate_lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99), fused=True)
    mesh = trainee.mesh

    def batches(start: int) -> Iterator[Tensor]:
        share = {"rank": mesh.data.rank, "world": mesh.data.size}
        return iter(data.batches(config.batch_size, seed=config.seed, start=start, **share))

    steers = config.objective == "matched-l0" and "thresholds" not in config.frozen
    first = folder.restore(trainee, optimizer) if folder is not None else 0
    mean = data.mean.to(mesh.device)
    sums, counted, began = torch.zeros(4, device=mesh.device), 0, time.perf_counter()
    for step, raw in zip(range(first, config.steps), batches(first), strict=False):
        raw = raw.to(mesh.device, non_blocking=True)
        if step == 0:
            trainee.begin(trainee.inputs(raw))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(step, config)
        found = take_step(trainee, optimizer, raw, mean, target if steers else None)
        sums += found
        counted += 1
        done = step + 1
        saves = folder is not None and done % config.checkpoint_every == 0 and done < config.steps
        if done % LOG_EVERY == 0 or saves or done == config.steps:  # a run that goes on from there logs the same
            loss, squared_error, variance, l0 = (sums / counted).tolist()
            if not math.isfinite(loss):
                raise NotFinite(f"{name}: the loss is {loss} at step {done}; lower the learning rate ({config.lr})")
            seconds = time.perf_counter() - began
            row = {
                "step": done,
                "tokens": done * config.batch_size,
                "seconds": round(seconds, 3),
                "loss": loss / data.d_in,
                "fvu": squared_error / variance,
                "l0": l0,
                "lr": config.lr * schedule(step, config),
                "tokens_per_s": round((done - first) * config.batch_size / seconds, 1),
                **trainee.state_of_gate(),
            }
            if folder is not None:
                folder.log(row)
            sums, counted = torch.zeros_like(sums), 0
        if folder is not None and saves:
            folder.checkpoint(trainee, optimizer, done)
        if progress is not None:
            progress(name, done, config.steps)


def _unit(sample: list[Tensor], mean: Tensor) -> float:
    """Root mean square of a coordinate of the centred activations: what training takes as 1."""
    total = sum(float((x - mean).double().square().sum()) for x in sample)
    return math.sqrt(total / sum(x.numel() for x in sample))


def _ready_to_train(sae: SAE[Any], sample: list[Tensor], config: FinetuneConfig, l0: float, mesh: Mesh) -> SAE[Any]:
    """An SAE in the form that trains: a rational gate with a positive threshold for each latent, a TopK with unit rows."""
    if sae.cfg.architecture() == "topk" and sae.cfg.rescale_acts_by_decoder_norm:
        return without_rescaling(sae)
    if not isinstance(sae, RationalSAE) or sae.gate.threshold is None or "thresholds" in config.frozen:
        return sae
    sae = copied(sae)
    gate = sae.gate
    assert gate.threshold is not None
    thresholds = mesh.whole(gate.threshold)
    if gate.alpha == 1:
        gate.threshold.data.mul_(calibrate_threshold(sae, sample, l0, mesh) / thresholds.median())
    elif not bool((thresholds > 0).all()):
        # In proportion to each latent's own size, so that none is silenced; the common factor keeps the larger activations,
        # since what l1 shrank to little more than nothing is what a threshold is there to leave out
        share = 1.0 if bool((thresholds > 0).any()) else RELU_START
        typical = _mean_active(sae, sample, mesh)
        gate.threshold.data.copy_(torch.where(gate.threshold > 0, gate.threshold, typical))
        matched = match_l0(sae, sample, share * l0, mesh)
        assert isinstance(matched, RationalSAE)
        sae, gate = matched, matched.gate
    if gate.alpha in (0, 1):  # what lies between was trained so
        gate.k, gate.alpha = (max(1, round(l0)), config.alpha) if config.alpha else (None, 0.0)
    sae.sync_config()
    return sae


@torch.no_grad()
def _mean_active(sae: SAE[Any], sample: list[Tensor], mesh: Mesh) -> Tensor:
    """Mean positive pre-activation of each latent, (d_sae,); of one that has none, the median latent's."""
    total = count = torch.zeros(sae.cfg.d_sae, device=sae.W_enc.device)
    for x in sample:
        h = pre_acts(sae, x)
        total, count = total + h.relu().sum(0), count + (h > 0).sum(0)
    mean = total / count  # nan where there is none
    return torch.where(count > 0, mean, mesh.whole(mean).nanmedian())


def _hash_of(sae: SAE[Any]) -> str:
    """Short hash of an SAE's weights and of what its configuration says about the function they make."""
    cfg = {name: value for name, value in sae.cfg.to_dict().items() if name not in ("metadata", "device", "dtype")}
    digest = hashlib.sha256(json.dumps(cfg, sort_keys=True, default=str).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        for piece in tensor.detach().flatten().split(1 << 24):  # a narrow dtype is not widened whole
            digest.update(piece.float().cpu().numpy().data)
    return digest.hexdigest()[:16]


class _Folder:
    """A fine-tuning run on disk: finetune.json (what it is, and whether it is done), log.jsonl, checkpoint-STEP, result.

    A checkpoint is written by torch.distributed.checkpoint as safetensors, each rank its shard, and read by any number of ranks.
    """

    def __init__(self, path: Path, inputs: dict[str, Any], mesh: Mesh) -> None:
        self.path, self.mesh = path, mesh
        self._about = mesh.once(lambda: self._open(config_hash(inputs), inputs))
        self.done = bool(self._about["done"])

    def _open(self, hash_: str, inputs: dict[str, Any]) -> dict[str, Any]:
        about = self.path / "finetune.json"
        shutil.rmtree(self.path / JOINING, ignore_errors=True)  # of a run that was killed as it ended
        if about.exists():
            found = read_json(about)
            if found["hash"] == hash_:
                return found
            names = [name for name, value in json.loads(json.dumps(inputs)).items() if found.get(name) != value]
            if found["done"] or (self.path / "log.jsonl").exists():  # else it was refused before its first step
                raise ValueError(
                    f"{self.path} holds another run (another {', '.join(names)}): choose another folder or delete it"
                )
        elif self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no fine-tuning run: choose another folder")
        write_json(about, {"hash": hash_, "done": False, **inputs, "provenance": provenance()})
        return read_json(about)

    def kept(self, name: str, found: float) -> float:
        """What the run began with, on whatever processor; `found`, if it begins now."""

        def keep() -> dict[str, Any]:
            if name not in self._about:
                write_json(self.path / "finetune.json", {**self._about, name: found})
            return read_json(self.path / "finetune.json")

        self._about = self.mesh.once(keep)
        return self._about[name]

    def result(self) -> SAE[Any]:
        """The SAE of a run that is done."""
        return load_teacher(self.path).sae

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to log.jsonl."""
        if self.mesh.ranks.is_main:
            with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def checkpoint(self, trainee: Trainee, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write everything that the rest of the run depends on."""
        partial = self.path / "checkpoint.partial"
        self.mesh.once(lambda: shutil.rmtree(partial, ignore_errors=True))
        self.mesh.save(_state(trainee, optimizer), partial)

        def publish() -> None:
            for file in [*partial.iterdir(), partial]:
                flush(file)
            partial.replace(self.path / f"checkpoint-{step}")
            self._drop(but=step)

        self.mesh.once(publish)

    def restore(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> int:
        """Load the last checkpoint if there is one; the step to go on from. Log lines after it are dropped."""
        step = max(self.mesh.once(self._steps), default=0)
        if step:
            self.mesh.load(_state(trainee, optimizer), self.path / f"checkpoint-{step}")

        def shorten() -> None:
            if (log := self.path / "log.jsonl").exists():
                # A last line without its end is what a run left that was cut off as it wrote
                whole = [row for row in log.read_text().splitlines(keepends=True) if row.endswith("\n")]
                kept = [row for row in whole if json.loads(row)["step"] <= step]
                with atomic(log) as temporary:
                    temporary.write_text("".join(kept))

        self.mesh.once(shorten)
        return step

    def finish(self, part: SAE[Any]) -> None:
        """Save the result, of which every rank brings its part, and mark the run as done."""
        save_joined(part, self.mesh, self.path)

        def close() -> None:
            write_json(self.path / "finetune.json", {**self._about, "done": True})
            self._drop()

        self.mesh.once(close)

    def _steps(self) -> list[int]:
        return [int(path.name.partition("-")[2]) for path in self.path.glob("checkpoint-*")]

    def _drop(self, but: int | None = None) -> None:
        for step in self._steps():
            if step != but:
                shutil.rmtree(self.path / f"checkpoint-{step}")


def _state(trainee: Trainee, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors that the rest of a run depends on, by name; loading writes into them."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in trainee.state_dict(keep_vars=True).items()}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trainee.named_parameters():
        if id(parameter) in trained:
            state = optimizer.state[parameter]
            if not state:  # as Adam begins
                zero = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state.update(step=torch.zeros((), device=parameter.device), exp_avg=zero, exp_avg_sq=zero.clone())
            tensors |= {f"adam.{moment}.{name}": tensor for moment, tensor in state.items()}
    return tensors
