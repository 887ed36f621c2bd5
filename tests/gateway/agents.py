"""Agents for tests. Worker processes import this file, and only ``walk``'s import ``openai``, which takes a second."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from typing import Any

from steppo.types import Action, Task
from tests.toy_env import CorridorEnv


def walk(task: Task) -> None:
    """Plays a corridor to its end; its step rewards go to the gateway. Any answer is one of the commands."""
    from openai import OpenAI

    client, env = OpenAI(max_retries=0), CorridorEnv(max_steps=5)
    turn = env.reset(task)
    messages: list[Any] = [{"role": "user", "content": f"{turn.goal}\n{seen(turn)}"}]
    while not turn.terminated:
        completion = client.chat.completions.create(model="policy", messages=messages)
        said = completion.choices[0].message.content or ""
        turn = env.step(Action(command_of(said, turn.commands or ())))
        post(os.environ["STEPPO_REWARD_URL"], os.environ["STEPPO_REWARD_KEY"], reward=turn.reward, completion=completion.id)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": seen(turn)}]


def seen(turn: Any) -> str:
    return f"{turn.text}\nCommands: {', '.join(turn.commands)}"


def command_of(text: str, commands: Any) -> str:
    """Any text names a command."""
    return commands[sum(text.encode("utf-8", "replace")) % len(commands)]


def post(url: str, key: str, **body: Any) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def ask(content: str = "Hello", **options: Any) -> str:
    url, key = f"{os.environ['OPENAI_BASE_URL']}/chat/completions", os.environ["OPENAI_API_KEY"]
    answer = json.loads(post(url, key, model="policy", messages=[{"role": "user", "content": content}], **options))
    return answer["choices"][0]["message"]["content"] or ""


def one_call(task: Task) -> dict[str, Any]:
    ask(task.id)
    return {"reward": 0.5, "success": True}


def silent(task: Task) -> float:
    return 1.0


def warm(task: Task) -> float:
    ask(temperature=0.3)
    return 1.0


def too_wordy(task: Task) -> float:
    ask("word " * 5000)
    return 1.0


def thankless(task: Task) -> None:
    ask()


def wordy(task: Task) -> float:
    ask()
    ask("word " * 5000)
    return 1.0


def hanging(task: Task) -> None:
    ask()
    time.sleep(3600)


def dying(task: Task) -> None:
    ask()
    os._exit(3)


def restless(task: Task) -> float:
    for number in range(100):
        ask(str(number))
    return 1.0


def greedy(task: Task) -> dict[str, Any]:
    """Would like to give itself a reward."""
    return {"said": ask(), "can": "STEPPO_REWARD_KEY" in os.environ}


def judge(task: Task, output: Any) -> float:
    return 0.25 if not output["can"] else -1.0


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    ask(given["id"])
    print("thinking ...")
    print(json.dumps({"reward": float(given["id"] == json.loads(os.environ["STEPPO_TASK"])["id"])}))
