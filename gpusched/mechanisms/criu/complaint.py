"""What CRIU's log means to a person. Pure.

Only its error lines are read for a meaning: the others name files and programs, which are called what users like.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

TAIL_LINES: Final = 20

Meaning = Callable[[re.Match[str], str], str]
#: What CRIU says -> what to say of the process called NAME. The first that is found counts.
_MEANINGS: Final[Mapping[str, Meaning]] = {
    r"send_fds failed \(-22\)": lambda _, name: (
        f"{name} uses io_uring, which cannot be saved to disk; start it without "
        "(PyTorch's distributed store: UV_USE_IO_URING=0)"
    ),
    r"Can't dump half of stream unix connection|External socket is used": lambda _, name: (
        f"{name} is connected to another program through a Unix socket; close that connection first"
    ),
    r"Can't dump file (\d+) of that type \[\d+\] \(chr (\d+:\d+)": lambda found, name: (
        f"{name} has device {found[2]} open (fd {found[1]}); if it is a GPU's, its state was not released"
    ),
    r"Can't dump file (\d+) of that type \[\d+\] \((?:anon )?(?:anon_inode:)?\[?([^)\]]*)": (
        lambda found, name: (
            f"{name} has an open {found[2].strip() or 'descriptor'} (fd {found[1]}) that cannot be saved"
        )
    ),
    r"doesn't live in IPC ns": lambda _, name: (
        f"{name} uses System V shared memory, which cannot be saved to disk"
    ),
    r"[Uu]nable to detach|[Uu]nable to interrupt|SEIZE .*failed|can't be traced": lambda _, name: (
        f"{name} is traced by another program (a debugger, strace); end that first"
    ),
    r"session leader|has no leader": lambda _, name: (
        f"{name} belongs to a session that began outside of it"
    ),
    r"File (\S+) has bad (?:size|mode|build-?id)": lambda found, name: (
        f"{found[1]} was changed since {name} was saved"
    ),
    r"Can't open file (\S+) on restore": lambda found, name: (
        f"{found[1]}, which {name} had open when it was saved, cannot be opened any more"
    ),
    r"Can't fork for (\d+): File exists": lambda found, name: (
        f"pid {found[1]} is taken in the namespace that {name} was to come back in"
    ),
    r"Can't bind .*[Aa]ddress already in use": lambda _, name: (
        f"{name} listens on an address that another process has taken meanwhile"
    ),
}
_FULL: Final = re.compile(r"No space left on device|Disk quota exceeded")
_PREFIX: Final = re.compile(r"^(?:pie:)?\s*(?:\([\d.]+\))?\s*(?:\d+:)?\s*Error \([^)]*\):\s*")
#: There on every run inside a namespace, and harmless.
_HARMLESS: Final = ("Can't setup RLIMIT_NOFILE",)


def explain(log: str, name: str, action: str) -> str:
    """One sentence. ``action``: "save" or "bring back"."""
    errors = error_lines(log)
    said = "\n".join(errors)
    for pattern, meaning in _MEANINGS.items():
        if found := re.search(pattern, said):
            return meaning(found, name)
    reason = _PREFIX.sub("", errors[0]) if errors else "it did not say why"
    return f"CRIU could not {action} {name}: {reason}"


def disk_is_full(log: str) -> bool:
    return any(_FULL.search(line) for line in error_lines(log))


def error_lines(log: str) -> list[str]:
    """The lines that tell of errors, without those that always come."""
    return [
        line.strip()[:500]
        for line in log.splitlines()
        if "Error (" in line and not any(text in line for text in _HARMLESS)
    ]


def tail(log: str) -> list[str]:
    """The last lines, for who wants to know more."""
    return [line[:300] for line in log.splitlines()[-TAIL_LINES:]]
