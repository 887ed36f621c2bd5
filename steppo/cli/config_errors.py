"""A user's mistake in one line: where and what, and what to do where that helps."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from steppo.cli.config import Component
from steppo.cli.config_types import parameters
from steppo.errors import ConfigError, SteppoError, in_short, located

# What Lightning offers and steppo does otherwise, and what to use.
_OTHERWISE = {
    "gradient_clip_val": "model.policy_optimizer.max_grad_norm and model.critic_optimizer.max_grad_norm clip gradients",
    "accumulate_grad_batches": "data.max_tokens_per_microbatch splits an update to fit into memory",
    "limit_train_batches": "an iteration makes data.update_epochs * data.num_minibatches updates",
    "max_steps": "trainer.max_epochs or rollout.max_environment_steps ends a run, with a whole iteration",
    "overfit_batches": "data.train_tasks learns from the first tasks only",
    "val_check_interval": "trainer.check_val_every_n_epoch says after how many iterations to evaluate",
}


def check_config(config: Mapping[str, Any]) -> None:
    """What names and types let pass: no model, a seed out of range, trainer options that do not apply.

    Args:
        config: Of one subcommand, merged.

    Raises:
        ConfigError: Where and what.
    """
    if missing := [name for name in ("data", "model") if config.get(name) is None]:
        raise ConfigError(
            f"there is no {' and no '.join(missing)}: give a whole experiment, such as --config configs/quickstart.yaml"
        )
    seed = config.get("seed_everything")
    if not isinstance(seed, bool | None) and not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything must be from 0 to {2**32 - 1}, not {seed}")
    trainer = config.get("trainer", {})
    for option, instead in _OTHERWISE.items():
        if trainer.get(option) not in (None, parameters(Trainer)[option][1]):
            raise ConfigError(f"trainer.{option} is not for steppo: {instead}")
    if trainer.get("check_val_every_n_epoch") == 0:
        raise ConfigError("trainer.check_val_every_n_epoch must be at least 1; trainer.limit_val_batches 0 turns it off")
    strategy = trainer.get("strategy", "auto")
    start = strategy.get("start_method", "popen") if isinstance(strategy, Component) else strategy
    if re.search("spawn|fork|notebook", str(start)):
        raise ConfigError("trainer.strategy must start processes by their command line: use ddp, not spawn or fork")
    sharded = isinstance(strategy, Component) and strategy.owner is ModelParallelStrategy
    if sharded and strategy.get("save_distributed_checkpoint", True):
        raise ConfigError("trainer.strategy: set save_distributed_checkpoint to false (one file per checkpoint)")


# ---- errors of the parser ----


def explain(error: Exception) -> str:
    """One line, and no longer than one can read."""
    text = str(error)
    if isinstance(error, MisconfigurationException) and "No supported gpu" in text:
        text = "trainer.accelerator: torch sees no GPU here; set it to cpu or auto"
    elif isinstance(error, ArgumentError):  # where, and the last of what it tried
        *where, text = re.split(r'Parser key "([^"]*)":', text)
        text = ": ".join([*(key.replace("init_args.", "") for key in where[1::2][-1:]), text.strip()])
    return in_short(text)


# ---- errors of components and of Lightning ----


def refusal(error: Exception) -> Exception:
    """What to show for an error in a constructor: steppo's own words, the parser's or Lightning's, or the line at fault."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    for cause in chain:
        if isinstance(cause, SteppoError | MisconfigurationException):
            return cause
    for cause in reversed(chain):
        if not _is_foreign(cause):
            return ConfigError(located(cause))
    return ArgumentError(None, str(error))


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """A run: where Lightning refuses to go on, or a file cannot be used, that is a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise ConfigError(f"cannot use {error.filename}: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:
        if not _is_foreign(error):
            raise
        raise ConfigError(str(error)) from error


def _is_foreign(error: BaseException) -> bool:
    """Raised by Lightning or the parser in so many words, not something that broke there."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    place, line = Path(frames[-1].filename).parts, frames[-1].line or ""
    return bool({"lightning", "jsonargparse"} & set(place)) and line.startswith("raise")
