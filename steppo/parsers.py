"""Action parsers: the policy's text -> a command for the environment, or feedback that says why not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from steppo.types import Observation

_LONGEST_QUOTE = 60


@dataclass(frozen=True)
class ParsedAction:
    """``command`` for the environment; ``None`` when the text is refused, with ``feedback`` for the next prompt."""

    command: str | None
    feedback: str = ""


class ActionParser(ABC):
    """Reads a command out of what the policy said. Never raises: whatever the text, there is an answer."""

    @abstractmethod
    def parse(self, text: str, observation: Observation) -> ParsedAction:
        """Parses ``text``, said on seeing ``observation``."""


class CommandParser(ActionParser):
    """The whole answer is one line, the command. Where commands are listed, it must be one of them."""

    def parse(self, text: str, observation: Observation) -> ParsedAction:
        lines = text.strip().splitlines()
        if len(lines) != 1:
            return ParsedAction(None, "Answer with one command on one line.")
        command = " ".join(lines[0].split())
        allowed = observation.admissible_commands
        if allowed is None or command in allowed:
            return ParsedAction(command)
        for candidate in allowed:
            if candidate.lower() == command.lower():
                return ParsedAction(candidate)
        return ParsedAction(None, f"'{command[:_LONGEST_QUOTE]}' is not possible here.")
