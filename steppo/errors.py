"""The one exception that means "the user can mend this": shown as one line, without a traceback."""


class ConfigError(ValueError):
    """A mistake in a config, a path or the data. The message says what to do."""
