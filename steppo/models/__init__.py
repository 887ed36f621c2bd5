"""Policies and step critics."""

from steppo.models.critic import AdapterCritic, Critic, SeparateCritic, SharedCritic
from steppo.models.hf import HFPolicy
from steppo.models.policy import Policy
from steppo.models.tiny import TinyPolicy

__all__ = ["AdapterCritic", "Critic", "HFPolicy", "Policy", "SeparateCritic", "SharedCritic", "TinyPolicy"]
