"""How stages leave results on disk: atomic writes, checksums, provenance. The one place that knows how a file is made safe."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): called by long work, turned into bars by the command line."""


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, flush it to disk and rename it to `path`.

    On an error the temporary file is removed and whatever stood at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: str | Path) -> None:
    """Have a file or the entries of a folder written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; nan and inf are refused (ValueError), since JSON has none."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON; a ValueError that names the file if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run the stage that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and run its stage again") from None


def write_safetensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """Short hex hash of a JSON-able mapping, independent of the order of its keys: tells one run from another."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Versions, commit and machine, as every artefact records them. Commit is None outside a git checkout of rsae."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("rsae", "torch", "sae-lens", "transformers", "numpy", "scipy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).resolve().parent
    try:
        git: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 5, "check": True, "cwd": here}
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name], **git
        )  # else it is that of a project around it
        head = subprocess.run(["git", "rev-parse", "HEAD"], **git).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        head = None
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return {
        "versions": versions,
        "commit": head,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "device": device,
        },
    }
