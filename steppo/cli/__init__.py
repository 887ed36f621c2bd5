"""The command line."""

from steppo.cli.app import OwnOptions, PartsCLI, SteppoCLI, build_parts, errors_in_one_line, main

__all__ = ["OwnOptions", "PartsCLI", "SteppoCLI", "build_parts", "errors_in_one_line", "main"]
