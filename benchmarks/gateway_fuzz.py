"""Throws odd calls at the gateway and checks that what it recorded is exactly what its engine read and sampled.

    python benchmarks/gateway_fuzz.py --calls 10000

Threads play agents by HTTP: dialogues that go on or are rewritten, with tools, streamed or not, in any script, malformed
bodies, retries with their header, connections that hang up. The engine answers at random: words, halves of characters, calls
of tools, broken ones. Prints counts and what is wrong, if anything; writes benchmarks/results/gateway_fuzz.json.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
from measuring import about

from steppo.engines import Engine, EngineThread
from steppo.gateway.server import Gateway
from steppo.gateway.session import Session
from steppo.gateway.settings import GatewaySettings
from steppo.gateway.voice import Voices
from steppo.models import TinyPolicy
from steppo.models.policy import Policy
from steppo.rendering import HermesParser, Renderer
from steppo.types import Completion, Request

RESULT = Path(__file__).parent / "results/gateway_fuzz.json"
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
WORDS = ["go", "Straße", "日本語", "🙂", "<|end|>", "<tool_call>", "\n", '"', "\\u0000", "مرحبا", " ", "e\u0301"]
MALFORMED = [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"messages": 3}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "n": 3}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}',
    b'{"messages": [' + b"[" * 5000,
]


class Rig:
    """A gateway and an engine, for one benchmark or test."""

    def __init__(self, policy: Policy, engine: Engine, steps: int, prompt: int, new: int, **settings: Any) -> None:
        self.policy = policy
        self.engine = engine
        voices = Voices(Renderer(), HermesParser())
        voices.bind(policy.tokenizer, policy.stop_ids)
        self.gateway = Gateway(GatewaySettings(**settings), voices, steps, prompt, new)
        self.failures: list[BaseException] = []

    def open(self, name: str = "session", temperature: float = 1.0) -> Session:
        async def opened() -> Session:
            return self.gateway.open(name, lambda agent, step: number_of(f"{name}|{agent}|{step}"), temperature)

        return self.gateway.run(opened()).result(30)

    def end(self, session: Session) -> None:
        async def ended() -> None:
            self.gateway.end(session)

        self.gateway.run(ended()).result(30)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """The engine answers."""
        thread, ready, leave = EngineThread(self.engine, itertools.count()), threading.Event(), asyncio.Event()

        async def hold() -> None:
            async with self.gateway.asker.asking(thread, 7, self.failures.append):
                ready.set()
                await leave.wait()

        async def left() -> None:
            leave.set()

        held = self.gateway.run(hold())
        assert ready.wait(30)
        try:
            yield
        finally:
            self.gateway.run(left())
            held.result(30)
            thread.close([])

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.gateway.address.removeprefix("http://").rpartition(":")
        return host, int(port)

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, Any]:
        """A request and its answer: status, body, headers."""
        connection = HTTPConnection(*self.place, timeout=60)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()


def number_of(text: str) -> int:
    """A seed."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 2**63


class RandomEngine(Engine):
    """Answers at random, by the request's seed, after one tick to three; keeps what it was asked and said."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.said: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self._queue: list[tuple[int, Request]] = []

    def submit(self, request: Request) -> None:
        self._queue.append((1 + request.seed % 3, request))

    def release(self, session_id: str) -> None:
        self._queue = [(ticks, request) for ticks, request in self._queue if request.session_id != session_id]

    def poll(self) -> list[Completion]:
        done = [self._answer(request) for ticks, request in self._queue if ticks == 1]
        self._queue = [(ticks - 1, request) for ticks, request in self._queue if ticks > 1]
        return done

    def _answer(self, request: Request) -> Completion:
        drawn = random.Random(request.seed)
        tokenizer = self._policy.tokenizer
        call = '<tool_call>\n{"name": "find", "arguments": {"what": "' + drawn.choice(WORDS[:4]) + '"}}\n</tool_call>'
        kind = drawn.randrange(4)
        if kind == 0:  # any bytes, halves of characters too
            ids = [drawn.randrange(2, 258) for _ in range(drawn.randint(1, 8))]
        else:
            ids = tokenizer.encode([" ".join(drawn.choices(WORDS, k=3)), call, call[:-30]][kind - 1])
        stops = drawn.random() < 0.8
        action = np.asarray([*ids, tokenizer.eos_token_id] if stops else ids, np.int32)
        self.said[request.session_id, request.seed] = request.prompt_ids, action
        return Completion(request.id, action, np.zeros(len(action), np.float32), "stop" if stops else "length")


class Agent:
    """One session, played at random."""

    def __init__(self, rig: Rig, number: int, seed: int) -> None:
        self.rig = rig
        self.session = rig.open(f"fuzz/{number}")
        self.drawn = random.Random(f"{seed}/{number}")
        self.counts: Counter[str] = Counter()
        self.answered: set[str] = set()
        self.hung_up = 0
        self._dialogue: list[Any] = []
        self._last: tuple[bytes, str] | None = None
        self._path = f"/sessions/{self.session.id}/v1/chat/completions"

    def call(self) -> None:
        kind = self.drawn.choices(["goes on", "rewritten", "malformed", "retry", "hangs up"], weights=[6, 2, 1, 1, 1], k=1)[
            0
        ]
        self.counts[kind] += 1
        if kind == "malformed":
            status, *_ = self._send(self.drawn.choice(MALFORMED))
            self._expect(status in (400, 413), f"a malformed body got {status}")
        elif kind == "retry" and self._last is not None:
            body, id = self._last
            status, answer, _ = self._send(body, {"x-stainless-retry-count": "1"})
            self._expect(status == 200 and id in answer.decode(), f"a retry got {status} and another answer")
        else:
            self._ask(kind)

    def _ask(self, kind: str) -> None:
        if kind == "rewritten" or not self._dialogue:
            system = [{"role": "system", "content": "Help."}] if self.drawn.random() < 0.3 else []
            self._dialogue = [*system, *self._dialogue[2:4]]
        self._dialogue.append({"role": "user", "content": "".join(self.drawn.choices(WORDS, k=3))})
        body: dict[str, Any] = {"model": "policy", "messages": self._dialogue, "user": str(self.drawn.random())}
        body |= {"tools": [TOOL]} if self.drawn.random() < 0.5 else {}
        body |= {"stream": True} if self.drawn.random() < 0.5 else {}
        data = json.dumps(body).encode()
        if kind == "hangs up":
            self.hung_up += 1
            self._hang_up(data)
            return
        status, answer, _ = self._send(data)
        if status == 400 and b"context_length_exceeded" in answer:
            self._dialogue = []
            return
        self._expect(status == 200, f"a call got {status}: {answer[:200]!r}")
        if status == 200:
            id, message = read(answer)
            self._expect(id not in self.answered, "an answer came twice")
            self.answered.add(id)
            self._last = data, id
            self._dialogue.append(message)

    def _send(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes, Any]:
        return self.rig.send("POST", self._path, body, {"Authorization": f"Bearer {self.session.key}", **(headers or {})})

    def _hang_up(self, body: bytes) -> None:
        head = f"POST {self._path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.session.key}\r\n"
        with suppress(OSError), socket.create_connection(self.rig.place, timeout=10) as connection:
            cut = self.drawn.random() < 0.3  # in the midst of the body
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + (body[:9] if cut else body))

    def _expect(self, holds: bool, wrong: str) -> None:
        if not holds:
            self.counts[f"WRONG: {wrong}"] += 1

    def check(self, said: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]) -> int:
        """Every step is what the engine read and sampled; no answer is lost or kept twice."""
        taken = self.session.taken
        self._expect(self.answered <= taken.keys(), "an answer is not recorded")
        self._expect(len(taken) <= len(self.answered) + self.hung_up, "a step was recorded that nobody asked for")
        for it in taken.values():
            chain = it.chain.agent_id
            key = f"{self.session.name}|{self.session.id}|{chain}", number_of(f"{self.session.name}|{chain}|{it.place}")
            prompt, action = said[key]
            same = np.array_equal(it.step.prompt_ids, prompt) and np.array_equal(it.step.action_ids, action)
            self._expect(same, "a step has other ids than the engine")
        return len(taken)


def read(answer: bytes) -> tuple[str, Any]:
    """Id and message of an answer, streamed or not."""
    text = answer.decode()
    if not text.startswith("data: "):
        whole = json.loads(text)
        return whole["id"], whole["choices"][0]["message"]
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    content = "".join(delta.get("content") or "" for delta in deltas)
    return chunks[0]["id"], {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def fuzz(calls: int, seed: int = 0, threads: int = 8, calls_per_session: int = 40) -> Counter[str]:
    """Counts of what was done; what begins with ``WRONG`` must not be there."""
    policy = TinyPolicy(vocab_size=258)
    policy.build(list)
    engine = RandomEngine(policy)
    rig = Rig(policy, engine, 10_000, 1500, 40, max_calls_per_s=1e6)
    counts: Counter[str] = Counter()

    def play(number: int) -> Counter[str]:
        agent = Agent(rig, number, seed)
        for _ in range(calls_per_session):
            agent.call()
        rig.end(agent.session)
        agent.counts["steps"] = agent.check(engine.said)
        return agent.counts

    try:
        with rig.asking(), ThreadPoolExecutor(threads) as pool:
            for found in pool.map(play, range(-(-calls // calls_per_session))):
                counts += found
        counts.update({f"WRONG: {error!r}": 1 for error in rig.failures})
    finally:
        rig.gateway.close()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    counts = fuzz(options.calls, options.seed, options.threads)
    for name, count in sorted(counts.items()):
        print(f"{count:>8}  {name}")
    RESULT.write_text(json.dumps(about() | {"counts": dict(sorted(counts.items()))}, indent=1, ensure_ascii=False) + "\n")
    raise SystemExit(any(name.startswith("WRONG") for name in counts))


if __name__ == "__main__":
    main()
