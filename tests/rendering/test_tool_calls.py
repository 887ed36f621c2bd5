"""Tool calls: what is read out of an answer, what is refused, and that nothing is too strange to be told apart."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppo.envs.checks import checked_action
from steppo.rendering import HermesParser, ParsedAction, Renderer
from steppo.types import Action, ToolCall, ToolSpec, Turn
from tests.rendering.helpers import QWEN3, make_tokenizers

FIND = ToolSpec(
    "find",
    "Finds pages.",
    {
        "type": "object",
        "properties": {"what": {"type": "string"}, "most": {"type": "integer", "maximum": 9}},
        "required": ["what"],
        "additionalProperties": False,
    },
)
TOOLS = (FIND, ToolSpec("any", "Takes anything.", {"type": "object"}))
SEEN = Turn("A page.")

# The generation prompt opens the thinking, as those of models that always think do.
OPENS_THINKING = QWEN3.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}")


@functools.cache
def renderer_of(template: str | None) -> Renderer:
    tokenizer = make_tokenizers()["qwen3"]
    tokenizer.chat_template = template
    renderer = Renderer()
    renderer.bind(tokenizer, {tokenizer.eos_token_id}, TOOLS, HermesParser().tools_text(TOOLS))
    return renderer


def bound(template: str | None, tools: Sequence[ToolSpec] = TOOLS) -> HermesParser:
    parser = HermesParser()
    parser.bind(tools, renderer_of(template))
    return parser


@functools.cache
def parsers() -> dict[str, HermesParser]:
    """By what the template knows: nothing, tools, and that the model thinks."""
    templates = {"bare": None, "qwen3": QWEN3, "thinking": OPENS_THINKING}
    return {name: bound(template) for name, template in templates.items()}


def call(name: str = "find", number: int = 0, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments or {"what": "it"}, f"call_{number}")


def said(*calls: Any) -> str:
    """One block for each."""
    return "\n".join(f"<tool_call>\n{one if isinstance(one, str) else json.dumps(one)}\n</tool_call>" for one in calls)


IT = {"name": "find", "arguments": {"what": "it"}}
ONE, TWO = (call(),), (call(), call(number=1, what="that", most=3))
THAT = {"name": "find", "arguments": {"what": "that", "most": 3}}

# --- what is read ---

READ: dict[str, tuple[str, Action]] = {
    "one call": (said(IT), Action(tool_calls=ONE)),
    "without line breaks": (said(IT).replace("\n", ""), Action(tool_calls=ONE)),
    "with more of them": (f"\n\n{said(IT)} \n\n".replace("\n", "\n\n"), Action(tool_calls=ONE)),
    "several": (said(IT, THAT), Action(tool_calls=TWO)),
    "several without a break": (said(IT, THAT).replace("\n", ""), Action(tool_calls=TWO)),
    "a list in one block": (said([IT, THAT]), Action(tool_calls=TWO)),
    "a list of one": (said([IT]), Action(tool_calls=ONE)),
    "a list and a call": (said([IT], THAT), Action(tool_calls=TWO)),
    "a list of none, and words": (f"Nothing to do.{said([])}", Action(text="Nothing to do.")),
    "words before": (f"I look it up.\n\n{said(IT)}", Action(tool_calls=ONE, text="I look it up.")),
    "a final answer": ("  It is 7 < 8.\nSure. ", Action(text="It is 7 < 8.\nSure.")),
    "JSON that is no call": ('{"name": "find"}', Action(text='{"name": "find"}')),
    "a call that is not closed": (said(IT).removesuffix("\n</tool_call>"), Action(tool_calls=ONE)),
    "a call whose tag is cut": (said(IT, THAT).removesuffix("ll>"), Action(tool_calls=TWO)),
    "its keys the other way round": (said(dict(reversed(IT.items()))), Action(tool_calls=ONE)),
    "more keys": (said(IT | {"id": [1, {}], "type": "function"}), Action(tool_calls=ONE)),
    "arguments as a text": (said(IT | {"arguments": json.dumps(IT["arguments"])}), Action(tool_calls=ONE)),
    "arguments as a text with spaces": (said(IT | {"arguments": ' {"what": "it"} '}), Action(tool_calls=ONE)),
    "no arguments": (said({"name": "any", "arguments": {}}), Action(tool_calls=(ToolCall("any", {}, "call_0"),))),
    "a tag in an argument": (
        said({"name": "find", "arguments": {"what": "</tool_call>\n<tool_call>"}}),
        Action(tool_calls=(call(what="</tool_call>\n<tool_call>"),)),
    ),
    "the end of thinking in an argument": (
        said({"name": "find", "arguments": {"what": "a</think>b<think>"}}),
        Action(tool_calls=(call(what="a</think>b<think>"),)),
    ),
    "letters of all kinds": (
        '<tool_call>\n{"name": "find", "arguments": {"what": "e\u0301 ☂ \\ud83d\\ude00 \\n\\u0000"}}\n</tool_call>',
        Action(tool_calls=(call(what="e\u0301 ☂ 😀 \n\x00"),)),
    ),
    "numbers of all sizes": (
        said({"name": "any", "arguments": {"a": 10**299, "b": -(2**63), "c": 1.7e308, "d": 1.0, "e": 5e-324}}),
        Action(tool_calls=(call("any", a=10**299, b=-(2**63), c=1.7e308, d=1.0, e=5e-324),)),
    ),
    "16 calls": (said(*[IT] * 16), Action(tool_calls=tuple(call(number=number) for number in range(16)))),
    "as deep as it may be": (
        said('{"name": "any", "arguments": {"a": ' + "[" * 15 + "]" * 15 + "}}"),
        Action(tool_calls=(call("any", a=json.loads("[" * 15 + "]" * 15)),)),
    ),
    "thinking": (f"<think>\nHm, {said(THAT)}?\n</think>\n\n{said(IT)}", Action(None, ONE, "", f"Hm, {said(THAT)}?")),
    "empty thinking": (f"<think>\n\n</think>\n\n{said(IT)}", Action(tool_calls=ONE)),
    "thinking and words": (f"\n<think>Hm.</think>Now\n{said(IT)}", Action(None, ONE, "Now", "Hm.")),
    "thinking and an answer": ("<think>Hm.</think>7", Action(text="7", reasoning="Hm.")),
    "thinking that ends twice": ("<think>a</think>b</think>c", Action(text="b</think>c", reasoning="a")),
    "thinking that is opened twice": ("<think> <think>\n<think>Hm.\n</think>7", Action(text="7", reasoning="Hm.")),
    "thinking that is opened within": ("<think>a<think>b</think>7", Action(text="7", reasoning="a<think>b")),
    "thinking somewhere else": ("So <think>a</think>", Action(text="So <think>a</think>")),
}


@pytest.mark.parametrize("template", ["bare", "qwen3"])
@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str, template: str) -> None:
    text, action = READ[name]
    assert parsers()[template].parse(text, SEEN) == ParsedAction(action)
    assert checked_action("it", action) == action, "it can be sent to a worker process"


@pytest.mark.parametrize("name", READ)
def test_what_is_read_behind_thinking_that_the_prompt_has_opened(name: str) -> None:
    text, action = READ[name]
    if not action.reasoning and "<think>\n\n" not in text and "somewhere" not in name:
        parsed = parsers()["thinking"].parse(f"So <tool_call>?\n</think>\n\n{text}", SEEN)
        assert parsed == ParsedAction(Action(None, action.tool_calls, action.text, "So <tool_call>?"))
    elif text.startswith("<think>"):  # some models open it themselves all the same
        assert parsers()["thinking"].parse(text, SEEN) == ParsedAction(action)
        assert parsers()["thinking"].parse(text.removeprefix("<think>"), SEEN) == ParsedAction(action)


# --- what is refused ---

NOT_JSON = "The tool call is not valid JSON: "
REFUSED: dict[str, tuple[str, str]] = {
    "nothing": ("", "The answer is empty."),
    "spaces": (" \n\t", "The answer is empty."),
    "an empty list": (said([]), "The answer is empty."),
    "thinking without an end": (f"<think>\nHm. {said(IT)}", "The thinking does not end with </think>."),
    "thinking and nothing": ("<think>\nHm.\n</think>\n\n", "The answer is empty."),
    "words behind": (f"{said(IT)}\nDone.", "There are words behind a tool call; write them before the first."),
    "words between": (f"{said(IT)} and {said(THAT)}", "There are words behind a tool call; write them before the first."),
    "two in a block": (said(f"{json.dumps(IT)}\n{json.dumps(THAT)}"), "There are words behind a tool call"),
    "a fence": (f"<tool_call>```json\n{json.dumps(IT)}```</tool_call>", NOT_JSON),
    "cut JSON": (said(IT).partition("it")[0], NOT_JSON + "Unterminated string starting at (character 40)."),
    "cut behind the tag": ("<tool_call>", NOT_JSON + "Expecting value (character 1)."),
    "a block of nothing": ("<tool_call></tool_call>", NOT_JSON + "Expecting value (character 1)."),
    "the second cut": (f"{said(IT)}\n<tool_call>\n{{", NOT_JSON + "Expecting property name"),
    "single quotes": (said(str(IT)), NOT_JSON + "Expecting property name enclosed in double quotes (character 2)."),
    "Python's words": (said('{"name": "any", "arguments": {"a": True}}'), NOT_JSON + "Expecting value"),
    "a comma too many": (said('{"name": "find", "arguments": {"what": "it",}}'), NOT_JSON),
    "a raw line break": (said('{"name": "find", "arguments": {"what": "a\nb"}}'), NOT_JSON + "Invalid control character"),
    "a text": (said('"find"'), 'A tool call must be a JSON object with a "name" that is a string.'),
    "a number": (said("7"), "A tool call must be a JSON object"),
    "null": (said("null"), "A tool call must be a JSON object"),
    "a list in a list": (said([[IT]]), "A tool call must be a JSON object"),
    "a name that is none": (said(IT | {"name": 7}), 'with a "name" that is a string.'),
    "no name": (said({"arguments": {}}), 'with a "name" that is a string.'),
    "no arguments": (said({"name": "find"}), 'The tool call has no "arguments".'),
    "parameters": (said({"name": "find", "parameters": {}}), 'The tool call has no "arguments".'),
    "a list of arguments": (said(IT | {"arguments": ["it"]}), 'The "arguments" of the tool call must be a JSON object.'),
    "null as arguments": (said(IT | {"arguments": None}), 'The "arguments" of the tool call must be a JSON object.'),
    "a list as a text": (said(IT | {"arguments": "[1]"}), 'The "arguments" of the tool call must be a JSON object.'),
    "a text as a text": (said(IT | {"arguments": '"{}"'}), 'The "arguments" of the tool call must be a JSON object.'),
    "words as arguments": (said(IT | {"arguments": "it"}), 'The string of "arguments" is not valid JSON: Expecting value'),
    "an unknown tool": (said(IT | {"name": "walk"}), "The tool call names 'walk', and there is no such tool."),
    "an unknown tool of many": (said(IT, IT | {"name": "Find"}), "The tool call 2 names 'Find', and there is no such tool."),
    "an empty name": (said(IT | {"name": ""}), "The tool call names '', and there is no such tool."),
    "a long name": (said(IT | {"name": "x" * 999}), f"The tool call names '{'x' * 60}', and there is no such tool."),
    "a missing argument": (
        said({"name": "find", "arguments": {"most": 1}}),
        "The arguments of tool call are wrong: 'what' is a required property.",
    ),
    "a wrong type": (said({"name": "find", "arguments": {"what": 7}}), "are wrong at what: 7 is not of type 'string'."),
    "a wrong type of many": (
        said(IT, {"name": "find", "arguments": {"what": ["it"]}}),
        "The arguments of tool call 2 are wrong at what: ['it'] is not of type 'string'.",
    ),
    "a boolean for a number": (
        said({"name": "find", "arguments": {"what": "it", "most": True}}),
        "are wrong at most: True is not of type 'integer'.",
    ),
    "too much": (said({"name": "find", "arguments": {"what": "it", "most": 10}}), "10 is greater than the maximum of 9."),
    "one argument too many": (
        said({"name": "find", "arguments": {"what": "it", "page": 1}}),
        "Additional properties are not allowed ('page' was unexpected).",
    ),
    "a long argument": (said({"name": "find", "arguments": {"what": ["x" * 9999]}}), "xxx'] is not of type 'string'."),
    "NaN": (said('{"name": "any", "arguments": {"a": NaN}}'), "There is no NaN in JSON."),
    "Infinity": (said('{"name": "any", "arguments": {"a": [Infinity]}}'), "There is no Infinity in JSON."),
    "-Infinity": (said('{"name": "any", "arguments": "{\\"a\\": -Infinity}"}'), "There is no -Infinity in JSON."),
    "1e999": (said('{"name": "any", "arguments": {"a": 1e999}}'), "A number in the tool call is too large."),
    "-1e999": (said('{"name": "any", "arguments": {"a": {"b": -1e999}}}'), "A number in the tool call is too large."),
    "400 digits": (said(f'{{"name": "any", "arguments": {{"a": {"9" * 400}}}}}'), "A number in the tool call is too large."),
    "5000 digits": (
        said(f'{{"name": "any", "arguments": {{"a": -{"9" * 5000}}}}}'),
        "A number in the tool call is too large.",
    ),
    "half a character": (said('{"name": "any", "arguments": {"a": "\\ud800"}}'), "has half a character in it."),
    "half a character as a name": (said('{"name": "any", "arguments": {"\\ud800": 1}}'), "has half a character in it."),
    "half a character as a tool": (said('{"name": "\\ud800", "arguments": {}}'), "The tool call names '?', and"),
    "half a character in words": (f"\ud800 {said(IT)}", "The answer has half a character in it."),
    "half a character in thoughts": (f"<think>\udfff</think>{said(IT)}", "The answer has half a character in it."),
    "17 calls": (said(*[IT] * 17), "There are more than 16 tool calls."),
    "17 calls in a list": (said([IT] * 17), "There are more than 16 tool calls."),
    "17 lists of none": (said(*[[]] * 17), "There are more than 16 tool calls."),
    "17 deep": (said('{"name": "any", "arguments": {"a": ' + "[" * 17 + "]" * 17 + "}}"), "is nested too deeply."),
    "100,000 deep": (said('{"name": "any", "arguments": ' + '{"a":' * 100_000), "The tool call is nested too deeply."),
    "100,000 deep before a name": (said("[" * 100_000), "The tool call is nested too deeply."),
    "100,000 deep in a text": (said(IT | {"arguments": "[" * 100_000}), 'The string of "arguments" is nested too deeply.'),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("template", ["bare", "qwen3", "thinking"])
def test_what_is_refused(name: str, template: str) -> None:
    """None of its calls is made, and what is fed back fits a prompt."""
    text, reason = REFUSED[name]
    if template == "thinking" and not text.startswith("<think>"):
        text = f"Hm.\n</think>\n\n{text}"
    parsed = parsers()[template].parse(text, SEEN)
    assert parsed.action is None
    assert reason in parsed.feedback
    assert len(parsed.feedback) < 250
    assert len(parsed.feedback.encode().splitlines()) == 1


def test_thinking_that_the_prompt_has_opened_must_end() -> None:
    for text in (said(IT), "7", "", "Hm. <think>"):
        parsed = parsers()["thinking"].parse(text, SEEN)
        assert parsed == ParsedAction(None, "The thinking does not end with </think>.")


# --- there and back ---

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**299), 10**299)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(["</tool_call>", "<tool_call>", "</think>", "<think>", '"}}', "\\", "\N{GRINNING FACE}", "\x00"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), values, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES, max_size=4)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1)
WORDS = st.text(st.characters(codec="utf-8")).map(str.strip).filter(lambda text: "<tool_call>" not in text)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(names=st.lists(NAMES, min_size=1, max_size=3, unique=True), data=st.data())
def test_what_is_answered_is_read_back(names: list[str], data: st.DataObject) -> None:
    """Whatever the tools are called, and their arguments; with words and thoughts, whether or not the prompt opens these."""
    tools = tuple(ToolSpec(name, "", {"type": "object"}) for name in names)
    calls = data.draw(st.lists(st.tuples(st.sampled_from(names), ARGUMENTS), max_size=4))
    words = data.draw(WORDS.filter(lambda text: not text.startswith("<think>")))
    thoughts = data.draw(st.just("") | WORDS.filter(lambda text: "think>" not in text))
    action = Action(
        tool_calls=tuple(ToolCall(name, given, f"call_{number}") for number, (name, given) in enumerate(calls)),
        text=words if calls else words or "7",
        reasoning=thoughts,
    )
    for template in (None, OPENS_THINKING):
        parser = bound(template, tools)
        assert parser.parse(parser.answer(action, SEEN), SEEN) == ParsedAction(action)


@pytest.mark.parametrize(
    "arguments", [{"what": "it"}, {"what": 'it\'s "☂"\n</tool_call>', "most": -3}, {}, {"a": [1.5, {"b": None}]}]
)
@pytest.mark.parametrize("words", ["", "I look it up."])
@pytest.mark.parametrize("count", [1, 3])
def test_an_answer_is_what_the_template_would_write(arguments: dict[str, Any], words: str, count: int) -> None:
    """Letter by letter: what demonstrations teach is what the model's own prompts show."""
    action = Action(tool_calls=tuple(ToolCall("any", arguments, f"call_{n}") for n in range(count)), text=words)
    written = renderer_of(QWEN3).written(action)
    assert parsers()["qwen3"].answer(action, SEEN) == written.rpartition("</think>")[2].strip()


def test_a_command_of_an_expert_is_a_text() -> None:
    assert parsers()["bare"].parse(parsers()["bare"].answer(Action("go west"), SEEN), SEEN) == ParsedAction(
        Action(text="go west")
    )


# --- any text ---

FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "[", "]", "{", "}", ",", ":", '"', "\\", "it", "7"),
    *('"name"', '"find"', '"any"', '"arguments"', '"what"', '{"name": "any", "arguments": ', said(IT), said([THAT, IT])),
    *("NaN", "1e999", "9" * 400, "[" * 2000, '{"a":' * 2000, "\\ud800", "\ud800", "\x00", "\u2028", "☂"),
]


def check(text: str) -> None:
    for name, parser in parsers().items():
        parsed = parser.parse(text, SEEN)
        assert (parsed.action is None) == bool(parsed.feedback)
        parsed.feedback.encode()
        if parsed.action is None:
            assert len(parsed.feedback) < 250
            continue
        action = parsed.action
        assert checked_action("it", action) == action, "it can be sent to a worker process"
        assert action.tool_calls or action.text
        assert {call.name for call in action.tool_calls} <= {"find", "any"}
        assert [call.id for call in action.tool_calls] == [f"call_{number}" for number in range(len(action.tool_calls))]
        assert all("what" in call.arguments for call in action.tool_calls if call.name == "find")
        if name != "thinking" or "</think>" in text:
            assert parser.parse(parser.answer(action, SEEN), SEEN).action == action


@settings(deadline=None, derandomize=True, max_examples=200)
@given(text=st.text(st.characters()))
def test_any_text_has_an_answer(text: str) -> None:
    check(text)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(), max_size=3), max_size=12))
def test_any_mixture_of_the_form_has_an_answer(parts: list[str]) -> None:
    check("".join(parts))


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 150), st.integers(0, 4), st.sampled_from(["", *FRAGMENTS]) | st.text(max_size=3)),
        max_size=4,
    ),
    text=st.sampled_from([said(IT), said(IT, THAT), said([IT, THAT]), f"<think>\nHm.\n</think>\n\n{said(IT)}"]),
)
def test_any_damaged_call_has_an_answer(edits: list[tuple[int, int, str]], text: str) -> None:
    for at, width, new in edits:
        text = text[:at] + new + text[at + width :]
    check(text)


def test_a_long_answer_is_read_in_one_go() -> None:
    """Read again from each tag, a million of them would take hours."""
    for unit in (
        "<tool_call>",
        said([]),
        said(IT),
        said({}),
        "{",
        "<think>",
        "</think>",
        " ",
        "\n<tool_call>\n[",
        '"\\u0041',
    ):
        for text in (unit * 200_000, "<tool_call>\n" + unit * 200_000, "<think>" + unit * 200_000 + "</think>"):
            for parser in parsers().values():
                parser.parse(text, SEEN)
