"""All products, on disk: read once from the publishers' files, however large, then opened memory-mapped."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np

from steppo.envs.search import Texts, keep, sha256_of
from steppo.envs.webshop.goods import Product
from steppo.errors import ConfigError, said

FORMAT = 1  # of what is kept; another number where it changes
_GET_DATA = "get the data, and set data or $WEBSHOP_DATA to its folder (docs/webshop.md)"
_CHUNK = 1 << 20
_LONGEST = 16 << 20  # characters of one entry; products have some thousand
_BETWEEN = re.compile(r"[\s,]*")
_COLON = re.compile(r"[\s:]*")
_DECODE = json.JSONDecoder().raw_decode
_MOST_PRODUCTS = 4096  # kept in memory, of some 10 kB each
_SEED = 233


class Catalogue(Sequence[str]):
    """Products by their rows; as a sequence: the texts that a search goes through.

    Attributes:
        sha256: Of all that a search finds, and goes by.
    """

    def __init__(self, place: Path) -> None:
        self._records = Texts(place)
        self._asins = np.load(place / "asins.npy", mmap_mode="r")
        self._ends = np.load(place / "ends_of_goals.npy", mmap_mode="r")
        self.sha256 = (place / "sha256").read_text()
        self.product = lru_cache(_MOST_PRODUCTS)(self._product)

    def _product(self, row: int) -> Product:
        return Product.read(self._records[row])

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        return self._product(row).searched

    @property
    def num_goals(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def goals(self, numbers: np.ndarray) -> Iterator[tuple[str, int, int]]:
        """Asin, row and number among the product's own of goals that are numbered in the order of products."""
        rows = np.searchsorted(self._ends, numbers, side="right")
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            before = int(self._ends[row - 1]) if row else 0
            yield self._asins[row].decode(), row, number - before


def opened(folder: Path, full: bool, human: bool, cache: Path) -> tuple[Catalogue, Path]:
    """The catalogue and the folder of its own, in which it is kept. It is made if it is not there.

    Raises:
        ConfigError: A file is missing or damaged, or there is no room.
    """
    names = [f"items_shuffle{'' if full else '_1000'}.json", f"items_ins_v2{'' if full else '_1000'}.json"]
    paths = [_found(folder, name) for name in [*names, *(["items_human_ins.json"] if human else [])]]
    stats = [path.stat() for path in paths]
    made_of = [f"{path.name} {stat.st_size} {stat.st_mtime_ns}" for path, stat in zip(paths, stats, strict=True)]
    content = sha256_of([str(FORMAT), *made_of])
    own = cache / content[:16]
    keep(own / "products", content, lambda scratch: _make(paths, scratch))
    return _open(own / "products"), own


_open = lru_cache(2)(Catalogue)  # its name says what it holds


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.xz"):
        if path.is_file():
            return path
    raise ConfigError(f"WebshopEnv: there is no {name} (or {name}.xz) in {folder}; {_GET_DATA}")


def _make(paths: Sequence[Path], scratch: Path) -> None:
    items, about, *human = paths
    # Compact texts, as the objects themselves would take gigabytes.
    found = [{asin: json.dumps(entry) for asin, entry in _entries(path, "{")} for path in (about, *human)]
    asins: list[str] = []
    goals: list[int] = []
    sha256 = hashlib.sha256()

    def written() -> Iterator[str]:
        known: set[str] = set()
        for number, (_, record) in enumerate(_entries(items, "[")):
            asin = "?"
            try:
                asin = record["asin"]
                if asin in known or asin == "nan" or len(asin.encode("ascii")) > 10:  # as the publishers do
                    continue
                known.add(asin)
                wishes = json.loads(found[1].get(asin, "[]")) if human else None
                product = Product.of(record, json.loads(found[0].get(asin, "{}")), wishes)
                text, own, words = product.written(), product.num_goals, product.searched
            except Exception as error:
                missing = f"it has no {error}" if isinstance(error, KeyError) else said(error)
                raise ConfigError(f"WebshopEnv: product {number + 1} ({asin}) of {items}: {missing}") from None
            asins.append(asin)
            goals.append(own)
            sha256.update(f"{asin} {words}\n".encode("utf-8", "replace"))
            yield text

    Texts.write(written(), scratch)
    if not asins:
        raise ConfigError(f"WebshopEnv: there is no product in {items}")
    np.save(scratch / "asins.npy", np.array(asins, "S10"))
    np.save(scratch / "ends_of_goals.npy", np.cumsum(goals, dtype=np.int64))
    (scratch / "sha256").write_text(sha256.hexdigest())


def _entries(path: Path, opening: str) -> Iterator[tuple[str, Any]]:
    """Entries of a JSON list, or of an object with their keys, one at a time, whatever the file's size.

    Raises:
        ConfigError: It is cut off or damaged.
    """
    closing = {"[": "]", "{": "}"}[opening]
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            text, place = file.read(_CHUNK).lstrip(), 1
            if not text.startswith(opening):
                raise ValueError
            while True:
                place = _end_of(_BETWEEN, text, place)
                if text[place : place + 1] == closing:
                    return
                try:
                    key, end = ("", place) if opening == "[" else _DECODE(text, place)
                    entry, place = _DECODE(text, _end_of(_COLON, text, end))
                except ValueError:
                    more = file.read(_CHUNK)
                    if not more or len(text) - place > _LONGEST:
                        raise
                    text, place = text[place:] + more, 0
                    continue
                yield key, entry
    except (ValueError, EOFError, lzma.LZMAError, RecursionError):
        raise ConfigError(f"WebshopEnv: {path} is cut off or damaged; get it again") from None
    except OSError as error:
        raise ConfigError(f"WebshopEnv: cannot read {path}: {error.strerror or error}") from error


def _end_of(pattern: re.Pattern[str], text: str, place: int) -> int:
    """Of what is skipped; all that is may be nothing."""
    match = pattern.match(text, place)
    return match.end() if match else place


def order_of_goals(count: int) -> np.ndarray:
    """The publishers' order: places among products' goals, in it."""
    order = list(range(count))
    random.Random(_SEED).shuffle(order)
    return np.array(order, np.int64)
