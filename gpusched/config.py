"""Settings of the daemon: defaults, the file over them, the command line over that. The environment is read here alone.

A TOML file has the names below as keys; sizes are written as on the command line ("80G"), times as "10s".
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from gpusched import errors
from gpusched.units import GIB, parse_duration, parse_size

BACKENDS: Final = ("auto", "cuda", "sim")
DEFAULT_SOCKET: Final = "/tmp/gpusched.sock"  # noqa: S108 - what existing clients connect to
SYSTEM_CONFIG: Final = Path("/etc/gpusched/config.toml")
#: Set by an operator against NVLink multicast; always handed on to what we start (see docs/security.md).
PASSED_ON: Final = (
    "NCCL_NVLS_ENABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "NVSHMEM_DISABLE_NVLS",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set. ``*_bytes`` bytes, ``*_s`` seconds; None means derived from the machine."""

    socket_path: Path = Path(DEFAULT_SOCKET)
    backend: str = "auto"
    sim_gpus: int = 1
    sim_vram_bytes: int = 8 * GIB
    state_dir: Path = Path("/var/lib/gpusched")
    log_dir: Path = Path("/var/log/gpusched")
    disk_dir: Path | None = None
    ram_budget_bytes: int | None = None
    #: How much of it the processes of one ordinary user may take; None: all.
    user_ram_budget_bytes: int | None = None
    #: How much of it is kept free: the coldest goes to disk in the background.
    ram_reserve_bytes: int = 0
    disk_budget_bytes: int = 500 * GIB
    allow_old_driver: bool = False
    #: Whether what is run on one GPU gets the library that lets its contents go past the driver's own copy.
    direct: bool = True
    #: Whether started trees get namespaces of their own where this machine could save them to disk.
    isolate: bool = True
    #: The CRIU to use; else the one on the PATH, or gpusched's own.
    criu: str | None = None
    group: str | None = None
    lock_timeout_s: float = 10.0
    kill_grace_s: float = 10.0
    operation_wait_s: float = 600.0
    passed_on_env: Mapping[str, str] = field(default_factory=dict)


_PATHS: Final = {"socket_path", "state_dir", "log_dir", "disk_dir"}
#: Keys of the file, which name sizes without their unit.
_FILE_KEYS: Final = {
    "socket": "socket_path",
    "sim_vram": "sim_vram_bytes",
    "ram_budget": "ram_budget_bytes",
    "user_ram_budget": "user_ram_budget_bytes",
    "ram_reserve": "ram_reserve_bytes",
    "disk_budget": "disk_budget_bytes",
    "lock_timeout": "lock_timeout_s",
    "kill_grace": "kill_grace_s",
    "operation_wait": "operation_wait_s",
}


def load(path: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """Defaults, then the file, then ``overrides`` (None values mean not given).

    Without ``path`` the system's file is read where it exists. Raises InvalidRequest naming the key at fault.
    """
    chosen = path or (SYSTEM_CONFIG if os.geteuid() == 0 and SYSTEM_CONFIG.exists() else None)
    values: dict[str, Any] = _defaults()
    if chosen is not None:
        values.update(_read_file(chosen))
    if socket := os.environ.get("GPUSCHED_SOCKET"):  # where this user's clients look
        values["socket_path"] = socket
    values.update({k: v for k, v in overrides.items() if v is not None})
    unknown = set(values) - {f.name for f in fields(Settings)}
    if unknown:
        raise errors.InvalidRequest(f"unknown setting {sorted(unknown)[0]!r}")
    for key in _PATHS & set(values):
        values[key] = Path(values[key]).absolute() if values[key] is not None else None
    return Settings(**values)


def _defaults() -> dict[str, Any]:
    values: dict[str, Any] = {
        "socket_path": DEFAULT_SOCKET,
        "criu": os.environ.get("GPUSCHED_CRIU"),
        "passed_on_env": {k: os.environ[k] for k in PASSED_ON if k in os.environ},
    }
    if os.geteuid() != 0:  # an ordinary user's daemon keeps to the user's own directories
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "gpusched"
        values |= {"state_dir": home, "log_dir": home / "log"}
    return values


def _read_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except OSError as error:
        raise errors.InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise errors.InvalidRequest(f"{path} is not TOML: {error}") from error
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = _FILE_KEYS.get(key, key)
        try:
            values[name] = _convert(name, value)
        except (ValueError, TypeError, KeyError) as error:
            raise errors.InvalidRequest(f"{path}: {key} = {value!r}: {error}") from error
    return values


def _convert(name: str, value: Any) -> Any:
    types = {f.name: f.type for f in fields(Settings)}
    if name not in types or name == "passed_on_env":
        raise KeyError("no such setting")
    if name == "backend" and value not in BACKENDS:
        raise ValueError(f"must be one of {', '.join(BACKENDS)}")
    if name.endswith("_bytes"):
        return parse_size(str(value))
    if name.endswith("_s"):
        return parse_duration(str(value))
    wanted = {"bool": bool, "int": int}.get(str(types[name]), str)
    if type(value) is not wanted:
        raise TypeError(f"expected {wanted.__name__}")
    return value
