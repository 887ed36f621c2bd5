"""Records that every part of steppo shares: from a task to an episode. Free of torch: environment workers import it."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """One problem that an environment can be reset to; in ``data`` what it needs for that: numbers, strings, lists, dicts.

    ``id`` is unique and stable; seeds, panels and groups are made from it, never from a position in a list.
    """

    id: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def as_text(self) -> str:
        """Id and data, the same whatever the order of the data's entries."""
        given = [self.id, dict(self.data)]
        try:
            return json.dumps(given, sort_keys=True, default=repr)
        except (TypeError, ValueError):  # keys that are no strings
            return repr(given)


@dataclass(frozen=True)
class ToolSpec:
    """A tool that the policy may call, as chat templates take it.

    Attributes:
        name: What a call names.
        description: What it does, for the policy.
        parameters: JSON schema of its arguments: an object.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    @property
    def schema(self) -> dict[str, Any]:
        """As a chat template takes it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool. ``id`` tells the calls of an action apart; their answers name it."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    def __str__(self) -> str:
        return f"{self.name}({json.dumps(self.arguments, ensure_ascii=False)})"


@dataclass(frozen=True)
class Action:
    """What the policy decided, read out of what it said.

    Attributes:
        command: A command, where the environment takes these.
        tool_calls: Calls of the environment's tools, in their order.
        text: What was said beside calls and thinking: a final answer, if nothing is called.
        reasoning: The thinking before it.
    """

    command: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    text: str = ""
    reasoning: str = ""

    def __str__(self) -> str:
        """For people and records: the command, the calls, or the text."""
        return self.command or "; ".join(map(str, self.tool_calls)) or self.text


@dataclass(frozen=True)
class Message:
    """One message of a prompt, as chat templates take it.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: The text.
        tool_call_id: Which call a tool's message answers.
        trusted: Its text may show the markup of answers: past ones, or a parser's feedback with the form of a call. Other
            markup of a template is taken out of all messages but the system's.
    """

    role: str
    content: str
    tool_call_id: str = ""
    trusted: bool = False


@dataclass(frozen=True)
class Turn:
    """The environment's: what the agent sees before it acts, and what its last action brought.

    Attributes:
        text: What it says as the user, if anything.
        goal: The instruction, the same all through an episode; said once, it stays.
        commands: What may be said, shown in the prompt; ``None`` where that is hidden, unknown or free. In an open command,
            ``...`` stands for words of the agent's own: ``search[...]``.
        messages: What else is said, before ``text``: answers of tools (role ``tool``), other users.
        reward: Of the last action.
        terminated: The task is over, nothing follows.
        truncated: The episode was cut from outside.
        success: Whether the task is solved, as far as one can tell now; ``None`` for no verdict. The last verdict counts.
        action_valid: The last action could be carried out.
        feedback: Why the last action was refused; empty when it was carried out.
        state_key: Equal where the agent is in the same state, for methods that group by it; the observation unless given.
        info: Figures (numbers, booleans) and labels (short texts) for records and curves, by their names.
        expert_action: What an expert would do now. Never rendered; filled in while demonstrations are collected.
    """

    text: str = ""
    goal: str = ""
    commands: tuple[str, ...] | None = None
    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    action_valid: bool = True
    feedback: str = ""
    state_key: str | None = None
    info: Mapping[str, str | float | bool] = field(default_factory=dict)
    expert_action: Action | None = None

    @property
    def observation(self) -> str:
        """All that is seen, as one text."""
        return "\n".join(text for text in (*(message.content for message in self.messages), self.text) if text)

    def refused(self, feedback: str) -> Turn:
        """This turn again, after an answer that never reached the environment."""
        kept = {name: getattr(self, name) for name in ("text", "goal", "commands", "messages", "state_key", "expert_action")}
        return Turn(**kept, action_valid=False, feedback=feedback)


class StopReason(enum.StrEnum):
    """Why an episode ended. ``aborted``: it could not be rendered, or its action not read."""

    TERMINATED = "terminated"
    STEP_LIMIT = "step_limit"
    CONTEXT_OVERFLOW = "context_overflow"
    ENV_ERROR = "env_error"
    ENGINE_ERROR = "engine_error"
    ABORTED = "aborted"

    @property
    def failed(self) -> bool:
        """The episode broke instead of ending: it is counted, but neither learned from nor scored."""
        return self in (StopReason.ENV_ERROR, StopReason.ENGINE_ERROR, StopReason.ABORTED)


@dataclass(frozen=True, eq=False)
class Step:
    """One agent-environment turn, in token space: exactly the ids that the engine saw and sampled.

    Attributes:
        prompt_ids: int32, the state ``s_t``.
        action_ids: int32, the action ``a_t``, its stop token included when there was one.
        behaviour_logprobs: float32, one per action token, under ``temperature``, from the engine that sampled it.
        reward: ``r_t``.
        index: Position in the episode, from 0, whoever acts.
        finish_reason: ``stop`` (a stop token), ``text`` (one of ``Sampling.stop``) or ``length``.
        terminated: The episode ended here as part of the task: no value follows.
        truncated: The episode was cut here.
        action_valid: The text parsed to an action that the environment took.
        observation: What was seen *before* the action.
        action: The command or the calls, or the raw text when it did not parse.
        temperature: Sampling temperature; 0 is greedy.
        policy_version: Number of updates that the sampling weights had seen.
        agent_id: Which agent acted. The steps of one agent in one episode, in their order, are a *chain*: a trajectory of
            its own, within which credit runs.
        metadata: What the environment said at this step beside the reward: figures and labels by their names.
        state_key: The state before the action (GiGPO's anchor), if it is not told by the observation.
    """

    prompt_ids: np.ndarray
    action_ids: np.ndarray
    behaviour_logprobs: np.ndarray
    reward: float
    index: int
    finish_reason: str
    terminated: bool
    truncated: bool
    action_valid: bool
    observation: str
    action: str
    temperature: float
    policy_version: int
    agent_id: str = "agent"
    metadata: Mapping[str, str | float | bool] = field(default_factory=dict)
    state_key: str | None = None


@dataclass(frozen=True, eq=False)
class Episode:
    """The steps of one attempt at a task.

    Attributes:
        id: Unique within a run.
        order: Logical place among the episodes of an iteration, over all ranks; no two have the same.
        group_id: Episodes of the same task from the same start share it.
        task_id: The task.
        steps: In order, indices 0..T-1; those of several agents stand as they were taken.
        stop_reason: Why it ended.
        final_prompt_ids: The prompt after the last step of a truncated episode, for bootstrapping; else ``None``. It is one
            for that step's agent (``None`` where it has none): the value goes to its chain, other chains end with 0.
        success: Whether the task was solved; ``None`` when the environment does not say.
        error: What failed, for episodes that broke.
        final_reward: A reward of the whole episode, given when it ends, beside the steps' own. Credit by step or token adds
            it to the last step of each chain; the episode's return has it once. ``EnvSource`` leaves it 0.
        metadata: What the environment said before the first step, or a source of the whole episode.
    """

    id: str
    order: int
    group_id: int
    task_id: str
    steps: tuple[Step, ...]
    stop_reason: StopReason
    final_prompt_ids: np.ndarray | None = None
    success: bool | None = None
    error: str = ""
    final_reward: float = 0.0
    metadata: Mapping[str, str | float | bool] = field(default_factory=dict)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the steps' rewards, whoever took them, and of the final reward, once."""
        return float(sum(step.reward for step in self.steps) + self.final_reward)

    @property
    def info(self) -> dict[str, str | float | bool]:
        """What was said beside the rewards: under each name the last."""
        said = dict(self.metadata)
        for step in self.steps:
            said |= step.metadata
        return said


@dataclass(frozen=True)
class Sampling:
    """How actions are sampled: ``temperature`` divides the logits, 0 takes the most likely token.

    Temperature only: top-p, top-k and penalties would make the learner's policy another one. An answer ends with the token
    that completes one of the texts in ``stop``; that token is a part of it.
    """

    temperature: float = 1.0
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """So many (``size``) episodes wanted of one task, from the same start.

    ``id`` is its place among the groups of the iteration over all ranks, ``first`` the order of its first episode: how many
    episodes the groups before it have.
    """

    id: int
    task: Task
    size: int = 1
    first: int = field(kw_only=True)


def groups_of(tasks: Sequence[Task], size: int = 1) -> list[Group]:
    """A group of so many episodes of each task, in their order: all groups of an iteration, before ranks share them."""
    return [Group(index, task, size, first=index * size) for index, task in enumerate(tasks)]


@dataclass(frozen=True)
class RolloutConfig:
    """How a round of episodes is played.

    Attributes:
        name: Goes into the episodes' ids and seeds, such as ``train/3``; the same name and seed give the same episodes.
        seed: The run's seed.
        temperature: Of the actions; 0 takes the most likely.
        version: Policy version to record.
        want_expert: Ask the environments for their expert's action at each step.
    """

    name: str
    seed: int
    temperature: float = 1.0
    version: int = 0
    want_expert: bool = False


@dataclass(frozen=True, eq=False)
class Request:
    """One action wanted from an engine.

    Attributes:
        id: Unique among the requests that an engine gets; given when it gets them.
        session_id: The episode; what an engine caches by.
        prompt_ids: int32 token ids.
        sampling: Temperature and length.
        seed: Of this request's own generator, so that the batch around it does not matter.
    """

    id: int
    session_id: str
    prompt_ids: np.ndarray
    sampling: Sampling
    seed: int


@dataclass(frozen=True, eq=False)
class Completion:
    """An engine's answer to a request: int32 ``action_ids``, float32 ``logprobs`` per token, a step's ``finish_reason``.

    A failed request has ``error`` set and no tokens.
    """

    request_id: int
    action_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    error: str = ""
