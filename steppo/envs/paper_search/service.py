"""Papers from a service over HTTP: with time-outs, retries, and answers kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import platformdirs

from steppo.envs.paper_search.papers import Paper, Papers
from steppo.errors import ConfigError, RunError, require_at_least, said
from steppo.paths import user_path

_LARGEST = 10_000_000  # bytes of an answer
_MAY_PASS = (408, 425, 429)  # of those that blame the request
_PROBE = "language models"


class _Failed(Exception):
    """What was wrong with an answer. ``final``: asking again would not help."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class _NoRedirects(HTTPRedirectHandler):
    """They would turn a question into another one."""

    def redirect_request(self, *args: Any) -> None:
        return None


class PaperService(Papers):
    """Papers from a service by its URL. What it answered is kept, and never asked again.

    ``POST URL/search`` gets ``{"query": "...", "limit": 10}`` and ``POST URL/expand`` gets ``{"id": "..."}``, as JSON. Both
    answer 200 and ``{"papers": [{"id": "...", "title": "...", "abstract": "..."}, ...]}``, best first; the abstract may be
    missing. Whatever else comes is asked for again; but for a status from 400 to 499, which is the request's fault (408, 425
    and 429 are not). What fails to the end costs its episode.

    Args:
        url: Such as ``http://127.0.0.1:8000``.
        timeout: Seconds that one try may take. All tries of all calls of a step must fit into ``EnvSource.env_timeout``.
        retries: Tries after the first.
        backoff: Seconds to wait before the first of these; before each further twice as long.
        expands: It answers ``expand``.
        version: What its data are called, for records. Answers are kept apart by it: another one asks anew.
        cache_dir: Where answers are kept, some kB each; the user's cache folder unless given.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 5.0,
        retries: int = 2,
        backoff: float = 0.5,
        expands: bool = True,
        version: str = "",
        cache_dir: str | None = None,
    ) -> None:
        require_at_least(0, self, retries=retries, backoff=backoff)
        if not 0 < timeout < float("inf"):
            raise ConfigError(f"PaperService: timeout must be above 0 seconds, not {timeout}")
        if not _is_url(url):
            raise ConfigError(f"PaperService: url must be such as http://127.0.0.1:8000, not {url!r}")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.expands = expands
        self.version = version
        root = user_path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("steppo"))
        self._cache = root / "paper_search" / "answers"

    def prepare(self, progress: Callable[[int, int], object]) -> None:
        """Asks it once, unless that answer is kept."""
        self.search(_PROBE, 1)

    def search(self, query: str, top_k: int) -> list[Paper]:
        return self._answer("search", {"query": query, "limit": top_k})[:top_k]

    def expand(self, paper_id: str) -> list[Paper]:
        return self._answer("expand", {"id": paper_id})

    def _answer(self, what: str, question: dict[str, Any]) -> list[Paper]:
        place = self._place(what, question)
        with contextlib.suppress(OSError, ValueError, zlib.error):  # not there, or damaged: zlib has a checksum
            return _papers(zlib.decompress(place.read_bytes()))
        text = self._asked(f"{self.url}/{what}", question)
        with contextlib.suppress(OSError):  # no room: it is asked again
            _keep(text, place)
        return _papers(text)

    def _asked(self, url: str, question: dict[str, Any]) -> bytes:
        tries = 0
        while True:
            try:
                return self._try(url, question)
            except _Failed as error:
                if tries == self.retries or error.final:
                    times = f", {tries + 1} times" if tries else ""
                    raise RunError(f"PaperService: {url} failed{times}: {error}") from None
            time.sleep(self.backoff * 2**tries)
            tries += 1

    def _try(self, url: str, question: dict[str, Any]) -> bytes:
        """One answer, whole and of the right form."""
        until, text = time.monotonic() + self.timeout, b""
        request = Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
        try:
            with build_opener(_NoRedirects).open(request, timeout=self.timeout) as answer:
                while part := answer.read1(2**16):
                    text += part
                    if len(text) > _LARGEST:
                        raise _Failed(f"its answer is longer than {_LARGEST:,} bytes", final=True)
                    if time.monotonic() > until:  # each part comes in time, but not all of them
                        raise _Failed(f"its answer takes longer than {self.timeout:g} s")
        except HTTPError as error:
            with error:
                raise _Failed(f"it answers status {error.code}", final=_is_final(error.code)) from None
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise _Failed(said(reason) if isinstance(reason, Exception) else str(reason)) from None
        try:
            _papers(text)
        except ValueError as error:
            raise _Failed(f"its answer is not of the right form: {error}") from None
        return text

    def _place(self, what: str, question: dict[str, Any]) -> Path:
        key = json.dumps([self.url, self.version, what, question], sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._cache / name[:2] / f"{name[2:]}.json.z"


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_final(status: int) -> bool:
    return 400 <= status < 500 and status not in _MAY_PASS


def _papers(text: bytes) -> list[Paper]:
    """Raises ``ValueError`` if it is no answer."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict) or not isinstance(found.get("papers"), list):
        raise ValueError('there is no list "papers"')
    return [Paper.read(record) for record in found["papers"]]


def _keep(text: bytes, place: Path) -> None:
    """Written first beside its place: it appears whole or not at all. Raises ``OSError``."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=place.parent)
    try:
        with open(handle, "wb") as file:
            file.write(zlib.compress(text))
        os.replace(scratch, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
