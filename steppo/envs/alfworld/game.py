"""A translated game, and an episode of it: which actions are possible, what they change, what is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from steppo.envs.alfworld.grammar import GameError, Grammar, Scene, Thing

_SIGNS = {"_minus_": "-", "_plus_": "+", "_dot_": ".", "_comma_": ","}


def names_of(ids: Sequence[str]) -> dict[str, str]:
    """What ALFWorld calls things: kind and number, which counts down by the order of their ids."""
    kinds = {}
    for thing in sorted(ids):
        kind, bar, _ = thing.partition("_bar_")
        if bar and "basin" in thing:
            kind += "basin"
        for code, sign in _SIGNS.items():
            kind = kind.replace(code, sign)
        kinds[thing] = f"{kind} ", bool(bar)
    left = Counter(kind for kind, is_numbered in kinds.values() if is_numbered)
    names = {}
    for thing, (kind, is_numbered) in kinds.items():
        names[thing] = kind + str(left[kind]) * is_numbered
        left[kind] -= is_numbered
    return names


class Game:
    """All that the episodes of a game share. It is not changed by them.

    Args:
        data: From ``translated``.
        grammar: The game's.

    Raises:
        GameError: They do not belong together.
    """

    def __init__(self, data: Mapping[str, Any], grammar: Grammar) -> None:
        self.grammar = grammar
        self.goal = [tuple(each) for each in data["goal"]]
        self.variables = [(variable[0][0], tuple(variable[0][1:])) for variable in data["variables"]]
        self.initial = [variable[1] for variable in data["variables"]]
        self.actions = [(action[0], tuple(action[1:])) for action, _, _ in data["operators"]]
        self.effects = [effects for _, _, effects in data["operators"]]
        self.num_operators = len(self.actions)
        # Those of the value at the start say no more than that no other holds.
        axioms = [axiom for axiom in data["axioms"] if axiom[2] != self.initial[axiom[1]]]
        self.heads = [(variable, value) for _, variable, value in axioms]
        # What waits for a variable's value: operators, and behind them axioms.
        self.waiting: list[tuple[list[int], list[int]]] = [([], []) for _ in self.variables]
        needed = [*(needed for _, needed, _ in data["operators"]), *(needed for needed, _, _ in axioms)]
        self.unmet = []
        for number, conditions in enumerate(needed):
            for variable, value in conditions:
                self.waiting[variable][value].append(number)
            self.unmet.append(sum(self.initial[variable] != value for variable, value in conditions))
        self._types(data)
        self.start: dict[str, set[tuple[int, ...]]] = {}
        for predicate, *numbers in data["facts"]:
            self.start.setdefault(predicate, set()).add(tuple(numbers))
        changing = {self.variables[variable][0] for effects in self.effects for _, variable, _ in effects}
        changing |= {f"not_{predicate}" for predicate in changing}
        self._parameters = {action: [tuple(each) for each in given] for action, given in data["parameters"].items()}
        self._constant: dict[str, bool] = {}
        for action in {name for name, _ in self.actions}:
            if action not in grammar.templates or action not in grammar.feedback:
                raise GameError(f"its grammar has no text for the action {action}")
            predicates = grammar.depends_on(grammar.templates[action])
            self._constant[action] = predicates is not None and not predicates & changing
        self.commands: dict[int, str] = {}  # of operators whose command never changes, as they are met
        self.scenes: dict[int, Scene] = {}
        self.things = self._things(data)

    def _types(self, data: Mapping[str, Any]) -> None:
        self._of_type: dict[str, frozenset[int]] = {
            kind: frozenset(
                number
                for number, (_, own) in enumerate(data["objects"])
                if kind == own or kind in data["types"].get(own, ())
            )
            for kind in data["types"]
        }

    def _things(self, data: Mapping[str, Any]) -> list[Thing | None]:
        """The objects that a fact at the start is about; TextWorld knows no others."""
        first = Episode(self)
        about = {number for facts in first.holding.values() for fact in facts for number in fact}
        names = names_of([data["objects"][number][0] for number in about])
        return [Thing(thing, kind, names[thing]) if thing in names else None for thing, kind in data["objects"]]

    def of_type(self, name: str) -> frozenset[int]:
        """Objects of a type and its subtypes."""
        if name not in self._of_type:
            raise GameError(f"its grammar speaks of a type {name!r} that its PDDL has not")
        return self._of_type[name]

    def scene(self, operator: int) -> Scene:
        """What an action's parameters stand for."""
        if operator not in self.scenes:
            action, numbers = self.actions[operator]
            bound = dict(zip(self._parameters[action], numbers, strict=False))  # others are quantified
            names = {name: thing for (name, _), number in bound.items() if (thing := self.things[number])}
            self.scenes[operator] = Scene(names, bound)
        return self.scenes[operator]

    def command(self, operator: int, episode: Episode) -> str:
        """What one says to have an action carried out."""
        if operator in self.commands:
            return self.commands[operator]
        action = self.actions[operator][0]
        command = self.grammar.text(self.grammar.templates[action], episode, self.scene(operator))
        if self._constant[action]:
            self.commands[operator] = command
        return command


class Episode:
    """A game as it is played.

    Conditions are counted, not looked up: a variable that changes tells the operators and axioms that wait for its value.
    """

    def __init__(self, game: Game) -> None:
        self._game = game
        self._values = list(game.initial)
        self._unmet = list(game.unmet)
        self._reasons: Counter[int] = Counter()  # axioms that hold, by their variable
        self._possible = {number for number in range(game.num_operators) if not self._unmet[number]}
        self.holding = {predicate: set(facts) for predicate, facts in game.start.items()}
        self._sorted: dict[str, list[tuple[int, ...]]] = {}
        for axiom in range(len(game.heads)):
            if not game.unmet[game.num_operators + axiom]:
                self._met(axiom)
        for (predicate, numbers), value in zip(game.variables, self._values, strict=True):
            if value == 0:
                self.holding.setdefault(predicate, set()).add(numbers)

    @property
    def things(self) -> Sequence[Thing | None]:
        """By their numbers; ``None`` for those that no fact is about."""
        return self._game.things

    def of_type(self, name: str) -> frozenset[int]:
        return self._game.of_type(name)

    def facts(self, predicate: str) -> list[tuple[int, ...]]:
        """What a predicate holds for, sorted. ``not_p``: what has ceased to be ``p``."""
        if predicate not in self._sorted:
            self._sorted[predicate] = sorted(self.holding.get(predicate, ()))
        return self._sorted[predicate]

    @property
    def won(self) -> bool:
        return all(self._values[variable] == value for variable, value in self._game.goal)

    def intro(self) -> str:
        """What is said first."""
        return self._game.grammar.text("#intro#", self, Scene({}, {}))

    def commands(self) -> dict[str, int]:
        """All that can be said now, sorted, with the operators that it means."""
        found: dict[str, int] = {}
        for operator in sorted(self._possible):
            found.setdefault(self._game.command(operator, self), operator)
        return dict(sorted(found.items()))

    def apply(self, operator: int) -> str:
        """Carries an operator out, and tells what is said about it."""
        effects = self._game.effects[operator]
        fired = [
            (variable, value)
            for conditions, variable, value in effects
            if all(self._values[other] == wanted for other, wanted in conditions)
        ]
        for variable, value in fired:
            self._set(variable, value)
        for _, variable, value in effects:  # TextWorld's facts follow all effects, whether or not their conditions hold
            predicate, numbers = self._game.variables[variable]
            names = (predicate, f"not_{predicate}")
            self.holding.setdefault(names[1 - value], set()).discard(numbers)
            self.holding.setdefault(names[value], set()).add(numbers)
            for name in names:
                self._sorted.pop(name, None)
        feedback = self._game.grammar.feedback[self._game.actions[operator][0]]
        return self._game.grammar.text(feedback, self, self._game.scene(operator))

    def _set(self, variable: int, value: int) -> None:
        before = self._values[variable]
        if before == value:
            return
        self._values[variable] = value
        unmet, last = self._unmet, self._game.num_operators
        waiting = self._game.waiting[variable]
        for number in waiting[before]:
            unmet[number] += 1
            if unmet[number] == 1:
                if number < last:
                    self._possible.discard(number)
                else:
                    self._unmet_again(number - last)
        for number in waiting[value]:
            unmet[number] -= 1
            if not unmet[number]:
                if number < last:
                    self._possible.add(number)
                else:
                    self._met(number - last)

    def _met(self, axiom: int) -> None:
        variable, value = self._game.heads[axiom]
        self._reasons[variable] += 1
        if self._reasons[variable] == 1:
            self._set(variable, value)

    def _unmet_again(self, axiom: int) -> None:
        variable, _ = self._game.heads[axiom]
        self._reasons[variable] -= 1
        if not self._reasons[variable]:
            self._set(variable, self._game.initial[variable])
