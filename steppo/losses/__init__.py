"""Objectives: policy losses by class path, and the functions that they and the value loss are made of."""

from steppo.losses.base import LossInputs, LossOutput, PolicyLoss
from steppo.losses.cispo import CISPO
from steppo.losses.clipped import ClippedLoss
from steppo.losses.dppo_tv import DPPOTV
from steppo.losses.functional import kl_penalty, log_ratios, step_means, token_weights, value_loss
from steppo.losses.nll import NLL
from steppo.losses.settings import ObjectiveSettings

__all__ = [
    "CISPO",
    "DPPOTV",
    "NLL",
    "ClippedLoss",
    "LossInputs",
    "LossOutput",
    "ObjectiveSettings",
    "PolicyLoss",
    "kl_penalty",
    "log_ratios",
    "step_means",
    "token_weights",
    "value_loss",
]
