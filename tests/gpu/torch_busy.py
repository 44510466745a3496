"""A PyTorch program that is never at rest and checks every step of its own; see ``test_direct_gpu.py``.

    torch_busy.py GIGABYTES [idle] [fork] [capture]      prints "ready", then "steps A B C D"; "WRONG ..."

Two threads launch without pause on streams of their own, allocate and free, and compare what they read; a third
replays a CUDA graph; a fourth trains a small model beside a copy of it on the CPU, fed from pinned memory.
"fork": with a child that does nothing. "capture": the third captures a new graph each time. SIGUSR1 makes it exit.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import torch  # type: ignore[import-not-found,unused-ignore]

WORDS = 32 << 20
PAUSE_S = 0.2 if "idle" in sys.argv else 0.0
done = [0, 0, 0, 0]


def fail(*what: object) -> None:
    print("WRONG", *what, flush=True)
    os._exit(3)


def rest(thread: int) -> None:
    done[thread] += 1
    if PAUSE_S:
        time.sleep(PAUSE_S)


def launch(thread: int, held: list[Any], sums: list[int]) -> None:
    counter = torch.zeros(4096, dtype=torch.int64, device="cuda")
    launched, turn = 0, thread
    with torch.cuda.stream(torch.cuda.Stream()):
        while True:
            for _ in range(200):
                counter.add_(1)
            launched += 200
            scratch = torch.empty((turn % 7 + 1) << 18, device="cuda").fill_(turn)
            which = turn % len(held)
            if held[which][::4097].sum().item() != sums[which]:
                fail("held memory", which)
            if (counter.min().item(), counter.max().item()) != (launched, launched):
                fail("counter", counter.min().item(), counter.max().item(), launched)
            if scratch.min().item() != turn or scratch.max().item() != turn:
                fail("scratch memory")
            del scratch
            turn += 1
            rest(thread)


def replay(captured: threading.Event) -> None:
    x = torch.zeros(1 << 16, dtype=torch.int64, device="cuda")
    y = torch.zeros_like(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        y.add_(x)
    x.zero_()
    y.zero_()
    torch.cuda.synchronize()
    captured.set()
    replays = 0
    while True:
        if "capture" in sys.argv:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                x.add_(1)
                y.add_(x)
        for _ in range(50):
            graph.replay()
        replays += 50
        torch.cuda.synchronize()
        if (x.min().item(), x.max().item()) != (replays, replays):
            fail("graph", x.min().item(), x.max().item(), replays)
        if y.max().item() != replays * (replays + 1) // 2:
            fail("graph's sum", y.max().item(), replays)
        rest(2)


def train() -> None:
    torch.manual_seed(1)
    there = torch.nn.Sequential(
        torch.nn.Linear(64, 64, dtype=torch.float64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 1, dtype=torch.float64),
    )
    here = torch.nn.Sequential(
        torch.nn.Linear(64, 64, dtype=torch.float64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 1, dtype=torch.float64),
    )
    here.load_state_dict(there.state_dict())
    there.cuda()
    makers = [torch.optim.SGD(model.parameters(), lr=0.001) for model in (there, here)]
    generator = torch.Generator().manual_seed(2)
    with torch.cuda.stream(torch.cuda.Stream()):
        while True:
            batch = torch.randn(128, 64, dtype=torch.float64, generator=generator).pin_memory()
            losses = []
            for model, maker, data in zip(
                (there, here), makers, (batch.to("cuda", non_blocking=True), batch), strict=True
            ):
                maker.zero_grad()
                loss = (model(data) ** 2).mean()
                loss.backward()
                maker.step()
                losses.append(loss.item())
            if abs(losses[0] - losses[1]) > 1e-6 * abs(losses[1]) + 1e-12:
                fail("loss", *losses)
            rest(3)


def fork() -> None:
    """A child that has CUDA's memory and descriptors in it, and uses none of it."""
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(0)


def main() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
    count = max(1, int(float(sys.argv[1]) * 1e9 / (WORDS * 4)))
    held = [torch.arange(i, i + WORDS, dtype=torch.int32, device="cuda") for i in range(count)]
    sums = [int(one[::4097].sum().item()) for one in held]
    captured = threading.Event()
    threading.Thread(target=replay, args=(captured,), daemon=True).start()
    captured.wait()
    for thread in (0, 1):
        threading.Thread(target=launch, args=(thread, held, sums), daemon=True).start()
    threading.Thread(target=train, daemon=True).start()
    if "fork" in sys.argv:
        fork()
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
        print("steps", *done, flush=True)


main()
