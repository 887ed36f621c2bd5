"""ALFWorld's games on a folder of data: counts, the same texts as TextWorld's own, speed, success of expert and chance.

    pip install -c constraints.txt -e ".[alfworld]" && pip install --no-deps alfworld==0.4.2
    python benchmarks/alfworld.py --data $ALFWORLD_DATA

``same``: so many games, spread over the splits, are played twice, by the walkthrough and by chance, by ``AlfworldEnv`` and
by TextWorld with the names that the alfworld package gives things (without it by our own rule). They take turns, game by
game. All texts, commands, verdicts and scores are compared, and the first difference ends the benchmark. Seconds are of
processor time, medians over games: from a task to its first turn (TextWorld: load and reset; ours: the file, and the
translation kept on disk), and steps per second. ``success``: of the walkthroughs, and of play by chance within 20 and
within 50 steps.

Games that were not translated before are translated first. Writes ``benchmarks/results/alfworld.json`` and prints tables.
Takes some minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steppo.envs import AlfworldEnv
from steppo.envs.alfworld.env import _File
from steppo.envs.alfworld.translation import translated
from steppo.types import Task

ROOT = Path(__file__).parent.parent
LIMITS = (20, 50)


def play(env: AlfworldEnv, task: Task, by_chance: bool, most: int) -> dict[str, Any]:
    """One episode: its commands, what was answered, and seconds of processor time."""
    chance = random.Random(task.id)
    times = [time.process_time()]
    turn = env.reset(task)
    times.append(time.process_time())
    turns, commands = [turn], []
    while len(commands) < most and not turn.terminated:
        command = chance.choice(turn.commands or ()) if by_chance else env.expert_action()
        if command is None:
            break
        commands.append(command)
        turn = env.command(command)
        turns.append(turn)
    times.append(time.process_time())
    return {"commands": commands, "turns": turns, "reset_s": times[1] - times[0], "steps_s": times[2] - times[1]}


def compare(env: AlfworldEnv, tasks: Sequence[Task], random_steps: int) -> dict[str, Any]:
    """Plays tasks here and in TextWorld. Raises ``SystemExit`` where they differ."""
    # -P: this file is no package of that name.
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "stock_textworld.py")]
    figures: dict[str, list[float]] = {name: [] for name in ("ours_reset", "stock_reset", "ours_steps", "stock_steps")}
    states, names = 0, ""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number, task in enumerate(tasks, start=1):
            for by_chance in (False, True):
                env.start()  # no game is in memory
                ours = play(env, task, by_chance, random_steps)
                print(json.dumps([str(env.folder / task.data["game"]), ours["commands"]]), file=process.stdin, flush=True)
                stock = json.loads(process.stdout.readline())
                names = stock["names"]
                for place, (turn, theirs) in enumerate(zip(ours["turns"], stock["turns"], strict=True)):
                    text = turn.text if place else f"-= Welcome to TextWorld, ALFRED! =-\n\n{turn.text}\n\n{turn.goal}"
                    if [text, list(turn.commands or ()), turn.success, turn.reward] != theirs:
                        raise SystemExit(f"{task.id} differs after {ours['commands'][:place]}: {turn} and {theirs}")
                    states += 1
                figures["ours_reset"].append(ours["reset_s"])
                figures["stock_reset"].append(stock["seconds"]["load"] + stock["seconds"]["reset"])
                figures["ours_steps"].append(len(ours["commands"]) / ours["steps_s"])
                figures["stock_steps"].append(len(ours["commands"]) / stock["seconds"]["steps"])
            print(f"\r{number} of {len(tasks)} games are the same", end="", file=sys.stderr, flush=True)
        process.stdin.close()
    print(file=sys.stderr)
    medians = {name: statistics.median(found) for name, found in figures.items()}
    slowest = {"ours_reset": max(figures["ours_reset"]), "ours_steps": min(figures["ours_steps"])}
    return {"games": len(tasks), "states": states, "names": names, "medians": medians, "slowest": slowest}


def success(env: AlfworldEnv, tasks: Sequence[Task]) -> dict[str, Any]:
    """How many games walkthroughs win, and play by chance within limits of steps."""
    env.start()
    expert = [play(env, task, False, env.max_steps) for task in tasks]
    chance = [play(env, task, True, env.max_steps) for task in tasks]
    won = [len(episode["commands"]) for episode in chance if episode["turns"][-1].success]
    lengths = [len(episode["commands"]) for episode in expert]
    return {
        "games": len(tasks),
        "expert": sum(bool(episode["turns"][-1].success) for episode in expert),
        "golden_steps": {"mean": statistics.mean(lengths), "most": max(lengths)},
        "random": {str(limit): sum(steps <= limit for steps in won) for limit in LIMITS},
    }


def progress(done: int, total: int) -> None:
    print(f"\r{done} of {total} games are translated", end="\n" * (done == total), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder that holds json_2.1.1; $ALFWORLD_DATA unless given")
    parser.add_argument("--cache_dir", help="where translated games are kept; the user's cache folder unless given")
    parser.add_argument("--games", type=int, default=66, help="to compare with TextWorld, a third from each split")
    parser.add_argument("--random_steps", type=int, default=25, help="of play by chance, where it is compared")
    parser.add_argument("--train_games", type=int, help="whose success is counted; all unless given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "alfworld.json")
    args = parser.parse_args()
    env = AlfworldEnv(args.data, max_steps=max(LIMITS), cache_dir=args.cache_dir)
    splits = {"train": env.tasks("train"), "valid_seen": env.tasks("valid"), "valid_unseen": env.tasks("test")}
    counts = {name: len(tasks) for name, tasks in splits.items()}
    print(f"{counts}, grammar {env.version}")
    played = {**splits, "train": splits["train"][: args.train_games]}
    env.prepare(
        [task for tasks in played.values() for task in tasks], lambda done, total: print(f"\r{done}/{total}", end="")
    )
    same = [task for tasks in played.values() for task in tasks[: args.games // len(splits)]]
    compared = compare(env, same, args.random_steps)
    translations = []
    for task in same[:10]:
        file = _File.read(env.folder / task.data["game"])
        began = time.process_time()
        translated(file.domain, file.problem)
        translations.append(time.process_time() - began)
    solved = {name: success(env, tasks) for name, tasks in played.items()}

    from measuring import about  # with torch, which must not be there before

    packages = ("textworld", "fast-downward-textworld", *(["alfworld"] if importlib.util.find_spec("alfworld") else []))
    options = f"--games {args.games} --random_steps {args.random_steps} --train_games {args.train_games or counts['train']}"
    command = f"python benchmarks/alfworld.py {options}"  # without folders
    record = about() | {"command": command, "counts": counts, "grammar": env.version, "same": compared, "success": solved}
    record["versions"] |= {name: importlib.metadata.version(name) for name in packages}
    record["translation_s"] = statistics.median(translations)
    args.out.write_text(json.dumps(record, indent=1) + "\n")

    medians = compared["medians"]
    print(f"\n{compared['states']:,} states of {compared['games']} games are the same.\n")
    print("|  | AlfworldEnv | TextWorld |\n|---|---|---|")
    print(f"| first turn | {medians['ours_reset']:.3f} s | {medians['stock_reset']:.2f} s |")
    print(f"| steps/s | {medians['ours_steps']:,.0f} | {medians['stock_steps']:.1f} |")
    print(f"\nTranslating a game: {record['translation_s']:.2f} s, once.\n")
    print("| split | games | expert | random, 20 steps | random, 50 steps |\n|---|---|---|---|---|")
    for name, row in solved.items():
        print(f"| {name} | {row['games']} | {row['expert']} | {row['random']['20']} | {row['random']['50']} |")


if __name__ == "__main__":
    main()
