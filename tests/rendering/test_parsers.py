"""Parsers: a command or feedback, and never an exception."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steppo.rendering import ActionParser, CommandParser, NumberParser, ParsedAction, TextParser, ToolCallParser
from steppo.types import Action, Turn

OPEN = Turn("A room.")
LISTED = Turn("A room.", "", ("go west", "take Coin", "look"))
CALL = '<tool_call>\n{"name": "act", "arguments": {"command": "go west"}}\n</tool_call>'


def command_of(parsed: ParsedAction) -> str | None:
    """A command and nothing else, or ``None``."""
    if parsed.action is None:
        return None
    assert parsed.action == Action(parsed.action.command)
    return parsed.action.command


# --- one line ---


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("go west", "go west"),
        ("  go   west \n", "go west"),
        ("\n\ngo\twest\n\n", "go west"),
        ("GO West", "go west"),
        ("take coin", "take Coin"),
        ("take Coin", "take Coin"),
        ("<think>\nWest\nor east?\n</think>\n\ngo west", "go west"),
        ("<think></think>look", "look"),
        ("The prompt has opened this.\n</think>\ngo west\n", "go west"),
    ],
)
def test_listed_commands(text: str, command: str) -> None:
    parsed = CommandParser().parse(text, LISTED)
    assert command_of(parsed) == command
    assert parsed.feedback == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n ",
        "go west\nlook",
        "go west\n\nbecause the coin is there",
        "<think>\n</think>",
        "<think>\ngo west",
        "<think>look",
    ],
)
@pytest.mark.parametrize("turn", [OPEN, LISTED])
def test_anything_but_one_line_is_refused(text: str, turn: Turn) -> None:
    parsed = CommandParser().parse(text, turn)
    assert parsed.action is None
    assert "one line" in parsed.feedback


@pytest.mark.parametrize("text", ["dance", "go", "go west.", "go west look", "I go west"])
def test_commands_that_are_not_listed_are_refused_by_name(text: str) -> None:
    parsed = CommandParser().parse(text, LISTED)
    assert parsed.action is None
    assert f"'{text}'" in parsed.feedback


def test_feedback_stays_short() -> None:
    assert len(CommandParser().parse("x" * 10_000, LISTED).feedback) < 100


def test_without_a_list_everything_goes() -> None:
    assert command_of(CommandParser().parse(" Open  the door ", OPEN)) == "Open the door"


def test_with_an_empty_list_nothing_goes() -> None:
    assert command_of(CommandParser().parse("look", Turn("A room.", "", ()))) is None


def test_commands_are_matched_however_they_are_spaced() -> None:
    assert command_of(CommandParser().parse("Take the  coin", Turn("A room.", "", ("take  the coin",)))) == "take  the coin"


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\x7f", "\ud800"])
def test_what_no_environment_can_read_is_refused(character: str) -> None:
    parsed = CommandParser().parse(f"go{character} west", OPEN)
    assert parsed.action is None
    assert parsed.feedback == "'go? west' is not possible here."


# --- open commands ---

FREE = Turn("A page.", "", ("search[...]", "think: ...", "click  [Next]", "Ask ...", "put ... in [...]", "wait..."))


def in_a_call(command: str) -> str:
    return ToolCallParser().answer(Action(command), LISTED)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("search[steps]", "search[steps]"),
        ("SEARCH[Steps of a Ladder]", "search[Steps of a Ladder]"),
        ("search[[a] ]]", "search[[a] ]]"),
        ("search[.]", "search[.]"),
        ("search[...]", "search[...]"),
        ("  search[ a   b ]\n", "search[ a b ]"),
        ("search[piè́ce ☂]", "search[piè́ce ☂]"),
        ("think: I am lost.", "think: I am lost."),
        ("Think:   \t so", "think: so"),
        ("think: search[it]", "think: search[it]"),
        ("click [next]", "click  [Next]"),
        ("ask who?", "Ask who?"),
        ("Put the coin in [the box]", "put the coin in [the box]"),
        ("put a in b in [c]", "put a in b in [c]"),
        ("wait...", "wait..."),
        ("WAIT...", "wait..."),
        ("wait for it", "wait for it"),
    ],
)
def test_an_open_command_takes_the_agent_s_words(text: str, command: str) -> None:
    """Spelled as it is listed, the words as they were said."""
    assert command_of(CommandParser().parse(text, FREE)) == command
    assert command_of(ToolCallParser().parse(in_a_call(text), FREE)) == command
    assert command_of(ToolCallParser(strict=True).parse(in_a_call(command), FREE)) == command


@pytest.mark.parametrize(
    "text",
    [
        *("search[]", "search[ ]", "search[", "search]", "search", "search[a", "search a]", "search[a] now", "my search[a]"),
        *("think:", "think: ", "think:so", "ask", "ask ", "put in [box]", "put  in [box]", "put a in []", "put a in [b"),
        *("", "wait", "...", "click [...]", "click [Last]", "search[a\x00b]", "think: \x1b[31mred", "ask \x7f"),
    ],
)
def test_what_is_no_open_command(text: str) -> None:
    for parser in (CommandParser(), ToolCallParser()):
        said = text if isinstance(parser, CommandParser) else in_a_call(text)
        parsed = parser.parse(said, FREE)
        assert parsed.action is None
        assert parsed.feedback


def test_a_command_that_is_listed_comes_before_one_that_is_open() -> None:
    turn = Turn("A page.", "", ("...", "go West", "go ..."))
    assert command_of(CommandParser().parse("go west", turn)) == "go West"
    assert command_of(CommandParser().parse("GO east", turn)) == "GO east"
    assert command_of(CommandParser().parse(" anything", turn)) == "anything"


@settings(deadline=None, derandomize=True)
@given(words=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_any_words_go_into_an_open_command(words: str) -> None:
    assume("think>" not in words)
    for command in (f"search[{words}]", f"think: {words}", f"put {words} in [{words}]"):
        for parser in (CommandParser(), ToolCallParser()):
            assert command_of(parser.parse(parser.answer(Action(command), FREE), FREE)) == command


# --- numbers ---

ASKS = "Answer with the number of one command on one line."


@pytest.mark.parametrize(
    ("text", "turn", "command"),
    [
        ("1", LISTED, "go west"),
        (" 2\n", LISTED, "take Coin"),
        ("003", LISTED, "look"),
        ("<think>\n3?\n</think>\n\n1", LISTED, "go west"),
        ("2: TAKE  coin", LISTED, "take Coin"),
        ("1: search[red shoes]", FREE, "search[red shoes]"),
        ("2 : Think: it is 3: west", FREE, "think: it is 3: west"),
        ("5: put a in [b]", FREE, "put a in [b]"),
        ("1 : search[...]", FREE, "search[...]"),
        ("Open  the door", OPEN, "Open the door"),  # nothing is listed
    ],
)
def test_a_number_is_a_listed_command(text: str, turn: Turn, command: str) -> None:
    assert NumberParser().parse(text, turn) == ParsedAction(Action(command))


@pytest.mark.parametrize(
    ("text", "turn", "feedback"),
    [
        *((text, LISTED, f"'{text}' is not possible here.") for text in ("0", "4", "999999999", "1: look", "1: go west 2")),
        *((text, FREE, f"'{text}' is not possible here.") for text in ("1", "1: search[]", "1: think: so", "2: search[a]")),
        *((text, LISTED, ASKS) for text in ("", "go west", "-1", "1.", "1 2", "1\n2", "²", "\u0661", "9" * 5000)),
        ("1", Turn(commands=()), "'1' is not possible here."),
    ],
)
def test_what_is_no_number_of_a_command(text: str, turn: Turn, feedback: str) -> None:
    assert NumberParser().parse(text, turn) == ParsedAction(None, feedback)


def test_numbers_are_read_as_they_are_listed() -> None:
    for turn in (LISTED, FREE):
        _, *lines = NumberParser().listed(turn.commands or ()).splitlines()
        for line, command in zip(lines, turn.commands or (), strict=True):
            assert line.partition(": ")[2] == command
            assert command_of(NumberParser().parse(line, turn)) == command


def test_an_action_is_answered_by_its_number() -> None:
    turn = Turn("A page.", "", ("search[...]", "2", "1", "go West", "go ...", "go north"))
    answers = {"search[a b]": "1: search[a b]", "1": "3", "2": "2", "go West": "4", "go north": "6", "go east": "5: go east"}
    for command, answer in answers.items():
        assert NumberParser().answer(Action(command), turn) == answer
        assert NumberParser().parse(answer, turn) == ParsedAction(Action(command))
    assert NumberParser().answer(Action("dance"), turn) == "dance"  # which is refused
    assert NumberParser().answer(Action("dance"), OPEN) == "dance"


@settings(deadline=None, derandomize=True)
@given(
    commands=st.lists(st.sampled_from(["go  west", "GO west", "1", "2: a", "a ... b", "...", "a c b"]), min_size=1),
    words=st.text("ab 12:", min_size=1),
)
def test_what_a_number_gave_is_answered_by_one_that_gives_it(commands: list[str], words: str) -> None:
    parser, turn = NumberParser(), Turn("A page.", "", tuple(commands))
    for text in (str(len(commands)), f"{len(commands)}: {words}", f"1: a {words} b"):
        if (action := parser.parse(text, turn).action) is not None:
            assert parser.parse(parser.answer(action, turn), turn).action == action


# --- tool calls ---


@pytest.mark.parametrize(
    "before", ["", "  \n", "<think>\nWest.\n</think>\n\n", "Opened by the prompt.</think>", f"<think>{CALL}</think>"]
)
@pytest.mark.parametrize("strict", [False, True])
def test_the_form(before: str, strict: bool) -> None:
    parser = ToolCallParser(strict=strict)
    assert command_of(parser.parse(before + CALL, LISTED)) == "go west"
    assert command_of(parser.parse(before + CALL + "\n", OPEN)) == "go west"


@pytest.mark.parametrize(
    "text",
    [
        CALL.replace("\n", ""),
        CALL.replace("\n", "\n\n"),
        CALL.removesuffix("</tool_call>"),
        CALL.removesuffix("\n</tool_call>"),
        f"I go west, so {{coin}} is near.\n{CALL}\nDone.",
        f"```\n{CALL}\n```",
        CALL.replace("{", "```json\n{", 1).replace("}}", "}}\n```"),
        CALL.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"),
        '```json\n{"name": "act", "arguments": {"command": "go west"}}\n```',
        f"<think>\nWest is best.\n{CALL}",
        "Between <tool_call> and </tool_call> belongs the call: " + CALL,
        f"{CALL}\n<tool_call>\n{{",
        '<tool_call>{"name": "act", "arguments": "{\\"command\\": \\"go west\\"}"}</tool_call>',
        '<tool_call>\n{"id": [1, {}], "name": "act", "arguments": {"command": "go west"}}\n</tool_call>',
    ],
)
def test_what_is_put_up_with_unless_strict(text: str) -> None:
    assert command_of(ToolCallParser().parse(text, LISTED)) == "go west"
    parsed = ToolCallParser(strict=True).parse(text, LISTED)
    assert parsed.action is None
    assert "not exactly one tool call" in parsed.feedback


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "There is no tool call."),
        ("go west", "There is no tool call."),
        ("<think>\nwest", "The thinking does not end with </think>, and there is no tool call."),
        (f"<think>{CALL}</think>\ngo west", "There is no tool call behind </think>."),
        ("<tool_call>\ngo west\n</tool_call>", "There is no JSON object behind <tool_call>."),
        (CALL + CALL, "There is more than one tool call."),
        (CALL.replace('"', "'"), "not valid JSON: Expecting property name enclosed in double quotes (character 2)."),
        (CALL.replace("}}", "},}"), "not valid JSON: "),
        (CALL.replace("}}", "}"), "not valid JSON: Expecting ',' delimiter"),
        (CALL.replace('"go west"', "None"), "not valid JSON: Expecting value (character 42)."),
        (CALL.replace('"go west"', "NaN"), "There is no NaN in JSON."),
        ('{"command": "go west"}', 'The tool call has no "name".'),
        (CALL.replace('"act"', "7"), 'The "name" of the tool call must be a string.'),
        (CALL.replace("act", "walk"), "There is no tool 'walk', only 'act'."),
        (CALL.replace("act", "\\ud800" + "x" * 1000), f"There is no tool '?{'x' * 59}', only 'act'."),
        ('{"name": "act"}', 'The tool call has no "arguments".'),
        ('{"name": "act", "arguments": ["go west"]}', 'The "arguments" of the tool call must be a JSON object.'),
        ('{"name": "act", "arguments": "[1]"}', 'The "arguments" of the tool call must be a JSON object.'),
        ('{"name": "act", "arguments": "go west"}', 'The string of "arguments" is not valid JSON: Expecting value'),
        (CALL.replace("command", "direction"), "The tool call has no argument 'command'."),
        (CALL.replace('"go west"', '["go west"]'), "The argument 'command' must be a string."),
        (CALL.replace('"go west"', "9" * 5000), "The argument 'command' must be a string."),
        ('{"name": "act", "arguments": ' + "[" * 100_000, "The tool call is nested too deeply."),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_feedback_says_what_is_wrong_and_shows_the_form(text: str, reason: str, strict: bool) -> None:
    parsed = ToolCallParser(strict=strict).parse(text, LISTED)
    assert parsed.action is None
    assert reason in parsed.feedback
    form = 'Answer with\n<tool_call>\n{"name": "act", "arguments": {"command": "..."}}\n</tool_call>'
    assert parsed.feedback.endswith(form)


@pytest.mark.parametrize("command", ["GO  West", "go\\nwest", "go west "])
def test_commands_of_calls_are_checked_as_others_are(command: str) -> None:
    assert command_of(ToolCallParser().parse(CALL.replace("go west", command), LISTED)) == "go west"


@pytest.mark.parametrize("command", ["dance", "", "go\\u0000 west", "\\ud800"])
def test_impossible_commands_of_calls(command: str) -> None:
    text = CALL.replace("go west", command)
    parsed = ToolCallParser().parse(text, LISTED)
    assert parsed == CommandParser().parse(json.loads(f'"{command}"'), LISTED) or command == ""
    assert parsed.action is None
    assert parsed.feedback.endswith("' is not possible here.")
    assert command_of(ToolCallParser().parse(text, OPEN)) == ("dance" if command == "dance" else None)


def test_own_names() -> None:
    parser = ToolCallParser("robot.move", "where to", strict=True)
    text = '<tool_call>\n{"name": "robot.move", "arguments": {"speed": 2, "where to": "look"}}\n</tool_call>'
    assert command_of(parser.parse(text, LISTED)) == "look"
    assert "'act', only 'robot.move'" in parser.parse(CALL, LISTED).feedback
    assert '{"name": "robot.move", "arguments": {"where to": "..."}}' in parser.parse("look", LISTED).feedback


def test_a_long_answer_is_read_in_one_go() -> None:
    """Read again from each brace, a million of them would take hours."""
    for unit in ("{", '{"a":', '<tool_call>{"', "<think>{", "{</think>", " ", '{"name":', "9", '{"\\u0041'):
        for text in (unit * 1_000_000, '{"name": "act", "arguments": ' + unit * 1_000_000):
            assert command_of(ToolCallParser().parse(text, LISTED)) is None
    four = Turn("A page.", "", ("search[...]", "put ... in [...] by [...] for ...]"))
    for unit in ("search[", "a]", "]", "put ", "put in [", " in [", " by [", " for ", "think:"):
        for text in (
            "search[" + unit * 100_000 + ".",
            "put a in [" + unit * 100_000 + "]",
            "put a in [b] by [" + unit * 100_000,
        ):
            CommandParser().parse(text, four)


# --- any text ---

PARSERS: list[ActionParser] = [CommandParser(), ToolCallParser(), ToolCallParser(strict=True)]
FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "```json", "```", CALL, "go west", "GO LOOK"),
    *("{", "}", "[", "]", ",", ":", '"', "'", "\\", '"name"', '"act"', '"arguments"', '"command"', '"go west"', "None"),
    *(
        '{"name": "act", "arguments": ',
        '{"command": "go west"}',
        '"{\\"command\\": \\"look\\"}"',
        "[" * 2000,
        '{"a":' * 2000,
    ),
    *("NaN", "-1e999", "9" * 5000, "\\ud800", "\ud800", "\x00", "\u2028", "☂"),
]
COMMANDS = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1), max_size=4)


def check(text: str, turn: Turn) -> None:
    for parser in PARSERS:
        parsed = parser.parse(text, turn)
        command = command_of(parsed)
        assert (command is None) == bool(parsed.feedback)
        assert command != ""
        assert command is None or turn.commands is None or command in turn.commands
        ((command or "") + parsed.feedback).encode()  # a lone surrogate would break the next prompt


@settings(deadline=None, derandomize=True)
@given(text=st.text(), commands=st.none() | COMMANDS, data=st.data())
def test_any_text_has_an_answer(text: str, commands: list[str] | None, data: st.DataObject) -> None:
    if commands:
        text = data.draw(st.sampled_from([text, *commands, f" {commands[0]}\n", commands[-1].upper()]))
    turn = Turn("A room.", "", None if commands is None else tuple(commands))
    check(text, turn)
    if commands is not None and text in commands and "think>" not in text:  # such a command could not be said
        for parser in PARSERS:
            assert command_of(parser.parse(parser.answer(Action(text), turn), turn)) == text


@settings(deadline=None, derandomize=True, max_examples=300)
@given(parts=st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(), max_size=3), max_size=12))
def test_any_mixture_of_the_form_has_an_answer(parts: list[str]) -> None:
    for turn in (OPEN, LISTED):
        check("".join(parts), turn)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 4), st.sampled_from(["", *FRAGMENTS]) | st.text(max_size=3)), max_size=4
    ),
    thinking=st.sampled_from(["", "<think>\nWest.\n</think>\n\n", "<think>\n"]),
)
def test_any_damaged_call_has_an_answer(edits: list[tuple[int, int, str]], thinking: str) -> None:
    text = thinking + CALL
    for at, width, new in edits:
        text = text[:at] + new + text[at + width :]
    for turn in (OPEN, LISTED):
        check(text, turn)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("  Three.\n\n\tSo: \\boxed{3} ", "Three.\n\n\tSo: \\boxed{3}"),
        ("<think>Two?\n</think>\nThree.", "Three."),
        ("Two?</think>Three.", "Three."),
        ("<think>Two?", None),
        ("<think>Two?</think> ", None),
        ("Three\x00", None),
        ("", None),
    ],
)
def test_a_text_is_the_action(said: str, text: str | None) -> None:
    parsed = TextParser().parse(said, FREE)
    assert parsed.action == (None if text is None else Action(text=text))
    assert bool(parsed.feedback) == (text is None)
    if text is not None:
        assert TextParser().parse(TextParser().answer(Action(text=text), FREE), FREE) == parsed
