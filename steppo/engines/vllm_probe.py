"""What a server is asked before and after each change of its weights, and what its answer says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from steppo.batch import Segment
from steppo.packing import PaddedPacker
from steppo.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from steppo.models.policy import Policy

# Three blocks of a cache, of which vLLM's largest have 128 tokens on a CPU, and some of a fourth.
_TOKENS = 400
# Not at temperature 1: log-probabilities from before the temperature would not be found out. Above it, rounding shows less.
_SAMPLING = Sampling(1.25, 16)


class Probe:
    """A prompt of several cache blocks. The log-probabilities of what is generated tell caches and layers with old weights.

    Args:
        policy: The learner's.
        longest: Most tokens of a prompt and its action.
    """

    def __init__(self, policy: Policy, longest: int) -> None:
        length = max(1, min(_TOKENS, longest - _SAMPLING.max_new_tokens))
        ids = np.random.default_rng(0).integers(0, policy.vocab_size, length).astype(np.int32)
        self.request = Request(-1, "probe", ids, _SAMPLING, 0)
        self._policy = policy

    @torch.no_grad()
    def fault(self, answer: Completion, tolerance: float) -> str:
        """What is wrong with an answer whose log-probabilities are more than that off the learner's, on average."""
        policy = self._policy
        [(_, batch)] = PaddedPacker().pack([Segment(self.request.prompt_ids, answer.action_ids)], 2**31)
        temperature_A = torch.full((len(answer.logprobs),), _SAMPLING.temperature, device=policy.device)
        ours_A = policy(batch.to(policy.device), temperature_A).logprobs_A.double().cpu().numpy()
        off_A = np.abs(answer.logprobs - ours_A)
        mean, worst = float(off_A.mean()), int(np.argmax(off_A))
        if mean <= tolerance:
            return ""
        return (
            f"gives log-probabilities that are {mean:.2g} off the learner's, on average of a probe, more than {tolerance:g} "
            f"(token {worst} of the probe: {answer.logprobs[worst]:.5f}, not {ours_A[worst]:.5f})"
        )
