"""Makes standard streams safe to print to: a terminal that lacks some characters, a pipe whose
reader has gone, or a closed stream."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# ASCII replacements for terminals and pipes in the C locale. Anything else becomes "?".
_PLAIN = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{PLUS-MINUS SIGN}": "+/-",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{DIVISION SIGN}": "/",
    "\N{RIGHTWARDS ARROW}": "->",
}


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in missing), error.end


codecs.register_error("tune_app.plain", _plain)


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Wraps a whole command, so that no unprintable character and no closed stream ends it.

    A reader that goes away (`| head`) has seen enough, so that is not reported.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the command
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="tune_app.plain")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        forget_output(1)


def forget_output(*numbers: int) -> None:
    """Discards whatever is written to these file descriptors from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(nowhere, number)
    os.close(nowhere)
