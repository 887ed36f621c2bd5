"""Environments: ``reset(task)``, ``step(action)``. One file each."""

from steppo.envs.alfworld import AlfworldEnv
from steppo.envs.base import Env, TextGameEnv
from steppo.envs.gymnasium import GymnasiumEnv
from steppo.envs.multihop_qa import MultihopQAEnv
from steppo.envs.openenv import OpenEnvEnv
from steppo.envs.paper_search import PaperSearchEnv
from steppo.envs.textworld import TextWorldEnv
from steppo.envs.verifiers import VerifiersEnv
from steppo.envs.webshop import WebshopEnv

__all__ = [
    "AlfworldEnv",
    "Env",
    "GymnasiumEnv",
    "MultihopQAEnv",
    "OpenEnvEnv",
    "PaperSearchEnv",
    "TextGameEnv",
    "TextWorldEnv",
    "VerifiersEnv",
    "WebshopEnv",
]
