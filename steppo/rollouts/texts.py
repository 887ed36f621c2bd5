"""What there is to read in an environment, for a policy that makes its own tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from steppo.envs.pool import EnvPool
from steppo.rendering import ActionParser, ContextPolicy, is_open
from steppo.types import Action, Task


def tokenizer_texts(
    pool: EnvPool, context: ContextPolicy, parser: ActionParser, tasks: Sequence[Task], num_slots: int, most_steps: int
) -> list[str]:
    """Plays each task once by random commands (or the expert's actions) and gives all that was to be read."""
    texts: list[str] = []
    rng = random.Random(0)
    pool.reset(0, tasks[0], want_expert=False)
    opening = pool.receive(0).turn
    hidden = opening is None or all(map(is_open, opening.commands or ()))  # then the expert knows some
    for first in range(0, len(tasks), num_slots):
        active = list(enumerate(tasks[first : first + num_slots]))
        for slot, task in active:
            pool.reset(slot, task, want_expert=hidden)
        for _ in range(most_steps):
            going = []
            for slot, task in active:
                turn = pool.receive(slot).turn
                if turn is None:
                    continue
                texts.append(context.render_observation(turn))
                commands = [Action(command) for command in turn.commands or () if not is_open(command)]
                action = rng.choice(commands or [turn.expert_action])
                if not (turn.terminated or turn.truncated) and action is not None:
                    texts.append(parser.answer(action) if action.tool_calls else f"Done: {action}")
                    pool.step(slot, action)
                    going.append((slot, task))
            active = going
        for slot, _ in active:
            pool.receive(slot)
    return texts
