"""Retrievers: ranking, and indices on disk."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from steppo.envs.given import copied, started
from steppo.envs.search import Bm25, Dense, Retriever, Texts, keep, require_whole, sha256_of
from steppo.errors import ConfigError
from tests.search_env import SearchEnv

TEXTS = [
    "Ada Brook keeps the bees of Lowfield.",
    "Lowfield is a village by the river Tarn.",
    "The river Tarn rises in the Grey Hills.",
    "Ben Ash keeps the boat of Lowfield, a boat with a red sail.",
    "the of and",
    "Ada Brook keeps the bees of Lowfield.",
    "",
]


def ignore(done: int, total: int) -> None:
    pass


def opened(retriever: Retriever, folder: Path, texts: list[str] = TEXTS) -> Retriever:
    retriever.prepare(texts, folder, ignore)
    retriever.start(folder)
    return retriever


def rows(found: list[tuple[int, float]]) -> list[int]:
    return [row for row, _ in found]


def test_the_best_come_first_and_ties_by_row(tmp_path: Path) -> None:
    search = opened(Bm25(), tmp_path).search
    assert rows(search("Who keeps the bees of Lowfield?", 10)) == [0, 5, 3, 1]
    assert rows(search("BEES", 1)) == [0]
    assert rows(search("boat sail", 10)) == [3]
    scores = [score for _, score in search("Who keeps the bees of Lowfield?", 10)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == scores[1]
    many = opened(Bm25(), tmp_path / "many", ["bee", "bee and hive"] * 40)
    assert rows(many.search("bee hive", 60)) == [*range(1, 80, 2), *range(0, 40, 2)]


def test_scores_are_those_of_bm25(tmp_path: Path) -> None:
    """Lucene's formula by hand: ln(1 + (N - n + 0.5) / (n + 0.5)) * tf / (tf + k1 * (1 - b + b * length / mean length))."""
    lengths = [len(Bm25()._split(text)) for text in TEXTS]
    assert lengths == [5, 4, 5, 8, 0, 5, 0]
    mean = sum(lengths) / len(lengths)
    expected = np.log(1 + (7 - 1 + 0.5) / (1 + 0.5)) * 2 / (2 + 1.2 * (1 - 0.5 + 0.5 * 8 / mean))
    [(row, score)] = opened(Bm25(k1=1.2, b=0.5), tmp_path).search("boat", 3)
    assert row == 3
    assert score == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("query", ["", "  ", "the of and", "zebra", "?!", "\ud800", "a"])
def test_a_query_without_a_known_word_finds_nothing(tmp_path: Path, query: str) -> None:
    assert opened(Bm25(), tmp_path).search(query, 3) == []


@pytest.mark.parametrize("texts", [[], ["", "the of"]])
def test_a_corpus_without_words_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="the corpus is empty"):
        Bm25().prepare(texts, tmp_path, ignore)
    assert list(tmp_path.iterdir()) == []


def test_any_text_can_be_kept_and_found(tmp_path: Path) -> None:
    texts = ["Fårö \ud800 İstanbul", "東京 タワー", "x" * 5000, "naïve\nlines\r\n\x00"]
    retriever = opened(Bm25(), tmp_path / "index", texts)
    assert [rows(retriever.search(query, 9)) for query in ("fårö", "東京", "X" * 5000, "NAÏVE", "İSTANBUL")] == [
        [0], [1], [2], [3], [0],
    ]  # fmt: skip
    keep(tmp_path / "texts", sha256_of(texts), lambda folder: Texts.write(texts, folder))
    kept = Texts(tmp_path / "texts")
    assert list(kept) == [texts[0].replace("\ud800", "?"), *texts[1:]]
    assert kept[1:3] == texts[1:3]
    assert len(Texts(Path(keep_empty(tmp_path)))) == 0


def keep_empty(folder: Path) -> Path:
    keep(folder / "none", sha256_of([]), lambda there: Texts.write([], there))
    return folder / "none"


def test_an_index_is_made_once_for_each_content_and_setting(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def made(retriever: Retriever, texts: list[str]) -> bool:
        calls.clear()
        retriever.prepare(texts, tmp_path, lambda done, total: calls.append((done, total)))
        return calls == [(0, len(texts)), (len(texts), len(texts))]

    assert made(Bm25(), TEXTS)
    assert not made(Bm25(), TEXTS)
    assert not calls
    assert made(Bm25(k1=0.9), TEXTS)
    assert not made(Bm25(), TEXTS)
    assert made(Bm25(), TEXTS[:4])
    assert len(list(tmp_path.iterdir())) == 2


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_damaged_index_is_named_and_made_again(tmp_path: Path) -> None:
    expected = opened(Bm25(), tmp_path).search("river bees", 9)
    whole = files(tmp_path)
    assert len(whole) >= 6
    for path in whole:
        for damage in (lambda path: os.truncate(path, path.stat().st_size - 1), Path.unlink):
            damage(path)
            with pytest.raises(ConfigError, match=r"bm25-\w+ is missing or damaged; .* makes it anew"):
                Bm25().start(tmp_path)
            assert opened(Bm25(), tmp_path).search("river bees", 9) == expected
            assert files(tmp_path) == whole


def test_interrupted_work_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == total:  # all is written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bm25().prepare(TEXTS, tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []
    assert opened(Bm25(), tmp_path).search("bees", 9)


@pytest.mark.parametrize("at_the_last_moment", [False, True])
def test_two_runs_may_make_the_same_index_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_the_last_moment: bool
) -> None:
    def other_run(done: int, total: int) -> None:
        if done == total:
            Bm25().prepare(TEXTS, tmp_path, ignore)
            if at_the_last_moment:  # it was not there a moment ago
                monkeypatch.setattr(Path, "exists", lambda path: False)

    Bm25().prepare(TEXTS, tmp_path, other_run)
    assert [path.name[:5] for path in tmp_path.iterdir()] == ["bm25-"]


def test_no_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot keep an index in .*file"):
        Bm25().prepare(TEXTS, tmp_path / "file" / "folder", ignore)


def test_settings() -> None:
    for wrong in ({"k1": -1.0}, {"b": 1.5}, {"b": float("nan")}):
        with pytest.raises(ConfigError, match=f"Bm25: {next(iter(wrong))} must be at "):
            Bm25(**wrong)


def test_an_open_index_is_shared_by_copies(tmp_path: Path) -> None:
    """A worker opens it, its slots have copies of the environment: ``copied`` of steppo/envs/given.py."""

    class Searching(SearchEnv):
        def __init__(self) -> None:
            self.retriever: Retriever = Bm25()

        def start(self) -> None:
            self.retriever = copy.copy(self.retriever)
            self.retriever.start(tmp_path)

    Bm25().prepare(TEXTS, tmp_path, ignore)
    env = Searching()
    slot = copied(env, started(env))
    assert slot.retriever is env.retriever
    assert rows(slot.retriever.search("bees", 1)) == [0]


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bm25s", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r'^Bm25 needs bm25s: pip install "steppo\[search\]"$'):
        Bm25().prepare(TEXTS, tmp_path, ignore)
    with pytest.raises(ConfigError, match=r'^Dense needs sentence-transformers: pip install "steppo\[dense\]"$'):
        Dense().prepare(TEXTS, tmp_path, ignore)


def test_ranking_is_the_same_in_another_process(tmp_path: Path) -> None:
    mine = opened(Bm25(), tmp_path).search("who keeps the bees by the river", 9)
    code = (
        "import json, pathlib; from steppo.envs.search import Bm25; bm25 = Bm25(); bm25.start(pathlib.Path.cwd()); "
        'print(json.dumps(bm25.search("who keeps the bees by the river", 9)))'
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert [tuple(each) for each in json.loads(run.stdout)] == mine


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Each word has a direction of its own: the cosine counts words in common."""
    library = pytest.importorskip("sentence_transformers", reason="needs the extra dense")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = sorted({word for text in TEXTS for word in text.split()} | {"?"})
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.eye(len(words), dtype=np.float32)
    weights[words.index("?")] = 0
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    library.SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "model"))
    return str(tmp_path / "model")


def test_dense(model: str, tmp_path: Path) -> None:
    retriever = opened(Dense(model), tmp_path / "index")
    assert rows(retriever.search("Ada keeps bees", 3)) == [0, 5, 3]
    [(row, score), *_] = retriever.search("Ben Ash", 1)
    assert row == 3
    assert score == pytest.approx(2 / np.sqrt(2 * 14), abs=0.1)
    assert retriever.search(" ", 3) == []
    with pytest.raises(ConfigError, match="Dense: the corpus is empty"):
        Dense(model).prepare([], tmp_path / "other", ignore)
    os.truncate(next((tmp_path / "index").glob("*/vectors.npy")), 100)
    with pytest.raises(ConfigError, match="is missing or damaged"):
        Dense(model).start(tmp_path / "index")


def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra dense")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"Dense: the model .*nowhere cannot be loaded: "):
        Dense(str(tmp_path / "nowhere")).prepare(TEXTS, tmp_path, ignore)


def test_what_is_kept_says_its_content(tmp_path: Path) -> None:
    keep(tmp_path / "it", "abc", lambda folder: Texts.write(TEXTS, folder))
    assert require_whole(tmp_path / "it") == "abc"
    assert sha256_of(["ab", "c"]) != sha256_of(["a", "bc"])
