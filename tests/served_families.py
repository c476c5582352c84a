"""Real Petals servers of many small models, for tests and for the table of families.

    python -m tests.served_families '{"models": [...], "initial_peers": [...]}'

prints its addresses once all blocks can be called, and ends with its standard input. A server of
its own for each family would take minutes; here one server's container has the blocks of all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

# The ways that a model is served: whole, its two blocks on two servers, and whole in bfloat16.
KINDS = ("one", "chain", "half")


@dataclass(frozen=True)
class Served:
    """Blocks `first` to `end - 1` of the model in a folder, under a name of their own."""

    folder: str
    prefix: str
    first: int = 0
    end: int = 2
    dtype: str = "float32"


@contextmanager
def serving(models: Sequence[Served], initial_peers: Sequence[str] = ()) -> Iterator[list[str]]:
    """The addresses of a server process that has all of these."""
    told = {"models": [asdict(model) for model in models], "initial_peers": list(initial_peers)}
    command = [sys.executable, "-m", "tests.served_families", json.dumps(told)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        command,
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, with the server's further processes
    ) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def prefix(family: str, kind: str) -> str:
    return f"{kind}-{family}".replace(".", "-")


@contextmanager
def all_served(folders: Mapping[str, Path]) -> Iterator[list[str]]:
    """The addresses of two servers that serve each of the models in all KINDS."""
    named = [(family, str(folder)) for family, folder in folders.items()]
    first = [
        *(Served(folder, prefix(family, "one")) for family, folder in named),
        *(Served(folder, prefix(family, "chain"), 0, 1) for family, folder in named),
        *(Served(folder, prefix(family, "half"), dtype="bfloat16") for family, folder in named),
    ]
    second = [Served(folder, prefix(family, "chain"), 1, 2) for family, folder in named]
    with serving(first) as peers, serving(second, peers) as more:
        yield [*peers, *more]


@contextmanager
def clients(
    folders: Mapping[str, Path], peers: Sequence[str]
) -> Iterator[Callable[[str, str], Any]]:
    """A function (family, kind) -> SwarmBackbone. All share one node of the network, since starting
    one for each would take longer than everything else."""
    from hivemind import DHT

    from tune_app.backbones import swarm  # before hivemind, which it prepares

    dht = DHT(initial_peers=peers, client_mode=True, start=True)
    opened = []

    @cache
    def open_one(family: str, kind: str) -> Any:
        shared = partial(swarm.RemoteSequential, dht=dht)
        with mock.patch.object(swarm, "RemoteSequential", shared):
            opened.append(
                swarm.SwarmBackbone(
                    folders[family],
                    peers=peers,
                    dht_prefix=prefix(family, kind),
                    dtype="bfloat16" if kind == "half" else "float32",
                )
            )
        return opened[-1]

    try:
        yield open_one
    finally:
        for backbone in opened[1:]:
            backbone._manager.shutdown()
        if opened:
            opened[0].close()  # the node too


def main() -> None:
    import torch

    from tune_app.serve.server import make_server, petals_server

    told = json.loads(sys.argv[1])
    models = [Served(**model) for model in told["models"]]
    torch.set_num_threads(1)
    container = petals_server.ModuleContainer

    def collect(dht: Any, prefix: str, blocks: dict, **rest: Any) -> tuple[dict, dict]:
        return blocks, rest

    class Several:
        """In place of Petals' container: one for all models."""

        @staticmethod
        def create(**options: Any) -> Any:
            blocks: dict[str, Any] = {}
            for model in models:
                mine = {
                    "dht_prefix": model.prefix,
                    "converted_model_name_or_path": model.folder,
                    "block_config": petals_server.AutoDistributedConfig.from_pretrained(
                        model.folder
                    ),
                    "block_indices": range(model.first, model.end),
                    "torch_dtype": getattr(torch, model.dtype),
                    "server_info": replace(options["server_info"]),
                }
                loaded, rest = container.create.__func__(collect, **(options | mine))
                blocks |= loaded
                rest["dht_announcer"].announce(petals_server.ServerState.ONLINE)
            return container(options["dht"], models[0].prefix, blocks, **rest)

    petals_server.ModuleContainer = Several
    first = models[0]
    server = make_server(
        first.folder,
        range(first.first, first.end),
        dht_prefix=first.prefix,
        initial_peers=told["initial_peers"],
        host_maddrs=["/ip4/127.0.0.1/tcp/0"],
    )
    threading.Thread(target=_tell_when_ready, args=(server, models), daemon=True).start()
    server.run()


def _tell_when_ready(server: Any, models: list[Served]) -> None:
    from petals.data_structures import ServerState
    from petals.utils.dht import get_remote_module_infos

    while server.module_container is None or not server.module_container.ready.is_set():
        time.sleep(0.02)
    uids = [f"{model.prefix}.{i}" for model in models for i in range(model.first, model.end)]
    me, states = server.dht.peer_id, set()
    while states != {ServerState.ONLINE}:
        time.sleep(0.02)
        infos = get_remote_module_infos(server.dht, uids, latest=True)
        states = {info.servers[me].state if me in info.servers else None for info in infos}
    print(json.dumps([str(maddr) for maddr in server.dht.get_visible_maddrs()]), flush=True)


if __name__ == "__main__":
    main()
