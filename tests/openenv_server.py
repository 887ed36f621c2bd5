"""A server that speaks OpenEnv's protocol, and answers what a test wants; as a program, on the port that it is given.

Needs websockets, which comes with OpenEnv.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TEXT = {"title": "SayAction", "required": ["words"], "properties": {"words": {"type": "string", "minLength": 2}}}
NUMBER = {
    "title": "Drop",
    "required": ["column"],
    "properties": {"column": {"type": "integer", "minimum": 0}, "metadata": {}},
}
MOVE = {
    "title": "Move",
    "required": ["way"],
    "properties": {"way": {"$ref": "#/$defs/Way"}},
    "$defs": {"Way": {"type": "string", "enum": ["UP", "DOWN"]}},
}
SEVERAL = {
    "title": "Trade",
    "description": "Buys some.",
    "required": ["what", "amount"],
    "properties": {"what": {"$ref": "#/$defs/What"}, "amount": {"type": "number"}, "metadata": {"type": "object"}},
    "$defs": {"What": {"enum": ["tea", "salt"]}},
}
CALLS = {"title": "CallToolAction", "properties": {"tool_name": {"type": "string"}}}

Play = Callable[[str, dict[str, Any]], Any]


def observation(seen: Any, reward: Any = None, done: Any = False) -> dict[str, Any]:
    """What a server says of a step."""
    return {"type": "observation", "data": {"observation": seen, "reward": reward, "done": done}}


def refusal(message: str, code: str) -> dict[str, Any]:
    """What a server says when it fails."""
    return {"type": "error", "data": {"message": message, "code": code}}


def parrot(what: str, given: dict[str, Any]) -> dict[str, Any]:
    """Says what it is given; done with the word ``bye``."""
    seen = {"text": str(given), "number": 3, "flag": True, "metadata": {}, "none": None}
    return observation(seen, 0.5 if what == "step" else None, "bye" in given.values())


@contextmanager
def serving(play: Play, action: dict[str, Any] = TEXT, fields: tuple[str, ...] = ("text",), port: int = 0) -> Iterator[str]:
    """A server in a thread. Gives its URL.

    Args:
        play: What it answers to ``reset`` and ``step`` with these data. A string is sent as it is, ``None`` ends the
            connection.
        action: Schema of its actions.
        fields: Of its observations.
        port: Any unless given.
    """
    from websockets.sync.server import ServerConnection, serve

    pages = {
        "/schema": {"action": action, "observation": {"properties": {name: {} for name in fields}}},
        "/metadata": {"name": "Parrot", "version": "7"},
        "/health": {"status": "healthy"},
    }

    def page(connection: ServerConnection, request: Any) -> Any:
        return None if request.path == "/ws" else connection.respond(200, json.dumps(pages[request.path]))

    def talk(connection: ServerConnection) -> None:
        for message in connection:
            asked = json.loads(message)
            answer = None if asked["type"] == "close" else play(asked["type"], asked["data"])
            if answer is None:
                return
            connection.send(answer if isinstance(answer, str) else json.dumps(answer))

    with serve(talk, "127.0.0.1", port, process_request=page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"


if __name__ == "__main__":
    with serving(parrot, port=int(sys.argv[1])):
        signal.pause()
