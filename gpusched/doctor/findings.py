"""A finding: one thing that was looked at, whether it is as it should be, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"  # something is slower, smaller or missing; the backend runs
    FAIL = "fail"  # the backend cannot run


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``found`` is a line for a person; ``fix`` says what to do, a command where there is one, and is empty when ok."""

    name: str
    status: Status
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name}: {self.found}"


def ok(name: str, found: str) -> Finding:
    return Finding(name=name, status=Status.OK, found=found)


def warn(name: str, found: str, fix: str) -> Finding:
    return Finding(name=name, status=Status.WARN, found=found, fix=fix)


def fail(name: str, found: str, fix: str) -> Finding:
    return Finding(name=name, status=Status.FAIL, found=found, fix=fix)


def failed(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status is Status.FAIL]


def as_text(findings: Iterable[Finding]) -> str:
    """Plain lines: each finding, and below it its fix."""
    lines = []
    for finding in findings:
        lines.append(str(finding))
        if finding.fix:
            lines.append(f"      fix: {finding.fix}")
    return "\n".join(lines)
