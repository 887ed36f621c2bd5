"""Processes end with what they are for: children with their worker, workers with the main process, however that ends."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback

from steppo.engines import Engine
from steppo.envs.pool import EnvPool
from steppo.errors import RunError
from steppo.models import TinyPolicy
from steppo.rendering import StateContext
from steppo.rollouts import EnvSource
from steppo.rollouts.scheduler import first_ticks
from steppo.types import Action, Completion, Request, RolloutConfig, Turn, groups_of
from tests.cli_helpers import TOY, run
from tests.family_env import KINDS, FamilyEnv, LargeEnv, NoStartEnv, ParallelEnv
from tests.toy_env import CorridorEnv

ROOT = Path(__file__).parents[2]
TASKS = CorridorEnv().tasks("train")
LONGEST_S = 10.0  # a promise: that is how long after a kill something may live
FEW = ["bare", "session", "daemon", "forked", "multiprocessing"]


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def living(folder: Path) -> list[str]:
    """Kinds of the children in ``folder`` that are alive."""
    return sorted(path.read_text() for path in folder.iterdir() if path.name.isdecimal() and is_alive(int(path.name)))


def of_run(folder: Path) -> list[str]:
    """Whatever is alive of a run with ``FAMILY=<folder>`` among its variables: workers, guards, children."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FAMILY") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found + living(folder)


def what_is_left(folder: Path) -> list[str]:
    """Of a run that is over, when it had its time."""
    deadline = time.monotonic() + LONGEST_S
    while (left := of_run(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where children leave their numbers; they end with the test, whatever it finds."""
    family = tmp_path / "family"
    family.mkdir()
    yield family
    for path in family.iterdir():
        if path.name.isdecimal() and is_alive(int(path.name)):
            os.kill(int(path.name), signal.SIGKILL)


THEN = {"sleep": "no answer within 3 s", "lock": "no answer within 3 s", "die": "died (exit status 1)"}


@pytest.mark.parametrize("then", THEN)
def test_children_end_with_their_worker_and_with_no_other(folder: Path, then: Any) -> None:
    """Slots 0 and 2 are one worker's, slot 1 is another's."""
    env = FamilyEnv(str(folder), then=then, tasks_with=[TASKS[0].id, TASKS[1].id])
    beside = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # the main process's own
    with closing(EnvPool(env, num_slots=3, num_workers=2, timeout_s=3.0)) as pool:
        for slot in range(3):
            pool.reset(slot, TASKS[slot])
            assert pool.receive(slot).error == ""
        assert living(folder) == sorted([*KINDS, *KINDS])
        for _ in range(2):
            for slot in (0, 2):
                pool.step(slot, Action("right"))
            replies = [pool.receive(slot) for slot in (0, 2)]
        assert THEN[then] in replies[0].error
        assert replies[1].error == ""
        assert pool.counts["env_timeouts"] == (then != "die")
        assert living(folder) == sorted(KINDS), "those of the other worker, and only those"
    assert living(folder) == []
    assert beside.poll() is None
    beside.communicate(b"\n")


def test_children_end_with_a_worker_that_outgrew_its_memory(folder: Path) -> None:
    with closing(EnvPool(LargeEnv(str(folder), FEW, then="go on"), 1, 1, 30.0, memory_mib=200)) as pool:
        pool.reset(0, TASKS[0])
        assert pool.receive(0).error == ""
        while not pool.counts["recycled_workers"]:
            pool.step(0, Action("left"))
            assert pool.receive(0).error == ""
        pool.step(0, Action("left"))
        assert pool.receive(0).error == ""
        assert living(folder) == sorted(FEW), "the new worker's, of the episode that was played again"


def test_workers_that_do_not_start_leave_nothing(folder: Path) -> None:
    pool = EnvPool(NoStartEnv(str(folder), ["session", "forked", "daemon"]), 1, 1, 1.0)
    pool.reset(0, TASKS[0])
    with pytest.raises(RunError, match="did not start"):
        pool.receive(0)
    assert len(list(folder.iterdir())) >= 9, "three children in each of three starts"
    assert living(folder) == []
    pool.close()


def test_a_pool_that_nobody_closes_ends_when_it_is_forgotten(folder: Path) -> None:
    pool = EnvPool(FamilyEnv(str(folder), FEW, then="go on"), 2, 2, 30.0)
    for slot in range(2):
        pool.reset(slot, TASKS[0])
        pool.receive(slot)
    workers = [process.process.pid for process in pool._processes]
    workers.append(pool._guard._process.pid)
    assert all(is_alive(pid) for pid in workers if pid)
    del pool
    gc.collect()
    assert living(folder) == []
    assert not any(is_alive(pid) for pid in workers if pid)


MAIN = """
import signal, sys
from steppo.envs.pool import EnvPool
from steppo.types import Action
from tests.family_env import FamilyEnv
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been ignored where the tests were started
folder, kinds, then, end = sys.argv[1:]
env = FamilyEnv(folder, kinds.split(","), then=then)
pool = EnvPool(env, 2, 2, 600.0)
for slot in range(2):
    pool.reset(slot, env.tasks("train")[slot])
    assert pool.receive(slot).error == ""
for step in range(2):
    pool.step(0, Action("right"))
    assert pool.receive(0).error == ""
if end == "raise":
    raise RuntimeError("broken on purpose")
"""
ENDS: dict[str, tuple[str, str, int]] = {  # what the environment does, what the main process does or gets, its exit status
    "killed, sleep": ("sleep", "SIGKILL", -9),
    "killed, lock": ("lock", "SIGKILL", -9),
    "terminated": ("lock", "SIGTERM", -15),
    "interrupted": ("lock", "SIGINT", -2),
    "exception": ("go on", "raise", 1),
    "normal, nothing closed": ("go on", "end", 0),
}


def test_nothing_outlives_the_main_process(tmp_path: Path) -> None:
    """All at the same time, as each waits most of the time."""
    started = {}
    for name, (then, end, _) in ENDS.items():
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-c", MAIN, str(folder), ",".join(FEW), then, end]
        environment = {**os.environ, "FAMILY": str(folder), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started[name] = folder, process
    try:
        for name, (folder, process) in started.items():
            _, end, status = ENDS[name]
            while not (folder / "second").exists() and process.poll() is None:
                time.sleep(0.05)
            if end.startswith("SIG"):
                assert set(living(folder)) == set(FEW), name
                process.send_signal(signal.Signals[end])
            assert process.wait(60) == status, name
        assert {name: left for name, (folder, _) in started.items() if (left := what_is_left(folder))} == {}
    finally:
        for folder, process in started.values():
            process.kill()
            for path in folder.iterdir():
                if path.name.isdecimal() and is_alive(int(path.name)):
                    os.kill(int(path.name), signal.SIGKILL)


def test_nothing_outlives_a_fit_that_is_killed(folder: Path) -> None:
    options = {
        "data.source.env": "tests.family_env.FamilyEnv",
        "data.source.env.folder": str(folder),
        "data.source.num_slots": "2",
        "warm_start.updates": "0",
        "trainer.logger.init_args.save_dir": str(folder.parent),
    }
    command = [sys.executable, "train.py", "fit", f"--config={TOY}", *(f"--{key}={value}" for key, value in options.items())]
    environment = {**os.environ, "FAMILY": str(folder), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "second").exists() and process.poll() is None:
        time.sleep(0.1)
    assert set(living(folder)) == set(KINDS)
    process.kill()
    process.wait()
    assert what_is_left(folder) == []


class Raise(Callback):
    """After the first rollout.

    Args:
        kind: What.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_start(self, *args: Any) -> None:
        raise {"mistake": RunError("on purpose"), "bug": KeyError("on purpose"), "Ctrl-C": KeyboardInterrupt()}[self.kind]


@pytest.mark.parametrize(("kind", "end"), [("mistake", SystemExit), ("bug", KeyError), ("Ctrl-C", SystemExit)])
def test_nothing_outlives_a_fit_that_fails(kind: str, end: type[BaseException], tmp_path: Path, folder: Path) -> None:
    """Also while its traceback, and with it the whole run, is still known."""
    others = set(mp.active_children())
    with mock.patch("signal.signal"), pytest.raises(end) as error:  # Lightning would make this process deaf to Ctrl-C
        run(
            tmp_path,
            "--data.source.env=tests.family_env.FamilyEnv",
            f"--data.source.env.folder={folder}",
            "--data.source.env.kinds=[session]",
            "--data.source.env.then=go on",
            "--warm_start.updates=0",
            "--evaluation.before_training=false",
            "--trainer.callbacks+=tests.envs.test_processes.Raise",
            f"--trainer.callbacks.kind={kind}",
        )
    assert any(folder.iterdir())
    assert living(folder) == []
    assert set(mp.active_children()) <= others
    assert error.tb is not None


PREPARE = """
import signal, sys
from steppo.envs import TextWorldEnv
signal.signal(signal.SIGINT, signal.default_int_handler)
if __name__ == "__main__":
    env = TextWorldEnv("coin_collector", {"level": 1}, num_train=1000, cache_dir=sys.argv[1], num_generators=1)
    env.prepare(env.tasks("train"), lambda done, total: None)
"""


def test_nothing_outlives_the_making_of_games(tmp_path: Path) -> None:
    """And an interrupt does not wait for the games that are still to be made."""
    started = {}
    for end in ("SIGKILL", "SIGINT"):
        folder = tmp_path / end
        folder.mkdir()
        environment = {**os.environ, "FAMILY": str(folder), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", PREPARE, str(folder)], env=environment, stderr=subprocess.DEVNULL)
        started[end] = folder, process
    for end, (folder, process) in started.items():
        while process.poll() is None and not any("spawn_main" in command for command in of_run(folder)):
            time.sleep(0.05)
        process.send_signal(signal.Signals[end])
        assert process.wait(60) == -signal.Signals[end]
    assert {end: left for end, (folder, _) in started.items() if (left := what_is_left(folder))} == {}
    assert [path.name for path in (tmp_path / "SIGINT").rglob("tmp*")] == [], "an interrupt leaves no half-made game"


def test_an_environment_may_use_multiprocessing() -> None:
    with closing(EnvPool(ParallelEnv(), 1, 1, 60.0)) as pool:
        pool.reset(0, TASKS[0])
        assert pool.receive(0).error == ""
        for how in ("Pool", "Executor", "Manager", "Process"):
            for method in ("fork", "spawn"):
                pool.step(0, Action(f"{how} {method}"))
                reply = pool.receive(0)
                assert (reply.error, reply.turn) == ("", Turn("[0, 1, 4, 9]")), (how, method)


@given(num_slots=st.integers(1, 200), num_workers=st.integers(1, 64), env_ticks=st.integers(0, 9))
def test_workers_share_evenly_what_is_asked_together(num_slots: int, num_workers: int, env_ticks: int) -> None:
    pool = object.__new__(EnvPool)
    pool._processes = [None] * min(num_slots, num_workers)  # type: ignore[list-item]
    together: dict[int, list[int]] = {}
    for slot, tick in enumerate(first_ticks(num_slots, env_ticks)):
        together.setdefault(tick, []).append(slot)
    assert (min(together), max(together) <= env_ticks) == (0, True)
    assert len(together) == min(num_slots, env_ticks + 1)
    assert max(map(len, together.values())) - min(map(len, together.values())) <= 1
    for slots in (*together.values(), range(num_slots)):
        served = Counter(dict.fromkeys(range(len(pool._processes)), 0))
        served.update(pool._worker_of(slot) for slot in slots)
        assert max(served.values()) - min(served.values()) <= 1


@pytest.mark.parametrize("num_workers", [2, 3])
def test_all_workers_are_busy_at_each_tick(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two ticks of the engine, the commands of half the slots go out."""
    policy = TinyPolicy()
    policy.build(list)
    rounds: list[set[int]] = [set()]

    class Rounds(Engine):
        """Says the same to everybody."""

        queue: ClassVar[list[Request]] = []

        def submit(self, request: Request) -> None:
            self.queue.append(request)

        def poll(self) -> list[Completion]:
            rounds.append(set())
            said = source.write(Action("take"), Turn())
            answers = [Completion(request.id, said, np.zeros(len(said), np.float32), "stop") for request in self.queue]
            self.queue.clear()
            return answers

    env = CorridorEnv(max_steps=6)
    source = EnvSource(
        env, StateContext(), Rounds(), num_slots=6, num_workers=num_workers, env_ticks=1, max_prompt_tokens=2**20
    )
    source.bind_tokenizer(policy.tokenizer, policy.stop_ids)
    step = source.pool.step
    monkeypatch.setattr(
        source.pool, "step", lambda slot, action: (rounds[-1].add(source.pool._worker_of(slot)), step(slot, action))
    )
    with closing(source):
        groups = groups_of([TASKS[3]] * 6)  # all of the same length
        assert len(list(source.collect(groups, RolloutConfig("train/0", 0, 1.0)))) == 6
    busy = [workers for workers in rounds if workers]
    assert len(busy) >= 4
    assert busy == [set(range(num_workers))] * len(busy)
