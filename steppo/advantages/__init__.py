"""Credit assignment: one file per scheme."""

from steppo.advantages.base import Advantage, whiten
from steppo.advantages.gigpo import GiGPO
from steppo.advantages.grpo import GRPO
from steppo.advantages.reinforce_pp import ReinforcePP
from steppo.advantages.reinforce_pp_baseline import ReinforcePPBaseline
from steppo.advantages.rloo import RLOO
from steppo.advantages.step_gae import StepGAE
from steppo.advantages.token_gae import TokenGAE

__all__ = ["GRPO", "RLOO", "Advantage", "GiGPO", "ReinforcePP", "ReinforcePPBaseline", "StepGAE", "TokenGAE", "whiten"]
