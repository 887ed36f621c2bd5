"""The command line and the files of ``--config``, read into layers of settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from steppo.cli.config_types import did_you_mean
from steppo.errors import ConfigError
from steppo.paths import user_path

Keys = tuple[Any, ...]


class Key(str):
    """The name of a setting in a file, and its place there. In options names are plain text."""

    place: str


class Word(str):
    """A word of the command line, which may mean text, a number, a list, ..."""

    __slots__ = ()

    def read(self) -> Any:
        """What it means in YAML; itself, if nothing."""
        try:
            return yaml.load(self, _Loader)
        except yaml.YAMLError:
            return str(self)


class Dotted(dict[str, Any]):
    """What a dotted option sets: one entry of a mapping, where a mapping in a file would replace the whole."""


def mistake(keys: Keys, problem: str) -> ConfigError:
    """Says which setting, and where it was set."""
    place = next((key.place for key in reversed(keys) if isinstance(key, Key)), "--")
    return ConfigError(f"{place}{'.'.join(str(key).removesuffix('+') for key in keys)}{problem}")


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, and a date as text; takes no key twice; puts ``init_args`` beside their ``class_path``."""

    file = ""
    yaml_implicit_resolvers = {  # noqa: RUF012 - as in its base class
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                problem = f"{key.value} is there a second time; only the last would count"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        mapping = super().construct_mapping(node, deep=True)
        for key, _ in node.value if self.file else ():
            if key.value in mapping:
                name = Key(key.value)
                name.place = f"{self.file}, line {key.start_mark.line + 1}: "
                mapping[name] = mapping.pop(name)
        return mapping | mapping.pop("init_args") if isinstance(mapping.get("init_args"), dict) else mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_command_line(words: Sequence[str], commands: Collection[str]) -> tuple[str | None, list[dict[str, Any]], list[str]]:
    """Takes a command line apart and reads its files.

    Args:
        words: Of the command line.
        commands: Subcommands, one of which must come first; none: there is none.

    Returns:
        The subcommand; configs and options, in their order; what asks for a text, such as ``--help``.

    Raises:
        ConfigError: A word has no meaning, or a file cannot be used.
    """
    command: str | None = None
    layers: list[dict[str, Any]] = []
    flags: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("-h", "--help", "--print_config"):
            flags.append(word)
        elif name.startswith("--") and name.endswith(".help"):
            flags += [word, *([rest.pop(0)] if not equals and rest and not rest[0].startswith("-") else [])]
        elif name.startswith("--") or name == "-c":
            if not equals and (not rest or re.match(r"-(-|[a-z])", rest[0])):
                raise ConfigError(f"{name} needs a value")
            value = value if equals else rest.pop(0)
            if name in ("-c", "--config"):
                layers += read_config(value)
            else:
                keys = name.removeprefix("--").split(".")
                layers.append(_nested([key for key in keys if key != "init_args"], Word(value)))
        elif command is None and commands:
            if word not in commands:
                near = did_you_mean(word, commands) or f"; there are {', '.join(commands)}"
                raise ConfigError(f"there is no command {word!r}{near}")
            command = word
        else:
            raise ConfigError(f"{word!r} is neither an option (--name value) nor the value of one")
    if commands and command is None and not flags:
        raise ConfigError(f"there is no command: give one of {', '.join(commands)}")
    return command, layers, flags


def _nested(keys: Sequence[str], value: Any) -> Any:
    return Dotted({keys[0]: _nested(keys[1:], value)}) if keys else value


def read_config(path: str, extended_by: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """A file and before it those that it ``extends``.

    Args:
        path: The file; or a mapping in braces.
        extended_by: The files that ask for it.

    Raises:
        ConfigError: It is not a text file, not YAML or not a mapping, has a key twice, or extends itself.
    """
    file, name = user_path(path), f"config {path}"
    try:
        text = path if path.startswith("{") else file.read_text(encoding="utf-8")
        loader = _Loader(text)
        loader.file = name
        value = loader.get_single_data()
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not a text file") from None
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{place}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must hold sections such as 'rollout:'")
    extends = value.pop("extends", [])
    layers = []
    for other in extends if isinstance(extends, list) else [extends]:
        if not isinstance(other, str):
            raise ConfigError(f"{name}: extends must be a file or a list of files, not {extends}")
        if file.resolve() in extended_by:
            raise ConfigError(f"{name} extends itself")
        layers += read_config(str(file.parent / user_path(other)), (*extended_by, file.resolve()))
    return [*layers, value]
