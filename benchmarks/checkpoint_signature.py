"""What a process looks like from outside before a checkpoint, and what the driver then answers: a study on two GPUs.

For each kind of process (plain, managed, peer, CUDA IPC, exported memory, NCCL in several settings): the signs in
/proc and NVML, what ``preflight`` makes of them, the results of lock, checkpoint, restore and unlock, and whether the
contents were right afterwards. Then: how long questions to the driver take, what another user may do, what a caller
killed in the middle leaves behind, what a stopped process does to the calls, and which maps a migration needs.

    python benchmarks/checkpoint_signature.py --out benchmarks/results [--only plain,managed] [--budget 270]

Needs two GPUs and PyTorch, and root for the question about users. Ends within the budget (seconds), writes after every
step and touches no process but its own children. Decides nothing: docs/decisions/0012 does. The processes that it
looks at: ``checkpoint_targets.py``.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint_targets import KINDS, MIB, timed_call
from gpusched.mechanisms.cuda import preflight
from gpusched.mechanisms.cuda.driver import CudaDriver, restore_args
from gpusched.mechanisms.cuda.nvml import Nvml

CALLS = ("lock", "checkpoint", "restore", "unlock")
LIMITS_S = {"lock": 8.0, "checkpoint": 25.0, "restore": 25.0, "unlock": 8.0, "get_state": 3.0}
#: NVLink multicast stays off whatever the caller's environment says: it can take GPUs out of service.
SAFE = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


# -- asking ---------------------------------------------------------------------------------------


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of ``work``, or "hangs": then its thread stays behind, until the target ends or for good."""
    box: list[Any] = []

    def run() -> None:
        try:
            box.append(work())
        except Exception as error:  # noqa: BLE001 - the error is the finding
            box.append(f"raised {error!r:.300}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else f"hangs (> {seconds:.0f} s)"


class Child:
    started: ClassVar[list[Child]] = []

    def __init__(
        self, arguments: Sequence[str], env: dict[str, str] | None = None, **more: Any
    ) -> None:
        script = str(more.pop("script", Path(__file__).resolve().parent / "checkpoint_targets.py"))
        command = [*more.pop("prefix", ()), sys.executable, script, *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SAFE, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **(env or {})},
            **more,
        )
        self.pid = self.process.pid
        self.trace: Any = None  # what an import left in /proc, where there was one
        Child.started.append(self)

    def line(self, seconds: float, wanted: tuple[str, ...]) -> str:
        """The next line that starts with one of ``wanted``; else what was said last, and why there is no more."""
        assert self.process.stdout is not None
        until, last = time.monotonic() + seconds, ""
        fd, buffer = self.process.stdout.fileno(), b""
        while (left := until - time.monotonic()) > 0:
            if not select.select([fd], [], [], left)[0]:
                break
            byte = os.read(fd, 1)
            if not byte:
                return f"ended {self.process.poll()}: {last}"
            buffer += byte
            if byte == b"\n":
                last, buffer = buffer.decode(errors="replace").strip(), b""
                if last.startswith("trace "):
                    self.trace = json.loads(last.removeprefix("trace "))
                if last.startswith(wanted):
                    return last
        return f"silent: {last}"

    def check(self, seconds: float = 20) -> str:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"check\n")
            self.process.stdin.flush()
        except OSError:
            return f"ended {self.process.poll()}"
        return self.line(seconds, ("right", "WRONG", "error"))

    def kill(self) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)


def signature(pid: int) -> dict[str, Any]:
    """Everything in /proc that could tell one kind from another; pids and addresses are left out of the counts."""
    root = Path(f"/proc/{pid}")
    links = [str(link.readlink()) for link in (root / "fd").iterdir() if link.is_symlink()]
    maps = (root / "maps").read_text().splitlines()
    paths = [line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6]
    paths = [
        re.sub(r".*/(?=site-packages/)", "", path) for path in paths
    ]  # where, is the machine's affair
    environ = preflight.parse_environ((root / "environ").read_bytes())
    inodes = preflight.parse_links(links).sockets
    unix = [line.split(maxsplit=7) for line in (root / "net/unix").read_bytes().splitlines()]
    threads = [(task / "comm").read_text().strip() for task in (root / "task").iterdir()]
    return {
        "fds": collections.Counter(re.sub(r"\[\d+\]", "", link) for link in links),
        "maps": collections.Counter(
            p for p in paths if re.search(r"nvidia|/dev/shm|memfd|nccl|libcuda", p)
        ),
        "map_count": len(maps),
        "threads": collections.Counter(threads),
        "environ": {
            k: v for k, v in environ.items() if re.match(r"NCCL|CUDA|TORCH_NCCL|NVSHMEM", k)
        },
        "unix_sockets": [w[7].decode() for w in unix if len(w) == 8 and w[6] in inodes],
    }


class Study:
    def __init__(self, out: Path, budget_s: float) -> None:
        self.driver, self.nvml = CudaDriver.open(), Nvml.open()
        self.gpus = [gpu.uuid for gpu in self.nvml.find_gpus()]
        self.until, self.out, self.lock = time.monotonic() + budget_s, out, threading.Lock()
        about = self.driver.describe()
        self.results: dict[str, Any] = {
            "driver": about.driver_version,
            "gpus": [gpu.name for gpu in about.gpus],
            "kernel": os.uname().release,
            "kinds": {},
        }

    def note(self, where: dict[str, Any], **facts: Any) -> None:
        with self.lock:
            where.update(facts)
            self.out.write_text(json.dumps(self.results, indent=1, default=repr) + "\n")

    def call(self, call: str, pid: int, args: Any = None) -> str:
        from cuda.bindings import driver as cuda

        limit = max(0.1, min(LIMITS_S[call], self.until - time.monotonic()))
        return str(within(limit, lambda: timed_call(cuda, call, pid, args)))

    @contextlib.contextmanager
    def targets(self, kind: str, size: int = 16 * MIB) -> Iterator[list[Child]]:
        count, env = KINDS[kind]
        left, right = socket.socketpair()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [
            Child(
                ["--kind", kind, "--rank", str(rank), "--size", str(size)],
                {**env, "STUDY_LINK": str(link.fileno()), "STUDY_PORT": str(port)},
                pass_fds=[link.fileno()],
            )
            for rank, link in zip(range(count), (left, right), strict=False)
        ]
        left.close()
        right.close()
        try:
            said = [child.line(60, ("ready",)) for child in children]
            if any(line != "ready" for line in said):
                raise RuntimeError(f"{kind} did not start: {said}")
            yield children
        finally:
            for child in children:
                child.kill()

    def kind(self, kind: str) -> None:
        facts: dict[str, Any] = {}
        self.note(self.results["kinds"], **{kind: facts})
        with self.targets(kind) as children:
            pids = [child.pid for child in children]
            usage = self.nvml.usage().processes
            begun = time.monotonic()
            obstacles = [f"{o.kind} {o.message}" for o in self.driver.obstacles(pids)]
            self.note(
                facts,
                obstacles=obstacles,
                obstacles_ms=round((time.monotonic() - begun) * 1000, 2),
                signs=[signature(pid) for pid in pids],
                imports=[child.trace for child in children],
                vram=[list(usage.get(pid, {}).values()) for pid in pids],
                mps=list(self.nvml.mps_pids() or ()),
            )
            for call in CALLS:
                with concurrent.futures.ThreadPoolExecutor() as pool:
                    answers = list(pool.map(lambda pid, call=call: self.call(call, pid), pids))
                self.note(
                    facts,
                    **{call: answers, f"{call}_state": [self.call("get_state", p) for p in pids]},
                )
            with concurrent.futures.ThreadPoolExecutor() as pool:
                self.note(facts, contents=list(pool.map(Child.check, children)))

    # -- single questions

    def questions(self, facts: dict[str, Any]) -> None:
        """How long the driver and NVML take to answer, and whether cuInit costs VRAM."""

        def spread(work: Callable[[], Any], times: int = 200) -> str:
            took = []
            for _ in range(times):
                begun = time.monotonic()
                work()
                took.append((time.monotonic() - begun) * 1000)
            took.sort()
            return f"p50 {took[times // 2]:.3f} ms, p99 {took[times * 99 // 100]:.3f} ms"

        from cuda.bindings import driver as cuda

        ended = subprocess.Popen(["true"])
        ended.wait()
        with self.targets("plain") as [child], subprocess.Popen(["sleep", "60"]) as sleeper:
            for name, pid in (
                ("cuda", child.pid),
                ("non_cuda", sleeper.pid),
                ("vanished", ended.pid),
            ):
                took = spread(functools.partial(cuda.cuCheckpointProcessGetState, pid))
                self.note(facts, **{f"get_state_{name}": [self.call("get_state", pid), took]})
            self.note(
                facts,
                nvml_processes=spread(self.nvml.cuda_pids),
                nvml_usage=spread(self.nvml.usage),
                nvml_mig=spread(self.nvml.mig_pids),
                obstacles=spread(lambda: self.driver.obstacles([child.pid])),
                caller_vram=self.nvml.usage().processes.get(os.getpid(), 0),
            )
            sleeper.kill()

    def other_user(self, facts: dict[str, Any]) -> None:
        """Whether uid 65534 may do the calls, on a process of its own and on one of root."""
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        calls = ["--calls", "get_state,lock,checkpoint,restore,unlock,get_state", "--pid"]
        with tempfile.TemporaryDirectory() as home:
            script = shutil.copy(Path(__file__).resolve().parent / "checkpoint_targets.py", home)
            Path(home).chmod(0o755)
            more: Any = {"env": {"HOME": home}, "prefix": user, "cwd": home, "script": script}
            own = Child(["--kind", "plain"], **more)
            self.note(facts, own_target=own.line(30, ("ready",)))
            with self.targets("plain") as [roots]:
                for name, target in (("own", own), ("roots", roots)):
                    caller = Child([*calls, str(target.pid)], **more)
                    said = [caller.line(15, ("init", "result")) for _ in range(7)]
                    caller.kill()
                    self.note(facts, **{name: said, f"{name}_contents": target.check()})
            own.kill()

    def killed_caller(self, facts: dict[str, Any]) -> None:
        """A caller killed in the middle of a checkpoint, then of a restore, of 3 GiB."""
        with self.targets("plain", 3072 * MIB) as [child]:
            for call, before in (("checkpoint", "lock"), ("restore", None)):
                if before:
                    self.note(facts, before=self.call(before, child.pid))
                caller = Child(["--calls", call, "--pid", str(child.pid)])
                caller.line(20, ("begin",))
                time.sleep(0.4)
                caller.kill()
                seen, begun = [], time.monotonic()
                while time.monotonic() < begun + 8:
                    seen.append(
                        f"{time.monotonic() - begun:.2f} s {self.call('get_state', child.pid)}"
                    )
                    time.sleep(0.5)
                self.note(facts, **{call: seen})
            self.note(facts, unlock=self.call("unlock", child.pid), contents=child.check())

    def stopped(self, facts: dict[str, Any]) -> None:
        """Calls on a stopped process, and what continuing it brings."""
        with self.targets("plain") as [child]:
            for name, calls in (
                ("running", ("get_state", "lock")),
                ("checkpointed", ("get_state", "restore")),
            ):
                if name == "checkpointed":
                    ready = [self.call(call, child.pid) for call in ("lock", "checkpoint")]
                    self.note(facts, ready=ready)
                os.kill(child.pid, signal.SIGSTOP)
                time.sleep(0.2)
                answers = {call: self.call(call, child.pid) for call in calls}
                told = self.driver.states([child.pid])[child.pid]
                os.kill(child.pid, signal.SIGCONT)
                time.sleep(0.5)
                self.note(facts, **{name: answers, f"{name}_told": told})
                self.note(facts, **{f"{name}_then": self.call("get_state", child.pid)})
                if name == "running":
                    self.note(facts, unlock=self.call("unlock", child.pid))
            ends = [self.call(call, child.pid) for call in ("restore", "unlock")]
            self.note(facts, ends=ends, contents=child.check())

    def migrate(self, facts: dict[str, Any]) -> None:
        """There and back; then a map that is no permutation, and what mends it."""
        from cuda.bindings import driver as cuda

        here, there = self.gpus[:2]
        swap, partial = {here: there, there: here}, {here: there}
        with self.targets("plain") as [child]:
            for name, maps in (
                ("there", [swap]),
                ("back", [swap]),
                ("partial", [partial, swap]),
                ("home", [partial, swap]),
            ):
                steps = [self.call(call, child.pid) for call in ("lock", "checkpoint")]
                steps += [self.call("restore", child.pid, restore_args(cuda, one)) for one in maps]
                steps += [self.call("unlock", child.pid)]
                held = self.nvml.usage().processes.get(child.pid, {})
                gpus = [self.gpus.index(gpu) for gpu in held]
                self.note(
                    facts, **{name: steps, f"{name}_gpus": gpus, f"{name}_contents": child.check()}
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", default="")
    parser.add_argument("--budget", type=float, default=270.0)
    chosen = parser.parse_args()
    study = Study(
        chosen.out / f"checkpoint_signature-{time.strftime('%Y%m%d-%H%M%S')}.json", chosen.budget
    )
    singles = ("questions", "migrate", "stopped", "killed_caller", "other_user")
    wanted = chosen.only.split(",") if chosen.only else [*KINDS, *singles]

    def step(name: str) -> None:
        facts: dict[str, Any] = {}
        try:
            if name in KINDS:
                study.kind(name)
            else:
                study.note(study.results, **{name: facts})
                getattr(study, name)(facts)
        except Exception as error:  # noqa: BLE001 - one step must not end the others
            study.note(study.results, **{f"{name}_error": repr(error)})
        print(f"{time.strftime('%X')} {name}", flush=True)

    # What loses its process comes last, and the timings come first and alone.
    waves = [["questions"], [w for w in wanted if w not in singles and "nccl" not in w]]
    waves += [list(singles[1:]), [w for w in wanted if "nccl" in w]]
    for wave in waves:
        pool = concurrent.futures.ThreadPoolExecutor(8)
        steps = [pool.submit(step, name) for name in wave if name in wanted]
        concurrent.futures.wait(steps, timeout=max(1.0, study.until - time.monotonic()))
    for kind, facts in study.results["kinds"].items():
        answers = " | ".join(
            " ".join(str(a).split()[0] for a in facts.get(call, ["-"])) for call in CALLS
        )
        print(
            f"{kind:28} {answers} | {facts.get('contents')} | {[o.split()[0] for o in facts.get('obstacles', [])]}"
        )
    for child in Child.started:
        child.process.kill()
    sys.stdout.flush()
    os._exit(0)  # calls that hang have left threads behind


if __name__ == "__main__":
    main()
