"""Action parsers: the policy's text -> a command for the environment, or feedback that says why not."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from steppo.types import Observation

_LONGEST_QUOTE = 60
_MOST_OBJECTS = 16  # each attempt may read to the end of the text: their number keeps the whole linear
_UNSENDABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and what UTF-8 cannot hold

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
ANSWER_MARKUP = (_THINK, _END_THINK, _CALL, _END_CALL)  # what a policy writes itself, so that feedback may show it


@dataclass(frozen=True)
class ParsedAction:
    """``command`` for the environment; ``None`` when the text is refused, with ``feedback`` for the next prompt."""

    command: str | None
    feedback: str = ""


class ActionParser(ABC):
    """Reads a command out of what the policy said. Never raises: whatever the text, there is an answer."""

    @abstractmethod
    def parse(self, text: str, observation: Observation) -> ParsedAction:
        """Parses ``text``, said on seeing ``observation``."""

    def answer(self, command: str) -> str:
        """What a policy should say to give ``command``: ``parse`` reads it back."""
        return command


class CommandParser(ActionParser):
    """The whole answer is one line, the command. Where commands are listed, it must be one of them.

    Thinking before it is dropped: all up to ``</think>``, which the prompt may have opened already.
    """

    def parse(self, text: str, observation: Observation) -> ParsedAction:
        answer = text.rpartition(_END_THINK)[2].strip()
        if answer.startswith(_THINK):
            return ParsedAction(None, f"End your thinking with {_END_THINK}, then answer with one command on one line.")
        if len(answer.splitlines()) != 1:
            return ParsedAction(None, "Answer with one command on one line.")
        return _checked(answer, observation)


class ToolCallParser(ActionParser):
    """The answer is a tool call as Hermes and Qwen models write it, after thinking or without.

    The call ``{"name": "act", "arguments": {"command": "go east"}}`` between ``<tool_call>`` and ``</tool_call>`` gives the
    command ``go east``. Where commands are listed, it must be one of them. Words around the call, code fences, missing tags,
    thinking without its end and arguments that are a string of JSON are put up with. What is not JSON is not mended, and
    nothing is ever evaluated.

    Args:
        name: The tool.
        argument: Its argument that holds the command; others are ignored.
        strict: Refuse what is not exactly in the form.
    """

    def __init__(self, name: str = "act", argument: str = "command", strict: bool = False) -> None:
        self.name = name
        self.argument = argument
        self.strict = strict

    def parse(self, text: str, observation: Observation) -> ParsedAction:
        try:
            exact = _exact_call(text)
            command = self._command(_find_call(text) if exact is None else exact)
            if self.strict and exact is None:
                raise _Refused("The answer is not exactly one tool call in the form that is asked for.")
        except _Refused as refused:
            return ParsedAction(None, f"{refused} Answer with\n{self.answer('...')}")
        return _checked(command, observation)

    def answer(self, command: str) -> str:
        call = {"name": self.name, "arguments": {self.argument: command}}
        return f"{_CALL}\n{json.dumps(call, ensure_ascii=False)}\n{_END_CALL}"

    def _command(self, call: dict[str, Any]) -> str:
        if not isinstance(call["name"], str):
            raise _Refused('The "name" of the tool call must be a string.')
        if call["name"] != self.name:
            raise _Refused(f"There is no tool '{_quotable(call['name'])}', only '{self.name}'.")
        if "arguments" not in call:
            raise _Refused('The tool call has no "arguments".')
        arguments = call["arguments"]
        if isinstance(arguments, str):
            arguments, _ = _decode(arguments.strip(), what='string of "arguments"')
        if not isinstance(arguments, dict):
            raise _Refused('The "arguments" of the tool call must be a JSON object.')
        if self.argument not in arguments:
            raise _Refused(f"The tool call has no argument '{self.argument}'.")
        if not isinstance(arguments[self.argument], str):
            raise _Refused(f"The argument '{self.argument}' must be a string.")
        return arguments[self.argument]


class _Refused(Exception):
    """What is wrong with an answer, as a sentence."""


def _checked(command: str, observation: Observation) -> ParsedAction:
    """The command as the environment spells it, or that it is not possible."""
    command = _plain(command)
    if observation.admissible_commands is None:
        if command and not _UNSENDABLE.search(command):
            return ParsedAction(command)
    else:
        if command in observation.admissible_commands:
            return ParsedAction(command)
        for candidate in observation.admissible_commands:
            if _plain(candidate).lower() == command.lower():
                return ParsedAction(candidate)
    return ParsedAction(None, f"'{_quotable(command)}' is not possible here.")


def _plain(command: str) -> str:
    return " ".join(command.split())


def _quotable(text: str) -> str:
    return _UNSENDABLE.sub("?", text[:_LONGEST_QUOTE])


def _exact_call(text: str) -> dict[str, Any] | None:
    """The call of an answer that keeps to the form; ``None`` otherwise."""
    answer = text.strip()
    if not answer.startswith(_CALL):
        answer = answer.partition(_END_THINK)[2].strip()
    if not (answer.startswith(_CALL + "\n{") and answer.endswith("}\n" + _END_CALL)):
        return None
    inside = answer[len(_CALL) + 1 : -len(_END_CALL) - 1]
    try:
        call, end = _decode(inside)
    except _Refused:
        return None
    exact = end == len(inside) and call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict)
    return call if exact else None


def _find_call(text: str) -> dict[str, Any]:
    """The only JSON object with a ``name`` behind the thinking and the first opening tag, as far as there are these."""
    answer = text.rpartition(_END_THINK)[2]
    calls: list[dict[str, Any]] = []
    problem: Exception | None = None
    at = answer.find("{", max(answer.find(_CALL), 0))
    for _ in range(_MOST_OBJECTS):
        if at < 0:
            break
        end = at + 1
        try:
            found, end = _decode(answer, at)
            if "name" not in found:
                raise _Refused('The tool call has no "name".')
            calls.append(found)
        except _Refused as refused:
            problem = problem or refused
        at = answer.find("{", end)
    if len(calls) == 1:
        return calls[0]
    if calls:
        raise _Refused("There is more than one tool call.")
    if problem:
        raise problem
    if _CALL in answer:
        raise _Refused(f"There is no JSON object behind {_CALL}.")
    if _END_THINK in text:
        raise _Refused(f"There is no tool call behind {_END_THINK}.")
    if text.lstrip().startswith(_THINK):
        raise _Refused(f"The thinking does not end with {_END_THINK}, and there is no tool call.")
    raise _Refused("There is no tool call.")


def _refuse_constant(name: str) -> None:
    raise _Refused(f"There is no {name} in JSON.")


# Numbers are not used; as integers, long ones would raise.
_DECODER = json.JSONDecoder(parse_int=float, parse_constant=_refuse_constant)


def _decode(text: str, start: int = 0, what: str = "tool call") -> tuple[Any, int]:
    """The JSON value that begins at ``start``, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _Refused(f"The {what} is not valid JSON: {error.msg} (character {error.pos - start + 1}).") from None
    except RecursionError:
        raise _Refused(f"The {what} is nested too deeply.") from None
