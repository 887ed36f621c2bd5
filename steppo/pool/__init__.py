"""Episodes on disk, between those who play and the one who learns (environments run in ``steppo.envs.pool``)."""

from steppo.pool.records import SCHEMA
from steppo.pool.store import DataPool, GroupInfo, PoolFull

__all__ = ["SCHEMA", "DataPool", "GroupInfo", "PoolFull"]
