"""Where Ray may put what it needs, on machines where its own choice does not work."""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from tune_app.run.paths import socket_folder

# What Ray puts there: /ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store
_OF_RAY = 67


def ways_round() -> dict[str, str]:
    """Environment variables for Ray; none where the usual places will do."""
    found = {}
    usual = tempfile.gettempdir()
    if (folder := socket_folder()) != usual:
        found["TMPDIR"] = folder
    if (folder := socket_folder(_OF_RAY)) != usual and "RAY_TMPDIR" not in os.environ:
        found["RAY_TMPDIR"] = folder
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        try:
            _make_token(Path("~/.ray").expanduser())
        except OSError:
            token = _make_token(Path(tempfile.mkdtemp(prefix="tune_app-token-")))
            found["RAY_AUTH_TOKEN_PATH"] = str(token)
    return found


def _make_token(folder: Path) -> Path:
    """The token that Ray's processes show each other, made if there is none.

    Ray would make it too, but not in one step: of two searches that start at once in a new home,
    the second would replace the token that the first one's processes have read.

    Raises:
        OSError: the folder can be neither read nor written
    """
    token = folder / "auth_token"
    if token.is_file():
        return token
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder) as whole:  # only its owner may read it
        whole.write(secrets.token_hex(32))
        whole.flush()
        with suppress(FileExistsError):  # another search was faster
            os.link(whole.name, token)
    return token
