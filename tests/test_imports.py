"""Who may import whom. The order of the layers is the architecture; a new module needs one line here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From left to right; left never imports right. Names of modules or packages in steppo/, and "callbacks".
LAYERS: list[set[str]] = [
    {"steppo", "types", "batch", "errors", "paths", "distributed", "rng", "weight_cache"},
    {"envs", "rendering", "packing", "minibatches", "advantages", "losses", "pool"},
    {"models"},
    {"engines"},
    {"rollouts", "samplers"},
    {"gateway"},
    {"panels"},
    {"learner"},
    {"buffer"},
    {
        "module",
        "run_module",
        "datamodule",
        "listeners",
        "metrics",
        "results",
        "progress",
        "checkpoints",
        "transcripts",
        "run_folder",
    },
    {"callbacks"},
    {"cli"},
    {"export", "play", "panel", "data"},
]
APART = LAYERS[1]  # these do not import each other either
USE_LIGHTNING = {
    "module",
    "run_module",
    "listeners",
    "datamodule",
    "checkpoints",
    "run_folder",
    "callbacks",
    "cli",
    "export",
    "play",
}


def imports_of(source: str, package: str) -> set[str]:
    """Dotted names that a module of ``package`` imports anywhere, except for type checkers only."""
    return set(_imports(ast.parse(source), package))


def _imports(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        origin = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.orelse:
            yield from _imports(child, package)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, package)


def unit_of(dotted: str) -> str | None:
    """``steppo.envs.pool.EnvPool`` -> ``envs``; ``None`` for what is not ours."""
    first, _, rest = dotted.partition(".")
    if first == "callbacks":
        return first
    if first != "steppo":
        return None
    second = rest.split(".")[0]
    ours = (ROOT / "steppo" / second).is_dir() or (ROOT / "steppo" / f"{second}.py").exists()
    return second if second and ours else "steppo"


def layer_of(unit: str) -> int:
    return next((number for number, layer in enumerate(LAYERS) if unit in layer), -1)


def our_imports() -> list[tuple[Path, str, str]]:
    """File, the unit it belongs to and a dotted name that it imports: all there are."""
    found = []
    for path in sorted([*(ROOT / "steppo").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        unit = unit_of(".".join(part for part in parts if part != "__init__"))
        assert unit is not None
        dotted = imports_of(path.read_text(encoding="utf-8"), ".".join(parts[:-1]))
        found += [(path.relative_to(ROOT), unit, name) for name in sorted(dotted)]
    return found


def test_every_module_has_a_layer() -> None:
    assert sorted({unit for _, unit, _ in our_imports() if layer_of(unit) < 0}) == [], "add it to LAYERS"
    assert sum(len(layer) for layer in LAYERS) == len(set().union(*LAYERS)), "one layer each"


def test_left_never_imports_right() -> None:
    wrong = []
    for path, unit, name in our_imports():
        other = unit_of(name)
        if other is None or other == unit:
            continue
        if layer_of(other) > layer_of(unit) or (unit in APART and other in APART):
            wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_lightning_stays_where_it_belongs() -> None:
    users = {
        (str(path), unit) for path, unit, name in our_imports() if name.split(".")[0] in ("lightning", "pytorch_lightning")
    }
    assert sorted(path for path, unit in users if unit not in USE_LIGHTNING) == []


def test_environments_load_without_torch_and_without_a_game() -> None:
    """Workers import them, many times over; and the interpreter must not meet torch. Nor need who fills or reads a pool."""
    ours = "steppo.envs, steppo.envs.pool, steppo.pool.command"
    code = f"import sys, {ours}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "steppo" in loaded
    games = {"textworld", "jericho", "gymnasium", "fast_downward", "bm25s", "openenv", "verifiers"}
    assert not loaded & {"torch", "transformers", "lightning", *games}


def private_uses(source: str) -> list[str]:
    """Names with a leading underscore that are imported from Lightning or jsonargparse, or taken from a trainer."""
    tree, found = ast.parse(source), []
    for name in imports_of(source, "steppo"):
        origin, *rest = name.split(".")
        if origin in ("lightning", "jsonargparse") and any(part.startswith("_") for part in rest):
            found.append(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = ast.unparse(node.value)
            if owner.split(".")[-1] in ("trainer", "_trainer", "pl", "jsonargparse", "parser", "launcher", "strategy"):
                found.append(f"{owner}.{node.attr}")
    return found


def test_nothing_private_of_lightning_or_its_parser() -> None:
    paths = [*(ROOT / "steppo").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    used = {str(path.relative_to(ROOT)): private_uses(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: names for path, names in used.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher",
        "from jsonargparse import Namespace, _typehints",
        "from jsonargparse._typehints import ActionTypeHint",
        "def f(trainer): return trainer._signal_connector.received_sigterm",
        "class A:\n    def f(self): self._trainer._teardown()",
        "class A:\n    def f(self): return self.parser._actions",
    ],
)
def test_private_uses_are_found(source: str) -> None:
    assert len(private_uses(source)) == 1


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import steppo.envs.pool as pool", {"steppo.envs.pool"}),
        ("from steppo import losses", {"steppo.losses"}),
        ("def f():\n    from steppo.cli import main", {"steppo.cli.main"}),
        ("from .base import Env", {"steppo.envs.base.Env"}),
        ("from ..types import Task", {"steppo.types.Task"}),
        ("from .. import cli", {"steppo.cli"}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy", {"numpy"}),
        ("try:\n    import torch\nexcept ImportError:\n    pass", {"torch"}),
    ],
)
def test_how_imports_are_read(source: str, found: set[str]) -> None:
    assert imports_of(source, "steppo.envs") == found
