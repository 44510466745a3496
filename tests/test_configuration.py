"""docs/configuration.md lists every setting, with the default and the option that it really has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from gpusched import config
from gpusched.cli.main import program
from gpusched.cli.node_commands import daemon_command
from gpusched.config import Settings

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "configuration.md").read_text()


class Row(NamedTuple):
    key: str
    option: str
    default: str


ROWS = [
    Row(*found)
    for found in re.findall(r"^\| `(\w+)` \| (?:`(--[\w-]+)`)? ?\| (.+?) \| .+ \|$", PAGE, re.M)
]
#: Derived, or nothing: these have words for a default.
WORDS = {
    "group": "none",
    "user_ram_budget": "none",
    "disk_dir": "`images` in `state_dir`",
    "criu": "`$GPUSCHED_CRIU`",
    "ram_budget": "80 % of the host's RAM",
}


@pytest.fixture
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPUSCHED_SOCKET", "GPUSCHED_CRIU", *config.PASSED_ON):
        monkeypatch.delenv(name, raising=False)


def field_of(key: str) -> str:
    return config._FILE_KEYS.get(key, key)


def test_every_setting_is_listed_once() -> None:
    listed = sorted(field_of(row.key) for row in ROWS)
    settable = {f.name for f in fields(Settings)} - {"passed_on_env"}
    assert listed == sorted(settable)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_the_listed_default_is_the_default(
    row: Row, tmp_path: Path, empty_environment: None
) -> None:
    default = getattr(Settings(), field_of(row.key))
    if row.key in WORDS:
        assert default is None
        assert row.default == WORDS[row.key]
        return
    file = tmp_path / "config.toml"
    file.write_text(f"{row.key} = {row.default.strip('`')}\n")
    loaded = config.load(file, {})
    assert getattr(loaded, field_of(row.key)) == default


def test_the_listed_options_are_those_of_the_daemon() -> None:
    of_daemon = {
        parameter.name: parameter.opts[-1]
        for parameter in [*daemon_command.params, *program.params]
        if parameter.name not in {"config", "version"}
    }
    of_daemon["socket_path"] = of_daemon.pop("socket")
    assert {field_of(row.key): row.option for row in ROWS if row.option} == of_daemon


def test_the_example_is_accepted(tmp_path: Path, empty_environment: None) -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.S)
    file = tmp_path / "config.toml"
    file.write_text(example)
    loaded = config.load(file, {})
    assert (loaded.group, loaded.lock_timeout_s) == ("ml", 60.0)
    assert loaded.ram_budget_bytes == 400 << 30


def test_the_page_names_every_variable_that_is_handed_on() -> None:
    assert [name for name in config.PASSED_ON if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rambudget = '1G'", "rambudget"),
        ("ram_budget = 'lots'", "ram_budget = 'lots'"),
        ("sim_gpus = '2'", "expected int"),
        ("backend = 'gpu'", "must be one of auto, cuda, sim"),
        ("passed_on_env = 'x'", "no such setting"),
    ],
)
def test_a_wrong_line_is_refused_with_its_key(line: str, said: str, tmp_path: Path) -> None:
    from gpusched.errors import InvalidRequest

    file = tmp_path / "config.toml"
    file.write_text(f"{line}\n")
    with pytest.raises(InvalidRequest, match=re.escape(said)) as caught:
        config.load(file, {})
    assert str(file) in str(caught.value)
