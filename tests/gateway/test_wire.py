"""What a request asks for is read whatever it holds; what would make another policy is found."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steppo.gateway.wire import Answer, Call, Refused, Said, read_call

HELLO = [{"role": "user", "content": "Hello"}]
NO_ARGUMENTS = {"function": {"name": "f", "arguments": "["}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def read(**options: Any) -> Call:
    return read_call(json.dumps({"model": "policy", "messages": HELLO} | options).encode(), temperature=1.0)


@pytest.mark.parametrize(
    ("options", "overridden"),
    [
        ({}, ()),
        ({"temperature": 1, "top_p": 1.0, "n": 1, "presence_penalty": 0, "logit_bias": {}, "user": "me"}, ()),
        ({"temperature": None, "top_p": None, "response_format": None, "seed": None}, ()),
        ({"response_format": {"type": "text"}, "tool_choice": "auto", "parallel_tool_calls": True, "logprobs": False}, ()),
        ({"temperature": 0.7}, ("temperature",)),
        ({"temperature": True}, ("temperature",)),
        ({"top_p": 0.9, "n": 2}, ("n", "top_p")),
        ({"n": True}, ("n",)),
        ({"seed": 7}, ("seed",)),
        ({"response_format": {"type": "json_object"}}, ("response_format",)),
        ({"tools": [TOOL], "tool_choice": "required"}, ("tool_choice",)),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "find"}}}, ("tool_choice",)),
        ({"logprobs": True}, ("logprobs",)),
        ({"top_k": 20, "guided_regex": "a"}, ("guided_regex", "top_k")),
    ],
)
def test_what_would_make_another_policy_is_named(options: dict[str, Any], overridden: tuple[str, ...]) -> None:
    assert read(**options).overridden == overridden


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": [], "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}, *HELLO]}, "messages.0.tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}, *HELLO]},
            "messages",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": True}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"tools": [{"type": "web"}]}, "tools.0"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools",
        ),
        ({"model": 4}, "model"),
        ({"stream_options": 4}, "stream_options"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as refused:
        read(**options)
    assert refused.value.status == 400
    assert refused.value.body["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refused):
        read_call(body, 1.0)


def test_what_is_read() -> None:
    calls = [{"id": "x", "type": "function", "function": {"name": "find", "arguments": '{"b": 1, "a": 2}'}}]
    call = read(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "x", "content": "3"},
        ],
        tools=[TOOL],
        max_tokens=9,
        max_completion_tokens=5,
        stop="end",
        stream=True,
        stream_options={"include_usage": True},
    )
    assert call.messages == (
        Said("system", "Be brief."),
        Said("user", "one\ntwo"),
        Said("assistant", "", (("find", '{"a": 2, "b": 1}'),)),
        Said("tool", "3", call_id="x"),
    )
    assert (call.most_tokens, call.stop, call.stream, call.with_usage) == (5, ("end",), True, True)
    assert [tool.name for tool in call.tools] == ["find"]
    assert read(tools=[TOOL], tool_choice="none").tools == ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    [
        "role",
        "content",
        "messages",
        "tools",
        "stop",
        "tool_calls",
        "function",
        "type",
        "text",
        "arguments",
        "name",
        "n",
        "stream",
    ]
)
bodies = st.dictionaries(
    names, json_values | st.lists(st.dictionaries(names, json_values, max_size=4), max_size=3), max_size=6
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bodies, st.dictionaries(names, json_values, max_size=4))
def test_whatever_a_body_holds_there_is_a_call_or_a_refusal(body: dict[str, Any], message: dict[str, Any]) -> None:
    for given_ in (body, body | {"messages": [{"role": "user"} | message]}):
        with suppress(Refused):
            assert isinstance(read_call(json.dumps(given_).encode(), 1.0), Call)


def test_an_answer_says_the_same_in_events() -> None:
    answer = Answer("id", "Wait.", "Hm", (("call_0_0", "find", '{"b": 1, "a": 2}'),), "tool_calls", 3, 2)
    whole = answer.body("policy")
    message = whole["choices"][0]["message"]
    lines = [line.removeprefix("data: ") for line in "".join(answer.events("policy", True)).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert chunks[-1]["usage"] == whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"] == "Wait."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [{key: value for key, value in call.items() if key != "index"} for call in calls] == message["tool_calls"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, "tool_calls"]
    assert answer.said == Said("assistant", "Wait.", (("find", '{"a": 2, "b": 1}'),))
