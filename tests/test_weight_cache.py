"""The cache of weights: damaged files, full folders, and which files go."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from steppo.models import TinyPolicy
from steppo.models.adapters import LoRASettings
from steppo.weight_cache import WeightCache


def _trained(policy: TinyPolicy) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def _flipped(path: Path) -> None:
    """One bit, in the middle of a weight: torch's own loader does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def _first_of(path: Path) -> None:
    weights = torch.load(path, weights_only=True)
    torch.save(dict(list(weights.items())[1:]), path)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no weights in here"),
    "a bit": _flipped,
    "no mapping": lambda path: torch.save([1, 2], path),
    "not weights": lambda path: torch.save({"x": "y"}, path),
    "code": lambda path: torch.save({"x": LoRASettings(2, 4.0)}, path),
    "a weight less": _first_of,
    "of another type": lambda path: torch.save({n: w.double() for n, w in torch.load(path).items()}, path),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_removed(
    name: str, tiny_policy: TinyPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("steppo.weight_cache.warnings.warn", lambda text, **_: said.append(text))
    cache, key = WeightCache(tmp_path), "a" * 32
    path = tmp_path / f"{key}.pt"
    cache.save(key, _trained(tiny_policy))
    assert cache.load(key, tiny_policy) is not None
    DAMAGE[name](path)
    assert cache.load(key, tiny_policy) is None
    assert not path.exists()
    assert len(said) == 1
    assert "\n" not in said[0]
    assert str(path) in said[0]
    assert cache.load(key, tiny_policy) is None  # now there is none, which is no reason to warn
    assert len(said) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_what_cannot_be_written_leaves_nothing(
    code: int, tiny_policy: TinyPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    said: list[str] = []
    monkeypatch.setattr("steppo.weight_cache.warnings.warn", lambda text, **_: said.append(text))
    monkeypatch.setattr("steppo.weight_cache.os.replace", full)
    WeightCache(tmp_path).save("x", _trained(tiny_policy))
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 1
    assert os.strerror(code) in said[0]


def test_the_least_recently_used_go_first(tiny_policy: TinyPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steppo.weight_cache._MOST_FILES", 3)
    cache, weights = WeightCache(tmp_path), _trained(tiny_policy)
    mine = tmp_path / "mine.pt"  # a user's own file is none of ours
    torch.save({}, mine)
    paths = [tmp_path / f"{digit * 32}.pt" for digit in "abcdef"]
    for number, path in enumerate(paths[:3]):
        cache.save(path.stem, weights)
        os.utime(path, (1000 + number, 1000 + number))
    left = tmp_path / f"{paths[0].name}.0.part"  # of a process that was killed while it wrote
    left.touch()
    os.utime(left, (999, 999))
    assert cache.load(paths[0].stem, tiny_policy) is not None
    cache.save(paths[3].stem, weights)
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in (mine, paths[0], paths[2], paths[3])}


@pytest.mark.parametrize(("fit", "stay"), [(2.5, "ac"), (0.5, "c")])
def test_the_oldest_go_where_all_are_too_large(
    fit: float, stay: str, tiny_policy: TinyPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one just written stays, whatever its size and the clock of those who wrote the others."""
    cache, weights = WeightCache(tmp_path), _trained(tiny_policy)
    for key, used in (("a", 2**32), ("b", 1000)):
        path = tmp_path / f"{key * 32}.pt"
        cache.save(path.stem, weights)
        os.utime(path, (used, used))
    monkeypatch.setattr("steppo.weight_cache._MOST_BYTES", int(fit * path.stat().st_size))
    cache.save("c" * 32, weights)
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == list(stay)
