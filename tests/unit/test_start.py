"""Nothing is imported before it is needed: by the library, the command, and the agent."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import hotlun
from hotlun.agent_file import build_agent

if TYPE_CHECKING:
    from pathlib import Path

LOADED = "import sys; print(*sys.modules, sep='\\n')"

HEAVY = {"asyncio", "dataclasses", "email", "hashlib", "http", "inspect", "ipaddress", "json"} | {
    *("multiprocessing", "platform", "qemu", "rich", "secrets", "shutil", "sqlite3", "ssl"),
    *("subprocess", "tempfile", "unittest", "urllib", "uuid", "xml"),
}


def loaded(*command: str) -> set[str]:
    """The modules that a fresh process says it has."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def added(first: str, then: str) -> set[str]:
    """The modules that `then` imports, after `first` has been."""
    return loaded("-c", f"{first}; {then}; {LOADED}") - loaded("-c", f"{first}; {LOADED}")


def test_the_package_alone_imports_nothing() -> None:
    """Its names come when they are asked for."""
    assert added("import importlib, typing", "import hotlun") == {"hotlun"}


def test_the_names_import_what_a_manager_needs() -> None:
    """Over asyncio: no backend, no database, no process."""
    modules = added("import asyncio", "from hotlun import *")
    assert "hotlun.manager" in modules
    ours = {name.split(".")[1] for name in modules if name.startswith("hotlun.")}
    assert not ours & {"bridge", "cli", "hcs", "vm"}
    assert not modules & (HEAVY - {"dataclasses", "hashlib", "json", "secrets"})


def test_the_names_are_those_that_are_promised() -> None:
    """Each is found, and listed; another is an error, and so is what only a module inside has."""
    assert set(hotlun.__all__) <= set(dir(hotlun))
    for name in hotlun.__all__:
        assert getattr(hotlun, name).__name__ == name
    for name in ("Managers", "HOST_CONTROLLERS", "annotations"):
        with pytest.raises(AttributeError, match=f"'hotlun' has no attribute '{name}'"):
            getattr(hotlun, name)


def test_help_imports_no_library() -> None:
    """Over click, which the command is made with."""
    call = "from hotlun.cli import main; main(['--help'], 'hotlun', standalone_mode=False)"
    modules = added("import click", call)
    ours = {name for name in modules if name.startswith("hotlun.")}
    assert {name for name in ours if not name.startswith("hotlun.cli")} == {"hotlun.errors"}
    assert not modules & (HEAVY - {"shutil"}), "shutil is click's: the terminal's width"


def served(agent: Path, socket: Path, *before: str, then: str) -> set[str]:
    """What a fresh process prints that was to serve, by the single file, where it cannot begin."""
    call = f"runpy.run_path({str(agent)!r}, run_name='__main__')"
    script = (
        *before,
        "import runpy, sys",
        f"sys.path.insert(0, {str(agent)!r})",
        f"sys.argv[1:] = ['--unix', {str(socket)!r}]",
        f"try: {call}",
        f"except SystemExit: {then}",
    )
    return loaded("-I", "-S", "-c", "\n".join(script))


def test_the_agent_imports_what_every_disk_needs(tmp_path: Path) -> None:
    """Before it serves; not what runs programs, for one."""
    agent = build_agent(tmp_path / "agent")
    modules = served(agent, tmp_path / "missing/socket", then=LOADED)
    assert {"hotlun.agent.server", "socket", "ctypes"} <= modules
    assert not modules & (HEAVY - {"json", "hashlib"})


def test_the_agents_modules_are_read_once(tmp_path: Path) -> None:
    """Each is unpacked from the single file one time."""
    count = (
        "import marshal",
        "files, unpack = [], marshal.loads",
        "def loads(data): files.append(unpack(data)); return files[-1]",
        "marshal.loads = loads",
    )
    tell = (
        "names = [one.co_filename for one in files if one.co_filename.startswith('hotlun/')]; "
        "print(names.count('hotlun/agent/server.py'), len(names) - len({*names}))"
    )
    said = served(build_agent(tmp_path / "agent"), tmp_path / "missing/socket", *count, then=tell)
    assert said == {"1", "0"}
