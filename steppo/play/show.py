"""What there is to see of an episode, on a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from steppo.rendering import is_open
from steppo.transcripts import info_text
from steppo.types import Episode, Request, Step, Task, Turn


@dataclass(frozen=True)
class Show:
    """Prints an episode as it is played.

    Args:
        console: Where to.
        player: Who plays, for people.
        decode: Step -> what was said.
        value: Step -> the critic's value of its prompt, if there is one to show.
    """

    console: Console
    player: str
    decode: Callable[[Step], str]
    value: Callable[[Step], float] | None

    def opening(self, task: Task) -> None:
        """The headline of an episode."""
        self.console.rule(Text(_printable(f"{task.id} · {self.player}"), style="bold"), align="left")

    def turn(self, step: Step | None, turn: Turn) -> None:
        """A step that was taken, and what is to be seen after it."""
        if step is not None:
            self._step(step)
        elif turn.goal:
            self._line(Text.assemble(("goal: ", "bold"), _printable(turn.goal)))
        if turn.feedback:
            self._line(Text(_printable(turn.feedback), style="yellow"))
        for message in turn.messages:
            self._line(Text.assemble((f"{message.role}: ", "bold"), _printable(message.content)))
        if turn.text or not turn.messages:
            self._line(Text(_printable(turn.text)))
        self._beside(turn.info)
        over = step is not None and step.terminated
        if turn.commands is not None and not over:
            commands = (f"{number} {command}" for number, command in enumerate(turn.commands, start=1))
            self._line(Text(_printable("   ".join(commands)), style="dim"))

    def _step(self, step: Step) -> None:
        said = " ".join(self.decode(step).split())
        line = Text.assemble((f"{step.index + 1}> ", "bold"), (_printable(step.action), "bold cyan"))
        if said != " ".join(step.action.split()):
            line.append(f"  said: {said!r}", style="dim")
        line.append(f"  reward {step.reward:g}", style="green" if step.reward > 0 else "red" if step.reward < 0 else "dim")
        if not step.action_valid:
            line.append("  not valid", style="red")
        if self.value is not None:
            line.append(f"  value before {self.value(step):.3f}", style="dim")
        self._line(line)

    def ending(self, episode: Episode) -> None:
        """How it went."""
        if episode.stop_reason.failed:
            self._line(Text(_printable(f"broken ({episode.stop_reason}): {episode.error}"), style="bold red"))
        else:
            result = "over" if episode.success is None else "solved" if episode.success else "not solved"
            steps = f"{len(episode.steps)} step{'' if len(episode.steps) == 1 else 's'}"
            line = f"{result}: return {episode.episode_return:g} in {steps} ({episode.stop_reason})"
            self._line(Text(line, style="bold green" if episode.success else "bold"))
        self._beside(episode.info, "last said: ")

    def summary(self, figures: dict[str, float]) -> None:
        """How all of them went."""
        success = "" if math.isnan(figures["success_rate"]) else f"success {figures['success_rate']:.2f}, "
        returns = f"return {figures['return_mean']:.3g}, steps {figures['steps_mean']:.1f}"
        self._line(Text(f"{figures['episodes']:.0f} episodes: {success}{returns}", style="bold"))

    def _beside(self, info: Mapping[str, str | float | bool], what: str = "said: ") -> None:
        """Figures and labels."""
        if info:
            self._line(Text(_printable(what + info_text(info)), style="magenta"))

    def _line(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


def _printable(text: str) -> str:
    """Without what would steer the terminal; untrained policies say anything."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


class Quit(KeyboardInterrupt):
    """The human has had enough. No ``Exception``: that would cost this episode only."""


class Human:
    """Asks for each action on standard input: a command, its number, or ``quit``."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, turn: Turn, request: Request) -> str:
        commands = turn.commands or ()
        while True:
            try:
                said = self._console.input("your action: ").strip()
            except EOFError:
                raise Quit from None
            if said == "quit" and said not in commands:
                raise Quit
            if said.isdecimal() and commands and said not in commands:
                if not 1 <= int(said) <= len(commands):
                    self._console.print(f"There are {len(commands)} commands.")
                elif is_open(chosen := commands[int(said) - 1]):
                    self._console.print(Text(f"Type it, with words of your own: {_printable(chosen)}"))
                else:
                    return chosen
            elif said:
                return said
