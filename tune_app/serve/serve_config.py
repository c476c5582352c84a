"""What the servers of one machine are started with: the arguments of `python -m tune_app.serve`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServeConfig:
    """One machine's part of a swarm; by default all of it, on this machine alone.

    model: folder of a causal language model in transformers' format
    name: the model's name on a hub, if the folder is a copy from there
    servers: parts that the blocks are divided into; each part is served `replicas` times
    blocks: the first, and the one after the last; None: all of them
    host: the address of this machine to listen on
    port: of the first server, the others take the next ports; 0: free ones
    announce_ports: ports that others are told instead (those of a relay), one for each server
    join: addresses of a swarm's other servers; empty: start a new swarm
    identity: file of the first server's key, created if missing, so that its address stays the
        same; the other servers' files have the suffixes `-1`, `-2` … None: new keys
    device: in torch's notation; None: cuda if available; several servers with "cuda" are spread
        over all GPUs
    threads: torch threads of each server; None: all processors, divided by the servers
    max_batch_tokens: rows times tokens (prompts included) allowed in a request; Petals' client
        would take the refusal of a larger one for a dead server and retry forever
    stock: compute as Petals' own server does, for comparisons
    """

    model: str | Path
    name: str | None = None
    servers: int = 1
    replicas: int = 1
    blocks: tuple[int, int] | None = None
    host: str = LOOPBACK
    port: int = 0
    announce_ports: Sequence[int] = ()
    join: Sequence[str] = ()
    identity: str | Path | None = None
    device: str | None = None
    dtype: str = "float32"
    threads: int | None = None
    max_batch_tokens: int = 8192
    stock: bool = False

    @property
    def count(self) -> int:
        """All servers, replicas included."""
        return self.servers * self.replicas

    @property
    def threads_each(self) -> int:
        return self.threads or max(1, (os.cpu_count() or 1) // self.count)

    def span(self, layers: int) -> tuple[int, int]:
        """The blocks to serve, of a model with `layers` of them: the first, and the one after the
        last."""
        return self.blocks or (0, layers)

    def spans(self, layers: int) -> Iterator[tuple[int, int]]:
        """The same for each server."""
        first, end = self.span(layers)
        edges = [first + i * (end - first) // self.servers for i in range(self.servers + 1)]
        for part in pairwise(edges):
            yield from [part] * self.replicas

    def listen(self, number: int) -> str:
        """Multiaddr at which this server listens."""
        return f"{self._address}/{self.port + number if self.port else 0}"

    def announce(self, number: int) -> str | None:
        """Multiaddr that others are told, if it is another one."""
        if not self.announce_ports:
            return None
        return f"{self._address}/{self.announce_ports[number]}"

    @property
    def _address(self) -> str:
        return f"/{'ip6' if ':' in self.host else 'ip4'}/{self.host}/tcp"
