"""In-process generation with the learner's own weights, without synchronisation. Each token is read once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from steppo.engines.base import Engine, failed
from steppo.engines.cache import Place, RowCache, common
from steppo.engines.packed import PackedLinears
from steppo.engines.sampling import draws, ended, logprob_tolerance, sample
from steppo.errors import ConfigError, require_at_least
from steppo.models.policy import beyond_full_attention
from steppo.packing.padded import by_width
from steppo.types import Completion, Request

if TYPE_CHECKING:
    from steppo.models.policy import Policy

_MAX_TOKENS = 4096  # of a pass, padding included: more is not faster by the token
_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(eq=False)
class _Row:
    """A row of the cache: whose it is, how many tokens that needs, when it was asked last, and what it is asked now."""

    number: int
    session_id: str | None = None
    need: int = 0
    asked: int = 0
    flight: _Flight | None = None


@dataclass(eq=False)
class _Flight:
    """A request that is being answered: ``todo`` is to be read before its next token is drawn."""

    request: Request
    row: _Row
    todo: np.ndarray
    drawn: np.ndarray
    action: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: Exception | None = None


class HFEngine(Engine):
    """Samples from a transformers model, one token of each request a tick, and keeps keys and values between requests.

    What a prompt has in common with its session's last one, or with any other session's, is not read again: a dialogue goes
    on where it stopped, siblings share their first prompt, all share their instructions, as long as one session is there.
    New weights empty the cache. In float32 on a CPU it holds large layers' weights a second time, in another layout.

    Each request draws its random numbers from a generator of its own, so its answer does not depend on what else is in the
    batch. Log-probabilities are those of the tempered distribution, as the learner recomputes them.

    Layers must attend to all that came before (full attention, by ``sdpa`` or ``eager``); ``PlainEngine`` takes any model.

    Args:
        max_batch_size: Most requests that are answered at the same time; others wait.
        cache_tokens: Room of the cache. Sessions that do not fit are forgotten, the one that was asked longest ago first,
            and their next prompt is read as a whole. It should hold the longest prompt as often as there are slots.

    Attributes:
        tokens_read: How many the model has read so far, padding left out.
    """

    join_share = 0.75  # each time others join costs a pass, and a wait for the slowest of their environments

    _policy: Policy  # from ``bind``

    def __init__(self, max_batch_size: int = 64, cache_tokens: int = 2**16) -> None:
        require_at_least(1, self, max_batch_size=max_batch_size, cache_tokens=cache_tokens)
        self.max_batch_size = max_batch_size
        self.cache_tokens = cache_tokens
        self.tokens_read = 0
        self._asked = 0
        self._queue: list[Request] = []
        self._rows: list[_Row] = []
        self._cache = RowCache()
        self._pass_tokens = self._worth = 1
        self._linears: PackedLinears | None = None  # while there are keys
        self._parameters: list[Tensor] = []
        self._seen = 0

    def bind(self, policy: Policy) -> None:
        odd = beyond_full_attention(policy.trunk)
        if odd:
            raise ConfigError(
                f"HFEngine keeps keys and values of full attention by sdpa or eager; {policy.model.config.model_type} has "
                f"{', '.join(sorted(odd))}: set data.source.engine to PlainEngine"
            )
        self._policy = policy
        self._forget()

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def release(self, session_id: str) -> None:
        self._queue = [request for request in self._queue if request.session_id != session_id]
        for row in self._rows:
            if row.session_id == session_id:
                row.session_id = row.flight = None
        if all(row.session_id is None for row in self._rows):
            self._forget()  # between rollouts nothing is held

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._forget()

    def close(self) -> None:
        self._queue = []
        self._forget()

    def _forget(self) -> None:
        """Empties the cache. Answers under way go on from what they have so far."""
        self._linears = None
        self._cache.drop()
        for row in self._rows:
            if row.flight is None:
                row.session_id = None
            else:
                so_far = np.asarray(row.flight.action, dtype=np.int32)
                row.flight.todo = np.concatenate([row.flight.request.prompt_ids, so_far])
        if not self._flights():
            self._resize([], 0, 0)

    @torch.no_grad()
    def poll(self) -> list[Completion]:
        self.logprob_tolerance = logprob_tolerance(self._policy)
        completions = self._begin()
        if self._flights():
            self._tick()
        for flight in self._flights():
            request = flight.request
            reason = ended(self._policy, request, flight.action)
            if flight.error is not None:
                completions.append(failed(request, flight.error))
            elif reason:
                action, logprobs = np.asarray(flight.action, np.int32), np.asarray(flight.logprobs, np.float32)
                completions.append(Completion(request.id, action, logprobs, reason))
            else:
                continue
            flight.row.flight = None
        return completions

    def _flights(self) -> list[_Flight]:
        return [row.flight for row in self._rows if row.flight is not None]

    def _fail(self, flights: Sequence[_Flight], error: Exception) -> None:
        for flight in flights:
            flight.error = error
            flight.row.session_id = None

    # ---- rows ----

    def _begin(self) -> list[Completion]:
        """Gives rows to those in the queue that there is room for. Those that memory does not suffice for are done."""
        completions = []
        if self._rows and self._queue and self._versions() != self._seen:
            self._forget()  # an optimizer was here, and nobody called `load_weights`
        if not self._rows:  # not before: the policy may have moved to another device
            self._parameters = list(self._policy.parameters())
            self._pass_tokens = _pass_tokens(self._policy)
            self._worth = max(1, self._pass_tokens // 8)  # tokens that take longer to read than to copy
        self._seen = self._versions()
        under_way = len(self._flights())
        while self._queue and under_way < self.max_batch_size:
            request = self._queue[0]
            try:
                row = self._row_for(request)
                if row is None:
                    break
                self._start(request, row)
                under_way += 1
            except _MEMORY as error:
                completions.append(failed(request, error))
                self._forget()  # half of the cache may have grown
            del self._queue[0]
        return completions

    def _versions(self) -> int:
        """Grows with each change in place of a weight."""
        return sum(parameter._version for parameter in self._parameters)

    def _row_for(self, request: Request) -> _Row | None:
        """Its session's row, or one that is free or can be made so; none as long as others must end first."""
        need = len(request.prompt_ids) + request.sampling.max_new_tokens
        own = next((row for row in self._rows if row.session_id == request.session_id and row.flight is None), None)
        busy = [row for row in self._rows if row.flight is not None]
        if busy and (len(busy) + 1) * max(need, *(row.need for row in busy)) > self.cache_tokens:
            return None
        idle = [row for row in self._rows if row.session_id is not None and row.flight is None and row is not own]
        idle.sort(key=lambda row: row.asked)
        while True:
            count, longest = len(busy) + 1 + len(idle), max(need, *(row.need for row in busy + idle), 0)
            if not idle or count * longest <= self.cache_tokens:
                break
            idle.pop(0).session_id = None
        self._fit(count, longest)
        row = own or next(row for row in self._rows if row.session_id is None and row.flight is None)
        row.session_id, row.need, self._asked = request.session_id, need, self._asked + 1
        row.asked = self._asked
        return row

    def _fit(self, count: int, longest: int) -> None:
        """Makes the cache hold so many rows of so many tokens; what grows is at least doubled, if there is room."""
        rows, columns = self._cache.rows, self._cache.columns
        room = max(self.cache_tokens, count * longest)
        if count <= rows and longest <= columns and rows * columns <= room:
            return
        rows = rows if count <= rows else max(count, 2 * rows)
        columns = columns if longest <= columns else max(longest, 2 * columns)
        columns = max(longest, min(columns, room // count))
        rows = min(rows, room // columns)
        self._resize([row for row in self._rows if row.session_id is not None], rows, columns)

    def _resize(self, kept: list[_Row], rows: int, columns: int) -> None:
        try:
            self._cache.reshape([row.number for row in kept], rows, columns)
        except BaseException:  # no room: some layers have their new size, others the old one
            self._forget()
            raise
        self._rows = kept + [_Row(0) for _ in range(rows - len(kept))]
        for number, row in enumerate(self._rows):
            row.number = number

    def _start(self, request: Request, row: _Row) -> None:
        """Keeps what the prompt has in common with its row, or with the row that has most."""
        prompt, cache = request.prompt_ids, self._cache
        start = cache.common(row.number, prompt[:-1])  # the last one is read in any case: it tells the next
        cache.held[row.number] = start
        source, alike = cache.likest(prompt[:-1], start + self._worth - 1)
        if alike >= start + self._worth:
            cache.copy(source, [row.number], start, alike)
            start = alike
        row.flight = _Flight(request, row, prompt[start:], draws(request))

    # ---- a tick ----

    def _tick(self) -> None:
        """A token more of each."""
        if self._linears is None:
            self._linears = PackedLinears(self._policy.model)
        with self._linears.in_use():
            read = self._read()
            if read:
                try:
                    self._sample([flight for flight, _ in read], torch.stack([state for _, state in read]))
                except _MEMORY as error:
                    self._fail([flight for flight, _ in read], error)

    def _read(self) -> list[tuple[_Flight, Tensor]]:
        """Reads what is to be read; gives the last token's state [H] of each request."""
        found = []
        waiting = self._flights()
        while waiting:
            followers = self._followers(waiting)
            first = [flight for flight in waiting if flight in followers] or waiting
            for chosen in by_width(_widths(first), _MAX_TOKENS, max_padding=self._pass_tokens):
                batch = [first[number] for number in chosen]
                try:
                    found += list(zip(batch, self._pass(batch), strict=True))
                except _MEMORY as error:
                    self._fail(batch, error)
            for leader, alike in followers.items():
                if leader.error is None:
                    self._hand_on(leader, alike)
            over = set(first)
            waiting = [flight for flight in waiting if flight not in over]
        return found

    def _followers(self, waiting: Sequence[_Flight]) -> dict[_Flight, list[tuple[_Flight, int]]]:
        """Who is to wait for whom, as both begin with so many tokens that none has read; nobody if it does not pay."""
        new = [flight for flight in waiting if len(flight.todo) > self._worth]
        new.sort(key=lambda flight: flight.request.prompt_ids.tobytes())  # those that begin alike are neighbours
        followers: dict[_Flight, list[tuple[_Flight, int]]] = {}
        leader, saved = None, 0
        for flight in new:
            prompt, start = flight.request.prompt_ids, int(self._cache.held[flight.row.number])
            alike = common(leader.request.prompt_ids, prompt[:-1]) if leader is not None else 0
            if leader is None or alike < start + self._worth:
                leader = flight
                continue
            followers.setdefault(leader, []).append((flight, alike))
            saved += alike - start
        return followers if saved > self._pass_tokens else {}

    def _hand_on(self, leader: _Flight, followers: Sequence[tuple[_Flight, int]]) -> None:
        """What they begin with alike, from a row that holds it."""
        held = self._cache.held
        for alike in sorted({alike for _, alike in followers}):
            those = [flight for flight, tokens in followers if tokens == alike]
            for flight in those:
                flight.todo = flight.todo[alike - held[flight.row.number] :]
            rows = [flight.row.number for flight in those]
            self._cache.copy(leader.row.number, rows, int(held[rows].min()), alike)

    def _pass(self, flights: Sequence[_Flight]) -> list[Tensor]:
        """A forward pass over what these are to read; the last token's state [H] of each."""
        policy, cache = self._policy, self._cache
        todo = {flight.row.number: flight.todo for flight in flights}
        rows = np.asarray(sorted(todo))
        width = max(len(tokens) for tokens in todo.values())
        is_new = not cache.held[rows].any()
        columns = None if is_new else max(int(cache.held[row]) + len(tokens) for row, tokens in todo.items())
        is_span = rows[-1] + 1 - rows[0] == len(rows)
        if width == 1 and not is_span and rows[-1] + 1 - rows[0] <= 2 * len(rows):
            # Rows between these join in for nothing, which costs less than to copy all of these together.
            rows, is_span = np.arange(rows[0], rows[-1] + 1), True
        ids, counts = np.zeros((len(rows), width), dtype=np.int64), np.ones(len(rows), dtype=np.int64)
        for place, row in enumerate(rows):
            if row in todo:
                counts[place] = len(todo[row])
                ids[place, : counts[place]] = todo[row]
        is_kept = np.arange(width) < counts[:, None]
        positions = cache.held[rows][:, None] + np.minimum(np.arange(width), counts[:, None] - 1)

        def on_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(policy.device)

        cache.place = Place(
            rows=slice(int(rows[0]), int(rows[-1]) + 1) if is_span else on_device(rows),
            tokens=None if is_kept.all() else on_device(np.flatnonzero(is_kept)),
            cells=(on_device(np.repeat(rows, is_kept.sum(axis=1))), on_device(positions[is_kept])),
            columns=columns,
        )
        position = on_device(positions)
        with _unrepeated(width > 1 and policy.device.type == "cpu"):
            output = policy.trunk(
                input_ids=on_device(ids),
                attention_mask=None if columns is None else self._mask(position, columns),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
        states = output.last_hidden_state
        for flight in flights:
            cache.read(flight.row.number, flight.todo)
        self.tokens_read += sum(len(tokens) for tokens in todo.values())
        places = np.searchsorted(rows, [flight.row.number for flight in flights])
        return list(states[on_device(places), on_device(counts[places] - 1)])

    def _mask(self, position: Tensor, columns: int) -> Tensor:
        """What is to be added to attention scores: a token sees the columns up to its own, [rows, 1, tokens, columns]."""
        kind = position.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._policy.dtype
        ahead = torch.arange(columns, device=position.device) > position[:, None, :, None]
        return torch.zeros(ahead.shape, dtype=dtype, device=position.device).masked_fill_(ahead, -torch.inf)

    def _sample(self, flights: Sequence[_Flight], states: Tensor) -> None:
        """Draws by the states of their last tokens."""
        device = states.device
        temperature = torch.tensor([flight.request.sampling.temperature for flight in flights], device=device)
        drawn = torch.tensor([flight.drawn[len(flight.action)] for flight in flights], dtype=torch.float64, device=device)
        tokens, logprobs = sample(self._policy.logits(states), temperature, drawn)
        for flight, token, logprob in zip(flights, tokens.tolist(), logprobs.tolist(), strict=True):
            flight.action.append(token)
            flight.logprobs.append(logprob)
            flight.todo = np.asarray([token], dtype=np.int32)


@contextmanager
def _unrepeated(wanted: bool) -> Iterator[None]:
    """Has ``sdpa`` read keys that several heads share where they lie.

    Under a mask transformers copies them for each head, unless this variable says that the kernel needs no copies. The CPU's
    does not (a prefill takes a fifth less); for single tokens transformers has a way that is faster still.
    """
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    if not wanted or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _widths(flights: Sequence[_Flight]) -> np.ndarray:
    return np.asarray([len(flight.todo) for flight in flights])


def _pass_tokens(policy: Policy) -> int:
    """How many tokens take as long as a pass does beside its tokens (``benchmarks/rollout.py`` measures it).

    On a CPU weights must come from memory, which takes as long as computing with some 30 tokens; what else a layer costs is
    the same for layers of any size. On a GPU that is all that counts: its kernels are launched one by one.
    """
    layers = int(policy.text_config.num_hidden_layers)
    weights = sum(parameter.numel() for parameter in policy.trunk.parameters())
    if policy.device.type != "cpu":
        return 80_000_000_000 * layers // weights
    return min(256, 30 + 20_000_000 * layers // weights)
