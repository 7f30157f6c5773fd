"""The search for the settings of control and RSAE alike, on validation documents: `benchmarks.evidence` measures what it chose.

    python -m benchmarks.search [--only TEXT]

fine-tunes teachers of the evidence (SmolLM2-135M, middle layer, L0 32, seed 0) once for each variation of the settings, each on the
same batches for the same steps, and writes results/search.json after each teacher, SEARCH.md at the end. What is finished is not
run again. The evidence's cells have to be there.

    --only TEXT    only variations whose "family/name" contains TEXT
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.evidence import ARMS, BATCH, FINETUNE, RESULTS, RUNS, TEXT, Arm, Cell, gather, start
from benchmarks.evidence_tables import nats, ran_on, relative, table, write_page

from rsae.artefacts import Progress, provenance, read_json, write_json
from rsae.calibrate import mean_l0
from rsae.cli import progress_shown
from rsae.evaluate import evaluate_runs
from rsae.finetune import finetune
from rsae.pretrain import Family
from rsae.rational import Surrogate
from rsae.teachers import load_teacher
from rsae.text import evaluation_contexts

HOST, LAYER = "package:smollm2-135m", 15
TOKENS, CE_TOKENS = 60_000, 32_768
LR = 1e-3

CONTROL = {
    "control": {},
    "control, lr 5e-4": {"lr": 5e-4},
    "control, lr 2e-3": {"lr": 2e-3},
    "control, lr 4e-3": {"lr": 4e-3},
}
THRESHOLDS = {
    "control, bandwidth 0.2": {"surrogate": Surrogate(bandwidth=0.2)},
    "control, bandwidth 0.8": {"surrogate": Surrogate(bandwidth=0.8)},
    "control, bandwidth 1.2": {"surrogate": Surrogate(bandwidth=1.2)},
    "control, gate rate 3e-4": {"gate_lr": 3e-4},
}
"""What a JumpReLU control can vary besides: the window of its rectangle, the rate of its thresholds."""
RSAE = {
    "rsae": {},
    "rsae, lr 5e-4": {"lr": 5e-4},
    "rsae, lr 2e-3": {"lr": 2e-3},
    "rsae, lr 4e-3": {"lr": 4e-3},
    "rsae, strength 0.3": {"surrogate": Surrogate(strength=0.3)},
    "rsae, bandwidth 0.3": {"surrogate": Surrogate(bandwidth=0.3)},
    "rsae, alpha 0": {"alpha": 0.0},
    "rsae, gate rate 2e-3": {"gate_lr": 2e-3},
}
AT_TWICE_THE_RATE = {
    "gate rate 5e-4": {"gate_lr": 5e-4},
    "strength 0.3": {"surrogate": Surrogate(strength=0.3)},
    "strength 0.4": {"surrogate": Surrogate(strength=0.4)},
    "bandwidth 0.3": {"surrogate": Surrogate(bandwidth=0.3)},
    "alpha 0": {"alpha": 0.0},
    "crowding 5": {"surrogate": Surrogate(crowding=5.0)},
}
"""From a JumpReLU, whose control is best with it."""
VARIATIONS: dict[Family, dict[str, dict[str, Any]]] = {
    "topk": CONTROL | RSAE,
    "jumprelu": CONTROL
    | THRESHOLDS
    | RSAE
    | {f"rsae, lr 2e-3, {name}": {"lr": 2e-3, **change} for name, change in AT_TWICE_THE_RATE.items()},
}
SHOWN = {"fvu": relative, "delta_ce": nats}


def search(family: Family, names: list[str], progress: Progress | None) -> dict[str, Any]:
    """Train and measure the named variations from one teacher, each compared with the control as it is."""
    cell = Cell(HOST, LAYER, family, 32, 0)
    data = gather(cell, progress)
    teacher = load_teacher(RUNS / cell.name / "teacher").sae
    l0 = mean_l0(teacher, (x for x, _ in data.validation.iterate(BATCH)))
    arms: dict[str, Any] = {}
    for name in dict.fromkeys(["control", *names]):
        arm: Arm = ARMS[name.split(",")[0]]
        how = replace(FINETUNE, lr=LR, target_l0=l0, seed=cell.seed)
        how = replace(how, **arm.change | VARIATIONS[family][name])
        arms[name] = finetune(
            start(arm.start, teacher, data, cell.seed), data.train, how, held_out=data.validation,
            out=RUNS.parent / "search" / family / name.replace(", ", "-").replace(" ", "-"), progress=progress, name=name,
        )  # fmt: skip
    contexts = evaluation_contexts(data.host.tokenizer, TEXT, n_tokens=TOKENS, split="validation")
    pairs = [(name, "control") for name in arms if name != "control"]
    (found,) = evaluate_runs(
        {"": arms}, data.host, data.hook, contexts, store_stats=data.train.sink_rule, ce_tokens=CE_TOKENS, pairs=pairs,
        progress=progress,
    ).values()  # fmt: skip
    return {
        name: {metric: found[name][metric] for metric in ("fvu", "delta_ce", "l0", "alive", "dense")}
        | {"minus_control": found.get(f"{name}_minus_control")}
        for name in arms
    }


def page(result: dict[str, Any]) -> str:
    """SEARCH.md, from what search.json holds."""
    lines = [
        "# The search, for control and RSAE alike", "",
        f"`python -m benchmarks.search`, {ran_on([result])}. Made by the command from `search.json`.", "",
        f"SmolLM2-135M, layer {LAYER}, d_sae 4608, L0 32, seed 0; {FINETUNE.steps} steps of {BATCH} from the teachers of "
        f"EVIDENCE.md, at a rate of {LR:g}. Each row says how it differs from its arm's default. Measured on {TOKENS:,} tokens of "
        "validation "
        "documents, which are neither trained on nor evaluated in EVIDENCE.md, though of the sources evaluated there. "
        "Differences are from the control as it is, with the 95% interval of a bootstrap paired by document.",
    ]  # fmt: skip
    for family, variations in result["families"].items():
        rows = []
        for name, m in variations.items():
            from_control = [show(m["minus_control"][key]) if m["minus_control"] else "" for key, show in SHOWN.items()]
            rows.append([
                name, f"{m['fvu']:.4f}", from_control[0], f"{m['delta_ce']:.4f}", from_control[1], f"{m['alive']:.2%}",
                f"{m['dense']:.2%}", f"{m['l0']:.2f}",
            ])  # fmt: skip
        heads = ["", "FVU", "from the control's", "delta-CE", "from the control's", "alive", "dense", "L0"]
        lines += ["", f"## From a {family} teacher", "", table(heads, rows)]
        if left := [name for name in VARIATIONS[family] if name not in variations]:
            lines.append(f"Not run: {'; '.join(left)}.\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    file = RESULTS / "search.json"
    result = read_json(file) if file.exists() else {"families": {}}
    with progress_shown() as progress:
        for family, variations in VARIATIONS.items():
            names = [name for name in variations if only in f"{family}/{name}"]
            if names:
                known = result["families"].get(family, {})
                result["families"][family] = known | search(family, names, progress)
                result["provenance"] = provenance()
                write_json(file, result)
    write_page(RESULTS / "SEARCH.md", page(result))


if __name__ == "__main__":
    main()
