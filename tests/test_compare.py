"""Results on one panel, compared: intervals against slow ones, counts by hand, and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from steppo.errors import ConfigError
from steppo.panel.command import main as panel
from steppo.panel.compare import bootstrap_interval, compare, difference
from steppo.results import as_markdown, as_rich, by_golden_steps, excess_steps, outcomes_of, tables
from steppo.types import StopReason
from tests.learner.fakes import make_episode


def outcome(task: str, success: bool | None, total: float | None = None, sample: int = 0, **more: Any) -> dict[str, Any]:
    given = float(success or 0) if total is None else total
    row = {"task": task, "sample": sample, "success": success, "return": given, "steps": 5, "stop_reason": "terminated"}
    return row | more


def result(episodes: Sequence[dict[str, Any]], panel: str = "same", known: bool = True, **protocol: Any) -> dict[str, Any]:
    asked = {"player": "policy", "samples": 1, "temperature": 0.0, "max_steps": 8, "context": "StateContext"}
    return {
        "format": 1,
        "split": "valid",
        "panel": {"sha256": panel, "file": None},
        "protocol": asked | protocol,
        "model": None,
        "figures": {"episodes": len(episodes), "success_rate": 0.5 if known else None, "success_ci95": [0, 1]},
        "episodes": list(episodes),
    }


def of(successes: Sequence[bool | None], **given: Any) -> dict[str, Any]:
    return result([outcome(str(number), success) for number, success in enumerate(successes)], **given)


# ---- the interval ----


def exact_interval(values: Sequence[int]) -> tuple[float, float]:
    """2.5 and 97.5 % of the mean over *all* resamples, each as likely as the others."""
    means = sorted(Fraction(sum(drawn), len(values)) for drawn in itertools.product(values, repeat=len(values)))
    return float(means[int(0.025 * len(means))]), float(means[int(0.975 * len(means))])


@pytest.mark.parametrize("values", [[0, 0, 1, 1, -1], [1, 2, 3, 5, 9], [0, 0, 0, 0, 0, 1], [-1, 1]])
def test_the_interval_is_that_of_all_resamples(values: list[int]) -> None:
    assert bootstrap_interval(np.asarray(values, dtype=float)) == pytest.approx(exact_interval(values), abs=0.01)


def test_the_interval_is_that_of_a_loop() -> None:
    """Of pairs, with another generator; many tasks are drawn in parts."""
    rng = np.random.default_rng(3)
    a, b = rng.random(150) < 0.4, rng.random(150) < 0.5
    draw = random.Random(5)
    means = []
    for _ in range(4000):
        chosen = draw.choices(range(150), k=150)
        means.append(sum(int(b[n]) - int(a[n]) for n in chosen) / 150)
    means.sort()
    found = difference(a.astype(float), b.astype(float))
    assert found.mean == pytest.approx((b.sum() - a.sum()) / 150)
    assert (found.a, found.b) == (a.mean(), b.mean())
    assert found.interval == pytest.approx((means[100], means[3900]), abs=0.015)


def test_pairs_count_and_not_sides() -> None:
    """b is a little better on every task: sure of it, whatever the tasks."""
    a = np.linspace(0, 1, 20)
    low, high = difference(a, a + 0.1).interval
    assert low == pytest.approx(0.1) == high


# ---- counts and tasks ----


def test_who_solved_what() -> None:
    found = compare(of([True, True, False, False, False]), of([True, False, True, True, False]))
    assert found.counts == {"both": 1, "only a": 1, "only b": 2, "neither": 1}
    assert found.success is not None
    assert (found.tasks, found.success.a, found.success.b, found.success.mean) == (5, 0.4, 0.6, pytest.approx(0.2))
    assert found.notes == found.left_out == ()


def test_samples_of_a_task_are_averaged_first() -> None:
    """A task with more samples counts no more."""
    a = result(
        [outcome("x", True, sample=0), outcome("x", False, sample=1), outcome("x", False, sample=2), outcome("y", True)]
    )
    found = compare(a, of([]) | {"episodes": [outcome("y", False), outcome("x", True)]})
    assert found.success is not None
    assert found.success.a == pytest.approx((1 / 3 + 1) / 2)
    assert found.success.mean == pytest.approx((2 / 3 - 1) / 2)
    assert found.counts == {"both": 0, "only a": 1, "only b": 1, "neither": 0}


def test_tasks_that_failed_are_left_out_and_told() -> None:
    a = of([True, True, False])
    a["episodes"][1]["stop_reason"] = "env_error"
    found = compare(a, of([True, False, False]))
    assert (found.tasks, found.left_out) == (2, ("1",))
    a["episodes"] = [row | {"stop_reason": "aborted"} for row in a["episodes"]]
    with pytest.raises(ConfigError, match="no task with a healthy episode on both sides"):
        compare(a, of([True, False, False]))


def test_without_a_verdict_returns_are_compared() -> None:
    found = compare(of([None, None], known=False), of([True, False]))
    assert (found.success, found.counts, found.by_return.mean) == (None, {}, 0.5)


# ---- what may be compared ----


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (of([True]), of([True], panel="other"), "two panels .* with the same task ids, but another content or order"),
        (of([True]), of([True, False], panel="other"), "two panels .* with other tasks"),
        (of([True]), of([True], temperature=1.0), "at temperature 0.0 cannot be compared with one at temperature 1.0"),
    ],
)
def test_what_cannot_be_compared(a: dict[str, Any], b: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compare(a, b)


def test_what_may_differ_is_told() -> None:
    a = of([True], max_steps=20)
    b = of([True], max_steps=50, context="AppendContext", player="expert", temperature=None, seed=3)
    assert compare(a, b).notes == ("max_steps is 20 in a and 50 in b", "context is StateContext in a and AppendContext in b")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, successes in (("a", [True, False, False]), ("b", [True, True, False])):
        (tmp_path / f"{name}.json").write_text(json.dumps(of(successes, max_steps=len(name + "x" * (name == "b")))))
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    panel(["compare", *paths, f"--out={tmp_path}/difference.json"])
    text = capsys.readouterr().out
    assert "not played alike: max_steps is 1 in a and 2 in b" in text
    assert "+0.333" in text
    assert "solved by both 1, only a 0, only b 1, neither 1" in text
    found = json.loads((tmp_path / "difference.json").read_text())
    assert found["success"]["mean"] == pytest.approx(1 / 3)
    (tmp_path / "b.json").write_text(json.dumps(of([True]) | {"episodes": [{"task": "0"}]}))
    with pytest.raises(SystemExit):
        panel(["compare", *paths])
    assert "b.json is not the JSON that an evaluation wrote" in capsys.readouterr().err


# ---- figures of a result ----

GOLDEN = [
    outcome("a", True, info={"golden_steps": 3.0}),
    outcome("b", True, info={"golden_steps": 5.0}),
    outcome("c", False, info={"golden_steps": 5.0}),
    outcome("d", True, info={"golden_steps": 3.0}, steps=3),
    outcome("e", True, info={"golden_steps": "many"}),
    outcome("f", True),
    outcome("g", True, info={"golden_steps": 3.0}, stop_reason="env_error"),
]


def test_by_golden_steps_by_hand() -> None:
    found = by_golden_steps(GOLDEN, known=True)
    assert list(found) == ["3", "5"]
    assert [(row["episodes"], row["success_rate"], row["excess_steps"]) for row in found.values()] == [
        (2, 1.0, 1.0),
        (2, 0.5, 0.0),
    ]
    assert excess_steps(GOLDEN) == pytest.approx(2 / 3)
    assert excess_steps(GOLDEN[2:3]) is None
    assert by_golden_steps(GOLDEN[2:3], known=False)["5"] == {
        "episodes": 1,
        "success_rate": None,
        "success_ci95": None,
        "excess_steps": None,
    }


def test_outcomes_are_in_the_panels_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever process played them."""
    episodes = [make_episode(order, [1, 1]) for order in (5, 0, 3)]
    found = outcomes_of(episodes, samples=2)
    parts: list[Any] = []
    monkeypatch.setattr("steppo.results.gather_to_first", lambda item: [*parts, parts.append(item)][:-1])
    for share in (episodes[:1], episodes[1:]):
        outcomes_of(share, samples=2)
    monkeypatch.setattr("steppo.results.gather_to_first", lambda item: parts)
    assert outcomes_of([], samples=2) == found
    assert [row["sample"] for row in found] == [0, 1, 1]
    assert [row["task"] for row in found] == [episodes[place].task_id for place in (1, 2, 0)]
    assert {row["stop_reason"] for row in found} <= {str(reason) for reason in StopReason}


def test_markup_in_labels_is_text() -> None:
    played = of([True])
    part = {"episodes": 1, "success_rate": 1.0, "success_ci95": [0.2, 1.0], "return_mean": 1.0}
    played["figures"] |= {"return_mean": 1.0, "steps_mean": 2.0, "by_label": {"type": {"[red]|x": part}}}
    assert [table.title for table in tables(played)] == ["", "By type"]
    assert tables(played)[1].rows == [("[red]|x", "1", "1.000 [0.200, 1.000]", "1")]
    console = Console(file=io.StringIO(), width=80)
    console.print(as_rich(tables(played)[1]))
    assert "[red]|x" in console.file.getvalue()  # type: ignore[attr-defined]
    played["panel"] |= {"version": "", "differences": []}
    assert "| [red]\\|x | 1 | 1.000 [0.200, 1.000] | 1 |\n" in as_markdown(played)
