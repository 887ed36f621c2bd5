"""A checkpoint is taken by the model it belongs to, whatever its folder is called, and by no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steppo.export import main as export
from steppo.models import HFPolicy, TinyPolicy
from steppo.models.adapters import LoRASettings
from steppo.models.identity import difference, identity
from steppo.play.command import main as play
from tests.cli_helpers import checkpoint, evaluations, run
from tests.conftest import corridor_texts

SHORT = ["--trainer.max_epochs=1", "--warm_start.updates=1", "--rollout.episodes_per_iteration=4"]
LORA = ["--quantization.lora_rank=4", "--model.critic=steppo.models.AdapterCritic"]


def base(folder: Path, seed: int = 0, **settings: int) -> Path:
    """A pretrained model."""
    policy = TinyPolicy(hidden_size=32, seed=seed, **settings)
    policy.build(corridor_texts)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def of(folder: Path) -> list[str]:
    return ["--model.policy=steppo.models.HFPolicy", f"--model.policy.name_or_path={folder}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and the folder of a run of an adapter on it."""
    folder = tmp_path_factory.mktemp("belonging")
    run(folder / "run", *of(base(folder / "base")), *LORA, *SHORT)
    return folder / "base", folder / "run"


def error(call: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        call()
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_an_adapter_is_not_taken_by_another_base(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By none of the commands; the same model in another folder is the same."""
    (_, folder), other = trained, base(tmp_path / "base", seed=1)
    path = f"--ckpt_path={checkpoint(folder)}"
    calls: dict[str, Callable[[Path], Any]] = {
        "fit": lambda base: run(tmp_path / "fit", path, *of(base), *LORA, *SHORT, "--trainer.max_epochs=2"),
        "validate": lambda base: run(tmp_path / "validate", path, *of(base), *LORA, command="validate"),
        "test": lambda base: run(tmp_path / "test", path, *of(base), *LORA, command="test"),
        "export": lambda base: export([path, f"--out={tmp_path}/out", *of(base)]),
        "play": lambda base: play([path, *of(base)]),
    }
    for call in calls.values():
        line = error(lambda call=call: call(other), capsys)  # type: ignore[misc]
        assert "does not fit the config's model: the base model's weights are others" in line
    same = base(tmp_path / "elsewhere")
    calls["validate"](same)
    assert evaluations(tmp_path / "validate")[0]["return_mean"] == evaluations(folder)[-1]["return_mean"]


OTHERS = {
    "alpha": (["--quantization.lora_alpha=64"], "lora_alpha is 8.0 there and 64.0 here"),
    "rank": (["--quantization.lora_rank=2"], "lora_rank is 4 there and 2 here"),
    "rank of the same scale": (["--quantization.lora_rank=2", "--quantization.lora_alpha=4"], "lora_rank is 4 there"),
    "bits": (["--quantization.bits=4"], "bits is None there and 4 here"),
    "base_dtype": (["--quantization.base_dtype=bfloat16"], "base_dtype is float32 there and bfloat16 here"),
    "no adapter": (["--quantization.lora_rank=0", "--model.critic=steppo.models.SharedCritic"], "lora_rank is 4 there"),
    "layers": (["--quantization.lora_targets=[q_proj]"], "it lacks or adds"),
    "critic": (["--model.advantage=steppo.advantages.TokenGAE"], "critic_reads is step there and token here"),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_what_differs_is_named(
    options: list[str], message: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, folder = trained
    everything = [f"--ckpt_path={checkpoint(folder)}", *of(given), *LORA, *options]
    assert message in error(lambda: run(tmp_path, *everything, command="validate"), capsys)


def test_an_older_checkpoint_is_taken_with_a_warning(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, folder = trained
    content = torch.load(checkpoint(folder), weights_only=True)
    del content["steppo"]["belongs_to"]
    torch.save(content, tmp_path / "older.ckpt")
    said: list[str] = []
    monkeypatch.setattr("steppo.checkpoints.rank_zero_warn", said.append)
    run(tmp_path, f"--ckpt_path={tmp_path}/older.ckpt", *of(given), *LORA, command="validate")
    assert len(said) == 1
    assert "does not say which model it belongs to" in said[0]


def test_a_checkpoint_decides_the_type_of_its_base(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """As one from a GPU does where there is none."""
    given, _ = trained
    run(tmp_path / "run", *of(given), *LORA, *SHORT, "--quantization.base_dtype=bfloat16")
    path = f"--ckpt_path={checkpoint(tmp_path / 'run')}"
    cli = run(tmp_path / "again", path, *of(given), *LORA, command="validate")
    assert cli.model.policy.dtype == torch.bfloat16
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("base_dtype: bfloat16", "base_dtype: null"))
    export([path, f"--out={tmp_path}/out"])
    assert "dtype=torch.bfloat16" in (tmp_path / "out" / "README.md").read_text()


def _config(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


def _template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")


def _tokenizer(folder: Path) -> None:
    """The same shapes, other words."""
    TinyPolicy(hidden_size=32).build(list)
    policy = TinyPolicy(hidden_size=32)
    policy.build(lambda: ["colourless green ideas sleep furiously " * 20, *(f"{n} ideas" for n in range(300))])
    policy.tokenizer.save_pretrained(folder)


def _stop(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 7]}))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokenizer": (_tokenizer, "the tokenizer is another one"),
    "chat template": (_template, "the chat template is another one"),
    "stop ids": (_stop, "stop_ids is [1] there and [1, 7] here"),
    "norm": (_config(rms_norm_eps=1e-3), "rms_norm_eps is 1e-06 there and 0.001 here"),
    "activation": (_config(hidden_act="gelu"), "hidden_act is silu there and gelu here"),
    "positions": (_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), "rope_parameters is"),
    "a longer limit": (_config(max_position_embeddings=2048), ""),
    "dropout": (_config(attention_dropout=0.5), ""),
    "another writer": (_config(transformers_version="4.0.0", use_cache=False), ""),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_of_whole_models_too_all_that_computes_counts(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    """Weights of the same shapes would load without a word."""
    found = []
    for name in ("there", "here"):
        folder = base(tmp_path / name)
        if name == "here":
            change(folder)
        policy = HFPolicy(str(folder))
        policy.build(list)
        found.append(identity(policy))
    there = torch.load(_saved(found[0], tmp_path), weights_only=True)
    assert (message in difference(there, found[1])) if message else not difference(there, found[1])


def _saved(value: Any, folder: Path) -> Path:
    torch.save(value, folder / "identity.pt")
    return folder / "identity.pt"


def test_the_fingerprint_sees_one_weight_of_any_layer(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    found = set()
    model = AutoModelForCausalLM.from_pretrained(folder)
    names = [name for name, _ in model.named_parameters()]
    for name in ["", *names[::4]]:
        changed = AutoModelForCausalLM.from_pretrained(folder)
        if name:
            changed.get_parameter(name).data.view(-1)[-3] += 1e-4
        changed.save_pretrained(tmp_path / "changed")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "changed")
        policy = HFPolicy(str(tmp_path / "changed"))
        policy.build(list)
        policy.add_lora(LoRASettings(2, 4.0))
        found.add(identity(policy)["base"])
    assert len(found) == 1 + len(names[::4])
