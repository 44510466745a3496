"""Writes the documents that are made from the code, so that they cannot drift from it.

Covers: docs/states.md, docs/errors.md, docs/protocol.md as a whole, and the table of modules in
docs/architecture.md between its two markers. ``--check`` writes nothing and fails when a document is out of date.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

import msgspec
from msgspec import inspect

from gpusched.domain.moves import STEPS
from gpusched.domain.states import MOVING, TRANSITIONS, ProcState, Trigger, tier_of
from gpusched.errors import BY_CODE, GpuschedError
from gpusched.protocol.codec import MAX_LINE_BYTES
from gpusched.protocol.messages import NAME_PATTERN
from gpusched.protocol.methods import METHODS, Method
from state_texts import STATES, TRIGGERS

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- modules: made by scripts/make_docs.py -->"
END = "<!-- /modules -->"
NOTICE = "<!-- Made by scripts/make_docs.py from the code: do not edit. -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args().check
    stale = [path for path, text in documents() if not path.exists() or path.read_text() != text]
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: make docs", file=sys.stderr)
        return 1 if stale else 0
    for path, text in documents():
        path.write_text(text)
    for path in stale:
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


def documents() -> Iterator[tuple[Path, str]]:
    """Each document and what it should hold now."""
    for name, make in PAGES.items():
        yield ROOT / "docs" / name, make()


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def code(text: object) -> str:
    return f"`{text}`"


# -- states ---------------------------------------------------------------------------------------


def states() -> str:
    """docs/states.md."""
    transitions = [
        (code(state), code(trigger), code(found))
        for (state, trigger), found in sorted(
            TRANSITIONS.items(), key=lambda e: (_rank(e[0][0]), list(Trigger).index(e[0][1]))
        )
    ]
    moves = [
        (
            code(move),
            str(number),
            code(step.do),
            code(step.undo) if step.undo else "none: forward only",
        )
        for move, steps in STEPS.items()
        for number, step in enumerate(steps, 1)
    ]
    return "\n".join(
        (
            f"{NOTICE}\n\n# The states of a managed process\n",
            "One table (`gpusched/domain/states.py`) says how a process moves between states. A pair of state and"
            "\ntrigger that is not in it is refused and changes nothing.\n",
            table(
                ("state", "tier", "a move is under way", "meaning"),
                [
                    (code(s), code(tier_of(s)), "yes" if s in MOVING else "", STATES[s])
                    for s in ProcState
                ],
            ),
            "\nThe tier is where the authoritative copy of the device memory is. It is derived from the state.\n",
            "## Triggers\n",
            table(("trigger", "what happened"), [(code(t), TRIGGERS[t]) for t in Trigger]),
            "\n## Transitions\n",
            table(("state", "trigger", "next state"), transitions),
            "\n## Moves\n",
            "Steps over every process of a tree. After a failure the undo of the failed step and of each step before it"
            "\nis run, newest first; then the driver is asked what is true (`gpusched/domain/moves.py`).\n",
            table(("move", "step", "does", "undone by"), moves),
            "",
        )
    )


def _rank(state: ProcState) -> int:
    return list(ProcState).index(state)


# -- errors ---------------------------------------------------------------------------------------

#: What each code means and what a client can do.
ERRORS: dict[str, str] = {
    "internal": "A defect in gpusched; the daemon's log has the traceback.",
    "invalid_request": "The request is malformed or a parameter is missing, mistyped or out of range.",
    "not_found": "No managed process (or running pid) of that name or number, or it is not yours to see.",
    "already_exists": "The name is taken by a process that lives.",
    "permission_denied": "The process belongs to another user.",
    "illegal_transition": "Not possible in the state that the process is in.",
    "lease_held": "Another client holds a lease; it ends by itself, or `force`.",
    "insufficient_gpu_memory": "It would not fit; `details` has the bytes needed, free and promised.",
    "insufficient_host_memory": "Freezing would take more host RAM than there is or than the budget allows.",
    "insufficient_disk": "No room on disk, for the journal or for an image.",
    "lock_timeout": "The process did not come to rest in time; it runs on.",
    "driver_error": "The driver refused a call; `details` names the call and its result.",
    "criu_error": "CRIU failed; `details` has the end of its log.",
    "unsupported": "Not possible with this driver, backend or kind of process; refused before anything was touched.",
    "process_exited": "The process ended before or during the operation.",
    "process_lost": "The driver could neither finish nor take back a move; the contents of the VRAM are gone.",
    "cancelled": "The operation was given up before it touched anything.",
    "deadline_exceeded": "No answer in time. The operation may still end; ask `status`.",
    "shutting_down": "The daemon is ending and takes no new work; ask the next one.",
    "protocol_mismatch": "Client and daemon do not speak the same protocol.",
    "unavailable": "No daemon (or no driver helper) answers now.",
}


def errors() -> str:
    """docs/errors.md."""
    rows = [
        (
            code(name),
            code(cls.__name__),
            cls.family.name.lower(),
            str(cls.family.value),
            "yes" if cls.retryable else "no",
            ERRORS[name],
        )
        for name, cls in BY_CODE.items()
    ]
    return "\n".join(
        (
            f"{NOTICE}\n\n# Errors\n",
            "Every error has a stable code. On the wire: `code`, `retryable` and `details` beside the text in `error`."
            f"\nIn Python: a class of `gpusched.errors`, all of them `{GpuschedError.__name__}` and"
            "\n`RuntimeError`; they survive pickling, and a code that an SDK does not know becomes the base class."
            "\nOn the command line: the exit code of the family (2 is a wrong use of the command line itself).\n",
            table(("code", "class", "family", "exit code", "retryable", "meaning"), rows),
            "\nRetryable: the same request may succeed later without anything else changing.\n",
        )
    )


# -- protocol -------------------------------------------------------------------------------------


def protocol() -> str:
    """docs/protocol.md."""
    parts = [PROTOCOL_HEAD]
    for name, method in METHODS.items():
        parts += [f"\n### {name}\n", method.doc + "\n", _access(method)]
        parts += ["\nParameters:" + _parameters(method.params)]
        parts += ["\nResult: " + _link(method.result)]
    parts += ["\n## Results\n"]
    for cls in _result_types():
        parts += [f"### {cls.__name__}\n", *([_lead(cls)] if _lead(cls) else []), _fields(cls), ""]
    return "\n".join(parts)


PROTOCOL_HEAD = f"""{NOTICE}

# The protocol

JSON lines over a Unix stream socket, by default `/tmp/gpusched.sock` (`GPUSCHED_SOCKET` overrides it for clients).
One request a line, one response line for each, in order; a connection may send any number.

```
{{"method": "freeze", "params": {{"name": "train"}}, "id": 7}}
{{"ok": true, "result": {{"name": "train", "duration_ms": 412, "tier": "ram", "mem_mb": 15021}}, "id": 7}}
{{"ok": false, "error": "no process is named train", "code": "not_found", "retryable": false, "details": {{}}, "id": 7}}
```

- `params` may be absent where every parameter has a default. `id` is optional and echoed. `error` is a text for a
  person; `code`, `retryable` and `details` are for programs: errors.md.
- Unknown parameters are ignored. A line that is not a JSON object, an unknown method, a missing or mistyped parameter
  each get one error line and the connection goes on. A line of {MAX_LINE_BYTES:,} bytes or more gets an error line and
  closes the connection.
- Integers have no fraction. `*_mb` are MiB, `*_ms` milliseconds, `*_s` seconds.
- A name matches `{NAME_PATTERN.removesuffix("Z").removesuffix(chr(92))}$`.
- An idempotent request may be sent again: a goal already reached is a success without action.
- Fields, parameters and methods may be added; none is ever renamed, retyped or removed.
- Who may call: the peer's uid (SO_PEERCRED) decides. Root and the members of the configured group may call everything.

Try it: `echo '{{"method":"status"}}' | socat -t 600 - UNIX-CONNECT:/tmp/gpusched.sock` (-t: a freeze takes time)

## Methods"""


def _access(method: Method) -> str:
    again = "Idempotent." if method.idempotent else "Not idempotent."
    return f"May be called by {method.access.value}. {again}"


def _parameters(cls: type[msgspec.Struct]) -> str:
    info = inspect.type_info(cls)
    if not isinstance(info, inspect.StructType):
        raise TypeError(f"{cls} is not a struct")
    if not info.fields:
        return " none."
    rows = [
        (code(f.encode_name), describe(f.type), "required" if f.required else code(_default(f)))
        for f in info.fields
    ]
    return "\n\n" + table(("name", "type", "default"), rows)


def _default(field: inspect.Field) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return msgspec.json.encode(field.default_factory()).decode()
    return msgspec.json.encode(field.default).decode()


def describe(kind: inspect.Type) -> str:
    """A parameter's type with its limits, as clients see it."""
    match kind:
        case inspect.NoneType():
            return "null"
        case inspect.BoolType():
            return "bool"
        case inspect.IntType():
            return "int" + _limits(ge=kind.ge, gt=kind.gt, le=kind.le, lt=kind.lt)
        case inspect.FloatType():
            return "number" + _limits(ge=kind.ge, gt=kind.gt, le=kind.le, lt=kind.lt)
        case inspect.StrType(pattern=pattern) if pattern == NAME_PATTERN:
            return "name"
        case inspect.StrType():
            return "string" + _count(kind.min_length, kind.max_length)
        case inspect.ListType():
            return f"list{_count(kind.min_length, kind.max_length)} of {describe(kind.item_type)}"
        case inspect.DictType():
            return f"object of {describe(kind.key_type)} to {describe(kind.value_type)}"
        case inspect.UnionType():
            return " or ".join(describe(each) for each in kind.types)
        case _:
            raise NotImplementedError(f"no words for {kind}")


_SIGNS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}"}


def _count(least: int | None, most: int | None) -> str:
    """A length's limits, as "(1 to 64)"."""
    if most is not None:
        return f" ({least or 0} to {most:,})"
    return f" ({least} or more)" if least is not None else ""


def _limits(**limits: float | None) -> str:
    said = [_SIGNS[k].format(f"{v:,.12g}") for k, v in limits.items() if v is not None]
    return f" ({', '.join(said)})" if said else ""


def _result_types() -> list[type]:
    """Every TypedDict that a result is made of, in order of first mention."""
    found: list[type] = []

    def visit(hint: Any) -> None:
        if is_typeddict(hint) and hint not in found:
            found.append(hint)
            for each in get_type_hints(hint).values():
                visit(each)
        for each in get_args(hint):
            visit(each)

    for method in METHODS.values():
        visit(method.result)
    return found


def _lead(cls: type) -> str:
    doc = cls.__doc__ or ""
    return "" if doc.startswith("dict(") else doc.strip() + "\n"


def _fields(cls: type) -> str:
    hints = get_type_hints(cls, include_extras=True)
    rows = []
    for name, hint in hints.items():
        optional = get_origin(hint) is NotRequired
        said = _link(get_args(hint)[0] if optional else hint)
        rows.append((code(name), said, "may be absent" if optional else ""))
    return table(("field", "type", ""), rows)


def _link(hint: Any) -> str:
    if is_typeddict(hint):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    origin, args = get_origin(hint), get_args(hint)
    if origin is list:
        return f"list of {_link(args[0])}"
    if origin is dict:
        return f"object of {_link(args[0])} to {_link(args[1])}"
    if origin in (Union, UnionType):
        return " or ".join(_link(each) for each in args)
    names = {str: "string", int: "int", float: "number", bool: "bool", NoneType: "null"}
    return names[hint]


# -- architecture ---------------------------------------------------------------------------------


def architecture() -> str:
    """docs/architecture.md with its table of modules made anew; the rest is written by hand."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{modules()}\n{END}{after}"


def modules() -> str:
    """Every module and native source with the first line of its docstring or comment, folder by folder."""
    rows = []
    for root in ("gpusched", "ray_integration"):
        for path in sorted((ROOT / root).rglob("*"), key=_folder_first):
            purpose = _purpose(path)
            if purpose is not None:
                rows.append((code(path.relative_to(ROOT)), purpose))
    return table(("file", "purpose"), rows)


def _folder_first(path: Path) -> tuple[str, bool, str]:
    return str(path.parent), path.name != "__init__.py", path.name


def _purpose(path: Path) -> str | None:
    """None for files that are not sources; ValueError for a source that does not say what it is for."""
    if path.suffix == ".py":
        tree = ast.parse(path.read_text())
        if not tree.body:
            return None  # an empty __init__.py
        said = ast.get_docstring(tree)
    elif path.suffix in (".c", ".h", ".cu"):
        said = path.read_text().lstrip("/* \n")
    else:
        return None
    if not said:
        raise ValueError(
            f"{path.relative_to(ROOT)} does not say what it is for: give it a docstring"
        )
    return said.split("\n\n")[0].replace("\n", " ").split(". ")[0].strip().removesuffix(".") + "."


PAGES: dict[str, Callable[[], str]] = {
    "states.md": states,
    "errors.md": errors,
    "protocol.md": protocol,
    "architecture.md": architecture,
}

if __name__ == "__main__":
    sys.exit(main())
