"""Contexts: which messages the policy sees. They choose from an episode's history; a renderer writes the token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from steppo.errors import ConfigError
from steppo.rendering.renderer import Renderer
from steppo.types import Message, Observation, Step

_TASK = "Solve the task. Answer with one command and nothing else."


class ContextPolicy(ABC):
    """Builds the state ``s_t``: the prompt of a step from the history of its episode.

    Args:
        instructions: What comes first in every prompt (the system message of a chat model); empty for none, or for the
            template's own if it has one.
        template_kwargs: Extra arguments of the chat template, such as ``enable_thinking: false``.
    """

    renderer: Renderer

    def __init__(self, instructions: str = _TASK, template_kwargs: dict[str, Any] | None = None) -> None:
        self.instructions = instructions
        self.template_kwargs = template_kwargs or {}

    def bind(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        """Takes the policy's tokenizer and the ids that end an action."""
        self.renderer = Renderer(tokenizer, stop_ids, self.template_kwargs)

    @abstractmethod
    def messages(self, observations: Sequence[Observation], steps: Sequence[Step]) -> Sequence[Message | Step]:
        """What stands behind the instructions in the prompt for the next action. A pure function of the history.

        Args:
            observations: All so far, the current one last: one more than there are steps.
            steps: The steps taken.

        Returns:
            Messages, a user's first and last. A step among them stands for its answer, as it was sampled.
        """

    def prompt_ids(self, observations: Sequence[Observation], steps: Sequence[Step]) -> np.ndarray:
        """The prompt for the next action, int32 token ids. Arguments as for ``messages``."""
        first = [Message("system", self.instructions)] if self.instructions else []
        return self.renderer.render([*first, *self.messages(observations, steps)])

    def user_turn(self, observation: Observation, with_goal: bool = True) -> Message:
        """One observation as a message. What a parser fed back may show a call's form, what the environment says may not."""
        return Message("user", self.render_observation(self._cleaned(observation), with_goal), trusted=True)

    def dialogue(self, observations: Sequence[Observation], steps: Sequence[Step], first: int = 0) -> list[Message | Step]:
        """Turns from the ``first`` on: observations and answers. The goal comes first, once."""
        turns: list[Message | Step] = [self.user_turn(observations[first])]
        for step, observation in zip(steps[first:], observations[first + 1 :], strict=True):
            turns += [step, self.user_turn(observation, with_goal=False)]
        return turns

    def render_observation(self, observation: Observation, with_goal: bool = True) -> str:
        """Text of one observation: goal, feedback, what is seen, the commands."""
        lines = [observation.goal] if with_goal and observation.goal else []
        lines += [line for line in (observation.feedback, observation.text) if line]
        if observation.admissible_commands is not None:
            lines.append("Commands: " + ", ".join(observation.admissible_commands))
        return "\n".join(lines)

    def _cleaned(self, observation: Observation) -> Observation:
        clean, commands = self.renderer.without_answers, observation.admissible_commands
        shown = None if commands is None else tuple(map(clean, commands))
        return replace(observation, text=clean(observation.text), goal=clean(observation.goal), admissible_commands=shown)

    def encode_action(self, text: str) -> np.ndarray:
        """Token ids of an action as the policy would give it, its stop token last."""
        return self.renderer.encode_action(text)

    def decode_action(self, action_ids: np.ndarray) -> str:
        """Text of an action without its stop token."""
        return self.renderer.decode_action(action_ids)


class AppendContext(ContextPolicy):
    """The whole dialogue: ``s_{t+1} = s_t + a_t + observation``, so that each prompt is a prefix of the next."""

    def messages(self, observations: Sequence[Observation], steps: Sequence[Step]) -> list[Message | Step]:
        return self.dialogue(observations, steps)

    def prompt_ids(self, observations: Sequence[Observation], steps: Sequence[Step]) -> np.ndarray:
        if not steps:
            return super().prompt_ids(observations, steps)
        # The ids of all messages, from the last prompt on: rendering an episode takes time linear in its length.
        new = self.user_turn(observations[-1], with_goal=False)
        return self.renderer.extend(steps[-1].prompt_ids, steps[-1], [new])


class WindowContext(ContextPolicy):
    """The newest turns of the dialogue, answers as they were sampled: what does not change (instructions, goal) comes first.

    Args:
        max_past_turns: So many turns before the current observation; with as many as there are, all as ``AppendContext``.
        instructions: What comes first in every prompt (the system message of a chat model); empty for none, or for the
            template's own if it has one.
        template_kwargs: Extra arguments of the chat template, such as ``enable_thinking: false``.
    """

    def __init__(
        self, max_past_turns: int = 4, instructions: str = _TASK, template_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__(instructions, template_kwargs)
        if max_past_turns < 0:
            raise ConfigError(f"WindowContext: max_past_turns must be at least 0, not {max_past_turns}")
        self.max_past_turns = max_past_turns

    def messages(self, observations: Sequence[Observation], steps: Sequence[Step]) -> list[Message | Step]:
        return self.dialogue(observations, steps, first=max(0, len(steps) - self.max_past_turns))


class StateContext(ContextPolicy):
    """One message of bounded size, rendered anew at each step: goal, past actions, current observation.

    Args:
        max_past_actions: Show only the last so many actions; all unless given.
        instructions: What comes first in every prompt (the system message of a chat model); empty for none, or for the
            template's own if it has one.
        template_kwargs: Extra arguments of the chat template, such as ``enable_thinking: false``.
    """

    def __init__(
        self, max_past_actions: int | None = None, instructions: str = _TASK, template_kwargs: dict[str, Any] | None = None
    ) -> None:
        super().__init__(instructions, template_kwargs)
        if max_past_actions is not None and max_past_actions < 0:
            raise ConfigError(f"StateContext: max_past_actions must be at least 0, not {max_past_actions}")
        self.max_past_actions = max_past_actions

    def messages(self, observations: Sequence[Observation], steps: Sequence[Step]) -> list[Message]:
        shown = len(steps) if self.max_past_actions is None else min(self.max_past_actions, len(steps))
        past = [step.action for step in steps[len(steps) - shown :]]
        current = self._cleaned(observations[-1])
        lines = [current.goal] if current.goal else []
        lines += ["Done: " + ", ".join(past)] if past else []
        lines.append(self.render_observation(current, with_goal=False))
        return [Message("user", "\n".join(lines), trusted=True)]
