"""Failures and delays on order: what the simulated driver is to do wrong, and when.

``script.json`` in the directory of the simulated GPUs is a list of rules, read again at every driver call:

    [{"call": "checkpoint", "pid": null, "times": 1, "skip": 0, "when": "middle", "delay_s": 0.5,
      "error": "OUT_OF_MEMORY"}]

call      the driver call: describe, usage, states, lock, checkpoint, restore, unlock, obstacles
pid       only for this process; null: for any
skip      matching calls that pass first
times     how many calls after that it applies to; null: all
when      before  inside the call and after its checks: nothing was changed yet (the default)
          middle  checkpoint and restore: every byte is copied, nothing is committed
          after   the call has done its work
delay_s   wait so long; then
hang      wait for ever, or
crash     end the driver's process at once, without a word, or
error     raise DriverError with this result name; LOCK_TIMEOUT raises LockTimeout
state     of ``states``: the answer to give. Of any other call, with an error: "failed" leaves the process so for good
obstacle  of ``obstacles``: {"kind": ..., "message": ..., "certain": ...}

Every matching rule applies, in the order of the file. Counts live beside the rules, so they hold for all processes
that act as driver, one after the other or at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from gpusched import errors
from gpusched.ports import DriverState, Obstacle

When = Literal["before", "middle", "after"]

_CALLS: Final = frozenset(
    {"describe", "usage", "states", "lock", "checkpoint", "restore", "unlock", "obstacles"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of the script; the module says what each field does."""

    call: str
    pid: int | None = None
    skip: int = 0
    times: int | None = 1
    when: When = "before"
    delay_s: float = 0.0
    hang: bool = False
    crash: bool = False
    error: str | None = None
    state: str | None = None
    obstacle: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.call not in _CALLS:
            raise ValueError(f"no driver call {self.call!r}")
        if self.when not in ("before", "middle", "after"):
            raise ValueError(f"when is before, middle or after, not {self.when!r}")
        if self.state is not None:
            DriverState(self.state)
            if self.call != "states" and self.state != DriverState.FAILED:
                raise ValueError(f'a {self.call} can only leave the state "failed"')
            if self.call != "states" and self.error is None:
                raise ValueError("a call that leaves a process failed needs an error")

    def matches(self, call: str, pid: int | None, when: When) -> bool:
        return (self.call, self.when) == (call, when) and self.pid in (None, pid)

    def to_obstacle(self, pid: int) -> Obstacle | None:
        return None if self.obstacle is None else Obstacle(pid=pid, **self.obstacle)


class Script:
    """The rules of one directory: ``add`` and ``clear`` for tests, ``due`` and ``act`` for the driver."""

    def __init__(self, directory: Path) -> None:
        self._rules = directory / "script.json"
        self._counts = directory / "script-counts.json"
        self._lock = directory / "script.lock"

    # -- for tests --------------------------------------------------------------------------------

    def add(
        self,
        call: str,
        *,
        pid: int | None = None,
        skip: int = 0,
        times: int | None = 1,
        when: When = "before",
        delay_s: float = 0.0,
        hang: bool = False,
        crash: bool = False,
        error: str | None = None,
        state: str | None = None,
        obstacle: Mapping[str, Any] | None = None,
    ) -> None:
        """Appends a rule; in force from the driver's next call."""
        rule = Rule(
            call=call,
            pid=pid,
            skip=skip,
            times=times,
            when=when,
            delay_s=delay_s,
            hang=hang,
            crash=crash,
            error=error,
            state=state,
            obstacle=obstacle,
        )
        with self._locked():
            self._write(self._rules, [asdict(each) for each in [*self._read_rules(), rule]])

    def clear(self) -> None:
        """Removes all rules and counts. A call that hangs or waits already goes on doing so."""
        with self._locked():
            self._rules.unlink(missing_ok=True)
            self._counts.unlink(missing_ok=True)

    def fired(self, call: str) -> int:
        """How often rules for ``call`` have applied since ``clear``; counted before they act, so a test can wait."""
        with self._locked():
            rules, counts = self._read_rules(), self._read_counts()
        keyed = zip(_keys(rules), rules, strict=True)
        return sum(_applied(rule, counts.get(key, 0)) for key, rule in keyed if rule.call == call)

    # -- for the driver ---------------------------------------------------------------------------

    def due(self, call: str, pid: int | None, when: When) -> list[Rule]:
        """The rules that apply to this call, counted as used. Raises DriverError for an unreadable script."""
        if not self._rules.exists():
            return []
        due = []
        with self._locked():
            try:
                rules = self._read_rules()
            except (ValueError, TypeError) as error:
                raise errors.DriverError(f"{self._rules}: {error}", {"call": call}) from error
            counts = self._read_counts()
            for key, rule in zip(_keys(rules), rules, strict=True):
                if rule.matches(call, pid, when):
                    before = _applied(rule, counts.get(key, 0))
                    counts[key] = counts.get(key, 0) + 1
                    if _applied(rule, counts[key]) > before:
                        due.append(rule)
            if any(rule.matches(call, pid, when) for rule in rules):
                self._write(self._counts, counts)
        return due

    def act(self, rules: Sequence[Rule], call: str, pid: int | None) -> None:
        """Waits, hangs, ends the process or raises as ``rules`` say. ``state`` and ``obstacle`` are the caller's."""
        for rule in rules:
            if rule.delay_s:
                time.sleep(rule.delay_s)
            while rule.hang:
                time.sleep(3600)
            if rule.crash:
                os._exit(70)
            if rule.error is not None:
                cls = errors.LockTimeout if rule.error == "LOCK_TIMEOUT" else errors.DriverError
                raise cls(
                    f"{call} of pid {pid} failed: {rule.error} (simulated, scripted)",
                    {"call": call, "result": rule.error, "pid": pid},
                )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _read_rules(self) -> list[Rule]:
        try:
            raw = json.loads(self._rules.read_text())
        except FileNotFoundError:
            return []
        return [Rule(**each) for each in raw]

    def _read_counts(self) -> dict[str, int]:
        try:
            found: dict[str, int] = json.loads(self._counts.read_text())
        except FileNotFoundError:
            return {}
        return found

    def _write(self, path: Path, value: object) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(value))
        fresh.replace(path)


def _applied(rule: Rule, seen: int) -> int:
    """How often ``rule`` has applied once ``seen`` calls have matched it."""
    after_skip = max(0, seen - rule.skip)
    return after_skip if rule.times is None else min(after_skip, rule.times)


def _keys(rules: Sequence[Rule]) -> list[str]:
    """A name for each rule that stays the same when others are added: what it says, and which of its equals it is."""
    seen: dict[str, int] = {}
    keys = []
    for rule in rules:
        text = json.dumps(asdict(rule), sort_keys=True)
        seen[text] = seen.get(text, 0) + 1
        keys.append(f"{text}#{seen[text]}")
    return keys
