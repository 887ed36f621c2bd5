"""The command line: a LightningCLI whose every component is swapped by config."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from omegaconf.errors import OmegaConfBaseException

from callbacks import EvaluationCallback, RolloutCallback, StepProgressBar, TranscriptCallback, WarmStartCallback
from steppo.datamodule import StepDataModule
from steppo.errors import ConfigError, SteppoError
from steppo.module import AgentModule

_LONGEST_ERROR = 500


class StepCLI(LightningCLI):
    """Adds sections for the callbacks ``rollout``, ``warm_start``, ``evaluation``, ``transcripts`` and ``progress``."""

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
        parser.add_lightning_class_args(TranscriptCallback, "transcripts")
        parser.add_lightning_class_args(StepProgressBar, "progress")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """``fit``, ``validate`` and ``test``: nothing predicts."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def instantiate_classes(self) -> None:
        """As Lightning's; what a component refuses is said in its own words, not the parser's."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, SteppoError):
                cause = cause.__cause__ or cause.__context__
            raise cause or ArgumentError(None, str(error)) from None

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.trainer.enable_progress_bar is False:
            config.trainer.enable_progress_bar, config.progress.enabled = None, False
        if "verbose" in config:
            config.verbose = False  # the progress bar prints the table
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


def explain(error: Exception) -> str:
    """One line that says where and what, without the parser's lists of all that it tried."""
    text = " ".join(str(error).split())
    if not isinstance(error, ArgumentError):
        return text[:_LONGEST_ERROR]
    text, _, given = text.partition(" Given value type:")
    *_, reason = re.split(r'Parser key "[^"]*": |Errors: - ', text)
    reason = reason.removesuffix(" - Expected a <class 'NoneType'>")
    reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason).replace("typing.", "")
    value = given.partition("Given value: ")[2]
    if value and "NestedArg" not in value and "Got value" not in reason and len(value) < 80:
        reason += f". Got value: {value}"
    where = ".".join(re.findall(r'Parser key "([^"]*)"', text))
    return f"{where + ': ' if where else ''}{reason}{_suggestion(reason)}"[:_LONGEST_ERROR]


def _suggestion(reason: str) -> str:
    """The parameter that was probably meant."""
    match = re.search(r"class_path '([\w.]+)\.(\w+)'.*(?:Option '|Key ')([\w.]+)'", reason)
    if match is None:
        return ""
    module, name, option = match.groups()
    owner: Any = getattr(importlib.import_module(module), name)
    near = difflib.get_close_matches(option, inspect.signature(owner).parameters, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
