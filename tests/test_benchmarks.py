"""The benchmarks run without a GPU as rehearsals: every step, no figure; and what must not become a result does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import freeze_thaw
import machine
from daemons import ROOT
from gpusched.errors import DriverError
from gpusched.mechanisms.criu.program import Program

REAL = {"benchmark": "freeze_thaw", "rehearsal": False}


def run(
    program: str, *arguments: str | Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"} | dict(env or {}),
    )


def rehearse(out: Path, *arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], Any]:
    """A rehearsal of ``freeze_thaw.py``: how it ended, and what it saved."""
    ended = run("freeze_thaw.py", "--rehearse", "--out", out, *arguments)
    (path,) = out.glob("*.json")
    return ended, json.loads(path.read_text())


def interpreter(directory: Path, text: str) -> Path:
    """Stands in for a Python that has PyTorch."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_every_size_and_way_is_measured_or_says_why_not(tmp_path: Path) -> None:
    broken = interpreter(tmp_path, "echo no PyTorch today >&2; exit 3")
    sizes = ["--sizes", "0.01,0.02", "--once", "0.03", "--runs", "2"]
    ended, result = rehearse(tmp_path, *sizes, "--torch-python", broken)
    assert ended.returncode == 0, ended.stderr
    assert all(line.startswith("SIMULATED") for line in ended.stdout.splitlines())
    rows = {(row["gigabytes"], row["way"]): row["runs"] for row in result["rows"]}
    assert {key: len(runs) for key, runs in rows.items()} == {
        (0.01, "gpusched"): 2,
        (0.02, "gpusched"): 2,
        (0.03, "gpusched"): 1,
    }
    for runs in rows.values():
        assert all(run["right"] and run["freeze_ms"] > 0 < run["thaw_ms"] for run in runs)
    starts = result["cold_starts_ms"]
    assert {size: len(times) for size, times in starts.items()} == {"0.01": 2, "0.02": 2, "0.03": 1}
    assert min(min(times) for times in starts.values()) > 0
    skipped = {each["way"]: each["why"] for each in result["skipped"]}
    assert skipped["bare"] == skipped["fresh"] == "the bare calls need a real driver"
    for way in ("torch_memory_saver", "torch_memory_saver_kept", "to_cpu", "pinned"):
        assert skipped[way] == "ended with 3: no PyTorch today"
    assert result["rehearsal"] is True
    assert result["machine"]["cores"] > 0


def test_wrong_contents_end_the_benchmark_and_are_kept(tmp_path: Path) -> None:
    row = {"gigabytes": 0.01, "freeze_ms": 1.0, "thaw_ms": 1.0, "off_mib": 0, "right": False}
    wrong = interpreter(tmp_path, f"echo a library talks; echo '{json.dumps(row)}'")
    ways = ["--ways", "to_cpu", "--sizes", "0.01", "--once", ""]
    ended, result = rehearse(tmp_path, *ways, "--torch-python", wrong)
    assert ended.returncode == 1
    assert "to_cpu at 0.01 GB: the contents changed" in ended.stderr
    assert [run["right"] for row in result["rows"] for run in row["runs"]] == [False]


def test_a_size_that_does_not_fit_is_left_out_with_the_numbers(tmp_path: Path) -> None:
    session = freeze_thaw.Session(tmp_path, rehearsal=False)
    assert freeze_thaw.fits(session, gpu_with_free_mib(16_000), 15)
    assert not freeze_thaw.fits(session, gpu_with_free_mib(15_000), 15)
    assert session.result["skipped"] == [
        {
            "way": "gpusched",
            "gigabytes": 15,
            "why": "needs 15329 MiB of VRAM, 15000 are free",
        }
    ]


def test_a_way_that_fails_ends_its_size_alone(tmp_path: Path) -> None:
    session, killed = freeze_thaw.Session(tmp_path, rehearsal=False), []
    client: Any = SimpleNamespace(kill=lambda name, force: killed.append((name, force)))

    def run(way: str) -> dict[str, Any]:
        if way == "bare":
            raise DriverError("the driver could not restore")
        return {"freeze_ms": 1.0, "thaw_ms": 1.0, "off_mib": 0, "right": True}

    target: Any = SimpleNamespace(name="w", run=run)
    freeze_thaw.one_size(session, client, target, 3.6, 2, ["gpusched", "bare", "fresh"])
    (path,) = tmp_path.glob("*.json")
    saved = json.loads(path.read_text())
    assert [(row["way"], len(row["runs"])) for row in saved["rows"]] == [("gpusched", 1)]
    (skipped,) = saved["skipped"]
    assert (skipped["way"], skipped["gigabytes"]) == ("bare", 3.6)
    assert "the driver could not restore" in skipped["why"]
    assert killed == [("w", True)]


def gpu_with_free_mib(free: int) -> Any:
    return SimpleNamespace(gpu_free_mb=lambda _gpu: free)


@pytest.mark.parametrize(
    "program",
    ["freeze_thaw.py", "cold_start.py", "hibernate.py", "ray_calls.py", "rlhf_loop.py"],
)
def test_a_rehearsal_without_a_directory_of_its_own_is_refused(program: str) -> None:
    ended = run(program, "--rehearse")
    assert ended.returncode == 2
    assert "a rehearsal is never among the results" in ended.stderr


@pytest.mark.criu
def test_hibernate_measures_every_way_to_disk_and_back(tmp_path: Path, criu: Program) -> None:
    ended = run(
        *("hibernate.py", "--rehearse", "--gigabytes", "0.02", "--runs", "1", "--copies", "1,2"),
        *("--out", tmp_path),
        env={"GPUSCHED_CRIU": criu.path},
    )
    assert ended.returncode == 0, ended.stderr
    (path,) = tmp_path.glob("*.json")
    measured = json.loads(path.read_text())["measured"]
    assert measured["save"]["share_of_disk"] > 0 < measured["revive"]["share_of_disk"]
    assert set(measured["fork_ms"]) == {"1", "2"}


@pytest.mark.ray
@pytest.mark.slow
def test_ray_calls_measures_plain_and_hosted_actors(tmp_path: Path) -> None:
    ended = run(
        *("ray_calls.py", "--rehearse", "--calls", "20", "--mib", "2", "--rounds", "1"),
        *("--out", tmp_path),
    )
    assert ended.returncode == 0, ended.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["hosted"]["tiny_ms"]["median"] > 0
    assert set(result["judged"]) >= {"tiny_over_plain_ms", "in_share_of_memcpy"}


@pytest.mark.ray
@pytest.mark.slow
def test_rlhf_loop_runs_the_same_loop_by_every_way(tmp_path: Path) -> None:
    ended = run("rlhf_loop.py", "--rehearse", "--steps", "2", "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    (path,) = tmp_path.glob("*.json")
    ways = json.loads(path.read_text())["ways"]
    assert set(ways) == {"gpusched", "to_cpu", "resident"}
    assert all(way["contents_right"] for way in ways.values())
    assert ways["gpusched"]["swap_share"] > ways["resident"]["swap_share"]


def test_a_rehearsals_figures_cannot_be_saved_among_the_results(tmp_path: Path) -> None:
    before = sorted(machine.RESULTS.iterdir())
    for directory in (None, machine.RESULTS, machine.RESULTS / "more"):
        with pytest.raises(ValueError, match="mean nothing"):
            machine.save("x", {"rehearsal": True}, directory)
    assert sorted(machine.RESULTS.iterdir()) == before
    assert machine.save("x", {"rehearsal": True}, tmp_path) == tmp_path / "x.json"


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    machine.save("x", REAL, tmp_path)
    with pytest.raises(TypeError):
        machine.save("x", REAL | {"rows": object()}, tmp_path)
    assert json.loads((tmp_path / "x.json").read_text()) == REAL


def test_the_name_of_a_result_says_where_and_when() -> None:
    when = {"time": "2026-11-24T21:53:07+00:00"}
    h100 = {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}
    named = machine.file_name({"benchmark": "freeze_thaw", "machine": when | h100})
    assert named == "freeze-thaw-nvidia-h100-80gb-hbm3-2026-11-24t215307"
    named = machine.file_name({"benchmark": "cold_start", "machine": when | {"gpus": []}})
    assert named == "cold-start-no-gpu-2026-11-24t215307"


def test_touching_ram_leaves_some_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([8 << 30, 7 << 30, 2 << 30])
    monkeypatch.setattr(machine, "_meminfo", lambda: {"MemAvailable": next(left)})
    monkeypatch.setattr(machine, "_PART_BYTES", 1 << 20)
    assert machine.touch_ram(1 << 40)["gib"] == 2 / 1024


def test_cold_start_says_what_it_lacks(tmp_path: Path) -> None:
    ended = run(
        "cold_start.py", "--torch-python", interpreter(tmp_path, "echo no torch >&2; exit 1")
    )
    assert ended.returncode == 1
    assert ended.stderr.strip() == "cold_start.py needs PyTorch, transformers and a GPU: no torch"
