"""Large payloads between a proxy and its host: by direct copy, and through the socket where that is not allowed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_integration import direct, pickling
from ray_integration.buffers import BufferPool
from ray_integration.frames import ConnectionLost, FrameSocket, Kind
from ray_integration.links import Links

pytestmark = pytest.mark.ray
MIB = 2**20


@pytest.fixture
def ends() -> Any:
    left, right = socket.socketpair()
    pair = FrameSocket(left, BufferPool()), FrameSocket(right, BufferPool())
    yield pair
    for end in pair:
        end.close()


def test_a_buffer_is_used_again_only_when_nobody_refers_to_it() -> None:
    pool = BufferPool()
    first = pool.take(100_000)
    address = direct.address_of(first)
    array = np.frombuffer(first, dtype=np.uint8)
    del first
    assert direct.address_of(pool.take(100_000)) != address, "the array is in it"
    del array
    assert direct.address_of(pool.take(100_000)) == address
    pool.trim()
    assert repr(pool) == "<BufferPool 0 buffers, 0 bytes>"


def test_the_pool_does_not_grow_with_what_others_keep() -> None:
    pool = BufferPool(limit_bytes=4 * MIB)
    kept = [pool.take(MIB) for _ in range(16)]
    for number, buffer in enumerate(kept):
        buffer[0] = number
    assert [buffer[0] for buffer in kept] == list(range(16))
    held = int(repr(pool).split()[-2])
    assert held <= 4 * MIB


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000, 5 * MIB])
def test_a_frame_arrives_as_it_was_sent(ends: Any, size: int) -> None:
    left, right = ends
    sent: dict[str, Any] = {"array": np.arange(size, dtype=np.uint8), "text": "x" * size}
    sender = threading.Thread(target=left.send, args=(Kind.CALL, 7, sent))
    sender.start()
    frame = right.receive()
    sender.join()
    assert (frame.kind, frame.ident) == (Kind.CALL, 7)
    found = frame.load()
    assert found["text"] == sent["text"]
    assert np.array_equal(found["array"], sent["array"])


def test_nothing_within_the_time_is_none_and_the_end_is_an_error(ends: Any) -> None:
    left, right = ends
    assert right.receive(0.01) is None
    left.close()
    with pytest.raises(ConnectionLost):
        right.receive(1.0)


def test_what_cannot_be_pickled_is_not_sent(ends: Any) -> None:
    left, right = ends
    with pytest.raises(TypeError):
        left.send(Kind.CALL, 1, threading.Lock())
    left.send(Kind.CALL, 2, "fine")
    assert right.receive().load() == "fine"


def test_read_only_arrays_stay_read_only() -> None:
    array = np.ones(MIB)
    array.flags.writeable = False
    payload, buffers = pickling.dumps(array)
    assert [buffer.nbytes for buffer in buffers] == [array.nbytes]
    assert not pickling.loads(payload, buffers).flags.writeable


def test_a_torch_tensor_lies_beside_its_pickle_and_is_made_again_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(MIB, dtype=torch.float32).reshape(1024, -1)
    payload, buffers = pickling.dumps({"weights": tensor})
    assert len(payload) < 1000
    assert [direct.address_of(each) for each in buffers] == [tensor.data_ptr()]
    received = [memoryview(bytearray(each)) for each in buffers]
    found = pickling.loads(payload, received)["weights"]
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert found.data_ptr() == direct.address_of(received[0])
    # What is not plain memory goes as torch itself would have it.
    odd = tensor.t()[::2].requires_grad_()
    back = pickling.loads(*pickling.dumps(odd))
    assert torch.equal(back, odd) and back.requires_grad


HOST = """
import sys, numpy as np
from pathlib import Path
sys.path[:] = {path!r}
from ray_integration import direct, host
if {forbid!r}:
    direct.Token.shown = lambda self: (4096, b"not mapped here.")
host.main({directory!r})
"""


class Model:
    """Runs in the host."""

    def __init__(self) -> None:
        self.given = np.arange(3 * MIB, dtype=np.uint8)

    def total(self, array: Any) -> int:
        return int(array.sum(dtype=np.int64))

    def give(self) -> Any:
        self.given += 1
        return self.given


@pytest.mark.parametrize("forbid", [False, True], ids=["directly", "through the socket"])
def test_both_ways_give_the_same(forbid: bool, tmp_path: Path) -> None:
    program = HOST.format(path=sys.path, directory=str(tmp_path), forbid=forbid)
    with subprocess.Popen([sys.executable, "-c", program]) as host:
        try:
            links = Links(tmp_path / "host")
            link, _ = links.connect("control", timeout_s=20)
            assert (link._peer is None) == forbid
            link.close()
            from ray import cloudpickle

            made: Any = (cloudpickle.dumps(Model), (), {})  # type: ignore[no-untyped-call]
            links.call(Kind.INIT, made, on_main=True, is_cancelled=lambda: False)
            expected = np.arange(3 * MIB, dtype=np.uint8)
            for _ in range(3):
                total = _call(links, "total", np.full(5 * MIB, 3, dtype=np.uint8))
                assert total == 15 * MIB
                expected = expected + 1
                assert np.array_equal(_call(links, "give"), expected)
            links.drop()
        finally:
            os.kill(host.pid, 9)


def _call(links: Links, method: str, *args: Any) -> Any:
    value: Any = (method, args, {}, False)
    return links.call(Kind.CALL, value, on_main=True, is_cancelled=lambda: False)
