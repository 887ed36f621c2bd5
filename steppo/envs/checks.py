"""What an environment answers, checked field by field where it comes in. What passes can do no harm further on."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np

from steppo.errors import WrongValue, said
from steppo.types import Action, Episode, Message, Step, StopReason, ToolCall, Turn

# Largest size of a reward. Learning squares returns and sums the squares over an update and over all weights, in float32,
# which ends at 3.4e38: a return of a thousand such rewards, 1e15, still leaves room for a hundred million terms.
MOST_REWARD = 1e12

# Of what is said beside it: float32, which curves are kept in, and sums of many have room for more.
MOST_FIGURE = 1e30
MOST_ENTRIES, LONGEST_NAME, LONGEST_LABEL = 32, 64, 256

_LONGEST_QUOTE = 60
_SAID_ELSEWHERE = ("success", "action_valid")

T = TypeVar("T")


@dataclass(frozen=True)
class EnvReply:
    """What a slot answers to ``reset`` and ``step``: a turn, or why there is none."""

    turn: Turn | None = None
    error: str = ""


# ---- answers: raise WrongValue ----


def opening_turn(answer: Any) -> Turn:
    """What ``reset`` returned. No action came before it, so it has no reward and ends nothing."""
    turn = checked_turn(answer, "reset")
    for name in ("reward", "terminated", "truncated"):
        if value := getattr(turn, name):
            raise WrongValue(f"the environment's {name} cannot be {shown(value)} in reset: nothing is done yet")
    return turn if turn.action_valid else replace(turn, action_valid=True)


def checked_turn(answer: Any, method: str = "step") -> Turn:
    """What ``step`` returned, field by field."""
    if not isinstance(answer, Turn):
        raise WrongValue(f"the environment's {method} must return a Turn, not {shown(answer)}")
    fields: dict[str, Any] = {}
    for name, check in _FIELDS.items():
        with _reading(name):
            fields[name] = check(name, getattr(answer, name))
    with _reading("turn"):
        return _rebuilt(Turn, answer, fields)


def with_expert(turn: Turn, action: Any) -> Turn:
    """A turn with what ``expert_action`` returned."""
    with _reading("expert_action"):
        return replace(turn, expert_action=_expert("expert_action", action))


def checked_action(whose: str, action: Any) -> Action:
    """An action that can be sent, written and read, field by field."""
    if not isinstance(action, Action):
        raise WrongValue(f"the action of {whose} must be an Action, not {shown(action)}")
    calls: Any = action.tool_calls
    if not isinstance(calls, list | tuple):
        raise WrongValue(f"the tool_calls of {whose} must be a list or tuple of ToolCall, not {shown(calls)}")
    fields = {name: plain_text(f"the {name} of {whose}", getattr(action, name)) for name in ("text", "reasoning")}
    if action.command is not None:
        fields["command"] = plain_text(f"the command of {whose}", action.command)
    checked = tuple(_tool_call(f"of tool call {number} of {whose}", call) for number, call in enumerate(calls, start=1))
    return _rebuilt(Action, action, {**fields, "tool_calls": checked})


def _tool_call(where: str, call: Any) -> ToolCall:
    if not isinstance(call, ToolCall):
        raise WrongValue(f"the class {where} must be ToolCall: it is {shown(call)}")
    if not isinstance(call.arguments, Mapping):
        raise WrongValue(f"the arguments {where} must be a mapping, not {shown(call.arguments)}")
    try:
        arguments = json.loads(
            plain_text("their text", json.dumps(dict(call.arguments), allow_nan=False, ensure_ascii=False))
        )
    except Exception as error:
        raise WrongValue(f"the arguments {where} cannot be written as JSON: {said(error)}") from None
    return ToolCall(plain_text(f"the name {where}", call.name), arguments, plain_text(f"the id {where}", call.id))


def _rebuilt(kind: type[T], given: T, fields: Mapping[str, Any]) -> T:
    """With fields that are checked. A class of the user's own keeps what it adds."""
    if type(given) is kind:
        return kind(**fields)
    own = replace(given, **fields)  # type: ignore[type-var]
    pickle.dumps(own)
    return own


def plain_text(what: str, value: Any) -> str:
    """Text as a plain ``str`` that UTF-8 can hold: hashes, tokenizers and files need that."""
    if not isinstance(value, str):
        raise WrongValue(f"{what} must be a string, not {shown(value)}")
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WrongValue(
            f"{what} must be text that UTF-8 can hold; character {error.start} is {text[error.start]!a}"
        ) from None
    return text


def _text(name: str, value: Any) -> str:
    return plain_text(f"the environment's {name}", value)


def _sequence(name: str, value: Any, of: str) -> list | tuple:
    if not isinstance(value, list | tuple):  # a set has no order, and a string is a sequence of letters
        raise _wrong(name, value, f"a list or tuple of {of}")
    return value


def _commands(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    entries = _sequence(name, value, "strings, or None")
    return tuple(_text(f"{name}[{number}]", entry) for number, entry in enumerate(entries))


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    checked = []
    for number, message in enumerate(_sequence(name, value, "Message")):
        where = f"{name}[{number}]"
        if not isinstance(message, Message):
            raise _wrong(where, message, "a Message")
        role = _text(f"{where}.role", message.role)
        if role not in ("user", "tool"):  # others are the policy's, or nobody takes markup out of them
            raise _wrong(f"{where}.role", role, "user or tool")
        content, call = _text(f"{where}.content", message.content), _text(f"{where}.tool_call_id", message.tool_call_id)
        checked.append(Message(role, content, tool_call_id=call))
    return tuple(checked)


def _expert(name: str, value: Any) -> Action | None:
    if value is None:
        return None
    if isinstance(value, str):
        return Action(_text(name, value))
    if not isinstance(value, Action):
        raise _wrong(name, value, "a command, an Action or None")
    return checked_action(f"the environment's {name}", value)


def _reward(name: str, value: Any) -> float:
    return _bounded(f"the environment's {name}", value, MOST_REWARD)


def _bounded(what: str, value: Any, most: float) -> float:
    if not isinstance(value, Real | np.bool_):
        raise WrongValue(f"{what} must be a number, not {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    except Exception as error:
        raise WrongValue(f"{what} cannot be read: {said(error)}") from None
    if not abs(number) <= most:  # also not a number
        raise WrongValue(f"{what} must be finite and at most {most:g} in size, not {shown(number)}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _wrong(name, value, "True or False")
    return bool(value)


def _verdict(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool | np.bool_):
        raise _wrong(name, value, "True, False or None")
    return None if value is None else bool(value)


def _state_key(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _info(name: str, value: Any) -> dict[str, str | float | bool]:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a mapping")
    for field_name in _SAID_ELSEWHERE:
        if field_name in value:
            raise WrongValue(f"the environment's {name} cannot hold {field_name}: it is a field of the Turn")
    return plain_entries(f"the environment's {name}", value.items())


_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "text": _text,
    "goal": _text,
    "commands": _commands,
    "messages": _messages,
    "reward": _reward,
    "terminated": _flag,
    "truncated": _flag,
    "success": _verdict,
    "action_valid": _flag,
    "feedback": _text,
    "state_key": _state_key,
    "info": _info,
    "expert_action": _expert,
}


def plain_entries(what: str, entries: Iterable[tuple[Any, Any]]) -> dict[str, str | float | bool]:
    """Figures and labels by their names, as plain values; ``None`` says nothing."""
    first = list(itertools.islice(entries, MOST_ENTRIES + 1))
    if len(first) > MOST_ENTRIES:
        raise WrongValue(f"{what} may have {MOST_ENTRIES} entries, not more")
    plain: dict[str, str | float | bool] = {}
    for key, entry in first:
        name = plain_text(f"a name in {what}", key)
        # Lightning takes no metric of that name.
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or "dataloader_idx_" in name:
            raise WrongValue(f"a name in {what} must have 1 to {LONGEST_NAME} printable characters, not be {shown(name)}")
        where = f'{what}["{name}"]'
        if isinstance(entry, bool | np.bool_):
            plain[name] = bool(entry)
        elif isinstance(entry, str):
            label = plain[name] = plain_text(where, entry)
            if len(label) > LONGEST_LABEL:
                raise WrongValue(f"{where} must have at most {LONGEST_LABEL} characters, not {len(label)}")
        elif isinstance(entry, Real):
            plain[name] = _bounded(where, entry, MOST_FIGURE)
        elif entry is not None:
            raise WrongValue(f"{where} must be a number, True, False, a text or None, not {shown(entry)}")
    return plain


# ---- episodes of any source ----


def checked_episode(episode: Episode) -> Episode:
    """An episode whose rewards can be learned from, whose steps tell their place and agent, and whose metadata is plain.

    One that is wrong has failed, and has the steps before what is wrong.
    """
    steps: list[Step] = []
    metadata: Mapping[str, str | float | bool] = {}
    try:
        if episode.metadata:
            metadata = plain_entries("the episode's metadata", episode.metadata.items())
        for place, step in enumerate(episode.steps):
            where = f"of the episode's step {place}"
            if isinstance(step.index, bool) or not isinstance(step.index, Integral) or step.index != place:
                raise WrongValue(f"the index {where} must be its place, {place}, whoever acts, not {shown(step.index)}")
            # As much again may have come off for an action that was not valid.
            reward = _bounded(f"the reward {where}", step.reward, 2 * MOST_REWARD)
            agent = plain_text(f"the agent_id {where}", step.agent_id)
            said_beside = plain_entries(f"the metadata {where}", step.metadata.items()) if step.metadata else step.metadata
            is_plain = type(step.reward) is float and type(step.agent_id) is str and not step.metadata
            steps.append(step if is_plain else replace(step, reward=reward, agent_id=agent, metadata=said_beside))
        final = _bounded("the episode's final_reward", episode.final_reward, MOST_REWARD)
    except Exception as error:
        wrong: dict[str, Any] = {"stop_reason": StopReason.ENV_ERROR, "error": said(error)}
        known: dict[str, Any] = {"steps": tuple(steps), "final_reward": 0.0, "metadata": metadata}
        return replace(episode, **known, **({} if episode.stop_reason.failed else wrong))
    return replace(episode, steps=tuple(steps), final_reward=final, metadata=metadata)


# ---- words ----


def shown(value: Any) -> str:
    """A value in an error message: plain ones as they are, of others the class. Runs nothing of the value's own."""
    kind = type(value)
    if value is None or kind in (bool, float):
        return repr(value)
    if kind is str:
        return ascii(value if len(value) <= _LONGEST_QUOTE else value[:_LONGEST_QUOTE] + "...")
    if kind is int and abs(value) < 10**_LONGEST_QUOTE:
        return repr(value)
    return f"{'an' if kind.__name__[:1].lower() in 'aeiou' else 'a'} {kind.__name__}"


def _wrong(field: str, value: Any, wanted: str) -> WrongValue:
    return WrongValue(f"the environment's {field} must be {wanted}, not {shown(value)}")


@contextmanager
def _reading(field: str) -> Iterator[None]:
    """An object of the user's runs code of its own when it is read: what that raises names the field."""
    try:
        yield
    except WrongValue:
        raise
    except Exception as error:
        raise WrongValue(f"the environment's {field} cannot be read: {said(error)}") from None
