"""How files and options become one config: no class is made here."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from steppo.cli import build_parts
from steppo.cli.app import SECTIONS
from steppo.cli.config import complete, merged_config
from steppo.cli.config_files import read_command_line, read_config
from steppo.errors import ConfigError
from tests.cli_helpers import TOY

PLAIN = "{data: {source: {env: TextWorldEnv, context: StateContext}}, model: {policy: TinyPolicy, advantage: StepGAE}}"


def merged(*words: str) -> Any:
    """The config of a command line as the parser gets it."""
    _, layers, _ = read_command_line(["fit", *words], ["fit"])
    return complete(merged_config(layers, SECTIONS))


def at(config: Any, place: str) -> Any:
    """A setting, arguments being looked for in ``init_args``."""
    for name in place.split("."):
        config = config.get("init_args", config) if isinstance(config, dict) and name not in config else config
        config = config[name]
    return config


def shape(component: Any) -> tuple[str, Any]:
    """Last name of a component's class, and its arguments."""
    return component["class_path"].rpartition(".")[2], component["init_args"]


SWAPS = {  # place, what a base config has, what comes over it, what must be left
    "advantage": (
        "model.advantage",
        {"class_path": "StepGAE", "gamma": 0.9, "whiten_over": "episodes"},
        "TokenGAE",
        ("TokenGAE", {}),
    ),
    "group credit": (
        "model.advantage",
        {"class_path": "GRPO", "scale_by_std": False},
        {"class_path": "GiGPO", "gamma": 0.5},
        ("GiGPO", {"gamma": 0.5}),
    ),
    "loss": (
        "model.loss",
        {"ratio": "step", "clip_low": 0.1},
        {"class_path": "CISPO", "clip_high": 3.0},
        ("CISPO", {"clip_high": 3.0}),
    ),
    "policy": (
        "model.policy",
        {"class_path": "TinyPolicy", "seed": 3},
        {"class_path": "HFPolicy", "name_or_path": "x"},
        ("HFPolicy", {"name_or_path": "x"}),
    ),
    "context": (
        "data.source.context",
        {"class_path": "StateContext", "instructions": "a"},
        "AppendContext",
        ("AppendContext", {}),
    ),
    "env": (
        "data.source.env",
        {"class_path": "TextWorldEnv", "max_steps": 5},
        "tests.toy_env.CorridorEnv",
        ("CorridorEnv", {}),
    ),
    "logger": (
        "trainer.logger",
        {"save_dir": "a", "name": "b", "version": 1},
        {"class_path": "CSVLogger", "save_dir": "c"},
        ("CSVLogger", {"save_dir": "c"}),
    ),
    "optimizer": (
        "model.optimizer",
        {"class_path": "SGD", "weight_decay": 0.1},
        "torch.optim.RMSprop",
        ("RMSprop", {}),
    ),
}


def nested(place: str, value: Any) -> str:
    for name in reversed(place.split(".")):
        value = {name: value}
    return yaml.safe_dump(value, default_flow_style=True, width=10**6)


@pytest.mark.parametrize("name", SWAPS)
def test_another_class_starts_without_arguments(name: str) -> None:
    """Whoever names it, a file or an option; the same class, by any of its names, goes on with what it had."""
    place, before, new, left = SWAPS[name]
    base = ["--config", PLAIN, "--config", nested(place, before)]
    assert shape(at(merged(*base, "--config", nested(place, new)), place)) == left
    option = f"--{place}={new if isinstance(new, str) else yaml.safe_dump(new, default_flow_style=True, width=10**6)}"
    assert shape(at(merged(*base, option), place)) == left
    whole = at(merged(*base), place)
    for same in (whole["class_path"], whole["class_path"].rpartition(".")[2]):
        assert shape(at(merged(*base, f"--{place}={same}"), place)) == shape(whole)


FORMS = [  # of the same settings
    "model: {advantage: {class_path: GRPO, scale_by_std: false}}",
    "model: {init_args: {advantage: {class_path: GRPO, init_args: {scale_by_std: false}}}}",
    "model: {class_path: AgentModule, advantage: {class_path: steppo.advantages.GRPO, init_args: {scale_by_std: false}}}",
    "model: {class_path: steppo.module.AgentModule, init_args: {advantage: {class_path: GRPO, scale_by_std: false}}}",
    "model: {advantage: {class_path: steppo.advantages.grpo.GRPO, scale_by_std: false}}",
]


@pytest.mark.parametrize("form", FORMS)
def test_short_and_long_forms_are_the_same(form: str) -> None:
    found = at(merged("--config", PLAIN, "--config", f"{{{form}}}"), "model.advantage")
    assert shape(found) == ("GRPO", {"scale_by_std": False})
    assert found["class_path"].startswith("steppo.advantages.")


def test_options_in_any_form() -> None:
    for options in (
        ["--model.advantage=GRPO", "--model.advantage.scale_by_std=false"],
        ["--model.advantage", "steppo.advantages.GRPO", "--model.init_args.advantage.init_args.scale_by_std", "false"],
        ["--model.advantage.class_path=GRPO", "--model.advantage.init_args={scale_by_std: false}"],
        ["--model.advantage={class_path: GRPO, scale_by_std: false}"],
        ["--model={advantage: {class_path: GRPO, init_args: {scale_by_std: false}}}"],
    ):
        assert shape(at(merged("--config", PLAIN, *options), "model.advantage")) == ("GRPO", {"scale_by_std": False})


def test_where_there_is_one_choice_no_class_is_named() -> None:
    config = merged("--config", PLAIN, "--data.source.engine.max_batch_size=3", "--trainer.logger.save_dir=x")
    assert config["model"]["class_path"] == "steppo.module.AgentModule"
    assert config["data"]["class_path"] == "steppo.datamodule.StepDataModule"
    assert at(config, "data.source")["class_path"] == "steppo.rollouts.EnvSource"
    assert shape(at(config, "data.source.engine")) == ("HFEngine", {"max_batch_size": 3})
    assert shape(config["trainer"]["logger"]) == ("TensorBoardLogger", {"save_dir": "x"})
    assert shape(at(merged("--config", PLAIN), "data.source.engine")) == ("HFEngine", {})
    assert shape(at(merged("--config", PLAIN, "--model.loss.ratio=token"), "model.loss")) == (
        "ClippedLoss",
        {"ratio": "token"},
    )


def test_saved_configs_are_read_as_they_are() -> None:
    once = merged("--config", str(TOY))
    text = yaml.safe_dump(once, default_flow_style=True, width=10**6)
    assert merged("--config", text.strip()) == once


def test_lists_and_dicts(tmp_path: Path) -> None:
    (tmp_path / "stop.yaml").write_text("trainer: {callbacks+: {class_path: EarlyStopping, monitor: a}}\n")
    (tmp_path / "two.yaml").write_text("trainer: {callbacks+: [LearningRateMonitor, {class_path: Timer, duration: '1'}]}\n")
    stop, two = (f"--config={tmp_path}/{name}.yaml" for name in ("stop", "two"))

    def callbacks(*words: str) -> list[str]:
        return [shape(callback)[0] for callback in merged("--config", PLAIN, *words)["trainer"]["callbacks"]]

    assert callbacks(stop, two) == ["EarlyStopping", "LearningRateMonitor", "Timer"]
    assert callbacks(two, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=b")[2:] == ["EarlyStopping"]
    assert callbacks(stop, "--trainer.callbacks=[LearningRateMonitor]") == ["LearningRateMonitor"]
    level = ["--data.source.env.settings={level: 2, other: 3}", "--data.source.env.settings.level=4"]
    assert at(merged("--config", PLAIN, *level), "data.source.env.settings") == {"level": 4, "other": 3}
    replaced = "{data: {source: {env: {settings: {level: 5}}}}}"
    assert at(merged("--config", PLAIN, *level, "--config", replaced), "data.source.env.settings") == {"level": 5}


def test_a_config_may_extend_others(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "first.yaml").write_text("rollout: {group_size: 1, temperature: 0.5}\ndata: {eval_tasks: 1}\n")
    (tmp_path / "below" / "second.yaml").write_text("extends: ../first.yaml\nrollout: {group_size: 2}\n")
    (tmp_path / "third.yaml").write_text("extends: [below/second.yaml, fourth.yaml]\nnum_threads: 3\n")
    (tmp_path / "fourth.yaml").write_text("data: {eval_tasks: 4}\n")
    config = merged("--config", PLAIN, f"--config={tmp_path}/third.yaml")
    assert config["rollout"] == {"group_size": 2, "temperature": 0.5}
    assert (at(config, "data.eval_tasks"), config["num_threads"]) == (4, 3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("extends: nowhere.yaml", r"cannot read config .*nowhere\.yaml: No such file"),
        ("extends: a.yaml", "extends itself"),
        ("extends: [b.yaml]", r"b\.yaml, line 2: rollout\.groupsize is no setting"),
        ("extends: 3", "extends must be a file or a list of files, not 3"),
        ("extends: {a: b}", "extends must be a file or a list of files"),
        ("extends: null", "extends must be a file or a list of files"),
    ],
)
def test_what_cannot_be_extended(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text + "\n")
    (tmp_path / "b.yaml").write_text("rollout:\n  groupsize: 3\n")
    with pytest.raises(ConfigError, match=problem):
        merged("--config", PLAIN, f"--config={tmp_path}/a.yaml")


@pytest.mark.parametrize(
    ("lines", "number", "problem"),
    [
        (["model:", "  advantage:", "    class_path: TokenGAE", "    gama: 1"], 4, "did you mean model.advantage.gamma"),
        (["model:", "  init_args:", "    critic:", "      class_path: SharedCritik"], 3, "did you mean 'SharedCritic'"),
        (["data:", "  source:", "    env:", "      max_steps: two"], 4, "max_steps must be int, not two"),
        (["trainer:", "  callbacks:", "    - EarlyStoping"], 2, "did you mean 'EarlyStopping'"),
        (["trainer:", "  callbacks:", "    - class_path: Timer", "      time: 1"], 4, "callbacks.0.time is no setting"),
        (["# old", "rollout:", "  min_healthy: 0.5"], 3, "(CHANGELOG.md tells what was renamed)"),
        (["model:", "  advantage:", "    init_args: {even_episodes: 1}"], 3, "even_episodes is no setting of StepGAE"),
        (["model:", "  advantage:", "    init_args: 3"], 3, "model.advantage.init_args is no setting of StepGAE"),
        (["trainer:", "  strategy:", "    timeout: 3"], 2, "trainer.strategy needs a class_path, such as DDPStrategy"),
        (["rollout:", "  group_size+: 3"], 2, "rollout.group_size is no list"),
        (["warm_start:", "  lr: null"], 2, "warm_start.lr must be float, not null"),
    ],
)
def test_a_mistake_names_file_and_line(lines: list[str], number: int, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError) as raised:
        merged("--config", PLAIN, f"--config={path}")
    assert str(raised.value).startswith(f"config {path}, line {number}: ")
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-1E5", -1e5), ("2020-01-01", "2020-01-01"), ("1e", "1e"), ("5", 5), ("null", None), ("a: [", "a: [")],
)
def test_words_mean_what_they_mean_in_yaml(text: str, value: Any, tmp_path: Path) -> None:
    option = f"--data.source.renderer.template_kwargs.x={text}"
    assert at(merged("--config", PLAIN, option), "data.source.renderer.template_kwargs") == {"x": value}
    if text != "a: [":
        (tmp_path / "a.yaml").write_text(f"x: {text}\n")
        assert read_config(str(tmp_path / "a.yaml"))[0] == {"x": value}


@pytest.mark.parametrize("after", ["option", "file"])
def test_part_of_what_a_reference_stands_for_is_refused(after: str, tmp_path: Path) -> None:
    """Else the rest of it would be lost without a word."""
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("model: {critic_optimizer: '${model.policy_optimizer}'}\n")
    two.write_text("model: {critic_optimizer: {lr: 1.0}}\n")
    later = ["--model.critic_optimizer.lr", "1"] if after == "option" else ["--config", str(two)]
    with pytest.raises(ConfigError, match=r"critic_optimizer\S* belongs to what \$\{model.policy_optimizer\} stands for"):
        merged("--config", PLAIN, "--config", str(one), *later)


@pytest.mark.parametrize("text", ["12e5", "1e3", "0x10", "1_000", "null", "yes", "2026-01-02", "1:30", "~", ".5", "[a]"])
def test_text_stays_text(text: str, tmp_path: Path) -> None:
    """Whatever the parser would take it for."""
    path = tmp_path / "one.yaml"
    path.write_text(f"data: {{source: {{context: {{instructions: {text!r}}}}}}}\n")
    parts = build_parts(Namespace(config=[str(TOY), str(path)], ckpt_path=None), [])
    assert parts.datamodule.source.context.instructions == text


ENV = "{data: {source: {env: tests.toy_env.CorridorEnv}}}"
STOPS = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=b"]
LOST = {  # options, and which of them would be lost
    "class after argument": (["--model.advantage.gamma", "0.9", "--model.advantage=GRPO"], "model.advantage.gamma"),
    "class_path": (["--model.advantage.gamma=0.9", "--model.advantage.class_path=GRPO"], "model.advantage.gamma"),
    "long form": (
        ["--model.init_args.advantage.init_args.gamma=0.9", "--model.advantage={class_path: GRPO, init_args: {}}"],
        "model.advantage.gamma",
    ),
    "mapping": (["--model.advantage={gamma: 0.9}", "--model.advantage=GRPO"], "model.advantage.gamma"),
    "both in mappings": (["--model={advantage: {gamma: 0.9}}", "--model={advantage: GRPO}"], "model.advantage.gamma"),
    "one of two": (
        [
            "--model.advantage.gae_lambda=0.9",
            "--model.advantage.gamma=0.9",
            "--model.advantage={class_path: TokenGAE, gamma: 1.0}",
        ],
        "model.advantage.gae_lambda",
    ),
    "of a class named before": (
        ["--model.advantage=GRPO", "--model.advantage.scale_by_std=false", "--model.advantage=StepGAE"],
        "model.advantage.scale_by_std",
    ),
    "nested": (["--data.source.env.max_steps=5", "--data.source=tests.envs.test_source_checks.OddJudge"], "data.source.env"),
    "nested, its like given": (
        ["--data.source.env.max_steps=5", "--data.source={class_path: EnvSource, env: tests.toy_env.CorridorEnv}"],
        "data.source.env.max_steps",
    ),
    "file": (["--data.source.env.max_steps=5", "--config", ENV], "data.source.env.max_steps"),
    "section": (["--trainer.logger.save_dir=x", "--trainer={logger: CSVLogger}"], "trainer.logger.save_dir"),
    "list element": ([*STOPS, "--trainer.callbacks.class_path=LearningRateMonitor"], "trainer.callbacks.monitor"),
    "list element, appended whole": (
        [
            "--trainer.callbacks+={class_path: EarlyStopping, monitor: a}",
            "--trainer.callbacks.class_path=LearningRateMonitor",
        ],
        "trainer.callbacks.monitor",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_no_argument_is_lost_to_a_class_named_later(name: str) -> None:
    """In the other order it counts."""
    options, lost = LOST[name]
    with pytest.raises(ConfigError, match=rf"--{lost} would be lost: .* name the class first$"):
        merged("--config", PLAIN, *options)


def test_what_is_said_again_counts_as_said_last() -> None:
    for options, place, left in (
        (["--model.advantage.gamma=0.9", "--model.advantage=StepGAE"], "model.advantage", ("StepGAE", {"gamma": 0.9})),
        (
            ["--model.advantage.gamma=0.9", "--model.advantage={class_path: TokenGAE, gamma: 1.0}"],
            "model.advantage",
            ("TokenGAE", {"gamma": 1.0}),
        ),
        (["--model.advantage=GRPO", "--model.advantage=RLOO"], "model.advantage", ("RLOO", {})),
    ):
        assert shape(at(merged("--config", PLAIN, *options), place)) == left
    nothing = ["--trainer.logger.save_dir=x", "--trainer.logger=false", *STOPS, "--trainer.callbacks=null"]
    assert merged("--config", PLAIN, *nothing)["trainer"] == {"logger": False, "callbacks": None}
    more = merged("--config", PLAIN, *STOPS, "--trainer.callbacks+=LearningRateMonitor")["trainer"]["callbacks"]
    assert [shape(item) for item in more] == [("EarlyStopping", {"monitor": "b"}), ("LearningRateMonitor", {})]
