"""AlfworldEnv, on the games of tests/alfworld_games.py, against TextWorld itself."""

from __future__ import annotations

import importlib.util
import json
import pickle
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from steppo.envs import AlfworldEnv
from steppo.envs.alfworld.game import names_of
from steppo.envs.alfworld.grammar import Each, GameError, Grammar, Rule, Scene, Text, Thing, Value, symbols_of
from steppo.envs.alfworld.translation import translated
from steppo.envs.pool import EnvPool
from steppo.errors import ConfigError
from steppo.types import Action, Task
from tests.alfworld_games import DOMAIN, GRAMMAR, TASKS, WORDINGS, write_games
from tests.cli_helpers import evaluations, run

pytest.importorskip("fast_downward", reason="needs the extra alfworld")

ROOT = Path(__file__).parents[2]
MUG = "alfworld/train/pick_and_place_simple-Mug-None-Shelf-1/trial_0"


@pytest.fixture(scope="session", params=WORDINGS)
def env(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AlfworldEnv:
    """All games in one of the two wordings."""
    folder = write_games(tmp_path_factory.mktemp(f"games-{request.param}"), request.param)
    return AlfworldEnv(str(folder), cache_dir=str(folder / "cache"))


@pytest.fixture
def fresh(tmp_path: Path) -> AlfworldEnv:
    """Games that a test may spoil."""
    return AlfworldEnv(str(write_games(tmp_path)), cache_dir=str(tmp_path / "cache"), num_translators=1)


def task_of(env: AlfworldEnv, name: str = MUG) -> Task:
    return next(task for split in env.splits for task in env.tasks(split) if task.id == name)


def path_of(env: AlfworldEnv, task: Task) -> Path:
    return env.folder / task.data["game"]


def spoil(env: AlfworldEnv, change: Callable[[dict[str, Any]], Any]) -> Task:
    """The mug's game with other contents."""
    task = task_of(env)
    content = json.loads(path_of(env, task).read_text())
    change(content)
    path_of(env, task).write_text(json.dumps(content))
    return task


def no_progress(done: int, total: int) -> None:
    pass


# ---- playing ----


def episodes(env: AlfworldEnv) -> Iterator[tuple[Task, list[str], list[list[Any]]]]:
    """Of each task the walkthrough and one by chance: task, commands, what was answered at each."""
    for task in [task for split in env.splits for task in env.tasks(split)]:
        for chance in (None, random.Random(task.id)):
            turn = env.reset(task)
            answers: list[list[Any]] = [[f"{turn.text}\n\n{turn.goal}", list(turn.commands or ()), False, 0]]
            commands: list[str] = []
            while not turn.terminated:
                command = chance.choice([*(turn.commands or ()), "xyzzy"]) if chance else env.expert_action()
                assert command is not None
                commands.append(command)
                turn = env.command(command)
                answers.append([turn.text, list(turn.commands or ()), turn.success, int(turn.reward)])
            yield task, commands, answers


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="TextWorld 1.7 cannot read its templates on Python 3.13")
def test_every_word_is_textworlds(env: AlfworldEnv) -> None:
    pytest.importorskip("textworld")
    played = list(episodes(env))
    assert sum(answers[-1][2] for _, _, answers in played) >= len(TASKS), "walkthroughs win"
    games = "".join(f"{json.dumps([str(path_of(env, task)), commands])}\n" for task, commands, _ in played)
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "stock_textworld.py")]
    stock = subprocess.run(command, input=games, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    lines = stock.stdout.splitlines()
    assert len(lines) == len(played), stock.stderr
    for (_, _, answers), line in zip(played, lines, strict=True):
        turns = json.loads(line)["turns"]
        turns[0][0] = turns[0][0].removeprefix("-= A flat, and things to do =-\n\n")
        assert answers == turns


def test_a_walkthrough(env: AlfworldEnv) -> None:
    turn = env.reset(task_of(env))
    put = next(wording for wording in WORDINGS if env.version.startswith(wording))
    assert turn.goal == "Your task is to: put a mug on the shelf."
    assert turn.text == "You look around and see a fridge 1, a oven 1, a shelf 2, a shelf 1, a sinkbasin 1, and a table 1."
    assert turn.info == {"task_type": "pick_and_place_simple", "grammar": env.version, "golden_steps": 5}
    places = [f"go to {place}" for place in ("fridge 1", "oven 1", "shelf 1", "shelf 2", "table 1")]
    assert turn.commands == ("examine egg 1", "examine sinkbasin 1", *places, "look", "take egg 1 from sinkbasin 1")
    said = []
    while not turn.terminated:
        command = env.expert_action()
        assert turn.commands is not None
        assert command in turn.commands
        turn = env.command(command)
        said.append((command, turn.text, turn.reward, turn.success))
    assert said == [
        ("go to fridge 1", "You are at the fridge 1. The fridge 1 is closed.", 0.0, False),
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it: a mug 2.", 0.0, False),
        ("take mug 2 from fridge 1", "You take the mug 2 out of the fridge 1.", 0.0, False),
        ("go to shelf 2", "You are at the shelf 2. On the shelf 2: a lamp 1.", 0.0, False),
        (WORDINGS[put].format(o="mug 2", r="shelf 2"), "The mug 2 is in the shelf 2", 1.0, True),
    ]
    assert env.expert_action() is None


def test_steps_are_limited_and_others_words_do_nothing(env: AlfworldEnv) -> None:
    short = AlfworldEnv(str(env.folder), max_steps=2, cache_dir=str(env.folder.parent / "cache"))
    opening = short.reset(task_of(short))
    turn = short.command("dance")
    assert (turn.text, turn.action_valid, turn.commands, turn.terminated) == (
        "Nothing happens.",
        False,
        opening.commands,
        False,
    )
    assert short.expert_action() == "go to fridge 1", "there is still a way"
    turn = short.command("look")
    assert (turn.action_valid, turn.terminated, turn.truncated, turn.success) == (True, True, False, False)


def test_what_is_undone_is_as_before(env: AlfworldEnv) -> None:
    opening = env.reset(task_of(env))
    holding = env.command("take egg 1 from sinkbasin 1").commands or ()
    assert "examine sinkbasin 1" not in holding, "which takes empty hands"
    [put] = [command for command in holding if command.startswith(("put", "move"))]
    assert env.command(put).commands == opening.commands


@pytest.mark.parametrize("seed", range(4))
def test_the_expert_comes_back_from_anywhere(seed: int, env: AlfworldEnv) -> None:
    """Also with its hands full of something else, and after it put down what it needs."""
    far = AlfworldEnv(str(env.folder), max_steps=200, cache_dir=str(env.folder.parent / "cache"))
    chance = random.Random(seed)
    verbs = ("go", "look", "open", "close", "examine", "take", "move", "put")
    turn = far.reset(task_of(far, "alfworld/valid_unseen/pick_and_place_simple-Mug-None-Fridge-4/trial_4"))
    for _ in range(30):
        if not turn.terminated:
            assert far.expert_action() in (turn.commands or ())
            turn = far.command(chance.choice([each for each in turn.commands or () if each.startswith(verbs)]))
    while not turn.terminated and (command := far.expert_action()):
        turn = far.command(command)
    assert turn.success


def test_the_expert_takes_what_it_meets(env: AlfworldEnv) -> None:
    """A mug is a mug, and what was taken by mistake goes back."""
    env.reset(task_of(env))
    env.command("take egg 1 from sinkbasin 1")
    assert env.expert_action() in ("move egg 1 to sinkbasin 1", "put egg 1 in/on sinkbasin 1")
    env.command("go to table 1")
    back = env.expert_action()
    assert back is not None
    assert back in ("move egg 1 to table 1", "put egg 1 in/on table 1"), "here will do, too"
    env.command(back)
    assert env.expert_action() == "take mug 1 from table 1"
    env.command("take mug 1 from table 1")
    assert env.expert_action() == "go to shelf 2"
    env.command("go to shelf 2")
    assert env.expert_action() in ("move mug 1 to shelf 2", "put mug 1 in/on shelf 2")


def test_workers_play_the_same(env: AlfworldEnv) -> None:
    copy = pickle.loads(pickle.dumps(env))
    tasks = env.tasks("train")
    with_pool = []
    pool = EnvPool(env, 3, 2, 60.0, None, 60.0)
    try:
        for slot, task in enumerate(tasks):
            pool.reset(slot, task, want_expert=True)
        for slot in range(3):
            turn = pool.receive(slot).turn
            assert turn is not None
            assert turn.expert_action is not None
            pool.step(slot, turn.expert_action)
            with_pool.append((turn.text, turn.commands, str(turn.expert_action), pool.receive(slot).turn))
    finally:
        pool.close()
    for task, (text, commands, expert, after) in zip(tasks, with_pool, strict=True):
        turn = copy.reset(task)
        assert (turn.text, turn.commands, copy.expert_action()) == (text, commands, expert)
        assert after is not None
        assert copy.step(Action(expert)).text == after.text


# ---- tasks ----


def test_tasks_do_not_follow_the_file_system(fresh: AlfworldEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {split: len(fresh.tasks(split)) for split in fresh.splits} == {"train": 3, "valid": 1, "test": 1}
    names = [task.id for task in fresh.tasks("train")]
    assert names[0] == "alfworld/train/look_at_obj_in_light-Book-None-Lamp-2/trial_1"
    found = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *args: reversed(list(found(*args))))
    assert names == [task.id for task in fresh.tasks("train")]
    assert fresh.tasks("valid_seen") == fresh.tasks("valid")
    assert fresh.tasks("valid_unseen") == fresh.tasks("test")
    with pytest.raises(ConfigError, match="no split 'dev'; it has train, valid"):
        fresh.tasks("dev")
    few = AlfworldEnv(str(tmp_path), num_train=2, num_valid=0)
    assert [task.id for task in few.tasks("train")] == names[:2]
    assert few.tasks("valid") == []


@pytest.mark.parametrize("solvable", [False, None, "true"])
def test_unsolvable_games_are_left_out(fresh: AlfworldEnv, solvable: object) -> None:
    spoil(fresh, lambda content: content.update(solvable=solvable, note='"solvable": true'))
    assert MUG not in [task.id for task in fresh.tasks("train")]
    assert len(fresh.tasks("train")) == 2


@pytest.mark.parametrize(
    "name", ["pick_and_place_simple-AppleSliced-None-Shelf-1", "pick_and_place_with_movable_recep-Mug-1"]
)
def test_sliced_and_movable_things_are_left_out(fresh: AlfworldEnv, name: str) -> None:
    before = fresh.tasks("train")
    path = path_of(fresh, task_of(fresh))
    shutil.copytree(path.parents[1], path.parents[2] / name)
    assert fresh.tasks("train") == before


def test_content_is_the_game_and_not_its_file(fresh: AlfworldEnv, tmp_path: Path) -> None:
    task = task_of(fresh)
    before = fresh.content(task)
    content = json.loads(path_of(fresh, task).read_text())
    path_of(fresh, task).write_text(json.dumps(dict(reversed(content.items())), indent=3) + "\n")
    assert fresh.content(task) == before
    moved = AlfworldEnv(str(shutil.move(tmp_path / "json_2.1.1", tmp_path / "elsewhere")))
    assert moved.content(task) == before
    for name in ("pddl_domain", "pddl_problem", "grammar"):
        spoil(moved, lambda content, name=name: content.update({name: content[name] + " "}))
        assert moved.content(task) != before
        before = moved.content(task)
    spoil(moved, lambda content: content["walkthrough"].insert(0, "look"))
    assert moved.content(task) != before


def test_version_tells_the_grammar(env: AlfworldEnv, tmp_path: Path) -> None:
    assert env.version in ("move X to Y", "put X in/on Y")
    write_games(tmp_path, "move")
    write_games(tmp_path / "old", "put")
    shutil.rmtree(tmp_path / "json_2.1.1" / "train")
    shutil.move(tmp_path / "old" / "json_2.1.1" / "train", tmp_path / "json_2.1.1" / "train")
    assert AlfworldEnv(str(tmp_path)).version == "move X to Y, put X in/on Y"


# ---- translations ----


def kept_in(env: AlfworldEnv) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in env._cache.iterdir()}


def test_games_are_translated_once(fresh: AlfworldEnv, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    fresh.prepare(fresh.tasks("train"), lambda done, total: calls.append((done, total)))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    before = kept_in(fresh)
    fresh.prepare([*fresh.tasks("train"), *fresh.tasks("valid")], lambda done, total: calls.append((done, total)))
    assert calls[4:] == [(0, 1), (1, 1)]
    fresh.reset(task_of(fresh))
    assert {path: at for path, at in kept_in(fresh).items() if path in before} == before
    assert len(kept_in(fresh)) == 4
    moved = AlfworldEnv(str(shutil.move(tmp_path / "json_2.1.1", tmp_path / "elsewhere")), cache_dir=str(tmp_path / "cache"))
    moved.prepare(moved.tasks("train"), lambda done, total: calls.append((done, total)))
    assert len(calls) == 6, "wherever it lies"


def test_translating_goes_on_after_an_interrupt(fresh: AlfworldEnv) -> None:
    def interrupted(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fresh.prepare(fresh.tasks("train"), interrupted)
    assert all(path.suffix == ".z" for path in kept_in(fresh)), "nothing half-written is left"
    calls: list[tuple[int, int]] = []
    fresh.prepare(fresh.tasks("train"), lambda done, total: calls.append((done, total)))
    assert calls in ([(0, 1), (1, 1)], [])
    assert len(kept_in(fresh)) == 3


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: data[:50] + b"x" + data[51:]])
def test_damaged_translations_are_made_anew(fresh: AlfworldEnv, damage: Callable[[bytes], bytes]) -> None:
    opening = fresh.reset(task_of(fresh))
    [path] = kept_in(fresh)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    fresh.start()
    assert fresh.reset(task_of(fresh)) == opening
    assert path.read_bytes() == whole
    assert list(kept_in(fresh)) == [path], "nothing half-written is left"


def test_translating_leaves_the_process_as_it_was(fresh: AlfworldEnv) -> None:
    arguments, output = sys.argv, sys.stdout
    fresh.reset(task_of(fresh))
    assert (sys.argv, sys.stdout) == (arguments, output)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process and its children may hold more than a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(fresh: AlfworldEnv, full_disk: None) -> None:
    with pytest.raises(ConfigError, match=r"AlfworldEnv: cannot keep translated games in .*: File too large"):
        fresh.prepare(fresh.tasks("train"), no_progress)
    assert fresh.reset(task_of(fresh)).goal == "Your task is to: put a mug on the shelf.", "which is played all the same"
    assert kept_in(fresh) == {}


def test_no_folder_for_translations(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    env = AlfworldEnv(str(write_games(tmp_path)), cache_dir=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="cannot keep translated games in"):
        env.prepare(env.tasks("valid"), no_progress)
    assert env.reset(task_of(env)).success is False


# ---- what is wrong with games ----


def test_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; get the data with alfworld-download"):
        AlfworldEnv()
    monkeypatch.setenv("ALFWORLD_DATA", str(write_games(tmp_path)))
    env = AlfworldEnv()
    [task] = env.tasks("test")
    path_of(env, task).unlink()
    with pytest.raises(ConfigError, match=r"no solvable game\.tw-pddl in .*valid_unseen; get the data"):
        env.tasks("test")
    with pytest.raises(ConfigError, match=r"there is no .*game\.tw-pddl"):
        env.content(task)


def test_without_a_translator_what_is_translated_still_plays(fresh: AlfworldEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    task, *others = fresh.tasks("train")
    fresh.prepare([task], lambda done, total: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "steppo\[alfworld\]"'):
        fresh.prepare([task, *others], lambda done, total: None)
    fresh.prepare([task], lambda done, total: None)
    assert fresh.reset(task).commands


@pytest.mark.parametrize("option", ["max_steps", "num_translators", "num_train", "num_valid", "num_test"])
def test_settings_out_of_range(fresh: AlfworldEnv, option: str) -> None:
    with pytest.raises(ConfigError, match=f"AlfworldEnv: {option} must be at least"):
        AlfworldEnv(str(fresh.folder), **{option: -1})


def test_a_file_that_is_cut_off(fresh: AlfworldEnv) -> None:
    path = path_of(fresh, task_of(fresh))
    whole = path.read_bytes()
    for text in (whole[:-100], b"", whole[:-100] + b"}"):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match=r"game\.tw-pddl is cut off or damaged; unpack the data again"):
            list(map(fresh.content, fresh.tasks("train")))
    path.write_bytes(whole)
    assert fresh.content(task_of(fresh))


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no problem": (lambda content: content.pop("pddl_problem"), "is cut off or damaged"),
    "a number": (lambda content: content.update(grammar=5), "is cut off or damaged"),
    "no grammar": (lambda content: content.update(grammar=""), "it has no PutObject or no intro"),
    "half a grammar": (lambda content: content.update(grammar=GRAMMAR[:900]), "its grammar cannot be read"),
    "other actions": (
        lambda content: content.update(grammar=GRAMMAR.replace("TakeObject", "Take")),
        "its grammar has no text for the action takeobject",
    ),
    "no rule": (
        lambda content: content.update(grammar=GRAMMAR.replace('"around"', '"about"')),
        "its grammar has no rule 'around'",
    ),
    "a rule of itself": (
        lambda content: content.update(grammar=GRAMMAR.replace('"Your task', '"#task# Your task')),
        "cannot be played: maximum recursion depth",
    ),
    "foreign code": (
        lambda content: content.update(grammar=GRAMMAR.replace("{f.name or f.id}", "{open('x').read()}")),
        "cannot be read",
    ),
    "PDDL": (lambda content: content.update(pddl_domain=DOMAIN[:2000]), "its PDDL cannot be translated"),
    "other types": (
        lambda content: content.update(pddl_problem=content["pddl_problem"].replace("egg_bar__plus_00_dot_5 - thing", "")),
        "its PDDL cannot be translated",
    ),
    "no PDDL": (lambda content: content.update(pddl_problem="x"), "its PDDL cannot be translated"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_game_that_cannot_be_played(fresh: AlfworldEnv, name: str) -> None:
    damage, message = DAMAGES[name]
    task = spoil(fresh, damage)
    with pytest.raises(ConfigError, match=message) as error:
        fresh.reset(task)
    assert "\n" not in str(error.value)
    assert fresh.reset(fresh.tasks("valid")[0]).goal, "others can"


def test_what_follows_from_itself_is_refused() -> None:
    domain = """(define (domain d) (:requirements :adl :derived-predicates) (:predicates (next ?a ?b) (far ?a ?b) (on ?a))
        (:derived (far ?a ?b) (or (next ?a ?b) (exists (?c) (and (far ?a ?c) (far ?c ?b)))))
        (:action go :parameters (?a ?b) :precondition (on ?a) :effect (and (on ?b) (next ?b ?a))))"""
    problem = "(define (problem p) (:domain d) (:objects a b c) (:init (on a) (next a b)) (:goal (far c a)))"
    with pytest.raises(GameError, match="a fact is derived from itself"):
        translated(domain, problem)


# ---- the grammar ----


@pytest.mark.parametrize(
    ("template", "symbols"),
    [
        ("a #b# c", [Text("a "), Rule("b"), Text(" c")]),
        ("\n\n#b#\n\n#c(d, e)#", [Rule("b"), Text("\n\n"), Rule("c(d, e)")]),
        ("  x\n y", [Text("x\n y")]),
        (" (it is open)", [Text("(it is open)")]),
        ("#a#  #b#", [Rule("a"), Text("  "), Rule("b")]),
        ("\nHelp: <b> c", [Text("Help: ")]),
        ("a; b", [Text("a")]),
        ("x) }y", [Text("x) ")]),
        ("a{b", [Text("a")]),
        ("a#b", [Text("a")]),
        ("a[b]", [Text("a")]),
        (r"x\ny", [Text("x\ny")]),
        ('its "own" x', [Text("its "), Text("own"), Text(" x")]),
        ("", []),
    ],
)
def test_how_templates_are_read(template: str, symbols: list[Any]) -> None:
    """As TextWorld reads them, which drops what stands behind the first character that it cannot read."""
    assert list(symbols_of(template)) == symbols


def test_queries_in_templates() -> None:
    [each, end] = symbols_of("[{a.x + ' ' + b | q(c:d) & e(f, g)}].")
    assert isinstance(each, Each)
    assert each.listed
    assert isinstance(each.what, Value)
    assert each.query is not None
    assert each.query.predicates == (("q", (("c", "d"),)), ("e", (("f", "f"), ("g", "g"))))
    assert end == Text(".")
    with pytest.raises(GameError, match="the condition 'q' of its grammar cannot be read"):
        symbols_of("{a | q}")


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').getcwd()",
        "a.name.__class__",
        "a.__class__",
        "a.name * 1000000000",
        "(lambda: a)()",
        "b.name",
        "1",
        "a.name if a else a.id",
        "'x",
    ],
)
def test_nothing_is_evaluated(expression: str) -> None:
    grammar = Grammar(GRAMMAR.replace("PUT", "put"))
    scene = Scene({"a": Thing("a_bar_1", "thing", "a 1")}, {})
    template = "{" + expression + "}"
    with pytest.raises(GameError, match="of its grammar cannot be read"):
        grammar.text(template, None, scene)  # type: ignore[arg-type]


def test_names_count_down() -> None:
    ids = ["mug_bar_2", "mug_bar_1", "sink_bar_1", "sink_bar_1_bar_sinkbasin", "salt_minus_box_bar_7", "agent1", "mugtype"]
    assert names_of(ids) == {
        "agent1": "agent1 ",
        "mug_bar_1": "mug 2",
        "mug_bar_2": "mug 1",
        "mugtype": "mugtype ",
        "salt_minus_box_bar_7": "salt-box 1",
        "sink_bar_1": "sink 1",
        "sink_bar_1_bar_sinkbasin": "sinkbasin 1",
    }


# ---- as a user meets it ----


def options(env: AlfworldEnv) -> list[str]:
    settings = [f"data={env.folder}", f"cache_dir={env.folder.parent / 'cache'}", "max_steps=6"]
    return ["--data.source.env=AlfworldEnv", *(f"--data.source.env.{setting}" for setting in settings)]


SMALL = ["--data.source.max_prompt_tokens=700", "--data.source.max_new_tokens=16", "--model.policy.max_positions=1024"]


def test_a_run(env: AlfworldEnv, tmp_path: Path) -> None:
    cli = run(
        tmp_path,
        *options(env),
        *SMALL,
        "--trainer.max_epochs=1",
        "--warm_start.actions=expert",
        "--data.source.num_workers=2",
    )
    assert isinstance(cli.datamodule.source.env, AlfworldEnv)
    [before, after] = evaluations(tmp_path)
    assert (before["episodes"], before["errors"], after["errors"]) == (1, 0, 0)


def test_a_game_that_cannot_be_translated_costs_its_episodes(fresh: AlfworldEnv, tmp_path: Path) -> None:
    damaged = spoil(fresh, DAMAGES["PDDL"][0])
    args = [
        "--trainer.max_epochs=1",
        "--warm_start.updates=0",
        "--data.eval_split=train",
        "--rollout.min_valid_fraction=0.1",
    ]
    run(tmp_path / "run", *options(fresh), *SMALL, *args)
    [before, after] = evaluations(tmp_path / "run")
    assert damaged.id not in before.get("tasks", [])
    assert (before["errors"], after["errors"]) == (1, 1)


def test_mistakes_are_one_line(fresh: AlfworldEnv, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(fresh, DAMAGES["no problem"][0])
    for folder, message in (
        (fresh.folder, "is cut off or damaged; unpack the data again"),
        (tmp_path / "no", "there is no folder"),
    ):
        with pytest.raises(SystemExit) as error:
            run(tmp_path / "run", *options(fresh), f"--data.source.env.data={folder}", *SMALL)
        assert error.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
