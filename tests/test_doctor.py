"""The doctor: what it says of scripted machines, of this one, and of a machine on which no daemon can start."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

import gpusched
from daemons import ROOT, processes_naming, wait_until
from gpusched import selftest
from gpusched.client import GpuSched
from gpusched.doctor import examine, read_gpus, read_host
from gpusched.doctor.findings import Finding, Status, as_text
from gpusched.doctor.readings import (
    Daemon,
    Directory,
    Disk,
    GpuFacts,
    Gpus,
    Host,
    Readings,
    Subject,
)
from gpusched.mechanisms import programs
from gpusched.mechanisms.criu.program import NOT_ROOT, Found, Program, Rejected
from gpusched.units import GIB, MIB

HAS_DRIVER = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
without_driver = pytest.mark.skipif(HAS_DRIVER, reason="this machine has an NVIDIA driver")
ALL_CAPABILITIES = (1 << 41) - 1
H100 = GpuFacts(
    index=0,
    name="NVIDIA H100 80GB HBM3",
    uuid="GPU-0",
    total_bytes=80 * GIB,
    persistence=True,
    mig=False,
)
CRIU = Program(path="/usr/sbin/criu", version=(4, 2, 1), executable="/usr/sbin/criu")
SUBJECT = Subject(socket_path=Path("/tmp/gpusched.sock"), state_dir=Path("/var/lib/gpusched"))
GPUS = Gpus(
    module_version="580.159.04",
    driver_version="580.159.04",
    gpus=(H100,),
    bindings_version="13.3.1",
)
HOST = Host(
    python="3.12.3",
    kernel="6.18.0",
    capabilities=ALL_CAPABILITIES,
    ram_total_bytes=128 * GIB,
    ram_available_bytes=120 * GIB,
    huge_pages="always",
    cgroup="/sys/fs/cgroup",
    cgroup_writable=True,
    compiler="/usr/bin/cc",
    library="/opt/gpusched/direct.abi3.so",
    clocksource="tsc",
    machine="SXM5",
    shm_bytes=64 * GIB,
)
DIRECTORY = Directory(path="/var/lib/gpusched", writable=True, free_bytes=500 * GIB)
HEALTHY = Readings(
    subject=SUBJECT,
    host=HOST,
    gpus=GPUS,
    disk=Disk(state=DIRECTORY, snapshots=DIRECTORY),
    criu=Found(program=CRIU),
    daemon=Daemon(socket="/tmp/gpusched.sock", version=gpusched.__version__, backend="cuda", pid=7),
)
NO_GPU = Gpus(
    nvml_error="NVML Shared Library Not Found",
    bindings_version="13.3.1",
    cuda_error="the CUDA driver library cannot be loaded",
)
IN_CONTAINER = replace(
    HOST,
    capabilities=0xA80425FB,  # what docker grants
    container="docker",
    own_pid_namespace=True,
    shm_bytes=64 * MIB,
    cgroup_writable=False,
)
USER = replace(HOST, euid=1000, capabilities=0, memlock_bytes=8 * MIB, ptrace_scope=1)


def judged(readings: Readings) -> dict[str, Finding]:
    """By name. Whatever the machine: every lack has its fix, what is well has none, and names are there once."""
    found = examine.judge(readings)
    assert all(bool(f.fix) == (f.status is not Status.OK) for f in found), as_text(found)
    assert all("\n" not in f.found + f.fix and f.found for f in found)
    by_name = {f.name: f for f in found}
    assert len(by_name) == len(found)
    return by_name


def on(
    *, gpus: Gpus | None = GPUS, host: Host = HOST, allow_old_driver: bool = False
) -> dict[str, Finding]:
    subject = replace(SUBJECT, allow_old_driver=allow_old_driver)
    return judged(replace(HEALTHY, gpus=gpus, host=host, subject=subject))


def names(found: Mapping[str, Finding], status: Status) -> set[str]:
    return {name for name, finding in found.items() if finding.status is status}


# -- whole machines -------------------------------------------------------------------------------


def test_on_a_sound_machine_everything_is_ok() -> None:
    found = judged(HEALTHY)
    assert names(found, Status.OK) == set(found)
    assert "NVIDIA H100 80GB HBM3 80.0 GiB" in found["nvml"].found
    assert len(found) == 24


def test_a_machine_without_a_gpu_is_told_to_install_a_driver_or_simulate() -> None:
    found = on(gpus=NO_GPU)
    assert names(found, Status.FAIL) == {"driver", "nvml", "checkpoint_api"}
    assert "no NVIDIA driver is loaded" in found["driver"].found
    assert "apt-get install nvidia-headless-580-server" in found["driver"].fix
    assert "--backend sim" in found["driver"].fix


def test_a_container_without_a_driver_is_told_to_take_the_hosts() -> None:
    found = on(gpus=NO_GPU, host=IN_CONTAINER)
    assert "--gpus all" in found["driver"].fix
    assert "apt-get" not in found["driver"].fix


def test_a_container_is_told_what_to_be_started_with() -> None:
    found = on(host=IN_CONTAINER)
    assert names(found, Status.FAIL) == set()
    assert names(found, Status.WARN) == {"permissions", "container", "shm", "cgroups"}
    assert "--pid=host" in found["container"].fix
    assert "--shm-size" in found["shm"].fix
    assert "--cgroupns=host" in found["cgroups"].fix
    for name in ("SYS_PTRACE", "SYS_ADMIN", "SYS_RESOURCE"):
        assert f"--cap-add {name}" in found["permissions"].fix
    assert "--cap-add KILL" not in found["permissions"].fix  # it has that one


def test_an_ordinary_user_is_told_what_a_daemon_of_theirs_can_do() -> None:
    found = on(host=USER)
    assert names(found, Status.FAIL) == set()
    assert names(found, Status.WARN) == {"permissions", "memlock", "ptrace_scope"}
    assert "your own processes alone" in found["permissions"].found
    assert "sudo" in found["permissions"].fix


def test_a_user_who_may_not_open_the_devices_fails() -> None:
    found = on(host=USER, gpus=replace(GPUS, denied_devices=("/dev/nvidia0", "/dev/nvidiactl")))
    assert found["devices"].status is Status.FAIL
    assert "/dev/nvidia0, /dev/nvidiactl" in found["devices"].found


# -- driver, NVML, checkpoint calls ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "allowed", "expected"),
    [
        ("535.129.03", False, Status.FAIL),
        ("569.99", True, Status.FAIL),
        ("570.86.10", False, Status.FAIL),
        ("579.99", False, Status.FAIL),
        ("570.86.10", True, Status.WARN),
        ("579.99", True, Status.WARN),
        ("580.65.06", False, Status.OK),
        ("595.10", False, Status.OK),
        ("unknown", True, Status.FAIL),
    ],
)
def test_the_drivers_version_decides(version: str, allowed: bool, expected: Status) -> None:
    finding = on(gpus=replace(GPUS, driver_version=version), allow_old_driver=allowed)["driver"]
    assert finding.status is expected
    assert version in finding.found
    suggests = "--allow-old-driver" in finding.fix
    assert suggests == (version[:2] == "57" and not allowed)


def test_an_old_driver_in_a_container_is_the_hosts_to_update() -> None:
    found = on(gpus=replace(GPUS, driver_version="550.54"), host=IN_CONTAINER)
    assert found["driver"].fix.startswith("on the container's host")


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        ("Driver/library version mismatch", "reboot"),
        ("Insufficient Permissions", "sudo gpusched doctor"),
        ("NVML Shared Library Not Found", "libnvidia-compute"),
        ("nvidia-ml-py cannot be imported (x)", "pip install nvidia-ml-py"),
    ],
)
def test_nvmls_error_has_its_own_fix(error: str, fix: str) -> None:
    found = on(gpus=replace(NO_GPU, module_version="580.1", nvml_error=error))
    assert found["nvml"].status is Status.FAIL
    assert error in found["nvml"].found
    assert fix in found["nvml"].fix
    assert found["driver"].status is Status.OK  # the kernel module is loaded


@pytest.mark.parametrize(
    ("lack", "words"),
    [
        ({"bindings_version": None, "cuda_error": "cuda-bindings cannot be imported"}, "pip"),
        ({"missing_calls": ("cuCheckpointProcessLock",)}, "580"),
        ({"cuda_error": "cuInit: CUDA_ERROR_NO_DEVICE"}, "CUDA_VISIBLE_DEVICES"),
        ({"unfinished": "cuInit does not answer"}, "dmesg"),
    ],
)
def test_each_lack_of_the_checkpoint_calls_fails(lack: dict[str, Any], words: str) -> None:
    finding = on(gpus=replace(GPUS, **lack))["checkpoint_api"]
    assert finding.status is Status.FAIL
    assert words in finding.fix


def test_modes_of_the_gpus() -> None:
    second = replace(H100, index=1, uuid="GPU-1")

    def with_gpus(*gpus: GpuFacts) -> dict[str, Finding]:
        return on(gpus=replace(GPUS, gpus=gpus))

    off = with_gpus(replace(H100, persistence=False), second)["persistence"]
    assert (off.status, off.fix) == (Status.WARN, "sudo nvidia-smi -pm 1")
    some = with_gpus(H100, replace(second, mig=True))["mig"]
    assert some.status is Status.WARN
    assert "sudo nvidia-smi -i 1 -mig 0" in some.fix
    assert (
        with_gpus(replace(H100, mig=True), replace(second, mig=True))["mig"].status is Status.FAIL
    )
    silent = with_gpus(replace(H100, mig=None, persistence=None))
    assert silent["mig"].status is silent["persistence"].status is Status.OK
    mps = on(gpus=replace(GPUS, mps_pids=(41, 42)))["mps"]
    assert mps.status is Status.WARN
    assert "pid 41, 42" in mps.found
    assert on(gpus=replace(GPUS, gpus=()))["nvml"].status is Status.FAIL


# -- what the probe of the GPUs printed -----------------------------------------------------------

NVML_LINE = json.dumps(
    {
        "driver_version": "580.1",
        "gpus": [
            {
                "index": 0,
                "name": "X",
                "uuid": "GPU-0",
                "total_bytes": 5,
                "persistence": None,
                "mig": None,
            }
        ],
    }
)
BINDINGS_LINE = json.dumps({"bindings_version": "13", "missing_calls": []})


def test_a_cuinit_that_hangs_does_not_hide_what_nvml_said() -> None:
    ran = programs.Ran(code=None, stdout=f"{NVML_LINE}\n{BINDINGS_LINE}\n", stderr="")
    gpus = read_gpus.parse(ran, module_version="580.1")
    assert gpus.driver_version == gpus.module_version == "580.1"
    assert [gpu.name for gpu in gpus.gpus] == ["X"]
    assert gpus.unfinished == "cuInit does not answer"
    assert on(gpus=gpus)["checkpoint_api"].found == "cuInit does not answer"


def test_a_probe_that_crashes_in_the_middle_of_a_line_is_a_finding() -> None:
    ran = programs.Ran(code=-11, stdout=NVML_LINE[:20], stderr="Traceback\nKaboom\n")
    gpus = read_gpus.parse(ran)
    assert gpus.unfinished == "NVML ends the program (Kaboom)"
    assert {"nvml", "checkpoint_api"} <= names(on(gpus=gpus), Status.FAIL)


def test_a_probe_that_ends_well_is_complete() -> None:
    ran = programs.Ran(code=0, stdout=f"{NVML_LINE}\n{BINDINGS_LINE}\n{{}}\n", stderr="")
    found = on(gpus=read_gpus.parse(ran))
    assert found["checkpoint_api"].status is found["nvml"].status is Status.OK


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct", "535.129.03"),
        ("something else", None),
    ],
)
def test_the_kernel_modules_version_is_read(text: str, version: str | None) -> None:
    assert read_gpus.parse_module_version(text) == version


# -- the host -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ram", "room", "gpus", "words"),
    [
        (128, None, 1, None),
        (64, None, 1, "a model that fills a GPU cannot be frozen"),
        (128, None, 2, "not every GPU's contents"),
        (128, 32, 1, "this control group may use 32.0 GiB"),
        (16, None, 0, None),
    ],
)
def test_host_ram_is_held_against_vram(
    ram: int, room: int | None, gpus: int, words: str | None
) -> None:
    host = replace(
        HOST,
        ram_total_bytes=ram * GIB,
        ram_available_bytes=ram * GIB,
        group_room_bytes=None if room is None else room * GIB,
    )
    finding = on(host=host, gpus=replace(GPUS, gpus=(H100,) * gpus))["host_ram"]
    assert finding.status is (Status.OK if words is None else Status.WARN)
    assert words is None or words in finding.found


@pytest.mark.parametrize(
    ("change", "name", "expected"),
    [
        ({"kernel": "5.3.0"}, "kernel", Status.FAIL),
        ({"kernel": "5.4.0-generic"}, "kernel", Status.OK),
        ({"huge_pages": "madvise"}, "huge_pages", Status.WARN),
        ({"huge_pages": "never"}, "huge_pages", Status.WARN),
        ({"huge_pages": None}, "huge_pages", Status.WARN),
        ({"memlock_bytes": 8 * MIB}, "memlock", Status.OK),  # CAP_IPC_LOCK
        ({"memlock_bytes": 8 * MIB, "capabilities": 0}, "memlock", Status.WARN),
        ({"ptrace_scope": 0, "capabilities": 0}, "ptrace_scope", Status.OK),
        ({"ptrace_scope": 1}, "ptrace_scope", Status.OK),  # CAP_SYS_PTRACE
        ({"ptrace_scope": 2, "capabilities": 0}, "ptrace_scope", Status.WARN),
        ({"ptrace_scope": 3}, "ptrace_scope", Status.WARN),
        ({"cgroup": None}, "cgroups", Status.WARN),
        ({"cgroup_writable": False}, "cgroups", Status.WARN),
        ({"compiler": None}, "compiler", Status.WARN),
        ({"library": ""}, "library", Status.WARN),
        ({"clocksource": "hpet"}, "clock", Status.WARN),
        ({"clocksource": "kvm-clock"}, "clock", Status.OK),
        ({"container": "podman"}, "container", Status.OK),
        ({"own_pid_namespace": True, "container": "podman"}, "container", Status.WARN),
        ({"shm_bytes": None}, "shm", Status.WARN),
        ({"ram_total_bytes": None}, "host_ram", Status.WARN),
    ],
)
def test_each_fact_of_the_host_is_judged(
    change: dict[str, Any], name: str, expected: Status
) -> None:
    assert on(host=replace(HOST, **change))[name].status is expected


def test_a_state_directory_that_may_not_be_written_fails_and_a_small_disk_warns() -> None:
    locked = replace(DIRECTORY, writable=False)
    small = replace(DIRECTORY, path="/snapshots", free_bytes=2 * GIB)
    found = judged(replace(HEALTHY, disk=Disk(state=locked, snapshots=small)))
    assert found["state_dir"].status is Status.FAIL
    assert found["disk"].status is Status.WARN
    assert "too little to hibernate 80.0 GiB" in found["disk"].found
    found = judged(replace(HEALTHY, disk=Disk(state=DIRECTORY, snapshots=locked)))
    assert found["disk"].status is Status.WARN


def test_the_directory_that_would_be_made_is_measured(tmp_path: Path) -> None:
    subject = replace(SUBJECT, state_dir=tmp_path / "a" / "b", disk_dir=tmp_path)
    disk = read_host.read_disk(subject)
    assert disk.state.writable
    assert disk.state.path == str(tmp_path / "a" / "b")
    assert disk.snapshots.free_bytes > 0
    (tmp_path / "file").write_text("")
    below_a_file = read_host.read_disk(replace(subject, state_dir=tmp_path / "file" / "x"))
    assert not below_a_file.state.writable


BAD_CRIU = Rejected(path="/c", version=(4, 1, 1), reason="no socket")


@pytest.mark.parametrize(
    ("found", "chosen", "expected", "words"),
    [
        (Found(), None, Status.WARN, "not found"),
        (Found(program=CRIU), None, Status.OK, "/usr/sbin/criu 4.2.1 saved"),
        (Found(program=CRIU, rejected=(BAD_CRIU,)), None, Status.OK, "/c 4.1.1: no socket"),
        (Found(program=CRIU, rejected=(BAD_CRIU,)), "/c", Status.WARN, "/c 4.1.1: no socket"),
        (Found(rejected=(BAD_CRIU,)), None, Status.WARN, "no CRIU works here: /c 4.1.1: no socket"),
        (Found(rejected=(Rejected(path="/c", reason=NOT_ROOT),)), None, Status.WARN, "needs root"),
    ],
)
def test_criu_is_judged_by_its_trial(
    found: Found, chosen: str | None, expected: Status, words: str
) -> None:
    readings = replace(HEALTHY, criu=found, subject=replace(SUBJECT, criu=chosen))
    finding = judged(readings)["criu"]
    assert finding.status is expected
    assert words in finding.found


def test_the_daemon_is_judged_by_its_answer() -> None:
    def said(**change: Any) -> Finding:
        assert HEALTHY.daemon is not None
        return judged(replace(HEALTHY, daemon=replace(HEALTHY.daemon, **change)))["daemon"]

    assert "simulated GPUs" in said(backend="sim").found
    assert said(version="0.0.0").status is Status.WARN
    assert said(error="not running").fix == "sudo gpusched daemon"
    assert "it hangs" in said(error="it hangs\nsecond line").found


# -- what hangs or fails --------------------------------------------------------------------------


def test_a_topic_that_hangs_or_raises_is_a_finding_and_holds_up_nothing() -> None:
    never = threading.Event()
    try:
        readings = examine.gather(
            SUBJECT,
            {
                "gpus": (never.wait, 0.05),
                "criu": (lambda: 1 // 0, 5.0),
                "host": (lambda: HOST, 5.0),
            },
        )
    finally:
        never.set()
    assert readings.host is HOST
    found = judged(readings)
    assert (found["gpus"].status, found["gpus"].found) == (
        Status.FAIL,
        "did not answer within 0.05 s",
    )
    assert found["criu"].status is Status.WARN
    assert "ZeroDivisionError" in found["criu"].found


def test_a_program_that_hangs_is_ended_with_its_children_and_its_output_kept(
    tmp_path: Path,
) -> None:
    pid_file = tmp_path / "pid"
    script = (
        f"sleep 1000 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}; echo first; wait"
    )
    ran = programs.run(["sh", "-c", script], 1.0)
    assert (ran.code, ran.stdout) == (None, "first\n")
    stat = Path(f"/proc/{pid_file.read_text().strip()}/stat")
    wait_until(
        lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX",
        within_s=5,
        what="the child is gone",
    )


# -- the command on this machine ------------------------------------------------------------------


def doctor(
    *arguments: str, within_s: float = 60.0, **more_env: str
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("GPUSCHED_")} | more_env
    return subprocess.run(
        [sys.executable, "-m", "gpusched", "-s", "/nonexistent/s", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
        cwd=ROOT,
        env=env,
    )


@without_driver
def test_on_a_machine_without_a_driver_the_command_says_so_and_fails(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = doctor("--state-dir", str(tmp_path), within_s=30)
    assert time.monotonic() - begun < 10
    assert done.returncode == 5, done.stderr
    lines = done.stdout.splitlines()
    (driver,) = [i for i, line in enumerate(lines) if line.startswith("fail  driver: no NVIDIA")]
    assert lines[driver + 1].startswith("      fix: ")
    assert lines[-1].endswith("3 failed")
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


@without_driver
def test_json_has_every_finding_and_no_trial_is_made_where_something_fails(tmp_path: Path) -> None:
    done = doctor("--json", "--selftest", "--state-dir", str(tmp_path))
    assert done.returncode == 5
    report = json.loads(done.stdout)
    assert report["ok"] is False
    assert report["selftest"] == []
    assert report["selftest_error"] == "not run: findings failed"
    found = {f["name"]: f for f in report["findings"]}
    assert found["driver"].keys() == {"name", "status", "found", "fix"}
    assert {n for n, f in found.items() if f["status"] == "fail"} == {
        "driver",
        "nvml",
        "checkpoint_api",
    }
    assert found["daemon"]["status"] == "warn"


#: Libraries that speak of a driver as the environment scripts it; the probe imports them in place of the real ones.
SCRIPTED_NVML = """
import os
class NVMLError(Exception): pass
class _Facts: busId, total = "0000:01:00.0", 80 << 30
def nvmlInit(): pass
def nvmlSystemGetDriverVersion(): return os.environ["SCRIPTED_DRIVER"]
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetPciInfo(handle): return _Facts
def nvmlDeviceGetName(handle): return b"Scripted GPU"
def nvmlDeviceGetUUID(handle): return "GPU-0"
def nvmlDeviceGetMemoryInfo(handle): return _Facts
def nvmlDeviceGetMigMode(handle): raise NVMLError("not supported")
def nvmlDeviceGetPersistenceMode(handle): return 0
"""
SCRIPTED_CUDA = """
import enum, os, time
class CUresult(enum.Enum): CUDA_SUCCESS, CUDA_ERROR_NOT_FOUND = 0, 500
def cuInit(flags): return (CUresult.CUDA_SUCCESS,)
def cuGetProcAddress(name, version, flags):
    if os.environ["SCRIPTED_DRIVER"] < "570":
        return CUresult.CUDA_ERROR_NOT_FOUND, 0, None
    return CUresult.CUDA_SUCCESS, 4711, None
for _call in ("Lock", "Checkpoint", "Restore", "Unlock", "GetState"):
    globals()[f"cuCheckpointProcess{_call}"] = None
"""


@without_driver
@pytest.mark.parametrize(
    ("version", "options", "code", "lines"),
    [
        (
            "550.54.14",
            ["--allow-old-driver"],
            5,
            ["fail  driver: 550.54.14 has no", "fail  checkpoint_api: missing: cuCheckpointPro"],
        ),
        ("575.57.08", [], 5, ["fail  driver: 575.57.08 may lose", "ok    checkpoint_api: all"]),
        ("575.57.08", ["--allow-old-driver"], 0, ["warn  driver: 575.57.08 may lose"]),
        ("580.159.04", [], 0, ["ok    driver: 580.159.04", "warn  persistence: off on GPU 0"]),
    ],
)
def test_the_command_with_a_scripted_driver(
    tmp_path: Path, version: str, options: list[str], code: int, lines: list[str]
) -> None:
    bindings = tmp_path / "cuda" / "bindings"
    bindings.mkdir(parents=True)
    (bindings / "__init__.py").write_text("")
    (bindings / "driver.py").write_text(SCRIPTED_CUDA)
    (tmp_path / "pynvml.py").write_text(SCRIPTED_NVML)
    done = doctor(
        *("--state-dir", str(tmp_path / "state"), *options),
        PYTHONPATH=str(tmp_path),
        SCRIPTED_DRIVER=version,
    )
    assert done.returncode == code, done.stdout
    for line in [*lines, "ok    nvml: 1 GPU (0: Scripted GPU 80.0 GiB)"]:
        assert f"\n{line}" in f"\n{done.stdout}"


def test_on_a_terminal_there_is_a_table_with_the_fixes(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "gpusched", "-s", "/nonexistent/s", "doctor"),
            *("--backend", "sim", "--state-dir", str(tmp_path)),
        ],
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=ROOT,
    ) as process:
        os.close(follower)
        data = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the other side has closed
                break
            if not part:
                break
            data += part
        os.close(leader)
        assert process.wait(30) == 0
    text = data.decode()
    assert "→ sudo gpusched daemon" in text
    assert "\x1b[" in text
    assert "0 failed" in text


def test_nothing_of_the_doctor_is_imported_before_it_is_asked() -> None:
    program = (
        "import sys, gpusched.cli.main, gpusched.cli.doctor_command\n"
        "heavy = ('cuda', 'pynvml', 'rich', 'msgspec', 'gpusched.doctor', 'gpusched.selftest')\n"
        "print([m for m in sys.modules if m.startswith(heavy)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "[]"


# -- the trial ------------------------------------------------------------------------------------


def test_the_selftest_freezes_thaws_and_verifies_on_simulated_gpus(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # short: a socket is made in it
        done = doctor(
            *("--selftest", "--backend", "sim", "--json", "--state-dir", str(tmp_path)),
            TMPDIR=scratch,
        )
        assert list(Path(scratch).iterdir()) == []  # the private daemon's directory is gone
        assert processes_naming(scratch) == []
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["ok"], report["selftest_error"]) == (True, "")
    (trial,) = report["selftest"]
    assert trial["simulated"] is True
    assert trial["error"] == ""
    assert len(trial["freeze_ms"]) == len(trial["thaw_ms"]) == 3
    assert trial["freeze_gb_s"] > 0 < trial["thaw_gb_s"]
    assert trial["ceiling_to_host_gb_s"] is None


def test_the_line_of_a_trial_says_simulated_or_names_the_ceiling() -> None:
    from gpusched.cli.doctor_command import _trial_line

    real = selftest.Trial(
        gpu=1,
        name="H100",
        simulated=False,
        mem_mb=2000,
        freeze_ms=(1000, 900, 1100),
        thaw_ms=(500, 450, 550),
        ceiling_to_host_gb_s=54.4,
        ceiling_to_device_gb_s=51.1,
    )
    assert _trial_line(real) == (
        "selftest GPU 1 (H100): 2000 MiB, 3 times right; "
        "freeze 2.1 GB/s (900-1100 ms; pinned copy 54.4 GB/s), "
        "thaw 4.19 GB/s (450-550 ms; pinned copy 51.1 GB/s)"
    )
    assert "(H100) [simulated]: " in _trial_line(replace(real, simulated=True))
    assert _trial_line(replace(real, error="oh")) == "selftest GPU 1 (H100): FAILED: oh"


class Scripted:
    """A client whose workload shows other contents after its second thaw."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.thaws = 0
        self.killed: list[str] = []

    def run(self, _name: str, _command: list[str], gpu: int) -> None:
        self.lines = ["ready digest=aa"]

    def freeze(self, _name: str) -> dict[str, int]:
        return {"duration_ms": 4, "mem_mb": 100}

    def thaw(self, _name: str) -> dict[str, int]:
        self.thaws += 1
        return {"duration_ms": 2}

    def kill(self, name: str, *, force: bool) -> None:
        self.killed.append(name)

    def call(self, _method: str, **_params: Any) -> dict[str, str]:
        self.lines.append(f"tick {len(self.lines)} digest={'bb' if self.thaws == 2 else 'aa'}")
        return {"output": "\n".join(self.lines)}


def test_contents_that_changed_are_an_error_of_the_trial() -> None:
    client = Scripted()
    trial = selftest.Trial(gpu=3, name="X", simulated=False)
    done = selftest._freeze_and_thaw(cast("GpuSched", client), trial, 64 * MIB)
    assert done.error == "the contents changed"
    assert done.freeze_ms == (4, 4)
    assert client.killed == ["selftest-3"]


@without_driver
def test_a_pinned_copy_without_a_driver_says_why_and_no_more() -> None:
    ran = programs.run([sys.executable, "-m", "gpusched.doctor.pinned_copy", "1024"], 30)
    assert ran.code == 1
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.gpu
def test_the_selftest_passes_on_every_real_gpu(tmp_path: Path) -> None:
    done = doctor("--selftest", "--json", "--state-dir", str(tmp_path), within_s=110)
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["selftest"]
    for trial in report["selftest"]:
        assert trial["error"] == trial["note"] == ""
        assert 0 < trial["freeze_gb_s"] < trial["ceiling_to_host_gb_s"] * 1.1
        assert 0 < trial["thaw_gb_s"] < trial["ceiling_to_device_gb_s"] * 1.1


# -- a daemon without a driver --------------------------------------------------------------------


@without_driver
@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_a_daemon_without_a_driver_ends_with_what_the_doctor_found(
    tmp_path: Path, backend: str
) -> None:
    socket = tmp_path / "s"
    command = [sys.executable, "-m", "gpusched", "-s", str(socket), "daemon"]
    command += ["--backend", backend]
    command += ["--state-dir", str(tmp_path / "state"), "--log-dir", str(tmp_path / "log")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 5
    error = done.stderr.partition("error: ")[2]
    assert error.startswith("no usable NVIDIA driver")
    assert "\nfail  driver: no NVIDIA driver" in error
    assert "\n      fix: " in error
    assert "warn" not in error
    assert not socket.exists()


def test_where_nothing_failed_there_is_nothing_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "read", lambda _subject, _topics: HEALTHY)
    assert examine.why_no_driver(SUBJECT) == ""
