"""Transcripts: the numbers are the learner's, the text survives, and runs that were cut off go on."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import tracemalloc
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard._utils import figure_to_image

from callbacks.transcript import as_figure, as_text, shown_orders
from steppo.advantages import StepGAE
from steppo.cli import SteppoCLI
from steppo.datamodule import run_seed
from steppo.learner import Experience, ReplayStatistics
from steppo.listeners import Listener
from steppo.models import TinyPolicy
from steppo.transcripts import TranscriptWriter, episode_records, page_blocks
from steppo.types import Episode, Step, StopReason
from tests import cli_helpers
from tests.cli_helpers import same, weights

NASTY = "</script><script>alert(1)</script> <!-- \"quoted\" 'too' \\ & \u2028 é 漢字 🙂 \x00\x07\r\n\t$x_1$ ``` **bold**"
SHORT = ["--trainer.max_epochs=1", "--warm_start.updates=5", "--evaluation.before_training=false"]


def run(folder: Path, *args: str, **how: Any) -> SteppoCLI:
    """A run that shows an episode of each evaluation, as runs of users do."""
    return cli_helpers.run(folder, "--transcripts.num_shown=1", *args, **how)


class Page(HTMLParser):
    """The page as a browser reads it: its script elements, in order, and its policy."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: list[tuple[str, str]] = []
        self.policy = ""
        self._content: list[str] | None = None
        self._name = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag == "script":
            self._name, self._content = given.get("class") or "", []

    def handle_data(self, data: str) -> None:
        if self._content is not None:
            self._content.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script" and self._content is not None:
            self.scripts.append((self._name, "".join(self._content)))
            self._content = None

    def episodes(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """Records by (kind, iteration), the last index winning, as the page's own script reads them."""
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        chunks: list[str] = []
        for name, content in self.scripts:
            if name == "chunk":
                chunks.append(content)
            elif name == "index":
                index = json.loads(content)
                mine = chunks[len(chunks) - index["chunks"] :]
                records = [record for chunk in mine for record in json.loads(gzip.decompress(base64.b64decode(chunk)))]
                assert [row[0] for row in index["rows"]] == [record["id"] for record in records]
                found[index["kind"], index["iteration"]] = records
                chunks = []
        return found


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().split("\n") if line]


def steps(records: list[dict[str, Any]], kind: str, iteration: int) -> list[dict[str, Any]]:
    chosen = [record for record in records if (record["kind"], record["iteration"]) == (kind, iteration)]
    return [step for record in chosen for step in record["steps"]]


def episode(order: int, text: str = "go", success: bool | None = True, broken: bool = False) -> Episode:
    """One step, all of whose texts are the same; its reward is not finite."""
    ids = np.arange(order + 1, dtype=np.int32)
    step = Step(ids, ids, np.zeros(len(ids), np.float32), float("nan"), 0, "stop", True, False, True, text, text, 1.0, 0)
    reason = StopReason.ENV_ERROR if broken else StopReason.TERMINATED
    return Episode(f"id/{order}", order, order, f"task/{text}", (step,), reason, success=success, error=text)


def simple(iteration: int, *orders: int, kind: str = "train") -> list[dict[str, Any]]:
    """Records without steps."""
    same = {"kind": kind, "iteration": iteration, "task": "t", "stop_reason": "terminated", "success": True, "return": 1.0}
    return [{**same, "id": str(order), "order": order, "steps": []} for order in orders]


def write(folder: Path, iteration: int, *orders: int, kind: str = "train") -> None:
    TranscriptWriter(folder).write(kind, iteration, simple(iteration, *orders, kind=kind))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--model.advantage=steppo.advantages.TokenGAE", "--model.loss.ratio=token", "--rollout.group_size=2"],
        ["--model.advantage=tests.test_extend.ReturnOnly", "--data.max_tokens_per_microbatch=100"],
    ],
)
def test_numbers_are_those_of_the_experience(options: list[str], tmp_path: Path) -> None:
    cli = run(tmp_path, *SHORT, *options, "--trainer.callbacks+=tests.callbacks.test_transcripts.KeepReplay")
    kept = next(callback for callback in cli.trainer.callbacks if isinstance(callback, KeepReplay))
    experience, tokenizer = kept.experience, cli.model.policy.tokenizer
    assert experience is cli.datamodule.buffer.experience
    scores, credit, played_steps = experience.scores, experience.credit, experience.steps.records
    records = lines(tmp_path)
    found = steps(records, "train", 1)
    assert len(found) == len(played_steps) > 0
    first = [sum(len(step.action_ids) for step in played_steps[:number]) for number in range(len(played_steps))]
    for number, (shown, step) in enumerate(zip(found, played_steps, strict=True)):
        assert shown["prompt"] == tokenizer.decode(step.prompt_ids)
        assert shown["text"] == tokenizer.decode(step.action_ids)
        assert (shown["prompt_tokens"], shown["action_tokens"]) == (len(step.prompt_ids), len(step.action_ids))
        for name in ("observation", "action", "action_valid", "reward", "finish_reason"):
            assert shown[name] == getattr(step, name)
        tokens = slice(first[number], first[number] + len(step.action_ids))
        value = scores.value_N[number] if scores.value_N is not None else None
        value = scores.value_A[first[number]] if scores.value_A is not None else value
        advantage = credit.advantage_N[number] if credit.advantage_N is not None else credit.advantage_A[tokens].mean()
        assert shown["value"] == (None if value is None else pytest.approx(float(value)))
        assert shown["advantage"] == pytest.approx(float(advantage), abs=1e-6)
        assert shown["ratio"] == pytest.approx(float(kept.replay.ratio_N[number]))
        assert 0 <= shown["clipped"] <= 1
    assert [record["id"] for record in records if record["kind"] == "train"] == [e.id for e in experience.episodes]
    for record, played in zip([record for record in records if record["kind"] == "train"], experience.episodes, strict=True):
        assert record["return"] == played.episode_return
        assert (record["task"], record["group"], record["updates"]) == (played.task_id, played.group_id, 0)
        assert (record["success"], record["stop_reason"]) == (played.success, str(played.stop_reason))


class KeepReplay(Listener):
    """What an iteration learned from, and what its updates found."""

    def on_experience(self, trainer: Any, pl_module: Any, experience: Experience, replay: ReplayStatistics) -> None:
        self.experience, self.replay = experience, replay


class Recompute(Callback):
    """Ratio of each step before its last update: one step at a time, straight from the model."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = torch.stack([self._logprob(pl_module, step) for step in pl_module.data.buffer.experience.steps.records])
        if batch_idx == 0:
            self.old, self.ratio = now, torch.full_like(now, torch.nan)
        updates = trainer.num_training_batches // 2
        shuffle = np.random.default_rng([run_seed(), trainer.current_epoch, batch_idx // updates]).permutation(len(now))
        chosen = np.array_split(shuffle, updates)[batch_idx % updates]
        self.ratio[chosen] = (now - self.old).exp()[chosen]

    @torch.no_grad()
    def _logprob(self, module: Any, step: Step) -> torch.Tensor:
        """Mean over the action's tokens."""
        ids = torch.from_numpy(np.concatenate([step.prompt_ids, step.action_ids]).astype(np.int64))
        logprobs = module.policy.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, ids[1:, None])[-len(step.action_ids) :].mean()


def test_ratio_and_clipping_are_those_of_the_last_update(tmp_path: Path) -> None:
    cli = run(
        tmp_path,
        *[SHORT[0], SHORT[2], "--warm_start.updates=40", "--trainer.precision=64-true", "--data.update_epochs=2"],
        *["--model.policy_optimizer.lr=1e-2", "--trainer.callbacks+=tests.callbacks.test_transcripts.Recompute"],
    )
    expected = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Recompute)).ratio
    found = steps(lines(tmp_path), "train", 1)
    assert [step["ratio"] for step in found] == pytest.approx(expected.tolist(), rel=1e-5)
    clipped = (expected < 0.8) | (expected > 1.2)
    assert [step["clipped"] for step in found] == clipped.float().tolist()
    assert 0 < clipped.float().mean() < 1


@pytest.fixture
def records(tiny_policy: TinyPolicy) -> list[dict[str, Any]]:
    """Of more episodes than one chunk holds; one of them says what no page should fall for."""
    episodes = [episode(order, NASTY if order == 37 else f"go {order}") for order in range(40)]
    return episode_records(episodes, tiny_policy.tokenizer, kind="valid", iteration=2, updates=6)


def test_text_survives_and_stays_text(records: list[dict[str, Any]], tiny_policy: TinyPolicy, tmp_path: Path) -> None:
    records[37]["steps"][0]["prompt"] = NASTY + "\ud800"
    TranscriptWriter(tmp_path).write("valid", 2, records)
    page = Page(tmp_path / "transcripts.html")
    assert page.episodes() == {("valid", 2): records}
    assert lines(tmp_path) == records
    assert records[37]["steps"][0]["observation"] == NASTY
    assert records[37]["steps"][0]["reward"] is None  # it was NaN
    assert [name for name, _ in page.scripts] == ["", "chunk", "chunk", "index"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0][1].encode()).digest()).decode()
    assert page.policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'sha256-")


def test_prompts_are_decoded_with_all_their_tokens(tiny_policy: TinyPolicy) -> None:
    ids = np.asarray([*tiny_policy.tokenizer.encode(NASTY), tiny_policy.tokenizer.eos_token_id], dtype=np.int32)
    step = Step(ids, ids[-1:], np.zeros(1, np.float32), 0.0, 0, "stop", True, False, True, "", "", 1.0, 0)
    [record] = episode_records([Episode("", 0, 0, "", (step,), StopReason.TERMINATED)], tiny_policy.tokenizer)
    assert record["steps"][0]["prompt"] == NASTY + "<|end|>"
    assert record["steps"][0]["text"] == "<|end|>"
    [record] = episode_records([Episode("", 0, 0, "", (), StopReason.CONTEXT_OVERFLOW)], tiny_policy.tokenizer)
    assert record["steps"] == []


@pytest.mark.parametrize("torn", ["page", "index", "tag"])
def test_what_a_killed_run_left_half_written_goes(torn: str, tmp_path: Path) -> None:
    write(tmp_path, 1, 0, 1)
    page, text = tmp_path / "transcripts.html", tmp_path / "transcripts.jsonl"
    whole = page.read_bytes()
    blocks = page_blocks("train", 2, simple(2, *range(40)))
    with open(text, "a") as file:
        file.write('{"kind": "train", "iterat')
    kept = {("train", 1): simple(1, 0, 1)}
    if torn == "page":
        page.write_bytes(whole[:3000])
        kept = {}
    else:
        page.write_bytes(whole + blocks[: {"index": len(blocks) - 30, "tag": 15}[torn]])
    write(tmp_path, 2, 5)
    assert Page(page).episodes() == {**kept, ("train", 2): simple(2, 5)}
    assert [record["order"] for record in lines(tmp_path)] == [0, 1, 5]


@pytest.mark.parametrize("torn", [*range(28, 45), 100])
def test_the_last_whole_line_is_found_across_blocks(torn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the ending falls in blocks of 16 bytes, and with an earlier one that is not the last."""
    monkeypatch.setattr("steppo.transcripts._READ_AT_ONCE", 16)
    write(tmp_path, 1, 0)
    page, text = tmp_path / "transcripts.html", tmp_path / "transcripts.jsonl"
    whole = page.read_bytes(), text.read_bytes()
    for path in (page, text):
        with open(path, "ab") as file:
            file.write(b"x" * torn)
    TranscriptWriter(tmp_path)
    assert (page.read_bytes(), text.read_bytes()) == whole


@pytest.mark.parametrize("before", [b"{}\n", b""], ids=["behind a line", "without one"])
def test_a_large_torn_file_is_not_read_at_once(before: bytes, tmp_path: Path) -> None:
    text = tmp_path / "transcripts.jsonl"
    text.write_bytes(before + b"x" * 2**24)
    tracemalloc.start()
    try:
        TranscriptWriter(tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text.read_bytes() == before
    assert most < 2**22


def test_an_iteration_that_is_played_again_counts_once_on_the_page(tmp_path: Path) -> None:
    write(tmp_path, 1, 0, 1)
    write(tmp_path, 2, 2)
    write(tmp_path, 2, 3, kind="valid")
    write(tmp_path, 2, 4)
    found = Page(tmp_path / "transcripts.html").episodes()
    assert {key: [record["order"] for record in episodes] for key, episodes in found.items()} == {
        ("train", 1): [0, 1],
        ("train", 2): [4],
        ("valid", 2): [3],
    }
    assert [record["order"] for record in lines(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_resumed_run_goes_on_in_the_same_files(tmp_path: Path) -> None:
    run(tmp_path, *SHORT[:2])
    run(tmp_path, "--ckpt_path=last", "--trainer.max_epochs=2")
    keys = [(kind, iteration) for iteration in range(3) for kind in ("train", "valid") if (kind, iteration) != ("train", 0)]
    page = Page(tmp_path / "transcripts.html").episodes()
    assert list(page) == keys
    assert [record for episodes in page.values() for record in episodes] == lines(tmp_path)
    run(tmp_path, "--ckpt_path=last", command="test")
    assert list(Page(tmp_path / "transcripts.html").episodes()) == [*keys, ("test", 2)]


def test_tensorboard_shows_a_few_episodes_of_each_evaluation(tmp_path: Path) -> None:
    run(tmp_path, "--transcripts.num_shown=2", *SHORT[:2])
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = ["valid_episodes/0", "valid_episodes/1"]
    assert [tag for tag in events.Tags()["images"] if "episodes" in tag] == tags
    shown = [record for record in lines(tmp_path) if record["kind"] == "valid" and record["steps"][0]["value"] is not None]
    assert len(shown) == 4  # two evaluations
    for tag in tags:
        assert [image.step for image in events.Images(tag)] == [0, 2]
        texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]
        assert [as_text(record) in texts for record in shown].count(True) == 2
    assert all(step["advantage"] is not None and step["ratio"] is None for record in shown for step in record["steps"])


def test_figure_and_text_take_any_action(records: list[dict[str, Any]]) -> None:
    figure = as_figure(records[37])
    assert figure_to_image(figure, close=False).shape[0] == 3
    assert [axis.get_ylabel() for axis in figure.axes] == [""]  # nothing is known but the action
    records[37]["steps"][0] |= {"value": 0.5, "advantage": -1.0, "reward": 1.0}
    assert [axis.get_ylabel() for axis in as_figure(records[37]).axes] == ["value", "advantage", "reward"]
    assert all(line.startswith("    ") for line in as_text(records[37]).splitlines())


def test_shown_are_a_success_a_failure_and_then_the_first() -> None:
    results = [None, False, False, True, True, False]
    episodes = [episode(order, success=success) for order, success in enumerate(results)]
    episodes.insert(0, episode(9, broken=True))
    assert shown_orders(episodes[::-1], 4) == [3, 1, 0, 2], "no verdict is no failure"
    assert shown_orders(episodes, 1) == [3]
    assert shown_orders(episodes[:1], 4) == []
    assert shown_orders([replace(episodes[1], steps=())], 4) == []


class Grouped(StepGAE):
    """Has values, and wants groups."""

    needs_groups = True


def test_without_groups_an_evaluation_has_values_only(tmp_path: Path) -> None:
    run(tmp_path, *SHORT, "--model.advantage=tests.callbacks.test_transcripts.Grouped", "--rollout.group_size=2")
    shown = [step for step in steps(lines(tmp_path), "valid", 1) if step["value"] is not None]
    assert shown
    assert all(step["advantage"] is None for step in shown)


def test_broken_episodes_are_in_the_files(tmp_path: Path) -> None:
    faulty = ["--data.source.env=tests.toy_env.FaultyEnv", "--data.source.env.fail_tasks=[corridor/train/4]"]
    run(tmp_path, *faulty, SHORT[0], SHORT[2])
    [record] = [record for record in lines(tmp_path) if record["error"]]
    assert (record["task"], record["stop_reason"], record["success"]) == ("corridor/train/4", "env_error", False)
    assert "broken on purpose" in record["error"]
    assert [step["advantage"] for step in record["steps"]] == [None]
    assert len([record for record in lines(tmp_path) if record["kind"] == "train"]) == 8


def test_looking_changes_nothing(tmp_path: Path) -> None:
    """Appraisal leaves counters, generators and weights alone."""
    run(tmp_path / "with", "--transcripts.num_shown=2", "--transcripts.train_episodes=3", SHORT[1])
    run(tmp_path / "without", "--transcripts.enabled=false", SHORT[1])
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert not (tmp_path / "without" / "transcripts.html").exists()
    orders = [record["order"] for record in lines(tmp_path / "with") if record["kind"] == "train"]
    assert orders == [0, 1, 2] * 2


@pytest.mark.parametrize(
    ("prompts", "kept"), [(0, []), (1, [0]), (3, [0, 1, 2]), (100, [0, 1, 2, 3, 4]), (None, [0, 1, 2, 3, 4])]
)
def test_a_few_episodes_have_their_prompts(prompts: int | None, kept: list[int], tiny_policy: TinyPolicy) -> None:
    """Which ones does not depend on how the episodes fall to ranks."""
    episodes = [episode(order) for order in range(5)]
    records = episode_records(episodes, tiny_policy.tokenizer, prompts=prompts)
    assert [record["order"] for record in records if record["steps"][0]["prompt"] is not None] == kept
    parts = [episode_records(episodes[rank::2], tiny_policy.tokenizer, prompts=prompts) for rank in range(2)]
    assert sorted((record for part in parts for record in part), key=lambda record: record["order"]) == records
    assert all(step["observation"] and step["text"] and step["prompt_tokens"] for r in records for step in r["steps"])


def test_prompts_of_iterations_and_panels_are_bounded(tmp_path: Path) -> None:
    run(tmp_path, *SHORT, "--transcripts.prompts=2")
    for kind in ("train", "valid"):
        found = [record for record in lines(tmp_path) if record["kind"] == kind]
        assert len(found) == 8
        assert [all(step["prompt"] is None for step in record["steps"]) for record in found] == [False] * 2 + [True] * 6


def test_negative_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--transcripts.num_shown=-1")
    assert "transcripts: num_shown must be at least 0, not -1" in capsys.readouterr().err
