"""A reboot in the middle: all to disk before it, another boot after it, everything back as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, wait_until
from disk_tier import again, images, wait_no_image
from workloads import Workload, done, entries

pytestmark = [pytest.mark.criu, pytest.mark.root]

_IN_ANOTHER_BOOT = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


def reboot(daemon: PrivateDaemon) -> None:
    """What a reboot leaves of a daemon: its directory. No process, nothing in memory, and another boot's id."""
    daemon.stop()
    for pid in daemon.leftovers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not daemon.leftovers(), within_s=10, what="nothing of it runs")
    shutil.rmtree(daemon.sim_dir)
    boot_id = daemon.directory / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    command = daemon._command
    daemon._command = ["unshare", "--mount", "sh", "-c", _IN_ANOTHER_BOOT, str(boot_id), *command]
    try:
        daemon.start()
    finally:
        daemon._command = command


def test_all_that_went_to_disk_before_a_reboot_comes_back_after_it(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(gpus=2, vram="64M")
    models = [Workload.start(daemon, f"model{n}", "24M", gpu=n % 2, seed=n + 1) for n in range(3)]
    done(daemon, "freeze", name="model1")
    command = [sys.executable, "-m", "gpusched", "-s", daemon.socket, "hibernate", "--all"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    done(daemon, "run", name="late", cmd=["sleep", "1000"])
    saved = images(daemon)
    reboot(daemon)
    states = {name: entry["state"] for name, entry in entries(daemon).items()}
    assert states.pop("late") == "dead"
    assert states == dict.fromkeys(("model0", "model1", "model2"), "hibernated")
    assert images(daemon) == saved and len(saved) == 3
    for model in models:
        done(daemon, "thaw", name=model.name)
        again(model).require("active")
        model.require_contents()
    wait_no_image(daemon)
    # And once more, without a word beforehand: what is on disk stays there, what was not has ended.
    done(daemon, "hibernate", name="model0")
    reboot(daemon)
    states = {name: entry["state"] for name, entry in entries(daemon).items()}
    assert (states["model0"], states["model1"]) == ("hibernated", "dead")
    done(daemon, "thaw", name="model0")
    again(models[0]).require_contents()
