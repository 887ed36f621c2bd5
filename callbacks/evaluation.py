"""Plays a fixed panel of tasks and writes down how it went."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from steppo import results
from steppo.datamodule import run_seed
from steppo.distributed import gather, made_once, rank_and_world
from steppo.errors import ConfigError, RunError
from steppo.learner.credit import check_orders
from steppo.listeners import Evaluation, Listener, announce
from steppo.metrics import common_failure, info_figures, wilson_interval
from steppo.module import AgentModule
from steppo.rollouts import expert_action, random_action
from steppo.rollouts.players import Choose
from steppo.run_folder import RunTrainer, run_folder
from steppo.types import RolloutConfig, groups_of

_SUCCESS, _RETURN = "val/success_rate", "val/return_mean"
_RATE = ("success_rate", "success_low", "success_high")
_MEANS = ("return_mean", "steps_mean", "invalid_action_rate")
_SCRIPTS: dict[str, Choose] = {"expert": expert_action, "random": random_action}


class EvaluationCallback(Listener):
    """Evaluates whenever Lightning validates or tests, and in ``fit`` also before training and at its end; in ``fit`` never
    with ``trainer.limit_val_batches 0``.

    Each evaluation is a line of ``evaluation.jsonl`` in the run's folder, and ``val/...`` (``test/...``) metrics, which
    ModelCheckpoint and EarlyStopping can monitor. Listeners hear of it (``on_evaluation``). ``validate`` and ``test`` also
    write a result there: ``validate.json``, for ``python -m steppo.panel compare``, and ``validate.md``.

    Where the environment never says whether a task was solved there is no success rate, in no metric and in no record. If
    that is so in the run's first evaluation, callbacks that monitor ``val/success_rate`` monitor ``val/return_mean``.

    Without a healthy episode the means are unknown: ``null`` in the record and NaN in the metrics, to ModelCheckpoint the
    worst, to EarlyStopping no improvement.

    Args:
        samples: Episodes per task of the panel.
        temperature: Of sampling; 0 is greedy.
        before_training: Evaluate before the first iteration.
        player: Who plays in ``validate`` and ``test``: the policy, as it is in the checkpoint or untrained, or without any
            model the environment's expert, or random commands.

    Attributes:
        result: Of the last ``validate`` or ``test``.
    """

    def __init__(
        self,
        samples: int = 1,
        temperature: float = 0.0,
        before_training: bool = True,
        player: Literal["policy", "expert", "random"] = "policy",
    ) -> None:
        if samples < 1 or not 0 <= temperature < math.inf:
            raise ConfigError("evaluation: samples must be at least 1 and temperature at least 0 and finite")
        if samples > 1 and temperature == 0 and player != "random":
            raise ConfigError("evaluation: greedy episodes of a task are all the same; several samples need a temperature")
        self.samples = samples
        self.temperature = temperature
        self.before_training = before_training
        self.player = player
        self.history: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}
        self._checkpoint: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: AgentModule, stage: str) -> None:
        source = pl_module.data.source
        if self.player != "policy" and source.scripted is None:
            raise ConfigError(f"evaluation.player {self.player} needs an EnvSource; {type(source).__name__} plays by itself")

    def on_run_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        if trainer.ckpt_path is not None:
            self._write(trainer, self.history)  # what came after the checkpoint is played again
        begins = not self.history and not pl_module.counters.iterations
        if begins and self.before_training and cast(Any, trainer).limit_val_batches:
            self._evaluate_between(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        self._evaluate_and_log(trainer, pl_module, "validate")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        self._evaluate_and_log(trainer, pl_module, "test")

    def on_train_end(self, trainer: pl.Trainer, pl_module: AgentModule) -> None:
        if not cast(Any, trainer).limit_val_batches:
            return
        if not self.history or self.history[-1]["iteration"] != pl_module.counters.iterations:
            self._evaluate_between(trainer, pl_module)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: AgentModule, checkpoint: dict[str, Any]) -> None:
        """Before other callbacks take their states, which are kept by what they monitor."""
        history = checkpoint["callbacks"].get(self.state_key, {}).get("history", [])
        self._find_monitors(trainer, history)
        path = cast(RunTrainer, trainer).begins_from or Path(str(trainer.ckpt_path))
        monitor = _chosen_by(checkpoint, path.name)
        self._checkpoint = {
            "file": str(path),
            "iteration": checkpoint["steppo"]["counters"]["iterations"],
            "chosen_by": monitor,
            "chosen_on": history[-1].get("panel_sha256") if monitor and history else None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    def _evaluate_and_log(self, trainer: pl.Trainer, module: AgentModule, stage: str) -> None:
        metrics = self._evaluate(trainer, module, stage)
        metrics["step"] = float(module.counters.updates)  # the loggers' x axis
        module.log_dict(metrics, batch_size=1, sync_dist=True)

    def _evaluate_between(self, trainer: pl.Trainer, module: AgentModule) -> None:
        """Before the first iteration and after the last, when Lightning's own logging is not at work."""
        metrics = self._evaluate(trainer, module, "validate")
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    @staticmethod
    def _find_monitors(trainer: pl.Trainer, history: list[dict[str, Any]]) -> None:
        """Monitors of a rate that the first evaluation did not have take the return: what there is."""
        played = [record for record in history if record["episodes"]]
        if not played or played[0]["success_rate"] is not None:
            return
        callbacks: list[Any] = cast(Any, trainer).callbacks
        for callback in callbacks:
            if getattr(callback, "monitor", None) == _SUCCESS:
                callback.monitor = _RETURN
                rank_zero_info(
                    f"the environment does not say whether a task was solved: {type(callback).__name__} monitors {_RETURN} "
                    f"in place of {_SUCCESS}"
                )

    def _evaluate(self, trainer: pl.Trainer, module: AgentModule, stage: str) -> dict[str, float]:
        """Plays the panel, each rank its share, and writes the record."""
        panel = module.data.panel(stage)
        rank, world = rank_and_world()
        groups = groups_of(panel, self.samples)[rank::world]
        config = RolloutConfig(stage, run_seed(), self.temperature, module.counters.updates, self.player == "expert")
        sha256 = module.data.panel_sha256(stage)
        start = time.perf_counter()
        episodes, figures = module.play("evaluation", groups, config, _SCRIPTS.get(self.player))
        check_orders(episodes)
        if self.player != "policy" and not figures["episodes"]:
            raise RunError(f"evaluation.player {self.player}: no episode could be played: {common_failure(episodes)}")
        known = not math.isnan(figures["success_rate"])
        if not known and figures["episodes"] and any(before["success_rate"] is not None for before in self.history):
            # The environment does say: none of these was solved. What monitors the rate must find one.
            known, (low, high) = True, wilson_interval(0, figures["episodes"])
            figures |= {"success_rate": 0.0, "success_low": low, "success_high": high}
        means, by_label = info_figures(episodes, known)
        outcomes = results.outcomes_of(episodes, self.samples)
        golden, excess = made_once(lambda: (results.by_golden_steps(outcomes, known), results.excess_steps(outcomes)))
        record = {
            **({"player": self.player} if self.player != "policy" else {}),
            "iteration": module.counters.iterations,
            "updates": module.counters.updates,
            "environment_steps": module.counters.environment_steps,
            "split": module.data.splits[stage],
            "panel_sha256": sha256,
            "episodes": int(figures["episodes"]),
            "errors": int(figures["errors"]),
            "no_verdict": int(figures["no_verdict"]),
            "success_rate": figures["success_rate"] if known else None,
            "success_ci95": [figures["success_low"], figures["success_high"]] if known else None,
            **{name: None if math.isnan(figures[name]) else figures[name] for name in _MEANS},
            "seconds": max(gather(time.perf_counter() - start)),
            **({"info": means} if means else {}),
            **({"by_label": by_label} if by_label else {}),
            **({"excess_steps": excess, "by_golden_steps": golden} if golden else {}),
        }
        if record["errors"]:
            record["most_common_error"] = common_failure(episodes)
        self.history.append(record)
        self._write(trainer, [record], append=True)
        self._find_monitors(trainer, self.history)
        if trainer.state.fn != TrainerFn.FITTING:
            self._write_result(trainer, module, stage, record, outcomes)
        announce(trainer, "on_evaluation", Evaluation("test" if stage == "test" else "valid", tuple(episodes), record))
        names = [*(_RATE if known else ()), *_MEANS, "errors", "no_verdict"]
        by_name = {name: figures[name] for name in names} | {f"info/{name}": mean for name, mean in means.items()}
        prefix = "test/" if stage == "test" else "val/"
        metrics = {prefix + name: value for name, value in by_name.items()}
        if not figures["steps"]:  # some means are unknown
            callbacks: list[Any] = cast(Any, trainer).callbacks
            for callback in callbacks:
                monitor = str(getattr(callback, "monitor", None))
                if monitor.startswith((f"{prefix}success_", f"{prefix}info/")):
                    metrics.setdefault(monitor, math.nan)  # Lightning ends a run in which a callback misses what it monitors
                if isinstance(callback, EarlyStopping) and monitor in metrics:
                    callback.check_finite = False  # else it ends the run at a NaN
        return metrics

    def _write_result(
        self, trainer: pl.Trainer, module: AgentModule, stage: str, figures: dict[str, Any], outcomes: list[results.Outcome]
    ) -> None:
        data, counters = module.data, module.counters
        by_policy = self.player == "policy"
        protocol = {
            "player": self.player,
            "samples": self.samples,
            "temperature": self.temperature if by_policy else None,  # 0 is greedy
            "seed": run_seed() if self.temperature or not by_policy else None,
            **data.source.protocol(),
        }
        named = data.panels.get(stage)
        model = {
            "policy": type(module.policy).__name__,
            "base": module.policy.base_model(),
            "checkpoint": self._checkpoint,
            "iteration": counters.iterations,
            "updates": counters.updates,
            "environment_steps": counters.environment_steps,
            "identity": module.identity,
        }
        self.result = {
            "format": results.FORMAT,
            "stage": stage,
            "split": data.splits[stage],
            "panel": {
                "file": named.path if named else None,
                "sha256": figures["panel_sha256"],
                "version": data.source.version,
                "differences": named.played_otherwise(protocol) if named else [],
            },
            "protocol": protocol,
            "model": model if by_policy else None,
            "figures": figures,
            "episodes": outcomes,
        }
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            results.write(folder, stage, self.result)

    @staticmethod
    def _write(trainer: pl.Trainer, records: list[dict[str, Any]], append: bool = False) -> None:
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        path = folder / "evaluation.jsonl"
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if append:
                with open(path, "a") as file:
                    file.write(lines)
            else:
                part = path.with_name(f".{path.name}.part")
                part.write_text(lines)
                os.replace(part, path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}") from error


def _chosen_by(checkpoint: dict[str, Any], name: str) -> str | None:
    """What a ModelCheckpoint monitors that wrote a file of that name as the best so far."""
    for state in checkpoint["callbacks"].values():
        best = state.get("best_model_path") if isinstance(state, dict) else None
        if best and Path(best).name == name and state.get("monitor"):
            return state["monitor"]
    return None
