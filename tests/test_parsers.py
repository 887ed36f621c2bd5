"""CommandParser: one line, one command, and never an exception."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppo.parsers import CommandParser
from steppo.types import Observation

OPEN = Observation("A room.")
LISTED = Observation("A room.", "", ("go west", "take Coin", "look"))


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("go west", "go west"),
        ("  go   west \n", "go west"),
        ("\n\ngo\twest\n\n", "go west"),
        ("GO West", "go west"),
        ("take coin", "take Coin"),
        ("take Coin", "take Coin"),
    ],
)
def test_listed_commands(text: str, command: str) -> None:
    parsed = CommandParser().parse(text, LISTED)
    assert parsed.command == command
    assert parsed.feedback == ""


@pytest.mark.parametrize("text", ["", "  \n ", "go west\nlook", "go west\n\nbecause the coin is there"])
@pytest.mark.parametrize("observation", [OPEN, LISTED])
def test_anything_but_one_line_is_refused(text: str, observation: Observation) -> None:
    parsed = CommandParser().parse(text, observation)
    assert parsed.command is None
    assert "one line" in parsed.feedback


@pytest.mark.parametrize("text", ["dance", "go", "go west.", "go west look", "I go west"])
def test_commands_that_are_not_listed_are_refused_by_name(text: str) -> None:
    parsed = CommandParser().parse(text, LISTED)
    assert parsed.command is None
    assert f"'{text}'" in parsed.feedback


def test_feedback_stays_short() -> None:
    assert len(CommandParser().parse("x" * 10_000, LISTED).feedback) < 100


def test_without_a_list_everything_goes() -> None:
    assert CommandParser().parse(" Open  the door ", OPEN).command == "Open the door"


def test_with_an_empty_list_nothing_goes() -> None:
    assert CommandParser().parse("look", Observation("A room.", "", ())).command is None


COMMANDS = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1), max_size=4)


@settings(deadline=None, derandomize=True)
@given(text=st.text(), commands=st.none() | COMMANDS, data=st.data())
def test_any_text_has_an_answer(text: str, commands: list[str] | None, data: st.DataObject) -> None:
    if commands:
        text = data.draw(st.sampled_from([text, *commands, f" {commands[0]}\n", commands[-1].upper()]))
    observation = Observation("A room.", "", None if commands is None else tuple(commands))
    parsed = CommandParser().parse(text, observation)
    assert (parsed.command is None) == bool(parsed.feedback)
    assert parsed.command is None or commands is None or parsed.command in commands
    assert parsed.command != ""
    if commands is not None and text in commands:
        assert parsed.command == text
