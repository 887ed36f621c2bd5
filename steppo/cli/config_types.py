"""What a setting may hold, read from the signatures of the classes that take it."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import enum
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from jsonargparse import ArgumentParser
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
_WORDS = {int: "an integer", float: "a number", str: "text", NoneType: "null"}


@dataclass(frozen=True)
class Settings:
    """The type of a section: a mapping of what a class takes, or of names to types."""

    owner: Any


@dataclass(frozen=True)
class Kind:
    """A type, taken apart.

    Attributes:
        options: The members of a union; of any other type, itself.
        bases: Classes of which a component is made here.
        settings: Whose arguments a mapping holds here, if it is a section or a dataclass.
        items: Type of a list's items; ``MISSING``: no list.
        values: Type of a mapping's values.
        called_later: Some of a component's arguments come when it is used.
    """

    options: tuple[Any, ...]
    bases: tuple[type, ...] = ()
    settings: Any = None
    items: Any = MISSING
    values: Any = Any
    called_later: bool = False


def kind_of(hint: Any) -> Kind:
    """Takes a type apart."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found: dict[str, Any] = {"bases": ()}
    for option in options:
        origin, args = get_origin(option) or option, get_args(option)
        if isinstance(option, Settings):
            found["settings"] = option.owner
        elif dataclasses.is_dataclass(option):
            found["settings"] = option
        elif origin in _LISTS:
            found["items"] = args[0] if args else Any
        elif origin in _MAPPINGS:
            found["values"] = args[1] if args else Any
        elif origin is collections.abc.Callable and args and _is_component(args[-1]):
            found |= {"bases": (*found["bases"], args[-1]), "called_later": True}
        elif _is_component(option):
            found["bases"] += (option,)
    return Kind(options, **found)


def _is_component(hint: Any) -> bool:
    if not inspect.isclass(hint) or get_origin(hint) is not None or issubclass(hint, enum.Enum | int | float | str):
        return False
    return hint.__module__.split(".")[0] not in (*sys.stdlib_module_names, "jsonargparse")


@cache
def parameters(owner: Any) -> Mapping[str, tuple[Any, Any]]:
    """Type and default of what a class or function takes; ``Any`` where its annotations cannot be read."""
    hints: dict[str, Any] = {}
    for place in reversed(owner.__mro__) if inspect.isclass(owner) else (owner,):
        hints |= _hints(place.__init__ if inspect.isclass(place) else place)
    found, passes_on = {}, False
    for name, parameter in inspect.signature(owner).parameters.items():
        passes_on |= parameter.kind is parameter.VAR_KEYWORD
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            found[name] = hints.get(name, Any), parameter.default
    if passes_on:  # the parser reads in the source where **kwargs go
        parser = ArgumentParser(exit_on_error=False)
        add = parser.add_class_arguments if inspect.isclass(owner) else parser.add_function_arguments
        for name in add(owner, fail_untyped=False):
            found.setdefault(name, (hints.get(name, Any), None))
    return found


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can read
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a config may stand where a type is wanted; true of types that are not known here."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in args)
    if origin in (Any, MISSING, object):
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if value is None or origin is NoneType:
        return value is None and origin in (None, NoneType)
    if origin in (bool, str):
        return isinstance(value, origin)
    if origin in (int, float):
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if origin in _LISTS:
        return isinstance(value, list) and all(fits(item, args[0] if args else Any) for item in value)
    if origin in _MAPPINGS:
        return isinstance(value, dict) and all(fits(item, args[1] if args else Any) for item in value.values())
    if isinstance(hint, Settings) or dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if kind_of(hint).bases:
        return isinstance(value, str | dict)
    return True


def wanted(hint: Any) -> str:
    """A type in words."""
    words = []
    for option in kind_of(hint).options:
        origin = get_origin(option) or option
        if isinstance(option, Settings) or dataclasses.is_dataclass(option):
            words.append("a mapping of settings")
        elif origin is bool:
            words += ["true", "false"]
        elif origin is Literal:
            words += [str(choice) for choice in get_args(option)]
        elif origin in _LISTS:
            words.append("a list")
        elif origin in _MAPPINGS:
            words.append("a mapping")
        elif bases := kind_of(option).bases:
            words.append(f"a class ({bases[0].__name__})")
        else:
            words.append(_WORDS.get(option) or str(getattr(option, "__name__", option)))
    words = list(dict.fromkeys(words))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# ---- classes ----


def usual(bases: Iterable[type]) -> type | None:
    """The class to take where none is named, of those from which one would have to choose."""
    return next((found for base in bases for found in _USUAL if issubclass(found, base)), None)


def only_choice(bases: Iterable[type]) -> type | None:
    """The class to take for arguments without a class."""
    return usual(bases) or next((base for base in bases if not inspect.isabstract(base) and parameters(base)), None)


def class_names(bases: Iterable[type]) -> list[str]:
    """Classes that may be named by their last name."""
    return sorted({found.__name__ for found in _subclasses(bases) if not inspect.isabstract(found)})


def _subclasses(bases: Iterable[type]) -> Iterator[type]:
    for base in bases:
        importable = getattr(sys.modules.get(base.__module__), base.__qualname__, None) is base
        if importable and not hasattr(base, "lazy_get_init_args"):  # that stands in for a default
            yield base
        yield from _subclasses(type.__subclasses__(base))


def find_class(name: str, bases: tuple[type, ...]) -> tuple[Any, str]:
    """A class (or a function that makes one) and its path, by that path or, if the class is imported, by its last name.

    Raises:
        ConfigError: There is none, or it is not one of ``bases``.
    """
    kind = " or ".join(base.__name__ for base in bases)
    last = name.rpartition(".")[2]
    if name.startswith("steppo.") and last in class_names(bases):  # wherever it was when the config was written
        name = last
    if "." in name:
        owner, path = _imported(name), name
    else:
        found = list(dict.fromkeys(owner for owner in _subclasses(bases) if owner.__name__ == name))
        if not found:
            near = did_you_mean(name, class_names(bases)) or _or(bases)
            raise ConfigError(f"there is no {kind} called {name!r}{near} (a class of your own: module.Class)")
        if len(found) > 1:  # torch's, where another package has one of that name, too
            roots = {base.__module__.partition(".")[0] for base in bases}
            found = [owner for owner in found if owner.__module__.partition(".")[0] in roots] or found
        if len(found) > 1:
            raise ConfigError(f"{name!r} may be {' or '.join(sorted(map(import_path, found)))}: give the whole path")
        owner, path = found[0], import_path(found[0])
    made = owner if inspect.isclass(owner) else _hints(owner).get("return")
    if not inspect.isclass(made) or not issubclass(made, bases):
        raise ConfigError(f"{name} is no {kind}{_or(bases)}")
    if inspect.isabstract(owner):
        raise ConfigError(f"{name} is abstract{_or(bases)}")
    return owner, path


def _or(bases: tuple[type, ...]) -> str:
    names = class_names(bases)
    shown = names if len(names) < 20 else [*names[:12], "..."]
    return f"; there are {', '.join(shown)}" if names else ""


def import_path(owner: type) -> str:
    """The shortest path under which a class can be imported."""
    parts = owner.__module__.split(".")
    above = (".".join(parts[:number]) for number in range(1, len(parts) + 1))
    module = next(name for name in above if getattr(sys.modules.get(name), owner.__name__, None) is owner)
    return f"{module}.{owner.__name__}"


def _imported(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    try:
        owner = importlib.import_module(module_name)
    except Exception as error:
        reason = str(error) if isinstance(error, ImportError) else located(error)
        try:
            owner = _imported(module_name)  # a class within a class
        except Exception:
            raise ConfigError(f"cannot import {path}: {reason}") from None
    if not hasattr(owner, name):
        raise ConfigError(f"{module_name} has no {name!r}{did_you_mean(name, dir(owner))}")
    return getattr(owner, name)


def did_you_mean(name: str, names: Iterable[str], shown: Callable[[str], str] = repr) -> str:
    """``; did you mean ...?`` of the nearest name, if one is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {shown(near[0])}?" if near else ""
