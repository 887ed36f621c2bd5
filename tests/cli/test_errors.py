"""Mistakes on the command line and in configs: one clear line, exit status 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steppo.advantages import StepGAE
from steppo.cli import main
from steppo.models import TinyPolicy
from tests.cli_helpers import TOY

CALLBACKS, LOGGERS = "lightning.pytorch.callbacks", "lightning.pytorch.loggers"
ENV, POLICY = "data.source.env", "model.policy"
BROKEN = f"--{ENV}=tests.broken_env.BrokenEnv"
TEXTWORLD = f"--{ENV}=steppo.envs.TextWorldEnv"
HF = f"--{POLICY}=steppo.models.HFPolicy"
WEIGHTED = "--data.sampler=steppo.samplers.WeightedSampler"

# Whole command lines.
COMMANDS = {
    "no_command": ([], "there is no command: give one of fit, validate, test"),
    "unknown_command": (["train"], "there is no command 'train'; there are fit, validate, test"),
    "no_config": (["fit"], "there is no data and no model: give a whole experiment, such as --config configs/quickstart"),
    "command_misspelt": (["fti"], "there is no command 'fti'; did you mean 'fit'?"),
    "config_without_value": (["fit", "--config"], "--config needs a value"),
    "option_without_value": (["fit", "--rollout.group_size", "--num_threads=1"], "--rollout.group_size needs a value"),
    "word_too_many": (["fit", str(TOY)], "is neither an option (--name value) nor the value of one"),
    "no_such_config": (["fit", "--config", "nowhere.yaml"], "cannot read config nowhere.yaml: No such file or directory"),
    "config_is_a_folder": (["fit", f"--config={TOY.parent}"], f"cannot read config {TOY.parent}: Is a directory"),
    "print_config_of_no_file": (["fit", "--print_config", "--config=nowhere.yaml"], "cannot read config nowhere.yaml"),
    "overlay_alone": (["fit", "-c", str(TOY.parent.parent / "configs/trainer/cpu.yaml")], "there is no data and no model"),
}

# Options after a config that works.
OPTIONS = {
    "class_after_its_argument": (
        ["--model.advantage.gamma", "0.9", "--model.advantage=GRPO"],
        "--model.advantage.gamma would be lost: model.advantage is another class later; name the class first",
    ),
    # class paths
    "missing_module": (
        [f"--{ENV}=nowhere.Env"],
        "--data.source.env: cannot import nowhere.Env: No module named 'nowhere'",
    ),
    "missing_class": (
        [f"--{POLICY}=steppo.models.TinyPolic"],
        "model.policy: steppo.models.TinyPolic is no Policy that can be made; did you mean 'TinyPolicy'?",
    ),
    "no_class_path": (
        [f"--{POLICY}=TinyPoly"],
        "model.policy: TinyPoly is no Policy that can be made; did you mean 'TinyPolicy'?",
    ),
    "empty_class_path": (["--model.advantage="], "--model.advantage must be Advantage, not null"),
    "a_private_class": (
        ["--data.source.engine=_Silent"],
        "data.source.engine: _Silent is no Engine that can be made; there are ",
    ),
    "a_module": ([f"--{ENV}=steppo.envs"], "steppo.envs is no Env that can be made; there are "),
    "a_function": (
        ["--model.advantage=steppo.advantages.whiten"],
        "steppo.advantages.whiten is no Advantage that can be made; there are ",
    ),
    "a_critic_for_an_advantage": (
        ["--model.advantage=steppo.models.SharedCritic"],
        "model.advantage: steppo.models.SharedCritic is no Advantage that can be made; there are ",
    ),
    "a_context_for_a_policy": (
        [f"--{POLICY}=StateContext"],
        "StateContext is no Policy that can be made; there are HFPolicy, ",
    ),
    "abstract_class": (
        ["--model.advantage=steppo.advantages.Advantage"],
        "steppo.advantages.Advantage is no Advantage that can be made; there are ",
    ),
    "another_model": (
        ["--model=steppo.models.TinyPolicy"],
        "model: steppo.models.TinyPolicy is no AgentModule",
    ),
    # names
    "section": (["--rollouts.group_size=3"], "--rollouts is no setting; did you mean rollout?"),
    "key_of_section": (["--rollout.groupsize=3"], "did you mean rollout.group_size?"),
    "abbreviation": (["--rollout.group_siz=3"], "--rollout.group_siz is no setting of RolloutCallback"),
    "trainer_key": (["--trainer.max_epoch=3"], "did you mean trainer.max_epochs?"),
    "key_of_model": (["--model.advantag=1"], "did you mean model.advantage?"),
    "key_of_settings": (
        ["--model.loss.clip_hgih=0.3"],
        "clip_hgih is no setting of ClippedLoss; did you mean model.loss.clip_high",
    ),
    "key_of_component": ([f"--{ENV}.lenght=3"], "--data.source.env.lenght is no setting of CorridorEnv; did you mean "),
    "key_of_another_class": (
        ["--data.source.top_p=0.9"],
        "--data.source.top_p is no setting of EnvSource; there are env, context, engine",
    ),
    "key_of_a_class_without": (
        ["--model.correction=NoCorrection", "--model.correction.level=step"],
        "--model.correction.level is no setting of NoCorrection, which has none",
    ),
    "optimizer_of_lightning": (["--optimizer=torch.optim.SGD"], "--optimizer is no setting; there are seed_everything"),
    # types
    "string_for_int": (["--trainer.max_epochs=many"], "--trainer.max_epochs must be int or null, not many"),
    "float_for_int": (["--rollout.group_size=2.5"], "--rollout.group_size must be int, not 2.5"),
    "bool_for_int": (["--data.update_epochs=true"], "--data.update_epochs must be int, not true"),
    "string_for_bool": (
        ["--evaluation.before_training=maybe"],
        "--evaluation.before_training must be bool, not maybe",
    ),
    "int_for_bool": (["--model.critic.detach=1"], "--model.critic.detach must be bool, not 1"),
    "string_for_nested_int": ([f"--{ENV}.length=long"], "--data.source.env.length must be int, not long"),
    "nothing_for_float": (["--model.loss.clip_low=null"], "--model.loss.clip_low must be float, not null"),
    "nothing_for_int": (["--data.num_minibatches=null"], "--data.num_minibatches must be int, not null"),
    "list_for_mapping": (
        [TEXTWORLD, f"--{ENV}.settings=[1]"],
        "--data.source.env.settings must be dict[str, Any] or null, not [1]",
    ),
    "number_for_settings": (
        ["--model.loss=3"],
        "--model.loss must be PolicyLoss, not 3",
    ),
    "choice": (["--model.loss.ratio=word"], "--model.loss.ratio must be step or token, not word"),
    "choice_of_section": (["--warm_start.actions=none"], "--warm_start.actions must be random or expert, not none"),
    "schedule": (["--model.policy_optimizer.schedule=cos"], "schedule must be constant or linear or cosine, not cos"),
    "seed": (["--seed_everything=-1"], "seed_everything must be from 0 to 4294967295, not -1"),
    "seed_type": (["--seed_everything=abc"], "--seed_everything must be bool or int, not abc"),
    "threads": (["--num_threads=0"], "--num_threads must be PositiveInt or null, not 0"),
    # engines elsewhere
    "engine_nowhere": (
        ["--data.source.engine=VLLMEngine"],
        "VLLMEngine: give either python, of the environment that has vLLM, or",
    ),
    "engine_without_python": (
        ["--data.source.engine=VLLMEngine", "--data.source.engine.python=nowhere/bin/python"],
        "VLLMEngine: there is no nowhere/bin/python; docs/vllm.md says how to make its environment",
    ),
    "engine_far_away": (
        ["--data.source.engine=VLLMEngine", "--data.source.engine.urls=[http://10.0.0.1:8000]"],
        "http://10.0.0.1:8000 is not on this machine",
    ),
    # ranges
    "group_size": (["--rollout.group_size=0"], "group_size must be at least 1"),
    "tasks": (["--rollout.episodes_per_iteration=-3"], "rollout: episodes_per_iteration must be at least 1, not -3"),
    "temperature": (["--rollout.temperature=0"], "temperature must be above 0"),
    "infinite_temperature": (["--rollout.temperature=.inf"], "temperature must be above 0 and finite"),
    "greedy_samples": (["--evaluation.samples=4"], "several samples need a temperature"),
    "evaluation_temperature": (["--evaluation.temperature=-1"], "evaluation: samples must be at least 1 and temperature"),
    "warm_start_lr": (["--warm_start.lr=0"], "warm_start: lr must be above 0 and finite, not 0.0"),
    "warm_start_updates": (["--warm_start.updates=-1"], "warm_start: updates and held_out must be at least 0"),
    "progress": (["--progress.every_n_iterations=0"], "progress.enabled false shows nothing"),
    "lr": (["--model.policy_optimizer.lr=-1"], "an optimizer's lr must be above 0 and finite, not -1.0"),
    "lr_zero": (["--model.critic_optimizer.lr=0"], "an optimizer's lr must be above 0 and finite, not 0.0"),
    "lr_infinite": (["--model.policy_optimizer.lr=.inf"], "lr must be above 0 and finite, not inf"),
    "warmup": (["--model.policy_optimizer.warmup_updates=-1"], "an optimizer's warmup_updates must be at least 0"),
    "moved": (["--model.loss.kl_coef=1"], "(CHANGELOG.md tells what was renamed)"),
    "clip": (["--model.loss.clip_low=-0.1"], "clip_low must be at least 0 and finite, not -0.1"),
    "clip_all": (["--model.loss.clip_low=1.5"], "clip_low must be at most 1"),
    "dual_clip": (
        ["--model.loss.ratio=token", "--model.loss.dual_clip=1.1"],
        "dual_clip must be 0, or above",
    ),
    "kl": (["--model.objective.kl_coef=-1"], "kl_coef must be at least 0"),
    "gamma": (["--model.advantage.gamma=1.5"], "StepGAE: gamma must be from 0 to 1, not 1.5"),
    "lambda": (
        ["--model.advantage=steppo.advantages.TokenGAE", "--model.advantage.gae_lambda=-1"],
        "TokenGAE: gae_lambda must be from 0 to 1, not -1.0",
    ),
    "critic_warmup": (["--model.critic_warmup_updates=-1"], "critic_warmup_updates must be at least 0"),
    "no_skip": (["--model.max_skipped_updates=0"], "max_skipped_updates at least 1"),
    "no_critic": (["--model.critic=null"], "StepGAE needs values: give the model a critic"),
    "groups": (
        ["--model.advantage=tests.cli.test_errors.GroupCredit"],
        "GroupCredit compares episodes of a group: set rollout",
    ),
    "heads": ([f"--{POLICY}.num_heads=3"], "num_heads must be even, and hidden_size a multiple"),
    "no_heads": ([f"--{POLICY}.num_heads=0"], "TinyPolicy: num_heads must be at least 1, not 0"),
    "vocabulary": ([f"--{POLICY}.vocab_size=100"], "vocab_size must be at least 258"),
    "prompt_length": (["--data.source.max_prompt_tokens=0"], "EnvSource: max_prompt_tokens must be at least 1, not 0"),
    "ticks": (["--data.source.env_ticks=-1"], "EnvSource: env_ticks must be at least 0, not -1"),
    "slots": (["--data.source.num_slots=0"], "EnvSource: num_slots must be at least 1, not 0"),
    "timeout": (["--data.source.env_timeout=0"], "env_timeout must be above 0 seconds"),
    "reward_for_nonsense": (["--data.source.invalid_penalty=-1"], "invalid_penalty must be from 0 to 1e+12, not -1.0"),
    "engine_batch": (["--data.source.engine.max_batch_size=0"], "HFEngine: max_batch_size must be at least 1, not 0"),
    "past_actions": (["--data.source.context.max_past_actions=-1"], "max_past_actions must be at least 0, not -1"),
    "past_turns": (
        ["--data.source.context=steppo.rendering.WindowContext", "--data.source.context.max_past_turns=-1"],
        "WindowContext: max_past_turns must be at least 0, not -1",
    ),
    "train_tasks": (["--data.train_tasks=0"], "StepDataModule: train_tasks must be at least 1, not 0"),
    "eval_tasks": (["--data.eval_tasks=0"], "StepDataModule: eval_tasks must be at least 1, not 0"),
    "weights": ([WEIGHTED, "--data.sampler.weights={'*': -1}"], "weight of '*' must be at least 0 and finite, not -1.0"),
    "no_weights": ([WEIGHTED], "data.sampler: WeightedSampler needs weights"),
    # TextWorld
    "challenge": (
        [TEXTWORLD, f"--{ENV}.challenge=chess"],
        "--data.source.env.challenge must be coin_collector or",
    ),
    "setting": ([TEXTWORLD, f"--{ENV}.settings.rooms=4"], "coin_collector has no setting rooms; it has level"),
    "level": ([TEXTWORLD, f"--{ENV}.settings.level=301"], "coin_collector's setting level must be one of 1 to 300, not 301"),
    "level_type": ([TEXTWORLD, f"--{ENV}.settings.level=high"], "must be one of 1 to 300, not 'high'"),
    "rooms": (
        [TEXTWORLD, f"--{ENV}.challenge=cooking", f"--{ENV}.settings.go=5"],
        "cooking's setting go must be one of 1, 6, 9, 12, not 5",
    ),
    "goal": (
        [TEXTWORLD, f"--{ENV}.challenge=simple", f"--{ENV}.settings.goal=long"],
        "simple's setting goal must be one of detailed, brief, none, not 'long'",
    ),
    "games": ([TEXTWORLD, f"--{ENV}.num_valid=-1"], "a split holds 0 to 1,000,000 games"),
    "splits_of_textworld": (
        [TEXTWORLD, "--data.eval_split=dev"],
        "TextWorldEnv has no split 'dev'; it has train, valid, test",
    ),
    # tasks, models, checkpoints
    "empty_split": ([f"--{ENV}.num_tasks=0"], "split 'train' of the environment is empty"),
    "unknown_split": (["--data.train_split=dev"], "no split 'dev'; it has train, valid, test"),
    "no_folder": (
        [HF, f"--{POLICY}.name_or_path=./nowhere"],
        "there is no folder './nowhere'; give a folder with a model, or",
    ),
    "no_name": ([HF, f"--{POLICY}.name_or_path="], "there is no folder ''"),
    "no_model_in_folder": ([HF, f"--{POLICY}.name_or_path={TOY.parent}"], "Unrecognized model in"),
    "model_of_the_hub": (
        [HF, f"--{POLICY}.name_or_path=nobody/nothing"],
        "cannot load 'nobody/nothing': We couldn't connect",
    ),
    "name_missing": ([HF], "model.policy: HFPolicy needs name_or_path"),
    "no_checkpoint": (["--ckpt_path=nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
    "endless_schedule": (
        ["--trainer.max_epochs=-1", "--model.policy_optimizer.schedule=linear", "--warm_start.updates=0"],
        "the linear schedule needs trainer.max_epochs",
    ),
    # the trainer
    "accelerator": (["--trainer.accelerator=quantum"], "invalid accelerator name: `accelerator='quantum'`"),
    "tpu": (["--trainer.accelerator=tpu"], "Requirement 'torch_xla"),
    "strategy": (["--trainer.strategy=dpp"], "invalid strategy name: `strategy='dpp'`"),
    "devices": (["--trainer.devices=0"], "`Trainer(devices=0)` value is not a valid input"),
    "precision": (["--trainer.precision=8"], "--trainer.precision must be 64 or 32 or 16 or transformer-engine or"),
    "half_precision": (["--trainer.precision=16-true"], "use 32-true, 64-true or bf16-mixed"),
    "epochs": (["--trainer.max_epochs=-5"], "`max_epochs` must be a non-negative integer or -1"),
    "time": (["--trainer.max_time=soon"], "not a valid duration. Expected a string in the format DD:HH:MM:SS"),
    "profiler": (["--trainer.profiler=nonsense"], "it can only be one of ['simple', 'advanced', 'pytorch', 'xla']"),
    "gradient_clip_val": (["--trainer.gradient_clip_val=1"], "max_grad_norm clip gradients"),
    "branch_tokens": (
        ["--data.packer=PrefixTreePacker", "--data.packer.branch_tokens=-1"],
        "PrefixTreePacker: branch_tokens must be at least 0, not -1",
    ),
    "accumulate_grad_batches": (["--trainer.accumulate_grad_batches=2"], "data.max_tokens_per_microbatch splits an update"),
    "limit_train_batches": (
        ["--trainer.limit_train_batches=1"],
        "an iteration makes data.update_epochs * data.num_minibatches",
    ),
    "max_steps": (["--trainer.max_steps=3"], "trainer.max_epochs or rollout.max_environment_steps ends a run"),
    "max_steps_of_an_iteration": (["--trainer.max_steps=2"], "trainer.max_steps is not for steppo"),
    "max_steps_none": (["--trainer.max_steps=0"], "trainer.max_steps is not for steppo"),
    "overfit_batches": (["--trainer.overfit_batches=1"], "data.train_tasks learns from the first tasks only"),
    "val_check_interval": (["--trainer.val_check_interval=0.5"], "trainer.check_val_every_n_epoch says"),
    "check_val": (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch must be at least 1"),
    "wandb": (["--trainer.logger=false", "--trainer.logger=WandbLogger"], "pip install -U 'wandb"),
    "logger": (
        [f"--trainer.logger={LOGGERS}.CVSLogger"],
        "--trainer.logger: lightning.pytorch.loggers.CVSLogger is no Logger that can be made; did you mean 'CSVLogger'",
    ),
    "callback": ([f"--trainer.callbacks+={CALLBACKS}.EarlyStoping"], "did you mean 'EarlyStopping'?"),
    "callback_argument": (
        [f"--trainer.callbacks+={CALLBACKS}.EarlyStopping"],
        "trainer.callbacks.0: EarlyStopping needs monitor",
    ),
    "no_callback": (
        ["--trainer.callbacks+=steppo.advantages.StepGAE"],
        "--trainer.callbacks.0: steppo.advantages.StepGAE is no Callback",
    ),
    # a user's own class
    "broken_constructor": ([BROKEN, f"--{ENV}.where=constructor"], "KeyError: 'broken in constructor' ("),
    "broken_tasks": ([BROKEN, f"--{ENV}.where=tasks"], "BrokenEnv.tasks('train'): KeyError: 'broken in tasks' ("),
    "broken_prepare": ([BROKEN, f"--{ENV}.where=prepare"], "BrokenEnv.prepare: KeyError: 'broken in prepare' ("),
}

# These build a model or play: a few seconds each.
LATE = {
    "too_long": (["--data.source.max_prompt_tokens=9999"], "10003 is more than the model's 512 positions"),
    "overflow": (["--data.source.max_prompt_tokens=5"], "raise max_prompt_tokens"),
    "too_few_episodes": (
        ["--data.minibatches=WholeEpisodes", "--data.num_minibatches=9"],
        "an iteration's episodes are 8, too few for 9 minibatches of whole episodes: lower data.num_minibatches, or raise",
    ),
    "too_few_groups": (
        ["--data.minibatches=WholeGroups", "--rollout.group_size=4", "--data.num_minibatches=3"],
        "an iteration's groups are 2, too few for 3 minibatches of whole groups: lower data.num_minibatches, or raise",
    ),
    "no_minibatches": (
        ["--data.minibatches=Shuffled"],
        "data.minibatches: Shuffled is no Minibatches that can be made; did you mean 'ShuffledSteps'?",
    ),
    "too_few_steps": (["--data.num_minibatches=5000"], "at most 8 steps is too small for data.num_minibatches, 5000"),
    "no_weight": ([WEIGHTED, "--data.sampler.weights={'*': 0}"], "WeightedSampler: every task has weight 0"),
    "broken_reset": ([BROKEN], "rollout.min_valid_fraction is 0.5); the most common error: KeyError: 'broken in reset' ("),
    "limit_val_batches": (["--trainer.limit_val_batches=0.5"], "increase the `limit_val_batches`"),
    "monitor": (
        [f"--trainer.callbacks+={CALLBACKS}.EarlyStopping", "--trainer.callbacks.monitor=val/succes_rate"],
        "Early stopping conditioned on metric `val/succes_rate` which is not available",
    ),
}

# Overlays on a config that works; "{here}" is the file's own path.
FILES = {
    "empty": ("", "config {here} must hold sections such as 'rollout:'"),
    "list": ("- a\n- b\n", "config {here} must hold sections"),
    "text": ("hello\n", "config {here} must hold sections"),
    "broken": ("rollout: [1, 2\n  group_size: }\n", "config {here}, line 2: expected ',' or ']', but got ':'"),
    "tab": ("rollout:\n\tgroup_size: 2\n", "config {here}, line 2: found character '\\t'"),
    "binary": (bytes(range(256)), "config {here} is not a text file"),
    "twice": (
        "rollout: {group_size: 2}\nrollout: {temperature: 2}\n",
        "config {here}, line 2: rollout is there a second time",
    ),
    "top_level": ("rollouts: {group_size: 2}\n", "config {here}, line 1: rollouts is no setting; did you mean rollout?"),
    "section_key": (
        "warm_start: {update: 2}\n",
        "line 1: warm_start.update is no setting of WarmStartCallback; did you mean warm_start.updates?",
    ),
    "keyed_by_command": (
        "fit: {rollout: {group_size: 2}}\n",
        "line 1: fit is no setting; there are seed_everything, num_threads",
    ),
    "nested_key": (
        "model: {init_args: {advantages: {class_path: a.B}}}\n",
        "line 1: model.advantages is no setting of AgentModule; did you mean model.advantage?",
    ),
    "deep_key": (
        "data: {init_args: {source: {init_args: {env: {init_args: {lenght: 3}}}}}}\n",
        "did you mean data.source.env.length?",
    ),
    "settings_key": (
        "model: {init_args: {loss: {clip_hgih: 3}}}\n",
        "line 1: model.loss.clip_hgih is no setting of ClippedLoss; did you mean model.loss.clip_high?",
    ),
    "logger_key": (
        f"trainer: {{logger: {{class_path: {LOGGERS}.TensorBoardLogger, init_args: {{savedir: x}}}}}}\n",
        "trainer.logger.savedir is no setting of TensorBoardLogger; did you mean trainer.logger.save_dir?",
    ),
    "init_args_key": (
        "data: {init_arg: {num_minibatches: 3}}\n",
        "data.init_arg is no setting of StepDataModule; there are source, sampler",
    ),
    "list_for_section": ("rollout: [1, 2]\n", "line 1: rollout must be a mapping of settings, not [1, 2]"),
    "only_an_empty_section": ("evaluation:\n", "line 1: evaluation must be a mapping of settings, not null"),
    "nothing_for_section": ("evaluation:\nnum_threads: 1\n", "line 1: evaluation must be a mapping of settings, not null"),
    "list_for_model": ("model: [1]\n", "line 1: model must be AgentModule, not [1]"),
    "moved": (
        "model:\n  init_args:\n    loss: {kl: reward}\n",
        "line 3: model.loss.kl is no setting of ClippedLoss",
    ),
    "list_for_settings": (
        "model: {init_args: {loss: [1]}}\n",
        "line 1: model.loss must be PolicyLoss, not [1]",
    ),
    "nothing_for_model": ("model: null\n", "line 1: model must be AgentModule, not null"),
    "nothing_for_policy": (
        "model: {init_args: {policy: null}}\n",
        "line 1: model.policy must be Policy, not null",
    ),
    "nothing_for_int": ("rollout: {group_size: null}\n", "line 1: rollout.group_size must be int, not null"),
    "nothing_for_text": (
        "data: {init_args: {source: {init_args: {context: {init_args: {instructions: null}}}}}}\n",
        "data.source.context.instructions must be str, not null",
    ),
    "nothing_for_setting": (
        "model: {init_args: {objective: {kl_coef: null}}}\n",
        "model.objective.kl_coef must be float, not null",
    ),
    "bool_in_quotes": (
        "evaluation: {before_training: 'maybe'}\n",
        "evaluation.before_training must be bool, not maybe",
    ),
    "not_a_number": (
        "model: {init_args: {policy_optimizer: {lr: .nan}}}\n",
        "an optimizer's lr must be above 0 and finite, not nan",
    ),
    "interpolation": (
        "rollout: {group_size: '${.nothing}'}\n",
        "Interpolation key '.nothing' not found (resolved to 'rollout.nothing') full_key: rollout.group_size",
    ),
    "interpolation_of_another_type": (
        "rollout: {group_size: '${rollout.temperature}', temperature: 1.5}\n",
        "rollout.group_size: Expected a <class 'int'>. Got value: 1.5",
    ),
    "cycle": (
        "rollout: {group_size: '${.episodes_per_iteration}', episodes_per_iteration: '${.group_size}'}\n",
        "Recursive interpolation",
    ),
    "open_interpolation": (
        "rollout: {group_size: '${.nothing'}\n",
        "mismatched input '<EOF>' expecting {BRACKET_OPEN, INTER_CLOSE, '.'} full_key: rollout.group_size",
    ),
    "environment_variable": (
        "rollout: {group_size: '${oc.env:NOT_SET_AT_ALL}'}\n",
        "Environment variable 'NOT_SET_AT_ALL' not found",
    ),
}


class GroupCredit(StepGAE):
    """Credit that compares the episodes of a group."""

    needs_groups = True


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command line that must fail and gives the one line that it says."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert len(errors[0]) <= len("error: ") + 500
    return errors[0]


def fit(folder: Path, *args: str) -> list[str]:
    """A short run with the toy config."""
    short = ["--warm_start.updates=0", "--evaluation.before_training=false", "--trainer.max_epochs=1"]
    where = [f"--trainer.logger.init_args.save_dir={folder}", f"--warm_start.cache_dir={folder}/cache"]
    return ["fit", "--config", str(TOY), *where, *short, *args]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, message = COMMANDS[name]
    assert message in refused(args, capsys)


@pytest.mark.parametrize("name", [*OPTIONS, *LATE])
def test_options(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at import
    args, message = (OPTIONS | LATE)[name]
    assert message in refused(fit(tmp_path, *args), capsys)


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = FILES[name]
    path = tmp_path / "overlay.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(fit(tmp_path, "--config", str(path)), capsys)
    assert message.replace("{here}", str(path)) in line


def test_folders_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    below = tmp_path / "file" / "x"
    assert f"cannot use {below}: Not a directory" in refused(fit(tmp_path, f"--trainer.logger.save_dir={below}"), capsys)
    without = ["--trainer.logger=false", f"--trainer.default_root_dir={below}"]
    assert f"cannot use {below}/runs/version_0: Not a directory" in refused(fit(tmp_path, *without), capsys)
    games = [TEXTWORLD, f"--{ENV}.cache_dir={below}"]
    assert f"cannot write games to {below}" in refused(fit(tmp_path, *games), capsys)


def test_weights_that_were_cut_off(tiny_policy: TinyPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_policy.export(tmp_path / "model", merge=False)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refused(fit(tmp_path, HF, f"--{POLICY}.name_or_path={tmp_path}/model"), capsys)
    assert "/model': SafetensorError: Error while deserializing header: incomplete metadata" in line


def test_an_error_in_a_users_class_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(fit(tmp_path, BROKEN, f"--{ENV}.where=constructor"), capsys)
    number = line.rpartition("broken_env.py:")[2].rstrip(")")
    source = Path(__file__).parents[1].joinpath("broken_env.py").read_text().splitlines()
    assert "raise KeyError" in source[int(number) - 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch sees no GPU here; set it to cpu or auto" in refused(fit(tmp_path, "--trainer.accelerator=gpu"), capsys)


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is known to be a user's mistake is cut down to a line."""
    monkeypatch.setattr("steppo.datamodule.StepDataModule.next_groups", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(fit(tmp_path))


def test_the_last_of_two_equal_options_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(fit(tmp_path, "--rollout.group_size=1", "--rollout.group_size=0"), capsys)
    assert "group_size must be at least 1" in line
