"""The workload on a real GPU: its kernels compute what the CPU does, and its errors say what is wrong."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from gpusched.units import MIB
from gpusched.workload import content

pytestmark = pytest.mark.gpu

_PART_WORDS = MIB // content.WORD_BYTES


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "GPUSCHED_SIM_DIR"}
    return subprocess.run(
        [sys.executable, "-m", "gpusched.workload", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def digests(text: str) -> list[int]:
    return [int(found, 16) for found in re.findall(r"digest=([0-9a-f]{16})", text)]


def part_digest(seed: int, number: int) -> int:
    first = number * _PART_WORDS
    return content.digest(content.words(seed, first, _PART_WORDS), first)


def cpu_digest(seed: int, size_mib: int) -> int:
    """About a second of CPU time for each 4 MiB, on all cores."""
    spawn = multiprocessing.get_context("spawn")  # the test process may have used CUDA
    with ProcessPoolExecutor(mp_context=spawn) as pool:
        parts = pool.map(part_digest, [seed] * size_mib, range(size_mib), chunksize=4)
        return sum(parts) % 2**64


@pytest.mark.parametrize("how", [(), ("--busy",)])
def test_every_tick_has_the_digest_that_the_cpu_computes(how: tuple[str, ...]) -> None:
    done = run("--vram", "256M", "--ticks", "5", "--seed", "7", *how)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"ready digest=[0-9a-f]{16}", lines[0])
    assert [line.split(" digest=")[0] for line in lines[1:]] == [f"tick {n}" for n in range(1, 6)]
    found = digests(done.stdout)
    assert len(found) == 6
    assert set(found) == {cpu_digest(7, 256)}


def test_a_size_that_is_no_multiple_of_anything_is_right_too() -> None:
    done = run("--vram", "2049K", "--ticks", "1", "--seed", "3")
    assert done.returncode == 0, done.stderr
    words = 2049 * 1024 // content.WORD_BYTES
    expected = content.digest(content.words(3, 0, words), 0)
    assert digests(done.stdout) == [expected, expected]


def test_too_much_memory_is_said_with_numbers() -> None:
    done = run("--vram", "4T")
    assert done.returncode == 4
    assert re.search(r"out of memory on GPU 0: 4\.0 TiB wanted in all; .* free of ", done.stderr)


def test_a_gpu_that_is_not_there_is_an_error_not_a_traceback() -> None:
    done = run("--gpu", "99", "--vram", "1M")
    assert done.returncode == 1
    assert "no GPU 99" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.gpu(count=2)
def test_two_gpus_share_the_memory_and_the_digest_is_the_same() -> None:
    one = run("--vram", "64M", "--ticks", "0")
    two = run("--vram", "64M", "--ticks", "0", "--gpu", "0,1")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert digests(one.stdout) == digests(two.stdout)
