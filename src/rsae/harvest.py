"""From text to stored activations: run the host to a hook, keep what an SAE learns from, read it back shuffled."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rsae.allocator import keep_pages
from rsae.artefacts import Progress, config_hash, provenance, read_json, sha256_file, write_json, write_safetensors
from rsae.hosts import Host
from rsae.text import PACKING_RULE, Context, Split, documents, pack, text_fingerprint, too_short

EXCLUSION_RULE = (
    "excluded: BOS; the tokenizer's special tokens; sinks, that is tokens whose activation is further from the mean "
    "than sink_ratio times the median such distance; mean and median are those of the first shard's tokens after one "
    "removal of its sinks, and stay frozen"
)


class SinkRule(NamedTuple):
    """Which activations are attention sinks: those further than `ratio * median_norm` from `mean`."""

    mean: Float[Tensor, " d_in"]  # float32
    median_norm: float
    ratio: float

    def is_sink(self, x: Float[Tensor, "*n d_in"]) -> Bool[Tensor, "*n"]:
        """||x - mean|| > ratio * median_norm, in float32, for each activation."""
        return (x.float() - self.mean.to(x.device)).norm(dim=-1) > self.ratio * self.median_norm

    @classmethod
    def fit(cls, x: Float[Tensor, "n d_in"], ratio: float) -> SinkRule:
        """Mean and median norm of `x`, taken again after the sinks of a first round are removed."""
        rule = cls._once(x, ratio)
        return cls._once(x[~rule.is_sink(x)], ratio)

    @classmethod
    def _once(cls, x: Tensor, ratio: float) -> SinkRule:
        mean = x.float().mean(0)
        return cls(mean, (x.float() - mean).norm(dim=-1).median().item(), ratio)


class ActivationStore:
    """A folder of activation shards written by `harvest`, read back within bounded memory.

    Attributes: path, meta (the contents of meta.json), d_in, n_tokens, hook, host (its spec), mean (float32 (d_in,), of
    the first shard without its sinks), sink_rule, fingerprint (names the stored bytes).
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self.d_in: int = meta["d_in"]
        self.hook: str = meta["config"]["hook"]
        self.host: str = meta["config"]["host"]
        self.n_tokens: int = sum(shard["rows"] for shard in meta["shards"])
        self.sink_rule = _sink_rule(meta)
        self.mean = self.sink_rule.mean
        self.fingerprint = config_hash({"shards": [shard["sha256"] for shard in meta["shards"]]})

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> ActivationStore:
        """Open a complete store; with `verify`, compare every shard with its checksum.

        Raises:
            ValueError: no store, an unfinished one, or a damaged shard (named, with the checksums).
        """
        path = Path(path)
        meta = read_json(path / "meta.json")
        if not meta["complete"]:
            raise ValueError(f"{path} holds an unfinished harvest: run the same harvest again, and it continues")
        if verify:
            _verify(path, meta["shards"])
        return cls(path, meta)

    def batches(
        self, batch_size: int, *, seed: int, start: int = 0, buffer_tokens: int = 2**18
    ) -> Iterator[Float[Tensor, "batch_size d_in"]]:
        """Endless shuffled float32 batches; every epoch is a new permutation, fixed by (seed, epoch).

        Blocks of consecutive tokens are dealt at random into groups of at most `buffer_tokens`; a group is held in bf16
        and its tokens are drawn in random order. Batches run on across groups and epochs; `start=k` begins with what
        would be batch k, reading no other group.
        """
        if batch_size < 1 or self.n_tokens < 1:
            raise ValueError(
                f"batch_size must be at least 1 and the store not empty: {batch_size}, {self.n_tokens} tokens"
            )
        epoch, skip = divmod(start * batch_size, self.n_tokens)
        blocks = self._blocks(max(1, min(8192, buffer_tokens // 8)))
        buffer = torch.empty(min(buffer_tokens, self.n_tokens), self.d_in, dtype=torch.bfloat16)
        batch, filled = torch.empty(batch_size, self.d_in), 0
        while True:
            rng = np.random.default_rng([seed, epoch])
            for group in _groups([blocks[i] for i in rng.permutation(len(blocks))], len(buffer)):
                rows = sum(stop - first for _, first, stop in group)
                order = torch.from_numpy(rng.permutation(rows))  # drawn even if skipped: keeps the stream in step
                if skip >= rows:
                    skip -= rows
                    continue
                self._read(group, buffer)
                order, skip = order[skip:], 0
                while len(order):
                    take, order = order[: batch_size - filled], order[batch_size - filled :]
                    batch[filled : filled + len(take)] = buffer[take]
                    filled += len(take)
                    if filled == batch_size:
                        yield batch
                        batch, filled = torch.empty(batch_size, self.d_in), 0
            epoch += 1

    def iterate(self, batch_size: int) -> Iterator[tuple[Float[Tensor, "n d_in"], Int[Tensor, " n"]]]:
        """Once through in stored order, `batch_size` rows at a time: (activations float32, document numbers)."""
        for shard in self.meta["shards"]:
            with safe_open(self.path / shard["file"], "pt") as file:
                activations, owners = file.get_slice("activations"), file.get_slice("documents")
                for first in range(0, shard["rows"], batch_size):
                    rows = slice(first, min(first + batch_size, shard["rows"]))
                    yield activations[rows].float(), owners[rows].long()

    def _blocks(self, size: int) -> list[tuple[str, int, int]]:
        """(file, first row, end row) of runs of at most `size` rows."""
        return [
            (shard["file"], first, min(first + size, shard["rows"]))
            for shard in self.meta["shards"]
            for first in range(0, shard["rows"], size)
        ]

    def _read(self, group: list[tuple[str, int, int]], buffer: Tensor) -> None:
        at = 0
        for name, first, stop in group:
            with safe_open(self.path / name, "pt") as file:
                buffer[at : at + stop - first] = file.get_slice("activations")[first:stop]
            at += stop - first


def harvest(
    host: Host,
    hook: str,
    text: str,
    out: Path,
    *,
    n_tokens: int,
    split: Split = "train",
    context_length: int = 256,
    batch_size: int = 16,
    shard_tokens: int = 65536,
    sink_ratio: float = 3.0,
    progress: Progress | None = None,
) -> ActivationStore:
    """Store `n_tokens` activations of `host` at `hook` over a text (fewer, with a warning, if the text ends before).

    Writes out/meta.json and out/shard-NNNNN.safetensors with `activations` (n, d_in) bfloat16, `tokens` and `documents`
    (n,) int32. Tokens are kept by `EXCLUSION_RULE`; the shares left out are in meta.json. A harvest that was stopped
    continues after its last whole shard and ends with the same bytes; a finished one is verified and returned.

    Args:
        text, split: what `rsae.text.documents` reads.
        batch_size: contexts a forward pass.
        shard_tokens: about how many tokens a shard holds (whole batches of contexts, less what is excluded).

    Raises:
        ValueError: unknown hook or text; text shorter than one context; nan or inf in the activations; `out` holds
            another run or a damaged shard; no space left on the disk.
    """
    out = Path(out)
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, not {n_tokens}")
    config = {
        "host": host.spec,
        "host_fingerprint": host.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "hook": host.hook_point(hook).name,
        "text": text,
        "text_fingerprint": text_fingerprint(text),
        "split": split,
        "n_tokens": n_tokens,
        "context_length": context_length,
        "batch_size": batch_size,
        "shard_tokens": shard_tokens,
        "sink_ratio": sink_ratio,
    }
    meta = _resume(out, config)
    if meta["complete"]:
        return ActivationStore(out, meta)
    done, shards = sum(shard["rows"] for shard in meta["shards"]), meta["shards"]
    # A shard is a fixed number of whole batches, so that where to continue follows from the number of shards.
    shard_batches = max(1, round(shard_tokens / (batch_size * context_length)))
    counts: Counter[str] = Counter()
    contexts = pack(documents(text, split=split), host.tokenizer, context_length, counts=counts)
    batches = _batched(contexts, batch_size)
    keep_pages()
    number = sum(1 for _ in islice(batches, shard_batches * len(shards)))
    rule = _sink_rule(meta) if shards else None
    while done < n_tokens:
        kept, excluded = [], Counter[str]()
        # The first shard is run whole even for a smaller n_tokens: its statistics are the sink rule's.
        for batch in islice(batches, shard_batches):
            rows, left_out = _run(host, hook, batch, number)
            number += 1
            if rule is not None:
                rows, sinks = _drop_sinks(rows, rule)
                left_out["sink"] = sinks
            kept.append(rows)
            excluded.update(left_out)
            collected = sum(len(r["documents"]) for r in kept)
            if progress is not None:
                progress("harvest", min(done + collected, n_tokens), n_tokens)
            if done + collected >= n_tokens + (0 if rule else batch_size * context_length):
                break
        if not kept:
            break
        rows = {name: torch.cat([part[name] for part in kept]) for name in kept[0]}
        if rule is None:
            rule = SinkRule.fit(rows["activations"], sink_ratio)
            meta["sinks"] = {"mean": rule.mean.tolist(), "median_norm": rule.median_norm, "ratio": sink_ratio}
            rows, excluded["sink"] = _drop_sinks(rows, rule)
        rows = {name: tensor[: n_tokens - done] for name, tensor in rows.items()}
        done += len(rows["documents"])
        meta["d_in"] = rows["activations"].shape[1]
        name = f"shard-{len(shards):05d}.safetensors"
        _write(out, name, rows, meta, excluded)
    if not shards:
        raise ValueError(too_short(text, split, context_length))
    if done < n_tokens:
        warnings.warn(f"the {split} split of {text!r} ended after {done} of {n_tokens} tokens", stacklevel=2)
    meta["complete"] = True
    meta["text"] = {key: counts[key] for key in sorted(counts)}
    write_json(out / "meta.json", meta)
    return ActivationStore(out, meta)


def _resume(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The folder's meta.json if it is of the same run and undamaged, else a fresh one for an empty folder."""
    meta = read_json(out / "meta.json") if (out / "meta.json").exists() else None
    if meta and meta.get("shards"):
        if meta.get("config_hash") != config_hash(config):
            old = meta.get("config", {})
            differs = [
                f"{key}: {old.get(key)!r} there, {value!r} asked"
                for key, value in config.items()
                if old.get(key) != value
            ]
            raise ValueError(
                f"{out} holds another run ({'; '.join(differs)}): choose another folder or delete that one"
            )
        _verify(out, meta["shards"])
        return meta
    if not meta and out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise ValueError(f"{out} exists and holds no harvest: choose an empty or a new folder")
    return {
        "schema": 1,
        "complete": False,
        "config": config,
        "config_hash": config_hash(config),
        "packing_rule": PACKING_RULE,
        "exclusion_rule": EXCLUSION_RULE,
        "provenance": provenance(),
        "shards": [],
    }


def _verify(path: Path, shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        file = path / shard["file"]
        found = sha256_file(file) if file.exists() else "no file"
        if found != shard["sha256"]:
            raise ValueError(
                f"shard {file} is corrupt or truncated: expected sha256 {shard['sha256']}, found {found}; "
                f"delete the folder {path} and harvest again"
            )


def _sink_rule(meta: dict[str, Any]) -> SinkRule:
    sinks = meta["sinks"]
    return SinkRule(torch.tensor(sinks["mean"]), sinks["median_norm"], sinks["ratio"])


def _batched(contexts: Iterable[Context], size: int) -> Iterator[list[Context]]:
    stream = iter(contexts)
    while batch := list(islice(stream, size)):
        yield batch


def _run(host: Host, hook: str, batch: list[Context], number: int) -> tuple[dict[str, Tensor], Counter[str]]:
    """Activations, tokens and documents of a batch without BOS and special tokens, and how many of these there were."""
    tokens = torch.from_numpy(np.stack([context.tokens for context in batch]))
    owners = torch.from_numpy(np.stack([context.document_ids for context in batch]))
    x = host.activations(tokens, hook).flatten(0, 1).to("cpu", torch.bfloat16)
    if not torch.isfinite(x).all():
        raise ValueError(
            f"nan or inf in the activations of {host.spec} at {hook}, batch {number}: load the host in float32"
        )
    tokens, owners = tokens.flatten(), owners.flatten()
    bos = owners < 0
    special = torch.isin(tokens, torch.tensor(host.tokenizer.all_special_ids)) & ~bos
    keep = ~(bos | special)
    rows = {"activations": x[keep], "tokens": tokens[keep].int(), "documents": owners[keep].int()}
    return rows, Counter(tokens=len(tokens), bos=int(bos.sum()), special=int(special.sum()))


def _drop_sinks(rows: dict[str, Tensor], rule: SinkRule) -> tuple[dict[str, Tensor], int]:
    keep = torch.cat([~rule.is_sink(part) for part in rows["activations"].split(8192)])
    return {name: tensor[keep] for name, tensor in rows.items()}, int((~keep).sum())


def _write(out: Path, name: str, rows: dict[str, Tensor], meta: dict[str, Any], excluded: Counter[str]) -> None:
    """Write a shard, then meta.json with it: a shard exists once meta.json names it."""
    try:
        if not meta["shards"]:
            write_json(out / "meta.json", meta)  # claims the folder, should the first shard not be finished
        write_safetensors(out / name, rows)
        shard = {
            "file": name,
            "rows": len(rows["documents"]),
            "sha256": sha256_file(out / name),
            "seen": dict(excluded),
        }
        meta["shards"].append(shard)
        total = Counter[str]()
        for each in meta["shards"]:
            total.update(each["seen"])
        meta["excluded"] = {key: total[key] / total["tokens"] for key in ("bos", "special", "sink")}
        write_json(out / "meta.json", meta)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write {out / name} ({error}): make room, run the same command again, and it continues"
        ) from error


def _groups(blocks: list[tuple[str, int, int]], limit: int) -> Iterator[list[tuple[str, int, int]]]:
    """Consecutive blocks together while they hold at most `limit` rows."""
    group: list[tuple[str, int, int]] = []
    rows = 0
    for block in blocks:
        size = block[2] - block[1]
        if group and rows + size > limit:
            yield group
            group, rows = [], 0
        group.append(block)
        rows += size
    yield group
