"""Where the gateway listens, and what it counts. Free of the server's packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steppo.errors import require_at_least

MAIN = "agent"
COUNTS = ("gateway_calls", "gateway_refused", "gateway_retries", "gateway_cancelled", "gateway_overridden")


@dataclass(frozen=True)
class GatewaySettings:
    """Where the gateway listens, and its limits.

    Attributes:
        host: Address; loopback unless told otherwise.
        port: 0: any that is free.
        other_policy: What becomes of parameters that would make another policy (another temperature, top_p, penalties,
            n, response_format, a forced tool_choice ...): the call is refused, or they are overridden. Both are counted.
        update_wait_s: Seconds that a call waits while there is no engine, as weights are updated; then it gets 429.
        max_body_kib: Longest body of a request, in KiB.
        max_calls_per_s: Of a session, on average; twice as many at once.
        max_sessions: Open at the same time.
    """

    host: str = "127.0.0.1"
    port: int = 0
    other_policy: Literal["refuse", "override"] = "refuse"
    update_wait_s: float = 20.0
    max_body_kib: int = 4096
    max_calls_per_s: float = 100.0
    max_sessions: int = 1024

    def __post_init__(self) -> None:
        require_at_least(0, self, port=self.port, update_wait_s=self.update_wait_s)
        require_at_least(1, self, max_body_kib=self.max_body_kib, max_calls_per_s=self.max_calls_per_s)
        require_at_least(1, self, max_sessions=self.max_sessions)
