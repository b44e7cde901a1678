"""How much memory is free, asked before a large allocation instead of after it failed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from neuromanifold.errors import TooLargeError

__all__ = ["available", "parse", "readable", "require"]


_SMALL = 2**24
_UNITS = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}


def available(device: torch.device) -> int:
    """Free bytes on a device; on a CPU, within the limit of the control group if there is one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_free_host_memory(), _free_in_control_group())


def readable(num_bytes: float) -> str:
    """Bytes for people.

    Example:
        >>> readable(3 * 2**30)
        '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.1f} {unit}"


def parse(value: int | str) -> int:
    """Bytes as people write them: a number of bytes, or a number with a unit.

    Args:
        value: e.g. `2**30`, "512 MiB", "1.5 GB"; KiB is 1024 bytes, kB is 1000.

    Raises:
        ValueError: If it is no positive number of bytes.

    Example:
        >>> parse("2 GiB")
        2147483648
    """
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value, re.IGNORECASE)
        unit = _UNITS.get((found[2] or "b").lower()) if found else None
        num_bytes = round(float(found[1]) * unit) if found and unit else 0
    else:
        num_bytes = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if num_bytes < 1:
        raise ValueError(
            f'A size is a positive whole number of bytes, or a text such as "512 MiB" or '
            f'"1.5 GB"; got {value!r}.'
        )
    return num_bytes


def require(
    num_bytes: int, device: torch.device, *, what: str, instead: str | Callable[[], str]
) -> None:
    """Raise before an allocation that cannot fit.

    Args:
        num_bytes: of the allocation.
        device: where.
        what: would be allocated.
        instead: advice, or a function that takes its time to find some.

    Raises:
        TooLargeError: Names the bytes needed, the bytes free, and what would fit.
    """
    if num_bytes < _SMALL:  # asking the system takes longer than such a measurement
        return
    free = available(device)
    if num_bytes > free:
        raise TooLargeError(
            f"{what} needs {readable(num_bytes)}, but {readable(free)} are free on {device}. "
            f"{instead if isinstance(instead, str) else instead()}",
            bytes_needed=num_bytes,
            bytes_available=free,
        )


def _free_host_memory() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Without a kernel that says what is available, the whole memory is the only bound known.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_in_control_group() -> int:
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return 2**63
    used = int((group / "memory.current").read_text())
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    # Cached file pages count as used but are given back on demand.
    return int(limit.read_text()) - used + int(statistics.get("inactive_file", 0))
