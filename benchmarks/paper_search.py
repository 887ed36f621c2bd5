"""Paper search on a folder of data: the index, what it finds, expert and chance, speed.

    pip install -c constraints.txt -e ".[search]"
    python benchmarks/paper_search.py --data $PAPER_SEARCH_DATA

The folder is that of ``PaperSearchEnv`` (docs/paper_search.md), with ``papers.jsonl`` and, if there is one,
``citations.jsonl``. Splits whose file is missing are left out. Per split, the first ``--questions`` of them:

- ``recall@k``: of the answers among the first k papers for the question itself, mean over questions, and queries/s;
- who plays: the expert (titles of the answers), one search of the question itself, and chance: at each of five steps one
  search for three words of the question or, where there are citations, as often an expansion of a paper in the list.
  Recall@all and F1@all are over all papers found, mean over questions.

Indexing is done anew in a folder of its own. Seconds are of processor time, user and system; steps/s in worker processes,
with ``--slots`` episodes at a time, are also by the clock. Writes ``benchmarks/results/paper_search.json`` and prints
tables, in about a minute.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from steppo.envs import PaperSearchEnv
from steppo.envs.paper_search import LocalPapers
from steppo.envs.pool import EnvPool
from steppo.types import Action, Task, ToolCall

ROOT = Path(__file__).parent.parent
DEPTHS = (5, 10, 20, 50)
PLAYERS = ("expert", "question", "random")


def nothing(done: int, total: int) -> None:
    pass


def search(query: str) -> Action:
    return Action(tool_calls=(ToolCall("search", {"query": query}, "call_0"),))


def chooser(player: str, env: PaperSearchEnv, task: Task) -> Callable[[int, str], Action]:
    """What a player does, by the number of the step and the text that it sees."""
    chance, question = random.Random(task.id), task.data["question"]

    def by_chance(number: int, text: str) -> Action:
        listed = [line[1:].partition("]")[0] for line in text.splitlines()[1:]]
        if env.papers.expands and listed and chance.random() < 0.5:
            return Action(tool_calls=(ToolCall("expand", {"paper_id": chance.choice(listed)}, "call_0"),))
        words = question.split()
        return search(" ".join(chance.sample(words, min(3, len(words)))))

    return {
        "expert": lambda number, text: env.expert_action(),
        "question": lambda number, text: Action(text="done") if number else search(question),
        "random": by_chance,
    }[player]


def episode(env: PaperSearchEnv, task: Task, player: str) -> dict[str, Any]:
    """One episode: figures, return, steps, and seconds of processor time."""
    choose = chooser(player, env, task)
    began = time.process_time()
    turn = env.reset(task)
    reset_s, steps_s, total, steps = time.process_time() - began, 0.0, 0.0, 0
    while not turn.terminated and steps < env.max_steps:
        action = choose(steps, turn.text)
        began = time.process_time()
        turn = env.step(action)
        steps_s += time.process_time() - began
        total, steps = total + turn.reward, steps + 1
    return {**turn.info, "return": total, "success": turn.success, "steps": steps, "reset_s": reset_s, "steps_s": steps_s}


def played(env: PaperSearchEnv, tasks: Sequence[Task], player: str) -> dict[str, float]:
    """Means over episodes, median seconds of a reset, steps per second."""
    episodes = [episode(env, task, player) for task in tasks]
    means = {name: statistics.fmean(float(one[name]) for one in episodes) for name in episodes[0] if not name.endswith("_s")}
    steps, spent = sum(one["steps"] for one in episodes), sum(one["steps_s"] for one in episodes)
    return {**means, "reset_s": statistics.median(one["reset_s"] for one in episodes), "steps_per_s": steps / spent}


def alone(env: PaperSearchEnv, tasks: Sequence[Task]) -> dict[str, Any]:
    """What the question itself finds, and how fast."""
    found: list[list[str]] = []

    def ask() -> None:
        found[:] = [[paper.id for paper in env._papers.search(task.data["question"], max(DEPTHS))] for task in tasks]

    times = [time.process_time()]
    for _ in range(3):
        ask()
        times.append(time.process_time())
    answers = [{id for id, _ in task.data["answers"]} for task in tasks]
    pairs = list(zip(answers, found, strict=True))
    recall = {k: statistics.fmean(len(gold & {*ids[:k]}) / len(gold) for gold, ids in pairs) for k in DEPTHS}
    spent = statistics.median(end - start for start, end in itertools.pairwise(times))
    return {"queries_per_s": len(tasks) / spent, "recall": recall}


def in_workers(env: PaperSearchEnv, tasks: Sequence[Task], workers: int, slots: int) -> dict[str, float]:
    """Steps by chance in all slots at once: per second by the clock, and per second of the workers' processor time."""
    pool = EnvPool(PaperSearchEnv(str(env.folder), env.papers), slots, workers, 60.0, None, 600.0)
    steps, clock, spent = 0, 0.0, 0.0
    try:
        for first in range(0, len(tasks) - slots + 1, slots):
            group = tasks[first : first + slots]
            choices = [chooser("random", env, task) for task in group]
            for slot, task in enumerate(group):
                pool.reset(slot, task, want_expert=False)
            turns = [pool.receive(slot).turn for slot in range(slots)]
            began, spent_before = time.perf_counter(), _childrens_seconds()
            for number in range(env.max_steps):
                for slot, turn in enumerate(turns):
                    pool.step(slot, choices[slot](number, turn.text))
                turns = [pool.receive(slot).turn for slot in range(slots)]
            clock, spent = clock + time.perf_counter() - began, spent + _childrens_seconds() - spent_before
            steps += slots * env.max_steps
        return {"steps_per_s": steps / clock, "steps_per_processor_s": steps / spent}
    finally:
        pool.close()


def _childrens_seconds() -> float:
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("PAPER_SEARCH_DATA"), help="$PAPER_SEARCH_DATA unless given")
    parser.add_argument("--questions", type=int, default=1000, help="of each split")
    parser.add_argument("--slots", type=int, default=16, help="episodes at a time in worker processes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "paper_search.json")
    args = parser.parse_args()

    from measuring import about, peak_memory, seconds  # with torch, which worker processes need not load

    folder = Path(args.data)
    citations = folder / "citations.jsonl"
    with tempfile.TemporaryDirectory() as cache:
        papers = LocalPapers(str(folder / "papers.jsonl"), str(citations) if citations.exists() else None, cache_dir=cache)
        env = PaperSearchEnv(args.data, papers)
        times: list[tuple[float, float]] = []
        index: dict[str, float] = {"peak_bytes": peak_memory(lambda: times.append(seconds(lambda: papers.prepare(nothing))))}
        index["process_seconds"] = times[0][1]
        index["process_seconds_if_there"] = seconds(lambda: papers.prepare(nothing))[1]
        index["bytes_on_disk"] = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        before = psutil.Process().memory_info().rss
        index["opening_process_seconds"] = seconds(env.start)[1]
        splits = {split: tasks for split in env.splits if (tasks := questions(env, split))}
        played_on = {split: tasks[: args.questions] for split, tasks in splits.items()}
        record = about() | {
            "command": f"python benchmarks/paper_search.py --questions {args.questions} --slots {args.slots}",  # no folder
            "data_version": env.version,
            "counts": {split: len(tasks) for split, tasks in splits.items()},
            "papers": env._papers._open.execute("SELECT COUNT(*) FROM papers").fetchone()[0],
            "index": index,
            "question_alone": {split: alone(env, tasks) for split, tasks in played_on.items()},
        }
        index["bytes_in_a_process"] = psutil.Process().memory_info().rss - before
        record["players"] = {
            split: {player: played(env, tasks, player) for player in PLAYERS} for split, tasks in played_on.items()
        }
        most = max(played_on.values(), key=len)
        record["steps_per_s_in_workers"] = {workers: in_workers(env, most, workers, args.slots) for workers in (1, 2)}
    record["versions"]["bm25s"] = importlib.metadata.version("bm25s")
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    show(record)


def questions(env: PaperSearchEnv, split: str) -> list[Task]:
    try:
        return env.tasks(split)
    except Exception as error:
        print(f"{split} is left out: {error}")
        return []


def show(record: dict[str, Any]) -> None:
    from measuring import markdown

    index, mib = record["index"], 2**20
    print(f"\n{record['papers']:,} papers are indexed in {index['process_seconds']:.1f} s of processor time", end="")
    print(f" with at most {index['peak_bytes'] / mib:.0f} MiB; {index['bytes_on_disk'] / mib:.0f} MiB on disk", end="")
    print(f", opened in {index['opening_process_seconds'] * 1000:.0f} ms", end="")
    print(f", {index['bytes_in_a_process'] / mib:.0f} MiB of it in a process after all questions.\n")
    heads = ["split", "questions", *(f"recall@{k}" for k in DEPTHS), "queries/s"]
    rows = [
        [
            split,
            str(record["counts"][split]),
            *(f"{found['recall'][k]:.2f}" for k in DEPTHS),
            f"{found['queries_per_s']:,.0f}",
        ]
        for split, found in record["question_alone"].items()
    ]
    print(markdown(heads, rows) + "\n")
    forms = {
        "recall": ".3f",
        "f1": ".3f",
        "return": ".2f",
        "papers": ".0f",
        "success": ".2f",
        "steps": ".1f",
        "reset_s": ".5f",
        "steps_per_s": ",.0f",
    }
    heads = ["split", "player", *forms]
    rows = [
        [split, player, *(format(row[name], form) for name, form in forms.items())]
        for split, players in record["players"].items()
        for player, row in players.items()
    ]
    print(markdown(heads, rows) + "\n")
    for workers, rates in record["steps_per_s_in_workers"].items():
        print(f"{workers} worker{'s' * (workers > 1)}: {rates['steps_per_s']:,.0f} steps/s by the clock", end="")
        print(f", {rates['steps_per_processor_s']:,.0f} per second of processor time of theirs")


if __name__ == "__main__":
    main()
