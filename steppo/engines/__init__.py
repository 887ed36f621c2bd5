"""Inference engines: requests in, sampled actions with their log-probabilities out."""

from steppo.engines.base import Engine
from steppo.engines.hf import HFEngine
from steppo.engines.scripted import ScriptedEngine, expert_action, random_action

__all__ = ["Engine", "HFEngine", "ScriptedEngine", "expert_action", "random_action"]
