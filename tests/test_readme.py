"""Every command that README.md, CONTRIBUTING.md, docs/ and examples/README.md print is right.

The shell blocks of a page run as printed, in their order, in one shell, against a daemon with simulated GPUs; a page
that starts a daemon of its own has its way. Directories under /tmp are replaced by the test's own. A line that
cannot be run here is in ``NOT_RUN`` with the reason; what it and texts like `gpusched freeze NAME` name must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conftest import StartDaemon
from gpusched.cli.main import program
from gpusched.daemon import sim_directory

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

#: What a line of a shell block begins with; a block without such a line is output, a picture or another language.
PROGRAMS = r"(sudo|make|git|gpusched|python3?|\.venv/bin/\S+|\./install\.sh|systemctl|journalctl|eval|export|\w+=\S+) "
#: Lines that are not run here, and why.
NOT_RUN = {
    r"sudo ": "changes this machine",
    r"make |\./install\.sh": "has tests of its own",
    r"git clone": "fetches",
    r"systemctl |journalctl ": "needs the service",
    r".*~/": "writes into somebody's home",
    r"gpusched rescue": "needs a process that a daemon left",
    r"gpusched doctor|.*benchmarks/": "looks at this machine's hardware, and has tests of its own",
    r".*examples/(freeze|two|socat)": "tests/test_examples.py runs them",
    r"gpusched dashboard": "needs a terminal",
}
#: Lines that end only when they are interrupted.
ENDLESS = r"gpusched (logs .*(-f|--follow)|events .*(-f|--follow))"
#: Usage texts: they name commands, and are none.
SYNTAX = r".*(\[OPTIONS\]|\bNAME\b|\bPID\b|\bCMD\b)"

#: Ends what a page started, at the daemon that it used last, whatever happened before.
END_ALL = """
from gpusched import GpuSched
try:
    for process in (client := GpuSched()).processes():
        client.kill(process["name"], force=True)
except ConnectionError:
    pass
"""


def shell_blocks(page: Path) -> Iterator[str]:
    for language, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.M | re.S):
        if language in {"sh", "bash", "console"} or (
            not language and re.search(rf"^{PROGRAMS}", text, re.M)
        ):
            yield text


def lines_of(block: str) -> Iterator[str]:
    """The commands of a block, without prompts, comments and continuation."""
    for line in block.replace("\\\n", " ").splitlines():
        text = re.sub(r"(^|\s)#.*$", "", line.removeprefix("$ ")).strip()
        if text:
            yield text


def runs(line: str) -> bool:
    return not any(re.match(pattern, line) for pattern in (*NOT_RUN, SYNTAX))


def script(page: Path, scratch: Path) -> str:
    """The page's shell blocks as one program. Each line is echoed first, so that a failure shows where it was."""
    out = ["set -euo pipefail"]
    for block in shell_blocks(page):
        for line in filter(runs, lines_of(block)):
            command = line.replace("/tmp/", f"{scratch}/")
            out.append(f"echo {shlex.quote('+ ' + command)}")
            if re.match(ENDLESS, command):
                out.append(f"timeout -s INT 1 {command} || [[ $? == 124 ]]")
            elif re.search(r"gpusched( -\S+ \S+)* daemon\b", command):
                # In a terminal of its own: the next block is for another terminal, when this one serves.
                alone = not command.endswith("&")
                out.append(command + (f" & {_wait_for_daemon(command)}" if alone else ""))
            else:
                out.append(command)
    return "\n".join(out)


def _wait_for_daemon(command: str) -> str:
    socket = re.search(r"(?:-s|--socket) (\S+)", command)
    path = socket[1] if socket else "$GPUSCHED_SOCKET"
    return f"until [[ -S {path} ]]; do kill -0 $!; sleep 0.05; done"


def make_checkout(directory: Path, pages: str) -> None:
    """A directory like a checkout after ``make venv``, with the programs that the pages name but nobody has."""
    directory.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (directory / path.name).symlink_to(path)
    (directory / ".venv").symlink_to(sys.prefix)
    for name in set(re.findall(r"python3? (\w+\.py)", pages)):
        (directory / name).write_text(
            "from gpusched.workload.__main__ import main\nmain(['--vram', '600M'])\n"
        )


def runnable() -> list[Path]:
    return [p for p in PAGES if any(runs(x) for b in shell_blocks(p) for x in lines_of(b))]


@pytest.mark.parametrize("page", runnable(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_shell_blocks_of_a_page_run_as_printed(
    page: Path, tmp_path: Path, private_daemon: StartDaemon
) -> None:
    daemon = private_daemon(vram="1G")
    make_checkout(tmp_path / "checkout", page.read_text())
    text = script(page, daemon.directory)
    try:
        ended = subprocess.run(
            [
                "bash",
                "-c",
                f"trap 'python -c \"$END_ALL\"; jobs -p | xargs -r kill; wait' EXIT\n{text}",
            ],
            cwd=tmp_path / "checkout",
            env={
                "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "GPUSCHED_SOCKET": daemon.socket,
                "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
                "END_ALL": END_ALL,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    finally:  # what a daemon of the page's own leaves: simulated GPUs live in shared memory
        for state_dir in re.findall(r"--state-dir (\S+)", text):
            shutil.rmtree(sim_directory(Path(state_dir)), ignore_errors=True)
    assert ended.returncode == 0, f"{ended.stdout}{ended.stderr}"


def test_the_readme_shows_a_daemon_without_a_gpu_and_the_commands() -> None:
    commands = [line for block in shell_blocks(ROOT / "README.md") for line in lines_of(block)]
    ours = [line for line in commands if runs(line)]
    for words in ("daemon --backend sim", "gpusched run", "gpusched freeze", "gpusched swap"):
        assert any(words in line for line in ours), f"{words} is not among {ours}"
    assert "make demo" in commands
    assert "make test" in commands


# -- what is named exists -------------------------------------------------------------------------


def named() -> Iterator[tuple[str, str]]:
    """(page, command line) of every `gpusched ...` in a text, and of every line of a shell block."""
    for page in PAGES:
        text = page.read_text()
        prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
        for found in re.findall(r"`((?:sudo )?gpusched [^`]+|make [a-z][^`]*)`", prose):
            yield str(page.relative_to(ROOT)), found
        for block in shell_blocks(page):
            for line in lines_of(block):
                for part in re.findall(r"(?:^|[\s/(\"])((?:gpusched|make) [^|;)]*)", line):
                    yield str(page.relative_to(ROOT)), part


def mistakes(command_line: str) -> Iterator[str]:
    words = command_line.replace("\\", "").removeprefix("sudo ").split()
    words = words[: words.index("--")] if "--" in words else words
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
        yield from (f"make {w}" for w in words[1:2] if w not in targets)
        return
    context = click.Context(program)
    known = {name: program.get_command(context, name) for name in program.list_commands(context)}
    command, rest = None, words[1:]
    while rest and command is None:
        word = rest.pop(0).strip(",.")
        if word in {"-s", "--socket"}:
            rest = rest[1:]
        elif word in {"COMMAND", "[-s", "...", "NAME", "--version", "--help"}:
            return
        elif word not in known:
            yield f"no command {word}"
            return
        else:
            command = known[word]
    if command is not None:
        options = {
            o for p in [*command.params, *program.params] for o in [*p.opts, *p.secondary_opts]
        }
        for word in rest:
            option = word.strip("[].,").split("=")[0]
            if re.fullmatch(r"--?[a-z][a-z-]*", option) and option not in options | {"--help"}:
                yield f"{command.name} has no option {option}"


def test_every_command_and_option_that_is_named_exists() -> None:
    found = list(named())
    assert len(found) > 30
    wrong = [f"{page}: {line}: {why}" for page, line in found for why in mistakes(line)]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("gpusched frobnicate NAME", "no command frobnicate"),
        ("gpusched -s PATH freeze --quickly NAME", "freeze has no option --quickly"),
        ("make tea", "make tea"),
        ("gpusched run --evictable -- python --no-such", None),
    ],
)
def test_a_wrong_name_would_be_noticed(line: str, why: str | None) -> None:
    assert list(mistakes(line)) == ([why] if why else [])
