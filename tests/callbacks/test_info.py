"""What an environment says beside the reward: in steps, transcripts, curves and evaluations, over all ranks."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steppo.envs.checks import LONGEST_LABEL, MOST_ENTRIES, checked_episode, checked_turn, opening_turn
from steppo.metrics import info_figures, wilson_interval
from steppo.rendering import ActionParser, ParsedAction
from steppo.types import Action, Episode, StopReason, Turn
from tests.cli_helpers import evaluations, run, same, weights
from tests.test_metrics import make_episode

NAMES = ["distance", "left", "moved", "odd one/s"]


def records(folder: Path, kind: str = "valid") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "transcripts.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def means(played: list[dict[str, Any]]) -> dict[str, float]:
    """Of figures, over the episodes that have them."""
    found = {}
    for name in sorted({name for record in played for name in record.get("info", {})}):
        values = [
            record["info"][name] for record in played if name in record["info"] and record["stop_reason"] != "env_error"
        ]
        if not isinstance(values[0], str):
            found[name] = sum(values) / len(values)
    return found


# ---- as a user meets it ----


class SomeParser(ActionParser):
    """Reads some command into any text: random weights play, too."""

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        commands = turn.commands or ()
        return ParsedAction(Action(commands[sum(text.encode()) % len(commands)]))


OPTIONS = [
    "--data.source.env=tests.info_env.InfoEnv",
    '--data.source.env.fail_tasks=["corridor/valid/1","corridor/train/1"]',
    "--data.source.parser=tests.callbacks.test_info.SomeParser",
    "--trainer.max_epochs=1",
    "--warm_start.updates=0",
    "--evaluation.temperature=1",
    "--evaluation.samples=3",
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("told")
    run(folder, *OPTIONS)
    return folder


def test_steps_and_episodes_in_transcripts_have_it(told: Path) -> None:
    played = records(told) + records(told, "train")
    assert played
    for record in played:
        for step in record["steps"]:
            assert step["info"] == {
                "left": step["info"]["left"],
                "moved": step["action"] != "take",
                "last": step["action"],
            }
        assert record["info"]["type"] == ("near" if record["info"]["distance"] == 1 else "far")
        assert record["info"]["left"] == record["steps"][-1]["info"]["left"]
        assert ("odd one/s" in record["info"]) == ("kind \u00e9" in record["info"]) == (int(record["task"][-1]) % 2 == 1)


def test_figures_are_curves_and_lines_of_evaluations(told: Path) -> None:
    figures = EventAccumulator(str(told)).Reload()
    for prefix, kind in (("rollout", "train"), ("val", "valid")):
        tags = [tag for tag in figures.Tags()["scalars"] if tag.startswith(f"{prefix}/info/")]
        assert sorted(tags) == [f"{prefix}/info/{name}" for name in NAMES]
        expected = means([record for record in records(told, kind) if record["iteration"] == 1])
        for name in NAMES:
            assert figures.Scalars(f"{prefix}/info/{name}")[-1].value == pytest.approx(expected[name])
    for line in evaluations(told):
        assert line["errors"] == 3
        assert line["info"] == pytest.approx(means([r for r in records(told) if r["iteration"] == line["iteration"]]))


def test_labels_have_success_and_return_by_value(told: Path) -> None:
    for line in evaluations(told):
        played = [r for r in records(told) if r["iteration"] == line["iteration"] and r["stop_reason"] != "env_error"]
        assert set(line["by_label"]) == {"type", "kind \u00e9", "last"}
        assert sum(row["episodes"] for row in line["by_label"]["type"].values()) == line["episodes"] == 21
        assert line["by_label"]["last"]["take"]["success_rate"] > 0
        for name, rows in line["by_label"].items():
            for value, row in rows.items():
                of = [record for record in played if record["info"].get(name) == value]
                assert row["episodes"] == len(of)
                assert row["success_rate"] == pytest.approx(sum(record["success"] for record in of) / len(of))
                assert row["return_mean"] == pytest.approx(sum(record["return"] for record in of) / len(of))


def test_what_says_nothing_changes_no_record_and_what_speaks_no_number(told: Path, tmp_path: Path) -> None:
    run(tmp_path, *OPTIONS, "--data.source.env.says=none")
    beside = {"info", "by_label"}
    tags, silent = [EventAccumulator(str(folder)).Reload().Tags()["scalars"] for folder in (told, tmp_path)]
    assert silent == [tag for tag in tags if "/info/" not in tag]
    for one, other in zip(evaluations(told), evaluations(tmp_path), strict=True):
        assert other.keys() == one.keys() - beside
        assert {**one, **other, "seconds": 0} == {**one, "seconds": 0}
    for kind in ("train", "valid"):
        for one, other in zip(records(told, kind), records(tmp_path, kind), strict=True):
            steps = [{name: value for name, value in step.items() if name != "info"} for step in one["steps"]]
            assert other == {name: value for name, value in (one | {"steps": steps}).items() if name != "info"}
    assert same(weights(told), weights(tmp_path))


# ---- figures ----


def of(order: int, info: dict[str, Any], success: bool | None = None, failed: bool = False) -> Episode:
    reason = StopReason.ENV_ERROR if failed else StopReason.TERMINATED
    return replace(make_episode([float(order)], reason, success), order=order, metadata=info)


EPISODES = [
    of(0, {"f1": 0.1, "type": "a"}, True),
    of(1, {"f1": 0.2, "done": True, "mixed": 3}, False),
    of(2, {"f1": 1e30, "type": "b", "done": False}),
    of(3, {"f1": -1e30, "type": "a", "mixed": "text"}, False),
    of(4, {}, True),
    of(5, {"f1": 7.0, "type": "c", "other": 1.0}, True, failed=True),
]


def test_figures_of_hand_made_episodes() -> None:
    means, by_label = info_figures(EPISODES)
    assert means == {"done": 0.5, "f1": math.fsum([0.1, 0.2]) / 4, "mixed": 3.0}
    none_of_one = list(wilson_interval(0, 1))
    assert by_label == {
        "mixed": {"text": {"episodes": 1, "success_rate": 0.0, "success_ci95": none_of_one, "return_mean": 3.0}},
        "type": {
            "a": {
                "episodes": 2,
                "success_rate": 0.5,
                "success_ci95": list(wilson_interval(1, 2)),
                "return_mean": 1.5,
            },
            "b": {"episodes": 1, "success_rate": 0.0, "success_ci95": none_of_one, "return_mean": 2.0},
        },
    }
    assert info_figures(EPISODES[4:]) == info_figures([]) == ({}, {})
    unknown = {"episodes": 2, "success_rate": None, "success_ci95": None, "return_mean": 1.5}
    assert info_figures(EPISODES, known=False)[1]["type"]["a"] == unknown


@pytest.mark.parametrize("ranks", itertools.product((0, 1), repeat=4), ids=str)
def test_however_episodes_fall_to_ranks_the_figures_are_the_same(
    ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[Any] = []

    def sent(item: Any) -> list[Any]:
        parts.append(item)
        return [item]

    expected = info_figures(EPISODES)
    monkeypatch.setattr("steppo.metrics.gather", sent)
    for rank in (0, 1):
        info_figures([episode for episode, of in zip(EPISODES[:4], ranks, strict=True) if of == rank])
    monkeypatch.setattr("steppo.metrics.gather", lambda item: parts)
    assert info_figures([]) == expected


def test_a_label_that_is_never_the_same_has_its_most_common_values() -> None:
    many = [of(number, {"id": str(number % 70)}) for number in range(100)]
    rows = info_figures(many)[1]["id"]
    assert len(rows) == 50
    assert {value for value, row in rows.items() if row["episodes"] == 2} == {str(number) for number in range(30)}


# ---- the seam ----


def test_what_is_right_comes_through_as_plain_values() -> None:
    given = {
        np.str_("score"): np.float32(0.5),
        "n": np.int64(3),
        "big": 10**30,
        "yes": np.bool_(True),
        "label": np.str_("x" * LONGEST_LABEL),
        "lines": "a\n\u00e9",
        "none": None,
        "x" * 64: True,
    }
    info = checked_turn(Turn(info=given)).info
    assert info == opening_turn(Turn(info=given)).info
    assert info == {str(name): value for name, value in given.items() if value is not None} | {"big": 1e30}
    assert {type(value) for value in info.values()} == {float, bool, str}
    assert {type(name) for name in info} == {str}
    most = {str(number): number for number in range(MOST_ENTRIES)}
    assert len(checked_turn(Turn(info=most)).info) == MOST_ENTRIES


WRONG: dict[str, tuple[Any, str]] = {
    "list": ({"rooms": [1]}, '["rooms"] must be a number, True, False, a text or None, not a list'),
    "nan": ({"f1": math.nan}, '["f1"] must be finite and at most 1e+30 in size, not nan'),
    "key": ({7: 1.0}, "must be a string, not 7"),
    "many": ({str(number): number for number in range(33)}, "may have 32 entries, not more"),
    "no mapping": (7, "AttributeError"),
    "long": ({"type": "x" * 1000}, '["type"] must have at most 256 characters, not 1000'),
}


@pytest.mark.parametrize("where", ["step", "episode"])
@pytest.mark.parametrize("name", WRONG)
def test_metadata_of_other_sources_is_held_to_the_same(name: str, where: str) -> None:
    wrong, message = WRONG[name]
    episode = replace(make_episode([1.0, 1.0, 1.0]), metadata={"f1": np.float32(0.5)})
    if where == "episode":
        episode = replace(episode, metadata=wrong)
    else:
        steps = [replace(step, metadata=wrong) if step.index == 2 else step for step in episode.steps]
        episode = replace(episode, steps=tuple(steps))
    checked = checked_episode(episode)
    assert checked.stop_reason == StopReason.ENV_ERROR
    assert message in checked.error
    assert len(checked.steps) == (0 if where == "episode" else 2)
    assert checked.info == ({} if where == "episode" else {"f1": 0.5})


@pytest.mark.parametrize("give", [dict, lambda given: given | {"none": None}])
def test_metadata_of_other_sources_that_is_right(give: Callable[[dict[str, Any]], Any]) -> None:
    episode = make_episode([1.0, 1.0])
    first, second = episode.steps
    episode = replace(
        episode, steps=(first, replace(second, metadata=give({"a": np.int8(1)}))), metadata=give({"a": 2, "b": "x"})
    )
    checked = checked_episode(episode)
    assert checked.error == ""
    assert checked.info == {"a": 1.0, "b": "x"}
    assert checked_episode(replace(episode, steps=(first, replace(second, metadata={"a": None})))).info == {
        "a": 2.0,
        "b": "x",
    }
