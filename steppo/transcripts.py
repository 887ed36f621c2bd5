"""What the agent did, step by step: records of episodes, as lines of JSON and as a page to browse.

A record is a dict of one episode. Its ``steps`` hold texts and, as far as they are known, what the learner made of them;
what is not known, or not finite, is ``None``. Where an episode has several agents each step names its ``agent``; where it
has a reward of its own, that is ``final_reward``; what the environment said beside a reward is the step's ``info``, and the
last of each name the episode's. The page is append-only, so that a run costs no more per iteration when it is long: a shell
with the script, then blocks of data that no browser takes for markup.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steppo.errors import RunError
from steppo.learner import Experience, ReplayStatistics
from steppo.types import Episode

_SHELL = Path(__file__).with_name("transcript_page.html")
_BLOCK_END = b"</script>\n"
_EPISODES_PER_CHUNK = 32
_READ_AT_ONCE = 2**20  # bytes, to find where a torn file was whole


def episode_records(
    episodes: Sequence[Episode],
    tokenizer: Any,
    experience: Experience | None = None,
    replay: ReplayStatistics | None = None,
    prompts: int | None = None,
    **common: Any,
) -> list[dict[str, Any]]:
    """Records of episodes, in their order.

    Args:
        episodes: Of an iteration or a panel.
        tokenizer: Decodes prompts and actions; each distinct one once.
        experience: Knows values and advantages of (some of) the episodes' steps.
        replay: Knows their ratios.
        prompts: Episodes of a lower order have whole prompts, others ``None``; all have them unless given.
        common: What all records say: kind, iteration, updates.
    """
    with_prompts = [episode for episode in episodes if prompts is None or episode.order < prompts]
    known_prompts = _texts([step.prompt_ids for episode in with_prompts for step in episode.steps], tokenizer)
    actions = _texts([step.action_ids for episode in episodes for step in episode.steps], tokenizer)
    known = _step_figures(experience, replay) if experience is not None else {}
    unknown = dict.fromkeys(("value", "advantage", "ratio", "clipped"))
    records = []
    for episode in sorted(episodes, key=lambda episode: episode.order):
        figures = known.get(episode.order, [unknown] * len(episode.steps))
        several = len({step.agent_id for step in episode.steps}) > 1
        records.append(
            {
                **common,
                "id": episode.id,
                "order": episode.order,
                "task": episode.task_id,
                "group": episode.group_id,
                "stop_reason": str(episode.stop_reason),
                "success": None if episode.success is None else bool(episode.success),
                "return": _number(episode.episode_return),
                **({"final_reward": _number(episode.final_reward)} if episode.final_reward else {}),
                "error": episode.error,
                **({"info": info} if (info := episode.info) else {}),
                "steps": [
                    {
                        **({"agent": step.agent_id} if several else {}),
                        "prompt": known_prompts.get(step.prompt_ids.tobytes()),
                        "observation": step.observation,
                        "text": actions[step.action_ids.tobytes()],
                        "action": step.action,
                        "action_valid": bool(step.action_valid),
                        "reward": _number(step.reward),
                        **figures_of_step,
                        **({"info": dict(step.metadata)} if step.metadata else {}),
                        "finish_reason": step.finish_reason,
                        "prompt_tokens": len(step.prompt_ids),
                        "action_tokens": len(step.action_ids),
                    }
                    for step, figures_of_step in zip(episode.steps, figures, strict=True)
                ],
            }
        )
    return records


def info_text(info: Mapping[str, str | float | bool]) -> str:
    """What an environment said beside the reward, on one line for people."""
    return "  ".join(f"{name}={_value_text(value)}" for name, value in info.items())


def _value_text(value: str | float | bool) -> str:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if value % 1 or abs(value) >= 1e15 else f"{value:.0f}"


def _texts(ids: list[Any], tokenizer: Any) -> dict[bytes, str]:
    if not ids:  # a tokenizer would take an empty batch for one empty text
        return {}
    distinct = {row.tobytes(): row.tolist() for row in ids}
    texts = tokenizer.batch_decode(list(distinct.values()), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return dict(zip(distinct, texts, strict=True))


def _step_figures(experience: Experience, replay: ReplayStatistics | None) -> dict[int, list[dict[str, float | None]]]:
    """Value, advantage, ratio and clipped share of each step, by the order of its episode.

    Where values and advantages are of tokens, a step has the value at its prompt and the mean advantage of its tokens.
    """
    steps, scores, credit = experience.steps, experience.scores, experience.credit
    lengths_N = torch.from_numpy(steps.lengths_N)
    value, advantage = scores.value_N, credit.advantage_N
    if scores.value_A is not None:
        value = scores.value_A[lengths_N.cumsum(0) - lengths_N]
    if credit.advantage_A is not None:
        sums = torch.zeros(len(steps), dtype=credit.advantage_A.dtype)
        advantage = sums.index_add(0, steps.step_of_A, credit.advantage_A) / lengths_N
    ratio, clipped = (replay.ratio_N, replay.clipped_N) if replay is not None else (None, None)
    columns = {"value": value, "advantage": advantage, "ratio": ratio, "clipped": clipped}
    lists = [_numbers(column, len(steps)) for column in columns.values()]
    found: dict[int, list[dict[str, float | None]]] = {}
    for order, *figures in zip(steps.order_N.tolist(), *lists, strict=True):
        found.setdefault(order, []).append(dict(zip(columns, figures, strict=True)))
    return found


def _numbers(column: Tensor | None, length: int) -> list[float | None]:
    return [None] * length if column is None else [_number(value) for value in column.tolist()]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class TranscriptWriter:
    """Appends records to ``transcripts.jsonl`` and ``transcripts.html`` of a run's folder.

    What a killed run left half-written at the end of a file is cut off. A resumed run may play an iteration again: both
    files keep both, and the later one counts; the page shows no other.
    """

    def __init__(self, folder: Path) -> None:
        self._lines, self._page = folder / "transcripts.jsonl", folder / "transcripts.html"
        folder.mkdir(parents=True, exist_ok=True)
        _mend(self._lines, b"\n")
        _mend(self._page, _BLOCK_END)
        if not self._page.stat().st_size:
            self._page.write_bytes(_shell("/".join(folder.resolve().parts[-2:])))

    def write(self, kind: str, iteration: int, records: Sequence[dict[str, Any]]) -> None:
        """Adds the episodes of one iteration or evaluation."""
        try:
            with open(self._lines, "a", encoding="ascii") as file:
                file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
            with open(self._page, "ab") as page:
                page.write(page_blocks(kind, iteration, records))
        except OSError as error:
            raise RunError(f"cannot write transcripts beside {self._page}: {error.strerror}") from error


def _mend(path: Path, ending: bytes) -> None:
    """Cuts a file behind the last ``ending``, and makes it if there is none."""
    with open(path, "ab+") as file:
        start, last = file.seek(0, 2), -1
        while start and last < 0:  # back from the end: the whole may not fit in memory
            start = max(start - _READ_AT_ONCE, 0)
            file.seek(start)
            last = file.read(_READ_AT_ONCE + len(ending) - 1).rfind(ending)  # it may begin in this block and end in the next
        file.truncate(start + last + len(ending) if last >= 0 else 0)


def page_blocks(kind: str, iteration: int, records: Sequence[dict[str, Any]]) -> bytes:
    """Blocks of the page: the episodes in compressed chunks, then the index of all of them.

    The index comes last and names the number of chunks before it: one that is there is whole.
    """
    chunks = [records[first : first + _EPISODES_PER_CHUNK] for first in range(0, len(records), _EPISODES_PER_CHUNK)]
    texts = (json.dumps(chunk, allow_nan=False).encode("ascii") for chunk in chunks)
    blocks = [("text/plain", "chunk", base64.b64encode(gzip.compress(text, 6, mtime=0))) for text in texts]
    row = itemgetter("id", "task", "stop_reason", "success", "return")
    valid = [[step["action_valid"] for step in record["steps"]] for record in records]
    rows = [[*row(record), len(steps), steps.count(False)] for record, steps in zip(records, valid, strict=True)]
    index = {"kind": kind, "iteration": iteration, "chunks": len(chunks), "per_chunk": _EPISODES_PER_CHUNK, "rows": rows}
    # Nothing in an episode's text can end the block: "<" is written as JSON's escape.
    blocks.append(("application/json", "index", json.dumps(index, allow_nan=False).replace("<", "\\u003c").encode("ascii")))
    return b"".join(
        f'<script type="{media}" class="{name}">'.encode() + content + _BLOCK_END for media, name, content in blocks
    )


def _shell(title: str) -> bytes:
    """The page without data. Its policy allows its own script and style and nothing else: no network, no inline handler."""
    page = _SHELL.read_text(encoding="utf-8").replace("{title}", html.escape(title))
    hashes = {}
    for tag in ("script", "style"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'"
    return page.replace("{policy}", policy).encode()
