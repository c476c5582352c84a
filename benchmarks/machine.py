"""What the benchmark ran on, and how much memory a process and all below it take."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

_PACKAGES = ("torch", "transformers", "petals", "hivemind", "ray", "optuna")
_MEMORY_EVERY_S = 1.0


def describe() -> dict[str, str]:
    """The machine in words, for the head of the results."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": versions,
        "load before": f"{os.getloadavg()[0]:.1f} (1 minute; the figures want an idle machine)",
    }


def pss_mb(pid: int) -> float:
    """Proportional set size of a process and its descendants: shared pages are counted once.

    Linux only; a process that ends while it is looked at counts as nothing.
    """
    total_kb = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(OSError):
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total_kb += int(line.split()[1])
    return total_kb / 1024


@dataclass
class Peak:
    """The highest figure that was seen."""

    mb: float = 0.0


@contextmanager
def peak_pss(pid: int) -> Iterator[Peak]:
    """Watches a process tree's memory, once a second, in a thread of this process."""
    peak, over = Peak(), threading.Event()

    def watch() -> None:
        while not over.is_set():
            began = time.monotonic()
            peak.mb = max(peak.mb, pss_mb(pid))
            over.wait(max(0.0, _MEMORY_EVERY_S - (time.monotonic() - began)))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield peak
    finally:
        over.set()
        watching.join()
