"""results/evidence.json as pages: EVIDENCE.md, its figures, and the table of README.md. Called by benchmarks.evidence."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rsae.artefacts import atomic, config_hash
from rsae.finetune import JUMPRELU_LR

MARKS = ("<!-- evidence: made by python -m benchmarks.evidence -->", "<!-- /evidence -->")
COLOURS = {"teacher": "#8d99ae", "control": "#30638e", "rsae": "#d1495b"}
METRICS = ("fvu", "delta_ce", "alive", "dense")
MAIN = ("control", "rsae")
"""The arms of cells beside those of the middle layer and sparsity with the first seed, which have all."""
SAYS = {
    "teacher": "the teacher as it came",
    "control": "**control**: its own architecture, fine-tuned",
    "init": "RSAE, initialised",
    "scale_only": "a scale for each latent, nothing else",
    "gate_only": "the gate alone (thresholds, scales, rational)",
    "threshold_rectangle": "threshold per latent with a price on crowds, rectangle; no rational",
    "threshold_uncrowded": "threshold per latent, jump-corrected, also to the encoder; no price on crowds, no rational",
    "threshold_jump": "threshold per latent with a price on crowds, jump-corrected, also to the encoder; no rational",
    "threshold_follow": "the same, and thresholds follow the sample",
    "rsae": "**RSAE** (default recipe)",
    "paper": "paper's recipe, dense, nothing zeroed; l1 price 0.3 (ours; hardened, from a TopK, price 1 is better: SEARCH.md)",
    "paper_hardened": "the same, what is not counted zeroed",
}
STEPS = (
    ("rsae", "threshold_follow"),
    ("threshold_follow", "threshold_jump"),
    ("threshold_jump", "threshold_rectangle"),
    ("threshold_rectangle", "control"),
    ("threshold_jump", "threshold_uncrowded"),
    ("threshold_uncrowded", "control"),
    ("rsae", "threshold_uncrowded"),
)
"""What is compared: from the RSAE to its control, one thing less at a time; then by way of the jump-corrected gradient alone."""
CHOSEN_ON = {
    ("smollm2-135m", "15"): {"relu": (16, 64), "jumprelu": (16, 32, 64), "topk": (16, 32, 64)},
    ("gemma3-270m", "9"): {"relu": (16,), "jumprelu": (16, 32, 64), "topk": (32,), "batchtopk": (32,)},
    ("gemma3-270m", "3"): {"jumprelu": (32,)},
    ("gemma3-270m", "14"): {"relu": (32,), "jumprelu": (32,), "topk": (32,)},
}
"""By host and layer the teachers, and their L0s, that the default recipe was chosen on or revised after; with seed 0."""


def _prose(text: str) -> str:
    """Paragraphs and lists as Markdown, a line for each paragraph or point."""
    parts = re.split(r"\n(?:[ ]*\n)?(?=[ ]*- )|\n[ ]*\n", text.strip())
    text = ""
    for line in (" ".join(part.split()) for part in parts):
        text += ("\n" if line.startswith("- ") and text.rpartition("\n\n")[2].startswith("- ") else "\n\n") + line
    return text.strip() + "\n"


WORDS = _prose("""
    ## The words

    - *FVU*: sum ||x - x_hat||^2 / sum ||x - mean||^2. *delta-CE*: what the SAE, spliced into the model, adds to its loss, in
      nats per token. *alive*: latents that fire on the measured tokens; *dense*: that fire on more than 10% of them.
    - *edge*: the jump of a gate at a latent's threshold. The true gradient is 0 there; one is estimated from the activations in
      a window about it, either as a *rectangle* (first order) or *jump-corrected* (with the second-order term of the jump).
      *Strength*: the share of it that reaches the encoder too; all of it reaches the threshold.
    - *price*: what being active costs a latent, set in each batch so that L0 stays. On *crowds*, with a crowding c: times 1 + c
      s, where s is the latent's share of all that is active. *Sparing*: latents that are rarely active pay less.
    - *following*, alpha: thresholds scale with the sample. 1 is TopK's rule, 0 a threshold that is fixed.
""")
CHOSEN = _prose("""
    ## What the settings were chosen on

    The recipe was chosen on validation documents, which are of the sources that are evaluated here, and not blindly: some cells
    had been measured before a setting was changed. Cells that a setting was chosen on, or that spoke for a change, are counted
    apart, with other seeds of theirs. dev/LOG.md has every try, with what came of it. All cells of a host are measured on the
    same documents.

    - *First*, on the middle layers, L0 32, TopK and JumpReLU, seed 0. Three cells that had been measured here were lost in
      dense latents, and tied in Gemma's delta-CE from a TopK; the price on crowds and other settings of the edge were found to
      mend that.
    - *Then*, after a loss of SmolLM2's JumpReLU at L0 64, the price was put into units of a latent's share of all that is
      active. Seven other cells at L0 16 and 64 had been measured by then, and spoke for it. At L0 32 it changes nothing (320/32
      is the 10 of before): 18 cells were restated in the new unit, and not measured again.
    - *From a JumpReLU*, the edge of now, and that rarely active latents are spared, on Gemma's three layers, L0 32, seed 0, by
      some twenty tries; its price on crowds by some fifty more, eight of them on L0 16 and 64 and the BatchTopK. With the
      higher price that stood between, five cells had been measured: layers 14 and 3 were lost in FVU, by 0.2 and 3.3%, and the
      price was lowered. Tries on the ReLU and the TopK of layer 14 decided that this edge is not theirs.
    - *When silent latents are revived* (after 100 K tokens) was chosen earlier, on evaluation documents of Gemma's layer 9,
      with the demo's teachers.
    - *The control* was searched by fewer tries than the recipe took, on one seed each ([SEARCH.md](SEARCH.md), in part on
      teachers of earlier versions of the loop). Both arms have the rate of the weights that the control is best with, but for
      Gemma's TopK, whose control has 0.27% less FVU at 2e-3 than at the 1e-3 that it has, and SmolLM2's (0.05%, within the
      interval). The rates of ReLU and gated were not searched.
    - *A JumpReLU control's own thresholds* were too slow at first, in all cells: on Gemma's layer 9 that was most of what the
      RSAE was ahead by, at layer 3 all of it. Now rates of weights and thresholds are those with which its FVU was lowest on
      validation documents: of each of Gemma's layers, and of SmolLM2's middle layer, by scripts over the grid's activations
      (dev/LOG.md, 28 and 29 November), at L0 32. Layer 3 has a teacher whose thresholds learn at 3e-3, with which its own FVU
      was lowest there; the rate of other teachers was not searched. Other layers of SmolLM2, other seeds and sparsities, and
      Gemma's BatchTopK have them from there. At SmolLM2's rate (4e-3 where 2e-3 was tried too) 1.8 times as many latents of the
      control are dense, 1.5 times as many of the RSAE.
    - *Not done in either arm*: training at 0.9 or 0.8 of the L0, thresholds lowered to all of it at the end. It gains SmolLM2's
      JumpReLU control .006 and .010 nats on validation documents; the RSAE gains as well, and stays ahead.
""")
COVERS = _prose("""
    ## What an interval covers

    The documents of this text; not other teachers, batches, text, or processors that round otherwise. Sets of documents, even
    of the same sources, differ by more than the interval over one of them says (dev/LOG.md, "the control, searched"). A teacher
    trained again on another processor is another teacher: the delta-CE of the control of Gemma's JumpReLU at L0 16 was .636,
    and then .652. Cells were run on processors of Intel and AMD, which was not recorded for each; in training, products are in
    float32 where bfloat16 is no faster. L0 of the arms may differ by up to 1%, and nothing is corrected for it: where it was, a
    percent of L0 turned out to be worth .2 to .4 point of FVU.
""")
DIFFERS = _prose("""
    ## What the RSAE has and its control has not

    - From ReLU and TopK: a threshold for each latent (a JumpReLU or gated control has its own). From a ReLU or gated SAE: no l1
      price, which its control keeps.
    - From all: the jump-corrected gradient, with a strength of a fifth (two fifths from a JumpReLU or BatchTopK; the control's
      is a rectangle's, of strength 0); a price on crowds (from a JumpReLU or BatchTopK a tenth as high, and next to nothing for
      latents that are rarely active); thresholds that follow the sample a little; and the rational with its scales.
    - A JumpReLU control has a rate of its own for its thresholds, where the RSAE has the default of its gate.
    - Silent latents are revived in all arms but a ReLU or gated control and those with frozen thresholds: thresholds come down
      to them, and a TopK has its auxiliary loss.

    *Whose the gain from a JumpReLU is* was not measured with the recipe of now. With the one before, and beside controls whose
    thresholds were slow: on SmolLM2 the gradient (-1.0% of FVU) paid for the price on crowds (+0.9%), and what was left was the
    rational's (-0.6%, at +.003 nats) and following's (-0.2%); on Gemma an arm with the gradient alone, by a script on the first
    57 K of these tokens, was 0.15% [0.05%, 0.24%] ahead of the RSAE, so that there it was the gradient's.

    *Alive and dense.* No arm isolates what wins them. Of the wins in living latents those from ReLU and gated controls are
    beside arms without revival; those from JumpReLU and BatchTopK controls, which have it, are mostly where the control lost
    latents that its teacher had, at the rates that its FVU is best with. Dense latents are presumably won by the price on
    crowds. In the one ReLU cell that is taken apart the arms with revival and without the rational have a little fewer alive
    than the control, and with it as many.
""")
NOT_HERE = _prose("""
    ## What is not here

    - SmolLM2's BatchTopK; a teacher of 16 K latents.
    - Parts apart, identity and probing of the cells that do not stand under these heads below, Gemma's among them.
    - Tables of the loss recovered, KL and histograms, which are in evidence.json alone.
    - Teachers that others trained, on 20 M tokens or more: these are all our own, of 6, with decoder rows of norm 1 and b_dec
      subtracted from the input. (How others are brought into that form is tested on small data, and was seen on one of these,
      rewritten: dev/LOG.md.)
    - More than one seed at other sparsities and layers. The model's loss on all tokens: it is measured on a part, for what it
      costs on two processors.
""")
Cell = dict[str, Any]


def write_tables(evidence: dict[str, Any], out: Path) -> None:
    """Write everything that shows `evidence`: in `out`, and in the README beside it."""
    # What was measured with other settings, or by another loop, stays in the file and out of the tables
    current = {name: config_hash(settings) for name, settings in evidence["settings"].items()}
    cells = [
        _of_now(cell, evidence["other_arms"][of])
        for cell in evidence["cells"]
        if cell["settings"] == current.get(of := setting_of(cell))
    ]
    shown = {setting_of(cell) for cell in cells}
    settings = {name: found for name, found in evidence["settings"].items() if name in shown or not shown}
    evidence = {**evidence, "cells": cells, "settings": settings}
    write_page(out / "EVIDENCE.md", _page(evidence))
    for host in _hosts(cells):
        write_page(
            out / f"evidence-{short(host)}.svg", _pareto([c for c in cells if c["host"] == host and _measured(c)])
        )
    readme = out.parent / "README.md"
    before, mark, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    if mark:
        write_page(readme, before + mark + "\n" + _headline(evidence) + MARKS[1] + rest.partition(MARKS[1])[2])


def _of_now(cell: Cell, other_arms: dict[str, Any]) -> Cell:
    """The cell without those of its arms that are trained otherwise by now."""
    gone = {name for name, how in cell["other_arms"].items() if how != other_arms.get(name)}
    gone |= {"paper_hardened"} if "paper" in gone else set()
    return {
        **cell,
        "arms": {name: found for name, found in cell["arms"].items() if name not in gone},
        "failed_arms": {name: why for name, why in cell.get("failed_arms", {}).items() if name not in gone},
    }


def write_page(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def ran_on(cells: Iterable[Cell]) -> str:
    """Machines and commits of the cells, in words."""
    stamps = [cell["provenance"] for cell in cells]
    machines = sorted(
        {f"{s['machine']['cores']} cores {s['machine']['processor']}, {s['machine']['device']}" for s in stamps}
    )
    commits = sorted({str(stamp["commit"])[:8] for stamp in stamps})
    said = (
        f"commit {', '.join(commits)}" if len(commits) < 4 else f"{len(commits)} commits, each named with its numbers"
    )
    return f"{'; '.join(machines)}, {said}"


def _hosts(cells: Iterable[Cell]) -> list[str]:
    return sorted({cell["host"] for cell in cells})


def short(host: str) -> str:
    """A host's name as folders and tables have it: package:gemma3-270m is gemma3-270m."""
    return host.split(":")[-1].rstrip("/").split("/")[-1]


def setting_of(cell: Cell) -> str:
    """What a cell shares its settings with: its host, layer and family."""
    return f"{short(cell['host'])} layer-{_layer(cell)} {cell['family']}"


def _layer(cell: Cell) -> str:
    return re.sub(r"\D+", "", cell["hook"])


def _measured(cell: Cell) -> bool:
    """Whether a cell has numbers; one whose L0 missed has them, and has failed all the same."""
    return "rsae" in cell["arms"]


def _chosen_on(cell: Cell) -> bool:
    """Whether the default recipe was chosen on this cell's arms, or on those of another seed beside it."""
    of_layer = CHOSEN_ON.get((short(cell["host"]), _layer(cell)), {})
    return cell["expansion"] == 8 and cell["target_l0"] in of_layer.get(cell["family"], ())


def _measured_on(cells: Sequence[Cell]) -> str:
    """How many tokens of how many documents the cells were measured on, and what was left out, in words."""
    if not cells:
        return ""

    def span(values: Iterable[float], form: str) -> str:
        low, *_, high = [*(ordered := sorted(values)), ordered[-1]]
        return format(low, form) if format(low, form) == format(high, form) else f"{low:{form}} to {high:{form}}"

    arms = [cell["arms"]["rsae"] for cell in cells]
    n = {
        key: span((arm[key] for arm in arms), ",")
        for key in ("n_tokens", "n_documents", "n_ce_tokens", "n_ce_documents")
    }
    left_out = span((sum(cell["excluded"].values()) for cell in cells), ".2%")
    return (
        f"Measured on {n['n_tokens']} tokens of {n['n_documents']} documents, the model's loss on {n['n_ce_tokens']} of them, of "
        f"{n['n_ce_documents']}; left out: BOS, special tokens and attention sinks ({left_out} of all)."
    )


def _won(cell: Cell, metric: str) -> bool:
    return cell["verdict"][metric] == "win"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


def relative(interval: Sequence[float]) -> str:
    mean, low, high = interval
    return f"{mean:+.2%} [{low:+.2%}, {high:+.2%}]"


def nats(interval: Sequence[float]) -> str:
    mean, low, high = interval
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _verdicts(cells: Sequence[Cell]) -> list[list[str]]:
    rows = []
    for metric in METRICS:
        found = Counter(cell["verdict"][metric] for cell in cells)
        rows.append([metric, *(str(found[name]) for name in ("win", "tie", "loss", "failed"))])
    return rows


def _families(cells: Sequence[Cell]) -> str:
    """How many cells of each family, in words."""
    return ", ".join(f"{n} {family}" for family, n in Counter(cell["family"] for cell in cells).items()) or "none"


def _strictly(cells: Sequence[Cell]) -> str:
    """How often the RSAE has fewer living or more dense latents than its control, by however little."""
    arms = [(cell["arms"]["rsae"], cell["arms"]["control"]) for cell in cells]
    won = {metric: _families([cell for cell in cells if _won(cell, metric)]) for metric in ("alive", "dense")}
    fewer, more = sum(a["alive"] < b["alive"] for a, b in arms), sum(a["dense"] > b["dense"] for a, b in arms)
    return (
        f"\nWithout a tolerance of 0.1 percentage point, ties and all: alive is lower than the control's in {fewer} of "
        f"{len(cells)} cells, dense higher in {more}. Teachers of the wins in alive: {won['alive']}; in dense: "
        f"{won['dense']}.\n"
    )


def _from_scratch(cells: Sequence[Cell]) -> str:
    """What a JumpReLU that was one from the start makes of as many steps as a ReLU and the RSAE from it."""
    by_place = {
        (c["host"], c["hook"], c["expansion"], c["target_l0"], c["seed"], c["family"]): c["arms"] for c in cells
    }
    pairs = [
        (arms["rsae"], by_place[(*place, "jumprelu")]["control"])
        for (*place, family), arms in by_place.items()
        if family == "relu" and (*place, "jumprelu") in by_place
    ]
    if not pairs:
        return ""
    lower = {metric: sum(jump[metric] < rsae[metric] for rsae, jump in pairs) for metric in ("fvu", "delta_ce")}
    more = sorted(rsae["fvu"] / jump["fvu"] - 1 for rsae, jump in pairs)
    return (
        "What is won from a ReLU is mostly won by not being one. A JumpReLU from the start, trained for as many steps as a ReLU "
        "and then the RSAE from it (the control of the JumpReLU's cell), has a lower FVU than that RSAE in "
        f"{lower['fvu']} of {len(pairs)} places, and a lower delta-CE in {lower['delta_ce']}; the RSAE's FVU is {more[0]:+.1%} to "
        f"{more[-1]:+.1%} beside it. (The rates of these JumpReLUs were searched, those of the ReLUs were not.)\n"
    )


def _slower(cells: Sequence[Cell]) -> str:
    """What "equal compute" leaves unequal."""
    times = [cell["cost"]["seconds"] for cell in cells]
    ratios = [each["rsae"] / each["control"] for each in times if each["control"]]  # a few steps may take 0.0 s
    if not ratios:
        return ""
    return (
        "Both arms take the same steps on the same batches, and that is what is called equal compute here. A step of the RSAE "
        f"took {median(ratios):.2f} times as long as its control's in the median of the cells ({min(ratios):.2f} to "
        f"{max(ratios):.2f}; see Cost for what disturbs these times).\n"
    )


def _percents(arms: dict[str, Any], metric: str) -> str:
    return ", ".join(f"{arms[arm][metric]:.1%}" for arm in ("teacher", "control", "rsae"))


def _harmed(cells: Sequence[Cell]) -> str:
    """The cells whose control training has left worse than its frozen teacher: what is won from it may be its loss."""
    found = [
        f"{cell['name']} (delta-CE: teacher {of['teacher']['delta_ce']:.3f}, control {of['control']['delta_ce']:.3f}, RSAE "
        f"{of['rsae']['delta_ce']:.3f}; alive: {_percents(of, 'alive')})"
        for cell in cells
        if any((of := cell["arms"])["control"][metric] > of["teacher"][metric] for metric in ("fvu", "delta_ce"))
    ]
    return (
        f"**Controls that training left worse than the frozen teacher**, in FVU or delta-CE, so that what is won from them says "
        f"little: {'; '.join(found)}.\n"
        if found
        else ""
    )


def _over_teacher(cells: Sequence[Cell], metric: str) -> str:
    wins = sum(not cell["failed"] and cell["rsae_minus_teacher"][metric][2] < 0 for cell in cells)
    return f"{wins} of {len(cells)}"


def _page(evidence: dict[str, Any]) -> str:
    cells = evidence["cells"]
    measured = [cell for cell in cells if _measured(cell)]
    others = [cell for cell in cells if not _chosen_on(cell)]
    settings = evidence["settings"]
    finetune, teacher = _finetune(evidence), next(iter(settings.values()))["teacher"]
    rates = f" ({found})" if (found := _other_rates(evidence)) else ""
    millions = " or ".join(sorted({f"{cell['unique_tokens'] / 1e6:.2f}" for cell in cells}))
    parts = [
        "# RSAE minus control: the evidence\n",
        f"`python -m benchmarks.evidence`, {ran_on(cells)}. Every number here is from "
        "`evidence.json`; this page is made by the same command.\n",
        f"Text: `{evidence['text']}`, {millions} M tokens to train on, read several times; evaluation documents are from other "
        f"sources, and {evidence['shared_documents']} of them share a long line or sentence with a training document. Teachers: "
        f"{teacher['steps']} steps of {teacher['batch_size']}, lr {teacher['lr']:g}{_rates_of_teachers(evidence)} "
        f"(a BatchTopK's by SAELens' own loop). {_dtypes(cells)}"
        f"Every fine-tuned arm: {finetune['steps']} "
        f"steps more on the same batches, lr {finetune['lr']:g}{rates}, mean L0 matched to the teacher's on validation text, "
        "exact zeros counted (the arms that say otherwise apart). Differences: relative for FVU, nats per token for delta-CE, "
        "with the 95% interval of a bootstrap paired by document. A tie is where the interval holds 0; for alive and dense, 0.1 "
        f"percentage point. {_measured_on(measured)}\n",
        f"## Verdict on {len(cells)} of the grid's {evidence['grid']} cells: RSAE against the control\n",
        table(["", "win", "tie", "loss", "failed"], _verdicts(cells)),
        f"\nOf these, the {len(others)} cells that nothing was chosen on, nor on another seed of theirs ({_families(others)}):\n",
        table(["", "win", "tie", "loss", "failed"], _verdicts(others)),
        _strictly(measured),
        _harmed(measured),
        f"RSAE against the frozen teacher: a lower FVU in {_over_teacher(measured, 'fvu')}, a lower delta-CE in "
        f"{_over_teacher(measured, 'delta_ce')} (intervals without 0).\n",
        WORDS,
        DIFFERS,
        _from_scratch(measured),
        _slower(measured),
        CHOSEN,
        COVERS,
        NOT_HERE,
    ]
    if measured:
        parts += [
            "## Cells\n",
            table(
                ["host", "layer", "family", "d_sae", "L0", "seed", "FVU: teacher, control, RSAE", "RSAE - control, FVU",
                 "delta-CE: teacher, control, RSAE", "RSAE - control, delta-CE", "alive: control, RSAE", "dense: control, RSAE",
                 "L0: control, RSAE"],
                map(_row, measured),
            ),
        ]  # fmt: skip
        parts += [f"![FVU against L0, {host}](evidence-{short(host)}.svg)\n" for host in _hosts(measured)]
        if taken_apart := [text for text in map(_attribution, measured) if text]:
            parts += ["## What is the rational's, the threshold's, the gradient's\n", *taken_apart]
        if identities := [row for cell in measured for row in _identity(cell)]:
            head = [
                "host",
                "layer",
                "family",
                "L0",
                "seed",
                "arm",
                "decoder cosine",
                "encoder cosine",
                "correlation",
                "top contexts",
            ]
            parts += [
                "## Does latent j stay what it was?\n",
                "Medians over latents, against the teacher's latent of the same index; `moved`: the share whose decoder direction "
                "is nearest to another of the teacher's.\n",
                table([*head, "moved"], identities),
            ]
        parts += [
            *_probing(measured),
            "## Cost\n",
            "Times are an arm's own, as it ran; where other work ran beside it they say little: `python -m benchmarks.step` is the "
            "measurement of speed.\n",
            table(
                ["host", "layer", "family", "d_sae", "L0", "seed", "control, s", "RSAE, s", "scalars added", "peak memory, GB"],
                [
                    [*_where(cell), *(f"{cell['cost']['seconds'][arm]:.0f}" for arm in ("control", "rsae")),
                     str(cell["cost"]["scalars_added"]), f"{cell['cost']['peak_memory_gb']:.1f}"]
                    for cell in measured
                ],
            ),
        ]  # fmt: skip
    if again := [row for cell in measured for row in _matched_again(cell)]:
        parts += [
            "## Matched on the text they are measured on\n",
            "As trained, that is with L0 matched on validation text, teacher, control and RSAE of these cells were further than "
            "1% apart in L0 on the text that they are compared on. There control and RSAE were matched to the teacher's L0 once "
            "more, by one factor of all thresholds (a TopK has its L0 on any text), and above they stand as they then are: it "
            "takes counts from this text, and no errors. The rule was made after three cells had failed without it. As "
            "trained they measured, with nothing concluded from it:\n",
            table(
                ["host", "layer", "family", "d_sae", "L0", "seed", "L0 as trained: control, RSAE", "apart",
                 "RSAE - control, FVU", "RSAE - control, delta-CE"],
                again,
            ),
        ]  # fmt: skip
    if failed := [cell for cell in cells if cell["failed"]]:
        parts += ["## Failed\n", *(f"- {cell['name']}: {cell['failed']}\n" for cell in failed)]
    return "\n".join(parts)


def _where(cell: Cell) -> list[str]:
    return [short(cell["host"]), _layer(cell), *(str(cell[key]) for key in ("family", "d_sae", "target_l0", "seed"))]


def _row(cell: Cell) -> list[str]:
    arms, minus = cell["arms"], cell["rsae_minus_control"]

    def of(names: Sequence[str], metric: str, form: str) -> str:
        return ", ".join(format(arms[name][metric], form) for name in names)

    three, two = ("teacher", "control", "rsae"), ("control", "rsae")
    return [
        *_where(cell),
        of(three, "fvu", ".4f"),
        f"{relative(minus['fvu'])} {cell['verdict']['fvu']}",
        of(three, "delta_ce", ".4f"),
        f"{nats(minus['delta_ce'])} {cell['verdict']['delta_ce']}",
        f"{of(two, 'alive', '.2%')} {cell['verdict']['alive']}",
        f"{of(two, 'dense', '.2%')} {cell['verdict']['dense']}",
        of(two, "l0", ".2f"),
    ]


def _matched_again(cell: Cell) -> Iterable[list[str]]:
    if was := cell.get("as_trained"):
        l0s = ", ".join(f"{was['arms'][arm]['l0']:.2f}" for arm in MAIN)
        minus = was["rsae_minus_control"]
        yield [*_where(cell), l0s, f"{was['gap']:.1%}", relative(minus["fvu"]), nats(minus["delta_ce"])]


def _attribution(cell: Cell) -> str:
    arms = [arm for arm in SAYS if arm in cell["arms"]]
    if set(arms) <= COLOURS.keys():
        return ""
    rows = []
    for arm in arms:
        found, minus = cell["arms"][arm], cell.get(f"{arm}_minus_control")
        counted = f", z above {found['eps']:.3g} in size" if "eps" in found else ""
        rows.append([
            SAYS[arm] + counted, f"{found['fvu']:.4f}", relative(minus["fvu"]) if minus else "", f"{found['delta_ce']:.4f}",
            nats(minus["delta_ce"]) if minus else "", f"{found['l0']:.1f}", f"{found['alive']:.2%}", f"{found['dense']:.2%}",
        ])  # fmt: skip
    head = ["arm", "FVU", "minus control", "delta-CE", "minus control", "L0", "alive", "dense"]
    steps = []
    for more, less in STEPS:
        if {more, less} <= cell["arms"].keys():
            minus = cell[f"{more}_minus_{less}"]
            steps.append([f"{SAYS[more]}, minus: {SAYS[less]}", relative(minus["fvu"]), nats(minus["delta_ce"])])
    title = (
        f"{short(cell['host'])}, layer {_layer(cell)}, {cell['family']}, L0 {cell['target_l0']}, seed {cell['seed']}"
    )
    failed = "".join(f"\nFailed: {arm}: {why}\n" for arm, why in cell["failed_arms"].items())
    return (
        f"### {title}\n\n"
        + table(head, rows)
        + failed
        + "\n"
        + table(["one thing at a time", "FVU", "delta-CE"], steps)
    )


def _identity(cell: Cell) -> Iterable[list[str]]:
    for arm, found in cell["identity"].items():
        medians = (found[name]["50%"] for name in ("decoder_cosine", "encoder_cosine", "correlation", "top_contexts"))
        values = ("" if value is None else f"{value:.2f}" for value in medians)
        yield [
            short(cell["host"]), _layer(cell), cell["family"], str(cell["target_l0"]), str(cell["seed"]), arm, *values,
            f"{found['moved']:.2%}",
        ]  # fmt: skip


def _probing(cells: Sequence[Cell]) -> list[str]:
    rows = []
    for cell in cells:
        found = cell.get("probing")
        for k, minus in found["rsae_minus_control"].items() if found else ():
            scores = ("{:.4f} ± {:.4f}".format(*found["arms"][arm][k]["auc"]) for arm in ("teacher", "control", "rsae"))
            mean, low, high = minus["auc"]
            where = [short(cell["host"]), _layer(cell), cell["family"], str(cell["target_l0"])]
            rows.append([*where, k, *scores, f"{mean:+.4f} [{low:+.4f}, {high:+.4f}] {minus['verdict']}"])
    if not rows:
        return []
    return [
        "## Sparse probing\n",
        "Area under the curve of a logistic regression on k latents, mean over twelve labelled sets (never trained on), ± its "
        "standard deviation over three splits; the difference with its 95% interval over sets.\n",
        table(["host", "layer", "family", "L0", "k", "teacher", "control", "RSAE", "RSAE - control"], rows),
    ]


def _headline(evidence: dict[str, Any]) -> str:
    """The table of the README: middle layer and sparsity, a line for each host and family, over the seeds there are."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in evidence["cells"]:
        if (
            _measured(cell)
            and not cell["failed"]
            and cell["is_middle"]
            and (cell["target_l0"], cell["expansion"]) == (32, 8)
        ):
            groups.setdefault((short(cell["host"]), _layer(cell), cell["family"]), []).append(cell)
    rows, shown = [], [cell for cells in groups.values() for cell in cells]
    for (host, layer, family), cells in groups.items():
        row = [f"{host}, layer {layer}", family, str(len(cells))]
        for metric, form in (("fvu", relative), ("delta_ce", nats)):
            values = [cell["rsae_minus_control"][metric] for cell in cells]
            mean = sum(value[0] for value in values) / len(values)
            row.append(form([mean, min(value[1] for value in values), max(value[2] for value in values)]))
        for metric in ("alive", "dense"):
            row.append(", ".join(_mean_share(cells, arm, metric) for arm in ("control", "rsae")))
        rows.append(row)
    odd = "".join(
        f" ({cell['family']}: {l0:.1f})" for cell in shown if abs((l0 := cell["arms"]["control"]["l0"]) / 32 - 1) > 0.05
    )
    cells = evidence["cells"]
    wins = {metric: sum(_won(cell, metric) for cell in cells) for metric in METRICS}
    finetune = _finetune(evidence)
    millions = finetune["steps"] * finetune["batch_size"] / 1e6
    head = ["host", "teacher", "seeds", "FVU, RSAE - control", "delta-CE (nats)", "alive: control, RSAE", "dense"]
    said = ", ".join(f"{wins[metric]} in {metric}" for metric in METRICS)
    losses = {metric: sum(cell["verdict"][metric] == "loss" for cell in cells) for metric in METRICS}
    lost = ", ".join(f"{n} in {metric}" for metric, n in losses.items() if n) or "none"
    failed = sum("failed" in cell["verdict"].values() for cell in cells)
    lost += f"; {failed} failed, by the rules of the page" if failed else ""
    settings = {setting_of(cell): evidence["settings"][setting_of(cell)] for cell in shown}
    as_upgrade = f", with the settings of `rsae upgrade` (lr {finetune['lr']:g}) but on up to 2 M stored tokens"
    if rates := _other_rates({**evidence, "settings": settings}):
        as_upgrade += (
            f", and but for the rates that these controls have the lowest FVU with (lr {rates}), where `rsae upgrade` has "
            f"{finetune['lr']:g} and {JUMPRELU_LR:g}"
        )
    return (
        f"{table(head, rows)}\nMean over seeds, with the hull of their 95% intervals (bootstrap paired by document). L0 32"
        f"{odd}, "
        f"{millions:.1f} M tokens of fine-tuning in each arm{as_upgrade}; {ran_on(cells)}. Measured so far: {len(cells)} of "
        f"{evidence['grid']} cells; RSAE wins {said}; it loses {lost}. [results/EVIDENCE.md](results/EVIDENCE.md) has each, and "
        "what the settings were chosen on.\n"
    )


def _other_rates(evidence: dict[str, Any]) -> str:
    """The learning rates that are not those of most teachers, in words."""
    by_rate: dict[str, list[str]] = {}
    for name, found in evidence["settings"].items():
        of_control = found["arms"]["control"]["change"].get("gate_lr")
        rate = f"{found['finetune']['lr']:g}" + (
            f" and {of_control:g} for the control's thresholds" if of_control else ""
        )
        by_rate.setdefault(rate, []).append(name)
    of_most = max(by_rate, key=lambda rate: len(by_rate[rate]), default=None)
    return "; ".join(f"{rate}: {', '.join(names)}" for rate, names in by_rate.items() if rate != of_most)


def _dtypes(cells: Sequence[Cell]) -> str:
    """In what dtype the hosts ran."""
    others = [cell["name"] for cell in cells if cell["host_dtype"] != "bfloat16"]
    return "Hosts run in bfloat16" + (f", in float32 for {', '.join(others)}. " if others else ". ")


def _rates_of_teachers(evidence: dict[str, Any]) -> str:
    """The rates that JumpReLU teachers' thresholds learned at, in words."""
    rates = {
        name: found["teacher"]["gate_lr"] for name, found in evidence["settings"].items() if name.endswith(" jumprelu")
    }
    of_most = max(rates.values(), key=list(rates.values()).count, default=None)
    others = "".join(f"; {name} {rate:g}" for name, rate in rates.items() if rate != of_most)
    return "" if of_most is None else f", a JumpReLU's thresholds {of_most:g}{others}"


def _finetune(evidence: dict[str, Any]) -> dict[str, Any]:
    """What is the same in all families of how arms are fine-tuned."""
    return next(iter(evidence["settings"].values()))["finetune"]


def _mean_share(cells: Sequence[Cell], arm: str, metric: str) -> str:
    return f"{sum(cell['arms'][arm][metric] for cell in cells) / len(cells):.2%}"


def _pareto(cells: Sequence[Cell]) -> str:
    """FVU against L0 for each family: teacher, control, RSAE; middle layer, all seeds."""
    cells = [cell for cell in cells if cell["is_middle"] and cell["expansion"] == 8]
    families = sorted({cell["family"] for cell in cells})
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {20 + 340 * len(families)} 300" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{20 + 340 * len(families)}" height="300" fill="white"/>',
    ]
    for panel, family in enumerate(families):
        chosen = [cell for cell in cells if cell["family"] == family]
        points = {
            arm: sorted((cell["arms"][arm]["l0"], cell["arms"][arm]["fvu"]) for cell in chosen) for arm in COLOURS
        }
        xs = [math.log2(x) for arm in points.values() for x, _ in arm]
        ys = [y for arm in points.values() for _, y in arm]
        x_low, x_high, y_low, y_high = min(xs) - 0.3, max(xs) + 0.3, 0.95 * min(ys), 1.05 * max(ys)
        left = 60 + 340 * panel

        def x_of(x: float, left: float = left, low: float = x_low, high: float = x_high) -> float:
            return left + 270 * (math.log2(x) - low) / (high - low)

        def y_of(y: float, low: float = y_low, high: float = y_high) -> float:
            return 250 - 210 * (y - low) / (high - low)

        svg.append(
            f'<text x="{left}" y="22" font-weight="bold">{family}, layer {_layer(chosen[0])}: FVU against L0</text>'
        )
        svg.append(f'<path d="M{left} 40V250H{left + 270}" fill="none" stroke="#999"/>')
        for i in range(5):
            y = y_low + (y_high - y_low) * i / 4
            svg.append(f'<text x="{left - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:.3f}</text>')
        for x in (8, 16, 32, 64, 128):
            if x_low <= math.log2(x) <= x_high:
                svg.append(f'<text x="{x_of(x):.1f}" y="268" text-anchor="middle">{x}</text>')
        for i, (arm, colour) in enumerate(COLOURS.items()):
            svg += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4" fill="{colour}"/>' for x, y in points[arm]]
            svg.append(f'<text x="{left + 90 * i}" y="290" fill="{colour}">{arm}</text>')
    return "\n".join([*svg, "</svg>\n"])
