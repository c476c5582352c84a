"""The command `python -m tune_app.serve`: serves a model's blocks until Ctrl-C."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Sequence

from tune_app.models.folder import model_folder
from tune_app.run.search_config import ConfigError
from tune_app.serve.checks import DTYPES
from tune_app.serve.serve_config import LOOPBACK, ServeConfig
from tune_app.serve.supervisor import PrivateSwarm, PrivateSwarmError, private_swarm

EXAMPLE = """\
One machine:
  python -m tune_app.serve ~/models/Llama-3.1-8B --servers 2

Several machines; on the first one, then on each other one:
  python -m tune_app.serve MODEL --listen 10.1.2.3:31337 --blocks 0:16 --identity server.key
  python -m tune_app.serve MODEL --listen 10.1.2.4:31337 --blocks 16:32 --identity server.key \\
      --join /ip4/10.1.2.3/tcp/31337/p2p/12D3KooW...
"""


def _address(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"\[?([\w.:]+?)\]?:(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"must be ADDRESS:PORT, such as 10.1.2.3:31337, got {text!r}"
        )
    return found.group(1), int(found.group(2))


def _blocks(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be FIRST:END, such as 0:16, got {text!r}")
    return int(found.group(1)), int(found.group(2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tune_app.serve",
        description="Serves a model's blocks with Petals servers until Ctrl-C.\n"
        "Without --listen they can be reached from this machine only.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="demo, a model's folder, or its name on a hub"
    )
    parser.add_argument(
        "--revision",
        metavar="REVISION",
        help="branch, tag or commit of a model on a hub (default: its main branch)",
    )
    parser.add_argument(
        "--servers",
        type=int,
        default=1,
        metavar="N",
        help="number of parts to divide the blocks into, each with its own server (default: 1)",
    )
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="servers for each part (default: 1)"
    )
    parser.add_argument(
        "--blocks",
        type=_blocks,
        metavar="FIRST:END",
        help="serve only these blocks, END not included; without it, all",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--listen",
        type=_address,
        metavar="ADDRESS:PORT",
        help="address and port at which other machines reach the first server; further servers "
        "take the next ports; 0.0.0.0 means every address of this machine",
    )
    where.add_argument(
        "--port",
        type=int,
        default=0,
        metavar="PORT",
        help=f"the first server's port on {LOOPBACK}; without it, free ports are chosen",
    )
    parser.add_argument(
        "--join",
        nargs="+",
        default=[],
        metavar="PEER",
        help="addresses of the swarm's other servers, as they print them; without it, a new swarm",
    )
    parser.add_argument(
        "--identity",
        metavar="FILE",
        help="file of the server's key, created if missing; keeps its address the same after a "
        "restart",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ...; without it, cuda if available, else cpu"
    )
    parser.add_argument(
        "--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: float32)"
    )
    parser.add_argument("--stock", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after Ctrl-C or SIGTERM, 1 if a server did not start, 2 for a user's mistake."""
    options = vars(_parser().parse_args(argv))
    name, revision = options.pop("model"), options.pop("revision")
    listen = options.pop("listen")
    if listen is not None:
        options["host"], options["port"] = listen
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        model = model_folder(name, revision)
        config = ServeConfig(model, name, **options)
        with private_swarm(config, progress=_say) as swarm:
            swarm.tell_changes(_say)
            _introduce(swarm, config, revision)
            signal.pause()
    except (ConfigError, PrivateSwarmError) as error:
        print(str(error).replace("--model", "MODEL"), file=sys.stderr)  # it has no flag here
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        pass
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _introduce(swarm: PrivateSwarm, config: ServeConfig, revision: str | None) -> None:
    model = shlex.quote(str(config.name))
    pinned = "" if revision is None else f" --revision {shlex.quote(revision)}"
    for server in swarm.servers:
        print(f"blocks {server.blocks}  {' '.join(server.maddrs)}")
    if swarm.blocks_missing:
        print("\nStart the servers of the other blocks with:\n")
        print(
            f"  python -m tune_app.serve {model}{pinned} --blocks FIRST:END "
            f"--listen ADDRESS:PORT --join {' '.join(swarm.peers)}"
        )
        print("\nThen start a search with:\n")
    else:
        print("\nStart a search in another terminal with:\n")
    print(
        f"  python -m tune_app.search --model {model}{pinned} "
        f"--request-tokens {config.max_batch_tokens // 2} --peers {' '.join(swarm.peers)}"
    )
    print("\nPress Ctrl-C to stop the servers.", flush=True)
