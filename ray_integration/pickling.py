"""Objects as a pickle and the large buffers beside it, which are sent as they lie in memory.

Covers: numpy arrays (they know how), torch tensors on the CPU (they do not), and what only cloudpickle can pickle:
functions and classes of the driver's main script. Only processes of the same user on the same host exchange these: a
pickle can run anything.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

Buffer = memoryview

#: Smaller buffers are copied into the pickle: a message of one piece is cheaper.
OUT_OF_BAND_BYTES: Final = 32 * 1024


def dumps(value: object) -> tuple[bytes, list[Buffer]]:
    """The pickle and its out-of-band buffers, which refer to the value's own memory.

    Raises whatever ``value`` raises when it is pickled.
    """
    try:
        return _dump(_Pickler, value)
    except Exception:  # noqa: BLE001 - also AttributeError and TypeError mean "not by reference"
        return _dump(_cloud_pickler(), value)


def loads(payload: bytes | memoryview, buffers: Sequence[Buffer]) -> Any:
    """The value; arrays in it use the memory of ``buffers``."""
    return pickle.loads(payload, buffers=buffers)  # noqa: S301 - from the same user, see above


def _dump(pickler: Callable[..., pickle.Pickler], value: object) -> tuple[bytes, list[Buffer]]:
    large: list[Buffer] = []

    def is_small(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < OUT_OF_BAND_BYTES:
            return True
        large.append(raw)
        return False

    file = io.BytesIO()
    pickler(file, protocol=5, buffer_callback=is_small).dump(value)
    return file.getvalue(), large


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return _reduce_tensor(value)


def _cloud_pickler() -> Callable[..., pickle.Pickler]:
    from ray.cloudpickle import CloudPickler

    class CloudPicklerWithTensors(CloudPickler):
        def reducer_override(self, value: Any) -> Any:
            reduced = _reduce_tensor(value)
            if reduced is not NotImplemented:
                return reduced
            return super().reducer_override(value)  # type: ignore[no-untyped-call]

    return CloudPicklerWithTensors


# -- torch ----------------------------------------------------------------------------------------


def _reduce_tensor(value: Any) -> Any:
    """How a plain CPU tensor is made again from its bytes; NotImplemented for everything else."""
    torch = sys.modules.get("torch")
    if torch is None or type(value) is not getattr(torch, "Tensor", None):
        return NotImplemented
    plain = value.device.type == "cpu" and value.layout is torch.strided
    if not plain or value.requires_grad or value.is_quantized or not value.numel():
        return NotImplemented
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return _tensor, (pickle.PickleBuffer(raw), value.dtype, tuple(value.shape))


def _tensor(buffer: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    raw = memoryview(buffer)
    if raw.readonly:  # torch has no such tensors
        raw = memoryview(bytearray(raw))
    return torch.frombuffer(raw, dtype=dtype).reshape(shape)
