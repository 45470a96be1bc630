"""A VM for each test: restoring one takes less than a boot's hundredth part of patience.

After each test the guest's mounts and devices and QEMU's nodes and devices are as
before, or the test has failed, whatever else it found.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from support.hcs_on_qemu import HCSOnQEMU
from support.machine import eventually, look
from support.pairs import TAKEN, vm_with_a_device

from hotlun import Manager
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_vm() -> AsyncIterator[Machine]:
    """One VM for a whole file of tests; they ask for `shared_vm`."""
    async with Machine.start() as machine:
        yield machine


@pytest_asyncio.fixture(loop_scope="module")
async def shared_vm(module_vm: Machine) -> AsyncIterator[Machine]:
    """The file's VM, as each test found it so the next one finds it.

    For tests that cost less than a restore. The file's loop has to be one, too:
    `pytestmark = pytest.mark.asyncio(loop_scope="module")`.
    """
    before = await look(module_vm)
    yield module_vm
    assert await eventually(module_vm, before) == before


@pytest_asyncio.fixture(loop_scope="module")
async def manager(shared_vm: Machine) -> AsyncIterator[Manager]:
    """A Manager on the file's VM; what the test does not release, leaving does."""
    async with Manager(shared_vm.host, shared_vm.guest) as manager:
        yield manager


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one_service() -> AsyncIterator[HCSOnQEMU]:
    """The compute service with one VM for a file of tests, which has a device of its own."""
    async with (
        vm_with_a_device(connect=False) as vm,
        HCSOnQEMU.serving(vm, own={TAKEN: "own"}) as service,
    ):
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def service(one_service: HCSOnQEMU) -> AsyncIterator[HCSOnQEMU]:
    """The service, whose VM is found afterwards as it was before."""
    before = await look(one_service.vm)
    one_service.lists_disks = True
    yield one_service
    await one_service.close()  # what a test that has failed has left under way
    assert one_service.attached == {}
    assert one_service.violations == []
    assert await eventually(one_service.vm, before) == before


@pytest.fixture
async def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own: the shared image, what is known of KVM, a copy of the snapshot."""
    shared = Path(cache_directory())
    async with Machine.start(connect=False):
        pass  # now there is a snapshot, and it is the one used last
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = Path(cache_directory())
    for known in ("images", "accelerator"):
        if (shared / known).is_dir():
            (own / known).symlink_to(shared / known)
    snapshots = [path for path in (shared / "snapshots").iterdir() if path.name[0] != "."]
    latest = max(snapshots, key=lambda path: path.stat().st_mtime)
    shutil.copytree(latest, own / "snapshots" / latest.name)
    return own
