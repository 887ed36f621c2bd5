"""A user's own environment, credit, context and packer: one file each, named by class path, nothing else edited."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from steppo.advantages import Advantage, whiten
from steppo.types import Credit, CreditBatch
from tests.cli_helpers import evaluations, run, weights

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
                return self.first_turn("Now: " + self.describe(observations[-1]))
        """,
    "my_packer": """
        import numpy as np
        from steppo.packing import PaddedPacker

        class OneByOne(PaddedPacker):
            def pack(self, segments, max_tokens):
                return [(np.array([n]), super(OneByOne, self).pack([s], max_tokens)[0][1]) for n, s in enumerate(segments)]
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
