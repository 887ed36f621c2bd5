"""What there is to read in an environment, for a policy that makes its own tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from steppo.envs.pool import EnvPool
from steppo.rendering import ContextPolicy
from steppo.types import Task


def tokenizer_texts(
    pool: EnvPool, context: ContextPolicy, tasks: Sequence[Task], num_slots: int, most_steps: int
) -> list[str]:
    """Plays each task once by random admissible actions (or the expert's) and gives all that was to be read."""
    texts: list[str] = []
    rng = random.Random(0)
    pool.reset(0, tasks[0], want_expert=False)
    opening = pool.receive(0).observation
    hidden = opening is None or opening.admissible_commands is None  # then the expert knows some
    for first in range(0, len(tasks), num_slots):
        active = list(enumerate(tasks[first : first + num_slots]))
        for slot, task in active:
            pool.reset(slot, task, want_expert=hidden)
        for _ in range(most_steps):
            going = []
            for slot, task in active:
                reply = pool.receive(slot)
                if reply.observation is None:
                    continue
                texts.append(context.render_observation(reply.observation))
                options = reply.observation.admissible_commands or (reply.observation.expert_action,)
                action = rng.choice(options)
                if not (reply.terminated or reply.truncated) and action is not None:
                    texts.append("Done: " + action)
                    pool.step(slot, action)
                    going.append((slot, task))
            active = going
        for slot, _ in active:
            pool.receive(slot)
    return texts
