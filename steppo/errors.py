"""Exceptions that are shown as one line, without a traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class SteppoError(Exception):
    """Ends a run for a reason that its message explains."""


class ConfigError(SteppoError):
    """A mistake in a config, a path or the data. The message says what to do."""


class RunError(SteppoError):
    """The run cannot go on: nothing finite to learn from, no healthy episode."""


def located(error: BaseException) -> str:
    """An error of code that is not steppo's, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Code of a user's class runs here: what it raises ends the run with its name and line."""
    try:
        yield
    except SteppoError:
        raise
    except Exception as error:
        raise RunError(f"{what}: {located(error)}") from error
