"""A VM for each test: restoring one takes less than a boot's hundredth part of patience.

After each test the guest's mounts and devices and QEMU's nodes and devices are as
before, or the test has failed, whatever else it found.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.machine import eventually, look

from hotlun.vm import Machine
from hotlun.vm.cache import cache_directory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this directory needs a VM, and the first of them may have to build it."""
    for item in items:
        if "/tests/vm/" in item.path.as_posix():
            item.add_marker(pytest.mark.vm)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture
async def bare_vm() -> AsyncIterator[Machine]:
    """A fresh VM whose sockets are free; nothing is checked afterwards."""
    async with Machine.start(connect=False) as machine:
        yield machine


@pytest.fixture
async def vm() -> AsyncIterator[Machine]:
    """A fresh VM with both backends connected, found afterwards as it was before."""
    async with Machine.start() as machine:
        before = await look(machine)
        yield machine
        assert await eventually(machine, before) == before


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, with the image and what is known of KVM, but no snapshot."""
    shared = Path(cache_directory())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = Path(cache_directory())
    for known in ("images", "accelerator"):
        if (shared / known).is_dir():
            (own / known).symlink_to(shared / known)
    return own
