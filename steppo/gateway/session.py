"""What an agent has asked in one session: calls become steps, and steps chains."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from steppo.gateway.settings import MAIN
from steppo.gateway.wire import Answer, Call, Refused, Said
from steppo.types import Step


@dataclass(eq=False)
class Made:
    """A call under way or answered: who repeats it gets the same answer.

    Attributes:
        digest: Of its body.
        work: Answers it.
        stream: As events.
        with_usage: At their end, tokens are counted.
        waiting: How many connections wait for that.
    """

    digest: bytes
    work: asyncio.Task[Answer]
    stream: bool
    with_usage: bool
    waiting: int = 0


@dataclass(eq=False)
class Taken:
    """A step, and where it stands: ``round`` counts how often nobody was waiting before it was asked for."""

    step: Step
    chain: Chain
    place: int
    round: int


@dataclass(eq=False)
class Chain:
    """The calls of one agent, one after the other.

    Attributes:
        agent_id: Its name.
        name: As which it was asked for.
        kind: System message and tools of its first call.
        first: What stood behind the system message in its last call.
        said: The dialogue of its last call, with the answer.
        tools_key: The tools of that.
        last: The step that answered it.
        steps: How many it has.
        is_busy: A call is under way.
    """

    agent_id: str
    name: str
    kind: tuple[str, str]
    first: Said | None
    said: tuple[Said, ...] = ()
    tools_key: str = ""
    last: Step | None = None
    steps: int = 0
    is_busy: bool = False

    def is_continued_by(self, call: Call) -> bool:
        """Whether the call's dialogue is this one, with messages behind it that are not the assistant's."""
        count = len(self.said)
        new = call.messages[count:]
        same = self.last is not None and call.tools_key == self.tools_key and call.messages[:count] == self.said
        return same and bool(new) and all(said.role != "assistant" for said in new)


@dataclass(eq=False)
class Session:
    """An episode of an agent.

    Attributes:
        name: The episode's.
        seed: (agent_id, step in its chain) -> seed of the step.
        temperature: At which it is sampled.
        id: Its part of the address.
        key: What the agent shows.
        reward_key: What is shown to give a reward.
        reward: Of the whole, once it is given.
        success: Whether the task is solved, once that is told.
        is_rewarded: A reward was given, of the whole or of a step.
        is_closed: Nothing is answered any more.
        is_full: A call was refused because there had been ``max_steps``.
        overflowed: The last call was refused because its prompt was too long.
        refusal: The last one, in words.
        allowance: Calls that may be made at once, when the last one was made (``last_call``, in seconds).
    """

    name: str
    seed: Callable[[str, int], int]
    temperature: float
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    reward_key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    reward: float | None = None
    success: bool | None = None
    is_rewarded: bool = False
    is_closed: bool = False
    is_full: bool = False
    overflowed: bool = False
    refusal: str = ""
    chains: list[Chain] = field(default_factory=list)
    taken: dict[str, Taken] = field(default_factory=dict)  # by the answer's id
    made: dict[str, list[Made]] = field(default_factory=dict)  # by a request's id or its body
    answers: dict[Said, Step] = field(default_factory=dict)
    under_way: int = 0
    rounds: int = 0
    allowance: float = 0.0
    last_call: float = 0.0

    def chain_for(self, call: Call, name: str) -> Chain:
        """Whose call it is: of the chain that it continues or rewrites, or of a new one.

        A call rewrites the history of a chain of its name; without one, of a chain that has the same system message and
        tools, and the same first message or no other such chain beside it. What is asked while all these wait for an answer
        is a chain of its own.
        """
        head = [said for said in call.messages if said.role == "system"]
        kind = "\n".join(said.text for said in head), call.tools_key
        first = next((said for said in call.messages if said.role != "system"), None)
        known = [chain for chain in self.chains if chain.name == name]
        idle = [chain for chain in reversed(known) if not chain.is_busy]
        alike = [chain for chain in known if name or chain.kind == kind]
        same = [chain for chain in alike if name or chain.first == first] or (alike if len(alike) == 1 else [])
        for chain in idle:
            if chain.is_continued_by(call):
                return chain
        for chain in idle:
            if chain in same:
                return chain
        agent_id = name or (f"{MAIN}-{_digest(kind, first)}" if self.chains else MAIN)
        taken = {chain.agent_id for chain in self.chains}
        numbered = (f"{agent_id}#{number}" for number in itertools.count(2))
        agent_id = next(it for it in itertools.chain([agent_id], numbered) if it not in taken)
        chain = Chain(agent_id, name, kind, first)
        self.chains.append(chain)
        return chain

    def take(self, chain: Chain, call: Call, step: Step, answer: Answer, round: int) -> None:
        """Keeps a step and its answer."""
        self.taken[answer.id] = Taken(step, chain, chain.steps, round)
        self.answers[answer.said] = step
        chain.said, chain.tools_key, chain.last = (*call.messages, answer.said), call.tools_key, step
        chain.first = next((said for said in call.messages if said.role != "system"), None)
        chain.steps += 1

    def give(self, reward: float, success: bool | None, answer_id: str | None) -> None:
        """A reward: of the step with this answer, or of the whole. A later one takes its place."""
        if answer_id is None:
            self.reward = reward
            self.success = self.success if success is None else success
        elif (taken := self.taken.get(answer_id)) is None:
            raise Refused(404, f"this session has no completion {answer_id[:60]!a}", "not_found", "completion")
        else:
            taken.step = replace(taken.step, reward=reward)
        self.is_rewarded = True

    def steps(self, is_over: bool) -> tuple[Step, ...]:
        """The steps in their order: calls that were under way together by their place in their chains, not by arrival.

        Args:
            is_over: The task is: nothing follows the last step of a chain; else it was cut there.
        """
        in_order = sorted(self.taken.values(), key=lambda taken: (taken.round, taken.place, taken.chain.agent_id))
        steps = []
        for index, taken in enumerate(in_order):
            is_last = taken.place == taken.chain.steps - 1
            cut = is_last and not is_over and index == len(in_order) - 1
            steps.append(replace(taken.step, index=index, terminated=is_last and is_over, truncated=cut))
        return tuple(steps)


def _digest(kind: tuple[str, str], first: Said | None) -> str:
    return hashlib.blake2b(repr((kind, first)).encode(), digest_size=4).hexdigest()
