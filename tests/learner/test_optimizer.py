"""Another optimizer by its class path: it trains, resumes bit for bit, takes its options, and mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch

from tests.cli_helpers import run, same, weights

SHORT = ["--warm_start.updates=0", "--data.eval_tasks=1", "--transcripts.enabled=false"]
OPTIMIZERS = {
    "8 bits": (bitsandbytes.optim.AdamW8bit, ["--model.optimizer=bitsandbytes.optim.AdamW8bit"]),
    "betas": (torch.optim.AdamW, ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.betas=[0.5, 0.9]"]),
    "SGD": (torch.optim.SGD, ["--model.optimizer=torch.optim.SGD", "--model.optimizer.momentum=0.9"]),
}


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_other_optimizers_train_and_resume(kind: type, options: list[str], tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *SHORT, *options, "--trainer.max_epochs=2")
    [optimizer] = whole.trainer.optimizers
    assert type(optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer) is kind
    assert [group["name"] for group in optimizer.param_groups] == ["policy", "critic"]
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 3e-3]
    run(tmp_path / "usual", *SHORT, "--trainer.max_epochs=2")
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "usual"))
    run(tmp_path / "cut", *SHORT, *options, "--trainer.max_epochs=1")
    run(tmp_path / "cut", *SHORT, *options, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_what_cannot_take_groups_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *SHORT, "--model.optimizer=torch.optim.LBFGS")
    assert ended.value.code == 2
    assert "error: model.optimizer: LBFGS doesn't support per-parameter options" in capsys.readouterr().err
