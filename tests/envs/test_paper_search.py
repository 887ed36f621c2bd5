"""PaperSearchEnv on the thirty papers of tests/paper_files.py, in files of its own."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from convert_pasa import main as convert_pasa

from steppo.data.command import main as data_command
from steppo.envs import Env, PaperSearchEnv
from steppo.envs.checks import checked_turn
from steppo.envs.given import checked_tools, copied, started
from steppo.envs.paper_search import CrossEncoderRelevance, LocalPapers, Paper, Relevance
from steppo.envs.paper_search.env import figures
from steppo.envs.paper_search.papers import plain_id
from steppo.envs.pool import EnvPool
from steppo.errors import ConfigError, SteppoError
from steppo.panel.command import main as panel_command
from steppo.types import Action, Task, ToolCall, Turn
from tests.cli_helpers import run
from tests.paper_files import BEES, CITATIONS, LIGHTS, PAPERS, question, write_data, write_lines

pytest.importorskip("bm25s", reason="needs the extra search")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("papers"))


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Data that a test may spoil."""
    return write_data(tmp_path / "data")


def no_progress(done: int, total: int) -> None:
    pass


def local(folder: Path, **settings: Any) -> LocalPapers:
    settings = {"citations": str(folder / "citations.jsonl"), "cache_dir": str(folder / "cache"), **settings}
    return LocalPapers(str(folder / "papers.jsonl"), **settings)


def opened(folder: Path, papers: LocalPapers | None = None, **settings: Any) -> PaperSearchEnv:
    env = PaperSearchEnv(str(folder), papers or local(folder), **settings)
    env.prepare([], no_progress)
    env.start()
    return env


def task_about(env: Env, word: str) -> Task:
    return next(task for split in env.splits for task in env.tasks(split) if word in task.data["question"])


def search(*queries: str) -> Action:
    return Action(tool_calls=tuple(ToolCall("search", {"query": query}, f"call_{n}") for n, query in enumerate(queries)))


def expand(*papers: str) -> Action:
    return Action(tool_calls=tuple(ToolCall("expand", {"paper_id": paper}, f"call_{n}") for n, paper in enumerate(papers)))


def said(turn: Turn) -> list[str]:
    return [message.content for message in turn.messages]


class Lengths(Relevance):
    """A number that is easily worked out: hundredths of the title's length."""

    def scores(self, question: str, papers: Any, answers: Any) -> list[float]:
        return [len(paper.title) / 100 for paper in papers]


# ---- figures, reward, state ----


@pytest.mark.parametrize(
    ("found", "answers", "precision", "recall", "f1"),
    [
        ("abcd", "ab", 0.5, 1.0, 2 / 3),  # 2 of 4 are right, 2 of 2 are found: 2 * 0.5 * 1 / 1.5
        ("abc", "bcxyz", 2 / 3, 0.4, 0.5),  # 2 of 3, 2 of 5: 2 * 2/3 * 2/5 / (16/15)
        ("ab", "cd", 0.0, 0.0, 0.0),
        ("", "cd", 0.0, 0.0, 0.0),
        ("cd", "dc", 1.0, 1.0, 1.0),
    ],
)
def test_figures_by_hand(found: str, answers: str, precision: float, recall: float, f1: float) -> None:
    assert figures(set(found), set(answers)) == pytest.approx({"precision": precision, "recall": recall, "f1": f1})


def test_an_episode_by_hand(folder: Path) -> None:
    """Answers: 2101.00001 and 2101.00005. What bees cite is 00001; what cites 00001 are the other four."""
    env = opened(folder, top_k=2)
    turn = env.reset(task_about(env, "listen to bees"))
    assert turn.goal == "Find all papers that answer this: Which papers listen to bees in a hive?"
    assert (turn.text, turn.success) == ("Papers found: none yet.", False)
    assert turn.info == {"precision": 0, "recall": 0, "f1": 0, "papers": 0}, "an episode of refused answers counts too"

    turn = env.step(search("waggle dances", "queen in the hive", "Waggle  DANCES"))
    assert said(turn) == ["Found 1, 1 of them new.", "Found 2, 2 of them new.", "Repeated: this search was made before."]
    assert [message.tool_call_id for message in turn.messages] == ["call_0", "call_1", "call_2"]
    assert turn.reward == -0.5
    assert turn.info == {"precision": 0, "recall": 0, "f1": 0, "papers": 3}

    turn = env.step(expand(f"arXiv:{BEES[3]}v1"))
    assert (said(turn), turn.reward, turn.terminated) == (["Found 1, 1 of them new."], 1.0, False)
    assert turn.info == pytest.approx({"precision": 1 / 4, "recall": 1 / 2, "f1": 1 / 3, "papers": 4})
    assert turn.text.splitlines()[:2] == ["Papers found: 4.", f"[{BEES[0]}] {PAPERS[BEES[0]]} (relevance 1.00)"]
    assert turn.text.splitlines()[2] == f"[{BEES[3]}] {PAPERS[BEES[3]]} (relevance 0.00)", "then in the order they came"

    turn = env.step(expand(BEES[0], BEES[3], LIGHTS[0]))
    assert said(turn) == [
        "Found 4, 1 of them new.",
        "Repeated: this expand was made before.",
        "This id is not in the list.",
    ]
    assert (turn.reward, turn.success, turn.action_valid) == (0.5, True, True)
    assert turn.info == pytest.approx({"precision": 2 / 5, "recall": 1, "f1": 4 / 7, "papers": 5})

    turn = env.step(Action(text="That is all."))
    assert (turn.terminated, turn.success, turn.reward) == (True, True, 0)


def test_the_reward_is_of_the_three_best_that_are_new_in_the_step(folder: Path) -> None:
    env = opened(folder, relevance=Lengths())
    env.reset(task_about(env, "bells tuned"))
    turn = env.step(search("bells simulation towers", "carillon bronze ringing"))
    assert turn.info["papers"] == 5  # titles of 33 and 31 letters, then of 34, 29 and 36
    assert turn.reward == pytest.approx(0.36 + 0.34 + 0.33)
    turn = env.step(search("church bells", "ropes", "ropes"))
    assert turn.reward == pytest.approx(0.33 - 0.5), "those found before count no more"


def test_what_is_not_relevant_enough_is_dropped(folder: Path) -> None:
    env = opened(folder, relevance=Lengths(), min_relevance=0.35)
    env.reset(task_about(env, "listen to bees"))
    turn = env.step(search("hive hives bees"))
    assert said(turn) == ["Found 4, 4 of them new."]  # titles of 35, 32, 30 and 35 letters
    assert turn.text.splitlines()[0] == "Papers found: 2."
    assert {line[:12] for line in turn.text.splitlines()[1:]} == {f"[{BEES[0]}]", f"[{BEES[4]}]"}
    assert (turn.reward, turn.info["precision"], turn.info["papers"]) == (0.7, 1, 2)
    turn = env.step(expand(BEES[0], BEES[1]))
    assert said(turn) == ["Found 4, 1 of them new.", "This id is not in the list."]


def test_the_list_has_the_most_relevant(folder: Path) -> None:
    env = opened(folder, relevance=Lengths(), max_listed=2)
    env.reset(task_about(env, "bells tuned"))
    turn = env.step(search("bells simulation towers carillon bronze ringing"))
    assert turn.text.splitlines()[0] == "Papers found: 5, of which these are the 2 most relevant."
    assert [line[:12] for line in turn.text.splitlines()[1:]] == ["[2104.00002]", "[2104.00004]"]
    assert turn.info["papers"] == 5


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        (search("  "), "Give words to look for."),
        (expand(BEES[0]), "This id is not in the list."),
        (expand(" "), "Give the id of a paper in the list."),
        (Action(tool_calls=(ToolCall("read", {}),)), "There is no tool read."),
        (Action(tool_calls=(ToolCall("search", {"paper_id": "x"}),)), "Give words to look for."),
    ],
)
def test_what_cannot_be_carried_out_is_told(folder: Path, action: Action, answer: str) -> None:
    env = opened(folder)
    env.reset(task_about(env, "listen to bees"))
    turn = env.step(action)
    assert (said(turn), turn.action_valid, turn.reward) == ([answer], False, 0)
    assert env.step(search("bees")).action_valid


def test_queries_that_find_nothing(folder: Path) -> None:
    env = opened(folder)
    env.reset(task_about(env, "listen to bees"))
    turn = env.step(search("zzz", "the", "\x00", "' OR 1=1 --", "🐝"))
    assert said(turn) == ["Found 0, 0 of them new."] * 5
    assert turn.action_valid
    checked_turn(turn)


def test_more_calls_than_a_step_may_make(folder: Path) -> None:
    env = opened(folder, max_calls=2)
    env.reset(task_about(env, "listen to bees"))
    turn = env.step(search("bees", "bells", "ropes"))
    assert said(turn)[2] == "Not made: a step may make 2 calls."
    assert env.step(search("ropes")).reward == 0, "so it is not repeated later"


def test_without_citations_there_is_no_expand(folder: Path) -> None:
    assert [tool.name for tool in checked_tools(opened(folder))] == ["search", "expand"]
    env = opened(folder, local(folder, citations=None))
    assert [tool.name for tool in checked_tools(env)] == ["search"]
    env.reset(task_about(env, "listen to bees"))
    env.step(search("bees"))
    assert said(env.step(expand(BEES[0]))) == ["There is no tool expand."]


def test_expansions_are_references_then_citations(folder: Path) -> None:
    papers = local(folder)
    papers.prepare(no_progress)
    papers.start()
    assert [paper.id for paper in papers.expand(LIGHTS[2])] == [LIGHTS[1], LIGHTS[3]], "9999.99999 is not there"
    assert [paper.id for paper in papers.expand(BEES[0])] == BEES[1:]
    assert papers.expand("2103.00001") == papers.expand("nowhere") == []
    assert papers.expand(BEES[1]) == [Paper(BEES[0], PAPERS[BEES[0]], "We study counting bees with acoustic sensors.")]
    assert papers.lacks([BEES[0], "nowhere"]) == ["nowhere"]


def test_a_paper_that_everybody_cites(tmp_path: Path) -> None:
    write_lines(tmp_path / "papers.jsonl", [{"id": f"p{n:02}", "title": f"Paper {n}"} for n in range(50)])
    links = [{"id": f"p{n:02}", "references": ["p00", "p00", f"p{n:02}"]} for n in range(1, 50)]
    write_lines(tmp_path / "citations.jsonl", links)
    papers = local(tmp_path)
    papers.prepare(no_progress)
    papers.start()
    assert [paper.id for paper in papers.expand("p00")] == [f"p{n:02}" for n in range(1, 31)]
    assert [paper.id for paper in papers.expand("p07")] == ["p00"], "once, and not itself"


def test_the_expert_finds_all(folder: Path) -> None:
    env = opened(folder, top_k=1)
    for task in [task for split in env.splits for task in env.tasks(split)]:
        turn, steps = env.reset(task), 0
        while not turn.terminated:
            action = env.expert_action()
            turn, steps = env.step(action), steps + 1
            assert turn.reward == min(3, len(action.tool_calls))
        assert (turn.success, turn.info["f1"]) == (True, 1.0)
        assert steps == 2, "all titles at once, then it ends"


def test_the_expert_takes_as_many_calls_as_there_may_be(folder: Path) -> None:
    env = opened(folder, top_k=1, max_calls=3)
    env.reset(task_about(env, "All about bees"))
    calls = [len(env.expert_action().tool_calls)]
    env.step(env.expert_action())
    assert [*calls, len(env.expert_action().tool_calls)] == [3, 1]


# ---- in worker processes ----


def test_it_plays_in_workers_as_here(folder: Path) -> None:
    env = opened(folder)
    tasks = env.tasks("train")[:3]
    pool = EnvPool(PaperSearchEnv(str(folder), local(folder)), 3, 2, 60.0, None, 60.0)
    try:
        for slot, task in enumerate(tasks):
            pool.reset(slot, task, want_expert=True)
        for slot, task in enumerate(tasks):
            pool.step(slot, pool.receive(slot).turn.expert_action)
            env.reset(task)
            turn = env.step(env.expert_action())
            assert pool.receive(slot).turn == replace(turn, expert_action=env.expert_action())
    finally:
        pool.close()


def test_episodes_of_a_process_share_the_index(folder: Path) -> None:
    prototype = pickle.loads(pickle.dumps(PaperSearchEnv(str(folder), local(folder))))
    prototype.prepare([], no_progress)
    shared = started(prototype)
    first, second = copied(prototype, shared), copied(prototype, shared)
    task = task_about(first, "listen to bees")
    first.reset(task), second.reset(task)
    assert first._papers is second._papers
    first.step(search("bees"))
    assert second.step(search("bees")).reward > 0


# ---- questions ----


def test_tasks(folder: Path) -> None:
    env = PaperSearchEnv(str(folder))
    assert {split: len(env.tasks(split)) for split in env.splits} == {"train": 4, "valid": 2, "test": 1}
    assert env.tasks("AutoScholarQuery/dev") == env.tasks("valid")
    assert [task.id.rpartition("_")[2] for task in env.tasks("train")] != ["0", "1", "2", "3"], "mixed"
    task = task_about(env, "listen to bees")
    assert task.id == "paper_search/AutoScholarQuery_train_0"
    assert task.data["answers"] == [[BEES[0], PAPERS[BEES[0]]], [BEES[4], PAPERS[BEES[4]]]], "without arXiv's version"
    assert len(PaperSearchEnv(str(folder), num_train=2, num_test=0).tasks("train")) == 2
    assert PaperSearchEnv(str(folder), num_test=0).tasks("test") == []
    with pytest.raises(ConfigError, match="no split 'dev'; it has train, valid, test"):
        env.tasks("dev")


def test_questions_of_another_corpus(fresh: Path) -> None:
    """With ids that are not arXiv's, beside those of arXiv."""
    answers = [{"id": "b683c37273b2", "arxiv_id": "1709.10441", "title": "A\n  Title"}]
    write_lines(fresh / "RealScholarQuery/test.jsonl", [{"question": "Which?", "answers": answers}])
    [task] = PaperSearchEnv(str(fresh)).tasks("test")
    assert task.id == "paper_search/RealScholarQuery_test_1"
    assert task.data == {"question": "Which?", "answers": [["b683c37273b2", "A Title"]]}


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("2210.05663v12", "2210.05663"),
        (" 2210.05663 ", "2210.05663"),
        ("arXiv:0706.1234v1", "0706.1234"),
        ("hep-th/9901001v3", "hep-th/9901001"),
        ("0d604994b569", "0d604994b569"),
        ("cv1", "cv1"),
    ],
)
def test_plain_ids(given: str, plain: str) -> None:
    assert plain_id(given) == plain


def test_content_is_question_and_answers(fresh: Path) -> None:
    env = opened(fresh)
    task = task_about(env, "bread")
    before = env.content(task)
    reordered = Task(task.id, {"answers": task.data["answers"][::-1], "question": task.data["question"]})
    assert env.content(reordered) == before
    for changed in ({"answers": task.data["answers"][1:]}, {"question": "Which papers on bread?"}):
        assert env.content(Task(task.id, {**task.data, **changed})) != before


def test_version_is_of_the_files(fresh: Path) -> None:
    before = opened(fresh).version
    assert before == local(fresh, cache_dir=str(fresh / "other")).version
    assert before != local(fresh, citations=None).version
    write_lines(fresh / "citations.jsonl", [{"id": BEES[0], "references": [LIGHTS[0]]}])
    env = opened(fresh)
    assert env.version != before
    env.reset(task_about(env, "listen to bees"))
    env.step(search("acoustic sensors"))
    assert LIGHTS[0] in env.step(expand(BEES[0])).text, "another index is made"


def test_an_index_is_made_once(fresh: Path) -> None:
    opened(fresh)
    made = {path: path.stat().st_mtime_ns for path in (fresh / "cache").rglob("*") if path.is_file()}
    env = opened(fresh)
    assert {path: path.stat().st_mtime_ns for path in (fresh / "cache").rglob("*") if path.is_file()} == made
    [database] = (fresh / "cache").rglob("papers.sqlite")
    database.write_bytes(database.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="is missing or damaged"):
        env.papers.start()
    assert opened(fresh).reset(task_about(env, "listen to bees")).goal


# ---- what is wrong with the data ----


def spoilt(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("papers.jsonl", lambda text: "", "the corpus is empty: there is no paper in .*papers.jsonl"),
        ("papers.jsonl", lambda text: text[:-20], "papers.jsonl is cut off or damaged at line 30; get it again"),
        ("papers.jsonl", lambda text: "7\n" + text, "papers.jsonl is cut off or damaged at line 1; get it again"),
        ("papers.jsonl", lambda text: text + text, f"line 31: there is another paper with the id {BEES[0]}"),
        ("papers.jsonl", lambda text: text.replace("title", "titel", 1), "line 1: a paper has no id or no title"),
        ("papers.jsonl", lambda text: text.replace('"Queen', '7, "x": "', 1), "line 2: of a paper, title must be a string"),
        ("citations.jsonl", lambda text: text[:-9], "citations.jsonl is cut off or damaged at line 8"),
        ("citations.jsonl", lambda text: text + text, "line 9: there must be one line"),
        ("citations.jsonl", lambda text: text.replace("references", "cites", 1), "line 1: there must be one line"),
    ],
)
def test_damaged_papers(fresh: Path, name: str, change: Callable[[str], str], message: str) -> None:
    spoilt(fresh / name, change)
    with pytest.raises(ConfigError, match=message) as error:
        opened(fresh)
    assert "\n" not in str(error.value)
    write_data(fresh)
    assert opened(fresh), "nothing half-made is left"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", r"there is no question in .*dev\.jsonl"),
        (lambda text: text[:-50], r"dev\.jsonl is cut off or damaged at line 2"),
        (
            lambda text: text.replace("answer_arxiv_id", "ids", 1),
            r"dev\.jsonl, line 1 is no question with answers in PaSa's form",
        ),
        (lambda text: text.replace('"question": "', '"question": "", "x": "', 1), r"dev\.jsonl, line 1 is no question"),
        (lambda text: text.replace('["2102.00004"]', "[7]", 1), r"dev\.jsonl, line 1 is no question"),
        (lambda text: text.replace('["2102.00004"]', "null", 1), r"dev\.jsonl, line 1 is no question"),
    ],
)
def test_damaged_questions(fresh: Path, change: Callable[[str], str], message: str) -> None:
    spoilt(fresh / "AutoScholarQuery/dev.jsonl", change)
    with pytest.raises(ConfigError, match=message):
        PaperSearchEnv(str(fresh)).tasks("valid")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "paper_search/odd has no answer"),
        ([""], "paper_search/odd has an answer without an id"),
        (
            [BEES[0], "2999.00001", "2999.00002"],
            "the answer 2999.00001 and 1 more of paper_search/odd is not among the papers",
        ),
    ],
)
def test_questions_that_cannot_be_played(fresh: Path, answers: list[str], message: str) -> None:
    """They cost their episodes, and no others."""
    path = fresh / "AutoScholarQuery/dev.jsonl"
    spoilt(path, lambda text: text + json.dumps(question("Odd?", answers, "odd")) + "\n")
    env = opened(fresh)
    task = task_about(env, "Odd?")
    for call in (env.content, env.reset):
        with pytest.raises(ConfigError, match=message):
            call(task)
    assert env.reset(task_about(env, "bread")).goal


def test_unknown_answers_count_as_not_found(fresh: Path) -> None:
    write_lines(fresh / "RealScholarQuery/test.jsonl", [question("Bees?", [BEES[0], "2999.00001"], "odd")])
    env = opened(fresh, allow_unknown=True)
    [task] = env.tasks("test")
    task.data["answers"][1][1] = "Xyzzy"
    assert env.content(task)
    env.reset(task)
    turn = env.step(search(PAPERS[BEES[0]]))
    assert (turn.info["recall"], turn.success) == (0.5, False)
    turn = env.step(env.expert_action())
    assert said(turn) == ["Found 0, 0 of them new."]
    assert env.expert_action() == Action(text="These are the papers."), "it does not try again"


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAPER_SEARCH_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"set data or \$PAPER_SEARCH_DATA"):
        PaperSearchEnv()
    monkeypatch.setenv("PAPER_SEARCH_DATA", str(tmp_path))
    env = PaperSearchEnv()
    with pytest.raises(ConfigError, match=r"there is no .*AutoScholarQuery/train\.jsonl"):
        env.tasks("train")
    for call in (lambda: env.version, lambda: env.prepare([], no_progress)):
        with pytest.raises(ConfigError, match=r"cannot read .*papers\.jsonl: No such file"):
            call()
    write_data(tmp_path)
    with pytest.raises(SteppoError, match="missing or damaged"):
        env.start()
    assert [tool.name for tool in PaperSearchEnv().tools] == ["search", "expand"]


@pytest.mark.parametrize("option", ["max_steps", "max_calls", "top_k", "max_listed", "num_train", "num_valid", "num_test"])
def test_settings_out_of_range(folder: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"PaperSearchEnv: {option} must be at least"):
        PaperSearchEnv(str(folder), **{option: -1})


# ---- a cross-encoder ----


def test_a_cross_encoder(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra dense")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = sorted({word for title in PAPERS.values() for word in title.lower().split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for outputs in (1, 2):
        model = BertForSequenceClassification(BertConfig(vocab_size=len(words) + 5, num_labels=outputs, **size))
        model.save_pretrained(tmp_path / str(outputs))
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / str(outputs))
    env = opened(folder, relevance=CrossEncoderRelevance(str(tmp_path / "1")))
    env.reset(task_about(env, "listen to bees"))
    turn = checked_turn(env.step(search("bees", "bells")))
    assert 0 < turn.reward < 3
    scores = [float(line.rpartition(" ")[2].rstrip(")")) for line in turn.text.splitlines()[1:]]
    assert sorted(scores, reverse=True) == scores
    for model, message in (("2", "gives 2 numbers for a pair"), ("3", "cannot load the model")):
        with pytest.raises(ConfigError, match=message):
            CrossEncoderRelevance(str(tmp_path / model)).prepare()


def test_a_cross_encoder_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r'needs sentence-transformers: pip install "steppo\[dense\]"'):
        CrossEncoderRelevance().prepare()


# ---- as a user meets it ----


def options(folder: Path) -> list[str]:
    papers = [f"file={folder}/papers.jsonl", f"citations={folder}/citations.jsonl", f"cache_dir={folder}/cache"]
    env = [f"data={folder}", "papers=LocalPapers", *(f"papers.{setting}" for setting in papers), "top_k=2", "max_steps=3"]
    return ["--data.source.env=PaperSearchEnv", *(f"--data.source.env.{setting}" for setting in env)]


SMALL = ["--data.source.max_prompt_tokens=1500", "--model.policy.max_positions=2048"]


def test_a_run(folder: Path, tmp_path: Path) -> None:
    short = ["--warm_start.updates=0", "--trainer.max_epochs=1", "--rollout.episodes_per_iteration=2", "--data.eval_tasks=2"]
    cli = run(tmp_path, *options(folder), *SMALL, *short, "--data.source.max_new_tokens=8", "--data.num_minibatches=1")
    assert {"val/info/f1", "val/info/recall"} <= cli.trainer.logged_metrics.keys()


def test_a_changed_answer_is_refused_and_named(fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    panel = tmp_path / "valid.json"
    config = [f"--config={Path(__file__).parents[1] / 'toy.yaml'}", *options(fresh)]
    panel_command(["make", *config, "--split=valid", f"--out={panel}"])
    played = [*options(fresh), "--evaluation.player=expert", f"--data.eval_panel={panel}"]
    run(tmp_path / "same", *played, command="validate")
    figures = json.loads((tmp_path / "same/validate.json").read_text())["figures"]
    assert (figures["success_rate"], figures["info"]["recall"]) == (1, 1)
    spoilt(fresh / "AutoScholarQuery/dev.jsonl", lambda text: text.replace("2103.00005", "2103.00004"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "changed", *played, command="validate")
    assert stopped.value.code == 2
    assert "paper_search/AutoScholarQuery_dev_1" in capsys.readouterr().err


def test_the_data_command(fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["paper_search", f"--data={fresh}", "--papers=LocalPapers", f"--papers.file={fresh}/papers.jsonl"]
    words.append(f"--papers.cache_dir={fresh}/cache")
    data_command(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines[1:]] == ["train: 4 tasks", "valid: 2 tasks", "test: 1 tasks"]
    assert lines[0].startswith("version: papers ")
    write_lines(fresh / "RealScholarQuery/test.jsonl", [question("Odd?", [], "odd")])
    with pytest.raises(SystemExit):
        data_command(words)
    out, err = capsys.readouterr()
    assert "1 of 1 tasks of test: PaperSearchEnv: paper_search/odd has no answer" in err
    assert len(out.splitlines()) == 3


def test_the_publishers_papers_are_converted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of files in their form: the same papers and citations as those of the fixture."""
    database = tmp_path / "paper_database"
    database.mkdir()
    (database / "id2paper.json").write_text(json.dumps({**PAPERS, "1": "A Paper That Is Not There"}))
    with zipfile.ZipFile(database / "cs_paper_2nd.zip", "w") as archive:
        for paper, title in PAPERS.items():
            cited = [PAPERS.get(other, "Unknown").upper() for other in CITATIONS.get(paper, [])]
            sections: Any = {"Introduction": cited[:1], "Methods": [*cited, title]} if cited else ""
            name = "".join(filter(str.isalpha, title)).lower()
            archive.writestr(name, json.dumps({"title": title.replace(" ", "\n "), "abstract": None, "sections": sections}))
    convert_pasa([str(database), f"--out={tmp_path}"])
    assert capsys.readouterr().out == f"30 papers, 8 citations in {tmp_path}\n"
    ours, theirs = local(folder), local(tmp_path)
    for papers in (ours, theirs):
        papers.prepare(no_progress)
        papers.start()
    for paper in PAPERS:
        assert [one.title for one in theirs.expand(paper)] == [one.title for one in ours.expand(paper)]
    assert [paper.id for paper in theirs.search("carillon", 1)] == ["2104.00004"]
    (database / "id2paper.json").write_text("{")
    with pytest.raises(SystemExit):
        convert_pasa([str(database), f"--out={tmp_path}"])
    assert "is not PaSa's paper_database, or damaged" in capsys.readouterr().err
