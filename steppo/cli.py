"""The command line: a LightningCLI whose every component is swapped by config."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn, TypeVar

import torch
import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from omegaconf.errors import OmegaConfBaseException

from callbacks import EvaluationCallback, QuantizationCallback, RolloutCallback, StepProgressBar, WarmStartCallback
from steppo.datamodule import StepDataModule
from steppo.errors import ConfigError, SteppoError
from steppo.module import AgentModule

_LONGEST_ERROR = 500
_CLI = TypeVar("_CLI", bound="StepCLI")


class StepCLI(LightningCLI):
    """Adds sections with names of their own for steppo's callbacks: overlays reach them by name."""

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
        parser.add_lightning_class_args(QuantizationCallback, "quantization")
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
        if self.trainer and isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ConfigError("trainer.strategy must start processes by their command line: use ddp, not spawn or fork")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.trainer.enable_progress_bar is False:
            config.trainer.enable_progress_bar, config.progress.enabled = None, False
        if "verbose" in config:
            config.verbose = False  # the progress bar prints the table
        path = config.get("ckpt_path")
        if path and path not in ("best", "last", "hpc") and not Path(path).exists():
            raise ConfigError(f"there is no checkpoint {path}")


class PartsCLI(StepCLI):
    """Makes the model and the data of a config, and no trainer: for commands other than ``train.py``.

    Takes the configs and options of ``train.py fit``, the ``config.yaml`` of a run's folder among them.

    Attributes:
        resolved: The merged config.
    """

    resolved: dict[str, Any]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name in ("ckpt_path", "weights_only", "verbose"):  # of the subcommands; a run's config.yaml holds them
            parser.add_argument(f"--{name}", type=Any, default=None)

    def before_instantiate_classes(self) -> None:
        self.resolved = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
        self.config.ckpt_path = None
        self.config.trainer.logger = self.config.trainer.callbacks = None
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Nothing is run."""

    @property
    def quantization(self) -> QuantizationCallback:
        """To be applied to the model before it is built."""
        return self._get(self.config_init, "quantization")


class OwnOptions(argparse.ArgumentParser):
    """The options of a command of its own; ``parse_known_args`` leaves those of the config. A mistake is a ConfigError."""

    def __init__(self, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} [options] [any option of train.py fit]",
            description=description,
            epilog=f"example:\n  {example}\n\nAll options of a config: python train.py fit --help",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--ckpt_path", type=Path, metavar="FILE", help="Checkpoint of a run.")
        self.add_argument(
            "--config",
            action="append",
            metavar="FILE",
            help="Config or overlay, several in their order. Unless given: config.yaml of the checkpoint's run.",
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def build_parts(options: argparse.Namespace, overrides: Sequence[str]) -> PartsCLI:
    """Model and data of ``OwnOptions``' configs (or of the checkpoint's run) with overrides."""
    configs = options.config
    if not configs:
        if options.ckpt_path is None:
            raise ConfigError("give a --config, or a --ckpt_path in a run's folder")
        saved = options.ckpt_path.parent.parent / "config.yaml"
        if not saved.is_file():
            raise ConfigError(f"the run of {options.ckpt_path} has no {saved}; give its config with --config")
        configs = [str(saved)]
    return _make(PartsCLI, [*(f"--config={path}" for path in configs), *overrides], run=False)


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """A user's mistake is one line and exit status 2."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined.*")
    warnings.filterwarnings("ignore", message="Already found a `peft_config`.*")  # the critic's adapter beside the policy's
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor.*")  # nothing is done in place
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    try:
        yield
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


@mistakes_in_one_line()
def main(args: Sequence[str] | None = None) -> StepCLI:
    """Runs a command line (the process's own unless given)."""
    return _make(StepCLI, args, run=True)


def _make(kind: type[_CLI], args: Sequence[str] | None, run: bool) -> _CLI:
    # An abbreviated option would be taken for another. omegaconf+ resolves ${...} when all files and options are merged, so
    # that an override reaches every copy of a value.
    strict = {"parser_mode": "omegaconf+", "allow_abbrev": False, "exit_on_error": False}
    return kind(
        AgentModule,
        StepDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={**strict, **dict.fromkeys(StepCLI.subcommands(), strict)},
        trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
        args=list(args) if args is not None else None,
        run=run,
    )


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
