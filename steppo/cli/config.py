"""One config from files and options: merged by the types of the settings, and checked name by name and value by value."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steppo.cli.config_files import Dotted, Keys, Layer, Word, read_config
from steppo.cli.config_types import (
    MISSING,
    Kind,
    Settings,
    class_names,
    did_you_mean,
    find_class,
    fits,
    import_path,
    kind_of,
    only_choice,
    parameters,
    usual,
    wanted,
)
from steppo.errors import ConfigError

# What is called otherwise than it was.
_MOVED = {
    f"model.loss.{name}": f"model.objective.{name}"
    for name in ("aggregation", "vf_coef", "value_clip", "ent_coef", "kl", "kl_coef", "kl_estimator")
} | {
    "rollout.min_healthy": "rollout.min_valid_fraction",
    "data.source.context.template_kwargs": "data.source.renderer.template_kwargs",
    "model.advantage.even_episodes": "model.advantage.whiten_over (episodes in place of true)",
}


class Component(dict[str, Any]):
    """A class and its arguments.

    Attributes:
        owner: The class.
        path: Its import path.
        called_later: Some of its arguments come when it is used.
        options: Options of the command line that set arguments.
    """

    def __init__(self, owner: Any, path: str, called_later: bool, arguments: Mapping[str, Any], options: set[str]) -> None:
        super().__init__(arguments)
        self.owner = owner
        self.path = path
        self.called_later = called_later
        self.options = options


@dataclass(frozen=True)
class _Place:
    """A setting that a layer sets."""

    layer: Layer
    keys: Keys = ()

    def below(self, key: object) -> _Place:
        return replace(self, keys=(*self.keys, str(key)))

    def error(self, problem: str) -> ConfigError:
        dashes = "--" if isinstance(self.layer.value, Dotted) else ""
        return ConfigError(f"{dashes}{self.layer.where(self.keys)}{problem}")


def merged_config(layers: Iterable[Layer], sections: Settings) -> dict[str, Any]:
    """The settings of all layers, the later over the earlier, with ``${...}`` resolved.

    Mappings merge key by key; lists, and values of type ``dict``, are replaced; ``name+`` appends to a list. Another class
    than before starts without arguments.

    Raises:
        ConfigError: A name is not known, or a value does not fit; where and what.
    """
    config: dict[str, Any] = {}
    for layer in layers:
        config = _merge(config, layer.value, sections, _Place(layer))
    if "${" in json.dumps(config, default=str):
        try:
            known = OmegaConf.to_container(OmegaConf.create(_with_defaults(config, sections.owner)), resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
        config = _merge({}, _resolved(config, known), sections, _Place(Layer({})))
    return config


def _with_defaults(config: Any, owner: Any) -> Any:
    """All that ``${...}`` may name."""
    if isinstance(config, list):
        return [_with_defaults(item, None) for item in config]
    if not isinstance(config, dict):
        return config
    owner = config.owner if isinstance(config, Component) else owner
    found = {} if owner is None or isinstance(owner, dict) else parameters(owner)
    plain = {name: default for name, (_, default) in found.items() if isinstance(default, int | float | str | None)}
    hints = {} if owner is None else _known(owner)
    return plain | {key: _with_defaults(item, kind_of(hints.get(key)).settings) for key, item in config.items()}


def _resolved(config: Any, known: Any) -> Any:
    """As a file would have it, without ``init_args``."""
    if isinstance(config, dict):
        own = {"class_path": config.path} if isinstance(config, Component) else {}
        return own | {key: _resolved(item, known.get(key)) for key, item in config.items()}
    if isinstance(config, list):
        return [_resolved(item, known[number]) for number, item in enumerate(config)]
    return known if isinstance(config, str) and "${" in config else config


# ---- merging ----


def _merge(base: Any, new: Any, hint: Any, at: _Place) -> Any:
    if isinstance(base, str) and "${" in base and isinstance(new, dict):
        raise at.error(f" belongs to what {base} stands for: set that, or give all of {'.'.join(at.keys)} here")
    kind = kind_of(hint)
    if isinstance(new, Word):
        read = new.read()
        new = read if not isinstance(read, str) and fits(read, hint) else str(new)
    if isinstance(new, str):
        if "${" in new:
            return new
        if (kind.bases or kind.settings) and new.endswith((".yaml", ".yml", ".json")) and Path(new).is_file():
            for layer in read_config(new, below=at.keys):
                base = _merge(base, layer.value, hint, _Place(layer, at.keys))
            return base
    if kind.settings is not None and isinstance(new, dict):
        return _merge_arguments(base if isinstance(base, dict) else {}, new, kind.settings, at)
    if kind.items is not MISSING and isinstance(new, list):
        return [_merge(None, item, kind.items, at.below(number)) for number, item in enumerate(new)]
    if kind.items is not MISSING and isinstance(new, Dotted) and isinstance(base, list) and base:
        return [*base[:-1], _merge(base[-1], new, kind.items, at)]  # of the last that was appended
    if kind.bases and isinstance(new, str | dict) and (found := _merge_component(base, new, kind, at)) is not None:
        return found
    if isinstance(new, Dotted) and fits({}, hint):
        below = base if isinstance(base, dict) else {}
        return below | {key: _merge(below.get(key), item, kind.values, at.below(key)) for key, item in new.items()}
    if not fits(new, hint):
        read = Word(new).read() if isinstance(new, str) else new
        if isinstance(read, str) or not fits(read, hint):
            raise at.error(f" must be {wanted(hint)}, not {_shown(new)}")
        return read
    return new


def _shown(value: Any) -> str:
    return repr(value) if value == "" else value if isinstance(value, str) else json.dumps(value, default=str)


def _merge_arguments(base: Mapping[str, Any], new: Mapping[Any, Any], owner: Any, at: _Place) -> dict[str, Any]:
    known = _known(owner)
    merged = dict(base)
    for key, value in new.items():
        name = str(key).removesuffix("+")
        place = at.below(name)
        if name not in known:
            raise place.error(_unknown(name, at.keys, known, owner))
        if str(key).endswith("+"):
            if kind_of(known[name]).items is MISSING:
                raise place.error(" is no list, so that nothing can be appended")
            read = value.read() if isinstance(value, Word) else value
            before, added = ([item] if not isinstance(item, list) else item for item in (merged.get(name, []), read))
            value = [_merge(None, item, kind_of(known[name]).items, place) for item in added]
            merged[name] = [*(item for item in before if item is not None), *value]
        else:
            merged[name] = _merge(merged.get(name), value, known[name], place)
    return merged


def _known(owner: Any) -> dict[str, Any]:
    if isinstance(owner, dict):
        return owner
    return {name: hint for name, (hint, _) in parameters(owner).items()}


def _unknown(name: str, above: Keys, known: Iterable[str], owner: Any) -> str:
    dotted = ".".join((*above, name))
    if dotted in _MOVED:
        return f" is now {_MOVED[dotted]}"
    if not above and name in ("fit", "validate", "test"):
        return ": sections such as 'rollout' stand at the top of a config, not below a command"
    near = did_you_mean(name, [*known, "class_path", "init_args"], lambda found: ".".join((*above, found)))
    of = f" of {owner.__name__}" if inspect.isclass(owner) else ""
    return f" is no setting{of}{near or '; there are ' + ', '.join(known)}"


def _merge_component(base: Any, new: str | dict[Any, Any], kind: Kind, at: _Place) -> Component | None:
    """``None``: the text is no class, and may be text."""
    old = base if isinstance(base, Component) else None
    name = new if isinstance(new, str) else new.get("class_path")
    if name is None:
        owner = old.owner if old is not None else only_choice(kind.bases)
        if owner is None:
            names = class_names(kind.bases)
            raise at.error(f" needs a class_path, such as {', '.join(names[:6]) or 'module.Class'}")
        path = old.path if old is not None else import_path(owner)
    else:
        try:
            owner, path = find_class(str(name), kind.bases)
        except ConfigError as error:
            if isinstance(new, str) and str in kind.options:
                return None
            raise at.error(f": {error}") from None
    if old is not None and old.owner is not owner:
        if old.options:
            raise at.error(f": another class drops {', '.join(sorted(old.options))}: give the class first")
        old = None
    options = set(old.options) if old is not None else set()
    given: dict[Any, Any] = {}
    if isinstance(new, dict):
        for key, item in new.items():
            value = item.read() if key == "init_args" and isinstance(item, Word) else item
            if key == "init_args":
                if not isinstance(value, dict | None):
                    raise at.error(f" must have a mapping of settings as init_args, not {_shown(value)}")
                given |= value or {}
            elif key != "class_path":
                given[key] = value
        if given and isinstance(at.layer.value, Dotted):
            options.add(f"--{'.'.join(_keys(at.layer.value))}")
    extra = {"dict_kwargs": dict[str, Any]}
    arguments = _merge_arguments(old or {}, given, _known(owner) | extra if "dict_kwargs" in given else owner, at)
    return Component(owner, path, kind.called_later, arguments, options)


def _keys(option: Dotted) -> Keys:
    [(key, value)] = option.items()
    return (key, *(_keys(value) if isinstance(value, Dotted) else ()))


# ---- what the parser gets ----


def complete(config: Any, keys: Keys = ()) -> Any:
    """A merged config as the parser takes it: with ``class_path`` and ``init_args``, and the classes that nobody names.

    Raises:
        ConfigError: A component lacks an argument.
    """
    if isinstance(config, list):
        return [complete(item, (*keys, str(number))) for number, item in enumerate(config)]
    if not isinstance(config, dict):
        return config
    if not isinstance(config, Component):
        return {key: complete(item, (*keys, str(key))) for key, item in config.items()}
    arguments, more = dict(config), {}
    if "dict_kwargs" in arguments:
        more["dict_kwargs"] = arguments.pop("dict_kwargs")
    lacking = []
    for name, (hint, default) in parameters(config.owner).items():
        if default is MISSING and name not in arguments and not config.called_later:
            bases = kind_of(hint).bases
            if owner := usual(bases):
                arguments[name] = Component(owner, import_path(owner), False, {}, set())
            else:
                names = class_names(bases)
                lacking.append(f"{name} ({' or '.join(names)})" if 0 < len(names) < 4 else name)
    if lacking:
        raise ConfigError(f"{'.'.join(keys)}: {config.owner.__name__} needs {' and '.join(lacking)}")
    return {"class_path": config.path, "init_args": complete(arguments, keys), **more}
