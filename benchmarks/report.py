"""Every measured figure in README.md and docs/: tables, sentences and plots, made from the result files.

    python benchmarks/report.py            writes what has changed
    python benchmarks/report.py --check    writes nothing; exits with 1 where something is out of date

A page says where: ``<!-- report: NAME -->`` and ``<!-- /report -->``, each on a line; what is between them is replaced.
The names are those of ``report_tables.BLOCKS``. What has not been measured yet leaves its block empty. Plots go to
docs/plots and need matplotlib; ``--check`` needs only the standard library.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import report_plots
from report_data import load
from report_format import Page
from report_tables import BLOCKS

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^(<!-- report: (\w+) -->\n)(.*?)^(<!-- /report -->)$", re.M | re.S)


def pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def filled(text: str, page: Page) -> str:
    """The page with every block as it should be. Raises KeyError for a name that there is not."""
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]](page) + found[4], text)


def out_of_date(root: Path, results: Path, *, write: bool) -> Iterator[str]:
    """The paths, from ``root``, of what does not say what the results say; ``write`` puts each right."""
    found, plots = load(results), root / "docs" / "plots"
    for path in pages(root):
        text = path.read_text()
        made = filled(text, Page(directory=path.parent, plots=plots, results=found))
        if made != text:
            yield str(path.relative_to(root))
            if write:
                path.write_text(made)
    wanted = report_plots.wanted(Page(directory=root, plots=plots, results=found))
    for name, (made_from, plot) in wanted.items():
        if report_plots.digest_in(plots / name) != made_from:
            yield f"docs/plots/{name}"
            if write:
                report_plots.draw(plots / name, made_from, plot)
    for path in sorted(plots.glob("*")):
        if path.name not in wanted:
            yield f"{path.relative_to(root)} (of no result any more)"
            if write:
                path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    parser.add_argument("--results", type=Path, help="default: ROOT/benchmarks/results")
    options = parser.parse_args()
    results = options.results or options.root / "benchmarks" / "results"
    changed = list(out_of_date(options.root, results, write=not options.check))
    for path in changed:
        print(f"{path} is out of date: make report" if options.check else f"wrote {path}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
