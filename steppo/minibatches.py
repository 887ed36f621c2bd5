"""How an iteration is cut into updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from steppo.errors import ConfigError, RunError, SteppoError, located


class StepColumns(NamedTuple):
    """The steps of an iteration over all ranks, in logical order: the same on every rank.

    ``episode_N`` and ``group_N`` int64, the step's episode and group by number; ``length_N`` int64, its action tokens.
    """

    episode_N: np.ndarray
    group_N: np.ndarray
    length_N: np.ndarray


class Minibatches(ABC):
    """Says which steps each update of a pass learns from.

    Attributes:
        mean_size: What a step weighs in its update's loss: 1 / the mean size of the pass's updates, in steps or tokens, the
            same wherever a step falls; or, if false, 1 / its own update's size, which will do where sizes hardly differ.
    """

    mean_size: ClassVar[bool] = True

    @abstractmethod
    def cut(self, steps: StepColumns, num_minibatches: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """Cuts the steps of one pass; what it gives follows from its arguments alone.

        Args:
            steps: At least as many as minibatches.
            num_minibatches: How many parts there must be.
            rng: The only source of chance, the same on every rank.

        Returns:
            For each update the indices of its steps, int64: each step in exactly one, no update without any.

        Raises:
            RunError: These steps cannot be cut so; it says what to change.
        """


class ShuffledSteps(Minibatches):
    """Steps one by one, wherever they are from; sizes differ by at most one step."""

    mean_size = False

    def cut(self, steps: StepColumns, num_minibatches: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        return np.array_split(rng.permutation(len(steps.length_N)), num_minibatches)


class WholeEpisodes(Minibatches):
    """The steps of an episode stay together, so that what their prompts have in common is computed once."""

    def cut(self, steps: StepColumns, num_minibatches: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        return _whole(steps.episode_N, "episodes", num_minibatches, rng)


class WholeGroups(Minibatches):
    """The steps of a group stay together: episodes of one task share its beginning, and their return's baseline."""

    def cut(self, steps: StepColumns, num_minibatches: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        return _whole(steps.group_N, "groups", num_minibatches, rng)


def checked_cut(
    minibatches: Minibatches, steps: StepColumns, num_minibatches: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The parts, which may be a user's.

    Raises:
        RunError: There are too few steps.
        ConfigError: They are no partition into so many parts, or the class raised.
    """
    total = len(steps.length_N)
    if total < num_minibatches:
        raise RunError(f"the iteration gave {total} steps, too few for {num_minibatches} minibatches")
    name = type(minibatches).__name__
    try:
        found = minibatches.cut(steps, num_minibatches, rng)
    except SteppoError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}.cut: {located(error)}") from error
    try:
        parts = [np.asarray(part) for part in found]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} gave a {type(found).__name__} that is no list of index arrays") from error
    if len(parts) != num_minibatches:
        raise ConfigError(f"{name} cut the steps into {len(parts)} parts, not into num_minibatches = {num_minibatches}")
    if any(part.ndim != 1 or part.size == 0 or part.dtype.kind not in "iu" for part in parts):
        raise ConfigError(f"{name} gave an update that is no array of indices of steps, with one at least")
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(total)):
        raise ConfigError(f"{name} must put each of the {total} steps into exactly one update")
    return parts


def _whole(relatives_N: np.ndarray, name: str, num_minibatches: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Families in random order, each to the update with the fewest steps so far; then updates in random order."""
    _, family_N, steps_F = np.unique(relatives_N, return_inverse=True, return_counts=True)
    if len(steps_F) < num_minibatches:
        raise RunError(
            f"an iteration's {name} are {len(steps_F)}, too few for {num_minibatches} minibatches of whole {name}: lower "
            "data.num_minibatches, or raise rollout.episodes_per_iteration"
        )
    update_F, sizes = np.empty_like(steps_F), np.zeros(num_minibatches, dtype=np.int64)
    for family in rng.permutation(len(steps_F)):
        update_F[family] = sizes.argmin()
        sizes[update_F[family]] += steps_F[family]
    update_N = rng.permutation(num_minibatches)[update_F][family_N]  # each step is as often in the first as in the last
    return [np.flatnonzero(update_N == update) for update in range(num_minibatches)]
