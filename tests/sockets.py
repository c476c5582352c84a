"""Every socket that a command and all of its processes open, seen from two sides.

In each Python process an audit hook writes down what is bound, connected, sent to or looked up, so
that nothing is too short to be seen. For programs that are not Python (Ray's, hivemind's p2pd) the
kernel is asked twice a second.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import psutil

_LOOK_S = 0.5
_LOG = "TUNE_APP_TEST_SOCKETS"
# Imported by every Python process that has its folder on PYTHONPATH.
_HOOK = f"""
import json, os, sys

def _hook(event, args):
    if event[:7] != "socket.":  # most are not, and each import has dozens
        return
    if event in ("socket.bind", "socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = args
    else:
        return
    if isinstance(address, tuple) and address[0]:  # not of a Unix socket
        line = json.dumps([event, str(address[0]), sys.argv[0] if hasattr(sys, "argv") else ""])
        log = os.open(os.environ["{_LOG}"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, line.encode() + b"\\n")
        os.close(log)

sys.addaudithook(_hook)
"""


@dataclass
class Sockets:
    """environment: of the command that is to be watched
    kernel: (address, what has it there: a program's name, and for a connection its port)
    """

    log: Path
    environment: dict[str, str]
    kernel: set[tuple[str, str]] = field(default_factory=set)
    seen_of: set[str] = field(default_factory=set)  # names of programs with a socket

    def asked(self) -> list[list[str]]:
        """[event, host, program] of all that Python code has asked for."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def outward(self) -> set[tuple[str, str]]:
        """(host, by whom) of all that is not on this machine's loopback."""
        found = {(host, f"{event} in {program}") for event, host, program in self.asked()}
        return {(host, by) for host, by in found | self.kernel if not _is_loopback(host)}

    @contextmanager
    def of(self, pid: int) -> Iterator[None]:
        """Watches a process and all that come of it."""
        over, seen = threading.Event(), {psutil.Process(pid)}

        def watch() -> None:
            while not over.wait(_LOOK_S):
                with suppress(psutil.Error):
                    self._look(seen)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _look(self, seen: set[psutil.Process]) -> None:
        family = {process.pid for process in seen if process.is_running()}
        parents = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                parents[process] = process.ppid()
        while born := {process for process, of in parents.items() if of in family} - seen:
            seen |= born
            family |= {process.pid for process in born}
        names = {}
        for process in seen:
            with suppress(psutil.Error):
                names[process.pid] = process.name()
        for socket in psutil.net_connections("inet"):
            if socket.pid not in names:
                continue
            self.seen_of.add(names[socket.pid])
            for end in (socket.laddr, socket.raddr):
                if end:
                    self.kernel.add((end.ip, names[socket.pid]))


def watched_sockets(folder: Path) -> Sockets:
    """`folder`: a new one, for the hook and what it writes."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_HOOK)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    log = folder / "asked.jsonl"
    return Sockets(log, {**os.environ, "PYTHONPATH": path, _LOG: str(log)})


def _is_loopback(host: str) -> bool:
    if host in ("localhost", ""):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False  # a name that was looked up
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
