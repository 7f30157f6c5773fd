"""k-sparse probing: how well a few latents of each arm tell the two classes of the labelled sets of sae-probes.

As sae-probes 0.4.2 does it: the sets, the last token, the end of a long text, classes of equal size, the choice of latents (its
own code). Otherwise than it: a text stands in a set once, since 17% of the rows repeat one (66% in one set) and would be in
training and test both; C is chosen by the log loss of five folds, not by the AUC of 100 texts, which is blind to C at k = 1;
latents are scaled, so that the penalty does not depend on an arm's units; BOS stands wherever the tokenizer has one; several
seeds; and for two cores at most 1000 texts of 128 tokens, not 5000 of 1024.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from rsae.artefacts import Progress, config_hash, provenance, read_json, write_json, write_safetensors
from rsae.cpu import keep_pages
from rsae.evaluate import Autoencoder, LanguageModel, counted, counting_thresholds_of
from rsae.hosts import load_host
from rsae.teachers import load_teacher

ARMS = ("teacher", "control", "rsae")
KS = (1, 2, 5, 16)
SEEDS = 3
"""Splits of each set, at least."""
MAX_TEXTS = 1000
"""Texts of a set that the host reads, half of each class."""
MAX_TOKENS = 128
"""Tokens of a text that the host reads, BOS among them."""
TRAIN_SHARE = 0.7
INVERSE_PENALTIES = [10.0**power for power in range(-3, 3)]
"""Values of C, the inverse strength of the l2 penalty."""
QUICK = (
    "5_hist_fig_ismale", "21_headline_istrump", "50_deon_isvalid", "60_wikidata_occupation_isathlete", "71_social-media",
    "87_glue_cola", "92_glue_sst2", "96_spam_is", "123_world_country_United_Kingdom", "139_news_class_Politics",
    "146_disease_class_cardiovascular diseases", "159_code_Python",
)  # fmt: skip
"""One set a topic: people, headlines, ethics, lives, phrases, grammar, opinions, spam, places, news, medicine, code."""
PROTOCOL = (
    f"The benchmark's binary sets; each text once, none with both labels, at most {MAX_TEXTS // 2} of a class. A text's "
    f"activation is that of its last token, behind BOS if the tokenizer has one; of longer texts the last {MAX_TOKENS} tokens "
    f"count. A split is fixed by set and seed, the same for all arms: classes of equal size, {TRAIN_SHARE:.0%} of each to train. "
    "On training texts alone: latents are divided by the mean of their non-zero absolute values, and the k with the largest "
    "absolute difference of class means chosen; these are scaled to unit variance, and a logistic regression fitted, with the l2 "
    "penalty of the smallest log loss in 5-fold cross-validation. AUC and accuracy are on the other texts. An arm whose latents "
    "are 0 on all texts of a set has AUC 0.5 there, and all_zero names the set."
)
SUMMARY_RULE = (
    "Of an arm: [mean over sets and seeds, standard deviation over seeds of the mean over sets]; of a set: [mean, standard "
    "deviation] over seeds. Differences of AUC are paired by set (mean over seeds): [difference, low, high], the 95% interval of "
    "a bootstrap over sets; a tie where it holds 0, no verdict on one set. Sets from one source count as independent, and the "
    "splits of a set share texts."
)


class LabelledSet(NamedTuple):
    """Distinct texts of a set, and the class of each (0 or 1)."""

    name: str
    texts: list[str]
    labels: Int[np.ndarray, " n"]


def benchmark() -> list[str]:
    """Names of the 113 binary sets, in the package's order. ValueError if the package is missing."""
    return list(_package("utils_data").get_numbered_binary_tags())


def read_set(name: str) -> LabelledSet:
    """A set's texts, each once; those with both labels are left out, and what is beyond MAX_TEXTS / 2 of a class.

    Many rows of the sets repeat a text: a split of rows would have the same text on both of its sides.

    Raises:
        ValueError: the package is missing; the set does not have two classes.
    """
    table = _package("utils_data").read_numbered_dataset_df(name)
    classes = sorted(set(table["target"]))
    if len(classes) != 2:
        raise ValueError(f"set {name} has {len(classes)} classes ({classes[:5]}), expected two")
    labels: dict[str, set[int]] = {}
    for text, target in zip(table["prompt"].astype(str), table["target"], strict=True):
        labels.setdefault(text, set()).add(classes.index(target))
    texts = sorted(labels, key=lambda text: _draw(name, "texts", text))
    zeros, ones = ([text for text in texts if labels[text] == {label}][: MAX_TEXTS // 2] for label in (0, 1))
    return LabelledSet(name, zeros + ones, np.repeat([0, 1], [len(zeros), len(ones)]))


def split(labelled: LabelledSet, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and test texts: as many of class 0 as of class 1, in an order drawn by set, seed and text alone.

    Raises:
        ValueError: a class has fewer than 10 texts.
    """
    order = sorted(range(len(labelled.texts)), key=lambda i: _draw(labelled.name, seed, labelled.texts[i]))
    zeros, ones = ([i for i in order if labelled.labels[i] == label] for label in (0, 1))
    size = min(len(zeros), len(ones))
    if size < 10:
        raise ValueError(
            f"set {labelled.name} has a class of {size} distinct texts, too few to train and test on: 10 at least"
        )
    cut = round(TRAIN_SHARE * size)
    return zeros[:cut] + ones[:cut], zeros[cut:size] + ones[cut:size]


def last_token_activations(
    texts: Sequence[str], host: LanguageModel, hook: str, *, batch_tokens: int = 4096
) -> Float[Tensor, "n d_model"]:
    """The activation at the last token of each text, in the host's dtype, on the CPU.

    Texts of like length run together, padded on the right, where a causal model does not look.

    Raises:
        ValueError: a text without tokens; nan or inf.
    """
    tokenizer = host.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    if [] in encoded:
        raise ValueError(f"the host's tokenizer finds no token in {texts[encoded.index([])]!r}")
    rows = [torch.tensor(bos + ids[len(bos) - MAX_TOKENS :]) for ids in encoded]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    found: dict[int, Tensor] = {}
    while len(found) < len(rows):
        longest = len(rows[order[len(found)]])
        batch = order[len(found) : len(found) + max(1, batch_tokens // longest)]
        x = host.activations(torch.nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True), hook).cpu()
        found |= {i: x[at, len(rows[i]) - 1].clone() for at, i in enumerate(batch)}
    activations = torch.stack([found[i] for i in range(len(rows))])
    if not activations.isfinite().all():
        raise ValueError(f"nan or inf in the host's activations at {hook!r}: load the host in bfloat16 or float32")
    return activations


def probe_arm(
    sae: Autoencoder, x: Float[Tensor, "n d_in"], labelled: LabelledSet, *, seeds: int = SEEDS, eps: float = 0.0
) -> dict[str, Any]:
    """One arm on one set, by PROTOCOL, with splits of seeds 0, 1, ..., seeds - 1. Latents up to `eps` in size are set to 0.

    Returns:
        all_zero: whether every latent is 0 on every text; and by k ("1", "2", ...), a number for each seed: auc, accuracy, C, and
        latents, the indices of those chosen.
    """
    ranking = _package("run_sae_evals")
    with torch.inference_mode():
        latents = counted(sae.encode(x.to(sae.W_dec.device, torch.float32)), eps).cpu()
    result: dict[str, Any] = {"all_zero": not bool(latents.any())}
    result |= {str(k): {"auc": [], "accuracy": [], "C": [], "latents": []} for k in KS}
    for seed in range(seeds):
        train, test = split(labelled, seed)
        y, y_test = labelled.labels[train], labelled.labels[test]
        ranked = ranking.get_sorted_indices(
            latents[train], torch.from_numpy(y), ranking.mean_act_normalization
        ).tolist()
        for k in KS:
            z = latents[:, ranked[:k]].double().numpy()
            for name, value in _regress(z[train], y, z[test], y_test).items():
                result[str(k)][name].append(value)
            result[str(k)]["latents"].append(ranked[:k])
    return result


def _regress(z: np.ndarray, y: np.ndarray, z_test: np.ndarray, y_test: np.ndarray) -> dict[str, float]:
    """AUC and accuracy on the test texts of a logistic regression on chosen latents z (n, k), and its C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(z)
    z, z_test = np.asarray(scaler.transform(z)), np.asarray(scaler.transform(z_test))
    folds = list(StratifiedKFold(5).split(z, y))  # rows come in the order drawn, class by class

    def log_loss(c: float) -> float:  # the folds' AUC would not do: at k = 1 it is the same for every C
        model = LogisticRegression(C=c, max_iter=1000)
        margins = [(2 * y[out] - 1) * model.fit(z[fit], y[fit]).decision_function(z[out]) for fit, out in folds]
        return float(np.logaddexp(0, -np.concatenate(margins)).sum())

    c = min(INVERSE_PENALTIES, key=log_loss)
    scores = LogisticRegression(C=c, max_iter=1000).fit(z, y).decision_function(z_test)
    return {
        "auc": float(roc_auc_score(y_test, scores)),
        "accuracy": float(np.mean((scores > 0) == (y_test == 1))),
        "C": c,
    }


def probe(
    run: str | Path, *, names: Sequence[str] | None = None, seeds: int = SEEDS, progress: Progress | None = None
) -> dict[str, Any]:
    """Probe the arms of a run folder (teacher, control, rsae: those that exist) at the host and hook of its run.json.

    The host reads a set once, for all arms and seeds. Leaves in the folder probing/acts/SET.safetensors (activations),
    probing/SET.json (`probe_arm` of each arm), and at the end probing.json. What is there and fits is not computed again: a killed
    run continues.

    Args:
        run: the run folder; of a demo, that of a family.
        names: sets of `benchmark()`; None for all.
        seeds: splits of each set.
        progress: told the sets done.

    Returns:
        What probing.json holds: the protocol in words, what ran, and `summarise`.

    Raises:
        ValueError: before anything is written: the package is missing; the folder holds no run or no arm; an unknown set, no
            sets, too few seeds; an arm of another width than the host, or with fewer latents than the largest k.
    """
    run = Path(run)
    recorded = read_json(run / "run.json")
    identity = recorded.get("identity", {})
    arms = {arm: load_teacher(run / arm) for arm in ARMS if (run / arm / "cfg.json").exists()}
    if not arms or not {"host", "hook"} <= set(identity):
        raise ValueError(f"{run} holds none of {', '.join(ARMS)} of a run; of a demo, name a family's: runs/demo/topk")
    if seeds < SEEDS:
        raise ValueError(f"seeds must be at least {SEEDS}, for a spread, got {seeds}")
    names = _known(names)
    dtype, hook = recorded.get("host_dtype", "bfloat16"), identity["hook"]
    host = load_host(identity["host"], dtype=dtype, progress=progress)
    host.hook_point(hook)
    for arm, teacher in arms.items():
        if teacher.sae.cfg.d_in != host.d_model or teacher.sae.cfg.d_sae < max(KS):
            raise ValueError(
                f"arm {arm!r} has d_in {teacher.sae.cfg.d_in} and d_sae {teacher.sae.cfg.d_sae}; expected the host's d_model "
                f"{host.d_model}, and {max(KS)} latents at least: is it of another model?"
            )
    keep_pages()
    eps = counting_thresholds_of(run, {arm: teacher.sae for arm, teacher in arms.items()})
    config: dict[str, Any] = {"protocol": PROTOCOL, "seeds": seeds}
    config |= {"arms": {arm: teacher.fingerprint for arm, teacher in arms.items()}} | ({"eps": eps} if eps else {})
    results = {}
    for done, name in enumerate(names):
        if progress is not None:
            progress("probe", done, len(names))
        labelled, file = read_set(name), run / "probing" / f"{name}.json"
        read = {"host": host.fingerprint, "hook": hook, "max_tokens": MAX_TOKENS, "texts": labelled.texts}
        key = config_hash({**config, **read, "labels": labelled.labels.tolist()})
        if not file.exists() or read_json(file).get("key") != key:
            x = _stored(run / "probing" / "acts" / f"{name}.safetensors", config_hash(read), labelled.texts, host, hook)
            train, test = split(labelled, 0)
            found = {
                arm: probe_arm(teacher.sae, x, labelled, seeds=seeds, eps=eps.get(arm, 0.0))
                for arm, teacher in arms.items()
            }
            write_json(file, {"key": key, "n_train": len(train), "n_test": len(test), "arms": found})
        results[name] = read_json(file)
    if progress is not None:
        progress("probe", len(names), len(names))
    versions = {package: version(package) for package in ("sae-probes", "scikit-learn")}
    about = {"schema": 1, "host": identity["host"], "hook": hook, **config, "summary_rule": SUMMARY_RULE}
    summary = about | {"versions": versions, "provenance": provenance()} | summarise(results)
    write_json(run / "probing.json", summary)
    return summary


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The arms over sets, by SUMMARY_RULE; results: for each set n_train, n_test, and arms: arm -> `probe_arm`.

    Returns:
        sets: name -> n_train, n_test, and arm -> k -> auc, accuracy: [mean, sd]; arms: arm -> k -> auc, accuracy: [mean, sd];
        all_zero: arm -> sets; rsae_minus_control, rsae_minus_teacher (if both arms are there): k -> auc: [difference, low, high],
        verdict.
    """
    arms, ks = list(next(iter(results.values()))["arms"]), [str(k) for k in KS]

    def scores(arm: str, k: str, metric: str) -> Float[np.ndarray, "sets seeds"]:
        return np.array([found["arms"][arm][k][metric] for found in results.values()])

    def spreads(arm: str, rows: slice) -> dict[str, Any]:
        """k -> auc, accuracy: [mean, standard deviation over seeds] of the mean over some sets."""
        means = {k: {metric: scores(arm, k, metric)[rows].mean(0) for metric in ("auc", "accuracy")} for k in ks}
        return {k: {metric: [v.mean().item(), v.std(ddof=1).item()] for metric, v in means[k].items()} for k in ks}

    summary: dict[str, Any] = {
        "sets": {
            name: {part: found[part] for part in ("n_train", "n_test")}
            | {arm: spreads(arm, slice(row, row + 1)) for arm in arms}
            for row, (name, found) in enumerate(results.items())
        },
        "arms": {arm: spreads(arm, slice(None)) for arm in arms},
        "all_zero": {arm: [name for name, found in results.items() if found["arms"][arm]["all_zero"]] for arm in arms},
    }
    for other in ("control", "teacher"):
        if {"rsae", other} <= set(arms):
            by_k = {k: (scores("rsae", k, "auc") - scores(other, k, "auc")).mean(1) for k in ks}
            summary[f"rsae_minus_{other}"] = {k: _paired(by_set) for k, by_set in by_k.items()}
    return summary


def _paired(by_set: Float[np.ndarray, " sets"], samples: int = 10_000) -> dict[str, Any]:
    """The mean of a difference over sets, its bootstrap interval, and the verdict."""
    if len(by_set) < 2:
        return {"auc": [by_set.mean().item(), None, None], "verdict": None}
    draws = np.random.default_rng(0).integers(len(by_set), size=(samples, len(by_set)))
    low, high = np.quantile(by_set[draws].mean(1), [0.025, 0.975]).tolist()
    verdict = "win" if low > 0 else "loss" if high < 0 else "tie"
    return {"auc": [by_set.mean().item(), low, high], "verdict": verdict}


def _known(names: Sequence[str] | None) -> list[str]:
    """The sets to probe, each once. ValueError: one is unknown, or there are none."""
    known = benchmark()
    chosen = list(dict.fromkeys(known if names is None else names))
    if not chosen:
        raise ValueError("no sets were named: None stands for all of them")
    for name in chosen:
        if name not in known:
            near = ", ".join(get_close_matches(name, known, n=3, cutoff=0.0))
            raise ValueError(
                f"set {name!r} is none of the {len(known)} binary sets of sae-probes; the nearest are {near}"
            )
    return chosen


def _stored(file: Path, key: str, texts: Sequence[str], host: LanguageModel, hook: str) -> Float[Tensor, "n d_model"]:
    """The texts' activations from the file, if its key is this one; or from the host, and to the file."""
    if file.exists():
        with safe_open(file, "pt") as tensors:
            if (tensors.metadata() or {}).get("key") == key:
                return tensors.get_tensor("x")
    x = last_token_activations(texts, host, hook)
    write_safetensors(file, {"x": x}, {"key": key})
    return x


def _package(module: str) -> Any:
    """A module of sae-probes, whose import changes warning filters: they are put back."""
    try:
        with warnings.catch_warnings():
            return importlib.import_module(f"sae_probes.{module}")
    except ImportError as error:
        raise ValueError(
            f'probing needs sae-probes ({error}); install it with: pip install "sae-probes>=0.4.2"'
        ) from error


def _draw(name: str, seed: int | str, text: str) -> bytes:
    """A text's place in the order that is drawn for a set and a seed."""
    return hashlib.sha256(f"{name}\0{seed}\0{text}".encode("utf-8", "replace")).digest()
