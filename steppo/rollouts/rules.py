"""What an episode is held to, and what is checked where a context or a parser hands something over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from steppo.envs.checks import checked_action, plain_text, shown
from steppo.errors import WrongValue
from steppo.rendering import ActionParser, ContextPolicy, ParsedAction
from steppo.types import Completion, Sampling, Step, Turn


@dataclass(frozen=True)
class Rules:
    """How a round of episodes is played: the settings of ``EnvSource``, by the same names.

    Attributes:
        task_limit: Steps that the task itself allows, if it has a limit.
        vocab_size: Token ids that the model knows, if there is a model.
    """

    context: ContextPolicy
    parser: ActionParser
    sampling: Sampling
    max_steps: int | None
    task_limit: int | None
    max_prompt_tokens: int
    invalid_penalty: float
    on_invalid: Literal["continue", "end"]
    vocab_size: int | None

    def prompt(self, turns: list[Turn], steps: list[Step]) -> np.ndarray:
        """Token ids of the next prompt. Of an empty one the value would be read at another row's position."""
        ids: Any = self.context.prompt_ids(turns, steps)
        call = f"{type(self.context).__name__}.prompt_ids"
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            given = f"shape {ids.shape} of {ids.dtype}" if isinstance(ids, np.ndarray) else shown(ids)
            raise WrongValue(f"{call} must give a one-dimensional array of integers, not {given}")
        if not ids.size:
            raise WrongValue(f"{call} gave an empty prompt")
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or (self.vocab_size is not None and highest >= self.vocab_size):
            wrong = lowest if lowest < 0 else highest
            raise WrongValue(f"{call} gave the token id {wrong}, which is none of the model's {self.vocab_size}")
        return ids.astype(np.int32, copy=False)

    def is_refused(self, completion: Completion, turn: Turn) -> bool:
        """Whether nothing can be made of an answer."""
        try:
            return self.parsed(self.context.renderer.decode_action(completion.action_ids), turn).action is None
        except Exception:  # it is read once more, and raises there: that is not the engine's fault
            return False

    def parsed(self, text: str, turn: Turn) -> ParsedAction:
        """The action of an answer, or why there is none."""
        parsed: Any = self.parser.parse(text, turn)
        call = f"{type(self.parser).__name__}.parse"
        if not isinstance(parsed, ParsedAction):
            raise WrongValue(f"{call} must give a ParsedAction, not {shown(parsed)}")
        action = None if parsed.action is None else checked_action(call, parsed.action)
        return ParsedAction(action, plain_text(f"the feedback of {call}", parsed.feedback))

    def answered(self, turn: Turn, before: Turn | None = None) -> Turn:
        """What the environment says: a goal said once stays, and its feedback may not show a call as a parser's may."""
        goal = turn.goal or (before.goal if before else "")
        feedback = self.context.renderer.without_answers(turn.feedback)
        return turn if (goal, feedback) == (turn.goal, turn.feedback) else replace(turn, goal=goal, feedback=feedback)

    def judged(self, turn: Turn, number: int) -> Turn:
        """What the ``number``-th step (from 1) brought: less for an invalid action, and the end at the task's limit."""
        if not turn.action_valid:
            ends = turn.terminated or self.on_invalid == "end"
            turn = replace(turn, reward=turn.reward - self.invalid_penalty, terminated=ends)
        return replace(turn, terminated=True) if number == self.task_limit else turn
