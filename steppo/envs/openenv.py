"""Environments behind a server of OpenEnv (https://github.com/meta-pytorch/OpenEnv)."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import shlex
import socket
import subprocess
import tempfile
import time
import urllib.request
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from steppo.envs.base import Env
from steppo.envs.checks import shown
from steppo.envs.foreign import recorded, require_sizes, require_verdict, seeds, solved
from steppo.errors import ConfigError, WrongValue, in_short, said
from steppo.types import Action, Message, Task, ToolCall, ToolSpec, Turn

# openenv is imported where it is used: it is an extra, and workers of other environments do without.

_MCP_ACTIONS = ("Action", "CallToolAction", "ListToolsAction")  # where actions are calls of the server's tools
_ACT = "act"
_LOCAL = ("localhost", "127.0.0.1", "::1")
_LONGEST_LOG = 2**20
_PAUSE = 0.5


class OpenEnvEnv(Env):
    """An environment behind a server of OpenEnv. A task is a seed of its reset, if that takes one.

    Needs ``pip install "steppo[openenv]"``. How the agent acts follows from the server's schema of actions. Tools of MCP are
    native tools. An action with one required field that is a text, a number or one of several values is the agent's answer.
    Any other is a native tool, ``act``, with the action's fields as its parameters.

    Args:
        server: The URL of a server that runs, or a command that starts one, with ``{port}`` in it, such as
            ``uvicorn my_env.server.app:app --port {port}``: each worker process starts its own, on loopback. Each slot is a
            session, and many servers take one only.
        goal: What the agent is told to do.
        reset: What the server's ``reset`` is given beside the seed.
        commands: Of an action that is an answer, what may be said, to be shown. Values that it names need none.
        show: Fields of an observation that the agent reads; all unless given.
        success_reward: Return at which an episode is solved; one of at most 0 is compared when the environment ends it.
            There is no verdict unless given.
        timeout: Seconds that the server may take for an answer.
        start_timeout: Seconds that a command may take until its server answers.
        num_train: Number of training tasks.
        num_valid: Number of validation tasks.
        num_test: Number of test tasks.
    """

    name = "the server"  # until it has told
    _started: _Server  # from ``start``

    def __init__(
        self,
        server: str,
        goal: str = "",
        reset: dict[str, Any] | None = None,
        commands: list[str] | None = None,
        show: list[str] | None = None,
        success_reward: float | None = None,
        timeout: float = 30.0,
        start_timeout: float = 120.0,
        num_train: int = 100,
        num_valid: int = 100,
        num_test: int = 100,
    ) -> None:
        self.num_tasks = {"train": num_train, "valid": num_valid, "test": num_test}
        require_sizes("OpenEnvEnv", self.num_tasks)
        require_verdict("OpenEnvEnv", success_reward)
        for setting, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not 0 < seconds < math.inf:
                raise ConfigError(f"OpenEnvEnv: {setting} must be above 0 seconds and finite, not {seconds}")
        if "seed" in (reset or {}):
            raise ConfigError("OpenEnvEnv: reset cannot hold seed: a task is a seed")
        self.server = server
        self.goal = goal
        self.reset_with = dict(reset or {})
        self.commands = commands
        self.show = show
        self.success_reward = success_reward
        self.timeout = timeout
        self.start_timeout = start_timeout
        self._client: Any = None
        self._return = 0.0
        self._turn = Turn()
        self._check()

    def _check(self) -> None:
        """Asks the server once how it is played, so that what cannot be is said before a model is built."""
        if importlib.util.find_spec("openenv") is None:
            raise ConfigError('OpenEnvEnv needs OpenEnv: pip install "steppo[openenv]"')
        server, url = _Server(self.server, self.start_timeout), self.server
        try:
            url = server.url()
            schema = _got(f"{url}/schema", self.timeout)
            about = _got(f"{url}/metadata", self.timeout)
            self.name, self.version = str(about["name"]), str(about.get("version") or "")
            self._read(schema["action"], schema["observation"].get("properties", {}), url)
        except (ConfigError, WrongValue) as error:
            raise ConfigError(f"OpenEnvEnv: {error}") from None
        except Exception as error:
            raise ConfigError(f"OpenEnvEnv: no server of OpenEnv answers at {url}: {said(error)}") from None
        finally:
            self.close()
            server.close()

    def _read(self, action: dict[str, Any], observed: Mapping[str, Any], url: str) -> None:
        """How the agent acts, and what it sees."""
        self._field, self._values = "", dict[str, Any]()
        self._is_mcp = action.get("title") in _MCP_ACTIONS
        if (unknown := sorted(set(self.show or ()) - set(observed))) and not self._is_mcp:
            raise ConfigError(f"observations have no {', '.join(unknown)} to show, only {', '.join(observed)}")
        if self._is_mcp:
            tools = self._asked(url, "step", {"type": "list_tools"}).observation.get("tools")
            self.tools = [ToolSpec(tool["name"], tool.get("description") or "", tool["input_schema"]) for tool in tools]
            if not self.tools:
                raise ConfigError(f"the server at {url} has no tool to call")
            return
        fields = {name: field for name, field in action.get("properties", {}).items() if name != "metadata"}
        required = [name for name in action.get("required", []) if name in fields]
        if len(required) == 1 and (field := _resolved(fields[required[0]], action)).get("type") in _PLAIN:
            self._field, self._values = required[0], field
            self.commands = self.commands or [str(value) for value in field.get("enum", ())] or None
            for command in self.commands or ():
                if "..." not in command and (wrong := self._value(command)[1]):
                    raise ConfigError(wrong)
            return
        parameters: dict[str, Any] = {"type": "object", "properties": fields, "additionalProperties": False}
        parameters |= {name: action[name] for name in ("required", "$defs") if name in action}
        self.tools = [ToolSpec(_ACT, in_short(action.get("description", "")), parameters)]

    def tasks(self, split: str) -> list[Task]:
        return seeds("OpenEnvEnv", self.name, split, self.num_tasks)

    def content(self, task: Task) -> str:
        return Task(task.id, {**task.data, "reset": self.reset_with, "success_reward": self.success_reward}).as_text()

    def start(self) -> None:
        self._started = _Server(self.server, self.start_timeout)
        self._started.url()

    def reset(self, task: Task) -> Turn:
        self._return = 0.0
        given = {"seed": task.data["seed"], **self.reset_with}
        try:
            result = self._asked(self._started.url(), "reset", **given)
        except _Gone:
            time.sleep(_PAUSE)  # it may be ending, or starting
            result = self._asked(self._started.url(), "reset", **given)
        return self._said(result)

    def step(self, action: Action) -> Turn:
        if self.tools:
            return self._called(action)
        value, wrong = self._value(str(action))
        if wrong:
            return self._turn.refused(wrong)
        try:
            return self._said(self._asked("", "step", {self._field: value}))
        except _Refused as refused:
            return self._turn.refused(str(refused))

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _called(self, action: Action) -> Turn:
        """Carries out calls one after the other, until one of them ends the episode."""
        if not action.tool_calls:
            return self._turn.refused(f"Call one of the tools: {', '.join(tool.name for tool in self.tools)}.")
        turn, reward, answers = self._turn, 0.0, list[Message]()
        for call in action.tool_calls:
            try:
                turn = self._said(self._asked("", "step", self._payload(call)))
            except _Refused as refused:
                turn = Turn(str(refused), self.goal, action_valid=False)
            reward += turn.reward
            answers.append(Message("tool", turn.text, call.id))
            if turn.terminated:
                break
        self._turn = replace(turn, text="", messages=tuple(answers), reward=reward)
        return self._turn

    def _value(self, text: str) -> tuple[Any, str]:
        """What was said as the action's field takes it, and why it cannot be, if so."""
        try:
            value = text if self._values["type"] == "string" else json.loads(text.lower())
        except (ValueError, RecursionError):
            return None, f"{shown(text)} is no {self._field}."
        wrong = _wrong(value, self._values)
        return value, wrong and f"{shown(text)} is no {self._field}: {in_short(wrong)}."

    def _payload(self, call: ToolCall) -> dict[str, Any]:
        if self._is_mcp:
            return {"type": "call_tool", "tool_name": call.name, "arguments": dict(call.arguments)}
        return dict(call.arguments)

    def _said(self, result: Any) -> Turn:
        """The server's answer as a turn."""
        seen, reward, done = result.observation, result.reward, result.done
        if not isinstance(seen, dict):
            raise WrongValue(f"the observation of {self.name} must be a mapping, not {shown(seen)}")
        if not isinstance(reward, int | float | None):
            raise WrongValue(f"the reward of {self.name} must be a number or null, not {shown(reward)}")
        if not isinstance(done, bool):
            raise WrongValue(f"done of {self.name} must be true or false, not {shown(done)}")
        self._return += reward or 0.0
        figures = ((name, value) for name, value in seen.items() if isinstance(value, int | float))
        self._turn = Turn(
            _tool_result(seen) if self._is_mcp and "tool_name" in seen else _readable(seen, self.show),
            self.goal,
            None if self.commands is None else tuple(self.commands),
            reward=float(reward or 0.0),
            terminated=done,
            success=solved(self._return, self.success_reward, done),
            info=recorded(figures),
        )
        return self._turn

    def _asked(self, url: str, what: str, *given: Any, **named: Any) -> Any:
        """The server's answer over this slot's connection, which is opened to ``url`` if there is none.

        Raises:
            WrongValue: There is no answer in time, none at all, or none that can be read. The connection is closed.
        """
        from openenv.core import GenericEnvClient

        try:
            if self._client is None:
                client = GenericEnvClient(url, connect_timeout_s=self.timeout, message_timeout_s=self.timeout)
                self._client = client.sync()
            return getattr(self._client, what)(*given, **named)
        except Exception as error:
            if what == "step" and "(code: VALIDATION_ERROR)" in str(error):
                raise _Refused("The environment does not take such an action.") from None
            self.close()
            if isinstance(error, TimeoutError):
                raise WrongValue(f"{self.name} gave no answer to {what} within {self.timeout:g} s") from None
            if isinstance(error, OSError) or "ConnectionClosed" in type(error).__name__:
                hint = "; with more slots than sessions that it takes, lower data.source.num_slots"
                raise _Gone(f"the server of {self.name} has no connection for {what}: {said(error)}{hint}") from None
            raise WrongValue(f"{self.name} cannot answer {what}: {in_short(said(error))}") from None


class _Gone(WrongValue):
    """There is no connection any more."""


class _Refused(WrongValue):
    """The server does not take the action."""


class _Server:
    """A server by its URL, or by the command that starts it in this process's care, again if it has ended."""

    def __init__(self, server: str, timeout: float) -> None:
        self._given = server
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._url = server.rstrip("/")

    def url(self) -> str:
        """Where it answers. Raises ``WrongValue`` if it cannot be started."""
        if urlsplit(self._given).scheme in ("http", "https"):
            return self._url
        if self._process is None or self._process.poll() is not None:
            self._start()
        elif os.fstat(self._log.fileno()).st_size > _LONGEST_LOG:
            self._log.truncate(0)
        return self._url

    def _start(self) -> None:
        port = _free_port()
        if "{port}" not in self._given:
            raise WrongValue(f"server must be a URL, or a command with {{port}} in it, not {shown(self._given)}")
        command = shlex.split(self._given.replace("{port}", str(port)))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        fcntl.fcntl(self._log, fcntl.F_SETFL, fcntl.fcntl(self._log, fcntl.F_GETFL) | os.O_APPEND)  # it may be cut
        self._url = f"http://127.0.0.1:{port}"
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log, start_new_session=True
            )
        except OSError as error:
            raise WrongValue(f"the server cannot be started with {shown(self._given)}: {said(error)}") from None
        weakref.finalize(self, _end, self._process)
        deadline = time.monotonic() + self._timeout
        while not self._answers():
            if (status := self._process.poll()) is not None:
                raise WrongValue(f"the server's command ended with status {status}: {self._last_words()}")
            if time.monotonic() > deadline:
                self.close()
                raise WrongValue(f"the server that was started does not answer within {self._timeout:g} s")
            time.sleep(0.05)

    def close(self) -> None:
        """Ends it, if it was started here."""
        if self._process is not None:
            _end(self._process)

    def _answers(self) -> bool:
        try:
            return _got(f"{self._url}/health", 1.0).get("status") is not None
        except OSError:
            return False

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-4096:].decode(errors="replace").split("\n")
        return in_short(next((line for line in reversed(lines) if line.strip()), "it said nothing"))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _got(url: str, timeout: float) -> dict[str, Any]:
    proxies: dict[str, str] | None = {} if urlsplit(url).hostname in _LOCAL else None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
    with opener.open(url, timeout=timeout) as answer:
        found = json.load(answer)
    if not isinstance(found, dict):
        raise WrongValue(f"what {url} answers must be an object, not {shown(found)}")
    return found


# ---- words ----

_PLAIN = ("string", "integer", "number", "boolean")


def _resolved(field: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A field's own schema, where it refers to a definition."""
    about = {name: entry for name, entry in field.items() if name != "$ref"}
    return about | schema.get("$defs", {}).get(field.get("$ref", "").removeprefix("#/$defs/"), {})


def _wrong(value: Any, schema: Mapping[str, Any]) -> str:
    """Why a value is not what the schema says; empty if it is."""
    from jsonschema import Draft202012Validator  # not for every worker of any environment
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema).iter_errors(value))
    return "" if error is None else error.message


def _readable(seen: Mapping[str, Any], show: list[str] | None) -> str:
    """Fields of an observation, with their names if there are several."""
    names = [name for name in seen if name != "metadata"] if show is None else show
    texts = {name: _text(seen[name]) for name in names if seen.get(name) is not None}
    return "".join(texts.values()) if len(names) == 1 else "\n".join(f"{name}: {text}" for name, text in texts.items())


def _tool_result(seen: Mapping[str, Any]) -> str:
    """What a tool of MCP gave."""
    if error := seen.get("error"):
        return f"Error: {error.get('message', error) if isinstance(error, dict) else error}"
    result = seen.get("result")
    return _text(result["data"] if isinstance(result, dict) and result.get("data") is not None else result)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
