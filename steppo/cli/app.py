"""The command line: a LightningCLI whose every component is swapped by config."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TextIO, TypeVar, cast

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric import Fabric
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from callbacks import (
    EvaluationCallback,
    IterationCheckpoint,
    QuantizationCallback,
    RolloutCallback,
    StepProgressBar,
    TranscriptCallback,
    WarmStartCallback,
)
from steppo.checkpoints import CheckpointIO, iteration_checkpoints, read
from steppo.cli.config import complete, merged_config
from steppo.cli.config_errors import check_config, explain, refusal, refusals_in_one_line
from steppo.cli.config_files import read_command_line
from steppo.cli.config_types import Settings
from steppo.cli.resuming import beginning, logger_arguments
from steppo.cli.stopping import STOPPED, ends_on_sigterm
from steppo.datamodule import StepDataModule
from steppo.distributed import require_equal
from steppo.errors import ConfigError, SteppoError
from steppo.gateway.source import AgentSource  # noqa: F401 (configs name it by its last name)
from steppo.module import AgentModule
from steppo.paths import user_path
from steppo.run_folder import RunTrainer, held

CALLBACKS: dict[str, Any] = {
    "warm_start": WarmStartCallback,
    "evaluation": EvaluationCallback,
    "checkpoint": IterationCheckpoint,
    "rollout": RolloutCallback,
    "quantization": QuantizationCallback,
    "transcripts": TranscriptCallback,
    "progress": StepProgressBar,
}
SECTIONS = Settings(
    {
        "seed_everything": bool | int,
        "num_threads": PositiveInt | None,
        "ckpt_path": str | None,
        "trainer": Settings(RunTrainer),
        "model": AgentModule,
        "data": StepDataModule,
        **{name: Settings(callback) for name, callback in CALLBACKS.items()},
    }
)

_CLI = TypeVar("_CLI", bound="SteppoCLI")


class _Parser(LightningArgumentParser):
    """Writes what it has read without another check, which takes as long as the reading."""

    def dump(self, cfg: Any, *args: Any, **kwargs: Any) -> str:
        return super().dump(cfg, *args, **kwargs | {"skip_validation": True})

    def save(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        super().save(cfg, *args, **kwargs | {"skip_validation": True})


class SaveConfig(SaveConfigCallback):
    """Keeps the merged config in the run's folder, once it is known to be the same in all processes."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
            require_equal({f"{name} in its config": value for name, value in config.items()})
        super().setup(trainer, pl_module, stage)


class SteppoCLI(LightningCLI):
    """Adds sections with names of their own for steppo's callbacks: overlays reach them by name.

    ``--ckpt_path last`` is the newest checkpoint of the newest run folder. Where ``fit`` is given that one, by ``last`` or
    by its path, it continues in the same folder; any other checkpoint starts a new one. A run that was stopped before its
    first checkpoint begins again.
    """

    commands: tuple[str, ...] = ("fit", "validate", "test")
    trainer: RunTrainer
    # Held back from Lightning, which would read hyper-parameters from it, and from what a run keeps as its config.
    _ckpt_path: str | None = None
    _checkpoint: Path | None = None
    _folder: Path | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads", type=PositiveInt | None, help="CPU threads of torch; part of what makes a run repeatable."
        )
        for name, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, name)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Nothing predicts. Checkpoints are always read as weights only."""
        known = LightningCLI.subcommands()
        return {name: known[name] | {"weights_only", "verbose"} for name in SteppoCLI.commands}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning's, of the one config that files and options make; what is wrong is said in one line."""
        command, layers, flags = read_command_line(sys.argv[1:] if args is None else args, self.commands)
        words = [command] if command else []
        if not any("help" in flag or flag == "-h" for flag in flags):
            config = merged_config(layers, SECTIONS)
            check_config(config)
            config = complete(config)
            self._ckpt_path = config.pop("ckpt_path", None)
            trainer = config.setdefault("trainer", {})
            if trainer.get("logger", True) in (None, True):
                place = {"save_dir": trainer.get("default_root_dir") or "."}
                trainer["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": place}
            # All in quotes: the parser takes more text for numbers than YAML does.
            words += ["--config", yaml.safe_dump(config, default_style='"', sort_keys=False)]
        self.config = parser.parse_args([*words, *flags])

    def fit(self, **kwargs: Any) -> None:
        """Lightning calls this in place of the trainer's."""
        with self._run(keeps_checkpoints=self.config_init.fit.checkpoint.enabled):
            self.trainer.fit(**kwargs)

    def validate(self, **kwargs: Any) -> None:
        """As ``fit``; the progress bar prints the results."""
        with self._run():
            self.trainer.validate(**kwargs, verbose=False)

    def test(self, **kwargs: Any) -> None:
        """As ``validate``."""
        with self._run():
            self.trainer.test(**kwargs, verbose=False)

    @contextmanager
    def _run(self, keeps_checkpoints: bool = False) -> Iterator[None]:
        folder = self.trainer.own_log_dir() if cast(Any, rank_zero_only).rank == 0 else None
        place = None if folder is None else Path(folder)
        with ends_on_sigterm(self.trainer, self._say_stopped), refusals_in_one_line(), held(place, keeps_checkpoints):
            yield

    def _say_stopped(self) -> None:
        folder = self.trainer.own_log_dir() if self.subcommand == "fit" else None
        newest = iteration_checkpoints(Path(folder) / "checkpoints")[-1:] if folder is not None else []
        advice = f"; a fit continues with --ckpt_path {newest[0]}" if newest else ""
        _say(f"stopped by SIGTERM{advice}", sys.stderr)

    @property
    def _options(self) -> Namespace:
        return self.config[self.subcommand] if self.subcommand else self.config

    def before_instantiate_classes(self) -> None:
        config = self._options
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        if config.trainer.enable_progress_bar is False:
            config.trainer.enable_progress_bar, config.progress.enabled = None, False
        player = config.evaluation.player
        if player != "policy" and self.subcommand == "fit":
            raise ConfigError(f"evaluation.player {player} is for validate and test: fit evaluates what it trains")
        if player != "policy" and self._ckpt_path is not None:
            raise ConfigError(f"evaluation.player {player} asks no policy: leave --ckpt_path out, or the player")
        is_told = self._ckpt_path == "last" and cast(Any, rank_zero_only).rank != 0  # what rank 0 finds: RunTrainer
        if self._ckpt_path is not None and not is_told:
            path, folder = self._checkpoint, self._folder = beginning(self._ckpt_path, config, self.subcommand == "fit")
            if path is not None:
                read(path, mmap=True)  # before games are made and models are built
            if folder is not None:
                _say(f"Continuing {folder} from {path.name if path else 'its start: it has no checkpoint yet'}")
            else:
                _say(f"Checkpoint: {path}")

    def instantiate_classes(self) -> None:
        """As Lightning's; what a component refuses is said in its own words, not the parser's."""
        logger = logger_arguments(self._options) or Namespace(version=None)
        version = logger.version
        if version is None and self._folder is not None:
            logger.version = self._folder.name
        try:
            super().instantiate_classes()
        except Exception as error:
            raise refusal(error) from None
        finally:
            logger.version = version  # the config that is saved is good for another run
        if self.subcommand:
            self.trainer.is_scripted = self._options.evaluation.player != "policy"
        if self._checkpoint is not None:
            self.config_init[self.subcommand].ckpt_path = str(self._checkpoint)
            self.trainer.begins_from = self._checkpoint

    def instantiate_trainer(self, **kwargs: Any) -> RunTrainer:
        """As Lightning's, but without its default ModelCheckpoint and with checkpoints that are written whole."""
        config = self.config_init[self.subcommand].trainer
        given = config.callbacks if isinstance(config.callbacks, list | None) else [config.callbacks]
        wanted = config.enable_checkpointing is not False
        config.callbacks = [callback for callback in given or [] if wanted or not isinstance(callback, Checkpoint)]
        if not any(isinstance(callback, Checkpoint) for callback in config.callbacks):
            kwargs["enable_checkpointing"] = False
        if config.max_time is not None:  # Lightning's own timer would stop within an iteration
            config.callbacks.append(Timer(config.max_time, interval="epoch"))
            config.max_time = None
        self.config_init[self.subcommand].checkpoint.enabled = wanted
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, RunTrainer)
        trainer.numbered = self._folder
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointIO()
        return trainer


class PartsCLI(SteppoCLI):
    """Makes the model and the data of a config, and no trainer: for commands other than ``train.py``.

    Takes the configs and options of ``train.py fit``, the ``config.yaml`` of a run's folder among them. Lightning keeps what
    they make together, as plain data, in ``config_dump``.
    """

    commands = ()

    def before_instantiate_classes(self) -> None:
        self._ckpt_path = None
        self.config.trainer.logger = self.config.trainer.callbacks = None
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Nothing is run."""

    def build_models(
        self, fabric: Fabric, checkpoint: dict[str, Any] | None, tokenizer_texts: Callable[[], list[str]] = list
    ) -> None:
        """Makes the weights, to be asked and not trained: those of a checkpoint, if there is one."""
        module: AgentModule = self.model
        self.config_init.quantization.apply(module, fabric.device, checkpoint)
        module.gradient_checkpointing = False  # it would forbid the engine's cache
        module.build_models(tokenizer_texts if checkpoint is None else list)  # that has its tokenizer
        fabric.strategy.precision.convert_module(module)
        if checkpoint is not None:
            module.take(checkpoint)
        module.to(fabric.device).eval()


def own_options(prog: str, description: str, example: str) -> argparse.ArgumentParser:
    """The options of a command of its own; ``parse_known_args`` leaves those of the config."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [options] [any option of train.py fit]",
        description=description,
        epilog=f"example:\n  {example}\n\nAll options of a config: python train.py fit --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--ckpt_path", type=user_path, metavar="FILE", help="Checkpoint of a run.")
    config_help = "Config or overlay, several in their order. Unless given: config.yaml of the checkpoint's run."
    parser.add_argument("--config", action="append", metavar="FILE", help=config_help)
    return parser


def build_parts(options: argparse.Namespace, overrides: Sequence[str]) -> PartsCLI:
    """Model and data of ``own_options``' configs (or of the checkpoint's run) with overrides."""
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
def errors_in_one_line() -> Iterator[None]:
    """A user's mistake is one line and exit status 2."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*IterableDataset. has .__len__. defined.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # The states of callbacks that monitor a return for want of a success rate: EvaluationCallback finds them again.
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`.*val/return_mean")
    warnings.filterwarnings("ignore", message="Already found a `peft_config`.*")  # the critic's adapter beside the policy's
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor.*")  # nothing is done in place
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated.*")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    try:
        yield
    except (SteppoError, ArgumentError, MisconfigurationException, OmegaConfBaseException, UnpicklingError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        raise SystemExit(2) from None


@errors_in_one_line()
def main(args: Sequence[str] | None = None) -> SteppoCLI:
    """Runs a command line (the process's own unless given)."""
    try:
        return _make(SteppoCLI, args, run=True)
    except SystemExit as end:
        if args is None and end.code == STOPPED:  # to take the interpreter down could last seconds more
            sys.stdout.flush()
            os._exit(STOPPED)
        raise


def _make(kind: type[_CLI], args: Sequence[str] | None, run: bool) -> _CLI:
    strict = {"allow_abbrev": False, "exit_on_error": False, "parser_mode": "omegaconf"}
    return kind(
        AgentModule,
        StepDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=RunTrainer,
        auto_configure_optimizers=False,  # the module's own: one group each for policy and critic
        seed_everything_default=0,
        parser_class=_Parser,
        save_config_callback=SaveConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={**strict, **dict.fromkeys(SteppoCLI.commands, strict)},
        trainer_defaults={"num_sanity_val_steps": 0, "enable_model_summary": False},
        args=list(args) if args is not None else None,
        run=run,
    )


@rank_zero_only
def _say(line: str, file: TextIO | None = None) -> None:
    """Prints a line once, whatever the number of processes."""
    print(line, file=file, flush=True)
