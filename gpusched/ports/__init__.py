"""What the engine needs from the world: interfaces and the plain values that cross them.

Mechanisms implement these; tests script them. Nothing here does any work.

Units: ``*_bytes`` bytes, ``*_s`` seconds (monotonic unless ``_unix``), pids are host pids. GPUs are named by UUID
("GPU-...."); an index is only how people say it.
"""

from __future__ import annotations

from gpusched.ports.disk import Disk, DiskFacts, DiskRoom, Image, Revival, Saved, Woken
from gpusched.ports.driver import (
    OFF_GPU,
    Description,
    Driver,
    DriverApi,
    DriverState,
    Gpu,
    GpuMemory,
    Obstacle,
    Took,
    Usage,
)
from gpusched.ports.host import Clock, Host, HostRam, Journal, User, Users
from gpusched.ports.trees import ExitStatus, Identity, Launch, Member, Trees

__all__ = [
    "OFF_GPU",
    "Clock",
    "Description",
    "Disk",
    "DiskFacts",
    "DiskRoom",
    "Driver",
    "DriverApi",
    "DriverState",
    "ExitStatus",
    "Gpu",
    "GpuMemory",
    "Host",
    "HostRam",
    "Identity",
    "Image",
    "Journal",
    "Launch",
    "Member",
    "Obstacle",
    "Revival",
    "Saved",
    "Took",
    "Trees",
    "Usage",
    "User",
    "Users",
    "Woken",
]
