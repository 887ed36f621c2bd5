"""What a setting may hold, read from the signatures of the classes that take it."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import enum
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger

from steppo.engines import HFEngine
from steppo.errors import ConfigError, located
from steppo.learner import NoCorrection
from steppo.losses import ClippedLoss
from steppo.rollouts import EnvSource

MISSING = inspect.Parameter.empty
# Taken where a config names no class: the first that fits. A class that can be made is taken itself.
_USUAL = (EnvSource, HFEngine, ClippedLoss, NoCorrection, TensorBoardLogger, torch.optim.AdamW)
_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


@dataclass(frozen=True)
class Settings:
    """The type of a section: a mapping of what a class takes, or of names to types."""

    owner: Any

    def __str__(self) -> str:
        return "a mapping of settings"


@dataclass(frozen=True)
class Kind:
    """A type, taken apart.

    Attributes:
        options: The members of a union; of any other type, itself.
        bases: Classes of which a component is made here.
        settings: Whose arguments a mapping holds here, if it is a section or a dataclass.
        items: Type of a list's items; ``MISSING``: no list.
        values: Type of a mapping's values; ``MISSING``: no mapping.
        called_later: Some of a component's arguments come when it is used.
    """

    options: tuple[Any, ...]
    bases: tuple[type, ...] = ()
    settings: Any = None
    items: Any = MISSING
    values: Any = MISSING
    called_later: bool = False


def kind_of(hint: Any) -> Kind:
    """Takes a type apart."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found: dict[str, Any] = {"bases": ()}
    for option in options:
        origin, args = get_origin(option) or option, get_args(option)
        later = origin is collections.abc.Callable and bool(args)
        made = args[-1] if later else option
        if isinstance(option, Settings):
            found["settings"] = option.owner
        elif dataclasses.is_dataclass(option):
            found["settings"] = option
        elif origin in _LISTS:
            found["items"] = args[0] if args else Any
        elif origin in _MAPPINGS:
            found["values"] = args[1] if args else Any
        elif _is_component(made):
            found |= {"bases": (*found["bases"], made), "called_later": later}
    return Kind(options, **found)


def _is_component(hint: Any) -> bool:
    if not inspect.isclass(hint) or get_origin(hint) is not None or issubclass(hint, enum.Enum | int | float | str):
        return False
    return hint.__module__.split(".")[0] not in (*sys.stdlib_module_names, "jsonargparse")


@cache
def parameters(owner: type) -> Mapping[str, tuple[Any, Any]]:
    """Type and default of what a class takes; ``Any`` where its annotations cannot be read."""
    hints: dict[str, Any] = {}
    for place in reversed(owner.__mro__):
        with suppress(NameError, TypeError, AttributeError):  # annotations that only a type checker can read
            hints |= typing.get_type_hints(place.__init__)  # type: ignore[misc]
    defaults = {name: parameter.default for name, parameter in inspect.signature(owner).parameters.items()}
    # The parser reads in the source where **kwargs go.
    names = ArgumentParser(exit_on_error=False).add_class_arguments(owner, fail_untyped=False)
    return {name: (hints.get(name, Any), defaults.get(name)) for name in names}


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value of a config may stand where a type is wanted; true of types that the parser does not know."""
    if isinstance(hint, Settings):
        return isinstance(value, dict)
    if value is None:  # the parser takes it anywhere
        return not {Any, MISSING, NoneType, None}.isdisjoint(kind_of(hint).options)
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=hint)
        parser.parse_object({"value": value})
    except (ArgumentError, ValueError) as error:
        return not isinstance(error, ArgumentError)
    return True


def type_text(hint: Any) -> str:
    """A type in words."""
    words: list[str] = []
    for option in kind_of(hint).options:
        if get_origin(option) is Literal:
            words += map(str, get_args(option))
        else:
            text = option.__name__ if inspect.isclass(option) and not get_args(option) else str(option)
            words.append("null" if option is NoneType else re.sub(r"(\w+\.)+", "", text))
    return " or ".join(dict.fromkeys(words))


# ---- classes ----


def default_class(bases: Iterable[type]) -> type | None:
    """The class to take where none is named."""
    usual = next((found for base in bases for found in _USUAL if issubclass(found, base)), None)
    return usual or next((base for base in bases if not inspect.isabstract(base) and parameters(base)), None)


def class_names(bases: Iterable[type]) -> list[str]:
    """Classes that may be named by their last name."""
    return sorted({found.__name__ for found in _subclasses(bases)})


def _subclasses(bases: Iterable[type]) -> Iterator[type]:
    """Those that can be made, in the order of their definition as far as they inherit from the same."""
    for base in bases:
        importable = getattr(sys.modules.get(base.__module__), base.__qualname__, None) is base
        stands_in = hasattr(base, "lazy_get_init_args")  # for a default
        is_private = base.__name__.startswith("_")
        if importable and not stands_in and not is_private and not inspect.isabstract(base):
            yield base
        yield from _subclasses(type.__subclasses__(base))


def find_class(name: str, bases: tuple[type, ...]) -> type:
    """A class by its import path or, if it is imported, by its last name: of several the first, such as torch's AdamW.

    Raises:
        ConfigError: There is none, or it is not one of ``bases``.
    """
    owner = _imported(name) if "." in name else next((it for it in _subclasses(bases) if it.__name__ == name), None)
    if inspect.isclass(owner) and issubclass(owner, bases) and not inspect.isabstract(owner):
        return owner
    kind, names = " or ".join(base.__name__ for base in bases), class_names(bases)
    there_are = f"; there are {', '.join(names if len(names) < 20 else [*names[:12], '...'])}" if names else ""
    near = did_you_mean(name.rpartition(".")[2], names) if owner is None else ""
    raise ConfigError(f"{name} is no {kind} that can be made{near or there_are} (a class of your own: module.Class)")


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise ConfigError(f"cannot import {path}: {error if isinstance(error, ImportError) else located(error)}") from None


def import_path(owner: type) -> str:
    """The shortest path under which a class can be imported."""
    parts = owner.__module__.split(".")
    above = (".".join(parts[:number]) for number in range(1, len(parts) + 1))
    module = next(name for name in above if getattr(sys.modules.get(name), owner.__name__, None) is owner)
    return f"{module}.{owner.__name__}"


def did_you_mean(name: str, names: Iterable[str], shown: Callable[[str], str] = repr) -> str:
    """``; did you mean ...?`` of the nearest name, if one is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {shown(near[0])}?" if near else ""
