"""Metrics over episodes, as torchmetrics: they add up over ranks by themselves."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from steppo.distributed import gather
from steppo.types import Episode, StopReason

_SUMS = ("episodes", "verdicts", "successes", "returns", "steps", "invalid", "prompt_tokens", "action_tokens")
_REASONS = tuple(StopReason)
_MOST_VALUES = 50


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % by default); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


class EpisodeStatistics(Metric):
    """Counts and means over episodes. Episodes that broke count as such and in nothing else.

    ``compute`` gives a dict of floats: ``episodes``, ``env_errors``, ``engine_errors``, ``errors`` (of any kind),
    ``no_verdict`` (episodes whose environment did not say whether they were solved), ``success_rate``, ``success_low``,
    ``success_high`` (Wilson 95 %), ``return_mean``, ``steps_mean``, ``steps``,
    ``invalid_action_rate``, ``prompt_tokens_mean``, ``action_tokens_mean``, ``prompt_tokens``, ``action_tokens``, and
    ``stop_<reason>``, the share of each stop reason among all episodes.

    The rate counts all episodes, those without a verdict as not solved, so that what it is a share of does not depend on
    how they went. Where none has a verdict it is unknown: the three figures are NaN. Without a healthy episode all
    means are, and without a step those over steps.
    """

    full_state_update = False
    sums: Tensor
    reasons: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, size in (("sums", len(_SUMS)), ("reasons", len(_REASONS))):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, episode: Episode) -> None:
        """Adds one episode."""
        self.reasons[_REASONS.index(episode.stop_reason)] += 1
        if episode.stop_reason.failed:
            return
        steps = episode.steps
        added = {
            "episodes": 1,
            "verdicts": episode.success is not None,
            "successes": episode.success is True,
            "returns": episode.episode_return,
            "steps": len(steps),
            "invalid": sum(not step.action_valid for step in steps),
            "prompt_tokens": sum(len(step.prompt_ids) for step in steps),
            "action_tokens": sum(len(step.action_ids) for step in steps),
        }
        self.sums += self.sums.new_tensor([added[name] for name in _SUMS])

    def compute(self) -> dict[str, float]:
        """The figures so far."""
        total = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        episodes, steps = total["episodes"] or math.nan, total["steps"] or math.nan
        rate = low = high = math.nan
        if total["verdicts"]:
            rate = total["successes"] / episodes
            low, high = wilson_interval(total["successes"], total["episodes"])
        reasons = dict(zip(_REASONS, self.reasons.tolist(), strict=True))
        played = max(sum(reasons.values()), 1.0)
        return {
            "episodes": total["episodes"],
            "env_errors": reasons[StopReason.ENV_ERROR],
            "engine_errors": reasons[StopReason.ENGINE_ERROR],
            "errors": sum(count for reason, count in reasons.items() if reason.failed),
            "no_verdict": total["episodes"] - total["verdicts"],
            "success_rate": rate,
            "success_low": low,
            "success_high": high,
            "return_mean": total["returns"] / episodes,
            "steps_mean": total["steps"] / episodes,
            "steps": total["steps"],
            "invalid_action_rate": total["invalid"] / steps,
            "prompt_tokens_mean": total["prompt_tokens"] / steps,
            "action_tokens_mean": total["action_tokens"] / steps,
            "prompt_tokens": total["prompt_tokens"],
            "action_tokens": total["action_tokens"],
            **{f"stop_{reason}": count / played for reason, count in reasons.items()},
        }


def common_failure(episodes: Iterable[Episode]) -> str:
    """The most common error of failed episodes, over all ranks, of which all must ask; empty if none failed."""
    parts = gather(Counter(episode.error for episode in episodes if episode.stop_reason.failed))
    return next((error for error, _ in sum(parts, Counter()).most_common(1)), "")


def info_figures(episodes: Iterable[Episode], known: bool = True) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """What environments said of healthy episodes beside the rewards, over all ranks, of which all must ask.

    Args:
        episodes: This rank's.
        known: There is a success rate.

    Returns:
        The mean of each figure over the episodes that have it. For each label, by value (the 50 most common): episodes,
        success rate and interval (as those of all episodes: ``None`` unless ``known``) and mean return.
    """
    healthy = [episode for episode in episodes if not episode.stop_reason.failed]
    mine = [(e.order, e.success is True, e.episode_return, info) for e in healthy if (info := e.info)]
    numbers: dict[str, list[float]] = defaultdict(list)
    labels: dict[str, dict[str, list[tuple[bool, float]]]] = defaultdict(lambda: defaultdict(list))
    for _, success, total, info in sorted((told for part in gather(mine) for told in part), key=lambda told: told[0]):
        for name, value in info.items():
            if isinstance(value, str):
                labels[name][value].append((success, total))
            else:
                numbers[name].append(value)
    means = {name: math.fsum(values) / len(values) for name, values in sorted(numbers.items())}
    by_label: dict[str, dict[str, Any]] = {}
    for name, values in sorted(labels.items()):
        common = sorted(values, key=lambda value: (-len(values[value]), value))[:_MOST_VALUES]
        by_label[name] = {value: _of_label(values[value], known) for value in sorted(common)}
    return means, by_label


def _of_label(told: list[tuple[bool, float]], known: bool) -> dict[str, Any]:
    solved = sum(success for success, _ in told)
    return {
        "episodes": len(told),
        "success_rate": solved / len(told) if known else None,
        "success_ci95": list(wilson_interval(solved, len(told))) if known else None,
        "return_mean": math.fsum(total for _, total in told) / len(told),
    }
