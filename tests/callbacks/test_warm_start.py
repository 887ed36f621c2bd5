"""The warm start: what its cache goes by, damaged files, full folders, what cannot be said; tokens without embeddings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from callbacks import WarmStartCallback
from steppo.batch import Segment
from steppo.buffer import StepBuffer
from steppo.errors import ConfigError
from steppo.models import HFPolicy, TinyPolicy
from steppo.models.adapters import LoRASettings
from steppo.models.identity import identity
from steppo.packing import PaddedPacker
from tests.cli_helpers import run
from tests.conftest import corridor_texts
from tests.learner.fakes import ScrambledPacker

# The warm start, and nothing after it.
SHORT = ["--warm_start.updates=1", "--rollout.max_environment_steps=0", "--trainer.limit_val_batches=0"]
SEGMENTS = [Segment(np.arange(4, dtype=np.int32), np.arange(2, dtype=np.int32))]


def key(
    callback: WarmStartCallback | None = None,
    lora: LoRASettings | None = None,
    segments: list[Segment] = SEGMENTS,
    model: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    policy = TinyPolicy(hidden_size=32, seed=0)
    policy.build(corridor_texts)
    for name, value in (model or {}).items():
        setattr(policy.model.config, name, value)
    if lora is not None:
        torch.manual_seed(0)
        policy.add_lora(lora)
    module = SimpleNamespace(
        policy=policy,
        identity=identity(policy),
        gradient_checkpointing=changes.get("gradient_checkpointing", False),
        device=torch.device("cpu"),
        data=SimpleNamespace(buffer=StepBuffer(changes.get("packer", PaddedPacker()), changes.get("max_tokens", 100))),
    )
    trainer = SimpleNamespace(
        strategy=changes.get("strategy", ""),
        world_size=changes.get("world", 1),
        precision=changes.get("precision", "32-true"),
    )
    callback = callback or WarmStartCallback(seed=0)
    return callback._key(cast(Any, trainer), cast(Any, module), segments)


def test_whatever_shapes_the_result_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key() == key(WarmStartCallback(seed=0, cache_dir=str(tmp_path)))  # where it is kept does not shape it
    lora = LoRASettings(2, 4.0)
    found = [
        key(),
        key(lora=lora),
        key(lora=LoRASettings(2, 64.0)),
        key(lora=LoRASettings(4, 8.0)),
        key(lora=LoRASettings(2, 4.0, ("q_proj",))),
        key(WarmStartCallback(seed=1)),
        key(WarmStartCallback(seed=0, lr=0.1)),
        key(WarmStartCallback(seed=0, updates=2)),
        key(WarmStartCallback(seed=0, batch_size=2)),
        key(WarmStartCallback(seed=0, prompt_coef=0.5)),
        key(WarmStartCallback(seed=0, actions="expert")),
        key(segments=SEGMENTS * 2),
        key(model={"rms_norm_eps": 1e-3}),
        key(model={"_attn_implementation": "eager"}),
        key(gradient_checkpointing=True),
        key(max_tokens=50),
        key(packer=ScrambledPacker()),
        key(strategy=1),
        key(world=2),
        key(precision="bf16-mixed"),
    ]
    monkeypatch.setattr("callbacks.warm_start.version", lambda name: "0.1")
    found.append(key())
    monkeypatch.undo()
    monkeypatch.setattr("callbacks.warm_start._code", lambda policy: [Path(__file__)])
    found.append(key())
    assert len(set(found)) == len(found)


def test_another_alpha_clones_anew(tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    tiny_policy.model.save_pretrained(tmp_path / "base")
    tiny_policy.tokenizer.save_pretrained(tmp_path / "base")
    options = ["--model.policy=steppo.models.HFPolicy", f"--model.policy.name_or_path={tmp_path}/base"]
    options += [
        "--quantization.lora_rank=4",
        "--model.critic=steppo.models.AdapterCritic",
        f"--warm_start.cache_dir={tmp_path}/c",
    ]
    for number, alpha in enumerate((8, 64)):
        run(tmp_path / str(number), *options, *SHORT, f"--quantization.lora_alpha={alpha}")
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_a_run_makes_anew_what_is_damaged(tmp_path: Path) -> None:
    run(tmp_path / "one", *SHORT, f"--warm_start.cache_dir={tmp_path}/cache")
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    run(tmp_path / "two", *SHORT, f"--warm_start.cache_dir={tmp_path}/cache")
    assert path.read_bytes() == whole


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("warm_start/")]
    return {name.partition("/")[2]: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def test_it_tells_how_it_goes_and_changes_nothing_by_that(tmp_path: Path) -> None:
    options = [*SHORT, "--warm_start.updates=80", "--warm_start.actions=expert", "--trainer.log_every_n_steps=8"]
    curves = []
    for name, held_out in (("without", 0), ("with", 4), ("again", 4)):
        cache = f"--warm_start.cache_dir={tmp_path}/{'with' if held_out else 'without'}_cache"
        run(tmp_path / name, *options, cache, f"--warm_start.held_out={held_out}")
        curves.append(_curves(tmp_path / name))
    without, with_it, again = curves
    assert [step for step, _ in without["loss"]] == [*range(8, 81, 8)]
    assert without["loss"][-1][1] < without["loss"][0][1] / 2
    assert with_it["loss"] == without["loss"]
    assert [step for step, _ in with_it["held_out_loss"]] == [*range(8, 81, 8)]
    assert with_it["held_out_loss"][-1][1] < with_it["held_out_loss"][0][1] / 2
    assert with_it["held_out_accuracy"][-1][1] > with_it["held_out_accuracy"][0][1]
    assert again == {name: points[-1:] for name, points in with_it.items() if name != "loss"}  # the weights were kept
    (one,), (other,) = (list((tmp_path / f"{name}_cache").iterdir()) for name in ("without", "with"))
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_a_run_goes_on_without_its_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cli = run(tmp_path / "run", *SHORT, "--rollout.max_environment_steps=1", f"--warm_start.cache_dir={tmp_path}/file/x")
    assert cli.model.counters.iterations == 1


def test_demonstrations_that_the_policy_cannot_say_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *SHORT, "--data.source.max_new_tokens=1")
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: warm_start: ")
    assert "set data.source.max_new_tokens to 4 at least" in line


@pytest.mark.parametrize(("lengths", "count"), [([3], 0), ([3, 3, 4], 1), ([9, 1], 1), ([4] * 5, 5), ([4, 70], 2), ([1], 0)])
def test_one_that_is_too_long_is_enough(lengths: list[int], count: int) -> None:
    steps: Any = [SimpleNamespace(action_ids=np.zeros(length, dtype=np.int32)) for length in lengths]
    renderer = SimpleNamespace(decode_action=lambda ids: "go " * 100)
    source: Any = SimpleNamespace(max_new_tokens=3, renderer=renderer)
    if not count:
        WarmStartCallback._check_lengths(steps, source)
        return
    with pytest.raises(ConfigError, match=f"{count} of {len(lengths)} .* to {max(lengths)} at least") as raised:
        WarmStartCallback._check_lengths(steps, source)
    assert len(str(raised.value)) < 400


# ---- tokenizers with more tokens than the model ----


def _add(folder: Path, tokens: list[str], special: bool, template: str = "", **roles: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<filler {number}>" for number in range(512 - len(tokenizer))])
    tokenizer.add_special_tokens(roles) if roles else tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(folder)


TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
TOKENS: dict[str, tuple[Any, str]] = {
    "words": (lambda folder: _add(folder, ["take the coin"], False), "'take the coin' is 512"),
    "many": (lambda folder: _add(folder, ["first of", "second of", "third of"], False), "3 tokens of"),
    "in the template": (lambda folder: _add(folder, ["<|user|>"], True, "<|user|>" + TEMPLATE), "'<|user|>' is 512"),
    "made by the template": (
        lambda folder: _add(folder, ["<|user|>"], True, "{{ '<|' + 'user|>' }}" + TEMPLATE),
        "<|user|>",
    ),
    "end": (lambda folder: _add(folder, [], True, eos_token="<|stop|>"), "'<|stop|>' is 512"),
    "padding, which nobody reads": (lambda folder: _add(folder, [], True, pad_token="<|none|>"), ""),
    "an image's, which nobody writes": (lambda folder: _add(folder, ["<|image|>"], True, TEMPLATE), ""),
    "none": (lambda folder: None, ""),
}


@pytest.mark.parametrize(("change", "message"), TOKENS.values(), ids=TOKENS)
def test_tokens_without_an_embedding_are_refused(change: Any, message: str, tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    tiny_policy.model.save_pretrained(tmp_path)
    tiny_policy.tokenizer.save_pretrained(tmp_path)
    change(tmp_path)
    policy = HFPolicy(str(tmp_path))
    if not message:
        policy.build(list)
        return
    with pytest.raises(ConfigError, match="resize_token_embeddings") as raised:
        policy.build(list)
    assert message in str(raised.value)


def test_a_stop_id_outside_the_vocabulary_is_refused(tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    tiny_policy.model.generation_config.eos_token_id = [1, 9999]
    tiny_policy.model.save_pretrained(tmp_path)
    tiny_policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="'stop id 9999' is 9999"):
        HFPolicy(str(tmp_path)).build(list)
