"""Plays episodes, many at a time, in logical time: which of them is asked with which others never depends on the clock."""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from steppo.engines import Engine, EngineThread
from steppo.envs.checks import EnvReply
from steppo.envs.pool import EnvPool
from steppo.rollouts.place import Place
from steppo.types import Action, Completion, Episode, Request, Task

T = TypeVar("T")


class Seat:
    """A slot with an episode in it. What the episode asks for is answered when the scheduler says so.

    Attributes:
        asks: The request that it wants answered, if it is one.
        waits_for_env: It waits for its environment.
        has_asked: Its session is known to the engine.
    """

    def __init__(self, pool: EnvPool, slot: int, place: Place) -> None:
        self._pool = pool
        self._slot = slot
        self.place = place
        self.asks: Request | None = None
        self.waits_for_env = False
        self.has_asked = False
        self._still = asyncio.Event()
        self._answer: asyncio.Future[Any]
        self._task: asyncio.Task[Episode]

    # ---- for the episode ----

    async def reset(self, task: Task, want_expert: bool) -> EnvReply:
        self._pool.reset(self._slot, task, want_expert)
        self.waits_for_env = True
        return await self._wait()

    async def step(self, action: Action) -> EnvReply:
        self._pool.step(self._slot, action)
        self.waits_for_env = True
        return await self._wait()

    async def generate(self, request: Request) -> Completion:
        self.asks, self.has_asked = request, True
        return await self._wait()

    async def _wait(self) -> Any:
        self._answer = asyncio.get_running_loop().create_future()
        self._still.set()
        return await self._answer

    # ---- for the scheduler ----

    def starts(self, played: Coroutine[Any, Any, Episode]) -> None:
        """Begins the episode."""
        self._task = asyncio.get_running_loop().create_task(played)
        self._task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[Episode]) -> None:
        self._still.set()
        if not task.cancelled():
            task.exception()  # nobody needs to be told of those that come after the first

    def gets(self, answer: Any) -> None:
        """The episode goes on with what it waits for."""
        self.asks, self.waits_for_env = None, False
        self._still.clear()
        self._answer.set_result(answer)

    async def still(self) -> Episode | None:
        """Waits until the episode waits for something, or is over: then here it is."""
        await self._still.wait()
        return self._task.result() if self._task.done() else None


class Scheduler:
    """Plays episodes in the slots of a pool.

    Slots take turns in two halves: while the engine generates for one, all worker processes step the other's environments.
    A turn waits for all of its half's environments, then asks the engine for all of its half's actions at once. A slot whose
    episode is over gets the next one, which joins in at the half's next turn.

    Args:
        pool: The environments.
        engine: Answers what players ask it.
        request_ids: None is given twice, as a late answer must not be taken for another's.
        num_slots: Episodes played at the same time.
        play: The coroutine of an episode that is played from a seat.
    """

    def __init__(
        self,
        pool: EnvPool,
        engine: Engine,
        request_ids: Iterator[int],
        num_slots: int,
        play: Callable[[Place, Seat], Coroutine[Any, Any, Episode]],
    ) -> None:
        self._pool = pool
        self._engine = EngineThread(engine, request_ids)
        self._halves = halves(num_slots)
        self._play = play
        self._seats: dict[int, Seat] = {}

    @property
    def is_playing(self) -> bool:
        """Whether an episode has not come to its end."""
        return bool(self._seats)

    def episodes(self, places: Iterable[Place]) -> Generator[Episode, None, None]:
        """Gives episodes as they end. What is under way when the caller leaves is dropped; then the pool must be closed.

        Everything but the engine runs in the caller's thread, from one episode's end to the next; where an event loop runs
        there already, as in a notebook, in another.
        """
        wanted = deque(places)
        loop = asyncio.new_event_loop()
        try:
            for half in itertools.cycle(self._halves):
                if not (wanted or self._seats):
                    return
                yield from _run(loop, self._turn(half, wanted))
        finally:
            self._leave(loop)

    async def _turn(self, half: range, wanted: deque[Place]) -> list[Episode]:
        """One half's turn; gives the episodes that have ended."""
        ended: list[Episode] = []
        asking: list[Seat] = []
        seated = [(slot, self._seats[slot]) for slot in half if slot in self._seats]
        for slot, seat in seated:  # one by one, so that contexts and parsers are called in the same order, too
            if seat.waits_for_env:
                seat.gets(await self._pool.answer(slot))
        for slot, seat in seated:
            episode = await seat.still()
            if episode is not None:
                ended.append(episode)
                await self._release(slot)
            elif seat.asks is not None:
                asking.append(seat)
        for slot in half:
            if slot not in self._seats and wanted:
                await self._begin(slot, wanted.popleft())
        if asking:
            answers = await self._engine.generate([seat.asks for seat in asking if seat.asks is not None])
            for seat, answer in zip(asking, answers, strict=True):
                seat.gets(answer)
            for seat in asking:
                await seat.still()
        return ended

    async def _begin(self, slot: int, place: Place) -> None:
        seat = self._seats[slot] = Seat(self._pool, slot, place)
        seat.starts(self._play(place, seat))
        await seat.still()

    async def _release(self, slot: int) -> None:
        seat = self._seats.pop(slot)
        self._pool.release(slot)
        if seat.has_asked:
            _warn(await self._engine.release([seat.place.id]))

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends the engine's thread and all that is under way."""
        self._engine.close([seat.place.id for seat in self._seats.values() if seat.has_asked])
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            _run(loop, asyncio.wait(tasks))
        loop.close()


def halves(num_slots: int) -> tuple[range, range]:
    """Neighbours are served by different workers (``EnvPool``), so each half keeps all of them busy."""
    middle = (num_slots + 1) // 2
    return range(middle), range(middle, num_slots)


def _warn(errors: list[str]) -> None:
    for error in errors:
        warnings.warn(f"the engine could not release an episode: {error}", stacklevel=2)


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Runs the loop until ``work`` is done: here or, where another loop runs in this thread, beside it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return loop.run_until_complete(work)
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(loop.run_until_complete, work)
        try:
            return future.result()
        except BaseException:
            if not future.done():  # an interrupt: leave the loop, too
                loop.call_soon_threadsafe(loop.stop)
            raise
