"""The engine's thread: it computes as the caller's would, holds up no event loop, and ends when it is left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from steppo.engines import Engine, EngineThread, HFEngine
from steppo.errors import ConfigError
from steppo.models import TinyPolicy
from steppo.types import Completion, Request, Sampling

PROMPT = np.arange(2, 6, dtype=np.int32)


def request(name: str = "a", seed: int = 0) -> Request:
    return Request(0, name, PROMPT, Sampling(1.0, 3), seed)


class Scripted(Engine):
    """Runs ``work`` in each poll and answers everything, last first."""

    def __init__(self, work: Callable[[], Any] = lambda: None) -> None:
        self.work = work
        self.queue: list[Request] = []
        self.released: list[str] = []

    def submit(self, request: Request) -> None:
        self.queue.append(request)

    def poll(self) -> list[Completion]:
        self.work()
        queue, self.queue = self.queue, []
        return [Completion(asked.id, PROMPT + asked.seed, np.zeros(4, np.float32), "stop") for asked in queue[::-1]]

    def release(self, session_id: str) -> None:
        self.released.append(session_id)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], list[Any]]] = {
    "plain": lambda: [],
    "one thread": lambda: [threads(1)],
    "two threads": lambda: [threads(2)],
    "bfloat16": lambda: [torch.autocast("cpu", torch.bfloat16)],
    "float16": lambda: [torch.autocast("cpu", torch.float16)],
    "bfloat16 but not here": lambda: [torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)],
    "float64": lambda: [default_dtype(torch.float64)],
    "deterministic": lambda: [deterministic()],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_holds_for_the_caller_holds_for_the_engine(name: str) -> None:
    def settings() -> dict[str, Any]:
        weight = torch.ones(2, 2)
        return {
            "threads": torch.get_num_threads(),
            "product": (weight @ weight).dtype,
            "dtype": weight.dtype,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    found: list[Any] = []
    engine = Scripted(lambda: found.append((settings(), torch.is_grad_enabled(), threading.current_thread().name)))
    with ExitStack() as stack:
        for context in SETTINGS[name]():
            stack.enter_context(context)
        thread = EngineThread(engine, count())
        asyncio.run(thread.generate([request()]))
        thread.close([])
        assert found == [(settings(), False, "engine")]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_numbers_are_those_of_the_caller_s_thread(tiny_policy: TinyPolicy, precision: torch.dtype | None) -> None:
    """Bit for bit."""
    engine = HFEngine()
    engine.bind(tiny_policy)
    asked = [request(str(seed), seed) for seed in range(12)]
    state = torch.get_rng_state()
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        thread = EngineThread(engine, count(100))
        answers = asyncio.run(thread.generate(asked))
        thread.close([one.session_id for one in asked])  # what is cached would be read in other shapes
        for one in asked:
            engine.submit(Request(one.seed, one.session_id, one.prompt_ids, one.sampling, one.seed))
        expected = sorted((done for _ in range(3) for done in engine.poll()), key=lambda done: done.request_id)
    assert [answer.request_id for answer in answers] == list(range(100, 112))
    assert len({tuple(answer.action_ids) for answer in answers}) > 6
    for answer, other in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer.action_ids, other.action_ids)
        np.testing.assert_array_equal(answer.logprobs, other.logprobs)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


@pytest.mark.timeout(60)
def test_the_event_loop_goes_on_while_the_engine_works() -> None:
    """The engine waits for something that another task brings."""
    brought = threading.Event()

    async def both() -> list[Completion]:
        thread = EngineThread(Scripted(brought.wait), count())
        answers = asyncio.ensure_future(thread.generate([request(seed=1), request(seed=2)]))
        await asyncio.sleep(0.01)
        assert not answers.done()
        brought.set()
        found = await answers
        thread.close([])
        return found

    first, second = asyncio.run(both())
    assert (first.action_ids[0], second.action_ids[0]) == (3, 4)  # in the order of the requests


@pytest.mark.parametrize("error", [ConfigError("a mistake"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_what_ends_a_run_comes_out(error: BaseException) -> None:
    def work() -> None:
        raise error

    async def ask() -> None:
        with pytest.raises(type(error)):
            await thread.generate([request()])

    thread = EngineThread(Scripted(work), count())
    asyncio.run(ask())
    thread.close([])


@pytest.mark.timeout(60)
def test_an_engine_is_left_in_the_midst_of_an_answer() -> None:
    """As an interrupt would leave it; its sessions are released."""
    begun = threading.Event()

    def for_ever() -> None:
        begun.set()
        while True:
            time.sleep(0.001)

    engine = Scripted(for_ever)
    thread = EngineThread(engine, count())

    async def leave() -> None:
        task = asyncio.ensure_future(thread.generate([request("a"), request("b")]))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        thread.close(["a", "b"])
        task.cancel()

    asyncio.run(leave())
    assert not thread._thread.is_alive()
    assert engine.released == ["a", "b"]
