"""The command line and the files of ``--config``, read into layers of settings."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from steppo.cli.config_types import did_you_mean
from steppo.errors import ConfigError

Keys = tuple[str, ...]


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


@dataclass
class Layer:
    """Settings of one file or option.

    Attributes:
        value: The settings.
        name: Of the file, for errors; none for an option.
        lines: Line of each setting of a file.
    """

    value: dict[str, Any]
    name: str = ""
    lines: dict[Keys, int] = field(default_factory=dict)

    def where(self, keys: Keys) -> str:
        """Which setting, and where it was set."""
        known = next((keys[:n] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), None)
        line = f", line {self.lines[known]}" if known else ""
        return f"{self.name}{line}: {'.'.join(keys)}" if self.name else ".".join(keys)


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, and a date as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in its base class
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_command_line(words: Sequence[str], commands: Collection[str]) -> tuple[str | None, list[Layer], list[str]]:
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
    layers: list[Layer] = []
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
                keys = tuple(name.removeprefix("--").split("."))
                layers.append(Layer(_nested(keys, Word(_absolute(value, keys)))))
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


def _nested(keys: Keys, value: Any) -> Dotted:
    return Dotted({keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value})


def read_config(path: str, below: Keys = (), extended_by: tuple[Path, ...] = ()) -> list[Layer]:
    """A file and before it those that it ``extends``.

    Args:
        path: The file; or a mapping in braces.
        below: Where in the config its settings belong.
        extended_by: The files that ask for it.

    Raises:
        ConfigError: It is not a text file, not YAML or not a mapping, has a key twice, or extends itself.
    """
    file, name = Path(path), f"config {path}"
    try:
        text = path if path.startswith("{") else file.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        value = loader.construct_document(node) if node is not None else None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not a text file") from None
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{place} is not YAML: {problem or error}") from None
    if not isinstance(value, dict):
        found = "is empty" if node is None else f"holds {'a list' if isinstance(value, list) else 'text'}"
        raise ConfigError(f"{name} {found}; it must hold sections such as 'rollout:'")
    for line, key in _repeated_keys(node):
        raise ConfigError(f"{name}, line {line}: {key} is there a second time; only the last would count")
    extends = value.pop("extends", [])
    others = extends if isinstance(extends, list) else [extends]
    if not all(isinstance(other, str) for other in others):
        raise ConfigError(f"{name}: extends must be a file or a list of files, not {extends}")
    layers = []
    for other in others:
        if file.resolve() in extended_by:
            raise ConfigError(f"{name} extends itself")
        layers += read_config(str(file.parent / other), below, (*extended_by, file.resolve()))
    return [*layers, Layer(_absolute(value, below), name, dict(_lines(node, below)))]


def _repeated_keys(node: yaml.Node) -> Iterator[tuple[int, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    yield key.start_mark.line + 1, key.value
                seen.add(key.value)
            yield from _repeated_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated_keys(value)


def _lines(node: yaml.Node, above: Keys) -> Iterator[tuple[Keys, int]]:
    """Keys and line of each setting; ``init_args`` counts for nothing."""
    below: list[tuple[Keys, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        names = [(key, str(key.value).removesuffix("+"), value) for key, value in node.value]
        below = [(above if name == "init_args" else (*above, name), key, value) for key, name, value in names]
    elif isinstance(node, yaml.SequenceNode):
        below = [((*above, str(number)), value, value) for number, value in enumerate(node.value)]
    for keys, key, value in below:
        if keys != above:
            yield keys, key.start_mark.line + 1
        yield from _lines(value, keys)


def _absolute(value: Any, keys: Keys) -> Any:
    """The keys of ``${...}`` counted from the top of a config without ``init_args`` and without the subcommand."""
    if isinstance(value, dict):
        return {key: _absolute(item, (*keys, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_absolute(item, (*keys, str(number))) for number, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def counted_from_the_top(found: re.Match[str]) -> str:
        above = keys[: -len(found[1])] if found[1].startswith(".") else ()
        return "${" + "".join(f"{key}." for key in above if key != "init_args")

    value = re.sub(r"\$\{(\.+|fit\.|validate\.|test\.)", counted_from_the_top, value)
    return re.sub(r"(?<=[.{])init_args\.", "", value) if "init_args." in value else value
