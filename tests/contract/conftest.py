"""A VM for the tests of the QEMU backend, and the backend connected to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.qemu import connected, running_qemu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.qemu import QEMU

    from hotlun.backends.qemu import QEMUHostBackend


@pytest.fixture
async def vm(tmp_path: Path) -> AsyncIterator[QEMU]:
    """A VM without disks."""
    async with running_qemu(tmp_path) as vm:
        yield vm


@pytest.fixture
async def host(vm: QEMU) -> AsyncIterator[QEMUHostBackend]:
    """Connected to the VM, which is bare again after the test."""
    async with connected(vm) as host:
        yield host
        assert await vm.is_bare()
