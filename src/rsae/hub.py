"""Files of a repository on the Hugging Face hub, with progress: the hub's own bars would break those of a running command."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rsae.artefacts import Progress

MB = 1_000_000


def snapshot(
    repo: str, *, wanted: list[str] | None = None, left: list[str] | None = None, progress: Progress | None = None
) -> Path:
    """The local copy of a repository's files, from the hub or from the hub's cache.

    Args:
        repo: "OWNER/REPO".
        wanted, left: patterns of the files to take (None: all), and of those among them to leave.
        progress: told of the megabytes that have come, as "OWNER/REPO (MB)". The hub's own bars if None.

    Raises:
        OSError, HfHubHTTPError, HFValidationError: the hub did not give it.
    """
    from huggingface_hub import snapshot_download

    bars = None if progress is None else _telling(progress, f"{repo} (MB)")
    return Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=left, tqdm_class=bars))


def _telling(progress: Progress, stage: str) -> Any:
    """A class of bars that draw nothing and tell `progress`.

    Of those that count bytes the last one does: one before it counts what the network carries, of unknown total.
    """

    class Bar(tqdm):
        last: Any = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # of some versions' bars, and not of tqdm's
            super().__init__(*args, **kwargs | {"file": io.StringIO(), "disable": False})  # whatever TQDM_DISABLE says
            if kwargs.get("unit") == "B":
                Bar.last = self

        def display(self, *_: Any, **__: Any) -> None:
            if self is Bar.last and self.total:
                progress(stage, math.ceil(self.n / MB), math.ceil(self.total / MB))

    return Bar
