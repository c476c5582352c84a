"""Passwords in URLs: what is printed, logged or shown has *** in their place."""

from __future__ import annotations

import re

# The password of scheme://user:password@host, and values of what an address asks to be let in with.
# Two patterns, since each begins with what is rare: a page of two million characters takes 10 ms.
_PASSWORD = re.compile(r"""(://[^\s/?\#:@'"]*:)[^\s/?\#@'"]+(?=@)""")
_ASKED = re.compile(
    r"""([?&][\w.-]*(?:password|passwd|token|secret|signature|api_?key)=)[^\s&\#'"]+""",
    re.IGNORECASE,
)


def without_passwords(text: str) -> str:
    """The text with *** for the passwords in its URLs."""
    return _ASKED.sub(r"\1***", _PASSWORD.sub(r"\1***", text))
