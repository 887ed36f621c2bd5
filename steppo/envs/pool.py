"""Environments in worker processes: many slots, a few processes, nothing lost but the episode that broke."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing as mp
import queue
import signal
import threading
import traceback
from collections import deque
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from steppo.envs.base import Env
from steppo.types import Observation, Task


@dataclass(frozen=True)
class EnvReply:
    """What a slot answers to ``reset`` (reward 0, not done) and ``step``. ``error`` is set when the environment failed."""

    observation: Observation | None = None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def _play(env: Env, task: Task | None, actions: list[str], want_expert: bool) -> EnvReply:
    """Resets to ``task`` unless it is ``None``, then plays ``actions``; the last answer counts."""
    reply = EnvReply()
    if task is not None:
        observation, info = env.reset(task)
        reply = EnvReply(observation, info=info)
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        reply = EnvReply(observation, float(reward), bool(terminated), bool(truncated), info)
    if want_expert and reply.observation is not None and not (reply.terminated or reply.truncated):
        reply = replace(reply, observation=replace(reply.observation, expert_action=env.expert_action()))
    return reply


def _read(connection: Connection, messages: queue.SimpleQueue[Any]) -> None:
    """Takes all that is sent at once, so that the sender never waits for a worker that waits to be listened to."""
    message: Any = ()
    while message is not None:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            message = None
        messages.put(message)


def _worker(connection: Connection, prototype: Env) -> None:
    """Serves slots until the pipe closes. An environment that raises is closed and made anew at its next reset."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    envs: dict[int, Env] = {}
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, messages), daemon=True).start()
    while (message := messages.get()) is not None:
        slot, task, actions, want_expert = message
        try:
            if slot not in envs:
                if task is None:
                    raise RuntimeError("the episode was lost with an earlier worker process")
                envs[slot] = copy.deepcopy(prototype)
            reply = _play(envs[slot], task, actions, want_expert)
        except Exception as error:  # a broken environment is data, not the end of the run
            where = traceback.extract_tb(error.__traceback__)[-1]
            reply = EnvReply(error=f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})")
            with contextlib.suppress(Exception):
                envs.pop(slot).close()
        connection.send((slot, reply))
    for env in envs.values():
        env.close()


@dataclass
class _Slot:
    """What is needed to play a slot's episode again in a new process."""

    task: Task | None = None
    actions: list[str] = field(default_factory=list)
    want_expert: bool = False


class _Process:
    """One worker process. ``waiting``: what it was asked, in order: slots, and whether anyone wants to hear the answer."""

    def __init__(self, prototype: Env) -> None:
        context = mp.get_context("spawn")  # a fork would copy torch's threads and locks
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_worker, args=(child, prototype), daemon=True)
        self.process.start()
        child.close()
        self.waiting: deque[tuple[int, bool]] = deque()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class EnvPool:
    """``num_slots`` copies of an environment, spread over ``num_workers`` processes.

    ``reset`` and ``step`` only send; ``receive`` waits for one slot's answer. A worker that dies, or that gives no answer
    within ``timeout_s``, is replaced: the slot it was serving fails, its other episodes are played again from their actions.

    Args:
        env: Prototype, copied to the workers.
        num_slots: Episodes played at the same time.
        num_workers: Processes.
        timeout_s: Longest time for one reset or step, in seconds.
    """

    def __init__(self, env: Env, num_slots: int, num_workers: int, timeout_s: float) -> None:
        self._env = env
        self._timeout_s = timeout_s
        self._slots = [_Slot() for _ in range(num_slots)]
        self._processes = [_Process(env) for _ in range(min(num_workers, num_slots))]
        self._replies: dict[int, EnvReply] = {}
        self.replaced_workers = 0

    def reset(self, slot: int, task: Task, want_expert: bool = False) -> None:
        """Starts an episode in a slot."""
        self._slots[slot] = _Slot(task, [], want_expert)
        self._send(slot, task, [])

    def step(self, slot: int, action: str) -> None:
        """Sends a command to a slot's episode."""
        self._slots[slot].actions.append(action)
        self._send(slot, None, [action])

    def receive(self, slot: int) -> EnvReply:
        """Waits for the answer to the slot's last ``reset`` or ``step``."""
        worker = self._worker_of(slot)
        while slot not in self._replies:
            process = self._processes[worker]
            try:
                if not process.connection.poll(self._timeout_s):
                    self._replace(worker, f"no answer within {self._timeout_s:g} s")
                    continue
                answered, reply = process.connection.recv()
            except (EOFError, OSError):
                self._replace(worker, "the environment's process died")
                continue
            _, wanted = process.waiting.popleft()
            if wanted:
                self._replies[answered] = reply
        reply = self._replies.pop(slot)
        if reply.error:
            self._slots[slot] = _Slot()
        return reply

    def release(self, slot: int) -> None:
        """Forgets a finished episode, so that it is not played again for a replaced worker."""
        self._slots[slot] = _Slot()

    def close(self) -> None:
        """Ends the workers."""
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.connection.send(None)
        for process in self._processes:
            process.process.join(timeout=2)
            process.kill()
        self._processes = []

    def _worker_of(self, slot: int) -> int:
        return slot % len(self._processes)

    def _send(self, slot: int, task: Task | None, actions: list[str], wanted: bool = True) -> None:
        worker = self._worker_of(slot)
        process = self._processes[worker]
        process.waiting.append((slot, wanted))
        # A dead process is found, and its slots are played again, when an answer is waited for.
        with contextlib.suppress(OSError):
            process.connection.send((slot, task, actions, self._slots[slot].want_expert))

    def _replace(self, worker: int, reason: str) -> None:
        """Kills a worker, fails the slot it was serving and plays the others again in a new process."""
        old = self._processes[worker]
        old.kill()
        self.replaced_workers += 1
        self._processes[worker] = _Process(self._env)
        wanted = {slot for slot, wanted in old.waiting if wanted}
        if old.waiting:
            self._slots[old.waiting[0][0]] = _Slot()
        for slot in wanted:
            if self._slots[slot].task is None:
                self._replies[slot] = EnvReply(error=reason)
        for slot, state in enumerate(self._slots):
            if self._worker_of(slot) == worker and state.task is not None:
                self._send(slot, state.task, list(state.actions), slot in wanted)
