"""Checks and prepares the data of an environment: ``python -m steppo.data``."""
