"""Finding CRIU, the trial that every candidate must pass, and making one from the archive's packages."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import find_criu
from daemons import ROOT, processes_naming, wait_until
from gpusched.mechanisms.criu import program
from gpusched.mechanisms.criu.program import Program, Rejected

MAKE_CRIU = ROOT / "scripts" / "make_criu.sh"


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_named_criu_comes_first_then_the_paths_then_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    named, found, _ = (executable(tmp_path / n / "criu", "") for n in ("named", "found", "own/bin"))
    monkeypatch.setenv("PATH", str(found.parent))
    ours = str(own / "bin" / "criu")
    assert program.candidates(str(named), own) == [str(named), str(found), ours]
    assert program.candidates("/no/criu", own) == ["/no/criu", str(found), ours]
    assert program.candidates(None, own) == [str(found), ours]
    assert program.candidates("criu", own) == [str(found), ours]  # each once
    monkeypatch.chdir(tmp_path)
    assert program.candidates("named/criu", own)[0] == str(named)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert program.candidates(None, own) == [ours]
    assert program.candidates(None, tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("version", "kernel", "expected"),
    [
        ("4.1.1", "6.18.4", True),
        ("3.17.1", "6.16", True),
        ("4.1.1", "6.15", False),
        ("4.2", "6.16.0-generic", False),
        ("GitID", "6.18", False),  # the trial will tell
    ],
)
def test_what_is_too_old_for_the_kernel_is_not_tried(
    version: str, kernel: str, expected: bool
) -> None:
    parse = program.parse_version
    assert program.is_too_old(parse(version), parse(kernel)) is expected


def may_unshare() -> bool:
    unshare = shutil.which("unshare")
    command = [unshare or "false", "--pid", "--mount", "--fork", "--mount-proc", "true"]
    return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0


@pytest.mark.root
def test_a_criu_that_cannot_do_it_is_found_out_and_leaves_nothing(tmp_path: Path) -> None:
    if not may_unshare():
        pytest.skip("this container may not make namespaces")
    bad = executable(tmp_path / "criu", "echo 'Error (x.c:1): no such luck' >&2; exit 3")
    assert program.probe(str(bad))[0] == "dump ended with 3: Error (x.c:1): no such luck"
    liar = executable(tmp_path / "liar", "exit 0")  # "dumps" and "restores" nothing
    silent = "its listening socket did not answer after it was brought back"
    assert program.probe(str(liar))[0] == silent
    stuck = executable(tmp_path / "stuck", "sleep 1000")
    assert program.probe(str(stuck), 1.0)[0] == "the trial did not end within 1 s"
    wait_until(
        lambda: not processes_naming(str(tmp_path)), within_s=5, what="all of the trials are gone"
    )
    old = executable(tmp_path / "old", "echo Version: 3.0; exit 1")
    found = program.examine(str(old))
    assert isinstance(found, Rejected)
    assert found.version == (3, 0)
    too_old = program.is_too_old((3, 0), program.parse_version(platform.release()))
    assert ("too old" in found.reason) is too_old


@pytest.mark.criu
def test_the_first_criu_that_passes_is_taken_and_the_others_say_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _ = find_criu()
    assert good is not None
    monkeypatch.setenv("PATH", f"{Path(good.path).parent}:/usr/bin:/bin:/usr/sbin:/sbin")
    bad = executable(tmp_path / "criu", "exit 3")
    found = program.find(str(bad))
    assert found.program == good
    assert [one.path for one in found.rejected] == [str(bad)]
    assert "ended with 3" in found.rejected[0].reason
    assert not found.why_not
    assert good.version
    assert Path(good.executable).read_bytes()[:4] == b"\x7fELF"
    assert isinstance(program.examine(good.path), Program)


# -- make criu ------------------------------------------------------------------------------------


def make_criu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(MAKE_CRIU), *arguments], capture_output=True, text=True, timeout=110, check=False
    )


def test_the_script_that_makes_criu_is_clean() -> None:
    shellcheck = shutil.which("shellcheck") or str(ROOT / ".venv" / "bin" / "shellcheck")
    if not Path(shellcheck).exists():
        pytest.skip("shellcheck is not here")
    subprocess.run([shellcheck, str(MAKE_CRIU)], timeout=60, check=True)


def test_an_archive_that_cannot_be_reached_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists():
        pytest.skip("the Debian archive's keys are not here")
    ended = make_criu("--archive", "http://127.0.0.1:9/none", str(tmp_path / "criu"))
    assert ended.returncode == 1
    assert "http://127.0.0.1:9/none gives no CRIU" in ended.stderr
    assert "forky:" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.criu
def test_a_criu_that_is_there_is_kept(tmp_path: Path) -> None:
    good, _ = find_criu()
    assert good is not None
    made = executable(tmp_path / "p" / "bin" / "criu", f'exec {good.path} "$@"')
    (tmp_path / "p" / "VERSION").write_text("4.2.1 (forky, amd64)\n")
    ended = make_criu(str(tmp_path / "p"))
    assert ended.stdout == f"{made} is there: 4.2.1 (forky, amd64)\n"
