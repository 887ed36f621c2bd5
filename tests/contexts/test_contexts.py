"""Contexts: prompts in token space, with a bare tokenizer and with chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from steppo.contexts import AppendContext, ContextPolicy, StateContext
from steppo.contexts.base import _MARK
from steppo.errors import ConfigError
from steppo.models import TinyPolicy
from steppo.types import Observation, Step

# Says something of its own where there is no system message.
CHATML = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# As Qwen3's: tools stand in the system message, the thinking of answers before the last question is dropped, and without
# thinking the answer begins behind an empty block of it.
THINKING = """\
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' -%}{{ messages[0].content + '\\n\\n' }}{%- endif -%}
{%- for tool in tools -%}{{ tool | tojson + '\\n' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' -%}
{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif -%}
{%- set ns = namespace(last_question=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last_question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages if message.role != 'system' -%}
{%- set index = loop.index0 + (1 if messages[0].role == 'system' else 0) -%}
{%- set content = message.content -%}
{%- if message.role == 'assistant' and '</think>' in content -%}
{%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- if index > ns.last_question -%}
{%- set content = '<think>\\n' + thinking + '\\n</think>\\n\\n' + content -%}
{%- endif -%}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}"""

# Ends an answer with a new line only.
UNCLOSED = """\
{%- for message in messages -%}{{ message.role + ': ' + message.content + '\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"""

OBSERVATIONS = [
    Observation("You are in a cellar.", "Find the coin and take it.", ("go west", "go east")),
    Observation("You are in a shower.\nThere is a coin.", "Find the coin and take it.", ("go east", "take coin")),
    Observation("You are in a shower.", "Find the coin and take it.", ("take coin",), "'dance' is not possible here."),
    Observation("Ceci n'est pas une pièce. ☂", "Find the coin and take it."),
]
ANSWERS = ["go west", "dance", "take  coin"]
THOUGHTS = [f"<think>\nthought {number}\n</think>\n\n{answer}" for number, answer in enumerate(ANSWERS)]
TOOLS = [{"type": "function", "function": {"name": "act", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def tokenizers(tiny_policy: TinyPolicy) -> dict[str, Any]:
    """By name: the tiny policy's (no template), and one with special tokens for each template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [observation.text for observation in OBSERVATIONS] + ["user assistant system\n\n<think>\n\n</think>\n\n"] * 9
    backend.train_from_iterator(words, trainer)
    made: dict[str, Any] = {"bare": tiny_policy.tokenizer}
    for name, template in (("chatml", CHATML), ("thinking", THINKING), ("unclosed", UNCLOSED)):
        made[name] = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
        )
        made[name].chat_template = template
    return made


def bound(context: ContextPolicy, tokenizer: Any) -> ContextPolicy:
    context.bind(tokenizer, {tokenizer.eos_token_id})
    return context


def make_step(context: ContextPolicy, prompt_ids: np.ndarray, answer: str, index: int, stopped: bool = True) -> Step:
    ids = context.encode_action(answer)
    return Step(
        prompt_ids=prompt_ids,
        action_ids=ids if stopped else ids[:-1],
        behaviour_logprobs=np.zeros(len(ids) - (not stopped), dtype=np.float32),
        reward=0.0,
        index=index,
        finish_reason="stop" if stopped else "length",
        terminated=False,
        truncated=False,
        action_valid=True,
        observation="",
        action=answer,
        temperature=1.0,
        policy_version=0,
    )


def play(
    context: ContextPolicy, answers: Sequence[str] = ANSWERS, stopped: bool = True
) -> tuple[list[np.ndarray], list[Step]]:
    """The prompts of an episode (one more than there are steps) and its steps."""
    steps: list[Step] = []
    prompts = [context.prompt_ids(OBSERVATIONS[:1], steps)]
    for index, answer in enumerate(answers):
        steps.append(make_step(context, prompts[-1], answer, index, stopped))
        prompts.append(context.prompt_ids(OBSERVATIONS[: index + 2], steps))
    return prompts, steps


def text_of(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


# --- both ---


@pytest.mark.parametrize("name", ["bare", "chatml", "thinking"])
@pytest.mark.parametrize("context", [AppendContext(), StateContext()], ids=["append", "state"])
@pytest.mark.parametrize("text", ["go west", " take  coin ,now .", "", "☂\n\tpièce", "<think>\nhm\n</think>\n\ngo"])
def test_actions_come_back_as_they_were(tokenizers: dict[str, Any], name: str, context: ContextPolicy, text: str) -> None:
    bound(context, tokenizers[name])
    ids = context.encode_action(text)
    assert ids.dtype == np.int32
    assert ids[-1] == tokenizers[name].eos_token_id
    assert context.decode_action(ids) == context.decode_action(ids[:-1]) == text


@pytest.mark.parametrize("context_class", [AppendContext, StateContext])
def test_first_prompt(tokenizers: dict[str, Any], context_class: type[ContextPolicy]) -> None:
    said = "Find the coin and take it.\nYou are in a cellar.\nCommands: go west, go east"
    expected = {
        "bare": f"Be brief.\n{said}\n>",
        "chatml": f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n",
    }
    for name, text in expected.items():
        prompt = bound(context_class(instructions="Be brief."), tokenizers[name]).prompt_ids(OBSERVATIONS[:1], [])
        assert prompt.dtype == np.int32
        assert text_of(tokenizers[name], prompt) == text


def test_without_instructions(tokenizers: dict[str, Any]) -> None:
    bare = bound(StateContext(instructions=""), tokenizers["bare"]).prompt_ids(OBSERVATIONS[:1], [])
    assert text_of(tokenizers["bare"], bare).startswith("Find the coin")
    chat = bound(StateContext(instructions=""), tokenizers["chatml"]).prompt_ids(OBSERVATIONS[:1], [])
    assert text_of(tokenizers["chatml"], chat).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_template_arguments_reach_every_turn(tokenizers: dict[str, Any]) -> None:
    empty = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for context_class in (AppendContext, StateContext):
        quick = bound(context_class(template_kwargs={"enable_thinking": False}), tokenizers["thinking"])
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
    prompt = context.prompt_ids([Observation("A room.")], [])
    step = make_step(context, prompt, "look", 0)
    ours, plain = (context.prompt_ids([Observation("A room."), Observation(text)], [step]) for text in (said, "A room."))
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


@pytest.mark.parametrize("name", ["bare", "chatml", "thinking"])
@pytest.mark.parametrize("stopped", [True, False], ids=["stop", "length"])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"tools": TOOLS}], ids=["", "quick", "tools"])
@pytest.mark.parametrize("answers", [ANSWERS, THOUGHTS], ids=["plain", "thoughts"])
def test_append_is_token_exact(
    tokenizers: dict[str, Any], name: str, stopped: bool, arguments: dict[str, Any], answers: list[str]
) -> None:
    context = bound(AppendContext(template_kwargs=arguments), tokenizers[name])
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


@pytest.mark.parametrize("name", ["bare", "chatml", "thinking"])
def test_append_continues_a_cut_answer_like_a_whole_one(tokenizers: dict[str, Any], name: str) -> None:
    context = bound(AppendContext(), tokenizers[name])
    for cut, whole in zip(play(context, stopped=False)[0], play(context)[0], strict=True):
        np.testing.assert_array_equal(cut, whole)


def test_append_keeps_what_was_sampled_even_if_it_would_be_encoded_otherwise(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["chatml"]
    context = bound(AppendContext(), tokenizer)
    prompt = context.prompt_ids(OBSERVATIONS[:1], [])
    by_byte = np.concatenate([tokenizer.encode(letter) for letter in "You are"] + [[tokenizer.eos_token_id]])
    assert len(by_byte) > len(context.encode_action("You are"))
    step = make_step(context, prompt, "", 0)
    object.__setattr__(step, "action_ids", by_byte.astype(np.int32))
    following = context.prompt_ids(OBSERVATIONS[:2], [step])
    np.testing.assert_array_equal(following[len(prompt) : len(prompt) + len(by_byte)], by_byte)


@pytest.mark.parametrize("name", ["chatml", "thinking"])
@pytest.mark.parametrize("instructions", ["Be brief.", ""])
@pytest.mark.parametrize("arguments", [{}, {"tools": TOOLS}], ids=["", "tools"])
def test_append_reads_like_the_whole_conversation_rendered_at_once(
    tokenizers: dict[str, Any], name: str, instructions: str, arguments: dict[str, Any]
) -> None:
    tokenizer = tokenizers[name]
    context = bound(AppendContext(instructions, arguments), tokenizer)
    prompts, _ = play(context)
    messages = [{"role": "system", "content": instructions}] if instructions else []
    for turn, prompt in enumerate(prompts):
        messages.append({"role": "user", "content": context.render_observation(OBSERVATIONS[turn], with_goal=turn == 0)})
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
        assert text_of(tokenizer, prompt) == whole
        assert ('"name": "act"' in whole) == (name == "thinking" and bool(arguments))
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
    prompt = context.prompt_ids(OBSERVATIONS[:1], [])
    for stopped in (True, False):
        step = make_step(context, prompt, "go west", 0, stopped)
        with pytest.raises(ConfigError, match="StateContext"):
            context.prompt_ids(OBSERVATIONS[:2], [step])


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
