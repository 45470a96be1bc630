"""Builds the agent's single file: what goes into a guest that has Python and nothing of ours.

A zip file that Python runs, with `hotlun.agent` and the part of `hotlun.bridge`
that both ends share. Its `hotlun` package has an empty root: ours imports the whole
library, which the guest neither has nor could run.

Each module is there twice, as source for any Python and compiled by the one that
builds the file: compiling in an emulated guest costs more than all the rest of the
agent's start. The same sources and the same Python give the same bytes.
"""

from __future__ import annotations

import io
import py_compile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

_SHEBANG = b"#!/usr/bin/env python3\n"
_MAIN = "zipped.py"
_HOST_ONLY = frozenset(
    {
        "accepting.py",
        "client.py",
        "greeting.py",
        "keeper.py",
        "listening.py",
        "openings.py",
        "responses.py",
        "threaded.py",
        "wire.py",
    }
)
_EARLIEST = (1980, 1, 1, 0, 0, 0)
"""The first moment that a zip file can write down."""


def agent_bytes() -> bytes:
    """The file's content."""
    archive = io.BytesIO()
    archive.write(_SHEBANG)
    with zipfile.ZipFile(archive, "a") as file, tempfile.TemporaryDirectory() as scratch:
        for name, source in sorted(_sources().items()):
            # Stored as they are: a guest's Python may come without zlib.
            file.writestr(zipfile.ZipInfo(name, _EARLIEST), source)
            file.writestr(zipfile.ZipInfo(f"{name}c", _EARLIEST), _compiled(name, source, scratch))
    return archive.getvalue()


def build_agent(target: str | os.PathLike[str]) -> Path:
    """Write the agent to `target`, executable; gives its path back.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(target)
    path.write_bytes(agent_bytes())
    path.chmod(0o755)
    return path


def _sources() -> dict[str, str]:
    sources = {"hotlun/__init__.py": ""}
    package = Path(__file__).parent
    for part in ("agent", "bridge"):
        for path in (package / part).glob("*.py"):
            if path.name not in _HOST_ONLY:
                name = "__main__.py" if path.name == _MAIN else f"hotlun/{part}/{path.name}"
                sources[name] = path.read_text(encoding="utf-8")
    return sources


def _compiled(name: str, source: str, scratch: str) -> bytes:
    """The module as bytecode that is not compared with its source when it is loaded."""
    path = Path(scratch, "module.py")
    path.write_text(source, encoding="utf-8")
    py_compile.compile(
        str(path),
        cfile=f"{path}c",
        dfile=name,
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    return Path(f"{path}c").read_bytes()
