"""A user's own environment, credit, context and packer: one file each, named by class path, nothing else edited."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from steppo.advantages import Advantage, whiten
from steppo.types import Credit, CreditBatch
from tests.cli_helpers import evaluations, run, weights
from tests.slow_credit import Ending, Turn, slow_credit, slow_grpo

FILES = {
    "my_env": """
        from steppo.envs import Env
        from steppo.types import Observation, Task

        class CoinFlip(Env):
            max_steps = 1

            def __init__(self, coins: int = 4):
                self.coins = coins

            def tasks(self, split):
                return [Task(f"coin/{split}/{n}", {"side": ("heads", "tails")[n % 2]}) for n in range(self.coins)]

            def reset(self, task):
                self.side = task.data["side"]
                return Observation(f"It shows {self.side}.", "Say what it shows.", ("heads", "tails")), {}

            def step(self, action):
                won = action == self.side
                return Observation("Done."), float(won), True, False, {"success": won}
        """,
    "my_advantage": """
        import torch
        from steppo.advantages import Advantage, whiten
        from steppo.types import Credit

        class CentredReturn(Advantage):
            def __init__(self, scale: float = 1.0):
                self.scale = scale

            def __call__(self, batch):
                returns_E = torch.zeros_like(batch.bootstrap_E).index_add(0, batch.episode_N, batch.reward_N)
                return Credit(advantage_N=self.scale * whiten(returns_E[batch.episode_N]))
        """,
    "my_context": """
        from steppo.contexts import ContextPolicy

        class LastOnly(ContextPolicy):
            def prompt_ids(self, observations, steps):
                return self.first_turn("Now: " + self.render_observation(observations[-1]))
        """,
    "my_packer": """
        import numpy as np
        from steppo.packing import PaddedPacker

        class OneByOne(PaddedPacker):
            def pack(self, segments, max_tokens):
                return [(np.array([n]), super(OneByOne, self).pack([s], max_tokens)[0][1]) for n, s in enumerate(segments)]
        """,
    "my_team": """
        from steppo.engines import HFEngine
        from steppo.rollouts import EpisodeSource, request_seed
        from steppo.types import Episode, Request, Sampling, Step, StopReason, Task

        class Team(EpisodeSource):
            def __init__(self, cut: int = 3):
                self.cut = cut
                self.engine = HFEngine()

            def tasks(self, split):
                return [Task(f"{split}/{n}", {"word": ("heads", "tails")[n % 2]}) for n in range(8)]

            def tokenizer_texts(self, tasks):
                return ["planner: say heads or tails > worker: done, judge heads tails"]

            def bind(self, policy):
                self.policy = policy
                self.engine.bind(policy)

            def ids(self, text):
                return self.policy.tokenizer(text, return_tensors="np")["input_ids"][0].astype("int32")

            def collect(self, groups, config):
                for group in groups:
                    yield [self.play(group, sample, config) for sample in range(group.size)]

            def play(self, group, sample, config):
                word, steps, said = group.task.data["word"], [], ""
                order = group.first + sample
                cut = order % self.cut == 1
                for index, agent in enumerate(("planner", "worker", "worker", "planner")[: 3 if cut else 4]):
                    text = f"{agent}: say {word} {said} >"
                    seed = request_seed(config, group, sample, index)
                    self.engine.submit(Request(0, group.task.id, self.ids(text), Sampling(config.temperature, 4), seed))
                    [answer] = self.engine.poll()
                    said = self.policy.tokenizer.decode(answer.action_ids)
                    reward = 0.5 * (len(answer.action_ids) < 4)
                    steps.append(
                        Step(self.ids(text), answer.action_ids, answer.logprobs, reward, index, answer.finish_reason,
                             False, False, True, text, said, config.temperature, config.version, agent_id=agent)
                    )
                won = bool(answer.action_ids[0] % 2)
                return Episode(
                    f"{config.name}/{order}", order, group.id, group.task.id, tuple(steps),
                    StopReason.STEP_LIMIT if cut else StopReason.TERMINATED,
                    final_prompt_ids=self.ids("worker: judge >") if cut else None,
                    success=won, final_reward=float(won),
                )
        """,
}


class ReturnOnly(Advantage):
    """Credit without a critic."""

    def __call__(self, batch: CreditBatch) -> Credit:
        returns_E = torch.zeros_like(batch.bootstrap_E).index_add(0, batch.episode_N, batch.reward_N)
        return Credit(advantage_N=whiten(returns_E[batch.episode_N]))


@pytest.fixture
def user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, code in FILES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in FILES:
        sys.modules.pop(name, None)


def test_own_components_train_without_touching_steppo(user_files: Path, tmp_path: Path) -> None:
    cli = run(
        tmp_path / "run",
        "--data.source.env=my_env.CoinFlip",
        "--data.source.env.coins=6",
        "--data.source.context=my_context.LastOnly",
        "--data.source.context.instructions=Play.",
        "--data.packer=my_packer.OneByOne",
        "--model.advantage=my_advantage.CentredReturn",
        "--model.advantage.scale=0.5",
    )
    assert type(cli.datamodule.source.env).__name__ == "CoinFlip"
    assert cli.datamodule.source.env.coins == 6
    assert cli.model.advantage.scale == 0.5
    assert cli.model.critic is None  # the credit wants no values
    assert cli.trainer.global_step == 4
    assert [record["episodes"] for record in evaluations(tmp_path / "run")] == [6, 6, 6]
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "run").values())


TEAM = ["planner", "worker", "worker", "planner"]


@pytest.mark.parametrize("scheme", ["StepGAE", "GRPO"])
def test_an_own_source_of_several_agents_trains(scheme: str, user_files: Path, tmp_path: Path) -> None:
    """Cut after the worker's second step, or ended by the planner; a reward at the end beside those of the steps."""
    options = ["--model.advantage.bootstrap_truncated=true"] if scheme == "StepGAE" else ["--model.critic=null"]
    cli = run(
        tmp_path / "run",
        "--data.source=my_team.Team",
        "--rollout.group_size=4",
        "--warm_start.updates=0",
        f"--model.advantage=steppo.advantages.{scheme}",
        *options,
    )
    experience = cli.datamodule.buffer.experience
    episodes, table, scores = experience.episodes, experience.steps, experience.scores
    assert {len(episode.steps) for episode in episodes} == {3, 4}
    assert {episode.final_reward for episode in episodes} == {0.0, 1.0}
    turns, names = [], []
    values = torch.zeros(len(table)) if scheme == "GRPO" else scores.value_N
    places = {episode.order: number for number, episode in enumerate(episodes)}
    for order, step, value in zip(table.order_N.tolist(), table.records, values.tolist(), strict=True):
        turns.append(Turn(places[order], step.index, [step.reward], [value], value, agent=TEAM.index(step.agent_id)))
        names.append(step.agent_id)
    after = dict(zip(table.order_N.tolist(), scores.bootstrap_N.tolist(), strict=True))
    endings = [Ending(len(e.steps) == 4, after[e.order], e.group_id, e.final_reward) for e in episodes]
    if scheme == "StepGAE":
        expected, target = slow_credit(turns, endings, 0.95, 0.95, bootstrap=True, by_token=False)
        torch.testing.assert_close(experience.credit.target_N, torch.tensor(target), rtol=1e-5, atol=1e-5)
        assert any(after[episode.order] for episode in episodes)
    else:
        expected = slow_grpo(turns, endings)
        assert any(expected)
    torch.testing.assert_close(experience.credit.advantage_N, torch.tensor(expected), rtol=1e-4, atol=1e-4)

    lines = (tmp_path / "run" / "transcripts.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"][-8:]
    assert [step["agent"] for record in records for step in record["steps"]] == names
    for record, episode in zip(records, episodes, strict=True):
        assert record["return"] == sum(step["reward"] for step in record["steps"]) + episode.final_reward
        assert record.get("final_reward", 0.0) == episode.final_reward
    assert all(record["errors"] == 0 for record in evaluations(tmp_path / "run"))
