"""Rule 6: no global lock; disks never wait for each other."""

from __future__ import annotations

import asyncio

from support.memory import DOWN, VM, A, B, start


async def test_disks_never_wait_for_each_other(vm: VM) -> None:
    """While one is stuck at any step, another goes through its whole life."""
    for backend, operation in (
        (vm.host, "attach"),
        (vm.guest, "mount"),
        (vm.guest, "unmount"),
        (vm.guest, "unplug"),
        (vm.host, "detach"),
    ):
        gate = backend.stall(operation)
        stuck = start(vm.add(A))
        if operation in DOWN:
            stuck_release = start((await stuck).release())
        await gate.reached.wait()
        await (await vm.add(B)).release()
        gate.open()
        if operation in DOWN:
            await stuck_release
        else:
            await (await stuck).release()
    vm.assert_empty()


async def test_many_disks_are_attached_side_by_side(vm: VM) -> None:
    """All of them are at the backend at once."""
    gates = [vm.host.stall("attach", at=n + 1) for n in range(16)]
    adds = [vm.start(f"/d/{n}.img") for n in range(16)]
    for gate in gates:
        await gate.reached.wait()
    for gate in gates:
        gate.open()
    assert len({m.slot for m in await asyncio.gather(*adds)}) == 16
