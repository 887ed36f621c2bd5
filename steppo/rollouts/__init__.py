"""Episodes: one coroutine each, played by a scheduler; the source that a config names."""

from steppo.rollouts.async_source import AsyncSettings, AsyncSource
from steppo.rollouts.base import EpisodeSource
from steppo.rollouts.env_source import EnvSource
from steppo.rollouts.fleet import Fleet
from steppo.rollouts.place import request_seed
from steppo.rollouts.players import (
    NoAction,
    Player,
    PolicyPlayer,
    ScriptedPlayer,
    WanderingPlayer,
    expert_action,
    random_action,
)
from steppo.rollouts.producer import LocalFleet
from steppo.rollouts.ray_fleet import RayFleet

__all__ = [
    "AsyncSettings",
    "AsyncSource",
    "EnvSource",
    "EpisodeSource",
    "Fleet",
    "LocalFleet",
    "NoAction",
    "Player",
    "PolicyPlayer",
    "RayFleet",
    "ScriptedPlayer",
    "WanderingPlayer",
    "expert_action",
    "random_action",
    "request_seed",
]
