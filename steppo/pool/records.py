"""An episode as plain data, and back bit for bit: JSON, and the bytes of its arrays. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from steppo.errors import RunError, said
from steppo.types import Episode, Step, StopReason

# Of a record. Raise it with each change of Episode and Step, and have ``decode`` read the older ones or refuse them.
SCHEMA = 1
ARRAYS = ("prompt_ids", "action_ids", "behaviour_logprobs", "final_prompt_ids")


def encode(episode: Episode) -> tuple[str, bytes]:
    """JSON, in which an array is its dtype, its first byte and its length, and the bytes of all arrays.

    Raises:
        RunError: There is something in it that is not plain.
    """
    data = bytearray()
    try:
        text = json.dumps({"schema": SCHEMA, **_plain(episode, data)}, default=np.generic.item)
    except (TypeError, ValueError) as error:
        raise RunError(f"episode {episode.id} cannot be stored: {said(error)}") from error
    return text, bytes(data)


def _plain(record: Episode | Step, data: bytearray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (field.name for field in fields(record)):
        value = getattr(record, name)
        if isinstance(value, np.ndarray):
            found[name] = [value.dtype.str, len(data), len(value)]
            data += value.tobytes()
        elif isinstance(value, Mapping):
            found[name] = dict(value)
        else:
            found[name] = [_plain(step, data) for step in value] if name == "steps" else value
    return found


def decode(text: str, data: bytes) -> Episode:
    """What ``encode`` was given.

    Raises:
        RunError: It is of another schema, or damaged.
    """
    try:
        record = json.loads(text)
        schema = record.pop("schema")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError("a record that does not say its schema") from None
    if schema != SCHEMA:
        raise RunError(f"a record of schema {schema}, and this steppo reads {SCHEMA}: take the one that wrote it")
    try:
        steps = tuple(Step(**_with_arrays(step, data)) for step in record.pop("steps"))
        reason = StopReason(record.pop("stop_reason"))
        return Episode(**_with_arrays(record, data), steps=steps, stop_reason=reason)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"a damaged record: {said(error)}") from error


def _with_arrays(record: dict[str, Any], data: bytes) -> dict[str, Any]:
    for name in ARRAYS:
        if record.get(name) is not None:
            dtype, first, count = record[name]
            size = count * np.dtype(dtype).itemsize
            part = data[first : first + size]
            if len(part) != size:
                raise ValueError(f"{name} is cut off")
            record[name] = np.frombuffer(bytearray(part), dtype)  # of its own, to be written to
    return record
