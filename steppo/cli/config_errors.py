"""A user's mistake in one line: where and what, and what to do where that helps."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy

from steppo.cli.config import Component
from steppo.errors import ConfigError, SteppoError, located

_LONGEST_ERROR = 500

# What Lightning offers and steppo does otherwise: option -> values that change nothing, what to use.
_OTHERWISE: dict[str, tuple[set[str], str]] = {
    "gradient_clip_val": (
        {"None", "0", "0.0"},
        "gradients are clipped by model.policy_optimizer.max_grad_norm and model.critic_optimizer.max_grad_norm",
    ),
    "accumulate_grad_batches": ({"None", "1"}, "data.max_tokens_per_microbatch splits an update to fit into memory"),
    "limit_train_batches": ({"None", "1.0"}, "an iteration makes data.update_epochs * data.num_minibatches updates"),
    "max_steps": (
        {"-1"},
        "it could cut an iteration; trainer.max_epochs or rollout.max_environment_steps ends a run with a whole one",
    ),
    "overfit_batches": ({"None", "0", "0.0"}, "data.train_tasks learns from the first tasks only"),
    "val_check_interval": ({"None", "1.0"}, "trainer.check_val_every_n_epoch says after how many iterations to evaluate"),
    "limit_val_batches": ({"None", "0", "0.0", "1", "1.0"}, "data.eval_tasks is the size of the panel"),
    "limit_test_batches": ({"None", "0", "0.0", "1", "1.0"}, "data.eval_tasks is the size of the panel"),
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
    if (threads := config.get("num_threads")) is not None and threads < 1:
        raise ConfigError(f"num_threads must be at least 1, not {threads}")
    trainer = config.get("trainer", {})
    for option, (harmless, instead) in _OTHERWISE.items():
        if option in trainer and str(trainer[option]) not in harmless:  # as text: 1 is one batch, 1.0 all of them
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
    text = " ".join(str(error).split())
    if isinstance(error, MisconfigurationException) and "No supported gpu" in text:
        text = "trainer.accelerator: torch sees no GPU here; set it to cpu or auto"
    elif isinstance(error, ArgumentError):  # where, and the last of what it tried
        *where, text = re.split(r'Parser key "([^"]*)":', text)
        text = ": ".join([*(key.replace("init_args.", "") for key in where[1::2][-1:]), text.strip()])
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 4] + " ..."


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


def in_one_line(error: Exception) -> Exception:
    """The error of a run, as a ConfigError where Lightning refused to go on or a file could not be used; else itself."""
    if isinstance(error, OSError) and error.filename is not None:
        return ConfigError(f"cannot use {error.filename}: {error.strerror}")
    if isinstance(error, RuntimeError | ValueError) and _is_foreign(error):
        return ConfigError(str(error))
    return error


def _is_foreign(error: BaseException) -> bool:
    """Raised by Lightning or the parser in so many words, not something that broke there."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    place, line = Path(frames[-1].filename).parts, frames[-1].line or ""
    return bool({"lightning", "jsonargparse"} & set(place)) and line.startswith("raise")
