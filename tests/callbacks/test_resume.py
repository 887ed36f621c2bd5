"""A run that stopped anywhere goes on as if it never had: the same weights, bit for bit, and the same records."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steppo import weight_cache
from steppo.checkpoints import iteration_checkpoints, iterations_of
from steppo.rollouts import EnvSource
from tests.cli_helpers import TOY, checkpoint, evaluations, places, run
from tests.started import Started
from tests.toy_env import CorridorEnv

EPOCHS = 3
OPTIONS = [
    f"--trainer.max_epochs={EPOCHS}",
    "--model.policy_optimizer.schedule=linear",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.monitor=val/steps_mean",
    "--trainer.callbacks.mode=max",
    "--trainer.callbacks.filename=best",
    "--trainer.callbacks.save_on_train_epoch_end=false",
    "--trainer.callbacks.enable_version_counter=false",
]
NUMBERED = ["--trainer.logger.init_args.version=null"]
# A warm start that comes from the cache, or before a kill, has no curve.
OTHERWISE = ("seconds/", "per_second", "memory/", "warm_start/")


class SaveAnywhere(Callback):
    """Saves as others do, a scheduler's signal handler among them: where no iteration ends."""

    def __init__(self) -> None:
        self.folder = Path()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.folder = Path(trainer.log_dir)
        collect = pl_module.data.source.collect

        def collect_and_save(groups: Any, config: Any, *args: Any) -> Any:
            for group in collect(groups, config, *args):
                self._save(trainer, f"in-{config.name.partition('/')[0]}")
                yield group

        pl_module.data.source.collect = collect_and_save

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / "too-early.ckpt")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._save(trainer, "in-update")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._save(trainer, "after-update")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)

    def _save(self, trainer: Any, name: str) -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.epoch_progress.current.ready == 2:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *OPTIONS, "--trainer.callbacks+=tests.callbacks.test_resume.SaveAnywhere")
    return folder


def state(folder: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds, but for seconds and paths."""
    held = torch.load(checkpoint(folder), weights_only=True)
    del held["steppo"]["seconds"], held["loops"]
    held["callbacks"] = records(held["callbacks"]["EvaluationCallback"]["history"])
    return held


def records(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def equal(left: Any, right: Any) -> bool:
    """Bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not any(other in tag for other in OTHERWISE)]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same_run(folder: Path, whole: Path) -> None:
    assert iterations_of(checkpoint(folder)) == EPOCHS
    assert equal(state(folder), state(whole))
    assert records(evaluations(folder)) == records(evaluations(whole))


def stopped_run(folder: Path, *args: str) -> tuple[int | None, str]:
    """Exit status and standard error of a run in a process of its own, which KillAt ends."""
    kill = ["--trainer.callbacks+=tests.kill.KillAt", *args]
    stopped = Started("fit", "--config", str(TOY), *OPTIONS, *places(folder), *kill)
    errors = stopped.errors()
    return stopped.status, errors


@pytest.mark.parametrize(("phase", "event"), [("start", 1), ("evaluation", 3), ("rollout", 90), ("checkpoint", 7)])
def test_a_killed_run_goes_on(phase: str, event: int, tmp_path: Path, whole: Path) -> None:
    status, errors = stopped_run(tmp_path, f"--trainer.callbacks.phase={phase}", f"--trainer.callbacks.event={event}")
    assert status == -signal.SIGKILL, errors[-2000:]
    assert [*map(iterations_of, iteration_checkpoints(tmp_path / "checkpoints"))] in ([], [0], [0, 1], [1, 2])
    run(tmp_path, *OPTIONS, "--ckpt_path=last")
    assert_same_run(tmp_path, whole)
    assert curves(tmp_path) == curves(whole)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.ckpt",
        "iteration-000002.ckpt",
        "iteration-000003.ckpt",
    ]


@pytest.mark.parametrize(("phase", "event"), [("rollout", 90), ("start", 1)])
def test_a_requeued_slurm_job_goes_on(
    phase: str, event: int, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning saves when SLURM's signal comes, has the job requeued (which ends it), and finds the file by itself."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\nkill -9 $PPID\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    slurm = {
        "JOB_ID": "7",
        "JOB_NAME": "toy",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
        "NODELIST": "here",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    requeue = [f"--trainer.callbacks.phase={phase}", f"--trainer.callbacks.event={event}"]
    requeue += ["--trainer.callbacks.signal_name=SIGUSR1"]
    root = f"--trainer.default_root_dir={tmp_path}/job"
    status, errors = stopped_run(tmp_path, root, *requeue)
    assert status == -signal.SIGKILL, errors[-2000:]
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    status, errors = stopped_run(tmp_path, root)
    assert status == 0, errors[-2000:]
    assert (f"{tmp_path}/job/hpc_ckpt_1.ckpt" in errors) == (phase != "start")  # else there is nothing to go on from
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("name", ["in-train", "in-update", "after-update", "in-validate", "checkpoints/best"])
def test_a_checkpoint_from_anywhere_goes_on(name: str, tmp_path: Path, whole: Path) -> None:
    held = torch.load(whole / f"{name}.ckpt", weights_only=True)
    run(tmp_path, *OPTIONS, f"--ckpt_path={whole}/{name}.ckpt", "--warm_start.lr=1.0")  # must not warm-start again
    assert_same_run(tmp_path, whole)
    assert held["steppo"]["counters"]["iterations"] == 1


def test_before_there_is_a_state_to_go_on_from_nobody_saves(whole: Path) -> None:
    assert (whole / "weights.ckpt").exists()
    assert not (whole / "too-early.ckpt").exists()


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line in which a run is refused."""
    with pytest.raises(SystemExit) as stopped:
        run(folder, *OPTIONS, *args)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_only_the_newest_checkpoint_continues_a_run_folder(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*OPTIONS, *NUMBERED]
    assert "there is no checkpoint to continue from" in refused(tmp_path, capsys, *NUMBERED, "--ckpt_path=last")
    assert not list(tmp_path.iterdir())

    def folder(number: int) -> Path:
        return tmp_path / f"version_{number}"

    run(tmp_path, *args, "--trainer.max_epochs=1")
    run(tmp_path, *args, "--ckpt_path=last", command="validate")  # a newer folder, but nothing to continue from
    run(tmp_path, *args, "--trainer.max_epochs=2", "--ckpt_path=last")
    older, newest = iteration_checkpoints(folder(0) / "checkpoints")
    run(tmp_path, *args, "--trainer.max_epochs=2", f"--ckpt_path={older}")
    assert [iterations_of(checkpoint(folder(number))) for number in (0, 2)] == [2, 2]
    assert [record["iteration"] for record in evaluations(folder(2))] == [0, 1, 2]
    shutil.rmtree(folder(2))
    capsys.readouterr()
    run(tmp_path, *args, f"--ckpt_path={newest}")
    assert f"Continuing {folder(0)} from iteration-000002.ckpt" in capsys.readouterr().out.splitlines()
    assert [record["iteration"] for record in evaluations(folder(0))] == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.glob("version_*")) == ["version_0", "version_1"]
    assert "version: null" in (folder(0) / "config.yaml").read_text()


def test_a_run_folder_holds_one_run(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    line = refused(tmp_path, capsys)
    assert f"holds a run that is further, iteration-000003.ckpt: continue it with --ckpt_path {checkpoint(tmp_path)}" in line
    assert evaluations(tmp_path) == evaluations(whole)


def test_some_checkpoints_are_written_and_kept(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_epochs=5", "--checkpoint.every_n_iterations=2", "--checkpoint.keep=3")
    assert [iterations_of(path) for path in iteration_checkpoints(tmp_path / "checkpoints")] == [2, 4, 5]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "text": lambda good: b"not a checkpoint\n",
    "pickle": lambda good: pickle.dumps({"steppo": [1, 2, 3]}),
    "zeros": lambda good: bytes(len(good)),
}


@pytest.mark.parametrize("kind", [*BROKEN, "foreign", "tensor", "objects"])
def test_a_broken_checkpoint_is_one_clear_line(
    kind: str, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    path = checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    if kind in BROKEN:
        path.write_bytes(BROKEN[kind](path.read_bytes()))
    else:
        torch.save({"foreign": {"state_dict": {}}, "tensor": torch.ones(3), "objects": {"steppo": Path()}}[kind], path)
    line = refused(tmp_path, capsys, "--ckpt_path=last")
    assert f"cannot use the checkpoint {path}: it " in line


def test_without_the_broken_one_the_run_goes_on(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    checkpoint(tmp_path).unlink()
    run(tmp_path, *OPTIONS, "--ckpt_path=last")
    assert_same_run(tmp_path, whole)
    assert curves(tmp_path) == curves(whole)


def test_a_checkpoint_that_does_not_fit_is_one_clear_line(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = refused(tmp_path, capsys, f"--ckpt_path={checkpoint(whole)}", "--model.policy.hidden_size=64")
    assert "the checkpoint does not fit the config's model" in larger
    assert "can be evaluated, not continued" in refused(tmp_path, capsys, f"--ckpt_path={whole}/weights.ckpt")
    run(tmp_path, f"--ckpt_path={whole}/weights.ckpt", command="test")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_clear_line_and_costs_no_checkpoint(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_until_full(path: Path, mode: str) -> Any:
        return open("/dev/full" if "iteration-000002" in path.name else path, mode)

    with monkeypatch.context() as patched:
        patched.setattr(weight_cache, "open", open_until_full, raising=False)
        line = refused(tmp_path, capsys)
    assert "No space left on device; earlier checkpoints are as they were" in line
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.ckpt",
        "iteration-000000.ckpt",
        "iteration-000001.ckpt",
    ]
    run(tmp_path, *OPTIONS, "--ckpt_path=last")
    assert_same_run(tmp_path, whole)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    assert "cannot write the checkpoint" in refused(tmp_path, capsys, "--trainer.callbacks=[]")


def test_evaluating_a_checkpoint_prepares_the_panel_only(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[str] = []
    monkeypatch.setattr(CorridorEnv, "prepare", lambda self, tasks, progress: prepared.extend(task.id for task in tasks))
    monkeypatch.setattr(EnvSource, "tokenizer_texts", lambda self, tasks: pytest.fail("the checkpoint brings its tokenizer"))
    run(tmp_path, f"--ckpt_path={checkpoint(whole)}", command="validate")
    assert prepared == [task.id for task in CorridorEnv().tasks("valid")]
    assert records(evaluations(tmp_path)) == records(evaluations(whole))[-1:]
