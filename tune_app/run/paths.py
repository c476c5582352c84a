"""Paths as users write them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_LONGEST_SOCKET = 107  # bytes of a Unix socket's path
# What a swarm puts into the temporary folder: /tune_app-swarm-12345678/p2pclient-12345678901.sock
_OF_A_SWARM = 51


def user_path(path: str | Path) -> Path:
    """The path with `~` replaced. The home of an unknown user stays as it is and is not found,
    where `Path.expanduser` raises RuntimeError."""
    return Path(os.path.expanduser(path))


def socket_folder(added: int = _OF_A_SWARM) -> str:
    """The folder for temporary files; /tmp if the usual one has too long a path for sockets.

    added: bytes of a socket's path that follow
    """
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) + added <= _LONGEST_SOCKET else "/tmp"
