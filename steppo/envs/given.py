"""What an environment gives once: limit, version, tools and tasks, and itself to workers. Mistakes are a ``ConfigError``."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from steppo.envs.base import Env, TextGameEnv
from steppo.envs.checks import plain_text, shown
from steppo.errors import ConfigError, WrongValue, blamed_on, said
from steppo.types import Task, ToolSpec


def step_limit(env: Env) -> int | None:
    """The task's own limit of steps."""
    name = type(env).__name__
    with blamed_on(f"{name}.max_steps"):
        limit: Any = env.max_steps
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, Integral) or int(limit) < 1:
        raise ConfigError(f"{name}: max_steps must be None or a whole number of at least 1, not {shown(limit)}")
    return int(limit)


def version_of(env: Env) -> str:
    """Of its grammar or data."""
    name = type(env).__name__
    with blamed_on(f"{name}.version"):
        return _plain_or_refused(f"{name}: version", env.version)


def splits_of(env: Env) -> tuple[str, ...]:
    """The names of its splits."""
    name = type(env).__name__
    with blamed_on(f"{name}.splits"):
        splits: Any = env.splits
    if not isinstance(splits, list | tuple) or not splits:
        raise ConfigError(f"{name}: splits must be a list or tuple of names, not {shown(splits)}")
    return tuple(_plain_or_refused(f"{name}: splits[{number}]", split) for number, split in enumerate(splits))


def content_of(env: Env, task: Task) -> str:
    """What the task is, as text that can be hashed."""
    where = f"{type(env).__name__}.content({task.id!r})"
    with blamed_on(where):
        return _plain_or_refused(f"what {where} returns", env.content(task))


def _plain_or_refused(what: str, value: Any) -> str:
    try:
        return plain_text(what, value)
    except WrongValue as error:
        raise ConfigError(str(error)) from None


def checked_tools(env: Env) -> tuple[ToolSpec, ...]:
    """The environment's tools: named, told apart, and plain enough for a template."""
    name = type(env).__name__
    with blamed_on(f"{name}.tools"):
        tools: Any = env.tools
    if not isinstance(tools, list | tuple):
        raise ConfigError(f"{name}: tools must be a list or tuple of ToolSpec, not {shown(tools)}")
    for number, tool in enumerate(tools):
        if not isinstance(tool, ToolSpec):
            raise ConfigError(f"{name}: tools[{number}] must be a ToolSpec, not {shown(tool)}")
        try:
            if not plain_text("its name", tool.name) or any(other.name == tool.name for other in tools[:number]):
                raise WrongValue(f"its name {shown(tool.name)} is empty or another tool's")
            plain_text("its description", tool.description)
            if not isinstance(tool.parameters, Mapping) or tool.parameters.get("type") != "object":
                raise WrongValue('its parameters must be a JSON schema with "type": "object"')
            plain_text("its schema", json.dumps(tool.schema, allow_nan=False, ensure_ascii=False))
        except Exception as error:
            raise ConfigError(f"{name}: tools[{number}] is wrong: {said(error)}") from None
    if tools and type(env).step is TextGameEnv.step:
        raise ConfigError(f"{name}: a TextGameEnv takes commands, and calls of tools are none: subclass Env, or define step")
    return tuple(tools)


def checked_tasks(where: str, tasks: Any) -> list[Task]:
    """What ``tasks`` returned: tasks that can be named, told apart and sent to workers."""
    if isinstance(tasks, str | bytes) or not isinstance(tasks, Sequence):
        raise ConfigError(f"{where} must return a list of tasks, not {shown(tasks)}")
    checked: list[Task] = []
    places: dict[str, int] = {}
    for number, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise ConfigError(f"{where}: entry {number} must be a Task, not {shown(task)}")
        try:
            name = plain_text("its id", task.id)
            if not name:
                raise WrongValue("its id is empty")
            if name in places:
                raise WrongValue(f"its id {name!a} is that of task {places[name]}")
            if not isinstance(task.data, Mapping):
                raise WrongValue(f"its data must be a mapping, not {shown(task.data)}")
        except WrongValue as error:
            raise ConfigError(f"{where}: task {number} is wrong: {error}") from None
        places[name] = number
        checked.append(task if type(task.id) is str else replace(task, id=name))
    try:
        pickle.dumps(checked)  # all at once: a split may hold very many
    except Exception as error:
        number = next((number for number, task in enumerate(checked) if _fails(pickle.dumps, task)), 0)
        entries = {f"data[{shown(key)}]": entry for key, entry in checked[number].data.items()}
        culprit = _culprit(entries, pickle.dumps) or said(error)
        raise ConfigError(f"{where}: task {number} cannot be sent to worker processes: {culprit}") from None
    return checked


def pickled(env: Env) -> bytes:
    """The environment as it is sent to worker processes."""
    try:
        return pickle.dumps(env)
    except Exception as error:
        kind = type(env)
        culprit = _culprit(_state(env), pickle.dumps) or said(error)
        if "<locals>" in kind.__qualname__:
            culprit = "its class is defined in a function, and workers must be able to import it"
        raise ConfigError(f"{kind.__name__} cannot be sent to worker processes: {culprit}") from None


def started(env: Env) -> dict[str, Any]:
    """Starts it; gives the attributes that this assigned."""
    before = dict(_attributes(env))
    type(env).start(env)  # an older class may have a setting of that name
    return {name: value for name, value in _attributes(env).items() if name not in before or before[name] is not value}


def copied(env: Env, shared: Mapping[str, Any]) -> Env:
    """A slot's own copy, with the same ``shared`` attributes. Raises ``WrongValue``."""
    try:
        own = copy.deepcopy(env, {id(value): value for value in shared.values()})
        _attributes(own).update(shared)  # also where the class leaves them out of what is pickled
        return own
    except Exception as error:
        culprit = _culprit(_state(env), copy.deepcopy) or said(error)
        raise WrongValue(f"the environment cannot be copied in its worker process: {culprit}") from None


def _attributes(env: Env) -> dict[str, Any]:
    return getattr(env, "__dict__", {})


def _state(env: Env) -> dict[str, Any]:
    """What is pickled and copied of an object, by attribute, if that can be told."""
    try:
        state: Any = env.__getstate__()
    except Exception:
        return {}
    parts = state if isinstance(state, tuple) else (state,)
    return {f"attribute {name}": value for part in parts if isinstance(part, dict) for name, value in part.items()}


def _culprit(entries: Mapping[str, Any], attempt: Callable[[Any], Any]) -> str:
    """The first entry that fails, and how; empty if none does."""
    for name, value in entries.items():
        if (error := _fails(attempt, value)) is not None:
            return f"its {name} is {shown(value)} ({said(error)})"
    return ""


def _fails(attempt: Callable[[Any], Any], value: Any) -> Exception | None:
    try:
        attempt(value)
    except Exception as error:
        return error
    return None
