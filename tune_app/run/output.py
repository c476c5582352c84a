"""What a command needs of its standard streams, wherever they lead: a terminal that has fewer
characters, a pipe that nobody reads any more, or nothing at all."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# In words of ASCII, for terminals and pipes in the C locale. Anything else becomes "?".
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
    """Around a command's whole work: no character, closed stream or reader that has left ends it.

    A reader that leaves (`| head`) has seen enough, so nothing is said about it.
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
    """From now on what is written to these file descriptors is lost; of a terminal that is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(nowhere, number)
    os.close(nowhere)
