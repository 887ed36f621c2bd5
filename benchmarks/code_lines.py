"""Counts lines of code: what is left of a file without blank lines, comments and docstrings.

    python benchmarks/code_lines.py                    # of steppo/ and callbacks/, here
    python benchmarks/code_lines.py --revision v0.1.0  # as they were at a revision, beside how they are here

Prints a line per folder, and the files of more than 400 lines in all.
"""

from __future__ import annotations

import argparse
import ast
import io
import subprocess
import tarfile
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("steppo", "callbacks")
LONG = 400
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines that hold a token of code. A docstring, wherever it stands, is none."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def files_here() -> dict[str, str]:
    """Sources by their paths below the root."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def files_at(revision: str) -> dict[str, str]:
    """The same at a revision."""
    archive = subprocess.run(["git", "archive", revision, *FOLDERS], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [member for member in tar.getmembers() if member.isfile() and member.name.endswith(".py")]
        return {member.name: tar.extractfile(member).read().decode() for member in members}  # type: ignore[union-attr]


def by_folder(files: dict[str, str]) -> Counter[str]:
    """Lines of code of each folder."""
    counts: Counter[str] = Counter()
    for path, source in files.items():
        counts[str(Path(path).parent)] += code_lines(source)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", help="compare with this one")
    arguments = parser.parse_args()
    here = files_here()
    now = by_folder(here)
    before = by_folder(files_at(arguments.revision)) if arguments.revision else now
    for folder in sorted(now.keys() | before.keys()):
        print(f"{folder:<24}{before[folder]:>7}" + (f"{now[folder]:>7}" if arguments.revision else ""))
    total_before, total = sum(before.values()), sum(now.values())
    print(f"{'all':<24}{total_before:>7}" + (f"{total:>7}  {total / total_before - 1:+.1%}" if arguments.revision else ""))
    for path, source in here.items():
        if (length := len(source.splitlines())) > LONG:
            print(f"over {LONG} lines: {path} ({length})")


if __name__ == "__main__":
    main()
