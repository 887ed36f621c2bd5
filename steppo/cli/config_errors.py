"""A user's mistake in one line: where and what, and what to do where that helps."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import itertools
import json
import re
import traceback
import typing
from argparse import Action
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace, _typehints
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from steppo.errors import ConfigError, SteppoError, located

_LONGEST_ERROR = 500
_PASSES_NONE = (Any, inspect.Parameter.empty, None, NoneType)

# What Lightning offers and steppo does otherwise: option -> values that change nothing, what to use.
_OTHERWISE: dict[str, tuple[set[str], str]] = {
    "gradient_clip_val": (
        {"None", "0", "0.0"},
        "gradients are clipped by model.policy_optimizer.max_grad_norm and model.critic_optimizer.max_grad_norm",
    ),
    "accumulate_grad_batches": ({"None", "1"}, "data.max_tokens_per_microbatch splits an update to fit into memory"),
    "limit_train_batches": ({"None", "1.0"}, "an iteration makes data.update_epochs * data.num_minibatches updates"),
    "max_steps": (
        {"-1"},
        "it could cut an iteration; trainer.max_epochs or rollout.max_environment_steps ends a run with a whole one",
    ),
    "overfit_batches": ({"None", "0", "0.0"}, "data.train_tasks learns from the first tasks only"),
    "val_check_interval": ({"None", "1.0"}, "trainer.check_val_every_n_epoch says after how many iterations to evaluate"),
    "limit_val_batches": ({"None", "0", "0.0", "1", "1.0"}, "data.eval_tasks is the size of the panel"),
    "limit_test_batches": ({"None", "0", "0.0", "1", "1.0"}, "data.eval_tasks is the size of the panel"),
}

# What is called otherwise than it was.
_MOVED = {
    f"model.loss.{name}": f"model.objective.{name}"
    for name in ("aggregation", "vf_coef", "value_clip", "ent_coef", "kl", "kl_coef", "kl_estimator")
} | {
    "rollout.min_healthy": "rollout.min_valid_fraction",
    "model.advantage.even_episodes": "model.advantage.whiten_over: episodes",
    "model.advantage.init_args.even_episodes": "model.advantage.init_args.whiten_over: episodes",
}


# ---- before and after parsing ----


def keep_values_whole() -> None:
    """Has the parser hand an option's value to classes within classes as it was given.

    It hands them Python's way to write it: ``None`` in place of ``null``, and what is in a list or mapping likewise.
    """
    adapt = _typehints.adapt_class_type
    if adapt.__module__ == __name__:
        return

    def adapt_whole(value: Any, *args: Any, **kwargs: Any) -> Any:
        given = value.get("init_args") if isinstance(value, dict | Namespace) else None
        if isinstance(given, _typehints.NestedArg) and isinstance(given.val, list | dict | None):
            value["init_args"] = given._replace(val=json.dumps(given.val, default=str))
        return adapt(value, *args, **kwargs)

    _typehints.adapt_class_type = adapt_whole


def check_config_files(args: Sequence[str]) -> None:
    """Reads the files of ``--config``: the parser would not say which is broken, and takes the last of two equal keys.

    Raises:
        ConfigError: One is not a text file, not YAML or not a mapping, has a key twice or one that has moved. Options, too.
    """
    for word, following in itertools.pairwise([*args, ""]):
        name, equals, value = word.partition("=")
        if not any(word.partition("=")[0] == "--model.loss" for word in args):  # a loss of one's own may have such a setting
            _check_moved(name.removeprefix("--").replace("model.init_args.", "model."), name)
        path = value if equals else following
        if name not in ("--config", "-c") or "://" in path or path.startswith(("{", "-")) or not path:
            continue
        try:
            node = yaml.compose(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ConfigError(f"config {path} is not a text file") from None
        except OSError as error:
            raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise ConfigError(f"config {path}{line} is not YAML: {problem or error}") from None
        if not isinstance(node, yaml.MappingNode):
            found = "is empty" if node is None else f"holds {'a list' if isinstance(node, yaml.SequenceNode) else 'text'}"
            raise ConfigError(f"config {path} {found}; it must hold sections such as 'rollout:'")
        for number, key in _repeated_keys(node):
            raise ConfigError(f"config {path}, line {number}: {key} is there a second time; only the last would count")
        for number, key in _paths(node, ""):
            _check_moved(key, f"config {path}, line {number}: {key}")


def _check_moved(key: str, where: str) -> None:
    if key in _MOVED:
        raise ConfigError(f"{where} is now {_MOVED[key]}")


def _paths(node: yaml.Node, above: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each setting; those of the model as on the command line, also below a subcommand."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                skipped = key.value in ("fit", "validate", "test") or (above, key.value) == ("model", "init_args")
                path = above if skipped else f"{above}.{key.value}".removeprefix(".")
                yield key.start_mark.line + 1, path
                yield from _paths(value, path)


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


def check_config(config: Namespace, options: Iterable[Action]) -> None:
    """What the parser lets pass: null and lists in the wrong place, seeds out of range, trainer options that do not apply.

    Args:
        config: Of one subcommand, parsed.
        options: The parser's.

    Raises:
        ConfigError: Where and what.
    """
    for action in options:
        section, dot, _ = action.dest.partition(".")
        if action.dest.endswith(".help") or section not in config:
            continue
        if dot and not isinstance(config[section], Namespace):
            raise ConfigError(f"{section}: Expected a mapping of settings. Got value: {config[section]}")
        _check_null(config.get(action.dest), getattr(action, "_typehint", Any), action.default, action.dest)
    _check_namespace(config, "")
    seed = config.get("seed_everything")
    if not isinstance(seed, bool | None) and not 0 <= seed < 2**32:
        raise ConfigError(f"seed_everything must be from 0 to {2**32 - 1}, not {seed}")
    for option, (harmless, instead) in _OTHERWISE.items():
        if str(config.trainer.get(option)) not in harmless:  # as text: 1 is one batch, 1.0 all of them
            raise ConfigError(f"trainer.{option} is not for steppo: {instead}")
    if config.trainer.get("check_val_every_n_epoch") == 0:
        raise ConfigError("trainer.check_val_every_n_epoch must be at least 1; trainer.limit_val_batches 0 turns it off")


def _check_namespace(config: Any, where: str) -> None:
    if isinstance(config, list):
        for number, item in enumerate(config):
            _check_namespace(item, f"{where}[{number}]")
    if not isinstance(config, Namespace):
        return
    arguments = config.get("init_args")
    if isinstance(config.get("class_path"), str) and isinstance(arguments, Namespace):
        _check_arguments(_import(config.class_path), arguments, where)
        _check_namespace(arguments, where)
        return
    for name, value in vars(config).items():
        _check_namespace(value, f"{where}.{name}" if where else name)


def _check_arguments(owner: Any, arguments: Namespace, where: str) -> None:
    parameters = _parameters(owner)
    for name, value in vars(arguments).items():
        hint, default = parameters.get(name, (Any, None))
        place = f"{where}.{name}"
        _check_null(value, hint, default, place)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Namespace):
                raise ConfigError(f"{place}: Expected a mapping of settings. Got value: {value}")
            _check_arguments(hint, value, place)


def _check_null(value: Any, hint: Any, default: Any, where: str) -> None:
    if value is None and default is not None and hint not in _PASSES_NONE and NoneType not in typing.get_args(hint):
        raise ConfigError(f"{where}: Expected a {getattr(hint, '__name__', hint)}. Got value: null")


def _parameters(owner: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of what a class or function takes."""
    try:
        hints = typing.get_type_hints(owner.__init__ if inspect.isclass(owner) else owner)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can read
        hints = {}
    found = inspect.signature(owner).parameters
    return {name: (hints.get(name, Any), parameter.default) for name, parameter in found.items()}


def _import(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# ---- errors, in one line ----


def explain(error: Exception, options: Iterable[str] = ()) -> str:
    """One line that says where and what, without the parser's lists of all that it tried."""
    text = " ".join(str(error).split())
    if isinstance(error, OmegaConfBaseException):
        text = _interpolation(error)
    elif isinstance(error, MisconfigurationException) and "No supported gpu" in text:
        text = "trainer.accelerator: torch sees no GPU here; set it to cpu or auto"
    elif isinstance(error, ArgumentError):
        text = _parser_error(text, options)
    return text if len(text) <= _LONGEST_ERROR else text[: _LONGEST_ERROR - 4] + " ..."


def _interpolation(error: OmegaConfBaseException) -> str:
    what = str(error).splitlines()[0]
    where = ".".join(part for part in str(error.full_key).split(".")[1:] if part != "init_args")
    if re.match(r"Interpolation key '[^.]", what):
        what += (
            "; ${.name} is the argument beside this one, and absolute keys begin with the subcommand: ${fit.rollout.name}"
        )
    return f"{where}: {what}"


def _parser_error(text: str, options: Iterable[str]) -> str:
    missing = re.fullmatch(r"the following arguments are required: ((?:\w+\.(?:model|data)(?:, )?)+)", text)
    if missing:
        names = re.findall(r"\.(\w+)", missing[1])
        return f"there is no {' and no '.join(names)}: give a whole experiment, such as --config configs/quickstart.yaml"
    text = re.sub("^Unexpected config: (.*)", r"a config without a setting: \1", text)
    text, _, given = text.partition(" Given value type:")
    where = ".".join(key for key, _ in itertools.groupby(re.findall(r'Parser key "([^"]*)"', text)))
    text = re.sub(r"- Expected a path but .*? either not accessible or invalid ", "", text)
    *_, reason = re.split(r'Parser key "[^"]*": |Errors: - ', text)
    reason = re.sub(r"<class '([\w.]+)'>", r"\1", reason).replace("typing.", "")
    reason = re.sub(
        r"Expected a dot import path string:(?: (?!- )(\S+))?", r"'\1' is not a class path (module.Class)", reason
    )
    reason = re.sub(
        r"Not a valid subclass of (\w+) Subclass types .*?\(implicit class_path\)", r"Expected a \1 by class_path", reason
    )
    tried = dict.fromkeys(reason.removeprefix("- ").split(" - "))
    expected = [part for part in tried if part.startswith("Expected a ") and part != "Expected a NoneType"]
    problems = [part for part in tried if not part.startswith("Expected a ")]
    reason = problems[0] if problems else " or ".join([expected[0], *(part[len("Expected ") :] for part in expected[1:])])
    value = given.partition("Given value: ")[2]
    if value and "NestedArg" not in value and "Got value" not in reason:
        reason += f". Got value: {value}"
    reason = re.sub(r"\. Got value: .*[{(].*", "", reason)  # of a whole component
    return f"{where + ': ' if where else ''}{reason}{_suggestion(reason, options)}"


def _suggestion(reason: str, options: Iterable[str]) -> str:
    """The name that was probably meant."""
    owner = re.search(r"class_path '([\w.]+)'", reason)
    attribute = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", reason)
    option = re.search(r"(?:unrecognized arguments: --|Option '|accept option ')([\w.]+)", reason)
    group = re.search(r"Group '([\w.]+)'", reason)
    names: Iterable[str]
    if attribute:
        wanted, names = attribute[2], dir(importlib.import_module(attribute[1]))
    elif option:
        wanted = re.sub(r"\.(class_path|init_args)\b.*", "", f"{group[1]}.{option[1]}" if group else option[1])
        names = [*_names(_import(owner[1])), "class_path", "init_args"] if owner else options
    else:
        return ""
    near = difflib.get_close_matches(wanted, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _names(owner: Any) -> Iterator[str]:
    """Parameters, and those of settings in them: ``loss``, ``loss.ratio``."""
    for name, (hint, _) in _parameters(owner).items():
        yield name
        if dataclasses.is_dataclass(hint):
            yield from (f"{name}.{field.name}" for field in dataclasses.fields(hint))


# ---- errors of components and of Lightning ----


def refusal(error: Exception) -> Exception:
    """What to show for an error in a constructor: steppo's own words, the parser's or Lightning's, or the line at fault."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    for cause in chain:
        if isinstance(cause, SteppoError | MisconfigurationException):
            return cause
    for cause in reversed(chain):
        if not _is_foreign(cause):
            return ConfigError(located(cause))
    return ArgumentError(None, str(error))


def in_one_line(error: Exception) -> Exception:
    """The error of a run, as a ConfigError where Lightning refused to go on or a file could not be used; else itself."""
    if isinstance(error, OSError) and error.filename is not None:
        return ConfigError(f"cannot use {error.filename}: {error.strerror}")
    if isinstance(error, RuntimeError | ValueError) and _is_foreign(error):
        return ConfigError(str(error))
    return error


def _is_foreign(error: BaseException) -> bool:
    """Raised by Lightning or the parser in so many words, not something that broke there."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    place, line = Path(frames[-1].filename).parts, frames[-1].line or ""
    return bool({"lightning", "jsonargparse"} & set(place)) and line.startswith("raise")
