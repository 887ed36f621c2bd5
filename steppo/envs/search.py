"""Search in texts: indices that are kept on disk and memory-mapped, so that worker processes share them."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import tempfile
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from steppo.errors import ConfigError, require_at_least, said

# bm25s and sentence-transformers are imported where they are used: they are extras, and the latter imports torch.

_FORMAT = 1  # of what is kept; another number where it changes
_ABOUT = "about.json"
_WORD = re.compile(r"\w\w+")
_CHUNK = 1024

Progress = Callable[[int, int], object]


class Retriever(ABC):
    """Ranks texts by a query. The constructor only stores settings.

    An environment makes the index in ``prepare``. In ``start`` it opens a copy (``copy.copy``) and assigns that to an
    attribute, so that all episodes of the process share it.
    """

    @abstractmethod
    def prepare(self, texts: Sequence[str], folder: Path, progress: Progress) -> None:
        """Makes the index on disk, once per machine. One that is whole, and of these texts and settings, stays.

        Args:
            texts: What to search in.
            folder: For indices of these texts, and of no others.
            progress: Called with (done, total).

        Raises:
            ConfigError: There is nothing to search in, no room, or no library.
        """

    @abstractmethod
    def start(self, folder: Path) -> None:
        """Opens the index. Raises ``ConfigError`` if it is missing or cut off."""

    @abstractmethod
    def search(self, query: str, top_k: int) -> list[tuple[int, float]]:
        """Rows of texts and their scores, best first, ties by row. Fewer than ``top_k`` if no more are found."""


class Bm25(Retriever):
    """BM25 as Lucene has it, by bm25s: ``pip install "steppo[search]"``. No stemming; English stop words are dropped.

    A text that shares no word with the query is not found.

    Args:
        k1: How much the same word counts again and again.
        b: How much a text's length counts against it, from 0 to 1.
    """

    def __init__(self, k1: float = 1.5, b: float = 0.75) -> None:
        require_at_least(0, self, k1=k1, b=b)
        if b > 1:
            raise ConfigError(f"Bm25: b must be at most 1, not {b}")
        self.k1 = k1
        self.b = b

    def prepare(self, texts: Sequence[str], folder: Path, progress: Progress) -> None:
        def make(scratch: Path) -> None:
            numbers, words = self._numbered(texts, progress)
            if not words:
                raise ConfigError("Bm25: the corpus is empty: there is no word to search for")
            index = self._library().BM25(k1=self.k1, b=self.b)
            index.index((numbers, {word: number for number, word in enumerate(words)}), show_progress=False)
            index.vocab_dict = {}  # every worker would hold it: Texts are shared
            index.save(scratch, show_progress=False)
            Texts.write(words, scratch)
            progress(len(texts), len(texts))

        keep(self._place(folder), sha256_of(texts), make)

    def start(self, folder: Path) -> None:
        place = self._place(folder)
        require_whole(place)
        self._words = Texts(place)
        self._index = self._library().BM25.load(place, mmap=True, load_vocab=False, show_progress=False)

    def search(self, query: str, top_k: int) -> list[tuple[int, float]]:
        numbers = [number for word in self._split(query) if (number := self._number(word)) is not None]
        if not numbers:
            return []
        scores = self._index.get_scores_from_ids(numbers)
        return _best(scores, np.flatnonzero(scores), top_k)

    def _number(self, word: str) -> int | None:
        place = bisect_left(self._words, word)
        return place if place < len(self._words) and self._words[place] == word else None

    def _split(self, text: str) -> list[str]:
        from bm25s.stopwords import STOPWORDS_EN

        return [word for word in _WORD.findall(_encodable(text).lower()) if word not in STOPWORDS_EN]

    def _numbered(self, texts: Sequence[str], progress: Progress) -> tuple[list[list[int]], list[str]]:
        """Each text as the numbers of its words, and all words, sorted."""
        places: dict[str, int] = {}
        found = []
        for done, text in enumerate(texts):
            if done % _CHUNK == 0:
                progress(done, len(texts))
            found.append([places.setdefault(word, len(places)) for word in self._split(text)])
        words = sorted(places)
        numbers = [0] * len(words)
        for number, word in enumerate(words):
            numbers[places[word]] = number
        return [[numbers[place] for place in text] for text in found], words

    def _place(self, folder: Path) -> Path:
        return folder / _named("bm25", self._library().__version__, self.k1, self.b)

    @staticmethod
    def _library() -> Any:
        try:
            import bm25s
        except ImportError:
            raise ConfigError('Bm25 needs bm25s: pip install "steppo[search]"') from None
        return bm25s


class Dense(Retriever):
    """Cosine of embeddings, of all texts, by sentence-transformers: ``pip install "steppo[dense]"``.

    Texts are embedded on a GPU if there is one, queries on a CPU, in the workers.

    Args:
        model: Name on Hugging Face's hub, or a folder. Its own prompts for queries and documents are used.
    """

    def __init__(self, model: str = "sentence-transformers/all-MiniLM-L6-v2") -> None:
        self.model = os.path.expanduser(model)

    def prepare(self, texts: Sequence[str], folder: Path, progress: Progress) -> None:
        def make(scratch: Path) -> None:
            if not texts:
                raise ConfigError("Dense: the corpus is empty")
            model = self._encoder()
            vectors: Any = None
            for done in range(0, len(texts), _CHUNK):
                progress(done, len(texts))
                chunk = [_encodable(text) for text in texts[done : done + _CHUNK]]
                found = model.encode_document(chunk, normalize_embeddings=True, show_progress_bar=False)
                if vectors is None:
                    shape = (len(texts), found.shape[1])
                    vectors = np.lib.format.open_memmap(scratch / "vectors.npy", "w+", np.float32, shape)
                vectors[done : done + len(chunk)] = found
            vectors.flush()
            progress(len(texts), len(texts))

        keep(self._place(folder), sha256_of(texts), make)

    def start(self, folder: Path) -> None:
        place = self._place(folder)
        require_whole(place)
        self._vectors = np.load(place / "vectors.npy", mmap_mode="r")
        self._model = self._encoder(device="cpu")

    def search(self, query: str, top_k: int) -> list[tuple[int, float]]:
        if not query.strip():
            return []
        vector = self._model.encode_query(_encodable(query), normalize_embeddings=True, show_progress_bar=False)
        return _best(self._vectors @ vector, np.arange(len(self._vectors)), top_k)

    def _place(self, folder: Path) -> Path:
        return folder / _named("dense", self.model)

    def _encoder(self, **where: str) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise ConfigError('Dense needs sentence-transformers: pip install "steppo[dense]"') from None
        try:
            return SentenceTransformer(self.model, **where)
        except Exception as error:
            raise ConfigError(f"Dense: the model {self.model} cannot be loaded: {said(error)}") from None


class Texts(Sequence[str]):
    """Texts in a folder of their own, memory-mapped: however many there are, worker processes share them."""

    def __init__(self, folder: Path) -> None:
        with open(folder / "texts.bin", "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")

    @staticmethod
    def write(texts: Iterable[str], folder: Path) -> None:
        """Writes them, for ``keep``. What UTF-8 cannot hold becomes ``?``."""
        ends = [1]
        with open(folder / "texts.bin", "wb") as file:
            file.write(b"\n")  # an empty file cannot be mapped
            for text in texts:
                ends.append(ends[-1] + file.write(text.encode("utf-8", "replace")))
        np.save(folder / "ends.npy", np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode()


def keep(place: Path, content: str, make: Callable[[Path], None]) -> None:
    """Makes a folder on disk that appears whole or not at all. One that is whole and of this content stays.

    Args:
        place: The folder.
        content: What it is made of, as a hash.
        make: Writes files into a folder that is empty.

    Raises:
        ConfigError: It cannot be written.
    """
    if kept(place) == content:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make(made)
            files = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
            (made / _ABOUT).write_text(json.dumps({"content": content, "files": files}), encoding="utf-8")
            if place.exists():
                os.replace(place, Path(scratch) / "damaged")
            made.rename(place)
    except OSError as error:
        if kept(place) != content:  # another run may have been faster
            raise ConfigError(f"cannot keep an index in {place.parent}: {error.strerror or error}") from error


def kept(place: Path) -> str | None:
    """The content of what ``keep`` made; ``None`` if it is missing or cut off."""
    try:
        about = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
        whole = all((place / name).stat().st_size == size for name, size in about["files"].items())
        return str(about["content"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def require_whole(place: Path) -> str:
    """As ``kept``. Raises ``ConfigError`` if there is nothing."""
    if (content := kept(place)) is None:
        raise ConfigError(f"the index {place} is missing or damaged; start again, which makes it anew")
    return content


def sha256_of(texts: Iterable[str]) -> str:
    """Of texts in their order."""
    found = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "replace")
        found.update(b"%d " % len(data) + data)
    return found.hexdigest()


def _named(kind: str, *settings: object) -> str:
    """A folder's name: other settings, another index."""
    return f"{kind}-{sha256_of([json.dumps([_FORMAT, *settings])])[:12]}"


def _encodable(text: str) -> str:
    """As ``Texts`` keep it."""
    return text.encode("utf-8", "replace").decode()


def _best(scores: np.ndarray, rows: np.ndarray, top_k: int) -> list[tuple[int, float]]:
    """The best of the given rows, which are sorted."""
    found = scores[rows]
    if len(rows) > top_k:
        best = found >= np.partition(found, -top_k)[-top_k]  # with all that tie for the last place
        rows, found = rows[best], found[best]
    order = np.argsort(-found, kind="stable")[:top_k]
    return [(int(rows[place]), float(found[place])) for place in order]
