"""Sizes, durations and ages as people write them. Sizes are powers of 1024."""

from __future__ import annotations

import re
from typing import Final

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
TIB: Final = 1024**4

_FACTOR: Final = {"": MIB, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)
_SECONDS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|)")


def parse_size(text: str) -> int:
    """``"80G"`` -> bytes. MiB where no letter stands. Raises ValueError with an example."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number with K, M, G or T, such as 80G")
    return int(float(match[1]) * _FACTOR[match[2].upper()])


def parse_duration(text: str) -> float:
    """``"10m"``, ``"1h30m"``, ``"250ms"`` or plain seconds -> seconds. Raises ValueError with an example."""
    parts = _DURATION.findall(text.strip())
    if not parts or "".join(n + u for n, u in parts) != text.strip():
        raise ValueError(f"{text!r} is not a duration; write for instance 30s, 10m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def mib(size_bytes: int) -> int:
    """Whole MiB, rounded to nearest; anything above zero is at least 1."""
    return max(1, round(size_bytes / MIB)) if size_bytes > 0 else 0


def format_size(size_bytes: int) -> str:
    """``"61.2 GiB"``, ``"512 MiB"``: for people."""
    if size_bytes >= TIB:
        return f"{size_bytes / TIB:.1f} TiB"
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:.1f} GiB"
    if size_bytes >= MIB or size_bytes == 0:
        return f"{size_bytes / MIB:.0f} MiB"
    return f"{size_bytes / KIB:.0f} KiB"


def format_age(seconds: float) -> str:
    """``"12s"``, ``"5m12s"``, ``"3h04m"``, ``"2d03h"``: the two largest units."""
    total = max(0, int(seconds))
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{secs:02d}s"
    return f"{secs}s"
