"""What a context policy must offer, and the rendering of one turn that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from steppo.errors import ConfigError
from steppo.types import Observation, Step

_MARK = "\u241estep\u241e"  # stands for an agent's answer when a template is cut behind it

# How turns are written where a tokenizer has no chat template, as one; `first_turn` and `next_turn` do the same.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}"
    "{{ '\n' if not loop.first and loop.previtem.role == 'assistant' }}{{ message.content + '\n' }}"
    "{{ '>' if message.role == 'user' }}"
    "{% endif %}{% endfor %}"
)


class ContextPolicy(ABC):
    """Builds the state ``s_t``: the prompt of a step from the history of its episode.

    Args:
        instructions: What comes first in every prompt (the system message of a chat model); empty for none, or for the
            template's own if it has one.
        template_kwargs: Extra arguments of the chat template, such as ``enable_thinking: false``.
    """

    def __init__(
        self,
        instructions: str = "Solve the task. Answer with one command and nothing else.",
        template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.instructions = instructions
        self.template_kwargs = template_kwargs or {}
        self._tokenizer: Any = None
        self._stop_ids: frozenset[int] = frozenset()
        self._special_tokens: list[str] = []

    def bind(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        """Takes the policy's tokenizer and the ids that end an action."""
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        # Those with a role (end of sequence) and those without, such as the headers of turns in some templates.
        others = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special_tokens = list(dict.fromkeys([*tokenizer.all_special_tokens, *others]))

    @abstractmethod
    def prompt_ids(self, observations: Sequence[Observation], steps: Sequence[Step]) -> np.ndarray:
        """The prompt for the next action.

        Args:
            observations: All so far, the current one last: one more than there are steps.
            steps: The steps taken.

        Returns:
            int32 token ids.
        """

    def render_observation(self, observation: Observation, with_goal: bool = True) -> str:
        """Text of one observation: goal, feedback, what is seen, the commands."""
        lines = [observation.goal] if with_goal and observation.goal else []
        lines += [line for line in (observation.feedback, observation.text) if line]
        if observation.admissible_commands is not None:
            lines.append("Commands: " + ", ".join(observation.admissible_commands))
        return "\n".join(lines)

    def encode_action(self, text: str) -> np.ndarray:
        """Token ids of an action as the policy would give it, its stop token last."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return np.asarray([*ids, self._tokenizer.eos_token_id], dtype=np.int32)

    def decode_action(self, action_ids: np.ndarray) -> str:
        """Text of an action without its stop token."""
        ids = [int(token) for token in action_ids if int(token) not in self._stop_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def first_turn(self, text: str) -> np.ndarray:
        """Ids of a prompt that holds the instructions and one user turn, ready for the answer."""
        text = self._defuse(text)
        if not self._tokenizer.chat_template:
            text = "\n".join(part for part in (self.instructions, text) if part) + "\n>"
            return self._encode(text, begin=True)
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return self._encode(self._template([*messages, {"role": "user", "content": text}]))

    def next_turn(self, text: str, stopped: bool) -> np.ndarray:
        """Ids that follow an answer: its end of turn (unless it ``stopped`` by itself), a user turn, the next's start.

        Only this turn is rendered, never the history, so that what was sampled stays what it was, and templates that
        rewrite earlier answers (dropping their thinking) change nothing.
        """
        text = self._defuse(text)
        if not self._tokenizer.chat_template:
            ids = self._encode("\n" + text + "\n>")
            return ids if stopped else np.concatenate([[self._tokenizer.eos_token_id], ids]).astype(np.int32)
        turns = [("user", "?"), ("assistant", _MARK), ("user", text)]
        rendered = self._template([{"role": role, "content": content} for role, content in turns])
        ids = self._encode(rendered.partition(_MARK)[2])
        if ids.size == 0 or int(ids[0]) not in self._stop_ids:
            raise ConfigError(
                "the chat template does not close an answer with the model's stop token, so turns cannot be appended "
                "token by token; use StateContext with this model"
            )
        return ids[1:] if stopped else ids

    def _defuse(self, text: str) -> str:
        """Takes special tokens out of what an environment says: it must not be able to end a turn or begin another."""
        before = None
        while text != before:  # what is left may be a token again
            before = text
            for token in self._special_tokens:
                text = text.replace(token, "")
        return text

    def _template(self, messages: list[dict[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.template_kwargs
        )

    def _encode(self, text: str, begin: bool = False) -> np.ndarray:
        """Ids of a text; with ``begin``, behind what the tokenizer begins with, if anything. Templates begin themselves."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=begin), dtype=np.int32)
