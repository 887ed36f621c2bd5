"""Plays ALFWorld's games as TextWorld comes, for comparison: in a process of its own, as its library breaks others.

Reads lines of JSON from standard input, each a game file and commands, and answers each with one: what was said, the
commands that were possible, whether it was won and the score, for the start and after each command; seconds of processor
time to load the game, to reset it, and for all steps.
"""

from __future__ import annotations

import itertools
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


PARTS = ("load", "reset", "steps")


def play(path: str, commands: list[str]) -> dict[str, Any]:
    times = [time.process_time()]
    env = textworld.start(path, textworld.EnvInfos(feedback=True, admissible_commands=True, won=True), [Named()])
    times.append(time.process_time())
    state = env.reset()
    times.append(time.process_time())
    turns = [[state.feedback, list(state.admissible_commands), bool(state.won), 0]]
    for command in commands:
        state, score, _ = env.step(command)
        turns.append([state.feedback, list(state.admissible_commands), bool(state.won), score])
    times.append(time.process_time())
    env.close()
    seconds = {name: after - before for name, (before, after) in zip(PARTS, itertools.pairwise(times), strict=True)}
    return {"turns": turns, "seconds": seconds, "names": Named.__module__}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(play(*json.loads(line))), flush=True)
    os._exit(0)  # its library crashes at an orderly end
