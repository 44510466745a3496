"""What CRIU's log means to a person. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

TAIL_LINES: Final = 20

#: What CRIU says -> what to say. The first that is found counts; ``{0}`` is the process's name in gpusched.
_MEANINGS: Final[Mapping[re.Pattern[str], Callable[[re.Match[str]], str]]] = {
    re.compile(r"send_fds? .*failed|send_fds failed \(-22\)|io_uring"): lambda _: (
        "{0} uses io_uring, which cannot be saved to disk; start it without "
        "(PyTorch's distributed store: UV_USE_IO_URING=0)"
    ),
    re.compile(r"Can't dump half of stream unix connection"): lambda _: (
        "{0} is connected to another program through a Unix socket; close that connection first"
    ),
    re.compile(r"Can't dump file (\d+) of that type \[\d+\] \(chr (\d+:\d+)"): lambda found: (
        f"{{0}} has device {found[2]} open (fd {found[1]}); if it is a GPU's, its state was not released"
    ),
    re.compile(r"Can't dump file (\d+) of that type \[\d+\] \((?!chr)([^)]*)"): lambda found: (
        f"{{0}} has an open {found[2].strip() or 'descriptor'} (fd {found[1]}) that cannot be saved"
    ),
    re.compile(r"doesn't live in IPC ns"): lambda _: (
        "{0} uses System V shared memory, which cannot be saved to disk"
    ),
    re.compile(r"[Uu]nable to detach|Unable to interrupt task|is being traced|Traced"): lambda _: (
        "{0} is traced by another program (a debugger, strace); end that first"
    ),
    re.compile(r"session leader .*outside|has no leader|leader of .* is outside"): lambda _: (
        "{0} belongs to a session that began outside of it"
    ),
    re.compile(r"File (\S+) has bad (?:size|mode|build-?id).*", re.IGNORECASE): lambda found: (
        f"{found[1]} was changed since {{0}} was saved"
    ),
    re.compile(r"Can't open file (\S+) on restore"): lambda found: (
        f"{found[1]}, which {{0}} had open when it was saved, cannot be opened any more"
    ),
    re.compile(r"Can't fork for (\d+): File exists"): lambda found: (
        f"pid {found[1]} is taken in the namespace that {{0}} was to come back in"
    ),
    re.compile(r"Can't bind .*[Aa]ddress already in use"): lambda _: (
        "{0} listens on an address that another process has taken meanwhile"
    ),
}
_FULL: Final = re.compile(r"No space left on device|Disk quota exceeded")
#: There on every run inside a namespace, and harmless.
_HARMLESS: Final = ("Can't setup RLIMIT_NOFILE",)


def explain(log: str, name: str, action: str) -> str:
    """One sentence. ``action``: "save" or "bring back"."""
    for pattern, meaning in _MEANINGS.items():
        if found := pattern.search(log):
            return meaning(found).format(name)
    errors = error_lines(log)
    reason = (
        re.sub(r"^\([\d.]+\)\s*(?:\d+:\s*)?(Error\s*)?(\([^)]*\):\s*)?", "", errors[0])
        if errors
        else ""
    )
    return f"CRIU could not {action} {name}: {reason or 'it did not say why'}"


def disk_is_full(log: str) -> bool:
    return _FULL.search(log) is not None


def error_lines(log: str) -> list[str]:
    """The lines that tell of errors, without those that always come."""
    return [
        line.strip()
        for line in log.splitlines()
        if "Error" in line and not any(text in line for text in _HARMLESS)
    ]


def tail(log: str) -> list[str]:
    """The last lines, for who wants to know more."""
    return [line[:300] for line in log.splitlines()[-TAIL_LINES:]]
