"""Makes panels, and compares results on them: ``python -m steppo.panel``."""
