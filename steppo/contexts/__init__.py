"""Context policies: history -> prompt token ids."""

from steppo.contexts.append import AppendContext
from steppo.contexts.base import ContextPolicy
from steppo.contexts.state import StateContext

__all__ = ["AppendContext", "ContextPolicy", "StateContext"]
