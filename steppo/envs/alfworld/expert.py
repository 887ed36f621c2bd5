"""What an expert would do: it follows a game's walkthrough, and comes back to it from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_PASSING = re.compile(
    "(go to|open|close|examine) |(look|inventory|help)$"
)  # they change where one is and what one sees, no more
_MOVE = re.compile(r"(?P<verb>take|move|put) (?P<thing>.+) (?:from|to|in/on) (?P<place>.+)")


class _Move(NamedTuple):
    """A thing taken from a place, or put there."""

    takes: bool
    thing: str
    place: str

    @classmethod
    def of(cls, command: str) -> _Move | None:
        found = _MOVE.fullmatch(command)
        return found and cls(found["verb"] == "take", found["thing"], found["place"])


class Expert:
    """Knows the walkthrough, so it never searches.

    A walkthrough is cut into stages: ways, then a command that changes something. Whatever was done, the next command is the
    last one of the stage that is possible. A thing or a place of the same kind will do as well where it is met. What was
    taken in vain is put down again, what was put down too early is taken up again.

    Args:
        walkthrough: Commands that win.
    """

    def __init__(self, walkthrough: Sequence[str]) -> None:
        self._stages: list[list[str]] = [[]]
        for command in walkthrough:
            self._stages[-1].append(command)
            if not _PASSING.match(command):
                self._stages.append([])
        self._in_vain: _Move | None = None  # what the hands are full of
        self._has_put = False  # so that what comes next must go to the same place

    def action(self, commands: Iterable[str]) -> str | None:
        """The next command of those that are possible; none when it is at a loss, or all is done."""
        possible = sorted(commands)
        stage = self._stages[0] if self._stages else []
        if vain := self._in_vain:
            stage = _way(vain.place)
        if self._in_vain or (stage and stage[-1] not in possible):
            for command in possible:
                if self._will_do(command):
                    return command
        return next((command for command in reversed(stage) if command in possible), None)

    def saw(self, command: str) -> None:
        """A possible command was carried out."""
        if _PASSING.match(command) or not self._stages:
            return
        move = _Move.of(command)
        if self._will_do(command):
            if self._in_vain:
                self._in_vain = None
                return
            stage = self._stages.pop(0)
            wanted = _Move.of(stage[-1])
            if move and wanted and move != wanted:
                self._swap(stage, wanted, move)
            self._has_put |= move is not None and not move.takes
        elif move and move.takes:
            self._in_vain = move
        elif move:
            self._stages.insert(0, [*_way(move.place), f"take {move.thing} from {move.place}"])

    def _will_do(self, command: str) -> bool:
        """Whether it does what is wanted next, with this thing and place or others of the same kind."""
        move = _Move.of(command)
        if self._in_vain:
            return move is not None and not move.takes
        stage = self._stages[0]
        wanted = _Move.of(stage[-1]) if stage else None
        if not wanted or not move or wanted.takes != move.takes:
            return stage[-1:] == [command]
        if wanted.takes:
            there = {other.place for stage in self._stages if stage and (other := _Move.of(stage[-1])) and not other.takes}
            return move == wanted or (_kind(move.thing) == _kind(wanted.thing) and move.place not in there)
        alike = _kind(move.place) == _kind(wanted.place) and not self._has_put
        return move == wanted or (move.thing == wanted.thing and alike)

    def _swap(self, stage: list[str], wanted: _Move, move: _Move) -> None:
        """Two things, or places, change their parts in what is still to do; ``stage`` was to get what was wanted."""
        names = {wanted.thing: move.thing, move.thing: wanted.thing} if wanted.takes else {wanted.place: move.place}
        pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names))
        for number, other in enumerate(self._stages):
            if other[-1:] == [f"take {move.thing} from {move.place}"]:
                self._stages[number] = stage
            else:
                self._stages[number] = [pattern.sub(lambda found: names[found[0]], command) for command in other]


def _way(place: str) -> list[str]:
    return [f"go to {place}", f"open {place}"]


def _kind(name: str) -> str:
    return name.rpartition(" ")[0]
