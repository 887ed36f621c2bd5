"""The command line."""

from steppo.cli.app import PartsCLI, SteppoCLI, build_parts, errors_in_one_line, main, own_options

__all__ = ["PartsCLI", "SteppoCLI", "build_parts", "errors_in_one_line", "main", "own_options"]
