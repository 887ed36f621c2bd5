"""OpenAI's chat completions: what a request asks for, and what an answer or a refusal looks like."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from steppo.types import ToolSpec

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# Read here, or without a meaning for what is sampled.
_READ = {"messages", "model", "tools", "stream", "stream_options", "stop", "max_tokens", "max_completion_tokens"}
_HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# Values of the others that ask for nothing, beside null; any other value would make another policy.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "functions": ([],),
}
_MOST_STOPS = 4
_MOST_MESSAGES, _MOST_TOOLS = 4096, 128


class Refused(Exception):
    """A call that is answered with an error, in OpenAI's shape.

    Args:
        status: Of HTTP.
        message: What is wrong.
        code: For programs.
        param: The parameter that is wrong.
        retry_after: Seconds after which to try again; without it a client is told not to.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        self.status = status
        self.code = code
        error = {"message": message, "type": kind.get(status, "invalid_request_error"), "param": param, "code": code}
        self.body = {"error": error}
        self.headers = {"x-should-retry": "false"} if retry_after is None else {"retry-after": f"{max(1, retry_after):.0f}"}


@dataclass(frozen=True)
class Said:
    """A message of a dialogue, so that equal ones are equal: calls are name and arguments, in JSON with sorted keys."""

    role: str
    text: str
    calls: tuple[tuple[str, str], ...] = ()
    call_id: str = ""


@dataclass(frozen=True)
class Call:
    """A request for a completion.

    Attributes:
        messages: The dialogue.
        tools: What may be called.
        most_tokens: Most tokens of the answer, if it says so.
        stop: Texts that end the answer.
        stream: The answer is wanted as events.
        with_usage: At their end, tokens are counted.
        overridden: Parameters that would make another policy.
    """

    messages: tuple[Said, ...]
    tools: tuple[ToolSpec, ...] = ()
    most_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    with_usage: bool = False
    overridden: tuple[str, ...] = ()
    tools_key: str = field(default="[]", repr=False)


@dataclass(frozen=True)
class Answer:
    """What the policy said, for the agent. ``calls``: id, name, arguments in JSON."""

    id: str
    text: str
    reasoning: str
    calls: tuple[tuple[str, str, str], ...]
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int

    @property
    def said(self) -> Said:
        """As it will stand in the next call's dialogue."""
        return Said(
            "assistant", self.text, tuple((name, _sorted(json.loads(arguments))) for _, name, arguments in self.calls)
        )

    def body(self, model: str) -> dict[str, Any]:
        """In one piece."""
        message = {"role": "assistant", "refusal": None, **self._message()}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        return self._head(model, "chat.completion") | {"choices": [choice], "usage": self._usage()}

    def events(self, model: str, with_usage: bool) -> Iterator[str]:
        """The same as server-sent events."""
        head = self._head(model, "chat.completion.chunk") | ({"usage": None} if with_usage else {})
        message = self._message()
        calls = [call | {"index": number} for number, call in enumerate(message.pop("tool_calls", []))]
        content = {"content": message.pop("content") or ""}
        deltas = [{"role": "assistant", **content, **message}, *({"tool_calls": [call]} for call in calls), {}]
        for delta in deltas:
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else self.finish_reason, "logprobs": None}
            yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
        if with_usage:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': self._usage()})}\n\n"
        yield "data: [DONE]\n\n"

    def _head(self, model: str, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": model}

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"content": self.text if self.text or not self.calls else None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for id, name, arguments in self.calls
            ]
        return message

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.answer_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.answer_tokens, "total_tokens": total}


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a character cannot be written to a prompt
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not valid JSON in UTF-8", "invalid_json") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object", "invalid_json")
    return value


def read_call(given: Mapping[str, Any], temperature: float) -> Call:
    """Reads what a request asks for, whatever it holds. Raises ``Refused``.

    Args:
        given: Its body.
        temperature: At which the run samples.
    """
    if not isinstance(given.get("model", ""), str):
        raise _wrong("model", "a string")
    messages = _list(given, "messages", _MOST_MESSAGES)
    if not messages:
        raise _wrong("messages", "a list of at least one message")
    said = tuple(_said(f"messages[{number}]", message) for number, message in enumerate(messages))
    if said[-1].role == "assistant":
        raise Refused(400, "the last message must not be the assistant's: answers are not continued", param="messages")
    tools = _list(given, "tools", _MOST_TOOLS)
    specs = tuple(_tool(f"tools[{number}]", tool) for number, tool in enumerate(tools))
    if given.get("tool_choice") == "none":
        specs = ()
    limits = [_count(given, name) for name in ("max_tokens", "max_completion_tokens")]
    options = given.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _wrong("stream_options", "an object")
    overridden = [
        name for name in sorted(given.keys() - _READ - _HARMLESS) if not _is_neutral(name, given[name], temperature)
    ]
    return Call(
        said,
        specs,
        min((limit for limit in limits if limit is not None), default=None),
        _stops(given.get("stop")),
        bool(given.get("stream")),
        bool(options.get("include_usage")),
        tuple(overridden),
        _sorted([spec.schema for spec in specs]),
    )


def _is_neutral(name: str, value: Any, temperature: float) -> bool:
    if value is None:
        return True
    if name == "temperature":
        return not isinstance(value, bool) and value == temperature
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL.get(name, ()))


def _wrong(param: str, wanted: str) -> Refused:
    return Refused(400, f"{param} must be {wanted}", "invalid_value", param)


def _list(given: Mapping[str, Any], name: str, most: int) -> list[Any]:
    value = given.get(name)
    value = [] if value is None else value
    if not isinstance(value, list) or len(value) > most:
        raise _wrong(name, f"a list of at most {most}")
    return value


def _count(given: Mapping[str, Any], name: str) -> int | None:
    value = given.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise _wrong(name, "a whole number of at least 1")
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong("stop", f"a text or a list of at most {_MOST_STOPS}, none of them empty")
    return tuple(stops)


def _said(where: str, message: Any) -> Said:
    if not isinstance(message, dict):
        raise _wrong(where, "an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{where}.role", "one of " + ", ".join(_ROLES))
    text = _content(f"{where}.content", message.get("content"))
    call_id = message.get("tool_call_id") or ""
    if not isinstance(call_id, str):
        raise _wrong(f"{where}.tool_call_id", "a string")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise _wrong(f"{where}.tool_calls", "a list, of an assistant's message")
    return Said(
        _ROLES[role], text, tuple(_tool_call(f"{where}.tool_calls[{n}]", call) for n, call in enumerate(calls)), call_id
    )


def _content(where: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _wrong(where, "a text or a list of parts")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _wrong(where, "text: parts of other types are not supported")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_call(where: str, call: Any) -> tuple[str, str]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(where, "an object with a function that has a name")
    try:
        arguments = json.loads(function.get("arguments") or "{}", parse_constant=_refuse_constant)
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise _wrong(f"{where}.function.arguments", "a JSON object, as text")
    return function["name"], _sorted(arguments)


def _tool(where: str, tool: Any) -> ToolSpec:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise _wrong(where, 'of type "function", with a function that has a name')
    description = function.get("description") or ""
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(description, str) or not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise _wrong(f"{where}.function", 'one with a text as description and a JSON schema with "type": "object"')
    return ToolSpec(function["name"], description, parameters)


def _sorted(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
