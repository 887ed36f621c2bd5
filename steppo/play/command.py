"""The command line of ``python -m steppo.play``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from rich.console import Console

from steppo.batch import Segment
from steppo.checkpoints import read
from steppo.cli import PartsCLI, build_parts, errors_in_one_line, own_options
from steppo.datamodule import run_seed
from steppo.errors import ConfigError, RunError
from steppo.metrics import EpisodeStatistics
from steppo.module import AgentModule
from steppo.packing import PaddedPacker
from steppo.play.show import Human, Quit, Show
from steppo.rollouts import EnvSource, Player, ScriptedPlayer, expert_action, random_action
from steppo.rollouts.players import Choose
from steppo.types import Group, RolloutConfig, Step, Task

_NO_LIMIT = 2**31


@errors_in_one_line()
def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line (the process's own unless given)."""
    parser = own_options(
        "python -m steppo.play",
        "Watch the policy of a checkpoint play, or an expert, or random actions; or play yourself.",
        "python -m steppo.play --ckpt_path runs/quickstart/version_0/checkpoints/best.ckpt --episodes 3\n"
        "  python -m steppo.play --config configs/quickstart.yaml --player human --data.source.env.settings.level 2",
    )
    parser.add_argument("--player", choices=("policy", "expert", "random", "human"), default="policy")
    parser.add_argument("--split", help="Split of the tasks; the config's eval_split unless given.")
    parser.add_argument("--task", metavar="ID_OR_INDEX", help="Play this task; the split's first ones unless given.")
    parser.add_argument("--episodes", type=int, default=1, help="How many to play.")
    parser.add_argument("--temperature", type=float, default=0.0, help="Of the policy's sampling; 0 is greedy.")
    options, overrides = parser.parse_known_args(args)
    if options.episodes < 1 or options.temperature < 0:
        raise ConfigError("--episodes must be at least 1 and --temperature at least 0")
    checkpoint = read(options.ckpt_path) if options.ckpt_path else None
    parts = build_parts(options, overrides)
    source = parts.datamodule.source.scripted
    if source is None:
        name = type(parts.datamodule.source).__name__
        raise ConfigError(f"play needs an EnvSource; {name} has no environment to show")
    split = options.split or parts.datamodule.splits["validate"]
    tasks = _tasks(source.tasks(split), split, options.task, options.episodes)
    source.num_slots = source.num_workers = 1  # one episode at a time
    console = Console(highlight=False)
    try:
        _prepare(console, source, tasks)
        value: Callable[[Step], float] | None = None
        autocast: AbstractContextManager = nullcontext()
        if checkpoint is not None or options.player == "policy":
            trainer = parts.config_dump["trainer"]
            fabric = Fabric(accelerator=trainer["accelerator"], devices=1, precision=trainer["precision"])
            _load(console, parts, checkpoint, fabric)
            value = _value(parts.model, fabric) if checkpoint is not None else None
            autocast = fabric.autocast()
        else:
            source.bind_script()
        choosers: dict[str, Choose] = {"expert": expert_action, "random": random_action, "human": Human(console)}
        choose = choosers.get(options.player)
        player = ScriptedPlayer(choose, source.write) if choose is not None else None
        config = RolloutConfig("play", run_seed(), options.temperature, want_expert=options.player == "expert")
        name = options.player + (f", temperature {config.temperature:g}" if player is None else "")
        show = Show(console, name, lambda step: source.renderer.decode_action(step.action_ids), value)
        with autocast:
            _play(source, tasks, config, player, show)
    except Quit:
        console.print("left")
    except KeyboardInterrupt:
        console.print("interrupted")
        raise SystemExit(130) from None
    finally:
        source.close()


def _tasks(tasks: Sequence[Task], split: str, wanted: str | None, episodes: int) -> list[Task]:
    """What to play: one task so many times, or the first tasks of the split."""
    if not tasks:
        raise ConfigError(f"split {split!r} of the environment is empty")
    if wanted is None:
        return [tasks[number % len(tasks)] for number in range(episodes)]
    by_name = {str(number): task for number, task in enumerate(tasks)} | {task.id: task for task in tasks}
    if wanted not in by_name:
        hint = f"give an index below {len(tasks)} or an id like {tasks[0].id}"
        raise ConfigError(f"split {split!r} has no task {wanted!r}; {hint}")
    return [by_name[wanted]] * episodes


def _prepare(console: Console, source: EnvSource, tasks: Sequence[Task]) -> None:
    with console.status("preparing tasks") as status:
        source.prepare(tasks, lambda done, total: status.update(f"preparing tasks, {done} of {total}"))


def _load(console: Console, parts: PartsCLI, checkpoint: dict[str, Any] | None, fabric: Fabric) -> None:
    """Builds the run's models, as they are in the checkpoint if there is one, and hands the policy to the source."""
    data, source = parts.datamodule, parts.datamodule.source.scripted

    def tokenizer_texts() -> list[str]:
        _prepare(console, source, data.tasks())
        return data.tokenizer_texts()

    if checkpoint is None:
        console.print("untrained: there is no --ckpt_path", style="yellow")
    parts.build_models(fabric, checkpoint, tokenizer_texts)
    source.bind(parts.model.policy)
    source.load_weights(parts.model.policy.inference_weights(), 0)


def _value(module: AgentModule, fabric: Fabric) -> Callable[[Step], float] | None:
    """The critic, asked about the prompt of a step."""
    critic = module.critic
    if critic is None:
        return None

    @torch.no_grad()
    def value(step: Step) -> float:
        prompt = Segment(step.prompt_ids, np.zeros(0, dtype=np.int32))
        ((_, batch),) = PaddedPacker().pack([prompt], _NO_LIMIT)
        batch = module.transfer_batch_to_device(batch, fabric.device, 0)
        hidden = module.policy.hidden(batch) if critic.needs_policy_hidden else None
        return float(critic.values(batch, batch.value_at_N, hidden))

    return value


def _play(source: EnvSource, tasks: Sequence[Task], config: RolloutConfig, player: Player | None, show: Show) -> None:
    statistics = EpisodeStatistics()
    error = ""
    for number, task in enumerate(tasks):
        show.opening(task)
        for (episode,) in source.collect([Group(number, task, first=number)], config, player, show.turn):
            show.ending(episode)
            statistics.update(episode)
            error = episode.error
    figures = statistics.compute()
    if figures["episodes"] == 0:
        raise RunError(f"no episode could be played: {error}")
    if len(tasks) > 1:
        show.summary(figures)
