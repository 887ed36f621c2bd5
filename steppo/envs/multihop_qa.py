"""Questions that take several searches: HotpotQA, 2WikiMultihopQA and MuSiQue, as their publishers give them."""

from __future__ import annotations

import copy
import functools
import gzip
import hashlib
import html
import json
import lzma
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from steppo.envs.base import Env
from steppo.envs.search import Bm25, Retriever, Texts, keep, kept, require_whole, sha256_of
from steppo.errors import ConfigError, in_short, require_at_least
from steppo.paths import user_path
from steppo.types import Action, Message, Task, ToolCall, ToolSpec, Turn

_FORMAT = 1  # of the passages that are kept
_HOTPOTQA = {"train": "hotpot_train_v1.1.json", "valid": "hotpot_dev_distractor_v1.json"}
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_QUERY = {
    "type": "object",
    "properties": {"query": {"type": "string", "description": "What to look for."}},
    "required": ["query"],
    "additionalProperties": False,
}
_FORM = "<answer>...</answer>"
_ANSWER = re.compile("<answer>(.*?)</answer>", re.DOTALL)
_ASKS = f"Give the final answer in as few words as possible: {_FORM}"
_LABELS = {"type": "task_type", "level": "level"}


class MultihopQAEnv(Env):
    """Questions whose answer takes several passages, which the agent finds by ``search``; the final one is in ``<answer>``.

    The question itself is searched for first. A passage is shown once. The reward is 1 for an exact match with the answer or
    an alias, as SQuAD compares them, else 0. Figures: ``f1``, ``exact_match``, ``recall`` (of the titles of the gold
    passages, among all that was found), ``searches`` (the agent's).

    The data are those of HotpotQA (CC BY-SA 4.0), 2WikiMultihopQA (Apache-2.0) and MuSiQue (CC BY 4.0): docs/multihop_qa.md.
    Needs ``pip install "steppo[search]"``.

    Args:
        data: Folder of the files; unless given ``$MULTIHOP_QA_DATA``, or else the current one.
        questions: The file of each split, with answers; HotpotQA's train and dev (distractor) unless given. Sets may be
            mixed: ``{train: hotpot_train_v1.1.json, musique: musique_ans_v1.0_dev.jsonl}`` has the splits train and musique.
        corpus: JSONL of passages to search in, ``title`` and ``text`` on each line: one for all splits, or one for each. A
            split without one searches in all passages that are given with its questions.
        aliases: File of other names for answers: 2WikiMultihopQA's ``id_aliases.json``.
        max_steps: Steps that the task allows; when they are used up it is over, without an answer.
        max_calls: Searches that may be made in one step.
        top_k: Passages that a search finds.
        show_all: Each turn shows all passages found so far, for ``StateContext``. If not, a search is answered by what is
            new, as a tool's message, for ``AppendContext``.
        retriever: What ranks passages; ``Bm25`` unless given.
        cache_dir: Where passages and their index are kept; the user's cache folder unless given.
    """

    def __init__(
        self,
        data: str | None = None,
        questions: dict[str, str] | None = None,
        corpus: dict[str, str] | str | None = None,
        aliases: str | None = None,
        max_steps: int = 5,
        max_calls: int = 4,
        top_k: int = 3,
        show_all: bool = True,
        retriever: Retriever | None = None,
        cache_dir: str | None = None,
    ) -> None:
        require_at_least(1, self, max_steps=max_steps, max_calls=max_calls, top_k=top_k)
        self.folder = user_path(data or os.environ.get("MULTIHOP_QA_DATA") or ".")
        self.questions = dict(_HOTPOTQA if questions is None else questions)
        if not self.questions:
            raise ConfigError("MultihopQAEnv: questions must name a file")
        if isinstance(corpus, dict) and (unknown := sorted(corpus.keys() - self.questions.keys())):
            raise ConfigError(f"MultihopQAEnv: corpus has no split {unknown[0]!r}; it may have {', '.join(self.questions)}")
        self.corpus = corpus
        self.aliases = aliases
        self.splits = tuple(self.questions)
        self.max_steps = max_steps
        self.max_calls = max_calls
        self.top_k = top_k
        self.show_all = show_all
        self.retriever = retriever or Bm25()
        root = user_path(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("steppo")) / "multihop_qa"
        self._cache = root / f"passages-{_FORMAT}"
        searches = "one search" if max_calls == 1 else f"up to {max_calls} searches"
        self.tools = (ToolSpec("search", f"Finds passages of an encyclopedia; {searches} at once.", _QUERY),)
        self._opened: dict[str, tuple[Texts, Retriever]] = {}

    def tasks(self, split: str) -> list[Task]:
        if split not in self.questions:
            raise ConfigError(f"MultihopQAEnv has no split {split!r}; it has {', '.join(self.questions)}")
        path = self.folder / user_path(self.questions[split])
        names = _names(self.folder / user_path(self.aliases)) if self.aliases else {}
        corpus = _sha256_of_file(self._corpus_of(split))
        tasks = [_task(record, path, corpus, names) for record in _records(path)]
        if not tasks:
            raise ConfigError(f"MultihopQAEnv: there is no question in {path}")
        # A hash mixes kinds of questions, in the same order everywhere.
        return sorted(tasks, key=lambda task: hashlib.sha256(task.id.encode("utf-8", "replace")).digest())

    def content(self, task: Task) -> str:
        """Question, answers, gold titles and all passages, wherever their files lie."""
        passages = require_whole(self._place(task.data["corpus"]))
        return json.dumps([task.id, {**task.data, "corpus": passages}], sort_keys=True)

    def prepare(self, tasks: Sequence[Task], progress: Callable[[int, int], None]) -> None:
        """Keeps the passages on disk, and their index."""
        needed = {task.data["corpus"] for task in tasks}
        for path in dict.fromkeys(map(self._corpus_of, self.questions)):
            if not path.is_file() or (corpus := _sha256_of_file(path)) not in needed:
                continue
            place = self._place(corpus)
            if kept(place) is None:
                passages = list(dict.fromkeys(_passages(path)))
                if not passages:
                    raise ConfigError(
                        f"MultihopQAEnv: the corpus is empty: there is no passage in {path}; name one as corpus"
                    )
                keep(place, sha256_of(passages), functools.partial(Texts.write, passages))
            self.retriever.prepare(Texts(place), place.parent, progress)

    def start(self) -> None:
        self._opened = {}  # for all episodes of this process

    def reset(self, task: Task) -> Turn:
        corpus = task.data["corpus"]
        if corpus not in self._opened:
            place = self._place(corpus)
            require_whole(place)
            retriever = copy.copy(self.retriever)
            retriever.start(place.parent)
            self._opened[corpus] = Texts(place), retriever
        self._passages, self._index = self._opened[corpus]
        self._task = task.data
        self._steps = self._searches = 0
        self._rows: list[int] = []
        self._asked: set[str] = set()
        found = self._search(self._task["question"])
        labels = {name: self._task[name] for name in _LABELS.values() if name in self._task}
        return self._turn("" if self.show_all else found, info={**labels, "f1": 0.0, "exact_match": 0.0})

    def step(self, action: Action) -> Turn:
        self._steps += 1
        if (calls := len(action.tool_calls)) > self.max_calls:
            return self._refused(f"At most {self.max_calls} calls may be made at once, not {calls}: none was made.")
        if calls:
            return self._called(action.tool_calls)
        said = _ANSWER.findall(action.text or action.command or "")
        if not said or not said[-1].strip():
            return self._refused(f"Call search, or give the final answer in this form: {_FORM}")
        answers = self._task["answers"]
        right = exact_match(said[-1], answers)
        info = {"f1": f1(said[-1], answers), "exact_match": float(right)}
        return self._turn(info=info, reward=float(right), success=right, terminated=True)

    def expert_action(self) -> Action:
        """Searches for the titles of the gold passages, then gives the answer."""
        titles = [title for title in self._task["titles"] if title not in self._asked | self._titles()]
        if titles and self._steps + 1 != self.max_steps:
            calls = enumerate(titles[: self.max_calls])
            return Action(tool_calls=tuple(ToolCall("search", {"query": title}, f"call_{n}") for n, title in calls))
        return Action(text=_FORM.replace("...", self._task["answers"][0]))

    def _called(self, calls: Sequence[ToolCall]) -> Turn:
        queries = [str(call.arguments.get("query", "")) for call in calls]
        found = [self._search(query) for query in queries]
        self._searches += len(calls)
        if not self.show_all:
            said = [(text or "Nothing new is found.", call.id) for call, text in zip(calls, found, strict=True)]
            return self._turn(messages=tuple(Message("tool", *each) for each in said))
        vain = [query for query, text in zip(queries, found, strict=True) if not text]
        return self._turn(f"Nothing new is found for: {'; '.join(vain)}" if vain else "")

    def _search(self, query: str) -> str:
        """Adds what is found; what of it is new, as text."""
        self._asked.add(query)
        new = [row for row, _ in self._index.search(query, self.top_k) if row not in self._rows]
        self._rows += new
        return self._shown(len(self._rows) - len(new))

    def _shown(self, first: int = 0) -> str:
        """Passages in the order in which they were found, from the ``first`` on."""
        rows = enumerate(self._rows[first:], start=first + 1)
        split = ((number, *self._passages[row].split("\n", 1)) for number, row in rows)
        return "\n".join(f"[{number}] {title}: {text}" for number, title, text in split)

    def _titles(self) -> set[str]:
        return {self._passages[row].partition("\n")[0] for row in self._rows}

    def _refused(self, why: str) -> Turn:
        return self._turn(action_valid=False, feedback=why)

    def _turn(self, text: str = "", info: Mapping[str, str | float] | None = None, **outcome: Any) -> Turn:
        if self.show_all:
            text = "\n".join(part for part in ("Passages found so far:", self._shown(), text) if part)
        figures: dict[str, str | float] = {"searches": self._searches, **(info or {})}
        if gold := set(self._task["titles"]):
            figures["recall"] = len(gold & self._titles()) / len(gold)
        outcome = {"success": False, "terminated": self._steps == self.max_steps, **outcome}
        goal = f"Question: {self._task['question']}\n{_ASKS}"
        return Turn(text, goal, state_key=str(sorted(self._rows)), info=figures, **outcome)

    def _corpus_of(self, split: str) -> Path:
        """The file whose passages are searched."""
        named = self.corpus.get(split) if isinstance(self.corpus, dict) else self.corpus
        return self.folder / user_path(named or self.questions[split])

    def _place(self, corpus: str) -> Path:
        """Folder of a corpus's passages; indices lie beside it."""
        return self._cache / corpus / "passages"


# ---- files ----


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """What a file of JSON or JSONL holds, packed by gzip or xz or not."""
    number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            whole = file.read(1) == "["
            file.seek(0)
            for record in json.load(file) if whole else map(json.loads, filter(str.strip, file)):
                if not isinstance(record, dict):
                    raise ValueError(record)
                yield record
                number += 1
    except FileNotFoundError:
        raise ConfigError(f"MultihopQAEnv: there is no {path}; get it (docs/multihop_qa.md), or name others") from None
    except (ValueError, EOFError, lzma.LZMAError, gzip.BadGzipFile, RecursionError):
        behind = f" behind record {number}" if number else ""
        raise ConfigError(f"MultihopQAEnv: {path} is cut off or damaged{behind}; get it again") from None
    except OSError as error:
        raise ConfigError(f"MultihopQAEnv: cannot read {path}: {error.strerror}") from None


def _task(record: Mapping[str, Any], path: Path, corpus: str, names: Mapping[str, list[str]]) -> Task:
    id, question, answer = record.get("_id", record.get("id")), record.get("question"), record.get("answer")
    if not isinstance(id, str) or not isinstance(question, str):
        raise ConfigError(f"MultihopQAEnv: {path} holds what is no question: {in_short(json.dumps(record), 60)}")
    if not isinstance(answer, str) or not answer.strip() or record.get("answerable") is False:
        raise ConfigError(f"MultihopQAEnv: question {id} of {path} has no answer; take a file with answers")
    try:
        others = [*(record.get("answer_aliases") or ()), *names.get(str(record.get("answer_id")), ())]
        answers = list(dict.fromkeys(map(str.strip, [answer, *others])))
        titles = list(dict.fromkeys(map(_plain, _gold(record))))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError(f"MultihopQAEnv: question {id} of {path} is in no known format") from None
    kinds = {name: record[key] for key, name in _LABELS.items() if isinstance(record.get(key), str)}
    if hops := re.match(r"\dhop", id):  # MuSiQue
        kinds["task_type"] = hops[0]
    return Task(f"multihop_qa/{id}", {"question": question, "answers": answers, "titles": titles, "corpus": corpus} | kinds)


def _gold(record: Mapping[str, Any]) -> Iterable[str]:
    """Titles of the passages that hold the answer."""
    if "paragraphs" in record:
        return [each["title"] for each in record["paragraphs"] if each["is_supporting"]]
    facts = record.get("supporting_facts", ())
    return record.get("gold_titles", facts["title"] if isinstance(facts, dict) else [title for title, _ in facts])


def _passages(path: Path) -> Iterator[str]:
    """All passages of a file, title first, on a line of its own."""
    for number, record in enumerate(_records(path), start=1):
        try:
            for title, text in _pairs(record):
                yield f"{_plain(title)}\n{text if isinstance(text, str) else ' '.join(map(str.strip, text))}"
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(f"MultihopQAEnv: passages of record {number} of {path} are in no known format") from None


def _pairs(record: Mapping[str, Any]) -> Iterable[tuple[str, str | list[str]]]:
    """Title and text, or its sentences."""
    if "paragraphs" in record:
        return [(each["title"], each["paragraph_text"]) for each in record["paragraphs"]]
    if "title" in record:
        return [(record["title"], record["text"])]
    given = record.get("context", ())
    return zip(given["title"], given["sentences"], strict=True) if isinstance(given, dict) else given


def _plain(title: str) -> str:
    """HotpotQA's have ``&amp;`` in them."""
    return " ".join(html.unescape(title).split())


def _names(path: Path) -> dict[str, list[str]]:
    """Other names of things, by their id in Wikidata."""
    try:
        return {record["Q_id"]: [*record["aliases"], *record["demonyms"]] for record in _records(path)}
    except (KeyError, TypeError):
        raise ConfigError(f"MultihopQAEnv: {path} is no file of aliases as 2WikiMultihopQA has it") from None


def _sha256_of_file(path: Path) -> str:
    try:
        about = path.stat()
        return _hashed(path, about.st_size, about.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"MultihopQAEnv: cannot read {path}: {error.strerror}; get it (docs/multihop_qa.md)") from None


@functools.lru_cache
def _hashed(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- scores ----


def normalised(answer: str) -> str:
    """As SQuAD compares answers (Rajpurkar et al., 2016): no case, punctuation, articles or extra spaces."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(answer: str, right: Iterable[str]) -> bool:
    """Whether it is one of the right ones."""
    return normalised(answer) in map(normalised, right)


def f1(answer: str, right: Iterable[str]) -> float:
    """Harmonic mean of precision and recall of its words, with the best of the right ones; all or nothing for yes and no."""
    return max(_f1(normalised(answer), normalised(each)) for each in right)


def _f1(answer: str, right: str) -> float:
    if answer == right or {answer, right} & {"yes", "no", "noanswer"}:
        return float(answer == right)
    words, others = answer.split(), right.split()
    common = (Counter(words) & Counter(others)).total()
    return 2 * common / (len(words) + len(others))
