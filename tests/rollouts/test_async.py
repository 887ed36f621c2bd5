"""Episodes played ahead: which, with which weights, each once, whoever dies when."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steppo.checkpoints import iteration_path, read
from steppo.cli import SteppoCLI
from steppo.engines import HFEngine, VLLMEngine
from steppo.errors import ConfigError, RunError, SteppoError
from steppo.models import TinyPolicy
from steppo.pool import DataPool
from steppo.rendering import StateContext
from steppo.rollouts import AsyncSettings, AsyncSource, EnvSource, Fleet, LocalFleet, async_source, producer
from steppo.types import Episode, RolloutConfig, Step, StopReason, groups_of
from tests.breaking_source import BreakingSource
from tests.cli_helpers import TOY, evaluations, places, run, same, weights
from tests.started import CONTEXT, Started
from tests.test_pool import same as same_record
from tests.toy_env import CorridorEnv

OPTIONS = ["--trainer.max_epochs=3", "--trainer.limit_val_batches=0", "--warm_start.updates=20"]
GROUPS = 8


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    """Producers begin with what another process has imported once."""
    forkserver.ensure_running()  # before there is a mark, by which it would be killed, too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(producer, "CONTEXT", CONTEXT)
        yield


def ahead(**settings: Any) -> list[str]:
    return [f"--data.asynchronous.{name}={value}" for name, value in settings.items()]


def learned(path: Path) -> dict[int, list[str]]:
    """The names of the groups that each iteration learned from."""
    with closing(DataPool(path, create=False)) as pool:
        found: dict[int, list[str]] = {}
        for info in pool.groups():
            if info.iteration is not None:
                found.setdefault(info.iteration, []).append(info.name)
    return found


def assert_each_once(path: Path, iterations: int) -> None:
    plan = {number: {f"train/{number}/{group}" for group in range(GROUPS)} for number in range(iterations)}
    found = learned(path)
    assert {number: set(names) for number, names in found.items()} == plan
    assert all(len(names) == GROUPS for names in found.values())


# ---- whole runs ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synchronous run."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *OPTIONS)
    return folder


def test_without_staleness_it_is_the_synchronous_run(whole: Path, tmp_path: Path) -> None:
    cli = run(tmp_path, *OPTIONS, *ahead(max_staleness=0))
    assert same(weights(tmp_path), weights(whole))
    assert cli.model.latest["rollout/staleness_max"] == 0
    assert cli.model.latest["rollout/restarted_producers"] == 0
    assert_each_once(tmp_path / "pool.sqlite", 3)
    assert not list(tmp_path.glob("pool.sqlite-weights"))


def test_scripts_play_in_the_learner(tmp_path: Path) -> None:
    run(tmp_path, *ahead(max_staleness=0), "--evaluation.player=expert", command="validate")
    assert [record["success_rate"] for record in evaluations(tmp_path)] == [1.0]


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> tuple[SteppoCLI, Path]:
    """A run in float64 that learns from older weights' episodes; all its checkpoints are kept."""
    folder = tmp_path_factory.mktemp("stale")
    options = ["--trainer.precision=64-true", "--checkpoint.keep=9", *ahead(max_staleness=1, num_producers=2)]
    return run(folder, *OPTIONS, *options), folder


def test_the_bound_holds(stale: tuple[SteppoCLI, Path]) -> None:
    cli, folder = stale
    assert_each_once(folder / "pool.sqlite", 3)
    per_iteration = cli.model.counters.updates // 3
    with closing(DataPool(folder / "pool.sqlite")) as pool:
        ages = {info.name: int(info.name.split("/")[1]) - info.oldest_version / per_iteration for info in pool.groups()}
        assert all(info.oldest_version == info.newest_version for info in pool.groups())
    assert set(ages.values()) <= {0, 1}
    assert {age for name, age in ages.items() if name.startswith("train/0")} == {0}
    shares = [cli.model.latest[f"rollout/staleness_{age}"] for age in (0, 1)]
    assert sum(shares) == 1
    assert cli.model.latest["rollout/staleness"] == shares[1]


def test_episodes_can_be_played_again_from_the_record(stale: tuple[SteppoCLI, Path]) -> None:
    cli, folder = stale
    per_iteration = cli.model.counters.updates // 3
    source = cli.datamodule.source.scripted
    with closing(DataPool(folder / "pool.sqlite")) as pool, closing(source):
        for info in pool.groups():
            _, iteration, number = map(int, info.name.replace("train", "0").split("/"))
            held = read(iteration_path(folder / "checkpoints", info.oldest_version // per_iteration))
            cli.model.load_state_dict(held["state_dict"])
            group = cli.datamodule.groups_at(iteration * GROUPS, GROUPS, 1)[number]
            config = RolloutConfig(f"train/{iteration}", 0, version=info.oldest_version)
            source.load_weights((), info.oldest_version)
            with cli.model.inference_context():
                (again,) = source.collect([group], config)
            for new, old in zip(again, pool.read(info.number), strict=True):
                assert len(new.steps) == len(old.steps) > 0
                for one, other in zip(new.steps, old.steps, strict=True):
                    assert np.allclose(one.behaviour_logprobs, other.behaviour_logprobs, rtol=0, atol=1e-6)
                    assert same_record(replace(one, behaviour_logprobs=other.behaviour_logprobs), other)


def test_a_run_is_learned_again_from_the_record(
    stale: tuple[SteppoCLI, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalFleet, "start", None)  # nobody plays
    run(tmp_path, *OPTIONS, "--trainer.precision=64-true", *ahead(replay=stale[1] / "pool.sqlite"))
    assert same(weights(tmp_path), weights(stale[1]))


def test_a_killed_learner_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed, again = tmp_path / "killed", tmp_path / "again"
    options = [*OPTIONS, *ahead(max_staleness=1)]
    kill = ["--trainer.callbacks+=tests.kill.KillAt", "--trainer.callbacks.phase=update", "--trainer.callbacks.event=8"]
    learner = Started("fit", "--config", str(TOY), *options, *places(killed), *kill)
    errors = learner.errors()
    assert learner.status == -signal.SIGKILL, errors[-2000:]
    assert set(learned(killed / "pool.sqlite")) == {0, 1}
    run(killed, *options, "--ckpt_path=last")
    assert_each_once(killed / "pool.sqlite", 3)
    run(again, *OPTIONS, *ahead(replay=killed / "pool.sqlite"))
    assert same(weights(again), weights(killed))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_staleness": -1}, "max_staleness must be at least 0, not -1"),
        ({"num_producers": 0}, "num_producers must be at least 1, not 0"),
        ({"device": "gpu"}, "device 'gpu' is none, such as cpu or cuda:1"),
        ({"staleness": 1}, "did you mean data.asynchronous.max_staleness?"),
        ({"replay": "nowhere.sqlite"}, "there is no pool nowhere.sqlite"),
        ({"replay": TOY}, "is no pool of episodes"),
    ],
)
def test_a_mistake_is_one_line(
    settings: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *OPTIONS, "--warm_start.updates=0", *ahead(**settings))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


# ---- producers that break ----


Play = Callable[..., list[list[Episode]]]


@pytest.fixture
def play(tmp_path: Path, tiny_policy: TinyPolicy) -> Iterator[Play]:
    """Collects iteration 0 of a source that breaks; then it is ``play.source``."""

    def play(how: str, pool: str = "pool.sqlite", **settings: Any) -> list[list[Episode]]:
        settings = {"max_staleness": 0, "pool": str(tmp_path / pool), **settings}
        source = AsyncSource(BreakingSource(how, tmp_path / "broke"), AsyncSettings(**settings))
        sources.append(source)
        source.bind(tiny_policy)
        source.plan(lambda iteration: (GROUPS_OF[iteration], PLAN) if iteration == 0 else None, None)
        with torch.no_grad():
            source.publish(0, 0, tiny_policy.inference_weights())
            return sorted(source.collect(GROUPS_OF[0], PLAN), key=lambda group: group[0].order)

    sources: list[AsyncSource] = []
    play.sources = sources  # type: ignore[attr-defined]
    yield play
    for source in sources:
        source.close()


PLAN = RolloutConfig("train/0", seed=3)
GROUPS_OF = [groups_of(CorridorEnv(num_tasks=GROUPS).tasks("train"), 2)]


@pytest.mark.parametrize("how", ["die", "hang", "crash"])
def test_what_a_producer_owes_is_played_again(how: str, play: Any, tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    found = play(how, timeout=60.0 if how != "hang" else 6.0)
    (source,) = play.sources
    assert (tmp_path / "broke").exists()
    assert source.counts()["restarted_producers"] == 1
    inner = source.scripted
    expected = sorted(inner.collect(GROUPS_OF[0], PLAN), key=lambda group: group[0].order)
    assert [[episode.id for episode in group] for group in found] == [[e.id for e in group] for group in expected]
    for group, other in zip(found, expected, strict=True):
        for episode, again in zip(group, other, strict=True):
            ids = [[step.action_ids.tolist() for step in one.steps] for one in (episode, again)]
            assert ids[0] == ids[1]


def test_a_producer_that_always_dies_ends_the_run(play: Play) -> None:
    with pytest.raises(RunError, match=r"played nothing and ended, 3 times in a row: it died \(exit status -9\)"):
        play("always")


def test_what_a_source_refuses_ends_the_run(play: Play) -> None:
    with pytest.raises(ConfigError, match="no more of this"):
        play("refuse")


def test_producers_end_with_their_source(play: Any) -> None:
    play("crash")
    (source,) = play.sources
    pids = [one.process.pid for one in source._fleet._processes]
    source.close()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


# ---- the plan ----


class Recorded(Fleet):
    """In place of producers: keeps what it is told, and plays nothing."""

    def start(self, outfit: Any, count: int, pool: DataPool, timeout: float) -> None:
        self.jobs: list[tuple[int, int]] = []

    def publish(self, iteration: int, version: int, weights: Any) -> None:
        self.newest = version

    def send(self, job: Any) -> None:
        self.jobs.append((job.iteration, self.newest))

    def watch(self, waiting: bool) -> None:
        pass

    wait = close = counts = lambda self: {}


@pytest.fixture
def planned(tmp_path: Path, tiny_policy: TinyPolicy) -> Iterator[Callable[..., AsyncSource]]:
    """A source whose producers are ``Recorded``, with its plan of six iterations."""
    sources: list[AsyncSource] = []

    def make(max_staleness: int) -> AsyncSource:
        env = EnvSource(CorridorEnv(), StateContext(instructions=""), HFEngine(), max_prompt_tokens=400, max_new_tokens=4)
        settings = {"max_staleness": max_staleness, "pool": str(tmp_path / "pool.sqlite"), "fleet": Recorded()}
        source = AsyncSource(env, AsyncSettings(**settings))
        source.bind(tiny_policy)
        source.plan(lambda n: (GROUPS_OF[0], replace(PLAN, name=f"train/{n}")) if n < 6 else None, None)
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_iteration_is_begun_before_its_weights(
    max_staleness: int, planned: Callable[..., AsyncSource], tiny_policy: TinyPolicy
) -> None:
    source = planned(max_staleness)
    for iteration in range(2, 8):  # also a run that goes on
        source.publish(iteration, 4 * iteration, tiny_policy.inference_weights())
        fleet: Any = source._fleet
        begun = [number for number, _ in fleet.jobs]
        assert begun == [number for number in range(2, 6) if number <= iteration + max_staleness]
        assert all(number <= version // 4 + max_staleness for number, version in fleet.jobs)


def put(path: Path, name: str, version: int = 0, **fields: Any) -> None:
    """Puts the group of a plan into the pool, as if played, but for some fields of its episodes."""
    number = int(name.rpartition("/")[2])
    group = GROUPS_OF[0][number]
    ids, logprobs = np.arange(3, dtype=np.int32), np.zeros(3, dtype=np.float32)
    step = replace(STEP, prompt_ids=ids, action_ids=ids, behaviour_logprobs=logprobs, policy_version=version)
    with closing(DataPool(path)) as pool:
        places = range(group.first, group.first + group.size)
        episodes = [Episode(f"{name}/{n}", n, number, group.task.id, (step,), ENDED) for n in places]
        pool.put(name, [replace(episode, **fields) for episode in episodes])


ENDED = StopReason.TERMINATED
NOTHING = np.zeros(0, dtype=np.int32)
STEP = Step(NOTHING, NOTHING, NOTHING, 0.0, 0, "stop", True, False, True, "a room", "left", 1.0, 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, ""),
        ({"task_id": "another"}, "train/5/0 of .* is of another run"),
        ({"order": 77}, "train/5/0 of .* is of another run"),
        ({"steps": (replace(STEP, temperature=0.5, policy_version=20),)}, "train/5/0 of .* is of another run"),
        ({"steps": (replace(STEP, policy_version=12),)}, "older than max_staleness, 1"),
    ],
)
def test_what_is_not_planned_is_not_learned(
    wrong: dict[str, Any], words: str, planned: Callable[..., AsyncSource], tiny_policy: TinyPolicy, tmp_path: Path
) -> None:
    source = planned(1)
    config = replace(PLAN, name="train/5")
    for number in range(GROUPS):
        put(tmp_path / "pool.sqlite", f"train/5/{number}", version=16, **(wrong if number == 0 else {}))
    for iteration in (4, 5):
        source.publish(iteration, 4 * iteration, tiny_policy.inference_weights())
    if words:
        with pytest.raises(SteppoError, match=words):
            list(source.collect(GROUPS_OF[0], config))
        assert learned(tmp_path / "pool.sqlite") == {}
    else:
        assert len(list(source.collect(GROUPS_OF[0], config))) == GROUPS
        assert set(learned(tmp_path / "pool.sqlite")) == {5}
        assert source.figures()["staleness"] == source.figures()["staleness_1"] == 1


def test_a_run_that_goes_on_knows_its_versions(planned: Callable[..., AsyncSource], tiny_policy: TinyPolicy) -> None:
    first, second = planned(1), planned(1)
    for iteration in (2, 3):
        first.publish(iteration, 4 * iteration, tiny_policy.inference_weights())
    second.load_state_dict(first.state_dict())
    second.publish(3, 12, tiny_policy.inference_weights())
    assert second.state_dict() == {"versions": {2: 8, 3: 12}}


def test_other_tasks_than_planned_are_an_error(planned: Callable[..., AsyncSource], tiny_policy: TinyPolicy) -> None:
    source = planned(0)
    source.publish(0, 0, tiny_policy.inference_weights())
    with pytest.raises(RunError, match="plays other tasks than were planned"):
        next(source.collect(GROUPS_OF[0][1:], PLAN))


def test_ranks_get_whole_groups_of_even_length() -> None:
    groups = []
    for number, tokens in enumerate([3, 9, 0, 4, 6, 0, 2]):
        ids = np.zeros(tokens, dtype=np.int32)
        steps = (replace(STEP, prompt_ids=ids),) if tokens else ()
        groups.append([Episode(f"{number}", number, number, "task", steps, ENDED)])
    parts = async_source._evenly(groups, 3)
    dealt = [[episode.order for group in part for episode in group] for part in parts]
    assert sorted(order for orders in dealt for order in orders) == list(range(7))
    assert [sum(len(step.prompt_ids) for (e,) in part for step in e.steps) for part in parts] == [9, 8, 7]
    assert all(dealt)
    assert dealt == [[e.order for (e,) in part] for part in async_source._evenly(groups[::-1], 3)]


def test_servers_whose_weights_all_would_change_are_refused() -> None:
    pytest.importorskip("httpx")
    engine = VLLMEngine(urls=["http://127.0.0.1:8000"])
    with pytest.raises(ConfigError, match="give python, not urls"):
        AsyncSource(EnvSource(CorridorEnv(), StateContext(), engine))
