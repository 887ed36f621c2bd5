"""What an environment loads once per worker process: shared by its episodes, in its own time, or one line ends the run."""

from __future__ import annotations

import multiprocessing as mp
from contextlib import closing
from pathlib import Path

import pytest

from steppo.engines import HFEngine
from steppo.envs.pool import EnvPool
from steppo.errors import ConfigError, RunError
from steppo.play.command import main as play_command
from steppo.rendering import StateContext
from steppo.rollouts import EnvSource
from steppo.types import Action
from tests.cli.test_errors import fit, refused
from tests.cli_helpers import TOY, evaluations, run
from tests.start_env import FAILING, LOADED, SettingEnv, StartEnv, UnpickledEnv, notes
from tests.toy_env import CorridorEnv

TASKS = CorridorEnv().tasks("train")
RIGHT = Action("right")


def play_all(pool: EnvPool, slots: int) -> list[str]:
    """Two episodes in each slot, all beside each other; the errors."""
    errors = []
    for _ in range(2):
        for slot in range(slots):
            pool.reset(slot, TASKS[slot])
        errors += [pool.receive(slot).error for slot in range(slots)]
        for slot in range(slots):
            pool.step(slot, RIGHT)
        errors += [pool.receive(slot).error for slot in range(slots)]
    return errors


@pytest.mark.parametrize("how", LOADED)
@pytest.mark.parametrize("kind", [StartEnv, UnpickledEnv])
def test_what_is_loaded_is_shared_by_the_process_and_no_more(how: str, kind: type[StartEnv], tmp_path: Path) -> None:
    """Once, before the first reset; the rest of an environment is each slot's own, as before."""
    with closing(EnvPool(kind(how, str(tmp_path)), 3, 1, 30.0)) as pool:
        assert play_all(pool, 3) == [""] * 12
    [(first, *resets)] = notes(tmp_path)
    assert first == "start"
    assert len(resets) == 6
    assert len({reset.split()[1] for reset in resets}) == 1, "one object"
    assert {reset.split()[2] for reset in resets} == {"True"}
    assert [int(reset.split()[3]) for reset in resets] == [0, 0, 0, 1, 1, 1]


def test_an_older_class_may_have_a_setting_of_that_name() -> None:
    with closing(EnvPool(SettingEnv(), 1, 1, 30.0)) as pool:
        assert play_all(pool, 1) == [""] * 4


@pytest.mark.timeout(60)
def test_a_load_has_its_own_time_in_each_new_worker(tmp_path: Path) -> None:
    """Longer than a step may take, again where a worker is replaced; episodes are played again after it."""
    env = StartEnv(folder=str(tmp_path), seconds=1.5, die_tasks=[TASKS[0].id])
    with closing(EnvPool(env, 2, 1, timeout_s=0.75)) as pool:
        for slot in range(2):
            pool.reset(slot, TASKS[slot])
        assert [pool.receive(slot).error for slot in range(2)] == ["", ""]
        for _ in range(2):
            pool.step(0, RIGHT)
            error = pool.receive(0).error
        assert "died" in error
        pool.step(1, RIGHT)
        assert pool.receive(1).error == ""
        assert pool.counts["env_timeouts"] == 0
    assert [process[0] for process in notes(tmp_path)] == ["start"] * 2
    assert [line for process in notes(tmp_path) for line in process].count("start") == 2


def test_two_starts_may_fail_in_a_row_and_again_later(tmp_path: Path) -> None:
    with closing(EnvPool(StartEnv(folder=str(tmp_path), fail_first=2), 1, 1, 30.0)) as pool:
        assert play_all(pool, 1) == [""] * 4
        assert pool.counts == {"replaced_workers": 2, "env_timeouts": 0, "recycled_workers": 0}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", FAILING)
def test_starts_that_fail_end_the_run(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(mp.active_children())
    with closing(EnvPool(StartEnv(how, str(tmp_path)), 1, 1, 30.0, start_timeout_s=1.0)) as pool:
        pool.reset(0, TASKS[0])
        with pytest.raises(RunError) as told:
            pool.receive(0)
    assert f"did not start, 3 times in a row: {FAILING[how][1]}" in str(told.value)
    assert notes(tmp_path) == [["start"]] * 3, "three tries, in a process each"
    assert "Traceback" not in "".join(capfd.readouterr())
    assert set(mp.active_children()) <= before


def test_an_idle_worker_is_measured_when_it_has_loaded() -> None:
    with closing(EnvPool(StartEnv(), 1, 1, 30.0, memory_mib=1)) as pool:
        pool.reset(0, TASKS[0])
        with pytest.raises(ConfigError, match="worker_memory_mib = 1 is too small"):
            pool.receive(0)


# ---- as a user meets it ----

ENV = "--data.source.env=tests.start_env.StartEnv"


@pytest.mark.timeout(60)
def test_a_run_whose_load_takes_longer_than_a_step_may(tmp_path: Path) -> None:
    notes_of = tmp_path / "notes"
    notes_of.mkdir()
    options = [ENV, f"--data.source.env.folder={notes_of}", "--data.source.env.seconds=1.5", "--data.source.env_timeout=1"]
    run(tmp_path, *options, "--data.source.num_workers=2", "--warm_start.updates=0", command="validate")
    assert [record["errors"] for record in evaluations(tmp_path)] == [0]
    assert [process.count("start") for process in notes(notes_of)] == [1, 1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["no file", "dies", "sleeps"])
def test_a_run_that_cannot_start_is_one_line(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = [ENV, f"--data.source.env.how={how}", "--data.source.start_timeout=1"]
    assert FAILING[how][1] in refused(fit(tmp_path, *options), capfd)


def test_play_that_cannot_start_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        play_command([f"--config={TOY}", ENV, "--data.source.env.how=exit", "--player=random"])
    said = capfd.readouterr().err
    assert stopped.value.code == 2
    assert FAILING["exit"][1] in said
    assert "Traceback" not in said


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_limit_is_above_0(seconds: float) -> None:
    with pytest.raises(ConfigError, match="start_timeout must be above 0 seconds"):
        EnvSource(CorridorEnv(), StateContext(), HFEngine(), start_timeout=seconds)
