"""The rules about the code itself: its layers, its size, what it may import, what a checkout needs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from conftest import StartDaemon
from daemons import PrivateDaemon, wait_until

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(
    path
    for folder in ("gpusched", "ray_integration", "benchmarks", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)

# -- import contracts -----------------------------------------------------------------------------

#: Contract -> what breaks it: a module, and an import that is appended to it.
BREACHES = {
    "Layers point down": ("gpusched.ports", "gpusched.engine"),
    "The daemon is nobody's client": ("gpusched.servers", "gpusched.client"),
    "Mechanisms know the ports, not who calls them": ("gpusched.mechanisms", "gpusched.engine"),
    "The SDK knows the wire and nothing of the daemon": ("gpusched.client", "gpusched.ports"),
    "The SDK needs the standard library alone": ("gpusched.errors", "msgspec"),
    "Decisions know no user interface, driver or library": ("gpusched.protocol.codec", "rich"),
    "The domain is pure": ("gpusched.domain.states", "time"),
    "Ray knows the SDK and nothing else of gpusched": ("ray_integration.gate", "gpusched.domain"),
    "gpusched does not need Ray": ("gpusched.units", "ray_integration"),
}


def lint_imports(tree: Path) -> tuple[int, str]:
    """Import-linter over the package below ``tree`` with the project's contracts: exit status and output."""
    linter = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run(
        [str(linter), "--no-cache"],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("gpusched", "ray_integration"):
        shutil.copytree(ROOT / package, tree / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


@pytest.fixture(scope="module")
def verdicts(copied_tree: Path) -> dict[str, str]:
    """What import-linter says of each contract once every breach is in the copied tree."""
    clean = lint_imports(copied_tree)
    assert clean[0] == 0, clean[1]
    for importer, imported in BREACHES.values():
        path = copied_tree / importer.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        with file.open("a") as source:
            source.write(f"\nimport {imported}\n")
    (copied_tree / "gpusched" / "a_module_without_a_layer.py").write_text("")
    status, output = lint_imports(copied_tree)
    assert status == 1, output
    details = output.split("Broken contracts")[1]
    names = [contract["name"] for contract in PYPROJECT["tool"]["importlinter"]["contracts"]]
    sections = re.split(rf"^({'|'.join(map(re.escape, names))})$", details, flags=re.MULTILINE)
    return dict(zip(sections[1::2], sections[2::2], strict=True))


def test_every_contract_has_a_breach_here() -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    assert {contract["name"] for contract in contracts} == set(BREACHES)


@pytest.mark.parametrize(("contract", "breach"), list(BREACHES.items()))
def test_a_contract_fails_when_it_is_broken(
    contract: str, breach: tuple[str, str], verdicts: dict[str, str]
) -> None:
    importer, imported = breach
    assert f"{importer} -> {imported} " in verdicts[contract]


def test_a_module_without_a_layer_is_noticed(verdicts: dict[str, str]) -> None:
    assert "a_module_without_a_layer" in verdicts["Layers point down"]


def test_the_sdk_contracts_name_every_module_of_the_sdk() -> None:
    contracts = {c["name"]: c for c in PYPROJECT["tool"]["importlinter"]["contracts"]}
    layers = contracts["Layers point down"]["layers"]
    (sdk,) = [layer for layer in layers if "client" in layer]
    modules = {"gpusched." + name.strip(" ()") for name in sdk.split(":")}
    assert modules <= set(contracts["The SDK needs the standard library alone"]["source_modules"])
    knows = contracts["The SDK knows the wire and nothing of the daemon"]
    assert modules == set(knows["source_modules"])
    assert modules == set(contracts["The daemon is nobody's client"]["forbidden_modules"])


def test_the_sdk_works_without_any_installed_package() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gpusched\n"
        "assert gpusched.GpuSched and gpusched.AsyncGpuSched and gpusched.errors.BY_CODE\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names - {'__main__'}))"
    )
    ended = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(ROOT)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert ended.stdout.split() == ["gpusched"]


# -- size and form --------------------------------------------------------------------------------


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_thread_is_the_first_to_decode_a_type() -> None:
    """Where two meet it for the first time, msgspec 0.22 crashes the process: decoders are made before."""
    bare = re.compile(r"json\.decode\([^)]*type=(?!dict)")
    found = [path for path in SOURCES if bare.search(path.read_text())]
    assert not found, "make a msgspec.json.Decoder where the module is imported"


def test_no_function_is_longer_than_50_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= 50
    ]
    assert long == []


# -- the checkout ---------------------------------------------------------------------------------


def test_the_changelog_begins_with_the_version() -> None:
    import gpusched

    first = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == gpusched.__version__


def test_the_ci_script_can_be_executed_and_parsed() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 == 0o111
    subprocess.run(["bash", "-n", str(script)], timeout=10, check=True)


def test_every_public_make_target_is_explained_by_make_help() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ended = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT)],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    assert [line.split()[1] for line in ended.stdout.splitlines()] == targets


def test_an_interpreter_that_is_missing_or_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.9"\nexit 1\n')
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for python, words in ((old, "Python 3.10.9 is too old"), (tmp_path / "none", "not found")):
        ended = subprocess.run(
            ["make", "-C", str(tmp_path), "test", f"PYTHON={python}"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        assert ended.returncode == 2
        assert words in ended.stderr
        assert not (tmp_path / ".venv").exists()


# -- the tests' own daemon ------------------------------------------------------------------------


def test_a_process_that_writes_into_a_private_daemons_directory_counts_as_left_over() -> None:
    daemon = PrivateDaemon(gpus=1, vram="1G")
    with (
        (daemon.directory / "x.log").open("wb") as log,
        subprocess.Popen(["sleep", "60"], stdout=log) as sleeper,
    ):
        try:
            assert list(daemon.leftovers()) == [sleeper.pid]
        finally:
            daemon.end()
        assert sleeper.wait(10) == -9
    wait_until(lambda: not daemon.leftovers(), within_s=5, what="nothing is left")
    assert not daemon.directory.exists()


def test_a_private_daemon_survives_being_killed_and_leaves_nothing(
    private_daemon: StartDaemon,
) -> None:
    daemon = private_daemon(gpus=2, vram="1G")
    first = daemon.pid
    workload = [sys.executable, "-m", "gpusched.workload", "--vram", "16M"]
    pid = daemon.client().run("w", workload)["pid"]

    daemon.kill9()
    assert daemon.returncode == -9
    assert pid in daemon.leftovers()
    daemon.restart()

    assert daemon.pid != first
    (process,) = daemon.client().processes()
    assert (process["name"], process["pid"], process["state"]) == ("w", pid, "active")
    daemon.end()
    assert not daemon.leftovers()
    assert not daemon.sim_dir.exists()
