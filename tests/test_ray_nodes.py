"""Several nodes: the programs ``ray_three_nodes.py`` and ``ray_attached_nodes.py`` run to their ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from daemons import ROOT
from ray_three_nodes import ENVIRONMENT

pytestmark = pytest.mark.ray


def run(program: str, *arguments: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / program), *arguments],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.rstrip().endswith("all right")


@pytest.mark.slow  # three nodes take their time to start
def test_three_nodes_with_a_daemon_each() -> None:
    run("ray_three_nodes.py")


def test_plain_actors_on_two_nodes_are_attached_and_moved_as_one() -> None:
    run("ray_attached_nodes.py")


@pytest.mark.slow  # Ray takes its time to make an actor again elsewhere
def test_attached_actors_on_three_nodes_one_of_which_is_killed() -> None:
    run("ray_attached_nodes.py", "--all")
