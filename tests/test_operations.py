"""docs/operations.md quotes messages that the code really has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text()


def texts(tree: ast.AST) -> Iterator[str]:
    """Every string of a module, with `…` where a value is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = [list(texts(side)) for side in (node.left, node.right)]
            yield "".join(side[0] if side else "…" for side in sides)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


SOURCE = "\n".join(
    text
    for path in sorted((ROOT / "gpusched").rglob("*.py"))
    for text in texts(ast.parse(path.read_text()))
)


def pattern(quoted: str) -> str:
    """A quoted `…` may be any part of one message, in the code's form too (`%s`, `…`)."""
    return "[^\n]*?".join(map(re.escape, quoted.strip("… ").split("…")))


def quoted() -> list[str]:
    rows = re.findall(r"^\| `([^`]+)` \| .+ \| .+ \|$", PAGE, re.M)
    return rows + re.findall(r"`(the driver [^`]+)`", PAGE.split("## When the daemon is gone")[1])


def test_every_quoted_message_is_one_of_the_code() -> None:
    messages = quoted()
    assert len(messages) > 35
    unknown = [text for text in messages if not re.search(pattern(text), SOURCE)]
    assert unknown == []


def test_an_invented_message_would_be_noticed() -> None:
    assert not re.search(pattern("process … has caught a cold"), SOURCE)
