"""The examples in Ray run as they stand, each with a Ray of its own, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import ROOT, PrivateDaemon, wait_until

pytestmark = pytest.mark.ray
EXAMPLES = sorted((ROOT / "examples" / "in_ray").glob("*.py"))
SAID = {
    "attached.py": (
        r"^frozen: 150 MiB are in ram; loss 0.5$",
        r"^it answers: \[1.0, 0.5\]$",
        r"^critic: loss 1.0$",
        r"^after the swap the waiting step goes on: loss 0.333$",
        r"^states: \['active', 'frozen'\]$",
    ),
    "grpo.py": (  # the mean reward rises
        r"^step 1: mean reward 0\.0\d\d, swaps \d+\.\d\d s$",
        r"^step 25: mean reward 0\.[5-9]\d\d, swaps \d+\.\d\d s$",
    ),
    "reward_swap.py": (
        r"^swapped: 150 MiB off, 150 MiB on$",
        r"^scores: \[27, 22\]$",
        r"^policy is frozen; its next call waits$",
        r"^after the swap back: \['again, and so on'\]$",
    ),
    "two_nodes.py": (
        r"^forward: \[20, 21\]$",
        r"^frozen: \['ram', 'ram'\]$",
        r"^states: \['frozen', 'frozen'\]$",
        r"^forward: \[40, 41\]$",
    ),
}
ARGUMENTS = {"grpo.py": ["--steps", "25"], "two_nodes.py": ["local"]}
#: What an example needs that is not among the development's dependencies. (The arithmetic of grpo.py has tests of its
#: own, which need neither: test_ray_grpo.py.)
NEEDS = {"grpo.py": ("torch", "transformers")}


@pytest.fixture(scope="module")
def daemon() -> Iterator[PrivateDaemon]:
    daemon = PrivateDaemon(vram="256M")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.end()


def test_every_example_is_tested_short_and_listed() -> None:
    assert {path.name for path in EXAMPLES} == set(SAID)
    listed = re.findall(r"^\| \[in_ray/(.+?)\]", (ROOT / "examples/README.md").read_text(), re.M)
    assert sorted(listed) == [path.name for path in EXAMPLES]
    assert [path.name for path in EXAMPLES if len(path.read_text().splitlines()) >= 120] == []


@pytest.mark.slow  # a Ray of its own for each
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_does_what_it_says_and_leaves_nothing(
    example: Path, daemon: PrivateDaemon
) -> None:
    missing = [
        each for each in NEEDS.get(example.name, ()) if importlib.util.find_spec(each) is None
    ]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}, which this Python does not have")
    ended = subprocess.run(
        [sys.executable, str(example), *ARGUMENTS.get(example.name, [])],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "GPUSCHED_SOCKET": daemon.socket,
            "GPUSCHED_RAY_DIR": str(daemon.directory / "ray"),
            "GPUSCHED_SIM_DIR": str(daemon.sim_dir),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    check(example.name, ended)
    wait_until(
        lambda: not daemon.client().processes(), within_s=25, what="hosts and keeper have ended"
    )


def check(name: str, ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for said in SAID[name]:
        assert re.search(said, ended.stdout, re.M), f"{said!r} is missing in:\n{ended.stdout}"


#: A cluster with a node for each daemon's socket, and a driver in it. In a process of its own, as every cluster.
IN_A_CLUSTER = """
import subprocess, sys
from ray.cluster_utils import Cluster
example, *sockets = sys.argv[1:]
cluster = Cluster()
try:
    for socket in sockets:
        variables = {"GPUSCHED_SOCKET": socket}
        cluster.add_node(num_cpus=2, env_vars=variables, include_dashboard=False)
    ended = subprocess.run([sys.executable, example, cluster.address])
finally:
    cluster.shutdown()
sys.exit(ended.returncode)
"""


@pytest.mark.slow  # a Ray of two nodes
def test_the_example_of_two_nodes_has_a_model_on_each(daemon: PrivateDaemon) -> None:
    other = PrivateDaemon(vram="256M")
    before = daemon.client().status()["metrics"]["freezes"]
    example = str(ROOT / "examples" / "in_ray" / "two_nodes.py")
    try:
        other.start()
        ended = subprocess.run(
            [sys.executable, "-c", IN_A_CLUSTER, example, daemon.socket, other.socket],
            env={
                **{name: value for name, value in os.environ.items() if name[:4] != "RAY_"},
                "GPUSCHED_RAY_DIR": str(daemon.directory / "ray"),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        check("two_nodes.py", ended)
        for each, was in ((daemon, before), (other, 0)):
            assert each.client().status()["metrics"]["freezes"] - was == 1, "a shard on each"
            wait_until(
                lambda each=each: not each.client().processes(),  # type: ignore[misc]
                within_s=25,
                what="hosts and keeper have ended",
            )
    finally:
        other.end()
