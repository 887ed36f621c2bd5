"""What there is to read: in an environment, for a policy that makes its own tokenizer, and in a prompt, for its version."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Sequence

import numpy as np

from steppo.envs.pool import EnvPool
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, ContextPolicy, Renderer, is_open
from steppo.types import Action, Message, Step, Task, ToolSpec, Turn


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
                    texts.append(parser.answer(action, turn) if action.tool_calls else f"Done: {action}")
                    pool.step(slot, action)
                    going.append((slot, task))
            active = going
        for slot, _ in active:
            pool.receive(slot)
    return texts


def prompt_version(context: ContextPolicy, parser: ActionParser, tools: Sequence[ToolSpec]) -> str:
    """A hash of what the context makes of an example, and of what is said of the tools, whatever the model.

    Empty where the context can make nothing of the example.
    """
    bytewise, tools_text = TinyPolicy(), parser.tools_text(tools) if tools else ""
    bytewise.build(list)
    own = copy.copy(context)
    none = np.zeros(0, dtype=np.int32)
    turns = [Turn(f"Place {number}.", "Go.", ("north", "south"), info={"number": number}) for number in range(8)]
    steps = [Step(none, none, none, 0.0, n, "stop", False, False, True, "", "north", 0.0, 0) for n in range(7)]
    try:
        renderer = Renderer()
        renderer.bind(bytewise.tokenizer, bytewise.stop_ids, tools, tools_text)
        own.bind(renderer)
        shown = [own.messages(turns[: past + 1], steps[:past]) for past in (0, 1, 7)]
    except Exception:
        return ""
    parts = [[[part.role, part.content] if isinstance(part, Message) else "" for part in parts] for parts in shown]
    told = [own.instructions, parts, [tool.schema for tool in tools], tools_text]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:12]
