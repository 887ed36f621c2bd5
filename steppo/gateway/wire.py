"""OpenAI's chat completions: what a request asks for, and what an answer or a refusal looks like."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from steppo.envs.checks import MOST_REWARD
from steppo.types import ToolSpec

T = TypeVar("T", bound=BaseModel)

_HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# Values of what else there is that ask for nothing, beside null; any other value would make another policy.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "top_p"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "top_logprobs"), (0,)),
    **{"logit_bias": ({},), "logprobs": (False,), "functions": ([],), "parallel_tool_calls": (True,)},
    **{"response_format": ({"type": "text"},), "tool_choice": ("auto", "none")},
}


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
            functions = [(id, {"name": name, "arguments": arguments}) for id, name, arguments in self.calls]
            message["tool_calls"] = [{"id": id, "type": "function", "function": function} for id, function in functions]
        return message

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.answer_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.answer_tokens, "total_tokens": total}


class _Function(BaseModel):
    name: Annotated[str, Field(min_length=1)]
    arguments: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(BaseModel):
    type: Literal["function"] = "function"
    function: _Function


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_Tool] | None = None
    tool_call_id: str | None = None


class _Body(BaseModel):
    """What is read of a request; what else it holds is in ``model_extra``."""

    model_config = ConfigDict(extra="allow", strict=True)
    messages: Annotated[list[_Message], Field(min_length=1, max_length=4096)]
    model: str | None = None
    tools: Annotated[list[_Tool], Field(max_length=128)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    stop: str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None


class Reward(BaseModel):
    """A reward of a session, or of the step with this answer."""

    model_config = ConfigDict(strict=True)
    reward: Annotated[float, Field(ge=-MOST_REWARD, le=MOST_REWARD)]
    success: bool | None = None
    completion: str | None = None


def read(kind: type[T], body: bytes) -> T:
    """Reads a body, whatever it holds. Raises ``Refused``."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{where or 'the body'}: {first['msg']}", "invalid_value", where or None) from None


def read_call(body: bytes, temperature: float) -> Call:
    """Reads what a request asks for, whatever it holds. Raises ``Refused``.

    Args:
        body: JSON.
        temperature: At which the run samples.
    """
    given = read(_Body, body)
    others = given.model_extra or {}
    if given.messages[-1].role == "assistant":
        raise Refused(400, "the last message must not be the assistant's: answers are not continued", param="messages")
    tools = [] if others.get("tool_choice") == "none" else given.tools or []
    specs = tuple(_spec(tool.function) for tool in tools)
    return Call(
        tuple(map(_said, given.messages)),
        specs,
        min((limit for limit in (given.max_tokens, given.max_completion_tokens) if limit is not None), default=None),
        tuple(filter(None, [given.stop] if isinstance(given.stop, str) else given.stop or [])),
        bool(given.stream),
        bool((given.stream_options or {}).get("include_usage")),
        tuple(sorted(it for it in others.keys() - _HARMLESS if not _is_neutral(it, others[it], temperature))),
        _sorted([spec.schema for spec in specs]),
    )


def _is_neutral(name: str, value: Any, temperature: float) -> bool:
    if value is None:
        return True
    if name == "temperature":
        return not isinstance(value, bool) and value == temperature
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL.get(name, ()))


def _said(message: _Message) -> Said:
    role = "system" if message.role == "developer" else message.role
    content = message.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    calls = tuple((call.function.name, _sorted(_arguments(call.function))) for call in message.tool_calls or ())
    return Said(role, text, calls if role == "assistant" else (), message.tool_call_id or "")


def _arguments(function: _Function) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        if isinstance(arguments := json.loads(function.arguments or "{}"), dict):
            return arguments
    raise Refused(400, "the arguments of a tool call must be a JSON object, as text", "invalid_value", "messages")


def _spec(function: _Function) -> ToolSpec:
    parameters = function.parameters or {"type": "object", "properties": {}}
    if parameters.get("type") != "object":
        raise Refused(400, 'the parameters of a tool must be a JSON schema with "type": "object"', "invalid_value", "tools")
    return ToolSpec(function.name, function.description or "", parameters)


def _sorted(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
