"""Exported policies say what their runs said: by the code of the card, by the adapter on its base, and merged."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from steppo.cli import SteppoCLI
from steppo.export import main
from steppo.models import TinyPolicy
from steppo.types import Request, Sampling
from tests.cli_helpers import checkpoint, run
from tests.conftest import corridor_texts
from tests.toy_env import CorridorEnv

LORA = ["--model.critic=steppo.models.AdapterCritic", "--quantization.lora_rank=4", "--model.policy_optimizer.lr=0.02"]
ODD = ["--quantization.lora_rank=3", "--quantization.lora_alpha=17.5", "--quantization.lora_targets=[q_proj,down_proj]"]
INSTRUCTIONS = ["--data.source.context.instructions=Answer with one command.", "--data.source.max_prompt_tokens=450"]
# Options of the run; whether the merged model computes with the very same numbers.
RUNS = {
    "8-bit": ([*LORA, "--quantization.bits=8"], True),
    "4-bit, some layers, odd alpha": ([*LORA, *ODD, "--quantization.bits=4", *INSTRUCTIONS], True),
    "float64": ([*LORA, "--quantization.lora_alpha=1", "--trainer.precision=64-true"], True),
    "mixed": ([*LORA, "--trainer.precision=bf16-mixed"], False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pretrained model that samples in a way of its own unless told otherwise."""
    path = tmp_path_factory.mktemp("base") / "model"
    policy = TinyPolicy(hidden_size=64, seed=1)
    policy.build(corridor_texts)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight *= 3 if weight.dim() == 2 else 1  # else rounding hardly matters
    policy.model.generation_config.update(do_sample=True, top_k=7, temperature=3.0, max_new_tokens=9)
    policy.model.save_pretrained(path)
    policy.tokenizer.save_pretrained(path)
    return str(path)


def prompts(cli: SteppoCLI) -> list[Any]:
    env = CorridorEnv()
    return [cli.datamodule.source.context.prompt_ids([env.reset(task)], []) for task in env.tasks("valid")]


def said_by_the_run(cli: SteppoCLI) -> list[list[int]]:
    """Greedy answers of the run's own engine, one prompt at a time."""
    engine, answers = cli.datamodule.source.engine, []
    for number, prompt in enumerate(prompts(cli)):
        engine.submit(Request(number, "", prompt, Sampling(0.0, 12), 0))
        with cli.trainer.precision_plugin.forward_context():
            answers += [completion.action_ids.tolist() for _ in range(12) for completion in engine.poll()]
    return answers


def said_by(model: Any, cli: SteppoCLI) -> list[list[int]]:
    answers = []
    for prompt in prompts(cli):
        ids = torch.from_numpy(prompt).long()[None]
        mixed = cli.trainer.precision == "bf16-mixed"
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
        answers.append(answer[0, ids.shape[1] :].tolist())
    return answers


def by_its_card(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's code makes, as a reader would run it beside the folder."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    monkeypatch.chdir(folder.parent)
    exec(code.replace("'...'", repr(text)), names)
    return names


@pytest.mark.parametrize(("options", "exact"), RUNS.values(), ids=RUNS)
def test_card_adapter_and_merged_model_answer_as_the_run(
    options: list[str], exact: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--model.policy=steppo.models.HFPolicy", f"--model.policy.name_or_path={folder}"]
    short = [
        "--trainer.max_epochs=1",
        "--warm_start.updates=2",
        "--warm_start.lr=1e-3",
        "--rollout.episodes_per_iteration=4",
        "--data.source.env.max_steps=3",
        "--transcripts.num_shown=0",
        "--data.source.max_new_tokens=12",
    ]
    cli = run(tmp_path / "run", *base, *short, *options)
    expected = said_by_the_run(cli)
    source = cli.datamodule.source

    main([f"--ckpt_path={checkpoint(tmp_path / 'run')}", f"--out={tmp_path}/agent"])
    opening = CorridorEnv().reset(CorridorEnv().tasks("valid")[0])
    names = by_its_card(tmp_path / "agent", source.context.render_observation(opening), monkeypatch)
    inputs: Tensor = names["inputs"]["input_ids"]
    assert inputs[0].tolist() == prompts(cli)[0].tolist()
    assert names["action"][0, inputs.shape[1] :].tolist() == expected[0]
    assert said_by(names["model"], cli) == expected
    if cli.model.lora is None:
        return

    settings = dict(cli.model.policy.load_arguments())
    if "quantization_config" in settings:
        settings["quantization_config"] = BitsAndBytesConfig(**settings["quantization_config"])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, **settings), tmp_path / "agent")
    adapted.generation_config = names["model"].generation_config
    adapted.train()  # the base has no dropout
    assert said_by(adapted, cli) == expected

    main([f"--ckpt_path={checkpoint(tmp_path / 'run')}", f"--out={tmp_path}/merged", "--merge"])
    names = by_its_card(tmp_path / "merged", "x", monkeypatch)
    merged = names["model"]
    assert not hasattr(merged.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == cli.model.policy.tokenizer.get_vocab()
    if exact:
        assert said_by(merged, cli) == expected
    else:
        assert next(merged.parameters()).dtype == torch.float32
