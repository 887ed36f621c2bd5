"""Questions over twenty invented passages, in the formats of HotpotQA, 2WikiMultihopQA and MuSiQue.

``write_questions(folder)`` writes one file of each, the aliases of 2WikiMultihopQA, and all passages as JSONL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PASSAGES = {
    "Lowfield": ["Lowfield is a village in Tarnshire.", "It lies on the river Tarn and has 412 inhabitants."],
    "Tarn (river)": ["The Tarn is a river of 80 km.", "It rises in the Grey Hills and ends in Lake Oster."],
    "Grey Hills": ["The Grey Hills are a range in the north of Tarnshire.", "Their highest peak is Mount Ebb."],
    "Mount Ebb": ["Mount Ebb is 1,204 m high.", "Ida Marl was the first to climb it, in 1881."],
    "Ida Marl": ["Ida Marl (1850 - 1922) was a climber and a painter.", "She was born in Port Selby."],
    "Port Selby": ["Port Selby is the largest harbour of Osterland.", "Its mayor is Noor Vane."],
    "Noor Vane": ["Noor Vane (born 1971) is a politician of the Green League.", "She studied law in Hallum."],
    "Hallum": ["Hallum is the capital of Osterland.", "Its university was founded in 1610."],
    "Lake Oster": ["Lake Oster is the deepest lake of Osterland.", "Pike and eel live in it."],
    "Ada Brook": ["Ada Brook (1902 - 1980) was a beekeeper from Lowfield.", 'She wrote "The Quiet Hive".'],
    "The Quiet Hive": ["The Quiet Hive is a book of 1938 by Ada Brook.", "It was filmed by Jon Reed in 1951."],
    "Jon Reed": ["Jon Reed (1911 - 1990) was a director.", "He died in Hallum."],
    "Salt &amp; Smoke": ["Salt &amp; Smoke is a film of 1960 by Mara Lund.", "It is set in Port Selby."],
    "Mara Lund": ["Mara Lund (1925 - 2001) was a director.", "She died in Lowfield."],
    "Tern (band)": ["Tern is a band from Hallum.", "Its singer is Ole Fisk."],
    "Ole Fisk": ["Ole Fisk (born 1985) is a singer.", "His mother is the painter Una Fisk."],
    "Una Fisk": ["Una Fisk (born 1956) is a painter.", "She lives in Port Selby."],
    "Green League": ["The Green League is a party in Osterland.", "It was founded by Per Holt in 1983."],
    "Per Holt": ["Per Holt (1940 - 2015) was a farmer and a politician.", "He was born in Lowfield."],
    "Osterland": ["Osterland is an island.", "Its capital is Hallum; people call it the Oster."],
}
_ALL = tuple(PASSAGES)

# Question, answer, type, titles of the gold passages.
Asked = tuple[str, str, str, Sequence[str]]
TRAIN: list[Asked] = [
    ("Where was the first climber of Mount Ebb born?", "Port Selby", "bridge", ["Mount Ebb", "Ida Marl"]),
    ("Who filmed the book by the beekeeper from Lowfield?", "Jon Reed", "bridge", ["Ada Brook", "The Quiet Hive"]),
    ("Is the Tarn longer than Mount Ebb is high?", "yes", "comparison", ["Tarn (river)", "Mount Ebb"]),
    ("Who made the film that is set where Noor Vane is mayor?", "Mara Lund", "bridge", ["Port Selby", "Salt &amp; Smoke"]),
]
DEV: list[Asked] = [
    ("Who founded the party of Port Selby's mayor?", "Per Holt", "bridge", ["Noor Vane", "Green League"]),
    ("Who was born first, Jon Reed or Mara Lund?", "Jon Reed", "comparison", ["Jon Reed", "Mara Lund"]),
]
WIKI2: list[Asked] = [
    ("Where did the director of the film of The Quiet Hive die?", "Hallum", "compositional", ["The Quiet Hive", "Jon Reed"]),
    (
        "Did the directors of The Quiet Hive and Salt & Smoke die in the same place?",
        "no",
        "bridge_comparison",
        ["The Quiet Hive", "Salt &amp; Smoke", "Jon Reed", "Mara Lund"],
    ),
]
MUSIQUE: list[Asked] = [
    ("Where does the mother of Tern's singer live?", "Port Selby", "", ["Tern (band)", "Ole Fisk", "Una Fisk"]),
    ("What is the capital of the island whose deepest lake the Tarn ends in?", "Hallum", "", ["Lake Oster", "Osterland"]),
]


def hotpot(asked: Sequence[Asked], first: int = 1) -> list[dict[str, Any]]:
    """As HotpotQA has them: ten paragraphs each."""
    return [
        {
            "_id": f"hotpot{number}",
            "question": question,
            "answer": answer,
            "type": kind,
            "level": "hard",
            "supporting_facts": [[title, place] for title in titles for place in (0, 1)],
            "context": [[title, PASSAGES[title]] for title in _chosen(titles, number)],
        }
        for number, (question, answer, kind, titles) in enumerate(asked, start=first)
    ]


def wiki2() -> list[dict[str, Any]]:
    ids = {"Hallum": "Q1"}
    records = hotpot(WIKI2)
    return [
        {**record, "_id": f"wiki{number}", "answer_id": ids.get(record["answer"])} for number, record in enumerate(records)
    ]


def musique() -> list[dict[str, Any]]:
    return [
        {
            "id": f"{len(titles)}hop__{number}",
            "question": question,
            "answer": answer,
            "answer_aliases": ["Selby harbour"] if answer == "Port Selby" else [],
            "answerable": True,
            "paragraphs": [
                {"idx": place, "title": title, "paragraph_text": " ".join(PASSAGES[title]), "is_supporting": title in titles}
                for place, title in enumerate(_ALL)
            ],
        }
        for number, (question, answer, _, titles) in enumerate(MUSIQUE)
    ]


def write_questions(folder: Path) -> Path:
    """Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lists = {
        "hotpot_train_v1.1.json": hotpot(TRAIN),
        "hotpot_dev_distractor_v1.json": hotpot(DEV, first=len(TRAIN) + 1),
        "2wikimultihopqa_dev.json": wiki2(),
    }
    for name, records in lists.items():
        (folder / name).write_text(json.dumps(records), encoding="utf-8")
    write_lines(folder / "musique_ans_v1.0_dev.jsonl", musique())
    write_lines(folder / "id_aliases.json", [{"Q_id": "Q1", "aliases": ["Hallum City"], "demonyms": ["Hallumer"]}])
    write_lines(folder / "corpus.jsonl", [{"title": title, "text": " ".join(text)} for title, text in PASSAGES.items()])
    return folder


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _chosen(titles: Sequence[str], number: int) -> list[str]:
    others = [title for title in (*_ALL[3 * number :], *_ALL) if title not in titles]
    return sorted({*titles, *others[: 10 - len(titles)]})
