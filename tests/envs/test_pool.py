"""EnvPool: what is played in worker processes is what would be played here, and only the broken episode is lost."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from steppo.envs.checks import EnvReply
from steppo.envs.pool import EnvPool
from steppo.errors import ConfigError, RunError
from steppo.types import Action, Task, Turn
from tests.toy_env import CorridorEnv, FaultyEnv

RIGHT, LEFT, TAKE = Action("right"), Action("left"), Action("take")
ACTIONS = [RIGHT, TAKE, LEFT, Action("dance"), RIGHT, RIGHT, TAKE, LEFT]
TASKS = CorridorEnv().tasks("train")


@pytest.fixture
def make_pool() -> Iterator[Callable[..., EnvPool]]:
    """Makes pools whose processes end with the test, however it ends."""
    pools: list[EnvPool] = []
    others = set(mp.active_children())

    def make(env: CorridorEnv, num_slots: int, num_workers: int, timeout_s: float = 30.0, **more: int) -> EnvPool:
        pools.append(EnvPool(env, num_slots, num_workers, timeout_s, **more))
        return pools[-1]

    yield make
    for child in set(mp.active_children()) - others:
        child.kill()
    for pool in pools:
        pool.close()


def play_here(task: Task, actions: Sequence[Action]) -> list[EnvReply]:
    """All replies of an episode, played in this process."""
    env = CorridorEnv()
    turns = [env.reset(task)]
    for action in actions:
        if turns[-1].terminated:
            break
        turns.append(env.step(action))
    return [EnvReply(turn) for turn in turns]


def play_slots(pool: EnvPool, tasks: Sequence[Task], actions: Sequence[Action]) -> list[list[EnvReply]]:
    """All replies of each slot's episode: all slots are asked before the first is listened to."""
    replies: list[list[EnvReply]] = [[] for _ in tasks]
    for slot, task in enumerate(tasks):
        pool.reset(slot, task)
    for action in [*actions, None]:
        going = [slot for slot in range(len(tasks)) if not replies[slot] or is_going(replies[slot][-1])]
        for slot in going:
            replies[slot].append(pool.receive(slot))
        for slot in going:
            if action is not None and is_going(replies[slot][-1]):
                pool.step(slot, action)
    return replies


def is_going(reply: EnvReply) -> bool:
    return reply.turn is not None and not (reply.turn.terminated or reply.turn.truncated)


def seen(reply: EnvReply) -> Turn:
    assert reply.turn is not None, reply.error
    return reply.turn


@pytest.mark.parametrize("num_workers", [1, 2])
def test_slots_play_as_a_single_environment_would(make_pool: Callable[..., EnvPool], num_workers: int) -> None:
    pool = make_pool(CorridorEnv(), num_slots=5, num_workers=num_workers)
    expected = [play_here(task, ACTIONS) for task in TASKS[:5]]
    assert {len(replies) for replies in expected} != {len(ACTIONS) + 1}, "some episode should end early"
    for _ in range(2):  # slots are used again
        assert play_slots(pool, TASKS[:5], ACTIONS) == expected
    assert pool.counts["replaced_workers"] == 0


def test_more_workers_than_slots(make_pool: Callable[..., EnvPool]) -> None:
    pool = make_pool(CorridorEnv(), num_slots=1, num_workers=4)
    assert play_slots(pool, TASKS[:1], ACTIONS) == [play_here(TASKS[0], ACTIONS)]


def test_expert_actions_come_only_when_wanted(make_pool: Callable[..., EnvPool]) -> None:
    pool = make_pool(CorridorEnv(), num_slots=2, num_workers=1)
    pool.reset(0, TASKS[2], want_expert=True)
    pool.reset(1, TASKS[2])
    reply, plain = pool.receive(0), pool.receive(1)
    assert seen(plain).expert_action is None
    taken = list[Action]()
    while is_going(reply):
        action = seen(reply).expert_action
        assert action is not None
        taken.append(action)
        pool.step(0, action)
        reply = pool.receive(0)
    assert taken == [RIGHT, RIGHT, RIGHT, TAKE]
    assert (seen(reply).reward, seen(reply).success) == (1.0, True)
    assert seen(reply).expert_action is None, "there is nothing left to do"


FAULTS = {
    "raises": (FaultyEnv(fail_tasks=[TASKS[1].id]), "broken on purpose", 0),
    "hangs": (FaultyEnv(hang_tasks=[TASKS[1].id]), "no answer within 3 s", 1),
    "dies": (FaultyEnv(die_tasks=[TASKS[1].id]), "died", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_one_episode(make_pool: Callable[..., EnvPool], fault: str) -> None:
    env, message, replaced = FAULTS[fault]
    pool = make_pool(env, num_slots=3, num_workers=1, timeout_s=3.0)

    replies = play_slots(pool, TASKS[:3], ACTIONS)

    expected = [play_here(task, ACTIONS) for task in TASKS[:3]]
    assert replies[0] == expected[0]
    assert replies[2] == expected[2]
    assert replies[1][:2] == expected[1][:2]
    assert message in replies[1][2].error
    assert replies[1][2].turn is None
    assert pool.counts["replaced_workers"] == replaced
    assert pool.counts["env_timeouts"] == (fault == "hangs")
    # The slot is as good as new.
    pool.reset(1, TASKS[3])
    assert pool.receive(1) == play_here(TASKS[3], [])[0]
    pool.step(1, RIGHT)
    assert pool.receive(1) == play_here(TASKS[3], [RIGHT])[-1]


def test_other_workers_do_not_notice(make_pool: Callable[..., EnvPool]) -> None:
    pool = make_pool(FaultyEnv(die_tasks=[TASKS[1].id]), num_slots=2, num_workers=2)
    pool.reset(0, TASKS[0])
    pool.reset(1, TASKS[1])
    process_ids = {process.process.pid for process in pool._processes}
    for slot in (0, 1):
        pool.receive(slot)
        pool.step(slot, RIGHT)
        pool.receive(slot)
        pool.step(slot, RIGHT)
    assert pool.receive(1).error
    assert pool.receive(0) == play_here(TASKS[0], [RIGHT, RIGHT])[-1]
    assert len(process_ids & {process.process.pid for process in pool._processes}) == 1


def test_an_episode_in_its_pause_survives_two_deaths(make_pool: Callable[..., EnvPool]) -> None:
    """Slot 2 waits for nothing while slots 0 and 1 kill the worker, one after the other."""
    pool = make_pool(FaultyEnv(die_tasks=[TASKS[0].id, TASKS[1].id]), num_slots=3, num_workers=1)
    for slot in range(3):
        pool.reset(slot, TASKS[slot])
        pool.receive(slot)
        pool.step(slot, RIGHT)
        pool.receive(slot)
    pool.step(0, LEFT)
    pool.step(1, LEFT)
    assert pool.receive(0).error
    assert pool.receive(1).error
    expected = play_here(TASKS[2], [RIGHT, TAKE, RIGHT, LEFT])
    for number, action in enumerate([TAKE, RIGHT, LEFT], start=2):
        pool.step(2, action)
        assert pool.receive(2) == expected[number]
    assert pool.counts["replaced_workers"] == 2


@pytest.mark.timeout(20)
def test_a_death_while_an_episode_is_played_again(make_pool: Callable[..., EnvPool]) -> None:
    """Slot 1's episode is sent to a new worker, which dies too: the answer may be an error, but there is one."""
    pool = make_pool(FaultyEnv(die_tasks=[TASKS[0].id]), num_slots=2, num_workers=1, timeout_s=3.0)
    others = set(mp.active_children())
    for slot in range(2):
        pool.reset(slot, TASKS[slot])
        pool.receive(slot)
        pool.step(slot, RIGHT)
        pool.receive(slot)
    pool.step(0, LEFT)
    assert pool.receive(0).error
    for child in set(mp.active_children()) - others:
        child.kill()
        child.join()
    pool.step(1, LEFT)
    reply = pool.receive(1)
    assert reply.error or reply == play_here(TASKS[1], [RIGHT, LEFT])[-1]
    pool.reset(1, TASKS[2])
    assert pool.receive(1) == play_here(TASKS[2], [])[0]


def test_released_episodes_are_not_played_again(make_pool: Callable[..., EnvPool]) -> None:
    pool = make_pool(FaultyEnv(die_tasks=[TASKS[1].id]), num_slots=2, num_workers=1)
    for slot in range(2):
        pool.reset(slot, TASKS[slot])
        pool.receive(slot)
    pool.release(0)
    pool.step(1, RIGHT)
    pool.receive(1)
    pool.step(1, RIGHT)
    assert pool.receive(1).error
    pool.step(0, RIGHT)
    assert "lost" in pool.receive(0).error


class EchoEnv(CorridorEnv):
    """Shows what the task holds."""

    def reset(self, task: Task) -> Turn:
        return Turn(task.data["text"])


class SlowEnv(FaultyEnv):
    """A tenth of a second for each step."""

    def command(self, command: str) -> Turn:
        time.sleep(0.1)
        return super().command(command)


def test_a_long_episode_that_is_played_again_has_the_time_of_its_steps(make_pool: Callable[..., EnvPool]) -> None:
    """Its replay takes longer than one step may."""
    env = SlowEnv(die_tasks=[TASKS[0].id], max_steps=20)
    pool = make_pool(env, num_slots=2, num_workers=1, timeout_s=1.0)
    pool.reset(1, TASKS[1])
    pool.receive(1)
    actions = [LEFT, RIGHT] * 7
    for action in actions:
        pool.step(1, action)
        pool.receive(1)
    pool.reset(0, TASKS[0])
    for _ in range(2):
        pool.receive(0)
        pool.step(0, RIGHT)
    pool.step(1, RIGHT)
    assert "died (exit status 1)" in pool.receive(0).error
    assert seen(pool.receive(1)).text == "You are in room 2."
    assert pool.counts == {"replaced_workers": 1, "env_timeouts": 0, "recycled_workers": 0}


class SlowStartEnv(FaultyEnv):
    """Takes its time to arrive in a worker."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "home": os.getpid()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.pop("home") != os.getpid():
            time.sleep(1.5)
        self.__dict__.update(state)


def test_the_start_of_a_worker_is_no_step(make_pool: Callable[..., EnvPool]) -> None:
    pool = make_pool(SlowStartEnv(die_tasks=[TASKS[0].id]), num_slots=2, num_workers=1, timeout_s=1.0)
    replies = play_slots(pool, TASKS[:2], ACTIONS)
    assert "died" in replies[0][-1].error
    assert replies[1] == play_here(TASKS[1], ACTIONS)
    assert pool.counts["env_timeouts"] == 0


class NoStartEnv(CorridorEnv):
    """Does not arrive in any worker."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        sys.exit(7)


@pytest.mark.timeout(60)
def test_workers_that_do_not_start_end_the_run(make_pool: Callable[..., EnvPool]) -> None:
    pool = make_pool(NoStartEnv(), num_slots=2, num_workers=1, timeout_s=1.0)
    pool.reset(0, TASKS[0])
    with pytest.raises(RunError, match=r"did not start, 3 times in a row: .*died \(exit status 7\)"):
        pool.receive(0)


class FrozenEnv(EchoEnv):
    """Stops its whole process, threads and all, in the first step."""

    def command(self, command: str) -> Turn:
        os.kill(os.getpid(), signal.SIGSTOP)
        return super().command(command)


@pytest.mark.timeout(60)
def test_a_frozen_worker_does_not_hold_up_who_sends(make_pool: Callable[..., EnvPool]) -> None:
    """More is sent to it than a pipe holds."""
    pool = make_pool(FrozenEnv(), num_slots=3, num_workers=1, timeout_s=1.0)
    text = "long " * 200_000
    for slot in range(2):
        pool.reset(slot, Task(str(slot), {"text": text}))
        assert pool.receive(slot).turn == Turn(text)
    pool.step(0, Action("freeze"))
    pool.reset(1, Task("1", {"text": text + "1"}))
    pool.reset(2, Task("2", {"text": text + "2"}))
    assert "no answer within 1 s" in pool.receive(0).error
    assert pool.receive(1).turn == Turn(text + "1")
    assert pool.receive(2).turn == Turn(text + "2")


class Unreadable:
    """Can be sent, but not received."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


@dataclass(frozen=True)
class MyTurn(Turn):
    """With something of its own, for a context that knows it."""

    extra: Any = None


class OddEnv(CorridorEnv):
    """Answers the first step with whatever the command names."""

    def command(self, command: str) -> Any:
        if command == "leave":
            sys.exit(3)
        turn = super().command("take")
        odd: Any = {
            "text": turn.text,
            "reward": replace(turn, reward=float("nan")),
            "info": replace(turn, info=None),  # type: ignore[arg-type]
            "short": (turn, 0.0),
            "unsendable": MyTurn(extra=lambda: None),
            "unreadable": MyTurn(extra=Unreadable()),
        }
        return odd[command]


ODD = {
    "text": "the environment's step must return a Turn, not 'There is no coin here.'",
    "reward": "the environment's reward must be finite and at most 1e+12 in size, not nan",
    "info": "the environment's info must be a mapping, not None",
    "short": "the environment's step must return a Turn, not a tuple",
    "unsendable": "the environment's turn cannot be read: ",
    "unreadable": "unreadable answer: ValueError",
    "leave": "SystemExit: 3",
}


def test_odd_answers_cost_their_own_episode(make_pool: Callable[..., EnvPool]) -> None:
    pool = make_pool(OddEnv(), num_slots=len(ODD) + 1, num_workers=1)
    for slot in range(len(ODD) + 1):
        pool.reset(slot, TASKS[0])
        pool.receive(slot)
    for slot, (command, message) in enumerate(ODD.items()):
        pool.step(slot, Action(command))
        assert message in pool.receive(slot).error
    assert pool.counts["replaced_workers"] == 0
    for slot in range(len(ODD) + 1):
        pool.reset(slot, TASKS[1])
        assert pool.receive(slot) == play_here(TASKS[1], [])[0]


class LeakyEnv(CorridorEnv):
    """Keeps 24 MiB in each step."""

    kept: ClassVar[list[bytes]] = []

    def command(self, command: str) -> Turn:
        self.kept.append(b"x" * (24 * 2**20))
        return super().command(command)


@pytest.mark.timeout(60)
def test_a_worker_that_grows_is_replaced_and_nothing_is_lost(make_pool: Callable[..., EnvPool]) -> None:
    """Also where the open episodes alone are too much: one may not replace workers for ever."""
    pool = make_pool(LeakyEnv(), num_slots=4, num_workers=1, memory_mib=300)
    assert play_slots(pool, TASKS[:4], ACTIONS) == [play_here(task, ACTIONS) for task in TASKS[:4]]
    assert pool.counts["recycled_workers"] == pool.counts["replaced_workers"] > 0


def test_a_limit_below_an_idle_worker_is_a_mistake(make_pool: Callable[..., EnvPool]) -> None:
    pool = make_pool(CorridorEnv(), num_slots=1, num_workers=1, memory_mib=1)
    pool.reset(0, TASKS[0])
    with pytest.raises(ConfigError, match="worker_memory_mib = 1 is too small"):
        pool.receive(0)


@pytest.mark.timeout(20)
def test_large_tasks_and_turns(make_pool: Callable[..., EnvPool]) -> None:
    """More than a pipe holds, in both directions, before the first answer is listened to."""
    pool = make_pool(EchoEnv(), num_slots=16, num_workers=1)
    texts = [str(slot % 10) * 100_000 for slot in range(16)]
    for slot, text in enumerate(texts):
        pool.reset(slot, Task(str(slot), {"text": text}))
    for slot, text in enumerate(texts):
        assert pool.receive(slot).turn == Turn(text)


def test_close_ends_the_workers() -> None:
    before = set(mp.active_children())
    with closing(EnvPool(CorridorEnv(), 2, 2, 30.0)) as pool:
        pool.reset(0, TASKS[0])
        pool.receive(0)
        assert len(set(mp.active_children()) - before) == 2
    assert set(mp.active_children()) <= before


def late_look(pool: EnvPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is stopped while it waits, and wakes up after the time is over: the answer came meanwhile."""
    for process in pool._processes:
        poll = process.connection.poll

        def stopped(timeout: float = 0.0, poll: Callable[..., bool] = poll) -> bool:
            if not timeout:
                return poll()
            time.sleep(1.0)
            return False

        monkeypatch.setattr(process.connection, "poll", stopped)

    async def busy(connection: Any, seconds: float) -> None:
        time.sleep(1.0)

    monkeypatch.setattr("steppo.envs.pool._readable", busy)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("way", ["receive", "answer"])
@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
def test_an_answer_that_lies_there_was_in_time(
    way: str, dies: bool, make_pool: Callable[..., EnvPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an episode's start, of a step, and of a worker that died after it."""

    def receive(slot: int) -> EnvReply:
        return pool.receive(slot) if way == "receive" else asyncio.run(pool.answer(slot))

    pool = make_pool(SlowEnv(), num_slots=2, num_workers=1, timeout_s=0.5)
    pool.reset(0, TASKS[0])
    receive(0)  # it has started
    late_look(pool, monkeypatch)
    pool.reset(1, TASKS[1])
    assert receive(1) == play_here(TASKS[1], [])[0]
    pool.step(0, RIGHT)
    if dies:
        time.sleep(0.3)
        pool._processes[0].process.kill()
    assert receive(0) == play_here(TASKS[0], [RIGHT])[-1]
    assert pool.counts["env_timeouts"] == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["hang", "die"])
def test_what_fails_is_awaited_as_it_is_received(kind: str, make_pool: Callable[..., EnvPool]) -> None:
    def failure(receive: Callable[[EnvPool, int], EnvReply]) -> tuple[EnvReply, dict[str, int]]:
        tasks: Any = {f"{kind}_tasks": [TASKS[0].id]}
        pool = make_pool(FaultyEnv(**tasks), num_slots=1, num_workers=1, timeout_s=1.0)
        pool.reset(0, TASKS[0])
        for _ in range(2):
            receive(pool, 0)
            pool.step(0, RIGHT)
        return receive(pool, 0), dict(pool.counts)

    awaited = failure(lambda pool, slot: asyncio.run(pool.answer(slot)))
    assert awaited == failure(lambda pool, slot: pool.receive(slot))
    assert awaited[0].error
