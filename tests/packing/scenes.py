"""Steps as agents make them, and at random: who shares what."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from steppo.batch import Segment
from tests.packing.test_packing import VOCABULARY


def ids(rng: np.random.Generator, *range_: int) -> np.ndarray:
    """A few random tokens; how many is drawn from a range."""
    return rng.integers(2, VOCABULARY, size=rng.integers(*range_)).astype(np.int32)


def dialogue(
    rng: np.random.Generator, first: np.ndarray, steps: int, seen: Callable, episode: int, group: int
) -> list[Segment]:
    """``seen`` makes a prompt of the first tokens and all turns (observation, then answer) so far."""
    turns: list[np.ndarray] = []
    segments = []
    for _ in range(steps):
        action = ids(rng, 1, 6)
        segments.append(Segment(np.concatenate(seen(first, turns)), action, episode, group))
        turns += [action, ids(rng, 3, 9)]
    return segments


def append(first: np.ndarray, turns: list[np.ndarray]) -> list[np.ndarray]:
    return [first, *turns]


def state(first: np.ndarray, turns: list[np.ndarray]) -> list[np.ndarray]:
    return [first, *turns[-1:]]


def window(first: np.ndarray, turns: list[np.ndarray]) -> list[np.ndarray]:
    return [first, *turns[-3:]]


def summary(first: np.ndarray, turns: list[np.ndarray]) -> list[np.ndarray]:
    """Instructions, then something new each time; no answer is read again."""
    return [first[:-4], *turns[1::2]]


def played(seen: Callable, steps: Sequence[int], group_size: int = 1, head: int = 30, seed: int = 0) -> list[Segment]:
    """Episodes with the same instructions; those of a group also begin in the same place."""
    rng = np.random.default_rng(seed)
    instructions = ids(rng, head, head + 1)
    segments = []
    for episode, count in enumerate(steps):
        if episode % group_size == 0:
            first = np.concatenate([instructions, ids(rng, 5, 9)])
        segments += dialogue(rng, first, count, seen, episode, episode // group_size)
    return segments


def mixed() -> list[Segment]:
    """Append and state episodes, lone steps, one step twice, an action of another, values only, prefixes of others."""
    rng = np.random.default_rng(3)
    segments = [*played(append, [3, 1]), *played(state, [4, 2], seed=0), *played(window, [3], seed=1)]
    long = segments[2]
    none = np.zeros(0, dtype=np.int32)
    segments += [Segment(ids(rng, 4, 20), ids(rng, 1, 5)) for _ in range(3)]
    segments += [long, Segment(long.prompt_ids, ids(rng, 2, 4)), Segment(long.prompt_ids[:20], ids(rng, 2, 4))]
    segments += [Segment(long.prompt_ids[:20], long.prompt_ids[20:24]), Segment(long.prompt_ids[:1], none)]
    segments += [Segment(long.prompt_ids, none), Segment(np.concatenate([long.prompt_ids, long.action_ids]), none)]
    return segments


LONE = Segment(np.arange(5, 12, dtype=np.int32), np.arange(3, 6, dtype=np.int32))
SCENES = {
    "append": [*played(append, [5], seed=1), *played(append, [3], seed=2), *played(append, [4], seed=3)],
    "append head": played(append, [5, 3]),
    "append group": played(append, [3, 2, 4], group_size=3),
    "state": played(state, [4, 6]),
    "state group": played(state, [3, 3, 2, 3], group_size=2),
    "window": played(window, [6, 2, 4]),
    "summary": played(summary, [4, 4]),
    "long head": played(state, [4, 4, 4], head=300),  # a mask of several blocks of the attention's kernel
    "mixed": mixed(),
    "single": [LONE],
    "identical": [LONE] * 3,
    "prefix": [LONE, Segment(np.concatenate([LONE.prompt_ids, LONE.action_ids]), LONE.action_ids)],
    "values only": [Segment(segment.prompt_ids, LONE.action_ids[:0]) for segment in played(state, [3, 2])],
}
BRANCHED = {"append head", "append group", "state", "state group", "window", "summary", "long head", "mixed", "values only"}

TOKENS = st.integers(2, 4)
FOREST = st.lists(st.tuples(st.lists(TOKENS, min_size=1, max_size=9), st.lists(TOKENS, max_size=5)), min_size=1, max_size=14)


def forest(pairs: list[tuple[list[int], list[int]]]) -> list[Segment]:
    return [Segment(np.array(prompt, dtype=np.int32), np.array(action, dtype=np.int32)) for prompt, action in pairs]
