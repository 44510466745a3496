"""The wire's bytes and parameters: any cut of the stream, every method, what the original's clients send."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusched.protocol import messages
from gpusched.protocol.codec import MAX_LINE_BYTES, LineBuffer, LineTooLong, encode
from gpusched.protocol.methods import METHODS

# -- the wire's bytes -----------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
wire_messages = st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=4)


@given(wire_messages)
def test_messages_come_out_whole_wherever_the_stream_is_cut(sent: list[dict[str, Any]]) -> None:
    # A lone surrogate cannot be sent at all, and hypothesis makes none in st.text().
    stream = b"".join(encode(message) for message in sent)
    for cut in range(len(stream) + 1):
        buffer = LineBuffer()
        lines = buffer.feed(stream[:cut]) + buffer.feed(stream[cut:])
        assert [json.loads(line) for line in lines] == sent


@given(wire_messages)
def test_messages_come_out_whole_one_byte_at_a_time(sent: list[dict[str, Any]]) -> None:
    buffer = LineBuffer()
    stream = b"".join(encode(message) for message in sent)
    lines = [line for byte in stream for line in buffer.feed(bytes([byte]))]
    assert [json.loads(line) for line in lines] == sent


def test_an_encoded_message_is_one_line_of_utf8() -> None:
    assert encode({"a": "1\n2 → é"}) == '{"a":"1\\n2 → é"}\n'.encode()


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_of_the_limit_is_refused_and_one_byte_less_is_not(ending: bytes) -> None:
    with pytest.raises(LineTooLong):
        LineBuffer().feed(b"x" * MAX_LINE_BYTES + ending)
    shorter = LineBuffer()
    shorter.feed(b"x" * (MAX_LINE_BYTES - 1))
    assert shorter.feed(b"\n") == [b"x" * (MAX_LINE_BYTES - 1)]


def test_a_long_line_is_refused_when_it_comes_in_pieces_and_behind_a_good_one() -> None:
    buffer = LineBuffer(limit=8)
    assert buffer.feed(b"good\n1234") == [b"good"]
    with pytest.raises(LineTooLong):
        buffer.feed(b"5678")


def test_without_a_limit_any_line_passes() -> None:
    assert LineBuffer(limit=None).feed(b"x" * (2 * MAX_LINE_BYTES) + b"\n") == [
        b"x" * (2 * MAX_LINE_BYTES)
    ]


# -- the wire's parameters ------------------------------------------------------------------------


def convert(method: str, params: dict[str, Any]) -> Any:
    return msgspec.convert(params, METHODS[method].params)


#: What the original's clients send.
ORIGINAL: list[tuple[str, dict[str, Any]]] = [
    ("run", {"name": "train", "cmd": ["python", "a.py"], "dir": "/tmp", "gpu": 1}),
    ("run", {"name": "train", "cmd": ["sleep", "1"]}),
    ("freeze", {"name": "train"}),
    ("thaw", {"name": "train"}),
    ("kill", {"name": "train"}),
    ("hibernate", {"name": "train"}),
    ("fork", {"name": "train", "copies": 3, "gpus": [0, 1]}),
    ("migrate", {"name": "train", "gpu": 1}),
    ("status", {}),
    ("logs", {"name": "train", "lines": -1, "follow": True}),
    ("logs", {"name": "train", "lines": 10**9}),
    ("subscribe", {}),
]


@pytest.mark.parametrize(("method", "params"), ORIGINAL)
def test_requests_of_the_original_clients_are_valid(method: str, params: dict[str, Any]) -> None:
    converted = convert(method, params)
    assert {key: getattr(converted, key) for key in params} == params


def test_defaults_are_the_originals() -> None:
    run = convert("run", {"name": "a", "cmd": ["x"]})
    assert (run.gpu, run.gpus, run.dir, run.env, run.evictable) == (0, None, None, None, False)
    assert convert("logs", {"name": "a"}).lines == 50
    assert convert("fork", {"name": "a"}).copies == 2


@pytest.mark.parametrize("method", list(METHODS))
def test_unknown_parameters_are_ignored(method: str) -> None:
    params = {"name": "a", "cmd": ["x"], "pid": 1, "off": "a", "on": ["b"]}
    assert convert(method, params) == convert(method, {**params, "from_the_future": {"x": 1}})


@pytest.mark.parametrize(
    "name", ["a", "A1", "0", "policy-1", "a.b_c-d", "x" * 64, "1.2.3", "a..b", "a--"]
)
def test_good_names_pass(name: str) -> None:
    assert convert("freeze", {"name": name}).name == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "-a", "_a", "../etc", "a/b", "a\\b", "a b", "a\n", "\na", "a\x00", "é"),
        *("x" * 65, "a\r", "a\u2028", "٣", None, 1, ["a"], True),
    ],
)
def test_no_other_name_passes(name: object) -> None:
    for method in ("run", "freeze", "logs", "adopt", "acquire"):
        with pytest.raises(msgspec.ValidationError):
            convert(method, {"name": name, "cmd": ["x"], "pid": 1})
    with pytest.raises(msgspec.ValidationError):
        convert("swap", {"off": "a", "on": ["b", name]})


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("run", {"cmd": ["x"]}),
        ("run", {"name": "a"}),
        ("run", {"name": "a", "cmd": []}),
        ("run", {"name": "a", "cmd": "x"}),
        ("run", {"name": "a", "cmd": ["x", 1]}),
        ("run", {"name": "a", "cmd": ["x"], "gpu": -1}),
        ("run", {"name": "a", "cmd": ["x"], "gpu": 1024}),
        ("run", {"name": "a", "cmd": ["x"], "gpu": "0"}),
        ("run", {"name": "a", "cmd": ["x"], "gpu": 1.5}),
        ("run", {"name": "a", "cmd": ["x"], "gpu": True}),
        ("run", {"name": "a", "cmd": ["x"], "gpus": []}),
        ("run", {"name": "a", "cmd": ["x"], "gpus": [0] * 65}),
        ("run", {"name": "a", "cmd": ["x"], "env": {"A": 1}}),
        ("run", {"name": "a", "cmd": ["x" * 131073]}),
        ("adopt", {"name": "a", "pid": 0}),
        ("adopt", {"name": "a", "pid": -1}),
        ("adopt", {"name": "a", "pid": 2**22 + 1}),
        ("freeze", {"name": "a", "force": 1}),
        ("thaw", {"name": "a", "evict": "yes"}),
        ("swap", {"off": "a"}),
        ("swap", {"off": [], "on": []}),
        ("swap", {"off": ["a"] * 257, "on": "a"}),
        ("acquire", {"name": "a", "for_s": 0}),
        ("acquire", {"name": "a", "for_s": -1}),
        ("acquire", {"name": "a", "for_s": float("inf")}),
        ("acquire", {"name": "a", "for_s": float("nan")}),
        ("fork", {"name": "a", "copies": 0}),
        ("logs", {"name": "a", "lines": "50"}),
    ],
)
def test_missing_mistyped_and_out_of_range_parameters_are_refused(
    method: str, params: dict[str, Any]
) -> None:
    with pytest.raises(msgspec.ValidationError):
        convert(method, params)


def test_swap_takes_one_name_or_several_on_either_side() -> None:
    swap = convert("swap", {"off": "a", "on": ["b", "c"]})
    assert isinstance(swap, messages.Swap)
    assert (swap.off, swap.on) == ("a", ["b", "c"])


def test_the_originals_methods_are_all_there() -> None:
    assert {method for method, _ in ORIGINAL} <= set(METHODS)
