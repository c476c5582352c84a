"""Whether a run's Python space is code that this user has named before.

A run's files name the Python file or module of its space, and to resume the run is to execute it. A
run that somebody else began could name anything. So a run is signed with a key of this user; where
the signature is missing or another user's, the code has to be named on the command line.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from tune_app.run.paths import user_path
from tune_app.run.run_dir import RunDir

_SIGNATURE = "space.signature"


def code_named(space: str) -> str | None:
    """The code that a value of --space names, as a run records it: `module:function`, or an
    absolute `file.py:function`; None if it names no code."""
    head, _, function = space.partition(":")
    if not head.endswith(".py"):
        return space if function else None
    return f"{user_path(head).resolve()}:{function or 'space'}"


def sign(run: RunDir, code: str) -> None:
    """Remembers that this user has named the code for the run. Without a home that can be written
    to, it will have to be named again."""
    if (key := _key()) is not None:
        run.write_atomic(_SIGNATURE, _signature(key, code))


def is_own(run: RunDir, code: str) -> bool:
    key = _key()
    try:
        found = (run.path / _SIGNATURE).read_bytes()
    except OSError:
        return False
    return key is not None and hmac.compare_digest(found, _signature(key, code).encode())


def not_own(flag: str, code: str) -> str:
    """The message."""
    given = code.removesuffix(":space")
    return (
        f"{flag}: the run's space is Python code, {code}, which would be executed, and you have "
        f"not named it for this run on this machine before. If you trust it, add --space {given}."
    )


def _signature(key: bytes, code: str) -> str:
    return hmac.new(key, code.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    """This user's; made when it is first needed. None if there is no place for it."""
    try:
        home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        file = home / "tune_app" / "key"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            mine = file.with_name(f"key.{os.getpid()}")
            with os.fdopen(os.open(mine, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as made:
                made.write(secrets.token_bytes(32))
            try:
                os.link(mine, file)  # fails if another command has just made it
            except FileExistsError:
                pass
            finally:
                mine.unlink()
        return file.read_bytes()
    except (OSError, RuntimeError):
        return None
