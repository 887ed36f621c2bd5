"""Where episodes come from: an environment in worker processes, a context, an engine, a parser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steppo.engines import Engine
from steppo.envs import Env
from steppo.envs.checks import MOST_REWARD
from steppo.envs.given import checked_tasks, checked_tools, content_of, pickled, step_limit, version_of
from steppo.envs.pool import COUNTS, EnvPool
from steppo.errors import ConfigError, RunError, blamed_on, require_at_least
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, CommandParser, ContextPolicy, HermesParser, Renderer
from steppo.rollouts.base import EpisodeSource, require_positions
from steppo.rollouts.episode import OnStep, play_episode
from steppo.rollouts.place import Place
from steppo.rollouts.players import Player, PolicyPlayer
from steppo.rollouts.rules import Rules
from steppo.rollouts.scheduler import Scheduler, Seat
from steppo.rollouts.texts import prompt_version, tokenizer_texts
from steppo.types import Action, Episode, Group, RolloutConfig, Sampling, Task, Turn

if TYPE_CHECKING:
    from torch import Tensor

    from steppo.models.policy import Policy


_NO_LIMIT = 2**31


class EnvSource(EpisodeSource):
    """Plays an environment with the engine's policy.

    Slots hold one episode each and are refilled as episodes end. What is played does not depend on slots or workers.

    Args:
        env: The environment.
        context: History -> prompt.
        engine: Samples the actions.
        parser: What the policy said -> action. Unless given ``CommandParser``, or ``HermesParser`` if there are tools.
        renderer: Messages -> token ids, by the model's chat template.
        max_steps: Steps after which an episode is truncated; not needed where the environment has a limit of its own
            (there the episode is over: terminated, not truncated).
        max_prompt_tokens: An episode whose prompt grows past this ends (context_overflow).
        max_new_tokens: Most tokens in one action.
        invalid_penalty: Taken off the reward of an action that does not parse or cannot be carried out.
        on_invalid: Go on after such an action, with feedback in the next prompt, or end the episode as failed. Invalid
            actions that cost nothing are an invitation to do nothing.
        num_slots: Episodes played at the same time.
        num_workers: Processes that step environments.
        env_ticks: Ticks of the engine that pass while an environment works. About its time over that of a tick: with fewer
            each tick waits for it, with more the engine makes more ticks of fewer tokens each. 0 or 1 where it is fast.
        env_timeout: Seconds that one environment step may take before its episode is given up.
        start_timeout: Seconds that the environment's ``start`` may take in a worker process.
        worker_memory_mib: A process that holds more MiB after a step is replaced and its episodes are played again up to
            there: for environments that leak. No limit unless given.
        draws: Most answers that the policy gives at a step: while one does not parse it is asked again, at no cost. So it
            acts by its own distribution over what does (``PolicyPlayer``). The last counts. Not where it is greedy.
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
        env_ticks: int = 1,
        env_timeout: float = 60.0,
        worker_memory_mib: int | None = None,
        start_timeout: float = 600.0,
        renderer: Renderer | None = None,
        draws: int = 1,
    ) -> None:
        require_at_least(1, self, max_steps=max_steps, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens)
        require_at_least(
            1, self, num_slots=num_slots, num_workers=num_workers, worker_memory_mib=worker_memory_mib, draws=draws
        )
        require_at_least(0, self, env_ticks=env_ticks)
        task_limit = step_limit(env)
        if max_steps is None and task_limit is None:
            raise ConfigError(f"EnvSource: {type(env).__name__} has no step limit, so max_steps must be given")
        for name, seconds in (("env_timeout", env_timeout), ("start_timeout", start_timeout)):
            if not seconds > 0:
                raise ConfigError(f"EnvSource: {name} must be above 0 seconds, not {seconds}")
        if not 0 <= invalid_penalty <= MOST_REWARD:
            raise ConfigError(f"EnvSource: invalid_penalty must be from 0 to {MOST_REWARD:g}, not {invalid_penalty}")
        pickled(env)  # before models are built: workers get a copy
        self.env = env
        self.task_limit = task_limit
        self.context = context
        self.engine = engine
        self.tools = checked_tools(env)
        self.parser = context.parser = parser or (HermesParser() if self.tools else CommandParser())
        self.renderer = renderer or Renderer()
        self.max_steps = max_steps
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.invalid_penalty = invalid_penalty
        self.on_invalid = on_invalid
        self.num_slots = num_slots
        self.num_workers = num_workers
        self.env_ticks = env_ticks
        self.env_timeout = env_timeout
        self.worker_memory_mib = worker_memory_mib
        self.start_timeout = start_timeout
        self.draws = draws
        self._pool: EnvPool | None = None
        self._is_playing = False
        self._counts = Counter(dict.fromkeys(COUNTS, 0))
        self._request_ids = iter(range(2**62))  # which can be pickled, as an ``itertools.count`` cannot everywhere
        self._vocab_size: int | None = None

    @property
    def scripted(self) -> EnvSource:
        return self

    @property
    def pool(self) -> EnvPool:
        """The worker processes, started when first needed."""
        if self._pool is None:
            sizes = self.num_slots, self.num_workers
            self._pool = EnvPool(self.env, *sizes, self.env_timeout, self.worker_memory_mib, self.start_timeout)
        return self._pool

    def tasks(self, split: str) -> list[Task]:
        where = f"{type(self.env).__name__}.tasks({split!r})"
        with blamed_on(where):
            return checked_tasks(where, self.env.tasks(split))

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        with blamed_on(f"{type(self.env).__name__}.prepare"):
            self.env.prepare(tasks, progress)

    def bind(self, policy: Policy) -> None:
        require_positions(policy, self.max_prompt_tokens, self.max_new_tokens)
        self._vocab_size = policy.vocab_size
        self.bind_tokenizer(policy.tokenizer, policy.stop_ids)
        self.engine.bind(policy)

    def bind_script(self) -> Policy:
        """In place of ``bind`` where no policy is asked: any tokenizer writes the prompts, and none is too long."""
        bytewise = TinyPolicy()
        bytewise.build(list)
        self.bind_tokenizer(bytewise.tokenizer, bytewise.stop_ids)
        self.max_prompt_tokens = _NO_LIMIT
        return bytewise

    def bind_tokenizer(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        """Takes what prompts are written with and answers read with."""
        tools_text = self.parser.tools_text(self.tools)
        self.renderer.bind(tokenizer, stop_ids, self.tools, tools_text)
        self.parser.bind(self.tools, self.renderer)
        if self.tools and not (self.renderer.template_knows_tools or tools_text):
            name = type(self.parser).__name__
            raise ConfigError(f"the chat template shows no tools, so {name}.tools_text must say what there is to call")
        self.context.bind(self.renderer)

    def write(self, action: Action, turn: Turn) -> np.ndarray:
        """Token ids of an action as the policy would give it on seeing ``turn``, its stop token last."""
        return self.renderer.encode_action(self.parser.answer(action, turn))

    @property
    def version(self) -> str:
        return version_of(self.env)

    def content(self, task: Task) -> str:
        return content_of(self.env, task)

    def protocol(self) -> dict[str, Any]:
        return {
            "env": f"{type(self.env).__module__}.{type(self.env).__qualname__}",
            "max_steps": self.longest_episode,
            "max_prompt_tokens": self.max_prompt_tokens if self.max_prompt_tokens < _NO_LIMIT else None,
            "max_new_tokens": self.max_new_tokens,
            "on_invalid": self.on_invalid,
            "invalid_penalty": self.invalid_penalty,
            "context": type(self.context).__name__,
            "parser": type(self.parser).__name__,
            "draws": self.draws,
            "prompt_version": prompt_version(self.context, self.parser, self.tools),
        }

    @property
    def logprob_tolerance(self) -> float:
        return self.engine.logprob_tolerance

    @property
    def longest_episode(self) -> int:
        return min(limit for limit in (self.max_steps, self.task_limit) if limit is not None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.load_weights(weights, version)

    def counts(self) -> Counter[str]:
        """What became of the worker processes, by the names of ``EnvPool.counts``, and what the engine counts."""
        counts = self._counts.copy()
        counts.update(self.engine.counts())
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
        tools = [self.parser.tools_text(self.tools)] if self.tools else []
        return tools + tokenizer_texts(self.pool, self.context, self.parser, tasks, self.num_slots, self.longest_episode)

    def collect(
        self,
        groups: Sequence[Group],
        config: RolloutConfig,
        player: Player | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[list[Episode]]:
        """Plays the groups, by another player than the policy if one is given.

        ``on_step`` is called with each step (none at the start of an episode) and the turn after it.

        Raises:
            RunError: Other groups are under way: slots hold one episode each.
        """
        if self._is_playing:
            raise RunError("EnvSource plays one call of collect at a time: take all its groups before the next, or close it")
        rules = Rules(
            self.context,
            self.parser,
            Sampling(config.temperature, self.max_new_tokens),
            self.max_steps,
            self.task_limit,
            self.max_prompt_tokens,
            self.invalid_penalty,
            self.on_invalid,
            self._vocab_size,
        )

        def play(place: Place, seat: Seat) -> Coroutine[Any, Any, Episode]:
            return play_episode(rules, place, seat, player or PolicyPlayer(seat, self.draws, rules.is_refused), on_step)

        scheduler = Scheduler(self.pool, self.engine, self._request_ids, self.num_slots, self.env_ticks, play)
        unfinished: dict[int, list[Episode]] = {group.id: [] for group in groups}
        sizes = {group.id: group.size for group in groups}
        places = (Place(config, group, sample) for group in groups for sample in range(group.size))
        self._is_playing = True
        try:
            with closing(scheduler.episodes(places)) as episodes:
                for episode in episodes:
                    done = unfinished[episode.group_id]
                    done.append(episode)
                    if len(done) == sizes[episode.group_id]:
                        yield sorted(done, key=lambda episode: episode.order)
        finally:
            self._is_playing = False
            if scheduler.is_playing:  # left early: answers that are still to come belong to nobody
                self._close_pool()
            self.engine.rest()
