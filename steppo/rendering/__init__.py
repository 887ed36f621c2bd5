"""Contexts: history -> messages. Renderer: messages -> prompt token ids. Parsers: answer -> command."""

from steppo.rendering.contexts import AppendContext, ContextPolicy, StateContext, WindowContext
from steppo.rendering.parsers import ActionParser, CommandParser, ParsedAction, ToolCallParser
from steppo.rendering.renderer import PLAIN_TEMPLATE
from steppo.types import Message

__all__ = [
    "PLAIN_TEMPLATE",
    "ActionParser",
    "AppendContext",
    "CommandParser",
    "ContextPolicy",
    "Message",
    "ParsedAction",
    "StateContext",
    "ToolCallParser",
    "WindowContext",
]
