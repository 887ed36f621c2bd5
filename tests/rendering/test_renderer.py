"""The renderer's ids: the template's own, whatever the texts; what was sampled stays; nobody else writes its markup."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from steppo.rendering import (
    PLAIN_TEMPLATE,
    AppendContext,
    CommandParser,
    ContextPolicy,
    StateContext,
    ToolCallParser,
    WindowContext,
)
from steppo.rendering.markup import ANSWER_MARKUP, markup_of
from steppo.types import Message, Step, Turn
from tests.rendering.helpers import TEMPLATES, bound, make_step, make_tokenizers, text_of

EXACT = ["plain", "chatml", "thinking", "smollm2", "qwen3"]  # they close answers with the stop token
MARKERS = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</tool_response>", "<tool_response>", "<tool_call>", "</tool_call>"),
    *("<think>", "</think>", "<tools>", "</tools>", "<|user|>", "[/INST]", "<function=", "<|im_start|>user\n"),
]
PIECES = [marker[:cut] for marker in MARKERS for cut in (1, 2, 5, -1)] + [marker[3:] for marker in MARKERS]
WIDE = ["\uff1c", "\uff5c", "\uff1e"]  # <, | and > to some normalisers
TEXTS = st.lists(
    st.sampled_from(["go west", "take  coin", "\n", " ", "", "☂", "e\u0301", "👩‍🚀", ">", "<b>"]) | st.text(), max_size=6
)


@functools.cache
def tokenizers() -> dict[str, Any]:
    """As ``make_tokenizers``, one whose markup is many tokens, and two that read other characters as their markup."""
    made = make_tokenizers()
    made["words"] = copy.deepcopy(made["plain"])
    made["words"].chat_template = TEMPLATES["qwen3"].replace("im_start", "turn") + "{# [/INST] '<function=' <|user|> #}"
    for name, normalizer in (("wide", normalizers.NFKC()), ("lower", normalizers.Lowercase())):
        made[name] = copy.deepcopy(made["words"])
        made[name].backend_tokenizer.normalizer = normalizer
        made[name].add_tokens([AddedToken("</tool_response>", special=False, normalized=True)])
    return made


@st.composite
def histories(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> tuple[list[Turn], list[tuple[str, bool]]]:
    """Turns, and between them answers and whether they stopped by themselves."""
    goal = draw(texts)
    commands = st.none() | st.lists(texts, max_size=3).map(tuple)
    turn = st.builds(Turn, texts, st.just(goal), commands, feedback=st.just("") | texts)
    answers = draw(st.lists(st.tuples(texts, st.booleans()), max_size=5))
    return draw(st.lists(turn, min_size=len(answers) + 1, max_size=len(answers) + 1)), answers


def play(context: ContextPolicy, history: tuple[list[Turn], list[tuple[str, bool]]]) -> list[Step]:
    """The steps of an episode, and one more that was not taken: its prompt is the last."""
    turns, answers = history
    steps: list[Step] = []
    for index, (answer, stopped) in enumerate([*answers, ("", True)]):
        prompt = context.prompt_ids(turns[: index + 1], steps)
        steps.append(make_step(context, prompt, answer, index, stopped))
    return steps


def plain_texts() -> st.SearchStrategy[str]:
    return TEXTS.map("".join).filter(lambda text: not any(marker in text for marker in MARKERS))


@pytest.mark.parametrize("name", EXACT)
@settings(deadline=None, derandomize=True, max_examples=40)
@given(history=histories(plain_texts()), instructions=st.sampled_from(["", "Be brief."]))
def test_prompts_are_the_template_s(
    name: str, history: tuple[list[Turn], list[tuple[str, bool]]], instructions: str
) -> None:
    """Text by text over the whole conversation, and id by id between answers. A long enough window and all messages rendered
    anew are the same."""
    tokenizer, (turns, answers) = tokenizers()[name], history
    context = bound(AppendContext(instructions), tokenizer)
    window = bound(WindowContext(len(answers), instructions), tokenizer)
    system = [Message("system", instructions)] if instructions else []
    steps = play(context, history)
    conversation = [{"role": "system", "content": instructions}] if instructions else []
    written = ""
    for index, step in enumerate(steps):
        text = context.render_observation(turns[index], with_goal=index == 0)
        conversation.append({"role": "user", "content": text})
        whole = tokenizer.apply_chat_template(
            conversation,
            chat_template=tokenizer.chat_template or PLAIN_TEMPLATE,
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
        assert step.prompt_ids.dtype == np.int32

        past, seen = steps[:index], turns[: index + 1]
        np.testing.assert_array_equal(window.prompt_ids(seen, past), step.prompt_ids)
        np.testing.assert_array_equal(context.renderer.render([*system, *context.messages(seen, past)]), step.prompt_ids)
        if index < len(answers):
            conversation.append({"role": "assistant", "content": answers[index][0]})
            written = whole + answers[index][0]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("most", [0, 1, 2])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(history=histories(plain_texts()))
def test_a_window_is_the_dialogue_of_its_turns(
    name: str, most: int, history: tuple[list[Turn], list[tuple[str, bool]]]
) -> None:
    """As if the episode had begun with its first turn; the goal, which all turns have, is in front."""
    context = bound(WindowContext(most), tokenizers()[name])
    steps = play(context, history)
    whole = bound(AppendContext(), tokenizers()[name])
    for turn, step in enumerate(steps):
        first = max(0, turn - most)
        dialogue = whole.dialogue(history[0][first : turn + 1], steps[first:turn])
        expected = whole.renderer.render([Message("system", whole.instructions), *dialogue])
        np.testing.assert_array_equal(step.prompt_ids, expected)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("context_class", [AppendContext, WindowContext])
@settings(deadline=None, derandomize=True, max_examples=25)
@given(sampled=st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=8), min_size=1, max_size=4), data=st.data())
def test_what_was_sampled_stays(
    name: str, context_class: type[ContextPolicy], sampled: list[list[int]], data: st.DataObject
) -> None:
    """Whatever its ids are: bytes that are no text, special tokens, another way to spell a word."""
    context = bound(context_class(), tokenizers()[name])
    stop = tokenizers()[name].eos_token_id
    room = Turn("A room.")
    steps: list[Step] = []
    for index, ids in enumerate(sampled):
        stopped = data.draw(st.booleans())
        step = make_step(context, context.prompt_ids([room] * (index + 1), steps), "", index, stopped)
        steps.append(replace(step, action_ids=np.asarray([*ids, stop] if stopped else ids, dtype=np.int32)))
    prompt = context.prompt_ids([room] * (len(steps) + 1), steps).tolist()
    at = len(steps[0].prompt_ids)
    for step in steps:
        assert prompt[at : at + len(step.action_ids)] == step.action_ids.tolist()
        rest = context.renderer.extend(
            np.zeros(0, np.int32), replace(step, action_ids=step.action_ids[:0]), [Message("user", "A room.")]
        )
        at += len(step.action_ids)
        assert prompt[at : at + len(rest)] == rest.tolist()
        at += len(rest)
    assert at == len(prompt)


# --- markup ---


def markup_in(tokenizer: Any, ids: np.ndarray) -> dict[str, int]:
    """How often there is what, as a token or spelled out."""
    text = text_of(tokenizer, ids)
    known = {*markup_of(tokenizer), *(marker for marker in MARKERS if marker in str(tokenizer.chat_template))}
    counts = {marker: text.count(marker) for marker in known if marker}
    tokens = {str(token): int((ids == token).sum()) for token in tokenizer.added_tokens_decoder}
    return counts | tokens


@pytest.mark.parametrize("name", [*EXACT, "words", "wide", "lower", "unclosed"])
@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    parts=st.lists(st.sampled_from([*MARKERS, *PIECES, "go", "\n", *WIDE]) | st.text(max_size=3), max_size=10),
    shift=st.sampled_from([str, str.upper, lambda text: text.translate({ord(c): ord(c) + 0xFEE0 for c in "<|>/_[]"})]),
)
@example(["<|im_" * 3, "start|>" * 3, "</think<|im_end|>>", "</tool_res", "</tool_response>", "ponse>"], str)
def test_nobody_else_writes_the_template_s_markup(name: str, parts: list[str], shift: Any) -> None:
    """In each place where an environment may say something, and in what is told of past actions."""
    tokenizer, text = tokenizers()[name], shift("".join(parts))
    plain = Turn("A room.", "A goal.", ("go", "stay"))
    for context in (AppendContext(), WindowContext(0), StateContext()):
        bound(context, tokenizer)
        expected = markup_in(tokenizer, context.prompt_ids([plain], []))
        for said in (
            replace(plain, text=text),
            replace(plain, goal=text),
            replace(plain, commands=(text, "stay")),
            Turn(text, text, (text, text)),
        ):
            assert markup_in(tokenizer, context.prompt_ids([said], [])) == expected
        fed_back = markup_in(tokenizer, context.prompt_ids([replace(plain, feedback=text)], []))
        answers = {*ANSWER_MARKUP, *(str(tokenizer.convert_tokens_to_ids(mark)) for mark in ANSWER_MARKUP)}
        assert {key: count for key, count in fed_back.items() if key not in answers} == {
            key: count for key, count in expected.items() if key not in answers
        }


@pytest.mark.parametrize("name", EXACT)
@given(text=plain_texts() | st.sampled_from(["a<b and c>d", "[x] {y} <i>z</i>", "> user: no", "<|", "|>", "[INST", "1 < 2"]))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_other_texts_stay_as_they_are(name: str, text: str) -> None:
    context = bound(AppendContext(instructions=""), tokenizers()[name])
    assert context.opening(Turn(text)).content == text
    prompt = context.renderer.render([Message("user", text)])
    assert f"{text}\n>" in text_of(tokenizers()[name], prompt) or f"user\n{text}<|im_end|>" in text_of(
        tokenizers()[name], prompt
    )


@pytest.mark.parametrize("context", [AppendContext(), WindowContext(), StateContext()])
def test_feedback_shows_the_form_of_an_answer(context: ContextPolicy) -> None:
    tokenizer = tokenizers()["qwen3"]
    bound(context, tokenizer)
    for parser, said in ((ToolCallParser(), "go"), (CommandParser(), "<think>hm")):
        feedback = parser.parse(said, Turn("")).feedback
        assert any(mark in feedback for mark in ANSWER_MARKUP)
        room = Turn(f"A room. {feedback}")
        step = make_step(context, context.prompt_ids([room], []), "go", 0)
        text = text_of(tokenizer, context.prompt_ids([room, replace(room, feedback=feedback)], [step]))
        assert text.count(feedback) == 1
        assert f"\n{feedback}\nA room. " in text


def test_an_own_message_is_not_trusted_unless_it_says_so() -> None:
    tokenizer = tokenizers()["qwen3"]
    renderer = bound(AppendContext(), tokenizer).renderer
    said = "a<think>b</tool_response>c<|im_end|>"
    cases = [("user", False, "abc"), ("assistant", False, "abc"), ("user", True, "a<think>bc"), ("system", False, said)]
    for role, trusted, left in cases:
        assert f"<|im_start|>{role}\n{left}<|im_end|>" in text_of(
            tokenizer, renderer.render([Message(role, said, trusted=trusted), Message("user", "?")])
        )


def test_what_is_left_is_no_markup_however_deep() -> None:
    tokenizer = tokenizers()["qwen3"]
    prompt = bound(StateContext(instructions=""), tokenizer).prompt_ids(
        [Turn("a" + "<|im_" * 5000 + "</think>" * 9 + "start|>" * 5000 + "b")], []
    )
    assert text_of(tokenizer, prompt) == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
