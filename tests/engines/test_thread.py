"""The engine's thread: it computes as the caller's would, holds up no event loop, and ends when it is left."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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


async def answers_of(thread: EngineThread, requests: Sequence[Request]) -> list[Completion]:
    """In the order of the requests."""
    ids = [thread.submit(request) for request in requests]
    answers: dict[int, Completion] = {}
    while len(answers) < len(ids):
        answers |= {completion.request_id: completion for completion in await thread.tick()}
    assert not thread.has_work
    return [answers[id] for id in ids]


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
        asyncio.run(answers_of(thread, [request()]))
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
        answers = asyncio.run(answers_of(thread, asked))
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
        answers = asyncio.ensure_future(answers_of(thread, [request(seed=1), request(seed=2)]))
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
            await answers_of(thread, [request()])

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
        task = asyncio.ensure_future(answers_of(thread, [request("a"), request("b")]))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        thread.close(["a", "b"])
        task.cancel()

    asyncio.run(leave())
    assert not thread._thread.is_alive()
    assert engine.released == ["a", "b"]


class Slow(Scripted):
    """Answers in its so-many-th tick, and notes every call."""

    def __init__(self, ticks: float) -> None:
        super().__init__()
        self.ticks = ticks
        self.calls: list[str] = []

    def submit(self, request: Request) -> None:
        self.calls.append(f"submit {request.id}")
        super().submit(request)

    def poll(self) -> list[Completion]:
        self.calls.append("poll")
        return super().poll() if self.calls.count("poll") >= self.ticks else []

    def release(self, session_id: str) -> None:
        self.calls.append(f"release {session_id}")


def test_a_tick_makes_all_calls_since_the_last() -> None:
    engine = Slow(2)
    thread = EngineThread(engine, count(7))

    async def ticks() -> list[int]:
        assert not thread.has_work
        thread.release("z")
        assert thread.has_work
        assert await thread.tick() == []
        assert [thread.submit(request("a")), thread.submit(request("b"))] == [7, 8]
        assert await thread.tick() == []
        thread.release("c")
        return [completion.request_id for completion in await thread.tick()]

    assert sorted(asyncio.run(ticks())) == [7, 8]
    assert not thread.has_work
    thread.release("d")
    thread.close(["a", "b"])
    calls = ["release z", "submit 7", "submit 8", "poll", "release c", "poll", "release d", "release a", "release b"]
    assert engine.calls == calls


@pytest.mark.parametrize(("ticks", "fails"), [(7, False), (8, True), (math.inf, True)])
def test_an_engine_may_be_silent_for_as_many_ticks_as_there_may_be_tokens(ticks: float, fails: bool) -> None:
    """Two requests of three tokens each; then it is asked once more, with as much patience."""
    engine = Slow(ticks)
    thread = EngineThread(engine, count())
    answers = asyncio.run(answers_of(thread, [request("a"), request("b")]))
    assert [answer.error for answer in answers] == ["RuntimeError: the engine gave no answer" if fails else ""] * 2
    assert engine.calls.count("poll") == 7
    [again] = asyncio.run(answers_of(thread, [request("c")]))
    assert bool(again.error) == (ticks == math.inf)
    assert engine.calls.count("poll") == (11 if again.error else 8)
    thread.close([])


def test_the_silence_before_a_request_was_given_up_costs_no_later_one() -> None:
    engine = Slow(7)
    thread = EngineThread(engine, count())

    async def ticks() -> list[Completion]:
        thread.submit(request("a"))
        for _ in range(3):
            assert await thread.tick() == []
        thread.release("a")
        thread.submit(request("b"))
        return [completion for _ in range(4) for completion in await thread.tick()]

    assert [(answer.request_id, answer.error) for answer in asyncio.run(ticks())] == [(1, "")]
    thread.close([])
