"""WebShop on a folder of data: counts, expert and chance, speed on one core and in two workers, what more products cost.

    pip install -c constraints.txt -e ".[search]"
    python benchmarks/webshop.py --data $WEBSHOP_DATA

``expert`` and ``random`` play the first goals of each split. Random searches for the instruction's words first, then clicks
on any of what can be clicked. Seconds are of processor time, medians over episodes. ``workers``: processes with 32 slots
play the expert's episodes, by the clock and by the processor time of the busiest one. ``scale``: the products so many times
over, each copy with a number of its own; reading and indexing them, and searches in all. Words are no more than before, so
the full set may take longer.

``not_met``: goals that their own product does not meet if values that are chosen are compared with name and value together,
as in the publishers' code. ``tagger`` (``--tagger en_core_web_sm``, which spaCy has to have): purchases whose reward is the
same with its nouns of titles, for products that a search finds, that have the same query, and any.

Writes ``benchmarks/results/webshop.json`` and prints tables. Takes a minute or two.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import lzma
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from steppo.envs import WebshopEnv
from steppo.envs.pool import EnvPool
from steppo.envs.webshop import reward
from steppo.envs.webshop.goods import Goal
from steppo.types import Task, Turn

ROOT = Path(__file__).parent.parent
FULL = 1_181_436  # products of the full set
SLOTS = 32


def progress(done: int, total: int) -> None:
    pass


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    began = time.process_time()
    yield
    into[name] = time.process_time() - began


def expert(env: WebshopEnv, turn: Turn, chance: random.Random) -> str | None:
    return env.expert_action()


def by_chance(env: WebshopEnv, turn: Turn, chance: random.Random) -> str | None:
    return (
        turn.commands[-1] if len(turn.commands) == 2 and turn.text.startswith("The shop") else chance.choice(turn.commands)
    )


def play(env: WebshopEnv, tasks: Sequence[Task], choose: Callable[..., str | None]) -> dict[str, Any]:
    """Score (of 100), success, steps, and which goals were missed."""
    scores, steps, missed, resets = [], [], [], []
    began = time.process_time()
    for task in tasks:
        chance, start = random.Random(task.id), time.process_time()
        turn = env.reset(task)
        resets.append(time.process_time() - start)
        count = 0
        while not turn.terminated and (command := choose(env, turn, chance)) is not None:
            turn = env.command(command)
            count += 1
        scores.append(turn.info.get("score", 0.0))
        steps.append(count)
        if not turn.success:
            missed.append(task.id)
    spent = time.process_time() - began
    return {
        "goals": len(tasks),
        "score": statistics.mean(scores),
        "success": len(tasks) - len(missed),
        "steps": {"mean": statistics.mean(steps), "most": max(steps)},
        "steps_per_s": sum(steps) / spent,
        "reset_s": statistics.median(resets),
        "missed": missed[:20],
    }


def in_workers(env: WebshopEnv, tasks: Sequence[Task], workers: int) -> dict[str, float]:
    """Steps per second by the clock, and per second that the busiest worker computes. Slots play the expert's episodes."""

    def computed() -> list[float]:
        return [sum(child.cpu_times()[:2]) for child in psutil.Process().children()]

    steps = 0
    left = list(reversed(tasks))
    with closing(EnvPool(env, SLOTS, workers, 60.0)) as pool:
        for slot in range(SLOTS):  # so that all are started
            pool.reset(slot, left.pop(), want_expert=True)
        going = {slot: pool.receive(slot) for slot in range(SLOTS)}
        began, before = time.perf_counter(), computed()
        while going:
            for slot, reply in list(going.items()):
                assert reply.turn is not None, reply.error
                if not reply.turn.terminated:
                    assert reply.turn.expert_action is not None
                    pool.step(slot, reply.turn.expert_action)
                    steps += 1
                elif left:
                    pool.reset(slot, left.pop(), want_expert=True)
                else:
                    del going[slot]
            going = {slot: pool.receive(slot) for slot in going}
        busiest = max(after - first for after, first in zip(computed(), before, strict=True))
        return {"by_the_clock": steps / (time.perf_counter() - began), "of_the_busiest": steps / busiest}


def not_met(goals: Sequence[Goal]) -> int:
    """It finds a colour within the value that is chosen, but a goal's only if that is its name or value."""

    def met(value: str, name: str, wanted: str) -> bool:
        color = next((each for each in reward._COLORS if each in (name, wanted)), f"{name} {wanted}")
        return reward.alike(reward._color_or_all(value), color)

    pairs = [list(zip(sorted(goal.product.options), goal.options, strict=True)) for goal in goals]
    return sum(not all(any(met(value, *pair) for _, value in chosen) for pair in chosen) for chosen in pairs)


def tagged(env: WebshopEnv, goals: Sequence[Goal], tagger: str) -> dict[str, Any]:
    """Rewards of purchases with the nouns of a tagger, and with ours."""
    import spacy

    read, ours = spacy.load(tagger, exclude=["parser", "ner", "lemmatizer"]), reward._nouns
    theirs = lru_cache(None)(lambda title: [word.text.lower() for word in read(title) if word.pos_ in ("NOUN", "PROPN")])
    products = [env._goods.product(row) for row in range(len(env._goods))]
    chance, found = random.Random(0), {}
    for kind in ("search", "query", "any"):
        rows = []
        for goal in chance.sample(goals, min(3000, len(goals))):
            choice = products
            if kind == "search":
                choice = [products[row] for row in env._search(goal.wish.lower())[:10]] or products
            elif kind == "query":
                choice = [product for product in products if product.query == goal.product.query]
            product = chance.choice(choice)
            chosen = [chance.choice(values) for values in product.options.values() if values and chance.random() < 0.7]
            both = []
            for nouns in (ours, theirs):
                reward._nouns = nouns
                both.append(reward.worth(product, chosen, goal))
            rows.append(both)
        found[kind] = {
            "purchases": len(rows),
            "same_type": statistics.mean(one.type == other.type for one, other in rows),
            "same_success": statistics.mean((one.score == 1) == (other.score == 1) for one, other in rows),
            "score": {
                "ours": statistics.mean(one.score for one, _ in rows),
                "tagger": statistics.mean(o.score for _, o in rows),
            },
        }
    reward._nouns = ours
    return found


def copies(folder: Path, times: int, into: Path) -> None:
    """The files with each product so many times over, as the full set's."""
    found = {}
    for name in ("items_shuffle", "items_ins_v2"):
        path = folder / f"{name}_1000.json"
        found[name] = json.loads(
            path.read_text() if path.exists() else lzma.decompress(path.with_name(f"{path.name}.xz").read_bytes())
        )
    with open(into / "items_shuffle.json", "w") as file:
        for number in range(times):
            for place, record in enumerate(found["items_shuffle"]):
                text = json.dumps(record | {"asin": f"C{number:04}{place:05}"})
                file.write(f"{',' if number or place else '['}{text}")
        file.write("]")
    asins = [record["asin"] for record in found["items_shuffle"]]
    about = found["items_ins_v2"]
    own = {f"C{number:04}{place:05}": about.get(asin, {}) for number in range(times) for place, asin in enumerate(asins)}
    (into / "items_ins_v2.json").write_text(json.dumps(own))


def scale(folder: Path, times: int) -> dict[str, Any]:
    """Runs ``--part`` in processes of their own, so that each peak of memory is one's own."""
    with tempfile.TemporaryDirectory() as there:
        copies(folder, times, Path(there))
        size = (Path(there) / "items_shuffle.json").stat().st_size
        found: dict[str, Any] = {"products": times * 1000, "file_mib": size / 2**20}
        for part in ("read", "index", "play"):
            command = [sys.executable, "-P", __file__, f"--data={there}", f"--cache_dir={there}/cache", f"--part={part}"]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[part] = json.loads(run.stdout)
        kept = [path.stat().st_size for path in Path(there, "cache").rglob("*") if path.is_file()]
        return found | {"kept_mib": sum(kept) / 2**20}


def run_part(part: str, data: str, cache_dir: str) -> None:
    """One part of ``scale``: seconds of processor time, and the peak of this process's memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: that of the process that started it is inherited
    env = WebshopEnv(data, full=True, cache_dir=cache_dir, num_train=200)
    before, found = psutil.Process().memory_info(), dict[str, float]()
    if part == "read":
        with timed(found, "seconds"):
            found["goals"] = env._opened()[0].num_goals
    elif part == "index":
        with timed(found, "seconds"):
            env.prepare([], progress)
    else:
        tasks = env.tasks("train")
        with timed(found, "start_s"):
            env.start()
        with timed(found, "seconds"):
            played = play(env, tasks, expert)
        found["steps_per_s"] = played["steps_per_s"]
        queries = [str(env.reset(task).goal).lower() for task in tasks]
        with timed(found, "search_s"):
            for query in queries:
                env._search(query)
        found["search_s"] /= len(queries)
        memory = psutil.Process().memory_full_info()
        found["own_mib"] = memory.uss / 2**20
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    found["peak_mib"] = int(peak[1]) / 2**10
    found["imports_mib"] = before.rss / 2**20
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", help="folder of items_shuffle_1000.json and items_ins_v2_1000.json; $WEBSHOP_DATA unless given"
    )
    parser.add_argument("--goals", type=int, default=1000, help="most goals of a split to play")
    parser.add_argument("--copies", type=int, default=20, help="how many times over the products are, for scale; 0 for none")
    parser.add_argument("--tagger", help="a model of spaCy's; not compared unless given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "webshop.json")
    parser.add_argument("--cache_dir", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.data, args.cache_dir)
        return
    record: dict[str, Any] = {"seconds": {}}
    with tempfile.TemporaryDirectory() as cache:
        env = WebshopEnv(args.data, offer_query=True, cache_dir=cache)
        with timed(record["seconds"], "read"):
            record["version"] = env.version
        splits = {split: env.tasks(split) for split in ("test", "valid", "train")}
        record["counts"] = {split: len(tasks) for split, tasks in splits.items()}
        with timed(record["seconds"], "index"):
            env.prepare([], progress)
        with timed(record["seconds"], "start"):
            env.start()
        players: dict[str, Any] = {"expert": expert, "random": by_chance}
        record["played"] = {
            name: {split: play(env, tasks[: args.goals], choose) for split, tasks in splits.items()}
            for name, choose in players.items()
        }
        tasks = [task for split in splits.values() for task in split]
        goals = [env._goods.product(task.data["row"]).goal(task.data["number"]) for task in tasks]
        record["not_met"] = not_met(goals)
        if args.tagger:
            record["tagger"] = tagged(env, goals, args.tagger)
        fresh = WebshopEnv(args.data, cache_dir=cache)
        record["steps_per_s_in_workers"] = {n: in_workers(fresh, splits["train"][:2000], n) for n in (1, 2)}
        if args.copies:
            record["scale"] = scale(env.folder, args.copies)

    from measuring import about, markdown  # with torch, which must not be there before

    options = [
        f"--{name}={getattr(args, name)}" for name in ("goals", "copies", "tagger") if getattr(args, name) is not None
    ]
    command = f"python benchmarks/webshop.py {' '.join(options)}"  # without folders
    record = about() | {"command": command} | record
    record["versions"]["bm25s"] = importlib.metadata.version("bm25s")
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['version']}; {record['counts']}; seconds: {record['seconds']}\n")
    rows = []
    for name, found in record["played"].items():
        for split, row in found.items():
            figures = [f"{row[key]:,.1f}" for key in ("goals", "score", "success", "steps_per_s")]
            rows.append([name, split, *figures, f"{row['steps']['mean']:.2f}", f"{1e3 * row['reset_s']:.3f}"])
    print(markdown(["player", "split", "goals", "score", "success", "steps/s", "steps", "reset, ms"], rows))
    print(f"\nnot met as the publishers compare: {record['not_met']} of {sum(record['counts'].values())}")
    print(json.dumps(record.get("tagger"), indent=1))
    print(f"\nsteps/s in workers: {record['steps_per_s_in_workers']}")
    if args.copies:
        print(f"\n{json.dumps(record['scale'], indent=1)}\nfull set: {FULL / record['scale']['products']:.0f} times as many")


if __name__ == "__main__":
    main()
