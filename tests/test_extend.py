"""A user's own parts, of every kind: one file each, named by class path, nothing else edited."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steppo.advantages import Advantage, whiten
from steppo.batch import Credit, CreditBatch
from tests.cli_helpers import evaluations, run, weights
from tests.slow_credit import Ending, Turn, slow_credit, slow_grpo

FILES = {
    "my_env": """
        from steppo.envs import TextGameEnv
        from steppo.types import Task, Turn

        class CoinFlip(TextGameEnv):
            max_steps = 1

            def __init__(self, coins: int = 4):
                self.coins = coins

            def tasks(self, split):
                return [Task(f"coin/{split}/{n}", {"side": ("heads", "tails")[n % 2]}) for n in range(self.coins)]

            def reset(self, task):
                self.side = task.data["side"]
                return Turn(f"It shows {self.side}.", "Say what it shows.", ("heads", "tails"))

            def command(self, command):
                won = command == self.side
                return Turn("Done.", reward=float(won), terminated=True, success=won)
        """,
    "my_advantage": """
        import torch
        from steppo.advantages import Advantage, whiten
        from steppo.batch import Credit

        class CentredReturn(Advantage):
            def __init__(self, scale: float = 1.0):
                self.scale = scale

            def __call__(self, batch):
                returns_E = torch.zeros_like(batch.bootstrap_E).index_add(0, batch.episode_N, batch.reward_N)
                return Credit(advantage_N=self.scale * whiten(returns_E[batch.episode_N]))
        """,
    "my_context": """
        from steppo.rendering import ContextPolicy
        from steppo.types import Message

        class LastOnly(ContextPolicy):
            def messages(self, turns, steps):
                return [Message("user", "Now: " + self.render_observation(turns[-1]))]
        """,
    "my_packer": """
        import numpy as np
        from steppo.packing import PaddedPacker

        class OneByOne(PaddedPacker):
            def pack(self, segments, max_tokens):
                return [(np.array([n]), super(OneByOne, self).pack([s], max_tokens)[0][1]) for n, s in enumerate(segments)]
        """,
    "my_minibatches": """
        import numpy as np
        from steppo.minibatches import Minibatches

        class ByLength(Minibatches):
            def __init__(self, lose: int = 0):
                self.lose = lose

            def cut(self, steps, num_minibatches, rng):
                order = np.argsort(steps.length_N, kind="stable")[self.lose:]
                return np.array_split(order, num_minibatches)
        """,
    "my_loss": """
        from steppo.losses import LossOutput, PolicyLoss

        class Squared(PolicyLoss):
            def __init__(self, scale: float = 1.0):
                self.scale = scale

            def __call__(self, inputs):
                ratio_A = (inputs.logprobs_A - inputs.old_logprobs_A).exp()
                loss_A = self.scale * ((ratio_A - 1) ** 2 - inputs.advantage_A * ratio_A)
                return LossOutput(loss_A, ratio_A.detach(), (ratio_A > 2).detach())
        """,
    "my_correction": """
        import torch
        from steppo.learner import Correction, Weights

        class FirstTokens(Correction):
            def __init__(self, count: int = 1):
                self.count = count

            def __call__(self, inputs):
                place_A = torch.arange(len(inputs.step_of_A)) - torch.searchsorted(inputs.step_of_A, inputs.step_of_A)
                return Weights(torch.full_like(inputs.old_logprobs_A, 0.5), place_A < self.count)
        """,
    "my_policy": """
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
        from steppo.models import TinyPolicy

        class GPT2(TinyPolicy):
            def __init__(self, width: int = 32):
                super().__init__(hidden_size=width, num_heads=2, vocab_size=320)
                self.shape = GPT2Config(
                    vocab_size=320, n_positions=512, n_embd=width, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=1,
                    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
                )

            def build(self, tokenizer_texts):
                super().build(tokenizer_texts)
                self.model = GPT2LMHeadModel(self.shape)
        """,
    "my_critic": """
        from torch import nn
        from steppo.models import Critic
        from steppo.models.critic import ValueHead

        class BagOfWords(Critic):
            def __init__(self, width: int = 8):
                super().__init__()
                self.width = width

            def build(self, policy):
                self.words = nn.EmbeddingBag(policy.vocab_size, self.width, mode="mean")
                self.head = ValueHead(self.width)

            def states(self, batch, policy_hidden):
                rows, width = batch.input_ids_BT.shape
                return self.words(batch.input_ids_BT).repeat_interleave(width, 0)
        """,
    "my_listener": """
        from steppo.listeners import Listener

        class Notes(Listener):
            def __init__(self, name: str = "notes"):
                self.name = name
                self.heard = []

            def on_run_start(self, trainer, pl_module):
                self.heard.append(("run", trainer.global_step))

            def on_iteration_start(self, trainer, pl_module):
                self.heard.append(("start", trainer.current_epoch))

            def on_experience(self, trainer, pl_module, experience, replay):
                self.heard.append(("experience", experience, replay))

            def on_evaluation(self, trainer, pl_module, evaluation):
                self.heard.append(("evaluation", evaluation))
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
                    while not (answers := self.engine.poll()):  # a tick may end with no answer
                        pass
                    [answer] = answers
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
def user_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
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
        "--data.minibatches=my_minibatches.ByLength",
        "--model.advantage=my_advantage.CentredReturn",
        "--model.advantage.scale=0.5",
    )
    assert type(cli.datamodule.source.env).__name__ == "CoinFlip"
    assert cli.datamodule.source.env.coins == 6
    assert cli.model.advantage.scale == 0.5
    assert cli.model.critic is None  # the credit wants no values
    assert type(cli.datamodule.buffer.minibatches).__name__ == "ByLength"
    assert cli.trainer.global_step == 4
    assert [record["episodes"] for record in evaluations(tmp_path / "run")] == [6, 6, 6]
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path / "run").values())


def test_own_minibatches_must_have_each_step_once(
    user_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--data.minibatches=my_minibatches.ByLength", "--data.minibatches.lose=1")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "ByLength must put each of the 16 steps into exactly one update" in error
    assert "Traceback" not in error


def test_own_models_loss_correction_and_listener(user_files: Path, tmp_path: Path) -> None:
    cli = run(
        tmp_path / "run",
        "--model.policy=my_policy.GPT2",
        "--model.policy.width=16",
        "--model.critic=my_critic.BagOfWords",
        "--model.critic.width=6",
        "--model.loss=my_loss.Squared",
        "--model.loss.scale=2.0",
        "--model.correction=my_correction.FirstTokens",
        "--model.correction.count=2",
        "--trainer.callbacks+=my_listener.Notes",
        "--trainer.callbacks.name=mine",
        "--rollout.episodes_per_iteration=4",
        "--data.eval_tasks=4",
    )
    mine = {"policy": "GPT2", "critic": "BagOfWords", "loss": "Squared", "correction": "FirstTokens"}
    assert {name: type(getattr(cli.model, name)).__name__ for name in mine} == mine
    held = weights(tmp_path / "run")
    assert held["critic.words.weight"].shape == (cli.model.policy.vocab_size, 6)
    assert all(torch.isfinite(weight).all() for weight in held.values())
    assert held["critic.head.weight"].any()

    [notes] = [callback for callback in cli.trainer.callbacks if type(callback).__name__ == "Notes"]
    assert notes.name == "mine"
    kinds = [kind for kind, *_ in notes.heard]
    assert sorted(kinds[:2]) == ["evaluation", "run"]  # both when training begins, in no order
    assert kinds[2:] == ["start", "experience", "evaluation"] * 2
    evaluated = [heard for kind, *heard in notes.heard if kind == "evaluation"]
    assert [evaluation.record for [evaluation] in evaluated] == evaluations(tmp_path / "run")
    assert all(len(evaluation.episodes) == 4 and evaluation.split == "valid" for [evaluation] in evaluated)
    learned = [heard for kind, *heard in notes.heard if kind == "experience"]
    for experience, replay in learned:
        assert len(experience.episodes) == 4
        assert experience.num_steps == len(experience.steps) == len(replay.ratio_N)
        assert experience.weights.weight_A.unique().tolist() == [0.5]
        kept_N = torch.bincount(experience.steps.step_of_A, experience.weights.keep_A.long())
        assert kept_N.tolist() == [min(length, 2) for length in experience.steps.lengths_N.tolist()]
    assert learned[0][0] is not learned[1][0]

    for heard in (*learned[0], evaluated[0][0]):
        assert set(frozen_parts(heard)) >= {type(heard).__name__}
    assert set(frozen_parts(learned[0][0])) >= {"Experience", "StepTable", "Scores", "Weights", "Credit", "Episode", "Step"}


def frozen_parts(part: object) -> Iterator[str]:
    """Names of the records in a record, itself among them; none of which lets a field be set."""
    names = [f.name for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else getattr(part, "_fields", ())
    for name in names:
        with pytest.raises(AttributeError):
            setattr(part, name, None)
        value = getattr(part, name)
        for inner in value[:1] if isinstance(value, tuple) and not hasattr(value, "_fields") else [value]:
            yield from frozen_parts(inner)
    if names:
        yield type(part).__name__


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
