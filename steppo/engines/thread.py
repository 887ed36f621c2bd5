"""An engine in a thread of its own, so that an event loop never waits for a forward pass."""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from steppo.engines.base import Engine, failed
from steppo.errors import SteppoError, said
from steppo.types import Completion, Request

T = TypeVar("T")

_DEVICES = ("cpu", "cuda", "mps", "xpu")
_PATIENCE_S = 5.0  # for what is under way to end; code that waits for something outside of Python does not hear


@dataclass(frozen=True)
class Surroundings:
    """What torch keeps by thread and numbers depend on: autocast, the number of threads, the current device."""

    autocast: dict[str, torch.dtype]
    num_threads: int
    cuda_device: int | None

    @classmethod
    def here(cls) -> Surroundings:
        on = {device: torch.get_autocast_dtype(device) for device in _DEVICES if torch.is_autocast_enabled(device)}
        cuda = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
        return cls(on, torch.get_num_threads(), cuda)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The same in another thread, and no gradients."""
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)
        if self.cuda_device is not None:
            torch.cuda.set_device(self.cuda_device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for device, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype))
            yield


class _Left(BaseException):
    """Nobody waits for what is under way."""


class EngineThread:
    """Makes all calls of an engine, one after the other, in one thread, without gradients.

    ``submit`` and ``release`` only say what is to be done; the next ``tick`` does it, so that there is one hand-over to the
    thread for each of them. Precision, number of threads and device are those of the thread that it is made in. What is
    global, such as sharded weights that are held whole, must hold until it is closed. It calls no collective.

    Args:
        engine: To be called by nobody else until this is closed.
        request_ids: Ids of the requests that it gets, in order.
    """

    def __init__(self, engine: Engine, request_ids: Iterator[int]) -> None:
        self._engine = engine
        self._request_ids = request_ids
        self._surroundings = Surroundings.here()
        self._submitted: list[Request] = []
        self._released: list[str] = []
        self._waiting: dict[int, Request] = {}
        self._empty_ticks = 0
        self._last: Future[Any] = Future()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def has_work(self) -> bool:
        """Whether a tick would do anything."""
        return bool(self._submitted or self._released or self._waiting)

    def submit(self, request: Request) -> int:
        """Gives the request to the engine with the next tick; returns its id."""
        numbered = replace(request, id=next(self._request_ids))
        self._submitted.append(numbered)
        return numbered.id

    def release(self, session_id: str) -> None:
        """Releases the session with the next tick."""
        self._released.append(session_id)

    async def tick(self) -> list[Completion]:
        """What is done by now. A request that the engine refuses, or gives no answer to, has failed.

        A session that cannot be released is over all the same: a warning says so.

        Raises:
            SteppoError: The engine's.
        """
        completions, errors = await asyncio.wrap_future(self._call(self._tick))
        for error in errors:
            warnings.warn(f"the engine could not release an episode: {error}", stacklevel=2)
        return completions

    def close(self, session_ids: Sequence[str]) -> None:
        """Ends the thread; where an answer is under way, in the midst of it. Releases the sessions that had one to come."""
        if not self._last.cancel() and self._last.running():  # as Ctrl-C would in the main thread, between lines of Python
            thread = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Left))
        self._released += session_ids
        self._call(self._release)
        self._jobs.put(None)
        self._thread.join(_PATIENCE_S)

    def _call(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._last = future

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work()
            except BaseException as error:  # the caller's, whatever it is
                future.set_exception(error)
            else:
                future.set_result(result)

        self._jobs.put(job)
        return future

    def _run(self) -> None:
        with self._surroundings.entered():
            while True:
                with suppress(_Left):  # which may come when the answer is just there
                    job = self._jobs.get()
                    if job is None:
                        return
                    job()

    def _tick(self) -> tuple[list[Completion], list[str]]:
        errors = self._release()
        completions = self._submit()
        if self._waiting:
            completions += self._poll()
        return completions, errors

    def _submit(self) -> list[Completion]:
        """Submits what is new; gives what could not be."""
        refused = []
        requests, self._submitted = self._submitted, []
        for request in requests:
            try:
                self._engine.submit(request)
                self._waiting[request.id] = request
            except SteppoError:
                raise
            except Exception as error:
                refused.append(failed(request, error))
        return refused

    def _poll(self) -> list[Completion]:
        """One tick of the engine; if it raises, or has been silent for too long, all that wait for it have failed."""
        try:
            completions = self._engine.poll()
            self._empty_ticks = 0 if completions else self._empty_ticks + 1
            if self._empty_ticks > sum(request.sampling.max_new_tokens for request in self._waiting.values()):
                raise RuntimeError("the engine gave no answer")
        except SteppoError:
            raise
        except Exception as error:
            completions = [failed(request, error) for request in self._waiting.values()]
            self._empty_ticks = 0
        # Others are late: their episodes were given up before.
        return [completion for completion in completions if self._waiting.pop(completion.request_id, None)]

    def _release(self) -> list[str]:
        """Releases what is over; gives what went wrong. Nothing is lost where the engine cannot forget."""
        errors = []
        session_ids, self._released = self._released, []
        for session_id in session_ids:
            try:
                self._engine.release(session_id)
            except SteppoError:
                raise
            except Exception as error:
                errors.append(said(error))
        gone = {id for id, request in self._waiting.items() if request.session_id in session_ids}
        if gone:  # no answer is waited for that will not come, nor is its time counted against those that come later
            self._waiting = {id: request for id, request in self._waiting.items() if id not in gone}
            self._empty_ticks = 0
        return errors
