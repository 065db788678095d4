"""What a process has held in memory."""

from __future__ import annotations

import re
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most bytes that this process has held. Linux only."""
    # Not getrusage's figure, which starts at what the parent held when it started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
