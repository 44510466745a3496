"""The composition root: builds everything, decides nothing.

    journal, trees, driver helper -> recovery -> engine -> Unix socket

Runs in the foreground until SIGTERM or SIGINT; managed processes live on. See also: ``config.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import logging
import os
import resource
import signal
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import gpusched
from gpusched import errors, preload
from gpusched.config import Settings
from gpusched.engine import recovery
from gpusched.engine.core import Limits, Ports
from gpusched.engine.engine import Engine
from gpusched.engine.model import Process, to_record
from gpusched.engine.moves import Mover
from gpusched.mechanisms import journal as journals
from gpusched.mechanisms import logs
from gpusched.mechanisms.clock import SystemClock
from gpusched.mechanisms.criu import trials
from gpusched.mechanisms.cuda import pool_home
from gpusched.mechanisms.disk import DiskTier
from gpusched.mechanisms.driver_client import DriverClient
from gpusched.mechanisms.host import ProcHost
from gpusched.mechanisms.no_disk import NoDiskTier
from gpusched.mechanisms.notify import notify
from gpusched.mechanisms.trees import TreeKeeper
from gpusched.mechanisms.users import SystemUsers
from gpusched.ports import Description
from gpusched.servers.unix import LogReader, UnixServer
from gpusched.units import format_size

log = logging.getLogger("gpusched.daemon")

#: How long running operations may take to end at a shutdown; systemd's own default is 90 s.
SHUTDOWN_TIMEOUT_S: Final = 80.0
#: How long the helper may take to end after that. It finishes its calls in any case, and the next daemon waits for it.
HELPER_END_S: Final = 3.0
OLD_HELPERS_S: Final = 120.0
#: For contents to go from the pool into the process: memory to memory, of hundreds of GB at most.
ABSORB_S: Final = 600.0


def main(settings: Settings) -> int:
    """Runs the daemon until it is told to stop. Returns the process's exit code; errors go to standard error."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    # Short turns: the loop must not wait for a thread that reads /proc.
    sys.setswitchinterval(0.0005)
    _raise_descriptor_limit()
    try:
        with _only_daemon(settings.state_dir):
            try:
                asyncio.run(_run(settings))
            finally:
                pool_home.release(settings.state_dir)
    except errors.GpuschedError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.family.value
    return 0


async def _run(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    failure: errors.GpuschedError | None = None
    async with asyncio.TaskGroup() as tasks:
        try:
            await _serve(settings, tasks, stop)
        except errors.GpuschedError as error:
            failure = error
        # Everything that still runs only waits for things to happen; nothing of it is left to do.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
    if failure is not None:
        raise failure


async def _serve(settings: Settings, tasks: asyncio.TaskGroup, stop: asyncio.Event) -> None:
    own_directory(settings.log_dir, 0o711, "log", "--log-dir")
    backend = "sim" if settings.backend == "sim" else "cuda"
    clock, users = SystemClock(), SystemUsers()
    host = ProcHost(pool=pool_home.place(settings.state_dir) if backend == "cuda" else None)
    trees = TreeKeeper(settings.state_dir, binds=_shared_directories(settings, backend))
    mark = await _after_old_helpers(settings.state_dir)
    driver = DriverClient(_driver_options(settings, backend), tasks, keep_open=[mark])
    description = await _describe(driver, settings, backend)
    disk = await _disk(settings, trees, clock, driver, description)
    limits = _limits(settings, backend, isolate=settings.isolate and not disk.why_not())

    path = settings.state_dir / "journal"
    memory = _remember(path, backend)
    mover = Mover(driver, trees, clock, settings.lock_timeout_s)
    recover = recovery.Recovery(driver, trees, clock, users, mover, disk)
    processes = await recover.recover(memory)
    journal = journals.FileJournal(path, backend)
    behind = await _begin_journal(journal, processes)

    ports = Ports(
        driver=driver, trees=trees, host=host, clock=clock, journal=journal, users=users, disk=disk
    )
    engine = Engine(ports, description, limits, tasks, version=gpusched.__version__)
    engine.core.journal_is_behind = behind
    engine.take_over(processes)
    tasks.create_task(engine.run(), name="engine")
    server = UnixServer(
        engine, settings.socket_path, settings.group, LogReader(logs.tail, logs.follow)
    )
    await server.start()
    for note in recover.notes:
        engine.core.events.emit("recovery", detail=note)
    _spare_collections()
    _announce(settings, description, len(processes))
    notify("READY=1")
    await stop.wait()
    await _stop(engine, server, driver)
    journal.close()
    disk.close()
    trees.close()


async def _stop(engine: Engine, server: UnixServer, driver: DriverClient) -> None:
    """Waits for what is under way, then takes no more."""
    notify("STOPPING=1")
    log.info("stopping; managed processes live on")
    try:
        await engine.close(SHUTDOWN_TIMEOUT_S)
    except TimeoutError:
        log.error(  # noqa: TRY400 - where it was waiting is no news
            "operations still run after %.0f s; the next daemon sorts them out", SHUTDOWN_TIMEOUT_S
        )
    await server.close()
    driver.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HELPER_END_S):
            await driver.wait_closed()


async def _describe(driver: DriverClient, settings: Settings, backend: str) -> Description:
    """What the driver says of itself. Without one that can serve, the error says what the doctor found."""
    try:
        return await driver.describe()
    except errors.Unsupported as error:
        if backend == "sim":
            raise
        from gpusched.doctor.examine import why_no_driver
        from gpusched.doctor.readings import Subject

        subject = Subject(
            allow_old_driver=settings.allow_old_driver,
            socket_path=settings.socket_path,
            state_dir=settings.state_dir,
        )
        why = await asyncio.to_thread(why_no_driver, subject)
        raise errors.Unsupported(f"{error}\n{why}".strip(), error.details) from error


async def _begin_journal(journal: journals.FileJournal, processes: list[Process]) -> bool:
    """Records what recovery found; True when it cannot be written now.

    A full disk must not keep anyone from seeing, reading and ending their processes: the old journal stays, moves are
    refused because they cannot be recorded, and the engine tries again until there is room.
    """
    try:
        await journal.rewrite([{"proc": to_record(p)} for p in processes])
    except errors.InsufficientDisk as error:
        log.error("%s", error)  # noqa: TRY400 - the reason is in the message
        return True
    return False


async def _after_old_helpers(state_dir: Path) -> int:
    """Waits until no driver helper of an earlier daemon works any more, at most OLD_HELPERS_S.

    What such a helper was told before its daemon died still happens: a lock that waits for its turn does not show in
    the driver's states, and would come on top of whatever recovery decides by them. Every helper shares the lock on
    the descriptor that this returns, and the kernel drops it when the last of them ends.
    """
    fd = os.open(state_dir / "helpers.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = asyncio.get_running_loop().time() + OLD_HELPERS_S
    while asyncio.get_running_loop().time() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            await asyncio.sleep(0.02)
    else:
        log.error(
            "a driver helper of an earlier daemon has not ended in %.0f s; going on", OLD_HELPERS_S
        )
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd


def _remember(path: Path, backend: str) -> recovery.Remembered:
    """The journal's content. One of another backend is refused; an unreadable one is set aside, never deleted."""
    try:
        records = journals.read(path)
    except journals.JournalUnreadable as error:
        aside = path.with_name(f"{path.name}.unreadable-{os.getpid()}")
        path.rename(aside)
        log.error(  # noqa: TRY400 - the reason is in the message
            "the journal cannot be read (%s); kept as %s, going by the trees' own records",
            error,
            aside,
        )
        return recovery.Remembered()
    if records and records[0].get("backend") != backend:
        raise errors.ProtocolMismatch(
            f"{path} was written with the {records[0].get('backend')} backend, not {backend}; "
            "use another --state-dir, or the backend that it belongs to"
        )
    return recovery.replay(records[1:])


def _driver_options(settings: Settings, backend: str) -> list[str]:
    options = ["--backend", backend]
    if backend == "sim":
        options += [
            "--sim-dir",
            str(sim_directory(settings.state_dir)),
            "--sim-gpus",
            str(settings.sim_gpus),
            "--sim-vram-bytes",
            str(settings.sim_vram_bytes),
        ]
    if settings.allow_old_driver:
        options.append("--allow-old-driver")
    if (
        backend == "cuda"
    ):  # whatever the setting is now: what an earlier daemon took out must come back
        options += ["--pool-dir", str(pool_home.prepare(settings.state_dir))]
    return options


def sim_directory(state_dir: Path) -> Path:
    """Where simulated VRAM lies: in shared memory, one place for each state directory."""
    tag = f"{zlib.crc32(os.fsencode(state_dir.resolve())):08x}"
    return Path("/dev/shm") / f"gpusched-sim-{os.geteuid()}-{tag}"  # noqa: S108 - made safely by the backend


def _shared_directories(settings: Settings, backend: str) -> list[tuple[str, str]]:
    """What isolated trees see of the host in /dev/shm: the simulated GPUs, with the tree's own part in its place."""
    if backend != "sim":
        return []
    sim = str(sim_directory(settings.state_dir))
    return [(sim, sim), (sim, f"{sim}/host"), (f"{sim}/trees/{{tree}}/procs", f"{sim}/procs")]


async def _disk(
    settings: Settings,
    trees: TreeKeeper,
    clock: SystemClock,
    driver: DriverClient,
    description: Description,
) -> DiskTier | NoDiskTier:
    """The disk tier, or the reason why there is none. Half a second, once in a boot of the machine."""
    if os.geteuid() != 0:
        return NoDiskTier(
            "the daemon is not root's, and only root's can give a process namespaces of its own"
        )
    found = await asyncio.to_thread(trials.find, settings.criu)
    if found.program is None:
        return NoDiskTier(f"{found.why_not} (gpusched doctor says more)")
    root = settings.disk_dir or settings.state_dir / "images"

    async def absorb(pid: int) -> None:
        await driver.absorb(pid, ABSORB_S)

    return DiskTier(trees, clock, root, found.program, description, absorb)


def _limits(settings: Settings, backend: str, *, isolate: bool) -> Limits:
    forced = (
        {"GPUSCHED_SIM_DIR": str(sim_directory(settings.state_dir))} if backend == "sim" else {}
    )
    return Limits(
        preload=preload.library() if backend == "cuda" and settings.direct else "",
        ram_budget_bytes=settings.ram_budget_bytes,
        user_ram_budget_bytes=settings.user_ram_budget_bytes,
        disk_budget_bytes=settings.disk_budget_bytes,
        ram_reserve_bytes=settings.ram_reserve_bytes,
        log_dir=settings.log_dir,
        lock_timeout_s=settings.lock_timeout_s,
        kill_grace_s=settings.kill_grace_s,
        operation_wait_s=settings.operation_wait_s,
        isolate=isolate,
        default_env=dict(settings.passed_on_env),
        forced_env=forced,
    )


def _spare_collections() -> None:
    """A full garbage collection halts the loop for 10 ms and more, and every hundredth status would cause one."""
    gc.collect()
    gc.freeze()  # what is here at the start stays
    gc.set_threshold(50_000, 20, 20)


def _announce(settings: Settings, description: Description, processes: int) -> None:
    kind = "simulated GPUs" if description.simulated else "GPUs"
    listed = ", ".join(f"{g.name} {format_size(g.total_bytes)}" for g in description.gpus)
    log.info(
        "ready socket=%s backend=%s driver=%s %s=[%s] processes=%d pid=%d",
        settings.socket_path,
        description.backend,
        description.driver_version,
        kind.replace(" ", "_"),
        listed,
        processes,
        os.getpid(),
    )


@contextlib.contextmanager
def _only_daemon(state_dir: Path) -> Iterator[None]:
    """Holds the state directory for this daemon alone. Raises Unavailable when another one has it."""
    try:
        own_directory(state_dir, 0o700, "state", "--state-dir")
        fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise errors.Unavailable(
            f"cannot use the state directory {state_dir}: {error.strerror}; choose another with --state-dir"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise errors.Unavailable(
            f"another daemon uses {state_dir}; stop it, or choose another with --state-dir"
        ) from None
    try:
        yield
    finally:
        os.close(fd)


def own_directory(path: Path, mode: int, what: str, option: str) -> None:
    """Makes ``path``, or takes what is there: ours, and from now on with ``mode``. Raises Unavailable.

    Whoever owned it, or could write in it, could put files there that we trust.
    """
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to another user")
            os.fchmod(fd, mode)
        finally:
            os.close(fd)
    except OSError as error:
        raise errors.Unavailable(
            f"cannot use the {what} directory {path}: {error.strerror}; choose another with {option}"
        ) from error


def _raise_descriptor_limit() -> None:
    """A descriptor for each process and each connection: the soft limit of 1024 is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
