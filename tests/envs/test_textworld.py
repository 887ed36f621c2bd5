"""TextWorldEnv. Games are played in an EnvPool's workers only: their interpreter must not share a process with torch."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from steppo.data.command import main as data
from steppo.envs import TextWorldEnv
from steppo.envs.checks import EnvReply
from steppo.envs.pool import EnvPool
from steppo.envs.textworld import _make_game
from steppo.errors import ConfigError
from steppo.types import Action, Task, Turn
from tests.worker_envs import Forgetful, stock_game

Choose = Callable[[Turn], Action]


def expert(turn: Turn) -> Action:
    assert turn.expert_action is not None
    return turn.expert_action


def play(env: TextWorldEnv, tasks: Sequence[Task], choose: Choose = expert) -> list[list[Turn]]:
    """Each task's turns until its end, one slot per task."""
    turns: list[list[Turn]] = []
    with closing(EnvPool(env, len(tasks), 1, timeout_s=60.0)) as pool:
        for slot, task in enumerate(tasks):
            pool.reset(slot, task, want_expert=True)
        for slot in range(len(tasks)):
            episode = [seen(pool.receive(slot))]
            while not (episode[-1].terminated or episode[-1].truncated):
                pool.step(slot, choose(episode[-1]))
                episode.append(seen(pool.receive(slot)))
            turns.append(episode)
    return turns


def seen(reply: EnvReply) -> Turn:
    assert reply.turn is not None, reply.error
    return reply.turn


def variant(env: TextWorldEnv, **arguments: Any) -> TextWorldEnv:
    """The same games with other arguments."""
    folder = str(env._folder.parent)
    return TextWorldEnv("coin_collector", {"level": 2}, num_train=4, num_valid=2, num_test=2, cache_dir=folder, **arguments)


def no_progress(done: int, total: int) -> None:
    pytest.fail(f"{total} games were generated")


# --- tasks and settings: nothing is played ---


def test_splits_share_no_game() -> None:
    env = TextWorldEnv(num_train=50, num_valid=30, num_test=20)
    splits = {split: env.tasks(split) for split in ("train", "valid", "test")}
    assert {split: len(tasks) for split, tasks in splits.items()} == {"train": 50, "valid": 30, "test": 20}
    assert len({task.id for tasks in splits.values() for task in tasks}) == 100
    assert len({task.data["seed"] for tasks in splits.values() for task in tasks}) == 100


def test_tasks_are_stable(tmp_path: Path) -> None:
    env = TextWorldEnv(num_train=50, num_test=20)
    assert env.tasks("test") == env.tasks("test")
    smaller = TextWorldEnv(num_train=5, num_test=2, max_steps=7, description="brief", cache_dir=str(tmp_path))
    for split, size in (("train", 5), ("test", 2)):
        assert smaller.tasks(split) == env.tasks(split)[:size]
    other_games = TextWorldEnv(settings={"level": 6})
    assert not {task.id for task in other_games.tasks("train")} & {task.id for task in env.tasks("train")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"levels": 3}}, "levels"),
        ({"challenge": "cooking", "settings": {"level": 3}}, "recipe"),
        ({"max_steps": 0}, "max_steps"),
        ({"num_valid": 1_000_001}, "1,000,000"),
    ],
)
def test_mistakes_in_the_config(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TextWorldEnv(**arguments)


def test_unknown_split() -> None:
    with pytest.raises(ConfigError, match="train, valid, test"):
        TextWorldEnv().tasks("dev")


def test_settings_that_make_no_game(tmp_path: Path) -> None:
    settings = {"recipe_seed": 1, "take": 0}  # each is allowed
    env = TextWorldEnv("cooking", settings, num_train=2, cache_dir=str(tmp_path), num_generators=1)
    with pytest.raises(ConfigError, match="requires the 'take' skill"):
        env.prepare(env.tasks("train"), lambda done, total: None)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = TextWorldEnv(num_train=1, cache_dir=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot write"):
        env.prepare(env.tasks("train"), no_progress)


@pytest.mark.parametrize("challenge", ["coin_collector", "simple"])
def test_a_game_that_is_compiled_once_is_the_same(challenge: Any, tmp_path: Path) -> None:
    env = TextWorldEnv(challenge, num_train=1)
    recipe = env._recipe(env.tasks("train")[0])
    with ProcessPoolExecutor(1, mp.get_context("spawn")) as pool:
        for make, name in ((stock_game, "stock"), (_make_game, "ours")):
            pool.submit(make, *recipe, tmp_path / f"{name}.z8", tmp_path).result()
    for kind in ("z8", "json"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"stock.{kind}").read_bytes()


# --- what is shown ---


def test_expert_wins_and_sees_clean_text(textworld_env: TextWorldEnv) -> None:
    """Full texts: no banner, no status line, no score line, no route."""
    env = variant(textworld_env, description="full", max_steps=6)
    tasks = env.tasks("train") + env.tasks("test")
    for episode in play(env, tasks):
        assert len(episode) == 3
        assert [turn.reward for turn in episode] == [0.0, 0.0, 1.0]
        assert episode[-1].terminated
        assert episode[-1].success is True
        for turn in episode:
            assert not re.search(r"\$|TextWorld|Your score|\*\*\*|^>|=-.", turn.text, re.MULTILINE)
            assert all(line.strip() == line != "" for line in turn.text.split("\n"))
            assert turn.goal == "Find the coin and take it."
            assert turn.feedback == ""
        opening = episode[0].text
        assert re.match(r"-= [\w ]+ =-\n\w", opening)
        assert "coin" not in opening.lower(), "the coin lies elsewhere: only a route would name it"


def test_brief_texts_are_room_names(textworld_env: TextWorldEnv) -> None:
    tasks = textworld_env.tasks("valid")
    brief = play(textworld_env, tasks)
    full = play(variant(textworld_env, description="full"), tasks)
    for brief_episode, full_episode in zip(brief, full, strict=True):
        for short, long in zip(brief_episode[:-1], full_episode[:-1], strict=True):
            assert f"-= {short.text} =-" == long.text.split("\n")[0]
        assert brief_episode[-1].text == full_episode[-1].text == "You pick up the coin from the ground."


def test_commands_are_shown_excluded_or_hidden(textworld_env: TextWorldEnv) -> None:
    task = textworld_env.tasks("valid")[:1]
    [some], [everything], [hidden] = (
        play(env, task)
        for env in (textworld_env, variant(textworld_env), variant(textworld_env, show_admissible_commands=False))
    )
    excluded = ("examine", "inventory", "look")
    for few, full, none in zip(some, everything, hidden, strict=True):
        shown = full.commands
        assert shown is not None
        assert {"inventory", "look"} <= set(shown)
        assert few.commands == tuple(c for c in shown if not c.startswith(excluded))
        assert few.commands
        assert none.commands is None
    for turn in some[:-1]:
        assert expert(turn).command in (turn.commands or ())


@pytest.mark.parametrize("shown", [True, False])
def test_commands_that_cannot_be_carried_out_are_told_apart(textworld_env: TextWorldEnv, shown: bool) -> None:
    pool = EnvPool(variant(textworld_env, show_admissible_commands=shown), 1, 1, 60)
    pool.reset(0, textworld_env.tasks("valid")[0])
    assert pool.receive(0).error == ""
    for command, valid in (("dance", False), ("look", True)):
        pool.step(0, Action(command))
        assert seen(pool.receive(0)).action_valid is valid
    pool.close()


def test_goals_do_not_spell_out_the_way(tmp_path: Path) -> None:
    env = TextWorldEnv("treasure_hunter", {"level": 5}, num_train=1, cache_dir=str(tmp_path), num_generators=1)
    tasks = env.tasks("train")
    env.prepare(tasks, lambda done, total: None)
    [episode] = play(env, tasks)
    assert len(episode) > 3, "there should be a way to go"
    goal = episode[0].goal
    assert str(expert(episode[-2])).split()[-1] in goal, "it names the thing to take"
    assert not re.search(r"north|south|east|west|TextWorld", goal)
    assert goal == episode[-1].goal


# --- how it ends ---


def test_max_steps_ends_the_task_unsolved(textworld_env: TextWorldEnv) -> None:
    [episode] = play(textworld_env, textworld_env.tasks("train")[:1], lambda turn: Action("look"))
    assert len(episode) == 1 + 6
    assert [turn.terminated for turn in episode] == [False] * 6 + [True]
    assert not any(turn.truncated or turn.reward for turn in episode)
    assert episode[-1].success is False


def test_winning_with_the_last_step_counts(textworld_env: TextWorldEnv) -> None:
    [episode] = play(variant(textworld_env, max_steps=2), textworld_env.tasks("train")[:1])
    assert len(episode) == 1 + 2
    assert episode[-1].success is True
    assert episode[-1].reward == 1.0


def test_rewards_are_success_or_score(tmp_path: Path) -> None:
    envs = [
        TextWorldEnv("simple", {"rewards": "dense"}, num_train=1, reward=reward, cache_dir=str(tmp_path), num_generators=1)
        for reward in ("success", "score")
    ]
    tasks = envs[0].tasks("train")
    envs[0].prepare(tasks, lambda done, total: None)
    [success], [score] = (play(env, tasks) for env in envs)
    assert [replace(turn, reward=0.0) for turn in success] == [replace(turn, reward=0.0) for turn in score]
    assert [turn.reward for turn in success] == [0.0] * (len(success) - 1) + [1.0]
    assert len([turn for turn in score if turn.reward > 0]) > 2
    assert sum(turn.reward for turn in score) == pytest.approx(1.0)
    assert success[-1].success is score[-1].success is True
    assert not re.search("chest|key|east", success[0].goal), "the goal is brief, the way is to be found"


# --- turns that are known ---


def wander(env: TextWorldEnv, episodes: int) -> list[Turn]:
    """Random episodes of a few games in turns in two slots, some with experts, some with mistakes."""
    rng = np.random.default_rng(0)
    tasks = env.tasks("train")[:2]
    turns: list[Turn] = []
    with closing(EnvPool(env, 2, 1, timeout_s=60.0)) as pool:
        last: list[Turn | None] = [None, None]
        while len(turns) < 6 * episodes:
            slot = int(rng.integers(2))
            turn = last[slot]
            if turn is None or turn.terminated:
                pool.reset(slot, tasks[rng.integers(2)], want_expert=bool(rng.integers(2)))
            else:
                choices = [*(turn.commands or ()), turn.expert_action or "look", "go nowhere"]
                pool.step(slot, Action(str(choices[rng.integers(len(choices))])))
            last[slot] = seen(pool.receive(slot))
            turns.append(cast(Turn, last[slot]))
    return turns


def test_known_turns_are_those_that_a_game_gives(textworld_env: TextWorldEnv) -> None:
    arguments: dict[str, Any] = {"description": "full", "reward": "score", "max_steps": 6}
    folder = str(textworld_env._folder.parent)
    env = variant(textworld_env, **arguments)
    forgetful = Forgetful("coin_collector", {"level": 2}, num_train=4, cache_dir=folder, **arguments)
    assert wander(env, 60) == wander(forgetful, 60)


def test_known_turns_are_not_played_again(textworld_env: TextWorldEnv, tmp_path: Path) -> None:
    """Without its file a game that is played is made anew."""
    shutil.copytree(textworld_env._folder, tmp_path / textworld_env._folder.name)
    env = TextWorldEnv("coin_collector", {"level": 2}, num_train=1, cache_dir=str(tmp_path), max_steps=3)
    [task] = env.tasks("train")
    with closing(EnvPool(env, 2, 1, timeout_s=60.0)) as pool:
        episodes = []
        for slot in range(2):
            pool.reset(slot, task)
            turns = [seen(pool.receive(slot))]
            while not turns[-1].terminated:
                pool.step(slot, Action("look"))
                turns.append(seen(pool.receive(slot)))
            episodes.append(turns)
            env._path(task).unlink(missing_ok=True)
    assert episodes[0] == episodes[1]
    assert not env._path(task).exists()


# --- files ---


def test_prepared_games_are_left_alone(textworld_env: TextWorldEnv) -> None:
    before = {path: path.stat().st_mtime_ns for path in textworld_env._folder.iterdir()}
    assert len([path for path in before if path.suffix == ".z8"]) == 8
    tasks = textworld_env.tasks("train") + textworld_env.tasks("valid") + textworld_env.tasks("test")
    textworld_env.prepare(tasks, no_progress)
    assert {path: path.stat().st_mtime_ns for path in textworld_env._folder.iterdir()} == before


def test_a_lost_game_comes_back_the_same(
    textworld_env: TextWorldEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes with another order of sets, too."""
    shutil.copytree(textworld_env._folder, tmp_path / textworld_env._folder.name)
    env = variant(textworld_env)
    copied = TextWorldEnv("coin_collector", {"level": 2}, num_train=4, cache_dir=str(tmp_path), num_generators=1)
    tasks = copied.tasks("train")
    kept, lost = copied._path(tasks[0]), copied._path(tasks[1])
    lost.unlink()
    lost.with_suffix(".json").unlink()
    kept_at = kept.stat().st_mtime_ns
    calls: list[tuple[int, int]] = []
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    copied.prepare(tasks, lambda done, total: calls.append((done, total)))
    assert calls == [(0, 1), (1, 1)]
    assert kept.stat().st_mtime_ns == kept_at
    again = play(copied, tasks)
    monkeypatch.setenv("PYTHONHASHSEED", "2")
    assert again == play(env, tasks)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_cooking_game_follows_from_its_seed_alone(prepared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TextWorld makes another one in each process where sets have another order."""
    contents = set()
    for order in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", order)
        env = TextWorldEnv("cooking", num_train=1, cache_dir=str(tmp_path / order), num_generators=1)
        [task] = env.tasks("train")
        if prepared:
            env.prepare([task], lambda done, total: None)
        with closing(EnvPool(env, 1, 1, timeout_s=60.0)) as pool:
            pool.reset(0, task)
            seen(pool.receive(0))
        contents.add(env.content(task))
        assert os.environ["PYTHONHASHSEED"] == order
    assert len(contents) == 1


def test_games_of_textworld_are_told_by_what_is_in_them(
    textworld_env: TextWorldEnv, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the day on which they were compiled; a cut one is named."""
    tasks = textworld_env.tasks("valid")
    contents = [textworld_env.content(task) for task in tasks]
    assert len(set(contents)) == len(tasks)
    path = textworld_env._path(tasks[0])
    game = path.read_bytes()
    try:
        path.write_bytes(game[:0x12] + b"991231" + game[0x18:])
        assert textworld_env.content(tasks[0]) == contents[0]
        where = [f"--cache_dir={path.parent.parent}", "--settings.level=2", "--num_train=4", "--num_valid=2", "--num_test=2"]
        data(["textworld", *where])
        assert len(capsys.readouterr().out.splitlines()) == 4
        path.write_bytes(game[: len(game) // 2])
        with pytest.raises(SystemExit):
            data(["textworld", *where])
        assert f"1 of 2 tasks of valid: TextWorldEnv: the game {path} is damaged" in capsys.readouterr().err
    finally:
        path.write_bytes(game)
