"""The tools that an environment offers: what no policy could call is one line, before a model is built."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steppo.envs.given import checked_tools
from steppo.errors import ConfigError, RunError
from steppo.types import Action, ToolSpec, Turn
from tests.cli.test_errors import fit, refused
from tests.search_env import SearchEnv
from tests.toy_env import CorridorEnv

FIND = ToolSpec("find", "Looks for something.", {"type": "object", "properties": {"what": {"type": "string"}}})


def with_parameters(**schema: Any) -> list[ToolSpec]:
    return [FIND, ToolSpec("take", parameters=schema)]


# What an environment may offer by mistake, and what is said of it.
WRONG: dict[str, tuple[Any, str]] = {
    "none": (None, "tools must be a list or tuple of ToolSpec, not None"),
    "one": (FIND, "tools must be a list or tuple of ToolSpec, not a ToolSpec"),
    "set": ({"find"}, "tools must be a list or tuple of ToolSpec, not a set"),
    "dict": ({"find": FIND}, "tools must be a list or tuple of ToolSpec, not a dict"),
    "generator": ((tool for tool in [FIND]), "tools must be a list or tuple of ToolSpec, not a generator"),
    "schema": ([FIND, FIND.schema], "tools[1] must be a ToolSpec, not a dict"),
    "text": (["find"], "tools[0] must be a ToolSpec, not 'find'"),
    "function": ([len], "tools[0] must be a ToolSpec, not a builtin_function_or_method"),
    "name none": ([ToolSpec(None)], "tools[0] is wrong: its name must be a string, not None"),  # type: ignore[arg-type]
    "name empty": ([FIND, ToolSpec("")], "tools[1] is wrong: its name '' is empty or another tool's"),
    "name twice": ([FIND, ToolSpec("a"), FIND], "tools[2] is wrong: its name 'find' is empty or another tool's"),
    "name half": ([ToolSpec("\ud800")], "tools[0] is wrong: its name must be text that UTF-8 can hold"),
    "description none": (
        [ToolSpec("a", None)],  # type: ignore[arg-type]
        "tools[0] is wrong: its description must be a string, not None",
    ),
    "description half": ([ToolSpec("a", "\udfff")], "tools[0] is wrong: its description must be text that UTF-8 can hold"),
    "parameters none": (
        [ToolSpec("a", "", None)],  # type: ignore[arg-type]
        'tools[0] is wrong: its parameters must be a JSON schema with "type": "object"',
    ),
    "parameters list": (
        [ToolSpec("a", "", ["what"])],  # type: ignore[arg-type]
        'tools[0] is wrong: its parameters must be a JSON schema with "type": "object"',
    ),
    "parameters bare": (with_parameters(what={"type": "string"}), 'must be a JSON schema with "type": "object"'),
    "parameters string": (with_parameters(type="string"), 'must be a JSON schema with "type": "object"'),
    "set inside": (with_parameters(type="object", required={"what"}), "tools[1] is wrong: TypeError: Object of type set is"),
    "type inside": (
        with_parameters(type="object", properties={"n": int}),
        "tools[1] is wrong: TypeError: Object of type type",
    ),
    "array inside": (
        with_parameters(type="object", enum=np.arange(3)),
        "tools[1] is wrong: TypeError: Object of type ndarray",
    ),
    "nan inside": (
        with_parameters(type="object", default=float("nan")),
        "tools[1] is wrong: ValueError: Out of range float",
    ),
    "half inside": (with_parameters(type="object", title="\ud800"), "tools[1] is wrong: its schema must be text that UTF-8"),
}


class ToolsEnv(CorridorEnv):
    """Offers what its argument names.

    Args:
        kind: Of ``WRONG``; any other raises.
    """

    def __init__(self, kind: str = "none") -> None:
        super().__init__()
        self.kind = kind

    @property
    def tools(self) -> Any:
        return WRONG[self.kind][0]


@pytest.mark.parametrize("kind", WRONG)
def test_what_nobody_can_call_is_named(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"^ToolsEnv: .*{re.escape(WRONG[kind][1])}"):
        checked_tools(ToolsEnv(kind))


def test_what_raises_is_named() -> None:
    with pytest.raises(RunError, match=r"^ToolsEnv.tools: KeyError: 'nothing' \(.*test_tools.py:\d+\)"):
        checked_tools(ToolsEnv("nothing"))


@pytest.mark.parametrize("kind", ["one", "parameters bare"])
def test_as_a_user_meets_it(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--data.source.env={__name__}.ToolsEnv", f"--data.source.env.kind={kind}"]
    error = refused(fit(tmp_path, *options), capsys)
    assert error.startswith("error: ToolsEnv: ")
    assert WRONG[kind][1] in error


@pytest.mark.parametrize("tools", [(), [], [FIND], (FIND, ToolSpec("find_all"))], ids=len)
def test_what_is_right_comes_through(tools: Sequence[ToolSpec]) -> None:
    env = SearchEnv()
    env.tools = tools
    assert checked_tools(env) == tuple(tools)


class BothEnv(CorridorEnv):
    """Takes commands, and calls of its tools in a step of its own."""

    tools = (FIND,)

    def step(self, action: Action) -> Turn:
        return Turn(str(len(action.tool_calls))) if action.tool_calls else super().step(action)


def test_where_tools_would_come_as_commands_they_are_refused() -> None:
    env = CorridorEnv()
    env.tools = (FIND,)
    with pytest.raises(ConfigError, match=r"^CorridorEnv: a TextGameEnv takes commands.*: subclass Env"):
        checked_tools(env)
    env.tools = ()
    assert checked_tools(env) == ()
    assert checked_tools(BothEnv()) == (FIND,)
