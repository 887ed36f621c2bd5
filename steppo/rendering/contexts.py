"""Contexts: which messages the policy sees. They choose from an episode's history; a renderer writes the token ids."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from steppo.errors import require_at_least
from steppo.rendering.parsers import ActionParser, CommandParser
from steppo.rendering.renderer import Renderer
from steppo.types import Message, Step, Turn

_TASK_WITH_TOOLS = "Solve the task."
_TASK = f"{_TASK_WITH_TOOLS} {ActionParser.asks}"


class ContextPolicy(ABC):
    """Builds the state ``s_t``: the prompt of a step from the history of its episode.

    Args:
        instructions: What comes first in every prompt (the system message of a chat model); empty for none, or for the
            template's own if it has one.

    Attributes:
        parser: Of the answers, which says how commands are listed. ``EnvSource`` gives its own.
    """

    renderer: Renderer
    parser: ActionParser = CommandParser()

    def __init__(self, instructions: str = _TASK) -> None:
        self.instructions = instructions

    def bind(self, renderer: Renderer) -> None:
        """Takes what writes its messages. The usual instructions ask for what the parser reads, with tools for nothing."""
        self.renderer = renderer
        if self.instructions == _TASK:
            self.instructions = _TASK_WITH_TOOLS if renderer.tools else f"{_TASK_WITH_TOOLS} {self.parser.asks}"

    @abstractmethod
    def messages(self, turns: Sequence[Turn], steps: Sequence[Step]) -> Sequence[Message | Step]:
        """What stands behind the instructions in the prompt for the next action. A pure function of the history.

        Args:
            turns: The environment's, the current one last: one more than there are steps.
            steps: The steps taken.

        Returns:
            Messages, a user's first. A step among them stands for its answer, as it was sampled.
        """

    def prompt_ids(self, turns: Sequence[Turn], steps: Sequence[Step]) -> np.ndarray:
        """The prompt for the next action, int32 token ids. Arguments as for ``messages``."""
        first = [Message("system", self.instructions)] if self.instructions else []
        return self.renderer.render([*first, *self.messages(turns, steps)])

    def opening(self, turn: Turn) -> Message:
        """A turn that no answer stands before: the goal, and all that is seen, as one message of the user."""
        return Message("user", self.render_observation(self._cleaned(turn)), trusted=True)

    def following(self, turn: Turn, before: Turn) -> list[Message]:
        """A turn behind an answer to the one ``before``: messages by their roles, such as answers of tools, then the user's.

        What a parser fed back may show a call's form, what the environment says may not. After an answer that was refused
        the messages are those of before: they stand there already.
        """
        messages = () if turn.messages is before.messages else turn.messages
        text = self.render_observation(self._cleaned(replace(turn, messages=())), with_goal=False)
        user = [Message("user", text, trusted=True)] if text or not messages else []
        return [*messages, *user]

    def dialogue(self, turns: Sequence[Turn], steps: Sequence[Step], first: int = 0) -> list[Message | Step]:
        """Turns from the ``first`` on, and answers. The goal comes first, once."""
        parts: list[Message | Step] = [self.opening(turns[first])]
        for step, (before, turn) in zip(steps[first:], itertools.pairwise(turns[first:]), strict=True):
            parts += [step, *self.following(turn, before)]
        return parts

    def render_observation(self, turn: Turn, with_goal: bool = True) -> str:
        """Text of one turn: goal, feedback, what is seen, the commands."""
        lines = [turn.goal] if with_goal and turn.goal else []
        lines += [line for line in (turn.feedback, turn.observation) if line]
        if turn.commands is not None:
            lines.append(self.parser.listed(turn.commands))
        return "\n".join(lines)

    def _cleaned(self, turn: Turn) -> Turn:
        clean = self.renderer.without_answers
        commands = None if turn.commands is None else tuple(map(clean, turn.commands))
        messages = tuple(replace(message, content=clean(message.content)) for message in turn.messages)
        return replace(turn, text=clean(turn.text), goal=clean(turn.goal), commands=commands, messages=messages)


class AppendContext(ContextPolicy):
    """The whole dialogue: ``s_{t+1} = s_t + a_t + observation``, so that each prompt is a prefix of the next."""

    def messages(self, turns: Sequence[Turn], steps: Sequence[Step]) -> list[Message | Step]:
        return self.dialogue(turns, steps)

    def prompt_ids(self, turns: Sequence[Turn], steps: Sequence[Step]) -> np.ndarray:
        if not steps:
            return super().prompt_ids(turns, steps)
        # The ids of all messages, from the last prompt on: rendering an episode takes time linear in its length.
        return self.renderer.extend(steps[-1].prompt_ids, steps[-1], self.following(turns[-1], turns[-2]))


class WindowContext(ContextPolicy):
    """The newest turns of the dialogue, answers as they were sampled: what does not change (instructions, goal) comes first.

    Args:
        max_past_turns: So many turns before the current observation; with as many as there are, all as ``AppendContext``.
        instructions: What comes first in every prompt (the system message of a chat model); empty for none, or for the
            template's own if it has one.
    """

    def __init__(self, max_past_turns: int = 4, instructions: str = _TASK) -> None:
        super().__init__(instructions)
        require_at_least(0, self, max_past_turns=max_past_turns)
        self.max_past_turns = max_past_turns

    def messages(self, turns: Sequence[Turn], steps: Sequence[Step]) -> list[Message | Step]:
        return self.dialogue(turns, steps, first=max(0, len(steps) - self.max_past_turns))


class StateContext(ContextPolicy):
    """One message of bounded size, rendered anew at each step: goal, past actions, what is seen now.

    Args:
        max_past_actions: Show only the last so many actions; all unless given.
        instructions: What comes first in every prompt (the system message of a chat model); empty for none, or for the
            template's own if it has one.
        show_impossible: Show also actions that were refused or not possible. A small model may take them for done.
    """

    def __init__(self, max_past_actions: int | None = None, instructions: str = _TASK, show_impossible: bool = True) -> None:
        super().__init__(instructions)
        self.show_impossible = show_impossible
        require_at_least(0, self, max_past_actions=max_past_actions)
        self.max_past_actions = max_past_actions

    def messages(self, turns: Sequence[Turn], steps: Sequence[Step]) -> list[Message]:
        past = [step.action for step in steps if step.action_valid or self.show_impossible]
        shown = len(past) if self.max_past_actions is None else min(self.max_past_actions, len(past))
        past = past[len(past) - shown :]
        current = self._cleaned(turns[-1])
        lines = [current.goal] if current.goal else []
        lines += ["Done: " + ", ".join(past)] if past else []
        seen = self.render_observation(current, with_goal=False)
        return [Message("user", "\n".join([*lines, seen] if seen or not lines else lines), trusted=True)]
