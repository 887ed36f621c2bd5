"""Contexts: history -> messages. Renderer: messages -> prompt token ids. Parsers: answer -> action."""

from steppo.rendering.contexts import AppendContext, ContextPolicy, StateContext, WindowContext
from steppo.rendering.parsers import ActionParser, CommandParser, NumberParser, ParsedAction, TextParser, is_open
from steppo.rendering.renderer import PLAIN_TEMPLATE, Renderer
from steppo.rendering.tool_calls import HermesParser, ToolCallParser

__all__ = [
    "PLAIN_TEMPLATE",
    "ActionParser",
    "AppendContext",
    "CommandParser",
    "ContextPolicy",
    "HermesParser",
    "NumberParser",
    "ParsedAction",
    "Renderer",
    "StateContext",
    "TextParser",
    "ToolCallParser",
    "WindowContext",
    "is_open",
]
