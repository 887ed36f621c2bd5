"""Whatever takes a path of a user's knows ``~``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from callbacks.warm_start import WarmStartCallback
from steppo.cli import main
from steppo.cli.config_files import read_config
from steppo.cli.resuming import beginning
from steppo.envs import AlfworldEnv, MultihopQAEnv, TextWorldEnv, WebshopEnv
from steppo.envs.paper_search import LocalPapers, PaperService
from steppo.envs.search import Dense
from steppo.errors import ConfigError
from steppo.export import main as export
from steppo.gateway.program import read_tasks
from steppo.models import HFPolicy
from steppo.panel.command import main as panel
from steppo.panels import Panel
from steppo.pool import DataPool
from steppo.pool.command import main as pool
from tests.cli_helpers import TOY
from tests.models.test_identity import base


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Which is not where the process runs."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


PLACES: dict[str, Callable[[], Any]] = {
    "warm start": lambda: WarmStartCallback(cache_dir="~/x").cache.folder,
    "TextWorld": lambda: TextWorldEnv("coin_collector", cache_dir="~/x")._folder.parent,
    "multi-hop": lambda: MultihopQAEnv(cache_dir="~/x")._cache.parent,
    "multi-hop questions": lambda: MultihopQAEnv("/data", {"train": "~/x"})._corpus_of("train"),
    "multi-hop corpus": lambda: MultihopQAEnv("/data", corpus="~/x")._corpus_of("train"),
    "ALFWorld": lambda: AlfworldEnv("~", cache_dir="~/x")._cache.parent,
    "WebShop": lambda: WebshopEnv("~", cache_dir="~/x")._cache,
    "papers": lambda: LocalPapers("~/papers", cache_dir="~/x")._cache.parent,
    "service": lambda: PaperService("http://127.0.0.1:1", cache_dir="~/x")._cache.parent.parent,
    "retriever": lambda: Dense("~/x").model,
    "pool": lambda: DataPool("~/x").path,
}


@pytest.mark.parametrize("name", PLACES)
def test_settings(name: str, home: Path) -> None:
    assert Path(PLACES[name]()) == home / "x"


def test_a_model(home: Path) -> None:
    policy = HFPolicy(f"~/{base(home / 'model').name}")
    policy.build(list)
    assert policy.base_model() == str(home / "model")


def test_files_that_are_read(home: Path) -> None:
    (home / "tasks.jsonl").write_text('{"id": "one"}')
    assert [task.id for task in read_tasks("~/tasks.jsonl")] == ["one"]
    (home / "first.yaml").write_text("num_threads: 1")
    (home / "second.yaml").write_text("extends: ~/first.yaml\nseed_everything: 2")
    assert read_config("~/second.yaml") == [{"num_threads": 1}, {"seed_everything": 2}]
    with pytest.raises(ConfigError, match=f"{home}/panel.json"):
        Panel.read("~/panel.json")


def test_the_newest_run_is_where_lightning_put_it(home: Path) -> None:
    folder = home / "here" / "runs" / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    config = Namespace(trainer=Namespace(logger=False, default_root_dir="~/here"))
    assert beginning("last", config, fit=True) == (None, folder)


COMMANDS: dict[str, tuple[Callable[[list[str]], Any], list[str]]] = {
    "fit": (main, ["fit", f"--config={TOY}", "--ckpt_path=~/nowhere"]),
    "export": (export, ["--ckpt_path=~/nowhere", "--out=out"]),
    "export out": (export, ["--ckpt_path=nowhere", "--out=~"]),
    "pool": (pool, ["ls", "~/nowhere"]),
    "panel": (panel, ["compare", "~/nowhere", "other"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_behind_which_no_shell_looks(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "file").write_text("in the way")
    call, words = COMMANDS[name]
    with pytest.raises(SystemExit):
        call(words)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(home) in line
    assert "~" not in line


def test_the_home_of_nobody(home: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder '~nobody-at-all/model'"):
        HFPolicy("~nobody-at-all/model")
    with pytest.raises(ConfigError, match="there is no folder ~nobody-at-all"):
        WebshopEnv("~nobody-at-all")
