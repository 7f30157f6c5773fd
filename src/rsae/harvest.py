"""From text to stored activations: run the host to a hook, keep what an SAE learns from, read it back shuffled."""

from __future__ import annotations

import errno
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count, cycle, islice
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rsae.artefacts import Progress, config_hash, provenance, read_json, sha256_file, write_json, write_safetensors
from rsae.cpu import keep_pages
from rsae.hosts import Host
from rsae.ranks import Ranks
from rsae.text import PACKING_RULE, Context, Split, documents, pack, text_fingerprint, too_short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"mean": self.mean.tolist(), "median_norm": self.median_norm, "ratio": self.ratio}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SinkRule:
        """The inverse of `to_dict`."""
        return cls(torch.tensor(values["mean"]), values["median_norm"], values["ratio"])


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
        self.sink_rule = SinkRule.from_dict(meta["sinks"])
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

    def is_of(self, host: str, fingerprint: str, hook: str) -> bool:
        """Whether the activations are of this host, by its name or by its fingerprint (which its dtype changes), at this hook."""
        config = self.meta["config"]
        return self.hook == hook and (self.host == host or config["host_fingerprint"] == fingerprint)

    def check_same_source(self, other: ActivationStore) -> None:
        """Refuse (ValueError) a store of another model, hook or dtype."""
        mine, theirs = self.meta["config"]["dtype"], other.meta["config"]["dtype"]
        if mine != theirs:
            raise ValueError(
                f"{self.path} was harvested from a host in {mine}, {other.path} in {theirs}: harvest both in one dtype"
            )
        if not self.is_of(other.host, other.meta["config"]["host_fingerprint"], other.hook):
            raise ValueError(
                f"{self.path} holds activations of {self.host} at {self.hook}, {other.path} of {other.host} at {other.hook}: give "
                "two of the same model and hook"
            )

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        buffer_tokens: int = 2**18,
    ) -> Iterator[Float[Tensor, "batch_size/world d_in"]]:
        """Endless shuffled float32 batches; every epoch is a new permutation, fixed by (seed, epoch).

        Blocks of consecutive tokens are dealt at random into groups of at most `buffer_tokens`, whose tokens are drawn in
        random order. Batches run on across groups and epochs; `start=k` begins with what would be batch k, reading no
        other group. Rank r of `world` gets the r-th of `world` equal parts of every batch, and holds no other rows.

        While a group is drawn from, a thread reads the next: memory is two groups in bf16, 4 buffer_tokens d_in / world
        bytes. The thread ends when the iterator is closed or dropped.
        """
        if batch_size < 1 or self.n_tokens < 1:
            raise ValueError(
                f"batch_size must be at least 1 and the store not empty: {batch_size}, {self.n_tokens} tokens"
            )
        share = share_of(batch_size, rank, world)

        def empty() -> Tensor:
            # Pinned, a batch goes to a GPU while that is at work
            return torch.empty(share, self.d_in, dtype=torch.float32, pin_memory=torch.cuda.is_available())

        batch, filled, closed = empty(), 0, Event()
        groups = self._drawn(batch_size, seed, start, rank, share, buffer_tokens, closed)
        try:
            for rows in ahead(groups):
                while len(rows):
                    take, rows = rows[: share - filled], rows[share - filled :]
                    batch[filled : filled + len(take)] = take
                    filled += len(take)
                    if filled == share:
                        yield batch
                        batch, filled = empty(), 0
        finally:
            closed.set()

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

    def _drawn(
        self, batch_size: int, seed: int, start: int, rank: int, share: int, buffer_tokens: int, closed: Event
    ) -> Iterator[Float[Tensor, "n d_in"]]:
        """The rows of each group that are this rank's, bf16, as they are drawn; each is overwritten by the next but one."""
        epoch, skip = divmod(start * batch_size, self.n_tokens)
        blocks = self._blocks(max(1, min(8192, buffer_tokens // 8)))
        limit = min(buffer_tokens, self.n_tokens)
        held = min(limit, (limit // batch_size + 1) * share)
        # NumPy gathers rows in this one thread; torch would set several against the step that is being computed.
        buffers = cycle([np.empty((held, self.d_in), np.int16) for _ in range(2)])
        drawn = 0
        while True:
            rng = np.random.default_rng([seed, epoch])
            for group in _groups([blocks[i] for i in rng.permutation(len(blocks))], limit):
                rows = sum(stop - first for _, first, stop in group)
                order = rng.permutation(rows)  # drawn even if skipped: keeps the stream in step
                if skip >= rows:
                    skip -= rows
                    continue
                order, skip = order[skip:], 0
                mine = order[(drawn + np.arange(len(order))) % batch_size // share == rank]
                drawn += len(order)
                buffer = next(buffers)[: len(mine)]
                self._read(group, mine, buffer, closed)
                yield torch.from_numpy(buffer).view(torch.bfloat16)
            epoch += 1

    def _read(self, group: list[tuple[str, int, int]], rows: np.ndarray, buffer: np.ndarray, closed: Event) -> None:
        """Fill `buffer` with these rows of a group, as bits; `closed` stops it."""
        at = 0
        for name, first, stop in group:
            if closed.is_set():
                return
            here = np.flatnonzero((rows >= at) & (rows < at + stop - first))
            with safe_open(self.path / name, "pt") as file:
                block = file.get_slice("activations")[first:stop].view(torch.int16).numpy()
            buffer[here] = block[rows[here] - at]
            at += stop - first


def harvest(host: Host, hook: str, text: str, out: Path, **settings: Any) -> ActivationStore:
    """Store the activations of `host` at one hook; `settings` (n_tokens at least) and errors are those of `harvest_all`."""
    return harvest_all(host, {hook: out}, text, **settings)[hook]


def harvest_all(
    host: Host,
    hooks: Mapping[str, Path],
    text: str,
    *,
    n_tokens: int,
    split: Split = "train",
    context_length: int = 256,
    batch_size: int = 16,
    shard_tokens: int = 65536,
    sink_ratio: float = 3.0,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> dict[str, ActivationStore]:
    """Store `n_tokens` activations of `host` at each hook over a text (fewer, with a warning, if the text ends before).

    One forward pass serves all hooks. Each hook's folder gets meta.json and shard-NNNNN.safetensors with `activations`
    (n, d_in) bfloat16, `tokens` and `documents` (n,) int32, the same bytes as if it were harvested alone. Tokens are kept
    by `EXCLUSION_RULE`; the shares left out are in meta.json. A harvest that was stopped continues after the last whole
    shard of each folder and ends with the same bytes; a finished one is verified and returned.

    In several processes (`rsae.ranks`) all ranks call this, on a file system that they share. Each runs every world-th shard,
    and shards count once each rank has written one. Every rank reads and tokenises the text. The bytes are those of one process
    that computes with as many threads.

    Args:
        hooks: hook -> folder.
        text, split: what `rsae.text.documents` reads.
        batch_size: contexts a forward pass.
        shard_tokens: about how many tokens a shard holds (whole batches of contexts, less what is excluded).
        ranks: who takes part; None: every rank of the run. `Ranks()` is this process alone, whatever others do.

    Returns: hook -> its store.

    Raises:
        ValueError: unknown hook or text; text shorter than one context; nan or inf in the activations; a folder holds
            another run or a damaged shard, or is named twice; no space left on the disk; more ranks than shards.
        ConnectionError: another rank has died.
    """
    ranks = Ranks.current() if ranks is None else ranks
    folders = {hook: Path(out) for hook, out in hooks.items()}
    if not folders or len({folder.resolve() for folder in folders.values()}) < len(folders):
        raise ValueError(f"each hook needs a folder of its own, and there must be one at least: {folders}")
    if n_tokens < 1 or context_length < 1:
        raise ValueError(f"n_tokens and context_length must be at least 1, not {n_tokens} and {context_length}")
    check_ranks(ranks, n_tokens, context_length, batch_size, shard_tokens)
    shard_batches, _ = division(n_tokens, context_length, batch_size, shard_tokens)
    config = {
        "host": host.spec,
        "host_fingerprint": host.fingerprint,
        "dtype": host.dtype_name,
        "hook": "",
        "text": text,
        "text_fingerprint": text_fingerprint(text),
        "split": split,
        "n_tokens": n_tokens,
        "context_length": context_length,
        "batch_size": batch_size,
        "shard_tokens": shard_tokens,
        "sink_ratio": sink_ratio,
    }
    configs = {hook: config | {"hook": host.hook_point(hook).name} for hook in folders}
    stores = {hook: _Filling(folder, configs[hook], ranks) for hook, folder in folders.items()}
    found = {hook: [str(store.path), store.meta["config_hash"], store.first] for hook, store in stores.items()}
    ranks.agree("folders, settings or stored shards", config_hash(found))
    todo = [store for store in stores.values() if not store.meta["complete"]]
    if todo:
        keep_pages()
        batches = text_batches(text, split, host.tokenizer, context_length, batch_size)
        with closing(ahead(batches, depth=8)) as batches:
            _fill(host, todo, batches, shard_batches, ranks, progress)
        if not all(store.done for store in todo):
            raise ValueError(too_short(text, split, context_length))
        for store in todo:
            if store.done < n_tokens and ranks.is_main:
                message = f"the {split} split of {text!r} ended after {store.done} of {n_tokens} tokens"
                warnings.warn(message, stacklevel=2)
    return {hook: ActivationStore(store.path, store.meta) for hook, store in stores.items()}


def division(
    n_tokens: int, context_length: int = 256, batch_size: int = 16, shard_tokens: int = 65536
) -> tuple[int, int]:
    """How many batches of contexts a shard is, and how many shards a harvest: the least, since tokens are left out.

    A shard is a fixed number of whole batches, so that where to continue follows from the number of shards.
    """
    batches = max(1, round(shard_tokens / (batch_size * context_length)))
    return batches, -(-n_tokens // (batches * batch_size * context_length))


def check_ranks(
    ranks: Ranks, n_tokens: int, context_length: int = 256, batch_size: int = 16, shard_tokens: int = 65536
) -> None:
    """Refuse (ValueError) more ranks than a harvest has shards."""
    shards = division(n_tokens, context_length, batch_size, shard_tokens)[1]
    if ranks.world > shards:
        raise ValueError(
            f"{n_tokens} tokens fill {shards} of the shards of {shard_tokens}, and there are {ranks.world} ranks: start fewer, or "
            "harvest more tokens"
        )


class Batch(NamedTuple):
    """What a forward pass, or all those of a shard, gives a store."""

    rows: dict[str, Tensor]
    seen: Counter[str]
    """Tokens, and by kind those left out."""
    read: dict[str, int]
    """How much of the text was read by then."""


class _Filling:
    """A store while it is filled. Every rank knows its meta.json, and holds the batches of the shard that it runs itself.

    Attributes: first (shards that there were at the start), done (rows of the shards before those at work).
    """

    def __init__(self, path: Path, config: dict[str, Any], ranks: Ranks) -> None:
        self.path, self.config = path, config
        self.hook: str = config["hook"]
        self.n_tokens: int = config["n_tokens"]
        self.meta = _resume(path, config, ranks)
        self.first = len(self.meta["shards"])
        self.done: int = sum(shard["rows"] for shard in self.meta["shards"])
        self.rule = SinkRule.from_dict(self.meta["sinks"]) if self.first else None
        self.batches: list[Batch] = []

    def add(self, batch: Batch) -> None:
        """Append to the shard at work."""
        self.batches.append(batch if self.rule is None else drop_sinks(batch, self.rule))

    @property
    def rows(self) -> int:
        """Of the shard at work."""
        return sum(len(batch.rows["documents"]) for batch in self.batches)

    @property
    def full(self) -> bool:
        """Whether the shard at work needs no more batches. Before there is a sink rule, a batch more makes up for sinks."""
        spare = 0 if self.rule is not None else self.config["batch_size"] * self.config["context_length"]
        return self.done + self.rows >= self.n_tokens + spare

    def fit(self) -> dict[str, Any] | None:
        """Claim the folder, and fit the sink rule on the shard at work; None if that is empty."""
        if not self.rows:
            return None
        self.save()
        ratio = self.config["sink_ratio"]
        return SinkRule.fit(torch.cat([batch.rows["activations"] for batch in self.batches]), ratio).to_dict()

    def set_rule(self, sinks: dict[str, Any]) -> None:
        """Take over what `fit` found, on this rank or another."""
        self.meta |= {"sinks": sinks, "d_in": len(sinks["mean"])}
        self.rule = rule = SinkRule.from_dict(sinks)
        self.batches = [drop_sinks(batch, rule) for batch in self.batches]

    def take(self, before: int) -> Batch | None:
        """The shard at work, up to `n_tokens` if `before` rows come before it; None if nothing is left of it."""
        batches, self.batches = self.batches, []
        used: list[Batch] = []
        end = before
        for batch in batches:
            if end < self.n_tokens:
                used.append(batch)
                end += len(batch.rows["documents"])
        if not used:
            return None
        seen = Counter[str]()
        for batch in used:
            seen.update(batch.seen)
        rows = {name: torch.cat([batch.rows[name] for batch in used]) for name in used[0].rows}
        return Batch({name: x[: self.n_tokens - before] for name, x in rows.items()}, seen, used[-1].read)

    def write(self, number: int, shard: Batch) -> dict[str, Any]:
        """Write a shard; its entry in meta.json."""
        name = f"shard-{number:05d}.safetensors"
        with _disk_may_be_full(self.path / name):
            write_safetensors(self.path / name, shard.rows)
            digest = sha256_file(self.path / name)
        return {"file": name, "rows": len(shard.rows["documents"]), "sha256": digest, "seen": dict(shard.seen)}

    def extend(self, shards: list[dict[str, Any]]) -> None:
        """Note shards that are written."""
        self.meta["shards"] += shards
        total = Counter[str]()
        for shard in self.meta["shards"]:
            total.update(shard["seen"])
        self.meta["excluded"] = {key: total[key] / total["tokens"] for key in ("bos", "special", "sink")}

    def complete(self, read: dict[str, int]) -> None:
        """Note that nothing will follow."""
        self.meta |= {"complete": True, "text": dict(sorted(read.items()))}

    def save(self) -> None:
        """Write meta.json: a shard exists once that names it."""
        with _disk_may_be_full(self.path / "meta.json"):
            write_json(self.path / "meta.json", self.meta)


def _fill(
    host: Host,
    stores: list[_Filling],
    batches: Iterator[Numbered],
    shard_batches: int,
    ranks: Ranks,
    progress: Progress | None,
) -> None:
    """Run shards, one a rank at a time, until every store has its tokens or the text ends. A thread writes the last ones."""
    writing, apart = None, ranks.apart()
    with ThreadPoolExecutor(1) as writer:
        for first in count(min(store.first for store in stores), ranks.world):
            shard = first + ranks.rank
            wanting = [store for store in stores if store.first <= shard]
            numbers = range(shard * shard_batches, (shard + 1) * shard_batches)
            left, read = _run_shard(host, wanting, batches, numbers, ranks, progress)
            if any(store.rule is None for store in stores):
                _share_rules(stores, ranks)
                if left and read is None:  # what was enough without the rule may not be with it
                    _, read = _run_shard(host, wanting, batches, left, ranks, progress)
            everyone = ranks.gather(({store.hook: store.rows for store in wanting}, read))
            read = next((read for _, read in everyone if read is not None), None)
            shards = []
            for store in stores:
                rows = [held.get(store.hook, 0) for held, _ in everyone]
                shards.append(store.take(store.done + sum(rows[: ranks.rank])))
                store.done = min(store.done + sum(rows), store.n_tokens)
            if not all(store.done for store in stores):
                return  # the text is too short for one context
            if progress is not None:
                progress("harvest", min(store.done for store in stores), stores[0].n_tokens)
            if writing is not None:
                writing.result()
            writing = writer.submit(_write, stores, shards, shard, read, apart)
            stores = [store for store in stores if store.done < store.n_tokens]
            if read is not None or not stores:
                break
        assert writing is not None
        writing.result()
    ranks.barrier()  # every meta.json is there before any rank goes on


def _run_shard(
    host: Host,
    stores: list[_Filling],
    batches: Iterator[Numbered],
    numbers: range,
    ranks: Ranks,
    progress: Progress | None,
) -> tuple[range, dict[str, int] | None]:
    """Run the batches of these numbers, or as many as the stores need.

    Returns: the numbers that are left, and how much text there was if it has ended.
    """
    if all(store.full for store in stores):
        return numbers, None
    for number, contexts, read in batches:
        if not contexts:
            return numbers, read
        if number < numbers.start:
            continue
        for store, batch in zip(
            stores, run_batch(host, [store.hook for store in stores], contexts, number), strict=True
        ):
            store.add(batch._replace(read=read))
        if progress is not None:
            n_tokens = stores[0].n_tokens
            done = min(store.done + ranks.world * store.rows for store in stores)  # as if all ranks were as far
            progress("harvest", min(done, n_tokens - 1), n_tokens)
        if number + 1 == numbers.stop or all(store.full for store in stores):
            return range(number + 1, numbers.stop), None
    raise AssertionError("batches end with one that is empty")


def _share_rules(stores: list[_Filling], ranks: Ranks) -> None:
    """The sink rules that are not known yet, from the first shard, which rank 0 has."""
    stores = [store for store in stores if store.rule is None]
    found = ranks.broadcast([store.fit() if ranks.is_main else None for store in stores])
    for store, sinks in zip(stores, found, strict=True):
        if sinks is not None:
            store.set_rule(sinks)


def _write(
    stores: list[_Filling], shards: list[Batch | None], number: int, read: dict[str, int] | None, ranks: Ranks
) -> None:
    """Write this rank's shard of each store and, when every rank has, its meta.json; `read` if the text has ended."""
    mine = [
        None if shard is None else (store.write(number, shard), shard.read)
        for store, shard in zip(stores, shards, strict=True)
    ]
    for store, *found in zip(stores, *ranks.gather(mine), strict=True):
        written = [each for each in found if each is not None]
        store.extend([entry for entry, _ in written])
        unseen = [entry["file"] for entry, _ in written if not (store.path / entry["file"]).exists()]
        if missing := [file for each in ranks.gather(unseen) for file in each]:
            raise ValueError(
                f"{store.path} is not one folder to all ranks: {missing[0]} was written by one and is not there for another; "
                "choose a folder on a file system that they share"
            )
        if sum(shard["rows"] for shard in store.meta["shards"]) >= store.n_tokens:
            store.complete(written[-1][1])
        elif read is not None:
            store.complete(read)
        if ranks.is_main:
            store.save()


def _resume(out: Path, config: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
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
        _verify(out, meta["shards"][ranks.rank :: ranks.world])
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


Numbered = tuple[int, list[Context], dict[str, int]]


def text_batches(
    text: str, split: Split, tokenizer: PreTrainedTokenizerBase, context_length: int, size: int
) -> Iterator[Numbered]:
    """Numbered batches of contexts, each with how much of the text is read; an empty one ends them."""
    counts: Counter[str] = Counter()
    contexts = pack(documents(text, split=split), tokenizer, context_length, counts=counts)
    for number in count():
        batch = list(islice(contexts, size))
        yield number, batch, dict(counts)
        if not batch:
            return


def run_batch(host: Host, hooks: list[str], contexts: list[Context], number: int) -> list[Batch]:
    """By hook, the activations of a batch with tokens and documents, all without BOS and special tokens."""
    tokens = torch.from_numpy(np.stack([context.tokens for context in contexts]))
    owners = torch.from_numpy(np.stack([context.document_ids for context in contexts])).flatten()
    found = host.activations_at(tokens, hooks)
    tokens, bos = tokens.flatten(), owners < 0
    special = torch.isin(tokens, torch.tensor(host.tokenizer.all_special_ids)) & ~bos
    keep = ~(bos | special)
    seen = Counter(tokens=len(tokens), bos=int(bos.sum()), special=int(special.sum()))
    batches = []
    for hook in hooks:
        x = found.pop(hook).flatten(0, 1).to("cpu", torch.bfloat16)
        if not torch.isfinite(x).all():
            raise ValueError(
                f"nan or inf in the activations of {host.spec} ({host.dtype}) at {hook}, batch {number}: damaged weights? From "
                "Python: does load_host(..., dtype=torch.float32) give numbers?"
            )
        rows = {"activations": x[keep], "tokens": tokens[keep].int(), "documents": owners[keep].int()}
        batches.append(Batch(rows, seen, {}))
    return batches


def drop_sinks(batch: Batch, rule: SinkRule) -> Batch:
    keep = ~rule.is_sink(batch.rows["activations"])
    rows = {name: tensor[keep] for name, tensor in batch.rows.items()}
    return batch._replace(rows=rows, seen=Counter({**batch.seen, "sink": int((~keep).sum())}))


@contextmanager
def _disk_may_be_full(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        is_denied = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS
        todo = (
            "choose a folder that can be written"
            if is_denied
            else "make room, run the same command again, and it continues"
        )
        raise ValueError(f"cannot write {path} ({error}): {todo}") from error


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


def share_of(batch_size: int, rank: int, world: int) -> int:
    """Rows of each rank in a batch of all ranks together (ValueError if they do not divide it)."""
    if not 0 <= rank < world or batch_size % world:
        raise ValueError(
            f"batch_size is that of all ranks together, a multiple of their number, and ranks count from 0: batch_size "
            f"{batch_size}, rank {rank} of {world}"
        )
    return batch_size // world


T = TypeVar("T")


def ahead(items: Iterator[T], depth: int = 1) -> Generator[T]:
    """The same items, up to `depth` of them made in a thread before they are asked for; errors come in their place."""
    with ThreadPoolExecutor(1) as maker:
        made = deque(maker.submit(next, items, None) for _ in range(depth))
        try:
            while (item := made.popleft().result()) is not None:
                made.append(maker.submit(next, items, None))
                yield item
        finally:
            maker.shutdown(cancel_futures=True)
