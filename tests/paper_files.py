"""Thirty invented papers with citations, and questions in PaSa's form: for tests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_TITLES = {
    "2101": [  # bees: each cites the first
        "Counting Bees with Acoustic Sensors",
        "Queen Detection in Crowded Hives",
        "A Survey of Hive Weight Curves",
        "Waggle Dances as Route Descriptions",
        "Forecasting Swarms from Hive Sounds",
    ],
    "2102": [  # lighthouses: each cites the one before
        "Lighthouse Lenses under Salt Spray",
        "Fog Horns That Adapt to Wind",
        "Beam Sweeping for Narrow Straits",
        "Automatic Keepers of Remote Lights",
        "Colour Codes for Harbour Entrances",
    ],
    "2103": [
        "Sourdough Starters as Living Archives",
        "Crust Formation in Steam Ovens",
        "Predicting Crumb from Dough Videos",
        "Kneading Robots with Soft Fingers",
        "Salt and the Speed of Fermentation",
    ],
    "2104": [
        "Tuning Church Bells by Simulation",
        "Change Ringing as Permutation Search",
        "Cracks in Bronze Found by Ear",
        "Carillon Scores from Old Notations",
        "Swinging Towers and Their Bells",
    ],
    "2105": [
        "Reading Tree Rings with Cameras",
        "Drought Signals in Alpine Larches",
        "Dating Violins by Their Wood",
        "Growth Models for Urban Plane Trees",
        "Pollen Counts from Rooftop Cameras",
    ],
    "2106": [
        "Knots That Robots Can Untie",
        "Rope Friction under Wet Loads",
        "Net Mending with Two Arms",
        "Splices Stronger than Their Ropes",
        "Learning Sailor Knots from Videos",
    ],
}
PAPERS = {f"{month}.{number:05}": title for month, titles in _TITLES.items() for number, title in enumerate(titles, start=1)}
BEES, LIGHTS = [paper for paper in PAPERS if paper[:4] == "2101"], [paper for paper in PAPERS if paper[:4] == "2102"]
CITATIONS = {paper: [BEES[0]] for paper in BEES[1:]}
CITATIONS |= {paper: [before, "9999.99999"] for before, paper in itertools.pairwise(LIGHTS)}  # one is not there

QUESTIONS: dict[str, list[tuple[str, list[str]]]] = {
    "AutoScholarQuery/train": [
        ("Which papers listen to bees in a hive?", [BEES[0], f"{BEES[4]}v2"]),  # with a version
        ("What is known of ropes and knots that robots handle?", ["2106.00001", "2106.00005"]),
        ("Who has looked at trees with cameras?", ["2105.00001", "2105.00005"]),
        ("How are bells tuned and checked?", ["2104.00001", "2104.00003"]),
    ],
    "AutoScholarQuery/dev": [
        ("Which works let lighthouses run by themselves?", [LIGHTS[3]]),
        ("Papers on bread, dough and salt, please.", ["2103.00003", "2103.00005", "2103.00001"]),
    ],
    "RealScholarQuery/test": [("All about bees, sensors and hives", BEES[:4])],
}


def question(text: str, answers: list[str], qid: str, **other: Any) -> dict[str, Any]:
    """A record in PaSa's form."""
    titles = [PAPERS.get(paper.partition("v")[0], "A Paper That Is Not There") for paper in answers]
    record = {"question": text, "answer": titles, "answer_arxiv_id": answers, "source_meta": {"published_time": "20240305"}}
    return {**record, "qid": qid, **other}


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_data(folder: Path) -> Path:
    """Questions of all splits, papers (every third without an abstract) and citations."""
    for name, questions in QUESTIONS.items():
        records = [question(*asked, qid=f"{name.replace('/', '_')}_{number}") for number, asked in enumerate(questions)]
        write_lines(folder / f"{name}.jsonl", records)
    abstracts = {paper: {"abstract": f"We study {title.lower()}."} for paper, title in PAPERS.items() if int(paper[-1]) % 3}
    papers = [{"id": paper, "title": title, **abstracts.get(paper, {})} for paper, title in PAPERS.items()]
    write_lines(folder / "papers.jsonl", papers)
    write_lines(folder / "citations.jsonl", [{"id": paper, "references": cited} for paper, cited in CITATIONS.items()])
    return folder
