"""Environments that return what nobody should: no exception, and every wrong value costs its episode and is named.

    pip install -c constraints.txt -e .[test]
    python benchmarks/fuzz_environments.py

Hypothesis draws what ``reset``, ``step`` and ``expert_action`` return, field by field, from right and wrong values. Each
draw is an episode beside a healthy one, played by ``EnvSource`` with an environment in this process. Writes
``benchmarks/results/fuzz_environments.json`` and prints a table. Takes about three minutes.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import fractions
import hashlib
import json
import os
import pickle
import platform
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import psutil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steppo.engines import HFEngine
from steppo.envs import Env
from steppo.envs.checks import MOST_REWARD, EnvReply
from steppo.envs.pool import EnvPool
from steppo.envs.worker import play as play_turn
from steppo.errors import located
from steppo.metrics import EpisodeStatistics
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, ParsedAction, StateContext
from steppo.rollouts import EnvSource, ScriptedPlayer
from steppo.types import Action, Episode, Message, RolloutConfig, StopReason, Task, ToolCall, Turn, groups_of

ROOT = Path(__file__).parent.parent


# ---- what is drawn ----


def _no(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("do not touch \ud800")


class Hostile:
    """Raises at whatever is done with it."""

    __repr__ = __str__ = __eq__ = __len__ = __iter__ = __bool__ = __float__ = __getitem__ = __hash__ = __reduce_ex__ = _no


class HostileList(list):
    __iter__ = __len__ = __getitem__ = _no


class HostileMapping(dict):
    get = __getitem__ = __contains__ = _no


class MyText(str):
    """Text of a class of its own is right; what it would do differently is never asked for."""

    __str__ = __repr__ = encode = __len__ = __format__ = _no


class Property(Turn):
    def __getattribute__(self, name: str) -> Any:
        return _no() if name == "goal" else super().__getattribute__(name)


class Unsendable(Turn):
    __reduce_ex__ = _no


def _generator() -> Any:
    yield "look"


ANYTHING_ELSE: st.SearchStrategy[Any] = st.one_of(
    st.builds(object),
    st.builds(Hostile),
    st.just(lambda: None),
    st.builds(_generator),
    st.sampled_from([b"look", 2j, ..., int, decimal.Decimal(1), np.array(["look"]), np.zeros(2), np.array(1.0)]),
    st.builds(lambda: np.datetime64("2026-01-01")),
    st.builds(lambda: 10**5000),
)
SURROGATE = st.builds("{}{}{}".format, st.text(max_size=3), st.sampled_from(["\ud800", "\udfff"]), st.text(max_size=3))
TEXT = st.one_of(st.text(max_size=20), st.text(max_size=5).map(MyText), st.text("ab", max_size=5).map(np.str_))
NO_TEXT = st.one_of(
    ANYTHING_ELSE, SURROGATE, st.none(), st.integers(), st.floats(), st.lists(st.text(max_size=3), max_size=2), st.booleans()
)
BOOLEAN = st.one_of(st.booleans(), st.booleans().map(np.bool_))
NO_BOOLEAN = st.one_of(
    ANYTHING_ELSE,
    st.integers(-1, 2),
    st.sampled_from(["no", "False", "", 0.0, 1.0, np.int64(1), np.nan, (), [True], {True}, np.array(True)]),
)
MANY_TEXTS = st.lists(TEXT, max_size=3)
NO_LIST = st.one_of(
    ANYTHING_ELSE,
    st.just("yes"),
    st.sets(st.text(max_size=3)),
    st.dictionaries(st.text(max_size=2), st.none(), max_size=2),
    st.integers(),
    st.booleans(),
    st.builds(HostileList),
    st.just(collections.deque(["look"])),
)
ROLE = st.sampled_from(["user", "tool", MyText("tool"), np.str_("user")])
MESSAGES = st.lists(st.builds(Message, ROLE, TEXT, TEXT, st.booleans()), max_size=2)
NO_MESSAGE = st.one_of(
    NO_TEXT,
    st.text(max_size=3),
    st.just({"role": "tool", "content": "none"}),
    st.builds(Message, st.one_of(NO_TEXT, st.sampled_from(["system", "assistant", "", "User"])), TEXT),
    st.builds(Message, ROLE, NO_TEXT),
    st.builds(Message, ROLE, TEXT, NO_TEXT),
)
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(-1e30, 1e30), TEXT)
ARGUMENTS = st.dictionaries(TEXT, st.one_of(PLAIN, st.lists(PLAIN, max_size=2)), max_size=2)
NO_ARGUMENTS = st.one_of(
    NO_TEXT,
    st.dictionaries(st.text(max_size=2), st.one_of(ANYTHING_ELSE, SURROGATE, st.just(np.nan)), min_size=1, max_size=2),
    st.builds(HostileMapping, st.just({"what": 1})),
)
CALLS = st.lists(st.builds(ToolCall, TEXT, ARGUMENTS, TEXT), max_size=2)
NO_CALL = st.one_of(
    NO_TEXT,
    st.builds(ToolCall, NO_TEXT, ARGUMENTS),
    st.builds(ToolCall, TEXT, NO_ARGUMENTS),
    st.builds(ToolCall, TEXT, ARGUMENTS, NO_TEXT),
)
NOT_NONE = NO_TEXT.filter(lambda value: value is not None)
ACTION = st.one_of(st.none(), TEXT, st.builds(Action, st.one_of(st.none(), TEXT), CALLS, TEXT, TEXT))
NO_ACTION = st.one_of(
    NOT_NONE,
    st.builds(Action, NOT_NONE),
    st.builds(Action, st.none(), st.one_of(NO_LIST, st.lists(NO_CALL, min_size=1, max_size=2))),
    st.builds(Action, st.none(), CALLS, NO_TEXT),
    st.builds(Action, TEXT, CALLS, TEXT, NO_TEXT),
)

# Of each field: right values, wrong values.
FIELDS: dict[str, tuple[st.SearchStrategy[Any], st.SearchStrategy[Any]]] = {
    "text": (TEXT, NO_TEXT),
    "goal": (TEXT, NO_TEXT),
    "feedback": (TEXT, NO_TEXT),
    "commands": (
        st.one_of(st.none(), MANY_TEXTS, MANY_TEXTS.map(tuple)),
        st.one_of(NO_LIST, st.lists(NO_TEXT, min_size=1, max_size=2)),
    ),
    "messages": (
        st.one_of(MESSAGES, MESSAGES.map(tuple)),
        st.one_of(NO_LIST, st.none(), st.just(Message("tool", "none")), st.lists(NO_MESSAGE, min_size=1, max_size=2)),
    ),
    "state_key": (st.one_of(st.none(), TEXT), NOT_NONE),
    "expert_action": (ACTION, NO_ACTION),
    "reward": (
        st.one_of(
            st.floats(-MOST_REWARD, MOST_REWARD),
            st.integers(-(10**12), 10**12),
            BOOLEAN,
            st.floats(-1, 1).map(np.float32),
            st.integers(-9, 9).map(np.int8),
            st.just(fractions.Fraction(1, 3)),
        ),
        st.one_of(
            ANYTHING_ELSE,
            st.sampled_from([np.nan, np.inf, -np.inf, 1.7e308, -1e39, 1e20, 2e12, 10**400, -(10**13), np.float32("inf")]),
            st.floats(min_value=1e13),
            st.sampled_from(["1.0", None, [1.0], (), {}, np.complex64(1), np.longdouble("1e300"), np.timedelta64(1, "s")]),
        ),
    ),
    "terminated": (BOOLEAN, st.one_of(NO_BOOLEAN, st.none())),
    "truncated": (BOOLEAN, st.one_of(NO_BOOLEAN, st.none())),
    "success": (st.one_of(BOOLEAN, st.none()), NO_BOOLEAN),
    "action_valid": (BOOLEAN, st.one_of(NO_BOOLEAN, st.none())),
    "other": (
        st.one_of(
            st.none(),
            BOOLEAN,
            st.integers(-(10**30), 10**30),
            st.floats(-1e30, 1e30),
            st.sampled_from([np.float32(0.5), np.int8(3), np.str_("look"), "", "\n", "x" * 256]),
        ),
        st.one_of(
            st.sampled_from([np.nan, -np.inf, 1e31, 10**400, "x" * 257, "\ud800", b"look", np.ones(2), 1j, lambda: None]),
            st.lists(st.integers(), max_size=2),
            st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
        ),
    ),
    "info": (
        st.sampled_from([dict, collections.OrderedDict, collections.UserDict, types.MappingProxyType]),
        st.one_of(
            ANYTHING_ELSE,
            st.none(),
            st.text(max_size=3),
            st.lists(st.text(max_size=2), max_size=2),
            st.builds(HostileMapping),
            st.sampled_from([{"success": True}, {"action_valid": None}, collections.UserDict(success="no")]),
        ),
    ),
    "turn": (  # what is around all
        st.just(Turn),
        st.one_of(
            ANYTHING_ELSE,
            st.sampled_from([None, "look", {"text": ""}, Action("look"), (), (Turn(), {}), ("", 0.0, False, False, {})]),
            st.builds(Property),
            st.builds(Unsendable),
        ),
    ),
    "expert": (ACTION, NO_ACTION),
}
# What the fields of an action's outcome are before the first.
NOTHING = {"reward": 0.0, "terminated": False, "truncated": False}
# What the error may call the field.
NAMES = {"other": 'info["other"]', "expert": "expert_action", "turn": "{method} must return"}
NAMES_OF_TURNS: dict[Any, str] = {Property: "goal", Unsendable: "turn"}


@dataclass(frozen=True, eq=False)
class Draw:
    """What an environment returns, and which of it is wrong."""

    method: str
    values: dict[str, Any]
    wrong: frozenset[str]
    want_expert: bool

    def answer(self) -> Any:
        """Of ``reset`` or ``step``."""
        value = self.values
        if "turn" in self.wrong:
            return value["turn"]
        info = value["info"] if "info" in self.wrong else value["info"]({"other": value["other"]})
        names = {field.name for field in dataclasses.fields(Turn)} - {"info"}
        return value["turn"](info=info, **{name: value[name] for name in names})

    def faults(self) -> set[str]:
        """Those of the wrong fields that are looked at: some of them the error must name; empty if the answer is right."""
        wrong = set(self.wrong)
        if "turn" in wrong:
            return {"turn"}
        if "info" in wrong:
            wrong -= {"other"}
        outcome = {name for name in NOTHING if name not in wrong and float(self.values[name])}
        if self.method == "reset":
            wrong |= outcome
        if not self.want_expert or (wrong | outcome) & {"terminated", "truncated"}:
            wrong -= {"expert"}  # it is not asked for, or something else was wrong before
        return wrong

    def name(self, field: str) -> str:
        """What the error may call it."""
        if field == "turn" and (kind := type(self.values["turn"])) in NAMES_OF_TURNS:
            return NAMES_OF_TURNS[kind]
        return NAMES.get(field, field).format(method=self.method)


@st.composite
def draws(draw: Callable[..., Any]) -> Draw:
    """Half of them all right, the others wrong in one to three fields. Most starts bring nothing and end nothing."""
    wrong = frozenset(draw(st.one_of(st.just(set()), st.sets(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3))))
    values = {name: draw(FIELDS[name][name in wrong]) for name in FIELDS}
    method = draw(st.sampled_from(("reset", "step")))
    if method == "reset" and draw(st.integers(0, 4)):
        values |= {name: nothing for name, nothing in NOTHING.items() if name not in wrong}
    return Draw(method, values, wrong, draw(st.booleans()))


# ---- how it is played ----


class DrawnEnv(Env):
    """Returns what was drawn, then ends; tasks that nothing was drawn for are healthy."""

    max_steps = 3
    drawn: Draw  # set for one draw at a time: most of what is drawn does not pickle

    def tasks(self, split: str) -> list[Task]:
        return [Task("drawn"), Task("healthy")]

    def reset(self, task: Task) -> Any:
        self._task, self._steps = task, 0
        return self.drawn.answer() if self._now("reset") else Turn("Here.", success=False)

    def step(self, action: Action) -> Any:
        self._steps += 1
        if self._steps == 1 and self._now("step"):
            return self.drawn.answer()
        return Turn("There.", reward=1.0, terminated=self._steps == 2, success=True)

    def expert_action(self) -> Any:
        now = self._now(self.drawn.method) and self._steps == (self.drawn.method == "step")
        return self.drawn.values["expert"] if now else "look"

    def _now(self, method: str) -> bool:
        return self._task.id == "drawn" and self.drawn.method == method


class HerePool(EnvPool):
    """As its workers would, in this process."""

    def __init__(self) -> None:
        self._envs: dict[int, DrawnEnv] = {}
        self._answers: dict[int, EnvReply] = {}
        self._experts: dict[int, bool] = {}
        self.counts = Counter()

    def reset(self, slot: int, task: Task, want_expert: bool = False) -> None:
        self._experts[slot] = want_expert
        self._envs[slot] = DrawnEnv()
        self._take(slot, task, [])

    def step(self, slot: int, action: Action) -> None:
        self._take(slot, None, [action])

    def _take(self, slot: int, task: Task | None, actions: list[Action]) -> None:
        try:
            turn = play_turn(self._envs[slot], task, actions, self._experts[slot], lambda: None)
            answer = pickle.dumps(EnvReply(turn))
        except BaseException as error:
            answer = pickle.dumps(EnvReply(error=located(error)))
        self._answers[slot] = pickle.loads(answer)

    def receive(self, slot: int) -> EnvReply:
        return self._answers.pop(slot)

    async def answer(self, slot: int) -> EnvReply:
        return self.receive(slot)

    def release(self, slot: int) -> None:
        """There is nothing to play again."""

    def close(self) -> None:
        """There is no process."""


class Look(ActionParser):
    """Whatever is said means the same."""

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        return ParsedAction(Action("look"))


def make_source() -> EnvSource:
    """Plays ``DrawnEnv`` without a process and without a model."""
    source = EnvSource(DrawnEnv(), StateContext(), HFEngine(), Look(), max_prompt_tokens=10**6)
    bytewise = TinyPolicy()
    bytewise.build(list)
    source.bind_tokenizer(bytewise.tokenizer, bytewise.stop_ids)
    source._pool = HerePool()
    return source


def play(source: EnvSource, draw: Draw) -> Episode:
    """The episode of a draw. Asserts that it is lost and named if it is wrong, and that the one beside it is as ever."""
    DrawnEnv.drawn = draw
    groups = groups_of(source.tasks("train"))
    config = RolloutConfig("train/0", seed=0, want_expert=draw.want_expert)
    player = ScriptedPlayer(lambda *asked: "look", source.write)
    episodes = {episode.task_id: episode for group in source.collect(groups, config, player) for episode in group}
    healthy, drawn = episodes["healthy"], episodes["drawn"]
    assert [step.reward for step in healthy.steps] == [1.0, 1.0]
    assert (healthy.stop_reason, healthy.success) == (StopReason.TERMINATED, True)

    faults = draw.faults()
    if faults:
        assert drawn.stop_reason == StopReason.ENV_ERROR, (faults, drawn)
        names = [draw.name(field) for field in faults]
        assert any(f"the environment's {name}" in drawn.error for name in names), (names, drawn.error)
        assert len(drawn.error) < 800
        drawn.error.encode()
    else:
        assert not drawn.stop_reason.failed, drawn.error
        assert drawn.success is None or type(drawn.success) is bool

    statistics = EpisodeStatistics()
    for episode in episodes.values():  # what learning does with them
        statistics.update(episode)
        for step in episode.steps:
            hashlib.blake2b(f"{step.observation}{step.state_key}{step.action}".encode())
            assert type(step.reward) is float
            assert np.isfinite(np.float32(step.reward) ** 2)
            assert type(step.action_valid) is bool
    assert statistics.compute()["errors"] == bool(faults)
    for text in source.tokenizer_texts(source.tasks("train")):
        text.encode()
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz_environments.json")
    args = parser.parse_args()

    source, wrong, played = make_source(), Counter[str](), Counter[str]()

    @hypothesis.seed(args.seed)
    @settings(max_examples=args.draws, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(draws())
    def all_draws(draw: Draw) -> None:
        played["right" if not draw.faults() else "wrong"] += 1
        wrong.update(draw.faults())
        play(source, draw)

    start = time.process_time()
    all_draws()
    seconds = time.process_time() - start
    print(f"{played.total()} draws, seed {args.seed}, {seconds:.0f} s: {played['right']} right, {played['wrong']} wrong")
    for name in FIELDS:
        print(f"{name:20} {wrong[name]:6d} times wrong")
    report = {
        "command": " ".join(["python benchmarks/fuzz_environments.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total // 2**30} GiB, {platform.machine()}",
        "python": platform.python_version(),
        "seed": args.seed,
        "draws": played.total(),
        "right": played["right"],
        "wrong": played["wrong"],
        "wrong_by_field": {name: wrong[name] for name in FIELDS},
        "exceptions": 0,  # one would have ended the script
        "cpu_seconds": round(seconds, 1),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
