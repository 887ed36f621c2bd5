"""A file of groups that are played and not yet learned from: SQLite, in WAL mode."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steppo.errors import ConfigError, RunError, require_at_least, said
from steppo.paths import user_path
from steppo.pool.records import decode, encode
from steppo.types import Episode

_APPLICATION = 0x53544550  # says in the file that it is a pool
_LAYOUT = 1  # of the tables; records have a schema of their own
_LOCK_SECONDS = 60.0
_POLL_SECONDS = 0.05
_STALE = -1

# A group's line stays when its episodes go: that nobody adds it again, and that one can see who learned what when.
_TABLES = """
CREATE TABLE groups (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order in which they came
    name TEXT NOT NULL UNIQUE,
    episodes INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    mean_return REAL,
    oldest_version INTEGER,                    -- policy version of its steps
    newest_version INTEGER,
    iteration INTEGER                          -- that it was claimed for; NULL: it waits; -1: it was too old
);
CREATE INDEX by_iteration ON groups (iteration);
CREATE TABLE episodes (
    number INTEGER NOT NULL REFERENCES groups,
    sample INTEGER NOT NULL,
    record TEXT NOT NULL,                      -- JSON
    arrays BLOB NOT NULL,
    PRIMARY KEY (number, sample)
);
CREATE TABLE learner (held INTEGER NOT NULL  -- iterations that a checkpoint holds
);
INSERT INTO learner VALUES (0);
"""
_LISTED = "(SELECT value FROM json_each(?))"
_INFO = """
SELECT number, name, episodes, steps, mean_return, oldest_version, newest_version, iteration,
    CASE WHEN iteration IS NULL THEN 'waiting' WHEN iteration < 0 THEN 'stale'
         WHEN iteration < (SELECT held FROM learner) THEN 'learned' ELSE 'claimed' END AS state,
    EXISTS (SELECT 1 FROM episodes WHERE episodes.number = groups.number) AS is_stored
FROM groups
"""


class PoolFull(RunError):
    """No room for another group. It was not added."""


class GroupInfo(NamedTuple):
    """What is known of a group.

    Attributes:
        number: Its place in the order in which groups came.
        name: The producer's.
        episodes: How many.
        steps: Of all of them.
        mean_return: Of the episodes.
        oldest_version: Least policy version of a step; ``None`` if there is no step.
        newest_version: Largest.
        iteration: That it was claimed for; ``None`` while it waits, -1 when it is stale.
        state: ``waiting``, ``claimed`` (a crash may have it learned again), ``learned`` (a checkpoint holds it), ``stale``.
        is_stored: Its episodes are there.
    """

    number: int
    name: str
    episodes: int
    steps: int
    mean_return: float | None
    oldest_version: int | None
    newest_version: int | None
    iteration: int | None
    state: str
    is_stored: bool


class DataPool:
    """Groups from several producers to one learner, each exactly once, whoever is killed when.

    Who plays, and who learns, has an object of its own in each process and thread. What a call has done is on disk when it
    returns. The file must be on a local disk.

    Args:
        path: The file, made if it is not there; beside it are two of the same name with ``-wal`` and ``-shm``.
        max_waiting: Groups that may wait; then producers do.
        keep: Groups kept after a checkpoint holds them, to look at.
        create: Make the file.

    Raises:
        ConfigError: The file is not there and may not be made, or it is no pool.
    """

    def __init__(self, path: Path | str, max_waiting: int = 1024, keep: int = 256, create: bool = True) -> None:
        require_at_least(1, self, max_waiting=max_waiting)
        require_at_least(0, self, keep=keep)
        self.path = user_path(path)
        self.max_waiting = max_waiting
        self.keep = keep
        if not create and not self.path.is_file():
            raise ConfigError(f"there is no pool {self.path}")
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            url = f"{self.path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
            self._db = sqlite3.connect(url, uri=True, timeout=_LOCK_SECONDS, isolation_level=None)
            self._start(create)

    def _start(self, create: bool) -> None:
        """Makes the tables, if the file is empty, or sees what it is."""
        if create:
            with self._transaction() as db:  # several may come at once
                if not self._value("SELECT count(*) FROM sqlite_master"):
                    for statement in _TABLES.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {_APPLICATION}")
                    db.execute(f"PRAGMA user_version = {_LAYOUT}")
        if self._value("PRAGMA application_id") != _APPLICATION:
            raise ConfigError(f"{self.path} is no pool of episodes")
        if (layout := self._value("PRAGMA user_version")) != _LAYOUT:
            raise ConfigError(f"{self.path} is of layout {layout}, and this steppo reads {_LAYOUT}: take a new file")
        until = time.monotonic() + _LOCK_SECONDS
        while self._value("PRAGMA journal_mode") != "wal":
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:  # busy at once where another process is just here, too
                if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() >= until:
                    raise
                time.sleep(_POLL_SECONDS)
        self._db.execute("PRAGMA synchronous = FULL")  # a checkpoint must not outlive a claim where the power fails

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    # ---- producers ----

    def put(self, name: str, episodes: Sequence[Episode], timeout: float | None = None) -> bool:
        """Adds a group, whole or not at all; waits while the pool is full.

        Args:
            name: Its own for all times. Give it again after a crash, and the group is not added twice.
            episodes: All of it.
            timeout: Seconds to wait; for ever unless given.

        Returns:
            Whether it was added: not if the pool has, or had, one of this name.

        Raises:
            PoolFull: There was no room in time.
        """
        if not episodes:
            raise ConfigError(f"group {name} has no episodes")
        records = [encode(episode) for episode in episodes]
        versions = [step.policy_version for episode in episodes for step in episode.steps]
        mean = float(np.mean([episode.episode_return for episode in episodes]))
        span = (int(min(versions)), int(max(versions))) if versions else (None, None)
        row = (name, len(episodes), len(versions), mean, *span)
        until = time.monotonic() + timeout if timeout is not None else None
        while True:
            with self._transaction() as db:
                if name in self:
                    return False
                if self.waiting < self.max_waiting:
                    columns = "name, episodes, steps, mean_return, oldest_version, newest_version"
                    number = db.execute(f"INSERT INTO groups ({columns}) VALUES (?, ?, ?, ?, ?, ?)", row).lastrowid
                    rows = [(number, sample, *record) for sample, record in enumerate(records)]
                    db.executemany("INSERT INTO episodes VALUES (?, ?, ?, ?)", rows)
                    return True
            if until is not None and time.monotonic() >= until:
                raise PoolFull(f"{self.path} is full: {self.max_waiting} groups wait; {name} was not added")
            time.sleep(_POLL_SECONDS)

    def __contains__(self, name: str) -> bool:
        """Whether the pool has, or had, a group: a producer that starts again need not play it."""
        return bool(self._value("SELECT EXISTS (SELECT 1 FROM groups WHERE name = ?)", name))

    # ---- the learner ----

    def claim(
        self, iteration: int, count: int, oldest_version: int = 0, rank: int = 0, world_size: int = 1, timeout: float = 0.0
    ) -> list[list[Episode]] | None:
        """Groups for an iteration: first in, first out. Asked again for the same iteration it gives the same ones.

        So each rank may ask, and a learner that crashed gets what it had since its last checkpoint.

        Args:
            iteration: Iterations begun before it, from 0, which the learner's checkpoint has.
            count: Groups wanted, over all ranks.
            oldest_version: Groups with a step of an older policy are dropped instead: they turn ``stale``.
            rank: Which share of the groups to give.
            world_size: How many shares there are.
            timeout: Seconds to wait until there are enough.

        Returns:
            This rank's groups, or ``None`` and nothing is claimed: there are not enough.

        Raises:
            ConfigError: The iteration is learned, so this is another run.
        """
        require_at_least(0, self, iteration=iteration)
        require_at_least(1, self, count=count)
        if count > self.max_waiting:
            raise ConfigError(f"the pool holds {self.max_waiting} groups (max_waiting), and an iteration wants {count}")
        until = time.monotonic() + timeout
        while not (numbers := self._claim(iteration, count, oldest_version)):
            if time.monotonic() >= until:
                return None
            time.sleep(_POLL_SECONDS)
        return [self.read(number) for number in numbers[rank::world_size]]

    def claim_named(self, iteration: int, names: Collection[str]) -> None:
        """Claims exactly these groups, which are there (``find``), for an iteration. Done again, it changes nothing.

        Raises:
            ConfigError: The iteration is learned, or a group belongs to another one.
        """
        with self._transaction() as db:
            self._refuse_learned(iteration)
            ours = f"name IN {_LISTED} AND (iteration IS NULL OR iteration = ?)"
            values = iteration, json.dumps(list(names)), iteration
            if db.execute(f"UPDATE groups SET iteration = ? WHERE {ours}", values).rowcount != len(names):
                raise ConfigError(f"{self.path}: another iteration than {iteration} has groups of its plan: take a new file")

    def _refuse_learned(self, iteration: int) -> None:
        if iteration < (held := self._value("SELECT held FROM learner")):
            hint = "go on with that one, or take a new file"
            raise ConfigError(f"{self.path}: iteration {iteration} is learned, a checkpoint holds {held}: {hint}")

    def _claim(self, iteration: int, count: int, oldest_version: int) -> list[int]:
        with self._transaction() as db:
            self._refuse_learned(iteration)
            if claimed := self._numbers("SELECT number FROM groups WHERE iteration = ? ORDER BY number", iteration):
                return claimed
            stale = self._numbers("SELECT number FROM groups WHERE iteration IS NULL AND oldest_version < ?", oldest_version)
            db.executemany("UPDATE groups SET iteration = ? WHERE number = ?", [(_STALE, number) for number in stale])
            self._delete(stale)
            numbers = self._numbers("SELECT number FROM groups WHERE iteration IS NULL ORDER BY number LIMIT ?", count)
            if len(numbers) < count:
                return []
            db.executemany("UPDATE groups SET iteration = ? WHERE number = ?", [(iteration, number) for number in numbers])
            return numbers

    def learned(self, iterations: int) -> None:
        """A checkpoint holds so many iterations, and the run never goes on from an earlier one: they are not served again.

        Of all such groups, the last ``keep`` keep their episodes. Where several checkpoints are kept, give the oldest one's.
        """
        with self._transaction() as db:
            db.execute("UPDATE learner SET held = max(held, ?)", (iterations,))
            stored = "SELECT DISTINCT number FROM episodes"
            learned = f"{stored} WHERE (SELECT iteration FROM groups WHERE groups.number = episodes.number) < ?"
            held = self._value("SELECT held FROM learner")
            self._delete(self._numbers(f"{learned} ORDER BY number DESC LIMIT -1 OFFSET ?", held, self.keep))

    def _delete(self, numbers: Sequence[int]) -> None:
        self._db.executemany("DELETE FROM episodes WHERE number = ?", [(number,) for number in numbers])

    # ---- whoever looks ----

    def groups(self, state: str | None = None) -> list[GroupInfo]:
        """All groups in the order in which they came, or those of a state."""
        with self._errors():
            found = [GroupInfo._make(row) for row in self._db.execute(f"{_INFO} ORDER BY number")]
        return [group for group in found if state in (None, group.state)]

    @property
    def waiting(self) -> int:
        """How many groups wait."""
        return self._value("SELECT count(*) FROM groups WHERE iteration IS NULL")

    def find(self, names: Collection[str]) -> dict[str, int]:
        """Numbers of those of these groups that the pool has, or had."""
        with self._errors():
            query = f"SELECT name, number FROM groups WHERE name IN {_LISTED}"
            return dict(self._db.execute(query, (json.dumps(list(names)),)).fetchall())

    def read(self, number: int) -> list[Episode]:
        """A group's episodes; none once they are deleted."""
        with self._errors():
            query = "SELECT record, arrays FROM episodes WHERE number = ? ORDER BY sample"
            rows = self._db.execute(query, (number,)).fetchall()
        try:
            return [decode(record, arrays) for record, arrays in rows]
        except RunError as error:
            raise RunError(f"{self.path}, group {number}: {error}") from error

    # ---- SQLite ----

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, one at a time over all processes."""
        with self._errors(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db

    def _value(self, query: str, *values: object) -> Any:
        with self._errors():
            return self._db.execute(query, values).fetchone()[0]

    def _numbers(self, query: str, *values: object) -> list[int]:
        return [row[0] for row in self._db.execute(query, values)]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_NOTADB":
                raise ConfigError(f"{self.path} is no pool of episodes") from error
            raise RunError(f"the pool {self.path}: {said(error)}") from error
