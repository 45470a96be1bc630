"""The agent on its way into the guest: a second initramfs archive beside the image's own.

Building the agent compiles it, which takes a third of the time that restoring a VM
does; so it is kept by its sources.
"""

from __future__ import annotations

import asyncio
import os
import sys
from importlib import resources

import hotlun
from hotlun.agent_file import agent_bytes
from hotlun.vm.cache import Shelf, fingerprint
from hotlun.vm.initramfs import Archive

_NAME = "agent.cpio"


async def agent_archive() -> bytes:
    """An archive with the agent as shipped, `/agent.pyz`. Equal sources give equal bytes."""
    key = _sources()
    shelf = Shelf("agents", keep=4)
    if (entry := shelf.find(key)) is None:
        async with shelf.lock(key):
            if (entry := shelf.find(key)) is None:
                with shelf.building(key) as directory:
                    await asyncio.to_thread(_build, os.path.join(directory, _NAME))
                    entry = shelf.finish(key, directory)
    return _read(os.path.join(entry, _NAME))


def _sources() -> str:
    package = resources.files(hotlun)
    files = [package.joinpath("agent_file.py")]
    for part in ("agent", "bridge"):
        files += package.joinpath(part).iterdir()
    sources = sorted((file.name, file.read_bytes()) for file in files if file.name.endswith(".py"))
    return fingerprint(sys.version, *(part for source in sources for part in source))


def _build(path: str) -> None:
    archive = Archive()
    archive.file("agent.pyz", agent_bytes(), executable=True)
    with open(path, "wb") as file:
        file.write(archive.finished())


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
