"""A source that breaks while it plays, in a module that producers load quickly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from steppo.engines import HFEngine
from steppo.errors import ConfigError
from steppo.rendering import StateContext
from steppo.rollouts import EnvSource
from steppo.types import Episode, Group, RolloutConfig
from tests.toy_env import CorridorEnv


class BreakingSource(EnvSource):
    """A corridor. It breaks once two groups are played.

    Args:
        how: It may ``die``, ``hang``, ``crash`` or ``refuse``, but not twice; or ``always`` die, before it plays anything.
        mark: A file that says that it has happened.
    """

    def __init__(self, how: str, mark: Path) -> None:
        super().__init__(CorridorEnv(), StateContext(instructions=""), HFEngine(), max_prompt_tokens=400, max_new_tokens=4)
        self.how = how
        self.mark = mark

    def collect(self, groups: Sequence[Group], config: RolloutConfig, *args: Any) -> Iterator[list[Episode]]:
        if self.how == "always":
            os.kill(os.getpid(), signal.SIGKILL)
        for number, group in enumerate(super().collect(groups, config, *args)):
            if number == 2 and not self.mark.exists():
                self.mark.touch()
                if self.how == "refuse":
                    raise ConfigError("no more of this")
                if self.how == "crash":
                    raise MemoryError("no room")
                os.kill(os.getpid(), {"die": signal.SIGKILL, "hang": signal.SIGSTOP}[self.how])
            yield group
