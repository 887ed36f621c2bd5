"""The DataModule: tasks in, episodes into the step buffer, updates out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from steppo.batch import Microbatch
from steppo.buffer import StepBuffer
from steppo.distributed import made_once, rank_and_world, require_equal
from steppo.errors import ConfigError, require_at_least
from steppo.minibatches import Minibatches, ShuffledSteps
from steppo.packing import Packer, PaddedPacker
from steppo.panels import Panel, hashed, panel_sha256
from steppo.progress import phase
from steppo.rollouts import AsyncSettings, AsyncSource, EpisodeSource
from steppo.samplers import ShuffledSampler, TaskSampler
from steppo.types import Group, Task, groups_of

_CORPUS_TASKS = 256


def run_seed() -> int:
    """The seed that ``seed_everything`` set."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32))


class StepDataModule(pl.LightningDataModule):
    """Replays online rollouts from a step buffer, one whole update at a time.

    Args:
        source: Where episodes come from.
        sampler: Which tasks an iteration plays; shuffled unless given.
        packer: Steps -> token batches; one padded row per step unless given.
        update_epochs: Passes over an iteration's steps.
        num_minibatches: Updates per pass.
        minibatches: Which steps each of them learns from; shuffled one by one unless given.
        max_tokens_per_microbatch: Most tokens, padding included, in one forward and backward pass.
        train_split: Split to learn from.
        eval_split: Split of the panel that ``fit`` and ``validate`` play.
        test_split: Split of the panel that ``test`` plays.
        train_tasks: Learn from the first so many tasks of the split only.
        eval_tasks: Size of a panel: the first so many tasks of the split.
        eval_panel: File of the panel that ``fit`` and ``validate`` play in place of ``eval_split`` and ``eval_tasks``. If
            tasks are missing or have changed nothing is played.
        test_panel: As ``eval_panel``, for ``test``.
        asynchronous: Play in other processes while this one learns.
    """

    def __init__(
        self,
        source: EpisodeSource,
        sampler: TaskSampler | None = None,
        packer: Packer | None = None,
        update_epochs: int = 1,
        num_minibatches: int = 4,
        minibatches: Minibatches | None = None,
        max_tokens_per_microbatch: int = 16384,
        train_split: str = "train",
        eval_split: str = "valid",
        test_split: str = "test",
        train_tasks: int | None = None,
        eval_tasks: int = 100,
        eval_panel: str | None = None,
        test_panel: str | None = None,
        asynchronous: AsyncSettings | None = None,
    ) -> None:
        super().__init__()
        require_at_least(1, self, update_epochs=update_epochs, num_minibatches=num_minibatches)
        require_at_least(1, self, max_tokens_per_microbatch=max_tokens_per_microbatch)
        require_at_least(1, self, train_tasks=train_tasks, eval_tasks=eval_tasks)
        self.source = AsyncSource(source, asynchronous) if asynchronous is not None else source
        self.sampler = sampler or ShuffledSampler()
        self.buffer = StepBuffer(
            packer or PaddedPacker(),
            max_tokens_per_microbatch,
            update_epochs,
            num_minibatches,
            minibatches or ShuffledSteps(),
        )
        self._named_splits = {"train": train_split, "validate": eval_split, "test": test_split}
        self._panel_files = {"validate": eval_panel, "test": test_panel}
        self.train_tasks = train_tasks
        self.eval_tasks = eval_tasks
        self._splits: dict[str, list[Task]] = {}
        self._tasks: dict[str, list[Task]] = {}
        self._sha256: dict[str, str] = {}

    @cached_property
    def panels(self) -> dict[str, Panel]:
        """The panels that files name, by stage: commands that evaluate nothing do not need the files."""
        return {stage: Panel.read(path) for stage, path in self._panel_files.items() if path is not None}

    @property
    def splits(self) -> dict[str, str]:
        """Which split ``train``, ``validate`` and ``test`` take their tasks from."""
        return self._named_splits | {stage: panel.split for stage, panel in self.panels.items()}

    def tasks(self) -> list[Task]:
        """The tasks to learn from."""
        return self._split("train", self.train_tasks)

    def panel(self, stage: str) -> list[Task]:
        """The tasks that ``validate`` or ``test`` plays."""
        if stage in self.panels and stage not in self._tasks:
            self._tasks[stage] = self.panels[stage].choose(self.source)
        return self._split(stage, self.eval_tasks)

    def panel_sha256(self, stage: str) -> str:
        """``Panel.sha256`` of these tasks, once they are prepared."""
        if stage not in self._sha256:
            named = self.panels.get(stage)
            tasks = named.tasks if named else hashed(self.source, self.panel(stage))
            self._sha256[stage] = panel_sha256(self.source.version, tasks)
        return self._sha256[stage]

    def next_groups(self, num_tasks: int, group_size: int) -> list[Group]:
        """This rank's share of the next iteration's groups; their ids count over all ranks."""
        rank, world = rank_and_world()
        drawn = self.sampler.next(self.tasks(), num_tasks, run_seed())
        named = json.dumps([task.id for task in drawn]).encode()
        require_equal({"tasks drawn by the sampler": hashlib.sha256(named).hexdigest()})
        return groups_of(drawn, group_size)[rank::world]

    def groups_at(self, cursor: int, num_tasks: int, group_size: int) -> list[Group]:
        """What ``next_groups`` gives when the sampler is there, to all ranks together."""
        return groups_of(self.sampler.drawn(self.tasks(), cursor, num_tasks, run_seed()), group_size)

    def tokenizer_texts(self) -> list[str]:
        """Texts of the training environment: of its first tasks, which is enough for a tokenizer."""
        if self._from_checkpoint:  # it brings its tokenizer
            return []
        return made_once(lambda: self.source.tokenizer_texts(self.tasks()[:_CORPUS_TASKS]))

    def prepare_data(self) -> None:
        """Has the environment make what the tasks need, once per machine."""
        evaluating = self.trainer is not None and not self.trainer.training
        tasks = []
        if not evaluating:
            tasks = self.tasks()
        elif not self._from_checkpoint and not getattr(self.trainer, "is_scripted", False):
            tasks = self.tasks()[:_CORPUS_TASKS]  # a tokenizer may be made of their words
        stage = "test" if self.trainer is not None and self.trainer.testing else "validate"
        panel = self.panel(stage)
        both = sorted({task.id for task in tasks} & {task.id for task in panel})
        if both and self.splits[stage] != self.splits["train"]:
            rank_zero_warn(
                f"{len(both)} of the {len(panel)} tasks of the panel ({self.splits[stage]}) are learned from "
                f"({self.splits['train']}), such as {both[0]}: their success says nothing of unseen tasks"
            )
        with phase(self.trainer, "preparing tasks") as advance:
            self.source.prepare([*tasks, *panel], advance)

    def setup(self, stage: str) -> None:
        """A panel must be what its file says, and ranks must agree on what they play before they share it among them."""
        played = "test" if stage == "test" else "validate"
        if (named := self.panels.get(played)) is not None:
            named.require_same(self.source, self.panel(played))
            for difference in named.played_otherwise(self.source.protocol()):
                rank_zero_warn(f"the panel {named.path} is played otherwise than it was made for: {difference}")
        if rank_and_world()[1] > 1:
            tasks = self.tasks() if stage == "fit" else []
            panel = self.panel(played)
            listed = json.dumps(
                [[(task.id, dict(task.data)) for task in split] for split in (tasks, panel)],
                default=lambda value: type(value).__name__,
                skipkeys=True,
            )
            require_equal({"tasks": hashlib.sha256(listed.encode()).hexdigest(), "seed": run_seed()})

    @property
    def _from_checkpoint(self) -> bool:
        return getattr(self.trainer, "begins_from", None) is not None

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_Replay(self), batch_size=None, generator=torch.Generator())  # draws nothing from the run's own

    def val_dataloader(self) -> DataLoader:
        """One empty item: the evaluation callback plays the panel, so that Lightning's schedule is the schedule."""
        return DataLoader(TensorDataset(torch.zeros(1)), batch_size=None, generator=torch.Generator())

    test_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.sampler.cursor, "source": self.source.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sampler.cursor = state_dict["cursor"]
        self.source.load_state_dict(state_dict["source"])

    def teardown(self, stage: str) -> None:
        self.source.close()

    def on_exception(self, exception: BaseException) -> None:
        self.source.close()  # there is no teardown then

    def _split(self, stage: str, count: int | None) -> list[Task]:
        """Read once: always the same list, which samplers rely on."""
        if stage not in self._tasks:
            name = self.splits[stage]
            if name not in self._splits:
                self._splits[name] = list(self.source.tasks(name))
            if not self._splits[name]:
                raise ConfigError(f"split {name!r} of the environment is empty; give it tasks or name another split")
            self._tasks[stage] = self._splits[name][:count]
        return self._tasks[stage]


class _Replay(IterableDataset):
    """The buffer's updates. Its length is fixed by the config, as Lightning asks for it before the first rollout."""

    def __init__(self, data: StepDataModule) -> None:
        self._data = data

    def __len__(self) -> int:
        return self._data.buffer.updates_per_iteration

    def __iter__(self) -> Iterator[list[Microbatch]]:
        return self._data.buffer.updates(run_seed(), cast(pl.Trainer, self._data.trainer).current_epoch)
