"""Plays ALFWorld's games as TextWorld comes, for comparison: in a process of its own, as its library breaks others.

Reads a JSON list of [game file, commands] from standard input and writes one JSON object a game: what was said, the commands
that were possible and whether it was won, for the start and after each command; seconds of processor time for ``start`` and
``reset`` together, and for all steps.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import textworld

from steppo.envs.alfworld.game import names_of

try:
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler as Named
except ImportError:  # names by our own rule

    class Named(textworld.core.Wrapper):  # type: ignore[no-redef]
        """Gives things the names that ALFWorld has for them."""

        def load(self, *args: Any, **kwargs: Any) -> None:
            super().load(*args, **kwargs)
            names = names_of([info.id for info in self._entity_infos.values()])
            for info in self._entity_infos.values():
                info.name = names[info.id]


def play(path: str, commands: list[str]) -> dict[str, Any]:
    began = time.process_time()
    wanted = textworld.EnvInfos(feedback=True, admissible_commands=True, won=True)
    env = textworld.start(path, wanted, [Named()])
    state = env.reset()
    started = time.process_time()
    turns = [[state.feedback, list(state.admissible_commands), bool(state.won), 0]]
    for command in commands:
        state, score, _ = env.step(command)
        turns.append([state.feedback, list(state.admissible_commands), bool(state.won), score])
    ended = time.process_time()
    env.close()
    return {"turns": turns, "reset_s": started - began, "steps_s": ended - started, "names": Named.__module__}


if __name__ == "__main__":
    for game, commands in json.load(sys.stdin):
        print(json.dumps(play(game, commands)), flush=True)
    os._exit(0)  # its library crashes at an orderly end
