"""A chat template's markup, and how it is kept out of texts that others wrote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
ANSWER_MARKUP = (THINK, END_THINK, CALL, END_CALL)  # what a policy writes itself, so that feedback may show it

# What templates write to tell their parts apart: <|im_start|>, </tool_response>, [/INST], <function= (a name follows).
_WRITTEN = re.compile(r"<[^\s<>'\"]+(?:>|=(?=['\"]))|\[/?[A-Z_]+\]")


def markup_of(tokenizer: Any, other_template: str = "") -> set[str]:
    """All that could pass for the template's own, also that of another in its place.

    These are the special tokens, with a role (end of sequence) or without (headers of turns), other added tokens that the
    template uses, and what stands in brackets in its source, whether that is one token or several. Words that a template
    writes (``User:``) are not told from text.
    """
    own = tokenizer.chat_template or ""
    template = "\n".join([*(own.values() if isinstance(own, dict) else [own]), other_template])  # some have several, by name
    added = tokenizer.added_tokens_decoder.values()
    used = [token.content for token in added if token.special or (token.content.strip() and token.content in template)]
    return {*tokenizer.all_special_tokens, *used, *markup_in(template)} - {""}


def markup_in(template: str, others: str = "") -> set[str]:
    """What it has in brackets, beside what is of others in it."""
    return set(Counter(_WRITTEN.findall(template)) - Counter(_WRITTEN.findall(others)))


class Markup:
    """Takes markup out of texts.

    Args:
        markup: What is to go.
        tokenizer: Whose normalisation may turn other characters into markup.
    """

    def __init__(self, markup: Collection[str], tokenizer: Any) -> None:
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._read = normalizer.normalize_str if normalizer else str
        known = sorted({*markup, *map(self._read, markup)}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, known)))
        self._longest = len(known[0])

    def found_in(self, text: str) -> str:
        """The first in a text; empty if there is none."""
        found = self._pattern.search(text) or self._pattern.search(self._read(text))
        return found.group() if found else ""

    def removed_from(self, text: str) -> str:
        """The text without markup, also where what is left would be markup again."""
        start = 0
        while found := self._pattern.search(text, start):
            text = text[: found.start()] + text[found.end() :]
            start = max(0, found.start() - self._longest)
        as_read = self._read(text)
        return self.removed_from(as_read) if self._pattern.search(as_read) else text
