"""Records and batches that every part of steppo shares. Free of torch at run time: environment workers import it.

Shape suffixes: ``_N`` steps, ``_E`` episodes, ``_A`` action tokens, ``_BT`` rows x tokens (flattened: ``row * T + column``).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One problem that an environment can be reset to; in ``data`` what it needs for that: numbers, strings, lists, dicts.

    ``id`` is unique and stable; seeds, panels and groups are made from it, never from a position in a list.
    """

    id: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """What the agent sees before it acts.

    Attributes:
        text: The environment's answer (or its opening text).
        goal: The instruction, the same all through an episode.
        admissible_commands: Commands to choose from, shown in the prompt; ``None`` when they are hidden or unknown.
        feedback: Why the last action was refused; empty when it was carried out.
        expert_action: What an expert would do now. Never rendered; filled only while demonstrations are collected.
    """

    text: str
    goal: str = ""
    admissible_commands: tuple[str, ...] | None = None
    feedback: str = ""
    expert_action: str | None = None


@dataclass(frozen=True)
class Message:
    """One message of a prompt, as chat templates take it.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: The text.
        trusted: Its text may show the markup of answers: past ones, or a parser's feedback with the form of a call. Other
            markup of a template is taken out of all messages but the system's.
    """

    role: str
    content: str
    trusted: bool = False


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
        finish_reason: ``stop`` or ``length``.
        terminated: The episode ended here as part of the task: no value follows.
        truncated: The episode was cut here.
        action_valid: The text parsed to a command that the environment took.
        observation: Text *before* the action (the anchor state of GiGPO).
        action: Parsed command, or the raw text when it did not parse.
        temperature: Sampling temperature; 0 is greedy.
        policy_version: Number of updates that the sampling weights had seen.
        agent_id: Which agent acted. The steps of one agent in one episode, in their order, are a *chain*: a trajectory of
            its own, within which credit runs.
        metadata: What the environment said at this step beside the reward: figures and labels by their names.
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

    Temperature only: top-p, top-k and penalties would make the learner's policy another one.
    """

    temperature: float = 1.0
    max_new_tokens: int = 16


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
    """An engine's answer to a request: int32 ``action_ids``, float32 ``logprobs`` per token, ``stop`` or ``length``.

    A failed request has ``error`` set and no tokens.
    """

    request_id: int
    action_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    error: str = ""


@dataclass(frozen=True, eq=False)
class Segment:
    """Token ids of one step, to be packed: int32 prompt and action (the action may be empty to read a value only).

    ``episode`` (its order) and ``group`` say which segments may begin alike, for packers that share such beginnings.
    """

    prompt_ids: np.ndarray
    action_ids: np.ndarray
    episode: int = 0
    group: int = 0


@dataclass
class TokenBatch:
    """Packed steps, ready for a forward pass. Only packers and models know about rows.

    Attributes:
        input_ids_BT: int64 [B, T].
        position_ids_BT: int64 [B, T].
        attention: ``None`` = causal along the row; else a float mask [B, 1, T, T] that is added to the scores.
        predict_at_A: int64, flat position whose logits predict each action token.
        target_A: int64, the action tokens.
        step_of_A: int64 in [0, N), the step of each action token, non-decreasing.
        value_at_N: int64, flat position of each prompt's last token. Several steps may point at one position.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    attention: Tensor | None
    predict_at_A: Tensor
    target_A: Tensor
    step_of_A: Tensor
    value_at_N: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        """On another device."""
        return replace(self, **_moved(self, device))

    @property
    def num_steps(self) -> int:
        """N."""
        return self.value_at_N.shape[0]

    def value_positions(self, needs_values: str) -> Tensor:
        """Flat positions where a critic is read: each prompt's end (``step``), or wherever an action token is predicted."""
        return self.value_at_N if needs_values == "step" else self.predict_at_A


@dataclass
class CreditBatch:
    """All that credit assignment may look at: the steps of one iteration over all ranks, in any order.

    An episode may hold several agents. A *chain* is the steps of one of them in one episode, in their order: a trajectory of
    its own. What follows a step is the next one of its chain; no value crosses chains. An episode of one agent is one chain.

    Attributes:
        reward_N: float, reward of each step, with the KL penalty if the reward carries it. The last step of each chain also
            has the final reward of its episode: a sum over several chains has it several times, ``episode_returns`` once.
        reward_A: float, the same by action token: a step's reward sits on its last token, the KL penalty on each.
        task_reward_N: float, reward of each step without the KL penalty.
        task_reward_A: float, the same by action token.
        episode_N: int64, number of the step's episode in [0, E).
        chain_N: int64, number of the step's chain in [0, C). Chains are numbered by episode: those of one have adjacent
            numbers, while their steps may be mixed. With one agent in each episode it is ``episode_N``.
        agent_N: int64, number of the step's agent, the same in all episodes.
        group_E: int64, group of each episode.
        index_N: int64, position of the step in its chain, from 0.
        length_N: int64, action tokens of each step; those of a step stand together, steps in the order of the rows.
        terminated_E: bool, the episode ended as part of its task.
        bootstrap_E: float, value of the state after the last step of a truncated episode; 0 where there is none. It is one
            of that step's chain; the episode's other chains end with 0.
        last_chain_E: int64, chain of each episode's last step.
        final_reward_E: float, what the rewards of each chain's last step hold beside its own.
        value_N: float, value of each step's prompt, for advantages that need step values.
        value_A: float, value before each action token, for advantages that need token values.
        anchor_N: int64, equal for steps of one agent with the same observation.
        observation_N: The observations' texts, for advantages that ask for them.
    """

    reward_N: Tensor
    reward_A: Tensor
    task_reward_N: Tensor
    task_reward_A: Tensor
    episode_N: Tensor
    chain_N: Tensor
    agent_N: Tensor
    group_E: Tensor
    index_N: Tensor
    length_N: Tensor
    terminated_E: Tensor
    bootstrap_E: Tensor
    last_chain_E: Tensor
    final_reward_E: Tensor
    value_N: Tensor | None = None
    value_A: Tensor | None = None
    anchor_N: Tensor | None = None
    observation_N: list[str] | None = None


@dataclass(frozen=True, eq=False)
class Credit:
    """What credit assignment gives: an advantage by step or by action token, and the critic's targets of the same kind."""

    advantage_N: Tensor | None = None
    advantage_A: Tensor | None = None
    target_N: Tensor | None = None
    target_A: Tensor | None = None


@dataclass
class Microbatch:
    """One forward and backward pass of an update.

    Attributes:
        tokens: The packed steps.
        temperature_A: float, what each action token was sampled with.
        old_logprobs_A: float, log-probabilities when the iteration started.
        behaviour_logprobs_A: float, those of the engine that sampled.
        ref_logprobs_A: float, the reference policy's; ``None`` without KL.
        advantage_A: float, a step's advantage repeated over its tokens, or the tokens' own.
        weight_A: float, importance weight of each action token: 1 on-policy, 0 where it is not learned from.
        index_N: int64, the steps' indices in this rank's buffer.
        old_value: float [N] or [A], as the critic reads them; ``None`` without critic.
        target: float, same shape.
        update_steps: Steps in the whole update, over all microbatches and ranks.
        update_tokens: Action tokens in the whole update.
        scale: 1, or 0 for a microbatch that only keeps the ranks in step with each other.
    """

    tokens: TokenBatch
    temperature_A: Tensor
    old_logprobs_A: Tensor
    behaviour_logprobs_A: Tensor
    ref_logprobs_A: Tensor | None
    advantage_A: Tensor
    weight_A: Tensor
    index_N: Tensor
    old_value: Tensor | None
    target: Tensor | None
    update_steps: int
    update_tokens: int
    scale: float = 1.0

    def to(self, device: torch.device) -> Microbatch:
        """On another device."""
        return replace(self, **_moved(self, device))


def _moved(batch: TokenBatch | Microbatch, device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in vars(batch).items() if hasattr(value, "to")}
