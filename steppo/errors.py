"""Exceptions that are shown as one line, without a traceback."""


class SteppoError(Exception):
    """Ends a run for a reason that its message explains."""


class ConfigError(SteppoError):
    """A mistake in a config, a path or the data. The message says what to do."""


class RunError(SteppoError):
    """The run cannot go on: nothing finite to learn from, no healthy episode."""
