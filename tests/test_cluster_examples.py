"""The jobs for clusters in ``examples/`` are well formed, and train.py understands what they give it."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from steppo.cli import SteppoCLI, main

ROOT = Path(__file__).parent.parent
SLURM, KUBERNETES = ROOT / "examples/slurm/train.sbatch", ROOT / "examples/kubernetes/rayjob.yaml"


@pytest.fixture
def slurm_calls(tmp_path: Path) -> list[list[str]]:
    """What the script runs on which nodes, with Slurm's commands put in their place."""
    log = tmp_path / "log"
    commands = {
        "scontrol": "printf 'n%s\\n' 0 1 2 3",
        "srun": f'line=$(printf \'%s\\t\' "$@"); echo "$line" >> {log}',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-3]",
    }
    # Its pipe is open until what runs in the background has ended.
    subprocess.run(["bash", str(SLURM)], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)
    return [line.rstrip("\t").split("\t") for line in log.read_text().splitlines()]


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> SteppoCLI:
    """Takes the words after ``train.py fit`` on a CPU."""
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    fleet = pytest.importorskip("steppo.rollouts.ray_fleet")
    monkeypatch.setattr(fleet, "find_spec", lambda name: name)  # nothing is played: Ray need not be there
    monkeypatch.chdir(ROOT)
    return main(["fit", *words, "--trainer.accelerator=cpu", "--trainer.precision=32-true"])


def after_train(words: list[str]) -> list[str]:
    place = words.index("train.py")
    assert words[place + 1] == "fit"
    return words[place + 2 :]


def test_a_slurm_job_places_learners_and_players(slurm_calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    ray = [call for call in slurm_calls if "ray" in call and "start" in call]
    assert [call[2] for call in ray if "--head" in call] == ["--nodelist=n0"]
    assert sorted(call[2] for call in ray if "--head" not in call) == ["--nodelist=n1", "--nodelist=n2,n3"]
    (learner,) = [call for call in slurm_calls if "torchrun" in call]
    assert {"--nodelist=n0,n1", "--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=n0:29500"} <= set(learner)
    cli = understood(after_train(learner), monkeypatch)
    assert (cli.trainer.num_nodes, cli.datamodule.source.settings.num_producers) == (2, 16)


def test_a_kubernetes_job_gives_each_player_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load(KUBERNETES.read_text())
    cluster = job["spec"]["rayClusterSpec"]
    learner, (players,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    (container,) = players["template"]["spec"]["containers"]
    gpus = players["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    cli = understood(after_train(shlex.split(job["spec"]["entrypoint"])), monkeypatch)
    assert cli.datamodule.source.settings.num_producers == gpus
    assert learner["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert {"--standalone", "--nproc-per-node"} <= set(shlex.split(job["spec"]["entrypoint"]))
