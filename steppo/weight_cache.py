"""Weights kept on disk under a hash of all that shapes them."""

from __future__ import annotations

import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_RESULT = re.compile(r"[0-9a-f]{32}\.pt(\.\w+\.part)?")  # or what a killed process left half written
_MOST_FILES, _MOST_BYTES = 32, 32 * 2**30


def save_whole(data: Any, path: Path, part: Path) -> None:
    """Writes to ``part``, in the same folder, and renames it, so that the file is whole whenever the process dies.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:  # torch's writer says something else when it closes the file
        raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error
    finally:
        with suppress(OSError):
            part.unlink()  # if it is still there


class WeightCache:
    """A folder of results. The 32 most recently used ones stay, as long as they have less than 32 GiB together; the one just
    written always does. What cannot be read or written is a warning, and no reason to stop.

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
        try:
            path = self._path(key)
            save_whole(dict(weights), path, path.with_name(f"{path.name}.{uuid.uuid4().hex}.part"))
            found = [(other.stat(), other) for other in self.folder.iterdir() if _RESULT.fullmatch(other.name)]
            # Newest first. Another machine's clock may be ahead, but the one just written is the newest.
            found.sort(key=lambda one: (one[1] == path, one[0].st_mtime), reverse=True)
            sizes = accumulate(stat.st_size for stat, _ in found)
            for number, ((_, other), size) in enumerate(zip(found, sizes, strict=True)):
                if other != path and (number >= _MOST_FILES or size >= _MOST_BYTES):
                    other.unlink(missing_ok=True)  # another process may be at it
        except OSError as error:
            warnings.warn(
                f"cannot write to {self.folder}: {error.strerror or error}; the result may not be kept", stacklevel=2
            )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"
