"""Panels: the tasks that an evaluation plays, by content, so that anyone can check that theirs are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steppo.errors import ConfigError, RunError
from steppo.paths import user_path
from steppo.rollouts import EpisodeSource
from steppo.types import Task

_FORMAT = 1
_MOST_NAMES = 5
_TEXTS = ("env", "split", "version", "prompt_version", "sha256")


@dataclass(frozen=True)
class Panel:
    """Tasks in their order, each with the hash of its content.

    ``sha256`` is of what is played: the version, and ids and contents in their order. How it is played when the panel is
    made stands beside it.

    Attributes:
        env: Class of the environment.
        split: Of its tasks.
        version: Of its grammar or data.
        max_steps: Most steps of an episode, if there is a limit.
        prompt_version: Of the context's prompts; empty if that is not known.
        tasks: (id, sha256 of the content) of each task.
        path: The file it was read from.
    """

    env: str
    split: str
    version: str
    max_steps: int | None
    prompt_version: str
    tasks: tuple[tuple[str, str], ...]
    path: str = ""

    @classmethod
    def of(cls, source: EpisodeSource, split: str, tasks: Sequence[Task]) -> Panel:
        """A panel of tasks that are prepared, as the source would play them now."""
        played = source.protocol()
        env, prompt_version = (str(played.get(name) or "") for name in ("env", "prompt_version"))
        return cls(env, split, source.version, played.get("max_steps"), prompt_version, hashed(source, tasks))

    @classmethod
    def read(cls, path: str) -> Panel:
        """A panel's file. Raises ``ConfigError`` if it is none, or was changed."""
        found = read_json(user_path(path), "panel", _FORMAT)
        try:
            tasks = tuple((str(task["id"]), str(task["sha256"])) for task in found["tasks"])
            env, split, version, prompt_version, sha256 = (str(found[name]) for name in _TEXTS)
            panel = cls(env, split, version, found["limits"]["max_steps"], prompt_version, tasks, path)
        except (KeyError, TypeError):
            raise ConfigError(f"the panel {path} is not as `python -m steppo.panel make` writes it") from None
        if not tasks:
            raise ConfigError(f"the panel {path} is empty: it has no tasks")
        if panel.sha256 != sha256:
            raise ConfigError(f"the panel {path} was changed: its sha256 is not that of its version and tasks")
        return panel

    @property
    def sha256(self) -> str:
        return panel_sha256(self.version, self.tasks)

    def write(self, path: Path) -> None:
        """Writes its file."""
        found = {
            "format": _FORMAT,
            "env": self.env,
            "split": self.split,
            "version": self.version,
            "limits": {"max_steps": self.max_steps},
            "prompt_version": self.prompt_version,
            "sha256": self.sha256,
            "tasks": [{"id": id, "sha256": sha256} for id, sha256 in self.tasks],
        }
        write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    def choose(self, source: EpisodeSource) -> list[Task]:
        """Its tasks among those of its split, in its own order.

        Raises:
            ConfigError: The data are of another version, or lack some.
        """
        if source.version != self.version:
            raise ConfigError(
                f"the panel {self.path} is of version {self.version!r} of {self.env}'s tasks, here they are of "
                f"{source.version!r}"
            )
        by_id = {task.id: task for task in source.tasks(self.split)}
        if missing := [id for id, _ in self.tasks if id not in by_id]:
            count = f"{len(missing)} of {len(self.tasks)}"
            raise ConfigError(f"the panel {self.path}: split {self.split!r} lacks {count} tasks: {_named(missing)}")
        return [by_id[id] for id, _ in self.tasks]

    def require_same(self, source: EpisodeSource, tasks: Sequence[Task]) -> None:
        """Compares the content of its tasks, once they are prepared. Raises ``ConfigError``: which ones are others."""
        here = hashed(source, tasks)
        if changed := [id for (id, sha256), mine in zip(self.tasks, here, strict=True) if mine != (id, sha256)]:
            raise ConfigError(
                f"the panel {self.path}: {len(changed)} of {len(self.tasks)} tasks have another content than when it was "
                f"made: {_named(changed)}"
            )

    def played_otherwise(self, protocol: dict[str, Any]) -> list[str]:
        """In what it is not played as when it was made, in words."""
        there = {"max_steps": self.max_steps, "prompt_version": self.prompt_version or None}
        names = [name for name, value in there.items() if (protocol.get(name) or None) != value]
        return [f"{name} is {protocol.get(name)}, in the panel {there[name]}" for name in names]


def sha256_of(text: str) -> str:
    """Of a task's content."""
    return hashlib.sha256(text.encode()).hexdigest()


def panel_sha256(version: str, tasks: Iterable[tuple[str, str]]) -> str:
    """Of tasks, each its id and the hash of its content, in their order."""
    return sha256_of(json.dumps([version, *map(list, tasks)]))


def hashed(source: EpisodeSource, tasks: Iterable[Task]) -> tuple[tuple[str, str], ...]:
    """Id and hash of the content of tasks that are prepared."""
    return tuple((task.id, sha256_of(source.content(task))) for task in tasks)


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _MOST_NAMES} more" if len(ids) > _MOST_NAMES else ""
    return ", ".join(ids[:_MOST_NAMES]) + more


def read_json(path: Path, what: str, version: int) -> dict[str, Any]:
    """A file that one of the commands wrote. Raises ``ConfigError`` if it cannot be read, or is of another format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"the {what} {path} is not JSON") from None
    if not isinstance(found, dict) or "format" not in found:
        raise ConfigError(f"{path} is no {what}")
    if found["format"] != version:
        raise ConfigError(f"the {what} {path} is of format {found['format']}; this version of steppo reads {version}")
    return found


def write_text(path: Path, text: str) -> None:
    """Writes a file and the folders above it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error
