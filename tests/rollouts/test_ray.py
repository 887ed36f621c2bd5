"""Producers that Ray places: the same episodes, whatever ends where. A real cluster on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from steppo.errors import ConfigError, RunError
from steppo.models import TinyPolicy
from steppo.rollouts import AsyncSettings, AsyncSource, RayFleet, ray_fleet
from steppo.types import Episode, RolloutConfig, groups_of
from tests.breaking_source import BreakingSource
from tests.cli_helpers import run, same, weights
from tests.toy_env import CorridorEnv

with mock.patch.dict(os.environ, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0"):  # as where the fleet imports it: on loopback
    ray = pytest.importorskip("ray", reason="pip install 'steppo[ray]'")

GROUPS = tuple(groups_of(CorridorEnv(num_tasks=8).tasks("train"), 2))
PLAN = RolloutConfig("train/0", seed=3)


def test_a_cluster_that_is_not_there_is_one_line(tiny_policy: TinyPolicy) -> None:
    with pytest.raises(ConfigError, match=r"RayFleet cannot reach the cluster ray://127.0.0.1:1: .*give host:port"):
        RayFleet("ray://127.0.0.1:1").start(None, 1, None, 1.0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One machine, on loopback, which all tests from here on use."""
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_without_staleness_it_is_the_synchronous_run(tmp_path: Path) -> None:
    options = ["--trainer.max_epochs=2", "--trainer.limit_val_batches=0", "--warm_start.updates=20"]
    options.append("--trainer.precision=64-true")
    run(tmp_path / "whole", *options)
    ahead = ["--data.asynchronous.max_staleness=0", "--data.asynchronous.num_producers=2"]
    cli = run(tmp_path / "ray", *options, *ahead, "--data.asynchronous.fleet=RayFleet")
    assert same(weights(tmp_path / "ray"), weights(tmp_path / "whole"))
    assert cli.model.latest["rollout/restarted_producers"] == 0


@pytest.mark.usefixtures("cluster")
def test_what_the_cluster_has_not_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = ["--data.asynchronous.fleet=RayFleet", "--data.asynchronous.fleet.resources.tpu=1"]
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--warm_start.updates=0", *fleet)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "an actor wants 1 CPU, 1 tpu, no machine of the cluster has that: 2 CPU" in line


@pytest.fixture
def play(tmp_path: Path, tiny_policy: TinyPolicy, cluster: None) -> Iterator[Any]:
    """Collects iteration 0 of a source that breaks; then it is ``play.source``."""

    def play(how: str, weights_folder: Path | None = None) -> list[list[Episode]]:
        fleet = RayFleet(num_cpus=0.5, weights_folder=str(weights_folder) if weights_folder else None)
        settings = AsyncSettings(0, pool=str(tmp_path / "pool.sqlite"), fleet=fleet, timeout=60.0)
        source = AsyncSource(BreakingSource(how, tmp_path / "broke"), settings)
        play.source = source  # type: ignore[attr-defined]
        source.bind(tiny_policy)
        source.plan(lambda iteration: (GROUPS, PLAN) if iteration == 0 else None, None)
        with torch.no_grad():
            source.publish(0, 0, tiny_policy.inference_weights())
            return sorted(source.collect(GROUPS, PLAN), key=lambda group: group[0].order)

    yield play
    play.source.close()  # type: ignore[attr-defined]


def test_what_an_actor_owes_is_played_again(play: Any, tmp_path: Path) -> None:
    found = play("die")
    assert (tmp_path / "broke").exists()
    assert play.source.counts()["restarted_producers"] == 1
    assert_as_played_here(found, play.source)
    (actor,) = actors()
    children = actor.children(recursive=True)
    assert len(children) >= 2  # a worker, and the guard
    actor.kill()
    assert_end(children)


def test_weights_may_go_through_a_folder(play: Any, tmp_path: Path) -> None:
    (tmp_path / "broke").touch()
    assert_as_played_here(play("die", tmp_path / "weights"), play.source)
    (actor,) = actors()
    children = actor.children(recursive=True)
    play.source.close()
    assert_end([actor, *children])
    assert not list((tmp_path / "weights").iterdir())


def actors() -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if "ray::_Actor" in " ".join(process.info["cmdline"] or ())]


def assert_as_played_here(found: list[list[Episode]], source: AsyncSource) -> None:
    expected = sorted(source.scripted.collect(GROUPS, PLAN), key=lambda group: group[0].order)
    for group, other in zip(found, expected, strict=True):
        for episode, again in zip(group, other, strict=True):
            assert episode.id == again.id
            ids = [[step.action_ids.tolist() for step in one.steps] for one in (episode, again)]
            assert ids[0] == ids[1]


def assert_end(processes: list[psutil.Process]) -> None:
    until = time.monotonic() + 20
    while alive := [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, alive
        time.sleep(0.05)


def test_what_a_source_refuses_ends_the_run(play: Any) -> None:
    with pytest.raises(ConfigError, match="no more of this"):
        play("refuse")


def test_an_actor_that_always_dies_ends_the_run(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_fleet, "DEATHS", 1)  # three take long
    with pytest.raises(RunError, match="actors ended in a row, and none played a group: "):
        play("always")
