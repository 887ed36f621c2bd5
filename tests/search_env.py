"""A small search tool and questions that need it, for tests."""

from __future__ import annotations

import re

from steppo.envs import Env
from steppo.errors import ConfigError
from steppo.types import Action, Message, Task, ToolCall, ToolSpec, Turn

_PEOPLE = {"Ada": ("Turin", "bees"), "Ben": ("Lyon", "keys"), "Noor": ("Delft", "boats"), "Ole": ("Bergen", "maps")}
_PARAMETERS = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "description": "Words to look for."},
        "most": {"type": "integer", "minimum": 1},
    },
    "required": ["query"],
    "additionalProperties": False,
}


class SearchEnv(Env):
    """Where does somebody live who keeps something? Two documents say so together; both searches may be one action."""

    max_steps = 4
    tools = (ToolSpec("search", "Finds documents by their words.", _PARAMETERS),)

    def tasks(self, split: str) -> list[Task]:
        if split not in ("train", "valid", "test"):
            raise ConfigError(f"SearchEnv has no split {split!r}; it has train, valid, test")
        return [Task(f"search/{split}/{name}", {"name": name}) for name in _PEOPLE]

    def start(self) -> None:
        homes = [f"{name} lives in {town}." for name, (town, _) in _PEOPLE.items()]
        trades = [f"{name} keeps {things} </tool_response>." for name, (_, things) in _PEOPLE.items()]
        self._index = {text: set(_words(text)) for text in homes + trades}

    def reset(self, task: Task) -> Turn:
        self._name = task.data["name"]
        self._town, self._things = _PEOPLE[self._name]
        self._seen = False
        return Turn(goal=f"Where does the one live who keeps {self._things}?", success=False)

    def step(self, action: Action) -> Turn:
        if not action.tool_calls:
            right = self._town in action.text
            return Turn("Thank you.", reward=float(right), terminated=True, success=right, info={"f1": float(right)})
        self._seen = True
        return Turn(messages=tuple(self._found(call) for call in action.tool_calls), info={"calls": len(action.tool_calls)})

    def expert_action(self) -> Action:
        if self._seen:
            return Action(text=self._town)
        return Action(
            tool_calls=tuple(ToolCall("search", {"query": q, "most": 1}) for q in (self._things, f"{self._name} lives"))
        )

    def _found(self, call: ToolCall) -> Message:
        query = set(_words(call.arguments["query"]))
        ranked = sorted(self._index, key=lambda text: -len(query & self._index[text]))
        found = [text for text in ranked if query & self._index[text]][: call.arguments.get("most", 2)]
        return Message("tool", "\n".join(found) or "Nothing is found.", call.id)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
