"""Budgets of RAM and disk: the coldest go to disk to make room, refusals have numbers, nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, request, wait_until
from disk_tier import again, images
from workloads import Workload, done, entries, refused

pytestmark = [pytest.mark.criu, pytest.mark.root]


def states(daemon: PrivateDaemon) -> dict[str, str]:
    return {name: entry["state"] for name, entry in entries(daemon).items()}


def prove(*models: Workload) -> None:
    """Each comes back, one at a time, with its contents."""
    for model in models:
        done(model.daemon, "thaw", name=model.name)
        again(model).require("active")
        model.require_contents()
        done(model.daemon, "freeze", name=model.name)


def test_three_models_bigger_together_than_the_budget_take_turns(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(vram="100M", args=["--ram-budget", "50M"])
    models = [Workload.start(daemon, f"m{n}", "24M", seed=n) for n in (1, 2, 3)]
    done(daemon, "freeze", name="m1")
    done(daemon, "freeze", name="m2")
    assert done(daemon, "status")["memory"]["snapshots_mb"] == 48
    result = done(daemon, "freeze", name="m3")
    assert result["to_disk"] == ["m1"], "the one that was used longest ago"
    assert states(daemon) == {"m1": "hibernated", "m2": "frozen", "m3": "frozen"}
    memory = done(daemon, "status")["memory"]
    assert memory["snapshots_mb"] == 48 and memory["disk_used_mb"] > 24
    # Waking one needs the room of another.
    result = done(daemon, "thaw", name="m1")
    assert (result["from_tier"], result["to_disk"]) == ("disk", ["m2"])
    done(daemon, "freeze", name="m1")
    prove(*models)


def test_who_is_leased_or_has_no_namespaces_stays_in_ram(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="200M", args=["--ram-budget", "50M"])
    leased, other = Workload.start(daemon, "leased", "24M"), Workload.start(daemon, "other", "24M")
    done(daemon, "acquire", name="leased", for_s=1000)
    done(daemon, "freeze", name="leased", force=True)
    done(daemon, "freeze", name="other")
    third = Workload.start(daemon, "third", "24M")
    assert done(daemon, "freeze", name="third")["to_disk"] == ["other"]
    fourth = Workload.start(daemon, "fourth", "40M")
    answer = refused(daemon, "insufficient_host_memory", "freeze", name="fourth")
    assert "needs 40 MiB" in answer["error"] and "RAM budget of 50 MiB" in answer["error"]
    assert states(daemon) == {
        "leased": "frozen",
        "other": "hibernated",
        "third": "frozen",
        "fourth": "active",
    }
    fourth.require_contents()
    done(daemon, "kill", name="fourth")
    leased.require("frozen")
    prove(other, third)


def test_who_cannot_be_saved_is_passed_over_and_named(private_daemon: StartDaemon) -> None:
    daemon = private_daemon(vram="200M", args=["--ram-budget", "30M"])
    script = f"(setsid sleep 1000 &) ; exec {' '.join(_workload('24M'))}"
    done(daemon, "run", name="stuck", cmd=["sh", "-c", script])
    log = daemon.log_dir / "stuck.log"
    wait_until(lambda: "ready" in log.read_text(), within_s=20, what="it is ready")
    done(daemon, "freeze", name="stuck")
    other = Workload.start(daemon, "other", "24M")
    answer = refused(daemon, "insufficient_host_memory", "freeze", name="other")
    assert "stuck" in answer["error"] and "left its parents" in answer["error"]
    assert states(daemon) == {"stuck": "frozen", "other": "active"}
    other.require_contents()


def _workload(vram: str) -> list[str]:
    import sys

    return [sys.executable, "-m", "gpusched.workload", "--vram", vram]


def test_files_in_shared_memory_count_although_nobody_has_them_open(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(args=["--disk-budget", "40M"])
    script = (
        "import time\nopen('/dev/shm/x', 'wb').write(bytes(48 << 20))\nprint('there', flush=True)\n"
    )
    cmd = [sys.executable, "-c", script + "time.sleep(999)"]
    done(daemon, "run", name="model", cmd=cmd)
    log = daemon.log_dir / "model.log"
    wait_until(lambda: "there" in log.read_text(), within_s=20, what="the file is there")
    answer = refused(daemon, "insufficient_disk", "hibernate", name="model")
    assert answer["details"]["need_bytes"] > 48 << 20
    assert entries(daemon)["model"]["state"] == "active"


@pytest.mark.parametrize("budget", ["0", "20M"])
def test_a_disk_budget_that_is_too_small_refuses_with_numbers(
    private_daemon: StartDaemon, budget: str
) -> None:
    daemon = private_daemon(vram="200M", args=["--disk-budget", budget, "--ram-budget", "30M"])
    model = Workload.start(daemon, "model", "24M")
    answer = refused(daemon, "insufficient_disk", "hibernate", name="model")
    assert "--disk-budget" in answer["error"] and answer["details"]["need_bytes"] > 24 << 20
    model.require("active")
    done(daemon, "freeze", name="model")
    other = Workload.start(daemon, "other", "24M", seed=2)
    refused(daemon, "insufficient_disk", "freeze", name="other")
    assert states(daemon) == {"model": "frozen", "other": "active"}
    assert images(daemon) == []
    other.require_contents()
    done(daemon, "thaw", name="model")
    model.require_contents()


def test_a_disk_that_fills_up_in_the_middle_loses_nothing(
    private_daemon: StartDaemon, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400M,mode=700", "tmpfs", disk], check=True)
    try:
        daemon = private_daemon(vram="200M", args=["--disk-dir", str(disk)])
        model = Workload.start(daemon, "model", "24M")
        (disk / "ballast").write_bytes(b"x" * (380 << 20))
        answer = refused(daemon, "insufficient_disk", "hibernate", name="model")
        assert "is free" in answer["error"]
        model.require_contents()
        (disk / "ballast").unlink()
        done(daemon, "hibernate", name="model")
        # Full for what was promised, not for what comes: somebody else writes meanwhile.
        done(daemon, "thaw", name="model")
        again(model)
        _fill_while_saving(daemon, disk)
        model.require("active")
        model.require_contents()
        assert not [p for p in disk.iterdir() if p.is_dir() and p.name.startswith(model_id(daemon))]
        (disk / "ballast").unlink()
        done(daemon, "hibernate", name="model")
        done(daemon, "thaw", name="model")
        again(model).require_contents()
        done(daemon, "kill", name="model")
        daemon.stop()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def model_id(daemon: PrivateDaemon) -> str:
    (tree,) = (daemon.state_dir / "trees").iterdir()
    return tree.name


def _fill_while_saving(daemon: PrivateDaemon, disk: Path) -> None:
    """Takes all of the disk as soon as an image is begun."""
    import threading

    (disk / "ballast").write_bytes(b"x" * (200 << 20))  # the rest is taken sooner than the image is

    def fill() -> None:
        wait_until(lambda: _begun(disk), within_s=10, what="an image is begun")
        try:
            with (disk / "ballast").open("ab", 0) as file:
                while True:
                    file.write(b"x" * (1 << 20))
        except OSError:
            pass

    filler = threading.Thread(target=fill)
    filler.start()
    answer = request(daemon.socket, "hibernate", name="model", within_s=60)
    filler.join()
    assert not answer["ok"] and answer["code"] in ("insufficient_disk", "criu_error"), answer


def _begun(disk: Path) -> bool:
    return any("." in p.name for p in disk.iterdir() if p.is_dir())


def test_a_directory_that_is_gone_or_read_only_is_said_so(
    private_daemon: StartDaemon, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400M,mode=700", "tmpfs", disk], check=True)
    try:
        daemon = private_daemon(vram="200M", args=["--disk-dir", str(disk)])
        model = Workload.start(daemon, "model", "8M")
        done(daemon, "hibernate", name="model")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done(daemon, "thaw", name="model")
        again(model).require_contents()
        answer = request(daemon.socket, "hibernate", name="model", within_s=60)
        assert not answer["ok"] and "ead-only" in answer["error"], answer
        model.require("active")
        model.require_contents()
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        daemon.stop()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    disk.rmdir()
    daemon.start()
    again(model).require("active")
    answer = done(daemon, "hibernate", name="model")
    done(daemon, "thaw", name="model")
    again(model).require_contents()
