"""Plays sessions for gateway_load.py: a line of JSON comes in, the seconds of all calls go out. It imports little."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time


async def _agent(place: list, id: str, key: str, calls: int, pause_s: float, found: list[float]) -> None:
    """Seconds of each call of a session, over one connection."""
    await asyncio.sleep(random.random() * pause_s)
    reader, writer = await asyncio.open_connection(*place)
    messages: list[dict[str, str]] = []
    for number in range(calls):
        messages.append({"role": "user", "content": f"Where am I now, after {number} steps?"})
        body = json.dumps({"model": "policy", "messages": messages}).encode()
        head = f"POST /sessions/{id}/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        start = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        told = await reader.readuntil(b"\r\n\r\n")
        length = int(told.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        answer = json.loads(await reader.readexactly(length))
        found.append(time.perf_counter() - start)
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        await asyncio.sleep(pause_s)
    writer.close()


async def play(place: list, sessions: list, calls: int, pause_s: float) -> list[float]:
    """Sessions (id, key) at the same time."""
    found: list[float] = []
    await asyncio.gather(*(_agent(place, id, key, calls, pause_s, found) for id, key in sessions))
    return found


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asyncio.run(play(*json.loads(line)))), flush=True)
