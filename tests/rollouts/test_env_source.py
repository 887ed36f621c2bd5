"""EnvSource: what is recorded, how episodes end, and that slots, workers and batches change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from steppo import types
from steppo.engines import Engine, HFEngine, PlainEngine
from steppo.envs.pool import EnvPool, EnvReply
from steppo.errors import ConfigError, RunError
from steppo.metrics import EpisodeStatistics
from steppo.models import TinyPolicy
from steppo.rendering import ActionParser, AppendContext, ContextPolicy, HermesParser, ParsedAction, StateContext
from steppo.rollouts import EnvSource, Player, ScriptedPlayer, expert_action
from steppo.types import Action, Completion, Episode, Group, Request, RolloutConfig, StopReason, ToolCall, Turn
from tests.rendering.helpers import make_tokenizers
from tests.search_env import SearchEnv
from tests.toy_env import CorridorEnv, FaultyEnv
from tests.wrong_env import VerdictEnv

TASKS = CorridorEnv().tasks("train")
ENV_LIMIT = 8
PLAN = RolloutConfig("train/0", seed=3, version=7)
DEMONSTRATE = replace(PLAN, want_expert=True)

SourceMaker = Callable[..., EnvSource]


class AnyTextParser(ActionParser):
    """Reads a command into any text, and refuses about one text in five: random weights play, too."""

    def parse(self, text: str, turn: Turn) -> ParsedAction:
        number, commands = sum(text.encode()), turn.commands
        assert commands
        return ParsedAction(None, "Not now.") if number % 5 == 0 else ParsedAction(Action(commands[number % len(commands)]))


class ListeningEngine(Engine):
    """Passes everything on and keeps what was asked and answered, by session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._in_flight: dict[int, Request] = {}
        self.heard: dict[str, list[tuple[Request, Completion]]] = {}
        self.released: list[str] = []

    def bind(self, policy: Any) -> None:
        self._engine.bind(policy)

    def submit(self, request: Request) -> None:
        assert request.id not in self._in_flight
        self._in_flight[request.id] = request
        self._engine.submit(request)

    def poll(self) -> list[Completion]:
        completions = self._engine.poll()
        for completion in completions:
            request = self._in_flight.pop(completion.request_id)
            self.heard.setdefault(request.session_id, []).append((request, completion))
        return completions

    def release(self, session_id: str) -> None:
        self.released.append(session_id)


Choose = Callable[[Turn, Request], str | Action]


class ListeningPlayer(ScriptedPlayer):
    """Keeps what it was asked."""

    def __init__(self, choose: Choose, write: Callable[[Action], np.ndarray]) -> None:
        super().__init__(choose, write)
        self.heard: list[tuple[Request, Turn]] = []

    async def act(self, request: Request, turn: Turn) -> Completion:
        self.heard.append((request, turn))
        return await super().act(request, turn)


class ScriptedSource(EnvSource):
    """Played by a rule unless another player is given."""

    choose: Choose

    def collect(self, groups: Any, config: RolloutConfig, player: Player | None = None, *args: Any) -> Any:
        return super().collect(groups, config, player or ScriptedPlayer(self.choose, self.write), *args)


def wander(turn: Turn, request: Request) -> str:
    """Walks up and down at the left end and never takes anything."""
    commands = turn.commands
    assert commands
    return commands[0]


def dance(turn: Turn, request: Request) -> str:
    return "dance"


def first_dance(then: Choose) -> Choose:
    """One refused action in each episode, then another rule."""
    danced: set[str] = set()

    def choose(turn: Turn, request: Request) -> str | Action:
        if request.session_id in danced:
            return then(turn, request)
        danced.add(request.session_id)
        return "dance"

    return choose


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices are small here: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    """Corridors in eight slots of one process."""
    pool = EnvPool(CorridorEnv(max_steps=ENV_LIMIT), num_slots=8, num_workers=1, timeout_s=60.0)
    yield pool
    pool.close()


@pytest.fixture
def sharp_policy(tiny_policy: TinyPolicy) -> TinyPolicy:
    """In float64 and far from uniform: fresh weights hardly look at their prompt."""
    with torch.no_grad():
        tiny_policy.model.get_input_embeddings().weight.mul_(8)
    return tiny_policy.double()


@pytest.fixture
def make_source(pool: EnvPool, sharp_policy: TinyPolicy) -> Iterator[SourceMaker]:
    """Makes bound sources: scripted by a rule, or else the policy's own. They share ``pool`` unless sizes are given."""
    own: list[EnvSource] = []

    def make(
        choose: Choose | None = None,
        context: ContextPolicy | None = None,
        env: CorridorEnv | None = None,
        **settings: Any,
    ) -> EnvSource:
        context = context or StateContext()
        engine = settings.pop("engine", None) or HFEngine()
        parser = settings.pop("parser", None if choose else AnyTextParser())
        shares = env is None and "num_slots" not in settings
        settings = {"max_prompt_tokens": 512, "max_new_tokens": 3, "num_slots": 8} | settings
        kind = ScriptedSource if choose else EnvSource
        source = kind(env or CorridorEnv(max_steps=ENV_LIMIT), context, engine, parser, **settings)
        if isinstance(source, ScriptedSource):
            source.choose = choose  # type: ignore[assignment]
        if shares:
            source._pool = pool
        else:
            own.append(source)
        source.bind(sharp_policy)
        return source

    yield make
    for source in own:
        source.close()


def with_turn(reply: EnvReply, **fields: Any) -> EnvReply:
    assert reply.turn is not None
    return EnvReply(replace(reply.turn, **fields))


def groups_of(size: int, tasks: int = len(TASKS)) -> list[Group]:
    return types.groups_of(TASKS[:tasks], size)


def play(source: EnvSource, groups: Sequence[Group], config: RolloutConfig = PLAN) -> list[Episode]:
    """All episodes in logical order."""
    episodes = [episode for group in source.collect(groups, config) for episode in group]
    return sorted(episodes, key=lambda episode: episode.order)


def play_one(source: EnvSource, config: RolloutConfig = PLAN) -> Episode:
    [episode] = play(source, groups_of(1, tasks=1), config)
    return episode


def told(episode: Episode) -> dict[str, Any]:
    """All that an episode says, but for the numbers of its log-probabilities."""
    final = None if episode.final_prompt_ids is None else episode.final_prompt_ids.tolist()
    steps = [
        vars(step)
        | {"prompt_ids": step.prompt_ids.tolist(), "action_ids": step.action_ids.tolist(), "behaviour_logprobs": None}
        for step in episode.steps
    ]
    return vars(episode) | {"final_prompt_ids": final, "steps": steps}


def assert_same(episodes: Sequence[Episode], others: Sequence[Episode]) -> None:
    assert len(episodes) == len(others)
    for episode, other in zip(episodes, others, strict=True):
        assert told(episode) == told(other)
        for step, like in zip(episode.steps, other.steps, strict=True):
            np.testing.assert_allclose(step.behaviour_logprobs, like.behaviour_logprobs, atol=1e-5, rtol=0)


def text_of(source: EnvSource, ids: np.ndarray) -> str:
    return source.renderer.decode_action(ids)


# --- what is recorded ---


@pytest.mark.parametrize("context", [StateContext(max_past_actions=2), AppendContext()], ids=["state", "append"])
def test_steps_are_what_the_engine_saw_and_sampled(make_source: SourceMaker, context: ContextPolicy) -> None:
    engine = ListeningEngine(HFEngine())
    plan = replace(PLAN, temperature=0.7)
    episodes = play(make_source(context=context, engine=engine), groups_of(2), plan)
    assert {episode.id for episode in episodes} == set(engine.heard)
    assert sorted(engine.released) == sorted(engine.heard)
    for episode in episodes:
        heard = engine.heard[episode.id]
        assert [step.index for step in episode.steps] == list(range(len(heard)))
        for step, (request, completion) in zip(episode.steps, heard, strict=True):
            np.testing.assert_array_equal(step.prompt_ids, request.prompt_ids)
            np.testing.assert_array_equal(step.action_ids, completion.action_ids)
            np.testing.assert_array_equal(step.behaviour_logprobs, completion.logprobs)
            assert step.finish_reason == completion.finish_reason
            assert step.temperature == request.sampling.temperature == 0.7
            assert request.sampling.max_new_tokens == 3
            assert step.policy_version == 7
    requests = [request for heard in engine.heard.values() for request, _ in heard]
    assert len({request.seed for request in requests}) == len(requests)
    assert {step.finish_reason for episode in episodes for step in episode.steps} >= {"length"}


def test_the_winning_step_is_recorded_once_with_its_reward(make_source: SourceMaker) -> None:
    for task, episode in zip(TASKS, play(make_source(expert_action), groups_of(1), DEMONSTRATE), strict=True):
        way = abs(task.data["goal"] - task.data["start"])
        assert [step.action for step in episode.steps[:way]] == [episode.steps[0].action] * way
        assert episode.steps[0].action in ("left", "right")
        assert [step.action for step in episode.steps[way:]] == ["take"]
        assert [step.reward for step in episode.steps] == [0.0] * way + [1.0]
        assert [step.terminated for step in episode.steps] == [False] * way + [True]
        assert not any(step.truncated for step in episode.steps)
        assert all(step.action_valid for step in episode.steps)
        assert (episode.stop_reason, episode.success) == (StopReason.TERMINATED, True)
        assert episode.final_prompt_ids is None
        assert episode.steps[0].observation == f"You are in room {task.data['start']}."
        assert episode.steps[-1].observation == f"You are in room {task.data['goal']}."


# --- how episodes end ---


@pytest.mark.parametrize("max_steps", [None, ENV_LIMIT, ENV_LIMIT + 1])
def test_the_limit_of_the_task_terminates(make_source: SourceMaker, max_steps: int | None) -> None:
    episode = play_one(make_source(wander, max_steps=max_steps))
    assert (episode.stop_reason, episode.success) == (StopReason.TERMINATED, False)
    assert episode.final_prompt_ids is None
    assert [step.terminated for step in episode.steps] == [False] * (ENV_LIMIT - 1) + [True]
    assert not any(step.truncated for step in episode.steps)


def test_the_limit_of_the_rollout_truncates(make_source: SourceMaker) -> None:
    cut, longer = (play_one(make_source(wander, max_steps=limit)) for limit in (3, 4))
    assert (cut.stop_reason, cut.success) == (StopReason.STEP_LIMIT, False)
    assert [step.truncated for step in cut.steps] == [False, False, True]
    assert not any(step.terminated for step in cut.steps)
    assert cut.final_prompt_ids is not None
    np.testing.assert_array_equal(cut.final_prompt_ids, longer.steps[3].prompt_ids)


def test_winning_with_the_last_step_terminates(make_source: SourceMaker) -> None:
    steps = len(play_one(make_source(expert_action), DEMONSTRATE).steps)
    episode = play_one(make_source(expert_action, max_steps=steps), DEMONSTRATE)
    assert (episode.stop_reason, episode.success) == (StopReason.TERMINATED, True)
    assert episode.final_prompt_ids is None
    assert not episode.steps[-1].truncated


def test_an_environment_may_truncate(make_source: SourceMaker, pool: EnvPool, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, received = pool.answer, []

    async def cut_the_third(slot: int) -> EnvReply:
        received.append(await answer(slot))
        return with_turn(received[-1], truncated=len(received) == 3)  # the first answers the reset

    monkeypatch.setattr(pool, "answer", cut_the_third)
    cut = play_one(make_source(wander))
    monkeypatch.undo()
    assert cut.stop_reason == StopReason.STEP_LIMIT
    assert [step.truncated for step in cut.steps] == [False, True]
    assert cut.final_prompt_ids is not None
    np.testing.assert_array_equal(cut.final_prompt_ids, play_one(make_source(wander)).steps[2].prompt_ids)


def test_a_context_that_overflows_ends_the_episode(make_source: SourceMaker) -> None:
    whole = play_one(make_source(wander, AppendContext()))
    third = len(whole.steps[2].prompt_ids)
    assert len(whole.steps[1].prompt_ids) < third < len(whole.steps[3].prompt_ids)

    cut = play_one(make_source(wander, AppendContext(), max_prompt_tokens=third - 1))
    assert cut.stop_reason == StopReason.CONTEXT_OVERFLOW
    assert [step.truncated for step in cut.steps] == [False, True]
    assert not any(step.terminated for step in cut.steps)
    assert cut.final_prompt_ids is None
    assert len(play_one(make_source(wander, AppendContext(), max_prompt_tokens=third)).steps) == 3

    limited = play_one(make_source(wander, AppendContext(), max_prompt_tokens=third - 1, max_steps=2))
    assert (limited.stop_reason, limited.final_prompt_ids) == (StopReason.STEP_LIMIT, None)


def test_a_first_prompt_that_overflows_gives_no_step(make_source: SourceMaker) -> None:
    engine = ListeningEngine(HFEngine())
    source = make_source(engine=engine, max_prompt_tokens=5)
    groups = list(source.collect(groups_of(2), PLAN))
    assert [len(group) for group in groups] == [2] * len(TASKS)
    for episode in (episode for group in groups for episode in group):
        assert (episode.stop_reason, episode.steps) == (StopReason.CONTEXT_OVERFLOW, ())
        assert (episode.final_prompt_ids, episode.success) == (None, False)
    assert engine.heard == {}


# --- refused actions ---


def test_refused_actions_cost_and_are_explained(make_source: SourceMaker) -> None:
    source = make_source(first_dance(expert_action), invalid_penalty=0.25)
    why = "'dance' is not possible here."
    for episode in play(source, groups_of(1), DEMONSTRATE):
        refused, *others = episode.steps
        assert (refused.action, refused.action_valid, refused.reward) == ("dance", False, -0.25)
        assert others[0].observation == refused.observation, "the environment stays as it is"
        assert [why in text_of(source, step.prompt_ids) for step in episode.steps] == [
            False,
            True,
            *[False] * (len(others) - 1),
        ]
        assert [step.reward for step in others] == [0.0] * (len(others) - 1) + [1.0]
        assert all(step.action_valid for step in others)
        assert episode.success


def test_a_refused_action_may_end_the_episode(make_source: SourceMaker) -> None:
    source = make_source(dance, invalid_penalty=0.25, on_invalid="end")
    for episode in play(source, groups_of(1)):
        [step] = episode.steps
        assert (step.action, step.action_valid, step.reward) == ("dance", False, -0.25)
        assert (step.terminated, step.truncated) == (True, False)
        assert (episode.stop_reason, episode.success) == (StopReason.TERMINATED, False)
        assert episode.final_prompt_ids is None
    assert all(episode.success for episode in play(make_source(expert_action, on_invalid="end"), groups_of(1), DEMONSTRATE))


@pytest.mark.parametrize("on_invalid", ["continue", "end"])
def test_an_environment_may_call_an_action_invalid(
    on_invalid: str, make_source: SourceMaker, pool: EnvPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where commands are hidden the parser cannot know."""
    answer = pool.answer

    async def unknown(slot: int) -> EnvReply:
        reply = await answer(slot)
        invalid = reply.turn is not None and reply.turn.text == "There is no coin here."
        return with_turn(reply, action_valid=not invalid)

    monkeypatch.setattr(pool, "answer", unknown)
    source = make_source(lambda turn, request: "take", invalid_penalty=0.25, on_invalid=on_invalid)
    episode = play_one(source)
    assert len(episode.steps) == (1 if on_invalid == "end" else ENV_LIMIT)
    assert [(step.action_valid, step.reward) for step in episode.steps] == [(False, -0.25)] * len(episode.steps)
    assert (episode.stop_reason, episode.success) == (StopReason.TERMINATED, False)


@pytest.mark.parametrize(("choose", "refused"), [(dance, ENV_LIMIT), (first_dance(wander), 1)], ids=["all", "one"])
def test_refused_actions_use_up_the_limit_of_the_task(make_source: SourceMaker, choose: Choose, refused: int) -> None:
    episode = play_one(make_source(choose, invalid_penalty=0.25))
    assert [step.action_valid for step in episode.steps] == [False] * refused + [True] * (ENV_LIMIT - refused)
    assert [step.terminated for step in episode.steps] == [False] * (ENV_LIMIT - 1) + [True]
    assert (episode.stop_reason, bool(episode.success)) == (StopReason.TERMINATED, False)
    assert episode.final_prompt_ids is None
    assert episode.episode_return == -0.25 * refused


def test_refused_actions_use_up_the_limit_of_the_rollout(make_source: SourceMaker) -> None:
    episode = play_one(make_source(dance, max_steps=2))
    assert (len(episode.steps), episode.stop_reason) == (2, StopReason.STEP_LIMIT)
    assert episode.final_prompt_ids is not None


# --- groups ---


def test_groups_come_out_whole_and_sorted(make_source: SourceMaker) -> None:
    groups = [Group(number, TASKS[number], 3, first=3 * number) for number in (1, 4, 6, 7)]  # one rank's share
    found = list(make_source().collect(groups, PLAN))
    assert sorted(episodes[0].group_id for episodes in found) == [1, 4, 6, 7]
    for episodes in found:
        number = episodes[0].group_id
        assert [episode.order for episode in episodes] == [3 * number, 3 * number + 1, 3 * number + 2]
        assert {episode.group_id for episode in episodes} == {number}
        assert {episode.task_id for episode in episodes} == {TASKS[number].id}
        sampled = {tuple(step.action_ids.tolist()) for episode in episodes for step in episode.steps[:1]}
        assert len(sampled) == 3, "samples differ from the first action on"
        assert len({tuple(episode.steps[0].prompt_ids.tolist()) for episode in episodes}) == 1
    ids = [episode.id for episodes in found for episode in episodes]
    assert len(set(ids)) == len(ids) == 12


# --- what does not matter, and what does ---


def test_slots_workers_and_batches_do_not_matter(make_source: SourceMaker) -> None:
    groups = groups_of(5)
    expected = play(make_source(), groups)
    assert {episode.success for episode in expected} == {True, False}
    assert {step.action_valid for episode in expected for step in episode.steps} == {True, False}
    assert len({len(episode.steps) for episode in expected}) > 3, "slots should be refilled at different times"
    assert_same(play(make_source(engine=HFEngine(max_batch_size=3)), groups), expected)
    assert_same(play(make_source(num_slots=32, num_workers=2), groups), expected)
    assert_same(play(make_source(num_slots=3, num_workers=2, engine=HFEngine(max_batch_size=1)), groups), expected)
    assert_same(play(make_source(engine=HFEngine(max_batch_size=1), env_ticks=50), groups), expected)
    assert_same(play(make_source(env_ticks=0), groups), expected)
    assert_same(play(make_source(), groups[::-1]), expected)


def test_the_seed_and_the_name_of_the_round_matter(make_source: SourceMaker) -> None:
    source = make_source()
    first, again, seeded, named = (
        play(source, groups_of(1), plan) for plan in (PLAN, PLAN, replace(PLAN, seed=4), replace(PLAN, name="train/1"))
    )
    assert_same(first, again)
    for others in (seeded, named):
        for episode, other in zip(first, others, strict=True):
            assert [step.action_ids.tolist() for step in episode.steps] != [step.action_ids.tolist() for step in other.steps]


def test_greedy_episodes_do_not_depend_on_the_seed(make_source: SourceMaker) -> None:
    greedy = replace(PLAN, temperature=0.0)
    source = make_source()
    assert_same(play(source, groups_of(1), greedy), play(source, groups_of(1), replace(greedy, seed=4)))


def test_an_abandoned_round_leaves_nothing_behind(make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stops listening (an exception, an interrupt) may play again with the same source. The engine rests after each."""
    rests: list[None] = []
    source = make_source(wander, num_slots=4)
    monkeypatch.setattr(source.engine, "rest", lambda: rests.append(None))
    expected = play(source, groups_of(1))
    abandoned = source.collect(groups_of(2), PLAN)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert len(rests) == 2
    assert_same(play(source, groups_of(1)), expected)


# --- failures are data ---


def test_one_round_at_a_time(make_source: SourceMaker) -> None:
    """Two would share slots, and each play other episodes than alone."""
    source = make_source(num_slots=2)
    alone = [episode.id for episode in play(source, groups_of(2))]
    rounds = source.collect(groups_of(2), PLAN)
    first = next(rounds)
    with pytest.raises(RunError, match="one call of collect at a time"):
        next(source.collect(groups_of(1), PLAN))
    assert [episode.id for group in [first, *rounds] for episode in group] == alone
    assert len(play(source, groups_of(2))) == len(alone)
    next(source.collect(groups_of(2), PLAN))  # left
    assert len(play(source, groups_of(2))) == len(alone)


def test_environments_that_break_cost_their_own_episodes_only(make_source: SourceMaker) -> None:
    raises, dies = TASKS[2].id, TASKS[5].id
    groups = groups_of(2)
    healthy = play(make_source(), groups)
    source = make_source(env=FaultyEnv(fail_tasks=[raises], die_tasks=[dies]))
    found = list(source.collect(groups, PLAN))
    assert [len(group) for group in found] == [2] * len(groups)
    episodes = sorted((episode for group in found for episode in group), key=lambda episode: episode.order)

    broken = [episode for episode in episodes if episode.task_id in (raises, dies)]
    assert {episode.stop_reason for episode in broken} == {StopReason.ENV_ERROR}
    for episode in broken:
        assert ("broken on purpose" if episode.task_id == raises else "died") in episode.error
        assert episode.final_prompt_ids is None
        assert not any(step.terminated for step in episode.steps)
    others = [[episode for episode in run if episode.task_id not in (raises, dies)] for run in (episodes, healthy)]
    assert len(others[0]) == 2 * (len(TASKS) - 2)
    assert_same(*others)

    statistics = EpisodeStatistics()
    for episode in episodes:
        statistics.update(episode)
    assert (statistics.compute()["errors"], statistics.compute()["episodes"]) == (4, len(episodes) - 4)


def test_a_player_that_raises_costs_its_own_episode_only(make_source: SourceMaker) -> None:
    groups = groups_of(3)
    healthy = play(make_source(wander), groups)
    victim = healthy[4]
    third_prompt = victim.steps[2].prompt_ids.tolist()

    def choose(turn: Turn, request: Request) -> str | Action:
        if request.session_id == victim.id and request.prompt_ids.tolist() == third_prompt:
            raise MemoryError("no room for the cache")
        return wander(turn, request)

    episodes = play(make_source(choose), groups)
    failed = episodes.pop(4)
    assert (failed.id, failed.stop_reason) == (victim.id, StopReason.ENGINE_ERROR)
    assert failed.error == "MemoryError: no room for the cache"
    assert [step.action for step in failed.steps] == [step.action for step in victim.steps[:2]]
    assert [step.truncated for step in failed.steps] == [False, True]
    assert failed.final_prompt_ids is None
    del healthy[4]
    assert_same(episodes, healthy)


class BrokenEngine(PlainEngine):
    """Raises in some polls, counted from 0, and keeps what it answers too late."""

    def __init__(self, *raises: int) -> None:
        super().__init__()
        self.raises = raises
        self.polls = 0
        self.late: list[int] = []
        self.lost: list[int] = []
        self._lost: list[int] = []

    def poll(self) -> list[Completion]:
        self.polls += 1
        if self.polls - 1 in self.raises:
            self.lost.append(len(self._queue))
            self._lost += [request.id for request in self._queue]
            raise ConnectionError("the server went away")
        completions = super().poll()
        self.late += [completion.request_id for completion in completions if completion.request_id in self._lost]
        return completions

    def release(self, session_id: str) -> None:
        """Forgets nothing."""


def test_an_engine_that_raises_costs_the_episodes_that_waited(make_source: SourceMaker) -> None:
    """What it answers later, to requests of episodes that are over, is no answer to a new one."""
    groups = groups_of(3)
    healthy = play(make_source(), groups)
    engine = BrokenEngine(3, 8)
    source = make_source(engine=engine)
    episodes = play(source, groups)
    failed = [episode for episode in episodes if episode.stop_reason.failed]
    assert len(engine.late) == len(failed) == sum(engine.lost) > 0
    assert max(engine.lost) < 8, "some slots waited for their environments"
    for episode in failed:
        assert episode.stop_reason == StopReason.ENGINE_ERROR
        assert episode.error == "ConnectionError: the server went away"
        assert episode.final_prompt_ids is None
    kept = {episode.order for episode in episodes if not episode.stop_reason.failed}
    assert_same(*[[episode for episode in run if episode.order in kept] for run in (episodes, healthy)])
    assert_same(play(source, groups), healthy)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", ["poll", "submit", "silence"])
def test_an_engine_that_always_fails_comes_to_an_end(
    fault: str, make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source()

    def broken(*args: Any) -> Any:
        raise ValueError("no engine")

    monkeypatch.setattr(source.engine, *{"silence": ("poll", lambda: [])}.get(fault, (fault, broken)))
    episodes = play(source, groups_of(3))
    assert len(episodes) == 3 * len(TASKS)
    assert {episode.stop_reason for episode in episodes} == {StopReason.ENGINE_ERROR}
    [error] = {episode.error for episode in episodes}
    assert error == ("RuntimeError: the engine gave no answer" if fault == "silence" else "ValueError: no engine")


@pytest.mark.parametrize("error", [ConfigError("a mistake"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("where", ["poll", "submit", "release"])
def test_mistakes_and_interrupts_end_the_run(
    error: BaseException, where: str, make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(num_slots=1)

    def stop(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(source.engine, where, stop)
    with pytest.raises(type(error)):
        play_one(source)


def test_a_session_that_cannot_be_released_costs_nothing(make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source()
    expected = play(source, groups_of(1))

    def broken(session_id: str) -> None:
        raise ConnectionError("the server went away")

    monkeypatch.setattr(source.engine, "release", broken)
    with pytest.warns(UserWarning, match="could not release an episode: ConnectionError: the server went away"):
        assert_same(play(source, groups_of(1)), expected)


@pytest.mark.parametrize("part", ["parser", "context"])
def test_what_cannot_be_read_or_rendered_costs_its_episode(
    part: str, make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(wander)
    healthy = play(source, groups_of(1))
    owner, name = {"parser": (source.parser, "parse"), "context": (source.context, "prompt_ids")}[part]
    whole, calls = getattr(owner, name), []

    def break_once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 20:
            raise UnicodeError("what is this?")
        return whole(*args)

    monkeypatch.setattr(owner, name, break_once)
    episodes = play(source, groups_of(1))
    [failed] = [episode for episode in episodes if episode.stop_reason.failed]
    assert (failed.stop_reason, failed.error) == (StopReason.ABORTED, "UnicodeError: what is this?")
    assert_same(*[[episode for episode in run if episode.id != failed.id] for run in (episodes, healthy)])


IDS: dict[str, tuple[Any, str]] = {
    "empty": (np.zeros(0, dtype=np.int32), "gave an empty prompt"),
    "empty of another kind": (np.zeros(0), "must give a one-dimensional array of integers, not shape (0,) of float64"),
    "floats": (np.ones(3), "must give a one-dimensional array of integers, not shape (3,) of float64"),
    "booleans": (np.ones(3, dtype=bool), "not shape (3,) of bool"),
    "rows": (np.ones((1, 3), dtype=np.int32), "not shape (1, 3) of int32"),
    "number": (np.array(3), "not shape () of int64"),
    "list": ([1, 2, 3], "not a list"),
    "text": ("a prompt", "not 'a prompt'"),
    "none": (None, "not None"),
    "tensor": (torch.ones(3, dtype=torch.int64), "not a Tensor"),
    "negative": (np.array([1, -1]), "gave the token id -1, which is none of the model's"),
    "too large": (np.array([1, 10**6]), "gave the token id 1000000, which is none of the model's"),
    "wrapped": (np.array([2**32 + 1]), "gave the token id 4294967297, which is none of the model's"),
}


def _calls(*calls: Any) -> ParsedAction:
    return ParsedAction(Action(tool_calls=calls))


PARSED: dict[str, tuple[Any, str]] = {
    "none": (None, "parse must give a ParsedAction, not None"),
    "text": ("left", "parse must give a ParsedAction, not 'left'"),
    "tuple": (("left", ""), "parse must give a ParsedAction, not a tuple"),
    "number": (ParsedAction(7), "the action of CommandParser.parse must be an Action, not 7"),  # type: ignore[arg-type]
    "command": (ParsedAction("left"), "must be an Action, not 'left'"),  # type: ignore[arg-type]
    "bytes": (ParsedAction(Action(b"left")), "the command of CommandParser.parse must be a string"),  # type: ignore[arg-type]
    "surrogate": (ParsedAction(Action("\ud800")), "the command of CommandParser.parse must be text that UTF-8 can hold"),
    "words": (ParsedAction(Action(text="\ud800")), "the text of CommandParser.parse must be text that UTF-8 can hold"),
    "thoughts": (ParsedAction(Action(reasoning=7)), "the reasoning of CommandParser.parse must be"),  # type: ignore[arg-type]
    "no calls": (ParsedAction(Action(tool_calls=None)), "must be a list or tuple of ToolCall, not None"),  # type: ignore[arg-type]
    "a call's text": (_calls("find()"), "the class of tool call 1 of CommandParser.parse must be ToolCall: it is 'find()'"),
    "a call's name": (_calls(ToolCall("find"), ToolCall(7)), "the name of tool call 2 of CommandParser.parse must"),  # type: ignore[arg-type]
    "a call's list": (_calls(ToolCall("find", ["it"])), "must be a mapping, not a list"),  # type: ignore[arg-type]
    "a call's function": (_calls(ToolCall("find", {"what": print})), "cannot be written as JSON: TypeError: "),
    "a call's number": (_calls(ToolCall("find", {"most": math.nan})), "cannot be written as JSON: ValueError: "),
    "a call's digits": (_calls(ToolCall("find", {"most": 10**5000})), "cannot be written as JSON: ValueError: "),
    "a call's letter": (
        _calls(ToolCall("find", {"what": ["\ud800"]})),
        "cannot be written as JSON: their text must be text",
    ),
    "feedback": (ParsedAction(None, None), "the feedback of CommandParser.parse must be a string"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("last", [False, True], ids=["a prompt", "a final prompt"])
@pytest.mark.parametrize("name", IDS)
def test_a_prompt_that_is_none_costs_its_episode(
    name: str, last: bool, make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that after the last step of an episode that is cut, whose value an advantage may ask for."""
    ids, message = IDS[name]
    source = make_source(wander, max_steps=2)
    whole = source.context.prompt_ids

    def break_one(turns: Sequence[Turn], steps: Sequence[Any]) -> Any:
        wrong = turns[0].goal == "Take the coin in room 1." and len(steps) == (2 if last else 1)
        return ids if wrong else whole(turns, steps)

    monkeypatch.setattr(source.context, "prompt_ids", break_one)
    episodes = play(source, groups_of(1))
    hit = {task.id for task in TASKS if task.data["goal"] == 1}
    assert 0 < len(hit) < len(TASKS)
    assert {episode.task_id for episode in episodes if episode.stop_reason.failed} == hit
    for episode in episodes:
        assert episode.stop_reason == (StopReason.ABORTED if episode.task_id in hit else StopReason.STEP_LIMIT)
        assert episode.error.startswith("StateContext.prompt_ids ") == (episode.task_id in hit)
        assert (message in episode.error) == (episode.task_id in hit)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_prompts_of_any_integers_are_taken(kind: type, make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(wander)
    monkeypatch.setattr(source.context, "prompt_ids", lambda turns, steps: np.arange(2, 9, dtype=kind))
    for episode in play(source, groups_of(1, tasks=2)):
        assert {step.prompt_ids.dtype for step in episode.steps} == {np.dtype(np.int32)}


@pytest.mark.parametrize("draws", [1, 3])
def test_a_parser_that_raises_is_not_the_engine_s_fault(
    draws: int, make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where answers are read to see whether the policy must be asked again."""
    source = make_source(draws=draws)

    def broken(text: str, turn: Turn) -> Any:
        raise UnicodeError("what is this?")

    monkeypatch.setattr(source.parser, "parse", broken)
    for episode in play(source, groups_of(1)):
        assert (episode.stop_reason, episode.error) == (StopReason.ABORTED, "UnicodeError: what is this?")


@pytest.mark.parametrize("name", PARSED)
def test_an_action_that_is_none_costs_its_episode(
    name: str, make_source: SourceMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, message = PARSED[name]
    source = make_source(wander)
    whole = source.parser.parse

    def break_one(text: str, turn: Turn) -> Any:
        return parsed if turn.goal == "Take the coin in room 1." else whole(text, turn)

    monkeypatch.setattr(source.parser, "parse", break_one)
    failed = [episode for episode in play(source, groups_of(1)) if episode.stop_reason.failed]
    assert {episode.task_id for episode in failed} == {task.id for task in TASKS if task.data["goal"] == 1}
    for episode in failed:
        assert episode.stop_reason == StopReason.ABORTED
        assert message in episode.error


@pytest.mark.parametrize("on_invalid", ["continue", "end"])
@pytest.mark.parametrize("choose", [dance, first_dance(wander), wander], ids=["all refused", "one refused", "none refused"])
def test_a_refused_action_does_not_overrule_the_environment(
    on_invalid: str, choose: Choose, make_source: SourceMaker
) -> None:
    env = VerdictEnv()
    tasks = env.tasks("train")
    source = make_source(choose, env=env, on_invalid=on_invalid, num_slots=3)
    episodes = play(source, [Group(number, task, 1, first=number) for number, task in enumerate(tasks)])
    assert [(episode.task_id, episode.success) for episode in episodes] == [("None", None), ("True", True), ("False", False)]


def test_workers_are_counted_also_after_their_pool_is_closed(make_source: SourceMaker) -> None:
    source = make_source(wander, env=FaultyEnv(die_tasks=[TASKS[1].id]))
    play(source, groups_of(1))
    expected = {"replaced_workers": 1, "env_timeouts": 0, "recycled_workers": 0}
    assert source.counts() == expected
    source.close()
    assert source.counts() == expected
    play(source, groups_of(1))
    assert source.counts() == {**expected, "replaced_workers": 2}


# --- mistakes in the config ---


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 0}, {"max_prompt_tokens": 0}, {"max_new_tokens": 0}, {"num_slots": 0}, {"num_workers": -1}],
    ids=lambda settings: next(iter(settings)),
)
def test_sizes_must_be_positive(settings: dict[str, int]) -> None:
    [(name, value)] = settings.items()
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not {value}"):
        EnvSource(CorridorEnv(), StateContext(), HFEngine(), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["env_timeout", "worker_memory_mib"])
def test_limits_of_workers_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be"):
        EnvSource(CorridorEnv(), StateContext(), HFEngine(), **{name: 0})  # type: ignore[arg-type]


def test_some_step_limit_is_needed() -> None:
    env = CorridorEnv()
    env.max_steps = None
    with pytest.raises(ConfigError, match="CorridorEnv has no step limit, so max_steps must be given"):
        EnvSource(env, StateContext(), HFEngine())
    EnvSource(env, StateContext(), HFEngine(), max_steps=5)


def test_prompt_and_action_must_fit_the_model(tiny_policy: TinyPolicy) -> None:
    room = tiny_policy.max_positions - 6
    EnvSource(CorridorEnv(), StateContext(), HFEngine(), max_prompt_tokens=room, max_new_tokens=6).bind(tiny_policy)
    source = EnvSource(CorridorEnv(), StateContext(), HFEngine(), max_prompt_tokens=room, max_new_tokens=7)
    with pytest.raises(ConfigError, match="= 1025 is more than the model's 1024 positions"):
        source.bind(tiny_policy)


# --- demonstrations and texts ---


def test_demonstrations_are_played_by_another_player(make_source: SourceMaker) -> None:
    """Prompts are those of play without an expert, whose advice no prompt shows. No engine hears of them."""
    engine = ListeningEngine(HFEngine())
    source = make_source(parser=None, engine=engine)
    played = {}
    for want_expert in (True, False):
        player = ListeningPlayer(expert_action if want_expert else wander, source.write)
        plan = replace(PLAN, want_expert=want_expert)
        played[want_expert] = [group[0] for group in source.collect(groups_of(1), plan, player)]
        assert {turn.expert_action is not None for _, turn in player.heard} == {want_expert}
        steps = [step for episode in played[want_expert] for step in episode.steps]
        assert {(request.session_id, tuple(request.prompt_ids), turn.text) for request, turn in player.heard} == {
            (episode.id, tuple(step.prompt_ids), step.observation)
            for episode in played[want_expert]
            for step in episode.steps
        }
        assert len(player.heard) == len(steps)
    assert (engine.heard, engine.released) == ({}, [])
    assert all(episode.success for episode in played[True])
    assert all(episode.episode_return == 1.0 for episode in played[True])
    first_prompts = [
        {episode.task_id: episode.steps[0].prompt_ids.tolist() for episode in episodes} for episodes in played.values()
    ]
    assert first_prompts[0] == first_prompts[1]


def test_corpus_is_what_there_is_to_read(make_source: SourceMaker) -> None:
    source = make_source()
    before = play(source, groups_of(1))
    texts = source.tokenizer_texts(TASKS)
    assert texts == source.tokenizer_texts(TASKS)
    everything = "\n".join(texts)
    for task in TASKS:
        assert f"Take the coin in room {task.data['goal']}." in everything
        assert f"You are in room {task.data['start']}." in everything
    for commands in ("left, take", "right, take", "left, right, take"):
        assert f"Commands: {commands}" in everything
    assert {text for text in texts if text.startswith("Done: ")} == {"Done: left", "Done: right", "Done: take"}
    assert len(texts) <= 2 * ENV_LIMIT * len(TASKS)
    assert_same(play(source, groups_of(1)), before)


def test_corpus_keeps_to_the_limit_of_the_rollout(make_source: SourceMaker) -> None:
    assert len(make_source(max_steps=1).tokenizer_texts(TASKS[:3])) == 2 * 3


def test_a_task_that_breaks_adds_what_could_be_read(make_source: SourceMaker) -> None:
    source = make_source(env=FaultyEnv(fail_tasks=[TASKS[1].id]))
    healthy, broken = (f"Take the coin in room {task.data['goal']}." for task in TASKS[:2])
    texts = source.tokenizer_texts(TASKS[:2])
    assert len([text for text in texts if text.startswith(broken)]) == 2, "the opening, and what the first step showed"
    assert len([text for text in texts if text.startswith(healthy)]) > 2
    assert_same(play(source, groups_of(1, tasks=1)), play(make_source(), groups_of(1, tasks=1)))


class SilentParser(HermesParser):
    """Does not say what there is to call."""

    def tools_text(self, tools: Sequence[types.ToolSpec]) -> str:
        return ""


def test_tools_that_no_prompt_would_show_are_a_mistake() -> None:
    source = EnvSource(SearchEnv(), AppendContext(), HFEngine(), SilentParser())
    for name, tokenizer in make_tokenizers().items():
        if name in ("qwen3", "thinking"):  # they know tools; one writes no calls
            continue
        with pytest.raises(ConfigError, match=r"SilentParser.tools_text must say"):
            source.bind_tokenizer(tokenizer, {tokenizer.eos_token_id})
    tokenizer = make_tokenizers()["qwen3"]
    source.bind_tokenizer(tokenizer, {tokenizer.eos_token_id})
    prompt = source.context.prompt_ids([Turn("?")], [])
    assert "Finds documents by their words." in source.renderer.decode_action(prompt)
