"""What adapters of other people's environments share: tasks that are seeds, verdicts by return, what can be recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from steppo.envs.checks import MOST_ENTRIES, plain_entries
from steppo.errors import ConfigError, WrongValue
from steppo.types import Task

SPLITS = ("train", "valid", "test")
_SEEDS_PER_SPLIT = 1_000_000
_READ_ELSEWHERE = ("success", "action_valid", "is_success", "action_mask")


def require_sizes(owner: str, sizes: Mapping[str, int]) -> None:
    """``ConfigError`` where a split is smaller than 0 or larger than the seeds that it has."""
    if not all(0 <= size <= _SEEDS_PER_SPLIT for size in sizes.values()):
        raise ConfigError(f"{owner}: a split holds 0 to {_SEEDS_PER_SPLIT:,} tasks")


def require_verdict(owner: str, success_reward: float | None) -> None:
    """``ConfigError`` where no return can be compared with it."""
    if success_reward is not None and not math.isfinite(success_reward):
        raise ConfigError(f"{owner}: success_reward must be finite, not {success_reward}")


def require_split(owner: str, split: str) -> None:
    """``ConfigError`` where it is not train, valid or test."""
    if split not in SPLITS:
        raise ConfigError(f"{owner} has no split {split!r}; it has {', '.join(SPLITS)}")


def seeds(owner: str, name: str, split: str, sizes: Mapping[str, int]) -> list[Task]:
    """A split's tasks, which are seeds. Train, valid and test never share one."""
    require_split(owner, split)
    start = SPLITS.index(split) * _SEEDS_PER_SPLIT
    return [Task(f"{name}/{seed}", {"seed": seed}) for seed in range(start, start + sizes[split])]


def solved(episode_return: float, success_reward: float | None, ended: bool) -> bool | None:
    """Whether the return so far reaches what solves an episode; one of at most 0 is compared at the end."""
    if success_reward is None:
        return None
    # Ten rewards of 0.1, or one of 0.7 in float32, fall short by rounding.
    reached = episode_return >= success_reward or math.isclose(episode_return, success_reward, rel_tol=1e-6)
    return reached and (ended or success_reward > 0)


def recorded(entries: Iterable[tuple[Any, Any]]) -> dict[str, str | float | bool]:
    """Figures and short texts, as far as they can be recorded."""
    kept: dict[str, str | float | bool] = {}
    for name, entry in entries:
        if name in _READ_ELSEWHERE or len(kept) == MOST_ENTRIES:
            continue
        try:
            kept |= plain_entries("info", [(name, entry)])
        except WrongValue:
            continue
    return kept
