"""The page of a run with 5,000 episodes in a real browser: how long it takes to load, to filter and to open an episode.

    python benchmarks/transcript_page.py --browser chromium --pictures pictures

Makes the page with the run's own writer, drives a headless Chromium by its DevTools protocol, compares every filter with
the same question asked in Python, and writes ``benchmarks/results/transcript_page.json`` and screenshots
(``docs/transcripts.png`` is one). aiohttp comes with Lightning. Takes about half a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import datetime
import json
import os
import platform
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

from steppo.batch import Credit
from steppo.learner import Experience, ReplayStatistics, Weights
from steppo.learner.scoring import Scores
from steppo.learner.steps import StepTable
from steppo.transcripts import TranscriptWriter, episode_records, page_blocks
from steppo.types import Episode, Step, StopReason

ROOT = Path(__file__).parent.parent
ITERATIONS, TRAIN, VALID, EVERY = 60, 64, 100, 5
ROOMS = ["kitchen", "pantry", "garden", "attic", "cellar", "study", "bedroom", "corridor", "workshop", "bathroom"]
THINGS = ["knife", "apple", "coin", "lantern", "key", "cookbook", "carrot", "blanket", "teapot", "mirror", "ladder"]
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'><!-- \u2028 漢字 🙂"


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return [bytes(row).decode() for row in rows]


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def episode(rng: random.Random, name: str, order: int, skill: float) -> Episode:
    """A walk through a house: 5 to 30 steps, prompts of 500 to 2,000 characters."""
    length, solved = rng.randint(5, 30), rng.random() < skill
    reason = rng.choices([StopReason.TERMINATED, StopReason.CONTEXT_OVERFLOW, StopReason.ENV_ERROR], [96, 3, 1])[0]
    steps: list[Step] = []
    past: list[str] = []
    window = rng.randint(1, 4)  # what a prompt shows of the past
    for index in range(length):
        room, exits = rng.choice(ROOMS), rng.sample(["north", "south", "east", "west"], rng.randint(1, 4))
        seen = rng.choices(THINGS, k=rng.randint(1, 8))
        text = (
            f"-= {room.title()} =-\nYou find yourself in a {room}. You make out {', a '.join(seen)}. "
            f"There is an exit to the {', and one to the '.join(exits)}. " + "You wonder what else there may be to see. " * 3
        )
        invalid = rng.random() < 0.08
        action = rng.choice([f"open the {seen[0]} with"] if invalid else [f"go {exits[0]}", f"take {seen[0]}", "look"])
        commands = ", ".join([f"go {way}" for way in exits] + [f"take {thing}" for thing in seen] + ["look", "inventory"])
        before = "\n".join(past[-window:])[-1200:]
        prompt = f"Find the coin, take it and bring it to the garden.\n{before}\n{text}\nCommands: {commands}\n>"
        prompt = prompt[:2000].ljust(500, ".")
        last = index == length - 1
        steps.append(
            Step(
                prompt_ids=ids(prompt),
                action_ids=ids(action + "\n"),
                behaviour_logprobs=np.zeros(len(action) + 1, np.float32),
                reward=float(last and solved) - 0.1 * invalid,
                index=index,
                finish_reason="stop" if rng.random() < 0.97 else "length",
                terminated=last,
                truncated=False,
                action_valid=not invalid,
                observation=HOSTILE if order == 0 and index == 0 else text,
                action=action,
                temperature=1.0,
                policy_version=0,
            )
        )
        past.append(f"{text}\n> {action}")
    return Episode(
        id=f"{name}/{order}",
        order=order,
        group_id=order,
        task_id=f"coin_collector/level-5/{name.split('/')[0]}/{rng.randint(0, 999)}",
        steps=tuple(steps),
        stop_reason=reason,
        success=solved and not reason.failed,
        error="the game gave no answer within 60 s" if reason.failed else "",
    )


def learned(episodes: list[Episode], rng: np.random.Generator) -> tuple[Experience, ReplayStatistics]:
    """Values, advantages and ratios, as after an iteration."""
    table = StepTable.of(episodes)
    count, ones_A = len(table), torch.ones(table.num_tokens)
    value = torch.from_numpy(0.5 + rng.normal(size=count).cumsum() / 50 % 0.5)
    scores = Scores(torch.zeros_like(ones_A), None, value, None, torch.zeros(count))
    credit = Credit(advantage_N=torch.from_numpy(rng.normal(size=count)), target_N=value)
    weights = Weights(ones_A, ones_A.bool())
    ratio_N = torch.from_numpy(1 + 0.08 * rng.normal(size=count)).float()
    experience = Experience(table, scores, weights, credit, np.arange(count), table.lengths_N, len(episodes), {})
    return experience, ReplayStatistics({}, ratio_N, ((ratio_N - 1).abs() > 0.2).float())


def make_run(folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Writes the files of a run; gives what the page must show and the seconds that writing took."""
    rng, numbers, spent = random.Random(0), np.random.default_rng(0), 0.0
    writer = TranscriptWriter(folder)
    shown: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def write(kind: str, iteration: int, count: int) -> None:
        nonlocal spent
        skill = 0.1 + 0.85 * iteration / ITERATIONS
        episodes = [episode(rng, f"{kind}/{iteration}", order, skill) for order in range(count)]
        known = learned(episodes if kind == "train" else episodes[:4], numbers)
        start = time.perf_counter()
        records = episode_records(episodes, Bytes(), *known, kind=kind, iteration=iteration, updates=6 * iteration)
        writer.write(kind, iteration, records)
        spent += time.perf_counter() - start
        shown[kind, iteration] = records

    for iteration in range(1, ITERATIONS + 1):
        write("train", iteration, TRAIN)
        if iteration % EVERY == 0:
            write("valid", iteration, VALID)
    write("train", ITERATIONS, TRAIN)  # as if played again after a resume: only this one counts
    torn = page_blocks("train", ITERATIONS + 1, shown["train", 1])
    with open(folder / "transcripts.html", "ab") as page:
        page.write(torn[:-40])  # as if killed while writing
    return [record for records in shown.values() for record in records], spent


class Browser:
    """One tab of a headless Chromium, by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("id") == self._number:
                if "error" in message:
                    raise SystemExit(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    async def ask(self, expression: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise SystemExit(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def open(self, address: str) -> float:
        """Milliseconds until the page is ready to use, as the wall clock sees it."""
        await self.call("Page.navigate", url="about:blank")
        start = time.perf_counter()
        await self.call("Page.navigate", url=address)
        while await self.ask("document.documentElement?.dataset.ready ?? ''") != "yes":
            await asyncio.sleep(0.02)
        await self.ask(_PAINTED)
        return 1000 * (time.perf_counter() - start)

    async def picture(self, path: Path, dark: bool = False, width: int = 1440, height: int = 900) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        await self.ask(_PAINTED)
        image = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(image["data"]))


_PAINTED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
_SHOWN = "+document.getElementById('count').textContent.replaceAll(',', '').split(' ')[0]"
# Milliseconds from the input's event to the next painted frame.
_FILTER = """(async () => {{
  const field = document.getElementById("filters").elements["{name}"], start = performance.now();
  field.value = "{value}"; field.dispatchEvent(new Event("input", {{bubbles: true}}));
  await {painted};
  return performance.now() - start;
}})()"""
# Milliseconds until another episode is there, painted.
_OPEN = """(async () => {{
  const start = performance.now();
  document.querySelectorAll("#list .row")[{row}].click();
  const wanted = document.querySelector("#list .row.chosen span:nth-child(3)").title;
  while (document.querySelector("#episode h2")?.textContent !== wanted) await new Promise(done => setTimeout(done, 1));
  await {painted};
  return performance.now() - start;
}})()"""


async def measure(browser: Browser, page: Path, records: list[dict[str, Any]], pictures: Path) -> dict[str, Any]:
    """Loads, filters and opens; a wrong answer ends the benchmark."""
    address = page.as_uri()
    for domain in ("Page", "Runtime", "Network", "Log"):
        await browser.call(f"{domain}.enable")
    await browser.call("Emulation.setDeviceMetricsOverride", width=1440, height=900, deviceScaleFactor=1, mobile=False)
    loads = [await browser.open(address) for _ in range(3)]
    if await browser.ask(_SHOWN) != len(records):
        raise SystemExit(f"the page shows {await browser.ask(_SHOWN)} episodes, not {len(records)}")

    questions = {
        "kind=valid": lambda r: r["kind"] == "valid",
        "result=success": lambda r: r["success"],
        "stop=context_overflow": lambda r: r["stop_reason"] == "context_overflow",
        "task=/77": lambda r: "/77" in r["task"],
        "min=28": lambda r: len(r["steps"]) >= 28,
        "from=50": lambda r: r["iteration"] >= 50,
    }
    filters, links = {}, {}
    for question, answer in questions.items():
        name, value = question.split("=")
        expected = sum(bool(answer(record)) for record in records)
        filters[question] = await browser.ask(_FILTER.format(name=name, value=value, painted=_PAINTED))
        by_hand = await browser.ask(_SHOWN)
        await browser.ask(_FILTER.format(name=name, value="", painted=_PAINTED))
        links[question] = await browser.open(f"{address}#{question}")
        by_link = await browser.ask(_SHOWN)
        if not by_hand == by_link == expected > 0:
            raise SystemExit(f"{question}: {by_hand} by hand and {by_link} by link, not {expected}")
        await browser.open(address)
    opened = [await browser.ask(_OPEN.format(row=row, painted=_PAINTED)) for row in (5, 8, 11)]

    panel = [record for record in records if (record["kind"], record["iteration"]) == ("train", 40)]
    solved = [record for record in panel if record["success"] and not record["steps"][1]["action_valid"]]
    chosen = min(solved or panel, key=lambda record: abs(len(record["steps"]) - 13))
    link = f"{address}#kind=train&sort=-iteration&episode=train/40/{chosen['id']}"
    await browser.open(link)
    await asyncio.sleep(0.3)
    shown = await browser.ask("[...document.querySelectorAll('.step > pre')].map(part => part.textContent)")
    if shown != [step["observation"] for step in chosen["steps"]]:
        raise SystemExit("the page shows other observations than were written")
    await browser.picture(pictures / "transcripts.png")
    await browser.picture(pictures / "dark.png", dark=True)
    await browser.picture(pictures / "narrow.png", width=480, height=900)
    await browser.open(f"{address}#episode=train/7/train/7/0")  # its first observation is hostile
    await asyncio.sleep(0.3)
    if (shown := await browser.ask("document.querySelector('.step > pre').textContent")) != HOSTILE:
        raise SystemExit(f"the page shows {shown!r}")
    if await browser.ask("'broken' in window"):
        raise SystemExit("text of an environment was run as a script")
    requests = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    strangers = {event["request"]["url"] for event in requests} - {address, "about:blank"}
    complaints = [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    if strangers or complaints:
        raise SystemExit(f"requests to {strangers}, complaints {complaints}")
    memory = await browser.ask("performance.memory.usedJSHeapSize / 2 ** 20")
    return {
        "load_ms": [round(value) for value in loads],
        "load_by_link_ms": round(max(links.values())),
        "filter_ms": {name: round(value, 1) for name, value in filters.items()},
        "open_episode_ms": [round(value, 1) for value in opened],
        "script_memory_mib": round(memory),
    }


async def drive(program: str, page: Path, records: list[dict[str, Any]], pictures: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        process = subprocess.Popen([program, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(profile) / "DevToolsActivePort"
            while not (port.exists() and port.read_text()):
                if process.poll() is not None:
                    raise SystemExit(f"{program} ended with status {process.returncode}")
                await asyncio.sleep(0.1)
            where = f"http://127.0.0.1:{port.read_text().split()[0]}"
            async with aiohttp.ClientSession() as session:
                async with session.get(f"{where}/json/list") as answer:
                    tab = next(tab for tab in await answer.json() if tab["type"] == "page")
                async with session.get(f"{where}/json/version") as answer:
                    version = (await answer.json())["Browser"]
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    return {"browser": version, **await measure(Browser(socket), page, records, pictures)}
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default="chromium", help="a Chromium or Chrome")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "transcript_page.json")
    parser.add_argument("--pictures", type=Path, required=True, help="folder for screenshots: light, dark and narrow")
    args = parser.parse_args()
    args.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "coin-collector" / "version_0"
        records, seconds = make_run(run)
        page = run / "transcripts.html"
        lengths = [len(step["prompt"]) for record in records for step in record["steps"]]
        report = {
            "command": "python benchmarks/transcript_page.py --pictures pictures",
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "episodes": len(records),
            "steps": len(lengths),
            "prompt_characters": [min(lengths), round(sum(lengths) / len(lengths)), max(lengths)],
            "page_mib": round(page.stat().st_size / 2**20, 1),
            "lines_mib": round((run / "transcripts.jsonl").stat().st_size / 2**20, 1),
            "write_ms_per_episode": round(1000 * seconds / (len(records) + TRAIN), 2),
            **asyncio.run(drive(args.browser, page, records, args.pictures)),
        }
    print(json.dumps(report, indent=1))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
