"""Checkpoints on the Hugging Face hub: downloaded (or found in its cache, when offline) and then read like any folder."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsae.artefacts import Progress
from rsae.hub import snapshot

if TYPE_CHECKING:
    from sae_lens import SAE


def locate(spec: str) -> tuple[str, str, str | None]:
    """(repository, path in it, SAELens release or None) of "RELEASE:SAE_ID", "OWNER/REPO" or "OWNER/REPO:PATH".

    Raises:
        ValueError: neither a release that SAELens lists nor a repository, or an SAE that the release does not have.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    name, _, inner = spec.partition(":")
    releases = get_pretrained_saes_directory()
    if name in releases:
        paths = releases[name].saes_map
        if inner not in paths:
            near = get_close_matches(inner, paths, n=5, cutoff=0.3) or list(paths)[:5]
            raise ValueError(f"teacher {spec}: release {name} has no {inner!r}; near ones: {', '.join(near)}")
        return releases[name].repo_id, paths[inner], name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        near = get_close_matches(name, releases, n=3)
        also = f" (a release of that kind: {', '.join(near)})" if near else ""
        raise ValueError(
            f"teacher {spec!r} is neither a folder with a checkpoint, nor RELEASE:SAE_ID as SAELens lists them, nor a hub "
            f"repository OWNER/REPO or OWNER/REPO:PATH{also}. A SAELens checkpoint is cfg.json and sae_weights.safetensors"
        )
    return name, inner, None


def download(repo: str, inner: str, progress: Progress | None = None) -> Path:
    """The local copy of a path in a repository, from the hub or from its cache.

    Raises:
        ValueError: the hub did not give it.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    inner = inner.strip("/")
    name = f"{repo}:{inner}" if inner else repo
    wanted, left = _wanted(inner)
    try:
        folder = snapshot(repo, wanted=wanted, left=left, progress=progress)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"teacher {name}: there is no such local folder, and the hub did not give it ({' '.join(str(error).split())})"
        ) from error
    if not (folder / inner).exists():
        raise ValueError(
            f"teacher {repo}:{inner}: the repository holds nothing at {inner!r}, or its local copy does not"
        )
    return folder / inner


def _wanted(inner: str) -> tuple[list[str] | None, list[str] | None]:
    """Patterns of what to download, and of what not.

    Of a repository its top level alone, a folder whole, a file with the configuration beside it and above it.
    """
    if not inner:
        return None, ["*/*"]
    parent = f"{inner.rpartition('/')[0]}/".lstrip("/")
    above = f"{parent.rstrip('/').rpartition('/')[0]}/".lstrip("/")
    if "." not in inner.rpartition("/")[2] or inner.endswith((".yaml", ".yml")):
        whole = inner if not inner.endswith((".yaml", ".yml")) else parent.rstrip("/")
        return [f"{whole}/*".lstrip("/"), f"{parent}config.json"], None
    # A folder's name may have a point in it, too
    return [inner, f"{inner}/*", f"{parent}*.json", f"{parent}*.y*ml", f"{above}*.json"], None


def from_release(spec: str) -> SAE[Any]:
    """An SAE read by SAELens' own loader for its release: of a format that there is no reader for here."""
    from sae_lens import SAE

    release, _, sae_id = spec.partition(":")
    try:
        with _weights_only():
            return SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except (KeyError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"teacher {spec}: SAELens cannot read it ({' '.join(str(error).split())})") from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Have torch.load refuse pickles that execute, whoever calls it and whatever the environment says."""
    switches = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in switches}
    os.environ[switches[0]] = "1"
    try:
        yield
    finally:
        del os.environ[switches[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})
