"""What waiting for environments costs: ticks with several settings of ``env_ticks``, and the two halves that were before.

    pip install -c constraints.txt -e .
    python benchmarks/scheduling.py

As many workers as slots. ``slow``: an environment waits 1 to 200 ms a step, drawn for each from the seed; ``fast``:
not at all. Random weights of the quickstart's policy sample answers of so many tokens as are drawn: ``command`` 2 to 6,
``thought`` 1 to 64, 16 on average. ``halves``: slots take turns in two halves, each of which waits for all of its
environments, then for all of its answers; with ``PlainEngine`` that is how it was. Two bounds have engines that take no
time: ``in order``, environments are answered in the order in which they were asked, as whatever does not read the clock must
in some order; ``any order``, slots do not wait for one another.

By default environments wait on a clock of their own, which goes on by the process's CPU time and by what is waited for: what
a machine with a core for each process would show, however busy this one is. ``--workers`` starts real ones, which sleep.
What is slow is played once more, with other waits, and compared bit for bit. One thread, float32; they take turns, medians.
Writes ``benchmarks/results/scheduling.json`` and prints a table. Takes some minutes.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import statistics
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from steppo.envs.base import TextGameEnv
from steppo.envs.checks import EnvReply
from steppo.types import Action, Episode, Task, Turn, groups_of

# Workers import this file too. What they do not need, such as torch, is imported where it is used.

ROOT = Path(__file__).parent.parent
STEPS = 12
TICKS = (1, 4, 16, 32)  # of the engine that keeps caches; the plain one's are rounds


def drawn(*what: object) -> float:
    """From 0 to 1, by a name."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little") / 2**64


class WaitingEnv(TextGameEnv):
    """Says which way it was last. Each answer takes its time.

    Args:
        most_ms: Longest wait; 0 for none.
        seed: Of the waits.
        is_asleep: Sleeps for so long, or else only says so.
    """

    def __init__(self, most_ms: float, seed: int, is_asleep: bool) -> None:
        self.max_steps = STEPS
        self.most_ms = most_ms
        self.seed = seed
        self.is_asleep = is_asleep

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}/{number}") for number in range(1000)]

    def reset(self, task: Task) -> Turn:
        self._name, self._steps = task.id, 0
        return self._turn("the start")

    def command(self, command: str) -> Turn:
        self._steps += 1
        return self._turn(command)

    def wait_s(self) -> float:
        """Of the last answer."""
        return (1 + (self.most_ms - 1) * drawn(self.seed, self._name, self._steps)) / 1000 if self.most_ms else 0.0

    def _turn(self, text: str) -> Turn:
        if self.is_asleep:
            time.sleep(self.wait_s())
        seen = f"You came from {text}. " + "A door, a lamp and a chest are here. " * 2
        return Turn(seen, "Find the coin.", ("north", "south"), terminated=self._steps == STEPS)


class Clock:
    """Seconds of this process, and what it would have waited."""

    def __init__(self) -> None:
        self.waited = 0.0

    def now(self) -> float:
        return time.process_time() + self.waited

    def wait_until(self, then: float) -> None:
        self.waited += max(0.0, then - self.now())


class TimedPool:
    """Environments in this process, whose answers are there when their time has come."""

    def __init__(self, env: WaitingEnv, num_slots: int, clock: Clock) -> None:
        self._envs = [copy.copy(env) for _ in range(num_slots)]
        self._clock = clock
        self._answers: dict[int, tuple[float, EnvReply]] = {}
        self.counts: dict[str, int] = {}

    def reset(self, slot: int, task: Task, want_expert: bool) -> None:
        self._answers[slot] = self._later(slot, self._envs[slot].reset(task))

    def step(self, slot: int, action: Action) -> None:
        self._answers[slot] = self._later(slot, self._envs[slot].step(action))

    def _later(self, slot: int, turn: Turn) -> tuple[float, EnvReply]:
        return self._clock.now() + self._envs[slot].wait_s(), EnvReply(turn)

    async def answer(self, slot: int) -> EnvReply:
        then, reply = self._answers.pop(slot)
        self._clock.wait_until(then)
        return reply

    def release(self, slot: int) -> None:
        pass

    def close(self) -> None:
        pass


def tokens_of(shape: str, seed: int) -> int:
    """How long an answer is."""
    part = drawn("length", seed)
    return 2 + int(5 * part) if shape == "command" else min(64, 1 + int(-17.5 * math.log(1 - part)))


def parts(shape: str) -> dict[str, Any]:
    """Parser, engines and schedulers, which import torch."""
    from steppo.engines import HFEngine, PlainEngine
    from steppo.rendering import ActionParser, ParsedAction
    from steppo.rollouts.scheduler import Scheduler
    from steppo.types import Completion, Request

    class AnyText(ActionParser):
        """Reads a command into any text."""

        def parse(self, text: str, turn: Turn) -> ParsedAction:
            return ParsedAction(Action("south" if drawn(text) < 0.5 else "north"))

    def sized(kind: type) -> type:
        class Sized(kind):
            def submit(self, request: Request) -> None:
                most = tokens_of(shape, request.seed)
                super().submit(replace(request, sampling=replace(request.sampling, max_new_tokens=most)))

        return Sized

    class Halves(Scheduler):
        """As it was: a turn waits for all of its half's environments, then for all of its answers."""

        async def _until_some_end(self, wanted: deque[Any]) -> list[Episode]:
            middle = (self._num_slots + 1) // 2
            half = range(middle) if self._now % 2 == 0 else range(middle, self._num_slots)
            self._now += 1
            seated = [self._seats[slot] for slot in half if slot in self._seats]
            for seat in seated:
                if seat.waits_for_env:
                    seat.gets(await self._pool.answer(seat.slot))
            ended = await self._settle(seated)
            free, self._free = self._free, {slot: 0 for slot in half if slot not in self._seats}
            await self._fill(wanted)
            self._free |= free
            asking = {self._engine.submit(seat.asks): seat for seat in seated if seat.asks is not None}
            answers: dict[int, Completion] = {}
            while len(answers) < len(asking):
                answers |= {completion.request_id: completion for completion in await self._engine.tick()}
            for id, seat in asking.items():
                seat.has_asked = True
                seat.gets(answers[id])
            await self._settle(list(asking.values()))
            return ended

    return {
        "parser": AnyText(),
        "plain": sized(PlainEngine),
        "kept": sized(HFEngine),
        "halves": Halves,
        "ticks": Scheduler,
    }


def play(kind: tuple[str, str, int], shape: str, env: WaitingEnv, args: argparse.Namespace, policy: Any) -> dict[str, Any]:
    """One round: its seconds and what was played."""
    import steppo.rollouts.env_source as env_source
    from steppo.rendering import StateContext
    from steppo.rollouts import EnvSource
    from steppo.types import RolloutConfig

    scheduler, engine, env_ticks = kind
    made = parts(shape)
    vars(env_source)["Scheduler"] = made[scheduler]
    sizes = {"num_slots": args.slots, "num_workers": args.slots, "env_ticks": env_ticks}
    source = EnvSource(env, StateContext(), made[engine](), made["parser"], max_new_tokens=64, **sizes)
    source.bind(policy)
    clock = Clock()
    if not args.workers:
        source._pool = TimedPool(env, args.slots, clock)  # type: ignore[assignment]
    polls = count_polls(source.engine)
    config = RolloutConfig("train/0", seed=0)
    list(source.collect(groups_of(env.tasks("warm")[:2]), config))  # workers start
    groups = groups_of(env.tasks("train")[: args.episodes])
    polls.clear()
    wall, process, then = time.perf_counter(), time.process_time(), clock.now()
    episodes = [episode for group in source.collect(groups, config) for episode in group]
    wall, process = time.perf_counter() - wall, time.process_time() - process
    seconds = wall if args.workers else clock.now() - then
    source.close()
    steps = sum(len(episode.steps) for episode in episodes)
    assert steps == STEPS * args.episodes, [episode.error for episode in episodes]
    told = [(e.id, s.action_ids.tolist(), s.behaviour_logprobs.tolist()) for e in episodes for s in e.steps]
    return {"seconds": seconds, "process_seconds": process, "steps": steps, "ticks": len(polls), "told": told}


def count_polls(engine: Any) -> list[int]:
    """Grows by one with each of them."""
    polls, poll = list[int](), engine.poll

    def counted() -> Any:
        polls.append(1)
        return poll()

    engine.poll = counted
    return polls


def compare(shape: str, speed: str, args: argparse.Namespace, policy: Any) -> list[dict[str, Any]]:
    """All schedulers on the same episodes, in turns."""
    kinds = [("halves", "plain", 0), ("halves", "kept", 0)]
    kinds += [("ticks", "plain", ticks) for ticks in args.rounds]
    kinds += [("ticks", "kept", ticks) for ticks in args.ticks]
    rounds: dict[tuple[str, str, int], list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(args.repeats):
        for kind in kinds:
            rounds[kind].append(play(kind, shape, WaitingEnv(200 if speed == "slow" else 0, 0, args.workers), args, policy))
    if speed == "slow":  # other waits, same episodes
        for kind in kinds:
            other = play(kind, shape, WaitingEnv(200, 1, args.workers), args, policy)
            assert [one["told"] for one in rounds[kind]] == [other["told"]] * args.repeats, kind
    rows = []
    for kind, played in rounds.items():
        steps = played[0]["steps"]
        row: dict[str, Any] = {"answers": shape, "environment": speed}
        row |= dict(zip(("scheduler", "engine", "env_ticks"), kind, strict=True))
        row["ticks"] = played[0]["ticks"]
        for name in ("seconds", "process_seconds"):
            row[name] = statistics.median(one[name] for one in played)
        row["steps_per_s"] = steps / row["seconds"]
        rows.append(row)
    for row in rows:
        row["over_halves"] = row["steps_per_s"] / rows[0]["steps_per_s"]
        row["process_over_halves"] = row["process_seconds"] / rows[0]["process_seconds"]
    return rows


def in_order(slots: int, episodes: int) -> float:
    """Steps a second of a bound: who was asked first goes on first, and engines take no time."""
    envs = [WaitingEnv(200, seed=0, is_asleep=False) for _ in range(slots)]
    tasks = deque(envs[0].tasks("train")[:episodes])
    turns: deque[tuple[WaitingEnv, Turn, float]] = deque()  # and when they are there
    turns.extend((env, env.reset(tasks.popleft()), env.wait_s()) for env in envs)
    now = 0.0
    while turns:
        env, turn, then = turns.popleft()
        now = max(now, then)
        if not turn.terminated:
            turns.append((env, env.command("north"), now + env.wait_s()))
        elif tasks:
            turns.append((env, env.reset(tasks.popleft()), now + env.wait_s()))
    return STEPS * episodes / now


def table(rows: list[dict[str, Any]], bounds: dict[str, float]) -> str:
    """Markdown."""
    heads = [
        "answers",
        "environment",
        "scheduler",
        "engine",
        "env_ticks",
        "ticks",
        "steps/s",
        "over halves",
        "CPU ms a step",
    ]
    heads += ["CPU over halves"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [str(row[name]) for name in ("answers", "environment", "scheduler", "engine")]
        cells += [str(row["env_ticks"]) if row["scheduler"] == "ticks" else "", str(row["ticks"])]
        cells += [f"{row['steps_per_s']:.1f}", f"{row['over_halves']:.2f} x"]
        cells += [f"{1e3 * row['process_seconds'] / row['steps_per_s'] / row['seconds']:.2f}"]
        cells += [f"{row['process_over_halves']:.2f} x"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"slow, {order}: at most {bound:.1f} steps/s" for order, bound in bounds.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--answers", nargs="+", choices=("command", "thought"), default=["command", "thought"])
    parser.add_argument("--speeds", nargs="+", choices=("slow", "fast"), default=["slow", "fast"])
    parser.add_argument("--ticks", type=int, nargs="+", default=list(TICKS))
    parser.add_argument("--rounds", type=int, nargs="+", default=[1], help="the same for the plain engine")
    parser.add_argument("--workers", action="store_true", help="real ones, by the clock on the wall")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "scheduling.json")
    args = parser.parse_args()

    import torch
    from measuring import about

    from steppo.models import TinyPolicy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = TinyPolicy(hidden_size=96, num_layers=2, num_heads=4, vocab_size=512, max_positions=8192, seed=0)
    policy.build(lambda: ["You came from the start. A door, a lamp and a chest are here. Find the coin. north south"])
    policy.stop_ids = frozenset()  # answers are as long as they are drawn
    rows = [row for shape in args.answers for speed in args.speeds for row in compare(shape, speed, args, policy)]
    bounds = {"in order": in_order(args.slots, args.episodes), "any order": args.slots / (0.1005 * (STEPS + 1) / STEPS)}
    report = {
        **about(),
        "slots": args.slots,
        "episodes": args.episodes,
        "clock": "wall" if args.workers else "process time and waits",
        "most_steps_per_s": bounds,
        "rows": rows,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows, bounds))


if __name__ == "__main__":
    main()
