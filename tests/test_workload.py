"""The workload: what it prints, that it notices wrong contents, and how it ends. Run here on simulated GPUs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest

from gpusched.mechanisms.sim.driver import SimDriver
from gpusched.units import MIB
from gpusched.workload import content

pytest_plugins = ["simulated_fixtures"]

READY = re.compile(r"ready digest=([0-9a-f]{16}) simulated\n")
TICK = re.compile(r"tick (\d+) digest=([0-9a-f]{16})\n")
TIMEOUT_S = 30


Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def begin(directory: Path, sim: SimDriver) -> Iterator[Begin]:
    """Starts a workload; at the end it is killed if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpusched.workload", *arguments],
            env={**os.environ, "GPUSCHED_SIM_DIR": str(directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def ready(process: subprocess.Popen[str]) -> str:
    text = line(process)
    match = READY.fullmatch(text)
    assert match, text
    return match[1]


def tick(process: subprocess.Popen[str]) -> tuple[int, str]:
    text = line(process)
    match = TICK.fullmatch(text)
    assert match, text
    return int(match[1]), match[2]


@pytest.mark.parametrize("how", [(), ("--busy",)])
def test_it_ticks_with_the_digest_of_its_first_line_and_ends_after_its_ticks(
    begin: Begin, how: tuple[str, ...]
) -> None:
    process = begin("--vram", "8M", "--ticks", "3", *how)
    digest = ready(process)
    assert [tick(process) for _ in range(3)] == [(1, digest), (2, digest), (3, digest)]
    assert process.wait(TIMEOUT_S) == 0


def test_the_digest_is_the_seeds_and_the_sizes(begin: Begin) -> None:
    arguments = [
        ("--vram", "4M", "--seed", "1"),
        ("--vram", "4M", "--seed", "1"),
        ("--vram", "4M", "--seed", "2"),
        ("--vram", "5M", "--seed", "1"),
    ]
    digests = [ready(begin(*each, "--ticks", "0")) for each in arguments]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_several_gpus_share_the_memory(sim: SimDriver, begin: Begin) -> None:
    process = begin("--vram", "16M", "--gpu", "0,1")
    ready(process)
    shares = sim.usage().processes[process.pid]
    assert shares == {gpu.uuid: 8 * MIB for gpu in sim.describe().gpus}


@pytest.mark.parametrize("at", [0, 3 * MIB + 17, 8 * MIB - 1])
def test_a_changed_byte_ends_it_with_exit_code_3(directory: Path, begin: Begin, at: int) -> None:
    process = begin("--vram", "8M")
    ready(process)
    vram = next((directory / "procs").glob("*/vram-1"))
    with vram.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1]))
    assert process.wait(TIMEOUT_S) == 3
    out, _ = process.communicate()
    assert out.splitlines()[-1].startswith("corrupt ")


def test_swapped_blocks_end_it_too(directory: Path, begin: Begin) -> None:
    process = begin("--vram", "8M")
    ready(process)
    vram = next((directory / "procs").glob("*/vram-1"))
    with vram.open("r+b") as file:
        one, two = file.read(MIB), file.read(MIB)
        file.seek(0)
        file.write(two + one)
    assert process.wait(TIMEOUT_S) == 3


def test_it_survives_freezes_and_goes_on_ticking(sim: SimDriver, begin: Begin) -> None:
    process = begin("--vram", "16M", "--busy")
    digest = ready(process)
    for number in (1, 2, 3):
        assert tick(process) == (number, digest)
        sim.lock(process.pid, 5.0)
        sim.checkpoint(process.pid)
        sim.restore(process.pid, None)
        sim.unlock(process.pid)


def test_sigterm_ends_it_as_it_ends_any_program(begin: Begin) -> None:
    process = begin("--vram", "4M")
    ready(process)
    process.terminate()
    assert process.wait(TIMEOUT_S) == -signal.SIGTERM


def test_too_much_memory_is_said_with_numbers(begin: Begin) -> None:
    process = begin("--vram", "100M")
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 4
    assert "out of memory on simulated GPU 0: 100 MiB wanted, 64 MiB of 64 MiB free" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--vram", "1X"), "is not a size"),
        (("--vram", "1K"), "at least 1M"),
        (("--gpu", "0,0"), "list of device numbers"),
        (("--gpu", "-1"), "list of device numbers"),
        (("--seed", "-1"), "between 0 and"),
    ],
)
def test_wrong_arguments_are_explained(
    begin: Begin, arguments: tuple[str, ...], message: str
) -> None:
    process = begin(*arguments)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert message in err


def test_a_gpu_that_is_not_there_is_an_error_not_a_traceback(begin: Begin) -> None:
    process = begin("--vram", "4M", "--gpu", "7")
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "no simulated GPU 7: 2 visible" in err


def test_without_any_gpu_it_says_so() -> None:
    env = {k: v for k, v in os.environ.items() if k != "GPUSCHED_SIM_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", "gpusched.workload", "--vram", "1M", "--ticks", "0"],
        env={**env, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gpusched.workload: ")
    assert "Traceback" not in done.stderr


def test_simulated_it_imports_the_standard_library_alone(directory: Path, sim: SimDriver) -> None:
    code = (
        "import sys; from gpusched.workload.__main__ import main; main(['--vram', '1M', '--ticks', '0']); "
        "print(sorted(m for m in ('cuda', 'msgspec', 'click', 'rich', 'pynvml', 'asyncio') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GPUSCHED_SIM_DIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_words_are_those_of_splitmix64() -> None:
    assert content.words(1234567, 0, 3) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_a_digest_adds_up_from_its_parts_and_notices_any_change() -> None:
    words = content.words(5, 0, 1000)
    whole = content.digest(words, 0)
    assert whole == (content.digest(words[:400], 0) + content.digest(words[400:], 400)) % 2**64
    swapped = [words[1], words[0], *words[2:]]
    assert content.digest(swapped, 0) != whole
    assert content.digest([*words[:-1], words[-1] ^ 1], 0) != whole


def test_the_kernels_are_shipped_for_old_gpus_and_drivers() -> None:
    text = (resources.files("gpusched.workload") / "kernels.ptx").read_text()
    assert re.search(r"^\.version 7\.5$", text, re.MULTILINE)
    assert re.search(r"^\.target sm_75$", text, re.MULTILINE)
    assert re.findall(r"^\.visible \.entry (\w+)\(", text, re.MULTILINE) == ["fill", "digest"]


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs ptxas (CUDA toolkit)")
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_the_kernels_assemble(arch: str, tmp_path: Path) -> None:
    kernels = resources.files("gpusched.workload") / "kernels.ptx"
    subprocess.run(
        ["ptxas", f"-arch={arch}", "-o", str(tmp_path / "kernels.cubin"), str(kernels)],
        check=True,
        timeout=TIMEOUT_S,
    )
