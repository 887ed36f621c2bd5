"""Inference engines: requests in, sampled actions with their log-probabilities out."""

from steppo.engines.base import Engine
from steppo.engines.hf import HFEngine
from steppo.engines.plain import PlainEngine
from steppo.engines.thread import EngineThread
from steppo.engines.vllm import VLLMEngine

__all__ = ["Engine", "EngineThread", "HFEngine", "PlainEngine", "VLLMEngine"]
