"""Runs of the real command line in process."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from steppo.checkpoints import iteration_checkpoints
from steppo.cli import SteppoCLI, main

TOY = Path(__file__).parent / "toy.yaml"
_WARM_STARTS = tempfile.TemporaryDirectory(prefix="steppo-tests-")  # one cache for all runs, as a user has it


_LIKE_TOY = {"env": "tests.toy_env.CorridorEnv", "context": "StateContext", "context.instructions": ""}
_LIKE_TOY |= {"max_prompt_tokens": "400", "max_new_tokens": "4", "num_slots": "8"}


def run(folder: Path, *args: str, command: str = "fit", config: Path = TOY) -> SteppoCLI:
    """Runs ``config`` with its results under ``folder``."""
    return main([command, "--config", str(config), *places(folder), *args])


def source_options(class_path: str) -> list[str]:
    """Options for another class than the toy's EnvSource with the same arguments."""
    return [f"--data.source={class_path}", *(f"--data.source.{name}={value}" for name, value in _LIKE_TOY.items())]


def places(folder: Path) -> list[str]:
    """Options that say where a run of the toy config writes."""
    return [f"--trainer.logger.init_args.save_dir={folder}", f"--warm_start.cache_dir={_WARM_STARTS.name}"]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``evaluation.jsonl``."""
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run."""
    return iteration_checkpoints(folder / "checkpoints")[-1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the last checkpoint, which holds nothing that could run code."""
    return torch.load(checkpoint(folder), weights_only=True)["state_dict"]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
