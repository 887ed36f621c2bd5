"""Credit and losses against other public implementations, where these are installed; skipped where they are not.

TorchRL comes with ``pip install -e ".[outside]"``. verl wants older versions than ours of what both need, but what is used
here does without: ``pip install --no-deps verl==0.9.1 ray hydra-core antlr4-python3-runtime==4.9.3 codetiming orjson``, and
msgpack and jsonschema. In both, an episode is a row; verl's has the observations' tokens between the steps', masked out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steppo.advantages import GRPO, RLOO, ReinforcePP, ReinforcePPBaseline, StepGAE, TokenGAE, whiten
from steppo.batch import CreditBatch
from steppo.losses import ClippedLoss, kl_penalty, token_weights, value_loss
from tests.numeric_helpers import close, normal, policy_loss, steps_of, to_batch
from tests.slow_credit import Ending, Turn, rows_by_episode

SEEDS = pytest.mark.parametrize("seed", range(4))
GROUPS = [5, 2, 5, 5, 2, 9, 9, 5]  # two or more of each: verl gives a group of one its raw return


@pytest.fixture(scope="module")
def torchrl() -> Any:
    return pytest.importorskip("torchrl.objectives.value.functional")


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Some factors are made in the default precision, whatever the arguments have."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def verl() -> Any:
    return pytest.importorskip("verl.trainer.ppo.core_algos")


def shuffled_turns(seed: int) -> tuple[list[Turn], list[Ending]]:
    """Steps of eight episodes: rewards and values of every token, endings of both kinds."""
    rng = np.random.default_rng(seed)
    turns = []
    for episode in range(len(GROUPS)):
        for index in range(int(rng.integers(1, 9))):
            tokens = int(rng.integers(1, 7))
            rewards, values = normal(rng, tokens).tolist(), normal(rng, tokens).tolist()
            turns.append(Turn(episode, index, rewards, values, float(rng.standard_normal())))
    endings = [Ending(bool(rng.random() < 0.5), float(rng.standard_normal()), group) for group in GROUPS]
    return [turns[row] for row in rng.permutation(len(turns))], endings


# --- TorchRL ---


def in_time(turns: list[Turn], by_token: bool) -> list[tuple[Turn, float, float]]:
    """Reward and value of each step or token, one episode after the other."""
    found = []
    for rows in rows_by_episode(turns).values():
        for turn in (turns[row] for row in rows):
            pairs = zip(turn.rewards, turn.values, strict=True) if by_token else [(turn.reward, turn.value)]
            found += [(turn, reward, value) for reward, value in pairs]
    return found


@SEEDS
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("generalized_advantage_estimate", 1e-9), ("vec_generalized_advantage_estimate", 1e-5)],  # it drops factors below 1e-7
)
@pytest.mark.parametrize("by_token", [False, True], ids=["step", "token"])
@pytest.mark.parametrize(("gamma", "gae_lambda", "bootstrap"), [(0.9, 0.8, True), (0.99, 1.0, False), (1.0, 0.95, True)])
def test_gae_of_torchrl(
    torchrl: Any,
    in_float64: None,
    name: str,
    tolerance: float,
    by_token: bool,
    seed: int,
    gamma: float,
    gae_lambda: float,
    bootstrap: bool,
) -> None:
    turns, endings = shuffled_turns(seed)
    rows = in_time(turns, by_token)
    reward, value = (torch.tensor([row[column] for row in rows], dtype=torch.float64)[:, None] for column in (1, 2))
    episode = torch.tensor([turn.episode for turn, _, _ in rows])
    done = torch.ones_like(value, dtype=torch.bool)
    done[:-1, 0] = episode[1:] != episode[:-1]
    following = value.roll(-1)
    terminated = done.clone()
    for row in done.nonzero()[:, 0].tolist():
        ending = endings[int(episode[row])]
        following[row] = ending.bootstrap
        terminated[row] = ending.terminated or not bootstrap
    advantage, target = getattr(torchrl, name)(gamma, gae_lambda, value, following, reward, done, terminated)

    credit = (TokenGAE if by_token else StepGAE)(gamma, gae_lambda, bootstrap)(to_batch(turns, endings))
    found = (credit.advantage_A, credit.target_A) if by_token else (credit.advantage_N, credit.target_N)
    for ours, theirs in zip(found, (whiten(advantage), target), strict=True):
        assert ours is not None
        pieces = dict(zip(((t.episode, t.index) for t in turns), ours.split(lengths(turns, by_token)), strict=True))
        keys = dict.fromkeys((turn.episode, turn.index) for turn, _, _ in rows)
        close(torch.cat([pieces[key] for key in keys]), theirs[:, 0], tolerance)


def lengths(turns: list[Turn], by_token: bool) -> list[int]:
    return [len(turn.rewards) if by_token else 1 for turn in turns]


# --- verl ---


class Rows:
    """Episodes as rows of tokens, with ``gap`` masked tokens before each step."""

    def __init__(self, turns: list[Turn], endings: list[Ending], gap: int) -> None:
        episodes = rows_by_episode(turns)
        width = max(sum(gap + len(turns[row].rewards) for row in rows) for rows in episodes.values())
        self.rewards, self.mask = (torch.zeros(len(endings), width, dtype=torch.float64) for _ in range(2))
        self.values = torch.full_like(self.rewards, 9.0)
        self.groups = np.array([f"group {ending.group}" for ending in endings])
        at: dict[int, Tensor] = {}
        for episode, rows in episodes.items():
            column = 0
            for row in rows:
                columns = torch.arange(len(turns[row].rewards)) + column + gap
                self.rewards[episode, columns] = torch.tensor(turns[row].rewards, dtype=torch.float64)
                self.values[episode, columns] = torch.tensor(turns[row].values, dtype=torch.float64)
                self.mask[episode, columns] = 1
                at[row] = episode * width + columns
                column = int(columns[-1]) + 1
        self.at_A = torch.cat([at[row] for row in range(len(turns))])

    def tokens(self, x: Tensor) -> Tensor:
        """Those of the batch, in its order."""
        return x.flatten()[self.at_A]


@pytest.mark.parametrize("gap", [0, 3])
@SEEDS
def test_token_gae_of_verl(verl: Any, seed: int, gap: int) -> None:
    turns, endings = shuffled_turns(seed)
    rows = Rows(turns, endings, gap)
    credit = TokenGAE(0.97, 0.9)(to_batch(turns, endings))
    advantage, target = verl.compute_gae_advantage_return(rows.rewards, rows.values, rows.mask, 0.97, 0.9)
    assert credit.advantage_A is not None
    assert credit.target_A is not None
    close(credit.advantage_A, rows.tokens(advantage), 1e-6)
    close(credit.target_A, rows.tokens(target))


def by_token(batch: CreditBatch, advantage_N: Tensor | None) -> Tensor:
    assert advantage_N is not None
    return torch.repeat_interleave(advantage_N, batch.length_N)


@pytest.mark.parametrize("gap", [0, 3])
@SEEDS
def test_group_credit_of_verl(verl: Any, seed: int, gap: int) -> None:
    turns, endings = shuffled_turns(seed)
    rows, batch = Rows(turns, endings, gap), to_batch(turns, endings)

    def theirs(name: str, **settings: Any) -> Tensor:
        estimator: Callable[..., tuple[Tensor, Tensor]] = verl.get_adv_estimator_fn(name)
        return rows.tokens(estimator(rows.rewards.clone(), rows.mask, index=rows.groups, **settings)[0])

    for scale in (True, False):
        ours = by_token(batch, GRPO(scale)(batch).advantage_N)
        close(ours, theirs("grpo", norm_adv_by_std_in_grpo=scale))
        close(ours, theirs("grpo_vectorized", norm_adv_by_std_in_grpo=scale), 1e-4)  # in float32
    ours = by_token(batch, RLOO()(batch).advantage_N)
    close(ours, theirs("rloo"))
    close(ours, theirs("rloo_vectorized"))
    # It adds 1e-8 to the variance instead of the standard deviation.
    baseline, plus_plus = by_token(batch, ReinforcePPBaseline()(batch).advantage_N), ReinforcePP(0.97)(batch).advantage_A
    assert plus_plus is not None
    close(baseline, theirs("reinforce_plus_plus_baseline"), 1e-6)
    close(plus_plus, theirs("reinforce_plus_plus", config=SimpleNamespace(gamma=0.97)), 1e-6)


def loss_batch(seed: int) -> tuple[list[int], dict[str, Tensor]]:
    """Steps of 1 to 9 tokens, and what losses need by token; ratios on both sides of every bound."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 10, size=30).tolist()
    old = normal(rng, sum(sizes)) - 3
    numbers = {
        "logprobs": (old + 0.6 * normal(rng, sum(sizes))).requires_grad_(),
        "old": old,
        "ref": old + 0.5 * normal(rng, sum(sizes)),
        "advantage": normal(rng, sum(sizes)),
        "values": normal(rng, sum(sizes)).requires_grad_(),
        "old_values": normal(rng, sum(sizes)),
        "targets": normal(rng, sum(sizes)),
    }
    return sizes, numbers


def padded(x_A: Tensor, sizes: list[int]) -> Tensor:
    """Steps as rows, filled up with 0."""
    return torch.nn.utils.rnn.pad_sequence(list(x_A.split(sizes)), batch_first=True)


@SEEDS
@pytest.mark.parametrize("ratio", ["token", "step"])
@pytest.mark.parametrize(("aggregation", "theirs"), [("step-mean", "seq-mean-token-mean"), ("token-mean", "token-mean")])
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, 10.0), (0.1, 0.4, 1.5), (3e-4, 4e-4, 3.0)])
def test_policy_loss_of_verl(
    verl: Any, seed: int, ratio: Any, aggregation: Any, theirs: str, low: float, high: float, dual: float
) -> None:
    """Loss and gradient: PPO with dual clip, and GSPO in the form with token gradients."""
    sizes, x = loss_batch(seed)
    weight_N = torch.ones(len(sizes), dtype=torch.float64)
    loss = ClippedLoss(ratio, low, high, dual)
    ours = policy_loss(loss, x["logprobs"], x["old"], x["advantage"], steps_of(sizes), weight_N, aggregation).loss / (
        len(sizes) if aggregation == "step-mean" else sum(sizes)
    )
    config = verl.ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual,
    )
    arguments = (padded(x[name], sizes) for name in ("old", "logprobs", "advantage"))
    mask = padded(torch.ones_like(x["old"]), sizes)
    loss = verl.get_policy_loss_fn("gspo" if ratio == "step" else "vanilla")(
        *arguments, mask, loss_agg_mode=theirs, config=config
    )[0]
    close(ours.detach(), loss.detach(), 1e-7)
    close(*(torch.autograd.grad(one, x["logprobs"])[0] for one in (ours, loss)), 1e-7)


@SEEDS
@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_value_loss_of_verl(verl: Any, seed: int, clip: float) -> None:
    sizes, x = loss_batch(seed)
    ours = value_loss(x["values"], x["old_values"], x["targets"], torch.ones_like(x["old"]), clip) / sum(sizes)
    arguments = (padded(x[name], sizes) for name in ("values", "targets", "old_values"))
    loss, _ = verl.compute_value_loss(*arguments, padded(torch.ones_like(x["old"]), sizes), clip)
    close(ours.detach(), loss.detach())
    close(*(torch.autograd.grad(one, x["values"])[0] for one in (ours, loss)))


@SEEDS
@pytest.mark.parametrize(("estimator", "theirs"), [("k3", "low_var_kl"), ("k2", "mse")])
def test_kl_of_verl(verl: Any, seed: int, estimator: Any, theirs: str) -> None:
    """Its value and gradient, with step-mean."""
    sizes, x = loss_batch(seed)
    weights_A = token_weights(steps_of(sizes), torch.ones(len(sizes), dtype=torch.float64), "step-mean")
    ours = (kl_penalty(x["logprobs"], x["ref"], estimator) * weights_A).sum() / len(sizes)
    by_row = verl.kl_penalty_forward(padded(x["logprobs"], sizes), padded(x["ref"], sizes), theirs)
    loss = verl.agg_loss(by_row, padded(torch.ones_like(x["old"]), sizes), "seq-mean-token-mean")
    close(ours.detach(), loss.detach(), 1e-7)
    close(*(torch.autograd.grad(one, x["logprobs"])[0] for one in (ours, loss)), 1e-7)
