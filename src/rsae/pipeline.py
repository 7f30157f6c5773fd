"""All stages in a row: a teacher, a host and a text in; a run folder with both fine-tuned arms, their evidence and a page out."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsae.artefacts import Progress, config_hash, provenance, read_json, sha256_file, write_json
from rsae.calibrate import HeldOut, calibrate, counting_threshold, gate_curves, mean_l0
from rsae.evaluate import counting_thresholds_of, evaluate, evaluate_runs, loss_contexts
from rsae.finetune import FinetuneConfig, check_mesh, check_settings, check_topk_l0, check_trainable, finetune
from rsae.harvest import ActivationStore, SinkRule, division, harvest_all
from rsae.hosts import Host, load_host, named_in_checkpoints
from rsae.identity import identity as compare_latents
from rsae.mesh import ALONE, Mesh, shard_of
from rsae.online import OnlineActivations
from rsae.preflight import preflight
from rsae.pretrain import pretrain
from rsae.rational import Support
from rsae.report import write_report
from rsae.sae import RationalSAE, save_sae
from rsae.teachers import Teacher, load_teacher
from rsae.teachers.checkpoint import Family
from rsae.text import Contexts, Split, evaluation_contexts, text_fingerprint

if TYPE_CHECKING:
    from sae_lens import SAE

ARMS = ("teacher", "control", "init", "rsae")
Recipe = Literal["hard", "paper"]
# Price of l1 in the paper's recipe, in units of the squared error per token: the paper gives none
PAPER_PENALTY = 0.3


@dataclass(frozen=True, kw_only=True)
class UpgradeConfig:
    """How much data an upgrade takes, and how it fine-tunes."""

    train_tokens: int | None = 1_000_000
    """Activations harvested to train on; None: none are, the host runs while each arm trains (`rsae.online.OnlineActivations`)."""
    validation_tokens: int = 60_000
    """Activations of held-out documents on which L0 is measured and matched."""
    evaluation_tokens: int = 200_000
    """Tokens of other held-out documents on which the arms are compared."""
    ce_tokens: int = 32_768
    """How many of these the language model's loss is measured on."""
    context_length: int = 256
    """Tokens in a context."""
    degree: tuple[int, int] | None = None
    """(p, q) of the rational; None: (3, 2) for ReLU, (9, 8) for the others."""
    recipe: Recipe = "hard"
    """"hard": exact zeros, and the teacher's L0. "paper": the paper's dense gate, with an l1 price (`finetune.penalty`; None: 0.3).
    That has no zeros to count, so it is settled after training what is one: |z| <= eps is zeroed before anything is measured, eps
    such that L0 is the control's. The arm "rsae_dense" is the same with nothing zeroed, and so is the checkpoint: eps is in
    metrics.json."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Of both fine-tuned arms."""

    def __post_init__(self) -> None:
        for name in ("train_tokens", "validation_tokens", "evaluation_tokens", "ce_tokens", "context_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True)
class Data:
    """A host, and what was read from it: activations to train on and to match L0 on, held-out text to compare on."""

    host: Host
    hook: str
    train: ActivationStore | OnlineActivations
    validation: ActivationStore
    evaluation: Contexts

    @property
    def named_in_checkpoints(self) -> dict[str, Any]:
        """What the checkpoints of SAEs that are trained on it say of where it is from."""
        has_bos, length = self.host.tokenizer.bos_token_id is not None, self.evaluation.tokens.shape[1]
        return named_in_checkpoints(self.host.spec, self.hook, prepend_bos=has_bos, context_size=length)

    @classmethod
    def gather(
        cls,
        host: Host,
        hook: str,
        text: str,
        folder: Path,
        config: UpgradeConfig,
        progress: Progress | None,
        mesh: Mesh = ALONE,
    ) -> Data:
        """Harvest, or open what has been harvested already."""
        return cls.gather_all(host, {hook: folder}, text, config, progress, mesh)[hook]

    @classmethod
    def gather_all(
        cls,
        host: Host,
        folders: Mapping[str, Path],
        text: str,
        config: UpgradeConfig,
        progress: Progress | None,
        mesh: Mesh = ALONE,
    ) -> dict[str, Data]:
        """The data of several hooks (hook -> folder), for which the host runs once."""

        def stores(split: Split, n_tokens: int) -> dict[str, ActivationStore]:
            into = {hook: folder / split for hook, folder in folders.items()}
            how: dict[str, Any] = {"n_tokens": n_tokens, "split": split, "context_length": config.context_length}
            if mesh.ranks.world <= division(n_tokens, config.context_length)[1]:
                return harvest_all(host, into, text, progress=progress, ranks=mesh.ranks, **how)
            with mesh.ranks.main_first():  # too little for all to have a part of: the others find it done
                return harvest_all(host, into, text, progress=progress, ranks=ALONE.ranks, **how)

        # First, since it is found too short in seconds
        evaluation = evaluation_contexts(
            host.tokenizer, text, n_tokens=config.evaluation_tokens, context_length=config.context_length
        )
        loss_contexts(evaluation, config.ce_tokens)
        train: Mapping[str, ActivationStore | OnlineActivations]
        if config.train_tokens is None:
            train = {
                hook: OnlineActivations(host, hook, text, context_length=config.context_length, progress=progress)
                for hook in folders
            }
        else:
            train = stores("train", config.train_tokens)
        validation = stores("validation", config.validation_tokens)
        return {
            hook: cls(host, host.hook_point(hook).name, train[hook], validation[hook], evaluation) for hook in folders
        }


def upgrade(
    teacher: str | Path,
    host: str,
    hook: str,
    text: str,
    out: str | Path,
    *,
    config: UpgradeConfig | None = None,
    trust: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    mesh: Mesh = ALONE,
) -> dict[str, Any]:
    """Upgrade a teacher to a Rational SAE, beside an equal-compute control, and measure both on held-out text.

    Before anything else the teacher's conventions are put to the test (`rsae.preflight.preflight`). The control of a teacher
    that is an RSAE already is the same one, trained on with its gate as it is.

    Leaves in `out`: preflight.json, acts/ (activations that are stored), teacher/, control/, init/, rsae/ (SAELens checkpoints;
    the two trained ones with log.jsonl), metrics.json, gate.json, sinks.json (which tokens are not measured), run.json and
    report.html. A finished stage is not run again, a killed one continues.

    Args:
        teacher: what `rsae.load_teacher` takes.
        host: what `rsae.load_host` takes: a hub id, a local folder, or "package:gemma3-270m".
        hook: TransformerLens name ("blocks.9.hook_resid_post") or HF module path ("model.layers.9").
        text: what `rsae.harvest.harvest` takes: "package:sae-probes", a file or folder, "hf:dataset[split]".
        out: the run folder; new, empty, or of the same run.
        trust: go on although the activations say that the teacher was meant to be read in another way.
        mesh: the ranks that harvest and fine-tune together; the first of them alone inspects, measures and writes the page.

    Returns:
        The contents of metrics.json; on other ranks than the first, nothing.

    Raises:
        ValueError: any input that does not fit, before anything is harvested; another reading of the teacher is clearly better, and
            `trust` is not set; `out` holds another run.
    """
    config, out = config or UpgradeConfig(), Path(out)
    job = _Upgrade(_upgradable(teacher, config, mesh, out, progress), host, hook, text, out, config, mesh, command)
    if not job.ledger.done:
        model = _load_host(host, job.ledger, progress, mesh)
        job.inspect(model, trust, progress)
        with job.ledger.clock("harvest"):
            data = Data.gather(model, hook, text, out / "acts", config, progress, mesh)
        job.train(data, progress)
        if not mesh.ranks.is_main:
            return {}
        job.measure(data, progress)
    return _measured(out)


def upgrade_all(
    teachers: Sequence[tuple[str | Path, str]],
    host: str,
    text: str,
    out: str | Path,
    *,
    config: UpgradeConfig | None = None,
    trust: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    mesh: Mesh = ALONE,
) -> dict[str, dict[str, Any]]:
    """`upgrade` for several teachers of one host: the activations of all hooks are harvested in one pass.

    Leaves for each teacher a run folder, out/NUMBER-NAME, the activations in out/acts/HOOK, and one page about all,
    out/report.html.

    Args:
        teachers: (teacher, hook) of each.

    Returns:
        metrics.json by the name of the run folder; on other ranks than the first, nothing.

    Raises:
        ValueError: what `upgrade` refuses, of any of them, before anything is harvested.
    """
    config, out = config or UpgradeConfig(), Path(out)
    if not teachers:
        raise ValueError("no teacher to upgrade")
    named = {
        f"{i}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(teacher).name)}": (teacher, hook)
        for i, (teacher, hook) in enumerate(teachers, 1)
    }
    loaded = {name: _upgradable(teacher, config, mesh, out / name, progress) for name, (teacher, _) in named.items()}
    prints, hooks = [teacher.fingerprint for teacher in loaded.values()], [hook for _, hook in teachers]
    identity = {"teachers": prints, "hooks": hooks, "host": host, **_read(text, out), "config": asdict(config)}
    ledger = Ledger.open(out, identity, command, may_hold=("acts", *named), mesh=mesh)
    if not ledger.done:
        model = _load_host(host, ledger, progress, mesh)
        acts = {hook: out / "acts" / model.hook_point(hook).name for hook in hooks}
        jobs = {
            name: _Upgrade(loaded[name], host, hook, text, out / name, config, mesh, command)
            for name, (_, hook) in named.items()
        }
        left = {name: job for name, job in jobs.items() if not job.ledger.done}
        for job in left.values():
            job.inspect(model, trust, progress)
        ledger.write()  # from here on the folder is this run's: before, a teacher that was contradicted could be mended
        with ledger.clock("harvest"):
            data = Data.gather_all(model, acts, text, config, progress, mesh)
        # All are trained before any is measured: the other ranks are then free
        for job in left.values():
            job.train(data[job.hook], progress)
        if not mesh.ranks.is_main:
            return {}
        for job in left.values():
            job.measure(data[job.hook], progress)
        write_report([out / name for name in named], out / "report.html")
        ledger.finish(runs=list(named))
    return {name: _measured(out / name) for name in named}


def _measured(run: Path) -> dict[str, Any]:
    """What the upgrade of a run folder measured, whatever `rsae evaluate` did since."""
    kept = run / UPGRADE_METRICS
    return read_json(kept if kept.exists() else run / "metrics.json")


def _upgradable(
    teacher: str | Path, config: UpgradeConfig, mesh: Mesh, out: Path, progress: Progress | None
) -> Teacher:
    """The teacher, loaded, if it is one that `upgrade` takes."""
    loaded = load_teacher(teacher, progress=progress)
    check_trainable(loaded.sae)
    if config.recipe == "paper" and isinstance(loaded.sae, RationalSAE):
        raise ValueError(
            f"{teacher} is an RSAE already, whose gate is not fitted anew: --recipe paper needs its teacher"
        )
    if isinstance(loaded.sae, RationalSAE) and loaded.sae.gate.support == "dense":
        raise ValueError(
            f"{teacher} is an RSAE with dense support, which has no sparsity to match: train it on with `rsae finetune "
            "--objective l1 --penalty LAMBDA`, or upgrade its teacher"
        )
    check_mesh(loaded.sae, config.finetune, mesh, out)
    check_topk_l0(loaded.sae, config.finetune.target_l0)
    of_control = config.finetune if config.recipe == "hard" else replace(config.finetune, objective="matched-l0")
    check_settings(loaded.sae, of_control)
    if config.degree is not None:
        RationalSAE.from_teacher(loaded.sae, config.degree, support="hard" if config.recipe == "hard" else "dense")
    return loaded


class _Upgrade:
    """The upgrade of one teacher: its run folder, and the two halves of the work."""

    def __init__(
        self,
        teacher: Teacher,
        host: str,
        hook: str,
        text: str,
        out: Path,
        config: UpgradeConfig,
        mesh: Mesh,
        command: str | None,
    ) -> None:
        self.teacher, self.hook, self.text, self.out, self.config, self.mesh = teacher, hook, text, out, config, mesh
        identity = {
            "teacher": teacher.fingerprint,
            "hook": hook,
            "host": host,
            **_read(text, out),
            "config": asdict(config),
        }
        self.ledger = Ledger.open(out, identity, command, may_hold=("preflight.json", "acts"), mesh=mesh)

    def inspect(self, host: Host, trust: bool, progress: Progress | None) -> None:
        """Put the teacher's conventions to the test."""
        if "inspect" in self.ledger.seconds:
            return
        with self.ledger.clock("inspect"):
            found = self.mesh.once(
                lambda: preflight(
                    self.teacher, host, self.hook, self.text, context_length=self.config.context_length,
                    out=self.out / "preflight.json", progress=progress,
                )
            )  # fmt: skip
            if found["verdict"] == "contradicted" and not trust:
                raise ValueError(
                    f"the teacher does not read as it declares: {'; '.join(found['warnings'])}. Mend the checkpoint, or say "
                    f"--trust to go on as it is declared ({self.out / 'preflight.json'} has all of it)"
                )
            self.ledger.about["preflight"] = {name: found[name] for name in ("verdict", "warnings")}
        if self.mesh.ranks.is_main:
            for warning in found["warnings"]:  # now, not when hours of training are over
                warnings.warn(f"preflight of {self.out.name}: {warning}", stacklevel=2)

    def train(self, data: Data, progress: Progress | None) -> None:
        """Fine-tune."""
        train_arms(self.out, self.teacher.sae, data, self.config, self.ledger, progress, self.mesh)
        if isinstance(data.train, OnlineActivations):
            data.train.release()  # other teachers are trained before this one is measured

    def measure(self, data: Data, progress: Progress | None) -> None:
        """Compare the arms that were trained, and write the page."""
        arms = {arm: load_teacher(self.out / arm).sae.to(data.host.device) for arm in ARMS}
        with self.ledger.clock("evaluate"):
            eps, measured = {}, arms
            if self.config.recipe == "paper":
                eps = counting_thresholds(arms, data, self.ledger.about["target_l0"])
                measured = {**arms, "rsae_dense": arms["rsae"]}
            (metrics,) = evaluate_runs(
                {self.out.name: measured}, data.host, data.hook, data.evaluation, store_stats=data.train.sink_rule,
                ce_tokens=self.config.ce_tokens, eps=eps, config=self.ledger.identity | {"eps": eps}, progress=progress,
            ).values()  # fmt: skip
        _record(self.out, self.teacher.family, arms, metrics, data, self.config, self.ledger)
        write_report([self.out], self.out / "report.html")
        self.ledger.finish()


# The demo's sizes: what two cores do in a quarter of an hour, and no more than that
DEMO = UpgradeConfig(
    train_tokens=458_752,
    validation_tokens=60_000,
    evaluation_tokens=60_000,
    ce_tokens=6_144,
    finetune=FinetuneConfig(steps=500),
)
UPGRADE_METRICS = "metrics.upgrade.json"
"""What an upgrade measured, in a run folder that was measured again by `rsae evaluate`."""
DEMO_L0, DEMO_EXPANSION = 32, 8
DEMO_TEACHER = FinetuneConfig(steps=600, lr=1e-3, warmup=0.1, decay=0.3, target_l0=DEMO_L0, penalty=2.5)


def demo(
    out: str | Path,
    *,
    host: str = "package:gemma3-270m",
    hook: str = "blocks.9.hook_resid_post",
    text: str = "package:sae-probes",
    config: UpgradeConfig = DEMO,
    teacher: FinetuneConfig = DEMO_TEACHER,
    families: Sequence[Family] = ("relu", "jumprelu", "topk"),
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Train a teacher of each family on a real model, upgrade each, and write one page: the main job from nothing.

    Leaves out/report.html and for each family out/FAMILY/ with what `upgrade` leaves; the activations, which all share, are
    in out/acts. A finished demo is verified (checksums of its files) and its metrics returned.

    Returns:
        What the demo measured, for each family.
    """
    out = Path(out)
    if config.recipe != "hard":
        raise ValueError(f"the demo shows the default recipe; for {config.recipe!r}: rsae upgrade --recipe paper")
    identity = {
        "host": host, "hook": hook, **_read(text, out), "config": asdict(config), "teacher": asdict(teacher),
        "families": list(families),
    }  # fmt: skip
    ledger = Ledger.open(out, identity, command)
    if ledger.done:
        return {family: _measured(out / family) for family in families}
    model = _load_host(host, ledger, progress)
    model.hook_point(hook)
    ledger.write()
    with ledger.clock("harvest"):
        data = Data.gather(model, hook, text, out / "acts", config, progress)
    runs: dict[str, dict[str, SAE[Any]]] = {}
    ledgers: dict[str, Ledger] = {}
    for family in families:
        run = out / family
        ledgers[family] = Ledger.open(run, {**identity, "family": family}, command, may_hold=("teacher",))
        with ledgers[family].clock("pretrain"):
            sae = pretrain(
                family, data.train, teacher, d_sae=DEMO_EXPANSION * data.train.d_in, held_out=data.validation,
                metadata=data.named_in_checkpoints, out=run / "teacher", progress=progress,
            )  # fmt: skip
        arms = train_arms(run, sae, data, config, ledgers[family], progress)
        runs[family] = {arm: trained.to(model.device) for arm, trained in arms.items()}
    with ledger.clock("evaluate"):
        results = evaluate_runs(
            runs, model, data.hook, data.evaluation, store_stats=data.train.sink_rule, ce_tokens=config.ce_tokens,
            config=ledger.identity, progress=progress,
        )  # fmt: skip
    for family in families:
        ledgers[family].seconds = {**ledger.seconds, **ledgers[family].seconds}
        _record(out / family, family, runs[family], results[family], data, config, ledgers[family])
        ledgers[family].finish()
    write_report([out / family for family in families], out / "report.html")
    ledger.finish(runs=list(families))
    return results


def _read(text: str, out: Path) -> dict[str, str]:
    """A text in a run's identity: its name, and what names its content, to which `out` must not add."""
    if (folder := Path(text)).is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{out} lies in {text}, whose files are read as text, logs of the run among them: choose an --out elsewhere, or a "
            "--text that does not hold it"
        )
    return {"text": text, "text_content": text_fingerprint(text)}


def _load_host(spec: str, ledger: Ledger, progress: Progress | None, mesh: Mesh = ALONE) -> Host:
    """`load_host`, which may take a minute, with a sign that it is at work. A run goes on in the dtype that it began with."""
    if progress is not None:
        progress("load the model", 0, 1)
    with mesh.ranks.main_first():  # which makes what a packaged host is read from
        host = load_host(spec, dtype=ledger.host_dtype, progress=progress)
    ledger.about["host_dtype"] = host.dtype_name
    if progress is not None:
        progress("load the model", 1, 1)
    return host


def train_arms(
    run: Path,
    teacher: SAE[Any],
    data: Data,
    config: UpgradeConfig,
    ledger: Ledger,
    progress: Progress | None,
    mesh: Mesh = ALONE,
) -> dict[str, SAE[Any]]:
    """The four arms of a teacher, each saved in its folder of the run: teacher, control, init, rsae.

    Control and RSAE are trained on the same batches, for the same steps, to the teacher's L0.
    """
    about = teacher.cfg.metadata
    for name, value in data.named_in_checkpoints.items():
        about[name] = value if about[name] is None else about[name]
    if mesh.ranks.is_main and not (run / "teacher" / "cfg.json").exists():
        save_sae(teacher, run / "teacher")
    # A run that was killed goes on with what it has found, which another processor would round otherwise
    if (l0 := config.finetune.target_l0 or ledger.about.get("target_l0")) is None:
        l0 = mean_l0(shard_of(teacher, mesh).to(mesh.device), HeldOut(data.validation), mesh)
    if l0 == 0:
        raise ValueError("no latent of this SAE is active on the held-out activations: another model, hook or scale?")
    ledger.write(target_l0=l0)
    settings = replace(config.finetune, target_l0=l0)

    def initialise() -> None:
        if (run / "init" / "cfg.json").exists():
            return
        init = teacher
        if not isinstance(teacher, RationalSAE):
            sample = list(islice(data.train.batches(2048, seed=settings.seed), 4))
            support: Support = "dense" if config.recipe == "paper" else "hard"
            init = RationalSAE.from_teacher(teacher, config.degree, support=support).to(mesh.device)
            init = calibrate(init, sample)
        save_sae(init, run / "init")

    with ledger.clock("init"):
        mesh.once(initialise)
        init = load_teacher(run / "init").sae
    arms = {"teacher": teacher, "init": init}
    # There is no own gate to train in an RSAE's control but the rational: it keeps the one that it has
    of_control = settings
    if isinstance(teacher, RationalSAE):
        of_control = replace(settings, gate_lr=0.0, alpha=teacher.gate.alpha)
    of_rsae = settings
    if config.recipe == "paper":
        of_control = replace(settings, objective="matched-l0", penalty=None)
        price = PAPER_PENALTY if settings.penalty is None else settings.penalty
        of_rsae = replace(settings, objective="l1", penalty=price)
    for arm, start, how in (("control", teacher, of_control), ("rsae", init, of_rsae)):
        with ledger.clock(arm):
            arms[arm] = finetune(
                start, data.train, how, held_out=data.validation, out=run / arm, progress=progress,
                name=f"{run.name} {arm}", mesh=mesh,
            )  # fmt: skip
    return {arm: arms[arm] for arm in ARMS}


def counting_thresholds(arms: Mapping[str, SAE[Any]], data: Data, l0: float) -> dict[str, float]:
    """For each dense arm the eps at which it has this mean L0 on validation text."""
    dense = {arm: sae for arm, sae in arms.items() if isinstance(sae, RationalSAE) and sae.gate.support == "dense"}
    return {arm: counting_threshold(sae, HeldOut(data.validation), l0) for arm, sae in dense.items()}


def evaluate_folder(
    run: Path,
    host: str,
    hook: str,
    text: str,
    acts: Path | None,
    *,
    tokens: int,
    ce_tokens: int,
    identity_of: str | None = None,
    progress: Progress | None,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Measure the arms that a run folder holds, and write its metrics.json; what an upgrade measured stays as UPGRADE_METRICS.

    With `identity_of`, a teacher, the latents of the other arms are compared with that teacher's, for identity.json.

    Returns:
        The contents of both; None for one that was not asked for.
    """
    run = Path(os.path.abspath(run))  # of which "." has its parent too
    if tokens < 1 or ce_tokens < 1:
        raise ValueError(f"tokens and ce_tokens must be at least 1; got {tokens} and {ce_tokens}")
    arms = {arm: load_teacher(run / arm).sae for arm in ARMS if (run / arm / "cfg.json").exists()}
    if not arms:
        raise ValueError(f"{run} holds none of {', '.join(ARMS)}: is it a run folder?")
    teacher = None if identity_of is None else load_teacher(identity_of, progress=progress)
    if teacher is not None and not arms.keys() - {"teacher"}:
        raise ValueError(f"{run} holds the teacher alone: --identity compares other arms with it")
    eps = {arm: value for arm, value in counting_thresholds_of(run, arms).items() if arm in arms}
    store = ActivationStore.open(_acts_of(run, host, hook) if acts is None else acts)
    model = load_host(host, dtype=store.meta["config"]["dtype"], progress=progress)
    if not store.is_of(host, model.fingerprint, model.hook_point(hook).name):
        raise ValueError(
            f"{store.path} holds activations of {store.host} at {store.hook}; what is measured is {host} at {hook}"
        )
    # An upgrade without stored activations to train on has a rule that no store has
    rule = store.sink_rule
    if acts is None and (run / "sinks.json").exists():
        rule = SinkRule.from_dict(read_json(run / "sinks.json"))
    contexts = evaluation_contexts(
        model.tokenizer, text, n_tokens=tokens, context_length=store.meta["config"]["context_length"]
    )
    config = {"host": host, "hook": hook, "text": text, "tokens": tokens}
    compared = None
    arms = {arm: sae.to(model.device) for arm, sae in arms.items()}
    if teacher is not None:
        others = {arm: sae for arm, sae in arms.items() if arm != "teacher"}
        about = {**config, "teacher": str(identity_of), "fingerprint": teacher.fingerprint}
        compared = {"schema": 1, "config": about, "provenance": provenance(), "sources": list(contexts.sources)}
        compared |= compare_latents(
            teacher.sae.to(model.device), others, model, hook, contexts, store_stats=rule, eps=eps, progress=progress
        )  # fmt: skip
    measured = {**arms, "rsae_dense": arms["rsae"]} if "rsae" in eps else arms
    metrics = evaluate(
        measured, model, hook, contexts, store_stats=rule, ce_tokens=ce_tokens, eps=eps,
        config={**config, "ce_tokens": ce_tokens, "eps": eps}, progress=progress,
    )  # fmt: skip
    is_upgraded = (run / "run.json").exists() and read_json(run / "run.json").get("done", False)
    if is_upgraded and (run / "metrics.json").exists() and not (run / UPGRADE_METRICS).exists():
        write_json(run / UPGRADE_METRICS, read_json(run / "metrics.json"))
    write_json(run / "metrics.json", metrics)
    if compared is not None:
        write_json(run / "identity.json", compared)
    if (run / "report.html").exists():
        write_report([run], run / "report.html")
    shared = read_json(run.parent / "run.json") if (run.parent / "run.json").exists() else {}
    runs = [run.parent / name for name in shared.get("runs", ())]
    if run in runs and (run.parent / "report.html").exists() and all((r / "metrics.json").exists() for r in runs):
        write_report(runs, run.parent / "report.html")
    return metrics, compared


def _acts_of(run: Path, host: str, hook: str) -> Path:
    """A store of a run folder, or of those beside which it is: a demo's families, or several teachers, share theirs."""
    folders = (run / "acts", run.parent / "acts" / hook, run.parent / "acts")
    stores = [folder / split for folder in folders for split in ("train", "validation")]
    found = next((store for store in stores if (store / "meta.json").exists()), None)
    if found is None:
        raise ValueError(
            f"no activations in {folders[0]} or {folders[2]}: name a store of {host} at {hook} with --acts"
        )
    return found


class Ledger:
    """What a run folder is, in its run.json: its identity, the time of each stage, and whether all of it is done.

    Several ranks have one each, of which the first one's is written.
    """

    writes = True

    def __init__(self, folder: Path, identity: dict[str, Any], command: str | None, found: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.about: dict[str, Any] = found or {
            "identity": self.identity,
            "hash": config_hash(self.identity),
            "name": folder.name,
            "command": command,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "provenance": provenance(),
            "done": False,
        }
        self.seconds: dict[str, float] = self.about.get("seconds", {})
        # What the run's host was read in so far; without exception bfloat16, until it was written down. None: it begins now
        self.host_dtype: str | None = found.get("host_dtype", "bfloat16") if found else None

    @classmethod
    def open(
        cls,
        folder: Path,
        identity: dict[str, Any],
        command: str | None,
        may_hold: Sequence[str] = ("acts",),
        mesh: Mesh = ALONE,
    ) -> Ledger:
        """The folder's ledger if it is of this run, a fresh one for a new or empty folder; nothing is written yet.

        A stage that was killed before the first run.json leaves its own folder, `may_hold`, which checks for itself whose it is.

        Raises:
            ValueError: the folder holds another run, something else, or a finished run whose files have changed; the ranks are not
                of one run.
        """
        identity = json.loads(json.dumps(identity))  # as run.json has it, tuples as lists
        mesh.ranks.agree("folders", str(folder))
        mesh.ranks.agree("teachers, texts or settings", config_hash(identity))
        ledger = mesh.once(lambda: cls._open(folder, identity, command, may_hold))
        ledger.writes = mesh.ranks.is_main
        return ledger

    @classmethod
    def _open(cls, folder: Path, identity: dict[str, Any], command: str | None, may_hold: Sequence[str]) -> Ledger:
        file, found = folder / "run.json", {}
        if file.exists():
            found = read_json(file)
            if found.get("hash") != config_hash(identity):
                raise ValueError(
                    f"{folder} holds another run ({_differences(found, identity)}): choose another --out or delete it (acts/ "
                    "may stay: it is used again where it fits)"
                )
        elif folder.exists() and any(p.name not in may_hold and not p.name.startswith(".") for p in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no run of rsae: choose another --out")
        ledger = cls(folder, identity, command, found)
        for name, digest in found.get("files", {}).items():
            if not (folder / name).exists() or (digest and sha256_file(folder / name) != digest):
                raise ValueError(
                    f"{folder / name} is missing or has changed since the run ended: delete {folder} and run again"
                )
        return ledger

    @property
    def done(self) -> bool:
        """Whether the run has ended and its files are as it left them."""
        return bool(self.about["done"])

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the time of a stage to those of the run, when it has ended well."""
        began = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - began, 1)
        self.write()

    def write(self, **more: Any) -> None:
        """Write run.json."""
        self.about |= {"seconds": self.seconds, "peak_memory_gb": _peak_memory_gb(), **more}
        if self.writes:
            write_json(self.folder / "run.json", self.about)

    def finish(self, **more: Any) -> None:
        """Mark the run as done, with the checksums that a later call verifies. `runs`: names of the runs that share its page."""
        weights = sorted({*self.folder.glob("*/*.safetensors"), *self.folder.glob("*/*/sae_weights.safetensors")})
        files: dict[str, str | None] = {str(file.relative_to(self.folder)): sha256_file(file) for file in weights}
        # These need only be there: `rsae evaluate` and `rsae report` write them anew
        written = [
            file for pattern in ("report.html", "metrics.json", "*/metrics.json") for file in self.folder.glob(pattern)
        ]
        files |= {str(file.relative_to(self.folder)): None for file in sorted(written)}
        self.write(done=True, files=files, **more)


def _differences(found: dict[str, Any], identity: dict[str, Any]) -> str:
    """What another run's identity has otherwise, in a few words."""
    names = _differing(found.get("identity", {}), identity)
    return "another " + ", ".join(names) if names else "of another kind"


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the innermost entries that differ."""
    names = []
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            names += _differing(before, value)
        elif before != value:
            names.append(name)
    return names


def _record(
    run: Path,
    family: str,
    arms: dict[str, SAE[Any]],
    metrics: dict[str, Any],
    data: Data,
    config: UpgradeConfig,
    ledger: Ledger,
) -> None:
    """metrics.json, gate.json and run.json of one upgraded teacher."""
    write_json(run / "metrics.json", metrics)
    write_json(run / "sinks.json", data.train.sink_rule.to_dict())
    sample = next(iter(data.validation.iterate(1024)))[0]
    write_json(run / "gate.json", gate_curves(arms, sample))
    trained = read_json(run / "rsae" / "finetune.json")[
        "config"
    ]  # of the RSAE: the paper's recipe has an objective of its own
    ledger.write(
        family=family,
        host=data.host.spec,
        host_dtype=data.host.dtype_name,
        hook=data.hook,
        text=ledger.identity["text"],
        target_l0=trained["target_l0"],
        d_in=data.train.d_in,
        d_sae=arms["teacher"].cfg.d_sae,
        tokens={
            **({"train": data.train.n_tokens} if isinstance(data.train, ActivationStore) else {}),
            "validation": data.validation.n_tokens,
            "finetune": config.finetune.steps * config.finetune.batch_size,
            "evaluation": metrics["teacher"]["n_tokens"],
        },
        finetune=trained,
    )


def _peak_memory_gb() -> float:
    """Peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
