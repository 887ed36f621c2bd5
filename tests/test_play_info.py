"""The play command shows what an environment says beside the reward, calls of tools, and turns of several messages."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steppo.play.command import main
from steppo.play.show import Show
from steppo.types import Episode, Message, Step, StopReason, Turn
from tests.cli_helpers import TOY

IDS = np.zeros(1, np.int32)
STEP = Step(IDS, IDS, np.zeros(1, np.float32), 0.5, 0, "stop", False, False, True, "seen", "go", 1.0, 0)


def play(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    main([f"--config={TOY}", "--player=expert", *args])
    return capsys.readouterr().out


def test_tools_messages_and_info_as_a_user_sees_them(capsys: pytest.CaptureFixture[str]) -> None:
    text = play(
        capsys,
        "--data.source.env=tests.worker_envs.Desk",
        "--data.source.parser=HermesParser",
        "--data.source.context=AppendContext",
        "--data.source.max_new_tokens=400",
    )
    lines = text.splitlines()
    assert lines[1:3] == ["What do \u00e0 and b mean?", "said: kind=two words  left=2"]
    assert lines[3].startswith('1> look_up({"word": "\u00e0"}); look_up({"word": "b"})  said: ')
    assert lines[4:10] == [
        "tool: [{'word': '\u00e0'}]",
        "\N{REPLACEMENT CHARACTER}[31mred",
        "tool: [{'word': 'b'}]",
        "\N{REPLACEMENT CHARACTER}[31mred",
        "user: Hurry up.",
        "said: left=1  found=true  share=0.333333",
    ]
    assert lines[10:12] == ["2> a", "b  reward 1"]  # said as it is: not told twice
    assert lines[12:14] == ["Right.", "said: left=0  said=a b"]
    assert lines[14] == "solved: return 1 in 2 steps (terminated)"
    assert lines[15] == "last said: kind=two words  left=0  found=true  share=0.333333  said=a b"


def shown(*what: tuple[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=60, highlight=False)
    show = Show(console, "nobody", lambda step: step.action, None)
    for method, arguments in what:
        getattr(show, method)(*arguments)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("info", "line"),
    [
        ({}, None),
        ({"f1": 0.0}, "f1=0"),
        ({"coins": 1234567.0, "large": 1e30}, "coins=1234567  large=1e+30"),
        ({"yes": True, "no": False}, "yes=true  no=false"),
        ({"label": ""}, "label="),
        ({"odd [red]name[/red]": "[bold]no markup[/bold]"}, "odd [red]name[/red]=[bold]no markup[/bold]"),
        ({"codes": "a\x1b[2Jb\x07"}, "codes=a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}"),
        ({"long": "x" * 256}, f"long={'x' * 256}"),
        ({"lines": "a\n\tb\u2028c"}, "lines=a b c"),
    ],
)
def test_what_is_said_is_one_line_that_steers_nothing(info: dict[str, Any], line: str | None) -> None:
    expected = [] if line is None else [f"said: {line}"]
    assert shown(("turn", (STEP, Turn("seen", info=info))))[1:] == ["seen", *expected]
    episode = Episode("e", 0, 0, "t", (replace(STEP, metadata=info),), StopReason.STEP_LIMIT)
    assert shown(("ending", (episode,)))[1:] == [f"last {line}" for line in expected]


@pytest.mark.parametrize("reason", StopReason)
def test_the_last_word_counts_however_an_episode_ends(reason: StopReason) -> None:
    steps = (replace(STEP, metadata={"f1": 0.5}), replace(STEP, index=1))
    episode = Episode("e", 0, 0, "t", steps, reason, error="\x1b[2J", metadata={"f1": 0.0, "type": "a"})
    ending = shown(("ending", (episode,)))
    assert ending[-1] == "last said: f1=0.5  type=a"
    assert "\x1b" not in ending[0]


def test_a_turn_without_words_and_one_with_messages_only() -> None:
    tool = Message("tool", json.dumps({"a": "[b]"}), "call_0")
    assert shown(("turn", (None, Turn()))) == [""]
    assert shown(("turn", (None, Turn(messages=(tool,))))) == ['tool: {"a": "[b]"}']
    assert shown(("turn", (None, Turn("hm", messages=(tool, tool))))) == ['tool: {"a": "[b]"}'] * 2 + ["hm"]


def test_the_number_of_an_open_command_asks_for_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\ntake a cup\n2\n1\n"))
    text = play(capsys, "--player=human", "--data.source.env=tests.worker_envs.Shelf")
    assert text.count("with words of your own") == 2
    assert "Type it, with words of your own: take ..." in text
    assert "Type it, with words of your own: [red]...[/red]" in text
    assert "You take a cup." in text
    assert "You go." in text
