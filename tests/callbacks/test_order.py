"""The order of callbacks matters nowhere: in another one a run writes the same, and goes on from its checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steppo.checkpoints import read
from steppo.cli import SteppoCLI
from tests.cli_helpers import evaluations, run, same, weights

OPTIONS = [
    "--trainer.check_val_every_n_epoch=2",  # at the end of some iterations nobody validates
    "--rollout.max_environment_steps=100000",
    "--rollout.episodes_per_iteration=4",
    "--data.eval_tasks=4",
    "--transcripts.num_shown=1",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.filename=every-{epoch}",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.save_on_train_epoch_end=true",
    "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
    "--trainer.callbacks.monitor=val/return_mean",
    "--trainer.callbacks.patience=9",
]
# What measures time or memory, and a curve that is only drawn where no run before has left the same warm start.
OTHERS = ("seconds/", "per_second", "memory/", "warm_start/")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars that two runs have in common."""
    events = EventAccumulator(str(folder)).Reload()
    names = [name for name in events.Tags()["scalars"] if not any(part in name for part in OTHERS)]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record | {"seconds": 0} for record in history]


def outcome(folder: Path) -> dict[str, Any]:
    """What a run leaves behind, but for times and weights."""
    states = [read(folder / f"checkpoints/every-epoch={epoch}.ckpt") for epoch in range(3)]
    return {
        "evaluations": untimed(evaluations(folder)),
        "transcripts": (folder / "transcripts.jsonl").read_text(),
        "curves": curves(folder),
        "counters": [state["steppo"]["counters"] for state in states],
        "histories": [untimed(state["callbacks"]["EvaluationCallback"]["history"]) for state in states],
    }


def run_in_order(change: Callable[[list[Any]], object], folder: Path, *args: str) -> tuple[str, ...]:
    """A run that begins with its callbacks in another order; gives their names in it."""
    instantiate, seen = SteppoCLI.instantiate_trainer, []

    def instantiate_trainer(self: SteppoCLI, **kwargs: Any) -> Any:
        trainer = instantiate(self, **kwargs)
        change(trainer.callbacks)
        seen.extend(type(callback).__name__ for callback in trainer.callbacks)
        return trainer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SteppoCLI, "instantiate_trainer", instantiate_trainer)
        run(folder, *OPTIONS, *args)
    return tuple(seen)


def test_the_order_of_callbacks_matters_nowhere(tmp_path: Path) -> None:
    """One run as the config has it; another one reversed, that goes on shuffled."""
    plain, other = tmp_path / "plain", tmp_path / "other"
    orders = [
        run_in_order(lambda callbacks: None, plain, "--trainer.max_epochs=3"),
        run_in_order(list.reverse, other, "--trainer.max_epochs=2"),
        run_in_order(random.Random(1).shuffle, other, "--trainer.max_epochs=3", "--ckpt_path=last"),
    ]
    assert len(set(orders)) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert [record["iteration"] for record in evaluations(plain)] == [0, 2, 3]

    expected, found = outcome(plain), outcome(other)
    for name, wanted in expected.items():
        assert found[name] == wanted, name
    assert same(weights(other), weights(plain))
