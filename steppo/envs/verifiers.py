"""Environments of verifiers (https://github.com/PrimeIntellect-ai/verifiers), as they are since its version 0.4."""

from __future__ import annotations

import importlib.util
import itertools
from typing import TYPE_CHECKING, Any

from steppo.envs.base import Env
from steppo.envs.foreign import SPLITS, recorded, require_sizes, require_split, require_verdict, solved
from steppo.errors import ConfigError, said
from steppo.types import Action, Task, ToolSpec, Turn

if TYPE_CHECKING:
    from steppo.envs.verifiers_stage import Dialogue

# The stage, which imports verifiers, is imported where it is used: it is an extra, and other workers do without.


class VerifiersEnv(Env):
    """An environment of verifiers: its taskset, its tools, its user, its rewards. A step is one answer of the model.

    Needs ``pip install "steppo[verifiers]"``. verifiers plays an episode by itself, and asks a model over HTTP. Here it asks
    this process, on loopback, and each question is a turn. The last one has the reward that verifiers gave; what it is made
    of, and its metrics, are in ``info``. The agent has the task's own tools, but no shell. Refused are agents that are
    programs (a harness such as ``codex``), and episodes with several dialogues.

    Args:
        taskset: verifiers' own settings of the taskset, such as ``{id: textarena, game: Hangman-v0}``.
        config: What else verifiers has under ``env``: ``id``, agents, ``timeout``. Of several agents all but one need a
            ``model`` (and its ``client``).
        commands: What may be said, to be shown. Nothing unless given.
        success_reward: Reward at which an episode is solved. There is no verdict unless given.
        num_train: Number of training tasks: the taskset's first.
        num_valid: Number of validation tasks: those after them.
        num_test: Number of test tasks: those after these.
    """

    def __init__(
        self,
        taskset: dict[str, Any],
        config: dict[str, Any] | None = None,
        commands: list[str] | None = None,
        success_reward: float | None = None,
        num_train: int = 100,
        num_valid: int = 100,
        num_test: int = 100,
    ) -> None:
        self.num_tasks = {"train": num_train, "valid": num_valid, "test": num_test}
        require_sizes("VerifiersEnv", self.num_tasks)
        require_verdict("VerifiersEnv", success_reward)
        if "taskset" in (config or {}):
            raise ConfigError("VerifiersEnv: config cannot hold taskset: it is a setting of its own")
        self.config = {**(config or {}), "taskset": taskset}
        self.commands = None if commands is None else tuple(commands)
        self.success_reward = success_reward
        self._open: list[Dialogue] = []  # the episode's, from ``reset`` to ``close``
        self._check()

    def _check(self) -> None:
        """Opens the first task, so that what cannot be played is said before a model is built; it has the tools."""
        if importlib.util.find_spec("verifiers") is None:
            raise ConfigError('VerifiersEnv needs verifiers: pip install "steppo[verifiers]"')
        try:
            from steppo.envs.verifiers_stage import Stage, loaded

            env = loaded(self.config)
            self.name = env.config.env_id
            with Stage(env) as stage, stage.dialogue(self._tasks(env, 0, 1)[0].data) as dialogue:
                self.tools = [ToolSpec(**tool) for tool in dialogue.tools()]
        except (Exception, SystemExit) as error:  # where it wants a login it ends the process
            raise ConfigError(f"VerifiersEnv: this environment cannot be played: {said(error)}") from None

    def tasks(self, split: str) -> list[Task]:
        from steppo.envs.verifiers_stage import loaded

        require_split("VerifiersEnv", split)
        first = sum(self.num_tasks[name] for name in SPLITS[: SPLITS.index(split)])
        return self._tasks(loaded(self.config), first, self.num_tasks[split])

    def _tasks(self, env: Any, first: int, number: int) -> list[Task]:
        found = list(itertools.islice(env.taskset, first, first + number))
        if len(found) < number:
            raise ConfigError(f"VerifiersEnv: the taskset ends with task {first + len(found)}: lower num_train and so on")
        return [Task(f"{self.name}/{place}", task.data.model_dump(mode="json")) for place, task in enumerate(found, first)]

    def content(self, task: Task) -> str:
        return Task(task.id, {**task.data, "config": self.config, "success_reward": self.success_reward}).as_text()

    def start(self) -> None:
        from steppo.envs.verifiers_stage import Stage, loaded

        self._stage = Stage(loaded(self.config))

    def reset(self, task: Task) -> Turn:
        self.close()
        self._open = [self._stage.dialogue(task.data)]
        return self._turn()

    def step(self, action: Action) -> Turn:
        self._open[0].answer(action)
        return self._turn()

    def close(self) -> None:
        while self._open:
            self._open.pop().close()

    def _turn(self) -> Turn:
        [dialogue] = self._open
        if (question := dialogue.question()) is not None:
            *before, last = question.messages
            is_said = last.role == "user"
            messages = before if is_said else question.messages
            text, verdict = last.content if is_said else "", solved(0.0, self.success_reward, ended=False)
            return Turn(text, question.system, self.commands, tuple(messages), success=verdict)
        trace = dialogue.trace()
        rewards = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        return Turn(
            "The end.",
            reward=trace.reward,
            terminated=True,
            success=solved(trace.reward, self.success_reward, ended=True),
            info=recorded({**rewards, **trace.metrics, "stop": trace.stop_condition}.items()),
        )
