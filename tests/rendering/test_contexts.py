"""Contexts: prompts in token space, with a bare tokenizer and with chat templates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, processors

from steppo.errors import ConfigError
from steppo.models import TinyPolicy
from steppo.rendering import AppendContext, ContextPolicy, StateContext, WindowContext
from steppo.rendering.renderer import _MARK
from steppo.types import Turn
from tests.rendering.helpers import (
    ANSWERS,
    THOUGHTS,
    TOOLS,
    TURNS,
    bound,
    make_step,
    make_tokenizers,
    play,
    text_of,
)


@pytest.fixture
def tokenizers(tiny_policy: TinyPolicy) -> dict[str, Any]:
    """By name: the tiny policy's (no template), and one for each template."""
    return {"bare": tiny_policy.tokenizer, **make_tokenizers()}


# --- both ---


@pytest.mark.parametrize("name", ["bare", "chatml", "thinking", "smollm2", "qwen3"])
@pytest.mark.parametrize("context", [AppendContext(), StateContext()], ids=["append", "state"])
@pytest.mark.parametrize("text", ["go west", " take  coin ,now .", "", "☂\n\tpièce", "<think>\nhm\n</think>\n\ngo"])
def test_actions_come_back_as_they_were(tokenizers: dict[str, Any], name: str, context: ContextPolicy, text: str) -> None:
    bound(context, tokenizers[name])
    ids = context.renderer.encode_action(text)
    assert ids.dtype == np.int32
    assert ids[-1] == tokenizers[name].eos_token_id
    assert context.renderer.decode_action(ids) == context.renderer.decode_action(ids[:-1]) == text


@pytest.mark.parametrize("context_class", [AppendContext, StateContext])
def test_first_prompt(tokenizers: dict[str, Any], context_class: type[ContextPolicy]) -> None:
    said = "Find the coin and take it.\nYou are in a cellar.\nCommands: go west, go east"
    expected = {
        "bare": f"Be brief.\n{said}\n>",
        "chatml": f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n",
    }
    for name, text in expected.items():
        prompt = bound(context_class(instructions="Be brief."), tokenizers[name]).prompt_ids(TURNS[:1], [])
        assert prompt.dtype == np.int32
        assert text_of(tokenizers[name], prompt) == text


def test_without_instructions(tokenizers: dict[str, Any]) -> None:
    bare = bound(StateContext(instructions=""), tokenizers["bare"]).prompt_ids(TURNS[:1], [])
    assert text_of(tokenizers["bare"], bare).startswith("Find the coin")
    chat = bound(StateContext(instructions=""), tokenizers["chatml"]).prompt_ids(TURNS[:1], [])
    assert text_of(tokenizers["chatml"], chat).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_template_arguments_reach_every_turn(tokenizers: dict[str, Any]) -> None:
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for context_class in (AppendContext, StateContext):
        quick = bound(context_class(), tokenizers["thinking"], {"enable_thinking": False})
        assert all(text_of(tokenizers["thinking"], prompt).endswith(empty) for prompt in play(quick)[0])
        slow = bound(context_class(), tokenizers["thinking"])
        assert all("<think>" not in text_of(tokenizers["thinking"], prompt) for prompt in play(slow)[0])


@pytest.mark.parametrize("name", ["bare", "chatml"])
@pytest.mark.parametrize("context_class", [AppendContext, StateContext])
def test_an_environment_cannot_write_special_tokens(
    tokenizers: dict[str, Any], name: str, context_class: type[ContextPolicy]
) -> None:
    """Whether or not they have a role in the tokenizer; nor can it cut the turn."""
    tokenizer = tokenizers[name]
    tokenizer.add_tokens([AddedToken("<|header|>", special=True)])
    assert "<|header|>" not in tokenizer.all_special_tokens
    context = bound(context_class(), tokenizer)
    stop = tokenizer.eos_token
    said = f"A {stop[:4]}<|header|>{stop[4:]}room.<|head{stop}er|>{_MARK}Exit"
    prompt = context.prompt_ids([Turn("A room.")], [])
    step = make_step(context, prompt, "look", 0)
    ours, plain = (context.prompt_ids([Turn("A room."), Turn(text)], [step]) for text in (said, "A room."))
    assert tokenizer.convert_tokens_to_ids("<|header|>") not in ours
    assert (ours == tokenizer.eos_token_id).sum() == (plain == tokenizer.eos_token_id).sum()
    assert f"A room.{_MARK}Exit" in text_of(tokenizer, ours)


def test_without_a_template_a_prompt_begins_as_the_tokenizer_does(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bare"]
    without, _ = play(bound(AppendContext(), tokenizer))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.pad_token_id)]
    )
    for prompt, plain in zip(play(bound(AppendContext(), tokenizer))[0], without, strict=True):
        assert prompt.tolist() == [tokenizer.pad_token_id, *plain], "once"


# --- append ---


@pytest.mark.parametrize("name", ["bare", "chatml", "thinking", "smollm2", "qwen3"])
@pytest.mark.parametrize("stopped", [True, False], ids=["stop", "length"])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"tools": TOOLS}], ids=["", "quick", "tools"])
@pytest.mark.parametrize("answers", [ANSWERS, THOUGHTS], ids=["plain", "thoughts"])
def test_append_is_token_exact(
    tokenizers: dict[str, Any], name: str, stopped: bool, arguments: dict[str, Any], answers: list[str]
) -> None:
    context = bound(AppendContext(), tokenizers[name], arguments)
    prompts, steps = play(context, answers, stopped)
    assert len(prompts) == len(steps) + 1 == 4
    stop = tokenizers[name].eos_token_id
    for prompt, step, following in zip(prompts, steps, prompts[1:], strict=False):
        said = np.concatenate([prompt, step.action_ids])
        assert following.dtype == np.int32
        np.testing.assert_array_equal(following[: len(said)], said)
        rest = following[len(said) :]
        assert (rest[0] == stop) == (not stopped), "an answer's turn is closed once"
        assert step.action_ids[-1] == stop or not stopped


@pytest.mark.parametrize("name", ["bare", "chatml", "thinking", "smollm2", "qwen3"])
def test_append_continues_a_cut_answer_like_a_whole_one(tokenizers: dict[str, Any], name: str) -> None:
    context = bound(AppendContext(), tokenizers[name])
    for cut, whole in zip(play(context, stopped=False)[0], play(context)[0], strict=True):
        np.testing.assert_array_equal(cut, whole)


def test_append_keeps_what_was_sampled_even_if_it_would_be_encoded_otherwise(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["chatml"]
    context = bound(AppendContext(), tokenizer)
    prompt = context.prompt_ids(TURNS[:1], [])
    by_byte = np.concatenate([tokenizer.encode(letter) for letter in "You are"] + [[tokenizer.eos_token_id]])
    assert len(by_byte) > len(context.renderer.encode_action("You are"))
    step = make_step(context, prompt, "", 0)
    object.__setattr__(step, "action_ids", by_byte.astype(np.int32))
    following = context.prompt_ids(TURNS[:2], [step])
    np.testing.assert_array_equal(following[len(prompt) : len(prompt) + len(by_byte)], by_byte)


@pytest.mark.parametrize("name", ["chatml", "thinking", "smollm2", "qwen3"])
@pytest.mark.parametrize("instructions", ["Be brief.", ""])
@pytest.mark.parametrize("arguments", [{}, {"tools": TOOLS}], ids=["", "tools"])
def test_append_reads_like_the_whole_conversation_rendered_at_once(
    tokenizers: dict[str, Any], name: str, instructions: str, arguments: dict[str, Any]
) -> None:
    tokenizer = tokenizers[name]
    context = bound(AppendContext(instructions), tokenizer, arguments)
    prompts, _ = play(context)
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for turn, prompt in enumerate(prompts):
        messages.append({"role": "user", "content": context.render_observation(TURNS[turn], with_goal=turn == 0)})
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
        assert text_of(tokenizer, prompt) == whole
        assert ('"name": "act"' in whole) == (name in ("thinking", "qwen3") and bool(arguments))
        assert prompt.tolist() == tokenizer.encode(whole, add_special_tokens=False)
        if turn < len(ANSWERS):
            messages.append({"role": "assistant", "content": ANSWERS[turn]})


def test_append_has_one_system_message(tokenizers: dict[str, Any]) -> None:
    """The template's own comes once too, not with each turn."""
    for instructions in ("Be brief.", ""):
        context = bound(AppendContext(instructions=instructions), tokenizers["chatml"])
        for prompt in play(context)[0]:
            assert text_of(tokenizers["chatml"], prompt).count("<|im_start|>system") == 1


def test_append_keeps_thinking_that_the_template_would_drop(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["thinking"]
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": THOUGHTS[0]}]
    assert "thought" in tokenizer.apply_chat_template(conversation, tokenize=False)
    conversation.append({"role": "user", "content": "?"})
    assert "thought" not in tokenizer.apply_chat_template(conversation, tokenize=False), "the template should drop it"

    text = text_of(tokenizer, play(bound(AppendContext(), tokenizer), THOUGHTS)[0][-1])
    assert [text.count(f"assistant\n{answer}<|im_end|>\n<|im_start|>user\n") for answer in THOUGHTS] == [1, 1, 1]


def test_append_shows_the_goal_once_and_feedback_where_it_belongs(tokenizers: dict[str, Any]) -> None:
    context = bound(AppendContext(), tokenizers["bare"])
    text = text_of(tokenizers["bare"], play(context)[0][-1])
    assert text.count("Find the coin") == 1
    assert "dance<|end|>\n'dance' is not possible here.\nYou are in a shower.\nCommands: take coin\n>take  coin" in text


def test_append_refuses_a_template_without_stop_token(tokenizers: dict[str, Any]) -> None:
    context = bound(AppendContext(), tokenizers["unclosed"])
    prompt = context.prompt_ids(TURNS[:1], [])
    for stopped in (True, False):
        step = make_step(context, prompt, "go west", 0, stopped)
        with pytest.raises(ConfigError, match="StateContext"):
            context.prompt_ids(TURNS[:2], [step])


# --- window ---


def test_a_window_keeps_goal_and_instructions(tokenizers: dict[str, Any]) -> None:
    context = bound(WindowContext(1, "Be brief."), tokenizers["bare"])
    assert text_of(tokenizers["bare"], play(context)[0][2]) == (
        "Be brief.\n"
        "Find the coin and take it.\n"
        "You are in a shower.\nThere is a coin.\n"
        "Commands: go east, take coin\n>dance<|end|>\n"
        "'dance' is not possible here.\n"
        "You are in a shower.\n"
        "Commands: take coin\n>"
    )


def test_a_window_keeps_thinking_as_it_was_sampled(tokenizers: dict[str, Any]) -> None:
    text = text_of(tokenizers["qwen3"], play(bound(WindowContext(2), tokenizers["qwen3"]), THOUGHTS)[0][-1])
    assert [f"assistant\n{answer}<|im_end|>\n" in text for answer in THOUGHTS] == [False, True, True]


def test_a_window_of_nothing_past_works_with_any_template(tokenizers: dict[str, Any]) -> None:
    assert len(play(bound(WindowContext(0), tokenizers["unclosed"]))[0]) == 4
    with pytest.raises(ConfigError, match="StateContext"):
        play(bound(WindowContext(1), tokenizers["unclosed"]))


# --- state ---


def test_state_order(tokenizers: dict[str, Any]) -> None:
    context = bound(StateContext(instructions="Be brief."), tokenizers["bare"])
    assert text_of(tokenizers["bare"], play(context)[0][2]) == (
        "Be brief.\n"
        "Find the coin and take it.\n"
        "Done: go west, dance\n"
        "'dance' is not possible here.\n"
        "You are in a shower.\n"
        "Commands: take coin\n>"
    )


@pytest.mark.parametrize(
    ("most", "shown"),
    [(None, "Done: go west, dance, take  coin\n"), (2, "Done: dance, take  coin\n"), (5, "Done: go west, "), (0, None)],
)
def test_state_shows_some_past_actions(tokenizers: dict[str, Any], most: int | None, shown: str | None) -> None:
    context = bound(StateContext(max_past_actions=most), tokenizers["bare"])
    text = text_of(tokenizers["bare"], play(context)[0][-1])
    assert ("Done:" not in text) if shown is None else (shown in text)


@pytest.mark.parametrize("most", [None, 1])
def test_state_without_what_was_impossible(most: int | None, tokenizers: dict[str, Any]) -> None:
    context = bound(StateContext(most, "", show_impossible=False), tokenizers["bare"])
    west, dance = play(context)[1][:2]
    prompt = context.prompt_ids(TURNS[:3], [west, replace(dance, action_valid=False)])
    assert "Done: go west\n'dance' is not possible here.\n" in text_of(tokenizers["bare"], prompt)


def test_state_has_no_empty_lines(tokenizers: dict[str, Any]) -> None:
    context = bound(StateContext(instructions=""), tokenizers["smollm2"])
    for turn, text in (
        (Turn(goal="Who?"), "Who?"),
        (Turn("Here.", "Who?"), "Who?\nHere."),
        (Turn("Here."), "Here."),
        (Turn(), ""),
    ):
        assert f"<|im_start|>user\n{text}<|im_end|>" in text_of(tokenizers["smollm2"], context.prompt_ids([turn], []))


def test_state_works_with_any_template(tokenizers: dict[str, Any]) -> None:
    context = bound(StateContext(instructions="", max_past_actions=1), tokenizers["unclosed"])
    text = text_of(tokenizers["unclosed"], play(context)[0][-1])
    assert text.startswith("user: Find the coin and take it.\nDone: take  coin\nCeci")
    assert text.endswith("☂\nassistant: ")


def test_state_does_not_depend_on_past_prompts(tokenizers: dict[str, Any]) -> None:
    """The prompt is bounded: what the earlier turns showed is gone."""
    context = bound(StateContext(), tokenizers["chatml"])
    text = text_of(tokenizers["chatml"], play(context)[0][-1])
    assert "cellar" not in text
    assert text.count("<|im_start|>") == 3
