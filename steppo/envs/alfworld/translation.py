"""From PDDL to plain data: operators, variables and facts, by Fast Downward's translator, kept on disk."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steppo.envs.alfworld.grammar import GameError
from steppo.errors import said

# fast_downward is imported where it is used: its library must not share a process with torch.

FORMAT = 1  # of what is kept; another number where translations change


def translated(domain: str, problem: str) -> dict[str, Any]:
    """The game as numbers, for ``Game``; all that it says is of plain lists and dicts.

    Returns:
        ``objects``: name and type, sorted; their places are the numbers that stand for them.
        ``types``: the supertypes of each type.
        ``parameters``: name and type of each action's.
        ``facts``: predicate and objects; what holds at the start and is no variable's.
        ``variables``: predicate and objects, whether it is false at the start (0 true, 1 false), and whether it is derived.
        ``operators``: action and objects, conditions, effects (conditions, variable, value). Conditions are pairs of
        variable and value. Their order is the one that Fast Downward tells them in.
        ``axioms``: conditions, variable, value. ``goal``: conditions.

    Raises:
        GameError: It cannot be translated.
    """
    arguments, output = sys.argv, sys.stdout
    try:
        import fast_downward

        task, sas = fast_downward.pddl2sas(domain, problem)
        return _plain(task, iter(sas.splitlines()))
    except (Exception, SystemExit) as error:  # its parser has no exception of its own
        raise GameError(f"its PDDL cannot be translated: {said(error)}") from error
    finally:
        sys.argv, sys.stdout = arguments, output  # it changes both


def _plain(task: Any, lines: Iterator[str]) -> dict[str, Any]:
    objects = sorted([thing.name, thing.type_name] for thing in task.objects)
    numbers = {name: number for number, (name, _) in enumerate(objects)}
    variables, operators, axioms, goal = _read(lines, numbers)
    atoms = [atom for atom in task.init if hasattr(atom, "predicate") and atom.predicate != "="]
    facts = {(atom.predicate, *(numbers[name] for name in atom.args)) for atom in atoms}
    # Conditions in the order of their variables: what has a variable less stands before, and this is Fast Downward's order.
    operators.sort(key=lambda operator: sorted(operator[1]))
    _refuse_circles(axioms)
    return {
        "objects": objects,
        "types": {each.name: list(each.supertype_names) for each in task.types},
        "parameters": {
            action.name: [[parameter.name.strip("?"), parameter.type_name] for parameter in action.parameters]
            for action in task.actions
        },
        "facts": sorted(map(list, facts)),
        "variables": variables,
        "operators": operators,
        "axioms": axioms,
        "goal": goal,
    }


def _read(lines: Iterator[str], numbers: dict[str, int]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Variables, operators, axioms and goal of a task in SAS format, version 3."""

    def number() -> int:
        return int(next(lines))

    def pairs(words: Iterator[int], count: int) -> list[list[int]]:
        return [[next(words), next(words)] for _ in range(count)]

    def conditions() -> list[list[int]]:
        return [[int(word) for word in next(lines).split()] for _ in range(number())]

    def upto(sign: str) -> None:
        while next(lines) != sign:
            pass

    upto("end_metric")
    variables: list[Any] = []
    for _ in range(number()):
        upto("begin_variable")
        _, layer, size = next(lines), number(), number()
        values = [next(lines) for _ in range(size)]
        variables.append([_fact(values, numbers), 1, layer >= 0])
    upto("begin_state")
    for variable in variables:
        variable[1] = number()
    upto("begin_goal")
    goal = conditions()
    upto("end_goal")
    operators = []
    for _ in range(number()):
        upto("begin_operator")
        action, *names = next(lines).split()
        needed, effects = conditions(), []
        for _ in range(number()):
            words = map(int, next(lines).split())
            only_if = pairs(words, next(words))
            variable, before, after = words
            if before >= 0:
                needed.append([variable, before])
            effects.append([only_if, variable, after])
        upto("end_operator")
        operators.append([[action, *(numbers[name] for name in names)], needed, effects])
    axioms = []
    for _ in range(number()):
        upto("begin_rule")
        needed = conditions()
        variable, _, after = map(int, next(lines).split())
        axioms.append([needed, variable, after])
    return variables, operators, axioms, goal


def _fact(values: list[str], numbers: dict[str, int]) -> list[Any]:
    """Predicate and objects of a variable that says whether a fact holds."""
    kind, _, atom = values[0].partition(" ")
    if kind != "Atom" or values[1:] != [f"NegatedAtom {atom}"]:
        raise ValueError(f"a variable has the values {values}")
    predicate, _, names = atom.rstrip(")").partition("(")
    return [predicate, *(numbers[name] for name in names.split(", ") if name)]


def _refuse_circles(axioms: list[Any]) -> None:
    """What is derived from itself would need more than counting to simulate."""
    needs: dict[int, set[int]] = {}
    for conditions, variable, _ in axioms:
        needs.setdefault(variable, set()).update(other for other, _ in conditions)
    while free := [variable for variable, others in needs.items() if not others & needs.keys()]:
        for variable in free:
            del needs[variable]
    if needs:
        raise ValueError("a fact is derived from itself")


def kept(path: Path) -> dict[str, Any] | None:
    """What is kept in a file, or ``None`` if there is none, or it is damaged."""
    try:
        return json.loads(zlib.decompress(path.read_bytes()))
    except (OSError, ValueError, zlib.error):  # zlib has a checksum
        return None


def keep(data: dict[str, Any], path: Path, folder: str | Path) -> None:
    """Writes a file, first in a folder on the same disk: it appears whole or not at all. Raises ``OSError``."""
    handle, scratch = tempfile.mkstemp(dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(zlib.compress(json.dumps(data, separators=(",", ":")).encode()))
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
