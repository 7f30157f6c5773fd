"""Is the gain the gate's? Teachers of every family, upgraded beside their controls, measured on other sources' text.

    python -m benchmarks.evidence [--only TEXT] [--minutes N] [--arms NAME ... | --probe | --tables]

runs the grid cell by cell and, after each, writes results/evidence.json, EVIDENCE.md and evidence-*.svg, and the table of
README.md. A cell is a host, a hook, a family, a width, a sparsity and a seed (of teacher and batches). What is finished is not run
again, a killed cell continues: models and activations are in runs/evidence, and results/evidence.json keeps what was measured.
What was trained there with other settings, or by another loop, stops the command: it is never overwritten, and goes by hand.
Several calls at a time share the grid, one for each GPU or, with OMP_NUM_THREADS=1, for each core: a cell is run by one of them.

    --only TEXT    only cells whose name contains TEXT (gemma, topk, l0-32, seed-0, ...)
    --minutes N    start no cell after N minutes
    --arms NAME    control, RSAE and these arms alone; a later call adds others to a cell, and measures all that it has again
    --probe        k-sparse probing (twelve sets) of finished cells whose models are here
    --tables       run nothing: the tables anew from results/evidence.json

Every trained arm sees the same batches for the same steps; all are matched to the teacher's L0 on validation text (exact zeros are
counted), and compared on held-out documents of sources that no training text is from, paired by document. Where that leaves their
L0 too far apart on these documents, control and RSAE are matched once more, there, and both comparisons are kept.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from benchmarks.evidence_tables import MAIN, METRICS, STEPS, setting_of, short, write_tables
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from rsae.artefacts import Progress, config_hash, provenance, read_json, sha256_file, write_json, write_safetensors
from rsae.calibrate import HeldOut, calibrate, counting_threshold, match_l0, mean_l0
from rsae.cli import progress_shown
from rsae.evaluate import COMPARISON_RULE, evaluate_runs, measured_batches
from rsae.finetune import GATE_LR, JUMPRELU_EDGE, FinetuneConfig, finetune
from rsae.hosts import Host, TokenLosses, load_host
from rsae.identity import identity
from rsae.metrics import MATCHED, NotFinite
from rsae.pipeline import PAPER_PENALTY, Data, UpgradeConfig
from rsae.pretrain import pretrain
from rsae.probing import QUICK, probe
from rsae.rational import Support, Surrogate
from rsae.sae import RationalSAE, save_sae
from rsae.teachers import load_teacher
from rsae.teachers.checkpoint import Family
from rsae.text import Contexts, shared_documents
from rsae.trainees import DenseTrainee, GatedTrainee, ReLUTrainee, ThresholdTrainee, TopKTrainee, Trainee

if TYPE_CHECKING:
    from sae_lens import SAE
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS = ROOT / "runs" / "evidence", ROOT / "results"

TEXT = "package:sae-probes"
LAYERS = {"package:smollm2-135m": (5, 15, 25), "package:gemma3-270m": (3, 9, 14)}
"""An early, the middle and a late layer of each host."""
FAMILIES: tuple[Family, ...] = ("relu", "jumprelu", "topk")
"""Of all layers, sparsities and seeds; a gated and a BatchTopK teacher have one cell a host."""
BATCH = 2048
TEACHER = FinetuneConfig(
    steps=3000, batch_size=BATCH, lr=1e-3, gate_lr=3e-4, warmup=0.1, decay=0.3, penalty=2.5,
    surrogate=Surrogate("rectangle", bandwidth=0.8, strength=0.0, crowding=0.0), checkpoint_every=500,
)  # fmt: skip
"""Written out, so that teachers stay what they are when the defaults of an upgrade change."""
FINETUNE = FinetuneConfig(
    steps=1000, batch_size=BATCH, lr=1e-3, gate_lr=GATE_LR, surrogate=Surrogate(), checkpoint_every=500
)


class Rates(NamedTuple):
    """Learning rates with which a control is better than with FINETUNE's, or a teacher than with TEACHER's (dev/LOG.md).

    Written out, as FINETUNE's are, so that cells stay what they are when the defaults of an upgrade change.
    """

    lr: float
    """Of the weights, in all fine-tuned arms."""
    control: float = GATE_LR
    """Of the control's own thresholds, alone."""
    teacher: float = TEACHER.gate_lr
    """Of the teacher's thresholds, as it is trained from scratch."""


RATES: dict[tuple[str, int, str], Rates] = {
    **{("package:smollm2-135m", layer, "jumprelu"): Rates(4e-3, 3e-3) for layer in LAYERS["package:smollm2-135m"]},
    ("package:smollm2-135m", 15, "batchtopk"): Rates(4e-3, 3e-3),
    ("package:gemma3-270m", 3, "jumprelu"): Rates(4e-3, 1e-2, teacher=3e-3),
    ("package:gemma3-270m", 9, "jumprelu"): Rates(2e-3, 3e-3),
    ("package:gemma3-270m", 9, "batchtopk"): Rates(2e-3, 3e-3),
    ("package:gemma3-270m", 14, "jumprelu"): Rates(4e-3, 3e-3),
}
"""By host, layer and family."""
DATA = UpgradeConfig(train_tokens=2_000_000, validation_tokens=60_000, evaluation_tokens=220_000, ce_tokens=32_768)
"""220,000 tokens of text leave more than 200,000 that are measured. How it would fine-tune is not used: FINETUNE is."""
IDENTITY = 160
"""Contexts that latents are compared on, index by index, in cells with all arms: about 40,000 tokens."""
L0_TOLERANCE = MATCHED
"""What teacher, control and RSAE may be apart in L0 on the tokens they are compared on. Further, the two are matched there; if they
then are apart still, the cell has failed."""


class Arm(NamedTuple):
    """An arm that is trained: what it starts from, and how it differs from FINETUNE and, at its edge, from the RSAE."""

    start: str
    change: dict[str, Any]
    edge: Mapping[str, Any] = MappingProxyType({})


NO_RATIONAL = ("scales", "shape")
ARMS: dict[str, Arm] = {
    "control": Arm("teacher", {}),
    "rsae": Arm("init", {}),
    "scale_only": Arm("scales", {"frozen": ("weights", "thresholds", "shape")}),
    "gate_only": Arm("init", {"frozen": ("weights",)}),
    "threshold_rectangle": Arm("init", {"alpha": 0.0, "frozen": NO_RATIONAL}, {"kind": "rectangle", "strength": 0.0}),
    "threshold_jump": Arm("init", {"alpha": 0.0, "frozen": NO_RATIONAL}),
    "threshold_uncrowded": Arm("init", {"alpha": 0.0, "frozen": NO_RATIONAL}, {"crowding": 0.0, "sparing": 0.0}),
    "threshold_follow": Arm("init", {"frozen": NO_RATIONAL}),
    "paper": Arm("dense", {"objective": "l1", "penalty": PAPER_PENALTY}),
}
OWN: dict[str, type[Trainee]] = {
    "relu": ReLUTrainee,
    "gated": GatedTrainee,
    "jumprelu": ThresholdTrainee,
    "topk": TopKTrainee,
    "batchtopk": ThresholdTrainee,  # a JumpReLU when it is trained
}
"""What trains the control of each family, and the teacher, but for a BatchTopK's."""
BATCHTOPK: dict[str, Any] = {
    "by": "sae_lens.SAETrainer", "normalize_activations": "expected_average_only_in", "lr": 1e-3,
    "steps": 3000, "batch_size": BATCH, "warm_up_steps": 300, "decay_steps": 900, "norm_batches": 100, "dead_feature_window": 100,
}  # fmt: skip
"""How SAELens trains a BatchTopK teacher, on the same batches as the others have: its own loop, scale and initial weights."""


@dataclass(frozen=True)
class Cell:
    """One teacher and its arms."""

    host: str
    layer: int
    family: Family | Literal["batchtopk"]
    l0: int
    seed: int
    expansion: int = 8

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}.hook_resid_post"

    @property
    def name(self) -> str:
        return f"{short(self.host)}/layer-{self.layer}/{self.family}-x{self.expansion}-l0-{self.l0}-seed-{self.seed}"

    @property
    def setting(self) -> str:
        return setting_of({"host": self.host, "hook": self.hook, "family": self.family})

    @property
    def has_all_arms(self) -> bool:
        is_central = self.layer == LAYERS[self.host][1] and (self.l0, self.seed, self.expansion) == (32, 0, 8)
        return is_central and self.family in FAMILIES

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(ARMS) if self.has_all_arms else MAIN


def grid() -> list[Cell]:
    """All cells, those that say most first."""
    middle = [(host, layers[1]) for host, layers in LAYERS.items()]
    outer = [(host, layer) for host, layers in LAYERS.items() for layer in (layers[0], layers[2])]
    cells = [Cell(host, layer, family, 32, 0) for host, layer in middle for family in FAMILIES]
    cells += [Cell(host, layer, family, 32, seed) for host, layer in middle for seed in (1, 2) for family in FAMILIES]
    cells += [Cell(host, layer, family, l0, 0) for host, layer in middle for l0 in (16, 64) for family in FAMILIES]
    cells += [Cell(host, layer, family, 32, 0) for host, layer in outer for family in FAMILIES]
    cells += [Cell(host, layer, family, 32, 0) for family in ("gated", "batchtopk") for host, layer in middle]
    return [*cells, Cell("package:gemma3-270m", 9, "topk", 32, 0, expansion=25)]  # 16,000 latents


def rates(cell: Cell) -> Rates:
    """The learning rates of a cell."""
    return RATES.get((cell.host, cell.layer, cell.family), Rates(FINETUNE.lr))


def teaching(cell: Cell) -> FinetuneConfig:
    """How the teacher of a cell is trained, but for its L0 and seed."""
    return replace(TEACHER, gate_lr=rates(cell).teacher)


def fine_tuning(cell: Cell) -> FinetuneConfig:
    """How the arms of a cell are fine-tuned, before `change` changes one."""
    return replace(FINETUNE, lr=rates(cell).lr)


def change(cell: Cell, arm: str) -> dict[str, Any]:
    """What an arm of a cell has otherwise than FINETUNE, but for the rate that all of them share."""
    how, of_control = dict(ARMS[arm].change), rates(cell).control
    if arm in ("control", "threshold_uncrowded") and of_control != GATE_LR:
        how["gate_lr"] = of_control
    edge = FINETUNE.surrogate
    if arm != "control" and cell.family in ("jumprelu", "batchtopk"):
        edge = JUMPRELU_EDGE
    if (edge := replace(edge, **ARMS[arm].edge)) != FINETUNE.surrogate:
        how["surrogate"] = edge
    return how


def start(kind: str, teacher: SAE[Any], data: Data, seed: int, degree: tuple[int, int] | None = None) -> SAE[Any]:
    """What an arm starts from: the teacher, the initialised RSAE, the same with scales for each latent, the paper's dense one."""
    if kind == "teacher":
        return teacher
    support: Support = "dense" if kind == "dense" else "hard"
    sample = islice(data.train.batches(BATCH, seed=seed), 4)
    sae = calibrate(RationalSAE.from_teacher(teacher, degree, support=support), list(sample))
    if kind == "scales":
        for name in ("C_in", "C_out"):
            value = getattr(sae.gate, name).detach()
            setattr(sae.gate, name, torch.nn.Parameter(value.expand(teacher.cfg.d_sae).clone()))
        sae.sync_config()
    return sae


def trained(cell: Cell, data: Data, out: Path, progress: Progress | None) -> SAE[Any]:
    """The teacher of a cell, from scratch or as it was left."""
    metadata = {"model_name": cell.host, "hook_name": cell.hook}
    if cell.family == "batchtopk":
        how, record = BATCHTOPK | {"seed": cell.seed}, out / "trained.json"
        if not record.exists():
            sae = by_saelens(cell, data, progress)
            for name, value in metadata.items():
                sae.cfg.metadata[name] = value
            save_sae(sae, out)
            write_json(record, how)
        elif read_json(record) != how:
            raise ValueError(f"{out} was trained otherwise: expected {how} in {record}. Move the cell's folder away")
        return load_teacher(out).sae
    how = replace(teaching(cell), target_l0=float(cell.l0), seed=cell.seed)
    return pretrain(
        cell.family, data.train, how, d_sae=cell.expansion * data.train.d_in, held_out=data.validation, metadata=metadata,
        out=out, progress=progress,
    )  # fmt: skip


def by_saelens(cell: Cell, data: Data, progress: Progress | None) -> SAE[Any]:
    """A BatchTopK SAE that SAELens' own loop has trained, as the JumpReLU that SAELens saves it as. A killed one begins anew."""
    how = BATCHTOPK
    torch.manual_seed(cell.seed)
    config = BatchTopKTrainingSAEConfig(
        d_in=data.train.d_in, d_sae=cell.expansion * data.train.d_in, k=float(cell.l0),
        normalize_activations=how["normalize_activations"],
    )  # fmt: skip
    loop = SAETrainerConfig(
        total_training_samples=how["steps"] * how["batch_size"], train_batch_size_samples=how["batch_size"],
        lr=how["lr"], lr_end=how["lr"] / 10, lr_warm_up_steps=how["warm_up_steps"], lr_decay_steps=how["decay_steps"],
        dead_feature_window=how["dead_feature_window"], n_batches_for_norm_estimate=how["norm_batches"],
    )  # fmt: skip
    batches = data.train.batches(how["batch_size"], seed=cell.seed)
    batches = shown(batches, f"{cell.name} teacher", how["norm_batches"] + how["steps"], progress)
    with TemporaryDirectory() as folder:
        SAETrainer(loop, BatchTopKTrainingSAE(config), batches).fit().save_inference_model(folder)
        return load_teacher(folder).sae


def shown(batches: Iterable[Tensor], name: str, n_batches: int, progress: Progress | None) -> Iterator[Tensor]:
    """The batches, and how many of them were taken."""
    for done, batch in enumerate(batches):
        if progress is not None:
            progress(name, done, n_batches)
        yield batch


def run(cell: Cell, arms: Sequence[str], data: Data, out: Path, progress: Progress | None) -> dict[str, Any]:
    """Train and measure a cell; its entry in evidence.json."""
    _peak_memory_gb(reset=True)
    teacher = trained(cell, data, out / "teacher", progress)
    of_run = {"identity": {"host": cell.host, "hook": cell.hook}, "host_dtype": data.host.dtype_name}
    write_json(out / "run.json", of_run)  # for `rsae probe`
    l0 = mean_l0(teacher, HeldOut(data.validation))
    saes: dict[str, Any] = {"teacher": teacher}
    if len(arms) > len(MAIN):
        saes["init"] = start("init", teacher, data, cell.seed)
    failed_arms = {}
    for name in arms:
        how = replace(fine_tuning(cell), target_l0=l0, seed=cell.seed, **change(cell, name))
        try:
            saes[name] = finetune(
                start(ARMS[name].start, teacher, data, cell.seed), data.train, how, held_out=data.validation, out=out / name,
                progress=progress, name=f"{cell.name} {name}",
            )  # fmt: skip
        except NotFinite as error:
            if name in MAIN:
                raise
            failed_arms[name] = str(error)
    eps = {}
    if "paper" in saes:
        saes["paper_hardened"] = saes["paper"]
        eps["paper_hardened"] = counting_threshold(saes["paper"], HeldOut(data.validation), l0)
    pairs = [
        ("rsae", "control"),
        ("rsae", "teacher"),
        *((arm, "control") for arm in saes if arm not in ("rsae", "control")),
        *((more, less) for more, less in STEPS if {more, less} <= saes.keys()),
    ]
    pairs = list(dict.fromkeys(pairs))

    def measured(arms: Mapping[str, SAE[Any]]) -> tuple[dict[str, Any], float]:
        """What the arms measure, and how far teacher, control and RSAE are apart in L0, relative to the least."""
        (found,) = evaluate_runs(
            {"": arms}, data.host, data.hook, data.evaluation, store_stats=data.train.sink_rule, ce_tokens=DATA.ce_tokens,
            eps={arm: value for arm, value in eps.items() if arm in arms}, pairs=pairs, progress=progress,
        ).values()  # fmt: skip
        l0s = [found[arm]["l0"] for arm in ("teacher", *MAIN)]
        return found, max(l0s) / min(l0s) - 1

    found, gap = measured(saes)
    as_trained = None
    if gap > L0_TOLERANCE:
        as_trained = {"gap": gap, "arms": {arm: found[arm] for arm in MAIN}} | {
            name: found[name] for name in ("rsae_minus_control", "rsae_minus_teacher")
        }
        tokens = MeasuredTokens(data)
        again = {arm: match_l0(saes[arm], tokens, found["teacher"]["l0"]) for arm in MAIN}
        matched, gap = measured({"teacher": teacher, **again})
        found |= matched
    contexts = Contexts(
        data.evaluation.tokens[:IDENTITY], data.evaluation.documents[:IDENTITY], data.evaluation.sources
    )
    return about(cell, data, arms) | {
        "teacher": hashes(cell, ["teacher"])["teacher"],
        "weights": hashes(cell, MAIN),
        "excluded": found["excluded"],
        "arms": {arm: found[arm] for arm in saes} | {arm: found[arm] | {"eps": value} for arm, value in eps.items()},
        **{"_minus_".join(pair): found["_minus_".join(pair)] for pair in pairs},
        "verdict": dict.fromkeys(found["verdict"], "failed") if gap > L0_TOLERANCE else found["verdict"],
        "failed": f"L0 of teacher, control and rsae are {gap:.1%} apart" if gap > L0_TOLERANCE else None,
        "as_trained": as_trained,
        "failed_arms": failed_arms,
        "identity": identity(
            teacher, {arm: saes[arm] for arm in MAIN}, data.host, data.hook, contexts, store_stats=data.train.sink_rule,
            progress=progress,
        )
        if len(arms) > len(MAIN)
        else {},
        "cost": {
            "seconds": {name: _seconds(out / name) for name in saes if (out / name / "log.jsonl").exists()},
            "scalars_added": sum(p.numel() for p in saes["rsae"].gate.parameters()) - _gate_scalars(teacher),
            "peak_memory_gb": _peak_memory_gb(),
        },
    }  # fmt: skip


class MeasuredTokens:
    """The activations of the tokens that a cell is measured on, in batches, as often as they are asked for."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        data = self.data
        return (batch.x for batch in measured_batches(data.host, data.hook, data.evaluation, data.train.sink_rule))


def _seconds(arm: Path) -> float:
    """Time of an arm's steps, at the rate of its last stretch: a run that was killed has several."""
    last = json.loads((arm / "log.jsonl").read_text().splitlines()[-1])
    return round(last["tokens"] / last["tokens_per_s"], 1)


def _peak_memory_gb(reset: bool = False) -> float | None:
    """Peak resident memory since the last reset; None where the system does not tell."""
    if not (status := Path("/proc/self/status")).exists():
        return None
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 2**20, 2)


def _gate_scalars(teacher: SAE[Any]) -> int:
    """How many scalars of its own a teacher's gate has: a JumpReLU's thresholds, a gated SAE's r_mag and b_mag."""
    return {"jumprelu": 1, "gated": 2}.get(teacher.cfg.architecture(), 0) * teacher.cfg.d_sae


def settings(cell: Cell) -> dict[str, Any]:
    """What the numbers of a cell's teacher, control and RSAE depend on besides its name."""
    data = asdict(DATA)
    del data["finetune"]
    return {
        "text": TEXT, "teacher": BATCHTOPK if cell.family == "batchtopk" else asdict(teaching(cell)),
        "finetune": asdict(fine_tuning(cell)), "data": data,
        "arms": {name: setting_of_arm(name, cell) for name in MAIN},
    }  # fmt: skip


def setting_of_arm(name: str, cell: Cell) -> dict[str, Any]:
    """What the numbers of an arm depend on besides the settings of all, as JSON has it. `loop`: of what trains it."""
    arm = ARMS[name]
    kind = OWN[cell.family] if arm.start == "teacher" else DenseTrainee if arm.start == "dense" else ThresholdTrainee
    how = change(cell, name)
    how |= {"surrogate": asdict(how["surrogate"])} if "surrogate" in how else {}
    return json.loads(json.dumps({"start": arm.start, "change": how, "loop": kind.loop}))


def about(cell: Cell, data: Data, arms: Iterable[str]) -> dict[str, Any]:
    """What a cell is, and what was tried of it."""
    return {
        "host": cell.host, "host_dtype": data.host.dtype_name, "hook": cell.hook,
        "is_middle": cell.layer == LAYERS[cell.host][1],
        "expansion": cell.expansion, "family": cell.family, "d_sae": cell.expansion * data.train.d_in,
        "target_l0": cell.l0, "seed": cell.seed, "train_tokens": FINETUNE.steps * BATCH, "teacher_tokens": TEACHER.steps * BATCH,
        "unique_tokens": data.train.n_tokens, "settings": config_hash(settings(cell)),
        "other_arms": {name: setting_of_arm(name, cell) for name in arms if name not in MAIN},
        "provenance": started(),
    }  # fmt: skip


@cache
def started() -> dict[str, Any]:
    """The provenance of this process as it began: what is committed while it runs is not what ran."""
    return provenance()


def gather(cell: Cell, progress: Progress | None, hooks: Iterable[str] = ()) -> Data:
    """The host of a cell, and the activations that all cells of its hook share; those of other hooks are read in the same pass."""
    folders = {hook: RUNS / "acts" / short(cell.host) / hook for hook in dict.fromkeys([cell.hook, *hooks])}
    host = load_host(cell.host)
    host.activations = remembered(host, folders)
    host.token_losses = with_ablations_remembered(host, folders)
    with locked(RUNS / "acts" / short(cell.host)):
        return Data.gather_all(host, folders, TEXT, DATA, progress)[cell.hook]


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock beside `path` that other calls of this command ask for; yields whether it is held, which needs no `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def remembered(host: Host, folders: Mapping[str, Path]) -> Callable[[Tensor, str], Tensor]:
    """`host.activations`, run once for the same tokens and all hooks that have folders: cells are measured on the same text."""

    def activations(tokens: Tensor, hook: str) -> Tensor:
        name = name_of(host, tokens)
        files = {hook: folder / "evaluation" / f"{name}.safetensors" for hook, folder in folders.items()}
        if not files[hook].exists():
            for each, x in host.activations_at(tokens, list(files)).items():
                write_safetensors(files[each], {"activations": x.cpu()})
        return load_file(files[hook])["activations"]

    return activations


def name_of(host: Host, *inputs: Tensor) -> str:
    """A short name for what a host makes of these."""
    digest = hashlib.sha256(f"{host.fingerprint} {host.dtype} {tuple(inputs[0].shape)} ".encode())
    for each in inputs:
        digest.update(each.numpy().tobytes())
    return digest.hexdigest()[:16]


def with_ablations_remembered(host: Host, folders: Mapping[str, Path]) -> Callable[..., dict[str, TokenLosses]]:
    """`host.token_losses`, its ablations run once for the same tokens: zeros and the mean are those of the hook, not of an arm."""
    run = host.token_losses

    def token_losses(tokens: Tensor, hook: str, edits: dict[str, Any]) -> dict[str, TokenLosses]:
        ones = torch.ones(*tokens.shape, host.d_model)  # edited, they tell what is replaced, and by what
        files = {
            name: folders[hook] / "evaluation" / f"{name}-{name_of(host, tokens, edits[name](ones))}.safetensors"
            for name in {"zero", "mean"} & edits.keys()
        }
        known = {name: TokenLosses(**load_file(file)) for name, file in files.items() if file.exists()}
        found = run(tokens, hook, {name: edit for name, edit in edits.items() if name not in known})
        for name in files.keys() - known.keys():
            write_safetensors(files[name], found[name]._asdict())
        return known | found

    return token_losses


def attempt(cell: Cell, arms: Sequence[str], data: Data, progress: Progress | None) -> dict[str, Any]:
    """`run`; a cell whose control or RSAE diverges stands in the tables too."""
    try:
        return run(cell, arms, data, RUNS / cell.name, progress)
    except NotFinite as error:
        return about(cell, data, arms) | {"arms": {}, "verdict": dict.fromkeys(METRICS, "failed"), "failed": str(error)}


def probed(cell: Cell, progress: Progress | None) -> dict[str, Any]:
    """`rsae probe` on a cell's arms. The host reads a set once for all cells of its hook."""
    ours, shared = RUNS / cell.name / "probing" / "acts", RUNS / "acts" / short(cell.host) / cell.hook / "probing"
    if not ours.exists():
        for folder in (ours.parent, shared):
            folder.mkdir(parents=True, exist_ok=True)
        ours.symlink_to(shared, target_is_directory=True)
    return probe(RUNS / cell.name, names=QUICK, progress=progress)


def is_measured(cell: Cell, arms: Sequence[str], done: dict[str, Any] | None) -> bool:
    """Whether what is known of a cell has these arms, with the settings and by the loop of now."""
    if not done or done["settings"] != config_hash(settings(cell)):
        return False
    if done["failed"] and done["arms"] and not done.get("as_trained"):
        return False  # from before arms that are apart in L0 were matched once more
    others = {name: setting_of_arm(name, cell) for name in arms if name not in MAIN}
    return not done["arms"] or others.items() <= done["other_arms"].items()


def evidence_so_far() -> dict[str, Any]:
    """results/evidence.json, with the grid and the settings of now."""
    file = RESULTS / "evidence.json"
    evidence = read_json(file) if file.exists() else {"text": TEXT, "cells": []}
    evidence["settings"] = {cell.setting: settings(cell) for cell in grid()}
    evidence["other_arms"] = {
        cell.setting: {name: setting_of_arm(name, cell) for name in ARMS if name not in MAIN} for cell in grid()
    }
    evidence["grid"], evidence["comparison_rule"] = len(grid()), COMPARISON_RULE
    return evidence


def known(cell: Cell) -> dict[str, Any] | None:
    """What results/evidence.json says of a cell."""
    return next((found for found in evidence_so_far()["cells"] if found["name"] == cell.name), None)


def record(cell: Cell, found: dict[str, Any]) -> None:
    """Put a cell into the evidence, in the order of the grid, and write it with its pages."""
    order = {cell.name: i for i, cell in enumerate(grid())}
    stamp = started()
    with locked(RUNS / "evidence.json"):
        evidence = evidence_so_far()
        evidence.setdefault("shared_documents", shared_documents(TEXT))
        evidence |= {"commit": stamp["commit"], "machine": stamp["machine"]}
        cells = [other for other in evidence["cells"] if other["name"] != cell.name] + [{"name": cell.name, **found}]
        evidence["cells"] = sorted(cells, key=lambda cell: order.get(cell["name"], len(order)))
        write_json(RESULTS / "evidence.json", evidence)
        write_tables(evidence, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--arms", nargs="*", choices=ARMS, metavar="NAME")
    other.add_argument("--probe", action="store_true")
    other.add_argument("--tables", action="store_true")
    arguments = parser.parse_args()
    started()
    if arguments.tables:
        with locked(RUNS / "evidence.json"):
            write_tables(evidence_so_far(), RESULTS)
        return
    chosen = [cell for cell in grid() if arguments.only in cell.name]

    def wanted(cell: Cell) -> list[str]:
        """The arms that a cell is to have: those asked for, and those that it has."""
        done = known(cell)
        has = done["other_arms"] if done and is_measured(cell, MAIN, done) else {}
        asked = cell.arms if arguments.arms is None else {*MAIN, *arguments.arms}
        return [name for name in ARMS if name in asked or name in has]

    def is_done(cell: Cell) -> bool:
        return is_measured(cell, wanted(cell), known(cell))

    deadline = time.monotonic() + 60 * arguments.minutes
    held: tuple[tuple[str, str], Data] | None = None
    with progress_shown() as progress:
        for cell in chosen:
            if time.monotonic() > deadline:
                break
            with locked(RUNS / cell.name, wait=False) as is_ours:
                if not is_ours:
                    continue
                if arguments.probe:
                    if (done := known(cell)) and can_be_probed(cell, done):
                        record(cell, {**done, "probing": probed(cell, progress)})
                    continue
                if is_done(cell):
                    continue
                if held is None or held[0] != (cell.host, cell.hook):
                    held = None  # one host at a time
                    hooks = {other.hook for other in chosen if other.host == cell.host and not is_done(other)}
                    held = (cell.host, cell.hook), gather(cell, progress, hooks)
                found = attempt(cell, wanted(cell), held[1], progress)
                done = known(cell)
                if done and "probing" in done and done.get("weights") == found.get("weights", {}):
                    found["probing"] = done["probing"]
                record(cell, found)


def hashes(cell: Cell, arms: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the checkpoints of a cell that are here."""
    files = {arm: RUNS / cell.name / arm / "sae_weights.safetensors" for arm in arms}
    return {arm: sha256_file(file) for arm, file in files.items() if file.exists()}


def can_be_probed(cell: Cell, done: dict[str, Any]) -> bool:
    """Whether a cell is measured, and its models are here; ValueError if those that are here are others."""
    measured = {"teacher": done.get("teacher"), **done.get("weights", {})}
    here = hashes(cell, measured)
    if not is_measured(cell, MAIN, done) or done["failed"] or not here:
        return False
    if here != measured:
        raise ValueError(f"{cell.name}: the models in {RUNS} are not those that were measured: measure them first")
    return True


if __name__ == "__main__":
    main()
