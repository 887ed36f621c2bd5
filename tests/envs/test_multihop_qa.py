"""MultihopQAEnv, on the invented passages of tests/qa_data.py."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchmetrics.functional.text import squad

from steppo.data.command import main as data
from steppo.envs import MultihopQAEnv
from steppo.envs.multihop_qa import exact_match, f1, normalised
from steppo.envs.pool import EnvPool
from steppo.errors import ConfigError
from steppo.panel.command import main as panel
from steppo.types import Action, Task, ToolCall, Turn
from tests.cli.test_errors import refused
from tests.cli_helpers import TOY, evaluations, places, run
from tests.qa_data import PASSAGES, hotpot, musique, write_lines, write_questions
from tests.qa_data import TRAIN as TRAIN_QUESTIONS

SETS = {
    "train": "hotpot_train_v1.1.json",
    "valid": "hotpot_dev_distractor_v1.json",
    "2wiki": "2wikimultihopqa_dev.json",
    "musique": "musique_ans_v1.0_dev.jsonl",
}


def ignore(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("qa"))


@pytest.fixture
def make(folder: Path) -> Callable[..., MultihopQAEnv]:
    def made(**settings: Any) -> MultihopQAEnv:
        given = {"questions": SETS, "aliases": "id_aliases.json", "cache_dir": str(folder / "cache")}
        return MultihopQAEnv(**{"data": str(folder), **given, **settings})

    return made


def prepared(env: MultihopQAEnv, split: str = "train") -> list[Task]:
    tasks = env.tasks(split)
    env.prepare(tasks, ignore)
    env.start()
    return tasks


def started(env: MultihopQAEnv, words: str, split: str = "train") -> Turn:
    """The first turn of the question that has these words."""
    return env.reset(next(task for task in prepared(env, split) if words in task.data["question"]))


def search(*queries: str) -> Action:
    return Action(tool_calls=tuple(ToolCall("search", {"query": query}, f"call_{n}") for n, query in enumerate(queries)))


def answer(text: str) -> Action:
    return Action(text=f"So it is <answer>{text}</answer>.")


# ---- scores ----


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The Quiet Hive!", "quiet hive"),
        ("  An  apple,\na day ", "apple day"),
        ("U.S.A.", "usa"),
        ("Theatre and anthem", "theatre and anthem"),
        ("e-mail's", "emails"),
        ("Fårö: 1,204 m", "fårö 1204 m"),
        ("The", ""),
    ],
)
def test_answers_are_normalised_as_squad_does(given: str, expected: str) -> None:
    assert normalised(given) == expected


@pytest.mark.parametrize(
    ("given", "right", "match", "score"),
    [
        ("the Port Selby", ["Port Selby"], True, 1.0),
        ("harbour of Port Selby", ["Port Selby"], False, 2 * (2 / 4 * 1) / (2 / 4 + 1)),  # 2 of 4 words, 2 of 2
        ("Selby Selby", ["Port Selby"], False, 0.5),  # a word counts once: 1 of 2, 1 of 2
        ("Selby harbour", ["Port Selby", "Selby harbour"], True, 1.0),
        ("old Selby harbour", ["Port Selby", "Selby harbour"], False, 2 * (2 / 3) / (2 / 3 + 1)),  # of the best alias
        ("Hallum", ["Port Selby"], False, 0.0),
        ("yes, it is", ["yes"], False, 0.0),  # HotpotQA: all or nothing
        ("Yes.", ["yes"], True, 1.0),
        ("no", ["no exit"], False, 0.0),
    ],
)
def test_scores_by_hand(given: str, right: list[str], match: bool, score: float) -> None:
    assert exact_match(given, right) is match
    assert f1(given, right) == pytest.approx(score)
    if not {"yes", "no"} & {normalised(each) for each in [given, *right]}:
        theirs = squad({"prediction_text": given, "id": "1"}, {"answers": {"answer_start": [0], "text": right}, "id": "1"})
        assert [100 * exact_match(given, right), 100 * f1(given, right)] == pytest.approx(
            [float(theirs["exact_match"]), float(theirs["f1"])]
        )


# ---- files ----


def test_each_format_gives_question_answers_and_gold_titles(make: Callable[..., MultihopQAEnv]) -> None:
    env = make()
    tasks = {split: {task.id: dict(task.data) for task in env.tasks(split)} for split in env.splits}
    assert {split: len(found) for split, found in tasks.items()} == {"train": 4, "valid": 2, "2wiki": 2, "musique": 2}
    data = tasks["train"]["multihop_qa/hotpot4"]
    assert data.pop("corpus") == tasks["train"]["multihop_qa/hotpot1"]["corpus"]
    assert data == {
        "question": "Who made the film that is set where Noor Vane is mayor?",
        "answers": ["Mara Lund"],
        "titles": ["Port Selby", "Salt & Smoke"],
        "task_type": "bridge",
        "level": "hard",
    }
    assert tasks["2wiki"]["multihop_qa/wiki0"]["answers"] == ["Hallum", "Hallum City", "Hallumer"]
    assert tasks["2wiki"]["multihop_qa/wiki1"]["answers"] == ["no"]
    data = tasks["musique"]["multihop_qa/3hop__0"]
    assert data["answers"] == ["Port Selby", "Selby harbour"]
    assert data["titles"] == ["Tern (band)", "Ole Fisk", "Una Fisk"]
    assert data["task_type"] == "3hop"


def test_other_layouts_are_the_same_questions(make: Callable[..., MultihopQAEnv], folder: Path, tmp_path: Path) -> None:
    """As rows of Hugging Face's, as packed lines, and with gold titles and a corpus in another order: the same content."""
    records = json.loads((folder / SETS["train"]).read_text())
    rows = []
    for record in records:
        titles, sentences = zip(*record["context"], strict=True)
        facts = {"title": [title for title, _ in record["supporting_facts"]], "sent_id": [0] * 4}
        rows.append({**record, "id": record["_id"], "supporting_facts": facts})
        rows[-1]["context"] = {"title": titles, "sentences": sentences}
    del rows[0]["_id"]
    write_lines(tmp_path / "rows.jsonl", rows)
    with gzip.open(tmp_path / "lines.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n\n" for record in records)
    write_lines(tmp_path / "bare.jsonl", [_bare(record) for record in records[::-1]])
    pairs = {title: text for record in records for title, text in record["context"]}
    write_lines(tmp_path / "corpus.jsonl", [{"title": title, "text": text} for title, text in pairs.items()])
    contents = set()
    for path in (folder / SETS["train"], tmp_path / "rows.jsonl", tmp_path / "lines.jsonl.gz", tmp_path / "bare.jsonl"):
        corpus = str(tmp_path / "corpus.jsonl") if path.stem == "bare" else None
        env = make(questions={"train": str(path)}, corpus=corpus)
        contents.add(tuple(env.content(task) for task in prepared(env)))
    assert len(contents) == 1


def _bare(record: dict[str, Any]) -> dict[str, Any]:
    titles = dict.fromkeys(title for title, _ in record["supporting_facts"])
    return {name: record[name] for name in ("_id", "question", "answer", "type", "level")} | {"gold_titles": [*titles]}


def test_a_split_searches_its_own_passages_or_a_corpus(make: Callable[..., MultihopQAEnv]) -> None:
    env = make(corpus={"valid": "corpus.jsonl"})
    sizes = {}
    for split in env.splits:
        env.reset(prepared(env, split)[0])
        sizes[split] = len(env._passages)
    assert sizes["valid"] == sizes["musique"] == len(PASSAGES) == 20
    assert sizes["2wiki"] < 20
    with pytest.raises(
        ConfigError, match="MultihopQAEnv: corpus has no split 'test'; it may have train, valid, 2wiki, musique"
    ):
        make(corpus={"test": "corpus.jsonl"})


# ---- play ----


def test_the_expert_is_right_on_all_questions(make: Callable[..., MultihopQAEnv]) -> None:
    for show_all in (True, False):
        for split in SETS:
            env = make(show_all=show_all)
            again = pickle.loads(pickle.dumps(env))
            again.start()
            for task in prepared(env, split):
                turn = env.reset(task)
                assert again.reset(task) == turn
                while not turn.terminated:
                    action = env.expert_action()
                    turn = env.step(action)
                    assert again.step(action) == turn
                assert (turn.reward, turn.success) == (1.0, True)
                assert {name: turn.info[name] for name in ("f1", "exact_match", "recall")} == {
                    "f1": 1.0, "exact_match": 1.0, "recall": 1.0,
                }  # fmt: skip


def test_what_the_agent_sees(make: Callable[..., MultihopQAEnv]) -> None:
    env = make(top_k=1)
    turn = started(env, "first climber")
    assert turn.goal == (
        "Question: Where was the first climber of Mount Ebb born?\n"
        "Give the final answer in as few words as possible: <answer>...</answer>"
    )
    first = "Passages found so far:\n[1] Mount Ebb: Mount Ebb is 1,204 m high. Ida Marl was the first to climb it, in 1881."
    assert turn.text == first
    assert turn.info == {
        "task_type": "bridge", "level": "hard", "f1": 0.0, "exact_match": 0.0, "recall": 0.5, "searches": 0,
    }  # fmt: skip
    turn = env.step(search("Mount Ebb", "Ida Marl", "of the"))
    assert turn.text == (
        f"{first}\n[2] Ida Marl: Ida Marl (1850 - 1922) was a climber and a painter. She was born in Port Selby.\n"
        "Nothing new is found for: Mount Ebb; of the"
    )
    assert turn.info == {"recall": 1.0, "searches": 3}
    assert (turn.messages, turn.reward, turn.success, turn.terminated) == ((), 0.0, False, False)


def test_calls_are_answered_by_what_is_new(make: Callable[..., MultihopQAEnv]) -> None:
    env = make(top_k=1, show_all=False)
    turn = started(env, "first climber")
    assert turn.text.startswith("[1] Mount Ebb: ")
    before = turn.state_key
    turn = env.step(search("Ida Marl", "Mount Ebb"))
    assert turn.text == ""
    assert [(message.role, message.tool_call_id) for message in turn.messages] == [("tool", "call_0"), ("tool", "call_1")]
    assert turn.messages[0].content.startswith("[2] Ida Marl: ")
    assert turn.messages[1].content == "Nothing new is found."
    assert turn.state_key != before


def test_the_last_answer_in_the_form_counts(make: Callable[..., MultihopQAEnv]) -> None:
    env = make()
    started(env, "Tern's singer", "musique")
    turn = env.step(Action(text="<answer>Hallum</answer>, no: <answer>\nthe Selby harbour </answer>"))
    assert (turn.reward, turn.success, turn.terminated, turn.info["exact_match"]) == (1.0, True, True, 1.0)
    started(env, "Tern's singer", "musique")
    turn = env.step(answer("in old Selby harbour"))
    assert (turn.reward, turn.success, turn.terminated) == (0.0, False, True)
    assert turn.info["f1"] == pytest.approx(2 * (2 / 4) / (2 / 4 + 1))


@pytest.mark.parametrize(
    ("action", "feedback"),
    [
        (Action(text="Port Selby"), "in this form: <answer>...</answer>"),
        (Action(text="<answer> </answer>"), "in this form: <answer>...</answer>"),
        (Action(text="<answer>Port Selby"), "in this form: <answer>...</answer>"),
        (Action("Port Selby"), "in this form: <answer>...</answer>"),
        (search(*"abcde"), "At most 4 calls may be made at once, not 5: none was made."),
    ],
)
def test_what_cannot_be_carried_out_uses_up_a_step(
    make: Callable[..., MultihopQAEnv], action: Action, feedback: str
) -> None:
    env = make(max_steps=3)
    turn = started(env, "first climber")
    seen = turn.text
    for left in (2, 1, 0):
        turn = env.step(action)
        assert not turn.action_valid
        assert turn.feedback.endswith(feedback)
        assert (turn.text, turn.terminated, turn.reward, turn.success) == (seen, left == 0, 0.0, False)
    assert turn.info["searches"] == 0


def test_the_expert_keeps_within_its_calls_and_steps(make: Callable[..., MultihopQAEnv]) -> None:
    env = make(max_calls=1, top_k=1)
    turn, calls = started(env, "same place", "2wiki"), []
    while not turn.terminated:
        action = env.expert_action()
        calls.append(len(action.tool_calls))
        turn = env.step(action)
    assert turn.success
    assert calls == [1, 1, 1, 0]
    env = make(max_steps=1)
    started(env, "same place", "2wiki")
    assert env.step(env.expert_action()).success


def test_workers_share_an_index_and_play_the_same(make: Callable[..., MultihopQAEnv]) -> None:
    env = make()
    tasks = prepared(env)
    pool = EnvPool(env, 3, 2, 60.0, None, 60.0)
    try:
        for slot, task in enumerate(tasks[:3]):
            pool.reset(slot, task, want_expert=True)
            first = pool.receive(slot).turn
            assert first is not None
            assert first.text == env.reset(task).text
            pool.step(slot, first.expert_action)
            second = pool.receive(slot).turn
            assert second is not None
            assert second.text == env.step(env.expert_action()).text
    finally:
        pool.close()


# ---- data, panels, runs ----


def options(folder: Path, **settings: str) -> list[str]:
    given = {"data": folder, "cache_dir": folder / "cache", **settings}
    return [f"--data.source.env.{name}={value}" for name, value in given.items()]


QA = ["--data.source.env=MultihopQAEnv", "--data.source.context={class_path: StateContext, instructions: ''}"]
QA += ["--data.source.max_prompt_tokens=4000", "--data.source.max_new_tokens=160", "--model.policy.max_positions=4400"]
QA += ["--data.source.parser=HermesParser"]


def test_data_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [f"--data={folder}", f"--cache_dir={tmp_path}"]
    data(["multihop_qa", *where])
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == ["train: 4 tasks", "valid: 2 tasks"]
    data(["multihop_qa", *where, "--questions={m: musique_ans_v1.0_dev.jsonl}", "--retriever=Bm25", "--retriever.k1=0.9"])
    assert capsys.readouterr().out.startswith("m: 2 tasks, sha256 ")
    assert len(list(tmp_path.glob("*/*/bm25-*"))) == 3


def test_a_panel_names_a_changed_gold_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_questions(tmp_path / "data")
    path = tmp_path / "panel.json"
    panel(["make", f"--config={TOY}", f"--out={path}", *QA, *options(folder)])
    play = [*QA, *options(folder), f"--data.eval_panel={path}", "--evaluation.player=expert"]
    run(tmp_path / "run", *play, command="validate")
    result = json.loads((tmp_path / "run" / "validate.json").read_text())
    assert result["figures"]["info"] == {"exact_match": 1.0, "f1": 1.0, "recall": 1.0, "searches": 0.5}
    name = folder / "hotpot_dev_distractor_v1.json"
    text = name.read_text()
    wrong = ["validate", f"--config={TOY}", *places(tmp_path), *play]
    name.write_text(text.replace('"answer": "Per Holt"', '"answer": "Per Hold"'))
    error = refused(wrong, capsys)
    assert "1 of 2 tasks have another content" in error
    assert error.endswith(": multihop_qa/hotpot5")
    name.write_text(text.replace("It was founded by", "It was not founded by"))
    assert "2 of 2 tasks have another content" in refused(wrong, capsys)


def test_a_policy_copies_the_expert_and_learns(tmp_path: Path) -> None:
    folder = write_questions(tmp_path / "data")
    short = ["--trainer.max_epochs=1", "--data.eval_tasks=2", "--rollout={episodes_per_iteration: 4, group_size: 1}"]
    short += ["--data.source.max_new_tokens=32", "--evaluation.before_training=false"]
    copying = ["--warm_start={actions: expert, episodes: 4, batch_size: 4, updates: 2}"]
    cli = run(tmp_path / "run", *QA, *options(folder, top_k="1", max_steps="1"), *short, *copying)
    assert cli.model.counters.updates == 2
    last = evaluations(tmp_path / "run")[-1]
    assert (last["episodes"], last["errors"]) == (2, 0)
    assert 0 <= last["info"]["recall"] <= 1


TRAIN = hotpot(TRAIN_QUESTIONS)
BAD_FILES: dict[str, tuple[str, str]] = {
    "cut off": (json.dumps(TRAIN)[:-1], "questions.json is cut off or damaged; get it again"),
    "a line cut off": (
        "\n".join(map(json.dumps, TRAIN))[:-9],
        "questions.json is cut off or damaged behind record 3; get it again",
    ),
    "no records": ("[1, 2]", "questions.json is cut off or damaged; get it again"),
    "no text": ("\xff", "questions.json is cut off or damaged"),
    "no question": (
        json.dumps([{"id": "a", "text": "b"}]),
        'questions.json holds what is no question: {"id": "a", "text": "b"}',
    ),
    "empty": ("", "there is no question in "),
    "no answer": (
        json.dumps([TRAIN[0], {**TRAIN[1], "answer": " "}]),
        "question hotpot2 of ",
    ),
    "hidden answers": (
        json.dumps([{k: v for k, v in TRAIN[0].items() if k != "answer"}]),
        "has no answer; take a file with answers",
    ),
    "unanswerable": (json.dumps([{**musique()[0], "answerable": False}]), "question 3hop__0 of "),
    "strange facts": (json.dumps([{**TRAIN[0], "supporting_facts": [1]}]), "question hotpot1 of "),
    "strange passages": (json.dumps([{**TRAIN[0], "context": [["Title"]]}]), "passages of record 1 of "),
    "no passages": (json.dumps([_bare(TRAIN[0])]), "the corpus is empty: there is no passage in "),
    "empty passages": (json.dumps([{**TRAIN[0], "context": [["", [""]]]}]), "the corpus is empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_wrong_with_a_file_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = BAD_FILES[name]
    (tmp_path / "questions.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit) as stopped:
        data(["multihop_qa", f"--data={tmp_path}", "--questions.train=questions.json", f"--cache_dir={tmp_path}/cache"])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions": {"train": "nowhere.json"}}, r"cannot read .*nowhere.json: No such file or directory; get it"),
        ({"corpus": "nowhere.jsonl"}, r"cannot read .*nowhere.jsonl: No such file or directory; get it"),
        ({"aliases": "nowhere.json"}, r"there is no .*nowhere.json; get it \(docs/multihop_qa.md\)"),
        ({"aliases": "corpus.jsonl"}, r"corpus.jsonl is no file of aliases as 2WikiMultihopQA has it"),
        ({"data": "nowhere", "aliases": None}, r"cannot read nowhere.*: No such file or directory; get it"),
        ({"questions": {}}, "questions must name a file"),
        ({"max_calls": 0}, "max_calls must be at least 1, not 0"),
        ({"questions": {"valid": "corpus.jsonl"}}, r"has no split 'train'; it has valid"),
    ],
)
def test_settings(make: Callable[..., MultihopQAEnv], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^MultihopQAEnv:? .*{message}"):
        make(**settings).tasks("train")


def test_an_index_that_is_gone_costs_the_episode(make: Callable[..., MultihopQAEnv], tmp_path: Path) -> None:
    env = make(cache_dir=str(tmp_path))
    tasks = prepared(env)
    for place in tmp_path.glob("*/*/*"):
        shutil.rmtree(place)
        env.start()
        with pytest.raises(ConfigError, match=r"^the index .* is missing or damaged; start again, which makes it anew$"):
            env.reset(tasks[0])
        assert prepared(env) == tasks
        env.reset(tasks[0])
