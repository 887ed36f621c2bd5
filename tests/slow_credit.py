"""Credit assignment in plain Python: one loop per formula, on records. What tests and ``benchmarks/credit.py`` compare with.

A turn is a row; rows may be in any order. Step-level schemes give one number per turn, token-level ones a number per action
token, in the order of the turns.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Turn:
    """A step, in plain Python: where it is, the rewards and values of its tokens, and what the agent saw before it.

    ``rewards`` are the task's; ``penalties``, by token too, are what a KL penalty adds to them. ``index`` is the place in
    the episode, whoever acts.
    """

    episode: int
    index: int
    rewards: list[float]
    values: list[float]
    value: float
    observation: str = ""
    penalties: Sequence[float] = ()
    agent: int = 0

    @functools.cached_property
    def reward(self) -> float:
        return sum(self.rewards)

    @functools.cached_property
    def penalty(self) -> float:
        return sum(self.penalties)

    @property
    def totals(self) -> list[float]:
        """What the reward carries, by token."""
        return [sum(pair) for pair in zip(self.rewards, self.penalties, strict=True)] if self.penalties else self.rewards


@dataclass
class Ending:
    """How an episode ended, and the group that it belongs to."""

    terminated: bool
    bootstrap: float
    group: int = 0
    final_reward: float = 0.0


def rows_by_episode(turns: list[Turn]) -> dict[int, list[int]]:
    """Rows of each episode, in time."""
    rows: dict[int, list[int]] = {}
    for row, turn in enumerate(turns):
        rows.setdefault(turn.episode, []).append(row)
    for own in rows.values():
        own.sort(key=lambda row: turns[row].index)
    return rows


def rows_by_chain(turns: list[Turn]) -> dict[tuple[int, int], list[int]]:
    """Rows of each agent in each episode, in time; chains in the order of their first steps within an episode."""
    chains: dict[tuple[int, int], list[int]] = {}
    for episode, rows in sorted(rows_by_episode(turns).items()):
        for row in rows:
            chains.setdefault((episode, turns[row].agent), []).append(row)
    return chains


def with_final_rewards(turns: list[Turn], endings: Sequence[Ending]) -> list[Turn]:
    """The same rows, each chain's last token with its episode's final reward."""
    found = list(turns)
    for (episode, _), rows in rows_by_chain(turns).items():
        last = turns[rows[-1]]
        rewards = [*last.rewards[:-1], last.rewards[-1] + endings[episode].final_reward]
        found[rows[-1]] = dataclasses.replace(last, rewards=rewards)
    return found


def by_token(turns: list[Turn], of_turn: Sequence[float]) -> list[float]:
    """Each turn's number, repeated over its action tokens."""
    return [number for turn, number in zip(turns, of_turn, strict=True) for _ in turn.rewards]


# --- normalising ---


def mean_and_deviation(numbers: list[float]) -> tuple[float, float]:
    """The sample standard deviation: n - 1."""
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))


def are_equal(numbers: list[float], summed: list[float]) -> bool:
    """But for the rounding of sums, which goes by the magnitudes that were added up."""
    return max(numbers) - min(numbers) <= 1e-12 * max(summed)


def slow_standardise(numbers: list[float], summed: list[float], penalties: list[float], tiny: float | None) -> list[float]:
    """Minus the mean and, unless ``tiny`` is ``None``, over the sample standard deviation plus that; no spread gives 0.

    What is not in the numbers, the penalties, is centred, divided by the same and added; without spread it is not divided.
    """
    mean_penalty = math.fsum(penalties) / len(penalties)
    centred = [penalty - mean_penalty for penalty in penalties]
    if are_equal(numbers, summed):
        return centred
    mean, deviation = mean_and_deviation(numbers)
    divisor = 1.0 if tiny is None else deviation + tiny
    return [(number - mean + penalty) / divisor for number, penalty in zip(numbers, centred, strict=True)]


def slow_whiten(numbers: list[float]) -> list[float]:
    return slow_standardise(numbers, [abs(number) for number in numbers], [0.0] * len(numbers), 1e-8)


# --- with a critic ---


def slow_gae(rewards: list[float], values: list[float], final_value: float, gamma: float, gae_lambda: float) -> list[float]:
    """Advantages of one chain, from its end to its start."""
    advantages = [0.0] * len(rewards)
    following_value, following_advantage = final_value, 0.0
    for time in reversed(range(len(rewards))):
        delta = rewards[time] + gamma * following_value - values[time]
        advantages[time] = delta + gamma * gae_lambda * following_advantage
        following_value, following_advantage = values[time], advantages[time]
    return advantages


def slow_whiten_evenly(numbers: list[float], episodes: list[int]) -> list[float]:
    """Each episode counts as one, however many of the numbers are its own: moments are means over episodes of means."""
    if len(numbers) < 2 or min(numbers) == max(numbers):
        return [0.0] * len(numbers)

    def mean_of_means(of: list[float]) -> float:
        own = [[x for x, other in zip(of, episodes, strict=True) if other == episode] for episode in set(episodes)]
        return math.fsum(math.fsum(some) / len(some) for some in own) / len(own)

    mean = mean_of_means(numbers)
    variance = mean_of_means([(number - mean) ** 2 for number in numbers]) * len(numbers) / (len(numbers) - 1)
    return [(number - mean) / (math.sqrt(variance) + 1e-8) for number in numbers]


def slow_credit(
    turns: list[Turn],
    endings: list[Ending],
    gamma: float,
    gae_lambda: float,
    bootstrap: bool,
    by_token: bool,
    even: bool = False,
) -> tuple[list[float], list[float]]:
    """GAE by step or by token: whitened advantages, and targets. ``even``: each episode counts once in the whitening."""
    turns = with_final_rewards(turns, endings)
    last_rows = {rows[-1] for rows in rows_by_episode(turns).values()}
    of_turn: list[list[float]] = [[] for _ in turns]
    for (episode, _), rows in rows_by_chain(turns).items():
        ending = endings[episode]
        final_value = ending.bootstrap if bootstrap and not ending.terminated and rows[-1] in last_rows else 0.0
        if by_token:
            rewards = [reward for row in rows for reward in turns[row].totals]
            values = [value for row in rows for value in turns[row].values]
        else:
            rewards = [turns[row].reward + turns[row].penalty for row in rows]
            values = [turns[row].value for row in rows]
        advantages = slow_gae(rewards, values, final_value, gamma, gae_lambda)
        start = 0
        for row in rows:
            end = start + (len(turns[row].rewards) if by_token else 1)
            of_turn[row] = advantages[start:end]
            start = end
    in_order = [advantage for own in of_turn for advantage in own]
    values = [value for turn in turns for value in (turn.values if by_token else [turn.value])]
    targets = [advantage + value for advantage, value in zip(in_order, values, strict=True)]
    if not even:
        return slow_whiten(in_order), targets
    episodes = [turn.episode for turn, own in zip(turns, of_turn, strict=True) for _ in own]
    return slow_whiten_evenly(in_order, episodes), targets


# --- without a critic ---


def episode_returns(turns: list[Turn], endings: Sequence[Ending]) -> dict[int, tuple[float, float, float]]:
    """Undiscounted, whoever acted: of the task's rewards, of their magnitudes and of the penalties."""
    finals = {turn.episode: endings[turn.episode].final_reward for turn in turns}
    returns = {episode: (final, abs(final), 0.0) for episode, final in finals.items()}
    for turn in turns:
        task, summed, penalty = returns[turn.episode]
        returns[turn.episode] = task + turn.reward, summed + abs(turn.reward), penalty + turn.penalty
    return returns


def episodes_by_group(endings: list[Ending]) -> dict[int, list[int]]:
    episodes: dict[int, list[int]] = {}
    for episode, ending in enumerate(endings):
        episodes.setdefault(ending.group, []).append(episode)
    return episodes


def slow_grpo(turns: list[Turn], endings: list[Ending], scale_by_std: bool = True) -> list[float]:
    """By turn: ``(R - mean of the group) / (std of the group + 1e-6)``."""
    returns = episode_returns(turns, endings)
    advantages: dict[int, float] = {}
    for episodes in episodes_by_group(endings).values():
        columns = (list(column) for column in zip(*(returns[episode] for episode in episodes), strict=True))
        standardised = slow_standardise(*columns, 1e-6 if scale_by_std else None)
        advantages.update(zip(episodes, standardised, strict=True))
    return [advantages[turn.episode] for turn in turns]


def slow_rloo(turns: list[Turn], endings: list[Ending]) -> list[float]:
    """By turn: ``R``, penalties included, minus the mean of the group's other episodes."""
    returns = {episode: task + penalty for episode, (task, _, penalty) in episode_returns(turns, endings).items()}
    advantages: dict[int, float] = {}
    for episodes in episodes_by_group(endings).values():
        total = sum(returns[episode] for episode in episodes)
        for episode in episodes:
            others = (total - returns[episode]) / (len(episodes) - 1) if len(episodes) > 1 else returns[episode]
            advantages[episode] = returns[episode] - others
    return [advantages[turn.episode] for turn in turns]


def slow_reinforce_pp(turns: list[Turn], endings: list[Ending], gamma: float = 1.0) -> list[float]:
    """By token: rewards discounted per token, on to the end of the chain; whitened over tokens."""
    largest = max(summed for _, summed, _ in episode_returns(turns, endings).values())
    turns = with_final_rewards(turns, endings)

    def backwards(numbers_of: Callable[[Turn], Sequence[float]]) -> list[float]:
        of_turn: list[list[float]] = [[] for _ in turns]
        for rows in rows_by_chain(turns).values():
            following = 0.0
            for row in reversed(rows):
                own = []
                for number in reversed(numbers_of(turns[row])):
                    following = number + gamma * following
                    own.append(following)
                of_turn[row] = own[::-1]
        return [number for own in of_turn for number in own]

    returns = backwards(lambda turn: turn.rewards)
    penalties = backwards(lambda turn: turn.penalties or [0.0] * len(turn.rewards))
    return slow_standardise(returns, [largest], penalties, 1e-8)


def slow_reinforce_pp_baseline(turns: list[Turn], endings: list[Ending]) -> list[float]:
    """By turn: ``R`` minus the mean of the group, whitened over the tokens of groups whose returns differ; else 0.

    The penalty minus the mean of its group is added everywhere, over the same deviation, if there is one.
    """
    returns = episode_returns(turns, endings)
    whitened: dict[int, float] = {}
    penalties: dict[int, float] = {}
    for episodes in episodes_by_group(endings).values():
        tasks, summed, penalty = zip(*(returns[episode] for episode in episodes), strict=True)
        for episode, own in zip(episodes, penalty, strict=True):
            penalties[episode] = own - math.fsum(penalty) / len(penalty)
        if not are_equal(list(tasks), list(summed)):
            for episode, task in zip(episodes, tasks, strict=True):
                whitened[episode] = task - math.fsum(tasks) / len(tasks)
    over_tokens = [whitened[turn.episode] for turn in turns if turn.episode in whitened for _ in turn.rewards]
    mean, deviation = mean_and_deviation(over_tokens) if over_tokens else (0.0, 1.0 - 1e-8)
    centred = {episode: number - mean for episode, number in whitened.items()}
    return [(centred.get(turn.episode, 0.0) + penalties[turn.episode]) / (deviation + 1e-8) for turn in turns]


def clusters_of(texts: list[str], similarity: float) -> list[list[int]]:
    """Places of texts that count as one: each is put to the first cluster whose first text it resembles."""

    @functools.cache  # of this call: the same two texts meet again and again
    def resembles(first: str, text: str) -> bool:
        return difflib.SequenceMatcher(None, first, text, autojunk=False).ratio() >= similarity

    clusters: list[list[int]] = []
    for place, text in enumerate(texts):
        for cluster in clusters:
            if resembles(texts[cluster[0]], text):
                cluster.append(place)
                break
        else:
            clusters.append([place])
    return clusters


def equal_texts(texts: list[str]) -> list[list[int]]:
    places: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, []).append(place)
    return list(places.values())


def slow_gigpo(
    turns: list[Turn],
    endings: list[Ending],
    gamma: float = 0.95,
    step_weight: float = 1.0,
    scale_by_std: bool = True,
    similarity: float = 1.0,
) -> list[float]:
    """By turn: GRPO's, plus the discounted return compared with those of the group's steps from the same observation.

    Returns are those of the agent's own steps, and are compared with the same agent's.
    """
    advantages = slow_grpo(turns, endings, scale_by_std)
    turns = with_final_rewards(turns, endings)
    returns = [(0.0, 0.0, 0.0)] * len(turns)
    chains = rows_by_chain(turns)
    for rows in chains.values():
        task = summed = penalty = 0.0
        for row in reversed(rows):
            task = turns[row].reward + gamma * task
            summed = abs(turns[row].reward) + gamma * summed
            penalty = turns[row].penalty + gamma * penalty
            returns[row] = task, summed, penalty
    for episodes in episodes_by_group(endings).values():
        if len(episodes) == 1:
            continue
        for agent in {turn.agent for turn in turns}:
            rows = [row for episode in episodes for row in chains.get((episode, agent), [])]
            texts = [turns[row].observation for row in rows]
            for places in equal_texts(texts) if similarity == 1 else clusters_of(texts, similarity):
                columns = (list(column) for column in zip(*(returns[rows[place]] for place in places), strict=True))
                standardised = slow_standardise(*columns, 1e-6 if scale_by_std else None)
                for place, number in zip(places, standardised, strict=True):
                    advantages[rows[place]] += step_weight * number
    return advantages
