"""Multi-hop QA on files of the publishers: the index, what the question alone finds, and success of expert and chance.

    pip install -c constraints.txt -e ".[search]"
    python benchmarks/multihop_qa.py --data $MULTIHOP_QA_DATA --questions valid=hotpot_dev_distractor_v1.json \\
        --questions musique=musique_ans_v1.0_dev.jsonl

Of each split's corpus: seconds and peak memory of indexing by ``Bm25``, its size on disk, memory of a worker's own (not
shared) that opening it and asking all questions takes, searches per second, and the share of questions whose gold titles are
all among the best 3, 5 and 10 passages for the question alone. Then steps per second, resets included, by the expert, on one
core and on two (two processes at once, their rates added); success of the expert, and by chance: two searches for words of
the question, drawn by lot, then a passage's title as the answer. Seconds are of processor time, medians over ``--repeats``.

Writes ``benchmarks/results/multihop_qa.json`` and prints tables. Takes about a minute for some hundred questions.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import multiprocessing as mp
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measuring import about, markdown, peak_memory

from steppo.envs import MultihopQAEnv
from steppo.envs.search import Texts
from steppo.types import Action, Task, ToolCall, Turn

ROOT = Path(__file__).parent.parent
DEPTHS = (3, 5, 10)


def ignore(done: int, total: int) -> None:
    pass


def by_chance(env: MultihopQAEnv, task: Task) -> Callable[[Turn], Action]:
    chance = random.Random(task.id)
    words = task.data["question"].split()
    queries = iter([" ".join(chance.choices(words, k=3)) for _ in range(2)])

    def choose(turn: Turn) -> Action:
        query = next(queries, None)
        if query is not None:
            return Action(tool_calls=(ToolCall("search", {"query": query}),))
        titles = [line.partition("] ")[2].partition(":")[0] for line in turn.text.splitlines() if line.startswith("[")]
        return Action(text=f"<answer>{chance.choice(titles or ['nothing'])}</answer>")

    return choose


def own_memory() -> int:
    """Bytes that no other process can share."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def play(env: MultihopQAEnv, tasks: Sequence[Task], expert: bool) -> dict[str, Any]:
    """Means over episodes, and seconds of processor time."""
    last, steps, began = [], 0, time.process_time()
    for task in tasks:
        turn, info = env.reset(task), {}
        choose = (lambda turn: env.expert_action()) if expert else by_chance(env, task)
        while not turn.terminated:
            turn = env.step(choose(turn))
            steps += 1
            info |= turn.info
        last.append(info)
    seconds = time.process_time() - began
    means = {name: statistics.mean(float(info[name]) for info in last) for name in ("exact_match", "f1", "recall")}
    return means | {"steps": steps / len(tasks), "steps_per_second": steps / seconds}


def play_in_process(env: MultihopQAEnv, tasks: Sequence[Task], expert: bool) -> float:
    env.start()
    play(env, tasks, expert)  # what is read first is in memory then
    return play(env, tasks, expert)["steps_per_second"]


def measure(env: MultihopQAEnv, split: str, repeats: int) -> dict[str, Any]:
    tasks = env.tasks(split)
    place = env._place(tasks[0].data["corpus"])
    env.prepare(tasks, ignore)  # passages, and a first index
    passages = Texts(place)
    fresh, index = copy.deepcopy(env), copy.copy(env.retriever)
    seconds, peaks = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            peaks.append(peak_memory(lambda there=Path(folder): index.prepare(passages, there, ignore)))
            seconds.append(time.process_time() - began)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    rates, before = [], own_memory()
    index.start(place.parent)
    for _ in range(repeats):
        began = time.process_time()
        found = [index.search(task.data["question"], max(DEPTHS)) for task in tasks]
        rates.append(len(tasks) / (time.process_time() - began))
    own = max(own_memory() - before, 0)
    ranked = [[passages[row].partition("\n")[0] for row, _ in rows] for rows in found]
    played = list(zip(tasks, ranked, strict=True))
    recall = {
        str(depth): statistics.mean(set(task.data["titles"]) <= set(titles[:depth]) for task, titles in played)
        for depth in DEPTHS
    }
    env.start()
    expert = [play(env, tasks, expert=True) for _ in range(repeats)]
    with mp.get_context("spawn").Pool(2) as pool:
        both = pool.starmap(play_in_process, [(fresh, tasks, True)] * 2, chunksize=1)
    return {
        "questions": len(tasks),
        "passages": len(passages),
        "index": {"seconds": statistics.median(seconds), "peak_mib": max(peaks) / 2**20, "disk_mib": size / 2**20},
        "search": {"per_second": statistics.median(rates), "own_mib": own / 2**20, "all_gold_titles": recall},
        "expert": expert[0] | {"steps_per_second": statistics.median(each["steps_per_second"] for each in expert)},
        "random": play(env, tasks, expert=False),
        "steps_per_second_on_two": sum(both),
    }


def pair(text: str) -> tuple[str, str]:
    split, _, file = text.partition("=")
    return split, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the files; $MULTIHOP_QA_DATA unless given")
    parser.add_argument(
        "--questions", type=pair, action="append", required=True, metavar="SPLIT=FILE", help="may be repeated"
    )
    parser.add_argument("--corpus", type=pair, action="append", default=[], metavar="SPLIT=FILE", help="may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "multihop_qa.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        env = MultihopQAEnv(args.data, dict(args.questions), dict(args.corpus), cache_dir=cache)
        splits = {split: measure(copy.deepcopy(env), split, args.repeats) for split in env.splits}
    named = [f"--{name} {split}={file}" for name in ("questions", "corpus") for split, file in getattr(args, name)]
    command = " ".join(["python benchmarks/multihop_qa.py", *named, f"--repeats {args.repeats}"])  # without folders
    settings = {"max_steps": env.max_steps, "max_calls": env.max_calls, "top_k": env.top_k}
    record = about() | {"command": command, "settings": settings, "splits": splits}
    record["versions"]["bm25s"] = importlib.metadata.version("bm25s")
    args.out.write_text(json.dumps(record, indent=1) + "\n")

    rows = []
    for split, found in splits.items():
        index, search = found["index"], found["search"]
        sizes = [f"{index[name]:.1f}" for name in ("seconds", "peak_mib", "disk_mib")]
        recall = " / ".join(f"{share:.2f}" for share in search["all_gold_titles"].values())
        rows.append(
            [split, f"{found['passages']:,}", *sizes, f"{search['own_mib']:.1f}", f"{search['per_second']:,.0f}", recall]
        )
    heads = ["split", "passages", "indexing, s", "at most, MiB", "on disk, MiB", "a worker's own, MiB", "searches/s"]
    print(markdown([*heads, f"all gold titles in the best {' / '.join(map(str, DEPTHS))}"], rows))
    rows = []
    for split, found in splits.items():
        players = [f"{found[who][name]:.2f}" for who in ("expert", "random") for name in ("exact_match", "f1", "recall")]
        speed = [f"{rate:,.0f}" for rate in (found["expert"]["steps_per_second"], found["steps_per_second_on_two"])]
        rows.append([split, str(found["questions"]), f"{found['expert']['steps']:.2f}", *players, *speed])
    heads = [f"{who} {name}" for who in ("expert", "random") for name in ("EM", "F1", "recall")]
    print("\n" + markdown(["split", "questions", "expert's steps", *heads, "steps/s on one core", "on two"], rows))


if __name__ == "__main__":
    main()
