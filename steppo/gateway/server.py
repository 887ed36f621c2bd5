"""The gateway: sessions on one side, an engine on the other, in a thread of its own."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import secrets
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from steppo import types
from steppo.errors import ConfigError, RunError, said
from steppo.gateway.asker import Asker
from steppo.gateway.session import Chain, Made, Session
from steppo.gateway.settings import COUNTS, GatewaySettings
from steppo.gateway.voice import Voices
from steppo.gateway.wire import Answer, Call, Refused, Reward, read, read_call
from steppo.types import Sampling, Step

T = TypeVar("T")

MODEL = "policy"
_REMEMBERED = 4096  # sessions that are over, so that late calls are told


class Gateway:
    """Answers chat completions of sessions with an engine, and keeps each answer as a step.

    All it holds is touched in its own thread's event loop (``run``).

    Args:
        settings: Where it listens, and its limits.
        voices: Writes prompts and reads answers.
        max_steps: Of a session.
        max_prompt_tokens: Of a call.
        max_new_tokens: Of an answer, and what a call gets that does not say.

    Attributes:
        counts: By the names of ``COUNTS``.
    """

    def __init__(
        self, settings: GatewaySettings, voices: Voices, max_steps: int, max_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        self.settings = settings
        self.voices = voices
        self.max_steps = max_steps
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        self._sessions: dict[str, Session] = {}
        self._over: OrderedDict[str, tuple[str, str]] = OrderedDict()  # keys of sessions that are over, by id
        self.asker = Asker()
        self._loop = asyncio.new_event_loop()
        try:
            self._socket = socket.create_server((settings.host, settings.port), backlog=2048)
        except OSError as error:
            raise ConfigError(f"the gateway cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
        # Heads and bodies go out apart, and a body would wait 40 ms for the head to be acknowledged. Connections inherit it.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        quiet: dict[str, Any] = {"access_log": False, "log_level": "error", "lifespan": "off"}
        times: dict[str, Any] = {"timeout_graceful_shutdown": 1, "timeout_keep_alive": 300}
        self._server = uvicorn.Server(uvicorn.Config(self._app(), **quiet, **times))
        self._thread = threading.Thread(target=self._serve, name="gateway", daemon=True)
        self._thread.start()  # what is asked before it answers waits in the socket

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def base_url(self, session: Session) -> str:
        """``OPENAI_BASE_URL`` of a session's agent."""
        return f"{self.address}/sessions/{session.id}/v1"

    # ---- for its owner, in any thread ----

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine in the gateway's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Ends the thread; nothing is answered any more."""
        if self._thread.is_alive():
            self._server.should_exit = True
            self._thread.join(10.0)
        self._socket.close()

    def open(self, name: str, seed: Callable[[str, int], int], temperature: float) -> Session:
        """A new session. In the gateway's loop."""
        if len(self._sessions) >= self.settings.max_sessions:
            raise RunError(f"the gateway has {len(self._sessions)} sessions, and max_sessions allows no more")
        session = Session(name, seed, temperature)
        self._sessions[session.id] = session
        return session

    def end(self, session: Session) -> None:
        """Ends a session: what is under way is cancelled, what comes late gets 409. In the gateway's loop."""
        if self._sessions.pop(session.id, None) is not None:
            self._over[session.id] = session.key, session.reward_key
            while len(self._over) > _REMEMBERED:
                self._over.popitem(last=False)
        session.is_closed = True
        for made in itertools.chain.from_iterable(session.made.values()):
            made.work.cancel()
        self.asker.release([_engine_session(session, chain) for chain in session.chains])

    # ---- its thread ----

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._server.serve(sockets=[self._socket]))
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    # ---- a call ----

    async def _complete(self, session: Session, call: Call, name: str) -> Answer:
        self._throttle(session)  # here, where it is noted that this call has no answer: the next try is no repetition
        await self.asker.wait(self.settings.update_wait_s)
        under_way = sum(chain.is_busy for chain in session.chains)
        if len(session.taken) + under_way >= self.max_steps:
            session.is_full = True
            raise Refused(409, f"the session has had its {self.max_steps} calls", "step_limit")
        chain = session.chain_for(call, name)
        chain.is_busy, round = True, session.rounds
        session.under_way += 1
        try:
            return await self._take(session, chain, call, round)
        finally:
            chain.is_busy = False
            session.under_way -= 1
            session.rounds += not session.under_way
            if not chain.steps:
                session.chains.remove(chain)

    async def _take(self, session: Session, chain: Chain, call: Call, round: int) -> Answer:
        prompt_ids = self.voices.prompt(session, chain, call)
        session.overflowed = len(prompt_ids) > self.max_prompt_tokens
        if session.overflowed:
            too_long = f"the prompt has {len(prompt_ids)} tokens, more than {self.max_prompt_tokens}"
            raise Refused(400, too_long, "context_length_exceeded", "messages")
        most = min(call.most_tokens or self.max_new_tokens, self.max_new_tokens)
        sampling = Sampling(session.temperature, most, call.stop)
        seed = session.seed(chain.agent_id, chain.steps)
        request = types.Request(0, _engine_session(session, chain), prompt_ids, sampling, seed)
        completion = await self.asker.generate(request)
        if completion.error or not len(completion.action_ids):
            why = completion.error or "it gave an answer without a token"
            raise Refused(503, f"the engine failed: {why}", "engine_error")
        action, is_read = self.voices.read(call, completion.action_ids)
        named = [(it.name, json.dumps(dict(it.arguments), ensure_ascii=False)) for it in action.tool_calls]
        mark = hashlib.blake2b(chain.agent_id.encode(), digest_size=4).hexdigest()  # agents may hand a dialogue over
        calls = tuple((f"call_{mark}_{chain.steps}_{number}", *it) for number, it in enumerate(named))
        reason = "tool_calls" if calls else "length" if completion.finish_reason == "length" else "stop"
        id, counts = f"chatcmpl-{session.id}-{len(session.taken)}", (len(prompt_ids), len(completion.action_ids))
        answer = Answer(id, action.text, action.reasoning, calls, reason, *counts)
        step = Step(  # as if something followed, and nothing was earned
            prompt_ids, completion.action_ids, completion.logprobs, 0.0, chain.steps, completion.finish_reason, False, False,
            is_read, _observed(call), str(action).strip(), session.temperature, self.asker.version, chain.agent_id,
        )  # fmt: skip
        session.take(chain, call, step, answer, round)
        self.counts["gateway_calls"] += 1
        return answer

    def _made(self, session: Session, request: Request, body: bytes) -> Made:
        """The call that a request makes, or the one that it repeats."""
        digest = hashlib.blake2b(body, digest_size=16).digest()
        given = request.headers.get("idempotency-key") or request.headers.get("x-request-id")
        key = f"id {given}" if given else digest.hex()
        retries = request.headers.get("x-stainless-retry-count", "0")
        known = session.made.get(key, [])  # several where equal bodies were sent at once
        void = next((made for made in known if _is_void(made.work)), None)  # it is this that is tried again
        if known and void is None and (given or (retries.isdigit() and int(retries) > 0)):
            if known[-1].digest != digest:
                raise Refused(400, "this request id was that of another body", "idempotency_error")
            self.counts["gateway_retries"] += 1
            return known[-1]
        call = read_call(body, session.temperature)
        if call.overridden:
            self.counts["gateway_other_policy"] += 1
            if self.settings.other_policy == "refuse":
                wrong = f"{', '.join(call.overridden)}: not while a policy is trained, as it would be another one"
                advice = "; leave it out, or have it overridden (gateway.other_policy)"
                raise Refused(400, wrong + advice, "unsupported_parameter", call.overridden[0])
        name = request.headers.get("x-agent-id", "")[:64].replace("#", "_")  # which marks the second of a name
        work = asyncio.create_task(self._complete(session, call, name))
        work.add_done_callback(_is_void)  # nobody may be left to hear what it raised
        made = Made(digest, work, call.stream, call.with_usage)
        session.made[key] = [*(other for other in known if other is not void), made]
        return made

    async def _chat(self, id: str, request: Request) -> Response:
        session = self._session(id, request)
        made = self._made(session, request, await self._body(request))
        answer = await self._wait(made, session, request)
        if answer is None:
            return Response(status_code=499)  # nobody reads it
        if made.stream:
            return Response("".join(answer.events(MODEL, made.with_usage)), media_type="text/event-stream")
        return JSONResponse(answer.body(MODEL))

    async def _wait(self, made: Made, session: Session, request: Request) -> Answer | None:
        """The answer; nothing where the agent has gone, which cancels the call unless another connection waits for it."""
        gone = asyncio.create_task(_gone(request))
        made.waiting += 1
        try:
            await asyncio.wait({made.work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            made.waiting -= 1
            gone.cancel()
        if made.work.done():
            if made.work.cancelled():
                raise _closed() if session.is_closed else Refused(409, "the call was cancelled", "cancelled")
            return made.work.result()
        if not made.waiting:
            made.work.cancel()
            self.counts["gateway_cancelled"] += 1
        return None

    # ---- who may ----

    def _session(self, id: str, request: Request, for_reward: bool = False) -> Session:
        """The open session that a request has the key of."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        session = self._sessions.get(id)
        keys = (session.key, session.reward_key) if session else self._over.get(id, ("", ""))
        key = keys[for_reward]
        if scheme.lower() != "bearer" or not key or not secrets.compare_digest(given.strip().encode(), key.encode()):
            raise Refused(401, "this session does not exist, or has another key", "invalid_api_key")
        if session is None or session.is_closed:
            raise _closed()
        return session

    def _throttle(self, session: Session) -> None:
        rate, now = self.settings.max_calls_per_s, time.monotonic()
        passed = now - session.last_call if session.last_call else math.inf
        session.allowance, session.last_call = min(2 * rate, session.allowance + rate * passed), now
        if session.allowance < 1:
            raise Refused(429, f"more than {rate:g} calls a second", "rate_limit_exceeded", retry_after=1.0)
        session.allowance -= 1

    async def _body(self, request: Request) -> bytes:
        most, body = self.settings.max_body_kib * 1024, bytearray()
        with suppress(ClientDisconnect):  # half a body is no JSON
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise Refused(413, f"the body is longer than {self.settings.max_body_kib} KiB", "body_too_large")
        return bytes(body)

    # ---- routes ----

    async def _models(self, id: str, request: Request) -> Response:
        self._session(id, request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "steppo"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _reward(self, id: str, request: Request) -> Response:
        session = self._session(id, request, for_reward=True)
        given = read(Reward, await self._body(request))
        session.give(given.reward, given.success, given.completion)
        return JSONResponse({"ok": True})

    def _app(self) -> FastAPI:
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        app.post("/sessions/{id}/v1/chat/completions", response_model=None)(self._chat)
        app.get("/sessions/{id}/v1/models", response_model=None)(self._models)
        app.post("/sessions/{id}/reward", response_model=None)(self._reward)

        async def refuse(request: Request, refused: Refused) -> Response:
            self.counts["gateway_refused"] += 1
            if (session := self._sessions.get(f"{request.url.path}//".split("/")[2])) is not None:
                session.refusal = str(refused)
            return JSONResponse(refused.body, refused.status, refused.headers)

        async def unknown(request: Request, error: HTTPException) -> Response:
            what = f"{request.method} {request.url.path}: {error.detail}"
            return await refuse(request, Refused(error.status_code, what, "not_found"))

        async def broken(request: Request, error: Exception) -> Response:
            return await refuse(request, Refused(500, said(error), "internal_error"))

        app.add_exception_handler(Refused, refuse)  # type: ignore[arg-type]
        app.add_exception_handler(HTTPException, unknown)  # type: ignore[arg-type]
        app.add_exception_handler(Exception, broken)
        return app


def _closed() -> Refused:
    return Refused(409, "the session is closed", "session_closed")


def _is_void(work: asyncio.Task[Answer]) -> bool:
    """It came to no answer: who asks again is answered anew."""
    return work.done() and (work.cancelled() or work.exception() is not None)


def _engine_session(session: Session, chain: Chain) -> str:
    return f"{session.name}|{session.id}|{chain.agent_id}"


async def _gone(request: Request) -> None:
    """Waits until the other end has hung up. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _observed(call: Call) -> str:
    """What was seen since the last answer, or at all."""
    last = max((place for place, said in enumerate(call.messages) if said.role == "assistant"), default=-1)
    new = [said.text for said in call.messages[last + 1 :] if said.role != "system"]
    return "\n".join(filter(None, new))
