"""Tool calls in JSON: read out of an answer, whatever it holds. Nothing is ever evaluated."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match

from steppo.errors import ConfigError, said
from steppo.rendering.markup import CALL, END_CALL, END_THINK, THINK
from steppo.rendering.parsers import LONGEST_QUOTE, ActionParser, ParsedAction, parsed_command, quotable
from steppo.rendering.renderer import Renderer
from steppo.types import Action, ToolCall, ToolSpec, Turn

_MOST_CALLS = 16  # each attempt may read to the end of the text: their number keeps the whole linear
_DEEPEST = 16
_MOST_DIGITS = 300

_OPENED = re.compile(rf"^(?:\s|{THINK})+")  # by the policy, however often

_PROBE = ToolCall("find", {"what": 'it\'s "here"\n', "most": 3}, "call_0")

_TOOLS_TEXT = """\
You may call tools. Their schemas, one on each line:
<tools>
{schemas}
</tools>
For each call, write a JSON object with the tool's name and arguments:
{form}
The results come in <tool_response> </tool_response>. When you are done, answer without a call."""


class HermesParser(ActionParser):
    """Calls of the environment's tools, as Hermes, Qwen2.5, Qwen3 and SmolLM2 models write them.

    A call is ``{"name": "search", "arguments": {"query": "steps"}}`` between ``<tool_call>`` and ``</tool_call>``. There may
    be several, one after the other or as a list in one pair of tags. Words before them are ``Action.text``; an answer
    without a call is words only, such as a final answer. Thinking is ``Action.reasoning``.

    Arguments are checked against the tool's schema. If anything in an answer is wrong, none of its calls is made, and the
    feedback says what is wrong. A call whose end is cut counts if its JSON is whole.
    """

    _thinks_already = False  # the prompt opens the thinking

    def bind(self, tools: Sequence[ToolSpec], renderer: Renderer) -> None:
        if not tools:
            raise ConfigError("HermesParser reads calls of tools, and the environment has none: use CommandParser")
        self._schemas = {tool.name: _validator(tool) for tool in tools}
        self._thinks_already = renderer.prompt_end.rstrip().endswith(THINK)
        if renderer.template_knows_tools and not self._reads(renderer):
            raise ConfigError(
                f"the chat template writes tool calls in a form that HermesParser does not read ({CALL}, JSON, {END_CALL}): "
                "name a parser of its form as data.source.parser"
            )

    @staticmethod
    def _reads(renderer: Renderer) -> bool:
        try:
            answer = renderer.written(Action(tool_calls=(_PROBE,)))
            return _calls(answer.rpartition(END_THINK)[2])[1] == [_PROBE]
        except Exception:  # a template may refuse calls in words of its own
            return False

    def tools_text(self, tools: Sequence[ToolSpec]) -> str:
        schemas = "\n".join(json.dumps(tool.schema, ensure_ascii=False) for tool in tools)
        return _TOOLS_TEXT.format(schemas=schemas, form=_written("...", {}).replace("{}", "{...}"))

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        reasoning, ended, answer = "", "", text
        try:
            _require_plain(text)
            if self._thinks_already or text.lstrip().startswith(THINK):
                reasoning, ended, answer = text.partition(END_THINK)
                if not ended:
                    raise _Refused(f"The thinking does not end with {END_THINK}.")
            words, calls = _calls(answer)
            for number, call in enumerate(calls, start=1):
                self._check(call, f"tool call {number}" if len(calls) > 1 else "tool call")
            if not calls and not words:
                raise _Refused("The answer is empty.")
        except _Refused as refused:
            return ParsedAction(None, str(refused))
        return ParsedAction(Action(None, tuple(calls), words, _OPENED.sub("", reasoning).rstrip()))

    def _check(self, call: ToolCall, what: str) -> None:
        if call.name not in self._schemas:
            raise _Refused(f"The {what} names '{quotable(call.name)}', and there is no such tool.")
        error = best_match(self._schemas[call.name].iter_errors(call.arguments))
        if error is not None:
            where = f" at {'.'.join(map(str, error.absolute_path))}" if error.absolute_path else ""
            raise _Refused(f"The arguments of {what} are wrong{quotable(where)}: {_shortened(error.message)}.")

    def answer(self, action: Action, turn: Turn) -> str:
        calls = (_written(call.name, call.arguments) for call in action.tool_calls)
        said = action.text or ("" if action.tool_calls else action.command)
        answer = "\n".join(part for part in (said, *calls) if part)
        if self._thinks_already or action.reasoning:
            opened = "" if self._thinks_already else f"{THINK}\n"
            answer = f"{opened}{action.reasoning}\n{END_THINK}\n\n{answer}"
        return answer


class ToolCallParser(ActionParser):
    """A command in a tool call, for environments that take commands, after thinking or without.

    The call ``{"name": "act", "arguments": {"command": "go east"}}`` between ``<tool_call>`` and ``</tool_call>`` gives the
    command ``go east``. Where commands are listed, it must be one of them. Words around the call, code fences, missing tags,
    thinking without its end and arguments that are a string of JSON are put up with. What is not JSON is not mended.

    Args:
        name: The tool.
        argument: Its argument that holds the command; others are ignored.
        strict: Refuse what is not exactly in the form.
    """

    def __init__(self, name: str = "act", argument: str = "command", strict: bool = False) -> None:
        self.name = name
        self.argument = argument
        self.strict = strict

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        try:
            exact = _exact_call(text)
            command = self._command(_find_call(text) if exact is None else exact)
            if self.strict and exact is None:
                raise _Refused("The answer is not exactly one tool call in the form that is asked for.")
        except _Refused as refused:
            return ParsedAction(None, f"{refused} Answer with\n{self._written('...')}")
        return parsed_command(command, turn)

    def answer(self, action: Action, turn: Turn) -> str:
        return self._written(str(action))

    def _written(self, command: str) -> str:
        return _written(self.name, {self.argument: command})

    def _command(self, call: dict[str, Any]) -> str:
        if not isinstance(call["name"], str):
            raise _Refused('The "name" of the tool call must be a string.')
        if call["name"] != self.name:
            raise _Refused(f"There is no tool '{quotable(call['name'])}', only '{self.name}'.")
        arguments = _arguments(call)
        if self.argument not in arguments:
            raise _Refused(f"The tool call has no argument '{self.argument}'.")
        if not isinstance(arguments[self.argument], str):
            raise _Refused(f"The argument '{self.argument}' must be a string.")
        return arguments[self.argument]


class _Refused(Exception):
    """What is wrong with an answer, as a sentence."""


def _validator(tool: ToolSpec) -> Draft202012Validator:
    """Checks arguments of the tool, whatever they are, without an error of its own."""
    schema = tool.schema["function"]["parameters"]
    validator = Draft202012Validator(schema)
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"the schema of the tool {tool.name} is wrong: {error.message}") from None
    for reference in _references(schema):
        try:
            if not reference.startswith("#"):
                raise LookupError("it is not a part of the schema")
            list(validator.evolve(schema={"$ref": reference}).iter_errors(None))
        except Exception as error:
            raise ConfigError(f"the schema of the tool {tool.name} refers to {reference}: {said(error)}") from None
    return validator


def _references(schema: Any) -> Iterator[str]:
    """What a schema refers to."""
    if isinstance(schema, dict):
        for name in ("$ref", "$dynamicRef"):
            if isinstance(reference := schema.get(name), str):
                yield reference
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _references(part)


def _written(name: str, arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{CALL}\n{call}\n{END_CALL}"


def _calls(answer: str) -> tuple[str, list[ToolCall]]:
    """The words before the first call, and all calls: blocks of one object or a list of them."""
    words, tag, rest = answer.partition(CALL)
    found: list[Any] = []
    blocks = 0
    while tag:
        value, end = _decode(rest, len(rest) - len(rest.lstrip()))
        found += value if isinstance(value, list) else [value]
        blocks += 1
        if max(len(found), blocks) > _MOST_CALLS:
            raise _Refused(f"There are more than {_MOST_CALLS} tool calls.")
        between, tag, rest = rest[end:].lstrip().removeprefix(END_CALL).partition(CALL)
        if (tag or not END_CALL.startswith(between.strip())) and between.strip():
            raise _Refused("There are words behind a tool call; write them before the first.")
    calls = []
    for number, call in enumerate(found):
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise _Refused('A tool call must be a JSON object with a "name" that is a string.')
        arguments = _arguments(call)
        _require_plain(arguments)
        calls.append(ToolCall(call["name"], arguments, f"call_{number}"))
    return words.strip(), calls


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "arguments" not in call:
        raise _Refused('The tool call has no "arguments".')
    arguments = call["arguments"]
    if isinstance(arguments, str):
        arguments, _ = _decode(arguments.strip(), what='string of "arguments"')
    if not isinstance(arguments, dict):
        raise _Refused('The "arguments" of the tool call must be a JSON object.')
    return arguments


def _require_plain(value: Any, depth: int = 0) -> None:
    """What can be sent, written and counted with."""
    if depth > _DEEPEST:
        raise _Refused("The tool call is nested too deeply.")
    if isinstance(value, float) and not math.isfinite(value):
        raise _Refused("A number in the tool call is too large.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Refused("The answer has half a character in it.") from None
    elif isinstance(value, dict | list):
        for entry in [*value, *value.values()] if isinstance(value, dict) else value:
            _require_plain(entry, depth + 1)


def _shortened(message: str) -> str:
    """A validator's message quotes what the policy gave, at any length, and ends with what is wrong."""
    first, last = quotable(message), quotable(message[len(quotable(message)) :][-LONGEST_QUOTE:])
    return first + ("..." if len(message) > len(first + last) else "") + last


def _exact_call(text: str) -> dict[str, Any] | None:
    """The call of an answer that keeps to the form; ``None`` otherwise."""
    answer = text.strip()
    if not answer.startswith(CALL):
        answer = answer.partition(END_THINK)[2].strip()
    if not (answer.startswith(CALL + "\n{") and answer.endswith("}\n" + END_CALL)):
        return None
    inside = answer[len(CALL) + 1 : -len(END_CALL) - 1]
    try:
        call, end = _decode(inside)
    except _Refused:
        return None
    exact = end == len(inside) and call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict)
    return call if exact else None


def _find_call(text: str) -> dict[str, Any]:
    """The only JSON object with a ``name`` behind the thinking and the first opening tag, as far as there are these."""
    answer = text.rpartition(END_THINK)[2]
    calls: list[dict[str, Any]] = []
    problem: Exception | None = None
    at = answer.find("{", max(answer.find(CALL), 0))
    for _ in range(_MOST_CALLS):
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
    if CALL in answer:
        raise _Refused(f"There is no JSON object behind {CALL}.")
    if END_THINK in text:
        raise _Refused(f"There is no tool call behind {END_THINK}.")
    if text.lstrip().startswith(THINK):
        raise _Refused(f"The thinking does not end with {END_THINK}, and there is no tool call.")
    raise _Refused("There is no tool call.")


def _refuse_constant(name: str) -> None:
    raise _Refused(f"There is no {name} in JSON.")


def _whole_number(digits: str) -> int | float:
    return (
        int(digits) if len(digits.lstrip("-")) <= _MOST_DIGITS else math.inf
    )  # int may raise, and so may float on what it gives


_DECODER = json.JSONDecoder(parse_int=_whole_number, parse_constant=_refuse_constant)


def _decode(text: str, start: int = 0, what: str = "tool call") -> tuple[Any, int]:
    """The JSON value that begins at ``start``, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _Refused(f"The {what} is not valid JSON: {error.msg} (character {error.pos - start + 1}).") from None
    except RecursionError:
        raise _Refused(f"The {what} is nested too deeply.") from None
