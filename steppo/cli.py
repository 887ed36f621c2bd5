"""The command line: a LightningCLI whose every component is swapped by config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from callbacks import EvaluationCallback, RolloutCallback, StepProgressBar, WarmStartCallback
from steppo.datamodule import StepDataModule
from steppo.errors import SteppoError
from steppo.module import AgentModule


class StepCLI(LightningCLI):
    """Adds the sections ``rollout``, ``warm_start``, ``evaluation`` and ``progress``: overlays reach them by name."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads", type=int | None, default=None, help="CPU threads of torch; part of what makes a run repeatable."
        )
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(WarmStartCallback, "warm_start")
        parser.add_lightning_class_args(EvaluationCallback, "evaluation")
        parser.add_lightning_class_args(StepProgressBar, "progress")

    def before_instantiate_classes(self) -> None:
        threads = self.config[self.subcommand].num_threads
        if threads is not None:
            torch.set_num_threads(threads)


def main(args: Sequence[str] | None = None) -> StepCLI:
    """Runs a command line (the process's own unless given); a user's mistake is one line and exit status 2."""
    try:
        return StepCLI(
            AgentModule,
            StepDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False},
            trainer_defaults={"num_sanity_val_steps": 0},
            args=list(args) if args is not None else None,
        )
    except (SteppoError, ArgumentError, MisconfigurationException) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _one_line(error: Any) -> str:
    """What went wrong, without the parser's lists of all that it tried."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:600]
