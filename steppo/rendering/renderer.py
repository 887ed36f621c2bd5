"""Messages -> prompt token ids, as a model's chat template writes them; plain lines where its tokenizer has none."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from steppo.errors import ConfigError, said
from steppo.rendering.markup import ANSWER_MARKUP, Markup, markup_in, markup_of
from steppo.types import Action, Message, Step, ToolSpec

_MARK = "\u241estep\u241e"  # stands for an agent's answer when a template is cut behind it
_QUESTION = {"role": "user", "content": "?"}
_ANSWER = {"role": "tool", "content": "It is here.", "tool_call_id": "call00000"}
_RESPONSE = "<tool_response>\n{}\n</tool_response>"  # as Hermes models read them

# How turns are written where a tokenizer has no chat template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}"
    "{{ '\n' if not loop.first and loop.previtem.role == 'assistant' }}"
    "{{ message.content + '\n' if message.content or loop.first or loop.previtem.role != 'system' }}"
    "{{ '>' if message.role == 'user' and (loop.last or loop.nextitem.role == 'assistant') }}"
    "{% endif %}{% endfor %}"
)


class Renderer:
    """Writes dialogues token by token. What was sampled is never tokenised again.

    A message is text. A step among the messages stands for its answer: its ids go in as they are, and what follows is
    written as the template writes it behind an answer. The template's markup is taken out of all messages but the system's.

    A template that knows tools writes their schemas and answers itself. For another, also for one that writes schemas and no
    answers, schemas go into the system message, and answers into a message of the user, in ``<tool_response>``, with what
    else follows the action.

    Args:
        template_kwargs: Extra arguments of the chat template, such as ``enable_thinking: false``.

    Attributes:
        tools: The environment's.
        template_knows_tools: The chat template writes them.
    """

    def __init__(self, template_kwargs: dict[str, Any] | None = None) -> None:
        self.template_kwargs = template_kwargs or {}
        self.template_knows_tools = False

    def bind(self, tokenizer: Any, stop_ids: Collection[int], tools: Sequence[ToolSpec] = (), tools_text: str = "") -> None:
        """Takes what it writes with.

        Args:
            tokenizer: The policy's.
            stop_ids: Token ids that end an answer.
            tools: The environment's.
            tools_text: These and how they are called, for templates that do not say so.

        Raises:
            ConfigError: A tool's name, description or schema has markup in it.
        """
        self.tools = tuple(tools)
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._arguments = self.template_kwargs if tokenizer.chat_template else {"chat_template": PLAIN_TEMPLATE}
        markup = markup_of(tokenizer, str(self._arguments.get("chat_template", "")))
        if tools:
            schemas = {"tools": [tool.schema for tool in tools]}
            self.template_knows_tools = self._knows_tools(schemas)
            if self.template_knows_tools:
                self._arguments = {**self._arguments, **schemas}
            else:
                shown = "\n".join(json.dumps(tool.schema, ensure_ascii=False) for tool in tools)
                markup |= {*ANSWER_MARKUP, *markup_in(_RESPONSE), *markup_in(tools_text, shown)}
            self._require_plain(tools, Markup({*markup, _MARK}, tokenizer))
        self._tools_text = "" if self.template_knows_tools else tools_text
        self._markup = Markup(markup, tokenizer)
        self._turn_markup = Markup(markup.difference(ANSWER_MARKUP), tokenizer)

    @property
    def prompt_end(self) -> str:
        """The text before an answer, from the last message on."""
        try:
            return self._apply([_QUESTION]).rpartition(_QUESTION["content"])[2]
        except Exception as error:  # a template may refuse what it likes, in words of its own
            raise ConfigError(f"the chat template cannot write a question: {said(error)}") from None

    @staticmethod
    def _require_plain(tools: Sequence[ToolSpec], markup: Markup) -> None:
        """Schemas are written as they are, and must not end what they stand in."""
        for tool in tools:
            if found := markup.found_in(json.dumps(tool.schema, ensure_ascii=False)):
                raise ConfigError(f"the tool {tool.name} cannot be shown: {found} in it is markup of the model's prompts")

    def _knows_tools(self, schemas: dict[str, Any]) -> bool:
        """Whether the template writes schemas, and a tool's answer where ``extend`` asks for it."""
        try:
            with_tools, without = (self._apply([_QUESTION], **arguments) for arguments in (schemas, {}))
            answered = self._apply([_QUESTION, {"role": "assistant", "content": _MARK}, _ANSWER], **schemas)
            return with_tools != without and _ANSWER["content"] in answered.partition(_MARK)[2]
        except Exception:  # a template may refuse tools, or answers without their calls, in words of its own
            return False

    def render(self, messages: Sequence[Message | Step]) -> np.ndarray:
        """Ids of a dialogue, ready for the next answer: int32."""
        opening: list[Message] = []
        answers: list[tuple[Step, list[Message]]] = []
        for part in messages:
            if isinstance(part, Step):
                answers.append((part, []))
            else:
                (answers[-1][1] if answers else opening).append(part)
        if self._tools_text:
            system = opening.pop(0).content if opening and opening[0].role == "system" else ""
            opening.insert(0, Message("system", "\n\n".join(text for text in (system, self._tools_text) if text)))
        ids = self._encode(self._text(opening), begin=not self._tokenizer.chat_template)  # templates begin themselves
        for step, new in answers:
            ids = self.extend(ids, step, new)
        return ids

    def extend(self, ids: np.ndarray, step: Step, messages: Sequence[Message]) -> np.ndarray:
        """The ids of a dialogue, the step's answer as it was sampled, and the messages after it, ready for the next answer.

        These messages are rendered at once, as templates may join them. The history is not, so that templates that rewrite
        earlier answers (dropping their thinking) change nothing.
        """
        rendered = self._text([Message("user", "?"), Message("assistant", _MARK), *messages])
        new = self._encode(rendered.partition(_MARK)[2])
        if new.size == 0 or int(new[0]) not in self._stop_ids:
            raise ConfigError(
                "the chat template does not close an answer with the model's stop token, so turns cannot be appended "
                "token by token; use StateContext with this model"
            )
        return np.concatenate([ids, step.action_ids, new[1:] if step.finish_reason == "stop" else new])

    def without_answers(self, text: str) -> str:
        """A part of a trusted message that is not to be trusted. Other markup goes with the message's, as in all of them."""
        clean = self._markup.removed_from(text)
        return text if clean == self._turn_markup.removed_from(text) else clean

    def encode_action(self, text: str) -> np.ndarray:
        """Token ids of an answer as the policy would give it, its stop token last."""
        return np.append(self._encode(text), np.int32(self._tokenizer.eos_token_id))

    def decode_action(self, action_ids: np.ndarray) -> str:
        """Text of an answer without its stop token."""
        ids = [int(token) for token in action_ids if int(token) not in self._stop_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def written(self, action: Action) -> str:
        """The template's own text of an answer with tool calls."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in action.tool_calls
        ]
        answer = {"role": "assistant", "content": action.text, "tool_calls": calls}
        prompt, whole = self._apply([_QUESTION]), self._apply([_QUESTION, answer], add_generation_prompt=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        return whole[same:].partition(self._tokenizer.eos_token)[0]

    def _text(self, messages: Sequence[Message]) -> str:
        turns: list[dict[str, str]] = []
        answered = False  # the last turn holds a tool's answer in the user's words
        for message in messages:
            turn = {"role": message.role, "content": self._cleaned(message)}
            answers = message.role == "tool" and not self.template_knows_tools
            if answers:
                turn = {"role": "user", "content": _RESPONSE.format(turn["content"])}
            elif message.role == "tool":
                turn["tool_call_id"] = self._markup.removed_from(message.tool_call_id)
            if answered:  # some templates refuse two turns of the user in a row
                turn["content"] = f"{turns.pop()['content']}\n{turn['content']}"
            turns.append(turn)
            answered = answers or (answered and turn["role"] == "user")
        return self._apply(turns)

    def _apply(self, turns: Sequence[dict[str, Any]], **arguments: Any) -> str:
        arguments = {"tokenize": False, "add_generation_prompt": True, **self._arguments, **arguments}
        return self._tokenizer.apply_chat_template(turns, **arguments)

    def _cleaned(self, message: Message) -> str:
        if message.role == "system":
            return message.content
        return (self._turn_markup if message.trusted else self._markup).removed_from(message.content)

    def _encode(self, text: str, begin: bool = False) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=begin), dtype=np.int32)
