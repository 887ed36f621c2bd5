"""GymnasiumEnv, with environments of Gymnasium and of tests/gym_env.py."""

from __future__ import annotations

import itertools
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from steppo.envs import GymnasiumEnv
from steppo.envs.checks import MOST_ENTRIES, checked_turn, opening_turn
from steppo.envs.gymnasium import readable
from steppo.errors import ConfigError, WrongValue
from steppo.types import Task, Turn
from tests.cli_helpers import evaluations, run

LAKE: dict[str, Any] = {"id": "FrozenLake-v1", "observation": "ansi", "commands": ["left", "down", "right", "up"]}
ICE = LAKE | {"kwargs": {"is_slippery": False}, "success_reward": 1.0, "goal": "Reach G."}
TAXI: dict[str, Any] = {
    "id": "Taxi-v4",
    "observation": "ansi",
    "commands": ["south", "north", "east", "west", "pick up", "drop off"],
    "colours": {"blue": "passenger", "magenta": "destination"},
    "success_reward": -100,
}
CLIFF: dict[str, Any] = {"id": "CliffWalking-v1", "observation": "ansi", "kwargs": {"max_episode_steps": 9}}
GUESS: dict[str, Any] = {"id": "tests.gym_env:Guess-v0"}


def play(env: GymnasiumEnv, commands: list[str], task: Task | None = None) -> list[Turn]:
    """All turns, as they pass the checks."""
    turns = [opening_turn(env.reset(task or env.tasks("train")[0]))]
    return turns + [checked_turn(env.command(command)) for command in commands]


def test_the_lake_is_crossed() -> None:
    env = GymnasiumEnv(**ICE)
    turns = play(env, ["down", "down", "right", "right", "down", "right"])
    assert turns[0].text == "[S]FFF\nFHFH\nFFFH\nHFFG"
    assert turns[0].goal == turns[-1].goal == "Reach G."
    assert turns[0].commands == ("left", "down", "right", "up")
    assert turns[-1].text == "  (Right)\nSFFF\nFHFH\nFFFH\nHFF[G]"
    assert [turn.state_key for turn in turns] == ["0", "4", "8", "9", "10", "14", "15"]
    outcomes = [(turn.reward, turn.terminated, turn.success) for turn in turns]
    assert outcomes == [(0.0, False, False)] * 6 + [(1.0, True, True)]
    assert not any(turn.truncated for turn in turns)
    fallen = play(env, ["right", "down"])[-1]
    assert (fallen.terminated, fallen.success, fallen.reward) == (True, False, 0.0)


def test_taxi_shows_what_is_possible_and_what_colours_mean() -> None:
    env = GymnasiumEnv(**TAXI)
    opening, refused, east = play(env, ["west", "east"], Task("", {"seed": 3}))
    assert opening.text.splitlines()[1] == "|R: |[ ]: :G|"
    assert opening.text.splitlines()[-2:] == ["passenger: R", "destination: Y"]
    assert opening.commands == ("south", "east")
    assert (refused.action_valid, refused.text, refused.commands) == (False, opening.text, opening.commands)
    assert refused.feedback == "'west' is not possible here."
    assert east.text.splitlines()[1] == "|R: | :[ ]:G|", "what was refused did nothing"
    assert east.info == {"prob": 1.0}


def test_a_ride_is_over_when_the_passenger_is_there() -> None:
    env = GymnasiumEnv(**TAXI)
    way = [*["south"] * 2, *["west"] * 2, *["north"] * 2, "pick up", *["south"] * 4, "drop off"]
    turns = play(env, way, Task("", {"seed": 3}))
    assert turns[8].text.splitlines()[2] == "|[_]: | : : |"
    assert turns[8].text.splitlines()[-2:] == ["  (South)", "destination: Y"], "there is no passenger to fetch"
    assert [turn.success for turn in turns] == [False] * 12 + [True], "a return of 0 at the start says nothing yet"
    assert (turns[-1].reward, turns[-1].terminated) == (20.0, True)


def test_limits_of_gymnasium_truncate() -> None:
    turns = play(GymnasiumEnv(**CLIFF), ["0"] * 9)
    assert turns[0].commands == ("0", "1", "2", "3")
    assert turns[0].text.splitlines()[-1] == "x  C  C  C  C  C  C  C  C  C  C  T"
    assert turns[1].text.splitlines()[2].startswith("x  o")
    assert [turn.truncated for turn in turns] == [False] * 9 + [True]
    assert not any(turn.terminated or turn.success is not None for turn in turns)
    assert turns[-1].reward == -1.0


def test_words_go_there_and_back() -> None:
    env = GymnasiumEnv(**GUESS, goal="Find it.")
    turns = play(env, [str(number) for number in range(10)], Task("", {"seed": 5}))
    last = next(turn for turn in turns if turn.terminated)
    assert (turns[0].text, turns[0].commands, turns[0].info, turns[0].success) == ("Guess.", None, {"of": 10.0}, None)
    assert (last.text, last.success, last.info["said"], last.state_key) == ("right", True, "right", None)
    assert [turn.success for turn in turns[1 : turns.index(last)]] == [False] * (turns.index(last) - 1)
    assert len(last.info) == MOST_ENTRIES
    assert last.info.keys() == {"guesses", "said", *(f"n{number}" for number in range(30))}


@pytest.mark.parametrize("command", ["", "x", "123", "1 ", "\u0663", "seven"])
def test_what_a_text_space_does_not_hold_is_refused(command: str) -> None:
    turns = play(GymnasiumEnv(**GUESS), [command, "0"])
    assert (turns[1].action_valid, turns[1].text) == (False, "Guess.")
    assert "is not possible here" in turns[1].feedback
    assert turns[2].info["guesses"] == 1, "it did not count"


def test_what_the_environment_refuses_itself() -> None:
    turns = play(GymnasiumEnv(**GUESS, kwargs={"refuse": "0"}), ["0", "1"])
    assert (turns[1].action_valid, turns[1].feedback) == (False, "0 has been guessed before.")
    assert turns[2].info["guesses"] == 1


def test_masks_of_numbers_from_five() -> None:
    env = GymnasiumEnv("tests.gym_env:Masked-v0", commands=["five", "six", "seven"])
    turns = play(env, ["seven", "five", "five", "six"])
    assert [turn.commands for turn in turns[:2]] == [("five", "six")] * 2
    assert turns[2].commands == turns[3].commands == ("six", "seven")
    assert [turn.action_valid for turn in turns] == [True, False, True, False, True]
    assert turns[4].commands == ("five", "six", "seven"), "nothing is possible: all are"
    with pytest.raises(WrongValue, match="has 4 entries for 3 actions"):
        env.command("seven")
    assert play(GymnasiumEnv("tests.gym_env:Masked-v0"), ["6"])[1].text == "at 6"


def test_text_without_a_space_of_it() -> None:
    assert play(GymnasiumEnv("tests.gym_env:Plain-v0"), ["1"])[0].text == "Guess."
    with pytest.raises(WrongValue, match="Guess-v0 must be text, not a bytes"):
        play(GymnasiumEnv(**GUESS, kwargs={"observe": b"Guess."}), [])


@pytest.mark.parametrize(
    ("success_reward", "steps", "success"),
    [
        (0.3, 3, True),
        (0.3, 2, False),
        (1.0, 10, True),
        (1.05, 9, False),
        (1.2, 12, True),
        (0.0, 11, False),
        (-1.0, 12, True),
    ],
)
def test_returns_that_solve(success_reward: float, steps: int, success: bool) -> None:
    """Rewards of 0.1; Gymnasium ends it after twelve."""
    env = GymnasiumEnv(**GUESS, kwargs={"verdict": False}, success_reward=success_reward)
    assert play(env, ["99"] * steps)[-1].success is success
    assert play(env, [])[0].success is False, "each episode counts anew"


@pytest.mark.parametrize("settings", [LAKE, TAXI, CLIFF, GUESS | {"commands": ["2", "5", "8"]}], ids=lambda s: s["id"])
def test_the_same_task_is_the_same_episode(settings: dict[str, Any]) -> None:
    """In a copy as workers have it, and after other tasks."""
    env = GymnasiumEnv(**settings)
    copy = pickle.loads(pickle.dumps(env))
    tasks = env.tasks("train")[:6]
    assert env.tasks("train") == copy.tasks("train")

    def episode(env: GymnasiumEnv, task: Task) -> list[Turn]:
        chance, turns = random.Random(task.id), [env.reset(task)]
        while len(turns) < 30 and not (turns[-1].terminated or turns[-1].truncated):
            turns.append(env.command(chance.choice(turns[-1].commands or ())))
        return turns

    first = [episode(env, task) for task in tasks]
    assert first == [episode(copy, task) for task in reversed(tasks)][::-1]
    assert settings["id"] == "CliffWalking-v1" or len({str(turns) for turns in first}) > 1, "seeds differ"
    env.close()
    assert first[0] == episode(env, tasks[0])
    env.close()
    env.close()


def test_splits_share_no_seed() -> None:
    env = GymnasiumEnv(**GUESS, num_train=50, num_valid=30, num_test=20)
    splits = {split: env.tasks(split) for split in ("train", "valid", "test")}
    assert {split: len(tasks) for split, tasks in splits.items()} == {"train": 50, "valid": 30, "test": 20}
    for part in (lambda task: task.id, lambda task: task.data["seed"]):
        assert len(set(map(part, itertools.chain.from_iterable(splits.values())))) == 100
    assert splits["valid"][0].id == "Guess-v0/1000000"
    with pytest.raises(ConfigError, match="no split 'dev'; it has train, valid, test"):
        env.tasks("dev")


COLOURS = {"blue": "boat", "red": "buoy"}


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        ("plain [text]\n", "plain [text]"),
        ("a\x1b[41mS\x1b[0mb", "a[S]b"),
        ("\x1b[7mS\x1b[27mb", "[S]b"),
        ("\x1b[48;5;34mS\x1b[49mb \x1b[38;5;44mc\x1b[0m \x1b[48:2:1:2:3md\x1b[m", "[S]b c [d]"),
        ("\x1b[102mab\ncd\x1b[0m", "[ab]\n[cd]"),
        ("\x1b[34;1mR\x1b[0m \x1b[35mY\x1b[0m", "R Y\nboat: R"),
        ("\x1b[94m\x1b[43mR\x1b[0m\x1b[0m \x1b[34mQ\x1b[39m.\x1b[31mX", "[R] Q.X\nboat: R, Q\nbuoy: X"),
        ("\x1b[34m  \x1b[0m|", "  |"),
        ("\n\n  a  \r\n\n b\x1b[2J\x1b[1;1H\x07\x1b]0;title\x07\x1b(B\n\n", "  a\n\n b"),
        ("\x1b[1m\x1b[;mx\x1b[38m\x1b[48my", "x[y]"),
        ("", ""),
    ],
)
def test_codes_of_terminals(picture: str, text: str) -> None:
    assert readable(picture, COLOURS) == text
    assert "\x1b" not in readable(picture, {})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "id": ({"id": "FrozenLeak-v1"}, "FrozenLeak-v1 cannot be made: NameNotFound"),
    "version": ({"id": "FrozenLake-v9"}, "FrozenLake-v9 cannot be made: VersionNotFound"),
    "module": ({"id": "no_such_module:Some-v0"}, "cannot be made: ModuleNotFoundError"),
    "argument": (ICE | {"kwargs": {"slippery": 1}}, "cannot be made: TypeError: .*slippery"),
    "value": (ICE | {"kwargs": {"map_name": "5x5"}}, "cannot be made: KeyError: '5x5'"),
    "render_mode": (ICE | {"kwargs": {"render_mode": "human"}}, "kwargs cannot hold render_mode"),
    "constructor": ({"id": "tests.gym_env:Broken-v0"}, "cannot be made: RuntimeError: no licence"),
    "actions": ({"id": "tests.gym_env:Boxed-v0"}, "actions of tests.gym_env:Boxed-v0 must be Discrete or Text, not Box"),
    "few commands": (LAKE | {"commands": ["left", "right"]}, "FrozenLake-v1 has 4 actions, and commands names 2"),
    "twice": (LAKE | {"commands": ["a", "b", "a", "c"]}, "'a' in commands must be a name of one action"),
    "empty": (LAKE | {"commands": ["a", "b", " ", "c"]}, "' ' in commands must be a name"),
    "open": (LAKE | {"commands": ["a", "b", "go [...]", "c"]}, r"'go \[...\]' in commands must be a name"),
    "not in the space": (GUESS | {"commands": ["1", "[...]", "one"]}, "cannot take 'one' of commands, only Text"),
    "no text": ({"id": "FrozenLake-v1"}, "does not observe text but 0; set observation to ansi"),
    "no text at all": ({"id": "Blackjack-v1"}, "does not observe text but a tuple; wrap it"),
    "no ansi": ({"id": "Blackjack-v1", "observation": "ansi"}, "renders no ansi, only human, rgb_array"),
    "no picture": (GUESS | {"observation": "ansi"}, "renders no ansi, only nothing"),
    "colour": (LAKE | {"colours": {"pink": "x"}}, "colours has no pink, only black, red"),
    "sizes": (LAKE | {"num_test": -1}, "a split holds 0 to 1,000,000 tasks"),
    "success": (LAKE | {"success_reward": float("nan")}, "success_reward must be finite, not nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_said_at_once(name: str) -> None:
    settings, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as error:
        GymnasiumEnv(**settings)
    assert "\n" not in str(error.value)


def test_without_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r'needs Gymnasium: pip install "steppo\[gymnasium\]"'):
        GymnasiumEnv(**LAKE)


# ---- as a user meets it ----

OPTIONS = ["--data.source.env=GymnasiumEnv", "--data.source.env.id=FrozenLake-v1", "--data.source.env.observation=ansi"]


def test_a_run_on_the_lake(tmp_path: Path) -> None:
    options = [
        "kwargs.is_slippery=false",
        "commands=[left,down,right,up]",
        "success_reward=1",
        "num_valid=3",
        "goal=Reach G.",
    ]
    settings = [f"--data.source.env.{option}" for option in options]
    limits = ["--data.source.max_steps=6", "--data.source.num_workers=2", "--trainer.max_epochs=1"]
    cli = run(tmp_path, *OPTIONS, *settings, *limits, "--warm_start.actions=random", "--evaluation.temperature=1")
    assert isinstance(cli.datamodule.source.env, GymnasiumEnv)
    lines = evaluations(tmp_path)
    assert [line["iteration"] for line in lines] == [0, 1]
    assert all(line["episodes"] == 3 and line["errors"] == 0 and line["no_verdict"] == 0 for line in lines)
    assert lines[-1]["info"]["prob"] == 1.0


def test_a_run_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run(tmp_path, *OPTIONS[:2])
    assert error.value.code == 2
    assert "does not observe text but 0; set observation to ansi" in capsys.readouterr().err.splitlines()[-1]
