"""One episode, from top to bottom. Who plays it decides when its questions are answered (``scheduler.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np

from steppo.envs.checks import EnvReply
from steppo.errors import SteppoError, said
from steppo.rollouts.place import Place
from steppo.rollouts.players import Player
from steppo.rollouts.rules import Rules
from steppo.types import Action, Episode, Request, Step, StopReason, Task, Turn

OnStep = Callable[[Step | None, Turn], None]


class AwaitedEnv(Protocol):
    """An environment that is waited for."""

    async def reset(self, task: Task, want_expert: bool) -> EnvReply: ...

    async def step(self, action: Action) -> EnvReply: ...


class _Broken(Exception):
    """The episode cannot go on: stop reason, error."""


@contextmanager
def _costs_the_episode(reason: StopReason) -> Iterator[None]:
    """What raises in here does not cost the run; only a ``SteppoError`` still ends it."""
    try:
        yield
    except SteppoError:
        raise
    except Exception as error:
        raise _Broken(reason, said(error)) from error


async def play_episode(rules: Rules, place: Place, env: AwaitedEnv, player: Player, on_step: OnStep | None) -> Episode:
    """Plays one episode. ``on_step`` is called with each step (none at the start) and the turn after it."""
    config, task = place.config, place.group.task
    turns, steps = list[Turn](), list[Step]()
    success: bool | None = None
    opening: Mapping[str, str | float | bool] = {}

    def ended(reason: StopReason, error: str = "", final_prompt_ids: np.ndarray | None = None) -> Episode:
        if steps and reason != StopReason.TERMINATED:
            steps[-1] = replace(steps[-1], truncated=True)
        names = place.id, place.order, place.group.id, task.id
        return Episode(*names, tuple(steps), reason, final_prompt_ids, success, error, metadata=opening)

    try:
        turn = rules.answered(_given(await env.reset(task, config.want_expert)))
        opening = turn.info
        while True:
            success = success if turn.success is None else turn.success
            if on_step is not None:
                on_step(steps[-1] if steps else None, turn)
            if turn.terminated:
                return ended(StopReason.TERMINATED)

            # the state
            turns.append(turn)
            with _costs_the_episode(StopReason.ABORTED):
                prompt_ids = rules.prompt(turns, steps)
            fits = len(prompt_ids) <= rules.max_prompt_tokens
            if turn.truncated or len(steps) == rules.max_steps:
                return ended(StopReason.STEP_LIMIT, final_prompt_ids=prompt_ids if fits else None)
            if not fits:
                return ended(StopReason.CONTEXT_OVERFLOW)

            # the action
            request = Request(0, place.id, prompt_ids, rules.sampling, place.seed(len(steps)))
            with _costs_the_episode(StopReason.ENGINE_ERROR):
                completion = await player.act(request, turn)
            if completion.error or not len(completion.action_ids):
                raise _Broken(StopReason.ENGINE_ERROR, completion.error or "the engine gave an action without a token")
            with _costs_the_episode(StopReason.ABORTED):
                text = rules.context.renderer.decode_action(completion.action_ids)
                parsed = rules.parsed(text, turn)

            # what it brings; after one that is refused the environment stays as it is, solved or not
            before = turn
            if (action := parsed.action) is None:
                turn = before.refused(parsed.feedback)
            else:
                turn = rules.answered(_given(await env.step(action)), before)
            turn = rules.judged(turn, len(steps) + 1)
            steps.append(
                Step(
                    prompt_ids,
                    completion.action_ids,
                    completion.logprobs,
                    turn.reward,
                    len(steps),
                    completion.finish_reason,
                    turn.terminated,
                    truncated=False,
                    action_valid=turn.action_valid,
                    observation=before.observation,
                    action=text.strip() if action is None else str(action),
                    temperature=config.temperature,
                    policy_version=config.version,
                    metadata=turn.info,
                    state_key=before.state_key,
                )
            )
    except _Broken as broken:
        return ended(*broken.args)


def _given(reply: EnvReply) -> Turn:
    if reply.turn is None:
        raise _Broken(StopReason.ENV_ERROR, reply.error)
    return reply.turn
