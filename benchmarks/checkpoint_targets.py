"""The processes that ``checkpoint_signature.py`` starts. Needs a GPU, and two for some kinds.

    python checkpoint_targets.py --kind ipc_pair --rank 0 --size 16777216
    python checkpoint_targets.py --calls lock,checkpoint --pid 4711

The first is one process of a kind, with contents that it can check: it prints "ready", then answers each line on stdin
with "right", "WRONG" or "error ...". The second makes driver calls on another process. Standard library, cuda-bindings
and (for some kinds) PyTorch alone, so that it runs as any user from anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import pathlib
import pickle
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

MIB = 1 << 20

#: kind -> (processes, environment). The processes of a kind are locked all, checkpointed all, and so on.
KINDS: dict[str, tuple[int, dict[str, str]]] = {
    "plain": (1, {}),
    "torch": (1, {}),
    "torch_distributed_imported": (1, {}),
    "managed": (1, {}),
    "two_contexts": (1, {}),
    "peer": (1, {}),
    "ipc_alone": (1, {}),
    "ipc_pair": (2, {}),
    "torch_ipc_pair": (2, {}),
    "exported_alone": (1, {}),
    "exported_pair": (2, {}),
    "nccl_no_communicator": (2, {}),
    "nccl_world1": (1, {}),
    "nccl_default": (2, {}),
    "nccl_cumem_off": (2, {"NCCL_CUMEM_ENABLE": "0"}),
    "nccl_p2p_off": (2, {"NCCL_P2P_DISABLE": "1"}),
    "nccl_p2p_off_cumem_off": (2, {"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0"}),
    "nccl_destroyed": (2, {}),
}


# -- targets: run in a process of their own -------------------------------------------------------


def do(results: Any) -> Any:
    if int(results[0]) != 0:
        raise RuntimeError(results[0])
    return results[1] if len(results) > 1 else None


class RawTarget:
    """``size`` bytes on a GPU through the driver API; some kinds share them, or hold a second GPU."""

    def __init__(self, kind: str, rank: int, size: int) -> None:
        from cuda.bindings import driver as cuda

        self.cuda, self.size = cuda, size
        do(cuda.cuInit(0))
        contexts = [
            do(cuda.cuDevicePrimaryCtxRetain(do(cuda.cuDeviceGet(index))))
            for index in range(2 if kind in {"peer", "two_contexts"} else 1)
        ]
        do(cuda.cuCtxSetCurrent(contexts[0]))
        if kind == "peer":
            do(cuda.cuCtxEnablePeerAccess(contexts[1], 0))
        self.memory = self._memory(kind, rank, contexts)
        self.contents = os.urandom(MIB) * (self.size // MIB)
        do(cuda.cuMemcpyHtoD(self.memory, self.contents, self.size))

    def _memory(self, kind: str, rank: int, contexts: list[Any]) -> Any:
        cuda, size = self.cuda, self.size
        if kind == "managed":
            self.size = size = 4 * MIB  # more than a little of it is known to hang GPUs
            return do(cuda.cuMemAllocManaged(size, 1))
        if kind.startswith("exported"):
            return self._virtual(kind, rank)
        memory = do(cuda.cuMemAlloc(size))
        if kind == "peer":
            do(cuda.cuCtxSetCurrent(contexts[1]))
            other = do(cuda.cuMemAlloc(size))
            do(cuda.cuCtxSetCurrent(contexts[0]))
            do(cuda.cuMemcpyPeer(other, contexts[1], memory, contexts[0], size))
        if kind.startswith("ipc") and rank == 0:
            handle = do(cuda.cuIpcGetMemHandle(memory))
            if kind == "ipc_pair":
                with pair_socket() as link:
                    link.sendall(ctypes.string_at(int(handle.getPtr()), 64))
        if kind == "ipc_pair" and rank == 1:
            handle = cuda.CUipcMemHandle()
            with pair_socket() as link:
                ctypes.memmove(int(handle.getPtr()), link.recv(64, socket.MSG_WAITALL), 64)
            with traced():
                self.imported = do(cuda.cuIpcOpenMemHandle(handle, 1))
        return memory

    def _virtual(self, kind: str, rank: int) -> Any:
        """Memory of the virtual memory API with a handle that is exported as a descriptor."""
        cuda, fd_type = (
            self.cuda,
            self.cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        )
        prop = cuda.CUmemAllocationProp()
        prop.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = 0
        prop.requestedHandleTypes = fd_type
        own = do(cuda.cuMemCreate(self.size, prop, 0))
        if rank == 0:
            self.fd = int(do(cuda.cuMemExportToShareableHandle(own, fd_type, 0)))
            if kind == "exported_pair":
                with pair_socket() as link:
                    socket.send_fds(link, [b"x"], [self.fd])
            return self._mapped(own)
        with pair_socket() as link:
            fds = socket.recv_fds(link, 1, 1)[1]
        with traced():
            self.imported = self._mapped(do(cuda.cuMemImportFromShareableHandle(fds[0], fd_type)))
            os.close(fds[0])
        return self._mapped(own)

    def _mapped(self, handle: Any) -> Any:
        cuda, size = self.cuda, self.size
        address = do(cuda.cuMemAddressReserve(size, 0, 0, 0))
        do(cuda.cuMemMap(address, size, 0, handle, 0))
        access = cuda.CUmemAccessDesc()
        access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = 0
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        do(cuda.cuMemSetAccess(address, size, [access], 1))
        return address

    def check(self) -> bool:
        back = bytearray(self.size)
        do(self.cuda.cuMemcpyDtoH(back, self.memory, self.size))
        return bytes(back) == self.contents


class TorchTarget:
    """A tensor, and for the NCCL kinds a communicator that has been used once."""

    def __init__(self, kind: str, rank: int, size: int) -> None:
        torch: Any = importlib.import_module("torch")
        self.torch, self.joined = torch, False
        world = KINDS[kind][0]
        torch.cuda.set_device(rank)
        self.tensor = torch.randint(0, 1 << 30, (size // 4,), dtype=torch.int32, device="cuda")
        self.copy = self.tensor.cpu()
        if kind == "torch_ipc_pair":
            self._share(rank)
        self.dist: Any = None
        if kind.startswith(("torch_distributed", "nccl")):
            self.dist = importlib.import_module("torch.distributed")
        if kind.startswith("nccl"):
            store = f"tcp://127.0.0.1:{os.environ['STUDY_PORT']}"
            self.dist.init_process_group("nccl", init_method=store, rank=rank, world_size=world)
            self.joined, self.world = kind != "nccl_no_communicator", world
            if self.joined:
                self.reduce()
            if kind == "nccl_destroyed":
                self.dist.destroy_process_group()
                self.joined = False

    def _share(self, rank: int) -> None:
        """As torch.multiprocessing does it: a CUDA IPC handle, an event, and a counter in shared memory."""
        with pair_socket() as link:
            if rank == 0:
                link.sendall(pickle.dumps(self.tensor.untyped_storage()._share_cuda_()))
            else:
                handle = pickle.loads(link.recv(1 << 16))  # noqa: S301 - from the process beside it
                self.torch.cuda.synchronize()
                with traced():
                    self.imported = self.torch.UntypedStorage._new_shared_cuda(*handle)

    def reduce(self) -> bool:
        ones = self.torch.ones(1 << 20, device="cuda")
        self.dist.all_reduce(ones)
        self.torch.cuda.synchronize()
        return bool((ones == self.world).all())

    def check(self) -> bool:
        same = bool(self.torch.equal(self.tensor.cpu(), self.copy))
        return same and (not self.joined or self.reduce())


def traces() -> dict[str, Any]:
    """What /proc shows of this process, without what changes by itself."""
    links = {}
    for link in pathlib.Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            info = pathlib.Path(f"/proc/self/fdinfo/{link.name}").read_text()
            links[link.name] = f"{link.readlink()} {info!r}"
    maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    return {"fds": links, "maps": {line: 1 for line in maps if "[heap]" not in line}}


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Prints what an import left behind in /proc: the lines that are new, and those that are gone."""
    before = traces()
    yield
    after = traces()
    found = {
        f"{sign} {what}": [f"{k} {v}" for k, v in one[what].items() if other[what].get(k) != v]
        for what in before
        for sign, one, other in (("new", after, before), ("gone", before, after))
    }
    print("trace", json.dumps(found), flush=True)


def pair_socket() -> socket.socket:
    return socket.socket(fileno=os.dup(int(os.environ["STUDY_LINK"])))


def run_target(kind: str, rank: int, size: int) -> None:
    is_torch = kind.startswith(("torch", "nccl"))
    target = (TorchTarget if is_torch else RawTarget)(kind, rank, size)
    print("ready", flush=True)
    for _ in sys.stdin:
        try:
            print("right" if target.check() else "WRONG", flush=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            print(f"error {error!r:.200}", flush=True)


def timed_call(cuda: Any, call: str, pid: int, args: Any = None) -> str:
    begun = time.monotonic()
    if call == "get_state":
        result, state = cuda.cuCheckpointProcessGetState(pid)
        answer = f"{result.name} {int(state) if int(result) == 0 else '-'}"
    else:
        if call == "lock":
            args = cuda.CUcheckpointLockArgs()
            args.timeoutMs = 5000
        answer = getattr(cuda, f"cuCheckpointProcess{call.capitalize()}")(pid, args)[0].name
    return f"{answer} {(time.monotonic() - begun) * 1000:.1f} ms"


def run_caller(pid: int, calls: Sequence[str]) -> None:
    """Driver calls from a process of its own, which may be killed or be another user."""
    from cuda.bindings import driver as cuda

    print("init", int(cuda.cuInit(0)[0]), flush=True)
    for call in calls:
        print("begin", call, flush=True)
        print("result", call, timed_call(cuda, call, pid), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One process for checkpoint_signature.py.")
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--size", type=int, default=16 * MIB)
    parser.add_argument("--calls")
    parser.add_argument("--pid", type=int)
    chosen = parser.parse_args()
    if chosen.calls:
        run_caller(chosen.pid, chosen.calls.split(","))
    else:
        run_target(chosen.kind, chosen.rank, chosen.size)
