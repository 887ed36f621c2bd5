"""Plays episodes, many at a time, in logical time: which of them is asked with which others never depends on the clock."""

from __future__ import annotations

import asyncio
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
        due: The tick at which it is answered, if it waits for its environment.
        has_asked: Its session is known to the engine.
    """

    def __init__(self, pool: EnvPool, slot: int, place: Place) -> None:
        self._pool = pool
        self.slot = slot
        self.place = place
        self.asks: Request | None = None
        self.waits_for_env = False
        self.due = 0
        self.has_asked = False
        self._still = asyncio.Event()
        self._answer: asyncio.Future[Any]
        self._task: asyncio.Task[Episode]

    # ---- for the episode ----

    async def reset(self, task: Task, want_expert: bool) -> EnvReply:
        self._pool.reset(self.slot, task, want_expert)
        self.waits_for_env = True
        return await self._wait()

    async def step(self, action: Action) -> EnvReply:
        self._pool.step(self.slot, action)
        self.waits_for_env = True
        return await self._wait()

    async def generate(self, request: Request) -> Completion:
        self.asks = request
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
    """Plays episodes in the slots of a pool, tick by tick of the engine.

    At each tick the seats whose environments are due get their answers, in the order of the slots, and the tick waits for
    those that are not there yet; while the engine is at work, only once they are many (``Engine.join_share``). A slot whose
    episode is over gets the next one; what is asked for is submitted; the engine makes one tick; and what is done goes on to
    its environment. That is due ``env_ticks`` ticks later. So environments work while the engine does, and who is asked
    together with whom follows from what was sampled, not from the clock. Where the engine has nothing to do, time jumps to
    whoever is due first. Slots are first filled over as many ticks as an environment has, or all would wait for the engine,
    and the engine for all, together.

    An engine that answers whole batches has ticks as long as those take. Where it lives elsewhere and gives what is done
    first, a tick is one such gift: there the clock does decide who is asked together, and all promises are those of the
    engine's own numbers.

    Args:
        pool: The environments.
        engine: Answers what players ask it.
        request_ids: None is given twice, as a late answer must not be taken for another's.
        num_slots: Episodes played at the same time.
        env_ticks: Ticks that pass while an environment works.
        play: The coroutine of an episode that is played from a seat.
    """

    def __init__(
        self,
        pool: EnvPool,
        engine: Engine,
        request_ids: Iterator[int],
        num_slots: int,
        env_ticks: int,
        play: Callable[[Place, Seat], Coroutine[Any, Any, Episode]],
    ) -> None:
        self._pool = pool
        self._engine = EngineThread(engine, request_ids)
        self._join_share = engine.join_share
        self._num_slots = num_slots
        self._env_ticks = env_ticks
        self._play = play
        self._now = 0  # ticks so far
        self._seats: dict[int, Seat] = {}  # by slot
        self._free: dict[int, int] = {}  # slot -> its first tick
        self._asking: dict[int, Seat] = {}  # by request

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
        self._free = dict(enumerate(first_ticks(min(self._num_slots, len(wanted)), self._env_ticks)))
        loop = asyncio.new_event_loop()
        try:
            while wanted or self._seats:
                yield from _run(loop, self._until_some_end(wanted))
            if self._engine.has_work:  # the last to be released
                _run(loop, self._engine.tick())
        finally:
            self._leave(loop)

    async def _until_some_end(self, wanted: deque[Place]) -> list[Episode]:
        ended: list[Episode] = []
        while not ended and (wanted or self._seats):
            self._jump(bool(wanted))
            if joins := self._may_join():
                ended += await self._answer_environments()
                await self._fill(wanted)
            ended += await self._ask_engine(joins)
            await self._fill(wanted)
            self._now += 1
        return ended

    def _jump(self, any_wanted: bool) -> None:
        """Goes to the first tick at which anything happens: this one, if the engine has or gets something to do."""
        dues = [seat.due if seat.waits_for_env else self._now for seat in self._seats.values()]
        dues += self._free.values() if any_wanted else []
        self._now = max(self._now, min(dues))

    def _may_join(self) -> bool:
        """Whether there are enough that have something to ask now, or nobody is at work whom they would join."""
        ready = sum(seat.asks is not None or (seat.waits_for_env and seat.due <= self._now) for seat in self._seats.values())
        return not self._asking or ready >= self._join_share * len(self._seats)

    async def _answer_environments(self) -> list[Episode]:
        """One by one, so that contexts and parsers are called in the same order, too."""
        due = [seat for _, seat in sorted(self._seats.items()) if seat.waits_for_env and seat.due <= self._now]
        for seat in due:
            seat.gets(await self._pool.answer(seat.slot))
        return await self._settle(due)

    async def _fill(self, wanted: deque[Place]) -> None:
        for slot, first in sorted(self._free.items()):
            if wanted and first <= self._now:
                del self._free[slot]
                seat = self._seats[slot] = Seat(self._pool, slot, place := wanted.popleft())
                seat.starts(self._play(place, seat))
                await self._settle([seat])

    async def _ask_engine(self, joins: bool) -> list[Episode]:
        """One tick."""
        for _, seat in sorted(self._seats.items()):
            if joins and seat.asks is not None:
                self._asking[self._engine.submit(seat.asks)] = seat
                seat.asks, seat.has_asked = None, True
        if not self._engine.has_work:
            return []
        answers = {completion.request_id: completion for completion in await self._engine.tick()}
        answered = sorted(((self._asking.pop(id), answer) for id, answer in answers.items()), key=lambda one: one[0].slot)
        for seat, answer in answered:
            seat.gets(answer)
        return await self._settle([seat for seat, _ in answered])

    async def _settle(self, seats: list[Seat]) -> list[Episode]:
        """Waits until each waits for something again, and gives those that are over."""
        ended = []
        for seat in seats:
            episode = await seat.still()
            seat.due = self._now + 1 + self._env_ticks
            if episode is not None:
                ended.append(episode)
                self._free[seat.slot] = self._now
                del self._seats[seat.slot]
                self._pool.release(seat.slot)
                if seat.has_asked:
                    self._engine.release(seat.place.id)
        return ended

    def _leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends the engine's thread and all that is under way."""
        self._engine.close([seat.place.id for seat in self._seats.values() if seat.has_asked])
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            _run(loop, asyncio.wait(tasks))
        loop.close()


def first_ticks(num_slots: int, env_ticks: int) -> list[int]:
    """When each slot is first filled. Neighbours are served by different workers (``EnvPool``), so all are busy."""
    return [slot * (env_ticks + 1) // num_slots for slot in range(num_slots)]


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
