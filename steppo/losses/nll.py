"""Maximum likelihood."""

from __future__ import annotations

import torch

from steppo.losses.base import LossInputs, LossOutput, PolicyLoss


class NLL(PolicyLoss):
    """``-log pi(a)``: makes what was done more likely, whoever did it and whatever came of it.

    The loss of supervised fine-tuning (behaviour cloning). Advantages and other policies do not enter.
    """

    def __call__(self, inputs: LossInputs) -> LossOutput:
        ones_A = torch.ones_like(inputs.logprobs_A.detach())
        return LossOutput(-inputs.logprobs_A, ones_A, torch.zeros_like(ones_A).bool())
