"""Lets people see what the agent does: episodes in files, a few in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from steppo.distributed import gather, gather_to_first
from steppo.errors import require_at_least
from steppo.learner import Experience, ReplayStatistics
from steppo.listeners import Evaluation, Listener
from steppo.module import AgentModule
from steppo.run_folder import RunTrainer, run_folder
from steppo.transcripts import TranscriptWriter, episode_records, info_text
from steppo.types import Episode


class TranscriptCallback(Listener):
    """Writes episodes to ``transcripts.jsonl`` and ``transcripts.html`` (a page to browse) in the run's folder.

    At each evaluation some episodes also go to TensorBoard, as text and as a figure of values, advantages and rewards. For
    these the critic is asked and credit is assigned among them; other episodes of an evaluation have neither. Whole prompts
    are by far the most of what there is to write: a few episodes have them, all have observations and actions.

    Args:
        train_episodes: Training episodes to write per iteration, the first ones of the plan; all unless given.
        prompts: How many episodes of an iteration, and of an evaluation, have the prompts of their steps written: the first.
        num_shown: Episodes of an evaluation to show: a success, a failure, then in the panel's order.
        enabled: Write anything at all.
    """

    def __init__(
        self, train_episodes: int | None = None, prompts: int = 8, num_shown: int = 4, enabled: bool = True
    ) -> None:
        require_at_least(0, "transcripts", train_episodes=train_episodes, prompts=prompts, num_shown=num_shown)
        self.train_episodes = train_episodes
        self.prompts = prompts
        self.num_shown = num_shown
        self.enabled = enabled
        self._writer: TranscriptWriter | None = None

    def on_experience(
        self, trainer: pl.Trainer, pl_module: AgentModule, experience: Experience, replay: ReplayStatistics
    ) -> None:
        if not self.enabled:
            return
        most, counters = self.train_episodes, pl_module.counters
        episodes = [episode for episode in experience.episodes if most is None or episode.order < most]
        played_at = counters.updates - pl_module.data.buffer.updates_per_iteration
        with pl_module.timed("transcripts"):
            common: dict[str, Any] = {"kind": "train", "iteration": counters.iterations, "updates": played_at}
            records = episode_records(
                episodes, pl_module.policy.tokenizer, experience, replay, prompts=self.prompts, **common
            )
            self._write(trainer, common, records)

    def on_evaluation(self, trainer: pl.Trainer, pl_module: AgentModule, evaluation: Evaluation) -> None:
        if not self.enabled:
            return
        episodes, kind, counters = evaluation.episodes, evaluation.split, pl_module.counters
        with pl_module.timed("transcripts"):
            shown = shown_orders(episodes, self.num_shown)
            asked = shown and not cast(RunTrainer, trainer).is_scripted
            chosen = [episode for episode in episodes if episode.order in shown]
            scored = pl_module.learner.score_episodes(chosen) if asked else None
            common: dict[str, Any] = {"kind": kind, "iteration": counters.iterations, "updates": counters.updates}
            records = episode_records(episodes, pl_module.policy.tokenizer, scored, prompts=self.prompts, **common)
            by_order = {record["order"]: record for record in self._write(trainer, common, records)}
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    for number, order in enumerate(shown):
                        tag = f"{kind}_episodes/{number}"
                        logger.experiment.add_text(tag, as_text(by_order[order]), counters.updates)
                        logger.experiment.add_figure(tag, as_figure(by_order[order]), counters.updates, close=False)

    def _write(self, trainer: pl.Trainer, common: dict[str, Any], mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Writes all ranks' records, in logical order, where there is a place for them; they are on rank 0 only."""
        records = sorted((record for part in gather_to_first(mine) for record in part), key=lambda record: record["order"])
        folder = run_folder(trainer)
        if folder is not None and trainer.is_global_zero:
            self._writer = self._writer or TranscriptWriter(folder)
            self._writer.write(common["kind"], common["iteration"], records)
        return records


def shown_orders(episodes: Sequence[Episode], count: int) -> list[int]:
    """Orders of the episodes to show, over all ranks: the first success, the first failure, then as they come.

    Broken episodes and those without a step are not shown.
    """
    candidates = [episode for episode in episodes if episode.steps and not episode.stop_reason.failed]
    mine = [(episode.order, episode.success) for episode in candidates]
    played = sorted((pair for part in gather(mine) for pair in part), key=lambda pair: pair[0])
    first = [next((order for order, success in played if success is wanted), None) for wanted in (True, False)]
    orders = dict.fromkeys([order for order in first if order is not None] + [order for order, _ in played])
    return list(orders)[:count]


def as_text(record: dict[str, Any]) -> str:
    """An episode as a block of Markdown that takes nothing in it for markup."""
    lines = [_headline(record)]
    for number, step in enumerate(record["steps"]):
        invalid = "" if step["action_valid"] else "  (invalid)"
        agent = f", {step['agent']}" if "agent" in step else ""
        lines += ["", f"--- step {number}{agent}", step["observation"], f"> {step['action']}{invalid}"]
        figures = [f"{name} {step[name]:.3g}" for name in ("value", "advantage", "reward") if step[name] is not None]
        lines += ["  ".join(figures), *([info_text(step["info"])] if "info" in step else [])]
    if record["error"]:
        lines += ["", record["error"]]
    text = "\n".join(lines).encode("utf-8", "replace").decode()
    return "\n".join("    " + line for line in text.splitlines())


def as_figure(record: dict[str, Any]) -> Figure:
    """Value, advantage and reward of each step, above its action: what is not known is left out."""
    steps = record["steps"]
    names = [name for name in ("value", "advantage", "reward") if any(step[name] is not None for step in steps)]
    labels = [_plain(step["action"], 20) for step in steps]
    # Margins in inches; a layout engine would draw everything twice.
    bottom = 0.3 + 0.045 * max(map(len, labels), default=0)
    width, height = min(max(5.0, 0.55 * len(steps)), 20.0), bottom + 0.35 + 1.1 * max(len(names), 1)
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.75 / width, bottom / height, 1 - 0.15 / width, 1 - 0.35 / height, hspace=0.12)
    axes = figure.subplots(max(len(names), 1), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=False):
        heights = [step[name] or 0.0 for step in steps]
        colours = ["#2a6fbb" if height >= 0 else "#c8502d" for height in heights]
        if name == "value":
            axis.plot(range(len(steps)), heights, marker="o", color="#2a6fbb")
        else:
            axis.bar(range(len(steps)), heights, color=colours, width=0.6)
        axis.axhline(0, color="grey", linewidth=0.6)
        axis.set_ylabel(name, fontsize=9)
        axis.tick_params(labelsize=8)
    figure.align_ylabels(axes)
    axes[-1].set_xticks(range(len(steps)), labels, rotation=35, ha="right", fontsize=8, parse_math=False)
    axes[0].set_title(_plain(_headline(record), 100), fontsize=9, parse_math=False)
    return figure


def _headline(record: dict[str, Any]) -> str:
    result = "no verdict" if record["success"] is None else "success" if record["success"] else "failure"
    total = "unknown" if record["return"] is None else f"{record['return']:.3g}"
    return f"{record['task']}, iteration {record['iteration']}: {result}, return {total}, {record['stop_reason']}"


def _plain(text: str, longest: int) -> str:
    """Text that any font can show on one line."""
    shown = "".join(char if char.isascii() and char.isprintable() else "?" for char in " ".join(text.split()))
    return shown if len(shown) <= longest else shown[: longest - 1] + "~"
