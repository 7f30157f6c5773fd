"""The command line: arguments, progress bars, messages. The only place that prints, and every stage is a command."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from rsae import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Upgrade a pretrained sparse autoencoder to a **Rational Sparse Autoencoder**: its fixed gate becomes a trainable "
        "rational function, fine-tuned beside an equal-compute control, and both are measured on held-out text.\n\n"
        "Start with `rsae demo` (a real model, no hub, no GPU), then `rsae upgrade` with your own SAE. The other commands are "
        "its stages, for those who want one alone."
    ),
)

Out = Annotated[Path, typer.Option("--out", help="Folder to write; new, empty, or of the same run (it is continued).")]
Host = Annotated[
    str,
    typer.Option(
        "--host",
        help="Hub id, local model folder, or package:gemma3-270m / package:smollm2-135m. centred:gpt2: its activations centred "
        "over d_model, as TransformerLens' center_writing_weights has them.",
    ),
]
Hook = Annotated[
    str,
    typer.Option(
        "--hook",
        help="blocks.9.hook_resid_post, hook_mlp_out or hook_attn_out (TransformerLens), or model.layers.9 (module path).",
    ),
]
Text = Annotated[
    str,
    typer.Option(
        "--text", help="package:sae-probes, a file or folder of text, hf:DATASET[SPLIT] or hf:DATASET:CONFIG[SPLIT]."
    ),
]
Teacher = Annotated[
    str,
    typer.Argument(
        help="Checkpoint of any known format: a folder or file, RELEASE:SAE_ID, or OWNER/REPO:PATH on the hub."
    ),
]
Steps = Annotated[int, typer.Option("--steps", help="Optimizer steps, of each arm that is trained.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Tokens in a step; ranks that share the data divide them.")
]
Seed = Annotated[int, typer.Option("--seed", help="Orders the batches; of rsae pretrain, also the first weights.")]
ContextLength = Annotated[int, typer.Option("--context-length", help="Tokens in a context.")]
LatentShards = Annotated[
    int,
    typer.Option(
        "--latent-shards", help="Under torchrun: so many ranks share the latents; the batch is shared by the rest."
    ),
]


INTERRUPTED = 130
GOES_ON = "what is done is kept, and the same command continues"


def main() -> None:
    """Run the command line; bad input ends in exit code 2 and one line on stderr."""
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer has taken KeyboardInterrupt for itself
            raise KeyboardInterrupt
        sys.exit(code)
    except ValueError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print(f"rsae: stopped; {GOES_ON}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if is_passing(error):
            _fail(f"{error}; {GOES_ON}")
        if isinstance(error, OSError):
            _fail(str(error))
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not have been imported
            _fail(f"{error} A smaller --batch-size, where there is one, needs less")
        if not hasattr(error, "format_message"):  # not the parser's own complaint about options and arguments
            raise
        if not (message := error.format_message()):  # type: ignore[attr-defined]  # help was asked for, by giving nothing
            sys.exit(2)
        _fail(f"{message} (see rsae --help)")


def is_passing(error: Exception) -> bool:
    """A full disk or a connection that broke: nothing is wrong with what was asked for.

    safetensors and torch's checkpoints tell of a full disk by their own exceptions; those of httpx and httpx2, by which the hub
    is read, are no OSErrors.
    """
    is_full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
    return is_full or isinstance(error, ConnectionError) or type(error).__module__.split(".")[0].startswith("httpx")


def _fail(message: str) -> NoReturn:
    print(f"rsae: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"rsae {__version__}")
        raise typer.Exit


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    host: Host = "package:gemma3-270m",
    hook: Hook = "blocks.9.hook_resid_post",
    text: Text = "package:sae-probes",
) -> None:
    """Train three teachers (ReLU, JumpReLU, TopK) on a real model and upgrade each.

    Needs no hub and no GPU: Gemma 3 270M and its text come from packages (`pip install ".[demo]"` in rsae's clone). About a quarter
    of an hour on two cores; a second call verifies what is there and prints the table again.
    """
    with progress_shown() as progress:
        from rsae.pipeline import demo as run

        results = run(out, host=host, hook=hook, text=text, progress=progress, command=_command())
    for family, metrics in results.items():
        _print_table(metrics, title=f"{family}: RSAE against its equal-compute control")
    print(f"report: {out / 'report.html'}")


@app.command()
def upgrade(
    teacher: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoint of any known format: a folder or file, RELEASE:SAE_ID, or OWNER/REPO:PATH on the hub. Several share "
            "one harvest, and each gets a folder in --out."
        ),
    ],
    host: Host,
    hook: Annotated[
        list[str],
        typer.Option(
            "--hook",
            help="blocks.9.hook_resid_post, hook_mlp_out or hook_attn_out (TransformerLens), or model.layers.9 "
            "(module path); once for several teachers, or "
            "for each in their order.",
        ),
    ],
    text: Text,
    out: Out,
    trust: Annotated[
        bool, typer.Option("--trust", help="Go on although another reading of the teacher is clearly better.")
    ] = False,
    train_tokens: Annotated[int | None, typer.Option(help="Activations to train on; default 1,000,000.")] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Store none to train on: the host runs while each arm trains.")
    ] = False,
    evaluation_tokens: Annotated[
        int,
        typer.Option(
            help="Held-out tokens that the arms are compared on; the model's loss on 32,768 of them, spread evenly."
        ),
    ] = 200_000,
    recipe: Annotated[
        Literal["hard", "paper"],
        typer.Option(
            help="hard: exact zeros at the teacher's L0. paper: the dense gate with an l1 price, zeroed afterwards to that L0."
        ),
    ] = "hard",
    penalty: Annotated[
        float | None,
        typer.Option(help="The paper recipe's price of l1, in units of the squared error per token; default 0.3."),
    ] = None,
    steps: Steps = 1000,
    batch_size: BatchSize = 2048,
    lr: Annotated[float | None, typer.Option(help="Learning rate of both fine-tuned arms; default 1e-3.")] = None,
    seed: Seed = 0,
    context_length: ContextLength = 256,
    latent_shards: LatentShards = 1,
) -> None:
    """Upgrade a teacher beside an equal-compute control, compare both, and write the page. The product.

    Example: `rsae upgrade runs/demo/topk/teacher --host package:gemma3-270m --hook blocks.9.hook_resid_post
    --text package:sae-probes --out runs/mine`
    """
    with progress_shown() as progress:
        from rsae.finetune import FinetuneConfig
        from rsae.mesh import Mesh
        from rsae.pipeline import UpgradeConfig, upgrade_all
        from rsae.pipeline import upgrade as run

        if penalty is not None and recipe != "paper":
            raise ValueError("--penalty is the l1 price of --recipe paper; the default recipe has none")
        if len(hook) not in (1, len(teacher)):
            raise ValueError(
                f"teachers: {len(teacher)}, --hook: {len(hook)}; give one hook for all, or one for each teacher"
            )
        if online and train_tokens is not None:
            raise ValueError("--online reads as many tokens as the steps take: leave out --train-tokens")
        rate: dict[str, Any] = {} if lr is None else {"lr": lr}
        config = UpgradeConfig(
            train_tokens=None if online else 1_000_000 if train_tokens is None else train_tokens,
            evaluation_tokens=evaluation_tokens,
            context_length=context_length,
            recipe=recipe,
            finetune=FinetuneConfig(steps=steps, batch_size=batch_size, seed=seed, penalty=penalty, **rate),
        )
        mesh = Mesh.of(latent_shards)
        how: dict[str, Any] = {
            "config": config, "trust": trust, "progress": progress, "command": _command(), "mesh": mesh,
        }  # fmt: skip
        if len(teacher) == 1:
            results = {".": run(teacher[0], host, hook[0], text, out, **how)}
        else:
            hooks = hook * len(teacher) if len(hook) == 1 else hook
            results = upgrade_all(list(zip(teacher, hooks, strict=True)), host, text, out, **how)
    if not mesh.ranks.is_main:
        return
    for name, metrics in results.items():
        _print_table(metrics, title=f"{'' if name == '.' else name + ': '}RSAE against its equal-compute control")
        print(f"SAE: {out / name / 'rsae'} (`import rsae`, then SAELens' SAE.load_from_disk)")
    print(f"report: {out / 'report.html'}")


@app.command()
def inspect(
    teacher: Teacher,
    host: Host,
    hook: Hook,
    text: Text,
    out: Annotated[Path, typer.Option("--out", help="Folder for preflight.json.")] = Path("inspect"),
    tokens: Annotated[int, typer.Option(help="Tokens that the conventions are tested on.")] = 16_384,
    context_length: ContextLength = 256,
) -> None:
    """Say how a teacher is read, and test on real activations whether another reading fits better. Writes preflight.json."""
    with progress_shown() as progress:
        from rsae.hosts import load_host
        from rsae.preflight import preflight
        from rsae.teachers import load_teacher

        loaded = load_teacher(teacher, progress=progress)
        subject = {"fingerprint": loaded.fingerprint, "host": host, "hook": hook, "text": text}
        _refuse_another(out / "preflight.json", subject)
        found = preflight(
            loaded, load_host(host, progress=progress), hook, text, tokens=tokens, context_length=context_length,
            out=out / "preflight.json", progress=progress,
        )  # fmt: skip
    _print_preflight(found)
    print(f"written: {out / 'preflight.json'}")


@app.command()
def harvest(
    host: Host,
    hook: Annotated[
        list[str],
        typer.Option(
            "--hook",
            help="blocks.9.hook_resid_post, hook_mlp_out or hook_attn_out (TransformerLens), or model.layers.9 "
            "(module path). Repeat it for more in one pass: "
            "each then gets a folder of its name in --out.",
        ),
    ],
    text: Text,
    out: Out,
    tokens: Annotated[int, typer.Option(help="How many activations to store.")] = 1_000_000,
    split: Annotated[Literal["train", "validation", "evaluation"], typer.Option(help="Which documents.")] = "train",
    context_length: ContextLength = 256,
) -> None:
    """Store a language model's activations over a text, as shards that the other stages read.

    With several GPUs or machines: `torchrun --nproc-per-node 8 -m rsae harvest ...` writes the same shards.
    """
    with progress_shown() as progress:
        from rsae.harvest import check_ranks, harvest_all
        from rsae.hosts import load_host
        from rsae.ranks import Ranks

        ranks = Ranks.current()
        check_ranks(ranks, tokens, context_length)
        with ranks.main_first():  # which converts a packaged model
            loaded = load_host(host, progress=progress)
        folders = {name: out / name for name in hook} if len(hook) > 1 else {hook[0]: out}
        stores = harvest_all(
            loaded, folders, text, n_tokens=tokens, split=split, context_length=context_length, progress=progress
        )
    for store in stores.values() if ranks.is_main else ():
        left_out = ", ".join(f"{name} {share:.2%}" for name, share in store.meta["excluded"].items())
        print(f"{store.n_tokens} activations of width {store.d_in} in {store.path} (left out: {left_out})")


@app.command()
def pretrain(
    family: Annotated[Literal["relu", "jumprelu", "topk", "gated"], typer.Argument(help="The teacher's gate.")],
    acts: Annotated[Path, typer.Option(help="Activations to train on (from rsae harvest).")],
    held_out: Annotated[Path, typer.Option(help="Activations to measure L0 on.")],
    out: Out,
    d_sae: Annotated[int, typer.Option(help="Number of latents.")],
    l0: Annotated[float, typer.Option(help="Active latents per token; TopK's k.")] = 32,
    steps: Steps = 2000,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Seed = 0,
) -> None:
    """Train a teacher from scratch, as one of SAELens' own classes."""
    with progress_shown() as progress:
        from rsae.finetune import FinetuneConfig
        from rsae.harvest import ActivationStore
        from rsae.hosts import named_in_checkpoints
        from rsae.pretrain import pretrain as run

        config = FinetuneConfig(steps=steps, lr=lr, warmup=0.1, target_l0=l0, seed=seed)
        data, check = ActivationStore.open(acts), ActivationStore.open(held_out)
        data.check_same_source(check)
        has_bos, length = data.meta["excluded"]["bos"] > 0, data.meta["config"]["context_length"]
        metadata = named_in_checkpoints(data.host, data.hook, prepend_bos=has_bos, context_size=length)
        run(family, data, config, d_sae=d_sae, held_out=check, metadata=metadata, out=out, progress=progress)
    print(f"teacher: {out}")


@app.command()
def init(
    teacher: Teacher,
    acts: Annotated[Path, typer.Option(help="Activations to calibrate on (from rsae harvest).")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write, new or empty.")],
    support: Annotated[Literal["hard", "dense"], typer.Option(help="hard: exact zeros; dense: the paper's.")] = "hard",
    degree: Annotated[tuple[int, int] | None, typer.Option(help="P Q; default by family, as in the paper.")] = None,
) -> None:
    """Stage 1 alone: a teacher's weights with a rational gate that reproduces it."""
    with progress_shown() as progress:
        from itertools import islice

        from rsae.calibrate import calibrate
        from rsae.finetune import check_trainable, check_width
        from rsae.harvest import ActivationStore
        from rsae.sae import RationalSAE, save_sae
        from rsae.teachers import load_teacher

        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty: choose another --out")
        store, read = ActivationStore.open(acts), load_teacher(teacher, progress=progress).sae
        check_trainable(read)
        check_width(read, store.d_in)
        sae = RationalSAE.from_teacher(read, degree, support=support)
        batches = store.batches(2048, seed=0)
        save_sae(calibrate(sae, list(islice(batches, 8))), out)
    print(f"RSAE: {out}")


@app.command()
def finetune(
    sae: Annotated[str, typer.Argument(help="Checkpoint: a teacher (this trains the control) or an RSAE.")],
    acts: Annotated[Path, typer.Option(help="Activations to train on (from rsae harvest).")],
    held_out: Annotated[Path, typer.Option(help="Activations to match L0 on.")],
    out: Out,
    l0: Annotated[float | None, typer.Option(help="L0 to end at; default the SAE's own.")] = None,
    objective: Annotated[
        Literal["matched-l0", "l0", "l1"],
        typer.Option(help="Hold L0, or put a price on L0 or on l1 (a dense gate: l1)."),
    ] = "matched-l0",
    penalty: Annotated[
        float | None, typer.Option(help="The price, for l0 and l1, in units of the squared error per token.")
    ] = None,
    steps: Steps = 1000,
    batch_size: BatchSize = 2048,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the weights.")] = None,
    seed: Seed = 0,
    latent_shards: LatentShards = 1,
) -> None:
    """Stage 2 alone: train one arm. Arms with the same seed, batch size, steps and activations see the same batches."""
    with progress_shown() as progress:
        from rsae.finetune import FinetuneConfig, check_mesh, check_topk_l0
        from rsae.finetune import finetune as run
        from rsae.harvest import ActivationStore
        from rsae.mesh import Mesh
        from rsae.teachers import load_teacher

        chosen: dict[str, Any] = {
            "steps": steps,
            "batch_size": batch_size,
            "target_l0": l0,
            "seed": seed,
            "objective": objective,
            "penalty": penalty,
        }
        if lr is not None:
            chosen["lr"] = lr
        config, mesh = FinetuneConfig(**chosen), Mesh.of(latent_shards)
        loaded = load_teacher(sae, progress=progress)
        check_mesh(loaded.sae, config, mesh, out)
        check_topk_l0(loaded.sae, l0)
        if l0 is not None and objective != "matched-l0":
            raise ValueError(
                f"--l0 is what matched-l0 holds; with --objective {objective} the price decides: leave it out"
            )
        if penalty is not None and objective == "matched-l0" and loaded.family not in ("relu", "gated"):
            raise ValueError(
                "--penalty needs --objective l0 or l1: what holds L0 finds its own price (of a ReLU and a gated SAE it is where "
                "that begins)"
            )
        data, check = ActivationStore.open(acts), ActivationStore.open(held_out)
        data.check_same_source(check)
        run(loaded.sae, data, config, held_out=check, out=out, progress=progress, mesh=mesh)
    if mesh.ranks.is_main:
        print(f"fine-tuned: {out}")


@app.command()
def evaluate(
    run: Annotated[
        Path,
        typer.Argument(help="Run folder with teacher/, control/, init/ and rsae/ (those that exist are measured)."),
    ],
    host: Annotated[str | None, typer.Option(help="As of rsae upgrade; default the run's.")] = None,
    hook: Annotated[str | None, typer.Option(help="As of rsae upgrade; default the run's.")] = None,
    text: Annotated[str | None, typer.Option(help="As of rsae upgrade; default the run's.")] = None,
    acts: Annotated[
        Path | None,
        typer.Option(
            help="A store of this model and hook, whose statistics say which tokens are sinks; default the run's."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Held-out tokens; default the run's, else 200,000.")] = None,
    ce_tokens: Annotated[
        int | None,
        typer.Option(help="How many of them the model's loss is measured on; default the run's, else 32,768."),
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option(help="A teacher: does each latent still mean what it meant there? Writes identity.json."),
    ] = None,
) -> None:
    """Measure the arms of a run folder on held-out text, and write metrics.json and its page anew (an upgrade's own numbers stay
    beside it, in metrics.upgrade.json)."""
    with progress_shown() as progress:
        from rsae.artefacts import read_json
        from rsae.pipeline import evaluate_folder

        about = read_json(run / "run.json").get("identity", {}) if (run / "run.json").exists() else {}
        host, hook, text = (
            given or about.get(name) for name, given in (("host", host), ("hook", hook), ("text", text))
        )
        if host is None or hook is None or text is None:
            raise ValueError(
                f"{run} has no run.json that names its host, hook and text: give --host, --hook and --text"
            )
        sizes = about.get("config", {})
        metrics, found = evaluate_folder(
            run, host, hook, text, acts, tokens=sizes.get("evaluation_tokens", 200_000) if tokens is None else tokens,
            ce_tokens=sizes.get("ce_tokens", 32_768) if ce_tokens is None else ce_tokens, identity_of=identity,
            progress=progress,
        )  # fmt: skip
    _print_table(metrics, title=str(run))
    if found is not None:
        _print_identity(found)


@app.command()
def probe(
    run: Annotated[
        Path,
        typer.Argument(
            help="Run folder with teacher/, control/ and rsae/ (those that exist are probed); of a demo, a family's."
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Twelve sets, one a topic, instead of all 113.")] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--sets", metavar="NAME", help="One set, as 92_glue_sst2; repeat it for more.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Splits of each set, 3 at least.")] = 3,
) -> None:
    """Measure how well 1, 2, 5 and 16 latents of each arm tell the classes of labelled sets (`pip install "sae-probes>=0.4.2"`).

    Logistic regression on the k-sparse probing benchmark of sae-probes. Writes probing.json and probing/ in the run folder.

    Example: `rsae probe runs/demo/topk --quick`
    """
    with progress_shown() as progress:
        from rsae.probing import QUICK
        from rsae.probing import probe as measure

        if quick and sets:
            raise ValueError("--quick and --sets both name the sets: give one of them")
        found = measure(run, names=QUICK if quick else sets, seeds=seeds, progress=progress)
    _print_probing(found, title=f"{run}: k-sparse probing, {len(found['sets'])} sets, {seeds} splits each")
    print(f"written: {run / 'probing.json'}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders (each with metrics.json).")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page over one or more run folders."""
    from rsae.report import write_report

    print(f"report: {write_report(runs, out)}")


@app.command()
def track(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    project: Annotated[str, typer.Option(help="The W&B project.")] = "rsae",
) -> None:
    """Send the logs and metrics of a run to Weights & Biases (`pip install wandb`). Nothing is sent by itself."""
    from rsae.tracking import track as send

    print(f"arms sent to W&B: {send(run, project)}")


@app.command()
def fit(
    gate: Annotated[str, typer.Argument(help="relu, jumprelu, heaviside, sign or abs.")],
    degree: Annotated[tuple[int, int], typer.Option(help="P Q: degrees of numerator and denominator.")] = (9, 8),
    theta: Annotated[float | None, typer.Option(help="Where the jump is, for jumprelu, heaviside, sign.")] = None,
    delta: Annotated[float | None, typer.Option(help="Half width of the gap about the jump.")] = None,
    method: Annotated[
        Literal["minimax", "relaxed-remez"], typer.Option(help="The optimum, or the paper's initialisation.")
    ] = "minimax",
    out: Annotated[Path, typer.Option("--out", help="Folder to write: new, empty, or of the same fit.")] = Path("fit"),
) -> None:
    """Best rational approximation of a gate: prints the numbers, writes fit.json and a picture.

    Example: `rsae fit jumprelu --theta 0.1 --delta 0.005 --degree 9 8`
    """
    from rsae.artefacts import write_json
    from rsae.minimax import fit_gate, save_picture

    if out.exists() and any(path.name not in ("fit.json", "fit.html") for path in out.iterdir()):
        raise ValueError(f"{out} holds something else than a fit: choose another --out")
    found = fit_gate(gate, degree, theta=theta, delta=delta, method=method)
    values = found.to_dict()
    _refuse_another(out / "fit.json", {name: values[name] for name in ("gate", "degree", "theta", "delta", "method")})
    write_json(out / "fit.json", values)
    save_picture(found, out / "fit.html")
    print(f"{gate} of degree {degree}: max error {found.max_error:.6e}, mse {found.mse:.3e}")
    print(
        f"alternation {found.alternation}, iterations {found.iterations}, converged {found.converged}, {found.method}"
    )
    print(f"centre {found.centre:.17g}  scale {found.scale:.17g}")
    for name, coeffs in (("num_coeffs", found.num_coeffs), ("den_coeffs", found.den_coeffs)):
        print(f"{name}: {json.dumps([float(c) for c in coeffs])}")
    print(f"written: {out / 'fit.json'}, {out / 'fit.html'}")


def _refuse_another(file: Path, values: dict[str, Any]) -> None:
    """Leave a finding as it is that was not found of the same."""
    from rsae.artefacts import read_json

    before = read_json(file) if file.exists() else values
    if differing := [name for name, value in values.items() if before.get(name) != value]:
        raise ValueError(f"{file} is of another {', '.join(differing)}: choose another --out")


@contextmanager
def progress_shown() -> Iterator[Any]:
    """Progress on stderr while a stage works: bars with rate and ETA, or a line now and then where there is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    _quiet()
    if int(os.environ.get("RANK", 0)):  # of torchrun's processes the first one speaks
        yield lambda *_: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines
        return
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            task = bars.tasks[bars.task_ids.index(tasks[stage])]
            if done < task.completed:  # a stage of this name has come again
                bars.reset(tasks[stage], total=total)
            bars.update(tasks[stage], completed=done, total=total, rate=_rate(done, task.elapsed or 0.0))

        yield progress


LINE_EVERY_S = 30.0


def _lines(
    stage: str,
    done: int,
    total: int,
    seen: dict[str, tuple[float, float, int, int]] = {},  # noqa: B006 - kept between calls
) -> None:
    """A line when a stage begins, every LINE_EVERY_S seconds, and when it ends."""
    now = time.monotonic()
    began, last, first, before = seen.get(stage, (now, -math.inf, done, done))
    if done < before:  # a stage of this name has come again
        began, last, first = now, -math.inf, done
    is_due = done >= total or now - last >= LINE_EVERY_S
    seen[stage] = (began, now if is_due else last, first, done)
    if not is_due:
        return
    if done >= total:
        del seen[stage]
    rate = (done - first) / (now - began) if now > began else 0.0
    left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
    print(
        f"{stage}: {done:,} of {total:,} {_rate(done - first, now - began)}{left}".rstrip(), file=sys.stderr, flush=True
    )


def _rate(done: int, seconds: float) -> str:
    speed = done / seconds if seconds else 0.0
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s" if speed else ""


def _quiet() -> None:
    """Third parties' chatter would break the bars; our own warnings stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.showwarning = lambda message, *_, **__: print(f"rsae: warning: {message}", file=sys.stderr)


def _command() -> str:
    return shlex.join(["rsae", *sys.argv[1:]])


def _print_preflight(found: dict[str, Any]) -> None:
    """What a teacher is, and how well each reading of it reconstructs."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    conventions, metrics = found["conventions"], found["metrics"]
    console.print(f"{conventions['source']}: {found['family']}, read as {conventions['format']}")
    for name, value in found["found"].items():
        console.print(f"  {name}: {json.dumps(value)}", highlight=False)
    for name, value in conventions.items():
        if name not in ("source", "format", "decided", "d_in", "d_sae"):
            console.print(f"  {name}: {value}", highlight=False)
    for name, reason in conventions["decided"].items():
        console.print(f"  {name} from: {reason}", highlight=False)
    shown = ("fvu", "l0", "alive", "dense", "delta_ce")
    console.print("  " + "  ".join(f"{name} {metrics[name]:.4g}" for name in shown), highlight=False)
    console.print(f"  sinks left out: {found['excluded']['sink']:.2%} of tokens", highlight=False)
    table = Table(title="other readings", title_justify="left")
    for name in ("convention", "declared", "instead"):
        table.add_column(name)
    table.add_column("FVU", justify="right")
    table.add_column("declared = 1", justify="right")
    table.add_column("L0", justify="right")
    for row in found["alternatives"]:
        cells = ("-", "-", "-")
        if row["fvu"] is not None:
            cells = (f"{row['fvu']:.4f}", f"{row['ratio']:.2f}", f"{row['l0']:.1f}")
        table.add_row(row["convention"], row["declared"], row["instead"], *cells)
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"WARNING: {warning}", style="bold red", highlight=False)
    console.print(
        f"verdict: the activations {'agree with' if found['verdict'] == 'agrees' else 'CONTRADICT'} the declared reading"
    )


def _print_table(metrics: dict[str, Any], title: str) -> None:
    """The comparison, as text."""
    from rich.console import Console
    from rich.table import Table

    from rsae.metrics import MATCHED
    from rsae.report.runs import ARMS
    from rsae.report.words import harmed

    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    for name in ("FVU", "L0", "alive", "dense", "delta-CE", "loss rec.", "KL"):
        table.add_column(name, justify="right")
    for arm, label in ARMS.items():
        if (row := metrics.get(arm)) is None:
            continue
        cells = (
            f"{row['fvu']:.4f}", f"{row['l0']:.2f}", f"{row['alive']:.1%}", f"{row['dense']:.2%}",
            f"{row['delta_ce']:.4f}", f"{row['loss_recovered']:.2%}", f"{row['kl']:.4f}",
        )  # fmt: skip
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    for other in ("control", "teacher"):
        if (difference := metrics.get(f"rsae_minus_{other}")) is None:
            continue
        fvu, low, high = (f"{100 * v:+.2f}%" for v in difference["fvu"])
        ce, ce_low, ce_high = (f"{v:+.4f}" for v in difference["delta_ce"])
        console.print(f"RSAE minus {other}: FVU {fvu} [{low}, {high}], delta-CE {ce} [{ce_low}, {ce_high}] nats")
    if eps := metrics.get("config", {}).get("eps"):  # of a dense gate, which has no zeros of its own
        counted = ", ".join(f"{ARMS[arm]} |z| > {value:.4g}" for arm, value in eps.items())
        console.print(f"counted, and all else set to 0: {counted}")
    if said := harmed(metrics):
        console.print(said, highlight=False)
    if "verdict" in metrics:
        ours, theirs = metrics["rsae"]["l0"], metrics["control"]["l0"]
        if theirs and abs(ours / theirs - 1) > MATCHED:
            console.print(f"no verdict against the control: L0 is not matched ({ours:.2f} and {theirs:.2f})")
        else:
            console.print(
                "verdict against the control: " + ", ".join(f"{k} {v}" for k, v in metrics["verdict"].items())
            )


def _print_identity(found: dict[str, Any]) -> None:
    """How far each latent still is the teacher's, as text."""
    from rich.console import Console
    from rich.table import Table

    labels = {"control": "control", "rsae": "RSAE", "init": "RSAE init"}
    arms = [arm for arm in labels if arm in found]
    table = Table(title=f"same latent as in {found['config']['teacher']}? median [5%, 95%]", title_justify="left")
    table.add_column("by index")
    for arm in arms:
        table.add_column(labels[arm], justify="right")
    for name, left_out in (
        ("decoder_cosine", None), ("encoder_cosine", None), ("correlation", "undefined"), ("top_contexts", "never_fires"),
    ):  # fmt: skip
        rows = [found[arm][name] for arm in arms]
        cells = (f"{row['50%']:.2f} [{row['5%']:.2f}, {row['95%']:.2f}]" if row["n"] else "-" for row in rows)
        table.add_row(name.replace("_", " "), *cells)
        if left_out is not None:
            counts = (" / ".join(str(count) for count in row[left_out].values()) for row in rows)
            table.add_row(f"  {left_out.replace('_', ' ')}", *counts)
    table.add_row("moved", *(f"{found[arm]['moved']:.2%}" for arm in arms))
    console = Console()
    console.print(table)
    console.print("undefined, never fires: latents left out, in the teacher alone / in the arm alone / in both")


def _print_probing(found: dict[str, Any], title: str) -> None:
    """Test AUC and accuracy by arm and k, and what rsae has over the others."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    ks = list(next(iter(found["arms"].values())))
    table.add_column("test AUC")
    for k in ks:
        table.add_column(f"k = {k}", justify="right")
    for arm, by_k in found["arms"].items():
        table.add_row({"rsae": "RSAE"}.get(arm, arm), *("{:.3f} ± {:.3f}".format(*by_k[k]["auc"]) for k in ks))
        table.add_row("  accuracy", *(f"{by_k[k]['accuracy'][0]:.2%}" for k in ks))
    console = Console()
    console.print(table)
    console.print("±: standard deviation over splits of the mean over sets", highlight=False)
    for other in ("control", "teacher"):
        for k, difference in found.get(f"rsae_minus_{other}", {}).items():
            mean, low, high = difference["auc"]
            interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}], {difference['verdict']}"
            console.print(f"RSAE minus {other}, k = {k}: AUC {mean:+.4f}{interval}")
    for arm, names in found["all_zero"].items():
        if names:
            console.print(f"{arm}: every latent is 0 on {', '.join(names)}, so that AUC is 0.5 there", highlight=False)


if __name__ == "__main__":
    main()
