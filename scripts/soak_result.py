"""Keeps what a soak showed: reads pytest's JUnit file, writes benchmarks/results/soak-DATE.json.

    python scripts/soak_result.py JUNIT.xml

Says the counts, the slowest tests, every failure, and what tests/test_soak.py counted before and after its swaps, with
the machine and the commit. Exits with 1 after a failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import machine  # noqa: E402 - a neighbour's module, found by the line above

SLOWEST: Final = 15


def summarise(junit: Path) -> dict[str, Any]:
    """The result as one JSON object; times in seconds."""
    suite = next(ET.parse(junit).getroot().iter("testsuite"))  # noqa: S314
    cases = [
        (f"{case.get('classname', '')}::{case.get('name', '')}", float(case.get("time", 0)), case)
        for case in suite.iter("testcase")
    ]
    failed = [name for name, _, case in cases if case.find("failure") is not None]
    failed += [name for name, _, case in cases if case.find("error") is not None]
    skipped = [case.find("skipped") for _, _, case in cases if case.find("skipped") is not None]
    slowest = sorted(cases, key=lambda c: -c[1])[:SLOWEST]
    swaps = suite.find("testcase/properties/property[@name='swaps']")
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return {
        "soak": "every test with its full counts (GPUSCHED_SOAK=1)",
        "commit": subprocess.run(
            commit, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": machine.describe(),
        "passed": len(cases) - len(set(failed)) - len(skipped),
        "failed": sorted(set(failed)),
        "skipped": len(skipped),
        "seconds": round(float(suite.get("time", 0)), 1),
        "swaps": json.loads(swaps.get("value", "null")) if swaps is not None else None,
        "slowest": {name: round(seconds, 1) for name, seconds, _ in slowest},
    }


def main() -> int:
    result = summarise(Path(sys.argv[1]))
    path = machine.save(f"soak-{result['machine']['time'][:10]}", result)
    print(f"{result['passed']} passed, {len(result['failed'])} failed: {path.relative_to(ROOT)}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
