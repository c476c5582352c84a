"""Paths as users write them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# A Unix socket's path has 104 bytes at most (107 on Linux). Of these, what is put into the
# temporary folder takes up to 51: /tune_app-swarm-12345678/p2pclient-12345678901.sock
_LONGEST_FOLDER = 104 - 51


def user_path(path: str | Path) -> Path:
    """The path with `~` replaced. The home of an unknown user stays as it is and is not found,
    where `Path.expanduser` raises RuntimeError."""
    return Path(os.path.expanduser(path))


def socket_folder() -> str:
    """The folder for temporary files; /tmp if the usual one has too long a path for sockets."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _LONGEST_FOLDER else "/tmp"
