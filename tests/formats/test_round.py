"""The full round: a checkpoint of each format is upgraded on a tiny model, and SAELens reads what comes out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_dictionary_learning as dictionary_learning
import test_gemma_scope as gemma_scope
import test_llama_scope as llama_scope
import test_named as named
import test_openai as openai
import test_sparsify as sparsify
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from tiny_host import save_text, save_tiny

from rsae.artefacts import read_json
from rsae.finetune import FinetuneConfig
from rsae.pipeline import UpgradeConfig, upgrade
from rsae.sae import RationalSAE
from rsae.teachers import load_teacher

# Random weights read nothing as they should
pytestmark = pytest.mark.filterwarnings("ignore:preflight of:UserWarning")

HOOK = "blocks.1.hook_resid_post"
CONFIG = UpgradeConfig(
    train_tokens=1500, validation_tokens=300, evaluation_tokens=300, ce_tokens=100, context_length=16,
    finetune=FinetuneConfig(steps=20, batch_size=64),
)  # fmt: skip


def sae_lens(family: str, **config: Any) -> Callable[[Path], Path]:
    """A SAELens checkpoint of random weights."""

    def write(folder: Path) -> Path:
        cls, config_cls = (get_sae_training_class if "batch" in family else get_sae_class)(family)
        sae = cls(config_cls(d_in=24, d_sae=96, **config))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if family == "jumprelu":
                sae.threshold.copy_(torch.linspace(0.1, 1.0, 96))
            if "batch" in family:
                sae.topk_threshold.fill_(0.7)
        sae.save_model(folder)
        return folder

    return write


WRITERS: dict[str, Callable[[Path], Path]] = {
    "sae_lens standard": sae_lens("standard"),
    "sae_lens jumprelu": sae_lens("jumprelu", apply_b_dec_to_input=False),
    "sae_lens topk": sae_lens("topk", k=7),
    "sae_lens topk by h ||w||": sae_lens("topk", k=7, rescale_acts_by_decoder_norm=True),
    "sae_lens gated": sae_lens("gated"),
    "sae_lens batchtopk": sae_lens("batchtopk", k=7),
    "sae_lens matryoshka": sae_lens("matryoshka_batchtopk", k=7, matryoshka_widths=[32, 96]),
    "sae_lens layer_norm": sae_lens("jumprelu", normalize_activations="layer_norm"),
    "gemma scope": lambda folder: gemma_scope.write(folder),
    "gemma scope 2": lambda folder: gemma_scope.write(folder, gemma_scope.SECOND, gemma_scope.CONFIG),
    **{
        f"dictionary_learning {name}": lambda folder, name=name: dictionary_learning.write(folder, name)
        for name in dictionary_learning.CLASSES
    },
    "sparsify": sparsify.write,
    "openai topk": lambda folder: openai.save(folder, openai.state_dict("TopK")),
    "openai relu": lambda folder: openai.save(folder, openai.state_dict("ReLU")),
    "llama scope": llama_scope.write_first,
    "llamascopium": lambda folder: folder.mkdir() or llama_scope.write_second(folder),
    **{
        f"named {family}": lambda folder, family=family: named.write(folder, named.description(family))
        for family in ("relu", "jumprelu", "topk", "gated")
    },
}


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("host"), "llama-24"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl", 600)


@pytest.mark.filterwarnings("ignore:.*the L0 asked for.*was not reached")  # of random ReLUs after a few steps
@pytest.mark.parametrize("name", WRITERS)
def test_round(name, host, text, tmp_path) -> None:
    (tmp_path / "checkpoint").mkdir()
    checkpoint = WRITERS[name](tmp_path / "checkpoint" / "of it")
    teacher = load_teacher(checkpoint)
    metrics = upgrade(
        checkpoint, host, HOOK, text, tmp_path / "run", config=CONFIG, trust=True
    )  # random weights agree with nothing
    run = tmp_path / "run"
    assert (run / "report.html").exists()
    assert read_json(run / "preflight.json")["fingerprint"] == teacher.fingerprint
    assert type(SAE.load_from_disk(run / "control")) is type(teacher.sae)
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        init = SAE.load_from_disk(run / "init")
        torch.testing.assert_close(init(x), teacher.sae(x), rtol=1e-4, atol=1e-4)
        rsae = SAE.load_from_disk(run / "rsae")
        assert type(rsae) is RationalSAE
        rsae.save_model(tmp_path / "again")
        again = load_teacher(tmp_path / "again").sae
        assert torch.equal(again(x), rsae(x))
        assert not torch.equal(rsae(x), init(x))
    assert metrics["rsae"]["fvu"] < metrics["init"]["fvu"]
    assert metrics["rsae"]["l0"] == pytest.approx(
        metrics["control"]["l0"], rel=0.2
    )  # 300 tokens matched, 300 others measured


@pytest.mark.parametrize("name", WRITERS)
def test_through_the_hub_s_cache(name, tmp_path, monkeypatch) -> None:
    """The layout that the hub's client leaves: a snapshot whose files are links to blobs. Read offline, by OWNER/REPO:PATH."""
    from huggingface_hub import constants

    (tmp_path / "local").mkdir()
    checkpoint = WRITERS[name](tmp_path / "local" / "folder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root, commit = tmp_path / "hub" / "models--owner--repo", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir()
    for number, file in enumerate(file for file in (tmp_path / "local").rglob("*") if file.is_file()):
        link = root / "snapshots" / commit / file.relative_to(tmp_path / "local")
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = root / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    here, there = load_teacher(checkpoint), load_teacher(f"owner/repo:{checkpoint.relative_to(tmp_path / 'local')}")
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        assert torch.equal(here.sae(x), there.sae(x))
    assert here.fingerprint == there.fingerprint
    assert here.conventions["hook_name"] == there.conventions["hook_name"]
