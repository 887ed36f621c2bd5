"""Fixtures that several test files share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch

from steppo.cli import SteppoCLI
from steppo.envs import TextWorldEnv
from steppo.models import TinyPolicy
from steppo.rendering import StateContext
from tests.cli_helpers import run
from tests.toy_env import CorridorEnv

T = TypeVar("T")

torch.set_num_threads(1)  # small models; and the number is part of what makes results repeatable


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Lightning's launcher leaves its rank in the environment: a later test's processes would wait for others to start."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def textworld_env(tmp_path_factory: pytest.TempPathFactory) -> TextWorldEnv:
    """A few coin_collector games, compiled. Play them in an ``EnvPool`` only."""
    env = TextWorldEnv(
        "coin_collector",
        {"level": 2},
        num_train=4,
        num_valid=2,
        num_test=2,
        max_steps=6,
        exclude_commands=["examine", "inventory", "look"],
        description="brief",
        cache_dir=str(tmp_path_factory.mktemp("games")),
    )
    tasks = [task for split in ("train", "valid", "test") for task in env.tasks(split)]
    env.prepare(tasks, lambda done, total: None)
    return env


def corridor_texts() -> list[str]:
    """What there is to read in a corridor: each task's opening and its expert's way."""
    env, context = CorridorEnv(), StateContext()
    texts = [context.instructions]
    for task in env.tasks("train"):
        turn = env.reset(task)
        while not turn.terminated:
            action = env.expert_action() or ""
            texts += [context.render_observation(turn), "Done: " + action]
            turn = env.command(action)
    return texts


@pytest.fixture
def tiny_policy() -> TinyPolicy:
    """A float32 policy with random weights and a tokenizer of the corridor's words."""
    policy = TinyPolicy(hidden_size=32, seed=0)
    policy.build(corridor_texts)
    return policy


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SteppoCLI, Path]:
    """A short run of ``toy.yaml``, and its folder. Its policy is the one of the newest checkpoint."""
    folder = tmp_path_factory.mktemp("toy_run")
    return run(folder), folder


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs ``work(rank)`` in one thread per rank, whose collectives meet at a barrier; gives what each returned."""

    def run(world: int, work: Callable[[int], T]) -> list[T]:
        here = threading.local()
        barrier = threading.Barrier(world, timeout=20)
        table: list[Any] = [None] * world

        def gather(item: Any) -> list[Any]:
            table[here.rank] = item
            barrier.wait()
            items = list(table)
            barrier.wait()
            return items

        def start(rank: int) -> T:
            here.rank = rank
            return work(rank)

        with monkeypatch.context() as patched, ThreadPoolExecutor(world) as threads:
            for module in ("buffer", "datamodule", "learner.credit", "learner.learner", "learner.steps", "learner.update"):
                collectives = {"gather": gather, "gather_columns": gather, "rank_and_world": lambda: (here.rank, world)}
                for name, fake in collectives.items():
                    patched.setattr(f"steppo.{module}.{name}", fake, raising=False)
            return list(threads.map(start, range(world)))

    return run
