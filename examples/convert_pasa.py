"""The papers of PaSa's ``paper_database`` -> ``papers.jsonl`` and ``citations.jsonl``, which LocalPapers reads.

    python examples/convert_pasa.py pasa-dataset/paper_database --out pasa-dataset

The folder holds ``id2paper.json`` (arXiv's id -> title) and ``cs_paper_2nd.zip``: a JSON file for each paper, named by the
letters of its title, with ``title``, ``abstract`` and ``sections`` (name -> titles of what is cited there). Papers without a
title there, and citations of papers that are not among them, are left out.

Written after PaSa's code, which reads these files; not tried on them yet.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steppo.cli import errors_in_one_line
from steppo.errors import ConfigError


def convert(database: Path, out: Path) -> tuple[int, int]:
    """Writes both files, and says how many papers and citations they have. Raises ``ConfigError``: what is wrong."""
    papers, links = 0, 0
    try:
        ids = json.loads((database / "id2paper.json").read_text(encoding="utf-8"))
        by_title = {_letters(title): paper for paper, title in ids.items()}
        out.mkdir(parents=True, exist_ok=True)
        with (
            zipfile.ZipFile(database / "cs_paper_2nd.zip") as archive,
            open(out / "papers.jsonl", "w", encoding="utf-8") as papers_file,
            open(out / "citations.jsonl", "w", encoding="utf-8") as citations_file,
        ):
            for paper, record in _records(archive, ids):
                title, abstract = (" ".join((record.get(name) or "").split()) for name in ("title", "abstract"))
                if not title:
                    continue
                cited = dict.fromkeys(by_title.get(_letters(name)) for name in _cited(record))
                references = [other for other in cited if other not in (None, paper)]
                print(json.dumps({"id": paper, "title": title, "abstract": abstract}), file=papers_file)
                print(json.dumps({"id": paper, "references": references}), file=citations_file)
                papers, links = papers + 1, links + len(references)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror or error}") from None
    except (ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{database} is not PaSa's paper_database, or damaged: {error}") from None
    return papers, links


def _records(archive: zipfile.ZipFile, ids: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    there = set(archive.namelist())
    for paper, title in ids.items():
        if (name := _letters(title)) in there:
            yield paper, json.loads(archive.read(name))


def _cited(record: dict[str, Any]) -> Iterator[str]:
    """Titles, section by section."""
    sections = record.get("sections") or {}
    for titles in sections.values():
        yield from titles


def _letters(title: str) -> str:
    return "".join(filter(str.isalpha, title)).lower()


@errors_in_one_line()
def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", type=Path, help="folder with id2paper.json and cs_paper_2nd.zip")
    parser.add_argument("--out", type=Path, required=True, help="folder for papers.jsonl and citations.jsonl")
    options = parser.parse_args(args)
    papers, links = convert(options.database, options.out)
    print(f"{papers:,} papers, {links:,} citations in {options.out}")


if __name__ == "__main__":
    main()
