"""Episodes of agents that are programs of their own: each plays a task and asks the gateway for completions."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from steppo.engines import Engine, EngineThread
from steppo.envs.checks import EnvReply
from steppo.envs.given import checked_tasks
from steppo.envs.pool import COUNTS as POOL_COUNTS
from steppo.envs.pool import EnvPool
from steppo.errors import ConfigError, RunError, require_at_least
from steppo.gateway.program import AgentProgram, read_tasks
from steppo.gateway.settings import COUNTS, MAIN, GatewaySettings
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, HermesParser, Renderer
from steppo.rollouts import EpisodeSource
from steppo.rollouts.base import require_positions
from steppo.rollouts.place import Place
from steppo.types import Action, Completion, Episode, Group, Request, RolloutConfig, StopReason, Task, groups_of

if TYPE_CHECKING:
    from torch import Tensor

    from steppo.gateway.server import Gateway
    from steppo.gateway.session import Session
    from steppo.models.policy import Policy

_NO_LIMIT = 2**31
_PATIENCE_S = 5.0  # for what is under way to end


class AgentSource(EpisodeSource):
    """Runs agents that know nothing of training: each asks an OpenAI-compatible server, and its calls are the steps.

    An agent is a program: a Python callable or a command. In its environment variables are ``OPENAI_BASE_URL`` and
    ``OPENAI_API_KEY``, for one task at a time. Its reward is what it returns, or what is sent to ``STEPPO_REWARD_URL`` with
    ``STEPPO_REWARD_KEY``. One that raises, ends with another status than 0 or takes too long has failed.

    Args:
        tasks: By split, a file with a JSON object on each line: its ``id``, and what else the agent gets.
        engine: Samples the answers.
        agent: Dotted path of a callable that gets a ``Task``. It may be a coroutine.
        command: A command line; its last line of output, in JSON, is what a callable would return.
        judge: Dotted path of ``judge(task, output)``, which gives the reward in place of the agent. The agent has no key to
            give itself one then.
        parser: Reads calls of tools, where an agent brings tools.
        renderer: Messages -> token ids, by the model's chat template.
        max_steps: Calls of a session; what is asked then gets 409, and the episode is cut.
        max_prompt_tokens: Longest prompt; a longer one gets 400.
        max_new_tokens: Most tokens of an answer.
        num_parallel: Agents at the same time, each in a process of its own.
        agent_timeout: Seconds that one may take for a task.
        start_timeout: Seconds that a process may take to import the agent.
        gateway: Where the server listens, and its limits.
    """

    _played: queue.SimpleQueue[Episode | BaseException]  # by the `collect` under way

    def __init__(
        self,
        tasks: dict[str, str],
        engine: Engine,
        agent: str | None = None,
        command: str | None = None,
        judge: str | None = None,
        parser: ActionParser | None = None,
        renderer: Renderer | None = None,
        max_steps: int = 50,
        max_prompt_tokens: int = 4096,
        max_new_tokens: int = 256,
        num_parallel: int = 4,
        agent_timeout: float = 600.0,
        start_timeout: float = 120.0,
        gateway: GatewaySettings = GatewaySettings(),
    ) -> None:
        require_at_least(1, self, max_steps=max_steps, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens)
        require_at_least(1, self, num_parallel=num_parallel, agent_timeout=agent_timeout, start_timeout=start_timeout)
        if bool(agent) == bool(command):
            raise ConfigError("AgentSource: give an agent, the dotted path of a callable, or a command, and not both")
        if wrong := [path for path in (agent, judge) if path and "." not in path]:
            raise ConfigError(f"AgentSource: an agent or judge is a dotted path, such as my_file.play, not {wrong[0]!r}")
        if find_spec("fastapi") is None or find_spec("uvicorn") is None:
            raise ConfigError('AgentSource needs a web server: pip install "steppo[gateway]"')
        self.files = tasks
        self.engine = engine
        self.program = AgentProgram(agent, command, judge)
        self.parser = parser or HermesParser()
        self.renderer = renderer or Renderer()
        self.max_steps = max_steps
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.num_parallel = num_parallel
        self.agent_timeout = agent_timeout
        self.start_timeout = start_timeout
        self.settings = gateway
        self._gateway: Gateway | None = None
        self._pool: EnvPool | None = None
        self._request_ids = iter(range(2**62))  # which pickles
        self._is_playing = False
        self._counts = Counter(dict.fromkeys((*POOL_COUNTS, *COUNTS, "aborted_sessions", "unrewarded_sessions"), 0))

    # ---- what a source must offer ----

    def tasks(self, split: str) -> list[Task]:
        if split not in self.files:
            raise ConfigError(f"AgentSource has no tasks of the split {split!r}; it has {', '.join(self.files)}")
        return checked_tasks(self.files[split], read_tasks(self.files[split]))

    def bind(self, policy: Policy) -> None:
        require_positions(policy, self.max_prompt_tokens, self.max_new_tokens)
        self.engine.bind(policy)
        self._open(policy, self.max_prompt_tokens)

    def protocol(self) -> dict[str, Any]:
        agent = self.program.agent or " ".join(self.program.command)
        limits = {name: getattr(self, name) for name in ("max_steps", "max_prompt_tokens", "max_new_tokens")}
        return {"agent": agent, "judge": self.program.judge, **limits, "other_policy": self.settings.other_policy}

    @property
    def logprob_tolerance(self) -> float:
        return self.engine.logprob_tolerance

    @property
    def longest_episode(self) -> int:
        return self.max_steps

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.load_weights(weights, version)

    def counts(self) -> Counter[str]:
        """What became of processes (``EnvPool.counts``), calls (``gateway.settings.COUNTS``), sessions, and the engine's."""
        counts = self._counts.copy()
        counts.update(self._pool.counts if self._pool else {})
        counts.update(self._gateway.counts if self._gateway else {})
        counts.update(self.engine.counts())
        return counts

    def close(self) -> None:
        self._close_pool()
        self._close_gateway()
        self.engine.close()

    def tokenizer_texts(self, tasks: Sequence[Task]) -> list[str]:
        """What agents ask where every answer is empty."""
        bytewise = TinyPolicy()
        bytewise.build(list)
        self._open(bytewise, _NO_LIMIT)
        engine, self.engine = self.engine, _Silent(bytewise.tokenizer.eos_token_id)
        counts = self._counts.copy()
        try:
            played = list(itertools.chain.from_iterable(self.collect(groups_of(tasks), RolloutConfig("tokenizer", 0))))
        finally:
            self.engine = engine
            self._close_gateway()
            self._counts = counts
        texts = [bytewise.tokenizer.decode(step.prompt_ids) for episode in played for step in episode.steps]
        if not texts:
            raise RunError(f"no agent asked for a completion, so there is no text to make a tokenizer of: {played[0].error}")
        return texts

    def collect(self, groups: Sequence[Group], config: RolloutConfig) -> Iterator[list[Episode]]:
        if self._is_playing or self._gateway is None:
            raise RunError("AgentSource plays one call of collect at a time, once it is bound")
        count, seconds = self.num_parallel, (self.agent_timeout, None, self.start_timeout)
        self._pool = self._pool or EnvPool(self.program, count, count, *seconds)
        unfinished: dict[int, list[Episode]] = {group.id: [] for group in groups}
        sizes = {group.id: group.size for group in groups}
        places = [Place(config, group, sample) for group in groups for sample in range(group.size)]
        engine, over = EngineThread(self.engine, self._request_ids), Event()
        self._played = queue.SimpleQueue()
        self._is_playing, left = True, len(places)
        running = self._gateway.run(self._play(self._gateway, self._pool, engine, iter(places), config.version, over))
        try:
            while left:
                episode = self._played.get()
                if isinstance(episode, BaseException):
                    raise episode
                left -= 1
                done = unfinished[episode.group_id]
                done.append(episode)
                if len(done) == sizes[episode.group_id]:
                    yield sorted(done, key=lambda episode: episode.order)
        finally:
            self._is_playing = False
            if left:
                running.cancel()
            over.wait(_PATIENCE_S)
            engine.close([])
            if left:  # agents are under way that nobody waits for
                self._close_pool()
            self.engine.rest()

    # ---- in the gateway's loop ----

    async def _play(
        self, gateway: Gateway, pool: EnvPool, engine: EngineThread, places: Iterator[Place], version: int, over: Event
    ) -> None:
        """Plays all in as many slots as there are processes."""
        try:
            async with gateway.asker.asking(engine, version, self._played.put), asyncio.TaskGroup() as slots:
                for slot in range(self.num_parallel):
                    slots.create_task(self._play_in(slot, gateway, pool, places))
        except BaseExceptionGroup as errors:
            self._played.put(errors.exceptions[0])
        finally:
            over.set()

    async def _play_in(self, slot: int, gateway: Gateway, pool: EnvPool, places: Iterator[Place]) -> None:
        for place in places:
            session = gateway.open(place.id, partial(_seed, place), place.config.temperature)
            try:
                pool.reset(slot, place.group.task)
                reply = await pool.answer(slot)
                if not reply.error:
                    pool.step(slot, Action(text=json.dumps(self._surroundings(gateway, session))))
                    reply = await pool.answer(slot)
            finally:
                gateway.end(session)
            pool.release(slot)
            self._played.put(self._episode(place, session, reply))

    def _surroundings(self, gateway: Gateway, session: Session) -> dict[str, str]:
        """The agent's environment variables."""
        given = {"OPENAI_BASE_URL": gateway.base_url(session), "OPENAI_API_KEY": session.key}
        if self.program.judge is None:
            url = f"{gateway.address}/sessions/{session.id}/reward"
            given |= {"STEPPO_REWARD_URL": url, "STEPPO_REWARD_KEY": session.reward_key}
        return given

    def _episode(self, place: Place, session: Session, reply: EnvReply) -> Episode:
        worth = json.loads(reply.turn.text) if reply.turn else {"reward": None, "success": None}
        error = reply.error
        if not session.taken:
            asked = f"the last was refused: {session.refusal}" if session.refusal else "it must ask OPENAI_BASE_URL as given"
            reason = StopReason.ABORTED
            error = "; ".join(filter(None, ["the agent made no call that was answered", asked, error]))
        elif session.is_full:
            reason, error = StopReason.STEP_LIMIT, ""
        elif error and session.overflowed:
            reason, error = StopReason.CONTEXT_OVERFLOW, ""
        else:
            reason = StopReason.ABORTED if error else StopReason.TERMINATED
        self._counts["aborted_sessions"] += reason.failed
        reward = session.reward if worth["reward"] is None else worth["reward"]
        is_over = reason == StopReason.TERMINATED
        self._counts["unrewarded_sessions"] += is_over and reward is None and not session.is_rewarded
        success = session.success if worth["success"] is None else worth["success"]
        names = place.id, place.order, place.group.id, place.group.task.id
        return Episode(*names, session.steps(is_over), reason, success=success, error=error, final_reward=reward or 0.0)

    # ---- processes and the server ----

    def _open(self, policy: Policy, most_prompt_tokens: int) -> None:
        from steppo.gateway.server import Gateway
        from steppo.gateway.voice import Voices

        self._close_gateway()
        voices = Voices(self.renderer, self.parser)
        voices.bind(policy.tokenizer, policy.stop_ids)
        self._gateway = Gateway(self.settings, voices, self.max_steps, most_prompt_tokens, self.max_new_tokens)

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._counts.update(self._pool.counts)
            self._pool = None

    def _close_gateway(self) -> None:
        if self._gateway is not None:
            self._gateway.close()
            self._counts.update(self._gateway.counts)
            self._gateway = None


def _seed(place: Place, agent_id: str, step: int) -> int:
    """Of a step of a chain: the main one's are those of an environment's episode."""
    return place.seed(step if agent_id == MAIN else f"{agent_id}/{step}")


class _Silent(Engine):
    """Every answer is empty."""

    def __init__(self, stop_id: int) -> None:
        self._ids = np.asarray([stop_id], dtype=np.int32)
        self._asked: list[int] = []

    def submit(self, request: Request) -> None:
        self._asked.append(request.id)

    def poll(self) -> list[Completion]:
        asked, self._asked = self._asked, []
        return [Completion(id, self._ids, np.zeros(1, dtype=np.float32), "stop") for id in asked]
