"""Paper search: find all papers that answer a question, by searching and by following citations."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from steppo.envs.base import Env
from steppo.envs.paper_search.papers import LocalPapers, Paper, Papers, plain_id, records
from steppo.envs.paper_search.relevance import ExactAnswers, Relevance
from steppo.errors import ConfigError, in_short, require_at_least
from steppo.paths import user_path
from steppo.types import Action, Message, Task, ToolCall, ToolSpec, Turn

_FILES = {"train": "AutoScholarQuery/train", "valid": "AutoScholarQuery/dev", "test": "RealScholarQuery/test"}
_FILES |= {name: name for name in (*_FILES.values(), "AutoScholarQuery/test")}  # the publishers' names will do, too
_COUNTED = 3  # of the new papers of a step, the most relevant
_REPEATED = -0.5
_LONGEST_TITLE = 200


def _tool(name: str, description: str, argument: str, meaning: str) -> ToolSpec:
    string = {"type": "string", "minLength": 1, "description": meaning}
    return ToolSpec(name, description, {"type": "object", "properties": {argument: string}, "required": [argument]})


_SEARCH = _tool("search", "Finds papers by their titles and abstracts.", "query", "Words to look for; not a past query.")
_EXPAND = _tool("expand", "Finds what a paper cites and what cites it.", "paper_id", "Id of a paper in the list.")


def figures(found: AbstractSet[str], answers: AbstractSet[str]) -> dict[str, float]:
    """Precision, recall and F1 of the ids found, without order. There is at least one answer."""
    right = len(found & answers)
    precision, recall = right / max(len(found), 1), right / len(answers)
    return {"precision": precision, "recall": recall, "f1": 2 * right / (len(found) + len(answers))}


class PaperSearchEnv(Env):
    """Questions of AutoScholarQuery and RealScholarQuery: ``valid`` is the former's dev, ``test`` the latter's test.

    The data are PaSa's (He et al., 2025): ``CarlanLark/pasa-dataset`` on Hugging Face, behind a form. ``data`` is the folder
    that holds ``AutoScholarQuery`` and ``RealScholarQuery``. Papers are yours to bring (docs/paper_search.md).

    A step's reward is the sum of the relevances of the three most relevant papers that are new in it, and -0.5 for each
    query or expansion that was made before. An answer without a call ends the search.

    Args:
        data: Folder of the questions; ``$PAPER_SEARCH_DATA`` unless given.
        papers: Where papers come from; unless given ``LocalPapers`` of ``papers.jsonl`` in ``data``, with its
            ``citations.jsonl`` if there is one.
        relevance: Scores papers, for the reward and the list; ``ExactAnswers`` unless given.
        max_steps: Steps that the task allows.
        max_calls: Calls that one step may make; more are not made.
        top_k: Papers that one search finds.
        min_relevance: Papers below it are dropped: neither shown nor counted as found. With ``ExactAnswers`` anything
            above 0 drops all that is wrong.
        max_listed: Papers that are shown, the most relevant ones. All are counted.
        allow_unknown: Also play questions with answers that the papers lack: these count as not found. Otherwise their
            episodes fail.
        num_train: Number of training questions; all unless given.
        num_valid: Number of questions of ``valid``; all unless given.
        num_test: Number of questions of ``test``; all unless given.
    """

    splits = ("train", "valid", "test")

    def __init__(
        self,
        data: str | None = None,
        papers: Papers | None = None,
        relevance: Relevance | None = None,
        max_steps: int = 5,
        max_calls: int = 5,
        top_k: int = 10,
        min_relevance: float = 0.0,
        max_listed: int = 100,
        allow_unknown: bool = False,
        num_train: int | None = None,
        num_valid: int | None = None,
        num_test: int | None = None,
    ) -> None:
        require_at_least(1, self, max_steps=max_steps, max_calls=max_calls, top_k=top_k, max_listed=max_listed)
        require_at_least(0, self, min_relevance=min_relevance, num_train=num_train, num_valid=num_valid, num_test=num_test)
        folder = data or os.environ.get("PAPER_SEARCH_DATA")
        if not folder:
            raise ConfigError(
                "PaperSearchEnv: set data or $PAPER_SEARCH_DATA to the folder of the data (docs/paper_search.md)"
            )
        self.folder = user_path(folder)
        if papers is None:
            citations = self.folder / "citations.jsonl"
            papers = LocalPapers(str(self.folder / "papers.jsonl"), str(citations) if citations.exists() else None)
        self.papers = papers
        self.relevance = relevance or ExactAnswers()
        self.max_steps = max_steps
        self.max_calls = max_calls
        self.top_k = top_k
        self.min_relevance = min_relevance
        self.max_listed = max_listed
        self.allow_unknown = allow_unknown
        self.num_questions = {_FILES["train"]: num_train, _FILES["valid"]: num_valid, _FILES["test"]: num_test}
        self.tools = (_SEARCH, _EXPAND) if papers.expands else (_SEARCH,)

    @property
    def version(self) -> str:  # type: ignore[override]
        return self.papers.version

    # ---- questions ----

    def tasks(self, split: str) -> list[Task]:
        if split not in _FILES:
            raise ConfigError(f"PaperSearchEnv has no split {split!r}; it has {', '.join(_FILES)}")
        path = self.folder / f"{_FILES[split]}.jsonl"
        tasks = [_task(path, number, record) for number, record in records(path)]
        if not tasks:
            raise ConfigError(f"PaperSearchEnv: there is no question in {path}")
        tasks.sort(key=lambda task: hashlib.sha256(task.id.encode()).digest())  # neighbours may be of one paper
        return tasks[: self.num_questions.get(_FILES[split])]

    def content(self, task: Task) -> str:
        """Question and answers, in any order."""
        self._check(task)
        return json.dumps([task.data["question"], sorted(task.data["answers"])], ensure_ascii=False)

    def _check(self, task: Task) -> set[str]:
        """The ids of the answers. Raises ``ConfigError`` if the question cannot be played."""
        answers = [id for id, _ in task.data["answers"]]
        if not answers or "" in answers:
            raise ConfigError(f"PaperSearchEnv: {task.id} has {'an answer without an id' if answers else 'no answer'}")
        if not self.allow_unknown and (unknown := self.papers.lacks(answers)):
            more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
            raise ConfigError(
                f"PaperSearchEnv: the answer {unknown[0]}{more} of {task.id} is not among the papers; add it, or set "
                "allow_unknown, and it counts as not found"
            )
        return set(answers)

    # ---- files, and what a worker process holds ----

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        self.papers.prepare(progress)
        self.relevance.prepare()

    def start(self) -> None:
        papers, relevance = copy.copy(self.papers), copy.copy(self.relevance)
        papers.start()
        relevance.start()
        self._papers, self._relevance = papers, relevance  # of all episodes of this process

    # ---- playing ----

    def reset(self, task: Task) -> Turn:
        self._answers = self._check(task)
        self._question: str = task.data["question"]
        self._titles = [title for _, title in task.data["answers"] if title]
        self._found: dict[str, tuple[Paper, float]] = {}
        self._seen: set[str] = set()
        self._done: set[tuple[str, str]] = set()
        return self._turn(goal=f"Find all papers that answer this: {self._question}")

    def step(self, action: Action) -> Turn:
        if not action.tool_calls:
            return self._turn(terminated=True)
        new: dict[str, Paper] = {}
        messages, carried_out, repeated = [], 0, 0
        for number, call in enumerate(action.tool_calls):
            if number >= self.max_calls:
                said = f"Not made: a step may make {self.max_calls} calls."
            elif (wrong := self._wrong(call)) is not None:
                said = wrong
            elif _key(call) in self._done:
                said = f"Repeated: this {call.name} was made before."
                carried_out, repeated = carried_out + 1, repeated + 1
            else:
                self._done.add(_key(call))
                papers = self._made(call)
                fresh = {paper.id: paper for paper in papers if paper.id not in self._seen}
                self._seen |= fresh.keys()
                new |= fresh
                said = f"Found {len(papers)}, {len(fresh)} of them new."
                carried_out += 1
            messages.append(Message("tool", said, call.id))
        scores = self._relevance.scores(self._question, list(new.values()), self._answers) if new else []
        kept = [(paper, score) for paper, score in zip(new.values(), scores, strict=True) if score >= self.min_relevance]
        self._found |= {paper.id: (paper, score) for paper, score in kept}
        reward = sum(sorted((score for _, score in kept), reverse=True)[:_COUNTED]) + _REPEATED * repeated
        return self._turn(messages=tuple(messages), reward=reward, action_valid=carried_out > 0)

    def expert_action(self) -> Action:
        """Searches the titles of the answers that are not found yet."""
        found = {_words(paper.title) for paper, _ in self._found.values()}
        wanted = {_words(title): title for title in self._titles}
        left = [title for key, title in wanted.items() if key not in found and ("search", key) not in self._done]
        calls = [ToolCall("search", {"query": title}, f"call_{n}") for n, title in enumerate(left[: self.max_calls])]
        return Action(tool_calls=tuple(calls)) if calls else Action(text="These are the papers.")

    def _wrong(self, call: ToolCall) -> str | None:
        """Why a call cannot be made."""
        if call.name not in (tool.name for tool in self.tools):
            return f"There is no tool {call.name}."
        if not _argument(call):
            return "Give words to look for." if call.name == "search" else "Give the id of a paper in the list."
        if call.name == "expand" and plain_id(_argument(call)) not in self._found:
            return "This id is not in the list."
        return None

    def _made(self, call: ToolCall) -> list[Paper]:
        if call.name == "search":
            return self._papers.search(_argument(call), self.top_k)
        return self._papers.expand(plain_id(_argument(call)))

    def _turn(self, **outcome: Any) -> Turn:
        info = figures(self._found.keys(), self._answers) | {"papers": len(self._found)}
        return Turn(self._listed(), success=info["recall"] == 1, info=info, **outcome)

    def _listed(self) -> str:
        if not self._found:
            return "Papers found: none yet."
        ranked = sorted(self._found.values(), key=lambda found: -found[1])  # those found first before others
        shown = [
            f"[{paper.id}] {in_short(paper.title, _LONGEST_TITLE)} (relevance {score:.2f})"
            for paper, score in ranked[: self.max_listed]
        ]
        rest = f", of which these are the {len(shown)} most relevant" if len(shown) < len(ranked) else ""
        return "\n".join([f"Papers found: {len(ranked)}{rest}.", *shown])


def _task(path: Path, number: int, record: dict[str, Any]) -> Task:
    """A question in PaSa's form (``answer``, ``answer_arxiv_id``), or with ``answers``: a list of ``id`` and ``title``."""
    try:
        question = record["question"].strip()
        if "answers" in record:
            pairs = [(answer["id"], answer.get("title", "")) for answer in record["answers"]]
        else:
            pairs = list(itertools.zip_longest(record["answer_arxiv_id"], record["answer"], fillvalue=""))
        answers = [[plain_id(id), " ".join(title.split())] for id, title in pairs]
        if not question:
            raise ValueError("no question")
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ConfigError(f"PaperSearchEnv: {path}, line {number} is no question with answers in PaSa's form") from None
    name = record.get("qid") or f"{path.parent.name}_{path.stem}_{number}"
    return Task(f"paper_search/{name}", {"question": question, "answers": answers})


def _argument(call: ToolCall) -> str:
    return str(call.arguments.get("query" if call.name == "search" else "paper_id", "")).strip()


def _key(call: ToolCall) -> tuple[str, str]:
    """Equal for calls that are the same."""
    argument = _argument(call)
    return call.name, _words(argument) if call.name == "search" else plain_id(argument)


def _words(text: str) -> str:
    return " ".join(text.lower().split())
