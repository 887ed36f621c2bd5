"""WebshopEnv, in the shop of tests/webshop_goods.py."""

from __future__ import annotations

import itertools
import json
import lzma
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from steppo.data.command import main as data_command
from steppo.envs import WebshopEnv
from steppo.envs.webshop import catalogue
from steppo.envs.webshop.goods import Product
from steppo.envs.webshop.reward import worth
from steppo.errors import ConfigError
from steppo.panel.command import main as panel_command
from steppo.rendering import CommandParser
from steppo.types import Task, Turn
from tests.cli_helpers import TOY, evaluations, places, run
from tests.webshop_goods import ABOUT, PRODUCTS, write_goods

pytest.importorskip("bm25s", reason="needs the extra search")

FILE = "items_shuffle_1000.json"
FEW = {"num_test": 3, "num_valid": 4}


def no_progress(done: int, total: int) -> None:
    pass


def made(folder: Path, **settings: Any) -> WebshopEnv:
    """As a run prepares it."""
    env = WebshopEnv(str(folder), **{"cache_dir": str(folder / "cache"), **FEW, **settings})
    env.prepare([], no_progress)
    return env


def started(folder: Path, **settings: Any) -> WebshopEnv:
    """As a worker has it."""
    env = made(folder, **settings)
    env.start()
    return env


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_goods(tmp_path_factory.mktemp("shop"))


@pytest.fixture
def env(folder: Path) -> WebshopEnv:
    return started(folder)


def all_tasks(env: WebshopEnv) -> list[Task]:
    return [task for split in ("test", "valid", "train") for task in env.tasks(split)]


def task_of(env: WebshopEnv, name: str = "B0MUG00001/goal-0") -> Task:
    return next(task for task in all_tasks(env) if task.id == f"webshop/{name}")


def play(env: WebshopEnv, task: Task, commands: Sequence[str]) -> list[Turn]:
    return [env.reset(task), *map(env.command, commands)]


# ---- goals ----


def test_goals_are_in_the_publishers_order_and_splits(env: WebshopEnv) -> None:
    """Products as the file has them, combinations of options by sorted name, all of them shuffled with seed 233."""
    goals = []
    for asin, options in (
        ("B0MUG00001", [["moss green", "slate | ash", "tall standard"], ["12 oz", "16 oz"]]),
        ("B0MUG00002", []),
        ("B0SOCK0001", [["s | m", "l"]]),
        ("B0SOCK0002", []),
        ("B0PACK0001", [["1"], ["1", "2"]]),
        ("B0LAMP0001", []),
        ("B0BOWL0001", []),
    ):
        goals += [(asin, number, chosen) for number, chosen in enumerate(itertools.product(*options))]
    random.Random(233).shuffle(goals)
    tasks = all_tasks(env)
    assert [task.id for task in tasks] == [f"webshop/{asin}/goal-{number}" for asin, number, _ in goals]
    found = [env._goods.product(task.data["row"]).goal(task.data["number"]).options for task in tasks]
    assert found == [chosen for _, _, chosen in goals]
    assert [len(env.tasks(split)) for split in env.splits] == [7, 4, 3]
    assert pickle.loads(pickle.dumps(made(env.folder))).tasks("test") == env.tasks("test")


def test_split_sizes_are_the_publishers_unless_given(tmp_path: Path) -> None:
    env = WebshopEnv(str(write_goods(tmp_path, pen=True)), cache_dir=str(tmp_path / "cache"))
    assert {split: len(env.tasks(split)) for split in env.splits} == {"test": 500, "valid": 1000, "train": 12**3 + 14 - 1500}
    few = WebshopEnv(str(tmp_path), cache_dir=str(tmp_path / "cache"), num_test=0, num_train=2)
    assert few.tasks("test") == []
    assert few.tasks("train") == WebshopEnv(str(tmp_path), cache_dir=str(tmp_path / "cache"), num_test=0).tasks("train")[:2]


def test_a_split_without_goals_is_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no goal is left for valid: there are 14; see num_test and num_valid"):
        WebshopEnv(str(folder), cache_dir=str(folder / "cache")).tasks("valid")
    with pytest.raises(ConfigError, match="no split 'dev'; it has train, valid, test"):
        made(folder).tasks("dev")


def test_what_a_goal_asks_for(env: WebshopEnv) -> None:
    wish = "Find me lead free, dishwasher safe coffee mugs with color: moss green, and size: 12 oz"
    turn = env.reset(task_of(env))
    limit = float(turn.goal.removeprefix(f"Instruction: {wish}, and price lower than ").removesuffix(" dollars"))
    assert limit in (30.0, 40.0, 50.0), "one of the multiples of ten above $14.50, but not the next"
    assert (turn.info["task_type"], turn.info["golden_steps"], turn.info["score"]) == ("garden", 5, 0.0)
    assert env.reset(task_of(env, "B0SOCK0002/goal-0")).goal == "Instruction: Find me soft socks", "too dear for a limit"


def test_goals_of_people(folder: Path) -> None:
    env = started(folder, human_goals=True, num_test=1, num_valid=1)
    assert sorted(task.id for task in all_tasks(env)) == [
        f"webshop/{name}" for name in ("B0LAMP0001/human-0", "B0MUG00001/human-0", "B0MUG00001/human-1")
    ]
    turns = play(env, task_of(env, "B0MUG00001/human-0"), ["search[mug]", "click[b0mug00001]"])
    assert turns[0].goal.startswith("Instruction: i want a small mossy mug without lead, and price lower than ")
    actions = []
    while not turns[-1].terminated:
        actions.append(env.expert_action())
        turns.append(env.command(actions[-1]))
    assert actions == ["click[moss green]", "click[12 oz]", "click[buy now]"]
    assert turns[-1].info["score"] == 100
    turns = play(env, task_of(env, "B0LAMP0001/human-0"), ["search[heron]", "click[b0lamp0001]"])
    assert env.expert_action() == "click[buy now]", "there is no blue one"
    assert env.command("click[buy now]").info["score"] == pytest.approx(200 / 3)


# ---- prices ----


def test_prices_follow_from_the_file(folder: Path, env: WebshopEnv) -> None:
    mug, other, cup, sock = (env._goods.product(row) for row in range(4))
    assert (mug.price, mug.price_tag) == (14.5, "$14.5")
    assert (sock.price, sock.price_tag) == (1249.0, "$1249.0")
    assert (cup.price, cup.price_tag) == (100.0, "$100.0"), "without a price it is this, as with the publishers"
    assert mug.query == other.query == "coffee mugs"
    assert 8 < other.price < 12
    assert other.price_tag == "$8.0 to $12.0"
    again = Product.of(PRODUCTS[1], ABOUT["B0MUG00002"], None)
    assert Product.read(again.written()) == other
    cheaper = Product.of(PRODUCTS[1] | {"pricing": "$8.00 - $11.00"}, ABOUT["B0MUG00002"], None)
    assert cheaper.price != other.price
    limits = {Product.of(PRODUCTS[0] | {"asin": f"B{n}"}, ABOUT["B0MUG00001"], None).goal(0).price_upper for n in range(40)}
    assert limits == {30.0, 40.0, 50.0}


# ---- the reward, by hand ----


@pytest.mark.parametrize(
    ("commands", "parts", "score"),
    [
        # lead free, dishwasher safe; moss green, 12 oz; a price: five things.
        (["click[moss green]", "click[12 oz]"], (1, 1, 1, 1), 5 / 5),
        (["click[tall standard]", "click[moss green]", "click[12 oz]"], (1, 1, 1, 1), 5 / 5),
        (["click[moss green]", "click[16 oz]"], (1, 1, 1 / 2, 1), 4 / 5),
        (["click[slate | ash]"], (1, 1, 0, 1), 3 / 5),
        ([], (1, 1, 0, 1), 3 / 5),
    ],
)
def test_the_right_product(env: WebshopEnv, commands: list[str], parts: tuple[float, ...], score: float) -> None:
    turn = play(env, task_of(env), ["search[mug]", "click[b0mug00001]", *commands, "click[buy now]"])[-1]
    assert tuple(turn.info[name] for name in ("type", "attributes", "options", "price")) == parts
    assert turn.info["score"] == pytest.approx(100 * score)
    assert (turn.success, turn.reward, turn.terminated) == (score == 1, 10.0 * (score == 1), True)
    assert turn.commands == ()


@pytest.mark.parametrize(
    ("goal", "bought", "parts", "score"),
    [
        # Mug and home of fernhill, stoneware, coffee, mug, cork, lid, home: same kind, and cheap; not lead free, no options.
        ("B0MUG00001", "B0MUG00002", (1, 0, 0, 1), 1 / 5),
        # Only home of seven, another category: half. Too dear as well.
        ("B0MUG00001", "B0SOCK0002", (0.5, 0, 0, 0), 0),
        # Only home of brook, cotton, ankle, socks, home: not more than a fifth.
        ("B0SOCK0002", "B0MUG00002", (0.5, 0, 1, 1), 0.5 * 1 / 2),
        # The same category will do.
        ("B0BOWL0001", "B0TRAY0001", (1, 0, 1, 1), 1 / 2),
        # "Warm light." is among the features.
        ("B0LAMP0001", "B0LAMP0001", (1, 1, 1, 1), 1),
    ],
)
def test_any_product(env: WebshopEnv, goal: str, bought: str, parts: tuple[float, ...], score: float) -> None:
    turn = play(env, task_of(env, f"{goal}/goal-0"), ["search[home]", f"click[{bought.lower()}]", "click[buy now]"])[-1]
    if not turn.terminated:  # on the second page
        turn = play(
            env,
            task_of(env, f"{goal}/goal-0"),
            ["search[home]", "click[next >]", f"click[{bought.lower()}]", "click[buy now]"],
        )[-1]
    assert tuple(turn.info[name] for name in ("type", "attributes", "options", "price")) == parts
    assert turn.info["score"] == pytest.approx(100 * score)


def test_attributes_are_also_looked_for_in_texts(env: WebshopEnv) -> None:
    mug = env._goods.product(0)
    for attribute, has in (("keeps tea hot", 1), ("stoneware coffee", 1), ("glaze.  dishwasher", 1), ("keeps tea cold", 0)):
        wish = {"instruction": "x", "instruction_attributes": [attribute]}
        assert worth(mug, [], Product.of(PRODUCTS[0], wish, None).goal(0)).attributes == has


def test_what_is_paid(folder: Path) -> None:
    env = started(folder, success_reward=2.0, score_reward=3.0)
    buy = ["search[mug]", "click[b0mug00001]", "click[moss green]", "click[buy now]"]
    assert play(env, task_of(env), buy)[-1].reward == pytest.approx(3 * 0.8)
    buy.insert(2, "click[12 oz]")
    assert play(env, task_of(env), buy)[-1].reward == 2 + 3


# ---- pages ----


def test_pages(env: WebshopEnv) -> None:
    commands = [
        "search[HOME]",
        "click[next >]",
        "click[< prev]",
        "click[back to search]",
        "search[fernhill]",
        "click[B0MUG00001]",
        "click[description]",
        "click[< prev]",
        "click[features]",
        "click[< prev]",
        "click[reviews]",
        "click[< prev]",
        "click[16 oz]",
        "click[< prev]",
    ]
    turns = play(started(env.folder, max_steps=20), task_of(env), commands)
    assert all(turn.action_valid for turn in turns)
    start, first, second, again, back, found, mug, description, _, features, there, reviews, _, chosen, results = turns
    assert (start.commands, back.commands) == (("search[...]",), ("search[...]",))
    assert first.text.startswith("Page 1 of the results (12 in all)\n")
    assert first.commands is not None
    assert first.commands[:2] == ("click[back to search]", "click[next >]")
    assert len(first.commands) == 12
    assert second.text.startswith("Page 2 of the results (12 in all)\n")
    assert second.commands is not None
    assert second.commands[:2] == ("click[back to search]", "click[< prev]")
    assert len(second.commands) == 4
    assert again == first
    shown = [line.partition(":")[0].lower() for turn in (first, second) for line in turn.text.splitlines()[1:]]
    assert [command[6:-1] for turn in (first, second) for command in (turn.commands or ())[2:]] == shown
    assert found.text == (
        "Page 1 of the results (1 in all)\nB0MUG00001: Fernhill Stoneware Coffee Mug with Cork Lid for Home, $14.5"
    )
    assert mug.text == (
        "Fernhill Stoneware Coffee Mug with Cork Lid for Home\nPrice: $14.5\nsize: 12 oz, 16 oz\n"
        "color: moss green, slate | ash, tall standard"
    )
    assert mug.commands == (
        *("click[back to search]", "click[< prev]", "click[description]", "click[features]", "click[reviews]"),
        *(
            "click[buy now]",
            "click[12 oz]",
            "click[16 oz]",
            "click[moss green]",
            "click[slate | ash]",
            "click[tall standard]",
        ),
    )
    assert description.text == "A mug that keeps tea hot for an hour."
    assert description.commands == ("click[back to search]", "click[< prev]")
    assert features.text == "Lead free glaze.\nDishwasher safe."
    assert there == mug
    assert reviews.text == "No reviews."
    assert chosen.text.splitlines()[2] == "size (chosen: 16 oz): 12 oz, 16 oz"
    assert results == found


def test_options_are_forgotten_with_the_product(env: WebshopEnv) -> None:
    visit = ["search[fernhill]", "click[b0mug00001]", "click[16 oz]", "click[features]", "click[< prev]"]
    turns = play(env, task_of(env), [*visit, "click[< prev]", "click[b0mug00001]"])
    assert "chosen: 16 oz" in turns[-3].text
    assert "chosen" not in turns[-1].text


def test_what_is_not_possible(env: WebshopEnv) -> None:
    wrong = [
        "click[buy now]",
        "search[]",
        "search",
        "look",
        "search[home]",
        "search[mug]",
        "click[b0mug00009]",
        "click[next]",
    ]
    turns = play(env, task_of(env), wrong)
    assert [turn.action_valid for turn in turns] == [True, False, False, False, False, True, False, False, False]
    for before, turn in itertools.pairwise(turns):
        if not turn.action_valid:
            assert (turn.text, turn.commands, turn.feedback) == (before.text, before.commands, "That is not possible here.")


def test_a_search_that_finds_nothing(env: WebshopEnv) -> None:
    turn = play(env, task_of(env), ["search[qwertz]"])[-1]
    assert (turn.text, turn.commands) == ("Page 1 of the results (0 in all)", ("click[back to search]",))


def test_steps_run_out(folder: Path) -> None:
    env = started(folder, max_steps=3)
    turns = play(env, task_of(env), ["search[mug]", "nonsense", "click[back to search]"])
    assert [turn.terminated for turn in turns] == [False, False, False, True]
    assert (turns[-1].success, turns[-1].reward) == (False, 0.0)


def test_short_texts_and_an_offered_query(folder: Path) -> None:
    env = started(folder, text_chars=20, offer_query=True)
    turn = env.reset(task_of(env))
    query = "search[find me lead free, dishwasher safe coffee mugs with color: moss green, and size: 12 oz]"
    assert turn.commands == ("search[...]", query)
    assert env.expert_action() == query
    turns = [turn, *map(env.command, (query, "click[b0mug00001]", "click[description]"))]
    assert all(len(line) <= 60 for line in turns[1].text.splitlines())
    assert turns[2].text.splitlines()[0] == "Fernhill Stoneware C..."
    assert turns[3].text == "A mug that keeps tea..."


# ---- the expert ----


def test_the_expert_solves_every_goal(env: WebshopEnv) -> None:
    for task in all_tasks(env):
        turn, steps = env.reset(task), 0
        while not turn.terminated:
            action = env.expert_action()
            assert action is not None
            assert CommandParser().parse(action, turn).action is not None
            turn, steps = env.command(action), steps + 1
        assert turn.success, task
        assert turn.info["score"] == 100
        assert steps <= 5


@pytest.mark.parametrize(
    "astray",
    [
        ["search[home]", "click[next >]"],
        ["search[lamp]", "click[b0lamp0002]", "click[features]"],
        ["search[fernhill]", "click[b0mug00001]", "click[16 oz]", "click[reviews]"],
    ],
)
def test_the_expert_knows_the_way_back(env: WebshopEnv, astray: list[str]) -> None:
    turn = play(env, task_of(env), astray)[-1]
    while not turn.terminated:
        action = env.expert_action()
        assert action is not None
        turn = env.command(action)
    assert turn.success


def test_the_expert_takes_the_title_where_the_instruction_finds_nothing(env: WebshopEnv) -> None:
    env.reset(task_of(env, "B0BOWL0001/goal-0"))
    assert env.expert_action() == "search[otter oak salad bowl for home]"


# ---- data ----


def test_products_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = started(write_goods(tmp_path))
    tasks = all_tasks(env)
    monkeypatch.setattr(catalogue, "_make", lambda *args: pytest.fail("read again"))
    again = WebshopEnv(str(tmp_path), cache_dir=str(tmp_path / "cache"), **FEW)
    again.start()
    assert all_tasks(again) == tasks
    assert again.reset(tasks[0]) == env.reset(tasks[0])


@pytest.mark.parametrize("chunk", [2, 7, 64, 1 << 20])
def test_files_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Also with letters of two bytes, however it is written, plain or packed."""
    monkeypatch.setattr(catalogue, "_CHUNK", chunk)
    objects = {"ä": {"b": [1, "}"]}, 'c "] d': {"e": {}}}
    for number, indent in enumerate((None, 2)):
        for opening, content in (("{", objects), ("[", list(objects.values())), ("[", [])):
            text = json.dumps(content, indent=indent, ensure_ascii=False)
            plain, packed = tmp_path / f"{number}.json", tmp_path / f"{number}.json.xz"
            plain.write_text(f" {text}\n", encoding="utf-8")
            packed.write_bytes(lzma.compress(plain.read_bytes()))
            expected = list(content.items()) if isinstance(content, dict) else [("", each) for each in content]
            assert list(catalogue._entries(plain, opening)) == list(catalogue._entries(packed, opening)) == expected


def test_packed_files_are_the_same_shop(tmp_path: Path, folder: Path, env: WebshopEnv) -> None:
    for name in (FILE, "items_ins_v2_1000.json"):
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress((folder / name).read_bytes()))
    packed = made(tmp_path)
    assert packed.version == env.version
    assert list(map(packed.content, all_tasks(packed))) == list(map(env.content, all_tasks(env)))


def test_the_full_set_has_files_of_its_own(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no items_shuffle\.json \(or items_shuffle\.json\.xz\)"):
        made(folder, full=True)
    for name in (FILE, "items_ins_v2_1000.json"):
        (tmp_path / name.replace("_1000", "")).write_bytes((folder / name).read_bytes())
    assert len(all_tasks(made(tmp_path, full=True))) == 14


def spoil(folder: Path, number: int, **changes: Any) -> Path:
    """The shop with another product; ``None`` takes a key away."""
    records = json.loads((write_goods(folder) / FILE).read_text())
    records[number] |= changes
    for key in [key for key, value in changes.items() if value is None]:
        del records[number][key]
    (folder / FILE).write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pricing": "on request"},
            r"product 1 \(B0MUG00001\) of .*: ValueError: its price 'on request' is none in dollars",
        ),
        ({"pricing": "$1.2.3"}, r"its price '\$1\.2\.3' is none in dollars"),
        ({"pricing": 5}, "its price 5 is none in dollars"),
        ({"name": None}, r"product 1 \(B0MUG00001\) of .*: it has no 'name'"),
        ({"name": 5}, r"product 1 \(B0MUG00001\) of .*: TypeError"),
        ({"asin": "Ä"}, r"product 1 \(Ä\) of .*: UnicodeEncodeError"),
        ({"asin": None}, r"product 1 \(\?\) of .*: it has no 'asin'"),
        ({"customization_options": ["red"]}, r"product 1 \(B0MUG00001\) of .*: AttributeError"),
    ],
)
def test_a_product_that_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        made(spoil(tmp_path, 0, **changes)).tasks("test")
    assert "\n" not in str(error.value)


def test_a_product_without_a_price_costs_what_the_publishers_say(tmp_path: Path) -> None:
    env = started(spoil(tmp_path, 0, pricing=None))
    assert "Price: $100.0" in play(env, task_of(env), ["search[fernhill]", "click[b0mug00001]"])[-1].text


@pytest.mark.parametrize("name", [FILE, "items_ins_v2_1000.json"])
@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-40], lambda data: b"", lambda data: b"nonsense", lambda data: data[:-3]]
)
@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_cut_off(tmp_path: Path, name: str, spoil: Callable[[bytes], bytes], packed: bool) -> None:
    path = write_goods(tmp_path) / name
    whole = path.read_bytes()
    if packed:
        path.unlink()
        path, whole = path.with_name(f"{name}.xz"), lzma.compress(whole)
    path.write_bytes(spoil(whole))
    with pytest.raises(ConfigError, match=rf"{path.name} is cut off or damaged; get it again") as error:
        made(tmp_path)
    assert "\n" not in str(error.value)
    if not packed:
        path.write_bytes(whole)
        assert made(tmp_path).tasks("test"), "nothing of it is kept"


def test_data_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBSHOP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; get the data, and set data or \$WEBSHOP_DATA"):
        WebshopEnv()
    monkeypatch.setenv("WEBSHOP_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no items_shuffle_1000\.json .*; get the data"):
        WebshopEnv(cache_dir=str(tmp_path)).tasks("test")
    (write_goods(tmp_path) / "items_human_ins.json").unlink()
    assert WebshopEnv(cache_dir=str(tmp_path)).tasks("test")
    with pytest.raises(ConfigError, match=r"there is no items_human_ins\.json"):
        WebshopEnv(cache_dir=str(tmp_path), human_goals=True).tasks("test")
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ConfigError, match="there is no product in"):
        WebshopEnv(cache_dir=str(tmp_path)).tasks("test")


@pytest.mark.parametrize("option", ["max_steps", "text_chars", "num_train", "num_test", "success_reward", "score_reward"])
def test_settings_out_of_range(folder: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"WebshopEnv: {option} must be at least"):
        WebshopEnv(str(folder), **{option: -1})


# ---- as a user meets it ----


def options(folder: Path, **settings: Any) -> list[str]:
    given = {"data": folder, "cache_dir": folder / "cache", **FEW, "offer_query": True, **settings}
    return [
        "--data.source.env=WebshopEnv",
        *(f"--data.source.env.{name}={value}" for name, value in given.items()),
        *("--data.source.max_prompt_tokens=1200", "--data.source.max_new_tokens=32", "--data.source.parser=NumberParser"),
        "--model.policy.max_positions=1300",
    ]


def test_a_run(folder: Path, tmp_path: Path) -> None:
    more = ["--trainer.max_epochs=1", "--warm_start.actions=expert", "--warm_start.updates=5", "--data.eval_tasks=2"]
    more += ["--data.source.num_workers=2", "--data.source.on_invalid=end"]
    run(tmp_path, *options(folder, retriever="Bm25", text_chars=10), *more)
    [before, after] = evaluations(tmp_path)
    assert (before["errors"], after["errors"]) == (0, 0)


@pytest.mark.parametrize("player", ["expert", "random"])
def test_players(folder: Path, tmp_path: Path, player: str) -> None:
    run(tmp_path, *options(folder), f"--evaluation.player={player}", "--data.test_split=train", command="test")
    episodes = json.loads((tmp_path / "test.json").read_text())["episodes"]
    assert len(episodes) == 7
    assert all(episode["success"] == (episode["info"]["score"] == 100) for episode in episodes)
    assert player == "random" or all(episode["success"] for episode in episodes)


def test_the_data_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_goods(tmp_path)
    command = ["webshop", f"--data={folder}", f"--cache_dir={tmp_path / 'cache'}", "--num_test=3", "--num_valid=4"]
    data_command(command)
    said = capsys.readouterr().out
    assert "version: 12 products " in said
    assert [line.partition(",")[0] for line in said.splitlines()[1:]] == [
        *("train: 7 tasks", "valid: 4 tasks", "test: 3 tasks")
    ]
    data_command(command)
    assert capsys.readouterr().out == said
    (folder / FILE).write_text("[{")
    with pytest.raises(SystemExit) as error:
        data_command(command)
    assert error.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{FILE} is cut off or damaged; get it again")


CHANGES: dict[str, Callable[[list[dict[str, Any]], dict[str, Any]], Any]] = {
    "a price": lambda records, about: records[0].update(pricing="$15.50"),
    "an attribute of the goal": lambda records, about: about["B0MUG00001"]["instruction_attributes"].pop(),
    "an attribute of the product": lambda records, about: about["B0MUG00001"]["attributes"].pop(),
    "an instruction": lambda records, about: about["B0MUG00001"].update(instruction="Find me mugs"),
}


def change(shop: Path, name: str) -> None:
    paths = [shop / FILE, shop / "items_ins_v2_1000.json"]
    records, about = (json.loads(path.read_text()) for path in paths)
    CHANGES[name](records, about)
    for path, content in zip(paths, (records, about), strict=True):
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", CHANGES)
def test_content_changes_with_goal_and_product(tmp_path: Path, name: str) -> None:
    def contents() -> dict[str, str]:
        env = made(tmp_path)
        return {task.id: env.content(task) for task in all_tasks(env)}

    write_goods(tmp_path)
    before = contents()
    change(tmp_path, name)
    assert {id for id, content in contents().items() if content != before[id]} == {id for id in before if "MUG00001" in id}


def test_panels_refuse_and_name_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shop, panel = write_goods(tmp_path / "shop"), tmp_path / "panel.json"
    args = [*options(shop), "--data.eval_tasks=99", *places(tmp_path / "run")]
    panel_command(["make", f"--config={TOY}", *args, "--split=train", f"--out={panel}"])
    ids = [task["id"] for task in json.loads(panel.read_text())["tasks"]]
    change(shop, "a price")
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *options(shop), f"--data.eval_panel={panel}", "--evaluation.player=random", command="validate")
    mugs = [id for id in ids if "B0MUG00001" in id]
    assert mugs
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"{len(mugs)} of {len(ids)} tasks have another content than when it was made: {', '.join(mugs)}")


def test_a_panel_is_of_these_products(folder: Path, tmp_path: Path) -> None:
    """What a search goes through decides what is found for every goal."""
    other = made(spoil(tmp_path, 8, name="Otter Oak Salad Plate for Home"))
    assert other.version != made(folder).version
    assert other.version.startswith("12 products ")
    assert made(folder, human_goals=True).version != made(folder).version
