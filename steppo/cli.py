"""The command line: a LightningCLI whose every component is swapped by config."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from omegaconf.errors import OmegaConfBaseException

from callbacks import EvaluationCallback, RolloutCallback, StepProgressBar, WarmStartCallback
from steppo.datamodule import StepDataModule
from steppo.errors import ConfigError, SteppoError
from steppo.mistakes import check_config, check_config_files, explain, in_one_line, refusal
from steppo.module import AgentModule


class StepCLI(LightningCLI):
    """Adds the sections ``rollout``, ``warm_start``, ``evaluation`` and ``progress``: overlays reach them by name."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch; part of what makes a run repeatable.",
        )
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        parser.add_lightning_class_args(WarmStartCallback, "warm_start")
        parser.add_lightning_class_args(EvaluationCallback, "evaluation")
        parser.add_lightning_class_args(StepProgressBar, "progress")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """``fit``, ``validate`` and ``test``: nothing predicts."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning's; what is wrong is said in one line."""
        check_config_files(sys.argv[1:] if args is None else args)
        parsers = [self.parser, *getattr(self, "_subcommand_parsers", {}).values()]
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            options = {action.dest for known in parsers for action in known._actions}
            raise ConfigError(explain(error, options)) from None
        chosen = self.config.get("subcommand")
        check_config(self.config[chosen] if chosen else self.config, self._parser(chosen)._actions)

    def instantiate_classes(self) -> None:
        """As Lightning's; what a component refuses is said in its own words, not the parser's."""
        try:
            super().instantiate_classes()
        except Exception as error:
            raise refusal(error) from None

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (RuntimeError, ValueError, OSError) as error:
            raise in_one_line(error) from error

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.trainer.enable_progress_bar is False:
            config.trainer.enable_progress_bar, config.progress.enabled = None, False
        if "verbose" in config:
            config.verbose = False  # the progress bar prints the table
        if config.trainer.max_time is not None:  # Lightning's own timer would stop within an iteration
            timer = Namespace(duration=config.trainer.max_time, interval="epoch")
            callbacks = config.trainer.callbacks or []
            config.trainer.callbacks = [
                *(callbacks if isinstance(callbacks, list) else [callbacks]),
                Namespace(class_path="lightning.pytorch.callbacks.Timer", init_args=timer),
            ]
            config.trainer.max_time = None
        path = config.get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and not Path(path).exists():
            raise ConfigError(f"there is no checkpoint {path}")


def main(args: Sequence[str] | None = None) -> StepCLI:
    """Runs a command line (the process's own unless given); a user's mistake is one line and exit status 2."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    # An abbreviated option would be taken for another. omegaconf+ resolves ${...} when all files and options are merged, so
    # that an override reaches every copy of a value.
    strict = {"parser_mode": "omegaconf+", "allow_abbrev": False, "exit_on_error": False}
    try:
        return StepCLI(
            AgentModule,
            StepDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the module's own: one group each for policy and critic
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={**strict, **dict.fromkeys(StepCLI.subcommands(), strict)},
            trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
            args=list(args) if args is not None else None,
        )
    except (
        SteppoError,
        ArgumentError,
        MisconfigurationException,
        OmegaConfBaseException,
        yaml.YAMLError,
        UnpicklingError,
    ) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        raise SystemExit(2) from None
