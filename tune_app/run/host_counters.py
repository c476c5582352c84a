"""What a trial host has computed so far, as the display, Prometheus and the report show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tune_app.run.typed import well_typed


@dataclass(frozen=True)
class HostCounters:
    """The counters of one trial host; all zero before its first pack.

    requests, retries: sent to the servers of a swarm, and sent again
    tokens: with prompts, without padding
    occupancy: rows in its packs divided by the rows that would have fitted
    rows_per_s, tokens_per_s: while at least one pack was being computed
    wait_s: wall time in which at least one pack was being computed
    servers, blocks_served, blocks: of the swarm, when the host last looked; None without one
    """

    host: str
    packs: int = 0
    requests: int = 0
    retries: int = 0
    rows: int = 0
    tokens: int = 0
    occupancy: float = 0.0
    rows_per_s: float = 0.0
    tokens_per_s: float = 0.0
    wait_s: float = 0.0
    servers: int | None = None
    blocks_served: int | None = None
    blocks: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HostCounters:
        """Of any version: unknown keys and values of other types count as missing."""
        known = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
        return cls(**{"host": "host"} | well_typed(cls, known))
