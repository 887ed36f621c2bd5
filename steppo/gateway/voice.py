"""A call's dialogue as prompt ids, and sampled ids as an answer: by the chat template, with the call's tools."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from typing import Any

import numpy as np

from steppo.errors import ConfigError
from steppo.errors import said as told
from steppo.gateway.session import Chain, Session
from steppo.gateway.wire import Call, Refused, Said
from steppo.rendering import ActionParser, Renderer
from steppo.rendering.markup import END_THINK, THINK
from steppo.types import Action, Message, ToolCall, Turn

_MOST = 64  # sets of tools


class Voices:
    """Writes prompts and reads answers, for each set of tools that agents bring.

    Args:
        renderer: Messages -> token ids.
        parser: Reads calls of tools.
    """

    def __init__(self, renderer: Renderer, parser: ActionParser) -> None:
        self._renderer = renderer
        self._parser = parser
        self._known: dict[str, tuple[Renderer, ActionParser | None]] = {}  # no parser without tools

    def bind(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        """Takes what prompts are written with."""
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._known = {}

    def prompt(self, session: Session, chain: Chain, call: Call) -> np.ndarray:
        """The prompt of a call, int32. One that continues its chain begins with the ids of the last one and its answer."""
        renderer, _ = self._of(call)
        try:
            if chain.is_continued_by(call) and chain.last is not None:
                new = [self._message(said) for said in call.messages[len(chain.said) :]]
                return renderer.extend(chain.last.prompt_ids, chain.last, new)
            # An answer that this session got stands as it was sampled, where something stands before it.
            first, *others = call.messages
            parts = [session.answers.get(said) or self._message(said) for said in others]
            return renderer.render([self._message(first), *parts])
        except Exception as error:  # a template may refuse what it likes, in words of its own
            raise Refused(400, f"the chat template cannot write these messages: {told(error)}", param="messages") from None

    def read(self, call: Call, ids: np.ndarray) -> tuple[Action, bool]:
        """What was said, and whether it could be read: what could not is text."""
        renderer, parser = self._of(call)
        text = renderer.decode_action(ids)
        for stop in call.stop:
            text = text.partition(stop)[0]
        if parser is not None:
            action = parser.parse(text, Turn()).action
            return (Action(text=text), False) if action is None else (action, True)
        reasoning, ended, answer = text.partition(END_THINK)
        if ended and (text.lstrip().startswith(THINK) or renderer.prompt_end.rstrip().endswith(THINK)):
            return Action(text=answer.lstrip("\n"), reasoning=reasoning.replace(THINK, "", 1).strip()), True
        return Action(text=text), True

    def _message(self, said: Said) -> Message:
        """An assistant's may show the markup of answers, as it was not asked of this policy in this session."""
        if said.calls:
            calls = tuple(ToolCall(name, json.loads(arguments)) for name, arguments in said.calls)
            return Message("assistant", self._parser.answer(Action(tool_calls=calls, text=said.text), Turn()), trusted=True)
        return Message(said.role, said.text, said.call_id, trusted=said.role == "assistant")

    def _of(self, call: Call) -> tuple[Renderer, ActionParser | None]:
        if (known := self._known.get(call.tools_key)) is not None:
            return known
        renderer, parser = copy.copy(self._renderer), copy.copy(self._parser) if call.tools else None
        try:
            tools_text = parser.tools_text(call.tools) if parser else ""
            renderer.bind(self._tokenizer, self._stop_ids, call.tools, tools_text)
            if parser is not None:
                parser.bind(call.tools, renderer)
        except ConfigError as error:
            raise Refused(400, str(error), "invalid_value", "tools") from None
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[call.tools_key] = renderer, parser
        return renderer, parser
