"""The command line's help."""

from __future__ import annotations

import pytest

from steppo.cli import main


def test_help_explains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for command, explained in (
        (["fit", "--help"], ("--rollout.group_size", "Episodes per task, from the same start", "--num_threads")),
        (["fit", "--model.help", "steppo.module.AgentModule"], ("Trust region of the ratio below 1", "max_grad_norm")),
        (["fit", "--data.help", "steppo.datamodule.StepDataModule"], ("Most tokens, padding included",)),
    ):
        with pytest.raises(SystemExit):
            main(command)
        text = " ".join(capsys.readouterr().out.split())
        assert all(words in text for words in explained)
