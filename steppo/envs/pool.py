"""Environments in worker processes: many slots, a few processes, nothing lost but the episode that broke."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing as mp
import pickle
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize

from steppo.envs.base import Env
from steppo.envs.checks import EnvReply
from steppo.envs.given import pickled
from steppo.envs.guard import Guard
from steppo.envs.worker import serve
from steppo.errors import ConfigError, RunError, said
from steppo.types import Action, Task

_START_S = 120.0  # a process imports and unpickles before it answers; that is no environment's fault
_STARTS = 3
_CLOSE_S = 2.0  # for environments to close

COUNTS = ("replaced_workers", "env_timeouts", "recycled_workers")


@dataclass
class _Slot:
    """What is needed to play a slot's episode again in a new process."""

    task: Task | None = None
    actions: list[Action] = field(default_factory=list)
    want_expert: bool = False


def _write(connection: Connection, outbox: queue.SimpleQueue[bytes | None]) -> None:
    """Sends from a thread of its own: a pipe that is full because its worker hangs must not hold up the pool."""
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            connection.send_bytes(message)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Says what it was that the system has no room for."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot start a worker process of the environment: {error}") from error


class _Process:
    """One worker process, to be started.

    Attributes:
        id: Marks it and what it starts.
        waiting: What it has not answered yet, in order: slots, and whether anyone wants to hear the answer.
        has_env: It has read the environment, which starts now or has started.
        ready: That has started.
        failed_starts: How often in a row its predecessors did not.
    """

    def __init__(
        self, id: str, pickled_env: bytes, memory_mib: int | None, spared_turns: int = 0, failed_starts: int = 0
    ) -> None:
        context = mp.get_context("spawn")  # a fork would copy torch's threads and locks
        self.id = id
        self.connection, self._child = context.Pipe()
        arguments = self._child, pickled_env, memory_mib, spared_turns
        # No daemon: those may not have children of their own.
        self.process = context.Process(target=serve, args=arguments, daemon=False)
        self.waiting: deque[tuple[int, bool]] = deque()
        self.has_env = False
        self.ready = False
        self.failed_starts = failed_starts
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=_write, args=(self.connection, self._outbox), daemon=True)

    def start(self, guard: Guard) -> None:
        """Does not wait for it to be ready."""
        with _starting(), guard.marking(self.id):
            self.process.start()
        self._child.close()
        self._writer.start()

    def send(self, message: tuple[int, bytes | None, list[Action], bool] | None) -> None:
        """Never waits. A dead process is found when an answer is waited for; ``None`` asks it to stop."""
        self._outbox.put(pickle.dumps(message))

    def hears(self, seconds: float) -> bool:
        """Waits for a message; ``EOFError`` if it has died. Its children may hold its end of the pipe open.

        The last look comes after the time is over: what came while this process was busy or stopped was in time.
        """
        deadline = time.monotonic() + seconds
        while not self.connection.poll(self._next_look(deadline)):
            if not self._goes_on(deadline):
                return self.connection.poll()
        return True

    async def is_heard(self, seconds: float) -> bool:
        """As ``hears``, while the event loop goes on."""
        deadline = time.monotonic() + seconds
        while not self.connection.poll():
            if not self._goes_on(deadline):
                return self.connection.poll()
            await _readable(self.connection, self._next_look(deadline))
        return True

    def _goes_on(self, deadline: float) -> bool:
        if not self.process.is_alive() and not self.connection.poll():
            raise EOFError
        return time.monotonic() < deadline

    @staticmethod
    def _next_look(deadline: float) -> float:
        return max(0.0, min(0.5, deadline - time.monotonic()))

    def wait(self, seconds: float) -> None:
        """Lets it end by itself."""
        deadline = time.monotonic() + seconds
        while self.process.pid is not None and self.process.is_alive() and time.monotonic() < deadline:
            self.process.join(0.05)

    def end(self, guard: Guard, patience_s: float = 0.0) -> None:
        """Kills it, unless it ends by itself in time, and all that it started."""
        self.wait(patience_s)
        if self.process.pid is not None:
            guard.kill(self.id, [self.process.pid])
        self.release()

    def release(self) -> None:
        """Frees what is held for a process that has been killed."""
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()
        self._outbox.put(None)
        if self._writer.ident is not None and self._writer is not threading.current_thread():
            self._writer.join()  # a write that was under way has failed: nobody is left to read
        self._child.close()
        self.connection.close()


async def _readable(connection: Connection, seconds: float) -> None:
    """Waits until there is something to read, or the time is over."""
    loop, woken = asyncio.get_running_loop(), asyncio.Event()
    timer = loop.call_later(seconds, woken.set)
    loop.add_reader(connection.fileno(), woken.set)
    try:
        await woken.wait()
    finally:
        loop.remove_reader(connection.fileno())
        timer.cancel()


def _end_all(processes: list[_Process], guard: Guard) -> None:
    """Ends workers and all that they started, at once if this is interrupted, and the guard."""
    try:
        for process in processes:
            process.send(None)
        deadline = time.monotonic() + _CLOSE_S
        for process in processes:
            process.wait(deadline - time.monotonic())
    finally:
        guard.kill(leaders=[process.process.pid for process in processes if process.process.pid is not None])
        for process in processes:
            process.release()
        processes.clear()
        guard.close()


class EnvPool:
    """``num_slots`` copies of an environment, spread over ``num_workers`` processes.

    ``reset`` and ``step`` only send; ``receive`` waits for one slot's answer. A worker that dies, or that gives no answer
    within ``timeout_s``, is replaced: the slot it was serving fails, its other episodes are played again from their actions.
    A worker that holds more than ``memory_mib`` after an answer is replaced, too, and no slot fails.

    Args:
        env: Prototype, copied to the workers.
        num_slots: Episodes played at the same time.
        num_workers: Processes.
        timeout_s: Longest time for one reset or step, in seconds, also for each one of an episode that is played again. The
            start of a process is not part of it.
        memory_mib: Most memory of a worker, in MiB.
        start_timeout_s: Longest time for ``Env.start``, in seconds.

    Attributes:
        counts: By the names of ``COUNTS``: workers replaced, those of them that gave no answer, and those that held too much
            memory.
    """

    def __init__(
        self,
        env: Env,
        num_slots: int,
        num_workers: int,
        timeout_s: float,
        memory_mib: int | None = None,
        start_timeout_s: float = 600.0,
    ) -> None:
        self._name = type(env).__name__
        self._env = pickled(env)
        self._timeout_s = timeout_s
        self._memory_mib = memory_mib
        self._start_timeout_s = start_timeout_s
        self._slots = [_Slot() for _ in range(num_slots)]
        self._replies: dict[int, EnvReply] = {}
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self._ids = itertools.count()
        with _starting():
            self._guard = Guard()
        self._processes: list[_Process] = []
        # Where nobody calls close: when the pool is forgotten or the program ends, before multiprocessing waits for workers.
        self._finalizer = Finalize(self, _end_all, (self._processes, self._guard), exitpriority=100)
        try:
            for worker in range(min(num_workers, num_slots)):
                self._start(worker)
        except BaseException:
            self.close()
            raise

    def reset(self, slot: int, task: Task, want_expert: bool = False) -> None:
        """Starts an episode in a slot."""
        self._slots[slot] = _Slot(task, [], want_expert)
        self._send(slot, task, [])

    def step(self, slot: int, action: Action) -> None:
        """Sends an action to a slot's episode."""
        self._slots[slot].actions.append(action)
        self._send(slot, None, [action])

    def receive(self, slot: int) -> EnvReply:
        """Waits for the answer to the slot's last ``reset`` or ``step``.

        Raises:
            RunError: A worker did not start, several times in a row.
            ConfigError: A fresh worker holds more than ``memory_mib``, or cannot read the environment.
        """
        worker = self._worker_of(slot)
        while slot not in self._replies:
            with self._listening(worker) as process:
                self._take(worker, process.hears(self._patience_s(worker)))
        return self._replied(slot)

    async def answer(self, slot: int) -> EnvReply:
        """As ``receive``, while the event loop goes on. One answer is waited for at a time."""
        worker = self._worker_of(slot)
        while slot not in self._replies:
            with self._listening(worker) as process:
                self._take(worker, await process.is_heard(self._patience_s(worker)))
        return self._replied(slot)

    def release(self, slot: int) -> None:
        """Forgets a finished episode, so that it is not played again for a replaced worker."""
        self._slots[slot] = _Slot()

    def close(self) -> None:
        """Ends the workers and all that they started. Those that cannot close their environments soon are killed."""
        if self._finalizer.still_active():
            _end_all(self._processes, self._guard)
            self._finalizer.cancel()

    def _start(self, worker: int, spared_turns: int = 0, failed_starts: int = 0) -> None:
        process = _Process(str(next(self._ids)), self._env, self._memory_mib, spared_turns, failed_starts)
        self._processes[worker : worker + 1] = [process]  # known before it lives, so that an interrupt loses none
        process.start(self._guard)

    def _worker_of(self, slot: int) -> int:
        return slot % len(self._processes)

    def _send(self, slot: int, task: Task | None, actions: list[Action], wanted: bool = True) -> None:
        process = self._processes[self._worker_of(slot)]
        process.waiting.append((slot, wanted))
        # A task of its own pickle: one that cannot be read there costs its episode, not the worker.
        process.send((slot, None if task is None else pickle.dumps(task), actions, self._slots[slot].want_expert))

    def _replied(self, slot: int) -> EnvReply:
        reply = self._replies.pop(slot)
        if reply.error:
            self._slots[slot] = _Slot()
        return reply

    def _patience_s(self, worker: int) -> float:
        process = self._processes[worker]
        return self._timeout_s if process.ready else self._start_timeout_s if process.has_env else _START_S

    @contextlib.contextmanager
    def _listening(self, worker: int) -> Iterator[_Process]:
        """A worker that turns out to be dead is replaced."""
        process = self._processes[worker]
        try:
            yield process
        except (EOFError, OSError):
            process.end(self._guard, patience_s=1.0)
            self._replace(worker, f"the environment's process died (exit status {process.process.exitcode})")

    def _take(self, worker: int, heard: bool) -> None:
        """Takes the message that was waited for; a worker that gave none is replaced."""
        process = self._processes[worker]
        if not heard:
            process.end(self._guard)
            self.counts["env_timeouts"] += process.ready
            self._replace(worker, f"no answer within {self._patience_s(worker):g} s")
            return
        message = process.connection.recv()
        if not process.ready:
            self._take_start(worker, message)
            return
        if message is None:
            return
        answer, outgrown = message
        slot, wanted = process.waiting.popleft()
        if wanted:
            try:
                self._replies[slot] = pickle.loads(answer)
            except Exception as error:  # what a Turn of the user's own holds may be known to the worker only
                self._replies[slot] = EnvReply(error=f"unreadable answer: {said(error)}")
        if outgrown:
            process.end(self._guard, patience_s=_CLOSE_S)  # it closes its environments
            self.counts["recycled_workers"] += 1
            self._replace(worker)

    def _take_start(self, worker: int, message: str | float | None) -> None:
        """Takes what a process says before it serves."""
        process = self._processes[worker]
        if not process.has_env:
            if isinstance(message, str):
                raise ConfigError(
                    f"{self._name} cannot be read in a worker process: {message}; its class must be in a module that can be "
                    "imported, and what it holds must pickle"
                )
            process.has_env = True
        elif isinstance(message, str):
            process.end(self._guard, patience_s=1.0)
            self._replace(worker, message)
        elif self._memory_mib is not None and message is not None and message > self._memory_mib:
            raise ConfigError(f"worker_memory_mib = {self._memory_mib} is too small: an idle worker holds {message:.0f}")
        else:
            process.ready, process.failed_starts = True, 0

    def _replace(self, worker: int, error: str = "") -> None:
        """Starts a worker in place of one that ended and plays its episodes again; an ``error`` fails the one it served."""
        old = self._processes[worker]
        failed_starts = old.failed_starts + (not old.ready)
        if failed_starts == _STARTS:
            culprit = f"{self._name}.start: " if old.has_env else ""
            raise RunError(f"a worker process of the environment did not start, {_STARTS} times in a row: {culprit}{error}")
        self.counts["replaced_workers"] += 1
        wanted = {slot for slot, wanted in old.waiting if wanted}
        if error and old.ready:
            self._slots[old.waiting[0][0]] = _Slot()
        for slot in wanted:
            if self._slots[slot].task is None:
                self._replies[slot] = EnvReply(error=error or "the episode was released")
        again = [
            (slot, state.task, state.actions)
            for slot, state in enumerate(self._slots)
            if self._worker_of(slot) == worker and state.task is not None
        ]
        # What is played again may itself be too much. As many new turns must follow, or nothing would ever get done.
        spared = 2 * sum(1 + len(actions) for *_, actions in again)
        self._start(worker, spared, failed_starts)
        for slot, task, actions in again:
            self._send(slot, task, list(actions), slot in wanted)
