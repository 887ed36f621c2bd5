"""Context policies: history -> prompt token ids."""

from steppo.contexts.append import AppendContext
from steppo.contexts.base import PLAIN_TEMPLATE, ContextPolicy
from steppo.contexts.state import StateContext

__all__ = ["PLAIN_TEMPLATE", "AppendContext", "ContextPolicy", "StateContext"]
