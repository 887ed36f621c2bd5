"""A callback that ends its own process at a chosen moment, for tests and benchmarks of what is on disk then."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from steppo import checkpoints


class KillAt(Callback):
    """Sends a signal to its own process at the n-th event of a phase, and counts the events of all phases.

    The event of ``start`` is that training starts. Events of ``rollout`` and ``evaluation`` are requests to the engine; of
    ``update``, the start of a batch, its optimizer step and its end; of ``checkpoint``, the middle of each file, its end,
    and its being in place.

    Args:
        phase: One of these.
        event: Which of the phase's events, from 1; 0 for none.
        signal_name: The signal.
        counts: Where the number of events of each phase is written at the end of the run.
    """

    def __init__(
        self, phase: str = "rollout", event: int = 0, signal_name: str = "SIGKILL", counts: str | None = None
    ) -> None:
        self.phase = phase
        self.event = event
        self.signal = signal.Signals[signal_name]
        self.counts = counts
        self.seen = {"start": 0, "rollout": 0, "update": 0, "evaluation": 0, "checkpoint": 0}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        engine = pl_module.data.source.scripted.engine
        submit, save, replace = engine.submit, torch.save, os.replace

        def submit_and_count(request: Any) -> None:
            self._count("rollout" if request.session_id.startswith("train/") else "evaluation")
            submit(request)

        def save_and_count(held: Any, *args: Any, **kwargs: Any) -> None:
            if not isinstance(held, dict) or "steppo" not in held:  # not a checkpoint
                return save(held, *args, **kwargs)
            whole, (file,) = io.BytesIO(), args
            save(held, whole)
            half = len(whole.getvalue()) // 2
            file.write(whole.getvalue()[:half])
            file.flush()
            self._count("checkpoint")
            file.write(whole.getvalue()[half:])

        def replace_and_count(source: Any, target: Any) -> None:
            ours = Path(target).suffix == ".ckpt"
            if ours:
                self._count("checkpoint")
            replace(source, target)
            if ours:
                self._count("checkpoint")

        engine.submit = submit_and_count
        checkpoints.torch.save = save_and_count
        checkpoints.os.replace = replace_and_count

    def on_train_start(self, *args: Any) -> None:
        self._count("start")

    def on_train_batch_start(self, *args: Any) -> None:
        self._count("update")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._count("update")

    def on_train_batch_end(self, *args: Any) -> None:
        self._count("update")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if self.counts:
            Path(self.counts).write_text("\n".join(f"{phase} {count}" for phase, count in self.seen.items()))

    def _count(self, phase: str) -> None:
        self.seen[phase] += 1
        if phase == self.phase and self.seen[phase] == self.event:
            os.kill(os.getpid(), self.signal)
