"""What the result files say, joined: the runs on one kind of device are one set, each with the file that it is from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The ways of ``freeze_thaw.py``, in the order in which they are shown.
WAYS: Mapping[str, str] = {
    "gpusched": "gpusched",
    "bare": "driver calls, one process",
    "fresh": "driver calls, a process for each",
    "torch_memory_saver": "torch_memory_saver, CPU backup",
    "torch_memory_saver_kept": "torch_memory_saver, buffers kept",
    "to_cpu": '.to("cpu") and back',
    "pinned": "pinned copy, the ceiling",
}
#: The way that frees nothing: what it leaves on the GPU says nothing.
FREES_NOTHING = "pinned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One file, and where it lies."""

    path: Path
    data: Mapping[str, Any]

    @property
    def machine(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.data["machine"]
        return found

    @property
    def device(self) -> tuple[str, str]:
        """What makes two results comparable: the GPU and its driver."""
        return self.machine["gpus"][0]["name"], self.machine["driver"]


@dataclass(slots=True, kw_only=True)
class Moves:
    """All runs of one way at one size. Times in milliseconds."""

    gigabytes: float
    way: str
    freeze_ms: list[float] = field(default_factory=list)
    thaw_ms: list[float] = field(default_factory=list)
    #: Beyond the driver's own calls within; of gpusched alone.
    added_to_freeze_ms: list[float] = field(default_factory=list)
    added_to_thaw_ms: list[float] = field(default_factory=list)
    left_mib: int = 0
    paths: list[Path] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Start:
    """All runs of one model. Times in milliseconds; ``thaw_to_token_ms`` is the thaw with the token after it."""

    model: str
    parameters: int
    file_bytes: int
    vram_mib: int
    cold_start_ms: list[float] = field(default_factory=list)
    import_ms: list[float] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    freeze_ms: list[float] = field(default_factory=list)
    thaw_ms: list[float] = field(default_factory=list)
    thaw_to_token_ms: list[float] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Device:
    """One kind of device with everything that was measured on it; ``machine`` is that of one file.

    ``hosts``: benchmark -> the different hosts that it ran on, in words.
    """

    machine: Mapping[str, Any]
    hosts: dict[str, list[str]] = field(default_factory=dict)
    moves: dict[tuple[float, str], Moves] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)
    #: GB of VRAM -> milliseconds, of the shipped workload, and the files.
    workload_starts_ms: dict[float, list[float]] = field(default_factory=dict)
    workload_starts_from: set[Path] = field(default_factory=set)
    #: (way, GB or 0 for all, why) of what could not be measured.
    skipped: set[tuple[str, float, str]] = field(default_factory=set)

    @property
    def gpu(self) -> str:
        return str(self.machine["gpus"][0]["name"])

    def title(self, benchmark: str) -> str:
        """The device and the hosts of one benchmark in one line."""
        return f"{self.gpu}, driver {self.machine['driver']}, {'; '.join(self.hosts[benchmark])}"

    @property
    def slug(self) -> str:
        return slug(self.gpu, self.machine["driver"])


def slug(gpu: str, driver: str) -> str:
    """A device as a part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in f"{gpu} {driver}".lower())


def load(directory: Path) -> list[Result]:
    """Every result in ``directory``, oldest first; rehearsals, and studies that are no benchmark, are left out."""
    found = []
    for path in sorted(directory.glob("*.json")):
        data = json.loads(path.read_text())
        if "machine" in data and not data.get("rehearsal"):
            found.append(Result(path=path, data=data))
    return sorted(found, key=lambda result: (result.machine["time"], result.path.name))


def of(results: Iterable[Result], benchmark: str) -> list[Result]:
    return [result for result in results if result.data.get("benchmark") == benchmark]


def newest(results: Iterable[Result], key: str) -> Result | None:
    """The newest result that has ``key``."""
    found = [result for result in results if key in result.data]
    return found[-1] if found else None


def devices(results: Iterable[Result]) -> list[Device]:
    """The GPUs that were measured, by name."""
    found: dict[tuple[str, str], Device] = {}
    for result in results:
        if result.data.get("benchmark") not in {"freeze_thaw", "cold_start"}:
            continue
        device = found.setdefault(result.device, Device(machine=result.machine))
        m = result.machine
        host = f"{m['cores']} cores, {m['ram_gib']:.0f} GiB of RAM"
        hosts = device.hosts.setdefault(result.data["benchmark"], [])
        if host not in hosts:
            hosts.append(host)
        for row in result.data.get("rows", ()):
            _add_moves(device, result, row)
        for row in result.data.get("models", ()):
            _add_start(device, result, row)
        for size, times in result.data.get("cold_starts_ms", {}).items():
            device.workload_starts_ms.setdefault(float(size), []).extend(times)
            device.workload_starts_from.add(result.path)
        device.skipped |= {
            (each["way"], each["gigabytes"] or 0, each["why"])
            for each in result.data.get("skipped", ())
        }
    return [found[key] for key in sorted(found)]


def _add_moves(device: Device, result: Result, row: Mapping[str, Any]) -> None:
    key = (row["gigabytes"], row["way"])
    moves = device.moves.setdefault(key, Moves(gigabytes=key[0], way=key[1]))
    moves.freeze_ms += [run["freeze_ms"] for run in row["runs"]]
    moves.thaw_ms += [run["thaw_ms"] for run in row["runs"]]
    for run in row["runs"]:
        if "driver_freeze_ms" in run:
            moves.added_to_freeze_ms.append(run["freeze_ms"] - run["driver_freeze_ms"])
            moves.added_to_thaw_ms.append(run["thaw_ms"] - run["driver_thaw_ms"])
    moves.left_mib = max(0, row["runs"][-1]["off_mib"] - result.data["idle_mib"])
    moves.paths.append(result.path)


def _add_start(device: Device, result: Result, row: Mapping[str, Any]) -> None:
    if not row["token_after_thaw_ms"]:
        return  # the run was cut off before anything could be compared
    start = device.starts.setdefault(
        row["model"],
        Start(**{key: row[key] for key in ("model", "parameters", "file_bytes", "vram_mib")}),
    )
    for key in (
        *("cold_start_ms", "import_ms", "load_ms", "first_token_ms"),
        *("freeze_ms", "thaw_ms"),
    ):
        getattr(start, key).extend(row[key])
    start.thaw_to_token_ms += [
        thaw + token for thaw, token in zip(row["thaw_ms"], row["token_after_thaw_ms"], strict=True)
    ]
    start.paths.append(result.path)


def ways_of(device: Device) -> list[str]:
    """The ways that were measured, in the order of ``WAYS``."""
    return [way for way in WAYS if any(key[1] == way for key in device.moves)]


def not_measured(device: Device) -> list[tuple[str, float, str]]:
    """What was skipped, and is in no other file."""
    return [
        (way, size, why)
        for way, size, why in sorted(device.skipped)
        if not any(key[1] == way and size in {0, key[0]} for key in device.moves)
    ]


def sizes_of(device: Device) -> list[float]:
    return sorted({size for size, _ in device.moves})


def in_order(device: Device) -> Iterator[Moves]:
    for size in sizes_of(device):
        for way in WAYS:
            if (size, way) in device.moves:
                yield device.moves[size, way]
