from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from launch import torchrun
from safetensors.torch import load_file
from tiny_host import save_tiny

import rsae.harvest
from rsae.harvest import ActivationStore, SinkRule, harvest, harvest_all
from rsae.hosts import Host, load_host
from rsae.text import documents, pack

HOOK = "blocks.1.hook_resid_post"
SIZES = {"context_length": 16, "batch_size": 2, "shard_tokens": 128}  # 4 batches, 120 tokens a shard


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    return load_host(str(save_tiny(tmp_path_factory.mktemp("host"))), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "t.jsonl"
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(0, 58, (int(n),), generator=generator) for n in torch.randint(3, 20, (300,), generator=generator)
    ]
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in row) + " oov"}) + "\n" for row in rows))
    return str(path)


def make(host: Host, text: str, out: Path, n_tokens: int = 500, **more) -> ActivationStore:
    return harvest(host, HOOK, text, out, n_tokens=n_tokens, **{**SIZES, **more})


def folder_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("shard-*"))}


def meta_of(path: Path) -> dict:
    """meta.json without what two runs may differ in."""
    return {key: value for key, value in json.loads((path / "meta.json").read_text()).items() if key != "provenance"}


def test_harvest_equals_a_direct_computation(host, text, tmp_path) -> None:
    store = make(host, text, tmp_path / "acts", sink_ratio=1.2)
    contexts = list(pack(documents(text), host.tokenizer, 16))
    tokens = torch.stack([torch.from_numpy(context.tokens) for context in contexts])
    owners = torch.stack([torch.from_numpy(context.document_ids) for context in contexts])
    x = host.model(tokens, output_hidden_states=True).hidden_states[2].detach().bfloat16()
    keep = (tokens != 0) & (tokens != 3)  # BOS and <unk> are special
    first = x[:8][keep[:8]].float()  # a shard is 4 batches of 2 contexts

    def distances(rows, mean):
        return ((rows - mean) ** 2).sum(1).sqrt()

    mean = first.mean(0)
    inner = first[distances(first, mean) <= 1.2 * distances(first, mean).median()]
    mean, median = inner.mean(0), distances(inner, inner.mean(0)).median()
    x, tokens, owners = x[keep], tokens[keep], owners[keep]
    fine = distances(x.float(), mean) <= 1.2 * median
    assert 0.02 < 1 - fine.double().mean() < 0.5  # some are sinks here
    x, tokens, owners = (rows[fine][:500] for rows in (x, tokens, owners))
    shards = [load_file(tmp_path / "acts" / shard["file"]) for shard in store.meta["shards"]]
    assert len(shards) > 3
    # batches of two contexts round a little differently from one pass over all
    found = torch.cat([shard["activations"] for shard in shards])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), x.float(), rtol=0.01, atol=1e-3)
    assert torch.equal(torch.cat([shard["tokens"] for shard in shards]), tokens.int())
    assert torch.equal(torch.cat([shard["documents"] for shard in shards]), owners.int())
    torch.testing.assert_close(store.mean, mean, rtol=1e-4, atol=1e-5)
    assert (store.n_tokens, store.d_in, store.hook, store.host) == (500, 16, HOOK, host.spec)


def test_shares_of_what_is_excluded(host, text, tmp_path) -> None:
    store = make(host, text, tmp_path / "acts", n_tokens=1000, sink_ratio=1.2)
    seen = sum(shard["seen"]["tokens"] for shard in store.meta["shards"])
    share = store.meta["excluded"]
    assert share["bos"] == pytest.approx(1 / 16)
    assert 0.03 < share["special"] < 0.2  # the unknown word at every document's end
    kept = 1 - sum(share.values())
    assert seen * kept == pytest.approx(store.n_tokens, abs=2 * 16)  # all but the tail of the last batch
    assert store.meta["text"]["documents"] == store.meta["text"]["source/t.jsonl"]


def test_sinks_are_made_up_for_within_the_first_shard(host, text, tmp_path, recwarn) -> None:
    """However many there are: what looked enough before the rule was known is not."""
    few = make(host, text, tmp_path / "few", n_tokens=1000, sink_ratio=1.1, shard_tokens=4096)
    assert few.n_tokens == 1000
    assert few.meta["excluded"]["sink"] > 0.1  # more than a batch of contexts
    assert [shard["rows"] for shard in few.meta["shards"]] == [1000]
    assert not [warning for warning in recwarn if "ended after" in str(warning.message)]
    contexts = -(-few.meta["shards"][0]["seen"]["tokens"] // 16)
    kept = torch.cat([rows for rows, _ in few.iterate(100)])
    tokens = torch.stack(
        [torch.from_numpy(c.tokens) for c in itertools.islice(pack(documents(text), host.tokenizer, 16), contexts)]
    )
    x = host.activations(tokens, HOOK).bfloat16()[(tokens != 0) & (tokens != 3)]
    expected = x[~few.sink_rule.is_sink(x)][:1000].float()
    torch.testing.assert_close(kept, expected, rtol=0.01, atol=1e-3)  # in order, with nothing left out between


def test_sink_rule_finds_planted_sinks() -> None:
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) + 50
    x[::100] *= 30
    rule = SinkRule.fit(x, 3.0)
    assert rule.is_sink(x).nonzero().flatten().tolist() == list(range(0, 1000, 100))
    torch.testing.assert_close(rule.mean, torch.full((8,), 50.0), atol=0.15, rtol=0)  # not dragged by the sinks
    assert rule.median_norm == pytest.approx(7.34**0.5, rel=0.05)  # median of chi-squared with 8 degrees: 7.34


def test_stopped_after_a_shard_it_continues_to_the_same_bytes(host, text, tmp_path) -> None:
    class Killed(Exception):
        pass

    def killer(stage: str, done: int, total: int) -> None:
        if done > 130:
            raise Killed

    whole = make(host, text, tmp_path / "whole")
    with pytest.raises(Killed):
        make(host, text, tmp_path / "broken", progress=killer)
    assert len(folder_bytes(tmp_path / "broken")) == 1
    with pytest.raises(ValueError, match="unfinished harvest: run the same harvest again"):
        ActivationStore.open(tmp_path / "broken")
    again = make(host, text, tmp_path / "broken")
    assert folder_bytes(tmp_path / "broken") == folder_bytes(tmp_path / "whole")
    assert again.fingerprint == whole.fingerprint
    assert again.meta == whole.meta


def test_killed_in_the_first_shard_it_starts_again(host, text, tmp_path, monkeypatch) -> None:
    def fail(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rsae.harvest, "write_safetensors", fail)
        with pytest.raises(KeyboardInterrupt):
            make(host, text, tmp_path / "acts")
    assert make(host, text, tmp_path / "acts").n_tokens == 500


def test_two_stores_must_be_of_the_same_source(tmp_path):
    about = {"hook": "blocks.1.hook_resid_post", "host": "gpt2", "host_fingerprint": "a", "dtype": "bfloat16"}
    sinks = {"mean": [0.0], "median_norm": 1.0, "ratio": 3.0}

    def store(**change):
        return ActivationStore(tmp_path, {"d_in": 1, "config": about | change, "shards": [], "sinks": sinks})

    store().check_same_source(store(host="folder/gpt2"))  # the same by its fingerprint
    for change, message in (
        ({"hook": "blocks.2.hook_resid_post"}, "give two of the same model and hook"),
        ({"host": "pythia", "host_fingerprint": "b"}, "give two of the same model and hook"),
        ({"dtype": "float32", "host_fingerprint": "b"}, "in bfloat16, .* in float32: harvest both in one dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            store().check_same_source(store(**change))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_outright_it_continues_to_the_same_bytes(host, text, tmp_path) -> None:
    make(host, text, tmp_path / "whole")
    code = f"""
import os, signal, torch
from rsae.harvest import harvest
from rsae.hosts import load_host
host = load_host({host.spec!r}, dtype=torch.float32, device="cpu")
def kill(stage, done, total):
    if done > 350:
        os.kill(os.getpid(), signal.SIGKILL)
harvest(host, {HOOK!r}, {text!r}, {str(tmp_path / "acts")!r}, n_tokens=500, progress=kill, **{SIZES})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == -signal.SIGKILL
    # of the three shards before the kill the last may still be on its way
    assert 2 <= len(json.loads((tmp_path / "acts" / "meta.json").read_text())["shards"]) <= 3
    make(host, text, tmp_path / "acts")
    assert folder_bytes(tmp_path / "acts") == folder_bytes(tmp_path / "whole")
    assert meta_of(tmp_path / "acts") == meta_of(tmp_path / "whole")


def test_the_host_runs_while_a_shard_is_written(host, text, tmp_path, monkeypatch) -> None:
    ran, write, run = threading.Semaphore(0), rsae.harvest.write_safetensors, Host.activations_at

    def waiting(path, tensors, metadata=None):
        if path.name == "shard-00001.safetensors":
            while ran.acquire(blocking=False):  # what ran before
                pass
            assert ran.acquire(timeout=60)
        write(path, tensors, metadata)

    def counted(self, tokens, hooks):
        ran.release()
        return run(self, tokens, hooks)

    monkeypatch.setattr(rsae.harvest, "write_safetensors", waiting)
    monkeypatch.setattr(Host, "activations_at", counted)
    assert make(host, text, tmp_path / "acts").n_tokens == 500


# --- several hooks, several processes ---

HOOKS = ("blocks.2.hook_resid_pre", "model.layers.0.mlp", "blocks.0.hook_resid_pre")


def make_all(host: Host, text: str, out: Path, n_tokens: int = 500, **more) -> dict[str, ActivationStore]:
    settings = {"sink_ratio": 1.2, **SIZES, **more}
    return harvest_all(host, {hook: out / hook for hook in HOOKS}, text, n_tokens=n_tokens, **settings)


def assert_same(there: Path, alone: Path) -> None:
    for hook in HOOKS:
        assert folder_bytes(there / hook) == folder_bytes(alone / hook)
        assert meta_of(there / hook) == meta_of(alone / hook)


@pytest.fixture(scope="module")
def alone(host, text, tmp_path_factory) -> Path:
    """Every hook harvested by itself, by one process."""
    out = tmp_path_factory.mktemp("alone")
    for hook in HOOKS:
        harvest(host, hook, text, out / hook, n_tokens=500, sink_ratio=1.2, **SIZES)
    return out


def test_several_hooks_in_one_pass_are_those_of_several_passes(host, text, tmp_path, alone) -> None:
    stores = make_all(host, text, tmp_path)
    assert_same(tmp_path, alone)
    assert [store.hook for store in stores.values()] == list(HOOKS)
    lengths = {len(store.meta["shards"]) for store in stores.values()}
    assert len(lengths) > 1  # each has its own sinks, and needs more or less text


def test_stores_that_were_stopped_at_different_points_meet(host, text, tmp_path, alone, monkeypatch) -> None:
    def stopper(rows: int):
        def stop(stage: str, done: int, total: int) -> None:
            if done > rows:
                raise InterruptedError

        return stop

    for hook, rows in zip(HOOKS[:2], (380, 150), strict=True):
        with pytest.raises(InterruptedError):
            harvest(host, hook, text, tmp_path / hook, n_tokens=500, sink_ratio=1.2, progress=stopper(rows), **SIZES)
    counts = [len(folder_bytes(tmp_path / hook)) for hook in HOOKS]
    assert counts[0] > counts[1] > counts[2] == 0
    asked: list[tuple[str, ...]] = []
    run = Host.activations_at

    def noted(self, tokens, hooks):
        asked.append(tuple(hooks))
        return run(self, tokens, hooks)

    monkeypatch.setattr(Host, "activations_at", noted)
    make_all(host, text, tmp_path)
    assert_same(tmp_path, alone)
    # no deeper than what is wanted: the first store has its first shards already
    assert asked[: 4 * counts[1]] == [HOOKS[2:]] * (4 * counts[1])
    assert asked[4 * counts[1]] == HOOKS[1:]
    assert asked[4 * counts[0]] == HOOKS


def test_hooks_need_folders_of_their_own(host, text, tmp_path) -> None:
    for folders in ({}, dict.fromkeys(HOOKS, tmp_path / "acts")):
        with pytest.raises(ValueError, match="each hook needs a folder of its own"):
            harvest_all(host, folders, text, n_tokens=500)


def ranks_code(host: Host, text: str, body: str) -> str:
    return f"""
import os, signal, torch
from pathlib import Path
from test_harvest import *
host, text = load_host({host.spec!r}, dtype=torch.float32, device="cpu"), {text!r}
{body}
"""


def test_ranks_without_one_folder_are_refused_by_all(host, text, tmp_path) -> None:
    """Folders of two names, and one name for what each rank has on a disk of its own."""
    body = f"""
os.chdir(Path({str(tmp_path)!r}))
for own in (True, False):
    folder = Path(f"rank-{{ranks.rank}}" if own else "acts")
    try:
        make_all(host, text, folder)
    except ValueError as error:
        print(error)
    Path(f"disk-{{ranks.rank}}").mkdir(exist_ok=True)
    os.chdir(f"disk-{{ranks.rank}}")
"""
    done = torchrun(tmp_path, ranks_code(host, text, body))
    assert done.returncode == 0, done.stderr
    for rank in "01":
        names, disks = (tmp_path / rank).read_text().splitlines()
        assert names.startswith("the ranks have different folders, settings or stored shards (rank 0: ")
        assert "is not one folder to all ranks: shard-0000" in disks
        assert "choose a folder on a file system that they share" in disks
        metas = list((tmp_path / f"disk-{rank}").rglob("meta.json"))
        assert not any(json.loads(meta.read_text())["shards"] for meta in metas)


def test_two_ranks_write_what_one_does(host, text, tmp_path, alone) -> None:
    """From nothing, to the end of the text, and on from what one process left; refusing what they cannot do."""
    with pytest.warns(UserWarning, match="ended after"):
        make_all(host, text, tmp_path / "all", n_tokens=10_000_000)

    def stop(stage: str, done: int, total: int) -> None:
        if done > 200:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make_all(host, text, tmp_path / "continued", progress=stop)
    body = f"""
out = Path({str(tmp_path)!r})
make_all(host, text, out / "from-nothing")
make_all(host, text, out / "continued")
make_all(host, text, out / "to-the-end", n_tokens=10_000_000)
if ranks.rank == 1:
    make_all(host, text, out / "by-one", ranks=Ranks())
for n_tokens in (128, 500 + ranks.rank):
    try:
        make_all(host, text, out / "refused", n_tokens=n_tokens)
    except ValueError as error:
        print(error)
print((out / "refused").exists())
"""
    done = torchrun(tmp_path, ranks_code(host, text, body))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "from-nothing", alone)
    assert_same(tmp_path / "continued", alone)
    assert_same(tmp_path / "by-one", alone)
    assert_same(tmp_path / "to-the-end", tmp_path / "all")
    for rank in "01":
        few, differ, made = (tmp_path / rank).read_text().splitlines()
        assert (
            few == "128 tokens fill 1 of the shards of 128, and there are 2 ranks: start fewer, or harvest more tokens"
        )
        assert differ.startswith("the ranks have different folders, settings or stored shards (rank 0: ")
        assert made == "False"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_dead_rank_ends_the_run_and_any_number_continues_it(host, text, tmp_path, alone) -> None:
    body = f"""
def kill(stage, done, total):
    if ranks.rank == 1 and done > 300:
        os.kill(os.getpid(), signal.SIGKILL)
make_all(host, text, Path({str(tmp_path)!r}), progress=kill)
"""
    done = torchrun(tmp_path, ranks_code(host, text, body))
    assert done.returncode != 0
    left = [meta_of(tmp_path / hook) for hook in HOOKS]
    assert not any(meta["complete"] for meta in left)
    make_all(host, text, tmp_path)
    assert_same(tmp_path, alone)


def test_a_complete_harvest_is_returned_at_once(host, text, tmp_path, monkeypatch) -> None:
    first = make(host, text, tmp_path / "acts")
    monkeypatch.setattr(Host, "activations_at", lambda *_: pytest.fail("ran the host again"))
    monkeypatch.setattr(rsae.harvest, "pack", lambda *_, **__: pytest.fail("read the text again"))
    assert make(host, text, tmp_path / "acts").meta == first.meta


def test_progress_ends_at_the_total(host, text, tmp_path) -> None:
    calls: list[tuple[str, int, int]] = []
    make(host, text, tmp_path / "acts", progress=lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1] == ("harvest", 500, 500)


def test_a_folder_with_another_run_is_left_alone(host, text, tmp_path) -> None:
    make(host, text, tmp_path / "acts")
    before = {file: file.read_bytes() for file in (tmp_path / "acts").iterdir()}
    with pytest.raises(ValueError, match=r"holds another run \(n_tokens: 500 there, 600 asked\)"):
        make(host, text, tmp_path / "acts", n_tokens=600)
    assert {file: file.read_bytes() for file in (tmp_path / "acts").iterdir()} == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("w1")
    with pytest.raises(ValueError, match="holds no harvest"):
        make(host, text, tmp_path / "thesis")
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_shards_are_named(host, text, tmp_path, damage) -> None:
    make(host, text, tmp_path / "acts")
    shard = tmp_path / "acts" / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    if damage == "delete":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flip" else content[:-100])
    message = r"shard .*shard-00002\.safetensors is corrupt or truncated: expected sha256 \w+, found"
    with pytest.raises(ValueError, match=message):
        ActivationStore.open(tmp_path / "acts")
    with pytest.raises(ValueError, match=message):
        make(host, text, tmp_path / "acts")
    ActivationStore.open(tmp_path / "acts", verify=False)


def test_texts_that_are_too_short(host, tmp_path) -> None:
    (tmp_path / "t.txt").write_text("w1 w2 w3")
    for split in ("train", "validation", "evaluation"):  # the document is in one of them
        with pytest.raises(ValueError, match="less than one context of 16 tokens"):
            make(host, str(tmp_path / "t.txt"), tmp_path / "acts", split=split)
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        make(host, str(tmp_path / "t.txt"), tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_a_text_that_ends_early_is_said(host, text, tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"ended after \d+ of 100000 tokens"):
        store = make(host, text, tmp_path / "acts", n_tokens=100_000)
    contexts = list(pack(documents(text), host.tokenizer, 16))
    assert sum(shard["seen"]["tokens"] for shard in store.meta["shards"]) == 16 * len(contexts)  # all was read


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(host, text, tmp_path, monkeypatch, bad) -> None:
    plain = Host.activations_at

    def broken(self, tokens, hooks):
        found = plain(self, tokens, hooks)
        found[HOOK][0, 1, 2] = bad
        return found

    monkeypatch.setattr(Host, "activations_at", broken)
    with pytest.raises(ValueError, match=rf"nan or inf in the activations of .* at {HOOK}, batch 0"):
        make(host, text, tmp_path / "acts")


def test_bad_arguments(host, text, tmp_path) -> None:
    with pytest.raises(ValueError, match="n_tokens and context_length must be at least 1, not 0"):
        make(host, text, tmp_path / "acts", n_tokens=0)
    with pytest.raises(ValueError, match="nearest names are"):
        harvest(host, "blocks.7.hook_resid_post", text, tmp_path / "acts", n_tokens=10)
    assert not (tmp_path / "acts").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX resource limits")
def test_no_space_left_stops_cleanly_and_resumes(host, text, tmp_path, monkeypatch) -> None:
    whole = make(host, text, tmp_path / "whole")
    written = rsae.harvest.write_safetensors

    def into_a_full_disk(path, tensors, metadata=None):
        if path.name != "shard-00002.safetensors":
            return written(path, tensors, metadata)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # the kernel refuses to let the file grow
        try:
            return written(path, tensors, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(rsae.harvest, "write_safetensors", into_a_full_disk)
    with pytest.raises(ValueError, match=r"cannot write .*shard-00002.*run the same command again, and it continues"):
        make(host, text, tmp_path / "acts")
    assert sorted(os.listdir(tmp_path / "acts")) == ["meta.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    monkeypatch.undo()
    assert make(host, text, tmp_path / "acts").fingerprint == whole.fingerprint


# --- reading ---


@pytest.fixture(scope="module")
def store(host, text, tmp_path_factory) -> ActivationStore:
    path = tmp_path_factory.mktemp("store") / "acts"
    make(host, text, path, n_tokens=1000)
    return ActivationStore.open(path)


def take(store: ActivationStore, n: int, **more) -> list[torch.Tensor]:
    return list(itertools.islice(store.batches(**more), n))


def test_iterate_reads_what_was_stored(store) -> None:
    parts = list(store.iterate(64))
    assert max(len(x) for x, _ in parts) == 64
    shards = [load_file(store.path / shard["file"]) for shard in store.meta["shards"]]
    assert torch.equal(torch.cat([x for x, _ in parts]), torch.cat([s["activations"] for s in shards]).float())
    assert torch.equal(torch.cat([d for _, d in parts]), torch.cat([s["documents"] for s in shards]).long())
    assert parts[0][1].dtype == torch.int64


@pytest.mark.parametrize("buffer_tokens", [2**18, 300, 64, 1])
def test_an_epoch_holds_every_token_once(store, buffer_tokens) -> None:
    stored = torch.cat([x for x, _ in store.iterate(4096)])
    two = torch.cat(take(store, 200, batch_size=10, seed=0, buffer_tokens=buffer_tokens))
    for epoch in two.split(1000):
        assert torch.equal(_sorted(epoch), _sorted(stored))
    assert not torch.equal(two[:1000], two[1000:])  # shuffled anew
    assert not torch.equal(two[:1000], stored)


def _sorted(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(x.tolist()))


@pytest.mark.parametrize("buffer_tokens", [2**18, 300])
@pytest.mark.parametrize("start", [1, 7, 14, 15, 47])
def test_start_is_the_kth_batch(store, start, buffer_tokens) -> None:
    """A batch of 70 does not divide the 1,000 tokens: batches run on from one epoch to the next."""
    more = {"batch_size": 70, "seed": 3, "buffer_tokens": buffer_tokens}
    late = take(store, 5, start=start, **more)
    whole = take(store, start + 5, **more)[start:]
    assert all(torch.equal(a, b) for a, b in zip(late, whole, strict=True))
    assert late[0].dtype == torch.float32
    assert late[0].shape == (70, 16)


def test_seeds_differ_and_repeat(store) -> None:
    a, b, c = (torch.cat(take(store, 5, batch_size=64, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_batches_mix_distant_tokens(store) -> None:
    """With a buffer of a third of the store, a batch still draws from all over the text."""
    documents_of = {tuple(x.tolist()): int(d) for xs, ds in store.iterate(4096) for x, d in zip(xs, ds, strict=True)}
    [batch] = take(store, 1, batch_size=100, seed=0, buffer_tokens=300)
    numbers = torch.tensor([documents_of[tuple(row.tolist())] for row in batch])
    last = max(documents_of.values())
    assert numbers.min() < last / 4
    assert numbers.max() > 3 * last / 4


def test_batches_can_be_kept(store) -> None:
    batches = take(store, 3, batch_size=50, seed=0)
    assert not torch.equal(batches[0], batches[1])  # no buffer is handed out twice


def test_bad_batch_size(store) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(store.batches(0, seed=0))
    for batch_size, rank, world in ((64, 0, 3), (64, 2, 2), (64, -1, 2)):
        with pytest.raises(ValueError, match=rf"batch_size {batch_size}, rank {rank} of {world}"):
            next(store.batches(batch_size, seed=0, rank=rank, world=world))


@pytest.mark.parametrize("buffer_tokens", [2**18, 300, 64])
def test_ranks_share_each_batch(store, buffer_tokens) -> None:
    """Batches of 72 run over the ends of groups and of epochs."""
    more = {"batch_size": 72, "seed": 3, "start": 5, "buffer_tokens": buffer_tokens}
    whole = take(store, 40, **more)
    parts = [take(store, 40, rank=rank, world=3, **more) for rank in range(3)]
    assert all(torch.equal(batch, torch.cat(shares)) for batch, *shares in zip(whole, *parts, strict=True))


def test_the_next_group_is_read_while_one_is_drawn_from(store, monkeypatch) -> None:
    read, groups = ActivationStore._read, threading.Semaphore(0)

    def noted(*given) -> None:
        read(*given)
        groups.release()

    monkeypatch.setattr(ActivationStore, "_read", noted)
    batches = store.batches(10, seed=0, buffer_tokens=300)
    next(batches)
    assert groups.acquire(timeout=60)
    assert groups.acquire(timeout=60)  # nobody asked for a second batch
    assert not groups.acquire(timeout=0.2)  # and no third group is held
    batches.close()


@pytest.mark.parametrize("dropped", [False, True])
def test_closed_or_dropped_batches_leave_no_thread(store, dropped) -> None:
    before = threading.active_count()
    batches = store.batches(10, seed=0, buffer_tokens=300)
    next(batches)
    assert threading.active_count() == before + 1
    if dropped:
        del batches
    else:
        batches.close()
    assert threading.active_count() == before


def test_what_fails_in_the_thread_is_raised(store, monkeypatch) -> None:
    monkeypatch.setattr(rsae.harvest, "safe_open", lambda *_: (_ for _ in ()).throw(OSError("unplugged")))
    with pytest.raises(OSError, match="unplugged"):
        next(store.batches(10, seed=0))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_memory_is_bounded_by_the_buffer(store, tmp_path) -> None:
    """A 100 MB store through a 4,096-token buffer (4 MB): the process grows by a fraction of the store."""
    from rsae.artefacts import sha256_file, write_json, write_safetensors

    meta = json.loads(json.dumps(store.meta)) | {"d_in": 512, "shards": []}
    meta["sinks"]["mean"] = [0.0] * 512
    for i in range(4):
        name = f"shard-{i:05d}.safetensors"
        x = torch.randn(25_000, 512).bfloat16()
        ids = torch.zeros(25_000, dtype=torch.int32)
        write_safetensors(tmp_path / name, {"activations": x, "tokens": ids, "documents": ids.clone()})
        meta["shards"].append({"file": name, "rows": 25_000, "sha256": sha256_file(tmp_path / name), "seen": {}})
    write_json(tmp_path / "meta.json", meta)
    code = f"""
import itertools
from rsae.harvest import ActivationStore
def own():  # private memory: mapped files belong to the page cache
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
store = ActivationStore.open({str(tmp_path)!r})
next(store.batches(1024, seed=1, buffer_tokens=64))
before = peak = own()
for _ in itertools.islice(store.batches(1024, seed=0, buffer_tokens=4096), 150):
    peak = max(peak, own())
print((peak - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30  # MB
    shutil.rmtree(tmp_path)
