"""Small games in the layout of ALFWorld's json_2.1.1, written for the tests: a few rooms' worth of PDDL and a text grammar.

``write_games(folder)`` makes three tasks of three types in train, one in valid_seen and one in valid_unseen. With
``wording="put"`` they have the wording of the publisher's older grammar.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOMAIN = """
(define (domain flat)
  (:requirements :adl :typing)
  (:types agent spot furniture thing sort)
  (:predicates
    (at ?a - agent ?s - spot) (stands ?f - furniture ?s - spot) (in ?t - thing ?f - furniture)
    (holds ?a - agent ?t - thing) (full ?a - agent) (shuts ?f - furniture) (opened ?f - furniture)
    (oven ?f - furniture) (stove ?f - furniture) (lamp ?t - thing) (lit ?t - thing) (used ?t - thing) (hot ?t - thing)
    (is ?t - thing ?k - sort) (seen ?f - furniture) (looked ?a - agent))
  (:action GotoLocation                               ; where one is already one may go again
    :parameters (?a - agent ?from - spot ?to - spot ?f - furniture)
    :precondition (and (at ?a ?from) (stands ?f ?to))
    :effect (and (not (at ?a ?from)) (at ?a ?to)))
  (:action OpenIt
    :parameters (?a - agent ?s - spot ?f - furniture)
    :precondition (and (at ?a ?s) (stands ?f ?s) (shuts ?f) (not (opened ?f)))
    :effect (and (opened ?f) (seen ?f)))
  (:action CloseIt
    :parameters (?a - agent ?s - spot ?f - furniture)
    :precondition (and (at ?a ?s) (stands ?f ?s) (shuts ?f) (opened ?f))
    :effect (not (opened ?f)))
  (:action TakeObject
    :parameters (?a - agent ?s - spot ?t - thing ?f - furniture)
    :precondition (and (at ?a ?s) (stands ?f ?s) (in ?t ?f) (not (full ?a)) (or (not (shuts ?f)) (opened ?f)))
    :effect (and (not (in ?t ?f)) (holds ?a ?t) (full ?a)))
  (:action PutObject
    :parameters (?a - agent ?s - spot ?o - thing ?r - furniture)
    :precondition (and (at ?a ?s) (stands ?r ?s) (holds ?a ?o) (or (not (shuts ?r)) (opened ?r)))
    :effect (and (in ?o ?r) (not (holds ?a ?o)) (not (full ?a))))
  (:action HeatObject                                 ; two ways, one command
    :parameters (?a - agent ?s - spot ?t - thing ?f - furniture)
    :precondition (and (or (oven ?f) (stove ?f)) (at ?a ?s) (stands ?f ?s) (holds ?a ?t))
    :effect (hot ?t))
  (:action UseObject
    :parameters (?a - agent ?s - spot ?t - thing ?f - furniture)
    :precondition (and (lamp ?t) (at ?a ?s) (stands ?f ?s) (in ?t ?f))
    :effect (and (when (lit ?t) (not (lit ?t))) (when (not (lit ?t)) (lit ?t)) (used ?t)))
  (:action ExamineIt                                  ; with empty hands
    :parameters (?a - agent ?f - furniture)
    :precondition (and (exists (?s - spot) (and (at ?a ?s) (stands ?f ?s))) (forall (?t - thing) (not (holds ?a ?t))))
    :effect (seen ?f))
  (:action ExamineObject
    :parameters (?a - agent ?t - thing)
    :precondition (or (holds ?a ?t) (exists (?s - spot ?f - furniture) (and (at ?a ?s) (stands ?f ?s) (in ?t ?f))))
    :effect (used ?t))
  (:action look :parameters (?a - agent ?s - spot) :precondition (at ?a ?s) :effect (looked ?a))
)
"""

GRAMMAR = r'''
# Comments stand outside of texts.
grammar :: """
    {
        "intro": [{"rhs": "-= A flat, and things to do =-\n\n#around#\n\n#task#"}],
        "task": [{"rhs": "Your task is to: TASK."}],
        "around": [{"rhs": "  You look around and see [{#one(f)# | stands(f:furniture, s:spot)}]."}],
        "one(f)": [{"rhs": "{f.indefinite} {f.name or f.id}"}],
        "inside": [
            {"condition": "shuts(f:furniture) & opened(f:furniture)",
             "rhs": "The {f.name} is open. In it: [{t.indefinite + ' ' + t.name | in(t:thing, f:furniture)}]."},
            {"condition": "shuts(f:furniture)", "rhs": "The {f.name} is closed."},
            {"rhs": "On {f.definite} {f.name}: [{t.indefinite + ' ' + t.name | in(t:thing, f:furniture)}]."}
        ],
        "list_empty": [{"rhs": "nothing"}],
        "list_separator": [{"rhs": ", "}],
        "list_last_separator": [{"rhs": ", and "}],
        "never read": [{"rhs": "{f.name} (it is {t.name})} and what is behind is dropped"}]
    }
""";
action GotoLocation {
    template :: "go to [{f.name | stands(f:furniture, to:spot)}]";
    feedback :: "#arrive#";
    grammar :: """
        # So they do in here.
        {"arrive": [{"rhs": "You are at the {f.name}. #inside#"}]}
    """;
}
action OpenIt { template :: "open {f}"; feedback :: "You open the {f.name}. #inside#"; }
action CloseIt { template :: "close {f}"; feedback :: "You close {f.definite} {f.name}."; }
action TakeObject { template :: "take {t} from {f}"; feedback :: "You take the {t.name} out of the {f.name}."; }
action PutObject { template :: "PUT"; feedback :: "The {o.name} is in the {r.name}; what is behind a semicolon is dropped"; }
action HeatObject { template :: "heat {t} with {f}"; feedback :: "The {f.name} makes the {t.name} hot."; }
action UseObject {
    template :: "use {t}";
    feedback :: "#switch#";
    grammar :: """{"switch": [
        {"condition": "not_lit(t:thing)", "rhs": "Click goes the {t.name} of the {f.name}."},
        {"rhs": "Snap goes the {t.name}."}]}""";
}
action ExamineIt { template :: "examine {f}"; feedback :: "#inside# Not [{g.name | stands(g:furniture, s:spot)}]."; }
action ExamineObject {
    template :: "examine {t}";
    feedback :: "#state#";
    grammar :: """{"state": [
        {"condition": "hot(t:thing) & holds(a:agent, t:thing)", "rhs": "The {t.name} is hot in your hand."},
        {"condition": "hot(t:thing)", "rhs": "The {t.name} is hot."},
        {"condition": "not_in(t:thing, f:furniture)", "rhs": "It was in [{f.name | not_in(t:thing, f:furniture)}]."},
        {"rhs": "A {t.name}{' of sort ' + k.name | is(t:thing, k:sort)}."}]}""";
}
action look {
    template :: "look";
    feedback :: "
You see [{f.name | at(a:agent, s:spot) & stands(f:furniture, s:spot)}]. You hold [{t.name | holds(a:agent, t:thing)}].";
}
'''

THINGS = {
    "mug_bar_1": "mug",
    "mug_bar_2": "mug",
    "egg_bar__minus_00_dot_5": "egg",
    "egg_bar__plus_00_dot_5": "egg",
    "lamp_bar_1": "lamp",
    "book_bar_1": "book",
}
FURNITURE = {  # where it stands
    "table_bar_1": "spot_bar_1",
    "shelf_bar_1": "spot_bar_2",
    "shelf_bar_2": "spot_bar_2",
    "fridge_bar_1": "spot_bar_3",
    "oven_bar_1": "spot_bar_4",
    "sink_bar_1_bar_sinkbasin": "spot_bar_5",
}
PLACES = {
    "mug_bar_1": "fridge_bar_1",
    "mug_bar_2": "table_bar_1",
    "egg_bar__minus_00_dot_5": "table_bar_1",
    "egg_bar__plus_00_dot_5": "sink_bar_1_bar_sinkbasin",
    "lamp_bar_1": "shelf_bar_1",
    "book_bar_1": "table_bar_1",
}
# Folder, task, what it says, goal, walkthrough; PUT stands for the wording.
TASKS: list[tuple[str, str, str, str, list[str]]] = [
    (
        "train",
        "pick_and_place_simple-Mug-None-Shelf-1",
        "put a mug on the shelf",
        "(exists (?t - thing) (and (is ?t mugsort) (in ?t shelf_bar_1)))",
        ["go to fridge 1", "open fridge 1", "take mug 2 from fridge 1", "go to shelf 2", "PUT mug 2 shelf 2"],
    ),
    (
        "train",
        "look_at_obj_in_light-Book-None-Lamp-2",
        "look at the book under the lamp",
        "(exists (?t - thing ?l - thing) (and (is ?t booksort) (holds agent1 ?t) (lamp ?l) (used ?l)))",
        ["go to table 1", "take book 1 from table 1", "go to shelf 1", "use lamp 1"],
    ),
    (
        "train",
        "pick_heat_then_place_in_recep-Egg-None-Sink-3",
        "put a hot egg in the sink",
        "(exists (?t - thing) (and (is ?t eggsort) (hot ?t) (in ?t sink_bar_1_bar_sinkbasin)))",
        [
            "go to table 1",
            "take egg 2 from table 1",
            "go to oven 1",
            "heat egg 2 with oven 1",
            "go to sinkbasin 1",
            "PUT egg 2 sinkbasin 1",
        ],
    ),
    (
        "valid_seen",
        "pick_two_obj_and_place-Egg-None-Table-1",
        "put two eggs on the table",
        "(and (in egg_bar__minus_00_dot_5 table_bar_1) (in egg_bar__plus_00_dot_5 table_bar_1))",
        ["take egg 1 from sinkbasin 1", "go to table 1", "PUT egg 1 table 1"],
    ),
    (
        "valid_unseen",
        "pick_and_place_simple-Mug-None-Fridge-4",
        "put a book in the fridge",
        "(in book_bar_1 fridge_bar_1)",
        ["go to table 1", "take book 1 from table 1", "go to fridge 1", "open fridge 1", "PUT book 1 fridge 1"],
    ),
]
WORDINGS = {"move": "move {o} to {r}", "put": "put {o} in/on {r}"}


def game(number: int, wording: str = "move") -> dict[str, Any]:
    """One of ``TASKS`` as the publisher's files hold it."""
    _, _, task, goal, walkthrough = TASKS[number]
    template = WORDINGS[wording]
    sorts = sorted({f"{sort}sort" for sort in THINGS.values()})
    objects = {"agent1": "agent"} | dict.fromkeys(sorted(set(FURNITURE.values())), "spot")
    objects |= dict.fromkeys(FURNITURE, "furniture") | dict.fromkeys(THINGS, "thing") | dict.fromkeys(sorts, "sort")
    facts = [
        "(at agent1 spot_bar_5)",
        "(shuts fridge_bar_1)",
        "(oven oven_bar_1)",
        "(stove oven_bar_1)",
        "(lamp lamp_bar_1)",
    ]
    facts += [f"(stands {furniture} {spot})" for furniture, spot in FURNITURE.items()]
    facts += [f"(in {thing} {furniture})" for thing, furniture in PLACES.items()]
    facts += ["(in lamp_bar_1 shelf_bar_2)"]  # too, so that two actions have one command
    facts += [f"(is {thing} {sort}sort)" for thing, sort in THINGS.items()]
    declared = " ".join(f"{name} - {kind}" for name, kind in objects.items())
    problem = f"(define (problem p{number}) (:domain flat) (:objects {declared}) (:init {' '.join(facts)}) (:goal {goal}))"

    def said(command: str) -> str:
        word, *rest = command.split()
        return template.format(o=" ".join(rest[:2]), r=" ".join(rest[2:])) if word == "PUT" else command

    return {
        "pddl_domain": DOMAIN,
        "grammar": GRAMMAR.replace("TASK", task).replace("PUT", template),
        "pddl_problem": problem,
        "solvable": True,
        "walkthrough": [said(command) for command in walkthrough],
    }


def write_games(folder: Path, wording: str = "move") -> Path:
    """Writes all games below ``folder`` and returns it, to be given as ``data``."""
    for number, (split, name, *_) in enumerate(TASKS):
        path = folder / "json_2.1.1" / split / name / f"trial_{number}" / "game.tw-pddl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(game(number, wording)))
    return folder
