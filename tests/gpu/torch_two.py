"""A PyTorch program on two GPUs that copies between them without pause and checks it; see ``test_direct_peers_gpu.py``.

torch_two.py GIGABYTES      prints "ready", then "steps N"; "WRONG ..." and exit status 3 where it is not right
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch  # type: ignore[import-not-found,unused-ignore]

WORDS = 16 << 20


def fail(*what: object) -> None:
    print("WRONG", *what, flush=True)
    os._exit(3)


def is_all(tensor: Any, value: int) -> bool:
    return bool(tensor.min().item() == value == tensor.max().item())


def step(number: int, here: Any, there: Any) -> None:
    """By the copy engine, and by a kernel of one GPU that touches the memory of the other."""
    here.fill_(number)
    there.copy_(here)
    if not is_all(there, number):
        fail("copied", number, there.min().item(), there.max().item())
    there.view(-1, 2).t()[0].add_(1)
    here.view(2, -1).copy_(there.view(-1, 2).t())
    if not is_all(here[: WORDS // 2], number + 1) or not is_all(here[WORDS // 2 :], number):
        fail("copied by a kernel", number)


def main() -> None:
    if not torch.cuda.can_device_access_peer(0, 1):
        print("no peers", flush=True)
    count = max(1, int(float(sys.argv[1]) * 1e9 / (WORDS * 4)))
    held = [
        [torch.full((WORDS,), i, dtype=torch.int32, device=f"cuda:{gpu}") for i in range(count)]
        for gpu in (0, 1)
    ]
    pair = [torch.zeros(WORDS, dtype=torch.int32, device=f"cuda:{gpu}") for gpu in (0, 1)]
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        step(number, pair[number % 2], pair[1 - number % 2])
        which = number % count
        for gpu in (0, 1):
            if not is_all(held[gpu][which], which):
                fail("held memory", gpu, which)
        print("steps", number, flush=True)


main()
