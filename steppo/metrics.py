"""Metrics over episodes, as torchmetrics: they add up over ranks by themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from steppo.distributed import gather
from steppo.types import Episode, StopReason

_REASONS = tuple(StopReason)


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
    how they went. Where none has a verdict it is unknown: the three figures are NaN.
    """

    full_state_update = False
    episodes: Tensor
    verdicts: Tensor
    successes: Tensor
    returns: Tensor
    steps: Tensor
    invalid: Tensor
    prompt_tokens: Tensor
    action_tokens: Tensor
    reasons: Tensor
    _SUMS = ("episodes", "verdicts", "successes", "returns", "steps", "invalid", "prompt_tokens", "action_tokens")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in self._SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("reasons", torch.zeros(len(_REASONS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, episode: Episode) -> None:
        """Adds one episode."""
        self.reasons[_REASONS.index(episode.stop_reason)] += 1
        if episode.stop_reason.failed:
            return
        self.episodes += 1
        self.verdicts += episode.success is not None
        self.successes += episode.success is True
        self.returns += episode.episode_return
        self.steps += len(episode.steps)
        self.invalid += sum(not step.action_valid for step in episode.steps)
        self.prompt_tokens += sum(len(step.prompt_ids) for step in episode.steps)
        self.action_tokens += sum(len(step.action_ids) for step in episode.steps)

    def compute(self) -> dict[str, float]:
        """The figures so far."""
        total = {name: float(getattr(self, name)) for name in self._SUMS}
        episodes, steps = max(total["episodes"], 1.0), max(total["steps"], 1.0)
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
