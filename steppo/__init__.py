"""steppo: reinforcement learning of LLM agents at the granularity of interaction steps."""

__version__ = "0.1.0"
