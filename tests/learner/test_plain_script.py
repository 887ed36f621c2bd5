"""The learner without Lightning: a loop of a few lines gives the weights of a run, bit for bit."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from steppo.buffer import StepBuffer
from steppo.cli import build_parts
from steppo.learner import Learner, OptimizerSettings
from steppo.learner.optim import clip_and_step
from steppo.packing import PaddedPacker
from steppo.samplers import ShuffledSampler
from steppo.types import RolloutConfig, groups_of
from tests.cli_helpers import TOY, run, weights


@pytest.mark.parametrize("critic", ["SharedCritic", "SeparateCritic"])
def test_a_plain_loop_equals_a_run(critic: str, tmp_path: Path) -> None:
    options = ["--warm_start.updates=0", "--model.policy.seed=3", f"--model.critic=steppo.models.{critic}"]
    run(tmp_path / "run", *options, "--trainer.max_epochs=2", "--trainer.limit_val_batches=0", "--num_threads=1")

    parts = build_parts(Namespace(config=[str(TOY)], ckpt_path=None), options)
    torch.manual_seed(0)
    module, source = parts.model, parts.datamodule.source
    policy, head = module.policy, module.critic
    policy.build(parts.datamodule.tokenizer_texts)
    head.build(policy)
    source.bind(policy)
    learner = Learner(policy, module.advantage, head, loss=module.loss, objective=module.objective)
    buffer = StepBuffer(PaddedPacker(), max_tokens=16384, num_minibatches=2)
    settings = [OptimizerSettings(lr=2e-3), OptimizerSettings(lr=3e-3)]
    groups = [("policy", policy.trained_parameters()), ("critic", head.trained_parameters())]
    optimizer = torch.optim.AdamW(
        [{"name": name, "params": p, "lr": s.lr, "weight_decay": 0.0} for (name, p), s in zip(groups, settings, strict=True)]
    )
    tasks, sampler = source.tasks("train"), ShuffledSampler()
    for iteration in range(2):
        wanted = groups_of(sampler.next(tasks, 8, seed=0))
        with torch.no_grad():
            played = [e for group in source.collect(wanted, RolloutConfig(f"train/{iteration}", seed=0)) for e in group]
        buffer.hold(learner.prepare(played, partial(buffer.first_update, seed=0, iteration=iteration)))
        for batch in buffer.updates(seed=0, iteration=iteration):
            optimizer.zero_grad()
            statistics = learner.update(batch, torch.Tensor.backward, lambda: clip_and_step(optimizer, settings))
            buffer.take(statistics.old_logprobs)
    source.close()

    expected = weights(tmp_path / "run")
    found = {f"policy.{name}": weight for name, weight in policy.state_dict().items()}
    found |= {f"critic.{name}": weight for name, weight in head.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
