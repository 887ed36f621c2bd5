"""Tokenizers and histories for the tests of rendering."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from steppo.rendering import ContextPolicy, Renderer
from steppo.types import Step, Turn

# As their models have them (Apache-2.0).
SMOLLM2, QWEN3 = ((Path(__file__).parent / "templates" / f"{name}.jinja").read_text() for name in ("smollm2", "qwen3"))

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

TURNS = [
    Turn("You are in a cellar.", "Find the coin and take it.", ("go west", "go east")),
    Turn("You are in a shower.\nThere is a coin.", "Find the coin and take it.", ("go east", "take coin")),
    Turn("You are in a shower.", "Find the coin and take it.", ("take coin",), feedback="'dance' is not possible here."),
    Turn("Ceci n'est pas une pièce. ☂", "Find the coin and take it."),
]
ANSWERS = ["go west", "dance", "take  coin"]
THOUGHTS = [f"<think>\nthought {number}\n</think>\n\n{answer}" for number, answer in enumerate(ANSWERS)]
TOOLS = [{"type": "function", "function": {"name": "act", "parameters": {"type": "object", "properties": {}}}}]

# Tokens of their own that are not flagged as special, as Qwen3's tokenizer has them.
QWEN3_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "unclosed": UNCLOSED, "smollm2": SMOLLM2, "qwen3": QWEN3}


def make_tokenizers() -> dict[str, Any]:
    """By name: one with special tokens for each template, and one without a template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [turn.text for turn in TURNS] + ["user assistant system\n\n<think>\n\n</think>\n\n"] * 9
    backend.train_from_iterator(words, trainer)
    made: dict[str, Any] = {}
    for name, template in {**TEMPLATES, "plain": None}.items():
        made[name] = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
        )
        made[name].chat_template = template
    made["qwen3"].add_tokens([AddedToken(token, special=False, normalized=False) for token in QWEN3_TOKENS])
    return made


def bound(context: ContextPolicy, tokenizer: Any, template_kwargs: dict[str, Any] | None = None) -> ContextPolicy:
    renderer = Renderer(template_kwargs)
    renderer.bind(tokenizer, {tokenizer.eos_token_id})
    context.bind(renderer)
    return context


def make_step(context: ContextPolicy, prompt_ids: np.ndarray, answer: str, index: int, stopped: bool = True) -> Step:
    ids = context.renderer.encode_action(answer)
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
    prompts = [context.prompt_ids(TURNS[:1], steps)]
    for index, answer in enumerate(answers):
        steps.append(make_step(context, prompts[-1], answer, index, stopped))
        prompts.append(context.prompt_ids(TURNS[: index + 2], steps))
    return prompts, steps


def text_of(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)
