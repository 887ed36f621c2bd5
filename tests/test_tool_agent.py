"""An agent that calls tools, from the first prompt to trained weights, with the templates of real models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steppo.cli import SteppoCLI
from steppo.rendering import HermesParser
from steppo.types import Episode
from tests.cli_helpers import run
from tests.rendering.helpers import make_tokenizers, text_of
from tests.search_env import SearchEnv

SMOLLM2 = Path(__file__).parent.parent / "models" / "smollm2-135m"  # README of examples/convert_gguf.py makes it
OPTIONS = [
    "--data.source.env=tests.search_env.SearchEnv",
    "--data.source.context={class_path: AppendContext, instructions: Search first.}",
    "--data.source.max_prompt_tokens=1400",
    "--data.source.max_new_tokens=80",
    "--data.source.num_slots=4",
    "--data.num_minibatches=1",
    "--data.update_epochs=2",
    "--data.eval_tasks=2",
    "--rollout={episodes_per_iteration: 4, group_size: 2, temperature: 0.3}",
    "--trainer.max_epochs=1",
    "--warm_start={actions: expert, episodes: 4, batch_size: 4}",
    "--model.policy.class_path=HFPolicy",
]


def train(folder: Path, model: Path, *options: str) -> tuple[SteppoCLI, Sequence[Episode]]:
    cli = run(folder, *OPTIONS, f"--model.policy.name_or_path={model}", *options)
    return cli, cli.datamodule.buffer.experience.steps.episodes


def save(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A small model of random weights, whose tokens are the words of prompts and calls, so that it learns in seconds."""
    env, parser = SearchEnv(), HermesParser()
    texts = [parser.tools_text(env.tools)]
    for task in env.tasks("train"):
        env.start()
        turn, action = env.reset(task), env.expert_action()
        texts += [turn.goal, parser.answer(action, turn), env.step(action).observation]
    template, tokenizer = tokenizer.chat_template, tokenizer.train_new_from_iterator(texts * 3, 1200, show_progress=False)
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(cli: SteppoCLI, episodes: Sequence[Episode]) -> None:
    tokenizer = cli.model.policy.tokenizer
    assert len(episodes) == 4
    assert not any(episode.stop_reason.failed for episode in episodes)
    for episode in episodes:
        for before, after in zip(episode.steps, episode.steps[1:], strict=False):
            sampled = np.concatenate([before.prompt_ids, before.action_ids])
            np.testing.assert_array_equal(after.prompt_ids[: len(sampled)], sampled)
            answers = text_of(tokenizer, after.prompt_ids[len(sampled) :])
            assert answers.count("<tool_response>") == answers.count("</tool_response>") == before.metadata.get("calls", 0)
    assert cli.model.counters.updates == 2


@pytest.mark.parametrize("template", ["smollm2", "qwen3"])
def test_episodes_with_tools_are_played_and_learned_from(template: str, tmp_path: Path) -> None:
    save(tmp_path / "model", make_tokenizers()[template])
    cli, episodes = train(tmp_path / "run", tmp_path / "model", "--warm_start.updates=100", "--warm_start.lr=5e-3")
    check(cli, episodes)
    called = [step for episode in episodes for step in episode.steps if "calls" in step.metadata]
    assert called
    assert called[0].action.startswith("search({")


@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs models/smollm2-135m: see examples/convert_gguf.py")
def test_smollm2_plays_with_tools_and_learns(tmp_path: Path) -> None:
    check(*train(tmp_path, SMOLLM2, "--warm_start.updates=8", "--warm_start.lr=1e-4", "--model.policy_optimizer.lr=1e-5"))
