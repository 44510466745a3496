"""Every measured figure in README.md and docs/ is from a file under benchmarks/results/, and equal to it.

Figures stand in blocks that ``benchmarks/report.py`` fills from the files; the repository's own must be what it would
write now, and outside of them no page may have what looks like a measurement. Does not cover docs/decisions/: records
of what was found on a day, with how it was found.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import report
from daemons import ROOT
from report_data import load
from report_format import Page
from report_tables import BLOCKS

RESULTS = ROOT / "benchmarks" / "results"
#: A number with a unit that something was measured in.
MEASURED = re.compile(
    r"(?<![\w.])\d[\d.,]*(?:\s?(?:ms|µs|us|ns|s|min|[GM]i?B/s|%|\u00d7|x)(?![\w/])"
    r"|[ -](?:milli|micro)?seconds?\b|[ -]minutes?\b| times\b| percent\b)"
)
#: What looks like one and is none, and why.
NO_MEASUREMENT = {
    "0 ms": "a goal already reached",
    "2 minutes": "a default",
    "80 %": "a default",
    "5 s": "a limit",
}
MACHINE = {
    "time": "2026-11-24T20:00:00+00:00",
    "gpus": [{"name": "NVIDIA H100 80GB HBM3", "mib": 81559}],
    "driver": "580.159.04",
    "cores": 16,
    "ram_gib": 125.7,
}


# -- the repository -------------------------------------------------------------------------------


def test_what_the_pages_show_is_what_the_result_files_say() -> None:
    assert list(report.out_of_date(ROOT, RESULTS, write=False)) == [], "out of date: make report"


def stray(text: str) -> list[str]:
    """What looks like a measurement outside of the blocks, of code and of what is known not to be one."""
    prose = re.sub(r"^ *```.*?^ *```$", "", report.BLOCK.sub("", text), flags=re.M | re.S)
    prose = re.sub(r"`[^`\n]*`", "`code`", prose)
    return [found for found in MEASURED.findall(prose) if found not in NO_MEASUREMENT]


@pytest.mark.parametrize("page", report.pages(ROOT), ids=lambda path: path.name)
def test_no_measurement_stands_outside_of_the_blocks(page: Path) -> None:
    assert stray(page.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "a thaw takes 120 ms",
        "moves at 54.4 GB/s",
        "in 0.45 s.",
        "12 times as fast",
        "a 3 percent overhead",
        "loads in 15 to 60 seconds",
        "adds 3 %, no more",
        "8x faster",
    ],
)
def test_a_measurement_in_prose_would_be_noticed(text: str) -> None:
    assert stray(f"# A page\n\nIt {text}\n") != []


def test_every_block_of_the_pages_has_a_name_and_an_end() -> None:
    named = []
    for page in report.pages(ROOT):
        text = page.read_text()
        blocks = [found[2] for found in report.BLOCK.finditer(text)]
        assert text.count("<!-- report:") == text.count("<!-- /report -->") == len(blocks), page
        named += blocks
    assert set(named) == set(BLOCKS), "a block is unknown, or nowhere shown"


# -- how a page is filled -------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A README and a page with every block, and no results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    text = "".join(f"## {name}\n\n<!-- report: {name} -->\n<!-- /report -->\n" for name in BLOCKS)
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "docs" / "measured.md").write_text(text)
    return tmp_path


def save(tree: Path, name: str, benchmark: str, **more: Any) -> Path:
    path = tree / "benchmarks" / "results" / f"{name}.json"
    path.write_text(
        json.dumps({"benchmark": benchmark, "machine": MACHINE, "idle_mib": 600} | more)
    )
    return path


def rows(way: str, size: float, freeze_ms: Sequence[float]) -> list[dict[str, Any]]:
    runs = [{"freeze_ms": f, "thaw_ms": f / 2, "off_mib": 610, "right": True} for f in freeze_ms]
    return [{"gigabytes": size, "way": way, "runs": runs}]


def model(cold_ms: float) -> dict[str, Any]:
    parts = {"import_ms": [cold_ms - 1500], "load_ms": [500.0], "first_token_ms": [1000.0]}
    after = {"freeze_ms": [900.0], "thaw_ms": [380.0], "token_after_thaw_ms": [20.0]}
    about = {"model": "M", "parameters": 10, "file_bytes": 20, "vram_mib": 2048}
    return about | {"cold_start_ms": [cold_ms]} | parts | after


def filled(tree: Path) -> str:
    """The README with its blocks filled; plots are not drawn."""
    results = load(tree / "benchmarks" / "results")
    page = Page(directory=tree, plots=tree / "docs" / "plots", results=results)
    return report.filled((tree / "README.md").read_text(), page)


def block(text: str, name: str) -> str:
    (found,) = [match[3] for match in report.BLOCK.finditer(text) if match[2] == name]
    return str(found)


def test_what_has_not_been_measured_leaves_its_block_empty(tree: Path) -> None:
    save(tree, "rehearsed", "freeze_thaw", rehearsal=True, rows=rows("gpusched", 1.5, [1.0]))
    save(tree, "cut-off", "cold_start", models=[model(1.0) | {"token_after_thaw_ms": []}])
    (tree / "benchmarks" / "results" / "a-study.json").write_text('{"kinds": {}}')
    assert filled(tree) == (tree / "README.md").read_text()
    assert list(report.out_of_date(tree, tree / "benchmarks" / "results", write=False)) == []


def test_the_runs_of_several_files_of_one_device_are_joined(tree: Path) -> None:
    save(tree, "one", "freeze_thaw", rows=rows("gpusched", 15.0, [8000.0, 9000.0]))
    save(tree, "two", "freeze_thaw", rows=rows("gpusched", 15.0, [12000.0]))
    other = MACHINE | {"gpus": [{"name": "NVIDIA H200", "mib": 143771}]}
    save(tree, "three", "freeze_thaw", machine=other, rows=rows("gpusched", 15.0, [5000.0]))
    text = filled(tree)
    short, full = block(text, "freeze_thaw"), block(text, "freeze_thaw_full")
    assert "| **gpusched** | 9.00 / 4.50 |" in short
    assert (
        "| **gpusched** | 15 | 3 | 9.00 (8.00-12.0) | 1.7 | 4.50 (4.00-6.00) | 3.3 | 10 MiB |"
        in full
    )
    assert "medians of 3 runs" in short
    for name in ("one", "two"):
        assert f"[{name}.json](benchmarks/results/{name}.json)" in short
    assert "| **gpusched** | 5.00 / 2.50 |" in short, "another device has a table of its own"
    assert short.count("NVIDIA H200, driver 580.159.04, 16 cores, 126 GiB of RAM") == 1


def test_what_gpusched_adds_is_told_where_the_drivers_own_times_are_known(tree: Path) -> None:
    (row,) = rows("gpusched", 15.0, [8000.0, 9000.0, 7000.0])
    for run, (freeze, thaw) in zip(row["runs"], [(8, 7), (9, 5), (12, 6)], strict=True):
        run["driver_freeze_ms"] = run["freeze_ms"] - freeze
        run["driver_thaw_ms"] = run["thaw_ms"] - thaw
    save(tree, "one", "freeze_thaw", rows=[row, *rows("bare", 15.0, [7000.0])])
    full = block(filled(tree), "freeze_thaw_full")
    assert "| 15 | 3 | 9.0 (8.0-12.0) | 6.0 (5.0-7.0) |" in full
    assert full.rstrip().endswith("(5.0-7.0) |"), "the bare calls have no such row"


def test_the_cold_start_of_the_workload_stands_beside_its_moves(tree: Path) -> None:
    save(tree, "one", "freeze_thaw", rows=rows("gpusched", 15.0, [8000.0]))
    starts = {"15": [1000.0, 3000.0, 2000.0], "3.6": [500.0]}
    save(tree, "two", "freeze_thaw", rows=[], cold_starts_ms=starts)
    full = block(filled(tree), "freeze_thaw_full")
    assert "| 15 | 3 | 2.00 (1.00-3.00) | 8.00 | 4.00 |" in full
    assert "| 3.6 | 1 | 0.500 |  |  |" in full


def test_a_way_that_was_not_measured_is_named_with_its_reason(tree: Path) -> None:
    why = {"way": "torch_memory_saver", "gigabytes": None, "why": "no module of that name"}
    big = {"way": "to_cpu", "gigabytes": 40, "why": "too large"}
    again = {"way": "to_cpu", "gigabytes": 1.5, "why": "not today"}  # and measured in another run
    rows_1 = rows("to_cpu", 1.5, [1500.0])
    save(tree, "one", "freeze_thaw", rows=rows_1, skipped=[why, big, again])
    full = block(filled(tree), "freeze_thaw_full")
    assert "Not measured: torch_memory_saver, CPU backup: no module of that name." in full
    assert 'Not measured: .to("cpu") and back at 40 GB: too large.' in full
    assert "not today" not in full
    assert '| .to("cpu") and back | 1.5 | 1 | 1.50 | 1.0 | 0.750 | 2.0 | 10 MiB |' in full


def test_a_cold_start_is_compared_with_the_thaw_and_its_token(tree: Path) -> None:
    save(tree, "one", "cold_start", models=[model(8000.0)])
    text = filled(tree)
    assert "| M | 2.0 GiB | 8.00 s | 6.50 s | 0.900 s | **0.400 s** | 20 times |" in block(
        text, "cold_start"
    )
    assert "| thaw to first token | 0.400 |" in block(text, "cold_start_full")


def test_a_soak_shows_what_there_was_before_and_after(tree: Path) -> None:
    counts = {"passed": 1495, "failed": [], "skipped": 43, "seconds": 530.2, "commit": "abc1234"}
    swaps = {"cycles": 1000, "warm_up": 10, "first": {"threads": 7}, "last": {"threads": 7}}
    save(tree, "soak", "", soak="all", swaps=swaps, **counts)
    text = block(filled(tree), "soak")
    assert "1495 tests passed, 0 failed, 43 were skipped, in 530 s." in text
    assert "1000 swaps there and back" in text
    assert "| threads | 7 | 7 |" in text


def test_a_loop_in_ray_stands_beside_other_ways_to_take_turns(tree: Path) -> None:
    def way(step: float, swap: float) -> dict[str, Any]:
        step_s = {"median": step, "min": step - 0.1, "max": step + 0.1, "runs": 3}
        swap_s = {"median": swap, "min": swap, "max": swap, "runs": 3}
        return {"step_s": step_s, "swap_s": swap_s, "swap_share": 0.5, "contents_right": True}

    sizes = {"policy": 4_000_000_000, "reward": 2_000_000_000, "reference": 2_500_000_000}
    more = {"sizes_bytes": sizes, "passes": 20, "ray": "2.60.0"}
    ways = {"gpusched": way(2.0, 1.0), "to_cpu": way(6.0, 3.0), "resident": {"skipped": "too big"}}
    save(tree, "old", "rlhf_loop", ways={"gpusched": way(9.0, 8.0)}, **more)
    save(tree, "one", "rlhf_loop", ways=ways, **more)
    text = block(filled(tree), "rlhf_loop")
    assert "4 GB (policy), 2 GB (reward) and 2.5 GB (reference)" in text
    assert "| **gpusched** | 3 | 2.00 (1.90-2.10) | 1.00 (1.00-1.00) | 50% |" in text
    assert '| .to("cpu") and back | 3 | 6.00 (5.90-6.10) |' in text
    assert "Not measured: all stay on the GPU: too big." in text
    assert "9.00" not in text, "the newest file of the same sizes counts"
    assert "the contents of all models were the same at the end" in text
    wrong = {"gpusched": way(2.0, 1.0) | {"contents_right": False}}
    save(tree, "two", "rlhf_loop", ways=wrong, **more)
    assert "were NOT THE SAME at the end" in block(filled(tree), "rlhf_loop")


def test_a_call_in_ray_stands_beside_a_plain_one(tree: Path) -> None:
    def summary(median: float) -> dict[str, float]:
        return {"median": median, "min": median / 2, "max": median * 2, "runs": 20}

    calls = {
        "plain": {"tiny_ms": summary(1.2), "in_ms": summary(3.0), "out_ms": summary(13.0)},
        "hosted": {"tiny_ms": summary(1.44), "in_ms": summary(12.0), "out_ms": summary(24.0)},
        "memcpy_ms": summary(9.0),
        "judged": {
            "tiny_over_plain_ms": 0.24,
            "in_share_of_memcpy": 0.75,
            "out_share_of_memcpy": 0.375,
            "plain_in_share_of_memcpy": 3.0,
            "plain_out_share_of_memcpy": 0.692,
        },
    }
    save(tree, "one", "ray_calls", mib=64, ray="2.60.0", **calls)
    text = block(filled(tree), "ray_calls")
    assert "| a call with one number | 1.20 (0.60-2.40) | 1.44 (0.72-2.88) |" in text
    assert "| 64 MiB as a result | 13.00 (6.50-26.00) | 24.00 (12.00-48.00) |" in text
    assert "| into the model | 3.00 | 0.75 |" in text
    assert "A tiny call costs 0.24 ms more than on a plain actor." in text


def test_an_unknown_block_is_an_error(tree: Path) -> None:
    (tree / "README.md").write_text("<!-- report: nonsense -->\n<!-- /report -->\n")
    with pytest.raises(KeyError, match="nonsense"):
        filled(tree)


# -- the program ----------------------------------------------------------------------------------


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--root", str(tree), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_report_is_written_checked_and_found_out_of_date(tree: Path) -> None:
    every = rows("gpusched", 1.5, [1100.0, 1200.0, 1300.0]) + rows("pinned", 1.5, [30.0])
    path = save(tree, "one", "freeze_thaw", rows=every)
    save(tree, "two", "cold_start", models=[model(8000.0)])
    assert run(tree, "--check").returncode == 1
    assert run(tree).returncode == 0
    assert run(tree, "--check").stdout == ""
    plots = sorted((tree / "docs" / "plots").iterdir())
    assert [plot.name.partition("-")[0] for plot in plots] == ["cold_start", "freeze_thaw"]
    for plot in plots:
        assert plot.read_text().startswith("<?xml"), "an SVG"
        assert f"](docs/plots/{plot.name})" in (tree / "README.md").read_text()
        assert f"](plots/{plot.name})" in (tree / "docs" / "measured.md").read_text()

    # One figure in a file, one in a page, one plot too many, one too few: each is named, and put right.
    path.write_text(path.read_text().replace("1200.0", "1250.0"))
    ended = run(tree, "--check")
    assert ended.returncode == 1
    for name in ("README.md", "docs/measured.md", f"docs/plots/{plots[1].name}"):
        assert f"{name} is out of date: make report" in ended.stdout
    assert plots[0].name not in ended.stdout
    run(tree)
    readme = tree / "README.md"
    readme.write_text(readme.read_text().replace("| 1.25 / ", "| 0.25 / "))
    shutil.copy(plots[0], plots[0].with_name("old.svg"))
    plots[1].unlink()
    named = [line.split()[0] for line in run(tree, "--check").stdout.splitlines()]
    assert named == ["README.md", f"docs/plots/{plots[1].name}", "docs/plots/old.svg"]
    assert run(tree).returncode == 0
    assert run(tree, "--check").stdout == ""
