"""SIGTERM ends a run at once, wherever it is, with one line; the run then goes on as if it never had been stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from steppo.checkpoints import iteration_checkpoints
from steppo.cli.stopping import STOPPED
from tests.callbacks.test_resume import OPTIONS, assert_same_run, whole
from tests.cli_helpers import TOY, places, run
from tests.started import Started

__all__ = ["whole"]  # a fixture
PATIENCE_S = 60  # of the tests, on a busy machine; without an end the processes below would take ten minutes


def stop_in_call(monkeypatch: pytest.MonkeyPatch, target: str, number: int) -> list[int]:
    """Has the n-th call of a function send SIGTERM to this process, before it does anything."""
    owner, _, name = target.rpartition(".")
    module, _, kind = owner.rpartition(".")
    holder = getattr(__import__(module, fromlist=["_"]), kind)
    real, calls = getattr(holder, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(holder, name, counted)
    return calls


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("tests.toy_env.CorridorEnv.prepare", 1),
        ("steppo.rollouts.EnvSource.tokenizer_texts", 1),
        ("steppo.packing.PaddedPacker.pack", 20),  # in the warm start
    ],
)
def test_before_the_first_checkpoint(
    target: str,
    number: int,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with monkeypatch.context() as patched:
        calls = stop_in_call(patched, target, number)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, *OPTIONS, f"--warm_start.cache_dir={tmp_path}/cache")
        assert (stopped.value.code, calls) == (STOPPED, [number])
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before
    run(tmp_path, *OPTIONS, "--ckpt_path=last")
    assert f"Continuing {tmp_path} from its start: it has no checkpoint yet" in capsys.readouterr().out.splitlines()
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("callbacks.evaluation.EvaluationCallback._evaluate", 1),
        ("steppo.engines.HFEngine.poll", 90),
        ("steppo.envs.pool.EnvPool.answer", 455),
        ("steppo.module.AgentModule._step", 3),
        ("steppo.transcripts.TranscriptWriter.write", 4),
        ("steppo.checkpoints.CheckpointIO.save_checkpoint", 3),
    ],
)
def test_a_run_that_was_stopped_goes_on(
    target: str,
    number: int,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        calls = stop_in_call(patched, target, number)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, *OPTIONS)
        assert (stopped.value.code, calls) == (STOPPED, [number])
    newest = iteration_checkpoints(tmp_path / "checkpoints")[-1]
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped by SIGTERM; a fit continues with --ckpt_path {newest}"
    run(tmp_path, *OPTIONS, f"--ckpt_path={newest}")
    assert_same_run(tmp_path, whole)


class Stuck(Callback):
    """Sleeps in the second update; deaf to exceptions, if it is told to be, as code in a long computation is."""

    def __init__(self, marker: str, deaf: bool, rank: int = 0) -> None:
        self.marker = Path(marker)
        self.deaf = deaf
        self.rank = rank

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == self.rank and not self.marker.exists():
            self.marker.touch()
            until = time.monotonic() + 600
            while time.monotonic() < until:
                try:
                    time.sleep(60)
                except BaseException:
                    if not self.deaf:
                        raise


def stopped_from_outside(folder: Path, marker: Path, *args: str) -> tuple[int | None, list[str]]:
    """Status and last lines of a run that is told to end when the file ``marker`` is there; its processes are gone."""
    variables = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    stuck = Started("fit", "--config", str(TOY), *OPTIONS, *places(folder), *args, variables=variables)
    try:
        stuck.wait_for(marker)
        time.sleep(0.5)
        stuck.send(signal.SIGTERM)
        errors = stuck.errors(PATIENCE_S)
    finally:
        stuck.kill()
    assert "Traceback" not in errors
    return stuck.status, errors.splitlines()


def test_an_environment_that_hangs_does_not_hold_up_the_end(tmp_path: Path, whole: Path) -> None:
    stuck = ["--data.source.env=tests.worker_envs.StuckEnv", f"--data.source.env.marker={tmp_path}/marker"]
    stuck += [f"--data.source.env.after={tmp_path}/checkpoints/iteration-000001.ckpt", "--data.source.env_timeout=600"]
    status, errors = stopped_from_outside(tmp_path, tmp_path / "marker", *stuck)
    assert status == STOPPED
    assert errors[-1].startswith("stopped by SIGTERM; a fit continues with ")
    run(tmp_path, *OPTIONS, *stuck, "--ckpt_path=last")
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("deaf", "rank", "options"),
    [
        (True, 0, []),
        (True, 1, ["--trainer.devices=2", "--trainer.strategy=ddp"]),  # rank 0 waits for it in a collective
    ],
)
def test_nobody_waits_for_what_does_not_listen(
    deaf: bool, rank: int, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stuck = [f"--trainer.callbacks+={__name__}.Stuck", f"--trainer.callbacks.marker={tmp_path}/marker"]
    stuck += [f"--trainer.callbacks.deaf={deaf}", f"--trainer.callbacks.rank={rank}", *options]
    stuck += ["--warm_start.updates=0", "--evaluation.before_training=false"]
    status, errors = stopped_from_outside(tmp_path, tmp_path / "marker", *stuck)
    assert status == STOPPED
    assert [line for line in errors if "SIGTERM" in line] == errors[-1:]
    assert errors[-1].startswith("stopped by SIGTERM; a fit continues with ")
