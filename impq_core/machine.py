"""Memory and disk space that this machine and its devices have free."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")
"""The limits of a container, as Linux shows them inside."""


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> int | None:
    """Bytes of memory that a process can take without swapping, within the limit of its container; None if the system
    does not say.

    Args:
        meminfo: the file of Linux with the memory of the machine; macOS has ``vm_stat`` instead.
        cgroup: the folder of Linux with the limits of a container.
    """
    try:
        sizes = re.findall(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        free = 1024 * int(sizes[0])
    except (OSError, IndexError):
        return _from_vm_stat()
    try:  # pages of files in the container's memory can be taken back
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        rows = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        files = {name: int(size) for name, size in rows}.get("inactive_file", 0)
    except (OSError, ValueError):  # no container, or "max", which is no limit
        return free
    return max(0, min(free, limit - used + files))


def _from_vm_stat() -> int | None:
    try:
        return parse_vm_stat(subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return None


def parse_vm_stat(text: str) -> int | None:
    """Bytes of free, inactive and speculative pages in the output of macOS's ``vm_stat``; None if it is another
    text."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages: Mapping[str, str] = dict(re.findall(r"^Pages (\w+):\s+(\d+)\.", text, re.MULTILINE))
    if not size or "free" not in pages:
        return None
    return int(size[1]) * sum(int(pages.get(name, 0)) for name in ("free", "inactive", "speculative"))


def free_device_memory(device: torch.device) -> int | None:
    """Bytes of a device's memory that a process can take; of the processor, ``free_memory()``. None if the device does
    not say."""
    import torch

    if device.type == "cpu":
        return free_memory()
    if device.type == "mps":  # shares the memory of the machine, and has a limit of its own
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return int(ask(device)[0]) if ask else None


def free_disk(folder: Path) -> int:
    """Bytes free on the disk of a folder, which may not exist yet."""
    folder = folder.absolute()
    while not os.path.exists(folder):
        folder = folder.parent
    return shutil.disk_usage(folder).free
