"""Activations made while they are asked for, beside a store of the same text."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny_host import save_text, save_tiny

from rsae.finetune import FinetuneConfig, finetune
from rsae.harvest import ActivationStore, harvest
from rsae.hosts import Host, load_host
from rsae.online import OnlineActivations

HOOK = "blocks.1.hook_resid_post"
SIZES = {"context_length": 16, "batch_size": 4, "sink_ratio": 1.5}  # 64 tokens a pass


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    return load_host(str(save_tiny(tmp_path_factory.mktemp("host"))), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return save_text(tmp_path_factory.mktemp("text") / "t.jsonl", documents=100)


@pytest.fixture(scope="module")
def store(host, text, tmp_path_factory) -> ActivationStore:
    """All of the text."""
    out: Path = tmp_path_factory.mktemp("store") / "acts"
    with pytest.warns(UserWarning, match="ended after"):
        return harvest(host, HOOK, text, out, n_tokens=10_000, shard_tokens=256, **SIZES)


@pytest.fixture(scope="module")
def online(host, text) -> OnlineActivations:
    return OnlineActivations(host, HOOK, text, buffer_tokens=512, rule_tokens=256, **SIZES)


def take(data: OnlineActivations, n: int, batch_size: int = 64, **more) -> list[torch.Tensor]:
    return list(islice(data.batches(batch_size, seed=more.pop("seed", 0), **more), n))


def rows(x: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in x.tolist()]


def test_passes_that_a_loop_waits_for_are_shown(host, text) -> None:
    seen: list[tuple[str, int, int]] = []
    data = OnlineActivations(
        host, HOOK, text, buffer_tokens=512, rule_tokens=256, progress=lambda *told: seen.append(told), **SIZES
    )
    passes = 512 // (SIZES["batch_size"] * SIZES["context_length"])
    assert seen == [("look for sinks", done, passes // 2) for done in range(1, passes // 2 + 1)]
    seen.clear()
    take(data, 1)
    assert seen == [("fill the buffer", done, passes) for done in range(1, passes + 1)]


def test_it_reads_what_a_store_holds(online, store) -> None:
    assert (online.d_in, online.hook) == (store.d_in, store.hook)
    assert torch.equal(online.mean, store.mean)
    assert online.sink_rule.median_norm == store.sink_rule.median_norm
    parts = list(online.iterate(50))
    assert max(len(x) for x, _ in parts) == 50
    stored = list(store.iterate(4096))
    for i in (0, 1):
        assert torch.equal(torch.cat([part[i] for part in parts]), torch.cat([part[i] for part in stored]))
    assert parts[0][0].dtype == torch.float32


@pytest.fixture(scope="module")
def passes(online) -> list[torch.Tensor]:
    """What each pass over 4 contexts keeps: less than 64 rows."""
    return [x for x, _ in online.iterate(64)]


def assert_drawn(batches: list[torch.Tensor], held: list[torch.Tensor]) -> None:
    """All that is held, in another order, and then some of it again."""
    drawn, kept = rows(torch.cat(batches)), rows(torch.cat(held))
    assert sorted(drawn[: len(kept)]) == sorted(kept) != drawn[: len(kept)]
    assert len(kept) < len(drawn)
    assert Counter(drawn[len(kept) :]) <= Counter(kept)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_buffer_is_shuffled_and_every_token_drawn(online, passes, i) -> None:
    assert_drawn(take(online, 8, start=8 * i), passes[8 * i : 8 * (i + 1)])  # 8 batches of 64 a buffer


@pytest.mark.parametrize("start", [0, 1, 8, 13, 101])
def test_start_is_the_kth_batch_and_seeds_repeat(online, start) -> None:
    """The text ends and starts anew: 101 batches of 64 are more than it has."""
    late, whole = take(online, 3, start=start), take(online, start + 3)[start:]
    assert all(torch.equal(a, b) for a, b in zip(late, whole, strict=True))
    assert late[0].shape == (64, 16)
    assert not torch.equal(take(online, 1, seed=1)[0], take(online, 1)[0])


def test_the_host_runs_once_for_a_buffer(host, text, online, monkeypatch) -> None:
    fresh = OnlineActivations(host, HOOK, text, buffer_tokens=512, rule_tokens=256, **SIZES)
    calls: list[int] = []
    run = Host.activations_at
    monkeypatch.setattr(Host, "activations_at", lambda *given: calls.append(1) or run(*given))
    take(fresh, 1, start=30)
    assert len(calls) == 8  # passes of 64 tokens
    take(fresh, 2, start=25, seed=1)  # the same buffer
    assert len(calls) == 8
    sample = take(fresh, 3)
    trained = take(fresh, 20)  # a loop that has looked at a sample, then trains: two buffers more
    assert len(calls) == 8 + 3 * 8
    monkeypatch.undo()
    for mine, expected in ((sample, take(online, 3)), (trained, take(online, 20))):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_iterators_beside_each_other_have_buffers_of_their_own(online) -> None:
    one, two = take(online, 20), take(online, 20, seed=1, start=5)
    beside = zip(online.batches(64, seed=0), online.batches(64, seed=1, start=5), strict=False)
    for (a, b), expected_a, expected_b in zip(islice(beside, 20), one, two, strict=True):
        assert torch.equal(a, expected_a)
        assert torch.equal(b, expected_b)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_read_different_contexts(online, passes, rank) -> None:
    batches = take(online, 25, rank=rank, world=2)
    assert batches[0].shape == (32, 16)
    assert_drawn(batches[:16], passes[rank:16:2])
    later = take(online, 5, rank=rank, world=2, start=20)
    assert all(torch.equal(a, b) for a, b in zip(later, batches[20:], strict=True))


def test_what_is_read_has_a_name(host, text, online) -> None:
    same = OnlineActivations(host, HOOK, text, buffer_tokens=512, rule_tokens=256, **SIZES)
    other = OnlineActivations(host, HOOK, text, buffer_tokens=256, rule_tokens=256, **SIZES)
    assert same.fingerprint == online.fingerprint != other.fingerprint


def test_an_sae_learns_from_it(online, store, make_teacher) -> None:
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=16, d_sae=32, k=4))
    config = FinetuneConfig(steps=4, batch_size=64)
    a, b = (finetune(sae, online, config, held_out=store) for _ in range(2))
    assert torch.equal(a.W_dec, b.W_dec)
    assert not torch.equal(a.W_dec, sae.W_dec)


def test_errors(host, text, online, tmp_path) -> None:
    with pytest.raises(ValueError, match="nearest names are"):
        OnlineActivations(host, "blocks.9.hook_resid_post", text)
    with pytest.raises(ValueError, match="less than one context"):
        OnlineActivations(host, HOOK, text, context_length=100_000)
    with pytest.raises(ValueError, match="a rank's part of a batch is 1024 tokens: expected 1 to 512"):
        take(online, 1, batch_size=1024)
    with pytest.raises(ValueError, match="batch_size 64, rank 0 of 3"):
        take(online, 1, world=3)
