"""What harvesting costs beside the forward pass that it cannot do without, and what reading back costs beside a training step.

    python -m benchmarks.harvest [--json]

SmolLM2 135M and its text come from packages. The bare forward pass is `Host.activations` on contexts that are packed already, in
the same batches and dtype; harvesting adds text, tokenising, exclusions, shards on disk and their checksums. Measurements take
turns, and medians are compared. Reading is timed on a store of 262,144 rows in four groups, beside matrix products that take 60 ms,
as a fine-tuning step does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from benchmarks.timing import machine

from rsae.artefacts import sha256_file, write_json, write_safetensors
from rsae.cpu import keep_pages, prefers_bfloat16
from rsae.harvest import ActivationStore, harvest_all
from rsae.hosts import load_host
from rsae.text import documents, pack

HOST, TEXT = "package:smollm2-135m", "package:sae-probes"
DEEPEST = "blocks.14.hook_resid_post"
HOOKS = ("blocks.4.hook_resid_post", "blocks.9.hook_resid_post", DEEPEST)
PASSES, BATCH_CONTEXTS, CONTEXT = 4, 16, 256
N_TOKENS = int(
    0.96 * PASSES * BATCH_CONTEXTS * CONTEXT
)  # what is left of the passes without BOS and sinks, or a little less
ROWS, STEPS, BATCH, D_IN, D_SAE, STEP_S = 4 * 65536, 60, 2048, 640, 5120, 0.06


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def harvesting(folder: Path, rounds: int = 3) -> dict[str, float]:
    """Median seconds of the bare forward pass, of one hook and of three, over the same tokens."""
    host = load_host(HOST)
    text = folder / "text.jsonl"
    lines = (json.dumps({"text": document.text}) + "\n" for document in documents(TEXT, split="evaluation"))
    text.write_text("".join(islice(lines, 600)))
    contexts = islice(pack(documents(str(text)), host.tokenizer, CONTEXT), PASSES * BATCH_CONTEXTS)
    batches = torch.stack([torch.from_numpy(context.tokens) for context in contexts]).split(BATCH_CONTEXTS)
    assert len(batches) == PASSES

    def forward() -> None:
        for tokens in batches:
            host.activations(tokens, DEEPEST)

    def store(hooks: tuple[str, ...], name: str) -> None:
        sizes = {"n_tokens": N_TOKENS, "context_length": CONTEXT, "batch_size": BATCH_CONTEXTS}
        # a shard for every two passes, so that writing and running have something to overlap
        shards = {"shard_tokens": 2 * BATCH_CONTEXTS * CONTEXT}
        stores = harvest_all(host, {hook: folder / name / hook for hook in hooks}, str(text), **sizes, **shards)
        for each in stores.values():  # as many tokens went through the host as in the bare pass
            assert sum(shard["seen"]["tokens"] for shard in each.meta["shards"]) == PASSES * BATCH_CONTEXTS * CONTEXT

    forward()
    times: dict[str, list[float]] = {"forward": [], "one hook": [], "three hooks": []}
    for i in range(rounds):
        times["forward"].append(seconds(forward))
        times["one hook"].append(seconds(lambda: store((DEEPEST,), f"one-{i}")))  # noqa: B023
        times["three hooks"].append(seconds(lambda: store(HOOKS, f"three-{i}")))  # noqa: B023
    return {name: median(values) for name, values in times.items()}


def reading(folder: Path) -> dict[str, float]:
    """Of training steps on a store in four groups: the share that is spent on waiting for batches, and the steps' own slowing."""
    shards = []
    for i in range(4):
        name, ids = f"shard-{i:05d}.safetensors", torch.zeros(ROWS // 4, dtype=torch.int32)
        x = torch.randn(ROWS // 4, D_IN).bfloat16()
        write_safetensors(folder / name, {"activations": x, "tokens": ids, "documents": ids.clone()})
        shards.append({"file": name, "rows": len(x), "sha256": sha256_file(folder / name), "seen": {}})
    sinks = {"mean": [0.0] * D_IN, "median_norm": 1.0, "ratio": 3.0}
    config = {"hook": DEEPEST, "host": HOST}
    write_json(
        folder / "meta.json", {"complete": True, "d_in": D_IN, "config": config, "sinks": sinks, "shards": shards}
    )
    dtype = torch.bfloat16 if prefers_bfloat16() else torch.float32  # a step's products, as long as one takes
    weights, x = torch.randn(D_SAE, D_IN, dtype=dtype), torch.randn(BATCH, D_IN, dtype=dtype)

    def product() -> None:
        torch.nn.functional.linear(x, weights)

    products = max(1, round(STEP_S / median(seconds(product) for _ in range(20))))

    def step() -> None:
        for _ in range(products):
            product()

    alone = median(seconds(step) for _ in range(20))
    waited, worked = 0.0, []
    batches = ActivationStore.open(folder).batches(BATCH, seed=0, buffer_tokens=ROWS // 4)
    next(batches)  # the first group has nothing to hide behind
    for _ in range(STEPS):
        waited += seconds(lambda: next(batches))
        worked.append(seconds(step))
    batches.close()
    return {"reading_vs_step": waited / (waited + sum(worked)), "step_beside_reading": median(worked) / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    keep_pages()
    with tempfile.TemporaryDirectory() as folder:
        times = harvesting(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        read = reading(Path(folder))
    tokens = PASSES * BATCH_CONTEXTS * CONTEXT
    result = {
        "vs_bare_forward": round(times["one hook"] / times["forward"], 3),
        "vs_one_hook": round(times["three hooks"] / times["one hook"], 3),
        **{name: round(value, 4) for name, value in read.items()},
        "tokens_per_s": {name: round(tokens / value) for name, value in times.items()},
        "machine": machine(),
    }
    if as_json:
        print(json.dumps(result))
        return
    print(f"{tokens} tokens of {TEXT} through {HOST} to {DEEPEST}; {result['machine']}")
    for name, value in times.items():
        print(f"  {name:<14}{value:>8.2f} s  {value / times['forward']:>6.3f} x the forward pass")
    print(f"  waiting for batches: {read['reading_vs_step']:.2%} of a fine-tuning step on {BATCH} x {D_IN}")
    print(f"  the step while a group is read: {read['step_beside_reading']:.3f} x the step alone")


if __name__ == "__main__":
    main()
