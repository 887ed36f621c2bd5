"""Where episodes come from: environment + context + engine, many at a time."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steppo.contexts import ContextPolicy
from steppo.engines import Engine
from steppo.envs import Env
from steppo.envs.checks import MOST_REWARD, EnvReply, checked_tasks, pickled, plain_text, shown, step_limit
from steppo.envs.pool import COUNTS, EnvPool
from steppo.errors import ConfigError, SteppoError, WrongValue, blamed_on, said
from steppo.parsers import ActionParser, CommandParser, ParsedAction
from steppo.types import Completion, Episode, Group, Observation, Request, RolloutConfig, Sampling, Step, StopReason, Task

if TYPE_CHECKING:
    from torch import Tensor

    from steppo.models.policy import Policy


class EpisodeSource(ABC):
    """Gives whole groups of episodes."""

    @abstractmethod
    def tasks(self, split: str) -> list[Task]:
        """Tasks of a split."""

    @abstractmethod
    def bind(self, policy: Policy) -> None:
        """Takes the policy before the first episode."""

    @abstractmethod
    def collect(self, groups: Sequence[Group], config: RolloutConfig) -> Iterator[list[Episode]]:
        """Plays the groups; each comes out whole, in the order in which they are finished."""

    @property
    def logprob_tolerance(self) -> float:
        """Largest difference between sampler and learner that is no cause for worry."""
        return math.inf

    @property
    def longest_episode(self) -> int | None:
        """Most steps of an episode, where that is known."""
        return None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes the learner's weights, before the episodes of an iteration or an evaluation."""

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        """Makes what the tasks need on disk; ``progress`` gets (done, total)."""

    def tokenizer_texts(self, tasks: Sequence[Task]) -> list[str]:
        """Texts of the environment, for a policy that makes its own tokenizer."""
        raise ConfigError(f"{type(self).__name__} has no text to train a tokenizer on; use a pretrained policy")

    def counts(self) -> Counter[str]:
        """What else happened since the source was made, always under the same names; logged by iteration."""
        return Counter()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a ``state_dict``."""

    def close(self) -> None:
        """Ends processes."""


@dataclass
class _Playing:
    """An episode under way."""

    group: Group
    sample: int
    id: str
    observations: list[Observation] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    prompt_ids: np.ndarray | None = None
    completion: Completion | None = None
    parsed: ParsedAction | None = None
    waits_for_env: bool = True
    success: bool | None = None
    failure: tuple[StopReason, str] | None = None


@contextmanager
def _costs(episodes: Collection[_Playing], reason: StopReason) -> Iterator[None]:
    """What raises in here costs these episodes, not the run; only a ``SteppoError`` still ends it."""
    try:
        yield
    except SteppoError:
        raise
    except Exception as error:
        for playing in episodes:
            playing.failure = reason, said(error)


class EnvSource(EpisodeSource):
    """Plays an environment with the engine's policy.

    Slots hold one episode each and are refilled as episodes end. They take turns in two halves: while the engine generates
    for one, all worker processes step the other's environments. What is played does not depend on slots or workers.

    Args:
        env: The environment.
        context: History -> prompt.
        engine: Samples the actions.
        parser: Action text -> command.
        max_steps: Steps after which an episode is truncated; not needed where the environment has a limit of its own
            (there the episode is over: terminated, not truncated).
        max_prompt_tokens: An episode whose prompt grows past this ends (context_overflow).
        max_new_tokens: Most tokens in one action.
        invalid_penalty: Taken off the reward of an action that does not parse or cannot be carried out.
        on_invalid: Go on after such an action, with feedback in the next prompt, or end the episode as failed. Invalid
            actions that cost nothing are an invitation to do nothing.
        num_slots: Episodes played at the same time.
        num_workers: Processes that step environments.
        env_timeout: Seconds that one environment step may take before its episode is given up.
        worker_memory_mib: A process that holds more MiB after a step is replaced and its episodes are played again up to
            there: for environments that leak. No limit unless given.
    """

    def __init__(
        self,
        env: Env,
        context: ContextPolicy,
        engine: Engine,
        parser: ActionParser | None = None,
        max_steps: int | None = None,
        max_prompt_tokens: int = 4096,
        max_new_tokens: int = 16,
        invalid_penalty: float = 0.1,
        on_invalid: Literal["continue", "end"] = "continue",
        num_slots: int = 32,
        num_workers: int = 1,
        env_timeout: float = 60.0,
        worker_memory_mib: int | None = None,
    ) -> None:
        for name, value in (
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_new_tokens", max_new_tokens),
            ("num_slots", num_slots),
            ("num_workers", num_workers),
        ):
            if value < 1:
                raise ConfigError(f"EnvSource: {name} must be at least 1, not {value}")
        task_limit = step_limit(env)
        if max_steps is None and task_limit is None:
            raise ConfigError(f"EnvSource: {type(env).__name__} has no step limit, so max_steps must be given")
        if max_steps is not None and max_steps < 1:
            raise ConfigError(f"EnvSource: max_steps must be at least 1, not {max_steps}")
        if not env_timeout > 0:
            raise ConfigError(f"EnvSource: env_timeout must be above 0 seconds, not {env_timeout}")
        if not 0 <= invalid_penalty <= MOST_REWARD:
            raise ConfigError(f"EnvSource: invalid_penalty must be from 0 to {MOST_REWARD:g}, not {invalid_penalty}")
        if worker_memory_mib is not None and worker_memory_mib < 1:
            raise ConfigError(f"EnvSource: worker_memory_mib must be at least 1, not {worker_memory_mib}")
        pickled(env)  # before models are built: workers get a copy
        self.env = env
        self.task_limit = task_limit
        self.context = context
        self.engine = engine
        self.parser = parser or CommandParser()
        self.max_steps = max_steps
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.invalid_penalty = invalid_penalty
        self.on_invalid = on_invalid
        self.num_slots = num_slots
        self.num_workers = num_workers
        self.env_timeout = env_timeout
        self.worker_memory_mib = worker_memory_mib
        self._pool: EnvPool | None = None
        self._counts = Counter(dict.fromkeys(COUNTS, 0))
        self._request_ids = itertools.count()
        self._vocab_size: int | None = None

    @property
    def pool(self) -> EnvPool:
        """The worker processes, started when first needed."""
        if self._pool is None:
            sizes = self.num_slots, self.num_workers
            self._pool = EnvPool(self.env, *sizes, self.env_timeout, self.worker_memory_mib)
        return self._pool

    def tasks(self, split: str) -> list[Task]:
        where = f"{type(self.env).__name__}.tasks({split!r})"
        with blamed_on(where):
            return checked_tasks(where, self.env.tasks(split))

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        with blamed_on(f"{type(self.env).__name__}.prepare"):
            self.env.prepare(tasks, progress)

    def bind(self, policy: Policy) -> None:
        longest = self.max_prompt_tokens + self.max_new_tokens
        if longest > policy.max_positions:
            raise ConfigError(
                f"max_prompt_tokens + max_new_tokens = {longest} is more than the model's {policy.max_positions} positions"
            )
        self._vocab_size = policy.vocab_size
        self.context.bind(policy.tokenizer, policy.stop_ids)
        self.engine.bind(policy)

    @property
    def logprob_tolerance(self) -> float:
        return self.engine.logprob_tolerance

    @property
    def longest_episode(self) -> int:
        return min(limit for limit in (self.max_steps, self.task_limit) if limit is not None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.load_weights(weights, version)

    def counts(self) -> Counter[str]:
        """What became of the worker processes, by the names of ``EnvPool.counts``."""
        counts = self._counts.copy()
        if self._pool is not None:
            counts.update(self._pool.counts)
        return counts

    def close(self) -> None:
        self._close_pool()
        self.engine.close()

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._counts.update(self._pool.counts)
            self._pool = None

    def tokenizer_texts(self, tasks: Sequence[Task]) -> list[str]:
        """Plays each task once by random admissible actions (or the expert's) and gives all that was to be read."""
        texts: list[str] = []
        rng = random.Random(0)
        self.pool.reset(0, tasks[0], want_expert=False)
        opening = self.pool.receive(0).observation
        hidden = opening is None or opening.admissible_commands is None  # then the expert knows some
        for first in range(0, len(tasks), self.num_slots):
            active = list(enumerate(tasks[first : first + self.num_slots]))
            for slot, task in active:
                self.pool.reset(slot, task, want_expert=hidden)
            for _ in range(self.longest_episode):
                going = []
                for slot, task in active:
                    reply = self.pool.receive(slot)
                    if reply.observation is None:
                        continue
                    texts.append(self.context.render_observation(reply.observation))
                    options = reply.observation.admissible_commands or (reply.observation.expert_action,)
                    action = rng.choice(options)
                    if not (reply.terminated or reply.truncated) and action is not None:
                        texts.append("Done: " + action)
                        self.pool.step(slot, action)
                        going.append((slot, task))
                active = going
            for slot, _ in active:
                self.pool.receive(slot)
        return texts

    def collect(
        self,
        groups: Sequence[Group],
        config: RolloutConfig,
        engine: Engine | None = None,
        on_step: Callable[[Step | None, Observation], None] | None = None,
    ) -> Iterator[list[Episode]]:
        """Plays the groups, with another engine than the policy's if one is given.

        ``on_step`` is called with each step (none at the start of an episode) and the observation after it.
        """
        engine = engine or self.engine
        sampling = Sampling(config.temperature, self.max_new_tokens)
        wanted = deque((group, sample) for group in groups for sample in range(group.size))
        playing: dict[int, _Playing] = {}
        unfinished: dict[int, list[Episode]] = {group.id: [] for group in groups}
        sizes = {group.id: group.size for group in groups}
        halves = _halves(self.num_slots)

        try:
            while wanted or playing:
                for half in halves:
                    asked: list[tuple[int, _Playing]] = []
                    for slot in half:
                        episode = self._listen(playing[slot], slot, config, on_step) if slot in playing else None
                        if episode is not None:
                            del playing[slot]
                            self.pool.release(slot)
                            self._release(engine, episode.id)
                            done = unfinished[episode.group_id]
                            done.append(episode)
                            if len(done) == sizes[episode.group_id]:
                                yield sorted(done, key=lambda episode: episode.order)
                        if slot in playing:
                            asked.append((slot, playing[slot]))
                        elif wanted:
                            group, sample = wanted.popleft()
                            playing[slot] = _Playing(group, sample, f"{config.name}/{group.id}/{group.task.id}/{sample}")
                            self.pool.reset(slot, group.task, config.want_expert)
                    self._ask(engine, asked, config, sampling)
                    for slot, current in asked:
                        self._act(current, slot)
        finally:
            if playing:  # left early: answers that are still to come belong to nobody
                for current in playing.values():
                    self._release(engine, current.id)
                self._close_pool()

    def _listen(
        self, playing: _Playing, slot: int, config: RolloutConfig, on_step: Callable[[Step | None, Observation], None] | None
    ) -> Episode | None:
        """Takes the environment's answer and makes the next prompt, or ends the episode."""
        if playing.failure is not None:
            return self._fail(playing)
        reply = self.pool.receive(slot) if playing.waits_for_env else self._refuse(playing)
        if reply.observation is None:
            playing.failure = StopReason.ENV_ERROR, reply.error
            return self._fail(playing)
        observation = reply.observation
        playing.success = playing.success if reply.success is None else reply.success
        if not reply.action_valid:
            reply = replace(
                reply,
                reward=reply.reward - self.invalid_penalty,
                terminated=reply.terminated or self.on_invalid == "end",
            )
        if playing.completion is not None:
            if len(playing.steps) + 1 == self.task_limit:
                reply = replace(reply, terminated=True)
            self._record(playing, reply, config)
        if on_step is not None:
            on_step(playing.steps[-1] if playing.steps else None, observation)
        if reply.terminated:
            return self._end(playing, StopReason.TERMINATED)
        playing.observations.append(observation)
        with _costs([playing], StopReason.ABORTED):
            playing.prompt_ids = self._checked_prompt(self.context.prompt_ids(playing.observations, playing.steps))
        if playing.failure is not None:
            return self._fail(playing)
        assert playing.prompt_ids is not None
        overflow = len(playing.prompt_ids) > self.max_prompt_tokens
        if reply.truncated or len(playing.steps) == self.max_steps:
            return self._end(playing, StopReason.STEP_LIMIT, None if overflow else playing.prompt_ids)
        return self._end(playing, StopReason.CONTEXT_OVERFLOW) if overflow else None

    def _refuse(self, playing: _Playing) -> EnvReply:
        """What follows an action that did not parse: the environment stays as it is, solved or not."""
        assert playing.parsed is not None
        observation = replace(playing.observations[-1], feedback=playing.parsed.feedback)
        return EnvReply(observation, action_valid=False)

    def _checked_prompt(self, ids: Any) -> np.ndarray:
        """Token ids of a prompt. Of an empty one the value would be read at another row's position."""
        call = f"{type(self.context).__name__}.prompt_ids"
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            given = f"shape {ids.shape} of {ids.dtype}" if isinstance(ids, np.ndarray) else shown(ids)
            raise WrongValue(f"{call} must give a one-dimensional array of integers, not {given}")
        if not ids.size:
            raise WrongValue(f"{call} gave an empty prompt")
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or (self._vocab_size is not None and highest >= self._vocab_size):
            wrong = lowest if lowest < 0 else highest
            raise WrongValue(f"{call} gave the token id {wrong}, which is none of the model's {self._vocab_size}")
        return ids.astype(np.int32, copy=False)

    def _checked_action(self, parsed: Any) -> ParsedAction:
        call = f"{type(self.parser).__name__}.parse"
        if not isinstance(parsed, ParsedAction):
            raise WrongValue(f"{call} must give a ParsedAction, not {shown(parsed)}")
        command = None if parsed.command is None else plain_text(f"the command of {call}", parsed.command)
        return ParsedAction(command, plain_text(f"the feedback of {call}", parsed.feedback))

    def _record(self, playing: _Playing, reply: EnvReply, config: RolloutConfig) -> None:
        completion, parsed, prompt_ids = playing.completion, playing.parsed, playing.prompt_ids
        assert completion is not None
        assert parsed is not None
        assert prompt_ids is not None
        text = self.context.decode_action(completion.action_ids)
        playing.steps.append(
            Step(
                prompt_ids=prompt_ids,
                action_ids=completion.action_ids,
                behaviour_logprobs=completion.logprobs,
                reward=reply.reward,
                index=len(playing.steps),
                finish_reason=completion.finish_reason,
                terminated=reply.terminated,
                truncated=False,
                action_valid=reply.action_valid,
                observation=playing.observations[-1].text,
                action=text.strip() if parsed.command is None else parsed.command,
                temperature=config.temperature,
                policy_version=config.version,
            )
        )
        playing.completion = None

    def _ask(self, engine: Engine, asked: list[tuple[int, _Playing]], config: RolloutConfig, sampling: Sampling) -> None:
        """Has the engine answer all prompts of a half; an episode that gets no answer fails."""
        waiting: dict[int, _Playing] = {}
        for _, playing in asked:
            assert playing.prompt_ids is not None
            seed = request_seed(config, playing.group, playing.sample, len(playing.steps))
            number = next(self._request_ids)  # never used again: a late answer must not be taken for another's
            with _costs([playing], StopReason.ENGINE_ERROR):
                engine.submit(Request(number, playing.id, playing.prompt_ids, sampling, seed, playing.observations[-1]))
                waiting[number] = playing
        while waiting:
            completions: list[Completion] = []
            with _costs(waiting.values(), StopReason.ENGINE_ERROR):
                completions = engine.poll()
                if not completions:
                    raise RuntimeError("the engine gave no answer")
            if not completions:
                return
            for completion in completions:
                if completion.request_id not in waiting:
                    continue  # its episode was given up before
                playing = waiting.pop(completion.request_id)
                playing.completion = completion
                if completion.error or not len(completion.action_ids):
                    error = completion.error or "the engine gave an action without a token"
                    playing.failure = StopReason.ENGINE_ERROR, error

    def _act(self, playing: _Playing, slot: int) -> None:
        """Sends a command to the environment, if the answer holds one."""
        if playing.failure is not None:
            return
        assert playing.completion is not None
        with _costs([playing], StopReason.ABORTED):
            text = self.context.decode_action(playing.completion.action_ids)
            playing.parsed = self._checked_action(self.parser.parse(text, playing.observations[-1]))
        if playing.failure is not None:
            return
        assert playing.parsed is not None
        playing.waits_for_env = playing.parsed.command is not None
        if playing.parsed.command is not None:
            self.pool.step(slot, playing.parsed.command)

    def _fail(self, playing: _Playing) -> Episode:
        assert playing.failure is not None
        reason, error = playing.failure
        return self._end(playing, reason, error=error)

    @staticmethod
    def _release(engine: Engine, session_id: str) -> None:
        """The episode is over, so that nothing is lost where the engine cannot forget it."""
        try:
            engine.release(session_id)
        except SteppoError:
            raise
        except Exception as error:
            warnings.warn(f"the engine could not release an episode: {said(error)}", stacklevel=2)

    def _end(
        self, playing: _Playing, reason: StopReason, final_prompt_ids: np.ndarray | None = None, error: str = ""
    ) -> Episode:
        steps = playing.steps
        if steps and reason != StopReason.TERMINATED:
            steps[-1] = replace(steps[-1], truncated=True)
        return Episode(
            id=playing.id,
            order=playing.group.first + playing.sample,
            group_id=playing.group.id,
            task_id=playing.group.task.id,
            steps=tuple(steps),
            stop_reason=reason,
            final_prompt_ids=final_prompt_ids,
            success=playing.success,
            error=error,
        )


def _halves(num_slots: int) -> tuple[range, range]:
    """Neighbours are served by different workers (``EnvPool``), so each half keeps all of them busy."""
    middle = (num_slots + 1) // 2
    return range(middle), range(middle, num_slots)


def request_seed(config: RolloutConfig, group: Group, sample: int, step: int) -> int:
    """Seed of one action: the same wherever and beside whatever it is sampled."""
    name = f"{config.seed}|{config.name}|{group.id}|{group.task.id}|{sample}|{step}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
