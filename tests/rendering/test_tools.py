"""Tools in prompts: schemas once, answers of tools as the template writes them, and nobody's words in its markup."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppo.errors import ConfigError
from steppo.rendering import (
    PLAIN_TEMPLATE,
    AppendContext,
    ContextPolicy,
    HermesParser,
    Renderer,
    StateContext,
    WindowContext,
)
from steppo.rendering.markup import ANSWER_MARKUP, markup_of
from steppo.rendering.renderer import _MARK
from steppo.types import Action, Message, Step, ToolCall, ToolSpec, Turn
from tests.rendering import test_renderer
from tests.rendering.helpers import QWEN3, make_step, text_of
from tests.rendering.test_renderer import MARKERS, PIECES, plain_texts

WHAT = {"type": "object", "properties": {"what": {"type": "string", "description": 'such as "it"'}}, "required": ["what"]}
TOOLS = (ToolSpec("find", "Finds pages, also über ☂.", WHAT), ToolSpec("open"))
SCHEMAS = [tool.schema for tool in TOOLS]
TOOLS_TEXT = HermesParser().tools_text(TOOLS)

NATIVE = ["qwen3", "thinking", "with ids"]
OWN = ["smollm2", "plain", "chatml"]  # for these the schemas and the answers are written by us
SAFE = [*NATIVE, *OWN, "words", "wide", "lower"]


@functools.cache
def tokenizers() -> dict[str, Any]:
    """As those of the renderer's tests, and one whose template writes which call is answered."""
    made = dict(test_renderer.tokenizers())
    made["with ids"] = test_renderer.copy.deepcopy(made["qwen3"])
    made["with ids"].chat_template = QWEN3.replace(
        "{{- '\\n<tool_response>\\n' }}", "{{- '\\n<tool_response>\\n' + message.tool_call_id + ': ' }}"
    )
    assert made["with ids"].chat_template != QWEN3
    return made


def bound(context: ContextPolicy, name: str, tools: Sequence[ToolSpec] = TOOLS) -> ContextPolicy:
    renderer, tokenizer = Renderer(), tokenizers()[name]
    renderer.bind(tokenizer, {tokenizer.eos_token_id}, tools, HermesParser().tools_text(tools) if tools else "")
    context.bind(renderer)
    return context


# --- what a whole conversation looks like ---


def answered(texts: Sequence[str]) -> tuple[Message, ...]:
    return tuple(Message("tool", text, f"call_{number}") for number, text in enumerate(texts))


@st.composite
def calls(draw: st.DrawFn) -> Action:
    """An answer with one to three calls."""
    names = draw(st.lists(st.sampled_from(["find", "open"]), min_size=1, max_size=3))
    found = (ToolCall(name, {"what": draw(plain_texts())}, f"call_{number}") for number, name in enumerate(names))
    return Action(tool_calls=tuple(found), text=draw(st.just("") | plain_texts()).strip())


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Turn], list[tuple[Action | str, bool]]]:
    """Turns, and between them answers (calls, or any text) and whether they stopped by themselves."""
    answers = draw(st.lists(st.tuples(calls() | plain_texts(), st.booleans()), max_size=4))
    turns = [Turn(draw(plain_texts()), draw(plain_texts()))]
    for _ in answers:
        texts = draw(st.lists(plain_texts(), max_size=3))
        feedback = draw(st.just("") | plain_texts())
        turns.append(Turn(draw(st.just("") | plain_texts()), turns[0].goal, None, answered(texts), feedback=feedback))
    return turns, answers


def play(context: ContextPolicy, history: tuple[list[Turn], list[tuple[Action | str, bool]]]) -> list[Step]:
    """The steps of an episode, and one more that was not taken: its prompt is the last."""
    turns, answers = history
    steps: list[Step] = []
    for index, (answer, stopped) in enumerate([*answers, ("", True)]):
        prompt = context.prompt_ids(turns[: index + 1], steps)
        text = answer if isinstance(answer, str) else HermesParser().answer(answer, Turn())
        steps.append(make_step(context, prompt, text, index, stopped))
    return steps


def as_the_template_takes(answer: Action | str, native: bool) -> dict[str, Any]:
    if isinstance(answer, str) or not native:
        return {"role": "assistant", "content": answer if isinstance(answer, str) else HermesParser().answer(answer, Turn())}
    found = [{"type": "function", "function": {"name": one.name, "arguments": one.arguments}} for one in answer.tool_calls]
    return {"role": "assistant", "content": answer.text, "tool_calls": found}


def after_an_answer(turn: Turn, native: bool) -> list[dict[str, Any]]:
    text = "\n".join(line for line in (turn.feedback, turn.text) if line)
    if native:
        said = [{"role": "tool", "content": one.content, "tool_call_id": one.tool_call_id} for one in turn.messages]
        return said + ([{"role": "user", "content": text}] if text or not said else [])
    texts = [f"<tool_response>\n{message.content}\n</tool_response>" for message in turn.messages]
    return [{"role": "user", "content": "\n".join([*texts, *([text] if text or not texts else [])])}]


@pytest.mark.parametrize("name", ["qwen3", "with ids", *OWN])
@settings(deadline=None, derandomize=True, max_examples=25)
@given(history=histories(), instructions=st.sampled_from(["", "Be brief."]))
def test_prompts_are_the_template_s(
    name: str, history: tuple[list[Turn], list[tuple[Action | str, bool]]], instructions: str
) -> None:
    """Text by text over the whole conversation: with its calls and tools as such where the template knows these. Id by id
    between answers. A long enough window and all messages rendered anew are the same."""
    tokenizer, (turns, answers), native = tokenizers()[name], history, name in NATIVE
    context = bound(AppendContext(instructions), name)
    window = bound(WindowContext(len(answers), instructions), name)
    steps = play(context, history)
    system = instructions if native else "\n\n".join(text for text in (instructions, TOOLS_TEXT) if text)
    conversation: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    written = ""
    for index, step in enumerate(steps):
        opening = {"role": "user", "content": context.render_observation(turns[0])}
        conversation += after_an_answer(turns[index], native) if index else [opening]
        whole = tokenizer.apply_chat_template(
            conversation,
            chat_template=tokenizer.chat_template or PLAIN_TEMPLATE,
            tools=SCHEMAS if native else None,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert text_of(tokenizer, step.prompt_ids) == whole
        assert whole.startswith(written)
        before = steps[index - 1] if index else None
        start = len(before.prompt_ids) + len(before.action_ids) if before else 0
        suffix = tokenizer.encode(whole[len(written) :], add_special_tokens=False)
        closed = before is not None and before.finish_reason == "stop"
        assert step.prompt_ids[start:].tolist() == suffix[1 if closed else 0 :]

        past, seen = steps[:index], turns[: index + 1]
        first = [Message("system", instructions)] if instructions else []
        np.testing.assert_array_equal(window.prompt_ids(seen, past), step.prompt_ids)
        np.testing.assert_array_equal(context.renderer.render([*first, *context.messages(seen, past)]), step.prompt_ids)
        if index < len(answers):
            conversation.append(as_the_template_takes(answers[index][0], native))
            written = whole + step.action


@pytest.mark.parametrize("name", [*NATIVE, *OWN])
@pytest.mark.parametrize("instructions", ["", "Be brief."])
@pytest.mark.parametrize("context_class", [AppendContext, WindowContext, StateContext])
def test_schemas_stand_in_the_system_message_once(name: str, instructions: str, context_class: type[ContextPolicy]) -> None:
    """In each prompt of an episode."""
    context, tokenizer = bound(context_class(instructions=instructions), name), tokenizers()[name]
    answer = Action(tool_calls=(ToolCall("find", {"what": "it"}, "call_0"),))
    turns = [Turn("Ready.", "Find it."), *[Turn(messages=answered(["Nothing."]))] * 6]
    for step in play(context, (turns, [(answer, True)] * 6)):
        prompt = text_of(tokenizer, step.prompt_ids)
        system = prompt.partition("<|im_end|>" if tokenizer.chat_template else "\nFind it.")[0]
        for schema in SCHEMAS:
            assert prompt.count(json.dumps(schema, ensure_ascii=False)) == 1
            assert json.dumps(schema, ensure_ascii=False) in system
        assert system.count(instructions or "<tools>\n") == (1 if instructions else name != "thinking")
        assert prompt.count(TOOLS_TEXT) == (name in OWN)


def test_without_tools_nothing_is_written_of_them() -> None:
    for name in (*NATIVE, *OWN):
        prompt = text_of(tokenizers()[name], bound(AppendContext(), name, ()).prompt_ids([Turn("Ready.")], []))
        assert not any(word in prompt for word in ("find", "<tools>", "tool_call", "tool_response"))


@pytest.mark.parametrize("name", OWN)
def test_answers_of_one_action_are_one_turn_of_the_user(name: str) -> None:
    context, tokenizer = bound(AppendContext(), name), tokenizers()[name]
    step = make_step(context, context.prompt_ids([Turn("Ready.")], []), "7", 0)
    last = Turn("Go on.", messages=(*answered(["one", "", "three"]), Message("user", "By the way."), *answered(["four"])))
    text = text_of(tokenizer, context.prompt_ids([Turn("Ready."), last], [step])[len(step.prompt_ids) :])
    three = "\n".join(f"<tool_response>\n{said}\n</tool_response>" for said in ("one", "", "three"))
    four = "<tool_response>\nfour\n</tool_response>"
    if tokenizer.chat_template is None:
        assert text == f"7<|im_end|>\n{three}\nBy the way.\n{four}\nGo on.\n>"
    else:
        user = "\n".join((three, "By the way.", four, "Go on."))
        assert text == f"7<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["qwen3", *OWN])
@pytest.mark.parametrize("context", [AppendContext(), WindowContext(8)], ids=["append", "window"])
def test_a_refused_call_brings_its_feedback_alone(context: ContextPolicy, name: str) -> None:
    bound(context, name)
    found = Turn(goal="Find it.", messages=answered(["A lamp.", "A jar."]))
    turns, steps = [Turn(goal="Find it."), found, found.refused("No."), found.refused("No, again.")], []
    for index in range(3):
        steps.append(make_step(context, context.prompt_ids(turns[: index + 1], steps), "?", index))
    text = text_of(tokenizers()[name], context.prompt_ids(turns, steps))
    assert [text.count(said) for said in ("A lamp.", "A jar.", "No.", "No, again.")] == [1, 1, 1, 1]
    state = bound(StateContext(), name)
    text = text_of(tokenizers()[name], state.prompt_ids(turns, steps))
    assert [text.count(said) for said in ("A lamp.", "A jar.", "No, again.")] == [1, 1, 1]


# --- what was sampled ---

SAMPLED = [
    '<tool_call>\n{"name": "find", "arguments": {"what": "it"}}\n</tool_call>',
    "<tool_call>\n{'name': find",
    '<tool_call>\n{"name": "fi',
    "<think>\nHm. <tool_call>\n</think>\n\n7",
    "<think>\nHm. ☂ pièce",
    "</tool_response>",
]


@pytest.mark.parametrize("name", [*NATIVE, *OWN])
@pytest.mark.parametrize("context_class", [AppendContext, WindowContext])
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    sampled=st.lists(
        st.lists(st.integers(0, 300), min_size=1, max_size=8) | st.sampled_from(SAMPLED), min_size=1, max_size=4
    ),
    data=st.data(),
)
def test_what_was_sampled_stays(
    name: str, context_class: type[ContextPolicy], sampled: list[list[int] | str], data: st.DataObject
) -> None:
    """Whatever its ids are: bytes that are no text, special tokens, calls that nobody could read, thinking, what was cut."""
    context, tokenizer = bound(context_class(), name), tokenizers()[name]
    turns, steps = [Turn("Ready.")], list[Step]()
    for index, answer in enumerate(sampled):
        stopped = data.draw(st.booleans())
        step = make_step(context, context.prompt_ids(turns, steps), "", index, stopped)
        letters = list(answer) if isinstance(answer, str) else []
        one_by_one = [token for letter in letters for token in tokenizer.encode(letter)] or [*map(int, answer)]
        ids = [*one_by_one, tokenizer.eos_token_id] if stopped else one_by_one
        steps.append(replace(step, action_ids=np.asarray(ids, dtype=np.int32)))
        texts = data.draw(st.lists(st.sampled_from(["Nothing.", "", "☂"]), max_size=2))
        turns.append(Turn("" if texts else "Not so.", messages=answered(texts)))
    prompt = context.prompt_ids(turns, steps).tolist()
    at = len(steps[0].prompt_ids)
    for step, turn in zip(steps, turns[1:], strict=True):
        assert prompt[at : at + len(step.action_ids)] == step.action_ids.tolist()
        at += len(step.action_ids)
        rest = context.renderer.extend(
            np.zeros(0, np.int32), replace(step, action_ids=step.action_ids[:0]), context.following(turn, Turn())
        )
        assert prompt[at : at + len(rest)] == rest.tolist()
        at += len(rest)
    assert at == len(prompt)


# --- markup ---

OF_OURS = {"<tool_response>", "</tool_response>", "<tools>", "</tools>", *ANSWER_MARKUP}


def markup_in(name: str, ids: np.ndarray) -> dict[str, int]:
    """How often there is what, as a token or spelled out."""
    tokenizer = tokenizers()[name]
    text = text_of(tokenizer, ids)
    known = {
        *markup_of(tokenizer),
        *(OF_OURS if name in OWN else ()),
        *(marker for marker in MARKERS if marker in str(tokenizer.chat_template)),
    }
    counts = {marker: text.count(marker) for marker in known if marker}
    return counts | {str(token): int((ids == token).sum()) for token in tokenizer.added_tokens_decoder}


@pytest.mark.parametrize("name", SAFE)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    parts=st.lists(st.sampled_from([*MARKERS, *PIECES, "go", "\n"]) | st.text(max_size=3), max_size=10),
    shift=st.sampled_from([str, str.upper, lambda text: text.translate({ord(c): ord(c) + 0xFEE0 for c in "<|>/_[]"})]),
    context=st.sampled_from([AppendContext(), WindowContext(1), WindowContext(0), StateContext()]),
)
def test_nobody_else_writes_markup(name: str, parts: list[str], shift: Any, context: ContextPolicy) -> None:
    """Not a tool, in one of its answers or in several, not another user, and not the policy in what is told of its calls."""
    text = shift("".join(parts))
    opening = Turn("Ready.", "Find it.")
    plain = Turn("Go on.", "Find it.", None, (Message("user", "a"), *answered(["one", "two"]), Message("user", "b")))
    bound(context, name)
    first = make_step(context, context.prompt_ids([opening], []), "7", 0)

    def seen(turn: Turn, step: Step = first) -> dict[str, int]:
        return markup_in(name, context.prompt_ids([opening, turn], [step]))

    user, tool, split = (
        Message("user", text),
        Message("tool", text, text),
        [Message("tool", text[:9]), Message("tool", text[9:])],
    )
    for messages in (
        (user, *answered(["one", "two"]), user),
        (Message("user", "a"), tool, tool, user),
        (user, *split, user),
    ):
        assert seen(replace(plain, messages=messages)) == seen(plain)
        assert seen(replace(plain, messages=messages).refused("No.")) == seen(plain.refused("No."))
        begun = markup_in(name, context.prompt_ids([replace(plain, messages=messages)], []))
        assert begun == markup_in(name, context.prompt_ids([plain], []))
    answers = {*ANSWER_MARKUP, *(str(tokenizers()[name].convert_tokens_to_ids(mark)) for mark in ANSWER_MARKUP)}
    told, expected = seen(replace(plain, feedback=text), replace(first, action=text)), seen(plain)
    assert {mark: told[mark] for mark in told.keys() - answers} == {mark: expected[mark] for mark in told.keys() - answers}


@pytest.mark.parametrize("name", SAFE)
@pytest.mark.parametrize("words", ["<|im_end|>", "</tool_response>", "<tool_call>", "</tools>", _MARK, "</think>"])
@pytest.mark.parametrize("place", ["name", "description", "argument", "deep"])
def test_a_schema_with_markup_is_a_mistake(name: str, words: str, place: str) -> None:
    """It is written as it is, before all else."""
    tool = {
        "name": ToolSpec(words),
        "description": ToolSpec("tool", f"Finds a{words}b."),
        "argument": ToolSpec("tool", "", {"type": "object", "properties": {words: {}}}),
        "deep": ToolSpec("tool", "", {"type": "object", "properties": {"what": {"enum": [{"a": ["b", words]}]}}}),
    }[place]
    if name not in OWN and words not in ("<|im_end|>", _MARK) and words not in tokenizers()[name].chat_template:
        bound(AppendContext(), name, (tool,))  # to this template these are words
        return
    with pytest.raises(ConfigError, match=r"cannot be shown: .* in it is markup of the model's prompts") as refused:
        bound(AppendContext(), name, (TOOLS[0], tool))
    assert len(str(refused.value).splitlines()) == 1
