"""Credit assignment: one file per scheme."""

from steppo.advantages.base import Advantage, whiten
from steppo.advantages.step_gae import StepGAE
from steppo.advantages.token_gae import TokenGAE

__all__ = ["Advantage", "StepGAE", "TokenGAE", "whiten"]
