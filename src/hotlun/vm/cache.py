"""Where built things are kept, so that a VM is built once and started often.

Everything in the cache is named by a hash of what went into it and appears by a
rename, whole. Who finds an entry may use it without asking; who does not find it
builds it in a directory of its own under the lock. So two builders never work on
one thing, and a builder that is killed leaves litter, never half a result.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

LOCK_POLL = 0.05
"""Seconds between two tries for a lock: flock(2) can wait, but not be cancelled."""

_BUILDING = ".building-"


def cache_directory() -> str:
    """`$XDG_CACHE_HOME/hotlun`, or `~/.cache/hotlun`; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is to be ignored
        base = os.path.expanduser("~/.cache")
    directory = os.path.join(base, "hotlun")
    os.makedirs(directory, mode=0o700, exist_ok=True)
    return directory


def fingerprint(*parts: str | bytes) -> str:
    """A short name for exactly these parts, in this order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:20]


@contextlib.asynccontextmanager
async def locked(path: str) -> AsyncIterator[None]:
    """Hold the lock file `path`, against other tasks as well as other processes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(LOCK_POLL)
        yield
    finally:
        os.close(descriptor)


class Shelf:
    """One kind of cached directory: `images`, `snapshots`.

    Args:
        kind: the name of the shelf.
        keep: how many entries stay when a new one is put there; the least
            recently used go. A QEMU that has an entry's files open keeps them.
    """

    def __init__(self, kind: str, *, keep: int) -> None:
        self.directory = os.path.join(cache_directory(), kind)
        self.keep = keep
        os.makedirs(self.directory, mode=0o700, exist_ok=True)

    def find(self, key: str) -> str | None:
        """The directory of the entry, now marked as used, or None."""
        path = os.path.join(self.directory, key)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def lock(self, key: str) -> contextlib.AbstractAsyncContextManager[None]:
        """The lock to build the entry under."""
        return locked(os.path.join(self.directory, f".lock-{key}"))

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[str]:
        """A fresh directory to build the entry in; it is gone after the block unless finished.

        To be entered with the lock held. What an earlier holder of the lock, since
        killed, has left is removed.
        """
        prefix = f"{_BUILDING}{key}-"
        for name in os.listdir(self.directory):
            if name.startswith(prefix):
                shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)
        directory = tempfile.mkdtemp(prefix=prefix, dir=self.directory)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def finish(self, key: str, building: str) -> str:
        """Make the directory that `building` gave the entry, in one step."""
        path = os.path.join(self.directory, key)
        os.rename(building, path)
        self._forget_the_oldest()
        return path

    def discard(self, key: str) -> None:
        """Take the entry away, first its name, then its bytes."""
        dying = tempfile.mkdtemp(prefix=f"{_BUILDING}{key}-", dir=self.directory)
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(self.directory, key), os.path.join(dying, "entry"))
        shutil.rmtree(dying, ignore_errors=True)

    def _forget_the_oldest(self) -> None:
        entries = []
        for entry in os.scandir(self.directory):
            if not entry.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    entries.append((entry.stat().st_mtime, entry.name))
        for _, name in sorted(entries, reverse=True)[self.keep :]:
            self.discard(name)
