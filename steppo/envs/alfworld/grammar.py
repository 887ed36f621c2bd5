"""The text grammar of a ``.tw-pddl`` game, as TextWorld reads it: rules with conditions, templates of commands.

A game comes from elsewhere, and its templates hold expressions of Python. They are never evaluated as such: the few forms
that games use are read into a tree of our own, and others are refused.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Placeholder = tuple[str, str]  # name and type

_READABLE = ("name", "id", "type", "definite", "indefinite")
_TOKEN = re.compile(r'\s+|#[^\n]*|"""(?P<block>.*?)"""|"(?P<text>[^"]*)"|(?P<sign>::|[;{}])|(?P<word>[\w/-]+)', re.DOTALL)
_TAG = r"#([\w()/!<>\-\s,.]+)#"
# A rule or an expression, and the query that says of what.
_EACH = rf"\{{(?:{_TAG}|([^|\[\]{{}}\n<>]+))(?:\s*\|\s*([^;|{{}}\n\[\]#]+))?\}}"
_SYMBOL = re.compile(rf'\t*(?:\[(?P<listed>{_EACH})\]|(?P<each>{_EACH})|{_TAG}|"([^;|"<>\[\]#{{}}]*)"|([^;|"<>\[\]#{{}}]+))')
_PREDICATE = re.compile(r"\s*(!?[\w/]+)\(([^()]*)\)\s*")
_PLACEHOLDER = re.compile(r"\s*([\w']+)\s*(?::\s*([\w]+)\s*)?")


class GameError(Exception):
    """A game that cannot be read or played. The message says why."""


class World(Protocol):
    """What texts are about: facts, and the things in them, which are numbered by the order of their ids."""

    @property
    def things(self) -> Sequence[Thing | None]:
        """By their numbers; ``None`` for those that no fact is about."""

    def facts(self, predicate: str) -> Sequence[tuple[int, ...]]:
        """The things that a predicate holds for, sorted."""

    def of_type(self, name: str) -> Collection[int]:
        """All things of a type and its subtypes."""


@dataclass(frozen=True, slots=True)
class Thing:
    """As a text may speak of it."""

    id: str
    type: str
    name: str
    definite: str = "the"
    indefinite: str = "a"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Scene:
    """What names in a text stand for."""

    names: Mapping[str, Thing]
    bound: Mapping[Placeholder, int]


@dataclass(frozen=True)
class Query:
    """Facts that must hold together; different placeholders stand for different things."""

    predicates: tuple[tuple[str, tuple[Placeholder, ...]], ...]

    def answers(self, world: World, bound: Mapping[Placeholder, int]) -> Iterator[dict[Placeholder, int]]:
        """All ways to fill the placeholders that are not bound, in TextWorld's order."""
        yield from self._answers(world, dict(bound), 0)

    def _answers(self, world: World, bound: dict[Placeholder, int], depth: int) -> Iterator[dict[Placeholder, int]]:
        if depth == len(self.predicates):
            yield dict(bound)
            return
        predicate, placeholders = self.predicates[depth]
        allowed = [world.of_type(kind) for _, kind in placeholders]
        new = [placeholder for placeholder in placeholders if placeholder not in bound]
        used = set(bound.values())
        for fact in world.facts(predicate):
            if len(fact) != len(placeholders):
                continue
            for placeholder, thing, of_type in zip(placeholders, fact, allowed, strict=True):
                known = bound.get(placeholder)
                if known is None:
                    if thing in used or thing not in of_type:
                        break
                    bound[placeholder] = thing
                    used.add(thing)
                elif known != thing:
                    break
            else:
                yield from self._answers(world, bound, depth + 1)
            for placeholder in new:
                used.discard(bound.pop(placeholder, -1))


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Rule:
    name: str


@dataclass(frozen=True)
class Value:
    tree: ast.expr

    def of(self, names: Mapping[str, Thing]) -> str:
        return str(_value(self.tree, names))


@dataclass(frozen=True)
class Each:
    """A rule or value for each answer of a query, or once; ``listed``: with separators between."""

    what: Rule | Value
    query: Query | None
    listed: bool


Symbol = Text | Rule | Value | Each


def _value(tree: ast.expr, names: Mapping[str, Thing]) -> Any:
    match tree:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in names and attribute in _READABLE:
            return getattr(names[name], attribute)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, names) + _value(right, names)
        case ast.BoolOp(op=ast.Or(), values=[*alternatives]):
            for alternative in alternatives:
                if value := _value(alternative, names):
                    break
            return value
    raise GameError(f"the text {ast.unparse(tree)!r} of its grammar cannot be read")


@functools.lru_cache(maxsize=4096)
def _expression(text: str) -> Value:
    try:
        return Value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GameError(f"the text {text!r} of its grammar cannot be read") from error


@functools.lru_cache(maxsize=4096)
def query_of(text: str) -> Query:
    """Reads ``p(a:type, b:type) & q(a:type)``."""
    predicates = []
    for part in text.split("&"):
        found = _PREDICATE.fullmatch(part)
        placeholders = [_PLACEHOLDER.fullmatch(each) for each in found[2].split(",")] if found and found[2].strip() else []
        if not found or None in placeholders:
            raise GameError(f"the condition {text!r} of its grammar cannot be read")
        predicates.append((found[1], tuple((each[1], each[2] or each[1].rstrip("'")) for each in placeholders if each)))
    return Query(tuple(predicates))


@functools.lru_cache(maxsize=4096)
def symbols_of(text: str) -> tuple[Symbol, ...]:
    """Reads a template. TextWorld drops what stands behind the first character that it cannot read, and so does this."""
    symbols: list[Symbol] = []
    place = len(text) - len(text.lstrip())
    while found := _SYMBOL.match(text, place):
        place = found.end()
        groups = found.groups()
        each = groups[1:4] if found["listed"] else groups[5:8]
        if found["listed"] or found["each"]:
            rule, expression, query = each
            what = Rule(rule) if rule else _expression(expression)
            symbols.append(Each(what, query_of(query) if query else None, bool(found["listed"])))
        elif groups[8]:
            symbols.append(Rule(groups[8]))
        else:
            symbols.append(Text((groups[9] or groups[10] or "").replace("\\n", "\n")))
    return tuple(symbols)


class Grammar:
    """Reads and applies a game's grammar.

    Attributes:
        templates: Of commands, by the name of their action.
        feedback: What is said after an action.
        version: How a thing is put somewhere, by which the publisher's two grammars are told apart: ``move X to Y``.
    """

    def __init__(self, text: str) -> None:
        self.templates: dict[str, str] = {}
        self.feedback: dict[str, str] = {}
        self._rules: dict[str, list[tuple[str, str]]] = {}
        try:
            for name, rules in self._read(text).items():
                self._rules[name] = [(rule.get("condition", ""), str(rule["rhs"])) for rule in rules]
        except (ValueError, KeyError, AttributeError, TypeError, IndexError, RecursionError) as error:
            raise GameError(f"its grammar cannot be read: {type(error).__name__}: {error}") from error
        if "putobject" not in self.templates or "intro" not in self._rules:
            raise GameError("its grammar is not ALFWorld's: it has no PutObject or no intro")
        put = self.templates["putobject"]
        self.version = put.replace("{o}", "X").replace("{r}", "Y")

    def _read(self, text: str) -> dict[str, list[dict[str, str]]]:
        rules: dict[str, list[dict[str, str]]] = {}
        tokens = _tokens(text)
        while tokens:
            head = tokens.pop()
            if head == ("word", "grammar"):
                rules.update(json.loads(textwrap.dedent(_setting(tokens))))
                continue
            if head != ("word", "action"):
                raise ValueError(f"{head[1]!r} stands where an action or a grammar begins")
            action = tokens.pop()[1].lower()
            _expect(tokens, "{")
            while (key := tokens.pop()[1]) != "}":
                value = _setting(tokens)
                if key == "template":
                    self.templates[action] = value
                elif key == "feedback":
                    self.feedback[action] = value
                elif key == "grammar":
                    lines = textwrap.dedent(value).split("\n")
                    rules.update(json.loads("\n".join(line for line in lines if not line.lstrip().startswith("#"))))
        return rules

    def text(self, template: str, world: World, scene: Scene) -> str:
        """The text of a template."""
        return "".join(self._text(symbol, world, scene) for symbol in symbols_of(template))

    def depends_on(self, template: str) -> set[str] | None:
        """The predicates that decide about a template's text, or ``None`` if rules do (separators are taken as constant)."""
        predicates: set[str] = set()
        for symbol in symbols_of(template):
            if isinstance(symbol, Rule) or (isinstance(symbol, Each) and isinstance(symbol.what, Rule)):
                return None
            if isinstance(symbol, Each) and symbol.query:
                predicates |= {name for name, _ in symbol.query.predicates}
        return predicates

    def _text(self, symbol: Symbol, world: World, scene: Scene) -> str:
        if isinstance(symbol, Text):
            return symbol.text
        if isinstance(symbol, Value):
            return symbol.of(scene.names)
        if isinstance(symbol, Rule):
            return self.text(self._chosen(symbol.name, world, scene), world, scene)
        scenes = [scene]
        if symbol.query:
            answers = symbol.query.answers(world, scene.bound)
            scenes = [Scene(dict(scene.names) | _named(world, found), found) for found in answers]
        parts = [self._text(symbol.what, world, each) for each in scenes]
        if not symbol.listed or len(parts) == 1:
            return "".join(parts)
        if not parts:
            return self._text(Rule("list_empty"), world, scene)
        between = self._text(Rule("list_separator"), world, scene) if len(parts) > 2 else ""
        return between.join(parts[:-1]) + self._text(Rule("list_last_separator"), world, scene) + parts[-1]

    def _chosen(self, name: str, world: World, scene: Scene) -> str:
        """The first rule of a name whose condition holds."""
        for condition, template in self._rules.get(name, ()):
            if not condition or any(True for _ in query_of(condition).answers(world, scene.bound)):
                return template
        raise GameError(f"its grammar has no rule {name!r} for this")


def _named(world: World, found: Mapping[Placeholder, int]) -> dict[str, Thing]:
    return {name: thing for (name, _), number in found.items() if (thing := world.things[number])}


def _tokens(text: str) -> list[tuple[str, str]]:
    """Kind and value, the first at the end."""
    tokens, place = [], 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if not found:
            raise ValueError(f"{text[place : place + 20]!r} was not expected")
        place = found.end()
        if found.lastgroup:
            tokens.append((found.lastgroup, found[found.lastgroup]))
    return tokens[::-1]


def _expect(tokens: list[tuple[str, str]], sign: str) -> None:
    if (found := tokens.pop()) != ("sign", sign):
        raise ValueError(f"{found[1]!r} stands where {sign!r} is expected")


def _setting(tokens: list[tuple[str, str]]) -> str:
    """``:: "text";`` behind a key."""
    _expect(tokens, "::")
    kind, value = tokens.pop()
    if kind not in ("text", "block"):
        raise ValueError(f"{value!r} stands where a text is expected")
    _expect(tokens, ";")
    return value
