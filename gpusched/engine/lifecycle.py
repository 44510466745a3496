"""How managed processes begin: run and adopt. See also ``endings.py``."""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gpusched import errors
from gpusched.domain.states import ProcState, Trigger
from gpusched.engine.admission import require_few, require_owner
from gpusched.engine.ahead import clear_contexts
from gpusched.engine.core import Core
from gpusched.engine.events import Launched
from gpusched.engine.model import Operation, Process, to_record
from gpusched.engine.survey import take_sample
from gpusched.ports import OFF_GPU, DriverState, Identity, Launch, Member, User
from gpusched.preload import not_preloaded, preloaded
from gpusched.protocol import messages as m

log = logging.getLogger(__name__)

#: Accounts may be asked from a directory service, which may hang.
LOOKUP_TIMEOUT_S: Final = 15.0
_S = ProcState


class Lifecycle:
    """Handles the operations ``run`` and ``adopt``."""

    def __init__(self, core: Core) -> None:
        self._core = core
        #: Main processes of adoptions under way: a process must not get into two trees.
        self._claimed: dict[str, Identity] = {}
        self._claiming = asyncio.Lock()

    # -- run and adopt ----------------------------------------------------------------------------

    def enter(self, op: Operation) -> None:
        """Takes a new name into the node (state starting) before anything slow happens."""
        assert op.caller is not None
        params: m.Run | m.Adopt = op.params
        gpus = self._gpus(params) if isinstance(params, m.Run) else ()
        if isinstance(params, m.Run):
            require_runnable(params)
        replaced = self._replaceable(op, params.name)
        if replaced is None:
            require_few(op.caller, self._core.node.processes.values())
        now = self._core.unix_s
        tree_id = uuid.uuid4().hex[:16]
        if replaced is not None:
            self._core.remove(replaced.tree_id)
        process = Process(
            tree_id=tree_id,
            name=params.name,
            uid=op.caller.uid,
            user=str(op.caller.uid),
            gpus=gpus,
            started_unix_s=now,
            last_used_unix_s=now,
            adopted=isinstance(params, m.Adopt),
            isolated=isinstance(params, m.Run) and self._isolated(params),
            evictable=params.evictable,
            stop=isinstance(params, m.Run) or params.stop,
            log_path=str(self._core.limits.log_dir / f"{params.name}.log")
            if isinstance(params, m.Run)
            else None,
        )
        self._core.put(process)
        op.tree_ids = (tree_id,)
        self._core.claim(op, op.tree_ids)
        op.started, op.begun_s = True, self._core.monotonic_s
        begin = self._run if isinstance(params, m.Run) else self._adopt
        self._core.spawn(begin(op, process, replaced), f"{op.kind}-{params.name}", op.op_id)

    def _replaceable(self, op: Operation, name: str) -> Process | None:
        """The dead entry that a new process of this name replaces. Raises AlreadyExists for a live one."""
        old = self._core.node.by_name(name)
        if old is None:
            return None
        if old.tree_id in self._core.node.busy or old.state is not _S.DEAD:
            raise errors.AlreadyExists(
                f"a process named {name!r} exists already (state {old.state}); "
                f"choose another name or: gpusched kill {name}"
            )
        require_owner(op.caller, old)
        return old

    def _gpus(self, params: m.Run) -> tuple[str, ...]:
        wanted = params.gpus if params.gpus is not None else [params.gpu]
        if len(set(wanted)) != len(wanted):
            raise errors.InvalidRequest("a GPU is named twice")
        return self._core.uuids(wanted)

    def _isolated(self, params: m.Run) -> bool:
        """Whether the tree gets namespaces of its own: as asked, else as the daemon was told."""
        if params.isolate and os.geteuid() != 0:
            raise errors.Unsupported(
                "only a daemon of root's can give a process namespaces of its own; leave out isolate"
            )
        return self._core.limits.isolate if params.isolate is None else params.isolate

    async def _run(self, op: Operation, process: Process, replaced: Process | None) -> None:
        assert op.caller is not None
        ports = self._core.ports
        try:
            user = await self._user(op.caller.uid, op.caller.gid)
            await self._record_entry(process, replaced)
            launch = Launch(
                tree_id=process.tree_id,
                name=process.name,
                argv=tuple(op.params.cmd),
                env=self._environment(op.params, user, process.gpus),
                cwd=op.params.dir if op.params.dir is not None else user.home,
                uid=op.caller.uid,
                gid=op.caller.gid,
                groups=user.groups,
                log_path=process.log_path or os.devnull,
                isolated=process.isolated,
            )
            main = await ports.trees.launch(launch)
        except errors.GpuschedError as error:
            self._core.post(Launched(op_id=op.op_id, error=error))
        else:
            self._core.post(Launched(op_id=op.op_id, main=main, uid=process.uid, user=user.name))

    async def _user(self, uid: int, gid: int) -> User:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                return await self._core.ports.users.lookup(uid, gid)
        except TimeoutError:
            raise errors.Unavailable(
                f"the system did not say who uid {uid} is within {LOOKUP_TIMEOUT_S:.0f} s; does its "
                "directory service hang (getent passwd)?"
            ) from None

    def _environment(self, params: m.Run, user: User, gpus: tuple[str, ...]) -> dict[str, str]:
        """The caller's environment, or a login's; never the daemon's. Ours goes over it."""
        login = {
            "HOME": user.home,
            "USER": user.name,
            "LOGNAME": user.name,
            "SHELL": user.shell,
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        }
        limits = self._core.limits
        given = {**limits.default_env, **(login if params.env is None else params.env)}
        # With several GPUs, CUDA IPC between the workers of one command is likely, and such memory does not have it.
        if limits.preload and (len(gpus) == 1 or given.get("GPUSCHED_DIRECT") == "1"):
            given = preloaded(limits.preload, given)
        elif limits.preload:  # the caller may have it itself
            given = not_preloaded(limits.preload, given)
        return {
            **given,
            **limits.forced_env,
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "GPUSCHED_MANAGED": "1",
        }

    async def _adopt(self, op: Operation, process: Process, replaced: Process | None) -> None:
        try:
            launched = await self._take_over(op, process, replaced)
        except errors.GpuschedError as error:
            launched = Launched(op_id=op.op_id, error=error)
        self._core.post(launched)

    async def _take_over(
        self, op: Operation, process: Process, replaced: Process | None
    ) -> Launched:
        """Looks at a running process before it becomes ours; only /proc and the driver's state are read."""
        assert op.caller is not None
        ports, pid = self._core.ports, op.params.pid
        main = await ports.trees.identify(pid)
        members = await ports.trees.members(process.tree_id, main)
        self._require_adoptable(op, members, pid)
        async with self._claiming:
            await self._require_unclaimed(members)
            self._claimed[process.tree_id] = main
        sample = await take_sample(
            ports.driver,
            ports.trees,
            ports.clock,
            {**self._core.mains(), process.tree_id: main},
        )
        states = await ports.driver.states([member.pid for member in members])
        owner = members[0].ruid
        user = await self._user(owner, op.caller.gid)
        held = sample.held.get(process.tree_id, {})
        await self._record_entry(
            replace(process, main=main, uid=owner, user=user.name, vram=held), replaced
        )
        await ports.trees.record_adopted(
            Launch(
                tree_id=process.tree_id,
                name=process.name,
                argv=(),
                env={"CUDA_VISIBLE_DEVICES": ",".join(sorted(held))},
                cwd="/",
                uid=owner,
                gid=op.caller.gid,
                groups=(),
                log_path=os.devnull,
                stop=process.stop,
            ),
            main,
        )
        with_cuda = {s for s in states.values() if s is not DriverState.NONE}
        return Launched(
            op_id=op.op_id,
            main=main,
            uid=owner,
            user=user.name,
            vram=held,
            is_frozen=bool(with_cuda) and with_cuda <= OFF_GPU,
        )

    def _require_adoptable(self, op: Operation, members: list[Member], pid: int) -> None:
        assert op.caller is not None
        if not members:
            raise errors.NotFound(f"no process with pid {pid}")
        if pid == 1 or any(member.pid == os.getpid() for member in members):
            raise errors.PermissionDenied(f"pid {pid} cannot be managed: the daemon depends on it")
        strangers = [x for x in members if x.ruid != op.caller.uid]
        if strangers and not op.caller.privileged:
            raise errors.PermissionDenied(
                f"pid {strangers[0].pid} belongs to uid {strangers[0].ruid}; you are uid {op.caller.uid}"
            )

    async def _require_unclaimed(self, members: list[Member]) -> None:
        """Raises AlreadyExists when any of ``members`` is in a tree of ours, PermissionDenied for our own helpers."""
        trees = self._core.ports.trees
        roots = {**self._core.mains(), **self._claimed, "daemon": await trees.identify(os.getpid())}
        for pid, tree_id in (await trees.locate([x.pid for x in members], roots)).items():
            if tree_id == "daemon":
                raise errors.PermissionDenied(f"pid {pid} is a part of the daemon")
            name = self._core.node.processes[tree_id].name
            raise errors.AlreadyExists(f"pid {pid} is managed already, as a part of {name}")

    async def _record_entry(self, process: Process, replaced: Process | None) -> None:
        """The intent to manage this process, on disk before it exists."""
        records: list[Mapping[str, object]] = [{"proc": to_record(process)}]
        if replaced is not None:
            records.insert(0, {"forget": replaced.tree_id})
        await self._core.ports.journal.append(*records)
        if replaced is not None:
            await self._core.ports.trees.forget(replaced.tree_id)

    def launched(self, op: Operation, event: Launched) -> None:
        """A run or adopt has ended: the process is managed from here on, or its name is free again."""
        tree_id = op.tree_ids[0]
        self._claimed.pop(tree_id, None)
        if event.error is not None or event.main is None:
            self._core.remove(tree_id)
            self._core.spawn(self._core.ports.trees.forget(tree_id), f"forget-{tree_id}")
            self._core.finish(op, error=event.error)
            return
        process = self._core.apply(
            tree_id,
            Trigger.STARTED,
            f"{op.kind} {op.op_id}",
            main=event.main,
            uid=event.uid,
            user=event.user,
            vram=event.vram,
        )
        if process.adopted:
            gpus = tuple(sorted(event.vram, key=lambda u: self._core.gpus[u].index))
            process = self._core.put(replace(process, gpus=gpus))
        else:
            self._core.node.counters.cold_starts += 1
            clear_contexts(self._core, process.gpus)
        if event.is_frozen:
            process = self._core.apply(tree_id, Trigger.FOUND_FROZEN, "adopted while checkpointed")
        self._core.watch(process)
        self._core.sampler.invalidate()
        self._core.events.emit(op.kind, process.name, f"pid {event.main.pid}")
        result: dict[str, Any] = {"name": process.name, "pid": event.main.pid}
        if process.adopted:
            result |= {"mem_mb": process.vram_bytes >> 20, "stop": process.stop}
        self._core.finish(op, result=result)


def require_runnable(params: m.Run) -> None:
    """Raises InvalidRequest for a command, directory or environment that no kernel would take."""
    texts = [
        *params.cmd,
        params.dir or "",
        *(params.env or {}).keys(),
        *(params.env or {}).values(),
    ]
    if any("\0" in text for text in texts):
        raise errors.InvalidRequest("cmd, dir and env must not contain NUL characters")
    if not params.cmd[0]:
        raise errors.InvalidRequest("cmd[0] is empty; it must name a program")
    if params.dir is not None and not Path(params.dir).is_absolute():
        raise errors.InvalidRequest(f"dir must be an absolute path, not {params.dir!r}")
    if bad := [key for key in params.env or {} if not key or "=" in key]:
        raise errors.InvalidRequest(f"env has an unusable name: {bad[0]!r}")
