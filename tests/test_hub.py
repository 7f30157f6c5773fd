"""Downloads tell how far they are. The hub is a server on this machine, asked by the hub's own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from tiny_host import save_text, save_tiny

from rsae.hosts import load_host
from rsae.hub import snapshot
from rsae.sae import save_sae
from rsae.teachers import load_teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """org/repo, as far as the hub's client asks for it: the files of `files`, by their paths."""

    files: dict[str, bytes]
    given: list[str]
    """Of them those that were asked for."""
    address: str

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        _, _, revision = self.path.partition("/org/repo/resolve/")
        name = revision.partition("/")[2]
        if self.path.startswith("/api/models/org/repo/revision/"):
            names = [{"rfilename": name} for name in self.files]
            self.reply(json.dumps({"id": "org/repo", "sha": COMMIT, "siblings": names}).encode())
        elif self.path.startswith("/api/models/org/repo/tree/"):
            sizes = {name: len(body) for name, body in self.files.items()}
            tree = [{"type": "file", "path": name, "size": size, "oid": f"{size:040}"} for name, size in sizes.items()]
            self.reply(json.dumps(tree).encode())
        elif name in self.files:
            self.given += [name] if self.command == "GET" else []
            self.reply(self.files[name])
        else:
            self.send_error(404)

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(body):040}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub, and its client with an empty cache."""
    from huggingface_hub import constants

    class Here(Hub):
        files, given = {}, []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    Here.address = address
    yield Here
    server.shutdown()
    server.server_close()


def test_a_download_tells_its_megabytes(hub) -> None:
    hub.files = {"model.safetensors": bytes(5_500_000), "config.json": b"{}", "layer/other.bin": b"left"}
    told = []
    folder = snapshot("org/repo", left=["*/*"], progress=lambda *so_far: told.append(so_far))
    assert {file.name: file.stat().st_size for file in folder.iterdir()} == {
        "model.safetensors": 5_500_000,
        "config.json": 2,
    }
    assert told[-1] == ("org/repo (MB)", 6, 6)
    told.clear()
    assert snapshot("org/repo", left=["*/*"], progress=lambda *so_far: told.append(so_far)) == folder
    assert not told, "nothing had to come"


def test_hosts_and_teachers_tell_it_too(hub, tmp_path, make_teacher) -> None:
    told = []
    save_tiny(tmp_path / "host")
    save_sae(make_teacher("jumprelu"), tmp_path / "teacher")
    hub.files = {file.name: file.read_bytes() for file in (tmp_path / "host").iterdir()} | {
        "consolidated.safetensors": b""
    }
    hub.files |= {f"layer/{file.name}": file.read_bytes() for file in (tmp_path / "teacher").iterdir()}
    host = load_host("org/repo", progress=lambda *so_far: told.append(so_far))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(host.model(tokens).logits, load_host(str(tmp_path / "host")).model(tokens).logits)
    assert told[-1] == ("org/repo (MB)", 1, 1)
    assert "consolidated.safetensors" not in hub.given
    assert len(hub.given) == len(set(hub.given)), "transformers finds what has come"
    told.clear()
    assert load_teacher("org/repo:layer", progress=lambda *so_far: told.append(so_far)).family == "jumprelu"
    assert told[-1] == ("org/repo (MB)", 1, 1)


def test_the_command_shows_it(hub, tmp_path) -> None:
    save_tiny(tmp_path / "host")
    text = save_text(tmp_path / "text.jsonl", documents=30)
    hub.files = {file.name: file.read_bytes() for file in (tmp_path / "host").iterdir()}
    command = [sys.executable, "-m", "rsae.cli", "harvest", "--host", "org/repo", "--hook", "blocks.0.hook_resid_post"]
    done = subprocess.run(
        [*command, "--text", text, "--tokens", "200", "--context-length", "32", "--out", str(tmp_path / "acts")],
        env=os.environ | {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "org/repo (MB): 1 of 1" in done.stderr
    assert done.stderr.index("org/repo (MB)") < done.stderr.index("harvest: ")
