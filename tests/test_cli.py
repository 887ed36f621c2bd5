"""Mistakes on the command line: one clear line, exit status 2, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from steppo.cli import main
from tests.cli_helpers import TOY

MISTAKES = {
    "no_command": ([], 'expected "subcommand" to be one of'),
    "unknown_command": (["train"], "invalid choice: 'train'"),
    "missing_file": (["fit", "--config", "nowhere.yaml"], "does not exist"),
    "missing_module": (["--data.source.env=nowhere.Env"], "No module named 'nowhere'"),
    "missing_class": (["--model.policy=steppo.models.Huge"], "has no attribute 'Huge'"),
    "wrong_class": (["--model.policy=steppo.contexts.StateContext"], "model.policy: "),
    "unknown_key": (["--model.loss.clip_hgih=0.3"], "unrecognized arguments: --loss.clip_hgih"),
    "unknown_argument": (["--model.advantag=1"], "did you mean 'advantage'?"),
    "unknown_option": (["--rollout.groupsize=3"], "unrecognized arguments: --rollout.groupsize"),
    "abbreviated_option": (["--rollout.group_siz=3"], "unrecognized arguments: --rollout.group_siz"),
    "wrong_type": (["--trainer.max_epochs=many"], "trainer.max_epochs: Expected a int. Got value: many"),
    "wrong_nested_type": (["--data.source.env.length=long"], "data.source.env.length: Expected a int. Got value: long"),
    "wrong_choice": (["--model.loss.ratio=word"], "model.loss.ratio: Expected a Literal['step', 'token']"),
    "sampling": (["--data.source.top_p=0.9"], "Option 'top_p' is not accepted"),
    "temperature": (["--rollout.temperature=0"], "temperature must be above 0"),
    "greedy_samples": (["--evaluation.samples=4"], "several samples need a temperature"),
    "no_critic": (["--model.critic=null"], "StepGAE needs values: give the model a critic"),
    "empty_split": (["--data.source.env.num_tasks=0"], "split 'train' of the environment is empty"),
    "unknown_split": (["--data.train_split=dev"], "no split 'dev'"),
    "too_long": (["--data.source.max_prompt_tokens=9999"], "more than the model's 512 positions"),
    "too_few_steps": (["--data.num_minibatches=5000"], "too few for 5000 minibatches"),
    "small_vocabulary": (["--model.policy.vocab_size=100"], "vocab_size must be at least 258"),
    "endless_schedule": (
        ["--trainer.max_epochs=-1", "--model.policy_optimizer.schedule=linear"],
        "needs trainer.max_epochs",
    ),
    "no_checkpoint": (["--ckpt_path=nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
    "no_model": (
        ["--model.policy=steppo.models.HFPolicy", "--model.policy.name_or_path=./nowhere"],
        "cannot load './nowhere'",
    ),
    "no_thread": (["--num_threads=0"], "num_threads"),
    "negative_rate": (["--model.policy_optimizer.lr=-1"], "lr must be at least 0"),
    "negative_clip": (["--model.loss.clip_low=-0.1"], "clip_low must be at least 0"),
    "half_precision": (["--trainer.precision=bf16-true"], "use 32-true, 64-true or bf16-mixed"),
    "overflow": (["--data.source.max_prompt_tokens=5", "--warm_start.updates=0"], "raise max_prompt_tokens"),
    "no_expert": (["--warm_start.actions=none"], "warm_start.actions"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args, message = MISTAKES[name]
    if args and args[0].startswith("--"):
        where = [f"--trainer.logger.init_args.save_dir={tmp_path}", f"--warm_start.cache_dir={tmp_path}"]
        args = ["fit", "--config", str(TOY), *where, *args]
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert len(errors[0]) < 520


def test_broken_yaml_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("rollout: [1, 2\n  group_size: }\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(broken)])
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_help_explains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for command, explained in (
        (["fit", "--help"], ("--rollout.group_size", "Episodes per task, from the same start", "--num_threads")),
        (["fit", "--model.help", "steppo.module.AgentModule"], ("Trust region of the ratio below 1", "max_grad_norm")),
        (["fit", "--data.help", "steppo.datamodule.StepDataModule"], ("Most tokens, padding included",)),
    ):
        with pytest.raises(SystemExit):
            main(command)
        text = " ".join(capsys.readouterr().out.split())
        assert all(words in text for words in explained)
