"""Where Ray may put what it needs, on machines where its own choice does not work."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

# Of a Unix socket's path, 107 bytes at most, Ray's own part takes up to 67:
# /ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store
_LONGEST_FOLDER = 107 - 67


def ways_round() -> dict[str, str]:
    """Environment variables for Ray; none where the usual places will do."""
    found = {}
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOLDER and "RAY_TMPDIR" not in os.environ:
        found["RAY_TMPDIR"] = "/tmp"
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ} and not _home_is_writable():
        token = Path(tempfile.mkdtemp(prefix="tune_app-token-")) / "auth_token"
        token.touch(mode=0o600)
        token.write_text(uuid.uuid4().hex)
        found["RAY_AUTH_TOKEN_PATH"] = str(token)
    return found


def _home_is_writable() -> bool:
    """Whether Ray can make, or read, its token below the home folder."""
    folder = Path("~/.ray").expanduser()
    if (folder / "auth_token").is_file():
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
