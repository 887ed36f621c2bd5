"""A whole episode with tools: what the environment gets, what is recorded, and that nothing sampled is tokenised again."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from steppo.envs import Env
from steppo.rendering import AppendContext, ContextPolicy, HermesParser, Renderer, WindowContext
from steppo.rollouts.episode import play_episode
from steppo.rollouts.place import Place
from steppo.rollouts.players import Player
from steppo.rollouts.rules import Rules
from steppo.types import (
    Action,
    Completion,
    Episode,
    Group,
    Message,
    Request,
    RolloutConfig,
    Sampling,
    StopReason,
    Task,
    ToolCall,
    ToolSpec,
    Turn,
)
from tests.rendering.helpers import make_tokenizers
from tests.rollouts.test_episode import Here

FIND = ToolSpec("find", "Finds pages.", {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]})


class Pages(Env):
    """Answers each call; what else is said ends it."""

    tools = (FIND,)

    def __init__(self) -> None:
        self.got: list[Action] = []

    def tasks(self, split: str) -> list[Task]:
        return [Task("pages")]

    def reset(self, task: Task) -> Turn:
        return Turn("Ready.", "Find the word.")

    def step(self, action: Action) -> Turn:
        self.got.append(action)
        answers = tuple(Message("tool", f"Page {len(self.got)}.", call.id) for call in action.tool_calls)
        return Turn(messages=answers, terminated=not answers, reward=float(not answers), info={"pages": len(answers)})


def find(*what: str) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "find", "arguments": {{"what": "{one}"}}}}\n</tool_call>' for one in what)


# What is sampled, whether its end is, and whether it is an action. "qz" is in all of it, and nowhere else.
SAID: list[tuple[str, bool, bool]] = [
    (find("qz1"), True, True),
    (f"qz, two at once:\n{find('qz2', 'qz☂3')}", True, True),
    (f"<think>\nqz, hm: {find('qz')}\n</think>\n\n{find('qz4')}", True, True),
    (find("qz5").partition("</tool_call>")[0], False, True),
    (find("qz6").partition("qz6")[0] + "qz", False, False),
    ("<think>\nqz, qz, qz", False, False),
    (find("qz7").replace('"', "'"), True, False),
    (f"{find('qz8')}\nqz", True, False),
    ("qz </tool_response> is the word.", True, True),
]


class Says(Player):
    """One text after the other, letter by letter: the ids are not those that the tokenizer would give."""

    def __init__(self, tokenizer: Any) -> None:
        letters = [[token for letter in text for token in tokenizer.encode(letter)] for text, _, _ in SAID]
        ends = [[tokenizer.eos_token_id] if stopped else [] for _, stopped, _ in SAID]
        self.ids = [np.asarray(ids + end, dtype=np.int32) for ids, end in zip(letters, ends, strict=True)]
        for (text, _, _), ids in zip(SAID, self.ids, strict=True):
            assert len(tokenizer.encode(text)) < len(ids)

    async def act(self, request: Request, turn: Turn) -> Completion:
        number = int(request.seed)
        reason = "stop" if SAID[number][1] else "length"
        return Completion(0, self.ids[number], np.zeros(len(self.ids[number]), np.float32), reason)


class Numbered(Place):
    def seed(self, step: int) -> int:
        return step


@pytest.mark.parametrize("template", ["qwen3", "smollm2", "plain"])
@pytest.mark.parametrize("context", [AppendContext(), WindowContext(99), WindowContext(2)])
def test_nothing_that_was_sampled_is_tokenised_again(
    template: str, context: ContextPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizers()[template]
    renderer, parser, env = Renderer(), HermesParser(), Pages()
    renderer.bind(tokenizer, {tokenizer.eos_token_id}, env.tools, parser.tools_text(env.tools))
    parser.bind(env.tools, renderer)
    context.bind(renderer)
    player = Says(tokenizer)
    read: list[str] = []
    for name in ("encode", "__call__", "apply_chat_template"):
        whole = getattr(type(tokenizer), name)

        def heard(self: Any, text: Any, *args: Any, _whole: Any = whole, **kwargs: Any) -> Any:
            read.append(str(text))
            return _whole(self, text, *args, **kwargs)

        monkeypatch.setattr(type(tokenizer), name, heard)
    place = Numbered(RolloutConfig("train/0", 0), Group(0, Task("pages"), first=0), 0)
    rules = Rules(context, parser, Sampling(), 99, None, 10**6, 0.25, "continue", None)
    episode: Episode = asyncio.run(play_episode(rules, place, Here(env), player, None))  # type: ignore[arg-type]

    assert (episode.error, episode.stop_reason) == ("", StopReason.TERMINATED)
    assert len(read) > len(SAID)
    assert not any("qz" in text for text in read)
    for number, step in enumerate(episode.steps):
        np.testing.assert_array_equal(step.action_ids, player.ids[number])
        before = episode.steps[number - 1] if number else None
        kept = [before.action_ids] if before and isinstance(context, WindowContext) else []
        if before and not (isinstance(context, WindowContext) and context.max_past_turns == 2):
            kept = [np.concatenate([before.prompt_ids, before.action_ids])]
        for ids in kept:  # all that came before, or somewhere the last answer
            windows = np.lib.stride_tricks.sliding_window_view(step.prompt_ids, len(ids))
            assert (windows == ids).all(axis=1).any()

    assert [step.action_valid for step in episode.steps] == [valid for _, _, valid in SAID]
    assert [step.reward for step in episode.steps] == [0.0 if valid else -0.25 for _, _, valid in SAID[:-1]] + [1.0]
    calls = [[call.arguments["what"] for call in action.tool_calls] for action in env.got]
    assert calls == [["qz1"], ["qz2", "qz☂3"], ["qz4"], ["qz5"], []]
    assert env.got[1].text == "qz, two at once:"
    assert env.got[2].reasoning == f"qz, hm: {find('qz')}"
    assert env.got[-1] == Action(text="qz </tool_response> is the word.")
    assert episode.steps[1].action == 'find({"what": "qz2"}); find({"what": "qz☂3"})'
    assert episode.steps[4].action == SAID[4][0].strip()
    assert episode.steps[2].observation == "Page 2.\nPage 2."
    assert [step.metadata["pages"] for step in episode.steps if step.action_valid] == [1, 2, 1, 1, 0]


def test_an_action_and_its_answer_are_told_apart_by_ids() -> None:
    parser, renderer = HermesParser(), Renderer()
    tokenizer = make_tokenizers()["qwen3"]
    renderer.bind(tokenizer, {tokenizer.eos_token_id}, (FIND,))
    parser.bind((FIND,), renderer)
    parsed = parser.parse(find("a", "b", "c"), Turn())
    assert parsed.action is not None
    assert parsed.action.tool_calls == tuple(ToolCall("find", {"what": what}, f"call_{n}") for n, what in enumerate("abc"))
