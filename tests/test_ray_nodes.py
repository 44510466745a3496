"""Several nodes: the program ``ray_three_nodes.py`` runs to its end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from daemons import ROOT
from ray_three_nodes import ENVIRONMENT


@pytest.mark.ray
@pytest.mark.slow  # three nodes take their time to start
def test_three_nodes_with_a_daemon_each() -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ray_three_nodes.py")],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.rstrip().endswith("all right")
