"""Exceptions that are shown as one line, without a traceback."""

from __future__ import annotations

import argparse
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class SteppoError(Exception):
    """Ends a run for a reason that its message explains."""


class ConfigError(SteppoError):
    """A mistake in a config, a path or the data. The message says what to do."""


class RunError(SteppoError):
    """The run cannot go on: nothing finite to learn from, no healthy episode."""


class OptionParser(argparse.ArgumentParser):
    """Of a command of its own: mistakes are raised as ``ConfigError``."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: {self.prog} --help")


def require_at_least(least: int, owner: str | object, **settings: float | None) -> None:
    """``ConfigError`` names the setting that is less, infinite or no number. What is not given is right."""
    name = owner if isinstance(owner, str) else type(owner).__name__
    for setting, value in settings.items():
        if value is not None and not least <= value < math.inf:
            finite = " and finite" if isinstance(value, float) else ""
            raise ConfigError(f"{name}: {setting} must be at least {least}{finite}, not {value}")


class WrongValue(Exception):
    """Code of a user's class gave what it must not give. The message says all: what, and what is wanted instead."""


def in_short(text: str, longest: int = 500) -> str:
    """On one line, no longer than one can read."""
    text = " ".join(str.split(text))
    return text if len(text) <= longest else text[: longest - 4] + " ..."


def said(error: BaseException) -> str:
    """An error of code that is not steppo's, on one line that can be printed and stored, whatever its message is."""
    try:
        message = in_short(str(error))
    except Exception:
        message = "(its message cannot be read)"
    text = message if isinstance(error, WrongValue) else f"{type(error).__name__}: {message}"
    return text.encode("utf-8", "backslashreplace").decode()


def located(error: BaseException) -> str:
    """As ``said``, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, WrongValue) else ""
    return said(error) + place


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Code of a user's class runs here: what it raises ends the run with its name and line."""
    try:
        yield
    except SteppoError:
        raise
    except Exception as error:
        raise RunError(f"{what}: {located(error)}") from error
