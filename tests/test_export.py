"""Exported policies: plain transformers loads them and finds the same numbers; the card tells and keeps to itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from steppo.batch import Segment
from steppo.cli import SteppoCLI
from steppo.engines import HFEngine
from steppo.export import _use, clean_config, main
from steppo.models import Policy, TinyPolicy
from steppo.packing import PaddedPacker
from steppo.rendering import AppendContext, Renderer, StateContext
from steppo.rollouts import EnvSource
from steppo.types import RolloutConfig, Step, Turn, groups_of
from tests.cli_helpers import TOY, checkpoint, evaluations, run
from tests.rendering.helpers import make_tokenizers
from tests.search_env import SearchEnv
from tests.test_train import CHAT

OPENING = Turn("You are in room 1.", "Take the coin in room 0.", ("left", "right", "take"))


def export(run_folder: Path, out: Path, *args: str) -> None:
    main([f"--ckpt_path={checkpoint(run_folder)}", f"--out={out}", *args])


def bound(policy: Policy) -> Renderer:
    renderer = Renderer()
    renderer.bind(policy.tokenizer, policy.stop_ids)
    return renderer


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def assert_same_policy(policy: Policy, folder: Path, model: Any = None) -> None:
    """Same ids and same log-probabilities, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    context = StateContext()
    context.bind(bound(policy))
    prompt = context.prompt_ids([OPENING], [])
    text = policy.tokenizer.decode(prompt)
    assert tokenizer.encode(text, add_special_tokens=False) == prompt.tolist()
    action = context.renderer.encode_action("left")
    assert [*tokenizer.encode("left", add_special_tokens=False), tokenizer.eos_token_id] == action.tolist()
    ((_, batch),) = PaddedPacker().pack([Segment(prompt, action)], 10_000)
    with torch.no_grad():
        ours, _ = policy.action_logprobs(policy.hidden(batch), batch, torch.ones(len(action)))
        ids = torch.from_numpy(np.concatenate([prompt, action])).long()
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
    theirs = logits.gather(1, ids[len(prompt) :, None])[:, 0] - logits.logsumexp(-1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_transformers_loads_the_same_policy(toy_run: tuple[SteppoCLI, Path], tmp_path: Path) -> None:
    cli, folder = toy_run
    export(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert_same_policy(cli.model.policy, tmp_path / "out")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.max_new_tokens, generation.eos_token_id, generation.pad_token_id) == (4, [1], 0)
    assert not generation.do_sample  # as evaluated


@pytest.mark.parametrize("bits", [[], ["--quantization.bits=4"]], ids=["lora", "4-bit"])
def test_peft_loads_the_same_adapter(bits: list[str], tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    tiny_policy.model.save_pretrained(tmp_path / "base")
    tiny_policy.tokenizer.save_pretrained(tmp_path / "base")
    cli = run(
        tmp_path / "run",
        "--model.policy=steppo.models.HFPolicy",
        f"--model.policy.name_or_path={tmp_path}/base",
        "--model.critic=steppo.models.AdapterCritic",
        "--model.objective.kl=loss",
        "--quantization.lora_rank=4",
        "--trainer.max_epochs=1",
        *bits,
    )
    export(tmp_path / "run", tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in saved.values()) == sum(w.numel() for w in cli.model.policy.trained_parameters())
    assert front_matter(tmp_path / "adapter")["library_name"] == "peft"
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized if bits else None)
    base.train()  # in evaluation mode 4-bit layers of a toy's size fail on some CPUs
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    model.eval = lambda: model  # type: ignore[method-assign]
    assert_same_policy(cli.model.policy, tmp_path / "adapter", model)
    export(tmp_path / "run", tmp_path / "merged", "--merge")
    assert front_matter(tmp_path / "merged")["library_name"] == "transformers"
    if not bits:  # merged weights are whole: the base's rounding to 4 bits is gone
        assert_same_policy(cli.model.policy, tmp_path / "merged")


def test_generate_gives_the_action_that_the_engine_gives(toy_run: tuple[SteppoCLI, Path], tmp_path: Path) -> None:
    cli, folder = toy_run
    export(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    source = cli.datamodule.source
    task = source.tasks("valid")[0]
    ((episode,),) = source.collect(groups_of([task]), RolloutConfig("test", 0, temperature=0.0))
    source.close()
    for step in episode.steps:
        ids = torch.from_numpy(step.prompt_ids).long()[None]
        answer = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
        assert answer.tolist() == step.action_ids.tolist()
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == step.action


@pytest.mark.parametrize("instructions", ["", "Do as told."])
def test_the_chat_template_writes_what_the_contexts_wrote(
    instructions: str, toy_run: tuple[SteppoCLI, Path], tmp_path: Path
) -> None:
    cli, folder = toy_run
    export(folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    context = AppendContext(instructions)
    context.bind(bound(cli.model.policy))
    first = context.prompt_ids([OPENING], [])
    action = context.renderer.encode_action("left")
    step = Step(first, action, np.zeros(len(action)), 0.0, 0, "stop", False, False, True, OPENING.text, "left", 1.0, 0)
    second = context.prompt_ids([OPENING, OPENING], [step])
    turns = [{"role": "system", "content": instructions}] if instructions else []
    turns.append({"role": "user", "content": context.render_observation(OPENING)})
    for expected in (first, second):
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert text == tokenizer.decode(expected)
        turns.append({"role": "assistant", "content": "left"})
        turns.append({"role": "user", "content": context.render_observation(OPENING, with_goal=False)})


def test_an_exported_policy_trains_on(toy_run: tuple[SteppoCLI, Path], tmp_path: Path) -> None:
    """Into a run as a pretrained model, and out again: the chat template and the name of the base come along."""
    export(toy_run[1], tmp_path / "base")
    generation = tmp_path / "base" / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"do_sample": True, "top_k": 20}))
    (tmp_path / "base" / "chat_template.jinja").write_text(CHAT)
    cli = run(
        tmp_path / "run",
        "--model.policy=steppo.models.HFPolicy",
        f"--model.policy.name_or_path={tmp_path}/base",
        "--trainer.max_epochs=1",
        "--warm_start.updates=5",
        "--evaluation.temperature=0.5",
    )
    export(tmp_path / "run", tmp_path / "out")
    assert_same_policy(cli.model.policy, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT
    sampling = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (sampling.do_sample, sampling.temperature, sampling.top_k, sampling.top_p) == (True, 0.5, 0, 1.0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Began as: `base`" in card
    assert str(tmp_path) not in card
    assert "base_model" not in front_matter(tmp_path / "out")  # a folder is no model of the hub


def test_the_card_tells_what_was_trained_and_how_it_went(toy_run: tuple[SteppoCLI, Path], tmp_path: Path) -> None:
    _, folder = toy_run
    export(folder, tmp_path / "my-agent")
    card = (tmp_path / "my-agent" / "README.md").read_text()
    assert front_matter(tmp_path / "my-agent")["library_name"] == "transformers"
    assert "steppo" in front_matter(tmp_path / "my-agent")["tags"]
    assert "# my-agent" in card
    assert "- Environment: `tests.toy_env.CorridorEnv`, split `train`" in card
    first, *_, last = evaluations(folder)
    for record in (first, last):
        (line,) = [line for line in card.splitlines() if f" on valid after {record['iteration']} iterations" in line]
        low, high = record["success_ci95"]
        assert f"success {record['success_rate']:.2f} [{low:.2f}, {high:.2f}]" in line
    assert str(folder) not in card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config["model"]["init_args"]["policy"]["init_args"]["hidden_size"] == 32
    assert "logger" not in config["trainer"]


def test_results_of_a_moved_checkpoint_come_from_its_own_history(toy_run: tuple[SteppoCLI, Path], tmp_path: Path) -> None:
    moved = tmp_path / "run" / "checkpoints" / "iteration-000002.ckpt"
    moved.parent.mkdir(parents=True)
    moved.write_bytes(checkpoint(toy_run[1]).read_bytes())
    export(tmp_path / "run", tmp_path / "out", f"--config={TOY}")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("evaluation on valid") >= 2


def test_configs_lose_secrets_and_machine_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {"max_epochs": 2, "logger": None},
        "data": {
            "games": f"{tmp_path}/games/one",
            "cache_dir": "/home/me/cache",
            "api_key": "k",
            "hf_token": "t",
            "url": "https://me:word@example.org/x",
            "instructions": "/no_think",
            "list": ["/home/me/a.txt", 1, None],
            "max_new_tokens": 4,
            "past": None,
        },
    }
    assert clean_config(config) == {
        "trainer": {"max_epochs": 2},
        "data": {
            "games": "games/one",
            "cache_dir": "cache",
            "api_key": "(removed)",
            "hf_token": "(removed)",
            "url": "https://example.org/x",
            "instructions": "/no_think",
            "list": ["a.txt", 1, None],
            "max_new_tokens": 4,
            "past": None,
        },
    }


def _foreign(folder: Path) -> list[str]:
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    return [f"--ckpt_path={folder}/foreign.ckpt"]


def _unreadable(folder: Path) -> list[str]:
    (folder / "broken.ckpt").write_text("no weights in here")
    return [f"--ckpt_path={folder}/broken.ckpt"]


def _pickled(folder: Path) -> list[str]:
    torch.save({"steppo": TinyPolicy(hidden_size=8, num_heads=2)}, folder / "pickled.ckpt")
    return [f"--ckpt_path={folder}/pickled.ckpt"]


def _full(folder: Path) -> list[str]:
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").touch()
    return [f"--out={folder}/full"]


def _alone(folder: Path) -> list[str]:
    (folder / "alone").mkdir()
    torch.save({"steppo": {}}, folder / "alone" / "last.ckpt")
    return [f"--ckpt_path={folder}/alone/last.ckpt"]


MISTAKES = {
    "no_out": (lambda folder: ["--out="], "is not an empty folder"),
    "no_checkpoint": (lambda folder: ["--ckpt_path=nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
    "no_config_of_the_run": (_alone, "give its config with --config"),
    "no_config": (lambda folder: ["--config=nowhere.yaml"], "cannot read config nowhere.yaml"),
    "foreign": (_foreign, "was not written by steppo"),
    "unreadable": (_unreadable, "damaged or no checkpoint"),
    "pickled": (_pickled, "damaged or no checkpoint"),
    "misfit": (lambda folder: ["--model.policy.num_layers=2"], "does not fit the config's model"),
    "full_folder": (_full, "full exists already and is not an empty folder"),
    "unknown_option": (lambda folder: ["--mrege"], "--mrege"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(
    name: str, toy_run: tuple[SteppoCLI, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(SystemExit) as stopped:
        export(toy_run[1], tmp_path / "out", *make(tmp_path))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "python -m steppo.export --ckpt_path runs/quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("template", ["smollm2", "qwen3"])
def test_the_card_shows_the_tools(template: str) -> None:
    """Its first prompt is that of the run, but for the question."""
    tokenizer = make_tokenizers()[template]
    policy = SimpleNamespace(
        tokenizer=tokenizer, stop_ids={tokenizer.eos_token_id}, load_arguments=dict, adapters=None, base_dtype=None
    )
    source = EnvSource(
        SearchEnv(), AppendContext("Search first."), HFEngine(), renderer=Renderer({"enable_thinking": False})
    )
    model, data = SimpleNamespace(policy=policy), SimpleNamespace(source=source)
    lines = _use(
        "there", SimpleNamespace(model=model, datamodule=data, config_dump={"trainer": {"precision": "32-true"}}), False
    )
    code = "\n".join(line for line in lines if line.startswith(("prompt", "text")))
    said = {"tokenizer": tokenizer}
    exec(code, said)
    expected = source.context.prompt_ids([Turn("...")], [])
    assert said["text"] == tokenizer.decode(expected)
    assert "Finds documents by their words." in said["text"]
