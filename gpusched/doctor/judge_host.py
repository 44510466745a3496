"""Findings on the host: rights, memory, limits, the kind of machine, disk, CRIU, the daemon. Pure."""

from __future__ import annotations

from typing import Final

from gpusched.doctor.findings import Finding, Status, fail, ok, warn
from gpusched.doctor.readings import Daemon, Disk, Host
from gpusched.mechanisms.criu.program import NOT_ROOT, Found, parse_version
from gpusched.units import GIB, format_size

OLDEST_KERNEL: Final = (5, 4)  # waiting by pidfd
#: Which capability (number in CapEff) is needed, and for what.
_CAPABILITIES: Final = {
    "KILL": (5, "signalling the processes of other users"),
    "SETGID": (6, "running commands as their users"),
    "SETUID": (7, "running commands as their users"),
    "SYS_PTRACE": (19, "examining the processes of other users"),
    "SYS_ADMIN": (21, "namespaces, and with them the disk tier"),
    "SYS_RESOURCE": (
        24,
        "guarding frozen processes from the OOM killer, saving other users' processes",
    ),
}
_SYS_PTRACE: Final = 1 << 19
_IPC_LOCK: Final = 1 << 14
_SLOW_CLOCKS: Final = frozenset({"hpet", "acpi_pm", "jiffies", "pit"})
_LITTLE_SHM_BYTES: Final = GIB


def judge(host: Host, vram_bytes: int, largest_bytes: int) -> list[Finding]:
    """``vram_bytes`` of all GPUs together, ``largest_bytes`` of the largest; 0 where there are none."""
    return [
        ok("python", host.python),
        _kernel(host),
        _permissions(host),
        _host_ram(host, vram_bytes, largest_bytes),
        _huge_pages(host),
        _memlock(host),
        _ptrace_scope(host),
        _cgroups(host),
        _compiler(host),
        _library(host),
        _clock(host),
        _container(host),
        _shm(host),
    ]


def _kernel(host: Host) -> Finding:
    if parse_version(host.kernel) < OLDEST_KERNEL:
        need = ".".join(map(str, OLDEST_KERNEL))
        return fail(
            "kernel",
            f"{host.kernel} cannot wait for processes by pidfd",
            f"boot a kernel {need} or newer",
        )
    return ok("kernel", host.kernel)


def _permissions(host: Host) -> Finding:
    if not host.is_root:
        return warn(
            "permissions",
            f"uid {host.euid}: a daemon of yours serves your own processes alone, without the disk tier",
            "run it as root: sudo gpusched daemon",
        )
    lacks = {
        name: why for name, (bit, why) in _CAPABILITIES.items() if not host.capabilities >> bit & 1
    }
    if lacks:
        reasons = "; ".join(dict.fromkeys(lacks.values()))
        granted = " ".join(f"--cap-add {name}" for name in lacks)
        return warn(
            "permissions",
            f"root without CAP_{', CAP_'.join(lacks)}: no {reasons}",
            f"docker run {granted} ... (or --privileged)"
            if host.container
            else "run it as root without restrictions",
        )
    return ok("permissions", "root, with every capability that is needed")


def _host_ram(host: Host, vram_bytes: int, largest_bytes: int) -> Finding:
    total, available = host.ram_total_bytes, host.ram_available_bytes
    if total is None or available is None:
        return warn("host_ram", "cannot be read", "see whether /proc is mounted")
    found = f"{format_size(total)}, {format_size(available)} available"
    room = total
    if host.group_room_bytes is not None:
        room = min(total, host.group_room_bytes)
        found += f"; this control group may use {format_size(host.group_room_bytes)} more"
    if not vram_bytes:
        return ok("host_ram", found)
    found += f"; VRAM {format_size(vram_bytes)}"
    if room < largest_bytes:
        return warn(
            "host_ram",
            f"{found}: a model that fills a GPU cannot be frozen, since it needs its VRAM in RAM",
            "add RAM or raise the control group's limit, and freeze smaller models",
        )
    if room < vram_bytes:
        return warn(
            "host_ram",
            f"{found}: not every GPU's contents can be frozen at the same time",
            "add RAM or raise the control group's limit; --ram-budget says how much of it snapshots may take",
        )
    return ok("host_ram", found)


def _huge_pages(host: Host) -> Finding:
    name = "huge_pages"
    if host.huge_pages == "always":
        return ok(name, "always")
    if host.huge_pages is None:
        return warn(
            name,
            "this kernel has no transparent huge pages: freezes take longer",
            "boot a kernel that has them",
        )
    return warn(
        name,
        f"{host.huge_pages}: the driver's copies get none, and freezes take longer than with always",
        "echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    )


def _memlock(host: Host) -> Finding:
    if host.memlock_bytes is None:
        return ok("memlock", "unlimited")
    found = format_size(host.memlock_bytes)
    if host.capabilities & _IPC_LOCK:
        return ok("memlock", f"{found}, which CAP_IPC_LOCK lifts")
    return warn(
        "memlock",
        f"{found}: programs may lock no more host memory than that",
        "ulimit -l unlimited; in a systemd unit LimitMEMLOCK=infinity; docker run --ulimit memlock=-1",
    )


def _ptrace_scope(host: Host) -> Finding:
    name, scope = "ptrace_scope", host.ptrace_scope
    if scope is None:
        return ok(name, "not restricted (no Yama)")
    if scope >= 3:
        return warn(
            name,
            f"{scope}: nobody may trace, so CRIU cannot save processes to disk",
            "echo kernel.yama.ptrace_scope=1 | sudo tee /etc/sysctl.d/10-ptrace.conf, and reboot",
        )
    if scope and not host.capabilities & _SYS_PTRACE:
        return warn(
            name,
            f"{scope}: without CAP_SYS_PTRACE only one's own children may be traced, so adopting others may fail",
            "run as root, or: sudo sysctl kernel.yama.ptrace_scope=0",
        )
    return ok(name, f"{scope}")


def _cgroups(host: Host) -> Finding:
    if host.cgroup and host.cgroup_writable:
        return ok("cgroups", f"version 2, {host.cgroup} may be written")
    found = (
        f"{host.cgroup} may not be written"
        if host.cgroup
        else "no version 2 hierarchy with our own group in it"
    )
    if host.cgroup and not host.is_root:
        fix = "run as root"
    elif host.container:
        fix = "docker run --cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup:rw ..."
    elif host.cgroup:
        fix = "run it where its control group may be written"
    else:
        fix = "boot with systemd.unified_cgroup_hierarchy=1"
    return warn("cgroups", f"{found}: a child that leaves its tree may be missed", fix)


def _compiler(host: Host) -> Finding:
    if host.compiler:
        return ok("compiler", host.compiler)
    return warn(
        "compiler",
        "no C compiler: native parts are left out of an installation",
        "sudo apt-get install gcc libc6-dev (or: sudo dnf install gcc glibc-devel)",
    )


def _library(host: Host) -> Finding:
    if host.library:
        return ok("library", host.library)
    return warn(
        "library",
        "VRAM moves by the driver's own copy, several times slower: the library that goes past it was not built",
        "install a C compiler, then gpusched once more",
    )


def _clock(host: Host) -> Finding:
    if host.clocksource in _SLOW_CLOCKS:
        return warn(
            "clock",
            f"{host.clocksource} is slow to read: short times are measured badly",
            "cat /sys/devices/system/clocksource/clocksource0/available_clocksource; boot with clocksource=tsc",
        )
    return ok("clock", host.clocksource or "unknown")


def _container(host: Host) -> Finding:
    kind = "virtual machine" if host.virtual else "physical machine"
    kind += f" ({host.machine})" if host.machine else ""
    if not host.container:
        return ok("container", f"none; {kind}")
    found = f"{host.container}, on a {kind}"
    if host.own_pid_namespace:
        return warn(
            "container",
            f"{found}, with a pid namespace of its own: processes outside cannot be managed, and NVML may count by "
            "the host's pids",
            "docker run --pid=host ...",
        )
    return ok("container", f"{found}, with the host's pids")


def _shm(host: Host) -> Finding:
    if host.shm_bytes is None:
        return warn(
            "shm",
            "no /dev/shm: data loaders and simulated GPUs need it",
            "sudo mount -t tmpfs tmpfs /dev/shm",
        )
    found = f"{format_size(host.shm_bytes)} in /dev/shm"
    if host.shm_bytes < _LITTLE_SHM_BYTES:
        fix = (
            "docker run --shm-size=8g ..."
            if host.container
            else "sudo mount -o remount,size=50% /dev/shm"
        )
        return warn("shm", f"{found}: little for data loaders and simulated GPUs", fix)
    return ok("shm", found)


# -- other topics ---------------------------------------------------------------------------------


def judge_disk(disk: Disk, vram_bytes: int) -> list[Finding]:
    state, snapshots = disk.state, disk.snapshots
    free = f"{snapshots.path}: {format_size(snapshots.free_bytes)} free"
    if state.writable:
        found = ok("state_dir", state.path)
    else:
        found = fail(
            "state_dir",
            f"{state.path} may not be written",
            "run as root, or choose another with --state-dir",
        )
    if not snapshots.writable:
        return [
            found,
            warn(
                "disk",
                f"{free}, and may not be written",
                "choose another directory with --disk-dir",
            ),
        ]
    if snapshots.free_bytes < max(vram_bytes, GIB):
        lack = f"{free}: too little to hibernate " + (
            f"{format_size(vram_bytes)} of VRAM" if vram_bytes else "anything"
        )
        return [found, warn("disk", lack, "choose a larger disk with --disk-dir")]
    return [found, ok("disk", free)]


def judge_criu(criu: Found, chosen: str | None) -> Finding:
    """CRIU is for the disk tier alone: nothing here fails the backend. ``chosen``: the one that was asked for."""
    get = (
        "make criu PREFIX=/opt/gpusched/criu, or install CRIU 4.2 or newer and name it: "
        "GPUSCHED_CRIU=/path/to/criu"
    )
    if any(one.reason == NOT_ROOT for one in criu.rejected):
        return warn("criu", "; ".join(map(str, criu.rejected)), "sudo gpusched doctor")
    if criu.program is None:
        return warn("criu", f"{criu.why_not}: no hibernation to disk, no fork", get)
    version = ".".join(map(str, criu.program.version)) or "of an unknown version"
    found = (
        f"{criu.program.path} {version} saved a process with a listening socket and brought it back"
    )
    if criu.rejected:
        found += f"; not used: {'; '.join(map(str, criu.rejected))}"
    if chosen and criu.rejected:
        return warn("criu", found, f"mend {chosen}, or do without it")
    return ok("criu", found)


def judge_daemon(daemon: Daemon, version: str) -> Finding:
    if daemon.error == "not running":
        return warn("daemon", f"none at {daemon.socket}", "sudo gpusched daemon")
    if daemon.error is not None:
        return warn(
            "daemon",
            f"no answer at {daemon.socket}: {daemon.error.splitlines()[0]}",
            "see its log (journalctl -u gpusched), or start one: sudo gpusched daemon",
        )
    kind = "simulated GPUs" if daemon.backend == "sim" else f"backend {daemon.backend}"
    found = f"{daemon.version}, {kind}, pid {daemon.pid}, at {daemon.socket}"
    if daemon.version != version:
        return warn(
            "daemon", f"{found}; this program is {version}", "restart it: managed processes live on"
        )
    return Finding(name="daemon", status=Status.OK, found=found)
