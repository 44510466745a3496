"""How programs that ``run`` does not start get the library. What it does in them: test_direct.py, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpusched
from gpusched import errors, preload

needs_library = pytest.mark.skipif(not preload.library(), reason="the library was not built")


@needs_library
def test_a_program_with_these_variables_has_the_library() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "print(open('/proc/self/maps').read())"],
        env=os.environ | gpusched.preload_env(),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert found.stderr == ""
    assert preload.library() in found.stdout


def test_what_is_preloaded_already_stays_and_nothing_is_twice() -> None:
    env = {"PATH": "/bin", "LD_PRELOAD": "/lib/mine.so::/lib/yours.so /lib/theirs.so"}
    once = preload.preloaded("/lib/direct.so", env)
    assert once == {
        "PATH": "/bin",
        "LD_PRELOAD": "/lib/direct.so:/lib/mine.so:/lib/yours.so:/lib/theirs.so",
    }
    assert preload.preloaded("/lib/direct.so", once) == once
    assert preload.preloaded("/lib/direct.so", {}) == {"LD_PRELOAD": "/lib/direct.so"}


def test_it_can_be_taken_out_again() -> None:
    env = {"PATH": "/bin", "LD_PRELOAD": "/lib/direct.so:/lib/mine.so"}
    assert preload.not_preloaded("/lib/direct.so", env) == {
        "PATH": "/bin",
        "LD_PRELOAD": "/lib/mine.so",
    }
    env["LD_PRELOAD"] = "/lib/direct.so"
    assert preload.not_preloaded("/lib/direct.so", env) == {"PATH": "/bin"}
    assert preload.not_preloaded("/lib/direct.so", {"PATH": "/bin"}) == {"PATH": "/bin"}


@needs_library
def test_a_host_has_what_the_daemon_gives_it_and_not_what_its_worker_has() -> None:
    pytest.importorskip("ray")
    from ray_integration.hosting import host_environment

    worker = {"LD_PRELOAD": f"{preload.library()}:/lib/mine.so", "RAY_JOB_ID": "1"}
    assert host_environment(worker, {})["LD_PRELOAD"] == "/lib/mine.so"


@pytest.mark.parametrize("place", ["without", "with space", "with:colon"])
def test_where_there_is_none_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    package = tmp_path / place
    (package / "native").mkdir(parents=True)
    if place != "without":
        (package / "native" / "direct.abi3.so").touch()
    monkeypatch.setattr(preload, "__file__", str(package / "preload.py"))
    assert preload.library() == ""
    with pytest.raises(errors.Unsupported, match="C compiler"):
        gpusched.preload_env()
