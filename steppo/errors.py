"""Exceptions that are shown as one line, without a traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_MESSAGE = 500


class SteppoError(Exception):
    """Ends a run for a reason that its message explains."""


class ConfigError(SteppoError):
    """A mistake in a config, a path or the data. The message says what to do."""


class RunError(SteppoError):
    """The run cannot go on: nothing finite to learn from, no healthy episode."""


class WrongValue(Exception):
    """Code of a user's class gave what it must not give. The message says all: what, and what is wanted instead."""


def said(error: BaseException) -> str:
    """An error of code that is not steppo's, on one line that can be printed and stored, whatever its message is."""
    try:
        message = " ".join(str.split(str(error)))
    except Exception:
        message = "(its message cannot be read)"
    if len(message) > _LONGEST_MESSAGE:
        message = message[:_LONGEST_MESSAGE] + " ..."
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
