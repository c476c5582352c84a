"""Passwords in URLs: what is printed, logged or shown has *** in their place."""

from __future__ import annotations

import re

# The password of scheme://user:password@host, and values of what an address asks to be let in with.
_PASSWORD = re.compile(
    r"""(?P<before>://[^\s/?\#:@'"]*:)[^\s/?\#@'"]+(?=@)"""
    r"""|(?P<asked>[?&][\w.-]*(?:password|passwd|token|secret|signature|api_?key)=)[^\s&\#'"]+""",
    re.IGNORECASE,
)


def without_passwords(text: str) -> str:
    """The text with *** for the passwords in its URLs."""
    return _PASSWORD.sub(lambda found: (found["before"] or found["asked"]) + "***", text)
