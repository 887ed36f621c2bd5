"""A taskset of verifiers, which finds it by the name of this module: how many letters has a word? Plays as a test wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf

__all__ = ["QuizEnv", "QuizTaskset"]

_WORDS = ("sea", "lamp", "stone", "candle", "lantern")


class QuizTaskConfig(vf.TaskConfig):
    tools: bool = False


class QuizConfig(vf.TasksetConfig):
    kind: str = "alone"
    task: QuizTaskConfig = QuizTaskConfig()


class QuizData(vf.TaskData):
    answer: str
    kind: str


class Letters(vf.Toolset[vf.ToolsetConfig]):
    @vf.tool
    def count(self, word: str) -> str:
        """Counts the letters of a word."""
        return str(len(word))


class QuizTask(vf.Task[QuizData, vf.State, QuizTaskConfig]):
    @classmethod
    def toolsets(cls, config: QuizTaskConfig) -> list[vf.Toolset]:
        return [Letters(vf.ToolsetConfig())] if config.tools else []

    @vf.reward(weight=2.0)
    async def right(self, task: QuizData, trace: vf.Trace) -> float:
        if task.kind == "cannot be scored":
            raise RuntimeError("no scale")
        return float(trace.last_reply == task.answer)

    @vf.metric
    async def answers(self, trace: vf.Trace) -> float:
        return trace.num_turns


class QuizTaskset(vf.Taskset[QuizTask, QuizConfig]):
    def load(self) -> Iterator[QuizTask]:
        for word in _WORDS:
            said: Any = f"How many letters has {word}?"
            if self.config.kind == "example":
                said = [vf.UserMessage(content="Hello?"), vf.AssistantMessage(content="Hi."), vf.UserMessage(content=said)]
            if self.config.kind == "picture":
                picture = vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url="data:image/png;base64,aa"))
                said = [vf.UserMessage(content=[picture])]
            about = {"system_prompt": "Count.", "answer": str(len(word)), "kind": self.config.kind}
            yield QuizTask(QuizData(prompt=said, **about), self.config.task)


class QuizEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()
    other: vf.AgentConfig = vf.AgentConfig(model="another")


class QuizEnv(vf.Env[QuizEnvConfig]):
    async def run(self, task: QuizTask, agents: vf.Agents) -> None:
        if task.data.kind == "fails":
            raise RuntimeError("out of questions")
        await agents.agent.run(task)
        if task.data.kind == "twice":
            await agents.agent.run(task)


if __name__ == "__main__":
    Letters.run()
