"""Imports run one way, the agent and the bridge stand alone, and nothing prints but the cli."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).parent.parent.parent / "src" / "hotlun"

LAYERS = (
    {"errors", "gate", "secret", "owners", "windows_paths", "host_paths"},
    {"mount_config"},
    {"model"},
    {"backends.base", "facts", "events", "journal"},
    {"states", "slots", "guest_paths", "records", "record_checks", "event_streams"},
    {"wants", "journal_documents"},
    {"lifecycle", "attachments", "mounts", "recorder", "reconciliation"},
    {"worker", "mount_handle", "tables"},
    {"reconciler", "handover", "callers"},
    {"inheritance"},
    {"session"},
    {"manager"},
)
"""The core, from the bottom: a module imports from lower layers and its own only."""

BELOW_BACKENDS = {
    "",
    "backends",
    "bridge",
    "containers",
    "errors",
    "events",
    "guest_paths",
    "hcs",
    "host_paths",
    "images",
    "model",
    "windows_paths",
}
HOSTS_END = {
    f"bridge.{name}"
    for name in (
        "accepting",
        "client",
        "greeting",
        "keeper",
        "listening",
        "openings",
        "responses",
        "threaded",
        "wire",
    )
}
PROTOCOL = {f"bridge.{name}" for name in ("codes", "documents", "frames", "messages", "responses")}
"""What is said, and not by which socket."""
CORE = set().union(*LAYERS)


def modules() -> dict[str, Path]:
    """Every module, by its name below hotlun."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def run_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, less what is there for the type checker alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not is_typing:
            yield from run_time(child)


def imported(path: Path) -> set[str]:
    """What a module imports at run time, anywhere; names below hotlun with a leading dot."""
    names: set[str] = set()
    for node in run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"a relative import in {path}"
            names.add(node.module)
            if node.module.split(".")[0] == "hotlun":
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    known = modules()
    ours = {name.removeprefix("hotlun").lstrip(".") for name in names if name.startswith("hotlun")}
    return {n for n in names if not n.startswith("hotlun")} | {f".{n}" for n in ours if n in known}


MODULES = modules()


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_imports_downwards(name: str) -> None:
    """And knows no backend but backends.base."""
    for one in imported(MODULES[name]):
        if one.startswith(".") and one not in (".", ".backends"):
            assert one[1:] in CORE, f"{name} imports {one}"
            assert layer(one[1:]) <= layer(name), f"{name} imports {one}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.split(".")[0] == "agent"))
def test_the_agent_knows_the_standard_library_and_the_bridge(name: str) -> None:
    """It is one file that any guest can run."""
    for one in imported(MODULES[name]):
        if one.startswith("."):
            assert one.split(".")[1] in ("agent", "bridge"), f"{name} imports {one}"
            assert one.lstrip(".") not in HOSTS_END, f"{name} imports the host's end"
        else:
            assert one.split(".")[0] in sys.stdlib_module_names, f"{name} imports {one}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.split(".")[0] == "bridge"))
def test_the_bridge_knows_neither_end(name: str) -> None:
    """The protocol knows no socket; only the host's end may use our errors."""
    for one in imported(MODULES[name]):
        if one.startswith("."):
            assert one.split(".")[1] == "bridge" or (name in HOSTS_END and one == ".errors")
        else:
            assert one.split(".")[0] in sys.stdlib_module_names, f"{name} imports {one}"
        if name in PROTOCOL:
            assert one not in ("socket", "asyncio", "selectors", "threading")


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.split(".")[0] == "hcs"))
def test_the_compute_service_knows_disks_and_errors(name: str) -> None:
    """And nothing of backends, Managers or guests."""
    for one in imported(MODULES[name]):
        if one.startswith("."):
            assert one.split(".")[1] in ("hcs", "errors", "model"), f"{name} imports {one}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_imports_upwards(name: str) -> None:
    """Backends know nothing of the Manager, and nobody but the cli knows the cli."""
    top = name.split(".")[0]
    for one in imported(MODULES[name]):
        target = one[1:].split(".")[0] if one.startswith(".") else ""
        if top == "backends":
            assert target in BELOW_BACKENDS, f"{name} imports {one}"
        if top not in ("cli", "__main__"):
            assert target != "cli", f"{name} imports {one}"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.split(".")[0] != "cli"))
def test_only_the_command_line_prints(name: str) -> None:
    """And exits; a program of its own (the agent) exits from its main module."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{name} prints"


def test_the_sources_name_no_mock() -> None:
    """Production code imports no test tool."""
    for name, path in MODULES.items():
        assert not {"unittest.mock", "pytest", "hypothesis"} & imported(path), name
