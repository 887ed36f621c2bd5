"""Action parsers: the policy's text -> an action for the environment, or feedback that says why not."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from steppo.errors import ConfigError
from steppo.rendering.markup import END_THINK, THINK
from steppo.rendering.renderer import Renderer
from steppo.types import Action, ToolSpec, Turn

LONGEST_QUOTE = 60
_UNSENDABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and what UTF-8 cannot hold
_SPACES = str.maketrans("\n\t\r", "   ")
_OWN_WORDS = "..."
_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class ParsedAction:
    """``action`` for the environment; ``None`` when the text is refused, with ``feedback`` for the next prompt."""

    action: Action | None
    feedback: str = ""


class ActionParser(ABC):
    """Reads an action out of what the policy said. Never raises: whatever the text, there is an answer.

    Attributes:
        asks: What the usual instructions say an answer is.
    """

    asks = "Answer with one command and nothing else."

    def bind(self, tools: Sequence[ToolSpec], renderer: Renderer) -> None:
        """Takes the environment's tools, and what knows how the model's template writes calls.

        Raises:
            ConfigError: The parser reads no calls, or not the template's.
        """
        if tools:
            raise ConfigError(
                f"{type(self).__name__} reads no calls of tools, and the environment has some: use HermesParser"
            )

    def tools_text(self, tools: Sequence[ToolSpec]) -> str:
        """The tools and the form of a call, for the system message of a model whose template does not say so."""
        return ""

    @abstractmethod
    def parse(self, text: str, turn: Turn) -> ParsedAction:
        """Parses ``text``, said on seeing ``turn``."""

    def answer(self, action: Action, turn: Turn) -> str:
        """What a policy should say on seeing ``turn`` to act so: ``parse`` reads it back."""
        return str(action)

    def listed(self, commands: Sequence[str]) -> str:
        """How a prompt shows what may be said, in the form that ``parse`` reads."""
        return "Commands: " + ", ".join(commands)


def _thought_through(text: str) -> str | None:
    """What stands behind the thinking; ``None`` if that does not end."""
    answer = text.rpartition(END_THINK)[2].strip()
    return None if answer.startswith(THINK) else answer


class CommandParser(ActionParser):
    """The whole answer is one line, the command. Where commands are listed, it must be one of them.

    Thinking before it is dropped: all up to ``</think>``, which the prompt may have opened already.
    """

    _line = "one command on one line"

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        answer = _thought_through(text)
        if answer is None:
            return ParsedAction(None, f"End your thinking with {END_THINK}, then answer with {self._line}.")
        if len(answer.splitlines()) != 1:
            return ParsedAction(None, f"Answer with {self._line}.")
        return self._parsed(answer, turn)

    def _parsed(self, answer: str, turn: Turn) -> ParsedAction:
        return parsed_command(answer, turn)


class TextParser(ActionParser):
    """The whole answer is the action, however many lines it has, for environments that read words.

    Thinking before it is dropped: all up to ``</think>``, which the prompt may have opened already.
    """

    asks = "Answer in words."

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        answer = _thought_through(text)
        if answer is None:
            return ParsedAction(None, f"End your thinking with {END_THINK}, then answer.")
        if not answer or _UNSENDABLE.search(answer.translate(_SPACES)):
            return ParsedAction(None, "Answer with a text.")
        return ParsedAction(Action(text=answer))


class NumberParser(CommandParser):
    """Commands are numbered in the prompt, one on a line (``3: go west``); the answer is a number: short, nothing to copy.

    The whole line will do as well, and is needed for a command that is open: ``4: search[red shoes]``. Where no commands are
    listed the answer is a command. The environment, records and past actions have the command itself.
    """

    asks = "Answer with the number of one command and nothing else."
    _line = "the number of one command on one line"

    def listed(self, commands: Sequence[str]) -> str:
        return "\n".join(["Commands:", *(f"{number}: {command}" for number, command in enumerate(commands, start=1))])

    def answer(self, action: Action, turn: Turn) -> str:
        command = str(action)
        commands = turn.commands or ()
        fits = (n for n, listed in enumerate(commands) if _only(listed, command, turn).action == Action(command))
        found = commands.index(command) if command in commands else next(fits, None)
        if found is None:
            return command
        return f"{found + 1}: {command}" if is_open(commands[found]) else str(found + 1)

    def _parsed(self, answer: str, turn: Turn) -> ParsedAction:
        if turn.commands is None:
            return parsed_command(answer, turn)
        number, colon, words = answer.partition(":")
        if not _NUMBER.fullmatch(number := number.strip()):
            return ParsedAction(None, f"Answer with {self._line}.")
        if 0 < int(number) <= len(turn.commands):
            listed = turn.commands[int(number) - 1]
            parsed = _only(listed, words if colon or is_open(listed) else listed, turn)
            if parsed.action is not None:
                return parsed
        return ParsedAction(None, f"'{quotable(_plain(answer))}' is not possible here.")


def _only(listed: str, command: str, turn: Turn) -> ParsedAction:
    """The command, if it is this one of those that are listed."""
    return parsed_command(command, replace(turn, commands=(listed,)))


def parsed_command(command: str, turn: Turn) -> ParsedAction:
    """The command as the environment spells it, or that it is not possible."""
    command = _plain(command)
    if turn.commands is None:
        if command and not _UNSENDABLE.search(command):
            return ParsedAction(Action(command))
    else:
        if command in turn.commands:
            return ParsedAction(Action(command))
        for listed in turn.commands:
            if _plain(listed).lower() == command.lower():
                return ParsedAction(Action(listed))
        for listed in filter(is_open, turn.commands):
            if (filled := _filled(listed, command)) is not None:
                return ParsedAction(Action(filled))
    return ParsedAction(None, f"'{quotable(command)}' is not possible here.")


def is_open(listed: str) -> bool:
    """Whether a listed command leaves words to the agent."""
    return _OWN_WORDS in listed


def _filled(listed: str, command: str) -> str | None:
    """An open command with the agent's own words, if that is what was said."""
    first, *between, last = map(re.escape, _plain(listed).split(_OWN_WORDS))
    form = first + "".join(f"(?>(.+?){fixed})" for fixed in between) + f"(.+){last}"  # never read twice, however long it is
    said = re.fullmatch(form, command, re.IGNORECASE)
    if said is None or not all(map(str.strip, said.groups())) or _UNSENDABLE.search("".join(said.groups())):
        return None
    return "".join(fixed + words for fixed, words in zip(listed.split(_OWN_WORDS), (*said.groups(), ""), strict=True))


def _plain(command: str) -> str:
    return " ".join(command.split())


def quotable(text: str) -> str:
    """The beginning of what the policy said, fit for a prompt."""
    return _UNSENDABLE.sub("?", text[:LONGEST_QUOTE])
