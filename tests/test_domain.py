"""States, moves, units and errors: every case that there is, or hypothesis."""

from __future__ import annotations

import itertools
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched import errors, units
from gpusched.domain.moves import STEPS, Move, Op, Outcome, undo_after
from gpusched.domain.states import (
    MOVING,
    TRANSITIONS,
    InvalidTransition,
    ProcState,
    Tier,
    Trigger,
    tier_of,
    transition,
)
from gpusched.protocol.codec import encode

S, T = ProcState, Trigger

# -- states ---------------------------------------------------------------------------------------

FOUND = {
    T.FOUND_ACTIVE: S.ACTIVE,
    T.FOUND_FROZEN: S.FROZEN,
    T.FOUND_HIBERNATED: S.HIBERNATED,
    T.FOUND_BROKEN: S.FAILED,
}

#: Every legal change, written out once more: the table must not gain or lose one unnoticed.
LEGAL: dict[ProcState, dict[Trigger, ProcState]] = {
    S.STARTING: {T.STARTED: S.ACTIVE, T.EXITED: S.DEAD},
    S.ACTIVE: {T.FREEZE: S.FREEZING, T.EXITED: S.DEAD, **FOUND},
    S.FREEZING: {
        T.DONE: S.FROZEN,
        T.ROLLED_BACK: S.ACTIVE,
        T.LOST: S.FAILED,
        T.EXITED: S.DEAD,
        **FOUND,
    },
    S.FROZEN: {
        T.THAW: S.THAWING,
        **dict.fromkeys((T.HIBERNATE, T.SAVE, T.RETREAT), S.HIBERNATING),
        **dict.fromkeys((T.DEEPEN, T.DEEPENED, T.ROLLED_BACK), S.FROZEN),
        T.LOST: S.FAILED,
        T.EXITED: S.DEAD,
        **FOUND,
    },
    S.HIBERNATING: {
        T.DONE: S.HIBERNATED,
        T.SAVED: S.FROZEN,
        T.ROLLED_BACK: S.FROZEN,
        T.LOST: S.FAILED,
        T.EXITED: S.DEAD,
        **FOUND,
    },
    S.HIBERNATED: {T.WAKE: S.WAKING, T.EXITED: S.DEAD, **FOUND},
    S.WAKING: {
        T.DONE: S.FROZEN,
        T.ROLLED_BACK: S.HIBERNATED,
        T.LOST: S.HIBERNATED,
        T.EXITED: S.DEAD,
        **FOUND,
    },
    S.THAWING: {
        T.DONE: S.ACTIVE,
        T.ROLLED_BACK: S.FROZEN,
        T.LOST: S.FAILED,
        T.EXITED: S.DEAD,
        **FOUND,
    },
    S.FAILED: {T.FREEZE: S.FREEZING, T.THAW: S.THAWING, T.EXITED: S.DEAD, **FOUND},
    S.DEAD: dict.fromkeys((T.DONE, T.SAVED, T.DEEPENED, T.ROLLED_BACK, T.LOST, T.EXITED), S.DEAD),
}


@pytest.mark.parametrize(("state", "trigger"), list(itertools.product(ProcState, Trigger)))
def test_a_state_and_a_trigger_lead_where_they_should_or_nowhere(
    state: ProcState, trigger: Trigger
) -> None:
    expected = LEGAL[state].get(trigger)
    if expected is None:
        with pytest.raises(InvalidTransition, match=f"{trigger} is not possible in state {state}"):
            transition(state, trigger)
    else:
        assert transition(state, trigger) is expected


def test_every_state_can_be_reached_and_none_but_dead_is_a_trap() -> None:
    reached = {S.STARTING}
    while more := {to for (at, _), to in TRANSITIONS.items() if at in reached} - reached:
        reached |= more
    assert reached == set(S)
    for state in S:
        leads_on = any(at is state and to is not state for (at, _), to in TRANSITIONS.items())
        assert leads_on == (state is not S.DEAD)


def test_a_moving_state_takes_every_outcome_and_no_other_living_state_takes_any() -> None:
    outcomes = {Trigger(outcome) for outcome in Outcome}
    for state in S:
        taken = {trigger for at, trigger in TRANSITIONS if at is state} & outcomes
        # What deepens is frozen all the time; that it is done has a trigger of its own.
        while_frozen = outcomes - {T.DONE} if state is S.FROZEN else set()
        assert taken == (outcomes if state in MOVING or state is S.DEAD else while_frozen)


def test_death_is_final_and_possible_everywhere() -> None:
    assert all(TRANSITIONS[state, T.EXITED] is S.DEAD for state in S)
    assert all(to is S.DEAD for (at, _), to in TRANSITIONS.items() if at is S.DEAD)


def test_the_table_cannot_be_changed() -> None:
    table: Any = TRANSITIONS
    with pytest.raises(TypeError):
        table[S.DEAD, T.STARTED] = S.ACTIVE


def test_only_a_frozen_process_is_in_ram_and_only_a_hibernated_one_on_disk() -> None:
    assert {state for state in S if tier_of(state) is Tier.RAM} == {S.FROZEN}
    assert {state for state in S if tier_of(state) is Tier.DISK} == {S.HIBERNATED}


# -- moves ----------------------------------------------------------------------------------------

OPPOSITE = {
    Op.LOCK: Op.UNLOCK,
    Op.CHECKPOINT: Op.RESTORE,
    Op.STOP: Op.CONTINUE,
    Op.UNLOCK: Op.LOCK,
    Op.RESTORE: Op.CHECKPOINT,
    Op.CONTINUE: Op.STOP,
}


@pytest.mark.parametrize("move", [Move.FREEZE, Move.THAW])
def test_every_step_is_undone_by_its_opposite(move: Move) -> None:
    assert [step.undo for step in STEPS[move]] == [OPPOSITE[step.do] for step in STEPS[move]]


def test_a_thaw_is_a_freeze_backwards() -> None:
    assert [step.do for step in STEPS[Move.THAW]] == [
        step.undo for step in reversed(STEPS[Move.FREEZE])
    ]


def test_threads_run_whenever_the_driver_needs_them() -> None:
    freeze = [step.do for step in STEPS[Move.FREEZE]]
    thaw = [step.do for step in STEPS[Move.THAW]]
    assert freeze == [Op.LOCK, Op.CHECKPOINT, Op.STOP]
    assert thaw == [Op.CONTINUE, Op.RESTORE, Op.UNLOCK]


@pytest.mark.parametrize(
    ("move", "failed", "expected"),
    [
        (Move.FREEZE, 0, (Op.UNLOCK,)),
        (Move.FREEZE, 1, (Op.RESTORE, Op.UNLOCK)),
        (Move.FREEZE, 2, (Op.CONTINUE, Op.RESTORE, Op.UNLOCK)),
        (Move.THAW, 0, (Op.STOP,)),
        (Move.THAW, 1, (Op.CHECKPOINT, Op.STOP)),
        (Move.THAW, 2, (Op.LOCK, Op.CHECKPOINT, Op.STOP)),
        (Move.HIBERNATE, 0, (Op.DISCARD,)),
        (Move.SAVE, 0, (Op.DISCARD,)),
        (Move.WAKE, 0, (Op.END,)),
        # The image is committed: there is nothing to go back to.
        (Move.HIBERNATE, 1, ()),
        (Move.RETREAT, 0, ()),
    ],
)
def test_a_failure_is_undone_newest_first_from_the_failed_step_on(
    move: Move, failed: int, expected: tuple[Op, ...]
) -> None:
    assert undo_after(move, failed) == expected


def test_the_original_ends_only_behind_the_commit() -> None:
    assert [step.do for step in STEPS[Move.HIBERNATE]] == [Op.SAVE, Op.END]
    assert all(Op.DISCARD not in (step.do for step in steps) for steps in STEPS.values())


# -- units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1", units.MIB),
        ("512", 512 * units.MIB),
        ("3K", 3 * 1024),
        ("1.5G", 3 * 1024**3 // 2),
        ("80G", 80 * 1024**3),
        ("80g", 80 * 1024**3),
        ("2 TiB", 2 * 1024**4),
        (" 7MB ", 7 * 1024**2),
    ],
)
def test_sizes_are_powers_of_1024_and_mib_without_a_letter(text: str, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "G", "-1G", "1P", "1G2", "0x10", "nan", "inf", "1e3", "1,5G", "1.G", "\x00"]
)
def test_what_is_not_a_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="such as 80G"):
        units.parse_size(text)


@given(st.integers(min_value=0, max_value=2**50))
def test_a_printed_size_reads_back_to_within_its_last_digit(size_bytes: int) -> None:
    text = units.format_size(size_bytes)
    last_digit = {"K": 1024, "M": 1024**2, "G": 1024**3 / 10, "T": 1024**4 / 10}[text[-3]]
    assert abs(units.parse_size(text) - size_bytes) <= last_digit / 2 + 1


@given(st.integers(min_value=0, max_value=10**6), st.sampled_from("KMGT"))
def test_a_whole_size_reads_back_exactly(number: int, letter: str) -> None:
    factor = {"K": units.KIB, "M": units.MIB, "G": units.GIB, "T": units.TIB}[letter]
    assert units.parse_size(f"{number}{letter}") == number * factor


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30", 30.0), ("30s", 30.0), ("10m", 600.0), ("1h30m", 5400.0), ("250ms", 0.25)),
        *(("1d", 86400.0), ("1.5h", 5400.0), (" 2s ", 2.0)),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", " ", "m", "-1s", "1x", "1h 30m", "1h30q", "s1", "1.m", "inf"])
def test_what_is_not_a_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="1h30m"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        *((0, 0), (-5, 0), (1, 1), (units.MIB, 1), (3 * units.MIB // 2 + 1, 2)),
        *((units.GIB, 1024), (units.GIB + 1, 1024)),
    ],
)
def test_mib_rounds_to_nearest_but_never_something_to_nothing(
    size_bytes: int, expected: int
) -> None:
    assert units.mib(size_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((-1, "0s"), (0, "0s"), (59.9, "59s"), (60, "1m00s"), (312, "5m12s"), (3599, "59m59s")),
        *((3600, "1h00m"), (11045, "3h04m"), (86400, "1d00h"), (183600, "2d03h")),
    ],
)
def test_an_age_shows_its_two_largest_units(seconds: float, text: str) -> None:
    assert units.format_age(seconds) == text


# -- errors ---------------------------------------------------------------------------------------

#: Code, exit code, retryable. Clients branch on these: a change here breaks them.
FROZEN_CODES = {
    "internal": (1, False),
    "invalid_request": (3, False),
    "not_found": (3, False),
    "already_exists": (3, False),
    "permission_denied": (3, False),
    "illegal_transition": (3, False),
    "lease_held": (3, True),
    "insufficient_gpu_memory": (4, True),
    "insufficient_host_memory": (4, True),
    "insufficient_disk": (4, True),
    "lock_timeout": (5, True),
    "driver_error": (5, False),
    "criu_error": (5, False),
    "unsupported": (5, False),
    "process_exited": (6, False),
    "process_lost": (6, False),
    "cancelled": (6, True),
    "deadline_exceeded": (6, True),
    "shutting_down": (6, True),
    "protocol_mismatch": (6, False),
    "unavailable": (6, True),
}


def _every_class(
    cls: type[errors.GpuschedError] = errors.GpuschedError,
) -> list[type[errors.GpuschedError]]:
    return [cls, *(each for child in cls.__subclasses__() for each in _every_class(child))]


def test_the_codes_their_exit_codes_and_retryability_are_frozen() -> None:
    found = {code: (cls.family.value, cls.retryable) for code, cls in errors.BY_CODE.items()}
    assert found == FROZEN_CODES


def test_every_class_has_a_code_in_the_table() -> None:
    assert {cls.code for cls in _every_class()} == set(errors.BY_CODE)


def test_each_family_has_an_exit_code_of_its_own() -> None:
    values = [family.value for family in errors.Family]
    assert sorted(set(values)) == sorted(values)
    assert 0 not in values
    assert 2 not in values  # a wrong use of the command line


@pytest.mark.parametrize("cls", _every_class(), ids=lambda cls: cls.__name__)
def test_an_error_survives_pickling_and_stays_a_runtime_error(
    cls: type[errors.GpuschedError],
) -> None:
    error = cls("61.2 GiB needed", {"need": 1, "story": ["a", "b"]})
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert isinstance(back, RuntimeError)
    assert (str(back), back.message) == ("61.2 GiB needed", "61.2 GiB needed")
    assert back.details == {"need": 1, "story": ["a", "b"]}


@pytest.mark.parametrize("cls", list(errors.BY_CODE.values()), ids=lambda cls: cls.__name__)
def test_an_error_crosses_the_wire_unchanged(cls: type[errors.GpuschedError]) -> None:
    line = json.loads(encode(errors.to_wire(cls("no room", {"free": 0}))))
    back = errors.from_wire(line)
    assert type(back) is cls
    assert (line["ok"], line["error"], line["code"]) == (False, "no room", cls.code)
    assert line["retryable"] is cls.retryable
    assert (back.message, back.details) == ("no room", {"free": 0})


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ({"ok": False, "error": "text"}, "text"),
        ({"ok": False, "error": "text", "code": "from_the_future"}, "text"),
        ({"ok": False, "error": "text", "code": ["odd"], "details": "odd"}, "text"),
        ({"ok": False}, "unknown error"),
    ],
)
def test_an_unknown_code_becomes_the_base_class(response: dict[str, Any], message: str) -> None:
    error = errors.from_wire(response)
    assert type(error) is errors.GpuschedError
    assert (error.message, error.details) == (message, {})


def test_details_can_be_added_without_losing_the_cause_or_the_class() -> None:
    with pytest.raises(errors.LockTimeout) as caught:
        raise errors.LockTimeout("busy", {"pid": 7}) from TimeoutError("deep")
    more = caught.value.with_details(story=["freeze"])
    assert type(more) is errors.LockTimeout
    assert more.details == {"pid": 7, "story": ["freeze"]}
    assert caught.value.details == {"pid": 7}
    assert isinstance(more.__cause__, TimeoutError)
    assert more.__traceback__ is not None


def test_a_missing_daemon_is_a_connection_error_with_a_plain_text() -> None:
    error = errors.DaemonUnavailable("the daemon is not running", {"socket": "/s"})
    assert isinstance(error, ConnectionError)
    assert str(error) == "the daemon is not running"
