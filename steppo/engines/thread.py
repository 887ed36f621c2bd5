"""An engine in a thread of its own, so that an event loop never waits for a forward pass."""

from __future__ import annotations

import asyncio
import ctypes
import queue
import threading
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
class _Surroundings:
    """What torch keeps by thread and numbers depend on: autocast, the number of threads, the current device."""

    autocast: dict[str, torch.dtype]
    num_threads: int
    cuda_device: int | None

    @classmethod
    def here(cls) -> _Surroundings:
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

    Precision, number of threads and device are those of the thread that it is made in. What is global, such as sharded
    weights that are held whole, must hold until it is closed. It calls no collective.

    Args:
        engine: To be called by nobody else until this is closed.
        request_ids: Ids of the requests that it gets, in order.
    """

    def __init__(self, engine: Engine, request_ids: Iterator[int]) -> None:
        self._engine = engine
        self._request_ids = request_ids
        self._surroundings = _Surroundings.here()
        self._last: Future[Any] = Future()
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One answer to each, in their order. A request that gets none from the engine has failed.

        Raises:
            SteppoError: The engine's.
        """
        numbered = [replace(request, id=next(self._request_ids)) for request in requests]
        return await asyncio.wrap_future(self._call(lambda: self._answers(numbered)))

    async def release(self, session_ids: Sequence[str]) -> list[str]:
        """Releases sessions; gives what went wrong. They are over, so nothing is lost where the engine cannot forget."""
        return await asyncio.wrap_future(self._call(lambda: self._release(session_ids)))

    def close(self, session_ids: Sequence[str]) -> None:
        """Ends the thread; where an answer is under way, in the midst of it. Releases the sessions that had one to come."""
        if not self._last.cancel() and self._last.running():  # as Ctrl-C would in the main thread, between lines of Python
            thread = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Left))
        self._call(lambda: self._release(session_ids))
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

    def _answers(self, requests: Sequence[Request]) -> list[Completion]:
        waiting: dict[int, Request] = {}
        answers: dict[int, Completion] = {}

        def fail(those: Sequence[Request], error: Exception) -> None:
            answers.update({request.id: failed(request, error) for request in those})

        for request in requests:
            try:
                self._engine.submit(request)
                waiting[request.id] = request
            except SteppoError:
                raise
            except Exception as error:
                fail([request], error)
        silent = 0
        while waiting:
            try:
                completions = self._engine.poll()
                silent = 0 if completions else silent + 1
                if silent > sum(request.sampling.max_new_tokens for request in waiting.values()):
                    raise RuntimeError("the engine gave no answer")
                for completion in completions:
                    if completion.request_id in waiting:  # else its episode was given up before
                        del waiting[completion.request_id]
                        answers[completion.request_id] = completion
            except SteppoError:
                raise
            except Exception as error:
                fail(list(waiting.values()), error)
                waiting.clear()
        return [answers[request.id] for request in requests]

    def _release(self, session_ids: Sequence[str]) -> list[str]:
        errors = []
        for session_id in session_ids:
            try:
                self._engine.release(session_id)
            except SteppoError:
                raise
            except Exception as error:
                errors.append(said(error))
        return errors
