"""The command line's help."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from steppo.cli import main
from tests.cli_helpers import TOY


def test_help_explains_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for command, explained in (
        (["fit", "--help"], ("--rollout.group_size", "Episodes per task, from the same start", "--num_threads")),
        (["fit", "--model.help", "steppo.module.AgentModule"], ("Weight of the entropy bonus", "max_grad_norm")),
        (["fit", "--model.help", "steppo.module.AgentModule"], ("Class of the optimizer", "Importance weights of what")),
        (["fit", "--data.help", "steppo.datamodule.StepDataModule"], ("Most tokens, padding included",)),
    ):
        with pytest.raises(SystemExit):
            main(command)
        text = " ".join(capsys.readouterr().out.split())
        assert all(words in text for words in explained)


SOURCE = "--data.source"


@pytest.mark.parametrize(
    ("options", "place", "value"),
    [
        (
            [f"{SOURCE}.context.max_past_actions=3", f"{SOURCE}.context.max_past_actions=null"],
            "context.max_past_actions",
            None,
        ),
        ([f"{SOURCE}.worker_memory_mib=500", f"{SOURCE}.worker_memory_mib=null"], "worker_memory_mib", None),
        ([f"{SOURCE}.max_steps=5", f"{SOURCE}.init_args.max_steps=null"], "max_steps", None),
        (
            [f"{SOURCE}.renderer.template_kwargs={{a: 1}}", f"{SOURCE}.renderer.template_kwargs=null"],
            "renderer.template_kwargs",
            None,
        ),
        (
            [f'{SOURCE}.renderer.template_kwargs={{a: null, b: [null, true, 2], c: "it\'s\\n\\\\"}}'],
            "renderer.template_kwargs",
            {"a": None, "b": [None, True, 2], "c": "it's\n\\"},
        ),
        ([f"{SOURCE}.renderer.template_kwargs.a=null"], "renderer.template_kwargs", {"a": None}),
        ([f"{SOURCE}.context.instructions=None"], "context.instructions", "None"),
        (
            [f"{SOURCE}.env=tests.toy_env.FaultyEnv", f"{SOURCE}.env.fail_tasks=[a b, 'null']"],
            "env.fail_tasks",
            ["a b", "null"],
        ),
        (
            [f"{SOURCE}.env=tests.toy_env.FaultyEnv", f"{SOURCE}.env.fail_tasks=[a]", f"{SOURCE}.env.fail_tasks=null"],
            "env.fail_tasks",
            None,
        ),
    ],
)
def test_values_reach_classes_within_classes_as_they_are(
    options: list[str], place: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(TOY), *options, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["source"]["init_args"]
    for name in place.split("."):
        found = found.get("init_args", found)[name]
    assert found == value
