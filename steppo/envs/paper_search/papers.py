"""Where papers come from: what every source offers, and files with an index of their own."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import platformdirs

from steppo.envs.checks import plain_text
from steppo.envs.search import Bm25, Retriever, keep, require_whole
from steppo.errors import ConfigError, WrongValue
from steppo.paths import user_path

_FORMAT = 1  # of what is kept; another number where it changes
_ARXIV_VERSION = re.compile(r"^(?:arxiv:)?(\d{4}\.\d{4,5}|[a-z.-]+/\d{7})(?:v\d+)?$", re.IGNORECASE)
_MOST_CITATIONS = 30  # of those that cite a paper; a known one has thousands
_TABLES = """
    CREATE TABLE papers (row INTEGER PRIMARY KEY, id TEXT UNIQUE, title TEXT, abstract TEXT);
    CREATE TABLE links (paper INTEGER, place INTEGER, other INTEGER, PRIMARY KEY (paper, place)) WITHOUT ROWID;
    CREATE INDEX cited ON links (other, paper);
"""


@dataclass(frozen=True)
class Paper:
    """``id`` is arXiv's, without the version, or another that its source knows it by."""

    id: str
    title: str
    abstract: str = ""

    @classmethod
    def read(cls, record: Any) -> Paper:
        """Of a JSON object. Raises ``ValueError`` if it is no paper."""
        if not isinstance(record, dict):
            raise ValueError("a paper is no JSON object")
        try:
            texts = [" ".join(plain_text(name, record.get(name) or "").split()) for name in ("id", "title", "abstract")]
        except WrongValue as error:
            raise ValueError(f"of a paper, {error}") from None
        if not texts[0] or not texts[1]:
            raise ValueError("a paper has no id or no title")
        return cls(plain_id(texts[0]), *texts[1:])


def plain_id(paper_id: str) -> str:
    """An id of arXiv's without the version, ``2210.05663`` of ``2210.05663v2``; any other as it is."""
    found = _ARXIV_VERSION.match(paper_id.strip())
    return found[1] if found else paper_id.strip()


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of lines, from 1, and their JSON objects. Raises ``ConfigError``: the file is missing, cut off or damaged."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("no object")
                    yield number, record
    except FileNotFoundError:
        raise ConfigError(f"PaperSearchEnv: there is no {path} (docs/paper_search.md)") from None
    except OSError as error:
        raise ConfigError(f"PaperSearchEnv: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):  # also what is not UTF-8, which may be found before its line
        raise ConfigError(f"PaperSearchEnv: {path} is cut off or damaged at line {_bad_line(path)}; get it again") from None


def _bad_line(path: Path) -> int:
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):  # noqa: B007
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    break
            except (ValueError, RecursionError):
                break
    return number


class Papers(ABC):
    """A source of papers. The constructor only stores settings; ``start`` opens it, in a copy of each worker process.

    Attributes:
        expands: It knows what a paper cites and is cited by.
        version: Of what it holds, for records; empty if it cannot tell.
    """

    expands: bool = True
    version: str = ""

    def prepare(self, progress: Callable[[int, int], object]) -> None:
        """Makes what it needs on disk, or looks whether it is there: once per machine. Raises ``SteppoError``."""

    def start(self) -> None:
        """Opens it. What it assigns is shared by all episodes of the process."""

    @abstractmethod
    def search(self, query: str, top_k: int) -> list[Paper]:
        """The best for a query, best first. What cannot be answered raises, and costs its episode."""

    @abstractmethod
    def expand(self, paper_id: str) -> list[Paper]:
        """What a paper cites, and what cites it."""

    def lacks(self, ids: Iterable[str]) -> list[str]:
        """Which of these it knows that it does not have; asked once ``prepare`` is done."""
        return []


class LocalPapers(Papers):
    """Papers of a file, with an index that is made once and memory-mapped.

    Args:
        file: A JSON object per line: ``id``, ``title``, and ``abstract`` if there is one.
        citations: A JSON object per line: ``id``, and ``references``: a list of ids. Those of papers that are not in
            ``file`` are left out. Without this file there is no tool ``expand``.
        retriever: Ranks titles with abstracts; ``Bm25`` unless given.
        cache_dir: Where the index is kept; the user's cache folder unless given.
    """

    def __init__(
        self, file: str, citations: str | None = None, retriever: Retriever | None = None, cache_dir: str | None = None
    ) -> None:
        self.file = user_path(file)
        self.citations = user_path(citations) if citations else None
        self.retriever = retriever or Bm25()
        self.expands = self.citations is not None
        root = user_path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("steppo"))
        self._cache = root / "paper_search"
        self._version = ""

    @property
    def version(self) -> str:  # type: ignore[override]
        """By the content of the files."""
        if not self._version:
            sha256 = hashlib.sha256()
            for path in filter(None, (self.file, self.citations)):
                try:
                    with path.open("rb") as file:
                        sha256.update(hashlib.file_digest(file, "sha256").digest())
                except OSError as error:
                    raise ConfigError(
                        f"PaperSearchEnv: cannot read {path}: {error.strerror} (docs/paper_search.md)"
                    ) from None
            self._version = f"papers {sha256.hexdigest()[:16]}"
        return self._version

    def prepare(self, progress: Callable[[int, int], object]) -> None:
        keep(self._folder / "papers", self.version, self._write)
        with closing(self._database()) as database:
            texts = [
                f"{title}\n{abstract}"
                for title, abstract in database.execute("SELECT title, abstract FROM papers ORDER BY row")
            ]
        self.retriever.prepare(texts, self._folder, progress)

    def start(self) -> None:
        self._open = self._database()
        self._ranking = copy.copy(self.retriever)
        self._ranking.start(self._folder)

    def search(self, query: str, top_k: int) -> list[Paper]:
        return self._papers(row for row, _ in self._ranking.search(query, top_k))

    def expand(self, paper_id: str) -> list[Paper]:
        row = self._open.execute("SELECT row FROM papers WHERE id = ?", (paper_id,)).fetchone()
        cited = "SELECT other FROM links WHERE paper = ? ORDER BY place"
        citing = f"SELECT paper FROM links WHERE other = ? ORDER BY paper LIMIT {_MOST_CITATIONS}"
        rows = [other for query in (cited, citing) for (other,) in self._open.execute(query, row or (None,))]
        return self._papers(dict.fromkeys(rows))

    def lacks(self, ids: Iterable[str]) -> list[str]:
        with closing(self._database()) as database:  # not kept: it cannot be pickled
            return [id for id in ids if not database.execute("SELECT 1 FROM papers WHERE id = ?", (id,)).fetchone()]

    def _papers(self, rows: Iterable[int]) -> list[Paper]:
        query = "SELECT id, title, abstract FROM papers WHERE row = ?"
        return [Paper(*self._open.execute(query, (int(row),)).fetchone()) for row in rows]

    @property
    def _folder(self) -> Path:
        return self._cache / f"{self.version.split()[-1]}-{_FORMAT}"

    def _database(self) -> sqlite3.Connection:
        place = self._folder / "papers"
        require_whole(place)
        return sqlite3.connect(f"{(place / 'papers.sqlite').resolve().as_uri()}?mode=ro&immutable=1", uri=True)

    def _write(self, folder: Path) -> None:
        try:
            with closing(sqlite3.connect(folder / "papers.sqlite")) as database:
                database.executescript(_TABLES)
                rows = self._write_papers(database)
                if self.citations is not None:
                    self._write_links(database, rows, self.citations)
                database.commit()
        except sqlite3.OperationalError as error:
            raise ConfigError(f"LocalPapers: cannot keep papers in {self._cache}: {error}") from None

    def _write_papers(self, database: sqlite3.Connection) -> dict[str, int]:
        rows: dict[str, int] = {}
        for number, record in records(self.file):
            try:
                paper = Paper.read(record)
            except ValueError as error:
                raise ConfigError(f"LocalPapers: {self.file}, line {number}: {error}") from None
            if rows.setdefault(paper.id, len(rows)) != len(rows) - 1:
                raise ConfigError(f"LocalPapers: {self.file}, line {number}: there is another paper with the id {paper.id}")
            database.execute(
                "INSERT INTO papers VALUES (?, ?, ?, ?)", (rows[paper.id], paper.id, paper.title, paper.abstract)
            )
        if not rows:
            raise ConfigError(f"LocalPapers: the corpus is empty: there is no paper in {self.file}")
        return rows

    @staticmethod
    def _write_links(database: sqlite3.Connection, rows: dict[str, int], citations: Path) -> None:
        seen: set[str] = set()
        for number, record in records(citations):
            paper, references = record.get("id"), record.get("references")
            if not isinstance(paper, str) or not _are_texts(references) or plain_id(paper) in seen:
                wanted = 'one line {"id": "...", "references": ["...", ...]} for each paper'
                raise ConfigError(f"LocalPapers: {citations}, line {number}: there must be {wanted}")
            seen.add(plain_id(paper))
            row = rows.get(plain_id(paper))
            cited = dict.fromkeys(rows.get(plain_id(other)) for other in references)
            links = [(row, place, other) for place, other in enumerate(cited) if other not in (None, row)]
            if row is not None:
                database.executemany("INSERT INTO links VALUES (?, ?, ?)", links)


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
