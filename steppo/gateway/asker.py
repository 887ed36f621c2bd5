"""Between the gateway's calls and an engine's ticks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from steppo.engines import EngineThread
from steppo.errors import said
from steppo.gateway.wire import Refused
from steppo.types import Completion, Request


class Asker:
    """Hands requests to an engine while there is one. In one event loop.

    Attributes:
        version: Of the engine's weights.
    """

    def __init__(self) -> None:
        self.version = 0
        self._wanted: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._asked: dict[int, asyncio.Future[Completion]] = {}
        self._released: list[str] = []
        self._ready, self._wake = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def asking(self, engine: EngineThread, version: int, failed: Callable[[Any], object]) -> AsyncIterator[None]:
        """The engine answers while this is open; what is under way then is answered before it ends.

        Args:
            engine: Asked by nobody else meanwhile.
            version: Of its weights.
            failed: Is told of what the engine raises.
        """
        self.version = version
        self._ready.set()
        pumping = asyncio.create_task(self._pump(engine, failed))
        try:
            yield
        finally:
            self._ready.clear()
            self._wake.set()
            with suppress(Exception):
                await pumping

    async def wait(self, seconds: float) -> None:
        """Until there is an engine. Raises ``Refused``."""
        if not self._ready.is_set():
            try:
                await asyncio.wait_for(self._ready.wait(), seconds)
            except TimeoutError:
                raise Refused(429, "the weights are being updated", "updating", retry_after=1.0) from None

    async def generate(self, request: Request) -> Completion:
        """The engine's answer. To cancel this releases the request's session."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._wanted.append((request, future))
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            self.release([request.session_id])
            raise

    def release(self, session_ids: Sequence[str]) -> None:
        """Has the engine forget these."""
        self._released += session_ids
        self._wake.set()

    async def _pump(self, engine: EngineThread, failed: Callable[[Any], object]) -> None:
        """Hands over between ticks, as ``EngineThread`` wants it."""
        try:
            while True:
                for session_id in self._released:
                    engine.release(session_id)
                wanted, self._wanted, self._released = self._wanted, [], []
                self._asked |= {engine.submit(request): future for request, future in wanted if not future.done()}
                if engine.has_work:
                    for completion in await engine.tick():
                        asked = self._asked.pop(completion.request_id, None)
                        if asked is not None and not asked.done():
                            asked.set_result(completion)
                    continue
                self._asked.clear()  # of calls that were cancelled
                if not self._ready.is_set():
                    return
                self._wake.clear()
                await self._wake.wait()
        except BaseException as error:
            self._ready.clear()
            for future in [*self._asked.values(), *(future for _, future in self._wanted)]:
                if not future.done():
                    future.set_exception(Refused(503, f"the engine failed: {said(error)}", "engine_error"))
            self._asked, self._wanted = {}, []
            failed(error)
            raise
