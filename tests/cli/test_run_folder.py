"""A run folder belongs to one run at a time, and is free as soon as that ends, however it does."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from steppo.checkpoints import iteration_path
from steppo.cli.resuming import beginning
from steppo.errors import ConfigError
from steppo.run_folder import held, numbered_folders
from tests.cli_helpers import TOY, evaluations, run
from tests.started import CONTEXT, Started

SHORT = ["--warm_start.updates=0", "--trainer.max_epochs=2"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    stuck = ["--trainer.callbacks+=tests.cli.test_stopping.Stuck", f"--trainer.callbacks.marker={marker}"]
    command = ["fit", "--config", str(TOY), f"--trainer.logger.save_dir={tmp_path}"]
    first = Started(*command, *SHORT, *stuck, "--trainer.callbacks.deaf=false")
    try:
        first.wait_for(marker)
        before = files(tmp_path)
        for name, *options in (
            ["fit"],
            ["fit", "--ckpt_path=last"],
            ["validate"],
            ["test"],
            ["validate", "--ckpt_path=last"],
        ):
            with pytest.raises(SystemExit) as stopped:
                run(tmp_path, *(SHORT if name == "fit" else SHORT[:1]), *options, command=name)
            assert stopped.value.code == 2
            error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(error) == 1
            assert f"{tmp_path} belongs to a run that is under way" in error[0]
        assert files(tmp_path) == before
    finally:
        first.kill()
    run(tmp_path, *SHORT, "--ckpt_path=last")
    assert [record["iteration"] for record in evaluations(tmp_path)] == [0, 1, 2]
    assert not (tmp_path / ".lock").exists()


def hold_and_end(folder: Path, end: Callable[[], Any]) -> None:
    with held(folder):
        (folder / "held").touch()
        end()


def interrupt() -> None:
    raise KeyboardInterrupt


def leave_a_child() -> None:
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(20)"])  # which outlives it


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "status"),
    [(os.getpid, 0), (interrupt, 1), (partial(os._exit, 3), 3), (kill_itself, -signal.SIGKILL), (leave_a_child, 0)],
    ids=["returns", "interrupt", "exit", "killed", "leaves a child"],
)
def test_the_end_frees_the_folder(end: Callable[[], Any], status: int, tmp_path: Path) -> None:
    process = CONTEXT.Process(target=hold_and_end, args=(tmp_path / "run", end))
    process.start()
    process.join()
    assert process.exitcode == status
    assert (tmp_path / "run" / "held").exists()
    with held(tmp_path / "run"):
        refused = pytest.raises(ConfigError, match="belongs to a run that is under way")
        with refused, held(tmp_path / "run"):
            pass
    with held(tmp_path / "run"):
        pass


def test_a_folder_in_which_nothing_was_written_goes(tmp_path: Path) -> None:
    with held(tmp_path / "new"), held(tmp_path), held(None):
        assert (tmp_path / "new" / ".lock").exists()
    assert tmp_path.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, ConfigError, RuntimeError, OSError, None])
def test_who_is_stopped_early_leaves_a_place_for_checkpoints(end: Any, tmp_path: Path) -> None:
    """A run that is stopped (a kill, SIGTERM, Ctrl-C) is to go on; one that was refused, or ended without any, is not."""
    with contextlib.suppress(BaseException), held(tmp_path / "run", keeps_checkpoints=True):
        if end is not None:
            raise end
    stopped = end in (SystemExit, KeyboardInterrupt)
    assert [path.name for path in tmp_path.rglob("*")] == (["run", "checkpoints"] if stopped else [])


def test_what_was_saved_stays(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), held(tmp_path / "run", keeps_checkpoints=True):
        (tmp_path / "run" / "checkpoints" / "a.ckpt").touch()
        raise RuntimeError
    assert (tmp_path / "run" / "checkpoints" / "a.ckpt").exists()


@pytest.mark.parametrize("logger", ["numbered", "none"])
@pytest.mark.parametrize(
    ("runs", "fit", "checkpoint", "folder"),
    [
        ([[]], True, None, 0),  # stopped before its first checkpoint: it begins again
        ([[0, 1], []], True, None, 1),  # and no older run goes on in its place
        ([[0, 1], [], []], True, None, 2),
        ([[0, 1], None], True, (0, 1), 0),  # an evaluation
        ([[], None, None], True, None, 0),
        ([[], [0]], True, (1, 0), 1),
        ([[0, 1], []], False, (0, 1), None),  # to evaluate, there must be weights
        ([[0, 1], [2, 3]], False, (1, 3), None),
    ],
)
def test_last_is_the_newest_run(
    runs: Runs, fit: bool, checkpoint: tuple[int, int] | None, folder: int | None, logger: str, tmp_path: Path
) -> None:
    path, goes_on_in = beginning("last", made(runs, tmp_path, logger), fit)
    assert path == (None if checkpoint is None else checkpoint_of(tmp_path, *checkpoint))
    assert goes_on_in == (None if folder is None else checkpoint_of(tmp_path, folder, 0).parent.parent)


@pytest.mark.parametrize(("runs", "fit"), [([], True), ([None], True), ([], False), ([None], False), ([[]], False)])
def test_where_no_run_is_nothing_goes_on(runs: Runs, fit: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no checkpoint to continue from"):
        beginning("last", made(runs, tmp_path, "none"), fit)


def test_a_fit_begins_in_the_folder_that_its_config_names(tmp_path: Path) -> None:
    """So that the command which goes on is also the first one; but not in the place of an older run."""
    config = made([[0, 1]], tmp_path, "numbered")
    config.trainer.logger.init_args.version = "mine"
    assert beginning("last", config, fit=True) == (None, tmp_path / "runs" / "mine")
    with pytest.raises(ConfigError, match="there is no checkpoint to continue from"):
        beginning("last", config, fit=False)
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    iteration_path(tmp_path / "runs" / "mine" / "checkpoints", 2).touch()
    assert beginning("last", config, fit=True) == (
        iteration_path(tmp_path / "runs" / "mine" / "checkpoints", 2),
        tmp_path / "runs" / "mine",
    )


Runs = list[list[int] | None]


def checkpoint_of(root: Path, run: int, iteration: int) -> Path:
    return iteration_path(root / "runs" / f"version_{run}" / "checkpoints", iteration)


def made(runs: Runs, root: Path, logger: str) -> Namespace:
    """Makes runs with checkpoints after these iterations, or evaluations (``None``); gives a config that finds them."""
    for number, iterations in enumerate(runs):
        place = checkpoint_of(root, number, 0).parent
        (place.parent if iterations is None else place).mkdir(parents=True)
        for iteration in iterations or ():
            checkpoint_of(root, number, iteration).touch()
    arguments = Namespace(save_dir=str(root), name="runs", version=None)
    tensorboard = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=arguments)
    return Namespace(trainer=Namespace(logger=False if logger == "none" else tensorboard, default_root_dir=str(root)))


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), held(tmp_path):
        pass


def test_a_lock_that_its_owner_has_just_removed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, real, removed = fcntl.flock, tmp_path / ".lock", []

    def remove_once(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(real.unlink())
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_once)
    with held(tmp_path):
        assert real.exists()


def test_runs_are_numbered(tmp_path: Path) -> None:
    for name in ("version_2", "version_10", "version_x", "version_", "other_11"):
        (tmp_path / name).mkdir()
    assert [number for number, _ in numbered_folders(tmp_path)] == [10, 2]
    assert numbered_folders(tmp_path / "none") == []
