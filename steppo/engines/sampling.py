"""How a token is drawn: by the inverse of the cumulative distribution, at a number of the request's own generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from steppo.types import Request

if TYPE_CHECKING:
    from steppo.models.policy import Policy


def draws(request: Request) -> np.ndarray:
    """A number in [0, 1) for each token that the request may get: no other request moves them."""
    return np.random.Generator(np.random.Philox(request.seed)).random(request.sampling.max_new_tokens)


def ended(policy: Policy, request: Request, action: Sequence[int]) -> str:
    """Why the answer so far is whole, as a ``finish_reason``; empty while it is not."""
    if action and action[-1] in policy.stop_ids:
        return "stop"
    stops = request.sampling.stop
    text = policy.tokenizer.decode(list(action), skip_special_tokens=False) if stops else ""
    if any(stop in text for stop in stops):
        return "text"
    return "length" if len(action) == request.sampling.max_new_tokens else ""


def sample(logits: Tensor, temperature: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row, and its log-probability in the tempered distribution.

    Args:
        logits: [rows, vocabulary].
        temperature: [rows]; 0 takes the most likely token, with its log-probability at temperature 1.
        drawn: float64 in [0, 1), [rows].
    """
    greedy = temperature == 0
    logits = logits / torch.where(greedy, torch.ones_like(temperature), temperature)[:, None]
    log_normaliser = torch.logsumexp(logits, dim=-1)
    cumulative = (logits - log_normaliser[:, None]).double().exp().cumsum(dim=-1)
    threshold = drawn * cumulative[:, -1]
    found = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    token = torch.where(greedy, logits.argmax(dim=-1), found)
    return token, logits.gather(1, token[:, None])[:, 0] - log_normaliser


def logprob_tolerance(policy: Policy) -> float:
    """How far log-probabilities may be off the learner's, which computes other shapes, in the precision of this thread."""
    exact = policy.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(policy.device.type)
    return 1e-4 if exact else 0.1
