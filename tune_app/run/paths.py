"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """The path with `~` replaced. The home of an unknown user stays as it is and is not found,
    where `Path.expanduser` raises RuntimeError."""
    return Path(os.path.expanduser(path))
