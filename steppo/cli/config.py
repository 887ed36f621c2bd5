"""One config from files and options: merged by the types of the settings, and checked name by name and value by value."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from typing import Any

from steppo.cli.config_files import Dotted, Key, Keys, Word, mistake
from steppo.cli.config_types import (
    MISSING,
    Kind,
    Settings,
    accepts,
    class_names,
    default_class,
    did_you_mean,
    find_class,
    import_path,
    kind_of,
    parameters,
    type_text,
)
from steppo.errors import ConfigError


class Component(dict[str, Any]):
    """The arguments of a class, some of them ``given`` by options; if it is ``called_later``, others come then."""

    def __init__(
        self, owner: type, called_later: bool, arguments: Mapping[str, Any], given: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(arguments)
        self.owner = owner
        self.called_later = called_later
        self.given = given


def merged_config(layers: Iterable[Mapping[str, Any]], sections: Settings) -> dict[str, Any]:
    """The settings of all layers, the later over the earlier.

    Mappings merge key by key; lists, and values of type ``dict``, are replaced; ``name+`` appends to a list. Another class
    than before starts without arguments.

    Raises:
        ConfigError: A name is not known, or a value does not fit, or an argument given by an option would be lost to
            another class that is named later; where and what.
    """
    config: dict[str, Any] = {}
    for layer in layers:
        config = _merge(config, layer, sections, ())
    return config


def _merge(base: Any, new: Any, hint: Any, keys: Keys) -> Any:
    kind = kind_of(hint)
    value = new.read() if isinstance(new, Word) else new
    if isinstance(value, str) and "${" in value:  # the parser resolves it
        return value
    if isinstance(value, dict):
        if isinstance(base, str) and "${" in base:
            raise mistake(keys, f" belongs to what {base} stands for: set that, or give all of {'.'.join(keys)} here")
        if kind.settings is not None:
            return _merge_arguments(base if isinstance(base, dict) else {}, value, kind.settings, keys)
        if isinstance(value, Dotted) and kind.items is not MISSING and isinstance(base, list) and base:
            return [*base[:-1], _merge(base[-1], value, kind.items, keys)]  # of the last that was appended
    if isinstance(value, list) and kind.items is not MISSING:
        return [_merge(None, item, kind.items, (*keys, str(number))) for number, item in enumerate(value)]
    if isinstance(value, str | dict) and kind.bases:
        component = _merge_component(base, value, kind, keys)
        if component is not None:
            return component
    if isinstance(value, Dotted) and kind.values is not MISSING:
        below = base if isinstance(base, dict) else {}
        return below | {key: _merge(below.get(key), item, kind.values, (*keys, key)) for key, item in value.items()}
    for meant in (value, str(new)) if isinstance(new, Word) else (value,):
        if accepts(hint, meant):
            return meant
    shown = value if isinstance(value, str) and value else json.dumps(value, default=str)
    raise mistake(keys, f" must be {type_text(hint)}, not {shown}")


def _merge_arguments(base: Mapping[str, Any], new: Mapping[Any, Any], owner: Any, keys: Keys) -> dict[str, Any]:
    known = owner if isinstance(owner, dict) else {name: hint for name, (hint, _) in parameters(owner).items()}
    merged = dict(base)
    for key, value in new.items():
        name, place = str(key).removesuffix("+"), (*keys, key)
        if name not in known:
            names = ", ".join(known)
            there_are = f"; there are {names} (CHANGELOG.md tells what was renamed)" if known else ", which has none"
            near = did_you_mean(name, [*known, "class_path"], lambda found: ".".join((*keys, found)))
            of = f" of {owner.__name__}" if inspect.isclass(owner) else ""
            raise mistake(place, f" is no setting{of}{near or there_are}")
        if str(key).endswith("+"):
            if kind_of(known[name]).items is MISSING:
                raise mistake(place, " is no list, so that nothing can be appended")
            read = value.read() if isinstance(value, Word) else value
            before, added = ([item] if not isinstance(item, list) else item for item in (merged.get(name, []), read))
            value = _merge(None, added, known[name], place)
            merged[name] = [*(item for item in before if item is not None), *value]
        else:
            merged[name] = _merge(merged.get(name), value, known[name], place)
    return merged


def _merge_component(base: Any, new: str | dict[Any, Any], kind: Kind, keys: Keys) -> Component | None:
    """``None``: the text is no class, and may be text."""
    old = base if isinstance(base, Component) else None
    arguments = {"class_path": new} if isinstance(new, str) else dict(new)
    name = arguments.pop("class_path", None)
    if name is None:
        owner = old.owner if old is not None else default_class(kind.bases)
        if owner is None:
            such_as = ", ".join(class_names(kind.bases)[:6]) or "module.Class"
            raise mistake(keys, f" needs a class_path, such as {such_as}")
    else:
        try:
            owner = find_class(str(name), kind.bases)
        except ConfigError as error:
            if isinstance(new, str) and str in kind.options:
                return None
            raise mistake(keys, f": {error}") from None
    kept = old if old is not None and old.owner is owner else Component(owner, kind.called_later, {})
    if old is not None and (lost := old.given - kept.given - arguments.keys()):
        place = ".".join(map(str, keys))
        raise ConfigError(f"--{place}.{min(lost)} would be lost: {place} is another class later; name the class first")
    given = kept.given | {str(key).removesuffix("+") for key in arguments if not isinstance(key, Key)}
    return Component(owner, kind.called_later, _merge_arguments(kept, arguments, owner, keys), given)


def complete(config: Any, keys: Keys = ()) -> Any:
    """A merged config as the parser takes it: with ``class_path`` and ``init_args``, and the classes that nobody names.

    Raises:
        ConfigError: A class lacks an argument.
    """
    if isinstance(config, list):
        return [complete(item, (*keys, str(number))) for number, item in enumerate(config)]
    if not isinstance(config, dict):
        return config
    if not isinstance(config, Component):
        return {str(key) if isinstance(key, Key) else key: complete(item, (*keys, key)) for key, item in config.items()}
    arguments = dict(config)
    for name, (hint, default) in parameters(config.owner).items():
        if default is MISSING and name not in arguments and not config.called_later:
            bases = kind_of(hint).bases
            owner = default_class(bases)
            if owner is None:
                choice = f", one of {', '.join(class_names(bases))}" if bases else ""
                raise ConfigError(f"{'.'.join(map(str, keys))}: {config.owner.__name__} needs {name}{choice}")
            arguments[name] = Component(owner, False, {})
    return {"class_path": import_path(config.owner), "init_args": complete(arguments, keys)}
