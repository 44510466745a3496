"""The documents that are made from the code say what the code says now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import make_docs

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", list(make_docs.PAGES))
def test_a_generated_document_equals_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == make_docs.PAGES[name](), "out of date: make docs"


def test_the_architecture_table_lists_exactly_the_modules_of_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = {
        line.split("`")[1]
        for line in text.split(make_docs.BEGIN)[1].split(make_docs.END)[0].splitlines()
        if line.startswith("| `")
    }
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gpusched").rglob("*.py")
        if path.stat().st_size > 0
    }
    assert modules <= listed
    assert all((ROOT / name).is_file() for name in listed)


def test_check_fails_and_writes_nothing_when_a_document_is_out_of_date(tmp_path: Path) -> None:
    for folder in ("docs", "scripts", "gpusched"):
        (tmp_path / folder).mkdir()
    for name in make_docs.PAGES:
        (tmp_path / "docs" / name).write_text((ROOT / "docs" / name).read_text())
    script = tmp_path / "scripts" / "make_docs.py"
    for part in ("make_docs.py", "state_texts.py"):
        (script.parent / part).write_text((ROOT / "scripts" / part).read_text())
    stale = tmp_path / "docs" / "states.md"
    stale.write_text("| `active` | `thaw` | `frozen` |\n")

    ended = subprocess.run(
        [sys.executable, str(script), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )

    assert ended.returncode == 1
    assert "docs/states.md is out of date: make docs" in ended.stderr
    assert "docs/errors.md" not in ended.stderr
    assert stale.read_text() == "| `active` | `thaw` | `frozen` |\n"


def test_every_relative_link_in_the_documents_leads_to_a_file() -> None:
    pages = [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    readme = ROOT / "README.md"
    pages += [readme] if readme.exists() else []
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for part in page.read_text().split("](")[1:]
        if not (target := part.split(")")[0].split("#")[0]).startswith(("http:", "https:"))
        and not (page.parent / target).exists()
    ]
    assert not broken
