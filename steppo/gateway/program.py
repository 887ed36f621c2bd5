"""An agent in a worker process: a Python callable or a command, one task at a time. Free of torch."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from steppo.envs.base import Env
from steppo.envs.checks import shown
from steppo.errors import ConfigError, WrongValue, in_short
from steppo.paths import user_path
from steppo.types import Action, Task, Turn


class AgentProgram(Env):
    """Runs an agent as if it were an environment of one step, so that worker processes, time-outs and their end are shared.

    The step's action holds the agent's surroundings; the turn's text is what it was worth, both in JSON.

    Args:
        agent: Dotted path of a callable: ``agent(task)``; a coroutine is run.
        command: A command line, which gets the task as JSON in ``STEPPO_TASK`` and on its input; instead of ``agent``.
        judge: Dotted path of a callable, ``judge(task, output)``: what an agent is worth that is not to say so itself.
    """

    max_steps = 1

    def __init__(self, agent: str | None, command: str | None, judge: str | None) -> None:
        self.agent = agent
        self.command = shlex.split(command or "")
        self.judge = judge
        self._task = Task("")

    def tasks(self, split: str) -> list[Task]:
        return []

    def start(self) -> None:
        self.runs = _found(self.agent) if self.agent else self._run_command
        self.judges = _found(self.judge) if self.judge else None

    def reset(self, task: Task) -> Turn:
        self._task = task
        return Turn()

    def step(self, action: Action) -> Turn:
        os.environ.update(json.loads(action.text))
        output = self.runs(self._task)
        if inspect.iscoroutine(output):
            output = asyncio.run(output)
        if self.judges is not None:
            output = self.judges(self._task, output)
        return Turn(json.dumps(outcome(output)), terminated=True)

    def _run_command(self, task: Task) -> Any:
        """Its last line, in JSON if it is; raises what it said last if it fails."""
        given = json.dumps({"id": task.id, **task.data})
        around = {**os.environ, "STEPPO_TASK": given}
        ended = subprocess.run(self.command, input=given, env=around, capture_output=True, text=True, errors="replace")
        if ended.returncode:
            last = in_short(["", *(ended.stderr.strip() or ended.stdout.strip()).splitlines()][-1])
            raise WrongValue(f"{self.command[0]} ended with status {ended.returncode}: {last}")
        lines = ended.stdout.strip().splitlines()
        try:
            return json.loads(lines[-1]) if lines else None
        except ValueError:
            return lines[-1] if self.judge else None


def outcome(output: Any) -> dict[str, Any]:
    """``reward`` and ``success`` of what was given: nothing, a number, whether it succeeded, or both by name."""
    named = output if isinstance(output, Mapping) else {}
    reward, success = named.get("reward"), named.get("success")
    if isinstance(output, bool):
        reward, success = float(output), output
    elif not named and output is not None:
        reward = output
    try:
        reward = None if reward is None else float(reward)
    except (TypeError, ValueError):
        wanted = "its reward, True, False, both by name, or None"
        raise WrongValue(f"an agent must return {wanted}, not {shown(output)}") from None
    if success is not None and not isinstance(success, bool):
        raise WrongValue(f"an agent's success must be True, False or None, not {shown(success)}")
    return {"reward": reward, "success": success}


def read_tasks(path: str) -> list[Task]:
    """Tasks of a file: a JSON object on each line, its ``id`` and what else it holds.

    Raises:
        ConfigError: It cannot be read, or a line is none.
    """
    try:
        lines = user_path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"the tasks {path} cannot be read: {error}") from None
    tasks = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry = None
        with suppress(ValueError):
            entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise ConfigError(f'{path}, line {number}: a task is a JSON object with an "id" that is a text')
        tasks.append(Task(entry.pop("id"), entry))
    return tasks


def _found(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise WrongValue(f"{path} cannot be called: it is {shown(found)}")
    return found
