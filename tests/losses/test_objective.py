"""What an update descends: the gradients of a real run against the objective written out, token by token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from steppo.batch import Microbatch
from steppo.losses import ClippedLoss, ObjectiveSettings
from tests.cli_helpers import run

COMMON = [
    "--trainer.precision=64-true",
    "--trainer.max_epochs=1",
    "--trainer.callbacks+=tests.losses.test_objective.CompareGradients",
    "--warm_start.updates=20",
    "--rollout.episodes_per_iteration=5",
    "--data.num_minibatches=2",
    "--data.update_epochs=2",
    "--data.max_tokens_per_microbatch=100",
    "--data.eval_tasks=1",
    "--model.policy_optimizer.lr=0.02",
    "--model.policy_optimizer.max_grad_norm=0",
    "--model.critic_optimizer.lr=0.02",
    "--model.critic_optimizer.max_grad_norm=0",
    "--model.objective.ent_coef=0.05",
]
BY_STEP = ["--model.loss.ratio=step", "--model.loss.clip_low=0.02", "--model.loss.clip_high=0.03"]
BY_TOKEN = ["--model.loss.ratio=token", "--model.loss.clip_low=0.1", "--model.loss.clip_high=0.05"]
WITH_CRITIC = ["--model.objective.vf_coef=0.7", "--model.objective.value_clip=0.05"]


def kl(where: str) -> list[str]:
    return [f"--model.objective.kl={where}", "--model.objective.kl_coef=0.3"]


RUNS = {
    "step credit, step ratio, KL k3, shared critic": [
        *(
            *BY_STEP,
            *WITH_CRITIC,
            "--model.objective.kl=loss",
            "--model.objective.kl_coef=0.3",
            "--model.objective.aggregation=step-mean",
        ),
    ],
    "token credit, token ratio, KL k2, its own critic": [
        *(
            *BY_TOKEN,
            *WITH_CRITIC,
            "--model.objective.kl=loss",
            "--model.objective.kl_coef=0.3",
            "--model.objective.kl_estimator=k2",
        ),
        *("--model.objective.aggregation=token-mean", "--model.loss.dual_clip=1.1"),
        *("--model.advantage=steppo.advantages.TokenGAE", "--model.critic=steppo.models.SeparateCritic"),
    ],
    "token credit, step-mean, value of each token": [
        *(*BY_TOKEN, *WITH_CRITIC, "--model.objective.aggregation=step-mean"),
        "--model.advantage=steppo.advantages.TokenGAE",
    ],
    "importance weights, some of them 0": [
        *(*BY_STEP, *WITH_CRITIC, *kl("loss"), "--model.correction=tests.learner.test_correction.DropLast"),
    ],
    "importance weights of tokens": [
        *(*BY_TOKEN, *WITH_CRITIC, "--model.advantage=steppo.advantages.TokenGAE"),
        *("--model.objective.aggregation=token-mean", "--model.correction=tests.learner.test_correction.DropLast"),
        "--model.loss.dual_clip=0",
    ],
    "no critic, KL in the reward alone": [
        *(
            *BY_TOKEN,
            "--model.objective.kl=reward",
            "--model.objective.kl_coef=0.3",
            "--model.objective.aggregation=token-mean",
        ),
        "--model.advantage=steppo.advantages.ReinforcePP",
    ],
}


def objective(module: Any, batch: list[Microbatch], seen: Counter[str]) -> Tensor:
    """The mean over the update's steps or tokens, term by term. ``seen`` counts the cases that came up."""
    settings: ObjectiveSettings = module.objective
    loss: ClippedLoss = module.loss
    by_step, kind = settings.aggregation == "step-mean", module.advantage.needs_values
    terms, value_terms = [], []  # (number, tokens of its step)
    steps = 0
    for microbatch in batch:
        tokens = microbatch.tokens
        hidden, logprobs, entropies = module.policy(tokens, microbatch.temperature_A)
        values = None if kind == "none" else module.critic(tokens, tokens.value_positions(kind), hidden)
        old = logprobs.detach() if microbatch.old_logprobs_A is None else microbatch.old_logprobs_A
        steps += tokens.num_steps
        for step in range(tokens.num_steps):
            places = torch.nonzero(tokens.step_of_A == step)[:, 0].tolist()
            log_ratio = {a: logprobs[a] - old[a] for a in places}
            mean = sum(x.detach() for x in log_ratio.values()) / len(places)
            for a in places:
                own = log_ratio[a]
                ratio = (mean + own - own.detach() if loss.ratio == "step" else own).exp()
                weight = float(microbatch.weight_A[a])
                seen["dropped"] += weight == 0
                term = -surrogate(ratio, float(microbatch.advantage_A[a]), loss, seen) * weight
                term = term - settings.ent_coef * entropies[a]
                if settings.kl == "loss":
                    assert microbatch.ref_logprobs_A is not None
                    d = microbatch.ref_logprobs_A[a] - logprobs[a]
                    seen["kl"] += bool(d.abs() > 1e-3)
                    term = term + settings.kl_coef * (d * d / 2 if settings.kl_estimator == "k2" else d.exp() - d - 1)
                terms.append((term, len(places)))
            for place in [] if values is None else [step] if kind == "step" else places:
                assert microbatch.old_value is not None
                assert microbatch.target is not None
                before, target = microbatch.old_value[place], microbatch.target[place]
                near = before + torch.clamp(values[place] - before, -settings.value_clip, settings.value_clip)
                seen["value clipped"] += bool((near - target) ** 2 > (values[place] - target) ** 2)
                squared = torch.maximum((values[place] - target) ** 2, (near - target) ** 2)
                kept = [float(microbatch.weight_A[a]) for a in (places if kind == "step" else [place])]
                squared = squared * sum(kept) / len(kept)
                value_terms.append((settings.vf_coef * 0.5 * squared, 1 if kind == "step" else len(places)))
    mean_of_steps = sum(term / length for term, length in terms) / steps
    mean_of_tokens = sum(term for term, _ in terms) / len(terms)
    total = mean_of_steps if by_step else mean_of_tokens
    if value_terms:
        summed = sum(term / (length if by_step else 1) for term, length in value_terms)
        total = total + summed / (steps if by_step or kind == "step" else len(terms))
    return total


def surrogate(ratio: Tensor, advantage: float, loss: ClippedLoss, seen: Counter[str]) -> Tensor:
    """What is to grow, of one token."""
    low, high = 1 - loss.clip_low, 1 + loss.clip_high
    if advantage >= 0:
        seen["clipped above"] += bool(ratio > high)
        return advantage * ratio.clamp(max=high)
    seen["clipped below"] += bool(ratio < low)
    if loss.ratio == "token" and loss.dual_clip:
        seen["dual clip"] += bool(ratio > loss.dual_clip)
        ratio = ratio.clamp(max=loss.dual_clip)
    return advantage * ratio.clamp(min=low)


class CompareGradients(Callback):
    """Works out each update's gradients before it is made, and compares."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.expected: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: list[Microbatch], batch_idx: int) -> None:
        parameters = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        total = objective(pl_module, batch, self.seen)
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        self.expected = {name: x for name, x in zip(parameters, found, strict=True) if x is not None}
        self.seen["updates"] += 1
        self.seen["several microbatches"] += len(batch) > 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        actual = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        assert actual.keys() == self.expected.keys()
        for name, gradient in self.expected.items():
            torch.testing.assert_close(
                actual[name], gradient, rtol=1e-8, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_an_update_descends_the_objective(tmp_path: Path, options: list[str]) -> None:
    cli = run(tmp_path, *COMMON, *options)
    [callback] = [callback for callback in cli.trainer.callbacks if isinstance(callback, CompareGradients)]
    seen = callback.seen
    assert seen["updates"] == 4
    assert seen["several microbatches"]
    assert seen["clipped above"]
    assert seen["clipped below"]
    assert bool(seen["kl"]) == ("--model.objective.kl=loss" in options)
    assert bool(seen["value clipped"]) == ("--model.objective.vf_coef=0.7" in options)
    assert bool(seen["dropped"]) == any("DropLast" in option for option in options)
    assert bool(seen["dual clip"]) == ("--model.loss.dual_clip=1.1" in options)
