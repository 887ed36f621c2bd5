"""Every shipped config parses and instantiates; overrides reach every copy of a value."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from steppo.advantages import GRPO, RLOO, GiGPO, ReinforcePP, ReinforcePPBaseline, StepGAE, TokenGAE
from steppo.cli import main
from steppo.losses import CISPO, DPPOTV, ClippedLoss
from steppo.minibatches import WholeEpisodes
from steppo.models import SeparateCritic
from steppo.packing import PrefixTreePacker
from steppo.rollouts import ray_fleet
from tests.alfworld_games import write_games
from tests.cli_helpers import TOY
from tests.game_words import write_words
from tests.paper_files import write_data
from tests.qa_data import write_questions
from tests.webshop_goods import write_goods

CONFIGS = Path(__file__).parents[2] / "configs"
# Credit, ratio, critic, group size, KL, over textworld.yaml.
METHODS = {
    "ppo": (TokenGAE, "token", SeparateCritic, 1, "loss"),
    "reinforce_pp": (ReinforcePP, "token", type(None), 1, "reward"),
    "reinforce_pp_baseline": (ReinforcePPBaseline, "token", type(None), 8, "reward"),
    "grpo": (GRPO, "token", type(None), 8, "loss"),
    "rloo": (RLOO, "token", type(None), 8, "reward"),
    "gspo": (GRPO, "step", type(None), 8, "loss"),
    "gigpo": (GiGPO, "token", type(None), 8, "loss"),
    "steppo": (StepGAE, "step", SeparateCritic, 1, "loss"),
    "steppo_no_step_gae": (TokenGAE, "step", SeparateCritic, 1, "loss"),
    "steppo_no_step_is": (StepGAE, "token", SeparateCritic, 1, "loss"),
}
# The same, with other losses.
LOSSES = {
    "cispo": (GRPO, CISPO, {"clip_low": 1.0, "clip_high": 4.0, "ratio": "token"}),
    "dppo_tv": (GRPO, DPPOTV, {"max_shift": 0.2, "penalty": 1e-3}),
}
# Their settings: no base config's may be left, such as a decay per step that now counts per token.
CREDIT: dict[type, dict[str, Any]] = {
    TokenGAE: {"gamma": 1.0, "gae_lambda": 1.0, "bootstrap_truncated": False, "whiten_over": "tokens"},
    StepGAE: {"gamma": 1.0, "gae_lambda": 1.0, "bootstrap_truncated": False, "whiten_over": "steps"},
    ReinforcePP: {"gamma": 1.0},
    ReinforcePPBaseline: {},
    GRPO: {"scale_by_std": True},
    RLOO: {},
    GiGPO: {"gamma": 0.95, "step_weight": 1.0, "scale_by_std": True, "similarity": 1.0, "needs_observations": False},
}
OVERLAYS = sorted(
    path for kind in ("algorithm", "context", "engine", "model", "trainer") for path in (CONFIGS / kind).glob("*.yaml")
)
WHOLE = sorted({*CONFIGS.rglob("*.yaml")} - {*OVERLAYS})
ROOT = CONFIGS.parent
_WRITTEN = ("echo.", "grid.yaml", "bounded_reinforce.yaml", "step_loo.yaml", "keep_close.", "{config,")  # tests of their own


def documented() -> list[str]:
    """Commands of the documentation that need no file which a page has one write."""
    blocks = "".join(
        block
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    )
    found = re.findall(r"python train\.py (.*)", blocks.replace("\\\n", " "))
    return sorted({line for line in found if not any(name in line for name in _WRITTEN)})


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Parses and instantiates a command line without running it."""
    monkeypatch.setenv("ALFWORLD_DATA", str(write_games(tmp_path)))
    monkeypatch.setenv("MULTIHOP_QA_DATA", str(write_questions(tmp_path)))
    monkeypatch.setenv("PAPER_SEARCH_DATA", str(write_data(tmp_path / "papers")))
    monkeypatch.setenv("WEBSHOP_DATA", str(write_goods(tmp_path, pen=True)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    (tmp_path / "examples").symlink_to(CONFIGS.parent / "examples")  # tasks of agents are files there
    monkeypatch.chdir(tmp_path)
    return lambda *args, stage="fit": main([stage, *(str(arg) for arg in args)])


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Prepares what a config of other people's environments plays, or skips where that is not installed."""

    def openenv() -> None:
        pytest.importorskip("openenv")
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        subprocess.run(["openenv", "init", "echo_env"], cwd=tmp_path, check=True, capture_output=True)

    def verifiers() -> None:
        write_words(monkeypatch, tmp_path)
        for name in ("verifiers", "textarena"):
            pytest.importorskip(name)

    return {"openenv": openenv, "verifiers": verifiers}


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_complete_configs_instantiate(build: Any, others: Any, path: Path) -> None:
    if path.stem in others:
        others[path.stem]()
    cli = build("--config", path, "--trainer.accelerator=cpu")
    assert cli.datamodule.tasks()
    assert cli.model.policy is not None


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_overlays_instantiate(build: Any, overlay: Path) -> None:
    cli = build("--config", CONFIGS / "textworld.yaml", "--config", overlay, "--trainer.accelerator=cpu")  # GPU configs too
    assert cli.config.fit.rollout.episodes_per_iteration == 64


@pytest.mark.parametrize("command", documented())
def test_documented_commands_are_understood(build: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ray_fleet, "find_spec", lambda name: True)  # Ray is large; the command is read without it
    stage, *options = shlex.split(command, comments=True)
    if any("help" in option for option in options):
        with pytest.raises(SystemExit) as stopped:
            build(*options, stage=stage)
        assert stopped.value.code == 0
        return
    if "--ckpt_path" in options:  # of a run that is not there
        place = options.index("--ckpt_path")
        del options[place : place + 2]
    build(*options, "--trainer.accelerator=cpu", stage=stage)


def depth(value: Any) -> int:
    """Of the deepest key: 5 for ``data.source.env.settings.level``."""
    if isinstance(value, list):
        return max((depth(item) for item in value), default=0)
    return 1 + max((depth(item) for item in value.values()), default=0) if isinstance(value, dict) else 0


@pytest.mark.parametrize("path", [*WHOLE, *OVERLAYS, TOY], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configs_can_be_read(path: Path) -> None:
    text = path.read_text()
    assert depth(yaml.safe_load(text)) <= 5
    assert "init_args" not in text
    assert not re.search(r"\b(steppo|lightning)\.\w+\.\w+", re.sub("#.*", "", text))
    assert len(text.splitlines()) <= 60


def test_depth() -> None:
    assert depth({"data": {"source": {"env": {"settings": {"level": 5}}}}}) == 5
    assert depth({"trainer": {"callbacks": [{"a": 1}, {"a": {"b": 1}}]}}) == 4


@pytest.mark.parametrize("path", WHOLE + OVERLAYS, ids=lambda path: path.stem)
def test_configs_open_with_their_command(path: Path) -> None:
    comment = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    name = path.relative_to(CONFIGS.parent).as_posix()
    assert "python train.py fit --config" in comment
    assert f"--config {name}" in comment
    assert "Tried on: " in comment
    assert "verride" in comment


def test_algorithms_are_what_they_are_called(build: Any) -> None:
    assert {path.stem for path in (CONFIGS / "algorithm").glob("*.yaml")} == {"react", *METHODS, *LOSSES}
    for name, (credit, ratio, critic, group_size, kl) in METHODS.items():
        cli = build("--config", CONFIGS / "textworld.yaml", "--config", CONFIGS / "algorithm" / f"{name}.yaml")
        assert type(cli.model.advantage) is credit
        assert type(cli.model.loss) is ClippedLoss
        assert cli.model.loss.ratio == ratio
        assert type(cli.model.critic) is critic
        assert cli.config.fit.rollout.group_size == group_size
        assert cli.model.objective.kl == kl
        assert vars(cli.model.advantage) == CREDIT[credit]
        clip = {"step": 0.1, "token": 0.2}[ratio]
        assert (cli.model.loss.clip_low, cli.model.loss.clip_high) == (clip, clip)


def test_other_losses(build: Any) -> None:
    """Also over a config of another loss, of which nothing may be left."""
    for name, (credit, loss, settings) in LOSSES.items():
        files = [CONFIGS / "algorithm" / f"{other}.yaml" for other in ("ppo", *LOSSES, name)]
        cli = build(*(f"--config={path}" for path in (CONFIGS / "textworld.yaml", *files)))
        assert type(cli.model.advantage) is credit
        assert type(cli.model.loss) is loss
        assert vars(cli.model.loss) == settings
        assert cli.model.critic is None


def test_later_files_and_options_win(build: Any, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("rollout: {group_size: 3}\ndata: {init_args: {source: {init_args: {max_new_tokens: 5}}}}\n")
    cli = build("--config", TOY, "--config", overlay, "--rollout.group_size=2", "--data.source.env.max_steps=6")
    assert cli.config.fit.rollout.group_size == 2
    assert cli.datamodule.source.max_new_tokens == 5
    assert cli.datamodule.source.env.max_steps == 6
    assert cli.datamodule.source.max_prompt_tokens == 400  # the rest of the section stays


def test_overrides_reach_every_copy_of_a_value(build: Any, tmp_path: Path) -> None:
    copies = tmp_path / "copies.yaml"
    copies.write_text(
        "rollout: {group_size: '${rollout.episodes_per_iteration}'}\n"
        "data: {source: {num_slots: '${.max_new_tokens}'}}\n"
        "model: {critic_optimizer: {lr: '${..policy_optimizer.lr}'}, policy: {seed: '${seed_everything}'}}\n"
    )
    second = tmp_path / "second.yaml"
    second.write_text("rollout: {episodes_per_iteration: 11}\nmodel: {init_args: {policy_optimizer: {lr: 0.25}}}\n")
    cli = build("--config", TOY, "--config", copies, "--config", second, "--data.source.max_new_tokens=7")
    assert cli.config.fit.rollout.group_size == 11
    assert cli.datamodule.source.num_slots == 7
    assert cli.model.critic_optimizer.lr == 0.25
    assert cli.model.policy.seed == cli.config.fit.seed_everything == 0


@pytest.mark.parametrize("overlay", (CONFIGS / "model").glob("*.yaml"), ids=lambda path: path.stem)
def test_model_overlays_set_the_model_only(overlay: Path) -> None:
    """The model, its adapters, and what its tokenizer and size ask for."""
    allowed = {
        "": {"extends", "model", "quantization", "data"},
        "model": {"policy", "critic", "policy_optimizer", "critic_optimizer"},
        "data": {"source", "max_tokens_per_microbatch"},
        "source": {"renderer", "max_prompt_tokens", "max_new_tokens"},
        "renderer": {"template_kwargs"},
    }
    config = yaml.safe_load(overlay.read_text())
    found = {"": config, "model": config.get("model", {}), "data": config.get("data", {})}
    found["source"] = found["data"].get("source", {})
    found["renderer"] = found["source"].get("renderer", {})
    assert {name: set(value) - allowed[name] for name, value in found.items()} == {name: set() for name in allowed}


def test_dialogues_stay_whole(build: Any) -> None:
    """Wherever prompts append: steps of one episode in one update, packed as one row."""
    paths = [path for path in [*WHOLE, *OVERLAYS] if "AppendContext" in path.read_text()]
    assert CONFIGS / "context" / "append.yaml" in paths
    for path in paths:
        data = build("--config", CONFIGS / "textworld.yaml", "--config", path).datamodule
        assert type(data.buffer.minibatches) is WholeEpisodes
        assert type(data.buffer.packer) is PrefixTreePacker


def test_critic_is_built_only_where_the_credit_wants_one(build: Any) -> None:
    assert build("--config", TOY, "--model.advantage=tests.test_extend.ReturnOnly").model.critic is None
    assert build("--config", TOY).model.critic is not None
