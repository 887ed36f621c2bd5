"""What ranks say to each other: in processes of their own, over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from tests.cli_helpers import TOY, checkpoint, places, run
from tests.rank_talk import own_columns, talk
from tests.started import CONTEXT, Started, started_by_torchrun


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(talk, (folder,), 2, start_method=CONTEXT.get_start_method())
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_columns_of_any_length_arrive_as_they_are(said: list[dict[str, Any]]) -> None:
    for found in said:
        for rank, columns in enumerate(found["columns"]):
            expected = own_columns(rank)
            assert columns.keys() == expected.keys()
            for name, column in columns.items():
                assert (column.dtype, column.tolist()) == (expected[name].dtype, expected[name].tolist())


@pytest.mark.parametrize("name", ["one bucket", "many"])
def test_buckets_of_gradients_are_averaged_bit_for_bit(said: list[dict[str, Any]], name: str) -> None:
    for found in said:
        assert found[name][3] is None  # nobody learned it
        for gradient, expected in zip(found[name][:3], found[f"{name}, expected"][:3], strict=True):
            assert torch.equal(gradient, expected)
            assert gradient.abs().max() > 0


def test_rank_0_finds_what_is_gone_on_with(tmp_path: Path) -> None:
    """Two nodes, as torchrun starts them. The second one's newest run is another: on a disk of its own, it is refused."""
    common = [
        *places(Path("runs")),
        "--warm_start.updates=0",
        "--rollout.episodes_per_iteration=2",
        "--trainer.limit_val_batches=0",
    ]
    common += ["--data.num_minibatches=1", "--trainer.logger.init_args.version=null"]
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    saved = [f"--trainer.logger.init_args.save_dir={here}/runs", "--trainer.max_epochs=1"]
    run(here, *common, *saved)
    first = checkpoint(here / "runs" / "version_0")
    (there / "runs" / "version_5" / "checkpoints").mkdir(parents=True)

    def nodes(places: tuple[Path, Path]) -> list[Started]:
        options = ["--trainer.num_nodes=2", "--trainer.strategy=ddp", "--trainer.max_epochs=2", "--ckpt_path=last"]
        return started_by_torchrun("fit", "--config", str(TOY), *common, *options, nodes=places)

    refused = nodes((here, there))
    errors = [node.errors() for node in refused]
    assert [node.status for node in refused] == [2, 2]
    for error in errors:
        assert f"process 1 has other checkpoint {first.relative_to(here)} on its disk than process 0" in error
        assert "Traceback" not in error
    done = nodes((here, here))
    errors = [node.errors() for node in done]
    assert [node.status for node in done] == [0, 0], errors
    assert [path.name for path in (here / "runs").iterdir()] == ["version_0"]
    assert checkpoint(here / "runs" / "version_0").name == "iteration-000002.ckpt"
    assert not (there / "runs" / "version_5" / "checkpoints" / "iteration-000002.ckpt").exists()
