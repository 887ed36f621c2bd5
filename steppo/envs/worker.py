"""What runs in a worker process: some slots' environments, served one request after the other."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

from steppo.envs.base import Env
from steppo.envs.checks import EnvReply, checked_turn, opening_turn, with_expert
from steppo.envs.given import copied, started
from steppo.errors import located
from steppo.types import Action, Task, Turn


def play(env: Env, task: Task | None, actions: list[Action], want_expert: bool, going_on: Callable[[], None]) -> Turn:
    """Resets to ``task`` unless it is ``None``, then plays ``actions``; the last answer counts, others call ``going_on``."""
    turn = Turn()
    if task is not None:
        turn = opening_turn(env.reset(task))
    for action in actions:
        if task is not None:
            going_on()
        turn = checked_turn(env.step(action))
    if want_expert and not (turn.terminated or turn.truncated):
        turn = with_expert(turn, env.expert_action())
    return turn


def _resident_mib() -> float:
    """Memory that this process holds."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except FileNotFoundError:
        # Not on Linux. There the peak would not do: a new process inherits that of the process that started it.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def serve(connection: Connection, pickled_env: bytes, memory_mib: int | None, spared_turns: int) -> None:
    """Starts, then serves slots until it is told to stop, nobody listens, or it has outgrown its memory.

    It says ``None`` when it has read the environment, and how large it is when that has started. Where it cannot do one of
    these it says why, and ends. An environment that raises is closed and made anew at its
    next reset. Answers come in the order of the requests; each says whether it is the last, but none of the first
    ``spared_turns`` resets and steps is. ``None`` is a sign of life within an episode that is played again.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it was blocked for the start
    os.setpgid(0, 0)
    envs: dict[int, Env] = {}
    outgrown = False
    with contextlib.suppress(EOFError, OSError):
        try:
            prototype: Env = pickle.loads(pickled_env)
        except Exception as error:
            connection.send(located(error))
            return
        connection.send(None)
        try:
            shared = started(prototype)
        except BaseException as error:  # also an exit
            connection.send(located(error))
            return
        connection.send(_resident_mib())
        while not outgrown and (message := connection.recv()) is not None:
            slot, pickled_task, actions, want_expert = message
            try:
                if slot not in envs:
                    if pickled_task is None:
                        raise RuntimeError("the episode was lost with an earlier worker process")
                    envs[slot] = copied(prototype, shared)
                task = pickle.loads(pickled_task) if pickled_task is not None else None
                turn = play(envs[slot], task, actions, want_expert, lambda: connection.send(None))
                reply = pickle.dumps(EnvReply(turn))
            except BaseException as error:  # a broken environment is data, not the end of the run
                reply = pickle.dumps(EnvReply(error=located(error)))
                with contextlib.suppress(Exception):
                    envs.pop(slot).close()
            spared_turns -= len(actions) + (pickled_task is not None)
            outgrown = memory_mib is not None and spared_turns <= 0 and _resident_mib() > memory_mib
            connection.send((reply, outgrown))
    for env in envs.values():
        with contextlib.suppress(Exception):
            env.close()
