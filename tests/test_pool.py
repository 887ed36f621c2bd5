"""The data pool: each group whole and once, whoever is killed when."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pool as benchmark
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from steppo.errors import ConfigError, RunError
from steppo.pool import SCHEMA, DataPool, PoolFull
from steppo.pool.command import main
from steppo.pool.records import ARRAYS, decode, encode
from steppo.types import Episode, Step, StopReason

fork = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool.sqlite"


@pytest.fixture
def pool(path: Path) -> Iterator[DataPool]:
    pool = DataPool(path, max_waiting=4, keep=1)
    yield pool
    pool.close()


def step(index: int = 0, version: int = 0, **others: Any) -> Step:
    ids, logprobs = np.arange(3, dtype=np.int32), np.full(3, -0.1, dtype=np.float32)
    return Step(
        ids, ids + index, logprobs, 0.5, index, "stop", False, False, True, "a room", "north", 1.0, version, **others
    )


def group(name: str, version: int = 0, size: int = 2) -> list[Episode]:
    steps = step(0, version), step(1, version + 1)
    return [Episode(f"{name}/{n}", n, 0, f"task of {name}", steps, StopReason.TERMINATED, success=True) for n in range(size)]


def fill(pool: DataPool, *names: str, version: int = 0) -> None:
    for name in names:
        assert pool.put(name, group(name, version), timeout=0)


def names_of(groups: list[list[Episode]] | None) -> list[str]:
    return [episodes[0].id.partition("/")[0] for episodes in groups or []]


def states(pool: DataPool) -> dict[str, str]:
    return {info.name: info.state for info in pool.groups()}


# ---- records ----

# A high surrogate before a low one would be read as one letter; low ones alone are what undecodable bytes become.
letters = st.characters(exclude_categories=["Cs"]) | st.characters(min_codepoint=0xDC00, max_codepoint=0xDFFF)
texts = st.text(letters, max_size=8)
entries = st.dictionaries(texts, texts | st.floats() | st.integers() | st.booleans(), max_size=3)
int32 = arrays.arrays(np.int32, st.integers(0, 4))
float32 = arrays.arrays(np.float32, st.integers(0, 4), elements=st.floats(width=32))
number, flag = st.integers(0, 2**40), st.booleans()
steps = st.builds(
    Step, int32, int32, float32, st.floats(), number, texts, flag, flag, flag, texts, texts, st.floats(0, 2), number, texts,
    entries, st.none() | texts,
)  # fmt: skip
episodes = st.builds(
    Episode, texts, number, number, texts, st.lists(steps, max_size=3).map(tuple), st.sampled_from(StopReason),
    st.none() | int32, st.none() | flag, texts, st.floats(), entries,
)  # fmt: skip


def same(left: Any, right: Any) -> bool:
    """Of the same type, and bit for bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, Episode | Step):
        return all(same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[name], right[name]) for name in left)
    return (math.isnan(left) and math.isnan(right)) or repr(left) == repr(right) if type(left) is float else left == right


@settings(deadline=None, derandomize=True)
@given(episodes)
def test_an_episode_comes_back_bit_for_bit(episode: Episode) -> None:
    text, data = encode(episode)
    text.encode("ascii")
    found = decode(text, data)
    assert same(found, episode)
    assert all(one.flags.writeable for each in found.steps for one in (each.prompt_ids, each.behaviour_logprobs))


def test_numpy_numbers_are_stored_as_numbers() -> None:
    episode = Episode(
        "a", 0, 0, "t", (step(metadata={"size": np.float32(0.1)}),), StopReason.TERMINATED, success=np.bool_(True)
    )
    found = decode(*encode(episode))
    assert (found.success, found.steps[0].metadata) == (True, {"size": float(np.float32(0.1))})


def test_what_is_not_plain_is_refused_by_name() -> None:
    with pytest.raises(RunError, match=r"^episode a cannot be stored: TypeError"):
        encode(Episode("a", 0, 0, "t", (), StopReason.TERMINATED, metadata={"path": Path()}))  # type: ignore[dict-item]


def test_who_changes_a_record_raises_its_schema() -> None:
    """A new field changes what is written: raise ``SCHEMA``, read the older ones or refuse them, and mend this test."""
    names = "prompt_ids action_ids behaviour_logprobs reward index finish_reason terminated truncated action_valid "
    names += "observation action temperature policy_version agent_id metadata state_key | id order group_id task_id steps "
    names += "stop_reason final_prompt_ids success error final_reward metadata"
    now = " | ".join(" ".join(field.name for field in fields(record)) for record in (Step, Episode))
    assert (SCHEMA, now) == (1, names)
    assert {name for name in now.split() if name.endswith(("_ids", "_logprobs"))} == set(ARRAYS)


@pytest.mark.parametrize(
    "change",
    [{"schema": 0}, {"schema": 2}, {"schema": None}, {"steps": [{}]}, {"new": 1}, {"final_prompt_ids": ["<i4", 10**6, 1]}],
)
def test_another_schema_is_refused_in_one_line(path: Path, pool: DataPool, change: dict[str, Any]) -> None:
    fill(pool, "a")
    with sqlite3.connect(path) as db:
        record = json.loads(db.execute("SELECT record FROM episodes").fetchone()[0])
        db.execute("UPDATE episodes SET record = ? WHERE sample = 0", (json.dumps(record | change),))
    what = f"of schema {change['schema']}, and this steppo reads 1" if "schema" in change else "damaged record"
    with pytest.raises(RunError, match=rf"pool.sqlite, group 1: a .*{what}"):
        pool.claim(0, 1)


# ---- producers and a learner ----


def test_first_in_first_out_and_the_same_again(pool: DataPool) -> None:
    fill(pool, "a", "b", "c")
    assert pool.claim(0, 4) is None
    assert set(states(pool).values()) == {"waiting"}
    assert names_of(pool.claim(0, 2)) == ["a", "b"]
    fill(pool, "d", "e")
    assert names_of(pool.claim(0, 2)) == ["a", "b"]
    assert names_of(pool.claim(1, 2)) == ["c", "d"]
    assert names_of(pool.claim(0, 2)) == ["a", "b"], "a learner that goes on from its checkpoint before iteration 0"
    assert states(pool) == dict.fromkeys("abcd", "claimed") | {"e": "waiting"}
    assert all(map(same, pool.claim(0, 2)[1], group("b")))  # type: ignore[index]


def test_ranks_share_a_claim(path: Path, pool: DataPool) -> None:
    fill(pool, "a", "b", "c")
    other = DataPool(path)
    assert names_of(other.claim(0, 3, rank=1, world_size=2)) == ["b"]
    assert names_of(pool.claim(0, 3, rank=0, world_size=2)) == ["a", "c"]
    other.close()


def test_what_a_checkpoint_holds_is_not_served_and_goes(pool: DataPool) -> None:
    fill(pool, "a", "b", "c", "d")
    pool.claim(0, 3)
    pool.learned(0)
    assert all(info.is_stored for info in pool.groups())
    pool.learned(1)
    assert states(pool) == dict.fromkeys("abc", "learned") | {"d": "waiting"}
    assert [info.name for info in pool.groups() if info.is_stored] == ["c", "d"], "one is kept"
    with pytest.raises(ConfigError, match=r"iteration 0 is learned, a checkpoint holds 1: go on with that one"):
        pool.claim(0, 1)
    pool.learned(0)
    assert states(pool)["a"] == "learned", "never back"
    assert not pool.put("a", group("a"))
    assert names_of(pool.claim(1, 1)) == ["d"]


def test_named_groups_are_claimed_all_or_none(pool: DataPool) -> None:
    fill(pool, "a", "b", "c")
    assert pool.find(["c", "a", "x"]) == {"a": 1, "c": 3}
    for _ in range(2):
        pool.claim_named(4, ["c", "a"])
        assert states(pool) == {"a": "claimed", "b": "waiting", "c": "claimed"}
    assert pool.waiting == 1
    for iteration, names in ((5, ["b", "a"]), (5, ["b", "x"])):
        with pytest.raises(ConfigError, match="another iteration than 5 has groups of its plan: take a new file"):
            pool.claim_named(iteration, names)
    assert pool.waiting == 1
    pool.learned(6)
    with pytest.raises(ConfigError, match="iteration 5 is learned, a checkpoint holds 6"):
        pool.claim_named(5, ["b"])


def test_a_name_is_added_once(pool: DataPool) -> None:
    fill(pool, "a")
    assert "a" in pool
    assert "b" not in pool
    assert not pool.put("a", group("another"))
    assert len(pool.groups()) == 1


def test_too_old_ones_are_dropped_when_claimed(pool: DataPool) -> None:
    fill(pool, "old", version=3)
    fill(pool, "a", "b", version=4)
    assert pool.claim(0, 3, oldest_version=4) is None
    assert states(pool) == {"old": "stale", "a": "waiting", "b": "waiting"}
    assert not pool.read(1)
    assert names_of(pool.claim(0, 2, oldest_version=4)) == ["a", "b"]
    assert names_of(pool.claim(0, 2, oldest_version=9)) == ["a", "b"], "what is claimed is admitted"
    info = pool.groups()[1]
    assert (info.episodes, info.steps, info.mean_return) == (2, 4, 1.0)
    assert (info.oldest_version, info.newest_version) == (4, 5)


def test_a_full_pool_refuses_or_has_one_wait(path: Path, pool: DataPool) -> None:
    fill(pool, "a", "b", "c", "d")
    with pytest.raises(PoolFull, match=r"is full: 4 groups wait; e was not added"):
        pool.put("e", group("e"), timeout=0)
    assert not pool.put("a", group("a"), timeout=0), "it is there"
    pool.close()
    producer = fork.Process(target=lambda: DataPool(path, max_waiting=4).put("e", group("e")))
    producer.start()
    learner = DataPool(path)
    producer.join(0.2)
    assert producer.is_alive()
    learner.claim(0, 1)
    producer.join()
    assert names_of(learner.claim(1, 4, timeout=10)) == ["b", "c", "d", "e"]
    learner.close()


def test_a_learner_waits_as_long_as_it_is_told(path: Path) -> None:
    def later() -> None:
        time.sleep(0.2)
        DataPool(path).put("a", group("a"))

    producer = fork.Process(target=later)
    producer.start()
    learner = DataPool(path)
    assert learner.claim(0, 1) is None
    assert names_of(learner.claim(0, 1, timeout=60)) == ["a"]
    producer.join()
    learner.close()


def test_the_file_stays_as_large_as_what_is_stored(path: Path) -> None:
    large, pool, sizes = group("large", size=1)[0], DataPool(path, keep=2), []
    large.steps[0].prompt_ids.resize(10_000, refcheck=False)
    for iteration in range(40):
        pool.put(str(iteration), [large])
        pool.claim(iteration, 1)
        pool.learned(iteration + 1)
        sizes.append(pool._value("PRAGMA page_count"))
    assert sizes[-1] <= sizes[10] + 2, "a line of each group stays"
    pool.close()


# ---- crashes ----


def at_once(*jobs: Callable[[], Any]) -> list[int | None]:
    processes = [fork.Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def is_killed(path: Path, act: Callable[[DataPool], Any], statement: int) -> bool:
    """Kills who acts before the n-th statement that SQLite gets."""

    def run() -> None:
        connect, count = sqlite3.connect, itertools.count()

        def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            db = connect(*args, **kwargs)
            db.set_trace_callback(lambda _: os.kill(os.getpid(), signal.SIGKILL) if next(count) == statement else None)
            return db

        sqlite3.connect = traced  # type: ignore[assignment]  # in this process
        act(DataPool(path, max_waiting=4, keep=1))

    [code] = at_once(run)
    assert code in (0, -9)
    return code == -9


def test_many_begin_at_once(path: Path) -> None:
    def produce(number: int) -> None:
        pool = DataPool(path)
        for place in range(4):
            pool.put(f"{number}-{place}", group(f"{number}-{place}"))

    assert at_once(*(lambda number=number: produce(number) for number in range(4))) == [0] * 4  # type: ignore[misc]
    pool = DataPool(path)
    wanted = {f"{number}-{place}" for number in range(4) for place in range(4)}
    assert set(names_of(pool.claim(0, 16))) == wanted
    pool.close()


def test_all_who_make_the_file_at_once_can_open_it(tmp_path: Path) -> None:
    """Two that are about to write the first page make SQLite refuse one, which must not end it."""
    threads = 8
    barrier = threading.Barrier(threads)

    def make(path: Path) -> int:
        barrier.wait()
        with closing(DataPool(path)) as pool:
            return pool.waiting

    with ThreadPoolExecutor(threads) as executor:
        for attempt in range(60):
            assert list(executor.map(make, [tmp_path / f"{attempt}.sqlite"] * threads)) == [0] * threads


def test_killed_at_any_statement(path: Path) -> None:
    """Who puts, claims or says what is learned: all of it is there or nothing, and is done again."""
    acts: list[Callable[[DataPool], Any]] = [lambda pool: pool.put("a", group("a")), lambda pool: pool.put("b", group("b"))]
    acts += [lambda pool: pool.put("c", group("c")), lambda pool: pool.claim(0, 2), lambda pool: pool.learned(1)]
    seen, kills = set(), 0
    for act in acts:
        for statement in itertools.count():
            again = is_killed(path, act, statement)
            kills += again
            pool = DataPool(path, create=statement == 0)
            seen.add(" ".join(f"{info.name}:{info.state}:{len(pool.read(info.number))}" for info in pool.groups()))
            pool.close()
            if not again:
                break
    after = ["", "a:waiting:2", "a:waiting:2 b:waiting:2", "a:waiting:2 b:waiting:2 c:waiting:2"]
    after += ["a:claimed:2 b:claimed:2 c:waiting:2", "a:learned:0 b:learned:2 c:waiting:2"]
    assert seen == set(after)
    assert kills > 60


def test_killed_at_any_statement_of_its_making(tmp_path: Path) -> None:
    for statement in itertools.count():
        again = is_killed(tmp_path / f"{statement}", lambda pool: None, statement)
        pool = DataPool(tmp_path / f"{statement}")
        fill(pool, "a")
        pool.close()
        if not again:
            break
    assert statement > 10


def test_producers_and_a_learner_killed_at_random(tmp_path: Path) -> None:
    report = benchmark.killed(tmp_path, seconds=2, kills=6, seed=1)
    assert report["kills"] == 6
    assert report["integrity"] == "ok"
    assert report["exit_codes"] == [0] * 4
    assert report["groups_noted"] > 0
    for fault in ("lost", "torn", "learned_twice", "served_otherwise", "claimed_and_not_learned"):
        assert report[fault] == 0, fault


# ---- the command ----


def test_looking_into_a_pool(path: Path, pool: DataPool, capsys: pytest.CaptureFixture[str]) -> None:
    fill(pool, "a", "b", "c")
    pool.claim(0, 2)
    pool.learned(1)
    pool.put("\x1b[2Jd", [Episode("e\x1b/0", 0, 0, "t", (), StopReason.ENV_ERROR, error="it broke")])
    main(["ls", str(path)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["number", "group", "episodes", "steps", "return", "versions", "state", "iteration"]
    assert lines[0].split() == ["1", "a", "2", "4", "1.000", "0-1", "learned", "0", "deleted"]
    assert lines[3].split() == ["4", "\ufffd[2Jd", "1", "0", "0.000", "waiting"]
    assert lines[4].startswith("4 groups: 2 waiting, 0 claimed, 2 learned, 0 stale; ")
    main(["ls", str(path), "--last", "1", "--state", "waiting"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    main(["show", str(path), "c"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "c/0: task task of c, terminated, success True, return 1"
    assert lines[3].split() == ["1", "agent", "1", "0.5", "3", "3", "north", "a", "room"]
    main(["show", str(path), "4"])
    assert "\x1b" not in (shown := capsys.readouterr().out)
    assert "env_error" in shown
    assert "it broke" in shown


def test_export(path: Path, pool: DataPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = step(metadata={"size": math.nan, "colour": "r\u00f6t"})
    pool.put("a", [Episode("a/0", 0, 0, "t", (odd,), StopReason.STEP_LIMIT, np.arange(2, dtype=np.int32))])
    fill(pool, "b", "c")
    pool.claim(0, 2)
    main(["export", str(path), "--out", str(tmp_path / "all.jsonl")])
    assert capsys.readouterr().out == f"{tmp_path / 'all.jsonl'}: 5 episodes\n"
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["a/0", "b/0", "b/1", "c/0", "c/1"]
    assert rows[0]["steps"][0]["metadata"] == {"size": None, "colour": "r\u00f6t"}
    assert rows[0]["steps"][0]["behaviour_logprobs"] == [float(np.float32(-0.1))] * 3
    assert (rows[0]["final_prompt_ids"], rows[0]["group_state"], rows[0]["iteration"]) == ([0, 1], "claimed", 0)
    main(["export", str(path), "--out", str(tmp_path / "some.jsonl"), "--state", "waiting"])
    assert len((tmp_path / "some.jsonl").read_text().splitlines()) == 2


def test_parquet_says_what_jsonl_says(path: Path, pool: DataPool, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed: steppo[parquet]")
    odd = step(metadata={"size": math.nan, "colour": "red"})
    pool.put("a", [Episode("a/0", 0, 0, "t", (odd,), StopReason.STEP_LIMIT, np.arange(2, dtype=np.int32))])
    fill(pool, "b")
    for suffix in ("jsonl", "parquet"):
        main(["export", str(path), "--out", str(tmp_path / f"all.{suffix}")])
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    found = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    for row in rows:
        for record in (row, *row["steps"]):
            record["metadata"] = json.dumps(record["metadata"])
    assert found == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND: python -m steppo.pool --help"),
        (["ls", "none"], "there is no pool none"),
        (["ls", "text"], "text is no pool of episodes"),
        (["ls", "empty"], "empty is no pool of episodes"),
        (["ls", "other"], "other is no pool of episodes"),
        (["ls", "newer"], "newer is of layout 2, and this steppo reads 1: take a new file"),
        (["ls", "."], "there is no pool ."),
        (["show", "pool.sqlite", "x"], "pool.sqlite has no group x: python -m steppo.pool ls pool.sqlite"),
        (["show", "pool.sqlite", "a"], "the episodes of a are deleted: it is stale"),
        (["export", "pool.sqlite", "--out", "a.csv"], "--out must end in .jsonl or .parquet, not a.csv"),
        (["export", "pool.sqlite", "--out", "there.jsonl"], "there.jsonl exists already"),
        (["export", "pool.sqlite", "--out", "no/a.jsonl"], "cannot write no/a.jsonl: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, pool: DataPool, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(pool, "a")
    pool.claim(0, 1, oldest_version=1)
    Path("text").write_text("no database " * 100)
    Path("empty").touch()
    Path("there.jsonl").touch()
    with sqlite3.connect("other") as db:
        db.execute("CREATE TABLE some (thing)")
    DataPool("newer").close()
    with sqlite3.connect("newer") as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_mistakes_in_code() -> None:
    for wrong in ({"max_waiting": 0}, {"keep": -1}):
        with pytest.raises(ConfigError, match="must be at least"):
            DataPool("unused", **wrong)
    with pytest.raises(RunError, match=r"^the pool .*File exists"):
        DataPool(Path(__file__) / "pool.sqlite")


def test_claims_that_make_no_sense(pool: DataPool) -> None:
    with pytest.raises(ConfigError, match=r"the pool holds 4 groups \(max_waiting\), and an iteration wants 5"):
        pool.claim(0, 5)
    with pytest.raises(ConfigError, match="iteration must be at least 0"):
        pool.claim(-1, 1)
    with pytest.raises(ConfigError, match="group a has no episodes"):
        pool.put("a", [])
