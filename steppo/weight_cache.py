"""Weights kept on disk under a hash of all that shapes them."""

from __future__ import annotations

import io
import os
import re
import time
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

_RESULT = re.compile(r"[0-9a-f]{32}\.pt")
_MOST_FILES, _MOST_BYTES = 32, 32 * 2**30
_DAY = 24 * 3600


class WeightCache:
    """A folder of results. The 32 most recently used ones stay, as long as they have less than 32 GiB together; the newest
    always does. What cannot be read or written is a warning, and no reason to stop.

    Args:
        folder: Need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: str, module: nn.Module) -> dict[str, Tensor] | None:
        """The trained weights kept for a module, if there are some; a file that is damaged or holds others is removed."""
        path = self._path(key)
        wanted = {name: (p.shape, p.dtype) for name, p in module.named_parameters() if p.requires_grad}
        reason = ""
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it writes
                damaged = archive.testzip()
            if damaged is None and {name: (weight.shape, weight.dtype) for name, weight in weights.items()} == wanted:
                with suppress(OSError):
                    os.utime(path)  # the least recently used go first
                return weights
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # there is no end to what a damaged file makes the loader raise
            reason = f" ({' '.join(str(error).split())[:60]})"
        warnings.warn(f"{path} is damaged or holds something else{reason}; it is made anew", stacklevel=2)
        with suppress(OSError):
            path.unlink()
        return None

    def save(self, key: str, weights: Mapping[str, Tensor]) -> None:
        """Keeps a result, whole or not at all."""
        path = self._path(key)
        buffer = io.BytesIO()
        torch.save(dict(weights), buffer)
        part = self.folder / f".tmp{uuid.uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(buffer.getbuffer())
            part.replace(path)
            self._prune(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            warnings.warn(f"cannot write to {self.folder}: {error.strerror or error}; the result is not kept", stacklevel=2)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"

    def _prune(self, newest: Path) -> None:
        """Removes the least recently used results, and what killed processes left half written."""
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process prunes too
                stat = path.stat()
                if _RESULT.fullmatch(path.name) and path != newest:
                    found.append((stat.st_mtime, stat.st_size, path))
                elif path.name.startswith(".tmp") and path.suffix == ".part" and stat.st_mtime < time.time() - _DAY:
                    path.unlink()
        size = newest.stat().st_size
        for number, (_, bytes_, path) in enumerate(sorted(found, reverse=True), 2):
            size += bytes_
            if number > _MOST_FILES or size > _MOST_BYTES:
                with suppress(OSError):
                    path.unlink()
